//! The model: weights, tokenizer, chat template, decoder, adapters, sampler, and the thread that runs them.

pub(crate) mod architecture;
pub(crate) mod attention;
pub(crate) mod backward;
mod batch;
#[cfg(feature = "cuda")]
pub(crate) mod card;
pub(crate) mod decoder;
pub(crate) mod device;
pub(crate) mod engine;
mod fetch;
pub mod grammar;
pub(crate) mod head;
mod kv;
mod layer;
mod linear;
pub mod lora;
mod metrics;
mod ops;
mod packed;
mod prompt;
pub mod request;
mod rope;
mod sampler;
pub(crate) mod tape;
#[cfg(test)]
mod tests;
mod tiny;
mod weights;

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use candle_core::quantized::gguf_file;
use serde::{Deserialize, Serialize};

pub use architecture::{Architecture, Family, RopeScaling};
pub use backward::AdapterGradient;
pub use batch::Batch;
pub use decoder::Decoder;
pub use device::{Device, is_out_of_memory};
pub use engine::Engine;
pub use fetch::{cache_dir, cached, fetch};
pub use grammar::{Grammar, SchemaError};
pub use head::TokenLogprobs;
pub use kv::KvCache;
pub use lora::{Adapter, Shape};
pub use metrics::Metrics;
pub use prompt::Vocabulary;
pub use request::{Drawn, Event, GenerateRequest, Generated, Sampling, Served, SubmitError, TokenLogprob};
pub use tape::Tape;
pub use tiny::{family as tiny_family, write_tiny, write_tiny_of};

/// What is served, and within which bounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `default` (SmolLM2-135M-Instruct, see `gyrostat model fetch`), a `.gguf` file, or a Hugging Face directory.
    pub model: String,
    /// `auto`, `cpu` or `cuda`.
    pub device: Device,
    /// Threads of the device; 0 takes one a core.
    pub threads: usize,
    /// Requests that may wait for the engine; one more is answered 429.
    pub queue: usize,
    /// Sequences that are generated together.
    pub running: usize,
    /// Prompt tokens that one step takes in beside the running sequences.
    pub prefill_tokens: usize,
    /// Tokens whose keys and values are kept at most, over all running sequences.
    pub cache_tokens: usize,
    /// One in so many answers has its distance from the reference measured; 0 measures none.
    pub kl_one_in: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model: "default".to_owned(),
            device: Device::Auto,
            threads: 0,
            queue: 256,
            running: 32,
            prefill_tokens: 256,
            cache_tokens: 32_768,
            kl_one_in: 8,
        }
    }
}

/// What goes wrong with a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("model: {0}")]
    Model(String),
    #[error("adapter: {0}")]
    Adapter(String),
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    #[error("chat template: {0}")]
    Template(#[from] minijinja::Error),
    #[error("model fetch: {0}")]
    Fetch(String),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("device: {0}")]
    Device(#[from] candle_core::Error),
}

/// A decoder with its tokenizer.
#[derive(Debug)]
pub struct Model {
    pub decoder: Decoder,
    pub vocabulary: Vocabulary,
    /// What `/v1/models` calls it.
    pub name: String,
    /// Where it was read from.
    pub path: PathBuf,
}

impl Model {
    /// Loads what `model` of [`Config`] names to where `device` says; `default` must be in the cache.
    ///
    /// # Errors
    /// There is no such model or device, or it needs something that is not supported; the message names the field.
    pub fn load(model: &str, device: Device) -> Result<Self, Error> {
        let placement = device.open()?;
        if model == "default" {
            let path = cached().ok_or_else(|| {
                Error::Model(
                    "the default model is not in the cache; `gyrostat model fetch` puts it there".to_owned(),
                )
            })?;
            return Self::load_path(&path, &placement);
        }
        Self::load_path(Path::new(model), &placement)
    }

    pub(crate) fn load_path(path: &Path, placement: &device::Placement) -> Result<Self, Error> {
        let unknown = || Error::Model(format!("{} is neither a directory nor a .gguf file", path.display()));
        let name = path.file_stem().ok_or_else(unknown)?.to_string_lossy().into_owned();
        let (decoder, vocabulary) = if path.is_dir() {
            (Decoder::from_directory(path, placement)?, Vocabulary::from_directory(path)?)
        } else if path.extension().is_some_and(|extension| extension == "gguf") {
            let file =
                File::open(path).map_err(|error| Error::Model(format!("{}: {error}", path.display())))?;
            let mut file = BufReader::new(file);
            let content = gguf_file::Content::read(&mut file)
                .map_err(|error| Error::Model(format!("{}: {error}", path.display())))?;
            (Decoder::from_gguf(&content, &mut file, placement)?, Vocabulary::from_gguf(&content)?)
        } else {
            return Err(unknown());
        };
        Ok(Self { decoder, vocabulary, name, path: path.to_owned() })
    }

    /// The token that an answer is trained to end with.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.decoder.architecture.end_of_turn.first().copied()
    }
}
