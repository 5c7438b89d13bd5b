//! Alarms to a webhook, as Prometheus' Alertmanager sends them (payload version 4): whatever takes its calls takes ours.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use prometheus::{IntCounterVec, Opts, Registry as Prometheus};
use reqwest::{Client, Url};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::warn;
use uuid::Uuid;

use crate::completion::{Alarm, InteractionType, Timestamp};
use crate::store::{self, Store};

use super::Error;

/// Between two looks at the store.
const PAUSE: Duration = Duration::from_secs(2);
/// A receiver that does not answer is asked again after twice as long, up to this.
const LONGEST_PAUSE: Duration = Duration::from_mins(5);
/// How long a receiver may take.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Alarms that are looked at; what is older and was never taken is given up.
const NEWEST: usize = 256;

/// Sends each alarm once it is in the store, and once more as resolved when somebody has acknowledged it.
pub(super) struct Webhook {
    client: Client,
    url: Url,
    store: Arc<Store>,
    sent: IntCounterVec,
}

/// What the receiver knows; kept in the store, so that a restart neither repeats nor forgets an alarm.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Memory {
    newest: Uuid,
    firing: BTreeSet<Uuid>,
}

/// What it has to be told.
#[derive(Debug, Default, PartialEq)]
struct News {
    firing: Vec<Alarm>,
    resolved: Vec<Alarm>,
}

impl Webhook {
    pub(super) fn new(url: &str, store: Arc<Store>, metrics: &Prometheus) -> Result<Self, Error> {
        let url = Url::parse(url).map_err(|why| Error::Webhook(why.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(Error::Webhook("it must begin with http:// or https://".to_owned()));
        }
        let client = Client::builder().timeout(ANSWER_TIME).build();
        let client = client.map_err(|why| Error::Webhook(why.to_string()))?;
        let help = "Calls of the webhook for alarms, by how they ended.";
        let sent = IntCounterVec::new(Opts::new("gyrostat_webhook_calls_total", help), &["outcome"])?;
        metrics.register(Box::new(sent.clone()))?;
        for outcome in ["taken", "failed"] {
            sent.with_label_values(&[outcome]);
        }
        Ok(Self { client, url, store, sent })
    }

    /// Goes on until it is aborted.
    pub(super) async fn follow(self) {
        let mut pause = PAUSE;
        loop {
            tokio::time::sleep(pause).await;
            match self.turn().await {
                Ok(()) => pause = PAUSE,
                Err(why) => {
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    warn!(
                        why,
                        seconds = pause.as_secs(),
                        "the webhook did not take an alarm; it is called again"
                    );
                }
            }
        }
    }

    async fn turn(&self) -> Result<(), String> {
        let (mut memory, alarms) = self.look().map_err(|fault| fault.to_string())?;
        let news = memory.news(&alarms);
        if news == News::default() {
            return Ok(());
        }
        let called = self.client.post(self.url.clone()).json(&payload(&news, super::now())).send().await;
        let taken = called.and_then(reqwest::Response::error_for_status);
        self.sent.with_label_values(&[if taken.is_ok() { "taken" } else { "failed" }]).inc();
        // Without the address: it may hold a secret.
        taken.map_err(|why| why.without_url().to_string())?;
        memory.told(&news);
        let store = Arc::clone(&self.store);
        let kept =
            tokio::task::spawn_blocking(move || store.put_blob(MEMORY, json!(memory).to_string().as_bytes()));
        kept.await.map_err(|fault| fault.to_string())?.map_err(|fault| fault.to_string())
    }

    fn look(&self) -> Result<(Memory, Vec<Alarm>), store::Error> {
        let memory = self.store.blob(MEMORY)?.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok((memory.unwrap_or_default(), self.store.alarms(NEWEST)?))
    }
}

const MEMORY: &str = "webhook";

impl Memory {
    fn news(&self, alarms: &[Alarm]) -> News {
        let oldest_first = || alarms.iter().rev();
        let new = |alarm: &&Alarm| alarm.id > self.newest && !alarm.acknowledged;
        let over = |alarm: &&Alarm| alarm.acknowledged && self.firing.contains(&alarm.id);
        News {
            firing: oldest_first().filter(new).cloned().collect(),
            resolved: oldest_first().filter(over).cloned().collect(),
        }
    }

    fn told(&mut self, news: &News) {
        for alarm in &news.firing {
            self.newest = self.newest.max(alarm.id);
            self.firing.insert(alarm.id);
        }
        for alarm in &news.resolved {
            self.firing.remove(&alarm.id);
        }
    }
}

fn payload(news: &News, now: Timestamp) -> Value {
    let alerts: Vec<Value> = news
        .firing
        .iter()
        .map(|alarm| alert(alarm, None))
        .chain(news.resolved.iter().map(|alarm| alert(alarm, Some(now))))
        .collect();
    json!({
        "version": "4",
        "groupKey": "{}:{alertname=\"GyrostatDrift\"}",
        "truncatedAlerts": 0,
        "status": if news.firing.is_empty() { "resolved" } else { "firing" },
        "receiver": "gyrostat",
        "groupLabels": { "alertname": "GyrostatDrift" },
        "commonLabels": { "alertname": "GyrostatDrift", "severity": "warning" },
        "commonAnnotations": {},
        "externalURL": "",
        "alerts": alerts,
    })
}

/// No words of users: labels, numbers and times.
fn alert(alarm: &Alarm, resolved: Option<Timestamp>) -> Value {
    let signal = alarm.signal.as_str();
    let interaction = alarm.interaction.as_ref().map_or(InteractionType::ALL, InteractionType::as_str);
    let direction = alarm.direction.as_str();
    let shares: Vec<String> = alarm
        .shares
        .iter()
        .map(|share| format!("{} {:.0} %", share.interaction.as_str(), 100.0 * share.share))
        .collect();
    let description = format!(
        "Likeliest since {}, plausibly between {} and {}. Evidence 10^{:.1}, threshold 10^{:.1}. Share of the change: {}.",
        time(alarm.change_at),
        time(alarm.change_from),
        time(alarm.change_to),
        alarm.evidence_log10,
        alarm.threshold_log10,
        shares.join(", "),
    );
    json!({
        "status": if resolved.is_some() { "resolved" } else { "firing" },
        "labels": {
            "alertname": "GyrostatDrift",
            "severity": "warning",
            "signal": signal,
            "interaction": interaction,
            "direction": direction,
            "cause": alarm.cause.as_str(),
            "version": alarm.version.to_string(),
        },
        "annotations": { "summary": alarm.summary(), "description": description },
        "startsAt": time(alarm.at),
        // Alertmanager's own word for "not yet".
        "endsAt": resolved.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), time),
        "generatorURL": "",
        "fingerprint": alarm.id.simple().to_string(),
    })
}

fn time(at: Timestamp) -> String {
    let time = i64::try_from(at.0).ok().and_then(chrono::DateTime::from_timestamp_millis);
    time.unwrap_or_default().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::completion::{Cause, Direction, Share, SignalKind, Version};

    fn alarm() -> Alarm {
        Alarm {
            id: Uuid::now_v7(),
            at: Timestamp(1_790_856_000_000),
            signal: SignalKind::Satisfaction,
            interaction: None,
            version: Version(2),
            direction: Direction::Down,
            cause: Cause::Traffic,
            baseline: 0.9,
            current: 0.5,
            evidence_log10: 5.5,
            threshold_log10: 5.3,
            strict_log10: None,
            change_at: Timestamp(1_790_855_000_000),
            change_from: Timestamp(1_790_854_000_000),
            change_to: Timestamp(1_790_855_500_000),
            samples_since_change: 40,
            shares: vec![Share { interaction: InteractionType::other(), share: 1.0 }],
            examples: Vec::new(),
            acknowledged: false,
        }
    }

    #[test]
    fn an_alarm_is_told_once_and_once_more_when_it_is_over() {
        let (old, mut new) = (alarm(), alarm());
        let mut memory = Memory::default();
        let news = memory.news(std::slice::from_ref(&old));
        assert_eq!(news.firing.len(), 1);
        memory.told(&news);
        // Newest first, as the store lists them.
        let news = memory.news(&[new.clone(), old.clone()]);
        assert_eq!(news.firing, [new.clone()]);
        memory.told(&news);
        assert_eq!(memory.news(&[new.clone(), old.clone()]), News::default());
        new.acknowledged = true;
        let news = memory.news(&[new.clone(), old.clone()]);
        assert_eq!((news.firing.len(), &news.resolved), (0, &vec![new.clone()]));
        memory.told(&news);
        assert_eq!(memory.news(&[new, old]), News::default());
    }

    #[test]
    fn the_payload_has_alertmanagers_fields() {
        let news = News { firing: vec![alarm()], resolved: vec![alarm()] };
        let body = payload(&news, Timestamp(1_790_857_000_000));
        assert_eq!((&body["version"], &body["status"]), (&json!("4"), &json!("firing")));
        let [firing, resolved] = body["alerts"].as_array().unwrap().as_slice() else { panic!("{body}") };
        assert_eq!(firing["labels"]["signal"], "satisfaction");
        assert_eq!(firing["startsAt"], "2026-10-01T12:00:00.000Z");
        assert_eq!(firing["endsAt"], "0001-01-01T00:00:00Z");
        assert_eq!(resolved["endsAt"], "2026-10-01T12:16:40.000Z");
        assert_eq!(resolved["status"], "resolved");
    }
}
