//! `POST /v1/feedback`, and the shapes in which other tools' clients send the same.

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State as Extract},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::completion::{
    CompletionId, Feedback, FeedbackId, Judgement, Message, Prompt, Role, Source, Timestamp,
};
use crate::signals;
use crate::store::Attached;

use super::{State, error::ApiError, fields::Fields};

type Result<T> = std::result::Result<T, ApiError>;

pub(super) async fn post(Extract(state): Extract<State>, body: Bytes) -> Result<Response> {
    let feedback = read(&body, (state.clock)())?;
    let (status, id) = attach(&state, feedback).await?;
    Ok((status, Json(json!({ "id": id }))).into_response())
}

/// TensorZero's `POST /feedback`: `{"metric_name", "inference_id", "value"}`.
pub(super) async fn tensorzero(Extract(state): Extract<State>, body: Bytes) -> Result<Response> {
    let mut fields = Fields::parse(&body)?;
    let metric = fields.required_text("metric_name")?;
    let completion = completion_id(&fields.required_text("inference_id")?, "inference_id")?;
    let judgement = match (metric.as_str(), fields.take("value")) {
        ("demonstration", Some(Value::String(answer))) => Judgement::Demonstration { answer },
        (_, Some(Value::Bool(up))) => Judgement::Thumbs { up },
        (_, Some(Value::Number(score))) => rating("value", score.as_f64())?,
        _ => {
            return Err(ApiError::unprocessable(
                "value",
                "must be a boolean, a number from 0 to 1, or a demonstration",
            ));
        }
    };
    let mut feedback = blank(judgement, Some(completion), (state.clock)());
    feedback.tags = fields.tags("tags")?;
    feedback.tags.insert("metric_name".to_owned(), metric);
    let (_, id) = attach(&state, feedback).await?;
    Ok(Json(json!({ "feedback_id": id })).into_response())
}

/// Langfuse's `POST /api/public/scores`: `{"traceId" | "observationId", "name", "value", "dataType"}`.
pub(super) async fn langfuse(Extract(state): Extract<State>, body: Bytes) -> Result<Response> {
    let mut fields = Fields::parse(&body)?;
    let name = fields.required_text("name")?;
    let observation = fields.text("observationId")?;
    let trace = fields.text("traceId")?;
    let Some(id) = observation.or(trace) else {
        return Err(ApiError::unprocessable("traceId", "or `observationId` must name the completion"));
    };
    let kind = fields.text("dataType")?;
    let value = fields.number("value", f64::MIN, f64::MAX)?;
    let judgement = match (kind.as_deref(), value) {
        (Some("BOOLEAN"), Some(bit)) if bit == 0.0 || bit == 1.0 => Judgement::Thumbs { up: bit == 1.0 },
        (None | Some("NUMERIC"), score) => rating("value", score)?,
        _ => return Err(ApiError::unprocessable("dataType", "must be NUMERIC, or BOOLEAN with 0 or 1")),
    };
    let mut feedback = blank(judgement, Some(completion_id(&id, "traceId")?), (state.clock)());
    feedback.comment = fields.short_text("comment", LONG)?;
    feedback.idempotency_key = fields.short_text("id", 256)?;
    feedback.tags.insert("name".to_owned(), name);
    let (_, id) = attach(&state, feedback).await?;
    Ok(Json(json!({ "id": id })).into_response())
}

/// Helicone's `POST /v1/request/{id}/feedback`: `{"rating": true}`.
pub(super) async fn helicone(
    Extract(state): Extract<State>,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<Response> {
    let mut fields = Fields::parse(&body)?;
    let Some(Value::Bool(up)) = fields.take("rating") else {
        return Err(ApiError::unprocessable("rating", "must be true or false"));
    };
    fields.finish()?;
    let completion = completion_id(&id, "id")?;
    let (_, id) = attach(&state, blank(Judgement::Thumbs { up }, Some(completion), (state.clock)())).await?;
    Ok(Json(json!({ "id": id })).into_response())
}

/// Puts it on disk, then counts it.
async fn attach(state: &State, feedback: Feedback) -> Result<(StatusCode, FeedbackId)> {
    match state.store.attach(&feedback).await? {
        Attached::Seen(first) => Ok((StatusCode::OK, first)),
        Attached::Stored => {
            state.metrics.feedback(&feedback);
            let value = signals::satisfaction(&feedback.judgement);
            if let (Some(value), Some(id)) = (value, feedback.completion)
                && let Some(completion) = state.store.completion(id)?
            {
                state.metrics.satisfaction(&completion, value);
            }
            Ok((StatusCode::CREATED, feedback.id))
        }
    }
}

const LONG: usize = 20_000;

/// Reads a judgement. What is no JSON object is a 400; everything else that is wrong with it a 422.
fn read(body: &[u8], now: Timestamp) -> Result<Feedback> {
    let fields = Fields::parse(body)?;
    judged(fields, now).map_err(ApiError::into_unprocessable)
}

fn judged(mut fields: Fields, now: Timestamp) -> Result<Feedback> {
    let kind = fields.required_text("kind")?;
    let (judgement, completion) = match kind.as_str() {
        "comparison" => comparison(&mut fields)?,
        _ => {
            let judgement = single(&kind, &mut fields)?;
            let id = fields.required_text("completion_id")?;
            (judgement, Some(completion_id(&id, "completion_id")?))
        }
    };
    let mut feedback = blank(judgement, completion, now);
    feedback.rater = fields.short_text("rater", 256)?;
    feedback.comment = fields.short_text("comment", LONG)?;
    feedback.idempotency_key = fields.short_text("idempotency_key", 256)?;
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
        "demonstration" => match fields.short_text("value", LONG)? {
            Some(answer) if !answer.trim().is_empty() => Judgement::Demonstration { answer },
            _ => return fields.wrong("value", "must be the better answer"),
        },
        "flag" => Judgement::Flag { flag: named(fields, "wrongful_refusal, harmful, incorrect, other")? },
        "behaviour" => {
            Judgement::Behaviour { behaviour: named(fields, "copied, regenerated, edited, abandoned")? }
        }
        _ => {
            return fields
                .wrong("kind", "must be one of thumbs, rating, comparison, demonstration, flag, behaviour");
        }
    })
}

/// `value` as one of an enum's names.
fn named<T: serde::de::DeserializeOwned>(fields: &mut Fields, names: &str) -> Result<T> {
    let value = Value::String(fields.required_text("value")?);
    serde_json::from_value(value).or_else(|_| fields.wrong("value", &format!("must be one of {names}")))
}

/// Two logged answers by their ids, or two texts with their prompt.
fn comparison(fields: &mut Fields) -> Result<(Judgement, Option<CompletionId>)> {
    let (chosen, rejected) = (fields.required_text("chosen")?, fields.required_text("rejected")?);
    if chosen == rejected {
        return fields.wrong("rejected", "must differ from `chosen`");
    }
    let prompt = match fields.take("prompt") {
        None => {
            let (chosen, rejected) =
                (completion_id(&chosen, "chosen")?, completion_id(&rejected, "rejected")?);
            return Ok((Judgement::Comparison { chosen, rejected }, Some(chosen)));
        }
        Some(Value::String(text)) => Prompt::Chat(vec![Message { role: Role::User, content: text }]),
        Some(messages) => match serde_json::from_value::<Vec<Message>>(messages) {
            Ok(messages) if !messages.is_empty() => Prompt::Chat(messages),
            _ => return fields.wrong("prompt", "must be a string or a list of messages"),
        },
    };
    Ok((Judgement::TextComparison { prompt, chosen, rejected }, None))
}

/// A score from 0 to 1 as the nearest number of stars.
fn rating(param: &str, score: Option<f64>) -> Result<Judgement> {
    match score {
        Some(score) if (0.0..=1.0).contains(&score) => {
            Ok(Judgement::Rating { stars: (1.0 + 4.0 * score).round() as u8 })
        }
        _ => Err(ApiError::unprocessable(param, "must be a number from 0 to 1")),
    }
}

/// An id that was never given out is as unknown as one that was forgotten.
fn completion_id(text: &str, param: &str) -> Result<CompletionId> {
    text.parse().map_err(|_| ApiError::not_found(param, "completion of this id"))
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
        tags: std::collections::BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use crate::completion::{Behaviour, Flag};

    use super::*;

    const ID: &str = "0190a0b0-0000-7000-8000-000000000001";

    #[track_caller]
    fn check(body: &str, expected: &Judgement) {
        let body = body.replace("ID", ID);
        assert_eq!(read(body.as_bytes(), Timestamp(5)).unwrap().judgement, *expected);
    }

    #[track_caller]
    fn check_refused(body: &str, param: &str) {
        let error = read(body.replace("ID", ID).as_bytes(), Timestamp(5)).unwrap_err();
        assert_eq!(error.body()["error"]["param"], param, "{body}");
    }

    #[test]
    fn every_kind_is_read() {
        let thumbs = r#"{"kind":"thumbs","value":"up","completion_id":"ID"}"#;
        check(thumbs, &Judgement::Thumbs { up: true });
        let flag = r#"{"kind":"flag","value":"wrongful_refusal","completion_id":"ID"}"#;
        check(flag, &Judgement::Flag { flag: Flag::WrongfulRefusal });
        let behaviour = r#"{"kind":"behaviour","value":"copied","completion_id":"ID"}"#;
        check(behaviour, &Judgement::Behaviour { behaviour: Behaviour::Copied });
        check(r#"{"kind":"rating","value":4,"completion_id":"ID"}"#, &Judgement::Rating { stars: 4 });
    }

    #[test]
    fn the_field_at_fault_is_named() {
        check_refused(r#"{"kind":"thumbs","value":"sideways","completion_id":"ID"}"#, "value");
        check_refused(r#"{"kind":"rating","value":9,"completion_id":"ID"}"#, "value");
        check_refused(r#"{"kind":"praise","value":"x","completion_id":"ID"}"#, "kind");
        check_refused(r#"{"kind":"thumbs","value":"up"}"#, "completion_id");
        check_refused(r#"{"kind":"thumbs","value":"up","completion_id":"ID","colour":1}"#, "colour");
        check_refused(r#"{"kind":"comparison","chosen":"ID","rejected":"ID"}"#, "rejected");
    }
}
