//! AdamW (Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019) with clipping of the gradient's norm.

use serde::{Deserialize, Serialize};

/// Names and defaults as in PyTorch, but for the weight decay, which adapters do without.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// The gradient cannot be stepped along.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the gradient has a number that is not finite")]
    NotFinite,
}

/// The optimiser's memory of one adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    config: Config,
    step: i32,
    /// First and second moments, in the parameters' order.
    moments: Vec<Moments>,
}

/// First and second moments of one list of parameters.
pub type Moments = (Vec<f32>, Vec<f32>);

/// A linear warm-up: the share of the learning rate at `step`, counted from 0, of a warm-up of `steps`.
pub fn warmup(step: usize, steps: usize) -> f64 {
    if step >= steps { 1.0 } else { (step + 1) as f64 / (steps + 1) as f64 }
}

/// Scales all gradients together so that their norm is at most `most`; returns the norm that they had.
///
/// # Errors
/// A number is not finite.
pub fn clip_grad_norm(gradients: &mut [Vec<f32>], most: f64) -> Result<f64, Error> {
    let squares = gradients.iter().flatten().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
    let norm = squares.sqrt();
    if !norm.is_finite() {
        return Err(Error::NotFinite);
    }
    // The small constant is PyTorch's.
    let scale = most / (norm + 1e-6);
    if scale < 1.0 {
        gradients.iter_mut().flatten().for_each(|g| *g *= scale as f32);
    }
    Ok(norm)
}

impl AdamW {
    pub fn new(config: Config) -> Self {
        Self { config, step: 0, moments: Vec::new() }
    }

    /// Steps taken, and the first and second moments in the parameters' order.
    pub fn memory(&self) -> (i32, &[Moments]) {
        (self.step, &self.moments)
    }

    /// Goes on from a memory.
    pub fn remember(&mut self, step: i32, moments: Vec<Moments>) {
        (self.step, self.moments) = (step, moments);
    }

    /// The parameters after a step along the clipped gradients, at `rate` of the learning rate.
    ///
    /// # Errors
    /// A gradient is not finite; nothing has changed then.
    pub fn step(
        &mut self,
        mut parameters: Vec<Vec<f32>>,
        mut gradients: Vec<Vec<f32>>,
        max_grad_norm: f64,
        rate: f64,
    ) -> Result<Vec<Vec<f32>>, Error> {
        clip_grad_norm(&mut gradients, max_grad_norm)?;
        if self.moments.is_empty() {
            self.moments = parameters.iter().map(|p| (vec![0.0; p.len()], vec![0.0; p.len()])).collect();
        }
        self.step += 1;
        let Config { beta1, beta2, epsilon, weight_decay, .. } = self.config;
        let learning_rate = self.config.learning_rate * rate;
        let (correction1, correction2) = (1.0 - beta1.powi(self.step), 1.0 - beta2.powi(self.step));
        for ((parameters, gradients), (first, second)) in
            parameters.iter_mut().zip(&gradients).zip(&mut self.moments)
        {
            for (((p, g), m), v) in parameters.iter_mut().zip(gradients).zip(first).zip(second) {
                *m = (beta1 * f64::from(*m) + (1.0 - beta1) * f64::from(*g)) as f32;
                *v = (beta2 * f64::from(*v) + (1.0 - beta2) * f64::from(*g) * f64::from(*g)) as f32;
                let direction =
                    f64::from(*m) / correction1 / ((f64::from(*v) / correction2).sqrt() + epsilon);
                *p =
                    (f64::from(*p) * (1.0 - learning_rate * weight_decay) - learning_rate * direction) as f32;
            }
        }
        Ok(parameters)
    }
}
