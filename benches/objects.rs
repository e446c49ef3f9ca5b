//! What typed calls and objects cost beside the same from C: `cargo bench --bench objects`; needs a C compiler and no GPU.
//! Each figure is the least of many rounds, Rust's and C's in turn.

use std::error::Error;
use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use flashinfer_rs::object::{Array, Func};
use flashinfer_rs::{Arg, DType, Device, FlashInferRuntime, Module, PackedTensor, RuntimeConfig, TensorRef};

const CALLS: i64 = 100_000;
const ROUNDS: usize = 50;

/// What a typed call of five arguments may cost more than in C, in nanoseconds.
const MORE_PER_CALL: f64 = 15.0;
/// How many times as much as in C an array of eight may cost.
const TIMES_PER_ARRAY: f64 = 1.5;

/// The start of `struct tensor` in benches/c/tvm_ffi.h.
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: [i32; 2],
    dtype: [u8; 4],
    ndim: i32,
    shape: [i64; 6],
    strides: [i64; 6],
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("objects: a bound is broken");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("objects: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Nanoseconds for one, the least of all rounds, of each.
fn least(mut ours: impl FnMut() -> bool, mut theirs: impl FnMut() -> bool) -> Result<(f64, f64), &'static str> {
    let mut best = [f64::INFINITY; 2];
    for _ in 0..ROUNDS {
        let [rust, c] = &mut best;
        for (time, f) in [(rust, &mut ours as &mut dyn FnMut() -> bool), (c, &mut theirs)] {
            let start = Instant::now();
            if !f() {
                return Err("a call failed");
            }
            *time = time.min(start.elapsed().as_nanos() as f64 / CALLS as f64);
        }
    }
    Ok((best[0], best[1]))
}

fn run() -> Result<bool, Box<dyn Error>> {
    FlashInferRuntime::initialize(RuntimeConfig::default())?;
    let folder = tempfile::tempdir()?;
    let path = compile(folder.path())?;
    // SAFETY: made a moment ago, without initializers.
    let module = unsafe { Module::open(&path) }?;
    // The same library once more, for what is no function of TVM-FFI's.
    // SAFETY: as above.
    let library = unsafe { libloading::os::unix::Library::new(&path) }?;
    // SAFETY: the types are those of benches/c/objects.c.
    let (call_five, make_arrays) = unsafe {
        (
            library.get::<unsafe extern "C" fn(i64, *const Tensor) -> c_int>(b"call_five")?,
            library.get::<unsafe extern "C" fn(i64) -> c_int>(b"make_arrays")?,
        )
    };

    let data = 0x1000 as *mut c_void;
    let (shape, strides) = ([1, 4096, 0, 0, 0, 0], [4096, 1, 0, 0, 0, 0]);
    let c_tensor = Tensor { data, device: [2, 0], dtype: [4, 16, 1, 0], ndim: 2, shape, strides };
    // SAFETY: the function touches no memory.
    let tensor = unsafe { TensorRef::from_raw(data, Device::Cuda(0), DType::BF16, &[1, 4096], None) }?;
    let function = module.function("five")?;
    let five = function.typed::<(&PackedTensor<'_>, &PackedTensor<'_>, f64, i64, bool), ()>();
    let (rust, c) = least(
        || {
            (0..CALLS).all(|i| {
                let tensor = black_box(&tensor);
                // SAFETY: the function touches no memory.
                unsafe { five.call((&tensor.pack(), &tensor.pack(), 1e-6, i, true)) }.is_ok()
            })
        },
        // SAFETY: as above.
        || unsafe { call_five(CALLS, black_box(&c_tensor)) } == 0,
    )?;
    let calls = report("typed call of a function of five arguments", rust, c, rust - c <= MORE_PER_CALL);

    let (rust, c) = least(
        || {
            (0..CALLS).all(|i| {
                let items: [Arg<'_>; 8] = std::array::from_fn(|j| Arg::int(i + j as i64));
                Array::new(&items).is_ok()
            })
        },
        // SAFETY: the function takes a number.
        || unsafe { make_arrays(CALLS) } == 0,
    )?;
    let arrays = report("building and releasing an array of 8", rust, c, rust <= TIMES_PER_ARRAY * c);

    let nothing = Func::new(|_| Ok(().into()))?;
    let closure = nothing.typed::<(i64,), ()>();
    // SAFETY: the closure takes anything.
    let (rust, _) = least(|| (0..CALLS).all(|i| unsafe { closure.call((i,)) }.is_ok()), || true)?;
    println!("{:45} {rust:7.1} ns", "calling a Rust closure through TVM-FFI");
    Ok(calls && arrays && bound(&module)?)
}

/// What a call through a definition costs more than the same function called as it is.
#[cfg(feature = "bench")]
fn bound(module: &Module) -> Result<bool, Box<dyn Error>> {
    use flashinfer_rs::bench::{Axis, DataType, Definition, Kernel, Named, TensorSpec};
    use flashinfer_rs::object::Tensor;
    use flashinfer_rs::{Stream, TensorMut};

    /// In nanoseconds.
    const MORE: f64 = 300.0;

    let mut definition = Definition::new("gemm_f32_n128_k256", "gemm");
    definition.axes = Named::from([("M", Axis::variable()), ("N", Axis::constant(128)), ("K", Axis::constant(256))]);
    let spec = |axes: &[&str]| TensorSpec::tensor(axes, DataType::Float32);
    definition.inputs = Named::from([("A", spec(&["M", "K"])), ("B", spec(&["N", "K"]))]);
    definition.outputs = Named::from([("C", spec(&["M", "N"]))]);
    let kernel = Kernel::new(module.function("five")?, true);
    let bound = kernel.bind(&definition)?;
    let zeros = |shape: &[i64]| Tensor::zeros(DType::F32, shape);
    let (a, b, c) = (zeros(&[16, 256])?, zeros(&[128, 256])?, zeros(&[16, 128])?);
    let args = [Arg::object(a.as_object()), Arg::object(b.as_object()), Arg::object(c.as_object())];
    // SAFETY: the function touches no memory.
    let raw = || (0..CALLS).all(|_| unsafe { kernel.function().call_any(black_box(&args)) }.is_ok());

    let (inputs, outputs) = ([(&a).into(), (&b).into()], [(&c).into()]);
    // SAFETY: as above.
    let call = || (0..CALLS).all(|_| unsafe { bound.call(black_box(&inputs), &outputs, Stream::NULL) }.is_ok());
    let each = || {
        (0..CALLS).all(|_| {
            let Ok(bound) = black_box(&kernel).bind(black_box(&definition)) else { return false };
            // SAFETY: as above.
            unsafe { bound.call(&inputs, &outputs, Stream::NULL) }.is_ok()
        })
    };
    let (left, right, mut out) = (vec![0f32; 16 * 256], vec![0f32; 128 * 256], vec![0f32; 16 * 128]);
    let (left, right) = (TensorRef::from_slice(&left, &[16, 256])?, TensorRef::from_slice(&right, &[128, 256])?);
    let mut out = TensorMut::from_slice(&mut out, &[16, 128])?;
    let lent = || {
        (0..CALLS).all(|_| {
            let inputs = [black_box(&left).into(), black_box(&right).into()];
            // SAFETY: as above.
            unsafe { bound.call(&inputs, &[(&mut out).into()], Stream::NULL) }.is_ok()
        })
    };
    let calls = difference("call of a bound kernel, tensor objects", call, raw, MORE)?;
    let lent = difference("call of a bound kernel, tensors that are lent", lent, raw, MORE)?;
    Ok(difference("binding a kernel and calling it", each, raw, MORE)? && calls && lent)
}

#[cfg(not(feature = "bench"))]
fn bound(_module: &Module) -> Result<bool, Box<dyn Error>> {
    println!("bound kernels are measured with the feature `bench`");
    Ok(true)
}

/// Prints what one costs more than the other: the median of the differences of rounds that were run in turn.
#[cfg(feature = "bench")]
fn difference(
    what: &str,
    mut ours: impl FnMut() -> bool,
    raw: impl Fn() -> bool,
    bound: f64,
) -> Result<bool, &'static str> {
    let time = |f: &mut dyn FnMut() -> bool| {
        let start = Instant::now();
        if f() { Ok(start.elapsed().as_nanos() as f64 / CALLS as f64) } else { Err("a call failed") }
    };
    let mut differences = Vec::new();
    for _ in 0..ROUNDS {
        let ours = time(&mut ours)?;
        differences.push(ours - time(&mut || raw())?);
    }
    differences.sort_by(f64::total_cmp);
    let median = differences[ROUNDS / 2];
    let verdict = if median <= bound { "within the bound" } else { "MORE THAN THE BOUND" };
    println!("{what:45} {median:+7.1} ns over the raw call, at most {bound}: {verdict}");
    Ok(median <= bound)
}

fn report(what: &str, rust: f64, c: f64, within: bool) -> bool {
    let verdict = if within { "within the bound" } else { "MORE THAN THE BOUND" };
    println!("{what:45} {rust:7.1} ns, in C {c:7.1} ns: {:+.1} ns, {:.2} times: {verdict}", rust - c, rust / c);
    within
}

fn compile(folder: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let (compiler, library) = (std::env::var_os("CC").unwrap_or("cc".into()), folder.join("objects.so"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/c/objects.c");
    let mut cc = Command::new(&compiler);
    cc.args(["-std=gnu11", "-O2", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
    let output = cc.output().map_err(|error| {
        format!("{} cannot be started ({error}); install a C compiler, or name one in CC", compiler.display())
    })?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    Ok(library)
}
