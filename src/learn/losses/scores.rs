//! Losses on scores: what the reward model learns by.

use super::{sigmoid, softplus};

/// The Bradley–Terry loss over pairs of scores.
#[derive(Debug, Clone, PartialEq)]
pub struct PairLoss {
    pub loss: f64,
    /// Share of the pairs whose chosen score is the higher.
    pub accuracy: f64,
    pub dchosen: Vec<f32>,
    pub drejected: Vec<f32>,
}

/// Weighted mean of `−log σ(c − r − margin) + center · (c + r)²` (Bradley and Terry, 1952; the margin as in Touvron et
/// al., *Llama 2*, 2023, the second term as in Eisenstein et al., 2023).
pub fn bradley_terry(
    chosen: &[f32],
    rejected: &[f32],
    margins: &[f32],
    weights: &[f32],
    center: f64,
) -> PairLoss {
    let total = weights.iter().map(|weight| f64::from(*weight)).sum::<f64>().max(1e-12);
    let mut out = PairLoss { loss: 0.0, accuracy: 0.0, dchosen: Vec::new(), drejected: Vec::new() };
    for (((chosen, rejected), margin), weight) in chosen.iter().zip(rejected).zip(margins).zip(weights) {
        let (c, r, share) = (f64::from(*chosen), f64::from(*rejected), f64::from(*weight) / total);
        let behind = r - c + f64::from(*margin);
        out.loss += share * (softplus(behind) + center * (c + r).powi(2));
        out.accuracy += share * f64::from(u8::from(c > r));
        let pull = sigmoid(behind);
        let spread = 2.0 * center * (c + r);
        out.dchosen.push((share * (spread - pull)) as f32);
        out.drejected.push((share * (spread + pull)) as f32);
    }
    out
}

/// The logistic loss over single scores.
#[derive(Debug, Clone, PartialEq)]
pub struct PointLoss {
    pub loss: f64,
    /// Share of the labels away from ½ whose side the score is on.
    pub accuracy: f64,
    pub dscores: Vec<f32>,
}

/// Weighted mean of the cross-entropy between labels in `[0, 1]` and `σ(score)`.
pub fn pointwise(scores: &[f32], labels: &[f32], weights: &[f32]) -> PointLoss {
    let total = weights.iter().map(|weight| f64::from(*weight)).sum::<f64>().max(1e-12);
    let mut out = PointLoss { loss: 0.0, accuracy: 0.0, dscores: Vec::new() };
    let mut decided = 0.0;
    for ((score, label), weight) in scores.iter().zip(labels).zip(weights) {
        let (score, label, share) = (f64::from(*score), f64::from(*label), f64::from(*weight) / total);
        out.loss += share * (softplus(score) - label * score);
        out.dscores.push((share * (sigmoid(score) - label)) as f32);
        if (label - 0.5).abs() > 1e-9 {
            decided += share;
            out.accuracy += share * f64::from(u8::from((score > 0.0) == (label > 0.5)));
        }
    }
    out.accuracy /= if decided > 0.0 { decided } else { 1.0 };
    out
}
