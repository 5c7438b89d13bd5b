//! Penalised logistic regression on hashed features, for as many rows as one has.

use super::features::BUCKETS;
use super::linear::{Calibration, Linear};
use super::text::logistic;

/// A row to learn from.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) features: Vec<(u32, f32)>,
    /// The output that is right; with a single output 1 is yes and 0 is no.
    pub(super) target: usize,
    pub(super) weight: f64,
    /// Rows of one group are much alike: they stand on the same side of every split.
    pub(super) group: u64,
    /// Found with its label, not written to be learned from.
    pub(super) found: bool,
}

/// How strongly weights are held to where they began, and for how many passes over all rows one trains.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    pub(super) penalty: f64,
    pub(super) passes: usize,
}

const FOLDS: u64 = 5;

/// Drops features that fewer than `least` groups have: what is said of one prompt only is about its topic.
pub(super) fn common(rows: &mut [Row], least: u32) {
    let mut seen = vec![(0_u64, 0_u32); BUCKETS];
    let mut order: Vec<&Row> = rows.iter().collect();
    order.sort_by_key(|row| row.group);
    for row in order {
        for (feature, _) in &row.features {
            let (last, groups) = &mut seen[*feature as usize];
            if *groups == 0 || *last != row.group {
                (*last, *groups) = (row.group, *groups + 1);
            }
        }
    }
    for row in rows {
        row.features.retain(|(feature, _)| seen[*feature as usize].1 >= least);
    }
}

/// Weights that minimise `mean loss + penalty/2 · Σ (w − start)²`, a row of `outputs` for each feature.
///
/// All rows at once, by Adam with a step that falls to nothing: the same rows give the same weights.
pub(super) fn fit(rows: &[&Row], outputs: usize, start: &[f32], options: Options) -> Vec<f32> {
    const STEP: f64 = 1.0;
    let mut weights = start.to_vec();
    let (mut first, mut second) = (vec![0.0_f32; weights.len()], vec![0.0_f32; weights.len()]);
    let total: f64 = rows.iter().map(|row| row.weight).sum();
    for pass in 0..options.passes {
        let mut gradient = vec![0.0_f32; weights.len()];
        for row in rows {
            let slopes = slopes(&scores(row, outputs, &weights), row.target);
            for (feature, value) in &row.features {
                let at = *feature as usize * outputs;
                for (sum, slope) in gradient[at..at + outputs].iter_mut().zip(&slopes) {
                    *sum += (slope * row.weight / total) as f32 * value;
                }
            }
        }
        let done = pass as f64 / options.passes as f64;
        let power = pass as i32 + 1;
        let step = STEP * (1.0 - done) * (1.0 - 0.99_f64.powi(power)).sqrt() / (1.0 - 0.9_f64.powi(power));
        for (index, weight) in weights.iter_mut().enumerate() {
            let slope = gradient[index] + options.penalty as f32 * (*weight - start[index]);
            first[index] += 0.1 * (slope - first[index]);
            second[index] += 0.01 * (slope * slope - second[index]);
            *weight -= step as f32 * first[index] / (second[index].sqrt() + 1e-8);
        }
    }
    weights
}

fn scores(row: &Row, outputs: usize, weights: &[f32]) -> Vec<f64> {
    let mut scores = vec![0.0_f32; outputs];
    for (feature, value) in &row.features {
        let at = *feature as usize * outputs;
        for (score, weight) in scores.iter_mut().zip(&weights[at..at + outputs]) {
            *score += value * weight;
        }
    }
    scores.into_iter().map(f64::from).collect()
}

/// The loss's derivative by each score: logistic for one output, softmax for more.
fn slopes(scores: &[f64], target: usize) -> Vec<f64> {
    if let [score] = scores {
        return vec![logistic(*score) - target as f64];
    }
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
    let right = |index| f64::from(u8::from(index == target));
    scores.iter().enumerate().map(|(index, score)| (score - most).exp() / sum - right(index)).collect()
}

/// What a single output's score is worth as a probability, learned from rows that the weights behind it never saw: from
/// those that were found, if there are any.
pub(super) fn calibrate(rows: &[Row], start: &[f32], options: Options) -> Calibration {
    let any_found = rows.iter().any(|row| row.found);
    let mut seen = Vec::new();
    for fold in 0..FOLDS {
        let (held, kept): (Vec<&Row>, Vec<&Row>) =
            rows.iter().partition(|row| (row.found || !any_found) && row.group / 3 % FOLDS == fold);
        let weights = fit(&kept, 1, start, options);
        let model = Linear::rounded(1, &weights);
        let held = held.into_iter();
        seen.extend(held.map(|row| (model.scores::<1>(&row.features)[0], row.target as f64, row.weight)));
    }
    platt(&seen)
}

/// Newton's method on `(score, target, weight)`.
fn platt(seen: &[(f64, f64, f64)]) -> Calibration {
    let mut found = Calibration::NONE;
    for _ in 0..50 {
        // A little doubt keeps separable rows from a slope without end.
        let (mut a, mut b) = (1e-3 * (found.slope - 1.0), 1e-3 * found.offset);
        let (mut aa, mut ab, mut bb) = (1e-3, 0.0, 1e-3);
        for (score, target, weight) in seen {
            let p = found.probability(*score);
            let (error, spread) = (weight * (p - target), weight * p * (1.0 - p));
            a += error * score;
            b += error;
            aa += spread * score * score;
            ab += spread * score;
            bb += spread;
        }
        let determinant = aa * bb - ab * ab;
        if determinant.is_nan() || determinant <= 1e-12 {
            break;
        }
        found.slope -= ((bb * a - ab * b) / determinant).clamp(-1.0, 1.0);
        found.offset -= ((aa * b - ab * a) / determinant).clamp(-1.0, 1.0);
    }
    found
}
