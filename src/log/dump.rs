//! Writing dumps: what a call is given, before it is made, and what it wrote.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::Call;
use super::elements::each_block;
use super::settings::Dumps;
use super::sink::Once;
use crate::contract::{Kind, Operand, Role};
use crate::data::dtype::DataType;
use crate::data::error::io;
use crate::data::json::{Json, field, text};
use crate::data::safetensors::{Part, write_parts};
use crate::data::time::timestamp;
use crate::error::Result;
use crate::stream::Stream;
use crate::tensor::Layout;

pub(super) const INPUTS: &str = "inputs.safetensors";
pub(super) const OUTPUTS: &str = "outputs.safetensors";

/// What a file says of itself beside its tensors: this crate's version, and the call as JSON.
pub(super) const VERSION: &str = "flashinfer_rs";
pub(super) const CALL: &str = "call";

pub(super) struct Dumper {
    asked: Dumps,
    written: Mutex<Written>,
    full: Once,
    failed: Once,
}

#[derive(Default)]
struct Written {
    count: u64,
    bytes: u64,
    /// Calls of each kernel that were dumped.
    calls: HashMap<&'static str, u64>,
}

/// A dump whose inputs are written.
pub(super) struct Dumping {
    folder: PathBuf,
}

/// What is dumped before a call.
pub(super) fn is_input(role: Role) -> bool {
    matches!(role, Role::In | Role::InPlace)
}

/// What is dumped after a call.
pub(super) fn is_output(role: Role) -> bool {
    matches!(role, Role::Out | Role::Unordered | Role::InPlace)
}

impl Dumper {
    pub(super) fn new(asked: Dumps) -> Self {
        Self { asked, written: Mutex::default(), full: Once::new(), failed: Once::new() }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.asked.folder
    }

    /// Dumps what a call reads, if it is one that is asked for and there is room for it.
    ///
    /// # Safety
    /// As for [`each_block`].
    pub(super) unsafe fn inputs(&self, call: &Call<'_>) -> Option<Dumping> {
        if !self.asked.wants(call.row.kernel) {
            return None;
        }
        let (bytes, sequence) = (size(call), self.reserve(call)?);
        let now = timestamp();
        // As FlashInfer names its folders, of which each is one call too.
        let digits: String = now.chars().filter(char::is_ascii_digit).collect();
        let (date, time, millis) = (&digits[..8], &digits[8..14], &digits[14..17]);
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let name: String = call.row.kernel.chars().map(plain).collect();
        let process = std::process::id();
        let folder = self.asked.folder.join(format!("{date}_{time}_{millis}_pid{process}_{name}_call{sequence:04}"));
        // SAFETY: the caller's promise.
        match unsafe { write(call, &folder, INPUTS, is_input) } {
            Ok(()) => Some(Dumping { folder }),
            Err(error) => {
                self.give_back(bytes);
                _ = fs::remove_dir(&folder);
                self.say(&error);
                None
            }
        }
    }

    /// Dumps what a call wrote.
    ///
    /// # Safety
    /// As for [`each_block`].
    pub(super) unsafe fn outputs(&self, call: &Call<'_>, dumping: Dumping) {
        // SAFETY: the caller's promise.
        if let Err(error) = unsafe { write(call, &dumping.folder, OUTPUTS, is_output) } {
            self.say(&error);
        }
    }

    /// Which dump of its kernel this one is, if there is room for it.
    fn reserve(&self, call: &Call<'_>) -> Option<u64> {
        let bytes = size(call);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let Dumps { max_count, max_bytes, .. } = self.asked;
        let kernel = call.row.kernel;
        if written.count >= max_count {
            self.full.say(|| {
                format!("no more calls are dumped after {max_count}, {kernel} not any more; FLASHINFER_RS_DUMP_MAX_COUNT allows more")
            });
            return None;
        }
        if written.bytes.saturating_add(bytes) > max_bytes {
            self.full.say(|| {
                format!(
                    "a call of {kernel} is not dumped: its {bytes} bytes beside {} are more than {max_bytes}; \
                     FLASHINFER_RS_DUMP_MAX_SIZE_GB allows more",
                    written.bytes
                )
            });
            return None;
        }
        written.count += 1;
        written.bytes += bytes;
        let calls = written.calls.entry(kernel).or_default();
        *calls += 1;
        Some(*calls)
    }

    fn give_back(&self, bytes: u64) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.count -= 1;
        written.bytes -= bytes;
    }

    fn say(&self, error: &crate::FlashInferError) {
        self.failed.say(|| {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("a call cannot be dumped: {error}{cause}; calls go on without it")
        });
    }
}

/// The bytes of all that is dumped of a call.
fn size(call: &Call<'_>) -> u64 {
    let bytes = |(_, role, layout): (_, Role, &Layout)| {
        let times = u64::from(is_input(role)) + u64::from(is_output(role));
        times * layout.numel().unsigned_abs() * layout.element_size() as u64
    };
    call.tensors().map(bytes).sum()
}

/// Writes those of a call's tensors whose roles are chosen.
///
/// # Safety
/// As for [`each_block`].
unsafe fn write(call: &Call<'_>, folder: &Path, file: &str, chosen: fn(Role) -> bool) -> Result<()> {
    fs::create_dir_all(folder).map_err(io("making the folder", folder))?;
    let part = |(name, _, layout): (&'static str, Role, &'_ Layout)| {
        let (layout, stream): (Layout, Stream<'_>) = (*layout, call.stream);
        let shape = layout.shape().iter().map(|size| size.unsigned_abs()).collect();
        let write = move |out: &mut dyn Write| {
            // SAFETY: the caller's promise.
            unsafe { each_block(&layout, stream, &mut |bytes| out.write_all(bytes)) }
        };
        Part { name, dtype: layout.dtype().into(), shape, write: Box::new(write) }
    };
    let parts = call.tensors().filter(|(_, role, _)| chosen(*role)).map(part).collect();
    let metadata = [(VERSION, env!("CARGO_PKG_VERSION").to_owned()), (CALL, describe(call).compact())];
    write_parts(&folder.join(file), &metadata, parts)
}

/// What is needed to make the call again, beside what tensors hold.
fn describe(call: &Call<'_>) -> Json {
    let sizes = |sizes: &[i64]| Json::List(sizes.iter().map(|&size| Json::Int(size.into())).collect());
    let tensor = |layout: &Layout| {
        Json::Object(vec![
            field("dtype", text(DataType::from(layout.dtype()).name())),
            field("shape", sizes(layout.shape())),
            field("strides", sizes(layout.strides())),
        ])
    };
    let arguments = call.row.arguments.iter().zip(call.operands).map(|(argument, operand)| {
        let mut fields = vec![field("name", text(argument.name))];
        match operand {
            Operand::Tensor(layout, _) if matches!(argument.kind, Kind::Tensor(_)) => {
                fields.push(field("tensor", tensor(layout)));
            }
            Operand::Tensor(..) | Operand::Absent => {}
            Operand::Number(value) => fields.push(field("number", Json::Float(*value))),
            Operand::Whole(value) => fields.push(field("whole", Json::Int((*value).into()))),
            Operand::Word(word) => fields.push(field("word", text(&word.to_string_lossy()))),
            Operand::Bool(value) => fields.push(field("on", Json::Bool(*value))),
        }
        Json::Object(fields)
    });
    Json::Object(vec![
        field("kernel", text(call.row.kernel)),
        field("device", text(&call.device().to_string())),
        field("arguments", Json::List(arguments.collect())),
    ])
}
