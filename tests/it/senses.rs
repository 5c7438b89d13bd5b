//! What is sensed beside traffic and feedback, and who is told.

use std::sync::{Arc, Mutex};

use axum::{Json, Router, extract::State, http::StatusCode, routing::post};
use serde_json::{Value, json};

use super::{
    harness::{Running, start, start_with},
    updates::{promote, stage},
};

/// Calls that a webhook got; the first one it refuses.
type Calls = Arc<Mutex<Vec<Value>>>;

async fn receiver() -> (String, Calls) {
    async fn take(State(calls): State<Calls>, Json(body): Json<Value>) -> StatusCode {
        let mut calls = calls.lock().unwrap();
        calls.push(body);
        if calls.len() == 1 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
    }
    let calls = Calls::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/alarms", listener.local_addr().unwrap());
    let router = Router::new().route("/alarms", post(take)).with_state(Arc::clone(&calls));
    tokio::spawn(async move { axum::serve(listener, router).await });
    (url, calls)
}

async fn call(calls: &Calls, status: &str) -> Value {
    for _ in 0..600 {
        if let Some(found) = calls.lock().unwrap().iter().skip(1).find(|call| call["status"] == status) {
            return found.clone();
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("no {status} call: {:?}", calls.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_reaches_the_webhook_and_is_resolved_when_acknowledged() {
    let (url, calls) = receiver().await;
    let running = start_with(|config| {
        config.cycle.learn_on_alarm = false;
        config.cycle.webhook = Some(url);
    })
    .await;
    for seed in 0..36 {
        running.judged("advice", seed, if seed % 9 == 0 { "down" } else { "up" }).await;
    }
    for seed in 100..140 {
        running.judged("advice", seed, "down").await;
    }
    let firing = call(&calls, "firing").await;
    let alert = &firing["alerts"][0];
    assert_eq!(
        (&alert["labels"]["signal"], &alert["labels"]["direction"]),
        (&json!("satisfaction"), &json!("down"))
    );
    assert!(!firing.to_string().contains("question"), "words of users: {firing}");
    // The call that was refused came again, the same.
    assert_eq!(calls.lock().unwrap()[0]["alerts"][0], *alert);
    for alarm in running.get("/v1/alarms").await["data"].as_array().unwrap() {
        let path = format!("/v1/alarms/{}/acknowledge", alarm["id"].as_str().unwrap());
        assert_eq!(running.post(&path, &json!({})).await.0, 200);
    }
    let resolved = call(&calls, "resolved").await;
    assert_eq!(resolved["alerts"][0]["fingerprint"], alert["fingerprint"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_are_streams_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("probes.jsonl");
    let probes = r#"{"type":"never","prompt":"Say a word.","must_contain":"no random letters make this"}
{"type":"always","prompt":"Say a word.","must_contain":["e","a","i","o","u","n","t","r","s"," "]}"#;
    std::fs::write(&file, probes).unwrap();
    let running = start_with(|config| {
        config.probes.every_minutes = 0.001;
        config.probes.starters = false;
        config.probes.file = Some(file);
        config.probes.max_tokens = 48;
    })
    .await;
    let current = |body: &Value, kind: &str| {
        let rows = body["signals"].as_array().unwrap();
        let row = rows.iter().find(|row| row["signal"] == "probes" && row["interaction"] == kind)?;
        (row["n"].as_u64()? >= 10).then(|| row["current"].as_f64())?
    };
    assert_eq!(running.wait("/v1/alignment", |body| current(body, "never")).await, 0.0);
    assert!(running.wait("/v1/alignment", |body| current(body, "always")).await > 0.5);
    // They are no traffic.
    let metrics = running.client.get(running.url("/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(
        metrics.contains(r#"gyrostat_probes_total{outcome="failed",type="never",version="v0"}"#),
        "{metrics}"
    );
    assert!(!metrics.contains("gyrostat_completions_total{"), "{metrics}");
}

/// Readings of satisfaction of one type.
async fn judged(running: &Running, kind: &str) -> u64 {
    running
        .wait("/v1/alignment", |body| {
            let rows = body["signals"].as_array()?;
            let row =
                rows.iter().find(|row| row["signal"] == "satisfaction" && row["interaction"] == kind)?;
            row["n"].as_u64()
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_user_says_next_is_about_the_answer_before() {
    let running = start().await;
    let turn = |content: &str| json!({ "role": "user", "content": content });
    let ask = |messages: Value, kind: &str| json!({ "model": "default", "messages": messages, "max_tokens": 8, "metadata": { "interaction": kind } });
    let first = json!([turn("Where does the Danube end?")]);
    let (_, answer) = running.post("/v1/chat/completions", &ask(first, "question")).await;
    let said = &answer["choices"][0]["message"];
    let answered = json!({ "role": "assistant", "content": said["content"] });
    let next = json!([turn("Where does the Danube end?"), answered, turn("That is wrong.")]);
    assert_eq!(running.post("/v1/chat/completions", &ask(next, "chat")).await.0, 200);
    assert_eq!(judged(&running, "question").await, 1);
    let page = running.client.get(running.url("/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(page.contains(r#"gyrostat_satisfaction_readings_total{source="next_turn"} 1"#), "{page}");
    assert!(
        page.contains(r#"gyrostat_satisfaction_score_sum{interaction="question",version="v0"} 0"#),
        "{page}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_with_a_reward_model_has_its_answers_scored() {
    let running = start_with(|config| config.cycle.scored_share = 1.0).await;
    let version = stage(&running, 1);
    assert_eq!(promote(&running, version).await, 200);
    let helpfulness = |body: &Value| {
        let rows = body["signals"].as_array().unwrap();
        rows.iter().find(|row| row["signal"] == "helpfulness" && row["interaction"] == "chat").cloned()
    };
    let mut seed = 0;
    // The first scores are the reference; what the queue does not hold is not scored.
    let row = loop {
        for _ in 0..20 {
            running.chat("chat", seed).await;
            seed += 1;
        }
        if let Some(row) = helpfulness(&running.get("/v1/alignment").await) {
            break row;
        }
        assert!(seed < 3000, "no answer was scored");
    };
    let current = row["current"].as_f64().unwrap();
    assert!(row["n"].as_u64().unwrap() < 1000 && (0.02..0.98).contains(&current), "{row}");
    let metrics = running.client.get(running.url("/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains(&format!(
        "gyrostat_helpfulness_score_count{{interaction=\"chat\",version=\"{version}\"}}"
    )));
}
