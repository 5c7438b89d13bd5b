//! `config.json`.

use serde::Deserialize;
use serde_json::Value;

use super::RopeScaling;
use super::{Architecture, Family};
use crate::policy::Error;

/// `eos_token_id` is one id or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// `config.json` as far as a decoder needs it, in the spellings of transformers 4 and 5.
#[derive(Deserialize)]
struct Fields {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rope_parameters: Option<Value>,
    rope_scaling: Option<Value>,
    partial_rotary_factor: Option<f64>,
    rms_norm_eps: f64,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    #[serde(default)]
    tie_word_embeddings: bool,
    eos_token_id: Option<OneOrMany>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
}

impl Architecture {
    /// Reads `config.json`, and the tokens that end a turn from `generation_config.json` where there is one.
    ///
    /// # Errors
    /// It is not the configuration of a family that is known, or asks for something that is not supported; the message
    /// names the field.
    pub fn from_config(json: &str, generation: Option<&str>) -> Result<Self, Error> {
        let refused = |what: String| Error::Model(format!("config.json: {what}"));
        let config: Fields = serde_json::from_str(json).map_err(|error| refused(error.to_string()))?;
        let family = match config.model_type.as_str() {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            other => return Err(refused(format!("`model_type` {other:?} is not supported"))),
        };
        let sliding = config.layer_types.iter().flatten().any(|kind| kind != "full_attention");
        let unsupported = [
            ("attention_bias", config.attention_bias == Some(true)),
            ("mlp_bias", config.mlp_bias == Some(true)),
            ("hidden_act", config.hidden_act.as_deref().is_some_and(|act| act != "silu")),
            ("partial_rotary_factor", config.partial_rotary_factor.is_some_and(|share| share != 1.0)),
            ("use_sliding_window", config.use_sliding_window == Some(true)),
            ("layer_types", sliding && family != Family::Mistral),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, bad)| *bad) {
            return Err(refused(format!("this value of `{field}` is not supported")));
        }
        let context = config.max_position_embeddings;
        let (rope_scaling, theta) = rope(&config, context).map_err(refused)?;
        let architecture = Self {
            family,
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads.unwrap_or(config.num_attention_heads),
            head_dim: config.head_dim.unwrap_or(config.hidden_size / config.num_attention_heads.max(1)),
            vocabulary: config.vocab_size,
            context,
            rope_theta: theta.unwrap_or(10_000.0),
            rope_scaling,
            rms_epsilon: config.rms_norm_eps,
            window: if family == Family::Mistral { config.sliding_window } else { None },
            tied: config.tie_word_embeddings,
            end_of_turn: ends(config.eos_token_id, generation),
        };
        architecture.checked()
    }
}

/// The scaling and the base of the rotary embedding, each where the configuration has it.
fn rope(config: &Fields, context: usize) -> Result<(RopeScaling, Option<f64>), String> {
    let said = [("rope_parameters", &config.rope_parameters), ("rope_scaling", &config.rope_scaling)];
    let said = said.into_iter().find_map(|(field, value)| Some((field, value.as_ref()?)));
    let Some((field, value)) = said.filter(|(_, value)| !value.is_null()) else {
        return Ok((RopeScaling::None, config.rope_theta));
    };
    let theta = value.get("rope_theta").and_then(Value::as_f64).or(config.rope_theta);
    Ok((RopeScaling::from_config(field, value, context)?, theta))
}

/// The first is the one that the model is trained to end with.
fn ends(config: Option<OneOrMany>, generation: Option<&str>) -> Vec<u32> {
    #[derive(Deserialize)]
    struct Generation {
        eos_token_id: Option<OneOrMany>,
    }
    let generation = generation.and_then(|json| serde_json::from_str::<Generation>(json).ok());
    let mut ends = Vec::new();
    for said in [config, generation.and_then(|generation| generation.eos_token_id)].into_iter().flatten() {
        let ids = match said {
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        };
        ends.extend(ids.into_iter().filter(|id| !ends.contains(id)).collect::<Vec<_>>());
    }
    ends
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 259, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "eos_token_id": 2,
        })
    }

    fn read(change: impl FnOnce(&mut Value)) -> Result<Architecture, Error> {
        let mut config = config();
        change(&mut config);
        Architecture::from_config(&config.to_string(), None)
    }

    #[track_caller]
    fn check_refused(field: &str, value: Value) {
        let key = field.split('.').next().unwrap();
        let error = read(|config| config[key] = value).unwrap_err().to_string();
        assert!(error.contains(&format!("`{field}`")), "{error}");
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        check_refused("model_type", json!("mixtral"));
        check_refused("attention_bias", json!(true));
        check_refused("mlp_bias", json!(true));
        check_refused("hidden_act", json!("gelu"));
        check_refused("partial_rotary_factor", json!(0.5));
        check_refused("use_sliding_window", json!(true));
        check_refused("layer_types", json!(["full_attention", "sliding_attention"]));
        check_refused("rope_scaling.rope_type", json!({ "type": "dynamic", "factor": 2.0 }));
        check_refused("rope_scaling.rope_type", json!({ "rope_type": "longrope" }));
        check_refused("rope_scaling.factor", json!({ "type": "linear" }));
        check_refused("rope_scaling.low_freq_factor", json!({ "rope_type": "llama3", "factor": 8.0 }));
        check_refused("rope_parameters.mscale", json!({ "rope_type": "yarn", "factor": 4.0, "mscale": 1.0 }));
    }

    #[test]
    fn both_spellings_of_the_rotary_base_are_read() {
        let old = read(|config| config["rope_theta"] = json!(5e5)).unwrap();
        let new =
            read(|config| config["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": 5e5 }));
        assert_eq!(old, new.unwrap());
        assert_eq!(old.rope_theta, 5e5);
        let null = read(|config| config["rope_scaling"] = Value::Null).unwrap();
        assert_eq!(null.rope_scaling, RopeScaling::None);
    }

    #[test]
    fn every_end_of_turn_counts() {
        let json = config().to_string();
        let read = Architecture::from_config(&json, Some(r#"{"eos_token_id": [5, 2]}"#)).unwrap();
        assert_eq!(read.end_of_turn, [2, 5]);
    }
}
