//! A real upstream on a loopback port: each test says what it answers.

use std::{
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, Method, Request, Response},
};
use gyrostat::{config::Config, http::Backend};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::harness::{Running, start_with};

/// A request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn model(&self) -> Value {
        serde_json::from_slice::<Value>(&self.body).unwrap()["model"].clone()
    }
}

type Answering = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

pub(crate) struct Stub {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    server: tokio::task::JoinHandle<()>,
}

impl Stub {
    /// What it was sent, without the questions that the sidecar has itself.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap().clone();
        seen.into_iter().filter(|seen| seen.path != "/v1/models").collect()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Starts an upstream; `/v1/models` lists one model, everything else is `answer`'s.
pub(crate) async fn upstream<F, R>(answer: F) -> Stub
where
    F: Fn(Seen) -> R + Send + Sync + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (log, answer) = (Arc::clone(&seen), Arc::new(answer));
    let handler = move |request: Request<Body>| -> Answering {
        let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
            let path = head.uri.path_and_query().unwrap().to_string();
            let seen = Seen { method: head.method, path, headers: head.headers, body };
            log.lock().unwrap().push(seen.clone());
            if seen.path == "/v1/models" {
                return json_answer(
                    200,
                    &json!({ "object": "list", "data": [{ "id": "base", "parent": null }] }),
                );
            }
            answer(seen).await
        })
    };
    let server =
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(handler)).await.unwrap() });
    Stub { address, seen, server }
}

/// A sidecar before it; the tiny local model is there only if `change` names it.
pub(crate) async fn before(stub: &Stub, change: impl FnOnce(&mut Config)) -> Running {
    let url = stub.url();
    let running = start_with(|config| {
        config.policy.model = "default".to_owned();
        config.upstream.url = Some(url);
        config.upstream.model = Some("base".to_owned());
        change(config);
    });
    running.await
}

impl Running {
    /// Waits until what has passed is in the store.
    pub(crate) async fn recorded(&self) {
        let Backend::Upstream(relay) = &self.app.state.backend else { panic!("no upstream") };
        relay.recorder.settled().await;
    }
}

pub(crate) fn json_answer(status: u16, body: &Value) -> Response<Body> {
    let answer = Response::builder().status(status).header("content-type", "application/json");
    answer.body(Body::from(body.to_string())).unwrap()
}

/// A whole chat answer.
pub(crate) fn said(id: &str, text: &str) -> Value {
    json!({
        "id": id, "object": "chat.completion", "model": "base",
        "choices": [{ "index": 0, "message": { "role": "assistant", "content": text }, "finish_reason": "stop" }],
        "usage": { "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10 },
    })
}

/// An event stream whose pieces the test sends, one packet each; dropped senders end it.
pub(crate) fn event_stream() -> (mpsc::Sender<Result<Bytes, std::io::Error>>, Response<Body>) {
    let (send, receive) = mpsc::channel(64);
    let body = Body::from_stream(ReceiverStream::new(receive));
    let answer = Response::builder().header("content-type", "text/event-stream; charset=utf-8");
    (send, answer.body(body).unwrap())
}

/// An event stream of these pieces, which ends after the last.
pub(crate) fn events(pieces: Vec<Vec<u8>>) -> Response<Body> {
    let (send, answer) = event_stream();
    tokio::spawn(async move {
        for piece in pieces {
            if send.send(Ok(Bytes::from(piece))).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    answer
}
