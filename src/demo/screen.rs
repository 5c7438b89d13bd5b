//! What the demo shows: lines on stdout, bars on stderr where that is a terminal.

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

#[derive(Debug)]
pub(super) struct Screen {
    started: Instant,
}

/// Measures of a step, in the order in which they are shown.
const SHOWN: [(&str, &str); 8] = [
    ("reward/accuracy", "reward accuracy (held back)"),
    ("objective/scores", "reward"),
    ("objective/kl", "KL"),
    ("objective/surprise", "surprise"),
    ("objective/entropy", "entropy"),
    ("policy/clipfrac_avg", "clipped"),
    ("loss/policy_avg", "policy loss"),
    ("loss/value_avg", "value loss"),
];

impl Screen {
    pub(super) fn new(started: Instant) -> Self {
        Self { started }
    }

    pub(super) fn seconds(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    pub(super) fn title(&self, text: &str) {
        self.say("");
        self.say(text);
    }

    /// A line with the seconds since the start; a closed stdout is no reason to stop.
    pub(super) fn say(&self, text: &str) {
        let line =
            if text.is_empty() { "\n".to_owned() } else { format!("[{:>4} s] {text}\n", self.seconds()) };
        let _closed = io::stdout().write_all(line.as_bytes());
    }

    pub(super) fn bar(what: &str, length: u64) -> ProgressBar {
        let bar = ProgressBar::new(length);
        if let Ok(style) = ProgressStyle::with_template("{msg:10} {bar:40} {pos}/{len} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }

    pub(super) fn scorecard(&self, rows: &[Value]) {
        self.say("signal        interaction  baseline  current  evidence/threshold (log10)  state");
        for row in rows {
            let number =
                |field: &str| row[field].as_f64().map_or("-".to_owned(), |value| format!("{value:.2}"));
            self.say(&format!(
                "{:13} {:12} {:>8} {:>8}  {:>9} / {:<14}  {}",
                row["signal"].as_str().unwrap_or_default(),
                row["interaction"].as_str().unwrap_or("all"),
                number("baseline"),
                number("current"),
                number("evidence_log10"),
                number("threshold_log10"),
                row["state"].as_str().unwrap_or_default(),
            ));
        }
    }

    pub(super) fn alarm(&self, alarm: &Value) {
        let number = |field: &str| alarm[field].as_f64().unwrap_or_default();
        let ago = |field: &str| (number("at") - number(field)) / 1000.0;
        self.say(&format!(
            "ALARM: {}. Evidence 10^{:.1} against 10^{:.1}",
            alarm["summary"].as_str().unwrap_or_default(),
            number("evidence_log10"),
            number("threshold_log10"),
        ));
        self.say(&format!(
            "       since {:.0} s ago ({} answers), plausibly between {:.0} and {:.0} s ago",
            ago("change_at"),
            alarm["samples_since_change"],
            ago("change_from"),
            ago("change_to"),
        ));
    }

    /// A line for each new set of measures.
    pub(super) fn measures(&self, shown: &mut Value, update: &Value) {
        if update["measures"] == *shown {
            return;
        }
        shown.clone_from(&update["measures"]);
        let parts: Vec<String> = SHOWN
            .iter()
            .filter_map(|(name, label)| Some(format!("{label} {:.3}", update["measures"][*name].as_f64()?)))
            .collect();
        if !parts.is_empty() {
            self.say(&format!("{:6} {}", update["stage"].as_str().unwrap_or_default(), parts.join(" · ")));
        }
    }

    pub(super) fn verdict(&self, update: &Value) {
        self.say(&format!("gate: {}", update["outcome"].as_str().unwrap_or_default()));
        for reason in update["reasons"].as_array().into_iter().flatten() {
            self.say(&format!("      {}", reason.as_str().unwrap_or_default()));
        }
        if let Some(ruling) = update["canary"]["ruling"].as_str() {
            self.say(&format!("canary: {ruling}"));
        }
    }

    pub(super) fn swap(&self, update: &Value, versions: &[Value]) {
        let version = &update["version"];
        let record = versions.iter().find(|record| record["version"] == *version);
        let note = record.and_then(|record| record["note"].as_str()).unwrap_or_default();
        for reason in note.split("; ") {
            self.say(&format!("      {reason}"));
        }
        self.say(&format!("swap: version {version} serves; requests under way ended on the old one"));
    }
}
