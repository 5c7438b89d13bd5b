//! Log-probabilities of given tokens, without ever holding `[rows, vocabulary]` at once.

use candle_core::{Result, Tensor};

use super::{
    decoder::Decoder,
    linear::Linear,
    ops::{add_scaled, exp, for_each_row, read},
};

/// Rows whose logits are held at a time: 64 · 49152 · 4 bytes are 12 MB.
const CHUNK: usize = 64;

/// Log-probabilities of one token a row.
#[derive(Debug)]
pub struct TokenLogprobs {
    /// `log p(target)` in nats, a row each.
    pub logprobs: Vec<f32>,
    /// Entropy of the distribution in nats, a row each.
    pub entropies: Vec<f32>,
    /// `∂ logprob / ∂ hidden`, `[rows, hidden]`, if it was asked for.
    pub slopes: Option<Tensor>,
}

impl TokenLogprobs {
    /// The gradient with respect to the hidden states, from the gradient with respect to each log-probability.
    pub fn backward(&self, dlogprobs: &[f32]) -> Result<Option<Tensor>> {
        let Some(slopes) = &self.slopes else { return Ok(None) };
        let by = Tensor::new(dlogprobs, slopes.device())?.unsqueeze(1)?;
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
        let rows = hidden.dim(0)?;
        let mut out = TokenLogprobs {
            logprobs: Vec::with_capacity(rows),
            entropies: Vec::with_capacity(rows),
            slopes: None,
        };
        let mut pieces = Vec::new();
        // Unpacked once for all chunks.
        let head = if slopes { Linear::Dense(self.head.dense()?) } else { self.head.clone() };
        for start in (0..rows).step_by(CHUNK) {
            let len = CHUNK.min(rows - start);
            let targets = &targets[start..start + len];
            let logits = (head.forward(&hidden.narrow(0, start, len)?)? / temperature)?;
            let probabilities = softmax_rows(&logits, targets, &mut out)?;
            if slopes {
                let chosen = head.select(targets)?;
                let mean = head.backward(&probabilities)?;
                pieces.push(((chosen - mean)? / temperature)?);
            }
        }
        if slopes && !pieces.is_empty() {
            out.slopes = Some(Tensor::cat(&pieces, 0)?);
        }
        Ok(out)
    }
}

/// `softmax(logits)`; the targets' log-probabilities and the entropies are appended to `out`.
fn softmax_rows(logits: &Tensor, targets: &[u32], out: &mut TokenLogprobs) -> Result<Tensor> {
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
                results.copy_from_slice(&softmax(logits, probabilities));
            },
        );
        for (row, target) in targets.iter().enumerate() {
            let log_sum = scratch[row * width + columns];
            out.logprobs.push(logits[row * columns + *target as usize] - log_sum);
            out.entropies.push(scratch[row * width + columns + 1]);
        }
    })?;
    Tensor::from_vec(scratch, (rows, width), logits.device())?.narrow(1, 0, columns)
}

/// Fills `probabilities`; returns the log-sum-exp and the entropy.
#[inline(always)]
fn softmax(logits: &[f32], probabilities: &mut [f32]) -> [f32; 2] {
    let mut most = [f32::NEG_INFINITY; 32];
    for chunk in logits.chunks(32) {
        for (most, logit) in most.iter_mut().zip(chunk) {
            *most = most.max(*logit);
        }
    }
    let most = most.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let mut sums = [0f32; 32];
    let mut products = [0f32; 32];
    for (chunk, probabilities) in logits.chunks(32).zip(probabilities.chunks_mut(32)) {
        for (((sum, product), logit), probability) in
            sums.iter_mut().zip(&mut products).zip(chunk).zip(probabilities)
        {
            let weight = exp(logit - most);
            *probability = weight;
            *sum += weight;
            *product += weight * (logit - most);
        }
    }
    let (sum, product): (f32, f32) = (sums.iter().sum(), products.iter().sum());
    for probability in &mut *probabilities {
        *probability /= sum;
    }
    [most + sum.ln(), sum.ln() - product / sum]
}

/// `log softmax(logits)` of one row, for the log-probabilities that a client asks for.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let mut scratch = vec![0f32; logits.len()];
    let [log_sum, _] = pulp::Arch::new().dispatch(
        #[inline(always)]
        || softmax(logits, &mut scratch),
    );
    scratch.fill(-log_sum);
    add_scaled(&mut scratch, 1.0, logits);
    scratch
}
