//! Arguments and exit code; everything else is the library.
#![expect(unsafe_code, reason = "the environment is changed where nobody else can read it")]

use std::{env, process::ExitCode, thread};

use clap::Parser;
use gyrostat::cli::{Cli, run};

/// Where rayon and candle look for the number of threads. While it is unset candle reads `/proc/cpuinfo` for every product,
/// which takes longer than a small product does.
const THREADS: &str = "RAYON_NUM_THREADS";

fn main() -> ExitCode {
    if let (None, Ok(threads)) = (env::var_os(THREADS), thread::available_parallelism()) {
        // SAFETY: this is the only thread.
        unsafe { env::set_var(THREADS, threads.to_string()) };
    }
    run(&Cli::parse())
}
