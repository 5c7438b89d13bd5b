//! The versions of the policy on disk, and which of them is served. The served version changes only here.
//!
//! ```text
//! versions/active             which version is served, all promotions before, and which version is on trial: one file,
//!                             replaced by a rename
//! versions/v0003/version.json where it comes from, the checksums of its files, the gate's report
//! versions/v0003/             adapter_config.json, adapter_model.safetensors as PEFT writes them; reward/ beside
//! ```
//! A version is staged in a directory of another name and renamed when it is whole. Promotion checks and loads it
//! first, then replaces `active`, then tells the engine through a `watch` channel. Version 0 is the base model.

mod disk;
mod record;
#[cfg(test)]
mod tests;
mod trial;

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use tokio::sync::watch;
use uuid::Uuid;

use crate::completion::{Timestamp, Version};
use crate::policy::{self, Adapter, Served};

use record::{Manifest, Placed, Promotion, Serving};
pub use record::{Origin, VersionRecord, VersionState};
pub use trial::Trial;

const ACTIVE: &str = "active";
const RECORD: &str = "version.json";
const STAGING: &str = ".staging";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What a version cannot be without.
const REQUIRED: [&str; 2] = ["adapter_config.json", WEIGHTS];
/// Of `version.json` and `active`.
const FORMAT: u32 = 1;

/// Why a version was not staged, promoted or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no version {0}")]
    UnknownVersion(Version),
    #[error("{version} is corrupt: {file} {problem}")]
    Corrupt { version: Version, file: String, problem: &'static str },
    #[error("{version} cannot be loaded: {source}")]
    Load { version: Version, source: policy::Error },
    #[error("{dir} holds no adapter of this model: {source}")]
    Foreign { dir: PathBuf, source: policy::Error },
    #[error("{version} was not taken in: {reason}")]
    NotTakenIn { version: Version, reason: String },
    #[error("{0} was rejected")]
    Rejected(Version),
    #[error("{0} is being served")]
    Active(Version),
    #[error("the new version has no {file}")]
    Incomplete { file: &'static str },
    #[error("the new version could not be written: {0}")]
    Stage(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("{path}: {problem}")]
    Damaged { path: PathBuf, problem: String },
    #[error("the disk that holds the versions is full")]
    Full,
    #[error("versions: {0}")]
    Io(io::Error),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            _ => Self::Io(error),
        }
    }
}

type Load = dyn Fn(&Path) -> Result<Option<Arc<Adapter>>, policy::Error> + Send + Sync;

/// Takes a version in before it is served: its number, the SHA-256 of its weights, its directory. Why not, in words.
type TakeIn = dyn Fn(Version, &str, &Path) -> Result<(), String> + Send + Sync;

/// See the module. Its methods read and write files: call them where that may block.
pub struct Registry {
    dir: PathBuf,
    load: Box<Load>,
    take_in: OnceLock<Box<TakeIn>>,
    served: watch::Sender<Served>,
    trial: Mutex<Option<Arc<Trial>>>,
    /// Held during a change, so that changes follow each other.
    promotions: Mutex<Serving>,
    warnings: Vec<String>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("dir", &self.dir)
            .field("active", &self.active())
            .finish_non_exhaustive()
    }
}

impl Registry {
    /// Opens `dir` (`<data>/versions`), or makes it, and loads the version that was served last. `load` makes an
    /// adapter of a directory, or none where nobody runs it here.
    ///
    /// If that version is corrupt, the one that was promoted before it is served, and so on down to the base model;
    /// [`Registry::warnings`] says so. `active` stays as it is, so that a repaired version comes back.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub fn open<F>(dir: &Path, load: F) -> Result<Self, Error>
    where
        F: Fn(&Path) -> Result<Option<Arc<Adapter>>, policy::Error> + Send + Sync + 'static,
    {
        fs::create_dir_all(dir)?;
        // What a crash left of a version that was being written.
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(STAGING) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        let mut warnings = Vec::new();
        let promotions = match disk::read::<Serving>(&dir.join(ACTIVE)) {
            Ok(found) => found,
            Err(Error::Damaged { path, problem }) => {
                warnings
                    .push(format!("{} is not readable, the base model is served: {problem}", path.display()));
                None
            }
            Err(error) => return Err(error),
        };
        let promotions =
            promotions.unwrap_or(Serving { format: FORMAT, promotions: Vec::new(), trial: None });
        let mut registry = Self {
            dir: dir.to_owned(),
            load: Box::new(load),
            take_in: OnceLock::new(),
            served: watch::Sender::new(Served::default()),
            trial: Mutex::default(),
            promotions: Mutex::new(promotions),
            warnings,
        };
        registry.serve_newest_sound();
        registry.resume_trial();
        for warning in &registry.warnings {
            tracing::error!("{warning}");
        }
        Ok(registry)
    }

    fn serve_newest_sound(&mut self) {
        let promotions = self.lock().promotions.clone();
        let mut tried = Vec::new();
        for Promotion { version, .. } in promotions.into_iter().rev() {
            if tried.contains(&version) {
                continue;
            }
            tried.push(version);
            // A roll back that was followed by a rejection.
            if self.manifest(version).is_ok_and(|manifest| manifest.rejected_at.is_some()) {
                continue;
            }
            match self.load(version) {
                Ok(served) => {
                    self.served.send_replace(served);
                    return;
                }
                Err(error) => self.warnings.push(format!("{version} was active and is not served: {error}")),
            }
        }
    }

    /// Has `take_in` called with each version, but for the base model, before it is promoted: somebody else serves it.
    /// Only the first call counts.
    pub fn take_in<F>(&self, take_in: F)
    where
        F: Fn(Version, &str, &Path) -> Result<(), String> + Send + Sync + 'static,
    {
        let _first = self.take_in.set(Box::new(take_in));
    }

    /// What was wrong when it was opened; empty if nothing was.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The version that is served.
    pub fn active(&self) -> Version {
        self.served.borrow().version
    }

    /// Follows what is served.
    pub fn served(&self) -> watch::Receiver<Served> {
        self.served.subscribe()
    }

    /// Where a version's files lie; `None` for the base model.
    pub fn path(&self, version: Version) -> Option<PathBuf> {
        (version.0 > 0).then(|| self.dir.join(format!("v{:04}", version.0)))
    }

    /// Adds a version that is not served yet. `write` puts the adapter's files into the directory that it is given,
    /// which is empty. Durable when it returns; before, nothing of it can be seen.
    ///
    /// # Errors
    /// `write` fails, a file is missing, the parent is unknown, or the disk is full. Then nothing is left of it.
    pub fn stage<E>(
        &self,
        write: impl FnOnce(&Path) -> Result<(), E>,
        origin: Origin,
        now: Timestamp,
    ) -> Result<VersionRecord, Error>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if origin.parent.0 > 0 {
            self.manifest(origin.parent)?;
        }
        // In the same directory, so that the rename stays within one file system.
        let staging = self.dir.join(format!("{STAGING}-{}", Uuid::now_v7()));
        fs::create_dir(&staging)?;
        let staged = write(&staging)
            .map_err(|error| Error::Stage(error.into()))
            .and_then(|()| self.adopt(&staging, origin, now));
        if staged.is_err()
            && let Err(error) = fs::remove_dir_all(&staging)
        {
            tracing::warn!("{} stays behind until the next start: {error}", staging.display());
        }
        staged
    }

    /// Adds an adapter that was trained elsewhere, in PEFT's format, as a version that is not served yet. It is a child
    /// of `parent`; its files are copied.
    ///
    /// # Errors
    /// It does not fit the model, or as for [`Self::stage`].
    pub fn stage_foreign(
        &self,
        dir: &Path,
        parent: Version,
        note: String,
        now: Timestamp,
    ) -> Result<VersionRecord, Error> {
        (self.load)(dir).map_err(|source| Error::Foreign { dir: dir.to_owned(), source })?;
        let copy = |staging: &Path| {
            REQUIRED.iter().try_for_each(|file| fs::copy(dir.join(file), staging.join(file)).map(|_| ()))
        };
        self.stage(copy, Origin { parent, note, ..Origin::default() }, now)
    }

    fn adopt(&self, staging: &Path, origin: Origin, now: Timestamp) -> Result<VersionRecord, Error> {
        let files = disk::seal(staging)?;
        if let Some(file) = REQUIRED.into_iter().find(|file| !files.contains_key(*file)) {
            return Err(Error::Incomplete { file });
        }
        let promotions = self.lock();
        let last = self.versions()?.into_iter().max().unwrap_or_default();
        let version = Version(last.0 + 1);
        let Origin { parent, update, note, gate } = origin;
        let manifest = Manifest {
            format: FORMAT,
            version,
            created_at: now,
            parent,
            update,
            note,
            files,
            gate,
            rejected_at: None,
        };
        disk::replace(&staging.join(RECORD), &manifest)?;
        if let Some(path) = self.path(version) {
            fs::rename(staging, path)?;
        }
        disk::sync_dir(&self.dir)?;
        Ok(self.record(manifest, &promotions))
    }

    /// Serves a version from now on; an older one is a roll back. It is checked and loaded first; on any error what
    /// was served stays.
    ///
    /// # Errors
    /// The version is unknown, rejected, corrupt, cannot be loaded or is not taken in, or the disk is full.
    pub fn promote(&self, version: Version, now: Timestamp) -> Result<VersionRecord, Error> {
        let mut promotions = self.lock();
        let manifest = self.manifest(version)?;
        let served = self.taken_in(&manifest)?;
        let mut next = promotions.clone();
        let again = next.promotions.last().map(|last| last.version) == Some(version);
        if !again {
            next.promotions.push(Promotion { version, at: now });
        }
        if !again || next.trial.take().is_some() {
            next.trial = None;
            disk::replace(&self.dir.join(ACTIVE), &next)?;
        }
        *promotions = next;
        *self.trial_lock() = None;
        self.served.send_replace(served);
        Ok(self.record(manifest, &promotions))
    }

    /// Checked, loaded, and with whoever else serves it.
    fn taken_in(&self, manifest: &Manifest) -> Result<Served, Error> {
        let version = manifest.version;
        if manifest.rejected_at.is_some() {
            return Err(Error::Rejected(version));
        }
        let served = self.load(version)?;
        if let (Some(take_in), Some(path)) = (self.take_in.get(), self.path(version)) {
            let sha256 = manifest.files.get(WEIGHTS).map_or("", String::as_str);
            take_in(version, sha256, &path).map_err(|reason| Error::NotTakenIn { version, reason })?;
        }
        Ok(served)
    }

    /// Marks a version as one that must not be served.
    ///
    /// # Errors
    /// The version is unknown, is being served, or is the base model; or the disk is full.
    pub fn reject(&self, version: Version, now: Timestamp) -> Result<VersionRecord, Error> {
        let promotions = self.lock();
        let mut manifest = self.manifest(version)?;
        let on_trial = promotions.trial.is_some_and(|trial| trial.version == version);
        let Some(path) = self.path(version).filter(|_| version != self.active() && !on_trial) else {
            return Err(Error::Active(version));
        };
        if manifest.rejected_at.is_none() {
            manifest.rejected_at = Some(now);
            disk::replace(&path.join(RECORD), &manifest)?;
        }
        Ok(self.record(manifest, &promotions))
    }

    /// Checks a version's files against their checksums and loads its adapter, without serving it to everybody: for
    /// the canary and for training.
    ///
    /// # Errors
    /// The version is unknown, corrupt or cannot be loaded.
    pub fn load(&self, version: Version) -> Result<Served, Error> {
        let Some(path) = self.path(version) else { return Ok(Served::default()) };
        for (file, expected) in &self.manifest(version)?.files {
            let corrupt = |problem| Error::Corrupt { version, file: file.clone(), problem };
            match disk::sha256(&path.join(file)) {
                Ok(found) if found == *expected => {}
                Ok(_) => return Err(corrupt("has another checksum")),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(corrupt("is missing")),
                Err(error) => return Err(error.into()),
            }
        }
        let adapter = (self.load)(&path).map_err(|source| Error::Load { version, source })?;
        Ok(Served { version, adapter })
    }

    /// One version.
    ///
    /// # Errors
    /// It is unknown, or its record is damaged.
    pub fn version(&self, version: Version) -> Result<VersionRecord, Error> {
        let promotions = self.lock();
        Ok(self.record(self.manifest(version)?, &promotions))
    }

    /// All versions, newest first; the base model is the last. One whose record is damaged is left out.
    pub fn history(&self) -> Result<Vec<VersionRecord>, Error> {
        let promotions = self.lock();
        let mut versions = self.versions()?;
        versions.push(Version(0));
        versions.sort_unstable_by(|a, b| b.cmp(a));
        let mut records = Vec::with_capacity(versions.len());
        for version in versions {
            match self.manifest(version) {
                Ok(manifest) => records.push(self.record(manifest, &promotions)),
                Err(error) => tracing::error!("{version} is left out: {error}"),
            }
        }
        Ok(records)
    }

    fn lock(&self) -> MutexGuard<'_, Serving> {
        self.promotions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The versions that have a directory.
    fn versions(&self) -> Result<Vec<Version>, Error> {
        let mut versions = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let number =
                name.to_str().and_then(|name| name.strip_prefix('v')).and_then(|number| number.parse().ok());
            versions.extend(number.filter(|number| *number > 0).map(Version));
        }
        Ok(versions)
    }

    fn manifest(&self, version: Version) -> Result<Manifest, Error> {
        let Some(path) = self.path(version) else { return Ok(Manifest::of_the_base()) };
        let record = path.join(RECORD);
        match disk::read::<Manifest>(&record)? {
            Some(manifest) if manifest.format <= FORMAT => Ok(manifest),
            Some(_) => Err(Error::Damaged { path: record, problem: "is of a newer program".to_owned() }),
            None if path.is_dir() => {
                Err(Error::Corrupt { version, file: RECORD.to_owned(), problem: "is missing" })
            }
            None => Err(Error::UnknownVersion(version)),
        }
    }

    fn record(&self, manifest: Manifest, promotions: &Serving) -> VersionRecord {
        let version = manifest.version;
        let promoted_at: Vec<_> = promotions
            .promotions
            .iter()
            .filter(|promotion| promotion.version == version)
            .map(|promotion| promotion.at)
            .collect();
        let state = if version == self.active() {
            VersionState::Active
        } else if promotions.trial.is_some_and(|trial| trial.version == version) {
            VersionState::Canary
        } else if manifest.rejected_at.is_some() {
            VersionState::Rejected
        } else if promoted_at.is_empty() && version.0 > 0 {
            VersionState::Staged
        } else {
            VersionState::Retired
        };
        let Manifest { created_at, parent, update, note, files, gate, rejected_at, .. } = manifest;
        let sha256 = files.get(WEIGHTS).cloned().unwrap_or_default();
        VersionRecord {
            version,
            state,
            created_at,
            parent,
            update,
            note,
            sha256,
            files,
            gate,
            promoted_at,
            rejected_at,
        }
    }
}
