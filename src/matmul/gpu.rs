//! Products on a GPU: what was chosen, and its launch.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::CudaStream;

use super::selections::{By, Chosen, Gpu, Selections};
use super::timing::{self, Bench};
use super::{BIAS, MatMulSpec, OUT, WEIGHT, WORKSPACE, X};
use crate::buffers::{check_context, device, refuse_per_thread};
use crate::contract::{Operand, Row};
use crate::cublaslt::{Addresses, Candidate, CublasLt, Handle, Product};
use crate::cuda::device_name;
use crate::engine::ordered_like;
use crate::error::Result;
use crate::glue::gemv::{Around, FewRows};
use crate::indices::refuse;
use crate::owner::{CurrentContext, refuse_capture};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::Device;

/// The name that errors carry.
const NEW: &str = "MatMul::new";

/// The most scratch memory that an algorithm may use: what cuBLAS's documentation recommends for Hopper.
pub(super) const MOST_WORKSPACE: u64 = 32 << 20;

/// A product that was planned: which kernel computes it, and what that needs. Launching it chooses and allocates nothing.
#[derive(Debug, Clone)]
pub(crate) struct PlannedMatMul {
    product: Product,
    device: Device,
    by: Kernel,
}

/// What computes a product, ready.
#[derive(Debug, Clone, Copy)]
enum Kernel {
    CublasLt(Lt, Candidate),
    FewRows(FewRows),
}

/// cuBLASLt, and its handle for a device.
#[derive(Clone, Copy)]
struct Lt {
    library: &'static CublasLt,
    handle: Handle,
}

impl std::fmt::Debug for Lt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lt").field("version", &self.library.version()).finish_non_exhaustive()
    }
}

impl Lt {
    /// For a device that is the current one. Its handle is made once for each, and stays.
    fn on(runtime: &'static FlashInferRuntime, device: i32) -> Result<Self> {
        static HANDLES: Mutex<Option<HashMap<i32, Handle>>> = Mutex::new(None);
        let library = runtime.cublaslt()?;
        let mut handles = HANDLES.lock().unwrap_or_else(PoisonError::into_inner);
        let handles = handles.get_or_insert_with(HashMap::new);
        let handle = match handles.get(&device) {
            Some(handle) => *handle,
            None => {
                let handle = library.handle()?;
                handles.insert(device, handle);
                handle
            }
        };
        Ok(Self { library, handle })
    }

    fn offered(self, product: &Product) -> Result<Vec<Candidate>> {
        self.library.candidates(self.handle, product, MOST_WORKSPACE)
    }
}

impl PlannedMatMul {
    /// The product that the selections name, which is added to them where they name none.
    pub(crate) fn new(spec: MatMulSpec, stream: &Arc<CudaStream>, selections: &mut Selections) -> Result<Self> {
        refuse_per_thread(NEW, stream)?;
        check_context(NEW, "stream", stream.context(), stream.context())?;
        refuse_capture(NEW, stream)?;
        let runtime = FlashInferRuntime::global()?;
        runtime.cudart()?.without_breaking_captures(|| Self::chosen(runtime, spec, stream, selections))
    }

    fn chosen(
        runtime: &'static FlashInferRuntime,
        spec: MatMulSpec,
        stream: &CudaStream,
        selections: &mut Selections,
    ) -> Result<Self> {
        let on = device(stream.context());
        let id = runtime.checked_device(on)?;
        let _current = CurrentContext::bind(stream.context())?;
        let gpu = gpu(runtime, on, id)?;
        selections.agree(&gpu)?;
        let product = product(&spec);
        let planned = |by| Self { product, device: on, by };
        if let Some(Chosen { by, .. }) = selections.chosen(&spec) {
            let planned = planned(ready(by, runtime, id, &product, &spec)?);
            // Its kernels are loaded before a graph captures them.
            Bench::new(&product, stream.context(), timing::Extent::Once, planned.workspace_bytes())?.run(&planned)?;
            return Ok(planned);
        }
        let candidates: Vec<Self> = candidates(runtime, id, &product)?.into_iter().map(planned).collect();
        let workspace = candidates.iter().map(Self::workspace_bytes).max().unwrap_or(0);
        let bench = Bench::new(&product, stream.context(), timing::Extent::Many, workspace)?;
        let Some((fastest, microseconds)) = bench.fastest(&candidates)? else {
            let expected = "a product that cuBLASLt has an algorithm for; it has none for this one on this GPU";
            return refuse(NEW, "spec", spec.to_string(), expected);
        };
        let planned = candidates[fastest].clone();
        selections.add(gpu, spec, Chosen { by: planned.by.stored(), microseconds });
        Ok(planned)
    }

    /// How many bytes of scratch memory a launch uses; 0 for none.
    pub(crate) fn workspace_bytes(&self) -> usize {
        match self.by {
            Kernel::CublasLt(_, candidate) => candidate.workspace,
            Kernel::FewRows(_) => 0,
        }
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// Whether the kernel waits for the one ahead of it before it reads or writes anything but the weight and the bias, so that it may
    /// be launched programmatically dependent.
    pub(crate) fn waits(&self) -> bool {
        matches!(self.by, Kernel::FewRows(_))
    }

    /// Queues the product on `stream`, captured where that captures.
    ///
    /// With a residual it is added to what `out` holds. `bias` is null without one, `workspace` may be where no bytes of it are used.
    /// With `pdl`, a kernel that [waits](Self::waits) is launched programmatically dependent, and reads the weight and the bias ahead of
    /// its wait. It lets the kernel behind it start right behind that wait.
    ///
    /// # Safety
    /// The addresses must be memory of the plan's device, valid until the stream has come so far (of a captured launch: for as long
    /// as the graph can be launched): of tensors as [`MatMul::run`](super::MatMul::run) describes them, aligned as it says, with
    /// a workspace of [`workspace_bytes`](Self::workspace_bytes) that nothing else uses meanwhile; `out` and the workspace must overlap nothing else.
    /// `stream` must be a live stream of the device. With `pdl` the kernel ahead, and those that it may itself run beside, must not
    /// write the weight or the bias.
    pub(crate) unsafe fn launch(&self, at: &Addresses, stream: Stream<'_>, pdl: bool) -> Result<()> {
        let runtime = FlashInferRuntime::global()?;
        let Device::Cuda(id) = self.device else { unreachable!("a stream is of a GPU") };
        let id = id as i32;
        if runtime.usable(self.device).is_none() {
            runtime.checked_device(self.device)?;
        }
        // Where there is one device alone, it is that.
        let _current = if runtime.has_one_device() { None } else { Some(runtime.cudart()?.set_current(id)?) };
        match &self.by {
            Kernel::CublasLt(lt, candidate) => {
                // SAFETY: the candidate is one that cuBLASLt offered for this product on this device, with a handle of it, as
                // `candidates` and `ready` see to; the rest is the caller's promise.
                let status = unsafe { lt.library.multiply(lt.handle, &self.product, candidate, at, stream.as_raw()) }?;
                if status == 0 {
                    return Ok(());
                }
                Err(runtime.diagnosed(lt.library.error("cublasLtMatmul", status), id, 0, stream))
            }
            Kernel::FewRows(kernel) => {
                // SAFETY: it is one for this product on this device, as `candidates` and `ready` see to; the rest is the caller's
                // promise.
                let code = unsafe { kernel.launch(runtime, &self.product, at, NOTHING, stream.as_raw(), pdl) }?;
                runtime.launched(code, id, stream)
            }
        }
    }

    /// Queues the product of tensors that were checked; with `pdl` as [`launch`](Self::launch).
    ///
    /// # Safety
    /// With `pdl` the kernel ahead, and those that it may itself run beside, must not write the weight or the bias.
    pub(super) unsafe fn run(
        &self,
        row: &'static Row,
        operands: &[Operand<'_, '_>; 5],
        stream: Stream<'_>,
        pdl: bool,
    ) -> Result<()> {
        let needed = self.workspace_bytes();
        let given = operands[WORKSPACE].layout().map_or(0, |layout| layout.size(0));
        if (given as usize) < needed {
            let expected = format!("{needed} or more, as MatMul::workspace_bytes says");
            return refuse(row.function, row.arguments[WORKSPACE].name, format!("{given} bytes"), expected);
        }
        let address = |at: usize| operands[at].layout().map_or(ptr::null_mut(), |layout| layout.data());
        let at = Addresses {
            x: address(X).cast_const(),
            weight: address(WEIGHT).cast_const(),
            bias: address(BIAS).cast_const(),
            out: address(OUT),
            workspace: address(WORKSPACE),
        };
        // SAFETY: the tensors were checked against the row and the specification, which the product is made of; what is written is
        // borrowed mutably, so that it overlaps nothing. Whoever made the tensors vouched for their memory.
        // What is ahead is the caller's promise.
        ordered_like(row, operands, || unsafe { self.launch(&at, stream, pdl && self.waits()) })
    }
}

/// A product of few rows with what is ahead of it and behind it, in one kernel of this crate's own.
#[cfg(feature = "compute")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct FusedMatMul {
    product: Product,
    device: i32,
    kernel: FewRows,
}

#[cfg(feature = "compute")]
impl FusedMatMul {
    /// Where there is a kernel for it on the stream's device: for up to 32 rows, of numbers
    /// that lie as it needs them. The specification's columns are the result's.
    pub(crate) fn new(spec: &MatMulSpec, around: Around, stream: &CudaStream) -> Result<Option<Self>> {
        let runtime = FlashInferRuntime::global()?;
        let device = runtime.checked_device(device(stream.context()))?;
        let _current = CurrentContext::bind(stream.context())?;
        let product = product(spec);
        let Some(kernel) = FewRows::of(&product, around, runtime.compute_capability(device)?) else { return Ok(None) };
        kernel.prepare(runtime)?;
        Ok(Some(Self { product, device, kernel }))
    }

    /// Queues it. With `pdl` it is launched programmatically dependent, and reads the weight and the norm's ahead of its wait.
    ///
    /// # Safety
    /// As for [`PlannedMatMul::launch`]; a gated product's weight has twice as many rows as the product columns, and `norm` is as many
    /// numbers as a row of `x` has, aligned to 16 bytes.
    pub(crate) unsafe fn launch(
        &self,
        at: &Addresses,
        norm: *const c_void,
        stream: Stream<'_>,
        pdl: bool,
    ) -> Result<()> {
        let runtime = FlashInferRuntime::global()?;
        let _current = if runtime.has_one_device() { None } else { Some(runtime.cudart()?.set_current(self.device)?) };
        // SAFETY: it is the one for this product on this device; the rest is the caller's promise.
        let code = unsafe { self.kernel.launch(runtime, &self.product, at, norm, stream.as_raw(), pdl) }?;
        runtime.launched(code, self.device, stream)
    }
}

impl Kernel {
    /// As a selection.
    fn stored(self) -> By {
        match self {
            Self::CublasLt(lt, candidate) => By::CublasLt { version: lt.library.version(), candidate },
            Self::FewRows(kernel) => By::FewRows(kernel.name()),
        }
    }
}

fn gpu(runtime: &'static FlashInferRuntime, on: Device, id: i32) -> Result<Gpu> {
    let Device::Cuda(number) = on else { unreachable!("a stream is of a GPU") };
    let multiprocessors = runtime.limits(number).map_or(0, |limits| limits.multiprocessors);
    let name = device_name(id).unwrap_or_else(|| "a GPU without a name".to_owned());
    Ok(Gpu { name, capability: runtime.compute_capability(id)?, multiprocessors })
}

fn product(spec: &MatMulSpec) -> Product {
    Product {
        rows: spec.rows as u64,
        columns: spec.columns as u64,
        inner: spec.inner as u64,
        row_stride: spec.row_stride,
        dtype: spec.dtype,
        out: spec.out(),
        bias: spec.bias,
        residual: spec.residual,
        alignment: [super::alignment(spec.dtype, spec.inner) as u32, super::alignment(spec.out(), spec.columns) as u32],
    }
}

/// All that may compute a product on a device, which is the current one. Of few rows that is this crate's own kernel alone, whatever
/// time cuBLASLt would take: its sums are the same for any number of rows, so that a row's bits are the same in every bucket.
fn candidates(runtime: &'static FlashInferRuntime, id: i32, product: &Product) -> Result<Vec<Kernel>> {
    if let Some(own) = FewRows::of(product, Around::default(), runtime.compute_capability(id)?) {
        own.prepare(runtime)?;
        return Ok(vec![Kernel::FewRows(own)]);
    }
    let lt = Lt::on(runtime, id)?;
    Ok(lt.offered(product)?.into_iter().map(|candidate| Kernel::CublasLt(lt, candidate)).collect())
}

/// What was chosen before, where this machine has it.
fn ready(by: By, runtime: &'static FlashInferRuntime, id: i32, product: &Product, spec: &MatMulSpec) -> Result<Kernel> {
    let own = FewRows::of(product, Around::default(), runtime.compute_capability(id)?);
    match by {
        By::CublasLt { version, candidate } => {
            if let Some(own) = own {
                let found = format!("an algorithm of cuBLASLt for {spec}");
                let expected = format!(
                    "{}, whose sums are the same for any number of rows: select again, with Selections::new",
                    own.name()
                );
                return refuse(NEW, "selections", found, expected);
            }
            let lt = Lt::on(runtime, id)?;
            if lt.library.version() != version {
                let found = format!("made with release {version} of cuBLASLt");
                let expected = format!("those of release {}: select again, with Selections::new", lt.library.version());
                return refuse(NEW, "selections", found, expected);
            }
            // What was read is never run by itself.
            if lt.offered(product)?.contains(&candidate) {
                return Ok(Kernel::CublasLt(lt, candidate));
            }
            let found = format!("an algorithm for {spec} that cuBLASLt does not offer");
            refuse(NEW, "selections", found, "one of those that it offers: select again, with Selections::new")
        }
        By::FewRows(name) => {
            if let Some(kernel) = own.filter(|own| own.name() == name) {
                kernel.prepare(runtime)?;
                return Ok(Kernel::FewRows(kernel));
            }
            let found = format!("{name} for {spec}");
            refuse(NEW, "selections", found, "the kernel for this product: select again, with Selections::new")
        }
    }
}

/// A null pointer where there is nothing.
pub(super) const NOTHING: *const c_void = ptr::null();
