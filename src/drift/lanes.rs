//! The arithmetic of the detectors' inner loops: the grid's points side by side, so that each loop over them is
//! a few vector instructions. Sums have one fixed order, so every instruction set gives the same bits.

use std::f64::consts::LOG2_E;

/// Points of the grid over the unknown baseline, and how many standard deviations it reaches either way.
pub(super) const GRID: usize = 21;
const REACH: f64 = 4.0;

/// The size of the changes that are mixed over, in standard deviations of one reading.
pub(super) const KAPPA: [f64; 5] = [0.08, 0.16, 0.32, 0.64, 1.28];

/// An alternative goes at most this far of the way to the end of the interval.
pub(super) const CAP: f64 = 0.95;

/// The grid padded to whole vector registers. The padding repeats the last point and weighs nothing.
pub(super) const LANES: usize = 24;
const WIDTH: usize = 8;

/// One value for each point of the grid.
pub(super) type Row = [f64; LANES];

/// `f(z)` for each point of the grid, `z` in standard deviations from the estimate.
pub(super) fn grid(f: impl Fn(f64) -> f64) -> Row {
    let last = (GRID - 1) as f64;
    std::array::from_fn(|g| f(2.0 * REACH * g.min(GRID - 1) as f64 / last - REACH))
}

/// 1 on the grid, 0 on the padding.
pub(super) fn live() -> Row {
    std::array::from_fn(|g| if g < GRID { 1.0 } else { 0.0 })
}

#[inline(always)]
pub(super) fn sum(row: &Row) -> f64 {
    let mut lanes = [0.0; WIDTH];
    for chunk in row.chunks_exact(WIDTH) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
}

#[inline(always)]
pub(super) fn max(row: &Row) -> f64 {
    let mut lanes = [f64::NEG_INFINITY; WIDTH];
    for chunk in row.chunks_exact(WIDTH) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.into_iter().fold(f64::NEG_INFINITY, f64::max)
}

/// `exp` to within two units in the last place, saturating beyond ±700. The standard library's is a call for
/// each value, which the compiler cannot vectorise.
#[inline(always)]
pub(super) fn exp(row: &Row) -> Row {
    // Adding and taking away 1.5·2^52 rounds to an integer, which then also stands in the low bits.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const LN_2_HIGH: f64 = 0.693_147_180_369_123_816_490;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_700_02e-10;
    // 1/k!, from k = 13 down to 0.
    const SERIES: [f64; 14] = [
        1.0 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    let mut result = [0.0; LANES];
    for (result, &x) in result.iter_mut().zip(row) {
        let x = if x < -700.0 { -700.0 } else { x };
        let x = if x > 700.0 { 700.0 } else { x };
        let shifted = x * LOG2_E + ROUND;
        let whole = shifted - ROUND;
        let rest = (x - whole * LN_2_HIGH) - whole * LN_2_LOW;
        let mut series = SERIES[0];
        for coefficient in &SERIES[1..] {
            series = series * rest + coefficient;
        }
        *result = series * f64::from_bits((shifted.to_bits() << 52).wrapping_add(1.0_f64.to_bits()));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_standard_library() {
        for step in -70_000..70_000 {
            let x = f64::from(step) / 100.0 + 0.001_234;
            let (ours, exact) = (exp(&[x; LANES])[17], x.exp());
            assert!((ours / exact - 1.0).abs() < 5e-16, "exp({x}) = {ours}, not {exact}");
        }
        let far = exp(&[f64::NEG_INFINITY; LANES])[0];
        assert!(far > 0.0 && far < 1e-300);
    }

    #[test]
    fn padding_weighs_nothing() {
        assert_eq!(sum(&live()) as usize, GRID);
        assert_eq!(grid(|z| z)[..=2], [-4.0, -3.6, -3.2]);
        assert_eq!(grid(|z| z)[LANES - 1].to_bits(), 4.0_f64.to_bits());
    }
}
