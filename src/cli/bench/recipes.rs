//! `gyrostat bench recipes`: what PPO and DPO teach the configured model, and judgements a reward model, by rules that are
//! written in the program: what the demo's simulated users come to want. Measured on prompts that nothing was learned from.

use std::sync::Arc;

use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;

use crate::cli::{Error, jsonl};
use crate::completion::Prompt;
use crate::config::Config;
use crate::demo::users::{self, Asked, Kind, Users};
use crate::learn::{
    Measures, Method, MicroTokens, Online, Pace, Practice, Reward, RewardModel, Sequence, Watch,
    policy_pass::BesideBase,
    ppo,
    preference::{self, Pair},
    reward::Example,
    sequence::MicroBatch,
};
use crate::policy::{Adapter, Engine, Model};

use super::{
    drift::{Line, line, rounded},
    serve,
};

/// Prompts to learn from, and to measure on.
const ASKED: usize = 192;
const FRESH: usize = 96;
/// Of the former, those whose answers are judged for a reward model: fewer than the demo's updates wait for.
const JUDGED: usize = 110;
const ITERATIONS: usize = 10;

/// The wish of one type of simulated users as a task.
struct Task<'a> {
    kind: &'static Kind,
    told: &'static str,
    engine: &'a Engine,
    config: &'a Config,
    seed: u64,
}

/// A line a rule, seed and recipe; the names of a type of users and of a recipe leave the others out.
pub(super) fn study(
    (interaction, recipe): (Option<&str>, Option<&str>),
    runs: usize,
    config: &Config,
) -> Result<Vec<Line>, Error> {
    let (engine, _serving) = serve::start(config)?;
    let chosen = |kind: &Kind| interaction.is_none_or(|only| kind.interaction == only);
    let wants = |name: &str| recipe.is_none_or(|only| only == name);
    let tasks = users::changing().filter(|(kind, _)| chosen(kind)).flat_map(|(kind, wish)| {
        let engine = &engine;
        (0..runs as u64).map(move |seed| Task { kind, told: wish.told, engine, config, seed })
    });
    let bar = jsonl::bar(1000, "learning");
    let report = |stage: &str, done: f64, measures: Measures<'_>| {
        jsonl::advance(&bar, stage, done, measures);
    };
    let watch = Watch {
        micro_tokens: MicroTokens::new(config.learn.pace.micro_tokens),
        sequence_tokens: config.learn.pace.sequence_tokens,
        between: &|| true,
        report: &report,
        checkpoints: None,
    };
    let lines = Pace::threads()?.install(|| -> Result<_, Error> {
        let mut lines = Vec::new();
        for task in tasks {
            if wants("ppo") {
                lines.push(task.ppo(&watch)?);
            }
            if wants("dpo") {
                lines.push(task.dpo(&watch)?);
            }
            if wants("reward") {
                lines.push(task.reward(&watch)?);
            }
        }
        Ok(lines)
    });
    bar.finish_and_clear();
    lines
}

/// Answers to prompts that nothing was learned from.
struct Shown {
    /// The share that meets the wish.
    met: f64,
    /// From the model itself, in nats a token.
    kl: f64,
    /// Tokens an answer.
    tokens: f64,
}

impl Task<'_> {
    fn model(&self) -> &Model {
        self.engine.model()
    }

    /// 1 for each answer that the users want, 0 for others.
    fn worth(&self, answers: &[Sequence]) -> Vec<f32> {
        let (end, changes) = (self.model().end_of_turn(), users::changing().count());
        let wanted = |answer: &Sequence| {
            let said = answer.answer().iter().filter(|token| Some(**token) != end).copied();
            let text = self.model().vocabulary.decode(&said.collect::<Vec<u32>>());
            users::satisfies(self.kind.interaction, &text, changes)
        };
        answers.iter().map(|answer| f32::from(u8::from(wanted(answer)))).collect()
    }

    fn asked(&self) -> Vec<Prompt> {
        let mut users = Users::new(self.seed);
        (0..ASKED).map(|_| prompt(&users.one(self.kind))).collect()
    }

    fn fresh(&self) -> Vec<Prompt> {
        Users::fresh(self.kind, FRESH).iter().map(prompt).collect()
    }

    fn start(&self) -> Result<Arc<Adapter>, Error> {
        let how = &self.config.learn.ppo;
        Ok(ppo::new_policy(self.model(), how.rank, how.alpha, how.depth, self.seed)?)
    }

    /// The reward is the rule itself; no reward model is trained.
    fn ppo(&self, watch: &Watch<'_>) -> Result<Line, Error> {
        let how = ppo::Config { iterations: ITERATIONS, ..self.config.learn.ppo.clone() };
        let worth = |answers: &[Sequence]| self.worth(answers);
        let practice = Practice { engine: self.engine, reward: Reward::Rule(&worth), config: &how };
        let value = RewardModel::new(self.model(), &self.config.learn.reward, self.seed)?.value()?;
        let start = self.start()?;
        let before = self.shown(&practice, &start, watch)?;
        let mut online = Online::new(practice, Method::Ppo { value }, start, self.seed);
        online.train(&self.asked(), &[], watch)?;
        let after = self.shown(&practice, &online.policy, watch)?;
        Ok(self.line("ppo", &before, &after, None))
    }

    /// Of two answers of the model itself, of which one is wanted and one is not, DPO is told which.
    fn dpo(&self, watch: &Watch<'_>) -> Result<Line, Error> {
        let worth = |answers: &[Sequence]| self.worth(answers);
        let practice =
            Practice { engine: self.engine, reward: Reward::Rule(&worth), config: &self.config.learn.ppo };
        let start = self.start()?;
        let before = self.shown(&practice, &start, watch)?;
        let pairs = self.pairs(&practice, &start, &self.asked(), watch)?;
        let held_out = self.pairs(&practice, &start, &self.fresh(), watch)?;
        let how = (&self.config.learn.preference, self.seed);
        let policy = preference::dpo(self.model(), start, &pairs, how, watch)?;
        let ordered = ordered(self.model(), &policy, &held_out, watch)?;
        let after = self.shown(&practice, &policy, watch)?;
        let accuracy = ordered as f64 / held_out.len().max(1) as f64;
        Ok(self.line("dpo", &before, &after, Some((pairs.len(), held_out.len(), accuracy))))
    }

    /// A reward model is told of single answers whether the users want them, and puts others in order.
    fn reward(&self, watch: &Watch<'_>) -> Result<Line, Error> {
        let (start, asked, fresh) = (self.start()?, self.asked(), self.fresh());
        let mut rng = StdRng::seed_from_u64(self.seed);
        let judged = self.answers(&start, &asked.iter().take(JUDGED).collect::<Vec<_>>(), &mut rng, watch)?;
        let twice: Vec<&Prompt> = fresh.iter().flat_map(|prompt| [prompt, prompt]).collect();
        let held_out = self.answers(&start, &twice, &mut rng, watch)?;
        let wanted = self.worth(&judged);
        let met = wanted.iter().map(|worth| f64::from(*worth)).sum::<f64>() / wanted.len().max(1) as f64;
        let label = |(answer, worth)| {
            let label = f64::from(worth);
            Example::Label { answer, label, margin: 0.0, weight: 1.0 }
        };
        let examples: Vec<Example> = judged.into_iter().zip(wanted).map(label).collect();
        let how = &self.config.learn.reward;
        let mut reward = RewardModel::new(self.model(), how, self.seed)?;
        reward.train(self.model(), &examples, (how, self.seed), watch)?;
        let scores = reward.score(self.model(), &held_out, watch)?;
        Ok(line([
            ("recipe", json!("reward")),
            ("wanted", json!(self.told)),
            ("seed", json!(self.seed)),
            ("answers learned from", json!(examples.len())),
            ("of these wanted", rounded(met, 3)),
            ("answers held out", json!(held_out.len())),
            ("pairs of them in order, %", rounded(100.0 * in_order(&scores, &self.worth(&held_out)), 1)),
        ]))
    }

    /// One answer of the model itself to each prompt.
    fn answers(
        &self,
        start: &Arc<Adapter>,
        prompts: &[&Prompt],
        rng: &mut StdRng,
        watch: &Watch<'_>,
    ) -> Result<Vec<Sequence>, Error> {
        let reward = Reward::Rule(&|_| Vec::new());
        let practice = Practice { engine: self.engine, reward, config: &self.config.learn.ppo };
        let answers = practice.answer(start, prompts, rng, watch)?;
        Ok(answers.into_iter().map(|answer| answer.sequence).collect())
    }

    fn line(&self, recipe: &str, before: &Shown, after: &Shown, pairs: Option<(usize, usize, f64)>) -> Line {
        line([
            ("recipe", json!(recipe)),
            ("wanted", json!(self.told)),
            ("seed", json!(self.seed)),
            ("answers that meet it before", rounded(before.met, 3)),
            ("after", rounded(after.met, 3)),
            ("KL, nats a token", rounded(after.kl, 4)),
            ("tokens an answer before", rounded(before.tokens, 1)),
            ("after ", rounded(after.tokens, 1)),
            ("pairs learned from", json!(pairs.map(|(learned, _, _)| learned))),
            ("pairs held out", json!(pairs.map(|(_, held_out, _)| held_out))),
            ("in order, %", pairs.map_or(json!(null), |(_, _, accuracy)| rounded(100.0 * accuracy, 1))),
        ])
    }

    fn shown(
        &self,
        practice: &Practice<'_>,
        policy: &Arc<Adapter>,
        watch: &Watch<'_>,
    ) -> Result<Shown, Error> {
        let prompts = self.fresh();
        let mut rng = StdRng::seed_from_u64(self.seed);
        let played = practice.play((policy, None), &prompts.iter().collect::<Vec<_>>(), &mut rng, watch)?;
        Ok(Shown {
            met: played.scores.iter().map(|score| f64::from(*score)).sum::<f64>() / played.count(),
            kl: played.kl().iter().sum::<f64>() / played.tokens(),
            tokens: played.tokens() / played.count(),
        })
    }

    /// Two answers of the model to each prompt, where the users want one of them only.
    fn pairs(
        &self,
        practice: &Practice<'_>,
        start: &Arc<Adapter>,
        prompts: &[Prompt],
        watch: &Watch<'_>,
    ) -> Result<Vec<Pair>, Error> {
        let mut rng = StdRng::seed_from_u64(self.seed + 1);
        let mut pairs = Vec::new();
        for prompts in prompts.chunks(64) {
            let twice: Vec<&Prompt> = prompts.iter().flat_map(|prompt| [prompt, prompt]).collect();
            let answers = practice.answer(start, &twice, &mut rng, watch)?;
            let (wanted, unwanted): (Vec<_>, Vec<_>) = answers
                .iter()
                .partition(|answer| self.worth(std::slice::from_ref(&answer.sequence)) == [1.0]);
            for chosen in wanted {
                let other = unwanted.iter().find(|other| other.place / 2 == chosen.place / 2);
                pairs.extend(other.map(|rejected| Pair {
                    chosen: chosen.sequence.clone(),
                    rejected: rejected.sequence.clone(),
                    weight: 1.0,
                }));
            }
        }
        Ok(pairs)
    }
}

fn prompt(asked: &Asked) -> Prompt {
    Prompt::Chat(vec![crate::completion::Message::user(asked.text.clone())])
}

/// Of all pairs of a wanted and an unwanted answer, the share in which the wanted one has the higher score: the area under the
/// ROC curve. Half where there is no such pair.
fn in_order(scores: &[f32], worth: &[f32]) -> f64 {
    let of = |kind: f32| {
        scores.iter().zip(worth).filter(move |(_, worth)| **worth == kind).map(|(score, _)| *score)
    };
    let won = of(1.0).map(|good| of(0.0).filter(|bad| good > *bad).count()).sum::<usize>();
    match of(1.0).count() * of(0.0).count() {
        0 => 0.5,
        pairs => won as f64 / pairs as f64,
    }
}

/// Pairs whose chosen answer has gained more over the model itself than the rejected one: TRL's `rewards/accuracies`.
fn ordered(model: &Model, policy: &Arc<Adapter>, pairs: &[Pair], watch: &Watch<'_>) -> Result<usize, Error> {
    let answers: Vec<Sequence> =
        pairs.iter().flat_map(|pair| [pair.chosen.clone(), pair.rejected.clone()]).collect();
    let mut gains: Vec<f64> = Vec::new();
    for micro in MicroBatch::pack(&answers, watch.micro_tokens.get()) {
        let parts = watch.in_memory(&micro, &mut (), |micro, ()| {
            let both = BesideBase::new(&model.decoder, micro, policy)?;
            let mut ratios = both.ratios();
            let gains = micro.lengths.iter().map(|length| ratios.by_ref().take(*length).sum::<f64>());
            Ok(gains.collect::<Vec<_>>())
        })?;
        gains.extend(parts.into_iter().flatten());
    }
    Ok(gains.chunks_exact(2).filter(|two| two[0] > two[1]).count())
}
