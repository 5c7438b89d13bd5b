//! Puts what has passed into the store: on a thread of its own, so that no answer waits for it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use futures_util::future::join_all;
use prometheus::IntGauge;
use tokio::{runtime, sync::watch};
use tracing::warn;

use crate::completion::{Completion, CompletionId, FinishReason, InteractionType, Timestamp, Version};
use crate::http::{
    access::{Line, Told},
    metrics::{Metrics, Served},
    record,
    shape::Shape,
};
use crate::signals::{Classifier, Interactions};
use crate::store::Store;
use crate::upstream::{
    Upstream,
    answer::{Answer, Choice},
};

use super::request::{self, Asked};

/// A request that is over.
#[derive(Debug)]
pub(super) struct Job {
    /// The body as the client sent it.
    pub(super) asked: axum::body::Bytes,
    pub(super) shape: Shape,
    pub(super) at: Timestamp,
    pub(super) seconds: f64,
    /// Known of streams only.
    pub(super) first_token_seconds: Option<f64>,
    pub(super) version: Version,
    pub(super) ids: Vec<CompletionId>,
    pub(super) heard: Heard,
    pub(super) line: Option<Arc<Line>>,
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Heard {
    Whole(Vec<u8>),
    Streamed(Answer),
    /// No answer that could be kept; the metric label `outcome`.
    Nothing(&'static str),
}

/// The queue to the thread; clones share it. The thread ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Recorder {
    queue: mpsc::SyncSender<Job>,
    progress: Arc<Progress>,
}

#[derive(Debug)]
struct Progress {
    /// Jobs that were taken.
    submitted: watch::Sender<u64>,
    /// Jobs that are in the store, or given up.
    settled: watch::Sender<u64>,
    /// Of the jobs that wait, with requests and answers.
    bytes: AtomicUsize,
    metrics: Arc<Metrics>,
    depth: IntGauge,
}

/// What the thread works with.
#[derive(Debug, Clone)]
pub struct Parts {
    pub upstream: Upstream,
    pub store: Arc<Store>,
    pub metrics: Arc<Metrics>,
    pub interactions: Arc<Interactions>,
    /// Jobs that wait.
    pub depth: IntGauge,
}

/// Jobs that are written together at most.
const GROUP: usize = 256;
/// Between two groups. While there is traffic the thread sleeps instead of waiting for the queue, so that an answer on its
/// way neither wakes it nor shares its core with it.
const PAUSE: Duration = Duration::from_millis(5);
/// Bytes of requests and answers that wait at most.
const BYTES: usize = 256 << 20;

impl Job {
    fn size(&self) -> usize {
        let heard = match &self.heard {
            Heard::Whole(body) => body.len(),
            Heard::Streamed(answer) => answer.choices.values().map(|choice| choice.text.len()).sum(),
            Heard::Nothing(_) => 0,
        };
        self.asked.len() + heard
    }
}

impl Recorder {
    /// Starts the thread; at most `capacity` answers wait.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(parts: Parts, capacity: usize, runtime: runtime::Handle) -> std::io::Result<Self> {
        let (queue, jobs) = mpsc::sync_channel(capacity);
        let progress = Arc::new(Progress {
            submitted: watch::Sender::new(0),
            settled: watch::Sender::new(0),
            bytes: AtomicUsize::new(0),
            metrics: Arc::clone(&parts.metrics),
            depth: parts.depth.clone(),
        });
        let shared = Arc::clone(&progress);
        thread::Builder::new().name("recorder".to_owned()).spawn(move || {
            while let Ok(first) = jobs.recv() {
                let group: Vec<Job> = std::iter::once(first).chain(jobs.try_iter().take(GROUP - 1)).collect();
                let (count, bytes) = (group.len() as u64, group.iter().map(Job::size).sum());
                let completions: Vec<_> = group.into_iter().flat_map(|job| kept(&parts, job)).collect();
                runtime.block_on(join_all(completions.iter().map(|kept| write(&parts, kept))));
                shared.depth.sub(count as i64);
                shared.bytes.fetch_sub(bytes, Ordering::Relaxed);
                shared.settled.send_modify(|settled| *settled += count);
                thread::sleep(PAUSE);
            }
        })?;
        Ok(Self { queue, progress })
    }

    /// Queues an answer; where the queue is full, it is counted and forgotten.
    pub(super) fn submit(&self, job: Job) {
        self.progress.depth.inc();
        let (version, choices, size) = (job.version, job.ids.len() as u64, job.size());
        // Counted before it is queued: who waits for it must not miss it.
        self.progress.submitted.send_modify(|submitted| *submitted += 1);
        let waiting = self.progress.bytes.fetch_add(size, Ordering::Relaxed) + size;
        if waiting > BYTES || self.queue.try_send(job).is_err() {
            self.progress.bytes.fetch_sub(size, Ordering::Relaxed);
            self.progress.depth.dec();
            self.progress.settled.send_modify(|settled| *settled += 1);
            let other = InteractionType::other();
            self.progress.metrics.no_completion(&other, &version.to_string(), "unrecorded", choices);
        }
    }

    /// Returns once everything that was queued before is in the store, or given up.
    pub async fn settled(&self) {
        if let Some(mark) = self.mark() {
            self.reached(mark).await;
        }
    }

    /// How much was queued up to now; `None` if all of it is in the store.
    pub(in crate::http) fn mark(&self) -> Option<u64> {
        let submitted = *self.progress.submitted.borrow();
        (*self.progress.settled.borrow() < submitted).then_some(submitted)
    }

    /// Waits until so much is in the store; `false` if that takes too long.
    pub(in crate::http) async fn reached(&self, mark: u64) -> bool {
        const MOST: Duration = Duration::from_secs(10);
        let mut settled = self.progress.settled.subscribe();
        let waited = tokio::time::timeout(MOST, settled.wait_for(|settled| *settled >= mark)).await;
        waited.is_ok_and(|reached| reached.is_ok())
    }
}

/// An answer for the store, and the name that the upstream gave it.
struct Kept {
    completion: Completion,
    name: Option<String>,
}

async fn write(parts: &Parts, kept: &Kept) {
    let Kept { completion, name } = kept;
    match parts.store.append_named(completion, name.as_deref()).await {
        Ok(()) => parts.metrics.completion(completion),
        Err(fault) => {
            warn!(completion = %completion.id, %fault, "an answer was not recorded");
            let version = completion.version.to_string();
            parts.metrics.no_completion(&completion.interaction, &version, "unrecorded", 1);
        }
    }
}

/// Reads an answer's choices and counts the request.
fn kept(parts: &Parts, job: Job) -> Vec<Kept> {
    let asked = request::read(&job.asked, job.shape);
    let interaction = asked.as_ref().map_or_else(InteractionType::other, |asked| interaction(parts, asked));
    let outcome = match (&job.heard, &asked) {
        (Heard::Nothing(outcome), _) => Err(*outcome),
        (_, None) => Err("unrecorded"),
        (Heard::Whole(body), _) => Ok(Answer::whole(body)),
        (Heard::Streamed(answer), _) => Ok(answer.clone()),
    };
    let answer = outcome.and_then(|answer| if answer.is_complete() { Ok(answer) } else { Err("failed") });
    let version = job.version.to_string();
    match (answer, asked) {
        (Ok(answer), Some(asked)) => {
            count(parts, &job, &answer);
            let mut kept = Vec::new();
            for (index, choice) in &answer.choices {
                let classifier = parts.interactions.classifier();
                match completion(&job, &asked, (&interaction, classifier), (*index, choice), &answer) {
                    Some(completion) => {
                        let name = answer.id.as_ref().map(|id| nth_name(id, *index));
                        kept.push(Kept { completion, name });
                    }
                    None => parts.metrics.no_completion(&interaction, &version, "tool_calls", 1),
                }
            }
            kept
        }
        (outcome, _) => {
            let outcome = outcome.err().unwrap_or("unrecorded");
            parts.metrics.no_completion(&interaction, &version, outcome, job.ids.len() as u64);
            let (model, operation) = (model(parts), job.shape.operation());
            // A hang-up is nobody's error, and what could not be read was answered all the same.
            match outcome {
                "rejected" => parts.metrics.refused(operation, &model, "bad_request", job.seconds),
                "failed" => parts.metrics.refused(operation, &model, "server_error", job.seconds),
                _ => {}
            }
            Vec::new()
        }
    }
}

/// How feedback names one choice of an answer by the upstream's id.
pub(super) fn nth_name(id: &str, index: usize) -> String {
    if index == 0 { id.to_owned() } else { format!("{id}#{index}") }
}

fn model(parts: &Parts) -> String {
    parts.upstream.model().unwrap_or("upstream").to_owned()
}

/// The caller's tag where it is a valid one, or what the request looks like.
fn interaction(parts: &Parts, asked: &Asked) -> InteractionType {
    let tag = asked.metadata.get("interaction").and_then(|tag| parts.interactions.tagged(tag).ok());
    let request = asked.prompts.first().map_or("", |prompt| prompt.request());
    tag.unwrap_or_else(|| parts.interactions.classify(request))
}

/// OpenTelemetry's figures and the access log's line.
fn count(parts: &Parts, job: &Job, answer: &Answer) {
    let pieces = |choice: &Choice| choice.pieces;
    let streamed = matches!(job.heard, Heard::Streamed(_));
    let most_pieces = answer.choices.values().map(pieces).max().unwrap_or(0);
    let counted = answer.usage.map(|usage| usage.completion_tokens);
    let tokens = counted.or_else(|| streamed.then(|| answer.choices.values().map(pieces).sum()));
    let prompt_tokens = answer.usage.map(|usage| usage.prompt_tokens);
    let model = model(parts);
    parts.metrics.served(Served {
        operation: job.shape.operation(),
        model: &model,
        seconds: job.seconds,
        first_token_seconds: job.first_token_seconds,
        prompt_tokens,
        completion_tokens: tokens,
        most_tokens: if answer.choices.len() == 1 { tokens.unwrap_or(most_pieces) } else { most_pieces },
    });
    if let Some(line) = &job.line {
        line.tell(Told { model, version: job.version, input_tokens: prompt_tokens, output_tokens: tokens });
    }
}

/// `None` for a choice without words, such as a call of a tool.
fn completion(
    job: &Job,
    asked: &Asked,
    (interaction, classifier): (&InteractionType, &Classifier),
    (index, choice): (usize, &Choice),
    answer: &Answer,
) -> Option<Completion> {
    let is_call = matches!(choice.finish_reason.as_deref(), Some("tool_calls" | "function_call"));
    if is_call && choice.text.is_empty() {
        return None;
    }
    let request = record::Request {
        at: job.at,
        prompt: asked.prompts.get(index / asked.n).or(asked.prompts.first())?,
        interaction,
        risk: asked.risk,
        user: asked.user.as_deref(),
        metadata: &asked.metadata,
    };
    let usage = answer.usage.unwrap_or_default();
    let alone = answer.choices.len() == 1 && answer.usage.is_some();
    Some(record::completion(
        request,
        record::Answer {
            id: job.ids.get(index).copied().unwrap_or_default(),
            version: job.version,
            text: &choice.text,
            finish_reason: match choice.finish_reason.as_deref() {
                Some("length") => FinishReason::Length,
                _ => FinishReason::Stop,
            },
            prompt_tokens: usage.prompt_tokens,
            // The upstream counts all choices together; of one among several the pieces are what is known.
            completion_tokens: if alone { usage.completion_tokens } else { choice.pieces },
            kl: None,
            seconds: job.seconds,
        },
        classifier,
    ))
}
