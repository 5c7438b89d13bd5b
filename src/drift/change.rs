//! Since when? The likeliest change of the mean of a finished stretch of readings.

use super::Watch;

/// A position is plausible while `2 (max l − l) ≤ 8`. Over the sums that a stream keeps, the range holds the change
/// in 89 to 98% of simulated alarms (`gyrostat bench drift --study change`).
const PLAUSIBLE: f64 = 8.0;

/// Where the mean changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChangePoint {
    /// The first reading after the likeliest change.
    pub index: usize,
    /// The first and the last position that are plausible.
    pub from: usize,
    pub to: usize,
    /// Twice the log of the likelihood ratio against no change, nats.
    pub statistic: f64,
    /// Means on both sides.
    pub before: f64,
    pub after: f64,
}

/// The two-sample GLR: the split `τ` that maximises `τ KL(m₁‖m) + (n−τ) KL(m₂‖m)` with the Bernoulli divergence.
///
/// Bits and scores in `[0, 1]` alike: the statistic is divided by the dispersion, the variance within the two
/// sides over that of bits with the same means, which is 1 for bits. `O(n)`. `None` for fewer than two readings.
pub fn change_point(data: &[f64]) -> Option<ChangePoint> {
    locate(Past::default(), data.iter().map(|x| Past::of(*x)), Watch::Both)
}

/// Neighbouring readings in sum.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Past {
    pub(super) count: u64,
    pub(super) sum: f64,
    pub(super) squares: f64,
}

impl Past {
    pub(super) fn of(reading: f64) -> Self {
        Self { count: 1, sum: reading, squares: reading * reading }
    }

    pub(super) fn and(self, later: Self) -> Self {
        Self {
            count: self.count + later.count,
            sum: self.sum + later.sum,
            squares: self.squares + later.squares,
        }
    }

    pub(super) fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }
}

/// As [`change_point`], after `past` and only for changes that `watch` looks for; positions count from the first
/// of `data`, which are readings or sums of them, and only the beginning of a sum can be one.
pub(super) fn locate(
    past: Past,
    data: impl Iterator<Item = Past> + Clone,
    watch: Watch,
) -> Option<ChangePoint> {
    let all = data.clone().fold(past, Past::and);
    let n = all.count as f64;
    let none = n * negative_entropy(all.sum / n);
    // The log-likelihood ratio of the split after `left`, none where it is not looked for.
    let ratio = |left: &Past| {
        let (n1, n2) = (left.count as f64, n - left.count as f64);
        let (m1, m2) = (left.sum / n1, (all.sum - left.sum) / n2);
        let ratio = n1 * negative_entropy(m1) + n2 * negative_entropy(m2) - none;
        (left.count > 0 && watch.admits(m2 - m1)).then_some(ratio)
    };

    let mut best: Option<(f64, usize, Past)> = None;
    let mut left = past;
    let mut ratios = Vec::with_capacity(data.size_hint().0);
    for (index, x) in data.enumerate() {
        let here = ratio(&left);
        ratios.push(here.unwrap_or(f64::NEG_INFINITY));
        if let Some(here) = here
            && best.is_none_or(|(top, ..)| here > top)
        {
            best = Some((here, index, left));
        }
        left = left.and(x);
    }
    let (top, index, left) = best?;
    let dispersion = dispersion(&left, &all);
    let plausible = |r: &f64| 2.0 * (top - r) <= PLAUSIBLE * dispersion;
    Some(ChangePoint {
        index,
        from: ratios.iter().position(plausible).unwrap_or(index),
        to: ratios.iter().rposition(plausible).unwrap_or(index),
        statistic: (2.0 * top / dispersion).max(0.0),
        before: left.sum / left.count as f64,
        after: (all.sum - left.sum) / (n - left.count as f64),
    })
}

/// The variance within the two sides, over that of bits with the same two means.
fn dispersion(left: &Past, all: &Past) -> f64 {
    let (n1, n2) = (left.count as f64, (all.count - left.count) as f64);
    let (s1, s2) = (left.sum, all.sum - left.sum);
    let bits = s1 * (1.0 - s1 / n1) + s2 * (1.0 - s2 / n2);
    let within = all.squares - s1 * s1 / n1 - s2 * s2 / n2;
    // Two constant sides: as if one reading in all had been elsewhere.
    if bits > 0.0 { (within / bits).clamp(1.0 / (n1 + n2), 1.0) } else { 1.0 }
}

/// `m ln m + (1−m) ln(1−m)`, 0 at both ends, where rounding can also put `m` a little outside.
fn negative_entropy(m: f64) -> f64 {
    if m <= 0.0 || m >= 1.0 { 0.0 } else { m * m.ln() + (1.0 - m) * (-m).ln_1p() }
}
