//! As `ordering`, of graphs: whether every use of what a graph owns and shares is ordered, whichever goes first.

#[path = "support/launches.rs"]
mod launches;
#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::any::Any;
use std::mem::forget;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError, result};
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors};
use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm};
use flashinfer_rs::{Captured, DType, FlashInferError, GraphSet, LaunchGraph, Result, gemma_rmsnorm_cudarc};
use half::bf16;
use launches::{LENGTH, Prefill, SHAPE, TOKENS, capture, graph, graph_over, streams};
use ordering::{with_driver, zeros};

/// All orders of three.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

fn drop_in(order: [usize; 3], mut all: [Option<Box<dyn Any>>; 3]) {
    order.iter().for_each(|&i| drop(all[i].take()));
}

#[test]
fn graphs_are_ordered_with_every_other_use() {
    with_driver("graphs_are_ordered_with_every_other_use", |driver| {
        let [a, b, c] = streams();
        driver.ordered("buffers that are filled and read between launches", || {
            let weight = Arc::new(zeros::<bf16>(&a, 64));
            let mut graph = graph(&b, &weight);
            for stream in [&a, &b, &c] {
                let (out, mut input, _) = graph.buffers().unwrap();
                stream.clone_dtoh(&out).unwrap();
                stream.memset_zeros(&mut input).unwrap();
                graph.launch().unwrap();
                // Also in the other order: captured anew after what was launched.
                capture(&mut graph).unwrap();
                graph.launch().unwrap();
            }
            let (mut out, ..) = graph.into_buffers().unwrap();
            a.memset_zeros(&mut out).unwrap();
        });
        driver.ordered("calls with the graph's buffers between launches", || {
            let weight = Arc::new(zeros::<bf16>(&a, 64));
            let mut graph = graph(&b, &weight);
            for _ in 0..2 {
                graph.launch().unwrap();
                let (mut out, mut input, _) = graph.buffers().unwrap();
                let own = zeros::<bf16>(&c, 64);
                gemma_rmsnorm_cudarc(&c, &input, &own, &mut out, 2, 64, DType::BF16, 1e-6).unwrap();
                gemma_rmsnorm_cudarc(&c, &out, &own, &mut input, 2, 64, DType::BF16, 1e-6).unwrap();
            }
        });
        driver.ordered("a prefill", || {
            let (context, prefill) = (GdnPrefillContext::new(&b).unwrap(), Prefill::apart(&a, &[3, 0, 5]));
            let Prefill { offsets, output, output_state, qkv, .. } = prefill;
            let mut graph = LaunchGraph::new(&c, (context, offsets, output, output_state, qkv)).unwrap();
            let captured = graph.capture(|s, (mut context, offsets, mut output, mut output_state, [q, k, v])| {
                let (per_token, states) = ([TOKENS, 1, 128], [3, 1, 128, 128]);
                let mut tensors = GdnTensors {
                    output: output.write(&per_token)?,
                    output_state: output_state.write(&states)?,
                    q: q.read(&per_token)?,
                    k: k.read(&per_token)?,
                    v: v.read(&per_token)?,
                };
                context.prefill(&mut tensors, &offsets, &GdnOptions::default(), s)
            });
            captured.unwrap();
            graph.launch().unwrap();
            let (.., qkv) = graph.buffers().unwrap();
            qkv.into_iter().for_each(|mut buffer| a.memset_zeros(&mut buffer).unwrap());
            graph.launch().unwrap();
        });
        driver.ordered("captures that panic and that fail", || {
            let weight = Arc::new(zeros::<bf16>(&a, 64));
            let mut graph = graph(&b, &weight);
            graph.launch().unwrap();
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                graph.capture(|s, (mut out, input, weight)| {
                    let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
                    rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &NormOptions::default(), s)?;
                    panic!("on purpose")
                })
            }));
            assert!(panicked.is_err());
            driver.fail_next();
            assert!(capture(&mut graph).is_err());
            graph.launch().unwrap();
            capture(&mut graph).unwrap();
            graph.launch().unwrap();
        });
        drop([a, b, c]);
        assert_eq!(driver.live(), [0; 5], "nothing is left");
        assert_eq!(driver.retains(0), 0);
    });
}

#[test]
fn graphs_that_share_a_buffer_are_ordered() {
    with_driver("graphs_that_share_a_buffer_are_ordered", |driver| {
        let [a, b, c] = streams();
        let both = || {
            let weight = Arc::new(zeros::<bf16>(&a, 64));
            let mut graphs = [&b, &c].map(|stream| graph(stream, &weight));
            graphs.iter_mut().for_each(|graph| graph.launch().unwrap());
            (graphs, weight)
        };
        for order in ORDERS {
            driver.ordered(&format!("dropped in the order {order:?} of the graphs and the weight"), || {
                let ([first, second], weight) = both();
                drop_in(order, [Some(Box::new(first)), Some(Box::new(second)), Some(Box::new(weight))]);
            });
            driver.ordered(&format!("taken out, then dropped in the order {order:?}"), || {
                let ([first, second], weight) = both();
                let (first, second) = (first.into_buffers().unwrap(), second.into_buffers().unwrap());
                drop_in(order, [Some(Box::new(first)), Some(Box::new(second)), Some(Box::new(weight))]);
            });
        }
        driver.ordered("taken out, then written", || {
            let ([first, second], weight) = both();
            drop((first.into_buffers().unwrap(), second));
            let mut weight = Arc::into_inner(weight).unwrap();
            a.memset_zeros(&mut weight).unwrap();
        });
        driver.ordered("one graph, and the program's own reads of its weight", || {
            let weight = Arc::new(zeros::<bf16>(&a, 64));
            let mut only = graph(&b, &weight);
            only.launch().unwrap();
            c.clone_dtoh(&*weight).unwrap();
            c.synchronize().unwrap();
            drop((only, weight));
        });
    });
}

/// cudarc forgets what it tracked with the last stream that is not the null stream; a graph may hold it.
#[test]
fn a_graph_may_hold_the_last_stream() {
    with_driver("a_graph_may_hold_the_last_stream", |driver| {
        let made = || {
            let context = CudaContext::new(0).unwrap();
            let (null, stream) = (context.default_stream(), context.new_stream().unwrap());
            let weight = Arc::new(zeros::<bf16>(&null, 64));
            let mut graph = graph_over(|| Arc::clone(&null), &stream, &weight);
            drop(stream);
            graph.launch().unwrap();
            (graph, weight)
        };
        driver.ordered("dropped before what it shares", || {
            let (graph, weight) = made();
            drop(graph);
            drop(weight);
        });
        driver.ordered("dropped behind what it shares", || {
            let (graph, weight) = made();
            drop(weight);
            drop(graph);
        });
        driver.ordered("taken out", || {
            let (graph, weight) = made();
            let (mut out, ..) = graph.into_buffers().unwrap();
            let null = Arc::clone(out.stream());
            null.memset_zeros(&mut out).unwrap();
            drop(weight);
        });
        driver.ordered("a prefill's context", || {
            let context = CudaContext::new(0).unwrap();
            let (null, stream) = (context.default_stream(), context.new_stream().unwrap());
            let (mut prefill, mut own) = (Prefill::new(&null, &[3, 5]), GdnPrefillContext::new(&stream).unwrap());
            prefill.call(&mut own, &stream).unwrap();
            drop(stream);
            drop(prefill);
            drop(own);
        });
        assert_eq!(driver.live(), [0; 5]);
    });
}

/// What cannot be ordered is waited for; where that cannot be either, the memory is kept.
#[test]
fn a_graph_that_cannot_order_its_buffers_release_keeps_them_until_it_has_run() {
    let name = "a_graph_that_cannot_order_its_buffers_release_keeps_them_until_it_has_run";
    with_driver(name, |driver| {
        const RELAXED: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let end = |stream: &Arc<CudaStream>| {
            // SAFETY: the stream is live; what was captured is given up.
            unsafe { result::stream::end_capture(stream.cu_stream()) }.ok();
            stream.context().check_err().ok();
        };
        let made = |homes: [&Arc<CudaStream>; 3], on: &Arc<CudaStream>| {
            let weight = Arc::new(zeros::<bf16>(homes[2], 64));
            let mut next = homes.into_iter();
            let mut graph = graph_over(|| Arc::clone(next.next().unwrap()), on, &weight);
            graph.launch().unwrap();
            graph
        };
        let [a, b, c, g] = streams();

        driver.ordered("cudarc keeps an error", || {
            let graph = made([&a, &b, &c], &g);
            g.context().record_err::<()>(Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_PERMITTED)));
            drop(graph);
        });
        g.context().check_err().ok();
        driver.ordered("cudarc keeps an error, and the program gets the buffers", || {
            let mut graph = made([&a, &b, &c], &g);
            g.context().record_err::<()>(Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_PERMITTED)));
            let (mut out, ..) = graph.buffers().unwrap();
            g.context().check_err().ok();
            a.memset_zeros(&mut out).unwrap();
        });
        for place in 0..3 {
            let homes = [&a, &b, &c];
            let graph = made(homes, &g);
            driver.ordered(&format!("the stream of buffer {place} captures"), || {
                homes[place].begin_capture(RELAXED).unwrap();
                let (out, input, weight) = graph.into_buffers().unwrap();
                // Its own release would be a part of the program's capture, which is cudarc's.
                match place {
                    0 => drop((forget(out), input, weight)),
                    1 => drop((out, forget(input), weight)),
                    _ => drop((out, input, forget(weight))),
                }
                end(homes[place]);
            });
        }
        let mut graph = made([&a, &b, &c], &g);
        let memory = driver.live()[2];
        driver.ordered("the graph's stream captures", || {
            g.begin_capture(RELAXED).unwrap();
            driver.refused("buffers of a graph whose stream captures", || graph.buffers().map(drop));
            drop(graph);
            end(&g);
        });
        assert_eq!(driver.live()[2], memory, "what may still be in use is not released");
        let graph = made([&a, &b, &c], &g);
        g.begin_capture(RELAXED).unwrap();
        driver.refused("to take a graph apart whose stream captures", || graph.into_buffers());
        end(&g);
    });
}

/// Captures of one set run in the order of their launches, over the same buffers, each in as much of them as it wants.
#[test]
fn captures_of_a_set_share_its_buffers() {
    with_driver("captures_of_a_set_share_its_buffers", |driver| {
        let [a, b, c] = streams();
        fn rows(
            set: &mut GraphSet<(CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>)>,
            rows: i64,
        ) -> Result<Captured> {
            set.capture(rows as u64, |s, (mut out, mut input, weight)| {
                let (shape, weight) = ([rows, 64], weight.read(&LENGTH)?);
                rmsnorm(&mut out.write(&shape)?, &input.read(&shape)?, &weight, &NormOptions::default(), s)?;
                rmsnorm(&mut input.write(&shape)?, &out.read(&shape)?, &weight, &NormOptions::default(), s)
            })
        }
        let set = || GraphSet::new(&b, (zeros(&a, 128), zeros(&c, 128), zeros(&a, 64))).unwrap();
        driver.ordered("captures that are launched in turn, and buffers that are used in between", || {
            let mut set = set();
            for (size, nodes) in [(2, 2), (1, 2)] {
                assert_eq!(rows(&mut set, size).unwrap(), Captured::Instantiated);
                assert_eq!(set.nodes(size as u64), nodes);
            }
            assert_eq!(rows(&mut set, 2).unwrap(), Captured::Updated);
            assert_eq!(set.keys().collect::<Vec<_>>(), [2, 1]);
            for stream in [&a, &c] {
                for key in [2, 1, 1, 2] {
                    set.launch(key).unwrap();
                }
                let (out, mut input, _) = set.buffers().unwrap();
                stream.clone_dtoh(&out).unwrap();
                stream.memset_zeros(&mut input).unwrap();
            }
            let (mut out, ..) = set.into_buffers().unwrap();
            c.memset_zeros(&mut out).unwrap();
        });
        driver.ordered("a capture that fails leaves each as it was", || {
            let mut set = set();
            rows(&mut set, 2).unwrap();
            let before = driver.live();
            driver.fail_next();
            assert!(rows(&mut set, 1).is_err());
            driver.fail_next();
            assert!(rows(&mut set, 2).is_err());
            assert_eq!(driver.live(), before, "no stream, graph or executable is left of it");
            assert_eq!((set.nodes(2), set.nodes(1)), (2, 0));
            set.launch(2).unwrap();
            let queued = driver.queued();
            match set.launch(1) {
                Err(FlashInferError::Graph { problem, .. }) => assert!(problem.contains("the key 1"), "{problem}"),
                other => panic!("{other:?}"),
            }
            assert_eq!(driver.queued(), queued);
        });
        drop([a, b, c]);
        assert_eq!(driver.live(), [0; 5], "nothing is left");
    });
}
