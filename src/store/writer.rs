//! The one thread that writes.
//!
//! Everything that waits is decided, written as one sled batch and flushed together; then all are answered. That is
//! why there is no lock: "was this key seen?" is asked and answered by the thread that writes the answer. sled's
//! transactions over several trees would decide as well, but they take the same global lock, rerun on conflict, and
//! each would still need a flush of its own.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use sled::Tree;

use crate::completion::{FeedbackId, Timestamp};

use super::{
    Counts, Error,
    codec::{Draft, Subjects},
    group::{Done, Group, Reply},
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
                let decided = decide(&mut group, command.change);
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

fn decide(group: &mut Group, change: Change) -> Result<Done, Error> {
    match change {
        Change::Append { draft, names } => group.append(&draft, &names),
        Change::Attach { draft, subjects, idempotency } => group.attach(&draft, subjects, idempotency),
        Change::Put { record, value } => group.put(&record, &value),
        Change::Forget(ids) => retention::forget(group, &ids),
        Change::Retain { before, bytes } => retention::retain(group, before, bytes),
    }
}
