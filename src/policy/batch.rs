//! The rows of one step: those of all sequences one after another, without padding.

use std::{ops::Range, sync::Arc};

use super::lora::Adapter;

/// Rows below which a thread of its own costs more than it saves: every thread unpacks the weights once more.
const LEAST_ROWS: usize = 128;

/// The rows of one step.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// `[rows]`.
    pub tokens: Vec<u32>,
    pub spans: Vec<Span>,
    /// Which rows an adapter changes; rows in no range see the base alone.
    pub adapted: Adapted,
    /// Rows whose hidden states are wanted in the end, ascending; all if unset. Of the others the last layer needs keys and
    /// values, and no more.
    pub wanted: Option<Vec<u32>>,
}

/// The rows of one sequence within a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First row.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Place of the first row within its sequence.
    pub position: usize,
}

/// Rows and the adapter that changes them, ascending and disjoint.
pub(crate) type Adapted = Vec<(Range<usize>, Arc<Adapter>)>;

impl Batch {
    /// Appends `tokens` as the next places of one sequence.
    pub fn push(&mut self, tokens: &[u32], position: usize, adapter: Option<&Arc<Adapter>>) {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.spans.push(Span { start, len: tokens.len(), position });
        let Some(adapter) = adapter else { return };
        match self.adapted.last_mut() {
            Some((rows, last)) if rows.end == start && Arc::ptr_eq(last, adapter) => {
                rows.end = self.tokens.len()
            }
            _ => self.adapted.push((start..self.tokens.len(), Arc::clone(adapter))),
        }
    }

    /// Whole sequences under one adapter, for training and scoring.
    pub fn of<'a>(sequences: impl IntoIterator<Item = &'a [u32]>, adapter: Option<&Arc<Adapter>>) -> Self {
        let mut batch = Self::default();
        for tokens in sequences {
            batch.push(tokens, 0, adapter);
        }
        batch
    }

    /// The same of which only some rows' hidden states are wanted.
    #[must_use]
    pub fn wanting(self, rows: Vec<u32>) -> Self {
        let wanted = (rows.len() < self.tokens.len()).then_some(rows);
        Self { wanted, ..self }
    }

    /// Where the wanted rows among `rows` stand among all wanted rows.
    pub(crate) fn wanted_of(&self, rows: &Range<usize>) -> Range<usize> {
        let Some(wanted) = &self.wanted else { return rows.clone() };
        let before = |row: usize| wanted.partition_point(|wanted| (*wanted as usize) < row);
        before(rows.start)..before(rows.end)
    }

    /// At most so many batches of whole sequences, each with its rows here and about as many as the others.
    pub(crate) fn parts(&self, most: usize) -> Vec<(Range<usize>, Self)> {
        let rows = self.tokens.len();
        let most = most.min(rows / LEAST_ROWS).max(1);
        let mut parts: Vec<(Range<usize>, Self)> = Vec::new();
        for span in &self.spans {
            let full = parts.last().is_none_or(|(part, _)| part.end * most >= parts.len() * rows);
            if full {
                parts.push((span.start..span.start, Self::default()));
            }
            let Some((part, batch)) = parts.last_mut() else { continue };
            let end = span.start + span.len;
            batch.tokens.extend_from_slice(&self.tokens[span.start..end]);
            batch.spans.push(Span { start: span.start - part.start, ..*span });
            part.end = end;
        }
        for (rows, part) in &mut parts {
            for (adapted, adapter) in &self.adapted {
                let (from, to) = (adapted.start.max(rows.start), adapted.end.min(rows.end));
                if from < to {
                    part.adapted.push((from - rows.start..to - rows.start, Arc::clone(adapter)));
                }
            }
            let wanted = self.wanted.as_ref().map(|wanted| &wanted[self.wanted_of(rows)]);
            part.wanted = wanted.map(|wanted| wanted.iter().map(|row| row - rows.start as u32).collect());
        }
        parts
    }

    /// Row of the last token of each sequence.
    pub fn last_rows(&self) -> Vec<u32> {
        self.spans.iter().map(|span| (span.start + span.len - 1) as u32).collect()
    }

    pub(crate) fn positions(&self) -> Vec<usize> {
        self.spans.iter().flat_map(|span| span.position..span.position + span.len).collect()
    }
}
