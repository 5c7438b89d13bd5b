//! The way out, and connections that dawdle.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::StreamExt;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::harness::{chat, start_with};
use super::stub::{before, event_stream, upstream};

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_under_way_is_served_to_its_end() {
    let (send, answer) = event_stream();
    let answer = Arc::new(Mutex::new(Some(answer)));
    let stub = upstream(move |_| {
        let answer = answer.lock().unwrap().take().unwrap();
        async move { answer }
    })
    .await;
    let running = before(&stub, |_| {}).await;
    let url = |path: &str| running.url(path);
    let (readyz, chats) = (url("/readyz"), url("/v1/chat/completions"));
    let body = json!({ "model": "base", "stream": true, "messages": [{ "role": "user", "content": "?" }] });
    let mut stream = running.client.post(&chats).json(&body).send().await.unwrap().bytes_stream();
    let piece = |text: &str| {
        format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
    };
    send.send(Ok(piece("a").into())).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), piece("a"));
    assert_eq!(running.client.get(&readyz).send().await.unwrap().status(), 200);

    let (store, life) = (Arc::clone(&running.app.state.store), Arc::clone(&running.app.state.life));
    let stopping = tokio::spawn(running.app.stop(Duration::from_secs(30)));
    while !life.is_draining() {
        tokio::task::yield_now().await;
    }
    // New clients are told to go elsewhere, and so is whoever asks whether they should come.
    let fresh = reqwest::Client::new();
    assert_eq!(fresh.get(&readyz).send().await.unwrap().status(), 503);
    assert_eq!(fresh.get(readyz.replace("readyz", "healthz")).send().await.unwrap().status(), 200);
    let refused = fresh.post(&chats).json(&body).send().await.unwrap();
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (503, &"1".parse().unwrap()));
    assert_eq!(refused.headers()["connection"], "close");
    assert!(!stopping.is_finished());

    send.send(Ok(piece("b").into())).await.unwrap();
    send.send(Ok("data: [DONE]\n\n".into())).await.unwrap();
    drop(send);
    let mut rest = Vec::new();
    while let Some(bytes) = stream.next().await {
        rest.extend_from_slice(&bytes.unwrap());
    }
    assert_eq!(String::from_utf8(rest).unwrap(), piece("b") + "data: [DONE]\n\n");
    tokio::time::timeout(Duration::from_secs(5), stopping).await.unwrap().unwrap();
    fresh.get(&readyz).send().await.unwrap_err();
    let kept: Vec<_> = store.completions(..).map(|kept| kept.unwrap().answer).collect();
    assert_eq!(kept, ["ab"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_out_has_a_bound() {
    let (send, answer) = event_stream();
    let answer = Arc::new(Mutex::new(Some(answer)));
    let stub = upstream(move |_| {
        let answer = answer.lock().unwrap().take().unwrap();
        async move { answer }
    })
    .await;
    let running = before(&stub, |_| {}).await;
    let url = running.url("/v1/chat/completions");
    let _endless = running.client.post(url).json(&chat("chat", 1)).send().await.unwrap();
    let stopped = running.app.stop(Duration::from_millis(200));
    tokio::time::timeout(Duration::from_secs(10), stopped).await.unwrap();
    drop(send);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_headers_are_not_waited_for() {
    let running = start_with(|config| config.http.header_seconds = 0.3).await;
    let mut connection = TcpStream::connect(running.app.address).await.unwrap();
    connection.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n").await.unwrap();
    let mut answer = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(10), connection.read_to_end(&mut answer));
    // Whether it is told so or just cut off is all the same; it gets no answer.
    let _cut = closed.await.unwrap();
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(running.client.get(running.url("/healthz")).send().await.unwrap().status(), 200);
}
