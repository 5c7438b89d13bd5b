//! Losses and advantages against PyTorch 2.15.

use super::{
    adamw::{self, AdamW},
    advantages::{gae, rewards, whiten},
    losses::{bradley_terry, dpo, pointwise, policy_loss, value_loss},
};

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
/// pc = T([-10.0,-12.0]).requires_grad_(); pr = T([-11.0,-11.5]).requires_grad_()
/// d = -F.logsigmoid(0.1 * ((pc - T([-10.5,-11.0])) - (pr - T([-10.8,-12.0])))).mean(); d.backward()
/// p = torch.nn.Parameter(torch.tensor([1.0,-2.0,0.5])); o = torch.optim.AdamW([p], lr=0.1, weight_decay=0.01)
/// for g in ([0.5,-1.0,0.1], [0.2,0.3,-2.0]):
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
    let pairs = bradley_terry(&[0.5, -0.2, 1.5], &[0.1, 0.4, -0.6], &[1.0, 0.5, 2.0], 0.01);
    check_one(pairs.loss, 0.366_513_79);
    check(&pairs.dchosen, &[-0.111_232_1, -0.091_665_19, -0.052_055_33]);
    check(&pairs.drejected, &[0.118_089_24, 0.092_808_04, 0.072_626_75]);
    let singles = pointwise(&[0.5, -1.0, 2.0], &[1.0, 0.0, 0.25], &[1.0, 1.0, 0.5]);
    check_one(singles.loss, 0.640_321_07);
    check(&singles.dscores, &[-0.151_016_27, 0.107_576_57, 0.126_159_42]);
}

#[test]
fn dpo_is_pytorchs() {
    let out = dpo(&[-10.0, -12.0], &[-11.0, -11.5], &[-10.5, -11.0], &[-10.8, -12.0], 0.1);
    check_one(out.loss, 0.714_858_3);
    check(&out.dchosen, &[-0.024_125_36, -0.026_871_49]);
    check(&out.drejected, &[0.024_125_36, 0.026_871_49]);
}

#[test]
fn adamw_is_pytorchs() {
    let config = adamw::Config { learning_rate: 0.1, weight_decay: 0.01, ..Default::default() };
    let mut optimiser = AdamW::new(config);
    let mut parameters = vec![vec![1.0, -2.0, 0.5]];
    for gradient in [[0.5, -1.0, 0.1], [0.2, 0.3, -2.0]] {
        parameters = optimiser.step(parameters, vec![gradient.to_vec()], 1.0, 1.0).unwrap();
    }
    check(&parameters[0], &[0.816_613, -1.842_169, 0.467_174]);
}

#[test]
fn a_gradient_that_is_no_number_is_refused() {
    let mut optimiser = AdamW::new(adamw::Config::default());
    let refused = optimiser.step(vec![vec![1.0]], vec![vec![f32::NAN]], 1.0, 1.0);
    assert_eq!(refused, Err(adamw::Error::NotFinite));
}
