//! Asks the probes of the model in service, again and again.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;
use tracing::{info, warn};

use crate::completion::Message;
use crate::cycle;
use crate::policy::{Engine, Event, GenerateRequest, Sampling, Served};
use crate::registry::Registry;
use crate::signals::{Classifier, Probe, Probed, Probes};
use crate::upstream::{Lease, Upstream};

use super::Error;

/// Who answers.
pub(super) enum Asked {
    Engine(Engine, watch::Receiver<Served>),
    Upstream(Upstream, Arc<Registry>),
}

pub(super) struct Probing {
    probes: Vec<Probe>,
    every: Duration,
    classifier: Arc<Classifier>,
    max_tokens: usize,
    asked: Asked,
    cycle: cycle::Handle,
}

/// Answers that are waited for together. They stand behind those of clients.
const TOGETHER: usize = 4;

impl Probing {
    /// `None` if there is nothing to ask.
    pub(super) fn new(
        config: &Probes,
        classifier: Arc<Classifier>,
        asked: Asked,
        cycle: cycle::Handle,
    ) -> Result<Option<Self>, Error> {
        let refused = |why: String| Error::Probes(why);
        if !(0.0..=1e6).contains(&config.every_minutes) {
            return Err(refused("every_minutes must be between 0 and 1000000".to_owned()));
        }
        let mut probes = Vec::new();
        if config.starters {
            probes.extend(Probe::read(Probe::STARTERS).map_err(refused)?);
        }
        if let Some(file) = &config.file {
            let at = |why: String| Error::Probes(format!("{}: {why}", file.display()));
            let text = std::fs::read_to_string(file).map_err(|fault| at(fault.to_string()))?;
            probes.extend(Probe::read(&text).map_err(at)?);
        }
        let every = Duration::from_secs_f64(60.0 * config.every_minutes);
        let nothing = probes.is_empty() || every.is_zero();
        Ok((!nothing).then_some(Self {
            probes,
            every,
            classifier,
            max_tokens: config.max_tokens,
            asked,
            cycle,
        }))
    }

    /// Goes on until it is aborted. The first round waits for its time: a start is busy enough.
    pub(super) async fn follow(self) {
        loop {
            tokio::time::sleep(self.every).await;
            let mut answered = Vec::new();
            for some in self.probes.chunks(TOGETHER) {
                answered
                    .extend(futures_util::future::join_all(some.iter().map(|probe| self.ask(probe))).await);
            }
            let probed: Vec<Probed> = answered.into_iter().flatten().collect();
            let passed = probed.iter().filter(|probed| probed.passed).count();
            info!(asked = self.probes.len(), answered = probed.len(), passed, "probes");
            self.cycle.probed(probed);
        }
    }

    /// `None` where there was no answer: that says nothing of the model.
    async fn ask(&self, probe: &Probe) -> Option<Probed> {
        let answer = match &self.asked {
            Asked::Engine(engine, served) => {
                let served = served.borrow().clone();
                self.generate(engine, served, &probe.prompt).await
            }
            Asked::Upstream(upstream, registry) => {
                // Held while it is asked: the version is not unloaded meanwhile.
                let lease = upstream.lease(registry.active());
                let model = lease.as_ref().map(Lease::name).or(upstream.model());
                let asked = upstream.ask(model, &probe.prompt, self.max_tokens, None).await;
                asked.map_err(|fault| warn!(%fault, "a probe was not answered")).ok()
            }
        };
        answer.map(|answer| probe.judge(&answer, &self.classifier))
    }

    async fn generate(&self, engine: &Engine, served: Served, prompt: &str) -> Option<String> {
        let prompt = engine.encode_chat(&[Message::user(prompt)]).ok()?;
        let seed = uuid::Uuid::now_v7().as_u64_pair().1;
        let request = GenerateRequest {
            prompt,
            sampling: Sampling { seed, ..Sampling::default() },
            max_tokens: self.max_tokens,
            stop: Vec::new(),
            top_logprobs: None,
            pinned: Some(served),
        };
        let mut events = engine.submit(request).ok()?;
        let mut answer = String::new();
        while let Some(event) = events.recv().await {
            match event {
                Event::Started { .. } => {}
                Event::Text { text, .. } => answer.push_str(&text),
                Event::Done(_) => return Some(answer),
                Event::Failed(_) => return None,
            }
        }
        None
    }
}
