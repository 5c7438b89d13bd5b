//! The loop: what people say becomes signals, signals become evidence, evidence becomes an update, a proven update is
//! served. [`Cycle::tick`] is the whole of it.

mod cause;
mod handle;
mod helpfulness;
mod learner;
mod memory;
mod metrics;
mod readings;
mod scoring;
mod trial;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::canary;
use crate::completion::{
    Alarm, Cause, Direction, InteractionType, Outcome, Share, SignalKind, Timestamp, Trigger, Update,
    UpdateState, Version,
};
use crate::drift::{self, Monitor};
use crate::gate;
use crate::learn;
use crate::policy::Engine;
use crate::registry::{self, Registry};
use crate::signals::Classifier;
use crate::store::{self, Event, Store};

pub use handle::{Handle, StartError};
pub use metrics::Metrics;
pub use readings::every_reading;
pub use scoring::{Compared, side_by_side};

use cause::Recent;
use handle::Shared;
use helpfulness::{Reference, Scorer};
use learner::{Learned, Learner};
use memory::{Circles, Memory};
use readings::{Key, Reading};
use trial::Trial;

/// When the loop turns, and when it learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Milliseconds between two looks at what was recorded.
    pub tick_ms: u64,
    /// Whether an alarm starts an update by itself.
    pub learn_on_alarm: bool,
    /// Judged answers that an update needs; an alarm waits until there are so many.
    pub minimum_feedback: usize,
    /// `ppo`, `rloo`, `grpo`, `dpo`, `ipo`, `kto` or `sft`.
    pub recipe: String,
    /// Answers of earlier versions that an update learns from again, for each new one.
    pub rehearsal: f64,
    /// Prompts of the gate split on which candidate and incumbent answer side by side, at most.
    pub gate_prompts: usize,
    /// The share of answers whose helpfulness is told by the served version's reward model, once it has one.
    pub scored_share: f64,
    /// Seed of everything that learning draws.
    pub seed: u64,
    /// Where alarms are sent, in the form of Alertmanager's webhooks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub webhook: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tick_ms: 1000,
            learn_on_alarm: true,
            minimum_feedback: 200,
            recipe: "ppo".to_owned(),
            rehearsal: 0.5,
            gate_prompts: 64,
            scored_share: 0.25,
            seed: 0,
            webhook: None,
        }
    }
}

/// What stops one turn of the loop; serving does not notice.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Registry(#[from] registry::Error),
    #[error(transparent)]
    Learn(#[from] learn::Error),
    #[error("detector state: {0}")]
    State(String),
    #[error("detector state: {0}")]
    Drift(#[from] drift::Error),
}

/// Everything that the loop reads and writes.
#[derive(Debug, Clone)]
pub struct Parts {
    pub store: Arc<Store>,
    pub registry: Arc<Registry>,
    /// The model that the learner works on; without one, nothing is learned.
    pub engine: Option<Engine>,
    pub metrics: Metrics,
    pub config: Config,
    pub drift: drift::Config,
    pub learn: learn::Config,
    pub gate: gate::Config,
    pub canary: canary::Config,
    /// Tells refusals and risks of what the gate compares.
    pub classifier: Arc<Classifier>,
    /// Reads the clock.
    pub clock: fn() -> Timestamp,
}

/// An alarm that waits for feedback enough to learn from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Reason {
    alarm: Alarm,
    /// Judgements of the alarming type since the change.
    judged: usize,
}

/// The loop's own memory.
#[derive(Debug)]
pub struct Cycle {
    parts: Parts,
    shared: Arc<Shared>,
    /// The next entry of the store's journal to be sensed.
    cursor: u64,
    /// The version that the streams are about.
    version: Version,
    recent: Recent,
    circles: Circles,
    scorer: Option<Scorer>,
    helpfulness: Reference,
    cause: Option<Reason>,
    learner: Option<Learner>,
    trial: Option<Trial>,
}

impl Cycle {
    /// Picks up where the last process stopped.
    ///
    /// # Errors
    /// The store cannot be read, or its detector state is damaged.
    pub fn new(parts: Parts) -> Result<(Self, Handle), Error> {
        let (mut memory, cursor) = memory::restore(&parts)?;
        let version = memory.version;
        let on_trial = trial::resume(&parts, memory.trial)?;
        let monitor = match Monitor::restore(parts.drift.clone(), memory.monitor) {
            Err(fault @ drift::Error::State(_)) => {
                warn!(%fault, "what an older program had learned of the traffic is not taken over; baselines are learned anew");
                memory.circles = Circles::default();
                Monitor::new(parts.drift.clone())?
            }
            restored => restored?,
        };
        let shared = Arc::new(Shared::new(parts.clone(), monitor));
        let trial = on_trial.map(|(trial, update)| {
            shared.begin(update);
            trial
        });
        let mut cycle = Self {
            shared: Arc::clone(&shared),
            parts,
            cursor,
            version,
            recent: Recent::default(),
            circles: memory.circles,
            scorer: None,
            helpfulness: memory.helpfulness,
            cause: memory.cause,
            learner: None,
            trial,
        };
        cycle.start_scorer();
        Ok((cycle, Handle::new(shared)))
    }

    /// Ticks on a thread of its own until every handle is gone.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(mut self) -> std::io::Result<thread::JoinHandle<()>> {
        thread::Builder::new().name("cycle".to_owned()).spawn(move || {
            while !self.shared.stop.load(Ordering::Relaxed) {
                if let Err(fault) = self.tick((self.parts.clock)()) {
                    error!(%fault, "a turn of the loop failed");
                }
                thread::sleep(Duration::from_millis(self.parts.config.tick_ms));
            }
            if let Some(learner) = self.learner.take() {
                learner.cancel();
            }
        })
    }

    /// One turn: sense what is new, look for drift, swap in what was learned and proven, learn from what drifted.
    ///
    /// # Errors
    /// The store or the registry fails. What was sensed is sensed again at the next turn.
    pub fn tick(&mut self, now: Timestamp) -> Result<(), Error> {
        self.follow_version();
        let before = self.cursor;
        let readings = self.sense(now)?;
        let alarms = self.detect(&readings);
        self.note(alarms, now)?;
        if self.cursor > before {
            self.remember()?;
        }
        if let Some((mut update, learned)) = self.finished()
            && let Some(outcome) = self.prove(&mut update, learned, now)?
        {
            self.close(update, outcome, now)?;
        }
        if let Some((update, outcome)) = self.rule(now)? {
            self.close(update, outcome, now)?;
            self.remember()?;
        }
        if let Some(update) = self.reason_to_learn(now) {
            self.learn(update)?;
        }
        let lag = self.parts.store.counts().next_seq.saturating_sub(self.cursor);
        self.parts.metrics.show(&self.shared.scorecard(), &self.parts.registry, lag);
        Ok(())
    }

    /// A version that was promoted, by us or by hand, starts a new reference.
    fn follow_version(&mut self) {
        let active = self.parts.registry.active();
        if active != self.version {
            info!(from = %self.version, to = %active, "the served version changed; baselines are learned anew");
            self.version = active;
            self.cause = None;
            self.recent = Recent::default();
            self.circles = Circles::default();
            self.monitor().reset(|_| true);
            self.start_scorer();
        }
    }

    /// The reward model of the served version, if it has one and there is a device to score on.
    fn start_scorer(&mut self) {
        if self.helpfulness.version != self.version {
            self.helpfulness = Reference::new(self.version);
        }
        let Parts { engine, registry, learn, config, .. } = &self.parts;
        let start =
            |(dir, engine): (PathBuf, &Engine)| Scorer::start(&dir, engine, &learn.pace, config.scored_share);
        let started = registry.path(self.version).zip(engine.as_ref()).map(start).transpose();
        self.scorer = match started {
            Ok(scorer) => scorer.flatten(),
            Err(fault) => {
                warn!(%fault, "helpfulness stays the rate of usable answers");
                None
            }
        };
    }

    fn monitor(&self) -> MutexGuard<'_, Monitor<Key>> {
        self.shared.monitor()
    }

    /// The readings of the newest journal entries that are about the served version.
    fn sense(&mut self, now: Timestamp) -> Result<Vec<Reading>, Error> {
        const ENTRIES: usize = 2000;
        let events = self.parts.store.events_since(self.cursor, ENTRIES)?;
        let mut readings = Vec::new();
        for (sequence, event) in events {
            readings.extend(readings::of_event(&event, &self.parts.store)?);
            if let (Some(scorer), Event::Completion(completion)) = (&self.scorer, &event)
                && completion.version == self.version
            {
                scorer.offer(completion);
            }
            self.cursor = sequence + 1;
        }
        if let Some(scorer) = &self.scorer {
            readings.retain(|reading| reading.signal.kind != SignalKind::Helpfulness);
            for (completion, score) in scorer.scored() {
                let quantile = self.helpfulness.quantile(score);
                readings.extend(quantile.map(|quantile| readings::of_score(&completion, quantile)));
            }
        }
        let probed = self.shared.take_probed().into_iter();
        readings.extend(probed.map(|probed| readings::of_probe(probed, self.version, now)));
        for reading in &readings {
            self.parts.metrics.reading(reading);
        }
        self.try_on(&readings);
        readings.retain(|reading| reading.signal.version == self.version);
        Ok(readings)
    }

    /// Shows each reading to its own stream and to that of the whole traffic.
    fn detect(&mut self, readings: &[Reading]) -> Vec<Alarm> {
        let mut alarms = Vec::new();
        for reading in readings {
            let Some(value) = reading.watched() else { continue };
            self.recent.push(reading);
            if let Some(cause) = &mut self.cause
                && reading.signal.kind == SignalKind::Satisfaction
                && cause.alarm.interaction.as_ref() == Some(&reading.signal.interaction)
            {
                cause.judged += 1;
            }
            let (key, whole) = (Key::of(&reading.signal), Key::whole(&reading.signal));
            let before = self.circles.before(reading);
            let shown = drift::Reading { value, at: reading.at.0, kin: before };
            let observed = self.monitor().observe(&key, &whole, key.stream_kind(), shown);
            match observed {
                Ok(observed) => {
                    self.circles.note(reading, before, observed.deviation);
                    alarms.extend(observed.segment.map(|alarm| self.describe(&key, &alarm, reading.at)));
                    alarms.extend(observed.whole.map(|alarm| self.describe(&whole, &alarm, reading.at)));
                }
                Err(fault) => warn!(signal = key.signal.as_str(), %fault, "a reading was not taken"),
            }
        }
        alarms
    }

    /// The alarm in the words of the interface: whose change it is, and which answers show it.
    fn describe(&self, key: &Key, alarm: &drift::Alarm, now: Timestamp) -> Alarm {
        let since = Timestamp(alarm.change.at);
        let segments = match &key.interaction {
            Some(_) => Vec::new(),
            None => cause::segments(&self.monitor(), key.signal, since),
        };
        let shares = match &key.interaction {
            Some(interaction) => vec![Share { interaction: interaction.clone(), share: 1.0 }],
            None => cause::shares(&segments),
        };
        let cause = cause::of_alarm(alarm, &segments, &self.recent.raters(key, since));
        let direction = match alarm.direction {
            drift::Direction::Up => Direction::Up,
            drift::Direction::Down => Direction::Down,
        };
        Alarm {
            id: Uuid::now_v7(),
            at: now,
            signal: key.signal,
            interaction: key.interaction.clone(),
            version: self.version,
            direction,
            cause,
            baseline: alarm.baseline,
            current: alarm.current,
            evidence_log10: alarm.evidence_log10,
            threshold_log10: alarm.threshold_log10,
            strict_log10: alarm.strict_log10,
            change_at: Timestamp(alarm.change.at),
            change_from: Timestamp(alarm.change.from),
            change_to: Timestamp(alarm.change.to),
            samples_since_change: alarm.change.samples,
            shares,
            examples: self.recent.worst(key, since, direction),
            acknowledged: false,
        }
    }

    /// Puts detectors and cursor to disk together, so that a restart neither skips nor repeats a reading.
    fn remember(&self) -> Result<(), Error> {
        let memory = Memory {
            version: self.version,
            cause: self.cause.clone(),
            trial: self.trial.clone(),
            monitor: self.monitor().save(),
            circles: self.circles.clone(),
            helpfulness: self.helpfulness.clone(),
        };
        let saved = serde_json::to_vec(&memory).map_err(|error| Error::State(error.to_string()))?;
        self.parts.store.save_monitor(&saved, self.cursor)?;
        Ok(())
    }

    fn note(&mut self, alarms: Vec<Alarm>, now: Timestamp) -> Result<(), Error> {
        for alarm in alarms {
            let interaction =
                alarm.interaction.as_ref().map_or(InteractionType::ALL, InteractionType::as_str);
            warn!(
                signal = alarm.signal.as_str(),
                interaction,
                direction = alarm.direction.as_str(),
                cause = alarm.cause.as_str(),
                baseline = alarm.baseline,
                current = alarm.current,
                seconds_ago = now.0.saturating_sub(alarm.change_at.0) / 1000,
                "drift"
            );
            self.parts.metrics.alarm(&alarm);
            self.parts.store.put_alarm(&alarm)?;
            // The first complaint about one type names what to learn; the whole traffic's stream only confirms it.
            if self.cause.is_none() && calls_for_learning(&alarm) {
                self.cause = Some(Reason { judged: alarm.samples_since_change as usize, alarm });
            }
        }
        Ok(())
    }

    /// An alarm with feedback enough behind it, or somebody's wish.
    fn reason_to_learn(&mut self, now: Timestamp) -> Option<Update> {
        if self.learner.is_some() || self.trial.is_some() || self.parts.engine.is_none() {
            return None;
        }
        if let Some(update) = self.shared.wish() {
            return Some(update);
        }
        let config = &self.parts.config;
        let ready = |cause: &mut Reason| config.learn_on_alarm && cause.judged >= config.minimum_feedback;
        let alarm = self.cause.take_if(ready)?.alarm;
        let trigger = Trigger::Alarm { alarm: alarm.id };
        let interactions = alarm.interaction.into_iter().collect();
        Some(handle::new_update(trigger, config.recipe.clone(), interactions, self.version, now))
    }

    /// Starts the learner on its own thread.
    fn learn(&mut self, update: Update) -> Result<(), Error> {
        let Some(engine) = self.parts.engine.clone() else { return Ok(()) };
        info!(update = %update.id, recipe = update.recipe, "an update starts");
        self.parts.store.put_update(&update)?;
        self.shared.begin(update.clone());
        self.learner = Some(Learner::start(self.parts.clone(), engine, Arc::clone(&self.shared), update));
        Ok(())
    }

    /// The learner's result, once it has one.
    fn finished(&mut self) -> Option<(Update, Result<Learned, learner::Stopped>)> {
        let learner = self.learner.take_if(|learner| learner.is_finished())?;
        Some(learner.join())
    }

    /// Lets the gate judge the candidate, and swaps it in or puts it on trial if it may; no outcome yet where it is
    /// on trial.
    fn prove(
        &mut self,
        update: &mut Update,
        learned: Result<Learned, learner::Stopped>,
        now: Timestamp,
    ) -> Result<Option<Outcome>, Error> {
        let learned = match learned {
            Ok(learned) => learned,
            Err(stopped) => return Ok(Some(stopped.into())),
        };
        let verdict = gate::judge(&learned.incumbent, &learned.candidate, &self.parts.gate);
        update.proof = Some(verdict.proof.clone());
        let reasons = verdict.reasons();
        if !verdict.promote {
            return Ok(Some(Outcome::Rejected { reasons }));
        }
        let version = learned.stage(&self.parts, update, &reasons.join("; "), now)?;
        self.admit(update, version, now)
    }

    fn close(&mut self, mut update: Update, outcome: Outcome, now: Timestamp) -> Result<(), Error> {
        info!(update = %update.id, outcome = outcome.as_str(), "the update ended");
        self.parts.metrics.update(&update.recipe, &outcome);
        update.state = UpdateState::Ended { ended_at: now, outcome };
        self.parts.store.put_update(&update)?;
        self.shared.end();
        Ok(())
    }
}

/// Worse satisfaction or helpfulness, or another rate of refusals, of a type that is known: the policy can mend that.
fn calls_for_learning(alarm: &Alarm) -> bool {
    alarm.interaction.is_some()
        && alarm.cause == Cause::Model
        && match alarm.signal {
            SignalKind::Satisfaction | SignalKind::Helpfulness => alarm.direction == Direction::Down,
            SignalKind::Refusal => true,
            SignalKind::Kl | SignalKind::Probes => false,
        }
}

/// A lock whose holder panicked still guards whole values here: every change under it is a single assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
