//! `gyrostat demo`: arguments only; the demo itself is `crate::demo`.

use std::path::PathBuf;

use crate::demo;

use super::{Error, model, serve};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Changes traffic, raters, sampling and training.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Directory for the data; without one a scratch directory is used and removed.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// The share of the users on whom the candidate is tried after the gate; 0 promotes it at once.
    #[arg(long, default_value_t = 0.0)]
    canary: f64,
    /// How many types of interaction change, one after the other: each is an alarm, an update and a promotion.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=3))]
    loops: u8,
    /// Model to serve instead of the default one.
    #[arg(long)]
    model: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => model::fetched()?,
    };
    let (seed, data, port, canary) = (args.seed, args.data.clone(), args.port, args.canary);
    let options = demo::Options { seed, model, data, port, canary, loops: args.loops.into() };
    serve::runtime()?.block_on(demo::run(&options))?;
    Ok(())
}
