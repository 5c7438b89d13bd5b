//! What has to be known of a request before it is passed on, and the one value in it that may be replaced.

use std::ops::Range;

use serde::Deserialize;
use serde_json::value::RawValue;

/// The fields of a request's body that decide where it goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Head {
    pub model: Option<String>,
    /// Where the value of `model` stands in the body, quotes included.
    place: Range<usize>,
    /// Choices; 1 where the body says nothing sensible.
    pub n: usize,
}

#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    n: Option<&'a RawValue>,
}

/// Choices that get an id before they are there.
const CHOICES: usize = 128;

impl Head {
    /// `None` for a body that is no JSON object, or names a field twice: the upstream has to say what it thinks of it.
    pub fn read(body: &[u8]) -> Option<Self> {
        let wire: Wire<'_> = serde_json::from_slice(body).ok()?;
        let n = wire.n.and_then(|n| n.get().parse().ok()).unwrap_or(1);
        let n = if (1..=CHOICES).contains(&n) { n } else { 1 };
        let Some(raw) = wire.model else { return Some(Self { n, ..Self::default() }) };
        let start = raw.get().as_ptr().addr() - body.as_ptr().addr();
        let place = start..start + raw.get().len();
        Some(Self { model: serde_json::from_str(raw.get()).ok(), place, n })
    }

    /// The body with another model's name and every other byte as it was.
    pub fn with_model(&self, body: &[u8], model: &str) -> Vec<u8> {
        let name = serde_json::Value::from(model).to_string();
        let mut changed = Vec::with_capacity(body.len() + name.len());
        changed.extend_from_slice(&body[..self.place.start]);
        changed.extend_from_slice(name.as_bytes());
        changed.extend_from_slice(&body[self.place.end..]);
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(body: &str, model: Option<&str>, n: usize, changed: &str) {
        let head = Head::read(body.as_bytes()).unwrap();
        assert_eq!((head.model.as_deref(), head.n), (model, n), "{body}");
        if model.is_some() {
            assert_eq!(String::from_utf8(head.with_model(body.as_bytes(), "new")).unwrap(), changed);
        }
    }

    #[test]
    fn one_value_is_replaced() {
        check(
            r#"{ "messages":[{"model":"in"}],  "model" : "old" ,"é":1e3,"n":3}"#,
            Some("old"),
            3,
            r#"{ "messages":[{"model":"in"}],  "model" : "new" ,"é":1e3,"n":3}"#,
        );
        check(r#"{"mod\u0065l":"a\"\\b"}"#, Some("a\"\\b"), 1, r#"{"mod\u0065l":"new"}"#);
        check(r#"{"n":0}"#, None, 1, "");
        check(r#"{"n":1000000000}"#, None, 1, "");
        check(r#"{"n":"many","model":7}"#, None, 1, "");
        check(r#"{"model":null}"#, None, 1, "");
        let quoted = Head::read(br#"{"model":"a"}"#).unwrap().with_model(br#"{"model":"a"}"#, "q\"é");
        assert_eq!(String::from_utf8(quoted).unwrap(), r#"{"model":"q\"é"}"#);
    }

    #[test]
    fn what_is_not_read_is_left_alone() {
        for body in ["", "[]", "{", "7", r#"{"model":"a","model":"b"}"#, "\u{feff}{}"] {
            assert_eq!(Head::read(body.as_bytes()), None, "{body}");
        }
        assert_eq!(Head::read(b"{\"model\":\"\xff\"}").and_then(|head| head.model), None);
    }
}
