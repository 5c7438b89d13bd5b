//! Losses on log-probabilities of sampled answers: PPO, RLOO, GRPO; and on values.

/// A clipped policy loss over the tokens, or the answers, of a micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyLoss {
    pub loss: f64,
    /// By each log-probability.
    pub grad: Vec<f32>,
    pub approxkl: f64,
    pub clipfrac: f64,
    pub ratio: f64,
    pub ratio_var: f64,
}

/// Mean of `max(−A·ratio, −A·clip(ratio, 1−ε, 1+ε))` (Schulman et al., *Proximal Policy Optimization*, 2017).
///
/// Of tokens for PPO; of answers, whose log-probability is the sum of their tokens', for RLOO (Ahmadian et al., *Back to
/// Basics*, 2024).
pub fn policy_loss(logprobs: &[f32], old_logprobs: &[f32], advantages: &[f32], cliprange: f64) -> PolicyLoss {
    let count = logprobs.len().max(1) as f64;
    let mut out =
        PolicyLoss { loss: 0.0, grad: Vec::new(), approxkl: 0.0, clipfrac: 0.0, ratio: 0.0, ratio_var: 0.0 };
    let mut squares = 0.0;
    for ((logprob, old), advantage) in logprobs.iter().zip(old_logprobs).zip(advantages) {
        let difference = f64::from(*logprob) - f64::from(*old);
        let (ratio, advantage) = (difference.exp(), f64::from(*advantage));
        let plain = -advantage * ratio;
        let clipped = -advantage * ratio.clamp(1.0 - cliprange, 1.0 + cliprange);
        out.loss += plain.max(clipped) / count;
        // Where the clipped branch is the larger, the ratio is outside the range and its gradient is zero.
        out.grad.push(if clipped > plain { 0.0 } else { (plain / count) as f32 });
        out.clipfrac += f64::from(u8::from(clipped > plain)) / count;
        out.approxkl += 0.5 * difference * difference / count;
        out.ratio += ratio / count;
        squares += ratio * ratio;
    }
    out.ratio_var = ((squares - count * out.ratio * out.ratio) / (count - 1.0).max(1.0)).max(0.0);
    out
}

/// PPO's clipped value loss over the tokens of a micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct ValueLoss {
    pub loss: f64,
    /// By each value.
    pub grad: Vec<f32>,
    pub clipfrac: f64,
}

/// Half the mean of `max((v − R)², (clip(v, v_old ± ε) − R)²)`.
pub fn value_loss(values: &[f32], old_values: &[f32], returns: &[f32], cliprange_value: f64) -> ValueLoss {
    let count = values.len().max(1) as f64;
    let mut out = ValueLoss { loss: 0.0, grad: Vec::new(), clipfrac: 0.0 };
    for ((value, old), target) in values.iter().zip(old_values).zip(returns) {
        let (value, old, target) = (f64::from(*value), f64::from(*old), f64::from(*target));
        let clipped = value.clamp(old - cliprange_value, old + cliprange_value);
        let (plain, bound) = ((value - target).powi(2), (clipped - target).powi(2));
        out.loss += 0.5 * plain.max(bound) / count;
        out.grad.push(if bound > plain { 0.0 } else { ((value - target) / count) as f32 });
        out.clipfrac += f64::from(u8::from(bound > plain)) / count;
    }
    out
}

/// GRPO's loss over the tokens of a micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct GrpoLoss {
    /// The clipped loss with the KL term in it, and the gradient of both.
    pub policy: PolicyLoss,
    /// Weighted sum of the KL estimates, in nats.
    pub kl: f64,
}

/// `Σ w · (max(−A·ratio, −A·clip(ratio, 1−ε, 1+ε)) + β · k3)` with `k3 = e^d − d − 1`, `d = log π_ref − log π` (Shao et
/// al., *DeepSeekMath*, 2024; the estimate is Schulman's third). The weights say how tokens make a mean: they add up to 1
/// over a whole batch.
pub fn grpo_loss(
    logprobs: &[f32],
    old_logprobs: &[f32],
    ref_logprobs: &[f32],
    advantages: &[f32],
    weights: &[f64],
    (epsilon, beta): (f64, f64),
) -> GrpoLoss {
    let mut policy = policy_loss(logprobs, old_logprobs, advantages, epsilon);
    let count = logprobs.len().max(1) as f64;
    let (mut kl, mut loss) = (0.0, 0.0);
    for (at, weight) in weights.iter().enumerate() {
        let difference = f64::from(logprobs[at]) - f64::from(old_logprobs[at]);
        let (ratio, advantage) = (difference.exp(), f64::from(advantages[at]));
        loss += weight * (-advantage * ratio).max(-advantage * ratio.clamp(1.0 - epsilon, 1.0 + epsilon));
        let back = f64::from(ref_logprobs[at]) - f64::from(logprobs[at]);
        kl += weight * (back.exp_m1() - back);
        let slope = f64::from(policy.grad[at]) * count - beta * back.exp_m1();
        policy.grad[at] = (weight * slope) as f32;
    }
    policy.loss = loss + beta * kl;
    GrpoLoss { policy, kl }
}
