//! What a stream's next reading is expected to be, learned reading by reading: its level, the hour of the day, and
//! what the same conversation or user has shown before.

use serde::{Deserialize, Serialize};

use super::{
    Kind, MIN_REFERENCE, bits,
    change::Past,
    season::{Season, Waves},
};

/// Correlation within a conversation before any is measured, and the readings that this guess is worth.
const KINSHIP: f64 = 0.3;
const KINSHIP_READINGS: f64 = 20.0;

/// What came before a reading from the same conversation, user or rater: such readings are alike, and one of them
/// tells less than an independent one.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Kin {
    /// Earlier readings; 0 is none.
    #[serde(with = "bits")]
    pub readings: f64,
    /// Their mean deviation from what was expected of their streams, in standard deviations of these.
    #[serde(with = "bits")]
    pub deviation: f64,
}

impl Kin {
    /// Further back than so many readings nothing is remembered.
    const MEMORY: f64 = 20.0;

    /// With one more reading, and its [`Expected::deviation`].
    #[must_use]
    pub fn with(self, deviation: f64) -> Self {
        let readings = (self.readings + 1.0).min(Self::MEMORY);
        Self { readings, deviation: self.deviation + (deviation - self.deviation) / readings }
    }
}

/// A forecast of one reading.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expected {
    /// Mean for this stream at this hour.
    pub base: f64,
    /// Standard deviation around `base`.
    sd: f64,
    /// Mean given the conversation too.
    pub mean: f64,
    /// Standard deviation around `mean`.
    pub spread: f64,
    /// What a change by one standard deviation of an ordinary reading moves this one by, in its own.
    pub weight: f64,
    /// How far `mean` follows `base`, and the variance around `mean` over that around `base`.
    slope: f64,
    noise: f64,
    kin: Kin,
    waves: Waves,
}

impl Expected {
    /// By how many of its standard deviations a reading deviates from [`Expected::base`].
    pub fn deviation(&self, reading: f64) -> f64 {
        (reading - self.base) / self.sd
    }
}

/// The posterior of a stream's mean, as a forecast of its next reading.
///
/// For bits without hours and conversations the level is the mean of the Beta posterior under Jeffreys' prior, so
/// that under the mixture of all rates by that prior a forecast is exactly the conditional mean. Hours and
/// conversations enter as random effects with a normal prior: a recursive least-squares fit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Baseline {
    kind: Kind,
    #[serde(with = "bits")]
    level: f64,
    /// Readings' worth of information on the level, the prior included.
    #[serde(with = "bits")]
    precision: f64,
    /// Readings, and the sums of squares and cubes around what was expected.
    #[serde(with = "bits")]
    count: f64,
    #[serde(with = "bits")]
    squares: f64,
    #[serde(with = "bits")]
    cubes: f64,
    /// Covariance and variance of readings with their kin, summed, in standard deviations.
    #[serde(with = "bits")]
    shared: f64,
    #[serde(with = "bits")]
    own: f64,
    seasonal: bool,
    season: Option<Box<Season>>,
}

impl Baseline {
    pub(super) fn new(kind: Kind, seasonal: bool) -> Self {
        let (level, precision) = match kind {
            Kind::Bernoulli => (0.5, 1.0),
            Kind::Bounded => (0.5, 0.0),
        };
        Self {
            kind,
            level,
            precision,
            count: 0.0,
            squares: 0.0,
            cubes: 0.0,
            shared: 0.0,
            own: 0.0,
            seasonal,
            season: None,
        }
    }

    /// A new level that is known from `since` alone, with the course of the day and the kinship as they were.
    pub(super) fn anew(&self, since: Past) -> Self {
        let mut new = Self {
            season: self.season.clone(),
            shared: self.shared,
            own: self.own,
            ..Self::new(self.kind, self.seasonal)
        };
        let n = since.count as f64;
        new.precision += n;
        if new.precision > 0.0 {
            new.level = (new.level * (new.precision - n) + since.sum) / new.precision;
        }
        new.count = n;
        new.squares = (since.squares - since.sum * since.mean()).max(0.0);
        // The skew is not in the sums; its scale follows the spread.
        let scale = if self.squares > 0.0 && self.count > 0.0 {
            (new.squares / n.max(1.0)) / (self.squares / self.count)
        } else {
            0.0
        };
        new.cubes = self.cubes / self.count.max(1.0) * n * scale.powf(1.5);
        if let Some(season) = &mut new.season {
            season.restart(new.level, new.precision);
        }
        new
    }

    pub(super) fn mean(&self) -> f64 {
        self.season.as_ref().map_or(self.level, |season| season.level())
    }

    pub(super) fn count(&self) -> f64 {
        self.count
    }

    /// Standard deviation of one reading.
    pub(super) fn spread(&self) -> f64 {
        self.variance(self.mean()).sqrt()
    }

    fn variance(&self, mean: f64) -> f64 {
        match self.kind {
            Kind::Bernoulli => mean * (1.0 - mean),
            // Readings that never moved are no proof that they cannot.
            Kind::Bounded => (self.squares / (self.count - 1.0).max(1.0)).max((self.count + 1.0).powi(-2)),
        }
    }

    /// Neither a level nor a forecast is nearer to 0 or 1 than this.
    fn least(&self) -> f64 {
        match self.kind {
            // A little less than after as many bits of one kind under Jeffreys' prior.
            Kind::Bernoulli => 0.45 / (self.count + 1.0),
            Kind::Bounded => 1e-9,
        }
    }

    /// Correlation of two readings of one conversation.
    fn kinship(&self) -> f64 {
        ((self.shared + KINSHIP * KINSHIP_READINGS) / (self.own + KINSHIP_READINGS)).clamp(0.0, 0.98)
    }

    #[inline]
    pub(super) fn expect(&self, at: u64, kin: Kin) -> Expected {
        let (level, waves) = match &self.season {
            Some(season) => season.expect(at),
            None => (self.level, Waves::default()),
        };
        // Mean and variance of a skewed sample err together: with a mean that is too low the spread is too low and
        // bets are too large. To first order this moves what a bet should be made against.
        let skew = match self.kind {
            Kind::Bernoulli => 0.0,
            Kind::Bounded => self.cubes / (2.0 * self.variance(level) * self.count.max(1.0).powi(2)),
        };
        // However far an hour or a conversation deviates, what the stream shows otherwise stays possible; and so many bits
        // make nothing surer than if they had all been alike.
        let least = self.least();
        let level_only = self.mean();
        let within = |x: f64| x.clamp(0.02 * level_only, 1.0 - 0.02 * (1.0 - level_only));
        let base = within(level + skew).clamp(least, 1.0 - least);
        let sd = self.variance(base).sqrt();
        if kin.readings == 0.0 {
            return Expected {
                base,
                sd,
                mean: base,
                spread: sd,
                weight: 1.0,
                slope: 1.0,
                noise: 1.0,
                kin,
                waves,
            };
        }
        let rho = self.kinship();
        let slope = (1.0 - rho) / (1.0 - rho + kin.readings * rho);
        let mean = within(base + (1.0 - slope) * kin.deviation * sd);
        let noise = match self.kind {
            Kind::Bernoulli => self.variance(mean) / self.variance(base),
            Kind::Bounded => (1.0 - rho) * (1.0 + rho / (1.0 - rho + kin.readings * rho)),
        };
        let (spread, weight) = (noise.sqrt() * sd, slope / noise.sqrt());
        Expected { base, sd, mean, spread, weight, slope, noise, kin, waves }
    }

    #[inline]
    pub(super) fn learn(&mut self, reading: f64, expected: &Expected) {
        let surprise = reading - expected.mean;
        if expected.kin.readings > 0.0 {
            self.shared += expected.kin.readings * expected.kin.deviation * expected.deviation(reading);
            self.own += expected.kin.readings;
        }
        if self.kind == Kind::Bounded {
            // West's update of central moments, with the forecast in the mean's place.
            let before = self.count;
            let n = before + 1.0;
            let step = surprise / n;
            let square = surprise * step * before;
            self.cubes += square * step * (n - 2.0) - 3.0 * step * self.squares;
            self.squares += square;
        }
        self.count += 1.0;
        let (slope, noise) = (expected.slope, expected.noise);
        let least = self.least();
        if let Some(season) = &mut self.season {
            season.learn(surprise, &expected.waves, slope, noise);
            season.keep_within(least);
            return;
        }
        self.precision += slope * slope / noise;
        self.level += slope / noise / self.precision * surprise;
        self.level = self.level.clamp(least, 1.0 - least);
        if self.seasonal && self.count >= MIN_REFERENCE as f64 {
            let amplitude = self.level.min(1.0 - self.level) / self.spread();
            self.season = Some(Box::new(Season::new(self.level, self.precision, amplitude)));
        }
    }
}
