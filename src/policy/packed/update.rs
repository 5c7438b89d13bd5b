//! Low-rank updates of packed weights: `x (W + B A)ᵀ` for the price of a few more inputs.
//!
//! `x Aᵀ` stands beside `x`, and `B` beside the packed weights, so that what is added goes into the same sums. Rows of several
//! adapters, or of none, are multiplied together: each adapter has inputs of its own, which are 0 in the rows of the others.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{PARALLEL_WORK, Packed, Panels, STRIP, registers};
use crate::policy::ops::read;

/// A small matrix `[out, in]` in f32, in the order in which the kernels read it: [`STRIP`] outputs side by side, those of the
/// next input after them.
#[derive(Debug, Clone)]
pub(crate) struct Lanes {
    out: usize,
    pub(super) input: usize,
    pub(super) values: Vec<f32>,
}

/// What an adapter makes of some matrices in some rows: its scaled `A` and its `B`, a pair for each matrix.
#[derive(Debug)]
pub(crate) struct Update<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) pairs: Vec<&'a [Lanes; 2]>,
}

/// One update's share in the products of one matrix.
pub(super) struct Beside<'a> {
    pub(super) b: &'a Lanes,
    /// `x Aᵀ`, interleaved as `x` is.
    pub(super) middle: Vec<f32>,
}

impl Lanes {
    /// `scale` times the matrix.
    pub(crate) fn new(matrix: &Tensor, scale: f64) -> Result<Self> {
        let (out, input) = matrix.dims2()?;
        let mut values = vec![0f32; out.next_multiple_of(STRIP) * input];
        read(matrix, |matrix| {
            for (row, weights) in matrix.chunks_exact(input).enumerate() {
                let lanes = values[row / STRIP * STRIP * input + row % STRIP..].iter_mut().step_by(STRIP);
                lanes.zip(weights).for_each(|(lane, weight)| *lane = weight * scale as f32);
            }
        })?;
        Ok(Self { out, input, values })
    }

    /// Of [`STRIP`] outputs, those side by side of each input.
    pub(super) fn strip(&self, nth: usize) -> &[f32] {
        &self.values[nth * self.input * STRIP..(nth + 1) * self.input * STRIP]
    }

    /// `x Wᵀ`, `[rows, out]`.
    fn product(&self, x: &Panels) -> Vec<f32> {
        let mut y = vec![0f32; x.rows() * self.out];
        let mut tasks = Vec::with_capacity(x.groups.len());
        let (mut values, mut rest) = (&x.values[..], &mut y[..]);
        for size in &x.groups {
            let (panel, others) = values.split_at(size * self.input);
            let (rows, below) = rest.split_at_mut(size * self.out);
            tasks.push((*size, panel, rows));
            (values, rest) = (others, below);
        }
        let arch = Arch::new();
        let fill = |(size, x, y): (usize, &[f32], &mut [f32])| match size {
            1 => arch.dispatch(Products::<1> { lanes: self, x, y }),
            2 => arch.dispatch(Products::<2> { lanes: self, x, y }),
            4 => arch.dispatch(Products::<4> { lanes: self, x, y }),
            8 => arch.dispatch(Products::<8> { lanes: self, x, y }),
            16 => arch.dispatch(Products::<16> { lanes: self, x, y }),
            _ => arch.dispatch(Products::<24> { lanes: self, x, y }),
        };
        if self.values.len() * x.rows() < PARALLEL_WORK {
            tasks.into_iter().for_each(fill);
        } else {
            tasks.into_par_iter().for_each(fill);
        }
        y
    }
}

impl Packed {
    /// [`Packed::products`] with each update's `(x Aᵀ) Bᵀ` added to its rows; and the last update's `x Aᵀ` for each matrix,
    /// `[rows, rank]`, 0 in rows that are not its own.
    pub(crate) fn updated(
        matrices: &[&Self],
        x: &Tensor,
        updates: &[Update<'_>],
    ) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let panels = Panels::new(x)?;
        let mut middles = Vec::new();
        let mut beside: Vec<Vec<Beside<'_>>> = matrices.iter().map(|_| Vec::new()).collect();
        for Update { rows, pairs } in updates {
            middles.clear();
            for ([a, b], beside) in pairs.iter().zip(&mut beside) {
                let mut middle = a.product(&panels);
                middle[..rows.start * a.out].fill(0.0);
                middle[rows.end * a.out..].fill(0.0);
                beside.push(Beside { b, middle: panels.alike(&middle) });
                middles.push(Tensor::from_vec(middle, (panels.rows(), a.out), &Device::Cpu)?);
            }
        }
        Ok((Self::of_panels(matrices, &panels, &beside)?, middles))
    }
}

/// `R` interleaved rows times a matrix, to `[R, out]`. Every sum runs over the inputs in their order.
struct Products<'a, const R: usize> {
    lanes: &'a Lanes,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl<const R: usize> WithSimd for Products<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { lanes: Lanes { out, input, values }, x, y } = self;
        for (nth, strip) in values.chunks_exact(input * STRIP).enumerate() {
            let mut lanes = [[0f32; STRIP]; R];
            for register in 0..registers::<S>() {
                let mut sums = [simd.splat_f32s(0.0); R];
                for (weights, x) in strip.chunks_exact(STRIP).zip(x.chunks_exact(R)) {
                    let weights = S::as_simd_f32s(weights).0[register];
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = simd.mul_add_e_f32s(weights, simd.splat_f32s(*x), *sum);
                    }
                }
                for (lanes, sum) in lanes.iter_mut().zip(sums) {
                    S::as_mut_simd_f32s(lanes).0[register] = sum;
                }
            }
            let (at, len) = (nth * STRIP, STRIP.min(out - nth * STRIP));
            for (y, lanes) in y.chunks_exact_mut(*out).zip(&lanes) {
                y[at..at + len].copy_from_slice(&lanes[..len]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use crate::policy::linear::Linear;

    use super::*;

    const INPUT: usize = 96;

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn updates_are_added_in_their_rows() {
        let mut rng = StdRng::seed_from_u64(6);
        let mut random = |rows: usize, columns: usize| {
            let values: Vec<f32> = (0..rows * columns).map(|_| rng.random::<f32>() - 0.4).collect();
            Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
        };
        let sizes = [37, 160];
        let linears = sizes.map(|out| {
            Linear::from_gguf(&QTensor::quantize(&random(out, INPUT), GgmlDType::Q4_1).unwrap()).unwrap()
        });
        let packed = Linear::packed([&linears[0], &linears[1]]).unwrap();
        // (A, B) of each matrix, of two adapters of different ranks.
        let adapters = [4, 20].map(|rank| sizes.map(|out| [random(rank, INPUT), random(out, rank)]));
        let lanes = adapters.each_ref().map(|pairs| {
            pairs.each_ref().map(|[a, b]| [Lanes::new(a, 0.5).unwrap(), Lanes::new(b, 1.0).unwrap()])
        });
        for rows in [1, 2, 3, 7, 24, 41] {
            let x = random(rows, INPUT);
            let ranges = [0..rows / 3, rows / 3 + rows / 7..rows];
            let updates: Vec<Update<'_>> = ranges
                .iter()
                .zip(&lanes)
                .map(|(rows, pairs)| Update { rows: rows.clone(), pairs: pairs.iter().collect() })
                .collect();
            let (found, middles) = Packed::updated(&packed, &x, &updates).unwrap();
            for (nth, linear) in linears.iter().enumerate() {
                let mut expected = linear.forward(&x).unwrap().to_vec2::<f32>().unwrap();
                let mut middle = vec![vec![0f32; 20]; rows];
                for (range, pairs) in ranges.iter().zip(&adapters) {
                    let [a, b] = &pairs[nth];
                    let low = (x.matmul(&a.t().unwrap()).unwrap() * 0.5).unwrap();
                    let more = low.matmul(&b.t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
                    let low = low.to_vec2::<f32>().unwrap();
                    for row in range.clone() {
                        expected[row].iter_mut().zip(&more[row]).for_each(|(y, more)| *y += more);
                        if low[row].len() == 20 {
                            middle[row].clone_from(&low[row]);
                        }
                    }
                }
                let expected = Tensor::new(expected, &Device::Cpu).unwrap();
                assert!(far(&found[nth], &expected) < 1e-4, "{rows} rows");
                assert!(
                    far(&middles[nth], &Tensor::new(middle, &Device::Cpu).unwrap()) < 1e-5,
                    "{rows} rows"
                );
            }
            // What a row becomes does not depend on those beside it.
            let last = x.narrow(0, rows - 1, 1).unwrap();
            let alone = [Update { rows: 0..1, pairs: lanes[1].iter().collect() }];
            let (alone, _) = Packed::updated(&packed, &last, &alone).unwrap();
            assert_eq!(far(&found[1].narrow(0, rows - 1, 1).unwrap(), &alone[1]), 0.0, "{rows} rows");
        }
    }
}
