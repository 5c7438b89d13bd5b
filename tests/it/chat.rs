//! Completions: whole, streamed, with log-probabilities, reproducible.

use futures_util::StreamExt;
use serde_json::{Value, json};

use super::harness::{chat, start};

/// The chunks of a stream, without the closing `[DONE]`.
fn chunks(text: &str) -> Vec<Value> {
    let lines: Vec<&str> = text.split("\n\n").filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.last(), Some(&"data: [DONE]"));
    let data = lines[..lines.len() - 1].iter();
    data.map(|line| serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_what_the_whole_answer_says() {
    let running = start().await;
    let mut body = chat("chat", 7);
    let (status, whole) = running.post("/v1/chat/completions", &body).await;
    assert_eq!(status, 200);
    let usage = &whole["usage"];
    assert_eq!(
        usage["total_tokens"],
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );

    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let reply = running.client.post(running.url("/v1/chat/completions")).json(&body).send().await.unwrap();
    assert_eq!(reply.headers()["x-gyrostat-version"], "v0");
    assert_eq!(reply.headers()["content-type"], "text/event-stream");
    let chunks = chunks(&reply.text().await.unwrap());
    let content =
        |chunk: &Value| chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned();
    let streamed: String = chunks.iter().map(content).collect();
    assert_eq!(streamed, whole["choices"][0]["message"]["content"]);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let last = &chunks[chunks.len() - 1];
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), usage));
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seed_decides_alone_and_in_company() {
    let running = start().await;
    let alone = running.chat("chat", 11).await.1;
    let many = (0..12).map(|seed| running.chat("chat", seed));
    let together: Vec<String> =
        futures_util::future::join_all(many).await.into_iter().map(|(_, text)| text).collect();
    assert_eq!(together[11], alone);
    assert!(together.iter().any(|text| *text != alone));
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_come_with_their_alternatives() {
    let running = start().await;
    let mut body = chat("chat", 3);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(4);
    body["n"] = json!(2);
    body["temperature"] = json!(0);
    let (_, answer) = running.post("/v1/chat/completions", &body).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert_eq!(choices[0]["message"], choices[1]["message"]);
    assert_ne!(choices[0]["completion_id"], choices[1]["completion_id"]);
    for token in choices[0]["logprobs"]["content"].as_array().unwrap() {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 4);
        // Greedy: the token is the likeliest one.
        assert_eq!(top[0]["logprob"], token["logprob"]);
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
    }
    let text = json!({ "model": "default", "prompt": "abc", "max_tokens": 5, "logprobs": 2, "seed": 1 });
    let (status, answer) = running.post("/v1/completions", &text).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_answer_before_it() {
    let running = start().await;
    // The first seed whose answer is long enough to be stopped within.
    let mut seed = 5;
    let text = loop {
        let (_, text) = running.chat("chat", seed).await;
        if text.chars().count() > 5 {
            break text;
        }
        seed += 1;
    };
    let stop: String = text.chars().skip(3).take(2).collect();
    let mut body = chat("chat", seed);
    body["stop"] = json!(stop);
    let (_, answer) = running.post("/v1/chat/completions", &body).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["message"]["content"], text[..text.find(&stop).unwrap()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_frees_its_place() {
    let running = start().await;
    let mut body = chat("chat", 5);
    body["max_tokens"] = json!(400);
    body["stream"] = json!(true);
    let reply = running.client.post(running.url("/v1/chat/completions")).json(&body).send().await.unwrap();
    let mut stream = reply.bytes_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    for _ in 0..200 {
        let metrics = running.client.get(running.url("/metrics")).send().await.unwrap().text().await.unwrap();
        if metrics.contains("outcome=\"cancelled\"")
            && metrics.contains("gyrostat_engine_running_sequences 0")
        {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("the sequence went on");
}

#[tokio::test(flavor = "multi_thread")]
async fn biases_and_penalties_reach_the_sampler() {
    let running = start().await;
    let said = async |more: Value| {
        let mut body = chat("chat", 5);
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, answer) = running.post("/v1/chat/completions", &body).await;
        assert_eq!(status, 200, "{answer}");
        assert!(answer["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    // In the tiny vocabulary the printable bytes follow three special tokens: 3 is `!`, 4 is `"`.
    assert_eq!(said(json!({ "logit_bias": { "3": 100 }, "temperature": 0 })).await, "!!!!!!!!");
    let both = json!({ "3": 50, "4": 50 });
    let greedy = said(json!({ "logit_bias": both, "temperature": 0 })).await;
    let mixed = said(json!({ "logit_bias": both, "temperature": 0, "frequency_penalty": 2 })).await;
    assert!(greedy.chars().all(|one| "!\"".contains(one)) && mixed.chars().all(|one| "!\"".contains(one)));
    assert_eq!(mixed.matches('!').count(), 4, "{greedy} {mixed}");
    let (status, refused) = running
        .post(
            "/v1/chat/completions",
            &json!({ "model": "default", "logit_bias": { "259": 1 },
            "messages": [{ "role": "user", "content": "x" }] }),
        )
        .await;
    assert_eq!((status, &refused["error"]["param"]), (400, &json!("logit_bias.259")));
}
