//! Logged traffic through signals and detectors, as if it were live.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::{StreamExt, TryStreamExt, stream};
use prometheus::Registry as Prometheus;
use tokio::net::TcpListener;

use crate::completion::{Alarm, Completion, Feedback, ScorecardRow, Timestamp};
use crate::config::Config;
use crate::cycle::{self, Cycle};
use crate::http::{self, Logged};
use crate::registry::Registry;
use crate::signals::Interactions;
use crate::store::{self, Store};

use super::{Error, checked, classifier};

/// A sidecar without a model. Its clock is the log's; it detects and never learns.
#[derive(Debug)]
pub struct Replay {
    cycle: Cycle,
    state: http::State,
}

/// One thing that happened.
#[derive(Debug)]
enum Happened {
    Answered(Box<Completion>),
    Judged(Box<Feedback>),
}

/// What is written before the loop turns.
const EVENTS: usize = 500;

impl Replay {
    /// Opens an empty store.
    ///
    /// # Errors
    /// The store is in use or holds traffic already: old and new answers would be told apart by nothing.
    pub fn new(config: Config) -> Result<Self, Error> {
        let metrics = Prometheus::new();
        let store = Store::open(&config.store)?;
        if store.counts() != store::Counts::default() {
            return Err(Error::NotEmpty(config.store.path));
        }
        let registry = Arc::new(Registry::open(&config.store.path.join("versions"), |_| Ok(None))?);
        let interactions = Arc::new(Interactions::new(&config.signals, classifier(&config.signals)?)?);
        let (cycle, handle) = Cycle::new(cycle::Parts {
            store: Arc::clone(&store),
            registry: Arc::clone(&registry),
            engine: None,
            metrics: cycle::Metrics::register(&metrics)?,
            config: config.cycle,
            drift: config.drift,
            learn: config.learn,
            gate: config.gate,
            canary: config.canary,
            classifier: Arc::clone(interactions.classifier()),
            clock: super::now,
        })?;
        let life = Arc::new(http::Life::default());
        life.warmed();
        let state = http::State {
            backend: http::Backend::Log,
            store,
            registry,
            cycle: handle,
            interactions,
            metrics: Arc::new(http::Metrics::register(&metrics)?),
            prometheus: metrics,
            config: Arc::new(config.http),
            clock: super::now,
            life,
            comparisons: Arc::new(http::Comparisons::new(0)),
        };
        Ok(Self { cycle, state })
    }

    /// What tells the types of interaction apart.
    pub fn interactions(&self) -> &Interactions {
        &self.state.interactions
    }

    /// Shows metrics, scorecard and alarms on `http.bind` from now on; returns where.
    ///
    /// # Errors
    /// The address is taken, or open without keys.
    pub async fn listen(&self) -> Result<SocketAddr, Error> {
        let header_time = checked(&self.state.config)?;
        let listener = TcpListener::bind(self.state.config.bind).await?;
        let address = listener.local_addr()?;
        let router = http::router(self.state.clone());
        tokio::spawn(http::serve::serve(listener, router, header_time, std::future::pending()));
        Ok(address)
    }

    /// Feeds a log in the order of its times, `pace` events a second or as fast as it goes, calling `told` with the events that are done and the alarms that they raised.
    ///
    /// # Errors
    /// The store or a detector fails.
    pub async fn run(
        &mut self,
        log: Vec<Logged>,
        pace: Option<f64>,
        mut told: impl FnMut(usize, &[Alarm]),
    ) -> Result<(), Error> {
        let mut events = in_order(log).into_iter().peekable();
        let mut known = 0;
        let most = pace.map_or(EVENTS, |pace| (pace / 4.0).clamp(1.0, EVENTS as f64) as usize);
        while events.peek().is_some() {
            let group: Vec<Happened> = events.by_ref().take(most).collect();
            let (count, now) = (group.len(), group.last().map_or(Timestamp(0), Happened::at));
            // Polled first to last, so that the store gets them in this order, and flushed together.
            let state = &self.state;
            stream::iter(group).map(|event| write(state, event)).buffered(EVENTS).try_collect::<()>().await?;
            self.cycle.tick(now)?;
            // Newest first.
            let alarms = self.state.cycle.alarms()?;
            let new: Vec<Alarm> =
                alarms[..alarms.len().saturating_sub(known)].iter().rev().cloned().collect();
            known = alarms.len();
            told(count, &new);
            if let Some(pace) = pace {
                tokio::time::sleep(Duration::from_secs_f64(count as f64 / pace)).await;
            }
        }
        Ok(())
    }

    /// Every watched stream as it stands.
    pub fn scorecard(&self) -> Vec<ScorecardRow> {
        self.state.cycle.scorecard()
    }
}

impl Happened {
    fn at(&self) -> Timestamp {
        match self {
            Self::Answered(completion) => completion.at,
            Self::Judged(feedback) => feedback.at,
        }
    }
}

/// An answer comes before what is said of it.
fn in_order(log: Vec<Logged>) -> Vec<Happened> {
    let mut events = Vec::new();
    for Logged { completion, feedback } in log {
        events.push(Happened::Answered(Box::new(completion)));
        events.extend(feedback.into_iter().map(|feedback| Happened::Judged(Box::new(feedback))));
    }
    events.sort_by_key(Happened::at);
    events
}

async fn write(state: &http::State, event: Happened) -> Result<(), store::Error> {
    match event {
        Happened::Answered(completion) => {
            state.store.append(&completion).await?;
            state.metrics.completion(&completion);
        }
        Happened::Judged(feedback) => {
            state.store.attach(&feedback).await?;
            state.metrics.feedback(&feedback);
        }
    }
    Ok(())
}
