//! Logs and dumps of calls, as FlashInfer has them: what is called with what, written before the call is made, so that the log
//! of a call that crashes ends with its inputs. Asked for by the environment alone, when the runtime is
//! [initialized](crate::FlashInferRuntime::initialize): `docs/logging.md` has the variables.
//!
//! [`Dump`] is a call that was dumped; it can be made again and compared.
//!
//! # What is logged
//! Every call of a kernel, typed or flat, on a GPU or of the [reference](mod@crate::reference) on the host, also one that is
//! refused; a [`Prepared`](crate::Prepared) call with its arguments when it is made, and by name when it is launched; a call that
//! a graph captures once, when it is captured. And [`Function::call`](crate::Function::call) and its relatives, with what they
//! are given.

// One hook for all calls of kernels: the engine makes a `Call` where `enabled` says so, and tells it when the launch begins
// (`before`), when it is queued (`after`), and what came of it (`ended`). What else is to see calls is told there. Functions that
// are called without a row go through `function`.

mod dump;
mod elements;
mod replay;
mod settings;
mod sink;
mod text;

pub use replay::{Comparison, Dump, Replay};
pub(crate) use settings::Settings;

use std::cell::{Cell, RefCell};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use self::dump::{Dumper, Dumping};
use self::settings::Level;
use self::sink::Sink;
use crate::contract::{Kind, Operand, Role, Row};
use crate::error::Result;
use crate::object::Arg;
use crate::stream::Stream;
use crate::tensor::{Device, Layout};
use crate::trace_dump;

/// Whether the hook is compiled in. Without it a build shows what it costs: `benches/host.rs` says how.
const COMPILED_IN: bool = option_env!("FLASHINFER_RS_MEASURE_WITHOUT_LOG").is_none();

/// Whether anything is to be told of calls.
static ENABLED: AtomicBool = AtomicBool::new(false);
static LOG: OnceLock<Log> = OnceLock::new();

/// All that a call pays where nothing is asked for.
#[inline(always)]
pub(crate) fn enabled() -> bool {
    COMPILED_IN && ENABLED.load(Ordering::Relaxed)
}

/// Begins to log and dump, where that is asked for.
pub(crate) fn start(settings: Settings) {
    if !COMPILED_IN || !settings.ask_for_anything() {
        return;
    }
    let Settings { level, destination, dumps, definitions } = settings;
    if let Some(folder) = definitions {
        trace_dump::start(&folder);
    }
    let made = Log { level, sink: Sink::new(destination), dumper: dumps.map(Dumper::new), calls: AtomicU64::new(0) };
    let log = LOG.get_or_init(|| made);
    if log.level > Level::Nothing {
        log.record(&text::beginning(log.level, log.dumper.as_ref()), "flashinfer-rs", 0);
    }
    ENABLED.store(true, Ordering::Release);
}

struct Log {
    level: Level,
    sink: Sink,
    dumper: Option<Dumper>,
    calls: AtomicU64,
}

impl Log {
    /// Writes a record of a call, in one piece.
    #[cfg_attr(not(feature = "tracing"), allow(unused_variables, reason = "fields of an event"))]
    fn record(&self, text: &str, name: &str, call: u64) {
        self.sink.write(text);
        #[cfg(feature = "tracing")]
        tracing::event!(target: "flashinfer_rs::log", tracing::Level::DEBUG, name, call, "{}", text.trim_end());
    }

    fn next(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// How a kernel is called.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Directly,
    /// It is only prepared.
    Preparing,
    /// By a call that was prepared.
    Prepared,
}

/// A call of a kernel, while it is made.
pub(crate) struct Call<'c> {
    log: &'static Log,
    row: &'static Row,
    operands: &'c [Operand<'c, 'c>],
    stream: Stream<'c>,
    way: Way,
    number: u64,
    begun: Cell<bool>,
    dumping: RefCell<Option<Dumping>>,
}

impl<'c> Call<'c> {
    /// A call that is about to be made; none where nothing is asked for.
    #[cold]
    pub(crate) fn new(
        row: &'static Row,
        operands: &'c [Operand<'c, 'c>],
        stream: Stream<'c>,
        way: Way,
    ) -> Option<Self> {
        let log = LOG.get()?;
        let (number, begun, dumping) = (log.next(), Cell::new(false), RefCell::new(None));
        Some(Self { log, row, operands, stream, way, number, begun, dumping })
    }

    /// Tells of a call whose arguments keep the row and are in order with their other uses, before it is launched.
    ///
    /// # Safety
    /// The tensors must be valid, as for the call itself.
    pub(crate) unsafe fn before(&self) {
        let captured = elements::is_captured(self.device(), self.stream);
        self.begin(captured == Some(true));
        if self.holds_are_told() {
            // SAFETY: the caller's promise, on a stream that does not capture.
            let holds = |layout: &Layout| unsafe { text::statistics(layout, self.stream) };
            // Behind the record of the arguments, which is there even if the memory of one is not.
            self.record(&match captured {
                Some(false) => text::holds(self, "Inputs", dump::is_input, &holds),
                Some(true) => text::holds_unknown(self, "a graph is captured"),
                None => text::holds_unknown(self, "CUDA does not say whether a graph is captured"),
            });
        }
        if let Some(dumper) = self.log.dumper.as_ref().filter(|_| captured == Some(false)) {
            // SAFETY: as above.
            *self.dumping.borrow_mut() = unsafe { dumper.inputs(self) };
        }
    }

    /// Tells of a call that was queued.
    ///
    /// # Safety
    /// As for [`before`](Self::before).
    pub(crate) unsafe fn after(&self) {
        if self.log.level >= Level::Arguments && self.way == Way::Directly {
            let told = self.holds_are_told() && elements::is_captured(self.device(), self.stream) == Some(false);
            let outputs = if told { dump::is_output } else { |_| false };
            // SAFETY: the caller's promise, on a stream that does not capture.
            let holds = |layout: &Layout| unsafe { text::statistics(layout, self.stream) };
            self.record(&text::holds(self, "Return", outputs, &holds));
        }
        if let (Some(dumping), Some(dumper)) = (self.dumping.borrow_mut().take(), &self.log.dumper) {
            // SAFETY: as above; nothing was captured when the dump was begun.
            unsafe { dumper.outputs(self, dumping) };
        }
    }

    /// Tells of a call that is over: of what went wrong, and of one that was never launched.
    pub(crate) fn ended(&self, result: &Result<()>) {
        if !self.begun.get() {
            self.begin(self.stream.capture().is_some());
        }
        if let (Err(error), true) = (result, self.log.level > Level::Nothing) {
            self.record(&text::failed(self.row.kernel, self.number, error));
        }
    }

    /// Writes what is called with what.
    fn begin(&self, captured: bool) {
        self.begun.set(true);
        if self.log.level > Level::Nothing {
            let arguments = self.log.level >= Level::Arguments && self.way != Way::Prepared;
            self.record(&text::called(self, captured, arguments));
        }
    }

    /// Whether the log tells what tensors hold.
    fn holds_are_told(&self) -> bool {
        self.log.level >= Level::Statistics && self.way == Way::Directly
    }

    fn record(&self, text: &str) {
        self.log.record(text, self.row.kernel, self.number);
    }

    /// The tensors that are there, with their names and what the kernel does with them.
    fn tensors(&self) -> impl Iterator<Item = (&'static str, Role, &'c Layout)> {
        self.row.arguments.iter().zip(self.operands).filter_map(|(argument, operand)| match &argument.kind {
            Kind::Tensor(tensor) => Some((argument.name, tensor.role, operand.layout()?)),
            _ => None,
        })
    }

    /// Where the call runs.
    fn device(&self) -> Device {
        self.operands[self.row.lead].layout().map_or(Device::Cpu, Layout::device)
    }
}

/// Tells of a call that was refused for its arguments, or of a preparation of one.
#[cold]
pub(crate) fn ended(
    row: &'static Row,
    operands: &[Operand<'_, '_>],
    stream: Stream<'_>,
    way: Way,
    result: &Result<()>,
) {
    if let Some(call) = Call::new(row, operands, stream, way) {
        call.ended(result);
    }
}

/// Calls a function of which no row is known, and tells of it.
#[cold]
pub(crate) fn function<T>(name: &str, args: &[Arg<'_>], call: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(log) = LOG.get().filter(|log| log.level > Level::Nothing) else { return call() };
    let number = log.next();
    log.record(&text::function_called(name, number, args, log.level), name, number);
    let result = call();
    match &result {
        Ok(_) if log.level < Level::Arguments => {}
        Ok(_) => log.record(&text::function_returned(name, number), name, number),
        Err(error) => log.record(&text::failed(name, number, error), name, number),
    }
    result
}
