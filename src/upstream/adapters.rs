//! Versions at an upstream that loads adapters: pushed under a name of their own, used, taken back.
//!
//! A name is never used twice: vLLM keeps computed prefixes by adapter name, so that another adapter under a known name
//! would be answered from them. Which version new requests get is decided for each request by its caller.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use axum::http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::{Mutex as Turn, Notify};
use tracing::{info, warn};

use crate::completion::Version;

use super::{Adapters, Fault, Upstream};

/// A version as the upstream gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    pub version: Version,
    /// Its model name there.
    pub name: String,
    /// Its directory, as the upstream sees it.
    pub path: PathBuf,
}

impl Release {
    /// `sha256` is of its weights: another data directory's version of the same number gets another name.
    pub fn new(version: Version, sha256: &str, path: PathBuf) -> Self {
        let short: String = sha256.chars().take(8).collect();
        Self { version, name: format!("gyrostat-{version}-{short}"), path }
    }
}

/// Why a version is not at the upstream.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error("the upstream does not load adapters ({0})")]
    Unsupported(String),
    #[error("the upstream has several models, or none: upstream.model has to name the one that is adapted")]
    WhichModel,
    #[error("the upstream refused {name}: {status} {message}")]
    Refused { name: String, status: StatusCode, message: String },
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// The versions that the upstream has, or should have.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    held: Mutex<BTreeMap<Version, Held>>,
    /// Loading and unloading follow each other.
    turn: Turn<()>,
    /// The last request has left a version that is to go.
    left: Notify,
}

#[derive(Debug)]
struct Held {
    release: Release,
    loaded: bool,
    requests: usize,
    standing: Standing,
}

/// Whether a version is to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is about to be served.
    Fresh,
    /// It is served, or was before: rolling back to it is a matter of one request.
    Wanted,
    Unwanted,
}

impl Held {
    fn new(release: Release, loaded: bool) -> Self {
        Self { release, loaded, requests: 0, standing: Standing::Fresh }
    }
}

impl Fleet {
    fn held(&self) -> MutexGuard<'_, BTreeMap<Version, Held>> {
        // A lock whose holder panicked still guards whole values: every change under it is a single assignment.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request's hold on a version: it is not unloaded before this is dropped.
#[derive(Debug)]
pub struct Lease {
    upstream: Upstream,
    version: Version,
    name: String,
}

impl Lease {
    /// The model name that the request has to ask for.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let fleet = &self.upstream.inner.fleet;
        if let Some(held) = fleet.held().get_mut(&self.version) {
            held.requests = held.requests.saturating_sub(1);
            if held.requests == 0 && held.standing == Standing::Unwanted {
                fleet.left.notify_one();
            }
        }
    }
}

impl Upstream {
    /// Makes a version known that the upstream is to have, loaded or not.
    pub fn expect(&self, release: Release) {
        let mut held = self.inner.fleet.held();
        held.entry(release.version).or_insert(Held::new(release, false));
    }

    /// Holds a version for a request; `None` if it was never brought there.
    pub fn lease(&self, version: Version) -> Option<Lease> {
        let mut held = self.inner.fleet.held();
        let found = held.get_mut(&version)?;
        found.requests += 1;
        Some(Lease { upstream: self.clone(), version, name: found.release.name.clone() })
    }

    /// The version that goes by a model name.
    pub fn version_named(&self, name: &str) -> Option<Version> {
        let held = self.inner.fleet.held();
        held.values().find(|held| held.release.name == name).map(|held| held.release.version)
    }

    /// Whether the upstream has been given this version; the base model is always there.
    pub fn has(&self, version: Version) -> bool {
        version.0 == 0 || self.inner.fleet.held().get(&version).is_some_and(|held| held.loaded)
    }

    /// Brings a version to the upstream, unless it is there. What new requests get does not change.
    ///
    /// # Errors
    /// The upstream cannot load adapters, refuses this one, or does not answer.
    pub async fn load(&self, release: Release) -> Result<(), AdapterError> {
        let _turn = self.inner.fleet.turn.lock().await;
        let version = release.version;
        if self.has(version) {
            if let Some(held) = self.inner.fleet.held().get_mut(&version) {
                held.standing = Standing::Fresh;
            }
            return Ok(());
        }
        self.push(&release).await?;
        info!(%version, name = release.name, "the upstream has loaded a version");
        let mut held = self.inner.fleet.held();
        // One that was only expected is there now; one that was about to go stays.
        if let Some(held) = held.get_mut(&version) {
            (held.loaded, held.standing) = (true, Standing::Fresh);
        }
        held.entry(version).or_insert(Held::new(release, true));
        Ok(())
    }

    /// Brings a version there again that the upstream has lost, by a restart for example.
    ///
    /// # Errors
    /// As [`Upstream::load`].
    pub async fn reload(&self, version: Version) -> Result<(), AdapterError> {
        let release = {
            let mut held = self.inner.fleet.held();
            let Some(found) = held.get_mut(&version) else { return Ok(()) };
            found.release.clone()
        };
        // Of many requests that find it missing, one loads it.
        let _turn = self.inner.fleet.turn.lock().await;
        if self.models().await?.adapters.contains(&release.name) {
            return Ok(());
        }
        self.push(&release).await?;
        info!(%version, name = release.name, "the upstream has loaded a version again");
        if let Some(held) = self.inner.fleet.held().get_mut(&version) {
            held.loaded = true;
        }
        Ok(())
    }

    async fn push(&self, release: &Release) -> Result<(), AdapterError> {
        let pushed = self.try_push(release).await;
        let outcome = match &pushed {
            Ok(()) => "loaded",
            Err(AdapterError::Unsupported(_) | AdapterError::WhichModel) => "unsupported",
            Err(_) => "failed",
        };
        self.inner.metrics.pushes.with_label_values(&[outcome]).inc();
        if let Err(error) = &pushed {
            warn!(version = %release.version, %error, "the upstream did not load a version");
        }
        pushed
    }

    async fn try_push(&self, release: &Release) -> Result<(), AdapterError> {
        if self.inner.adapters == Adapters::None {
            return Err(AdapterError::Unsupported("upstream.adapters = \"none\"".to_owned()));
        }
        if self.model().is_none() {
            self.models().await?;
            self.model().ok_or(AdapterError::WhichModel)?;
        }
        let body = json!({ "lora_name": release.name, "lora_path": release.path });
        let (status, answer) = self.aside(Method::POST, "/load_lora_adapter", Some(&body)).await?;
        let message = told(&answer);
        // The name holds the adapter's checksum, so that what is there under it is what was to be loaded.
        if status.is_success() || message.contains("already been loaded") {
            return Ok(());
        }
        if matches!(
            status,
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED
        ) && !message.contains(&release.name)
        {
            return Err(AdapterError::Unsupported(format!("{status} at /load_lora_adapter")));
        }
        Err(AdapterError::Refused { name: release.name.clone(), status, message })
    }

    /// Returns when the last request has left a version that is to go.
    pub async fn left(&self) {
        self.inner.fleet.left.notified().await;
    }

    /// Takes back every version but these and those that requests still hold. What fails is tried again next time.
    pub async fn keep(&self, versions: &[Version]) {
        let _turn = self.inner.fleet.turn.lock().await;
        let idle: Vec<Release> = {
            let mut held = self.inner.fleet.held();
            for (version, held) in held.iter_mut() {
                held.standing = match held.standing {
                    _ if versions.contains(version) => Standing::Wanted,
                    Standing::Wanted => Standing::Unwanted,
                    other => other,
                };
            }
            let idle =
                |_: &Version, held: &mut Held| held.standing == Standing::Unwanted && held.requests == 0;
            held.extract_if(.., idle).filter(|(_, held)| held.loaded).map(|(_, held)| held.release).collect()
        };
        for release in idle {
            let body = json!({ "lora_name": release.name });
            match self.aside(Method::POST, "/unload_lora_adapter", Some(&body)).await {
                Ok((status, _)) if status.is_success() || status == StatusCode::NOT_FOUND => {
                    info!(version = %release.version, name = release.name, "the upstream has unloaded a version");
                }
                Ok((status, answer)) => {
                    warn!(version = %release.version, %status, message = told(&answer), "a version was not unloaded");
                }
                Err(fault) => {
                    warn!(version = %release.version, %fault, "a version was not unloaded");
                    let held = Held { standing: Standing::Unwanted, ..Held::new(release.clone(), true) };
                    self.inner.fleet.held().entry(release.version).or_insert(held);
                }
            }
        }
    }
}

/// What an answer says, in one line: the message of an error in either of vLLM's shapes, else its beginning.
fn told(answer: &[u8]) -> String {
    let json: Value = serde_json::from_slice(answer).unwrap_or_default();
    let message = json["error"]["message"].as_str().or(json["message"].as_str()).or(json["detail"].as_str());
    let text = message.map_or_else(|| String::from_utf8_lossy(answer).into_owned(), str::to_owned);
    text.chars().take(300).collect::<String>().replace(['\r', '\n'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_either_shape_are_told() {
        assert_eq!(told(br#"{"error":{"message":"no\nfile","code":404}}"#), "no file");
        assert_eq!(told(br#"{"object":"error","message":"old"}"#), "old");
        assert_eq!(told(br#"{"detail":"Not Found"}"#), "Not Found");
        assert_eq!(told(b"Success: done"), "Success: done");
        assert_eq!(told(&[b'x'; 1000]).len(), 300);
    }

    #[test]
    fn a_name_tells_versions_of_two_directories_apart() {
        let name = |sha: &str| Release::new(Version(7), sha, PathBuf::new()).name;
        assert_eq!(name("0123456789abcdef"), "gyrostat-v7-01234567");
        assert_ne!(name("1"), name("2"));
    }
}
