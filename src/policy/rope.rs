//! Rotary position embedding: Su et al., *RoFormer*, 2021, in the half-split form of the Hugging Face checkpoints.

use std::sync::OnceLock;

use candle_core::Tensor;

#[cfg(feature = "cuda")]
use super::card;
use super::{
    architecture::RopeScaling,
    device::{Placement, on_slices},
    ops::{by_rows, read, tensors::widened},
};

/// How fast each pair of dimensions turns.
#[derive(Debug)]
pub(crate) struct Rope {
    /// Radians a place, `[head_dim / 2]`.
    frequencies: Vec<f32>,
    /// What cosines and sines are multiplied with.
    attention: f32,
}

/// Cosines and sines of some rows, `[rows, head_dim / 2]` each: computed once for all layers.
#[derive(Debug)]
pub(crate) struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    /// The same where the rows are, if that is not here: `[rows, 1, 1, head_dim / 2]`.
    placed: OnceLock<[Tensor; 2]>,
}

impl Rope {
    pub(crate) fn new(head_dim: usize, theta: f64, scaling: &RopeScaling) -> Self {
        let (frequencies, attention) = scaling.frequencies(head_dim, theta);
        Self { frequencies, attention }
    }

    /// Of rows at these places.
    pub(crate) fn angles(&self, places: &[usize]) -> Angles {
        // Frequencies are rounded to f32 before they are multiplied, as the reference does it.
        let angles = || {
            places.iter().flat_map(|place| self.frequencies.iter().map(|frequency| *place as f32 * frequency))
        };
        Angles {
            cos: angles().map(|angle| angle.cos() * self.attention).collect(),
            sin: angles().map(|angle| angle.sin() * self.attention).collect(),
            half: self.frequencies.len(),
            placed: OnceLock::new(),
        }
    }
}

impl Angles {
    /// Turns every head of every row by its place. `x`: `[rows, heads · head_dim]`.
    pub(crate) fn rotate(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.turn(x, 1.0)
    }

    /// The gradient of [`Angles::rotate`]: a turn the other way. It may take the place of `dy`.
    pub(crate) fn rotate_backward(&self, dy: Tensor) -> candle_core::Result<Tensor> {
        #[cfg(feature = "cuda")]
        if card::takes(&dy) {
            let [cos, sin] = self.beside(dy.device(), candle_core::DType::F32)?;
            return card::turn_in_place(dy, (&cos, &sin), -1.0);
        }
        self.turn(&dy, -1.0)
    }

    fn turn(&self, x: &Tensor, sign: f32) -> candle_core::Result<Tensor> {
        #[cfg(feature = "cuda")]
        if card::takes(x) {
            let [cos, sin] = self.beside(x.device(), candle_core::DType::F32)?;
            return card::turn(x, (&cos, &sin), sign);
        }
        if !on_slices(x) {
            return self.turn_tensor(x, f64::from(sign));
        }
        let columns = x.dim(1)?;
        let half = self.half;
        read(x, |data| {
            by_rows(
                x,
                columns,
                #[inline(always)]
                |row, out| {
                    let at = row * half;
                    let (cos, sin) = (&self.cos[at..at + half], &self.sin[at..at + half]);
                    let x = &data[row * columns..(row + 1) * columns];
                    for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                        let (low, high) = out.split_at_mut(half);
                        let (x_low, x_high) = x.split_at(half);
                        for i in 0..half {
                            low[i] = x_low[i] * cos[i] - sign * x_high[i] * sin[i];
                            high[i] = x_high[i] * cos[i] + sign * x_low[i] * sin[i];
                        }
                    }
                },
            )
        })?
    }
    /// [`Angles::turn`] as tensor operations.
    fn turn_tensor(&self, x: &Tensor, sign: f64) -> candle_core::Result<Tensor> {
        let (rows, columns) = x.dims2()?;
        let wide = widened(x)?.reshape((rows, columns / (2 * self.half), 2, self.half))?;
        let [cos, sin] = self.beside(wide.device(), wide.dtype())?;
        let (low, high) = (wide.narrow(2, 0, 1)?, wide.narrow(2, 1, 1)?);
        let turned_low = (low.broadcast_mul(&cos)? - (high.broadcast_mul(&sin)? * sign)?)?;
        let turned_high = (high.broadcast_mul(&cos)? + (low.broadcast_mul(&sin)? * sign)?)?;
        Tensor::cat(&[turned_low, turned_high], 2)?.reshape((rows, columns))?.to_dtype(x.dtype())
    }

    /// Cosines and sines where the rows are, moved there by the first layer that asks.
    fn beside(
        &self,
        device: &candle_core::Device,
        dtype: candle_core::DType,
    ) -> candle_core::Result<[Tensor; 2]> {
        let place = Placement { device: device.clone(), dtype };
        let rows = self.cos.len() / self.half;
        if let Some(placed) = self.placed.get().filter(|[cos, _]| place.holds(cos)) {
            return Ok(placed.clone());
        }
        let moved = |values: &[f32]| {
            place.place(&Tensor::from_slice(values, (rows, 1, 1, self.half), &candle_core::Device::Cpu)?)
        };
        let placed = [moved(&self.cos)?, moved(&self.sin)?];
        Ok(self.placed.get_or_init(|| placed).clone())
    }
}
