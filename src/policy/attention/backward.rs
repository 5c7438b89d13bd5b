//! The gradients of attention, as products of matrices.

use candle_core::{Result, Tensor};

use crate::policy::ops::{dot, exp, for_each_row, read};
use crate::policy::{architecture::Heads, batch::Span};

/// Query rows whose weights are held at a time. Places after a tile's last row are never computed.
const TILE: usize = 128;

/// The gradients of [`super::attend`] with respect to `q`, `k` and `v`, for spans that see no more than their own rows.
///
/// The weights are computed again rather than kept: `rows²` of them per head would be the largest thing on the tape.
pub(crate) fn attend_backward(
    dy: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    spans: &[Span],
    heads: Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
    for span in spans {
        let (keys, values) = (by_key_head(k, *span, heads)?, by_key_head(v, *span, heads)?);
        let mut sums: Option<(Tensor, Tensor)> = None;
        for start in (0..span.len).step_by(TILE) {
            let end = span.len.min(start + TILE);
            let tile = Span { start: span.start + start, len: end - start, position: start };
            let seen = (keys.narrow(1, 0, end)?.contiguous()?, values.narrow(1, 0, end)?.contiguous()?);
            let of_tile = tile_backward(
                &by_query_head(dy, tile, heads)?,
                &by_query_head(q, tile, heads)?,
                &seen,
                tile,
                heads,
            )?;
            dq.push(rows_of(&of_tile.dq, heads)?);
            sums = Some(match sums {
                Some((k, v)) => (longer(&k, &of_tile.dk)?, longer(&v, &of_tile.dv)?),
                None => (of_tile.dk, of_tile.dv),
            });
        }
        if let Some((k, v)) = sums {
            let rows = |x: &Tensor| x.transpose(0, 1)?.contiguous()?.reshape((span.len, heads.key_columns()));
            dk.push(rows(&k)?);
            dv.push(rows(&v)?);
        }
    }
    Ok((Tensor::cat(&dq, 0)?, Tensor::cat(&dk, 0)?, Tensor::cat(&dv, 0)?))
}

/// Gradients of a tile's queries, and what they add to those of all places up to the tile's end.
struct OfTile {
    /// `[keys, group · rows, dim]`.
    dq: Tensor,
    /// `[keys, places, dim]`.
    dk: Tensor,
    dv: Tensor,
}

/// `dy` and `q` are `[keys, group · rows, dim]`, keys and values `[keys, places, dim]`.
fn tile_backward(
    dy: &Tensor,
    q: &Tensor,
    (k, v): &(Tensor, Tensor),
    tile: Span,
    heads: Heads,
) -> Result<OfTile> {
    let (scores, dweights) = (q.matmul(&k.t()?)?, dy.matmul(&v.t()?)?);
    let (weights, dscores) = softmax_backward(&scores, &dweights, tile, heads)?;
    Ok(OfTile { dq: dscores.matmul(k)?, dk: dscores.t()?.matmul(q)?, dv: weights.t()?.matmul(dy)? })
}

/// The attention's weights, and the gradient with respect to the unscaled scores; both 0 where a row does not see.
fn softmax_backward(
    scores: &Tensor,
    dweights: &Tensor,
    tile: Span,
    heads: Heads,
) -> Result<(Tensor, Tensor)> {
    let (batches, rows, places) = scores.dims3()?;
    let mut both = vec![0f32; batches * rows * 2 * places];
    read(scores, |scores| {
        read(dweights, |dweights| {
            for_each_row(
                &mut both,
                2 * places,
                #[inline(always)]
                |row, both| {
                    let seen = heads.seen(tile.position + row % tile.len);
                    let at = row * places + seen.start..row * places + seen.end;
                    let (weights, dscores) = both.split_at_mut(places);
                    let (weights, dscores) = (&mut weights[seen.clone()], &mut dscores[seen]);
                    softmax_row(&scores[at.clone()], &dweights[at], heads.scale(), weights, dscores);
                },
            );
        })
    })??;
    let both = Tensor::from_vec(both, (batches, rows, 2 * places), scores.device())?;
    Ok((both.narrow(2, 0, places)?, both.narrow(2, places, places)?))
}

#[inline(always)]
fn softmax_row(scores: &[f32], dweights: &[f32], scale: f32, weights: &mut [f32], dscores: &mut [f32]) {
    let most = scores.iter().fold(f32::NEG_INFINITY, |most, score| most.max(*score));
    for (weight, score) in weights.iter_mut().zip(scores) {
        *weight = exp((score - most) * scale);
    }
    let total = 1.0 / weights.iter().sum::<f32>();
    for weight in &mut *weights {
        *weight *= total;
    }
    let mean = dot(weights, dweights);
    for ((dscore, weight), dweight) in dscores.iter_mut().zip(&*weights).zip(dweights) {
        *dscore = weight * (dweight - mean) * scale;
    }
}

/// A span's rows of keys or values as `[keys, rows, dim]`.
fn by_key_head(x: &Tensor, span: Span, heads: Heads) -> Result<Tensor> {
    x.narrow(0, span.start, span.len)?
        .reshape((span.len, heads.keys, heads.dim))?
        .transpose(0, 1)?
        .contiguous()
}

/// A span's query rows as `[keys, group · rows, dim]`: heads that share a key head lie below one another, so that their
/// gradients with respect to it are summed by the product.
fn by_query_head(x: &Tensor, span: Span, heads: Heads) -> Result<Tensor> {
    let group = heads.queries / heads.keys;
    let apart = x.narrow(0, span.start, span.len)?.reshape((span.len, heads.keys, group, heads.dim))?;
    apart.permute((1, 2, 0, 3))?.contiguous()?.reshape((heads.keys, group * span.len, heads.dim))
}

/// The inverse of [`by_query_head`]: `[rows, queries · dim]`.
fn rows_of(x: &Tensor, heads: Heads) -> Result<Tensor> {
    let group = heads.queries / heads.keys;
    let rows = x.dim(1)? / group;
    let apart = x.reshape((heads.keys, group, rows, heads.dim))?.permute((2, 0, 1, 3))?;
    apart.contiguous()?.reshape((rows, heads.queries * heads.dim))
}

/// The sum of two lists of places of which the second goes further.
fn longer(sum: &Tensor, more: &Tensor) -> Result<Tensor> {
    let (places, all) = (sum.dim(1)?, more.dim(1)?);
    let both = (sum + more.narrow(1, 0, places)?)?;
    Tensor::cat(&[both, more.narrow(1, places, all - places)?], 1)
}
