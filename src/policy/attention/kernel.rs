//! The weighted sums of attention, for a few query vectors that share a key head.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{BLOCK, Past};

/// Query vectors that are taken together: their sums fill the registers.
pub(super) const TOGETHER: usize = 6;
/// Registers of one query vector's output that are summed at a time.
const WIDE: usize = 4;

/// One key head of one sequence, and the query vectors that look at it.
pub(super) struct Task<'a> {
    pub(super) past: &'a Past<'a>,
    pub(super) head: usize,
    pub(super) dim: usize,
    /// The query vectors.
    pub(super) vectors: Vec<Vector<'a>>,
}

pub(super) struct Vector<'a> {
    pub(super) query: &'a [f32],
    /// The places that it sees.
    pub(super) seen: Range<usize>,
    pub(super) out: &'a mut [f32],
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let mut rest = self.vectors.as_mut_slice();
        while !rest.is_empty() {
            let of = Attended { past: self.past, head: self.head, dim: self.dim };
            let taken = match rest.len() {
                6.. => of.attend::<S, 6>(simd, &mut rest[..6]),
                4.. => of.attend::<S, 4>(simd, &mut rest[..4]),
                3 => of.attend::<S, 3>(simd, rest),
                2 => of.attend::<S, 2>(simd, rest),
                _ => of.attend::<S, 1>(simd, rest),
            };
            rest = &mut rest[taken..];
        }
    }
}

struct Attended<'a> {
    past: &'a Past<'a>,
    head: usize,
    dim: usize,
}

impl Attended<'_> {
    /// `softmax(q Kᵀ / √dim) V` of `N` vectors; returns `N`.
    #[inline(always)]
    fn attend<S: Simd, const N: usize>(&self, simd: S, vectors: &mut [Vector<'_>]) -> usize {
        let scale = (self.dim as f32).sqrt().recip();
        let mut queries = vec![0f32; self.dim * N];
        for (nth, vector) in vectors.iter().enumerate() {
            for (place, query) in queries.iter_mut().skip(nth).step_by(N).zip(vector.query) {
                *place = query * scale;
            }
        }
        let blocks = blocks(vectors);
        let padded = blocks.len() * BLOCK;
        let mut weights = vec![0f32; N * padded];
        self.scores::<S, N>(simd, &queries, &mut weights, blocks.clone());
        for (weights, vector) in weights.chunks_exact_mut(padded).zip(&*vectors) {
            let first = blocks.start * BLOCK;
            softmax(simd, weights, vector.seen.start - first..vector.seen.end - first);
        }
        self.sums::<S, N>(simd, &weights, vectors);
        N
    }

    /// `q · k` of every place: `[N, padded]`. Lanes are neighbouring places, so that no lane is ever added to another.
    #[inline(always)]
    fn scores<S: Simd, const N: usize>(
        &self,
        simd: S,
        queries: &[f32],
        scores: &mut [f32],
        blocks: Range<usize>,
    ) {
        let padded = blocks.len() * BLOCK;
        let registers = BLOCK / S::F32_LANES;
        let size = self.dim * BLOCK;
        for (block, (keys, _)) in self.past.blocks[blocks].iter().enumerate() {
            let keys = &keys[self.head * size..(self.head + 1) * size];
            for register in 0..registers {
                let mut sums = [simd.splat_f32s(0.0); N];
                for (keys, queries) in keys.chunks_exact(BLOCK).zip(queries.chunks_exact(N)) {
                    let keys = S::as_simd_f32s(keys).0[register];
                    for (sum, query) in sums.iter_mut().zip(queries) {
                        *sum = simd.mul_add_e_f32s(keys, simd.splat_f32s(*query), *sum);
                    }
                }
                for (scores, sum) in scores.chunks_exact_mut(padded).zip(sums) {
                    let scores = &mut scores[block * BLOCK..(block + 1) * BLOCK];
                    S::as_mut_simd_f32s(scores).0[register] = sum;
                }
            }
        }
    }

    /// `Σ weight · value`, the lanes along the head's dimensions. `weights`: `[N, padded]`.
    #[inline(always)]
    fn sums<S: Simd, const N: usize>(&self, simd: S, weights: &[f32], vectors: &mut [Vector<'_>]) {
        let whole = self.dim / S::F32_LANES;
        let mut register = 0;
        while register < whole {
            if register + WIDE <= whole {
                self.wide::<S, N, WIDE>(simd, register, weights, vectors);
                register += WIDE;
            } else {
                self.wide::<S, N, 1>(simd, register, weights, vectors);
                register += 1;
            }
        }
        // Heads narrower than a register, or not a multiple of it.
        let first = blocks(vectors).start * BLOCK;
        for at in whole * S::F32_LANES..self.dim {
            for (vector, weights) in vectors.iter_mut().zip(weights.chunks_exact(weights.len() / N)) {
                let value = |place: usize| self.values(place / BLOCK)[place % BLOCK * self.dim + at];
                let weights = &weights[vector.seen.start - first..];
                let seen = vector.seen.clone().zip(weights);
                vector.out[at] = seen.map(|(place, weight)| weight * value(place)).sum();
            }
        }
    }

    #[inline(always)]
    fn wide<S: Simd, const N: usize, const W: usize>(
        &self,
        simd: S,
        register: usize,
        weights: &[f32],
        vectors: &mut [Vector<'_>],
    ) {
        let places = vectors.iter().map(|vector| vector.seen.end).max().unwrap_or(0);
        let padded = weights.len() / N;
        let blocks = blocks(vectors);
        let mut sums = [[simd.splat_f32s(0.0); W]; N];
        let lanes = register * S::F32_LANES..(register + W) * S::F32_LANES;
        for (nth_block, block) in blocks.enumerate() {
            let values = self.values(block).chunks_exact(self.dim).take(places - block * BLOCK);
            for (place, values) in values.enumerate() {
                let values = S::as_simd_f32s(&values[lanes.clone()]).0;
                for (nth, sums) in sums.iter_mut().enumerate() {
                    let weight = simd.splat_f32s(weights[nth * padded + nth_block * BLOCK + place]);
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = simd.mul_add_e_f32s(weight, *value, *sum);
                    }
                }
            }
        }
        for (vector, sums) in vectors.iter_mut().zip(sums) {
            S::as_mut_simd_f32s(&mut vector.out[lanes.clone()]).0.copy_from_slice(&sums);
        }
    }

    /// `[BLOCK, dim]` of this head.
    #[inline(always)]
    fn values(&self, block: usize) -> &[f32] {
        let size = self.dim * BLOCK;
        &self.past.blocks[block].1[self.head * size..(self.head + 1) * size]
    }
}

/// The blocks that hold what some of the vectors see.
#[inline(always)]
fn blocks(vectors: &[Vector<'_>]) -> Range<usize> {
    let first = vectors.iter().map(|vector| vector.seen.start).min().unwrap_or(0);
    let end = vectors.iter().map(|vector| vector.seen.end).max().unwrap_or(0);
    first / BLOCK..end.div_ceil(BLOCK)
}

/// The softmax of the scores that are seen, in their place; the others become 0.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32], seen: Range<usize>) {
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    let registers = S::as_mut_simd_f32s(scores).0;
    let mut most = simd.splat_f32s(f32::NEG_INFINITY);
    for scores in &*registers {
        most = simd.max_f32s(most, *scores);
    }
    let most = simd.splat_f32s(simd.reduce_max_f32s(most));
    let mut total = simd.splat_f32s(0.0);
    for scores in &mut *registers {
        *scores = exp(simd, simd.sub_f32s(*scores, most));
        total = simd.add_f32s(total, *scores);
    }
    let by = simd.splat_f32s(simd.reduce_sum_f32s(total).recip());
    for scores in registers {
        *scores = simd.mul_f32s(*scores, by);
    }
    // e⁻⁸⁷ is not quite nothing, and the value that it would weigh may be anything.
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
}

/// `eˣ` for x ≤ 0 to about 2 units in the last place; 0 from −87 on down. The scheme of `ops::exp`.
#[inline(always)]
fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5 · 2²³ leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let splat = |value| simd.splat_f32s(value);
    let x = simd.max_f32s(x, splat(-87.0));
    let shifted = simd.mul_add_e_f32s(x, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let power = simd.sub_f32s(shifted, splat(ROUND));
    let r = simd.mul_add_e_f32s(power, splat(-0.693_359_4), x);
    let r = simd.mul_add_e_f32s(power, splat(2.121_944_4e-4), r);
    let mut tail = splat(1.987_569_1e-4);
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        tail = simd.mul_add_e_f32s(tail, r, splat(coefficient));
    }
    let mantissa = simd.mul_add_e_f32s(simd.mul_f32s(tail, r), r, simd.add_f32s(r, splat(1.0)));
    let bits = simd.wrapping_dyn_shl_u32s(
        simd.add_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(127)),
        simd.splat_u32s(23),
    );
    simd.mul_f32s(mantissa, simd.transmute_f32s_u32s(bits))
}
