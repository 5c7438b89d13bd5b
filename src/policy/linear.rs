//! A frozen matrix of the base in the form in which the file has it: dense f32, or quantised blocks.
//!
//! Serving few streams is bound by how fast weights come from memory, so blocks stay packed and are unpacked in
//! registers, to the file's own values: activations are not quantised. The backward pass goes through a dense copy that
//! lives as long as its product.

use std::sync::Arc;

use candle_core::{
    DType, Device, Result, Tensor,
    quantized::{GgmlDType, QTensor},
};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::ops::read;

/// Weights that share a scale and an offset.
const BLOCK: usize = 32;
/// Words side by side: a register of AVX2, two of NEON.
const LANES: usize = 8;
/// Rows of the input that one pass over the weights serves at most: their sums fill the registers.
const TOGETHER: usize = 8;
/// Multiplications below which waking a second thread costs more than it saves.
const PARALLEL_WORK: usize = 1 << 16;

/// `[out, in]`, frozen; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) enum Linear {
    Dense(Tensor),
    Packed(Arc<Packed>),
}

/// Quantised weights, each of `bits` bits, in words of 32.
///
/// Along a row, [`LANES`] words hold `LANES · 32 / bits` neighbours: the lowest bits of all words the first [`LANES`] of
/// them, the next bits the next, so that a shift and a mask bring a register of neighbours to light.
#[derive(Debug)]
pub(crate) struct Packed {
    out: usize,
    input: usize,
    bits: Bits,
    words: Vec<u32>,
    /// `[a, b]` of each block: a weight is `a · (1 + q / 2^bits) + b`. The bits of `q` become the highest of a mantissa,
    /// so that they need no conversion to a float.
    scales: Vec<[f32; 2]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bits {
    Four,
    Eight,
}

impl Linear {
    /// A tensor of a GGUF file: Q4_0, Q4_1 and Q8_0 matrices stay packed, everything else becomes f32.
    pub(crate) fn from_gguf(tensor: &QTensor) -> Result<Self> {
        let packed = match *tensor.shape().dims() {
            [out, input] => Packed::new(out, input, tensor.dtype(), &tensor.data()?),
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
            Self::Packed(packed) => vec![packed.out, packed.input],
        }
    }

    /// All weights as f32; a copy where they are packed.
    pub(crate) fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Packed(packed) => packed.unpacked((0..packed.out).into_par_iter()),
        }
    }

    /// `x Wᵀ`: `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => x.matmul(&tensor.t()?),
            Self::Packed(packed) => packed.forward(x),
        }
    }

    /// The gradient of [`Linear::forward`] with respect to its input, `dy W`.
    pub(crate) fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        dy.matmul(&self.dense()?)
    }

    /// The matrix's rows of these numbers, as an embedding looks its tokens up.
    pub(crate) fn select(&self, rows: &[u32]) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => tensor.index_select(&Tensor::new(rows, tensor.device())?, 0),
            Self::Packed(packed) => {
                if let Some(row) = rows.iter().find(|row| **row as usize >= packed.out) {
                    candle_core::bail!("there is no row {row} among {}", packed.out)
                }
                packed.unpacked(rows.par_iter().map(|row| *row as usize))
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
            Self::Packed(packed) => {
                let order = || (0..packed.out).map(&from);
                let words = order().flat_map(|row| packed.row(row).0).copied().collect();
                let scales = order().flat_map(|row| packed.row(row).1).copied().collect();
                Ok(Self::Packed(Arc::new(Packed { words, scales, ..**packed })))
            }
        }
    }
}

impl Bits {
    fn count(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// Weights in a word.
    fn per_word(self) -> usize {
        32 / self.count()
    }
}

impl Packed {
    /// Packs ggml's blocks anew; `None` for types and widths that are not kept packed.
    fn new(out: usize, input: usize, kind: GgmlDType, data: &[u8]) -> Option<Self> {
        // A block begins with its scale, in Q4_1 followed by its offset, both f16; then come its weights: of four bits the
        // low halves of 16 bytes are the first 16, the high halves the others.
        let (bits, head) = match kind {
            GgmlDType::Q4_0 => (Bits::Four, 2),
            GgmlDType::Q4_1 => (Bits::Four, 4),
            GgmlDType::Q8_0 => (Bits::Eight, 2),
            _ => return None,
        };
        let group = LANES * bits.per_word();
        let bytes = head + BLOCK * bits.count() / 8;
        if !input.is_multiple_of(group) || data.len() != out * input / BLOCK * bytes {
            return None;
        }
        let mut quants = Vec::with_capacity(group);
        let mut words = Vec::with_capacity(out * input / bits.per_word());
        let mut scales = Vec::with_capacity(out * input / BLOCK);
        for block in data.chunks_exact(bytes) {
            let half = |at: usize| half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
            let (scale, packed) = (half(0), &block[head..]);
            let offset = match kind {
                GgmlDType::Q4_0 => -8.0 * scale,
                GgmlDType::Q4_1 => half(2),
                _ => -128.0 * scale,
            };
            let a = scale * (1 << bits.count()) as f32;
            scales.push([a, offset - a]);
            match bits {
                Bits::Four => {
                    quants.extend(packed.iter().map(|byte| byte & 15));
                    quants.extend(packed.iter().map(|byte| byte >> 4));
                }
                // From −128..128 to 0..256.
                Bits::Eight => quants.extend(packed.iter().map(|byte| byte ^ 128)),
            }
            if quants.len() == group {
                words.extend((0..LANES).map(|lane| {
                    let parts = quants.iter().skip(lane).step_by(LANES).enumerate();
                    parts.map(|(part, quant)| u32::from(*quant) << (part * bits.count())).sum::<u32>()
                }));
                quants.clear();
            }
        }
        Some(Self { out, input, bits, words, scales })
    }

    fn row(&self, row: usize) -> (&[u32], &[[f32; 2]]) {
        let (words, blocks) = (self.input / self.bits.per_word(), self.input / BLOCK);
        (&self.words[row * words..(row + 1) * words], &self.scales[row * blocks..(row + 1) * blocks])
    }

    /// These rows in f32.
    fn unpacked(&self, rows: impl IndexedParallelIterator<Item = usize>) -> Result<Tensor> {
        let count = rows.len();
        let mut out = vec![0f32; count * self.input];
        let arch = Arch::new();
        out.par_chunks_exact_mut(self.input).zip(rows).with_min_len(16).for_each(|(out, row)| {
            let row = self.row(row);
            match self.bits {
                Bits::Four => arch.dispatch(Unpack::<4> { row, out }),
                Bits::Eight => arch.dispatch(Unpack::<8> { row, out }),
            }
        });
        Tensor::from_vec(out, (count, self.input), &Device::Cpu)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.dim(0)?;
        let mut y = vec![0f32; rows * self.out];
        read(x, |x| {
            let tiles = self.tiles(&mut y, rows);
            if self.out * self.input * rows < PARALLEL_WORK {
                for tile in tiles {
                    self.fill(x, tile);
                }
            } else {
                tiles.into_par_iter().for_each(|tile| self.fill(x, tile));
            }
        })?;
        Tensor::from_vec(y, (rows, self.out), &Device::Cpu)
    }

    /// The output in parts for the threads: bands of rows where there are many, else stretches of columns.
    fn tiles<'a>(&self, y: &'a mut [f32], rows: usize) -> Vec<Tile<'a>> {
        let threads = rayon::current_num_threads();
        let (height, width) = if rows >= TOGETHER * threads {
            (TOGETHER, self.out)
        } else {
            (rows, self.out.div_ceil(threads * 4).max(8))
        };
        let mut tiles: Vec<Tile<'a>> = Vec::new();
        for (row, y) in y.chunks_exact_mut(self.out).enumerate() {
            let band = row / height * self.out.div_ceil(width);
            for (column, y) in y.chunks_mut(width).enumerate() {
                if tiles.len() == band + column {
                    tiles.push(Tile { row, column: column * width, y: Vec::with_capacity(height) });
                }
                tiles[band + column].y.push(y);
            }
        }
        tiles
    }

    fn fill(&self, x: &[f32], mut tile: Tile<'_>) {
        let mut rest = tile.y.as_mut_slice();
        let mut row = tile.row;
        while !rest.is_empty() {
            let taken = match (self.bits, rest.len()) {
                (Bits::Four, 8..) => self.products::<4, 8, 1>(x, row, tile.column, rest),
                (Bits::Four, 4..) => self.products::<4, 4, 2>(x, row, tile.column, rest),
                (Bits::Four, 2..) => self.products::<4, 2, 2>(x, row, tile.column, rest),
                (Bits::Four, _) => self.products::<4, 1, 4>(x, row, tile.column, rest),
                (Bits::Eight, 8..) => self.products::<8, 8, 1>(x, row, tile.column, rest),
                (Bits::Eight, 4..) => self.products::<8, 4, 2>(x, row, tile.column, rest),
                (Bits::Eight, 2..) => self.products::<8, 2, 2>(x, row, tile.column, rest),
                (Bits::Eight, _) => self.products::<8, 1, 4>(x, row, tile.column, rest),
            };
            row += taken;
            rest = &mut rest[taken..];
        }
    }

    /// The products with `R` rows of `x` from `row` on; returns `R`.
    fn products<const BITS: usize, const R: usize, const SUMS: usize>(
        &self,
        x: &[f32],
        row: usize,
        column: usize,
        y: &mut [&mut [f32]],
    ) -> usize {
        let x = &x[row * self.input..(row + R) * self.input];
        Arch::new().dispatch(Products::<BITS, R, SUMS> { packed: self, column, x, y: &mut y[..R] });
        R
    }
}

/// A part of a product's output.
struct Tile<'a> {
    row: usize,
    column: usize,
    /// The part's own piece of each of its rows.
    y: Vec<&'a mut [f32]>,
}

/// The register of weights at `part` of some words.
#[inline(always)]
fn weights<S: Simd, const BITS: usize>(simd: S, words: S::u32s, part: usize, [a, b]: [f32; 2]) -> S::f32s {
    let (from, to) = (part * BITS, 23 - BITS);
    let moved = if from > to {
        simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s((from - to) as u32))
    } else {
        simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s((to - from) as u32))
    };
    let mantissa = simd.and_u32s(moved, simd.splat_u32s(((1 << BITS) - 1) << to));
    let one = simd.splat_u32s(1f32.to_bits());
    let quant = simd.transmute_f32s_u32s(simd.or_u32s(mantissa, one));
    simd.mul_add_e_f32s(quant, simd.splat_f32s(a), simd.splat_f32s(b))
}

/// Parts of a word that lie in one block.
const PARTS: usize = BLOCK / LANES;

struct Unpack<'a, const BITS: usize> {
    row: (&'a [u32], &'a [[f32; 2]]),
    out: &'a mut [f32],
}

impl<const BITS: usize> WithSimd for Unpack<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (words, scales) = self.row;
        let (words, out) = (S::as_simd_u32s(words).0, S::as_mut_simd_f32s(self.out).0);
        let wide = registers::<S>();
        for (at, &words) in words.iter().enumerate() {
            let first = at / wide * (32 / BITS);
            for part in 0..32 / BITS {
                let scales = scales[(first + part) / PARTS];
                out[(first + part) * wide + at % wide] = weights::<S, BITS>(simd, words, part, scales);
            }
        }
    }
}

/// Dot products of `R` rows of `x` with the columns from `column` on, in `SUMS` partial sums each.
struct Products<'a, 'b, const BITS: usize, const R: usize, const SUMS: usize> {
    packed: &'a Packed,
    column: usize,
    x: &'a [f32],
    y: &'a mut [&'b mut [f32]],
}

impl<const BITS: usize, const R: usize, const SUMS: usize> WithSimd for Products<'_, '_, BITS, R, SUMS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { packed, column, x, y } = self;
        let per_word = 32 / BITS;
        let wide = registers::<S>();
        let x: [&[S::f32s]; R] = std::array::from_fn(
            #[inline(always)]
            |r| S::as_simd_f32s(&x[r * packed.input..(r + 1) * packed.input]).0,
        );
        for at in 0..y[0].len() {
            let (words, scales) = packed.row(column + at);
            let mut sums = [[simd.splat_f32s(0.0); SUMS]; R];
            for (group, words) in S::as_simd_u32s(words).0.chunks_exact(wide).enumerate() {
                for (nth, &words) in words.iter().enumerate() {
                    for block in 0..per_word / PARTS {
                        let scales = scales[group * (per_word / PARTS) + block];
                        for part in block * PARTS..(block + 1) * PARTS {
                            let weights = weights::<S, BITS>(simd, words, part, scales);
                            let of_x = (group * per_word + part) * wide + nth;
                            for (sums, x) in sums.iter_mut().zip(&x) {
                                sums[part % SUMS] = simd.mul_add_e_f32s(weights, x[of_x], sums[part % SUMS]);
                            }
                        }
                    }
                }
            }
            for (y, sums) in y.iter_mut().zip(&sums) {
                y[at] = sums.iter().fold(0.0, |total, sum| total + simd.reduce_sum_f32s(*sum));
            }
        }
    }
}

/// Registers that make up [`LANES`].
#[inline(always)]
fn registers<S: Simd>() -> usize {
    const { assert!(LANES.is_multiple_of(S::U32_LANES), "the words' layout is for registers of up to 8 words") };
    LANES / S::U32_LANES
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
        for rows in [1, 2, 3, 5, 8, 15, 30] {
            let x = Tensor::from_vec(random(rows * input), (rows, input), &Device::Cpu).unwrap();
            let y = linear.forward(&x).unwrap();
            assert!(far(&y, &x.matmul(&expected.t().unwrap()).unwrap()) < 1e-4, "{kind:?}, {rows} rows");
            let back = linear.backward(&y).unwrap();
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
        for (kind, input) in [(GgmlDType::Q4_0, 96), (GgmlDType::Q6K, 256), (GgmlDType::F16, 64)] {
            let source = Tensor::ones((2, input), DType::F32, &Device::Cpu).unwrap();
            let linear = Linear::from_gguf(&QTensor::quantize(&source, kind).unwrap()).unwrap();
            assert!(matches!(linear, Linear::Dense(_)), "{kind:?}");
        }
    }
}
