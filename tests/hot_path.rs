//! What a launch does besides the kernel: nothing is allocated, streams are set where they must be, prepared calls are
//! what they were. The kernels' libraries are stand-ins that remember how they were called, behind the real libtvm_ffi.so;
//! no memory of a GPU is touched.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/native.rs"]
mod native;

use std::cell::Cell;
use std::ffi::c_void;
use std::fs;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use flashinfer_rs::kernels::gdn::{GdnPrefill, gdn_prefill};
use flashinfer_rs::kernels::norm::{
    NormOptions, fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm, rmsnorm,
    rmsnorm_quant,
};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, GemmaRmsNormParams, Prepared, RuntimeConfig, Stream,
    Tensor1DDesc, Tensor2DDesc, TensorMut, TensorRef,
};
use libloading::os::unix::Library;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRng, TestRunner};

const GPU: Device = Device::Cuda(1);

/// The stand-ins, for one test at a time.
struct StandIns {
    runtime: &'static FlashInferRuntime,
    norm: Library,
    gdn: Library,
    _alone: MutexGuard<'static, ()>,
}

impl StandIns {
    fn load() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = FOLDER.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            native::load(&native::compile("cudart.c", "libcudart.so.13", &[], folder.path()), false);
            native::compile("launches.c", "norm.so", &[], folder.path());
            native::compile("launches.c", "gdn_prefill_sm90.so", &[], folder.path());
            let tvm_ffi = "libtvm_ffi.so";
            fs::copy(native::vendored_libraries().join(tvm_ffi), folder.path().join(tvm_ffi)).unwrap();
            // SAFETY: the test's own libraries, and the vendored one.
            let config = unsafe { RuntimeConfig::default().lib_dir(folder.path()).without_verification() };
            FlashInferRuntime::initialize(config).unwrap().warm_up().unwrap();
            folder
        });
        // SAFETY: they are loaded already, and have no initializers.
        let open = |name| unsafe { Library::new(folder.path().join(name)) }.unwrap();
        let (norm, gdn) = (open("norm.so"), open("gdn_prefill_sm90.so"));
        Self { runtime: FlashInferRuntime::global().unwrap(), norm, gdn, _alone }
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

    fn fail_next(&self) {
        // SAFETY: the fixture's variable, that nothing else uses meanwhile.
        unsafe { **self.norm.get::<*mut i32>(b"fail_next").unwrap() = 1 };
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

fn gdn_args(tokens: i64) -> GdnPrefill<'static> {
    gdn_args_on(GPU, tokens)
}

fn gdn_args_on(device: Device, tokens: i64) -> GdnPrefill<'static> {
    let read = |address, dtype, shape: &[i64]| read_on(device, address, dtype, shape);
    let write = |address, dtype, shape: &[i64]| write_on(device, address, dtype, shape);
    let (heads, bf16, f32) = (2, DType::BF16, DType::F32);
    GdnPrefill {
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
        workspace: write(0x80_0000, DType::U8, &[132 * 128]),
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
        unsafe { gdn_prefill(gdn_args(64), stream(0x10)) }.unwrap();
    };
    assert_eq!(allocations(&mut all), 0, "eager");
    assert_eq!(allocations(|| seen.runtime.on((GPU, stream(0x20)), |_| all()).unwrap()), 0, "in a scope");

    let norm = Prepared::gemma_rmsnorm(
        write(0x1000, DType::BF16, &shape),
        read(0x2000, DType::BF16, &shape),
        read(0x3000, DType::BF16, &columns),
        &options,
    );
    let mut norm = norm.unwrap();
    // SAFETY: the stand-in touches nothing.
    let gdn = unsafe { Prepared::gdn_prefill(gdn_args(64)) }.unwrap();
    let prepared = allocations(|| {
        norm.launch(stream(0x10)).unwrap();
        gdn.launch(stream(0x10)).unwrap();
        norm.replace("input", read(0x6000, DType::BF16, &shape)).unwrap();
        norm.replace_mut("out", write(0x7000, DType::BF16, &shape)).unwrap();
    });
    assert_eq!(prepared, 0, "prepared");
    // 101 rounds of each, and every one was a call.
    assert_eq!(seen.calls() - calls.0, 101 * 10);
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
    // Outside nothing is set: the null stream is what it was before.
    assert_eq!(used(Stream::NULL), 0);
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

#[test]
fn a_prepared_call_passes_what_the_plain_one_does() {
    let seen = StandIns::load();
    let options = NormOptions::default().with_eps(0.25).with_pdl(true);
    let tensors = || {
        (
            write(0x1000, DType::F16, &[2, 8]),
            write(0x2000, DType::F16, &[2, 8]),
            read(0x3000, DType::F16, &[8]),
            read(0x4000, DType::F16, &[2, 8]),
            write(0x5000, DType::F8E5M2, &[2, 8]),
        )
    };
    let (mut a, mut b, w, i, mut e) = tensors();
    let s = stream(0x10);
    let (pa, pb, pw, pi, pe) = tensors();
    let check = |plain: &mut dyn FnMut(), prepared: flashinfer_rs::Result<Prepared<'_>>| {
        plain();
        let expected = (seen.values(), seen.rows(), StandIns::read::<[i32; 11]>(&seen.norm, "seen_types"));
        gemma_rmsnorm(
            &mut write(0x9000, DType::BF16, &[1, 16]),
            &read(0x9000, DType::BF16, &[1, 16]),
            &read(0x9000, DType::BF16, &[16]),
            &NormOptions::default(),
            Stream::NULL,
        )
        .unwrap();
        assert_ne!(seen.values(), expected.0);
        let prepared = prepared.unwrap();
        prepared.launch(s).unwrap();
        let found = (seen.values(), seen.rows(), StandIns::read::<[i32; 11]>(&seen.norm, "seen_types"));
        assert_eq!(found, expected, "{prepared:?}");
        assert_eq!(seen.stream(), 0x10);
    };
    check(&mut || rmsnorm(&mut a, &i, &w, &options, s).unwrap(), {
        Prepared::rmsnorm(pa, pi.reborrow(), pw.reborrow(), &options)
    });
    let (pa, ..) = tensors();
    check(&mut || gemma_rmsnorm(&mut a, &i, &w, &options, s).unwrap(), {
        Prepared::gemma_rmsnorm(pa, pi.reborrow(), pw.reborrow(), &options)
    });
    let (pa, ..) = tensors();
    check(&mut || fused_add_rmsnorm(&mut a, &mut b, &w, &options, s).unwrap(), {
        Prepared::fused_add_rmsnorm(pa, pb, pw.reborrow(), &options)
    });
    let (pa, pb, ..) = tensors();
    check(&mut || gemma_fused_add_rmsnorm(&mut a, &mut b, &w, &options, s).unwrap(), {
        Prepared::gemma_fused_add_rmsnorm(pa, pb, pw.reborrow(), &options)
    });
    check(&mut || rmsnorm_quant(&mut e, &i, &w, 0.5, &options, s).unwrap(), {
        Prepared::rmsnorm_quant(pe, pi.reborrow(), pw.reborrow(), 0.5, &options)
    });
    let (_, pb, .., pe) = tensors();
    check(&mut || fused_add_rmsnorm_quant(&mut e, &i, &mut b, &w, 0.5, &options, s).unwrap(), {
        Prepared::fused_add_rmsnorm_quant(pe, pi.reborrow(), pb, pw.reborrow(), 0.5, &options)
    });
}

#[test]
fn a_prepared_prefill_passes_what_the_plain_one_does() {
    let seen = StandIns::load();
    let found = || {
        let values: [i64; 11] = StandIns::read(&seen.gdn, "seen_values");
        (
            values,
            StandIns::read::<[i32; 11]>(&seen.gdn, "seen_types"),
            StandIns::read::<usize>(&seen.gdn, "seen_stream"),
        )
    };
    let with_options = || GdnPrefill {
        input_state: Some(read(0x90_0000, DType::F32, &[1, 2, 128, 128])),
        beta: Some(read(0xA0_0000, DType::F32, &[64, 2])),
        ..gdn_args(64)
    };
    for args in [gdn_args as fn(i64) -> GdnPrefill<'static>, |_| GdnPrefill { alpha: None, ..gdn_args(64) }] {
        // SAFETY: the stand-in touches nothing.
        unsafe {
            gdn_prefill(args(64), stream(0x10)).unwrap();
            let expected = found();
            gdn_prefill(with_options(), stream(0x20)).unwrap();
            assert_ne!(found(), expected);
            Prepared::gdn_prefill(args(64)).unwrap().launch(stream(0x10)).unwrap();
            assert_eq!(found(), expected);
        }
    }
    // SAFETY: as above.
    let mut prepared = unsafe { Prepared::gdn_prefill(with_options()) }.unwrap();
    prepared.replace("beta", read(0xB0_0000, DType::F32, &[64, 2])).unwrap();
    prepared.replace_mut("workspace", write(0xC0_0000, DType::U8, &[132 * 128])).unwrap();
    prepared.launch(stream(0x10)).unwrap();
    let (values, ..) = found();
    assert_eq!((values[6], values[7], values[8], values[10]), (0x90_0000, 0x70_0000, 0xB0_0000, 0xC0_0000));
    // TMA wants a workspace aligned to 64 bytes, and the first was.
    let error = prepared.replace_mut("workspace", write(0xC0_0010, DType::U8, &[132 * 128])).unwrap_err();
    assert!(error.to_string().contains("aligned to 64 bytes"), "{error}");
    // A workspace that is too small for the GPU is found when it is prepared.
    let small = GdnPrefill { workspace: write(0x80_0000, DType::U8, &[131 * 128]), ..gdn_args(64) };
    // SAFETY: as above.
    let error = unsafe { Prepared::gdn_prefill(small) }.unwrap_err();
    assert!(error.to_string().contains("16768 bytes, expected 16896 bytes or more"), "{error}");
}

#[test]
fn tensors_past_the_kernels_limit_are_cut_the_same_way() {
    let seen = StandIns::load();
    let rows = (1 << 20) + 64;
    let shape = [rows, 4096];
    let options = NormOptions::default();
    let (out, input, weight) = (0x1000_0000, 0x9000_0000_0000usize, 0x3000);
    let prepare = |input| {
        let out = write(out, DType::F16, &shape);
        Prepared::rmsnorm(out, read(input, DType::F16, &shape), read(weight, DType::F16, &[4096]), &options).unwrap()
    };
    let mut prepared = prepare(input);
    let last = |launch: &mut dyn FnMut()| {
        let before = seen.calls();
        launch();
        (seen.calls() - before, seen.rows(), seen.values()[0] as usize - out, seen.values()[1] as usize)
    };
    let mut plain_out = write(out, DType::F16, &shape);
    let plain = last(&mut || {
        let (input, weight) = (read(input, DType::F16, &shape), read(weight, DType::F16, &[4096]));
        rmsnorm(&mut plain_out, &input, &weight, &options, Stream::NULL).unwrap();
    });
    let cut = 1usize << 33;
    assert_eq!(plain, (2, 64, cut, input + cut));
    assert_eq!(last(&mut || prepared.launch(Stream::NULL).unwrap()), plain);
    // Both parts move with the tensor, downwards too.
    for other in [input + 0x1000, input - 0x2000] {
        prepared.replace("input", read(other, DType::F16, &shape)).unwrap();
        assert_eq!(last(&mut || prepared.launch(Stream::NULL).unwrap()), (2, 64, cut, other + cut));
    }
    let empty = Prepared::rmsnorm(
        write(out, DType::F16, &[0, 8]),
        read(input, DType::F16, &[0, 8]),
        read(weight, DType::F16, &[8]),
        &options,
    );
    let before = seen.calls();
    empty.unwrap().launch(Stream::NULL).unwrap();
    assert_eq!(seen.calls(), before, "no rows launch nothing");
}

#[test]
fn what_does_not_fit_does_not_replace() {
    let seen = StandIns::load();
    let shape = [4, 64];
    let mut prepared = Prepared::gemma_rmsnorm(
        write(0x1000, DType::F16, &shape),
        read(0x2000, DType::F16, &shape),
        read(0x3000, DType::F16, &[64]),
        &NormOptions::default(),
    )
    .unwrap();
    // SAFETY: the stand-ins read nothing.
    let raw = |device, shape: &[i64], strides: Option<&[i64]>| unsafe {
        TensorRef::from_raw(0x4000 as *const c_void, device, DType::F16, shape, strides).unwrap()
    };
    let bad = [
        (read(0x4000, DType::BF16, &shape), "input is BF16, expected F16"),
        (raw(Device::Cuda(0), &shape, None), "on cuda:0, expected memory of cuda:1"),
        (raw(GPU, &[5, 64], None), "of shape [5, 64], expected shape [4, 64]"),
        (raw(GPU, &shape, Some(&[128, 1])), "strided [128, 1], expected [64, 1]"),
        (read(0x4008, DType::F16, &shape), "expected memory aligned to 16 bytes"),
    ];
    for (tensor, message) in bad {
        let error = prepared.replace("input", tensor).unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { function: "gemma_rmsnorm", .. }), "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
    let error = prepared.replace("out", read(0x4000, DType::F16, &shape)).unwrap_err();
    assert!(error.to_string().contains("is out, expected one that is read: input, weight"), "{error}");
    let error = prepared.replace_mut("weight", write(0x4000, DType::F16, &[64])).unwrap_err();
    assert!(error.to_string().contains("is weight, expected one that is written: out"), "{error}");
    // None of that changed the call.
    prepared.launch(stream(0x10)).unwrap();
    assert_eq!(seen.values()[..3], [0x1000, 0x2000, 0x3000]);
}

#[test]
fn a_prepared_call_that_fails_says_why_and_can_be_launched_again() {
    let seen = StandIns::load();
    let (out, input, weight) =
        (write(0x1000, DType::F16, &[1, 8]), read(0x2000, DType::F16, &[1, 8]), read(0x3000, DType::F16, &[8]));
    let prepared = Prepared::rmsnorm(out, input, weight, &NormOptions::default()).unwrap();
    seen.fail_next();
    let error = prepared.launch(stream(0x10)).unwrap_err();
    assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
    assert!(error.to_string().contains("as the test asked"), "{error}");
    prepared.launch(stream(0x10)).unwrap();
    // What breaks the contract is found when it is prepared.
    let (out, input) = (write(0x1000, DType::F16, &[1, 8]), read(0x2000, DType::F16, &[1, 8]));
    let error = Prepared::rmsnorm(out, input, read(0x3000, DType::F32, &[8]), &NormOptions::default()).unwrap_err();
    assert!(error.to_string().contains("weight is F32, expected F16"), "{error}");
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

/// Calls that are plainly right are not looked at closely. In a debug build they are, and must pass.
#[test]
#[cfg(debug_assertions)]
fn what_is_plainly_right_keeps_the_whole_contract() {
    let _alone = StandIns::load();
    let (accepted, refused) = (Cell::new(0), Cell::new(0));
    let mut runner = TestRunner::new_with_rng(
        Config { cases: 20_000, failure_persistence: None, ..Config::default() },
        TestRng::deterministic_rng(Default::default()),
    );
    let options = (mostly(1e-6, prop_oneof![Just(-1.0), Just(1e300), Just(1e-60), Just(f64::NAN)]), any::<bool>());
    let outcome = runner.run(&(tensors([2, 2, 1, 2]), options), |([a, b, w, c], (eps, fused))| {
        let (Some(mut a), Some(mut b), Some(c), Some(w)) = (a.write(), b.write(), c.read(), w.read()) else {
            return Ok(());
        };
        // Of so many launches each, no memory could hold the tensors.
        if a.shape()[0] > 1 << 20 && [a.strides(), b.strides(), c.strides()].iter().any(|s| s[0] > 1 << 20) {
            return Ok(());
        }
        let options = NormOptions::default().with_eps(eps);
        let result = if fused {
            gemma_fused_add_rmsnorm(&mut a, &mut b, &w, &options, stream(0x10))
        } else {
            rmsnorm(&mut a, &c, &w, &options, stream(0x10))
        };
        let count = if result.is_ok() { &accepted } else { &refused };
        count.set(count.get() + 1);
        Ok(())
    });
    outcome.unwrap();
    assert!(accepted.get() > 1000 && refused.get() > 1000, "{accepted:?} {refused:?}");
}

/// The same for GDN prefill, one thing changed at a time.
#[test]
#[cfg(debug_assertions)]
fn prefills_that_are_plainly_right_keep_the_whole_contract() {
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
        let mut args = gdn_args(64);
        let shape = match which {
            0..=3 => vec![tokens, 2, 128],
            4 => vec![1, 2, 128, 128],
            5 => vec![2],
            6 | 7 => vec![tokens, 2],
            _ => vec![132 * 128 + tokens],
        };
        let dtype = [DType::BF16, DType::F32, DType::I64, DType::U8][[0, 0, 0, 0, 1, 2, 1, 1, 3][which]];
        let odd = Odd { address, gpu: true, dtype, shape, strides };
        let (Some(read), Some(write)) = (odd.read(), odd.write()) else { return Ok(()) };
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
        // SAFETY: the stand-in touches nothing.
        let result = unsafe { gdn_prefill(args, stream(0x10)) };
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
            let called = |result: flashinfer_rs::Result<()>, before: i64| {
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
                        let alpha = args.alpha.as_ref().map(TensorRef::reborrow).filter(|_| choice > 1);
                        // SAFETY: the stand-in touches nothing.
                        unsafe { gdn_prefill(GdnPrefill { alpha, ..args }, stream(0x10)) }.unwrap();
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
            unsafe { gdn_prefill(gdn_args_on(Device::Cuda(gpu), 64), stream(0x10)) }.unwrap();
        }
    });
}
