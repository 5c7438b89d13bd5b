//! PPO under a KL penalty, in the order of TRL and of *The N+ Implementation Details of RLHF with PPO* (Huang et al., 2024).
//!
//! 1 rollouts · 2 log-probabilities of policy and reference, scores (both `rollouts.rs`), values · 3 rewards · 4 advantages
//! and returns · 5 epochs over micro-batches (`online.rs`): clipped policy and value losses · 6 adaptive KL coefficient.
//! One frozen base serves all four models: the policy's and the value model's adapters differ, the reference is the base
//! with the adapter off, and what lies below the adapters (the trunk) is computed once an iteration.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::policy::{Adapter, AdapterGradient, Decoder, Model, Shape};

use super::{
    Error, Watch,
    advantages::{gae, rewards, whiten},
    checkpoint::Trainee,
    descent::Measured,
    losses::{self, ValueLoss},
    reward::first_layer,
    rollouts::Rollouts,
    sequence::MicroBatch,
};

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
    pub value_learning_rate: f64,
    pub temperature: f64,
    pub response_length: usize,
    pub gamma: f64,
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
    /// Nats an answer towards which the coefficient is adapted.
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
            learning_rate: 3e-4,
            value_learning_rate: 3e-4,
            temperature: 1.0,
            response_length: 64,
            gamma: 1.0,
            lam: 0.95,
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

/// The value model, which reads from each place how the answer will end.
#[derive(Debug)]
pub(super) struct Critic {
    pub(super) trainee: Trainee,
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

/// What PPO's losses need beside the rollouts; lists of lists have one a sequence, with a number a token.
#[derive(Default)]
pub(super) struct Targets {
    pub(super) values: Vec<Vec<f32>>,
    pub(super) returns: Vec<Vec<f32>>,
    pub(super) advantages: Vec<Vec<f32>>,
    /// `objective/…` by name.
    pub(super) objective: Measured,
}

impl Critic {
    /// Steps 2 to 4.
    pub(super) fn targets(
        &self,
        decoder: &Decoder,
        rollouts: &Rollouts,
        (config, prices): (&Config, Prices),
        watch: &Watch<'_>,
    ) -> Result<Targets, Error> {
        let mut out = Targets::default();
        let adapter = &self.trainee.adapter;
        for (at, micro) in rollouts.micro.iter().enumerate() {
            let values = watch.in_memory(micro, &mut (), |micro, ()| {
                let trunk = rollouts.trunk((at, micro), adapter)?;
                let hidden =
                    decoder.hidden_from(&trunk, &micro.answers(Some(adapter)), adapter.first_layer)?;
                Ok(micro.by_sequence(&self.read(&hidden)?))
            })?;
            out.values.extend(values.into_iter().flatten());
        }
        let mut rewarded = rewards(&rollouts.scores, &rollouts.logprobs, &rollouts.reference, prices.kl);
        for (rewards, surprise) in rewarded.rewards.iter_mut().zip(&rollouts.surprise) {
            for (reward, surprise) in rewards.iter_mut().zip(surprise) {
                *reward -= prices.surprise as f32 * surprise;
            }
        }
        let surprise = rollouts.mean_surprise();
        let cost = prices.kl * rewarded.kl + prices.surprise * surprise;
        let rewards = if config.whiten_rewards { whiten(&rewarded.rewards, false) } else { rewarded.rewards };
        let (advantages, returns) = gae(&rewards, &out.values, config.gamma, config.lam);
        out.advantages = whiten(&advantages, true);
        out.returns = returns;
        let score = rollouts.scores.iter().map(|score| f64::from(*score)).sum::<f64>() / rollouts.count();
        out.objective = vec![
            ("objective/kl", rewarded.kl),
            ("objective/entropy", rollouts.entropy / rollouts.count()),
            ("objective/scores", score),
            ("objective/non_score_reward", -cost),
            ("objective/rlhf_reward", score - cost),
            ("objective/kl_coef", prices.kl),
            ("objective/response_tokens", rollouts.tokens() / rollouts.count()),
            ("objective/surprise", surprise),
            ("val/num_eos_tokens", rollouts.ended() as f64),
        ];
        Ok(out)
    }

    /// The value head on hidden states: one value a row.
    fn read(&self, hidden: &Tensor) -> Result<Vec<f32>, Error> {
        let head = self.trainee.adapter.heads_beside(hidden)?.ok_or(Error::NoScoreHead)?;
        Ok(hidden.to_dtype(DType::F32)?.matmul(&head.t()?)?.squeeze(1)?.to_vec1()?)
    }

    /// The clipped value loss of one micro-batch; its gradient, times `scale`, is added.
    pub(super) fn backward(
        &self,
        decoder: &Decoder,
        micro: &MicroBatch,
        (trunk, old, returns): (&Tensor, &[f32], &[f32]),
        (cliprange_value, scale): (f64, f64),
        gradient: &mut AdapterGradient,
    ) -> Result<ValueLoss, Error> {
        let adapter = &self.trainee.adapter;
        let (hidden, tape) =
            decoder.hidden_taped(trunk, &micro.answers(Some(adapter)), adapter.first_layer)?;
        let loss = losses::value_loss(&self.read(&hidden)?, old, returns, cliprange_value);
        if !loss.loss.is_finite() {
            return Err(Error::NotFinite { what: "the value model's loss" });
        }
        let head = adapter.heads_beside(&hidden)?.ok_or(Error::NoScoreHead)?;
        let dvalues = Tensor::new(scaled(&loss.grad, scale), hidden.device())?.unsqueeze(1)?;
        gradient.add_score(dvalues.t()?.matmul(&hidden.to_dtype(DType::F32)?)?)?;
        decoder.backward(&tape, &dvalues.matmul(&head)?.to_dtype(hidden.dtype())?, gradient)?;
        Ok(loss)
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

pub(super) fn scaled(gradient: &[f32], by: f64) -> Vec<f32> {
    gradient.iter().map(|gradient| gradient * by as f32).collect()
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
