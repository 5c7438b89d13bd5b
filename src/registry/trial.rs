//! A version that serves a share of the users, beside the one that serves the rest.

use std::sync::{Arc, MutexGuard, PoisonError};

use crate::completion::{Timestamp, Version};
use crate::policy::Served;

use super::{ACTIVE, Error, Placed, Registry, Serving, VersionRecord, disk};

/// A version that serves a share of the users.
#[derive(Debug, Clone)]
pub struct Trial {
    pub served: Served,
    pub share: f64,
}

impl Registry {
    /// What was on trial when the last process ended.
    pub(super) fn resume_trial(&mut self) {
        let Some(Placed { version, share, .. }) = self.lock().trial else { return };
        let loaded = self.load(version);
        match loaded {
            Ok(served) => *self.trial_lock() = Some(Arc::new(Trial { served, share })),
            Err(error) => {
                self.lock().trial = None;
                self.warnings.push(format!("{version} was on trial and is not served: {error}"));
            }
        }
    }

    /// The version that serves a share of the users, if one does.
    pub fn trial(&self) -> Option<Arc<Trial>> {
        self.trial_lock().clone()
    }

    pub(super) fn trial_lock(&self) -> MutexGuard<'_, Option<Arc<Trial>>> {
        self.trial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a version to a share of the users from now on; any promotion ends that. Checked and loaded first, as for
    /// a promotion.
    ///
    /// # Errors
    /// As for [`Registry::promote`], or the version is served already.
    pub fn begin_trial(&self, version: Version, share: f64, now: Timestamp) -> Result<VersionRecord, Error> {
        let mut promotions = self.lock();
        let manifest = self.manifest(version)?;
        if version == self.active() {
            return Err(Error::Active(version));
        }
        let served = self.taken_in(&manifest)?;
        let next = Serving { trial: Some(Placed { version, share, at: now }), ..promotions.clone() };
        disk::replace(&self.dir.join(ACTIVE), &next)?;
        *promotions = next;
        *self.trial_lock() = Some(Arc::new(Trial { served, share }));
        // Whoever follows what is served looks at the trial, too.
        self.served.send_modify(|_| {});
        Ok(self.record(manifest, &promotions))
    }

    /// Serves what everybody gets to those users, too.
    ///
    /// # Errors
    /// The disk is full.
    pub fn end_trial(&self) -> Result<(), Error> {
        let mut promotions = self.lock();
        if promotions.trial.is_some() {
            let next = Serving { trial: None, ..promotions.clone() };
            disk::replace(&self.dir.join(ACTIVE), &next)?;
            *promotions = next;
            *self.trial_lock() = None;
            self.served.send_modify(|_| {});
        }
        Ok(())
    }
}
