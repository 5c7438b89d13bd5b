//! Arguments, logging, exit code; everything else is the library.

use std::{io, process::ExitCode};

use clap::Parser;
use gyrostat::cli::{Cli, run};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,gyrostat=info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    run(&cli)
}
