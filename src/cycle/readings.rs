//! Journal entries as readings, and the streams that they belong to.

use serde::{Deserialize, Serialize};

use crate::canary;
use crate::completion::{
    Completion, CompletionId, Feedback, InteractionType, Judgement, Prompt, Risk, Role, Signal, SignalKind,
    Timestamp, Version,
};
use crate::drift::Kind;
use crate::signals::{self, Probed};
use crate::store::{self, Event, Store};

/// One watched stream; no interaction is the whole traffic.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) struct Key {
    pub(super) signal: SignalKind,
    pub(super) interaction: Option<InteractionType>,
}

impl Key {
    pub(super) fn of(signal: &Signal) -> Self {
        Self { signal: signal.kind, interaction: Some(signal.interaction.clone()) }
    }

    pub(super) fn whole(signal: &Signal) -> Self {
        Self { signal: signal.kind, interaction: None }
    }

    /// Refusal is a bit, and so is satisfaction as it is watched: for bits the false-alarm bound is a theorem.
    pub(super) fn stream_kind(&self) -> Kind {
        match self.signal {
            SignalKind::Refusal | SignalKind::Satisfaction | SignalKind::Probes => Kind::Bernoulli,
            SignalKind::Helpfulness | SignalKind::Kl => Kind::Bounded,
        }
    }
}

/// A signal with the time at which it was read.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) signal: Signal,
    pub(super) at: Timestamp,
    /// Who says so: the kind of judgement, `next_turn`, or `answer` for what is read off the answer itself.
    pub(super) source: &'static str,
    /// Readings of the same circle are not independent.
    pub(super) circle: Option<Circle>,
    /// The request of the answer that it is about; probes are nobody's.
    pub(super) asked: Option<Asked>,
}

/// Who asked, when, and for what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    /// As [`canary::unit`] tells users apart.
    pub(super) unit: u64,
    pub(super) risk: Risk,
    pub(super) at: Timestamp,
}

impl Reading {
    /// The value as its stream sees it. Satisfied or not is a bit; what lies in the middle says neither.
    pub(super) fn watched(&self) -> Option<f64> {
        let value = self.signal.value;
        match self.signal.kind {
            SignalKind::Satisfaction if (value - 0.5).abs() < 1e-9 => None,
            SignalKind::Satisfaction => Some(f64::from(u8::from(value > 0.5))),
            SignalKind::Refusal | SignalKind::Helpfulness | SignalKind::Kl | SignalKind::Probes => {
                Some(value)
            }
        }
    }
}

/// A conversation, a user or a rater.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Circle {
    pub(super) name: u64,
    /// Whether nothing that came before belongs to it.
    pub(super) begins: bool,
}

impl Circle {
    /// Tags that name a conversation.
    const TAGS: [&str; 4] = ["conversation_id", "conversation", "session_id", "thread_id"];

    /// That of an answer: the caller's tag, else the user, else the beginning of a conversation of several turns.
    fn of_completion(completion: &Completion) -> Option<Self> {
        let known = |name: &str, what: &str| Some(Self { name: digest(&[what, name]), begins: false });
        if let Some(tag) = Self::TAGS.iter().find_map(|tag| completion.metadata.get(*tag)) {
            return known(tag, "conversation");
        }
        if let Some(user) = &completion.user {
            return known(user, "user");
        }
        let Prompt::Chat(messages) = &completion.prompt else { return None };
        let first = messages.iter().position(|message| message.role == Role::User)?;
        let opening: Vec<&str> = messages[..=first].iter().map(|message| message.content.as_str()).collect();
        let begins = messages.iter().all(|message| message.role != Role::Assistant);
        Some(Self { name: digest(&opening), begins })
    }

    fn of_rater(rater: &str) -> Self {
        Self { name: digest(&["rater", rater]), begins: false }
    }
}

/// The same in every process, as it is kept on disk.
pub(super) fn digest(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What a journal entry tells.
pub(super) fn of_event(event: &Event, store: &Store) -> Result<Vec<Reading>, store::Error> {
    match event {
        Event::Completion(completion) => of_completion(completion, store),
        Event::Feedback(feedback) => of_feedback(feedback, store),
    }
}

/// How probes went, which is in no journal.
pub(super) fn of_probe(probed: Probed, version: Version, at: Timestamp) -> Reading {
    let value = f64::from(u8::from(probed.passed));
    let signal = Signal {
        kind: SignalKind::Probes,
        interaction: probed.kind,
        version,
        completion: CompletionId::default(),
        value,
    };
    Reading { signal, at, source: "probe", circle: None, asked: None }
}

/// An answer's helpfulness by the reward model.
pub(super) fn of_score(completion: &Completion, value: f64) -> Reading {
    let told = (completion.at, "reward", Circle::of_completion(completion));
    reading(completion, SignalKind::Helpfulness, value, told)
}

/// Every reading that the store's journal holds, in the order in which the detectors saw them.
///
/// # Errors
/// The store fails.
pub fn every_reading(store: &Store, mut each: impl FnMut(&Signal, Timestamp)) -> Result<(), store::Error> {
    const ENTRIES: usize = 2000;
    let mut cursor = 0;
    loop {
        let events = store.events_since(cursor, ENTRIES)?;
        let Some((last, _)) = events.last() else { return Ok(()) };
        cursor = last + 1;
        for (_, event) in &events {
            of_event(event, store)?.iter().for_each(|reading| each(&reading.signal, reading.at));
        }
    }
}

fn of_completion(completion: &Completion, store: &Store) -> Result<Vec<Reading>, store::Error> {
    let mut values = vec![
        (SignalKind::Refusal, f64::from(u8::from(completion.refusal.is_refusal()))),
        (SignalKind::Helpfulness, completion.helpfulness.clamp(0.0, 1.0)),
    ];
    values.extend(completion.kl.map(|kl| (SignalKind::Kl, kl.clamp(0.0, 1.0))));
    let at = completion.at;
    let told = |source| (at, source, Circle::of_completion(completion));
    let read = |(kind, value)| reading(completion, kind, value, told("answer"));
    let mut readings: Vec<Reading> = values.into_iter().map(read).collect();
    if let Some(value) = signals::said_of_last(&completion.prompt) {
        let last = judged_by_next_turn(completion, store)?;
        let last = last.as_ref().unwrap_or(completion);
        readings.push(reading(last, SignalKind::Satisfaction, value, told("next_turn")));
    }
    Ok(readings)
}

/// The answer that a conversation's newest user turn speaks of; `None` if it was given elsewhere.
fn judged_by_next_turn(completion: &Completion, store: &Store) -> Result<Option<Completion>, store::Error> {
    let Prompt::Chat(messages) = &completion.prompt else { return Ok(None) };
    let Some(at) = messages.iter().rposition(|message| message.role == Role::Assistant) else {
        return Ok(None);
    };
    let id = store.answered(&messages[..=at])?;
    Ok(id.map(|id| store.completion(id)).transpose()?.flatten())
}

fn of_feedback(feedback: &Feedback, store: &Store) -> Result<Vec<Reading>, store::Error> {
    let mut values = Vec::new();
    match &feedback.judgement {
        Judgement::Comparison { chosen, rejected } => {
            let (better, worse) = signals::comparison_values();
            values.extend([(Some(*chosen), better), (Some(*rejected), worse)]);
        }
        judgement => {
            values.extend(signals::satisfaction(judgement).map(|value| (feedback.completion, value)))
        }
    }
    let mut readings = Vec::new();
    for (id, value) in values {
        let Some(id) = id else { continue };
        if let Some(completion) = store.completion(id)? {
            let circle = feedback.rater.as_deref().map(Circle::of_rater);
            let told = (feedback.at, feedback.judgement.kind(), circle);
            readings.push(reading(&completion, SignalKind::Satisfaction, value, told));
        }
    }
    Ok(readings)
}

fn reading(
    completion: &Completion,
    kind: SignalKind,
    value: f64,
    (at, source, circle): (Timestamp, &'static str, Option<Circle>),
) -> Reading {
    let signal = Signal {
        kind,
        interaction: completion.interaction.clone(),
        version: completion.version,
        completion: completion.id,
        value,
    };
    let unit = canary::unit(completion.user.as_deref(), &completion.metadata, &completion.prompt);
    let asked = Some(Asked { unit, risk: completion.risk, at: completion.at });
    Reading { signal, at, source, circle, asked }
}
