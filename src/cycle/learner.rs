//! One update, on a thread of its own: data set, reward model, policy, scores. It only ever reads what is served.

mod held_back;
mod judgements;

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use tracing::error;

use crate::completion::{Outcome, Prompt, Timestamp, Update, UpdateState, Version};
use crate::learn::{
    self, Dataset, Measures, Method, MicroTokens, Online, Practice, Reward, RewardModel, Scores, Sequence,
    Watch,
    dataset::Split,
    ppo,
    preference::{self, Judged, PairLoss},
    reward::{Agreement, Example},
};
use crate::policy::{Adapter, Engine};
use crate::registry::Origin;

use super::{Error, Parts, handle::Shared, scoring};

/// A thread that learns.
#[derive(Debug)]
pub(super) struct Learner {
    thread: thread::JoinHandle<(Update, Result<Learned, Stopped>)>,
    update: Update,
    cancelled: Arc<AtomicBool>,
}

/// Why there is no candidate.
#[derive(Debug)]
pub(super) enum Stopped {
    TooFew { usable: usize, needed: usize },
    TooFewRaters { raters: usize, needed: usize },
    Cancelled,
    Failed(String),
}

impl From<Stopped> for Outcome {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::TooFew { usable, needed } => Self::TooFew { usable, needed },
            Stopped::TooFewRaters { raters, needed } => Self::TooFewRaters { raters, needed },
            Stopped::Cancelled => Self::Cancelled,
            Stopped::Failed(error) => Self::Failed { error },
        }
    }
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        match error {
            Error::Learn(learn::Error::Cancelled) => Self::Cancelled,
            error => Self::Failed(error.to_string()),
        }
    }
}

impl From<learn::Error> for Stopped {
    fn from(error: learn::Error) -> Self {
        Self::from(Error::from(error))
    }
}

/// A candidate with its proof.
#[derive(Debug)]
pub(super) struct Learned {
    /// The weights that the candidate adapts.
    pub(super) base: PathBuf,
    pub(super) policy: Arc<Adapter>,
    pub(super) reward: RewardModel,
    pub(super) incumbent: Scores,
    pub(super) candidate: Scores,
}

impl Learned {
    /// Puts the candidate on disk, where it waits for its promotion.
    pub(super) fn stage(
        &self,
        parts: &Parts,
        update: &Update,
        note: &str,
        now: Timestamp,
    ) -> Result<Version, Error> {
        let base = self.base.display().to_string();
        let report = serde_json::json!({ "incumbent": self.incumbent, "candidate": self.candidate });
        let write = |dir: &std::path::Path| {
            self.policy.save(dir, &base)?;
            fs::create_dir_all(dir.join(REWARD))?;
            self.reward.save(&dir.join(REWARD), &base)
        };
        let origin = Origin {
            parent: update.base,
            update: Some(update.id),
            note: note.to_owned(),
            gate: Some(report),
        };
        let record = parts.registry.stage(write, origin, now)?;
        Ok(record.version)
    }
}

/// Where a version keeps the reward model that judged it.
const REWARD: &str = "reward";

impl Learner {
    pub(super) fn start(parts: Parts, engine: Engine, shared: Arc<Shared>, update: Update) -> Self {
        let cancelled = Arc::new(AtomicBool::new(false));
        let (of_thread, started) = (Arc::clone(&cancelled), update.clone());
        let thread = thread::spawn(move || {
            let mut run = Run { parts, engine, shared, cancelled: of_thread, update: started };
            let learned = learn::Pace::threads()
                .map_err(Stopped::from)
                .and_then(|threads| run.engine.clone().beside(|| threads.install(|| run.learn())));
            if let Err(Stopped::Failed(fault)) = &learned {
                error!(update = %run.update.id, fault, "the update failed");
            }
            let shown = run.shared.revise(|_| {}).unwrap_or(run.update.clone());
            (Update { feedback: run.update.feedback, ..shown }, learned)
        });
        Self { thread, update, cancelled }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// The result; a thread that panicked is a failed update.
    pub(super) fn join(self) -> (Update, Result<Learned, Stopped>) {
        let panicked = |_| (self.update, Err(Stopped::Failed("the learner panicked".to_owned())));
        self.thread.join().unwrap_or_else(panicked)
    }

    /// Stops at the next micro-batch and waits for it.
    pub(super) fn cancel(self) {
        self.cancelled.store(true, Ordering::Relaxed);
        let _abandoned = self.thread.join();
    }
}

/// One run of the learner.
struct Run {
    parts: Parts,
    engine: Engine,
    shared: Arc<Shared>,
    cancelled: Arc<AtomicBool>,
    update: Update,
}

impl Run {
    fn learn(&mut self) -> Result<Learned, Stopped> {
        let parts = self.parts.clone();
        let dataset = self.dataset()?;
        let (shared, cancelled) = (Arc::clone(&self.shared), Arc::clone(&self.cancelled));
        let (engine, pace) = (self.engine.clone(), parts.learn.pace.clone());
        let between = move || {
            engine.give_way(pace.give_way());
            !cancelled.load(Ordering::Relaxed) && !shared.is_cancelled()
        };
        let report = |stage: &str, done: f64, measures: Measures<'_>| self.show(stage, done, measures);
        let watch = Watch {
            micro_tokens: MicroTokens::new(parts.learn.pace.micro_tokens),
            sequence_tokens: parts.learn.pace.sequence_tokens,
            between: &between,
            report: &report,
            checkpoints: None,
        };
        let reward = self.reward(&dataset, &watch)?;
        let policy = self.policy(&dataset, &reward, &watch)?;
        let prompts = gate_prompts(&dataset, &self.update, parts.config.gate_prompts);
        let compared = scoring::Compared {
            incumbent: self.base_adapter()?,
            candidate: Arc::clone(&policy),
            reward: &reward,
            classifier: &parts.classifier,
        };
        let (mut incumbent, mut candidate) = scoring::side_by_side(
            (&self.engine, parts.learn.ppo.response_length),
            &compared,
            &prompts,
            &watch,
        )?;
        self.hold_back(&reward, (&mut incumbent, &mut candidate), &watch)?;
        for scores in [&mut incumbent, &mut candidate] {
            scores.wanted.clone_from(&self.update.interactions);
        }
        let base = self.engine.model().path.clone();
        Ok(Learned { base, policy, reward, incumbent, candidate })
    }

    /// The reward model of the served version, taught what is new; kept as it was if that made it worse.
    fn reward(&self, dataset: &Dataset, watch: &Watch<'_>) -> Result<RewardModel, Stopped> {
        let model = self.engine.model();
        let config = &self.parts.learn.reward;
        let train = examples(model, dataset, Split::Train, config.examples, watch)?;
        let held_back = examples(model, dataset, Split::Validation, config.examples, watch)?;
        let before = match self.version_dir() {
            Some(dir) if dir.join(REWARD).exists() => Some(
                RewardModel::load(&dir.join(REWARD), &model.decoder.architecture)
                    .map_err(learn::Error::from)?,
            ),
            _ => None,
        };
        let mut reward = match &before {
            Some(before) => before.clone(),
            None => RewardModel::new(model, config, self.parts.config.seed)?,
        };
        if !train.is_empty() {
            reward.train(model, &train, (config, self.seed()), watch)?;
        }
        let after = reward.evaluate(model, &held_back, config, watch)?;
        let old =
            before.as_ref().map(|before| before.evaluate(model, &held_back, config, watch)).transpose()?;
        self.show(
            "reward",
            1.0,
            &[
                ("reward/accuracy", after.accuracy),
                ("reward/calibration_error", after.calibration_error),
                ("reward/longer_wins", after.longer_wins),
                ("reward/examples", train.len() as f64),
            ],
        );
        let worse = |old: Agreement| held_back.len() >= 20 && old.accuracy > after.accuracy;
        Ok(match (before, old) {
            (Some(before), Some(old)) if worse(old) => before,
            _ => reward,
        })
    }

    /// Of everything that this update draws.
    fn seed(&self) -> u64 {
        self.parts.config.seed ^ u64::from(self.update.base.0)
    }

    /// The candidate policy, by the update's recipe.
    fn policy(
        &self,
        dataset: &Dataset,
        reward: &RewardModel,
        watch: &Watch<'_>,
    ) -> Result<Arc<Adapter>, Stopped> {
        let (model, learn, seed) = (self.engine.model(), &self.parts.learn, self.seed());
        let start = match self.base_adapter()? {
            Some(adapter) => adapter,
            None => {
                let first = self.parts.config.seed;
                ppo::new_policy(model, learn.ppo.rank, learn.ppo.alpha, learn.ppo.depth, first)?
            }
        };
        let method = match self.update.recipe.as_str() {
            "ppo" => Method::Ppo { value: reward.value()? },
            "rloo" => Method::Rloo(&learn.groups),
            "grpo" => Method::Grpo(&learn.groups),
            recipe => return Ok(self.on_judgements(recipe, dataset, start, watch)?),
        };
        let (wanted, others) = training_prompts(dataset, &self.update);
        let reward = Reward::Model { model: reward, pessimism: learn.reward.pessimism };
        let practice = Practice { engine: &self.engine, reward, config: &learn.ppo };
        let mut online = Online::new(practice, method, start, seed);
        online.train(&wanted, &others, watch)?;
        Ok(online.policy)
    }

    /// The recipes that need no rollouts: demonstrations, comparisons, or single judgements.
    fn on_judgements(
        &self,
        recipe: &str,
        dataset: &Dataset,
        start: Arc<Adapter>,
        watch: &Watch<'_>,
    ) -> Result<Arc<Adapter>, learn::Error> {
        let (model, seed) = (self.engine.model(), self.seed());
        let encode =
            |prompt: &Prompt, answer: &str| Sequence::encode(model, prompt, answer, watch.sequence_tokens);
        let mut config = self.parts.learn.preference.clone();
        match recipe {
            "sft" => {
                let shown = dataset.demonstrations.iter().filter(|shown| shown.split == Split::Train);
                let sequences: Vec<Sequence> =
                    shown.map(|shown| encode(&shown.prompt, &shown.answer)).collect::<Result<_, _>>()?;
                preference::sft(model, start, &sequences, (&config, seed), watch)
            }
            "kto" => {
                let told = dataset.labelled.iter().filter(|labelled| labelled.split == Split::Train);
                let mut judged = Vec::new();
                for labelled in told.filter(|labelled| labelled.label != 0.5) {
                    judged.push(Judged {
                        answer: encode(&labelled.prompt, &labelled.answer)?,
                        desirable: labelled.label > 0.5,
                        weight: labelled.weight * (2.0 * labelled.label - 1.0).abs(),
                    });
                }
                preference::kto(model, start, &judged, (&config, seed), watch)
            }
            _ => {
                if recipe == "ipo" {
                    config.loss = PairLoss::Ipo;
                }
                let comparisons = dataset.comparisons.iter().filter(|pair| pair.split == Split::Train);
                let mut pairs = Vec::new();
                for pair in comparisons {
                    pairs.push(preference::Pair {
                        chosen: encode(&pair.prompt, &pair.chosen)?,
                        rejected: encode(&pair.prompt, &pair.rejected)?,
                        weight: pair.weight,
                    });
                }
                preference::dpo(model, start, &pairs, (&config, seed), watch)
            }
        }
    }

    fn version_dir(&self) -> Option<PathBuf> {
        self.parts.registry.path(self.update.base)
    }

    /// The adapter of the version that the update starts from; `None` is the base model.
    fn base_adapter(&self) -> Result<Option<Arc<Adapter>>, Stopped> {
        let Some(dir) = self.version_dir() else { return Ok(None) };
        let architecture = &self.engine.model().decoder.architecture;
        Ok(Some(Adapter::load(&dir, architecture).map_err(learn::Error::from)?))
    }

    /// Shows how far the update is. The stages' shares of the whole are rough: PPO takes most of the time.
    fn show(&self, stage: &str, done: f64, measures: Measures<'_>) {
        let (from, share) = match stage {
            "reward" => (0.0, 0.25),
            "gate" => (0.9, 0.1),
            _ => (0.25, 0.65),
        };
        let progress = from + share * done;
        self.parts.metrics.progress(progress, measures);
        self.shared.revise(|update| {
            update.state = UpdateState::Running { stage: stage.to_owned(), progress };
            update.measures.extend(measures.iter().map(|(name, value)| ((*name).to_owned(), *value)));
        });
    }
}

/// The reward model's examples of one split.
fn examples(
    model: &crate::policy::Model,
    dataset: &Dataset,
    split: Split,
    most: usize,
    watch: &Watch<'_>,
) -> Result<Vec<Example>, learn::Error> {
    let encode =
        |prompt: &Prompt, answer: &str| Sequence::encode(model, prompt, answer, watch.sequence_tokens);
    let mut examples = Vec::new();
    // The data set is in the order of time, so that the newest are its end.
    for pair in dataset.comparisons.iter().rev().filter(|pair| pair.split == split).take(most) {
        examples.push(Example::Comparison {
            chosen: encode(&pair.prompt, &pair.chosen)?,
            rejected: encode(&pair.prompt, &pair.rejected)?,
            margin: 0.0,
            weight: pair.weight,
        });
    }
    for labelled in dataset.labelled.iter().rev().filter(|labelled| labelled.split == split).take(most) {
        examples.push(Example::Label {
            answer: encode(&labelled.prompt, &labelled.answer)?,
            label: labelled.label,
            margin: 0.0,
            weight: labelled.weight,
        });
    }
    Ok(examples)
}

/// Prompts to practise on: of the alarming types, and the rest.
fn training_prompts(dataset: &Dataset, update: &Update) -> (Vec<Prompt>, Vec<Prompt>) {
    let train = dataset.prompts.iter().filter(|asked| asked.split == Split::Train);
    let (wanted, others): (Vec<_>, Vec<_>) =
        train.partition(|asked| update.interactions.contains(&asked.interaction));
    let prompts =
        |asked: Vec<&learn::dataset::Asked>| asked.into_iter().map(|asked| asked.prompt.clone()).collect();
    (prompts(wanted), prompts(others))
}

/// Prompts to be judged on, which nothing was learned from: two thirds of the types to be mended. Where few prompts
/// were held back they are asked again, with other seeds.
fn gate_prompts(dataset: &Dataset, update: &Update, most: usize) -> Vec<learn::dataset::Asked> {
    let held: Vec<_> = dataset.prompts.iter().filter(|asked| asked.split == Split::Gate).collect();
    let (wanted, others): (Vec<_>, Vec<_>) = held.into_iter().partition(|asked| {
        update.interactions.is_empty() || update.interactions.contains(&asked.interaction)
    });
    let for_others = if others.is_empty() || wanted.is_empty() { most } else { most / 3 };
    let for_wanted = if others.is_empty() { most } else { most - most / 3 };
    let repeated = |list: Vec<&learn::dataset::Asked>, count: usize| {
        list.into_iter().cycle().take(count).cloned().collect::<Vec<_>>()
    };
    let mut prompts = repeated(wanted, for_wanted);
    prompts.extend(repeated(others, for_others));
    prompts
}
