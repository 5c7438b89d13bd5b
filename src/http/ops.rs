//! For machines that look after machines: metrics, health, the list of models, the description of the interface.

use axum::{
    Json,
    body::Bytes,
    extract::State as Extract,
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use prometheus::{Encoder, TextEncoder};
use serde_json::{Value, json};

use super::{Backend, ROUTES, Route, State, error::ApiError, relay};

pub(super) async fn models(
    Extract(state): Extract<State>,
    head: Parts,
    body: Bytes,
) -> Result<Response, ApiError> {
    let engine = match &state.backend {
        Backend::Embedded(engine) => engine,
        Backend::Upstream(relay) => return relay::pass(relay, &head, body).await,
        Backend::Log => return Err(ApiError::replaying()),
    };
    let model = json!({ "id": engine.model_name(), "object": "model", "created": 0, "owned_by": "gyrostat" });
    Ok(Json(json!({ "object": "list", "data": [model] })).into_response())
}

pub(super) async fn metrics(Extract(state): Extract<State>) -> Result<Response, ApiError> {
    state.metrics.store_bytes.set(state.store.size_bytes()? as i64);
    let mut text = Vec::new();
    TextEncoder::new().encode(&state.prometheus.gather(), &mut text).map_err(ApiError::internal)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// Alive.
pub(super) async fn healthz() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// Warm, not on the way out, and able to write.
pub(super) async fn readyz(Extract(state): Extract<State>) -> Response {
    let active = state.registry.active();
    let fault = match (state.life.fault(), state.store.check()) {
        (Some(fault), _) => Some(fault.to_owned()),
        (None, Err(error)) => Some(error.to_string()),
        (None, Ok(())) => state.backend.check(active).await.err(),
    };
    let status = if fault.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({
        "status": fault.unwrap_or_else(|| "ok".to_owned()),
        "version": active,
        "learning": state.cycle.why_not_learning().unwrap_or("ok"),
        "model": state.backend.model_name(),
    });
    (status, Json(body)).into_response()
}

pub(super) async fn openapi() -> Json<Value> {
    Json(description())
}

pub(super) fn description() -> Value {
    let mut paths = serde_json::Map::new();
    for route in ROUTES {
        let mut operation = json!({
            "summary": route.summary,
            "parameters": parameters(route),
            "requestBody": route.schema.map(|name| json!({
                "required": true,
                "content": { "application/json": { "schema": { "$ref": format!("#/components/schemas/{name}") } } },
            })),
            "responses": {
                route.success: { "description": "done", "content": answers(route) },
                "4XX": { "description": "refused", "content": { "application/json": {
                    "schema": { "$ref": "#/components/schemas/Error" } } } },
            },
        });
        if let Some(object) = operation.as_object_mut() {
            object.retain(|_, value| !value.is_null());
        }
        let methods = paths.entry(route.path).or_insert_with(|| json!({}));
        methods[route.method] = operation;
    }
    let schemas: Value = serde_json::from_str(include_str!("schemas.json")).unwrap_or_default();
    json!({
        "openapi": "3.1.0",
        "info": { "title": "gyrostat", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": { "schemas": schemas },
    })
}

/// What a route answers, by content type. The data of each event of a stream is one object.
fn answers(route: &Route) -> Value {
    let reference = |name: &str| json!({ "schema": { "$ref": format!("#/components/schemas/{name}") } });
    let Some(name) = route.answer else {
        let kind = if route.path == "/label" { "text/html" } else { "text/plain" };
        return json!({ kind: { "schema": { "type": "string" } } });
    };
    let mut answers = json!({ "application/json": reference(name) });
    if matches!(name, "ChatCompletion" | "TextCompletion") {
        answers["text/event-stream"] = reference(&name.replace("Completion", "Chunk"));
    }
    answers
}

/// The parameters within braces of a path, and those of a query.
fn parameters(route: &Route) -> Vec<Value> {
    let named = |name: &str, place: &str| json!({ "name": name, "in": place, "required": place == "path", "schema": { "type": "string" } });
    let path = route.path.split(['{', '}']).skip(1).step_by(2).map(|name| named(name, "path"));
    let query = (route.path == "/v1/comparisons/next").then(|| named("rater", "query"));
    path.chain(query).collect()
}
