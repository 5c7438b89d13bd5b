//! How much judge models count: as far as people agree with them on the answers that both judged. Pure.
//!
//! A judge who is right in a share `p` of the cases counts `2p − 1`, so that one below chance counts for nothing. `p` is
//! drawn towards [`BEGINS`] by [`PRIOR`] judgements: before anybody has judged the same answers it is that alone, and a
//! judge counts a quarter. People's votes are weighed as trust has weighed them, and judges have no vote on people, nor on
//! each other.

use std::collections::{BTreeMap, HashMap};

use crate::completion::JudgeNote;

use super::{Config, voice::Voice};

/// Judgements' worth of caution that a judge begins with, and how often he is taken to be right in them.
const PRIOR: f64 = 4.0;
const BEGINS: f64 = 0.625;
/// Shared judgements from which on a judge's agreement is taken to be known.
const KNOWN: usize = 20;

/// What each judge's every word counts, with `vote` as people's weights and `most` as what one person may count in all.
///
/// Judges who are not known yet have together no more than one person; all others together have the share
/// [`Config::ai_share`] of the whole at most.
pub(super) fn weigh(
    judged: &[Voice<'_>],
    people: &[(Voice<'_>, f64)],
    most: f64,
    config: &Config,
) -> BTreeMap<String, JudgeNote> {
    let mut votes: HashMap<u64, f64> = HashMap::new();
    for (voice, weight) in people {
        if let Some(verdict) = voice.verdict {
            *votes.entry(voice.subject).or_default() += if verdict { *weight } else { -weight };
        }
    }
    let mut judges: BTreeMap<String, (usize, usize, usize)> = BTreeMap::new();
    for voice in judged {
        let (judgements, shared, agree) = judges.entry(voice.who.clone()).or_default();
        *judgements += 1;
        let vote = votes.get(&voice.subject).copied().unwrap_or(0.0);
        if let Some(verdict) = voice.verdict.filter(|_| vote.abs() > 1e-9) {
            *shared += 1;
            *agree += usize::from((vote > 0.0) == verdict);
        }
    }
    let mut notes: BTreeMap<String, JudgeNote> = judges
        .into_iter()
        .map(|(rater, (judgements, shared, agree))| {
            let rate = (agree as f64 + PRIOR * BEGINS) / (shared as f64 + PRIOR);
            let agreement = (shared > 0).then(|| agree as f64 / shared as f64);
            let weight = (2.0 * rate - 1.0).max(0.0);
            (rater.clone(), JudgeNote { rater, judgements, shared, agreement, weight })
        })
        .collect();
    let whole: f64 = people.iter().map(|(_, weight)| weight).sum();
    let share = config.ai_share.clamp(0.0, 0.99);
    bound(&mut notes, most, |note| note.shared < KNOWN);
    bound(&mut notes, whole * share / (1.0 - share), |_| true);
    notes
}

/// Weighs these judges down to `most` in all.
fn bound(notes: &mut BTreeMap<String, JudgeNote>, most: f64, these: impl Fn(&JudgeNote) -> bool) {
    let sum: f64 =
        notes.values().filter(|note| these(note)).map(|note| note.weight * note.judgements as f64).sum();
    if sum > most {
        for note in notes.values_mut().filter(|note| these(note)) {
            note.weight *= most / sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::completion::FeedbackId;
    use crate::learn::dataset::trust::weigh as trust;

    use super::*;

    fn voice(who: &str, subject: u64, verdict: bool, ai: bool) -> Voice<'static> {
        Voice {
            id: FeedbackId::new(),
            at: subject * 60_000,
            who: who.to_owned(),
            named: true,
            ai,
            subject,
            texts: ["", ""],
            verdict: Some(verdict),
            words: verdict.to_string(),
        }
    }

    /// Three people who agree on sixty pairs; the judge says the same of the first `right` of those that he shares.
    fn world(shared: u64, right: u64, alone: u64) -> Vec<Voice<'static>> {
        let people = (0..180).map(|n| voice(&format!("p{}", n % 3), n / 3, true, false));
        let judge = (0..shared + alone).map(|n| {
            let subject = if n < shared { n } else { 1000 + n };
            voice("judge", subject, n < right || n >= shared, true)
        });
        people.chain(judge).collect()
    }

    fn weight(shared: u64, right: u64, alone: u64) -> JudgeNote {
        trust(world(shared, right, alone), &Config::default()).judges[0].clone()
    }

    #[test]
    fn a_judge_counts_as_far_as_people_agree_with_him() {
        let weights: Vec<f64> = [25, 30, 40, 50].map(|right| weight(50, right, 0).weight).to_vec();
        assert!(weights.is_sorted() && weights[0] < 0.02 && weights[3] > 0.9, "{weights:?}");
        // (40 + 2.5) / 54 is right, and counts twice that less 1.
        assert!((weights[2] - (2.0 * 42.5 / 54.0 - 1.0)).abs() < 1e-12);
        assert_eq!(weight(50, 40, 0).agreement, Some(0.8));
    }

    #[test]
    fn a_judge_below_chance_counts_for_nothing() {
        for (shared, right) in [(1, 0), (3, 1), (9, 4), (50, 24), (51, 25), (60, 0)] {
            assert_eq!(weight(shared, right, 40).weight, 0.0, "{right} of {shared}");
        }
    }

    #[test]
    fn before_anybody_judged_the_same_a_judge_counts_a_quarter_and_is_one_among_others() {
        let note = weight(0, 0, 10);
        assert_eq!((note.shared, note.agreement, note.weight), (0, None, 0.25));
        // Three people with 60 words each: 120 is what the loudest of them may count.
        let loud = weight(0, 0, 2000);
        assert!((loud.weight * 2000.0 - 120.0).abs() < 1e-9, "{loud:?}");
    }

    #[test]
    fn a_judge_who_is_known_has_his_share() {
        let note = weight(60, 60, 2000);
        let half = note.weight * note.judgements as f64;
        assert!((half - 180.0).abs() < 1e-6, "as much as all people together: {half}");
    }

    /// A judge is no rater, votes on nobody, and may read as fast as he likes.
    #[test]
    fn judges_do_not_pass_for_people() {
        let mut voices = world(60, 0, 100);
        let people = trust(voices.clone(), &Config::default());
        assert_eq!(people.raters, 3);
        assert!(people.left_out.is_empty() && people.warnings.is_empty(), "{:?}", people.warnings);
        voices.iter_mut().filter(|voice| voice.ai).for_each(|voice| voice.at = 7);
        let fast = trust(voices.clone(), &Config::default());
        assert!(fast.left_out.is_empty());
        for voice in voices.iter().filter(|voice| !voice.ai) {
            assert_eq!(fast.weights[&voice.id], 1.0);
        }
    }
}
