//! The simulated users' side of HTTP.

use std::net::SocketAddr;

use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use super::{
    Error,
    users::{Asked, satisfies},
};

/// Requests that are under way together.
const TOGETHER: usize = 32;

#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
    max_tokens: usize,
}

impl Client {
    pub(super) fn new(address: SocketAddr, max_tokens: usize) -> Self {
        Self { http: reqwest::Client::new(), base: format!("http://{address}"), max_tokens }
    }

    /// Asks everything, and sends each user's thumb after so many changes.
    pub(super) async fn serve(&self, asked: &[Asked], changes: usize) -> Result<(), Error> {
        stream::iter(asked)
            .map(|asked| async move {
                let (id, answer) = self.ask(asked).await?;
                let thumb = asked.judge(&answer, changes);
                let body =
                    json!({ "kind": "thumbs", "value": thumb, "completion_id": id, "rater": asked.user });
                self.post("/v1/feedback", &body).await.map(drop)
            })
            .buffer_unordered(TOGETHER)
            .try_collect()
            .await
    }

    /// How many answers satisfy after so many changes, measured by the rule itself; no feedback is sent.
    pub(super) async fn satisfied(&self, asked: &[Asked], changes: usize) -> Result<usize, Error> {
        let satisfied: Vec<bool> = stream::iter(asked)
            .map(|asked| async move {
                let (_, answer) = self.ask(asked).await?;
                Ok::<_, Error>(satisfies(asked.interaction, &answer, changes))
            })
            .buffer_unordered(TOGETHER)
            .try_collect()
            .await?;
        Ok(satisfied.into_iter().filter(|satisfied| *satisfied).count())
    }

    /// The id and the text of an answer.
    pub(super) async fn ask(&self, asked: &Asked) -> Result<(String, String), Error> {
        let body = json!({
            "model": "default",
            "messages": [
                { "role": "system", "content": "You are a helpful assistant." },
                { "role": "user", "content": asked.text },
            ],
            "max_tokens": self.max_tokens,
            "temperature": 1,
            "seed": asked.seed,
            "user": asked.user,
            "metadata": { "interaction": asked.interaction },
        });
        let reply = self.post("/v1/chat/completions", &body).await?;
        let text = reply["choices"][0]["message"]["content"].as_str().unwrap_or_default();
        Ok((reply["id"].as_str().unwrap_or_default().to_owned(), text.to_owned()))
    }

    pub(super) async fn alignment(&self) -> Result<Vec<Value>, Error> {
        self.list("/v1/alignment", "signals").await
    }

    /// Newest first.
    pub(super) async fn alarms(&self) -> Result<Vec<Value>, Error> {
        self.list("/v1/alarms", "data").await
    }

    /// Newest first.
    pub(super) async fn updates(&self) -> Result<Vec<Value>, Error> {
        self.list("/v1/updates", "data").await
    }

    pub(super) async fn versions(&self) -> Result<Vec<Value>, Error> {
        self.list("/v1/versions", "data").await
    }

    async fn list(&self, route: &str, field: &str) -> Result<Vec<Value>, Error> {
        let reply = self.http.get(format!("{}{route}", self.base)).send().await?;
        let mut body = accepted(route, reply).await?;
        Ok(match body[field].take() {
            Value::Array(items) => items,
            _ => Vec::new(),
        })
    }

    async fn post(&self, route: &str, body: &Value) -> Result<Value, Error> {
        let reply = self.http.post(format!("{}{route}", self.base)).json(body).send().await?;
        accepted(route, reply).await
    }
}

async fn accepted(route: &str, reply: reqwest::Response) -> Result<Value, Error> {
    let status = reply.status();
    if status.is_success() {
        return Ok(reply.json().await?);
    }
    Err(Error::Refused { route: route.to_owned(), status: status.as_u16(), body: reply.text().await? })
}
