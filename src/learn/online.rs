//! Learning from the policy's own answers: PPO, RLOO and GRPO are one loop with three ways to make a gradient of scores.

use std::sync::Arc;

use rand::{rngs::StdRng, seq::SliceRandom};

use crate::completion::Prompt;
use crate::policy::{Adapter, AdapterGradient};

use super::{
    Error, Watch,
    advantages::AdaptiveKl,
    checkpoint::{State, Trainee},
    critic::{Critic, Targets, scaled},
    descent::{self, Measured},
    groups,
    losses::{self, PolicyLoss},
    policy_pass::PolicyPass,
    ppo::Prices,
    rollouts::{Practice, Rollouts, draw_prompts},
    sequence::MicroBatch,
};

/// How scores become a gradient.
#[derive(Debug, Clone)]
pub enum Method<'a> {
    /// With the value model that it starts from.
    Ppo {
        value: Arc<Adapter>,
    },
    Rloo(&'a groups::Config),
    Grpo(&'a groups::Config),
}

/// A policy in training.
#[derive(Debug)]
pub struct Online<'a> {
    practice: Practice<'a>,
    method: Method<'a>,
    trainee: Trainee,
    /// PPO's.
    critic: Option<Critic>,
    kl_coefficient: AdaptiveKl,
    /// Tokens an answer in the first iteration.
    first_length: f64,
    /// The widest standard deviation of an iteration's scores, 1 at least. A reward model that is sure of itself spreads over
    /// several units, against which a price a nat would be nothing; Ziegler et al. (2019) bring the scores to one scale, we
    /// the prices, so that values stay in the scores' units.
    spread: f64,
    /// What has been learned: after a stop, the newest policy whose answers kept the budgets.
    pub policy: Arc<Adapter>,
    seed: u64,
}

/// The gradients of the policy and of the value model.
type Gradients = (AdapterGradient, AdapterGradient);

impl<'a> Online<'a> {
    /// Starts from `policy`.
    pub fn new(practice: Practice<'a>, method: Method<'a>, policy: Arc<Adapter>, seed: u64) -> Self {
        let config = practice.config;
        let critic = match &method {
            Method::Ppo { value } => {
                Some(Critic { trainee: Trainee::new(Arc::clone(value), config.value_learning_rate) })
            }
            Method::Rloo(_) | Method::Grpo(_) => None,
        };
        Self {
            practice,
            method,
            trainee: Trainee::new(Arc::clone(&policy), config.learning_rate),
            critic,
            kl_coefficient: AdaptiveKl::new(config.kl_coef, config.target_kl, config.kl_horizon),
            first_length: 0.0,
            spread: 1.0,
            policy,
            seed,
        }
    }

    /// Runs all iterations, or stops where the answers have gone too far. Each draws half of its prompts from `wanted` and
    /// half from `others`. Returns the measures of the last one.
    ///
    /// # Errors
    /// There are no prompts, the device fails, a number is not finite, or the update is cancelled.
    pub fn train(
        &mut self,
        wanted: &[Prompt],
        others: &[Prompt],
        watch: &Watch<'_>,
    ) -> Result<Measured, Error> {
        let config = self.practice.config;
        let mut measures = Vec::new();
        for iteration in self.resume(watch)?..config.iterations {
            watch.keep(iteration, &|| self.state(iteration))?;
            let mut rng = descent::rng(self.seed, iteration);
            let prompts = self.prompts(wanted, others, &mut rng)?;
            let value = self.critic.as_ref().map(|critic| &*critic.trainee.adapter);
            let rollouts = self.practice.play((&self.trainee.adapter, value), &prompts, &mut rng, watch)?;
            let kl = rollouts.kl().iter().sum::<f64>() / rollouts.count();
            let too_far = self.too_far(kl, &rollouts);
            self.spread = self.spread.max(rollouts.spread());
            let targets = self.targets(&rollouts, watch)?;
            measures.clone_from(&targets.objective);
            measures.push(("stopped", f64::from(u8::from(too_far))));
            if !too_far {
                self.policy = Arc::clone(&self.trainee.adapter);
                measures.extend(self.epochs(&rollouts, &targets, &mut rng, watch)?);
            }
            let done = if too_far { 1.0 } else { (iteration + 1) as f64 / config.iterations as f64 };
            watch.progress(self.stage(), done, &measures);
            if too_far {
                return Ok(measures);
            }
            self.kl_coefficient.update(kl, config.episodes);
        }
        self.policy = Arc::clone(&self.trainee.adapter);
        Ok(measures)
    }

    /// The iteration to begin with.
    fn resume(&mut self, watch: &Watch<'_>) -> Result<usize, Error> {
        let Some(State { step, trainees, numbers }) = watch.resumed()? else { return Ok(0) };
        let critic = self.critic.as_mut().map(|critic| &mut critic.trainee);
        let mut kept_policy = Trainee::new(Arc::clone(&self.policy), 0.0);
        let order = [Some(&mut self.trainee), Some(&mut kept_policy), critic];
        for (trainee, kept) in order.into_iter().flatten().zip(&trainees) {
            trainee.restore(kept)?;
        }
        self.policy = kept_policy.adapter;
        if let [first_length, spread, coefficient, ref first_kl @ ..] = numbers[..] {
            (self.first_length, self.spread) = (first_length, spread);
            self.kl_coefficient.remember((coefficient, first_kl.first().copied()));
        }
        Ok(step)
    }

    fn state(&self, step: usize) -> Result<State, Error> {
        let critic = self.critic.as_ref().map(|critic| critic.trainee.keep()).transpose()?;
        let kept_policy = Trainee::new(Arc::clone(&self.policy), 0.0).keep()?;
        let mut trainees = vec![self.trainee.keep()?, kept_policy];
        trainees.extend(critic);
        let (coefficient, first_kl) = self.kl_coefficient.memory();
        let numbers = [self.first_length, self.spread, coefficient].into_iter().chain(first_kl).collect();
        Ok(State { step, trainees, numbers })
    }

    fn stage(&self) -> &'static str {
        match self.method {
            Method::Ppo { .. } => "ppo",
            Method::Rloo(_) => "rloo",
            Method::Grpo(_) => "grpo",
        }
    }

    /// One prompt an episode, or for groups the same one several times in a row.
    fn prompts<'p>(
        &self,
        wanted: &'p [Prompt],
        others: &'p [Prompt],
        rng: &mut StdRng,
    ) -> Result<Vec<&'p Prompt>, Error> {
        let answers = match self.method {
            Method::Ppo { .. } => 1,
            Method::Rloo(config) | Method::Grpo(config) => config.num_generations.max(1),
        };
        let drawn = draw_prompts(wanted, others, self.practice.config.episodes.div_ceil(answers), rng)?;
        Ok(drawn.into_iter().flat_map(|prompt| std::iter::repeat_n(prompt, answers)).collect())
    }

    /// Whether the answers have left the budgets of KL and length: the reward may be being gamed.
    fn too_far(&mut self, kl: f64, rollouts: &Rollouts) -> bool {
        let config = self.practice.config;
        let length = rollouts.tokens() / rollouts.count();
        if self.first_length == 0.0 {
            self.first_length = length;
        }
        let ratio = length / self.first_length.max(1.0);
        kl > config.kl_budget || ratio > config.length_ratio || ratio < config.length_ratio.recip()
    }

    /// Steps 2 to 4 of PPO, or what stands in their place.
    fn targets(&self, rollouts: &Rollouts, watch: &Watch<'_>) -> Result<Targets, Error> {
        let (advantages, config) = match (&self.method, &self.critic) {
            (Method::Ppo { .. }, None) => return Err(Error::NoScoreHead),
            (Method::Ppo { .. }, Some(critic)) => {
                let decoder = &self.practice.model().decoder;
                let (config, kl_coef) = (self.practice.config, self.kl_coefficient.value());
                let prices = Prices::new(config, kl_coef, self.spread, rollouts.mean_surprise());
                return critic.targets(decoder, rollouts, (config, prices), watch);
            }
            (Method::Rloo(config), _) => {
                (groups::rloo_advantages(config, config.beta * self.spread, rollouts), config)
            }
            (Method::Grpo(config), _) => (groups::grpo_advantages(config, rollouts), config),
        };
        let of_tokens = advantages.iter().zip(&rollouts.logprobs);
        let advantages = of_tokens.map(|(advantage, tokens)| vec![*advantage as f32; tokens.len()]).collect();
        Ok(Targets { advantages, objective: groups::measures(config, rollouts), ..Targets::default() })
    }

    /// Step 5. Returns the means over all micro-batches and epochs.
    fn epochs(
        &mut self,
        rollouts: &Rollouts,
        targets: &Targets,
        rng: &mut StdRng,
        watch: &Watch<'_>,
    ) -> Result<Measured, Error> {
        let config = self.practice.config;
        let epochs = match self.method {
            Method::Ppo { .. } => config.num_ppo_epochs,
            Method::Rloo(groups) | Method::Grpo(groups) => groups.num_iterations,
        };
        let mut sums: Measured = Vec::new();
        let mut passes = 0;
        for _ in 0..epochs {
            let mut order: Vec<usize> = (0..rollouts.micro.len()).collect();
            order.shuffle(rng);
            for mini in order.chunks(order.len().div_ceil(config.num_mini_batches.max(1))) {
                let mut gradients = Gradients::default();
                for at in mini {
                    for measures in self.micro_batch(rollouts, targets, (*at, mini), &mut gradients, watch)? {
                        passes += 1;
                        if sums.is_empty() {
                            sums = measures;
                        } else {
                            sums.iter_mut().zip(measures).for_each(|(sum, measure)| sum.1 += measure.1);
                        }
                    }
                }
                self.trainee.step(&gradients.0, config.max_grad_norm, 1.0)?;
                if let Some(critic) = &mut self.critic {
                    critic.trainee.step(&gradients.1, config.max_grad_norm, 1.0)?;
                }
            }
        }
        Ok(sums.into_iter().map(|(name, sum)| (name, sum / f64::from(passes.max(1)))).collect())
    }

    /// Adds the gradients of micro-batch `at` of a mini-batch. Returns the measures of each part that it was taken in.
    pub(super) fn micro_batch(
        &self,
        rollouts: &Rollouts,
        targets: &Targets,
        (at, mini): (usize, &[usize]),
        gradients: &mut Gradients,
        watch: &Watch<'_>,
    ) -> Result<Vec<Measured>, Error> {
        let tokens: usize = mini.iter().map(|at| rollouts.micro[*at].targets.len()).sum();
        let answers: usize = mini.iter().map(|at| rollouts.micro[*at].lengths.len()).sum();
        watch.in_memory(&rollouts.micro[at], gradients, |micro, gradients| {
            self.pass(rollouts, targets, (at, micro), (tokens, answers), gradients)
        })
    }

    /// Adds the gradients of `micro`, which is micro-batch `at` or a part of it, of a mini-batch with so many tokens and
    /// answers.
    fn pass(
        &self,
        rollouts: &Rollouts,
        targets: &Targets,
        (at, micro): (usize, &MicroBatch),
        (tokens, answers): (usize, usize),
        gradients: &mut Gradients,
    ) -> Result<Measured, Error> {
        let decoder = &self.practice.model().decoder;
        let trunk = rollouts.trunk((at, micro), &self.trainee.adapter)?;
        let temperature = self.practice.config.temperature;
        let pass = PolicyPass::new(decoder, micro, &trunk, &self.trainee.adapter, temperature)?;
        let policy =
            self.policy_loss(rollouts, &targets.advantages, (micro, pass.logprobs()), (tokens, answers));
        if !policy.loss.is_finite() {
            return Err(Error::NotFinite { what: "the policy's loss" });
        }
        let entropy = pass.entropies().iter().map(|entropy| f64::from(*entropy)).sum::<f64>();
        // Before the value model's pass, so that only one of them is held.
        pass.backward(decoder, &policy.grad, &mut gradients.0)?;
        let Some(critic) = &self.critic else {
            return Ok(vec![("loss", policy.loss), ("clip_ratio/region_mean", policy.clipfrac)]);
        };
        let config = self.practice.config;
        let scale = config.vf_coef * micro.targets.len() as f64 / tokens as f64;
        let old = micro.own_lists(&targets.values);
        let returns = micro.own_lists(&targets.returns);
        let trunk = rollouts.trunk((at, micro), &critic.trainee.adapter)?;
        let what = (&trunk, &old[..], &returns[..]);
        let value =
            critic.backward(decoder, micro, what, (config.cliprange_value, scale), &mut gradients.1)?;
        Ok(vec![
            ("loss/policy_avg", policy.loss),
            ("loss/value_avg", value.loss),
            ("policy/approxkl_avg", policy.approxkl),
            ("policy/clipfrac_avg", policy.clipfrac),
            ("policy/entropy_avg", entropy / micro.targets.len() as f64),
            ("val/clipfrac_avg", value.clipfrac),
            ("val/ratio", policy.ratio),
            ("val/ratio_var", policy.ratio_var),
        ])
    }

    /// The loss of a micro-batch's tokens, and its gradient as a part of the mini-batch's, which has so many tokens and
    /// answers.
    fn policy_loss(
        &self,
        rollouts: &Rollouts,
        advantages: &[Vec<f32>],
        (micro, logprobs): (&MicroBatch, &[f32]),
        (tokens, answers): (usize, usize),
    ) -> PolicyLoss {
        let old = micro.own_lists(&rollouts.logprobs);
        let advantages = micro.own_lists(advantages);
        match &self.method {
            Method::Ppo { .. } => {
                let cliprange = self.practice.config.cliprange;
                let mut loss = losses::policy_loss(logprobs, &old, &advantages, cliprange);
                loss.grad = scaled(&loss.grad, logprobs.len() as f64 / tokens as f64);
                loss
            }
            Method::Rloo(config) => {
                let differences: Vec<f32> = logprobs.iter().zip(&old).map(|(new, old)| new - old).collect();
                let ratios: Vec<f32> =
                    micro.by_sequence(&differences).iter().map(|list| list.iter().sum()).collect();
                let of_answers: Vec<f32> = micro
                    .by_sequence(&advantages)
                    .iter()
                    .map(|list| list.first().copied().unwrap_or_default())
                    .collect();
                let nothing = vec![0.0; ratios.len()];
                let mut loss = losses::policy_loss(&ratios, &nothing, &of_answers, config.epsilon);
                let share = scaled(&loss.grad, ratios.len() as f64 / answers as f64);
                loss.grad = micro.spread(&share);
                loss
            }
            Method::Grpo(config) => {
                let reference = micro.own_lists(&rollouts.reference);
                let weights = groups::token_weights(config.loss_type, &micro.lengths, (tokens, answers));
                let how = (config.epsilon, config.beta);
                let mut loss =
                    losses::grpo_loss(logprobs, &old, &reference, &advantages, &weights, how).policy;
                // What is shown is the micro-batch's own mean.
                loss.loss /= weights.iter().sum::<f64>().max(1e-12);
                loss
            }
        }
    }
}
