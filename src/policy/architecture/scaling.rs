//! How positions are stretched beyond those that a model was first trained on.

use serde::Deserialize;

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
    pub(crate) fn frequencies(&self, head_dim: usize, theta: f64) -> (Vec<f32>, f32) {
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
pub(in crate::policy) fn yarn_attention(factor: f64) -> f64 {
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
