//! What a record's bytes are: a fixed envelope, which can be read without the rest, and JSON.
//!
//! JSON because the vocabulary's enums are tagged and untagged, which only a format that describes itself can hold,
//! and because a person can read it when nothing else works any more.

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::completion::{Completion, CompletionId, Feedback, FeedbackId, Judgement, Prompt, Role, Timestamp};

use super::Error;

const FORMAT: u8 = 1;
/// Format, sequence number, time, fingerprint of the prompt.
const ENVELOPE: usize = 1 + 8 + 8 + 16;

/// Tells whether two answers are to one prompt, also when the prompt's text is not kept.
pub(super) type Fingerprint = [u8; 16];

/// Salted with a secret of this store, so that stores cannot be compared with each other.
pub(super) fn fingerprint(salt: &[u8], prompt: &Prompt) -> Fingerprint {
    let mut hash = Sha256::new();
    hash.update(salt);
    hash.update(prompt.canonical());
    let digest: [u8; 32] = hash.finalize().into();
    let mut fingerprint = [0; 16];
    fingerprint.copy_from_slice(&digest[..16]);
    fingerprint
}

/// A journalled record on its way to the disk; its sequence number is not known yet.
pub(super) struct Draft {
    pub(super) id: Uuid,
    pub(super) at: Timestamp,
    /// Zeros for a feedback.
    pub(super) fingerprint: Fingerprint,
    json: Vec<u8>,
}

impl Draft {
    pub(super) fn bytes(&self, seq: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ENVELOPE + self.json.len());
        bytes.push(FORMAT);
        bytes.extend_from_slice(&seq.to_be_bytes());
        bytes.extend_from_slice(&self.at.0.to_be_bytes());
        bytes.extend_from_slice(&self.fingerprint);
        bytes.extend_from_slice(&self.json);
        bytes
    }

    pub(super) fn len(&self) -> usize {
        ENVELOPE + self.json.len()
    }
}

/// What stands before the JSON of a journalled record.
pub(super) struct Envelope {
    pub(super) seq: u64,
    pub(super) at: Timestamp,
    pub(super) fingerprint: Fingerprint,
}

impl Envelope {
    pub(super) fn read(record: &[u8]) -> Result<Self, Error> {
        let mut rest = record;
        if take::<1>(&mut rest)? != [FORMAT] {
            return Err(Error::Corrupt("a record has an unknown format".to_owned()));
        }
        Ok(Self {
            seq: u64::from_be_bytes(take(&mut rest)?),
            at: Timestamp(u64::from_be_bytes(take(&mut rest)?)),
            fingerprint: take(&mut rest)?,
        })
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Error> {
    let (head, tail) = bytes
        .split_first_chunk()
        .ok_or_else(|| Error::Corrupt("a record is shorter than its envelope".to_owned()))?;
    *bytes = tail;
    Ok(*head)
}

/// Reads a record of the journal: a completion or a feedback.
pub(super) fn decode<T: DeserializeOwned>(record: &[u8]) -> Result<T, Error> {
    Envelope::read(record)?;
    parse(&record[ENVELOPE..])
}

/// Reads what [`plain`] wrote.
pub(super) fn decode_plain<T: DeserializeOwned>(record: &[u8]) -> Result<T, Error> {
    match record.split_first() {
        Some((&FORMAT, json)) => parse(json),
        _ => Err(Error::Corrupt("a record has an unknown format".to_owned())),
    }
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(json).map_err(|error| Error::Corrupt(error.to_string()))
}

/// A record outside the journal. JSON has no infinity and no NaN, so it is read back before it is kept.
pub(super) fn plain<T: Serialize + DeserializeOwned>(value: &T) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![FORMAT];
    serde_json::to_writer(&mut bytes, value).map_err(|error| Error::Corrupt(error.to_string()))?;
    decode_plain::<T>(&bytes)
        .map_err(|_| Error::Invalid { field: "record", problem: "has a number that is not finite" })?;
    Ok(bytes)
}

pub(super) fn completion(completion: &Completion, salt: &[u8], redact: bool) -> Result<Draft, Error> {
    let finite = |field, value: f64| {
        if value.is_finite() { Ok(()) } else { Err(Error::Invalid { field, problem: "is not finite" }) }
    };
    finite("helpfulness", completion.helpfulness)?;
    finite("kl", completion.kl.unwrap_or(0.0))?;
    finite("seconds", completion.seconds)?;
    finite("refusal.probability", completion.refusal.probability)?;
    let kept = if redact {
        let mut kept = completion.clone();
        redact_prompt(&mut kept.prompt);
        kept.answer.clear();
        kept.metadata.clear();
        json(&kept)?
    } else {
        json(completion)?
    };
    let fingerprint = fingerprint(salt, &completion.prompt);
    Ok(Draft { id: completion.id.0, at: completion.at, fingerprint, json: kept })
}

pub(super) fn feedback(feedback: &Feedback, redact: bool) -> Result<Draft, Error> {
    if let Judgement::Rating { stars } = feedback.judgement
        && !(1..=5).contains(&stars)
    {
        return Err(Error::Invalid { field: "value", problem: "is a rating from 1 to 5" });
    }
    let json = if redact {
        let mut kept = feedback.clone();
        kept.comment = None;
        kept.tags.clear();
        match &mut kept.judgement {
            Judgement::TextComparison { prompt, chosen, rejected } => {
                redact_prompt(prompt);
                chosen.clear();
                rejected.clear();
            }
            Judgement::Demonstration { answer } => answer.clear(),
            Judgement::Thumbs { .. }
            | Judgement::Rating { .. }
            | Judgement::Comparison { .. }
            | Judgement::Flag { .. }
            | Judgement::Behaviour { .. } => {}
        }
        json(&kept)?
    } else {
        json(feedback)?
    };
    Ok(Draft { id: feedback.id.0, at: feedback.at, fingerprint: [0; 16], json })
}

fn redact_prompt(prompt: &mut Prompt) {
    match prompt {
        Prompt::Text(text) => text.clear(),
        Prompt::Chat(messages) => messages.iter_mut().for_each(|message| message.content.clear()),
    }
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|error| Error::Corrupt(error.to_string()))
}

/// The logged answers that a feedback judges: none, one, or two of the same prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subjects {
    Texts,
    One(CompletionId),
    Two { chosen: CompletionId, rejected: CompletionId },
}

impl Subjects {
    pub(super) fn of(feedback: &Feedback) -> Result<Self, Error> {
        match feedback.judgement {
            // Where it names an answer, it is kept with it.
            Judgement::TextComparison { .. } => Ok(feedback.completion.map_or(Self::Texts, Self::One)),
            Judgement::Comparison { chosen, rejected } if chosen == rejected => {
                Err(Error::Invalid { field: "rejected", problem: "is the chosen answer itself" })
            }
            Judgement::Comparison { chosen, rejected } => Ok(Self::Two { chosen, rejected }),
            Judgement::Thumbs { .. }
            | Judgement::Rating { .. }
            | Judgement::Demonstration { .. }
            | Judgement::Flag { .. }
            | Judgement::Behaviour { .. } => feedback
                .completion
                .map(Self::One)
                .ok_or(Error::Invalid { field: "completion_id", problem: "is missing" }),
        }
    }

    pub(super) fn ids(self) -> impl Iterator<Item = CompletionId> {
        let (first, second) = match self {
            Self::Texts => (None, None),
            Self::One(id) => (Some(id), None),
            Self::Two { chosen, rejected } => (Some(chosen), Some(rejected)),
        };
        first.into_iter().chain(second)
    }
}

/// The place of an idempotency key, however long it is.
pub(super) fn idempotency(feedback: &Feedback) -> Option<[u8; 32]> {
    feedback.idempotency_key.as_deref().map(place)
}

/// The place of a name that somebody else chose.
pub(super) fn place(name: &str) -> [u8; 32] {
    Sha256::digest(name).into()
}

/// The place of a conversation that ends with an answer. What surrounds a message's words does not matter: clients trim.
pub(super) fn conversation<'a>(salt: &[u8], turns: impl Iterator<Item = (Role, &'a str)>) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(salt);
    for (role, content) in turns {
        let content = content.trim();
        digest.update(role.as_str());
        digest.update((content.len() as u64).to_be_bytes());
        digest.update(content);
    }
    digest.finalize().into()
}

/// The UUID in a value or at the end of a key.
pub(super) fn uuid(bytes: &[u8]) -> Result<Uuid, Error> {
    let tail = bytes.last_chunk().ok_or_else(|| Error::Corrupt("an id is too short".to_owned()))?;
    Ok(Uuid::from_bytes(*tail))
}

pub(super) fn feedback_id(bytes: &[u8]) -> Result<FeedbackId, Error> {
    uuid(bytes).map(FeedbackId)
}
