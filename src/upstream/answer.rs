//! An upstream's answer, put together from one JSON body or from the chunks of a stream.

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};

use super::sse;

/// What of an answer is worth keeping.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// The upstream's own name of it.
    pub id: Option<String>,
    /// By their index.
    pub choices: BTreeMap<usize, Choice>,
    pub usage: Option<Usage>,
    /// The stream said `[DONE]`.
    pub done: bool,
    /// An error came in the place of an answer, or what came cannot be read.
    pub failed: bool,
}

/// One choice, as far as it has come.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Choice {
    pub text: String,
    pub finish_reason: Option<String>,
    /// Chunks that brought text: of most services one a token.
    pub pieces: usize,
}

/// Tokens, as the upstream counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub struct Usage {
    #[serde(default)]
    pub prompt_tokens: usize,
    #[serde(default)]
    pub completion_tokens: usize,
}

/// Choices of one answer, and bytes of their text, at most.
const CHOICES: usize = 128;
const TEXT: usize = 8 << 20;

#[derive(Deserialize)]
struct Wire {
    id: Option<String>,
    choices: Option<Vec<WireChoice>>,
    usage: Option<Usage>,
    error: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct WireChoice {
    index: Option<usize>,
    delta: Option<Piece>,
    message: Option<Piece>,
    text: Option<String>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Piece {
    content: Option<String>,
    refusal: Option<String>,
}

impl Answer {
    /// Reads a whole answer.
    pub fn whole(body: &[u8]) -> Self {
        let mut answer = Self::default();
        answer.take(body);
        answer
    }

    /// Takes the data of one event of a stream.
    pub fn event(&mut self, data: &[u8]) {
        match data.trim_ascii() {
            b"" => {}
            b"[DONE]" => self.done = true,
            data => self.take(data),
        }
    }

    /// Whether it is all there: every choice has ended, or the stream says so.
    pub fn is_complete(&self) -> bool {
        let ended = |choice: &Choice| choice.finish_reason.is_some();
        !self.failed && !self.choices.is_empty() && (self.done || self.choices.values().all(ended))
    }

    fn take(&mut self, json: &[u8]) {
        let Ok(wire) = serde_json::from_slice::<Wire>(json) else {
            self.failed = true;
            return;
        };
        self.failed |= wire.error.is_some();
        if self.id.is_none() {
            self.id = wire.id.filter(|id| !id.is_empty() && id.len() <= 256);
        }
        self.usage = wire.usage.or(self.usage);
        for (nth, more) in wire.choices.unwrap_or_default().into_iter().enumerate() {
            self.add(more.index.unwrap_or(nth), more);
        }
    }

    fn add(&mut self, index: usize, more: WireChoice) {
        if self.choices.len() >= CHOICES && !self.choices.contains_key(&index) {
            self.failed = true;
            return;
        }
        let kept: usize = self.choices.values().map(|choice| choice.text.len()).sum();
        let choice = self.choices.entry(index).or_default();
        let piece = more.delta.or(more.message);
        let content = piece.and_then(|piece| piece.content.or(piece.refusal));
        for text in [content, more.text].into_iter().flatten().filter(|text| !text.is_empty()) {
            if kept + text.len() > TEXT {
                self.failed = true;
                return;
            }
            choice.text.push_str(&text);
            choice.pieces += 1;
        }
        choice.finish_reason = more.finish_reason.or(choice.finish_reason.take());
    }
}

/// A stream that is read as it passes.
#[derive(Debug, Default)]
pub struct Reading {
    parser: sse::Parser,
    pub answer: Answer,
}

impl Reading {
    pub fn feed(&mut self, bytes: &[u8]) {
        let Self { parser, answer } = self;
        parser.feed(bytes, |data| answer.event(data));
        answer.failed |= parser.is_overflown();
    }

    /// The stream has ended.
    pub fn finish(&mut self) {
        let Self { parser, answer } = self;
        parser.finish(|data| answer.event(data));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streamed(stream: &str) -> Answer {
        let mut reading = Reading::default();
        for chunk in stream.as_bytes().chunks(7) {
            reading.feed(chunk);
        }
        reading.finish();
        reading.answer
    }

    fn texts(answer: &Answer) -> Vec<&str> {
        answer.choices.values().map(|choice| choice.text.as_str()).collect()
    }

    #[test]
    fn a_whole_answer() {
        let answer = Answer::whole(
            br#"{"id":"chatcmpl-1","object":"x","odd":[1],"choices":[
                {"index":1,"message":{"role":"assistant","content":"B"},"finish_reason":"length"},
                {"index":0,"message":{"role":"assistant","content":"A"},"finish_reason":"stop"}],
                "usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":null}}"#,
        );
        assert!(answer.is_complete());
        assert_eq!(texts(&answer), ["A", "B"]);
        assert_eq!(answer.choices[&1].finish_reason.as_deref(), Some("length"));
        assert_eq!(answer.usage, Some(Usage { prompt_tokens: 3, completion_tokens: 2 }));
        assert_eq!(answer.id.as_deref(), Some("chatcmpl-1"));
        assert_eq!(texts(&Answer::whole(br#"{"choices":[{"text":"T","finish_reason":"stop"}]}"#)), ["T"]);
    }

    #[test]
    fn a_stream_with_several_choices() {
        let chunk = |rest: &str| format!("data: {{\"id\":\"c\",\"choices\":[{rest}]}}\n\n");
        let mut stream =
            chunk(r#"{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}"#);
        for (index, text) in [(0, "Hé"), (1, "x"), (0, "llo"), (1, "y")] {
            stream += &chunk(&format!(r#"{{"index":{index},"delta":{{"content":"{text}"}}}}"#));
        }
        assert!(!streamed(&stream).is_complete());
        stream += &chunk(r#"{"index":0,"delta":{},"finish_reason":"stop"}"#);
        assert!(!streamed(&stream).is_complete());
        stream += &chunk(r#"{"index":1,"delta":{},"finish_reason":"stop"}"#);
        stream += "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4}}\n\n";
        let answer = streamed(&stream);
        assert!(answer.is_complete() && !answer.done);
        assert_eq!(texts(&answer), ["Héllo", "xy"]);
        assert_eq!(answer.choices[&0].pieces, 2);
        assert_eq!(answer.usage, Some(Usage { prompt_tokens: 9, completion_tokens: 4 }));
        assert!(streamed(&(stream + "data: [DONE]\n\n")).done);
    }

    #[test]
    fn what_is_no_answer() {
        assert!(Answer::whole(b"<html>").failed);
        assert!(Answer::whole(br#"{"error":{"message":"no"}}"#).failed);
        assert!(!Answer::whole(b"{}").is_complete());
        assert!(!streamed("data: [DONE]\n\n").is_complete());
        let cut = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
        assert!(!streamed(cut).is_complete());
        assert!(streamed(&format!("{cut}data: {{\"error\":{{}}}}\n\n")).failed);
        // A service that never says why it ended still says that it ended.
        assert!(streamed(&format!("{cut}data: [DONE]\n\n")).is_complete());
    }

    #[test]
    fn choices_are_bounded() {
        let choices: Vec<String> =
            (0..=CHOICES).map(|index| format!(r#"{{"index":{index},"text":"a"}}"#)).collect();
        let answer = Answer::whole(format!(r#"{{"choices":[{}]}}"#, choices.join(",")).as_bytes());
        assert!(answer.failed && answer.choices.len() == CHOICES);
        let long = format!(r#"{{"choices":[{{"index":0,"text":"{}"}}]}}"#, "a".repeat(TEXT / 2 + 1));
        let mut answer = Answer::whole(long.as_bytes());
        assert!(!answer.failed);
        answer.event(long.as_bytes());
        assert!(answer.failed && answer.choices[&0].text.len() < TEXT);
    }
}
