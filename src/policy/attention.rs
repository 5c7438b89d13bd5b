//! Causal grouped-query attention over rows of many sequences, with its backward pass.
//!
//! The rows of all sequences lie one after another without padding; a [`Span`] says which rows belong together.
//! The same kernel reads keys and values from the batch itself (training) or from a cache (decoding), so that the two
//! paths cannot drift apart.

mod backward;
#[cfg(feature = "cuda")]
mod card;
mod kernel;
mod store;
mod tensors;

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

pub(crate) use self::backward::attend_backward;
use self::kernel::{TOGETHER, Task, Vector};
pub(crate) use self::store::Store;
#[cfg(feature = "cuda")]
use super::ops::columns;
use super::{architecture::Heads, batch::Span, ops::read};

/// Multiplications below which waking a second thread costs more than it saves.
const PARALLEL_WORK: usize = 1 << 16;

/// Which places the rows of a pass see and where these lie, wherever the kernels on slices do not work. It is the same in
/// all layers, and written down once a pass.
#[derive(Debug)]
pub(crate) struct Reach {
    sight: Sight,
    stored: Option<Stored>,
}

/// As those that attend read it.
#[derive(Debug)]
enum Sight {
    Tensors(tensors::Sight),
    #[cfg(feature = "cuda")]
    Card(card::Sight),
}

impl Reach {
    /// Of whole sequences, whose keys and values are the batch's own.
    pub(crate) fn fresh(spans: &[Span], heads: Heads, device: &Device) -> Result<Self> {
        let own = |nth: usize, place: usize| spans[nth].start + place;
        Ok(Self { sight: Sight::new(spans, heads, device, &own)?, stored: None })
    }

    /// Of sequences whose keys and values lie in a store, at `location(sequence, place)`.
    pub(crate) fn stored(
        spans: &[Span],
        heads: Heads,
        store: &Arc<Store>,
        location: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self> {
        let stored = Some(Stored::new(spans, store, location)?);
        Ok(Self { sight: Sight::new(spans, heads, store.device(), location)?, stored })
    }

    /// [`attend`]; where there is a store, the rows' keys and values are written to it first.
    pub(crate) fn attend(
        &self,
        layer: usize,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        heads: Heads,
    ) -> Result<Tensor> {
        let (k, v) = match &self.stored {
            Some(stored) => stored.write(layer, (k, v))?,
            None => (k, v),
        };
        match &self.sight {
            Sight::Tensors(sight) => sight.attend((q, k, v), heads),
            #[cfg(feature = "cuda")]
            Sight::Card(sight) => sight.attend((q, k, v), heads),
        }
    }

    /// [`attend_backward`], for whole sequences.
    pub(crate) fn backward(
        &self,
        dy: &Tensor,
        qkv: (&Tensor, &Tensor, &Tensor),
        heads: Heads,
    ) -> Result<Slopes> {
        match &self.sight {
            Sight::Tensors(sight) => sight.backward(dy, qkv, heads).map(Slopes::from),
            #[cfg(feature = "cuda")]
            Sight::Card(sight) => Slopes::within(sight.backward(dy, qkv, heads)?, heads),
        }
    }
}

/// The gradients of queries, keys and values, `[rows, heads · dim]`.
#[derive(Debug)]
pub(crate) struct Slopes {
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    /// All three side by side, if they are columns of it.
    pub(crate) whole: Option<Tensor>,
}

impl From<(Tensor, Tensor, Tensor)> for Slopes {
    fn from((q, k, v): (Tensor, Tensor, Tensor)) -> Self {
        Self { q, k, v, whole: None }
    }
}

impl Slopes {
    #[cfg(feature = "cuda")]
    fn within(whole: Tensor, heads: Heads) -> Result<Self> {
        let [q, k, v] = columns(&whole, heads.widths())?;
        Ok(Self { q, k, v, whole: Some(whole) })
    }
}

impl Sight {
    fn new(
        spans: &[Span],
        heads: Heads,
        device: &Device,
        location: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Ok(Self::Card(card::Sight::new(spans, heads, device, location)?));
        }
        Ok(Self::Tensors(tensors::Sight::new(spans, heads, device, location)?))
    }
}

/// Keys and values that outlive the pass.
#[derive(Debug)]
struct Stored {
    store: Arc<Store>,
    /// Where those of the batch's rows go, `[rows]`.
    locations: Tensor,
}

impl Stored {
    fn new(spans: &[Span], store: &Arc<Store>, location: &dyn Fn(usize, usize) -> usize) -> Result<Self> {
        let numbered = spans.iter().enumerate();
        let places = numbered
            .flat_map(|(nth, span)| (0..span.len).map(move |row| (nth, span.position + row)))
            .map(|(nth, place)| location(nth, place) as u32);
        Ok(Self { store: Arc::clone(store), locations: Tensor::from_iter(places, store.device())? })
    }

    /// Writes the rows' own, and returns those of all places.
    fn write(&self, layer: usize, kv: (&Tensor, &Tensor)) -> Result<(&Tensor, &Tensor)> {
        self.store.write(layer, &self.locations, kv)?;
        Ok(self.store.layer(layer))
    }
}

/// Places whose keys and values lie together.
pub(crate) const BLOCK: usize = 32;

/// Keys and values of one sequence's first places in one layer.
#[derive(Debug, Clone)]
pub(crate) struct Past<'a> {
    /// Of every [`BLOCK`] places: the keys as `[keys, dim, BLOCK]`, so that neighbouring places lie side by side, and the
    /// values as `[keys, BLOCK, dim]`. What lies behind the last place may be anything.
    pub(crate) blocks: Vec<(&'a [f32], &'a [f32])>,
}

/// Writes the keys and values of `rows` (`[count, keys · dim]` each) to the places from `place` on, within one block.
pub(crate) fn write_block(
    (keys, values): (&mut [f32], &mut [f32]),
    place: usize,
    rows: (&[f32], &[f32]),
    heads: Heads,
) {
    let columns = heads.key_columns();
    for (nth, (k, v)) in rows.0.chunks_exact(columns).zip(rows.1.chunks_exact(columns)).enumerate() {
        let place = place + nth;
        for (out, k) in keys.iter_mut().skip(place).step_by(BLOCK).zip(k) {
            *out = *k;
        }
        for (out, v) in values.chunks_exact_mut(BLOCK * heads.dim).zip(v.chunks_exact(heads.dim)) {
            out[place * heads.dim..(place + 1) * heads.dim].copy_from_slice(v);
        }
    }
}

/// A span's own rows as blocks, for sequences that have no cache.
pub(crate) fn blocks_of(k: &[f32], v: &[f32], heads: Heads) -> Vec<(Vec<f32>, Vec<f32>)> {
    let size = BLOCK * heads.key_columns();
    let rows = k.chunks(size).zip(v.chunks(size));
    rows.map(|rows| {
        let mut block = (vec![0f32; size], vec![0f32; size]);
        write_block((&mut block.0, &mut block.1), 0, rows, heads);
        block
    })
    .collect()
}

/// Attention of `q` (`[rows, queries · dim]`) over each span's past, which holds its own rows too.
pub(crate) fn attend(q: &Tensor, spans: &[Span], pasts: &[Past<'_>], heads: Heads) -> Result<Tensor> {
    let columns = heads.queries * heads.dim;
    let rows = q.dim(0)?;
    let mut out = vec![0f32; rows * columns];
    read(q, |q| {
        let tasks = tasks(q, &mut out, spans, pasts, heads);
        let arch = pulp::Arch::new();
        let work: usize = spans.iter().map(|span| span.len * (span.position + span.len) * columns).sum();
        if work < PARALLEL_WORK {
            for task in tasks {
                arch.dispatch(task);
            }
        } else {
            tasks.into_par_iter().for_each(|task| arch.dispatch(task));
        }
    })?;
    Tensor::from_vec(out, (rows, columns), q.device())
}

/// The query vectors of a few rows that share a key head, for every key head and all rows.
fn tasks<'a>(
    q: &'a [f32],
    out: &'a mut [f32],
    spans: &[Span],
    pasts: &'a [Past<'a>],
    heads: Heads,
) -> Vec<Task<'a>> {
    let columns = heads.queries * heads.dim;
    let sharing = heads.queries / heads.keys;
    let rows_together = (TOGETHER / sharing).max(1);
    let mut tasks = Vec::new();
    let mut rows = q.chunks_exact(columns).zip(out.chunks_exact_mut(columns));
    for (span, past) in spans.iter().zip(pasts) {
        for row in 0..span.len {
            let Some((q, out)) = rows.next() else { return tasks };
            if row % rows_together == 0 {
                let empty = |head| Task { past, head, dim: heads.dim, vectors: Vec::new() };
                tasks.extend((0..heads.keys).map(empty));
            }
            let first = tasks.len() - heads.keys;
            let vectors = q.chunks_exact(heads.dim).zip(out.chunks_exact_mut(heads.dim));
            for (head, (query, out)) in vectors.enumerate() {
                let vector = Vector { query, seen: heads.seen(span.position + row), out };
                tasks[first + head / sharing].vectors.push(vector);
            }
        }
    }
    tasks
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use candle_core::Device;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    /// Attention by its definition, in f64, of one query vector over these rows of one key head.
    fn by_definition(
        query: &[f32],
        rows: (&[f32], &[f32]),
        head: usize,
        heads: Heads,
        seen: Range<usize>,
    ) -> Vec<f64> {
        let columns = heads.key_columns();
        let at =
            |rows: &[f32], place: usize, d: usize| f64::from(rows[place * columns + head * heads.dim + d]);
        let score = |place: usize| -> f64 {
            (0..heads.dim).map(|d| f64::from(query[d]) * at(rows.0, place, d)).sum::<f64>()
                * f64::from(heads.scale())
        };
        let weights: Vec<f64> = seen.clone().map(|place| score(place).exp()).collect();
        let total: f64 = weights.iter().sum();
        (0..heads.dim)
            .map(|d| {
                seen.clone().zip(&weights).map(|(place, weight)| weight / total * at(rows.1, place, d)).sum()
            })
            .collect()
    }

    #[track_caller]
    fn check(heads: Heads, spans: &[Span]) {
        let mut rng = StdRng::seed_from_u64(3);
        let mut random =
            |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random::<f32>() * 4.0 - 2.0).collect() };
        let rows: usize = spans.iter().map(|span| span.len).sum();
        let columns = heads.queries * heads.dim;
        let q = random(rows * columns);
        let seen: Vec<(Vec<f32>, Vec<f32>)> = spans
            .iter()
            .map(|span| (span.position + span.len) * heads.key_columns())
            .map(|count| (random(count), random(count)))
            .collect();
        let blocks: Vec<_> = seen.iter().map(|(k, v)| blocks_of(k, v, heads)).collect();
        let pasts: Vec<Past<'_>> = blocks
            .iter()
            .map(|blocks| Past { blocks: blocks.iter().map(|(k, v)| (&k[..], &v[..])).collect() })
            .collect();
        let found =
            attend(&Tensor::from_slice(&q, (rows, columns), &Device::Cpu).unwrap(), spans, &pasts, heads);
        let found: Vec<Vec<f32>> = found.unwrap().to_vec2().unwrap();
        for (span, (k, v)) in spans.iter().zip(&seen) {
            for row in 0..span.len {
                for head in 0..heads.queries {
                    let at = head * heads.dim..(head + 1) * heads.dim;
                    let query = &q[(span.start + row) * columns..][at.clone()];
                    let key_head = head * heads.keys / heads.queries;
                    let seen = heads.seen(span.position + row);
                    let expected = by_definition(query, (k, v), key_head, heads, seen);
                    for (found, expected) in found[span.start + row][at].iter().zip(expected) {
                        assert!(
                            (f64::from(*found) - expected).abs() < 2e-5,
                            "{heads:?}: {found} but {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn attention_is_that_of_its_definition() {
        let spans = [
            Span { start: 0, len: 1, position: 0 },
            Span { start: 1, len: 70, position: 0 },
            Span { start: 71, len: 5, position: 60 },
            Span { start: 76, len: 1, position: 31 },
        ];
        for (queries, keys, dim) in [(9, 3, 64), (4, 4, 80), (14, 2, 16), (2, 1, 6), (8, 8, 128)] {
            for window in [None, Some(1), Some(40)] {
                check(Heads { queries, keys, dim, window }, &spans);
            }
        }
    }
}
