//! Model files, templates and messages.

use candle_core::{
    Device,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
    safetensors,
};
use gyrostat::{
    completion::Message,
    policy::{self, Model},
};
use rand::{RngExt, rngs::StdRng};

use super::{for_a_while, mangled};

/// A tiny model's directory.
pub(crate) fn tiny() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    gyrostat::policy::write_tiny(dir.path(), 0).unwrap();
    dir
}

/// Turns, zeroes or blows up some of the first `header` bytes: lengths, types and offsets are there.
fn spoilt(rng: &mut StdRng, bytes: &[u8], header: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..header.min(bytes.len() - 8));
        match rng.random_range(0..4) {
            0 => bytes[at] = rng.random(),
            1 => bytes[at] ^= 1 << rng.random_range(0..8),
            2 => bytes[at..at + 8].copy_from_slice(&rng.random::<u64>().to_le_bytes()),
            _ => bytes.truncate(at),
        }
        if bytes.len() <= 8 {
            break;
        }
    }
    bytes
}

#[test]
fn a_spoilt_safetensors_file_is_refused_or_served() {
    let dir = tiny();
    let path = dir.path().join("model.safetensors");
    let sound = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    for_a_while("safetensors", |rng| {
        std::fs::write(&path, spoilt(rng, &sound, header)).unwrap();
        let _either = Model::load(dir.path().to_str().unwrap(), policy::Device::Cpu);
    });
}

#[test]
fn a_spoilt_configuration_is_refused_or_served() {
    let dir = tiny();
    let path = dir.path().join("config.json");
    let sound = std::fs::read(&path).unwrap();
    let fragments: Vec<&[u8]> = sound.split_inclusive(|byte| *byte == b'\n').collect();
    for_a_while("config.json", |rng| {
        // All of it with a little damage, or any lines of it.
        let text = if rng.random() { spoilt(rng, &sound, sound.len()) } else { mangled(rng, &fragments) };
        std::fs::write(&path, text).unwrap();
        let _either = Model::load(dir.path().to_str().unwrap(), policy::Device::Cpu);
    });
}

#[test]
fn a_spoilt_gguf_file_is_refused_or_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let header = write_gguf(&path);
    let sound = std::fs::read(&path).unwrap();
    assert!(Model::load(path.to_str().unwrap(), policy::Device::Cpu).is_ok());
    for_a_while("gguf", |rng| {
        std::fs::write(&path, spoilt(rng, &sound, header)).unwrap();
        let _either = Model::load(path.to_str().unwrap(), policy::Device::Cpu);
    });
}

/// The tiny model with the vocabulary of its bytes; returns where the tensors' data begin, about.
fn write_gguf(path: &std::path::Path) -> usize {
    let dir = tiny();
    let tensors = safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let names = [
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    let tensors: Vec<(String, QTensor)> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let kind = if tensor.rank() == 2 { GgmlDType::Q4_0 } else { GgmlDType::F32 };
            let name = names.iter().fold(name, |name, (from, to)| name.replace(from, to));
            (name, QTensor::quantize(&tensor, kind).unwrap())
        })
        .collect();
    let text = |text: &str| Value::String(text.to_owned());
    let vocabulary = (0..259).map(|id| text(&format!("t{id}"))).collect();
    let metadata = [
        ("general.architecture", text("llama")),
        ("llama.embedding_length", Value::U32(64)),
        ("llama.feed_forward_length", Value::U32(96)),
        ("llama.block_count", Value::U32(2)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.attention.head_count_kv", Value::U32(2)),
        ("llama.context_length", Value::U32(512)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.tokens", Value::Array(vocabulary)),
        ("tokenizer.ggml.merges", Value::Array(Vec::new())),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    let data: usize = tensors.iter().map(|(_, tensor)| tensor.storage_size_in_bytes()).sum();
    std::fs::metadata(path).unwrap().len() as usize - data
}

#[test]
fn any_template_ends_and_says_what_is_wrong() {
    const FRAGMENTS: [&[u8]; 22] = [
        b"{% for message in messages %}",
        b"{% endfor %}",
        b"{{ message.role }}",
        b"{{ message.content | trim }}",
        b"{{ message['content'].split('a')[-1] }}",
        b"{% if message.role == 'user' %}",
        b"{% elif loop.first %}",
        b"{% else %}",
        b"{% endif %}",
        b"{% set ns = namespace(a=1) %}",
        b"{% set ns.a = ns.a + 1 %}",
        b"{{ raise_exception('no') }}",
        b"{{ messages | tojson(indent=3) }}",
        b"{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(1) }}",
        b"{% for i in range(99999) %}{{ messages }}",
        b"{% break %}",
        b"{{ messages[0]['content'][:5] ~ bos_token }}",
        b"{{ -1 // 0 }}",
        b"{{ 9223372036854775807 + 1 }}",
        b"{{ strftime_now('%d %Q') }}",
        b"<|im_start|>",
        b"\n{%- ",
    ];
    let dir = tiny();
    let path = dir.path().join("chat_template.jinja");
    for_a_while("template", |rng| {
        std::fs::write(&path, mangled(rng, &FRAGMENTS)).unwrap();
        let Ok(model) = Model::load(dir.path().to_str().unwrap(), policy::Device::Cpu) else { return };
        let words = String::from_utf8_lossy(&mangled(rng, &FRAGMENTS)).into_owned();
        let _either = model.vocabulary.encode_chat(&[Message::user(&words), Message::user("b")]);
    });
}

#[test]
fn any_message_is_read_as_text() {
    const FRAGMENTS: [&[u8]; 8] = [
        b"<|im_end|>",
        b"<|im_start|>system\n",
        b"<|im_",
        b"<\xef\xb7\x90|im_end|>",
        b"\xf0\x9f\xa6\x80",
        b"{{ x }}",
        b"\0",
        b"words ",
    ];
    let dir = tiny();
    let model = Model::load(dir.path().to_str().unwrap(), policy::Device::Cpu).unwrap();
    let specials = |tokens: &[u32]| tokens.iter().filter(|token| **token < 3).count();
    let expected = specials(&model.vocabulary.encode_chat(&[Message::user("hi")]).unwrap());
    for_a_while("message", |rng| {
        let words = String::from_utf8_lossy(&mangled(rng, &FRAGMENTS)).into_owned();
        let tokens = model.vocabulary.encode_chat(&[Message::user(&words)]).unwrap();
        assert_eq!(specials(&tokens), expected, "a message spoke a special token");
    });
}
