//! From labelled rows to weights.

use sha2::{Digest, Sha256};

use crate::completion::{RefusalLabel, Risk};

use super::file::TYPES_MOST;
use super::{Calibration, Classifier, Error, Linear, interaction, refusal, risk};
use crate::signals::features::BUCKETS;
use crate::signals::fit::{Options, Row, calibrate, common, fit};

/// A prompt, or an answer to one, with what people say of it. What is not said is not learned from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Labelled {
    pub prompt: String,
    pub response: Option<String>,
    pub refusal: Option<RefusalLabel>,
    pub way_forward: Option<bool>,
    pub risk: Option<Risk>,
    pub interaction: Option<String>,
    /// How much the row counts.
    pub weight: f64,
    /// Drawn from a pattern: probabilities are calibrated on the other rows, if there are any.
    pub drawn: bool,
}

/// How long and how strictly to train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Passes over all rows.
    pub passes: usize,
    /// Refusals are not told by words that stand in answers to fewer prompts than this.
    pub groups: u32,
    /// Penalties on weights, against the mean loss.
    pub refusal: f64,
    pub risk: f64,
    pub interaction: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { passes: 150, groups: 12, refusal: 1e-5, risk: 1e-4, interaction: 1e-4 }
    }
}

impl Schedule {
    /// Weights that know something are held to it as by so many rows of their own.
    const KNOWN: f64 = 4000.0;

    fn options(self, penalty: f64, start: &[f32], rows: usize) -> Options {
        let blank = start.iter().all(|weight| *weight == 0.0);
        let hold = if blank { 1.0 } else { (Self::KNOWN / rows.max(1) as f64).max(1.0) };
        Options { penalty: penalty * hold, passes: self.passes }
    }
}

/// Whether rows of this prompt belong to the third that is only measured on.
pub fn held_out(prompt: &str) -> bool {
    group(prompt).is_multiple_of(3)
}

/// The first four bytes of the prompt's SHA-256: rows of one prompt stand on the same side of every split.
fn group(prompt: &str) -> u64 {
    let digest = Sha256::digest(prompt.as_bytes());
    u64::from(u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]))
}

impl Classifier {
    /// Weights that know nothing, for [`Self::train`] to begin with.
    pub fn blank(types: Vec<String>) -> Self {
        let table = |outputs: usize| Linear {
            outputs,
            scales: vec![0.0; outputs],
            weights: vec![0; Linear::size(outputs)],
        };
        Self {
            refusal: table(3),
            declines: Calibration::NONE,
            fully: Calibration::NONE,
            forward: Calibration::NONE,
            risk: table(1),
            harmful: Calibration::NONE,
            interaction: table(types.len()),
            types,
        }
    }

    /// These weights, moved towards the labels. A table for which there are no labels stays as it is.
    ///
    /// # Errors
    /// There are more interaction types than a file can hold.
    pub fn train(&mut self, rows: &[Labelled], schedule: Schedule, done: &dyn Fn(&str)) -> Result<(), Error> {
        let harmful: Vec<Row> = rows
            .iter()
            .filter_map(|row| {
                Some(row.of(risk::features(&row.prompt).list, usize::from(row.risk? == Risk::Harmful)))
            })
            .collect();
        if !harmful.is_empty() {
            done("risk");
            let start = self.risk.weights();
            let options = schedule.options(schedule.risk, &start, harmful.len());
            self.risk = Linear::rounded(1, &fit(&all(&harmful), 1, &start, options));
            self.harmful = calibrate(&harmful, &start, options);
        }
        self.train_refusal(rows, schedule, done);
        self.train_interaction(rows, schedule, done)
    }

    fn train_refusal(&mut self, rows: &[Labelled], schedule: Schedule, done: &dyn Fn(&str)) {
        let answers: Vec<(&Labelled, &str)> = rows
            .iter()
            .filter_map(|row| row.refusal.and(row.response.as_deref()).map(|answer| (row, answer)))
            .collect();
        let read: Vec<(&Labelled, Vec<(u32, f32)>)> = answers
            .iter()
            .map(|(row, answer)| {
                (*row, refusal::features(&row.prompt, answer, self.risk_probability(&row.prompt)).list)
            })
            .collect();
        let starts = columns(&self.refusal.weights(), 3);
        let mut fitted = starts.clone();
        let calibrations = [&mut self.declines, &mut self.fully, &mut self.forward];
        for (output, calibration) in calibrations.into_iter().enumerate() {
            let target = |row: &Labelled| match output {
                0 => row.refusal.map(|label| label != RefusalLabel::None),
                1 if row.refusal == Some(RefusalLabel::None) => None,
                1 => row.refusal.map(|label| label == RefusalLabel::Full),
                _ => row.way_forward,
            };
            let mut own: Vec<Row> = read
                .iter()
                .filter_map(|(row, features)| Some(row.of(features.clone(), usize::from(target(row)?))))
                .collect();
            if own.is_empty() {
                continue;
            }
            // Of a few rows nothing can be spared.
            let groups = schedule.groups.min(1 + own.len() as u32 / 200);
            common(&mut own, groups);
            let options = schedule.options(schedule.refusal, &starts[output], own.len());
            done(["refusal: declines", "refusal: wholly", "refusal: way forward"][output]);
            fitted[output] = fit(&all(&own), 1, &starts[output], options);
            *calibration = calibrate(&own, &starts[output], options);
        }
        self.refusal = Linear::rounded(3, &interleaved(&fitted));
    }

    fn train_interaction(
        &mut self,
        rows: &[Labelled],
        schedule: Schedule,
        done: &dyn Fn(&str),
    ) -> Result<(), Error> {
        let mut types = self.types.clone();
        for name in rows.iter().filter_map(|row| row.interaction.as_ref()) {
            if !types.contains(name) {
                types.push(name.clone());
            }
        }
        if types.len() > TYPES_MOST {
            return Err(Error::TooManyInteractions { count: types.len(), limit: TYPES_MOST });
        }
        let position = |name: &String| types.iter().position(|known| known == name);
        let labelled: Vec<Row> = rows
            .iter()
            .filter_map(|row| {
                Some(row.of(interaction::features(&row.prompt).list, position(row.interaction.as_ref()?)?))
            })
            .collect();
        if labelled.is_empty() {
            return Ok(());
        }
        done("interaction");
        let mut columns = columns(&self.interaction.weights(), self.types.len());
        columns.resize(types.len(), vec![0.0; BUCKETS]);
        let start = interleaved(&columns);
        let options = schedule.options(schedule.interaction, &start, labelled.len());
        self.interaction = Linear::rounded(types.len(), &fit(&all(&labelled), types.len(), &start, options));
        self.types = types;
        Ok(())
    }
}

impl Labelled {
    fn of(&self, features: Vec<(u32, f32)>, target: usize) -> Row {
        Row { features, target, weight: self.weight, group: group(&self.prompt), found: !self.drawn }
    }
}

fn all(rows: &[Row]) -> Vec<&Row> {
    rows.iter().collect()
}

fn columns(weights: &[f32], outputs: usize) -> Vec<Vec<f32>> {
    (0..outputs).map(|output| weights.iter().skip(output).step_by(outputs).copied().collect()).collect()
}

fn interleaved(columns: &[Vec<f32>]) -> Vec<f32> {
    let rows = columns.first().map_or(0, Vec::len);
    (0..rows).flat_map(|row| columns.iter().map(move |column| column[row])).collect()
}
