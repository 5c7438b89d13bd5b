//! The composition root: opens the store, starts engine and loop, builds the router, drains on the way out.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus::Registry as Prometheus;
use tokio::{net::TcpListener, sync::oneshot};
use tracing::{info, warn};

use crate::completion::Timestamp;
use crate::config::Config;
use crate::cycle::{self, Cycle};
use crate::http;
use crate::policy::{self, Engine, GenerateRequest, Model, Sampling, Served};
use crate::registry::{self, Registry};
use crate::signals::{self, Interactions};
use crate::store::{self, Store};

/// What keeps the sidecar from starting or running.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Policy(#[from] policy::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Registry(#[from] registry::Error),
    #[error(transparent)]
    Cycle(#[from] cycle::Error),
    #[error(transparent)]
    Signals(#[from] signals::Error),
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("http.bind: without keys ([http] keys) only a loopback address may be served, not {0}")]
    OpenWithoutKeys(SocketAddr),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A running sidecar.
#[derive(Debug)]
pub struct App {
    /// Where it listens; the port is known even if 0 was asked for.
    pub address: SocketAddr,
    pub state: http::State,
    stop: Option<oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<io::Result<()>>,
    cycle: thread::JoinHandle<()>,
    retention: tokio::task::JoinHandle<()>,
}

/// Milliseconds since the epoch: the one place that reads the clock.
#[expect(
    clippy::disallowed_methods,
    reason = "time enters the program here and is an argument everywhere else"
)]
pub fn now() -> Timestamp {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(elapsed.as_millis() as u64)
}

impl App {
    /// Opens everything and begins to listen. Returns once requests are answered; `/readyz` says when the model is warm.
    ///
    /// # Errors
    /// The model cannot be loaded, the store is in use, the address is taken or open without keys.
    pub async fn start(config: Config) -> Result<Self, Error> {
        if config.http.keys.is_empty() && !config.http.bind.ip().is_loopback() {
            return Err(Error::OpenWithoutKeys(config.http.bind));
        }
        set_threads(config.policy.threads);
        let metrics = Prometheus::new();
        let model = Arc::new(Model::load(&config.policy.model)?);
        let store = Store::open(&config.store)?;
        let architecture = model.decoder.architecture.clone();
        let load = move |dir: &std::path::Path| policy::Adapter::load(dir, &architecture);
        let registry = Arc::new(Registry::open(&config.store.path.join("versions"), load)?);
        let engine =
            Engine::start(model, &config.policy, registry.served(), policy::Metrics::register(&metrics)?)?;
        let (cycle, handle) = Cycle::new(cycle::Parts {
            store: Arc::clone(&store),
            registry: Arc::clone(&registry),
            engine: Some(engine.clone()),
            metrics: cycle::Metrics::register(&metrics)?,
            config: config.cycle,
            drift: config.drift,
            learn: config.learn,
            gate: config.gate,
            clock: now,
        })?;
        let listener = TcpListener::bind(config.http.bind).await?;
        let address = listener.local_addr()?;
        let ready = Arc::new(AtomicBool::new(false));
        let state = http::State {
            backend: http::Backend::Embedded(engine.clone()),
            store: Arc::clone(&store),
            registry,
            cycle: handle,
            interactions: Arc::new(Interactions::new(&config.signals)?),
            metrics: Arc::new(http::Metrics::register(&metrics)?),
            prometheus: metrics,
            config: Arc::new(config.http),
            clock: now,
            ready: Arc::clone(&ready),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let router = http::router(state.clone());
        let graceful = async move {
            // A dropped sender stops the server just like a sent word.
            let _either = stopped.await;
        };
        let server =
            tokio::spawn(async move { axum::serve(listener, router).with_graceful_shutdown(graceful).await });
        let cycle = cycle.start()?;
        let retention = tokio::spawn(retain(store));
        warm_up(&engine).await;
        ready.store(true, Ordering::Release);
        info!(%address, model = engine.model_name(), "ready");
        Ok(Self { address, state, stop: Some(stop), server, cycle, retention })
    }

    /// Answers what is under way, at most for `most`, and closes everything.
    pub async fn stop(mut self, most: Duration) {
        self.state.ready.store(false, Ordering::Release);
        drop(self.stop.take());
        if tokio::time::timeout(most, &mut self.server).await.is_err() {
            warn!("some requests were still under way and are cut off");
            self.server.abort();
        }
        self.retention.abort();
        self.state.cycle.stop();
        let cycle = self.cycle;
        // The loop ends at its next turn; a learner stops at its next micro-batch.
        let joined = tokio::task::spawn_blocking(move || cycle.join());
        if tokio::time::timeout(most, joined).await.is_err() {
            warn!("the loop did not end in time");
        }
    }
}

/// Shares the device's threads out; later calls in one process change nothing.
fn set_threads(threads: usize) {
    if threads > 0 {
        let _set_before = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
}

/// One token through the whole model, so that the first client does not wait for cold memory.
async fn warm_up(engine: &Engine) {
    let Some(token) = engine.model().end_of_turn() else { return };
    let request = GenerateRequest {
        prompt: vec![token; 4],
        sampling: Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 },
        max_tokens: 1,
        stop: Vec::new(),
        top_logprobs: None,
        pinned: Some(Served::default()),
    };
    if let Ok(mut events) = engine.submit(request) {
        while events.recv().await.is_some() {}
    }
}

/// Forgets what is older or more than the configuration allows, every few minutes.
async fn retain(store: Arc<Store>) {
    const EVERY: Duration = Duration::from_mins(5);
    loop {
        tokio::time::sleep(EVERY).await;
        let store = Arc::clone(&store);
        let removed = tokio::task::spawn_blocking(move || store.retain(now())).await;
        match removed {
            Ok(Ok(removed)) => info!(?removed, "retention"),
            Ok(Err(fault)) => warn!(%fault, "retention failed"),
            Err(fault) => warn!(%fault, "retention failed"),
        }
    }
}
