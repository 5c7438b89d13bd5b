//! The records of the loop's second half: what drifted, and what was done about it.
//!
//! They are kept in the store, shown by `http` and made by `cycle`, so they belong to the vocabulary.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    CanaryCourse, CompletionId, DataReport, FeedbackId, InteractionType, Proof, SignalKind, Timestamp,
    Version,
};

/// Which way a signal moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Up,
    Down,
}

impl Direction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// Where one watched stream stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriftState {
    /// The reference window is being filled; nothing can alarm yet.
    Learning,
    Steady,
    /// The evidence passed its threshold and nobody has re-learned the baseline since.
    Alarm,
}

/// One line of the scorecard (`GET /v1/alignment`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScorecardRow {
    pub signal: SignalKind,
    /// `None` is the whole traffic.
    pub interaction: Option<InteractionType>,
    /// Mean over the reference window, once it is full.
    pub baseline: Option<f64>,
    /// Mean over the newest readings.
    pub current: Option<f64>,
    pub evidence_log10: f64,
    pub threshold_log10: f64,
    /// STRICT's evidence, where `drift.strict` is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict_log10: Option<f64>,
    pub state: DriftState,
    /// Readings since the stream began, reference included.
    pub n: u64,
}

/// How much of a change one interaction type accounts for. Shares of one alarm sum to 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Share {
    pub interaction: InteractionType,
    pub share: f64,
}

/// What a drift comes from, as far as the readings tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    /// The model answers otherwise than it did.
    #[default]
    Model,
    /// Other kinds of requests come than did; each is answered as before.
    Traffic,
    /// Other people judge, or a few judge otherwise; the rest see no change.
    Raters,
}

impl Cause {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Traffic => "traffic",
            Self::Raters => "raters",
        }
    }
}

/// A drift that was detected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alarm {
    pub id: Uuid,
    pub at: Timestamp,
    pub signal: SignalKind,
    /// The stream that alarmed; `None` is the whole traffic.
    pub interaction: Option<InteractionType>,
    /// The version whose answers drifted.
    pub version: Version,
    pub direction: Direction,
    #[serde(default)]
    pub cause: Cause,
    pub baseline: f64,
    pub current: f64,
    pub evidence_log10: f64,
    pub threshold_log10: f64,
    /// STRICT's evidence, where `drift.strict` is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict_log10: Option<f64>,
    /// The time of the likeliest change, by two-sample GLR, and a range that holds the change in about 90% of cases.
    pub change_at: Timestamp,
    pub change_from: Timestamp,
    pub change_to: Timestamp,
    /// Readings of this stream since the likeliest change.
    pub samples_since_change: u64,
    pub shares: Vec<Share>,
    /// Answers from after the change, worst first.
    pub examples: Vec<CompletionId>,
    pub acknowledged: bool,
}

impl Alarm {
    /// What changed, in a sentence for people.
    pub fn summary(&self) -> String {
        use Direction::{Down, Up};
        let whose = self.interaction.as_ref().map_or(InteractionType::ALL, InteractionType::as_str);
        let (who, what) = match (self.signal, self.direction) {
            (SignalKind::Refusal, Up) => ("The model declines", "more often than it did"),
            (SignalKind::Refusal, Down) => ("The model declines", "less often than it did"),
            (SignalKind::Satisfaction, Down) => ("Users are content", "with fewer answers than they were"),
            (SignalKind::Satisfaction, Up) => ("Users are content", "with more answers than they were"),
            (SignalKind::Helpfulness, Down) => ("The answers are", "of less use than they were"),
            (SignalKind::Helpfulness, Up) => ("The answers are", "of more use than they were"),
            (SignalKind::Kl, Up) => ("The model has moved", "further from the original than it was"),
            (SignalKind::Kl, Down) => ("The model has moved", "nearer to the original than it was"),
            (SignalKind::Probes, Down) => ("The model passes", "fewer of the probes than it did"),
            (SignalKind::Probes, Up) => ("The model passes", "more of the probes than it did"),
        };
        let cause = match self.cause {
            Cause::Model => "",
            Cause::Traffic => ", because other kinds of requests come",
            Cause::Raters => ", by the word of a few raters",
        };
        format!("{who} {what} ({whose}): {:.3} where {:.3} was usual{cause}", self.current, self.baseline)
    }
}

/// Why an update was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "lowercase")]
pub enum Trigger {
    Alarm { alarm: Uuid },
    Hand,
}

/// How an update ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    Promoted {
        version: Version,
    },
    /// The gate said no; its reasons in words.
    Rejected {
        reasons: Vec<String>,
    },
    /// The gate said yes, but what serves could not take it in; it waits to be promoted by hand.
    Withheld {
        version: Version,
        reason: String,
    },
    /// The canary found it worse, or not proven; what was served serves everybody again.
    RolledBack {
        version: Version,
        reason: String,
    },
    /// There was too little feedback to learn from.
    TooFew {
        usable: usize,
        needed: usize,
    },
    /// Too few people stand behind the feedback.
    TooFewRaters {
        raters: usize,
        needed: usize,
    },
    Failed {
        error: String,
    },
    Cancelled,
}

impl Outcome {
    /// Every value of the metric label `outcome`.
    pub const NAMES: [&str; 8] = [
        "promoted",
        "rejected",
        "withheld",
        "rolled_back",
        "too_few",
        "too_few_raters",
        "failed",
        "cancelled",
    ];

    /// The metric label `outcome`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Promoted { .. } => "promoted",
            Self::Rejected { .. } => "rejected",
            Self::Withheld { .. } => "withheld",
            Self::RolledBack { .. } => "rolled_back",
            Self::TooFew { .. } => "too_few",
            Self::TooFewRaters { .. } => "too_few_raters",
            Self::Failed { .. } => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Where an update stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum UpdateState {
    /// `stage` in words (`dataset`, `reward`, `ppo`, `gate`), `progress` from 0 to 1 over the whole update; at the stage
    /// `canary` over the canary's readings.
    Running { stage: String, progress: f64 },
    Ended {
        ended_at: Timestamp,
        #[serde(flatten)]
        outcome: Outcome,
    },
}

/// One training run, from its trigger to its outcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Update {
    pub id: Uuid,
    pub at: Timestamp,
    pub trigger: Trigger,
    /// `ppo`, `dpo`, `sft` or `reward`.
    pub recipe: String,
    /// The interaction types that it is to mend; empty is all.
    pub interactions: Vec<InteractionType>,
    /// The version that it starts from.
    pub base: Version,
    #[serde(flatten)]
    pub state: UpdateState,
    /// What it learned from.
    pub feedback: Vec<FeedbackId>,
    /// TRL's names (`objective/kl`, …) and the gate's scores, as far as they are known.
    pub measures: BTreeMap<String, f64>,
    /// The data, once it is gathered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataReport>,
    /// What the gate saw, once it has judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proof>,
    /// The canary's course, where the gate said yes and canaries are on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanaryCourse>,
}
