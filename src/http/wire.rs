//! OpenAI's request bodies, read into what was asked.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::completion::{Message, Prompt, Risk, Role};

use super::{error::ApiError, fields::Fields};

type Result<T> = std::result::Result<T, ApiError>;

/// A completion request after every value has been checked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    pub(super) prompt: Prompt,
    pub(super) model: String,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) n: usize,
    pub(super) max_tokens: Option<usize>,
    pub(super) temperature: f64,
    pub(super) top_p: f64,
    pub(super) top_k: usize,
    pub(super) seed: Option<u64>,
    pub(super) stop: Vec<String>,
    pub(super) top_logprobs: Option<usize>,
    pub(super) user: Option<String>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) risk: Option<Risk>,
}

/// What is a number of tokens at all; whether it fits the context is the engine's to say.
const MOST_TOKENS: u64 = u32::MAX as u64;

/// The body of `POST /v1/chat/completions`.
pub(super) fn chat(body: &[u8]) -> Result<Asked> {
    let mut fields = Fields::parse(body)?;
    let messages = match fields.list("messages")? {
        Some(list) => messages(list, "messages")?,
        None => return fields.wrong("messages", "is required"),
    };
    let logprobs = fields.truth("logprobs")?;
    let top = fields.count("top_logprobs", 0, 20)?;
    if top.is_some() && !logprobs {
        return fields.wrong("top_logprobs", "needs `logprobs` to be true");
    }
    let most = fields.count("max_completion_tokens", 1, MOST_TOKENS)?;
    fields.neutral("response_format", |value| *value == json!({ "type": "text" }))?;
    for tools in ["tools", "functions"] {
        fields.neutral(tools, |value| value.as_array().is_some_and(Vec::is_empty))?;
    }
    for choice in ["tool_choice", "function_call"] {
        fields.neutral(choice, |value| value == "none")?;
    }
    fields.neutral("parallel_tool_calls", Value::is_boolean)?;
    fields.neutral("modalities", |value| *value == json!(["text"]))?;
    let top_logprobs = logprobs.then_some(top.unwrap_or(0));
    common(fields, Prompt::Chat(messages), top_logprobs, most)
}

/// The body of `POST /v1/completions`.
pub(super) fn text(body: &[u8]) -> Result<Asked> {
    let mut fields = Fields::parse(body)?;
    let prompt = match fields.take("prompt") {
        Some(Value::String(text)) => text,
        Some(Value::Array(mut texts)) if texts.len() == 1 && texts[0].is_string() => match texts.pop() {
            Some(Value::String(text)) => text,
            _ => String::new(),
        },
        Some(_) => return fields.wrong("prompt", "must be a string, or a list of one string"),
        None => return fields.wrong("prompt", "is required"),
    };
    if prompt.is_empty() {
        return fields.wrong("prompt", "must not be empty");
    }
    let top_logprobs = fields.count("logprobs", 0, 5)?;
    fields.neutral("echo", |value| *value == Value::Bool(false))?;
    fields.neutral("best_of", |value| *value == 1)?;
    fields.neutral("suffix", |value| *value == "")?;
    common(fields, Prompt::Text(prompt), top_logprobs, None)
}

/// What both routes take.
fn common(
    mut fields: Fields,
    prompt: Prompt,
    top_logprobs: Option<usize>,
    most: Option<usize>,
) -> Result<Asked> {
    let model = fields.required_text("model")?;
    let stream = fields.truth("stream")?;
    let include_usage = match fields.take("stream_options") {
        None => false,
        Some(_) if !stream => return fields.wrong("stream_options", "needs `stream` to be true"),
        Some(options) => {
            let mut options = Fields::within(options, "stream_options")?;
            let include = options.truth("include_usage")?;
            options.finish()?;
            include
        }
    };
    let top_p = fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0);
    if top_p <= 0.0 {
        return fields.wrong("top_p", "must be above 0");
    }
    for penalty in ["presence_penalty", "frequency_penalty"] {
        fields.neutral(penalty, |value| value.as_f64() == Some(0.0))?;
    }
    fields.neutral("logit_bias", |value| value.as_object().is_some_and(serde_json::Map::is_empty))?;
    fields.neutral("store", Value::is_boolean)?;
    fields.neutral("service_tier", |value| value == "auto" || value == "default")?;
    let metadata = fields.tags("metadata")?;
    let risk = match metadata.get("risk").map(String::as_str) {
        None => None,
        Some("benign") => Some(Risk::Benign),
        Some("harmful") => Some(Risk::Harmful),
        Some(_) => return fields.wrong("metadata.risk", "must be `benign` or `harmful`"),
    };
    let older = fields.count("max_tokens", 1, MOST_TOKENS)?;
    if most.is_some() && older.is_some() {
        return fields.wrong("max_tokens", "and `max_completion_tokens` mean the same; give one of them");
    }
    let asked = Asked {
        prompt,
        model,
        stream,
        include_usage,
        n: fields.count("n", 1, 16)?.unwrap_or(1),
        max_tokens: most.or(older),
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0),
        top_p,
        top_k: fields.count("top_k", 0, MOST_TOKENS)?.unwrap_or(0),
        seed: fields.seed("seed")?,
        stop: stop(&mut fields)?,
        top_logprobs,
        user: fields.short_text("user", 512)?,
        metadata,
        risk,
    };
    fields.finish()?;
    Ok(asked)
}

/// A conversation that stands in the field `path`.
pub(super) fn messages(list: Vec<Value>, path: &str) -> Result<Vec<Message>> {
    if list.is_empty() {
        return Err(ApiError::parameter(path, "must not be empty"));
    }
    list.into_iter().enumerate().map(|(nth, value)| message(value, &format!("{path}[{nth}]"))).collect()
}

fn message(value: Value, path: &str) -> Result<Message> {
    let mut fields = Fields::within(value, path)?;
    let role = match fields.required_text("role")?.as_str() {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        _ => return fields.wrong("role", "must be one of system, developer, user, assistant"),
    };
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) if !parts.is_empty() => {
            let part = |(nth, value)| part(value, &format!("{path}.content[{nth}]"));
            parts.into_iter().enumerate().map(part).collect::<Result<Vec<_>>>()?.concat()
        }
        Some(_) => return fields.wrong("content", "must be a string or a list of text parts"),
        None => return fields.wrong("content", "is required"),
    };
    fields.finish()?;
    Ok(Message { role, content })
}

fn part(value: Value, path: &str) -> Result<String> {
    let mut part = Fields::within(value, path)?;
    if part.required_text("type")? != "text" {
        return part.wrong("type", "must be `text`");
    }
    let text = part.required_text("text")?;
    part.finish()?;
    Ok(text)
}

fn stop(fields: &mut Fields) -> Result<Vec<String>> {
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(stops)) if stops.len() <= 4 => stops
            .into_iter()
            .map(|stop| match stop {
                Value::String(stop) => Ok(stop),
                _ => fields.wrong("stop", "must be a string or a list of strings"),
            })
            .collect::<Result<_>>()?,
        Some(Value::Array(_)) => return fields.wrong("stop", "must have at most 4 strings"),
        Some(_) => return fields.wrong("stop", "must be a string or a list of strings"),
    };
    if stops.iter().any(String::is_empty) {
        return fields.wrong("stop", "must not hold an empty string");
    }
    Ok(stops)
}

#[cfg(test)]
mod tests;
