//! How much each judgement counts: repeats, haste, crowds, contradiction and loudness. Pure.
//!
//! In this order: what was said before is left out; what nobody can have read is left out; raters are weighed by how far
//! the rest agrees with them; and no rater has more than his share of what remains, where all that begin in one burst are
//! one.
//!
//! The agreement is the one-coin model of Dawid and Skene (*Maximum likelihood estimation of observer error-rates*, 1979)
//! solved by fixed-point iteration: the vote on each shared answer is that of the others, each weighed by how far *he* is
//! right, and nobody with more than his share; a rater's rate of agreement is drawn towards everybody's by [`PRIOR`]
//! judgements, so that few of them say little. He counts in full who agrees as often as the median judgement's rater, and for
//! nothing who agrees half of the time or less. Where the median itself is no better than a coin nobody is weighed: nothing
//! tells who is right.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::completion::{FeedbackId, JudgeNote, RaterNote};

use super::{Config, judges};

/// One judgement, as far as trust goes.
#[derive(Debug, Clone)]
pub struct Voice {
    pub id: FeedbackId,
    /// Milliseconds.
    pub at: u64,
    /// Who judges; what nobody signed is everybody's own.
    pub who: String,
    /// Whether `who` is a rater by name.
    pub named: bool,
    /// Whether `who` is a judge model, which [`judges`] weighs.
    pub ai: bool,
    /// What is judged: an answer, or two.
    pub subject: u64,
    /// The subject is good, or its first answer better than its second; `None` says neither.
    pub verdict: Option<bool>,
    /// All that is said, to tell a repeat.
    pub words: String,
}

/// What each judgement counts, and why.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trust {
    /// In `[0, 1]`.
    pub weights: HashMap<FeedbackId, f64>,
    /// Judgements that do not count, by the reason.
    pub left_out: BTreeMap<String, usize>,
    /// People whose judgements count.
    pub raters: usize,
    pub weighed_down: Vec<RaterNote>,
    /// Judge models, and how far people agree with them.
    pub judges: Vec<JudgeNote>,
    pub warnings: Vec<String>,
}

/// Judgements' worth of everybody's agreement that a rater begins with.
const PRIOR: f64 = 4.0;
const ROUNDS: usize = 6;
/// Raters that are listed at most.
const LISTED: usize = 20;

/// A rater's standing among the others.
#[derive(Debug, Clone, Copy, Default)]
struct Standing {
    agree: f64,
    shared: f64,
    agreement: f64,
    weight: f64,
}

/// Weighs judgements, which may come in any order.
pub fn weigh(mut voices: Vec<Voice>, config: &Config) -> Trust {
    voices.sort_by_key(|voice| (voice.at, voice.id));
    let mut trust = Trust::default();
    let voices = without_repeats(voices, &mut trust);
    let (judged, voices): (Vec<Voice>, Vec<Voice>) = voices.into_iter().partition(|voice| voice.ai);
    let voices = without_haste(voices, config, &mut trust);
    let standings = standings(&voices, config.rater_share);
    trust.warn_of_discord(&standings);
    let crowd = crowd(&voices);
    if !crowd.is_empty() {
        trust
            .warnings
            .push(format!("{} new raters began in one burst; together they count as one", crowd.len()));
    }
    let group = |voice: &Voice| if crowd.contains(&voice.who) { String::new() } else { voice.who.clone() };
    let believed = |who: &str| standings.get(who).map_or(1.0, |standing| standing.weight);
    let mut sums: HashMap<String, f64> = HashMap::new();
    for voice in &voices {
        *sums.entry(group(voice)).or_default() += believed(&voice.who);
    }
    let most = loudest(sums.values().copied().collect(), config.rater_share);
    let mut people: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for voice in &voices {
        let sum = sums.get(&group(voice)).copied().unwrap_or(1.0);
        let weight = believed(&voice.who) * (most / sum.max(1e-9)).min(1.0);
        trust.weights.insert(voice.id, weight);
        let person = people.entry(&voice.who).or_insert((0, weight));
        person.0 += 1;
    }
    trust.raters = people.values().filter(|(_, weight)| *weight > 0.0).count();
    trust.note(&people, &standings);
    trust.warn_of_camps(&people, &standings);
    trust.hear(&judged, voices, most, config);
    trust
}

impl Trust {
    /// Judge models, beside people who have their weights.
    fn hear(&mut self, judged: &[Voice], people: Vec<Voice>, most: f64, config: &Config) {
        let weighed = |voice: Voice| {
            let weight = self.weights.get(&voice.id).copied().unwrap_or(0.0);
            (voice, weight)
        };
        let people: Vec<(Voice, f64)> = people.into_iter().map(weighed).collect();
        let notes = judges::weigh(judged, &people, most, config);
        for voice in judged {
            self.weights.insert(voice.id, notes.get(&voice.who).map_or(0.0, |note| note.weight));
        }
        self.judges = notes.into_values().collect();
        self.judges.sort_by_key(|note| std::cmp::Reverse(note.judgements));
        self.judges.truncate(LISTED);
    }

    fn leave_out(&mut self, why: &str, voice: &Voice) {
        *self.left_out.entry(why.to_owned()).or_default() += 1;
        self.weights.insert(voice.id, 0.0);
    }

    fn note(&mut self, people: &BTreeMap<&str, (usize, f64)>, standings: &HashMap<String, Standing>) {
        let mut notes: Vec<RaterNote> = people
            .iter()
            .filter(|(_, (_, weight))| *weight < 0.9)
            .map(|(who, (judgements, weight))| RaterNote {
                rater: (*who).to_owned(),
                judgements: *judgements,
                agreement: standings.get(*who).filter(|s| s.shared > 0.0).map(|s| s.agree / s.shared),
                weight: *weight,
            })
            .collect();
        notes.sort_by_key(|note| std::cmp::Reverse(note.judgements));
        let contradict = standings.values().filter(|standing| standing.contradicts()).count();
        if contradict > 0 {
            self.warnings
                .push(format!("{contradict} raters contradict the rest on the answers that they share"));
        }
        notes.truncate(LISTED);
        self.weighed_down = notes;
    }

    fn warn_of_discord(&mut self, standings: &HashMap<String, Standing>) {
        const MANY: f64 = 50.0;
        let all: Vec<&Standing> = standings.values().collect();
        let shared: f64 = all.iter().map(|standing| standing.shared).sum();
        if shared >= MANY && pooled(&all) < 0.5 {
            self.warnings.push(format!(
                "people contradict each other more often than not on the answers that they share (agreement {:.2})",
                pooled(&all)
            ));
        }
    }

    /// Raters who agree with each other and not with the rest differ more than chance lets them: the sum of squared
    /// deviations of their agreement over what is expected of raters who are all alike.
    fn warn_of_camps(
        &mut self,
        people: &BTreeMap<&str, (usize, f64)>,
        standings: &HashMap<String, Standing>,
    ) {
        const SURE: f64 = 6.0;
        let shared: Vec<&Standing> = standings.values().filter(|s| s.shared >= 2.0).collect();
        let mean = pooled(&shared);
        let spread = mean * (1.0 - mean);
        if shared.len() < 10 || spread < 1e-6 {
            return;
        }
        let excess: f64 =
            shared.iter().map(|s| (s.agree - s.shared * mean).powi(2) / (s.shared * spread) - 1.0).sum();
        // The variance of each term is 2 and what the fourth moment of few judgements adds.
        let variance: f64 = shared.iter().map(|s| 2.0 + (1.0 / spread - 6.0).max(0.0) / s.shared).sum();
        if excess / variance.sqrt() < SURE {
            return;
        }
        let against =
            |who: &str| standings.get(who).is_some_and(|s| s.shared > 0.0 && s.agree < 0.5 * s.shared);
        let (mut count, mut volume, mut all) = (0, 0, 0);
        for (who, (judgements, _)) in people {
            all += judgements;
            if against(who) {
                (count, volume) = (count + 1, volume + judgements);
            }
        }
        self.warnings.push(format!(
            "raters fall into camps: {count} of {} with {:.0}% of the judgements mostly contradict the rest",
            people.len(),
            100.0 * volume as f64 / all.max(1) as f64
        ));
    }
}

impl Standing {
    /// The upper end of Wilson's interval of the agreement is below a half; of 99.9%, as there are many raters.
    fn contradicts(&self) -> bool {
        const Z: f64 = 3.29;
        let (n, rate) = (self.shared, self.agree / self.shared.max(1.0));
        let centre = (rate + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
        let half = Z / (1.0 + Z * Z / n) * (rate * (1.0 - rate) / n + Z * Z / (4.0 * n * n)).sqrt();
        n >= 1.0 && centre + half < 0.5
    }
}

/// Each word once; of several words of one person on one subject, the last of each kind.
fn without_repeats(voices: Vec<Voice>, trust: &mut Trust) -> Vec<Voice> {
    let mut seen = HashSet::new();
    let (first, repeats): (Vec<Voice>, Vec<Voice>) = voices
        .into_iter()
        .partition(|voice| seen.insert((voice.who.clone(), voice.subject, voice.words.clone())));
    for voice in &repeats {
        trust.leave_out("repeats", voice);
    }
    let mut last = HashSet::new();
    let mut kept = Vec::with_capacity(first.len());
    for voice in first.into_iter().rev() {
        let verdict = voice.verdict.is_some();
        if !verdict || last.insert((voice.who.clone(), voice.subject)) {
            kept.push(voice);
        } else {
            trust.leave_out("taken back", &voice);
        }
    }
    kept.reverse();
    kept
}

/// Nobody reads more than so many answers in so many seconds.
fn without_haste(voices: Vec<Voice>, config: &Config, trust: &mut Trust) -> Vec<Voice> {
    let window = (config.burst_seconds * 1000.0) as u64;
    if config.burst == 0 || window == 0 {
        return voices;
    }
    let mut recent: HashMap<String, Vec<u64>> = HashMap::new();
    let mut hasty = HashSet::new();
    let (kept, left): (Vec<Voice>, Vec<Voice>) = voices.into_iter().partition(|voice| {
        if !voice.named {
            return true;
        }
        let times = recent.entry(voice.who.clone()).or_default();
        times.retain(|at| at + window > voice.at);
        let reads = times.len() < config.burst;
        if reads {
            times.push(voice.at);
        } else {
            hasty.insert(voice.who.clone());
        }
        reads
    });
    for voice in &left {
        trust.leave_out("too fast to be read", voice);
    }
    if !hasty.is_empty() {
        trust.warnings.push(format!("{} raters judge faster than anybody reads", hasty.len()));
    }
    kept
}

fn pooled(standings: &[&Standing]) -> f64 {
    let (agree, shared) = standings.iter().fold((0.0, 0.0), |sum, s| (sum.0 + s.agree, sum.1 + s.shared));
    if shared > 0.0 { agree / shared } else { 0.5 }
}

/// How far the rest agrees with each rater.
fn standings(voices: &[Voice], share: f64) -> HashMap<String, Standing> {
    let mut subjects: HashMap<u64, Vec<(&str, bool)>> = HashMap::new();
    for voice in voices {
        if let Some(verdict) = voice.verdict {
            subjects.entry(voice.subject).or_default().push((&voice.who, verdict));
        }
    }
    let mut standings: HashMap<String, Standing> = voices
        .iter()
        .map(|voice| (voice.who.clone(), Standing { weight: 1.0, ..Standing::default() }))
        .collect();
    subjects.retain(|_, said| said.len() > 1);
    let mut volumes: HashMap<&str, f64> = HashMap::new();
    for voice in voices {
        *volumes.entry(&voice.who).or_default() += 1.0;
    }
    for _ in 0..ROUNDS {
        let sum = |(who, volume): (&&str, &f64)| volume * standings.get(*who).map_or(1.0, |own| own.weight);
        let most = loudest(volumes.iter().map(sum).collect(), share);
        let votes: HashMap<&str, f64> = volumes
            .iter()
            .map(|(who, volume)| {
                let weight = standings.get(*who).map_or(1.0, |own| own.weight);
                (*who, weight * (most / (volume * weight).max(1e-9)).min(1.0))
            })
            .collect();
        let mut agreed: HashMap<&str, (f64, f64)> = HashMap::new();
        for said in subjects.values() {
            let vote = |(who, verdict): &(&str, bool)| {
                let weight = votes.get(who).copied().unwrap_or(1.0);
                if *verdict { weight } else { -weight }
            };
            let all: f64 = said.iter().map(vote).sum();
            for one in said {
                let others = all - vote(one);
                if others.abs() > 1e-9 {
                    let (agree, shared) = agreed.entry(one.0).or_default();
                    *agree += f64::from(u8::from((others > 0.0) == one.1));
                    *shared += 1.0;
                }
            }
        }
        for (who, (agree, shared)) in agreed {
            if let Some(standing) = standings.get_mut(who) {
                (standing.agree, standing.shared) = (agree, shared);
            }
        }
        let mean = pooled(&standings.values().collect::<Vec<_>>());
        for standing in standings.values_mut() {
            standing.agreement = (standing.agree + PRIOR * mean) / (standing.shared + PRIOR);
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

/// The agreement of the rater of the median judgement, of whose judgements at most so many count.
fn median(standings: &HashMap<String, Standing>, volumes: &HashMap<&str, f64>, most: f64) -> f64 {
    let shared = standings.iter().filter(|(_, standing)| standing.shared > 0.0);
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

/// Raters who all began within a minute, ten, or an hour in which five times as much was said as usual, four fifths of it
/// by newcomers.
fn crowd(voices: &[Voice]) -> HashSet<String> {
    const SPANS: [u64; 3] = [60_000, 600_000, 3_600_000];
    const LEAST: usize = 20;
    let mut first: HashMap<&str, u64> = HashMap::new();
    for voice in voices {
        first.entry(&voice.who).or_insert(voice.at);
    }
    let mut crowd = HashSet::new();
    for span in SPANS {
        let mut windows: BTreeMap<u64, Vec<&Voice>> = BTreeMap::new();
        for voice in voices {
            windows.entry(voice.at / span).or_default().push(voice);
        }
        let mut sizes: Vec<usize> = windows.values().map(Vec::len).collect();
        sizes.sort_unstable();
        let usual = sizes.get(sizes.len() / 2).copied().unwrap_or(0);
        if sizes.len() < 5 {
            continue;
        }
        for (at, said) in windows {
            let newcomers: HashSet<&str> = said
                .iter()
                .filter(|voice| voice.named && first.get(&*voice.who).is_some_and(|first| first / span == at))
                .map(|voice| &*voice.who)
                .collect();
            let theirs = said.iter().filter(|voice| newcomers.contains(&*voice.who)).count();
            if newcomers.len() >= LEAST && said.len() >= 5 * usual && theirs * 5 >= said.len() * 4 {
                crowd.extend(newcomers.into_iter().map(str::to_owned));
            }
        }
    }
    crowd
}

/// What one group may count at most, so that none has more than `share` of the whole when it is kept to it. Of a few
/// raters each may have twice an equal share: somebody has to be the loudest.
fn loudest(mut sums: Vec<f64>, share: f64) -> f64 {
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

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    fn voice(who: &str, subject: u64, up: bool, at: u64) -> Voice {
        let words = if up { "up" } else { "down" }.to_owned();
        Voice {
            id: FeedbackId::new(),
            at,
            who: who.to_owned(),
            named: true,
            ai: false,
            subject,
            verdict: Some(up),
            words,
        }
    }

    /// Honest raters are right nine times in ten; the others say the opposite of what they would have said.
    fn world(honest: usize, flipping: usize, each: usize, seed: u64) -> Vec<Voice> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut voices = Vec::new();
        for rater in 0..honest + flipping {
            for nth in 0..each {
                let subject = random.random_range(0..200u64);
                let right = random.random_bool(0.9) == (rater < honest);
                voices.push(voice(
                    &format!("r{rater}"),
                    subject,
                    (subject % 2 == 0) == right,
                    (nth * 1_000_000) as u64,
                ));
            }
        }
        voices
    }

    /// Their share of the weight, and what is said of it.
    fn flipped(voices: &[Voice], honest: usize) -> (f64, Trust) {
        let trust = weigh(voices.to_vec(), &Config::default());
        let of = |flips: bool| -> f64 {
            let theirs = voices.iter().filter(|v| (v.who[1..].parse::<usize>().unwrap() >= honest) == flips);
            theirs.map(|voice| trust.weights[&voice.id]).sum()
        };
        (of(true) / (of(true) + of(false)), trust)
    }

    #[test]
    fn those_who_contradict_the_rest_count_for_nothing() {
        let mut voices = world(100, 0, 14, 1);
        // Three raters with 30% of the volume.
        let loud = world(0, 3, 200, 2);
        voices.extend(
            loud.into_iter()
                .map(|v| Voice { who: format!("r{}", 100 + v.who[1..].parse::<usize>().unwrap()), ..v }),
        );
        let (share, trust) = flipped(&voices, 100);
        assert!(share < 0.01, "{share}");
        assert!(
            trust.warnings.iter().any(|warning| warning.starts_with("3 raters contradict")),
            "{:?}",
            trust.warnings
        );
        assert!(trust.weighed_down[0].agreement.unwrap() < 0.2, "{:?}", trust.weighed_down);
    }

    #[test]
    fn a_camp_of_many_small_raters_is_noticed() {
        let (share, trust) = flipped(&world(700, 300, 4, 3), 700);
        assert!(share < 0.1, "{share}");
        assert!(
            trust.warnings.iter().any(|warning| warning.contains("fall into camps")),
            "{:?}",
            trust.warnings
        );
        for seed in 0..20 {
            let (_, trust) = flipped(&world(300, 0, 4, seed), 300);
            assert!(trust.warnings.is_empty(), "{:?}", trust.warnings);
        }
    }

    /// Three loud raters who judge the same answers outvote the honest ones there, were it not for their share.
    #[test]
    fn a_loud_clique_does_not_outvote_the_rest() {
        let mut voices: Vec<Voice> =
            (0..600).map(|n| voice(&format!("r{}", n * 7 % 100), n / 3, true, n * 1000)).collect();
        voices.extend((0..258).map(|n| voice(&format!("r{}", 100 + n % 3), n / 3, false, n * 5000)));
        let (share, trust) = flipped(&voices, 100);
        assert!(share < 0.01, "{share} {:?}", trust.warnings);
    }

    #[test]
    fn where_everybody_contradicts_everybody_nobody_is_right() {
        let voices: Vec<Voice> =
            (0..200).map(|n| voice(&format!("r{}", n % 40), n / 2, n % 2 == 0, n * 9000)).collect();
        let trust = weigh(voices, &Config::default());
        assert!(trust.weights.values().all(|weight| *weight == 1.0));
        assert!(
            trust.warnings.iter().any(|warning| warning.starts_with("people contradict")),
            "{:?}",
            trust.warnings
        );
    }

    #[test]
    fn without_shared_answers_the_share_alone_bounds_a_rater() {
        let mut voices: Vec<Voice> =
            (0..700).map(|n| voice(&format!("r{}", n % 100), n, true, n * 100_000)).collect();
        voices.extend((0..300).map(|n| voice(&format!("r{}", 100 + n % 3), 1000 + n, false, n * 200_000)));
        let (share, _) = flipped(&voices, 100);
        assert!((share - 0.15).abs() < 1e-9, "{share}");
    }

    #[test]
    fn repeats_and_second_thoughts_count_once() {
        let said = vec![
            voice("a", 1, true, 1),
            voice("a", 1, true, 2),
            voice("a", 1, false, 3),
            voice("b", 1, true, 3),
        ];
        let trust = weigh(said.clone(), &Config::default());
        assert_eq!(trust.left_out, BTreeMap::from([("repeats".to_owned(), 1), ("taken back".to_owned(), 1)]));
        assert_eq!((trust.weights[&said[0].id], trust.weights[&said[2].id]), (0.0, 1.0));
        assert_eq!(trust.raters, 2);
    }

    #[test]
    fn nobody_reads_fifty_answers_in_a_second() {
        let mut said: Vec<Voice> = (0..50).map(|n| voice("fast", n, true, 1000 + n)).collect();
        said.extend((0..50).map(|n| voice("slow", 100 + n, true, n * 5000)));
        let trust = weigh(said, &Config::default());
        assert_eq!(trust.left_out["too fast to be read"], 40);
        assert!(trust.warnings[0].contains("faster than anybody reads"));
    }

    #[test]
    fn a_crowd_of_newcomers_counts_as_one() {
        let mut said: Vec<Voice> =
            (0..600).map(|n| voice(&format!("r{}", n % 60), n, true, n * 30_000)).collect();
        assert!(weigh(said.clone(), &Config::default()).warnings.is_empty());
        said.extend((0..300).map(|n| voice(&format!("s{n}"), 1000 + n, false, 9_000_000 + n * 150)));
        let trust = weigh(said.clone(), &Config::default());
        assert!(trust.warnings[0].starts_with("300 new raters"), "{:?}", trust.warnings);
        let theirs: f64 = said.iter().filter(|v| v.who.starts_with('s')).map(|v| trust.weights[&v.id]).sum();
        assert!(theirs < 40.0, "{theirs}");
    }

    #[test]
    fn the_loudest_has_his_share_of_what_remains() {
        assert_eq!(loudest(vec![1.0; 40], 0.05), 2.0);
        let most = loudest([vec![100.0], vec![1.0; 99]].concat(), 0.05);
        assert!((most / (most + 99.0) - 0.05).abs() < 1e-9, "{most}");
        assert!(loudest(vec![7.0], 0.05) >= 7.0 && loudest(vec![], 0.05) > 0.0);
    }
}
