//! Every family and every type of a GGUF file, against transformers and against dequantised weights.

use std::{collections::HashMap, fs::File, io::BufReader, path::Path};

use candle_core::{
    Device,
    quantized::{GgmlDType, QTensor, gguf_file},
    safetensors,
};

use super::*;
use crate::policy::{Architecture, Family, tiny_family, write_tiny_of};

pub(super) const FAMILIES: [&str; 6] = ["llama", "llama-linear", "llama3", "mistral", "qwen2", "qwen3"];

pub(super) fn of(family: &str) -> Decoder {
    Decoder::random(tiny_family(family).unwrap(), 0, &Placement::cpu()).unwrap()
}

fn logits(decoder: &Decoder) -> Vec<Vec<f32>> {
    rows(&decoder.logits(&decoder.hidden(&Batch::of([&TOKENS[..]], None)).unwrap()).unwrap())
}

/// ```python
/// # gyrostat model tiny --out tiny --family FAMILY
/// import torch; from transformers import AutoModelForCausalLM   # 5.23
/// m = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32).eval()
/// l = m(torch.tensor([[1,5,17,99,200,258,3,42]])).logits[0]
/// for r in (3, 7): print(l[r, [0, 1, 50, 100, 258]].tolist())
/// ```
#[test]
fn every_family_has_the_logits_of_transformers() {
    for (family, third, seventh) in [
        (
            "llama-linear",
            [1.164_322, 1.137_102, 0.311_502, -1.587_565, -0.779_688],
            [2.688_938, 1.155_805, -0.308_342, -2.439_701, -0.074_244],
        ),
        (
            "llama3",
            [-0.171_936, -0.008_292, 0.560_325, 0.708_02, -0.488_898],
            [0.292_904, -1.560_365, 1.372_412, 0.328_948, 1.836_186],
        ),
        (
            "mistral",
            [-0.144_469, -0.139_309, 0.376_723, 0.774_527, -0.570_708],
            [0.071_748, -0.352_335, -0.040_906, -0.230_888, 1.631_586],
        ),
        (
            "qwen2",
            [-0.633_145, 2.039_979, 1.716_535, 0.981_832, -1.692_86],
            [0.998_981, 1.106_621, 1.701_053, 0.044_446, -2.293_616],
        ),
        (
            "qwen3",
            [0.120_275, 0.448_954, 2.466_725, -0.814_014, -0.484_231],
            [-0.044_987, -2.735_216, 0.434_314, -0.762_565, 1.796_198],
        ),
    ] {
        // Through the files, so that what is written and read of a configuration counts too.
        let dir = tempfile::tempdir().unwrap();
        write_tiny_of(tiny_family(family).unwrap(), dir.path(), 0).unwrap();
        let decoder = Decoder::from_directory(dir.path(), &Placement::cpu()).unwrap();
        assert_eq!(decoder.architecture, tiny_family(family).unwrap());
        let logits = logits(&decoder);
        let picked = |row: usize| [0, 1, 50, 100, 258].map(|token| logits[row][token]);
        check_close(&picked(3), &third, 1e-4);
        check_close(&picked(7), &seventh, 1e-4);
    }
}

#[test]
fn every_family_steps_and_learns_as_it_reads() {
    for family in FAMILIES {
        let decoder = of(family);
        let adapter = trained(&decoder, 0);
        let full = rows(&decoder.hidden(&Batch::of([&TOKENS[..]], Some(&adapter))).unwrap());
        let mut cache = KvCache::of(&decoder.architecture, &decoder.placement(), 64).unwrap();
        let mut stepped = Vec::new();
        for chunk in [&TOKENS[..3], &TOKENS[3..4], &TOKENS[4..]] {
            let mut batch = Batch::default();
            batch.push(chunk, cache.len(), Some(&adapter));
            stepped.extend(rows(&decoder.step(&batch, &mut [&mut cache]).unwrap()));
        }
        for (stepped, full) in stepped.iter().zip(&full) {
            check_close(stepped, full, 1e-4);
        }
        check_gradients(&decoder, &adapter);
    }
}

#[test]
fn shards_are_read_together_and_what_lies_beside_them_is_not() {
    let whole = tempfile::tempdir().unwrap();
    write_tiny_of(tiny_family("qwen2").unwrap(), whole.path(), 0).unwrap();
    let tensors = safetensors::load(whole.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let mut shards = [HashMap::new(), HashMap::new()];
    let mut places = serde_json::Map::new();
    for (nth, (name, tensor)) in tensors.into_iter().enumerate() {
        places.insert(name.clone(), format!("part-{}.safetensors", nth % 2).into());
        shards[nth % 2].insert(name, tensor.to_dtype(candle_core::DType::F32).unwrap());
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(whole.path().join("config.json"), dir.path().join("config.json")).unwrap();
    for (nth, shard) in shards.iter().enumerate() {
        safetensors::save(shard, dir.path().join(format!("part-{nth}.safetensors"))).unwrap();
    }
    std::fs::write(dir.path().join("other.safetensors"), "no weights").unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, serde_json::json!({ "weight_map": places }).to_string()).unwrap();
    assert_eq!(
        logits(&Decoder::from_directory(dir.path(), &Placement::cpu()).unwrap()),
        logits(&of("qwen2"))
    );

    std::fs::write(&index, r#"{"weight_map": {"a": "../away.safetensors"}}"#).unwrap();
    let error = Decoder::from_directory(dir.path(), &Placement::cpu()).unwrap_err().to_string();
    assert!(error.contains("../away.safetensors"), "{error}");
    std::fs::write(&index, r#"{"weight_map": {"a": "part-0.safetensors"}}"#).unwrap();
    let error = Decoder::from_directory(dir.path(), &Placement::cpu()).unwrap_err().to_string();
    assert!(error.contains("is missing"), "{error}");
}

/// As llama.cpp writes it: rows of Llama's queries and keys with pairs side by side.
fn write_gguf(path: &Path, decoder: &Decoder, kind: GgmlDType) {
    use gguf_file::Value;
    let architecture = &decoder.architecture;
    let name = match architecture.family {
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
    };
    let size = |value: usize| Value::U32(value as u32);
    let metadata = [
        ("general.architecture".to_owned(), Value::String(name.to_owned())),
        (format!("{name}.embedding_length"), size(architecture.hidden)),
        (format!("{name}.feed_forward_length"), size(architecture.intermediate)),
        (format!("{name}.block_count"), size(architecture.layers)),
        (format!("{name}.attention.head_count"), size(architecture.heads)),
        (format!("{name}.attention.head_count_kv"), size(architecture.kv_heads)),
        (format!("{name}.attention.key_length"), size(architecture.head_dim)),
        (format!("{name}.context_length"), size(architecture.context)),
        (format!("{name}.rope.freq_base"), Value::F32(architecture.rope_theta as f32)),
        (format!("{name}.attention.layer_norm_rms_epsilon"), Value::F32(1e-5)),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(2)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(String, QTensor)> = decoder
        .tensors()
        .unwrap()
        .into_iter()
        .map(|(name, tensor)| {
            let permuted = architecture.family == Family::Llama && name.ends_with("proj.weight");
            let tensor = match () {
                () if permuted && name.contains("q_proj") => side_by_side(&tensor, architecture.heads),
                () if permuted && name.contains("k_proj") => side_by_side(&tensor, architecture.kv_heads),
                () => tensor,
            };
            let kind = if tensor.rank() == 2 { kind } else { GgmlDType::F32 };
            (crate::policy::weights::gguf_name(&name), QTensor::quantize(&tensor, kind).unwrap())
        })
        .collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

fn side_by_side(weight: &Tensor, heads: usize) -> Tensor {
    let (out, input) = weight.dims2().unwrap();
    let halves = weight.reshape((heads, 2, out / heads / 2, input)).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((out, input)).unwrap()
}

fn read_gguf(path: &Path) -> Result<Decoder, crate::policy::Error> {
    let mut file = BufReader::new(File::open(path).unwrap());
    let content = gguf_file::Content::read(&mut file).unwrap();
    Decoder::from_gguf(&content, &mut file, &Placement::cpu())
}

/// Wide enough for blocks of 256 weights.
fn wide(family: &str) -> Decoder {
    let wide = Architecture { hidden: 256, intermediate: 256, head_dim: 64, ..tiny_family(family).unwrap() };
    Decoder::random(
        Architecture { rope_scaling: crate::policy::RopeScaling::None, ..wide },
        0,
        &Placement::cpu(),
    )
    .unwrap()
}

#[test]
fn every_type_of_a_gguf_file_is_its_dequantised_weights() {
    use GgmlDType::{BF16, F16, F32, Q4_0, Q4_1, Q4K, Q6K, Q8_0};
    let dir = tempfile::tempdir().unwrap();
    let (packed, float) = (dir.path().join("packed.gguf"), dir.path().join("float.gguf"));
    for family in ["llama", "qwen2", "qwen3"] {
        for kind in [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4K, Q6K] {
            write_gguf(&packed, &wide(family), kind);
            let decoder = read_gguf(&packed).unwrap();
            // Its own weights in f32, written and read again.
            write_gguf(&float, &decoder, F32);
            let (found, expected) = (logits(&decoder), logits(&read_gguf(&float).unwrap()));
            for (found, expected) in found.iter().zip(&expected) {
                check_close(found, expected, 1e-3);
            }
            if kind == F32 {
                check_close(&expected[7], &logits(&wide(family))[7], 1e-4);
            }
        }
    }
}
