//! What upstream mode adds to a request's latency: a service on loopback that answers at once, asked at a fixed rate
//! (open loop: the next request does not wait for an answer), directly and through the sidecar by turns.

use std::{
    convert::Infallible,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{StreamExt, stream};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::{net::TcpListener, runtime::Runtime, sync::oneshot, time::MissedTickBehavior};

use crate::app::App;
use crate::cli::{Error, serve};
use crate::config::Config;

/// Between two requests: 500 a second.
const PAUSE: Duration = Duration::from_millis(2);
/// Requests of one turn; the first ones, which open connections, are not counted.
const REQUESTS: usize = 2500;
const WARM_UP: usize = 250;
/// Chunks of a streamed answer, and the time between them.
const CHUNKS: usize = 8;
const TOKEN: Duration = Duration::from_millis(5);

/// Latencies in microseconds: of whole answers to their last byte, of streams to their first.
#[derive(Debug, Clone, Copy)]
pub(super) struct Figures {
    pub(super) whole: Compared,
    pub(super) stream: Compared,
}

/// Quantiles without the sidecar and with it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Compared {
    pub(super) direct: Quantiles,
    pub(super) through: Quantiles,
}

type Figure = fn(&Compared) -> f64;

impl Compared {
    /// Each figure with its name.
    pub(super) const FIGURES: [(&'static str, Figure); 6] = [
        ("direct_p50", |compared| compared.direct.p50),
        ("direct_p99", |compared| compared.direct.p99),
        ("through_p50", |compared| compared.through.p50),
        ("through_p99", |compared| compared.through.p99),
        ("added_p50", |compared| compared.through.p50 - compared.direct.p50),
        ("added_p99", |compared| compared.through.p99 - compared.direct.p99),
    ];
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Quantiles {
    pub(super) p50: f64,
    pub(super) p99: f64,
}

/// The service, the sidecar, and who asks: each with threads of its own, as they would be apart.
pub(super) struct Bench {
    stub: SocketAddr,
    app: Option<App>,
    serving: Runtime,
    asking: Runtime,
    client: Client,
    dir: std::path::PathBuf,
    _stop: oneshot::Sender<()>,
}

impl Bench {
    /// # Errors
    /// An address is taken or a directory cannot be made.
    pub(super) fn start() -> Result<Self, Error> {
        let (stub, stop) = stub()?;
        let dir = std::env::temp_dir().join(format!("gyrostat-bench-upstream-{}", std::process::id()));
        let mut config = Config::default();
        config.http.bind = SocketAddr::from(([127, 0, 0, 1], 0));
        config.store.path.clone_from(&dir);
        config.upstream.url = Some(format!("http://{stub}/v1"));
        config.upstream.model = Some("stub".to_owned());
        let serving = serve::runtime()?;
        let app = Some(serving.block_on(App::start(config))?);
        let asking = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = Client::builder().no_proxy().build()?;
        Ok(Self { stub, app, serving, asking, client, dir, _stop: stop })
    }

    /// One turn of each kind.
    ///
    /// # Errors
    /// A request fails.
    pub(super) fn measure(&self) -> Result<Figures, Error> {
        Ok(Figures { whole: self.compare(false)?, stream: self.compare(true)? })
    }

    fn compare(&self, streamed: bool) -> Result<Compared, Error> {
        let sidecar = self.app.as_ref().map_or(self.stub, |app| app.address);
        let direct = self.asking.block_on(turn(&self.client, self.stub, streamed))?;
        let through = self.asking.block_on(turn(&self.client, sidecar, streamed))?;
        Ok(Compared { direct, through })
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(app) = self.app.take() {
            self.serving.block_on(app.stop(Duration::from_secs(10)));
        }
        // The scratch directory is ours alone; if it stays, the system's own clean-up takes it.
        let _left = std::fs::remove_dir_all(&self.dir);
    }
}

/// The service, on a thread of its own.
fn stub() -> Result<(SocketAddr, oneshot::Sender<()>), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0)))?;
    let address = listener.local_addr()?;
    let (stop, stopped) = oneshot::channel::<()>();
    let models = || async { Json(json!({ "object": "list", "data": [{ "id": "stub" }] })) };
    let router = Router::new().route("/v1/models", get(models)).route("/v1/chat/completions", post(answer));
    thread::Builder::new().name("stub".to_owned()).spawn(move || {
        let served = async {
            let listener = axum::serve::ListenerExt::tap_io(listener, |io| drop(io.set_nodelay(true)));
            axum::serve(listener, router).with_graceful_shutdown(async { drop(stopped.await) }).await
        };
        runtime.block_on(served)
    })?;
    Ok((address, stop))
}

async fn answer(body: Bytes) -> Response {
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let usage = json!({ "prompt_tokens": 31, "completion_tokens": 24, "total_tokens": 55 });
    if asked["stream"] == true {
        let chunk = |nth: usize| {
            let end = if nth + 1 == CHUNKS { json!("stop") } else { Value::Null };
            let choice = json!({ "index": 0, "delta": { "content": " word" }, "finish_reason": end });
            format!("data: {}\n\n", json!({ "id": "chatcmpl-s", "model": "stub", "choices": [choice] }))
        };
        let chunks = stream::iter((0..CHUNKS).map(chunk).chain(["data: [DONE]\n\n".to_owned()]));
        let paced = chunks.enumerate().then(|(nth, chunk)| async move {
            if nth > 0 && nth < CHUNKS {
                tokio::time::sleep(TOKEN).await;
            }
            Ok::<_, Infallible>(chunk)
        });
        let kind = [(axum::http::header::CONTENT_TYPE, "text/event-stream")];
        return (kind, Body::from_stream(paced)).into_response();
    }
    let text = "The Volga, which is about 3,530 km long and ends in the Caspian Sea, is the longest of them.";
    let message = json!({ "role": "assistant", "content": text });
    let choice = json!({ "index": 0, "message": message, "finish_reason": "stop" });
    Json(json!({ "id": "chatcmpl-w", "model": "stub", "choices": [choice], "usage": usage })).into_response()
}

/// Asks at the fixed rate, and waits for all answers at the end.
async fn turn(client: &Client, address: SocketAddr, streamed: bool) -> Result<Quantiles, Error> {
    let url = format!("http://{address}/v1/chat/completions");
    let body = json!({
        "model": "stub",
        "stream": streamed,
        "messages": [
            { "role": "system", "content": "You are a helpful assistant." },
            { "role": "user", "content": "Which is the longest river in Europe, and where does it end?" },
        ],
    })
    .to_string();
    let mut clock = tokio::time::interval(PAUSE);
    clock.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut pending = Vec::with_capacity(REQUESTS);
    for _ in 0..WARM_UP + REQUESTS {
        clock.tick().await;
        let (client, url, body) = (client.clone(), url.clone(), body.clone());
        pending.push(tokio::spawn(async move {
            let sent = Instant::now();
            let answer = client.post(url).body(body).send().await?.error_for_status()?;
            let mut bytes = answer.bytes_stream();
            let mut first = None;
            while let Some(chunk) = bytes.next().await {
                chunk?;
                first.get_or_insert_with(|| sent.elapsed());
            }
            let seconds = first.filter(|_| streamed).unwrap_or_else(|| sent.elapsed()).as_secs_f64();
            Ok::<_, reqwest::Error>(seconds * 1e6)
        }));
    }
    let mut latencies = Vec::with_capacity(REQUESTS);
    for answer in pending {
        latencies.push(answer.await??);
    }
    let mut latencies = latencies.split_off(WARM_UP);
    latencies.sort_by(f64::total_cmp);
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    Ok(Quantiles { p50: at(0.5), p99: at(0.99) })
}
