//! PPO under a KL penalty, in the order of TRL and of *The N+ Implementation Details of RLHF with PPO* (Huang et al., 2024).
//!
//! 1 rollouts · 2 log-probabilities of policy and reference, scores (both `rollouts.rs`), values · 3 rewards · 4 advantages
//! and returns (`critic.rs`) · 5 epochs over micro-batches (`online.rs`): clipped policy and value losses · 6 adaptive KL coefficient.
//! One frozen base serves all four models: the policy's and the value model's adapters differ, the reference is the base
//! with the adapter off, and what lies below the adapters (the trunk) is computed once an iteration.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::policy::{Adapter, Model, Shape};

use super::{Error, reward::first_layer};

/// How the policy is trained; names as in TRL's `PPOConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// LoRA rank of a first version; later versions keep theirs.
    pub rank: usize,
    pub alpha: f64,
    /// The share of the layers, from the top, that a first version's adapter reaches.
    pub depth: f64,
    pub iterations: usize,
    /// Episodes an iteration.
    pub episodes: usize,
    pub num_ppo_epochs: usize,
    /// Optimiser steps an epoch.
    pub num_mini_batches: usize,
    pub learning_rate: f64,
    /// Well above the policy's: as long as it knows nothing, every advantage is noise, and noise takes the policy as far.
    pub value_learning_rate: f64,
    pub temperature: f64,
    pub response_length: usize,
    pub gamma: f64,
    /// Of generalised advantage estimation. An answer is scored at its end, and with TRL's 0.95 its first words get a twentieth of
    /// that after 60 tokens, as long as the value model has not learned what they are worth: in ten iterations it does not.
    pub lam: f64,
    pub cliprange: f64,
    pub cliprange_value: f64,
    pub vf_coef: f64,
    /// What an answer that does not end by itself loses.
    pub missing_eos_penalty: f64,
    pub whiten_rewards: bool,
    /// What a nat costs by which a token surprises the reference more than one of its own would. KL hardly sees a policy that
    /// becomes more random; this does. It is asked of an iteration whose answers surprise on average: to be more predictable
    /// than the reference earns nothing.
    pub surprise_coef: f64,
    /// What a nat of KL costs. Both prices are of scores that spread by 1 at most; where they spread more they rise with it.
    pub kl_coef: f64,
    /// Nats an answer, beyond those that the policy comes with, towards which the coefficient is adapted.
    pub target_kl: f64,
    /// Episodes in which the coefficient changes by a fifth at most.
    pub kl_horizon: f64,
    /// Nats an answer at which training stops.
    pub kl_budget: f64,
    /// Answers that are so many times longer, or shorter, than at the start stop training too.
    pub length_ratio: f64,
    pub max_grad_norm: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            depth: 0.5,
            iterations: 12,
            episodes: 32,
            num_ppo_epochs: 4,
            num_mini_batches: 1,
            learning_rate: 1.25e-4,
            value_learning_rate: 1e-3,
            temperature: 1.0,
            response_length: 64,
            gamma: 1.0,
            lam: 1.0,
            cliprange: 0.2,
            cliprange_value: 0.2,
            vf_coef: 0.1,
            missing_eos_penalty: 0.0,
            whiten_rewards: false,
            surprise_coef: 0.02,
            kl_coef: 0.05,
            target_kl: 6.0,
            kl_horizon: 100.0,
            kl_budget: 40.0,
            length_ratio: 2.0,
            max_grad_norm: 1.0,
        }
    }
}

/// What a nat costs an answer, in units of its score.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Prices {
    pub(super) kl: f64,
    pub(super) surprise: f64,
}

impl Prices {
    /// Of an iteration whose answers surprise the reference by so many nats on average, where scores spread by `spread`.
    pub(super) fn new(config: &Config, kl_coef: f64, spread: f64, surprise: f64) -> Self {
        let surprise_coef = if surprise > 0.0 { config.surprise_coef } else { 0.0 };
        Self { kl: kl_coef * spread, surprise: surprise_coef * spread }
    }
}

/// A policy adapter that changes nothing yet.
///
/// # Errors
/// The device fails.
pub fn new_policy(
    model: &Model,
    rank: usize,
    alpha: f64,
    depth: f64,
    seed: u64,
) -> Result<Arc<Adapter>, Error> {
    let shape = Shape { rank, alpha, first_layer: first_layer(&model.decoder, depth), heads: 0 };
    Ok(Arc::new(Adapter::new(&model.decoder.architecture, shape, seed)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_rise_with_the_spread_of_the_scores_and_being_predictable_earns_nothing() {
        let config = Config { surprise_coef: 0.02, ..Config::default() };
        assert_eq!(Prices::new(&config, 0.05, 1.0, 3.0), Prices { kl: 0.05, surprise: 0.02 });
        assert_eq!(Prices::new(&config, 0.05, 4.0, 3.0), Prices { kl: 0.2, surprise: 0.08 });
        assert_eq!(Prices::new(&config, 0.05, 4.0, -3.0), Prices { kl: 0.2, surprise: 0.0 });
    }
}
