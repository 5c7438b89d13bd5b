//! `gyrostat bench`: this machine's speed, as a small table or JSON.

mod canary;
mod drift;
mod judge;
mod learn;
mod poison;
mod recipes;
mod serve;
mod upstream;

use std::{io::Write, sync::Arc, time::Instant};

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::drift::{Constants, Kind};
use crate::store::{self, Store};

use super::{Error, jsonl};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    what: What,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Rounds; the median is reported.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// With `drift`: puts a promise to the test, with seeds of its own.
    #[arg(long, value_enum)]
    study: Option<drift::Study>,
    /// Runs of each line of a study; unset, as many as its figures in benches/RESULTS.md.
    #[arg(long)]
    runs: Option<usize>,
    /// With `judge`: pairs that are compared in all.
    #[arg(long, default_value_t = 100)]
    pairs: usize,
    /// With `recipes`: the type of simulated users whose rule is learned; unset, each type's: advice, question, chat.
    #[arg(long)]
    interaction: Option<String>,
    /// With `recipes`: the one that is run, `ppo`, `dpo` or `reward`; unset, each.
    #[arg(long, value_parser = ["ppo", "dpo", "reward"])]
    recipe: Option<String>,
    /// With `poison` and `judge`: preferences, lines of {"prompt","chosen","rejected"}; may be given again.
    #[arg(long)]
    data: Vec<String>,
    /// With `--study delay`: a directory for the streams, to show them to other detectors.
    #[arg(long)]
    write: Option<std::path::PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// Prefill of 256 tokens, decode with one stream and with eight.
    Serve,
    /// Forward and backward of a LoRA policy over 4 × 256 tokens; on a card also over 32 × 256, and what share of the rate of
    /// plain products that is.
    Train,
    /// One iteration of PPO: 16 answers of 64 tokens to prompts of 64, four epochs, adapters of rank 16 on all layers and of the
    /// configured depths.
    Ppo,
    /// The time between two tokens of one stream, idle and beside training.
    Beside,
    /// One reading of each detector, and a monitor of 100,000 streams.
    Drift,
    /// Durable feedback, one writer and 64.
    Store,
    /// What upstream mode adds to the latency of 500 requests a second, in microseconds.
    Upstream,
    /// What raters who flip every label cost a small reward model, on the preferences of `--data`.
    Poison,
    /// How far people agree with a judge model on the preferences of `--data`: that of [ai_feedback], else the policy.
    Judge,
    /// What PPO and DPO teach the model of rules that are written in the program, on prompts that nothing was learned from.
    Recipes,
    /// Simulated canaries: how often what is better, equal and worse is promoted and rolled back.
    Canary,
}

pub(super) fn run(args: &Args, config: &Config) -> Result<(), Error> {
    if let Some(study) = args.study {
        return show(args.json, &study.run(args.runs, args.write.as_deref())?);
    }
    match args.what {
        What::Canary => return show(args.json, &canary::study(args.runs.unwrap_or(2000))),
        What::Judge => return show(args.json, &judge::study(&args.data, args.pairs, config)?),
        What::Poison => return show(args.json, &poison::study(&args.data, args.runs.unwrap_or(9))?),
        What::Recipes => {
            let only = (args.interaction.as_deref(), args.recipe.as_deref());
            return show(args.json, &recipes::study(only, args.runs.unwrap_or(1), config)?);
        }
        _ => {}
    }
    let mut rows: Map<String, Value> = Map::new();
    let mut row = |name: &str, mut measured: Vec<f64>| {
        measured.sort_by(f64::total_cmp);
        rows.insert(name.to_owned(), json!(measured[measured.len() / 2]));
    };
    measure(args.what, config, args.rounds.max(1), &mut row)?;
    let mut out = jsonl::writer("-")?;
    if args.json {
        writeln!(out, "{}", Value::Object(rows))?;
    } else {
        for (name, value) in rows {
            writeln!(out, "{name:40} {:>12.1}", value.as_f64().unwrap_or_default())?;
        }
    }
    out.flush()?;
    Ok(())
}

/// Gives `row` what was measured in each round.
fn measure(
    what: What,
    config: &Config,
    rounds: usize,
    row: &mut dyn FnMut(&str, Vec<f64>),
) -> Result<(), Error> {
    match what {
        What::Serve => {
            let (engine, _serving) = serve::start(config)?;
            let measured: Vec<_> =
                (0..rounds).map(|round| serve::measure(&engine, round)).collect::<Result<_, _>>()?;
            let all = |of: fn(&serve::Figures) -> f64| measured.iter().map(of).collect();
            row("prefill_256_tokens_per_second", all(|figures| figures.prefill));
            row("decode_1_stream_tokens_per_second", all(|figures| figures.one));
            row("decode_8_streams_tokens_per_second", all(|figures| figures.eight));
        }
        What::Train => learn::training(config, rounds, row)?,
        What::Ppo => learn::ppo(config, rounds, row)?,
        What::Beside => learn::beside(config, rounds, row)?,
        What::Drift => {
            for (constants, kind, name) in [
                (Constants::Default, Kind::Bernoulli, "bernoulli_ns_per_reading"),
                (Constants::Default, Kind::Bounded, "bounded_ns_per_reading"),
                (Constants::Reference, Kind::Bernoulli, "reference_bernoulli_ns_per_reading"),
                (Constants::Reference, Kind::Bounded, "reference_bounded_ns_per_reading"),
            ] {
                row(name, (0..rounds).map(|_| drift::speed(constants, kind)).collect::<Result<_, _>>()?);
            }
            // First the few whose history is full, which are the larger ones.
            row("stream_kilobytes_full", vec![drift::monitor(2000, 12_000)?.1]);
            row("monitor_100000_streams_ns_per_reading", vec![drift::monitor(100_000, 120)?.0]);
        }
        What::Upstream => {
            let bench = upstream::Bench::start()?;
            let measured: Vec<_> = (0..rounds).map(|_| bench.measure()).collect::<Result<_, _>>()?;
            for (figure, of) in upstream::Compared::FIGURES {
                row(&format!("whole_{figure}_us"), measured.iter().map(|all| of(&all.whole)).collect());
                let streams = measured.iter().map(|all| of(&all.stream)).collect();
                row(&format!("stream_first_byte_{figure}_us"), streams);
            }
        }
        What::Canary | What::Judge | What::Poison | What::Recipes => {}
        What::Store => {
            for writers in [1, 64] {
                let measured = (0..rounds).map(|_| store(writers)).collect::<Result<_, _>>()?;
                row(&format!("durable_records_per_second_{writers}_writers"), measured);
            }
        }
    }
    Ok(())
}

/// A study's lines as a table, or as one JSON object a line.
fn show(json: bool, lines: &[drift::Line]) -> Result<(), Error> {
    let mut out = jsonl::writer("-")?;
    let cell = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    for (at, line) in lines.iter().enumerate() {
        if json {
            let object: Map<String, Value> =
                line.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
            writeln!(out, "{}", Value::Object(object))?;
            continue;
        }
        if at == 0 {
            let names: Vec<&str> = line.iter().map(|(name, _)| *name).collect();
            writeln!(out, "| {} |\n|{}", names.join(" | "), "---|".repeat(names.len()))?;
        }
        let cells: Vec<String> = line.iter().map(|(_, value)| cell(value)).collect();
        writeln!(out, "| {} |", cells.join(" | "))?;
    }
    out.flush()?;
    Ok(())
}

fn store(writers: usize) -> Result<f64, Error> {
    const RECORDS: usize = 640;
    let dir = std::env::temp_dir().join(format!("gyrostat-bench-{}", std::process::id()));
    let config = store::Config { path: dir.clone(), ..store::Config::default() };
    let store = Store::open(&config)?;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..writers)
            .map(|_| {
                let store = Arc::clone(&store);
                scope.spawn(move || {
                    (0..RECORDS / writers).try_for_each(|_| store.attach_blocking(&judgement()).map(drop))
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(store::Error::Stopped)))
    })?;
    let seconds = started.elapsed().as_secs_f64();
    drop(store);
    std::fs::remove_dir_all(&dir)?;
    Ok(RECORDS as f64 / seconds)
}

/// A comparison of texts: the one judgement that needs no answer on record.
fn judgement() -> crate::completion::Feedback {
    use crate::completion::{Feedback, FeedbackId, Judgement, Prompt, Source, Timestamp};
    Feedback {
        id: FeedbackId::new(),
        at: Timestamp(0),
        completion: None,
        judgement: Judgement::TextComparison {
            prompt: Prompt::Text("a prompt".to_owned()),
            chosen: "the better answer".to_owned(),
            rejected: "the worse one".to_owned(),
        },
        rater: None,
        source: Source::Human,
        comment: None,
        idempotency_key: None,
        tags: std::collections::BTreeMap::new(),
    }
}
