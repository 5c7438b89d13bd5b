//! `POST /v1/chat/completions` and `POST /v1/completions`: whole and streamed.

use std::{convert::Infallible, time::Instant};

use axum::{
    Json,
    body::{Body, Bytes},
    extract,
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::completion::{
    Completion, CompletionId, FinishReason, InteractionType, Prompt, Timestamp, Version,
};
use crate::policy::{Event, GenerateRequest, Generated, Sampling, TokenLogprob};
use crate::signals;

use super::{
    State,
    error::ApiError,
    metrics::Served,
    shape::Shape,
    wire::{self, Asked},
};

type Result<T> = std::result::Result<T, ApiError>;

pub(super) async fn chat(extract::State(state): extract::State<State>, body: Bytes) -> Result<Response> {
    answer(state, wire::chat(&body)?, Shape::Chat).await
}

pub(super) async fn text(extract::State(state): extract::State<State>, body: Bytes) -> Result<Response> {
    answer(state, wire::text(&body)?, Shape::Text).await
}

/// A request on its way through the engine.
pub(super) struct Call {
    pub(super) state: State,
    pub(super) asked: Asked,
    pub(super) shape: Shape,
    pub(super) interaction: InteractionType,
    pub(super) prompt_tokens: usize,
    /// One a choice; the first is the id of the response.
    pub(super) ids: Vec<CompletionId>,
    pub(super) at: Timestamp,
    started: Instant,
}

/// One choice while it is generated.
#[derive(Debug, Clone, Default)]
struct Choice {
    text: String,
    logprobs: Vec<TokenLogprob>,
}

async fn answer(state: State, asked: Asked, shape: Shape) -> Result<Response> {
    let started = Instant::now();
    let interaction = interaction(&state, &asked)?;
    let name = state.engine.model_name().to_owned();
    if asked.model != "default" && asked.model != name {
        return Err(ApiError::unknown_model(&asked.model));
    }
    let prompt = match &asked.prompt {
        Prompt::Chat(messages) => state.engine.encode_chat(messages)?,
        Prompt::Text(text) => state.engine.encode_text(text)?,
    };
    let ids = (0..asked.n).map(|_| CompletionId::new()).collect();
    let at = (state.clock)();
    let call = Call { state, asked, shape, interaction, prompt_tokens: prompt.len(), ids, at, started };
    let events = call.submit(prompt).inspect_err(|error| {
        let seconds = call.started.elapsed().as_secs_f64();
        call.state.metrics.refused(shape.operation(), &name, error.label(), seconds);
        let served = call.state.engine.served().to_string();
        call.state.metrics.no_completion(&call.interaction, &served, "rejected");
    })?;
    if call.asked.stream { Ok(call.stream(events).await) } else { call.whole(events).await }
}

fn interaction(state: &State, asked: &Asked) -> Result<InteractionType> {
    match asked.metadata.get("interaction") {
        Some(tag) => state
            .interactions
            .tagged(tag)
            .map_err(|error| ApiError::parameter("metadata.interaction", format!("is not valid: {error}"))),
        None => Ok(state.interactions.classify(asked.prompt.request())),
    }
}

impl Call {
    /// One sequence a choice; the seeds of further choices follow the first.
    fn submit(&self, prompt: Vec<u32>) -> Result<Vec<mpsc::Receiver<Event>>> {
        let asked = &self.asked;
        let context = self.state.engine.context();
        let room = context.saturating_sub(prompt.len());
        let max_tokens = asked.max_tokens.unwrap_or(self.state.config.default_max_tokens.min(room).max(1));
        let seed = asked.seed.unwrap_or_else(|| self.ids[0].0.as_u64_pair().1);
        (0..asked.n)
            .map(|nth| {
                let request = GenerateRequest {
                    prompt: prompt.clone(),
                    sampling: Sampling {
                        temperature: asked.temperature,
                        top_p: asked.top_p,
                        top_k: asked.top_k,
                        seed: seed.wrapping_add(nth as u64),
                    },
                    max_tokens,
                    stop: asked.stop.clone(),
                    top_logprobs: asked.top_logprobs,
                    pinned: None,
                };
                Ok(self.state.engine.submit(request)?)
            })
            .collect()
    }

    /// All choices, then the answer as one object. Every choice is durable before it is sent.
    async fn whole(self, events: Vec<mpsc::Receiver<Event>>) -> Result<Response> {
        let mut choices = vec![Choice::default(); events.len()];
        let mut ends: Vec<Option<Generated>> = vec![None; events.len()];
        for (nth, mut events) in events.into_iter().enumerate() {
            while let Some(event) = events.recv().await {
                match event {
                    Event::Started { .. } => {}
                    Event::Text { text, logprobs } => {
                        choices[nth].text.push_str(&text);
                        choices[nth].logprobs.extend(logprobs);
                    }
                    Event::Done(generated) => ends[nth] = Some(generated),
                    Event::Failed(_) => return Err(self.failed()),
                }
            }
        }
        let mut rendered = Vec::new();
        let mut completion_tokens = 0;
        let mut version = Version::default();
        for (nth, (choice, end)) in choices.into_iter().zip(ends).enumerate() {
            let Some(end) = end else { return Err(self.failed()) };
            self.record(nth, &choice.text, &end).await?;
            completion_tokens += end.tokens.len();
            version = end.version;
            let logprobs = self.asked.top_logprobs.map(|_| choice.logprobs.as_slice());
            rendered.push(self.shape.choice(self.ids[nth], nth, &choice.text, logprobs, end.finish_reason));
        }
        let mut body = self.head(self.shape.object());
        body["choices"] = Value::Array(rendered);
        body["usage"] = self.usage(completion_tokens);
        Ok(versioned(Json(body).into_response(), version))
    }

    /// Server-sent events. The task ends, and with it the engine's work, when the client hangs up.
    async fn stream(self, mut events: Vec<mpsc::Receiver<Event>>) -> Response {
        // The first event says which version answers, which the header has to say too.
        let version = match events[0].recv().await {
            Some(Event::Started { version }) => version,
            Some(Event::Failed(_) | Event::Text { .. } | Event::Done(_)) | None => {
                return self.failed().into_response();
            }
        };
        let (send, receive) = mpsc::channel::<std::result::Result<Bytes, Infallible>>(64);
        // It lives as long as the response's body, which the server drains on its way out.
        let _task = tokio::spawn(async move {
            if self.send_stream(events, &send).await.is_none() {
                let metrics = &self.state.metrics;
                metrics.no_completion(&self.interaction, &version.to_string(), "cancelled");
            }
        });
        let mut response = Response::new(Body::from_stream(ReceiverStream::new(receive)));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        versioned(response, version)
    }

    /// `None` once the client is gone.
    async fn send_stream(&self, events: Vec<mpsc::Receiver<Event>>, send: &Sender) -> Option<()> {
        let count = events.len();
        if let Some(delta) = self.shape.opening() {
            for nth in 0..count {
                self.send_chunk(send, nth, delta.clone(), None).await?;
            }
        }
        let tagged = events.into_iter().enumerate();
        let mut merged = stream::select_all(
            tagged.map(|(nth, events)| ReceiverStream::new(events).map(move |event| (nth, event)).boxed()),
        );
        let mut choices = vec![Choice::default(); count];
        let (mut ended, mut completion_tokens) = (0, 0);
        while let Some((nth, event)) = merged.next().await {
            match event {
                Event::Started { .. } => {}
                Event::Text { text, logprobs } => {
                    let shown = self.asked.top_logprobs.map(|_| logprobs.as_slice());
                    let delta = self.shape.delta(&text, shown, choices[nth].text.chars().count());
                    choices[nth].text.push_str(&text);
                    self.send_chunk(send, nth, delta, None).await?;
                }
                Event::Done(end) => {
                    ended += 1;
                    completion_tokens += end.tokens.len();
                    if let Err(error) = self.record(nth, &choices[nth].text, &end).await {
                        return send_line(send, &error.body()).await;
                    }
                    self.send_chunk(send, nth, self.shape.closing(), Some(end.finish_reason)).await?;
                }
                Event::Failed(_) => return send_line(send, &self.failed().body()).await,
            }
        }
        if ended < count {
            return send_line(send, &self.failed().body()).await;
        }
        if self.asked.include_usage {
            let mut chunk = self.head(self.shape.chunk_object());
            chunk["choices"] = json!([]);
            chunk["usage"] = self.usage(completion_tokens);
            send_line(send, &chunk).await?;
        }
        send.send(Ok(Bytes::from_static(b"data: [DONE]\n\n"))).await.ok()
    }

    async fn send_chunk(
        &self,
        send: &Sender,
        nth: usize,
        mut choice: Value,
        end: Option<FinishReason>,
    ) -> Option<()> {
        choice["index"] = json!(nth);
        choice["finish_reason"] = json!(end.map(FinishReason::as_str));
        if self.asked.n > 1 {
            choice["completion_id"] = json!(self.ids[nth]);
        }
        let mut chunk = self.head(self.shape.chunk_object());
        chunk["choices"] = json!([choice]);
        if self.asked.include_usage {
            chunk["usage"] = Value::Null;
        }
        send_line(send, &chunk).await
    }

    fn head(&self, object: &str) -> Value {
        json!({
            "id": self.ids[0],
            "object": object,
            "created": self.at.0 / 1000,
            "model": self.state.engine.model_name(),
        })
    }

    fn usage(&self, completion_tokens: usize) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        })
    }

    fn failed(&self) -> ApiError {
        let metrics = &self.state.metrics;
        let served = self.state.engine.served().to_string();
        metrics.no_completion(&self.interaction, &served, "failed");
        ApiError::failed()
    }

    /// Reads the signals of an answer and puts it into the store; returns once it is on disk.
    async fn record(&self, nth: usize, text: &str, end: &Generated) -> Result<()> {
        let asked = &self.asked;
        let request = asked.prompt.request();
        let completion = Completion {
            id: self.ids[nth],
            at: self.at,
            version: end.version,
            interaction: self.interaction.clone(),
            prompt: asked.prompt.clone(),
            answer: text.to_owned(),
            finish_reason: end.finish_reason,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: end.tokens.len(),
            refusal: signals::refusal(request, text),
            risk: asked.risk.unwrap_or_else(|| signals::risk(request)),
            helpfulness: signals::usable(text, end.finish_reason),
            kl: end.kl,
            seconds: self.started.elapsed().as_secs_f64(),
            user: asked.user.clone(),
            metadata: asked.metadata.clone(),
        };
        self.state.store.append(&completion).await?;
        self.state.metrics.completion(&completion);
        self.state.metrics.served(Served {
            operation: self.shape.operation(),
            model: self.state.engine.model_name(),
            seconds: completion.seconds,
            first_token_seconds: end.first_token_seconds,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: end.tokens.len(),
        });
        Ok(())
    }
}

type Sender = mpsc::Sender<std::result::Result<Bytes, Infallible>>;

async fn send_line(send: &Sender, value: &Value) -> Option<()> {
    send.send(Ok(Bytes::from(format!("data: {value}\n\n")))).await.ok()
}

fn versioned(mut response: Response, version: Version) -> Response {
    if let Ok(value) = HeaderValue::from_str(&version.to_string()) {
        response.headers_mut().insert("x-gyrostat-version", value);
    }
    response
}
