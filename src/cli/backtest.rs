//! `gyrostat backtest`: a drift detector over recorded streams.

use std::{io::Write, time::Instant};

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use crate::drift::{self, Detector, Kind, MIN_REFERENCE, Watch, change_point};

use super::{Error, jsonl};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// One stream a line, {"id","data":[…]}; `-` is stdin.
    #[arg(long)]
    input: String,
    #[arg(long, value_enum)]
    signal: Signal,
    /// Readings at the beginning of each stream that are its reference.
    #[arg(long)]
    reference: usize,
    /// Mean number of readings to a false alarm: the threshold on the evidence.
    #[arg(long)]
    arl: f64,
    #[arg(long, value_enum, default_value_t = Direction::Both)]
    direction: Direction,
    /// `reference` is pm-eSR with its published constants, `default` the best that we know.
    #[arg(long, value_enum, default_value_t = Constants::Default)]
    constants: Constants,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Signal {
    Bernoulli,
    Bounded,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Direction {
    Up,
    Down,
    Both,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Constants {
    Reference,
    Default,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    if args.reference < MIN_REFERENCE || args.arl.is_nan() || args.arl < 1.0 {
        return Err(format!("--reference must be at least {MIN_REFERENCE} and --arl at least 1").into());
    }
    let kind = match args.signal {
        Signal::Bernoulli => Kind::Bernoulli,
        Signal::Bounded => Kind::Bounded,
    };
    let watch = match args.direction {
        Direction::Up => Watch::Up,
        Direction::Down => Watch::Down,
        Direction::Both => Watch::Both,
    };
    let constants = match args.constants {
        Constants::Reference => drift::Constants::Reference,
        Constants::Default => drift::Constants::Default,
    };
    let lines = jsonl::read(&args.input)?;
    let bar = jsonl::bar(lines.len() as u64, "streams");
    let mut out = jsonl::writer("-")?;
    let (mut samples, mut seconds) = (0, 0.0);
    for (line, object) in &lines {
        let data = data(*line, object, kind)?;
        if data.len() < args.reference {
            return Err(format!(
                "line {line}: `data` has {} readings, the reference needs {}",
                data.len(),
                args.reference
            )
            .into());
        }
        let (reference, rest) = data.split_at(args.reference);
        let mut detector = Detector::learn(constants, kind, reference, watch)?;
        let started = Instant::now();
        let alarm = rest.iter().position(|reading| detector.update(*reading) >= args.arl);
        seconds += started.elapsed().as_secs_f64();
        samples += alarm.map_or(rest.len(), |at| at + 1);
        let alarm = alarm.map(|at| at + args.reference);
        let change = alarm.and_then(|at| change_point(&data[..=at]));
        let id = object.get("id").cloned().unwrap_or(Value::Null);
        let result = json!({
            "id": id,
            "alarm": alarm,
            "change_point": change.map(|change| change.index),
            "evidence": detector.evidence_log10(),
        });
        writeln!(out, "{result}")?;
        bar.inc(1);
    }
    out.flush()?;
    bar.finish_and_clear();
    let nanoseconds = seconds * 1e9 / f64::from(u32::try_from(samples).unwrap_or(u32::MAX).max(1));
    writeln!(std::io::stderr(), "{samples} readings, {nanoseconds:.0} ns each")?;
    Ok(())
}

/// The readings of a line: a list of numbers, or a string of bits or of three-digit per-mille values (`enc`).
fn data(line: usize, object: &Map<String, Value>, kind: Kind) -> Result<Vec<f64>, Error> {
    let wrong = |what: String| -> Error { format!("line {line}: `data` {what}").into() };
    let encoding = object.get("enc").and_then(Value::as_str);
    let readings: Vec<f64> = match (object.get("data"), encoding) {
        (Some(Value::Array(readings)), _) => readings
            .iter()
            .enumerate()
            .map(|(at, reading)| reading.as_f64().ok_or_else(|| wrong(format!("[{at}] is no number"))))
            .collect::<Result<_, _>>()?,
        (Some(Value::String(bits)), Some("bit") | None) => {
            bits.bytes().map(|bit| f64::from(bit.wrapping_sub(b'0'))).collect()
        }
        (Some(Value::String(digits)), Some("permille3")) => digits
            .as_bytes()
            .chunks(3)
            .map(|digits| {
                let text = std::str::from_utf8(digits).unwrap_or_default();
                text.parse::<u32>()
                    .map(|value| f64::from(value) / 1000.0)
                    .map_err(|_| wrong(format!("{text:?} is no per-mille value")))
            })
            .collect::<Result<_, _>>()?,
        (Some(_), _) => return Err(wrong("must be a list of numbers".to_owned())),
        (None, _) => return Err(wrong("is missing".to_owned())),
    };
    for (at, reading) in readings.iter().enumerate() {
        kind.check(*reading).map_err(|error| wrong(format!("[{at}]: {error}")))?;
    }
    Ok(readings)
}
