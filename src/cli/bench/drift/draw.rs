//! Random readings with known laws.

use std::f64::consts::TAU;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::drift::Kind;

/// A stream of random numbers; the same seed gives the same numbers everywhere.
pub(super) struct Random(StdRng);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// In `[0, 1)`.
    pub(super) fn uniform(&mut self) -> f64 {
        self.0.random()
    }

    pub(super) fn below(&mut self, most: usize) -> usize {
        self.0.random_range(0..most)
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.uniform()).ln()).sqrt() * (TAU * self.uniform()).cos()
    }

    /// Marsaglia and Tsang's method.
    fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let boost = self.uniform().powf(1.0 / shape);
            return self.gamma(shape + 1.0) * boost;
        }
        let d = shape - 1.0 / 3.0;
        loop {
            let x = self.normal();
            let v = (1.0 + x / (9.0 * d).sqrt()).powi(3);
            if v > 0.0 && (1.0 - self.uniform()).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }

    pub(super) fn beta(&mut self, a: f64, b: f64) -> f64 {
        let x = self.gamma(a);
        x / (x + self.gamma(b))
    }
}

/// How readings are distributed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Law {
    /// Bits with this rate.
    Rate(f64),
    Beta(f64, f64),
    /// 0 with this probability, else anything in `[0, 1]`.
    Zeros(f64),
    /// One to five stars, mostly five.
    Rating,
    /// The exponential of a normal variable with this mean and deviation, at most 1.
    LogNormal(f64, f64),
}

impl Law {
    /// Six laws of scores, all skewed.
    pub(super) const SKEWED: [Self; 6] = [
        Self::Beta(2.0, 30.0),
        Self::Zeros(0.8),
        Self::Zeros(0.95),
        Self::Rating,
        Self::LogNormal(-3.0, 0.8),
        Self::Beta(12.0, 1.0),
    ];

    pub(super) fn kind(self) -> Kind {
        if matches!(self, Self::Rate(_)) { Kind::Bernoulli } else { Kind::Bounded }
    }

    pub(super) fn name(self) -> String {
        match self {
            Self::Rate(rate) => format!("rate {rate}"),
            Self::Beta(a, b) => format!("beta({a}, {b})"),
            Self::Zeros(part) => format!("{:.0}% zeros", part * 100.0),
            Self::Rating => "stars".to_owned(),
            Self::LogNormal(mean, deviation) => format!("lognormal({mean}, {deviation})"),
        }
    }

    pub(super) fn draw(self, random: &mut Random) -> f64 {
        match self {
            Self::Rate(rate) => f64::from(u8::from(random.uniform() < rate)),
            Self::Beta(a, b) => random.beta(a, b),
            Self::Zeros(part) if random.uniform() < part => 0.0,
            Self::Zeros(_) => random.uniform(),
            Self::Rating => {
                let u = random.uniform();
                [0.6, 0.85, 0.93, 0.97].iter().filter(|&&below| u < below).count() as f64 / 4.0
            }
            Self::LogNormal(mean, deviation) => (mean + deviation * random.normal()).exp().min(1.0),
        }
    }

    /// The log-likelihood ratio of a reading, `after` over this; none where it is not needed.
    pub(super) fn log_ratio(self, after: Self, reading: f64) -> f64 {
        match (self, after) {
            (Self::Rate(p), Self::Rate(q)) if reading > 0.5 => (q / p).ln(),
            (Self::Rate(p), Self::Rate(q)) => ((1.0 - q) / (1.0 - p)).ln(),
            // B(3, 7) / B(4, 6) = 2.
            (Self::Beta(3.0, 7.0), Self::Beta(4.0, 6.0)) => (2.0 * reading / (1.0 - reading)).ln(),
            _ => f64::NAN,
        }
    }
}
