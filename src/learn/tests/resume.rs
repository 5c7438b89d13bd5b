//! A run that is cut off anywhere and goes on from its checkpoint ends with the same bits.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::{engine, tiny_model, watching};
use crate::completion::Prompt;
use crate::learn::{
    Checkpoints, Error, Method, Online, Practice, Reward, RewardModel, Sequence, Watch, groups, ppo,
    preference::{self, Judged},
    reward::{self, Example},
};
use crate::policy::{Adapter, Engine, Model};

fn sequences() -> Vec<Sequence> {
    (0..12u32).map(|at| Sequence::new((0..6).map(|i| 3 + (at * 31 + i * 7) % 200).collect(), 3)).collect()
}

fn trained(recipe: &str, model: &Model, engine: &Engine, watch: &Watch<'_>) -> Result<Arc<Adapter>, Error> {
    let own = sequences();
    let start = ppo::new_policy(model, 2, 4.0, 1.0, 0).unwrap();
    let given = preference::Config { batch: 4, ..Default::default() };
    let mut reward = RewardModel::new(model, &reward::Config::default(), 0).unwrap();
    match recipe {
        "sft" => preference::sft(model, start, &own, (&given, 5), watch),
        "dpo" => {
            let pairs: Vec<_> = own
                .chunks(2)
                .map(|pair| preference::Pair {
                    chosen: pair[0].clone(),
                    rejected: pair[1].clone(),
                    weight: 1.0,
                })
                .collect();
            preference::dpo(model, start, &pairs, (&given, 5), watch)
        }
        "kto" => {
            let judged = |(at, answer): (usize, &Sequence)| Judged {
                answer: answer.clone(),
                desirable: at % 3 == 0,
                weight: 1.0,
            };
            let judged: Vec<_> = own.iter().enumerate().map(judged).collect();
            preference::kto(model, start, &judged, (&given, 5), watch)
        }
        "reward" => {
            let label = |(at, answer): (usize, &Sequence)| Example::Label {
                answer: answer.clone(),
                label: (at % 2) as f64,
                margin: 0.0,
                weight: 1.0,
            };
            let examples: Vec<_> = own.iter().enumerate().map(label).collect();
            let config = reward::Config { batch: 4, ..Default::default() };
            reward.train(model, &examples, (&config, 5), watch)?;
            Ok(reward.adapter)
        }
        _ => {
            let config = ppo::Config {
                iterations: 3,
                episodes: 4,
                response_length: 4,
                num_ppo_epochs: 2,
                length_ratio: 100.0,
                ..Default::default()
            };
            let groups = groups::Config { num_generations: 2, ..Default::default() };
            let method = match recipe {
                "rloo" => Method::Rloo(&groups),
                "grpo" => Method::Grpo(&groups),
                _ => Method::Ppo { value: reward.value()? },
            };
            let score = Reward::Model { model: &reward, pessimism: 1.0 };
            let practice = Practice { engine, reward: score, config: &config };
            let mut online = Online::new(practice, method, start, 5);
            let prompts = ["one", "another"].map(|prompt| Prompt::Text(prompt.to_owned()));
            online.train(&prompts, &[], watch)?;
            Ok(online.policy)
        }
    }
}

#[test]
fn a_run_that_is_cut_off_and_resumed_ends_with_the_same_bits() {
    let model = tiny_model();
    let engine = engine(&model);
    for recipe in ["sft", "dpo", "kto", "reward", "ppo", "rloo", "grpo"] {
        let whole = trained(recipe, &model, &engine, &watching(20)).unwrap().parameters().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut cuts = 0;
        // Each time it gets as far as so many micro-batches, which is enough for a step at last.
        for patience in 2.. {
            let checkpoints = Checkpoints::new(dir.path(), 1, recipe.to_owned(), cuts > 0);
            let left = AtomicUsize::new(patience);
            let between =
                || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
            let watch = Watch { between: &between, checkpoints: Some(&checkpoints), ..watching(20) };
            match trained(recipe, &model, &engine, &watch) {
                Err(Error::Cancelled) => cuts += 1,
                Err(error) => panic!("{recipe}: {error}"),
                Ok(adapter) => {
                    assert!(
                        adapter.parameters().unwrap() == whole,
                        "{recipe}: {cuts} cuts changed the result"
                    );
                    break;
                }
            }
        }
        assert!(cuts >= 2, "{recipe} was cut {cuts} times");
    }
}
