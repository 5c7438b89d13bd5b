//! The configuration: each module's own, composed. Defaults, then a TOML file, then the environment.

mod ranges;

use std::path::Path;

use figment::{
    Figment,
    providers::{Env, Format, Serialized, Toml},
};
use serde::{Deserialize, Serialize};

use crate::canary;
use crate::comparisons;
use crate::cycle;
use crate::drift;
use crate::gate;
use crate::http;
use crate::learn;
use crate::policy;
use crate::signals;
use crate::store;
use crate::upstream;

/// One table a module; see `config/gyrostat.toml` for every key.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub log: Log,
    pub http: http::Config,
    pub policy: policy::Config,
    pub upstream: upstream::Config,
    pub signals: signals::Config,
    pub store: store::Config,
    pub drift: drift::Config,
    pub learn: learn::Config,
    pub gate: gate::Config,
    pub canary: canary::Config,
    pub cycle: cycle::Config,
    pub probes: signals::Probes,
    pub ai_feedback: comparisons::Config,
}

/// How the log is written (`[log]`). What is shown is `RUST_LOG`'s to say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    pub format: LogFormat,
}

/// One line an event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    /// An object a line, the fields beside the message.
    Json,
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("configuration: {0}")]
    Read(Box<figment::Error>),
    #[error("configuration: {} cannot be read: {source}", path.display())]
    File { path: std::path::PathBuf, source: std::io::Error },
    #[error("configuration: {0}")]
    Drift(#[from] drift::Error),
    #[error("configuration: {0}")]
    Canary(#[from] canary::Invalid),
    #[error("configuration: {0}")]
    Range(#[from] ranges::OutOfRange),
}

impl Config {
    /// Defaults, overridden by `file`, overridden by `GYROSTAT_<TABLE>__<KEY>`.
    ///
    /// # Errors
    /// The file cannot be read, or a key is unknown or has the wrong type; the message names the key and where it stands.
    pub fn load(file: Option<&Path>) -> Result<Self, Error> {
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .map_err(|source| Error::File { path: path.to_owned(), source })?;
            figment = figment.merge(Toml::string(&text));
        }
        let config: Self = figment
            .merge(Env::prefixed("GYROSTAT_").split("__"))
            .extract()
            .map_err(|error| Error::Read(Box::new(error)))?;
        config.drift.check()?;
        config.canary.check()?;
        ranges::check(&config)?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_is_the_defaults() {
        let text = include_str!("../config/gyrostat.toml");
        let shipped: Config = Figment::from(Toml::string(text)).extract().unwrap();
        assert_eq!(shipped, Config::default());
        let all = figment::value::Value::serialize(Config::default()).unwrap();
        for (table, keys) in all.as_dict().unwrap() {
            assert!(text.contains(&format!("[{table}")), "table {table} is missing");
            for key in keys.as_dict().unwrap().keys() {
                let mentioned =
                    text.contains(&format!("{key} =")) || text.contains(&format!("[{table}.{key}]"));
                assert!(mentioned, "{table}.{key} is missing");
            }
        }
    }

    #[test]
    fn an_unknown_key_is_named() {
        let figment = Figment::from(Serialized::defaults(Config::default()));
        let error = figment.merge(Toml::string("[policy]\nmodle = \"x\"")).extract::<Config>().unwrap_err();
        assert!(error.to_string().contains("modle"), "{error}");
    }
}
