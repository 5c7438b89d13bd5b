//! Weights on disk: a line with the format's name, a line of JSON, then one byte a weight.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Calibration, Classifier, Error, Linear};

const MAGIC: &[u8] = b"gyrostat classifier 1\n";
/// More types than this are no labels of metrics.
pub(super) const TYPES_MOST: usize = 64;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    declines: Calibration,
    fully: Calibration,
    forward: Calibration,
    harmful: Calibration,
    types: Vec<String>,
    /// Of the refusal, the risk and the interaction table, one after another.
    scales: [Vec<f32>; 3],
    /// Of all weights.
    sha256: String,
}

impl Classifier {
    /// What [`Self::from_bytes`] reads.
    ///
    /// # Errors
    /// A calibration or a scale is no number.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let tables = [&self.refusal, &self.risk, &self.interaction];
        let weights: Vec<u8> = tables
            .iter()
            .flat_map(|table| table.weights.iter().map(|weight| weight.cast_unsigned()))
            .collect();
        let header = Header {
            declines: self.declines,
            fully: self.fully,
            forward: self.forward,
            harmful: self.harmful,
            types: self.types.clone(),
            scales: tables.map(|table| table.scales.clone()),
            sha256: digest(&weights),
        };
        let header = serde_json::to_vec(&header).map_err(|error| Error::Classifier(error.to_string()))?;
        Ok([MAGIC, &header, b"\n", &weights].concat())
    }

    /// Weights that [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// They are of another format, cut off, or changed since.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let fault = |fault: &str| Error::Classifier(fault.to_owned());
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| fault("no `gyrostat classifier 1` file"))?;
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or_else(|| fault("cut off"))?;
        let (header, weights) = (&rest[..end], &rest[end + 1..]);
        let header: Header = serde_json::from_slice(header).map_err(|error| fault(&error.to_string()))?;
        let outputs = [3, 1, header.types.len()];
        let sound = (1..=TYPES_MOST).contains(&outputs[2])
            && outputs.iter().zip(&header.scales).all(|(outputs, scales)| scales.len() == *outputs)
            && header.scales.iter().flatten().all(|scale| scale.is_finite())
            && weights.len() == outputs.iter().map(|outputs| Linear::size(*outputs)).sum::<usize>();
        if !sound {
            return Err(fault("its tables have the wrong size"));
        }
        if digest(weights) != header.sha256 {
            return Err(fault("its weights are not those that were written"));
        }
        let mut rest = weights;
        let [refusal, risk, interaction] = header.scales;
        let mut table = |scales: Vec<f32>| {
            let (own, after) = rest.split_at(Linear::size(scales.len()));
            rest = after;
            let weights = own.iter().map(|byte| byte.cast_signed()).collect();
            Linear { outputs: scales.len(), scales, weights }
        };
        Ok(Self {
            refusal: table(refusal),
            declines: header.declines,
            fully: header.fully,
            forward: header.forward,
            risk: table(risk),
            harmful: header.harmful,
            interaction: table(interaction),
            types: header.types,
        })
    }
}

fn digest(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}
