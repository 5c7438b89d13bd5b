//! `gyrostat bench serve`: requests through the engine, as a server makes them.

use std::{sync::Arc, time::Instant};

use tokio::sync::{mpsc, watch};

use crate::cli::{Error, generate};
use crate::config::Config;
use crate::policy::{self, Engine, Event, GenerateRequest, Generated, Sampling, Served};

/// Tokens a second.
#[derive(Debug)]
pub(super) struct Figures {
    /// A prompt of 256 tokens, until its first token is drawn.
    pub(super) prefill: f64,
    /// 128 tokens after that prompt, alone.
    pub(super) one: f64,
    /// Eight sequences at once: a prompt of 32 tokens and 96 tokens each; only the latter are counted.
    pub(super) eight: f64,
}

/// The engine with its model, warm; the sender keeps it serving the base.
pub(super) fn start(config: &Config) -> Result<(Engine, watch::Sender<Served>), Error> {
    let model = Arc::new(generate::load(&config.policy.model, config.policy.device)?);
    let (sender, served) = watch::channel(Served::default());
    let metrics = policy::Metrics::register(&prometheus::Registry::new())?;
    let engine = Engine::start(model, &config.policy, served, metrics)?;
    answer(submit(&engine, 4, 4, 0)?)?;
    Ok((engine, sender))
}

/// One round; other rounds have other prompts.
pub(super) fn measure(engine: &Engine, round: usize) -> Result<Figures, Error> {
    let salt = 1 + 10 * round;
    let started = Instant::now();
    let long = answer(submit(engine, 256, 129, salt)?)?;
    let rest = started.elapsed().as_secs_f64() - long.first_token_seconds;
    let started = Instant::now();
    let streams = (1..=8).map(|nth| submit(engine, 32, 96, salt + nth)).collect::<Result<Vec<_>, _>>()?;
    let answers = streams.into_iter().map(answer).collect::<Result<Vec<_>, _>>()?;
    let tokens: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
    Ok(Figures {
        prefill: 256.0 / long.first_token_seconds,
        one: (long.tokens.len() - 1) as f64 / rest,
        eight: tokens as f64 / started.elapsed().as_secs_f64(),
    })
}

/// The 95th percentile of the milliseconds between two tokens of one answer of 128.
pub(super) fn between_tokens(engine: &Engine, salt: usize) -> Result<f64, Error> {
    let mut events = submit(engine, 32, 128, salt)?;
    let (mut gaps, mut last) = (Vec::new(), None);
    while let Some(event) = events.blocking_recv() {
        let now = Instant::now();
        if matches!(event, Event::Text { .. }) {
            gaps.extend(last.replace(now).map(|last| (now - last).as_secs_f64() * 1e3));
        }
    }
    gaps.sort_by(f64::total_cmp);
    gaps.get(gaps.len() * 95 / 100).copied().ok_or_else(|| "the engine gave no answer".into())
}

fn submit(
    engine: &Engine,
    prompt: usize,
    max_tokens: usize,
    salt: usize,
) -> Result<mpsc::Receiver<Event>, Error> {
    let vocabulary = engine.model().decoder.architecture.vocabulary;
    let prompt = (0..prompt).map(|at| ((100 + (at * 7 + salt * 131) % 3000) % vocabulary) as u32).collect();
    Ok(engine.submit(GenerateRequest {
        prompt,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens,
        stop: Vec::new(),
        top_logprobs: None,
        pinned: None,
    })?)
}

/// Waits for the end of an answer of at least two tokens.
fn answer(mut events: mpsc::Receiver<Event>) -> Result<Generated, Error> {
    while let Some(event) = events.blocking_recv() {
        if let Event::Done(end) = event {
            return if end.tokens.len() > 1 { Ok(end) } else { Err("the answer has no two tokens".into()) };
        }
    }
    Err("the engine gave no answer".into())
}
