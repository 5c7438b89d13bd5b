//! The metadata of a GGUF file.

use candle_core::quantized::gguf_file::{Content, Value};

use super::{Architecture, Family, RopeScaling, yarn_attention};
use crate::policy::Error;

/// The keys of one architecture's metadata.
struct Keys<'a> {
    content: &'a Content,
    name: &'a str,
}

impl Keys<'_> {
    fn value(&self, key: &str) -> Result<&Value, Error> {
        let missing = || Error::Model(format!("GGUF: `{key}` is missing"));
        self.content.metadata.get(key).ok_or_else(missing)
    }

    fn wrong(key: &str) -> Error {
        Error::Model(format!("GGUF: `{key}` has an unexpected type"))
    }

    fn size(&self, key: &str) -> Result<usize, Error> {
        let key = format!("{}.{key}", self.name);
        Ok(self.value(&key)?.to_u32().map_err(|_| Self::wrong(&key))? as usize)
    }

    fn number(&self, key: &str) -> Result<f64, Error> {
        let key = format!("{}.{key}", self.name);
        Ok(f64::from(self.value(&key)?.to_f32().map_err(|_| Self::wrong(&key))?))
    }

    /// `None` if the key is not there; an error only if its value is of no use.
    fn optional<T>(
        &self,
        key: &str,
        read: impl FnOnce(&Self, &str) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        let there = self.content.metadata.contains_key(&format!("{}.{key}", self.name));
        there.then(|| read(self, key)).transpose()
    }

    fn rope_scaling(&self, divisors: Option<Vec<f32>>, context: usize) -> Result<RopeScaling, Error> {
        if let Some(divisors) = divisors {
            return Ok(RopeScaling::Divisors(divisors));
        }
        let key = format!("{}.rope.scaling.type", self.name);
        let kind = match self.content.metadata.get(&key) {
            Some(value) => value.to_string().map_err(|_| Self::wrong(&key))?.as_str(),
            None => "none",
        };
        match kind {
            "none" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.number("rope.scaling.factor")? }),
            "yarn" => {
                let factor = self.number("rope.scaling.factor")?;
                let original = self.optional("rope.scaling.original_context_length", Self::size)?;
                Ok(RopeScaling::Yarn {
                    factor,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    attention_factor: yarn_attention(factor),
                    original: original.unwrap_or(context),
                })
            }
            other => Err(Error::Model(format!("GGUF: `{key}` {other:?} is not supported"))),
        }
    }
}

impl Architecture {
    /// Reads the metadata of a GGUF file. `divisors`: what `rope_freqs.weight` holds, where the file has it.
    ///
    /// # Errors
    /// A key is missing or of the wrong type, or asks for something that is not supported; the message names it.
    pub fn from_gguf(content: &Content, divisors: Option<Vec<f32>>) -> Result<Self, Error> {
        let named = Keys { content, name: "general" };
        let name = named.value("general.architecture")?;
        let name = name.to_string().map_err(|_| Keys::wrong("general.architecture"))?.clone();
        let family = match name.as_str() {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            other => {
                return Err(Error::Model(format!("GGUF: `general.architecture` {other:?} is not supported")));
            }
        };
        let keys = Keys { content, name: &name };
        if keys.optional("expert_count", Keys::size)?.is_some_and(|experts| experts > 0) {
            return Err(Error::Model(format!("GGUF: `{name}.expert_count` is not supported")));
        }
        let (hidden, heads) = (keys.size("embedding_length")?, keys.size("attention.head_count")?);
        let context = keys.size("context_length")?;
        let embedding = content.tensor_infos.get("token_embd.weight");
        let ids = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
        let mut end_of_turn: Vec<u32> =
            ids.iter().filter_map(|key| content.metadata.get(*key)?.to_u32().ok()).collect();
        end_of_turn.dedup();
        let architecture = Self {
            family,
            hidden,
            intermediate: keys.size("feed_forward_length")?,
            layers: keys.size("block_count")?,
            heads,
            kv_heads: keys.optional("attention.head_count_kv", Keys::size)?.unwrap_or(heads),
            head_dim: keys.optional("attention.key_length", Keys::size)?.unwrap_or(hidden / heads.max(1)),
            vocabulary: embedding
                .and_then(|info| info.shape.dims().first().copied())
                .ok_or_else(|| Error::Model("GGUF: `token_embd.weight` is missing".to_owned()))?,
            context,
            rope_theta: keys.optional("rope.freq_base", Keys::number)?.unwrap_or(10_000.0),
            rope_scaling: keys.rope_scaling(divisors, context)?,
            rms_epsilon: keys.number("attention.layer_norm_rms_epsilon")?,
            window: keys.optional("attention.sliding_window", Keys::size)?,
            tied: !content.tensor_infos.contains_key("output.weight"),
            end_of_turn,
        };
        architecture.checked()
    }
}
