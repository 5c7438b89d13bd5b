//! Log-probabilities as tensor operations, for every device and type: logits in the type of the weights, everything
//! after them in f32.

use candle_core::{D, DType, Result, Tensor};

use super::TokenLogprobs;
use crate::policy::{
    linear::Linear,
    ops::{Onto, tensors::widened},
};

/// Logits that are held at a time: 128 MB of f32, of which a few copies exist.
const LOGITS: usize = 1 << 25;

/// [`Decoder::token_logprobs`](crate::policy::Decoder::token_logprobs).
pub(super) fn token_logprobs(
    head: &Linear,
    hidden: &Tensor,
    targets: &[u32],
    temperature: f64,
    slopes: bool,
) -> Result<TokenLogprobs> {
    let rows = hidden.dim(0)?;
    let together = (LOGITS / head.dims()[0]).max(1);
    let mut out = TokenLogprobs::default();
    let mut pieces = Vec::new();
    for start in (0..rows).step_by(together) {
        let len = together.min(rows - start);
        let targets = &targets[start..start + len];
        let logits = (widened(&head.forward(&hidden.narrow(0, start, len)?)?)? / temperature)?;
        let below = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        let weights = below.exp()?;
        let total = weights.sum_keepdim(D::Minus1)?;
        let log_total = total.log()?;
        let chosen = Tensor::new(targets, hidden.device())?.unsqueeze(1)?;
        out.logprobs.extend(column(&(below.gather(&chosen, 1)? - &log_total)?)?);
        let mean_below = ((&weights * &below)?.sum_keepdim(D::Minus1)? / &total)?;
        out.entropies.extend(column(&(log_total - mean_below)?)?);
        if slopes {
            let probabilities = weights.broadcast_div(&total)?.to_dtype(hidden.dtype())?;
            let mean = head.backward(&probabilities, Onto::New(hidden.dtype()))?;
            pieces.push(((head.select(targets)? - mean)? / temperature)?);
        }
    }
    if !pieces.is_empty() {
        out.slopes = Some(Tensor::cat(&pieces, 0)?);
    }
    Ok(out)
}

fn column(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
