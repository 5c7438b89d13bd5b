//! `gyrostat bench drift`: what the detectors cost, and by simulation what their promises are worth.

mod alone;
mod draw;
mod together;

use std::{path::Path, time::Instant};

use clap::ValueEnum;
use serde_json::{Value, json};

use crate::drift::{Config, Constants, Detector, Kin, Kind, Monitor, Reading, Watch};

use super::Error;

/// One line of a table, by column.
pub(super) type Line = Vec<(&'static str, Value)>;

/// A promise that a simulation puts to the test. Every study draws from a seed of its own.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Study {
    /// False alarms over the budget, for rates and skewed scores.
    Arl,
    /// Delay over that of the optimal CUSUM.
    Delay,
    /// How often the range of the change point holds the change.
    Change,
    /// False alarms and delay where rates swing with the hour of the day.
    Season,
    /// False alarms and delay in conversations of dependent turns.
    Turns,
    /// False alarms where users come back with requests of other types.
    Users,
    /// False alarms over the budget of 50 streams together.
    Fleet,
    /// Alarms when only the shares of the types change.
    Mix,
    /// Which stream alarms when a type of 2% of the traffic changes.
    Rare,
}

impl Study {
    pub(super) fn run(self, runs: Option<usize>, write: Option<&Path>) -> Result<Vec<Line>, Error> {
        let runs = |usual: usize| runs.unwrap_or(usual).max(2);
        match self {
            Self::Arl => alone::arl(runs(1000)),
            Self::Delay => alone::delay(runs(2000), write),
            Self::Change => alone::change(runs(1000)),
            Self::Season => together::season(runs(500)),
            Self::Turns => together::turns(runs(500)),
            Self::Users => together::users(runs(200)),
            Self::Fleet => together::fleet(runs(500)),
            Self::Mix => together::mix(runs(200)),
            Self::Rare => together::rare(runs(200)),
        }
    }
}

/// A line from its columns.
pub(super) fn line<const N: usize>(columns: [(&'static str, Value); N]) -> Line {
    columns.into()
}

pub(super) fn rounded(x: f64, digits: i32) -> Value {
    let scale = 10f64.powi(digits);
    json!((x * scale).round() / scale)
}

/// Readings that are timed together.
const CHUNK: usize = 1000;

/// Times chunks of readings; the median leaves out those during which something else ran.
#[derive(Default)]
struct Clock(Vec<f64>);

impl Clock {
    fn time<T>(&mut self, chunk: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = chunk();
        self.0.push(started.elapsed().as_secs_f64() * 1e9 / CHUNK as f64);
        result
    }

    /// Nanoseconds a reading.
    fn median(mut self) -> f64 {
        self.0.sort_by(f64::total_cmp);
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// Nanoseconds that each detector takes for a reading.
pub(super) fn speed(constants: Constants, kind: Kind) -> Result<f64, Error> {
    const READINGS: usize = 500_000;
    let mut random = draw::Random::new(1);
    let law = if kind == Kind::Bernoulli { draw::Law::Rate(0.1) } else { draw::Law::Beta(3.0, 7.0) };
    let reference: Vec<f64> = (0..1000).map(|_| law.draw(&mut random)).collect();
    let rest: Vec<f64> = (0..READINGS).map(|_| law.draw(&mut random)).collect();
    let mut detector = Detector::learn(constants, kind, &reference, Watch::Both)?;
    let mut clock = Clock::default();
    let mut most = 0f64;
    for chunk in rest.chunks(CHUNK) {
        clock.time(|| most = chunk.iter().fold(most, |most, reading| most.max(detector.update(*reading))));
    }
    let nanoseconds = clock.median();
    // The statistic is used, so that the loop is not optimised away.
    if most.is_nan() { Err("the statistic is not a number".into()) } else { Ok(nanoseconds) }
}

/// A monitor of so many streams that get so many readings each, with the course of the day: nanoseconds a reading,
/// and the kilobytes of the process that a stream takes.
pub(super) fn monitor(streams: u32, readings: u32) -> Result<(f64, f64), Error> {
    let before = resident_kilobytes();
    let config = Config { reference: 60, max_streams: streams as usize, ..Config::default() };
    let mut monitor = Monitor::new(config)?;
    let mut random = draw::Random::new(2);
    let mut clock = Clock::default();
    for round in 0..readings {
        let values: Vec<(u32, bool)> = (0..streams).map(|key| (key, random.uniform() < 0.1)).collect();
        let at = u64::from(round) * 60_000;
        for chunk in values.chunks(CHUNK) {
            clock.time(|| {
                chunk.iter().try_for_each(|(key, value)| {
                    let reading = Reading { value: f64::from(u8::from(*value)), at, kin: Kin::default() };
                    monitor.show(key, Kind::Bernoulli, reading).map(drop)
                })
            })?;
        }
    }
    let kilobytes = (resident_kilobytes() - before) / f64::from(streams);
    Ok((clock.median(), kilobytes))
}

/// Memory of this process, as Linux counts it; 0 elsewhere.
fn resident_kilobytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()).and_then(|kb| kb.parse().ok()).unwrap_or(0.0)
}
