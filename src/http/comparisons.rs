//! `GET /v1/comparisons/next`, `POST /v1/comparisons/{id}` and `GET /label`: pairs of answers for people to compare.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json,
    body::Bytes,
    extract::{Query, State as Extract},
    http::{StatusCode, Uri, header},
    response::{Html, IntoResponse, Response},
};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::comparisons::{self, Candidate, Desk, Given, Pair};
use crate::completion::{Completion, Feedback, FeedbackId, Source, Version};
use crate::policy::{Engine, GenerateRequest, Sampling, Served};
use crate::store;

use super::{
    Backend, Id, State, answer,
    error::ApiError,
    feedback,
    fields::Fields,
    loop_routes::{identifier, off_runtime},
};

type Result<T> = std::result::Result<T, ApiError>;

/// What is on raters' desks, and how many second answers are sampled at a time.
#[derive(Debug)]
pub struct Comparisons {
    desk: Mutex<Desk>,
    sampling: Semaphore,
}

/// Second answers that are sampled at a time; who comes on top is told to come again.
const SAMPLING: usize = 2;
/// The newest answers that pairs are made of.
const LOOKED_AT: usize = 2000;
const PATIENCE: Duration = Duration::from_mins(2);

impl Comparisons {
    /// `seed` is that of the sides on which answers are shown.
    pub fn new(seed: u64) -> Self {
        Self { desk: Mutex::new(Desk::new(seed)), sampling: Semaphore::new(SAMPLING) }
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The newest answers with what was said of them, newest first.
///
/// # Errors
/// The store fails.
pub fn newest(state: &State) -> std::result::Result<Vec<(Completion, Vec<Feedback>)>, store::Error> {
    state.store.judged(..).rev().take(LOOKED_AT).collect()
}

/// The pairs that there are, and the answer to which a second one may be sampled.
fn open(
    state: &State,
    served: Version,
) -> std::result::Result<(Vec<Candidate>, Option<Completion>), store::Error> {
    let records = newest(state)?;
    let recorded = comparisons::candidates(&records, served);
    let desk = state.comparisons.desk();
    Ok((desk.with_sampled(recorded), desk.alone(&records, served).cloned()))
}

/// The page.
pub(super) async fn label() -> Response {
    // It loads nothing and talks to nobody else, whatever an answer has in it.
    const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
        connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, Html(include_str!("label.html"))).into_response()
}

/// A pair that the rater has not compared: `?rater=…` tells raters apart.
pub(super) async fn next(Extract(state): Extract<State>, uri: Uri) -> Result<Json<Value>> {
    let rater = rater(&uri)?;
    let rater = rater.as_deref();
    if let Some(given) = state.comparisons.desk().held(rater) {
        return Ok(Json(shown(given)));
    }
    let (reading, served) = (state.clone(), state.registry.active());
    let (candidates, alone) = off_runtime(move || open(&reading, served)).await??;
    let chosen = state.comparisons.desk().choose(candidates, rater);
    let pair = match (chosen, alone) {
        (Some(pair), _) => Some(pair),
        (None, Some(alone)) => sampled(&state, alone).await?,
        (None, None) => None,
    };
    let pair = pair.ok_or_else(ApiError::no_pair)?;
    Ok(Json(shown(&state.comparisons.desk().give(Uuid::now_v7(), rater, pair))))
}

fn rater(uri: &Uri) -> Result<Option<String>> {
    let refused = |why: &str| ApiError::parameter("rater", why);
    let Query(mut query) = Query::<BTreeMap<String, String>>::try_from_uri(uri)
        .map_err(|_| refused("must be given once, as text"))?;
    let rater = query.remove("rater");
    if let Some(other) = query.keys().next() {
        return Err(ApiError::unknown_parameter(other));
    }
    match &rater {
        Some(rater) if rater.is_empty() => Err(refused("must not be empty")),
        Some(rater) if rater.chars().count() > 256 => Err(refused("must have at most 256 characters")),
        _ => Ok(rater),
    }
}

/// Neither versions nor ids, which would tell which answer is newer.
fn shown(given: &Given) -> Value {
    let [a, b] = given.shown();
    json!({ "id": given.id, "prompt": given.pair.prompt, "a": a, "b": b })
}

/// A choice: `{"choice": "a" | "b" | "tie" | "skip", "rater"?, "comment"?}`.
pub(super) async fn choose(
    Extract(state): Extract<State>,
    Id(id): Id,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>)> {
    let known = identifier(&id, "comparison")?;
    let given = state.comparisons.desk().given(known).cloned();
    let given = given.ok_or_else(|| ApiError::not_found("id", format!("comparison {id}")))?;
    let read = |mut fields: Fields| {
        let choice = match fields.required_text("choice")?.as_str() {
            "a" => Some(given.side(true)),
            "b" => Some(given.side(false)),
            "tie" | "skip" => None,
            _ => return fields.wrong("choice", "must be one of a, b, tie, skip"),
        };
        let rater = fields.name("rater", 256)?.or_else(|| given.rater.clone());
        let comment = fields.short_text("comment", 20_000)?;
        fields.finish()?;
        Ok((choice, rater, comment))
    };
    let (choice, rater, comment) = read(Fields::parse(&body)?).map_err(ApiError::into_unprocessable)?;
    let (status, stored) = match choice {
        None => (StatusCode::OK, None),
        Some(better) => {
            let mut said = said(&given.pair, better, &state);
            // Once for each rater; who changes his mind says something else, and the last counts.
            let who =
                rater.as_deref().map_or_else(|| format!("given {known}"), |rater| format!("rater {rater}"));
            let (pair, lower) =
                (given.pair.key(), given.pair.answer(better) < given.pair.answer(better.other()));
            said.idempotency_key = Some(format!("comparison {pair:016x} {lower} {who}"));
            (said.rater, said.comment) = (rater.clone(), comment);
            let (status, id) = feedback::attach(&state, said).await?;
            (status, Some(id))
        }
    };
    state.comparisons.desk().answered(known, rater.as_deref());
    Ok((status, Json(json!({ "id": stored }))))
}

/// What is kept of a preference.
pub fn said(pair: &Pair, better: comparisons::Side, state: &State) -> Feedback {
    Feedback {
        id: FeedbackId::new(),
        at: (state.clock)(),
        completion: Some(pair.about),
        judgement: pair.preference(better),
        rater: None,
        source: Source::Human,
        comment: None,
        idempotency_key: None,
        tags: BTreeMap::new(),
    }
}

/// A recorded answer with a second one of the version in service, sampled behind clients; `None` where nothing samples, or
/// the same comes out.
async fn sampled(state: &State, recorded: Completion) -> Result<Option<Pair>> {
    let Backend::Embedded(engine) = &state.backend else { return Ok(None) };
    let Ok(_permit) = state.comparisons.sampling.try_acquire() else { return Err(ApiError::sampling()) };
    let asked = second_answer(state, engine, &recorded);
    let second = tokio::time::timeout(PATIENCE, asked).await.unwrap_or(Ok(None))?;
    let Some(second) = second.filter(|second| !second.trim().is_empty() && *second != recorded.answer) else {
        return Ok(None);
    };
    let pair = Pair { about: recorded.id, prompt: recorded.prompt, answers: [recorded.answer, second] };
    state.comparisons.desk().sampled(pair.clone());
    Ok(Some(pair))
}

async fn second_answer(state: &State, engine: &Engine, recorded: &Completion) -> Result<Option<String>> {
    let prompt = answer::encode(engine, &recorded.prompt).await?;
    let room = engine.context().saturating_sub(prompt.len());
    // As long as the first could become, and not much longer.
    let most = state.config.default_max_tokens.min(2 * recorded.completion_tokens + 64).min(room).max(1);
    let served: Served = state.registry.served().borrow().clone();
    if served.version != recorded.version {
        return Ok(None);
    }
    let request = GenerateRequest {
        prompt,
        sampling: Sampling { seed: Uuid::now_v7().as_u64_pair().1, ..Sampling::default() },
        max_tokens: most,
        stop: Vec::new(),
        top_logprobs: None,
        pinned: Some(served),
    };
    let events = engine.submit(request).map_err(|error| ApiError::not_taken(&error, "prompt"))?;
    Ok(answer::complete(events).await.map(|choice| choice.text))
}

/// A pair for a judge model: what `next` picks among those that there are, else one with a second answer that is sampled now.
///
/// # Errors
/// The store or the engine fails, in words.
pub async fn for_judge(
    state: &State,
    next: impl FnOnce(Vec<Candidate>) -> Option<Pair>,
) -> std::result::Result<Option<Pair>, String> {
    let (reading, served) = (state.clone(), state.registry.active());
    let read = tokio::task::spawn_blocking(move || open(&reading, served)).await;
    let (candidates, alone) = read.map_err(|fault| fault.to_string())?.map_err(|fault| fault.to_string())?;
    match (next(candidates), alone) {
        (None, Some(alone)) => sampled(state, alone).await.map_err(|error| error.message().to_owned()),
        (pair, _) => Ok(pair),
    }
}
