//! A frozen matrix of the base in the form in which the file has it: dense f32, or quantised blocks.

use std::sync::Arc;

use candle_core::{
    DType, Device, Result, Tensor,
    quantized::{GgmlDType, QTensor},
};

use super::{
    device::Placement,
    lora::Pair,
    ops::{Onto, product, read},
    packed::{Bits, Packed},
};

/// `[out, in]`, frozen; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) enum Linear {
    Dense(Tensor),
    Packed(Arc<Packed>),
}

impl Linear {
    /// A tensor of a GGUF file: Q4_0, Q4_1 and Q8_0 matrices stay packed, everything else becomes f32.
    pub(crate) fn from_gguf(tensor: &QTensor) -> Result<Self> {
        let packed = match *tensor.shape().dims() {
            [out, input] => pack(out, input, tensor.dtype(), &tensor.data()?),
            _ => None,
        };
        match packed {
            Some(packed) => Ok(Self::Packed(Arc::new(packed))),
            None => Ok(Self::Dense(tensor.dequantize(&Device::Cpu)?)),
        }
    }

    /// Any float tensor, as f32.
    pub(crate) fn dense_f32(tensor: &Tensor) -> Result<Self> {
        Ok(Self::Dense(tensor.to_dtype(DType::F32)?.contiguous()?))
    }

    pub(crate) fn dims(&self) -> Vec<usize> {
        match self {
            Self::Dense(tensor) => tensor.dims().to_vec(),
            Self::Packed(packed) => packed.dims().to_vec(),
        }
    }

    /// All weights as f32; a copy where they are packed.
    pub(crate) fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Packed(packed) => Tensor::from_vec(packed.dense(), &packed.dims(), &Device::Cpu),
        }
    }

    /// The same matrix where the device is: dense, wherever that is not the CPU's own form.
    pub(crate) fn placed(self, placement: &Placement) -> Result<Self> {
        if placement.has_slices() { Ok(self) } else { Ok(Self::Dense(placement.place(&self.dense()?)?)) }
    }

    /// [`Linear::dense`] into a place of that size, with a pair's `scale · B A` in it.
    pub(crate) fn unpack(&self, dense: &mut [f32], update: Option<(&Pair, f64)>) -> Result<()> {
        match self {
            Self::Dense(tensor) => {
                read(tensor, |weights| dense.copy_from_slice(weights))?;
                update.map_or(Ok(()), |(pair, scale)| pair.add_to(dense, scale as f32))
            }
            Self::Packed(packed) => {
                let update = update.map(|(pair, scale)| pair.lanes(scale)).transpose()?;
                packed.unpack(dense, update);
                Ok(())
            }
        }
    }

    /// `x Wᵀ`: `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => product(x, &tensor.t()?, 1.0, Onto::New(x.dtype())),
            Self::Packed(packed) => Ok(Packed::products(&[packed], x)?.swap_remove(0)),
        }
    }

    /// [`Linear::forward`] of several matrices on one input: packed ones share the work out to the threads once.
    pub(crate) fn forward_all<const N: usize>(linears: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let mut packed = Vec::with_capacity(N);
        for linear in linears {
            if let Self::Packed(matrix) = linear {
                packed.push(&**matrix);
            }
        }
        let products = if packed.is_empty() { Vec::new() } else { Packed::products(&packed, x)? };
        let mut products = products.into_iter();
        let mut all = Vec::with_capacity(N);
        for linear in linears {
            let product = match linear {
                Self::Packed(_) => products.next(),
                Self::Dense(_) => None,
            };
            all.push(product.map_or_else(|| linear.forward(x), Ok)?);
        }
        all.try_into().map_err(|_| candle_core::Error::Msg("as many products as matrices".to_owned()))
    }

    /// Dense matrices one below the other, and each as rows of that.
    pub(crate) fn joined<const N: usize>(linears: [Self; N]) -> Result<(Tensor, [Self; N])> {
        let dense = linears.iter().map(Self::dense).collect::<Result<Vec<_>>>()?;
        let joined = Tensor::cat(&dense, 0)?;
        let mut row = 0;
        let rows = linears.map(|linear| {
            let count = linear.dims()[0];
            row += count;
            joined.narrow(0, row - count, count).map(Self::Dense)
        });
        let rows = rows.into_iter().collect::<Result<Vec<_>>>()?;
        let rows = rows.try_into().map_err(|_| candle_core::Error::Msg("as many as before".to_owned()))?;
        Ok((joined, rows))
    }

    /// The matrices if all of them are packed.
    pub(crate) fn packed<const N: usize>(linears: [&Self; N]) -> Option<[&Packed; N]> {
        let packed: Vec<&Packed> = linears
            .into_iter()
            .filter_map(|linear| if let Self::Packed(packed) = linear { Some(&**packed) } else { None })
            .collect();
        packed.try_into().ok()
    }

    /// The gradient of [`Linear::forward`] with respect to its input, `dy W`, on what is there.
    pub(crate) fn backward(&self, dy: &Tensor, onto: Onto) -> Result<Tensor> {
        product(dy, &self.dense()?, 1.0, onto)
    }

    /// The matrix's rows of these numbers, as an embedding looks its tokens up.
    pub(crate) fn select(&self, rows: &[u32]) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => tensor.index_select(&Tensor::new(rows, tensor.device())?, 0),
            Self::Packed(packed) => {
                let [out, input] = packed.dims();
                if let Some(row) = rows.iter().find(|row| **row as usize >= out) {
                    candle_core::bail!("there is no row {row} among {out}")
                }
                let mut picked = Vec::with_capacity(rows.len() * input);
                for row in rows {
                    packed.unpack_row(*row as usize, &mut picked);
                }
                Tensor::from_vec(picked, (rows.len(), input), &Device::Cpu)
            }
        }
    }

    /// The same matrix with its rows in another order: row `i` becomes what `from(i)` was.
    pub(crate) fn reordered(&self, from: impl Fn(usize) -> usize) -> Result<Self> {
        match self {
            Self::Dense(tensor) => {
                let order: Vec<u32> = (0..tensor.dim(0)?).map(|row| from(row) as u32).collect();
                Ok(Self::Dense(tensor.index_select(&Tensor::new(order, tensor.device())?, 0)?))
            }
            Self::Packed(packed) => Ok(Self::Packed(Arc::new(packed.reordered(from)))),
        }
    }
}

/// Packs ggml's blocks anew; `None` for types and widths that are not kept packed.
fn pack(out: usize, input: usize, kind: GgmlDType, data: &[u8]) -> Option<Packed> {
    // A block begins with its scale, in Q4_1 followed by its offset, both f16; then come its weights: of four bits the
    // low halves of 16 bytes are the first 16, the high halves the others.
    let (bits, head, zero) = match kind {
        GgmlDType::Q4_0 => (Bits::Four, 2, 8),
        GgmlDType::Q4_1 => (Bits::Four, 4, 0),
        GgmlDType::Q8_0 => (Bits::Eight, 2, 128),
        _ => return None,
    };
    let bytes = head + Packed::BLOCK * bits.count() / 8;
    if !input.is_multiple_of(Packed::BLOCK) || data.len() != out * input / Packed::BLOCK * bytes {
        return None;
    }
    let mut packed = Packed::empty(out, input, bits, zero);
    let mut quants = Vec::with_capacity(Packed::BLOCK);
    for (block, bytes) in data.chunks_exact(bytes).enumerate() {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let (scale, offset) = (half(0), if head == 4 { half(2) } else { 0 });
        quants.clear();
        match bits {
            Bits::Four => {
                quants.extend(bytes[head..].iter().map(|byte| byte & 15));
                quants.extend(bytes[head..].iter().map(|byte| byte >> 4));
            }
            // From −128..128 to 0..256.
            Bits::Eight => quants.extend(bytes[head..].iter().map(|byte| byte ^ 128)),
        }
        packed.put(block, [scale, offset], &quants)?;
    }
    Some(packed)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    /// A matrix in ggml's blocks, and what candle reads from them.
    #[track_caller]
    fn check(kind: GgmlDType) {
        let (out, input) = (37, 192);
        let mut rng = StdRng::seed_from_u64(5);
        let mut random =
            |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random::<f32>() - 0.4).collect() };
        let source = Tensor::from_vec(random(out * input), (out, input), &Device::Cpu).unwrap();
        let quantised = QTensor::quantize(&source, kind).unwrap();
        let expected = quantised.dequantize(&Device::Cpu).unwrap();
        let linear = Linear::from_gguf(&quantised).unwrap();
        assert!(matches!(linear, Linear::Packed(_)), "{kind:?}");
        assert_eq!(linear.dims(), [out, input]);
        let far = |a: &Tensor, b: &Tensor| {
            (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
        };
        assert!(far(&linear.dense().unwrap(), &expected) < 1e-6, "{kind:?}");
        let picked = linear.select(&[3, 36, 3]).unwrap();
        assert!(far(&picked.narrow(0, 1, 1).unwrap(), &expected.narrow(0, 36, 1).unwrap()) < 1e-6);
        assert!(linear.select(&[37]).is_err());
        let turned = linear.reordered(|row| out - 1 - row).unwrap().dense().unwrap();
        assert!(far(&turned.narrow(0, 0, 1).unwrap(), &expected.narrow(0, 36, 1).unwrap()) < 1e-6);
        for rows in [1, 2, 3, 5, 8, 15, 30, 57] {
            let x = Tensor::from_vec(random(rows * input), (rows, input), &Device::Cpu).unwrap();
            let y = linear.forward(&x).unwrap();
            assert!(far(&y, &x.matmul(&expected.t().unwrap()).unwrap()) < 1e-4, "{kind:?}, {rows} rows");
            let alone = linear.forward(&x.narrow(0, rows - 1, 1).unwrap()).unwrap();
            assert!(
                far(&y.narrow(0, rows - 1, 1).unwrap(), &alone) == 0.0,
                "{kind:?}, a row of {rows} and alone"
            );
            let [first, second] = Linear::forward_all([&linear, &linear], &x).unwrap();
            assert!(far(&y, &first) == 0.0 && far(&y, &second) == 0.0, "{kind:?}, {rows} rows");
            let back = linear.backward(&y, Onto::New(DType::F32)).unwrap();
            assert!(far(&back, &y.matmul(&expected).unwrap()) < 1e-3, "{kind:?}, {rows} rows");
        }
    }

    #[test]
    fn packed_blocks_multiply_as_the_file_says() {
        check(GgmlDType::Q4_0);
        check(GgmlDType::Q4_1);
        check(GgmlDType::Q8_0);
    }

    #[test]
    fn what_does_not_fit_is_dense() {
        for (kind, input) in [(GgmlDType::Q6K, 256), (GgmlDType::F16, 64)] {
            let source = Tensor::ones((2, input), DType::F32, &Device::Cpu).unwrap();
            let linear = Linear::from_gguf(&QTensor::quantize(&source, kind).unwrap()).unwrap();
            assert!(matches!(linear, Linear::Dense(_)), "{kind:?}");
        }
    }
}
