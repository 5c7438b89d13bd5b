//! OpenAI's request bodies, read into what was asked.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

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
    pub(super) min_p: f64,
    pub(super) presence_penalty: f64,
    pub(super) frequency_penalty: f64,
    /// Whether there are such tokens is the model's to say.
    pub(super) logit_bias: Vec<(u32, f32)>,
    pub(super) seed: Option<u64>,
    pub(super) stop: Vec<String>,
    pub(super) top_logprobs: Option<usize>,
    /// The JSON schema that the answer has to satisfy.
    pub(super) form: Option<Map<String, Value>>,
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
    let form = form(&mut fields)?;
    text_only(&mut fields)?;
    let top_logprobs = logprobs.then_some(top.unwrap_or(0));
    Ok(Asked { form, ..common(fields, Prompt::Chat(messages), top_logprobs, most)? })
}

/// The JSON schema that the answer has to satisfy, if any.
fn form(fields: &mut Fields) -> Result<Option<Map<String, Value>>> {
    let Some(format) = fields.take("response_format") else { return Ok(None) };
    let any_object = || Map::from_iter([("type".to_owned(), json!("object"))]);
    let mut format = Fields::within(format, "response_format")?;
    let form = match format.required_text("type")?.as_str() {
        "text" => None,
        "json_object" => Some(any_object()),
        "json_schema" => {
            let Some(named) = format.take("json_schema") else {
                return format.wrong("json_schema", "is required");
            };
            let mut named = Fields::within(named, "response_format.json_schema")?;
            let name = named.required_text("name")?;
            let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
            if !(1..=64).contains(&name.len()) || !plain {
                return named.wrong("name", "must be 1 to 64 letters, digits, underscores and dashes");
            }
            named.text("description")?;
            // Every schema is kept to strictly.
            named.truth("strict")?;
            let schema = match named.take("schema") {
                None => any_object(),
                Some(Value::Object(schema)) => schema,
                Some(_) => return named.wrong("schema", "must be an object"),
            };
            named.finish()?;
            Some(schema)
        }
        _ => return format.wrong("type", "must be one of text, json_object, json_schema"),
    };
    format.finish()?;
    Ok(form)
}

/// Tools, pictures and sounds are refused by name, unless none is asked for.
fn text_only(fields: &mut Fields) -> Result<()> {
    for tools in ["tools", "functions"] {
        fields.neutral(tools, |value| value.as_array().is_some_and(Vec::is_empty))?;
    }
    for choice in ["tool_choice", "function_call"] {
        fields.neutral(choice, |value| value == "none")?;
    }
    fields.neutral("parallel_tool_calls", Value::is_boolean)?;
    fields.neutral("modalities", |value| *value == json!(["text"]))?;
    fields.neutral("verbosity", |value| value == "medium")?;
    for beyond in ["audio", "prediction", "web_search_options", "reasoning_effort"] {
        fields.neutral(beyond, |_| false)?;
    }
    Ok(())
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
    // Drawing as many as are returned is what happens anyhow.
    let n = fields.get("n").cloned().unwrap_or(json!(1));
    fields.neutral("best_of", |value| *value == n)?;
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
            options.neutral("include_obfuscation", |value| *value == Value::Bool(false))?;
            options.finish()?;
            include
        }
    };
    // Every answer is kept, and prefixes are shared by their words.
    fields.neutral("store", Value::is_boolean)?;
    fields.short_text("prompt_cache_key", 512)?;
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
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0),
        top_k: fields.count("top_k", 0, MOST_TOKENS)?.unwrap_or(0),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        logit_bias: logit_bias(&mut fields)?,
        seed: fields.seed("seed")?,
        stop: stop(&mut fields)?,
        top_logprobs,
        form: None,
        user: user(&mut fields)?,
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

/// Who asks, under OpenAI's older name or its newer one.
fn user(fields: &mut Fields) -> Result<Option<String>> {
    let newer = fields.short_text("safety_identifier", 512)?;
    Ok(fields.short_text("user", 512)?.or(newer))
}

/// Token ids with what is added to their logits.
fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>> {
    const MOST: usize = 1024;
    let pairs = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(pairs)) => pairs,
        Some(_) => return fields.wrong("logit_bias", "must be an object of token ids with numbers"),
    };
    if pairs.len() > MOST {
        return fields.wrong("logit_bias", &format!("must have at most {MOST} pairs"));
    }
    let mut biases = Vec::new();
    for (key, bias) in &pairs {
        let path = format!("logit_bias.{key}");
        let Ok(token) = key.parse::<u32>() else {
            return fields.wrong(&path, "must have a token id as its key");
        };
        match bias.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => biases.push((token, bias as f32)),
            _ => return fields.wrong(&path, "must be a number between -100 and 100"),
        }
    }
    Ok(biases)
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
