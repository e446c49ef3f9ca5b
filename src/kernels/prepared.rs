//! Calls whose arguments are checked and packed once, and launched many times.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

use super::Kernel;
use crate::error::Result;
use crate::module::{Arg, Function, PackedTensor};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{Device, Raw, TensorMut, TensorRef};

/// How a family calls its kernel with arguments that were checked, on this thread's stream: on a device that exists, with a
/// number that says which variant of the kernel they choose, where that matters.
pub(super) type Launch = unsafe fn(&Function, Device, u32, &[Arg<'_>]) -> Result<()>;

/// A call of a kernel, checked and packed once, to be launched many times. The tensors stay borrowed until it is dropped,
/// or until another takes their place; so one over [raw pointers](TensorRef::from_raw) leaves the memory to its owner.
///
/// ```
/// # use flashinfer_rs::kernels::norm::NormOptions;
/// # use flashinfer_rs::{FlashInferRuntime, Prepared, RuntimeConfig, Stream, TensorMut, TensorRef};
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let (weight, first, second) = ([1f32; 4], [1f32, 2.0, 3.0, 4.0], [4f32, 3.0, 2.0, 1.0]);
/// let (mut out, mut other) = ([0f32; 4], [0f32; 4]);
/// let mut norm = Prepared::rmsnorm(
///     TensorMut::from_slice(&mut out, &[1, 4])?,
///     TensorRef::from_slice(&first, &[1, 4])?,
///     TensorRef::from_slice(&weight, &[4])?,
///     &NormOptions::default(),
/// )?;
/// norm.launch(Stream::NULL)?;
/// // The same call on other memory.
/// norm.replace("input", TensorRef::from_slice(&second, &[1, 4])?)?;
/// norm.replace_mut("out", TensorMut::from_slice(&mut other, &[1, 4])?)?;
/// norm.launch(Stream::NULL)?;
/// drop(norm);
/// assert_eq!(out[0], other[3]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
pub struct Prepared<'a> {
    kernel: &'static Kernel,
    function: &'static Function,
    runtime: &'static FlashInferRuntime,
    device: Device,
    /// The one stream that the tensors may be used on, where one of them has such.
    stream: Option<*mut c_void>,
    launch: Launch,
    variant: u32,
    tensors: Vec<Argument<'a>>,
    /// One after the other, those of each launch: nearly always there is one.
    slots: Vec<Slot>,
    /// The tensors of `slots`, pointing into them, and the arguments, pointing into these: neither vector grows any more.
    packed: Vec<PackedTensor<'static>>,
    args: Vec<Arg<'static>>,
    per_launch: usize,
}

/// A tensor that was given to a call.
pub(super) struct Argument<'a> {
    pub(super) name: &'static str,
    tensor: Tensor<'a>,
    /// The most that its kernel may ask for, in bytes.
    alignment: usize,
}

/// What kernels move at once.
const ALIGNMENT: usize = 16;

enum Tensor<'a> {
    Read(TensorRef<'a>),
    Written(TensorMut<'a>),
}

/// An argument of a launch.
#[derive(Clone, Copy)]
pub(super) enum Slot {
    /// This tensor of the call, or the part of it that the launch covers.
    Tensor(usize, Raw),
    /// What points nowhere.
    Number(Arg<'static>),
}

impl<'a> Argument<'a> {
    pub(super) fn read(name: &'static str, tensor: TensorRef<'a>) -> Self {
        Self { name, tensor: Tensor::Read(tensor), alignment: ALIGNMENT }
    }

    pub(super) fn written(name: &'static str, tensor: TensorMut<'a>) -> Self {
        Self { name, tensor: Tensor::Written(tensor), alignment: ALIGNMENT }
    }

    pub(super) fn aligned(self, alignment: usize) -> Self {
        Self { alignment, ..self }
    }

    pub(super) fn raw(&self) -> &Raw {
        match &self.tensor {
            Tensor::Read(tensor) => tensor.raw(),
            Tensor::Written(tensor) => tensor.raw(),
        }
    }
}

impl fmt::Debug for Prepared<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensors = self.tensors.iter().map(|tensor| (tensor.name, tensor.raw()));
        write!(f, "{} ", self.kernel.name())?;
        f.debug_map().entries(tensors).finish()
    }
}

impl<'a> Prepared<'a> {
    /// A call that was checked. Each of `launches` has as many slots.
    pub(super) fn new(
        kernel: &'static Kernel,
        device: Device,
        launch: Launch,
        variant: u32,
        tensors: Vec<Argument<'a>>,
        launches: Vec<Vec<Slot>>,
    ) -> Result<Self> {
        let runtime = FlashInferRuntime::global()?;
        // First, since this finds that there is no such device, before a library is loaded for it.
        runtime.checked_device(device)?;
        let function = kernel.on(device)?;
        let stream = tensors.iter().find_map(|tensor| tensor.raw().stream());
        let per_launch = launches.first().map_or(1, Vec::len);
        let slots = launches.concat();
        let (packed, args) = (Vec::with_capacity(slots.len()), Vec::with_capacity(slots.len()));
        let mut prepared = Self {
            kernel,
            function,
            runtime,
            device,
            stream,
            launch,
            variant,
            tensors,
            slots,
            packed,
            args,
            per_launch,
        };
        prepared.pack();
        Ok(prepared)
    }

    /// Makes the arguments out of the slots, anew, without an allocation.
    fn pack(&mut self) {
        self.packed.clear();
        self.args.clear();
        let tensors = self.slots.iter().filter_map(|slot| match slot {
            Slot::Tensor(_, raw) => Some(raw.pack().0),
            Slot::Number(_) => None,
        });
        self.packed.extend(tensors.map(|tensor| PackedTensor(tensor, PhantomData)));
        let mut packed = self.packed.as_ptr();
        for slot in &self.slots {
            self.args.push(match slot {
                Slot::Number(number) => *number,
                Slot::Tensor(..) => {
                    // SAFETY: there is a packed tensor for every slot of one, in this order, and they stay where they are
                    // for as long as the arguments do: both are `self`'s, and changed here only, together.
                    let arg = Arg::tensor(unsafe { &*packed });
                    packed = packed.wrapping_add(1);
                    arg
                }
            });
        }
    }

    /// Launches the kernel, asynchronously on `stream`; on the host it is computed at once.
    ///
    /// Nothing is checked again but the stream and the device, and nothing is packed.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for another stream than that of the tensors,
    /// [`ContextLost`](crate::FlashInferError::ContextLost), and
    /// [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised.
    #[inline]
    pub fn launch(&self, stream: Stream<'_>) -> Result<()> {
        if self.stream.is_some_and(|own| own != stream.as_raw()) || stream.capture().is_some() {
            self.check_stream(stream)?;
        }
        // The device was looked at when the call was prepared; where its context is lost since, the kernel says so.
        let _stream = match self.device {
            Device::Cuda(id) => match self.runtime.set_stream(id as i32, stream) {
                Ok(guard) => Some(guard),
                Err(code) => return Err(self.runtime.api().stream_error(code)),
            },
            Device::Cpu => None,
        };
        for args in self.args.chunks_exact(self.per_launch) {
            // SAFETY: the arguments keep the kernel's contract, which was checked before they were packed; whoever made
            // the tensors vouched for their memory, which they keep borrowed, and whoever made the stream for the stream.
            unsafe { (self.launch)(self.function, self.device, self.variant, args) }?;
        }
        Ok(())
    }

    #[cold]
    fn check_stream(&self, stream: Stream<'_>) -> Result<()> {
        self.tensors.iter().try_for_each(|tensor| self.kernel.stream(tensor.name, tensor.raw(), stream))
    }

    /// Puts another tensor in the place of one that is read, by the argument's name, without an allocation. What was
    /// launched before goes on with the old one.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) where no tensor of that name is read, or unless the new
    /// one has the old one's type, device, shape, strides and stream, and its memory is aligned as the old one's, to 16
    /// bytes at the most (a workspace's to 64).
    pub fn replace(&mut self, name: &str, tensor: TensorRef<'a>) -> Result<()> {
        self.put(name, Tensor::Read(tensor))
    }

    /// As [`replace`](Self::replace), for a tensor that is written.
    ///
    /// # Errors
    /// As there.
    pub fn replace_mut(&mut self, name: &str, tensor: TensorMut<'a>) -> Result<()> {
        self.put(name, Tensor::Written(tensor))
    }

    fn put(&mut self, name: &str, tensor: Tensor<'a>) -> Result<()> {
        let reads = |tensor: &Tensor<'_>| matches!(tensor, Tensor::Read(_));
        let kind = reads(&tensor);
        let Some(at) = self.tensors.iter().position(|old| old.name == name && reads(&old.tensor) == kind) else {
            let names = self.tensors.iter().filter(|old| reads(&old.tensor) == kind).map(|old| old.name);
            let expected = if kind { "one that is read" } else { "one that is written" };
            let expected = format!("{expected}: {}", names.collect::<Vec<_>>().join(", "));
            return Err(self.kernel.invalid("the name of the tensor to replace", name, expected));
        };
        let Argument { name, alignment, .. } = self.tensors[at];
        let new = Argument { name, tensor, alignment };
        let old = *self.tensors[at].raw();
        self.fits(&new, &old)?;
        let moved = new.raw().data().addr().wrapping_sub(old.data().addr()) as isize;
        for slot in &mut self.slots {
            match slot {
                Slot::Tensor(tensor, raw) if *tensor == at => *raw = raw.moved(moved, new.raw()),
                _ => {}
            }
        }
        // The old one's guard goes last, behind what was launched with it.
        self.tensors[at] = new;
        self.pack();
        Ok(())
    }

    /// That a tensor may stand where another was checked.
    fn fits(&self, new: &Argument<'_>, old: &Raw) -> Result<()> {
        let (kernel, name, alignment, new) = (self.kernel, new.name, new.alignment, new.raw());
        kernel.dtype(name, new, old.dtype())?;
        kernel.device(name, new, old.device())?;
        kernel.shape(name, new, old.shape())?;
        if new.strides() != old.strides() {
            let expected = format!("{:?}, as before", old.strides());
            return Err(kernel.invalid(name, format_args!("strided {:?}", new.strides()), expected));
        }
        if new.stream() != old.stream() {
            let stream =
                |raw: &Raw| raw.stream().map_or("any stream".to_owned(), |stream| format!("stream {stream:p}"));
            return Err(kernel.invalid(name, format_args!("for {}", stream(new)), format!("for {}", stream(old))));
        }
        // The old one was aligned as its kernel asks.
        kernel.aligned(name, new, alignment.min(1 << old.data().addr().trailing_zeros().min(32)))
    }
}
