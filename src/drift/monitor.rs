//! All watched streams, one for each key, under one budget of false alarms.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Alarm, Config, Error, Kind, Row, State, Stream, Watch};

/// The format of [`Saved`]; one that differs is not read.
const VERSION: u32 = 1;

/// The streams, by key. It has no clock: tags are milliseconds, and the rates that thresholds need come from them.
///
/// A stream's threshold is its share of the budget, `days × its readings a day × number of streams`. It is worked
/// out anew while the stream learns and frozen when its reference is full.
#[derive(Debug, Clone)]
pub struct Monitor<K: Ord> {
    config: Config,
    saved: Saved<K>,
}

/// What outlives the process: every stream, each with its reference, its evidence and its newest readings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Saved<K: Ord> {
    version: u32,
    #[serde(serialize_with = "pairs", bound(serialize = "K: Serialize"))]
    streams: BTreeMap<K, Stream>,
}

impl<K: Ord + Clone> Monitor<K> {
    pub fn new(config: Config) -> Result<Self, Error> {
        config.check()?;
        Ok(Self { config, saved: Saved { version: VERSION, streams: BTreeMap::new() } })
    }

    /// Goes on from a saved state. Streams keep the reference that they were begun with until they are reset.
    pub fn restore(config: Config, saved: Saved<K>) -> Result<Self, Error> {
        config.check()?;
        Ok(Self { config, saved })
    }

    /// What to save.
    pub fn saved(&self) -> &Saved<K> {
        &self.saved
    }

    /// Takes one reading of the stream `key`, which it begins, with readings of `kind`, if it is new.
    /// `tag` is the reading's time in milliseconds.
    pub fn observe(&mut self, key: &K, kind: Kind, reading: f64, tag: u64) -> Result<Option<Alarm>, Error> {
        kind.check(reading)?;
        let streams = self.saved.streams.len();
        if !self.saved.streams.contains_key(key) {
            if streams >= self.config.max_streams {
                return Err(Error::TooManyStreams(streams));
            }
            self.saved.streams.insert(key.clone(), self.begin(kind)?);
        }
        let streams = self.saved.streams.len();
        let Some(stream) = self.saved.streams.get_mut(key) else { return Ok(None) };
        let alarm = stream.observe_under(reading, tag, |stream| {
            let measured = stream.events_per_day();
            let rate = self.config.events_per_day.or(measured)?;
            Some(self.config.threshold(rate, streams))
        })?;
        Ok(alarm)
    }

    /// The streams as the scorecard shows them, in the order of their keys.
    pub fn rows(&self) -> impl Iterator<Item = (&K, Row)> {
        self.saved.streams.iter().map(|(key, stream)| (key, stream.row()))
    }

    pub fn stream(&self, key: &K) -> Option<&Stream> {
        self.saved.streams.get(key)
    }

    pub fn len(&self) -> usize {
        self.saved.streams.len()
    }

    pub fn is_empty(&self) -> bool {
        self.saved.streams.is_empty()
    }

    /// Re-learns the streams whose key is `chosen`, under the present configuration; returns how many.
    pub fn reset(&mut self, mut chosen: impl FnMut(&K) -> bool) -> usize {
        let mut count = 0;
        let (config, streams) = (&self.config, &mut self.saved.streams);
        for (_, stream) in streams.iter_mut().filter(|(key, _)| chosen(key)) {
            if let Ok(fresh) = begin(config, stream.kind()) {
                *stream = fresh;
                count += 1;
            }
        }
        count
    }

    /// Drops the streams whose key is not `kept`.
    pub fn retain(&mut self, mut kept: impl FnMut(&K) -> bool) {
        self.saved.streams.retain(|key, _| kept(key));
    }

    fn begin(&self, kind: Kind) -> Result<Stream, Error> {
        begin(&self.config, kind)
    }
}

fn begin(config: &Config, kind: Kind) -> Result<Stream, Error> {
    Stream::new(kind, Watch::Both, config.reference, config.minimum_threshold)
}

impl Stream {
    /// As [`Stream::observe`], with the threshold set by `threshold` after each reading of the reference.
    fn observe_under(
        &mut self,
        reading: f64,
        tag: u64,
        threshold: impl FnOnce(&Self) -> Option<f64>,
    ) -> Result<Option<Alarm>, Error> {
        let learning = self.state() == State::Learning;
        let alarm = self.observe(reading, tag)?;
        if learning && let Some(threshold) = threshold(self) {
            self.agree(threshold);
        }
        Ok(alarm)
    }
}

/// Keys need not be strings, so the map is a list of pairs.
fn pairs<K: Serialize, S: Serializer>(streams: &BTreeMap<K, Stream>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(streams)
}

impl<'de, K: Ord + Deserialize<'de>> Deserialize<'de> for Saved<K> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename = "Saved", deny_unknown_fields)]
        struct Stored<K> {
            version: u32,
            streams: Vec<(K, Stream)>,
        }
        let Stored { version, streams } = Stored::deserialize(from)?;
        if version != VERSION {
            return Err(serde::de::Error::custom(Error::State("is of another version")));
        }
        Ok(Self { version, streams: streams.into_iter().collect() })
    }
}
