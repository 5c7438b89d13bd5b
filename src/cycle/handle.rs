//! What the outside sees of the loop, and what it may ask of it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use uuid::Uuid;

use crate::completion::{
    Alarm, DriftState, FeedbackId, InteractionType, Outcome, ScorecardRow, SignalKind, Timestamp, Trigger,
    Update, UpdateState, Version,
};
use crate::drift::{self, Monitor};
use crate::signals::Probed;

use super::{Error, Parts, lock, readings::Key};

/// Alarms and updates that a listing shows at most.
const SHOWN: usize = 1000;

/// The recipes that an update may follow.
pub(super) const RECIPES: [&str; 7] = ["ppo", "rloo", "grpo", "dpo", "ipo", "kto", "sft"];

/// What an upstream without a local copy of its weights comes to.
const WITHOUT_MODEL: &str = "nothing is learned: policy.model names no local copy of the upstream's weights";

/// A handle on the loop; clones share it.
#[derive(Debug, Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

/// Why an update was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("update {running} is running; one runs at a time")]
    Busy { running: Uuid },
    #[error("{WITHOUT_MODEL}")]
    NoModel,
    #[error("recipe {recipe:?} is not one of {}", RECIPES.join(", "))]
    UnknownRecipe { recipe: String },
    #[error(transparent)]
    Cycle(#[from] Error),
}

/// What the loop's thread, the learner's thread and the handles have in common.
#[derive(Debug)]
pub(super) struct Shared {
    parts: Parts,
    monitor: Mutex<Monitor<Key>>,
    /// The update that runs or waits for the next tick.
    update: Mutex<Option<Update>>,
    cancelled: AtomicBool,
    /// How probes went since the last turn.
    probed: Mutex<Vec<Probed>>,
    pub(super) stop: AtomicBool,
}

/// An update that has just been decided on.
pub(super) fn new_update(
    trigger: Trigger,
    recipe: String,
    interactions: Vec<InteractionType>,
    base: Version,
    now: Timestamp,
) -> Update {
    Update {
        id: Uuid::now_v7(),
        at: now,
        trigger,
        recipe,
        interactions,
        base,
        state: UpdateState::Running { stage: WAITING.to_owned(), progress: 0.0 },
        feedback: Vec::new(),
        measures: BTreeMap::new(),
        data: None,
        proof: None,
        canary: None,
    }
}

/// The stage of an update that the loop has not picked up yet.
const WAITING: &str = "waiting";

impl Shared {
    pub(super) fn new(parts: Parts, monitor: Monitor<Key>) -> Self {
        Self {
            parts,
            monitor: Mutex::new(monitor),
            update: Mutex::new(None),
            cancelled: AtomicBool::new(false),
            probed: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    pub(super) fn monitor(&self) -> MutexGuard<'_, Monitor<Key>> {
        lock(&self.monitor)
    }

    /// The update that somebody asked for, if the loop has not begun it.
    pub(super) fn wish(&self) -> Option<Update> {
        lock(&self.update).clone()
    }

    pub(super) fn take_probed(&self) -> Vec<Probed> {
        std::mem::take(&mut lock(&self.probed))
    }

    pub(super) fn begin(&self, update: Update) {
        *lock(&self.update) = Some(update);
    }

    pub(super) fn end(&self) {
        *lock(&self.update) = None;
        self.cancelled.store(false, Ordering::Relaxed);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.stop.load(Ordering::Relaxed)
    }

    /// Whether somebody wants the running update to end.
    pub(super) fn is_unwanted(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The running update as it is shown.
    pub(super) fn shown(&self) -> Option<Update> {
        lock(&self.update).clone()
    }

    /// Changes the running update as it is shown.
    pub(super) fn revise(&self, revise: impl FnOnce(&mut Update)) -> Option<Update> {
        let mut update = lock(&self.update);
        if let Some(update) = &mut *update {
            revise(update);
        }
        update.clone()
    }

    pub(super) fn scorecard(&self) -> Vec<ScorecardRow> {
        let rows = self.monitor().rows();
        rows.into_iter()
            .map(|(key, row)| ScorecardRow {
                signal: key.signal,
                interaction: key.interaction,
                baseline: row.baseline,
                current: row.current,
                evidence_log10: row.evidence_log10,
                threshold_log10: row.threshold_log10,
                strict_log10: row.strict_log10,
                state: match row.state {
                    drift::State::Learning => DriftState::Learning,
                    drift::State::Steady => DriftState::Steady,
                    drift::State::Alarm => DriftState::Alarm,
                },
                n: row.n,
            })
            .collect()
    }
}

impl Handle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Ends the loop's thread at its next turn; a running update is cancelled.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Tells the loop how probes went.
    pub fn probed(&self, probed: Vec<Probed>) {
        lock(&self.shared.probed).extend(probed);
    }

    /// Why nothing is learned; `None` if it is.
    pub fn why_not_learning(&self) -> Option<&'static str> {
        self.shared.parts.engine.is_none().then_some(WITHOUT_MODEL)
    }

    /// Every watched stream as it stands.
    pub fn scorecard(&self) -> Vec<ScorecardRow> {
        self.shared.scorecard()
    }

    /// Newest first.
    ///
    /// # Errors
    /// The store fails.
    pub fn alarms(&self) -> Result<Vec<Alarm>, Error> {
        Ok(self.shared.parts.store.alarms(SHOWN)?)
    }

    /// `None` if there is no such alarm.
    ///
    /// # Errors
    /// The store fails.
    pub fn acknowledge(&self, id: Uuid) -> Result<Option<Alarm>, Error> {
        let store = &self.shared.parts.store;
        let Some(mut alarm) = store.alarm(id)? else { return Ok(None) };
        alarm.acknowledged = true;
        store.put_alarm(&alarm)?;
        // What is acknowledged is how things are now: the stream watches on from there.
        let key = Key { signal: alarm.signal, interaction: alarm.interaction.clone() };
        self.shared.monitor().relearn(&key);
        Ok(Some(alarm))
    }

    /// Forgets the baselines of all streams that fit and learns them anew; returns how many there were.
    pub fn rebaseline(&self, signal: Option<SignalKind>, interaction: Option<InteractionType>) -> usize {
        self.shared.monitor().reset(|key| {
            signal.is_none_or(|signal| key.signal == signal)
                && (interaction.is_none() || key.interaction == interaction)
        })
    }

    /// Newest first; a running one as it stands.
    ///
    /// # Errors
    /// The store fails.
    pub fn updates(&self) -> Result<Vec<Update>, Error> {
        let mut updates = self.shared.parts.store.updates(SHOWN)?;
        if let Some(running) = lock(&self.shared.update).clone() {
            updates.retain(|update| update.id != running.id);
            updates.insert(0, running);
        }
        Ok(updates)
    }

    /// # Errors
    /// The store fails.
    pub fn update(&self, id: Uuid) -> Result<Option<Update>, Error> {
        let running = lock(&self.shared.update).clone();
        match running.filter(|update| update.id == id) {
            Some(update) => Ok(Some(update)),
            None => Ok(self.shared.parts.store.update(id)?),
        }
    }

    /// Asks for an update; the loop begins it at its next turn.
    ///
    /// # Errors
    /// One is running, there is no such recipe, or no model to learn on.
    pub fn start_update(
        &self,
        interactions: Vec<InteractionType>,
        recipe: String,
    ) -> Result<Update, StartError> {
        if !RECIPES.contains(&recipe.as_str()) {
            return Err(StartError::UnknownRecipe { recipe });
        }
        if self.shared.parts.engine.is_none() {
            return Err(StartError::NoModel);
        }
        let mut slot = lock(&self.shared.update);
        if let Some(running) = &*slot {
            return Err(StartError::Busy { running: running.id });
        }
        let parts = &self.shared.parts;
        let update =
            new_update(Trigger::Hand, recipe, interactions, parts.registry.active(), (parts.clock)());
        *slot = Some(update.clone());
        Ok(update)
    }

    /// Forgets what a rater said, also where updates tell of him; returns the ids of what he said.
    ///
    /// # Errors
    /// The store fails.
    pub fn forget(&self, rater: &str) -> Result<Vec<FeedbackId>, Error> {
        let store = &self.shared.parts.store;
        let ids = store.forget(rater)?;
        let scrub = |update: &mut Update| {
            let Some(data) = &mut update.data else { return false };
            let before = data.weighed_down.len() + data.judges.len();
            data.weighed_down.retain(|note| note.rater != rater);
            data.judges.retain(|note| note.rater != rater);
            data.weighed_down.len() + data.judges.len() < before
        };
        for mut update in store.updates(SHOWN)? {
            if scrub(&mut update) {
                store.put_update(&update)?;
            }
        }
        self.shared.revise(|update| {
            scrub(update);
        });
        Ok(ids)
    }

    /// Cancels an update that runs; one that has ended is returned as it is, `None` is unknown.
    ///
    /// # Errors
    /// The store fails.
    pub fn cancel_update(&self, id: Uuid) -> Result<Option<Update>, Error> {
        let running = lock(&self.shared.update).clone();
        if let Some(mut update) = running.filter(|update| update.id == id) {
            self.shared.cancelled.store(true, Ordering::Relaxed);
            update.state =
                UpdateState::Ended { ended_at: (self.shared.parts.clock)(), outcome: Outcome::Cancelled };
            return Ok(Some(update));
        }
        Ok(self.shared.parts.store.update(id)?)
    }
}
