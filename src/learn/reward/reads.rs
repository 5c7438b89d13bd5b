//! Where a reward model's heads read an answer, and the way back from there.

use std::{fs, path::Path, sync::Arc};

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::learn::{Error, sequence::MicroBatch};
use crate::policy::{self, Adapter, AdapterGradient, Batch, Model, Tape};

/// The heads' scores of each sequence.
pub(super) type Scores = Vec<Vec<f32>>;

/// Where the scalar heads read an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reads {
    /// At its last token, as `AutoModelForSequenceClassification` does.
    End,
    /// At every place where one of its tokens was decided, of which the mean is the score: what PPO's value model, which
    /// begins as a copy, says along the answer. Fewer judgements are needed where they are about how an answer is worded,
    /// for the last token's hidden state tells little of how it began (`benches/RESULTS.md`); but transformers has no class
    /// that reads so.
    Answer,
}

/// Says where an adapter's heads read; without it, as PEFT leaves one, that is the end.
const READS: &str = "reads.json";

impl Reads {
    /// Says so in `dir`.
    pub(super) fn save(self, dir: &Path) -> Result<(), policy::Error> {
        let word = serde_json::to_vec(&self).map_err(std::io::Error::from)?;
        Ok(fs::write(dir.join(READS), word)?)
    }

    /// How the reward model in `dir` reads.
    ///
    /// # Errors
    /// In an unknown way.
    pub fn beside(dir: &Path) -> Result<Self, policy::Error> {
        let path = dir.join(READS);
        if !path.exists() {
            return Ok(Self::End);
        }
        serde_json::from_slice(&fs::read(&path)?)
            .map_err(|fault| policy::Error::Adapter(format!("{}: {fault}", path.display())))
    }

    /// Rows for the decoder, of which those are wanted that the heads read.
    pub(super) fn batch(self, micro: &MicroBatch, adapter: &Arc<Adapter>) -> Batch {
        match self {
            Self::End => micro.ends(Some(adapter)),
            Self::Answer => micro.answers(Some(adapter)),
        }
    }

    /// How many of those rows are each sequence's.
    pub(super) fn places(self, micro: &MicroBatch) -> Vec<usize> {
        match self {
            Self::End => vec![1; micro.members.len()],
            Self::Answer => micro.lengths.clone(),
        }
    }
}

/// The scores of sequences, given the hidden states at so many places of each.
pub(super) fn read(adapter: &Adapter, hidden: &Tensor, places: &[usize]) -> Result<Scores, Error> {
    let heads = adapter.heads_beside(hidden)?.ok_or(Error::NoScoreHead)?;
    let rows = hidden.to_dtype(DType::F32)?.matmul(&heads.t()?)?.to_vec2::<f32>()?;
    let mut rows = rows.iter();
    let mut mean = |count: &usize| {
        let mut sum = vec![0f32; heads.dims()[0]];
        for row in rows.by_ref().take(*count) {
            sum.iter_mut().zip(row).for_each(|(sum, score)| *sum += score);
        }
        // An answer of no token at all scores 0.
        sum.iter().map(|sum| sum / (*count).max(1) as f32).collect()
    };
    Ok(places.iter().map(&mut mean).collect())
}

/// Adds the gradient of the scores of a micro-batch's sequences.
pub(super) fn backward(
    model: &Model,
    adapter: &Adapter,
    (tape, places): (&Tape, &[usize]),
    dscores: &[&[f32]],
    gradient: &mut AdapterGradient,
) -> Result<(), Error> {
    let hidden = tape.hidden();
    let heads = adapter.heads_beside(hidden)?.ok_or(Error::NoScoreHead)?;
    let mut rows: Vec<f32> = Vec::new();
    for (own, count) in dscores.iter().zip(places) {
        let each = own.iter().map(|slope| slope / *count as f32);
        rows.extend(std::iter::repeat_n(each, *count).flatten());
    }
    let dscores = Tensor::new(rows, hidden.device())?.reshape((hidden.dim(0)?, heads.dim(0)?))?;
    gradient.add_score(dscores.t()?.matmul(&hidden.to_dtype(DType::F32)?)?)?;
    model.decoder.backward(tape, &dscores.matmul(&heads)?.to_dtype(hidden.dtype())?, gradient)?;
    Ok(())
}
