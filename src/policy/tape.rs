//! What a forward pass keeps for the backward pass.

use std::ops::Range;

use candle_core::Tensor;

use super::batch::Batch;

/// What one layer keeps of its forward pass; rows as in the batch, from the attention's output on only the wanted ones in
/// the last layer.
#[derive(Debug)]
pub(crate) struct LayerTape {
    pub(crate) x: Tensor,
    pub(crate) normed: Tensor,
    /// Query and key before each head's norm, where there is one.
    pub(crate) bare: Option<(Tensor, Tensor)>,
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) attention: Tensor,
    pub(crate) middle: Tensor,
    pub(crate) mlp_normed: Tensor,
    pub(crate) gate: Tensor,
    pub(crate) up: Tensor,
    pub(crate) activated: Tensor,
    /// `scale · x Aᵀ` of each linear, `[rows, rank]`, in the order of [`super::architecture::Target::ALL`].
    pub(crate) low_rank: Vec<Option<Tensor>>,
}

/// What the layers from `first_layer` on keep of one forward pass.
#[derive(Debug)]
pub struct Tape {
    pub(crate) first_layer: usize,
    pub(crate) parts: Vec<PartTape>,
    /// The hidden states after the last norm, `[wanted, hidden]`.
    pub(crate) hidden: Tensor,
}

/// The tape of some whole sequences of the batch.
#[derive(Debug)]
pub(crate) struct PartTape {
    /// Its wanted rows among those of the whole batch.
    pub(crate) rows: Range<usize>,
    pub(crate) batch: Batch,
    pub(crate) layers: Vec<LayerTape>,
    /// The input of the last norm.
    pub(crate) last: Tensor,
}

impl Tape {
    /// The hidden states that the pass ended with, `[wanted, hidden]`.
    pub fn hidden(&self) -> &Tensor {
        &self.hidden
    }
}
