//! `f64` through any serde format and back to the same bit: as the integer of its bits, since a decimal parser
//! may be off by one unit in the last place, and a detector restored so would no longer alarm where it should.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(super) fn serialize<S: Serializer>(x: &f64, to: S) -> Result<S::Ok, S::Error> {
    x.to_bits().serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    u64::deserialize(from).map(f64::from_bits)
}

/// Arrays of numbers.
pub(super) mod array {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(in crate::drift) fn serialize<S: Serializer, const N: usize>(
        x: &[f64; N],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        x.map(f64::to_bits).as_slice().serialize(to)
    }

    pub(in crate::drift) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        from: D,
    ) -> Result<[f64; N], D::Error> {
        let numbers: Vec<u64> = Vec::deserialize(from)?;
        let numbers: [u64; N] = numbers.try_into().map_err(|_| D::Error::custom("an array's length"))?;
        let numbers = numbers.map(f64::from_bits);
        if numbers.iter().all(|x| x.is_finite()) {
            Ok(numbers)
        } else {
            Err(D::Error::custom("not a number"))
        }
    }
}

/// Square matrices.
pub(super) mod matrix {
    use serde::{Deserializer, Serialize, Serializer, de::Error};

    pub(in crate::drift) fn serialize<S: Serializer, const N: usize>(
        x: &[[f64; N]; N],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        x.as_flattened().iter().map(|x| x.to_bits()).collect::<Vec<_>>().serialize(to)
    }

    pub(in crate::drift) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        from: D,
    ) -> Result<[[f64; N]; N], D::Error> {
        let numbers: Vec<u64> = serde::Deserialize::deserialize(from)?;
        if numbers.len() != N * N {
            return Err(D::Error::custom("a matrix's size"));
        }
        Ok(std::array::from_fn(|row| std::array::from_fn(|column| f64::from_bits(numbers[row * N + column]))))
    }
}
