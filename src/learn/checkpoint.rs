//! What a training run needs to go on after it was killed, bit for bit: one safetensors file, replaced as a whole.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::policy::{Adapter, AdapterGradient};

use super::{
    Error,
    adamw::{self, AdamW},
};

/// Where checkpoints lie, and how often one is written.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    path: PathBuf,
    every: usize,
    /// Tells the run from others; a checkpoint of another run is refused.
    run: String,
    resume: bool,
}

/// A run between two steps. Randomness is drawn from the seed and the number of the step, so there is none to keep.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct State {
    pub(super) step: usize,
    pub(super) trainees: Vec<Kept>,
    /// What else the recipe has learned, such as PPO's KL coefficient.
    pub(super) numbers: Vec<f64>,
}

/// An adapter's numbers with its optimiser's, each list one after the other.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Kept {
    parameters: Vec<f32>,
    steps: i32,
    first: Vec<f32>,
    second: Vec<f32>,
}

/// An adapter in training, and the memory of its optimiser.
#[derive(Debug, Clone)]
pub(super) struct Trainee {
    pub(super) adapter: Arc<Adapter>,
    optimiser: AdamW,
}

impl Trainee {
    pub(super) fn new(adapter: Arc<Adapter>, learning_rate: f64) -> Self {
        Self { adapter, optimiser: AdamW::new(adamw::Config { learning_rate, ..Default::default() }) }
    }

    /// One step against the gradient, at `rate` of the learning rate.
    pub(super) fn step(
        &mut self,
        gradient: &AdapterGradient,
        max_grad_norm: f64,
        rate: f64,
    ) -> Result<(), Error> {
        let gradients = gradient.flatten(&self.adapter)?;
        let parameters = self.optimiser.step(self.adapter.parameters()?, gradients, max_grad_norm, rate)?;
        self.adapter = Arc::new(self.adapter.with_parameters(&parameters)?);
        Ok(())
    }

    pub(super) fn keep(&self) -> Result<Kept, Error> {
        let (steps, moments) = self.optimiser.memory();
        Ok(Kept {
            parameters: self.adapter.parameters()?.concat(),
            steps,
            first: moments.iter().flat_map(|(first, _)| first).copied().collect(),
            second: moments.iter().flat_map(|(_, second)| second).copied().collect(),
        })
    }

    /// The adapter must have the shape that it had.
    pub(super) fn restore(&mut self, kept: &Kept) -> Result<(), Error> {
        let shape: Vec<usize> = self.adapter.parameters()?.iter().map(Vec::len).collect();
        let parameters = cut(&kept.parameters, &shape)?;
        self.adapter = Arc::new(self.adapter.with_parameters(&parameters)?);
        if !kept.first.is_empty() {
            let moments = cut(&kept.first, &shape)?.into_iter().zip(cut(&kept.second, &shape)?);
            self.optimiser.remember(kept.steps, moments.collect());
        }
        Ok(())
    }
}

/// A flat list as lists of these lengths.
fn cut(flat: &[f32], lengths: &[usize]) -> Result<Vec<Vec<f32>>, Error> {
    if flat.len() != lengths.iter().sum::<usize>() {
        return Err(Error::Checkpoint("the adapter has another shape".to_owned()));
    }
    let mut rest = flat;
    let mut next = |length: &usize| {
        let (head, tail) = rest.split_at(*length);
        rest = tail;
        head.to_vec()
    };
    Ok(lengths.iter().map(&mut next).collect())
}

impl Checkpoints {
    /// Beside the adapter in `dir`. With `resume` a run begins where the checkpoint of the same run is, if there is one.
    pub fn new(dir: &Path, every: usize, run: String, resume: bool) -> Self {
        Self { path: dir.join("checkpoint.safetensors"), every: every.max(1), run, resume }
    }

    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// The run has ended.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(&self) -> Result<(), Error> {
        if self.exists() { fs::remove_file(&self.path).map_err(|error| self.fault(&error)) } else { Ok(()) }
    }

    pub(super) fn load(&self) -> Result<Option<State>, Error> {
        if !self.resume || !self.exists() {
            return Ok(None);
        }
        let bytes = fs::read(&self.path).map_err(|error| self.fault(&error))?;
        let (run, state) = decode(&bytes).map_err(|error| self.fault(&error))?;
        if run != self.run {
            return Err(self.fault(&"it is of a run with other data, another seed or other settings"));
        }
        Ok(Some(state))
    }

    pub(super) fn is_due(&self, step: usize) -> bool {
        step.is_multiple_of(self.every)
    }

    pub(super) fn write(&self, state: &State) -> Result<(), Error> {
        self.replace(&encode(&self.run, state).map_err(|error| self.fault(&error))?)
            .map_err(|error| self.fault(&error))
    }

    /// Either the old file or the new one is there at any moment.
    fn replace(&self, bytes: &[u8]) -> std::io::Result<()> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let beside = self.path.with_extension("tmp");
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, &self.path)?;
        File::open(dir)?.sync_all()
    }

    fn fault(&self, why: &dyn std::fmt::Display) -> Error {
        Error::Checkpoint(format!("{}: {why}", self.path.display()))
    }
}

/// The lists as tensors, everything else as metadata; `f64` by its bits.
fn encode(run: &str, state: &State) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let mut lists: Vec<(String, usize, Vec<u8>)> = Vec::new();
    let mut metadata = HashMap::from([
        ("run".to_owned(), run.to_owned()),
        ("step".to_owned(), state.step.to_string()),
        ("numbers".to_owned(), words(state.numbers.iter().map(|number| number.to_bits()))),
        ("optimiser_steps".to_owned(), words(state.trainees.iter().map(|kept| kept.steps))),
    ]);
    for (at, kept) in state.trainees.iter().enumerate() {
        for (name, list) in
            [("parameters", &kept.parameters), ("first", &kept.first), ("second", &kept.second)]
        {
            let bytes = list.iter().flat_map(|value| value.to_le_bytes()).collect();
            lists.push((format!("{name}.{at}"), list.len(), bytes));
        }
    }
    metadata.insert("format".to_owned(), "gyrostat".to_owned());
    let views = lists
        .iter()
        .map(|(name, length, bytes)| Ok((name, TensorView::new(Dtype::F32, vec![*length], bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize(views, Some(metadata))
}

fn words<T: ToString>(values: impl Iterator<Item = T>) -> String {
    values.map(|value| value.to_string()).collect::<Vec<_>>().join(" ")
}

fn decode(bytes: &[u8]) -> Result<(String, State), Box<dyn std::error::Error>> {
    let (_, header) = SafeTensors::read_metadata(bytes)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let word = |name: &str| metadata.get(name).ok_or_else(|| format!("{name} is missing"));
    let tensors = SafeTensors::deserialize(bytes)?;
    let list = |name: String| {
        let bytes = tensors.tensor(&name)?.data();
        let values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        Ok::<Vec<f32>, safetensors::SafeTensorError>(values.collect())
    };
    let mut state = State { step: word("step")?.parse()?, ..State::default() };
    for (at, steps) in word("optimiser_steps")?.split_whitespace().enumerate() {
        state.trainees.push(Kept {
            parameters: list(format!("parameters.{at}"))?,
            steps: steps.parse()?,
            first: list(format!("first.{at}"))?,
            second: list(format!("second.{at}"))?,
        });
    }
    for bits in word("numbers")?.split_whitespace() {
        state.numbers.push(f64::from_bits(bits.parse()?));
    }
    Ok((word("run")?.clone(), state))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_survives_the_disk_bit_for_bit_and_other_runs_refuse_it() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Kept {
            parameters: vec![0.1, -0.0, f32::MIN_POSITIVE],
            steps: 7,
            first: vec![1.0, 2.0, 3.0],
            second: vec![1e-9, 0.0, 4.0],
        };
        let bare = Kept { parameters: vec![0.5], ..Kept::default() };
        let state = State { step: 3, trainees: vec![kept, bare], numbers: vec![0.1 + 0.2, -1e300] };
        let of = |run: &str, resume| Checkpoints::new(dir.path(), 2, run.to_owned(), resume);
        assert_eq!(of("a", true).load().unwrap(), None);
        of("a", false).write(&state).unwrap();
        let back = of("a", true).load().unwrap().unwrap();
        assert_eq!(back, state);
        assert!(back.trainees[0].parameters[1].is_sign_negative());
        assert_eq!(of("a", false).load().unwrap(), None);
        assert!(of("b", true).load().unwrap_err().to_string().contains("another seed"));
        of("a", true).remove().unwrap();
        assert!(!of("a", true).exists());
    }
}
