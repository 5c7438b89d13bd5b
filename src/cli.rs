//! The command line: one file a command.

mod backtest;
mod bench;
mod classify;
mod demo;
mod evaluate;
mod export;
mod generate;
mod jsonl;
mod judge;
mod logging;
mod model;
mod replay;
mod report;
mod serve;
mod train;

use std::{io, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::config::Config;

/// Keeps an RLHF-trained language model aligned while it serves.
#[derive(Debug, Parser)]
#[command(name = "gyrostat", version, about, arg_required_else_help = true)]
pub struct Cli {
    /// Configuration file; without one the defaults hold. The environment (`GYROSTAT_<TABLE>__<KEY>`) overrides both.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the sidecar.
    Serve,
    /// Run the whole loop on the default model with simulated users.
    Demo(demo::Args),
    /// Fetch, list or make models.
    #[command(subcommand)]
    Model(model::Command),
    /// Add refusal, risk and interaction type to prompts with responses.
    Classify(classify::Args),
    /// Run a drift detector over recorded streams.
    Backtest(backtest::Args),
    /// Feed logged traffic through signals and detectors as if it were live.
    Replay(replay::Args),
    /// Train an adapter from a file, with the code that the cycle runs.
    Train(train::Args),
    /// Measure the model, an adapter or a reward model on a file.
    Evaluate(evaluate::Args),
    /// Let the gate judge an adapter against another, or against the model itself.
    Judge(judge::Args),
    /// Answer the prompts of a file.
    Generate(generate::Args),
    /// Write what was recorded as a data set in TRL's formats.
    Export(export::Args),
    /// Write what drifted, why, and what was done as an HTML page.
    Report(report::Args),
    /// Measure this machine's speed at serving, training, detecting or storing.
    Bench(bench::Args),
}

/// Whatever stopped a command; its text is for the person at the terminal.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;

/// Runs the command. 0: done, 1: failed, 2: misused (clap exits with it by itself).
pub fn run(cli: &Cli) -> ExitCode {
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough, like `head`, is no failure of ours.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            let _unheard = io::Write::write_fmt(&mut io::stderr(), format_args!("gyrostat: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: &Cli) -> Result<(), Error> {
    let config = Config::load(cli.config.as_deref())?;
    logging::start(config.log.format, matches!(cli.command, Command::Serve));
    match &cli.command {
        Command::Serve => serve::run(config),
        Command::Demo(args) => demo::run(args),
        Command::Model(command) => model::run(command),
        Command::Classify(args) => classify::run(args, &config),
        Command::Backtest(args) => Ok(backtest::run(args)?),
        Command::Replay(args) => replay::run(args, config),
        Command::Train(args) => train::run(args, config),
        Command::Evaluate(args) => evaluate::run(args, &config),
        Command::Judge(args) => judge::run(args, &config),
        Command::Generate(args) => generate::run(args, &config),
        Command::Export(args) => export::run(args, &config),
        Command::Report(args) => report::run(args, &config),
        Command::Bench(args) => bench::run(args, &config),
    }
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            return true;
        }
        cause = error.source();
    }
    false
}
