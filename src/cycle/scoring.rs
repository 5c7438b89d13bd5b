//! Candidate and incumbent answer the same held-back prompts; what the gate judges is counted here.

use std::sync::Arc;

use crate::completion::{FinishReason, Risk};
use crate::learn::sequence::MicroBatch;
use crate::learn::{
    self, RewardModel, Scores, Sequence, Watch,
    dataset::Asked,
    policy_pass::{BesideBase, logprobs},
    sequence,
};
use crate::policy::{Adapter, Engine, Event, GenerateRequest, Sampling, Served};
use crate::signals::{self, Classifier};

/// Plain text of many kinds, the same for every version: how much of the language itself a candidate has lost. A single
/// passage says little: its perplexity moves by a twentieth either way between policies of one run and another.
const FIXED_TEXT: &str = include_str!("fixed_text.txt");

/// Who is compared, and by whom.
#[derive(Debug)]
pub struct Compared<'a> {
    /// `None` is the base model.
    pub incumbent: Option<Arc<Adapter>>,
    pub candidate: Arc<Adapter>,
    pub reward: &'a RewardModel,
    pub classifier: &'a Classifier,
}

/// One model's answers to the prompts.
#[derive(Default)]
struct Answers {
    sequences: Vec<Sequence>,
    texts: Vec<String>,
    tokens: Vec<usize>,
}

/// Scores of the incumbent and of the candidate.
///
/// # Errors
/// The device fails, or the update is cancelled.
pub fn side_by_side(
    (engine, response_length): (&Engine, usize),
    compared: &Compared<'_>,
    prompts: &[Asked],
    watch: &Watch<'_>,
) -> Result<(Scores, Scores), learn::Error> {
    let (incumbent, candidate) = (compared.incumbent.as_ref(), Some(&compared.candidate));
    let reward = compared.reward;
    let before = answer(engine, response_length, incumbent, prompts, watch)?;
    (watch.report)("gate", 0.4, &[]);
    let after = answer(engine, response_length, candidate, prompts, watch)?;
    (watch.report)("gate", 0.8, &[]);
    let model = engine.model();
    let scores_before = reward.score(model, &before.sequences, watch)?;
    let scores_after = reward.score(model, &after.sequences, watch)?;
    let mut incumbent_scores = scores(engine, incumbent, &before, &scores_before, watch)?;
    let mut candidate_scores = scores(engine, candidate, &after, &scores_after, watch)?;
    let declined_before = count_refusals(&mut incumbent_scores, compared.classifier, prompts, &before);
    let declined_after = count_refusals(&mut candidate_scores, compared.classifier, prompts, &after);
    for (_, declined) in declined_before.iter().zip(declined_after).filter(|(one, other)| **one != *other) {
        candidate_scores.newly_declined.count(declined);
        incumbent_scores.newly_declined.count(!declined);
    }
    for ((asked, before), after) in prompts.iter().zip(&scores_before).zip(&scores_after) {
        candidate_scores.compare(&asked.interaction, f64::from(*after), f64::from(*before));
        incumbent_scores.compare(&asked.interaction, f64::from(*before), f64::from(*after));
    }
    Ok((incumbent_scores, candidate_scores))
}

/// Answers through the engine, as users would get them, with the same seed for both models.
fn answer(
    engine: &Engine,
    response_length: usize,
    adapter: Option<&Arc<Adapter>>,
    prompts: &[Asked],
    watch: &Watch<'_>,
) -> Result<Answers, learn::Error> {
    let mut pending = Vec::new();
    for (seed, asked) in prompts.iter().enumerate() {
        let mut prompt = sequence::encode_prompt(engine.model(), &asked.prompt)?;
        let room = watch.sequence_tokens.saturating_sub(response_length + 1).max(1);
        prompt.drain(..prompt.len().saturating_sub(room));
        let request = GenerateRequest {
            prompt: prompt.clone(),
            sampling: Sampling { seed: seed as u64, ..Sampling::default() },
            max_tokens: response_length,
            stop: Vec::new(),
            top_logprobs: None,
            pinned: Some(Served { version: engine.served(), adapter: adapter.cloned() }),
        };
        let events = engine.submit(request).map_err(|error| learn::Error::Rollout(error.to_string()))?;
        pending.push((prompt, events));
    }
    let mut answers = Answers::default();
    for (prompt, mut events) in pending {
        if !(watch.between)() {
            return Err(learn::Error::Cancelled);
        }
        let generated = loop {
            match events.blocking_recv() {
                Some(Event::Done(generated)) => break generated,
                Some(Event::Failed(why)) => return Err(learn::Error::Rollout(why)),
                Some(Event::Started { .. } | Event::Text { .. }) => {}
                None => return Err(learn::Error::Rollout("the engine has stopped".to_owned())),
            }
        };
        let ended = generated.finish_reason == FinishReason::Stop;
        answers.sequences.push(Sequence::sampled(engine.model(), &prompt, &generated.tokens, ended));
        answers.texts.push(engine.model().vocabulary.decode(&generated.tokens));
        answers.tokens.push(generated.tokens.len());
    }
    Ok(answers)
}

/// Everything but the comparison.
fn scores(
    engine: &Engine,
    adapter: Option<&Arc<Adapter>>,
    answers: &Answers,
    rewards: &[f32],
    watch: &Watch<'_>,
) -> Result<Scores, learn::Error> {
    let (kl, surprise) = nats(engine, adapter, &answers.sequences, watch)?;
    let mut scores = Scores {
        kl,
        surprise,
        reward: mean(rewards.iter().map(|reward| f64::from(*reward))),
        length: mean(answers.tokens.iter().map(|tokens| *tokens as f64)),
        perplexity: perplexity(engine, adapter, watch)?,
        ..Scores::default()
    };
    let usable = answers.texts.iter().map(|text| signals::usable(text, FinishReason::Stop));
    scores.usable = mean(usable);
    Ok(scores)
}

/// How often what should be answered was declined, and the other way round. Returns whether each of the former was.
fn count_refusals(
    scores: &mut Scores,
    classifier: &Classifier,
    prompts: &[Asked],
    answers: &Answers,
) -> Vec<bool> {
    let mut declined = Vec::new();
    for (asked, text) in prompts.iter().zip(&answers.texts) {
        let refused = classifier.refusal(asked.prompt.request(), text).is_refusal();
        match classifier.risk(asked.prompt.request()) {
            Risk::Benign => {
                scores.over_refusal.count(refused);
                declined.push(refused);
            }
            Risk::Harmful => scores.unsafe_compliance.count(!refused),
        }
    }
    declined
}

/// In nats a token of the answers: `log π − log π_ref`, and how much more they surprise the original model than its own
/// answers would.
fn nats(
    engine: &Engine,
    adapter: Option<&Arc<Adapter>>,
    answers: &[Sequence],
    watch: &Watch<'_>,
) -> Result<(f64, f64), learn::Error> {
    let decoder = &engine.model().decoder;
    let (mut kl, mut surprise, mut tokens) = (0.0, 0.0, 0);
    for micro in MicroBatch::pack(answers, watch.micro_tokens.get()) {
        let parts = watch.in_memory(&micro, &mut (), |micro, ()| {
            let (kl, base) = match adapter {
                Some(adapter) => {
                    let both = BesideBase::new(decoder, micro, adapter)?;
                    (both.ratios().sum(), both.base)
                }
                None => {
                    let trunk = decoder.trunk(&micro.batch(), 0)?;
                    (0.0, logprobs(decoder, micro, (&trunk, 0), None, 1.0)?)
                }
            };
            Ok((kl, base.surprise().into_iter().map(f64::from).sum::<f64>()))
        })?;
        kl += parts.iter().map(|part| part.0).sum::<f64>();
        surprise += parts.iter().map(|part| part.1).sum::<f64>();
        tokens += micro.targets.len();
    }
    let tokens = tokens.max(1) as f64;
    Ok((kl / tokens, surprise / tokens))
}

/// `exp` of the mean negative log-probability of the tokens of the fixed text's passages.
fn perplexity(
    engine: &Engine,
    adapter: Option<&Arc<Adapter>>,
    watch: &Watch<'_>,
) -> Result<f64, learn::Error> {
    let model = engine.model();
    let passage = |text: &str| {
        let tokens = model.vocabulary.encode_answer(text)?.into_iter().take(watch.sequence_tokens).collect();
        Ok(Sequence::new(tokens, 1))
    };
    let passages = FIXED_TEXT.split("\n\n").map(passage).collect::<Result<Vec<_>, learn::Error>>()?;
    let mut nats = Vec::new();
    for micro in MicroBatch::pack(&passages, watch.micro_tokens.get()) {
        let parts = watch.in_memory(&micro, &mut (), |micro, ()| {
            let trunk = model.decoder.trunk(&micro.batch(), 0)?;
            Ok(logprobs(&model.decoder, micro, (&trunk, 0), adapter, 1.0)?.logprobs)
        })?;
        nats.extend(parts.into_iter().flatten());
    }
    Ok((-mean(nats.iter().map(|logprob| f64::from(*logprob)))).exp())
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for value in values {
        sum += value;
        count += 1;
    }
    if count == 0 { 0.0 } else { sum / f64::from(count) }
}
