//! The numbers that shape a decoder, from a Hugging Face `config.json` or GGUF metadata.

mod gguf;
mod huggingface;
mod scaling;

use std::ops::Range;

use super::Error;

pub use scaling::RopeScaling;
pub(super) use scaling::yarn_attention;

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

/// The linears of one layer, in the order in which a token passes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

impl Target {
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// Those that read the same input stand beside each other.
    pub(crate) const SHARING: [&[Self]; 4] =
        [&[Self::Query, Self::Key, Self::Value], &[Self::Output], &[Self::Gate, Self::Up], &[Self::Down]];

    /// The module's name within a layer of a Hugging Face checkpoint.
    pub fn module(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// The same without its block, as PEFT's `target_modules` have it.
    pub(super) fn peft_name(self) -> &'static str {
        self.module().split_once('.').map_or("", |(_, name)| name)
    }
}

/// Head counts and width. `queries` is a multiple of `keys`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) dim: usize,
    /// Places that a token sees, its own included; all if unset.
    pub(crate) window: Option<usize>,
}

impl Heads {
    pub(crate) fn scale(self) -> f32 {
        (self.dim as f32).sqrt().recip()
    }

    /// The places that the token at `place` sees.
    pub(super) fn seen(self, place: usize) -> Range<usize> {
        let end = place + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    pub(super) fn key_columns(self) -> usize {
        self.keys * self.dim
    }

    /// Of queries, keys and values.
    #[cfg(feature = "cuda")]
    pub(super) fn widths(self) -> [usize; 3] {
        [self.queries * self.dim, self.key_columns(), self.key_columns()]
    }
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
