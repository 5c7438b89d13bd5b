//! The answer as server-sent events.

use std::convert::Infallible;

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::completion::FinishReason;
use crate::http::{error::ApiError, shape::characters, versioned};
use crate::policy::Event;

use super::Call;

type Sender = mpsc::Sender<Result<Bytes, Infallible>>;

/// Chunks that wait for a slow client; the engine itself never waits.
const AHEAD: usize = 64;

/// One choice as far as it has been sent.
#[derive(Debug, Clone, Default)]
struct Sent {
    text: String,
    /// Characters of its tokens.
    characters: usize,
}

impl Call {
    /// Begins the response. When its client hangs up, the task ends, and with it the engine's work.
    pub(super) async fn stream(mut self, mut events: Vec<mpsc::Receiver<Event>>) -> Response {
        // The first event says which version answers, which the header has to say too.
        let Some(Event::Started { version }) = events[0].recv().await else {
            return self.end(ApiError::failed(), "failed").into_response();
        };
        self.pending.version = version;
        let (send, receive) = mpsc::channel(AHEAD);
        // It lives as long as the response's body, which the server drains on its way out.
        let _task = tokio::spawn(async move { self.send_all(events, &send).await });
        let mut response = Response::new(Body::from_stream(ReceiverStream::new(receive)));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        versioned(response, version)
    }

    /// `None` once the client is gone.
    async fn send_all(mut self, events: Vec<mpsc::Receiver<Event>>, send: &Sender) -> Option<()> {
        let count = events.len();
        if let Some(delta) = self.shape.opening() {
            for nth in 0..count {
                self.send_chunk(send, nth, delta.clone(), None).await?;
            }
        }
        let numbered = |(nth, events)| ReceiverStream::new(events).map(move |event| (nth, event)).boxed();
        let mut events = stream::select_all(events.into_iter().enumerate().map(numbered));
        let mut sent = vec![Sent::default(); count];
        let mut ended = 0;
        loop {
            let next = tokio::select! {
                next = events.next() => next,
                () = send.closed() => return None,
            };
            let fault = match next {
                Some((_, Event::Started { .. })) => continue,
                Some((nth, Event::Done(end))) => match self.record(nth, &sent[nth].text, &end).await {
                    Ok(()) => {
                        ended += 1;
                        self.send_chunk(send, nth, self.shape.closing(), Some(end.finish_reason)).await?;
                        continue;
                    }
                    Err(error) => error,
                },
                Some((nth, Event::Text { text, logprobs })) => {
                    let shown = self.asked.top_logprobs.map(|_| logprobs.as_slice());
                    if !text.is_empty() || !logprobs.is_empty() {
                        let delta = self.shape.delta(&text, shown, sent[nth].characters);
                        self.send_chunk(send, nth, delta, None).await?;
                    }
                    sent[nth].text.push_str(&text);
                    sent[nth].characters += logprobs.iter().map(characters).sum::<usize>();
                    continue;
                }
                None if ended == count => break,
                Some((_, Event::Failed(_))) | None => ApiError::failed(),
            };
            return send_line(send, &self.end(fault, "failed").body()).await;
        }
        self.served();
        if self.asked.include_usage {
            let mut chunk = self.head(self.shape.chunk_object());
            chunk["choices"] = json!([]);
            chunk["usage"] = self.usage();
            send_line(send, &chunk).await?;
        }
        send.send(Ok(Bytes::from_static(b"data: [DONE]\n\n"))).await.ok()
    }

    async fn send_chunk(
        &self,
        send: &Sender,
        nth: usize,
        mut choice: Value,
        end: Option<FinishReason>,
    ) -> Option<()> {
        choice["index"] = json!(nth);
        choice["finish_reason"] = json!(end.map(FinishReason::as_str));
        if self.asked.n > 1 {
            choice["completion_id"] = json!(self.ids[nth]);
        }
        let mut chunk = self.head(self.shape.chunk_object());
        chunk["choices"] = json!([choice]);
        if self.asked.include_usage {
            chunk["usage"] = Value::Null;
        }
        send_line(send, &chunk).await
    }
}

async fn send_line(send: &Sender, value: &Value) -> Option<()> {
    send.send(Ok(line(value))).await.ok()
}

/// One event. JSON escapes line feeds, so that it never falls apart.
fn line(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let text = "a\n\ndata: [DONE]\r\n\u{2028}é";
        let bytes = line(&json!({ "text": text }));
        let event = str::from_utf8(&bytes).unwrap();
        let json = event.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
        assert!(!json.contains(['\n', '\r']), "{json}");
        assert_eq!(serde_json::from_str::<Value>(json).unwrap()["text"], text);
    }
}
