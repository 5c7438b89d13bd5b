//! A tiny random Llama with a byte tokenizer, as a Hugging Face directory: real in every part, small enough for tests.

use std::{fs, path::Path};

use candle_core::safetensors;
use serde_json::json;
use tokenizers::{AddedToken, Tokenizer, models::bpe::BPE, pre_tokenizers::byte_level::ByteLevel};

use super::{Architecture, Decoder, Error};

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Two layers, 64 wide, grouped-query attention, tied head.
pub(crate) fn architecture() -> Architecture {
    Architecture {
        hidden: 64,
        intermediate: 96,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocabulary: 256 + SPECIAL.len(),
        context: 512,
        rope_theta: 10_000.0,
        rms_epsilon: 1e-5,
        tied: true,
        end_of_turn: vec![2],
    }
}

/// Writes the tiny model into `dir`, which is made if need be. The same seed writes the same weights.
///
/// # Errors
/// The files cannot be written.
pub fn write_tiny(dir: &Path, seed: u64) -> Result<(), Error> {
    fs::create_dir_all(dir)?;
    let decoder = Decoder::random(architecture(), seed)?;
    safetensors::save(&decoder.tensors()?, dir.join("model.safetensors"))?;
    let tokenizer = tokenizer()?;
    tokenizer.save(dir.join("tokenizer.json"), false).map_err(|error| Error::Tokenizer(error.to_string()))?;
    let architecture = &decoder.architecture;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rms_norm_eps": architecture.rms_epsilon,
        "tie_word_embeddings": architecture.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    });
    fs::write(dir.join("config.json"), format!("{config:#}"))?;
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
