//! RLOO and GRPO: several answers to each prompt are measured against each other, so that no value model is needed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    advantages::{group_relative, leave_one_out, mean_and_deviation},
    descent::Measured,
    rollouts::Rollouts,
};

/// What RLOO and GRPO have beside PPO's settings of rollouts and steps; names and defaults as in TRL's `RLOOConfig` and
/// `GRPOConfig`, but for GRPO's `beta`, which is 0 there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Answers to each prompt.
    pub num_generations: usize,
    /// Passes over an iteration's answers.
    pub num_iterations: usize,
    /// The clip range of the ratio.
    pub epsilon: f64,
    /// Weight of the KL to the reference: RLOO takes it off the rewards, as PPO does, GRPO adds it to the loss.
    pub beta: f64,
    /// RLOO: whether all advantages are standardised together.
    pub normalize_advantages: bool,
    /// GRPO: whether advantages are in standard deviations of their group.
    pub scale_rewards: bool,
    /// GRPO: how tokens make a mean.
    pub loss_type: LossType,
}

/// How GRPO takes the mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossType {
    /// Each answer counts the same, so that a token of a long one counts less.
    Grpo,
    /// Each token counts the same (Yu et al., *DAPO*, 2025).
    Dapo,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            num_generations: 4,
            num_iterations: 1,
            epsilon: 0.2,
            beta: 0.05,
            normalize_advantages: false,
            scale_rewards: true,
            loss_type: LossType::Dapo,
        }
    }
}

/// RLOO's advantage of each answer, where a nat of KL costs `price`.
pub(super) fn rloo_advantages(config: &Config, price: f64, rollouts: &Rollouts) -> Vec<f64> {
    let rewards: Vec<f64> =
        rollouts.scores.iter().zip(rollouts.kl()).map(|(score, kl)| f64::from(*score) - price * kl).collect();
    leave_one_out(&rewards, &groups(config, rollouts), config.normalize_advantages)
}

/// GRPO's advantage of each answer.
pub(super) fn grpo_advantages(config: &Config, rollouts: &Rollouts) -> Vec<f64> {
    let rewards: Vec<f64> = rollouts.scores.iter().map(|score| f64::from(*score)).collect();
    group_relative(&rewards, &groups(config, rollouts), config.scale_rewards)
}

/// The answers to one prompt stand together, but an empty one may be missing.
fn groups(config: &Config, rollouts: &Rollouts) -> Vec<usize> {
    rollouts.episodes.iter().map(|episode| episode.place / config.num_generations.max(1)).collect()
}

/// The weight of each token of some answers, given by their lengths, where all answers together have `tokens` tokens and
/// are `answers`.
pub(super) fn token_weights(
    kind: LossType,
    lengths: &[usize],
    (tokens, answers): (usize, usize),
) -> Vec<f64> {
    let weight = |length: &usize| match kind {
        LossType::Grpo => 1.0 / (answers * (*length).max(1)) as f64,
        LossType::Dapo => 1.0 / tokens.max(1) as f64,
    };
    lengths.iter().flat_map(|length| std::iter::repeat_n(weight(length), *length)).collect()
}

/// TRL's measures of an iteration.
pub(super) fn measures(config: &Config, rollouts: &Rollouts) -> Measured {
    let rewards: Vec<f64> = rollouts.scores.iter().map(|score| f64::from(*score)).collect();
    let (mean, deviation) = mean_and_deviation(&rewards);
    let groups = groups(config, rollouts);
    let mut alike: BTreeMap<usize, bool> = BTreeMap::new();
    for (group, distance) in groups.iter().zip(group_relative(&rewards, &groups, false)) {
        let alike = alike.entry(*group).or_insert(true);
        *alike = *alike && distance.abs() < 1e-8;
    }
    let same = alike.values().filter(|alike| **alike).count() as f64;
    let nats = rollouts.kl().iter().sum::<f64>();
    vec![
        ("reward", mean),
        ("reward_std", deviation),
        ("frac_reward_zero_std", same / alike.len().max(1) as f64),
        ("kl", nats / rollouts.tokens().max(1.0)),
        ("entropy", rollouts.entropy / rollouts.tokens().max(1.0)),
        ("completions/mean_length", rollouts.tokens() / rollouts.count()),
        ("completions/clipped_ratio", 1.0 - rollouts.ended() as f64 / rollouts.count()),
        ("objective/kl", nats / rollouts.count()),
        ("objective/scores", mean),
    ]
}
