//! A layer's weights, and its linears with the adapters' low-rank updates.

use candle_core::{Result, Tensor};

use super::{
    architecture::Target,
    batch::Adapted,
    linear::Linear,
    ops::{Onto, add_to_rows, columns, product},
    packed::{Packed, Update},
};

/// One block. Each linear is `[out, in]`.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Tensor,
    pub(crate) mlp_norm: Tensor,
    /// In the order of [`Target::ALL`].
    pub(crate) linears: [Linear; 7],
    /// Of what these are rows of, beside the CPU's own form: query, key and value, and gate and up.
    pub(crate) joined: Option<[Tensor; 2]>,
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
                let mut products = self.products(targets, x)?;
                add_adapted((&mut products, targets), x, adapted, layer, low_rank)?;
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

    /// Of the base alone.
    fn products<const N: usize>(&self, targets: [Target; N], x: &Tensor) -> Result<[Tensor; N]> {
        let Some(joined) = self.joined(&targets) else {
            return Linear::forward_all(targets.map(|target| &self.linears[target as usize]), x);
        };
        let all = product(x, &joined.t()?, 1.0, Onto::New(x.dtype()))?;
        columns(&all, targets.map(|target| self.linears[target as usize].dims()[0]))
    }

    /// The weights of linears that share an input, one below the other, if they lie so.
    pub(crate) fn joined(&self, targets: &[Target]) -> Option<&Tensor> {
        let at = [Target::Query, Target::Gate].iter().position(|first| targets.first() == Some(first))?;
        self.joined.as_ref().filter(|_| targets.len() > 1).map(|joined| &joined[at])
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

/// Adds each adapter's `scale · (x Aᵀ) Bᵀ` to its rows of the products; appends the low-rank middles of the last one.
fn add_adapted<const N: usize>(
    (products, targets): (&mut [Tensor; N], [Target; N]),
    x: &Tensor,
    adapted: &Adapted,
    layer: usize,
    low_rank: &mut Vec<Option<Tensor>>,
) -> Result<()> {
    let mut middles = [const { None }; N];
    for (rows, adapter) in adapted {
        let x = if rows.len() == x.dim(0)? { x.clone() } else { x.narrow(0, rows.start, rows.len())? };
        let Some(stack) = adapter.beside(layer, &targets, &x)? else { continue };
        let all = product(&x, &stack.a.t()?, adapter.scale(), Onto::New(x.dtype()))?;
        for (nth, (y, b)) in products.iter_mut().zip(&stack.bs).enumerate() {
            let middle = all.narrow(1, nth * adapter.rank, adapter.rank)?;
            *y = add_to_rows(y, rows.clone(), &middle, &b.t()?)?;
            middles[nth] = Some(middle);
        }
    }
    low_rank.extend(middles);
    Ok(())
}
