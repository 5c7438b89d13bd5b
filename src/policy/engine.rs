//! One thread owns the device and runs many requests together.
//!
//! Every step decodes all running sequences at once and takes in new prompts in chunks beside them. A client that hung
//! up is dropped at the next step. A new adapter arrives over a `watch` channel between two steps; a sequence stays with
//! the version it began with.

mod sequence;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use candle_core::{Result as DeviceResult, Tensor};
use tokio::sync::{mpsc as events, watch};
use tracing::error;

use self::sequence::Sequence;
use super::{
    Batch, Config, Error, Metrics, Model,
    ops::read,
    request::{Event, GenerateRequest, Served, SubmitError},
};
use crate::completion::{Message, Version};

/// A handle on the engine's thread; clones share it. The thread ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    model: Arc<Model>,
    jobs: mpsc::SyncSender<Job>,
    served: watch::Receiver<Served>,
    load: Arc<Load>,
    queue: usize,
    context: usize,
}

/// How busy the engine is, shared with its handles.
#[derive(Debug, Default)]
struct Load {
    waiting: AtomicUsize,
    /// Requests of clients, waiting or running; rollouts of the learner are not counted.
    clients: AtomicUsize,
    finished: AtomicU64,
}

/// A request on its way to the thread.
struct Job {
    request: GenerateRequest,
    events: events::Sender<Event>,
    submitted: Instant,
}

impl Engine {
    /// Starts the thread. `served` brings the versions to serve.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        model: Arc<Model>,
        config: &Config,
        served: watch::Receiver<Served>,
        metrics: Metrics,
    ) -> Result<Self, Error> {
        let (jobs, queue) = mpsc::sync_channel(config.queue.max(1));
        let load = Arc::new(Load::default());
        metrics.queue_capacity.with_label_values(&["engine"]).set(config.queue as i64);
        metrics.queue_depth.with_label_values(&["engine"]).set(0);
        let context = model.decoder.architecture.context.min(config.cache_tokens);
        let mut device = Loop {
            model: Arc::clone(&model),
            config: config.clone(),
            served: served.clone(),
            load: Arc::clone(&load),
            metrics,
            queue,
            next: None,
            running: VecDeque::new(),
        };
        thread::Builder::new().name("engine".to_owned()).spawn(move || device.run())?;
        Ok(Self { inner: Arc::new(Inner { model, jobs, served, load, queue: config.queue, context }) })
    }

    /// Queues one sequence. Dropping the receiver cancels it.
    ///
    /// # Errors
    /// The queue is full, the sequence does not fit the context, or the thread has ended.
    pub fn submit(&self, request: GenerateRequest) -> Result<events::Receiver<Event>, SubmitError> {
        let (prompt, max_tokens, context) = (request.prompt.len(), request.max_tokens, self.inner.context);
        if prompt == 0 || prompt.saturating_add(max_tokens) > context {
            return Err(SubmitError::TooLong { prompt, max_tokens, context });
        }
        // One event a token, and the first and last ones: the thread never waits for a slow client.
        let (sender, receiver) = events::channel(max_tokens + 4);
        let load = &self.inner.load;
        let is_client = request.pinned.is_none();
        load.waiting.fetch_add(1, Ordering::Relaxed);
        load.clients.fetch_add(usize::from(is_client), Ordering::Relaxed);
        let job = Job { request, events: sender, submitted: Instant::now() };
        self.inner.jobs.try_send(job).map_err(|error| {
            load.waiting.fetch_sub(1, Ordering::Relaxed);
            load.clients.fetch_sub(usize::from(is_client), Ordering::Relaxed);
            match error {
                mpsc::TrySendError::Full(_) => SubmitError::QueueFull { limit: self.inner.queue },
                mpsc::TrySendError::Disconnected(_) => SubmitError::Stopped,
            }
        })?;
        Ok(receiver)
    }

    pub fn model(&self) -> &Arc<Model> {
        &self.inner.model
    }

    pub fn model_name(&self) -> &str {
        &self.inner.model.name
    }

    /// Tokens of prompt and answer together, at most.
    pub fn context(&self) -> usize {
        self.inner.context
    }

    /// The version that new requests get.
    pub fn served(&self) -> Version {
        self.inner.served.borrow().version
    }

    /// # Errors
    /// The chat template refuses the conversation.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        self.inner.model.vocabulary.encode_chat(messages)
    }

    /// # Errors
    /// The tokenizer fails.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.inner.model.vocabulary.encode_text(text)
    }

    /// Lets clients' requests go first: returns when none is left, or after `most`.
    ///
    /// The learner calls it between micro-batches; the bound is the floor that keeps it advancing.
    pub fn give_way(&self, most: Duration) {
        let until = Instant::now() + most;
        while self.inner.load.clients.load(Ordering::Relaxed) > 0 && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What the thread owns.
struct Loop {
    model: Arc<Model>,
    config: Config,
    served: watch::Receiver<Served>,
    load: Arc<Load>,
    metrics: Metrics,
    queue: mpsc::Receiver<Job>,
    /// Taken from the queue, but there was no room in the cache yet.
    next: Option<Job>,
    running: VecDeque<Sequence>,
}

impl Loop {
    fn run(&mut self) {
        while self.admit() {
            self.drop_cancelled();
            // Within the pool the thread takes part in the work, and need not wake another for every product.
            if let Err(fault) = rayon::scope(|_| self.step()) {
                error!(%fault, "the device failed; all running requests are given up");
                for sequence in std::mem::take(&mut self.running) {
                    sequence.fail("the device failed");
                    self.leave(&sequence);
                }
            }
            self.metrics.running.set(self.running.len() as i64);
            self.metrics.cache_tokens.set(self.reserved() as i64);
        }
    }

    /// Tokens that the running sequences may come to hold.
    fn reserved(&self) -> usize {
        self.running.iter().map(Sequence::reserved).sum()
    }

    /// Moves waiting requests among the running ones while there is room; `false` once all handles are gone.
    fn admit(&mut self) -> bool {
        while self.running.len() < self.config.running.max(1) {
            let job = match self.next.take() {
                Some(job) => job,
                None if self.running.is_empty() => match self.queue.recv() {
                    Ok(job) => job,
                    Err(mpsc::RecvError) => return false,
                },
                None => match self.queue.try_recv() {
                    Ok(job) => job,
                    Err(_) => break,
                },
            };
            let wanted = job.request.prompt.len() + job.request.max_tokens;
            if !self.running.is_empty() && self.reserved() + wanted > self.config.cache_tokens {
                self.next = Some(job);
                break;
            }
            self.load.waiting.fetch_sub(1, Ordering::Relaxed);
            let served = job.request.pinned.clone().unwrap_or_else(|| self.served.borrow().clone());
            let layers = self.model.decoder.architecture.layers;
            self.running.push_back(Sequence::new(job.request, served, job.events, job.submitted, layers));
        }
        let waiting = self.load.waiting.load(Ordering::Relaxed);
        self.metrics.queue_depth.with_label_values(&["engine"]).set(waiting as i64);
        true
    }

    fn drop_cancelled(&mut self) {
        for sequence in std::mem::take(&mut self.running) {
            if sequence.is_cancelled() {
                self.leave(&sequence);
            } else {
                self.running.push_back(sequence);
            }
        }
    }

    fn leave(&self, sequence: &Sequence) {
        if sequence.is_client() {
            self.load.clients.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes every running sequence one step further: a token, or a chunk of its prompt.
    fn step(&mut self) -> DeviceResult<()> {
        if self.running.is_empty() {
            return Ok(());
        }
        // Rows of one adapter stand together, so that each adapter is applied once.
        self.running.make_contiguous().sort_by_key(Sequence::adapter_key);
        let mut batch = Batch::default();
        let mut caches = Vec::new();
        let mut budget = self.config.prefill_tokens.max(1);
        let mut stepped = Vec::new();
        let mut ends = Vec::new();
        for (index, sequence) in self.running.iter_mut().enumerate() {
            let take = sequence.pending().min(if sequence.is_prefilling() { budget } else { 1 });
            if take == 0 {
                continue;
            }
            if sequence.is_prefilling() {
                budget -= take;
                self.metrics.tokens.with_label_values(&["prefill"]).inc_by(take as u64);
            } else {
                self.metrics.tokens.with_label_values(&["decode"]).inc();
            }
            let cache = sequence.advance(take, &mut batch);
            caches.push(cache.0);
            if cache.1 {
                ends.push((batch.tokens.len() - 1) as u32);
                stepped.push(index);
            }
        }
        let hidden = self.model.decoder.step(&batch, &mut caches)?;
        if ends.is_empty() {
            return Ok(());
        }
        let ends = Tensor::new(ends, hidden.device())?;
        let logits = self.model.decoder.logits(&hidden.index_select(&ends, 0)?)?;
        self.sample(&stepped, &logits)
    }

    /// Draws the next token of each stepped sequence and ends those that are done.
    fn sample(&mut self, stepped: &[usize], logits: &Tensor) -> DeviceResult<()> {
        let columns = logits.dim(1)?;
        let model = Arc::clone(&self.model);
        read(logits, |logits| {
            for (row, index) in stepped.iter().enumerate() {
                let logits = &logits[row * columns..(row + 1) * columns];
                self.running[*index].take_token(logits, &model)?;
            }
            Ok::<(), candle_core::Error>(())
        })??;
        for sequence in std::mem::take(&mut self.running) {
            if sequence.is_done() {
                let nth = self.load.finished.fetch_add(1, Ordering::Relaxed);
                let measured = self.config.kl_one_in > 0 && nth.is_multiple_of(self.config.kl_one_in);
                self.leave(&sequence);
                sequence.finish(&model, measured)?;
            } else {
                self.running.push_back(sequence);
            }
        }
        Ok(())
    }
}
