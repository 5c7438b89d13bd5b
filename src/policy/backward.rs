//! The backward pass through the decoder, written out by hand.
//!
//! candle's autograd computes the gradient of both sides of a matrix product, also of a frozen weight, and keeps every
//! intermediate of the graph. Here the base is frozen by construction: a linear's backward is `dx = dy W` and the two
//! low-rank products.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::{
    architecture::Target,
    attention::attend_backward,
    batch::Batch,
    decoder::{Decoder, Places},
    device::on_slices,
    linear::Linear,
    lora::Adapter,
    ops::{Onto, product, products_beside, rms_norm_backward, swiglu_backward},
    tape::{LayerTape, PartTape, Tape},
};

/// The gradient of a loss with respect to an adapter, summed over micro-batches.
///
/// In f32, wherever it lies. A clone shares the numbers, which are never changed in place.
#[derive(Debug, Default, Clone)]
pub struct AdapterGradient {
    /// `(dA, dB)` of each pair, in the adapter's order; empty before the first backward pass.
    pairs: Vec<Option<(Tensor, Tensor)>>,
    /// `[1, hidden]`, for adapters with a scalar head.
    pub score: Option<Tensor>,
}

impl AdapterGradient {
    /// Adds what other sequences make of the same adapter.
    fn add_all(&mut self, other: Self) -> Result<()> {
        for (at, pair) in other.pairs.into_iter().enumerate() {
            if let Some((da, db)) = pair {
                self.add(at, da, db)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, at: usize, da: Tensor, db: Tensor) -> Result<()> {
        if self.pairs.len() <= at {
            self.pairs.resize_with(at + 1, || None);
        }
        self.pairs[at] = Some(match self.pairs[at].take() {
            Some((a, b)) => ((a + da)?, (b + db)?),
            None => (da, db),
        });
        Ok(())
    }

    /// Adds to the scalar head's gradient.
    pub fn add_score(&mut self, dscore: Tensor) -> Result<()> {
        self.score = Some(match self.score.take() {
            Some(sum) => (sum + dscore)?,
            None => dscore,
        });
        Ok(())
    }

    /// The numbers in the order of [`Adapter::parameters`]; zeros where nothing flowed.
    pub fn flatten(&self, adapter: &Adapter) -> Result<Vec<Vec<f32>>> {
        let mut out = Vec::new();
        for (at, pair) in adapter.pairs().iter().enumerate() {
            match self.pairs.get(at).and_then(Option::as_ref) {
                Some((a, b)) => out.extend([a.flatten_all()?.to_vec1()?, b.flatten_all()?.to_vec1()?]),
                None => out.extend([vec![0.0; pair.a.elem_count()], vec![0.0; pair.b.elem_count()]]),
            }
        }
        if let Some(score) = &adapter.score {
            out.push(match &self.score {
                Some(score) => score.flatten_all()?.to_vec1()?,
                None => vec![0.0; score.elem_count()],
            });
        }
        Ok(out)
    }
}

impl Decoder {
    /// Adds to `gradient` what `dz`, the gradient with respect to the hidden states after the last norm, makes of the
    /// adapter of the tape.
    pub fn backward(&self, tape: &Tape, dz: &Tensor, gradient: &mut AdapterGradient) -> Result<()> {
        let parts = tape.parts.par_iter().map(|part| {
            let mut own = AdapterGradient::default();
            let dz = dz.narrow(0, part.rows.start, part.rows.len())?;
            self.backward_part(part, tape.first_layer, &dz, &mut own)?;
            Ok(own)
        });
        // In the order of the parts, so that the sum is the same every time.
        for own in parts.collect::<Result<Vec<_>>>()? {
            gradient.add_all(own)?;
        }
        Ok(())
    }

    fn backward_part(
        &self,
        part: &PartTape,
        first_layer: usize,
        dz: &Tensor,
        gradient: &mut AdapterGradient,
    ) -> Result<()> {
        let Some((_, adapter)) = part.batch.adapted.first() else { return Ok(()) };
        let places = self.places(&part.batch, None)?;
        let mut dy = rms_norm_backward(dz, &part.last, &self.norm, self.epsilon(), None)?;
        for (at, kept) in part.layers.iter().enumerate().rev() {
            let layer = first_layer + at;
            // Nothing below the first adapted layer is trained, so its input needs no gradient.
            let wants_input = layer > adapter.first_layer;
            let mut pass = LayerPass { decoder: self, layer, kept, adapter, gradient };
            match pass.backward(&dy, &part.batch, &places, wants_input)? {
                Some(dx) => dy = dx,
                None => break,
            }
        }
        Ok(())
    }
}

/// One layer's backward pass.
struct LayerPass<'a> {
    decoder: &'a Decoder,
    layer: usize,
    kept: &'a LayerTape,
    adapter: &'a Adapter,
    gradient: &'a mut AdapterGradient,
}

impl LayerPass<'_> {
    fn backward(
        &mut self,
        dy: &Tensor,
        batch: &Batch,
        places: &Places,
        wants_input: bool,
    ) -> Result<Option<Tensor>> {
        let (decoder, kept) = (self.decoder, self.kept);
        let layer = &decoder.layers[self.layer];
        let epsilon = decoder.epsilon();

        let dactivated = self.through(&[Target::Down], dy, &kept.activated)?;
        let dgate_up = swiglu_backward(&dactivated, &kept.gate, &kept.up)?;
        let dmlp = self.through(&[Target::Gate, Target::Up], &dgate_up, &kept.mlp_normed)?;
        let dmiddle = rms_norm_backward(&dmlp, &kept.middle, &layer.mlp_norm, epsilon, Some(dy))?;

        let dattention = self.through(&[Target::Output], &dmiddle, &kept.attention)?;
        let rows = kept.x.dim(0)?;
        let (dattention, dmiddle) = match decoder.wanted_in(self.layer, places) {
            Some(wanted) => (wanted.scatter(&dattention, rows)?, wanted.scatter(&dmiddle, rows)?),
            None => (dattention, dmiddle),
        };
        let heads = decoder.architecture.attention();
        let qkv = (&kept.q, &kept.k, &kept.v);
        let slopes = match &places.reach {
            Some(reach) => reach.backward(&dattention, qkv, heads)?,
            None => attend_backward(&dattention, qkv, &batch.spans, heads)?.into(),
        };
        let mut dq = places.angles.rotate_backward(slopes.q)?;
        let mut dk = places.angles.rotate_backward(slopes.k)?;
        let dqkv = match (&layer.head_norms, &kept.bare, slopes.whole) {
            // They have been turned where they are.
            (None, _, Some(whole)) => whole,
            (norms, bare, _) => {
                if let (Some([of_q, of_k]), Some((q, k))) = (norms, bare) {
                    dq = head_norm_backward(&dq, q, of_q, epsilon)?;
                    dk = head_norm_backward(&dk, k, of_k, epsilon)?;
                }
                Tensor::cat(&[dq, dk, slopes.v], 1)?
            }
        };
        let targets = [Target::Query, Target::Key, Target::Value];
        if !wants_input {
            return self.pairs(&targets, &dqkv, &kept.normed).map(|_| None);
        }
        let dnormed = self.through(&targets, &dqkv, &kept.normed)?;
        rms_norm_backward(&dnormed, &kept.x, &layer.attention_norm, epsilon, Some(&dmiddle)).map(Some)
    }

    /// From the gradients of linears that read the same `x`, side by side, to that of `x`; their pairs' own are added on
    /// the way.
    fn through(&mut self, targets: &[Target], dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        let dmiddles = self.pairs(targets, dy, x)?;
        if on_slices(dy) {
            return dy.matmul(&self.merged(targets)?);
        }
        let mut dx = Onto::New(dy.dtype());
        match self.decoder.layers[self.layer].joined(targets) {
            Some(joined) => dx = Onto::This(product(dy, joined, 1.0, dx)?),
            None => {
                for (target, dy) in self.side_by_side(targets, dy)? {
                    dx = Onto::This(self.weight(target).backward(&dy, dx)?);
                }
            }
        }
        // In bf16 a weight with a small update in it is the weight again: the update's share is added apart.
        match (dx, dmiddles, self.adapter.beside(self.layer, targets, dy)?) {
            (dx, Some(dmiddles), Some(stack)) => product(&dmiddles, &stack.a, 1.0, dx),
            (Onto::This(dx), _, _) => Ok(dx),
            (Onto::New(_), _, _) => candle_core::bail!("no linears"),
        }
    }

    /// Each linear's columns of gradients that lie side by side.
    fn side_by_side(&self, targets: &[Target], dy: &Tensor) -> Result<Vec<(Target, Tensor)>> {
        let mut column = 0;
        let each = targets.iter().map(|target| {
            let (out, _) = self.decoder.architecture.linear(*target);
            let own = dy.narrow(1, column, out)?;
            column += out;
            Ok((*target, own))
        });
        each.collect()
    }

    /// Adds the gradients of the linears' pairs, `dA = scale · (dy B)ᵀ x` and `dB = dyᵀ (scale · x Aᵀ)`. Returns
    /// `scale · dy B`, side by side, if they have pairs.
    fn pairs(&mut self, targets: &[Target], dy: &Tensor, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(bs) = self.bs(targets, dy)? else { return Ok(None) };
        let each = self.side_by_side(targets, dy)?;
        let pairs: Vec<(Tensor, Tensor)> = each.iter().map(|(_, dy)| dy.clone()).zip(bs).collect();
        let dmiddles = products_beside(&pairs, self.adapter.scale())?;
        // The input is read once for all of them.
        let das = product(&dmiddles.t()?, x, 1.0, Onto::New(DType::F32))?;
        let rank = self.adapter.rank;
        for (nth, (target, dy)) in each.iter().enumerate() {
            let (Some(at), Some(middle)) =
                (self.adapter.index(self.layer, *target), &self.kept.low_rank[*target as usize])
            else {
                continue;
            };
            let db = product(&dy.t()?, middle, 1.0, Onto::New(DType::F32))?;
            self.gradient.add(at, das.narrow(0, nth * rank, rank)?, db)?;
        }
        Ok(Some(dmiddles))
    }

    /// The pairs' `B` beside `dy`.
    fn bs(&self, targets: &[Target], dy: &Tensor) -> Result<Option<Vec<Tensor>>> {
        if !on_slices(dy) {
            return Ok(self.adapter.beside(self.layer, targets, dy)?.map(|stack| stack.bs));
        }
        let pairs = targets.iter().map(|target| self.adapter.pair(self.layer, *target));
        Ok(pairs.map(|pair| pair.map(|pair| pair.b.clone())).collect())
    }

    /// The linears' weights one below the other, the adapter's update in them: `W + scale · B A`, `[Σ out, in]`.
    ///
    /// They are unpacked anyway, and with the update in them it costs nothing for each row of the batch.
    fn merged(&self, targets: &[Target]) -> Result<Tensor> {
        let sizes = targets.iter().map(|target| self.decoder.architecture.linear(*target));
        let (out, input) = sizes.fold((0, 0), |(rows, _), (out, input)| (rows + out, input));
        let mut merged = vec![0f32; out * input];
        let mut rest = &mut merged[..];
        for target in targets {
            let weight = self.weight(*target);
            let (rows, below) = rest.split_at_mut(weight.dims().iter().product());
            rest = below;
            let pair = self.adapter.pair(self.layer, *target);
            weight.unpack(rows, pair.map(|pair| (pair, self.adapter.scale())))?;
        }
        Tensor::from_vec(merged, (out, input), &Device::Cpu)
    }

    fn weight(&self, target: Target) -> &Linear {
        &self.decoder.layers[self.layer].linears[target as usize]
    }
}

fn head_norm_backward(dy: &Tensor, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    let heads = ((), weight.dim(0)?);
    rms_norm_backward(&dy.reshape(heads)?, &x.reshape(heads)?, weight, epsilon, None)?.reshape(dy.shape())
}
