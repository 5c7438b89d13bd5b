//! Learning without rollouts: supervised fine-tuning on demonstrations, and DPO on comparisons.
//!
//! DPO: Rafailov et al., *Direct Preference Optimization*, 2023. The reference is the base with the adapter off.

use std::sync::Arc;

use rand::{rngs::StdRng, seq::SliceRandom};
use serde::{Deserialize, Serialize};

use crate::policy::{Adapter, AdapterGradient, Model};

use super::{
    Error, Sequence, Watch,
    adamw::{self, AdamW},
    losses,
    policy_pass::{PolicyPass, logprobs},
    sequence::MicroBatch,
};

/// How DPO and SFT train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub learning_rate: f64,
    pub epochs: usize,
    /// Examples between two steps of the optimiser.
    pub batch: usize,
    /// DPO's β.
    pub beta: f64,
    pub max_grad_norm: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { learning_rate: 2e-4, epochs: 2, batch: 16, beta: 0.1, max_grad_norm: 1.0 }
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
    config: &Config,
    rng: &mut StdRng,
    watch: &Watch<'_>,
) -> Result<Arc<Adapter>, Error> {
    let pass = |adapter: &Arc<Adapter>, chosen: &[usize], gradient: &mut AdapterGradient| {
        let chosen: Vec<Sequence> = chosen.iter().map(|at| sequences[*at].clone()).collect();
        let tokens: usize = chosen.iter().map(|sequence| sequence.answer().len()).sum();
        let mut loss = 0.0;
        for micro in MicroBatch::pack(&chosen, watch.micro_tokens) {
            watch.between()?;
            let trunk = model.decoder.trunk(&micro.batch(None), adapter.first_layer)?;
            let forward = PolicyPass::new(&model.decoder, &micro, &trunk, adapter, 1.0)?;
            loss -= forward.logprobs().iter().map(|logprob| f64::from(*logprob)).sum::<f64>() / tokens as f64;
            let dlogprobs = vec![-1.0 / tokens as f32; micro.targets.len()];
            forward.backward(&model.decoder, &micro, &dlogprobs, gradient)?;
        }
        Ok(vec![("loss", loss)])
    };
    descend("sft", adapter, sequences.len(), config, rng, watch, &pass)
}

/// Trains `adapter` to prefer the first answer of each pair.
///
/// # Errors
/// There are none, the device fails, a number is not finite, or the update is cancelled.
pub fn dpo(
    model: &Model,
    adapter: Arc<Adapter>,
    pairs: &[(Sequence, Sequence)],
    config: &Config,
    rng: &mut StdRng,
    watch: &Watch<'_>,
) -> Result<Arc<Adapter>, Error> {
    let pass = |adapter: &Arc<Adapter>, chosen: &[usize], gradient: &mut AdapterGradient| {
        let sequences: Vec<Sequence> =
            chosen.iter().flat_map(|at| [pairs[*at].0.clone(), pairs[*at].1.clone()]).collect();
        let (mut policy, mut reference) = (Vec::new(), Vec::new());
        let mut kept = Vec::new();
        for micro in MicroBatch::pack(&sequences, watch.micro_tokens) {
            watch.between()?;
            let trunk = model.decoder.trunk(&micro.batch(None), adapter.first_layer)?;
            let base = logprobs(&model.decoder, &micro, (&trunk, adapter.first_layer), None, 1.0)?;
            let forward = PolicyPass::new(&model.decoder, &micro, &trunk, adapter, 1.0)?;
            let total = |logprobs: &[f32]| {
                micro.by_sequence(logprobs).iter().map(|logprobs| logprobs.iter().sum()).collect::<Vec<f32>>()
            };
            reference.extend(total(&base.logprobs));
            policy.extend(total(forward.logprobs()));
            kept.push((micro, forward));
        }
        let every =
            |values: &[f32], from: usize| values.iter().skip(from).step_by(2).copied().collect::<Vec<f32>>();
        let out = losses::dpo(
            &every(&policy, 0),
            &every(&policy, 1),
            &every(&reference, 0),
            &every(&reference, 1),
            config.beta,
        );
        for (micro, forward) in kept {
            watch.between()?;
            let dlogprobs: Vec<f32> = micro
                .members
                .iter()
                .zip(&micro.lengths)
                .flat_map(|(member, length)| {
                    let side = if member % 2 == 0 { &out.dchosen } else { &out.drejected };
                    std::iter::repeat_n(side[member / 2], *length)
                })
                .collect();
            forward.backward(&model.decoder, &micro, &dlogprobs, gradient)?;
        }
        Ok(vec![("loss", out.loss), ("rewards/accuracies", out.accuracy), ("rewards/margins", out.margin)])
    };
    descend("dpo", adapter, pairs.len(), config, rng, watch, &pass)
}

type Pass<'a> =
    &'a dyn Fn(&Arc<Adapter>, &[usize], &mut AdapterGradient) -> Result<Vec<(&'static str, f64)>, Error>;

/// Epochs over shuffled examples, a step of AdamW after each batch.
#[expect(clippy::too_many_arguments, reason = "what SFT and DPO have in common, called twice")]
fn descend(
    stage: &str,
    mut adapter: Arc<Adapter>,
    examples: usize,
    config: &Config,
    rng: &mut StdRng,
    watch: &Watch<'_>,
    pass: Pass<'_>,
) -> Result<Arc<Adapter>, Error> {
    if examples == 0 {
        return Err(Error::NoData(format!("{stage} needs at least one example")));
    }
    let mut optimiser =
        AdamW::new(adamw::Config { learning_rate: config.learning_rate, ..Default::default() });
    let steps = config.epochs * examples.div_ceil(config.batch);
    let mut step = 0;
    for _ in 0..config.epochs {
        let mut order: Vec<usize> = (0..examples).collect();
        order.shuffle(rng);
        for chosen in order.chunks(config.batch) {
            let mut gradient = AdapterGradient::default();
            let measures = pass(&adapter, chosen, &mut gradient)?;
            let warm = adamw::warmup(step, steps / 10);
            let gradients = gradient.flatten(&adapter)?;
            let parameters = optimiser.step(adapter.parameters()?, gradients, config.max_grad_norm, warm)?;
            adapter = Arc::new(adapter.with_parameters(&parameters)?);
            step += 1;
            watch.progress(stage, step as f64 / steps as f64, &measures);
        }
    }
    Ok(adapter)
}
