//! Arguments and exit code; everything else is the library.
#![expect(
    unsafe_code,
    clippy::disallowed_methods,
    reason = "what rayon and candle read from the environment is set before anything else runs"
)]

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
