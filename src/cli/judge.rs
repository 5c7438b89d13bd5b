//! `gyrostat judge`: the gate on adapters from files, as an update would meet it.

use std::{io::Write, path::PathBuf, sync::Arc};

use serde_json::json;
use tokio::sync::watch;

use crate::app;
use crate::completion::Version;
use crate::config::Config;
use crate::cycle::{self, Compared};
use crate::gate;
use crate::learn::{
    MicroTokens, Watch,
    dataset::{Asked, split},
};
use crate::policy::{self, Engine, Served};
use crate::signals::Interactions;

use super::{Error, generate, jsonl, train};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Prompts that nothing was learned from: one {"prompt"} a line, with "interaction" if it is known; `-` is stdin.
    #[arg(long)]
    data: String,
    /// The adapter that wants to serve.
    #[arg(long)]
    candidate: PathBuf,
    /// The adapter that serves; without one, the model itself.
    #[arg(long)]
    incumbent: Option<PathBuf>,
    /// The reward model that judges.
    #[arg(long)]
    reward: PathBuf,
    /// Old preferences that nothing was learned from, which the reward model must order as people did.
    #[arg(long)]
    held_back: Option<String>,
    /// Tokens of an answer at most; unset, those of PPO.
    #[arg(long)]
    max_tokens: Option<usize>,
}

pub(super) fn run(args: &Args, config: &Config) -> Result<(), Error> {
    let lines = jsonl::read(&args.data)?;
    let model = Arc::new(generate::load(&config.policy.model, config.policy.device)?);
    let interactions = Interactions::new(&config.signals, app::classifier(&config.signals)?)?;
    let mut prompts = Vec::new();
    for (line, object) in &lines {
        let prompt = generate::prompt(*line, object)?;
        let interaction = match object.get("interaction").and_then(|tag| tag.as_str()) {
            Some(tag) => interactions.tagged(tag)?,
            None => interactions.classify(prompt.request()),
        };
        prompts.push(Asked { split: split(&prompt), prompt, interaction });
    }
    let (_served, served) = watch::channel(Served { version: Version(0), adapter: None });
    let metrics = policy::Metrics::register(&prometheus::Registry::new())?;
    let settings = policy::Config { queue: lines.len().max(1), kl_one_in: 0, ..config.policy.clone() };
    let engine = Engine::start(Arc::clone(&model), &settings, served, metrics)?;
    let bar = jsonl::bar(1000, "judging");
    let watch = Watch {
        micro_tokens: MicroTokens::new(config.learn.pace.micro_tokens),
        sequence_tokens: config.learn.pace.sequence_tokens,
        between: &|| true,
        report: &|_, done, _| bar.set_position((done * 1000.0) as u64),
        checkpoints: None,
    };
    let reward = train::reward_model(&model, &args.reward)?;
    let candidate = generate::adapter(&model, Some(&args.candidate))?;
    let compared = Compared {
        incumbent: generate::adapter(&model, args.incumbent.as_deref())?,
        candidate: candidate.ok_or("--candidate names no adapter")?,
        reward: &reward,
        classifier: interactions.classifier(),
    };
    let most = args.max_tokens.unwrap_or(config.learn.ppo.response_length);
    let (incumbent, mut candidate) = cycle::side_by_side((&engine, most), &compared, &prompts, &watch)?;
    if let Some(file) = &args.held_back {
        let old = jsonl::read(file)?;
        let examples =
            old.iter().map(|line| train::example(&model, line, &watch)).collect::<Result<Vec<_>, _>>()?;
        candidate.judge = reward.ordered(&model, &examples, &config.learn.reward, &watch)?;
    }
    bar.finish_and_clear();
    let verdict = gate::judge(&incumbent, &candidate, &config.gate);
    let mut out = jsonl::writer("-")?;
    let told = json!({ "promote": verdict.promote, "reasons": verdict.reasons(), "proof": verdict.proof });
    writeln!(out, "{told}")?;
    out.flush()?;
    Ok(())
}
