//! Files that are there as a whole or not at all.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
};

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use super::Error;

/// Replaces a file by a rename. After a crash it holds the old content or the new.
pub(super) fn replace<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let fresh = path.with_extension("new");
    let json = serde_json::to_vec_pretty(value).map_err(|error| damaged(path, &error))?;
    let mut file = File::create(&fresh)?;
    file.write_all(&json)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    if let Some(dir) = path.parent() {
        sync_dir(dir)?;
    }
    Ok(())
}

/// `None` if there is no such file.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(json) => serde_json::from_slice(&json).map(Some).map_err(|error| damaged(path, &error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn damaged(path: &Path, error: &serde_json::Error) -> Error {
    Error::Damaged { path: path.to_owned(), problem: error.to_string() }
}

/// Makes the entries of a directory durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes all files under `dir` durable, and gives their SHA-256 by their path in it, with `/` between the parts.
pub(super) fn seal(dir: &Path) -> Result<BTreeMap<String, String>, Error> {
    let mut sums = BTreeMap::new();
    seal_into(dir, "", &mut sums)?;
    Ok(sums)
}

fn seal_into(dir: &Path, prefix: &str, sums: &mut BTreeMap<String, String>) -> Result<(), Error> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            seal_into(&entry.path(), &format!("{name}/"), sums)?;
        } else {
            File::open(entry.path())?.sync_all()?;
            sums.insert(name, sha256(&entry.path())?);
        }
    }
    sync_dir(dir)?;
    Ok(())
}

/// In hexadecimal.
pub(super) fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(format!("{:x}", hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}
