//! Learning without rollouts: supervised fine-tuning on demonstrations, DPO or IPO on comparisons, KTO on single judgements.
//!
//! The reference is the base with the adapter off.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::policy::{Adapter, AdapterGradient, Model};

use super::{
    Error, Sequence, Watch,
    descent::{Descent, Measured},
    losses::{self, KtoWeights},
    policy_pass::{BesideBase, PolicyPass, logprobs},
    sequence::MicroBatch,
};

/// How SFT, DPO and KTO train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub learning_rate: f64,
    pub epochs: usize,
    /// Examples between two steps of the optimiser.
    pub batch: usize,
    /// The loss of pairs.
    pub loss: PairLoss,
    /// DPO's and KTO's β; IPO's τ.
    pub beta: f64,
    /// What KTO's good and bad examples count.
    pub desirable_weight: f64,
    pub undesirable_weight: f64,
    pub max_grad_norm: f64,
}

/// What is made of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PairLoss {
    /// DPO.
    Sigmoid,
    Ipo,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            epochs: 2,
            batch: 16,
            loss: PairLoss::Sigmoid,
            beta: 0.1,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
            max_grad_norm: 1.0,
        }
    }
}

/// Two answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    pub chosen: Sequence,
    pub rejected: Sequence,
    /// What its gradient is multiplied with.
    pub weight: f64,
}

/// An answer that was found good or bad.
#[derive(Debug, Clone, PartialEq)]
pub struct Judged {
    pub answer: Sequence,
    pub desirable: bool,
    pub weight: f64,
}

impl Config {
    fn descent<'a>(&self, stage: &'a str, examples: usize, seed: u64) -> Descent<'a> {
        let Self { learning_rate, epochs, batch, max_grad_norm, .. } = *self;
        Descent { stage, examples, epochs, batch, learning_rate, max_grad_norm, seed }
    }
}

/// Trains `adapter` to give the answers of `sequences`.
///
/// # Errors
/// There are none, the device fails, a number is not finite, or the update is cancelled.
pub fn sft(
    model: &Model,
    adapter: Arc<Adapter>,
    sequences: &[Sequence],
    (config, seed): (&Config, u64),
    watch: &Watch<'_>,
) -> Result<Arc<Adapter>, Error> {
    let pass = |adapter: &Arc<Adapter>, chosen: &[usize], gradient: &mut AdapterGradient| {
        let chosen: Vec<Sequence> = chosen.iter().map(|at| sequences[*at].clone()).collect();
        sft_gradient(model, adapter, &chosen, gradient, watch)
    };
    Ok(config.descent("sft", sequences.len(), seed).run(adapter, watch, &pass)?.0)
}

/// Trains `adapter` to prefer the chosen answer of each pair, by DPO or IPO.
///
/// # Errors
/// There are none, the device fails, a number is not finite, or the update is cancelled.
pub fn dpo(
    model: &Model,
    adapter: Arc<Adapter>,
    pairs: &[Pair],
    (config, seed): (&Config, u64),
    watch: &Watch<'_>,
) -> Result<Arc<Adapter>, Error> {
    let pass = |adapter: &Arc<Adapter>, chosen: &[usize], gradient: &mut AdapterGradient| {
        let chosen: Vec<&Pair> = chosen.iter().map(|at| &pairs[*at]).collect();
        pair_gradient(model, adapter, &chosen, config, gradient, watch)
    };
    let stage = if config.loss == PairLoss::Ipo { "ipo" } else { "dpo" };
    Ok(config.descent(stage, pairs.len(), seed).run(adapter, watch, &pass)?.0)
}

/// Trains `adapter` towards good answers and away from bad ones.
///
/// # Errors
/// There are none, the device fails, a number is not finite, or the update is cancelled.
pub fn kto(
    model: &Model,
    adapter: Arc<Adapter>,
    judged: &[Judged],
    (config, seed): (&Config, u64),
    watch: &Watch<'_>,
) -> Result<Arc<Adapter>, Error> {
    let pass = |adapter: &Arc<Adapter>, chosen: &[usize], gradient: &mut AdapterGradient| {
        let chosen: Vec<&Judged> = chosen.iter().map(|at| &judged[*at]).collect();
        kto_gradient(model, adapter, &chosen, config, gradient, watch)
    };
    Ok(config.descent("kto", judged.len(), seed).run(adapter, watch, &pass)?.0)
}

pub(super) fn sft_gradient(
    model: &Model,
    adapter: &Arc<Adapter>,
    sequences: &[Sequence],
    gradient: &mut AdapterGradient,
    watch: &Watch<'_>,
) -> Result<Measured, Error> {
    let tokens: usize = sequences.iter().map(|sequence| sequence.answer().len()).sum();
    let mut loss = 0.0;
    for micro in MicroBatch::pack(sequences, watch.micro_tokens.get()) {
        let losses = watch.in_memory(&micro, gradient, |micro, gradient| {
            let trunk = model.decoder.trunk(&micro.batch(), adapter.first_layer)?;
            let forward = PolicyPass::new(&model.decoder, micro, &trunk, adapter, 1.0)?;
            let nats = forward.logprobs().iter().map(|logprob| f64::from(*logprob)).sum::<f64>();
            let dlogprobs = vec![-1.0 / tokens as f32; micro.targets.len()];
            forward.backward(&model.decoder, &dlogprobs, gradient)?;
            Ok(nats / tokens as f64)
        })?;
        for part in losses {
            loss -= part;
        }
    }
    Ok(vec![("loss", finite(loss)?)])
}

pub(super) fn pair_gradient(
    model: &Model,
    adapter: &Arc<Adapter>,
    pairs: &[&Pair],
    config: &Config,
    gradient: &mut AdapterGradient,
    watch: &Watch<'_>,
) -> Result<Measured, Error> {
    let lengths: Vec<(usize, usize)> =
        pairs.iter().map(|pair| (pair.chosen.answer().len(), pair.rejected.answer().len())).collect();
    let loss = |ratios: &[f64]| {
        let side = |from: usize| ratios.iter().skip(from).step_by(2).copied().collect::<Vec<f64>>();
        match config.loss {
            PairLoss::Sigmoid => losses::dpo(&side(0), &side(1), config.beta),
            PairLoss::Ipo => losses::ipo(&side(0), &side(1), &lengths, config.beta),
        }
    };
    let mut ratios = vec![0.0; 2 * pairs.len()];
    let groups = pairs.iter().map(|pair| [&pair.chosen, &pair.rejected]);
    for micro in MicroBatch::pack_groups(groups, watch.micro_tokens.get()) {
        watch.in_memory(&micro, gradient, |micro, gradient| {
            let pass = forward(model, adapter, micro, &mut ratios)?;
            // A pair's slopes depend on no other pair's ratios, which may still be unknown.
            let out = loss(&ratios);
            let slope = |member: &usize| {
                let slopes = if member.is_multiple_of(2) { &out.dchosen } else { &out.drejected };
                slopes[member / 2] * pairs[member / 2].weight as f32
            };
            let dratios: Vec<f32> = micro.members.iter().map(slope).collect();
            pass.backward(&model.decoder, &micro.spread(&dratios), gradient)
        })?;
    }
    let out = loss(&ratios);
    Ok(vec![
        ("loss", finite(out.loss)?),
        ("rewards/accuracies", out.accuracy),
        ("rewards/chosen", out.chosen),
        ("rewards/rejected", out.rejected),
        ("rewards/margins", out.chosen - out.rejected),
    ])
}

pub(super) fn kto_gradient(
    model: &Model,
    adapter: &Arc<Adapter>,
    judged: &[&Judged],
    config: &Config,
    gradient: &mut AdapterGradient,
    watch: &Watch<'_>,
) -> Result<Measured, Error> {
    let sequences: Vec<Sequence> = judged.iter().map(|judged| judged.answer.clone()).collect();
    let kl = mismatched_kl(model, adapter, &sequences, watch)?;
    let desirable: Vec<bool> = judged.iter().map(|judged| judged.desirable).collect();
    let weights: Vec<f64> = judged.iter().map(|judged| judged.weight).collect();
    let lambda = KtoWeights { desirable: config.desirable_weight, undesirable: config.undesirable_weight };
    let loss = |ratios: &[f64]| losses::kto(ratios, &desirable, &weights, kl, config.beta, lambda);
    let mut ratios = vec![0.0; judged.len()];
    for micro in MicroBatch::pack(&sequences, watch.micro_tokens.get()) {
        watch.in_memory(&micro, gradient, |micro, gradient| {
            let pass = forward(model, adapter, micro, &mut ratios)?;
            let slopes = loss(&ratios).dratios;
            let dratios: Vec<f32> = micro.members.iter().map(|member| slopes[*member]).collect();
            pass.backward(&model.decoder, &micro.spread(&dratios), gradient)
        })?;
    }
    let out = loss(&ratios);
    Ok(vec![
        ("loss", finite(out.loss)?),
        ("kl", kl),
        ("rewards/chosen", out.chosen),
        ("rewards/rejected", out.rejected),
        ("rewards/margins", out.chosen - out.rejected),
    ])
}

/// KTO's `z`: the mean log-ratio of prompts with the answer of their neighbour in the batch, at least 0.
fn mismatched_kl(
    model: &Model,
    adapter: &Arc<Adapter>,
    sequences: &[Sequence],
    watch: &Watch<'_>,
) -> Result<f64, Error> {
    let before = sequences.iter().cycle().skip(sequences.len().saturating_sub(1));
    let strangers: Vec<Sequence> = sequences
        .iter()
        .zip(before)
        .map(|(own, other)| {
            let room = watch.sequence_tokens.saturating_sub(other.answer().len()).max(1);
            let prompt = &own.tokens[own.prompt.saturating_sub(room)..own.prompt];
            Sequence::new([prompt, other.answer()].concat(), prompt.len())
        })
        .collect();
    let mut sum = 0.0;
    for micro in MicroBatch::pack(&strangers, watch.micro_tokens.get()) {
        let parts = watch.in_memory(&micro, &mut (), |micro, ()| {
            Ok(BesideBase::new(&model.decoder, micro, adapter)?.ratios().sum::<f64>())
        })?;
        for part in parts {
            sum += part;
        }
    }
    Ok((sum / strangers.len().max(1) as f64).max(0.0))
}

/// The policy's pass over a micro-batch, whose backward pass is to come; `log π − log π_ref` of each of its answers.
fn forward(
    model: &Model,
    adapter: &Arc<Adapter>,
    micro: &MicroBatch,
    ratios: &mut [f64],
) -> Result<PolicyPass, Error> {
    let trunk = model.decoder.trunk(&micro.batch(), adapter.first_layer)?;
    let base = logprobs(&model.decoder, micro, (&trunk, adapter.first_layer), None, 1.0)?;
    let pass = PolicyPass::new(&model.decoder, micro, &trunk, adapter, 1.0)?;
    let differences: Vec<f32> =
        pass.logprobs().iter().zip(&base.logprobs).map(|(policy, base)| policy - base).collect();
    for (member, list) in micro.members.iter().zip(micro.by_sequence(&differences)) {
        ratios[*member] = list.iter().map(|each| f64::from(*each)).sum();
    }
    Ok(pass)
}

fn finite(loss: f64) -> Result<f64, Error> {
    if loss.is_finite() { Ok(loss) } else { Err(Error::NotFinite { what: "the loss" }) }
}
