//! Draws the next token: temperature, top-k and nucleus sampling from a seeded generator.

use candle_core::{Device, Result, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling as Rule};

use super::request::Sampling;

/// One sequence's sampler. The same seed draws the same tokens from the same logits.
pub(crate) struct Sampler {
    draw: LogitsProcessor,
    sampling: Sampling,
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler").field("sampling", &self.sampling).finish_non_exhaustive()
    }
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling) -> Self {
        let Sampling { temperature, top_p, top_k, seed } = sampling;
        let rule = match (temperature, top_k, top_p) {
            (t, _, _) if t < 1e-7 => Rule::ArgMax,
            (temperature, 0, p) if p >= 1.0 => Rule::All { temperature },
            (temperature, 0, p) => Rule::TopP { p, temperature },
            (temperature, k, p) if p >= 1.0 => Rule::TopK { k, temperature },
            (temperature, k, p) => Rule::TopKThenTopP { k, p, temperature },
        };
        Self { draw: LogitsProcessor::from_sampling(seed, rule), sampling }
    }

    /// Draws from one row of logits.
    pub(crate) fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if self.sampling.temperature < 1e-7 {
            return Ok(likeliest(logits));
        }
        // candle's sampler sorts what it is given. Most of a vocabulary cannot be drawn, so it is given the rest only.
        let candidates = self.candidates(logits);
        let few: Vec<f32> = candidates.iter().map(|token| logits[*token as usize]).collect();
        let drawn = self.draw.sample(&Tensor::new(few, &Device::Cpu)?)?;
        Ok(candidates[drawn as usize])
    }

    /// Every token that top-k or the nucleus may keep, and as few others as is cheap to tell.
    ///
    /// A token with less than `(1 − p) / vocabulary` of the mass is outside the nucleus: all such tokens together
    /// weigh less than `1 − p`, so the others alone weigh `p` or more.
    fn candidates(&self, logits: &[f32]) -> Vec<u32> {
        let Sampling { temperature, top_p, top_k, .. } = self.sampling;
        let all = 0..logits.len() as u32;
        if top_k > 0 && top_k < logits.len() {
            let mut tokens: Vec<u32> = all.collect();
            let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]);
            tokens.select_nth_unstable_by(top_k - 1, by_logit);
            tokens.truncate(top_k);
            tokens.sort_unstable();
            return tokens;
        }
        if top_p >= 1.0 {
            return all.collect();
        }
        let most = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        // The whole mass is at least that of the likeliest token, so this bound errs on the side of keeping.
        let least = f64::from(most) + temperature * ((1.0 - top_p) / logits.len() as f64).ln();
        all.filter(|token| f64::from(logits[*token as usize]) >= least).collect()
    }
}

/// The index of the largest logit; the first of equals.
pub(crate) fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The share of each token in many draws.
    fn shares(sampling: Sampling, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(sampling);
        let mut counts = vec![0f64; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.sample(logits).unwrap() as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[track_caller]
    fn check(temperature: f64, top_k: usize, top_p: f64, expected: &[f64]) {
        // Probabilities 0.5, 0.25, 0.15, 0.07, 0.03 at temperature 1.
        let logits: Vec<f32> = [0.5f32, 0.25, 0.15, 0.07, 0.03].iter().map(|p| p.ln()).collect();
        let found = shares(Sampling { temperature, top_p, top_k, seed: 7 }, &logits);
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 0.015, "{found:?} but {expected:?}");
        }
    }

    #[test]
    fn draws_follow_the_rule() {
        check(1.0, 0, 1.0, &[0.5, 0.25, 0.15, 0.07, 0.03]);
        check(0.0, 0, 1.0, &[1.0, 0.0, 0.0, 0.0, 0.0]);
        check(1.0, 2, 1.0, &[0.667, 0.333, 0.0, 0.0, 0.0]);
        check(1.0, 0, 0.8, &[0.556, 0.278, 0.167, 0.0, 0.0]);
        check(0.5, 0, 1.0, &[0.735, 0.184, 0.066, 0.014, 0.003]);
    }

    #[test]
    fn the_seed_decides() {
        let logits = vec![0f32; 50];
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed });
            (0..20).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
