//! Which judgements an update learns from: those of the served version, some of earlier ones so that their lessons are
//! not forgotten, and those of the gate's prompts, which nothing learns from.

use std::collections::BTreeMap;

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::completion::{Completion, Feedback, InteractionType, Source, Timestamp, Trigger, Update};
use crate::learn::{
    Dataset,
    dataset::{self, Split},
};
use crate::signals;

use super::{Error, Run, Stopped};

/// Old answers that are looked through, the newest first.
const LOOKED_AT: usize = 50_000;
/// Updates whose changes are still respected.
const REMEMBERED: usize = 1000;

/// An answer with what was said of it.
type Judged = (Completion, Vec<Feedback>);

/// Since when each type's judgements say what is wanted of it. What was wanted before is what an update has unlearned,
/// or is to unlearn.
struct Changes(BTreeMap<InteractionType, Timestamp>);

impl Changes {
    fn outdate(&self, completion: &Completion) -> bool {
        self.0.get(&completion.interaction).is_some_and(|since| completion.at < *since)
    }
}

impl Run {
    /// Judged answers of the served version and a share of those of earlier versions, of each type since it last changed.
    pub(super) fn dataset(&mut self) -> Result<Dataset, Stopped> {
        let changes = self.changes()?;
        let (mut new, mut old) = (Vec::new(), Vec::new());
        let mut left_out: BTreeMap<String, usize> = BTreeMap::new();
        for record in self.parts.store.judged(..).rev() {
            let (completion, feedback) = record.map_err(Error::from)?;
            if feedback.is_empty() {
                continue;
            }
            if changes.outdate(&completion) {
                *left_out.entry("from before the change".to_owned()).or_default() += feedback.len();
            } else if completion.version == self.update.base {
                new.push((completion, feedback));
            } else if old.len() < LOOKED_AT {
                old.push((completion, feedback));
            }
        }
        let config = &self.parts.learn.dataset;
        let usable = Dataset::build(new.clone(), config, &signals::satisfaction).judged();
        let needed = self.parts.config.minimum_feedback.min(self.needed());
        old.shuffle(&mut StdRng::seed_from_u64(self.seed()));
        let kept = (self.parts.config.rehearsal * new.len() as f64).ceil() as usize;
        let unused = old.drain(kept.min(old.len())..).map(|(_, feedback)| feedback.len()).sum::<usize>();
        if unused > 0 {
            left_out.insert("about other versions".to_owned(), unused);
        }
        let rehearsed = old.len();
        let records = interleaved(new, old, self.parts.config.rehearsal);
        let mut dataset = Dataset::build(records, config, &signals::satisfaction);
        dataset.report.left_out.extend(left_out);
        dataset.report.rehearsed = rehearsed;
        self.shared.revise(|update| update.data = Some(dataset.report.clone()));
        if usable < needed {
            return Err(Stopped::TooFew { usable, needed });
        }
        let least = config.minimum_raters;
        if dataset.report.raters < least {
            return Err(Stopped::TooFewRaters { raters: dataset.report.raters, needed: least });
        }
        self.update.feedback.clone_from(&dataset.feedback);
        Ok(dataset)
    }

    /// At most `most` judged answers to prompts that are the gate's, of any version, of each type since it last changed.
    pub(super) fn old_judgements(&self, most: usize) -> Result<Dataset, Error> {
        let changes = self.changes()?;
        let mut records: Vec<Judged> = Vec::new();
        for record in self.parts.store.judged(..).rev().take(LOOKED_AT) {
            let (completion, mut feedback) = record?;
            // What people want is what people said, not what a judge model takes them to want.
            feedback.retain(|said| said.source == Source::Human);
            let gates = dataset::split(&completion.prompt) == Split::Gate;
            if gates && !feedback.is_empty() && !changes.outdate(&completion) {
                records.push((completion, feedback));
            }
            if records.len() == most {
                break;
            }
        }
        records.reverse();
        Ok(Dataset::build(records, &self.parts.learn.dataset, &signals::satisfaction))
    }

    /// The changes that this update and those before it were made for.
    fn changes(&self) -> Result<Changes, Error> {
        let mut changes = BTreeMap::new();
        let before = self.parts.store.updates(REMEMBERED)?;
        for update in before.iter().chain([&self.update]) {
            let Some(at) = self.change_at(update)? else { continue };
            for interaction in &update.interactions {
                let since = changes.entry(interaction.clone()).or_insert(at);
                *since = at.max(*since);
            }
        }
        Ok(Changes(changes))
    }

    fn change_at(&self, update: &Update) -> Result<Option<Timestamp>, Error> {
        let Trigger::Alarm { alarm } = update.trigger else { return Ok(None) };
        Ok(self.parts.store.alarm(alarm)?.map(|alarm| alarm.change_at))
    }

    /// An update by hand is taken at its word, as long as there is anything to learn from.
    fn needed(&self) -> usize {
        match self.update.trigger {
            Trigger::Hand => 1,
            Trigger::Alarm { .. } => usize::MAX,
        }
    }
}

/// Both in one, the newest last, with `share` old ones to each new one: where only the newest are learned from, the old
/// keep their share. `new` has the newest first.
fn interleaved<T>(new: Vec<T>, old: Vec<T>, share: f64) -> Vec<T> {
    let mut both = Vec::with_capacity(new.len() + old.len());
    let (mut old, mut due) = (old.into_iter(), 0.0);
    for record in new {
        both.push(record);
        due += share;
        while due >= 1.0 {
            both.extend(old.next());
            due -= 1.0;
        }
    }
    both.extend(old);
    both.reverse();
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_hold_their_share_of_old_ones() {
        let both = interleaved((0..8).collect(), (100..104).collect(), 0.5);
        assert_eq!(both.len(), 12);
        let newest: Vec<i32> = both.iter().rev().take(6).copied().collect();
        assert_eq!(newest, [0, 1, 100, 2, 3, 101]);
        assert_eq!(interleaved(vec![2, 1], vec![], 0.5), [1, 2]);
        assert_eq!(interleaved(vec![], vec![7], 0.5), [7]);
    }
}
