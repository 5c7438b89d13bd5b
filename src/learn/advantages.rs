//! From scores to advantages, in TRL's order and with its names. Lists are ragged: one a episode, one number a token.

/// Rewards of each token, and the KL that went into them.
#[derive(Debug, Clone, PartialEq)]
pub struct Rewards {
    pub rewards: Vec<Vec<f32>>,
    /// Mean over the episodes of `Σ logprob − ref_logprob`.
    pub kl: f64,
}

/// `−kl_coef · (logprob − ref_logprob)` at every token, and the score at the last.
pub fn rewards(scores: &[f32], logprobs: &[Vec<f32>], ref_logprobs: &[Vec<f32>], kl_coef: f64) -> Rewards {
    let mut kl = 0.0;
    let mut all = Vec::with_capacity(scores.len());
    for ((score, logprobs), ref_logprobs) in scores.iter().zip(logprobs).zip(ref_logprobs) {
        let ratios =
            logprobs.iter().zip(ref_logprobs).map(|(logprob, reference)| f64::from(logprob - reference));
        kl += ratios.clone().sum::<f64>();
        let mut rewards: Vec<f32> = ratios.map(|ratio| (-kl_coef * ratio) as f32).collect();
        if let Some(last) = rewards.last_mut() {
            *last += score;
        }
        all.push(rewards);
    }
    Rewards { rewards: all, kl: kl / scores.len().max(1) as f64 }
}

/// Scales to unit variance (with Bessel's correction), and to mean zero if `shift_mean`.
pub fn whiten(values: &[Vec<f32>], shift_mean: bool) -> Vec<Vec<f32>> {
    let count = values.iter().map(Vec::len).sum::<usize>() as f64;
    let mean = values.iter().flatten().map(|v| f64::from(*v)).sum::<f64>() / count.max(1.0);
    let squares = values.iter().flatten().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>();
    let scale = (squares / (count - 1.0).max(1.0) + 1e-8).sqrt().recip();
    let back = if shift_mean { 0.0 } else { mean };
    let whitened = |v: &f32| ((f64::from(*v) - mean) * scale + back) as f32;
    values.iter().map(|values| values.iter().map(whitened).collect()).collect()
}

/// Generalised advantage estimation (Schulman et al., 2016): advantages, and returns = advantages + values.
pub fn gae(
    rewards: &[Vec<f32>],
    values: &[Vec<f32>],
    gamma: f64,
    lam: f64,
) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let mut all = (Vec::new(), Vec::new());
    for (rewards, values) in rewards.iter().zip(values) {
        let mut advantages = vec![0f32; rewards.len()];
        let (mut lastgaelam, mut nextvalue) = (0.0, 0.0);
        for t in (0..rewards.len()).rev() {
            let delta = f64::from(rewards[t]) + gamma * nextvalue - f64::from(values[t]);
            lastgaelam = delta + gamma * lam * lastgaelam;
            nextvalue = f64::from(values[t]);
            advantages[t] = lastgaelam as f32;
        }
        all.1.push(advantages.iter().zip(values).map(|(advantage, value)| advantage + value).collect());
        all.0.push(advantages);
    }
    all
}

/// RLOO's advantages (Ahmadian et al., *Back to Basics*, 2024): each reward over the mean of the others of its group, 0
/// where there is no other. `groups` says which group an answer belongs to; with `normalize` all are standardised.
pub fn leave_one_out(rewards: &[f64], groups: &[usize], normalize: bool) -> Vec<f64> {
    let of_group = group_means(rewards, groups);
    let over = |(reward, (mean, _, count)): (&f64, &(f64, f64, f64))| {
        if *count < 2.0 { 0.0 } else { (reward - mean) * count / (count - 1.0) }
    };
    let advantages: Vec<f64> = rewards.iter().zip(&of_group).map(over).collect();
    if !normalize {
        return advantages;
    }
    let (mean, deviation) = mean_and_deviation(&advantages);
    advantages.iter().map(|advantage| (advantage - mean) / (deviation + GROUP_EPSILON)).collect()
}

/// GRPO's advantages (Shao et al., *DeepSeekMath*, 2024): each reward's distance from its group's mean, in standard
/// deviations of the group if `scale`.
pub fn group_relative(rewards: &[f64], groups: &[usize], scale: bool) -> Vec<f64> {
    let relative = |(reward, (mean, deviation, _)): (&f64, &(f64, f64, f64))| {
        (reward - mean) / if scale { deviation + GROUP_EPSILON } else { 1.0 }
    };
    rewards.iter().zip(&group_means(rewards, groups)).map(relative).collect()
}

/// TRL's, for groups whose rewards are all the same.
const GROUP_EPSILON: f64 = 1e-4;

/// Mean, standard deviation and size of each answer's group.
fn group_means(rewards: &[f64], groups: &[usize]) -> Vec<(f64, f64, f64)> {
    let of = |group: &usize| {
        let members: Vec<f64> =
            rewards.iter().zip(groups).filter(|(_, of)| *of == group).map(|(reward, _)| *reward).collect();
        let (mean, deviation) = mean_and_deviation(&members);
        (mean, deviation, members.len() as f64)
    };
    groups.iter().map(of).collect()
}

/// With Bessel's correction; a single value deviates by 0.
pub fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count.max(1.0);
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    (mean, (squares / (count - 1.0).max(1.0)).sqrt())
}

/// A KL coefficient that steers towards a target (Ziegler et al., *Fine-Tuning Language Models from Human
/// Preferences*, 2019).
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptiveKl {
    value: f64,
    /// What an update may add.
    target: f64,
    horizon: f64,
    /// What the version had that it goes on from.
    start: Option<f64>,
}

impl AdaptiveKl {
    /// The horizon is in episodes. TRL's 10 000 were for runs of millions, and do nothing in some hundreds.
    pub fn new(init_kl_coef: f64, target: f64, horizon: f64) -> Self {
        Self { value: init_kl_coef, target, horizon, start: None }
    }

    pub fn value(&self) -> f64 {
        self.value
    }

    /// The coefficient, and the KL of the first iteration if it was.
    pub fn memory(&self) -> (f64, Option<f64>) {
        (self.value, self.start)
    }

    /// Goes on from a memory.
    pub fn remember(&mut self, (value, start): (f64, Option<f64>)) {
        (self.value, self.start) = (value, start);
    }

    /// Takes the KL to the reference of an iteration of `episodes`. The first one's is what the policy came with: an update
    /// of a version that had reached the target would else have no room, and its price would rise for what others learned.
    pub fn update(&mut self, kl: f64, episodes: usize) {
        let start = *self.start.get_or_insert(kl.max(0.0));
        let error = (kl / (start + self.target) - 1.0).clamp(-0.2, 0.2);
        self.value *= 1.0 + error * episodes as f64 / self.horizon;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_version_comes_with_leaves_an_update_its_room() {
        let after = |nats: [f64; 3]| {
            let mut coefficient = AdaptiveKl::new(0.05, 3.0, 100.0);
            for kl in nats {
                coefficient.update(kl, 10);
            }
            coefficient.value()
        };
        // A first version comes with nothing.
        assert!(after([0.0, 1.0, 2.0]) < 0.05 && after([0.0, 9.0, 9.0]) > 0.05);
        // A later one with what others learned.
        assert!(after([3.0, 4.0, 5.0]) < 0.05 && after([3.0, 9.0, 9.0]) > 0.05);
        // By a fifth for each horizon of episodes at most.
        assert!((after([0.0, 0.0, 0.0]) / 0.05 - 0.98f64.powi(3)).abs() < 1e-12);
        let mut resumed = AdaptiveKl::new(0.05, 3.0, 100.0);
        let mut whole = resumed.clone();
        whole.update(3.0, 10);
        resumed.remember(whole.memory());
        assert_eq!(resumed, whole);
    }
}
