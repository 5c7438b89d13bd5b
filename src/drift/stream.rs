//! One watched stream: it learns a reference, watches, and alarms once.

use serde::{Deserialize, Serialize};

use super::{
    Direction, Error, Kind, State, Watch,
    baseline::{Baseline, Expected, Kin},
    bits,
    change::{ChangePoint, Past, locate},
    evidence_log10,
    history::History,
    predictive::Bets,
    strict::Strict,
};

/// An alarm needs a change that the readings show, by this likelihood-ratio statistic (nats): where all readings
/// are the same, `M` grows by 1 with each of them, and evidence would be nothing but time.
const MIN_CHANGE: f64 = 1.0;

/// Readings between two looks at whether all is quiet.
const QUIET_EVERY: u64 = 8;

const DAY_MS: f64 = 86_400_000.0;

/// How streams are set up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    pub kind: Kind,
    pub watch: Watch,
    /// Readings that make the reference.
    pub reference: usize,
    /// Whether the course of the day is learned.
    pub seasonal: bool,
    /// Whether STRICT runs beside.
    pub strict: bool,
}

/// One reading of a stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    pub value: f64,
    /// Milliseconds since the epoch.
    pub at: u64,
    /// What the same conversation, user or rater has shown before.
    pub kin: Kin,
}

/// A stream of readings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stream {
    setup: Setup,
    baseline: Baseline,
    /// The baseline when there was last hardly any evidence: what came after may be a change, from which neither the hours
    /// nor the conversations are learned.
    quiet: Option<Box<Baseline>>,
    /// Mean over the reference, once it is full.
    #[serde(with = "bits")]
    reference: f64,
    bets: Option<Bets>,
    /// Evidence `M` at which it alarms.
    #[serde(with = "bits")]
    threshold: f64,
    alarmed: bool,
    /// Readings in all, and those of this reference and after it, since `first`.
    n: u64,
    seen: u64,
    first: u64,
    /// Time of the change that an alarm found.
    changed: Option<u64>,
    /// Readings less what their hour made of them, and, where they were forecast by their segment, less that.
    history: History,
    mixed: Option<Box<Mixed>>,
    strict: Option<Box<Strict>>,
}

/// What a stream of several segments shows without regard to them: it also moves when only their shares do.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct Mixed {
    bets: Option<Bets>,
    history: History,
}

/// What may have changed, as far as the stream knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// The readings, given their segments.
    Readings,
    /// Only the whole: its segments' shares, or too little in each to tell.
    Whole,
}

/// A change that was detected.
#[derive(Debug, Clone, PartialEq)]
pub struct Alarm {
    pub direction: Direction,
    pub moved: Moved,
    pub change: Change,
    pub baseline: f64,
    /// Mean of the readings since the change.
    pub current: f64,
    pub evidence_log10: f64,
    pub threshold_log10: f64,
    /// STRICT's evidence, where it runs.
    pub strict_log10: Option<f64>,
}

/// When a stream changed, in milliseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    pub at: u64,
    pub from: u64,
    pub to: u64,
    /// Readings since `at`.
    pub samples: u64,
}

/// A stream as the scorecard shows it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    pub baseline: Option<f64>,
    pub current: Option<f64>,
    pub evidence_log10: f64,
    pub threshold_log10: f64,
    pub strict_log10: Option<f64>,
    pub state: State,
    pub n: u64,
}

impl Stream {
    /// An empty stream whose first readings make its baseline.
    pub fn new(setup: Setup) -> Self {
        Self {
            setup,
            baseline: Baseline::new(setup.kind, setup.seasonal),
            quiet: None,
            reference: 0.0,
            bets: None,
            threshold: 1.0,
            alarmed: false,
            n: 0,
            seen: 0,
            first: 0,
            changed: None,
            history: History::default(),
            mixed: None,
            strict: setup.strict.then(|| Box::new(Strict::new(setup.kind))),
        }
    }

    pub fn kind(&self) -> Kind {
        self.setup.kind
    }

    pub fn state(&self) -> State {
        match (&self.bets, self.alarmed) {
            (None, _) => State::Learning,
            (Some(_), false) => State::Steady,
            (Some(_), true) => State::Alarm,
        }
    }

    /// Whether it is a stream of several segments.
    pub(super) fn is_whole(&self) -> bool {
        self.mixed.is_some()
    }

    /// The forecast of a reading, once there are enough to forecast from.
    pub fn expect(&self, at: u64, kin: Kin) -> Option<Expected> {
        (self.baseline.count() >= super::MIN_REFERENCE as f64).then(|| self.baseline.expect(at, kin))
    }

    /// Takes a reading. `threshold` is asked for the threshold at the readings a day that the stream gets.
    ///
    /// # Errors
    /// It is no reading of this stream's kind; nothing has changed then.
    pub fn observe(
        &mut self,
        reading: Reading,
        threshold: impl FnOnce(f64) -> f64,
    ) -> Result<Option<Alarm>, Error> {
        self.setup.kind.check(reading.value)?;
        let expected = self.baseline.expect(reading.at, reading.kin);
        let adjusted = reading.value - (expected.base - self.baseline.mean());
        self.history.push(adjusted, reading.at);
        if let Some(bets) = &mut self.bets {
            bets.update(self.setup.kind, reading.value, &expected);
        }
        if let Some(strict) = &mut self.strict {
            strict.update(reading.value, self.bets.is_none());
        }
        self.baseline.learn(reading.value, &expected);
        Ok(self.judge(reading, threshold))
    }

    /// Takes a reading of the whole traffic. `by_segment` is its forecast by its own segment's stream; without one
    /// it is no evidence of a change within segments.
    ///
    /// # Errors
    /// As [`Stream::observe`].
    pub fn observe_whole(
        &mut self,
        reading: Reading,
        by_segment: Option<&Expected>,
        threshold: impl FnOnce(f64) -> f64,
    ) -> Result<Option<Alarm>, Error> {
        self.setup.kind.check(reading.value)?;
        let kind = self.setup.kind;
        let own = self.baseline.expect(reading.at, reading.kin);
        let mixed = self.mixed.get_or_insert_default();
        mixed.history.push(reading.value - (own.base - self.baseline.mean()), reading.at);
        if let Some(bets) = &mut mixed.bets {
            bets.update(kind, reading.value, &own);
        }
        if let Some(expected) = by_segment {
            let level = if self.bets.is_some() { self.reference } else { self.baseline.mean() };
            self.history.push(level + reading.value - expected.base, reading.at);
            if let Some(bets) = &mut self.bets {
                bets.update(kind, reading.value, expected);
            }
        }
        self.baseline.learn(reading.value, &own);
        Ok(self.judge(reading, threshold))
    }

    /// Ends the reference when it is full, and looks whether the evidence is enough.
    fn judge(&mut self, reading: Reading, threshold: impl FnOnce(f64) -> f64) -> Option<Alarm> {
        if self.seen == 0 {
            self.first = reading.at;
        }
        self.n += 1;
        self.seen += 1;
        let days = reading.at.saturating_sub(self.first).max(1) as f64 / DAY_MS;
        if self.bets.is_none() {
            self.reference += (reading.value - self.reference) / self.seen as f64;
            if self.seen >= self.setup.reference as u64 {
                let Setup { kind, watch, .. } = self.setup;
                let bets = Bets::new(kind, self.baseline.mean(), self.baseline.spread(), watch);
                if let Some(mixed) = &mut self.mixed {
                    mixed.bets = Some(bets.clone());
                }
                self.bets = Some(bets);
                self.threshold = threshold(self.seen as f64 / days);
            }
            return None;
        }
        self.threshold = threshold(self.seen as f64 / days);
        if self.n.is_multiple_of(QUIET_EVERY) && !self.alarmed && self.statistic().powi(2) < self.threshold {
            self.quiet = Some(Box::new(self.baseline.clone()));
        }
        if self.alarmed || self.statistic() < self.threshold {
            return None;
        }
        let alarm = self.alarm();
        self.alarmed = alarm.is_some();
        self.changed = alarm.as_ref().map(|alarm| alarm.change.at);
        if alarm.is_none() {
            self.bets.iter_mut().for_each(Bets::restart);
            self.mixed.iter_mut().filter_map(|mixed| mixed.bets.as_mut()).for_each(Bets::restart);
        }
        alarm
    }

    fn within(&self) -> f64 {
        self.bets.as_ref().map_or(0.0, Bets::statistic)
    }

    fn statistic(&self) -> f64 {
        let whole = self.mixed.as_ref().and_then(|mixed| mixed.bets.as_ref());
        self.within().max(whole.map_or(0.0, Bets::statistic))
    }

    fn alarm(&self) -> Option<Alarm> {
        let (moved, history) = match &self.mixed {
            Some(mixed) if self.within() < self.threshold => (Moved::Whole, &mixed.history),
            _ => (Moved::Readings, &self.history),
        };
        let sums = history.sums();
        let ChangePoint { index, from, to, before, after, .. } =
            locate(history.past(), sums.clone().map(|(_, sum)| sum), self.setup.watch)
                .filter(|change| change.statistic >= MIN_CHANGE)?;
        let samples = sums.clone().skip(index).map(|(_, sum)| sum.count).sum();
        // Of bits, at least one must have been another: less is only the forecast's own movement.
        if self.setup.kind == Kind::Bernoulli && (after - before).abs() * (samples as f64) < 1.0 {
            return None;
        }
        let at = |index: usize| sums.clone().nth(index).map_or(0, |(at, _)| at);
        let row = self.row();
        Some(Alarm {
            direction: if after < self.reference { Direction::Down } else { Direction::Up },
            moved,
            change: Change { at: at(index), from: at(from), to: at(to), samples },
            baseline: self.reference,
            current: after.clamp(0.0, 1.0),
            evidence_log10: row.evidence_log10,
            threshold_log10: row.threshold_log10,
            strict_log10: row.strict_log10,
        })
    }

    /// Forgets everything but the course of the day and the kinship, and learns a new reference.
    pub fn reset(&mut self) {
        self.restart(Past::default());
    }

    /// After an alarm: a new reference that begins at the change that was found.
    pub fn relearn(&mut self) {
        let since = self.changed.map_or_else(Default::default, |from| self.history.since(from));
        let (first, n) = (self.changed.unwrap_or(0), self.n);
        self.restart(since);
        (self.n, self.seen, self.first, self.reference) = (n, since.count, first, since.mean());
    }

    /// A new level, of which `since` is known.
    fn restart(&mut self, since: Past) {
        let baseline = self.quiet.as_deref().unwrap_or(&self.baseline).anew(since);
        let mixed = self.mixed.take().map(|_| Box::default());
        *self = Self { baseline, mixed, ..Self::new(self.setup) };
    }

    /// Readings at `from` or later, and their mean.
    pub fn since(&self, from: u64) -> (u64, f64) {
        let since = self.mixed.as_ref().map_or(&self.history, |mixed| &mixed.history).since(from);
        (since.count, since.mean())
    }

    pub fn row(&self) -> Row {
        let newest = self.history.newest((self.setup.reference as u64 / 2).max(20));
        let learned = self.bets.is_some();
        Row {
            baseline: learned.then_some(self.reference),
            current: (newest.count > 0).then(|| newest.mean().clamp(0.0, 1.0)),
            evidence_log10: evidence_log10(self.statistic()),
            threshold_log10: if learned { self.threshold.log10() } else { 0.0 },
            strict_log10: self.strict.as_ref().map(|strict| evidence_log10(strict.statistic())),
            state: self.state(),
            n: self.n,
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn after_an_alarm_scores_are_known_to_be_as_skewed_as_before() {
        let mut stream = Stream::new(Setup {
            kind: Kind::Bounded,
            watch: Watch::Both,
            reference: 200,
            seasonal: false,
            strict: false,
        });
        let mut random = StdRng::seed_from_u64(1);
        let mut reading = |least: f64, at| {
            let value = least + 0.5 * random.random::<f64>().powi(4);
            Reading { value, at, kin: Kin::default() }
        };
        let calm = (0..500).find_map(|at| stream.observe(reading(0.1, at), |_| 1e6).unwrap());
        assert_eq!(calm, None);
        (500..900).find_map(|at| stream.observe(reading(0.4, at), |_| 1e6).unwrap()).unwrap();
        stream.relearn();
        let expected = stream.baseline.expect(900, Kin::default()).base;
        assert!(expected > stream.baseline.mean(), "{expected} of {}", stream.baseline.mean());
    }
}
