//! Calls kernels by their rows: checks, orders, locks, packs, launches, and looks at what came of it. What is inlined is so for
//! optimized code alone, as in `contract/check.rs`.

use std::mem::MaybeUninit;
use std::slice;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;

use crate::artifact;
use crate::contract::{
    Attributes, Checked, Convention, Fault, From, Kind, MAX_ARGUMENTS, Operand, Pdl, Reports, Row, aligned, check,
    explain, stream_fits, unrolled,
};
use crate::error::{FlashInferError, Result};
use crate::ffi::abi::Any;
use crate::ffi::dlpack::DLTensor;
use crate::first_call::{self, Ran};
use crate::log::{self, Way};
use crate::module::{Function, Module};
use crate::object::Arg;
use crate::owner::{Owner, ordered};
use crate::reference;
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{Device, Form, Layout, MAX_NDIM};
use crate::trace_dump;

/// A kernel: its row, and what is known of it in this process.
pub(crate) trait Kernel: 'static {
    const ROW: &'static Row;
    fn state() -> &'static State;
}

/// A kernel as a value.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) row: &'static Row,
    pub(crate) state: &'static State,
}

/// What is known of a kernel in this process.
pub(crate) struct State {
    on_gpu: OnceLock<Function>,
    on_host: OnceLock<Function>,
    ran: Ran,
}

impl State {
    pub(crate) const fn new() -> Self {
        Self { on_gpu: OnceLock::new(), on_host: OnceLock::new(), ran: [const { AtomicU32::new(0) }; 64] }
    }
}

/// Declares a family's kernels: a type for each, by which functions call it, and the list that everything else reads.
macro_rules! kernels {
    ($($(#[$doc:meta])* $name:ident = $row:expr;)+) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy)]
            pub struct $name;

            impl $crate::engine::Kernel for $name {
                const ROW: &'static $crate::contract::Row = &$row;

                fn state() -> &'static $crate::engine::State {
                    static STATE: $crate::engine::State = $crate::engine::State::new();
                    &STATE
                }
            }
        )+

        /// The family's kernels.
        pub(crate) fn entries() -> Vec<$crate::engine::Entry> {
            vec![$($crate::engine::Entry {
                row: <$name as $crate::engine::Kernel>::ROW,
                state: <$name as $crate::engine::Kernel>::state(),
            }),+]
        }
    };
}
pub(crate) use kernels;

impl Entry {
    pub(crate) fn of<K: Kernel>() -> Self {
        Self { row: K::ROW, state: K::state() }
    }

    /// The library's function, looked up once.
    pub(crate) fn function(self) -> Result<&'static Function> {
        once(&self.state.on_gpu, || self.module()?.function(self.row.function))
    }

    /// Looks the function up, and makes a kernel of this crate's own ready on a GPU, so that its first launch does not have to, in a
    /// capture perhaps.
    #[cfg(all(feature = "cudarc", feature = "compute"))]
    pub(crate) fn prepare(self, device: Device) -> Result<()> {
        self.function()?;
        match device {
            Device::Cuda(id) if self.row.is_own() => crate::glue::decode::prepare(id as i32),
            _ => Ok(()),
        }
    }

    /// The library, or the functions that launch kernels of this crate's own.
    fn module(self) -> Result<&'static Module> {
        match self.row.is_own() {
            false => FlashInferRuntime::global()?.module(self.row.library),
            #[cfg(feature = "compute")]
            true => crate::glue::decode::module(),
            #[cfg(not(feature = "compute"))]
            true => Err(FlashInferError::ArtifactMissing {
                library: self.row.library.to_owned(),
                searched: vec!["this program".to_owned()],
                remedy: format!("build with the Cargo feature `{}`", self.row.feature),
            }),
        }
    }

    /// Whether this program was built with it.
    pub(crate) fn is_there(self) -> bool {
        if self.row.is_own() { cfg!(feature = "compute") } else { artifact::vendored(self.row.library).is_some() }
    }

    /// The function that serves tensors on `device`: the library's, or the reference on the host.
    fn on(self, device: Device) -> Result<&'static Function> {
        match device {
            Device::Cpu => once(&self.state.on_host, || reference::module()?.function(self.row.function)),
            Device::Cuda(_) => self.function(),
        }
    }

    /// Whether the kernel runs on a device: on the host always, where the reference computes.
    pub(crate) fn is_supported(self, device: Device) -> Result<bool> {
        let runtime = FlashInferRuntime::global()?;
        match device {
            Device::Cpu => Ok(true),
            Device::Cuda(_) => {
                Ok(self.row.runs_on.includes(runtime.compute_capability(runtime.checked_device(device)?)?))
            }
        }
    }

    /// Launches what was checked.
    ///
    /// # Safety
    /// As for [`call`]; the call must keep the row.
    pub(crate) unsafe fn call_checked(
        self,
        operands: &[Operand<'_, '_>],
        checked: &Checked,
        stream: Stream<'_>,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { launch_any(self, operands, checked, stream, Way::Directly) }
    }

    /// As [`call`], of any kernel, with other work queued ahead of it: only once it is known that the call keeps its row and that
    /// the kernel is there.
    ///
    /// # Safety
    /// As for [`call`], of what device memory holds behind that work.
    pub(crate) unsafe fn call_behind(
        self,
        operands: &[Operand<'_, '_>],
        stream: Stream<'_>,
        ahead: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let checked = check(self.row, operands, stream).map_err(|fault| refused(self.row, operands, stream, fault))?;
        if !checked.empty {
            FlashInferRuntime::global()?.checked_device(checked.device)?;
            self.on(checked.device)?;
            ahead()?;
        }
        // SAFETY: the call keeps the row; the rest is the caller's promise.
        unsafe { launch(self, operands, &checked, stream) }
    }

    /// Calls a function of a library that no row names, with arguments that were checked otherwise, as this row's launchers are
    /// called. Not of one that sets attributes once in a process.
    ///
    /// # Safety
    /// As for [`Function::call`], on a device that exists.
    #[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
    #[inline(never)]
    pub(crate) unsafe fn call_function(
        self,
        function: &Function,
        args: &[Arg<'_>],
        device: Device,
        stream: Stream<'_>,
    ) -> Result<()> {
        const NOTHING: crate::contract::Variant<'static> = crate::contract::Variant {
            dtype: crate::tensor::DType::BF16,
            dimensions: &[0; crate::contract::MAX_DIMENSIONS],
            present: 0,
        };
        let ready = Ready { runtime: FlashInferRuntime::global()?, function, device };
        // SAFETY: the caller's promise.
        unsafe { invoke(self, &ready, args, || NOTHING, stream) }
    }

    /// As [`call`], of any kernel.
    ///
    /// # Safety
    /// As there.
    #[inline(never)]
    pub(crate) unsafe fn call(self, operands: &[Operand<'_, '_>], stream: Stream<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { run(self, operands, stream) }
    }
}

/// `get_or_try_init`, which the standard library has not yet.
fn once(cell: &OnceLock<Function>, make: impl FnOnce() -> Result<Function>) -> Result<&Function> {
    match cell.get() {
        Some(function) => Ok(function),
        None => {
            let function = make()?;
            Ok(cell.get_or_init(|| function))
        }
    }
}

/// Checks a call and launches it, asynchronously on `stream`; on the host the reference computes it at once.
///
/// # Safety
/// What the kernel reads in device memory to find its way, sequence offsets for example, must be as its row's hazards say.
/// Whoever made the tensors vouched for their memory, and whoever made the stream for the stream.
#[cfg_attr(not(debug_assertions), inline(always))]
pub(crate) unsafe fn call<K: Kernel, const N: usize>(operands: [Operand<'_, '_>; N], stream: Stream<'_>) -> Result<()> {
    const { assert!(K::ROW.arguments.len() == N && N <= MAX_ARGUMENTS) };
    // SAFETY: the caller's promise.
    unsafe { run(Entry::of::<K>(), &operands, stream) }
}

/// # Safety
/// As for [`call`].
#[cfg_attr(not(debug_assertions), inline(always))]
unsafe fn run(entry: Entry, operands: &[Operand<'_, '_>], stream: Stream<'_>) -> Result<()> {
    match check(entry.row, operands, stream) {
        // SAFETY: the call keeps the row; the rest is the caller's promise.
        Ok(checked) => unsafe { launch(entry, operands, &checked, stream) },
        Err(fault) => Err(refused(entry.row, operands, stream, fault)),
    }
}

/// The error for a call that breaks its row; the log has the call too.
#[cold]
pub(crate) fn refused(
    row: &'static Row,
    operands: &[Operand<'_, '_>],
    stream: Stream<'_>,
    fault: Fault,
) -> FlashInferError {
    let error = explain(row, operands, stream, fault);
    if !log::enabled() {
        return error;
    }
    let result = Err(error);
    log::ended(row, operands, stream, Way::Directly, &result);
    match result {
        Err(error) => error,
        Ok(()) => unreachable!("it was made an error above"),
    }
}

/// What a call that keeps the row needs beside it: everything loaded, and a GPU that is known to work.
struct Ready<'f> {
    runtime: &'static FlashInferRuntime,
    function: &'f Function,
    device: Device,
}

/// Launches a call that keeps its row.
///
/// # Safety
/// As for [`call`].
#[cfg_attr(not(debug_assertions), inline(always))]
unsafe fn launch(entry: Entry, operands: &[Operand<'_, '_>], checked: &Checked, stream: Stream<'_>) -> Result<()> {
    let plain = checked.whole & !checked.empty & !any_ordered(operands) & !log::enabled();
    if plain
        && let (Some(runtime), Some(function)) = (FlashInferRuntime::get(), entry.state.on_gpu.get())
        && runtime.usable(checked.device).is_some()
    {
        let ready = Ready { runtime, function, device: checked.device };
        // SAFETY: the caller's promise; nothing is to be ordered and one launch does it.
        return unsafe { queue(entry, &ready, operands, checked, stream) };
    }
    // SAFETY: the caller's promise.
    unsafe { launch_any(entry, operands, checked, stream, Way::Directly) }
}

/// Whether a tensor's owner wants the call to be ordered with its other uses.
#[cfg_attr(not(debug_assertions), inline(always))]
fn any_ordered(operands: &[Operand<'_, '_>]) -> bool {
    let mut any = false;
    unrolled!(i in ARGUMENTS < operands.len(), {
        if let Operand::Tensor(_, owner) = &operands[i] {
            any |= owner.orders();
        }
    });
    any
}

/// As [`launch`], for the first call, for tensors that cudarc tracks, for more than one launch, on the host, and for calls that
/// are logged.
///
/// # Safety
/// As there.
#[cold]
unsafe fn launch_any(
    entry: Entry,
    operands: &[Operand<'_, '_>],
    checked: &Checked,
    stream: Stream<'_>,
    way: Way,
) -> Result<()> {
    if !log::enabled() {
        // SAFETY: the caller's promise.
        return unsafe { launch_all(entry, operands, checked, stream, None) };
    }
    let seen = log::Call::new(entry.row, operands, stream, way);
    // SAFETY: the caller's promise.
    let result = unsafe { launch_all(entry, operands, checked, stream, seen.as_ref()) };
    if let Some(seen) = &seen {
        seen.ended(&result);
    }
    result
}

/// # Safety
/// As for [`launch`].
unsafe fn launch_all(
    entry: Entry,
    operands: &[Operand<'_, '_>],
    checked: &Checked,
    stream: Stream<'_>,
    seen: Option<&log::Call<'_>>,
) -> Result<()> {
    if checked.empty {
        return Ok(());
    }
    let (row, device) = (entry.row, checked.device);
    let runtime = FlashInferRuntime::global()?;
    // First, since this finds that there is no such device, before a library is loaded for it.
    runtime.checked_device(device)?;
    if row.dimensions.iter().any(|dimension| matches!(dimension.from, From::Gpu(_))) {
        // The check may have been made before there was a runtime that knows the GPU.
        check(row, operands, stream).map_err(|fault| explain(row, operands, stream, fault))?;
    }
    let ready = Ready { runtime, function: entry.on(device)?, device };
    let launch = || {
        if checked.whole {
            // SAFETY: the caller's promise.
            return unsafe { queue_any(entry, &ready, operands, checked, stream) };
        }
        for (start, count) in parts(row, operands, checked) {
            let mut cut = [const { MaybeUninit::<Layout>::uninit() }; MAX_ARGUMENTS];
            let mut part = [Operand::Absent; MAX_ARGUMENTS];
            for (((to, from), place), argument) in part.iter_mut().zip(operands).zip(&mut cut).zip(row.arguments) {
                *to = match (*from, &argument.kind) {
                    (Operand::Tensor(layout, owner), Kind::Tensor(tensor)) if is_divided(tensor) => {
                        Operand::Tensor(place.write(layout.narrow(0, start, count)), owner)
                    }
                    (other, _) => other,
                };
            }
            // SAFETY: a part of what keeps the row keeps it too; the rest is the caller's promise.
            unsafe { queue_any(entry, &ready, &part[..operands.len()], checked, stream) }?;
        }
        Ok(())
    };
    // Within the order of the buffers' uses, so that what is read of them for the log is what the kernel will read.
    let launch_seen = |seen: &log::Call<'_>| {
        // SAFETY: the call keeps its row; that its tensors and its stream are valid is the caller's promise.
        unsafe { seen.before() };
        trace_dump::called(row, operands, checked);
        launch()?;
        // SAFETY: as above.
        unsafe { seen.after() };
        Ok(())
    };
    ordered_like(row, operands, || match seen {
        Some(seen) => launch_seen(seen),
        None => launch(),
    })
}

/// Does what uses a call's tensors as its kernel does, in order with their other uses.
pub(crate) fn ordered_like(
    row: &'static Row,
    operands: &[Operand<'_, '_>],
    queue: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if any_ordered(operands) { ordered(row.function, owners(row, operands), queue) } else { queue() }
}

/// The owners of a call's tensors, by the names of their arguments.
fn owners<'a, 'o>(
    row: &'static Row,
    operands: &'a [Operand<'_, 'o>],
) -> impl Iterator<Item = (&'static str, &'a Owner<'o>)> + Clone {
    row.arguments.iter().zip(operands).filter_map(|(argument, operand)| match operand {
        Operand::Tensor(_, owner) => Some((argument.name, *owner)),
        _ => None,
    })
}

fn is_divided(tensor: &crate::contract::Tensor) -> bool {
    matches!(tensor.shape[0], crate::contract::Size::Of(0))
}

/// Where each launch of a call that one would not do starts in the row's first dimension, and how much it covers.
fn parts(row: &'static Row, operands: &[Operand<'_, '_>], checked: &Checked) -> impl Iterator<Item = (i64, i64)> {
    let count = checked.dimensions[0];
    let most = row.extent.most;
    let covered = |layout: &Layout| {
        let one = layout.narrow(0, 0, 1).reach().unwrap_or(i64::MAX);
        match layout.stride(0) {
            stride if layout.size(0) > 1 && stride > 0 => (most - one) / stride + 1,
            _ => count,
        }
    };
    let divided = row.tensors().filter(|(_, _, tensor)| is_divided(tensor));
    let layouts = divided.filter_map(|(i, ..)| operands[i].layout());
    let step = layouts.map(covered).min().unwrap_or(count).min(checked.at_once).clamp(1, count.max(1));
    (0..count).step_by(step as usize).map(move |start| (start, step.min(count - start)))
}

/// # Safety
/// As for [`queue`].
#[inline(never)]
unsafe fn queue_any(
    entry: Entry,
    ready: &Ready<'_>,
    operands: &[Operand<'_, '_>],
    checked: &Checked,
    stream: Stream<'_>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { queue(entry, ready, operands, checked, stream) }
}

/// Packs and calls.
///
/// # Safety
/// As for [`call`], of operands that keep the row in one launch, whose memory is ordered with its other uses.
#[cfg_attr(not(debug_assertions), inline(always))]
unsafe fn queue(
    entry: Entry,
    ready: &Ready<'_>,
    operands: &[Operand<'_, '_>],
    checked: &Checked,
    stream: Stream<'_>,
) -> Result<()> {
    let row = entry.row;
    if row.convention == Convention::Objects {
        // SAFETY: the caller's promise.
        return unsafe { queue_objects(entry, ready, operands, checked, stream) };
    }
    let mut packed = [const { MaybeUninit::<DLTensor>::uninit() }; MAX_ARGUMENTS];
    let mut args = [const { MaybeUninit::<Arg<'_>>::uninit() }; MAX_ARGUMENTS];
    // Once, since asking again would end what the arguments borrow.
    let places = packed.as_mut_ptr();
    unrolled!(i in ARGUMENTS < operands.len(), {
        let arg = match &operands[i] {
            Operand::Tensor(layout, _) => {
                // SAFETY: a place of this array that nothing else refers to, for as long as the arguments do.
                let place = unsafe { &mut *places.add(i) };
                Arg::dl_tensor(place.write(layout.pack()))
            }
            Operand::Absent => match row.arguments[i].kind {
                Kind::Missing(rank) => {
                    // SAFETY: as above.
                    let place = unsafe { &mut *places.add(i) };
                    Arg::dl_tensor(place.write(Layout::without_memory(checked.device, rank)))
                }
                _ => Arg::NONE,
            },
            Operand::Number(value) => Arg::float(*value),
            Operand::Whole(value) => Arg::int(*value),
            Operand::Word(word) => Arg::str(word),
            Operand::Bool(value) => {
                let pdl = matches!(row.arguments[i].kind, Kind::EnablePdl) & (row.pdl == Pdl::Waits);
                Arg::bool(*value | (pdl && stream.captures_with_pdl()))
            }
        };
        args[i].write(arg);
    });
    // SAFETY: as many were written.
    let args = unsafe { slice::from_raw_parts(args.as_ptr().cast::<Arg<'_>>(), operands.len()) };
    // SAFETY: the caller's promise.
    unsafe { invoke(entry, ready, args, || checked.variant(row, operands), stream) }
}

/// As [`queue`], for a function that takes its tensors as objects.
///
/// # Safety
/// As there.
#[cold]
unsafe fn queue_objects(
    entry: Entry,
    ready: &Ready<'_>,
    operands: &[Operand<'_, '_>],
    checked: &Checked,
    stream: Stream<'_>,
) -> Result<()> {
    let mut objects = Vec::with_capacity(operands.len());
    for operand in operands {
        objects.push(match operand {
            // SAFETY: the object is dropped at the end of this function, before the layout; the function keeps none.
            Operand::Tensor(layout, _) => Some(unsafe { ready.runtime.tensor_object(layout.pack()) }?),
            _ => None,
        });
    }
    let args = operands.iter().zip(&objects).map(|(operand, object)| match (operand, object) {
        (_, Some(object)) => Arg::object(object),
        (Operand::Number(value), None) => Arg::float(*value),
        (Operand::Whole(value), None) => Arg::int(*value),
        (Operand::Word(word), None) => Arg::str(word),
        (Operand::Bool(value), None) => Arg::bool(*value),
        _ => Arg::NONE,
    });
    let args: Vec<_> = args.collect();
    // SAFETY: the caller's promise.
    unsafe { invoke(entry, ready, &args, || checked.variant(entry.row, operands), stream) }
}

/// Calls the function on its device and stream, and looks at what came of it.
///
/// # Safety
/// As for [`Function::call`].
#[cfg_attr(not(debug_assertions), inline(always))]
unsafe fn invoke<'v>(
    entry: Entry,
    ready: &Ready<'_>,
    args: &[Arg<'_>],
    variant: impl FnOnce() -> crate::contract::Variant<'v>,
    stream: Stream<'_>,
) -> Result<()> {
    let (row, Ready { runtime, function, device }) = (entry.row, ready);
    let Device::Cuda(id) = *device else {
        // SAFETY: the caller's promise.
        return unsafe { function.launch_unseen(args) };
    };
    let id = id as i32;
    let Some(cudart) = runtime.loaded_cudart() else { return runtime.cudart().map(|_| ()) };
    let _stream = match runtime.set_stream(id, stream) {
        Ok(guard) => guard,
        Err(code) => return Err(runtime.api().stream_error(code)),
    };
    // Where there is one device alone, it is that.
    let _current =
        if row.uses_current_device && !runtime.has_one_device() { Some(cudart.set_current(id)?) } else { None };
    let launch = || {
        if row.reports != Reports::Status {
            // What another call of this thread left is not the kernel's.
            cudart.forget_stale_error();
        }
        let mut result = Any::NONE;
        // SAFETY: the caller's promise.
        let code = unsafe { function.invoke(args, &mut result) };
        let last = if row.reports == Reports::Nothing { cudart.last_error() } else { 0 };
        if (code == 0) & (last == 0) & result.is_none() {
            return Ok(());
        }
        // SAFETY: both come from the call.
        match unsafe { function.outcome(code, result) } {
            Ok(()) if last == 0 => Ok(()),
            result => Err(failed(row, runtime, id, result, last, stream)),
        }
    };
    match row.attributes {
        Attributes::None => launch(),
        Attributes::PerCall => {
            let _turn = runtime.turn(id);
            launch()
        }
        Attributes::OncePerProcess { flag, variant: choose } => {
            first_call::guarded(&entry.state.ran, (row.library, flag), choose(&variant()), runtime, id, launch)
        }
    }
}

/// What a launch that failed came to: with CUDA's last error, where the launcher says nothing.
#[cold]
fn failed(
    row: &'static Row,
    runtime: &'static FlashInferRuntime,
    device: i32,
    result: Result<()>,
    last: i32,
    stream: Stream<'_>,
) -> FlashInferError {
    let cudart = match runtime.cudart() {
        Ok(cudart) => cudart,
        Err(error) => return error,
    };
    let last = if last == 0 { cudart.last_error() } else { last };
    let error = match result {
        Err(error) => error,
        Ok(()) => cudart.error(row.function, last),
    };
    cudart.forget_stale_error();
    runtime.diagnosed(error, device, last, stream)
}

/// A call that was checked once, to be launched many times, with tensors of the same form.
pub(crate) struct Fixed {
    entry: Entry,
    function: &'static Function,
    runtime: &'static FlashInferRuntime,
    checked: Checked,
    /// The form of each tensor.
    forms: Vec<Option<Form>>,
}

impl Fixed {
    pub(crate) fn new<K: Kernel>(operands: &[Operand<'_, '_>]) -> Result<Self> {
        let entry = Entry::of::<K>();
        let row = entry.row;
        // The stream is looked at when there is one: here the tensors' own.
        let own = operands.iter().find_map(|operand| operand.layout().and_then(Layout::stream));
        let stream = own.map_or(Stream::NULL, Stream::compared);
        let checked = check(row, operands, stream).map_err(|fault| refused(row, operands, stream, fault))?;
        if log::enabled() {
            log::ended(row, operands, stream, Way::Preparing, &Ok(()));
        }
        let runtime = FlashInferRuntime::global()?;
        runtime.checked_device(checked.device)?;
        let function = entry.on(checked.device)?;
        let forms = operands.iter().map(|operand| operand.layout().map(|layout| *layout.form())).collect();
        Ok(Self { entry, function, runtime, checked, forms })
    }

    pub(crate) fn row(&self) -> &'static Row {
        self.entry.row
    }

    /// Launches the call with these tensors in the old ones' places.
    ///
    /// # Safety
    /// As for [`call`].
    #[cfg_attr(not(debug_assertions), inline(always))]
    pub(crate) unsafe fn launch<K: Kernel>(&self, operands: &[Operand<'_, '_>], stream: Stream<'_>) -> Result<()> {
        let mut same = self.forms.len() == operands.len();
        unrolled!(i in ARGUMENTS < operands.len(), {
            same &= match (operands[i].layout(), self.forms.get(i), &K::ROW.arguments[i].kind) {
                (Some(layout), Some(Some(form)), Kind::Tensor(tensor)) => {
                    layout.form().is(form, tensor.shape.len())
                        & stream_fits(layout, stream)
                        & aligned(tensor, &self.checked.dimensions, layout)
                        & (layout.is_on_gpu() | stream.capture().is_none())
                }
                (None, Some(None), _) => true,
                _ => false,
            };
        });
        let plain = self.checked.whole & !self.checked.empty & !any_ordered(operands) & !log::enabled();
        if same & plain {
            let ready = Ready { runtime: self.runtime, function: self.function, device: self.checked.device };
            let entry = Entry { row: K::ROW, state: self.entry.state };
            // SAFETY: tensors of the same form as those that were checked keep the row as those did, and the rest of what
            // was checked is looked at above; what the row cannot say is the caller's promise.
            return unsafe { queue(entry, &ready, operands, &self.checked, stream) };
        }
        // SAFETY: the caller's promise.
        unsafe { self.launch_other(same, operands, stream) }
    }

    /// As [`launch`](Self::launch), for tensors that cudarc tracks, for more than one launch, for calls that are logged, and for
    /// what does not fit.
    ///
    /// # Safety
    /// As there.
    #[cold]
    unsafe fn launch_other(&self, same: bool, operands: &[Operand<'_, '_>], stream: Stream<'_>) -> Result<()> {
        if same {
            // SAFETY: as in `launch`.
            return unsafe { launch_any(self.entry, operands, &self.checked, stream, Way::Prepared) };
        }
        let row = self.entry.row;
        // What breaks the row is said in the row's words, what only differs from what was prepared here.
        check(row, operands, stream).map_err(|fault| refused(row, operands, stream, fault))?;
        let differs = operands.iter().zip(&self.forms).position(|(operand, form)| {
            match (operand.layout().map(Layout::form), form) {
                (Some(found), Some(form)) => !found.is(form, MAX_NDIM),
                (None, None) => false,
                _ => true,
            }
        });
        let i = differs.unwrap_or(row.lead);
        let shown = |form: Option<&Form>| form.map_or_else(|| "absent".to_owned(), ToString::to_string);
        let result = Err(FlashInferError::InvalidArgument {
            function: row.function,
            argument: row.arguments[i].name,
            found: shown(operands[i].layout().map(Layout::form)),
            expected: format!("{}, as it was prepared; prepare another call for it", shown(self.forms[i].as_ref())),
        });
        if log::enabled() {
            log::ended(row, operands, stream, Way::Directly, &result);
        }
        result
    }
}
