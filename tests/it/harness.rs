//! A sidecar on a free port over a scratch directory.

use std::{path::Path, time::Duration};

use gyrostat::{app::App, config::Config, policy::write_tiny};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) struct Running {
    pub(crate) app: App,
    pub(crate) client: reqwest::Client,
    pub(crate) dir: TempDir,
}

/// A configuration that is quick on the tiny model.
pub(crate) fn config(dir: &Path) -> Config {
    let mut config = Config::default();
    config.http.bind = "127.0.0.1:0".parse().unwrap();
    config.store.path = dir.join("data");
    config.policy.model = dir.join("tiny").to_str().unwrap().to_owned();
    // A reading of the KL now and then would make the number of readings depend on timing.
    config.policy.kl_one_in = 0;
    config.drift.reference = 30;
    config.drift.events_per_day = Some(1000.0);
    config.cycle.tick_ms = 20;
    config.learn.ppo.iterations = 1;
    config.learn.ppo.episodes = 4;
    config.learn.ppo.response_length = 8;
    config.learn.pace.give_way_ms = 1;
    config
}

pub(crate) async fn start() -> Running {
    start_with(|_| {}).await
}

pub(crate) async fn start_with(change: impl FnOnce(&mut Config)) -> Running {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(&dir.path().join("tiny"), 0).unwrap();
    let mut config = config(dir.path());
    change(&mut config);
    Running { app: App::start(config).await.unwrap(), client: reqwest::Client::new(), dir }
}

impl Running {
    /// Stops it and starts another on the same data.
    pub(crate) async fn restart(self) -> Self {
        self.restart_with(|_| {}).await
    }

    pub(crate) async fn restart_with(self, change: impl FnOnce(&mut Config)) -> Self {
        let Self { app, client, dir } = self;
        app.stop(Duration::from_secs(5)).await;
        let mut config = config(dir.path());
        change(&mut config);
        Self { app: App::start(config).await.unwrap(), client, dir }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.app.address)
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        self.client.get(self.url(path)).send().await.unwrap().json().await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let reply = self.client.post(self.url(path)).json(body).send().await.unwrap();
        (reply.status().as_u16(), reply.json().await.unwrap())
    }

    /// A short answer's id and text.
    pub(crate) async fn chat(&self, interaction: &str, seed: u64) -> (String, String) {
        let (status, body) = self.post("/v1/chat/completions", &chat(interaction, seed)).await;
        assert_eq!(status, 200, "{body}");
        let text = body["choices"][0]["message"]["content"].as_str().unwrap();
        (body["id"].as_str().unwrap().to_owned(), text.to_owned())
    }

    /// A thumb on a fresh answer; its status.
    pub(crate) async fn judged(&self, interaction: &str, seed: u64, thumb: &str) -> u16 {
        let (id, _) = self.chat(interaction, seed).await;
        let body =
            json!({ "kind": "thumbs", "value": thumb, "completion_id": id, "rater": format!("r{seed}") });
        self.post("/v1/feedback", &body).await.0
    }

    /// Asks until `wanted` is found in the answer, at most for half a minute.
    pub(crate) async fn wait<T>(&self, path: &str, wanted: impl Fn(&Value) -> Option<T>) -> T {
        for _ in 0..600 {
            let body = self.get(path).await;
            if let Some(found) = wanted(&body) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{path} never showed it: {}", self.get(path).await)
    }
}

pub(crate) fn chat(interaction: &str, seed: u64) -> Value {
    json!({
        "model": "default",
        "messages": [{ "role": "user", "content": format!("question {}", seed % 40) }],
        "max_tokens": 8,
        "seed": seed,
        "metadata": { "interaction": interaction },
    })
}
