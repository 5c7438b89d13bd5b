//! Feedback is durable, idempotent and tied to what it judges.

use serde_json::json;

use super::harness::{start, start_with};

#[tokio::test(flavor = "multi_thread")]
async fn a_judgement_is_kept_once_and_over_a_restart() {
    let running = start().await;
    let (id, _) = running.chat("chat", 1).await;
    let body = json!({ "kind": "rating", "value": 2, "completion_id": id, "idempotency_key": "k1" });
    let (status, first) = running.post("/v1/feedback", &body).await;
    assert_eq!(status, 201);
    assert_eq!(running.post("/v1/feedback", &body).await, (200, first.clone()));
    let running = running.restart().await;
    assert_eq!(running.post("/v1/feedback", &body).await, (200, first));
    let thumb = json!({ "kind": "thumbs", "value": "up", "completion_id": id });
    assert_eq!(running.post("/v1/feedback", &thumb).await.0, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn comparisons_need_one_prompt() {
    let running = start().await;
    let (a, b) = (running.chat("chat", 1).await.0, running.chat("chat", 41).await.0);
    let other = running.chat("chat", 2).await.0;
    let body = |chosen: &str, rejected: &str| json!({ "kind": "comparison", "chosen": chosen, "rejected": rejected });
    assert_eq!(running.post("/v1/feedback", &body(&a, &b)).await.0, 201);
    let (status, error) = running.post("/v1/feedback", &body(&a, &other)).await;
    assert_eq!((status, &error["error"]["param"]), (422, &json!("rejected")));
}

#[tokio::test(flavor = "multi_thread")]
async fn other_tools_shapes_are_taken() {
    let running = start().await;
    let (id, _) = running.chat("chat", 1).await;
    let tensorzero = json!({ "metric_name": "accepted", "inference_id": id, "value": true });
    let (status, body) = running.post("/feedback", &tensorzero).await;
    assert!(status == 200 && body["feedback_id"].is_string(), "{body}");
    let langfuse = json!({ "traceId": id, "name": "quality", "value": 0.5, "dataType": "NUMERIC" });
    assert_eq!(running.post("/api/public/scores", &langfuse).await.0, 200);
    let helicone = format!("/v1/request/{id}/feedback");
    assert_eq!(running.post(&helicone, &json!({ "rating": false })).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_open_what_they_are_for() {
    let keys = r#"[{"key":"c","scopes":["chat"]},{"key":"a","scopes":["admin"]}]"#;
    let running = start_with(|config| config.http.keys = serde_json::from_str(keys).unwrap()).await;
    let status = async |path: &str, key: &str| {
        let request = running.client.get(running.url(path)).bearer_auth(key);
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(status("/v1/models", "c").await, 200);
    assert_eq!(status("/v1/models", "a").await, 403);
    assert_eq!(status("/v1/models", "x").await, 401);
    assert_eq!(status("/v1/alignment", "a").await, 200);
    assert_eq!(status("/healthz", "").await, 200);
}
