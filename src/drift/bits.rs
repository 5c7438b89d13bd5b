//! `f64` through any serde format and back to the same bit: as the integer of its bits, since a decimal parser
//! may be off by one unit in the last place, and a detector restored so would no longer alarm where it should.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(super) fn serialize<S: Serializer>(x: &f64, to: S) -> Result<S::Ok, S::Error> {
    x.to_bits().serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    u64::deserialize(from).map(f64::from_bits)
}

/// Rows of the grid without their padding, one after the other.
pub(super) mod rows {
    use crate::drift::lanes::{GRID, LANES, Row};

    pub(in crate::drift) fn pack(rows: &[Row]) -> Vec<u64> {
        rows.iter().flat_map(|row| row[..GRID].iter().map(|x| x.to_bits())).collect()
    }

    /// `None` unless there are exactly `count` rows of finite, non-negative numbers.
    pub(in crate::drift) fn unpack(packed: &[u64], count: usize) -> Option<Vec<Row>> {
        let usable = |&bits: &u64| f64::from_bits(bits) >= 0.0;
        if packed.len() != count * GRID || !packed.iter().all(usable) {
            return None;
        }
        let row = |points: &[u64]| {
            let mut row = [0.0; LANES];
            for (x, &bits) in row.iter_mut().zip(points) {
                *x = f64::from_bits(bits);
            }
            row
        };
        Some(packed.chunks_exact(GRID).map(row).collect())
    }
}
