//! Attention as tensor operations, for every device and type.
//!
//! Sequences of about the same length are taken together, filled up to the longest of them; what fills up is not seen.
//! Which rows and places those are is the same in all layers, and is written down once a pass.

use std::collections::BTreeMap;

use candle_core::{D, Device, Result, Tensor};

use crate::policy::ops::tensors::{product, widened};
use crate::policy::{architecture::Heads, batch::Span};

/// Scores that are held at a time: 256 MB of f32.
const SCORES: usize = 1 << 26;

/// Which places the rows of a pass see, and where these lie.
#[derive(Debug)]
pub(super) struct Sight {
    groups: Vec<Group>,
    /// Where the batch's rows are among those of the groups: `[rows]`.
    rows: Tensor,
}

/// Sequences that are taken together: `[count]` of them, each with so many rows and places.
#[derive(Debug)]
struct Group {
    count: usize,
    rows: usize,
    places: usize,
    /// Key heads that are taken together.
    heads: usize,
    /// The rows' numbers in the batch, `[count · rows]`.
    batch_rows: Tensor,
    /// Where keys and values lie, `[count · places]`.
    locations: Tensor,
    /// 0 where a row sees a place and −∞ where not, `[count, 1, 1, rows, places]`.
    mask: Tensor,
    /// 1 for rows and 0 for what fills up, `[count, 1, 1, rows, 1]`; unset where nothing does.
    filled: Option<Tensor>,
}

impl Sight {
    pub(super) fn new(
        spans: &[Span],
        heads: Heads,
        device: &Device,
        location: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self> {
        let mut alike: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
        for (nth, span) in spans.iter().enumerate().filter(|(_, span)| span.len > 0) {
            let size = (span.len.next_power_of_two(), (span.position + span.len).next_power_of_two());
            alike.entry(size).or_default().push(nth);
        }
        let mut groups = Vec::new();
        let mut rows = vec![0u32; spans.iter().map(|span| span.len).sum()];
        let mut before = 0;
        for ((rows_most, places_most), members) in alike {
            let together = (SCORES / (heads.queries * rows_most * places_most)).max(1);
            for members in members.chunks(together) {
                let group = Group::new(spans, members, heads, device, location)?;
                for (at, nth) in members.iter().enumerate() {
                    let Span { start, len, .. } = spans[*nth];
                    for (row, place) in rows[start..start + len].iter_mut().enumerate() {
                        *place = (before + at * group.rows + row) as u32;
                    }
                }
                // Whoever reads `rows` counts over all groups.
                before += group.count * group.rows;
                groups.push(group);
            }
        }
        Ok(Self { groups, rows: Tensor::new(rows, device)? })
    }

    /// [`super::attend`].
    pub(super) fn attend(&self, (q, k, v): (&Tensor, &Tensor, &Tensor), heads: Heads) -> Result<Tensor> {
        let mut out = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let (q, k, v) = group.operands((q, k, v), heads)?;
            let parts = group.by_heads(heads, |at| {
                let (k, v) = (at.of(&k)?, at.of(&v)?);
                let weights = group.weights(&at.of(&q)?, &k, heads)?;
                weights.to_dtype(v.dtype())?.matmul(&v)
            })?;
            out.push(group.rows_of(&Tensor::cat(&parts, 1)?, heads)?);
        }
        Tensor::cat(&out, 0)?.index_select(&self.rows, 0)
    }

    /// [`super::attend_backward`], for whole sequences.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        heads: Heads,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
        for group in &self.groups {
            let (q, k, v) = group.operands((q, k, v), heads)?;
            let dy = group.queries(dy, heads)?;
            let dy =
                group.filled.as_ref().map_or_else(|| Ok(dy.clone()), |filled| group.kept(&dy, filled))?;
            let parts = group.by_heads(heads, |at| {
                group.backward(&at.of(&dy)?, (&at.of(&q)?, &at.of(&k)?, &at.of(&v)?), heads)
            })?;
            let side =
                |of: fn(&[Tensor; 3]) -> &Tensor| Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 1);
            dq.push(group.rows_of(&side(|part| &part[0])?, heads)?);
            dk.push(by_place(&side(|part| &part[1])?)?);
            dv.push(by_place(&side(|part| &part[2])?)?);
        }
        // A whole sequence has as many places as rows, in the same order.
        let rows = |all: &[Tensor]| Tensor::cat(all, 0)?.index_select(&self.rows, 0);
        Ok((rows(&dq)?, rows(&dk)?, rows(&dv)?))
    }
}

/// Some key heads of all.
struct Part {
    first: usize,
    count: usize,
}

impl Part {
    fn of(&self, x: &Tensor) -> Result<Tensor> {
        x.narrow(1, self.first, self.count)?.contiguous()
    }
}

impl Group {
    fn new(
        spans: &[Span],
        members: &[usize],
        heads: Heads,
        device: &Device,
        location: &dyn Fn(usize, usize) -> usize,
    ) -> Result<Self> {
        let most = |of: fn(&Span) -> usize| members.iter().map(|nth| of(&spans[*nth])).max().unwrap_or(0);
        let (count, rows) = (members.len(), most(|span| span.len));
        let places = most(|span| span.position + span.len);
        let (mut batch_rows, mut locations) = (Vec::new(), Vec::new());
        let mut mask = vec![f32::NEG_INFINITY; count * rows * places];
        let mut filled = Vec::with_capacity(count * rows);
        for (at, nth) in members.iter().enumerate() {
            let Span { start, len, position } = spans[*nth];
            // A sequence's own first row and place fill it up: nothing of another's may reach it, not even times 0.
            batch_rows.extend((0..rows).map(|row| (start + if row < len { row } else { 0 }) as u32));
            let seen = position + len;
            locations
                .extend((0..places).map(|place| location(*nth, if place < seen { place } else { 0 }) as u32));
            for row in 0..rows {
                filled.push(f32::from(u8::from(row < len)));
                let sees = heads.seen(position + row.min(len - 1));
                let from = (at * rows + row) * places;
                mask[from + sees.start..from + sees.end].fill(0.0);
            }
        }
        let is_full = filled.iter().all(|filled| *filled == 1.0);
        let filled = (!is_full).then(|| Tensor::from_vec(filled, (count, 1, 1, rows, 1), device));
        Ok(Self {
            count,
            rows,
            places,
            heads: (SCORES * heads.keys / (heads.queries * rows * places * count)).clamp(1, heads.keys),
            batch_rows: Tensor::new(batch_rows, device)?,
            locations: Tensor::new(locations, device)?,
            mask: Tensor::from_vec(mask, (count, 1, 1, rows, places), device)?,
            filled: filled.transpose()?,
        })
    }

    /// What `compute` makes of all key heads, some at a time.
    fn by_heads<T>(&self, heads: Heads, compute: impl Fn(&Part) -> Result<T>) -> Result<Vec<T>> {
        let firsts = (0..heads.keys).step_by(self.heads);
        firsts.map(|first| compute(&Part { first, count: self.heads.min(heads.keys - first) })).collect()
    }

    fn operands(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        heads: Heads,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let places = |x: &Tensor| {
            let picked = x.contiguous()?.index_select(&self.locations, 0)?;
            picked.reshape((self.count, self.places, heads.keys, heads.dim))?.transpose(1, 2)?.contiguous()
        };
        Ok((self.queries(q, heads)?, places(k)?, places(v)?))
    }

    /// Rows of queries as `[count, keys, group · rows, dim]`: heads that share a key head lie below one another.
    fn queries(&self, x: &Tensor, heads: Heads) -> Result<Tensor> {
        let sharing = heads.queries / heads.keys;
        let picked = x.index_select(&self.batch_rows, 0)?;
        let apart = picked.reshape(&[self.count, self.rows, heads.keys, sharing, heads.dim][..])?;
        let together = apart.permute(vec![0, 2, 3, 1, 4])?.contiguous()?;
        together.reshape((self.count, heads.keys, sharing * self.rows, heads.dim))
    }

    /// The inverse of [`Group::queries`]: `[count · rows, queries · dim]`.
    fn rows_of(&self, x: &Tensor, heads: Heads) -> Result<Tensor> {
        let sharing = heads.queries / heads.keys;
        let apart = x.reshape(&[self.count, heads.keys, sharing, self.rows, heads.dim][..])?;
        let together = apart.permute(vec![0, 3, 1, 2, 4])?.contiguous()?;
        together.reshape((self.count * self.rows, heads.queries * heads.dim))
    }

    /// Rows of queries without what fills up.
    fn kept(&self, x: &Tensor, filled: &Tensor) -> Result<Tensor> {
        self.by_row(x)?.broadcast_mul(&filled.to_dtype(x.dtype())?)?.reshape(x.shape())
    }

    /// `[count, keys, group · rows, …]` as `[count, keys, group, rows, …]`.
    fn by_row(&self, x: &Tensor) -> Result<Tensor> {
        let (count, keys, below, last) = x.dims4()?;
        x.reshape(&[count, keys, below / self.rows, self.rows, last][..])
    }

    /// The attention's weights, summing to 1 over the places that a row sees and 0 elsewhere.
    fn weights(&self, q: &Tensor, k: &Tensor, heads: Heads) -> Result<Tensor> {
        let scores = (widened(&product(q, &k.t()?)?)? * f64::from(heads.scale()))?;
        let mask = self.mask.to_dtype(scores.dtype())?;
        let scores = self.by_row(&scores)?.broadcast_add(&mask)?.reshape(scores.shape())?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)
    }

    /// The gradients of queries, keys and values, the weights computed again.
    fn backward(
        &self,
        dy: &Tensor,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        heads: Heads,
    ) -> Result<[Tensor; 3]> {
        let (dtype, weights) = (q.dtype(), self.weights(q, k, heads)?);
        let dweights = widened(&product(dy, &v.t()?)?)?;
        let mean = (&weights * &dweights)?.sum_keepdim(D::Minus1)?;
        let dscores = ((&weights * dweights.broadcast_sub(&mean)?)? * f64::from(heads.scale()))?;
        let (weights, dscores) = (weights.to_dtype(dtype)?, dscores.to_dtype(dtype)?);
        Ok([product(&dscores, k)?, product(&dscores.t()?, q)?, product(&weights.t()?, dy)?])
    }
}

/// `[count, keys, places, dim]` as `[count · places, keys · dim]`.
fn by_place(x: &Tensor) -> Result<Tensor> {
    let (count, keys, places, dim) = x.dims4()?;
    x.transpose(1, 2)?.contiguous()?.reshape((count * places, keys * dim))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::DType;

    use super::*;
    use crate::policy::{
        attention::{Past, Reach, Store, attend, attend_backward, blocks_of},
        device::Placement,
        ops::{tensors::tests::gap, tests::matrix},
    };

    fn f64s(x: &Tensor) -> Tensor {
        x.to_dtype(DType::F64).unwrap()
    }

    /// Whole sequences, forward and backward, against slices.
    #[track_caller]
    fn check_fresh(heads: Heads, lens: &[usize]) {
        let mut spans: Vec<Span> = Vec::new();
        for len in lens {
            let start = spans.last().map_or(0, |span| span.start + span.len);
            spans.push(Span { start, len: *len, position: 0 });
        }
        let rows = lens.iter().sum();
        let q = matrix(rows, heads.queries * heads.dim, 1);
        let (k, v) = (matrix(rows, heads.keys * heads.dim, 2), matrix(rows, heads.keys * heads.dim, 3));
        let dy = matrix(rows, heads.queries * heads.dim, 4);
        let own = |x: &Tensor, span: &Span| {
            x.narrow(0, span.start, span.len).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let blocks: Vec<_> =
            spans.iter().map(|span| blocks_of(&own(&k, span), &own(&v, span), heads)).collect();
        let pasts: Vec<Past<'_>> = blocks
            .iter()
            .map(|blocks| Past { blocks: blocks.iter().map(|(k, v)| (&k[..], &v[..])).collect() })
            .collect();
        let expected = attend(&q, &spans, &pasts, heads).unwrap();
        let reach = Reach::fresh(&spans, heads, &Device::Cpu).unwrap();
        let wide = [f64s(&q), f64s(&k), f64s(&v)];
        let found = reach.attend(0, (&wide[0], &wide[1], &wide[2]), heads).unwrap();
        assert!(gap(&found, &expected) < 1e-5, "{heads:?}: {}", gap(&found, &expected));
        let expected = attend_backward(&dy, (&q, &k, &v), &spans, heads).unwrap();
        let found = reach.backward(&f64s(&dy), (&wide[0], &wide[1], &wide[2]), heads).unwrap();
        for (found, expected) in [(&found.q, &expected.0), (&found.k, &expected.1), (&found.v, &expected.2)] {
            assert!(gap(found, expected) < 2e-5, "{heads:?}: {}", gap(found, expected));
        }
    }

    #[test]
    fn whole_sequences_attend_as_on_slices() {
        for (queries, keys, dim) in [(9, 3, 16), (4, 4, 8), (2, 1, 6)] {
            for window in [None, Some(1), Some(20)] {
                check_fresh(Heads { queries, keys, dim, window }, &[1, 40, 33, 1, 64, 7, 5, 6]);
            }
        }
    }

    /// Sequences that go on from what a store holds, its places in any order, against slices.
    #[test]
    fn stored_places_are_seen_as_on_slices() {
        let spans = [
            Span { start: 0, len: 1, position: 40 },
            Span { start: 1, len: 5, position: 33 },
            Span { start: 6, len: 1, position: 36 },
            Span { start: 7, len: 9, position: 0 },
            Span { start: 16, len: 1, position: 7 },
        ];
        for window in [None, Some(10)] {
            let heads = Heads { queries: 6, keys: 2, dim: 8, window };
            let columns = heads.keys * heads.dim;
            let placement = Placement { device: Device::Cpu, dtype: DType::F64 };
            let store = Arc::new(Store::new(1, 256, columns, &placement).unwrap());
            let location = |nth: usize, place: usize| (nth * 48 + place) * 37 % 256;
            let seen: Vec<(Tensor, Tensor)> = spans
                .iter()
                .enumerate()
                .map(|(nth, span)| {
                    let seed = nth as u32 * 2 + 10;
                    let count = span.position + span.len;
                    (matrix(count, columns, seed), matrix(count, columns, seed + 1))
                })
                .collect();
            for (nth, (span, (k, v))) in spans.iter().zip(&seen).enumerate() {
                if span.position > 0 {
                    let locations = (0..span.position).map(|place| location(nth, place) as u32);
                    let locations = Tensor::from_iter(locations, &Device::Cpu).unwrap();
                    let first = |x: &Tensor| f64s(&x.narrow(0, 0, span.position).unwrap());
                    store.write(0, &locations, (&first(k), &first(v))).unwrap();
                }
            }
            let fresh = |of: fn(&(Tensor, Tensor)) -> &Tensor| {
                let rows = spans.iter().zip(&seen);
                let rows = rows.map(|(span, seen)| of(seen).narrow(0, span.position, span.len).unwrap());
                Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap()
            };
            let q = matrix(17, heads.queries * heads.dim, 5);
            let (k, v) = (f64s(&fresh(|seen| &seen.0)), f64s(&fresh(|seen| &seen.1)));
            let reach = Reach::stored(&spans, heads, &store, &location).unwrap();
            let found = reach.attend(0, (&f64s(&q), &k, &v), heads).unwrap();
            let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let blocks: Vec<_> = seen.iter().map(|(k, v)| blocks_of(&flat(k), &flat(v), heads)).collect();
            let pasts: Vec<Past<'_>> = blocks
                .iter()
                .map(|blocks| Past { blocks: blocks.iter().map(|(k, v)| (&k[..], &v[..])).collect() })
                .collect();
            let expected = attend(&q, &spans, &pasts, heads).unwrap();
            assert!(gap(&found, &expected) < 1e-5, "{}", gap(&found, &expected));
        }
    }
}
