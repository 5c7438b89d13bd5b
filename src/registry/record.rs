//! What is known of the versions, as it is shown and as it lies on disk.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::completion::{Timestamp, Version};

use super::FORMAT;

/// Where a version stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VersionState {
    /// Written, never served.
    Staged,
    Active,
    /// On trial: served to a share of the users.
    Canary,
    /// Was served.
    Retired,
    /// The gate or the canary said no.
    Rejected,
}

/// What is known of a version.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VersionRecord {
    pub version: Version,
    pub state: VersionState,
    pub created_at: Timestamp,
    /// The version that it was trained from.
    pub parent: Version,
    /// The update that made it.
    pub update: Option<Uuid>,
    pub note: String,
    /// Of the adapter's weights; empty for the base model.
    pub sha256: String,
    /// Of every file, by its path in the version's directory.
    pub files: BTreeMap<String, String>,
    /// What the gate found.
    pub gate: Option<serde_json::Value>,
    /// When it was promoted, each time.
    pub promoted_at: Vec<Timestamp>,
    pub rejected_at: Option<Timestamp>,
}

/// Where a new version comes from.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    pub parent: Version,
    pub update: Option<Uuid>,
    pub note: String,
    pub gate: Option<serde_json::Value>,
}

/// `version.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) format: u32,
    pub(super) version: Version,
    pub(super) created_at: Timestamp,
    pub(super) parent: Version,
    pub(super) update: Option<Uuid>,
    pub(super) note: String,
    pub(super) files: BTreeMap<String, String>,
    pub(super) gate: Option<serde_json::Value>,
    pub(super) rejected_at: Option<Timestamp>,
}

impl Manifest {
    pub(super) fn of_the_base() -> Self {
        Self {
            format: FORMAT,
            version: Version(0),
            created_at: Timestamp(0),
            parent: Version(0),
            update: None,
            note: "the base model".to_owned(),
            files: BTreeMap::new(),
            gate: None,
            rejected_at: None,
        }
    }
}

/// `active`: the last of the promotions is the version that is served.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Serving {
    pub(super) format: u32,
    pub(super) promotions: Vec<Promotion>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) trial: Option<Placed>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Placed {
    pub(super) version: Version,
    pub(super) share: f64,
    pub(super) at: Timestamp,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Promotion {
    pub(super) version: Version,
    pub(super) at: Timestamp,
}
