//! Log-probabilities by the card's own kernel: one launch over the logits of some rows, whose place the probabilities take.

use candle_core::{Result, Tensor};

use super::TokenLogprobs;
use crate::policy::{
    card,
    linear::Linear,
    ops::{Onto, product},
};

/// Logits that are held at a time: 512 MB of bf16.
const LOGITS: usize = 1 << 28;

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
    let (weights, wanted) = (head.dense()?, Tensor::new(targets, hidden.device())?);
    let (mut found, mut pieces) = (Vec::new(), Vec::new());
    for start in (0..rows).step_by(together) {
        let len = together.min(rows - start);
        let logits = head.forward(&hidden.narrow(0, start, len)?)?;
        let (logprobs, entropies) =
            card::logprobs(&logits, &wanted.narrow(0, start, len)?, temperature, slopes)?;
        found.push(Tensor::stack(&[logprobs, entropies], 1)?);
        if slopes {
            let own = (head.select(&targets[start..start + len])? / temperature)?;
            pieces.push(product(&logits, &weights, -1.0 / temperature, Onto::This(own))?);
        }
    }
    let mut out = TokenLogprobs::default();
    if rows == 0 {
        return Ok(out);
    }
    // The host waits for the card once.
    (out.logprobs, out.entropies) =
        Tensor::cat(&found, 0)?.to_vec2::<f32>()?.into_iter().map(|both| (both[0], both[1])).unzip();
    if slopes {
        out.slopes = Some(Tensor::cat(&pieces, 0)?);
    }
    Ok(out)
}
