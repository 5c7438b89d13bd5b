//! JSON lines in and out; `-` is the terminal's own stream.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Write},
};

use chrono::DateTime;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use crate::completion::Timestamp;
use crate::learn::Measures;

use super::Error;

/// An object with the number of its line.
pub(crate) type Line = (usize, Map<String, Value>);

/// All lines of a file that are not blank, with their numbers.
///
/// # Errors
/// The file cannot be read; the message has the line's number.
pub(crate) fn lines(path: &str) -> Result<Vec<(usize, String)>, Error> {
    let reader: Box<dyn BufRead> = if path == "-" {
        Box::new(io::stdin().lock())
    } else {
        Box::new(BufReader::new(File::open(path).map_err(|error| format!("{path}: {error}"))?))
    };
    let mut lines = Vec::new();
    for (index, line) in reader.lines().enumerate() {
        let line = line.map_err(|error| format!("{path}: line {}: {error}", index + 1))?;
        if line.trim().is_empty() {
            continue;
        }
        lines.push((index + 1, line));
    }
    Ok(lines)
}

/// All objects of a file.
///
/// # Errors
/// The file cannot be read, or a line is no JSON object; the message has its number.
pub(crate) fn read(path: &str) -> Result<Vec<Line>, Error> {
    let object = |(number, line): (usize, String)| {
        let object =
            serde_json::from_str(&line).map_err(|error| format!("{path}: line {number}: {error}"))?;
        Ok((number, object))
    };
    lines(path)?.into_iter().map(object).collect()
}

/// A time for people: to the second, in UTC.
pub(crate) fn time(at: Timestamp) -> String {
    let time = i64::try_from(at.0).ok().and_then(DateTime::from_timestamp_millis).unwrap_or_default();
    time.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// Where lines go.
///
/// # Errors
/// The file cannot be made.
pub(crate) fn writer(path: &str) -> Result<Box<dyn Write>, Error> {
    if path == "-" {
        return Ok(Box::new(BufWriter::new(io::stdout().lock())));
    }
    Ok(Box::new(BufWriter::new(File::create(path).map_err(|error| format!("{path}: {error}"))?)))
}

/// A string field of a line.
///
/// # Errors
/// It is missing or no string; the message has the line's number and the field's name.
pub(crate) fn text<'a>(line: usize, object: &'a Map<String, Value>, field: &str) -> Result<&'a str, Error> {
    match object.get(field) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("line {line}: `{field}` must be a string").into()),
        None => Err(format!("line {line}: `{field}` is missing").into()),
    }
}

/// A bar on stderr, which shows itself on terminals only.
pub(crate) fn bar(length: u64, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template("{msg:24} {bar:30} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

/// Shows the share that is done of a stage of training, and its measures, on a [`bar`] of a thousand.
pub(crate) fn advance(bar: &ProgressBar, stage: &str, done: f64, measures: Measures<'_>) {
    bar.set_position((done * 1000.0) as u64);
    let measures: Vec<String> = measures.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
    bar.set_message(format!("{stage} {}", measures.join(" ")));
}
