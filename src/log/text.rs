//! Records, as text.

use std::fmt::Write;

use super::dump::Dumper;
use super::elements::Statistics;
use super::settings::Level;
use super::{Call, Way};
use crate::contract::{Kind, Operand, Role};
use crate::data::time::timestamp;
use crate::error::FlashInferError;
use crate::object::{Arg, Value};
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

/// The first line of a record, in FlashInfer's words.
fn header(event: &str, name: &str, number: u64) -> String {
    let now = timestamp();
    format!("[{} {}] FlashInfer API {event}: {name} #{number}", &now[..10], &now[11..19])
}

/// The first record.
pub(super) fn beginning(level: Level, dumper: Option<&Dumper>) -> String {
    let now = timestamp();
    let level = match level {
        Level::Nothing => "nothing",
        Level::Names => "names",
        Level::Arguments => "arguments",
        Level::Statistics => "arguments and what tensors hold",
    };
    let (date, time, version) = (&now[..10], &now[11..19], env!("CARGO_PKG_VERSION"));
    let process = std::process::id();
    let mut text =
        format!("[{date} {time}] FlashInfer API Logging: flashinfer-rs {version}, process {process}: {level}");
    if let Some(dumper) = dumper {
        _ = write!(text, "; dumps below {}", dumper.folder().display());
    }
    text + "\n"
}

/// A call of a kernel, before it is made.
pub(super) fn called(call: &Call<'_>, captured: bool, arguments: bool) -> String {
    let event = if call.way == Way::Preparing { "Prepare" } else { "Call" };
    let mut text = header(event, call.row.kernel, call.number);
    if call.way == Way::Prepared {
        text += " (prepared)";
    }
    if captured {
        text += " (captured into a graph)";
    }
    text.push('\n');
    if !arguments {
        return text;
    }
    for (argument, operand) in call.row.arguments.iter().zip(call.operands) {
        _ = write!(text, "  {}= ", argument.name);
        _ = match (operand, &argument.kind) {
            (Operand::Tensor(layout, _), Kind::Tensor(kind)) => {
                let role = match kind.role {
                    Role::In => "read",
                    Role::Out | Role::Unordered => "written",
                    Role::InPlace => "read and written",
                    Role::Workspace => "scratch memory",
                };
                writeln!(text, "{}, {role}", tensor(layout))
            }
            (Operand::Tensor(layout, _), _) => writeln!(text, "{}", tensor(layout)),
            (Operand::Absent, _) => writeln!(text, "None"),
            (Operand::Number(value), _) => writeln!(text, "{value:?}"),
            (Operand::Whole(value), _) => writeln!(text, "{value}"),
            (Operand::Word(word), _) => writeln!(text, "{word:?}"),
            (Operand::Bool(value), _) => writeln!(text, "{value}"),
        };
    }
    if call.way == Way::Directly && call.device() != Device::Cpu {
        _ = writeln!(text, "  stream= {:p}", call.stream.as_raw());
    }
    text
}

/// What those of a call's tensors hold whose roles are chosen.
pub(super) fn holds(
    call: &Call<'_>,
    event: &str,
    chosen: fn(Role) -> bool,
    statistics: &dyn Fn(&Layout) -> String,
) -> String {
    let mut text = header(event, call.row.kernel, call.number) + "\n";
    for (name, _, layout) in call.tensors().filter(|(_, role, _)| chosen(*role)) {
        _ = writeln!(text, "  {name}= {}", statistics(layout));
    }
    text
}

/// Why it is not said what they hold.
pub(super) fn holds_unknown(call: &Call<'_>, why: &str) -> String {
    format!("{}\n  no statistics: {why}\n", header("Inputs", call.row.kernel, call.number))
}

/// A call that failed, or was refused.
pub(super) fn failed(name: &str, number: u64, error: &FlashInferError) -> String {
    format!("{}: {error}\n", header("Error", name, number))
}

/// A call of a function without a row.
pub(super) fn function_called(name: &str, number: u64, args: &[Arg<'_>], level: Level) -> String {
    let mut text = header("Call", name, number) + "\n";
    if level < Level::Arguments {
        return text;
    }
    for (i, arg) in args.iter().enumerate() {
        _ = writeln!(text, "  arg[{i}]= {}", argument(arg));
    }
    text
}

/// Of one that returned.
pub(super) fn function_returned(name: &str, number: u64) -> String {
    header("Return", name, number) + "\n"
}

fn argument(arg: &Arg<'_>) -> String {
    // SAFETY: only what describes the tensor is read, none of its memory.
    if let Ok(found) = unsafe { arg.as_tensor_unordered() } {
        return tensor(found.layout());
    }
    match arg.value() {
        Ok(Value::Other { .. }) | Err(_) => format!("{arg:?}"),
        Ok(value) => format!("{value:?}"),
    }
}

fn tensor(layout: &Layout) -> String {
    let tuple = |sizes: &[i64]| match sizes {
        [one] => format!("({one},)"),
        sizes => format!("({})", sizes.iter().map(i64::to_string).collect::<Vec<_>>().join(", ")),
    };
    let (shape, stride) = (tuple(layout.shape()), tuple(layout.strides()));
    let (dtype, device, data) = (layout.dtype(), layout.device(), layout.data());
    format!("Tensor(shape={shape}, stride={stride}, dtype={dtype}, device={device}, ptr={data:p})")
}

/// What a tensor holds; why that cannot be said, where it cannot.
///
/// # Safety
/// As for [`each_block`](super::elements::each_block).
pub(super) unsafe fn statistics(layout: &Layout, stream: Stream<'_>) -> String {
    if layout.numel() == 0 {
        return "empty".to_owned();
    }
    // SAFETY: the caller's promise.
    let found = match unsafe { Statistics::of(layout, stream) } {
        Ok(found) => found,
        Err(error) => return format!("no statistics: {error}"),
    };
    let (least, most, mean) = (found.least, found.most, found.mean());
    match layout.dtype() {
        DType::U8 | DType::I32 | DType::I64 => format!("min={least}, max={most}, mean={mean:.6}"),
        _ => {
            let (nan, infinite) = (found.nan, found.infinite);
            format!("min={least:.6}, max={most:.6}, mean={mean:.6}, nan_count={nan}, inf_count={infinite}")
        }
    }
}
