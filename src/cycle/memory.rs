//! What the loop remembers, also of the process before.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::completion::{SignalKind, Version};
use crate::drift::{self, Kin, Monitor};

use super::{
    Error, Parts, Reason,
    helpfulness::Reference,
    readings::{Circle, Key, Reading, digest},
    trial::Trial,
};

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
