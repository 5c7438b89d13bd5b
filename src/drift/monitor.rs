//! Streams by key, under one budget of false alarms.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Alarm, Config, Error, Expected, Kind, Reading, Row, Setup, Stream, Watch};

/// One stream for each key.
#[derive(Debug, Clone)]
pub struct Monitor<K> {
    config: Config,
    streams: BTreeMap<K, Stream>,
    /// Streams of the whole traffic: each watches two things, and has two parts of the budget.
    wholes: usize,
}

/// A monitor as it is kept on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved<K> {
    /// Of this form; another one is refused.
    version: u32,
    streams: Vec<(K, Stream)>,
}

/// What a reading did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Observed {
    /// Alarms of its own stream and of the whole traffic's.
    pub segment: Option<Alarm>,
    pub whole: Option<Alarm>,
    /// By how many standard deviations it deviates from what was expected of its stream at this hour.
    pub deviation: f64,
}

const VERSION: u32 = 3;

impl<K: Ord + Clone> Monitor<K> {
    /// # Errors
    /// A field of the configuration cannot work.
    pub fn new(config: Config) -> Result<Self, Error> {
        config.check()?;
        Ok(Self { config, streams: BTreeMap::new(), wholes: 0 })
    }

    /// The monitor as it was saved. Streams keep the reference length that they began with.
    ///
    /// # Errors
    /// The state is of another version, or the configuration cannot work.
    pub fn restore(config: Config, saved: Saved<K>) -> Result<Self, Error> {
        config.check()?;
        if saved.version != VERSION {
            return Err(Error::State("is of a version that this program does not know"));
        }
        let streams: BTreeMap<K, Stream> = saved.streams.into_iter().collect();
        let wholes = streams.values().filter(|stream| stream.is_whole()).count();
        Ok(Self { config, streams, wholes })
    }

    pub fn save(&self) -> Saved<K> {
        let streams = self.streams.iter().map(|(key, stream)| (key.clone(), stream.clone())).collect();
        Saved { version: VERSION, streams }
    }

    /// Shows a reading to the stream of its segment and to that of the whole traffic; new keys begin new streams of
    /// `kind`. The segment's forecast is what the whole's reading is held against, so that the whole does not move
    /// when only the segments' shares do.
    ///
    /// # Errors
    /// It is no reading of the kind, or there are too many streams: then the whole has still taken it.
    pub fn observe(
        &mut self,
        segment: &K,
        whole: &K,
        kind: Kind,
        reading: Reading,
    ) -> Result<Observed, Error> {
        kind.check(reading.value)?;
        let expected = self.streams.get(segment).and_then(|stream| stream.expect(reading.at, reading.kin));
        let whole = self.show_whole(whole, kind, reading, expected.as_ref())?;
        let segment = self.show(segment, kind, reading)?;
        let deviation = expected.map_or(0.0, |expected| expected.deviation(reading.value));
        Ok(Observed { segment, whole, deviation })
    }

    /// Shows a reading to one stream.
    ///
    /// # Errors
    /// As [`Monitor::observe`].
    pub fn show(&mut self, key: &K, kind: Kind, reading: Reading) -> Result<Option<Alarm>, Error> {
        kind.check(reading.value)?;
        let (parts, config) = (self.streams.len() + self.wholes, &self.config);
        if let Some(stream) = self.streams.get_mut(key) {
            return stream.observe(reading, |measured| config.threshold(measured, parts));
        }
        self.begin(key, kind)?;
        self.show(key, kind, reading)
    }

    fn show_whole(
        &mut self,
        key: &K,
        kind: Kind,
        reading: Reading,
        expected: Option<&Expected>,
    ) -> Result<Option<Alarm>, Error> {
        self.begin(key, kind)?;
        let (parts, config) = (self.streams.len() + self.wholes, &self.config);
        let Some(stream) = self.streams.get_mut(key) else { return Ok(None) };
        self.wholes += usize::from(!stream.is_whole());
        stream.observe_whole(reading, expected, |measured| config.threshold(measured, parts))
    }

    fn begin(&mut self, key: &K, kind: Kind) -> Result<(), Error> {
        if !self.streams.contains_key(key) {
            if self.streams.len() >= self.config.max_streams {
                return Err(Error::TooManyStreams(self.streams.len()));
            }
            let Config { reference, seasonal, strict, .. } = self.config;
            self.streams.insert(
                key.clone(),
                Stream::new(Setup { kind, watch: Watch::Both, reference, seasonal, strict }),
            );
        }
        Ok(())
    }

    /// The stream of a key.
    pub fn stream(&self, key: &K) -> Option<&Stream> {
        self.streams.get(key)
    }

    /// Streams with their keys.
    pub fn streams(&self) -> impl Iterator<Item = (&K, &Stream)> {
        self.streams.iter()
    }

    /// Lets a stream in alarm begin a new reference at the change that it found.
    pub fn relearn(&mut self, key: &K) {
        if let Some(stream) = self.streams.get_mut(key).filter(|stream| stream.state() == super::State::Alarm)
        {
            stream.relearn();
        }
    }

    /// Every stream as it stands, in the keys' order.
    pub fn rows(&self) -> Vec<(K, Row)> {
        self.streams.iter().map(|(key, stream)| (key.clone(), stream.row())).collect()
    }

    /// Lets the streams that fit learn their reference anew; returns how many.
    pub fn reset(&mut self, mut fits: impl FnMut(&K) -> bool) -> usize {
        let mut count = 0;
        for (key, stream) in &mut self.streams {
            if fits(key) {
                stream.reset();
                count += 1;
            }
        }
        count
    }
}
