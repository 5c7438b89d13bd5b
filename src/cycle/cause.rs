//! Why a stream moved: the types, the traffic or the raters at fault, and answers that show it.

use std::collections::{BTreeMap, VecDeque};

use crate::completion::{Cause, CompletionId, Direction, InteractionType, Share, SignalKind, Timestamp};
use crate::drift::{self, Monitor, Moved, Segment};

use super::readings::{Circle, Key, Reading};

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
pub(super) fn of_alarm(
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
