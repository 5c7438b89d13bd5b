//! Text and feedback as numbers: refusal, risk, interaction type, satisfaction, helpfulness.
//!
//! Everything here is a pure function of its arguments, in microseconds on one core, with small linear models at most: it
//! runs on every answer that is served. Only [`Interactions`] remembers something, the tags that it has admitted.

mod classifier;
mod draw;
mod features;
mod fit;
mod interaction;
mod linear;
mod probe;
mod refusal;
mod risk;
mod satisfaction;
mod text;
mod usable;

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use classifier::{Classifier, Labelled, Schedule, held_out, risk_label};
pub use draw::{Lists, draw};
pub use interaction::Interactions;
pub use probe::{Probe, Probed, Probes};
pub use satisfaction::{comparison_values, next_turn, said_of_last, satisfaction, weight};
pub use usable::usable;

/// `[signals]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Weights that `gyrostat train classifier` made; without a file the built-in ones.
    pub classifier: Option<PathBuf>,
    /// Interaction types of your own, each with prompts that are typical of it. A built-in name adds to that type.
    pub interactions: BTreeMap<String, Vec<String>>,
    /// Interaction types that can be told apart at most, built-in ones and `other` included. Each is a metric label
    /// and a set of drift detectors.
    pub interaction_limit: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { classifier: None, interactions: BTreeMap::new(), interaction_limit: 64 }
    }
}

/// The configuration of the signals cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error(
        "signals.interactions: `{name}` cannot name an interaction type (1 to 40 of a-z, 0-9, `_` and `-`)"
    )]
    Interaction { name: String },
    #[error(
        "signals.interaction_limit: {count} interaction types are known, but at most {limit} are allowed"
    )]
    TooManyInteractions { count: usize, limit: usize },
    #[error("signals.classifier: {0}")]
    Classifier(String),
}
