//! Requests that nobody should send: each gets a 4xx that names its fault, and the process lives.

use serde_json::{Value, json};

use super::harness::{Running, start};

/// Values of every type, most of which are wrong for any one field.
fn wrong_values() -> Vec<Value> {
    vec![json!({ "a": 1 }), json!([[]]), json!(true), json!("wrong"), json!(-7.5), json!(1e300)]
}

/// Fields of a chat request, each with the values that are right for it although they are among the wrong ones.
const CHAT_FIELDS: [(&str, &[usize]); 25] = [
    ("model", &[]),
    ("messages", &[]),
    ("stream", &[2]),
    ("stream_options", &[]),
    ("n", &[]),
    ("max_tokens", &[]),
    ("max_completion_tokens", &[]),
    ("temperature", &[]),
    ("top_p", &[]),
    ("top_k", &[]),
    ("min_p", &[]),
    ("seed", &[]),
    ("stop", &[3]),
    ("logprobs", &[2]),
    ("top_logprobs", &[]),
    ("user", &[3]),
    ("metadata", &[]),
    ("presence_penalty", &[]),
    ("frequency_penalty", &[]),
    ("logit_bias", &[]),
    ("response_format", &[]),
    ("tools", &[]),
    ("tool_choice", &[]),
    ("service_tier", &[]),
    ("invented_parameter", &[]),
];

async fn refused(running: &Running, path: &str, body: Vec<u8>, field: &str) {
    let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
    let reply = running.client.post(running.url(path)).body(body).send().await.unwrap();
    let status = reply.status().as_u16();
    assert!((400..500).contains(&status), "{path} answered {status} to {shown}");
    let error = reply.json::<Value>().await.unwrap()["error"].take();
    let named = error["param"].as_str().unwrap_or_default();
    let message = error["message"].as_str().unwrap();
    assert!(named.starts_with(field) || message.contains(field), "{shown}: {error} does not name {field}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_malformed_requests_are_refused() {
    let running = start().await;
    let mut sent = 0;
    for (field, right) in CHAT_FIELDS {
        for (at, value) in wrong_values().into_iter().enumerate().filter(|(at, _)| !right.contains(at)) {
            let mut body = json!({ "model": "default", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 2 });
            body[field] = value;
            assert!(at < 6);
            refused(&running, "/v1/chat/completions", body.to_string().into_bytes(), field).await;
            sent += 1;
        }
    }
    let (id, _) = running.chat("chat", 1).await;
    for field in
        ["kind", "value", "completion_id", "rater", "source", "comment", "idempotency_key", "tags", "colour"]
    {
        for value in wrong_values() {
            let text = value == json!("wrong");
            if text && ["rater", "comment", "idempotency_key"].contains(&field) {
                continue;
            }
            let mut body = json!({ "kind": "thumbs", "value": "up", "completion_id": id });
            body[field] = value;
            // A completion that does not exist is named by what is missing.
            let field = if text && field == "completion_id" { "completion" } else { field };
            refused(&running, "/v1/feedback", body.to_string().into_bytes(), field).await;
            sent += 1;
        }
    }
    sent += raw_bodies(&running).await;
    assert!(sent >= 200, "{sent}");
    assert_eq!(running.get("/healthz").await["status"], "ok");
    assert!(!running.chat("chat", 2).await.1.is_empty());
}

/// Bodies that are no requests at all, on every route that takes one.
async fn raw_bodies(running: &Running) -> usize {
    let long = format!("{{\"prompt\":\"{}\"}}", "x".repeat(2 << 20));
    let deep = "[".repeat(50_000);
    let bodies: [(&[u8], &str); 8] = [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "JSON"),
        (b"nonsense", "JSON"),
        (b"{\"a\":\xff\xfe}", "JSON"),
        (b"{\"model\":\"default\",\"messages\":[{\"ro", "JSON"),
        (deep.as_bytes(), "JSON"),
        (long.as_bytes(), "larger"),
    ];
    let routes =
        ["/v1/chat/completions", "/v1/completions", "/v1/feedback", "/feedback", "/api/public/scores"];
    for route in routes {
        for (body, word) in bodies {
            refused(running, route, body.to_vec(), word).await;
        }
    }
    let unknown = "0190a0b0-0000-7000-8000-000000000001";
    for route in ["alarms/X/acknowledge", "versions/X/promote", "versions/99/promote"] {
        let route = format!("/v1/{}", route.replace('X', unknown));
        refused(running, &route, b"{}".to_vec(), "there is no").await;
    }
    for body in [r#"{"recipe":"magic"}"#, r#"{"recipe":7}"#, r#"{"recipes":"ppo"}"#] {
        refused(running, "/v1/updates", body.as_bytes().to_vec(), "recipe").await;
    }
    refused(running, "/v1/baseline", br#"{"signal":"joy"}"#.to_vec(), "signal").await;
    refused(running, "/v1/baseline", br#"{"interaction":"Not A Type"}"#.to_vec(), "interaction").await;
    refused(running, "/v1/nowhere", b"{}".to_vec(), "route").await;
    refused(running, "/v1/models", b"{}".to_vec(), "method").await;
    let model = json!({ "model": "gpt-9", "messages": [{ "role": "user", "content": "hi" }] });
    refused(running, "/v1/chat/completions", model.to_string().into_bytes(), "model").await;
    let context = json!({ "model": "default", "prompt": "x".repeat(600), "max_tokens": 9 });
    refused(running, "/v1/completions", context.to_string().into_bytes(), "context").await;
    routes.len() * bodies.len() + 12
}
