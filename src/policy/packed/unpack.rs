//! Packed weights in f32, as the backward pass multiplies them.

use pulp::{Arch, NullaryFnOnce, Simd, WithSimd};
use rayon::prelude::*;

use super::{Bits, Lanes, Packed, STRIP, line, registers, weights};

impl Packed {
    /// `[out, in]` in f32.
    pub(crate) fn dense(&self) -> Vec<f32> {
        let mut dense = vec![0f32; self.out * self.input];
        self.unpack(&mut dense, None);
        dense
    }

    /// [`Packed::dense`] into a place of that size, with an update's `B A` in it.
    pub(crate) fn unpack(&self, dense: &mut [f32], update: Option<&[Lanes; 2]>) {
        let arch = Arch::new();
        let strips = self.vectors.par_chunks_exact(self.strip()).enumerate();
        dense.par_chunks_mut(STRIP * self.input).zip(strips).for_each_init(
            || vec![0f32; STRIP * self.input],
            |columns, (rows, (nth, strip))| {
                match self.bits {
                    Bits::Four => arch.dispatch(Unpack::<4> { strip, zero: self.zero, columns }),
                    Bits::Eight => arch.dispatch(Unpack::<8> { strip, zero: self.zero, columns }),
                }
                if let Some([a, b]) = update {
                    arch.dispatch(Merge { a, b: b.strip(nth), columns });
                }
                arch.dispatch(Transpose { columns, input: self.input, rows });
            },
        );
    }
}

/// A strip's weights in f32, the lanes of each input after those of the one before.
struct Unpack<'a, const BITS: usize> {
    strip: &'a [u32],
    zero: u32,
    columns: &'a mut [f32],
}

impl<const BITS: usize> WithSimd for Unpack<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { strip, zero, columns } = self;
        let registers = registers::<S>();
        let blocks =
            strip.chunks_exact((1 + BITS) * STRIP).zip(columns.chunks_exact_mut(Packed::BLOCK * STRIP));
        for (block, columns) in blocks {
            let (block, columns) = (S::as_simd_u32s(block).0, S::as_mut_simd_f32s(columns).0);
            for register in 0..registers {
                let line = line::<S, BITS>(simd, block[register], zero);
                for at in 0..Packed::BLOCK {
                    let word = block[(1 + at / (32 / BITS)) * registers + register];
                    columns[at * registers + register] =
                        weights::<S, BITS>(simd, word, at % (32 / BITS), line);
                }
            }
        }
    }
}

/// The lanes of each input as rows, a square of [`STRIP`] at a time: what it reads stays in the cache.
struct Transpose<'a> {
    columns: &'a [f32],
    input: usize,
    rows: &'a mut [f32],
}

impl NullaryFnOnce for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (nth, square) in self.columns.as_chunks::<STRIP>().0.as_chunks::<STRIP>().0.iter().enumerate() {
            for (lane, row) in self.rows.chunks_exact_mut(self.input).enumerate() {
                let row = &mut row[nth * STRIP..(nth + 1) * STRIP];
                for (weight, column) in row.iter_mut().zip(square) {
                    *weight = column[lane];
                }
            }
        }
    }
}

/// Adds `B A` to a strip's weights: `columns` has their lanes input by input, `b` those of the strip's outputs.
struct Merge<'a> {
    a: &'a Lanes,
    b: &'a [f32],
    columns: &'a mut [f32],
}

impl WithSimd for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { a: Lanes { input, values, .. }, b, columns } = self;
        for (a, b) in values.chunks_exact(input * STRIP).zip(b.chunks(STRIP * STRIP)) {
            for register in 0..registers::<S>() {
                let mut ranks = [simd.splat_f32s(0.0); STRIP];
                for (rank, b) in ranks.iter_mut().zip(b.chunks_exact(STRIP)) {
                    *rank = S::as_simd_f32s(b).0[register];
                }
                for (weights, a) in columns.chunks_exact_mut(STRIP).zip(a.chunks_exact(STRIP)) {
                    let weights = &mut S::as_mut_simd_f32s(weights).0[register];
                    for (b, a) in ranks.iter().zip(a) {
                        *weights = simd.mul_add_e_f32s(*b, simd.splat_f32s(*a), *weights);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{
        Device, Tensor,
        quantized::{GgmlDType, QTensor},
    };
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use crate::policy::linear::Linear;

    use super::*;

    const INPUT: usize = 96;

    #[test]
    fn weights_are_unpacked_with_an_update_in_them() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut random = |rows: usize, columns: usize| {
            let values: Vec<f32> = (0..rows * columns).map(|_| rng.random::<f32>() - 0.4).collect();
            Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
        };
        for (kind, rank) in [(GgmlDType::Q4_1, 4), (GgmlDType::Q4_0, 16), (GgmlDType::Q8_0, 20)] {
            let linear = Linear::from_gguf(&QTensor::quantize(&random(37, INPUT), kind).unwrap()).unwrap();
            let [packed] = Linear::packed([&linear]).unwrap();
            let (a, b) = (random(rank, INPUT), random(37, rank));
            let lanes = [Lanes::new(&a, 0.5).unwrap(), Lanes::new(&b, 1.0).unwrap()];
            let mut found = vec![0f32; 37 * INPUT];
            packed.unpack(&mut found, Some(&lanes));
            let found = Tensor::from_vec(found, (37, INPUT), &Device::Cpu).unwrap();
            let expected = (linear.dense().unwrap() + (b.matmul(&a).unwrap() * 0.5).unwrap()).unwrap();
            let far: f32 = (found - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap();
            assert!(far < 1e-5, "{kind:?}, rank {rank}");
        }
    }
}
