//! Causal grouped-query attention over rows of many sequences, with its backward pass.
//!
//! The rows of all sequences lie one after another without padding; a [`Span`] says which rows belong together.
//! The same kernel reads keys and values from the batch itself (training) or from a cache (decoding), so that the two
//! paths cannot drift apart.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::ops::{add_scaled, dot, exp, for_each_row, read};

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

/// Head counts and width. `queries` is a multiple of `keys`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) dim: usize,
}

impl Heads {
    fn scale(self) -> f32 {
        (self.dim as f32).sqrt().recip()
    }

    fn key_columns(self) -> usize {
        self.keys * self.dim
    }
}

/// Keys and values of the first places of one sequence, `[places, keys · dim]` each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Past<'a> {
    pub(crate) keys: &'a [f32],
    pub(crate) values: &'a [f32],
}

/// Attention of `q` (`[rows, queries · dim]`) over each span's past, which holds its own rows too.
pub(crate) fn attend(q: &Tensor, spans: &[Span], pasts: &[Past<'_>], heads: Heads) -> Result<Tensor> {
    let columns = heads.queries * heads.dim;
    let rows = q.dim(0)?;
    let owner: Vec<usize> =
        spans.iter().enumerate().flat_map(|(index, span)| std::iter::repeat_n(index, span.len)).collect();
    let mut out = vec![0f32; rows * columns];
    read(q, |q| {
        for_each_row(
            &mut out,
            columns,
            #[inline(always)]
            |row, out| {
                let span = spans[owner[row]];
                let places = span.position + row - span.start + 1;
                let q = &q[row * columns..(row + 1) * columns];
                let mut weights = vec![0f32; places];
                for (head, (out, q)) in
                    out.chunks_exact_mut(heads.dim).zip(q.chunks_exact(heads.dim)).enumerate()
                {
                    let column = head * heads.keys / heads.queries * heads.dim;
                    attention_weights(q, pasts[owner[row]].keys, column, heads, &mut weights);
                    for (place, weight) in weights.iter().enumerate() {
                        let at = place * heads.key_columns() + column;
                        add_scaled(out, *weight, &pasts[owner[row]].values[at..at + heads.dim]);
                    }
                }
            },
        );
    })?;
    Tensor::from_vec(out, (rows, columns), q.device())
}

/// `softmax(q · K / √dim)` over as many places as `weights` is long.
#[inline(always)]
fn attention_weights(q: &[f32], keys: &[f32], column: usize, heads: Heads, weights: &mut [f32]) {
    let mut most = f32::NEG_INFINITY;
    for (place, weight) in weights.iter_mut().enumerate() {
        let at = place * heads.key_columns() + column;
        *weight = dot(q, &keys[at..at + heads.dim]) * heads.scale();
        most = most.max(*weight);
    }
    let mut total = 0.0;
    for weight in &mut *weights {
        *weight = exp(*weight - most);
        total += *weight;
    }
    for weight in weights {
        *weight /= total;
    }
}

/// The gradients of [`attend`] with respect to `q`, `k` and `v`, for spans that see no more than their own rows.
///
/// The weights are computed again rather than kept: `rows²` of them per head would be the largest thing on the tape.
pub(crate) fn attend_backward(
    dy: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    spans: &[Span],
    heads: Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (rows, columns, key_columns) = (q.dim(0)?, heads.queries * heads.dim, heads.key_columns());
    let tasks: Vec<(Span, usize)> =
        spans.iter().flat_map(|span| (0..heads.keys).map(move |head| (*span, head))).collect();
    let parts: Vec<Gradients> = read(dy, |dy| {
        read(q, |q| {
            read(k, |k| {
                read(v, |v| {
                    let inputs = Inputs { dy, q, k, v };
                    let arch = pulp::Arch::new();
                    tasks
                        .par_iter()
                        .map(|(span, head)| {
                            arch.dispatch(
                                #[inline(always)]
                                || inputs.gradients(*span, *head, heads),
                            )
                        })
                        .collect()
                })
            })
        })
    })????;
    let (mut dq, mut dk, mut dv) =
        (vec![0f32; rows * columns], vec![0f32; rows * key_columns], vec![0f32; rows * key_columns]);
    let group = heads.queries / heads.keys * heads.dim;
    for ((span, head), part) in tasks.iter().zip(&parts) {
        for row in 0..span.len {
            let copy = |out: &mut [f32], from: &[f32], columns: usize, width: usize| {
                let at = (span.start + row) * columns + head * width;
                out[at..at + width].copy_from_slice(&from[row * width..(row + 1) * width]);
            };
            copy(&mut dq, &part.dq, columns, group);
            copy(&mut dk, &part.dk, key_columns, heads.dim);
            copy(&mut dv, &part.dv, key_columns, heads.dim);
        }
    }
    let device = q.device();
    Ok((
        Tensor::from_vec(dq, (rows, columns), device)?,
        Tensor::from_vec(dk, (rows, key_columns), device)?,
        Tensor::from_vec(dv, (rows, key_columns), device)?,
    ))
}

struct Inputs<'a> {
    dy: &'a [f32],
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

/// The gradients of one key head over one span: `dq` for all query heads that share it.
struct Gradients {
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Inputs<'_> {
    #[inline(always)]
    fn gradients(&self, span: Span, head: usize, heads: Heads) -> Gradients {
        let (dim, key_columns, columns) = (heads.dim, heads.key_columns(), heads.queries * heads.dim);
        let group = heads.queries / heads.keys;
        let mut out = Gradients {
            dq: vec![0f32; span.len * group * dim],
            dk: vec![0f32; span.len * dim],
            dv: vec![0f32; span.len * dim],
        };
        let keys = &self.k[span.start * key_columns..];
        let value = |place: usize| {
            let at = (span.start + place) * key_columns + head * dim;
            &self.v[at..at + dim]
        };
        let mut weights = vec![0f32; span.len];
        let mut dweights = vec![0f32; span.len];
        for row in 0..span.len {
            for member in 0..group {
                let at = (span.start + row) * columns + (head * group + member) * dim;
                let (q, dy) = (&self.q[at..at + dim], &self.dy[at..at + dim]);
                let (weights, dweights) = (&mut weights[..=row], &mut dweights[..=row]);
                attention_weights(q, keys, head * dim, heads, weights);
                for (place, dweight) in dweights.iter_mut().enumerate() {
                    *dweight = dot(dy, value(place));
                }
                let mean = dot(weights, dweights);
                let dq = &mut out.dq[(row * group + member) * dim..(row * group + member + 1) * dim];
                for place in 0..=row {
                    let dscore = weights[place] * (dweights[place] - mean) * heads.scale();
                    let at = place * key_columns + head * dim;
                    add_scaled(dq, dscore, &keys[at..at + dim]);
                    add_scaled(&mut out.dk[place * dim..(place + 1) * dim], dscore, q);
                    add_scaled(&mut out.dv[place * dim..(place + 1) * dim], weights[place], dy);
                }
            }
        }
        out
    }
}
