//! What is decided together and becomes one batch.

use std::collections::{HashMap, HashSet};

use sled::{Batch, Tree};
use uuid::Uuid;

use crate::completion::FeedbackId;

use super::{
    Counts, Error, Removed,
    codec::{self, Draft, Envelope, Fingerprint, Subjects},
    key,
};

/// What came of a change.
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

/// Changes that become one batch, and what readers of the tree cannot see of them yet.
pub(super) struct Group {
    pub(super) tree: Tree,
    pub(super) batch: Batch,
    pub(super) counts: Counts,
    pub(super) changed: bool,
    pub(super) spends_reserve: bool,
    pub(super) new_bytes: u64,
    completions: HashMap<Uuid, Fingerprint>,
    feedback: HashSet<Uuid>,
    idempotency: HashMap<[u8; 32], FeedbackId>,
    pub(super) answers: Vec<(Reply, Result<Done, Error>)>,
}

impl Group {
    pub(super) fn new(tree: Tree, counts: Counts) -> Self {
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

    pub(super) fn put(&mut self, record: &[u8], value: &[u8]) -> Result<Done, Error> {
        self.new_bytes += value.len() as u64;
        key::put(&mut self.batch, &self.tree, record, value)?;
        self.changed = true;
        Ok(Done::Written)
    }

    pub(super) fn append(&mut self, draft: &Draft, names: &[[u8; 32]]) -> Result<Done, Error> {
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

    pub(super) fn attach(
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
