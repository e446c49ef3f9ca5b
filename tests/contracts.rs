//! What the kernels' wrappers refuse before anything is launched, and what they let through: each contract as a valid
//! call and one change to it at a time.
//!
//! The pointers are made up. The stand-in for libcudart.so.13 lacks what kernels need, so that a call that passes every
//! check ends in an error while its library is loaded, also where there is a driver.

#[path = "support/native.rs"]
mod native;
#[path = "support/prefill.rs"]
mod prefill;

use std::ffi::c_void;
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;

use flashinfer_rs::kernels::gdn::{HEAD_SIZE, WORKSPACE_SIZE};
use flashinfer_rs::kernels::norm::{self, NormOptions};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, GdnPrefillSm90Params, GemmaRmsNormParams, MAX_NDIM, Result,
    RuntimeConfig, Stream, Tensor1DDesc, Tensor2DDesc, Tensor3DDesc, Tensor4DDesc, TensorMut, TensorRef,
    gdn_prefill_sm90, gemma_rmsnorm,
};
use prefill::Prefill;

/// In a process that has a stand-in for libcudart.so.13 with two GPUs of 132 multiprocessors.
fn runtime() -> &'static FlashInferRuntime {
    static RUNTIME: OnceLock<&'static FlashInferRuntime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        native::load(&native::compile("cudart.c", "libcudart.so.13", &[], folder.path()), false);
        FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap()
    })
}

/// An argument, and a part of what was found and of what was expected.
type Refusal = (&'static str, &'static str, &'static str);

/// A change to a valid call, and how the call is refused then.
type Row<P> = (fn(&mut P), Refusal);

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: Result<T>, by: &str, (name, was, should_be): Refusal) {
    let error = result.expect_err(name);
    let text = error.to_string();
    let FlashInferError::InvalidArgument { function, argument, found, expected } = error else {
        panic!("{name} was not refused; instead: {text}")
    };
    assert_eq!((function, argument), (by, name), "{text}");
    assert!(found.contains(was), "found does not say `{was}`: {text}");
    assert!(expected.contains(should_be), "expected does not say `{should_be}`: {text}");
    assert_eq!(text, format!("{function}: {argument} is {found}, expected {expected}"));
}

/// That a call on a GPU passed every check of its arguments. It cannot have reached a kernel.
#[track_caller]
fn assert_accepted(result: Result<()>) {
    match result.expect_err("no kernel can run in this process") {
        error @ FlashInferError::InvalidArgument { .. } => panic!("refused: {error}"),
        _later => {}
    }
}

#[track_caller]
fn assert_out_of_range(result: Result<()>, id: i64, there_are: i32) {
    match result.unwrap_err() {
        FlashInferError::DeviceOutOfRange { device, count } => assert_eq!((device, count), (id, there_are)),
        other => panic!("{other}"),
    }
}

fn address(value: usize) -> *const c_void {
    ptr::without_provenance(value)
}

/// The same address, some bytes on.
fn off(pointer: *const c_void, bytes: usize) -> *const c_void {
    pointer.wrapping_byte_add(bytes)
}

/// A tensor on a GPU that nothing ever reads.
fn on_gpu(dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    // SAFETY: every call that gets it is refused.
    unsafe { TensorRef::from_raw(address(0x1000), Device::Cuda(0), dtype, shape, None) }.unwrap()
}

/// Zeros on the host that live as long as the process.
fn zeros(dtype: DType, shape: &[i64]) -> *mut c_void {
    let bytes = shape.iter().product::<i64>() as usize * dtype.size();
    Box::leak(vec![0u128; bytes / 16 + 1].into_boxed_slice()).as_mut_ptr().cast()
}

fn host(dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    // SAFETY: enough zeros that nothing else refers to; zeros are elements of every type.
    unsafe { TensorRef::from_raw(zeros(dtype, shape), Device::Cpu, dtype, shape, None) }.unwrap()
}

fn host_mut(dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    // SAFETY: as for `host`.
    unsafe { TensorMut::from_raw(zeros(dtype, shape), Device::Cpu, dtype, shape, None) }.unwrap()
}

/// What no kernel computes with.
const NOT_HALF: [DType; 6] = [DType::F64, DType::U8, DType::I32, DType::I64, DType::F8E4M3, DType::F8E5M2];

// Tensors.

#[track_caller]
fn assert_no_tensor(data: usize, shape: &[i64], strides: Option<&[i64]>, refusal: Refusal) {
    // SAFETY: nothing reads or writes through it.
    let (read, write) = unsafe {
        (
            TensorRef::from_raw(address(data), Device::Cuda(0), DType::F16, shape, strides),
            TensorMut::from_raw(address(data).cast_mut(), Device::Cuda(0), DType::F16, shape, strides),
        )
    };
    assert_refused(read, "tensor", refusal);
    assert_refused(write, "tensor", refusal);
}

#[test]
fn a_tensor_with_elements_needs_memory() {
    assert_no_tensor(0, &[1], None, ("data", "a null pointer", "memory"));
    assert_no_tensor(0, &[2, 3], Some(&[3, 1]), ("data", "a null pointer", "memory"));
    assert_no_tensor(0, &[], None, ("data", "a null pointer", "memory"));
}

#[test]
fn sizes_are_not_negative() {
    for shape in [&[-1][..], &[2, -3], &[-2, -3], &[0, -1], &[i64::MIN]] {
        assert_no_tensor(0x1000, shape, None, ("shape", "-", "not negative"));
    }
}

#[test]
fn the_number_of_elements_fits_64_bits() {
    for shape in [&[1 << 32, 1 << 31][..], &[i64::MAX, 2], &[3, 1 << 62]] {
        assert_no_tensor(0x1000, shape, None, ("shape", "[", "fits 64 bits"));
    }
}

#[test]
fn there_are_at_most_six_dimensions() {
    assert_no_tensor(0x1000, &[1; MAX_NDIM + 1], None, ("shape", "[1, 1, 1, 1, 1, 1, 1]", "at most 6 dimensions"));
    assert!(TensorRef::from_slice(&[0u8], &[1; MAX_NDIM]).is_ok());
}

#[test]
fn each_dimension_has_a_stride() {
    for strides in [&[][..], &[1], &[1, 1, 1]] {
        assert_no_tensor(0x1000, &[2, 2], Some(strides), ("strides", "[", "one for each of the 2 dimensions"));
    }
}

#[test]
fn a_slice_has_as_many_elements_as_its_shape() {
    for shape in [&[5][..], &[7], &[2, 2], &[], &[0], &[-6], &[i64::MAX, 2, 3]] {
        let refusal = ("shape", "[", "the slice's length, 6");
        assert_refused(TensorRef::from_slice(&[0f32; 6], shape), "tensor", refusal);
        assert_refused(TensorMut::from_slice(&mut [0f32; 6], shape), "tensor", refusal);
    }
    // The product is right, the sizes are not.
    let refusal = ("shape", "[-2, -3]", "not negative");
    assert_refused(TensorRef::from_slice(&[0f32; 6], &[-2, -3]), "tensor", refusal);
    assert_refused(TensorMut::from_slice(&mut [0f32; 6], &[-2, -3]), "tensor", refusal);
}

#[test]
fn empty_tensors_need_no_memory() {
    for shape in [&[0][..], &[0, 5], &[5, 0], &[0, i64::MAX, 2]] {
        // SAFETY: there are no elements.
        let tensors = unsafe {
            (
                TensorRef::from_raw(ptr::null(), Device::Cpu, DType::F16, shape, None),
                TensorMut::from_raw(ptr::null_mut(), Device::Cpu, DType::F16, shape, None),
            )
        };
        assert_eq!(tensors.0.unwrap().shape(), shape);
        assert_eq!(tensors.1.unwrap().shape(), shape);
        assert!(TensorRef::from_slice::<i64>(&[], shape).is_ok());
        assert!(TensorMut::from_slice::<i64>(&mut [], shape).is_ok());
    }
}

#[test]
fn a_tensor_answers_what_it_was_made_of() {
    let tensor = TensorRef::from_slice(&[0i32; 24], &[2, 3, 4]).unwrap();
    assert_eq!((tensor.shape(), tensor.strides()), (&[2, 3, 4][..], &[12, 4, 1][..]));
    assert_eq!((tensor.dtype(), tensor.device()), (DType::I32, Device::Cpu));
    let mut scalar = [1f64];
    let scalar = TensorMut::from_slice(&mut scalar, &[]).unwrap();
    assert_eq!((scalar.shape(), scalar.strides(), scalar.dtype()), (&[][..], &[][..], DType::F64));
    // SAFETY: nothing reads it.
    let strided =
        unsafe { TensorRef::from_raw(address(8), Device::Cuda(1), DType::BF16, &[2, 3], Some(&[-7, 0])) }.unwrap();
    assert_eq!((strided.strides(), strided.device()), (&[-7, 0][..], Device::Cuda(1)));
}

// gemma_rmsnorm.

const NORM: &str = "gemma_rmsnorm";

/// Four rows of 64, BF16, on the first GPU.
fn norm_params() -> GemmaRmsNormParams {
    let dtype = DType::BF16;
    let matrix =
        |ptr| Tensor2DDesc { ptr: address(ptr), rows: 4, cols: 64, stride_row: 64, stride_col: 1, dtype, device_id: 0 };
    let weight = Tensor1DDesc { ptr: address(0x20000), len: 64, stride: 1, dtype, device_id: 0 };
    GemmaRmsNormParams::new(matrix(0x10000), weight, matrix(0x30000), 1e-6, ptr::null_mut())
}

fn norm_with(change: impl FnOnce(&mut GemmaRmsNormParams)) -> Result<()> {
    runtime();
    let mut params = norm_params();
    change(&mut params);
    // SAFETY: no kernel is launched: norm.so does not load beside the stand-in for CUDA's runtime.
    unsafe { gemma_rmsnorm(&params) }
}

fn assert_norm_refuses(rows: &[Row<GemmaRmsNormParams>]) {
    for &(change, refusal) in rows {
        assert_refused(norm_with(change), NORM, refusal);
    }
}

/// Input and output of this shape, with rows this far apart, and a weight that fits.
fn norm_of(rows: i64, columns: i64, stride: i64) -> impl FnOnce(&mut GemmaRmsNormParams) {
    move |p| {
        for matrix in [&mut p.input, &mut p.out] {
            (matrix.rows, matrix.cols, matrix.stride_row) = (rows, columns, stride);
        }
        p.weight.len = columns;
    }
}

#[test]
fn a_valid_norm_passes_every_check() {
    assert_accepted(norm_with(|_| {}));
    assert_accepted(norm_with(|p| {
        for dtype in [&mut p.input.dtype, &mut p.weight.dtype, &mut p.out.dtype] {
            *dtype = DType::F16;
        }
    }));
    assert_accepted(norm_with(|p| *p = p.with_enable_pdl(true)));
    assert_accepted(norm_with(|p| p.out.ptr = p.input.ptr));
    assert_accepted(norm_with(|p| p.eps = f64::from(f32::MIN_POSITIVE)));
}

#[test]
fn the_text_of_a_refusal_names_function_argument_found_and_expected() {
    let text = norm_with(|p| p.eps = f64::NAN).unwrap_err().to_string();
    assert_eq!(
        text,
        "gemma_rmsnorm: eps is NaN, expected a positive number that an f32 holds in full (1.2e-38 to 3.4e38)"
    );
    let text = norm_with(|p| p.out.rows = 3).unwrap_err().to_string();
    assert_eq!(text, "gemma_rmsnorm: out is of shape [3, 64], expected shape [4, 64], [rows, columns]");
    let text = norm_with(|p| p.input.ptr = ptr::null()).unwrap_err().to_string();
    assert_eq!(text, "tensor: data is a null pointer, expected memory, for a tensor that is not empty");
}

#[test]
fn the_epsilon_of_a_norm_is_positive_as_an_f32_too() {
    let expected = "a positive number that an f32 holds in full";
    assert_norm_refuses(&[
        (|p| p.eps = f64::NAN, ("eps", "NaN", expected)),
        (|p| p.eps = f64::INFINITY, ("eps", "inf", expected)),
        (|p| p.eps = f64::NEG_INFINITY, ("eps", "-inf", expected)),
        (|p| p.eps = 0.0, ("eps", "0", expected)),
        (|p| p.eps = -0.0, ("eps", "-0", expected)),
        (|p| p.eps = -1e-6, ("eps", "-0.000001", expected)),
        // The kernel computes with an f32, which flushes what is subnormal to 0.
        (|p| p.eps = 1e-38, ("eps", "0.00000000000000000000000000000000000001", expected)),
        (|p| p.eps = 1e-46, ("eps", "0.0000000000000000000000000000000000000000000001", expected)),
        (|p| p.eps = 1e39, ("eps", "1000000000000000000000000000000000000000", expected)),
    ]);
}

#[test]
fn a_norm_needs_memory_and_sizes_that_make_sense() {
    let null = ("data", "a null pointer", "memory");
    let rows: [Row<GemmaRmsNormParams>; 6] = [
        (|p| p.input.ptr = ptr::null(), null),
        (|p| p.weight.ptr = ptr::null(), null),
        (|p| p.out.ptr = ptr::null(), null),
        (|p| p.input.rows = -1, ("shape", "[-1, 64]", "not negative")),
        (|p| p.weight.len = -64, ("shape", "[-64]", "not negative")),
        (|p| (p.out.rows, p.out.cols) = (1 << 32, 1 << 31), ("shape", "[4294967296, 2147483648]", "64 bits")),
    ];
    for (change, refusal) in rows {
        assert_refused(norm_with(change), "tensor", refusal);
    }
}

#[test]
fn a_norm_computes_in_one_half_precision_type() {
    assert_norm_refuses(&[
        // Upstream looks at the input alone, and would read or write the others as if they were like it.
        (|p| p.weight.dtype = DType::F32, ("weight", "F32", "BF16")),
        (|p| p.weight.dtype = DType::F16, ("weight", "F16", "BF16")),
        (|p| p.weight.dtype = DType::I32, ("weight", "I32", "BF16")),
        (|p| p.out.dtype = DType::F32, ("out", "F32", "BF16")),
        (|p| p.out.dtype = DType::F16, ("out", "F16", "BF16")),
        (|p| p.out.dtype = DType::F8E4M3, ("out", "F8E4M3", "BF16")),
        (|p| p.input.dtype = DType::F16, ("out", "BF16", "F16, as input")),
    ]);
    for dtype in NOT_HALF.into_iter().chain([DType::F32]) {
        let name: &'static str = dtype.to_string().leak();
        let all = |p: &mut GemmaRmsNormParams| {
            (p.input.dtype, p.weight.dtype, p.out.dtype) = (dtype, dtype, dtype);
        };
        assert_refused(norm_with(all), NORM, ("input", name, "BF16 or F16"));
    }
}

#[test]
fn the_tensors_of_a_norm_are_on_one_device() {
    assert_norm_refuses(&[
        (|p| p.weight.device_id = 1, ("weight", "on cuda:1", "memory of cuda:0")),
        (|p| p.out.device_id = 1, ("out", "on cuda:1", "memory of cuda:0")),
        (|p| p.input.device_id = 1, ("out", "on cuda:0", "memory of cuda:1")),
    ]);
}

#[test]
fn the_shapes_of_a_norm_fit_each_other() {
    assert_norm_refuses(&[
        (|p| p.out.rows = 3, ("out", "[3, 64]", "[4, 64]")),
        (|p| p.out.rows = 0, ("out", "[0, 64]", "[4, 64]")),
        (|p| p.out.cols = 32, ("out", "[4, 32]", "[4, 64]")),
        (|p| p.input.cols = 32, ("out", "[4, 64]", "[4, 32]")),
        (|p| p.weight.len = 63, ("weight", "[63]", "[64]")),
        (|p| p.weight.len = 128, ("weight", "[128]", "[64]")),
        // Nothing would be launched, yet it is a mistake.
        (|p| p.input.rows = 0, ("out", "[4, 64]", "[0, 64]")),
    ]);
}

#[test]
fn the_columns_of_a_norm_are_contiguous_and_what_it_writes_does_not_overlap() {
    let expected = "a last stride of 1, and others that are multiples of 8 and not negative";
    let apart = "a place of its own, since it is written";
    assert_norm_refuses(&[
        (|p| p.input.stride_col = 2, ("input", "strided [64, 2]", expected)),
        (|p| p.input.stride_col = 0, ("input", "strided [64, 0]", expected)),
        (|p| p.out.stride_col = -1, ("out", "strided [64, -1]", expected)),
        (|p| p.weight.stride = 2, ("weight", "strided [2]", "a last stride of 1")),
        (|p| p.weight.stride = 0, ("weight", "strided [0]", "a last stride of 1")),
        (|p| p.out.stride_row = 56, ("out", "strided [56, 1]", apart)),
        (|p| p.out.stride_row = 0, ("out", "strided [0, 1]", apart)),
        (|p| p.input.stride_row = -64, ("input", "strided [-64, 1]", expected)),
        (|p| p.out.stride_row = -64, ("out", "strided [-64, 1]", expected)),
        // One row, too, has columns.
        (|p| (p.input.rows, p.out.rows, p.input.stride_col) = (1, 1, 2), ("input", "strided [64, 2]", expected)),
    ]);
    assert_accepted(norm_with(|p| (p.input.stride_row, p.out.stride_row) = (72, 4096)));
    // What is only read may repeat, and overlap.
    assert_accepted(norm_with(|p| p.input.stride_row = 0));
    assert_accepted(norm_with(|p| p.input.stride_row = 56));
}

#[test]
fn rows_and_memory_of_a_norm_are_aligned_to_the_vector() {
    // Columns, and how many of them one memory access moves.
    for (columns, vector, aligned) in [(64, 8, "16 bytes"), (12, 4, "8 bytes"), (6, 2, "4 bytes"), (7, 1, "2 bytes")] {
        let shaped = |change: &dyn Fn(&mut GemmaRmsNormParams)| {
            norm_with(|p| {
                norm_of(4, columns, columns)(p);
                change(p);
            })
        };
        assert_accepted(shaped(&|p| p.input.stride_row += vector));
        assert_accepted(shaped(&|p| p.out.ptr = off(p.out.ptr, 2 * vector as usize)));
        for step in 1..vector {
            let steps: &'static str = format!("multiples of {vector}").leak();
            assert_refused(shaped(&|p| p.input.stride_row += step), NORM, ("input", "strided", steps));
            assert_refused(shaped(&|p| p.out.stride_row += step), NORM, ("out", "strided", steps));
        }
        for bytes in 1..2 * vector as usize {
            assert_refused(shaped(&|p| p.input.ptr = off(p.input.ptr, bytes)), NORM, ("input", "at 0x1000", aligned));
            assert_refused(shaped(&|p| p.weight.ptr = off(p.weight.ptr, bytes)), NORM, ("weight", "0x2000", aligned));
            assert_refused(shaped(&|p| p.out.ptr = off(p.out.ptr, bytes)), NORM, ("out", "at 0x3000", aligned));
        }
    }
}

#[test]
fn the_stride_of_a_single_row_means_nothing() {
    for stride in [0, 1, 63, 65, -64, i64::MAX, i64::MIN] {
        assert_accepted(norm_with(norm_of(1, 64, stride)));
    }
}

#[test]
fn a_norm_past_two_to_the_32_elements_is_split_as_long_as_offsets_fit_64_bits() {
    let whole = 1i64 << 32;
    // Release 0.6.3 alone wrote zeros past that; the results of the split are looked at on a GPU.
    for (rows, columns, stride) in [
        (1 << 20, 4096, 4096),
        ((1 << 20) + 64, 4096, 4096),
        (2, 64, whole - 64),
        (2, 64, whole - 56),
        (3, 64, 1 << 31),
        (4, 64, whole),
    ] {
        assert_accepted(norm_with(norm_of(rows, columns, stride)));
    }
    assert_refused(norm_with(norm_of(4, 64, i64::MAX - 7)), NORM, ("out", "strided", "at most 4294967296 elements"));
}

#[test]
fn the_sizes_of_a_norm_fit_32_bits() {
    let past = 1i64 << 31;
    assert_refused(norm_with(norm_of(past, 1, 1)), NORM, ("rows", "2147483648", "0 to 2147483647"));
    assert_refused(norm_with(norm_of(1, past, past)), NORM, ("columns", "2147483648", "0 to 2147483647"));
    assert_accepted(norm_with(norm_of(past - 1, 1, 1)));
    assert_accepted(norm_with(norm_of(1, past - 1, 1)));
}

#[test]
fn a_norm_without_rows_is_done_at_once() {
    norm_with(norm_of(0, 64, 64)).unwrap();
    norm_with(norm_of(0, 0, 0)).unwrap();
    // No memory, and strides that no row ever takes.
    norm_with(|p| {
        norm_of(0, 64, 3)(p);
        (p.input.ptr, p.out.ptr) = (ptr::null(), ptr::null());
    })
    .unwrap();
}

#[test]
fn a_norm_without_columns_is_done_at_once_too() {
    norm_with(norm_of(4, 0, 0)).unwrap();
}

#[test]
fn a_norm_without_rows_needs_no_gpu() {
    native::isolated_with("a_norm_without_rows_needs_no_gpu", &[("FAKE_DRIVER", Path::new("0"))], || {
        norm_with(norm_of(0, 64, 64)).unwrap();
    });
}

#[test]
fn a_negative_device_of_a_norm_is_out_of_range() {
    for id in [-1, i32::MIN] {
        assert_out_of_range(norm_with(|p| p.input.device_id = id), id.into(), 2);
        assert_out_of_range(norm_with(|p| p.weight.device_id = id), id.into(), 2);
        assert_out_of_range(norm_with(|p| p.out.device_id = id), id.into(), 2);
    }
}

#[test]
fn a_negative_device_without_a_driver_is_answered_by_the_reason() {
    let name = "a_negative_device_without_a_driver_is_answered_by_the_reason";
    native::isolated_with(name, &[("FAKE_DRIVER", Path::new("0"))], || {
        let error = norm_with(|p| p.input.device_id = -1).unwrap_err();
        assert!(matches!(error, FlashInferError::DriverMissing { .. }), "{error}");
    });
}

#[test]
fn a_negative_device_beside_an_old_driver_is_answered_by_the_reason() {
    let name = "a_negative_device_beside_an_old_driver_is_answered_by_the_reason";
    native::isolated_with(name, &[("FAKE_DRIVER", Path::new("12080"))], || {
        let error = gdn_with(|p| p.workspace.device_id = -1).unwrap_err();
        assert!(matches!(error, FlashInferError::DriverTooOld { .. }), "{error}");
    });
}

#[test]
fn a_negative_device_where_there_is_none_is_out_of_range() {
    let name = "a_negative_device_where_there_is_none_is_out_of_range";
    native::isolated_with(name, &[("FAKE_ERROR", Path::new("100"))], || {
        assert_out_of_range(norm_with(|p| p.out.device_id = -1), -1, 0);
        assert_out_of_range(gdn_with(|_| {}), 0, 0);
    });
}

#[test]
fn calls_whose_library_does_not_load_leave_no_file_open() {
    native::isolated("calls_whose_library_does_not_load_leave_no_file_open", || {
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let call = || {
            assert_accepted(norm_with(|_| {}));
            assert_accepted(gdn_with(|_| {}));
        };
        call();
        let before = open();
        for _ in 0..5 {
            call();
        }
        assert_eq!(open(), before);
    });
}

// gemma_rmsnorm on the host.

struct HostNorm {
    out: TensorMut<'static>,
    input: TensorRef<'static>,
    weight: TensorRef<'static>,
    options: NormOptions,
}

fn host_norm_of(dtype: DType, change: impl FnOnce(&mut HostNorm)) -> Result<()> {
    runtime();
    let (out, input, weight) = (host_mut(dtype, &[2, 16]), host(dtype, &[2, 16]), host(dtype, &[16]));
    let mut call = HostNorm { out, input, weight, options: NormOptions::default() };
    change(&mut call);
    norm::gemma_rmsnorm(&mut call.out, &call.input, &call.weight, &call.options, Stream::NULL)
}

fn host_norm(change: impl FnOnce(&mut HostNorm)) -> Result<()> {
    host_norm_of(DType::BF16, change)
}

/// Two rows of 16 on the host, so many elements apart.
fn strided(row: i64, column: i64) -> TensorRef<'static> {
    let data = zeros(DType::BF16, &[64]);
    // SAFETY: whatever the strides, at most 64 elements are reached.
    unsafe { TensorRef::from_raw(data, Device::Cpu, DType::BF16, &[2, 16], Some(&[row, column])) }.unwrap()
}

#[test]
fn a_norm_on_the_host_also_takes_f32_and_nothing_else() {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        host_norm_of(dtype, |_| {}).unwrap();
    }
    for dtype in NOT_HALF {
        let name: &'static str = dtype.to_string().leak();
        assert_refused(host_norm_of(dtype, |_| {}), NORM, ("input", name, "BF16 or F16 or F32"));
    }
}

#[test]
fn a_norm_on_the_host_keeps_the_same_contract() {
    let rows: [Row<HostNorm>; 14] = [
        (|c| c.options = c.options.with_eps(f64::NAN), ("eps", "NaN", "a positive number")),
        (|c| c.options = c.options.with_eps(-1.0), ("eps", "-1", "a positive number")),
        (|c| c.input = host(DType::BF16, &[32]), ("input", "of shape [32]", "2 dimensions")),
        (|c| c.input = host(DType::BF16, &[1, 2, 16]), ("input", "of shape [1, 2, 16]", "2 dimensions")),
        (|c| c.weight = host(DType::BF16, &[1, 16]), ("weight", "of shape [1, 16]", "1 dimension, [columns]")),
        (|c| c.out = host_mut(DType::BF16, &[32]), ("out", "of shape [32]", "2 dimensions")),
        (|c| c.out = host_mut(DType::BF16, &[1, 2, 16]), ("out", "of shape [1, 2, 16]", "2 dimensions")),
        (|c| c.weight = host(DType::BF16, &[8]), ("weight", "of shape [8]", "[16]")),
        (|c| c.weight = host(DType::F32, &[16]), ("weight", "F32", "BF16")),
        (|c| c.out = host_mut(DType::F32, &[2, 16]), ("out", "F32", "BF16")),
        (|c| c.weight = on_gpu(DType::BF16, &[16]), ("weight", "on cuda:0", "memory of cpu")),
        (|c| c.input = on_gpu(DType::BF16, &[2, 16]), ("out", "on cpu", "memory of cuda:0")),
        (|c| c.input = strided(32, 2), ("input", "strided [32, 2]", "a last stride of 1")),
        (|c| c.input = strided(17, 1), ("input", "strided [17, 1]", "multiples of 8")),
    ];
    for (change, refusal) in rows {
        assert_refused(host_norm(change), NORM, refusal);
    }
    host_norm(|c| c.input = strided(24, 1)).unwrap();
}

#[test]
fn memory_on_the_host_needs_no_alignment() {
    host_norm(|c| {
        let data = zeros(DType::BF16, &[64]).wrapping_byte_add(1);
        // SAFETY: 32 of 64 elements, one byte on.
        c.input = unsafe { TensorRef::from_raw(data, Device::Cpu, DType::BF16, &[2, 16], None) }.unwrap();
    })
    .unwrap();
    host_gdn(|args| {
        let shape = [TOKENS, 4, HEAD_SIZE];
        let data = zeros(DType::BF16, &[TOKENS, 5, HEAD_SIZE]).wrapping_byte_add(1);
        // SAFETY: four of five heads, one byte on.
        args.q = unsafe { TensorRef::from_raw(data, Device::Cpu, DType::BF16, &shape, None) }.unwrap();
    })
    .unwrap();
}

#[test]
fn a_norm_without_rows_on_the_host_is_done_at_once() {
    host_norm(|c| (c.out, c.input) = (host_mut(DType::BF16, &[0, 16]), host(DType::BF16, &[0, 16]))).unwrap();
}

// gdn_prefill.

/// Without optimization too: a thread's stack has 2 MiB where nobody asks for more.
#[test]
fn calls_need_little_stack() {
    let calls = || {
        host_norm(|_| ()).unwrap();
        host_gdn(|_| ()).unwrap();
    };
    // The first loads libraries.
    calls();
    std::thread::Builder::new().stack_size(256 * 1024).spawn(calls).unwrap().join().unwrap();
}

#[test]
fn streams_are_told_apart_by_their_handles() {
    // SAFETY: nothing is queued on either.
    let (one, other) = unsafe { (Stream::from_raw(ptr::without_provenance_mut(64)), Stream::NULL) };
    assert!(one == one && other == other && one != other);
}

const GDN: &str = "gdn_prefill";

const TOKENS: i64 = 4;
const SEQUENCES: i64 = 2;
const WORKSPACE: i64 = WORKSPACE_SIZE;

fn vector(ptr: usize, len: i64, dtype: DType) -> Tensor1DDesc {
    Tensor1DDesc { ptr: address(ptr), len, stride: 1, dtype, device_id: 0 }
}

fn matrix(ptr: usize, [rows, cols]: [i64; 2], dtype: DType) -> Tensor2DDesc {
    Tensor2DDesc { ptr: address(ptr), rows, cols, stride_row: cols, stride_col: 1, dtype, device_id: 0 }
}

fn three(ptr: usize, [dim0, dim1, dim2]: [i64; 3], dtype: DType) -> Tensor3DDesc {
    let (stride0, stride1, stride2) = (dim1.saturating_mul(dim2), dim2, 1);
    Tensor3DDesc { ptr: address(ptr), dim0, dim1, dim2, stride0, stride1, stride2, dtype, device_id: 0 }
}

fn states(ptr: usize, sequences: i64, heads: i64, size: i64) -> Tensor4DDesc {
    Tensor4DDesc {
        ptr: address(ptr),
        dim0: sequences,
        dim1: heads,
        dim2: size,
        dim3: size,
        stride0: heads.saturating_mul(size * size),
        stride1: size * size,
        stride2: size,
        stride3: 1,
        dtype: DType::F32,
        device_id: 0,
    }
}

/// All tensors, contiguous, on the first GPU, for so many sequences, tokens, query, key and value heads.
fn gdn_of(sequences: i64, tokens: i64, [q, k, v]: [i64; 3], size: i64) -> GdnPrefillSm90Params {
    let heads = q.max(v);
    GdnPrefillSm90Params::new(
        three(0x100000, [tokens, heads, size], DType::BF16),
        states(0x200000, sequences, heads, size),
        three(0x300000, [tokens, q, size], DType::BF16),
        three(0x400000, [tokens, k, size], DType::BF16),
        three(0x500000, [tokens, v, size], DType::BF16),
        vector(0x600000, sequences + 1, DType::I64),
        vector(0x700000, WORKSPACE, DType::U8),
        ptr::null_mut(),
    )
    .with_input_state(states(0x800000, sequences, heads, size))
    .with_alpha(matrix(0x900000, [tokens, heads], DType::F32))
    .with_beta(matrix(0xA00000, [tokens, heads], DType::F32))
}

fn gdn_call(params: GdnPrefillSm90Params) -> Result<()> {
    runtime();
    // SAFETY: no kernel is launched: gdn_prefill_sm90.so does not load beside the stand-in for CUDA's runtime.
    unsafe { gdn_prefill_sm90(&params) }
}

fn gdn_with(change: impl FnOnce(&mut GdnPrefillSm90Params)) -> Result<()> {
    let mut params = gdn_of(SEQUENCES, TOKENS, [4, 2, 2], HEAD_SIZE);
    change(&mut params);
    gdn_call(params)
}

fn assert_gdn_refuses(rows: &[Row<GdnPrefillSm90Params>]) {
    for &(change, refusal) in rows {
        assert_refused(gdn_with(change), GDN, refusal);
    }
}

fn input_state(p: &mut GdnPrefillSm90Params) -> &mut Tensor4DDesc {
    p.input_state.as_mut().unwrap()
}

fn alpha(p: &mut GdnPrefillSm90Params) -> &mut Tensor2DDesc {
    p.alpha.as_mut().unwrap()
}

fn beta(p: &mut GdnPrefillSm90Params) -> &mut Tensor2DDesc {
    p.beta.as_mut().unwrap()
}

/// Changes one field of every tensor.
macro_rules! each_tensor {
    ($params:ident, $field:ident = $value:expr) => {
        $params.output.$field = $value;
        $params.output_state.$field = $value;
        $params.q.$field = $value;
        $params.k.$field = $value;
        $params.v.$field = $value;
        $params.cu_seqlens.$field = $value;
        $params.workspace.$field = $value;
        input_state($params).$field = $value;
        alpha($params).$field = $value;
        beta($params).$field = $value;
    };
}

#[test]
fn a_valid_prefill_passes_every_check() {
    assert_accepted(gdn_with(|_| {}));
    assert_accepted(gdn_with(|p| (p.input_state, p.alpha, p.beta) = (None, None, None)));
    assert_accepted(gdn_with(|p| p.scale = 0.5));
    assert_accepted(gdn_with(|p| {
        (p.q.dtype, p.k.dtype, p.v.dtype, p.output.dtype) = (DType::F16, DType::F16, DType::F16, DType::F16);
    }));
    assert_accepted(gdn_with(|p| {
        each_tensor!(p, device_id = 1);
    }));
    // As many tokens as sequences.
    assert_accepted(gdn_call(gdn_of(3, 3, [1, 1, 1], HEAD_SIZE)));
}

#[test]
fn the_head_size_of_a_prefill_is_the_one_that_is_computed_right() {
    for (size, found) in [(64, "64"), (96, "96"), (256, "256"), (0, "0"), (127, "127"), (136, "136")] {
        let result = gdn_call(gdn_of(SEQUENCES, TOKENS, [4, 2, 2], size));
        assert_refused(result, GDN, ("head_size", found, "128, the only one"));
    }
}

#[test]
fn the_heads_of_a_prefill_share_queries_or_values() {
    for heads in [[1, 1, 1], [2, 2, 2], [8, 1, 1], [6, 3, 3], [1, 1, 8], [2, 2, 6], [16, 16, 32]] {
        assert_accepted(gdn_call(gdn_of(SEQUENCES, TOKENS, heads, HEAD_SIZE)));
    }
    for heads in [[3, 2, 2], [2, 2, 3], [4, 2, 4], [4, 4, 2], [2, 4, 4], [2, 1, 4], [4, 2, 1], [1, 2, 1], [2, 3, 3]] {
        let found: &'static str = format!("{} query, {} key and {} value", heads[0], heads[1], heads[2]).leak();
        let result = gdn_call(gdn_of(SEQUENCES, TOKENS, heads, HEAD_SIZE));
        assert_refused(result, GDN, ("heads", found, "(GQA)"));
    }
}

#[test]
fn a_prefill_has_heads() {
    for (heads, none) in [
        ([0, 0, 0], "q_heads"),
        ([4, 0, 0], "k_heads"),
        ([0, 2, 2], "q_heads"),
        ([4, 2, 0], "v_heads"),
        ([2, 0, 2], "k_heads"),
    ] {
        let result = gdn_call(gdn_of(SEQUENCES, TOKENS, heads, HEAD_SIZE));
        assert_refused(result, GDN, (none, "0", "1 to 2147483647"));
    }
}

#[test]
fn each_tensor_of_a_prefill_has_its_type() {
    assert_gdn_refuses(&[
        (|p| p.q.dtype = DType::F16, ("output", "BF16", "F16, as q")),
        (|p| p.k.dtype = DType::F16, ("k", "F16", "BF16")),
        (|p| p.v.dtype = DType::F32, ("v", "F32", "BF16")),
        (|p| p.output.dtype = DType::F32, ("output", "F32", "BF16")),
        (|p| p.output_state.dtype = DType::BF16, ("output_state", "BF16", "F32")),
        (|p| p.cu_seqlens.dtype = DType::I32, ("cu_seqlens", "I32", "I64")),
        (|p| input_state(p).dtype = DType::F16, ("input_state", "F16", "F32")),
        (|p| alpha(p).dtype = DType::BF16, ("alpha", "BF16", "F32")),
        (|p| beta(p).dtype = DType::F64, ("beta", "F64", "F32")),
        (|p| p.workspace.dtype = DType::I32, ("workspace", "I32", "U8")),
    ]);
    for dtype in NOT_HALF.into_iter().chain([DType::F32]) {
        let name: &'static str = dtype.to_string().leak();
        let all = |p: &mut GdnPrefillSm90Params| {
            (p.q.dtype, p.k.dtype, p.v.dtype, p.output.dtype) = (dtype, dtype, dtype, dtype);
        };
        assert_refused(gdn_with(all), GDN, ("q", name, "BF16 or F16"));
    }
}

#[test]
fn each_tensor_of_a_prefill_has_its_shape() {
    assert_gdn_refuses(&[
        (|p| p.q.dim0 = 5, ("output", "[4, 4, 128]", "[5, 4, 128]")),
        (|p| p.k.dim0 = 5, ("k", "[5, 2, 128]", "[4, 2, 128]")),
        (|p| p.k.dim2 = 64, ("k", "[4, 2, 64]", "[4, 2, 128]")),
        (|p| p.v.dim0 = 3, ("v", "[3, 2, 128]", "[4, 2, 128]")),
        (|p| p.v.dim2 = 256, ("v", "[4, 2, 256]", "[4, 2, 128]")),
        (|p| p.output.dim0 = 3, ("output", "[3, 4, 128]", "[4, 4, 128]")),
        (|p| p.output.dim1 = 2, ("output", "[4, 2, 128]", "[4, 4, 128]")),
        (|p| p.output.dim2 = 64, ("output", "[4, 4, 64]", "[4, 4, 128]")),
        (|p| p.output_state.dim0 = 1, ("output_state", "[1, 4, 128, 128]", "[2, 4, 128, 128]")),
        (|p| p.output_state.dim1 = 2, ("output_state", "[2, 2, 128, 128]", "[2, 4, 128, 128]")),
        (|p| p.output_state.dim2 = 64, ("output_state", "[2, 4, 64, 128]", "[2, 4, 128, 128]")),
        (|p| p.output_state.dim3 = 64, ("output_state", "[2, 4, 128, 64]", "[2, 4, 128, 128]")),
        (|p| p.cu_seqlens.len = 4, ("output_state", "[2, 4, 128, 128]", "[3, 4, 128, 128]")),
        (|p| input_state(p).dim0 = 3, ("input_state", "[3, 4, 128, 128]", "[2, 4, 128, 128]")),
        (|p| input_state(p).dim1 = 2, ("input_state", "[2, 2, 128, 128]", "[2, 4, 128, 128]")),
        (|p| input_state(p).dim2 = 64, ("input_state", "[2, 4, 64, 128]", "[2, 4, 128, 128]")),
        (|p| input_state(p).dim3 = 64, ("input_state", "[2, 4, 128, 64]", "[2, 4, 128, 128]")),
        (|p| alpha(p).rows = 3, ("alpha", "[3, 4]", "[4, 4]")),
        (|p| alpha(p).cols = 2, ("alpha", "[4, 2]", "[4, 4]")),
        (|p| beta(p).rows = 5, ("beta", "[5, 4]", "[4, 4]")),
        (|p| beta(p).cols = 2, ("beta", "[4, 2]", "[4, 4]")),
    ]);
}

#[test]
fn each_tensor_of_a_prefill_is_contiguous() {
    let expected = "contiguous row-major";
    assert_gdn_refuses(&[
        (|p| p.q.stride0 = 1024, ("q", "strided [1024, 128, 1]", expected)),
        (|p| p.q.stride1 = 256, ("q", "strided [512, 256, 1]", expected)),
        (|p| p.k.stride2 = 2, ("k", "strided [256, 128, 2]", expected)),
        (|p| p.v.stride1 = 0, ("v", "strided [256, 0, 1]", expected)),
        (|p| p.output.stride0 = -512, ("output", "strided [-512, 128, 1]", expected)),
        (|p| p.output_state.stride0 += 1, ("output_state", "strided [65537,", expected)),
        // The states' last two dimensions, transposed.
        (|p| (p.output_state.stride2, p.output_state.stride3) = (1, 128), ("output_state", "1, 128]", expected)),
        (|p| (input_state(p).stride2, input_state(p).stride3) = (1, 128), ("input_state", "1, 128]", expected)),
        (|p| input_state(p).stride1 = 0, ("input_state", "strided [65536, 0,", expected)),
        (|p| alpha(p).stride_row = 8, ("alpha", "strided [8, 1]", expected)),
        (|p| (beta(p).stride_row, beta(p).stride_col) = (1, 4), ("beta", "strided [1, 4]", expected)),
        (|p| p.cu_seqlens.stride = 2, ("cu_seqlens", "strided [2]", expected)),
        (|p| p.workspace.stride = 2, ("workspace", "strided [2]", expected)),
    ]);
    // The stride of a dimension of one element moves nothing.
    let mut params = gdn_of(1, TOKENS, [4, 1, 1], HEAD_SIZE);
    (params.k.stride1, params.v.stride1, params.output_state.stride0) = (7, -1, 0);
    assert_accepted(gdn_call(params));
}

#[test]
fn the_tensors_of_a_prefill_are_on_one_device() {
    assert_gdn_refuses(&[
        (|p| p.output.device_id = 1, ("output", "on cuda:1", "memory of cuda:0")),
        (|p| p.output_state.device_id = 1, ("output_state", "on cuda:1", "memory of cuda:0")),
        (|p| p.q.device_id = 1, ("output", "on cuda:0", "memory of cuda:1")),
        (|p| p.k.device_id = 1, ("k", "on cuda:1", "memory of cuda:0")),
        (|p| p.v.device_id = 1, ("v", "on cuda:1", "memory of cuda:0")),
        (|p| p.cu_seqlens.device_id = 1, ("cu_seqlens", "on cuda:1", "memory of cuda:0")),
        (|p| input_state(p).device_id = 1, ("input_state", "on cuda:1", "memory of cuda:0")),
        (|p| alpha(p).device_id = 1, ("alpha", "on cuda:1", "memory of cuda:0")),
        (|p| beta(p).device_id = 1, ("beta", "on cuda:1", "memory of cuda:0")),
        (|p| p.workspace.device_id = 1, ("workspace", "on cuda:1", "memory of cuda:0")),
    ]);
}

#[test]
fn the_memory_of_a_prefill_is_aligned() {
    assert_gdn_refuses(&[
        (|p| p.q.ptr = off(p.q.ptr, 8), ("q", "at 0x300008", "16 bytes")),
        (|p| p.k.ptr = off(p.k.ptr, 2), ("k", "at 0x400002", "16 bytes")),
        (|p| p.v.ptr = off(p.v.ptr, 14), ("v", "at 0x50000e", "16 bytes")),
        (|p| p.output.ptr = off(p.output.ptr, 8), ("output", "at 0x100008", "16 bytes")),
        (|p| p.q.ptr = off(p.q.ptr, 1), ("q", "at 0x300001", "aligned to")),
        (|p| p.output_state.ptr = off(p.output_state.ptr, 2), ("output_state", "at 0x200002", "16 bytes")),
        (|p| p.cu_seqlens.ptr = off(p.cu_seqlens.ptr, 4), ("cu_seqlens", "at 0x600004", "8 bytes")),
        // The kernel moves eight bytes of it at once: at four the context was lost.
        (|p| p.output_state.ptr = off(p.output_state.ptr, 4), ("output_state", "at 0x200004", "16 bytes")),
        (|p| p.output_state.ptr = off(p.output_state.ptr, 8), ("output_state", "at 0x200008", "16 bytes")),
        (|p| input_state(p).ptr = address(0x800001), ("input_state", "at 0x800001", "16 bytes")),
        (|p| input_state(p).ptr = address(0x800004), ("input_state", "at 0x800004", "16 bytes")),
        (|p| alpha(p).ptr = address(0x900002), ("alpha", "at 0x900002", "4 bytes")),
        (|p| beta(p).ptr = address(0xA00003), ("beta", "at 0xa00003", "4 bytes")),
        (|p| p.workspace.ptr = off(p.workspace.ptr, 32), ("workspace", "at 0x700020", "64 bytes")),
        (|p| p.workspace.ptr = off(p.workspace.ptr, 1), ("workspace", "at 0x700001", "64 bytes")),
    ]);
    assert_accepted(gdn_with(|p| {
        (p.q.ptr, p.workspace.ptr) = (off(p.q.ptr, 16), off(p.workspace.ptr, 64));
        (p.output_state.ptr, p.cu_seqlens.ptr) = (off(p.output_state.ptr, 16), off(p.cu_seqlens.ptr, 8));
    }));
}

#[test]
fn each_sequence_has_a_token() {
    for (count, found) in [(0, "0"), (-1, "-1")] {
        let result = gdn_with(|p| p.cu_seqlens.len = count + 1);
        assert_refused(result, GDN, ("sequences", found, "1 to 2147483647"));
    }
    for (count, tokens, refusal) in [
        (5, 4, ("sequences", "5 of 4 tokens", "no more than there are tokens")),
        (2, 1, ("sequences", "2 of 1 tokens", "no more than there are tokens")),
        (1, 0, ("tokens", "0", "1 to 2147483647")),
    ] {
        assert_refused(gdn_call(gdn_of(count, tokens, [4, 2, 2], HEAD_SIZE)), GDN, refusal);
    }
}

#[test]
fn the_sizes_of_a_prefill_fit_32_bits() {
    let past = 1i64 << 31;
    let most = "to 2147483647";
    assert_refused(gdn_with(|p| p.cu_seqlens.len = past + 1), GDN, ("sequences", "2147483648", most));
    let call = |sequences, tokens, heads| gdn_call(gdn_of(sequences, tokens, heads, HEAD_SIZE));
    assert_refused(call(1, past, [1, 1, 1]), GDN, ("tokens", "2147483648", most));
    // 2^31 elements exactly, in all of a tensor's heads together: the greatest offset fits.
    assert_accepted(call(1, past >> 9, [4, 2, 2]));
    assert_accepted(call(1, past >> 9, [2, 2, 4]));
    assert_accepted(call(past >> 16, past >> 16, [4, 2, 2]));
    let elements = "at most 2147483648 elements";
    assert_refused(call(1, (past >> 9) + 1, [4, 2, 2]), GDN, ("output", "2147484160 elements long", elements));
    assert_refused(call(1, (past >> 9) + 1, [2, 2, 4]), GDN, ("output", "2147484160 elements long", elements));
    let states = call((past >> 16) + 1, (past >> 16) + 1, [4, 2, 2]);
    assert_refused(states, GDN, ("output_state", "2147549184 elements long", elements));
    assert_refused(gdn_with(|p| p.workspace.len = past), GDN, ("bytes", "2147483648", most));
}

#[test]
fn the_workspace_of_a_prefill_serves_every_multiprocessor() {
    assert_gdn_refuses(&[
        (|p| p.workspace.len = WORKSPACE - 1, ("workspace", "131071 bytes", "131072 bytes or more")),
        // As many as the stand-in has multiprocessors, whose numbers may go past that.
        (|p| p.workspace.len = 132 * 128, ("workspace", "16896 bytes", "131072 bytes or more")),
        (|p| (p.workspace.len, p.workspace.ptr) = (0, ptr::null()), ("workspace", "0 bytes", "131072 bytes or more")),
    ]);
    assert_accepted(gdn_with(|p| p.workspace.len = 1 << 20));
}

#[test]
fn the_scale_of_a_prefill_is_positive_or_left_out() {
    let expected = "a positive number that an f32 holds in full (1.2e-38 to 3.4e38), or 0.0";
    assert_gdn_refuses(&[
        (|p| p.scale = f64::NAN, ("scale", "NaN", expected)),
        (|p| p.scale = f64::INFINITY, ("scale", "inf", expected)),
        (|p| p.scale = f64::NEG_INFINITY, ("scale", "-inf", expected)),
        (|p| p.scale = -0.5, ("scale", "-0.5", expected)),
        (|p| p.scale = -f64::MIN_POSITIVE, ("scale", "-0.000", expected)),
        (|p| p.scale = 1e-40, ("scale", "0.000", expected)),
    ]);
}

/// A change to each tensor's descriptor in turn.
macro_rules! in_turn {
    ($field:ident = $value:expr) => {{
        let changes: [fn(&mut GdnPrefillSm90Params); 10] = [
            |p| p.output.$field = $value,
            |p| p.output_state.$field = $value,
            |p| p.q.$field = $value,
            |p| p.k.$field = $value,
            |p| p.v.$field = $value,
            |p| p.cu_seqlens.$field = $value,
            |p| p.workspace.$field = $value,
            |p| input_state(p).$field = $value,
            |p| alpha(p).$field = $value,
            |p| beta(p).$field = $value,
        ];
        changes
    }};
}

#[test]
fn a_prefill_needs_memory_and_sizes_that_make_sense() {
    for change in in_turn!(ptr = ptr::null()) {
        assert_refused(gdn_with(change), "tensor", ("data", "a null pointer", "memory"));
    }
    let rows: [Row<GdnPrefillSm90Params>; 4] = [
        (|p| p.q.dim1 = -4, ("shape", "[4, -4, 128]", "not negative")),
        (|p| p.output_state.dim0 = i64::MAX, ("shape", "[9223372036854775807, 4,", "64 bits")),
        (|p| alpha(p).rows = -1, ("shape", "[-1, 4]", "not negative")),
        (|p| p.cu_seqlens.len = -1, ("shape", "[-1]", "not negative")),
    ];
    for (change, refusal) in rows {
        assert_refused(gdn_with(change), "tensor", refusal);
    }
}

#[test]
fn a_negative_device_of_a_prefill_is_out_of_range() {
    for change in in_turn!(device_id = -1) {
        assert_out_of_range(gdn_with(change), -1, 2);
    }
}

#[test]
fn a_device_of_a_prefill_that_does_not_exist_is_out_of_range() {
    let on = |id: i32| {
        gdn_with(|p| {
            each_tensor!(p, device_id = id);
        })
    };
    assert_out_of_range(on(2), 2, 2);
    assert_out_of_range(on(i32::MAX), i32::MAX.into(), 2);
}

// gdn_prefill on the host.

fn host_gdn_of(dtype: DType, change: impl FnOnce(&mut Prefill<'static>)) -> Result<()> {
    runtime();
    let (tokens, size) = (TOKENS, HEAD_SIZE);
    let mut args = Prefill {
        output: host_mut(dtype, &[tokens, 4, size]),
        output_state: host_mut(DType::F32, &[SEQUENCES, 4, size, size]),
        q: host(dtype, &[tokens, 4, size]),
        k: host(dtype, &[tokens, 2, size]),
        v: host(dtype, &[tokens, 2, size]),
        cu_seqlens: TensorRef::from_slice(&[0i64, 1, TOKENS], &[SEQUENCES + 1]).unwrap(),
        input_state: Some(host(DType::F32, &[SEQUENCES, 4, size, size])),
        alpha: Some(host(DType::F32, &[tokens, 4])),
        beta: Some(host(DType::F32, &[tokens, 4])),
        scale: 0.0,
        workspace: host_mut(DType::U8, &[0]),
    };
    change(&mut args);
    // SAFETY: the contents of cu_seqlens are checked on the host, where the reference runs.
    unsafe { args.call(Stream::NULL) }
}

fn host_gdn(change: impl FnOnce(&mut Prefill<'static>)) -> Result<()> {
    host_gdn_of(DType::BF16, change)
}

#[test]
fn a_prefill_on_the_host_also_takes_f32_and_nothing_else() {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        host_gdn_of(dtype, |_| {}).unwrap();
    }
    for dtype in NOT_HALF {
        let name: &'static str = dtype.to_string().leak();
        assert_refused(host_gdn_of(dtype, |_| {}), GDN, ("q", name, "BF16 or F16 or F32"));
    }
}

#[test]
fn a_prefill_on_the_host_keeps_the_same_contract() {
    type Change = fn(&mut Prefill<'static>);
    let rows: [(Change, Refusal); 20] = [
        (|a| a.q = host(DType::BF16, &[TOKENS, 512]), ("q", "of shape [4, 512]", "3 dimensions")),
        (|a| a.k = host(DType::BF16, &[1, TOKENS, 2, 128]), ("k", "of shape [1, 4, 2, 128]", "3 dimensions")),
        (|a| a.v = host(DType::BF16, &[TOKENS]), ("v", "of shape [4]", "3 dimensions")),
        (
            |a| a.cu_seqlens = host(DType::I64, &[1, 3]),
            ("cu_seqlens", "of shape [1, 3]", "1 dimension, [sequences + 1]"),
        ),
        (|a| a.workspace = host_mut(DType::U8, &[1, 64]), ("workspace", "of shape [1, 64]", "1 dimension, [bytes]")),
        (|a| a.alpha = Some(host(DType::F32, &[16])), ("alpha", "of shape [16]", "2 dimensions")),
        (|a| a.beta = Some(host(DType::F32, &[TOKENS, 4, 1])), ("beta", "of shape [4, 4, 1]", "2 dimensions")),
        (|a| a.input_state = Some(host(DType::F32, &[2, 4, 16384])), ("input_state", "[2, 4, 16384]", "4 dimensions")),
        (|a| a.output = host_mut(DType::BF16, &[TOKENS, 512]), ("output", "of shape [4, 512]", "3 dimensions")),
        (|a| a.output = host_mut(DType::F32, &[TOKENS, 4, 128]), ("output", "F32", "BF16")),
        (|a| a.output_state = host_mut(DType::F32, &[1, 4, 128, 128]), ("output_state", "[1, 4,", "[2, 4,")),
        (|a| a.k = host(DType::F16, &[TOKENS, 2, 128]), ("k", "F16", "BF16")),
        (|a| a.cu_seqlens = host(DType::I32, &[3]), ("cu_seqlens", "I32", "I64")),
        (|a| a.cu_seqlens = host(DType::I64, &[6]), ("sequences", "5 of 4 tokens", "no more than there are tokens")),
        (|a| a.cu_seqlens = on_gpu(DType::I64, &[3]), ("cu_seqlens", "on cuda:0", "memory of cpu")),
        (|a| a.alpha = Some(on_gpu(DType::F32, &[4, 4])), ("alpha", "on cuda:0", "memory of cpu")),
        (|a| a.q = on_gpu(DType::BF16, &[TOKENS, 4, 128]), ("workspace", "0 bytes", "131072 bytes or more")),
        (|a| a.workspace = host_mut(DType::F32, &[4]), ("workspace", "F32", "U8")),
        (|a| a.scale = f64::NAN, ("scale", "NaN", "a positive number")),
        (|a| a.scale = -1.0, ("scale", "-1", "a positive number")),
    ];
    for (change, refusal) in rows {
        assert_refused(host_gdn(change), GDN, refusal);
    }
}

#[test]
fn a_strided_tensor_of_a_prefill_is_refused_on_the_host_too() {
    let result = host_gdn(|args| {
        let (data, shape) = (zeros(DType::BF16, &[TOKENS, 8, HEAD_SIZE]), [TOKENS, 4, HEAD_SIZE]);
        // SAFETY: every other head of eight.
        args.q = unsafe { TensorRef::from_raw(data, Device::Cpu, DType::BF16, &shape, Some(&[1024, 256, 1])) }.unwrap();
    });
    assert_refused(result, GDN, ("q", "strided [1024, 256, 1] with shape [4, 4, 128]", "contiguous row-major"));
}
