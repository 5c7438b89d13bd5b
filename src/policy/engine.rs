//! One thread owns the device and runs many requests together.
//!
//! Every step decodes all running sequences at once and takes in new prompts in chunks beside them, whose beginnings are
//! read from where others have left them. A client that hung up is dropped at the next step. A new adapter arrives over a
//! `watch` channel between two steps; a sequence stays with the version it began with. When blocks for keys and values run
//! out, whoever came last gives its own back and starts anew later.

mod schedule;
mod sequence;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use candle_core::{Result as DeviceResult, Tensor};
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use serde_json::{Map, Value};
use tokio::sync::{mpsc as events, watch};
use tracing::error;

use self::sequence::Sequence;
use super::{
    Batch, Config, Error, KvCache, Metrics, Model,
    attention::BLOCK,
    device::on_host,
    grammar::{Grammar, Grammars, SchemaError},
    kv::{Name, Pool},
    ops::read,
    request::{Event, GenerateRequest, Served, SubmitError},
    sampler::Scratch,
};
use crate::completion::{Message, Version};

/// A handle on the engine's thread; clones share it. Dropping the last one ends the thread, with whatever it runs, and waits
/// for it.
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    model: Arc<Model>,
    jobs: mpsc::Sender<Vec<Sequence>>,
    served: watch::Receiver<Served>,
    load: Arc<Load>,
    queue: usize,
    context: usize,
    grammars: Grammars,
    /// After `jobs`, whose end the thread waits for.
    _thread: Joined,
}

/// A thread that is waited for. What it holds on a card has to be freed before the process ends and takes the driver along.
#[derive(Debug)]
struct Joined(Option<thread::JoinHandle<()>>);

impl Drop for Joined {
    fn drop(&mut self) {
        // Its panic, if there was one, has been reported where it was.
        let _ended = self.0.take().map(thread::JoinHandle::join);
    }
}

/// How busy the engine is, shared with its handles.
#[derive(Debug, Default)]
struct Load {
    waiting: AtomicUsize,
    /// Requests of clients, waiting or running; rollouts of the learner are not counted.
    clients: AtomicUsize,
    finished: AtomicU64,
    /// Trainings under way.
    trainings: AtomicUsize,
    /// Microseconds between two answers' ends, lately.
    pace: AtomicU64,
}

impl Load {
    /// Seconds until as many answers have ended as requests wait now; from 1 to 60.
    fn retry_after_seconds(&self) -> u32 {
        let microseconds = self.pace.load(Ordering::Relaxed) * self.waiting.load(Ordering::Relaxed) as u64;
        microseconds.div_ceil(1_000_000).clamp(1, 60) as u32
    }
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
        // `submit` keeps the bound: it counts what waits, also once it has left the channel.
        let (jobs, arriving) = mpsc::channel();
        let load = Arc::new(Load::default());
        metrics.queue_capacity.with_label_values(&["engine"]).set(config.queue as i64);
        metrics.queue_depth.with_label_values(&["engine"]).set(0);
        let (decoder, tokens) = (&model.decoder, config.cache_tokens);
        let pool = Pool::new(&decoder.architecture, tokens, &decoder.placement()).map_err(|fault| {
            Error::Model(format!("`policy.cache_tokens` = {tokens} is more than the device holds: {fault}"))
        })?;
        metrics.cache_blocks.with_label_values(&["capacity"]).set(pool.capacity() as i64);
        let context = model.decoder.architecture.context.min(pool.capacity() * BLOCK);
        let mut device = Loop {
            model: Arc::clone(&model),
            config: config.clone(),
            served: served.clone(),
            load: Arc::clone(&load),
            metrics,
            pool,
            half: Arc::new(half_of_the_threads()?),
            arriving,
            waiting: VecDeque::new(),
            running: Vec::new(),
            last_end: Instant::now(),
        };
        let thread = thread::Builder::new().name("engine".to_owned()).spawn(move || device.run())?;
        let grammars = Grammars::new(Arc::clone(&model));
        let queue = config.queue;
        let thread = Joined(Some(thread));
        let inner = Inner { model, jobs, served, load, queue, context, grammars, _thread: thread };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Queues one sequence. Dropping the receiver cancels it.
    ///
    /// # Errors
    /// The queue is full, the sequence does not fit the context, or the thread has ended.
    pub fn submit(&self, request: GenerateRequest) -> Result<events::Receiver<Event>, SubmitError> {
        let is_client = request.pinned.is_none();
        self.queue(vec![request], is_client)?.pop().ok_or(SubmitError::Stopped)
    }

    /// [`Engine::submit`] of a client's request, whichever version it names: it does not stand behind others.
    pub fn submit_first(&self, request: GenerateRequest) -> Result<events::Receiver<Event>, SubmitError> {
        self.queue(vec![request], true)?.pop().ok_or(SubmitError::Stopped)
    }

    /// Queues sequences that begin together, behind clients: on an engine without other work, the same requests make
    /// the same steps and the same tokens, to the last bit. A receiver each, in order.
    ///
    /// # Errors
    /// As [`Engine::submit`], and then none is queued.
    pub fn submit_all(
        &self,
        requests: Vec<GenerateRequest>,
    ) -> Result<Vec<events::Receiver<Event>>, SubmitError> {
        self.queue(requests, false)
    }

    fn queue(
        &self,
        requests: Vec<GenerateRequest>,
        are_clients: bool,
    ) -> Result<Vec<events::Receiver<Event>>, SubmitError> {
        let context = self.inner.context;
        for request in &requests {
            let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
            if prompt == 0 || prompt.saturating_add(max_tokens) > context {
                return Err(SubmitError::TooLong { prompt, max_tokens, context });
            }
        }
        let (load, queue) = (&self.inner.load, self.inner.queue.max(1));
        let count = requests.len();
        if load.waiting.fetch_add(count, Ordering::Relaxed) + count > queue {
            load.waiting.fetch_sub(count, Ordering::Relaxed);
            let retry_after_seconds = load.retry_after_seconds();
            return Err(SubmitError::QueueFull { limit: queue, retry_after_seconds });
        }
        let mut receivers = Vec::with_capacity(count);
        let mut sequences = Vec::with_capacity(count);
        for request in requests {
            // One event a token, and the first and last ones: the thread never waits for a slow client.
            let (sender, receiver) = events::channel(request.max_tokens + 4);
            sequences.push(Sequence::new(request, are_clients, sender, Instant::now()));
            receivers.push(receiver);
        }
        let clients = if are_clients { count } else { 0 };
        load.clients.fetch_add(clients, Ordering::Relaxed);
        self.inner.jobs.send(sequences).map_err(|mpsc::SendError(_)| {
            load.waiting.fetch_sub(count, Ordering::Relaxed);
            load.clients.fetch_sub(clients, Ordering::Relaxed);
            SubmitError::Stopped
        })?;
        Ok(receivers)
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

    /// The form of a JSON schema, for [`Sampling::grammar`](super::Sampling::grammar). Not for the async runtime: a
    /// schema that is new takes a while.
    ///
    /// # Errors
    /// The schema asks for something that has no grammar.
    pub fn grammar(&self, schema: &Map<String, Value>) -> Result<Grammar, SchemaError> {
        self.inner.grammars.grammar(schema)
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

    /// Runs a training, beside which the engine's small steps are done by half of its threads.
    pub fn beside<T>(&self, training: impl FnOnce() -> T) -> T {
        let trainings = &self.inner.load.trainings;
        trainings.fetch_add(1, Ordering::Relaxed);
        let _trained = Trained(trainings);
        training()
    }
}

/// Ends a training, also one that panics.
struct Trained<'a>(&'a AtomicUsize);

impl Drop for Trained<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn half_of_the_threads() -> Result<ThreadPool, Error> {
    let threads = (rayon::current_num_threads() / 2).max(1);
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|nth| format!("step-{nth}")).build();
    pool.map_err(|fault| Error::Io(std::io::Error::other(fault)))
}

/// What the thread owns.
struct Loop {
    model: Arc<Model>,
    config: Config,
    served: watch::Receiver<Served>,
    load: Arc<Load>,
    metrics: Metrics,
    pool: Pool,
    half: Arc<ThreadPool>,
    arriving: mpsc::Receiver<Vec<Sequence>>,
    /// Those that were interrupted first, then in the order of their arrival.
    waiting: VecDeque<Sequence>,
    /// Who comes first in the order of [`Sequence::priority`].
    running: Vec<Sequence>,
    last_end: Instant,
}

impl Loop {
    fn run(&mut self) {
        while self.receive() {
            self.drop_cancelled();
            self.admit();
            // Within a pool the thread takes part in the work, and need not wake another for every product.
            let done = if self.gives_way() {
                Arc::clone(&self.half).install(|| self.step())
            } else {
                rayon::scope(|_| self.step())
            };
            if let Err(fault) = done {
                error!(%fault, "the device failed; all running requests are given up");
                for mut sequence in std::mem::take(&mut self.running) {
                    sequence.fail("the device failed");
                    self.leave(&mut sequence);
                }
            }
            self.report();
        }
    }

    /// Whether the next step leaves half of the cores to training. A step waits at each of its products for the thread whose
    /// core training has just taken; where there are few rows, that costs more than half of the threads. For rollouts alone
    /// the learner waits itself.
    fn gives_way(&self) -> bool {
        const FEW: usize = 4;
        let rows: usize = self.running.iter().map(Sequence::pending).sum();
        let any = |count: &AtomicUsize| count.load(Ordering::Relaxed) > 0;
        rows <= FEW && any(&self.load.trainings) && any(&self.load.clients)
    }

    /// Takes in what has been submitted; waits if there is nothing else to do. `false` once all handles are gone: nobody waits
    /// for what still runs.
    fn receive(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            match self.arriving.recv() {
                Ok(sequences) => self.waiting.extend(sequences),
                Err(mpsc::RecvError) => return false,
            }
        }
        loop {
            match self.arriving.try_recv() {
                Ok(sequences) => self.waiting.extend(sequences),
                Err(fault) => return fault == mpsc::TryRecvError::Empty,
            }
        }
    }

    fn drop_cancelled(&mut self) {
        for mut sequence in std::mem::take(&mut self.running) {
            if sequence.is_cancelled() {
                self.leave(&mut sequence);
            } else {
                self.running.push(sequence);
            }
        }
        for mut sequence in std::mem::take(&mut self.waiting) {
            if sequence.is_cancelled() {
                self.load.waiting.fetch_sub(1, Ordering::Relaxed);
                self.leave(&mut sequence);
            } else {
                self.waiting.push_back(sequence);
            }
        }
    }

    /// Moves waiting requests among the running ones while there are blocks for what they have to say so far.
    fn admit(&mut self) {
        while self.running.len() < self.config.running.max(1) {
            // Clients first: the learner's rollouts have time.
            let next = self.waiting.iter().position(Sequence::is_client).unwrap_or(0);
            let Some(sequence) = self.waiting.get(next) else { break };
            let wanted: usize = self.running.iter().chain([sequence]).map(Sequence::blocks_wanted).sum();
            if !self.running.is_empty() && wanted > self.pool.available() {
                break;
            }
            let Some(mut sequence) = self.waiting.remove(next) else { break };
            self.load.waiting.fetch_sub(1, Ordering::Relaxed);
            sequence.begin(|| self.served.borrow().clone());
            self.running.push(sequence);
        }
        self.running.sort_by_key(Sequence::priority);
    }

    /// Gives everything back that a sequence held.
    fn leave(&mut self, sequence: &mut Sequence) {
        self.pool.release(&mut sequence.cache);
        if sequence.is_client() {
            self.load.clients.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes every running sequence further: by a token, or by a chunk of its prompt.
    fn step(&mut self) -> DeviceResult<()> {
        let shares = self.shares();
        let taken = self.find_room(shares);
        let mut order: Vec<usize> = (0..self.running.len()).filter(|index| taken[*index] > 0).collect();
        if order.is_empty() {
            return Ok(());
        }
        // Rows of one adapter stand together, so that each adapter is applied once.
        order.sort_by_key(|index| self.running[*index].adapter_key());
        let mut batch = Batch::default();
        let (mut ends, mut ending) = (Vec::new(), Vec::new());
        for index in &order {
            let phase = if self.running[*index].pending() > 1 { "prefill" } else { "decode" };
            self.metrics.tokens.with_label_values(&[phase]).inc_by(taken[*index] as u64);
            if self.running[*index].advance(taken[*index], &mut batch) {
                ends.push((batch.tokens.len() - 1) as u32);
                ending.push(*index);
            }
        }
        let mut caches: Vec<KvCache> =
            order.iter().map(|index| std::mem::take(&mut self.running[*index].cache)).collect();
        // A card knows no matrices without rows. What comes of this one is not read.
        if ends.is_empty() {
            ends.push(0);
        }
        let batch = batch.wanting(ends);
        let hidden = self.model.decoder.step(&batch, &mut caches.iter_mut().collect::<Vec<_>>());
        for (index, cache) in order.iter().zip(caches) {
            self.running[*index].cache = cache;
        }
        let hidden = hidden?;
        for index in order {
            self.running[index].keep(&mut self.pool);
        }
        if ending.is_empty() {
            return Ok(());
        }
        let logits = self.model.decoder.logits(&hidden)?;
        self.sample(&ending, &logits)
    }

    /// The tokens that each running sequence may take in this step.
    fn shares(&mut self) -> Vec<usize> {
        let mut pending = Vec::with_capacity(self.running.len());
        let mut being_filled: HashSet<Name> = HashSet::new();
        for sequence in &mut self.running {
            let adopted = sequence.adopt(&mut self.pool);
            self.metrics.tokens.with_label_values(&["shared"]).inc_by(adopted as u64);
            // What another computes in this very step is there for the taking in the next one.
            let late =
                sequence.pending() > 1 && sequence.next_name().is_some_and(|name| !being_filled.insert(name));
            pending.push(if late { 0 } else { sequence.pending() });
        }
        let chunks: Vec<usize> = pending.iter().copied().filter(|pending| *pending > 1).collect();
        let mut chunks = schedule::shares(&chunks, self.config.prefill_tokens.max(1)).into_iter();
        for pending in pending.iter_mut().filter(|pending| **pending > 1) {
            *pending = chunks.next().unwrap_or_default();
        }
        pending
    }

    /// Gets blocks for what each sequence is to take in, from whoever has come last if there is no other way. What cannot
    /// be had is taken off its share.
    fn find_room(&mut self, mut shares: Vec<usize>) -> Vec<usize> {
        let mut index = 0;
        while index < self.running.len() {
            let is_last = index + 1 == self.running.len();
            let cache = &mut self.running[index].cache;
            let room = cache.room() - cache.len();
            if room >= shares[index] {
                index += 1;
            } else if let Some(block) = self.pool.take() {
                cache.give(block);
            } else if is_last {
                shares[index] = room;
            } else if let Some(mut last) = self.running.pop() {
                self.metrics.preemptions.inc();
                self.pool.release(&mut last.cache);
                self.load.waiting.fetch_add(1, Ordering::Relaxed);
                self.waiting.push_front(last);
            }
        }
        shares.truncate(self.running.len());
        shares
    }

    /// Draws the next token of each of these sequences and ends those that are done.
    fn sample(&mut self, ending: &[usize], logits: &Tensor) -> DeviceResult<()> {
        let columns = logits.dim(1)?;
        let model = Arc::clone(&self.model);
        let mut rows = vec![None; self.running.len()];
        for (row, index) in ending.iter().enumerate() {
            rows[*index] = Some(row);
        }
        read(&on_host(logits)?, |logits| {
            let rows = self.running.par_iter_mut().zip(rows);
            rows.for_each_init(Scratch::default, |scratch, (sequence, row)| {
                if let Some(row) = row {
                    sequence.take_token(&logits[row * columns..(row + 1) * columns], &model, scratch);
                }
            });
        })?;
        for mut sequence in std::mem::take(&mut self.running) {
            if sequence.is_done() {
                let nth = self.note_end();
                let measured = self.config.kl_one_in > 0 && nth.is_multiple_of(self.config.kl_one_in);
                sequence.finish(&model, measured)?;
                self.leave(&mut sequence);
            } else {
                self.running.push(sequence);
            }
        }
        Ok(())
    }

    /// Counts an answer's end, and how long after the one before it came.
    fn note_end(&mut self) -> u64 {
        let between = self.last_end.elapsed().as_micros() as u64;
        self.last_end = Instant::now();
        let pace = self.load.pace.load(Ordering::Relaxed);
        self.load.pace.store(if pace == 0 { between } else { (9 * pace + between) / 10 }, Ordering::Relaxed);
        self.load.finished.fetch_add(1, Ordering::Relaxed)
    }

    fn report(&self) {
        self.metrics.running.set(self.running.len() as i64);
        let waiting = self.load.waiting.load(Ordering::Relaxed);
        self.metrics.queue_depth.with_label_values(&["engine"]).set(waiting as i64);
        let used = self.pool.capacity() - self.pool.available();
        self.metrics.cache_blocks.with_label_values(&["used"]).set(used as i64);
        self.metrics.cache_blocks.with_label_values(&["kept"]).set(self.pool.idle() as i64);
        self.metrics.evictions.inc_by(self.pool.evicted - self.metrics.evictions.get());
    }
}
