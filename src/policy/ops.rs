//! The element-wise kernels of the decoder, each beside its own backward pass.
//!
//! candle's fused `rms_norm`, `rope` and `softmax_last_dim` have no backward: the gradient stops there without a word.
//! These work on the rows of contiguous f32 matrices on the CPU. Rows are shared out to threads, and `pulp` compiles each
//! loop for the widest vectors that the machine has; only what is inlined into it is, hence the attributes on closures.
//! Tensors of another device or type go to `ops/tensors.rs`.

pub(crate) mod tensors;

use std::ops::Range;

use candle_core::{DType, Result, Storage, Tensor};
use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::card;
use super::device::on_slices;

/// Rows below which waking a second thread costs more than it saves.
const PARALLEL_ROWS: usize = 16;

/// Calls `f` with the elements of a contiguous f32 tensor on the CPU, without copying them.
pub(crate) fn read<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { candle_core::bail!("the decoder's kernels run on the CPU") };
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("the decoder's kernels take contiguous tensors, not {layout:?}")
    };
    Ok(f(&storage.as_slice::<f32>()?[start..end]))
}

/// A matrix of `rows × columns` filled row by row; `fill` gets the row's index and its elements.
pub(crate) fn by_rows(
    like: &Tensor,
    columns: usize,
    fill: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<Tensor> {
    let rows = like.dim(0)?;
    let mut out = vec![0f32; rows * columns];
    for_each_row(&mut out, columns, fill);
    Tensor::from_vec(out, (rows, columns), like.device())
}

/// Runs `fill` on every row, on several threads where there are rows enough.
pub(crate) fn for_each_row(out: &mut [f32], columns: usize, fill: impl Fn(usize, &mut [f32]) + Sync) {
    let arch = Arch::new();
    let fill = &fill;
    if out.len() / columns < PARALLEL_ROWS {
        for (nth, out) in out.chunks_exact_mut(columns).enumerate() {
            arch.dispatch(Filled { fill, nth, out });
        }
    } else {
        out.par_chunks_exact_mut(columns)
            .with_min_len(4)
            .enumerate()
            .for_each(|(nth, out)| arch.dispatch(Filled { fill, nth, out }));
    }
}

/// A row to be filled. A closure in its place would be called through a shim that is not always inlined, and what is not
/// inlined is not compiled for wide vectors.
struct Filled<'a, F> {
    fill: &'a F,
    nth: usize,
    out: &'a mut [f32],
}

impl<F: Fn(usize, &mut [f32])> NullaryFnOnce for Filled<'_, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        (self.fill)(self.nth, self.out)
    }
}

/// `Σ aᵢ bᵢ`, in 32 partial sums so that it vectorises.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 32];
    let (a_chunks, b_chunks) = (a.chunks_exact(32), b.chunks_exact(32));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `out += scale · x`.
#[inline(always)]
pub(crate) fn add_scaled(out: &mut [f32], scale: f32, x: &[f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out += scale * x;
    }
}

/// What a product is made of: a new matrix of a type, or one that it is added to, which is used up.
#[derive(Debug)]
pub(crate) enum Onto {
    New(DType),
    This(Tensor),
}

/// `scale · a b`, `[rows, inner]` and `[inner, columns]`, on what is there.
pub(crate) fn product(a: &Tensor, b: &Tensor, scale: f64, onto: Onto) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if card::takes(a) {
        return match onto {
            Onto::New(dtype) => card::product(a, b, scale, dtype),
            Onto::This(out) => card::multiply(&out, a, b, scale, true).map(|()| out),
        };
    }
    let found = if on_slices(a) { a.matmul(b)? } else { tensors::product(a, b)? };
    let found = if scale == 1.0 { found } else { (found * scale)? };
    match onto {
        Onto::New(dtype) => found.to_dtype(dtype),
        Onto::This(out) => sum(&out, &found),
    }
}

/// Adds `a b` to some rows of `y`, which is used up.
pub(crate) fn add_to_rows(y: &Tensor, rows: Range<usize>, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let changed = product(a, b, 1.0, Onto::This(y.narrow(0, rows.start, rows.len())?))?;
    let all = y.dim(0)?;
    if rows.len() == all {
        return Ok(changed);
    }
    #[cfg(feature = "cuda")]
    if card::takes(y) {
        // They have been changed where they are.
        return Ok(y.clone());
    }
    Tensor::cat(&[y.narrow(0, 0, rows.start)?, changed, y.narrow(0, rows.end, all - rows.end)?], 0)
}

/// `scale · a b` of each pair, side by side.
pub(crate) fn products_beside(pairs: &[(Tensor, Tensor)], scale: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if pairs.iter().all(|(a, _)| card::takes(a)) {
        return card::products_beside(pairs, scale);
    }
    let products = pairs.iter().map(|(a, b)| product(a, &(b * scale)?, 1.0, Onto::New(a.dtype())));
    Tensor::cat(&products.collect::<Result<Vec<_>>>()?, 1)
}

/// Neighbouring columns of a matrix, in parts of so many.
pub(crate) fn columns<const N: usize>(matrix: &Tensor, widths: [usize; N]) -> Result<[Tensor; N]> {
    let mut end = 0;
    let parts = widths.map(|width| {
        end += width;
        matrix.narrow(1, end - width, width)
    });
    let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
    parts.try_into().map_err(|_| candle_core::Error::Msg("as many parts as widths".to_owned()))
}

/// `a + b`. candle's sum waits for threads of candle's own, which would compete with ours.
pub(crate) fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !on_slices(a) {
        return a + b;
    }
    let columns = a.dim(1)?;
    read(a, |a_data| {
        read(b, |b_data| {
            by_rows(
                a,
                columns,
                #[inline(always)]
                |row, out| {
                    let at = row * columns..(row + 1) * columns;
                    for ((out, a), b) in out.iter_mut().zip(&a_data[at.clone()]).zip(&b_data[at]) {
                        *out = a + b;
                    }
                },
            )
        })
    })??
}

/// `y = x / √(mean(x²) + ε) · weight`, for `x` of `[rows, hidden]`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if card::takes(x) {
        return card::rms_norm(x, weight, epsilon);
    }
    if !on_slices(x) {
        return tensors::rms_norm(x, weight, epsilon);
    }
    let hidden = x.dim(1)?;
    read(x, |x_data| {
        read(weight, |weight| {
            by_rows(
                x,
                hidden,
                #[inline(always)]
                |row, out| {
                    let x = &x_data[row * hidden..(row + 1) * hidden];
                    let scale = inverse_rms(x, epsilon);
                    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                        *out = x * scale * weight;
                    }
                },
            )
        })
    })??
}

/// The gradient of [`rms_norm`] with respect to `x`, added to `onto`; the weight is frozen.
pub(crate) fn rms_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if card::takes(x) {
        return card::rms_norm_backward(dy, x, weight, epsilon, onto);
    }
    if !on_slices(x) {
        return tensors::rms_norm_backward(dy, x, weight, epsilon, onto);
    }
    let hidden = x.dim(1)?;
    let backward = |onto: Option<&[f32]>| {
        read(dy, |dy_data| {
            read(x, |x_data| {
                read(weight, |weight| {
                    by_rows(
                        x,
                        hidden,
                        #[inline(always)]
                        |row, out| {
                            let at = row * hidden..(row + 1) * hidden;
                            let (x, dy) = (&x_data[at.clone()], &dy_data[at.clone()]);
                            let scale = inverse_rms(x, epsilon);
                            for ((out, dy), weight) in out.iter_mut().zip(dy).zip(weight) {
                                *out = dy * weight;
                            }
                            let shrink = dot(out, x) * scale * scale / hidden as f32;
                            for (out, x) in out.iter_mut().zip(x) {
                                *out = scale * (*out - x * shrink);
                            }
                            if let Some(onto) = onto {
                                add_scaled(out, 1.0, &onto[at]);
                            }
                        },
                    )
                })
            })
        })
    };
    match onto {
        Some(onto) => read(onto, |onto| backward(Some(onto)))?,
        None => backward(None),
    }???
}

#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    (dot(x, x) / x.len() as f32 + epsilon).sqrt().recip()
}

/// `silu(gate) · up`, both `[rows, intermediate]`.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if card::takes(gate) {
        return card::swiglu(gate, up);
    }
    if !on_slices(gate) {
        return tensors::swiglu(gate, up);
    }
    let columns = gate.dim(1)?;
    read(gate, |gate_data| {
        read(up, |up_data| {
            by_rows(
                gate,
                columns,
                #[inline(always)]
                |row, out| {
                    let at = row * columns..(row + 1) * columns;
                    for ((out, gate), up) in out.iter_mut().zip(&gate_data[at.clone()]).zip(&up_data[at]) {
                        *out = gate * sigmoid(*gate) * up;
                    }
                },
            )
        })
    })??
}

/// The gradients of [`swiglu`] with respect to `gate` and `up`, side by side: `[rows, 2 · intermediate]`.
pub(crate) fn swiglu_backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if card::takes(gate) {
        return card::swiglu_backward(dy, gate, up);
    }
    if !on_slices(gate) {
        return tensors::swiglu_backward(dy, gate, up);
    }
    let columns = gate.dim(1)?;
    read(dy, |dy_data| {
        read(gate, |gate_data| {
            read(up, |up_data| {
                by_rows(
                    gate,
                    2 * columns,
                    #[inline(always)]
                    |row, out| {
                        let at = row * columns..(row + 1) * columns;
                        let inputs = dy_data[at.clone()].iter().zip(&gate_data[at.clone()]).zip(&up_data[at]);
                        let (dgates, dups) = out.split_at_mut(columns);
                        for ((dgate, dup), ((dy, gate), up)) in dgates.iter_mut().zip(dups).zip(inputs) {
                            let s = sigmoid(*gate);
                            *dgate = dy * up * s * (1.0 + gate * (1.0 - s));
                            *dup = dy * gate * s;
                        }
                    },
                )
            })
        })
    })???
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `eˣ` to about 2 units in the last place, without a call, so that the loops around it vectorise.
///
/// Range reduction by powers of two and a polynomial of degree six (the scheme of Cephes' `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let power = (x * std::f32::consts::LOG2_E + 0.5).floor();
    // ln 2 in two parts, so that `power · ln 2` loses nothing.
    let r = x - power * 0.693_359_4 + power * 2.121_944_4e-4;
    let tail = ((((1.987_569_1e-4 * r + 1.398_2e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r
        + 1.666_666_5e-1)
        * r
        + 0.5;
    let mantissa = tail * r * r + r + 1.0;
    mantissa * f32::from_bits((((power as i32) + 127) << 23) as u32)
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::Device;

    use super::*;
    use crate::policy::{RopeScaling, rope::Rope};

    pub(crate) fn matrix(rows: usize, columns: usize, seed: u32) -> Tensor {
        let mut state = seed.wrapping_mul(2_654_435_761).max(1);
        let data: Vec<f32> = (0..rows * columns)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as f32 / u32::MAX as f32 * 2.0 - 1.0
            })
            .collect();
        Tensor::from_vec(data, (rows, columns), &Device::Cpu).unwrap()
    }

    /// Compares an analytic gradient with central differences of `Σ c · f(x)`.
    #[track_caller]
    fn check_gradient(x: &Tensor, dx: &Tensor, weighted: impl Fn(&Tensor) -> f64) {
        let (rows, columns) = x.dims2().unwrap();
        let data = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let dx = dx.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for at in (0..data.len()).step_by(7) {
            let moved = |by: f32| {
                let mut data = data.clone();
                data[at] += by;
                weighted(&Tensor::from_vec(data, (rows, columns), &Device::Cpu).unwrap())
            };
            let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((slope - f64::from(dx[at])).abs() < 2e-3, "element {at}: {slope} but {}", dx[at]);
        }
    }

    fn weighted_sum(y: &Tensor, by: &Tensor) -> f64 {
        f64::from((y * by).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
    }

    #[test]
    fn exp_is_close_to_the_library() {
        for i in -8000..8000 {
            let x = i as f32 / 100.0;
            assert!((exp(x) / x.exp() - 1.0).abs() < 4e-7, "exp({x}) = {} but {}", exp(x), x.exp());
        }
    }

    #[test]
    fn rms_norm_has_its_gradient() {
        let (x, weight, c) = (matrix(3, 40, 1), matrix(1, 40, 2).squeeze(0).unwrap(), matrix(3, 40, 3));
        let dx = rms_norm_backward(&c, &x, &weight, 1e-5, None).unwrap();
        let onto = rms_norm_backward(&c, &x, &weight, 1e-5, Some(&c)).unwrap();
        let difference = ((onto - &c).unwrap() - &dx).unwrap().abs().unwrap().sum_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-4);
        check_gradient(&x, &dx, |x| weighted_sum(&rms_norm(x, &weight, 1e-5).unwrap(), &c));
    }

    #[test]
    fn rotation_has_its_gradient() {
        let angles = Rope::new(8, 10_000.0, &RopeScaling::None).angles(&[0, 7, 31]);
        let (x, c) = (matrix(3, 16, 4), matrix(3, 16, 5));
        let dx = angles.rotate_backward(c.clone()).unwrap();
        check_gradient(&x, &dx, |x| weighted_sum(&angles.rotate(x).unwrap(), &c));
    }

    #[test]
    fn swiglu_has_its_gradients() {
        let (gate, up, c) = (matrix(2, 24, 6), matrix(2, 24, 7), matrix(2, 24, 8));
        let both = swiglu_backward(&c, &gate, &up).unwrap();
        let half = |from| both.narrow(1, from, 24).unwrap();
        let (dgate, dup) = (half(0), half(24));
        check_gradient(&gate, &dgate, |gate| weighted_sum(&swiglu(gate, &up).unwrap(), &c));
        check_gradient(&up, &dup, |up| weighted_sum(&swiglu(&gate, up).unwrap(), &c));
    }
}
