//! The one thread that writes.
//!
//! Everything that waits is decided, written as one sled batch and flushed together; then all are answered. That is
//! why there is no lock: "was this key seen?" is asked and answered by the thread that writes the answer. sled's
//! transactions over several trees would decide as well, but they take the same global lock, rerun on conflict, and
//! each would still need a flush of its own.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use sled::{Batch, Tree};
use uuid::Uuid;

use crate::completion::{FeedbackId, Timestamp};

use super::{
    Counts, Error, Removed,
    codec::{self, Draft, Envelope, Fingerprint, Subjects},
    key, retention,
};

/// Changes that are written together at most.
const GROUP: usize = 1024;

/// What is to be written.
pub(super) enum Change {
    Append { draft: Draft, names: Vec<[u8; 32]> },
    Attach { draft: Draft, subjects: Subjects, idempotency: Option<[u8; 32]> },
    Put { record: Vec<u8>, value: Vec<u8> },
    Forget(Vec<FeedbackId>),
    Retain { before: Option<Timestamp>, bytes: Option<u64> },
}

/// What came of it.
pub(super) enum Done {
    Written,
    Seen(FeedbackId),
    /// `more`: there is more to remove than one batch should hold.
    Removed {
        removed: Removed,
        more: bool,
    },
}

pub(super) type Reply = Box<dyn FnOnce(Result<Done, Error>) + Send>;

struct Command {
    change: Change,
    reply: Reply,
}

/// What readers may know of the writer.
#[derive(Debug, Default)]
pub(super) struct Progress {
    counts: Mutex<Counts>,
    queued: AtomicUsize,
    flushes: AtomicU64,
}

impl Progress {
    pub(super) fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn queued(&self) -> usize {
        self.queued.load(Relaxed)
    }

    pub(super) fn flushes(&self) -> u64 {
        self.flushes.load(Relaxed)
    }
}

/// The queue to the thread; dropping it writes what waits and joins.
#[derive(Debug)]
pub(super) struct Writer {
    commands: Option<mpsc::SyncSender<Command>>,
    thread: Option<JoinHandle<()>>,
    limit: usize,
    pub(super) progress: Arc<Progress>,
}

/// What the thread needs to know of the disk.
pub(super) struct Disk {
    pub(super) tree: Tree,
    /// sled's log, for the fsync that sled itself does only on some systems.
    pub(super) log: File,
    pub(super) path: PathBuf,
    pub(super) reserve_bytes: u64,
}

/// sled's file is at most about so many times as large as the records in it before it is full of holes.
const AMPLIFICATION: u64 = 6;

/// Whether there is room for more: `reserve` on the disk of `path`, or in sled's own file.
///
/// sled hardly ever gives room back to the disk, but it uses again what a removal left.
pub(super) fn check_room(path: &Path, reserve: u64, records: u64) -> Result<(), Error> {
    let free = fs2::available_space(path)?;
    if free >= reserve {
        return Ok(());
    }
    let file = fs::metadata(path.join("db"))?.len();
    let inside = file.saturating_sub(records.saturating_mul(AMPLIFICATION));
    if inside >= reserve && free >= reserve / 4 {
        return Ok(());
    }
    Err(Error::Full { free, path: path.to_owned() })
}

impl Writer {
    pub(super) fn start(disk: Disk, limit: usize, counts: Counts) -> Result<Self, Error> {
        let (commands, queue) = mpsc::sync_channel(limit);
        let progress = Arc::new(Progress { counts: Mutex::new(counts), ..Progress::default() });
        let shared = Arc::clone(&progress);
        let run = move || Loop { disk, progress: shared, unflushed: false }.run(&queue);
        let thread = thread::Builder::new().name("store".to_owned()).spawn(run)?;
        Ok(Self { commands: Some(commands), thread: Some(thread), limit, progress })
    }

    pub(super) fn send(&self, change: Change, reply: Reply) -> Result<(), Error> {
        let commands = self.commands.as_ref().ok_or(Error::Stopped)?;
        self.progress.queued.fetch_add(1, Relaxed);
        commands.try_send(Command { change, reply }).map_err(|error| {
            self.progress.queued.fetch_sub(1, Relaxed);
            match error {
                mpsc::TrySendError::Full(_) => Error::Busy { limit: self.limit },
                mpsc::TrySendError::Disconnected(_) => Error::Stopped,
            }
        })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.commands = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the store's writer panicked");
        }
    }
}

struct Loop {
    disk: Disk,
    progress: Arc<Progress>,
    /// A batch was applied whose flush has not succeeded.
    unflushed: bool,
}

impl Loop {
    fn run(mut self, queue: &mpsc::Receiver<Command>) {
        while let Ok(first) = queue.recv() {
            let mut group = self.group();
            let mut taken = 0;
            for command in std::iter::once(first).chain(queue.try_iter()).take(GROUP) {
                taken += 1;
                // Removal reads the tree, so it neither follows nor precedes other changes in one batch.
                let removes = matches!(command.change, Change::Forget(_) | Change::Retain { .. });
                if removes {
                    group = self.finish(group);
                    group.spends_reserve = true;
                }
                let decided = group.decide(command.change);
                group.answers.push((command.reply, decided));
                if removes {
                    group = self.finish(group);
                }
            }
            self.finish(group);
            self.progress.queued.fetch_sub(taken, Relaxed);
        }
    }

    fn group(&self) -> Group {
        Group::new(self.disk.tree.clone(), self.progress.counts())
    }

    /// Writes a group and answers all in it; gives the next one.
    fn finish(&mut self, mut group: Group) -> Group {
        let answers = std::mem::take(&mut group.answers);
        let outcome =
            if answers.iter().any(|(_, decided)| decided.is_ok()) { self.write(group) } else { Ok(()) };
        for (reply, decided) in answers {
            reply(match (decided, &outcome) {
                (Ok(_), Err(error)) => Err(error.clone()),
                (decided, _) => decided,
            });
        }
        self.group()
    }

    fn write(&mut self, mut group: Group) -> Result<(), Error> {
        if group.changed {
            // Removal takes room, too, before sled gives any back; it may spend half of the reserve.
            let reserve =
                if group.spends_reserve { self.disk.reserve_bytes / 2 } else { self.disk.reserve_bytes };
            let (path, reserve) = (&self.disk.path, reserve.saturating_add(group.new_bytes));
            check_room(path, reserve, self.progress.counts().bytes)?;
            group.batch.insert(key::COUNTS, group.counts.to_bytes().as_slice());
            self.unflushed = true;
            self.disk.tree.apply_batch(group.batch)?;
            // Now, not after the flush: these sequence numbers are used up even if the flush fails.
            *self.progress.counts.lock().unwrap_or_else(PoisonError::into_inner) = group.counts;
        }
        // A key that was seen is answered only when the record that brought it is durable, too.
        if self.unflushed {
            self.disk.tree.flush()?;
            // On Linux sled stops at `sync_file_range`, which leaves the disk's own cache unflushed.
            self.disk.log.sync_data()?;
            self.unflushed = false;
            self.progress.flushes.fetch_add(1, Relaxed);
        }
        Ok(())
    }
}

/// Changes that become one batch, and what readers of the tree cannot see of them yet.
pub(super) struct Group {
    pub(super) tree: Tree,
    pub(super) batch: Batch,
    pub(super) counts: Counts,
    pub(super) changed: bool,
    spends_reserve: bool,
    new_bytes: u64,
    completions: HashMap<Uuid, Fingerprint>,
    feedback: HashSet<Uuid>,
    idempotency: HashMap<[u8; 32], FeedbackId>,
    answers: Vec<(Reply, Result<Done, Error>)>,
}

impl Group {
    fn new(tree: Tree, counts: Counts) -> Self {
        Self {
            tree,
            batch: Batch::default(),
            counts,
            changed: false,
            spends_reserve: false,
            new_bytes: 0,
            completions: HashMap::new(),
            feedback: HashSet::new(),
            idempotency: HashMap::new(),
            answers: Vec::new(),
        }
    }

    fn decide(&mut self, change: Change) -> Result<Done, Error> {
        match change {
            Change::Append { draft, names } => self.append(&draft, &names),
            Change::Attach { draft, subjects, idempotency } => self.attach(&draft, subjects, idempotency),
            Change::Put { record, value } => {
                self.new_bytes += value.len() as u64;
                key::put(&mut self.batch, &self.tree, &record, &value)?;
                self.changed = true;
                Ok(Done::Written)
            }
            Change::Forget(ids) => retention::forget(self, &ids),
            Change::Retain { before, bytes } => retention::retain(self, before, bytes),
        }
    }

    fn append(&mut self, draft: &Draft, names: &[[u8; 32]]) -> Result<Done, Error> {
        if self.fingerprint(draft.id)?.is_some() {
            return Err(Error::Duplicate { id: draft.id });
        }
        self.journal(key::COMPLETION, draft)?;
        for name in names {
            self.batch.insert(key::key(key::NAME, name), draft.id.as_bytes());
        }
        if !names.is_empty() {
            self.batch.insert(key::key(key::NAME_OF, draft.id.as_bytes()), names.concat());
        }
        self.completions.insert(draft.id, draft.fingerprint);
        self.counts.completions += 1;
        Ok(Done::Written)
    }

    fn attach(
        &mut self,
        draft: &Draft,
        subjects: Subjects,
        idempotency: Option<[u8; 32]>,
    ) -> Result<Done, Error> {
        if let Some(hash) = idempotency
            && let Some(seen) = self.seen(&hash)?
        {
            return Ok(Done::Seen(seen));
        }
        let record = key::key(key::FEEDBACK, draft.id.as_bytes());
        if self.feedback.contains(&draft.id) || key::head(&self.tree, &record)?.is_some() {
            return Err(Error::Duplicate { id: draft.id });
        }
        let mut prompts = Vec::new();
        for id in subjects.ids() {
            prompts.push(self.fingerprint(id.0)?.ok_or(Error::UnknownCompletion { id })?);
        }
        if let (Subjects::Two { chosen, rejected }, [a, b]) = (subjects, prompts.as_slice())
            && a != b
        {
            return Err(Error::DifferentPrompts { chosen, rejected });
        }
        self.journal(key::FEEDBACK, draft)?;
        for id in subjects.ids() {
            self.batch.insert(key::feedback_of(id.0.as_bytes(), draft.id.as_bytes()), &[]);
        }
        if let Some(hash) = idempotency {
            self.batch.insert(key::key(key::IDEMPOTENCY, &hash), draft.id.as_bytes());
            self.idempotency.insert(hash, FeedbackId(draft.id));
        }
        self.feedback.insert(draft.id);
        self.counts.feedback += 1;
        Ok(Done::Written)
    }

    /// Adds a record and its line in the journal.
    fn journal(&mut self, space: u8, draft: &Draft) -> Result<(), Error> {
        let (seq, id) = (self.counts.next_seq, draft.id.as_bytes());
        key::put(&mut self.batch, &self.tree, &key::key(space, id), &draft.bytes(seq))?;
        self.batch.insert(key::key(key::JOURNAL, &seq.to_be_bytes()), key::key(space, id));
        self.counts.next_seq += 1;
        self.counts.bytes += draft.len() as u64;
        self.new_bytes += draft.len() as u64;
        self.changed = true;
        Ok(())
    }

    fn fingerprint(&self, id: Uuid) -> Result<Option<Fingerprint>, Error> {
        if let Some(fingerprint) = self.completions.get(&id) {
            return Ok(Some(*fingerprint));
        }
        let head = key::head(&self.tree, &key::key(key::COMPLETION, id.as_bytes()))?;
        head.map(|head| Ok(Envelope::read(&head)?.fingerprint)).transpose()
    }

    fn seen(&self, hash: &[u8; 32]) -> Result<Option<FeedbackId>, Error> {
        if let Some(id) = self.idempotency.get(hash) {
            return Ok(Some(*id));
        }
        let known = self.tree.get(key::key(key::IDEMPOTENCY, hash))?;
        known.map(|value| codec::feedback_id(&value)).transpose()
    }
}
