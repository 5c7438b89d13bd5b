//! `gyrostat generate`: answers to the prompts of a file.

use std::{io::Write, path::PathBuf, sync::Arc};

use serde_json::json;
use tokio::sync::watch;

use crate::app;
use crate::completion::{Message, Prompt, Version};
use crate::config::Config;
use crate::learn::sequence::encode_prompt;
use crate::policy::{self, Adapter, Device, Engine, Event, GenerateRequest, Model, Sampling, Served};

use super::{Error, jsonl, model};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// One {"prompt"} a line, a string or a list of messages; `-` is stdin.
    #[arg(long)]
    data: String,
    /// Adapter to answer with, as PEFT stores it.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Tokens of an answer at most.
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// File to write to; `-` is stdout.
    #[arg(long, default_value = "-")]
    out: String,
}

pub(super) fn run(args: &Args, config: &Config) -> Result<(), Error> {
    let lines = jsonl::read(&args.data)?;
    let model = Arc::new(load(&config.policy.model, config.policy.device)?);
    let adapter = adapter(&model, args.adapter.as_deref())?;
    let (_served, watch) = watch::channel(Served { version: Version(0), adapter });
    let metrics = policy::Metrics::register(&prometheus::Registry::new())?;
    let settings = policy::Config { queue: lines.len().max(1), kl_one_in: 0, ..config.policy.clone() };
    let engine = Engine::start(Arc::clone(&model), &settings, watch, metrics)?;
    let mut pending = Vec::new();
    for (line, object) in &lines {
        let prompt = prompt(*line, object)?;
        let tokens = encode_prompt(&model, &prompt)?;
        let request = GenerateRequest {
            prompt: tokens,
            sampling: Sampling { temperature: args.temperature, seed: args.seed, ..Sampling::default() },
            max_tokens: args.max_tokens,
            stop: Vec::new(),
            top_logprobs: None,
            pinned: None,
        };
        pending.push((object, engine.submit(request).map_err(|error| format!("line {line}: {error}"))?));
    }
    let bar = jsonl::bar(lines.len() as u64, "answers");
    let mut out = jsonl::writer(&args.out)?;
    for (object, mut events) in pending {
        let mut text = String::new();
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Text { text: more, .. } => text.push_str(&more),
                Event::Failed(why) => return Err(why.into()),
                Event::Started { .. } | Event::Done(_) => {}
            }
        }
        let mut object = object.clone();
        object.insert("completion".to_owned(), json!(text));
        writeln!(out, "{}", serde_json::Value::Object(object))?;
        bar.inc(1);
    }
    out.flush()?;
    bar.finish_and_clear();
    Ok(())
}

/// The configured model; the default one is fetched if need be.
pub(super) fn load(name: &str, device: Device) -> Result<Model, Error> {
    if name == "default" {
        model::fetched()?;
    }
    let model = Model::load(name, device)?;
    model.vocabulary.set_clock(app::now);
    Ok(model)
}

pub(super) fn adapter(model: &Model, dir: Option<&std::path::Path>) -> Result<Option<Arc<Adapter>>, Error> {
    Ok(dir.map(|dir| Adapter::load(dir, &model.decoder.architecture)).transpose()?)
}

/// The prompt of a line: a string is a user's turn.
pub(super) fn prompt(
    line: usize,
    object: &serde_json::Map<String, serde_json::Value>,
) -> Result<Prompt, Error> {
    messages(line, object, "prompt").map(Prompt::Chat)
}

/// A field that is a string, or a list of messages, as a conversation.
pub(super) fn messages(
    line: usize,
    object: &serde_json::Map<String, serde_json::Value>,
    field: &str,
) -> Result<Vec<Message>, Error> {
    match object.get(field) {
        Some(serde_json::Value::Array(messages)) => serde_json::from_value(messages.clone().into())
            .map_err(|error| format!("line {line}: `{field}`: {error}").into()),
        _ => Ok(vec![Message::user(jsonl::text(line, object, field)?)]),
    }
}
