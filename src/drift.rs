//! Drift: is a signal still what it was? Numbers in, numbers out; no IO, no clock, no model.
//!
//! A [`Stream`] first learns a *reference* of a signal's readings, then forecasts each further one and bets against
//! the forecast, which carries how uncertain the reference is ([`Predictive`]), what the hour of the day does, and
//! what the same conversation has shown ([`Kin`]). The only thing to choose is a budget of false alarms
//! ([`threshold`]): an alarm at `M ≥ A` comes about once in `A` readings, or later, while nothing changes. At an alarm
//! [`change_point`] says since when, [`shares`] which kind of request it is, and [`parts`] and [`few_moved`] whether
//! it is the traffic or the raters. A [`Monitor`] keeps one stream for each key. [`Bernoulli`] and [`Bounded`] are
//! the published posterior-mixed e-SR that all this is measured against.
//!
//! The e-SR statistic: Shin, Ramdas, Rinaldo, *E-detectors: a nonparametric framework for sequential change
//! detection*, New England Journal of Statistics in Data Science (2024).

mod baseline;
mod bernoulli;
mod bits;
mod bounded;
mod change;
mod history;
mod lanes;
mod monitor;
mod predictive;
mod season;
mod shares;
mod stream;
mod strict;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use baseline::{Expected, Kin};
pub use bernoulli::Bernoulli;
pub use bounded::Bounded;
pub use change::{ChangePoint, change_point};
pub use monitor::{Monitor, Observed, Saved};
pub use predictive::Predictive;
pub use shares::{Segment, few_moved, parts, shares};
pub use stream::{Alarm, Change, Moved, Reading, Row, Setup, Stream};

/// The shortest reference: below it the grid that stands for its uncertainty says little.
pub const MIN_REFERENCE: usize = 30;

/// Beyond this a threshold can no longer be told from "never", and sums stay far from the end of `f64`.
const MAX_THRESHOLD: f64 = 1e100;

/// What is watched and how often it may cry wolf (`[drift]`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Readings of a stream that make its baseline; at least 30. Fewer learn sooner and alarm later.
    pub reference: usize,
    /// The budget: at most one false alarm in so many days, over all streams together.
    pub false_alarm_days: f64,
    /// Readings a day that one stream gets. Unset, it is measured while the stream learns its reference.
    pub events_per_day: Option<f64>,
    /// No stream alarms below this evidence, however little traffic it has; at least 1. At the default a false
    /// alarm comes at most about once in a hundred readings, which is what seeing a rate triple takes anyway.
    pub minimum_threshold: f64,
    /// Whether the course of the day is learned, so that a rate that swings with the hour is no drift.
    pub seasonal: bool,
    /// Whether STRICT runs beside, whose bound on false alarms is a theorem and which is slower: its evidence is shown
    /// with each stream and each alarm, and raises none.
    pub strict: bool,
    /// Streams that are kept at most; each holds a few kilobytes of state and its newest readings.
    pub max_streams: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            reference: 1000,
            false_alarm_days: 30.0,
            events_per_day: None,
            minimum_threshold: 100.0,
            seasonal: true,
            strict: false,
            max_streams: 1024,
        }
    }
}

impl Config {
    /// Names the first field whose value cannot work.
    pub fn check(&self) -> Result<(), Error> {
        let field = |field, problem| Err(Error::Config { field, problem });
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if self.reference < MIN_REFERENCE {
            return field("reference", "must be at least 30");
        }
        if !positive(self.false_alarm_days) {
            return field("false_alarm_days", "must be a positive number");
        }
        if self.events_per_day.is_some_and(|rate| !positive(rate)) {
            return field("events_per_day", "must be a positive number");
        }
        if !(1.0..=MAX_THRESHOLD).contains(&self.minimum_threshold) {
            return field("minimum_threshold", "must be between 1 and 1e100");
        }
        if self.max_streams == 0 {
            return field("max_streams", "must be at least 1");
        }
        Ok(())
    }

    /// The threshold of one stream of `streams` that gets `events_per_day` readings.
    fn threshold(&self, events_per_day: f64, streams: usize) -> f64 {
        threshold(self.false_alarm_days, events_per_day, streams).clamp(self.minimum_threshold, MAX_THRESHOLD)
    }
}

/// What can be wrong with what is put in.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("drift.{field} {problem}")]
    Config { field: &'static str, problem: &'static str },
    #[error("a reference takes at least {MIN_REFERENCE} readings, here are {0}")]
    ShortReference(usize),
    #[error("{0} is not a reading: bits are 0 or 1")]
    NotABit(f64),
    #[error("{0} is not a reading: scores are between 0 and 1")]
    OutOfRange(f64),
    #[error("there are {0} streams already, the most that is kept")]
    TooManyStreams(usize),
    #[error("the saved state {0}")]
    State(&'static str),
}

/// What a stream's readings are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// 0 or 1.
    Bernoulli,
    /// Any value in `[0, 1]`.
    Bounded,
}

impl Kind {
    /// Refuses what is not a reading of this kind, NaN included.
    pub fn check(self, reading: f64) -> Result<(), Error> {
        match self {
            Self::Bernoulli if reading != 0.0 && reading != 1.0 => Err(Error::NotABit(reading)),
            Self::Bounded if !(0.0..=1.0).contains(&reading) => Err(Error::OutOfRange(reading)),
            _ => Ok(()),
        }
    }
}

/// Which changes of the mean are looked for. One direction alone is seen 8–22% sooner than as one of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Watch {
    Up,
    Down,
    #[default]
    Both,
}

impl Watch {
    fn up(self) -> bool {
        self != Self::Down
    }

    fn down(self) -> bool {
        self != Self::Up
    }

    fn admits(self, change: f64) -> bool {
        match self {
            Self::Up => change > 0.0,
            Self::Down => change < 0.0,
            Self::Both => true,
        }
    }
}

/// Which way a mean moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Up,
    Down,
}

/// Where a stream stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The reference is being filled; nothing can alarm.
    Learning,
    Steady,
    /// The evidence passed the threshold, and the stream waits to be reset.
    Alarm,
}

/// Which detector watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Constants {
    /// pm-eSR with the constants that were published with it.
    Reference,
    /// The best that we know: [`Predictive`].
    #[default]
    Default,
}

/// A detector over either kind of reading, for readings that have no hour and no conversation.
#[derive(Debug, Clone, PartialEq)]
pub enum Detector {
    Bernoulli(Bernoulli),
    Bounded(Bounded),
    Predictive(Predictive),
}

impl Detector {
    /// Learns the baseline from `reference`, at least [`MIN_REFERENCE`] readings of `kind`.
    pub fn learn(constants: Constants, kind: Kind, reference: &[f64], watch: Watch) -> Result<Self, Error> {
        Ok(match (constants, kind) {
            (Constants::Default, _) => Self::Predictive(Predictive::learn(kind, reference, watch)?),
            (Constants::Reference, Kind::Bernoulli) => Self::Bernoulli(Bernoulli::learn(reference, watch)?),
            (Constants::Reference, Kind::Bounded) => Self::Bounded(Bounded::learn(reference, watch)?),
        })
    }

    /// Takes one reading, already checked by [`Kind::check`], and returns the statistic `M`.
    #[inline]
    pub fn update(&mut self, reading: f64) -> f64 {
        match self {
            Self::Bernoulli(bits) => bits.update(reading > 0.5),
            Self::Bounded(scores) => scores.update(reading),
            Self::Predictive(any) => any.update(reading),
        }
    }

    /// `log10 M`; 0 before the first reading after the reference.
    pub fn evidence_log10(&self) -> f64 {
        let statistic = match self {
            Self::Bernoulli(bits) => bits.statistic(),
            Self::Bounded(scores) => scores.statistic(),
            Self::Predictive(any) => any.statistic(),
        };
        evidence_log10(statistic)
    }
}

/// The statistic `M` as it is shown; finite, so that JSON can hold it.
fn evidence_log10(statistic: f64) -> f64 {
    if statistic > 0.0 { statistic.min(f64::MAX).log10() } else { 0.0 }
}

/// The threshold `A` for at most one false alarm in `days` over `streams` streams with equal budgets, for the
/// stream that gets `events_per_day` readings: by linearity of expectation, whatever the dependence between them.
pub fn threshold(days: f64, events_per_day: f64, streams: usize) -> f64 {
    days * events_per_day * streams as f64
}
