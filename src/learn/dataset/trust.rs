//! How much each judgement counts: repeats, haste, crowds, contradiction and loudness. Pure.
//!
//! In this order: what was said before is left out; what nobody can have read is left out; raters are weighed by how far
//! the rest agrees with them; and no rater has more than his share of what remains, where all that begin in one burst are
//! one.
//!
//! How far the rest agrees is counted on what several people judged ([`super::agreement`]), which is the stronger evidence,
//! and by a model that learned from the others what words they like ([`super::opinion`]). Of whom the model finds against it, the
//! vote is taken before agreement is counted; who is vouched for by the votes that remain is not asked for the model's.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::completion::{FeedbackId, JudgeNote, RaterNote};

use super::agreement::{Standing, Tally, pooled, standings};
use super::opinion::Opinion;
use super::voice::{Voice, loudest};
use super::{Config, judges};

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

/// Raters that are listed at most.
const LISTED: usize = 20;

/// What is known of the raters.
struct Known {
    standings: HashMap<String, Standing>,
    opinion: Option<Opinion>,
}

impl Known {
    fn weight(&self, who: &str) -> f64 {
        let (standing, opinion) = (self.standings.get(who), self.opinion.as_ref());
        let vouched = standing.is_some_and(|standing| standing.shared.vouched());
        let opinion = opinion.filter(|_| !vouched).map_or(1.0, |opinion| opinion.weight(who));
        standing.map_or(1.0, |standing| standing.weight) * opinion
    }
}

/// Weighs judgements, which may come in any order.
pub fn weigh(mut voices: Vec<Voice<'_>>, config: &Config) -> Trust {
    voices.sort_by_key(|voice| (voice.at, voice.id));
    let mut trust = Trust::default();
    let voices = without_repeats(voices, &mut trust);
    let (judged, voices): (Vec<Voice<'_>>, Vec<Voice<'_>>) = voices.into_iter().partition(|voice| voice.ai);
    let voices = without_haste(voices, config, &mut trust);
    let first = standings(&voices, config.rater_share, &|_| 1.0);
    trust.warn_of_discord(&first);
    let before = |who: &str| first.get(who).map_or(1.0, |standing| standing.weight);
    let opinion = if config.opinion { Opinion::form(&voices, config.rater_share, &before) } else { None };
    let standings = match &opinion {
        Some(opinion) => standings(&voices, config.rater_share, &|who| opinion.weight(who)),
        None => first.clone(),
    };
    let known = Known { standings, opinion };
    let crowd = crowd(&voices);
    if !crowd.is_empty() {
        trust
            .warnings
            .push(format!("{} new raters began in one burst; together they count as one", crowd.len()));
    }
    let group =
        |voice: &Voice<'_>| if crowd.contains(&voice.who) { String::new() } else { voice.who.clone() };
    let believed = |who: &str| known.weight(who);
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
    trust.note(&people, &known);
    trust.warn_of_camps(&people, &first);
    trust.hear(&judged, voices, most, config);
    trust
}

impl Trust {
    /// Judge models, beside people who have their weights.
    fn hear(&mut self, judged: &[Voice<'_>], people: Vec<Voice<'_>>, most: f64, config: &Config) {
        let weight = |voice: &Voice<'_>| self.weights.get(&voice.id).copied().unwrap_or(0.0);
        let people: Vec<(Voice<'_>, f64)> = people
            .into_iter()
            .map(|voice| {
                let weight = weight(&voice);
                (voice, weight)
            })
            .collect();
        let notes = judges::weigh(judged, &people, most, config);
        for voice in judged {
            self.weights.insert(voice.id, notes.get(&voice.who).map_or(0.0, |note| note.weight));
        }
        self.judges = notes.into_values().collect();
        self.judges.sort_by_key(|note| std::cmp::Reverse(note.judgements));
        self.judges.truncate(LISTED);
    }

    fn leave_out(&mut self, why: &str, voice: &Voice<'_>) {
        *self.left_out.entry(why.to_owned()).or_default() += 1;
        self.weights.insert(voice.id, 0.0);
    }

    fn note(&mut self, people: &BTreeMap<&str, (usize, f64)>, known: &Known) {
        let view = |who: &str| known.opinion.as_ref().and_then(|opinion| opinion.of(who));
        let mut notes: Vec<RaterNote> = people
            .iter()
            .filter(|(_, (_, weight))| *weight < 0.9)
            .map(|(who, (judgements, weight))| RaterNote {
                rater: (*who).to_owned(),
                judgements: *judgements,
                agreement: known.standings.get(*who).and_then(|standing| standing.shared.rate()),
                opinion: view(who).and_then(|view| view.judged.rate()),
                weight: *weight,
            })
            .collect();
        notes.sort_by_key(|note| std::cmp::Reverse(note.judgements));
        notes.truncate(LISTED);
        self.weighed_down = notes;
        let contradicts = |who: &str| known.standings.get(who).is_some_and(|own| own.shared.contradicts());
        let count = people.keys().filter(|who| contradicts(who)).count();
        if count > 0 {
            self.warnings.push(format!("{count} raters contradict the rest on the answers that they share"));
        }
        let unheard = |who: &str| !contradicts(who) && known.weight(who) == 0.0;
        let count = people
            .keys()
            .filter(|who| unheard(who) && view(who).is_some_and(|view| view.judged.contradicts()))
            .count();
        if count > 0 {
            self.warnings.push(format!("{count} raters contradict what the others' judgements teach"));
        }
        if let Some((raters, judgements)) = known.opinion.as_ref().and_then(|opinion| opinion.camp) {
            let all: usize = people.values().map(|(judgements, _)| judgements).sum();
            self.warnings.push(format!(
                "raters fall into camps by what they like: about {raters:.0} of {} with {:.0}% of the judgements say the \
                 opposite of what the others' judgements teach",
                people.len(),
                100.0 * judgements / all.max(1) as f64
            ));
        }
    }

    fn warn_of_discord(&mut self, standings: &HashMap<String, Standing>) {
        const MANY: f64 = 50.0;
        let all: Vec<&Standing> = standings.values().collect();
        let shared: f64 = all.iter().map(|standing| standing.shared.of).sum();
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
        let several: Vec<&Standing> = standings.values().filter(|own| own.shared.of >= 2.0).collect();
        let mean = pooled(&several);
        let shared: Vec<Tally> = several.into_iter().map(|own| own.shared).collect();
        let spread = mean * (1.0 - mean);
        if shared.len() < 10 || spread < 1e-6 {
            return;
        }
        let excess: f64 =
            shared.iter().map(|s| (s.agree - s.of * mean).powi(2) / (s.of * spread) - 1.0).sum();
        // The variance of each term is 2 and what the fourth moment of few judgements adds.
        let variance: f64 = shared.iter().map(|s| 2.0 + (1.0 / spread - 6.0).max(0.0) / s.of).sum();
        if excess / variance.sqrt() < SURE {
            return;
        }
        let against =
            |who: &str| standings.get(who).is_some_and(|s| s.shared.rate().is_some_and(|rate| rate < 0.5));
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

/// Each word once; of several words of one person on one subject, the last of each kind.
fn without_repeats<'a>(voices: Vec<Voice<'a>>, trust: &mut Trust) -> Vec<Voice<'a>> {
    let mut seen = HashSet::new();
    let (first, repeats): (Vec<Voice<'a>>, Vec<Voice<'a>>) = voices
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
fn without_haste<'a>(voices: Vec<Voice<'a>>, config: &Config, trust: &mut Trust) -> Vec<Voice<'a>> {
    let window = (config.burst_seconds * 1000.0) as u64;
    if config.burst == 0 || window == 0 {
        return voices;
    }
    let mut recent: HashMap<String, Vec<u64>> = HashMap::new();
    let mut hasty = HashSet::new();
    let (kept, left): (Vec<Voice<'a>>, Vec<Voice<'a>>) = voices.into_iter().partition(|voice| {
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

/// Raters who all began within a minute, ten, or an hour in which five times as much was said as usual, four fifths of it
/// by newcomers.
fn crowd(voices: &[Voice<'_>]) -> HashSet<String> {
    const SPANS: [u64; 3] = [60_000, 600_000, 3_600_000];
    const LEAST: usize = 20;
    let mut first: HashMap<&str, u64> = HashMap::new();
    for voice in voices {
        first.entry(&voice.who).or_insert(voice.at);
    }
    let mut crowd = HashSet::new();
    for span in SPANS {
        let mut windows: BTreeMap<u64, Vec<&Voice<'_>>> = BTreeMap::new();
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

#[cfg(test)]
mod tests;
