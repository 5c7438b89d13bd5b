//! Journal entries as readings, and the streams that they belong to.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::canary;
use crate::completion::{
    Cause, Completion, CompletionId, Direction, Feedback, InteractionType, Judgement, Prompt, Risk, Role,
    Share, Signal, SignalKind, Timestamp, Version,
};
use crate::drift::{self, Kin, Kind, Monitor, Moved, Segment};
use crate::signals::{self, Probed};
use crate::store::{self, Event, Store};

use super::{Error, Parts, Reason, helpfulness::Reference, trial::Trial};

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
    name: u64,
    /// Whether nothing that came before belongs to it.
    begins: bool,
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
fn digest(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What each circle has shown of each signal and type; the newest so many. Other types are not drawn upon: of what is rare
/// in one and common in another no line tells, and a drift of one would be expected of the other.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Circles {
    /// The oldest first.
    kept: VecDeque<(SignalKind, u64)>,
    #[serde(with = "pairs")]
    kin: BTreeMap<(SignalKind, u64), Kin>,
}

/// JSON's keys are strings, so the map is kept as a list.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    type Map = BTreeMap<(super::SignalKind, u64), super::Kin>;

    pub(super) fn serialize<S: Serializer>(map: &Map, to: S) -> Result<S::Ok, S::Error> {
        map.iter().collect::<Vec<_>>().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Map, D::Error> {
        Vec::deserialize(from).map(|pairs| pairs.into_iter().collect())
    }
}

impl Circles {
    const KEPT: usize = 4096;

    /// What came before a reading from its circle.
    pub(super) fn before(&self, reading: &Reading) -> Kin {
        let circle = reading.circle.filter(|circle| !circle.begins);
        circle.and_then(|circle| self.kin.get(&Self::key(reading, circle))).copied().unwrap_or_default()
    }

    fn key(reading: &Reading, circle: Circle) -> (SignalKind, u64) {
        let name = digest(&[reading.signal.interaction.as_str(), &circle.name.to_string()]);
        (reading.signal.kind, name)
    }

    /// Notes by how much a reading deviated.
    pub(super) fn note(&mut self, reading: &Reading, before: Kin, deviation: f64) {
        let Some(circle) = reading.circle else { return };
        let key = Self::key(reading, circle);
        if self.kin.insert(key, before.with(deviation)).is_none() {
            self.kept.push_back(key);
            if self.kept.len() > Self::KEPT
                && let Some(oldest) = self.kept.pop_front()
            {
                self.kin.remove(&oldest);
            }
        }
    }
}

/// What the loop keeps on disk between two processes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) version: Version,
    pub(super) cause: Option<Reason>,
    #[serde(default)]
    pub(super) trial: Option<Trial>,
    pub(super) monitor: drift::Saved<Key>,
    #[serde(default)]
    pub(super) circles: Circles,
    #[serde(default)]
    pub(super) helpfulness: Reference,
}

/// What the last process remembered, and its place in the journal.
pub(super) fn restore(parts: &Parts) -> Result<(Memory, u64), Error> {
    match parts.store.load_monitor()? {
        Some((saved, cursor)) => {
            let memory = serde_json::from_slice(&saved).map_err(|error| Error::State(error.to_string()))?;
            Ok((memory, cursor))
        }
        None => {
            let monitor = Monitor::new(parts.drift.clone())?.save();
            Ok((
                Memory {
                    version: parts.registry.active(),
                    cause: None,
                    trial: None,
                    monitor,
                    circles: Circles::default(),
                    helpfulness: Reference::default(),
                },
                0,
            ))
        }
    }
}

/// What a journal entry tells.
pub(super) fn readings(event: &Event, store: &Store) -> Result<Vec<Reading>, store::Error> {
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
            readings(event, store)?.iter().for_each(|reading| each(&reading.signal, reading.at));
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

/// The types before and after a change of the whole traffic.
pub(super) fn segments(
    monitor: &Monitor<Key>,
    signal: SignalKind,
    from: Timestamp,
) -> Vec<Segment<InteractionType>> {
    let of_types = monitor.streams().filter(|(key, _)| key.signal == signal);
    of_types
        .filter_map(|(key, stream)| {
            let segment = key.interaction.clone()?;
            let (row, (n_after, mean_after)) = (stream.row(), stream.since(from.0));
            let (n_before, mean_before) = (row.n.saturating_sub(n_after), row.baseline.unwrap_or(mean_after));
            Some(Segment { segment, n_before, mean_before, n_after, mean_after })
        })
        .collect()
}

/// How much each type accounts for the change.
pub(super) fn shares(segments: &[Segment<InteractionType>]) -> Vec<Share> {
    drift::shares(segments).into_iter().map(|(interaction, share)| Share { interaction, share }).collect()
}

/// What is named as the reason of an alarm: the traffic where the types' shares moved the mean more than the types
/// did, the raters where only a few of them moved, else the model.
pub(super) fn cause(
    alarm: &drift::Alarm,
    segments: &[Segment<InteractionType>],
    raters: &[Segment<Circle>],
) -> Cause {
    let (within, between) = drift::parts(segments);
    if alarm.moved == Moved::Whole && between.abs() > within.abs() {
        Cause::Traffic
    } else if drift::few_moved(raters, alarm.current - alarm.baseline) {
        Cause::Raters
    } else {
        Cause::Model
    }
}

/// The newest readings of each type, for an alarm's examples and its raters.
#[derive(Debug, Default)]
pub(super) struct Recent {
    readings: BTreeMap<Key, VecDeque<Reading>>,
}

impl Recent {
    const KEPT: usize = 1024;
    const SHOWN: usize = 10;

    pub(super) fn push(&mut self, reading: &Reading) {
        for key in [Key::of(&reading.signal), Key::whole(&reading.signal)] {
            let kept = self.readings.entry(key).or_default();
            if kept.len() == Self::KEPT {
                kept.pop_front();
            }
            kept.push_back(reading.clone());
        }
    }

    /// Answers from after `since` that moved the stream most, most first; each once.
    pub(super) fn worst(&self, key: &Key, since: Timestamp, direction: Direction) -> Vec<CompletionId> {
        let kept = self.readings.get(key).into_iter().flatten();
        let mut after: Vec<_> = kept.filter(|reading| reading.at >= since).collect();
        after.sort_by(|a, b| match direction {
            Direction::Up => b.signal.value.total_cmp(&a.signal.value),
            Direction::Down => a.signal.value.total_cmp(&b.signal.value),
        });
        let mut shown = Vec::new();
        for reading in after {
            if !shown.contains(&reading.signal.completion) && shown.len() < Self::SHOWN {
                shown.push(reading.signal.completion);
            }
        }
        shown
    }

    /// The raters of a stream before and after `since`; none for what nobody rated.
    pub(super) fn raters(&self, key: &Key, since: Timestamp) -> Vec<Segment<Circle>> {
        let mut raters: BTreeMap<u64, Segment<Circle>> = BTreeMap::new();
        let rated = |reading: &&Reading| reading.signal.kind == SignalKind::Satisfaction;
        for reading in self.readings.get(key).into_iter().flatten().filter(rated) {
            let Some(segment) = reading.circle else { continue };
            let none = Segment { segment, n_before: 0, mean_before: 0.0, n_after: 0, mean_after: 0.0 };
            let rater = raters.entry(segment.name).or_insert(none);
            let (n, mean) = if reading.at >= since {
                (&mut rater.n_after, &mut rater.mean_after)
            } else {
                (&mut rater.n_before, &mut rater.mean_before)
            };
            *n += 1;
            *mean += (reading.signal.value - *mean) / *n as f64;
        }
        raters.into_values().collect()
    }
}
