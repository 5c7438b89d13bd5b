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
                choice["message"] = json!({ "role": "assistant", "content": text, "refusal": null })
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

    /// More text; `offset` is where it stands in the answer, in characters.
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
        at += String::from_utf8_lossy(&token.bytes).chars().count();
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
