//! A request that the upstream has answered, read as far as it can be kept. What we cannot read is no fault of its
//! sender: the upstream understood it.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::completion::{Message, Prompt, Risk, Role};
use crate::http::shape::Shape;

/// What of a request is kept.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    /// One, but for text completions with a list of prompts.
    pub(super) prompts: Vec<Prompt>,
    /// Choices of each prompt.
    pub(super) n: usize,
    pub(super) risk: Option<Risk>,
    pub(super) user: Option<String>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// `None` if there are no words in it.
pub(super) fn read(body: &[u8], shape: Shape) -> Option<Asked> {
    let Ok(Value::Object(fields)) = serde_json::from_slice(body) else { return None };
    let prompts = match shape {
        Shape::Chat => vec![Prompt::Chat(messages(fields.get("messages")?)?)],
        Shape::Text => texts(fields.get("prompt")?)?,
    };
    let metadata = tags(fields.get("metadata"));
    let risk = match metadata.get("risk").map(String::as_str) {
        Some("benign") => Some(Risk::Benign),
        Some("harmful") => Some(Risk::Harmful),
        _ => None,
    };
    Some(Asked {
        prompts,
        n: fields.get("n").and_then(Value::as_u64).map_or(1, |n| n.max(1) as usize),
        risk,
        user: fields.get("user").and_then(Value::as_str).map(|user| user.chars().take(512).collect()),
        metadata,
    })
}

/// Turns of people and model. Results of tools are left out: they are nobody's words.
fn messages(list: &Value) -> Option<Vec<Message>> {
    let mut messages = Vec::new();
    for message in list.as_array()? {
        let role = match message["role"].as_str() {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            _ => continue,
        };
        let content = match &message["content"] {
            Value::String(text) => text.clone(),
            Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
            _ => continue,
        };
        messages.push(Message { role, content });
    }
    (!messages.is_empty()).then_some(messages)
}

fn texts(prompt: &Value) -> Option<Vec<Prompt>> {
    match prompt {
        Value::String(text) => Some(vec![Prompt::Text(text.clone())]),
        Value::Array(list) if !list.is_empty() => {
            list.iter().map(|text| text.as_str().map(|text| Prompt::Text(text.to_owned()))).collect()
        }
        _ => None,
    }
}

/// Within the bounds that OpenAI sets.
fn tags(metadata: Option<&Value>) -> BTreeMap<String, String> {
    let pairs = metadata.and_then(Value::as_object).into_iter().flatten();
    pairs
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .filter(|(key, value)| key.chars().count() <= 64 && value.chars().count() <= 512)
        .take(16)
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chat(more: Value) -> Option<Asked> {
        let mut body = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
        if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
            body.extend(more);
        }
        read(body.to_string().as_bytes(), Shape::Chat)
    }

    #[test]
    fn words_are_kept_and_the_rest_is_not() {
        let messages = json!([
            { "role": "developer", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "What is " },
                { "type": "image_url", "image_url": { "url": "data:…" } }, { "type": "text", "text": "this?" }] },
            { "role": "assistant", "content": null, "tool_calls": [{}] },
            { "role": "tool", "content": "42", "tool_call_id": "x" },
            { "role": "assistant", "content": "A cat.", "odd": true },
        ]);
        let asked = chat(json!({ "messages": messages, "tools": [1], "n": 2 })).unwrap();
        let words = |prompt: &Prompt| match prompt {
            Prompt::Chat(messages) => {
                messages.iter().map(|message| message.content.clone()).collect::<Vec<_>>()
            }
            Prompt::Text(text) => vec![text.clone()],
        };
        assert_eq!(words(&asked.prompts[0]), ["Be brief.", "What is this?", "A cat."]);
        assert_eq!(asked.n, 2);
    }

    #[test]
    fn tags_of_the_wrong_kind_are_left_out() {
        let long = "x".repeat(600);
        let asked =
            chat(json!({ "metadata": { "risk": "harmful", "n": 3, "l": long }, "user": long })).unwrap();
        assert_eq!(asked.metadata.len(), 1);
        assert_eq!(asked.risk, Some(Risk::Harmful));
        assert_eq!(asked.user.unwrap().len(), 512);
        assert_eq!(chat(json!({ "metadata": "m", "user": 7, "n": "x" })).unwrap().n, 1);
    }

    #[test]
    fn texts_may_be_several() {
        let text = |prompt: Value| read(json!({ "prompt": prompt }).to_string().as_bytes(), Shape::Text);
        assert_eq!(text(json!(["a", "b"])).unwrap().prompts.len(), 2);
        assert_eq!(text(json!("a")).unwrap().prompts, [Prompt::Text("a".to_owned())]);
        for prompt in [json!([1, 2, 3]), json!([]), json!(null), json!(["a", 1])] {
            assert_eq!(text(prompt), None);
        }
        assert_eq!(chat(json!({ "messages": [{ "role": "tool", "content": "x" }] })), None);
        assert_eq!(read(b"[", Shape::Chat), None);
    }
}
