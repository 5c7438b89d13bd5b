//! STRICT: an e-SR statistic whose bound on false alarms is a theorem.

use serde::{Deserialize, Serialize};

use super::{Kind, bits};

/// The chance, on either side, that the confidence sequence ever misses the mean.
const DELTA: f64 = 0.05;

const KAPPA: [f64; 5] = [0.08, 0.16, 0.32, 0.64, 1.28];
const BETS: usize = 2 * KAPPA.len();

/// A bet risks at most this part of what it has.
const RISK: f64 = 0.95;

/// Bets against the ends of a confidence sequence instead of against a forecast.
///
/// While the sequence covers the mean, which it does for ever with probability `1 − 2δ`, every bet is fair or worse,
/// whatever the readings' law: they need only lie in `[0, 1]` and have a constant mean given the past. Then the mean
/// number of readings to `M ≥ A` is at least `A`. It takes 1.6 to 5 times as long as the best possible.
///
/// The sequences: for bits the mixture of Krichevsky and Trofimov, for scores the predictable empirical Bernstein
/// bound of Waudby-Smith and Ramdas, *Estimating means of bounded random variables by betting* (2024), theorem 2.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Strict {
    kind: Kind,
    /// Readings, their sum, and the sum of squares around the running mean.
    #[serde(with = "bits")]
    count: f64,
    #[serde(with = "bits")]
    sum: f64,
    #[serde(with = "bits")]
    squares: f64,
    /// For bits the logarithm of the mixture's likelihood; for scores the weights, the weighted sum and its variance.
    #[serde(with = "bits::array")]
    sequence: [f64; 3],
    /// The running intersection of the intervals.
    #[serde(with = "bits")]
    low: f64,
    #[serde(with = "bits")]
    high: f64,
    /// For bits, when the interval is next worked out: an intersection over fewer times covers as well.
    #[serde(with = "bits")]
    next: f64,
    #[serde(with = "bits::array")]
    evidence: [f64; BETS],
}

impl Strict {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            count: 0.0,
            sum: 0.0,
            squares: 0.0,
            sequence: [0.0; 3],
            low: 0.0,
            high: 1.0,
            next: 1.0,
            evidence: [0.0; BETS],
        }
    }

    /// Takes a reading; while `learning` it only narrows the interval.
    pub(super) fn update(&mut self, reading: f64, learning: bool) {
        if !learning {
            self.bet(reading);
        }
        let mean = (self.sum + 0.5) / (self.count + 1.0);
        match self.kind {
            Kind::Bernoulli => self.sequence[0] += if reading > 0.5 { mean.ln() } else { (1.0 - mean).ln() },
            Kind::Bounded => {
                let n = self.count + 1.0;
                let variance = (self.squares + 0.25) / n;
                let stake = (2.0 * (2.0 / DELTA).ln() / (variance * n * (1.0 + n).ln())).sqrt().min(0.5);
                self.sequence[0] += stake;
                self.sequence[1] += stake * reading;
                self.sequence[2] += (reading - mean).powi(2) * (-(1.0 - stake).ln() - stake);
            }
        }
        self.count += 1.0;
        self.sum += reading;
        self.squares += (reading - (self.sum + 0.5) / (self.count + 1.0)).powi(2);
        self.narrow();
    }

    fn bet(&mut self, reading: f64) {
        let mean = self.sum / self.count.max(1.0);
        let spread = match self.kind {
            Kind::Bernoulli => mean * (1.0 - mean),
            Kind::Bounded => self.squares / self.count.max(1.0),
        };
        let spread = spread.sqrt().max(1.0 / (self.count + 1.0));
        for (at, kappa) in KAPPA.iter().enumerate() {
            let stake = kappa / (spread * (1.0 + kappa * kappa));
            let up = 1.0 + stake.min(RISK / self.high.max(1e-9)) * (reading - self.high);
            let down = 1.0 - stake.min(RISK / (1.0 - self.low).max(1e-9)) * (reading - self.low);
            for (at, factor) in [(at, up), (KAPPA.len() + at, down)] {
                self.evidence[at] = ((self.evidence[at] + 1.0 / BETS as f64) * factor).min(1e200);
            }
        }
    }

    fn narrow(&mut self) {
        let (low, high) = match self.kind {
            Kind::Bounded => {
                let [weights, weighted, variance] = self.sequence;
                let (centre, half) = (weighted / weights, ((2.0 / DELTA).ln() + variance) / weights);
                (centre - half, centre + half)
            }
            Kind::Bernoulli => {
                if self.count < self.next {
                    return;
                }
                self.next = (self.count * 1.01).ceil();
                let (n, p) = (self.count, self.sum / self.count);
                let likelihood = |q: f64| {
                    let one = if p > 0.0 { p * q.ln() } else { 0.0 };
                    n * (one + if p < 1.0 { (1.0 - p) * (-q).ln_1p() } else { 0.0 })
                };
                // Beyond these the mixture is 1/δ times as likely as the rate.
                let least = self.sequence[0] - (1.0 / DELTA).ln();
                let end = |outside: f64| {
                    let (mut outside, mut inside) = (outside, p);
                    for _ in 0..40 {
                        let middle = (outside + inside) / 2.0;
                        *(if likelihood(middle) < least { &mut outside } else { &mut inside }) = middle;
                    }
                    outside
                };
                (end(0.0), end(1.0))
            }
        };
        self.low = self.low.max(low).min(1.0);
        self.high = self.high.min(high).max(0.0);
    }

    pub(super) fn statistic(&self) -> f64 {
        self.evidence.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every second or fourth reading is 1: the interval holds the rate, narrows, and a change is bet on.
    #[test]
    fn the_interval_holds_the_rate_and_a_change_is_seen() {
        for kind in [Kind::Bernoulli, Kind::Bounded] {
            let mut strict = Strict::new(kind);
            for at in 0..2000 {
                strict.update(f64::from(u8::from(at % 4 == 0)), at < 1000);
            }
            assert!(strict.low < 0.25 && 0.25 < strict.high, "{strict:?}");
            assert!(strict.high - strict.low < 0.15, "{strict:?}");
            assert!(strict.statistic() < 1000.0, "{strict:?}");
            for at in 0..400 {
                strict.update(f64::from(u8::from(at % 2 == 0)), false);
            }
            assert!(strict.statistic() > 1e4, "{strict:?}");
        }
    }
}
