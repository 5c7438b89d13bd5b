//! `gyrostat model`: the default model's cache, and a tiny model for tests.

use std::{fs, path::PathBuf};

use clap::Subcommand;
use indicatif::ProgressBar;

use crate::policy::{cache_dir, cached, fetch, tiny_family, write_tiny_of};

use super::{Error, jsonl};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Put the default model into the cache, if it is not there yet.
    Fetch,
    /// List the models in the cache.
    List,
    /// Write a tiny random model, for trying things out without a download.
    Tiny {
        /// Directory to write it to.
        #[arg(long)]
        out: PathBuf,
        /// The same seed gives the same weights.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Whose conventions it follows: llama, llama-linear, llama3, mistral, qwen2 or qwen3.
        #[arg(long, default_value = "llama")]
        family: String,
    },
}

pub(super) fn run(command: &Command) -> Result<(), Error> {
    let mut out = jsonl::writer("-")?;
    match command {
        Command::Fetch => writeln!(out, "{}", fetched()?.display())?,
        Command::List => {
            let default = cached();
            for entry in fs::read_dir(cache_dir()).into_iter().flatten().flatten() {
                let mark = if default.as_ref() == Some(&entry.path()) { " (default)" } else { "" };
                writeln!(out, "{}{mark}", entry.path().display())?;
            }
        }
        Command::Tiny { out: dir, seed, family } => {
            let unknown = || format!("--family: there is no tiny model {family:?}");
            write_tiny_of(tiny_family(family).ok_or_else(unknown)?, dir, *seed)?;
            writeln!(out, "{}", dir.display())?;
        }
    }
    out.flush()?;
    Ok(())
}

/// The default model's path, fetched with a spinner if need be.
pub(super) fn fetched() -> Result<PathBuf, Error> {
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(std::time::Duration::from_millis(120));
    let path = fetch(&mut |step| spinner.set_message(step.to_owned()))?;
    spinner.finish_and_clear();
    Ok(path)
}
