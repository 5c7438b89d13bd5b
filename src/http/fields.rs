//! Reads a JSON object field by field, so that every fault names its field and no field is ignored.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::error::ApiError;

/// An object whose fields are taken one by one; [`Fields::finish`] refuses what is left.
#[derive(Debug)]
pub(super) struct Fields {
    object: Map<String, Value>,
    /// Where the object stands, e.g. `messages[2].`.
    prefix: String,
}

type Result<T> = std::result::Result<T, ApiError>;

impl Fields {
    /// Parses a body.
    pub(super) fn parse(body: &[u8]) -> Result<Self> {
        let value = serde_json::from_slice(body)
            .or_else(|fault| serde_json::from_slice(&finite(body)).map_err(|_| fault))
            .map_err(ApiError::not_json)?;
        match value {
            Value::Object(object) => Ok(Self { object, prefix: String::new() }),
            _ => Err(ApiError::not_json("it is another kind of value")),
        }
    }

    /// An object within another.
    pub(super) fn within(value: Value, path: &str) -> Result<Self> {
        match value {
            Value::Object(object) => Ok(Self { object, prefix: format!("{path}.") }),
            _ => Err(ApiError::parameter(path, "must be an object")),
        }
    }

    pub(super) fn path(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    pub(super) fn wrong<T>(&self, field: &str, why: &str) -> Result<T> {
        Err(ApiError::parameter(&self.path(field), why))
    }

    /// The field's value; `null` counts as absent, as OpenAI has it.
    pub(super) fn take(&mut self, field: &str) -> Option<Value> {
        self.object.remove(field).filter(|value| !value.is_null())
    }

    /// The field's value as it stands, which is still to be taken.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// Gives a field a value that its writer may not give.
    pub(super) fn set(&mut self, field: &str, value: Value) -> Result<()> {
        match self.object.insert(field.to_owned(), value) {
            Some(_) => self.wrong(field, "must be absent"),
            None => Ok(()),
        }
    }

    pub(super) fn text(&mut self, field: &str) -> Result<Option<String>> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => self.wrong(field, "must be a string"),
        }
    }

    pub(super) fn short_text(&mut self, field: &str, most: usize) -> Result<Option<String>> {
        let text = self.text(field)?;
        if text.as_ref().is_some_and(|text| text.chars().count() > most) {
            return self.wrong(field, &format!("must have at most {most} characters"));
        }
        Ok(text)
    }

    pub(super) fn required_text(&mut self, field: &str) -> Result<String> {
        match self.text(field)? {
            Some(text) => Ok(text),
            None => self.wrong(field, "is required"),
        }
    }

    pub(super) fn truth(&mut self, field: &str) -> Result<bool> {
        match self.take(field) {
            None => Ok(false),
            Some(Value::Bool(truth)) => Ok(truth),
            Some(_) => self.wrong(field, "must be true or false"),
        }
    }

    pub(super) fn number(&mut self, field: &str, least: f64, most: f64) -> Result<Option<f64>> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_f64() {
                Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
                _ => self.wrong(field, &format!("must be between {least} and {most}")),
            },
            Some(_) => self.wrong(field, "must be a number"),
        }
    }

    pub(super) fn count(&mut self, field: &str, least: u64, most: u64) -> Result<Option<usize>> {
        match self.take(field) {
            None => Ok(None),
            Some(value) if value.is_number() => match value.as_u64() {
                Some(count) if (least..=most).contains(&count) => Ok(Some(count as usize)),
                _ => self.wrong(field, &format!("must be a whole number between {least} and {most}")),
            },
            Some(_) => self.wrong(field, "must be a whole number"),
        }
    }

    /// Any whole number, negative ones too.
    pub(super) fn seed(&mut self, field: &str) -> Result<Option<u64>> {
        match self.take(field) {
            None => Ok(None),
            Some(value) => match (value.as_u64(), value.as_i64()) {
                (Some(seed), _) => Ok(Some(seed)),
                (None, Some(seed)) => Ok(Some(seed as u64)),
                (None, None) => self.wrong(field, "must be a whole number"),
            },
        }
    }

    pub(super) fn list(&mut self, field: &str) -> Result<Option<Vec<Value>>> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => self.wrong(field, "must be a list"),
        }
    }

    /// A text of 1 to `most` characters that something is known by.
    pub(super) fn name(&mut self, field: &str, most: usize) -> Result<Option<String>> {
        let name = self.short_text(field, most)?;
        if name.as_ref().is_some_and(String::is_empty) {
            return self.wrong(field, "must not be empty");
        }
        Ok(name)
    }

    /// A flat object of strings, as `metadata` and `tags` are.
    pub(super) fn tags(&mut self, field: &str) -> Result<BTreeMap<String, String>> {
        let pairs = match self.take(field) {
            None => return Ok(BTreeMap::new()),
            Some(Value::Object(pairs)) => pairs,
            Some(_) => return self.wrong(field, "must be an object of strings"),
        };
        if pairs.len() > 16 {
            return self.wrong(field, "must have at most 16 pairs");
        }
        let mut tags = BTreeMap::new();
        for (key, value) in pairs {
            let path = format!("{field}.{key}");
            let Value::String(value) = value else { return self.wrong(&path, "must be a string") };
            if key.chars().count() > 64 || value.chars().count() > 512 {
                return self
                    .wrong(&path, "must have a key of at most 64 and a value of at most 512 characters");
            }
            tags.insert(key, value);
        }
        Ok(tags)
    }

    /// A parameter of OpenAI's that is accepted only where it asks for nothing.
    pub(super) fn neutral(&mut self, field: &str, neutral: impl Fn(&Value) -> bool) -> Result<()> {
        match self.take(field) {
            Some(value) if !neutral(&value) => Err(ApiError::unsupported(&self.path(field))),
            _ => Ok(()),
        }
    }

    /// Refuses the first field that nobody took.
    pub(super) fn finish(self) -> Result<()> {
        match self.object.iter().find(|(_, value)| !value.is_null()) {
            Some((field, _)) => Err(ApiError::unknown_parameter(&self.path(field))),
            None => Ok(()),
        }
    }
}

/// Replaces what JSON has no number for (`NaN`, `Infinity`, `1e999`, which some clients write) by an object, which no
/// field takes: the fault then names its field instead of a place in the text.
fn finite(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len());
    let (mut at, mut quoted) = (0, false);
    while at < body.len() {
        let word = body[at..]
            .iter()
            .take_while(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte))
            .count();
        let number = str::from_utf8(&body[at..at + word]).ok().and_then(|word| word.parse::<f64>().ok());
        if !quoted && number.is_some_and(|number| !number.is_finite()) {
            out.extend_from_slice(br#"{"not finite":0}"#);
            at += word;
            continue;
        }
        // A word, an escape within a string, or a single byte.
        let step = if quoted && body[at] == b'\\' { 2 } else { word.max(1) }.min(body.len() - at);
        quoted ^= body[at] == b'"';
        out.extend_from_slice(&body[at..at + step]);
        at += step;
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check_param(error: &ApiError, param: &str) {
        assert_eq!(error.body()["error"]["param"], param);
    }

    #[test]
    fn a_number_that_is_none_names_its_field() {
        for word in ["NaN", "-Infinity", "Infinity", "1e999"] {
            let body = format!(r#"{{"comment":"NaN \"NaN","value":{word}}}"#);
            let mut fields = Fields::parse(body.as_bytes()).unwrap();
            assert_eq!(fields.text("comment").unwrap().unwrap(), r#"NaN "NaN"#);
            check_param(&fields.number("value", 0.0, 1.0).unwrap_err(), "value");
        }
        // No string either.
        check_param(&Fields::parse(br#"{"user":NaN}"#).unwrap().text("user").unwrap_err(), "user");
    }

    #[test]
    fn what_is_no_object_is_refused() {
        let deep = "[".repeat(100_000);
        for body in
            ["", "{", "[]", "null", "7", "NaN,", "{\"a\":1}}", "{\"a\":\"\\", "{'a':1}", deep.as_str()]
        {
            assert_eq!(
                Fields::parse(body.as_bytes()).unwrap_err().body()["error"]["code"],
                "invalid_json",
                "{body:.20}"
            );
        }
        Fields::parse(b"{\"a\":\"\xff\"}").unwrap_err();
    }

    #[test]
    fn nothing_is_left_over() {
        let parse = || Fields::parse(br#"{"a":1,"b":null,"t":{"k":"v"}}"#).unwrap();
        check_param(&parse().finish().unwrap_err(), "a");
        let mut fields = parse();
        assert_eq!(fields.count("a", 0, 5).unwrap(), Some(1));
        assert_eq!(json!(fields.tags("t").unwrap()), json!({ "k": "v" }));
        fields.finish().unwrap();
    }

    #[test]
    fn limits_are_part_of_the_range() {
        #[track_caller]
        fn check(value: &str, taken: bool) {
            let body = format!(r#"{{"a":{value},"b":{value}}}"#);
            let mut fields = Fields::parse(body.as_bytes()).unwrap();
            assert_eq!(fields.count("a", 1, 5).is_ok(), taken, "{value}");
            assert_eq!(fields.number("b", 1.0, 5.0).is_ok(), taken, "{value}");
        }
        check("1", true);
        check("5", true);
        check("0", false);
        check("6", false);
        check("-1", false);
        check("99999999999999999999", false);
        check("\"3\"", false);
        check("true", false);
        check("[3]", false);
    }
}
