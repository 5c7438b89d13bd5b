//! One watched stream: it learns a reference, watches, and alarms once.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{
    Detector, Direction, Error, Kind, State, Watch, bits,
    change::{ChangePoint, Past, locate},
};

/// Readings that are held for the change point and the current mean.
const HELD: usize = 4096;

/// An alarm needs a change that the readings show, by this likelihood-ratio statistic (nats): where all readings
/// are the same, `M` grows by 1 with each of them, and evidence would be nothing but time.
const MIN_CHANGE: f64 = 1.0;

/// A stream of readings, each with a tag of the caller's, such as its time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stream {
    kind: Kind,
    watch: Watch,
    /// Readings that make the reference.
    reference: usize,
    /// Evidence `M` at which it alarms; set when the reference is full.
    #[serde(with = "bits")]
    threshold: f64,
    #[serde(with = "bits")]
    baseline: f64,
    detector: Option<Detector>,
    alarmed: bool,
    n: u64,
    /// The newest readings with their tags, and what came before them.
    held: VecDeque<(u64, u64)>,
    past: (u64, u64, u64),
    first_tag: u64,
}

/// A change that was detected.
#[derive(Debug, Clone, PartialEq)]
pub struct Alarm {
    pub direction: Direction,
    pub change: Change,
    pub baseline: f64,
    /// Mean of the readings since the change.
    pub current: f64,
    pub evidence_log10: f64,
    pub threshold_log10: f64,
}

/// Where a stream changed, in tags.
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
    pub state: State,
    pub n: u64,
}

impl Stream {
    /// An empty stream whose first `reference` readings make its baseline.
    pub fn new(kind: Kind, watch: Watch, reference: usize) -> Self {
        Self {
            kind,
            watch,
            reference,
            threshold: 1.0,
            baseline: 0.0,
            detector: None,
            alarmed: false,
            n: 0,
            held: VecDeque::new(),
            past: (0, 0, 0),
            first_tag: 0,
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn state(&self) -> State {
        match (&self.detector, self.alarmed) {
            (None, _) => State::Learning,
            (Some(_), false) => State::Steady,
            (Some(_), true) => State::Alarm,
        }
    }

    /// Takes a reading. `threshold` is asked once, when the reference is full, with the tags' span of the reference.
    ///
    /// # Errors
    /// It is no reading of this stream's kind; nothing has changed then.
    pub fn observe(
        &mut self,
        reading: f64,
        tag: u64,
        threshold: impl FnOnce(u64) -> f64,
    ) -> Result<Option<Alarm>, Error> {
        self.kind.check(reading)?;
        if self.n == 0 {
            self.first_tag = tag;
        }
        self.n += 1;
        self.hold(reading, tag);
        let Some(detector) = &mut self.detector else {
            if self.held.len() >= self.reference {
                let readings: Vec<f64> = self.held.iter().map(|(x, _)| f64::from_bits(*x)).collect();
                self.detector = Some(Detector::learn(self.kind, &readings, self.watch)?);
                self.baseline = readings.iter().sum::<f64>() / readings.len() as f64;
                self.threshold = threshold(tag.saturating_sub(self.first_tag));
            }
            return Ok(None);
        };
        let statistic = detector.update(reading);
        if self.alarmed || statistic < self.threshold {
            return Ok(None);
        }
        let alarm = self.alarm();
        self.alarmed = alarm.is_some();
        if let (None, Some(detector)) = (&alarm, &mut self.detector) {
            detector.restart();
        }
        Ok(alarm)
    }

    fn hold(&mut self, reading: f64, tag: u64) {
        if self.held.len() == HELD.max(self.reference)
            && let Some((oldest, _)) = self.held.pop_front()
        {
            let mut past = self.past();
            past.add(f64::from_bits(oldest));
            self.past = (past.count, past.sum.to_bits(), past.squares.to_bits());
        }
        self.held.push_back((reading.to_bits(), tag));
    }

    fn past(&self) -> Past {
        let (count, sum, squares) = self.past;
        Past { count, sum: f64::from_bits(sum), squares: f64::from_bits(squares) }
    }

    fn alarm(&self) -> Option<Alarm> {
        let readings = self.held.iter().map(|(x, _)| f64::from_bits(*x));
        let ChangePoint { index, from, to, after, .. } =
            locate(self.past(), readings, self.held.len(), self.watch)
                .filter(|change| change.statistic >= MIN_CHANGE)?;
        let tag = |at: usize| self.held.get(at).map_or(0, |(_, tag)| *tag);
        let row = self.row();
        Some(Alarm {
            direction: if after < self.baseline { Direction::Down } else { Direction::Up },
            change: Change {
                at: tag(index),
                from: tag(from),
                to: tag(to),
                samples: (self.held.len() - index) as u64,
            },
            baseline: self.baseline,
            current: after,
            evidence_log10: row.evidence_log10,
            threshold_log10: row.threshold_log10,
        })
    }

    /// Forgets everything and learns a new reference.
    pub fn reset(&mut self) {
        *self = Self::new(self.kind, self.watch, self.reference);
    }

    pub fn row(&self) -> Row {
        let newest = (self.reference / 2).max(20);
        let readings = self.held.iter().rev().take(newest).map(|(x, _)| f64::from_bits(*x));
        let count = self.held.len().min(newest);
        let learned = self.detector.is_some();
        Row {
            baseline: learned.then_some(self.baseline),
            current: (count > 0).then(|| readings.sum::<f64>() / count as f64),
            evidence_log10: self.detector.as_ref().map_or(0.0, Detector::evidence_log10),
            threshold_log10: if learned { self.threshold.log10() } else { 0.0 },
            state: self.state(),
            n: self.n,
        }
    }
}
