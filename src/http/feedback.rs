//! `POST /v1/feedback`, and the shapes in which other tools' clients send the same.

mod alias;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use axum::{
    Json,
    body::Bytes,
    extract::State as Extract,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::completion::{CompletionId, Feedback, FeedbackId, Judgement, Message, Prompt, Source, Timestamp};
use crate::store::{Attached, Store};

use super::{Id, State, error::ApiError, fields::Fields, recorder::Recorder, wire};

type Result<T> = std::result::Result<T, ApiError>;

pub(super) async fn post(Extract(state): Extract<State>, body: Bytes) -> Result<Response> {
    let (status, id, _) = take(&state, &body, judged).await?;
    Ok((status, Json(json!({ "id": id }))).into_response())
}

/// TensorZero's `POST /feedback`: `{"metric_name", "inference_id", "value", "tags"?}`.
pub(super) async fn tensorzero(Extract(state): Extract<State>, body: Bytes) -> Result<Json<Value>> {
    let (_, id, _) = take(&state, &body, alias::tensorzero).await?;
    Ok(Json(json!({ "feedback_id": id })))
}

/// Langfuse's `POST /api/public/scores`: `{"traceId" | "observationId", "name", "value", "dataType"?}`, or a list of them,
/// as its clients send since version 5.
pub(super) async fn langfuse(Extract(state): Extract<State>, body: Bytes) -> Result<Response> {
    if let Ok(Value::Array(scores)) = serde_json::from_slice(&body)
        && !scores.is_empty()
    {
        return Ok(batch(&state, scores).await);
    }
    // A score is known by the id that its sender gave it.
    let (_, id, given) = take(&state, &body, alias::langfuse).await?;
    Ok(Json(json!({ "id": given.unwrap_or_else(|| id.to_string()) })).into_response())
}

/// Each score by itself: one that is wrong does not keep the others out.
async fn batch(state: &State, scores: Vec<Value>) -> Response {
    let (mut accepted, mut errors) = (0, Vec::new());
    for score in scores {
        match take(state, score.to_string().as_bytes(), alias::langfuse).await {
            Ok(_) => accepted += 1,
            Err(error) => errors.push(json!({ "message": error.message() })),
        }
    }
    if errors.is_empty() {
        return (StatusCode::ACCEPTED, Json(json!({ "message": "Accepted" }))).into_response();
    }
    let counts = json!({ "accepted": accepted, "rejected": errors.len(), "errors": errors });
    (StatusCode::MULTI_STATUS, Json(counts)).into_response()
}

/// Helicone's `POST /v1/request/{id}/feedback`: `{"rating": true}`.
pub(super) async fn helicone(Extract(state): Extract<State>, Id(id): Id, body: Bytes) -> Result<Json<Value>> {
    let rating = |fields, about: &About<'_>| alias::helicone(fields, &id, about);
    let (_, id, _) = take(&state, &body, rating).await?;
    Ok(Json(json!({ "id": id })))
}

/// Reads a judgement and keeps it; its status, its id, and the key that its sender gave it.
///
/// An upstream's answer may reach its client before the store. What is not found is therefore looked for once more when
/// everything that has passed is recorded.
async fn take(
    state: &State,
    body: &[u8],
    judged: impl Fn(Fields, &About<'_>) -> Result<Feedback>,
) -> Result<(StatusCode, FeedbackId, Option<String>)> {
    let recorder = state.backend.recorder();
    // What its client has seen was queued before this.
    let mark = recorder.and_then(Recorder::mark);
    match (told(state, body, &judged).await, recorder.zip(mark)) {
        (Err(error), Some((recorder, mark))) if error.is_missing() && recorder.reached(mark).await => {
            told(state, body, &judged).await
        }
        (taken, _) => taken,
    }
}

async fn told(
    state: &State,
    body: &[u8],
    judged: &impl Fn(Fields, &About<'_>) -> Result<Feedback>,
) -> Result<(StatusCode, FeedbackId, Option<String>)> {
    let about = About { now: (state.clock)(), store: Some(&state.store) };
    let feedback = read(body, &about, judged)?;
    let given = feedback.idempotency_key.clone();
    let (status, id) = attach(state, feedback).await?;
    Ok((status, id, given))
}

/// What a judgement is read against.
struct About<'a> {
    now: Timestamp,
    /// Knows the names that an upstream gave to its answers.
    store: Option<&'a Store>,
}

impl About<'_> {
    /// The answer of this id, which may be the upstream's own. An id that was never given out is as unknown as one that
    /// was forgotten.
    fn completion(&self, text: &str, param: &str) -> Result<CompletionId> {
        let named = self.store.map(|store| store.named(text)).transpose()?.flatten();
        match named {
            Some(id) => Ok(id),
            None => text.parse().map_err(|_| ApiError::not_found(param, "completion of this id")),
        }
    }
}

/// Puts it on disk, then counts it.
pub(super) async fn attach(state: &State, feedback: Feedback) -> Result<(StatusCode, FeedbackId)> {
    match state.store.attach(&feedback).await? {
        Attached::Seen(first) => Ok((StatusCode::OK, first)),
        Attached::Stored => {
            state.metrics.feedback(&feedback);
            Ok((StatusCode::CREATED, feedback.id))
        }
    }
}

const LONG: usize = 20_000;

/// Reads a judgement. What is no JSON object is a 400; everything else that is wrong with it a 422.
fn read(
    body: &[u8],
    about: &About<'_>,
    judged: impl FnOnce(Fields, &About<'_>) -> Result<Feedback>,
) -> Result<Feedback> {
    judged(Fields::parse(body)?, about).map_err(ApiError::into_unprocessable)
}

/// A logged judgement of the answer `completion`, which it does not name itself.
pub(super) fn of(mut fields: Fields, completion: CompletionId, at: Timestamp) -> Result<Feedback> {
    let kind = fields.get("kind").and_then(Value::as_str).unwrap_or_default();
    if kind != "comparison" {
        fields.set("completion_id", completion.to_string().into())?;
    }
    judged(fields, &About { now: at, store: None })
}

fn judged(mut fields: Fields, about: &About<'_>) -> Result<Feedback> {
    let kind = fields.required_text("kind")?;
    let (judgement, completion) = if kind == "comparison" {
        comparison(&mut fields, about)?
    } else {
        let judgement = single(&kind, &mut fields)?;
        let id = fields.required_text("completion_id")?;
        (judgement, Some(about.completion(&id, "completion_id")?))
    };
    let mut feedback = blank(judgement, completion, about.now);
    feedback.rater = fields.name("rater", 256)?;
    feedback.comment = fields.short_text("comment", LONG)?;
    feedback.idempotency_key = fields.name("idempotency_key", 256)?;
    feedback.tags = fields.tags("tags")?;
    feedback.source = match fields.text("source")?.as_deref() {
        None | Some("human") => Source::Human,
        Some("ai") => Source::Ai,
        Some(_) => return fields.wrong("source", "must be `human` or `ai`"),
    };
    fields.finish()?;
    Ok(feedback)
}

/// A judgement of one answer.
fn single(kind: &str, fields: &mut Fields) -> Result<Judgement> {
    Ok(match kind {
        "thumbs" => match fields.required_text("value")?.as_str() {
            "up" => Judgement::Thumbs { up: true },
            "down" => Judgement::Thumbs { up: false },
            _ => return fields.wrong("value", "must be `up` or `down`"),
        },
        "rating" => match fields.count("value", 1, 5)? {
            Some(stars) => Judgement::Rating { stars: stars as u8 },
            None => return fields.wrong("value", "is required"),
        },
        "demonstration" => Judgement::Demonstration { answer: answer(fields, "value")? },
        "flag" => Judgement::Flag { flag: named(fields, "wrongful_refusal, harmful, incorrect, other")? },
        "behaviour" => {
            Judgement::Behaviour { behaviour: named(fields, "copied, regenerated, edited, abandoned")? }
        }
        _ => {
            let kinds = "must be one of thumbs, rating, comparison, demonstration, flag, behaviour";
            return fields.wrong("kind", kinds);
        }
    })
}

/// `value` as one of an enum's names.
fn named<T: serde::de::DeserializeOwned>(fields: &mut Fields, names: &str) -> Result<T> {
    let value = Value::String(fields.required_text("value")?);
    serde_json::from_value(value).or_else(|_| fields.wrong("value", &format!("must be one of {names}")))
}

/// Two logged answers by their ids, or two texts with their prompt.
fn comparison(fields: &mut Fields, about: &About<'_>) -> Result<(Judgement, Option<CompletionId>)> {
    let (chosen, rejected) = (answer(fields, "chosen")?, answer(fields, "rejected")?);
    if chosen == rejected {
        return fields.wrong("rejected", "must differ from `chosen`");
    }
    let prompt = match fields.take("prompt") {
        None => return logged(fields, about, &chosen, &rejected),
        Some(Value::String(text)) if !text.is_empty() => Prompt::Chat(vec![Message::user(text)]),
        Some(Value::Array(list)) => Prompt::Chat(wire::messages(list, "prompt")?),
        Some(_) => return fields.wrong("prompt", "must be a text or a list of messages"),
    };
    Ok((Judgement::TextComparison { prompt, chosen, rejected }, None))
}

/// Two logged answers. `completion_id` may repeat one of them, for clients that always send it.
fn logged(
    fields: &mut Fields,
    about: &About<'_>,
    chosen: &str,
    rejected: &str,
) -> Result<(Judgement, Option<CompletionId>)> {
    let (chosen, rejected) = (about.completion(chosen, "chosen")?, about.completion(rejected, "rejected")?);
    let repeated =
        fields.text("completion_id")?.map(|id| about.completion(&id, "completion_id")).transpose()?;
    if repeated.is_some_and(|id| id != chosen && id != rejected) {
        return fields.wrong("completion_id", "must be `chosen` or `rejected`, or absent");
    }
    Ok((Judgement::Comparison { chosen, rejected }, Some(chosen)))
}

/// The text of an answer, or its id.
fn answer(fields: &mut Fields, field: &str) -> Result<String> {
    match fields.short_text(field, LONG)? {
        Some(answer) if !answer.trim().is_empty() => Ok(answer),
        Some(_) => fields.wrong(field, "must not be empty"),
        None => fields.wrong(field, "is required"),
    }
}

fn blank(judgement: Judgement, completion: Option<CompletionId>, at: Timestamp) -> Feedback {
    Feedback {
        id: FeedbackId::new(),
        at,
        completion,
        judgement,
        rater: None,
        source: Source::default(),
        comment: None,
        idempotency_key: None,
        tags: BTreeMap::new(),
    }
}
