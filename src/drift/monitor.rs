//! Streams by key, under one budget of false alarms.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Alarm, Config, Error, Kind, Row, Stream, Watch};

/// One stream for each key.
#[derive(Debug, Clone)]
pub struct Monitor<K> {
    config: Config,
    streams: BTreeMap<K, Stream>,
}

/// A monitor as it is kept on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved<K> {
    /// Of this form; another one is refused.
    version: u32,
    streams: Vec<(K, Stream)>,
}

const VERSION: u32 = 1;
const DAY_MS: f64 = 86_400_000.0;

impl<K: Ord + Clone> Monitor<K> {
    /// # Errors
    /// A field of the configuration cannot work.
    pub fn new(config: Config) -> Result<Self, Error> {
        config.check()?;
        Ok(Self { config, streams: BTreeMap::new() })
    }

    /// The monitor as it was saved. Streams keep the reference length and the threshold that they began with.
    ///
    /// # Errors
    /// The state is of another version, or the configuration cannot work.
    pub fn restore(config: Config, saved: Saved<K>) -> Result<Self, Error> {
        config.check()?;
        if saved.version != VERSION {
            return Err(Error::State("is of a version that this program does not know"));
        }
        Ok(Self { config, streams: saved.streams.into_iter().collect() })
    }

    pub fn save(&self) -> Saved<K> {
        let streams = self.streams.iter().map(|(key, stream)| (key.clone(), stream.clone())).collect();
        Saved { version: VERSION, streams }
    }

    /// Shows a reading to its stream; a new key begins a new stream of `kind`. `tag` is a time in milliseconds: the
    /// stream's rate, and with it its threshold, is measured while it learns its reference.
    ///
    /// # Errors
    /// It is no reading of the kind, or there are too many streams.
    pub fn observe(&mut self, key: &K, kind: Kind, reading: f64, tag: u64) -> Result<Option<Alarm>, Error> {
        kind.check(reading)?;
        if !self.streams.contains_key(key) {
            if self.streams.len() >= self.config.max_streams {
                return Err(Error::TooManyStreams(self.streams.len()));
            }
            self.streams.insert(key.clone(), Stream::new(kind, Watch::Both, self.config.reference));
        }
        let count = self.streams.len();
        let Some(stream) = self.streams.get_mut(key) else { return Ok(None) };
        let config = &self.config;
        stream.observe(reading, tag, |span_ms| {
            let measured = config.reference as f64 / (span_ms.max(1) as f64 / DAY_MS);
            config.threshold(config.events_per_day.unwrap_or(measured), count)
        })
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

    /// Forgets all streams.
    pub fn clear(&mut self) {
        self.streams.clear();
    }
}
