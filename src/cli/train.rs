//! `gyrostat train`: an adapter from a file, with the code that the cycle runs; or the classifier behind the signals.

mod classifier;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::{Args as ClapArgs, ValueEnum};
use rand::{SeedableRng, rngs::StdRng};
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::completion::{Prompt, Version};
use crate::config::Config;
use crate::learn::{Measures, Ppo, RewardModel, Sequence, Watch, ppo, preference, reward::Example};
use crate::policy::{self, Adapter, Engine, Model, Served};

use super::{
    Error, generate,
    jsonl::{self, Line},
};

#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    recipe: Recipe,
    /// The data, in TRL's formats: `sft` {"prompt","completion"}, {"messages"} or {"text"}; `reward` and `dpo`
    /// {"prompt","chosen","rejected"}, `reward` also {"prompt","completion","label"}; `ppo` {"prompt"}. `classifier`
    /// {"prompt"} with "risk" ("benign", "harmful") or "interaction", {"prompt","response"} with "refusal" ("none",
    /// "partial", "full") and "way_forward"; for it the option may be given again. `-` is stdin.
    #[arg(long, required = true)]
    data: Vec<String>,
    /// Directory that the adapter is written to; for `classifier` a file.
    #[arg(long)]
    out: PathBuf,
    /// The reward model's adapter, for `ppo`.
    #[arg(long)]
    reward: Option<PathBuf>,
    /// Go on from the adapter, or classifier, in `--out`.
    #[arg(long)]
    resume: bool,
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
    Ppo,
    Classifier,
}

pub(super) fn run(args: &Args, config: Config) -> Result<(), Error> {
    if args.recipe == Recipe::Classifier {
        return classifier::run(args, &config);
    }
    let [data] = args.data.as_slice() else { return Err("this recipe reads one file of --data".into()) };
    let lines = jsonl::read(data)?;
    let model = Arc::new(generate::load(&config.policy.model)?);
    let bar = jsonl::bar(1000, "training");
    let report = |stage: &str, done: f64, measures: Measures<'_>| {
        bar.set_position((done * 1000.0) as u64);
        let measures: Vec<String> =
            measures.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        bar.set_message(format!("{stage} {}", measures.join(" ")));
    };
    let watch = Watch {
        micro_tokens: config.learn.pace.micro_tokens,
        sequence_tokens: config.learn.pace.sequence_tokens,
        between: &|| true,
        report: &report,
    };
    let resumed = args.resume.then(|| Adapter::load(&args.out, &model.decoder.architecture)).transpose()?;
    let trained = train(args, &config, &model, resumed, &lines, &watch)?;
    bar.finish_and_clear();
    fs::create_dir_all(&args.out).map_err(|error| format!("{}: {error}", args.out.display()))?;
    trained.save(&args.out, &model.path.display().to_string())?;
    Ok(())
}

fn train(
    args: &Args,
    config: &Config,
    model: &Arc<Model>,
    resumed: Option<Arc<Adapter>>,
    lines: &[Line],
    watch: &Watch<'_>,
) -> Result<Arc<Adapter>, Error> {
    let mut rng = StdRng::seed_from_u64(args.seed);
    let learn = &config.learn;
    let start = || match &resumed {
        Some(adapter) => Ok(Arc::clone(adapter)),
        None => ppo::new_policy(model, learn.ppo.rank, learn.ppo.alpha, learn.ppo.depth, args.seed),
    };
    match args.recipe {
        Recipe::Sft => {
            let sequences =
                lines.iter().map(|line| shown(model, line, watch)).collect::<Result<Vec<_>, _>>()?;
            Ok(preference::sft(model, start()?, &sequences, &learn.preference, &mut rng, watch)?)
        }
        Recipe::Dpo => {
            let pairs = lines.iter().map(|line| pair(model, line, watch)).collect::<Result<Vec<_>, _>>()?;
            Ok(preference::dpo(model, start()?, &pairs, &learn.preference, &mut rng, watch)?)
        }
        Recipe::Reward => {
            let examples =
                lines.iter().map(|line| example(model, line, watch)).collect::<Result<Vec<_>, _>>()?;
            let mut reward = match resumed {
                Some(adapter) => RewardModel { adapter },
                None => RewardModel::new(model, &learn.reward, args.seed)?,
            };
            reward.train(model, &examples, &learn.reward, &mut rng, watch)?;
            Ok(reward.adapter)
        }
        Recipe::Ppo => {
            let dir = args.reward.as_deref().ok_or("--reward DIR is needed: PPO follows a reward model")?;
            let reward = reward_model(model, dir)?;
            let prompts = lines
                .iter()
                .map(|(line, object)| generate::prompt(*line, object))
                .collect::<Result<Vec<_>, _>>()?;
            let (_served, receiver) = watch::channel(Served { version: Version(0), adapter: None });
            let metrics = policy::Metrics::register(&prometheus::Registry::new())?;
            let engine = Engine::start(Arc::clone(model), &config.policy, receiver, metrics)?;
            let mut ppo = Ppo::new(&engine, &reward, resumed, &learn.ppo, args.seed)?;
            ppo.train(&prompts, &[], &mut rng, watch)?;
            Ok(ppo.policy)
        }
        Recipe::Classifier => Err("a classifier is no adapter".into()),
    }
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
        return Ok(Sequence { tokens, prompt: 1 });
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
    match object.get("label") {
        None => {
            let (chosen, rejected) = pair(model, line, watch)?;
            Ok(Example::Comparison { chosen, rejected, weight: 1.0 })
        }
        Some(Value::Bool(label)) => {
            let prompt = generate::prompt(*number, object)?;
            let answer = encode(model, *number, object, &prompt, "completion", watch)?;
            Ok(Example::Label { answer, label: f64::from(u8::from(*label)), weight: 1.0 })
        }
        Some(_) => Err(format!("line {number}: `label` must be true or false").into()),
    }
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
    Ok(RewardModel { adapter: Adapter::load(dir, &model.decoder.architecture)? })
}
