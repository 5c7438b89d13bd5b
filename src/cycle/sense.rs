//! Journal entries as readings, and the streams that they belong to.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::completion::{
    Completion, CompletionId, Direction, Feedback, InteractionType, Judgement, Prompt, Role, Share, Signal,
    SignalKind, Timestamp, Version,
};
use crate::drift::{self, Kind, Monitor, Segment};
use crate::signals::{self, Probed};
use crate::store::{self, Event, Store};

use super::{Cause, Error, Parts};

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

/// What the loop keeps on disk between two processes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) version: Version,
    pub(super) cause: Option<Cause>,
    pub(super) monitor: drift::Saved<Key>,
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
            Ok((Memory { version: parts.registry.active(), cause: None, monitor }, 0))
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
    Reading { signal, at, source: "probe" }
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
    let read = |(kind, value)| reading(completion, kind, value, (at, "answer"));
    let mut readings: Vec<Reading> = values.into_iter().map(read).collect();
    if let Some(value) = signals::said_of_last(&completion.prompt) {
        let last = judged_by_next_turn(completion, store)?;
        let last = last.as_ref().unwrap_or(completion);
        readings.push(reading(last, SignalKind::Satisfaction, value, (at, "next_turn")));
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
            let told = (feedback.at, feedback.judgement.kind());
            readings.push(reading(&completion, SignalKind::Satisfaction, value, told));
        }
    }
    Ok(readings)
}

fn reading(
    completion: &Completion,
    kind: SignalKind,
    value: f64,
    (at, source): (Timestamp, &'static str),
) -> Reading {
    let signal = Signal {
        kind,
        interaction: completion.interaction.clone(),
        version: completion.version,
        completion: completion.id,
        value,
    };
    Reading { signal, at, source }
}

/// How much each interaction type accounts for a change of the whole traffic.
pub(super) fn shares(monitor: &Monitor<Key>, signal: SignalKind, direction: drift::Direction) -> Vec<Share> {
    let rows = monitor.rows();
    let segments: Vec<Segment<InteractionType>> = rows
        .into_iter()
        .filter(|(key, _)| key.signal == signal)
        .filter_map(|(key, row)| {
            let (interaction, baseline, current) = (key.interaction?, row.baseline?, row.current?);
            let moved = match direction {
                drift::Direction::Up => current > baseline,
                drift::Direction::Down => current < baseline,
            };
            let current = if moved { current } else { baseline };
            Some(Segment {
                segment: interaction,
                n_before: row.n,
                mean_before: baseline,
                n_after: row.n,
                mean_after: current,
            })
        })
        .collect();
    drift::shares(&segments).into_iter().map(|(interaction, share)| Share { interaction, share }).collect()
}

/// The newest readings of each type, for an alarm's examples.
#[derive(Debug, Default)]
pub(super) struct Recent {
    readings: BTreeMap<Key, VecDeque<(Timestamp, f64, CompletionId)>>,
}

impl Recent {
    const KEPT: usize = 256;
    const SHOWN: usize = 5;

    pub(super) fn push(&mut self, reading: &Reading) {
        for key in [Key::of(&reading.signal), Key::whole(&reading.signal)] {
            let kept = self.readings.entry(key).or_default();
            if kept.len() == Self::KEPT {
                kept.pop_front();
            }
            kept.push_back((reading.at, reading.signal.value, reading.signal.completion));
        }
    }

    /// Answers from after `since` that moved the stream most, most first.
    pub(super) fn worst(&self, key: &Key, since: Timestamp, direction: Direction) -> Vec<CompletionId> {
        let kept = self.readings.get(key).into_iter().flatten();
        let mut after: Vec<_> = kept.filter(|(at, _, _)| *at >= since).collect();
        after.sort_by(|a, b| match direction {
            Direction::Up => b.1.total_cmp(&a.1),
            Direction::Down => a.1.total_cmp(&b.1),
        });
        after.iter().take(Self::SHOWN).map(|(_, _, completion)| *completion).collect()
    }
}
