//! PPO under a KL penalty, in the order of TRL and of *The N+ Implementation Details of RLHF with PPO* (Huang et al., 2024).
//!
//! 1 rollouts · 2 log-probabilities of policy and reference, scores, values · 3 rewards · 4 advantages and returns ·
//! 5 epochs over micro-batches: clipped policy and value losses · 6 adaptive KL coefficient.
//! One frozen base serves all four models: the policy's and the value model's adapters differ, the reference is the base
//! with the adapter off, and what lies below the adapters (the trunk) is computed once an iteration.

use std::sync::Arc;

use candle_core::Tensor;
use rand::{RngExt, rngs::StdRng, seq::SliceRandom};
use serde::{Deserialize, Serialize};

use crate::completion::Prompt;
use crate::policy::{
    Adapter, AdapterGradient, Engine, Event, GenerateRequest, Model, Sampling, Served, Shape,
};

use super::{
    Error, RewardModel, Sequence, Watch,
    adamw::{self, AdamW},
    advantages::{AdaptiveKl, gae, rewards, whiten},
    losses,
    policy_pass::{PolicyPass, logprobs},
    reward::first_layer,
    sequence::{MicroBatch, encode_prompt},
};

/// How the policy is trained; names as in TRL's `PPOConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// LoRA rank of a first version; later versions keep theirs.
    pub rank: usize,
    pub alpha: f64,
    /// The share of the layers, from the top, that a first version's adapter reaches.
    pub depth: f64,
    pub iterations: usize,
    /// Episodes an iteration.
    pub episodes: usize,
    pub num_ppo_epochs: usize,
    /// Optimiser steps an epoch.
    pub num_mini_batches: usize,
    pub learning_rate: f64,
    pub value_learning_rate: f64,
    pub temperature: f64,
    pub response_length: usize,
    pub gamma: f64,
    pub lam: f64,
    pub cliprange: f64,
    pub cliprange_value: f64,
    pub vf_coef: f64,
    /// What an answer that does not end by itself loses.
    pub missing_eos_penalty: f64,
    pub whiten_rewards: bool,
    pub kl_coef: f64,
    /// Nats an answer towards which the coefficient is adapted.
    pub target_kl: f64,
    /// Nats an answer at which training stops.
    pub kl_budget: f64,
    pub max_grad_norm: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            depth: 1.0,
            iterations: 12,
            episodes: 32,
            num_ppo_epochs: 4,
            num_mini_batches: 1,
            learning_rate: 3e-4,
            value_learning_rate: 3e-4,
            temperature: 1.0,
            response_length: 64,
            gamma: 1.0,
            lam: 0.95,
            cliprange: 0.2,
            cliprange_value: 0.2,
            vf_coef: 0.1,
            missing_eos_penalty: 0.0,
            whiten_rewards: false,
            kl_coef: 0.05,
            target_kl: 6.0,
            kl_budget: 40.0,
            max_grad_norm: 1.0,
        }
    }
}

/// One answer of the policy in training.
#[derive(Debug, Clone)]
struct Episode {
    sequence: Sequence,
    /// It ended its turn by itself.
    ended: bool,
}

/// What is known of the episodes before the first optimiser step, a list a micro-batch.
struct Experience {
    micro: Vec<MicroBatch>,
    /// Input of the policy's and of the value model's first layer.
    trunks: Vec<(Tensor, Tensor)>,
    logprobs: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    advantages: Vec<Vec<f32>>,
    returns: Vec<Vec<f32>>,
    /// `objective/…` by name.
    objective: Vec<(&'static str, f64)>,
    /// Mean over the episodes of `Σ logp − ref_logp`.
    kl: f64,
}

/// A policy in training.
#[derive(Debug)]
pub struct Ppo<'a> {
    engine: &'a Engine,
    model: &'a Model,
    reward: &'a RewardModel,
    config: &'a Config,
    pub policy: Arc<Adapter>,
    value: Arc<Adapter>,
    policy_optimiser: AdamW,
    value_optimiser: AdamW,
    kl_coefficient: AdaptiveKl,
}

impl<'a> Ppo<'a> {
    /// Starts from `incumbent`, or from an adapter that changes nothing; the value model starts as the reward model.
    ///
    /// # Errors
    /// The device fails.
    pub fn new(
        engine: &'a Engine,
        reward: &'a RewardModel,
        incumbent: Option<Arc<Adapter>>,
        config: &'a Config,
        seed: u64,
    ) -> Result<Self, Error> {
        let model = engine.model();
        let policy = match incumbent {
            Some(adapter) => adapter,
            None => new_policy(model, config.rank, config.alpha, config.depth, seed)?,
        };
        let optimiser = |learning_rate| AdamW::new(adamw::Config { learning_rate, ..Default::default() });
        Ok(Self {
            engine,
            model,
            reward,
            config,
            policy,
            value: Arc::clone(&reward.adapter),
            policy_optimiser: optimiser(config.learning_rate),
            value_optimiser: optimiser(config.value_learning_rate),
            kl_coefficient: AdaptiveKl::new(config.kl_coef, config.target_kl),
        })
    }

    /// Runs all iterations. Each draws half of its prompts from `wanted` and half from `others`.
    ///
    /// # Errors
    /// There are no prompts, the device fails, a number is not finite, or the update is cancelled.
    pub fn train(
        &mut self,
        wanted: &[Prompt],
        others: &[Prompt],
        rng: &mut StdRng,
        watch: &Watch<'_>,
    ) -> Result<Vec<(&'static str, f64)>, Error> {
        let mut measures = Vec::new();
        for iteration in 0..self.config.iterations {
            let prompts = draw_prompts(wanted, others, self.config.episodes, rng)?;
            let episodes = self.rollouts(&prompts, rng, watch)?;
            let experience = self.experience(&episodes, watch)?;
            let kl = experience.kl;
            measures = experience.objective.clone();
            if kl <= self.config.kl_budget {
                measures.extend(self.epochs(&experience, rng, watch)?);
            }
            let done = (iteration + 1) as f64 / self.config.iterations as f64;
            watch.progress("ppo", done, &measures);
            if kl > self.config.kl_budget {
                break;
            }
            self.kl_coefficient.update(kl, self.config.episodes);
        }
        Ok(measures)
    }

    /// Step 1: answers of the policy as it is now, through the engine, beside whatever it serves.
    fn rollouts(
        &self,
        prompts: &[&Prompt],
        rng: &mut StdRng,
        watch: &Watch<'_>,
    ) -> Result<Vec<Episode>, Error> {
        let mut pending = Vec::new();
        let mut episodes = Vec::new();
        let most = watch.sequence_tokens;
        for prompt in prompts {
            let mut tokens = encode_prompt(self.model, prompt)?;
            let room = most.saturating_sub(self.config.response_length + 1).max(1);
            tokens.drain(..tokens.len().saturating_sub(room));
            let request = GenerateRequest {
                prompt: tokens.clone(),
                sampling: Sampling {
                    temperature: self.config.temperature,
                    seed: rng.random(),
                    ..Sampling::default()
                },
                max_tokens: self.config.response_length,
                stop: Vec::new(),
                top_logprobs: None,
                pinned: Some(Served {
                    version: self.engine.served(),
                    adapter: Some(Arc::clone(&self.policy)),
                }),
            };
            let events = self.engine.submit(request).map_err(|error| Error::Rollout(error.to_string()))?;
            pending.push((tokens, events));
        }
        for (prompt, mut events) in pending {
            watch.between()?;
            let generated = loop {
                match events.blocking_recv() {
                    Some(Event::Done(generated)) => break generated,
                    Some(Event::Failed(why)) => return Err(Error::Rollout(why)),
                    Some(Event::Started { .. } | Event::Text { .. }) => {}
                    None => return Err(Error::Rollout("the engine has stopped".to_owned())),
                }
            };
            let ended = generated.finish_reason == crate::completion::FinishReason::Stop;
            let mut tokens = prompt.clone();
            tokens.extend(&generated.tokens);
            tokens.extend(self.model.end_of_turn().filter(|_| ended));
            if tokens.len() > prompt.len() {
                episodes.push(Episode { sequence: Sequence { tokens, prompt: prompt.len() }, ended });
            }
        }
        if episodes.is_empty() {
            return Err(Error::Rollout("every answer was empty".to_owned()));
        }
        Ok(episodes)
    }

    /// Steps 2 to 4: everything that the losses need, under the policy that made the episodes.
    fn experience(&self, episodes: &[Episode], watch: &Watch<'_>) -> Result<Experience, Error> {
        let decoder = &self.model.decoder;
        let sequences: Vec<Sequence> = episodes.iter().map(|episode| episode.sequence.clone()).collect();
        let scores = self.scores(&sequences, episodes, watch)?;
        let mut out = Experience {
            micro: MicroBatch::pack(&sequences, watch.micro_tokens),
            trunks: Vec::new(),
            logprobs: Vec::new(),
            values: Vec::new(),
            advantages: Vec::new(),
            returns: Vec::new(),
            objective: Vec::new(),
            kl: 0.0,
        };
        let (mut all_logprobs, mut all_reference, mut all_values) = (Vec::new(), Vec::new(), Vec::new());
        let mut entropy = 0.0;
        for micro in &out.micro {
            watch.between()?;
            let bare = micro.batch(None);
            let policy_layer = self.policy.first_layer;
            let policy_trunk = decoder.trunk(&bare, policy_layer)?;
            let value_trunk = decoder.trunk(&bare, self.value.first_layer)?;
            let at = (&policy_trunk, policy_layer);
            let policy = logprobs(decoder, micro, at, Some(&self.policy), self.config.temperature)?;
            let reference = logprobs(decoder, micro, at, None, self.config.temperature)?;
            let hidden =
                decoder.hidden_from(&value_trunk, &micro.batch(Some(&self.value)), self.value.first_layer)?;
            let values = self.read_values(&micro.answered(&hidden)?)?;
            entropy += policy.entropies.iter().map(|entropy| f64::from(*entropy)).sum::<f64>();
            all_logprobs.extend(micro.by_sequence(&policy.logprobs));
            all_reference.extend(micro.by_sequence(&reference.logprobs));
            all_values.extend(micro.by_sequence(&values));
            out.logprobs.push(policy.logprobs);
            out.values.push(values);
            out.trunks.push((policy_trunk, value_trunk));
        }

        let coefficient = self.kl_coefficient.value();
        let rewarded = rewards(&scores, &all_logprobs, &all_reference, coefficient);
        let mut all_rewards = rewarded.rewards;
        if self.config.whiten_rewards {
            all_rewards = whiten(&all_rewards, false);
        }
        let (advantages, returns) = gae(&all_rewards, &all_values, self.config.gamma, self.config.lam);
        let advantages = whiten(&advantages, true);
        for micro in &out.micro {
            let of =
                |lists: &[Vec<f32>]| micro.members.iter().flat_map(|member| lists[*member].clone()).collect();
            out.advantages.push(of(&advantages));
            out.returns.push(of(&returns));
        }
        let tokens: usize = all_logprobs.iter().map(Vec::len).sum();
        let score = scores.iter().map(|score| f64::from(*score)).sum::<f64>() / scores.len() as f64;
        let ended = episodes.iter().filter(|episode| episode.ended).count();
        out.kl = rewarded.kl;
        out.objective = vec![
            ("objective/kl", rewarded.kl),
            ("objective/entropy", entropy / episodes.len() as f64),
            ("objective/scores", score),
            ("objective/non_score_reward", -coefficient * rewarded.kl),
            ("objective/rlhf_reward", score - coefficient * rewarded.kl),
            ("objective/kl_coef", coefficient),
            ("objective/response_tokens", tokens as f64 / episodes.len() as f64),
            ("val/num_eos_tokens", ended as f64),
        ];
        Ok(out)
    }

    /// The reward model's scores. It judges the text as if it had ended; that it did not costs the penalty.
    fn scores(
        &self,
        sequences: &[Sequence],
        episodes: &[Episode],
        watch: &Watch<'_>,
    ) -> Result<Vec<f32>, Error> {
        let ended: Vec<Sequence> = sequences
            .iter()
            .zip(episodes)
            .map(|(sequence, episode)| {
                let mut sequence = sequence.clone();
                sequence.tokens.extend(self.model.end_of_turn().filter(|_| !episode.ended));
                sequence
            })
            .collect();
        let scores = self.reward.score(self.model, &ended, watch)?;
        let penalty = self.config.missing_eos_penalty as f32;
        let penalised = scores.iter().zip(episodes);
        Ok(penalised.map(|(score, episode)| if episode.ended { *score } else { score - penalty }).collect())
    }

    /// The value head on hidden states: one value a row.
    fn read_values(&self, hidden: &Tensor) -> Result<Vec<f32>, Error> {
        let head = self.value.score.as_ref().ok_or(Error::NoScoreHead)?;
        Ok(hidden.matmul(&head.t()?)?.squeeze(1)?.to_vec1()?)
    }

    /// Step 5. Returns the means over all micro-batches and epochs.
    fn epochs(
        &mut self,
        experience: &Experience,
        rng: &mut StdRng,
        watch: &Watch<'_>,
    ) -> Result<Vec<(&'static str, f64)>, Error> {
        let mut sums: Vec<(&'static str, f64)> = Vec::new();
        let mut passes = 0;
        for _ in 0..self.config.num_ppo_epochs {
            let mut order: Vec<usize> = (0..experience.micro.len()).collect();
            order.shuffle(rng);
            for mini in order.chunks(order.len().div_ceil(self.config.num_mini_batches.max(1))) {
                let tokens: usize = mini.iter().map(|at| experience.micro[*at].targets.len()).sum();
                let mut gradients = (AdapterGradient::default(), AdapterGradient::default());
                for at in mini {
                    watch.between()?;
                    let share = experience.micro[*at].targets.len() as f64 / tokens as f64;
                    let measures = self.micro_batch(experience, *at, share, &mut gradients)?;
                    passes += 1;
                    if sums.is_empty() {
                        sums = measures;
                    } else {
                        sums.iter_mut().zip(measures).for_each(|(sum, measure)| sum.1 += measure.1);
                    }
                }
                self.step(&gradients.0, &gradients.1)?;
            }
        }
        Ok(sums.into_iter().map(|(name, sum)| (name, sum / f64::from(passes.max(1)))).collect())
    }

    /// Adds the gradients of one micro-batch, whose tokens are `share` of the mini-batch's.
    fn micro_batch(
        &self,
        experience: &Experience,
        at: usize,
        share: f64,
        gradients: &mut (AdapterGradient, AdapterGradient),
    ) -> Result<Vec<(&'static str, f64)>, Error> {
        let decoder = &self.model.decoder;
        let micro = &experience.micro[at];
        let (policy_trunk, value_trunk) = &experience.trunks[at];

        let pass = PolicyPass::new(decoder, micro, policy_trunk, &self.policy, self.config.temperature)?;
        let (old, advantages) = (&experience.logprobs[at], &experience.advantages[at]);
        let policy = losses::policy_loss(pass.logprobs(), old, advantages, self.config.cliprange);
        if !policy.loss.is_finite() {
            return Err(Error::NotFinite { what: "the policy's loss" });
        }
        pass.backward(decoder, micro, &scaled(&policy.grad, share), &mut gradients.0)?;

        let first_layer = self.value.first_layer;
        let (hidden, tape) =
            decoder.hidden_taped(value_trunk, &micro.batch(Some(&self.value)), first_layer)?;
        let answered = micro.answered(&hidden)?;
        let values = self.read_values(&answered)?;
        let (old, returns) = (&experience.values[at], &experience.returns[at]);
        let value = losses::value_loss(&values, old, returns, self.config.cliprange_value);
        if !value.loss.is_finite() {
            return Err(Error::NotFinite { what: "the value model's loss" });
        }
        let head = self.value.score.as_ref().ok_or(Error::NoScoreHead)?;
        let dvalues =
            Tensor::new(scaled(&value.grad, share * self.config.vf_coef), hidden.device())?.unsqueeze(1)?;
        gradients.1.add_score(dvalues.t()?.matmul(&answered)?)?;
        decoder.backward(&tape, &micro.scatter(&dvalues.matmul(head)?)?, &mut gradients.1)?;

        let entropy = pass.entropies().iter().map(|entropy| f64::from(*entropy)).sum::<f64>();
        Ok(vec![
            ("loss/policy_avg", policy.loss),
            ("loss/value_avg", value.loss),
            ("policy/approxkl_avg", policy.approxkl),
            ("policy/clipfrac_avg", policy.clipfrac),
            ("policy/entropy_avg", entropy / pass.entropies().len() as f64),
            ("val/clipfrac_avg", value.clipfrac),
            ("val/ratio", policy.ratio),
            ("val/ratio_var", policy.ratio_var),
        ])
    }

    /// One step of both optimisers.
    fn step(&mut self, policy: &AdapterGradient, value: &AdapterGradient) -> Result<(), Error> {
        let most = self.config.max_grad_norm;
        let step = |optimiser: &mut AdamW, adapter: &Arc<Adapter>, gradient: &AdapterGradient| {
            let parameters = optimiser.step(adapter.parameters()?, gradient.flatten(adapter)?, most, 1.0)?;
            Ok::<_, Error>(Arc::new(adapter.with_parameters(&parameters)?))
        };
        self.policy = step(&mut self.policy_optimiser, &self.policy, policy)?;
        self.value = step(&mut self.value_optimiser, &self.value, value)?;
        Ok(())
    }
}

/// A policy adapter that changes nothing yet.
///
/// # Errors
/// The device fails.
pub fn new_policy(
    model: &Model,
    rank: usize,
    alpha: f64,
    depth: f64,
    seed: u64,
) -> Result<Arc<Adapter>, Error> {
    let shape = Shape { rank, alpha, first_layer: first_layer(&model.decoder, depth), score: false };
    Ok(Arc::new(Adapter::new(&model.decoder.architecture, shape, seed)?))
}

/// `count` prompts, half of them from `wanted` as far as both lists hold any.
fn draw_prompts<'p>(
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

fn scaled(gradient: &[f32], by: f64) -> Vec<f32> {
    gradient.iter().map(|gradient| gradient * by as f32).collect()
}
