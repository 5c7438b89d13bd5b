//! A service that answers in our place: vLLM, SGLang, llama.cpp or anything else that speaks OpenAI's protocol.
//!
//! [`Upstream::send`] passes a request on as it is; [`answer`] reads what comes back, and [`adapters`] brings the
//! versions that the loop has proven to a service that can load them.

pub mod adapters;
pub mod answer;
pub mod request;
pub mod sse;

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Response, header};
use prometheus::{IntCounterVec, Opts};
use reqwest::{Body, Client, Url};
use serde::{Deserialize, Serialize};

use adapters::Fleet;
pub use adapters::{AdapterError, Lease, Release};

/// Where the upstream is and how patient we are with it (`[upstream]`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The base of its routes, e.g. `http://127.0.0.1:8000/v1`. Unset, the embedded engine answers.
    pub url: Option<String>,
    /// Sent in place of what clients send in `Authorization`. Unset, theirs is passed on.
    pub api_key: Option<Secret>,
    /// The name of its model. Unset, it is asked; that needs a service with one model.
    pub model: Option<String>,
    /// Seconds that a connection may take.
    pub connect_seconds: f64,
    /// Seconds without a byte of an answer after which it is given up.
    pub read_seconds: f64,
    /// Seconds for which an unused connection is kept; less than the upstream itself keeps it.
    pub idle_seconds: f64,
    /// How versions get there.
    pub adapters: Adapters,
    /// The directory of the versions (`<store.path>/versions`) as the upstream sees it, where that differs.
    pub adapter_dir: Option<std::path::PathBuf>,
    /// Answers that wait to be recorded, at most; further ones are passed on all the same and counted as unrecorded.
    pub record_queue: usize,
}

/// How an upstream is given the version that it is to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Adapters {
    /// Not at all: updates end after the gate.
    None,
    /// Over vLLM's `/v1/load_lora_adapter`; a service without that route is as `None`.
    Vllm,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: None,
            api_key: None,
            model: None,
            connect_seconds: 5.0,
            read_seconds: 600.0,
            idle_seconds: 4.0,
            adapters: Adapters::Vllm,
            adapter_dir: None,
            record_queue: 4096,
        }
    }
}

/// Counters of the upstream.
#[derive(Debug, Clone)]
pub struct Metrics {
    pushes: IntCounterVec,
}

impl Metrics {
    /// # Errors
    /// A name is taken in `registry`.
    pub fn register(registry: &prometheus::Registry) -> Result<Self, prometheus::Error> {
        let opts =
            Opts::new("gyrostat_upstream_pushes_total", "Versions pushed to the upstream, by outcome.");
        let pushes = IntCounterVec::new(opts, &["outcome"])?;
        registry.register(Box::new(pushes.clone()))?;
        for outcome in ["loaded", "unsupported", "failed"] {
            pushes.with_label_values(&[outcome]);
        }
        Ok(Self { pushes })
    }
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("upstream.{field} {problem}")]
    Invalid { field: &'static str, problem: String },
}

/// Why a request got no answer. What exactly happened is for the log, not for clients.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("the upstream cannot be reached: {0}")]
    Unreachable(String),
    #[error("the upstream did not answer in time: {0}")]
    Timeout(String),
    #[error("the path leaves the upstream's base")]
    Outside,
}

impl From<reqwest::Error> for Fault {
    fn from(error: reqwest::Error) -> Self {
        let is_timeout = error.is_timeout();
        let words = causes(&error.without_url());
        if is_timeout { Self::Timeout(words) } else { Self::Unreachable(words) }
    }
}

/// An error with everything that led to it.
fn causes(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words.push_str(": ");
        words.push_str(&error.to_string());
        cause = error.source();
    }
    words
}

/// The client of one upstream; clones share its connections.
#[derive(Debug, Clone)]
pub struct Upstream {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    client: Client,
    /// Without a slash at its end.
    base: Url,
    authorization: Option<HeaderValue>,
    model: OnceLock<String>,
    adapters: Adapters,
    fleet: Fleet,
    metrics: Metrics,
}

/// What the upstream's `/models` says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Models {
    /// Models that are no adapters of others.
    pub bases: Vec<String>,
    pub adapters: Vec<String>,
}

#[derive(Deserialize)]
struct WireModels {
    data: Vec<WireModel>,
}

#[derive(Deserialize)]
struct WireModel {
    id: String,
    parent: Option<String>,
}

/// For the questions that we have ourselves.
const ASIDE: Duration = Duration::from_secs(5);

impl Upstream {
    /// `None` if no upstream is configured.
    ///
    /// # Errors
    /// A value cannot work; the message names the field.
    pub fn new(config: &Config, metrics: Metrics) -> Result<Option<Self>, Error> {
        let Some(url) = &config.url else { return Ok(None) };
        let invalid = |field, problem: &str| Error::Invalid { field, problem: problem.to_owned() };
        let base = Url::parse(url.trim_end_matches('/'))
            .map_err(|error| Error::Invalid { field: "url", problem: format!("is no URL: {error}") })?;
        if !matches!(base.scheme(), "http" | "https") || base.query().is_some() || !base.has_host() {
            return Err(invalid("url", "must be like http://127.0.0.1:8000/v1"));
        }
        let seconds = |field, seconds: f64| {
            let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
            duration.ok_or_else(|| invalid(field, "must be a number of seconds above 0"))
        };
        if config.record_queue == 0 {
            return Err(invalid("record_queue", "must be at least 1"));
        }
        let authorization = match &config.api_key {
            None => None,
            Some(Secret(key)) => {
                let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
                    .map_err(|_| invalid("api_key", "has characters that no header can hold"))?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let client = Client::builder()
            .connect_timeout(seconds("connect_seconds", config.connect_seconds)?)
            .read_timeout(seconds("read_seconds", config.read_seconds)?)
            .pool_idle_timeout(seconds("idle_seconds", config.idle_seconds)?)
            // A redirection is the upstream's answer, and a proxy of the environment nobody's wish.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(|error| Error::Invalid { field: "url", problem: causes(&error) })?;
        let model = OnceLock::new();
        if let Some(name) = &config.model {
            let _first = model.set(name.clone());
        }
        let fleet = Fleet::default();
        let inner = Inner { client, base, authorization, model, adapters: config.adapters, fleet, metrics };
        Ok(Some(Self { inner: Arc::new(inner) }))
    }

    /// The name of its model, once it is known.
    pub fn model(&self) -> Option<&str> {
        self.inner.model.get().map(String::as_str)
    }

    /// Passes a request on. `path` begins with a slash and may have a query; it is taken to stand below the base.
    ///
    /// # Errors
    /// There is no answer; an answer of any status is one.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &HeaderMap,
        body: impl Into<Body>,
    ) -> Result<Response<Body>, Fault> {
        let inner = &self.inner;
        let url = Url::parse(&format!("{}{path}", inner.base)).map_err(|_| Fault::Outside)?;
        // Dots in the path may have led elsewhere.
        let below = url.path().strip_prefix(inner.base.path().trim_end_matches('/'));
        if url.origin() != inner.base.origin() || !below.is_some_and(|rest| rest.starts_with('/')) {
            return Err(Fault::Outside);
        }
        let mut request = reqwest::Request::new(method, url);
        *request.headers_mut() = self.outgoing(headers);
        *request.body_mut() = Some(body.into());
        Ok(inner.client.execute(request).await?.into())
    }

    /// The client's headers as far as they are about the request and not about its connection to us.
    fn outgoing(&self, headers: &HeaderMap) -> HeaderMap {
        let mut passed = end_to_end(headers);
        // The length is that of the body that is sent; an answer that is packed could not be read.
        for name in [header::HOST, header::CONTENT_LENGTH, header::ACCEPT_ENCODING, header::EXPECT] {
            passed.remove(name);
        }
        if let Some(authorization) = &self.inner.authorization {
            passed.insert(header::AUTHORIZATION, authorization.clone());
        }
        passed
    }

    /// What it serves. Learns the model's name where that is not configured.
    ///
    /// # Errors
    /// It does not answer, or with something else than a list of models.
    pub async fn models(&self) -> Result<Models, Fault> {
        let answer = self.aside(Method::GET, "/models", None).await?;
        if !answer.0.is_success() {
            return Err(Fault::Unreachable(format!("/models answers {}", answer.0)));
        }
        let wire: WireModels = serde_json::from_slice(&answer.1)
            .map_err(|error| Fault::Unreachable(format!("/models is no list of models: {error}")))?;
        let (adapters, bases): (Vec<_>, Vec<_>) =
            wire.data.into_iter().partition(|model| model.parent.is_some());
        let names = |models: Vec<WireModel>| models.into_iter().map(|model| model.id).collect::<Vec<_>>();
        let models = Models { bases: names(bases), adapters: names(adapters) };
        if let [only] = models.bases.as_slice() {
            self.inner.model.get_or_init(|| only.clone());
        }
        Ok(models)
    }

    /// The answer of `model` to a prompt of our own; without a temperature, at the service's own.
    ///
    /// # Errors
    /// There is none, or the model's name is not known yet.
    pub async fn ask(
        &self,
        model: Option<&str>,
        prompt: &str,
        max_tokens: usize,
        temperature: Option<f64>,
    ) -> Result<String, Fault> {
        let model = model.ok_or_else(|| Fault::Unreachable("its model has no name yet".to_owned()))?;
        let messages = serde_json::json!([{ "role": "user", "content": prompt }]);
        let mut body = serde_json::json!({ "model": model, "messages": messages, "max_tokens": max_tokens });
        if let Some(temperature) = temperature {
            body["temperature"] = temperature.into();
        }
        let (status, answer) = self.aside(Method::POST, "/chat/completions", Some(&body)).await?;
        let answer = answer::Answer::whole(&answer);
        match answer.choices.into_values().next() {
            Some(choice) if status.is_success() => Ok(choice.text),
            _ => Err(Fault::Unreachable(format!("/chat/completions answers {status}"))),
        }
    }

    /// A question of our own: status and body of its answer.
    async fn aside(
        &self,
        method: Method,
        path: &str,
        json: Option<&serde_json::Value>,
    ) -> Result<(axum::http::StatusCode, Vec<u8>), Fault> {
        let mut headers = HeaderMap::new();
        let body = json.map(ToString::to_string).unwrap_or_default();
        if json.is_some() {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        let asked = async {
            let answer = self.send(method, path, &headers, body).await?;
            let (status, response) = (answer.status(), reqwest::Response::from(answer));
            Ok((status, response.bytes().await?.to_vec()))
        };
        let patience = if json.is_some() { ASIDE * 12 } else { ASIDE };
        tokio::time::timeout(patience, asked)
            .await
            .unwrap_or_else(|_| Err(Fault::Timeout(format!("{path} took more than {patience:?}"))))
    }
}

/// Without what holds for one connection only (RFC 9110, 7.6.1).
pub fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    const HOP_BY_HOP: [HeaderName; 7] = [
        header::CONNECTION,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ];
    let mut passed = headers.clone();
    for named in headers.get_all(header::CONNECTION) {
        for name in named.to_str().unwrap_or_default().split(',') {
            passed.remove(name.trim());
        }
    }
    for name in HOP_BY_HOP {
        passed.remove(name);
    }
    for name in ["keep-alive", "proxy-connection"] {
        passed.remove(name);
    }
    passed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configured(change: impl FnOnce(&mut Config)) -> Result<Option<Upstream>, Error> {
        let mut config = Config { url: Some("http://127.0.0.1:9/v1/".to_owned()), ..Config::default() };
        change(&mut config);
        Upstream::new(&config, Metrics::register(&prometheus::Registry::new()).unwrap())
    }

    #[test]
    fn a_value_that_cannot_work_is_named() {
        assert!(configured(|config| config.url = None).unwrap().is_none());
        assert!(configured(|_| {}).unwrap().is_some());
        let field = |change: fn(&mut Config)| configured(change).unwrap_err().to_string();
        for (message, field) in [
            (field(|config| config.url = Some("127.0.0.1:8000".to_owned())), "upstream.url"),
            (field(|config| config.url = Some("ftp://a/v1".to_owned())), "upstream.url"),
            (field(|config| config.read_seconds = f64::NAN), "upstream.read_seconds"),
            (field(|config| config.connect_seconds = 0.0), "upstream.connect_seconds"),
            (field(|config| config.idle_seconds = -1.0), "upstream.idle_seconds"),
            (field(|config| config.api_key = Some(Secret("a\nb".to_owned()))), "upstream.api_key"),
            (field(|config| config.record_queue = 0), "upstream.record_queue"),
        ] {
            assert!(message.starts_with(field), "{message}");
        }
    }

    #[test]
    fn the_key_is_not_printed() {
        let key = Some(Secret("hidden".to_owned()));
        let upstream = configured(|config| config.api_key.clone_from(&key)).unwrap();
        assert!(!format!("{upstream:?} {key:?}").contains("hidden"));
    }

    #[tokio::test]
    async fn dots_do_not_lead_out_of_the_base() {
        let upstream = configured(|_| {}).unwrap().unwrap();
        for path in ["/../pause", "/%2e%2e/pause", "/a/../../pause", "@evil/v1", "/..", "/../v12/x"] {
            let sent = upstream.send(Method::GET, path, &HeaderMap::new(), "").await;
            assert!(matches!(sent, Err(Fault::Outside)), "{path}: {sent:?}");
        }
        let sent = upstream.send(Method::GET, "/a/../models", &HeaderMap::new(), "").await;
        assert!(matches!(sent, Err(Fault::Unreachable(_))), "{sent:?}");
    }

    #[test]
    fn headers_of_the_connection_stay() {
        let pairs = [
            ("connection", "close, X-Mine"),
            ("x-mine", "1"),
            ("keep-alive", "5"),
            ("transfer-encoding", "chunked"),
            ("host", "us"),
            ("content-length", "7"),
            ("accept-encoding", "gzip"),
            ("authorization", "Bearer theirs"),
            ("openai-organization", "o"),
            ("content-type", "application/json"),
        ];
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let upstream = configured(|_| {}).unwrap().unwrap();
        let passed = upstream.outgoing(&headers);
        let mut names: Vec<&str> = passed.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "content-type", "openai-organization"]);
        assert_eq!(passed["authorization"], "Bearer theirs");
        let upstream =
            configured(|config| config.api_key = Some(Secret("ours".to_owned()))).unwrap().unwrap();
        assert_eq!(upstream.outgoing(&headers)["authorization"], "Bearer ours");
    }
}
