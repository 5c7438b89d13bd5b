//! What an update tells of itself: the data, the proof, the canary. Figures that are not known are left out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Timestamp, Version};

/// What was learned from, and what was left out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DataReport {
    /// Judgements that were found, and those that count.
    pub found: usize,
    pub used: usize,
    /// The sum of what they count.
    pub weight: f64,
    /// People who judged, as far as they can be told apart.
    pub raters: usize,
    pub comparisons: usize,
    pub labels: usize,
    pub demonstrations: usize,
    pub prompts: usize,
    /// Answers of earlier versions that are learned from again.
    pub rehearsed: usize,
    /// Prompts by what they are for: `train`, `validation`, `gate`. What is not for training no update trains on.
    pub splits: BTreeMap<String, usize>,
    /// Judgements that do not count, by the reason.
    pub left_out: BTreeMap<String, usize>,
    /// Raters who count for less than what they said, the loudest first; not all, where there are many.
    pub weighed_down: Vec<RaterNote>,
    /// Judge models, the busiest first; not all, where there are many.
    pub judges: Vec<JudgeNote>,
    /// What somebody should look at.
    pub warnings: Vec<String>,
}

/// A rater who counts for less.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RaterNote {
    pub rater: String,
    pub judgements: usize,
    /// Share of the judgements on shared answers in which the rest agrees; `None` if there were none.
    pub agreement: Option<f64>,
    /// Share of his judgements that a model would have said, too, which learned from the others; `None` if it cannot tell.
    #[serde(default)]
    pub opinion: Option<f64>,
    /// What each judgement counts.
    pub weight: f64,
}

/// A judge model and what it is worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JudgeNote {
    pub rater: String,
    pub judgements: usize,
    /// Judgements on answers that people judged, too, and the share of these in which people agree; `None` of none.
    pub shared: usize,
    pub agreement: Option<f64>,
    /// What each judgement counts.
    pub weight: f64,
}

/// One of the gate's checks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    pub passed: bool,
    /// In words, with the figures.
    pub reason: String,
    /// What was measured, and the range that it has to be in.
    pub value: Option<f64>,
    pub least: Option<f64>,
    pub most: Option<f64>,
}

/// What the gate saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    pub incumbent: BTreeMap<String, f64>,
    pub candidate: BTreeMap<String, f64>,
    pub checks: Vec<Check>,
}

/// Readings of one arm.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ArmReadings {
    pub n: u64,
    pub mean: Option<f64>,
}

/// One measure of a canary's two arms; 1 is good.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    pub measure: String,
    pub incumbent: ArmReadings,
    pub candidate: ArmReadings,
}

impl Compared {
    pub fn in_words(&self) -> String {
        let mean = |arm: ArmReadings| arm.mean.map_or("nothing".to_owned(), |mean| format!("{mean:.3}"));
        format!("{} {} against {}", self.measure, mean(self.candidate), mean(self.incumbent))
    }
}

/// A canary's course.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CanaryCourse {
    pub version: Version,
    /// Of the users.
    pub share: f64,
    pub since: Timestamp,
    pub ended_at: Option<Timestamp>,
    pub measures: Vec<Compared>,
    /// Readings of the candidate's satisfaction, and how many there may be.
    pub samples: u64,
    pub budget: u64,
    /// Evidence that the candidate is worse; that it is better; that it is not worse by the margin. Each decides at
    /// `needed_log10`, but for `better`, which is only told.
    pub worse_log10: f64,
    pub better_log10: f64,
    pub safe_log10: f64,
    pub needed_log10: f64,
    /// In words.
    pub ruling: String,
}

impl CanaryCourse {
    /// One that begins.
    pub fn new(version: Version, share: f64, budget: u64, since: Timestamp) -> Self {
        Self {
            version,
            share,
            since,
            ended_at: None,
            measures: Vec::new(),
            samples: 0,
            budget,
            worse_log10: 0.0,
            better_log10: 0.0,
            safe_log10: 0.0,
            needed_log10: 0.0,
            ruling: "under way".to_owned(),
        }
    }
}
