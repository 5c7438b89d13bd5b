//! The reward model: the frozen base, an adapter on its upper layers, and a scalar head that reads the last token.
//!
//! Trained on comparisons with −log σ(r_chosen − r_rejected) (Bradley and Terry, 1952; Ouyang et al., 2022) and on single
//! judgements with the logistic loss. Stored as PEFT stores a sequence classifier with one label.

use std::sync::Arc;

use candle_core::Tensor;
use rand::{rngs::StdRng, seq::SliceRandom};
use serde::{Deserialize, Serialize};

use crate::policy::{Adapter, AdapterGradient, Batch, Decoder, Model, Shape, Tape};

use super::{
    Error, Watch,
    adamw::{self, AdamW},
    losses,
    sequence::{MicroBatch, Sequence},
};

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
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            depth: 1.0 / 3.0,
            learning_rate: 3e-4,
            epochs: 1,
            examples: 4096,
            batch: 32,
            center: 0.01,
            max_grad_norm: 1.0,
        }
    }
}

/// A scorer of answers.
#[derive(Debug, Clone)]
pub struct RewardModel {
    pub adapter: Arc<Adapter>,
}

/// One thing to learn from.
#[derive(Debug, Clone)]
pub enum Example {
    /// The first answer is preferred over the second.
    Comparison { chosen: Sequence, rejected: Sequence, weight: f64 },
    /// An answer with its label in `[0, 1]`.
    Label { answer: Sequence, label: f64, weight: f64 },
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
}

/// How well a reward model agrees with examples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    pub loss: f64,
    /// Share of the comparisons, and of the labels away from ½, that the score orders rightly.
    pub accuracy: f64,
    pub examples: usize,
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
        let shape = Shape { rank: config.rank, alpha: config.alpha, first_layer, score: true };
        Ok(Self { adapter: Arc::new(Adapter::new(&model.decoder.architecture, shape, seed)?) })
    }

    /// A score for each sequence; higher is better, 0 is undecided.
    ///
    /// # Errors
    /// The device fails.
    pub fn score(&self, model: &Model, sequences: &[Sequence], watch: &Watch<'_>) -> Result<Vec<f32>, Error> {
        let mut scores = Vec::with_capacity(sequences.len());
        for micro in MicroBatch::pack(sequences, watch.micro_tokens) {
            watch.between()?;
            let batch = micro.batch(Some(&self.adapter));
            let trunk = model.decoder.trunk(&batch, self.adapter.first_layer)?;
            let hidden = model.decoder.hidden_from(&trunk, &batch, self.adapter.first_layer)?;
            scores.extend(self.read(&hidden, &batch)?);
        }
        Ok(scores)
    }

    /// The scores of the sequences of a batch.
    fn read(&self, hidden: &Tensor, batch: &Batch) -> Result<Vec<f32>, Error> {
        let head = self.adapter.score.as_ref().ok_or(Error::NoScoreHead)?;
        let last = hidden.index_select(&Tensor::new(batch.last_rows(), hidden.device())?, 0)?;
        Ok(last.matmul(&head.t()?)?.squeeze(1)?.to_vec1()?)
    }

    /// Trains on the examples, in an order that `rng` draws.
    ///
    /// # Errors
    /// The device fails, a number is not finite, or the update is cancelled.
    pub fn train(
        &mut self,
        model: &Model,
        examples: &[Example],
        config: &Config,
        rng: &mut StdRng,
        watch: &Watch<'_>,
    ) -> Result<Agreement, Error> {
        let mut optimiser =
            AdamW::new(adamw::Config { learning_rate: config.learning_rate, ..Default::default() });
        let mut last = Agreement::default();
        let steps = config.epochs * examples.len().div_ceil(config.batch);
        let mut step = 0;
        for _ in 0..config.epochs {
            let mut order: Vec<usize> = (0..examples.len()).collect();
            order.shuffle(rng);
            for chunk in order.chunks(config.batch) {
                let chosen: Vec<&Example> = chunk.iter().map(|index| &examples[*index]).collect();
                let mut gradient = AdapterGradient::default();
                last = self.pass(model, &chosen, config, Some(&mut gradient), watch)?;
                let gradients = gradient.flatten(&self.adapter)?;
                let warm = adamw::warmup(step, steps / 10);
                let parameters =
                    optimiser.step(self.adapter.parameters()?, gradients, config.max_grad_norm, warm)?;
                self.adapter = Arc::new(self.adapter.with_parameters(&parameters)?);
                step += 1;
                watch.progress(
                    "reward",
                    step as f64 / steps as f64,
                    &[("loss", last.loss), ("accuracy", last.accuracy)],
                );
            }
        }
        Ok(last)
    }

    /// Loss and accuracy on examples that it does not learn from.
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
        let examples: Vec<&Example> = examples.iter().collect();
        self.pass(model, &examples, config, None, watch)
    }

    /// The loss over a set of examples and, if asked for, its gradient.
    ///
    /// Scores first, then their gradient, then backward: the loss of a comparison needs both of its scores, which may
    /// lie in different micro-batches, so with a gradient the tapes of all micro-batches are held until the scores are
    /// known.
    fn pass(
        &self,
        model: &Model,
        examples: &[&Example],
        config: &Config,
        gradient: Option<&mut AdapterGradient>,
        watch: &Watch<'_>,
    ) -> Result<Agreement, Error> {
        let sequences: Vec<Sequence> =
            examples.iter().flat_map(|example| example.sequences().cloned()).collect();
        let mut scores = Vec::with_capacity(sequences.len());
        let mut kept = Vec::new();
        for micro in MicroBatch::pack(&sequences, watch.micro_tokens) {
            watch.between()?;
            let batch = micro.batch(Some(&self.adapter));
            let first_layer = self.adapter.first_layer;
            let trunk = model.decoder.trunk(&batch, first_layer)?;
            let hidden = if gradient.is_some() {
                let (hidden, tape) = model.decoder.hidden_taped(&trunk, &batch, first_layer)?;
                kept.push((micro, tape));
                hidden
            } else {
                model.decoder.hidden_from(&trunk, &batch, first_layer)?
            };
            scores.extend(self.read(&hidden, &batch)?);
        }
        let (agreement, dscores) = judge_scores(examples, &scores, config.center);
        if !agreement.loss.is_finite() {
            return Err(Error::NotFinite { what: "the reward model's loss" });
        }
        if let Some(gradient) = gradient {
            for (micro, tape) in kept {
                watch.between()?;
                let dscores: Vec<f32> = micro.members.iter().map(|member| dscores[*member]).collect();
                self.backward(model, &micro, &tape, &dscores, gradient)?;
            }
        }
        Ok(agreement)
    }

    /// Adds the gradient of a micro-batch's scores.
    fn backward(
        &self,
        model: &Model,
        micro: &MicroBatch,
        tape: &Tape,
        dscores: &[f32],
        gradient: &mut AdapterGradient,
    ) -> Result<(), Error> {
        let Some(head) = &self.adapter.score else { return Err(Error::NoScoreHead) };
        let hidden = tape.hidden();
        let rows = Tensor::new(micro.last_rows(), hidden.device())?;
        let last = hidden.index_select(&rows, 0)?;
        let dscores = Tensor::new(dscores, hidden.device())?.unsqueeze(1)?;
        gradient.add_score(dscores.t()?.matmul(&last)?)?;
        let dhidden = hidden.zeros_like()?.index_add(&rows, &dscores.matmul(head)?, 0)?;
        model.decoder.backward(tape, &dhidden, gradient)?;
        Ok(())
    }
}

/// The mean loss over the examples, and its gradient for each score, in the order of their sequences.
fn judge_scores(examples: &[&Example], scores: &[f32], center: f64) -> (Agreement, Vec<f32>) {
    let (mut chosen, mut rejected, mut pair_weights) = (Vec::new(), Vec::new(), Vec::new());
    let (mut single, mut labels, mut label_weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut at = 0;
    for example in examples {
        match example {
            Example::Comparison { weight, .. } => {
                chosen.push(at);
                rejected.push(at + 1);
                pair_weights.push(*weight as f32);
                at += 2;
            }
            Example::Label { label, weight, .. } => {
                single.push(at);
                labels.push(*label as f32);
                label_weights.push(*weight as f32);
                at += 1;
            }
        }
    }
    let pick = |at: &[usize]| at.iter().map(|at| scores[*at]).collect::<Vec<f32>>();
    let pairs = losses::bradley_terry(&pick(&chosen), &pick(&rejected), &pair_weights, center);
    let singles = losses::pointwise(&pick(&single), &labels, &label_weights);
    let total = (chosen.len() + single.len()).max(1) as f64;
    let (pair_share, single_share) = (chosen.len() as f64 / total, single.len() as f64 / total);
    let mut dscores = vec![0f32; scores.len()];
    let mut add = |at: &[usize], gradient: &[f32], share: f64| {
        for (at, gradient) in at.iter().zip(gradient) {
            dscores[*at] = gradient * share as f32;
        }
    };
    add(&chosen, &pairs.dchosen, pair_share);
    add(&rejected, &pairs.drejected, pair_share);
    add(&single, &singles.dscores, single_share);
    let agreement = Agreement {
        loss: pairs.loss * pair_share + singles.loss * single_share,
        accuracy: pairs.accuracy * pair_share + singles.accuracy * single_share,
        examples: examples.len(),
    };
    (agreement, dscores)
}
