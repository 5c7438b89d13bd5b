//! Arguments and exit code; everything else is the library.

use std::process::ExitCode;

use clap::Parser;
use gyrostat::cli::{Cli, run};

fn main() -> ExitCode {
    run(&Cli::parse())
}
