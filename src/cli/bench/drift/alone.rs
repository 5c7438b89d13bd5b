//! Studies of one stream.

use std::{fs, io::Write, path::Path};

use serde_json::json;

use crate::drift::{Constants, Detector, Error as DriftError, Kin, Reading, Setup, Stream, Watch};

use super::{
    Error, Line,
    draw::{Law, Random},
    line, rounded,
};

/// The budget that the studies promise: one false alarm in so many readings.
const BUDGET: f64 = 1e4;

/// Readings of a reference, and readings before a change in all.
const REFERENCE: usize = 1000;
const CHANGE: usize = 2000;

fn learned(constants: Constants, law: Law, n: usize, random: &mut Random) -> Result<Detector, DriftError> {
    let reference: Vec<f64> = (0..n).map(|_| law.draw(random)).collect();
    Detector::learn(constants, law.kind(), &reference, Watch::Both)
}

/// First false alarms over their budget, `A · alarms / readings`, with each run ended by its alarm or by `longest`.
pub(super) fn arl(runs: usize) -> Result<Vec<Line>, Error> {
    let rates = [0.005, 0.02, 0.1, 0.3, 0.5].map(Law::Rate);
    let mut lines = Vec::new();
    for (seed, law) in (1000..).zip(rates.into_iter().chain(Law::SKEWED)) {
        for reference in [300, 1000, 5000] {
            let mut columns = vec![];
            for (longest, runs) in [(2_000, 4 * runs), (20_000, runs), (100_000, runs.div_ceil(2))] {
                let mut random = Random::new(seed * 7 + reference as u64 + longest);
                let (mut alarms, mut readings) = (0.0, 0);
                for _ in 0..runs {
                    let mut detector = learned(Constants::Default, law, reference, &mut random)?;
                    let alarm = (1..=longest).find(|_| detector.update(law.draw(&mut random)) >= BUDGET);
                    readings += alarm.unwrap_or(longest);
                    alarms += f64::from(u8::from(alarm.is_some()));
                }
                columns
                    .push((alarms * BUDGET / readings as f64, BUDGET * f64::sqrt(alarms) / readings as f64));
            }
            lines.push(line([
                ("law", json!(law.name())),
                ("reference", json!(reference)),
                ("first 2,000", rounded(columns[0].0, 2)),
                ("±", rounded(columns[0].1, 2)),
                ("first 20,000", rounded(columns[1].0, 2)),
                ("± ", rounded(columns[1].1, 2)),
                ("to 100,000", rounded(columns[2].0, 2)),
                ("±  ", rounded(columns[2].1, 2)),
            ]));
        }
    }
    Ok(lines)
}

/// A change that is to be found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    before: Law,
    after: Law,
    up: bool,
}

const fn step(before: Law, after: Law, up: bool) -> Step {
    Step { before, after, up }
}

pub(super) const STEPS: [Step; 8] = [
    step(Law::Rate(0.1), Law::Rate(0.15), true),
    step(Law::Rate(0.1), Law::Rate(0.2), true),
    step(Law::Rate(0.1), Law::Rate(0.3), true),
    step(Law::Rate(0.02), Law::Rate(0.06), true),
    step(Law::Rate(0.1), Law::Rate(0.05), false),
    step(Law::Rate(0.3), Law::Rate(0.2), false),
    step(Law::Rate(0.5), Law::Rate(0.4), false),
    step(Law::Beta(3.0, 7.0), Law::Beta(4.0, 6.0), true),
];

impl Step {
    pub(super) fn name(self) -> String {
        format!("{} to {}", self.before.name(), self.after.name().trim_start_matches("rate "))
    }

    /// The threshold of the CUSUM that knows both laws at which a false alarm comes once in the budget.
    fn cusum_threshold(self) -> f64 {
        let (mut low, mut high) = (1.0, 12.0);
        for round in 0..14 {
            let middle = (low + high) / 2.0;
            let mut random = Random::new(500 + round);
            let mut readings = 0.0;
            const ALARMS: u32 = 500;
            for _ in 0..ALARMS {
                let mut sum = 0f64;
                while sum < middle {
                    readings += 1.0;
                    sum = (sum + self.before.log_ratio(self.after, self.before.draw(&mut random))).max(0.0);
                }
            }
            *(if readings / f64::from(ALARMS) < BUDGET { &mut low } else { &mut high }) = middle;
        }
        (low + high) / 2.0
    }

    /// Writes streams without a change and with one, as `gyrostat backtest` reads them: for tuning other detectors
    /// to the same budget, and for comparing them on the streams that this study sees first.
    fn write(self, dir: &Path, seed: u64) -> Result<(), Error> {
        const STREAMS: usize = 300;
        fs::create_dir_all(dir)?;
        let name = self.name().replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "_");
        let file = |what: &str, seed: u64, stream: &dyn Fn(&mut Random) -> Vec<f64>| -> Result<(), Error> {
            let mut out =
                std::io::BufWriter::new(fs::File::create(dir.join(format!("{name}.{what}.jsonl")))?);
            let mut random = Random::new(seed);
            for id in 0..STREAMS {
                let data: Vec<f64> = stream(&mut random);
                writeln!(out, "{}", json!({ "id": id, "data": data }))?;
            }
            Ok(out.flush()?)
        };
        file("same", seed + 50, &|random| (0..20_000).map(|_| self.before.draw(random)).collect())?;
        file("change", seed, &|random| self.stream(CHANGE + CAP, random))
    }

    /// A stream that changes at [`CHANGE`].
    pub(super) fn stream(self, readings: usize, random: &mut Random) -> Vec<f64> {
        (0..readings).map(|at| if at < CHANGE { self.before } else { self.after }.draw(random)).collect()
    }
}

/// Mean delay with its standard error; an alarm before the change leaves a stream out, and none counts as the cap.
#[derive(Default)]
struct Delays(Vec<f64>);

impl Delays {
    fn add(&mut self, alarm: Option<usize>) {
        if alarm.is_none_or(|at| at >= CHANGE) {
            self.0.push(alarm.map_or(CAP, |at| at + 1 - CHANGE) as f64);
        }
    }

    fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    fn error(&self) -> f64 {
        let (n, mean) = (self.0.len() as f64, self.mean());
        (self.0.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt()
    }
}

/// A delay is counted up to this.
const CAP: usize = 4000;

/// Readings from a change to the alarm, at one false alarm in the budget for all: the optimal CUSUM is tuned to it
/// and knows both laws, the others know nothing but their reference.
pub(super) fn delay(runs: usize, write: Option<&Path>) -> Result<Vec<Line>, Error> {
    let mut lines = Vec::new();
    for (seed, step) in (2000..).zip(STEPS) {
        let threshold = step.cusum_threshold();
        if let Some(dir) = write {
            step.write(dir, seed)?;
        }
        let mut random = Random::new(seed);
        let [mut optimal, mut published, mut ours] = [(); 3].map(|()| Delays::default());
        for run in 0..runs {
            let data = step.stream(CHANGE + CAP, &mut random);
            let mut sum = 0f64;
            optimal.add(data.iter().position(|x| {
                sum = (sum + step.before.log_ratio(step.after, *x)).max(0.0);
                sum >= threshold
            }));
            let kind = step.before.kind();
            for (constants, delays) in
                [(Constants::Reference, &mut published), (Constants::Default, &mut ours)]
            {
                // The published detector is slow to simulate, and its figures are known.
                if constants == Constants::Reference && run >= runs.div_ceil(4) {
                    continue;
                }
                let mut detector = Detector::learn(constants, kind, &data[..REFERENCE], Watch::Both)?;
                let alarm = data[REFERENCE..].iter().position(|x| detector.update(*x) >= BUDGET);
                delays.add(alarm.map(|at| at + REFERENCE));
            }
        }
        lines.push(line([
            ("change", json!(step.name())),
            ("optimal CUSUM", rounded(optimal.mean(), 1)),
            ("±", rounded(optimal.error(), 1)),
            ("default", rounded(ours.mean(), 1)),
            ("± ", rounded(ours.error(), 1)),
            ("ratio", rounded(ours.mean() / optimal.mean(), 2)),
            ("reference", rounded(published.mean(), 1)),
            ("±  ", rounded(published.error(), 1)),
            ("its ratio", rounded(published.mean() / optimal.mean(), 2)),
        ]));
    }
    Ok(lines)
}

/// How often the stated range of the change point holds the change, how wide it is, and how far its middle is off.
pub(super) fn change(runs: usize) -> Result<Vec<Line>, Error> {
    let mut lines = Vec::new();
    for (seed, step) in (3000..).zip(STEPS) {
        let mut random = Random::new(seed);
        let (mut held, mut found, mut right) = (0, 0, 0);
        let (mut errors, mut widths) = (Vec::new(), Vec::new());
        let setup = Setup {
            kind: step.before.kind(),
            watch: Watch::Both,
            reference: REFERENCE,
            seasonal: false,
            strict: false,
        };
        for _ in 0..runs {
            let mut stream = Stream::new(setup);
            for (at, value) in (0..).zip(step.stream(CHANGE + CAP, &mut random)) {
                let reading = Reading { value, at, kin: Kin::default() };
                let Some(alarm) = stream.observe(reading, |_| BUDGET)? else { continue };
                if at >= CHANGE as u64 {
                    let (from, to) = (alarm.change.from, alarm.change.to);
                    found += 1;
                    held += u32::from((from..=to).contains(&(CHANGE as u64)));
                    right += u32::from((alarm.current > alarm.baseline) == step.up);
                    widths.push(to - from);
                    errors.push(alarm.change.at.abs_diff(CHANGE as u64));
                }
                break;
            }
        }
        errors.sort_unstable();
        widths.sort_unstable();
        let part = |count: u32| rounded(f64::from(count) / f64::from(found.max(1)), 3);
        lines.push(line([
            ("change", json!(step.name())),
            ("alarms", json!(found)),
            ("range holds it", part(held)),
            ("range, median", json!(widths.get(widths.len() / 2))),
            ("error, median", json!(errors.get(errors.len() / 2))),
            ("error, 90%", json!(errors.get(errors.len() * 9 / 10))),
            ("direction right", part(right)),
        ]));
    }
    Ok(lines)
}
