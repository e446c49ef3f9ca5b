//! Captures of compute graphs that fail, over the stand-in for CUDA's driver of `ordering`: each is told by its own error, and leaves
//! what was captured before, the run and its stream as they were.

#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use flashinfer_rs::compute::{Buckets, Columns, DeviceRun, Dim, Graph, GraphBuilder, GraphError, Pad};
use flashinfer_rs::{DType, FlashInferError};
use half::bf16;
use ordering::{Driver, Module, with_driver};

const COLUMNS: u64 = 64;

/// Three norms, one of the other.
fn norms() -> Graph {
    let mut g = GraphBuilder::new("norms", 2);
    let x = g.input("x", DType::BF16, [Dim::BATCH, Dim::fixed(COLUMNS)], Pad::Value(1)).unwrap();
    let weight = g.weight("weight", DType::BF16, [Dim::fixed(COLUMNS)]).unwrap();
    let a = g.rmsnorm(&x, &weight, 1e-6).unwrap();
    let b = g.rmsnorm(&a, &weight, 1e-6).unwrap();
    let c = g.rmsnorm(&b, &weight, 1e-6).unwrap();
    g.output("normed", c).unwrap();
    g.finish().unwrap()
}

fn stream() -> Arc<CudaStream> {
    CudaContext::new(0).unwrap().new_stream().unwrap()
}

fn run(stream: &Arc<CudaStream>) -> DeviceRun {
    let mut run = DeviceRun::new(&norms(), &Buckets::new(&[1, 2]).unwrap(), stream).unwrap();
    run.weight("weight", &[bf16::ONE; COLUMNS as usize]).unwrap();
    run.set_rows(2).unwrap();
    run.input("x", &[bf16::ONE; 2 * COLUMNS as usize]).unwrap();
    run
}

fn refused<T>(result: flashinfer_rs::Result<T>) -> GraphError {
    match result {
        Err(FlashInferError::ComputeGraph(error)) => *error,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("it was taken"),
    }
}

/// That a capture which fails so answers the error, before anything was captured and behind that, and leaves all as it was.
fn fails(driver: &Driver, fail: impl Fn(), check: impl Fn(&GraphError)) {
    let stream = stream();
    let mut run = run(&stream);
    let live = driver.live();
    fail();
    check(&refused(run.capture()));
    assert_eq!([1, 2].map(|bucket| run.captured(bucket)), [None; 2]);
    assert_eq!(driver.live(), live, "no stream, graph or executable is left of it");
    assert!(matches!(run.run(1), Err(FlashInferError::Graph { .. })));
    driver.ordered("steps node by node behind it", || run.step().unwrap());

    run.capture().unwrap();
    let (captured, live) = ([1, 2].map(|bucket| run.captured(bucket)), driver.live());
    fail();
    check(&refused(run.capture()));
    assert_eq!([1, 2].map(|bucket| run.captured(bucket)), captured);
    assert_eq!(driver.live(), live, "no stream, graph or executable is left of it");
    let queued = driver.queued();
    driver.ordered("what was captured before", || {
        run.run(2).unwrap();
        run.step().unwrap();
        assert_eq!(run.read("normed").unwrap().len() as u64, 2 * COLUMNS);
    });
    assert_eq!(driver.queued(), [queued[0] + 3, queued[1] + 2]);
    // And so is another capture.
    run.capture().unwrap();
    driver.ordered("what is captured behind it", || run.run(1).unwrap());
}

#[test]
fn what_cuda_does_not_capture_is_refused_and_leaves_all_as_it_was() {
    with_driver("what_cuda_does_not_capture_is_refused_and_leaves_all_as_it_was", |driver| {
        let norm = Module::open("norm.so");
        // The last node of the largest bucket's waits for the stream, which ends the capture without an error of its own.
        let wait = || norm.set("wait_at", 3);
        fails(driver, wait, |error| match error {
            GraphError::CaptureRefused { graph, batch, reason } => {
                assert_eq!((&graph[..], *batch), ("norms", 2));
                assert!(reason.contains("cannot be part of it"), "{reason}");
                let text = error.to_string();
                assert!(text.contains("is as it was") && text.contains("run steps without a capture"), "{text}");
            }
            other => panic!("{other}"),
        });
        // Of the first node the next one's launch tells, with the node's name.
        let wait = || norm.set("wait_at", 1);
        fails(driver, wait, |error| match error {
            GraphError::Run { node, reason } => {
                assert_eq!(node, "node 1, rmsnorm");
                assert!(reason.contains("launch failed"), "{reason}");
            }
            other => panic!("{other}"),
        });
    });
}

#[test]
fn memory_that_a_kernel_allocates_in_a_capture_is_refused_with_the_node() {
    with_driver("memory_that_a_kernel_allocates_in_a_capture_is_refused_with_the_node", |driver| {
        let norm = Module::open("norm.so");
        for (at, node) in [(1, "node 0, rmsnorm"), (3, "node 2, rmsnorm")] {
            let allocate = || norm.set("allocate_at", at);
            fails(driver, allocate, |error| match error {
                GraphError::AllocationInCapture { graph, batch, node: found } => {
                    assert_eq!((&graph[..], *batch, &found[..]), ("norms", 2, node));
                    let text = error.to_string();
                    assert!(text.contains("allocates memory at node") && text.contains("is as it was"), "{text}");
                }
                other => panic!("{other}"),
            });
        }
    });
}

#[test]
fn a_workspace_that_is_too_small_for_a_gpu_is_said_before_anything_is_allocated() {
    with_driver("a_workspace_that_is_too_small_for_a_gpu_is_said_before_anything_is_allocated", |driver| {
        // A GPU of more multiprocessors than plans count with: XQA divides contexts among all of them.
        driver.multiprocessors(1000);
        let stream = stream();
        let mut g = GraphBuilder::new("attention", 1);
        let lengths = g.input("lengths", DType::I32, [Dim::BATCH], Pad::Value(1)).unwrap();
        let table = g.input("page_table", DType::I32, [Dim::BATCH, Dim::fixed(2)], Pad::Reserved(0)).unwrap();
        let x = g.input("x", DType::BF16, [Dim::BATCH, Dim::fixed(256)], Pad::Value(0)).unwrap();
        let cache = [9, 16, 1, 128].map(Dim::fixed);
        let [k, v] = ["k", "v"].map(|name| g.state(name, DType::BF16, cache).unwrap());
        let q = g.copy(&x, DType::BF16).unwrap();
        let heads = Columns::new(0..256).heads(2);
        let out = g.decode_attention(q.columns(heads), (&k, &v), &table, &lengths, 0.1).unwrap();
        g.output("out", out).unwrap();
        let graph = g.finish().unwrap();
        let live = driver.live();
        match refused(DeviceRun::new(&graph, &Buckets::new(&[1]).unwrap(), &stream)) {
            GraphError::WorkspaceTooSmall { node, planned, needed } => {
                assert_eq!(node, "node 1, decode_attention");
                assert!(0 < planned && planned < needed, "{planned} of {needed}");
            }
            other => panic!("{other}"),
        }
        assert_eq!(driver.live(), live);
    });
}
