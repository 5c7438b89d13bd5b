//! Answers as token sequences, and their packing into micro-batches without padding.

use std::sync::Arc;

use candle_core::Tensor;

use crate::completion::Prompt;
use crate::policy::{Adapter, Batch, Model};

use super::Error;

/// A prompt and its answer, as the decoder reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Prompt, then answer; the answer's end of turn belongs to it.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt, at least one.
    pub prompt: usize,
    /// Tokens of the prompt and of what was said. An answer that was cut off is read by a judge with an end of turn, which
    /// nobody has said and nobody is to learn.
    pub said: usize,
}

impl Sequence {
    /// Of which all was said.
    pub fn new(tokens: Vec<u32>, prompt: usize) -> Self {
        Self { said: tokens.len(), tokens, prompt }
    }

    /// What a model has sampled, without its end of turn, which is said where it `ended` its turn by itself.
    pub fn sampled(model: &Model, prompt: &[u32], answer: &[u32], ended: bool) -> Self {
        let mut tokens = [prompt, answer].concat();
        let cut_off = tokens.len();
        tokens.extend(model.end_of_turn());
        Self { said: if ended { tokens.len() } else { cut_off }, tokens, prompt: prompt.len() }
    }

    /// Encodes a prompt with a finished answer: the end of turn is appended.
    ///
    /// The prompt loses its oldest tokens where the whole does not fit into `most` tokens.
    ///
    /// # Errors
    /// The chat template refuses the prompt.
    pub fn encode(model: &Model, prompt: &Prompt, answer: &str, most: usize) -> Result<Self, Error> {
        let prompt = encode_prompt(model, prompt)?;
        let mut answer = model.vocabulary.encode_answer(answer)?;
        answer.extend(model.end_of_turn());
        answer.truncate(most.saturating_sub(1));
        let kept = prompt.len().min(most - answer.len());
        let tokens: Vec<u32> = prompt[prompt.len() - kept..].iter().chain(&answer).copied().collect();
        Ok(Self::new(tokens, kept))
    }

    /// Tokens of what was said.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt..self.said]
    }
}

/// Encodes a prompt up to where the answer begins.
///
/// # Errors
/// The chat template refuses the conversation.
pub fn encode_prompt(model: &Model, prompt: &Prompt) -> Result<Vec<u32>, Error> {
    Ok(match prompt {
        Prompt::Chat(messages) => model.vocabulary.encode_chat(messages)?,
        Prompt::Text(text) => model.vocabulary.encode_text(text)?,
    })
}

/// Sequences that pass the decoder together.
#[derive(Debug, Clone, Default)]
pub struct MicroBatch {
    /// Which sequences, by their place in the list that was packed.
    pub members: Vec<usize>,
    sequences: Vec<Sequence>,
    /// Row whose hidden state decides each token of the answers, sequence after sequence.
    rows: Vec<u32>,
    /// Those tokens.
    pub targets: Vec<u32>,
    /// Tokens of each answer.
    pub lengths: Vec<usize>,
    /// Sequences of each group, which are not taken apart.
    grouped: Vec<usize>,
    /// Rows before it in the micro-batch that it is a part of.
    before: usize,
}

impl MicroBatch {
    /// Packs sequences in order, at most `most` tokens at a time (but at least one sequence).
    pub fn pack(sequences: &[Sequence], most: usize) -> Vec<Self> {
        Self::pack_groups(sequences.iter().map(|sequence| [sequence]), most)
    }

    /// [`MicroBatch::pack`] that keeps the sequences of a group together; they are counted through all groups.
    pub fn pack_groups<'a, G: AsRef<[&'a Sequence]>>(
        groups: impl IntoIterator<Item = G>,
        most: usize,
    ) -> Vec<Self> {
        let mut batches: Vec<Self> = Vec::new();
        let (mut index, mut held) = (0, 0);
        for group in groups {
            let group = group.as_ref();
            let tokens: usize = group.iter().map(|sequence| sequence.tokens.len()).sum();
            if batches.is_empty() || held + tokens > most {
                held = 0;
                batches.push(Self::default());
            }
            let Some(batch) = batches.last_mut() else { continue };
            batch.grouped.push(group.len());
            for sequence in group {
                batch.push(index, sequence, held);
                (index, held) = (index + 1, held + sequence.tokens.len());
            }
        }
        batches
    }

    fn push(&mut self, index: usize, sequence: &Sequence, start: usize) {
        let answer = sequence.answer();
        self.members.push(index);
        self.sequences.push(sequence.clone());
        let first = start + sequence.prompt - 1;
        self.rows.extend((first..first + answer.len()).map(|row| row as u32));
        self.targets.extend_from_slice(answer);
        self.lengths.push(answer.len());
    }

    /// Itself if it has at most `most` tokens, else parts of at most so many (but of at least one group each), in order.
    pub(crate) fn parts(&self, most: usize) -> Vec<Self> {
        let mut parts: Vec<Self> = Vec::new();
        let (mut sequence, mut held, mut before) = (0, 0, self.before);
        for count in &self.grouped {
            let group = sequence..sequence + count;
            let tokens: usize =
                self.sequences[group.clone()].iter().map(|sequence| sequence.tokens.len()).sum();
            if parts.is_empty() || held + tokens > most {
                before += held;
                held = 0;
                parts.push(Self { before, ..Self::default() });
            }
            let Some(part) = parts.last_mut() else { continue };
            part.grouped.push(*count);
            for nth in group {
                part.push(self.members[nth], &self.sequences[nth], held);
                held += self.sequences[nth].tokens.len();
            }
            sequence += count;
        }
        parts
    }

    /// Rows for the decoder.
    pub(crate) fn rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.tokens.len()).sum()
    }

    /// Its own rows of those of the micro-batch that it is a part of, or is.
    pub(crate) fn own_rows(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.narrow(0, self.before, self.rows())
    }

    /// Its sequences' lists of those of all sequences that were packed, one after the other.
    pub(crate) fn own_lists(&self, lists: &[Vec<f32>]) -> Vec<f32> {
        self.members.iter().flat_map(|member| &lists[*member]).copied().collect()
    }

    pub(crate) fn groups(&self) -> usize {
        self.grouped.len()
    }

    /// The rows for the decoder, by the base alone.
    pub fn batch(&self) -> Batch {
        Batch::of(self.tokens(), None)
    }

    /// The rows for the decoder, under one adapter or none. The hidden states that decide the answers' tokens are wanted,
    /// `[targets, hidden]`.
    pub fn answers(&self, adapter: Option<&Arc<Adapter>>) -> Batch {
        Batch::of(self.tokens(), adapter).wanting(self.rows.clone())
    }

    /// The same where the hidden state at the end of each sequence is wanted, `[sequences, hidden]`.
    pub fn ends(&self, adapter: Option<&Arc<Adapter>>) -> Batch {
        let batch = Batch::of(self.tokens(), adapter);
        let ends = batch.last_rows();
        batch.wanting(ends)
    }

    fn tokens(&self) -> impl Iterator<Item = &[u32]> {
        self.sequences.iter().map(|sequence| &sequence.tokens[..])
    }

    /// An element for each sequence becomes one for each of its targets.
    pub fn spread(&self, values: &[f32]) -> Vec<f32> {
        let each = values.iter().zip(&self.lengths);
        each.flat_map(|(value, length)| std::iter::repeat_n(*value, *length)).collect()
    }

    /// Cuts a list with an element for each target into one list a sequence.
    pub fn by_sequence(&self, values: &[f32]) -> Vec<Vec<f32>> {
        let mut rest = values;
        let mut cut = |length: &usize| {
            let (head, tail) = rest.split_at(*length);
            rest = tail;
            head.to_vec()
        };
        self.lengths.iter().map(&mut cut).collect()
    }
}
