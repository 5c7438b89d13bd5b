//! The decoder on an NVIDIA card: a product is one launch of cuBLAS, with its factor and what it is added to, and what a layer
//! does between two products one launch of a kernel of our own (`card/kernels.cu`). `ops`, `rope`, `attention` and `head` use
//! them for tensors that lie there, in f32 or bf16.

#![expect(unsafe_code, reason = "a kernel's launch and the driver's settings are beyond what Rust can check")]

use std::{ffi::c_void, sync::Arc};

use candle_core::{
    CudaDevice, DType, Device, Result, Shape, Storage, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::{
            cublas::{self, sys as blas},
            driver::{
                CudaSlice, CudaStream, DevicePtr, LaunchConfig, PushKernelArg,
                result::{device, mem_pool},
                sys::CUmemPool_attribute,
            },
        },
    },
};

use super::{architecture::Heads, ops::columns};

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
    let addresses = tensors.iter().map(|tensor| beginning(tensor, card)).collect::<Result<Vec<u64>>>()?;
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
    // SAFETY: the arguments are in the kernel's order, each address is that of a tensor on this card of the size that the
    // numbers tell, without gaps but for those between rows that they tell, too, as the callers below have it, and the stream
    // frees no tensor before the kernel has ended.
    unsafe { launch.launch(shape) }.w()?;
    Ok(())
}

/// Where a tensor begins in the card's memory.
fn beginning(tensor: &Tensor, card: &CudaDevice) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        candle_core::bail!("the card's kernels take tensors that lie there")
    };
    let stream = card.cuda_stream();
    fn begin<T>(slice: &CudaSlice<T>, stream: &Arc<CudaStream>) -> u64 {
        slice.device_ptr(stream).0
    }
    let whole = match tensor.dtype() {
        DType::F32 => begin(storage.as_cuda_slice::<f32>()?, &stream),
        DType::BF16 => begin(storage.as_cuda_slice::<half::bf16>()?, &stream),
        DType::U32 => begin(storage.as_cuda_slice::<u32>()?, &stream),
        other => candle_core::bail!("the card's kernels do not know {other:?}"),
    };
    Ok(whole + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

/// `out = scale · a b`, or `out += scale · a b` where `added` is set: `[rows, inner]`, `[inner, columns]`, `[rows, columns]`.
///
/// The operands may be transposed, and each may be some columns of a wider matrix. Sums are in f32. Nobody else may use
/// `out` yet.
pub(crate) fn multiply(out: &Tensor, a: &Tensor, b: &Tensor, scale: f64, added: bool) -> Result<()> {
    let ((rows, inner), columns) = (a.dims2()?, b.dim(1)?);
    if b.dim(0)? != inner || out.dims() != [rows, columns] || out.stride()[1] != 1 {
        candle_core::bail!("no product of {:?} and {:?} is {:?}", a.layout(), b.layout(), out.layout())
    }
    if rows * columns == 0 {
        return Ok(());
    }
    let card = out.device().as_cuda_device()?;
    let [of_out, of_a, of_b] = [out, a, b].map(|x| blas_type(x.dtype()));
    let ((turned_a, far_a), (turned_b, far_b)) = (lies(a)?, lies(b)?);
    let (scale, added) = (scale as f32, f32::from(u8::from(added)));
    let to = |x: &Tensor| Ok::<_, candle_core::Error>(beginning(x, card)? as *mut c_void);
    // cuBLAS counts columns first, and so is told of the transposed product, `outᵀ = bᵀ aᵀ`.
    // SAFETY: the shapes agree, each address is that of a tensor on this card whose rows lie as far apart as is told, and
    // the one stream frees none before the product has ended.
    unsafe {
        cublas::result::gemm_ex(
            *card.cublas_handle().handle(),
            turned_b,
            turned_a,
            columns as i32,
            rows as i32,
            inner as i32,
            (&raw const scale).cast(),
            to(b)?,
            of_b?,
            far_b,
            to(a)?,
            of_a?,
            far_a,
            (&raw const added).cast(),
            to(out)?,
            of_out?,
            out.stride()[0].max(columns) as i32,
            blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}

fn blas_type(dtype: DType) -> Result<blas::cudaDataType> {
    match dtype {
        DType::F32 => Ok(blas::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(blas::cudaDataType::CUDA_R_16BF),
        other => candle_core::bail!("the card multiplies f32 and bf16, not {other:?}"),
    }
}

/// Whether a matrix lies column by column, and how far apart two of its rows or columns are.
fn lies(x: &Tensor) -> Result<(blas::cublasOperation_t, i32)> {
    let (rows, columns) = x.dims2()?;
    match *x.stride() {
        // Of a single row or column the distance to the next tells nothing.
        [far, 1] => Ok((blas::cublasOperation_t::CUBLAS_OP_N, far.max(columns) as i32)),
        [1, far] => Ok((blas::cublasOperation_t::CUBLAS_OP_T, far.max(rows) as i32)),
        _ => candle_core::bail!("the card multiplies rows or columns without gaps, not {:?}", x.layout()),
    }
}

/// A product that is added to nothing, see [`multiply`].
pub(crate) fn product(a: &Tensor, b: &Tensor, scale: f64, dtype: DType) -> Result<Tensor> {
    let out = unfilled((a.dim(0)?, b.dim(1)?), dtype, a.device())?;
    multiply(&out, a, b, scale, false)?;
    Ok(out)
}

/// `scale · a b` of each pair, side by side.
pub(crate) fn products_beside(pairs: &[(Tensor, Tensor)], scale: f64) -> Result<Tensor> {
    let [(first, _), ..] = pairs else { candle_core::bail!("no products") };
    let widths = pairs.iter().map(|(_, b)| b.dim(1)).collect::<Result<Vec<_>>>()?;
    let out = unfilled((first.dim(0)?, widths.iter().sum::<usize>()), first.dtype(), first.device())?;
    let mut column = 0;
    for ((a, b), width) in pairs.iter().zip(widths) {
        multiply(&out.narrow(1, column, width)?, a, b, scale, false)?;
        column += width;
    }
    Ok(out)
}

/// A tensor that a kernel is about to fill.
fn unfilled(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: every kernel below writes every element of what it is given to fill, before anything reads it.
    unsafe { Tensor::empty(shape, dtype, device) }
}

fn like(x: &Tensor) -> Result<Tensor> {
    unfilled(x.shape(), x.dtype(), x.device())
}

/// A matrix whose rows are without gaps, and how far apart they are.
fn spaced(x: &Tensor) -> Result<(Tensor, Number)> {
    let x = if x.stride()[1] == 1 { x.clone() } else { x.contiguous()? };
    let far = x.stride()[0].into();
    Ok((x, far))
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

/// Gate and up may be columns of one matrix.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate, up, far) = alike(gate, up)?;
    let (count, columns, y) = (gate.elem_count(), gate.dim(1)?, like(&gate)?);
    launch("swiglu", elements(count), &[&y, &gate, &up], &[count.into(), columns.into(), far])?;
    Ok(y)
}

pub(crate) fn swiglu_backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate, up, far) = alike(gate, up)?;
    let ((rows, columns), dy) = (gate.dims2()?, dy.contiguous()?);
    let out = unfilled((rows, 2 * columns), gate.dtype(), gate.device())?;
    let count = gate.elem_count();
    let numbers = [count.into(), columns.into(), far];
    launch("swiglu_backward", elements(count), &[&out, &dy, &gate, &up], &numbers)?;
    Ok(out)
}

/// Two matrices whose rows are equally far apart.
fn alike(a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor, Number)> {
    let columns = a.dim(1)?;
    if a.stride() == b.stride() && a.stride()[1] == 1 {
        return Ok((a.clone(), b.clone(), a.stride()[0].into()));
    }
    Ok((a.contiguous()?, b.contiguous()?, columns.into()))
}

/// Turns the halves of every head, `[rows, heads · 2 · half]`, by angles of `[rows, …, half]` in f32.
pub(crate) fn turn(x: &Tensor, angles: (&Tensor, &Tensor), sign: f32) -> Result<Tensor> {
    let y = like(x)?;
    turn_to(&y, &spaced(x)?, angles, sign)?;
    Ok(y)
}

/// The same in place. Nobody else may use `x`.
pub(crate) fn turn_in_place(x: Tensor, angles: (&Tensor, &Tensor), sign: f32) -> Result<Tensor> {
    let x = spaced(&x)?;
    turn_to(&x.0, &x, angles, sign)?;
    Ok(x.0)
}

fn turn_to(y: &Tensor, (x, far): &(Tensor, Number), (cos, sin): (&Tensor, &Tensor), sign: f32) -> Result<()> {
    let ((_, columns), half) = (x.dims2()?, cos.dim(candle_core::D::Minus1)?);
    let count = x.elem_count() / 2;
    let heads = columns / (2 * half);
    let numbers = [count.into(), heads.into(), half.into(), y.stride()[0].into(), *far, sign.into()];
    launch("turn", elements(count), &[y, x, cos, sin], &numbers)
}

/// Writes rows to places of a store: `[places, columns]`, `[rows, columns]`, `[rows]`.
pub(crate) fn place_rows(store: &Tensor, rows: &Tensor, places: &Tensor) -> Result<()> {
    let ((rows, far), columns) = (spaced(rows)?, store.dim(1)?);
    let count = rows.elem_count();
    launch("place_rows", elements(count), &[store, &rows, places], &[count.into(), columns.into(), far])
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
    /// Rows of one sequence that are taken together, the first and how many: `[tiles, 2]`.
    pub(crate) tiles: Tensor,
}

/// Rows of a tile at most; the kernels' own.
pub(crate) const TILE: usize = 64;

impl Sights {
    /// How many blocks take the rows by tiles on tensor cores; `None` where single rows are faster or the kernels are not
    /// made for such heads.
    fn tiles(&self, q: &Tensor, heads: Heads) -> Result<Option<usize>> {
        /// Rows a tile on average, below which most of a block has nothing to do.
        const LEAST: usize = 8;
        let (tiles, rows) = (self.tiles.dim(0)?, q.dim(0)?);
        let made = q.dtype() == DType::BF16 && matches!(heads.dim, 64 | 128);
        Ok((made && rows >= LEAST * tiles).then_some(tiles))
    }
}

/// A block of four warps for each tile and head.
fn blocks(tiles: usize, heads: usize) -> LaunchConfig {
    LaunchConfig { grid_dim: (tiles as u32, heads as u32, 1), block_dim: (128, 1, 1), shared_mem_bytes: 0 }
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

/// Rows of queries over the keys and values that they see; values may be columns of a wider matrix.
pub(crate) fn attend(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    sights: &Sights,
    heads: Heads,
) -> Result<Tensor> {
    /// Rows and heads below which the warps of a block share a row's keys: there are too few to fill the card.
    const FEW: usize = 2048;
    let (each, rows) = (lanes(heads)?, q.dim(0)?);
    let (q, k, (v, v_far), out) = (q.contiguous()?, k.contiguous()?, spaced(v)?, like(q)?);
    let [queries, keys, dim, scale] = numbers(heads);
    if let Some(tiles) = sights.tiles(&q, heads)? {
        let tensors = [&out, &q, &k, &v, &sights.locations, &sights.rows, &sights.tiles];
        let name = format!("attend_tiles_{}", heads.dim);
        launch(&name, blocks(tiles, heads.queries), &tensors, &[queries, keys, v_far, scale])?;
        return Ok(out);
    }
    let warps = if rows * heads.queries < FEW { 8 } else { 1 };
    let shape = LaunchConfig {
        grid_dim: (rows as u32, heads.queries as u32, 1),
        block_dim: (32 * warps, 1, 1),
        // For each of four groups a warp: the greatest score, the sum of the weights, and that of the values.
        shared_mem_bytes: 4 * warps * (2 + 8 * each as u32) * 4,
    };
    let tensors = [&out, &q, &k, &v, &sights.locations, &sights.rows];
    launch(&format!("attend_{each}"), shape, &tensors, &[queries, keys, dim, v_far, scale])?;
    Ok(out)
}

/// The gradients of queries, keys and values of whole sequences, side by side: `[rows, (queries + 2 keys) · dim]`.
pub(crate) fn attend_backward(
    dy: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    sights: &Sights,
    heads: Heads,
) -> Result<Tensor> {
    let (each, rows) = (lanes(heads)?, q.dim(0)?);
    let (dy, q, k, (v, v_far)) = (dy.contiguous()?, q.contiguous()?, k.contiguous()?, spaced(v)?);
    let widths = heads.widths();
    let width = widths.iter().sum::<usize>();
    let whole = unfilled((rows, width), q.dtype(), q.device())?;
    let [dq, dk, dv] = columns(&whole, widths)?;
    let stats = unfilled((rows, heads.queries, 2), DType::F32, q.device())?;
    let ([queries, keys, dim, scale], far) = (numbers(heads), Number::from(width));
    let mut of_queries = vec![&dq, &stats, &dy, &q, &k, &v, &sights.locations, &sights.rows];
    let mut of_keys = vec![&dk, &dv, &dy, &q, &k, &v, &stats, &sights.until];
    if let Some(tiles) = sights.tiles(&q, heads)? {
        let numbers = [queries, keys, v_far, far, scale];
        of_queries.push(&sights.tiles);
        let name = format!("attend_backward_queries_tiles_{}", heads.dim);
        launch(&name, blocks(tiles, heads.queries), &of_queries, &numbers)?;
        of_keys.push(&sights.tiles);
        let name = format!("attend_backward_keys_tiles_{}", heads.dim);
        launch(&name, blocks(tiles, heads.keys), &of_keys, &numbers)?;
    } else {
        let numbers = [rows.into(), queries, keys, dim, v_far, far, scale];
        let name = format!("attend_backward_queries_{each}");
        launch(&name, warps(rows * heads.queries), &of_queries, &numbers)?;
        let name = format!("attend_backward_keys_{each}");
        launch(&name, warps(rows * heads.keys), &of_keys, &numbers)?;
    }
    Ok(whole)
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
