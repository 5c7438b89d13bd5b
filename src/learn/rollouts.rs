//! Answers of the policy in training, with all that PPO, RLOO and GRPO need to know of them before the first step.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use candle_core::Tensor;
use rand::{RngExt, rngs::StdRng};

use crate::completion::{FinishReason, Prompt};
use crate::policy::{Adapter, Drawn, Engine, Event, GenerateRequest, Model, Sampling, Served};

use super::{
    Error, RewardModel, Sequence, Watch,
    advantages::mean_and_deviation,
    policy_pass::logprobs,
    ppo::Config,
    sequence::{MicroBatch, encode_prompt},
};

/// What answers are rewarded by.
#[derive(Clone, Copy)]
pub enum Reward<'a> {
    /// The mean of its heads less so many of their standard deviations.
    Model { model: &'a RewardModel, pessimism: f64 },
    /// A number for each answer, higher is better.
    Rule(&'a dyn Fn(&[Sequence]) -> Vec<f32>),
}

impl fmt::Debug for Reward<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model { model, pessimism } => {
                f.debug_struct("Model").field("model", model).field("pessimism", pessimism).finish()
            }
            Self::Rule(_) => f.debug_struct("Rule").finish_non_exhaustive(),
        }
    }
}

impl Reward<'_> {
    /// The layer up to which the base alone computes it.
    fn first_layer(&self) -> Option<usize> {
        match self {
            Self::Model { model, .. } => Some(model.adapter.first_layer),
            Self::Rule(_) => None,
        }
    }
}

/// Where the policy practises.
#[derive(Clone, Copy)]
pub struct Practice<'a> {
    pub engine: &'a Engine,
    pub reward: Reward<'a>,
    pub config: &'a Config,
}

impl fmt::Debug for Practice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { engine: _, reward, config } = self;
        f.debug_struct("Practice").field("reward", reward).field("config", config).finish_non_exhaustive()
    }
}

/// One answer of the policy in training.
#[derive(Debug, Clone)]
pub(crate) struct Episode {
    pub(crate) sequence: Sequence,
    /// The place of its prompt among those that were asked.
    pub(crate) place: usize,
    /// Of each token of the answer.
    pub(crate) drawn: Vec<Drawn>,
}

impl Episode {
    fn logprobs(&self) -> Vec<f32> {
        self.drawn.iter().map(|drawn| drawn.logprob).collect()
    }

    /// Whether it ended its turn by itself.
    fn ended(&self) -> bool {
        self.sequence.said == self.sequence.tokens.len()
    }
}

/// Inputs of layers, `[rows, hidden]`, as the base alone computes them.
pub(crate) type Trunks = BTreeMap<usize, Tensor>;

/// The answers of an iteration. Lists of lists have one a sequence, with a number a token.
pub(crate) struct Rollouts {
    pub(crate) episodes: Vec<Episode>,
    pub(crate) micro: Vec<MicroBatch>,
    /// Of the layers at which an adapter begins, one a micro-batch.
    pub(crate) trunks: Vec<Trunks>,
    pub(crate) scores: Vec<f32>,
    pub(crate) logprobs: Vec<Vec<f32>>,
    pub(crate) reference: Vec<Vec<f32>>,
    /// By how many nats each token surprised the reference more than one of its own would: `−log π_ref` above its entropy.
    pub(crate) surprise: Vec<Vec<f32>>,
    /// Sum over all tokens, in nats.
    pub(crate) entropy: f64,
}

/// Of a micro-batch or a part of it, as in [`Rollouts`].
struct Part {
    reference: Vec<Vec<f32>>,
    surprise: Vec<Vec<f32>>,
    scores: Vec<f32>,
    trunks: Trunks,
}

impl Rollouts {
    pub(crate) fn count(&self) -> f64 {
        self.episodes.len() as f64
    }

    pub(crate) fn tokens(&self) -> f64 {
        self.logprobs.iter().map(Vec::len).sum::<usize>() as f64
    }

    pub(crate) fn ended(&self) -> usize {
        self.episodes.iter().filter(|episode| episode.ended()).count()
    }

    /// `Σ log π − log π_ref` of each answer.
    pub(crate) fn kl(&self) -> Vec<f64> {
        let sum = |(policy, reference): (&Vec<f32>, &Vec<f32>)| {
            policy.iter().zip(reference).map(|(policy, base)| f64::from(policy - base)).sum::<f64>()
        };
        self.logprobs.iter().zip(&self.reference).map(sum).collect()
    }

    /// Nats an answer.
    pub(crate) fn mean_surprise(&self) -> f64 {
        self.surprise.iter().flatten().map(|nats| f64::from(*nats)).sum::<f64>() / self.count()
    }

    /// The standard deviation of the scores.
    pub(crate) fn spread(&self) -> f64 {
        let scores: Vec<f64> = self.scores.iter().map(|score| f64::from(*score)).collect();
        mean_and_deviation(&scores).1
    }

    /// Input of an adapter's first layer for `micro`, which is micro-batch `at` or a part of it.
    pub(crate) fn trunk(
        &self,
        (at, micro): (usize, &MicroBatch),
        adapter: &Adapter,
    ) -> Result<Tensor, Error> {
        Ok(micro.own_rows(&self.trunks[at][&adapter.first_layer])?)
    }
}

impl Practice<'_> {
    pub(super) fn model(&self) -> &Model {
        self.engine.model()
    }

    /// Answers to the prompts, their scores, and their log-probabilities under policy and reference. The policy's are those
    /// that the answers were drawn by, so that it passes them no second time. The base passes each answer once, for the
    /// reference as for all that is computed on top of it, the value model `value` included.
    pub(crate) fn play(
        &self,
        (policy, value): (&Arc<Adapter>, Option<&Adapter>),
        prompts: &[&Prompt],
        rng: &mut StdRng,
        watch: &Watch<'_>,
    ) -> Result<Rollouts, Error> {
        let episodes = self.answer(policy, prompts, rng, watch)?;
        let sequences: Vec<Sequence> = episodes.iter().map(|episode| episode.sequence.clone()).collect();
        let layers =
            [Some(policy.first_layer), value.map(|value| value.first_layer), self.reward.first_layer()];
        let layers: BTreeSet<usize> = layers.into_iter().flatten().collect();
        let mut out = Rollouts {
            micro: MicroBatch::pack(&sequences, watch.micro_tokens.get()),
            trunks: Vec::new(),
            scores: Vec::new(),
            logprobs: episodes.iter().map(Episode::logprobs).collect(),
            reference: Vec::new(),
            surprise: Vec::new(),
            entropy: episodes
                .iter()
                .flat_map(|episode| &episode.drawn)
                .map(|drawn| f64::from(drawn.entropy))
                .sum(),
            episodes,
        };
        for micro in &out.micro {
            let mut trunks: BTreeMap<usize, Vec<Tensor>> = BTreeMap::new();
            for part in watch.in_memory(micro, &mut (), |micro, ()| self.part(micro, &layers))? {
                out.reference.extend(part.reference);
                out.surprise.extend(part.surprise);
                out.scores.extend(part.scores);
                part.trunks
                    .into_iter()
                    .for_each(|(layer, trunk)| trunks.entry(layer).or_default().push(trunk));
            }
            let whole = trunks.into_iter().map(|(layer, parts)| Ok((layer, Tensor::cat(&parts, 0)?)));
            out.trunks.push(whole.collect::<Result<_, Error>>()?);
        }
        if let Reward::Rule(rule) = self.reward {
            out.scores = rule(&sequences);
        }
        if out.scores.iter().any(|score| !score.is_finite()) {
            return Err(Error::NotFinite { what: "a reward" });
        }
        // The text is judged as if it had ended; that it did not costs the penalty.
        for (score, episode) in out.scores.iter_mut().zip(&out.episodes) {
            *score -= if episode.ended() { 0.0 } else { self.config.missing_eos_penalty as f32 };
        }
        Ok(out)
    }

    /// What is to be known of a micro-batch or a part of it.
    fn part(&self, micro: &MicroBatch, layers: &BTreeSet<usize>) -> Result<Part, Error> {
        let (decoder, temperature) = (&self.model().decoder, self.config.temperature);
        let batch = micro.batch();
        let mut trunks = Trunks::new();
        let mut last = (decoder.trunk(&batch, 0)?, 0);
        for layer in layers {
            last = (decoder.trunk_from(&last.0, &batch, last.1..*layer)?, *layer);
            trunks.insert(*layer, last.0.clone());
        }
        let of_base = logprobs(decoder, micro, (&last.0, last.1), None, temperature)?;
        let scores = match self.reward {
            Reward::Model { model, pessimism } => {
                model.cautious_from(self.model(), micro, &trunks[&model.adapter.first_layer], pessimism)?
            }
            Reward::Rule(_) => Vec::new(),
        };
        Ok(Part {
            reference: micro.by_sequence(&of_base.logprobs),
            surprise: micro.by_sequence(&of_base.surprise()),
            scores,
            trunks,
        })
    }

    /// Answers of the policy as it is now, through the engine, beside whatever it serves.
    pub(crate) fn answer(
        &self,
        policy: &Arc<Adapter>,
        prompts: &[&Prompt],
        rng: &mut StdRng,
        watch: &Watch<'_>,
    ) -> Result<Vec<Episode>, Error> {
        let length = self.config.response_length;
        let room = watch.sequence_tokens.saturating_sub(length + 1).max(1);
        let mut requests = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let mut tokens = encode_prompt(self.model(), prompt)?;
            tokens.drain(..tokens.len().saturating_sub(room));
            requests.push(GenerateRequest {
                prompt: tokens,
                sampling: Sampling {
                    temperature: self.config.temperature,
                    seed: rng.random(),
                    ..Sampling::default()
                },
                max_tokens: length,
                stop: Vec::new(),
                top_logprobs: None,
                pinned: Some(Served { version: self.engine.served(), adapter: Some(Arc::clone(policy)) }),
            });
        }
        let starts: Vec<Vec<u32>> = requests.iter().map(|request| request.prompt.clone()).collect();
        let failed = |error| Error::Rollout(format!("{error}"));
        let pending = self.engine.submit_all(requests).map_err(failed)?;
        let mut episodes = Vec::with_capacity(prompts.len());
        for (place, (start, mut events)) in starts.into_iter().zip(pending).enumerate() {
            watch.between()?;
            let generated = loop {
                match events.blocking_recv() {
                    Some(Event::Done(generated)) => break generated,
                    Some(Event::Failed(why)) => return Err(Error::Rollout(why)),
                    Some(Event::Started { .. } | Event::Text { .. }) => {}
                    None => return Err(Error::Rollout("the engine has stopped".to_owned())),
                }
            };
            let ended = generated.finish_reason == FinishReason::Stop;
            let sequence = Sequence::sampled(self.model(), &start, &generated.tokens, ended);
            if !sequence.answer().is_empty() {
                episodes.push(Episode { sequence, place, drawn: generated.drawn });
            }
        }
        if episodes.is_empty() {
            return Err(Error::Rollout("every answer was empty".to_owned()));
        }
        Ok(episodes)
    }
}

/// `count` prompts, half of them from `wanted` as far as both lists hold any.
pub(super) fn draw_prompts<'p>(
    wanted: &'p [Prompt],
    others: &'p [Prompt],
    count: usize,
    rng: &mut StdRng,
) -> Result<Vec<&'p Prompt>, Error> {
    let (first, second) = match (wanted.is_empty(), others.is_empty()) {
        (true, true) => return Err(Error::NoData("there are no prompts".to_owned())),
        (false, true) => (wanted, wanted),
        (true, false) => (others, others),
        (false, false) => (wanted, others),
    };
    Ok((0..count)
        .map(|nth| {
            let list = if nth % 2 == 0 { first } else { second };
            &list[rng.random_range(0..list.len())]
        })
        .collect())
}
