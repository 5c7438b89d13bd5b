//! What to do when the device has not the memory for a micro-batch: take it in smaller parts.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicUsize, Ordering},
};

use tracing::warn;

use super::{Error, Watch, sequence::MicroBatch};

/// Tokens of one micro-batch at most: what is configured, or less once the device has failed for want of memory.
#[derive(Debug)]
pub struct MicroTokens {
    most: AtomicUsize,
    /// Tokens that a simulated device holds.
    #[cfg(test)]
    holds: usize,
}

impl MicroTokens {
    pub fn new(most: usize) -> Self {
        Self {
            most: AtomicUsize::new(most),
            #[cfg(test)]
            holds: usize::MAX,
        }
    }

    /// On a device that fails at the end of every pass over more than `holds` tokens.
    #[cfg(test)]
    pub(crate) fn simulated(most: usize, holds: usize) -> Self {
        Self { holds, ..Self::new(most) }
    }

    pub fn get(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }

    /// Half of what was too much, from now on.
    fn halve(&self, tokens: usize) {
        let most = (self.get().min(tokens) / 2).max(1);
        self.most.store(most, Ordering::Relaxed);
        warn!(tokens, most, "the device has not the memory for a micro-batch; they are smaller from now on");
    }

    #[cfg(test)]
    fn check(&self, tokens: usize) -> Result<(), Error> {
        if tokens > self.holds {
            return Err(candle_core::Error::Msg("CUDA_ERROR_OUT_OF_MEMORY".to_owned()).into());
        }
        Ok(())
    }
}

impl Watch<'_> {
    /// Runs `pass` over a micro-batch: all of it, or, where the device has not the memory, over parts of it one after the
    /// other, in order. What a part that failed has added to `state` is taken back before it is tried in smaller ones.
    ///
    /// # Errors
    /// The pass fails for another reason, or with a single group of sequences, or the update is cancelled.
    pub fn in_memory<S: Clone, T>(
        &self,
        micro: &MicroBatch,
        state: &mut S,
        mut pass: impl FnMut(&MicroBatch, &mut S) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let mut results = Vec::new();
        let mut waiting = VecDeque::from(micro.parts(self.micro_tokens.get()));
        while let Some(part) = waiting.pop_front() {
            self.between()?;
            let before = state.clone();
            let result = pass(&part, state);
            #[cfg(test)]
            let result = result.and_then(|done| self.micro_tokens.check(part.rows()).map(|()| done));
            match result {
                Err(fault) if fault.is_out_of_memory() && part.groups() > 1 => {
                    *state = before;
                    self.micro_tokens.halve(part.rows());
                    waiting.push_front(part);
                    let most = self.micro_tokens.get();
                    waiting = waiting.iter().flat_map(|part| part.parts(most)).collect();
                }
                result => results.push(result?),
            }
        }
        Ok(results)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::learn::{Sequence, tests::watching};

    fn sequences() -> Vec<Sequence> {
        let lengths = [9, 7, 11, 8, 30, 6];
        lengths.map(|length| Sequence::new((0..length).collect(), 3)).to_vec()
    }

    /// Every sequence is passed once, and what failed leaves nothing behind.
    #[test]
    fn what_does_not_fit_is_taken_in_parts() {
        let watch = Watch { micro_tokens: MicroTokens::simulated(100, 20), ..watching(0) };
        let own = sequences();
        let fitting = &own[..4];
        let micros = MicroBatch::pack(fitting, watch.micro_tokens.get());
        assert_eq!(micros.len(), 1);
        let rows = Tensor::arange(0f32, 35.0, &Device::Cpu).unwrap();
        let mut seen: Vec<usize> = Vec::new();
        let pass = |part: &MicroBatch, seen: &mut Vec<usize>| {
            seen.extend(&part.members);
            Ok(part.own_rows(&rows)?.to_vec1::<f32>()?)
        };
        let parts = watch.in_memory(&micros[0], &mut seen, pass).unwrap();
        assert_eq!(seen, [0, 1, 2, 3]);
        assert_eq!(
            parts,
            [0..16, 16..27, 27..35].map(|rows: Range<u16>| rows.map(f32::from).collect::<Vec<_>>())
        );
        // The smaller budget is kept.
        assert_eq!(watch.micro_tokens.get(), 17);
        assert_eq!(MicroBatch::pack(fitting, watch.micro_tokens.get()).len(), 3);
    }

    #[test]
    fn one_sequence_that_does_not_fit_is_an_error() {
        let watch = Watch { micro_tokens: MicroTokens::simulated(100, 20), ..watching(0) };
        let micro = MicroBatch::pack(&sequences(), 100).remove(0);
        let mut passed = 0;
        let failed = watch.in_memory(&micro, &mut passed, |part, passed| {
            *passed += part.members.len();
            Ok(())
        });
        assert!(failed.unwrap_err().is_out_of_memory());
    }

    #[test]
    fn other_faults_are_not_tried_again() {
        let mut tried = 0;
        let micro = MicroBatch::pack(&sequences(), 100).remove(0);
        let failed = watching(100).in_memory(&micro, &mut (), |_, ()| {
            tried += 1;
            Err::<(), _>(Error::NotFinite { what: "a loss" })
        });
        assert!(matches!(failed, Err(Error::NotFinite { .. })) && tried == 1);
    }
}
