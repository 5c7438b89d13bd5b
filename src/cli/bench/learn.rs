//! `gyrostat bench train|ppo|beside`: what training takes, and what serving notices of it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use crate::cli::{Error, generate};
use crate::completion::Prompt;
use crate::config::Config;
use crate::learn::{
    Measures, Method, MicroTokens, Online, Pace, Practice, Reward, RewardModel, Watch, ppo as recipe,
};
use crate::policy::{AdapterGradient, Batch, Decoder, Engine, Model};

use super::serve;

fn tokens(count: usize, salt: usize, decoder: &Decoder) -> Vec<u32> {
    let vocabulary = decoder.architecture.vocabulary;
    (0..count).map(|at| ((100 + (at * 7 + salt * 131) % 3000) % vocabulary) as u32).collect()
}

/// Sequences of 256 tokens that are trained on.
const SEQUENCES: usize = 4;
/// As many as a card may take to be busy.
const MANY_SEQUENCES: usize = 32;

/// Tokens a second of training, and on a card what share that is of what it can do.
pub(super) fn training(
    config: &Config,
    rounds: usize,
    row: &mut dyn FnMut(&str, Vec<f64>),
) -> Result<(), Error> {
    let model = generate::load(&config.policy.model, config.policy.device)?;
    let measured = (0..rounds).map(|_| train(&model, config, SEQUENCES)).collect::<Result<Vec<_>, _>>()?;
    row("train_lora_tokens_per_second", measured);
    let decoder = &model.decoder;
    if !decoder.is_on_card() {
        return Ok(());
    }
    train(&model, config, MANY_SEQUENCES)?;
    let many = (0..rounds).map(|_| train(&model, config, MANY_SEQUENCES)).collect::<Result<Vec<_>, _>>()?;
    let most = decoder.product_rate()?;
    // Two operations forward, two for the gradient of the input; none for that of a frozen weight.
    let done = 4.0 * decoder.multiplied() as f64;
    row("card_products_teraflops", vec![most / 1e12]);
    row(
        "train_lora_8192_tokens_share_of_card_percent",
        many.iter().map(|rate| 100.0 * rate * done / most).collect(),
    );
    row("train_lora_8192_tokens_per_second", many);
    Ok(())
}

/// Tokens a second of one forward and backward pass of a LoRA on all linears, log-probabilities of every token.
fn train(model: &Model, config: &Config, sequences: usize) -> Result<f64, Error> {
    let decoder = &model.decoder;
    let adapter = recipe::new_policy(model, config.learn.ppo.rank, config.learn.ppo.alpha, 1.0, 0)?;
    let sequences: Vec<Vec<u32>> = (0..sequences).map(|salt| tokens(256, salt, decoder)).collect();
    let batch = Batch::of(sequences.iter().map(Vec::as_slice), Some(&adapter));
    let started = Instant::now();
    let trunk = decoder.trunk(&batch, 0)?;
    let (hidden, tape) = decoder.hidden_taped(&trunk, &batch, 0)?;
    let logprobs = decoder.token_logprobs(&hidden, &batch.tokens, 1.0, true)?;
    let gradient = vec![-1.0 / batch.tokens.len() as f32; batch.tokens.len()];
    if let Some(dhidden) = logprobs.backward(&gradient)? {
        decoder.backward(&tape, &dhidden, &mut AdapterGradient::default())?;
    }
    decoder.synchronize()?;
    Ok(batch.tokens.len() as f64 / started.elapsed().as_secs_f64())
}

/// Iterations of PPO, two a round: with adapters on all layers, and of the configured depths.
pub(super) fn ppo(config: &Config, rounds: usize, row: &mut dyn FnMut(&str, Vec<f64>)) -> Result<(), Error> {
    let (engine, _serving) = serve::start(config)?;
    let mut everywhere = config.clone();
    (everywhere.learn.ppo.depth, everywhere.learn.reward.depth) = (1.0, 1.0);
    let (mut whole, mut configured, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    Pace::threads()?.install(|| -> Result<(), Error> {
        // Not counted: the first one pays for memory that the system has not given before.
        iteration(&engine, &everywhere, 0)?;
        for round in 0..rounds {
            whole.push(iteration(&engine, &everywhere, round)?.0);
            let (seconds, length) = iteration(&engine, config, round)?;
            configured.push(seconds);
            tokens.push(length);
        }
        Ok(())
    })?;
    row("ppo_iteration_all_layers_seconds", whole);
    row("ppo_iteration_configured_depths_seconds", configured);
    row("ppo_tokens_an_answer", tokens);
    Ok(())
}

/// Seconds of one iteration, rollouts and their scores included, and the mean tokens of its answers.
fn iteration(engine: &Engine, config: &Config, round: usize) -> Result<(f64, f64), Error> {
    let (model, seed) = (engine.model(), round as u64);
    let how = recipe::Config {
        iterations: 1,
        episodes: 16,
        num_ppo_epochs: 4,
        num_mini_batches: 1,
        response_length: 64,
        rank: 16,
        ..config.learn.ppo.clone()
    };
    let reward = RewardModel::new(model, &config.learn.reward, seed)?;
    let policy = recipe::new_policy(model, how.rank, how.alpha, how.depth, seed)?;
    let words = [" river", " stone", " bread", " music", " winter", " house", " paper", " garden"];
    let text = |nth: usize| (0..64).map(|at| words[(at * (nth + 1) + at / 8) % 8]).collect();
    let prompts: Vec<Prompt> = (0..16).map(|nth| Prompt::Text(text(nth))).collect();
    let score = Reward::Model { model: &reward, pessimism: config.learn.reward.pessimism };
    let nowhere = |_: &str, _: f64, _: Measures<'_>| ();
    let watch = Watch {
        micro_tokens: MicroTokens::new(config.learn.pace.micro_tokens),
        sequence_tokens: config.learn.pace.sequence_tokens,
        between: &|| true,
        report: &nowhere,
        checkpoints: None,
    };
    let practice = Practice { engine, reward: score, config: &how };
    let started = Instant::now();
    let mut online = Online::new(practice, Method::Ppo { value: reward.value()? }, policy, seed);
    let measures = online.train(&prompts, &prompts, &watch)?;
    let seconds = started.elapsed().as_secs_f64();
    let length = measures
        .iter()
        .find(|(name, _)| *name == "objective/response_tokens")
        .map_or(0.0, |(_, length)| *length);
    Ok((seconds, length))
}

/// A stream alone, and streams beside training that gives way to them as the learner does.
pub(super) fn beside(
    config: &Config,
    rounds: usize,
    row: &mut dyn FnMut(&str, Vec<f64>),
) -> Result<(), Error> {
    let (engine, _serving) = serve::start(config)?;
    let (mut idle, mut training, mut passes) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        idle.push(serve::between_tokens(&engine, 2 * round)?);
        let (slowest, ended) = while_training(&engine, config, round)?;
        training.push(slowest);
        passes.push(ended as f64);
    }
    row("between_tokens_p95_idle_ms", idle);
    row("between_tokens_p95_training_ms", training);
    row("training_passes_meanwhile", passes);
    Ok(())
}

/// The slowest of three streams' 95th percentiles, and the passes of [`train`] that ended meanwhile.
fn while_training(engine: &Engine, config: &Config, round: usize) -> Result<(f64, usize), Error> {
    let ended = AtomicBool::new(false);
    let threads = Pace::threads()?;
    std::thread::scope(|scope| {
        let learner = scope.spawn(|| {
            engine.beside(|| -> Result<usize, Error> {
                let mut passes = 0;
                while !ended.load(Ordering::Relaxed) {
                    threads.install(|| train(engine.model(), config, SEQUENCES))?;
                    engine.give_way(config.learn.pace.give_way());
                    passes += 1;
                }
                Ok(passes)
            })
        });
        let streams = (0..3).map(|nth| serve::between_tokens(engine, 100 * round + nth));
        let slowest = streams.collect::<Result<Vec<_>, _>>();
        ended.store(true, Ordering::Relaxed);
        let passes = learner.join().unwrap_or_else(|_| Err("the learner panicked".into()))?;
        Ok((slowest?.into_iter().fold(0.0, f64::max), passes))
    })
}
