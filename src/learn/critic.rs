//! PPO's value model, and what the answers of an iteration were worth beside what it expected: steps 2 to 4 of
//! [`super::ppo`].

use candle_core::{DType, Tensor};

use crate::policy::{AdapterGradient, Decoder};

use super::{
    Error, Watch,
    advantages::{gae, rewards, whiten},
    checkpoint::Trainee,
    descent::Measured,
    losses::{self, ValueLoss},
    ppo::{Config, Prices},
    rollouts::Rollouts,
    sequence::MicroBatch,
};

/// The value model, which reads from each place how the answer will end.
#[derive(Debug)]
pub(super) struct Critic {
    pub(super) trainee: Trainee,
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

pub(super) fn scaled(gradient: &[f32], by: f64) -> Vec<f32> {
    gradient.iter().map(|gradient| gradient * by as f32).collect()
}
