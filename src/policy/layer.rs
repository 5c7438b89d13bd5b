//! A layer's weights, and its linears with the adapters' low-rank updates.

use candle_core::{Result, Tensor};

use super::{
    architecture::Target,
    batch::Adapted,
    linear::Linear,
    ops::{Onto, product},
    packed::{Packed, Update},
};

/// One block. Each linear is `[out, in]`.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Tensor,
    pub(crate) mlp_norm: Tensor,
    /// In the order of [`Target::ALL`].
    pub(crate) linears: [Linear; 7],
    /// Of query, key and value, in families that have them: `[out]`.
    pub(crate) biases: Option<[Tensor; 3]>,
    /// Of each head's query and key, in families that have them: `[head_dim]`.
    pub(crate) head_norms: Option<[Tensor; 2]>,
}

impl Layer {
    /// The products of some linears with one input, adapters applied; appends to `low_rank` the last adapter's low-rank middle
    /// `scale · x Aᵀ` for each of them, which the backward pass needs.
    pub(crate) fn project<const N: usize>(
        &self,
        targets: [Target; N],
        x: &Tensor,
        adapted: &Adapted,
        layer: usize,
        low_rank: &mut Vec<Option<Tensor>>,
    ) -> Result<[Tensor; N]> {
        let linears = targets.map(|target| &self.linears[target as usize]);
        let mut products = match Linear::packed(linears) {
            Some(packed) => project_packed((packed, targets), x, adapted, layer, low_rank)?,
            None => {
                let mut products = Linear::forward_all(linears, x)?;
                for (y, target) in products.iter_mut().zip(targets) {
                    let (changed, middle) = add_adapted(y, x, adapted, layer, target)?;
                    *y = changed;
                    low_rank.push(middle);
                }
                products
            }
        };
        for (y, target) in products.iter_mut().zip(targets) {
            if let Some(bias) = self.biases.as_ref().and_then(|biases| biases.get(target as usize)) {
                *y = y.broadcast_add(bias)?;
            }
        }
        Ok(products)
    }
}

/// The update goes into the sums of the products themselves.
fn project_packed<const N: usize>(
    (packed, targets): ([&Packed; N], [Target; N]),
    x: &Tensor,
    adapted: &Adapted,
    layer: usize,
    low_rank: &mut Vec<Option<Tensor>>,
) -> Result<[Tensor; N]> {
    let mut updates = Vec::with_capacity(adapted.len());
    for (rows, adapter) in adapted {
        let pairs = targets.iter().filter_map(|target| adapter.pair(layer, *target));
        let pairs = pairs.map(|pair| pair.lanes(adapter.scale())).collect::<Result<Vec<_>>>()?;
        if pairs.len() == N {
            updates.push(Update { rows: rows.clone(), pairs });
        }
    }
    let (products, middles) = Packed::updated(&packed, x, &updates)?;
    let mut middles = middles.into_iter();
    low_rank.extend(std::iter::repeat_with(|| middles.next()).take(N));
    products.try_into().map_err(|_| candle_core::Error::Msg("as many products as matrices".to_owned()))
}

/// `y = x Wᵀ` with each adapter's `scale · (x Aᵀ) Bᵀ` added to its rows.
///
/// Returns the low-rank middle `scale · x Aᵀ` of the last adapter too, which the backward pass needs.
fn add_adapted(
    y: &Tensor,
    x: &Tensor,
    adapted: &Adapted,
    layer: usize,
    target: Target,
) -> Result<(Tensor, Option<Tensor>)> {
    let rows = y.dim(0)?;
    let mut pieces: Vec<Tensor> = Vec::new();
    let mut done = 0;
    let mut inner = None;
    for (range, adapter) in adapted {
        let Some(pair) = adapter.pair(layer, target) else { continue };
        let whole = range.len() == rows;
        let (x, y_rows) = if whole {
            (x.clone(), y.clone())
        } else {
            (x.narrow(0, range.start, range.len())?, y.narrow(0, range.start, range.len())?)
        };
        let [a, b] = pair.beside(&x)?;
        let middle = product(&x, &a.t()?, adapter.scale(), Onto::New(x.dtype()))?;
        let changed = product(&middle, &b.t()?, 1.0, Onto::This(y_rows))?;
        inner = Some(middle);
        if range.start > done {
            pieces.push(y.narrow(0, done, range.start - done)?);
        }
        done = range.end;
        pieces.push(changed);
    }
    if pieces.is_empty() {
        return Ok((y.clone(), inner));
    }
    if done < rows {
        pieces.push(y.narrow(0, done, rows - done)?);
    }
    let y = if pieces.len() == 1 { pieces.swap_remove(0) } else { Tensor::cat(&pieces, 0)? };
    Ok((y, inner))
}
