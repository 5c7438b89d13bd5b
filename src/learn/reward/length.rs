//! What length alone explains of judgements, so that a reward model need not learn it.
//!
//! People tend to prefer the longer of two answers, and a policy finds that out before anything else (Singhal et al., *A Long Way
//! to Go*, 2024). As length-controlled AlpacaEval does with a judge's verdicts (Dubois et al., 2024), a judgement's log-odds are
//! taken as the score and an effect of the length, `γ · ln length`; γ is fitted first, and the score learns what is left.

use std::borrow::Cow;

use super::{Example, Sequence};

/// Log-odds of a judgement by each unit of log-length.
#[derive(Debug, Clone, Copy)]
struct Effect {
    slope: f64,
    /// The mean log-length of single answers.
    mean: f64,
}

impl Effect {
    /// Logistic regression by Newton's method; the slope has a standard normal prior, so that few judgements say little.
    fn fit(examples: &[Example]) -> Self {
        const ROUNDS: usize = 25;
        let mean = mean_log_length(examples);
        let effect = Self { slope: 0.0, mean };
        let rows: Vec<_> = examples.iter().map(|example| effect.row(example)).collect();
        let (mut slope, mut level) = (0.0, 0.0);
        for _ in 0..ROUNDS {
            let (mut ds, mut dl, mut ss, mut sl, mut ll) = (-slope, -1e-3 * level, 1.0, 0.0, 1e-3);
            for Row { length, single, label, weight } in &rows {
                let p = crate::learn::losses::sigmoid(slope * length + level * single);
                let (error, curve) = (weight * (label - p), weight * p * (1.0 - p));
                ds += error * length;
                dl += error * single;
                ss += curve * length * length;
                sl += curve * length * single;
                ll += curve * single;
            }
            let determinant = ss * ll - sl * sl;
            slope += (ll * ds - sl * dl) / determinant;
            level += (ss * dl - sl * ds) / determinant;
        }
        Self { slope: if slope.is_finite() { slope } else { 0.0 }, mean }
    }

    fn row(&self, example: &Example) -> Row {
        let length = longer_by(example, self.mean);
        match example {
            Example::Comparison { weight, .. } => Row { length, single: 0.0, label: 1.0, weight: *weight },
            Example::Label { label, weight, .. } => {
                Row { length, single: 1.0, label: *label, weight: *weight }
            }
        }
    }
}

struct Row {
    length: f64,
    /// 1 for a judgement of one answer, whose log-odds have a level of their own.
    single: f64,
    label: f64,
    weight: f64,
}

/// Log-length of the chosen answer over the rejected one's; of a single answer over the mean.
fn longer_by(example: &Example, mean: f64) -> f64 {
    let of = |answer: &Sequence| (answer.answer().len().max(1) as f64).ln();
    match example {
        Example::Comparison { chosen, rejected, .. } => of(chosen) - of(rejected),
        Example::Label { answer, .. } => of(answer) - mean,
    }
}

fn mean_log_length(examples: &[Example]) -> f64 {
    let single = examples.iter().filter(|example| matches!(example, Example::Label { .. }));
    let lengths: Vec<f64> = single.map(|example| longer_by(example, 0.0)).collect();
    lengths.iter().sum::<f64>() / lengths.len().max(1) as f64
}

/// The examples with a share `control` of what length explains as their margin: 0 leaves all of it to the score, 1 nothing.
pub(super) fn controlled(examples: &[Example], control: f64) -> Cow<'_, [Example]> {
    if control == 0.0 {
        return Cow::Borrowed(examples);
    }
    let effect = Effect::fit(examples);
    let mut examples = examples.to_vec();
    for example in &mut examples {
        let explained = control * effect.slope * longer_by(example, effect.mean);
        let (Example::Comparison { margin, .. } | Example::Label { margin, .. }) = example;
        *margin -= explained;
    }
    Cow::Owned(examples)
}

/// How often the longer answer is the better one, or for single answers, the one above the mean length a good one; a half for
/// equal lengths. A reward model that agrees with people no more often has learned no more than that.
pub(super) fn longer_wins(examples: &[Example]) -> f64 {
    let mean = mean_log_length(examples);
    let judged = examples.iter().filter(|example| !matches!(example, Example::Label { label: 0.5, .. }));
    let wins: Vec<f64> = judged
        .map(|example| {
            let good = !matches!(example, Example::Label { label, .. } if *label < 0.5);
            let longer = longer_by(example, mean);
            if longer == 0.0 { 0.5 } else { f64::from(u8::from((longer > 0.0) == good)) }
        })
        .collect();
    wins.iter().sum::<f64>() / wins.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    fn answer(length: usize) -> Sequence {
        Sequence::new(vec![7; 1 + length], 1)
    }

    /// Judges who mind nothing but length, with this slope.
    fn judged(slope: f64, seed: u64) -> Vec<Example> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut draw = |single: bool| {
            let [a, b] = [(); 2].map(|()| answer(random.random_range(5..80)));
            let pair =
                Example::Comparison { chosen: a.clone(), rejected: b.clone(), margin: 0.0, weight: 1.0 };
            let by = if single { (a.answer().len() as f64).ln() - 3.5 } else { longer_by(&pair, 0.0) };
            let first = random.random_bool(crate::learn::losses::sigmoid(slope * by));
            match (single, first) {
                (true, _) => {
                    Example::Label { answer: a, label: f64::from(u8::from(first)), margin: 0.0, weight: 1.0 }
                }
                (false, true) => pair,
                (false, false) => Example::Comparison { chosen: b, rejected: a, margin: 0.0, weight: 1.0 },
            }
        };
        (0..3000).map(|nth| draw(nth % 2 == 0)).collect()
    }

    #[test]
    fn the_effect_of_length_is_found() {
        for (slope, seed) in [(0.0, 1), (1.2, 2), (-0.7, 3)] {
            let found = Effect::fit(&judged(slope, seed)).slope;
            assert!((found - slope).abs() < 0.12, "{found}, not {slope}");
        }
    }

    #[test]
    fn a_share_of_it_is_taken_out() {
        let examples = judged(1.2, 4);
        let margin = |control: f64| -> f64 {
            let of = |example: &Example| {
                let (Example::Comparison { margin, .. } | Example::Label { margin, .. }) = example;
                margin.abs()
            };
            controlled(&examples, control).iter().map(of).sum()
        };
        assert_eq!(margin(0.0), 0.0);
        assert!((margin(0.5) / margin(1.0) - 0.5).abs() < 1e-9 && margin(1.0) > 100.0);
    }

    #[test]
    fn the_longer_answer_wins_as_often_as_it_does() {
        let examples = judged(1.2, 5);
        let share = longer_wins(&examples);
        assert!((0.65..0.85).contains(&share), "{share}");
        let mirrored = judged(-1.2, 5);
        assert!(longer_wins(&mirrored) < 0.35);
        assert_eq!(longer_wins(&[]), 0.0);
    }
}
