//! Reading: by id, in order of time, by the journal. And the loop's own records, which are few.

use std::ops::{Bound, RangeBounds};

use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::completion::{Alarm, Completion, CompletionId, Feedback, FeedbackId, Message, Timestamp, Update};

use super::{
    Error, Event, Store, codec,
    key::{self, Records},
    writer::Change,
};

const MONITOR: &[u8] = b"monitor";
/// Apart from the names that a caller chooses.
const NAMED: &[u8] = b"named/";

impl Store {
    pub fn completion(&self, id: CompletionId) -> Result<Option<Completion>, Error> {
        let record = key::get(&self.db, &key::key(key::COMPLETION, id.0.as_bytes()))?;
        record.map(|record| codec::decode(&record)).transpose()
    }

    /// The answer that an upstream named so.
    pub fn named(&self, name: &str) -> Result<Option<CompletionId>, Error> {
        let found = self.db.get(key::key(key::NAME, &codec::place(name)))?;
        found.map(|id| codec::uuid(&id).map(CompletionId)).transpose()
    }

    /// The answer that ended this conversation, if it was given here.
    pub fn answered(&self, conversation: &[Message]) -> Result<Option<CompletionId>, Error> {
        let turns = conversation.iter().map(|message| (message.role, message.content.as_str()));
        let found = self.db.get(key::key(key::NAME, &codec::conversation(&self.salt, turns)))?;
        found.map(|id| codec::uuid(&id).map(CompletionId)).transpose()
    }

    /// What was said of an answer, oldest first; of a comparison it may be either answer.
    pub fn feedback_of(&self, id: CompletionId) -> Result<Vec<Feedback>, Error> {
        let mut found = Vec::new();
        for entry in self.db.scan_prefix(key::key(key::FEEDBACK_OF, id.0.as_bytes())).keys() {
            // Retention may have taken it since the index was read.
            found.extend(self.feedback_record(codec::uuid(&entry?)?)?);
        }
        Ok(found)
    }

    fn feedback_record(&self, id: Uuid) -> Result<Option<Feedback>, Error> {
        let record = key::get(&self.db, &key::key(key::FEEDBACK, id.as_bytes()))?;
        record.map(|record| codec::decode(&record)).transpose()
    }

    pub fn feedback_by_id(&self, id: FeedbackId) -> Result<Option<Feedback>, Error> {
        self.feedback_record(id.0)
    }

    /// Completions by the time in their ids, oldest first; read as they are asked for. `.rev().take(n)` gives the
    /// newest.
    pub fn completions<R: RangeBounds<Timestamp>>(
        &self,
        range: R,
    ) -> impl DoubleEndedIterator<Item = Result<Completion, Error>> + use<R> {
        let start = match range.start_bound() {
            Bound::Included(at) => at.0,
            Bound::Excluded(at) => at.0.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(at) => at.0.saturating_add(1),
            Bound::Excluded(at) => at.0,
            Bound::Unbounded => u64::MAX,
        };
        let records = Records::between(&self.db, from_millisecond(start), from_millisecond(end));
        records.map(|record| codec::decode(&record?))
    }

    /// [`Store::completions`], each with what was said of it.
    pub fn judged(
        &self,
        range: impl RangeBounds<Timestamp>,
    ) -> impl DoubleEndedIterator<Item = Result<(Completion, Vec<Feedback>), Error>> {
        self.completions(range).map(|completion| {
            let completion = completion?;
            let feedback = self.feedback_of(completion.id)?;
            Ok((completion, feedback))
        })
    }

    /// All feedback by the time in its ids, oldest first, comparisons of texts included; read as it is asked for.
    pub fn feedback(&self) -> impl DoubleEndedIterator<Item = Result<Feedback, Error>> + use<> {
        Records::all(&self.db, key::FEEDBACK).map(|record| codec::decode(&record?))
    }

    /// At most `limit` completions and feedback from number `seq` on, in the order in which they were written. What
    /// retention removed is left out, so that numbers may be missing; none are left if the result is empty.
    ///
    /// An event may be seen a moment before it is durable. [`Store::save_monitor`] makes all before it durable, too.
    pub fn events_since(&self, seq: u64, limit: usize) -> Result<Vec<(u64, Event)>, Error> {
        let mut events = Vec::new();
        let lines = key::key(key::JOURNAL, &seq.to_be_bytes())..vec![key::JOURNAL + 1];
        for line in self.db.range(lines) {
            if events.len() == limit {
                break;
            }
            let (line, at) = line?;
            let Some(record) = key::get(&self.db, &at)? else { continue };
            let short = || Error::Corrupt("a line of the journal has no number".to_owned());
            let seq = u64::from_be_bytes(*line.last_chunk().ok_or_else(short)?);
            events.push((seq, event(&at, &record)?));
        }
        Ok(events)
    }

    /// Adds an alarm or replaces it. Blocks until it is durable.
    pub fn put_alarm(&self, alarm: &Alarm) -> Result<(), Error> {
        self.put(key::ALARM, alarm.id.as_bytes(), codec::plain(alarm)?)
    }

    pub fn alarm(&self, id: Uuid) -> Result<Option<Alarm>, Error> {
        self.plain(key::ALARM, id.as_bytes())
    }

    /// The newest `limit`, newest first.
    pub fn alarms(&self, limit: usize) -> Result<Vec<Alarm>, Error> {
        self.newest(key::ALARM, limit)
    }

    /// Adds an update or replaces it; measures that are not finite are left out. Blocks until it is durable.
    pub fn put_update(&self, update: &Update) -> Result<(), Error> {
        let mut update = update.clone();
        update.measures.retain(|_, value| value.is_finite());
        self.put(key::UPDATE, update.id.as_bytes(), codec::plain(&update)?)
    }

    pub fn update(&self, id: Uuid) -> Result<Option<Update>, Error> {
        self.plain(key::UPDATE, id.as_bytes())
    }

    /// The newest `limit`, newest first.
    pub fn updates(&self, limit: usize) -> Result<Vec<Update>, Error> {
        self.newest(key::UPDATE, limit)
    }

    /// Keeps the detectors' state together with the number of the first event that it has not seen. Blocks until both
    /// are durable.
    pub fn save_monitor(&self, state: &[u8], next_seq: u64) -> Result<(), Error> {
        let mut value = next_seq.to_be_bytes().to_vec();
        value.extend_from_slice(state);
        self.put(key::BLOB, MONITOR, value)
    }

    /// What [`Store::save_monitor`] kept last.
    pub fn load_monitor(&self) -> Result<Option<(Vec<u8>, u64)>, Error> {
        let Some(value) = key::get(&self.db, &key::key(key::BLOB, MONITOR))? else { return Ok(None) };
        let short = || Error::Corrupt("the monitor's state has no number".to_owned());
        let (seq, state) = value.split_first_chunk().ok_or_else(short)?;
        Ok(Some((state.to_vec(), u64::from_be_bytes(*seq))))
    }

    /// Keeps bytes under a name. Blocks until they are durable.
    pub fn put_blob(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.put(key::BLOB, &[NAMED, name.as_bytes()].concat(), bytes.to_vec())
    }

    pub fn blob(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        key::get(&self.db, &key::key(key::BLOB, &[NAMED, name.as_bytes()].concat()))
    }

    fn put(&self, space: u8, id: &[u8], value: Vec<u8>) -> Result<(), Error> {
        self.request_blocking(Change::Put { record: key::key(space, id), value }).map(|_| ())
    }

    fn plain<T: Serialize + DeserializeOwned>(&self, space: u8, id: &[u8]) -> Result<Option<T>, Error> {
        let record = key::get(&self.db, &key::key(space, id))?;
        record.map(|record| codec::decode_plain(&record)).transpose()
    }

    fn newest<T: DeserializeOwned>(&self, space: u8, limit: usize) -> Result<Vec<T>, Error> {
        let records = Records::all(&self.db, space).rev().take(limit);
        records.map(|record| codec::decode_plain(&record?)).collect()
    }
}

/// The key that no completion of an earlier millisecond reaches.
fn from_millisecond(at: u64) -> Vec<u8> {
    // A UUID of version 7 starts with 48 bits of milliseconds.
    match at.to_be_bytes() {
        [0, 0, time @ ..] => key::key(key::COMPLETION, &time),
        _ => vec![key::COMPLETION + 1],
    }
}

fn event(at: &[u8], record: &[u8]) -> Result<Event, Error> {
    match at.first() {
        Some(&key::COMPLETION) => codec::decode(record).map(Event::Completion),
        Some(&key::FEEDBACK) => codec::decode(record).map(Event::Feedback),
        _ => Err(Error::Corrupt("a line of the journal leads nowhere".to_owned())),
    }
}
