//! Reads a decoder's weights: GGUF files, Hugging Face directories, or a tiny random one for tests.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::BufReader,
    path::Path,
};

use candle_core::{DType, Device, Tensor, quantized::gguf_file, safetensors};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    Error,
    architecture::Architecture,
    decoder::{Decoder, Layer},
    linear::Linear,
    lora::Target,
    ops::Rope,
};

impl Decoder {
    /// Reads the weights of a GGUF file.
    pub(crate) fn from_gguf(content: &gguf_file::Content, file: &mut BufReader<File>) -> Result<Self, Error> {
        let architecture = Architecture::from_gguf(content)?;
        let (heads, kv_heads) = (architecture.heads, architecture.kv_heads);
        Self::build(architecture, |name| {
            let tensor = Linear::from_gguf(&content.tensor(file, &gguf_name(name), &Device::Cpu)?)?;
            // llama.cpp stores the rows of the query and key projections in the order of its own rotary embedding,
            // pairs side by side; the checkpoint's order (and the adapters') has the halves apart.
            if name.ends_with("q_proj.weight") {
                halves_apart(&tensor, heads)
            } else if name.ends_with("k_proj.weight") {
                halves_apart(&tensor, kv_heads)
            } else {
                Ok(tensor)
            }
        })
    }

    /// Reads `config.json` and all `*.safetensors` of a directory; any float type, unpacked to f32.
    pub(crate) fn from_directory(dir: &Path) -> Result<Self, Error> {
        let config = fs::read_to_string(dir.join("config.json"))
            .map_err(|error| Error::Model(format!("{}: config.json: {error}", dir.display())))?;
        let architecture = Architecture::from_config(&config)?;
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                tensors.extend(safetensors::load(&path, &Device::Cpu)?);
            }
        }
        Self::build(architecture, |name| {
            let tensor = tensors.remove(name);
            let tensor = tensor.ok_or_else(|| candle_core::Error::Msg(format!("`{name}` is missing")))?;
            Linear::dense_f32(&tensor)
        })
    }

    /// Random weights from a seed, for tests: the same seed gives the same model everywhere.
    pub(crate) fn random(architecture: Architecture, seed: u64) -> Result<Self, Error> {
        let mut rng = StdRng::seed_from_u64(seed);
        let shapes = architecture.clone();
        Self::build(architecture, |name| {
            let (rows, columns) = shape_of(name, &shapes);
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
            Ok(tensor)
        };
        let embedding = checked(EMBEDDING)?;
        let mut layers = Vec::with_capacity(architecture.layers);
        for layer in 0..architecture.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let [q, k, v, o, gate, up, down] = Target::ALL.map(|target| checked(&name(target.module())));
            layers.push(Layer {
                attention_norm: checked(&name("input_layernorm"))?.dense()?,
                mlp_norm: checked(&name("post_attention_layernorm"))?.dense()?,
                linears: [q?, k?, v?, o?, gate?, up?, down?],
            });
        }
        let norm = checked("model.norm.weight")?.dense()?;
        let head = if architecture.tied { embedding.clone() } else { checked(HEAD)? };
        let rope = Rope::new(architecture.context, architecture.head_dim, architecture.rope_theta);
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
        }
        if !self.architecture.tied {
            tensors.insert(HEAD.to_owned(), self.head.dense()?);
        }
        Ok(tensors)
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// `(rows, columns)` by Hugging Face name; vectors have one row.
fn shape_of(name: &str, architecture: &Architecture) -> (usize, usize) {
    match name {
        EMBEDDING | HEAD => (architecture.vocabulary, architecture.hidden),
        _ => Target::ALL
            .iter()
            .find(|target| name.contains(target.module()))
            .map_or((1, architecture.hidden), |target| architecture.linear(*target)),
    }
}

/// The GGUF name of a Hugging Face tensor.
fn gguf_name(name: &str) -> String {
    const NAMES: [(&str, &str); 12] = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
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
    NAMES.iter().fold(name.replace("model.layers.", "blk."), |name, (from, to)| name.replace(from, to))
}

/// `[heads · (half, 2), in]` to `[heads · (2, half), in]`.
fn halves_apart(weight: &Linear, heads: usize) -> candle_core::Result<Linear> {
    let half = weight.dims()[0] / heads / 2;
    weight.reordered(|row| {
        let (head, side, at) = (row / (2 * half), row / half % 2, row % half);
        head * 2 * half + at * 2 + side
    })
}
