//! `gyrostat train`: an adapter from a file, with the code that the cycle runs; or the classifier behind the signals.

mod classifier;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::{Args as ClapArgs, ValueEnum};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use crate::completion::{Prompt, Version};
use crate::config::Config;
use crate::learn::{
    Checkpoints, Measures, Method, MicroTokens, Online, Practice, Reward, RewardModel, Sequence, Watch, ppo,
    preference::{self, Judged, PairLoss},
    reward::{Example, Reads},
};
use crate::policy::{self, Adapter, Engine, Model, Served};

use super::{
    Error, generate,
    jsonl::{self, Line},
};

#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    recipe: Recipe,
    /// The data, in TRL's formats: `sft` {"prompt","completion"}, {"messages"} or {"text"}; `reward` and `dpo`
    /// {"prompt","chosen","rejected"}, `reward` also with "margin"; `reward` and `kto` {"prompt","completion","label"};
    /// `ppo`, `rloo` and `grpo` {"prompt"}. `classifier` {"prompt"} with "risk" ("benign", "harmful") or "interaction",
    /// {"prompt","response"} with "refusal" ("none", "partial", "full") and "way_forward"; for it the option may be given
    /// again. `-` is stdin.
    #[arg(long, required = true)]
    data: Vec<String>,
    /// Directory that the adapter is written to; for `classifier` a file.
    #[arg(long)]
    out: PathBuf,
    /// The reward model's adapter, for `ppo`, `rloo` and `grpo`.
    #[arg(long)]
    reward: Option<PathBuf>,
    /// For `dpo`: the loss, in place of the configured one.
    #[arg(long, value_enum)]
    loss: Option<Loss>,
    /// Go on: with the run that was interrupted in `--out`, else from the adapter, or classifier, that is there.
    #[arg(long)]
    resume: bool,
    /// Steps between two checkpoints of the run, which lie in `--out` until it ends. A step of `ppo`, `rloo` and `grpo` is
    /// an iteration.
    #[arg(long, default_value_t = 1)]
    checkpoint_every: usize,
    #[command(flatten)]
    classifier: classifier::Args,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Recipe {
    Sft,
    Reward,
    Dpo,
    Kto,
    Ppo,
    Rloo,
    Grpo,
    Classifier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Loss {
    Sigmoid,
    Ipo,
}

pub(super) fn run(args: &Args, mut config: Config) -> Result<(), Error> {
    if args.recipe == Recipe::Classifier {
        return classifier::run(args, &config);
    }
    if let Some(loss) = args.loss {
        config.learn.preference.loss = if loss == Loss::Ipo { PairLoss::Ipo } else { PairLoss::Sigmoid };
    }
    let [data] = args.data.as_slice() else { return Err("this recipe reads one file of --data".into()) };
    let lines = jsonl::read(data)?;
    let model = Arc::new(generate::load(&config.policy.model, config.policy.device)?);
    let bar = jsonl::bar(1000, "training");
    let report = |stage: &str, done: f64, measures: Measures<'_>| {
        jsonl::advance(&bar, stage, done, measures);
    };
    let checkpoints =
        Checkpoints::new(&args.out, args.checkpoint_every, digest(args, &config, &lines)?, args.resume);
    let watch = Watch {
        micro_tokens: MicroTokens::new(config.learn.pace.micro_tokens),
        sequence_tokens: config.learn.pace.sequence_tokens,
        between: &|| true,
        report: &report,
        checkpoints: Some(&checkpoints),
    };
    let begun = args.resume && args.out.join("adapter_config.json").exists();
    let resumed = begun.then(|| Adapter::load(&args.out, &model.decoder.architecture)).transpose();
    // An adapter that was cut off while it was written is no matter where the run itself can go on.
    let resumed = if checkpoints.exists() { resumed.ok().flatten() } else { resumed? };
    let trained = train(args, &config, &model, resumed, &lines, &watch)?;
    bar.finish_and_clear();
    fs::create_dir_all(&args.out).map_err(|error| format!("{}: {error}", args.out.display()))?;
    let base = model.path.display().to_string();
    match trained {
        Trained::Policy(adapter) => adapter.save(&args.out, &base)?,
        Trained::Reward(reward) => reward.save(&args.out, &base)?,
    }
    checkpoints.remove()?;
    Ok(())
}

/// What tells a run from others: recipe, seed, settings, data and reward model.
fn digest(args: &Args, config: &Config, lines: &[Line]) -> Result<String, Error> {
    let mut digest = Sha256::new();
    digest.update(format!("{:?} {} {}\n", args.recipe, args.seed, config.policy.model));
    digest.update(serde_json::to_vec(&config.learn)?);
    for (_, object) in lines {
        digest.update(serde_json::to_vec(object)?);
    }
    if let Some(dir) = &args.reward {
        digest.update(fs::read(dir.join("adapter_model.safetensors")).unwrap_or_default());
        digest.update(serde_json::to_vec(&Reads::beside(dir)?)?);
    }
    Ok(format!("{:x}", digest.finalize()))
}

enum Trained {
    Policy(Arc<Adapter>),
    Reward(RewardModel),
}

fn train(
    args: &Args,
    config: &Config,
    model: &Arc<Model>,
    resumed: Option<Arc<Adapter>>,
    lines: &[Line],
    watch: &Watch<'_>,
) -> Result<Trained, Error> {
    let (learn, seed) = (&config.learn, args.seed);
    if args.recipe == Recipe::Reward {
        let examples = each(lines, |line| example(model, line, watch))?;
        let mut reward = match resumed {
            Some(adapter) => RewardModel { adapter, reads: Reads::beside(&args.out)? },
            None => RewardModel::new(model, &learn.reward, seed)?,
        };
        reward.train(model, &examples, (&learn.reward, seed), watch)?;
        return Ok(Trained::Reward(reward));
    }
    let start = match resumed {
        Some(adapter) => adapter,
        None => ppo::new_policy(model, learn.ppo.rank, learn.ppo.alpha, learn.ppo.depth, seed)?,
    };
    let how = (&learn.preference, seed);
    let policy = match args.recipe {
        Recipe::Sft => {
            let sequences = each(lines, |line| shown(model, line, watch))?;
            preference::sft(model, start, &sequences, how, watch)?
        }
        Recipe::Dpo => {
            let pairs = each(lines, |line| {
                let (chosen, rejected) = pair(model, line, watch)?;
                Ok(preference::Pair { chosen, rejected, weight: 1.0 })
            })?;
            preference::dpo(model, start, &pairs, how, watch)?
        }
        Recipe::Kto => {
            let judged = each(lines, |line| judged(model, line, watch))?;
            preference::kto(model, start, &judged, how, watch)?
        }
        Recipe::Ppo | Recipe::Rloo | Recipe::Grpo => online(args, config, model, start, lines, watch)?,
        Recipe::Reward | Recipe::Classifier => return Err("this recipe makes no policy".into()),
    };
    Ok(Trained::Policy(policy))
}

/// The recipes that learn from their own answers, through an engine without other work.
fn online(
    args: &Args,
    config: &Config,
    model: &Arc<Model>,
    start: Arc<Adapter>,
    lines: &[Line],
    watch: &Watch<'_>,
) -> Result<Arc<Adapter>, Error> {
    let learn = &config.learn;
    let dir = args.reward.as_deref().ok_or("--reward DIR is needed: the recipe follows a reward model")?;
    let reward = reward_model(model, dir)?;
    let method = match args.recipe {
        Recipe::Rloo => Method::Rloo(&learn.groups),
        Recipe::Grpo => Method::Grpo(&learn.groups),
        _ => Method::Ppo { value: reward.value()? },
    };
    let prompts = each(lines, |(line, object)| generate::prompt(*line, object))?;
    let (_served, receiver) = watch::channel(Served { version: Version(0), adapter: None });
    let metrics = policy::Metrics::register(&prometheus::Registry::new())?;
    let settings =
        policy::Config { queue: config.policy.queue.max(learn.ppo.episodes * 2), ..config.policy.clone() };
    let engine = Engine::start(Arc::clone(model), &settings, receiver, metrics)?;
    let reward = Reward::Model { model: &reward, pessimism: learn.reward.pessimism };
    let practice = Practice { engine: &engine, reward, config: &learn.ppo };
    let mut online = Online::new(practice, method, start, args.seed);
    online.train(&prompts, &[], watch)?;
    Ok(online.policy)
}

/// What each line says.
fn each<T>(lines: &[Line], read: impl Fn(&Line) -> Result<T, Error>) -> Result<Vec<T>, Error> {
    lines.iter().map(read).collect()
}

/// What SFT learns from a line.
pub(super) fn shown(model: &Model, (line, object): &Line, watch: &Watch<'_>) -> Result<Sequence, Error> {
    if object.contains_key("text") {
        let text = jsonl::text(*line, object, "text")?;
        let mut tokens = model.vocabulary.encode_text(text)?;
        tokens.truncate(watch.sequence_tokens);
        if tokens.len() < 2 {
            return Err(format!("line {line}: `text` is too short to learn from").into());
        }
        return Ok(Sequence::new(tokens, 1));
    }
    if object.contains_key("messages") {
        let mut messages = generate::messages(*line, object, "messages")?;
        let answer = messages.pop().ok_or_else(|| format!("line {line}: `messages` is empty"))?;
        return Ok(Sequence::encode(model, &Prompt::Chat(messages), &answer.content, watch.sequence_tokens)?);
    }
    let prompt = generate::prompt(*line, object)?;
    encode(model, *line, object, &prompt, "completion", watch)
}

/// A line's two answers, the better one first.
pub(super) fn pair(
    model: &Model,
    (line, object): &Line,
    watch: &Watch<'_>,
) -> Result<(Sequence, Sequence), Error> {
    let prompt = generate::prompt(*line, object)?;
    let side = |field: &str| encode(model, *line, object, &prompt, field, watch);
    Ok((side("chosen")?, side("rejected")?))
}

/// What a reward model learns from a line.
pub(super) fn example(model: &Model, line: &Line, watch: &Watch<'_>) -> Result<Example, Error> {
    let (number, object) = line;
    if object.contains_key("label") {
        let Judged { answer, desirable, weight } = judged(model, line, watch)?;
        return Ok(Example::Label { answer, label: f64::from(u8::from(desirable)), margin: 0.0, weight });
    }
    let (chosen, rejected) = pair(model, line, watch)?;
    let margin = match object.get("margin") {
        None | Some(Value::Null) => 0.0,
        Some(margin) => margin.as_f64().ok_or_else(|| format!("line {number}: `margin` must be a number"))?,
    };
    Ok(Example::Comparison { chosen, rejected, margin, weight: 1.0 })
}

/// A line's answer and whether it was found good.
fn judged(model: &Model, (line, object): &Line, watch: &Watch<'_>) -> Result<Judged, Error> {
    let Some(Value::Bool(desirable)) = object.get("label") else {
        return Err(format!("line {line}: `label` must be true or false").into());
    };
    let prompt = generate::prompt(*line, object)?;
    let answer = encode(model, *line, object, &prompt, "completion", watch)?;
    Ok(Judged { answer, desirable: *desirable, weight: 1.0 })
}

/// An answer's field is a string, or a list with the assistant's message.
fn encode(
    model: &Model,
    line: usize,
    object: &Map<String, Value>,
    prompt: &Prompt,
    field: &str,
    watch: &Watch<'_>,
) -> Result<Sequence, Error> {
    let answer =
        generate::messages(line, object, field)?.pop().map_or_else(String::new, |message| message.content);
    Ok(Sequence::encode(model, prompt, &answer, watch.sequence_tokens)?)
}

/// A directory's adapter as a reward model.
pub(super) fn reward_model(model: &Model, dir: &Path) -> Result<RewardModel, Error> {
    Ok(RewardModel::load(dir, &model.decoder.architecture)?)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_of_all_commands_are_sound() {
        crate::cli::Cli::command().debug_assert();
    }
}
