//! Answers of the policy in training, with all that PPO, RLOO and GRPO need to know of them before the first step.

use std::{fmt, sync::Arc};

use candle_core::Tensor;
use rand::{RngExt, rngs::StdRng};

use crate::completion::{FinishReason, Prompt};
use crate::policy::{Adapter, Decoder, Engine, Event, GenerateRequest, Model, Sampling, Served};

use super::{
    Error, Sequence, Watch,
    policy_pass::logprobs,
    ppo::Config,
    sequence::{MicroBatch, encode_prompt},
};

/// What answers are rewarded by: a number for each, higher is better.
pub type Reward<'a> = dyn Fn(&[Sequence], &Watch<'_>) -> Result<Vec<f32>, Error> + 'a;

/// Where the policy practises.
#[derive(Clone, Copy)]
pub struct Practice<'a> {
    pub engine: &'a Engine,
    pub reward: &'a Reward<'a>,
    pub config: &'a Config,
}

impl fmt::Debug for Practice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Practice").field("config", self.config).finish_non_exhaustive()
    }
}

/// One answer of the policy in training.
#[derive(Debug, Clone)]
pub(crate) struct Episode {
    pub(crate) sequence: Sequence,
    /// It ended its turn by itself.
    pub(crate) ended: bool,
    /// The place of its prompt among those that were asked.
    pub(crate) place: usize,
}

/// The answers of an iteration. Lists of lists have one a sequence, with a number a token.
pub(crate) struct Rollouts {
    pub(crate) episodes: Vec<Episode>,
    pub(crate) micro: Vec<MicroBatch>,
    /// Input of layer `first_layer`, the policy's first, one a micro-batch.
    pub(crate) trunks: Vec<Tensor>,
    pub(crate) first_layer: usize,
    pub(crate) scores: Vec<f32>,
    pub(crate) logprobs: Vec<Vec<f32>>,
    pub(crate) reference: Vec<Vec<f32>>,
    /// Sum over all tokens, in nats.
    pub(crate) entropy: f64,
}

impl Rollouts {
    pub(crate) fn count(&self) -> f64 {
        self.episodes.len() as f64
    }

    pub(crate) fn tokens(&self) -> f64 {
        self.logprobs.iter().map(Vec::len).sum::<usize>() as f64
    }

    pub(crate) fn ended(&self) -> usize {
        self.episodes.iter().filter(|episode| episode.ended).count()
    }

    /// `Σ log π − log π_ref` of each answer.
    pub(crate) fn kl(&self) -> Vec<f64> {
        let sum = |(policy, reference): (&Vec<f32>, &Vec<f32>)| {
            policy.iter().zip(reference).map(|(policy, base)| f64::from(policy - base)).sum::<f64>()
        };
        self.logprobs.iter().zip(&self.reference).map(sum).collect()
    }

    /// Input of layer `layer` for `micro`, which is micro-batch `at` or a part of it, by the base alone.
    pub(crate) fn trunk(
        &self,
        decoder: &Decoder,
        (at, micro): (usize, &MicroBatch),
        layer: usize,
    ) -> Result<Tensor, Error> {
        let batch = micro.batch(None);
        Ok(if self.first_layer <= layer {
            decoder.trunk_from(&micro.own_rows(&self.trunks[at])?, &batch, self.first_layer..layer)?
        } else {
            decoder.trunk(&batch, layer)?
        })
    }
}

impl Practice<'_> {
    pub(super) fn model(&self) -> &Model {
        self.engine.model()
    }

    /// Answers to the prompts, their scores, and their log-probabilities under policy and reference.
    pub(crate) fn play(
        &self,
        policy: &Arc<Adapter>,
        prompts: &[&Prompt],
        rng: &mut StdRng,
        watch: &Watch<'_>,
    ) -> Result<Rollouts, Error> {
        let episodes = self.answer(policy, prompts, rng, watch)?;
        let decoder = &self.model().decoder;
        let sequences: Vec<Sequence> = episodes.iter().map(|episode| episode.sequence.clone()).collect();
        let mut out = Rollouts {
            scores: self.scores(&episodes, watch)?,
            micro: MicroBatch::pack(&sequences, watch.micro_tokens.get()),
            trunks: Vec::new(),
            first_layer: policy.first_layer,
            logprobs: Vec::new(),
            reference: Vec::new(),
            entropy: 0.0,
            episodes,
        };
        for micro in &out.micro {
            let mut trunks = Vec::new();
            let parts = watch.in_memory(micro, &mut (), |micro, ()| {
                let trunk = decoder.trunk(&micro.batch(None), policy.first_layer)?;
                let at = (&trunk, policy.first_layer);
                let of_policy = logprobs(decoder, micro, at, Some(policy), self.config.temperature)?;
                let of_base = logprobs(decoder, micro, at, None, self.config.temperature)?;
                let entropy = of_policy.entropies.iter().map(|entropy| f64::from(*entropy)).sum::<f64>();
                let lists = (micro.by_sequence(&of_policy.logprobs), micro.by_sequence(&of_base.logprobs));
                Ok((trunk, entropy, lists))
            })?;
            for (trunk, entropy, (of_policy, of_base)) in parts {
                out.entropy += entropy;
                out.logprobs.extend(of_policy);
                out.reference.extend(of_base);
                trunks.push(trunk);
            }
            out.trunks.push(Tensor::cat(&trunks, 0)?);
        }
        Ok(out)
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
            let mut tokens = start.clone();
            tokens.extend(&generated.tokens);
            tokens.extend(self.model().end_of_turn().filter(|_| ended));
            if tokens.len() > start.len() {
                episodes.push(Episode { sequence: Sequence { tokens, prompt: start.len() }, ended, place });
            }
        }
        if episodes.is_empty() {
            return Err(Error::Rollout("every answer was empty".to_owned()));
        }
        Ok(episodes)
    }

    /// The rewards. The text is judged as if it had ended; that it did not costs the penalty.
    fn scores(&self, episodes: &[Episode], watch: &Watch<'_>) -> Result<Vec<f32>, Error> {
        let end = self.model().end_of_turn();
        let ended = |episode: &Episode| {
            let mut sequence = episode.sequence.clone();
            sequence.tokens.extend(end.filter(|_| !episode.ended));
            sequence
        };
        let scores = (self.reward)(&episodes.iter().map(ended).collect::<Vec<_>>(), watch)?;
        if scores.iter().any(|score| !score.is_finite()) {
            return Err(Error::NotFinite { what: "a reward" });
        }
        let penalty = self.config.missing_eos_penalty as f32;
        let penalised = scores.iter().zip(episodes);
        Ok(penalised.map(|(score, episode)| if episode.ended { *score } else { score - penalty }).collect())
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
