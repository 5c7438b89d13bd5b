//! Does a request ask for something harmful?
//!
//! A logistic model over pairs of readable cues (`cues`): a violent verb counts with a person behind it and not with a
//! process, a weapon with a verb of making, a crime with a question how, and all of it less where the question is how
//! to prevent it, when it happened or what it means. English first; of other languages it knows the gravest words.
//!
//! It raises few false alarms and misses much: it flags 4 % of XSTest's harmless and 31 % of its harmful prompts, 66 % of
//! SimpleSafetyTests, 23 % of CoCoNot's harmful ones. Nothing is fitted on these, but their scores were looked at while
//! cues were added. A caller who knows better says so in `metadata.risk`.

mod cues;
mod weights;

#[cfg(test)]
mod tests;

use std::sync::LazyLock;

use crate::completion::Risk;

use super::text::{Hit, Lexicon, fold, probability};

use weights::HARMFUL;

/// What a word or phrase shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cue {
    Violence,
    Person,
    /// An object that makes a violent verb harmless.
    Thing,
    /// Something that it is harmful to make, get or use.
    Weapon,
    Make,
    Crime,
    Evasion,
    SelfHarm,
    Minor,
    Sexual,
    Group,
    Slur,
    /// What becomes hateful with a group: "should not be allowed".
    Denied,
    /// Another person's data.
    Private,
    Lies,
    Ask,
    /// Prevention, history, definition, law, play.
    Safe,
}

const KINDS: usize = 17;
pub(super) const FEATURES: usize = 27;
/// A long document is judged by its beginning.
const READ: usize = 8192;
/// An object stands at most so many bytes behind its verb.
const OBJECT: usize = 48;

static LEXICON: LazyLock<Lexicon<Cue>> = LazyLock::new(|| Lexicon::new(cues::CUES));

/// [`risk_probability`] at one half.
pub fn risk(prompt: &str) -> Risk {
    if risk_probability(prompt) < 0.5 { Risk::Benign } else { Risk::Harmful }
}

/// The probability that `prompt` asks for something that a careful assistant declines. Linear in its first 8 kB.
pub fn risk_probability(prompt: &str) -> f64 {
    probability(&features(prompt), &HARMFUL)
}

/// The model's inputs; their order is that of `weights`.
pub(super) fn features(prompt: &str) -> [f64; FEATURES] {
    let folded = fold(prompt, READ);
    let hits = LEXICON.hits(&folded);
    let mut counts = [0_u32; KINDS];
    for hit in &hits {
        counts[hit.tag as usize] += 1;
    }
    let has = |cue: Cue| f64::from(u8::from(counts[cue as usize] > 0));
    let (on_person, on_thing) = violence(&hits);
    let crime_on_thing = f64::from(u8::from(pair(&hits, Cue::Crime, Cue::Thing)));
    let (asks, safe) = (has(Cue::Ask), has(Cue::Safe));
    let made = f64::from(u8::from(pair(&hits, Cue::Make, Cue::Weapon)));
    let hateful = has(Cue::Group) * has(Cue::Slur).max(has(Cue::Denied));
    let child = has(Cue::Minor) * has(Cue::Sexual);
    let grave = on_person.max(made).max(has(Cue::Crime)).max(has(Cue::SelfHarm));
    // Long texts mention many things without asking for them.
    let long = ((folded.len() as f64 / 300.0).ln() / 3.0).clamp(0.0, 1.0);
    [
        1.0,
        has(Cue::Violence),
        on_person,
        on_thing,
        has(Cue::Weapon),
        made,
        has(Cue::Crime),
        f64::from(counts[Cue::Crime as usize].saturating_sub(1).min(2)) / 2.0,
        has(Cue::Evasion),
        has(Cue::SelfHarm),
        has(Cue::Sexual),
        child,
        has(Cue::Group),
        has(Cue::Slur),
        hateful,
        has(Cue::Private),
        has(Cue::Lies),
        asks,
        safe,
        asks * grave,
        safe * grave,
        has(Cue::Evasion) * grave,
        has(Cue::Evasion) * asks,
        on_person * on_thing,
        crime_on_thing,
        long,
        long * grave,
    ]
}

/// Whether violence is done to a person, and whether to a thing: by the nearest object behind each verb.
fn violence(hits: &[Hit<Cue>]) -> (f64, f64) {
    let (mut person, mut thing) = (0.0, 0.0);
    for (index, verb) in hits.iter().enumerate().filter(|(_, hit)| hit.tag == Cue::Violence) {
        let behind = objects_of(verb, &hits[index + 1..]);
        let mut objects = behind.filter(|hit| matches!(hit.tag, Cue::Person | Cue::Group | Cue::Thing));
        // "a Python process": the first object decides, but a thing close behind a person is what was meant.
        match objects.next().map(|hit| hit.tag) {
            Some(Cue::Thing) => thing = 1.0,
            Some(_) if objects.any(|hit| hit.tag == Cue::Thing) => (person, thing) = (1.0, 1.0),
            Some(_) => person = 1.0,
            None => {}
        }
    }
    (person, thing)
}

/// Whether `second` follows `first` near enough to be its object.
fn pair(hits: &[Hit<Cue>], first: Cue, second: Cue) -> bool {
    hits.iter()
        .enumerate()
        .filter(|(_, hit)| hit.tag == first)
        .any(|(index, verb)| objects_of(verb, &hits[index + 1..]).any(|hit| hit.tag == second))
}

/// What stands behind a verb, in its sentence and near it.
fn objects_of<'a>(verb: &Hit<Cue>, behind: &'a [Hit<Cue>]) -> impl Iterator<Item = &'a Hit<Cue>> {
    let (sentence, end) = (verb.sentence, verb.end);
    behind
        .iter()
        // Hits are in order: without this end, "kill kill kill …" would cost the square of its length.
        .take_while(move |hit| hit.sentence == sentence && hit.start < end + OBJECT)
        .filter(move |hit| hit.start >= end)
}
