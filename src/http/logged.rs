//! A line of a log: an answer that was given elsewhere, with what was said of it.

use chrono::DateTime;
use serde_json::Value;
use uuid::{NoContext, Uuid};

use crate::completion::{
    Completion, CompletionId, Feedback, FinishReason, Message, Prompt, Risk, Timestamp, Version,
};
use crate::signals::Interactions;

use super::{error::ApiError, feedback, fields::Fields, record, wire};

type Result<T> = std::result::Result<T, ApiError>;

/// An answer with its signals, and the judgements of it.
#[derive(Debug, Clone)]
pub struct Logged {
    pub completion: Completion,
    pub feedback: Vec<Feedback>,
}

/// Reads `{"at", "prompt" | "messages", "response", "interaction"?, "risk"?, "user"?, "metadata"?, "finish_reason"?,
/// "feedback"?: [{"at"?, "kind", …}]}`.
///
/// Times are milliseconds since 1970 or in RFC 3339. A judgement is `/v1/feedback`'s without `completion_id`; without a
/// time of its own it came with the answer.
///
/// # Errors
/// What is wrong with which field.
pub fn logged(line: &str, interactions: &Interactions) -> std::result::Result<Logged, String> {
    read(line, interactions).map_err(|error| error.message().to_owned())
}

fn read(line: &str, interactions: &Interactions) -> Result<Logged> {
    let mut fields = Fields::parse(line.as_bytes())?;
    let Some(at) = time(&mut fields)? else { return fields.wrong("at", "is required") };
    let prompt = match (fields.text("prompt")?, fields.list("messages")?) {
        (Some(text), None) => Prompt::Chat(vec![Message::user(text)]),
        (None, Some(list)) => Prompt::Chat(wire::messages(list, "messages")?),
        _ => return fields.wrong("prompt", "or else `messages` is required"),
    };
    let response = fields.required_text("response")?;
    let interaction = match fields.text("interaction")? {
        Some(tag) => {
            interactions.tagged(&tag).or_else(|why| fields.wrong("interaction", &why.to_string()))?
        }
        None => interactions.classify(prompt.request()),
    };
    let risk = match fields.text("risk")?.as_deref() {
        None => None,
        Some("benign") => Some(Risk::Benign),
        Some("harmful") => Some(Risk::Harmful),
        Some(_) => return fields.wrong("risk", "must be `benign` or `harmful`"),
    };
    let finish_reason = match fields.text("finish_reason")?.as_deref() {
        None | Some("stop") => FinishReason::Stop,
        Some("length") => FinishReason::Length,
        Some(_) => return fields.wrong("finish_reason", "must be `stop` or `length`"),
    };
    let user = fields.name("user", 512)?;
    let metadata = fields.tags("metadata")?;
    let judgements = fields.list("feedback")?.unwrap_or_default();
    fields.finish()?;
    let request = record::Request {
        at,
        prompt: &prompt,
        interaction: &interaction,
        risk,
        user: user.as_deref(),
        metadata: &metadata,
    };
    let answer = record::Answer {
        id: id(at),
        version: Version::default(),
        text: &response,
        finish_reason,
        prompt_tokens: 0,
        completion_tokens: 0,
        kl: None,
        seconds: 0.0,
    };
    let completion = record::completion(request, answer, interactions.classifier());
    let judged = |(nth, value)| judgement(value, &format!("feedback[{nth}]"), &completion);
    let feedback = judgements.into_iter().enumerate().map(judged).collect::<Result<_>>()?;
    Ok(Logged { completion, feedback })
}

/// A judgement of the answer beside it.
fn judgement(value: Value, path: &str, completion: &Completion) -> Result<Feedback> {
    let mut fields = Fields::within(value, path)?;
    let at = time(&mut fields)?.unwrap_or(completion.at);
    if at < completion.at {
        return fields.wrong("at", "must not be before its answer");
    }
    feedback::of(fields, completion.id, at)
}

/// Ids sort by the time of their request, here as everywhere.
fn id(at: Timestamp) -> CompletionId {
    let (seconds, rest) = (at.0 / 1000, (at.0 % 1000) as u32);
    CompletionId(Uuid::new_v7(uuid::Timestamp::from_unix(NoContext, seconds, rest * 1_000_000)))
}

fn time(fields: &mut Fields) -> Result<Option<Timestamp>> {
    let read = match fields.take("at") {
        None => return Ok(None),
        Some(Value::Number(ms)) => ms.as_u64(),
        Some(Value::String(text)) => DateTime::parse_from_rfc3339(&text)
            .ok()
            .and_then(|time| u64::try_from(time.timestamp_millis()).ok()),
        Some(_) => None,
    };
    // UUIDs hold 48 bits of it.
    match read.filter(|ms| *ms < 1 << 48) {
        Some(ms) => Ok(Some(Timestamp(ms))),
        None => fields.wrong("at", "must be a time in RFC 3339 or in milliseconds since 1970"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::completion::Judgement;
    use crate::signals;

    fn read(line: &str) -> std::result::Result<Logged, String> {
        let classifier = signals::Classifier::built_in().unwrap();
        logged(line, &Interactions::new(&signals::Config::default(), classifier).unwrap())
    }

    #[test]
    fn a_line_is_an_answer_with_its_judgements() {
        let line = r#"{"at":"2026-10-01T12:00:00.5Z","prompt":"How do I sort a list in Python?","response":"I'm sorry, but I can't help with that.",
            "user":"ann","feedback":[{"kind":"thumbs","value":"down","at":1791000000000,"rater":"ann"},{"kind":"rating","value":2}]}"#;
        let Logged { completion, feedback } = read(line).unwrap();
        assert_eq!(completion.at, Timestamp(1_790_856_000_500));
        assert!(completion.refusal.is_refusal());
        assert_eq!(completion.user.as_deref(), Some("ann"));
        assert_eq!(feedback[0].at, Timestamp(1_791_000_000_000));
        assert_eq!(feedback[0].judgement, Judgement::Thumbs { up: false });
        assert_eq!(feedback[1].at, completion.at);
        assert!(feedback.iter().all(|feedback| feedback.completion == Some(completion.id)));
    }

    #[test]
    fn a_fault_names_its_field() {
        #[track_caller]
        fn check(line: &str, field: &str) {
            let message = read(line).unwrap_err();
            assert!(message.contains(&format!("`{field}`")), "{message}");
        }
        check(r#"{"prompt":"a","response":"b"}"#, "at");
        check(r#"{"at":"yesterday","prompt":"a","response":"b"}"#, "at");
        check(r#"{"at":1,"response":"b"}"#, "prompt");
        check(r#"{"at":1,"prompt":"a"}"#, "response");
        check(r#"{"at":1,"prompt":"a","response":"b","feedbacks":[]}"#, "feedbacks");
        check(r#"{"at":1,"prompt":"a","response":"b","risk":"low"}"#, "risk");
        check(
            r#"{"at":1,"prompt":"a","response":"b","feedback":[{"kind":"rating","value":9}]}"#,
            "feedback[0].value",
        );
        check(
            r#"{"at":5,"prompt":"a","response":"b","feedback":[{"kind":"thumbs","value":"up","at":4}]}"#,
            "feedback[0].at",
        );
    }
}
