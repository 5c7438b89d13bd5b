//! `POST /v1/chat/completions`, `POST /v1/completions`: from the request through the engine into the store.

mod stream;

use std::{sync::Arc, time::Instant};

use axum::{
    Json,
    body::Bytes,
    extract,
    http::request::Parts,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::completion::{CompletionId, InteractionType, Prompt, Timestamp, Version};
use crate::policy::{Engine, Event, GenerateRequest, Generated, Grammar, Sampling, TokenLogprob};
use crate::registry::Trial;

use super::{
    Backend, State,
    access::{Line, Told},
    error::ApiError,
    metrics::{Metrics, Served},
    record, relay,
    shape::Shape,
    versioned,
    wire::{self, Asked},
};

type Result<T> = std::result::Result<T, ApiError>;

pub(super) async fn chat(
    extract::State(state): extract::State<State>,
    head: Parts,
    body: Bytes,
) -> Result<Response> {
    match state.backend.clone() {
        Backend::Embedded(engine) => answer(state, engine, &head, wire::chat(&body)?, Shape::Chat).await,
        Backend::Upstream(relay) => relay::complete(&state, relay, head, body, Shape::Chat).await,
        Backend::Log => Err(ApiError::replaying()),
    }
}

pub(super) async fn text(
    extract::State(state): extract::State<State>,
    head: Parts,
    body: Bytes,
) -> Result<Response> {
    match state.backend.clone() {
        Backend::Embedded(engine) => answer(state, engine, &head, wire::text(&body)?, Shape::Text).await,
        Backend::Upstream(relay) => relay::complete(&state, relay, head, body, Shape::Text).await,
        Backend::Log => Err(ApiError::replaying()),
    }
}

async fn answer(state: State, engine: Engine, head: &Parts, asked: Asked, shape: Shape) -> Result<Response> {
    let started = Instant::now();
    if asked.model != "default" && asked.model != engine.model_name() {
        return Err(ApiError::unknown_model(&asked.model));
    }
    let words = engine.model().decoder.architecture.vocabulary;
    if let Some((token, _)) = asked.logit_bias.iter().find(|(token, _)| *token as usize >= words) {
        let why = format!("is about a token that there is not: ids end at {}", words - 1);
        return Err(ApiError::parameter(&format!("logit_bias.{token}"), why));
    }
    let prompt = encode(&engine, &asked.prompt).await?;
    let grammar = match &asked.form {
        Some(schema) => Some(grammar(&engine, schema.clone()).await?),
        None => None,
    };
    // A new tag takes one of few places, which only a request that can be answered is worth.
    let interaction = interaction(&state, &asked)?;
    let trial =
        super::candidate(state.registry.trial(), asked.user.as_deref(), &asked.metadata, &asked.prompt);
    let pending = Pending {
        metrics: Arc::clone(&state.metrics),
        interaction: interaction.clone(),
        version: trial.as_ref().map_or(engine.served(), |trial| trial.served.version),
        choices: asked.n as u64,
    };
    let mut call = Call {
        ids: (0..asked.n).map(|_| CompletionId::new()).collect(),
        at: (state.clock)(),
        prompt_tokens: prompt.len(),
        state,
        engine,
        asked,
        shape,
        interaction,
        trial,
        started,
        line: head.extensions.get::<Arc<Line>>().cloned(),
        pending,
        total: Total::default(),
    };
    match call.submit(&prompt, grammar) {
        Ok(events) if call.asked.stream => Ok(call.stream(events).await),
        Ok(events) => call.whole(events).await,
        Err(error) => Err(call.end(error, "rejected")),
    }
}

/// The caller's tag, or what the request looks like.
fn interaction(state: &State, asked: &Asked) -> Result<InteractionType> {
    match asked.metadata.get("interaction") {
        Some(tag) => state
            .interactions
            .tagged(tag)
            .map_err(|error| ApiError::parameter("metadata.interaction", format!("is not valid: {error}"))),
        None => Ok(state.interactions.classify(asked.prompt.request())),
    }
}

/// Off the runtime: a megabyte of text keeps the tokenizer busy for a while.
pub(super) async fn encode(engine: &Engine, prompt: &Prompt) -> Result<Vec<u32>> {
    let (engine, prompt) = (engine.clone(), prompt.clone());
    let encoded = tokio::task::spawn_blocking(move || match &prompt {
        Prompt::Chat(messages) => engine.encode_chat(messages),
        Prompt::Text(text) => engine.encode_text(text),
    });
    Ok(encoded.await.map_err(ApiError::internal)??)
}

/// Off the runtime too, for a schema that is new has to be compiled.
async fn grammar(engine: &Engine, schema: Map<String, Value>) -> Result<Grammar> {
    let engine = engine.clone();
    let compiled = tokio::task::spawn_blocking(move || engine.grammar(&schema)).await;
    let refused = |why| ApiError::parameter("response_format.json_schema.schema", why);
    compiled.map_err(ApiError::internal)?.map_err(refused)
}

/// A request on its way through the engine.
struct Call {
    state: State,
    engine: Engine,
    asked: Asked,
    shape: Shape,
    interaction: InteractionType,
    /// The candidate that answers in the served version's place.
    trial: Option<Arc<Trial>>,
    prompt_tokens: usize,
    /// One a choice; the first is the id of the response.
    ids: Vec<CompletionId>,
    at: Timestamp,
    started: Instant,
    line: Option<Arc<Line>>,
    pending: Pending,
    total: Total,
}

/// Choices that have not ended. Where it is dropped with some left, their client has hung up.
struct Pending {
    metrics: Arc<Metrics>,
    interaction: InteractionType,
    version: Version,
    choices: u64,
}

impl Pending {
    fn end(&mut self, outcome: &str) {
        if self.choices > 0 {
            self.metrics.no_completion(&self.interaction, &self.version.to_string(), outcome, self.choices);
            self.choices = 0;
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.end("cancelled");
    }
}

/// Over the choices that are in the store.
#[derive(Debug, Clone, Copy, Default)]
struct Total {
    tokens: usize,
    most_tokens: usize,
    first_token_seconds: Option<f64>,
    /// Tokens of the prompt that no choice had to compute.
    cached_tokens: Option<usize>,
}

/// One choice, complete.
pub(super) struct Choice {
    pub(super) text: String,
    logprobs: Vec<TokenLogprob>,
    end: Generated,
}

/// `None` if it failed.
pub(super) async fn complete(mut events: mpsc::Receiver<Event>) -> Option<Choice> {
    let (mut text, mut logprobs) = (String::new(), Vec::new());
    while let Some(event) = events.recv().await {
        match event {
            Event::Started { .. } => {}
            Event::Text { text: more, logprobs: tokens } => {
                text.push_str(&more);
                logprobs.extend(tokens);
            }
            Event::Done(end) => return Some(Choice { text, logprobs, end }),
            Event::Failed(_) => return None,
        }
    }
    None
}

impl Call {
    /// One sequence a choice; the seeds of further choices follow the first.
    fn submit(&self, prompt: &[u32], grammar: Option<Grammar>) -> Result<Vec<mpsc::Receiver<Event>>> {
        let asked = &self.asked;
        let room = self.engine.context().saturating_sub(prompt.len());
        let max_tokens = asked.max_tokens.unwrap_or(self.state.config.default_max_tokens.min(room).max(1));
        let seed = asked.seed.unwrap_or_else(|| self.ids[0].0.as_u64_pair().1);
        (0..asked.n)
            .map(|nth| {
                let request = GenerateRequest {
                    prompt: prompt.to_vec(),
                    sampling: Sampling {
                        temperature: asked.temperature,
                        top_p: asked.top_p,
                        top_k: asked.top_k,
                        min_p: asked.min_p,
                        presence_penalty: asked.presence_penalty,
                        frequency_penalty: asked.frequency_penalty,
                        logit_bias: asked.logit_bias.clone(),
                        grammar: grammar.clone(),
                        seed: seed.wrapping_add(nth as u64),
                    },
                    max_tokens,
                    stop: asked.stop.clone(),
                    top_logprobs: asked.top_logprobs,
                    pinned: self.trial.as_ref().map(|trial| trial.served.clone()),
                };
                let taken = self.engine.submit_first(request);
                taken.map_err(|error| ApiError::not_taken(&error, self.shape.prompt_field()))
            })
            .collect()
    }

    /// All choices, then the answer as one object. Every choice is durable before any is sent.
    async fn whole(mut self, events: Vec<mpsc::Receiver<Event>>) -> Result<Response> {
        let mut choices = Vec::new();
        for events in events {
            let Some(choice) = complete(events).await else {
                return Err(self.end(ApiError::failed(), "failed"));
            };
            choices.push(choice);
        }
        if let Some(choice) = choices.first() {
            self.pending.version = choice.end.version;
        }
        let mut rendered = Vec::new();
        for (nth, Choice { text, logprobs, end }) in choices.into_iter().enumerate() {
            if let Err(error) = self.record(nth, &text, &end).await {
                return Err(self.end(error, "failed"));
            }
            let logprobs = self.asked.top_logprobs.map(|_| logprobs.as_slice());
            rendered.push(self.shape.choice(self.ids[nth], nth, &text, logprobs, end.finish_reason));
        }
        let mut body = self.head(self.shape.object());
        body["choices"] = Value::Array(rendered);
        body["usage"] = self.usage();
        self.served();
        Ok(versioned(Json(body).into_response(), self.pending.version))
    }

    fn head(&self, object: &str) -> Value {
        json!({
            "id": self.ids[0],
            "object": object,
            "created": self.at.0 / 1000,
            "model": self.engine.model_name(),
            "system_fingerprint": self.fingerprint(),
        })
    }

    /// Answers to the same request with the same seed are the same as long as this is: program, model and version.
    fn fingerprint(&self) -> String {
        let model = self.engine.model_name();
        let served = format!("{}/{model}/{}", env!("CARGO_PKG_VERSION"), self.pending.version);
        let digest = Sha256::digest(served.as_bytes());
        digest.iter().take(5).fold("fp_".to_owned(), |name, byte| format!("{name}{byte:02x}"))
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.total.tokens,
            "total_tokens": self.prompt_tokens + self.total.tokens,
            "prompt_tokens_details": { "cached_tokens": self.total.cached_tokens.unwrap_or_default() },
        })
    }

    /// Counts what has not ended, as ended badly.
    fn end(&mut self, error: ApiError, outcome: &str) -> ApiError {
        self.pending.end(outcome);
        let (model, seconds) = (self.engine.model_name(), self.started.elapsed().as_secs_f64());
        self.state.metrics.refused(self.shape.operation(), model, error.label(), seconds);
        error
    }

    /// Counts the request, all of whose choices have ended well.
    fn served(&self) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.state.metrics.served(Served {
            operation: self.shape.operation(),
            model: self.engine.model_name(),
            seconds,
            first_token_seconds: Some(self.total.first_token_seconds.unwrap_or(seconds)),
            prompt_tokens: Some(self.prompt_tokens),
            completion_tokens: Some(self.total.tokens),
            most_tokens: self.total.most_tokens,
        });
        if let Some(line) = &self.line {
            line.tell(Told {
                model: self.engine.model_name().to_owned(),
                version: self.pending.version,
                input_tokens: Some(self.prompt_tokens),
                output_tokens: Some(self.total.tokens),
            });
        }
    }

    /// Reads the signals of an answer and puts it into the store; returns once it is on disk.
    async fn record(&mut self, nth: usize, text: &str, end: &Generated) -> Result<()> {
        let request = record::Request {
            at: self.at,
            prompt: &self.asked.prompt,
            interaction: &self.interaction,
            risk: self.asked.risk,
            user: self.asked.user.as_deref(),
            metadata: &self.asked.metadata,
        };
        let answer = record::Answer {
            id: self.ids[nth],
            version: end.version,
            text,
            finish_reason: end.finish_reason,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: end.tokens.len(),
            kl: end.kl,
            seconds: self.started.elapsed().as_secs_f64(),
        };
        let completion = record::completion(request, answer, self.state.interactions.classifier());
        self.state.store.append(&completion).await?;
        self.state.metrics.completion(&completion);
        self.pending.choices = self.pending.choices.saturating_sub(1);
        let total = &mut self.total;
        total.tokens += end.tokens.len();
        total.most_tokens = total.most_tokens.max(end.tokens.len());
        let first = total.first_token_seconds.unwrap_or(end.first_token_seconds);
        total.first_token_seconds = Some(first.min(end.first_token_seconds));
        total.cached_tokens = Some(total.cached_tokens.unwrap_or(end.cached_tokens).min(end.cached_tokens));
        Ok(())
    }
}
