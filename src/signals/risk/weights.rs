//! The fitted weights, one a feature, in the order of [`super::features`].
//!
//! Penalised logistic regression towards what the cues mean (`½·10·Σ (b − b₀)²`), Newton's method. Rows: first turns of
//! HH-RLHF's harmless part as harmful (noisy, so only those with a cue, weight 0.6), requests of OASST, PandaLM and LLMBar as
//! benign, and 120 contrasting sentences of our own with weight 6 ("kill a thread", "kill my neighbour").

use super::FEATURES;

#[rustfmt::skip]
pub(super) const HARMFUL: [f64; FEATURES] = [
    -1.788, 1.243, 2.265, -1.954, 1.297, 1.942, 2.360, 0.556, 1.336, 2.518,
    1.203, 2.580, 0.384, 2.178, 1.779, 2.734, 1.805, 0.284, -1.470, 1.234,
    -1.351, 0.736, 0.809, -1.255, -2.521, -0.990, -0.650,
];
