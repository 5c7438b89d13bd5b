//! Helpfulness as the reward model of the served version sees it: a score's quantile among those of a reference window.
//!
//! A score means nothing by itself, and nothing against another reward model's. Its quantile among the first scores of
//! its own version is even over `[0, 1]` as long as answers stay as they are.

use std::{
    path::Path,
    sync::{Arc, mpsc},
    thread,
};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::completion::{Completion, Version};
use crate::learn::{self, RewardModel, Sequence, Watch};
use crate::policy::Engine;

/// The scores that later ones are held against.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Reference {
    pub(super) version: Version,
    /// Ascending.
    scores: Vec<f32>,
}

impl Reference {
    const SIZE: usize = 300;

    pub(super) fn new(version: Version) -> Self {
        Self { version, scores: Vec::new() }
    }

    /// The score's quantile, ties by half; `None` where the score becomes part of the reference, or is no number.
    pub(super) fn quantile(&mut self, score: f32) -> Option<f64> {
        if !score.is_finite() {
            return None;
        }
        let below = self.scores.partition_point(|other| *other < score);
        if self.scores.len() < Self::SIZE {
            self.scores.insert(below, score);
            return None;
        }
        let above = self.scores.len() - self.scores.partition_point(|other| *other <= score);
        let (below, above, size) = (below as f64, above as f64, self.scores.len() as f64);
        Some(0.5 + (below - above) / (2.0 * (size + 1.0)))
    }
}

/// A thread that scores a share of the answers, behind clients. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Scorer {
    answers: mpsc::SyncSender<Completion>,
    scored: mpsc::Receiver<(Completion, f32)>,
    share: f64,
}

impl Scorer {
    /// Answers that wait at most; what comes on top is not scored.
    const WAITING: usize = 64;

    /// The reward model of the version in `dir`; `None` if it has none.
    pub(super) fn start(
        dir: &Path,
        engine: &Engine,
        pace: &learn::Pace,
        share: f64,
    ) -> Result<Option<Self>, learn::Error> {
        let dir = dir.join("reward");
        if share <= 0.0 || !dir.is_dir() {
            return Ok(None);
        }
        let reward = RewardModel::load(&dir, &engine.model().decoder.architecture)?;
        let (answers, waiting) = mpsc::sync_channel::<Completion>(Self::WAITING);
        let (told, scored) = mpsc::channel();
        let (engine, pace) = (engine.clone(), pace.clone());
        let work = move || {
            for completion in waiting {
                match score(&completion, &reward, &engine, &pace) {
                    Ok(score) => {
                        if told.send((completion, score)).is_err() {
                            return;
                        }
                    }
                    Err(fault) => warn!(%fault, completion = %completion.id, "an answer was not scored"),
                }
            }
        };
        thread::Builder::new()
            .name("helpfulness".to_owned())
            .spawn(work)
            .map_err(|fault| learn::Error::Rollout(format!("a thread for scores: {fault}")))?;
        Ok(Some(Self { answers, scored, share }))
    }

    /// Takes the answer, if it is one of the share and there is room. An answer without its text says nothing.
    pub(super) fn offer(&self, completion: &Completion) {
        let drawn = f64::from(completion.id.0.as_u64_pair().1 as u32) / f64::from(u32::MAX);
        if drawn < self.share && !completion.answer.is_empty() {
            // A full queue means that clients need the device.
            let _full = self.answers.try_send(completion.clone());
        }
    }

    /// What was scored since the last call.
    pub(super) fn scored(&self) -> impl Iterator<Item = (Completion, f32)> {
        self.scored.try_iter()
    }
}

fn score(
    completion: &Completion,
    reward: &RewardModel,
    engine: &Engine,
    pace: &learn::Pace,
) -> Result<f32, learn::Error> {
    let watch = Watch {
        micro_tokens: learn::MicroTokens::new(pace.micro_tokens),
        sequence_tokens: pace.sequence_tokens,
        between: &|| {
            engine.give_way(pace.give_way());
            true
        },
        report: &|_, _, _| (),
        checkpoints: None,
    };
    let model: &Arc<_> = engine.model();
    let sequence = Sequence::encode(model, &completion.prompt, &completion.answer, pace.sequence_tokens)?;
    let scores = reward.score(model, &[sequence], &watch)?;
    scores.first().copied().ok_or_else(|| learn::Error::NoData("an answer without tokens".to_owned()))
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn quantiles_are_even_until_answers_get_worse() {
        let (mut same, mut worse) = (0.0, 0.0);
        for seed in 0..40 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut draw = |shift: f32| rng.random_range(0.0..1.0_f32).powi(3) - shift;
            let mut reference = Reference::new(Version(1));
            for _ in 0..Reference::SIZE {
                assert_eq!(reference.quantile(draw(0.0)), None);
            }
            let mut mean =
                |shift: f32| (0..200).filter_map(|_| reference.quantile(draw(shift))).sum::<f64>() / 200.0;
            same += mean(0.0) / 40.0;
            worse += mean(0.3) / 40.0;
            assert_eq!(reference.quantile(f32::NAN), None);
        }
        // One standard error is .004.
        assert!((same - 0.5).abs() < 0.016, "{same}");
        assert!(worse < 0.3, "{worse}");
    }

    #[test]
    fn ties_count_by_half() {
        let mut reference = Reference::new(Version(1));
        for _ in 0..Reference::SIZE {
            reference.quantile(2.0);
        }
        assert_eq!(reference.quantile(2.0), Some(0.5));
        assert!(reference.quantile(3.0) > Some(0.99) && reference.quantile(1.0) < Some(0.01));
    }
}
