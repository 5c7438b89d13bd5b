//! Feedback in the shapes of TensorZero, Langfuse and Helicone.

use serde_json::Value;

use crate::completion::{Feedback, Judgement};
use crate::http::fields::Fields;

use super::{About, LONG, Result, answer, blank};

/// A metric of TensorZero's is a boolean, a number, or the reserved `demonstration`.
pub(super) fn tensorzero(mut fields: Fields, about: &About<'_>) -> Result<Feedback> {
    let metric = metric(&mut fields, "metric_name")?;
    let completion = about.completion(&fields.required_text("inference_id")?, "inference_id")?;
    let judgement = if metric == "demonstration" {
        Judgement::Demonstration { answer: answer(&mut fields, "value")? }
    } else {
        match fields.take("value") {
            Some(Value::Bool(up)) => Judgement::Thumbs { up },
            Some(Value::Number(score)) => rating(&fields, score.as_f64())?,
            _ => return fields.wrong("value", "must be a boolean or a number from 0 to 1"),
        }
    };
    let mut feedback = blank(judgement, Some(completion), about.now);
    feedback.tags = fields.tags("tags")?;
    feedback.tags.insert("metric_name".to_owned(), metric);
    for field in ["dryrun", "internal"] {
        fields.neutral(field, |value| *value == Value::Bool(false))?;
    }
    fields.finish()?;
    Ok(feedback)
}

/// A score of Langfuse's is a bit or a number from 0 to 1. Its `id` makes it count once.
pub(super) fn langfuse(mut fields: Fields, about: &About<'_>) -> Result<Feedback> {
    let name = metric(&mut fields, "name")?;
    let trace = fields.text("traceId")?;
    let completion = match (fields.text("observationId")?, trace) {
        (Some(id), _) => about.completion(&id, "observationId")?,
        (None, Some(id)) => about.completion(&id, "traceId")?,
        (None, None) => return fields.wrong("traceId", "or `observationId` must name the completion"),
    };
    let kind = fields.text("dataType")?;
    let value = fields.number("value", 0.0, 1.0)?;
    let judgement = match (kind.as_deref(), value) {
        (Some("BOOLEAN"), Some(bit)) if bit.fract() == 0.0 => Judgement::Thumbs { up: bit > 0.0 },
        (Some("BOOLEAN"), _) => return fields.wrong("value", "must be 0 or 1"),
        (None | Some("NUMERIC"), score) => rating(&fields, score)?,
        (Some(_), _) => return fields.wrong("dataType", "must be NUMERIC or BOOLEAN"),
    };
    let mut feedback = blank(judgement, Some(completion), about.now);
    feedback.comment = fields.short_text("comment", LONG)?;
    feedback.idempotency_key = fields.name("id", 256)?;
    feedback.tags = fields.tags("metadata")?;
    // What its own tools say of where a score comes from.
    for origin in ["environment", "configId", "queueId", "sessionId", "source", "timestamp"] {
        if let Some(text) = fields.short_text(origin, 512)? {
            feedback.tags.insert(origin.to_owned(), text);
        }
    }
    feedback.tags.insert("name".to_owned(), name);
    fields.finish()?;
    Ok(feedback)
}

/// Helicone knows thumbs only; `id` is the path's.
pub(super) fn helicone(mut fields: Fields, id: &str, about: &About<'_>) -> Result<Feedback> {
    let Some(Value::Bool(up)) = fields.take("rating") else {
        return fields.wrong("rating", "must be true or false");
    };
    fields.finish()?;
    Ok(blank(Judgement::Thumbs { up }, Some(about.completion(id, "id")?), about.now))
}

fn metric(fields: &mut Fields, field: &str) -> Result<String> {
    match fields.name(field, 512)? {
        Some(name) => Ok(name),
        None => fields.wrong(field, "is required"),
    }
}

/// A score from 0 to 1 as the nearest number of stars.
fn rating(fields: &Fields, score: Option<f64>) -> Result<Judgement> {
    match score {
        Some(score) if (0.0..=1.0).contains(&score) => {
            Ok(Judgement::Rating { stars: (1.0 + 4.0 * score).round() as u8 })
        }
        _ => fields.wrong("value", "must be a number from 0 to 1"),
    }
}
