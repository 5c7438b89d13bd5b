//! The backward pass through the decoder, written out by hand.
//!
//! candle's autograd computes the gradient of both sides of a matrix product, also of a frozen weight, and keeps every
//! intermediate of the graph. Here the base is frozen by construction: a linear's backward is `dx = dy W` and the two
//! low-rank products, four flops per parameter and token in all.

use candle_core::{Result, Tensor};

use super::{
    attention::attend_backward,
    decoder::{Batch, Decoder},
    lora::{Adapter, Target},
    ops::{rms_norm_backward, swiglu_backward},
    rope::Angles,
};

/// What one layer keeps of its forward pass; rows as in the batch.
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
    /// `scale · x Aᵀ` of each linear, `[rows, rank]`, in the order of [`Target::ALL`].
    pub(crate) low_rank: Vec<Option<Tensor>>,
}

/// What the layers from `first_layer` on keep of one forward pass.
#[derive(Debug)]
pub struct Tape {
    pub(crate) first_layer: usize,
    pub(crate) layers: Vec<LayerTape>,
    /// The input of the last norm.
    pub(crate) last: Tensor,
    /// The hidden states after it, `[rows, hidden]`.
    pub(crate) hidden: Tensor,
    pub(crate) batch: Batch,
}

/// The gradient of a loss with respect to an adapter, summed over micro-batches.
#[derive(Debug, Default)]
pub struct AdapterGradient {
    /// `(dA, dB)` of each pair, in the adapter's order; empty before the first backward pass.
    pairs: Vec<Option<(Tensor, Tensor)>>,
    /// `[1, hidden]`, for adapters with a scalar head.
    pub score: Option<Tensor>,
}

impl Tape {
    /// The hidden states that the pass ended with, `[rows, hidden]`.
    pub fn hidden(&self) -> &Tensor {
        &self.hidden
    }
}

impl AdapterGradient {
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
        let Some((_, adapter)) = tape.batch.adapted.first() else { return Ok(()) };
        let angles = self.rope.angles(&tape.batch.positions());
        let mut dy = rms_norm_backward(dz, &tape.last, &self.norm, self.epsilon())?;
        for (at, kept) in tape.layers.iter().enumerate().rev() {
            let layer = tape.first_layer + at;
            // Nothing below the first adapted layer is trained, so its input needs no gradient.
            let wants_input = layer > adapter.first_layer;
            let mut pass = LayerPass { decoder: self, layer, kept, adapter, gradient };
            match pass.backward(&dy, &tape.batch, &angles, wants_input)? {
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
        angles: &Angles,
        wants_input: bool,
    ) -> Result<Option<Tensor>> {
        let (decoder, kept) = (self.decoder, self.kept);
        let layer = &decoder.layers[self.layer];
        let epsilon = decoder.epsilon();

        let dactivated = self.linear(dy, &kept.activated, Target::Down)?;
        let (dgate, dup) = swiglu_backward(&dactivated, &kept.gate, &kept.up)?;
        let dgate = self.linear(&dgate, &kept.mlp_normed, Target::Gate)?;
        let dup = self.linear(&dup, &kept.mlp_normed, Target::Up)?;
        let dmlp = rms_norm_backward(&(dgate + dup)?, &kept.middle, &layer.mlp_norm, epsilon)?;
        let dmiddle = (dy + dmlp)?;

        let dattention = self.linear(&dmiddle, &kept.attention, Target::Output)?;
        let heads = decoder.architecture.attention();
        let (dq, dk, dv) = attend_backward(&dattention, (&kept.q, &kept.k, &kept.v), &batch.spans, heads)?;
        let mut dq = angles.rotate_backward(&dq)?;
        let mut dk = angles.rotate_backward(&dk)?;
        if let (Some([of_q, of_k]), Some((q, k))) = (&layer.head_norms, &kept.bare) {
            dq = head_norm_backward(&dq, q, of_q, epsilon)?;
            dk = head_norm_backward(&dk, k, of_k, epsilon)?;
        }
        let dq = self.linear(&dq, &kept.normed, Target::Query)?;
        let dk = self.linear(&dk, &kept.normed, Target::Key)?;
        let dv = self.linear(&dv, &kept.normed, Target::Value)?;
        if !wants_input {
            return Ok(None);
        }
        let dnormed = ((dq + dk)? + dv)?;
        Ok(Some((dmiddle + rms_norm_backward(&dnormed, &kept.x, &layer.attention_norm, epsilon)?)?))
    }

    /// `dx = dy W + scale · (dy B) A`; the pair's own gradients are added on the way.
    fn linear(&mut self, dy: &Tensor, x: &Tensor, target: Target) -> Result<Tensor> {
        let weight = &self.decoder.layers[self.layer].linears[target as usize];
        let dx = weight.backward(dy)?;
        let at = self.adapter.index(self.layer, target);
        let (Some(pair), Some(at)) = (self.adapter.pair(self.layer, target), at) else { return Ok(dx) };
        let Some(middle) = &self.kept.low_rank[target as usize] else { return Ok(dx) };
        let dmiddle = (dy.matmul(&pair.b)? * self.adapter.scale())?;
        let db = dy.t()?.matmul(middle)?;
        let da = dmiddle.t()?.matmul(x)?;
        self.gradient.add(at, da, db)?;
        dx + dmiddle.matmul(&pair.a)?
    }
}

fn head_norm_backward(dy: &Tensor, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    let heads = ((), weight.dim(0)?);
    rms_norm_backward(&dy.reshape(heads)?, &x.reshape(heads)?, weight, epsilon)?.reshape(dy.shape())
}
