//! Every error as a status and OpenAI's error body. No other file knows status codes of errors.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tracing::error;

use crate::cycle::{self, StartError};
use crate::policy::{self, SubmitError};
use crate::registry;
use crate::store;

/// An answer that says no.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after_seconds: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry_after_seconds: None }
    }

    fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The body is no JSON object.
    pub(super) fn not_json(why: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, format!("the body is not a JSON object: {why}"))
            .code("invalid_json")
    }

    /// A parameter has the wrong type or value, or is not supported.
    pub(super) fn parameter(param: &str, why: impl std::fmt::Display) -> Self {
        let param = shown(param);
        Self::new(StatusCode::BAD_REQUEST, INVALID, format!("`{param}` {why}"))
            .param(param)
            .code("invalid_value")
    }

    /// A parameter that nothing here is known by.
    pub(super) fn unknown_parameter(param: &str) -> Self {
        Self::parameter(param, "is not supported").code("unknown_parameter")
    }

    /// A parameter of OpenAI's that is taken with other values only.
    pub(super) fn unsupported(param: &str) -> Self {
        Self::parameter(param, "is not supported with this value").code("unsupported_value")
    }

    /// A well-formed statement that makes no sense.
    fn unprocessable(param: &str, why: impl std::fmt::Display) -> Self {
        Self { status: StatusCode::UNPROCESSABLE_ENTITY, ..Self::parameter(param, why) }
    }

    /// The same fault as a 422, unless it is about something that does not exist.
    pub(super) fn into_unprocessable(self) -> Self {
        let status = if self.status == StatusCode::BAD_REQUEST {
            StatusCode::UNPROCESSABLE_ENTITY
        } else {
            self.status
        };
        Self { status, ..self }
    }

    pub(super) fn unknown_model(model: &str) -> Self {
        let message = format!("the model {:?} does not exist", shown(model));
        Self::new(StatusCode::NOT_FOUND, INVALID, message).param("model").code("model_not_found")
    }

    pub(super) fn not_found(param: &str, what: impl std::fmt::Display) -> Self {
        let message = shown(&format!("there is no {what}"));
        Self::new(StatusCode::NOT_FOUND, INVALID, message).param(param).code("not_found")
    }

    pub(super) fn no_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, "there is no such route").code("unknown_url")
    }

    pub(super) fn no_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, "this route does not take this method")
            .code("method_not_allowed")
    }

    pub(super) fn too_large(limit: usize) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, format!("the body is larger than {limit} bytes"))
            .code("request_too_large")
    }

    pub(super) fn too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, "the body did not arrive in time")
            .code("request_timeout")
    }

    pub(super) fn no_key() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", "a valid API key is needed")
            .code("invalid_api_key")
    }

    pub(super) fn no_scope(scope: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", format!("this key lacks the scope `{scope}`"))
            .code("insufficient_scope")
    }

    /// The device gave up; the reason is in the log.
    pub(super) fn failed() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "the answer could not be generated")
    }

    pub(super) fn internal(fault: impl std::fmt::Display) -> Self {
        error!(%fault, "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "the request failed; the log says why")
    }

    pub(super) fn upstream_unreachable() -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "server_error", "the upstream cannot be reached")
            .code("upstream_unreachable")
    }

    pub(super) fn upstream_timeout() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", "the upstream did not answer in time")
            .code("upstream_timeout")
    }

    /// On the way out; another replica may take it.
    pub(super) fn stopping() -> Self {
        Self { retry_after_seconds: Some(1), ..Self::unavailable("the server is stopping") }
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// Nobody has two answers to compare, or this rater has compared them all.
    pub(super) fn no_pair() -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, "there is no pair of answers to compare").code("no_pair")
    }

    /// Second answers are being sampled for others.
    pub(super) fn sampling() -> Self {
        let busy = Self::unavailable("a second answer is being sampled for other raters; ask again");
        Self { retry_after_seconds: Some(5), ..busy }
    }

    /// A log is replayed; nothing answers.
    pub(super) fn replaying() -> Self {
        Self::unavailable("a log is replayed here: nothing answers requests")
    }

    /// Whether it is about something that does not exist.
    pub(super) fn is_missing(&self) -> bool {
        self.status == StatusCode::NOT_FOUND
    }

    fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
    }

    fn full() -> Self {
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", "the disk is full").code("storage_full")
    }

    fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, INVALID, message).code("conflict")
    }

    /// The engine does not take a request, whose words stand in the field `prompt`.
    pub(super) fn not_taken(error: &SubmitError, prompt: &str) -> Self {
        match error {
            SubmitError::QueueFull { retry_after_seconds, .. } => {
                let full = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", error.to_string());
                Self { retry_after_seconds: Some(*retry_after_seconds), ..full.code("rate_limit_exceeded") }
            }
            SubmitError::Stopped => Self::unavailable(error.to_string()),
            SubmitError::TooLong { .. } => Self::new(StatusCode::BAD_REQUEST, INVALID, error.to_string())
                .param(prompt)
                .code("context_length_exceeded"),
        }
    }

    #[cfg(test)]
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// The body alone, for a stream that has begun.
    pub(super) fn body(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }

    /// What the metric label `error_type` says.
    pub(super) fn label(&self) -> &'static str {
        match self.status.as_u16() {
            429 => "queue_full",
            400..=499 => "bad_request",
            _ => "server_error",
        }
    }
}

const INVALID: &str = "invalid_request_error";

/// What a client wrote, as far as an error repeats it.
fn shown(text: &str) -> String {
    const MOST: usize = 200;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl ApiError {
    /// For a page, whose browser knows passwords and no tokens.
    pub(super) fn challenge(self) -> Response {
        let mut response = self.into_response();
        if let Some(scheme) = response.headers_mut().get_mut(header::WWW_AUTHENTICATE) {
            *scheme = HeaderValue::from_static("Basic realm=\"gyrostat\", charset=\"UTF-8\"");
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<policy::Error> for ApiError {
    fn from(error: policy::Error) -> Self {
        match error {
            policy::Error::Template(refusal) => {
                Self::parameter("messages", format!("was refused: {refusal}"))
            }
            error => Self::internal(error),
        }
    }
}

impl From<store::Error> for ApiError {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::UnknownCompletion { id } => {
                Self::not_found("completion_id", format!("completion {id}"))
            }
            store::Error::DifferentPrompts { .. } => {
                Self::unprocessable("rejected", "must answer the same prompt as `chosen`")
            }
            store::Error::Full { .. } => Self::full(),
            store::Error::Busy { .. } | store::Error::Stopped => Self::unavailable(error.to_string()),
            error => Self::internal(error),
        }
    }
}

impl From<registry::Error> for ApiError {
    fn from(error: registry::Error) -> Self {
        match error {
            registry::Error::UnknownVersion(version) => {
                Self::not_found("version", format!("version {version}"))
            }
            registry::Error::Corrupt { .. } | registry::Error::Rejected(_) | registry::Error::Load { .. } => {
                Self::conflict(error.to_string())
            }
            registry::Error::Foreign { source, .. } => {
                Self::parameter("adapter", format!("is no adapter of this model: {source}"))
            }
            registry::Error::NotTakenIn { .. } => {
                Self::new(StatusCode::BAD_GATEWAY, "server_error", error.to_string()).code("upstream_refused")
            }
            registry::Error::Full => Self::full(),
            error => Self::internal(error),
        }
    }
}

impl From<cycle::Error> for ApiError {
    fn from(error: cycle::Error) -> Self {
        match error {
            cycle::Error::Store(error) => error.into(),
            error => Self::internal(error),
        }
    }
}

impl From<StartError> for ApiError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Busy { .. } | StartError::NoModel => Self::conflict(error.to_string()),
            StartError::UnknownRecipe { .. } => {
                Self::parameter("recipe", "must be one of ppo, rloo, grpo, dpo, ipo, kto, sft")
            }
            StartError::Cycle(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use crate::completion::{CompletionId, Version};

    use super::*;

    #[track_caller]
    fn check(error: &ApiError, status: u16, kind: &str, code: Option<&str>) {
        assert_eq!(error.status.as_u16(), status, "{error:?}");
        let body = error.body();
        assert_eq!(body["error"]["type"], kind, "{body}");
        assert_eq!(body["error"]["code"].as_str(), code, "{body}");
        assert!(!body["error"]["message"].as_str().unwrap().is_empty());
    }

    #[test]
    fn the_engine_refuses() {
        let full =
            ApiError::not_taken(&SubmitError::QueueFull { limit: 4, retry_after_seconds: 7 }, "messages");
        check(&full, 429, "rate_limit_error", Some("rate_limit_exceeded"));
        assert_eq!(full.into_response().headers()[header::RETRY_AFTER], "7");
        check(&ApiError::not_taken(&SubmitError::Stopped, "messages"), 503, "server_error", None);
        let long = SubmitError::TooLong { prompt: 9, max_tokens: 9, context: 10 };
        let long = ApiError::not_taken(&long, "prompt");
        check(&long, 400, INVALID, Some("context_length_exceeded"));
        assert_eq!(long.body()["error"]["param"], "prompt");
    }

    #[test]
    fn the_store_refuses() {
        let from = |error: store::Error| ApiError::from(error);
        check(
            &from(store::Error::Full { path: PathBuf::new(), free: 0 }),
            507,
            "server_error",
            Some("storage_full"),
        );
        check(&from(store::Error::Busy { limit: 1 }), 503, "server_error", None);
        check(&from(store::Error::Stopped), 503, "server_error", None);
        let id = CompletionId::new();
        check(&from(store::Error::UnknownCompletion { id }), 404, INVALID, Some("not_found"));
        let different = store::Error::DifferentPrompts { chosen: id, rejected: id };
        check(&from(different), 422, INVALID, Some("invalid_value"));
        // What is wrong with the disk is for the log, not for clients.
        let corrupt = from(store::Error::Corrupt("page 7".to_owned()));
        check(&corrupt, 500, "server_error", None);
        assert!(!corrupt.body().to_string().contains("page 7"));
    }

    #[test]
    fn the_registry_refuses() {
        let from = |error: registry::Error| ApiError::from(error);
        check(&from(registry::Error::UnknownVersion(Version(9))), 404, INVALID, Some("not_found"));
        check(&from(registry::Error::Rejected(Version(2))), 409, INVALID, Some("conflict"));
        check(&from(registry::Error::Full), 507, "server_error", Some("storage_full"));
        let file = "adapter_model.safetensors".to_owned();
        let corrupt = registry::Error::Corrupt { version: Version(2), file, problem: "has another checksum" };
        check(&from(corrupt), 409, INVALID, Some("conflict"));
    }

    #[test]
    fn what_a_client_wrote_is_repeated_in_part() {
        let error = ApiError::parameter(&"é".repeat(5000), "is not supported");
        assert_eq!(error.body()["error"]["param"].as_str().unwrap().chars().count(), 201);
        assert!(ApiError::unknown_model(&"m".repeat(5000)).body().to_string().len() < 500);
    }
}
