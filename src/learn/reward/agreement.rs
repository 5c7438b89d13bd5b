//! How far scores agree with judgements: the loss with its gradient, accuracy, calibration.

use serde::{Deserialize, Serialize};

use super::{Example, reads::Scores};
use crate::learn::losses;

/// How well a reward model agrees with examples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    pub loss: f64,
    /// Mean score of the preferred and of the labelled answers. Only where it is evaluated.
    pub score: f64,
    /// Share of the comparisons, and of the labels away from ½, that the score orders rightly.
    pub accuracy: f64,
    /// How far the certainty of its judgements, σ of the score or of the difference of two, is from how often they are
    /// right: the expected calibration error over ten equal bins (Guo et al., 2017). Only where it is evaluated.
    pub calibration_error: f64,
    /// How often the longer answer is the better one, which is what the accuracy is to be held against. Only where it is
    /// evaluated.
    pub longer_wins: f64,
    pub examples: usize,
}

/// The mean loss over examples and heads, and its gradient for each score.
pub(super) fn judge_scores(
    (examples, draws): (&[&Example], &[Vec<f32>]),
    scores: &[Vec<f32>],
    center: f64,
) -> (Agreement, Scores) {
    let heads = scores.first().map_or(1, Vec::len);
    let mut dscores = vec![vec![0f32; heads]; scores.len()];
    let mut mean = Agreement { examples: examples.len(), ..Agreement::default() };
    for head in 0..heads {
        let own: Vec<f32> = scores.iter().map(|scores| scores[head]).collect();
        let draws: Vec<f32> = draws.iter().map(|draws| draws[head]).collect();
        let (loss, accuracy, slopes) = judge_head((examples, &draws), &own, center);
        mean.loss += loss / heads as f64;
        mean.accuracy += accuracy / heads as f64;
        for (all, slope) in dscores.iter_mut().zip(slopes) {
            all[head] = slope / heads as f32;
        }
    }
    (mean, dscores)
}

/// One head's loss, its accuracy, and the gradient for each score, in the order of the examples' sequences.
fn judge_head((examples, draws): (&[&Example], &[f32]), scores: &[f32], center: f64) -> (f64, f64, Vec<f32>) {
    let (mut chosen, mut rejected, mut margins) = (Vec::new(), Vec::new(), Vec::new());
    let (mut single, mut labels, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    let (mut pair_weights, mut label_weights) = (Vec::new(), Vec::new());
    let mut at = 0;
    for (example, draw) in examples.iter().zip(draws) {
        match example {
            Example::Comparison { weight, margin, .. } => {
                chosen.push(at);
                rejected.push(at + 1);
                margins.push(*margin as f32);
                pair_weights.push(*weight as f32 * draw);
                at += 2;
            }
            Example::Label { label, margin, weight, .. } => {
                single.push(at);
                offsets.push(*margin as f32);
                labels.push(*label as f32);
                label_weights.push(*weight as f32 * draw);
                at += 1;
            }
        }
    }
    let pick = |at: &[usize]| at.iter().map(|at| scores[*at]).collect::<Vec<f32>>();
    let pairs = losses::bradley_terry(&pick(&chosen), &pick(&rejected), &margins, &pair_weights, center);
    let beyond: Vec<f32> = pick(&single).iter().zip(&offsets).map(|(score, margin)| score - margin).collect();
    let singles = losses::pointwise(&beyond, &labels, &label_weights);
    let total = (chosen.len() + single.len()).max(1) as f64;
    let (pair_share, single_share) = (chosen.len() as f64 / total, single.len() as f64 / total);
    let mut dscores = vec![0f32; scores.len()];
    let mut add = |at: &[usize], gradient: &[f32], share: f64| {
        for (at, gradient) in at.iter().zip(gradient) {
            dscores[*at] = gradient * share as f32;
        }
    };
    add(&chosen, &pairs.dchosen, pair_share);
    add(&rejected, &pairs.drejected, pair_share);
    add(&single, &singles.dscores, single_share);
    let loss = pairs.loss * pair_share + singles.loss * single_share;
    (loss, pairs.accuracy * pair_share + singles.accuracy * single_share, dscores)
}

/// What it thinks of each example: how certain it is, from ½ to 1, and whether it is right. Labels of ½ say nothing.
pub(super) fn judgements(examples: &[&Example], scores: &[Vec<f32>]) -> Vec<(f64, bool)> {
    let mut scores = scores.iter().map(|heads| f64::from(heads[0]));
    let mut next = || scores.next().unwrap_or_default();
    let mut out = Vec::with_capacity(examples.len());
    for example in examples {
        let (for_it, right) = match example {
            Example::Comparison { .. } => (next() - next(), Some(true)),
            Example::Label { label, .. } => (next(), (*label != 0.5).then_some(*label > 0.5)),
        };
        if let Some(right) = right {
            out.push((losses::sigmoid(for_it.abs()), (for_it > 0.0) == right));
        }
    }
    out
}

/// The mean distance between certainty and share of right judgements, over ten equal bins of certainty.
pub(super) fn expected_calibration_error(judgements: &[(f64, bool)]) -> f64 {
    const BINS: usize = 10;
    let mut bins = [(0.0, 0.0); BINS];
    for (certainty, right) in judgements {
        let bin = ((certainty * BINS as f64) as usize).min(BINS - 1);
        bins[bin].0 += certainty;
        bins[bin].1 += f64::from(u8::from(*right));
    }
    bins.iter().map(|(certainty, right)| (certainty - right).abs()).sum::<f64>()
        / judgements.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calibration_error_is_the_distance_of_certainty_from_accuracy() {
        let nine_of_ten = |certainty| (0..10).map(|nth| (certainty, nth > 0)).collect::<Vec<_>>();
        assert!(expected_calibration_error(&nine_of_ten(0.9)).abs() < 1e-9);
        assert!((expected_calibration_error(&nine_of_ten(0.99)) - 0.09).abs() < 1e-9);
        assert!(expected_calibration_error(&[]).abs() < 1e-9);
    }
}
