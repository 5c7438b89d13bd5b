//! Upstream mode: requests and answers pass through byte for byte, and what was answered is recorded afterwards.
//!
//! Only the request's `model` may be replaced, when our alias stands for a version that the upstream has under a name of
//! its own. A stream is read while it passes; nothing waits for that, or for the store.

pub mod recorder;
mod request;
mod tee;

use std::{sync::Arc, time::Instant};

use axum::{
    body::{Body, Bytes},
    extract::State as Extract,
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::Response,
};
use percent_encoding::percent_decode_str;
use tracing::warn;

use crate::completion::{CompletionId, Version};
use crate::upstream::{Fault, Lease, Upstream, end_to_end, request::Head};

use super::{Backend, State, access::Line, error::ApiError, shape::Shape, versioned};

use recorder::{Heard, Job, Recorder};
use tee::{Call, Tee};

type Result<T> = std::result::Result<T, ApiError>;

/// An upstream with what records its answers.
#[derive(Debug, Clone)]
pub struct Relay {
    pub upstream: Upstream,
    pub recorder: Recorder,
}

/// A model may be asked for by this name, whatever its own is.
const DEFAULT: &str = "default";

/// Where a request that is ours to record goes.
struct Aim {
    version: Version,
    /// Held until the answer has ended.
    lease: Option<Lease>,
    /// The body with another model's name; `None` leaves it as it is.
    renamed: Option<Bytes>,
    choices: usize,
}

impl Relay {
    /// What the model is called, as far as it is known.
    pub(super) fn model_name(&self) -> &str {
        self.upstream.model().unwrap_or("upstream")
    }

    /// Ready means that the upstream answers and has the version that is served.
    pub(super) async fn check(&self, version: Version) -> std::result::Result<(), String> {
        let models = self.upstream.models().await.map_err(|fault| fault.to_string())?;
        let Some(lease) = self.upstream.lease(version) else { return Ok(()) };
        if models.adapters.iter().any(|name| name == lease.name()) {
            return Ok(());
        }
        self.upstream.reload(version).await.map_err(|error| format!("{version} is not served: {error}"))
    }

    /// `None` for what is not about our model: it passes as it is and is not recorded.
    fn aim(&self, body: &[u8], active: Version) -> Option<Aim> {
        let head = Head::read(body)?;
        let choices = head.n;
        let plain = |version, lease| Some(Aim { version, lease, renamed: None, choices });
        let Some(asked) = head.model.as_deref() else { return plain(Version(0), None) };
        if let Some(version) = self.upstream.version_named(asked) {
            return plain(version, self.upstream.lease(version));
        }
        let Some(ours) = self.upstream.model() else { return plain(Version(0), None) };
        if asked != ours && asked != DEFAULT {
            return None;
        }
        let lease = self.upstream.lease(active);
        let name = lease.as_ref().map_or(ours, Lease::name);
        let renamed = (name != asked).then(|| Bytes::from(head.with_model(body, name)));
        let version = if lease.is_some() { active } else { Version(0) };
        Some(Aim { version, lease, renamed, choices })
    }
}

/// `POST /v1/chat/completions` and `POST /v1/completions`.
pub(super) async fn complete(
    state: &State,
    relay: Relay,
    head: Parts,
    body: Bytes,
    shape: Shape,
) -> Result<Response> {
    let started = Instant::now();
    let served = served(state, &body, shape);
    let Some(mut aim) = relay.aim(&body, served) else {
        return pass(&relay, &head, body).await;
    };
    let ids: Vec<CompletionId> = (0..aim.choices).map(|_| CompletionId::new()).collect();
    let version = aim.version;
    let sent = aim.renamed.take().unwrap_or_else(|| body.clone());
    let job = Job {
        asked: body,
        shape,
        at: (state.clock)(),
        seconds: 0.0,
        first_token_seconds: None,
        version,
        ids,
        heard: Heard::Nothing("cancelled"),
        line: head.extensions.get::<Arc<Line>>().cloned(),
    };
    // From here on whatever becomes of the request is counted, a hang-up too.
    let mut call = Call::new(relay.recorder.clone(), job, aim.lease, started);
    let path = below_base(&head);
    let mut answer = relay.upstream.send(head.method.clone(), path, &head.headers, sent.clone()).await;
    if let Ok(missing) = &answer
        && missing.status() == StatusCode::NOT_FOUND
        && version.0 > 0
    {
        match relay.upstream.reload(version).await {
            Ok(()) => {
                answer = relay.upstream.send(head.method.clone(), path, &head.headers, sent).await;
            }
            Err(error) => warn!(%version, %error, "the upstream has lost the served version"),
        }
    }
    let answer = answer.map_err(|fault| {
        call.end(Heard::Nothing("failed"));
        refused(&fault)
    })?;
    let completion = completion_header(call.ids());
    let status = answer.status();
    let mut response = returned(answer, |body, headers| Body::new(Tee::new(body, status, headers, call)));
    if let (true, Some(ids)) = (status.is_success(), completion) {
        response.headers_mut().insert("x-gyrostat-completion", ids);
    }
    Ok(versioned(response, version))
}

/// The version for this request: the one that is served, or the one on trial where its user is among those who get it.
fn served(state: &State, body: &[u8], shape: Shape) -> Version {
    // Read only while a canary runs: it costs what the whole body costs.
    let candidate = state.registry.trial().and_then(|trial| {
        let asked = request::read(body, shape)?;
        super::candidate(Some(trial), asked.user.as_deref(), &asked.metadata, asked.prompts.first()?)
    });
    candidate.map_or(state.registry.active(), |trial| trial.served.version)
}

/// Any other route of OpenAI's: passed on, not recorded.
pub(super) async fn other(Extract(state): Extract<State>, head: Parts, body: Bytes) -> Result<Response> {
    let Backend::Upstream(relay) = &state.backend else { return Err(ApiError::no_route()) };
    if !head.uri.path().starts_with("/v1/") {
        return Err(ApiError::no_route());
    }
    super::permit(&state, &head.headers, super::CHAT)?;
    // Which adapters are loaded is the loop's business, not that of everybody who may chat.
    let path = percent_decode_str(head.uri.path()).decode_utf8_lossy();
    if path.contains("load_lora_adapter") {
        return Err(ApiError::no_route());
    }
    pass(relay, &head, body).await
}

/// A request that is not ours to record.
pub(super) async fn pass(relay: &Relay, head: &Parts, body: Bytes) -> Result<Response> {
    let answer = relay.upstream.send(head.method.clone(), below_base(head), &head.headers, body).await;
    Ok(returned(answer.map_err(|fault| refused(&fault))?, |body, _| Body::new(body)))
}

/// What follows `/v1` in path and query.
fn below_base(head: &Parts) -> &str {
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    path.strip_prefix("/v1").unwrap_or(path)
}

fn refused(fault: &Fault) -> ApiError {
    warn!(%fault, "the upstream gave no answer");
    match fault {
        Fault::Unreachable(_) => ApiError::upstream_unreachable(),
        Fault::Timeout(_) => ApiError::upstream_timeout(),
        Fault::Outside => ApiError::no_route(),
    }
}

/// The upstream's answer as ours: its status, its headers but for those of its connection, its bytes.
fn returned(
    answer: axum::http::Response<reqwest::Body>,
    body: impl FnOnce(reqwest::Body, &HeaderMap) -> Body,
) -> Response {
    let (parts, upstream) = answer.into_parts();
    let mut response = Response::new(body(upstream, &parts.headers));
    *response.status_mut() = parts.status;
    *response.headers_mut() = end_to_end(&parts.headers);
    response
}

/// One id a choice, in the order of their indices.
fn completion_header(ids: &[CompletionId]) -> Option<HeaderValue> {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    HeaderValue::from_str(&ids.join(", ")).ok()
}

/// Whether an answer is a stream of events.
fn is_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.trim_start().to_ascii_lowercase().starts_with("text/event-stream"))
}
