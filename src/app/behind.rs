//! Upstream mode's own parts: versions are pushed before they are served, and taken back when nobody needs them.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{runtime::Handle, task::JoinHandle};
use tracing::{info, warn};

use crate::completion::Version;
use crate::http::{Relay, recorder};
use crate::registry::Registry;
use crate::upstream::{Config, Release, Upstream};

/// What the upstream is told of a version in the directory `dir` of ours.
fn release(config: &Config, version: Version, sha256: &str, dir: &Path) -> io::Result<Release> {
    let path = match (&config.adapter_dir, dir.file_name()) {
        (Some(theirs), Some(name)) => theirs.join(name),
        // The upstream has a working directory of its own.
        _ => dir.canonicalize()?,
    };
    Ok(Release::new(version, sha256, path))
}

/// Passes requests on, and records the answers.
pub(super) fn relay(parts: recorder::Parts, config: &Config) -> io::Result<Relay> {
    let upstream = parts.upstream.clone();
    let recorder = recorder::Recorder::start(parts, config.record_queue, Handle::current())?;
    Ok(Relay { upstream, recorder })
}

/// Lets the upstream load each version before the registry serves it, and follows what is served.
pub(super) fn follow(registry: &Arc<Registry>, upstream: &Upstream, config: &Config) -> JoinHandle<()> {
    let (runtime, pushed, settings) = (Handle::current(), upstream.clone(), config.clone());
    registry.take_in(move |version, sha256, dir| {
        let release = release(&settings, version, sha256, dir).map_err(|error| error.to_string())?;
        // Promotions run on threads that may block.
        runtime.block_on(pushed.load(release)).map_err(|error| error.to_string())
    });
    let served: Vec<Release> =
        serving(registry).filter_map(|version| known(registry, config, version)).collect();
    for release in &served {
        upstream.expect(release.clone());
    }
    tokio::spawn(keep_up(upstream.clone(), Arc::clone(registry), served))
}

/// What is served, and what is on trial.
fn serving(registry: &Registry) -> impl Iterator<Item = Version> + use<> {
    let trial = registry.trial().map(|trial| trial.served.version);
    std::iter::once(registry.active()).chain(trial)
}

/// A version that was served last, which the upstream may have lost since.
fn known(registry: &Registry, config: &Config, version: Version) -> Option<Release> {
    let dir: PathBuf = registry.path(version)?;
    let record = registry.version(version).ok()?;
    release(config, version, &record.sha256, &dir).ok()
}

async fn keep_up(upstream: Upstream, registry: Arc<Registry>, before: Vec<Release>) {
    const AGAIN: Duration = Duration::from_secs(2);
    let mut told = false;
    while let Err(fault) = upstream.models().await {
        if !std::mem::replace(&mut told, true) {
            warn!(%fault, "the upstream is not there yet");
        }
        tokio::time::sleep(AGAIN).await;
    }
    info!(model = upstream.model(), "the upstream answers");
    for release in before {
        if let Err(error) = upstream.load(release).await {
            warn!(%error, "the upstream did not load a version that was served last");
        }
    }
    let mut served = registry.served();
    let mut current = served.borrow_and_update().version;
    let mut previous = current;
    loop {
        let wanted: Vec<Version> = serving(&registry).chain([current, previous]).collect();
        upstream.keep(&wanted).await;
        tokio::select! {
            changed = served.changed() => {
                if changed.is_err() {
                    return;
                }
                let version = served.borrow_and_update().version;
                if version != current {
                    previous = std::mem::replace(&mut current, version);
                }
            }
            () = upstream.left() => {}
        }
    }
}
