//! How records lie in sled: one tree, the first byte of a key says what it is, ids and numbers follow in big-endian.
//!
//! Records are cut into parts. sled writes a leaf of about 128 KiB or more into a file of its own, which it does not
//! fsync; a leaf holds at most 17 values before it is split, so values of at most [`PART`] bytes never get there.

use sled::{Batch, Tree};

use super::Error;

/// UUID of a completion → its record.
pub(super) const COMPLETION: u8 = b'c';
/// UUID of a feedback → its record.
pub(super) const FEEDBACK: u8 = b'f';
/// UUID of a completion, UUID of a feedback → nothing.
pub(super) const FEEDBACK_OF: u8 = b'i';
/// Sequence number → [`COMPLETION`] or [`FEEDBACK`], UUID.
pub(super) const JOURNAL: u8 = b'j';
/// SHA-256 of a name of an answer → UUID of the completion. An upstream gives names, and the conversation that an answer
/// ends is one.
pub(super) const NAME: u8 = b'n';
/// UUID of a completion → SHA-256 of each of its names.
pub(super) const NAME_OF: u8 = b'o';
/// SHA-256 of an idempotency key → UUID of the feedback that brought it.
pub(super) const IDEMPOTENCY: u8 = b'k';
pub(super) const ALARM: u8 = b'a';
pub(super) const UPDATE: u8 = b'u';
/// A name → bytes.
pub(super) const BLOB: u8 = b'b';

pub(super) const SCHEMA: &[u8] = b"mschema";
pub(super) const SALT: &[u8] = b"msalt";
pub(super) const COUNTS: &[u8] = b"mcounts";

/// Bytes of a value at most.
const PART: usize = 6000;

pub(super) fn key(space: u8, id: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(3 + id.len());
    key.push(space);
    key.extend_from_slice(id);
    key
}

/// The key of the index entry that leads from a completion to a feedback.
pub(super) fn feedback_of(completion: &[u8], feedback: &[u8]) -> Vec<u8> {
    let mut key = key(FEEDBACK_OF, completion);
    key.extend_from_slice(feedback);
    key
}

fn part(record: &[u8], at: u16) -> Vec<u8> {
    let mut key = record.to_vec();
    key.extend_from_slice(&at.to_be_bytes());
    key
}

fn parts(first: &[u8]) -> u16 {
    first.first_chunk().map_or(1, |count| u16::from_be_bytes(*count))
}

/// Adds a record to `batch`; a longer one that lies there is replaced as a whole.
pub(super) fn put(batch: &mut Batch, tree: &Tree, record: &[u8], value: &[u8]) -> Result<(), Error> {
    let count = u16::try_from(value.len().div_ceil(PART).max(1))
        .map_err(|_| Error::Invalid { field: "record", problem: "is too long" })?;
    let (first, rest) = value.split_at(value.len().min(PART));
    let mut head = count.to_be_bytes().to_vec();
    head.extend_from_slice(first);
    let before = tree.get(part(record, 0))?.map_or(0, |old| parts(&old));
    batch.insert(part(record, 0), head);
    for (at, chunk) in (1..).zip(rest.chunks(PART)) {
        batch.insert(part(record, at), chunk);
    }
    for stale in count..before {
        batch.remove(part(record, stale));
    }
    Ok(())
}

pub(super) fn remove(batch: &mut Batch, tree: &Tree, record: &[u8]) -> Result<(), Error> {
    let count = tree.get(part(record, 0))?.map_or(0, |first| parts(&first));
    for at in 0..count {
        batch.remove(part(record, at));
    }
    Ok(())
}

/// The record's first part, which holds its envelope.
pub(super) fn head(tree: &Tree, record: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    Ok(tree.get(part(record, 0))?.map(|first| first.get(2..).unwrap_or_default().to_vec()))
}

pub(super) fn get(tree: &Tree, record: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    match tree.get(part(record, 0))? {
        None => Ok(None),
        Some(first) => join(tree, record, &first),
    }
}

/// `None` if the record is removed meanwhile.
fn join(tree: &Tree, record: &[u8], first: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    let mut value = first.get(2..).unwrap_or_default().to_vec();
    for at in 1..parts(first) {
        match tree.get(part(record, at))? {
            Some(chunk) => value.extend_from_slice(&chunk),
            None => return Ok(None),
        }
    }
    Ok(Some(value))
}

/// The records between two keys, in the order of their keys; read as they are asked for.
pub(super) struct Records {
    tree: Tree,
    iter: sled::Iter,
}

impl Records {
    pub(super) fn all(tree: &Tree, space: u8) -> Self {
        Self::between(tree, vec![space], vec![space + 1])
    }

    /// `end` is left out.
    pub(super) fn between(tree: &Tree, start: Vec<u8>, end: Vec<u8>) -> Self {
        // sled panics at a range that ends before it starts.
        let end = end.max(start.clone());
        Self { tree: tree.clone(), iter: tree.range(start..end) }
    }

    fn record(&self, item: sled::Result<(sled::IVec, sled::IVec)>) -> Option<Result<Vec<u8>, Error>> {
        match item {
            Err(error) => Some(Err(error.into())),
            Ok((key, first)) => {
                let (record, at) = key.split_last_chunk::<2>()?;
                if *at != [0, 0] {
                    return None;
                }
                join(&self.tree, record, &first).transpose()
            }
        }
    }
}

impl Iterator for Records {
    type Item = Result<Vec<u8>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let item = self.iter.next()?;
            if let Some(record) = self.record(item) {
                return Some(record);
            }
        }
    }
}

impl DoubleEndedIterator for Records {
    fn next_back(&mut self) -> Option<Self::Item> {
        loop {
            let item = self.iter.next_back()?;
            if let Some(record) = self.record(item) {
                return Some(record);
            }
        }
    }
}
