//! Epochs over given examples, a step of AdamW after each batch: what SFT, DPO, KTO and the reward model have in common.

use std::sync::Arc;

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::policy::{Adapter, AdapterGradient};

use super::{
    Error, Watch, adamw,
    checkpoint::{State, Trainee},
};

/// Measures of one step.
pub(super) type Measured = Vec<(&'static str, f64)>;

/// How a descent goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descent<'a> {
    pub(super) stage: &'a str,
    pub(super) examples: usize,
    pub(super) epochs: usize,
    /// Examples between two steps.
    pub(super) batch: usize,
    pub(super) learning_rate: f64,
    pub(super) max_grad_norm: f64,
    pub(super) seed: u64,
}

/// Adds the gradient of some examples, given by their places.
pub(super) type Pass<'a> =
    &'a dyn Fn(&Arc<Adapter>, &[usize], &mut AdapterGradient) -> Result<Measured, Error>;

/// Randomness of one step, or one epoch, of a run. What is drawn there does not depend on what was drawn before, so that
/// a run goes on after a kill as if nothing had been.
pub(super) fn rng(seed: u64, step: usize) -> StdRng {
    StdRng::seed_from_u64(seed.rotate_left(32) ^ step as u64)
}

impl Descent<'_> {
    /// The trained adapter and the measures of the last step.
    ///
    /// # Errors
    /// There are no examples, or a pass fails.
    pub(super) fn run(
        &self,
        adapter: Arc<Adapter>,
        watch: &Watch<'_>,
        pass: Pass<'_>,
    ) -> Result<(Arc<Adapter>, Measured), Error> {
        if self.examples == 0 {
            return Err(Error::NoData(format!("{} needs at least one example", self.stage)));
        }
        let mut trainee = Trainee::new(adapter, self.learning_rate);
        let mut begun = 0;
        if let Some(State { step, trainees, .. }) = watch.resumed()? {
            begun = step;
            trainees.first().map(|kept| trainee.restore(kept)).transpose()?;
        }
        let batch = self.batch.max(1);
        let an_epoch = self.examples.div_ceil(batch);
        let steps = self.epochs * an_epoch;
        let mut measures = Vec::new();
        for epoch in 0..self.epochs {
            let mut order: Vec<usize> = (0..self.examples).collect();
            order.shuffle(&mut rng(self.seed, epoch));
            for (nth, chosen) in order.chunks(batch).enumerate() {
                let step = epoch * an_epoch + nth;
                if step < begun {
                    continue;
                }
                let keep = || Ok(State { step, trainees: vec![trainee.keep()?], numbers: Vec::new() });
                watch.keep(step, &keep)?;
                let mut gradient = AdapterGradient::default();
                measures = pass(&trainee.adapter, chosen, &mut gradient)?;
                trainee.step(&gradient, self.max_grad_norm, adamw::warmup(step, steps / 10))?;
                watch.progress(self.stage, (step + 1) as f64 / steps as f64, &measures);
            }
        }
        Ok((trainee.adapter, measures))
    }
}
