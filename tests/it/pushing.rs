//! Versions that an upstream serves: pushed before they are promoted, used by new requests, taken back.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use gyrostat::completion::{Outcome, UpdateState, Version};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::harness::Running;
use super::stub::{Stub, before, json_answer, said, upstream};
use super::updates::{promote, stage};

const CHAT: &str = "/v1/chat/completions";

/// What a service like vLLM keeps of its adapters.
#[derive(Default)]
struct Loaded {
    names: BTreeSet<String>,
    /// Every name that was ever loaded.
    ever: Vec<String>,
    /// The status of the next attempts to load.
    refuse: Option<u16>,
}

/// A service that loads adapters. It answers with the model's name, and holds requests with `"hold": true` back.
async fn vllm() -> (Stub, Arc<Mutex<Loaded>>, Arc<Semaphore>) {
    let (loaded, held) = (Arc::new(Mutex::new(Loaded::default())), Arc::new(Semaphore::new(0)));
    let (state, gate) = (Arc::clone(&loaded), Arc::clone(&held));
    let stub = upstream(move |seen| {
        let (state, gate) = (Arc::clone(&state), Arc::clone(&gate));
        async move {
            let body: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
            let name = body["lora_name"].as_str().unwrap_or_default().to_owned();
            let error =
                |status: u16, words: String| json_answer(status, &json!({ "error": { "message": words } }));
            match seen.path.as_str() {
                "/v1/load_lora_adapter" => {
                    let mut state = state.lock().unwrap();
                    if let Some(status) = state.refuse {
                        return error(status, "Not Found".to_owned());
                    }
                    let path = std::path::Path::new(body["lora_path"].as_str().unwrap());
                    assert!(path.is_absolute() && path.join("adapter_model.safetensors").exists());
                    if !state.names.insert(name.clone()) {
                        return error(400, format!("The lora adapter '{name}' has already been loaded."));
                    }
                    state.ever.push(name);
                    json_answer(200, &json!("Success"))
                }
                "/v1/unload_lora_adapter" => {
                    let known = state.lock().unwrap().names.remove(&name);
                    json_answer(if known { 200 } else { 404 }, &json!({}))
                }
                _ => {
                    let model = body["model"].as_str().unwrap().to_owned();
                    if model != "base" && !state.lock().unwrap().names.contains(&model) {
                        return error(404, format!("The model `{model}` does not exist."));
                    }
                    if body["hold"] == true {
                        gate.acquire().await.unwrap().forget();
                    }
                    let still = model == "base" || state.lock().unwrap().names.contains(&model);
                    json_answer(200, &said("id", &format!("{model} {still}")))
                }
            }
        }
    })
    .await;
    (stub, loaded, held)
}

/// The version that answered, and what it said.
async fn asked(running: &Running, more: Value) -> (String, String) {
    let mut body = json!({ "model": "base", "messages": [{ "role": "user", "content": "?" }] });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = running.client.post(running.url(CHAT)).json(&body).send().await.unwrap();
    let version = answer.headers()["x-gyrostat-version"].to_str().unwrap().to_owned();
    let body: Value = answer.json().await.unwrap();
    (version, body["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned())
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..200 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never: {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_version_is_pushed_and_answers_new_requests() {
    let (stub, loaded, held) = vllm().await;
    let running = Arc::new(before(&stub, |_| {}).await);
    let versions: Vec<Version> = (1..=3).map(|seed| stage(&running, seed)).collect();
    assert_eq!(asked(&running, json!({})).await, ("v0".to_owned(), "base true".to_owned()));

    assert_eq!(promote(&running, versions[0]).await, 200);
    let (version, first) = asked(&running, json!({})).await;
    assert!(version == "v1" && first.starts_with("gyrostat-v1-") && first.ends_with(" true"), "{first}");

    let before = stub.seen().len();
    // A request under way ends on the version that it began with, whatever is promoted meanwhile.
    let slow = tokio::spawn({
        let running = Arc::clone(&running);
        async move { asked(&running, json!({ "hold": true })).await }
    });
    eventually("the request arrives", || stub.seen().len() > before).await;
    for version in [versions[1], versions[2]] {
        assert_eq!(promote(&running, version).await, 200);
    }
    assert_eq!(asked(&running, json!({ "model": "default" })).await.0, "v3");
    held.add_permits(1);
    assert_eq!(slow.await.unwrap(), ("v1".to_owned(), first));
    // Then nobody needs it; the one before the served one stays for a roll-back.
    eventually("v1 is unloaded", || loaded.lock().unwrap().names.len() == 2).await;
    assert!(loaded.lock().unwrap().names.iter().all(|name| !name.starts_with("gyrostat-v1-")));
    assert_eq!(loaded.lock().unwrap().ever.len(), 3, "no name is loaded twice");

    assert_eq!(promote(&running, versions[1]).await, 200);
    assert_eq!(loaded.lock().unwrap().ever.len(), 3, "a roll-back loads nothing");
    assert_eq!(asked(&running, json!({})).await.0, "v2");
    assert_eq!(promote(&running, Version(0)).await, 200);
    assert_eq!(asked(&running, json!({})).await.1, "base true");
    running.recorded().await;
    let kept = running.app.state.store.completions(..).map(|kept| kept.unwrap().version.0);
    assert_eq!(kept.collect::<Vec<_>>(), [0, 1, 1, 3, 2, 0], "in the order in which they were asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_push_leaves_what_is_served() {
    let (stub, loaded, _held) = vllm().await;
    let running = before(&stub, |_| {}).await;
    let version = stage(&running, 1);
    for (status, words, outcome) in
        [(500, "refused", "failed"), (404, "does not load adapters", "unsupported")]
    {
        loaded.lock().unwrap().refuse = Some(status);
        let (answered, body) = running.post(&format!("/v1/versions/{version}/promote"), &json!({})).await;
        assert_eq!(answered, 502);
        assert!(body["error"]["message"].as_str().unwrap().contains(words), "{body}");
        assert_eq!(running.get("/v1/versions").await["active"], 0);
        assert_eq!(asked(&running, json!({})).await.0, "v0");
        let series = format!(r#"gyrostat_upstream_pushes_total{{outcome="{outcome}"}}"#);
        assert_eq!(running.metric(&series).await, 1, "{outcome}");
    }
    loaded.lock().unwrap().refuse = None;
    assert_eq!(promote(&running, version).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_the_upstream_has_lost_is_pushed_again() {
    let (stub, loaded, _held) = vllm().await;
    let running = before(&stub, |_| {}).await;
    let version = stage(&running, 1);
    assert_eq!(promote(&running, version).await, 200);
    loaded.lock().unwrap().names.clear();
    let answers = (0..8).map(|_| asked(&running, json!({})));
    for (version, text) in futures_util::future::join_all(answers).await {
        assert!(version == "v1" && text.starts_with("gyrostat-v1-"), "{version} {text}");
    }
    // So is one that was served before our own restart.
    loaded.lock().unwrap().names.clear();
    let Running { app, client, dir } = running;
    app.stop(Duration::from_secs(5)).await;
    let mut config = super::harness::config(dir.path());
    config.policy.model = "default".to_owned();
    config.upstream.url = Some(stub.url());
    let app = gyrostat::app::App::start(config).await.unwrap();
    let running = Running { app, client, dir };
    running.wait("/readyz", |body| (body["status"] == "ok").then_some(())).await;
    assert_eq!(asked(&running, json!({})).await.0, "v1");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_ends_after_the_gate_where_versions_cannot_be_pushed() {
    let (stub, _loaded, _held) = vllm().await;
    let running = before(&stub, |config| {
        config.policy.model = config.store.path.parent().unwrap().join("tiny").to_str().unwrap().to_owned();
        config.upstream.adapters = gyrostat::upstream::Adapters::None;
        // The gate is opened: a tiny random model proves nothing.
        config.gate.win_rate = -1.0;
        config.gate.other_win_rate = 0.0;
        config.gate.refusal_margin = 1.0;
        config.gate.kl_budget = 1000.0;
        config.gate.surprise = 1000.0;
        config.gate.length_ratio = (0.0, 1000.0);
        config.gate.perplexity_ratio = 1000.0;
    })
    .await;
    for nth in 0..24 {
        let body = json!({ "model": "base", "messages": [{ "role": "user", "content": format!("question {nth}") }] });
        let answer = running.client.post(running.url(CHAT)).json(&body).send().await.unwrap();
        let id = answer.headers()["x-gyrostat-completion"].to_str().unwrap().to_owned();
        answer.bytes().await.unwrap();
        let shown = json!({ "kind": "demonstration", "value": "Certainly.", "completion_id": id });
        assert_eq!(running.post("/v1/feedback", &shown).await.0, 201);
    }
    let (status, update) = running.post("/v1/updates", &json!({ "recipe": "sft" })).await;
    assert_eq!(status, 202, "{update}");
    let path = format!("/v1/updates/{}", update["id"].as_str().unwrap());
    let ended = running.wait(&path, |body| (body["state"] == "ended").then(|| body.clone())).await;
    assert_eq!((&ended["outcome"], &ended["version"]), (&json!("withheld"), &json!(1)), "{ended}");
    assert!(ended["reason"].as_str().unwrap().contains("does not load adapters"), "{ended}");
    let stored = running.app.state.store.updates(1).unwrap().remove(0);
    assert!(matches!(stored.state, UpdateState::Ended { outcome: Outcome::Withheld { .. }, .. }));
    assert_eq!(running.get("/v1/versions").await["active"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_on_trial_is_pushed_to_a_share_of_the_users_and_taken_back() {
    let (stub, loaded, _) = vllm().await;
    let running = Arc::new(before(&stub, |_| {}).await);
    let version = stage(&running, 1);
    let registry = Arc::clone(&running.app.state.registry);
    let begin = Arc::clone(&registry);
    let at = gyrostat::completion::Timestamp(1);
    tokio::task::spawn_blocking(move || begin.begin_trial(version, 0.5, at).unwrap()).await.unwrap();
    let mut tried = 0;
    for user in 0..20 {
        let who = json!({ "user": format!("u{user}") });
        let (version, said) = asked(&running, who.clone()).await;
        assert_eq!(version == "v1", said.starts_with("gyrostat-v1-"), "{version} {said}");
        assert_eq!(asked(&running, who).await.0, version, "a user stays with his version");
        tried += usize::from(version == "v1");
    }
    assert!((3..=17).contains(&tried), "{tried} of 20");
    tokio::task::spawn_blocking(move || registry.end_trial().unwrap()).await.unwrap();
    assert_eq!(asked(&running, json!({ "user": "u0" })).await.0, "v0");
    eventually("it is unloaded", || loaded.lock().unwrap().names.is_empty()).await;
}
