//! Feedback over HTTP: every kind, keys sent many times, what is counted.

use serde_json::{Value, json};

use super::harness::{Running, start};

impl Running {
    async fn judge(&self, body: Value) -> (u16, Value) {
        self.post("/v1/feedback", &body).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_is_taken() {
    let running = start().await;
    let id = running.chat("chat", 1).await.0;
    let judgements = [
        ("thumbs", json!("up")),
        ("thumbs", json!("down")),
        ("rating", json!(1)),
        ("rating", json!(5)),
        ("demonstration", json!("Rhine, Seine, Po.")),
        ("flag", json!("wrongful_refusal")),
        ("flag", json!("harmful")),
        ("flag", json!("incorrect")),
        ("flag", json!("other")),
        ("behaviour", json!("copied")),
        ("behaviour", json!("regenerated")),
        ("behaviour", json!("edited")),
        ("behaviour", json!("abandoned")),
    ];
    for (kind, value) in judgements {
        let body = json!({ "kind": kind, "value": value, "completion_id": id, "rater": "ann", "tags": { "a": "b" } });
        let (status, answer) = running.judge(body).await;
        assert_eq!(status, 201, "{kind}: {answer}");
        assert!(answer["id"].is_string());
    }
    assert_eq!(running.metric(r#"gyrostat_feedback_total{kind="flag",source="human"}"#).await, 4);
    assert_eq!(running.metric(r#"gyrostat_feedback_total{kind="thumbs",source="human"}"#).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_are_compared_without_a_completion() {
    let running = start().await;
    for prompt in [json!("Which?"), json!([{ "role": "user", "content": "Which?" }])] {
        let texts =
            json!({ "kind": "comparison", "prompt": prompt, "chosen": "a", "rejected": "b", "source": "ai" });
        assert_eq!(running.judge(texts).await.0, 201);
    }
    assert_eq!(running.metric(r#"gyrostat_feedback_total{kind="comparison",source="ai"}"#).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_sent_many_times_at_once_counts_once() {
    let running = start().await;
    let id = running.chat("chat", 1).await.0;
    let body = json!({ "kind": "rating", "value": 4, "completion_id": id, "idempotency_key": "once" });
    let answers = futures_util::future::join_all((0..20).map(|_| running.judge(body.clone()))).await;
    assert_eq!(answers.iter().filter(|(status, _)| *status == 201).count(), 1, "{answers:?}");
    assert!(answers.iter().all(|(_, answer)| *answer == answers[0].1), "{answers:?}");
    assert_eq!(running.metric(r#"gyrostat_feedback_total{kind="rating",source="human"}"#).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_score_keeps_the_id_that_it_was_given() {
    let running = start().await;
    let id = running.chat("chat", 1).await.0;
    let score = json!({ "id": "s1", "traceId": id, "name": "quality", "value": 1, "dataType": "BOOLEAN" });
    for _ in 0..2 {
        assert_eq!(running.posted("/api/public/scores", &score).await["id"], "s1");
    }
    assert_eq!(running.metric(r#"gyrostat_feedback_total{kind="thumbs",source="human"}"#).await, 1);
}
