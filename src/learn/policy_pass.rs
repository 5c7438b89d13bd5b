//! Log-probabilities of answers under a policy adapter, and their way back into it.

use std::sync::Arc;

use candle_core::Tensor;

use crate::policy::{Adapter, AdapterGradient, Decoder, Tape, TokenLogprobs};

use super::{Error, sequence::MicroBatch};

/// A forward pass whose backward pass can follow.
#[derive(Debug)]
pub struct PolicyPass {
    logprobs: TokenLogprobs,
    tape: Tape,
}

/// `log π(token)` and the entropy at each answered place, without a way back. `trunk` is the input of `first_layer`.
///
/// # Errors
/// The device fails.
pub fn logprobs(
    decoder: &Decoder,
    micro: &MicroBatch,
    (trunk, first_layer): (&Tensor, usize),
    adapter: Option<&Arc<Adapter>>,
    temperature: f64,
) -> Result<TokenLogprobs, Error> {
    let hidden = decoder.hidden_from(trunk, &micro.answers(adapter), first_layer)?;
    Ok(decoder.token_logprobs(&hidden, &micro.targets, temperature, false)?)
}

/// A policy and the model itself at the same answered places.
#[derive(Debug)]
pub struct BesideBase {
    pub policy: TokenLogprobs,
    pub base: TokenLogprobs,
}

impl BesideBase {
    /// Without a way back; what lies below the adapter is passed once.
    ///
    /// # Errors
    /// The device fails.
    pub fn new(decoder: &Decoder, micro: &MicroBatch, adapter: &Arc<Adapter>) -> Result<Self, Error> {
        let trunk = decoder.trunk(&micro.batch(), adapter.first_layer)?;
        let at = (&trunk, adapter.first_layer);
        let policy = logprobs(decoder, micro, at, Some(adapter), 1.0)?;
        Ok(Self { policy, base: logprobs(decoder, micro, at, None, 1.0)? })
    }

    /// `log π − log π_ref`, an answered place each.
    pub fn ratios(&self) -> impl Iterator<Item = f64> {
        let each = self.policy.logprobs.iter().zip(&self.base.logprobs);
        each.map(|(policy, base)| f64::from(*policy) - f64::from(*base))
    }
}

impl PolicyPass {
    /// The forward pass.
    ///
    /// # Errors
    /// The device fails.
    pub fn new(
        decoder: &Decoder,
        micro: &MicroBatch,
        trunk: &Tensor,
        adapter: &Arc<Adapter>,
        temperature: f64,
    ) -> Result<Self, Error> {
        let (hidden, tape) =
            decoder.hidden_taped(trunk, &micro.answers(Some(adapter)), adapter.first_layer)?;
        let logprobs = decoder.token_logprobs(&hidden, &micro.targets, temperature, true)?;
        Ok(Self { logprobs, tape })
    }

    /// `log π(token)`, an answered place each.
    pub fn logprobs(&self) -> &[f32] {
        &self.logprobs.logprobs
    }

    /// Entropy in nats, an answered place each.
    pub fn entropies(&self) -> &[f32] {
        &self.logprobs.entropies
    }

    /// Adds what a gradient by the log-probabilities makes of the adapter. What was kept for it is freed.
    ///
    /// # Errors
    /// The device fails.
    pub fn backward(
        self,
        decoder: &Decoder,
        dlogprobs: &[f32],
        gradient: &mut AdapterGradient,
    ) -> Result<(), Error> {
        if let Some(danswered) = self.logprobs.backward(dlogprobs)? {
            decoder.backward(&self.tape, &danswered, gradient)?;
        }
        Ok(())
    }
}
