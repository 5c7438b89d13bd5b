//! The reward model: the frozen base, an adapter on its upper layers, and scalar heads that read the end of an answer, or
//! the mean over all its places.
//!
//! Trained on comparisons with −log σ(r_chosen − r_rejected) (Bradley and Terry, 1952; Ouyang et al., 2022) and on single
//! judgements with the logistic loss. Each head sees a bootstrap sample of the examples, so that they agree where there is
//! much evidence and differ where there is little; the score is their mean, and what a policy is trained with is less where
//! they differ (Coste et al., *Reward Model Ensembles Help Mitigate Overoptimization*, 2024). The mean of linear heads is a
//! linear head, which is what PEFT gets: a sequence classifier with one label.

mod agreement;
mod length;
mod reads;

use std::{collections::HashSet, path::Path, sync::Arc};

use candle_core::Tensor;
use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::policy::{self, Adapter, AdapterGradient, Architecture, Decoder, Model, Shape};

use super::{
    Error, Watch,
    advantages::mean_and_deviation,
    descent::{self, Descent},
    scores::Rate,
    sequence::{MicroBatch, Sequence},
};
pub use agreement::Agreement;
pub use reads::Reads;

use agreement::{expected_calibration_error, judge_scores, judgements};
use reads::{Scores, backward, read};

/// How the reward model is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// LoRA rank.
    pub rank: usize,
    /// LoRA alpha; the update is scaled by `alpha / rank`.
    pub alpha: f64,
    /// The share of the layers, from the top, that the adapter reaches.
    pub depth: f64,
    pub learning_rate: f64,
    pub epochs: usize,
    /// The newest examples of each kind that are learned from, at most.
    pub examples: usize,
    /// Examples between two steps of the optimiser.
    pub batch: usize,
    /// Weight of `(r_chosen + r_rejected)²`, which keeps scores around 0.
    pub center: f64,
    pub max_grad_norm: f64,
    /// Bootstrap heads.
    pub heads: usize,
    /// What a policy is trained with is the heads' mean less so many of their standard deviations.
    pub pessimism: f64,
    /// The share of what length alone explains of the judgements that the score does not learn.
    pub length_control: f64,
    /// Where a new reward model reads its score; one that is trained on keeps to its own.
    pub reads: Reads,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            depth: 1.0 / 3.0,
            learning_rate: 1e-3,
            epochs: 2,
            examples: 4096,
            batch: 8,
            center: 0.01,
            max_grad_norm: 1.0,
            heads: 4,
            pessimism: 1.0,
            length_control: 0.0,
            reads: Reads::Answer,
        }
    }
}

/// A scorer of answers.
#[derive(Debug, Clone)]
pub struct RewardModel {
    pub adapter: Arc<Adapter>,
    pub reads: Reads,
}

/// One thing to learn from.
#[derive(Debug, Clone)]
pub enum Example {
    /// The first answer is preferred over the second, whose score should be lower by more than `margin`.
    Comparison { chosen: Sequence, rejected: Sequence, margin: f64, weight: f64 },
    /// An answer with its label in `[0, 1]`, whose log-odds are the score less `margin`.
    Label { answer: Sequence, label: f64, margin: f64, weight: f64 },
}

impl Example {
    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        match self {
            Self::Comparison { chosen, rejected, .. } => [Some(chosen), Some(rejected)],
            Self::Label { answer, .. } => [Some(answer), None],
        }
        .into_iter()
        .flatten()
    }

    /// Tokens of the prompt.
    fn prompt(&self) -> &[u32] {
        let (Self::Comparison { chosen: answer, .. } | Self::Label { answer, .. }) = self;
        &answer.tokens[..answer.prompt]
    }
}

/// The first layer that an adapter of this depth reaches.
pub(crate) fn first_layer(decoder: &Decoder, depth: f64) -> usize {
    let layers = decoder.architecture.layers;
    layers - ((layers as f64 * depth).round() as usize).clamp(1, layers)
}

impl RewardModel {
    /// A new one, which scores at random near 0.
    ///
    /// # Errors
    /// The device fails.
    pub fn new(model: &Model, config: &Config, seed: u64) -> Result<Self, Error> {
        let first_layer = first_layer(&model.decoder, config.depth);
        let Config { rank, alpha, heads, .. } = *config;
        let shape = Shape { rank, alpha, first_layer, heads: heads.max(1) };
        let adapter = Arc::new(Adapter::new(&model.decoder.architecture, shape, seed)?);
        Ok(Self { adapter, reads: config.reads })
    }

    /// Writes the adapter as PEFT reads it, and where the score is read, into `dir`, which exists.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, dir: &Path, base: &str) -> Result<(), policy::Error> {
        self.adapter.save(dir, base)?;
        self.reads.save(dir)
    }

    /// Reads what [`RewardModel::save`], or PEFT, wrote for this architecture.
    ///
    /// # Errors
    /// As [`Adapter::load`], or it reads its score in an unknown way.
    pub fn load(dir: &Path, architecture: &Architecture) -> Result<Self, policy::Error> {
        Ok(Self { adapter: Adapter::load(dir, architecture)?, reads: Reads::beside(dir)? })
    }

    /// A score for each sequence, the mean of the heads; higher is better, 0 is undecided.
    ///
    /// # Errors
    /// The device fails.
    pub fn score(&self, model: &Model, sequences: &[Sequence], watch: &Watch<'_>) -> Result<Vec<f32>, Error> {
        self.cautious(model, sequences, 0.0, watch)
    }

    /// The mean of the heads less `pessimism` of their standard deviations.
    ///
    /// # Errors
    /// The device fails.
    pub fn cautious(
        &self,
        model: &Model,
        sequences: &[Sequence],
        pessimism: f64,
        watch: &Watch<'_>,
    ) -> Result<Vec<f32>, Error> {
        Ok(self.heads(model, sequences, watch)?.iter().map(|heads| cautious(heads, pessimism)).collect())
    }

    /// [`RewardModel::cautious`] of a micro-batch whose trunk, the input of the adapter's first layer, is there already.
    ///
    /// # Errors
    /// The device fails.
    pub(super) fn cautious_from(
        &self,
        model: &Model,
        micro: &MicroBatch,
        trunk: &Tensor,
        pessimism: f64,
    ) -> Result<Vec<f32>, Error> {
        Ok(self.heads_from(model, micro, trunk)?.iter().map(|heads| cautious(heads, pessimism)).collect())
    }

    /// What each head says of each sequence.
    fn heads(&self, model: &Model, sequences: &[Sequence], watch: &Watch<'_>) -> Result<Scores, Error> {
        let mut scores = Vec::with_capacity(sequences.len());
        for micro in MicroBatch::pack(sequences, watch.micro_tokens.get()) {
            let parts = watch.in_memory(&micro, &mut (), |micro, ()| {
                let trunk = model.decoder.trunk(&micro.batch(), self.adapter.first_layer)?;
                self.heads_from(model, micro, &trunk)
            })?;
            scores.extend(parts.into_iter().flatten());
        }
        Ok(scores)
    }

    fn heads_from(&self, model: &Model, micro: &MicroBatch, trunk: &Tensor) -> Result<Scores, Error> {
        let batch = self.reads.batch(micro, &self.adapter);
        let hidden = model.decoder.hidden_from(trunk, &batch, self.adapter.first_layer)?;
        read(&self.adapter, &hidden, &self.reads.places(micro))
    }

    /// Where PPO's value model starts: the same with the mean head.
    ///
    /// # Errors
    /// The device fails.
    pub fn value(&self) -> Result<Arc<Adapter>, Error> {
        Ok(Arc::new(self.adapter.with_mean_head()?))
    }

    /// Trains on the examples, in an order and with bootstrap samples that `seed` draws.
    ///
    /// # Errors
    /// The device fails, a number is not finite, or the update is cancelled.
    pub fn train(
        &mut self,
        model: &Model,
        examples: &[Example],
        (config, seed): (&Config, u64),
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let Config { epochs, batch, learning_rate, max_grad_norm, .. } = *config;
        let descent = Descent {
            stage: "reward",
            examples: examples.len(),
            epochs,
            batch,
            learning_rate,
            max_grad_norm,
            seed,
        };
        let heads = self.adapter.score.as_ref().ok_or(Error::NoScoreHead)?.dim(0)?;
        let (examples, reads) = (length::controlled(examples, config.length_control), self.reads);
        let pass = |adapter: &Arc<Adapter>, chosen: &[usize], gradient: &mut AdapterGradient| {
            let draws: Vec<Vec<f32>> = chosen.iter().map(|at| bootstrap(heads, seed, *at)).collect();
            let chosen: Vec<&Example> = chosen.iter().map(|at| &examples[*at]).collect();
            let agreement = pass(model, (adapter, reads), (&chosen, &draws), config.center, gradient, watch)?;
            Ok(vec![("loss", agreement.loss), ("accuracy", agreement.accuracy)])
        };
        (self.adapter, _) = descent.run(Arc::clone(&self.adapter), watch, &pass)?;
        Ok(())
    }

    /// Loss, accuracy and calibration on examples that it does not learn from.
    ///
    /// # Errors
    /// The device fails, or the update is cancelled.
    pub fn evaluate(
        &self,
        model: &Model,
        examples: &[Example],
        config: &Config,
        watch: &Watch<'_>,
    ) -> Result<Agreement, Error> {
        let sequences: Vec<Sequence> =
            examples.iter().flat_map(|example| example.sequences().cloned()).collect();
        let scores: Scores =
            self.score(model, &sequences, watch)?.into_iter().map(|score| vec![score]).collect();
        let longer_wins = length::longer_wins(examples);
        let mut rest = &scores[..];
        let answers = examples.iter().map(|example| {
            let (own, next) = rest.split_at(example.sequences().count());
            rest = next;
            f64::from(own[0][0])
        });
        let score = answers.sum::<f64>() / examples.len().max(1) as f64;
        let examples: Vec<&Example> = examples.iter().collect();
        let draws = vec![vec![1.0]; examples.len()];
        let (agreement, _) = judge_scores((&examples, &draws), &scores, config.center);
        let calibration_error = expected_calibration_error(&judgements(&examples, &scores));
        Ok(Agreement { score, calibration_error, longer_wins, ..agreement })
    }

    /// How often it orders examples rightly. The answers to one prompt are judged alike, rightly or wrongly, so that what
    /// is counted are prompts: an interval over the examples would promise more than they know.
    ///
    /// # Errors
    /// As `evaluate`.
    pub fn ordered(
        &self,
        model: &Model,
        examples: &[Example],
        config: &Config,
        watch: &Watch<'_>,
    ) -> Result<Rate, Error> {
        let prompts = examples.iter().map(Example::prompt).collect::<HashSet<_>>().len();
        let accuracy = self.evaluate(model, examples, config, watch)?.accuracy;
        Ok(Rate { events: (accuracy * prompts as f64).round() as u64, n: prompts as u64 })
    }
}

fn cautious(heads: &[f32], pessimism: f64) -> f32 {
    let heads: Vec<f64> = heads.iter().map(|head| f64::from(*head)).collect();
    let (mean, deviation) = mean_and_deviation(&heads);
    (mean - pessimism * deviation) as f32
}

/// How often each head sees an example: Poisson with mean 1, the bootstrap of a stream; a single head sees all.
fn bootstrap(heads: usize, seed: u64, example: usize) -> Vec<f32> {
    if heads < 2 {
        return vec![1.0; heads];
    }
    // Apart from the randomness of the epochs' order.
    let mut rng = descent::rng(!seed, example);
    let poisson = |uniform: f64| {
        let (mut count, mut mass) = (0u8, (-1f64).exp());
        let mut below = mass;
        while uniform >= below && count < 12 {
            count += 1;
            mass /= f64::from(count);
            below += mass;
        }
        f32::from(count)
    };
    (0..heads).map(|_| poisson(rng.random())).collect()
}

/// The loss over a batch of examples, each with its weight for each head; its gradient is added.
///
/// One micro-batch is held at a time: the answers of an example lie in the same one.
pub(super) fn pass(
    model: &Model,
    (adapter, reads): (&Arc<Adapter>, Reads),
    (examples, draws): (&[&Example], &[Vec<f32>]),
    center: f64,
    gradient: &mut AdapterGradient,
    watch: &Watch<'_>,
) -> Result<Agreement, Error> {
    let heads = adapter.score.as_ref().ok_or(Error::NoScoreHead)?.dim(0)?;
    let groups: Vec<Vec<&Sequence>> = examples.iter().map(|example| example.sequences().collect()).collect();
    let mut scores = vec![vec![0f32; heads]; groups.iter().map(Vec::len).sum()];
    for micro in MicroBatch::pack_groups(&groups, watch.micro_tokens.get()) {
        watch.in_memory(&micro, gradient, |micro, gradient| {
            let trunk = model.decoder.trunk(&micro.batch(), adapter.first_layer)?;
            let (batch, places) = (reads.batch(micro, adapter), reads.places(micro));
            let (hidden, tape) = model.decoder.hidden_taped(&trunk, &batch, adapter.first_layer)?;
            for (member, own) in micro.members.iter().zip(read(adapter, &hidden, &places)?) {
                scores[*member] = own;
            }
            // An example's slopes depend on no other's scores, which may still be unknown.
            let (_, dscores) = judge_scores((examples, draws), &scores, center);
            let own: Vec<&[f32]> = micro.members.iter().map(|member| &dscores[*member][..]).collect();
            backward(model, adapter, (&tape, &places), &own, gradient)
        })?;
    }
    let (agreement, _) = judge_scores((examples, draws), &scores, center);
    if !agreement.loss.is_finite() {
        return Err(Error::NotFinite { what: "the reward model's loss" });
    }
    Ok(agreement)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bootstrap_samples_have_mean_and_variance_1_and_stay_the_same() {
        let draws: Vec<f64> = (0..4000).flat_map(|example| bootstrap(4, 3, example)).map(f64::from).collect();
        let (mean, deviation) = mean_and_deviation(&draws);
        assert!((mean - 1.0).abs() < 0.03 && (deviation - 1.0).abs() < 0.03, "{mean} {deviation}");
        assert_eq!(bootstrap(4, 3, 17), bootstrap(4, 3, 17));
        assert_eq!(bootstrap(1, 3, 17), [1.0]);
    }
}
