//! How far raters agree on the answers that several of them judged. Pure.
//!
//! The one-coin model of Dawid and Skene (*Maximum likelihood estimation of observer error-rates*, 1979) solved by
//! fixed-point iteration: the vote on each shared answer is that of the others, each weighed by how far *he* is right, and
//! nobody with more than his share; a rater's rate of agreement is drawn towards everybody's by [`PRIOR`] judgements, so that
//! few of them say little. He counts in full who agrees as often as the median judgement's rater, and for nothing who
//! agrees half of the time or less. Where the median itself is no better than a coin nobody is weighed: nothing tells who is
//! right.

use std::collections::HashMap;

use super::voice::{Voice, loudest};

/// Judgements' worth of everybody's agreement that a rater begins with.
const PRIOR: f64 = 4.0;
const ROUNDS: usize = 6;

/// Judgements, and how many of them somebody else agrees with.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Tally {
    pub agree: f64,
    pub of: f64,
}

impl Tally {
    pub(super) fn count(&mut self, agrees: bool) {
        self.agree += f64::from(u8::from(agrees));
        self.of += 1.0;
    }

    pub(super) fn rate(self) -> Option<f64> {
        (self.of > 0.0).then(|| self.agree / self.of)
    }

    /// More often than not, as sure as Wilson's interval of 99.9% is: there are many raters.
    pub(super) fn contradicts(self) -> bool {
        self.of > 0.0 && self.interval().1 < 0.5
    }

    /// Agreed with more often than not, as surely.
    pub(super) fn vouched(self) -> bool {
        self.of > 0.0 && self.interval().0 > 0.5
    }

    fn interval(self) -> (f64, f64) {
        const Z: f64 = 3.29;
        let (n, rate) = (self.of, self.agree / self.of);
        let centre = (rate + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
        let half = Z / (1.0 + Z * Z / n) * (rate * (1.0 - rate) / n + Z * Z / (4.0 * n * n)).sqrt();
        (centre - half, centre + half)
    }
}

/// A rater's standing among the others.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Standing {
    pub shared: Tally,
    agreement: f64,
    pub weight: f64,
}

/// Of all together; a half if there are none.
pub(super) fn pooled(standings: &[&Standing]) -> f64 {
    let sum = standings.iter().fold(Tally::default(), |sum, standing| Tally {
        agree: sum.agree + standing.shared.agree,
        of: sum.of + standing.shared.of,
    });
    sum.rate().unwrap_or(0.5)
}

/// How far the rest agrees with each rater, where each has as much of a vote as `voice` gives him at most.
pub(super) fn standings(
    voices: &[Voice<'_>],
    share: f64,
    voice: &dyn Fn(&str) -> f64,
) -> HashMap<String, Standing> {
    let mut subjects: HashMap<u64, Vec<(&str, bool)>> = HashMap::new();
    let mut volumes: HashMap<&str, f64> = HashMap::new();
    for voice in voices {
        *volumes.entry(&voice.who).or_default() += 1.0;
        if let Some(verdict) = voice.verdict {
            subjects.entry(voice.subject).or_default().push((&voice.who, verdict));
        }
    }
    subjects.retain(|_, said| said.len() > 1);
    let own: HashMap<&str, f64> = volumes.keys().map(|who| (*who, voice(who))).collect();
    let mut standings: HashMap<String, Standing> = volumes
        .keys()
        .map(|who| ((*who).to_owned(), Standing { weight: 1.0, ..Standing::default() }))
        .collect();
    for _ in 0..ROUNDS {
        let weight = |who: &str| {
            standings.get(who).map_or(1.0, |standing| standing.weight) * own.get(who).copied().unwrap_or(1.0)
        };
        let most = loudest(volumes.iter().map(|(who, volume)| volume * weight(who)).collect(), share);
        let votes: HashMap<&str, f64> = volumes
            .iter()
            .map(|(who, volume)| (*who, weight(who) * (most / (volume * weight(who)).max(1e-9)).min(1.0)))
            .collect();
        for (who, shared) in agreed(&subjects, &votes) {
            if let Some(standing) = standings.get_mut(who) {
                standing.shared = shared;
            }
        }
        let mean = pooled(&standings.values().collect::<Vec<_>>());
        for standing in standings.values_mut() {
            let Tally { agree, of } = standing.shared;
            standing.agreement = (agree + PRIOR * mean) / (of + PRIOR);
        }
        let usual = median(&standings, &volumes, most);
        for standing in standings.values_mut() {
            standing.weight = if usual > 0.55 {
                ((2.0 * standing.agreement - 1.0) / (2.0 * usual - 1.0)).clamp(0.0, 1.0)
            } else {
                1.0
            };
        }
    }
    standings
}

/// How often the others' vote on what each judged is his.
fn agreed<'a>(
    subjects: &HashMap<u64, Vec<(&'a str, bool)>>,
    votes: &HashMap<&str, f64>,
) -> HashMap<&'a str, Tally> {
    let mut agreed: HashMap<&str, Tally> = HashMap::new();
    for said in subjects.values() {
        let vote = |(who, verdict): &(&str, bool)| {
            let weight = votes.get(who).copied().unwrap_or(1.0);
            if *verdict { weight } else { -weight }
        };
        let all: f64 = said.iter().map(vote).sum();
        for one in said {
            let others = all - vote(one);
            if others.abs() > 1e-9 {
                agreed.entry(one.0).or_default().count((others > 0.0) == one.1);
            }
        }
    }
    agreed
}

/// The agreement of the rater of the median judgement, of whose judgements at most so many count.
fn median(standings: &HashMap<String, Standing>, volumes: &HashMap<&str, f64>, most: f64) -> f64 {
    let shared = standings.iter().filter(|(_, standing)| standing.shared.of > 0.0);
    let mut of: Vec<(f64, f64)> = shared
        .map(|(who, own)| (own.agreement, volumes.get(&**who).copied().unwrap_or(0.0).min(most)))
        .collect();
    of.sort_by(|a, b| a.0.total_cmp(&b.0));
    let half = of.iter().map(|(_, volume)| volume).sum::<f64>() / 2.0;
    let mut below = 0.0;
    let middle = of.iter().find(|(_, volume)| {
        below += volume;
        below >= half
    });
    middle.map_or(0.5, |(agreement, _)| *agreement)
}
