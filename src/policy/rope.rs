//! Rotary position embedding: Su et al., *RoFormer*, 2021, in the half-split form of the Hugging Face checkpoints.

use std::sync::OnceLock;

use candle_core::Tensor;
use serde::Deserialize;

#[cfg(feature = "cuda")]
use super::card;
use super::{
    device::{Placement, on_slices},
    ops::{by_rows, read, tensors::widened},
};

/// How a model stretches its positions beyond those that it was first trained on.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum RopeScaling {
    #[default]
    None,
    /// All frequencies divided by `factor`: Chen et al., *Positional Interpolation*, 2023.
    Linear { factor: f64 },
    /// Llama 3.1's: long waves are divided by `factor`, short ones kept, those between blended.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original: usize },
    /// Peng et al., *YaRN*, 2023: blended by the number of turns, and attention scaled by `attention_factor`.
    Yarn { factor: f64, beta_fast: f64, beta_slow: f64, attention_factor: f64, original: usize },
    /// What each frequency is divided by, as GGUF files hold it.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// The frequencies in radians a place, `[head_dim / 2]`, and what cosines and sines are multiplied with.
    fn frequencies(&self, head_dim: usize, theta: f64) -> (Vec<f32>, f32) {
        use std::f64::consts::TAU;
        let half = head_dim / 2;
        let plain = |i: usize| 1.0 / theta.powf(2.0 * i as f64 / head_dim as f64);
        let of =
            |frequency: &dyn Fn(usize) -> f64| (0..half).map(|i| frequency(i) as f32).collect::<Vec<f32>>();
        match self {
            Self::None => (of(&plain), 1.0),
            Self::Linear { factor } => (of(&|i| plain(i) / factor), 1.0),
            Self::Divisors(by) => (of(&|i| plain(i) / by.get(i).copied().map_or(1.0, f64::from)), 1.0),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let blended = |i: usize| {
                    // Turns within the original context: few are stretched whole, many not at all.
                    let turns = *original as f64 * plain(i) / TAU;
                    let kept =
                        ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    kept * plain(i) + (1.0 - kept) * plain(i) / factor
                };
                (of(&blended), 1.0)
            }
            Self::Yarn { factor, beta_fast, beta_slow, attention_factor, original } => {
                // The dimension whose wave turns so often within the original context.
                let dimension = |turns: f64| {
                    head_dim as f64 * (*original as f64 / (turns * TAU)).ln() / (2.0 * theta.ln())
                };
                let low = dimension(*beta_fast).floor().max(0.0);
                let high = dimension(*beta_slow).ceil().min(head_dim as f64 - 1.0);
                let width = if low == high { 0.001 } else { high - low };
                let blended = |i: usize| {
                    let stretched = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    stretched * plain(i) / factor + (1.0 - stretched) * plain(i)
                };
                (of(&blended), *attention_factor as f32)
            }
        }
    }

    /// From `rope_scaling` or `rope_parameters` of a `config.json`; `context` is its `max_position_embeddings`. The error
    /// names the field.
    pub(super) fn from_config(
        field: &str,
        value: &serde_json::Value,
        context: usize,
    ) -> Result<Self, String> {
        let parsed: Fields =
            serde_json::from_value(value.clone()).map_err(|error| format!("`{field}`: {error}"))?;
        let kind = parsed.rope_type.as_deref().or(parsed.kind.as_deref()).unwrap_or("default");
        let number = |name: &str, value: Option<f64>| {
            value
                .filter(|value| value.is_finite() && *value > 0.0)
                .ok_or_else(|| format!("`{field}.{name}` is missing or not positive"))
        };
        let original = parsed.original_max_position_embeddings.unwrap_or(context);
        match kind {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear { factor: number("factor", parsed.factor)? }),
            "llama3" => Ok(Self::Llama3 {
                factor: number("factor", parsed.factor)?,
                low_freq_factor: number("low_freq_factor", parsed.low_freq_factor)?,
                high_freq_factor: number("high_freq_factor", parsed.high_freq_factor)?,
                original,
            }),
            "yarn" if parsed.mscale.is_some() || parsed.mscale_all_dim.is_some() => {
                Err(format!("`{field}.mscale` is not supported"))
            }
            "yarn" if parsed.truncate == Some(false) => {
                Err(format!("`{field}.truncate` = false is not supported"))
            }
            "yarn" => {
                let factor = number("factor", parsed.factor)?;
                Ok(Self::Yarn {
                    factor,
                    beta_fast: parsed.beta_fast.unwrap_or(32.0),
                    beta_slow: parsed.beta_slow.unwrap_or(1.0),
                    attention_factor: parsed.attention_factor.unwrap_or_else(|| yarn_attention(factor)),
                    original,
                })
            }
            other => Err(format!("`{field}.rope_type` {other:?} is not supported")),
        }
    }
}

/// How much YaRN sharpens attention for a stretch by `factor`.
pub(super) fn yarn_attention(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// What a `config.json` says of its scaling, in the spellings of transformers 4 and 5.
#[derive(Deserialize)]
struct Fields {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
}

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

    /// The gradient of [`Angles::rotate`]: a turn the other way.
    pub(crate) fn rotate_backward(&self, dy: &Tensor) -> candle_core::Result<Tensor> {
        self.turn(dy, -1.0)
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
