//! One watched stream of readings: it learns, it watches, it alarms once.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{
    Detector, Direction, Error, Kind, MAX_THRESHOLD, MIN_REFERENCE, State, Watch, bits,
    change::{Past, locate},
    evidence_log10,
};

/// Newest readings that are kept, at the least; otherwise twice the reference, so that a change point is found
/// for changes that took long to be seen.
const MIN_HISTORY: usize = 500;

/// The current mean is over half a reference of readings, but never over fewer than this.
const MIN_CURRENT: usize = 20;

/// An alarm is raised only for a change that the readings show: below this likelihood-ratio statistic (nats) the
/// evidence is nothing but time (`M` grows by 1 a reading where every reading is the same).
const MIN_CHANGE: f64 = 1.0;

const MILLISECONDS_A_DAY: f64 = 86_400_000.0;

/// A stream with its reference, its detector and its newest readings, each with the caller's tag.
///
/// After `reference` readings it turns from [`State::Learning`] to [`State::Steady`], after an alarm to
/// [`State::Alarm`], where it stays until [`Stream::reset`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, try_from = "Unchecked")]
pub struct Stream {
    kind: Kind,
    watch: Watch,
    reference: usize,
    #[serde(with = "bits")]
    threshold: f64,
    /// Readings since the stream began to learn.
    seen: u64,
    phase: Phase,
    history: History,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum Phase {
    Learning,
    Steady {
        detector: Detector,
        #[serde(with = "bits")]
        baseline: f64,
    },
    Alarm {
        alarm: Alarm,
    },
}

/// What a stream says when it alarms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Alarm {
    pub direction: Direction,
    /// Mean over the reference.
    #[serde(with = "bits")]
    pub baseline: f64,
    /// Mean since the likeliest change.
    #[serde(with = "bits")]
    pub current: f64,
    #[serde(with = "bits")]
    pub evidence_log10: f64,
    #[serde(with = "bits")]
    pub threshold_log10: f64,
    pub change: Change,
}

/// The likeliest change of a stream, in the caller's tags.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// The tag of the first reading after it.
    pub at: u64,
    /// The tags of the plausible range (not a confidence interval).
    pub from: u64,
    pub to: u64,
    /// Readings since the change.
    pub readings: u64,
    /// Twice the log of the likelihood ratio against no change, nats.
    #[serde(with = "bits")]
    pub statistic: f64,
}

/// A stream as the scorecard shows it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    /// Mean over the reference, once it is full.
    pub baseline: Option<f64>,
    /// Mean over the newest readings, half a reference of them, once there are twenty.
    pub current: Option<f64>,
    pub evidence_log10: f64,
    pub threshold_log10: f64,
    pub state: State,
    /// Readings since the stream began to learn, the reference included.
    pub n: u64,
}

impl Stream {
    /// A stream that learns from its next `reference` readings, at least [`MIN_REFERENCE`], and then alarms once
    /// the statistic reaches `threshold`.
    pub fn new(kind: Kind, watch: Watch, reference: usize, threshold: f64) -> Result<Self, Error> {
        if reference < MIN_REFERENCE {
            return Err(Error::ShortReference(reference));
        }
        let threshold = threshold.clamp(1.0, MAX_THRESHOLD);
        let history = History::new(reference);
        Ok(Self { kind, watch, reference, threshold, seen: 0, phase: Phase::Learning, history })
    }

    /// Takes one reading. `tag` is the caller's and comes back in [`Change`]; a [`Monitor`](super::Monitor) puts
    /// milliseconds there. Says so once, when the stream alarms.
    pub fn observe(&mut self, reading: f64, tag: u64) -> Result<Option<Alarm>, Error> {
        self.kind.check(reading)?;
        // Zero with a sign and subnormals are zero.
        let reading = if reading < f64::MIN_POSITIVE { 0.0 } else { reading };
        self.seen += 1;
        self.history.push(reading, tag);
        match &mut self.phase {
            Phase::Learning => {
                if self.history.readings.len() >= self.reference {
                    let reference = self.history.readings.make_contiguous();
                    let baseline = reference.iter().sum::<f64>() / reference.len() as f64;
                    let detector = Detector::learn(self.kind, reference, self.watch)?;
                    self.phase = Phase::Steady { detector, baseline };
                }
                Ok(None)
            }
            Phase::Steady { detector, baseline } => {
                let statistic = detector.update(reading);
                if statistic < self.threshold {
                    return Ok(None);
                }
                let alarm = self.history.alarm(self.watch, statistic, self.threshold, *baseline);
                match alarm {
                    Some(alarm) => self.phase = Phase::Alarm { alarm },
                    None => detector.restart(),
                }
                Ok(alarm)
            }
            Phase::Alarm { .. } => Ok(None),
        }
    }

    /// Forgets everything: the next readings are a new reference.
    pub fn reset(&mut self) {
        self.seen = 0;
        self.phase = Phase::Learning;
        self.history = History::new(self.reference);
    }

    /// Sets the threshold while the stream learns; from then on it is frozen, since evidence gathered under one
    /// threshold says nothing under another.
    pub fn set_threshold(&mut self, threshold: f64) {
        if self.state() == State::Learning {
            self.threshold = threshold.clamp(1.0, MAX_THRESHOLD);
        }
    }

    /// Readings a day, by the tags of the newest readings as milliseconds. `None` before the second reading.
    pub fn events_per_day(&self) -> Option<f64> {
        let tags = &self.history.tags;
        let (first, last) = (tags.front()?, tags.back()?);
        let gaps = tags.len().checked_sub(1).filter(|&gaps| gaps > 0)?;
        // Readings of one instant are taken to be a millisecond apart: a high rate is the cautious one.
        let span = last.saturating_sub(*first).max(gaps as u64);
        Some(gaps as f64 / span as f64 * MILLISECONDS_A_DAY)
    }

    pub fn state(&self) -> State {
        match self.phase {
            Phase::Learning => State::Learning,
            Phase::Steady { .. } => State::Steady,
            Phase::Alarm { .. } => State::Alarm,
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn threshold(&self) -> f64 {
        self.threshold
    }

    /// The alarm that the stream is in.
    pub fn alarm(&self) -> Option<&Alarm> {
        match &self.phase {
            Phase::Alarm { alarm } => Some(alarm),
            _ => None,
        }
    }

    /// `log10 M`, 0 while learning; at an alarm it stays as it was.
    pub fn evidence_log10(&self) -> f64 {
        match &self.phase {
            Phase::Learning => 0.0,
            Phase::Steady { detector, .. } => detector.evidence_log10(),
            Phase::Alarm { alarm } => alarm.evidence_log10,
        }
    }

    pub fn row(&self) -> Row {
        let baseline = match &self.phase {
            Phase::Learning => None,
            Phase::Steady { baseline, .. } => Some(*baseline),
            Phase::Alarm { alarm } => Some(alarm.baseline),
        };
        Row {
            baseline,
            current: self.history.current((self.reference / 2).max(MIN_CURRENT)),
            evidence_log10: self.evidence_log10(),
            threshold_log10: self.threshold.log10(),
            state: self.state(),
            n: self.seen,
        }
    }
}

/// The newest readings with their tags, and the sums of those before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Packed", into = "Packed")]
struct History {
    capacity: usize,
    readings: VecDeque<f64>,
    tags: VecDeque<u64>,
    past: Past,
}

impl History {
    fn new(reference: usize) -> Self {
        let capacity = (2 * reference).max(MIN_HISTORY);
        Self { capacity, readings: VecDeque::new(), tags: VecDeque::new(), past: Past::default() }
    }

    fn push(&mut self, reading: f64, tag: u64) {
        if self.readings.len() == self.capacity {
            if let Some(oldest) = self.readings.pop_front() {
                self.past.add(oldest);
            }
            self.tags.pop_front();
        }
        self.readings.push_back(reading);
        self.tags.push_back(tag);
    }

    fn current(&self, window: usize) -> Option<f64> {
        let n = window.min(self.readings.len());
        let newest = self.readings.iter().rev().take(n);
        (n >= MIN_CURRENT).then(|| newest.sum::<f64>() / n as f64)
    }

    /// The alarm for the change that the readings show, if they show any.
    fn alarm(&self, watch: Watch, statistic: f64, threshold: f64, baseline: f64) -> Option<Alarm> {
        let len = self.readings.len();
        let found = locate(self.past, self.readings.iter().copied(), len, watch)?;
        let tag = |index: usize| self.tags.get(index).copied();
        let change = Change {
            at: tag(found.index)?,
            from: tag(found.from)?,
            to: tag(found.to)?,
            readings: (len - found.index) as u64,
            statistic: found.statistic,
        };
        let direction = if found.after > found.before { Direction::Up } else { Direction::Down };
        (found.statistic >= MIN_CHANGE).then(|| Alarm {
            direction,
            baseline,
            current: found.after,
            evidence_log10: evidence_log10(statistic),
            threshold_log10: threshold.log10(),
            change,
        })
    }
}

/// A history as it is saved: readings as 0, 1 or the bits of the number (which are neither for any reading), tags
/// as differences, since they are most of the bytes.
#[derive(Serialize, Deserialize)]
#[serde(rename = "History", deny_unknown_fields)]
struct Packed {
    capacity: usize,
    readings: Vec<u64>,
    tags: Vec<i64>,
    past: (u64, u64, u64),
}

impl From<History> for Packed {
    fn from(history: History) -> Self {
        let pack = |x: &f64| if *x == 1.0 { 1 } else { x.to_bits() };
        let before = std::iter::once(&0).chain(&history.tags);
        let Past { count, sum, squares } = history.past;
        Self {
            capacity: history.capacity,
            readings: history.readings.iter().map(pack).collect(),
            tags: history
                .tags
                .iter()
                .zip(before)
                .map(|(tag, before)| tag.wrapping_sub(*before) as i64)
                .collect(),
            past: (count, sum.to_bits(), squares.to_bits()),
        }
    }
}

impl From<Packed> for History {
    fn from(packed: Packed) -> Self {
        let unpack = |x: u64| if x == 1 { 1.0 } else { f64::from_bits(x) };
        let (count, sum, squares) = packed.past;
        let tags = packed.tags.into_iter().scan(0_u64, |tag, step| {
            *tag = tag.wrapping_add(step as u64);
            Some(*tag)
        });
        Self {
            capacity: packed.capacity,
            readings: packed.readings.into_iter().map(unpack).collect(),
            tags: tags.collect(),
            past: Past { count, sum: f64::from_bits(sum), squares: f64::from_bits(squares) },
        }
    }
}

/// A stream as it comes from disk.
#[derive(Deserialize)]
#[serde(rename = "Stream", deny_unknown_fields)]
struct Unchecked {
    kind: Kind,
    watch: Watch,
    reference: usize,
    #[serde(with = "bits")]
    threshold: f64,
    seen: u64,
    phase: Phase,
    history: History,
}

impl TryFrom<Unchecked> for Stream {
    type Error = Error;

    fn try_from(stored: Unchecked) -> Result<Self, Error> {
        let Unchecked { kind, watch, reference, threshold, seen, phase, history } = stored;
        let held = history.readings.len();
        let learning = phase == Phase::Learning;
        let detector_fits = match &phase {
            Phase::Steady { detector: Detector::Bernoulli(_), .. } => kind == Kind::Bernoulli,
            Phase::Steady { detector: Detector::Bounded(_), .. } => kind == Kind::Bounded,
            _ => true,
        };
        let sound = reference >= MIN_REFERENCE
            && history.capacity == History::new(reference).capacity
            && held <= history.capacity
            && held == history.tags.len()
            && learning == (held < reference)
            && history.readings.iter().all(|&x| kind.check(x).is_ok())
            && (1.0..=MAX_THRESHOLD).contains(&threshold)
            && detector_fits;
        if !sound {
            return Err(Error::State("of a stream is damaged"));
        }
        Ok(Self { kind, watch, reference, threshold, seen, phase, history })
    }
}
