//! What kind of request is it? The caller's tag, else examples from the configuration where they fit, else the trained
//! classifier, which reads runs of words, cues and the prompt's shape.

mod cues;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use crate::completion::{InteractionType, InvalidInteractionType, Risk};

use super::features::{self, Features, START, Token};
use super::text::{END, Lexicon, ends, words};
use super::{Classifier, Config, Error};

/// What a cue speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Chat,
    Question,
    Code,
    Summarisation,
    Writing,
    Translation,
    Maths,
    Advice,
    Roleplay,
    Sensitive,
}

const KINDS: usize = Kind::Sensitive as usize + 1;
/// Words that are read at most, and of the last sentence.
const WORDS: usize = 160;
const LAST: usize = 40;
/// Examples as similar as this (cosine) decide against a classifier that is in doubt, and twice as similar ones against
/// one that is sure.
const SIMILAR: f64 = 0.3;

static LEXICON: LazyLock<Lexicon<(Kind, f64)>> = LazyLock::new(|| Lexicon::new(cues::CUES));

/// Tells interaction types, and admits callers' tags up to a bound. Shared between threads.
#[derive(Debug)]
pub struct Interactions {
    classifier: Arc<Classifier>,
    /// What the classifier tells apart, in its order.
    types: Vec<InteractionType>,
    examples: Examples,
    limit: usize,
    admitted: Mutex<BTreeSet<InteractionType>>,
}

impl Interactions {
    /// The classifier's types, and those of `config.interactions` by their examples.
    ///
    /// # Errors
    /// A name cannot be an interaction type, or there are more names than `interaction_limit`.
    pub fn new(config: &Config, classifier: Arc<Classifier>) -> Result<Self, Error> {
        let mut admitted = BTreeSet::from([InteractionType::other()]);
        let known = |name: &String| {
            normalised(name).map_err(|InvalidInteractionType| Error::Interaction { name: name.clone() })
        };
        let types = classifier.types().iter().map(known).collect::<Result<Vec<_>, _>>()?;
        admitted.extend(types.iter().cloned());
        let mut configured = BTreeMap::new();
        for (name, prompts) in &config.interactions {
            let interaction = known(name)?;
            admitted.insert(interaction.clone());
            configured.insert(interaction, prompts.as_slice());
        }
        if admitted.len() > config.interaction_limit {
            return Err(Error::TooManyInteractions {
                count: admitted.len(),
                limit: config.interaction_limit,
            });
        }
        Ok(Self {
            classifier,
            types,
            examples: Examples::new(&configured),
            limit: config.interaction_limit,
            admitted: Mutex::new(admitted),
        })
    }

    /// The type of a request without a tag. Deterministic, linear in the first and last 2 kB.
    pub fn classify(&self, prompt: &str) -> InteractionType {
        let (best, probability) = self.classifier.interaction(&features(prompt));
        let nearest = self.examples.nearest(prompt);
        if let Some((interaction, _)) = nearest.filter(|(_, cosine)| *cosine > SIMILAR * (1.0 + probability))
        {
            return interaction.clone();
        }
        // What is harmful to answer is one type, whatever its form: there refusals are to be expected.
        let harmful = self.classifier.risk(prompt) == Risk::Harmful;
        let sensitive =
            harmful.then(|| self.types.iter().find(|known| known.as_str() == "sensitive")).flatten();
        let blank = !prompt.contains(char::is_alphanumeric);
        sensitive.or(self.types.get(best)).filter(|_| !blank).cloned().unwrap_or_else(InteractionType::other)
    }

    /// What tells types, refusals and risks.
    pub fn classifier(&self) -> &Arc<Classifier> {
        &self.classifier
    }

    /// The type that the caller named: lower-cased, runs of white space, `/` and `.` as one `_`. A name that was not
    /// seen before is admitted while there are fewer than `interaction_limit` types, and is `other` from then on.
    ///
    /// # Errors
    /// The name, so written, is no interaction type.
    pub fn tagged(&self, tag: &str) -> Result<InteractionType, InvalidInteractionType> {
        let interaction = normalised(tag)?;
        // The set only grows by whole entries: a panic elsewhere leaves it sound.
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        if admitted.contains(&interaction) {
            return Ok(interaction);
        }
        if admitted.len() < self.limit {
            admitted.insert(interaction.clone());
            return Ok(interaction);
        }
        Ok(InteractionType::other())
    }

    /// All types known so far, `other` among them.
    pub fn known(&self) -> Vec<InteractionType> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// The model's inputs.
pub(super) fn features(prompt: &str) -> Features {
    let folded = ends(prompt);
    let read = features::words(&folded, 2 * END);
    let (first, last) = (read.iter().take(WORDS), read.iter().map(|word| word.sentence).max().unwrap_or(0));
    let asked: Vec<Token> = [START]
        .into_iter()
        .chain(first.clone().take_while(|word| word.sentence == 0).map(|word| word.token))
        .collect();
    let all: Vec<Token> = first.map(|word| word.stem).collect();
    let at_last: Vec<Token> =
        read.iter().skip_while(|word| word.sentence < last).take(LAST).map(|word| word.token).collect();
    let mut features = Features::new();
    features.runs(21, &asked, 3);
    features.runs(22, &all, 2);
    if last > 0 {
        features.runs(23, &at_last, 3);
    }
    let mut sums = [[0.0_f64; KINDS]; 2];
    for hit in LEXICON.hits(&folded).iter().filter(|hit| !hit.quoted) {
        let (kind, weight) = hit.tag;
        sums[usize::from(hit.sentence > 0)][kind as usize] += weight;
    }
    features.cues(24, &sums[0].map(|sum| sum.min(6.0) / 3.0));
    features.cues(25, &sums[1].map(|sum| sum.min(6.0) / 6.0));
    features.cues(26, &shape(prompt, &folded));
    features
}

/// Punctuation and layout.
fn shape(prompt: &str, folded: &str) -> [f64; 9] {
    const MARKS: [&str; 13] =
        ["();", "{\n", "};", "=>", "->", "::", "==", "</", "def ", "#include", "import ", "fn ", "SELECT "];
    let text = super::text::prefix(prompt, 2 * END);
    let bit = |set: bool| f64::from(u8::from(set));
    let marks = MARKS.iter().filter(|mark| text.contains(**mark)).count();
    let few = words(folded).take(9).count();
    [
        1.0,
        bit(text.contains("```")),
        bit(marks >= 2) * (1.0 + marks as f64 / 4.0),
        bit(arithmetic(folded)),
        bit(folded.trim_end().ends_with(['?', '？', '؟'])),
        bit(folded.contains('?')),
        // A few words that ask and order nothing are small talk.
        bit(few <= 3),
        bit(few <= 8),
        ((1.0 + folded.len() as f64).ln() / 8.0).min(1.0),
    ]
}

/// "12 * (3+4)", "x^2 = 9": an operator between two operands, one of them a number.
fn arithmetic(folded: &str) -> bool {
    let compact: Vec<char> = folded.chars().filter(|c| !c.is_whitespace()).take(END).collect();
    compact.windows(3).any(|window| match window {
        [a, '+' | '=' | '^' | '×' | '÷' | '√' | '/', b] => {
            (a.is_ascii_digit() || *a == ')') && (b.is_ascii_digit() || *b == '(' || *b == 'x')
                || matches!(a, 'x' | 'y' | 'n') && b.is_ascii_digit()
        }
        _ => false,
    }) && !folded.contains("http")
}

fn normalised(tag: &str) -> Result<InteractionType, InvalidInteractionType> {
    let separator = |c: char| c.is_whitespace() || matches!(c, '/' | '.' | ':');
    // No valid name is longer; nobody makes us copy a megabyte.
    if tag.len() > 256 {
        return Err(InvalidInteractionType);
    }
    let parts: Vec<&str> = tag.split(separator).filter(|part| !part.is_empty()).collect();
    InteractionType::try_from(parts.join("_").to_lowercase())
}

/// Example prompts of the configured types, as vectors of rare words.
#[derive(Debug)]
struct Examples {
    /// Type, its words, and the vector's length.
    vectors: Vec<(InteractionType, HashSet<String>, f64)>,
    rarity: HashMap<String, f64>,
}

impl Examples {
    fn new(configured: &BTreeMap<InteractionType, &[String]>) -> Self {
        let prompts = configured
            .iter()
            .flat_map(|(interaction, prompts)| prompts.iter().map(move |prompt| (interaction, prompt)));
        let bags: Vec<(&InteractionType, HashSet<String>)> =
            prompts.map(|(interaction, prompt)| (interaction, bag(&ends(prompt)))).collect();
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for word in bags.iter().flat_map(|(_, bag)| bag) {
            *counts.entry(word).or_default() += 1;
        }
        let n = bags.len() as f64;
        let rarity: HashMap<String, f64> = counts
            .into_iter()
            .map(|(word, count)| (word.to_owned(), (1.0 + n / count as f64).ln()))
            .collect();
        let vectors = bags
            .into_iter()
            .map(|(interaction, bag)| {
                let length = length(&bag, &rarity);
                (interaction.clone(), bag, length)
            })
            .collect();
        Self { vectors, rarity }
    }

    /// The type of the most similar example and the cosine to it.
    fn nearest(&self, prompt: &str) -> Option<(&InteractionType, f64)> {
        if self.vectors.is_empty() {
            return None;
        }
        let words = bag(&ends(prompt));
        let own = length(&words, &self.rarity);
        let similarity = |bag: &HashSet<String>, length: f64| {
            let shared =
                bag.intersection(&words).filter_map(|word| self.rarity.get(word)).map(|r| r * r).sum::<f64>();
            if own * length > 0.0 { shared / (own * length) } else { 0.0 }
        };
        self.vectors
            .iter()
            .map(|(interaction, bag, length)| (interaction, similarity(bag, *length)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

fn length(bag: &HashSet<String>, rarity: &HashMap<String, f64>) -> f64 {
    // A word that no example has is as rare as can be, but must not drown the others in a long prompt.
    const UNKNOWN: f64 = 0.5;
    bag.iter().map(|word| rarity.get(word).map_or(UNKNOWN, |r| r * r)).sum::<f64>().sqrt()
}

/// Words with their stems cut crudely, without the shortest.
fn bag(folded: &str) -> HashSet<String> {
    let stem = |word: &str| {
        let word = word.trim_end_matches("'s");
        let cut =
            if word.is_ascii() && word.len() > 4 { word.trim_end_matches(['s', 'e', 'd']) } else { word };
        cut.to_owned()
    };
    words(folded).filter(|word| word.len() > 2).map(stem).collect()
}
