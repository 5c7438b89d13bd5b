//! The course of the day.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};

use super::bits;

/// Waves a day, half a day and a third of a day long.
const WAVES: usize = 3;
const TERMS: usize = 1 + 2 * WAVES;
/// What each term is multiplied with at a time of the day.
pub(super) type Waves = [f64; TERMS];
const DAY_MS: u64 = 86_400_000;

/// Prior standard deviation of the first wave's amplitude, over the rate; the second's is half of it, and so on.
const AMPLITUDE: f64 = 0.2;

/// A level and a few waves over the day, by recursive least squares.
///
/// The prior says that a rate may swing by some 20% of itself, so that within the first day a slow rise is taken for
/// either, and what happens at one time of the day is known as well as without waves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Season {
    #[serde(with = "bits::array")]
    terms: [f64; TERMS],
    /// Their covariance, over the variance of a reading.
    #[serde(with = "bits::matrix")]
    covariance: [[f64; TERMS]; TERMS],
}

impl Season {
    /// Begins at a level that is known like the mean of `precision` readings. `amplitude` is a rate over the
    /// standard deviation of its readings.
    pub(super) fn new(level: f64, precision: f64, amplitude: f64) -> Self {
        let mut terms = [0.0; TERMS];
        terms[0] = level;
        let mut covariance = [[0.0; TERMS]; TERMS];
        covariance[0][0] = 1.0 / precision;
        for term in 1..TERMS {
            covariance[term][term] = (AMPLITUDE * amplitude / term.div_ceil(2) as f64).powi(2);
        }
        // What was learned so far was at one hour or another: the level is not known better than the waves allow.
        covariance[0][0] += covariance[1][1] + covariance[3][3] + covariance[5][5];
        Self { terms, covariance }
    }

    /// A new level, known like the mean of `precision` readings; the waves stay.
    pub(super) fn restart(&mut self, level: f64, precision: f64) {
        self.terms[0] = level;
        for term in 0..TERMS {
            self.covariance[0][term] = 0.0;
            self.covariance[term][0] = 0.0;
        }
        self.covariance[0][0] = 1.0 / precision.max(1.0);
    }

    pub(super) fn level(&self) -> f64 {
        self.terms[0]
    }

    /// The level is a rate, too: least squares alone may leave the interval.
    pub(super) fn keep_within(&mut self, least: f64) {
        self.terms[0] = self.terms[0].clamp(least, 1.0 - least);
    }

    /// The mean at a time of the day, with the waves there.
    pub(super) fn expect(&self, at: u64) -> (f64, Waves) {
        let waves = waves(at);
        (waves.iter().zip(&self.terms).map(|(wave, term)| wave * term).sum(), waves)
    }

    pub(super) fn learn(&mut self, surprise: f64, waves: &Waves, slope: f64, noise: f64) {
        let waves = waves.map(|wave| slope * wave);
        let mut towards = [0.0; TERMS];
        for (towards, row) in towards.iter_mut().zip(&self.covariance) {
            *towards = row.iter().zip(&waves).map(|(p, wave)| p * wave).sum();
        }
        let variance = noise + towards.iter().zip(&waves).map(|(p, wave)| p * wave).sum::<f64>();
        for (term, towards) in self.terms.iter_mut().zip(&towards) {
            *term += towards / variance * surprise;
        }
        for (row, at_row) in self.covariance.iter_mut().zip(&towards) {
            let gain = at_row / variance;
            for (p, towards) in row.iter_mut().zip(&towards) {
                *p -= gain * towards;
            }
        }
    }
}

/// 1, then cosine and sine of each wave.
fn waves(at: u64) -> Waves {
    let (sin, cos) = ((at % DAY_MS) as f64 / DAY_MS as f64 * TAU).sin_cos();
    let mut waves = [1.0; TERMS];
    let (mut c, mut s) = (cos, sin);
    for wave in 0..WAVES {
        waves[1 + 2 * wave] = c;
        waves[2 + 2 * wave] = s;
        (c, s) = (c * cos - s * sin, s * cos + c * sin);
    }
    waves
}
