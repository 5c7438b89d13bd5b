//! What kind of request is it? The caller's tag, else cues and shape, else examples from the configuration.

mod cues;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use crate::completion::{InteractionType, InvalidInteractionType, Risk};

use super::text::{Lexicon, fold, words};
use super::{Config, Error, risk};

/// The built-in types; the order is that of [`Kind`].
const BUILT_IN: [&str; 10] = [
    "chat",
    "question",
    "code",
    "summarisation",
    "writing",
    "translation",
    "maths",
    "advice",
    "roleplay",
    "sensitive",
];

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

/// What is asked stands at the beginning or, behind a long text, at the end.
const READ: usize = 2048;
/// A cue in the first sentence says what is asked, one further on what it is about.
const EARLY: f64 = 1.5;
/// Evidence below this is none.
const ENOUGH: f64 = 1.0;
/// Examples as similar as this (cosine) decide against cues of strength one.
const SIMILAR: f64 = 0.3;
/// Every other type can be asked for as a question: its words do not add up to more than one good cue elsewhere.
const QUESTION: f64 = 1.4;

/// Tells interaction types, and admits callers' tags up to a bound. Shared between threads.
#[derive(Debug)]
pub struct Interactions {
    lexicon: Lexicon<(Kind, f64)>,
    examples: Examples,
    built_in: [InteractionType; BUILT_IN.len()],
    limit: usize,
    admitted: Mutex<BTreeSet<InteractionType>>,
}

impl Interactions {
    /// The classifier as configured: the built-in types, and those of `config.interactions` by their examples.
    ///
    /// # Errors
    /// A configured name cannot be an interaction type, or there are more names than `interaction_limit`.
    pub fn new(config: &Config) -> Result<Self, Error> {
        let mut admitted = BTreeSet::from([InteractionType::other()]);
        let built_in = BUILT_IN.map(|name| InteractionType::try_from(name.to_owned()));
        let mut types = Vec::new();
        for interaction in built_in {
            types.push(interaction.map_err(|_| Error::Interaction { name: "built-in".to_owned() })?);
        }
        admitted.extend(types.iter().cloned());
        let built_in = types.try_into().map_err(|_| Error::Interaction { name: "built-in".to_owned() })?;
        let mut configured = BTreeMap::new();
        for (name, prompts) in &config.interactions {
            let interaction = normalised(name)
                .map_err(|InvalidInteractionType| Error::Interaction { name: name.clone() })?;
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
            lexicon: Lexicon::new(cues::CUES),
            examples: Examples::new(&configured),
            built_in,
            limit: config.interaction_limit,
            admitted: Mutex::new(admitted),
        })
    }

    /// The type of a request without a tag. Deterministic, linear in the first and last 2 kB.
    pub fn classify(&self, prompt: &str) -> InteractionType {
        let folded = ends(prompt);
        let (kind, strength) = self.by_cues(prompt, &folded);
        if let Some((interaction, similarity)) = self.examples.nearest(&folded)
            && similarity > SIMILAR * strength.clamp(1.0, 2.0)
        {
            return interaction.clone();
        }
        // What is harmful to answer is one type, whatever its form: there refusals are to be expected.
        let kind = if risk(prompt) == Risk::Harmful { Some(Kind::Sensitive) } else { kind };
        kind.map_or_else(InteractionType::other, |kind| self.built_in[kind as usize].clone())
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

    /// The best built-in type and the strength of its evidence.
    fn by_cues(&self, prompt: &str, folded: &str) -> (Option<Kind>, f64) {
        let mut scores = [0.0_f64; BUILT_IN.len()];
        for hit in self.lexicon.hits(folded).iter().filter(|hit| !hit.quoted) {
            let (kind, weight) = hit.tag;
            scores[kind as usize] += if hit.sentence == 0 { EARLY * weight } else { weight };
        }
        for (kind, weight) in shape(prompt, folded) {
            scores[kind as usize] += weight;
        }
        let question = &mut scores[Kind::Question as usize];
        *question = question.min(QUESTION);
        let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a)));
        let Some((best, strength)) = best.map(|best| (best, scores[best])) else { return (None, 0.0) };
        if strength < ENOUGH {
            return (None, 0.0);
        }
        (KINDS.get(best).copied(), strength)
    }
}

const KINDS: [Kind; BUILT_IN.len()] = [
    Kind::Chat,
    Kind::Question,
    Kind::Code,
    Kind::Summarisation,
    Kind::Writing,
    Kind::Translation,
    Kind::Maths,
    Kind::Advice,
    Kind::Roleplay,
    Kind::Sensitive,
];

/// The folded beginning and, of a long prompt, also its end, as lines of their own.
fn ends(prompt: &str) -> String {
    let mut folded = fold(prompt, READ);
    if prompt.len() > 2 * READ {
        let start = prompt.ceil_char_boundary(prompt.len() - READ);
        folded.push('\n');
        folded.push_str(&fold(&prompt[start..], READ));
    }
    folded
}

/// What punctuation and layout speak for.
fn shape(prompt: &str, folded: &str) -> Vec<(Kind, f64)> {
    let mut evidence = Vec::new();
    let text = super::text::prefix(prompt, 2 * READ);
    if text.contains("```") {
        evidence.push((Kind::Code, 3.0));
    }
    let marks =
        ["();", "{\n", "};", "=>", "->", "::", "==", "</", "def ", "#include", "import ", "fn ", "SELECT "];
    let code = marks.iter().filter(|mark| text.contains(**mark)).count();
    if code >= 2 {
        evidence.push((Kind::Code, 1.0 + code as f64 * 0.5));
    }
    if arithmetic(folded) {
        evidence.push((Kind::Maths, 2.0));
    }
    let asked = folded.trim_end().ends_with(['?', '？', '؟']);
    if asked {
        evidence.push((Kind::Question, 1.0));
    }
    // A few words that ask and order nothing are small talk.
    let few = words(folded).take(9).count();
    if (1..=8).contains(&few) && !asked {
        evidence.push((Kind::Chat, 0.6));
    }
    evidence
}

/// "12 * (3+4)", "x^2 = 9": an operator between two operands, one of them a number.
fn arithmetic(folded: &str) -> bool {
    let compact: Vec<char> = folded.chars().filter(|c| !c.is_whitespace()).take(READ).collect();
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
    fn nearest(&self, folded: &str) -> Option<(&InteractionType, f64)> {
        if self.vectors.is_empty() {
            return None;
        }
        let words = bag(folded);
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
