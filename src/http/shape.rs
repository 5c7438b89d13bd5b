//! The two shapes of OpenAI's answers: chat, and the older one of plain text.

use serde_json::{Value, json};

use crate::completion::{CompletionId, FinishReason};
use crate::policy::TokenLogprob;

/// Which of the two routes is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Text,
}

impl Shape {
    /// OpenTelemetry's `gen_ai.operation.name`.
    pub(super) fn operation(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Text => "text_completion",
        }
    }

    pub(super) fn object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion",
            Self::Text => "text_completion",
        }
    }

    pub(super) fn chunk_object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion.chunk",
            Self::Text => "text_completion",
        }
    }

    /// A choice of a whole answer.
    pub(super) fn choice(
        self,
        id: CompletionId,
        nth: usize,
        text: &str,
        logprobs: Option<&[TokenLogprob]>,
        end: FinishReason,
    ) -> Value {
        let mut choice = json!({
            "index": nth,
            "finish_reason": end.as_str(),
            "completion_id": id,
            "logprobs": self.logprobs(logprobs, 0),
        });
        match self {
            Self::Chat => {
                choice["message"] = json!({ "role": "assistant", "content": text, "refusal": null });
            }
            Self::Text => choice["text"] = json!(text),
        }
        choice
    }

    /// What a stream begins with.
    pub(super) fn opening(self) -> Option<Value> {
        match self {
            Self::Chat => Some(json!({ "delta": { "role": "assistant", "content": "" }, "logprobs": null })),
            Self::Text => None,
        }
    }

    /// The field that holds what was asked.
    pub(super) fn prompt_field(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Text => "prompt",
        }
    }

    /// More text; `offset` is where its first token stands in the answer, in characters.
    pub(super) fn delta(self, text: &str, logprobs: Option<&[TokenLogprob]>, offset: usize) -> Value {
        let logprobs = self.logprobs(logprobs, offset);
        match self {
            Self::Chat => json!({ "delta": { "content": text }, "logprobs": logprobs }),
            Self::Text => json!({ "text": text, "logprobs": logprobs }),
        }
    }

    /// The last chunk of a choice.
    pub(super) fn closing(self) -> Value {
        match self {
            Self::Chat => json!({ "delta": {}, "logprobs": null }),
            Self::Text => json!({ "text": "", "logprobs": null }),
        }
    }

    fn logprobs(self, logprobs: Option<&[TokenLogprob]>, offset: usize) -> Value {
        let Some(logprobs) = logprobs else { return Value::Null };
        match self {
            Self::Chat => {
                json!({ "content": logprobs.iter().map(chat_logprob).collect::<Vec<_>>(), "refusal": null })
            }
            Self::Text => text_logprobs(logprobs, offset),
        }
    }
}

/// How long a token is in [`text_logprobs`]' `text_offset`.
pub(super) fn characters(token: &TokenLogprob) -> usize {
    String::from_utf8_lossy(&token.bytes).chars().count()
}

fn chat_logprob(token: &TokenLogprob) -> Value {
    let one = |bytes: &[u8], logprob: f32| json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes });
    let mut value = one(&token.bytes, token.logprob);
    value["top_logprobs"] = token.top.iter().map(|(_, bytes, logprob)| one(bytes, *logprob)).collect();
    value
}

fn text_logprobs(logprobs: &[TokenLogprob], offset: usize) -> Value {
    let mut at = offset;
    let mut offsets = Vec::new();
    let mut tops = Vec::new();
    for token in logprobs {
        offsets.push(at);
        at += characters(token);
        let top: serde_json::Map<String, Value> = token
            .top
            .iter()
            .map(|(_, bytes, logprob)| (String::from_utf8_lossy(bytes).into_owned(), json!(logprob)))
            .collect();
        tops.push(Value::Object(top));
    }
    json!({
        "tokens": logprobs.iter().map(|token| String::from_utf8_lossy(&token.bytes)).collect::<Vec<_>>(),
        "token_logprobs": logprobs.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": tops,
        "text_offset": offsets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &[u8], top: &[(&str, f32)]) -> TokenLogprob {
        let top = top.iter().map(|(text, logprob)| (0, text.as_bytes().to_vec(), *logprob)).collect();
        TokenLogprob { token: 0, bytes: text.to_vec(), logprob: -0.5, top }
    }

    #[test]
    fn a_whole_choice() {
        let id = CompletionId::new();
        let chat = Shape::Chat.choice(id, 1, "Hi.", None, FinishReason::Stop);
        let message = json!({ "role": "assistant", "content": "Hi.", "refusal": null });
        let common = |last: (&str, Value)| {
            let mut choice =
                json!({ "index": 1, "finish_reason": "stop", "completion_id": id, "logprobs": null });
            choice[last.0] = last.1;
            choice
        };
        assert_eq!(chat, common(("message", message)));
        let text = Shape::Text.choice(id, 1, "Hi.", None, FinishReason::Stop);
        assert_eq!(text, common(("text", json!("Hi."))));
    }

    #[test]
    fn chat_logprobs() {
        let tokens = [token("é".as_bytes(), &[("é", -0.5), ("e", -1.5)]), token(&[0xf0, 0x9f], &[])];
        let delta = Shape::Chat.delta("é", Some(&tokens), 0);
        let one = |token: &str, bytes: &[u8], logprob: f32| json!({ "token": token, "logprob": logprob, "bytes": bytes });
        let mut first = one("é", &[0xc3, 0xa9], -0.5);
        first["top_logprobs"] = json!([one("é", &[0xc3, 0xa9], -0.5), one("e", b"e", -1.5)]);
        // Half a character is shown as what it is: bytes.
        let mut second = one("\u{fffd}", &[0xf0, 0x9f], -0.5);
        second["top_logprobs"] = json!([]);
        let logprobs = json!({ "content": [first, second], "refusal": null });
        assert_eq!(delta, json!({ "delta": { "content": "é" }, "logprobs": logprobs }));
    }

    #[test]
    fn text_logprobs_tell_where_they_stand() {
        let tokens = [token("né".as_bytes(), &[("né", -0.5)]), token(b" x", &[])];
        let delta = Shape::Text.delta("né x", Some(&tokens), 10);
        let logprobs = json!({
            "tokens": ["né", " x"],
            "token_logprobs": [-0.5, -0.5],
            "top_logprobs": [{ "né": -0.5 }, {}],
            "text_offset": [10, 12],
        });
        assert_eq!(delta, json!({ "text": "né x", "logprobs": logprobs }));
        assert_eq!(tokens.iter().map(characters).sum::<usize>(), 4);
    }

    #[test]
    fn streams_begin_and_end() {
        let opening = json!({ "delta": { "role": "assistant", "content": "" }, "logprobs": null });
        assert_eq!(Shape::Chat.opening(), Some(opening));
        assert_eq!(Shape::Text.opening(), None);
        assert_eq!(Shape::Chat.closing(), json!({ "delta": {}, "logprobs": null }));
        assert_eq!(Shape::Text.closing(), json!({ "text": "", "logprobs": null }));
    }
}
