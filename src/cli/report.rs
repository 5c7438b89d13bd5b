//! `gyrostat report`: what drifted, why, and what was done, as one HTML page.

mod plot;

use std::{collections::BTreeMap, io::Write};

use minijinja::{AutoEscape, Environment, context};
use serde::Serialize;

use crate::completion::{Alarm, InteractionType, SignalKind, Timestamp};
use crate::config::Config;
use crate::cycle;
use crate::store::{self, Store};

use super::{Error, jsonl};
use plot::{Plot, Span};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// File to write to; `-` is stdout.
    #[arg(long)]
    out: String,
    /// Show the requests and answers that an alarm points at. Without it the page holds no words of users.
    #[arg(long)]
    texts: bool,
}

/// Alarms and updates that are shown at most.
const SHOWN: usize = 1000;

pub(super) fn run(args: &Args, config: &Config) -> Result<(), Error> {
    let store = Store::open(&config.store)?;
    let page = render(&store, args.texts)?;
    let mut out = jsonl::writer(&args.out)?;
    out.write_all(page.as_bytes())?;
    out.flush()?;
    Ok(())
}

fn render(store: &Store, texts: bool) -> Result<String, Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_filter("time", |ms: u64| jsonl::time(Timestamp(ms)));
    environment.add_template("report", include_str!("report/report.html"))?;
    let history = History::read(store)?;
    let alarms = store.alarms(SHOWN)?;
    let shown = alarms.iter().map(|alarm| {
        let plot = history.plot(alarm.signal, alarm.interaction.as_ref(), Some(alarm));
        Ok(context! { alarm, plot, words => alarm.summary(), examples => if texts { examples(store, alarm)? } else { Vec::new() } })
    });
    let page = environment.get_template("report")?.render(context! {
        counts => store.counts(),
        from => history.span.from,
        to => history.span.to,
        alarms => shown.collect::<Result<Vec<_>, store::Error>>()?,
        types => history.types(),
        updates => store.updates(SHOWN)?,
    })?;
    Ok(page)
}

/// A request with the answer that it got.
#[derive(Debug, Serialize)]
struct Example {
    request: String,
    answer: String,
}

fn examples(store: &Store, alarm: &Alarm) -> Result<Vec<Example>, store::Error> {
    let mut examples = Vec::new();
    for id in &alarm.examples {
        let Some(completion) = store.completion(*id)? else { continue };
        examples.push(Example { request: completion.prompt.request().to_owned(), answer: completion.answer });
    }
    Ok(examples)
}

/// A stream: a signal of one type of interaction or, as `None`, of all.
type Key = (SignalKind, Option<InteractionType>);

/// Everything that was read, by stream.
struct History {
    span: Span,
    streams: BTreeMap<Key, Vec<(Timestamp, f64)>>,
}

/// How well one type of interaction is served.
#[derive(Debug, Serialize)]
struct TypeRow {
    interaction: InteractionType,
    answers: usize,
    refused: f64,
    helpfulness: f64,
    /// `None` where nobody said anything.
    satisfaction: Option<f64>,
    judged: usize,
    plot: Option<Plot>,
}

impl History {
    fn read(store: &Store) -> Result<Self, store::Error> {
        let mut streams: BTreeMap<Key, Vec<(Timestamp, f64)>> = BTreeMap::new();
        let mut span: Option<Span> = None;
        cycle::every_reading(store, |signal, at| {
            span = Some(span.map_or(Span { from: at, to: at }, |span| span.with(at)));
            for interaction in [Some(signal.interaction.clone()), None] {
                streams.entry((signal.kind, interaction)).or_default().push((at, signal.value));
            }
        })?;
        Ok(Self { span: span.unwrap_or_default(), streams })
    }

    fn of(&self, signal: SignalKind, interaction: Option<&InteractionType>) -> &[(Timestamp, f64)] {
        self.streams.get(&(signal, interaction.cloned())).map_or(&[], Vec::as_slice)
    }

    fn plot(
        &self,
        signal: SignalKind,
        interaction: Option<&InteractionType>,
        alarm: Option<&Alarm>,
    ) -> Option<Plot> {
        Plot::of(self.of(signal, interaction), self.span, alarm)
    }

    /// Every type, the most effective first: by satisfaction where people said something, else by helpfulness.
    fn types(&self) -> Vec<TypeRow> {
        let mean = |readings: &[(Timestamp, f64)]| {
            readings.iter().map(|(_, value)| value).sum::<f64>() / readings.len().max(1) as f64
        };
        let types = self.streams.keys().filter(|(signal, _)| *signal == SignalKind::Refusal);
        let mut rows: Vec<TypeRow> = types
            .filter_map(|(_, interaction)| {
                let interaction = interaction.clone()?;
                let of = |signal| self.of(signal, Some(&interaction));
                let (refusals, satisfaction) = (of(SignalKind::Refusal), of(SignalKind::Satisfaction));
                Some(TypeRow {
                    answers: refusals.len(),
                    refused: mean(refusals),
                    helpfulness: mean(of(SignalKind::Helpfulness)),
                    satisfaction: (!satisfaction.is_empty()).then(|| mean(satisfaction)),
                    judged: satisfaction.len(),
                    plot: self.plot(SignalKind::Satisfaction, Some(&interaction), None),
                    interaction,
                })
            })
            .collect();
        let effect = |row: &TypeRow| row.satisfaction.unwrap_or(row.helpfulness);
        rows.sort_by(|a, b| effect(b).total_cmp(&effect(a)));
        rows
    }
}
