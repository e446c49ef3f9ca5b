//! Whether a call keeps a row: every condition stands here, once.

use std::ffi::CStr;

use super::{
    Alignment, Argument, Dimension, Dimensions, Dtype, From, Kind, MAX_DIMENSIONS, Row, Size, Strides, Tensor,
};
use crate::owner::Owner;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout, TensorMut, TensorRef};

// What is inlined here and in engine.rs is so for optimized code alone: in a debug build it would be compiled into each kernel's
// function, and take a quarter of the time that a user waits for this crate.

/// Repeats a block with `i` from 0 up to a count, which is at most as many as are named, as straight code: where the count is a
/// constant, and so is what the block looks up by `i`, nothing of the looking up remains.
macro_rules! unrolled {
    ($i:ident in ARGUMENTS < $count:expr, $body:block) => {
        $crate::contract::unrolled!(@ $i, $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23)
    };
    ($i:ident in CONDITIONS < $count:expr, $body:block) => {
        $crate::contract::unrolled!(@ $i, $count, $body, 0 1 2 3 4 5 6 7 8)
    };
    ($i:ident in DIMENSIONS < $count:expr, $body:block) => {
        $crate::contract::unrolled!(@ $i, $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($i:ident in RANK < $count:expr, $body:block) => {
        $crate::contract::unrolled!(@ $i, $count, $body, 0 1 2 3 4 5)
    };
    (@ $i:ident, $count:expr, $body:block, $($at:literal)+) => {
        // Not optimized, each copy of the block has its own place on the stack, of which there would be megabytes.
        #[cfg(debug_assertions)]
        for $i in 0..$count {
            $body
        }
        #[cfg(not(debug_assertions))]
        {
            $(
                if $at < $count {
                    let $i: usize = $at;
                    $body
                }
            )+
        }
    };
}
pub(crate) use unrolled;

/// What a call gives for an argument.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a, 'o> {
    Tensor(&'a Layout, &'a Owner<'o>),
    /// Nothing, for an optional tensor and for one that a form [does without](Kind::Missing).
    Absent,
    Number(f64),
    Whole(i64),
    Word(&'static CStr),
    Bool(bool),
}

impl<'o> TensorRef<'o> {
    #[cfg_attr(not(debug_assertions), inline(always))]
    pub(crate) fn operand<'a>(&'a self) -> Operand<'a, 'o> {
        Operand::Tensor(self.layout(), self.owner())
    }
}

impl<'o> TensorMut<'o> {
    #[cfg_attr(not(debug_assertions), inline(always))]
    pub(crate) fn operand<'a>(&'a self) -> Operand<'a, 'o> {
        Operand::Tensor(self.layout(), self.owner())
    }
}

impl<'a> Operand<'a, '_> {
    #[cfg_attr(not(debug_assertions), inline(always))]
    pub(crate) fn layout(&self) -> Option<&'a Layout> {
        match self {
            Self::Tensor(layout, _) => Some(layout),
            _ => None,
        }
    }

    #[cfg_attr(not(debug_assertions), inline(always))]
    pub(crate) fn whole(&self) -> i64 {
        match self {
            Self::Whole(value) => *value,
            Self::Bool(value) => *value as i64,
            _ => 0,
        }
    }
}

/// A call that keeps its row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Checked {
    pub(crate) device: Device,
    pub(crate) dimensions: Dimensions,
    /// Whether there is nothing to do.
    pub(crate) empty: bool,
    /// Whether one launch does it.
    pub(crate) whole: bool,
    /// How many of the first dimension one launch may have, beside what the row's extent says.
    pub(crate) at_once: i64,
}

impl Checked {
    /// With at most so many of the first dimension in one launch.
    pub(crate) fn at_once(self, most: i64) -> Self {
        Self { whole: self.whole && self.dimensions[0] <= most, at_once: most, ..self }
    }
}

/// The condition that a call breaks: of an argument by its place, of a dimension or a relation by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Rank(usize),
    Dimension(usize),
    Relation(usize),
    Tensor(usize, Condition),
    Number(usize),
}

/// A condition on a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    Type,
    Device,
    Stream,
    Captured,
    Shape,
    Strides,
    Overlap,
    Alignment,
    Extent,
}

const CONDITIONS: [Condition; 9] = [
    Condition::Type,
    Condition::Device,
    Condition::Stream,
    Condition::Captured,
    Condition::Shape,
    Condition::Strides,
    Condition::Overlap,
    Condition::Alignment,
    Condition::Extent,
];

/// What a tensor is held against.
struct Call<'a, 'c> {
    row: &'static Row,
    operands: &'a [Operand<'a, 'a>],
    lead: &'a Layout,
    dimensions: Dimensions,
    empty: bool,
    stream: Stream<'c>,
}

/// Checks a call. The operands are as many as the row's arguments, each of its argument's kind: whoever wrote the call saw to
/// it, and a debug assertion does.
///
/// Inlined into each kernel's own function, where the row is a constant and the loops unroll into straight code.
#[cfg_attr(not(debug_assertions), inline(always))]
pub(crate) fn check(row: &'static Row, operands: &[Operand<'_, '_>], stream: Stream<'_>) -> Result<Checked, Fault> {
    debug_assert!(fits_kinds(row, operands));
    unrolled!(i in ARGUMENTS < operands.len(), {
        if let (Some(layout), Kind::Tensor(tensor)) = (operands[i].layout(), &row.arguments[i].kind)
            && layout.ndim() != tensor.shape.len()
        {
            return Err(Fault::Rank(i));
        }
    });
    let lead = lead(row, operands);
    let dimensions = dimensions(row, operands);
    let on_gpu = lead.is_on_gpu();
    let mut empty = false;
    unrolled!(i in DIMENSIONS < row.dimensions.len(), {
        let (size, dimension) = (dimensions[i], &row.dimensions[i]);
        if (size < dimension.least) | (size > dimension.most) {
            return Err(Fault::Dimension(i));
        }
        // Of the lead argument: without scratch memory there may still be something to do.
        empty |= (size == 0) & matches!(dimension.from, From::Shape(argument, _) if argument == row.lead);
    });
    unrolled!(i in DIMENSIONS < row.relations.len(), {
        let relation = &row.relations[i];
        if !empty & (on_gpu | !relation.only_on_gpu) && !(relation.holds)(&dimensions) {
            return Err(Fault::Relation(i));
        }
    });
    let call = Call { row, operands, lead, dimensions, empty, stream };
    let mut whole = true;
    unrolled!(i in ARGUMENTS < operands.len(), {
        match (&operands[i], &row.arguments[i].kind) {
            (Operand::Tensor(layout, _), Kind::Tensor(tensor)) => {
                let (kept, reach) = call.keeps_all(tensor, layout);
                if !kept {
                    return Err(call.broken(i, tensor, layout));
                }
                whole &= reach <= row.extent.most;
            }
            (Operand::Number(value), kind) if !number_fits(kind, *value) => return Err(Fault::Number(i)),
            (Operand::Whole(value), Kind::Whole(least, most)) if (value < least) | (value > most) => {
                return Err(Fault::Number(i));
            }
            (Operand::Word(word), Kind::Word(words)) if !words.contains(word) => return Err(Fault::Number(i)),
            _ => {}
        }
    });
    Ok(Checked { device: lead.device(), dimensions, empty, whole, at_once: i64::MAX })
}

#[cfg_attr(not(debug_assertions), inline(always))]
fn lead<'a>(row: &'static Row, operands: &[Operand<'a, '_>]) -> &'a Layout {
    match operands[row.lead].layout() {
        Some(layout) => layout,
        None => unreachable!("a call gives its lead argument"),
    }
}

#[cfg_attr(not(debug_assertions), inline(always))]
fn dimensions(row: &'static Row, operands: &[Operand<'_, '_>]) -> Dimensions {
    let size = |argument: usize, dimension| operands[argument].layout().map_or(0, |layout| layout.size(dimension));
    let mut dimensions = [1; MAX_DIMENSIONS];
    unrolled!(i in DIMENSIONS < row.dimensions.len(), {
        dimensions[i] = match row.dimensions[i].from {
            From::Shape(argument, dimension) => size(argument, dimension),
            From::OneLess(argument, dimension) => size(argument, dimension) - 1,
            From::Larger(a, b) => dimensions[a].max(dimensions[b]),
            From::Sum(a, b) => dimensions[a].saturating_add(dimensions[b]),
            From::Number(argument) => operands[argument].whole(),
            From::ElementSize(argument) => {
                operands[argument].layout().map_or(1, |layout| layout.element_size() as i64)
            }
            From::Gpu(limit) => limit.of(lead(row, operands).device()),
        };
    });
    dimensions
}

/// As the f32 that a kernel makes of it, which flushes what is subnormal to 0.
#[cfg_attr(not(debug_assertions), inline(always))]
fn number_fits(kind: &Kind, value: f64) -> bool {
    let single = value as f32;
    let positive = single.is_normal() & single.is_sign_positive();
    match kind {
        Kind::Positive => positive,
        Kind::NotNegative => positive | (value == 0.0),
        Kind::Between(least, most) => (single >= *least as f32) & (single <= *most as f32),
        Kind::Tensor(_) | Kind::Whole(..) | Kind::Word(_) | Kind::Switch | Kind::EnablePdl => false,
        Kind::Missing(_) | Kind::Nothing => false,
    }
}

/// How many elements lie from the first to behind the last, and whether that fits 64 bits.
#[cfg_attr(not(debug_assertions), inline(always))]
fn reach(rank: usize, layout: &Layout) -> (i64, bool) {
    let (mut reach, mut fits) = (1i64, true);
    unrolled!(i in RANK < rank, {
        let (span, too_far) = (layout.size(i) - 1).overflowing_mul(layout.stride(i));
        let (sum, too_long) = reach.overflowing_add(span);
        reach = sum;
        fits &= !too_far & !too_long;
    });
    // In bytes too, of the largest elements.
    (reach, fits & (reach <= i64::MAX / 8))
}

/// Whether no two elements lie in the same place: every stride goes past all that the smaller ones reach. Of a tensor whose
/// reach fits 64 bits.
#[cfg_attr(not(debug_assertions), inline(always))]
fn is_injective(rank: usize, layout: &Layout) -> bool {
    let mut apart = true;
    unrolled!(i in RANK < rank, {
        let (size, stride) = (layout.size(i), layout.stride(i));
        let mut inner = 1i64;
        unrolled!(j in RANK < rank, {
            if i != j {
                let within = layout.stride(j) <= stride;
                let span = (layout.size(j) - 1).wrapping_mul(layout.stride(j));
                inner = inner.wrapping_add(if within { span } else { 0 });
            }
        });
        apart &= (size <= 1) | (stride >= inner);
    });
    apart
}

/// Whether a tensor is for this stream, or for any.
#[cfg_attr(not(debug_assertions), inline(always))]
pub(crate) fn stream_fits(layout: &Layout, stream: Stream<'_>) -> bool {
    layout.stream().unwrap_or(stream.as_raw()) == stream.as_raw()
}

/// Whether a tensor's address is aligned as its argument asks.
#[cfg_attr(not(debug_assertions), inline(always))]
pub(crate) fn aligned(tensor: &Tensor, dimensions: &Dimensions, layout: &Layout) -> bool {
    let bytes = match tensor.alignment {
        Alignment::Bytes(bytes) => bytes,
        vector => vector.elements(dimensions, layout.element_size()) as usize * layout.element_size(),
    };
    (layout.data().addr() & (bytes - 1) == 0) | !layout.is_on_gpu()
}

impl Call<'_, '_> {
    /// Whether a tensor keeps every condition, and how far it reaches. All at once, without a branch for each: after a launch
    /// nothing of this is predicted.
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn keeps_all(&self, tensor: &'static Tensor, layout: &Layout) -> (bool, i64) {
        let mut kept = true;
        unrolled!(i in CONDITIONS < CONDITIONS.len(), {
            kept &= self.keeps(CONDITIONS[i], tensor, layout);
        });
        (kept, reach(tensor.shape.len(), layout).0)
    }

    /// Whether a tensor keeps a condition.
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn keeps(&self, condition: Condition, tensor: &'static Tensor, layout: &Layout) -> bool {
        let rank = tensor.shape.len();
        let nowhere = self.empty | self.is_nowhere(tensor, layout);
        match condition {
            Condition::Type => self.type_fits(tensor, layout),
            Condition::Device => layout.has_device_of(self.lead),
            Condition::Stream => stream_fits(layout, self.stream),
            // The host's work would be no part of the graph.
            Condition::Captured => layout.is_on_gpu() | self.stream.capture().is_none(),
            Condition::Shape => {
                let mut same = true;
                unrolled!(i in RANK < rank, {
                    same &= layout.size(i) == tensor.shape[i].of(&self.dimensions);
                });
                same
            }
            Condition::Strides => match tensor.strides {
                Strides::Contiguous => layout.is_contiguous(),
                Strides::Rows | Strides::As(_) => {
                    let vector = tensor.alignment.elements(&self.dimensions, layout.element_size());
                    let mut fit = layout.stride(rank - 1) == 1;
                    unrolled!(i in RANK < rank - 1, {
                        let stride = layout.stride(i);
                        fit &= (layout.size(i) == 1) | ((stride >= 0) & (stride & (vector - 1) == 0));
                    });
                    if let Strides::As(other) = tensor.strides
                        && let Some(other) = self.operands[other].layout()
                    {
                        unrolled!(i in RANK < rank, {
                            fit &= layout.stride(i) == other.stride(i);
                        });
                    }
                    fit | nowhere
                }
            },
            Condition::Overlap => match tensor.strides {
                Strides::Rows | Strides::As(_) if tensor.role.writes() => is_injective(rank, layout) | nowhere,
                _ => true,
            },
            Condition::Alignment => aligned(tensor, &self.dimensions, layout) | nowhere,
            Condition::Extent => {
                let most = self.row.extent.most;
                let (reach, mut fits) = reach(rank, layout);
                unrolled!(i in RANK < rank, {
                    fits &= (layout.stride(i) <= self.row.extent.stride) | (layout.size(i) == 1);
                });
                (fits & (reach <= most)) || nowhere || (fits && self.row.extent.split && splits(tensor, layout, most))
            }
        }
    }

    /// Whether a tensor has no elements in a call that has something to do, so that where they lie means nothing.
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn is_nowhere(&self, tensor: &'static Tensor, layout: &Layout) -> bool {
        let mut nowhere = false;
        unrolled!(i in RANK < tensor.shape.len(), {
            if let Size::Of(dimension) = tensor.shape[i] {
                let Dimension { least, from, .. } = &self.row.dimensions[dimension];
                // A dimension of the lead's is 0 where there is nothing to do.
                if *least == 0 && !matches!(from, From::Shape(argument, _) if *argument == self.row.lead) {
                    nowhere |= layout.size(i) == 0;
                }
            }
        });
        nowhere
    }

    #[cfg_attr(not(debug_assertions), inline(always))]
    fn type_fits(&self, tensor: &'static Tensor, layout: &Layout) -> bool {
        let host = !self.lead.is_on_gpu();
        match tensor.dtype {
            Dtype::Half => layout.is_of(DType::BF16) | layout.is_of(DType::F16) | (host & layout.is_of(DType::F32)),
            Dtype::Bf16 => layout.is_of(DType::BF16) | (host & (layout.is_of(DType::F16) | layout.is_of(DType::F32))),
            Dtype::Eight => layout.is_of(DType::F8E4M3) | layout.is_of(DType::F8E5M2),
            Dtype::Only(dtype) => layout.is_of(dtype),
            Dtype::OneOf(types) => types.iter().any(|&dtype| layout.is_of(dtype)),
            Dtype::As(other) => self.operands[other].layout().is_none_or(|other| layout.has_dtype_of(other)),
        }
    }

    #[cold]
    fn broken(&self, i: usize, tensor: &'static Tensor, layout: &Layout) -> Fault {
        let broken = CONDITIONS.into_iter().find(|&condition| !self.keeps(condition, tensor, layout));
        Fault::Tensor(i, broken.unwrap_or(Condition::Extent))
    }
}

/// Whether a launch for each index of the first dimension would do, of a tensor whose reach fits 64 bits.
#[cold]
fn splits(tensor: &Tensor, layout: &Layout, most: i64) -> bool {
    let divided = matches!(tensor.shape[0], Size::Of(0));
    divided && layout.size(0) > 0 && layout.narrow(0, 0, 1).reach().is_some_and(|reach| reach <= most)
}

/// That each operand is of its argument's kind: a slip in this crate, not in a call.
fn fits_kinds(row: &Row, operands: &[Operand<'_, '_>]) -> bool {
    let fits = |(argument, operand): (&Argument, &Operand<'_, '_>)| match (&argument.kind, operand) {
        (Kind::Tensor(_), Operand::Tensor(..)) => true,
        (Kind::Tensor(tensor), Operand::Absent) => tensor.optional,
        (Kind::Positive | Kind::NotNegative | Kind::Between(..), Operand::Number(_)) => true,
        (Kind::Whole(..), Operand::Whole(_)) | (Kind::Word(_), Operand::Word(_)) => true,
        (Kind::Missing(_) | Kind::Nothing, Operand::Absent) => true,
        (Kind::EnablePdl | Kind::Switch, Operand::Bool(_)) => true,
        _ => false,
    };
    row.arguments.len() == operands.len() && row.arguments.iter().zip(operands).all(fits)
}
