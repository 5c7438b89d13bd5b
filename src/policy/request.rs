//! What the engine is asked, and what it answers: plain data, no device.

use std::sync::Arc;

use crate::completion::{FinishReason, Version};

use super::{grammar::Grammar, lora::Adapter};

/// How the next token is drawn from the logits.
#[derive(Debug, Clone)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f64,
    /// The nucleus: the smallest set of tokens with at least this mass. 1 keeps all.
    pub top_p: f64,
    /// Only the `k` most likely tokens. 0 keeps all.
    pub top_k: usize,
    /// Only tokens with at least this share of the likeliest token's probability. 0 keeps all.
    pub min_p: f64,
    /// Taken from the logit of every token that is in the answer already.
    pub presence_penalty: f64,
    /// Taken from a token's logit once for each time that it is in the answer already.
    pub frequency_penalty: f64,
    /// Token ids with what is added to their logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// The form that the answer has to have.
    pub grammar: Option<Grammar>,
    /// The same seed, prompt and version give the same answer.
    pub seed: u64,
}

/// The model's own distribution.
impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            grammar: None,
            seed: 0,
        }
    }
}

/// A version's adapter; `None` is the base model as it is.
#[derive(Debug, Clone, Default)]
pub struct Served {
    pub version: Version,
    pub adapter: Option<Arc<Adapter>>,
}

/// One sequence to be generated.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Token ids, at least one; `prompt.len() + max_tokens` fits the context.
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    pub max_tokens: usize,
    /// Generation ends before the first of these.
    pub stop: Vec<String>,
    /// `Some(n)` asks for each token's log-probability and those of the `n` likeliest tokens.
    pub top_logprobs: Option<usize>,
    /// `None` is answered by the version that is served when generation starts, and by it to the end.
    pub pinned: Option<Served>,
}

/// A token's log-probability under the model at temperature 1, in nats.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    /// The token's own bytes; not always UTF-8 by themselves.
    pub bytes: Vec<u8>,
    pub logprob: f32,
    /// The likeliest tokens at this place, most likely first: id, bytes, log-probability.
    pub top: Vec<(u32, Vec<u8>, f32)>,
}

/// What the engine sends back for one request, in this order: `Started`, any number of `Text`, then `Done` or `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    Started {
        version: Version,
    },
    /// Whole characters only; `text` may be empty while a stop string or a character is undecided.
    Text {
        text: String,
        /// Empty unless `top_logprobs` was set.
        logprobs: Vec<TokenLogprob>,
    },
    Done(Generated),
    /// The device failed; nothing more follows.
    Failed(String),
}

/// How likely a drawn token was, at the temperature at which it was drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    /// `log π(token)` in nats.
    pub logprob: f32,
    /// Of the distribution that it was drawn from, in nats.
    pub entropy: f32,
}

/// The end of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Without the end-of-turn token.
    pub tokens: Vec<u32>,
    /// Of the tokens and of an end of turn behind them, for which [`super::Model::end_of_turn`] stands; empty for
    /// clients, and at temperature 0.
    pub drawn: Vec<Drawn>,
    pub finish_reason: FinishReason,
    /// Mean of `log π − log π_ref` over the answer in nats per token, where it was sampled.
    pub kl: Option<f64>,
    pub version: Version,
    /// Seconds until the first token, counted from `submit`.
    pub first_token_seconds: f64,
    /// Tokens of the prompt whose keys and values were there from an earlier request.
    pub cached_tokens: usize,
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    #[error("the queue is full: {limit} requests are waiting")]
    QueueFull { limit: usize, retry_after_seconds: u32 },
    #[error("the engine has stopped")]
    Stopped,
    #[error(
        "the prompt of {prompt} tokens and max_tokens of {max_tokens} exceed the context of {context} tokens"
    )]
    TooLong { prompt: usize, max_tokens: usize, context: usize },
}
