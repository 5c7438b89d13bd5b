//! Losses and advantages against PyTorch 2.15; gradients of adapters against PEFT; what each recipe learns.

mod bandit;
mod gradients;
mod resume;
mod reward;
mod rollouts;

use std::sync::Arc;

use tokio::sync::watch;

use super::{
    MicroTokens, Watch,
    adamw::{self, AdamW},
    advantages::{gae, group_relative, leave_one_out, rewards, whiten},
    losses::{KtoWeights, bradley_terry, dpo, grpo_loss, ipo, kto, pointwise, policy_loss, value_loss},
};
use crate::policy::{self, Engine, Model, Served, device::Placement, write_tiny};

fn tiny_model() -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    write_tiny(folder.path(), 0).unwrap();
    Arc::new(Model::load(folder.path().to_str().unwrap(), policy::Device::Cpu).unwrap())
}

/// The same weights in f64, which slices do not take.
fn tiny_model_on_tensors() -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    write_tiny(folder.path(), 0).unwrap();
    let placement = Placement { device: candle_core::Device::Cpu, dtype: candle_core::DType::F64 };
    Arc::new(Model::load_path(folder.path(), &placement).unwrap())
}

/// An engine that serves nobody.
fn engine(model: &Arc<Model>) -> Engine {
    let (_served, receiver) = watch::channel(Served::default());
    let metrics = policy::Metrics::register(&prometheus::Registry::new()).unwrap();
    Engine::start(Arc::clone(model), &policy::Config::default(), receiver, metrics).unwrap()
}

pub(super) fn watching(micro_tokens: usize) -> Watch<'static> {
    fn always() -> bool {
        true
    }
    fn nowhere(_: &str, _: f64, _: super::Measures<'_>) {}
    let micro_tokens = MicroTokens::new(micro_tokens);
    Watch { micro_tokens, sequence_tokens: 64, between: &always, report: &nowhere, checkpoints: None }
}

/// Every number within 1e-5, the precision that f32 inputs allow.
#[track_caller]
fn check(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} but {expected}");
    }
}

#[track_caller]
fn check_one(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-5, "{found} but {expected}");
}

fn logprobs() -> Vec<Vec<f32>> {
    vec![vec![-1.2, -0.4, -2.0], vec![-0.7, -1.5]]
}

fn values() -> Vec<Vec<f32>> {
    vec![vec![0.2, 0.1, -0.1], vec![0.0, 0.3]]
}

/// The numbers of all tests below come from this script.
///
/// ```python
/// import torch, torch.nn.functional as F
/// T = lambda x: torch.tensor(x, dtype=torch.float64)
/// lp = [T([-1.2,-0.4,-2.0]), T([-0.7,-1.5])]; rf = [T([-1.0,-0.9,-1.8]), T([-0.9,-1.1])]
/// sc = T([0.8,-0.3]); v = [T([0.2,0.1,-0.1]), T([0.0,0.3])]
/// rew = []
/// for a, b, s in zip(lp, rf, sc):
///     x = -0.05 * (a - b); x[-1] += s; rew.append(x)
/// adv, ret = [], []
/// for x, vv in zip(rew, v):
///     last, A = 0, []
///     for t in reversed(range(len(x))):
///         nv = vv[t+1] if t < len(x)-1 else 0.0
///         last = x[t] + nv - vv[t] + 0.95 * last; A.append(last)
///     A = torch.stack(A[::-1]); adv.append(A); ret.append(A + vv)
/// al = torch.cat(adv); w = (al - al.mean()) * torch.rsqrt(al.var(unbiased=True) + 1e-8)
/// new = T([-1.0,-0.6,-1.2,-0.75,-1.9]).requires_grad_(); old = torch.cat(lp); ratio = torch.exp(new - old)
/// pl = torch.max(-w * ratio, -w * torch.clamp(ratio, 0.8, 1.2)).mean(); pl.backward()
/// nv = T([0.5,0.05,-0.4,0.1,0.32]).requires_grad_(); ov = torch.cat(v); R = torch.cat(ret)
/// vc = torch.clamp(nv, ov - 0.2, ov + 0.2); vl = 0.5 * torch.max((nv-R)**2, (vc-R)**2).mean(); vl.backward()
/// c = T([0.5,-0.2,1.5]).requires_grad_(); j = T([0.1,0.4,-0.6]).requires_grad_(); wt = T([1.0,0.5,2.0])
/// bt = ((-F.logsigmoid(c-j) + 0.01 * (c+j)**2) * wt).sum() / wt.sum(); bt.backward()
/// s = T([0.5,-1.0,2.0]).requires_grad_(); y = T([1.0,0.0,0.25]); w3 = T([1.0,1.0,0.5])
/// bce = (F.binary_cross_entropy_with_logits(s, y, reduction='none') * w3).sum() / w3.sum(); bce.backward()
/// pc = T([-3.0,-12.0]).requires_grad_(); pr = T([-11.0,-8.5]).requires_grad_()
/// c, r = pc - T([-4.5,-11.0]), pr - T([-10.8,-12.0])
/// d = -F.logsigmoid(0.1 * (c - r)).mean(); d.backward()
/// i = ((c / T([3.,5.]) - r / T([4.,2.]) - 1 / (2*0.1))**2).mean(); i.backward()      # after pc.grad = pr.grad = None
/// g = T([1.5,-1.0,0.3]).requires_grad_(); b = T([-0.2,3.5]).requires_grad_(); kl = T([-0.4,1.2,0.1]).mean().clamp(min=0)
/// l = torch.cat((1 - F.sigmoid(0.1*(g-kl)), 1.3 * (1 - F.sigmoid(0.1*(kl-b))))).mean(); l.backward()
/// R = T([1.0,0.2,-0.5,0.3, 2.0,2.0,2.0,2.0]); G = R.view(-1,4)
/// a = R - ((G.sum(1,keepdim=True) - G) / 3).view(-1); n = (a - a.mean()) / (a.std() + 1e-4)
/// m, s = G.mean(1).repeat_interleave(4), G.std(1).repeat_interleave(4); group = (R - m) / (s + 1e-4)
/// q = T([-4.0,-6.1,-2.0]).requires_grad_(); A = T([0.7,-0.4,1.1]); ratio = torch.exp(q - T([-4.1,-5.5,-2.5]))
/// rloo = -torch.min(ratio*A, torch.clamp(ratio,0.8,1.2)*A).mean(); rloo.backward()
/// x = T([-1.0,-0.6,-1.2,-0.75,-1.9]).requires_grad_(); A = T([0.8,0.8,-0.5,-0.5,-0.5]); ref = torch.cat(rf)
/// for w in (T([0.2]*5), T([1/4,1/4,1/6,1/6,1/6])):                                    # dapo; grpo of 2 and 3 tokens
///     x.grad = None; ratio = torch.exp(x - torch.cat(lp)); k3 = torch.exp(ref-x) - (ref-x) - 1
///     (w * (-torch.min(ratio*A, torch.clamp(ratio,0.8,1.2)*A) + 0.04*k3)).sum().backward()
/// c = T([0.5,-0.2,1.5]).requires_grad_(); j = T([0.1,0.4,-0.6]).requires_grad_()
/// (-F.logsigmoid(c - j - T([0.5,0.0,1.0])).mean() + 0.01 * ((c+j)**2).mean()).backward()
/// p = torch.nn.Parameter(torch.tensor([1.0,-2.0,0.5])); o = torch.optim.AdamW([p], lr=0.1, weight_decay=0.01)
/// for g in ([0.5,-1.0,0.1], [0.2,0.3,-2.0], [-0.7,0.05,0.4]):
///     p.grad = torch.tensor(g); torch.nn.utils.clip_grad_norm_([p], 1.0); o.step()
/// ```
#[test]
fn rewards_advantages_and_returns_are_pytorchs() {
    let reference = [vec![-1.0, -0.9, -1.8], vec![-0.9, -1.1]];
    let rewarded = rewards(&[0.8, -0.3], &logprobs(), &reference, 0.05);
    check(&rewarded.rewards.concat(), &[0.01, -0.025, 0.81, -0.01, -0.28]);
    check_one(rewarded.kl, -0.05);
    let (advantages, returns) = gae(&rewarded.rewards, &values(), 1.0, 0.95);
    check(&advantages.concat(), &[0.517_525, 0.6395, 0.91, -0.261, -0.58]);
    check(&returns.concat(), &[0.717_525, 0.7395, 0.81, -0.261, -0.28]);
    check(&whiten(&advantages, true).concat(), &WHITENED);
    check(
        &whiten(&advantages, false).concat(),
        &[0.674_603_38, 0.866_935_44, 1.293_464_02, -0.552_986_86, -1.055_990_98],
    );
}

const WHITENED: [f64; 5] = [0.429_398_38, 0.621_730_44, 1.048_259_02, -0.798_191_86, -1.301_195_98];

#[test]
fn the_policy_loss_is_pytorchs() {
    let advantages = WHITENED.map(|advantage| advantage as f32);
    let out = policy_loss(&[-1.0, -0.6, -1.2, -0.75, -1.9], &logprobs().concat(), &advantages, 0.2);
    check_one(out.loss, -0.096_399_67);
    check(&out.grad, &[0.0, -0.101_805_97, 0.0, 0.151_852_72, 0.0]);
    check_one(out.clipfrac, 0.6);
    check_one(out.approxkl, 0.088_25);
    check_one(out.ratio, 1.177_444_78);
    check_one(out.ratio_var, 0.384_365_62);
}

#[test]
fn the_value_loss_is_pytorchs() {
    let returns = [0.717_525, 0.7395, 0.81, -0.261, -0.28];
    let out = value_loss(&[0.5, 0.05, -0.4, 0.1, 0.32], &values().concat(), &returns, 0.2);
    check_one(out.loss, 0.253_065_34);
    check(&out.grad, &[0.0, -0.1379, -0.242, 0.0722, 0.12]);
    check_one(out.clipfrac, 0.2);
}

#[test]
fn the_reward_models_losses_are_pytorchs() {
    let pairs = bradley_terry(&[0.5, -0.2, 1.5], &[0.1, 0.4, -0.6], &[0.0; 3], &[1.0, 0.5, 2.0], 0.01);
    check_one(pairs.loss, 0.366_513_79);
    check(&pairs.dchosen, &[-0.111_232_1, -0.091_665_19, -0.052_055_33]);
    check(&pairs.drejected, &[0.118_089_24, 0.092_808_04, 0.072_626_75]);
    let apart = bradley_terry(&[0.5, -0.2, 1.5], &[0.1, 0.4, -0.6], &[0.5, 0.0, 1.0], &[1.0; 3], 0.01);
    check_one(apart.loss, 0.693_773_31);
    check(&apart.dchosen, &[-0.170_993_06, -0.213_885_44, -0.077_246_63]);
    check(&apart.drejected, &[0.178_993_06, 0.216_552_1, 0.089_246_63]);
    let singles = pointwise(&[0.5, -1.0, 2.0], &[1.0, 0.0, 0.25], &[1.0, 1.0, 0.5]);
    check_one(singles.loss, 0.640_321_07);
    check(&singles.dscores, &[-0.151_016_27, 0.107_576_57, 0.126_159_42]);
}

#[test]
fn dpo_and_ipo_are_pytorchs() {
    // The log-ratios of (−3, −12) and (−11, −8.5) to (−4.5, −11) and (−10.8, −12).
    let (chosen, rejected) = ([1.5, -1.0], [-0.2, 3.5]);
    let out = dpo(&chosen, &rejected, 0.1);
    check_one(out.loss, 0.777_502_14);
    check(&out.dchosen, &[-0.022_880_1, -0.030_531_96]);
    check(&out.drejected, &[0.022_880_1, 0.030_531_96]);
    check_one(out.accuracy, 0.5);
    let out = ipo(&chosen, &rejected, &[(3, 4), (5, 2)], 0.1);
    check_one(out.loss, 34.0525);
    check(&out.dchosen, &[-1.483_333_33, -1.39]);
    check(&out.drejected, &[1.1125, 3.475]);
}

#[test]
fn kto_is_pytorchs() {
    let lambda = KtoWeights { desirable: 1.0, undesirable: 1.3 };
    let kl = (-0.4 + 1.2 + 0.1) / 3.0;
    let desirable = [true, false, true, true, false];
    let out = kto(&[1.5, -0.2, -1.0, 0.3, 3.5], &desirable, &[1.0; 5], kl, 0.1, lambda);
    check_one(out.loss, 0.577_873_03);
    check(&out.dratios, &[-0.004_982_04, 0.006_495_94, -0.004_978_93, -0.005, 0.006_336_4]);
    let twice = kto(&[1.5, 1.5, 3.5], &[true, true, false], &[1.0; 3], -7.0, 0.1, lambda);
    let weighed = kto(&[1.5, 3.5], &[true, false], &[2.0, 1.0], 0.0, 0.1, lambda);
    check_one(twice.loss, weighed.loss);
}

#[test]
fn rloo_is_pytorchs() {
    let scores = [1.0, 0.2, -0.5, 0.3, 2.0, 2.0, 2.0, 2.0];
    let groups = [0, 0, 0, 0, 1, 1, 1, 1];
    let f32s = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect::<Vec<f32>>();
    let plain = [1.0, -0.066_666_67, -1.0, 0.066_666_67, 0.0, 0.0, 0.0, 0.0];
    check(&f32s(leave_one_out(&scores, &groups, false)), &plain);
    let normalized = [1.866_336_72, -0.124_422_45, -1.866_336_72, 0.124_422_45, 0.0, 0.0, 0.0, 0.0];
    check(&f32s(leave_one_out(&scores, &groups, true)), &normalized);
    assert_eq!(leave_one_out(&[3.0], &[0], false), [0.0]);
    let out = policy_loss(&[-4.0, -6.1, -2.0], &[-4.1, -5.5, -2.5], &[0.7, -0.4, 1.1], 0.2);
    check_one(out.loss, -0.591_206_55);
    check(&out.grad, &[-0.257_873_21, 0.0, 0.0]);
}

#[test]
fn grpo_is_pytorchs() {
    let scores = [1.0, 0.2, -0.5, 0.3, 2.0, 2.0, 2.0, 2.0];
    let groups = [0, 0, 0, 0, 1, 1, 1, 1];
    let f32s = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect::<Vec<f32>>();
    let scaled = [1.221_833_17, -0.081_455_54, -1.221_833_17, 0.081_455_54, 0.0, 0.0, 0.0, 0.0];
    check(&f32s(group_relative(&scores, &groups, true)), &scaled);
    let plain = [0.75, -0.05, -0.75, 0.05, 0.0, 0.0, 0.0, 0.0];
    check(&f32s(group_relative(&scores, &groups, false)), &plain);

    let new = [-1.0, -0.6, -1.2, -0.75, -1.9];
    let (old, reference) = (logprobs().concat(), [-1.0, -0.9, -1.8, -0.9, -1.1]);
    let advantages = [0.8, 0.8, -0.5, -0.5, -0.5];
    let out = grpo_loss(&new, &old, &reference, &advantages, &[0.2; 5], (0.2, 0.04));
    check_one(out.policy.loss, 0.079_687_14);
    check_one(out.kl, 0.125_175_75);
    check(&out.policy.grad, &[0.0, -0.128_923_47, 0.226_163_6, 0.096_237_28, -0.009_804_33]);
    let weights = [0.25, 0.25, 1.0 / 6.0, 1.0 / 6.0, 1.0 / 6.0];
    let out = grpo_loss(&new, &old, &reference, &advantages, &weights, (0.2, 0.04));
    check_one(out.policy.loss, -0.068_040_04);
    check_one(out.kl, 0.107_714_65);
    check(&out.policy.grad, &[0.0, -0.161_154_33, 0.188_469_67, 0.080_197_73, -0.008_170_27]);
}

#[test]
fn adamw_is_pytorchs() {
    let config = adamw::Config { learning_rate: 0.1, weight_decay: 0.01, ..Default::default() };
    let mut optimiser = AdamW::new(config);
    let mut parameters = vec![vec![1.0, -2.0, 0.5]];
    let trace = [
        ([0.5, -1.0, 0.1], [0.899, -1.898, 0.3995]),
        ([0.2, 0.3, -2.0], [0.816_613_2, -1.842_169_17, 0.467_173_58]),
        ([-0.7, 0.05, 0.4], [0.834_964_22, -1.802_235_84, 0.491_499_19]),
    ];
    for (gradient, expected) in trace {
        parameters = optimiser.step(parameters, vec![gradient.to_vec()], 1.0, 1.0).unwrap();
        check(&parameters[0], &expected);
    }
}

#[test]
fn a_gradient_that_is_no_number_is_refused() {
    let mut optimiser = AdamW::new(adamw::Config::default());
    let refused = optimiser.step(vec![vec![1.0]], vec![vec![f32::NAN]], 1.0, 1.0);
    assert_eq!(refused, Err(adamw::Error::NotFinite));
}
