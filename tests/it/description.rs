//! `/openapi.json` against what is answered: nothing missing, nothing more.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{
    harness::{Running, chat, start},
    openai::asked,
};

/// The description of one running server, closed: an object may have no field that it does not name.
pub(crate) struct Description {
    document: Value,
    checked: BTreeSet<String>,
}

fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            object.values_mut().for_each(close);
            if object.contains_key("properties") {
                object.entry("additionalProperties").or_insert(json!(false));
            }
        }
        Value::Array(list) => list.iter_mut().for_each(close),
        _ => {}
    }
}

impl Description {
    pub(crate) async fn of(running: &Running) -> Self {
        let mut document = running.get("/openapi.json").await;
        close(&mut document);
        Self { document, checked: BTreeSet::new() }
    }

    /// What is wrong with an answer to `method` on the described `path`.
    fn faults(&mut self, method: &str, path: &str, status: &str, kind: &str, body: &Value) -> Vec<String> {
        self.checked.insert(format!("{method} {path} {kind}"));
        let schema = &self.document["paths"][path][method]["responses"][status]["content"][kind]["schema"];
        assert!(schema.is_object(), "{method} {path} {status} {kind} is not described");
        let mut schema = schema.clone();
        schema["components"] = self.document["components"].clone();
        let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        validator.iter_errors(body).map(|error| format!("{}: {error}", error.instance_path())).collect()
    }

    #[track_caller]
    pub(crate) fn check(&mut self, method: &str, path: &str, status: &str, kind: &str, body: &Value) {
        let faults = self.faults(method, path, status, kind, body);
        assert!(faults.is_empty(), "{method} {path}: {faults:?} in {body}");
    }
}

const JSON: &str = "application/json";

impl Running {
    async fn described_get(&self, description: &mut Description, path: &str) -> Value {
        let body = self.get(path).await;
        description.check("get", path, "200", JSON, &body);
        body
    }

    /// A path with its parameters, described as `pattern`.
    pub(crate) async fn described_get_as(
        &self,
        description: &mut Description,
        path: &str,
        pattern: &str,
    ) -> Value {
        let body = self.get(path).await;
        description.check("get", pattern, "200", JSON, &body);
        body
    }

    async fn described_post(
        &self,
        description: &mut Description,
        path: &str,
        body: &Value,
        status: u16,
    ) -> Value {
        let (got, answer) = self.post(path, body).await;
        assert_eq!(got, status, "{path}: {answer}");
        description.check("post", path, &status.to_string(), JSON, &answer);
        answer
    }

    async fn described_stream(&self, description: &mut Description, path: &str, body: &Value) {
        let stream = self.sent(path, body).await.text().await.unwrap();
        let events: Vec<Value> = stream
            .split("\n\n")
            .filter_map(|event| serde_json::from_str(event.strip_prefix("data: ")?).ok())
            .collect();
        assert!(events.len() > 3, "{stream}");
        for event in &events {
            description.check("post", path, "200", "text/event-stream", event);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_as_described() {
    let running = start().await;
    let mut about = Description::of(&running).await;
    let plain = chat("chat", 3);
    let text = json!({ "model": "default", "prompt": "Three rivers:", "max_tokens": 6 });
    let answer = running.described_post(&mut about, "/v1/chat/completions", &plain, 200).await;
    running.described_post(&mut about, "/v1/completions", &text, 200).await;
    let all = json!({ "logprobs": true, "top_logprobs": 2, "n": 2 });
    running.described_post(&mut about, "/v1/chat/completions", &asked(all), 200).await;
    let options = json!({ "stream": true, "stream_options": { "include_usage": true }, "logprobs": true, "top_logprobs": 1, "n": 2 });
    running.described_stream(&mut about, "/v1/chat/completions", &asked(options)).await;
    let mut streamed = text.clone();
    streamed["stream"] = json!(true);
    streamed["logprobs"] = json!(2);
    running.described_stream(&mut about, "/v1/completions", &streamed).await;

    let id = &answer["id"];
    let thumbs = json!({ "kind": "thumbs", "value": "up", "completion_id": id });
    running.described_post(&mut about, "/v1/feedback", &thumbs, 201).await;
    let metric = json!({ "metric_name": "thumbs", "value": true, "inference_id": id });
    running.described_post(&mut about, "/feedback", &metric, 200).await;
    let score = json!({ "traceId": id, "name": "n", "value": 1 });
    running.described_post(&mut about, "/api/public/scores", &score, 200).await;
    running.described_post(&mut about, "/v1/baseline", &json!({}), 200).await;
    running.described_post(&mut about, "/v1/updates", &json!({ "recipe": "sft" }), 202).await;
    for path in [
        "/v1/models",
        "/v1/alignment",
        "/v1/alarms",
        "/v1/updates",
        "/v1/versions",
        "/healthz",
        "/readyz",
        "/openapi.json",
    ] {
        running.described_get(&mut about, path).await;
    }
    let refused = running.post("/v1/chat/completions", &json!({ "model": 7 })).await.1;
    about.check("post", "/v1/chat/completions", "4XX", JSON, &refused);
    assert!(about.checked.len() >= 17, "{:?}", about.checked);
    // The check itself can fail.
    let mut more = answer.clone();
    more["colour"] = json!("red");
    assert_eq!(about.faults("post", "/v1/chat/completions", "200", JSON, &more).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ended_update_and_its_version_are_as_described() {
    let running = start().await;
    let mut about = Description::of(&running).await;
    let update = running.described_post(&mut about, "/v1/updates", &json!({ "recipe": "sft" }), 202).await;
    let path = format!("/v1/updates/{}", update["id"].as_str().unwrap());
    let ended = running.wait(&path, |body| (body["state"] == "ended").then(|| body.clone())).await;
    about.check("get", "/v1/updates/{id}", "200", JSON, &ended);
    let promoted = running.post("/v1/versions/v0/promote", &json!({})).await;
    assert_eq!(promoted.0, 200, "{}", promoted.1);
    about.check("post", "/v1/versions/{v}/promote", "200", JSON, &promoted.1);
}
