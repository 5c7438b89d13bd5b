//! The predictive e-SR statistic: bets against the forecast of each reading.

use pulp::{Arch, NullaryFnOnce};
use serde::{Deserialize, Serialize};

use super::{
    Error, Kind, MIN_REFERENCE, Watch,
    baseline::{Baseline, Expected, Kin},
    bits,
};

/// Sizes of the changes that are bet on, in standard deviations of a reading, and the parts of the bets that they
/// get. Found by search over simulated streams for the delay over that of CUSUM (`gyrostat bench drift --delay`).
const KAPPA: [f64; 8] = [0.05, 0.08, 0.125, 0.2, 0.32, 0.5, 0.8, 1.28];
const PART: [f64; 8] = [1.0, 2.0, 5.0, 5.0, 6.0, 8.0, 4.0, 1.0];
const BETS: usize = 2 * KAPPA.len();

/// What is rare can become common by more than what is common can become rarer, so changes towards 1/2 get more:
/// those away from it lose this much of their part times the distance from 1/2 (over 1/2).
const AWAY: f64 = 0.375;

/// A bet risks at most this part of what it has.
const RISK: f64 = 0.95;

/// An alarm comes on average so far beyond its threshold that the mean time to a false alarm would be `A / 0.93`
/// and more; dividing the statistic by this gives back what was saved.
const OVERSHOOT: f64 = 0.93;

/// Evidence beyond this says no more, and stays far from the end of `f64`.
const MOST: f64 = 1e200;

/// One e-SR statistic for each size and direction of change, in a weighted sum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Bets {
    #[serde(with = "bits::array")]
    weight: [f64; BETS],
    #[serde(with = "bits::array")]
    evidence: [f64; BETS],
}

impl Bets {
    /// Bets on a stream with this mean and standard deviation: what would pass the interval's ends is left out.
    pub(super) fn new(kind: Kind, mean: f64, spread: f64, watch: Watch) -> Self {
        let away = 1.0 - AWAY * (1.0 - 2.0 * mean).abs();
        let (up, down) = if mean < 0.5 { (1.0, away) } else { (away, 1.0) };
        let mut weight = [0.0; BETS];
        for (at, (kappa, part)) in KAPPA.iter().zip(PART).enumerate() {
            let stake = stake(kind, *kappa) / spread;
            if watch.up() && (at == 0 || stake * mean <= 1.0) {
                weight[at] = up * part;
            }
            if watch.down() && (at == 0 || stake * (1.0 - mean) <= 1.0) {
                weight[KAPPA.len() + at] = down * part;
            }
        }
        let total: f64 = weight.iter().sum();
        Self { weight: weight.map(|w| w / total), evidence: [0.0; BETS] }
    }

    /// Takes one reading and returns the statistic `M`.
    #[inline]
    pub(super) fn update(&mut self, kind: Kind, reading: f64, expected: &Expected) -> f64 {
        Arch::new().dispatch(Step { kind, reading, expected, bets: self }) / OVERSHOOT
    }

    pub(super) fn statistic(&self) -> f64 {
        self.evidence.iter().sum::<f64>() / OVERSHOOT
    }

    pub(super) fn restart(&mut self) {
        self.evidence = [0.0; BETS];
    }
}

struct Step<'a> {
    kind: Kind,
    reading: f64,
    expected: &'a Expected,
    bets: &'a mut Bets,
}

impl NullaryFnOnce for Step<'_> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        let Expected { mean, spread, weight, .. } = *self.expected;
        let (most, least) = (RISK / mean, -RISK / (1.0 - mean));
        let (surprise, scale) = (self.reading - mean, weight / spread);
        let stakes = match self.kind {
            Kind::Bernoulli => &STAKES[0],
            Kind::Bounded => &STAKES[1],
        };
        let Bets { weight, evidence } = self.bets;
        let mut sums = [0.0; 8];
        for at in 0..BETS {
            let stake = stakes[at] * scale;
            let stake = if stake < most { stake } else { most };
            let stake = if stake > least { stake } else { least };
            let grown = (evidence[at] + weight[at]) * (1.0 + stake * surprise);
            evidence[at] = if grown < MOST { grown } else { MOST };
            sums[at % 8] += evidence[at];
        }
        // One fixed order, so that every instruction set gives the same bits.
        ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))
    }
}

/// The stakes over the standard deviation, for bits and for scores: upwards, then downwards.
const STAKES: [[f64; BETS]; 2] = [stakes(Kind::Bernoulli), stakes(Kind::Bounded)];

const fn stakes(kind: Kind) -> [f64; BETS] {
    let mut stakes = [0.0; BETS];
    let mut at = 0;
    while at < KAPPA.len() {
        stakes[at] = stake(kind, KAPPA[at]);
        stakes[KAPPA.len() + at] = -stakes[at];
        at += 1;
    }
    stakes
}

/// The stake that grows fastest after a change by `kappa`, times the standard deviation. Bits lose variance as they
/// change in the way that makes it `kappa`; for other readings the variance stays.
const fn stake(kind: Kind, kappa: f64) -> f64 {
    match kind {
        Kind::Bernoulli => kappa,
        Kind::Bounded => kappa / (1.0 + kappa * kappa),
    }
}

/// The detector that is used unless the published constants are asked for: pe-SR.
///
/// Each reading `x` is forecast as `r` from all before it, the reference included ([`Baseline`]); for each size and
/// direction of change `R ← (R + w)·(1 + λ(x − r))`, and `M` is the sum of the `R`. As `r` is the mean of `x` given
/// the past under the prior mixture of all baselines, `E[M_τ] = E[τ]` there, so that `M ≥ A` comes once in `A`
/// readings or later while nothing changes. No grid stands for the unknown baseline: its uncertainty is carried by
/// the forecast, which follows the evidence, and the loss of that against a grid is smaller than that of the grid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Predictive {
    kind: Kind,
    baseline: Baseline,
    bets: Bets,
}

impl Predictive {
    /// `reference` are the readings of the baseline.
    pub fn learn(kind: Kind, reference: &[f64], watch: Watch) -> Result<Self, Error> {
        if reference.len() < MIN_REFERENCE {
            return Err(Error::ShortReference(reference.len()));
        }
        let mut baseline = Baseline::new(kind, false);
        for &reading in reference {
            baseline.learn(reading, &baseline.expect(0, Kin::default()));
        }
        let bets = Bets::new(kind, baseline.mean(), baseline.spread(), watch);
        Ok(Self { kind, baseline, bets })
    }

    /// Takes one reading and returns the statistic `M`.
    #[inline]
    pub fn update(&mut self, reading: f64) -> f64 {
        let expected = self.baseline.expect(0, Kin::default());
        let statistic = self.bets.update(self.kind, reading, &expected);
        self.baseline.learn(reading, &expected);
        statistic
    }

    pub fn statistic(&self) -> f64 {
        self.bets.statistic()
    }

    /// Forgets the evidence.
    pub fn restart(&mut self) {
        self.bets.restart();
    }
}
