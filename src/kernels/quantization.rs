//! `quantization.so`: packing bits, eight to a byte, as attention's custom masks are kept.
//!
//! On a GPU a call is asynchronous on `stream` and never synchronizes; tensors on the host are computed by the
//! [reference](crate::reference), at once. Of nothing a call is a no-op.
//!
//! The elements of `x` are bytes that must be 0 or 1, a `bool` each. Upstream takes them as such and does not look: another
//! number makes the byte that it is packed into wrong, and no other. On the host whatever is not 0 counts as 1.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading
//! `quantization.so` answers; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised; and
//! [`Cuda`](crate::FlashInferError::Cuda) or [`ContextLost`](crate::FlashInferError::ContextLost) where it was not launched.

use std::ffi::CStr;

use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dtype, Extent, From, Kind, Operand, Pdl,
    Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor,
};
use crate::engine::{Entry, call, kernels};
use crate::error::Result;
use crate::indices::{Placed, Steering, Words, refuse, sealed};
use crate::stream::Stream;
use crate::tensor::{DType, Device, TensorMut, TensorRef};

/// Offsets are 32 bits wide and signed.
const MOST: i64 = i32::MAX as i64;

/// What one block packs, of which a grid has 2³¹ − 1 at the most.
const BLOCK: i64 = 2048;

/// Which bit of its byte an element is, of the eight that share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BitOrder {
    /// The first element is the highest bit, as in numpy's and FlashInfer's default.
    #[default]
    Big,
    /// The first element is the lowest bit, as FlashInfer's attention reads custom masks.
    Little,
}

const WORDS: &[&CStr] = &[c"big", c"little"];

impl BitOrder {
    fn operand<'a>(self) -> Operand<'a, 'a> {
        Operand::Word(WORDS[usize::from(self == Self::Little)])
    }
}

const fn tensor(
    name: &'static str,
    role: Role,
    (dtype, bytes): (DType, usize),
    shape: &'static [Size],
    contents: Contents,
) -> Argument {
    let (dtype, strides, alignment) = (Dtype::Only(dtype), Strides::Contiguous, Alignment::Bytes(bytes));
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

const X: Argument = tensor("x", Role::In, (DType::U8, 1), &[Size::Of(0)], Contents::Between(0.0, 2.0));
const BITORDER: Argument = Argument { name: "bitorder", kind: Kind::Word(WORDS) };

const PACKBITS: Row = Row {
    kernel: "packbits",
    function: "packbits",
    library: "quantization.so",
    feature: "quantization",
    summary: "Packs eight elements, each 0 or 1, into a byte.",
    source: "`csrc/quantization.cu`, `include/flashinfer/quantization.cuh`",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &[X, BITORDER, tensor("y", Role::Out, (DType::U8, 1), &[Size::Eighth(0)], Contents::Zeros)],
    lead: 0,
    dimensions: &[Dimension {
        name: "elements",
        from: From::Shape(0, 0),
        least: 0,
        most: MOST * BLOCK,
        examples: &[5003, 1, 8, 2048],
    }],
    relations: &[],
    // Offsets are 64 bits wide.
    extent: Extent { most: MOST * BLOCK, split: false, stride: i64::MAX },
    pdl: Pdl::None,
    attributes: Attributes::None,
    reports: Reports::Status,
    uses_current_device: true,
    convention: Convention::Views,
    hazards: &["A byte of `x` other than 0 and 1 makes the byte that it is packed into wrong."],
    tolerance: [0.0, 0.0],
    tests: "`tests/quantization.rs`, `tests/quantization_gpu.rs`, `tests/properties_gpu.rs`",
};

// The dimensions of `segment_packbits`.
const SEGMENTS: usize = 1;
const BYTES: usize = 2;

const A_SEGMENT: Relation = Relation {
    name: "segments",
    only_on_gpu: false,
    holds: |sizes| sizes[SEGMENTS] > 0,
    found: |sizes| sizes[SEGMENTS].to_string(),
    expected: "1 or more, where there are elements: without one release 0.6.3 fails to launch and does not say so",
};

kernels! {
    /// [`packbits`].
    Packbits = PACKBITS;
    /// [`segment_packbits`].
    SegmentPackbits = Row {
        kernel: "segment_packbits",
        function: "segment_packbits",
        summary: "Packs the bits of each segment by themselves: each starts with a byte of its own.",
        arguments: &[
            X,
            tensor(
                "input_indptr",
                Role::In,
                (DType::I32, 4),
                &[Size::OneMore(SEGMENTS)],
                Contents::Offsets(SEGMENTS, 0),
            ),
            tensor(
                "output_indptr",
                Role::In,
                (DType::I32, 4),
                &[Size::OneMore(SEGMENTS)],
                Contents::Offsets(SEGMENTS, BYTES),
            ),
            BITORDER,
            tensor("y", Role::Out, (DType::U8, 1), &[Size::Of(BYTES)], Contents::Zeros),
        ],
        // Examples that fit each other: segments of whole bytes.
        dimensions: &[
            Dimension { name: "elements", from: From::Shape(0, 0), least: 0, most: MOST, examples: &[960] },
            Dimension { name: "segments", from: From::OneLess(1, 0), least: 0, most: MOST, examples: &[3] },
            Dimension { name: "bytes", from: From::Shape(4, 0), least: 0, most: MOST, examples: &[120] },
        ],
        relations: &[A_SEGMENT],
        reports: Reports::Nothing,
        hazards: &[
            "A segment is read and written where `input_indptr` and `output_indptr` say, wherever that is: `PackedSegments` is \
             what makes it be in `x` and in `y`.",
            "A byte of `x` other than 0 and 1 makes the byte that it is packed into wrong.",
        ],
        tests: "`tests/quantization.rs`, `tests/quantization_gpu.rs`",
        ..PACKBITS
    };
}

/// Whether the kernels run on a device: on the host always, on a GPU by its compute capability.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<Packbits>().is_supported(device)
}

/// Packs eight elements of `x`, each 0 or 1, into a byte of `y`. What is missing in the last byte is 0.
///
/// <!-- packbits -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `x` | `[elements]` | U8 | read; contiguous; at any address |
/// | `y` | `[⌈elements / 8⌉]` | U8 | written; contiguous; at any address |
///
/// ```
/// # use flashinfer_rs::kernels::quantization::{BitOrder, packbits};
/// # use flashinfer_rs::{FlashInferRuntime, RuntimeConfig, Stream, TensorMut, TensorRef};
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let (x, mut y) = ([1u8, 0, 1, 1, 0, 0, 0, 0, 1], [0u8; 2]);
/// packbits(
///     &mut TensorMut::from_slice(&mut y, &[2])?,
///     &TensorRef::from_slice(&x, &[9])?,
///     BitOrder::Big,
///     Stream::NULL,
/// )?;
/// assert_eq!(y, [0b1011_0000, 0b1000_0000]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
///
/// # Errors
/// See the [module](self).
pub fn packbits(y: &mut TensorMut<'_>, x: &TensorRef<'_>, bitorder: BitOrder, stream: Stream<'_>) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<Packbits, 3>([x.operand(), bitorder.operand(), y.operand()], stream) }
}

/// Packs the bits of each segment of `x` by themselves, so that each starts with a byte of its own in `y`: the masks of a
/// batch's requests, for example, which attention finds by [`output_indptr`](PackedSegments::output_indptr).
///
/// <!-- segment_packbits -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `x` | `[elements]` | U8 | read; contiguous; at any address |
/// | `input_indptr` | `[segments + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `output_indptr` | `[segments + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `y` | `[bytes]` | U8 | written; contiguous; at any address |
///
/// ```
/// # use flashinfer_rs::kernels::quantization::{BitOrder, PackedSegments, segment_packbits};
/// # use flashinfer_rs::{FlashInferRuntime, Placed, RuntimeConfig, Stream, TensorMut, TensorRef};
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let segments = PackedSegments::from_lengths(&[2, 9])?;
/// let (x, mut y) = ([1u8, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1], [0u8; 3]);
/// segment_packbits(
///     &mut TensorMut::from_slice(&mut y, &[segments.bytes()])?,
///     &TensorRef::from_slice(&x, &[segments.elements()])?,
///     &Placed::on_host(&segments)?,
///     BitOrder::Little,
///     Stream::NULL,
/// )?;
/// assert_eq!(y, [0b11, 0b10, 0b1]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
///
/// # Errors
/// See the [module](self), and `InvalidArgument` for an `x` or a `y` of another length than the segments'.
pub fn segment_packbits(
    y: &mut TensorMut<'_>,
    x: &TensorRef<'_>,
    segments: &Placed<'_, PackedSegments>,
    bitorder: BitOrder,
    stream: Stream<'_>,
) -> Result<()> {
    let facts = segments.facts();
    for (name, shape, len, of) in
        [("x", x.shape(), facts.elements, "the segments' elements"), ("y", y.shape(), facts.bytes, "their bytes")]
    {
        if shape.len() == 1 && shape[0] != len {
            return refuse("segment_packbits", name, format!("of length {}", shape[0]), format!("{len}, {of}"));
        }
    }
    let (input_indptr, output_indptr) = (segments.array(INPUT_INDPTR), segments.array(OUTPUT_INDPTR));
    let (x, indptrs) = (x.operand(), (input_indptr.operand(), output_indptr.operand()));
    // SAFETY: whoever made the segments sees to it that they are inside of tensors of these lengths, which the row's shapes and
    // the check above say that these have: the type by its checks, or the caller of its unsafe constructor.
    unsafe { call::<SegmentPackbits, 5>([x, indptrs.0, indptrs.1, bitorder.operand(), y.operand()], stream) }
}

// The arrays of `PackedSegments`.
const INPUT_INDPTR: usize = 0;
const OUTPUT_INDPTR: usize = 1;

/// Segments that are packed one by one, each into bytes of its own: where each starts among the elements, and where among the
/// bytes.
///
/// [`Placed::on_host`] gives it to calls on the host, `OnDevice` (feature `cudarc`) to calls on a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedSegments {
    input_indptr: Vec<i32>,
    output_indptr: Vec<i32>,
    elements: i64,
    bytes: i64,
}

/// What calls need to know of [`PackedSegments`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedSegmentsFacts {
    /// How many segments there are.
    pub segments: i64,
    /// How many elements `x` has: no segment reaches past them.
    pub elements: i64,
    /// How many bytes `y` has: no segment is packed past them.
    pub bytes: i64,
}

impl PackedSegments {
    /// Of so many elements each, one segment behind the other; a segment may have none.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a negative length, and for more than 2³¹ − 1 elements
    /// of all.
    pub fn from_lengths(lengths: &[i64]) -> Result<Self> {
        let (mut input_indptr, mut output_indptr) = (vec![0], vec![0]);
        let (mut elements, mut bytes) = (0i64, 0i64);
        for (i, &length) in lengths.iter().enumerate() {
            if !(0..=MOST - elements).contains(&length) {
                let expected = format!("0 to {}, so that all segments have at most {MOST} elements", MOST - elements);
                return refuse("PackedSegments", "lengths", format!("{length} at {i}"), expected);
            }
            elements += length;
            // No more bytes than elements, so that these fit too.
            bytes += (length + 7) / 8;
            input_indptr.push(elements as i32);
            output_indptr.push(bytes as i32);
        }
        Ok(Self { input_indptr, output_indptr, elements, bytes })
    }

    /// Where each segment's elements start in `x`, and where the last one's end.
    pub fn input_indptr(&self) -> &[i32] {
        &self.input_indptr
    }

    /// Where each segment's bytes start in `y`, and where the last one's end.
    pub fn output_indptr(&self) -> &[i32] {
        &self.output_indptr
    }

    /// How many elements `x` has.
    pub fn elements(&self) -> i64 {
        self.elements
    }

    /// How many bytes `y` has.
    pub fn bytes(&self) -> i64 {
        self.bytes
    }
}

impl sealed::Sealed for PackedSegments {}

impl Steering for PackedSegments {
    type Facts = PackedSegmentsFacts;

    fn facts(&self) -> PackedSegmentsFacts {
        let segments = self.input_indptr.len() as i64 - 1;
        PackedSegmentsFacts { segments, elements: self.elements, bytes: self.bytes }
    }

    fn arrays(&self) -> Vec<Words<'_>> {
        vec![Words::I32(&self.input_indptr), Words::I32(&self.output_indptr)]
    }

    fn in_place_of(&self, captured: &Self) -> Result<Self> {
        let (own, there) = (self.facts(), captured.facts());
        let fits = own.segments <= there.segments && own.elements <= there.elements && own.bytes <= there.bytes;
        if !fits {
            let described = |facts: PackedSegmentsFacts| {
                format!("{} segments of {} elements in {} bytes", facts.segments, facts.elements, facts.bytes)
            };
            let expected = format!("as captured, {}, or less", described(there));
            return refuse("PackedSegments", "segments", described(own), expected);
        }
        // Segments without elements fill it up. The tensors stay as long as they were.
        let filled = |indptr: &[i32], len| {
            let mut indptr = indptr.to_vec();
            indptr.resize(len, indptr.last().copied().unwrap_or(0));
            indptr
        };
        Ok(Self {
            input_indptr: filled(&self.input_indptr, captured.input_indptr.len()),
            output_indptr: filled(&self.output_indptr, captured.output_indptr.len()),
            elements: captured.elements,
            bytes: captured.bytes,
        })
    }
}

impl<'a> Placed<'a, PackedSegments> {
    /// Offsets that are on a device already, I32, for an `x` and a `y` as long as `facts` say. What they must be besides, calls
    /// check.
    ///
    /// # Safety
    /// Whenever a kernel that was given this runs: `input_indptr` must not decrease, start at 0 or above and end at
    /// `facts.elements` or below; and for each segment `i` of `n` elements, `output_indptr[i]` must be at least 0, and
    /// `output_indptr[i] + ⌈n / 8⌉` at most `facts.bytes` and, but for the last one, at most `output_indptr[i + 1]`.
    pub unsafe fn from_indptrs(
        input_indptr: TensorRef<'a>,
        output_indptr: TensorRef<'a>,
        facts: PackedSegmentsFacts,
    ) -> Self {
        Self::promised(facts, vec![input_indptr, output_indptr])
    }
}
