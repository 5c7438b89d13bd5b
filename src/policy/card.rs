//! The decoder's own kernels on an NVIDIA card (`card/kernels.cu`): what a layer does between two matrix products is one
//! launch each. `ops`, `rope`, `attention` and `head` use them for tensors that lie there, in f32 or bf16.

#![expect(unsafe_code, reason = "a kernel's launch and the driver's settings are beyond what Rust can check")]

use std::{ffi::c_void, sync::Arc};

use candle_core::{
    CudaDevice, DType, Device, Result, Shape, Storage, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{
            CudaSlice, DevicePtr, LaunchConfig, PushKernelArg,
            result::{device, mem_pool},
            sys::CUmemPool_attribute,
        },
    },
};

use super::architecture::Heads;

const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// The card of this number, with one stream for all threads.
///
/// candle's default is a stream a thread, and nothing orders a tensor's use on one thread after its making, or before its
/// end, on another: the learner's adapters are served by the engine's thread.
///
/// # Errors
/// No device answers.
pub(crate) fn open(ordinal: usize) -> Result<Device> {
    let opened = Device::new_cuda_with_stream(ordinal)?;
    let card = opened.as_cuda_device()?;
    let stream = card.cuda_stream();
    // SAFETY: everything is given to the one stream, which does it in that order; no events are needed to keep it.
    unsafe { card.disable_event_tracking() };
    let mut keep = u64::MAX;
    // SAFETY: the device is open, and the attribute is a 64-bit number. What is freed stays with the process: by default it
    // goes back to the driver whenever the host waits for the card, and is paid for again afterwards.
    unsafe {
        let pool = device::get_default_mem_pool(stream.context().cu_device()).w()?;
        let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        mem_pool::set_attribute(pool, threshold, (&raw mut keep).cast::<c_void>()).w()?;
    }
    Ok(opened)
}

/// Whether the kernels take this tensor.
pub(crate) fn takes(x: &Tensor) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::BF16)
}

/// A kernel's argument that is no tensor.
#[derive(Debug, Clone, Copy)]
enum Number {
    Int(i32),
    Float(f32),
}

impl From<usize> for Number {
    fn from(number: usize) -> Self {
        Self::Int(number as i32)
    }
}

impl From<f32> for Number {
    fn from(number: f32) -> Self {
        Self::Float(number)
    }
}

/// A warp for each of so many rows, four of them a block.
fn warps(rows: usize) -> LaunchConfig {
    LaunchConfig { grid_dim: (rows.div_ceil(4) as u32, 1, 1), block_dim: (32, 4, 1), shared_mem_bytes: 0 }
}

/// A thread for each of so many elements.
fn elements(count: usize) -> LaunchConfig {
    LaunchConfig::for_num_elems(count as u32)
}

/// Launches `name` for the type of the first tensor: the tensors first, then the numbers, in the kernel's order. Those that
/// it writes to are among the tensors, and nobody else has them yet.
fn launch(name: &str, shape: LaunchConfig, tensors: &[&Tensor], numbers: &[Number]) -> Result<()> {
    let [first, ..] = tensors else { candle_core::bail!("{name} has no tensors") };
    if shape.grid_dim.0 == 0 {
        return Ok(());
    }
    let card = first.device().as_cuda_device()?;
    let kind = match first.dtype() {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        other => candle_core::bail!("{name} takes f32 and bf16, not {other:?}"),
    };
    let kernel = card.get_or_load_custom_func(&format!("{name}_{kind}"), "gyrostat", PTX)?;
    let addresses = tensors.iter().map(|tensor| address(tensor, card)).collect::<Result<Vec<u64>>>()?;
    let mut launch = kernel.builder();
    for address in &addresses {
        launch.arg(address);
    }
    for number in numbers {
        match number {
            Number::Int(number) => launch.arg(number),
            Number::Float(number) => launch.arg(number),
        };
    }
    // SAFETY: the arguments are in the kernel's order, each address is that of a contiguous tensor on this card of the size
    // that the numbers tell, as the callers below have it, and the stream frees no tensor before the kernel has ended.
    unsafe { launch.launch(shape) }.w()?;
    Ok(())
}

/// Where a tensor begins in the card's memory.
fn address(tensor: &Tensor, card: &CudaDevice) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cuda(storage), Some((start, _))) = (&*storage, layout.contiguous_offsets()) else {
        candle_core::bail!("the card's kernels take contiguous tensors that lie there, not {layout:?}")
    };
    let stream = card.cuda_stream();
    fn begin<T>(
        slice: &CudaSlice<T>,
        stream: &Arc<candle_core::cuda_backend::cudarc::driver::CudaStream>,
    ) -> u64 {
        slice.device_ptr(stream).0
    }
    let whole = match tensor.dtype() {
        DType::F32 => begin(storage.as_cuda_slice::<f32>()?, &stream),
        DType::BF16 => begin(storage.as_cuda_slice::<half::bf16>()?, &stream),
        DType::U32 => begin(storage.as_cuda_slice::<u32>()?, &stream),
        other => candle_core::bail!("the card's kernels do not know {other:?}"),
    };
    Ok(whole + (start * tensor.dtype().size_in_bytes()) as u64)
}

/// A tensor that a kernel is about to fill.
fn unfilled(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: every kernel below writes every element of what it is given to fill, before anything reads it.
    unsafe { Tensor::empty(shape, dtype, device) }
}

fn like(x: &Tensor) -> Result<Tensor> {
    unfilled(x.shape(), x.dtype(), x.device())
}

/// `[rows, columns]`, `[columns]`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let (x, y) = (x.contiguous()?, like(x)?);
    launch("rms_norm", warps(rows), &[&y, &x, weight], &[rows.into(), columns.into(), epsilon.into()])?;
    Ok(y)
}

pub(crate) fn rms_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let (dy, x, dx) = (dy.contiguous()?, x.contiguous()?, like(x)?);
    let added = Number::from(usize::from(onto.is_some()));
    let onto = onto.map_or_else(|| Ok(dy.clone()), Tensor::contiguous)?;
    let numbers = [rows.into(), columns.into(), added, epsilon.into()];
    launch("rms_norm_backward", warps(rows), &[&dx, &dy, &x, weight, &onto], &numbers)?;
    Ok(dx)
}

pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate, up, y) = (gate.contiguous()?, up.contiguous()?, like(gate)?);
    let count = gate.elem_count();
    launch("swiglu", elements(count), &[&y, &gate, &up], &[count.into()])?;
    Ok(y)
}

pub(crate) fn swiglu_backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (rows, columns) = gate.dims2()?;
    let (dy, gate, up) = (dy.contiguous()?, gate.contiguous()?, up.contiguous()?);
    let out = unfilled((rows, 2 * columns), gate.dtype(), gate.device())?;
    let count = gate.elem_count();
    launch("swiglu_backward", elements(count), &[&out, &dy, &gate, &up], &[count.into(), columns.into()])?;
    Ok(out)
}

/// Turns the halves of every head, `[rows, heads · 2 · half]`, by angles of `[rows, …, half]` in f32.
pub(crate) fn turn(x: &Tensor, (cos, sin): (&Tensor, &Tensor), sign: f32) -> Result<Tensor> {
    let ((_, columns), half) = (x.dims2()?, cos.dim(candle_core::D::Minus1)?);
    let (x, y) = (x.contiguous()?, like(x)?);
    let count = x.elem_count() / 2;
    let numbers = [count.into(), (columns / (2 * half)).into(), half.into(), sign.into()];
    launch("turn", elements(count), &[&y, &x, cos, sin], &numbers)?;
    Ok(y)
}

/// Writes rows to places of a store: `[places, columns]`, `[rows, columns]`, `[rows]`.
pub(crate) fn place_rows(store: &Tensor, rows: &Tensor, places: &Tensor) -> Result<()> {
    let (rows, columns) = (rows.contiguous()?, store.dim(1)?);
    let count = rows.elem_count();
    launch("place_rows", elements(count), &[store, &rows, places], &[count.into(), columns.into()])
}

/// Which places the rows of a pass see, as the kernels read it.
#[derive(Debug)]
pub(crate) struct Sights {
    /// Where each sequence's keys and values are, one sequence after the other.
    pub(crate) locations: Tensor,
    /// Of each row the first of its sequence's locations, and which of them it sees: `[rows, 3]`.
    pub(crate) rows: Tensor,
    /// Behind the last row that sees each row, for whole sequences.
    pub(crate) until: Tensor,
}

/// Dimensions of a head that one of eight lanes holds.
fn lanes(heads: Heads) -> Result<usize> {
    let each = heads.dim.div_ceil(8).next_power_of_two();
    if each > 32 {
        candle_core::bail!("heads of {} dimensions are too wide for the card's kernels", heads.dim)
    }
    Ok(each)
}

fn numbers(heads: Heads) -> [Number; 4] {
    [heads.queries.into(), heads.keys.into(), heads.dim.into(), heads.scale().into()]
}

/// Rows of queries over the keys and values that they see.
pub(crate) fn attend(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    sights: &Sights,
    heads: Heads,
) -> Result<Tensor> {
    /// Rows and heads below which the warps of a block share a row's keys: there are too few to fill the card.
    const FEW: usize = 2048;
    let (each, rows) = (lanes(heads)?, q.dim(0)?);
    let (q, k, v, out) = (q.contiguous()?, k.contiguous()?, v.contiguous()?, like(q)?);
    let warps = if rows * heads.queries < FEW { 8 } else { 1 };
    let shape = LaunchConfig {
        grid_dim: (rows as u32, heads.queries as u32, 1),
        block_dim: (32 * warps, 1, 1),
        // For each of four groups a warp: the greatest score, the sum of the weights, and that of the values.
        shared_mem_bytes: 4 * warps * (2 + 8 * each as u32) * 4,
    };
    let tensors = [&out, &q, &k, &v, &sights.locations, &sights.rows];
    launch(&format!("attend_{each}"), shape, &tensors, &numbers(heads))?;
    Ok(out)
}

/// The gradients of queries, keys and values of whole sequences.
pub(crate) fn attend_backward(
    dy: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    sights: &Sights,
    heads: Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (each, rows) = (lanes(heads)?, q.dim(0)?);
    let (dy, q, k, v) = (dy.contiguous()?, q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let (dq, dk, dv) = (like(&q)?, like(&k)?, like(&v)?);
    let stats = unfilled((rows, heads.queries, 2), DType::F32, q.device())?;
    let numbers: Vec<Number> = [rows.into()].into_iter().chain(numbers(heads)).collect();
    let name = format!("attend_backward_queries_{each}");
    let tensors = [&dq, &stats, &dy, &q, &k, &v, &sights.locations, &sights.rows];
    launch(&name, warps(rows * heads.queries), &tensors, &numbers)?;
    let name = format!("attend_backward_keys_{each}");
    let tensors = [&dk, &dv, &dy, &q, &k, &v, &stats, &sights.until];
    launch(&name, warps(rows * heads.keys), &tensors, &numbers)?;
    Ok((dq, dk, dv))
}

/// `log p` of each row's target, and the entropies, of logits that are divided by `temperature`. The logits themselves become
/// the probabilities where `kept` is set: nobody else may have them.
pub(crate) fn logprobs(
    logits: &Tensor,
    targets: &Tensor,
    temperature: f64,
    kept: bool,
) -> Result<(Tensor, Tensor)> {
    let (rows, columns) = logits.dims2()?;
    let of_rows = || unfilled(rows, DType::F32, logits.device());
    let (chosen, entropies) = (of_rows()?, of_rows()?);
    let shape = LaunchConfig { grid_dim: (rows as u32, 1, 1), block_dim: (512, 1, 1), shared_mem_bytes: 0 };
    let numbers = [columns.into(), usize::from(kept).into(), ((1.0 / temperature) as f32).into()];
    launch("logprobs", shape, &[logits, &chosen, &entropies, targets], &numbers)?;
    Ok((chosen, entropies))
}

#[cfg(test)]
mod tests;
