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
}

impl Sequence {
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
        Ok(Self { tokens, prompt: kept })
    }

    /// Tokens of the answer.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt..]
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
#[derive(Debug, Default)]
pub struct MicroBatch {
    /// Which sequences, by their place in the list that was packed.
    pub members: Vec<usize>,
    tokens: Vec<Vec<u32>>,
    /// Row whose hidden state decides each token of the answers, sequence after sequence.
    rows: Vec<u32>,
    /// Those tokens.
    pub targets: Vec<u32>,
    /// Tokens of each answer.
    pub lengths: Vec<usize>,
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
            for sequence in group {
                batch.push(index, sequence, held);
                (index, held) = (index + 1, held + sequence.tokens.len());
            }
        }
        batches
    }

    fn push(&mut self, index: usize, sequence: &Sequence, start: usize) {
        self.members.push(index);
        self.tokens.push(sequence.tokens.clone());
        let first = start + sequence.prompt - 1;
        self.rows.extend((first..first + sequence.answer().len()).map(|row| row as u32));
        self.targets.extend_from_slice(sequence.answer());
        self.lengths.push(sequence.answer().len());
    }

    /// The rows for the decoder, under one adapter or none.
    pub fn batch(&self, adapter: Option<&Arc<Adapter>>) -> Batch {
        Batch::of(self.tokens.iter().map(Vec::as_slice), adapter)
    }

    /// The hidden states that decide the answers' tokens: `[targets, hidden]` of `[rows, hidden]`.
    pub fn answered(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        hidden.index_select(&Tensor::new(self.rows.as_slice(), hidden.device())?, 0)
    }

    /// The other way: a gradient of `[targets, hidden]` in its rows of `[rows, hidden]`, zeros elsewhere.
    pub fn scatter(&self, danswered: &Tensor) -> candle_core::Result<Tensor> {
        let rows = self.tokens.iter().map(Vec::len).sum::<usize>();
        let zeros = Tensor::zeros((rows, danswered.dim(1)?), danswered.dtype(), danswered.device())?;
        zeros.index_add(&Tensor::new(self.rows.as_slice(), danswered.device())?, danswered, 0)
    }

    /// Row of the last token of each sequence.
    pub fn last_rows(&self) -> Vec<u32> {
        self.batch(None).last_rows()
    }

    /// The other way: an element for each sequence becomes one for each of its targets.
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
