//! Low-rank adapters (Hu et al., *LoRA*, 2021) on every linear of the decoder, stored as PEFT stores them.
//!
//! The update of a linear is `alpha / rank · B A x`. An adapter is immutable once made: training makes a new one after
//! each step, so that the engine can hold any of them without a lock.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, OnceLock},
};

use candle_core::{DType, Device, Tensor, safetensors};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::{
    Error,
    architecture::{Architecture, Target},
    device::Placement,
    ops::{add_scaled, for_each_row, read},
    packed::Lanes,
};

/// One linear's low-rank pair: `a` is `[rank, in]`, `b` is `[out, rank]`.
#[derive(Debug, Clone)]
pub struct Pair {
    pub a: Tensor,
    pub b: Tensor,
    lanes: OnceLock<[Lanes; 2]>,
}

impl Pair {
    fn new(a: Tensor, b: Tensor) -> Self {
        Self { a, b, lanes: OnceLock::new() }
    }

    /// `scale · a` and `b` for products beside packed weights; brought into that order once, as the scale is the adapter's.
    pub(crate) fn lanes(&self, scale: f64) -> candle_core::Result<&[Lanes; 2]> {
        if let Some(lanes) = self.lanes.get() {
            return Ok(lanes);
        }
        let lanes = [Lanes::new(&self.a, scale)?, Lanes::new(&self.b, 1.0)?];
        Ok(self.lanes.get_or_init(|| lanes))
    }

    /// Adds `scale · B A` to a weight of `[out, in]`.
    pub(crate) fn add_to(&self, weight: &mut [f32], scale: f32) -> candle_core::Result<()> {
        let (rank, input) = self.a.dims2()?;
        read(&self.a, |a| {
            read(&self.b, |b| {
                for_each_row(
                    weight,
                    input,
                    #[inline(always)]
                    |row, weight| {
                        for (b, a) in b[row * rank..(row + 1) * rank].iter().zip(a.chunks_exact(input)) {
                            add_scaled(weight, scale * b, a);
                        }
                    },
                );
            })
        })?
    }
}

/// LoRA pairs for all linears of the layers from `first_layer` on; a reward adapter has a scalar head besides.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub rank: usize,
    pub alpha: f64,
    pub first_layer: usize,
    /// Seven a layer, in the order of [`Target::ALL`].
    pairs: Vec<Pair>,
    /// `[heads, hidden]`, without bias; `None` for a policy.
    pub score: Option<Tensor>,
    /// The pairs in the form of the activations; four a layer, in the order of [`Target::SHARING`].
    placed: OnceLock<Arc<Vec<Stack>>>,
}

/// The pairs of linears that read the same input.
#[derive(Debug, Clone)]
pub(crate) struct Stack {
    /// One below the other: `[linears · rank, in]`.
    pub(crate) a: Tensor,
    /// Each one's, `[out, rank]`.
    pub(crate) bs: Vec<Tensor>,
}

/// The shape of an adapter before it is made.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub rank: usize,
    pub alpha: f64,
    /// Layers below this one are left alone.
    pub first_layer: usize,
    /// Scalar heads; none for a policy.
    pub heads: usize,
}

impl Adapter {
    /// A new adapter that changes nothing yet: `A` is uniform as PEFT draws it (Kaiming, `a = √5`), `B` is zero.
    pub fn new(architecture: &Architecture, shape: Shape, seed: u64) -> Result<Self, Error> {
        let mut rng = StdRng::seed_from_u64(seed);
        let device = Device::Cpu;
        let mut uniform = |rows: usize, columns: usize, bound: f64| {
            let data: Vec<f32> =
                (0..rows * columns).map(|_| ((rng.random::<f64>() * 2.0 - 1.0) * bound) as f32).collect();
            Tensor::from_vec(data, (rows, columns), &device)
        };
        let mut pairs = Vec::new();
        for _ in shape.first_layer..architecture.layers {
            for target in Target::ALL {
                let (out, input) = architecture.linear(target);
                let a = uniform(shape.rank, input, 1.0 / (input as f64).sqrt())?;
                pairs.push(Pair::new(a, Tensor::zeros((out, shape.rank), DType::F32, &device)?));
            }
        }
        let hidden = architecture.hidden;
        let bound = 1.0 / (hidden as f64).sqrt();
        let score = (shape.heads > 0).then(|| uniform(shape.heads, hidden, bound)).transpose()?;
        let Shape { rank, alpha, first_layer, .. } = shape;
        Ok(Self { rank, alpha, first_layer, pairs, score, placed: OnceLock::new() })
    }

    /// `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// The pair of one linear, if this adapter reaches its layer.
    pub fn pair(&self, layer: usize, target: Target) -> Option<&Pair> {
        self.pairs.get(self.index(layer, target)?)
    }

    /// Where the linear's pair stands among the pairs.
    pub(crate) fn index(&self, layer: usize, target: Target) -> Option<usize> {
        Some(layer.checked_sub(self.first_layer)? * Target::ALL.len() + target as usize)
    }

    /// The pairs of linears that read the same input, as in [`Target::SHARING`], for products with `x`; `None` if this
    /// adapter does not reach their layer.
    pub(crate) fn beside(
        &self,
        layer: usize,
        targets: &[Target],
        x: &Tensor,
    ) -> candle_core::Result<Option<Stack>> {
        let group = Target::SHARING.iter().position(|sharing| *sharing == targets);
        let (Some(layer), Some(group)) = (layer.checked_sub(self.first_layer), group) else {
            return Ok(None);
        };
        let at = layer * Target::SHARING.len() + group;
        let placement = Placement::of(x);
        let known = self.placed.get().and_then(|stacks| stacks.get(at));
        if let Some(stack) = known.filter(|stack| placement.holds(&stack.a)) {
            return Ok(Some(stack.clone()));
        }
        let stacks = Arc::new(self.stacks(&placement)?);
        // Another device's may stand there already; then it keeps its place.
        let _kept = self.placed.set(Arc::clone(&stacks));
        Ok(stacks.get(at).cloned())
    }

    fn stacks(&self, placement: &Placement) -> candle_core::Result<Vec<Stack>> {
        let layers =
            self.pairs.chunks_exact(Target::ALL.len()).map(|layer| self.layer_stacks(layer, placement));
        Ok(layers.collect::<candle_core::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// The pairs of a layer travel at once: a card waits longer for many small copies than for one.
    fn layer_stacks(&self, layer: &[Pair], placement: &Placement) -> candle_core::Result<[Stack; 4]> {
        let groups = Target::SHARING.map(|targets| targets.iter().map(|target| &layer[*target as usize]));
        let mut numbers: Vec<f32> = Vec::new();
        for pairs in groups.clone() {
            for tensor in pairs.clone().map(|pair| &pair.a).chain(pairs.map(|pair| &pair.b)) {
                read(tensor, |tensor| numbers.extend_from_slice(tensor))?;
            }
        }
        let count = numbers.len();
        let all = placement.place(&Tensor::from_vec(numbers, count, &Device::Cpu)?)?;
        let mut from = 0;
        let mut cut = |rows: usize, columns: usize| {
            let piece = all.narrow(0, from, rows * columns)?.reshape((rows, columns));
            from += rows * columns;
            piece
        };
        let stacks = groups.map(|pairs| {
            let input = pairs.clone().next().map_or(Ok(0), |pair| pair.a.dim(1))?;
            let a = cut(pairs.len() * self.rank, input)?;
            let bs = pairs.map(|pair| cut(pair.b.dim(0)?, self.rank));
            Ok(Stack { a, bs: bs.collect::<candle_core::Result<_>>()? })
        });
        let stacks = stacks.into_iter().collect::<candle_core::Result<Vec<_>>>()?;
        stacks.try_into().map_err(|_| candle_core::Error::Msg("four stacks a layer".to_owned()))
    }

    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// All trainable numbers: `a`, `b` of each pair, then the score head.
    pub fn parameters(&self) -> Result<Vec<Vec<f32>>, Error> {
        let tensors = self.pairs.iter().flat_map(|pair| [&pair.a, &pair.b]).chain(&self.score);
        Ok(tensors.map(|tensor| tensor.flatten_all()?.to_vec1()).collect::<candle_core::Result<_>>()?)
    }

    /// The same adapter with other numbers, in the order of [`Adapter::parameters`].
    pub fn with_parameters(&self, parameters: &[Vec<f32>]) -> Result<Self, Error> {
        let mut values = parameters.iter();
        let mut next = |like: &Tensor| {
            let data = values.next().map_or_else(Vec::new, Clone::clone);
            Tensor::from_vec(data, like.shape(), like.device())
        };
        let pairs = self
            .pairs
            .iter()
            .map(|pair| Ok(Pair::new(next(&pair.a)?, next(&pair.b)?)))
            .collect::<candle_core::Result<_>>()?;
        let score = self.score.as_ref().map(&mut next).transpose()?;
        Ok(Self { pairs, score, placed: OnceLock::new(), ..*self })
    }

    /// The scalar heads for products with hidden states in f32 where these are, `[heads, hidden]`.
    pub fn heads_beside(&self, hidden: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.score.as_ref().map(|heads| heads.to_device(hidden.device())).transpose()
    }

    /// The same adapter with one head, the mean of its heads.
    pub fn with_mean_head(&self) -> Result<Self, Error> {
        let score = self.score.as_ref().map(|heads| heads.mean_keepdim(0)).transpose()?;
        Ok(Self { score, ..self.clone() })
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`, which exists.
    ///
    /// Of several heads PEFT gets the mean, and they themselves lie beside, in `heads.safetensors`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, dir: &Path, base: &str) -> Result<(), Error> {
        let mut tensors = HashMap::new();
        for (at, pair) in self.pairs.iter().enumerate() {
            let prefix = tensor_prefix(self.first_layer + at / 7, Target::ALL[at % 7]);
            tensors.insert(format!("{prefix}.lora_A.weight"), pair.a.clone());
            tensors.insert(format!("{prefix}.lora_B.weight"), pair.b.clone());
        }
        if let Some(heads) = &self.score {
            tensors.insert(SCORE.to_owned(), heads.mean_keepdim(0)?);
            if heads.dim(0)? > 1 {
                let heads = HashMap::from([("heads".to_owned(), heads.clone())]);
                safetensors::save(&heads, dir.join(HEADS))?;
            }
        }
        safetensors::save(&tensors, dir.join(WEIGHTS))?;
        let layers = self.first_layer..self.first_layer + self.pairs.len() / 7;
        let config = PeftConfig {
            task_type: if self.score.is_some() { "SEQ_CLS" } else { "CAUSAL_LM" }.to_owned(),
            base_model_name_or_path: Some(base.to_owned()),
            r: self.rank,
            lora_alpha: self.alpha,
            target_modules: Target::ALL.map(|target| target.peft_name().to_owned()).to_vec(),
            layers_to_transform: (self.first_layer > 0).then(|| layers.collect()),
            modules_to_save: self.score.is_some().then(|| vec!["classifier".to_owned(), "score".to_owned()]),
            ..PeftConfig::default()
        };
        let json =
            serde_json::to_string_pretty(&config).map_err(|error| Error::Adapter(error.to_string()))?;
        fs::write(dir.join(CONFIG), json)?;
        Ok(())
    }

    /// Reads what [`Adapter::save`], or PEFT, wrote for this architecture.
    ///
    /// # Errors
    /// A file is missing or damaged, a tensor is missing or has another shape, or the configuration asks for something
    /// that is not supported (DoRA, rank-stabilised scaling, other modules); the message names it.
    pub fn load(dir: &Path, architecture: &Architecture) -> Result<Arc<Self>, Error> {
        let invalid = |what: String| Error::Adapter(format!("{}: {what}", dir.display()));
        let config =
            fs::read_to_string(dir.join(CONFIG)).map_err(|error| invalid(format!("{CONFIG}: {error}")))?;
        let config: PeftConfig =
            serde_json::from_str(&config).map_err(|error| invalid(format!("{CONFIG}: {error}")))?;
        config.check().map_err(invalid)?;
        let tensors = safetensors::load(dir.join(WEIGHTS), &Device::Cpu)?;
        let tensor = |name: String, rows: usize, columns: usize| {
            let found = tensors.get(&name).ok_or_else(|| invalid(format!("{name} is missing")))?;
            if found.dims() != [rows, columns] {
                return Err(invalid(format!("{name} is {:?}, not [{rows}, {columns}]", found.dims())));
            }
            Ok(found.to_dtype(DType::F32)?)
        };
        let first_layer =
            config.layers_to_transform.as_ref().and_then(|layers| layers.iter().min().copied()).unwrap_or(0);
        let mut pairs = Vec::new();
        for layer in first_layer..architecture.layers {
            for target in Target::ALL {
                let (out, input) = architecture.linear(target);
                let prefix = tensor_prefix(layer, target);
                pairs.push(Pair::new(
                    tensor(format!("{prefix}.lora_A.weight"), config.r, input)?,
                    tensor(format!("{prefix}.lora_B.weight"), out, config.r)?,
                ));
            }
        }
        let mut score = tensors
            .contains_key(SCORE)
            .then(|| tensor(SCORE.to_owned(), 1, architecture.hidden))
            .transpose()?;
        // Heads whose mean is not the score belong to another training: somebody has gone on with the score alone.
        if let (Some(mean), true) = (&score, dir.join(HEADS).exists()) {
            let heads = safetensors::load(dir.join(HEADS), &Device::Cpu)?;
            let heads = heads.get("heads").ok_or_else(|| invalid(format!("{HEADS} has no heads")))?;
            let own = heads.dims().len() == 2 && same(&heads.mean_keepdim(0)?, mean)?;
            score = if own { Some(heads.clone()) } else { score };
        }
        let (rank, alpha, placed) = (config.r, config.lora_alpha, OnceLock::new());
        Ok(Arc::new(Self { rank, alpha, first_layer, pairs, score, placed }))
    }
}

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const SCORE: &str = "base_model.model.score.weight";
const HEADS: &str = "heads.safetensors";

fn same(a: &Tensor, b: &Tensor) -> Result<bool, Error> {
    Ok(a.dims() == b.dims() && a.flatten_all()?.to_vec1::<f32>()? == b.flatten_all()?.to_vec1::<f32>()?)
}

fn tensor_prefix(layer: usize, target: Target) -> String {
    format!("base_model.model.model.layers.{layer}.{}", target.module())
}

/// The fields of PEFT's `adapter_config.json` that matter; those that we do not support must be off.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct PeftConfig {
    peft_type: String,
    task_type: String,
    base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    lora_dropout: f64,
    bias: String,
    target_modules: Vec<String>,
    layers_to_transform: Option<Vec<usize>>,
    fan_in_fan_out: bool,
    inference_mode: bool,
    use_rslora: bool,
    use_dora: bool,
    rank_pattern: HashMap<String, usize>,
    alpha_pattern: HashMap<String, f64>,
    modules_to_save: Option<Vec<String>>,
}

impl Default for PeftConfig {
    fn default() -> Self {
        Self {
            peft_type: "LORA".to_owned(),
            task_type: "CAUSAL_LM".to_owned(),
            base_model_name_or_path: None,
            r: 0,
            lora_alpha: 0.0,
            lora_dropout: 0.0,
            bias: "none".to_owned(),
            target_modules: Vec::new(),
            layers_to_transform: None,
            fan_in_fan_out: false,
            inference_mode: true,
            use_rslora: false,
            use_dora: false,
            rank_pattern: HashMap::new(),
            alpha_pattern: HashMap::new(),
            modules_to_save: None,
        }
    }
}

impl PeftConfig {
    fn check(&self) -> Result<(), String> {
        let mut targets: Vec<&str> = self.target_modules.iter().map(String::as_str).collect();
        targets.sort_unstable();
        let mut ours = Target::ALL.map(Target::peft_name);
        ours.sort_unstable();
        let unsupported = [
            ("peft_type", self.peft_type != "LORA"),
            ("r", self.r == 0),
            ("bias", self.bias != "none"),
            ("fan_in_fan_out", self.fan_in_fan_out),
            ("use_rslora", self.use_rslora),
            ("use_dora", self.use_dora),
            ("rank_pattern", !self.rank_pattern.is_empty()),
            ("alpha_pattern", !self.alpha_pattern.is_empty()),
            ("target_modules", targets != ours),
        ];
        match unsupported.iter().find(|(_, bad)| *bad) {
            Some((field, _)) => Err(format!("{CONFIG}: this value of `{field}` is not supported")),
            None => Ok(()),
        }
    }
}
