//! OpenAI's routes over HTTP: shapes, streams, what is durable when.

use futures_util::StreamExt;
use serde_json::{Value, json};

use super::harness::{Running, chat, start};

impl Running {
    /// A raw answer.
    pub(crate) async fn sent(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client.post(self.url(path)).json(body).send().await.unwrap()
    }

    /// The body of an answer that has to be a 2xx.
    pub(crate) async fn posted(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert!((200..300).contains(&status), "{path}: {status} {answer}");
        answer
    }

    pub(crate) async fn chatted(&self, more: Value) -> Value {
        self.posted("/v1/chat/completions", &asked(more)).await
    }

    /// The value of a series, 0 if there is none.
    pub(crate) async fn metric(&self, series: &str) -> u64 {
        let page = self.client.get(self.url("/metrics")).send().await.unwrap().text().await.unwrap();
        let value = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap())
    }

    /// Waits until a series is there with this value.
    pub(crate) async fn wait_metric(&self, series: &str, value: u64) {
        for _ in 0..600 {
            if self.metric(series).await == value {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        panic!("{series} is {} and never came to {value}", self.metric(series).await);
    }

    /// The events of a stream, `[DONE]` taken off.
    async fn events(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut events = parsed(&self.sent(path, body).await.text().await.unwrap());
        assert_eq!(events.pop().unwrap(), "[DONE]");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// A small chat request with more fields.
pub(crate) fn asked(more: Value) -> Value {
    with(chat("chat", 3), more)
}

fn text(more: Value) -> Value {
    with(json!({ "model": "default", "prompt": "Three rivers:", "max_tokens": 6, "seed": 3 }), more)
}

fn with(mut body: Value, more: Value) -> Value {
    if let Value::Object(more) = more {
        body.as_object_mut().unwrap().extend(more);
    }
    body
}

fn parsed(stream: &str) -> Vec<String> {
    let events = stream.strip_suffix("\n\n").unwrap().split("\n\n");
    events.map(|event| event.strip_prefix("data: ").unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_has_openais_shape() {
    let running = start().await;
    let model = running.get("/v1/models").await["data"][0]["id"].clone();
    let response = running.sent("/v1/chat/completions", &asked(json!({ "model": model }))).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["x-gyrostat-version"], "v0");
    assert!(!response.headers()["x-request-id"].is_empty());
    let body: Value = response.json().await.unwrap();
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &model));
    assert!(body["created"].as_u64().unwrap() > 1_600_000_000);
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].is_string());
    assert!(["stop", "length"].contains(&choice["finish_reason"].as_str().unwrap()));
    assert_eq!(choice["logprobs"], Value::Null);
    let usage = |field: &str| body["usage"][field].as_u64().unwrap();
    assert!(usage("prompt_tokens") > 0 && usage("completion_tokens") <= 8, "{body}");
    assert_eq!(usage("total_tokens"), usage("prompt_tokens") + usage("completion_tokens"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_request_id_is_echoed() {
    let running = start().await;
    for path in ["/healthz", "/nowhere"] {
        let request = running.client.get(running.url(path)).header("x-request-id", "abc");
        assert_eq!(request.send().await.unwrap().headers()["x-request-id"], "abc", "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_content_type_does_not_matter() {
    let running = start().await;
    for content_type in ["application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded"]
    {
        let request = running.client.post(running.url("/v1/chat/completions"));
        let request = request.header("content-type", content_type).body(asked(json!({})).to_string());
        assert_eq!(request.send().await.unwrap().status(), 200, "{content_type}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_choice_can_be_judged() {
    let running = start().await;
    let body = running.chatted(json!({ "n": 3, "seed": 5 })).await;
    let choices = body["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    assert_eq!(choices[0]["completion_id"], body["id"]);
    for (nth, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], nth);
        let thumbs = json!({ "kind": "thumbs", "value": "up", "completion_id": choice["completion_id"] });
        assert_eq!(running.post("/v1/feedback", &thumbs).await.0, 201);
    }
    let alone = running.chatted(json!({ "seed": 6 })).await;
    assert_eq!(alone["choices"][0]["message"], choices[1]["message"], "the second choice has the next seed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_what_the_whole_answer_says() {
    let running = start().await;
    for (path, body) in [
        ("/v1/chat/completions", asked(json!({ "seed": 3 }))),
        ("/v1/completions", text(json!({ "seed": 3 }))),
    ] {
        let whole = running.posted(path, &body).await;
        let options = json!({ "stream": true, "stream_options": { "include_usage": true } });
        let mut events = running.events(path, &with(body, options)).await;
        let last = events.pop().unwrap();
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
        assert!(events.iter().all(|event| event["usage"].is_null() && event.get("usage").is_some()));
        for field in ["id", "object", "created", "model"] {
            assert!(events.iter().all(|event| event[field] == last[field]), "{field}");
        }
        let piece = |event: &Value| {
            let choice = &event["choices"][0];
            choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default().to_owned()
        };
        let choice = &whole["choices"][0];
        let expected = choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap();
        assert_eq!(events.iter().map(piece).collect::<String>(), expected);
        let (end, before) = events.split_last().unwrap();
        assert_eq!(end["choices"][0]["finish_reason"], choice["finish_reason"]);
        assert!(before.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
        if path.ends_with("chat/completions") {
            assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
            assert_eq!(end["choices"][0]["delta"], json!({}));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_streamed_only_if_asked_for() {
    let running = start().await;
    let events = running.events("/v1/chat/completions", &asked(json!({ "stream": true }))).await;
    assert!(events.iter().all(|event| event.get("usage").is_none() && event["choices"][0].is_object()));
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_are_streamed_side_by_side() {
    let running = start().await;
    let body = asked(json!({ "n": 2, "seed": 9 }));
    let whole = running.posted("/v1/chat/completions", &body).await;
    let events = running.events("/v1/chat/completions", &with(body, json!({ "stream": true }))).await;
    for (nth, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let of_choice =
            || events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == nth);
        let said: String = of_choice().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(choice["message"]["content"], said);
        assert_eq!(of_choice().filter(|choice| !choice["finish_reason"].is_null()).count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_kept_before_its_stream_ends() {
    let running = start().await;
    let response = running.sent("/v1/chat/completions", &asked(json!({ "stream": true }))).await;
    let mut chunks = response.bytes_stream();
    let mut seen = String::new();
    while !seen.contains("\"finish_reason\":\"") {
        seen.push_str(str::from_utf8(&chunks.next().await.unwrap().unwrap()).unwrap());
    }
    let first: Value =
        serde_json::from_str(seen.split("\n\n").next().unwrap().strip_prefix("data: ").unwrap()).unwrap();
    let thumbs = json!({ "kind": "thumbs", "value": "down", "completion_id": first["id"] });
    assert_eq!(running.post("/v1/feedback", &thumbs).await.0, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_are_one_a_token() {
    let running = start().await;
    let body = running.chatted(json!({ "logprobs": true, "top_logprobs": 3, "temperature": 0 })).await;
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(body["usage"]["completion_tokens"], content.len());
    for token in content {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert!(token["logprob"].as_f64().unwrap() <= 1e-4 && token["bytes"].is_array());
    }
    let asked = text(json!({ "logprobs": 2, "temperature": 0 }));
    let whole = running.posted("/v1/completions", &asked).await["choices"][0]["logprobs"].clone();
    let events = running.events("/v1/completions", &with(asked, json!({ "stream": true }))).await;
    let parts =
        || events.iter().map(|event| &event["choices"][0]["logprobs"]).filter(|part| part.is_object());
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let streamed: Vec<Value> = parts().flat_map(|part| part[field].as_array().unwrap().clone()).collect();
        assert_eq!(whole[field], json!(streamed), "{field}");
    }
    assert!(whole["text_offset"].as_array().unwrap().is_sorted_by_key(Value::as_u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn seeds_and_stops() {
    let running = start().await;
    let said = async |more: Value| {
        running.chatted(more).await["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let whole = said(json!({ "seed": 4, "temperature": 1 })).await;
    assert_eq!(said(json!({ "seed": 4, "temperature": 1 })).await, whole);
    let stop: String = whole.chars().skip(1).take(2).collect();
    let cut = whole.split(stop.as_str()).next().unwrap();
    assert_eq!(said(json!({ "seed": 4, "temperature": 1, "stop": [stop] })).await, cut);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_count_what_was_answered() {
    let running = start().await;
    for _ in 0..3 {
        running.chatted(json!({ "metadata": { "interaction": "code" }, "n": 2 })).await;
    }
    let mut answers = 0;
    for outcome in ["stop", "length"] {
        let labels = format!(r#"{{interaction="code",outcome="{outcome}",version="v0"}}"#);
        answers += running.metric(&format!("gyrostat_completions_total{labels}")).await;
    }
    assert_eq!(answers, 6);
    let model = running.get("/v1/models").await["data"][0]["id"].as_str().unwrap().to_owned();
    let labels = format!(
        r#"{{gen_ai_operation_name="chat",gen_ai_provider_name="gyrostat",gen_ai_response_model="{model}"}}"#
    );
    assert_eq!(running.metric(&format!("gen_ai_server_time_to_first_token_seconds_count{labels}")).await, 3);
}
