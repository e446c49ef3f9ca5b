//! Logs and dumps of calls, as the environment asks for them: each test makes its calls in a process of its own, and looks at
//! what that left.

#[path = "support/native.rs"]
mod native;
#[allow(dead_code, reason = "the example's own main function is not called")]
#[path = "../examples/replay.rs"]
mod replay;

use std::ffi::c_void;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use flashinfer_rs::kernels::norm::{NormOptions, Rmsnorm, gemma_rmsnorm, rmsnorm, rmsnorm_in_place};
use flashinfer_rs::log::Dump;
use flashinfer_rs::{
    Arg, DType, FlashInferError, FlashInferRuntime, GemmaRmsNormParams, Module, Prepared, RuntimeConfig, Stream,
    Tensor1DDesc, Tensor2DDesc, TensorMut, TensorRef,
};
use tempfile::TempDir;

const LEVEL: &str = "FLASHINFER_RS_LOGLEVEL";
const DEST: &str = "FLASHINFER_RS_LOGDEST";
const DUMPS: &str = "FLASHINFER_RS_DUMP_DIR";

/// Variables that a test's surroundings may have.
const ALL: [&str; 9] = [
    LEVEL,
    DEST,
    DUMPS,
    "FLASHINFER_LOGLEVEL",
    "FLASHINFER_LOGDEST",
    "FLASHINFER_DUMP_DIR",
    "FLASHINFER_RS_DUMP_INCLUDE",
    "FLASHINFER_RS_DUMP_EXCLUDE",
    "FLASHINFER_RS_DUMP_MAX_COUNT",
];

/// Runs `body` in a process of its own with these variables, for the test of this name; what that process wrote. None in that
/// process, where the test is over then.
fn child(name: &str, variables: &[(&str, &str)], body: impl FnOnce()) -> Option<Output> {
    if native::in_its_process(name) {
        body();
        return None;
    }
    // Empty ones count as not set.
    let mut all: Vec<(&str, &Path)> = ALL.iter().map(|&variable| (variable, Path::new(""))).collect();
    all.extend(variables.iter().map(|&(variable, value)| (variable, Path::new(value))));
    Some(native::again(&std::env::current_exe().unwrap(), name, &all))
}

/// As [`child`], of a body that comes to its end: what it wrote to the standard output and error streams, and to its log.
fn logged(name: &str, variables: &[(&str, &str)], body: impl FnOnce()) -> Option<(String, String)> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("log");
    let variables: Vec<_> = [&[(DEST, file.to_str().unwrap())], variables].concat();
    let output = child(name, &variables, body)?;
    let text = native::text(&output);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    Some((text, fs::read_to_string(file).unwrap_or_default()))
}

fn initialize() -> &'static FlashInferRuntime {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap()
}

/// A call on the host whose output is all ones, but for signs.
fn norm(input: &[f32; 8]) -> [f32; 8] {
    let mut out = [0f32; 8];
    rmsnorm(
        &mut TensorMut::from_slice(&mut out, &[2, 4]).unwrap(),
        &TensorRef::from_slice(input, &[2, 4]).unwrap(),
        &TensorRef::from_slice(&[1f32; 4], &[4]).unwrap(),
        &NormOptions::default(),
        Stream::NULL,
    )
    .unwrap();
    out
}

const INPUT: [f32; 8] = [2.0, -2.0, 2.0, -2.0, 3.0, 3.0, -3.0, 3.0];

/// The lines of a log without what differs from run to run: times and addresses.
fn lines(log: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for line in log.lines() {
        let line = match line.split_once("] FlashInfer API ") {
            Some((time, rest)) => {
                assert!(time.starts_with("[20") && time.len() == "[2026-01-02 03:04:05".len(), "{line}");
                rest
            }
            None => line,
        };
        let mut parts = line.split("0x");
        let mut plain = parts.next().unwrap().to_owned();
        for part in parts {
            plain += "0x…";
            plain += part.trim_start_matches(|c: char| c.is_ascii_hexdigit());
        }
        lines.push(plain);
    }
    lines
}

// Levels.

#[test]
fn level_0_says_nothing() {
    let Some((text, log)) = logged("level_0_says_nothing", &[(LEVEL, "0")], || {
        initialize();
        norm(&INPUT);
    }) else {
        return;
    };
    assert!(log.is_empty() && !text.contains("FlashInfer"), "{log}{text}");
}

#[test]
fn level_1_names_each_call() {
    let Some((_, log)) = logged("level_1_names_each_call", &[(LEVEL, "1")], || {
        initialize();
        norm(&INPUT);
        norm(&INPUT);
    }) else {
        return;
    };
    let lines = lines(&log);
    assert!(lines[0].starts_with("Logging: flashinfer-rs ") && lines[0].ends_with(": names"), "{log}");
    assert_eq!(lines[1..], ["Call: rmsnorm #1", "Call: rmsnorm #2"]);
}

const ARGUMENTS: [&str; 6] = [
    "Call: rmsnorm #1",
    "  out= Tensor(shape=(2, 4), stride=(4, 1), dtype=F32, device=cpu, ptr=0x…), written",
    "  input= Tensor(shape=(2, 4), stride=(4, 1), dtype=F32, device=cpu, ptr=0x…), read",
    "  weight= Tensor(shape=(4,), stride=(1,), dtype=F32, device=cpu, ptr=0x…), read",
    "  eps= 1e-6",
    "  enable_pdl= false",
];

#[test]
fn level_3_says_what_each_call_is_given() {
    let Some((_, log)) = logged("level_3_says_what_each_call_is_given", &[(LEVEL, "3")], || {
        initialize();
        norm(&INPUT);
    }) else {
        return;
    };
    assert_eq!(lines(&log)[1..], [&ARGUMENTS[..], &["Return: rmsnorm #1"]].concat());
}

#[test]
fn level_5_says_what_tensors_hold_before_and_after() {
    let Some((_, log)) = logged("level_5_says_what_tensors_hold_before_and_after", &[(LEVEL, "5")], || {
        initialize();
        norm(&INPUT);
        norm(&[f32::NAN; 8]);
    }) else {
        return;
    };
    let lines = lines(&log);
    let expected = [
        "Inputs: rmsnorm #1",
        "  input= min=-3.000000, max=3.000000, mean=0.750000, nan_count=0, inf_count=0",
        "  weight= min=1.000000, max=1.000000, mean=1.000000, nan_count=0, inf_count=0",
        "Return: rmsnorm #1",
        "  out= min=-1.000000, max=1.000000, mean=0.250000, nan_count=0, inf_count=0",
    ];
    assert_eq!((&lines[1..7], &lines[7..12]), (&ARGUMENTS.map(str::to_owned)[..], &expected.map(str::to_owned)[..]));
    assert_eq!(lines[19], "  input= min=NaN, max=NaN, mean=NaN, nan_count=8, inf_count=0");
    assert_eq!(lines[21..], ["Return: rmsnorm #2", "  out= min=NaN, max=NaN, mean=NaN, nan_count=8, inf_count=0"]);
}

#[test]
fn a_prepared_call_is_logged_with_its_arguments_once() {
    let Some((_, log)) = logged("a_prepared_call_is_logged_with_its_arguments_once", &[(LEVEL, "5")], || {
        initialize();
        let mut out = [0f32; 8];
        let mut out = TensorMut::from_slice(&mut out, &[2, 4]).unwrap();
        let weight = [1f32; 4];
        let (input, weight) =
            (TensorRef::from_slice(&INPUT, &[2, 4]).unwrap(), TensorRef::from_slice(&weight, &[4]).unwrap());
        let prepared = Prepared::<Rmsnorm>::new(&out, &input, &weight, &NormOptions::default()).unwrap();
        prepared.launch(&mut out, &input, &weight, Stream::NULL).unwrap();
        prepared.launch(&mut out, &input, &weight, Stream::NULL).unwrap();
    }) else {
        return;
    };
    let mut expected = ARGUMENTS.to_vec();
    expected[0] = "Prepare: rmsnorm #1";
    expected.extend(["Call: rmsnorm #2 (prepared)", "Call: rmsnorm #3 (prepared)"]);
    assert_eq!(lines(&log)[1..], expected);
}

#[test]
fn a_call_that_is_refused_is_logged_with_what_it_was_given_and_why() {
    let Some((_, log)) =
        logged("a_call_that_is_refused_is_logged_with_what_it_was_given_and_why", &[(LEVEL, "3")], || {
            initialize();
            let mut out = [0f32; 8];
            let error = rmsnorm(
                &mut TensorMut::from_slice(&mut out, &[2, 4]).unwrap(),
                &TensorRef::from_slice(&INPUT, &[2, 4]).unwrap(),
                &TensorRef::from_slice(&INPUT, &[8]).unwrap(),
                &NormOptions::default(),
                Stream::NULL,
            );
            assert!(matches!(error, Err(FlashInferError::InvalidArgument { .. })), "{error:?}");
        })
    else {
        return;
    };
    let lines = lines(&log);
    assert!(lines[4].starts_with("  weight= Tensor(shape=(8,)"), "{log}");
    assert!(lines[7].starts_with("Error: rmsnorm #1: rmsnorm: weight is of shape [8], expected shape [4]"), "{log}");
    assert_eq!(lines.len(), 8);
}

#[test]
fn a_call_with_nothing_to_do_is_logged() {
    let Some((_, log)) = logged("a_call_with_nothing_to_do_is_logged", &[(LEVEL, "5")], || {
        initialize();
        let (mut out, none) = ([0f32; 0], [0f32; 0]);
        let (mut out, input) =
            (TensorMut::from_slice(&mut out, &[0, 4]).unwrap(), TensorRef::from_slice(&none, &[0, 4]).unwrap());
        let weight = TensorRef::from_slice(&[1f32; 4], &[4]).unwrap();
        rmsnorm(&mut out, &input, &weight, &NormOptions::default(), Stream::NULL).unwrap();
    }) else {
        return;
    };
    assert!(lines(&log)[1] == "Call: rmsnorm #1" && log.contains("shape=(0, 4)"), "{log}");
}

#[test]
fn functions_of_any_module_are_logged_with_what_they_are_given() {
    let name = "functions_of_any_module_are_logged_with_what_they_are_given";
    let Some((_, log)) = logged(name, &[(LEVEL, "3")], || {
        initialize();
        let folder = tempfile::tempdir().unwrap();
        // SAFETY: the test's own module, whose functions take anything.
        unsafe {
            let module = Module::open(native::compile("loadable.c", "loadable.so", &[], folder.path())).unwrap();
            module.metadata("answer").unwrap();
            let answer = module.function("answer").unwrap();
            answer.call(&[Arg::int(21)]).unwrap();
            answer.typed::<(i64,), i64>().call((4,)).unwrap();
            let packed = TensorRef::from_slice(&INPUT, &[8]).unwrap();
            let packed = packed.pack();
            let args = [Arg::tensor(&packed), Arg::float(0.5), Arg::str(c"a text"), Arg::NONE, Arg::bool(true)];
            answer.launch(&args).unwrap();
            answer.to_func().unwrap().call(&[]).unwrap();
        }
    }) else {
        return;
    };
    let lines = lines(&log);
    let expected = [
        "Call: answer #1",
        "  arg[0]= Int(21)",
        "Return: answer #1",
        "Call: answer #2",
        "  arg[0]= Int(4)",
        "Return: answer #2",
        "Call: answer #3",
        "  arg[0]= Tensor(shape=(8,), stride=(1,), dtype=F32, device=cpu, ptr=0x…)",
        "  arg[1]= Float(0.5)",
        "  arg[2]= Str(\"a text\")",
        "  arg[3]= None",
        "  arg[4]= Bool(true)",
        "Return: answer #3",
        "Call: a function object #4",
        "Return: a function object #4",
    ];
    assert_eq!(lines[1..], expected);
}

/// The flat functions, over stand-ins for CUDA's runtime and the kernel, which touch no memory.
#[test]
fn the_flat_functions_are_logged_like_any_call() {
    let Some((_, log)) = logged("the_flat_functions_are_logged_like_any_call", &[(LEVEL, "3")], || {
        let folder = stand_ins("launches.c");
        let _ = initialize_with(folder.path());
        // SAFETY: the stand-in touches no memory.
        unsafe { flashinfer_rs::gemma_rmsnorm(&flat()) }.unwrap();
    }) else {
        return;
    };
    let lines = lines(&log);
    let out = "  out= Tensor(shape=(2, 64), stride=(64, 1), dtype=BF16, device=cuda:0, ptr=0x…), written";
    assert_eq!(lines[1..3], ["Call: gemma_rmsnorm #1", out]);
    assert!(
        log.contains("ptr=0x2000)") && log.contains("stream= 0x10\n") && log.contains("Return: gemma_rmsnorm"),
        "{log}"
    );
}

/// Memory of the host, which a stand-in for CUDA's runtime copies as a GPU's. The kernel's stand-in writes nothing.
#[test]
fn what_a_gpus_tensors_hold_is_read_by_cudas_runtime_and_not_while_a_graph_is_captured() {
    let name = "what_a_gpus_tensors_hold_is_read_by_cudas_runtime_and_not_while_a_graph_is_captured";
    let body = || {
        let folder = stand_ins("launches.c");
        let _ = initialize_with(folder.path());
        let values: Vec<half::bf16> = (0..128).map(|i| half::bf16::from_f32(i as f32 - 3.0)).collect();
        let mut params = flat();
        let at = values.as_ptr().cast();
        (params.input.ptr, params.weight.ptr, params.out.ptr) = (at, at, at);
        // Of each row of 64 the first 16: what lies between is not read.
        (params.input.cols, params.weight.len, params.out.cols) = (16, 16, 16);
        // SAFETY: the stand-ins only read, and copy what is there.
        unsafe { flashinfer_rs::gemma_rmsnorm(&params) }.unwrap();
    };
    let folder = tempfile::tempdir().unwrap();
    let dumping = (DUMPS, folder.path().to_str().unwrap());
    let Some((_, log)) = logged(name, &[(LEVEL, "5"), dumping], body) else { return };
    assert!(log.contains("  input= min=-3.000000, max=76.000000, mean=36.500000, nan_count=0, inf_count=0"), "{log}");
    assert!(log.contains("  weight= Tensor(shape=(16,), stride=(1,), dtype=BF16, device=cuda:0, ptr="), "{log}");
    assert!(log.contains("  out= min=-3.000000, max=76.000000"), "{log}");
    let found = dumps(folder.path());
    assert_eq!(names(&found), ["gemma_rmsnorm_call0001"]);
    initialize();
    let dump = Dump::open(&found[0]).unwrap();
    assert_eq!(dump.device(), "cuda:0");
    // What was dumped as the output is the input: the kernel did nothing, and the reference says so.
    let replay = dump.replay().unwrap();
    assert!(!replay.matches() && replay.outputs.as_ref().unwrap()[0].elements == 32, "{replay}");

    let (_, log) = logged(name, &[(LEVEL, "5"), dumping, ("FAKE_CAPTURE", "1")], body).unwrap();
    assert!(log.contains("Call: gemma_rmsnorm #1 (captured into a graph)\n"), "{log}");
    assert!(log.contains("  no statistics: a graph is captured\n") && !log.contains("min="), "{log}");
    let (_, log) = logged(name, &[(LEVEL, "5"), dumping, ("FAKE_CAPTURE_ERROR", "906")], body).unwrap();
    assert!(log.contains("Call: gemma_rmsnorm #1\n") && log.contains("CUDA does not say"), "{log}");
    assert_eq!(dumps(folder.path()).len(), 1);
    // A GPU that does not answer costs the statistics and the dump, and not the call.
    let (text, log) = logged(name, &[(LEVEL, "5"), dumping, ("FAKE_COPY_ERROR", "700")], body).unwrap();
    assert!(log.contains("  input= no statistics: cudaMemcpyAsync failed with CUDA error 700"), "{log}");
    assert!(log.contains("Return: gemma_rmsnorm #1"), "{log}");
    assert!(text.contains("a call cannot be dumped: ") && text.contains("CUDA error 700"), "{text}");
    assert_eq!(dumps(folder.path()).len(), 1);
}

fn stand_ins(norm: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    native::compile("cudart.c", "libcudart.so.13", &["-DLAST_ERROR", "-DMEMORY"], folder.path());
    native::compile(norm, "norm.so", &[], folder.path());
    let tvm_ffi = "libtvm_ffi.so";
    fs::copy(native::vendored_libraries().join(tvm_ffi), folder.path().join(tvm_ffi)).unwrap();
    folder
}

fn initialize_with(folder: &Path) -> &'static FlashInferRuntime {
    native::load(&folder.join("libcudart.so.13"), false);
    // SAFETY: the test's own libraries, and the vendored one.
    let config = unsafe { RuntimeConfig::default().lib_dir(folder).without_verification() };
    FlashInferRuntime::initialize(config).unwrap()
}

fn flat() -> GemmaRmsNormParams {
    let address = |at: usize| at as *const c_void;
    let (dtype, device_id) = (DType::BF16, 0);
    let matrix =
        |at| Tensor2DDesc { ptr: address(at), rows: 2, cols: 64, stride_row: 64, stride_col: 1, dtype, device_id };
    let weight = Tensor1DDesc { ptr: address(0x2000), len: 64, stride: 1, dtype, device_id };
    GemmaRmsNormParams::new(matrix(0x1000), weight, matrix(0x3000), 1e-6, 0x10 as *mut c_void)
}

// What ends the process.

#[test]
fn the_log_of_a_function_that_crashes_ends_with_its_inputs() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let variables = [(LEVEL, "3"), (DEST, log.to_str().unwrap())];
    let Some(output) = child("the_log_of_a_function_that_crashes_ends_with_its_inputs", &variables, || {
        initialize();
        let folder = tempfile::tempdir().unwrap();
        // SAFETY: loading does nothing; what the call does is what is tested.
        unsafe {
            let module = Module::open(native::compile("crashes.c", "crashes.so", &[], folder.path())).unwrap();
            let tensor = TensorRef::from_slice(&INPUT, &[2, 4]).unwrap();
            let tensor = tensor.pack();
            _ = module.function("crash").unwrap().call(&[Arg::tensor(&tensor), Arg::int(7)]);
        }
    }) else {
        return;
    };
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{}", native::text(&output));
    let log = lines(&fs::read_to_string(log).unwrap());
    let tensor = "  arg[0]= Tensor(shape=(2, 4), stride=(4, 1), dtype=F32, device=cpu, ptr=0x…)";
    assert_eq!(log[1..], ["Call: crash #1", tensor, "  arg[1]= Int(7)"]);
}

#[test]
fn the_log_of_a_kernel_that_crashes_ends_with_its_inputs() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    // At level 5 the memory itself is looked at, which is not there: the arguments stand in the log before.
    for level in ["3", "5"] {
        let variables = [(LEVEL, level), (DEST, log.to_str().unwrap())];
        let Some(output) = child("the_log_of_a_kernel_that_crashes_ends_with_its_inputs", &variables, || {
            let folder = stand_ins("crashes.c");
            let _ = initialize_with(folder.path());
            // SAFETY: what the call does is what is tested.
            _ = unsafe { flashinfer_rs::gemma_rmsnorm(&flat()) };
        }) else {
            return;
        };
        assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{}", native::text(&output));
        let text = fs::read_to_string(&log).unwrap();
        let lines = lines(&text);
        assert!(lines[1] == "Call: gemma_rmsnorm #1" && lines[3].contains("device=cuda:0"), "{text}");
        assert_eq!(lines[5..], ["  eps= 1e-6", "  enable_pdl= false", "  stream= 0x…"]);
        fs::remove_file(&log).unwrap();
    }
}

// Destinations.

#[test]
fn a_files_name_has_the_process_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log-%i.txt");
    let variables = [(LEVEL, "1"), (DEST, path.to_str().unwrap())];
    let Some(output) = child("a_files_name_has_the_process_in_it", &variables, || {
        initialize();
        println!("my number is {}.", std::process::id());
    }) else {
        return;
    };
    let text = native::text(&output);
    let id = text.split_once("my number is ").and_then(|(_, rest)| rest.split_once('.')).unwrap().0;
    let log = fs::read_to_string(folder.path().join(format!("log-{id}.txt"))).unwrap();
    assert!(log.contains(&format!("process {id}:")), "{log}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn flashinfers_variables_are_taken_where_ours_are_not_set() {
    let name = "flashinfers_variables_are_taken_where_ours_are_not_set";
    let body = || {
        initialize();
        norm(&INPUT);
    };
    let theirs = [("FLASHINFER_LOGLEVEL", "3"), ("FLASHINFER_LOGDEST", "stderr")];
    let Some(output) = child(name, &theirs, body) else { return };
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("FlashInfer API Call: rmsnorm #1\n  out= Tensor("), "{error}");
    let ours = [theirs[0], theirs[1], (LEVEL, "1"), (DEST, "stdout")];
    let output = child(name, &ours, body).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("FlashInfer API Call: rmsnorm #1\n") && !text.contains("out="), "{text}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("FlashInfer"));
}

#[test]
fn a_value_that_means_nothing_is_an_error_when_the_runtime_is_initialized() {
    let name = "a_value_that_means_nothing_is_an_error_when_the_runtime_is_initialized";
    let body = || {
        let error = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap_err();
        assert!(matches!(error, FlashInferError::Setting { .. }), "{error}");
        println!("<{error}>");
    };
    let bad = [(LEVEL, "verbose"), ("FLASHINFER_LOGLEVEL", "high"), ("FLASHINFER_RS_DUMP_MAX_COUNT", "-3")];
    for (variable, value) in bad {
        let Some(output) = child(name, &[(variable, value)], body) else { return };
        let text = native::text(&output);
        assert!(output.status.success(), "{text}");
        assert!(text.contains(&format!("<{variable} is \"{value}\", expected ")), "{text}");
    }
}

#[test]
fn a_log_that_cannot_be_written_is_said_once_and_calls_go_on() {
    let name = "a_log_that_cannot_be_written_is_said_once_and_calls_go_on";
    // A full disk, and a path below what is no folder.
    for path in ["/dev/full", "/dev/null/log"] {
        let Some(output) = child(name, &[(LEVEL, "3"), (DEST, path)], || {
            initialize();
            for _ in 0..3 {
                assert_eq!(norm(&INPUT)[0].round(), 1.0);
            }
        }) else {
            return;
        };
        let text = native::text(&output);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        let complaint = format!("flashinfer-rs: the log cannot be written to {path}: ");
        assert_eq!(text.matches(&complaint).count(), 1, "{text}");
        assert!(text.contains("; calls go on without it"), "{text}");
    }
}

#[cfg(feature = "tracing")]
#[test]
fn records_are_events_of_tracing_too() {
    use std::fmt::Debug;
    use std::sync::{Arc, Mutex};

    use tracing::field::{Field, Visit};
    use tracing::{Event, Metadata, Subscriber, span};

    /// Keeps what events say.
    #[derive(Clone, Default)]
    struct Keeper(Arc<Mutex<Vec<String>>>);

    struct Words(String);

    impl Visit for Words {
        fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
            self.0 += &format!("{}={value:?};", field.name());
        }
    }

    impl Subscriber for Keeper {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            metadata.target() == "flashinfer_rs::log"
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, event: &Event<'_>) {
            let mut words = Words(String::new());
            event.record(&mut words);
            self.0.lock().unwrap().push(words.0);
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    let name = "records_are_events_of_tracing_too";
    let Some(output) = child(name, &[(LEVEL, "3"), (DEST, "tracing")], || {
        let keeper = Keeper::default();
        tracing::subscriber::set_global_default(keeper.clone()).unwrap();
        initialize();
        norm(&INPUT);
        let events = keeper.0.lock().unwrap().clone();
        assert_eq!(events.len(), 3, "{events:?}");
        assert!(events[1].contains("Call: rmsnorm #1\n  out= Tensor("), "{events:?}");
        for event in &events[1..] {
            assert!(event.contains("name=\"rmsnorm\";") && event.contains("call=1;"), "{events:?}");
        }
        assert!(events[2].contains("Return: rmsnorm #1;"), "{events:?}");
    }) else {
        return;
    };
    let text = native::text(&output);
    // Alone, as the destination says.
    assert!(output.status.success() && !text.contains("FlashInfer API"), "{text}");
}

// Dumps.

/// The dumps in a folder, by name.
fn dumps(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// The parts of dumps' names that do not differ from run to run, in alphabetical order.
fn names(dumps: &[PathBuf]) -> Vec<&str> {
    let names = dumps.iter().map(|path| path.file_name().unwrap().to_str().unwrap());
    let mut names: Vec<_> = names.map(|name| name.split_once("_pid").unwrap().1.split_once('_').unwrap().1).collect();
    names.sort_unstable();
    names
}

/// Three kernels: one with rows apart, one in place, and one twice.
fn several_calls() {
    initialize();
    norm(&INPUT);
    norm(&INPUT);
    let input: Vec<f32> = (0..24).map(|i| (i % 7) as f32 - 3.0).collect();
    let mut out = [0f32; 16];
    gemma_rmsnorm(
        &mut TensorMut::from_slice_strided(&mut out, &[2, 4], &[8, 1]).unwrap(),
        &TensorRef::from_slice_strided(&input, &[2, 4], &[12, 1]).unwrap(),
        &TensorRef::from_slice(&[0.5f32; 4], &[4]).unwrap(),
        &NormOptions::default().with_eps(1e-3),
        Stream::NULL,
    )
    .unwrap();
    let mut values = INPUT;
    rmsnorm_in_place(
        &mut TensorMut::from_slice(&mut values, &[2, 4]).unwrap(),
        &TensorRef::from_slice(&[1f32; 4], &[4]).unwrap(),
        &NormOptions::default(),
        Stream::NULL,
    )
    .unwrap();
}

#[test]
fn a_call_is_dumped_and_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let Some((_, log)) =
        logged("a_call_is_dumped_and_made_again", &[(DUMPS, folder.path().to_str().unwrap())], several_calls)
    else {
        return;
    };
    assert!(log.is_empty(), "dumps alone log nothing: {log}");
    let found = dumps(folder.path());
    assert_eq!(names(&found), ["gemma_rmsnorm_call0001", "rmsnorm_call0001", "rmsnorm_call0002", "rmsnorm_call0003"]);
    initialize();
    for dump in &found {
        let opened = Dump::open(dump).unwrap();
        assert_eq!(opened.device(), "cpu");
        let replay = replay::replay(dump, true).unwrap();
        assert!(replay.matches(), "{replay}");
        let outputs = replay.outputs.as_ref().unwrap();
        assert!(outputs.len() == 1 && outputs[0].elements == 8 && outputs[0].changed == 0, "{replay}");
        assert!(replay.to_string().ends_with("out: all 8 elements are the same"), "{replay}");
    }
}

#[test]
fn a_dump_that_was_changed_is_found_when_it_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let name = "a_dump_that_was_changed_is_found_when_it_is_made_again";
    let Some(_) = logged(name, &[(DUMPS, folder.path().to_str().unwrap())], || {
        initialize();
        norm(&INPUT);
    }) else {
        return;
    };
    let [dump] = &dumps(folder.path())[..] else { panic!("one call") };
    let outputs = dump.join("outputs.safetensors");
    let whole = fs::read(&outputs).unwrap();
    // The last element is the last four bytes.
    let mut changed = whole.clone();
    let end = changed.len() - 4;
    changed[end..].copy_from_slice(&1.5f32.to_le_bytes());
    fs::write(&outputs, &changed).unwrap();
    let replay = replay::replay(dump, true).unwrap();
    assert!(!replay.matches(), "{replay}");
    let output = &replay.outputs.as_ref().unwrap()[0];
    assert_eq!((output.name, output.changed, output.different), ("out", 1, 1));
    let (at, was, is) = output.worst.unwrap();
    assert!(at == 7 && was == 1.5 && (is - 1.0).abs() < 1e-3, "{replay}");
    let text = replay.to_string();
    assert!(
        text.contains("1 of 8 elements changed, 1 by more than rounding; the most element 7, from 1.5 to"),
        "{text}"
    );

    // A call that did not come back has inputs alone: it is made, and nothing is compared.
    fs::remove_file(&outputs).unwrap();
    let replay = replay::replay(dump, true).unwrap();
    assert!(!replay.matches() && replay.outputs.is_none() && replay.to_string().contains("no outputs"), "{replay}");

    // Damaged files are errors that name the file.
    fs::write(&outputs, &whole[..whole.len() - 1]).unwrap();
    let error = replay::replay(dump, true).unwrap_err().to_string();
    assert!(error.contains("outputs.safetensors"), "{error}");
    fs::write(&outputs, &whole).unwrap();
    let inputs = dump.join("inputs.safetensors");
    let bytes = fs::read(&inputs).unwrap();
    for (old, new, said) in [
        ("\\\"rmsnorm\\\"", "\\\"rmsnorn\\\"", "the name of a kernel"),
        ("\\\"eps\\\"", "\\\"epz\\\"", "\"eps\""),
        ("float32", "float99", "an element type"),
        ("[2,4]", "[4,2]", "shape"),
        ("[2,4]", "[2,9]", "shape"),
    ] {
        let at = bytes.windows(old.len()).position(|part| part == old.as_bytes()).unwrap();
        let mut other = bytes.clone();
        other[at..at + new.len()].copy_from_slice(new.as_bytes());
        fs::write(&inputs, &other).unwrap();
        let error = replay::replay(dump, true).expect_err(new).to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn patterns_and_limits_choose_what_is_dumped() {
    let name = "patterns_and_limits_choose_what_is_dumped";
    let chosen = |variables: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        let variables = [&[(DUMPS, folder.path().to_str().unwrap())], variables].concat();
        let (text, _) = logged(name, &variables, several_calls)?;
        let found = dumps(folder.path());
        Some((names(&found).into_iter().map(str::to_owned).collect::<Vec<_>>(), text))
    };
    let Some((found, _)) = chosen(&[("FLASHINFER_RS_DUMP_INCLUDE", "gemma_*,nothing")]) else { return };
    assert_eq!(found, ["gemma_rmsnorm_call0001"]);
    let (found, _) = chosen(&[("FLASHINFER_RS_DUMP_EXCLUDE", "rmsnor?")]).unwrap();
    assert_eq!(found, ["gemma_rmsnorm_call0001"]);
    let (found, text) = chosen(&[("FLASHINFER_RS_DUMP_MAX_COUNT", "2")]).unwrap();
    assert_eq!(found, ["rmsnorm_call0001", "rmsnorm_call0002"]);
    assert_eq!(text.matches("no more calls are dumped after 2").count(), 1, "{text}");
    // 200 bytes, of which each call has 80: 32 of the input, 16 of the weight, 32 of the output.
    let (found, text) = chosen(&[("FLASHINFER_RS_DUMP_MAX_SIZE_GB", "0.000000186264514923095703125")]).unwrap();
    assert_eq!(found, ["rmsnorm_call0001", "rmsnorm_call0002"]);
    assert_eq!(text.matches("FLASHINFER_RS_DUMP_MAX_SIZE_GB allows more").count(), 1, "{text}");
}

#[test]
fn a_dump_that_cannot_be_written_is_said_once_and_calls_go_on() {
    let name = "a_dump_that_cannot_be_written_is_said_once_and_calls_go_on";
    let body = || {
        initialize();
        if std::env::var_os("SMALL_FILES").is_some() {
            // As on a full disk: nothing is written past the first bytes of a file.
            let limit = libc::rlimit { rlim_cur: 300, rlim_max: 300 };
            // SAFETY: a limit of this process, which is the test's own; the signal would end it instead.
            unsafe {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
            }
        }
        for _ in 0..3 {
            assert_eq!(norm(&INPUT)[0].round(), 1.0);
        }
    };
    let said_once = |output: &Output| {
        let text = native::text(output);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        assert_eq!(text.matches("flashinfer-rs: a call cannot be dumped: ").count(), 1, "{text}");
        assert!(text.contains("; calls go on without it"), "{text}");
    };
    let Some(output) = child(name, &[(DUMPS, "/dev/null/dumps")], body) else { return };
    said_once(&output);
    let folder = tempfile::tempdir().unwrap();
    let variables = [(DUMPS, folder.path().to_str().unwrap()), ("SMALL_FILES", "1")];
    said_once(&child(name, &variables, body).unwrap());
    // Nothing is left of what was not whole.
    assert_eq!(dumps(folder.path()), Vec::<PathBuf>::new());
}

#[test]
fn level_10_logs_and_dumps() {
    let folder = tempfile::tempdir().unwrap();
    let variables = [("FLASHINFER_LOGLEVEL", "10"), ("FLASHINFER_DUMP_DIR", folder.path().to_str().unwrap())];
    let Some((_, log)) = logged("level_10_logs_and_dumps", &variables, || {
        initialize();
        norm(&INPUT);
    }) else {
        return;
    };
    assert!(log.contains("; dumps below ") && log.contains("nan_count=0"), "{log}");
    assert_eq!(names(&dumps(folder.path())), ["rmsnorm_call0001"]);
}
