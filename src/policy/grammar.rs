//! Answers in a given form: a JSON schema becomes a grammar, and the grammar a mask over the vocabulary at every step.
//!
//! The parser is `llguidance` (an Earley parser over a trie of the vocabulary). A grammar is compiled once a schema; a
//! sequence walks a copy of it.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use llguidance::{
    JsonCompileOptions, Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Map, Value};

use super::Model;

/// A schema's text may have so many bytes, about what OpenAI takes.
const SCHEMA_BYTES: usize = 120_000;
/// Compiled schemas that are kept.
const KEPT: usize = 32;
/// The trie has no longer tokens; none of use in JSON is near.
const TOKEN_BYTES: usize = 512;
/// What may stand between two parts of a document: a space, or a new line with its indent. Unbounded white space would
/// let a model that is lost write nothing else.
const WHITE_SPACE: &str = r"(\x20|\x0A[\x20\x09]{0,40})";

/// Why there is no grammar for a schema.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SchemaError(String);

/// The grammar has come to its bounds, and cannot say what may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the grammar is too complex at this place")]
pub(crate) struct TooComplex;

/// The form that an answer has to have; clones share it.
#[derive(Clone)]
pub struct Grammar(Arc<Matcher>);

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Grammar").finish_non_exhaustive()
    }
}

impl Grammar {
    pub(crate) fn begin(&self) -> Guide {
        // What is learned on the way (states of the lexer) belongs to the sequence and goes with it.
        Guide(self.0.deep_clone())
    }
}

/// One sequence's place in its grammar.
pub(crate) struct Guide(Matcher);

impl fmt::Debug for Guide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Guide").finish_non_exhaustive()
    }
}

impl Guide {
    /// Leaves only the tokens that may come next; the end of the turn is one of them where the document may end.
    pub(crate) fn mask(&mut self, logits: &mut [f32]) -> Result<(), TooComplex> {
        let allowed = self.0.compute_mask().map_err(|_| TooComplex)?;
        for (logit, token) in logits.iter_mut().zip(0..) {
            if !allowed.is_allowed(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes the token that was drawn; `true` if the document is complete and nothing can follow.
    pub(crate) fn push(&mut self, token: u32) -> Result<bool, TooComplex> {
        self.0.consume_token(token).map_err(|_| TooComplex)?;
        Ok(self.0.is_stopped())
    }
}

/// Grammars over one model's vocabulary, those of the latest schemas at hand.
pub(crate) struct Grammars {
    model: Arc<Model>,
    /// Built when the first schema comes.
    factory: OnceLock<Option<ParserFactory>>,
    /// The latest last.
    kept: Mutex<Vec<(String, Grammar)>>,
    /// One schema is compiled at a time, so that they take one core at most.
    compiling: Mutex<()>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    pub(crate) fn new(model: Arc<Model>) -> Self {
        Self { model, factory: OnceLock::new(), kept: Mutex::default(), compiling: Mutex::default() }
    }

    /// The grammar of a schema. It may take a while, up to some tenths of a second.
    pub(crate) fn grammar(&self, schema: &Map<String, Value>) -> Result<Grammar, SchemaError> {
        let mut schema = Value::Object(schema.clone());
        let text = schema.to_string();
        if text.len() > SCHEMA_BYTES {
            return Err(SchemaError(format!("is larger than {SCHEMA_BYTES} bytes")));
        }
        if let Some(grammar) = self.kept(&text) {
            return Ok(grammar);
        }
        let _one_at_a_time = self.compiling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(grammar) = self.kept(&text) {
            return Ok(grammar);
        }
        // This key would hold settings of the compiler; ours replace what a client may have written there.
        let options = JsonCompileOptions {
            whitespace_pattern: Some(WHITE_SPACE.to_owned()),
            ..JsonCompileOptions::default()
        };
        options.apply_to(&mut schema);
        let factory = self.factory.get_or_init(|| factory(&self.model)).as_ref();
        let factory = factory.ok_or_else(|| SchemaError("is not possible with this model".to_owned()))?;
        let refused = |why: &str| {
            SchemaError(format!("is not supported: {}", why.lines().next().unwrap_or("it has no grammar")))
        };
        let mut matcher = Matcher::new(factory.create_parser(TopLevelGrammar::from_json_schema(schema)));
        // What cannot begin is refused now and not in the middle of an answer.
        matcher.compute_mask().map_err(|error| refused(&error.to_string()))?;
        let grammar = Grammar(Arc::new(matcher));
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push((text, grammar.clone()));
        Ok(grammar)
    }

    fn kept(&self, schema: &str) -> Option<Grammar> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(text, _)| text == schema)?;
        let entry = kept.remove(at);
        let grammar = entry.1.clone();
        kept.push(entry);
        Some(grammar)
    }
}

/// The parser over the model's vocabulary; `None` if no token ends a turn.
fn factory(model: &Model) -> Option<ParserFactory> {
    let architecture = &model.decoder.architecture;
    let ends: Vec<u32> = architecture
        .end_of_turn
        .iter()
        .copied()
        .filter(|token| (*token as usize) < architecture.vocabulary)
        .collect();
    let words: Vec<Vec<u8>> = (0..architecture.vocabulary as u32)
        .map(|token| {
            let bytes = model.vocabulary.piece(token);
            // A token that ends the turn is no text, and 0xff, which no text has, marks special tokens in the trie.
            let is_text =
                !ends.contains(&token) && bytes.len() <= TOKEN_BYTES && bytes.first() != Some(&0xff);
            if is_text { bytes.to_vec() } else { Vec::new() }
        })
        .collect();
    let info = TokRxInfo::new(words.len() as u32, *ends.first()?);
    let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
    let vocabulary: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::general_slices();
    let mut factory = ParserFactory::new(&vocabulary, InferenceCapabilities::default(), &slices).ok()?;
    factory.quiet();
    *factory.limits_mut() = ParserLimits {
        // The work of compiling, some ten milliseconds …
        initial_lexer_fuel: 500_000,
        max_grammar_size: 100_000,
        // … of one step, as much …
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_items_in_row: 2_000,
        // … and the memory of one sequence, at one or two kilobytes each.
        max_lexer_states: 20_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    };
    Some(factory)
}

#[cfg(test)]
mod tests;
