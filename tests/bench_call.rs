//! Kernels of FlashInfer-Bench's kind, bound to their definitions and called, on the host. Rust closures stand for kernels,
//! through the real libtvm_ffi.so.

#[path = "support/native.rs"]
mod native;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flashinfer_rs::bench::{
    Argument, Axis, BoundKernel, DataType, Definition, Destination, DistributedKernel, HostTensor, Kernel, Named,
    Scalar, TensorSpec,
};
use flashinfer_rs::object::{Any, Array, Error, Func, HostAllocator, IntoAny, Tensor};
use flashinfer_rs::{
    Arg, DType, Device, FlashInferError, FlashInferRuntime, Result, RuntimeConfig, Stream, TensorMut, TensorRef,
};

/// C = A B^T.
fn gemm() -> Definition {
    let mut definition = Definition::new("gemm_n2_k3", "gemm");
    definition.axes = Named::from([("M", Axis::variable()), ("N", Axis::constant(2)), ("K", Axis::constant(3))]);
    definition.inputs = Named::from([
        ("A", TensorSpec::tensor(&["M", "K"], DataType::Float32)),
        ("B", TensorSpec::tensor(&["N", "K"], DataType::Float32)),
    ]);
    definition.outputs = Named::from([("C", TensorSpec::tensor(&["M", "N"], DataType::Float32))]);
    definition
}

fn multiply(a: &[f32], b: &[f32], c: &mut [f32]) {
    for (row, out) in a.chunks_exact(3).zip(c.chunks_exact_mut(2)) {
        for (other, out) in b.chunks_exact(3).zip(out) {
            *out = row.iter().zip(other).map(|(x, y)| x * y).sum();
        }
    }
}

/// A float32 tensor's elements.
fn elements<'a>(tensor: &'a TensorRef<'_>) -> &'a [f32] {
    assert_eq!((tensor.dtype(), tensor.device()), (DType::F32, Device::Cpu));
    let len = tensor.shape().iter().product::<i64>() as usize;
    // SAFETY: what a bound kernel is called with is contiguous, and of the type that was just seen.
    unsafe { std::slice::from_raw_parts(tensor.as_ptr().cast(), len) }
}

/// A kernel of a closure, and how often it was called.
fn kernel(
    destination_passing: bool,
    closure: impl for<'a> Fn(&[Arg<'a>]) -> Result<Any> + Send + Sync + 'static,
) -> (Kernel, Arc<AtomicUsize>) {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let func = Func::new(move |args| {
        counted.fetch_add(1, Ordering::Relaxed);
        closure(args)
    });
    (Kernel::new(func.unwrap().named("closure"), destination_passing), calls)
}

/// Writes the product into its third argument.
fn into_c() -> (Kernel, Arc<AtomicUsize>) {
    kernel(true, |args| {
        let (a, b) = (args[0].as_tensor()?, args[1].as_tensor()?);
        // SAFETY: whoever calls the kernel lends an output that nothing else uses.
        let mut c = unsafe { args[2].as_tensor_mut() }?;
        let len = c.shape().iter().product::<i64>() as usize;
        // SAFETY: as above, contiguous and of float32, since it was compared with the definition.
        let out = unsafe { std::slice::from_raw_parts_mut(c.as_mut_ptr().cast(), len) };
        multiply(elements(&a), elements(&b), out);
        Ok(Any::NONE)
    })
}

/// Returns the product.
fn returning_c() -> (Kernel, Arc<AtomicUsize>) {
    kernel(false, |args| {
        let (a, b) = (args[0].as_tensor()?, args[1].as_tensor()?);
        let mut c = vec![0.0; a.shape()[0] as usize * 2];
        multiply(elements(&a), elements(&b), &mut c);
        Tensor::from_vec(c, &[a.shape()[0], 2])?.into_any()
    })
}

const A: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
const B: [f32; 6] = [1.0, 0.0, 1.0, 0.0, 2.0, 0.0];
const C: [f32; 4] = [4.0, 4.0, 10.0, 10.0];

fn inputs() -> (Tensor, Tensor) {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    (Tensor::from_vec(A.to_vec(), &[2, 3]).unwrap(), Tensor::from_vec(B.to_vec(), &[2, 3]).unwrap())
}

fn call(bound: &BoundKernel<'_>, inputs: &[Argument<'_>], outputs: &[Destination<'_>]) -> Result<()> {
    // SAFETY: the test's own kernels are sound with what fits their definitions.
    unsafe { bound.call(inputs, outputs, Stream::NULL) }
}

fn call_returning(bound: &BoundKernel<'_>, inputs: &[Argument<'_>]) -> Result<Vec<Tensor>> {
    // SAFETY: as above.
    unsafe { bound.call_returning(inputs, &HostAllocator, Stream::NULL) }
}

#[test]
fn a_kernel_is_given_its_outputs() {
    let ((kernel, calls), definition) = (into_c(), gemm());
    let bound = kernel.bind(&definition).unwrap();
    let (a, b) = inputs();
    let c = Tensor::zeros(DType::F32, &[2, 2]).unwrap();
    call(&bound, &[(&a).into(), (&b).into()], &[(&c).into()]).unwrap();
    assert_eq!(c.as_slice::<f32>().unwrap(), C);
    // Tensors that are only lent.
    let (a, b) = (TensorRef::from_slice(&A, &[2, 3]).unwrap(), TensorRef::from_slice(&B, &[2, 3]).unwrap());
    let mut c = [0f32; 4];
    let mut out = TensorMut::from_slice(&mut c, &[2, 2]).unwrap();
    call(&bound, &[(&a).into(), (&b).into()], &[(&mut out).into()]).unwrap();
    assert_eq!((c, calls.load(Ordering::Relaxed)), (C, 2));
    // A variable axis may be empty.
    let none = Tensor::zeros(DType::F32, &[0, 3]).unwrap();
    let out = Tensor::zeros(DType::F32, &[0, 2]).unwrap();
    call(&bound, &[(&none).into(), (&b).into()], &[(&out).into()]).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 3);
}

#[test]
fn a_kernel_returns_its_outputs() {
    let definition = gemm();
    let (a, b) = inputs();
    for (kernel, calls) in [returning_c(), into_c()] {
        let bound = kernel.bind(&definition).unwrap();
        let outputs = call_returning(&bound, &[(&a).into(), (&b).into()]).unwrap();
        assert_eq!((outputs.len(), outputs[0].shape()), (1, &[2, 2][..]));
        assert_eq!(outputs[0].as_slice::<f32>().unwrap(), C);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }
    let (kernel, calls) = returning_c();
    let c = Tensor::zeros(DType::F32, &[2, 2]).unwrap();
    let error = call(&kernel.bind(&definition).unwrap(), &[(&a).into(), (&b).into()], &[(&c).into()]).unwrap_err();
    assert!(error.to_string().contains("it returns them; use call_returning"), "{error}");
    assert_eq!(calls.load(Ordering::Relaxed), 0);
}

#[test]
fn several_outputs_are_returned_in_an_array() {
    let mut definition = gemm();
    definition.outputs.insert("D", TensorSpec::tensor(&["M"], DataType::Int32));
    let (a, b) = inputs();
    let arguments = [(&a).into(), (&b).into()];
    let c = || Tensor::from_vec(C.to_vec(), &[2, 2]);
    let d = |len: i64| Tensor::from_vec(vec![7i32; len as usize], &[len]);
    let (both, _) = kernel(false, move |_| Array::from_items([c()?, d(2)?])?.into_any());
    let outputs = call_returning(&both.bind(&definition).unwrap(), &arguments).unwrap();
    assert_eq!((outputs.len(), outputs[1].as_slice::<i32>().unwrap()), (2, &[7, 7][..]));
    type Answer = fn() -> Result<Any>;
    let answers: [(Answer, &[&str]); 6] = [
        (|| Ok(Any::NONE), &["its result", "0 values", "an array of 2 tensors"]),
        (|| Ok(5i64.into()), &["of type int", "an array of 2 tensors"]),
        (|| Tensor::zeros(DType::F32, &[2, 2])?.into_any(), &["1 values"]),
        (|| Array::from_items([1, 2])?.into_any(), &["a value of type int among them"]),
        (
            || Array::from_items([Tensor::zeros(DType::F32, &[2, 3])?, Tensor::zeros(DType::I32, &[2])?])?.into_any(),
            &["output \"C\"", "float32[2, 3] on cpu", "float32[M = 2, N = 2]", "dimension 1"],
        ),
        (
            || Array::from_items([Tensor::zeros(DType::F32, &[2, 2])?, Tensor::zeros(DType::I64, &[2])?])?.into_any(),
            &["output \"D\"", "int64[2] on cpu", "int32[M = 2]"],
        ),
    ];
    for (answer, says) in answers {
        let (kernel, calls) = kernel(false, move |_| answer());
        let error = call_returning(&kernel.bind(&definition).unwrap(), &arguments).unwrap_err().to_string();
        assert!(says.iter().all(|says| error.contains(says)), "{error}");
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn what_a_kernel_raises_is_the_error() {
    let definition = gemm();
    let (a, b) = inputs();
    let (kernel, _) = kernel(true, |_| Err(Error::new("ValueError", "not today")?.into()));
    let error = call_returning(&kernel.bind(&definition).unwrap(), &[(&a).into(), (&b).into()]).unwrap_err();
    let FlashInferError::TvmFfiCall { function, kind, message, .. } = error else { panic!("{error}") };
    assert_eq!([function, kind, message], ["closure", "ValueError", "not today"]);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_runs() {
    let ((kernel, calls), definition) = (into_c(), gemm());
    let bound = kernel.bind(&definition).unwrap();
    let (a, b) = inputs();
    let c = Tensor::zeros(DType::F32, &[2, 2]).unwrap();
    let (a, b, c) = (&a, &b, &c);
    let zeros = |dtype, shape: &[i64]| Tensor::zeros(dtype, shape).unwrap();
    let (wide, half, flat, long) =
        (zeros(DType::F32, &[2, 4]), zeros(DType::F16, &[2, 3]), zeros(DType::F32, &[6]), zeros(DType::F32, &[3, 2]));
    let backwards = TensorRef::from_slice(&A, &[3, 2]).unwrap().transpose(0, 1).unwrap();
    // SAFETY: nothing reads it.
    let on_gpu =
        unsafe { TensorRef::from_raw(0x1000 as *const _, Device::Cuda(0), DType::F32, &[2, 3], None) }.unwrap();
    let owner = HostTensor::zeros(DataType::Int8, &[2, 3]).unwrap().into_object().unwrap();
    type Case<'a> = (Vec<Argument<'a>>, Vec<Destination<'a>>, &'a [&'a str]);
    let cases: Vec<Case<'_>> = vec![
        (vec![a.into()], vec![c.into()], &["inputs: found 1", "expected 2, those of \"gemm_n2_k3\""]),
        (vec![a.into(), b.into(), b.into()], vec![c.into()], &["inputs: found 3"]),
        (vec![a.into(), b.into()], vec![c.into(), c.into()], &["outputs: found 2", "expected 1"]),
        (vec![a.into(), b.into()], vec![], &["outputs: found 0", "expected 1"]),
        (vec![a.into(), 1.into()], vec![c.into()], &["input \"B\"", "the whole number 1", "float32[N = 2, K = 3]"]),
        (vec![a.into(), Argument::ABSENT], vec![c.into()], &["input \"B\"", "found nothing"]),
        (vec![(&half).into(), b.into()], vec![c.into()], &["input \"A\"", "float16[2, 3] on cpu", "float32[M, K = 3]"]),
        (vec![(&owner).into(), b.into()], vec![c.into()], &["input \"A\"", "int8[2, 3]"]),
        (vec![(&flat).into(), b.into()], vec![c.into()], &["input \"A\"", "float32[6]"]),
        (vec![(&wide).into(), b.into()], vec![c.into()], &["input \"A\"", "float32[2, 4]", "K = 3", "dimension 1"]),
        (vec![a.into(), (&wide).into()], vec![c.into()], &["input \"B\"", "K = 3", "dimension 1"]),
        (vec![a.into(), b.into()], vec![(&long).into()], &["output \"C\"", "float32[3, 2]", "M = 2", "dimension 0"]),
        (vec![(&backwards).into(), b.into()], vec![c.into()], &["input \"A\"", "strided [1, 2]", "contiguous"]),
        (vec![a.into(), (&on_gpu).into()], vec![c.into()], &["input \"B\"", "on cuda:0", "the other tensors' device"]),
    ];
    for (inputs, outputs, says) in cases {
        let error = call(&bound, &inputs, &outputs).unwrap_err();
        assert!(matches!(error, FlashInferError::Data(_)), "{error}");
        let error = error.to_string();
        assert!(says.iter().all(|says| error.contains(says)), "{says:?} in: {error}");
        assert!(error.contains("the call of \"closure\""), "{error}");
    }
    assert_eq!(calls.load(Ordering::Relaxed), 0);
}

#[test]
fn scalars_are_what_a_callee_would_make_of_them() {
    let mut definition = Definition::new("scalars", "test");
    let mut optional = TensorSpec::scalar(DataType::Float32);
    optional.optional = true;
    definition.inputs = Named::from([
        ("f", TensorSpec::scalar(DataType::Float32)),
        ("i", TensorSpec::scalar(DataType::Int32)),
        ("b", TensorSpec::scalar(DataType::Bool)),
        ("u", TensorSpec::scalar(DataType::Uint64)),
        ("o", optional),
    ]);
    let (kernel, calls) = kernel(false, |args| {
        assert_eq!(args.len(), 5);
        Ok(Any::NONE)
    });
    let bound = kernel.bind(&definition).unwrap();
    let good: [Argument<'_>; 5] = [1.5.into(), 7.into(), true.into(), 0.into(), 2.0.into()];
    assert!(call_returning(&bound, &good).unwrap().is_empty());
    let may: [(usize, Argument<'_>); 7] = [
        (0, 1.into()),
        (0, Scalar::Bool(true).into()),
        (1, i64::from(i32::MIN).into()),
        (1, true.into()),
        (2, 1.into()),
        (3, i64::MAX.into()),
        (4, Argument::ABSENT),
    ];
    for (at, argument) in may {
        let mut arguments = good;
        arguments[at] = argument;
        call_returning(&bound, &arguments).unwrap();
    }
    assert_eq!(calls.swap(0, Ordering::Relaxed), 1 + may.len());
    let (a, _) = inputs();
    let may_not: [(usize, Argument<'_>, &str); 9] = [
        (0, (&a).into(), "a scalar of float32"),
        (0, Argument::ABSENT, "found nothing"),
        (1, 1.0.into(), "the number 1.0"),
        (1, (1i64 << 40).into(), "a number that int32 has"),
        (1, (i64::from(i32::MIN) - 1).into(), "a number that int32 has"),
        (2, 1.0.into(), "a scalar of bool"),
        (2, 2.into(), "a number that bool has"),
        (3, (-1).into(), "a number that uint64 has"),
        (4, (&a).into(), "a scalar of float32"),
    ];
    for (at, argument, says) in may_not {
        let mut arguments = good;
        arguments[at] = argument;
        let error = call_returning(&bound, &arguments).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("input"), "{error}");
    }
    assert_eq!(calls.load(Ordering::Relaxed), 0);
}

#[test]
fn many_arguments_and_axes_are_compared_as_few_are() {
    const COUNT: usize = 100;
    let mut definition = Definition::new("many", "test");
    for i in 0..COUNT {
        definition.axes.insert(format!("n{i}"), Axis::variable());
        let spec = TensorSpec::tensor(&[&format!("n{i}"), &format!("n{}", i / 2)], DataType::Uint8);
        definition.inputs.insert(format!("x{i}"), spec);
    }
    let (kernel, _) = kernel(false, |args| {
        assert_eq!(args.len(), COUNT);
        Ok(Any::NONE)
    });
    let bound = kernel.bind(&definition).unwrap();
    let tensors = |last: i64| -> Vec<Tensor> {
        let size = |i: usize| if i == COUNT - 1 { last } else { i as i64 % 5 };
        (0..COUNT).map(|i| Tensor::zeros(DType::U8, &[size(i), (i / 2) as i64 % 5]).unwrap()).collect()
    };
    let good = tensors(3);
    assert!(call_returning(&bound, &good.iter().map(Argument::from).collect::<Vec<_>>()).unwrap().is_empty());
    let mut bad = tensors(3);
    bad[50] = Tensor::zeros(DType::U8, &[0, 4]).unwrap();
    let error = call_returning(&bound, &bad.iter().map(Argument::from).collect::<Vec<_>>()).unwrap_err().to_string();
    assert!(error.contains("input \"x50\"") && error.contains("n25 = 0"), "{error}");
}

#[test]
fn a_definition_that_cannot_be_bound_is_refused() {
    let (kernel, _) = into_c();
    type Change = fn(&mut Definition);
    let changes: [(Change, &str); 4] = [
        (
            |definition| {
                definition.axes.insert("M", Axis::constant(u64::MAX));
            },
            "a size of 63 bits",
        ),
        (
            |definition| {
                definition.inputs.insert("X", TensorSpec::tensor(&["Q"], DataType::Bool));
            },
            "the axis \"Q\"",
        ),
        (
            |definition| {
                definition.inputs.insert("X", TensorSpec::tensor(&["M"; 7], DataType::Bool));
            },
            "7 dimensions",
        ),
        (
            |definition| {
                definition.outputs.insert("X", TensorSpec::tensor(&["M"], DataType::Other("unknown".to_owned())));
            },
            "\"unknown\"",
        ),
    ];
    for (change, says) in changes {
        let mut definition = gemm();
        change(&mut definition);
        let error = kernel.bind(&definition).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    // An output with an axis that no input has can be given, but not made.
    let mut definition = gemm();
    definition.axes.insert("L", Axis::variable());
    definition.outputs.insert("C", TensorSpec::tensor(&["M", "L"], DataType::Float32));
    let bound = kernel.bind(&definition).unwrap();
    let (a, b) = inputs();
    let error = call_returning(&bound, &[(&a).into(), (&b).into()]).unwrap_err().to_string();
    assert!(error.contains("output \"C\"") && error.contains("the axis \"L\""), "{error}");
    let c = Tensor::zeros(DType::F32, &[2, 2]).unwrap();
    call(&bound, &[(&a).into(), (&b).into()], &[(&c).into()]).unwrap();
}

/// A folder as upstream hands kernels out, of a C library with the functions `gemm` and `told`, which describes itself.
fn distributed(folder: &Path, entry: &str) -> DistributedKernel {
    fs::rename(native::compile("bench_kernel.c", "kernel.so", &[], folder), folder.join("kernel.so")).unwrap();
    let metadata = format!("Entry Symbol: {entry}\nDefinition: gemm_n2_k3\nSolution: in C\n");
    fs::write(folder.join("kernel_metadata.txt"), metadata).unwrap();
    DistributedKernel::open(folder).unwrap()
}

#[test]
fn a_folder_s_kernel_is_loaded_bound_and_called() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let (folder, definition) = (tempfile::tempdir().unwrap(), gemm());
    let found = distributed(folder.path(), "gemm");
    // SAFETY: the test's own library, without initializers.
    let kernel = unsafe { Kernel::load(&found) }.unwrap();
    assert_eq!((kernel.name(), kernel.definition_name()), ("in C", Some("gemm_n2_k3")));
    assert!(kernel.is_destination_passing());
    let (a, b) = inputs();
    let outputs = call_returning(&kernel.bind(&definition).unwrap(), &[(&a).into(), (&b).into()]).unwrap();
    assert_eq!(outputs[0].as_slice::<f32>().unwrap(), C);
    let other = Definition { name: "gemm_n2_k4".to_owned(), ..gemm() };
    let error = kernel.bind(&other).unwrap_err().to_string();
    assert!(error.contains("\"gemm_n2_k4\"") && error.contains("\"gemm_n2_k3\", which it was made for"), "{error}");
}

#[test]
fn a_file_that_was_changed_since_is_not_loaded() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let found = distributed(folder.path(), "gemm");
    let mut bytes = fs::read(&found.library).unwrap();
    bytes.push(0);
    fs::write(&found.library, bytes).unwrap();
    // SAFETY: as above, but that nothing is loaded.
    let error = unsafe { Kernel::load(&found) }.unwrap_err();
    assert!(matches!(&error, FlashInferError::DigestMismatch { expected, .. } if *expected == found.sha256), "{error}");
}

#[test]
fn the_number_of_arguments_is_compared_where_the_kernel_says_it() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let definition = gemm();
    for (entry, fits) in [("told_three", [true, false]), ("told_two", [false, true])] {
        let folder = tempfile::tempdir().unwrap();
        // SAFETY: the test's own library, without initializers.
        let kernel = unsafe { Kernel::load(&distributed(folder.path(), entry)) }.unwrap();
        for (destination_passing, fits) in [true, false].into_iter().zip(fits) {
            let kernel = kernel.clone().with_destination_passing(destination_passing);
            match kernel.bind(&definition) {
                Ok(_) => assert!(fits, "{entry}"),
                Err(error) => {
                    assert!(!fits && error.to_string().contains("by its metadata"), "{entry}: {error}");
                }
            }
        }
    }
}

#[test]
fn host_tensors_become_objects_and_come_back() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    for dtype in [DataType::Bool, DataType::Int8, DataType::Int16, DataType::Float4E2m1, DataType::Float8E4m3fn] {
        let mut tensor = HostTensor::zeros(dtype, &[2, 3]).unwrap();
        tensor.bytes_mut().iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8 % 2);
        let object = tensor.clone().into_object().unwrap();
        assert_eq!(Some(object.dlpack_dtype()), tensor.dtype().dlpack());
        assert_eq!(HostTensor::from_object(&object).unwrap(), tensor);
    }
    let values: Vec<i32> = (0..6).collect();
    let data = values.as_ptr().cast_mut().cast();
    // SAFETY: the vector owns the memory, wherever it is moved, and nothing writes.
    let turned = unsafe { Tensor::from_owner(values, data, Device::Cpu, DType::I32, &[3, 2], Some(&[1, 3])) }.unwrap();
    let copied = HostTensor::from_object(&turned).unwrap();
    assert_eq!((0..6).map(|i| copied.int(i).unwrap()).collect::<Vec<_>>(), [0, 3, 1, 4, 2, 5]);
    let deep = HostTensor::zeros(DataType::Bool, &[1; 7]).unwrap();
    assert!(matches!(deep.into_object(), Err(FlashInferError::InvalidArgument { argument: "shape", .. })));
}
