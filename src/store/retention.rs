//! What is removed: the head of the journal, when it is too old or too much, and what a person takes back.

use std::collections::HashSet;

use crate::completion::{Feedback, FeedbackId, Timestamp};

use super::{
    Error, Removed,
    codec::{self, Envelope, Subjects},
    group::{Done, Group},
    key,
};

/// Completions that one batch removes at most, so that writers never wait long.
pub(super) const CHUNK: usize = 256;

/// Removes from the journal's head what is from before `before`, or what is beyond `bytes`.
///
/// The head is always a completion, or a comparison of texts: other feedback goes with its completion, which the
/// journal has first.
pub(super) fn retain(
    group: &mut Group,
    before: Option<Timestamp>,
    bytes: Option<u64>,
) -> Result<Done, Error> {
    let mut removal = Removal::default();
    let mut taken = 0;
    for line in group.tree.scan_prefix([key::JOURNAL]) {
        let (line, record) = line?;
        let head = key::head(&group.tree, &record)?;
        if removal.gone(&record)? || head.is_none() {
            group.batch.remove(line);
            group.changed = true;
            continue;
        }
        let old = head.map(|head| Envelope::read(&head)).transpose()?;
        let expired = old.is_some_and(|old| before.is_some_and(|before| old.at < before));
        if !expired && bytes.is_none_or(|bytes| group.counts.bytes <= bytes) {
            break;
        }
        if taken == CHUNK {
            return Ok(Done::Removed { removed: removal.removed, more: true });
        }
        taken += 1;
        if record.first() == Some(&key::COMPLETION) {
            removal.completion(group, &record)?;
        } else {
            removal.feedback(group, codec::feedback_id(&record)?)?;
        }
    }
    Ok(Done::Removed { removed: removal.removed, more: false })
}

/// Removes these, where they are still there.
pub(super) fn forget(group: &mut Group, ids: &[FeedbackId]) -> Result<Done, Error> {
    let mut removal = Removal::default();
    for id in ids {
        removal.feedback(group, *id)?;
    }
    Ok(Done::Removed { removed: removal.removed, more: false })
}

#[derive(Default)]
struct Removal {
    removed: Removed,
    /// Feedback that is removed in this batch, which the tree still shows.
    feedback: HashSet<FeedbackId>,
}

impl Removal {
    fn gone(&self, record: &[u8]) -> Result<bool, Error> {
        Ok(record.first() == Some(&key::FEEDBACK) && self.feedback.contains(&codec::feedback_id(record)?))
    }

    fn completion(&mut self, group: &mut Group, record: &[u8]) -> Result<(), Error> {
        let id = codec::uuid(record)?;
        for entry in group.tree.scan_prefix(key::key(key::FEEDBACK_OF, id.as_bytes())).keys() {
            self.feedback(group, codec::feedback_id(&entry?)?)?;
        }
        let named = key::key(key::NAME_OF, id.as_bytes());
        if let Some(names) = group.tree.get(&named)? {
            for name in names.chunks(size_of::<[u8; 32]>()) {
                let place = key::key(key::NAME, name);
                // The name may have gone to a newer answer.
                if group.tree.get(&place)?.is_some_and(|owner| owner == id.as_bytes()) {
                    group.batch.remove(place);
                }
            }
            group.batch.remove(named);
        }
        if self.record(group, record)?.is_some() {
            group.counts.completions -= 1;
            self.removed.completions += 1;
        }
        Ok(())
    }

    fn feedback(&mut self, group: &mut Group, id: FeedbackId) -> Result<(), Error> {
        if !self.feedback.insert(id) {
            return Ok(());
        }
        let Some(record) = self.record(group, &key::key(key::FEEDBACK, id.0.as_bytes()))? else {
            return Ok(());
        };
        let feedback: Feedback = codec::decode(&record)?;
        for subject in Subjects::of(&feedback)?.ids() {
            group.batch.remove(key::feedback_of(subject.0.as_bytes(), id.0.as_bytes()));
        }
        if let Some(hash) = codec::idempotency(&feedback) {
            group.batch.remove(key::key(key::IDEMPOTENCY, &hash));
        }
        group.counts.feedback -= 1;
        self.removed.feedback += 1;
        Ok(())
    }

    /// Removes a record and its line in the journal; gives what it was.
    fn record(&mut self, group: &mut Group, at: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let Some(record) = key::get(&group.tree, at)? else { return Ok(None) };
        let seq = Envelope::read(&record)?.seq;
        key::remove(&mut group.batch, &group.tree, at)?;
        group.batch.remove(key::key(key::JOURNAL, &seq.to_be_bytes()));
        group.changed = true;
        group.counts.bytes = group.counts.bytes.saturating_sub(record.len() as u64);
        self.removed.bytes += record.len() as u64;
        Ok(Some(record))
    }
}
