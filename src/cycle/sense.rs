//! Journal entries as readings, and the streams that they belong to.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::completion::{
    Completion, CompletionId, Direction, Feedback, InteractionType, Judgement, Prompt, Role, Share, Signal,
    SignalKind, Timestamp, Version,
};
use crate::drift::{self, Kind, Monitor, Segment};
use crate::signals;
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
            SignalKind::Refusal | SignalKind::Satisfaction => Kind::Bernoulli,
            SignalKind::Helpfulness | SignalKind::Kl => Kind::Bounded,
        }
    }
}

/// A signal with the time at which it was read.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) signal: Signal,
    pub(super) at: Timestamp,
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
        Event::Completion(completion) => Ok(of_completion(completion)),
        Event::Feedback(feedback) => of_feedback(feedback, store),
    }
}

fn of_completion(completion: &Completion) -> Vec<Reading> {
    let mut values = vec![
        (SignalKind::Refusal, f64::from(u8::from(completion.refusal.is_refusal()))),
        (SignalKind::Helpfulness, completion.helpfulness.clamp(0.0, 1.0)),
    ];
    values.extend(completion.kl.map(|kl| (SignalKind::Kl, kl.clamp(0.0, 1.0))));
    values.extend(said_in_next_turn(completion).and_then(satisfied));
    values.into_iter().map(|(kind, value)| reading(completion, kind, value, completion.at)).collect()
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
        let (Some(id), Some((kind, value))) = (id, satisfied(value)) else { continue };
        if let Some(completion) = store.completion(id)? {
            readings.push(reading(&completion, kind, value, feedback.at));
        }
    }
    Ok(readings)
}

fn reading(completion: &Completion, kind: SignalKind, value: f64, at: Timestamp) -> Reading {
    let signal = Signal {
        kind,
        interaction: completion.interaction.clone(),
        version: completion.version,
        completion: completion.id,
        value,
    };
    Reading { signal, at }
}

/// Satisfied or not; a value in the middle says neither.
fn satisfied(value: f64) -> Option<(SignalKind, f64)> {
    let bit = if value > 0.5 { 1.0 } else { 0.0 };
    ((value - 0.5).abs() > 1e-9).then_some((SignalKind::Satisfaction, bit))
}

/// What a conversation's newest user turn says of the answer before it.
fn said_in_next_turn(completion: &Completion) -> Option<f64> {
    let Prompt::Chat(messages) = &completion.prompt else { return None };
    let mut turns = messages.iter().rev().filter(|message| message.role == Role::User);
    let (next, previous) = (turns.next()?, turns.next()?);
    signals::next_turn(&previous.content, &next.content)
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
