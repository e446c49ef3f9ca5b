//! What a launch does besides the kernel: nothing is allocated, streams are set where they must be, prepared calls are
//! what they were. The kernels' libraries are stand-ins that remember how they were called, behind the real libtvm_ffi.so;
//! no memory of a GPU is touched.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/native.rs"]
mod native;
#[path = "support/prefill.rs"]
mod prefill;

use std::cell::Cell;
use std::ffi::c_void;
use std::fs;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use flashinfer_rs::kernels::gdn::WORKSPACE_SIZE;
use flashinfer_rs::kernels::norm::{
    FusedAddRmsnorm, FusedAddRmsnormQuant, GemmaFusedAddRmsnorm, GemmaRmsnorm, NormOptions, Rmsnorm, RmsnormPerHead,
    RmsnormQuant, fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm,
    gemma_rmsnorm_in_place, layernorm, rmsnorm, rmsnorm_in_place, rmsnorm_quant,
};
use flashinfer_rs::{
    Arg, DType, Device, FlashInferError, FlashInferRuntime, GemmaRmsNormParams, Prepared, Result, RuntimeConfig,
    Stream, Tensor1DDesc, Tensor2DDesc, TensorMut, TensorRef,
};
use libloading::os::unix::Library;
use prefill::Prefill;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRng, TestRunner};

const GPU: Device = Device::Cuda(1);

/// The stand-ins, for one test at a time.
struct StandIns {
    runtime: &'static FlashInferRuntime,
    norm: Library,
    gdn: Library,
    cudart: Library,
    _alone: MutexGuard<'static, ()>,
}

impl StandIns {
    fn load() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = FOLDER.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            native::load(&native::compile("cudart.c", "libcudart.so.13", &["-DLAST_ERROR"], folder.path()), false);
            native::compile("launches.c", "norm.so", &[], folder.path());
            native::compile("launches.c", "gdn_prefill_sm90.so", &[], folder.path());
            let tvm_ffi = "libtvm_ffi.so";
            fs::copy(native::vendored_libraries().join(tvm_ffi), folder.path().join(tvm_ffi)).unwrap();
            // SAFETY: the test's own libraries, and the vendored one.
            let config = unsafe { RuntimeConfig::default().lib_dir(folder.path()).without_verification() };
            let runtime = FlashInferRuntime::initialize(config).unwrap();
            // Not all that were vendored: others have no stand-in.
            for name in ["norm.so", "gdn_prefill_sm90.so"] {
                runtime.module(name).unwrap();
            }
            folder
        });
        // SAFETY: they are loaded already, and have no initializers.
        let open = |name| unsafe { Library::new(folder.path().join(name)) }.unwrap();
        let (norm, gdn, cudart) = (open("norm.so"), open("gdn_prefill_sm90.so"), open("libcudart.so.13"));
        Self { runtime: FlashInferRuntime::global().unwrap(), norm, gdn, cudart, _alone }
    }

    fn read<T: Copy>(library: &Library, symbol: &str) -> T {
        // SAFETY: the fixture's variables, of these types, that nothing writes meanwhile.
        unsafe { **library.get::<*const T>(symbol.as_bytes()).unwrap() }
    }

    fn calls(&self) -> i64 {
        Self::read(&self.norm, "seen_calls")
    }

    fn stream(&self) -> usize {
        Self::read(&self.norm, "seen_stream")
    }

    fn values(&self) -> [i64; 11] {
        Self::read(&self.norm, "seen_values")
    }

    fn rows(&self) -> i64 {
        Self::read(&self.norm, "seen_rows")
    }

    fn set(library: &Library, symbol: &str, value: i32) {
        // SAFETY: the fixture's variable, that nothing else uses meanwhile.
        unsafe { **library.get::<*mut i32>(symbol.as_bytes()).unwrap() = value };
    }

    fn fail_next(&self) {
        Self::set(&self.norm, "fail_next", 1);
    }

    /// Leaves an error of CUDA's runtime on this thread.
    fn leave_error(&self, code: i32) {
        // SAFETY: the fixture's function, of this type.
        unsafe { self.cudart.get::<extern "C" fn(i32)>(b"leave_error").unwrap()(code) };
    }
}

fn stream(address: usize) -> Stream<'static> {
    // SAFETY: nothing is launched on it.
    unsafe { Stream::from_raw(address as *mut c_void) }
}

fn read(address: usize, dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    read_on(GPU, address, dtype, shape)
}

fn read_on(device: Device, address: usize, dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    // SAFETY: the stand-ins read nothing.
    unsafe { TensorRef::from_raw(address as *const c_void, device, dtype, shape, None) }.unwrap()
}

fn write(address: usize, dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    write_on(GPU, address, dtype, shape)
}

fn write_on(device: Device, address: usize, dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    // SAFETY: the stand-ins write nothing.
    unsafe { TensorMut::from_raw(address as *mut c_void, device, dtype, shape, None) }.unwrap()
}

/// How often a hundred turns of `f` allocate.
fn allocations(mut f: impl FnMut()) -> usize {
    counting::allocations(100, &mut f)
}

fn gdn_args(tokens: i64) -> Prefill<'static> {
    gdn_args_on(GPU, tokens)
}

fn gdn_args_on(device: Device, tokens: i64) -> Prefill<'static> {
    let read = |address, dtype, shape: &[i64]| read_on(device, address, dtype, shape);
    let write = |address, dtype, shape: &[i64]| write_on(device, address, dtype, shape);
    let (heads, bf16, f32) = (2, DType::BF16, DType::F32);
    Prefill {
        output: write(0x10_0000, bf16, &[tokens, heads, 128]),
        output_state: write(0x20_0000, f32, &[1, heads, 128, 128]),
        q: read(0x30_0000, bf16, &[tokens, heads, 128]),
        k: read(0x40_0000, bf16, &[tokens, heads, 128]),
        v: read(0x50_0000, bf16, &[tokens, heads, 128]),
        cu_seqlens: read(0x60_0000, DType::I64, &[2]),
        input_state: None,
        alpha: Some(read(0x70_0000, f32, &[tokens, heads])),
        beta: None,
        scale: 0.5,
        workspace: write(0x80_0000, DType::U8, &[WORKSPACE_SIZE]),
    }
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1u8)))), 100);
}

#[test]
fn no_launch_allocates() {
    let seen = StandIns::load();
    let calls = (seen.calls(), StandIns::read::<i64>(&seen.gdn, "seen_calls"));
    let options = NormOptions::default();
    let (shape, columns) = ([4, 4096], [4096]);
    let mut out = write(0x1000, DType::BF16, &shape);
    let (input, weight) = (read(0x2000, DType::BF16, &shape), read(0x3000, DType::BF16, &columns));
    let matrix = |address: usize| Tensor2DDesc {
        ptr: address as *const c_void,
        rows: 4,
        cols: 4096,
        stride_row: 4096,
        stride_col: 1,
        dtype: DType::BF16,
        device_id: 1,
    };
    let vector = Tensor1DDesc { ptr: 0x3000 as *const c_void, len: 4096, stride: 1, dtype: DType::BF16, device_id: 1 };
    let params = GemmaRmsNormParams::new(matrix(0x2000), vector, matrix(0x1000), 1e-6, 0x10 as *mut c_void);
    // SAFETY: the stand-in touches nothing.
    let flat = allocations(|| unsafe { flashinfer_rs::gemma_rmsnorm(&params) }.unwrap());
    assert_eq!(flat, 0, "flat");

    let mut all = || {
        gemma_rmsnorm(&mut out, &input, &weight, &options, stream(0x10)).unwrap();
        rmsnorm(&mut out, &input, &weight, &options, stream(0x10)).unwrap();
        fused_add_rmsnorm(&mut write(0x4000, DType::BF16, &shape), &mut out, &weight, &options, stream(0x10)).unwrap();
        let mut eight = write(0x5000, DType::F8E4M3, &shape);
        rmsnorm_quant(&mut eight, &input, &weight, 0.5, &options, stream(0x10)).unwrap();
        // SAFETY: the stand-in touches nothing.
        unsafe { gdn_args(64).call(stream(0x10)) }.unwrap();
    };
    assert_eq!(allocations(&mut all), 0, "eager");
    assert_eq!(allocations(|| seen.runtime.on((GPU, stream(0x20)), |_| all()).unwrap()), 0, "in a scope");

    let norm = Prepared::<GemmaRmsnorm>::new(&out, &input, &weight, &options).unwrap();
    let gdn = gdn_args(64).prepare().unwrap();
    let prepared = allocations(|| {
        norm.launch(&mut out, &input, &weight, stream(0x10)).unwrap();
        let mut other = write(0x7000, DType::BF16, &shape);
        norm.launch(&mut other, &read(0x6000, DType::BF16, &shape), &weight, stream(0x10)).unwrap();
        // SAFETY: the stand-in touches nothing.
        unsafe { gdn_args(64).launch(&gdn, stream(0x10)) }.unwrap();
    });
    assert_eq!(prepared, 0, "prepared");
    // 101 rounds of each, and every one was a call.
    assert_eq!(seen.calls() - calls.0, 101 * 11);
    assert_eq!(StandIns::read::<i64>(&seen.gdn, "seen_calls") - calls.1, 101 * 3);
}

#[test]
fn a_scope_sets_its_stream_for_the_calls_on_it_and_no_others() {
    let seen = StandIns::load();
    let mut out = write(0x1000, DType::F16, &[1, 8]);
    let (input, weight) = (read(0x2000, DType::F16, &[1, 8]), read(0x3000, DType::F16, &[8]));
    let mut used = |stream: Stream<'_>| {
        gemma_rmsnorm(&mut out, &input, &weight, &NormOptions::default(), stream).unwrap();
        seen.stream()
    };
    let on = |address| (GPU, stream(address));
    assert_eq!(used(stream(0x10)), 0x10);
    let streams = seen.runtime.on(on(0x20), |outer| {
        let first = [used(outer), used(stream(0x30)), used(outer)];
        // Within another scope the outer stream is no longer this thread's: it must be set for the call.
        let nested = seen.runtime.on(on(0x40), |inner| [used(inner), used(outer), used(inner)]).unwrap();
        // One of another device in between changes nothing here, nor does one that panics.
        let other = seen.runtime.on((Device::Cuda(0), stream(0x50)), |_| used(outer)).unwrap();
        let panicked = std::panic::catch_unwind(|| seen.runtime.on(on(0x60), |_| panic!("on purpose")));
        assert!(panicked.is_err());
        (first, nested, other, used(outer))
    });
    assert_eq!(streams.unwrap(), ([0x20, 0x30, 0x20], [0x40, 0x20, 0x40], 0x20, 0x20));
    // Outside nothing is set: the null stream is what it was before, and the scopes' own streams are set for each call.
    assert_eq!(used(Stream::NULL), 0);
    for address in [0x20, 0x40, 0x60] {
        assert_eq!(used(stream(address)), address);
        assert_eq!(used(Stream::NULL), 0);
    }
    // A scope within another gives the thread back to it.
    let streams = seen.runtime.on(on(0x20), |outer| {
        seen.runtime.on(on(0x40), |_| ()).unwrap();
        [used(stream(0x40)), used(outer)]
    });
    assert_eq!(streams.unwrap(), [0x40, 0x20]);
}

#[test]
fn a_scope_serves_tensors_of_another_device_too() {
    let seen = StandIns::load();
    let mut out = write(0x1000, DType::F16, &[1, 8]);
    let (input, weight) = (read(0x2000, DType::F16, &[1, 8]), read(0x3000, DType::F16, &[8]));
    let of_another = seen.runtime.on((Device::Cuda(0), stream(0x20)), |s| {
        gemma_rmsnorm(&mut out, &input, &weight, &NormOptions::default(), s)?;
        Ok::<_, FlashInferError>(seen.stream())
    });
    assert_eq!(of_another.unwrap().unwrap(), 0x20);
}

#[test]
fn a_scope_of_the_host_is_just_run() {
    let seen = StandIns::load();
    assert_eq!(seen.runtime.on((Device::Cpu, Stream::NULL), |_| 7).unwrap(), 7);
    let error = seen.runtime.on((Device::Cuda(2), Stream::NULL), |_| panic!("is not run")).unwrap_err();
    assert!(matches!(error, FlashInferError::DeviceOutOfRange { device: 2, count: 2 }), "{error}");
}

/// What the last norm was called with.
type Seen = ([i64; 11], i64, [i32; 11], usize);

#[test]
fn a_prepared_call_passes_what_the_plain_one_does() {
    let seen = StandIns::load();
    let options = NormOptions::default().with_eps(0.25).with_pdl(true);
    let last = || -> Seen { (seen.values(), seen.rows(), StandIns::read(&seen.norm, "seen_types"), seen.stream()) };
    let s = stream(0x10);
    let (mut a, mut b) = (write(0x1000, DType::F16, &[2, 8]), write(0x2000, DType::F16, &[2, 8]));
    let (w, i) = (read(0x3000, DType::F16, &[8]), read(0x4000, DType::F16, &[2, 8]));
    let mut e = write(0x5000, DType::F8E5M2, &[2, 8]);
    let (mut heads, per_head) = (write(0x6000, DType::F16, &[2, 3, 8]), read(0x7000, DType::F16, &[2, 3, 8]));
    /// A plain call, then another one, then the prepared one.
    macro_rules! same {
        ($plain:expr, $prepared:expr) => {{
            $plain.unwrap();
            let expected = last();
            let (mut out, input) = (write(0x9000, DType::BF16, &[1, 16]), read(0x9000, DType::BF16, &[1, 16]));
            let weight = read(0x9000, DType::BF16, &[16]);
            gemma_rmsnorm(&mut out, &input, &weight, &NormOptions::default(), Stream::NULL).unwrap();
            assert_ne!(last(), expected);
            $prepared.unwrap();
            assert_eq!(last(), expected);
        }};
    }
    let rows = Prepared::<Rmsnorm>::new(&a, &i, &w, &options).unwrap();
    same!(rmsnorm(&mut a, &i, &w, &options, s), rows.launch(&mut a, &i, &w, s));
    same!(rmsnorm_in_place(&mut a, &w, &options, s), rows.launch_in_place(&mut a, &w, s));
    let of_heads = Prepared::<RmsnormPerHead>::new(&heads, &per_head, &w, &options).unwrap();
    same!(rmsnorm(&mut heads, &per_head, &w, &options, s), of_heads.launch(&mut heads, &per_head, &w, s));
    same!(rmsnorm_in_place(&mut heads, &w, &options, s), of_heads.launch_in_place(&mut heads, &w, s));
    let gemma = Prepared::<GemmaRmsnorm>::new(&a, &i, &w, &options).unwrap();
    same!(gemma_rmsnorm(&mut a, &i, &w, &options, s), gemma.launch(&mut a, &i, &w, s));
    same!(gemma_rmsnorm_in_place(&mut a, &w, &options, s), gemma.launch_in_place(&mut a, &w, s));
    let fused = Prepared::<FusedAddRmsnorm>::new(&a, &b, &w, &options).unwrap();
    same!(fused_add_rmsnorm(&mut a, &mut b, &w, &options, s), fused.launch(&mut a, &mut b, &w, s));
    let fused = Prepared::<GemmaFusedAddRmsnorm>::new(&a, &b, &w, &options).unwrap();
    same!(gemma_fused_add_rmsnorm(&mut a, &mut b, &w, &options, s), fused.launch(&mut a, &mut b, &w, s));
    let quant = Prepared::<RmsnormQuant>::new(&e, &i, &w, 0.5, &options).unwrap();
    same!(rmsnorm_quant(&mut e, &i, &w, 0.5, &options, s), quant.launch(&mut e, &i, &w, s));
    let quant = Prepared::<FusedAddRmsnormQuant>::new(&e, &i, &b, &w, 0.5, &options).unwrap();
    same!(fused_add_rmsnorm_quant(&mut e, &i, &mut b, &w, 0.5, &options, s), quant.launch(&mut e, &i, &mut b, &w, s));
}

#[test]
fn a_prepared_prefill_passes_what_the_plain_one_does() {
    let seen = StandIns::load();
    let found = || {
        let values: [i64; 11] = StandIns::read(&seen.gdn, "seen_values");
        let types: [i32; 11] = StandIns::read(&seen.gdn, "seen_types");
        (values, types, StandIns::read::<usize>(&seen.gdn, "seen_stream"))
    };
    let with_options = || Prefill {
        input_state: Some(read(0x90_0000, DType::F32, &[1, 2, 128, 128])),
        beta: Some(read(0xA0_0000, DType::F32, &[64, 2])),
        ..gdn_args(64)
    };
    for args in [gdn_args as fn(i64) -> Prefill<'static>, |_| Prefill { alpha: None, ..gdn_args(64) }] {
        // SAFETY: the stand-in touches nothing.
        unsafe {
            args(64).call(stream(0x10)).unwrap();
            let expected = found();
            with_options().call(stream(0x20)).unwrap();
            assert_ne!(found(), expected);
            args(64).launch(&args(64).prepare().unwrap(), stream(0x10)).unwrap();
            assert_eq!(found(), expected);
        }
    }
    let prepared = with_options().prepare().unwrap();
    let launch = |args: Prefill<'static>| {
        // SAFETY: as above.
        unsafe { args.launch(&prepared, stream(0x10)) }
    };
    let beta = Some(read(0xB0_0000, DType::F32, &[64, 2]));
    launch(Prefill { beta, workspace: write(0xC0_0000, DType::U8, &[WORKSPACE_SIZE]), ..with_options() }).unwrap();
    let (values, ..) = found();
    assert_eq!((values[6], values[7], values[8], values[10]), (0x90_0000, 0x70_0000, 0xB0_0000, 0xC0_0000));
    let refused = |args: Prefill<'static>, message: &str| {
        let error = launch(args).unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { function: "gdn_prefill", .. }), "{error}");
        assert!(error.to_string().contains(message), "{error}");
    };
    // TMA wants a workspace aligned to 64 bytes, and the first was.
    let workspace = write(0xC0_0010, DType::U8, &[WORKSPACE_SIZE]);
    refused(Prefill { workspace, ..with_options() }, "aligned to 64 bytes");
    refused(Prefill { alpha: None, ..with_options() }, "alpha is absent, expected F32[64, 2]");
    let without = gdn_args(64).prepare().unwrap();
    // SAFETY: as above.
    let error = unsafe { with_options().launch(&without, stream(0x10)) }.unwrap_err();
    assert!(error.to_string().contains("expected absent, as it was prepared"), "{error}");
    // A workspace that is too small is found when it is prepared.
    let small = Prefill { workspace: write(0x80_0000, DType::U8, &[WORKSPACE_SIZE - 1]), ..gdn_args(64) };
    let error = small.prepare().unwrap_err();
    assert!(error.to_string().contains("131071 bytes long, expected 131072 bytes or more"), "{error}");
    // One of another rank was once looked at before it was checked.
    let flat = Prefill { q: read(0x30_0000, DType::BF16, &[64]), ..gdn_args(64) };
    let error = flat.prepare().unwrap_err();
    assert!(error.to_string().contains("q is of shape [64], expected 3 dimensions"), "{error}");
}

#[test]
fn tensors_past_the_kernels_limit_are_cut_the_same_way() {
    let seen = StandIns::load();
    let rows = (1 << 20) + 64;
    let shape = [rows, 4096];
    let options = NormOptions::default();
    let (out, input) = (0x1000_0000, 0x9000_0000_0000usize);
    let (mut to, weight) = (write(out, DType::F16, &shape), read(0x3000, DType::F16, &[4096]));
    let prepared = Prepared::<Rmsnorm>::new(&to, &read(input, DType::F16, &shape), &weight, &options).unwrap();
    let last = |launch: &mut dyn FnMut()| {
        let before = seen.calls();
        launch();
        (seen.calls() - before, seen.rows(), seen.values()[0] as usize - out, seen.values()[1] as usize)
    };
    let plain = last(&mut || {
        rmsnorm(&mut to, &read(input, DType::F16, &shape), &weight, &options, Stream::NULL).unwrap();
    });
    let cut = 1usize << 33;
    assert_eq!(plain, (2, 64, cut, input + cut));
    // Both parts move with the tensor, downwards too.
    for from in [input, input + 0x1000, input - 0x2000] {
        let tensor = read(from, DType::F16, &shape);
        let launch = &mut || prepared.launch(&mut to, &tensor, &weight, Stream::NULL).unwrap();
        assert_eq!(last(launch), (2, 64, cut, from + cut));
    }
    for shape in [[0, 8], [5, 0]] {
        let (mut to, from) = (write(out, DType::F16, &shape), read(input, DType::F16, &shape));
        let weight = read(0x3000, DType::F16, &shape[1..]);
        let empty = Prepared::<Rmsnorm>::new(&to, &from, &weight, &options).unwrap();
        let before = seen.calls();
        empty.launch(&mut to, &from, &weight, Stream::NULL).unwrap();
        rmsnorm(&mut to, &from, &weight, &options, Stream::NULL).unwrap();
        assert_eq!(seen.calls(), before, "nothing to do launches nothing");
    }
}

#[test]
fn what_differs_from_what_was_prepared_is_refused() {
    let seen = StandIns::load();
    let shape = [4, 64];
    let (mut out, weight) = (write(0x1000, DType::F16, &shape), read(0x3000, DType::F16, &[64]));
    let options = NormOptions::default();
    let input = read(0x2000, DType::F16, &shape);
    let prepared = Prepared::<GemmaRmsnorm>::new(&out, &input, &weight, &options).unwrap();
    // SAFETY: the stand-ins read nothing.
    let raw = |device, shape: &[i64], strides: Option<&[i64]>| unsafe {
        TensorRef::from_raw(0x4000 as *const c_void, device, DType::F16, shape, strides).unwrap()
    };
    let calls = seen.calls();
    let bad = [
        (read(0x4000, DType::BF16, &shape), "out is F16, expected BF16, as input"),
        (raw(Device::Cuda(0), &shape, None), "out is on cuda:1, expected memory of cuda:0"),
        (raw(GPU, &[5, 64], None), "out is of shape [4, 64], expected shape [5, 64]"),
        (raw(GPU, &shape, Some(&[128, 1])), "input is F16[4, 64] strided [128, 1] on cuda:1, expected F16[4, 64]"),
        (read(0x4008, DType::F16, &shape), "expected memory aligned to 16 bytes"),
        (raw(GPU, &[4, 1, 64], None), "input is of shape [4, 1, 64], expected 2 dimensions"),
    ];
    for (tensor, message) in bad {
        let error = prepared.launch(&mut out, &tensor, &weight, stream(0x10)).unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { function: "gemma_rmsnorm", .. }), "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
    // All of them fit each other, and yet are not what was prepared.
    let (mut other, weight_of_other) = (write(0x1000, DType::F16, &[4, 128]), read(0x3000, DType::F16, &[128]));
    let input_of_other = read(0x2000, DType::F16, &[4, 128]);
    let error = prepared.launch(&mut other, &input_of_other, &weight_of_other, stream(0x10)).unwrap_err();
    assert!(error.to_string().contains("as it was prepared; prepare another call for it"), "{error}");
    assert_eq!(seen.calls(), calls, "nothing was launched");
    // None of that changed the call.
    prepared.launch(&mut out, &input, &weight, stream(0x10)).unwrap();
    assert_eq!(seen.values()[..3], [0x1000, 0x2000, 0x3000]);
}

#[test]
fn a_prepared_call_that_fails_says_why_and_can_be_launched_again() {
    let seen = StandIns::load();
    let (mut out, input) = (write(0x1000, DType::F16, &[1, 8]), read(0x2000, DType::F16, &[1, 8]));
    let (weight, options) = (read(0x3000, DType::F16, &[8]), NormOptions::default());
    let prepared = Prepared::<Rmsnorm>::new(&out, &input, &weight, &options).unwrap();
    seen.fail_next();
    let error = prepared.launch(&mut out, &input, &weight, stream(0x10)).unwrap_err();
    assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
    assert!(error.to_string().contains("as the test asked"), "{error}");
    prepared.launch(&mut out, &input, &weight, stream(0x10)).unwrap();
    // What breaks the contract is found when it is prepared.
    let error = Prepared::<Rmsnorm>::new(&out, &input, &read(0x3000, DType::F32, &[8]), &options).unwrap_err();
    assert!(error.to_string().contains("weight is F32, expected F16"), "{error}");
}

/// Every norm, eager and prepared, with its name.
fn every_norm(mut with: impl FnMut(&str, &mut dyn FnMut() -> Result<()>)) {
    let (options, s) = (NormOptions::default(), stream(0x10));
    let shape = [4, 64];
    let (mut a, mut b) = (write(0x1000, DType::BF16, &shape), write(0x2000, DType::BF16, &shape));
    let (w, i) = (read(0x3000, DType::BF16, &[64]), read(0x4000, DType::BF16, &shape));
    let (gamma, beta) = (read(0x5000, DType::F32, &[64]), read(0x6000, DType::F32, &[64]));
    let mut e = write(0x7000, DType::F8E4M3, &shape);
    let (mut heads, per_head) = (write(0x8000, DType::BF16, &[4, 2, 64]), read(0x9000, DType::BF16, &[4, 2, 64]));
    with("rmsnorm", &mut || rmsnorm(&mut a, &i, &w, &options, s));
    with("rmsnorm of heads", &mut || rmsnorm(&mut heads, &per_head, &w, &options, s));
    with("gemma_rmsnorm", &mut || gemma_rmsnorm(&mut a, &i, &w, &options, s));
    with("fused_add_rmsnorm", &mut || fused_add_rmsnorm(&mut a, &mut b, &w, &options, s));
    with("gemma_fused_add_rmsnorm", &mut || gemma_fused_add_rmsnorm(&mut a, &mut b, &w, &options, s));
    with("rmsnorm_quant", &mut || rmsnorm_quant(&mut e, &i, &w, 0.5, &options, s));
    with("fused_add_rmsnorm_quant", &mut || fused_add_rmsnorm_quant(&mut e, &i, &mut b, &w, 0.5, &options, s));
    with("layernorm", &mut || layernorm(&mut a, &i, &gamma, &beta, 1e-6, s));
    let prepared = Prepared::<Rmsnorm>::new(&a, &i, &w, &options).unwrap();
    with("a prepared rmsnorm", &mut || prepared.launch(&mut a, &i, &w, s));
}

/// Whatever a launcher answers: upstream's layernorm answers success. That the others are as the stand-ins have them,
/// tests/failing_launches.rs shows with the real library.
#[test]
fn a_launch_that_fails_is_an_error_whatever_the_wrapper_answers() {
    let seen = StandIns::load();
    every_norm(|name, call| {
        call().unwrap();
        StandIns::set(&seen.norm, "launch_fails_with", 209);
        let error = call().unwrap_err();
        StandIns::set(&seen.norm, "launch_fails_with", 0);
        match error {
            FlashInferError::Cuda { code: 209, call: "layernorm", .. } if name == "layernorm" => {}
            FlashInferError::TvmFfiCall { message, .. } if name != "layernorm" && message.contains("209") => {}
            other => panic!("{name}: {other}"),
        }
        // And it is over then: the next one is not blamed.
        call().unwrap_or_else(|error| panic!("{name}: {error}"));
    });
    StandIns::set(&seen.gdn, "launch_fails_with", 209);
    // SAFETY: the stand-in touches nothing.
    let error = unsafe { gdn_args(64).call(stream(0x10)) }.unwrap_err();
    StandIns::set(&seen.gdn, "launch_fails_with", 0);
    assert!(error.to_string().contains("209"), "{error}");
    // SAFETY: as above.
    unsafe { gdn_args(64).call(stream(0x10)) }.unwrap();
}

#[test]
fn an_error_that_another_call_left_is_not_blamed_on_a_launch() {
    let seen = StandIns::load();
    every_norm(|name, call| {
        seen.leave_error(9);
        call().unwrap_or_else(|error| panic!("{name}: {error}"));
    });
    seen.leave_error(9);
    // SAFETY: the stand-in touches nothing.
    unsafe { gdn_args(64).call(stream(0x10)) }.unwrap();
}

/// `rmsnorm` past everything that this crate does for a call.
///
/// # Safety
/// None but that the library is the stand-in.
unsafe fn raw_norm(runtime: &'static FlashInferRuntime, columns: i64) -> Result<()> {
    let function = runtime.module("norm.so")?.function("rmsnorm")?;
    let (mut out, input) = (write(0x1000, DType::F16, &[1, columns]), read(0x2000, DType::F16, &[1, columns]));
    let weight = read(0x3000, DType::F16, &[columns]);
    let (out, input, weight) = (out.pack(), input.pack(), weight.pack());
    let args = [Arg::tensor(&out), Arg::tensor(&input), Arg::tensor(&weight), Arg::float(1e-6), Arg::bool(false)];
    // SAFETY: the stand-in touches no memory.
    unsafe { function.launch(&args) }
}

/// How many of many calls fail, by eight threads with rows of different lengths.
fn failures_of_threads(call: impl Fn(i64) -> Result<()> + Sync) -> usize {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                let call = &call;
                scope.spawn(move || (0..40).filter(|turn| call(8 << ((thread + turn) % 4)).is_err()).count())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    })
}

/// A norm sets its kernel's shared memory to what its own row needs, and then launches: two threads must not do so at once.
#[test]
fn threads_whose_norms_set_attributes_take_turns() {
    let seen = StandIns::load();
    StandIns::set(&seen.norm, "slowly", 1);
    let options = NormOptions::default();
    let plain = |columns: i64| {
        let (shape, mut out) = ([1, columns], write(0x1000, DType::F16, &[1, columns]));
        let (input, weight) = (read(0x2000, DType::F16, &shape), read(0x3000, DType::F16, &[columns]));
        rmsnorm(&mut out, &input, &weight, &options, stream(0x10))
    };
    assert_eq!(failures_of_threads(plain), 0, "plain");
    let prepared = [8, 16, 32, 64].map(|columns| {
        let (shape, out) = ([1, columns], write(0x1000, DType::F16, &[1, columns]));
        let (input, weight) = (read(0x2000, DType::F16, &shape), read(0x3000, DType::F16, &[columns]));
        Prepared::<Rmsnorm>::new(&out, &input, &weight, &options).unwrap()
    });
    let of_prepared = |columns: i64| {
        let (shape, mut out) = ([1, columns], write(0x1000, DType::F16, &[1, columns]));
        let (input, weight) = (read(0x2000, DType::F16, &shape), read(0x3000, DType::F16, &[columns]));
        prepared[columns.trailing_zeros() as usize - 3].launch(&mut out, &input, &weight, stream(0x10))
    };
    assert_eq!(failures_of_threads(of_prepared), 0, "prepared");
    // Without turns the stand-in finds it.
    // SAFETY: the stand-in touches nothing.
    let unguarded = failures_of_threads(|columns| unsafe { raw_norm(seen.runtime, columns) });
    assert!(unguarded > 0, "nobody came between");
    StandIns::set(&seen.norm, "slowly", 0);
}

/// A number of a dimension or a stride, where something changes: small, even, whole vectors, around 32 bits, absurd.
fn sizes() -> impl Strategy<Value = i64> {
    prop_oneof![
        4 => (0i64..20).prop_map(|n| n * 8),
        2 => -2i64..40,
        2 => prop_oneof![Just(29_024i64), Just(58_080), Just(58_088), Just(131_072)],
        1 => (-9i64..10, 30u32..34).prop_map(|(n, bits)| n + (1i64 << bits)),
        1 => any::<i64>(),
    ]
}

#[derive(Debug, Clone)]
struct Odd {
    address: usize,
    gpu: bool,
    dtype: DType,
    shape: Vec<i64>,
    strides: Option<Vec<i64>>,
}

impl Odd {
    fn device(&self) -> Device {
        if self.gpu { GPU } else { Device::Cuda(0) }
    }

    fn read(&self) -> Option<TensorRef<'static>> {
        let (data, strides) = (self.address as *const c_void, self.strides.as_deref());
        // SAFETY: the stand-ins read nothing.
        unsafe { TensorRef::from_raw(data, self.device(), self.dtype, &self.shape, strides) }.ok()
    }

    fn write(&self) -> Option<TensorMut<'static>> {
        let (data, strides) = (self.address as *mut c_void, self.strides.as_deref());
        // SAFETY: the stand-ins write nothing.
        unsafe { TensorMut::from_raw(data, self.device(), self.dtype, &self.shape, strides) }.ok()
    }
}

/// What mostly is as the first part says, and sometimes as the second.
fn mostly<T: Clone + std::fmt::Debug + 'static>(
    usual: T,
    other: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = T> {
    prop_oneof![12 => Just(usual), 1 => other]
}

/// Tensors that nearly fit each other.
fn tensors(ranks: [usize; 4]) -> impl Strategy<Value = [Odd; 4]> {
    let dtypes = prop_oneof![Just(DType::F16), Just(DType::BF16), Just(DType::F32), Just(DType::U8), Just(DType::I64)];
    (sizes(), sizes(), dtypes).prop_flat_map(move |(rows, columns, dtype)| {
        ranks.map(|rank| {
            let shape: Vec<i64> = [rows, columns][2 - rank.min(2)..].to_vec();
            let dense = if rank == 2 { vec![columns, 1] } else { vec![1] };
            let rank = shape.len();
            let other = move || proptest::collection::vec(sizes(), rank);
            let strides = mostly(Some(dense), prop_oneof![Just(None), other().prop_map(Some)]);
            let address = mostly(0x1000usize, (0usize..0x40).prop_map(|n| 0x1000 + n));
            let dtypes = prop_oneof![Just(DType::F16), Just(DType::F32), Just(DType::F8E4M3), Just(DType::I32)];
            (address, mostly(true, Just(false)), mostly(dtype, dtypes), mostly(shape, other()), strides)
                .prop_map(|(address, gpu, dtype, shape, strides)| Odd { address, gpu, dtype, shape, strides })
        })
    })
}

/// A prepared call compares forms alone: whatever it launches, the plain call must launch too.
#[test]
fn what_a_prepared_call_launches_keeps_the_contract() {
    let _alone = StandIns::load();
    let (accepted, refused) = (Cell::new(0), Cell::new(0));
    let mut runner = TestRunner::new_with_rng(
        Config { cases: 10_000, failure_persistence: None, ..Config::default() },
        TestRng::deterministic_rng(Default::default()),
    );
    let strategy = tensors([2, 2, 1, 2]).prop_flat_map(|first| {
        let changed = first.clone().map(|tensor| {
            let other = (0usize..0x40, sizes(), any::<bool>()).prop_map({
                let tensor = tensor.clone();
                move |(offset, size, strides)| {
                    let mut other = Odd { address: 0x1000 + offset, ..tensor.clone() };
                    match (strides, &mut other.strides) {
                        (true, Some(strides)) => strides[0] = size,
                        _ => other.shape[0] = size,
                    }
                    other
                }
            });
            mostly(tensor, other)
        });
        (Just(first), changed, any::<bool>())
    });
    let outcome = runner.run(&strategy, |([a, b, w, c], [a2, b2, w2, c2], fused)| {
        let (Some(a), Some(b), Some(c), Some(w)) = (a.write(), b.write(), c.read(), w.read()) else {
            return Ok(());
        };
        let (Some(mut a2), Some(mut b2), Some(c2), Some(w2)) = (a2.write(), b2.write(), c2.read(), w2.read()) else {
            return Ok(());
        };
        // Of so many launches each, no memory could hold the tensors.
        let long = |shape: &[i64], strides: &[i64]| shape[0] > 1 << 20 && strides[0] > 1 << 20;
        if [&a, &b, &a2, &b2].iter().any(|t| long(t.shape(), t.strides()))
            || [&c, &c2].iter().any(|t| long(t.shape(), t.strides()))
        {
            return Ok(());
        }
        let (options, s) = (NormOptions::default(), stream(0x10));
        let (prepared, plain) = if fused {
            let prepared = Prepared::<GemmaFusedAddRmsnorm>::new(&a, &b, &w, &options);
            let launched = prepared.and_then(|prepared| prepared.launch(&mut a2, &mut b2, &w2, s));
            (launched, gemma_fused_add_rmsnorm(&mut a2, &mut b2, &w2, &options, s))
        } else {
            let prepared = Prepared::<Rmsnorm>::new(&a, &c, &w, &options);
            let launched = prepared.and_then(|prepared| prepared.launch(&mut a2, &c2, &w2, s));
            (launched, rmsnorm(&mut a2, &c2, &w2, &options, s))
        };
        prop_assert!(prepared.is_err() || plain.is_ok(), "{:?}", plain);
        let count = if prepared.is_ok() { &accepted } else { &refused };
        count.set(count.get() + 1);
        Ok(())
    });
    outcome.unwrap();
    assert!(accepted.get() > 500 && refused.get() > 500, "{accepted:?} {refused:?}");
}

/// The same of GDN prefill, one thing changed at a time.
#[test]
fn what_a_prepared_prefill_launches_keeps_the_contract() {
    let _alone = StandIns::load();
    let (accepted, refused) = (Cell::new(0), Cell::new(0));
    let mut runner = TestRunner::new_with_rng(
        Config { cases: 5_000, failure_persistence: None, ..Config::default() },
        TestRng::deterministic_rng(Default::default()),
    );
    let strides = proptest::collection::vec(sizes(), 1..5);
    let odd = (
        0usize..9,
        prop_oneof![Just(0x1000usize), 0x1000usize..0x1100],
        prop_oneof![Just(None), strides.prop_map(Some)],
    );
    let outcome = runner.run(&(odd, mostly(64, 1i64..300)), |((which, address, strides), tokens)| {
        let shape = match which {
            0..=3 => vec![tokens, 2, 128],
            4 => vec![1, 2, 128, 128],
            5 => vec![2],
            6 | 7 => vec![tokens, 2],
            _ => vec![WORKSPACE_SIZE - 64 + tokens],
        };
        let dtype = [DType::BF16, DType::F32, DType::I64, DType::U8][[0, 0, 0, 0, 1, 2, 1, 1, 3][which]];
        let odd = Odd { address, gpu: true, dtype, shape, strides };
        let (Some(_), Some(_)) = (odd.read(), odd.write()) else { return Ok(()) };
        let changed = || {
            let mut args = gdn_args(64);
            let (read, write) = (odd.read().unwrap(), odd.write().unwrap());
            match which {
                0 => args.q = read,
                1 => args.k = read,
                2 => args.v = read,
                3 => args.output = write,
                4 => args.output_state = write,
                5 => args.cu_seqlens = read,
                6 => args.alpha = Some(read),
                7 => args.beta = Some(read),
                _ => args.workspace = write,
            }
            args
        };
        // SAFETY: the stand-in touches nothing.
        let (result, launched) = unsafe {
            let prepared = Prefill { beta: changed().beta, ..gdn_args(64) }.prepare();
            let launched = prepared.and_then(|prepared| changed().launch(&prepared, stream(0x10)));
            (changed().call(stream(0x10)), launched)
        };
        prop_assert!(launched.is_err() || result.is_ok(), "{:?}", result);
        let count = if result.is_ok() { &accepted } else { &refused };
        count.set(count.get() + 1);
        Ok(())
    });
    outcome.unwrap();
    assert!(accepted.get() > 500 && refused.get() > 500, "{accepted:?} {refused:?}");
}

/// Descriptors of raw memory are not made into tensors where they are plainly right: it must not matter.
#[test]
fn the_flat_form_decides_as_tensors_do() {
    let seen = StandIns::load();
    let (accepted, refused) = (Cell::new(0), Cell::new(0));
    let mut runner = TestRunner::new_with_rng(
        Config { cases: 10_000, failure_persistence: None, ..Config::default() },
        TestRng::deterministic_rng(Default::default()),
    );
    let addresses = mostly(false, Just(true));
    let outcome =
        runner.run(&(tensors([2, 2, 1, 1]), addresses, mostly(0, -3i32..5)), |([a, b, w, _], null, device)| {
            let strides = |odd: &Odd| odd.strides.clone().unwrap_or_else(|| vec![1; odd.shape.len()]);
            if a.shape[0] > 1 << 20 {
                return Ok(());
            }
            let id = |odd: &Odd| if odd.gpu { 1 } else { device };
            let matrix = |odd: &Odd| Tensor2DDesc {
                ptr: if null { std::ptr::null() } else { odd.address as *const c_void },
                rows: odd.shape[0],
                cols: odd.shape[1],
                stride_row: strides(odd)[0],
                stride_col: strides(odd)[1],
                dtype: odd.dtype,
                device_id: id(odd),
            };
            let vector = Tensor1DDesc {
                ptr: w.address as *const c_void,
                len: w.shape[0],
                stride: strides(&w)[0],
                dtype: w.dtype,
                device_id: id(&w),
            };
            let params = GemmaRmsNormParams::new(matrix(&a), vector, matrix(&b), 1e-6, 0x10 as *mut c_void);
            let called = |result: Result<()>, before: i64| {
                let launches = seen.calls() - before;
                result
                    .map(|()| (launches, seen.values(), seen.rows(), seen.stream()))
                    .map_err(|error| error.to_string())
            };
            let before = seen.calls();
            // SAFETY: the stand-in touches nothing.
            let flat = called(unsafe { flashinfer_rs::gemma_rmsnorm(&params) }, before);
            let on = |device_id| u32::try_from(device_id).map(Device::Cuda);
            let tensors = |m: &Tensor2DDesc| {
                let (shape, strides, device) = ([m.rows, m.cols], [m.stride_row, m.stride_col], on(m.device_id).ok()?);
                // SAFETY: likewise.
                unsafe { TensorRef::from_raw(m.ptr, device, m.dtype, &shape, Some(&strides)) }.ok()
            };
            let plain = (|| {
                let (input, out) = (tensors(&params.input)?, &params.out);
                let (shape, strides, device) =
                    ([out.rows, out.cols], [out.stride_row, out.stride_col], on(out.device_id).ok()?);
                // SAFETY: likewise.
                let out = unsafe { TensorMut::from_raw(out.ptr.cast_mut(), device, out.dtype, &shape, Some(&strides)) };
                let (device, v) = (on(vector.device_id).ok()?, vector);
                // SAFETY: likewise.
                let weight = unsafe { TensorRef::from_raw(v.ptr, device, v.dtype, &[v.len], Some(&[v.stride])) };
                let before = seen.calls();
                let options = NormOptions::default();
                let result = gemma_rmsnorm(&mut out.ok()?, &input, &weight.ok()?, &options, stream(0x10));
                Some(called(result, before))
            })();
            match plain {
                Some(plain) => prop_assert_eq!(&flat, &plain),
                // No tensor can be made of it.
                None => prop_assert!(flat.is_err()),
            }
            let count = if flat.is_ok() { &accepted } else { &refused };
            count.set(count.get() + 1);
            Ok(())
        });
    outcome.unwrap();
    assert!(accepted.get() > 500 && refused.get() > 500, "{accepted:?} {refused:?}");
}

/// Upstream's `run failed` on a second GPU, with threads that make the first calls of two kernels on two GPUs at once, and
/// go on while others are made.
#[test]
fn every_kernels_first_call_on_a_device_finds_its_flag_cleared() {
    native::isolated("every_kernels_first_call_on_a_device_finds_its_flag_cleared", || {
        let seen = StandIns::load();
        std::thread::scope(|scope| {
            for thread in 0..8u32 {
                scope.spawn(move || {
                    for turn in 0..400u32 {
                        let choice = (turn / 100 + thread) % 4;
                        let args = gdn_args_on(Device::Cuda(choice % 2), 64);
                        let alpha = args.alpha.clone().filter(|_| choice > 1);
                        // SAFETY: the stand-in touches nothing.
                        unsafe { Prefill { alpha, ..args }.call(stream(0x10)) }.unwrap();
                    }
                });
            }
        });
        assert!(StandIns::read::<i64>(&seen.gdn, "seen_calls") > 0);
    });
}

/// A program that becomes a daemon closes every descriptor, also those that libraries were loaded through.
#[test]
fn flags_are_found_after_every_descriptor_was_closed() {
    native::isolated("flags_are_found_after_every_descriptor_was_closed", || {
        let _seen = StandIns::load();
        // SAFETY: whoever owned the descriptors, the loader of this crate above all, is what is tested; the test itself
        // holds none.
        let result = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
        assert_eq!(result, 0, "close_range: {}", std::io::Error::last_os_error());
        for gpu in [0, 1] {
            // SAFETY: the stand-in touches nothing.
            unsafe { gdn_args_on(Device::Cuda(gpu), 64).call(stream(0x10)) }.unwrap();
        }
    });
}

/// The first call of each kernel clears the flags of all: never while another's launcher is between its look at its flag and
/// its launch, also where that one is ready everywhere.
#[test]
fn flags_are_cleared_while_no_call_is_under_way() {
    native::isolated("flags_are_cleared_while_no_call_is_under_way", || {
        let seen = StandIns::load();
        let plain = |gpu: u32| Prefill { alpha: None, ..gdn_args_on(Device::Cuda(gpu), 64) };
        for gpu in [0, 1] {
            // SAFETY: the stand-in touches nothing.
            unsafe { plain(gpu).call(stream(0x10)) }.unwrap();
        }
        StandIns::set(&seen.gdn, "slowly", 1);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let ready: Vec<_> = (0..4u32)
                .map(|thread| {
                    let done = &done;
                    scope.spawn(move || {
                        while !done.load(std::sync::atomic::Ordering::Relaxed) {
                            // SAFETY: the stand-in touches nothing.
                            unsafe { plain(thread % 2).call(stream(0x10)) }.unwrap();
                        }
                    })
                })
                .collect();
            // Eight other kernels, each for the first time on each GPU.
            for variant in 1..8u32 {
                for gpu in [0, 1] {
                    let args = gdn_args_on(Device::Cuda(gpu), 64);
                    let alpha = args.alpha.clone().filter(|_| variant & 1 != 0);
                    let (states, rates) = ([1, 2, 128, 128], [64, 2]);
                    let device = Device::Cuda(gpu);
                    let state = (variant & 2 != 0).then(|| read_on(device, 0x90_0000, DType::F32, &states));
                    let beta = (variant & 4 != 0).then(|| read_on(device, 0xA0_0000, DType::F32, &rates));
                    let args = Prefill { alpha, input_state: state, beta, ..args };
                    // SAFETY: the stand-in touches nothing.
                    unsafe { args.call(stream(0x10)) }.unwrap();
                }
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            ready.into_iter().for_each(|thread| thread.join().unwrap());
        });
    });
}
