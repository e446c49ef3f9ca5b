//! The kernels' contracts, as data: one [`Row`] for each kernel.
//!
//! What a kernel takes, where it runs, what it must never be given: each condition is stated once, in its row. One engine
//! reads the rows: it checks calls, says what is wrong with them, packs the arguments, takes the locks that a kernel needs
//! and captures it into graphs. The documentation's tables, the kernel index and the self-tests follow from the same rows.

use std::ffi::CStr;

mod check;
mod explain;
#[cfg(test)]
mod random;
mod table;

pub(crate) use check::{Checked, Fault, Operand, aligned, check, stream_fits, unrolled};
pub(crate) use explain::explain;
pub use table::{arguments, index};

use crate::runtime::FlashInferRuntime;
use crate::tensor::{DType, Device};

/// The most arguments that a kernel takes.
pub const MAX_ARGUMENTS: usize = 24;

/// The most named dimensions of a row.
pub const MAX_DIMENSIONS: usize = 12;

/// The sizes of a row's dimensions in a call, in the row's order.
pub type Dimensions = [i64; MAX_DIMENSIONS];

/// What rows have for a library whose kernels no library has: this crate carries them itself, as PTX.
pub(crate) const OWN: &str = "decode.ptx";

/// A kernel's contract.
#[derive(Debug)]
pub struct Row {
    /// The kernel's name, by which errors and the index call it: the function's, with its form where there are several.
    pub kernel: &'static str,
    /// The function's name in the library.
    pub function: &'static str,
    /// The vendored library that has it, or what stands for one.
    pub library: &'static str,
    /// The Cargo feature that vendors the library.
    pub feature: &'static str,
    /// What it computes, in one line.
    pub summary: &'static str,
    /// Where upstream states this, in FlashInfer 0.6.3.
    pub source: &'static str,
    /// The GPUs that it runs on.
    pub runs_on: RunsOn,
    /// The arguments, in upstream's order.
    pub arguments: &'static [Argument],
    /// The argument that decides where the call runs, and whose type others follow.
    pub lead: usize,
    /// The named dimensions of the shapes.
    pub dimensions: &'static [Dimension],
    /// What the dimensions must be to each other, and the limits that follow from them.
    pub relations: &'static [Relation],
    /// How far a launch's offsets reach.
    pub extent: Extent,
    /// Programmatic dependent launch.
    pub pdl: Pdl,
    /// What the launcher changes about the kernel before it launches it.
    pub attributes: Attributes,
    /// How the launcher tells what its launch came to.
    pub reports: Reports,
    /// Whether the launcher asks for the thread's current device, which must then be the tensors', or makes theirs the current
    /// one and leaves it so: the engine makes it the tensors' for the call, and then what it was. Other launchers select it
    /// themselves and give the thread its own back.
    pub uses_current_device: bool,
    /// How tensors are passed.
    pub convention: Convention,
    /// What no check can see, and what upstream gets wrong.
    pub hazards: &'static [&'static str],
    /// The relative error (L2) beside the reference that a self-test allows, for BF16 and for F16.
    pub tolerance: [f64; 2],
    /// The files of tests that cover it.
    pub tests: &'static str,
}

/// GPUs, by their compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunsOn {
    /// From this one on, as far as the wheel was compiled for it.
    AtLeast(i32, i32),
    /// This one alone.
    Exactly(i32, i32),
}

impl RunsOn {
    /// Whether a compute capability is among them.
    ///
    /// ```
    /// use flashinfer_rs::contract::RunsOn;
    ///
    /// let (turing, hopper) = ((7, 5), (9, 0));
    /// assert!(RunsOn::AtLeast(7, 5).includes(turing) && RunsOn::AtLeast(7, 5).includes(hopper));
    /// assert!(!RunsOn::AtLeast(8, 0).includes(turing));
    /// assert!(RunsOn::Exactly(9, 0).includes(hopper) && !RunsOn::Exactly(9, 0).includes((10, 0)));
    /// ```
    pub fn includes(self, capability: (i32, i32)) -> bool {
        match self {
            Self::AtLeast(major, minor) => capability >= (major, minor),
            Self::Exactly(major, minor) => capability == (major, minor),
        }
    }
}

/// One argument.
#[derive(Debug)]
pub struct Argument {
    /// Its name, by which errors call it.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
}

/// What an argument is.
#[derive(Debug)]
pub enum Kind {
    /// A tensor.
    Tensor(Tensor),
    /// A number above 0 that an f32 holds without being flushed to 0.
    Positive,
    /// A number that an f32 holds, 0.0 or above it.
    NotNegative,
    /// A number within these bounds, as the f32 that a kernel makes of it.
    Between(f64, f64),
    /// A whole number within these bounds.
    Whole(i64, i64),
    /// On or off.
    Switch,
    /// One of these words.
    Word(&'static [&'static CStr]),
    /// A tensor that this form of the function does without: it is passed with no memory, of this rank.
    Missing(usize),
    /// An optional tensor that this form of the function does without: nothing is passed.
    Nothing,
    /// Whether programmatic dependent launch is on.
    EnablePdl,
}

/// A tensor argument.
#[derive(Debug)]
pub struct Tensor {
    /// What the kernel does with it.
    pub role: Role,
    /// Whether a call may do without it.
    pub optional: bool,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'static [Size],
    /// How its elements may lie.
    pub strides: Strides,
    /// What its address must be a multiple of, on a GPU.
    pub alignment: Alignment,
    /// What a test or self-test fills it with.
    pub contents: Contents,
}

/// What a kernel does with a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is read.
    In,
    /// It is written, whatever was there.
    Out,
    /// As [`Out`](Self::Out); what is written to a row of the last dimension comes in any order.
    Unordered,
    /// It is read and written.
    InPlace,
    /// It is scratch memory of the kernel's.
    Workspace,
}

/// Element types.
#[derive(Debug, Clone, Copy)]
pub enum Dtype {
    /// F16 or BF16; on the host F32 too.
    Half,
    /// BF16; on the host F16 and F32 too.
    Bf16,
    /// F8E4M3 or F8E5M2.
    Eight,
    /// One of these.
    OneOf(&'static [DType]),
    /// This one.
    Only(DType),
    /// That of another argument.
    As(usize),
}

/// One size of a shape.
#[derive(Debug, Clone, Copy)]
pub enum Size {
    /// That of a named dimension.
    Of(usize),
    /// One more than a named dimension.
    OneMore(usize),
    /// Twice a named dimension.
    Twice(usize),
    /// An eighth of a named dimension, rounded up: bytes of so many bits.
    Eighth(usize),
}

/// How a tensor's elements may lie.
#[derive(Debug, Clone, Copy)]
pub enum Strides {
    /// One after the other, in row-major order.
    Contiguous,
    /// Rows along the last dimension, whose stride is 1. The other strides are not negative and multiples of what
    /// [`Alignment::Vector`] says; 0 repeats what is read. No two elements that are written lie in the same place.
    Rows,
    /// As [`Rows`](Self::Rows), with the strides of another argument of the same shape.
    As(usize),
}

/// What an address must be a multiple of.
#[derive(Debug, Clone, Copy)]
pub enum Alignment {
    /// So many bytes.
    Bytes(usize),
    /// As many elements as one memory access moves: the greatest power of two that divides this dimension, `most` at the most.
    Vector {
        /// The dimension that is divided into vectors.
        dimension: usize,
        /// The longest vector, in elements.
        most: i64,
    },
    /// As [`Vector`](Self::Vector), where the longest one has so many bytes, whatever the elements are.
    Access {
        /// The dimension that is divided into vectors.
        dimension: usize,
        /// The longest vector, in bytes.
        bytes: usize,
    },
}

/// What a test fills a tensor with.
#[derive(Debug, Clone, Copy)]
pub enum Contents {
    /// Numbers between `-x` and `x`.
    Uniform(f64),
    /// Numbers between these two.
    Between(f64, f64),
    /// As many steps as from the first number to the second, of this size each: a power of two, so that sums are the same in
    /// whichever order they are made.
    Steps(i64, i64, f64),
    /// Offsets that divide the second dimension into as many parts as the first says.
    Offsets(usize, usize),
    /// Indices into this dimension, in turn: 0, 1, 2 and so on, and 0 again behind the last.
    Turns(usize),
    /// Whole numbers of which no two that lie in one row, as long as this dimension, are the same, in no order.
    Distinct(usize),
    /// How often [`Turns`](Self::Turns) of this dimension began anew: with those, pairs of which no two are the same.
    Rounds(usize),
    /// Zeros.
    Zeros,
}

/// A named dimension.
#[derive(Debug)]
pub struct Dimension {
    /// Its name.
    pub name: &'static str,
    /// Where it comes from in a call.
    pub from: From,
    /// The least that it may be.
    pub least: i64,
    /// The most that it may be.
    pub most: i64,
    /// Sizes for tests; the first is the self-test's. None for a dimension that follows from others.
    pub examples: &'static [i64],
}

/// Where a dimension comes from.
#[derive(Debug, Clone, Copy)]
pub enum From {
    /// A size of an argument: the argument, then the dimension of its shape.
    Shape(usize, usize),
    /// One less than a size of an argument.
    OneLess(usize, usize),
    /// The larger of two dimensions.
    Larger(usize, usize),
    /// The sum of two dimensions.
    Sum(usize, usize),
    /// The whole number that an argument is; of one that is on or off, 1 or 0.
    Number(usize),
    /// The bytes of an argument's elements.
    ElementSize(usize),
    /// What the lead argument's GPU has. On the host and where there is no GPU to be asked, what the largest have.
    Gpu(Limit),
}

/// What GPUs differ in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The bytes of shared memory that a block can have.
    SharedMemory,
    /// How many multiprocessors there are.
    Multiprocessors,
}

impl Limit {
    /// What it is on a device.
    #[inline]
    pub fn of(self, device: Device) -> i64 {
        let runtime = FlashInferRuntime::get();
        let known = match device {
            Device::Cuda(id) => runtime.and_then(|runtime| runtime.limits(id)),
            Device::Cpu => None,
        };
        // Of a device that is not there nothing is launched: then it is a Hopper GPU's. Of one that is, and does not answer, it is
        // what every GPU has.
        let there = runtime.is_some_and(|runtime| runtime.checked_device(device).is_ok());
        let [shared_memory, multiprocessors] = if there { [48 << 10, 1] } else { [227 << 10, 132] };
        match self {
            Self::SharedMemory => known.map_or(shared_memory, |limits| limits.shared_memory),
            Self::Multiprocessors => known.map_or(multiprocessors, |limits| limits.multiprocessors),
        }
    }
}

/// What dimensions must be to each other.
#[derive(Debug)]
pub struct Relation {
    /// What errors call it: the argument or dimension that it limits.
    pub name: &'static str,
    /// Whether it is only so on a GPU.
    pub only_on_gpu: bool,
    /// Whether it holds.
    pub holds: fn(&Dimensions) -> bool,
    /// What there is, for a message.
    pub found: fn(&Dimensions) -> String,
    /// What is required.
    pub expected: &'static str,
}

/// How far a launch's offsets reach.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// The most elements from a tensor's first to behind its last in one launch.
    pub most: i64,
    /// Whether more are divided into several launches, along the first dimension of each tensor that has the row's first one.
    pub split: bool,
    /// The most that a stride may be, in elements.
    pub stride: i64,
}

/// Programmatic dependent launch: whether a kernel may start before the one ahead of it in its stream has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pdl {
    /// The kernel has no such option.
    None,
    /// The kernel waits before it reads anything, so that every edge of a graph may be programmatic.
    Waits,
    /// The kernel reads this before it waits, or never waits: what is ahead of it must have ended.
    ReadsBefore(&'static str),
}

/// What a kernel's launcher changes before it launches.
#[derive(Debug, Clone, Copy)]
pub enum Attributes {
    /// Nothing.
    None,
    /// Each call sets the kernel's shared memory to what its own sizes need, so no two may be at it at once on one device.
    PerCall,
    /// The first call in a process sets it, on its device alone, and remembers that in exported flags.
    OncePerProcess {
        /// The end of the flags' mangled names.
        flag: &'static str,
        /// Which of the library's kernels a call chooses, by its operands.
        variant: fn(&Variant<'_>) -> u32,
    },
}

/// How a launcher tells what its launch came to. Wrong in a row, a launch that failed would pass for one that ran: a test calls
/// every kernel of the real libraries over a CUDA runtime whose launches fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reports {
    /// It raises what its own launch answered.
    Status,
    /// It raises what CUDA's last error is after the launch, whoever made it: what others left is forgotten before.
    LastError,
    /// It says nothing: this crate asks for the last error after the launch.
    Nothing,
}

/// What chooses among a library's kernels.
#[derive(Debug)]
pub struct Variant<'a> {
    /// The type of the lead argument.
    pub dtype: DType,
    /// The sizes.
    pub dimensions: &'a Dimensions,
    /// A bit for each argument that is there, from the first on.
    pub present: u32,
}

/// How tensors are passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Convention {
    /// As `DLTensor*`.
    Views,
    /// As reference-counted objects, one allocation each.
    Objects,
}

impl Row {
    /// Whether it is a kernel of this crate's own.
    pub(crate) fn is_own(&self) -> bool {
        self.library == OWN
    }

    /// The tensor arguments, with their places.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &'static str, &'static Tensor)> {
        self.arguments.iter().enumerate().filter_map(|(i, argument)| match &argument.kind {
            Kind::Tensor(tensor) => Some((i, argument.name, tensor)),
            _ => None,
        })
    }

    /// The sizes of a shape.
    pub fn shape(&self, tensor: &Tensor, dimensions: &Dimensions) -> Vec<i64> {
        tensor.shape.iter().map(|size| size.of(dimensions)).collect()
    }

    /// The row's dimensions, where those that a call gives are these, in the row's order.
    pub fn dimensions_from(&self, given: impl Fn(usize) -> i64) -> Dimensions {
        let mut dimensions: Dimensions = [1; MAX_DIMENSIONS];
        for (i, dimension) in self.dimensions.iter().enumerate() {
            dimensions[i] = match dimension.from {
                From::Larger(a, b) => dimensions[a].max(dimensions[b]),
                From::Sum(a, b) => dimensions[a].saturating_add(dimensions[b]),
                From::Shape(..) | From::OneLess(..) | From::Number(_) | From::ElementSize(_) | From::Gpu(_) => given(i),
            };
        }
        dimensions
    }

    /// The whole number that an argument is, or whether it is on, in a call of these dimensions: the dimension that it gives, else the number within
    /// its bounds that is next to 0. For tests.
    pub fn whole(&self, argument: usize, dimensions: &Dimensions) -> Option<i64> {
        let (least, most) = match self.arguments[argument].kind {
            Kind::Whole(least, most) => (least, most),
            Kind::Switch => (0, 1),
            _ => return None,
        };
        let gives = |dimension: &Dimension| matches!(dimension.from, From::Number(from) if from == argument);
        Some(self.dimensions.iter().position(gives).map_or(0i64.clamp(least, most), |i| dimensions[i]))
    }
}

impl Size {
    /// The size, of these dimensions.
    #[inline(always)]
    pub fn of(self, dimensions: &Dimensions) -> i64 {
        match self {
            Self::Of(i) => dimensions[i],
            Self::OneMore(i) => dimensions[i].wrapping_add(1),
            Self::Twice(i) => dimensions[i].wrapping_mul(2),
            Self::Eighth(i) => dimensions[i].wrapping_add(7) >> 3,
        }
    }
}

impl Alignment {
    /// In elements of `size` bytes.
    #[inline(always)]
    pub fn elements(self, dimensions: &Dimensions, size: usize) -> i64 {
        match self {
            Self::Bytes(bytes) => (bytes as i64 / size as i64).max(1),
            Self::Vector { dimension, most } => 1 << dimensions[dimension].trailing_zeros().min(most.trailing_zeros()),
            Self::Access { dimension, bytes } => {
                let most = (bytes / size).max(1);
                1 << dimensions[dimension].trailing_zeros().min(most.trailing_zeros())
            }
        }
    }
}

impl Dtype {
    /// The types that are allowed; none for one that follows another argument's.
    pub fn allowed(self, on_host: bool) -> &'static [DType] {
        match (self, on_host) {
            (Self::Half, false) => &[DType::BF16, DType::F16],
            (Self::Half | Self::Bf16, true) => &[DType::BF16, DType::F16, DType::F32],
            (Self::Bf16, false) => &[DType::BF16],
            (Self::Eight, _) => &[DType::F8E4M3, DType::F8E5M2],
            (Self::OneOf(types), _) => types,
            (Self::Only(dtype), _) => dtype.alone(),
            (Self::As(_), _) => &[],
        }
    }
}

impl Role {
    /// Whether the kernel writes it.
    pub fn writes(self) -> bool {
        !matches!(self, Self::In)
    }
}
