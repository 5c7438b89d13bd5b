//! The numbers that shape a decoder, from a Hugging Face `config.json` or GGUF metadata.

mod gguf;
mod huggingface;

use super::{Error, attention::Heads, lora::Target, rope::RopeScaling};

/// Whose conventions a checkpoint follows. All are the same decoder with other parts switched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 1 to 3, SmolLM2, and what calls itself so.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Qwen2 and 2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: each head's query and key is normed.
    Qwen3,
}

/// Sizes and constants of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    pub family: Family,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    pub context: usize,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub rms_epsilon: f64,
    /// Places that a token sees, its own included; all if unset.
    pub window: Option<usize>,
    /// The output head is the embedding.
    pub tied: bool,
    /// Tokens that end a turn.
    pub end_of_turn: Vec<u32>,
}

impl Architecture {
    /// Query, key and value projections have a bias.
    pub fn has_bias(&self) -> bool {
        self.family == Family::Qwen2
    }

    /// Each head's query and key is normed before it is turned.
    pub fn norms_heads(&self) -> bool {
        self.family == Family::Qwen3
    }

    fn checked(self) -> Result<Self, Error> {
        let fits = self.kv_heads > 0
            && self.heads.is_multiple_of(self.kv_heads)
            && self.head_dim > 0
            && self.head_dim.is_multiple_of(2)
            && self.layers > 0
            && self.context > 0
            && self.window != Some(0);
        if fits { Ok(self) } else { Err(Error::Model(format!("the sizes do not fit together: {self:?}"))) }
    }

    pub(crate) fn attention(&self) -> Heads {
        Heads { queries: self.heads, keys: self.kv_heads, dim: self.head_dim, window: self.window }
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
