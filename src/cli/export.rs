//! `gyrostat export`: what was recorded, in TRL's data set formats.

use std::io::Write;

use clap::ValueEnum;
use serde_json::{Value, json};

use crate::completion::{Message, Prompt, Role};
use crate::config::Config;
use crate::learn::Dataset;
use crate::signals;
use crate::store::Store;

use super::{Error, jsonl};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    format: Format,
    /// File to write to; `-` is stdout.
    #[arg(long)]
    out: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// {"prompt","chosen","rejected"}
    Preference,
    /// {"prompt","completion","label"}
    Unpaired,
    /// {"prompt"}
    Prompt,
    /// {"prompt","completion"} from demonstrations
    Sft,
}

pub(super) fn run(args: &Args, config: &Config) -> Result<(), Error> {
    let store = Store::open(&config.store)?;
    let bar = jsonl::bar(store.counts().completions, "completions");
    let mut records = Vec::new();
    for record in store.judged(..) {
        records.push(record?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let dataset = Dataset::build(records, &config.learn.dataset, &signals::satisfaction);
    let rows: Vec<Value> = match args.format {
        Format::Preference => dataset
            .comparisons
            .iter()
            .map(|pair| json!({ "prompt": turns(&pair.prompt), "chosen": answer(&pair.prompt, &pair.chosen), "rejected": answer(&pair.prompt, &pair.rejected) }))
            .collect(),
        Format::Unpaired => dataset
            .labelled
            .iter()
            .map(|one| json!({ "prompt": turns(&one.prompt), "completion": answer(&one.prompt, &one.answer), "label": one.label > 0.5 }))
            .collect(),
        Format::Prompt => dataset.prompts.iter().map(|asked| json!({ "prompt": turns(&asked.prompt) })).collect(),
        Format::Sft => dataset
            .demonstrations
            .iter()
            .map(|shown| json!({ "prompt": turns(&shown.prompt), "completion": answer(&shown.prompt, &shown.answer) }))
            .collect(),
    };
    let mut out = jsonl::writer(&args.out)?;
    for row in rows {
        writeln!(out, "{row}")?;
    }
    out.flush()?;
    Ok(())
}

/// Conversations stay lists of messages, bare text stays a string.
fn turns(prompt: &Prompt) -> Value {
    match prompt {
        Prompt::Chat(messages) => json!(messages),
        Prompt::Text(text) => json!(text),
    }
}

fn answer(prompt: &Prompt, text: &str) -> Value {
    match prompt {
        Prompt::Chat(_) => json!([Message { role: Role::Assistant, content: text.to_owned() }]),
        Prompt::Text(_) => json!(text),
    }
}
