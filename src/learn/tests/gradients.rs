//! The gradient of every loss by every matrix of an adapter on the tiny model, against PyTorch and PEFT in f64.
//!
//! `gradients.json` is written by `tests/python/adapter_gradients.py`, which lays out the same cases.

use serde_json::Value;

use super::{engine, tiny_model, tiny_model_on_tensors, watching};
use crate::learn::{
    Method, MicroTokens, Online, Practice, Sequence, Watch,
    checkpoint::Trainee,
    critic::{Critic, Targets},
    groups,
    policy_pass::logprobs,
    ppo::{self, Prices},
    preference::{self, Judged, Pair, PairLoss},
    reward::{self, Example, Reads},
    rollouts::{Episode, Reward, Rollouts},
    sequence::MicroBatch,
};
use crate::policy::{Adapter, AdapterGradient, Model, Shape};
use std::sync::Arc;

const LENGTHS: [usize; 4] = [9, 7, 11, 8];
const PROMPTS: [usize; 4] = [4, 3, 5, 2];

fn sequences() -> Vec<Sequence> {
    let tokens = |j: usize| (0..LENGTHS[j]).map(|i| ((7 * i + 13 * j + 5 * i * i) % 259) as u32).collect();
    (0..4).map(|j| Sequence::new(tokens(j), PROMPTS[j])).collect()
}

/// Matrix `number` holds `0.12 cos(0.37 · number + 0.61 · place)`.
pub(super) fn adapter(model: &Model, heads: usize) -> Arc<Adapter> {
    let shape = Shape { rank: 4, alpha: 8.0, first_layer: 0, heads };
    let bare = Adapter::new(&model.decoder.architecture, shape, 0).unwrap();
    let mut parameters = bare.parameters().unwrap();
    for (number, matrix) in parameters.iter_mut().enumerate() {
        for (place, value) in matrix.iter_mut().enumerate() {
            *value = (0.12 * (0.37 * number as f64 + 0.61 * place as f64).cos()) as f32;
        }
    }
    Arc::new(bare.with_parameters(&parameters).unwrap())
}

/// Norm and projections on `cos(k · (place + 1))`, each within 1e-4 of the norm.
#[track_caller]
fn check(case: &str, gradient: &AdapterGradient, adapter: &Adapter) {
    let golden: Value = serde_json::from_str(include_str!("gradients.json")).unwrap();
    let expected = golden[case]["gradient"].as_array().unwrap();
    let found = gradient.flatten(adapter).unwrap();
    assert_eq!(found.len(), expected.len(), "{case}");
    for (number, (found, expected)) in found.iter().zip(expected).enumerate() {
        let told: Vec<f64> = expected.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        let norm = found.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!((norm - told[0]).abs() <= 1e-4 * told[0], "{case}, matrix {number}: {norm} but {}", told[0]);
        for k in 1..4 {
            let on = |(at, g): (usize, &f32)| f64::from(*g) * ((k * (at + 1)) as f64).cos();
            let sum: f64 = found.iter().enumerate().map(on).sum();
            let far = (sum - told[k]).abs();
            assert!(far <= 1e-4 * told[0], "{case}, matrix {number}: {sum} but {} of {norm}", told[k]);
        }
    }
}

#[track_caller]
fn check_loss(case: &str, name: &str, found: f64) {
    let golden: Value = serde_json::from_str(include_str!("gradients.json")).unwrap();
    let expected = golden[case][name].as_f64().unwrap();
    assert!((found - expected).abs() < 1e-4 * expected.abs().max(0.1), "{case}: {found} but {expected}");
}

fn measure(measures: &[(&'static str, f64)], name: &str) -> f64 {
    measures.iter().find(|(known, _)| *known == name).unwrap().1
}

/// In one micro-batch, in one for each sequence or two, and on a device that finds out that it has to be so; on slices and
/// on tensor operations.
fn each_way(case: impl Fn(&Arc<Model>, &Watch<'_>, bool)) {
    for model in [tiny_model(), tiny_model_on_tensors()] {
        case(&model, &watching(4096), true);
        case(&model, &watching(17), false);
        let scarce = Watch { micro_tokens: MicroTokens::simulated(4096, 20), ..watching(0) };
        case(&model, &scarce, false);
        assert_eq!(scarce.micro_tokens.get(), 17);
    }
}

#[test]
fn losses_on_given_answers_reach_the_adapter_as_in_peft() {
    let model = tiny_model();
    let adapter = adapter(&model, 0);
    let own = sequences();
    let pair = |at: usize| Pair { chosen: own[at].clone(), rejected: own[at + 1].clone(), weight: 1.0 };
    let pairs = [pair(0), pair(2)];
    let judged: Vec<Judged> = own
        .iter()
        .enumerate()
        .map(|(at, answer)| Judged { answer: answer.clone(), desirable: at % 2 == 0, weight: 1.0 })
        .collect();
    each_way(|model, watch, _| {
        let mut gradient = AdapterGradient::default();
        let out = preference::sft_gradient(model, &adapter, &own, &mut gradient, watch).unwrap();
        check("sft", &gradient, &adapter);
        check_loss("sft", "loss", measure(&out, "loss"));
        for (case, loss) in [("dpo", PairLoss::Sigmoid), ("ipo", PairLoss::Ipo)] {
            let config = preference::Config { loss, ..Default::default() };
            let mut gradient = AdapterGradient::default();
            let pairs: Vec<_> = pairs.iter().collect();
            let out =
                preference::pair_gradient(model, &adapter, &pairs, &config, &mut gradient, watch).unwrap();
            check(case, &gradient, &adapter);
            check_loss(case, "loss", measure(&out, "loss"));
            // What counts for nothing teaches nothing.
            let weightless: Vec<Pair> =
                pairs.iter().map(|pair| Pair { weight: 0.0, ..(*pair).clone() }).collect();
            let mut gradient = AdapterGradient::default();
            let weightless: Vec<_> = weightless.iter().collect();
            preference::pair_gradient(model, &adapter, &weightless, &config, &mut gradient, watch).unwrap();
            assert!(gradient.flatten(&adapter).unwrap().iter().flatten().all(|slope| *slope == 0.0));
        }
        let config = preference::Config { undesirable_weight: 1.3, ..Default::default() };
        let mut gradient = AdapterGradient::default();
        let judged: Vec<_> = judged.iter().collect();
        let out = preference::kto_gradient(model, &adapter, &judged, &config, &mut gradient, watch).unwrap();
        check("kto", &gradient, &adapter);
        check_loss("kto", "loss", measure(&out, "loss"));
        check_loss("kto", "kl", measure(&out, "kl"));
    });
}

#[test]
fn the_reward_models_loss_reaches_the_adapter_as_in_peft() {
    let model = tiny_model();
    let own = sequences();
    let comparison = |chosen: usize, margin| Example::Comparison {
        chosen: own[chosen].clone(),
        rejected: own[chosen + 1].clone(),
        margin,
        weight: 1.0,
    };
    let label =
        |at: usize, label| Example::Label { answer: own[at].clone(), label, margin: 0.0, weight: 1.0 };
    let pairs = vec![comparison(0, 0.3), comparison(2, 0.0)];
    let mixed = vec![comparison(0, 0.0), label(2, 1.0), label(3, 0.25)];
    let once = vec![vec![1.0]; 2];
    let draws = vec![vec![2.0, 1.0], vec![0.0, 1.0], vec![1.0, 3.0]];
    let cases = [
        ("reward", Reads::End, 1, &pairs, &once),
        ("reward over the answer", Reads::Answer, 1, &pairs, &once),
        ("heads", Reads::End, 2, &mixed, &draws),
    ];
    for (case, reads, heads, examples, draws) in cases {
        let adapter = adapter(&model, heads);
        let examples: Vec<&Example> = examples.iter().collect();
        each_way(|model, watch, _| {
            let mut gradient = AdapterGradient::default();
            let out = reward::pass(model, (&adapter, reads), (&examples, draws), 0.01, &mut gradient, watch)
                .unwrap();
            check(case, &gradient, &adapter);
            check_loss(case, "loss", out.loss);
        });
    }
}

/// `size · cos(speed · place)` for each token.
fn wave(lists: &[Vec<f32>], size: f64, speed: f64) -> Vec<Vec<f32>> {
    let mut place = 0.0;
    let mut next = |_: &f32| {
        place += 1.0;
        (size * (speed * (place - 1.0)).cos()) as f32
    };
    lists.iter().map(|list| list.iter().map(&mut next).collect()).collect()
}

fn sums(a: &[Vec<f32>], b: &[Vec<f32>]) -> Vec<Vec<f32>> {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect()
}

/// The four sequences as if the policy had just answered, with old log-probabilities a little off the present ones.
fn rollouts(model: &Model, adapter: &Arc<Adapter>, (size, speed): (f64, f64), watch: &Watch<'_>) -> Rollouts {
    let own = sequences();
    let mut out = Rollouts {
        episodes: own
            .iter()
            .enumerate()
            .map(|(place, sequence)| Episode { sequence: sequence.clone(), place, drawn: Vec::new() })
            .collect(),
        micro: MicroBatch::pack(&own, watch.micro_tokens.get()),
        trunks: Vec::new(),
        scores: vec![0.0; 4],
        logprobs: Vec::new(),
        reference: Vec::new(),
        surprise: Vec::new(),
        entropy: 0.0,
    };
    for micro in &out.micro {
        let trunk = model.decoder.trunk(&micro.batch(), 0).unwrap();
        let of = |adapter| logprobs(&model.decoder, micro, (&trunk, 0), adapter, 0.7).unwrap().logprobs;
        out.logprobs.extend(micro.by_sequence(&of(Some(adapter))));
        out.reference.extend(micro.by_sequence(&of(None)));
        out.trunks.push([(0, trunk)].into());
    }
    out.logprobs = sums(&out.logprobs, &wave(&out.logprobs, size, speed));
    out
}

#[test]
fn losses_on_rollouts_reach_the_adapters_as_in_peft() {
    let (policy, value) = (adapter(&tiny_model(), 0), adapter(&tiny_model(), 1));
    let config = ppo::Config { temperature: 0.7, ..Default::default() };
    let dapo = groups::Config::default();
    let grpo = groups::Config { loss_type: groups::LossType::Grpo, ..Default::default() };
    let cases = [
        ("ppo", Method::Ppo { value: Arc::clone(&value) }, 0.3),
        ("rloo", Method::Rloo(&dapo), 0.05),
        ("dapo", Method::Grpo(&dapo), 0.3),
        ("grpo", Method::Grpo(&grpo), 0.3),
    ];
    for (case, method, size) in cases {
        let is_ppo = matches!(method, Method::Ppo { .. });
        each_way(|model, watch, whole| {
            let practice =
                Practice { engine: &engine(model), reward: Reward::Rule(&|_| Vec::new()), config: &config };
            let online = Online::new(practice, method.clone(), Arc::clone(&policy), 0);
            let rollouts = rollouts(model, &policy, (size, 1.7), watch);
            let advantages = if is_ppo {
                wave(&rollouts.logprobs, 1.5, 0.9)
            } else {
                let each = rollouts.logprobs.iter().zip([0.8, -1.1, 0.4, -0.1]);
                each.map(|(tokens, advantage)| vec![advantage; tokens.len()]).collect()
            };
            let mut targets = Targets { advantages, ..Targets::default() };
            if is_ppo {
                let critic = Critic { trainee: Trainee::new(Arc::clone(&value), 0.0) };
                let now =
                    critic.targets(&model.decoder, &rollouts, (&config, Prices::default()), watch).unwrap();
                targets.values = sums(&now.values, &wave(&now.values, 0.3, 1.3));
                targets.returns = wave(&now.values, 1.0, 0.7);
            }
            let mut gradients = <(AdapterGradient, AdapterGradient)>::default();
            let mini: Vec<usize> = (0..rollouts.micro.len()).collect();
            for at in &mini {
                let mini = (*at, &mini[..]);
                let out = online.micro_batch(&rollouts, &targets, mini, &mut gradients, watch).unwrap();
                let [out] = &out[..] else { continue };
                if whole {
                    check_loss(case, "loss", measure(out, if is_ppo { "loss/policy_avg" } else { "loss" }));
                }
                if whole && is_ppo {
                    check_loss("value", "loss", 0.1 * measure(out, "loss/value_avg"));
                }
            }
            check(case, &gradients.0, &policy);
            if is_ppo {
                check("value", &gradients.1, &value);
            }
        });
    }
}
