//! As `ordering`, of contexts and captures: what cudarc could not order is refused before anything is queued, and what is
//! the program's stays as it was.

#[path = "support/launches.rs"]
mod launches;
#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::mem::forget;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};
use flashinfer_rs::attention::{Batch, Largest, Workspace};
use flashinfer_rs::kernels::gdn::GdnPrefillContext;
use flashinfer_rs::kernels::norm::{NormOptions, fused_add_rmsnorm};
use flashinfer_rs::{CuSeqlens, FlashInferError, FlashInferRuntime, LaunchGraph, Result, Stream, TensorMut, TensorRef};
use half::bf16;
use launches::{LENGTH, Norms, Prefill, SHAPE, capture, graph, streams};
use ordering::{decode_spec, with_driver, zeros};

#[test]
fn memory_of_another_context_object_is_refused() {
    with_driver("memory_of_another_context_object_is_refused", |driver| {
        // Of the same device, and so equal to cudarc; but each tracks its own streams alone.
        let (theirs, ours) = (CudaContext::new(0).unwrap(), CudaContext::new(0).unwrap());
        let (there, here) = (theirs.default_stream(), ours.new_stream().unwrap());
        driver.violations();
        driver.refused("a call", || Norms::new(&there).call(&here));
        driver.refused("a flat call", || Norms::new(&there).call_flat(&here));
        driver.refused("a prefill", || {
            Prefill::new(&there, &[3, 5]).call(&mut GdnPrefillContext::new(&here).unwrap(), &here)
        });
        driver.refused("a prefill's offsets", || {
            let foreign = CuSeqlens::from_lengths(&[3, 5]).unwrap().to_device(&there).unwrap();
            let mut prefill = Prefill { offsets: foreign, ..Prefill::new(&here, &[3, 5]) };
            prefill.call(&mut GdnPrefillContext::new(&here).unwrap(), &here)
        });
        driver.refused("a graph", || LaunchGraph::new(&here, zeros::<bf16>(&there, 8)));
        driver.refused("a graph's shared buffer", || LaunchGraph::new(&here, Arc::new(zeros::<bf16>(&there, 8))));
        driver.refused("a part of a graph's buffers", || {
            LaunchGraph::new(&here, (zeros::<bf16>(&here, 8), vec![zeros::<bf16>(&there, 8)]))
        });
        driver.refused("a graph's prefill", || LaunchGraph::new(&here, GdnPrefillContext::new(&there).unwrap()));

        // Every null stream has the same handle, so the stream of a call does not say whose memory it uses.
        let null = ours.default_stream();
        let (mut input, mut residual) = (zeros::<bf16>(&there, 128), zeros::<bf16>(&here, 128));
        let weight = zeros::<bf16>(&there, 64);
        driver.refused("tensors of two contexts", || {
            let mut input = TensorMut::from_cudarc(&there, &mut input, &SHAPE)?;
            let mut residual = TensorMut::from_cudarc(&null, &mut residual, &SHAPE)?;
            let weight = TensorRef::from_cudarc(&there, &weight, &LENGTH)?;
            fused_add_rmsnorm(&mut input, &mut residual, &weight, &NormOptions::default(), Stream::NULL)
        });
        driver.refused("a prefill's context of another", || {
            let mut prefill = Prefill::new(&there, &[3, 5]);
            let offsets = CuSeqlens::from_lengths(&[3, 5]).unwrap().to_device(&here).unwrap();
            prefill.offsets = offsets;
            prefill.call(&mut GdnPrefillContext::new(&null).unwrap(), &there)
        });
    });
}

/// cudarc keeps an error of a call that cannot answer it, in its context, and waits for nothing until somebody has asked for it.
#[test]
fn an_error_that_cudarc_keeps_is_answered_before_anything_is_queued() {
    with_driver("an_error_that_cudarc_keeps_is_answered_before_anything_is_queued", |driver| {
        let [a, b] = streams();
        let weight = Arc::new(zeros::<bf16>(&a, 64));
        let (mut norms, mut graph) = (Norms::apart(&a), graph(&b, &weight));
        let answered = |case: &str, call: &mut dyn FnMut() -> Result<()>| {
            let before = driver.queued();
            b.context().record_err::<()>(Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_PERMITTED)));
            match call() {
                Err(FlashInferError::Cuda { code: 800, .. }) if driver.queued() == before => {}
                other => driver.fail(case, format_args!("{other:?}")),
            }
            driver.ordered(case, || call().unwrap_or_else(|error| driver.fail(case, error)));
        };
        answered("a call", &mut || norms.call(&b));
        answered("every call", &mut || norms.call_every(&b));
        answered("a graph's launch", &mut || graph.launch());
        driver.ordered("what comes behind", || drop((norms, graph, weight)));
    });
}

#[test]
fn what_allocates_or_copies_is_refused_where_it_could_not_be_ordered() {
    with_driver("what_allocates_or_copies_is_refused_where_it_could_not_be_ordered", |driver| {
        let [a, b] = streams();
        let lengths = CuSeqlens::from_lengths(&[3, 5]).unwrap();
        let mut graph = LaunchGraph::new(&b, lengths.to_device(&b).unwrap()).unwrap();
        let elsewhere = CudaContext::new(0).unwrap().default_stream();
        let buffer = Arc::new(zeros::<bf16>(&a, 8));
        let kept = Arc::clone(&buffer);
        driver.violations();
        a.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
        driver.refused("offsets", || lengths.to_device(&a));
        driver.refused("a context of prefills", || GdnPrefillContext::new(&a));
        driver.refused("other offsets", || graph.buffers()?.replace(&lengths, &a));
        driver.refused("a graph of a buffer of that stream", || LaunchGraph::new(&b, buffer));
        a.context().check_err().ok();
        // SAFETY: the stream is live; what was captured is given up.
        unsafe { result::stream::end_capture(a.cu_stream()) }.ok();
        driver.violations();
        driver.refused("other offsets on a stream of another context object", || {
            graph.buffers()?.replace(&lengths, &elsewhere)
        });
        graph.buffers().unwrap().replace(&lengths, &a).unwrap();
        drop(kept);
    });
}

#[test]
fn contexts_that_are_not_primary_are_refused() {
    with_driver("contexts_that_are_not_primary_are_refused", |driver| {
        let primary = CudaContext::new(0).unwrap();
        let other = driver.another_context();
        assert!(!other.is_primary() && other != primary);
        for stream in [other.new_stream().unwrap(), other.default_stream()] {
            driver.refused("a call", || Norms::new(&stream).call(&stream));
            driver.refused("a flat call", || Norms::new(&stream).call_flat(&stream));
            driver.refused("a prefill", || {
                let mut prefill = Prefill::new(&stream, &[3, 5]);
                prefill.call(&mut GdnPrefillContext::new(&stream)?, &stream)
            });
            driver.refused("a graph", || LaunchGraph::new(&stream, zeros::<bf16>(&stream, 8)));
        }
    });
}

/// A kernel runs in the context that is current, and a null stream is each context's own.
#[test]
fn a_call_runs_in_its_memorys_context_whatever_is_current() {
    with_driver("a_call_runs_in_its_memorys_context_whatever_is_current", |driver| {
        let primary = CudaContext::new(0).unwrap();
        let other = driver.another_context();
        for tracked in [true, false] {
            if !tracked {
                // SAFETY: what is on one stream here is on no other.
                unsafe { primary.disable_event_tracking() };
            }
            for (place, stream) in
                [("a stream", primary.new_stream().unwrap()), ("the null stream", primary.default_stream())]
            {
                let case = format!("a call on {place} while another context is current, tracked: {tracked}");
                let mut norms = Norms::new(&stream);
                other.bind_to_thread().unwrap();
                driver.ordered(&case, || match norms.call(&stream) {
                    // Nothing is looked at there that costs a call of the driver: CUDA itself refuses the launch.
                    Err(FlashInferError::TvmFfiCall { message, .. }) if !tracked && message.contains("400") => {}
                    result => result.unwrap_or_else(|error| driver.fail(&case, error)),
                });
            }
        }
    });
}

/// So are plans of attention, also on a null stream, of which each context has its own; and their lists are written only once the
/// copies of what they held are made.
#[test]
fn plans_are_copied_in_their_workspace_s_context_whatever_is_current() {
    with_driver("plans_are_copied_in_their_workspace_s_context_whatever_is_current", |driver| {
        let context = CudaContext::new(0).unwrap();
        let mut batch = Batch::paged(16, 100).unwrap();
        batch.push(1, &[7, 3], 20).unwrap();
        for stream in [context.default_stream(), context.new_stream().unwrap()] {
            let plans = || {
                let mut workspace = Workspace::new(decode_spec(), Largest::new(4, 4), &stream).unwrap();
                let before = result::ctx::get_current().unwrap();
                for _ in 0..40 {
                    let made = workspace.plan(&batch).unwrap();
                    assert_eq!(made.integers().len(), 10);
                }
                assert_eq!(result::ctx::get_current().unwrap(), before, "what was current stays so");
            };
            driver.ordered("on a thread without a context", || {
                std::thread::scope(|threads| threads.spawn(plans).join().unwrap());
            });
            driver.ordered("where another context is current", || {
                let _other = driver.another_context();
                plans();
                context.bind_to_thread().unwrap();
            });
        }
    });
}

/// The memory is leaked then: a copy of it may be on its way.
#[test]
fn plans_whose_copies_cannot_be_waited_for_never_give_their_lists_back() {
    with_driver("plans_whose_copies_cannot_be_waited_for_never_give_their_lists_back", |driver| {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let mut batch = Batch::paged(16, 100).unwrap();
        batch.push(1, &[7, 3], 20).unwrap();
        for (plans, failing) in [(1, 0), (1, 1), (4, 0), (5, 1), (30, 1)] {
            driver.ordered(&format!("{plans} plans"), || {
                let mut workspace = Workspace::new(decode_spec(), Largest::new(4, 4), &stream).unwrap();
                for _ in 0..plans {
                    workspace.plan(&batch).unwrap();
                }
                driver.fail_waits(failing);
                drop(workspace);
                driver.fail_waits(0);
            });
        }
        driver.ordered("an event is not recorded, and its copies not waited for", || {
            let mut workspace = Workspace::new(decode_spec(), Largest::new(4, 4), &stream).unwrap();
            (0..3).for_each(|_| _ = workspace.plan(&batch).unwrap());
            driver.fail_records(1);
            driver.fail_waits(1);
            workspace.plan(&batch).unwrap_err();
            (0..30).for_each(|_| _ = workspace.plan(&batch).unwrap());
        });
    });
}

/// The per-thread stream is another one in each thread, and these may be sent to one.
#[test]
fn the_stream_of_each_thread_is_refused_by_what_may_be_sent() {
    with_driver("the_stream_of_each_thread_is_refused_by_what_may_be_sent", |driver| {
        let stream = CudaContext::new(0).unwrap().per_thread_stream();
        driver.refused("a context of prefills", || GdnPrefillContext::new(&stream));
        driver.refused("a graph", || LaunchGraph::new(&stream, zeros::<bf16>(&stream, 64)));
    });
}

#[test]
fn a_threads_current_context_stays_what_it_was() {
    with_driver("a_threads_current_context_stays_what_it_was", |driver| {
        let [a, b] = streams();
        let elsewhere = CudaContext::new(1).unwrap();
        let weight = Arc::new(zeros::<bf16>(&a, 64));
        let (mut norms, mut graph) = (Norms::apart(&a), graph(&b, &weight));
        let (mut prefill, mut context) = (Prefill::apart(&a, &[3, 0, 5]), GdnPrefillContext::new(&b).unwrap());
        let runtime = FlashInferRuntime::global().unwrap();
        let others = [elsewhere, driver.another_context()];
        for other in &others {
            other.bind_to_thread().unwrap();
            let before = driver.current();
            let unchanged = |case: &str, body: &mut dyn FnMut() -> Result<()>| {
                other.bind_to_thread().unwrap();
                body().unwrap_or_else(|error| driver.fail(case, error));
                if driver.current() != before {
                    driver.fail(case, format_args!("context {} is current, was {before}", driver.current()));
                }
            };
            unchanged("a call", &mut || norms.call(&b));
            unchanged("every call", &mut || norms.call_every(&b));
            unchanged("a flat call", &mut || norms.call_flat(&b));
            unchanged("a scope", &mut || runtime.on(&b, |s| norms.call_on(&b, s)).and_then(|result| result));
            unchanged("a prefill", &mut || prefill.call(&mut context, &b));
            unchanged("a graph's capture", &mut || capture(&mut graph));
            unchanged("a graph's launch", &mut || graph.launch());
        }
    });
}

/// cudarc's waits and records cannot be captured by it: they would end the capture. So nothing is begun.
#[test]
fn calls_on_a_stream_that_is_captured_are_refused_and_the_capture_goes_on() {
    let name = "calls_on_a_stream_that_is_captured_are_refused_and_the_capture_goes_on";
    with_driver(name, |driver| {
        type Buffers = (Norms, Prefill, GdnPrefillContext);
        type Call = fn(&mut Buffers, &Arc<CudaStream>) -> Result<()>;
        let calls: [(&str, Call); 5] = [
            ("a call", |(norms, ..), stream| norms.call(stream)),
            ("every call", |(norms, ..), stream| norms.call_every(stream)),
            ("a flat call", |(norms, ..), stream| norms.call_flat(stream)),
            ("a scope", |(norms, ..), stream| {
                FlashInferRuntime::global()?.on(stream, |s| norms.call_on(stream, s)).and_then(|result| result)
            }),
            ("a prefill", |(_, prefill, context), stream| prefill.call(context, stream)),
        ];
        let capture = |case: &str, stream: &Arc<CudaStream>, call: &mut dyn FnMut() -> Result<()>| {
            stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            driver.refused(case, call);
            match stream.end_capture(CUgraphInstantiate_flags(0)) {
                Ok(captured) => {
                    let mut nodes = 0;
                    if let Some(captured) = captured {
                        // SAFETY: the graph is live; without a place for the nodes only their number is answered.
                        unsafe { sys::cuGraphGetNodes(captured.cu_graph(), ptr::null_mut(), &mut nodes) };
                    }
                    if nodes != 0 {
                        driver.fail(case, format_args!("{nodes} nodes were captured"));
                    }
                }
                Err(error) => {
                    driver.fail(case, format_args!("the capture: {error}"));
                    // SAFETY: the stream is live; what was captured is given up.
                    unsafe { result::stream::end_capture(stream.cu_stream()) }.ok();
                    stream.context().check_err().ok();
                }
            }
        };
        for (case, call) in calls {
            let [a, b] = streams();
            // Filled on other streams, so that there is something to wait for.
            let mut buffers = (Norms::apart(&a), Prefill::apart(&a, &[3, 0, 5]), GdnPrefillContext::new(&b).unwrap());
            capture(case, &b, &mut || call(&mut buffers, &b));
            driver.ordered(case, || {
                call(&mut buffers, &b).unwrap_or_else(|error| driver.fail(case, error));
                drop(buffers);
            });
        }
        let [a, b] = streams();
        let weight = Arc::new(zeros::<bf16>(&a, 64));
        let mut graph = graph(&b, &weight);
        capture("a graph's launch", &b, &mut || graph.launch());
        driver.ordered("a graph's launch", || {
            graph.launch().unwrap_or_else(|error| driver.fail("a graph's launch", error));
            drop((graph, weight));
        });
    });
}

/// Without tracking there is nothing to wait for, and a program that captures orders its streams itself.
#[test]
fn calls_without_tracking_can_be_captured() {
    with_driver("calls_without_tracking_can_be_captured", |driver| {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: everything is on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().unwrap();
        let mut norms = Norms::new(&stream);
        driver.ordered("captured by cudarc", || {
            stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            norms.call_every(&stream).unwrap();
            let captured = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
            captured.launch().unwrap();
        });
        assert_eq!(driver.queued(), [0, 1], "the kernels ran with the graph");
    });
}

/// To ask whether the context is lost must not end the capture.
#[test]
fn a_call_that_fails_in_a_capture_leaves_it_valid() {
    with_driver("a_call_that_fails_in_a_capture_leaves_it_valid", |driver| {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: everything is on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().unwrap();
        let mut norms = Norms::new(&stream);
        norms.call(&stream).unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        driver.fail_next();
        assert!(matches!(norms.call(&stream), Err(FlashInferError::TvmFfiCall { .. })));
        if let Err(error) = stream.end_capture(CUgraphInstantiate_flags(0)) {
            driver.fail("the capture", error);
        }
    });
}

#[test]
fn a_lost_context_has_its_name_in_every_launch() {
    with_driver("a_lost_context_has_its_name_in_every_launch", |driver| {
        let [a, b] = streams();
        let weight = Arc::new(zeros::<bf16>(&a, 64));
        let (mut norms, mut graph) = (Norms::apart(&a), graph(&b, &weight));
        let lost = |case: &str, result: Result<()>| match result {
            Err(FlashInferError::ContextLost { device: 0, code: 700, .. }) => {}
            other => driver.fail(case, format_args!("{other:?}")),
        };
        driver.lose();
        // First, while nobody knows yet.
        lost("a graph's launch", graph.launch());
        lost("a call", norms.call(&b));
        lost("a graph's launch again", graph.launch());
        lost("every call", norms.call_every(&b));
        forget((norms, graph, weight));
    });
}
