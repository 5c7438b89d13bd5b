//! The numbers that shape a Llama decoder, from a Hugging Face `config.json` or GGUF metadata.

use candle_core::quantized::gguf_file::{Content, Value};
use serde::Deserialize;

use super::{Error, attention::Heads, lora::Target};

/// Sizes and constants of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    pub context: usize,
    pub rope_theta: f64,
    pub rms_epsilon: f64,
    /// The output head is the embedding.
    pub tied: bool,
    /// Tokens that end a turn.
    pub end_of_turn: Vec<u32>,
}

/// `eos_token_id` is one id or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// `config.json` as far as a Llama decoder needs it.
#[derive(Deserialize)]
struct HuggingFace {
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
    /// Newer checkpoints hold `rope_theta` in here.
    rope_parameters: Option<RopeParameters>,
    rope_scaling: Option<serde_json::Value>,
    rms_norm_eps: f64,
    #[serde(default)]
    tie_word_embeddings: bool,
    eos_token_id: Option<OneOrMany>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
}

impl Architecture {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// It is not the configuration of a Llama without biases and without RoPE scaling; the message names the field.
    pub fn from_config(json: &str) -> Result<Self, Error> {
        let config: HuggingFace =
            serde_json::from_str(json).map_err(|error| Error::Model(format!("config.json: {error}")))?;
        let rope_type = config.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_deref());
        let unsupported = [
            ("model_type", config.model_type != "llama"),
            ("attention_bias", config.attention_bias),
            ("mlp_bias", config.mlp_bias),
            ("hidden_act", config.hidden_act.as_deref().is_some_and(|act| act != "silu")),
            ("rope_scaling", config.rope_scaling.as_ref().is_some_and(|scaling| !scaling.is_null())),
            ("rope_parameters.rope_type", rope_type.is_some_and(|kind| kind != "default")),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, bad)| *bad) {
            return Err(Error::Model(format!("config.json: this value of `{field}` is not supported")));
        }
        let theta = config.rope_parameters.and_then(|rope| rope.rope_theta).or(config.rope_theta);
        let architecture = Self {
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads.unwrap_or(config.num_attention_heads),
            head_dim: config.head_dim.unwrap_or(config.hidden_size / config.num_attention_heads.max(1)),
            vocabulary: config.vocab_size,
            context: config.max_position_embeddings,
            rope_theta: theta.unwrap_or(10_000.0),
            rms_epsilon: config.rms_norm_eps,
            tied: config.tie_word_embeddings,
            end_of_turn: match config.eos_token_id {
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
                None => Vec::new(),
            },
        };
        architecture.checked()
    }

    /// Reads the metadata of a GGUF file of architecture `llama`.
    ///
    /// # Errors
    /// A key is missing or of the wrong type, or asks for something that is not supported; the message names it.
    pub fn from_gguf(content: &Content) -> Result<Self, Error> {
        let value = |key: &str| {
            content.metadata.get(key).ok_or_else(|| Error::Model(format!("GGUF: `{key}` is missing")))
        };
        let wrong = |key: &str| Error::Model(format!("GGUF: `{key}` has an unexpected type"));
        let name = value("general.architecture")?.to_string().map_err(|_| wrong("general.architecture"))?;
        if name != "llama" {
            return Err(Error::Model(format!("GGUF: `general.architecture` {name:?} is not supported")));
        }
        if let Some(Value::String(kind)) = content.metadata.get("llama.rope.scaling.type")
            && kind != "none"
        {
            return Err(Error::Model("GGUF: `llama.rope.scaling.type` is not supported".to_owned()));
        }
        let size = |key: &str| {
            let number = value(key)?.to_u32().map_err(|_| wrong(key))?;
            Ok::<usize, Error>(number as usize)
        };
        let number = |key: &str| Ok::<f64, Error>(f64::from(value(key)?.to_f32().map_err(|_| wrong(key))?));
        let (hidden, heads) = (size("llama.embedding_length")?, size("llama.attention.head_count")?);
        let architecture = Self {
            hidden,
            intermediate: size("llama.feed_forward_length")?,
            layers: size("llama.block_count")?,
            heads,
            kv_heads: size("llama.attention.head_count_kv").unwrap_or(heads),
            head_dim: size("llama.attention.key_length").unwrap_or(hidden / heads.max(1)),
            vocabulary: content
                .tensor_infos
                .get("token_embd.weight")
                .and_then(|info| info.shape.dims().first().copied())
                .ok_or_else(|| Error::Model("GGUF: `token_embd.weight` is missing".to_owned()))?,
            context: size("llama.context_length")?,
            rope_theta: number("llama.rope.freq_base").unwrap_or(10_000.0),
            rms_epsilon: number("llama.attention.layer_norm_rms_epsilon")?,
            tied: !content.tensor_infos.contains_key("output.weight"),
            end_of_turn: vec![size("tokenizer.ggml.eos_token_id")? as u32],
        };
        architecture.checked()
    }

    fn checked(self) -> Result<Self, Error> {
        let fits = self.kv_heads > 0
            && self.heads.is_multiple_of(self.kv_heads)
            && self.head_dim > 0
            && self.head_dim.is_multiple_of(2)
            && self.layers > 0
            && self.context > 0;
        if fits { Ok(self) } else { Err(Error::Model(format!("the sizes do not fit together: {self:?}"))) }
    }

    pub(crate) fn attention(&self) -> Heads {
        Heads { queries: self.heads, keys: self.kv_heads, dim: self.head_dim }
    }

    /// `(out, in)` of a linear.
    pub fn linear(&self, target: Target) -> (usize, usize) {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match target {
            Target::Query => (queries, self.hidden),
            Target::Key | Target::Value => (keys, self.hidden),
            Target::Output => (self.hidden, queries),
            Target::Gate | Target::Up => (self.intermediate, self.hidden),
            Target::Down => (self.hidden, self.intermediate),
        }
    }

    /// Parameters of the body, without embedding and head: what a token multiplies with.
    pub fn body_parameters(&self) -> usize {
        let layer: usize =
            Target::ALL.iter().map(|target| self.linear(*target)).map(|(out, input)| out * input).sum();
        layer * self.layers
    }
}
