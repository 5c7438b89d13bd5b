//! The same kernels as tensor operations, for every device and type. What is summed is summed in f32.

use candle_core::{D, DType, Result, Tensor};

/// The numbers in the type in which they are summed: f32, or f64 for those that are f64.
pub(crate) fn widened(x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F64 { Ok(x.clone()) } else { x.to_dtype(DType::F32) }
}

/// `a b`, of operands that cuBLAS may not take as they lie: it wants rows or columns without gaps.
pub(crate) fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    gapless(a)?.matmul(&gapless(b)?)
}

fn gapless(x: &Tensor) -> Result<Tensor> {
    if x.is_contiguous() || x.t()?.is_contiguous() { Ok(x.clone()) } else { x.contiguous() }
}

pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    let wide = widened(x)?;
    let normed = wide.broadcast_mul(&inverse_rms(&wide, epsilon)?)?;
    normed.broadcast_mul(&widened(weight)?)?.to_dtype(x.dtype())
}

pub(super) fn rms_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    let (wide, hidden) = (widened(x)?, x.dim(1)?);
    let scale = inverse_rms(&wide, epsilon)?;
    let weighted = widened(dy)?.broadcast_mul(&widened(weight)?)?;
    let shrink = ((&weighted * &wide)?.sum_keepdim(1)? * scale.sqr()?)?.affine(1.0 / hidden as f64, 0.0)?;
    let dx = (weighted - wide.broadcast_mul(&shrink)?)?.broadcast_mul(&scale)?;
    let dx = onto.map_or_else(|| Ok(dx.clone()), |onto| &dx + widened(onto)?)?;
    dx.to_dtype(x.dtype())
}

/// `[rows, 1]`.
fn inverse_rms(x: &Tensor, epsilon: f32) -> Result<Tensor> {
    (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(epsilon))?.sqrt()?.recip()
}

pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let wide = widened(gate)?;
    ((&wide * sigmoid(&wide)?)? * widened(up)?)?.to_dtype(gate.dtype())
}

pub(super) fn swiglu_backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (dy, x, up) = (widened(dy)?, widened(gate)?, widened(up)?);
    let s = sigmoid(&x)?;
    let slope = (&s * (((1.0 - &s)? * &x)? + 1.0)?)?;
    let dgate = ((&dy * up)? * slope)?.to_dtype(gate.dtype())?;
    let dup = ((dy * x)? * s)?.to_dtype(gate.dtype())?;
    Tensor::cat(&[dgate, dup], 1)
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::Device;

    use super::*;
    use crate::policy::{
        RopeScaling,
        ops::{self, tests::matrix},
        rope::Rope,
    };

    /// The widest gap between two tensors of any type.
    pub(crate) fn gap(a: &Tensor, b: &Tensor) -> f64 {
        let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
        let gaps = (wide(a) - wide(b)).unwrap().abs().unwrap().flatten_all().unwrap();
        gaps.max(0).unwrap().to_scalar().unwrap()
    }

    /// What a kernel makes of tensors, in other types, against what it makes of slices.
    #[track_caller]
    fn check(inputs: &[&Tensor], kernel: impl Fn(&[Tensor]) -> Tensor) {
        let placed =
            |dtype| -> Vec<Tensor> { inputs.iter().map(|input| input.to_dtype(dtype).unwrap()).collect() };
        let slices = kernel(&placed(DType::F32));
        for (dtype, tolerance) in [(DType::F64, 1e-5), (DType::BF16, 0.06)] {
            let tensors = kernel(&placed(dtype));
            assert_eq!((tensors.dtype(), tensors.dims()), (dtype, slices.dims()));
            let gap = gap(&tensors, &slices);
            assert!(gap < tolerance, "{dtype:?}: {gap}");
        }
    }

    #[test]
    fn norms_and_activations_are_those_of_slices() {
        let (x, dy, up) = (matrix(5, 40, 1), matrix(5, 40, 2), matrix(5, 40, 3));
        let weight = matrix(1, 40, 4).squeeze(0).unwrap();
        check(&[&x, &weight], |t| ops::rms_norm(&t[0], &t[1], 1e-5).unwrap());
        check(&[&dy, &x, &weight], |t| ops::rms_norm_backward(&t[0], &t[1], &t[2], 1e-5, None).unwrap());
        check(&[&dy, &x, &weight, &up], |t| {
            ops::rms_norm_backward(&t[0], &t[1], &t[2], 1e-5, Some(&t[3])).unwrap()
        });
        check(&[&x, &up], |t| ops::swiglu(&t[0], &t[1]).unwrap());
        check(&[&dy, &x, &up], |t| ops::swiglu_backward(&t[0], &t[1], &t[2]).unwrap());
        check(&[&x, &up], |t| ops::sum(&t[0], &t[1]).unwrap());
    }

    #[test]
    fn rotations_are_those_of_slices() {
        let x = matrix(4, 48, 5);
        let scaling = RopeScaling::Linear { factor: 2.0 };
        let angles = || Rope::new(16, 10_000.0, &scaling).angles(&[0, 1, 31, 500]);
        check(&[&x], |t| angles().rotate(&t[0]).unwrap());
        check(&[&x], |t| angles().rotate_backward(t[0].clone()).unwrap());
    }

    #[test]
    fn products_take_any_layout() {
        let (a, b) = (matrix(6, 8, 6), matrix(6, 8, 7));
        let expected = a.narrow(1, 2, 4).unwrap().contiguous().unwrap();
        let expected =
            expected.matmul(&b.narrow(1, 1, 4).unwrap().contiguous().unwrap().t().unwrap()).unwrap();
        let found = product(&a.narrow(1, 2, 4).unwrap(), &b.narrow(1, 1, 4).unwrap().t().unwrap()).unwrap();
        assert!(gap(&found, &expected) < 1e-6 && found.device().same_device(&Device::Cpu));
    }
}
