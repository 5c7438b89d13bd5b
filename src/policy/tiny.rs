//! A tiny random Llama with a byte tokenizer, as a Hugging Face directory: real in every part, small enough for tests.

use std::{fs, path::Path};

use candle_core::safetensors;
use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer, models::bpe::BPE, pre_tokenizers::byte_level::ByteLevel};

use super::{
    Architecture, Decoder, Error, Family, RopeScaling, architecture::yarn_attention, device::Placement,
};

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Two layers, 64 wide, grouped-query attention, tied head.
pub(crate) fn architecture() -> Architecture {
    Architecture {
        family: Family::Llama,
        hidden: 64,
        intermediate: 96,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocabulary: 256 + SPECIAL.len(),
        context: 512,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        rms_epsilon: 1e-5,
        window: None,
        tied: true,
        end_of_turn: vec![2],
    }
}

/// The same with what a family has of its own; `None` if there is no tiny model of this name.
pub fn family(name: &str) -> Option<Architecture> {
    let tiny = architecture();
    let (factor, original) = (4.0, 8);
    match name {
        "llama" => Some(tiny),
        "llama-linear" => {
            Some(Architecture { rope_scaling: RopeScaling::Linear { factor }, tied: false, ..tiny })
        }
        "llama3" => {
            let (low_freq_factor, high_freq_factor) = (1.0, 4.0);
            let original = 64;
            let rope_scaling = RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original };
            Some(Architecture { rope_scaling, rope_theta: 100.0, ..tiny })
        }
        "mistral" => Some(Architecture { family: Family::Mistral, window: Some(3), ..tiny }),
        "qwen2" => {
            let attention_factor = yarn_attention(factor);
            let (beta_fast, beta_slow) = (32.0, 1.0);
            let rope_scaling = RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original };
            Some(Architecture { family: Family::Qwen2, rope_scaling, tied: false, ..tiny })
        }
        "qwen3" => Some(Architecture { family: Family::Qwen3, head_dim: 24, ..tiny }),
        _ => None,
    }
}

/// `config.json`, as transformers reads it too.
fn config(architecture: &Architecture) -> Value {
    let (class, kind) = match architecture.family {
        Family::Llama => ("LlamaForCausalLM", "llama"),
        Family::Mistral => ("MistralForCausalLM", "mistral"),
        Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
    };
    let scaling = match &architecture.rope_scaling {
        RopeScaling::None | RopeScaling::Divisors(_) => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor, "original_max_position_embeddings": original,
        }),
        RopeScaling::Yarn { factor, original, .. } => json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
        }),
    };
    json!({
        "architectures": [class],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": architecture.hidden,
        "intermediate_size": architecture.intermediate,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "vocab_size": architecture.vocabulary,
        "max_position_embeddings": architecture.context,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": scaling,
        "sliding_window": architecture.window,
        "rms_norm_eps": architecture.rms_epsilon,
        "tie_word_embeddings": architecture.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    })
}

/// Writes the tiny model into `dir`, which is made if need be. The same seed writes the same weights.
///
/// # Errors
/// The files cannot be written.
pub fn write_tiny(dir: &Path, seed: u64) -> Result<(), Error> {
    write_tiny_of(architecture(), dir, seed)
}

/// [`write_tiny`] of one [`family`].
///
/// # Errors
/// The files cannot be written.
pub fn write_tiny_of(architecture: Architecture, dir: &Path, seed: u64) -> Result<(), Error> {
    fs::create_dir_all(dir)?;
    let decoder = Decoder::random(architecture, seed, &Placement::cpu())?;
    safetensors::save(&decoder.tensors()?, dir.join("model.safetensors"))?;
    let tokenizer = tokenizer()?;
    tokenizer.save(dir.join("tokenizer.json"), false).map_err(|error| Error::Tokenizer(error.to_string()))?;
    fs::write(dir.join("config.json"), format!("{:#}", config(&decoder.architecture)))?;
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "chat_template": super::prompt::CHATML,
    });
    fs::write(dir.join("tokenizer_config.json"), format!("{tokenizer_config:#}"))?;
    Ok(())
}

/// One token a byte, after the special ones.
fn tokenizer() -> Result<Tokenizer, Error> {
    let failed = |error: tokenizers::Error| Error::Tokenizer(error.to_string());
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let names = SPECIAL.iter().map(|name| (*name).to_owned()).chain(alphabet.iter().map(char::to_string));
    let vocabulary = names.zip(0u32..).collect::<Vec<_>>();
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<tokenizers::models::bpe::Vocab>(), Vec::new())
        .build()
        .map_err(failed)?;
    let mut tokenizer = Tokenizer::new(model);
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    tokenizer
        .add_special_tokens(SPECIAL.map(|name| AddedToken::from(name.to_owned(), true)))
        .map_err(failed)?;
    Ok(tokenizer)
}
