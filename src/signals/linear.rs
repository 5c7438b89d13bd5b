//! Linear models over hashed features, one byte a weight.

use super::features::BUCKETS;
use super::text::logistic;

/// Scores of a few outputs from one table; a row of it has the weights of one feature for all outputs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Linear {
    pub(super) outputs: usize,
    /// What a byte's 1 is worth, an output each.
    pub(super) scales: Vec<f32>,
    pub(super) weights: Vec<i8>,
}

impl Linear {
    /// Rounds weights (a row of `outputs` for each feature) to bytes.
    pub(super) fn rounded(outputs: usize, weights: &[f32]) -> Self {
        let mut scales = vec![1e-9_f32; outputs];
        for (index, weight) in weights.iter().enumerate() {
            scales[index % outputs] = scales[index % outputs].max(weight.abs() / 127.0);
        }
        let weights = weights.iter().enumerate();
        let weights =
            weights.map(|(index, weight)| (weight / scales[index % outputs]).round() as i8).collect();
        Self { outputs, scales, weights }
    }

    pub(super) fn scores<const N: usize>(&self, features: &[(u32, f32)]) -> [f64; N] {
        let mut sums = [0.0_f32; N];
        for (feature, value) in features {
            let row = &self.weights[*feature as usize * N..][..N];
            for (sum, weight) in sums.iter_mut().zip(row) {
                *sum += value * f32::from(*weight);
            }
        }
        let mut scores = [0.0; N];
        for ((score, sum), scale) in scores.iter_mut().zip(sums).zip(&self.scales) {
            *score = f64::from(sum * scale);
        }
        scores
    }

    /// The scores of all outputs, however many there are.
    pub(super) fn all_scores(&self, features: &[(u32, f32)]) -> Vec<f64> {
        let mut sums = vec![0.0_f32; self.outputs];
        for (feature, value) in features {
            let row = &self.weights[*feature as usize * self.outputs..][..self.outputs];
            for (sum, weight) in sums.iter_mut().zip(row) {
                *sum += value * f32::from(*weight);
            }
        }
        sums.iter().zip(&self.scales).map(|(sum, scale)| f64::from(sum * scale)).collect()
    }

    /// The weights as numbers, to go on training from.
    pub(super) fn weights(&self) -> Vec<f32> {
        let weights = self.weights.iter().enumerate();
        weights.map(|(index, weight)| f32::from(*weight) * self.scales[index % self.outputs]).collect()
    }

    pub(super) fn size(outputs: usize) -> usize {
        BUCKETS * outputs
    }
}

/// A score as a probability (Platt, "Probabilistic Outputs for Support Vector Machines", 1999).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Calibration {
    pub(super) slope: f64,
    pub(super) offset: f64,
}

impl Calibration {
    pub(super) const NONE: Self = Self { slope: 1.0, offset: 0.0 };

    pub(super) fn probability(self, score: f64) -> f64 {
        logistic(self.slope * score + self.offset)
    }
}
