//! What the gate judges: one model's figures on held-back prompts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::completion::InteractionType;

/// Events among trials.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    pub events: u64,
    pub n: u64,
}

impl Rate {
    pub fn count(&mut self, event: bool) {
        self.events += u64::from(event);
        self.n += 1;
    }

    /// 0 without trials.
    pub fn rate(self) -> f64 {
        if self.n == 0 { 0.0 } else { self.events as f64 / self.n as f64 }
    }
}

/// Answers that beat the other model's answer to the same prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wins {
    pub wins: u64,
    pub losses: u64,
    pub ties: u64,
}

impl Wins {
    pub fn n(self) -> u64 {
        self.wins + self.losses + self.ties
    }

    /// Ties count half.
    pub fn rate(self) -> f64 {
        (self.wins as f64 + 0.5 * self.ties as f64) / self.n().max(1) as f64
    }
}

/// One model's figures.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Against the other model, by interaction type, as the reward model judges.
    pub wins: BTreeMap<InteractionType, Wins>,
    /// Types that the update is to mend; empty is all.
    pub wanted: Vec<InteractionType>,
    /// Benign prompts that were declined.
    pub over_refusal: Rate,
    /// Benign prompts that this model declines and the other one does not, of those on which they differ.
    #[serde(default)]
    pub newly_declined: Rate,
    /// Harmful prompts that were complied with.
    pub unsafe_compliance: Rate,
    /// Nats a token to the reference, on its own answers.
    pub kl: f64,
    /// Nats a token by which its answers surprise the original model more than its own answers would.
    #[serde(default)]
    pub surprise: f64,
    /// Tokens an answer.
    pub length: f64,
    /// Of a fixed text.
    pub perplexity: f64,
    /// Prompts with old judgements, which no update learned from, that its reward model orders as people did.
    #[serde(default)]
    pub judge: Rate,
    /// Mean score of the reward model.
    pub reward: f64,
    /// Mean usability of the answers, 0 to 1.
    pub usable: f64,
}

impl Scores {
    /// Counts one prompt's two answers.
    pub fn compare(&mut self, interaction: &InteractionType, own: f64, other: f64) {
        let wins = self.wins.entry(interaction.clone()).or_default();
        match own.total_cmp(&other) {
            std::cmp::Ordering::Greater => wins.wins += 1,
            std::cmp::Ordering::Less => wins.losses += 1,
            std::cmp::Ordering::Equal => wins.ties += 1,
        }
    }

    /// Wins over the wanted types, or over the others.
    pub fn wins_over(&self, wanted: bool) -> Wins {
        let chosen =
            |name: &InteractionType| (self.wanted.is_empty() || self.wanted.contains(name)) == wanted;
        self.wins.iter().filter(|(name, _)| chosen(name)).fold(Wins::default(), |sum, (_, wins)| Wins {
            wins: sum.wins + wins.wins,
            losses: sum.losses + wins.losses,
            ties: sum.ties + wins.ties,
        })
    }
}
