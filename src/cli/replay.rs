//! `gyrostat replay`: would it have seen last month's incident?

use std::io::Write;

use serde_json::json;

use crate::app::Replay;
use crate::completion::Alarm;
use crate::config::Config;
use crate::http::{self, Logged};
use crate::signals::Interactions;

use super::{Error, jsonl};

/// Feeds logged traffic through signals and detectors as if it were live.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// JSON lines with `at`, `prompt` or `messages`, `response`, and `feedback` if there is any; `-` is stdin.
    #[arg(long, value_name = "FILE")]
    data: String,
    /// A new folder for what is recorded; `gyrostat report` and `gyrostat serve` read it. Without one nothing is kept.
    #[arg(long, value_name = "DIR")]
    into: Option<std::path::PathBuf>,
    /// Show /metrics, /v1/alignment and /v1/alarms on `http.bind`, and go on doing so at the end until Ctrl-C.
    #[arg(long)]
    serve: bool,
    /// Events a second; without it as fast as it goes.
    #[arg(long, value_name = "N", value_parser = pace)]
    pace: Option<f64>,
    /// Print the alarms and the scorecard as one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, mut config: Config) -> Result<(), Error> {
    let scratch = std::env::temp_dir().join(format!("gyrostat-replay-{}", uuid::Uuid::now_v7()));
    config.store.path = args.into.clone().unwrap_or_else(|| scratch.clone());
    let runtime = tokio::runtime::Runtime::new()?;
    let ran = runtime.block_on(replay(args, config));
    drop(runtime);
    if args.into.is_none() {
        let _never_made = std::fs::remove_dir_all(&scratch);
    }
    ran
}

async fn replay(args: &Args, config: Config) -> Result<(), Error> {
    let mut replay = Replay::new(config)?;
    let log = read(&args.data, replay.interactions())?;
    if args.serve {
        tracing::info!(address = %replay.listen().await?, "metrics, scorecard and alarms");
    }
    let events = log.iter().map(|logged| 1 + logged.feedback.len()).sum::<usize>();
    let (bar, mut alarms) = (jsonl::bar(events as u64, "replaying"), Vec::new());
    replay
        .run(log, args.pace, |done, new| {
            bar.inc(done as u64);
            alarms.extend_from_slice(new);
        })
        .await?;
    bar.finish_and_clear();
    show(args.json, events, &alarms, &replay)?;
    if args.serve {
        tokio::signal::ctrl_c().await?;
    }
    Ok(())
}

fn pace(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(pace) if (0.01..=1e9).contains(&pace) => Ok(pace),
        _ => Err("must be a number from 0.01 to 1000000000".to_owned()),
    }
}

fn read(path: &str, interactions: &Interactions) -> Result<Vec<Logged>, Error> {
    let lines = jsonl::lines(path)?.into_iter();
    lines
        .map(|(number, line)| {
            http::logged(&line, interactions).map_err(|why| format!("{path}: line {number}: {why}").into())
        })
        .collect()
}

fn show(as_json: bool, events: usize, alarms: &[Alarm], replay: &Replay) -> Result<(), Error> {
    let mut out = jsonl::writer("-")?;
    let rows = replay.scorecard();
    if as_json {
        let whole = json!({ "events": events, "alarms": alarms, "signals": rows });
        writeln!(out, "{whole}")?;
    } else {
        for alarm in alarms {
            writeln!(out, "{}", in_words(alarm))?;
        }
        let watched = rows.iter().filter(|row| row.baseline.is_some()).count();
        writeln!(
            out,
            "{events} events, alarms: {}; {watched} of {} streams have learned their reference",
            alarms.len(),
            rows.len()
        )?;
    }
    out.flush()?;
    Ok(())
}

/// A line for the person on call.
fn in_words(alarm: &Alarm) -> String {
    let [at, since, from, to] =
        [alarm.at, alarm.change_at, alarm.change_from, alarm.change_to].map(jsonl::time);
    format!("{at}  {}; since {since}, plausibly {from} to {to}", alarm.summary())
}
