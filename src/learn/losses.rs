//! Losses with their gradients. The decoder's backward pass is written by hand, so the losses' is too.

mod policy;
mod preference;
mod scores;

pub use policy::{GrpoLoss, PolicyLoss, ValueLoss, grpo_loss, policy_loss, value_loss};
pub use preference::{DpoLoss, KtoLoss, KtoWeights, dpo, ipo, kto};
pub use scores::{PairLoss, PointLoss, bradley_terry, pointwise};

/// `log(1 + eˣ)` without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
