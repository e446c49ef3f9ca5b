//! What is wrong with a call, in words.

use std::fmt::Display;

use super::check::Condition;
use super::{Alignment, Checked, Dimensions, Fault, From, Kind, Operand, Row, Size, Strides, Tensor};
use crate::error::FlashInferError;
use crate::stream::Stream;
use crate::tensor::{Device, Layout};

/// The error for a fault that [`check`](super::check()) found.
#[cold]
pub(crate) fn explain(
    row: &'static Row,
    operands: &[Operand<'_, '_>],
    stream: Stream<'_>,
    fault: Fault,
) -> FlashInferError {
    let invalid = |argument: &'static str, found: String, expected: String| FlashInferError::InvalidArgument {
        function: row.function,
        argument,
        found,
        expected,
    };
    let dimensions = || {
        let layout = |argument: usize| operands[argument].layout();
        row.dimensions_from(|i| match row.dimensions[i].from {
            From::Shape(argument, at) => layout(argument).map_or(0, |layout| layout.size(at)),
            From::OneLess(argument, at) => layout(argument).map_or(0, |layout| layout.size(at) - 1),
            From::Number(argument) => operands[argument].whole(),
            From::ElementSize(argument) => layout(argument).map_or(1, |layout| layout.element_size() as i64),
            From::Gpu(limit) => limit.of(layout(row.lead).map_or(Device::Cpu, Layout::device)),
            From::Larger(..) | From::Sum(..) => 0,
        })
    };
    match fault {
        Fault::Rank(i) => {
            let rank = tensor(row, i).shape.len();
            let expected = format!("{rank} {}", if rank == 1 { "dimension" } else { "dimensions" });
            invalid(row.arguments[i].name, shape_of(operands, i), format!("{expected}, {}", names(row, tensor(row, i))))
        }
        Fault::Dimension(i) => {
            let dimension = &row.dimensions[i];
            let (least, most) = (dimension.least, dimension.most);
            let expected = if least == most {
                format!("{least}, the only one that is computed right")
            } else {
                format!("{least} to {most}")
            };
            invalid(dimension.name, dimensions()[i].to_string(), expected)
        }
        Fault::Relation(i) => {
            let relation = &row.relations[i];
            invalid(relation.name, (relation.found)(&dimensions()), relation.expected.to_owned())
        }
        Fault::Number(i) => {
            let found = match operands[i] {
                Operand::Number(value) => value.to_string(),
                Operand::Whole(value) => value.to_string(),
                Operand::Word(word) => format!("{word:?}"),
                _ => String::new(),
            };
            invalid(row.arguments[i].name, found, number(&row.arguments[i].kind))
        }
        Fault::Tensor(i, condition) => {
            let Some(layout) = operands[i].layout() else { unreachable!("the fault is a tensor's") };
            let (found, expected) = broken(row, operands, stream, i, condition, layout, &dimensions());
            invalid(row.arguments[i].name, found, expected)
        }
    }
}

/// What is expected of an argument that is no tensor.
pub(super) fn number(kind: &Kind) -> String {
    let positive = "a positive number that an f32 holds in full (1.2e-38 to 3.4e38)";
    match kind {
        Kind::NotNegative => format!("{positive}, or 0.0 for the kernel's default"),
        Kind::Between(least, most) => format!("a number from {least:?} to {most:?}"),
        Kind::Whole(i64::MIN, i64::MAX) => "any 64 bits".to_owned(),
        Kind::Whole(least, most) if least == most => format!("{least}"),
        Kind::Whole(least, i64::MAX) => format!("a whole number, {least} or more"),
        Kind::Whole(least, most) => format!("a whole number from {least} to {most}"),
        Kind::Switch | Kind::EnablePdl => "on or off".to_owned(),
        Kind::Word(words) => words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(" or "),
        Kind::Missing(_) | Kind::Nothing => "nothing".to_owned(),
        Kind::Positive | Kind::Tensor(_) => positive.to_owned(),
    }
}

fn tensor(row: &'static Row, i: usize) -> &'static Tensor {
    match &row.arguments[i].kind {
        Kind::Tensor(tensor) => tensor,
        _ => unreachable!("the fault is a tensor's"),
    }
}

fn shape_of(operands: &[Operand<'_, '_>], i: usize) -> String {
    operands[i].layout().map_or_else(String::new, |layout| format!("of shape {:?}", layout.shape()))
}

/// A shape's dimensions by their names.
pub(super) fn names(row: &Row, tensor: &Tensor) -> String {
    let name = |size: &Size| match size {
        Size::Of(i) => row.dimensions[*i].name.to_owned(),
        Size::OneMore(i) => format!("{} + 1", row.dimensions[*i].name),
        Size::Twice(i) => format!("2 {}", row.dimensions[*i].name),
        Size::Eighth(i) => format!("⌈{} / 8⌉", row.dimensions[*i].name),
    };
    format!("[{}]", tensor.shape.iter().map(name).collect::<Vec<_>>().join(", "))
}

pub(super) fn joined(types: &[impl Display]) -> String {
    types.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

fn broken(
    row: &'static Row,
    operands: &[Operand<'_, '_>],
    stream: Stream<'_>,
    i: usize,
    condition: Condition,
    layout: &Layout,
    dimensions: &Dimensions,
) -> (String, String) {
    let spec = tensor(row, i);
    let lead = operands[row.lead].layout().unwrap_or(layout);
    let laid_out = || format!("strided {:?} with shape {:?}", layout.strides(), layout.shape());
    let vector = spec.alignment.elements(dimensions, layout.dtype().size());
    match condition {
        Condition::Type => {
            let on_host = lead.device() == Device::Cpu;
            let expected = match spec.dtype {
                super::Dtype::As(other) => {
                    let name = row.arguments[other].name;
                    let dtype = operands[other].layout().map_or_else(String::new, |other| other.dtype().to_string());
                    format!("{dtype}, as {name}")
                }
                // Where the host takes more, that is said, since a call may have been meant for it.
                dtype if !on_host && dtype.allowed(true).len() > dtype.allowed(false).len() => {
                    format!("{} (on the host {})", joined(dtype.allowed(false)), joined(dtype.allowed(true)))
                }
                dtype => joined(dtype.allowed(on_host)),
            };
            (layout.dtype().to_string(), expected)
        }
        Condition::Device => (format!("on {}", layout.device()), format!("memory of {}", lead.device())),
        Condition::Stream => {
            let own = layout.stream().unwrap_or(std::ptr::null_mut());
            (format!("for stream {own:p}"), format!("a tensor for {:p}, the call's stream", stream.as_raw()))
        }
        Condition::Captured => ("on cpu".to_owned(), "memory of the GPU whose graph is captured".to_owned()),
        Condition::Shape => (
            format!("of shape {:?}", layout.shape()),
            format!("shape {:?}, {}", row.shape(spec, dimensions), names(row, spec)),
        ),
        Condition::Strides => match spec.strides {
            Strides::Contiguous => (laid_out(), "contiguous row-major memory".to_owned()),
            Strides::As(other) if operands[other].layout().is_some_and(|other| other.strides() != layout.strides()) => {
                let strides = operands[other].layout().map_or(&[][..], Layout::strides);
                (laid_out(), format!("strides {strides:?}, as {}", row.arguments[other].name))
            }
            Strides::Rows | Strides::As(_) => {
                (laid_out(), format!("a last stride of 1, and others that are multiples of {vector} and not negative"))
            }
        },
        Condition::Overlap => {
            (laid_out(), "strides that give every element a place of its own, since it is written".to_owned())
        }
        Condition::Alignment => {
            let bytes = match spec.alignment {
                Alignment::Bytes(bytes) => bytes,
                Alignment::Vector { .. } | Alignment::Access { .. } => vector as usize * layout.dtype().size(),
            };
            (format!("at {:p}", layout.data()), format!("memory aligned to {bytes} bytes"))
        }
        Condition::Extent => {
            let (most, stride) = (row.extent.most, row.extent.stride);
            if (0..layout.ndim()).any(|i| layout.size(i) > 1 && layout.stride(i) > stride) {
                return (laid_out(), format!("strides of at most {stride}"));
            }
            let reach = layout.reach().map_or_else(|| "more than 2^63".to_owned(), |reach| reach.to_string());
            let rows = if row.extent.split { "for each index of the first dimension " } else { "" };
            (
                format!("{} and so {reach} elements long", laid_out()),
                format!("{rows}at most {most} elements from the first to behind the last"),
            )
        }
    }
}

impl Checked {
    /// The variant of the library's kernel that a call chooses.
    pub(crate) fn variant<'a>(&'a self, row: &Row, operands: &[Operand<'_, '_>]) -> super::Variant<'a> {
        let present =
            |bits, (i, operand): (usize, &Operand<'_, '_>)| bits | u32::from(!matches!(operand, Operand::Absent)) << i;
        let dtype = operands[row.lead].layout().map_or(crate::tensor::DType::BF16, Layout::dtype);
        super::Variant { dtype, dimensions: &self.dimensions, present: operands.iter().enumerate().fold(0, present) }
    }
}
