//! Does a request ask for something harmful?
//!
//! Beside its words the model reads what kinds of things stand near one another (`cues`): a violent verb with a person
//! behind it and with a process, a weapon with a verb of making and with the question what it is. English first; of other
//! languages it knows the gravest words.

mod cues;

#[cfg(test)]
mod tests;

use std::sync::LazyLock;

use super::features::{Features, START, Token, Word, words};
use super::text::{Hit, Lexicon, ends};

/// What kind of thing a word or phrase names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cue {
    Violence,
    Person,
    /// Creatures that people may kill.
    Pest,
    /// An object that makes a violent verb harmless.
    Thing,
    Game,
    Weapon,
    Drug,
    Malware,
    Make,
    Crime,
    Evasion,
    SelfHarm,
    Minor,
    Sexual,
    /// People by what they are: origin, faith, sex, disability.
    Group,
    /// People by what they do or like.
    Trade,
    Slur,
    /// What becomes hateful with a group: "should not be allowed".
    Denied,
    /// Another person's data.
    Private,
    /// A maker of the news, a firm, an office.
    Public,
    Lies,
    /// Belief against what is known: vaccines, elections, history.
    Disputed,
    Copyright,
    Ask,
    Define,
    Prevent,
    Past,
    Persuade,
    /// A rule to forget the rules.
    Jailbreak,
}

const KINDS: usize = Cue::Jailbreak as usize + 1;
/// Words that are read at each end of a prompt.
const WORDS: usize = 160;

static LEXICON: LazyLock<Lexicon<Cue>> = LazyLock::new(|| Lexicon::new(cues::CUES));

/// The model's inputs.
pub(super) fn features(prompt: &str) -> Features {
    let folded = ends(prompt);
    let words = words(&folded, 2 * WORDS);
    let hits = LEXICON.hits(&folded);
    let kinds = kinds(&words, &hits);
    let whole: Vec<Token> = [START].into_iter().chain(words.iter().map(|word| word.token)).collect();
    let stems: Vec<Token> = words.iter().map(|word| word.stem).collect();
    let only: Vec<Token> = kinds.iter().copied().filter(|token| *token < KIND_LAST).collect();
    let mut features = Features::new();
    features.runs(11, &whole, 3);
    features.runs(12, &stems, 2);
    features.runs(13, &kinds, 3);
    features.pairs(14, &kinds, 5);
    features.pairs(15, &only, 4);
    features.cues(16, &present(&hits));
    // Long texts mention many things without asking for them.
    let long = ((folded.len() as f64 / 300.0).ln() / 3.0).clamp(0.0, 1.0);
    let asked = f64::from(u8::from(folded.trim_end().ends_with('?')));
    features.cues(17, &[1.0, long, asked]);
    features
}

/// Kinds as tokens stand below this, and no hash of a word does.
const KIND_LAST: Token = 1000;

/// The words, each that begins a cue replaced by the cue's kind and the rest of the cue left out.
fn kinds(words: &[Word], hits: &[Hit<Cue>]) -> Vec<Token> {
    let mut tokens = vec![START];
    let (mut next, mut covered) = (0, 0);
    for word in words {
        while next < hits.len() && hits[next].start < word.start {
            next += 1;
        }
        let mut longest = None;
        while let Some(hit) = hits.get(next).filter(|hit| hit.start == word.start) {
            tokens.push(100 + hit.tag as Token);
            longest = longest.max(Some(hit.end));
            next += 1;
        }
        match longest {
            Some(end) => covered = covered.max(end),
            None if word.start < covered => {}
            None => tokens.push(word.stem),
        }
    }
    tokens
}

/// Which kinds there are, and which two of them together.
fn present(hits: &[Hit<Cue>]) -> Vec<f64> {
    let mut seen = [false; KINDS];
    for hit in hits {
        seen[hit.tag as usize] = true;
    }
    let mut values = Vec::with_capacity(KINDS * (KINDS + 1));
    for first in 0..KINDS {
        for second in 0..=first {
            values.push(if seen[first] && seen[second] { 0.3 } else { 0.0 });
        }
    }
    values
}
