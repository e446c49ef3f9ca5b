//! `LaunchGraph` without a GPU: what it asks of CUDA's driver, of which a stand-in counts everything. Results are what
//! `launch_gpu` looks at. Each test runs in a process of its own, where nobody else counts.

#[path = "support/native.rs"]
mod native;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use flashinfer_rs::kernels::norm::{NormOptions, Rmsnorm, rmsnorm, rmsnorm_quant};
use flashinfer_rs::{
    Captured, DType, Device, FlashInferError, FlashInferRuntime, GraphMut, GraphRef, LaunchGraph, Prepared,
    RuntimeConfig, Stream, TensorMut, TensorRef,
};
use half::bf16;
use libloading::os::unix::Library;

const SHAPE: [i64; 2] = [2, 64];
const LENGTH: [i64; 1] = [64];

/// Streams, events, memory, graphs and executables that are there.
type Live = [i32; 5];

struct Driver {
    driver: Library,
    cudart: Library,
    norm: Library,
}

/// Runs a test with the stand-ins, which the dynamic linker finds first: a machine with a GPU has others.
fn with_driver(name: &str, body: impl FnOnce(Driver)) {
    const FOLDER: &str = "LD_LIBRARY_PATH";
    let folder = tempfile::tempdir().unwrap();
    let libraries = [("cuda.c", "libcuda.so.1"), ("cudart.c", "libcudart.so.13"), ("launches.c", "norm.so")];
    libraries.iter().for_each(|(source, soname)| drop(native::compile(source, soname, &[], folder.path())));
    std::os::unix::fs::symlink("libcuda.so.1", folder.path().join("libcuda.so")).unwrap();
    let tvm_ffi = "libtvm_ffi.so";
    fs::copy(native::vendored_libraries().join(tvm_ffi), folder.path().join(tvm_ffi)).unwrap();
    native::isolated_with(name, &[(FOLDER, folder.path())], || {
        // The folder of the process that started this one.
        let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
        body(Driver::load(&folder));
    });
}

impl Driver {
    fn load(folder: &Path) -> Self {
        // SAFETY: the test's own libraries, and the vendored one.
        let config = unsafe { RuntimeConfig::default().lib_dir(folder).without_verification() };
        FlashInferRuntime::initialize(config).unwrap().module("norm.so").unwrap();
        // SAFETY: the test's own libraries, which have no initializers; the first is also what cudarc will open.
        let open = |name| unsafe { Library::new(folder.join(name)) }.unwrap();
        Self { driver: open("libcuda.so.1"), cudart: open("libcudart.so.13"), norm: open("norm.so") }
    }

    fn read<T: Copy>(library: &Library, symbol: &str) -> T {
        // SAFETY: the fixtures' variables, of these types, that nothing writes meanwhile.
        unsafe { **library.get::<*const T>(symbol.as_bytes()).unwrap() }
    }

    fn count(&self, symbol: &str) -> i32 {
        Self::read(&self.driver, symbol)
    }

    fn live(&self) -> Live {
        Self::read(&self.driver, "live")
    }

    fn set(library: &Library, symbol: &str) {
        // SAFETY: as for `read`.
        unsafe { **library.get::<*mut i32>(symbol.as_bytes()).unwrap() = 1 };
    }

    /// The stream, and whether the last norm had programmatic dependent launch.
    fn last_norm(&self) -> (usize, bool) {
        let values: [i64; 11] = Self::read(&self.norm, "seen_values");
        (Self::read(&self.norm, "seen_stream"), values[4] != 0)
    }
}

type Buffers = (CudaSlice<bf16>, Arc<CudaSlice<bf16>>, Vec<CudaSlice<bf16>>);
type Captures<'a> = (GraphMut<'a, bf16>, GraphRef<'a, bf16>, Vec<GraphMut<'a, bf16>>);

fn buffers(stream: &Arc<CudaStream>) -> Buffers {
    let zeros = |count| stream.alloc_zeros::<bf16>(count).unwrap();
    (zeros(128), Arc::new(zeros(64)), vec![zeros(128), zeros(128)])
}

fn calls(stream: Stream<'_>, (input, weight, mut outs): Captures<'_>) -> flashinfer_rs::Result<()> {
    for out in &mut outs {
        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
        rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &NormOptions::default(), stream)?;
    }
    Ok(())
}

#[test]
fn a_capture_is_thread_local_on_a_stream_of_its_own_and_leaves_nothing_behind() {
    let name = "a_capture_is_thread_local_on_a_stream_of_its_own_and_leaves_nothing_behind";
    with_driver(name, |driver| {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let before = driver.live();
        for pdl in [true, false] {
            let mut graph = LaunchGraph::new(&stream, buffers(&stream)).unwrap().with_pdl(pdl);
            assert_eq!(graph.capture(calls).unwrap(), Captured::Instantiated);
            // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            assert_eq!(driver.count("capture_mode"), 1);
            let private: usize = Driver::read(&driver.driver, "captured_stream");
            assert_ne!(private, stream.cu_stream() as usize);
            assert_eq!(driver.last_norm(), (private, pdl));
            let [streams, _, _, graphs, executables] = driver.live();
            assert_eq!((streams, graphs, executables), (before[0], 0, 1), "the capture's stream and graph are gone");
            assert_eq!(graph.nodes(), 7);
            graph.launch().unwrap();
            assert_eq!(Driver::read::<usize>(&driver.driver, "launched_stream"), stream.cu_stream() as usize);
            drop(graph);
            assert_eq!(driver.live(), before);
        }
        assert_eq!((driver.count("captures"), driver.count("launches")), (2, 2));
    });
}

#[test]
fn buffers_are_taken_over_once_and_handed_back_when_the_program_gets_them() {
    with_driver("buffers_are_taken_over_once_and_handed_back_when_the_program_gets_them", |driver| {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let mut graph = LaunchGraph::new(&stream, buffers(&stream)).unwrap();
        graph.capture(calls).unwrap();
        let counts = || (driver.count("waits"), driver.count("records"));
        let before = counts();
        graph.launch().unwrap();
        let since = |before: (i32, i32)| (counts().0 - before.0, counts().1 - before.1);
        // Three that may be written wait for reads and writes, the shared one for writes.
        assert_eq!(since(before), (7, 0));
        graph.launch().unwrap();
        graph.launch().unwrap();
        assert_eq!(since(before), (7, 0), "nobody used them meanwhile");
        // Those that the program may write from now on.
        graph.buffers().unwrap();
        let given = since(before);
        assert_eq!(given.1, 3);
        graph.buffers().unwrap();
        assert_eq!(since(before), given, "nothing was launched meanwhile");
        graph.launch().unwrap();
        assert_eq!(since(before), (given.0 + 7, 3));
        // SAFETY: everything here is on one stream.
        unsafe { context.disable_event_tracking() };
        let before = counts();
        graph.buffers().unwrap();
        graph.launch().unwrap();
        assert_eq!(counts(), before);
    });
}

#[test]
fn a_graph_is_changed_in_place_where_cuda_can_and_made_anew_where_not() {
    let name = "a_graph_is_changed_in_place_where_cuda_can_and_made_anew_where_not";
    with_driver(name, |driver| {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let mut graph = LaunchGraph::new(&stream, buffers(&stream)).unwrap();
        assert_eq!(graph.capture(calls).unwrap(), Captured::Instantiated);
        assert_eq!(graph.capture(calls).unwrap(), Captured::Updated);
        Driver::set(&driver.cudart, "refuse_update");
        assert_eq!(graph.capture(calls).unwrap(), Captured::Instantiated);
        assert_eq!(Driver::read::<i32>(&driver.cudart, "updates"), 2);
        assert_eq!(driver.live()[3..], [0, 1], "one executable, and no graph");
    });
}

#[test]
fn a_capture_that_fails_is_ended_and_the_graph_is_what_it_was() {
    with_driver("a_capture_that_fails_is_ended_and_the_graph_is_what_it_was", |driver| {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let mut graph = LaunchGraph::new(&stream, buffers(&stream)).unwrap();
        graph.capture(calls).unwrap();
        let before = driver.live();

        Driver::set(&driver.driver, "invalidate_next");
        let error = graph.capture(calls).unwrap_err();
        assert!(matches!(error, FlashInferError::Graph { .. }), "{error}");
        assert!(error.to_string().contains("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"), "{error}");
        let error = graph.capture(|_, _| Err(FlashInferError::NotInitialized)).unwrap_err();
        assert!(matches!(error, FlashInferError::NotInitialized), "{error}");
        Driver::set(&driver.norm, "fail_next");
        let error = graph.capture(calls).unwrap_err();
        assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            graph.capture(|_, _| panic!("on purpose")).unwrap();
        }));
        assert!(panicked.is_err());

        assert_eq!((driver.live(), driver.count("abandoned")), (before, 0));
        graph.launch().unwrap();
        assert_eq!(graph.capture(calls).unwrap(), Captured::Updated);
    });
}

#[test]
fn memory_that_is_not_the_graphs_is_refused() {
    with_driver("memory_that_is_not_the_graphs_is_refused", |driver| {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let other = CudaContext::new(1).unwrap().new_stream().unwrap();
        for place in 0..3 {
            let (mut input, mut weight, mut outs) = buffers(&stream);
            match place {
                0 => input = other.alloc_zeros(128).unwrap(),
                1 => weight = Arc::new(other.alloc_zeros(64).unwrap()),
                _ => outs[1] = other.alloc_zeros(128).unwrap(),
            }
            let error = LaunchGraph::new(&stream, (input, weight, outs)).unwrap_err();
            assert!(matches!(error, FlashInferError::InvalidArgument { function: "graph", .. }), "{error}");
            assert!(
                error.to_string().contains("cuda:1, expected memory in the stream's context, of cuda:0"),
                "{error}"
            );
        }
        let (foreign, mut graph) =
            (stream.alloc_zeros::<bf16>(128).unwrap(), LaunchGraph::new(&stream, buffers(&stream)).unwrap());
        let refused = graph.capture(|s, (_, weight, mut outs)| {
            let input = TensorRef::from_cudarc(&stream, &foreign, &SHAPE)?;
            rmsnorm(&mut outs[0].write(&SHAPE)?, &input, &weight.read(&LENGTH)?, &NormOptions::default(), s)
        });
        let error = refused.unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { argument: "input", .. }), "{error}");
        let refused = graph.capture(|s, _| {
            let (zeros, mut out) = ([bf16::ZERO; 64], [bf16::ZERO; 64]);
            let (shape, weight) = ([1, 64], TensorRef::from_slice(&zeros, &LENGTH)?);
            let mut out = TensorMut::from_slice(&mut out, &shape)?;
            rmsnorm(&mut out, &TensorRef::from_slice(&zeros, &shape)?, &weight, &NormOptions::default(), s)
        });
        let error = refused.unwrap_err();
        assert!(error.to_string().contains("on cpu, expected memory of the GPU whose graph is captured"), "{error}");
        assert_eq!(driver.count("launches"), 0);
        // The scope's own stream is not what a capture's tensors are for.
        let mut out = stream.alloc_zeros::<bf16>(128).unwrap();
        let refused = graph.capture(|_, (input, weight, _)| {
            let mut out = TensorMut::from_cudarc(&stream, &mut out, &SHAPE)?;
            let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
            rmsnorm(&mut out, &input, &weight, &NormOptions::default(), Stream::cudarc(&stream))
        });
        assert!(refused.unwrap_err().to_string().contains("for stream"));
        assert_eq!(stream.context().ordinal(), 0);
        assert!(FlashInferRuntime::global().unwrap().on((Device::Cuda(1), Stream::NULL), |_| ()).is_ok());
    });
}

#[test]
fn parts_of_buffers_are_where_they_should_be() {
    with_driver("parts_of_buffers_are_where_they_should_be", |driver| {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let zeros = |count| stream.alloc_zeros::<bf16>(count).unwrap();
        let (eight, weight) = (stream.alloc_zeros::<u8>(128).unwrap(), Arc::new(zeros(64)));
        let mut graph = LaunchGraph::new(&stream, ([zeros(128), zeros(256)], eight, weight)).unwrap();
        let values = || Driver::read::<[i64; 11]>(&driver.norm, "seen_values");
        let options = NormOptions::default();
        let capture = graph.capture(|s, ([input, rest], mut eight, weight)| {
            assert_eq!((input.len(), rest.len(), eight.len(), weight.len()), (128, 256, 128, 64));
            assert!(!input.is_empty() && !weight.is_empty());
            let (none, input) = input.split_at(0)?;
            assert!(none.is_empty() && none.read(&[0]).is_ok() && none.read(&[1]).is_err());
            let weight_tensor = weight.read(&LENGTH)?;
            // Two rows of each half of 256, in place of each other.
            let (mut first, second) = rest.split_at(128)?;
            rmsnorm(&mut first.write(&SHAPE)?, &second.read(&SHAPE)?, &weight_tensor, &options, s)?;
            assert_eq!(values()[1] - values()[0], 128 * 2, "the second half of bf16");
            let seen = [values()[0], values()[2]];
            assert_eq!([first.as_mut_ptr().addr() as i64, weight.as_ptr().addr() as i64], seen);
            let apart = second.read_strided(&[1, 64], &[64, 1])?;
            rmsnorm(&mut first.write_strided(&[1, 64], &[128, 1])?, &apart, &weight_tensor, &options, s)?;
            assert!(
                second.read_strided(&[2, 64], &[65, 1]).is_err() && first.write_strided(&[2, 64], &[-64, 1]).is_err()
            );
            assert!(
                weight.read_strided(&[2, 32], &[32, 1]).is_ok() && weight.read_strided(&[2, 32], &[33, 1]).is_err()
            );
            let bytes = DType::F8E4M3;
            let input_tensor = input.read(&SHAPE)?;
            rmsnorm_quant(&mut eight.write_bytes(bytes, &SHAPE)?, &input_tensor, &weight_tensor, 0.5, &options, s)?;
            assert!(eight.write_bytes(DType::BF16, &SHAPE).is_err() && first.into_ref().read(&SHAPE).is_ok());
            assert!(input.split_at(129).is_err());
            Ok(())
        });
        capture.unwrap();
        let ([input, rest], eight, weight) = graph.buffers().unwrap();
        assert_eq!((input.len(), rest.len(), eight.len(), weight.len()), (128, 256, 128, 64));
        assert_eq!(format!("{graph:?}"), "LaunchGraph { nodes: 7, pdl: true, .. }");
        assert_eq!(graph.stream().cu_stream(), stream.cu_stream());
        let before = (driver.count("waits"), driver.count("records"));
        graph.launch().unwrap();
        assert_eq!((driver.count("waits") - before.0, driver.count("records") - before.1), (7, 0));
        let ([_, rest], ..) = graph.into_buffers().unwrap();
        assert_eq!(rest.len(), 256);
        let mut graph = LaunchGraph::new(&stream, vec![zeros(8), zeros(16)]).unwrap();
        let lengths = |buffers: &[usize]| assert_eq!(buffers, [8, 16]);
        lengths(&graph.buffers().unwrap().iter().map(|buffer| buffer.len()).collect::<Vec<_>>());
        lengths(&graph.into_buffers().unwrap().iter().map(CudaSlice::len).collect::<Vec<_>>());
        let other = CudaContext::new(1).unwrap().new_stream().unwrap();
        let foreign = [zeros(8), other.alloc_zeros::<bf16>(8).unwrap()];
        assert!(LaunchGraph::new(&stream, foreign).is_err());
    });
}

#[test]
fn a_prepared_call_is_captured_and_is_for_the_stream_of_its_tensors() {
    with_driver("a_prepared_call_is_captured_and_is_for_the_stream_of_its_tensors", |driver| {
        let context = CudaContext::new(0).unwrap();
        let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let (mut out, weight, _) = buffers(&stream);
        let input = stream.alloc_zeros::<bf16>(128).unwrap();
        let options = NormOptions::default();
        let mut out = TensorMut::from_cudarc(&stream, &mut out, &SHAPE).unwrap();
        let input = TensorRef::from_cudarc(&stream, &input, &SHAPE).unwrap();
        let weight = TensorRef::from_cudarc(&stream, &*weight, &LENGTH).unwrap();
        let prepared = Prepared::<Rmsnorm>::new(&out, &input, &weight, &options).unwrap();
        assert_eq!(format!("{prepared:?}"), "Prepared { kernel: \"rmsnorm\", .. }");
        prepared.launch(&mut out, &input, &weight, Stream::cudarc(&stream)).unwrap();
        let calls = || Driver::read::<i64>(&driver.norm, "seen_calls");
        let before = calls();
        let refused = prepared.launch(&mut out, &input, &weight, Stream::cudarc(&other)).unwrap_err();
        assert!(refused.to_string().contains("out is for stream"), "{refused}");
        assert_eq!(calls(), before);

        let mut graph = LaunchGraph::new(&stream, buffers(&stream)).unwrap();
        let captured = graph.capture(|s, (input, weight, mut outs)| {
            let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
            prepared.launch(&mut outs[0].write(&SHAPE)?, &input, &weight, s)
        });
        captured.unwrap();
        let private: usize = Driver::read(&driver.driver, "captured_stream");
        assert_eq!(driver.last_norm(), (private, true), "and has the graph's programmatic dependent launch");

        // What was prepared on the host is computed there, and no part of a graph.
        let (zeros, mut host) = ([bf16::ZERO; 64], [bf16::ZERO; 64]);
        let mut host = TensorMut::from_slice(&mut host, &[1, 64]).unwrap();
        let (input, weight) =
            (TensorRef::from_slice(&zeros, &[1, 64]).unwrap(), TensorRef::from_slice(&zeros, &LENGTH).unwrap());
        let on_host = Prepared::<Rmsnorm>::new(&host, &input, &weight, &options).unwrap();
        on_host.launch(&mut host, &input, &weight, Stream::NULL).unwrap();
        let error = graph.capture(|s, _| on_host.launch(&mut host, &input, &weight, s)).unwrap_err();
        assert!(error.to_string().contains("memory of the GPU whose graph is captured"), "{error}");
    });
}
