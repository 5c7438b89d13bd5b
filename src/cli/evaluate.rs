//! `gyrostat evaluate`: perplexity, preference accuracy, reward and KL on a file, as JSON.

use std::{io::Write, path::PathBuf};

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::learn::{
    MicroTokens, RewardModel, Sequence, Watch, policy_pass::logprobs, reward::Example, sequence::MicroBatch,
};
use crate::policy::Model;

use super::{Error, generate, jsonl, train};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Lines as `train` takes them; `-` is stdin.
    #[arg(long)]
    data: String,
    /// A policy's adapter.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// A reward model's adapter.
    #[arg(long)]
    reward: Option<PathBuf>,
}

pub(super) fn run(args: &Args, config: &Config) -> Result<(), Error> {
    let lines = jsonl::read(&args.data)?;
    let model = generate::load(&config.policy.model, config.policy.device)?;
    let adapter = generate::adapter(&model, args.adapter.as_deref())?;
    let watch = Watch {
        micro_tokens: MicroTokens::new(config.learn.pace.micro_tokens),
        sequence_tokens: config.learn.pace.sequence_tokens,
        between: &|| true,
        report: &|_, _, _| {},
        checkpoints: None,
    };
    let mut sequences = Vec::new();
    let (mut examples, mut shown) = (Vec::new(), Vec::new());
    for line in &lines {
        if line.1.contains_key("chosen") || line.1.contains_key("label") {
            let example = train::example(&model, line, &watch)?;
            let (Example::Comparison { chosen: answer, .. } | Example::Label { answer, .. }) = &example;
            sequences.push(answer.clone());
            examples.push(example);
        } else {
            let answer = train::shown(&model, line, &watch)?;
            sequences.push(answer.clone());
            shown.push(answer);
        }
    }
    let mut result = Map::new();
    result.insert("examples".to_owned(), json!(lines.len()));
    let bar = jsonl::bar(sequences.len() as u64, "sequences");
    let (mut nats, mut base, mut surprise, mut tokens) = (0.0, 0.0, 0.0, 0);
    for micro in MicroBatch::pack(&sequences, watch.micro_tokens.get()) {
        let parts = watch.in_memory(&micro, &mut (), |micro, ()| {
            let trunk = model.decoder.trunk(&micro.batch(), 0)?;
            let of = |adapter| logprobs(&model.decoder, micro, (&trunk, 0), adapter, 1.0);
            let base = of(None)?;
            let nats = adapter.as_ref().map(|adapter| of(Some(adapter))).transpose()?;
            let sum = |values: &[f32]| values.iter().map(|value| f64::from(*value)).sum::<f64>();
            let base_nats = sum(&base.logprobs);
            Ok((nats.map_or(base_nats, |nats| sum(&nats.logprobs)), base_nats, sum(&base.surprise())))
        })?;
        for part in parts {
            (nats, base, surprise) = (nats + part.0, base + part.1, surprise + part.2);
        }
        tokens += micro.targets.len();
        bar.inc(micro.members.len() as u64);
    }
    bar.finish_and_clear();
    let each = |sum: f64| sum / tokens.max(1) as f64;
    result.insert("tokens".to_owned(), json!(tokens));
    result.insert("mean_logprob".to_owned(), json!(each(nats)));
    result.insert("perplexity".to_owned(), json!((-each(nats)).exp()));
    // How much more the data surprises the original model than its own words would.
    result.insert("surprise".to_owned(), json!(each(surprise)));
    if adapter.is_some() {
        // On given text, not on its own samples: how much likelier the adapter makes the data, in nats a token.
        result.insert("logprob_gain_over_base".to_owned(), json!(each(nats - base)));
    }
    if let Some(dir) = &args.reward {
        judge(
            &mut result,
            (&train::reward_model(&model, dir)?, &model),
            (&examples, &shown),
            config,
            &watch,
        )?;
    }
    let mut out = jsonl::writer("-")?;
    writeln!(out, "{}", Value::Object(result))?;
    out.flush()?;
    Ok(())
}

/// What the reward model says of examples and of answers that nobody has judged.
fn judge(
    result: &mut Map<String, Value>,
    (reward, model): (&RewardModel, &Model),
    (examples, shown): (&[Example], &[Sequence]),
    config: &Config,
    watch: &Watch<'_>,
) -> Result<(), Error> {
    let agreement = reward.evaluate(model, examples, &config.learn.reward, watch)?;
    let of_shown = reward.score(model, shown, watch)?.into_iter().map(f64::from).sum::<f64>();
    let answers = examples.len() + shown.len();
    let sum = agreement.score * examples.len() as f64 + of_shown;
    result.insert("reward".to_owned(), json!(sum / answers.max(1) as f64));
    if !examples.is_empty() {
        result.insert("preference_accuracy".to_owned(), json!(agreement.accuracy));
        result.insert("longer_wins".to_owned(), json!(agreement.longer_wins));
        result.insert("preference_loss".to_owned(), json!(agreement.loss));
        result.insert("expected_calibration_error".to_owned(), json!(agreement.calibration_error));
    }
    Ok(())
}
