//! pm-eSR-B: the detector for bits.

use std::f64::consts::FRAC_PI_2;

use pulp::{Arch, NullaryFnOnce};

use super::{
    Error, MIN_REFERENCE, Watch,
    lanes::{self, CAP, KAPPA, LANES, Row},
};

/// Below this sum the weights are scaled back to 1, and what is smaller still by as much again counts as 0.
const RESCALE: f64 = 1e-100;
const NEGLIGIBLE: f64 = 1e-150;

/// The posterior-mixed e-SR statistic of a stream of bits.
///
/// With the unknown rate on a grid `p_g` around the reference's, and alternatives `q` in five sizes and up to two
/// directions, `R ← (R + 1)·(q/p_g or (1−q)/(1−p_g))` for each pair, and `M` is the mean of `R` under the
/// posterior of `p_g` given all readings. Kept is `weight_g · R` with an unnormalised posterior `weight_g`: its
/// update is one addition and one product, needs no `exp`, and neither overflows nor underflows in the long run,
/// when `R` of an unlikely `p_g` alone would.
#[derive(Debug, Clone, PartialEq)]
pub struct Bernoulli {
    reference: u64,
    successes: u64,
    watch: Watch,
    /// The probability of a 0 and of a 1 under each `p_g`.
    chance: [Row; 2],
    /// The same under each alternative: by bit, then by alternative.
    alternative: [Vec<Row>; 2],
    weight: Row,
    /// `weight · R`, by alternative.
    mixture: Vec<Row>,
}

impl Bernoulli {
    /// `reference` are the readings of the baseline, each 0 or 1.
    pub fn learn(reference: &[f64], watch: Watch) -> Result<Self, Error> {
        let successes = reference.iter().filter(|&&x| x > 0.5).count();
        Self::new(reference.len() as u64, successes as u64, watch)
    }

    /// The baseline as counts: `successes` of `reference` readings were 1.
    pub fn new(reference: u64, successes: u64, watch: Watch) -> Result<Self, Error> {
        if reference < MIN_REFERENCE as u64 {
            return Err(Error::ShortReference(reference as usize));
        }
        let (n, s) = (reference as f64, successes.min(reference) as f64);
        let centre = ((s + 0.5) / (n + 1.0)).sqrt().asin();
        let rate = lanes::grid(|z| {
            (centre + z / (2.0 * (n + 1.0).sqrt())).clamp(1e-4, FRAC_PI_2 - 1e-4).sin().powi(2)
        });
        let mut one = Vec::with_capacity(2 * KAPPA.len());
        if watch.up() {
            one.extend(KAPPA.map(|kappa| {
                rate.map(|p| (p + kappa * (p * (1.0 - p)).sqrt()).min(1.0 - (1.0 - p) * (1.0 - CAP)))
            }));
        }
        if watch.down() {
            one.extend(
                KAPPA.map(|kappa| rate.map(|p| (p - kappa * (p * (1.0 - p)).sqrt()).max(p * (1.0 - CAP)))),
            );
        }
        let zero = one.iter().map(|row| row.map(|q| 1.0 - q)).collect();
        let mixture = vec![[0.0; LANES]; one.len()];
        let mut detector = Self {
            reference,
            successes: successes.min(reference),
            watch,
            chance: [rate.map(|p| 1.0 - p), rate],
            alternative: [zero, one],
            weight: [0.0; LANES],
            mixture,
        };
        detector.weigh();
        Ok(detector)
    }

    /// Takes one bit and returns the statistic `M`.
    #[inline]
    pub fn update(&mut self, reading: bool) -> f64 {
        let bit = usize::from(reading);
        let Sums { weight, mixture } = Arch::new().dispatch(Step {
            chance: &self.chance[bit],
            alternative: &self.alternative[bit],
            weight: &mut self.weight,
            mixture: &mut self.mixture,
        });
        if weight < RESCALE {
            self.rescale(weight);
        }
        mixture / (weight * self.mixture.len() as f64)
    }

    /// The statistic `M` after the newest reading; 0 before the first.
    pub fn statistic(&self) -> f64 {
        let mut total = [0.0; LANES];
        for row in &self.mixture {
            for (total, x) in total.iter_mut().zip(row) {
                *total += x;
            }
        }
        lanes::sum(&total) / (lanes::sum(&self.weight) * self.mixture.len() as f64)
    }

    /// The weights that the reference gives.
    fn weigh(&mut self) {
        let (ones, zeros) = (self.successes as f64, (self.reference - self.successes) as f64);
        let mut log: Row = [0.0; LANES];
        for (g, log) in log.iter_mut().enumerate() {
            *log = ones * self.chance[1][g].ln() + zeros * self.chance[0][g].ln();
        }
        let top = lanes::max(&log);
        let live = lanes::live();
        self.weight = std::array::from_fn(|g| (log[g] - top).exp() * live[g]);
    }

    #[cold]
    fn rescale(&mut self, weight: f64) {
        let scale = 1.0 / weight;
        for row in std::iter::once(&mut self.weight).chain(&mut self.mixture) {
            for x in row {
                *x = if *x * scale < NEGLIGIBLE { 0.0 } else { *x * scale };
            }
        }
    }
}

struct Step<'a> {
    chance: &'a Row,
    alternative: &'a [Row],
    weight: &'a mut Row,
    mixture: &'a mut [Row],
}

struct Sums {
    weight: f64,
    mixture: f64,
}

impl NullaryFnOnce for Step<'_> {
    type Output = Sums;

    #[inline(always)]
    fn call(self) -> Sums {
        let Self { chance, alternative, weight, mixture } = self;
        let mut total = [0.0; LANES];
        for (row, alternative) in mixture.iter_mut().zip(alternative) {
            for g in 0..LANES {
                row[g] = (row[g] + weight[g]) * alternative[g];
                total[g] += row[g];
            }
        }
        for g in 0..LANES {
            weight[g] *= chance[g];
        }
        Sums { weight: lanes::sum(weight), mixture: lanes::sum(&total) }
    }
}
