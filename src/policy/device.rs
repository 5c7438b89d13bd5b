//! Where the model's tensors lie and in which type: f32 on the CPU, bf16 on a card.

use std::time::Instant;

use candle_core::{DType, Result, Tensor};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::Error;

/// Where the model runs (`policy.device`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The first CUDA device if the program is built for it and one answers, else the CPU.
    Auto,
    Cpu,
    Cuda,
}

/// Where weights, activations, keys and values lie.
#[derive(Debug, Clone)]
pub(crate) struct Placement {
    pub(crate) device: candle_core::Device,
    pub(crate) dtype: DType,
}

impl Device {
    /// # Errors
    /// It is `cuda`, and the program is built without it or no device answers.
    pub(crate) fn open(self) -> std::result::Result<Placement, Error> {
        #[cfg(feature = "cuda")]
        let cuda = || super::card::open(0);
        #[cfg(not(feature = "cuda"))]
        let cuda = || candle_core::Device::new_cuda(0);
        match self {
            Self::Cpu => Ok(Placement::cpu()),
            Self::Cuda if !cfg!(feature = "cuda") => Err(Error::Model(
                "`policy.device` is \"cuda\", but this program is built without the feature `cuda`"
                    .to_owned(),
            )),
            Self::Cuda => cuda().map(Placement::on_card).map_err(|fault| {
                Error::Model(format!("`policy.device` is \"cuda\", but no device answers: {fault}"))
            }),
            Self::Auto if !cfg!(feature = "cuda") => Ok(Placement::cpu()),
            Self::Auto => Ok(cuda().map_or_else(
                |fault| {
                    warn!(%fault, "no CUDA device answers; the model runs on the CPU");
                    Placement::cpu()
                },
                |device| {
                    info!("the model runs on the first CUDA device");
                    Placement::on_card(device)
                },
            )),
        }
    }
}

impl Placement {
    pub(crate) fn cpu() -> Self {
        Self { device: candle_core::Device::Cpu, dtype: DType::F32 }
    }

    fn on_card(device: candle_core::Device) -> Self {
        Self { device, dtype: DType::BF16 }
    }

    /// That of a tensor.
    pub(crate) fn of(tensor: &Tensor) -> Self {
        Self { device: tensor.device().clone(), dtype: tensor.dtype() }
    }

    /// Whether the tensor lies there already.
    pub(crate) fn holds(&self, tensor: &Tensor) -> bool {
        tensor.dtype() == self.dtype && tensor.device().same_device(&self.device)
    }

    /// The tensor there. The same one if it was there.
    pub(crate) fn place(&self, tensor: &Tensor) -> Result<Tensor> {
        if self.holds(tensor) {
            return Ok(tensor.clone());
        }
        // The smaller type travels.
        tensor.to_dtype(self.dtype)?.to_device(&self.device)?.contiguous()
    }

    /// Whether the kernels on slices work there; elsewhere those made of tensor operations do.
    pub(crate) fn has_slices(&self) -> bool {
        self.dtype == DType::F32 && self.device.is_cpu()
    }
}

/// Whether the kernels on slices take this tensor.
pub(crate) fn on_slices(tensor: &Tensor) -> bool {
    tensor.dtype() == DType::F32 && tensor.device().is_cpu()
}

/// The numbers as f32 on the CPU; the same tensor if they are that already.
pub(crate) fn on_host(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_dtype(DType::F32)?.to_device(&candle_core::Device::Cpu)?.contiguous()
}

/// Operations a second (a product and a sum are two) that plain products of square matrices reach where the weights are:
/// what the decoder's own products can be held against.
pub(crate) fn product_rate(placement: &Placement, size: usize, times: usize) -> Result<f64> {
    let matrix = || Tensor::randn(0f32, 1f32, (size, size), &placement.device)?.to_dtype(placement.dtype);
    let (a, b) = (matrix()?, matrix()?);
    // The first ones choose and load a kernel.
    let _warm = (a.matmul(&b)?, a.matmul(&b)?);
    placement.device.synchronize()?;
    let started = Instant::now();
    for _ in 0..times {
        a.matmul(&b)?;
    }
    placement.device.synchronize()?;
    Ok(2.0 * (size as f64).powi(3) * times as f64 / started.elapsed().as_secs_f64())
}

/// Whether the device failed for want of memory: smaller work may succeed.
pub fn is_out_of_memory(fault: &candle_core::Error) -> bool {
    // The driver's `CUDA_ERROR_OUT_OF_MEMORY` and cuBLAS's `CUBLAS_STATUS_ALLOC_FAILED` have no variant of their own here.
    // A backtrace may follow, which names functions.
    let text = fault.to_string();
    let text = text.lines().next().unwrap_or_default().to_ascii_lowercase().replace('_', " ");
    text.contains("out of memory") || text.contains("alloc failed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_memory_is_told_from_other_faults() {
        let fault = |text: &str| candle_core::Error::Msg(text.to_owned());
        assert!(is_out_of_memory(&fault("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")")));
        assert!(is_out_of_memory(&fault("CublasError(CUBLAS_STATUS_ALLOC_FAILED)")));
        assert!(!is_out_of_memory(&fault("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS)")));
        assert!(!is_out_of_memory(&fault("another fault\n   0: gyrostat::learn::is_out_of_memory")));
    }

    #[test]
    fn products_have_a_rate() {
        assert!(product_rate(&Placement::cpu(), 64, 3).unwrap() > 1e6);
    }

    #[test]
    fn a_device_that_is_asked_for_is_had_or_named() {
        assert!(Device::Cpu.open().unwrap().has_slices());
        match Device::Cuda.open() {
            Ok(placement) => assert!(cfg!(feature = "cuda") && !placement.has_slices()),
            Err(fault) => assert!(fault.to_string().contains("`policy.device` is \"cuda\""), "{fault}"),
        }
        assert!(cfg!(feature = "cuda") || Device::Auto.open().unwrap().has_slices());
    }
}
