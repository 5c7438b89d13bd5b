//! The trained models behind refusal, risk and interaction type, and how they are trained and kept.
//!
//! Linear models over hashed runs of words and readable cues: a few microseconds an answer, the same on every machine,
//! small enough to lie in the binary. `gyrostat train classifier` made the shipped ones and makes a team's own.

mod file;
mod train;

#[cfg(test)]
mod tests;

use std::sync::{Arc, LazyLock};

use crate::completion::{Refusal, RefusalLabel, Risk};

pub use train::{Labelled, Schedule, held_out};

use super::linear::{Calibration, Linear};
use super::{Error, interaction, refusal, risk};

/// Refusal, risk and interaction type by trained weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Classifier {
    /// Declines at all; wholly, if it declines; offers a way forward, if it declines.
    refusal: Linear,
    declines: Calibration,
    fully: Calibration,
    forward: Calibration,
    risk: Linear,
    harmful: Calibration,
    interaction: Linear,
    /// The names of the interaction table's outputs.
    types: Vec<String>,
}

/// The likelier label.
pub fn risk_label(probability: f64) -> Risk {
    if probability < 0.5 { Risk::Benign } else { Risk::Harmful }
}

static BUILT_IN: LazyLock<Result<Arc<Classifier>, Error>> =
    LazyLock::new(|| Classifier::from_bytes(include_bytes!("data/classifier.bin")).map(Arc::new));

impl Classifier {
    /// The shipped weights.
    ///
    /// # Errors
    /// None, if the binary was built from files that its tests have seen.
    pub fn built_in() -> Result<Arc<Self>, Error> {
        BUILT_IN.as_ref().map(Arc::clone).map_err(Error::clone)
    }

    /// Whether `answer` declines `prompt`, wholly or in part, the probability that it declines at all, and whether it
    /// then offers a way forward. Deterministic, linear in the first 4 kB of the answer.
    pub fn refusal(&self, prompt: &str, answer: &str) -> Refusal {
        self.read(prompt, answer).0
    }

    /// [`Self::refusal`] and [`Self::risk_probability`]: one needs the other.
    pub fn read(&self, prompt: &str, answer: &str) -> (Refusal, f64) {
        let risk = self.risk_probability(prompt);
        let features = refusal::features(prompt, answer, risk);
        let [declines, fully, forward] = self.refusal.scores(&features.list);
        let probability = self.declines.probability(declines);
        let label = if probability < 0.5 {
            RefusalLabel::None
        } else if self.fully.probability(fully) < 0.5 {
            RefusalLabel::Partial
        } else {
            RefusalLabel::Full
        };
        let way_forward = label != RefusalLabel::None && self.forward.probability(forward) >= 0.5;
        (Refusal { label, probability, way_forward }, risk)
    }

    /// [`Self::risk_probability`] at one half.
    pub fn risk(&self, prompt: &str) -> Risk {
        risk_label(self.risk_probability(prompt))
    }

    /// The probability that `prompt` asks for something that a careful assistant declines. Linear in its ends.
    pub fn risk_probability(&self, prompt: &str) -> f64 {
        let [score] = self.risk.scores(&risk::features(prompt).list);
        self.harmful.probability(score)
    }

    /// The names of the interaction types that [`Self::interaction`] tells apart.
    pub(super) fn types(&self) -> &[String] {
        &self.types
    }

    /// The likeliest type, as an index into [`Self::types`], and its probability.
    pub(super) fn interaction(&self, features: &super::features::Features) -> (usize, f64) {
        let scores = self.interaction.all_scores(&features.list);
        let best =
            (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a))).unwrap_or(0);
        let sum: f64 = scores.iter().map(|score| (score - scores[best]).exp()).sum();
        (best, 1.0 / sum)
    }
}
