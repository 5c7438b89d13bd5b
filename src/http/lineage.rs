//! Where an answer comes from, and what came of a judgement; and how a person takes his judgements back.

use std::collections::BTreeSet;

use axum::{Json, extract::State as Extract};
use serde_json::{Value, json};

use crate::completion::{CompletionId, FeedbackId, Update, Version};
use crate::registry::VersionRecord;

use super::{
    Id, State,
    error::ApiError,
    loop_routes::{identifier, numbered, off_runtime},
};

type Result<T> = std::result::Result<T, ApiError>;

/// Everything that has been learned, newest first.
struct Past {
    updates: Vec<Update>,
    versions: Vec<VersionRecord>,
}

impl Past {
    async fn of(state: &State) -> Result<Self> {
        let (cycle, registry) = (state.cycle.clone(), state.registry.clone());
        off_runtime(move || Ok(Self { updates: cycle.updates()?, versions: registry.history()? })).await?
    }

    /// A version and what it was trained from, back to the base model, each with the feedback that shaped it.
    fn ancestry(&self, version: Version) -> Vec<Value> {
        let mut line = Vec::new();
        let mut next = Some(version);
        while let Some(record) =
            next.and_then(|version| self.versions.iter().find(|one| one.version == version))
        {
            let update = self.updates.iter().find(|update| Some(update.id) == record.update);
            line.push(json!({
                "version": record.version,
                "state": record.state,
                "update": record.update,
                "recipe": update.map(|update| &update.recipe),
                "feedback": update.map_or(&[][..], |update| &update.feedback),
            }));
            // A parent is older, so that this ends.
            next = (record.parent < record.version).then_some(record.parent);
        }
        line
    }

    /// The updates that learned from any of these, and the versions that came of them, and of those.
    fn learned(&self, ids: &BTreeSet<FeedbackId>) -> (Vec<&Update>, Vec<Version>) {
        let learned = |update: &&Update| update.feedback.iter().any(|id| ids.contains(id));
        let updates: Vec<&Update> = self.updates.iter().filter(learned).collect();
        let mut versions: Vec<Version> = Vec::new();
        for record in self.versions.iter().rev() {
            let own = record.update.is_some_and(|update| updates.iter().any(|one| one.id == update));
            if own || (record.version.0 > 0 && versions.contains(&record.parent)) {
                versions.push(record.version);
            }
        }
        (updates, versions)
    }

    fn shaped(&self, ids: &BTreeSet<FeedbackId>) -> Value {
        let (updates, versions) = self.learned(ids);
        let updates: Vec<_> = updates.iter().map(|update| update.id).collect();
        json!({ "updates": updates, "versions": versions })
    }
}

pub(super) async fn version(Extract(state): Extract<State>, Id(version): Id) -> Result<Json<Value>> {
    let number = numbered(&version)?;
    let registry = state.registry.clone();
    let record = off_runtime(move || registry.version(number)).await??;
    let mut value = json!(record);
    value["lineage"] = json!(Past::of(&state).await?.ancestry(number));
    Ok(Json(value))
}

/// From an answer to the feedback that shaped the version that gave it.
pub(super) async fn of_completion(Extract(state): Extract<State>, Id(id): Id) -> Result<Json<Value>> {
    let unknown = || ApiError::not_found("id", format!("completion {id}"));
    let known = match state.store.named(&id)? {
        Some(known) => known,
        None => id.parse::<CompletionId>().map_err(|_| unknown())?,
    };
    let completion = state.store.completion(known)?.ok_or_else(unknown)?;
    let said: Vec<_> = state.store.feedback_of(known)?.iter().map(|feedback| feedback.id).collect();
    let past = Past::of(&state).await?;
    Ok(Json(json!({
        "completion": known,
        "at": completion.at,
        "version": completion.version,
        "lineage": past.ancestry(completion.version),
        "feedback": said,
    })))
}

/// From a judgement to the versions that learned from it.
pub(super) async fn of_feedback(Extract(state): Extract<State>, Id(id): Id) -> Result<Json<Value>> {
    let known = FeedbackId(identifier(&id, "feedback")?);
    let feedback = state.store.feedback_by_id(known)?;
    let feedback = feedback.ok_or_else(|| ApiError::not_found("id", format!("feedback {id}")))?;
    let mut value = Past::of(&state).await?.shaped(&BTreeSet::from([known]));
    value["feedback"] = json!(known);
    value["completion"] = json!(feedback.completion);
    value["at"] = json!(feedback.at);
    value["kind"] = json!(feedback.judgement.kind());
    value["rater"] = json!(feedback.rater);
    Ok(Json(value))
}

/// Forgets what a person said, and names what learned from it.
pub(super) async fn forget(Extract(state): Extract<State>, Id(rater): Id) -> Result<Json<Value>> {
    let (cycle, name) = (state.cycle.clone(), rater.clone());
    let ids = off_runtime(move || cycle.forget(&name)).await??;
    let mut value = Past::of(&state).await?.shaped(&ids.iter().copied().collect());
    value["rater"] = json!(rater);
    value["feedback"] = json!(ids);
    Ok(Json(value))
}
