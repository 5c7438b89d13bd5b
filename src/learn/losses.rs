//! Losses with their gradients. The decoder's backward pass is written by hand, so the losses' is too.

/// PPO's clipped policy loss over the tokens of a micro-batch.
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

/// The Bradley–Terry loss over pairs of scores.
#[derive(Debug, Clone, PartialEq)]
pub struct PairLoss {
    pub loss: f64,
    /// Share of the pairs whose chosen score is the higher.
    pub accuracy: f64,
    pub dchosen: Vec<f32>,
    pub drejected: Vec<f32>,
}

/// Weighted mean of `−log σ(c − r) + center · (c + r)²` (Bradley and Terry, 1952; the second term as in Eisenstein et
/// al., 2023).
pub fn bradley_terry(chosen: &[f32], rejected: &[f32], weights: &[f32], center: f64) -> PairLoss {
    let total = weights.iter().map(|weight| f64::from(*weight)).sum::<f64>().max(1e-12);
    let mut out = PairLoss { loss: 0.0, accuracy: 0.0, dchosen: Vec::new(), drejected: Vec::new() };
    for ((chosen, rejected), weight) in chosen.iter().zip(rejected).zip(weights) {
        let (c, r, share) = (f64::from(*chosen), f64::from(*rejected), f64::from(*weight) / total);
        out.loss += share * (softplus(r - c) + center * (c + r).powi(2));
        out.accuracy += share * f64::from(u8::from(c > r));
        let pull = sigmoid(r - c);
        let spread = 2.0 * center * (c + r);
        out.dchosen.push((share * (spread - pull)) as f32);
        out.drejected.push((share * (spread + pull)) as f32);
    }
    out
}

/// The logistic loss over single scores.
#[derive(Debug, Clone, PartialEq)]
pub struct PointLoss {
    pub loss: f64,
    /// Share of the labels away from ½ whose side the score is on.
    pub accuracy: f64,
    pub dscores: Vec<f32>,
}

/// Weighted mean of the cross-entropy between labels in `[0, 1]` and `σ(score)`.
pub fn pointwise(scores: &[f32], labels: &[f32], weights: &[f32]) -> PointLoss {
    let total = weights.iter().map(|weight| f64::from(*weight)).sum::<f64>().max(1e-12);
    let mut out = PointLoss { loss: 0.0, accuracy: 0.0, dscores: Vec::new() };
    let mut decided = 0.0;
    for ((score, label), weight) in scores.iter().zip(labels).zip(weights) {
        let (score, label, share) = (f64::from(*score), f64::from(*label), f64::from(*weight) / total);
        out.loss += share * (softplus(score) - label * score);
        out.dscores.push((share * (sigmoid(score) - label)) as f32);
        if (label - 0.5).abs() > 1e-9 {
            decided += share;
            out.accuracy += share * f64::from(u8::from((score > 0.0) == (label > 0.5)));
        }
    }
    out.accuracy /= if decided > 0.0 { decided } else { 1.0 };
    out
}

/// DPO's loss over pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct DpoLoss {
    pub loss: f64,
    pub accuracy: f64,
    /// Mean difference of the implicit rewards.
    pub margin: f64,
    /// By each answer's summed log-probability.
    pub dchosen: Vec<f32>,
    pub drejected: Vec<f32>,
}

/// Mean of `−log σ(β ((log π_c − log ref_c) − (log π_r − log ref_r)))` over summed log-probabilities.
pub fn dpo(
    policy_chosen: &[f32],
    policy_rejected: &[f32],
    ref_chosen: &[f32],
    ref_rejected: &[f32],
    beta: f64,
) -> DpoLoss {
    let count = policy_chosen.len().max(1) as f64;
    let mut out =
        DpoLoss { loss: 0.0, accuracy: 0.0, margin: 0.0, dchosen: Vec::new(), drejected: Vec::new() };
    let references = ref_chosen.iter().zip(ref_rejected);
    for ((chosen, rejected), (ref_chosen, ref_rejected)) in
        policy_chosen.iter().zip(policy_rejected).zip(references)
    {
        let chosen = f64::from(*chosen) - f64::from(*ref_chosen);
        let rejected = f64::from(*rejected) - f64::from(*ref_rejected);
        let margin = beta * (chosen - rejected);
        out.loss += softplus(-margin) / count;
        out.accuracy += f64::from(u8::from(margin > 0.0)) / count;
        out.margin += margin / count;
        let pull = (beta * sigmoid(-margin) / count) as f32;
        out.dchosen.push(-pull);
        out.drejected.push(pull);
    }
    out
}

/// `log(1 + eˣ)` without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
