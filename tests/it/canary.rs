//! A proven candidate on a share of the users: who gets it, what their word does, what a restart keeps.

use std::collections::BTreeMap;

use gyrostat::{completion::Timestamp, config::Config};
use serde_json::{Value, json};

use super::harness::{Running, chat, start, start_with};
use super::updates::stage;

/// A gate that everything passes, and a canary on half of the users.
pub(crate) fn lenient(config: &mut Config) {
    config.gate.win_rate = -1.0;
    config.gate.other_win_rate = -1.0;
    config.gate.refusal_margin = 1.0;
    config.gate.kl_budget = 1e9;
    config.gate.surprise = 1e9;
    config.gate.length_ratio = (0.0, 1e9);
    config.gate.perplexity_ratio = 1e9;
    config.gate.judge_accuracy = 0.0;
    config.canary.share = 0.5;
    config.canary.samples = 60;
    config.canary.margin = 0.3;
    config.canary.days = 1e6;
}

impl Running {
    /// An answer for a user: its id, and the version that gave it.
    async fn answered(&self, user: &str) -> (String, String) {
        let mut body = chat("advice", 3);
        body["user"] = json!(user);
        let reply = self.client.post(self.url("/v1/chat/completions")).json(&body).send().await.unwrap();
        let version = reply.headers()["x-gyrostat-version"].to_str().unwrap().to_owned();
        let body: Value = reply.json().await.unwrap();
        (body["id"].as_str().unwrap().to_owned(), version)
    }

    /// Which version each of so many users gets.
    async fn shared_out(&self, users: usize) -> BTreeMap<String, String> {
        let mut versions = BTreeMap::new();
        for user in (0..users).map(|nth| format!("u{nth}")) {
            versions.insert(user.clone(), self.answered(&user).await.1);
        }
        versions
    }

    /// Learns until a candidate is on trial; the path of its update.
    async fn on_trial(&self) -> String {
        for seed in 0..30 {
            self.judged("advice", seed, if seed % 3 == 0 { "down" } else { "up" }).await;
        }
        let update = self.post("/v1/updates", &json!({ "recipe": "ppo" })).await.1;
        let path = format!("/v1/updates/{}", update["id"].as_str().unwrap());
        self.wait(&path, |body| {
            assert_ne!(body["state"], "ended", "{body}");
            (body["stage"] == "canary").then_some(())
        })
        .await;
        path
    }

    /// New users judge until the update has ended: those of `liked` are content, the others are not.
    async fn until_ruled(&self, path: &str, liked: &str) -> Value {
        for nth in 0..200 {
            let (id, version) = self.answered(&format!("judge-{nth}")).await;
            let thumb = if version == liked { "up" } else { "down" };
            let body = json!({ "kind": "thumbs", "value": thumb, "completion_id": id });
            assert_eq!(self.post("/v1/feedback", &body).await.0, 201);
            tokio::time::sleep(std::time::Duration::from_millis(25)).await;
            let update = self.get(path).await;
            if update["state"] == "ended" {
                return update;
            }
        }
        panic!("no ruling: {}", self.get(path).await)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_candidate_that_users_like_better_is_promoted() {
    let running = start_with(lenient).await;
    let path = running.on_trial().await;
    let versions = running.get("/v1/versions").await;
    assert_eq!((&versions["active"], &versions["data"][0]["state"]), (&json!(0), &json!("canary")));
    let ended = running.until_ruled(&path, "v1").await;
    assert_eq!((&ended["outcome"], &ended["version"]), (&json!("promoted"), &json!(1)), "{ended}");
    let course = &ended["canary"];
    assert!(course["safe_log10"].as_f64().unwrap() >= course["needed_log10"].as_f64().unwrap(), "{course}");
    assert_eq!(course["measures"][0]["candidate"]["mean"], 1.0, "{course}");
    assert!(ended["proof"]["checks"].as_array().unwrap().len() >= 8, "{ended}");
    assert!(running.shared_out(8).await.values().all(|version| version == "v1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_candidate_that_users_like_less_is_rolled_back_after_a_restart() {
    let running = start_with(lenient).await;
    let path = running.on_trial().await;
    let before = running.shared_out(40).await;
    let tried = before.values().filter(|version| *version == "v1").count();
    assert!((10..=30).contains(&tried), "half of the users are to get it, not {tried} of 40");
    let running = running.restart_with(lenient).await;
    assert_eq!(running.shared_out(40).await, before, "a user stays with his version");
    assert_eq!(running.post("/v1/updates", &json!({})).await.0, 409, "one update runs at a time");
    let ended = running.until_ruled(&path, "v0").await;
    assert_eq!(ended["outcome"], "rolled_back", "{ended}");
    assert!(ended["reason"].as_str().unwrap().starts_with("worse: satisfaction 0.000"), "{ended}");
    assert!(running.shared_out(8).await.values().all(|version| version == "v0"));
    let versions = running.get("/v1/versions").await;
    assert_eq!(versions["data"][0]["state"], "rejected");
    assert_eq!(running.post("/v1/versions/v1/promote", &json!({})).await.0, 409);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_can_be_cancelled() {
    let running = start_with(lenient).await;
    let path = running.on_trial().await;
    running.client.delete(running.url(&path)).send().await.unwrap();
    let ended = running.wait(&path, |body| (body["state"] == "ended").then(|| body.clone())).await;
    assert_eq!(ended["outcome"], "cancelled", "{ended}");
    assert!(running.shared_out(8).await.values().all(|version| version == "v0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn too_little_traffic_has_no_canary() {
    let few = |config: &mut Config| {
        lenient(config);
        config.canary.days = 0.1;
    };
    let running = start_with(few).await;
    for seed in 0..30 {
        running.judged("advice", seed, "up").await;
    }
    let update = running.post("/v1/updates", &json!({ "recipe": "ppo" })).await.1;
    let path = format!("/v1/updates/{}", update["id"].as_str().unwrap());
    let ended = running.wait(&path, |body| (body["state"] == "ended").then(|| body.clone())).await;
    assert_eq!(ended["outcome"], "promoted", "{ended}");
    assert!(ended["canary"]["ruling"].as_str().unwrap().starts_with("none: 30 judgements a day"), "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_by_hand_ends_the_trial() {
    let running = start().await;
    let (one, two) = (stage(&running, 1), stage(&running, 2));
    let registry = &running.app.state.registry;
    registry.begin_trial(one, 0.5, Timestamp(1)).unwrap();
    let tried = running.shared_out(20).await.values().filter(|version| *version == "v1").count();
    assert!((3..=17).contains(&tried), "{tried} of 20");
    assert_eq!(super::updates::promote(&running, two).await, 200);
    assert!(running.shared_out(20).await.values().all(|version| version == "v2"));
}
