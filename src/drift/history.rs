//! What a stream read, in two kilobytes: the newest readings one by one, older ones in sums of 2, 4, 8, …

use serde::{Deserialize, Serialize};

use super::change::Past;

/// Sums that are kept of each size, which makes a time known to within a tenth of what has passed since.
const KEPT: usize = 10;
/// Sizes; what is older than `KEPT · (2^SIZES − 1)` readings is one sum.
const SIZES: usize = 10;

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct History {
    past: (u64, u64, u64),
    /// By size, the smallest first.
    sizes: Vec<Size>,
}

#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
struct Size {
    held: u8,
    /// The oldest first.
    sums: [Sum; KEPT],
}

/// Neighbouring readings: the time of the first, and sums as the bits of `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
struct Sum {
    at: u64,
    total: u32,
    squares: u32,
}

impl Sum {
    fn merged(self, later: Self) -> Self {
        let add = |a: u32, b: u32| (f32::from_bits(a) + f32::from_bits(b)).to_bits();
        Self { at: self.at, total: add(self.total, later.total), squares: add(self.squares, later.squares) }
    }

    fn past(self, count: u64) -> Past {
        let wide = |x: u32| f64::from(f32::from_bits(x));
        Past { count, sum: wide(self.total), squares: wide(self.squares) }
    }
}

impl History {
    pub(super) fn push(&mut self, reading: f64, at: u64) {
        let narrow = |x: f64| (x as f32).to_bits();
        let mut new = Sum { at, total: narrow(reading), squares: narrow(reading * reading) };
        for size in 0..SIZES {
            if size == self.sizes.len() {
                self.sizes.push(Size::default());
            }
            let Size { held, sums } = &mut self.sizes[size];
            if usize::from(*held) < KEPT {
                sums[usize::from(*held)] = new;
                *held += 1;
                return;
            }
            let oldest = sums[0].merged(sums[1]);
            sums.copy_within(2.., 0);
            sums[KEPT - 2] = new;
            *held -= 1;
            new = oldest;
        }
        let past = self.past().and(new.past(1 << SIZES));
        self.past = (past.count, past.sum.to_bits(), past.squares.to_bits());
    }

    pub(super) fn past(&self) -> Past {
        let (count, sum, squares) = self.past;
        Past { count, sum: f64::from_bits(sum), squares: f64::from_bits(squares) }
    }

    /// The oldest first, each with the time of its first reading.
    pub(super) fn sums(&self) -> impl DoubleEndedIterator<Item = (u64, Past)> + Clone {
        self.sizes.iter().enumerate().rev().flat_map(|(size, Size { held, sums })| {
            sums[..usize::from(*held)].iter().map(move |sum| (sum.at, sum.past(1 << size)))
        })
    }

    /// The newest `count` readings, or somewhat more.
    pub(super) fn newest(&self, count: u64) -> Past {
        let mut newest = Past::default();
        for (_, sum) in self.sums().rev() {
            if newest.count >= count {
                break;
            }
            newest = newest.and(sum);
        }
        newest
    }

    /// What came at `from` or later, by whole sums.
    pub(super) fn since(&self, from: u64) -> Past {
        self.sums()
            .rev()
            .take_while(|(at, _)| *at >= from)
            .fold(Past::default(), |all, (_, sum)| all.and(sum))
    }
}
