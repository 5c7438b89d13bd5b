//! Log-probabilities of given tokens, without ever holding `[rows, vocabulary]` at once.

#[cfg(feature = "cuda")]
mod card;
mod tensors;

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::{
    decoder::Decoder,
    device::on_slices,
    linear::Linear,
    ops::{Onto, add_scaled, exp, for_each_row, read},
    request::Drawn,
};

/// Rows whose logits a thread holds at a time: 64 · 49152 · 4 bytes are 12 MB.
const CHUNK: usize = 64;

/// Log-probabilities of one token a row.
#[derive(Debug, Default)]
pub struct TokenLogprobs {
    /// `log p(target)` in nats, a row each.
    pub logprobs: Vec<f32>,
    /// Entropy of the distribution in nats, a row each.
    pub entropies: Vec<f32>,
    /// `∂ logprob / ∂ hidden`, `[rows, hidden]`, if it was asked for.
    pub slopes: Option<Tensor>,
}

impl TokenLogprobs {
    /// `−log p(target)` above the entropy, a row each: how much more the target surprises than one that was drawn would. Of
    /// samples at temperature 1 it is 0 on average (Meister et al., *Locally Typical Sampling*, TACL 2023).
    pub fn surprise(&self) -> Vec<f32> {
        self.logprobs.iter().zip(&self.entropies).map(|(logprob, entropy)| -logprob - entropy).collect()
    }

    /// The gradient with respect to the hidden states, from the gradient with respect to each log-probability.
    pub fn backward(&self, dlogprobs: &[f32]) -> Result<Option<Tensor>> {
        let Some(slopes) = &self.slopes else { return Ok(None) };
        let by = Tensor::new(dlogprobs, slopes.device())?.to_dtype(slopes.dtype())?.unsqueeze(1)?;
        Ok(Some(slopes.broadcast_mul(&by)?))
    }
}

impl Decoder {
    /// `log softmax(hidden · headᵀ / temperature)[targets]`, a row each.
    ///
    /// With `slopes`, also the derivative by the hidden state, `(head[target] − Σ p · head) / temperature`: the mean is
    /// one more product with the probabilities at hand, so that the backward pass needs neither logits nor a second
    /// softmax.
    pub fn token_logprobs(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        temperature: f64,
        slopes: bool,
    ) -> Result<TokenLogprobs> {
        if !on_slices(hidden) {
            #[cfg(feature = "cuda")]
            if super::card::takes(hidden) {
                return card::token_logprobs(&self.head, hidden, targets, temperature, slopes);
            }
            return tensors::token_logprobs(&self.head, hidden, targets, temperature, slopes);
        }
        let rows = hidden.dim(0)?;
        // For the way back, unpacked once for all chunks.
        let dense = slopes.then(|| self.head.dense()).transpose()?.map(Linear::Dense);
        let starts: Vec<usize> = (0..rows).step_by(CHUNK).collect();
        let chunks = starts.par_iter().map(|start| {
            let len = CHUNK.min(rows - start);
            let targets = &targets[*start..start + len];
            let mut out = TokenLogprobs::default();
            let logits = self.head.forward(&hidden.narrow(0, *start, len)?)?;
            let probabilities = softmax_rows(&logits, targets, temperature as f32, &mut out)?;
            if let Some(head) = &dense {
                let mean = head.backward(&probabilities, Onto::New(DType::F32))?;
                out.slopes = Some(((head.select(targets)? - mean)? / temperature)?);
            }
            Ok(out)
        });
        let mut out = TokenLogprobs::default();
        let mut pieces = Vec::new();
        for chunk in chunks.collect::<Result<Vec<_>>>()? {
            out.logprobs.extend(chunk.logprobs);
            out.entropies.extend(chunk.entropies);
            pieces.extend(chunk.slopes);
        }
        if !pieces.is_empty() {
            out.slopes = Some(Tensor::cat(&pieces, 0)?);
        }
        Ok(out)
    }
}

/// `softmax(logits / temperature)`; the targets' log-probabilities and the entropies are appended to `out`.
fn softmax_rows(
    logits: &Tensor,
    targets: &[u32],
    temperature: f32,
    out: &mut TokenLogprobs,
) -> Result<Tensor> {
    let (rows, columns) = logits.dims2()?;
    // The last two columns of the scratch carry the log-sum-exp and the entropy out of the loop over rows.
    let width = columns + 2;
    let mut scratch = vec![0f32; rows * width];
    read(logits, |logits| {
        for_each_row(
            &mut scratch,
            width,
            #[inline(always)]
            |row, scratch| {
                let logits = &logits[row * columns..(row + 1) * columns];
                let (probabilities, results) = scratch.split_at_mut(columns);
                results.copy_from_slice(&softmax(logits, temperature.recip(), probabilities));
            },
        );
        for (row, target) in targets.iter().enumerate() {
            let log_sum = scratch[row * width + columns];
            out.logprobs.push(logits[row * columns + *target as usize] / temperature - log_sum);
            out.entropies.push(scratch[row * width + columns + 1]);
        }
    })?;
    Tensor::from_vec(scratch, (rows, width), logits.device())?.narrow(1, 0, columns)
}

/// Fills `probabilities` with those of `sharpness · logits`; returns the log-sum-exp and the entropy.
#[inline(always)]
fn softmax(logits: &[f32], sharpness: f32, probabilities: &mut [f32]) -> [f32; 2] {
    let mut most = [f32::NEG_INFINITY; 32];
    for chunk in logits.chunks(32) {
        for (most, logit) in most.iter_mut().zip(chunk) {
            *most = most.max(*logit);
        }
    }
    let most = sharpness * most.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let mut sums = [0f32; 32];
    let mut products = [0f32; 32];
    for (chunk, probabilities) in logits.chunks(32).zip(probabilities.chunks_mut(32)) {
        for (((sum, product), logit), probability) in
            sums.iter_mut().zip(&mut products).zip(chunk).zip(probabilities)
        {
            let below = sharpness * logit - most;
            let weight = exp(below);
            *probability = weight;
            *sum += weight;
            *product += weight * below;
        }
    }
    let (sum, product): (f32, f32) = (sums.iter().sum(), products.iter().sum());
    for probability in &mut *probabilities {
        *probability /= sum;
    }
    [most + sum.ln(), sum.ln() - product / sum]
}

/// How likely `token` is by one row of logits.
pub(crate) fn drawn(token: u32, logits: &[f32], temperature: f64) -> Drawn {
    let temperature = temperature as f32;
    let [log_sum, entropy] = sums(logits, temperature.recip(), &mut vec![0f32; logits.len()]);
    Drawn { logprob: logits[token as usize] / temperature - log_sum, entropy }
}

fn sums(logits: &[f32], sharpness: f32, probabilities: &mut [f32]) -> [f32; 2] {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || softmax(logits, sharpness, probabilities),
    )
}

/// `log softmax(logits)` of one row, for the log-probabilities that a client asks for.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let mut scratch = vec![0f32; logits.len()];
    let [log_sum, _] = sums(logits, 1.0, &mut scratch);
    scratch.fill(-log_sum);
    add_scaled(&mut scratch, 1.0, logits);
    scratch
}
