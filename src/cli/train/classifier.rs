//! `gyrostat train classifier`: refusal, risk and interaction type from labelled rows.

use std::{collections::BTreeMap, fs, sync::Arc};

use clap::Args as ClapArgs;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::{Map, Value};

use crate::app;
use crate::completion::{RefusalLabel, Risk};
use crate::config::Config;
use crate::signals::{Classifier, Labelled, Lists, Schedule, draw, held_out};

use crate::cli::{
    Error,
    jsonl::{self, Line},
};

/// A drawn row resembles the others of its pattern, and a written one stands for many that nobody wrote.
const DRAWN: f64 = 0.25;
const WRITTEN: f64 = 3.0;

/// What only `classifier` knows.
#[derive(Debug, ClapArgs)]
#[group(skip)]
pub(super) struct Args {
    /// For `classifier`: rows written to be learned from; {"list","of"} names texts and "draw" makes a row a pattern.
    #[arg(long)]
    text: Vec<String>,
    /// For `classifier`: keep every third prompt of `--data` (by its SHA-256) out, to measure on.
    #[arg(long)]
    hold_out: bool,
    /// For `classifier`: begin with weights that know nothing, not with the configured ones.
    #[arg(long)]
    blank: bool,
}

pub(super) fn run(args: &super::Args, config: &Config) -> Result<(), Error> {
    let out = args.out.display();
    let mut classifier = if args.resume {
        Classifier::from_bytes(&fs::read(&args.out).map_err(|error| format!("{out}: {error}"))?)?
    } else if args.classifier.blank {
        Classifier::blank(Vec::new())
    } else {
        Arc::unwrap_or_clone(app::classifier(&config.signals)?)
    };
    let mut rows = Vec::new();
    for path in &args.data {
        let mut found = labelled_file(path)?;
        found.retain(|row| !args.classifier.hold_out || !held_out(&row.prompt));
        weigh(&mut found);
        rows.extend(found);
    }
    let mut rng = StdRng::seed_from_u64(args.seed);
    for path in &args.classifier.text {
        let lines = jsonl::read(path)?;
        let written = written(&lines, &mut rng).map_err(|error| format!("{path}: {error}"))?;
        rows.extend(written);
    }
    let bar = jsonl::bar(5, "training");
    classifier.train(&rows, Schedule::default(), &|stage| {
        bar.set_message(stage.to_owned());
        bar.inc(1);
    })?;
    bar.finish_and_clear();
    Ok(fs::write(&args.out, classifier.to_bytes()?).map_err(|error| format!("{out}: {error}"))?)
}

/// A file of labelled rows.
pub(crate) fn labelled_file(path: &str) -> Result<Vec<Labelled>, Error> {
    let lines = jsonl::read(path)?;
    let rows = lines.iter().map(|(line, object)| {
        labelled(object).map_err(|error| format!("{path}: line {line}: {error}").into())
    });
    rows.collect()
}

/// Many answers to one prompt are much alike: `n` of them count as `n^¾`.
fn weigh(rows: &mut [Labelled]) {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for row in &*rows {
        *counts.entry(row.prompt.clone()).or_default() += 1;
    }
    for row in rows {
        row.weight = (counts[&row.prompt] as f64).powf(-0.25);
    }
}

/// The labels that a row has; `label` with `compliance`, `partial` or `refusal` is how others write `refusal`.
fn labelled(object: &Map<String, Value>) -> Result<Labelled, String> {
    let text = |field: &str| match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("`{field}` must be a string")),
    };
    let refusal = match text("refusal")?.or(text("label")?).as_deref() {
        None => None,
        Some("none" | "compliance") => Some(RefusalLabel::None),
        Some("partial") => Some(RefusalLabel::Partial),
        Some("full" | "refusal") => Some(RefusalLabel::Full),
        Some(_) => return Err("`refusal` must be none, partial or full".to_owned()),
    };
    let risk = match text("risk")?.as_deref() {
        None => None,
        Some("benign") => Some(Risk::Benign),
        Some("harmful") => Some(Risk::Harmful),
        Some(_) => return Err("`risk` must be benign or harmful".to_owned()),
    };
    let way_forward = match object.get("way_forward") {
        None | Some(Value::Null) => None,
        Some(Value::Bool(offers)) => Some(*offers),
        Some(_) => return Err("`way_forward` must be true or false".to_owned()),
    };
    let prompt = text("prompt")?.ok_or("`prompt` is missing")?;
    let response = text("response")?;
    if refusal.is_some() && response.is_none() {
        return Err("`response` is missing".to_owned());
    }
    let interaction = text("interaction")?;
    Ok(Labelled { prompt, response, refusal, way_forward, risk, interaction, weight: 1.0, drawn: false })
}

/// Rows of our own: as they stand, or as many as `draw` says, drawn from the patterns in them.
fn written(lines: &[Line], rng: &mut StdRng) -> Result<Vec<Labelled>, String> {
    let (lists, rows): (Vec<&Line>, Vec<&Line>) =
        lines.iter().partition(|(_, object)| object.contains_key("list"));
    let lists =
        lists.into_iter().map(|(line, object)| list(object).ok_or(format!("line {line}: no list of texts")));
    let lists: Lists = lists.collect::<Result<BTreeMap<_, _>, _>>()?;
    let mut written = Vec::new();
    for (line, object) in rows {
        let at = |error: String| format!("line {line}: {error}");
        let row = labelled(object).map_err(at)?;
        let Some(count) = object.get("draw") else {
            written.push(Labelled { weight: WRITTEN, ..row });
            continue;
        };
        for _ in 0..count.as_u64().ok_or_else(|| at("`draw` must be a number".to_owned()))? {
            let prompt = draw(&row.prompt, &lists, rng).map_err(at)?;
            let response =
                row.response.as_ref().map(|pattern| draw(pattern, &lists, rng)).transpose().map_err(at)?;
            written.push(Labelled { prompt, response, weight: DRAWN, drawn: true, ..row.clone() });
        }
    }
    Ok(written)
}

fn list(object: &Map<String, Value>) -> Option<(String, Vec<String>)> {
    let texts = object.get("of")?.as_array()?.iter().map(|text| Some(text.as_str()?.to_owned()));
    Some((object.get("list")?.as_str()?.to_owned(), texts.collect::<Option<_>>()?))
}
