//! The loop as the operator sees it: scorecard, alarms, updates, versions.

use std::path::Path;

use axum::{
    Json,
    body::Bytes,
    extract::State as Extract,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::completion::{Alarm, InteractionType, SignalKind, Version};

use super::{Id, State, error::ApiError, fields::Fields};

type Result<T> = std::result::Result<T, ApiError>;

pub(super) async fn alignment(Extract(state): Extract<State>) -> Json<Value> {
    let rows: Vec<Value> = state
        .cycle
        .scorecard()
        .into_iter()
        .map(|row| {
            let mut value = json!(row);
            value["interaction"] =
                json!(row.interaction.as_ref().map_or(InteractionType::ALL, InteractionType::as_str));
            value
        })
        .collect();
    Json(json!({ "version": state.registry.active(), "signals": rows }))
}

pub(super) async fn alarms(Extract(state): Extract<State>) -> Result<Json<Value>> {
    let alarms: Vec<Value> = state.cycle.alarms()?.iter().map(in_words).collect();
    Ok(Json(json!({ "data": alarms })))
}

fn in_words(alarm: &Alarm) -> Value {
    let mut value = json!(alarm);
    value["summary"] = json!(alarm.summary());
    value
}

pub(super) async fn acknowledge(Extract(state): Extract<State>, Id(id): Id) -> Result<Json<Value>> {
    let alarm = identifier(&id, "alarm")?;
    let alarm = off_runtime(move || state.cycle.acknowledge(alarm)).await??;
    alarm.map(|alarm| Json(in_words(&alarm))).ok_or_else(|| ApiError::not_found("id", format!("alarm {id}")))
}

/// Forgets baselines: `{"signal"?, "interaction"?}`; an empty body is all of them, as is the interaction `all`.
pub(super) async fn baseline(Extract(state): Extract<State>, body: Bytes) -> Result<Json<Value>> {
    let mut fields = Fields::parse(if body.is_empty() { b"{}" } else { &body })?;
    let signal = match fields.text("signal")? {
        None => None,
        Some(name) => match SignalKind::ALL.into_iter().find(|signal| signal.as_str() == name) {
            Some(signal) => Some(signal),
            None => {
                return fields
                    .wrong("signal", "must be one of refusal, satisfaction, helpfulness, kl, probes");
            }
        },
    };
    let interaction = fields.text("interaction")?.filter(|name| name != InteractionType::ALL);
    let interaction = interaction.map(|name| known(&name, "interaction")).transpose()?;
    fields.finish()?;
    Ok(Json(json!({ "reset": state.cycle.rebaseline(signal, interaction) })))
}

pub(super) async fn updates(Extract(state): Extract<State>) -> Result<Json<Value>> {
    let learning = state.cycle.why_not_learning().unwrap_or("ok");
    Ok(Json(json!({ "data": state.cycle.updates()?, "learning": learning })))
}

/// Starts an update by hand: `{"recipe"?, "interactions"?}`.
pub(super) async fn start_update(Extract(state): Extract<State>, body: Bytes) -> Result<Response> {
    let mut fields = Fields::parse(if body.is_empty() { b"{}" } else { &body })?;
    let recipe = fields.text("recipe")?.unwrap_or_else(|| "ppo".to_owned());
    let names = fields.list("interactions")?.unwrap_or_default();
    fields.finish()?;
    let interactions = names
        .iter()
        .enumerate()
        .map(|(nth, name)| known(name.as_str().unwrap_or_default(), &format!("interactions[{nth}]")))
        .collect::<Result<Vec<_>>>()?;
    let update = state.cycle.start_update(interactions, recipe)?;
    Ok((StatusCode::ACCEPTED, Json(json!(update))).into_response())
}

pub(super) async fn update(Extract(state): Extract<State>, Id(id): Id) -> Result<Json<Value>> {
    let update = state.cycle.update(identifier(&id, "update")?)?;
    update.map(|update| Json(json!(update))).ok_or_else(|| ApiError::not_found("id", format!("update {id}")))
}

pub(super) async fn cancel_update(Extract(state): Extract<State>, Id(id): Id) -> Result<Json<Value>> {
    let update = state.cycle.cancel_update(identifier(&id, "update")?)?;
    update.map(|update| Json(json!(update))).ok_or_else(|| ApiError::not_found("id", format!("update {id}")))
}

pub(super) async fn versions(Extract(state): Extract<State>) -> Result<Json<Value>> {
    let active = state.registry.active();
    let history = off_runtime(move || state.registry.history()).await??;
    Ok(Json(json!({ "active": active, "data": history })))
}

/// Takes in an adapter that was trained elsewhere: `{"adapter": DIR, "note"?}`, a directory of this machine. It is
/// not served before somebody promotes it.
pub(super) async fn stage_version(Extract(state): Extract<State>, body: Bytes) -> Result<Response> {
    let mut fields = Fields::parse(&body)?;
    let dir = fields.required_text("adapter")?;
    let note = fields.short_text("note", 2000)?.unwrap_or_else(|| "trained elsewhere".to_owned());
    fields.finish()?;
    let (now, parent) = ((state.clock)(), state.registry.active());
    let stage = move || state.registry.stage_foreign(Path::new(&dir), parent, note, now);
    let staged = off_runtime(stage).await??;
    Ok((StatusCode::CREATED, Json(json!(staged))).into_response())
}

/// Serves another version from the next request on; an older one is a roll-back.
pub(super) async fn promote(Extract(state): Extract<State>, Id(version): Id) -> Result<Json<Value>> {
    let number = numbered(&version)?;
    let now = (state.clock)();
    let promoted = off_runtime(move || state.registry.promote(number, now)).await??;
    Ok(Json(json!(promoted)))
}

/// `v3` or `3`.
pub(super) fn numbered(version: &str) -> Result<Version> {
    let number = version.strip_prefix('v').unwrap_or(version).parse();
    number.map(Version).map_err(|_| ApiError::not_found("version", format!("version {version}")))
}

/// For what waits for the disk, which would hold up other requests.
pub(super) async fn off_runtime<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(ApiError::internal)
}

pub(super) fn identifier(id: &str, what: &str) -> Result<Uuid> {
    id.parse().map_err(|_| ApiError::not_found("id", format!("{what} {id}")))
}

fn known(name: &str, param: &str) -> Result<InteractionType> {
    InteractionType::try_from(name.to_owned())
        .map_err(|error| ApiError::parameter(param, format!("is not valid: {error}")))
}
