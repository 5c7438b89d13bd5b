//! The composition root: opens the store, starts engine and loop, builds the router, drains on the way out.

mod behind;
mod judging;
mod probing;
mod replay;
mod webhook;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus::Registry as Prometheus;
use tokio::{net::TcpListener, sync::oneshot};
use tracing::{info, warn};

use crate::completion::Timestamp;
use crate::config::Config;
use crate::cycle::{self, Cycle};
use crate::http::{self, recorder};
use crate::policy::{self, Engine, GenerateRequest, Model, Sampling, Served};
use crate::registry::{self, Registry};
use crate::signals::{self, Classifier, Interactions};
use crate::store::{self, Store};
use crate::upstream::{self, Upstream};

pub use judging::JudgeModel;
use judging::Judging;
use probing::{Asked, Probing};
pub use replay::Replay;
use webhook::Webhook;

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
    #[error(transparent)]
    Upstream(#[from] upstream::Error),
    #[error("http.{0} must be a number of seconds above 0")]
    Seconds(&'static str),
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("policy.model names no model")]
    NoModel,
    #[error("{} holds traffic already; a replay needs a folder of its own", .0.display())]
    NotEmpty(std::path::PathBuf),
    #[error("probes: {0}")]
    Probes(String),
    #[error("ai_feedback.{0}")]
    AiFeedback(String),
    #[error("cycle.webhook: {0}")]
    Webhook(String),
    #[error("http.bind: without keys ([http] keys) only a loopback address may be served, not {0}")]
    OpenWithoutKeys(SocketAddr),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// The classifier that `signals.classifier` names, or the built-in one.
///
/// # Errors
/// The file cannot be read, or is none that `train classifier` wrote.
pub fn classifier(config: &signals::Config) -> Result<Arc<Classifier>, Error> {
    let Some(path) = &config.classifier else { return Ok(Classifier::built_in()?) };
    let fault =
        |fault: &dyn std::fmt::Display| signals::Error::Classifier(format!("{}: {fault}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| fault(&error))?;
    Ok(Arc::new(Classifier::from_bytes(&bytes).map_err(|error| fault(&error))?))
}

/// A running sidecar.
#[derive(Debug)]
pub struct App {
    /// Where it listens; the port is known even if 0 was asked for.
    pub address: SocketAddr,
    pub state: http::State,
    stop: Option<oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<()>,
    cycle: thread::JoinHandle<()>,
    /// What runs until the end: retention, and what follows the upstream.
    tasks: Vec<tokio::task::JoinHandle<()>>,
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
        let header_time = checked(&config.http)?;
        set_threads(config.policy.threads);
        let metrics = Prometheus::new();
        let pushed = upstream::Metrics::register(&metrics)?;
        let upstream = Upstream::new(&config.upstream, pushed.clone())?;
        let model = local_model(&config.policy, upstream.is_some())?;
        let store = Store::open(&config.store)?;
        let registry = Arc::new(open_versions(&config, model.as_deref())?);
        let engine_metrics = policy::Metrics::register(&metrics)?;
        let start_engine =
            |model| Engine::start(model, &config.policy, registry.served(), engine_metrics.clone());
        let engine = model.map(start_engine).transpose()?;
        let (webhook, probes, seed) = (config.cycle.webhook.clone(), config.probes, config.cycle.seed);
        let judged = (config.ai_feedback, config.learn.dataset.clone());
        let interactions = Arc::new(Interactions::new(&config.signals, classifier(&config.signals)?)?);
        let (cycle, handle) = Cycle::new(cycle::Parts {
            store: Arc::clone(&store),
            registry: Arc::clone(&registry),
            engine: engine.clone(),
            metrics: cycle::Metrics::register(&metrics)?,
            config: config.cycle,
            drift: config.drift,
            learn: config.learn,
            gate: config.gate,
            canary: config.canary,
            classifier: Arc::clone(interactions.classifier()),
            clock: now,
        })?;
        let listener = TcpListener::bind(config.http.bind).await?;
        let address = listener.local_addr()?;
        let http_metrics = Arc::new(http::Metrics::register(&metrics)?);
        let backend = match (upstream, engine) {
            (Some(upstream), _) => {
                let depth = engine_metrics.queue("recorder", config.upstream.record_queue);
                let (store, metrics) = (Arc::clone(&store), Arc::clone(&http_metrics));
                let interactions = Arc::clone(&interactions);
                let parts = recorder::Parts { upstream, store, metrics, interactions, depth };
                http::Backend::Upstream(behind::relay(parts, &config.upstream)?)
            }
            (None, Some(engine)) => http::Backend::Embedded(engine),
            (None, None) => return Err(Error::NoModel),
        };
        let state = http::State {
            backend,
            store,
            registry,
            cycle: handle,
            interactions,
            metrics: http_metrics,
            prometheus: metrics,
            config: Arc::new(config.http),
            clock: now,
            life: Arc::default(),
            comparisons: Arc::new(http::Comparisons::new(seed)),
        };
        let mut tasks = background(&state, &config.upstream, webhook.as_deref(), &probes)?;
        tasks.extend(Judging::new(&state, judged, &pushed)?.map(|it| tokio::spawn(it.follow())));
        let (stop, stopped) = oneshot::channel::<()>();
        // A dropped sender stops the server just like a sent word.
        let graceful = async { drop(stopped.await) };
        let router = http::router(state.clone());
        let server = tokio::spawn(http::serve::serve(listener, router, header_time, graceful));
        let cycle = cycle.start()?;
        if let http::Backend::Embedded(engine) = &state.backend {
            warm_up(engine).await;
        }
        state.life.warmed();
        info!(%address, model = state.backend.model_name(), "ready");
        Ok(Self { address, state, stop: Some(stop), server, cycle, tasks })
    }

    /// Answers what is under way, at most for `most`, while new requests are refused; then closes everything.
    pub async fn stop(mut self, most: Duration) {
        if tokio::time::timeout(most, self.state.life.drain()).await.is_err() {
            warn!(
                requests = self.state.life.under_way(),
                "some requests were still under way and are cut off"
            );
        }
        drop(self.stop.take());
        // Connections that are idle by now end at once.
        if tokio::time::timeout(Duration::from_secs(1), &mut self.server).await.is_err() {
            self.server.abort();
        }
        if let http::Backend::Upstream(relay) = &self.state.backend {
            let _recorded = tokio::time::timeout(most, relay.recorder.settled()).await;
        }
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
        self.state.cycle.stop();
        let cycle = self.cycle;
        // The loop ends at its next turn; a learner stops at its next micro-batch.
        let joined = tokio::task::spawn_blocking(move || cycle.join());
        if tokio::time::timeout(most, joined).await.is_err() {
            warn!("the loop did not end in time");
        }
    }
}

/// The time that a request's headers may take.
fn checked(config: &http::Config) -> Result<Duration, Error> {
    if config.keys.is_empty() && !config.bind.ip().is_loopback() {
        return Err(Error::OpenWithoutKeys(config.bind));
    }
    seconds("drain_seconds", config.drain_seconds)?;
    seconds("header_seconds", config.header_seconds)
}

/// What runs until the end beside the server.
fn background(
    state: &http::State,
    upstream: &upstream::Config,
    webhook: Option<&str>,
    probes: &signals::Probes,
) -> Result<Vec<tokio::task::JoinHandle<()>>, Error> {
    let (store, registry) = (&state.store, &state.registry);
    let mut tasks = vec![tokio::spawn(retain(Arc::clone(store)))];
    let asked = match &state.backend {
        http::Backend::Embedded(engine) => Asked::Engine(engine.clone(), registry.served()),
        http::Backend::Upstream(relay) => {
            tasks.push(behind::follow(registry, &relay.upstream, upstream));
            Asked::Upstream(relay.upstream.clone(), Arc::clone(registry))
        }
        http::Backend::Log => return Err(Error::NoModel),
    };
    let probing =
        Probing::new(probes, Arc::clone(state.interactions.classifier()), asked, state.cycle.clone())?;
    tasks.extend(probing.map(|probing| tokio::spawn(probing.follow())));
    if let Some(url) = webhook {
        let webhook = Webhook::new(url, Arc::clone(store), &state.prometheus)?;
        tasks.push(tokio::spawn(webhook.follow()));
    }
    Ok(tasks)
}

fn seconds(field: &'static str, seconds: f64) -> Result<Duration, Error> {
    let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
    duration.ok_or(Error::Seconds(field))
}

/// The versions on disk; where no model runs here, their adapters are loaded by somebody else.
fn open_versions(config: &Config, model: Option<&Model>) -> Result<Registry, Error> {
    let architecture = model.map(|model| model.decoder.architecture.clone());
    let load = move |dir: &std::path::Path| {
        architecture.as_ref().map(|architecture| policy::Adapter::load(dir, architecture)).transpose()
    };
    Ok(Registry::open(&config.store.path.join("versions"), load)?)
}

/// The model that runs here. Behind an upstream it is a copy of the upstream's weights, which somebody has to name:
/// the default model is hardly what the upstream serves.
fn local_model(config: &policy::Config, has_upstream: bool) -> Result<Option<Arc<Model>>, Error> {
    if has_upstream && config.model == "default" {
        return Ok(None);
    }
    let model = Model::load(&config.model, config.device)?;
    model.vocabulary.set_clock(now);
    Ok(Some(Arc::new(model)))
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
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
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
