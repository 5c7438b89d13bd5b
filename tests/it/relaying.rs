//! Upstream mode: what the client sees is what the upstream sent, and the store has it afterwards.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::body::Body;
use axum::http::Response;
use futures_util::StreamExt;
use gyrostat::{
    completion::{Completion, FinishReason, Prompt},
    http::{Key, Scope},
    upstream::Secret,
};
use serde_json::{Value, json};

use super::harness::Running;
use super::stub::{before, event_stream, events, json_answer, said, upstream};

const CHAT: &str = "/v1/chat/completions";
const ASKED: &str = r#"{ "model":"base" , "messages":[{"role":"user","content":"Hé?"}],
    "odd":{"a":[1e3,-0.0]},"metadata":{"interaction":"advice"}, "user":"ann" }"#;

impl Running {
    async fn raw(&self, path: &str, body: &str) -> reqwest::Response {
        self.client.post(self.url(path)).body(body.to_owned()).send().await.unwrap()
    }

    /// Everything in the store, oldest first.
    async fn kept(&self) -> Vec<Completion> {
        self.recorded().await;
        self.app.state.store.completions(..).collect::<Result<_, _>>().unwrap()
    }

    async fn thumb(&self, completion: &str) -> u16 {
        let body = json!({ "kind": "thumbs", "value": "up", "completion_id": completion });
        self.post("/v1/feedback", &body).await.0
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_passes_byte_for_byte() {
    let odd = r#"{"id":"chatcmpl-1","x":1e3,  "choices":[{"index":0,"message":{"content":"H\u00e9!","z":[]},"finish_reason":"length"}],"usage":{"prompt_tokens":5,"completion_tokens":2,"extra":null}}"#;
    let stub = upstream(move |_| async move {
        let answer = Response::builder()
            .header("content-type", "application/json; charset=utf-8")
            .header("x-request-id", "theirs")
            .header("x-ratelimit-remaining", "9")
            .header("connection", "keep-alive, x-hop")
            .header("x-hop", "1");
        answer.body(Body::from(odd)).unwrap()
    })
    .await;
    let running = before(&stub, |_| {}).await;
    let request = running.client.post(running.url(&format!("{CHAT}?v=1")));
    let request = request.header("x-request-id", "ours").header("openai-beta", "b").bearer_auth("their-key");
    let answer = request.header("content-type", "application/json").body(ASKED).send().await.unwrap();
    let headers = answer.headers().clone();
    assert_eq!(answer.bytes().await.unwrap(), odd);
    assert_eq!(headers["content-type"], "application/json; charset=utf-8");
    assert_eq!(
        (&headers["x-request-id"], &headers["x-ratelimit-remaining"]),
        (&"theirs".parse().unwrap(), &"9".parse().unwrap())
    );
    assert_eq!(headers["x-gyrostat-version"], "v0");
    assert!(!headers.contains_key("x-hop"));

    let seen = &stub.seen()[0];
    assert_eq!(seen.body, ASKED);
    assert_eq!(seen.path, format!("{CHAT}?v=1"));
    assert_eq!(
        (&seen.headers["x-request-id"], &seen.headers["openai-beta"]),
        (&"ours".parse().unwrap(), &"b".parse().unwrap())
    );
    assert_eq!(seen.headers["authorization"], "Bearer their-key");

    let [kept] = running.kept().await.try_into().unwrap();
    assert_eq!(kept.answer, "Hé!");
    assert_eq!(kept.prompt.request(), "Hé?");
    assert_eq!((kept.interaction.as_str(), kept.user.as_deref()), ("advice", Some("ann")));
    assert_eq!(
        (kept.finish_reason, kept.prompt_tokens, kept.completion_tokens),
        (FinishReason::Length, 5, 2)
    );
    assert_eq!(headers["x-gyrostat-completion"], kept.id.to_string());
    assert_eq!(running.thumb("chatcmpl-1").await, 201);
    assert_eq!(running.app.state.store.feedback_of(kept.id).unwrap().len(), 1);
    assert_eq!(running.thumb("chatcmpl-2").await, 404);
    let line = r#"gen_ai_client_token_usage_sum{gen_ai_operation_name="chat",gen_ai_provider_name="gyrostat",gen_ai_response_model="base",gen_ai_token_type="input"}"#;
    assert_eq!(running.metric(line).await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn feedback_may_follow_at_once() {
    let stub = upstream(|seen| async move {
        let body: Value = serde_json::from_slice(&seen.body).unwrap();
        json_answer(200, &said(body["id"].as_str().unwrap(), "Yes."))
    })
    .await;
    let running = before(&stub, |_| {}).await;
    for nth in 0..100 {
        let id = format!("chatcmpl-{nth}");
        let body = json!({ "model": "default", "id": id, "messages": [{ "role": "user", "content": "?" }] });
        running.posted(CHAT, &body).await;
        assert_eq!(running.thumb(&id).await, 201, "{id}");
    }
    // The alias has become the upstream's own name.
    assert_eq!(stub.seen()[0].model(), "base");
}

/// A stream in which everything is odd that may be.
fn odd_stream() -> Vec<u8> {
    let chunk = |index: usize, delta: &str, end: &str| {
        format!(
            r#"data: {{"id":"cmpl-s","choices":[{{"index":{index},"delta":{delta},"finish_reason":{end},"w":1}}]}}"#
        )
    };
    let mut stream = ": a comment\r\n\r\n".to_owned();
    stream += &(chunk(0, r#"{"role":"assistant"}"#, "null") + "\r\n\r\n");
    stream += &(chunk(1, r#"{"content":"Grüße 🦀"}"#, "null") + "\n\n");
    stream += "event: message\nid: 3\n";
    stream += &(chunk(0, r#"{"content":"日本"}"#, "null").replacen("data: ", "data:", 1) + "\r\r");
    stream +=
        "data: {\"id\":\"cmpl-s\",\ndata: \"choices\":[{\"index\":0,\"delta\":{\"content\":\"語\"}}]}\n\n";
    stream += &(chunk(1, "{}", "\"length\"") + "\n\n");
    stream += &(chunk(0, "{}", "\"stop\"") + "\n\n");
    stream += "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":4,\"completion_tokens\":6}}\n\n";
    stream.into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_passes_byte_for_byte_in_any_framing() {
    for (size, ending) in [(1, ""), (7, "data: [DONE]\n\n"), (4096, "data: [DONE]"), (64, "")] {
        let mut stream = odd_stream();
        stream.extend_from_slice(ending.as_bytes());
        let pieces: Vec<Vec<u8>> = stream.chunks(size.max(3)).map(<[u8]>::to_vec).collect();
        let stub = upstream(move |_| {
            let pieces = pieces.clone();
            async move { events(pieces) }
        })
        .await;
        let running = before(&stub, |_| {}).await;
        let body = json!({ "model": "base", "n": 2, "stream": true, "messages": [{ "role": "user", "content": "Hi" }] });
        let answer = running.raw(CHAT, &body.to_string()).await;
        assert_eq!(answer.headers()["content-type"], "text/event-stream; charset=utf-8");
        let ids = answer.headers()["x-gyrostat-completion"].to_str().unwrap().to_owned();
        assert_eq!(answer.bytes().await.unwrap(), stream, "pieces of {size}");
        let kept = running.kept().await;
        let answers: Vec<&str> = kept.iter().map(|kept| kept.answer.as_str()).collect();
        assert_eq!(answers, ["日本語", "Grüße 🦀"], "pieces of {size}");
        assert_eq!(kept.iter().map(|kept| kept.id.to_string()).collect::<Vec<_>>().join(", "), ids);
        for id in ["cmpl-s", "cmpl-s#1", ids.split(", ").last().unwrap()] {
            assert_eq!(running.thumb(id).await, 201, "{id}");
        }
        assert_eq!(running.app.state.store.feedback_of(kept[1].id).unwrap().len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_piece_passes_at_once() {
    let (send, answer) = event_stream();
    let answer = Arc::new(Mutex::new(Some(answer)));
    let stub = upstream(move |_| {
        let answer = answer.lock().unwrap().take().unwrap();
        async move { answer }
    })
    .await;
    let running = before(&stub, |_| {}).await;
    let mut stream = running.raw(CHAT, ASKED).await.bytes_stream();
    for nth in 0..5 {
        // The next piece is not even there while this one is waited for.
        let piece = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{nth}\"}}}}]}}\n\n");
        send.send(Ok(piece.clone().into())).await.unwrap();
        let got = tokio::time::timeout(Duration::from_secs(5), stream.next()).await.unwrap();
        assert_eq!(got.unwrap().unwrap(), piece);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hang_up_is_passed_on() {
    let (send, answer) = event_stream();
    let answer = Arc::new(Mutex::new(Some(answer)));
    let stub = upstream(move |seen| {
        let answer = answer.lock().unwrap().take();
        async move {
            if seen.path.ends_with("slow") {
                tokio::time::sleep(Duration::from_mins(1)).await;
            }
            answer.unwrap()
        }
    })
    .await;
    let running = before(&stub, |_| {}).await;
    let mut stream = running.raw(CHAT, ASKED).await.bytes_stream();
    send.send(Ok("data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n".into())).await.unwrap();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    tokio::time::timeout(Duration::from_secs(5), send.closed()).await.unwrap();
    let series = r#"gyrostat_completions_total{interaction="advice",outcome="cancelled",version="v0"}"#;
    for _ in 0..100 {
        running.recorded().await;
        if running.metric(series).await == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(running.metric(series).await, 1);
    // Before there is any answer, too.
    let request = running.client.post(running.url(&format!("{CHAT}?slow"))).body(ASKED);
    request.timeout(Duration::from_millis(100)).send().await.unwrap_err();
    for _ in 0..100 {
        running.recorded().await;
        if running.metric(series).await == 2 {
            assert!(running.kept().await.is_empty());
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the second hang-up was not noticed");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_pass_as_they_are() {
    let stub = upstream(|seen| async move {
        let status: u16 = seen.path.rsplit('?').next().unwrap().parse().unwrap();
        let answer =
            Response::builder().status(status).header("retry-after", "7").header("content-type", "text/odd");
        answer.body(Body::from(format!("no {status}\n"))).unwrap()
    })
    .await;
    let running = before(&stub, |_| {}).await;
    for status in [301, 400, 404, 422, 429, 500, 503] {
        let answer = running.raw(&format!("{CHAT}?{status}"), ASKED).await;
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["retry-after"]),
            (status, &"7".parse().unwrap())
        );
        assert_eq!(answer.headers()["content-type"], "text/odd");
        assert_eq!(answer.text().await.unwrap(), format!("no {status}\n"));
    }
    assert!(running.kept().await.is_empty());
    // What is no JSON is the upstream's to refuse.
    assert_eq!(running.raw(&format!("{CHAT}?400"), "{\"model\":").await.status(), 400);
    assert_eq!(stub.seen().last().unwrap().body, "{\"model\":");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_is_away_or_silent_has_its_own_status() {
    let stub = upstream(|_| async {
        tokio::time::sleep(Duration::from_mins(1)).await;
        json_answer(200, &json!({}))
    })
    .await;
    let running = before(&stub, |config| config.upstream.read_seconds = 0.2).await;
    let answer = running.raw(CHAT, ASKED).await;
    assert_eq!(answer.status(), 504);
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "upstream_timeout");

    let running =
        before(&stub, |config| config.upstream.url = Some("http://127.0.0.1:1/v1".to_owned())).await;
    let answer = running.raw(CHAT, ASKED).await;
    assert_eq!(answer.status(), 502);
    let error = answer.json::<Value>().await.unwrap()["error"].clone();
    assert_eq!((&error["type"], &error["code"]), (&json!("server_error"), &json!("upstream_unreachable")));
    assert!(!error.to_string().contains("127.0.0.1"), "{error}");
    assert_eq!(running.client.get(running.url("/readyz")).send().await.unwrap().status(), 503);
    // Feedback is taken all the same.
    let text = json!({ "kind": "comparison", "prompt": "p", "chosen": "a", "rejected": "b" });
    assert_eq!(running.post("/v1/feedback", &text).await.0, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_is_not_kept() {
    let stub = upstream(|_| async {
        let (send, answer) = event_stream();
        tokio::spawn(async move {
            let piece = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"half\"}}]}\n\n";
            send.send(Ok(piece.into())).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            send.send(Err(std::io::Error::other("gone"))).await.unwrap();
        });
        answer
    })
    .await;
    let running = before(&stub, |_| {}).await;
    let answer = running.raw(CHAT, ASKED).await;
    assert_eq!(answer.status(), 200);
    answer.bytes().await.unwrap_err();
    assert!(running.kept().await.is_empty());
    let series = r#"gyrostat_completions_total{interaction="advice",outcome="failed",version="v0"}"#;
    assert_eq!(running.metric(series).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_costs_the_record_and_not_the_answer() {
    let stub = upstream(|_| async { json_answer(200, &said("a", "Yes.")) }).await;
    let running = before(&stub, |config| config.upstream.record_queue = 1).await;
    let answers = (0..200).map(|_| running.raw(CHAT, ASKED));
    for answer in futures_util::future::join_all(answers).await {
        assert_eq!(answer.status(), 200);
    }
    let kept = running.kept().await.len() as u64;
    let series = |interaction: &str, outcome: &str| {
        format!(
            r#"gyrostat_completions_total{{interaction="{interaction}",outcome="{outcome}",version="v0"}}"#
        )
    };
    assert_eq!(running.metric(&series("advice", "stop")).await, kept);
    assert_eq!(running.metric(&series("other", "unrecorded")).await, 200 - kept);
    assert_eq!(running.metric(r#"gyrostat_queue_depth{queue="recorder"}"#).await, 0);
    assert_eq!(running.metric(r#"gyrostat_queue_capacity{queue="recorder"}"#).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn text_completions_and_other_models() {
    let stub = upstream(|seen| async move {
        let choices: Vec<Value> = (0..2)
            .map(|index| json!({ "index": index, "text": format!(" t{index}"), "finish_reason": "stop" }))
            .collect();
        json_answer(200, &json!({ "id": seen.model(), "choices": choices }))
    })
    .await;
    let running = before(&stub, |_| {}).await;
    let asked = |model: &str| json!({ "model": model, "prompt": ["one", "two"] });
    running.posted("/v1/completions", &asked("base")).await;
    let kept = running.kept().await;
    let texts: Vec<_> = kept.iter().map(|kept| (kept.prompt.clone(), kept.answer.as_str())).collect();
    let prompt = |text: &str| Prompt::Text(text.to_owned());
    assert_eq!(texts, [(prompt("one"), " t0"), (prompt("two"), " t1")]);
    // Another model of the upstream's passes, and is nobody's drift.
    let answer = running.raw("/v1/completions", &asked("another").to_string()).await;
    assert!(!answer.headers().contains_key("x-gyrostat-version"));
    assert_eq!(answer.json::<Value>().await.unwrap()["id"], "another");
    assert_eq!(running.kept().await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_routes_pass_under_our_keys() {
    let stub = upstream(|seen| async move {
        json_answer(200, &json!({ "path": seen.path, "method": seen.method.as_str() }))
    })
    .await;
    let running = before(&stub, |config| {
        let key = |key: &str, scopes: &[Scope]| Key { key: key.to_owned(), scopes: scopes.to_vec() };
        config.http.keys = vec![key("app", &[Scope::Chat]), key("rater", &[Scope::Feedback])];
        config.http.body_limit_bytes = 1000;
        config.upstream.api_key = Some(Secret("secret".to_owned()));
    })
    .await;
    let ask = async |key: &str, path: &str, body: String| {
        let request = running.client.post(running.url(path)).bearer_auth(key).body(body);
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let (status, body) = ask("app", "/v1/embeddings?x=1", "{}".to_owned()).await;
    assert_eq!((status, &body["path"]), (200, &json!("/v1/embeddings?x=1")));
    assert_eq!(stub.seen()[0].headers["authorization"], "Bearer secret");
    for (key, path, wanted) in [
        ("rater", "/v1/embeddings", 403),
        ("nobody", "/v1/embeddings", 401),
        ("nobody", CHAT, 401),
        ("rater", CHAT, 403),
        ("app", "/v1/load_lora_adapter", 404),
        ("app", "/v1/%6coad_lora_adapter", 404),
        ("app", "/v1/unload_lora_adapter", 404),
        ("app", "/v1/../pause", 404),
        ("app", "/pause", 404),
        ("app", "/v1/alignment", 405),
    ] {
        assert_eq!(ask(key, path, ASKED.to_owned()).await.0, wanted, "{key} {path}");
    }
    assert_eq!(ask("app", "/v1/embeddings", "x".repeat(2000)).await.0, 413);
    assert_eq!(stub.seen().len(), 1);
    let request = running.client.get(running.url("/v1/models")).bearer_auth("app");
    assert_eq!(request.send().await.unwrap().json::<Value>().await.unwrap()["data"][0]["id"], "base");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_local_model_nothing_is_learned() {
    let stub = upstream(|_| async { json_answer(200, &said("a", "Yes.")) }).await;
    let running = before(&stub, |config| config.upstream.model = None).await;
    let ready = running.wait("/readyz", |body| (body["status"] == "ok").then(|| body.clone())).await;
    assert_eq!(ready["model"], "base", "the name of the only model was asked");
    for body in [&ready["learning"], &running.get("/v1/updates").await["learning"]] {
        assert!(body.as_str().unwrap().contains("policy.model"), "{body}");
    }
    let (status, refused) = running.post("/v1/updates", &json!({})).await;
    assert_eq!(status, 409, "{refused}");
    running.raw(CHAT, ASKED).await;
    running.recorded().await;
    running
        .wait("/v1/alignment", |body| body["signals"].as_array().filter(|rows| !rows.is_empty()).map(drop))
        .await;
}
