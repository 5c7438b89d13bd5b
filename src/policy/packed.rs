//! Quantised weights that stay packed, and their products with f32 activations.
//!
//! Serving few streams is bound by how fast weights come from memory, so they are unpacked in registers, to the file's own
//! values. Activations are not quantised: the products are those of the dequantised matrix to the rounding of f32.

mod unpack;
mod update;

use candle_core::{Device, Result, Tensor};
use half::f16;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use self::update::Beside;
pub(crate) use self::update::{Lanes, Update};
use super::ops::read;

/// Outputs that lie side by side, one in each lane: a register of AVX-512, two of AVX2, four of NEON.
const STRIP: usize = 16;
/// Multiplications below which waking a second thread costs more than it saves.
const PARALLEL_WORK: usize = 1 << 16;
/// Parts of the work for each thread, so that one that is late is not waited for.
const PARTS_A_THREAD: usize = 4;

/// `[out, in]` in blocks of weights that share a scale and an offset.
///
/// [`STRIP`] outputs make a strip, a sequence of vectors with a lane for each of them. For every block these are one of
/// scales and offsets (two f16 in a word), then the weights, consecutive ones from the lowest bits of a word up. An input
/// is thus multiplied with a whole register, no lane is ever added to another, and memory is read from end to end.
#[derive(Debug)]
pub(crate) struct Packed {
    out: usize,
    input: usize,
    bits: Bits,
    /// A weight is `scale · (q − zero) + offset`.
    zero: u32,
    vectors: Vec<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bits {
    Four,
    Eight,
}

impl Bits {
    pub(crate) fn count(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }
}

impl Packed {
    /// Weights that share a scale and an offset.
    pub(crate) const BLOCK: usize = 32;

    /// All zeros, to be [`Packed::put`] into. `input` is a multiple of [`Packed::BLOCK`].
    pub(crate) fn empty(out: usize, input: usize, bits: Bits, zero: u32) -> Self {
        let words = out.next_multiple_of(STRIP) * input / Self::BLOCK * (1 + bits.count());
        Self { out, input, bits, zero, vectors: vec![0; words] }
    }

    /// Sets one block, counted along the rows; `None` if its scale or offset is no number.
    pub(crate) fn put(&mut self, block: usize, scales: [u16; 2], quants: &[u8]) -> Option<()> {
        let finite = scales.iter().all(|half| f16::from_bits(*half).is_finite());
        let blocks = self.input / Self::BLOCK;
        let (row, vector) = (block / blocks, block % blocks * (1 + self.bits.count()));
        let bits = self.bits.count();
        let words = quants.chunks_exact(32 / bits).map(|quants| {
            let parts = quants.iter().enumerate();
            parts.map(|(part, quant)| u32::from(*quant) << (part * bits)).sum::<u32>()
        });
        let scales = u32::from(scales[0]) | u32::from(scales[1]) << 16;
        let start = self.start(row) + vector * STRIP;
        let places = self.vectors.get_mut(start..)?.iter_mut().step_by(STRIP);
        for (place, word) in places.zip([scales].into_iter().chain(words)) {
            *place = word;
        }
        finite.then_some(())
    }

    pub(crate) fn dims(&self) -> [usize; 2] {
        [self.out, self.input]
    }

    /// Words of a strip.
    fn strip(&self) -> usize {
        self.input / Self::BLOCK * (1 + self.bits.count()) * STRIP
    }

    /// Where a row's words begin; they lie [`STRIP`] apart.
    fn start(&self, row: usize) -> usize {
        row / STRIP * self.strip() + row % STRIP
    }

    /// The words of one row.
    fn row(&self, row: usize) -> impl Iterator<Item = &u32> {
        self.vectors[row / STRIP * self.strip()..][..self.strip()].iter().skip(row % STRIP).step_by(STRIP)
    }

    /// Appends one row in f32.
    pub(crate) fn unpack_row(&self, row: usize, to: &mut Vec<f32>) {
        let bits = self.bits.count();
        let (mut scale, mut offset) = (0.0, 0.0);
        for (at, word) in self.row(row).enumerate() {
            if at % (1 + bits) == 0 {
                scale = f16::from_bits(*word as u16).to_f32();
                offset = f16::from_bits((word >> 16) as u16).to_f32();
                continue;
            }
            let quant = |part: usize| (word >> (part * bits)) & ((1 << bits) - 1);
            to.extend((0..32 / bits).map(|part| scale * (quant(part) as f32 - self.zero as f32) + offset));
        }
    }

    /// The same matrix with its rows in another order: row `i` becomes what `from(i)` was.
    pub(crate) fn reordered(&self, from: impl Fn(usize) -> usize) -> Self {
        let mut to = Self::empty(self.out, self.input, self.bits, self.zero);
        for row in 0..self.out {
            let start = to.start(row);
            for (place, word) in to.vectors[start..].iter_mut().step_by(STRIP).zip(self.row(from(row))) {
                *place = *word;
            }
        }
        to
    }

    /// `x Wᵀ` of each matrix, for one `x` of `[rows, in]`: `[rows, out]` each.
    pub(crate) fn products(matrices: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        Self::of_panels(matrices, &Panels::new(x)?, &[])
    }

    /// [`Packed::products`], to each of which the products of what is beside its weights are added.
    fn of_panels(matrices: &[&Self], x: &Panels, beside: &[Vec<Beside<'_>>]) -> Result<Vec<Tensor>> {
        let (rows, input) = (x.rows(), x.input);
        if let Some(matrix) = matrices.iter().find(|matrix| matrix.input != input) {
            candle_core::bail!("rows of {input} do not fit a matrix of {:?}", matrix.dims())
        }
        let mut products: Vec<Vec<f32>> =
            matrices.iter().map(|matrix| vec![0f32; rows * matrix.out]).collect();
        let tiles = tiles(matrices, &mut products, beside);
        let work: usize = matrices.iter().map(|matrix| matrix.out * input * rows).sum();
        if work < PARALLEL_WORK {
            for tile in tiles {
                tile.fill(x);
            }
        } else {
            tiles.into_par_iter().for_each(|tile| tile.fill(x));
        }
        let tensors = products.into_iter().zip(matrices);
        tensors.map(|(y, matrix)| Tensor::from_vec(y, (rows, matrix.out), &Device::Cpu)).collect()
    }
}

/// Rows in groups, those of each interleaved: what they have at the first input, then what they have at the second …
struct Panels {
    /// Rows of each group.
    groups: Vec<usize>,
    input: usize,
    values: Vec<f32>,
}

impl Panels {
    fn new(x: &Tensor) -> Result<Self> {
        let (rows, input) = x.dims2()?;
        let groups = groups(rows);
        let values = read(x, |x| interleaved(x, input, &groups))?;
        Ok(Self { groups, input, values })
    }

    fn rows(&self) -> usize {
        self.groups.iter().sum()
    }

    /// Other columns of the same rows, interleaved in the same way.
    fn alike(&self, x: &[f32]) -> Vec<f32> {
        interleaved(x, x.len() / self.rows().max(1), &self.groups)
    }
}

/// Numbers of rows that are multiplied together, adding up to `rows`: as many as there are registers for sums.
fn groups(rows: usize) -> Vec<usize> {
    const SIZES: [usize; 6] = [24, 16, 8, 4, 2, 1];
    let most = Arch::new().dispatch(SumRegisters);
    let mut groups = Vec::new();
    let mut left = rows;
    while let Some(size) = SIZES.iter().find(|size| **size <= left.min(most)) {
        groups.push(*size);
        left -= size;
    }
    groups
}

fn interleaved(x: &[f32], input: usize, groups: &[usize]) -> Vec<f32> {
    let mut panels = vec![0f32; x.len()];
    let mut start = 0;
    for size in groups {
        let range = start * input..(start + size) * input;
        // Some inputs at a time, so that what is written stays in the cache until it is full.
        for (nth, panel) in panels[range.clone()].chunks_mut(STRIP * size).enumerate() {
            let rows = x[range.clone()].chunks_exact(input).map(|row| &row[nth * STRIP..]);
            for (nth, row) in rows.enumerate() {
                for (place, value) in panel.iter_mut().skip(nth).step_by(*size).zip(row) {
                    *place = *value;
                }
            }
        }
        start += size;
    }
    panels
}

/// Some strips of one matrix, and where their products go.
struct Tile<'a> {
    packed: &'a Packed,
    strips: &'a [u32],
    beside: &'a [Beside<'a>],
    /// The first column of its products.
    column: usize,
    /// The strips' own piece of each row of the product.
    y: Vec<&'a mut [f32]>,
}

/// The products in parts for the threads.
fn tiles<'a>(
    matrices: &[&'a Packed],
    products: &'a mut [Vec<f32>],
    beside: &'a [Vec<Beside<'a>>],
) -> Vec<Tile<'a>> {
    let strips: usize = matrices.iter().map(|matrix| matrix.out.div_ceil(STRIP)).sum();
    let width = strips.div_ceil(rayon::current_num_threads() * PARTS_A_THREAD).max(1);
    let mut tiles = Vec::new();
    for (nth, (packed, product)) in matrices.iter().zip(products).enumerate() {
        let first = tiles.len();
        let beside = beside.get(nth).map_or(&[][..], Vec::as_slice);
        let parts = packed.vectors.chunks(width * packed.strip()).enumerate();
        tiles.extend(parts.map(|(part, strips)| Tile {
            packed,
            strips,
            beside,
            column: part * width * STRIP,
            y: Vec::new(),
        }));
        for row in product.chunks_exact_mut(packed.out) {
            for (tile, piece) in tiles[first..].iter_mut().zip(row.chunks_mut(width * STRIP)) {
                tile.y.push(piece);
            }
        }
    }
    tiles
}

impl<'a> Tile<'a> {
    fn fill(mut self, x: &Panels) {
        let mut rest = self.y.as_mut_slice();
        let mut start = 0;
        for size in &x.groups {
            let rows = start..start + size;
            let own = |beside: &'a Beside<'a>| {
                let input = beside.b.input;
                let middle = &beside.middle[rows.start * input..rows.end * input];
                (&beside.b.values[self.column * input..], middle)
            };
            let beside: Vec<More<'_>> = self.beside.iter().map(own).collect();
            let (y, others) = rest.split_at_mut(*size);
            let (strips, packed) = (self.strips, self.packed);
            let x = &x.values[rows.start * packed.input..rows.end * packed.input];
            match packed.bits {
                Bits::Four => dispatch::<4>(packed, strips, (x, &beside), y),
                Bits::Eight => dispatch::<8>(packed, strips, (x, &beside), y),
            }
            (rest, start) = (others, rows.end);
        }
    }
}

/// Lanes of the weights that stand beside some strips, and the interleaved rows that they are multiplied with.
type More<'a> = (&'a [f32], &'a [f32]);

fn dispatch<const BITS: usize>(
    packed: &Packed,
    strips: &[u32],
    (x, beside): (&[f32], &[More<'_>]),
    y: &mut [&mut [f32]],
) {
    let arch = Arch::new();
    match y.len() {
        1 => arch.dispatch(Products::<BITS, 1, 4> { packed, strips, x, beside, y }),
        2 => arch.dispatch(Products::<BITS, 2, 2> { packed, strips, x, beside, y }),
        4 => arch.dispatch(Products::<BITS, 4, 2> { packed, strips, x, beside, y }),
        8 => arch.dispatch(Products::<BITS, 8, 1> { packed, strips, x, beside, y }),
        16 => arch.dispatch(Products::<BITS, 16, 1> { packed, strips, x, beside, y }),
        _ => arch.dispatch(Products::<BITS, 24, 1> { packed, strips, x, beside, y }),
    }
}

/// Registers that are left for sums beside the weights, their scales and the masks.
struct SumRegisters;

impl WithSimd for SumRegisters {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        if S::REGISTER_COUNT >= 32 { 24 } else { 8 }
    }
}

/// Dot products of `R` interleaved rows with some strips, `N` of them at a time.
///
/// Every sum runs over the inputs in their order, whatever `R` and `N`: what a row becomes does not depend on the rows
/// beside it, to the last bit. For few rows several strips together keep the sums from waiting for one another.
struct Products<'a, 'b, const BITS: usize, const R: usize, const N: usize> {
    packed: &'a Packed,
    strips: &'a [u32],
    x: &'a [f32],
    beside: &'a [More<'a>],
    y: &'a mut [&'b mut [f32]],
}

impl<const BITS: usize, const R: usize, const N: usize> WithSimd for Products<'_, '_, BITS, R, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { packed, strips, x, beside, y } = self;
        let together = strips.chunks_exact(N * packed.strip());
        let rest = together.remainder();
        let mut at = 0;
        for strips in together {
            Self::strips::<S, N>(simd, packed, strips, (x, beside), (&mut *y, at));
            at += N * STRIP;
        }
        for strip in rest.chunks_exact(packed.strip()) {
            Self::strips::<S, 1>(simd, packed, strip, (x, beside), (&mut *y, at));
            at += STRIP;
        }
    }
}

impl<const BITS: usize, const R: usize, const N: usize> Products<'_, '_, BITS, R, N> {
    /// `M` strips, whose products go to the columns from `at` on.
    #[inline(always)]
    fn strips<S: Simd, const M: usize>(
        simd: S,
        packed: &Packed,
        strips: &[u32],
        (x, beside): (&[f32], &[More<'_>]),
        (y, at): (&mut [&mut [f32]], usize),
    ) {
        let registers = registers::<S>();
        // Loops, not closures: those are compiled by themselves, for no wide vectors.
        let mut blocks: [&[S::u32s]; M] = [&[]; M];
        let mut words = [simd.splat_u32s(0); M];
        let mut lines = [(simd.splat_f32s(0.0), simd.splat_f32s(0.0)); M];
        let mut lanes = [[[0f32; STRIP]; M]; R];
        for register in 0..registers {
            let mut sums = [[simd.splat_f32s(0.0); R]; M];
            for (nth_block, x) in x.chunks_exact(Packed::BLOCK * R).enumerate() {
                for (nth, block) in blocks.iter_mut().enumerate() {
                    let start = nth * packed.strip() + nth_block * (1 + BITS) * STRIP;
                    *block = S::as_simd_u32s(&strips[start..start + (1 + BITS) * STRIP]).0;
                    lines[nth] = line::<S, BITS>(simd, block[register], packed.zero);
                }
                for (word, x) in x.chunks_exact(32 / BITS * R).enumerate() {
                    for (words, block) in words.iter_mut().zip(blocks) {
                        *words = block[(1 + word) * registers + register];
                    }
                    for (part, x) in x.chunks_exact(R).enumerate() {
                        for ((sums, words), line) in sums.iter_mut().zip(words).zip(lines) {
                            let weights = weights::<S, BITS>(simd, words, part, line);
                            for (sum, x) in sums.iter_mut().zip(x) {
                                *sum = simd.mul_add_e_f32s(weights, simd.splat_f32s(*x), *sum);
                            }
                        }
                    }
                }
            }
            for (lanes, x) in beside {
                let inputs = x.len() / R;
                for (input, x) in x.chunks_exact(R).enumerate() {
                    for (nth, sums) in sums.iter_mut().enumerate() {
                        let start = (at + nth * STRIP) * inputs + input * STRIP;
                        let weights = S::as_simd_f32s(&lanes[start..start + STRIP]).0[register];
                        for (sum, x) in sums.iter_mut().zip(x) {
                            *sum = simd.mul_add_e_f32s(weights, simd.splat_f32s(*x), *sum);
                        }
                    }
                }
            }
            for (strip, sums) in sums.into_iter().enumerate() {
                for (lanes, sum) in lanes.iter_mut().zip(sums) {
                    S::as_mut_simd_f32s(&mut lanes[strip]).0[register] = sum;
                }
            }
        }
        for (y, lanes) in y.iter_mut().zip(&lanes) {
            let lanes = lanes.as_flattened();
            let len = (y.len() - at).min(lanes.len());
            y[at..at + len].copy_from_slice(&lanes[..len]);
        }
    }
}

/// Registers that make up a vector of [`STRIP`] lanes.
#[inline(always)]
fn registers<S: Simd>() -> usize {
    const { assert!(STRIP.is_multiple_of(S::U32_LANES), "a register holds at most a strip's lanes") };
    STRIP / S::U32_LANES
}

/// `a` and `b` with which a weight is `a · (1 + q / 2^bits) + b`, from a word of two f16.
#[inline(always)]
fn line<S: Simd, const BITS: usize>(simd: S, scales: S::u32s, zero: u32) -> (S::f32s, S::f32s) {
    let scale = widened(simd, scales);
    let offset = widened(simd, simd.wrapping_dyn_shr_u32s(scales, simd.splat_u32s(16)));
    let one = (1u32 << BITS) as f32;
    let a = simd.mul_f32s(scale, simd.splat_f32s(one));
    (a, simd.mul_add_e_f32s(scale, simd.splat_f32s(-one - zero as f32), offset))
}

/// The f16 in the low half of each word, as f32: its exponent and fraction in their new places, times what the exponents'
/// biases differ by. That holds for subnormal ones too, not for infinities.
#[inline(always)]
fn widened<S: Simd>(simd: S, halves: S::u32s) -> S::f32s {
    let sign =
        simd.wrapping_dyn_shl_u32s(simd.and_u32s(halves, simd.splat_u32s(0x8000)), simd.splat_u32s(16));
    let rest =
        simd.wrapping_dyn_shl_u32s(simd.and_u32s(halves, simd.splat_u32s(0x7fff)), simd.splat_u32s(13));
    let size =
        simd.mul_f32s(simd.transmute_f32s_u32s(rest), simd.splat_f32s(f32::from_bits((127 + 112) << 23)));
    simd.transmute_f32s_u32s(simd.or_u32s(simd.transmute_u32s_f32s(size), sign))
}

/// The weights at `part` of some words. The bits of `q` become the highest of the fraction of a number from 1 to 2, so
/// that they need no conversion to f32.
#[inline(always)]
fn weights<S: Simd, const BITS: usize>(
    simd: S,
    words: S::u32s,
    part: usize,
    (a, b): (S::f32s, S::f32s),
) -> S::f32s {
    let (from, to) = (part * BITS, 23 - BITS);
    let moved = if from > to {
        simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s((from - to) as u32))
    } else {
        simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s((to - from) as u32))
    };
    let fraction = simd.and_u32s(moved, simd.splat_u32s(((1 << BITS) - 1) << to));
    let quant = simd.transmute_f32s_u32s(simd.or_u32s(fraction, simd.splat_u32s(1f32.to_bits())));
    simd.mul_add_e_f32s(quant, a, b)
}
