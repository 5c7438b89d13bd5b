//! HTTP: OpenAI's routes, feedback, and the loop's own. The only module that knows status codes.

mod access;
mod answer;
pub mod comparisons;
mod error;
mod feedback;
mod fields;
mod lineage;
mod logged;
mod loop_routes;
mod metrics;
mod ops;
mod record;
pub mod relay;
pub mod serve;
mod shape;
#[cfg(test)]
mod tests;
mod wire;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody},
    extract::{DefaultBodyLimit, FromRequestParts, MatchedPath, Path, Request, State as Extract},
    http::{HeaderMap, HeaderValue, Method, header, request},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::canary;
use crate::completion::{Prompt, Timestamp, Version};
use crate::cycle;
use crate::policy::Engine;
use crate::registry::{Registry, Trial};
use crate::signals::Interactions;
use crate::store::Store;

use access::Line;
pub use comparisons::Comparisons;
use error::ApiError;
pub use logged::{Logged, logged};
pub use metrics::Metrics;
pub use relay::{Relay, recorder};
pub use serve::Life;

/// Where and to whom it listens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address and port; without keys, a loopback address only.
    pub bind: SocketAddr,
    /// Larger bodies are refused.
    pub body_limit_bytes: usize,
    /// Tokens of an answer where the request does not say.
    pub default_max_tokens: usize,
    /// Seconds that a request's headers may take; a connection that is idle for as long is closed.
    pub header_seconds: f64,
    /// Seconds that requests under way may take at the end, after SIGTERM.
    pub drain_seconds: f64,
    /// Keys that may call, each with its scopes. With none, everybody on this machine may do everything.
    pub keys: Vec<Key>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from(([127, 0, 0, 1], 8088)),
            body_limit_bytes: 1 << 20,
            default_max_tokens: 512,
            header_seconds: 30.0,
            drain_seconds: 20.0,
            keys: Vec::new(),
        }
    }
}

/// A bearer token and what it opens.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    pub key: String,
    pub scopes: Vec<Scope>,
}

/// Without the key, which is secret.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("scopes", &self.scopes).finish_non_exhaustive()
    }
}

/// What a key may be for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    Chat,
    Feedback,
    Admin,
}

/// Who answers chats and completions.
#[derive(Debug, Clone)]
pub enum Backend {
    Embedded(Engine),
    Upstream(Relay),
    /// Nobody: a log is replayed.
    Log,
}

impl Backend {
    /// What the answering model is called.
    pub fn model_name(&self) -> &str {
        match self {
            Self::Embedded(engine) => engine.model_name(),
            Self::Upstream(relay) => relay.model_name(),
            Self::Log => "log",
        }
    }

    /// What records the answers of an upstream.
    fn recorder(&self) -> Option<&recorder::Recorder> {
        match self {
            Self::Embedded(_) | Self::Log => None,
            Self::Upstream(relay) => Some(&relay.recorder),
        }
    }

    /// Whether it would answer now, with this version.
    async fn check(&self, version: Version) -> Result<(), String> {
        match self {
            Self::Embedded(_) | Self::Log => Ok(()),
            Self::Upstream(relay) => relay.check(version).await,
        }
    }
}

/// What the handlers share.
#[derive(Debug, Clone)]
pub struct State {
    pub backend: Backend,
    pub store: Arc<Store>,
    pub registry: Arc<Registry>,
    pub cycle: cycle::Handle,
    pub interactions: Arc<Interactions>,
    pub metrics: Arc<Metrics>,
    pub prometheus: prometheus::Registry,
    pub config: Arc<Config>,
    pub clock: fn() -> Timestamp,
    pub life: Arc<Life>,
    pub comparisons: Arc<Comparisons>,
}

/// One route, for the router and for `/openapi.json` alike.
struct Route {
    method: &'static str,
    path: &'static str,
    /// `None` needs no key.
    scope: Option<Scope>,
    summary: &'static str,
    schema: Option<&'static str>,
    success: &'static str,
    /// The schema of the answer; `None` is plain text.
    answer: Option<&'static str>,
    handler: fn() -> MethodRouter<State>,
}

macro_rules! routes {
    ($($method:ident $path:literal $scope:expr, $schema:expr, $success:literal $answer:expr, $handler:expr, $summary:literal;)*) => {
        &[$(Route {
            method: stringify!($method),
            path: $path,
            scope: $scope,
            summary: $summary,
            schema: $schema,
            success: $success,
            answer: $answer,
            handler: || $method($handler),
        }),*]
    };
}

fn delete<H, T>(handler: H) -> MethodRouter<State>
where
    H: axum::handler::Handler<T, State>,
    T: 'static,
{
    axum::routing::delete(handler)
}

const CHAT: Option<Scope> = Some(Scope::Chat);
const FEEDBACK: Option<Scope> = Some(Scope::Feedback);
const ADMIN: Option<Scope> = Some(Scope::Admin);

/// Every route that there is.
#[rustfmt::skip]
const ROUTES: &[Route] = routes! {
    post "/v1/chat/completions" CHAT, Some("ChatRequest"), "200" Some("ChatCompletion"), answer::chat, "OpenAI's chat completions";
    post "/v1/completions" CHAT, Some("TextRequest"), "200" Some("TextCompletion"), answer::text, "OpenAI's text completions";
    get "/v1/models" CHAT, None, "200" Some("Models"), ops::models, "the served model";
    post "/v1/feedback" FEEDBACK, Some("Feedback"), "201" Some("Id"), feedback::post, "a judgement of an answer";
    post "/feedback" FEEDBACK, Some("Alias"), "200" Some("FeedbackId"), feedback::tensorzero, "TensorZero's feedback";
    post "/api/public/scores" FEEDBACK, Some("Alias"), "200" Some("Id"), feedback::langfuse, "Langfuse's scores";
    post "/v1/request/{id}/feedback" FEEDBACK, Some("Alias"), "200" Some("Id"), feedback::helicone, "Helicone's rating";
    get "/v1/comparisons/next" FEEDBACK, None, "200" Some("Pair"), comparisons::next, "two answers to one prompt, to be compared";
    post "/v1/comparisons/{id}" FEEDBACK, Some("Choice"), "201" Some("Chosen"), comparisons::choose, "which of the two is better";
    get "/label" FEEDBACK, None, "200" None, comparisons::label, "a page for people who compare answers";
    get "/v1/alignment" ADMIN, None, "200" Some("Scorecard"), loop_routes::alignment, "the scorecard";
    get "/v1/alarms" ADMIN, None, "200" Some("Alarms"), loop_routes::alarms, "drift alarms, newest first";
    post "/v1/alarms/{id}/acknowledge" ADMIN, None, "200" Some("Alarm"), loop_routes::acknowledge, "marks an alarm as seen";
    post "/v1/baseline" ADMIN, Some("Baseline"), "200" Some("Reset"), loop_routes::baseline, "learns baselines anew";
    get "/v1/updates" ADMIN, None, "200" Some("Updates"), loop_routes::updates, "updates, newest first";
    post "/v1/updates" ADMIN, Some("UpdateRequest"), "202" Some("Update"), loop_routes::start_update, "starts an update";
    get "/v1/updates/{id}" ADMIN, None, "200" Some("Update"), loop_routes::update, "one update";
    delete "/v1/updates/{id}" ADMIN, None, "200" Some("Update"), loop_routes::cancel_update, "cancels an update";
    get "/v1/completions/{id}/lineage" ADMIN, None, "200" Some("CompletionLineage"), lineage::of_completion, "the feedback that shaped an answer";
    get "/v1/feedback/{id}" ADMIN, None, "200" Some("FeedbackLineage"), lineage::of_feedback, "the versions that learned from a judgement";
    delete "/v1/raters/{id}" ADMIN, None, "200" Some("Forgotten"), lineage::forget, "forgets what a person said";
    get "/v1/versions/{v}" ADMIN, None, "200" Some("VersionLineage"), lineage::version, "one version, and the feedback that shaped it";
    get "/v1/versions" ADMIN, None, "200" Some("Versions"), loop_routes::versions, "versions, newest first";
    post "/v1/versions" ADMIN, Some("Adapter"), "201" Some("Version"), loop_routes::stage_version, "takes in an adapter that was trained elsewhere";
    post "/v1/versions/{v}/promote" ADMIN, None, "200" Some("Version"), loop_routes::promote, "serves a version; an older one rolls back";
    get "/metrics" ADMIN, None, "200" None, ops::metrics, "Prometheus metrics";
    get "/healthz" None, None, "200" Some("Health"), ops::healthz, "alive";
    get "/readyz" None, None, "200" Some("Readiness"), ops::readyz, "ready to answer";
    get "/openapi.json" None, None, "200" Some("Document"), ops::openapi, "this description";
};

/// All routes over one state.
pub fn router(state: State) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        let guarded =
            (route.handler)().layer(middleware::from_fn_with_state((state.clone(), route.scope), guard));
        router = router.route(route.path, guarded);
    }
    router
        .fallback(relay::other)
        .method_not_allowed_fallback(|| async { ApiError::no_method() })
        // `outer` has bounded the body, by our own limit.
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(state.clone(), outer))
        .with_state(state)
}

/// Bounds the body, gives every request its id and its line in the log, and refuses what comes after the end.
async fn outer(Extract(state): Extract<State>, request: Request, next: Next) -> Response {
    let under_way = state.life.enter();
    let limit = state.config.body_limit_bytes;
    let (mut parts, body) = request.into_parts();
    let id = parts.headers.get(REQUEST_ID).cloned().unwrap_or_else(new_request_id);
    parts.headers.insert(REQUEST_ID, id.clone());
    let route = parts.extensions.get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let line = Line::new(method(&parts.method), route, shown(&id));
    let late = state.life.is_draining() && !access::QUIET.contains(&line.route.as_str());
    parts.extensions.insert(Arc::clone(&line));
    let mut response = match read(body, limit).await {
        _ if late => refused_late(),
        Ok(body) => next.run(Request::from_parts(parts, Body::from(body))).await,
        Err(error) => error.into_response(),
    };
    // An upstream's own id is the one that its operator can look for.
    response.headers_mut().entry(REQUEST_ID).or_insert(id);
    let _first = line.status.set(response.status().as_u16());
    response.map(|body| Body::new(Sent { body, line, _under_way: under_way }))
}

/// The connection ends with it, so that its client looks for another server.
fn refused_late() -> Response {
    let mut response = ApiError::stopping().into_response();
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn new_request_id() -> HeaderValue {
    HeaderValue::from_str(&Uuid::now_v7().to_string()).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
}

/// As far as a log line repeats it.
fn shown(id: &HeaderValue) -> String {
    id.to_str().unwrap_or_default().chars().take(128).collect()
}

/// A method that nobody has defined is not worth a value of its own.
fn method(method: &Method) -> String {
    let known = [
        Method::GET,
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        Method::HEAD,
        Method::OPTIONS,
    ];
    if known.contains(method) { method.to_string() } else { "other".to_owned() }
}

/// An answer's body; the request is under way until it is gone.
struct Sent {
    body: Body,
    line: Arc<Line>,
    _under_way: serve::UnderWay,
}

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.line.over();
    }
}

const REQUEST_ID: &str = "x-request-id";

/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(30);
/// What is read and thrown away of a body that is too large: a client that is still sending would not see the answer.
const DRAINED: usize = 64 << 20;

async fn read(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let reading = async {
        let mut stream = body.into_data_stream();
        let mut kept = Vec::new();
        let mut seen = 0;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|_| ApiError::not_json("it was cut off"))?;
            seen += chunk.len();
            if seen <= limit {
                kept.extend_from_slice(&chunk);
            } else if seen > limit.saturating_add(DRAINED) {
                break;
            }
        }
        if seen <= limit { Ok(Bytes::from(kept)) } else { Err(ApiError::too_large(limit)) }
    };
    tokio::time::timeout(BODY_TIME, reading).await.unwrap_or_else(|_| Err(ApiError::too_slow()))
}

/// The one parameter of a path; what is no UTF-8 names nothing that there is.
struct Id(String);

impl FromRequestParts<State> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut request::Parts, state: &State) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.map(|Path(id)| Self(id)).map_err(|_| ApiError::no_route())
    }
}

/// Lets a request pass whose key has the route's scope; without any keys, everybody.
async fn guard(
    Extract((state, scope)): Extract<(State, Option<Scope>)>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Err(error) = permit(&state, request.headers(), scope) {
        // A browser asks for the key then, as the password of whatever name.
        let is_page = request.uri().path() == "/label";
        return if is_page { Ok(error.challenge()) } else { Err(error) };
    }
    Ok(next.run(request).await)
}

fn permit(state: &State, headers: &HeaderMap, scope: Option<Scope>) -> Result<(), ApiError> {
    let keys = &state.config.keys;
    let Some(scope) = scope.filter(|_| !keys.is_empty()) else { return Ok(()) };
    let header = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    admit(keys, &token(header.unwrap_or_default()), scope)
}

/// The candidate, where one is on trial and this request's user is among those who get it.
fn candidate(
    trial: Option<Arc<Trial>>,
    user: Option<&str>,
    metadata: &BTreeMap<String, String>,
    prompt: &Prompt,
) -> Option<Arc<Trial>> {
    trial.filter(|trial| {
        canary::takes(canary::unit(user, metadata, prompt), trial.served.version, trial.share)
    })
}

/// Names the version that answers.
fn versioned(mut response: Response, version: Version) -> Response {
    if let Ok(value) = HeaderValue::from_str(&version.to_string()) {
        response.headers_mut().insert("x-gyrostat-version", value);
    }
    response
}

/// The token of `Authorization: Bearer TOKEN`, or the password of `Basic`, which is how Langfuse's clients send their
/// secret key; empty if there is none. The scheme's case does not matter (RFC 9110).
fn token(header: &str) -> Cow<'_, str> {
    match header.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim().into(),
        Some((scheme, pair)) if scheme.eq_ignore_ascii_case("basic") => {
            let pair = BASE64_STANDARD.decode(pair.trim()).ok().and_then(|pair| String::from_utf8(pair).ok());
            pair.as_deref()
                .and_then(|pair| pair.split_once(':'))
                .map_or("".into(), |(_, key)| key.to_owned().into())
        }
        _ => "".into(),
    }
}

fn admit(keys: &[Key], token: &str, scope: Scope) -> Result<(), ApiError> {
    // Every key is compared whole, so that the time taken does not tell which was close.
    let known = keys.iter().filter(|key| !token.is_empty() && same(key.key.as_bytes(), token.as_bytes()));
    let mut known = known.peekable();
    if known.peek().is_none() {
        return Err(ApiError::no_key());
    }
    if known.any(|key| key.scopes.contains(&scope)) {
        Ok(())
    } else {
        Err(ApiError::no_scope(scope.as_str()))
    }
}

fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

impl Scope {
    fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Feedback => "feedback",
            Self::Admin => "admin",
        }
    }
}
