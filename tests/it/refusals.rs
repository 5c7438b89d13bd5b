//! What is refused beside the fields of chat requests: other routes, paths, sizes, numbers that are none.

use serde_json::{Value, json};

use super::harness::{Running, start};

impl Running {
    /// Status and error of a request that has to be refused in OpenAI's shape.
    async fn refused(&self, method: &str, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
        let method = method.parse().unwrap();
        let reply = self.client.request(method, self.url(path)).body(body).send().await.unwrap();
        let status = reply.status().as_u16();
        let mut body: Value = reply.json().await.unwrap_or_else(|error| panic!("{path}: {status}, {error}"));
        let error = body["error"].take();
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{path}: {error}");
        for field in ["type", "param", "code"] {
            assert!(error.get(field).is_some(), "{path}: {error} has no {field}");
        }
        (status, error)
    }

    async fn check(&self, method: &str, path: &str, body: &str, status: u16, param: &str) {
        let (got, error) = self.refused(method, path, body.to_owned()).await;
        assert_eq!(
            (got, error["param"].as_str().unwrap_or_default()),
            (status, param),
            "{method} {path} {body:.99}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_lead_nowhere() {
    let running = start().await;
    let unknown = "0190a0b0-0000-7000-8000-000000000001";
    for id in ["x", unknown, "-1", "../../etc/passwd", "%20", &"9".repeat(300)] {
        let escaped = id.replace('/', "%2F");
        running.check("POST", &format!("/v1/alarms/{escaped}/acknowledge"), "{}", 404, "id").await;
        running.check("GET", &format!("/v1/updates/{escaped}"), "", 404, "id").await;
        running.check("DELETE", &format!("/v1/updates/{escaped}"), "", 404, "id").await;
        running.check("POST", &format!("/v1/versions/{escaped}/promote"), "{}", 404, "version").await;
        let param = if id == unknown { "completion_id" } else { "id" };
        running
            .check("POST", &format!("/v1/request/{escaped}/feedback"), r#"{"rating":true}"#, 404, param)
            .await;
    }
    for version in ["7", "v7", "v", "4294967296", "1.5", "v0.5"] {
        running.check("POST", &format!("/v1/versions/{version}/promote"), "", 404, "version").await;
    }
    // Not UTF-8.
    running.check("GET", "/v1/updates/%ff", "", 404, "").await;
    for path in ["/", "/v1", "/v1/chat", "/v1/chat/completions/", "/v1/updates/a/b", "/metrics/x"] {
        running.check("POST", path, "{}", 404, "").await;
    }
    for (method, path) in [
        ("GET", "/v1/chat/completions"),
        ("PUT", "/v1/feedback"),
        ("DELETE", "/v1/alarms"),
        ("PATCH", "/healthz"),
    ] {
        running.check(method, path, "", 405, "").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_too_large() {
    let running = start().await;
    let routes = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/feedback",
        "/feedback",
        "/api/public/scores",
        "/v1/request/x/feedback",
        "/v1/baseline",
        "/v1/updates",
        "/v1/nowhere",
    ];
    for route in routes {
        let (status, error) = running.refused("POST", route, vec![b' '; 10 << 20]).await;
        assert_eq!((status, &error["code"]), (413, &json!("request_too_large")), "{route}");
    }
    assert_eq!(running.get("/healthz").await["status"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_that_are_none() {
    let running = start().await;
    let id = running.chat("chat", 1).await.0;
    for number in ["NaN", "-Infinity", "1e999"] {
        let rating = format!(r#"{{"kind":"rating","value":{number},"completion_id":"{id}"}}"#);
        running.check("POST", "/v1/feedback", &rating, 422, "value").await;
        let score = format!(r#"{{"traceId":"{id}","name":"n","value":{number}}}"#);
        running.check("POST", "/api/public/scores", &score, 422, "value").await;
        let chat = format!(
            r#"{{"model":"default","messages":[{{"role":"user","content":"x"}}],"temperature":{number}}}"#
        );
        running.check("POST", "/v1/chat/completions", &chat, 400, "temperature").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wishes_that_make_no_sense() {
    let running = start().await;
    for (route, body, param) in [
        ("/v1/updates", r#"{"recipe":"magic"}"#, "recipe"),
        ("/v1/updates", r#"{"recipe":["ppo"]}"#, "recipe"),
        ("/v1/updates", r#"{"interactions":"code"}"#, "interactions"),
        ("/v1/updates", r#"{"interactions":["code","Not A Type"]}"#, "interactions[1]"),
        ("/v1/updates", r#"{"interactions":[5]}"#, "interactions[0]"),
        ("/v1/updates", r#"{"more":1}"#, "more"),
        ("/v1/baseline", r#"{"signal":"joy"}"#, "signal"),
        ("/v1/baseline", r#"{"interaction":5}"#, "interaction"),
        ("/v1/baseline", r#"{"more":1}"#, "more"),
        ("/v1/baseline", "[]", ""),
        ("/v1/completions", r#"{"model":"gpt-9","prompt":"x"}"#, "model"),
        ("/v1/completions", r#"{"model":"default","prompt":"x","max_tokens":1000000}"#, "prompt"),
        (
            "/v1/chat/completions",
            r#"{"model":"default","messages":[{"role":"user","content":"x"}],"max_tokens":1000000}"#,
            "messages",
        ),
        (
            "/v1/chat/completions",
            r#"{"model":"default","messages":[{"role":"user","content":"x"}],"metadata":{"interaction":"§"}}"#,
            "metadata.interaction",
        ),
    ] {
        let status = if param == "model" { 404 } else { 400 };
        running.check("POST", route, body, status, param).await;
    }
    let all = running.posted("/v1/baseline", &json!({ "interaction": "all" })).await;
    assert_eq!(all, running.posted("/v1/baseline", &json!({})).await);
}
