//! pm-eSR-S: the detector for values in `[0, 1]`.

use pulp::{Arch, NullaryFnOnce};

use super::{
    Error, MIN_REFERENCE, Watch,
    lanes::{self, CAP, KAPPA, LANES, Row},
};

/// What is smaller than this beside a weight of 1 counts as 0, before it becomes subnormal and slow.
const NEGLIGIBLE: f64 = 1e-280;

/// The posterior-mixed e-SR statistic of a stream of values in `[0, 1]`, corrected for skew.
///
/// As [`Bernoulli`](super::Bernoulli), with the pseudo-posterior `exp(−N (x̄ − p_g)² / 2v_g)` of the mean and the
/// e-values `1 ± λ (x − p_g)`. Mean and variance of a skewed sample err together, which is why `v_g` follows `p_g`
/// by the third moment. Kept is `weight_g · R` as there.
#[derive(Debug, Clone, PartialEq)]
pub struct Bounded {
    reference: u64,
    moments: Moments,
    watch: Watch,
    /// `p_g`.
    mean: Row,
    /// `1 / 2v_g`.
    sharpness: Row,
    /// `λ` with its sign, by alternative.
    bet: Vec<Row>,
    /// Readings so far and their sum, the reference included.
    count: f64,
    sum: f64,
    /// The logarithm of the weights, the largest 0; then the weights.
    log: Row,
    weight: Row,
    /// `weight · R`, by alternative.
    mixture: Vec<Row>,
}

/// The reference in three numbers: mean, variance (by `n − 1`) and third central moment (by `n`).
#[derive(Debug, Clone, Copy, PartialEq)]
struct Moments {
    mean: f64,
    variance: f64,
    third: f64,
}

impl Bounded {
    /// `reference` are the readings of the baseline, each in `[0, 1]`.
    pub fn learn(reference: &[f64], watch: Watch) -> Result<Self, Error> {
        if reference.len() < MIN_REFERENCE {
            return Err(Error::ShortReference(reference.len()));
        }
        let n = reference.len() as f64;
        let mean = reference.iter().sum::<f64>() / n;
        let variance = reference.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let third = reference.iter().map(|x| (x - mean).powi(3)).sum::<f64>() / n;
        Ok(Self::new(reference.len() as u64, Moments { mean, variance, third }, watch))
    }

    fn new(reference: u64, moments: Moments, watch: Watch) -> Self {
        let n = reference as f64;
        let Moments { mean, variance, third } = moments;
        // A reference that never moved is no proof that it cannot: it gets the variance that one move in n
        // readings by 1/√n would show.
        let variance = variance.max((n + 1.0).powi(-2));
        let sd = variance.sqrt();
        let centre = lanes::grid(|z| (mean + z * sd / n.sqrt()).clamp(1e-4, 1.0 - 1e-4));
        let sharpness = centre.map(|p| {
            let skewed = variance + third / variance * (p - mean);
            0.5 / skewed.clamp(0.4 * variance, 2.5 * variance)
        });
        let size = KAPPA.map(|kappa| kappa / (sd * (1.0 + kappa * kappa)));
        let mut bet = Vec::with_capacity(2 * KAPPA.len());
        if watch.up() {
            bet.extend(size.map(|lambda| centre.map(|p| lambda.min(CAP / p))));
        }
        if watch.down() {
            bet.extend(size.map(|lambda| centre.map(|p| -lambda.min(CAP / (1.0 - p)))));
        }
        let mixture = vec![[0.0; LANES]; bet.len()];
        let mut detector = Self {
            reference,
            moments,
            watch,
            mean: centre,
            sharpness,
            bet,
            count: n,
            sum: mean * n,
            log: [0.0; LANES],
            weight: [0.0; LANES],
            mixture,
        };
        detector.weigh();
        detector
    }

    /// Takes one reading and returns the statistic `M`.
    #[inline]
    pub fn update(&mut self, reading: f64) -> f64 {
        self.count += 1.0;
        self.sum += reading;
        let mixture = Arch::new().dispatch(Step { reading, detector: self });
        mixture / self.mixture.len() as f64
    }

    /// The statistic `M` after the newest reading; 0 before the first.
    pub fn statistic(&self) -> f64 {
        let mut total = [0.0; LANES];
        for row in &self.mixture {
            for (total, x) in total.iter_mut().zip(row) {
                *total += x;
            }
        }
        lanes::sum(&total) / lanes::sum(&self.weight) / self.mixture.len() as f64
    }

    /// The weights from `count` and `sum`.
    #[inline(always)]
    fn weigh(&mut self) {
        let (count, sum) = (self.count, self.sum);
        let mut log = [0.0; LANES];
        for g in 0..LANES {
            let distance = sum - count * self.mean[g];
            log[g] = -(distance * distance / count) * self.sharpness[g];
        }
        let top = lanes::max(&log);
        for log in &mut log {
            *log -= top;
        }
        self.log = log;
        let live = lanes::live();
        let weight = lanes::exp(&log);
        for g in 0..LANES {
            self.weight[g] = weight[g] * live[g];
        }
    }
}

struct Step<'a> {
    reading: f64,
    detector: &'a mut Bounded,
}

impl NullaryFnOnce for Step<'_> {
    type Output = f64;

    /// The mean over the posterior of the sum of `R` over the alternatives.
    #[inline(always)]
    fn call(self) -> f64 {
        let Self { reading, detector } = self;
        let (log, weight) = (detector.log, detector.weight);
        detector.weigh();
        let mut change = [0.0; LANES];
        for g in 0..LANES {
            change[g] = detector.log[g] - log[g];
        }
        let factor = lanes::exp(&change);
        let mut excess = [0.0; LANES];
        for g in 0..LANES {
            excess[g] = factor[g] * (reading - detector.mean[g]);
        }
        let mut total = [0.0; LANES];
        for (row, bet) in detector.mixture.iter_mut().zip(&detector.bet) {
            for g in 0..LANES {
                let x = (row[g] + weight[g]) * (factor[g] + bet[g] * excess[g]);
                row[g] = if x < NEGLIGIBLE { 0.0 } else { x };
                total[g] += row[g];
            }
        }
        lanes::sum(&total) / lanes::sum(&detector.weight)
    }
}
