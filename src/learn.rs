//! Learning from what people said: reward model, PPO, RLOO, GRPO, DPO, KTO, SFT, all on adapters of one frozen base.

pub mod adamw;
pub mod advantages;
pub mod checkpoint;
mod critic;
pub mod dataset;
mod descent;
pub mod groups;
pub mod losses;
pub mod memory;
pub mod online;
pub mod policy_pass;
pub mod ppo;
pub mod preference;
pub mod reward;
pub mod rollouts;
pub mod scores;
pub mod sequence;
#[cfg(test)]
mod tests;

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::policy;

pub use checkpoint::Checkpoints;
pub use dataset::Dataset;
pub use memory::MicroTokens;
pub use online::{Method, Online};
pub use reward::RewardModel;
pub use rollouts::{Practice, Reward};
pub use scores::Scores;
pub use sequence::Sequence;

/// How candidates are trained.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub reward: reward::Config,
    pub ppo: ppo::Config,
    /// What RLOO and GRPO have beside PPO's.
    pub groups: groups::Config,
    /// SFT, DPO and KTO.
    pub preference: preference::Config,
    pub dataset: dataset::Config,
    pub pace: Pace,
}

/// How hard training presses on the device that also serves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pace {
    /// Tokens of one micro-batch: what training holds in memory at a time.
    pub micro_tokens: usize,
    /// Tokens of one example at most; longer prompts lose their beginning.
    pub sequence_tokens: usize,
    /// Milliseconds that a micro-batch waits for clients' requests at most.
    pub give_way_ms: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { micro_tokens: 1024, sequence_tokens: 512, give_way_ms: 250 }
    }
}

impl Pace {
    /// As many threads as the device has, for training alone: the system runs them after those that serve.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn threads() -> Result<rayon::ThreadPool, Error> {
        // A thirtieth of what a thread that serves has. Streams wait a quarter to a third less for it than at 10, at 19 no less.
        const NICENESS: i32 = 15;
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(rayon::current_num_threads())
            .thread_name(|nth| format!("learner-{nth}"))
            // On Linux this is the thread's own. Where it cannot be had training competes with serving as an equal.
            .start_handler(|_| {
                let _alone = rustix::process::nice(NICENESS);
            });
        Ok(threads.build()?)
    }
}

/// What goes wrong while learning. The served version is never touched by it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} is not a finite number")]
    NotFinite { what: &'static str },
    #[error("the adapter has no score head, so it is no reward model")]
    NoScoreHead,
    #[error("there is nothing to learn from: {0}")]
    NoData(String),
    #[error("cancelled")]
    Cancelled,
    #[error("a rollout failed: {0}")]
    Rollout(String),
    #[error(transparent)]
    Threads(#[from] rayon::ThreadPoolBuildError),
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    #[error(transparent)]
    Gradient(#[from] adamw::Error),
    #[error(transparent)]
    Policy(#[from] policy::Error),
    #[error("device: {0}")]
    Device(#[from] candle_core::Error),
}

impl Error {
    /// Whether smaller work may succeed.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Device(fault) | Self::Policy(policy::Error::Device(fault)) => {
                policy::is_out_of_memory(fault)
            }
            _ => false,
        }
    }
}

/// Measures of one step by their names.
pub type Measures<'a> = &'a [(&'a str, f64)];

/// What training tells while it runs, and where it can be held up: between two micro-batches.
pub struct Watch<'a> {
    pub micro_tokens: MicroTokens,
    pub sequence_tokens: usize,
    /// Called between micro-batches; `false` cancels.
    pub between: &'a (dyn Fn() -> bool + Sync),
    /// Stage, share of the stage that is done, and the measures of the step.
    pub report: &'a (dyn Fn(&str, f64, Measures<'_>) + Sync),
    /// Where the run is kept, so that it can go on after a kill.
    pub checkpoints: Option<&'a Checkpoints>,
}

impl fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("micro_tokens", &self.micro_tokens).finish_non_exhaustive()
    }
}

impl Watch<'_> {
    pub(crate) fn between(&self) -> Result<(), Error> {
        if (self.between)() { Ok(()) } else { Err(Error::Cancelled) }
    }

    pub(crate) fn progress(&self, stage: &str, done: f64, measures: Measures<'_>) {
        (self.report)(stage, done, measures);
    }

    /// Where an interrupted run stood.
    fn resumed(&self) -> Result<Option<checkpoint::State>, Error> {
        self.checkpoints.map_or(Ok(None), Checkpoints::load)
    }

    /// Writes a checkpoint if one is due before this step.
    fn keep(&self, step: usize, state: &dyn Fn() -> Result<checkpoint::State, Error>) -> Result<(), Error> {
        match self.checkpoints {
            Some(checkpoints) if checkpoints.is_due(step) => checkpoints.write(&state()?),
            _ => Ok(()),
        }
    }
}

impl Pace {
    pub fn give_way(&self) -> Duration {
        Duration::from_millis(self.give_way_ms)
    }
}
