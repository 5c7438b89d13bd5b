//! Reads a decoder's weights: GGUF files, Hugging Face directories, or a tiny random one for tests.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File},
    io::BufReader,
    path::Path,
};

use candle_core::{DType, Device, Tensor, quantized::gguf_file, safetensors};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    Error,
    architecture::{Architecture, Family, Target},
    decoder::Decoder,
    device::Placement,
    layer::Layer,
    linear::Linear,
    rope::Rope,
};

impl Decoder {
    /// Reads the weights of a GGUF file.
    pub(crate) fn from_gguf(
        content: &gguf_file::Content,
        file: &mut BufReader<File>,
        placement: &Placement,
    ) -> Result<Self, Error> {
        // candle multiplies the sizes without looking whether their product fits, and reads none as some.
        for (name, info) in &content.tensor_infos {
            let elements =
                info.shape.dims().iter().try_fold(1usize, |product, size| product.checked_mul(*size));
            if elements.is_none_or(|elements| elements == 0 || elements > isize::MAX as usize / 8) {
                return Err(Error::Model(format!("GGUF: `{name}` of {:?} is no matrix", info.shape.dims())));
            }
        }
        const DIVISORS: &str = "rope_freqs.weight";
        let divisors = match content.tensor_infos.get(DIVISORS) {
            Some(_) => {
                Some(content.tensor(file, DIVISORS, &Device::Cpu)?.dequantize(&Device::Cpu)?.to_vec1()?)
            }
            None => None,
        };
        let architecture = Architecture::from_gguf(content, divisors)?;
        let (heads, kv_heads) = (architecture.heads, architecture.kv_heads);
        // llama.cpp stores the rows of Llama's query and key projections in the order of its own rotary embedding, pairs
        // side by side; the checkpoint's order (and the adapters') has the halves apart.
        let pairs = architecture.family == Family::Llama;
        Self::build(architecture, placement, |name| {
            let tensor = Linear::from_gguf(&content.tensor(file, &gguf_name(name), &Device::Cpu)?)?;
            match name {
                _ if pairs && name.ends_with("q_proj.weight") => halves_apart(&tensor, heads),
                _ if pairs && name.ends_with("k_proj.weight") => halves_apart(&tensor, kv_heads),
                _ => Ok(tensor),
            }
        })
    }

    /// Reads `config.json` and the safetensors of a directory, in one file or several; any float type, unpacked to f32.
    pub(crate) fn from_directory(dir: &Path, placement: &Placement) -> Result<Self, Error> {
        let config = fs::read_to_string(dir.join("config.json"))
            .map_err(|error| Error::Model(format!("{}: config.json: {error}", dir.display())))?;
        let generation = fs::read_to_string(dir.join("generation_config.json")).ok();
        let architecture = Architecture::from_config(&config, generation.as_deref())?;
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        for file in safetensors_files(dir)? {
            let loaded = safetensors::load(dir.join(&file), &Device::Cpu);
            tensors.extend(loaded.map_err(|error| Error::Model(format!("{file}: {error}")))?);
        }
        Self::build(architecture, placement, |name| {
            let tensor = tensors.remove(name);
            let tensor = tensor.ok_or_else(|| candle_core::Error::Msg(format!("`{name}` is missing")))?;
            Linear::dense_f32(&tensor)
        })
    }

    /// Random weights from a seed, for tests: the same seed gives the same model everywhere.
    pub(crate) fn random(
        architecture: Architecture,
        seed: u64,
        placement: &Placement,
    ) -> Result<Self, Error> {
        let mut rng = StdRng::seed_from_u64(seed);
        let shapes = architecture.clone();
        Self::build(architecture, placement, |name| {
            let (rows, columns) = shape_of(name, &shapes);
            // What only some families have is far from neutral, so that leaving it out would show.
            if name.ends_with("_proj.bias")
                || name.ends_with("q_norm.weight")
                || name.ends_with("k_norm.weight")
            {
                let data: Vec<f32> = (0..columns).map(|_| 0.5 + rng.random::<f32>()).collect();
                return Ok(Linear::Dense(Tensor::from_vec(data, columns, &Device::Cpu)?));
            }
            if rows == 1 {
                return Ok(Linear::Dense(Tensor::ones(columns, DType::F32, &Device::Cpu)?));
            }
            let bound = 2.0 / (columns as f32).sqrt();
            let data: Vec<f32> =
                (0..rows * columns).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * bound).collect();
            Ok(Linear::Dense(Tensor::from_vec(data, (rows, columns), &Device::Cpu)?))
        })
    }

    /// Asks `tensor` for each tensor by its Hugging Face name and checks its shape.
    fn build(
        architecture: Architecture,
        placement: &Placement,
        mut tensor: impl FnMut(&str) -> candle_core::Result<Linear>,
    ) -> Result<Self, Error> {
        let mut checked = |name: &str| {
            let tensor = tensor(name).map_err(|error| Error::Model(format!("`{name}`: {error}")))?;
            let expected = match shape_of(name, &architecture) {
                (1, columns) => vec![columns],
                (rows, columns) => vec![rows, columns],
            };
            let dims = tensor.dims();
            if dims != expected {
                return Err(Error::Model(format!("`{name}` is {dims:?}, not {expected:?}")));
            }
            // One by one, so that a card's weights are never on the host all at once in f32.
            tensor.placed(placement).map_err(|fault| Error::Model(format!("`{name}`: {fault}")))
        };
        let embedding = checked(EMBEDDING)?;
        // Not as many at once as a header may claim.
        let mut layers = Vec::new();
        for layer in 0..architecture.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let [q, k, v, o, gate, up, down] = Target::ALL.map(|target| checked(&name(target.module())));
            let (linears, joined) = joined([q?, k?, v?, o?, gate?, up?, down?], placement)?;
            let biases = if architecture.has_bias() {
                let of = |part: &str| checked(&format!("model.layers.{layer}.self_attn.{part}_proj.bias"));
                let [q, k, v] = ["q", "k", "v"].map(of);
                Some([q?.dense()?, k?.dense()?, v?.dense()?])
            } else {
                None
            };
            let head_norms = if architecture.norms_heads() {
                let (q, k) = (checked(&name("self_attn.q_norm"))?, checked(&name("self_attn.k_norm"))?);
                Some([q.dense()?, k.dense()?])
            } else {
                None
            };
            layers.push(Layer {
                attention_norm: checked(&name("input_layernorm"))?.dense()?,
                mlp_norm: checked(&name("post_attention_layernorm"))?.dense()?,
                linears,
                joined,
                biases,
                head_norms,
            });
        }
        let norm = checked("model.norm.weight")?.dense()?;
        let head = if architecture.tied { embedding.clone() } else { checked(HEAD)? };
        let rope = Rope::new(architecture.head_dim, architecture.rope_theta, &architecture.rope_scaling);
        Ok(Self { architecture, embedding, layers, norm, head, rope })
    }

    /// All weights under their Hugging Face names.
    pub(crate) fn tensors(&self) -> candle_core::Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::from([
            (EMBEDDING.to_owned(), self.embedding.dense()?),
            ("model.norm.weight".to_owned(), self.norm.clone()),
        ]);
        for (index, layer) in self.layers.iter().enumerate() {
            let name = |part: &str| format!("model.layers.{index}.{part}.weight");
            tensors.insert(name("input_layernorm"), layer.attention_norm.clone());
            tensors.insert(name("post_attention_layernorm"), layer.mlp_norm.clone());
            for (target, linear) in Target::ALL.iter().zip(&layer.linears) {
                tensors.insert(name(target.module()), linear.dense()?);
            }
            for (part, bias) in ["q", "k", "v"].iter().zip(layer.biases.iter().flatten()) {
                tensors.insert(format!("model.layers.{index}.self_attn.{part}_proj.bias"), bias.clone());
            }
            for (part, norm) in ["q", "k"].iter().zip(layer.head_norms.iter().flatten()) {
                tensors.insert(name(&format!("self_attn.{part}_norm")), norm.clone());
            }
        }
        if !self.architecture.tied {
            tensors.insert(HEAD.to_owned(), self.head.dense()?);
        }
        Ok(tensors)
    }
}

/// Linears that read the same input become rows of one matrix, beside the CPU's own form: they are one product then.
fn joined(
    [q, k, v, o, gate, up, down]: [Linear; 7],
    placement: &Placement,
) -> candle_core::Result<([Linear; 7], Option<[Tensor; 2]>)> {
    if placement.has_slices() {
        return Ok(([q, k, v, o, gate, up, down], None));
    }
    let (qkv, [q, k, v]) = Linear::joined([q, k, v])?;
    let (gate_up, [gate, up]) = Linear::joined([gate, up])?;
    Ok(([q, k, v, o, gate, up, down], Some([qkv, gate_up])))
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// `(rows, columns)` by Hugging Face name; vectors have one row.
fn shape_of(name: &str, architecture: &Architecture) -> (usize, usize) {
    let target = Target::ALL.iter().find(|target| name.contains(target.module()));
    match (name, target) {
        (EMBEDDING | HEAD, _) => (architecture.vocabulary, architecture.hidden),
        (_, Some(target)) if name.ends_with("_proj.bias") => (1, architecture.linear(*target).0),
        (_, Some(target)) => architecture.linear(*target),
        _ if name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight") => (1, architecture.head_dim),
        _ => (1, architecture.hidden),
    }
}

/// The files that hold a directory's weights: those that its index names, `model.safetensors`, or all that there are.
/// Some checkpoints bring the same weights twice.
fn safetensors_files(dir: &Path) -> Result<BTreeSet<String>, Error> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    const INDEX: &str = "model.safetensors.index.json";
    if let Ok(text) = fs::read_to_string(dir.join(INDEX)) {
        let index: Index =
            serde_json::from_str(&text).map_err(|error| Error::Model(format!("{INDEX}: {error}")))?;
        let files: BTreeSet<String> = index.weight_map.into_values().collect();
        return match files.iter().find(|file| file.contains(['/', '\\'])) {
            Some(file) => Err(Error::Model(format!("{INDEX}: {file:?} is not a file of the directory"))),
            None => Ok(files),
        };
    }
    if dir.join("model.safetensors").exists() {
        return Ok(BTreeSet::from(["model.safetensors".to_owned()]));
    }
    let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<std::io::Result<_>>()?;
    Ok(names.into_iter().filter(|name| name.ends_with(".safetensors")).collect())
}

/// The GGUF name of a Hugging Face tensor.
pub(super) fn gguf_name(name: &str) -> String {
    const NAMES: [(&str, &str); 14] = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    NAMES.iter().fold(name.replace("model.layers.", "blk."), |name, (from, to)| name.replace(from, to))
}

/// `[heads · (half, 2), in]` to `[heads · (2, half), in]`.
fn halves_apart(weight: &Linear, heads: usize) -> candle_core::Result<Linear> {
    // The shape is checked afterwards, and a file may hold anything.
    if !weight.dims()[0].is_multiple_of(2 * heads) {
        candle_core::bail!("{:?} is not {heads} heads", weight.dims())
    }
    let half = weight.dims()[0] / heads / 2;
    weight.reordered(|row| {
        let (head, side, at) = (row / (2 * half), row / half % 2, row % half);
        head * 2 * half + at * 2 + side
    })
}
