//! The store: answers, what was said of them, and what the loop remembers. Acknowledged is durable.
//!
//! sled underneath, in `<path>/store`. All writes go through one thread, which flushes once for all that wait
//! (`store/writer.rs`); reads are direct. Every completion and feedback also gets a line in a journal, numbered in
//! the order in which they were written, so that the loop can read on from where it was ([`Store::events_since`]).

mod codec;
mod group;
mod key;
mod records;
mod retention;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::completion::{Completion, CompletionId, Feedback, FeedbackId, Prompt, Role, Timestamp};

use codec::Subjects;
use group::Done;
use writer::{Change, Disk, Writer};

/// Of the layout of keys and records. A store of a newer one is refused.
const SCHEMA: u64 = 1;

/// A process that is about to end holds the lock for a moment longer.
const LOCK_TRIES: usize = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Where answers and feedback are kept, and for how long (`[store]`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The data directory. The store lies in `store` in it, adapters in `versions`.
    pub path: PathBuf,
    /// Completions older than this go, with their feedback. 0 keeps them for ever.
    pub retention_days: f64,
    /// The oldest completions go when all records together are larger. Counted before sled's own overhead, which
    /// makes the files two to five times as large. 0 sets no limit.
    pub retention_bytes: u64,
    /// Keeps numbers and ids only: no prompts, answers, comments, demonstrations, tags.
    pub redact: bool,
    /// Writes are refused when the disk has less free than this, while reads go on. sled does not recover from a
    /// disk that is really full.
    pub reserve_bytes: u64,
    /// Memory for sled's cache of pages.
    pub cache_bytes: u64,
    /// Milliseconds between two rounds in which sled tidies its files up. Writes do not wait for it.
    pub flush_ms: u64,
    /// Writes that may wait; one more is answered 503.
    pub queue: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: PathBuf::from("data"),
            retention_days: 90.0,
            retention_bytes: 4 << 30,
            redact: false,
            reserve_bytes: 64 << 20,
            cache_bytes: 64 << 20,
            flush_ms: 500,
            queue: 4096,
        }
    }
}

impl Config {
    /// Names the first field whose value cannot work.
    pub fn check(&self) -> Result<(), Error> {
        let field = |field, problem| Err(Error::Invalid { field, problem });
        if !(self.retention_days.is_finite() && self.retention_days >= 0.0) {
            return field("store.retention_days", "is a number of days, or 0");
        }
        if self.flush_ms == 0 {
            return field("store.flush_ms", "is at least 1");
        }
        if self.queue == 0 {
            return field("store.queue", "is at least 1");
        }
        Ok(())
    }
}

/// Why something was not kept or not found.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("{field} {problem}")]
    Invalid { field: &'static str, problem: &'static str },
    #[error("there is no completion {id}")]
    UnknownCompletion { id: CompletionId },
    #[error("{chosen} and {rejected} answer different prompts")]
    DifferentPrompts { chosen: CompletionId, rejected: CompletionId },
    #[error("{id} is already there")]
    Duplicate { id: Uuid },
    #[error("the disk of {path} is full: {free} bytes are left")]
    Full { path: PathBuf, free: u64 },
    #[error("the store's queue is full: {limit} writes are waiting")]
    Busy { limit: usize },
    #[error("the store has stopped")]
    Stopped,
    #[error("{path} is in use by another process")]
    Locked { path: PathBuf },
    #[error("the store is of schema {found}, this program reads up to {supported}; use a newer one")]
    Schema { found: u64, supported: u64 },
    #[error("the store is damaged: {0}")]
    Corrupt(String),
    #[error("store: {0}")]
    Database(sled::Error),
    #[error("store: {0}")]
    Io(Arc<io::Error>),
}

impl From<sled::Error> for Error {
    fn from(error: sled::Error) -> Self {
        match error {
            sled::Error::Io(error) => error.into(),
            other => Self::Database(other),
        }
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { path: PathBuf::from("the store"), free: 0 }
            }
            _ => Self::Io(Arc::new(error)),
        }
    }
}

/// What became of a feedback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    Stored,
    /// The same `idempotency_key` came before, with this feedback. Nothing was written.
    Seen(FeedbackId),
}

/// A line of the journal.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Completion(Completion),
    Feedback(Feedback),
}

/// What is in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    pub completions: u64,
    pub feedback: u64,
    /// Of all completions and feedback, as they are encoded.
    pub bytes: u64,
    /// The sequence number of the next completion or feedback.
    pub next_seq: u64,
}

impl Counts {
    fn to_bytes(self) -> Vec<u8> {
        [self.completions, self.feedback, self.bytes, self.next_seq]
            .iter()
            .flat_map(|n| n.to_be_bytes())
            .collect()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (numbers, []) = bytes.as_chunks::<8>() else { return None };
        let [completions, feedback, bytes, next_seq] = *numbers else { return None };
        let number = u64::from_be_bytes;
        Some(Self {
            completions: number(completions),
            feedback: number(feedback),
            bytes: number(bytes),
            next_seq: number(next_seq),
        })
    }
}

/// What [`Store::retain`] or [`Store::forget`] removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Removed {
    pub completions: u64,
    pub feedback: u64,
    pub bytes: u64,
}

/// See the module. Dropping it writes what still waits.
#[derive(Debug)]
pub struct Store {
    // Before `db`: the thread ends before sled closes.
    writer: Writer,
    db: sled::Db,
    path: PathBuf,
    salt: Vec<u8>,
    config: Config,
}

impl Store {
    /// Opens `<path>/store`, or makes it.
    ///
    /// # Errors
    /// Another process has it open, it was written by a newer program, it is damaged, or the directory cannot be used.
    pub fn open(config: &Config) -> Result<Arc<Self>, Error> {
        config.check()?;
        let path = config.path.join("store");
        fs::create_dir_all(&path)?;
        let db = open_sled(config, &path)?;
        let schema = |db: &sled::Db| -> Result<Option<u64>, Error> {
            let Some(found) = db.get(key::SCHEMA)? else { return Ok(None) };
            let number = found.first_chunk().map(|number| u64::from_be_bytes(*number));
            number.map(Some).ok_or_else(|| Error::Corrupt("its schema is not a number".to_owned()))
        };
        match schema(&db)? {
            Some(found) if found > SCHEMA => return Err(Error::Schema { found, supported: SCHEMA }),
            Some(_) => {}
            None => {
                let mut batch = sled::Batch::default();
                batch.insert(key::SCHEMA, &SCHEMA.to_be_bytes());
                batch.insert(key::SALT, Uuid::now_v7().as_bytes());
                batch.insert(key::COUNTS, Counts::default().to_bytes());
                db.apply_batch(batch)?;
                db.flush()?;
                File::open(&path)?.sync_all()?;
                File::open(&config.path)?.sync_all()?;
            }
        }
        let missing = |what: &str| Error::Corrupt(format!("its {what} are missing"));
        let salt = db.get(key::SALT)?.ok_or_else(|| missing("secrets"))?.to_vec();
        let counts = db.get(key::COUNTS)?.and_then(|bytes| Counts::from_bytes(&bytes));
        let counts = counts.ok_or_else(|| missing("counts"))?;
        let log = File::open(path.join("db"))?;
        let disk = Disk {
            tree: sled::Tree::clone(&db),
            log,
            path: path.clone(),
            reserve_bytes: config.reserve_bytes,
        };
        let writer = Writer::start(disk, config.queue, counts)?;
        Ok(Arc::new(Self { writer, db, path, salt, config: config.clone() }))
    }

    /// Keeps an answer. Returns when it is durable.
    ///
    /// # Errors
    /// Its id is taken, a number in it is not finite, the queue or the disk is full.
    pub async fn append(&self, completion: &Completion) -> Result<(), Error> {
        self.append_named(completion, None).await
    }

    /// [`Store::append`] of an answer that an upstream has named; [`Store::named`] finds it by that name. A name that
    /// comes again is that of the newer answer.
    pub async fn append_named(&self, completion: &Completion, name: Option<&str>) -> Result<(), Error> {
        self.request(self.appended(completion, name)?).await.map(|_| ())
    }

    /// [`Store::append`] for threads outside the runtime.
    pub fn append_blocking(&self, completion: &Completion) -> Result<(), Error> {
        self.request_blocking(self.appended(completion, None)?).map(|_| ())
    }

    fn appended(&self, completion: &Completion, name: Option<&str>) -> Result<Change, Error> {
        let draft = codec::completion(completion, &self.salt, self.config.redact)?;
        let mut names: Vec<_> = name.map(codec::place).into_iter().collect();
        if let Prompt::Chat(messages) = &completion.prompt {
            let turns = messages.iter().map(|message| (message.role, message.content.as_str()));
            let answer = (Role::Assistant, completion.answer.as_str());
            names.push(codec::conversation(&self.salt, turns.chain([answer])));
        }
        Ok(Change::Append { draft, names })
    }

    /// Keeps what somebody said of an answer, once for each `idempotency_key`. Returns when it is durable.
    ///
    /// # Errors
    /// An answer that it judges is not there, a comparison's answers are to different prompts, its id is taken, the
    /// queue or the disk is full.
    pub async fn attach(&self, feedback: &Feedback) -> Result<Attached, Error> {
        self.request(self.attachment(feedback)?).await.map(Attached::from)
    }

    /// [`Store::attach`] for threads outside the runtime.
    pub fn attach_blocking(&self, feedback: &Feedback) -> Result<Attached, Error> {
        self.request_blocking(self.attachment(feedback)?).map(Attached::from)
    }

    /// Removes the oldest completions, by age and by size, with their feedback. Blocks; other writes go on meanwhile.
    ///
    /// # Errors
    /// The store is damaged or cannot be written.
    pub fn retain(&self, now: Timestamp) -> Result<Removed, Error> {
        let age_ms = self.config.retention_days * 86_400_000.0;
        let before = (age_ms > 0.0).then(|| Timestamp(now.0.saturating_sub(age_ms as u64)));
        let bytes = (self.config.retention_bytes > 0).then_some(self.config.retention_bytes);
        let mut total = Removed::default();
        loop {
            let done = self.request_blocking(Change::Retain { before, bytes })?;
            let Done::Removed { removed, more } = done else { return Ok(total) };
            total.add(removed);
            if !more {
                return Ok(total);
            }
        }
    }

    /// Removes all feedback of a rater; gives its ids, by which the versions that learned from it can be found. Blocks.
    ///
    /// # Errors
    /// The store is damaged or cannot be written.
    pub fn forget(&self, rater: &str) -> Result<Vec<FeedbackId>, Error> {
        let mut ids = Vec::new();
        for feedback in self.feedback() {
            let feedback = feedback?;
            if feedback.rater.as_deref() == Some(rater) {
                ids.push(feedback.id);
            }
        }
        for chunk in ids.chunks(retention::CHUNK) {
            self.request_blocking(Change::Forget(chunk.to_vec()))?;
        }
        Ok(ids)
    }

    /// Whether a write would be taken now.
    ///
    /// # Errors
    /// The disk is full, or the queue is.
    pub fn check(&self) -> Result<(), Error> {
        let (queued, limit) = (self.queued(), self.config.queue);
        if queued >= limit {
            return Err(Error::Busy { limit });
        }
        writer::check_room(&self.path, self.config.reserve_bytes, self.counts().bytes)
    }

    pub fn counts(&self) -> Counts {
        self.writer.progress.counts()
    }

    /// Of sled's files, which are some times as large as the records in them.
    pub fn size_bytes(&self) -> Result<u64, Error> {
        Ok(self.db.size_on_disk()?)
    }

    /// Writes that wait.
    pub fn queued(&self) -> usize {
        self.writer.progress.queued()
    }

    /// Groups of writes that were made durable since the store was opened.
    pub fn flushes(&self) -> u64 {
        self.writer.progress.flushes()
    }

    fn attachment(&self, feedback: &Feedback) -> Result<Change, Error> {
        let subjects = Subjects::of(feedback)?;
        let draft = codec::feedback(feedback, self.config.redact)?;
        Ok(Change::Attach { draft, subjects, idempotency: codec::idempotency(feedback) })
    }

    async fn request(&self, change: Change) -> Result<Done, Error> {
        let (ticket, done) = oneshot::channel();
        // Nobody may be waiting any more; it is written all the same.
        self.writer.send(change, Box::new(move |result| drop(ticket.send(result))))?;
        done.await.map_err(|_| Error::Stopped)?
    }

    fn request_blocking(&self, change: Change) -> Result<Done, Error> {
        // Not the oneshot's `blocking_recv`, which panics on a thread of the runtime.
        let (ticket, done) = mpsc::sync_channel(1);
        self.writer.send(change, Box::new(move |result| drop(ticket.send(result))))?;
        done.recv().map_err(|_| Error::Stopped)?
    }
}

impl Removed {
    fn add(&mut self, other: Self) {
        self.completions += other.completions;
        self.feedback += other.feedback;
        self.bytes += other.bytes;
    }
}

impl From<Done> for Attached {
    fn from(done: Done) -> Self {
        match done {
            Done::Seen(id) => Self::Seen(id),
            Done::Written | Done::Removed { .. } => Self::Stored,
        }
    }
}

fn open_sled(config: &Config, path: &Path) -> Result<sled::Db, Error> {
    let sled = sled::Config::new()
        .path(path)
        .cache_capacity(config.cache_bytes)
        // sled reclaims space in this round only, so it cannot be left out.
        .flush_every_ms(Some(config.flush_ms));
    for _ in 0..LOCK_TRIES {
        match sled.open() {
            // sled tells a held lock from other faults by its words only.
            Err(sled::Error::Io(error)) if error.to_string().contains("could not acquire lock") => {
                thread::sleep(LOCK_PAUSE);
            }
            result => return Ok(result?),
        }
    }
    Err(Error::Locked { path: path.to_owned() })
}
