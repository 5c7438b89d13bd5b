//! A judgement as far as trust goes, and how much of the whole one voice may be. Pure.

use crate::completion::FeedbackId;

/// One judgement.
#[derive(Debug, Clone)]
pub struct Voice<'a> {
    pub id: FeedbackId,
    /// Milliseconds.
    pub at: u64,
    /// Who judges; what nobody signed is everybody's own.
    pub who: String,
    /// Whether `who` is a rater by name.
    pub named: bool,
    /// Whether `who` is a judge model, which [`super::judges`] weighs.
    pub ai: bool,
    /// What is judged: an answer, or two.
    pub subject: u64,
    /// Its words: the answers, the second one empty where there is one.
    pub texts: [&'a str; 2],
    /// The subject is good, or its first answer better than its second; `None` says neither.
    pub verdict: Option<bool>,
    /// All that is said, to tell a repeat.
    pub words: String,
}

/// What one group may count at most, so that none has more than `share` of the whole when it is kept to it. Of a few
/// raters each may have twice an equal share: somebody has to be the loudest.
pub(super) fn loudest(mut sums: Vec<f64>, share: f64) -> f64 {
    let share = share.max(2.0 / sums.len().max(1) as f64);
    sums.sort_by(|a, b| b.total_cmp(a));
    let mut rest: f64 = sums.iter().sum();
    for (capped, sum) in sums.iter().enumerate() {
        let left = 1.0 - capped as f64 * share;
        if left <= 0.0 {
            break;
        }
        let most = share * rest / left;
        if *sum <= most {
            return most;
        }
        rest -= sum;
    }
    f64::INFINITY
}
