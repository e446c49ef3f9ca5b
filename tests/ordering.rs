//! No GPU, and yet: whether every use of a cudarc buffer that safe code can reach is ordered with every other and with the
//! buffer's free. A stand-in for CUDA's driver knows (`ordering_model` shows that it does); it reports what nothing orders,
//! whether or not a GPU would have lost that race. Each test runs in a process of its own.
#![allow(
    clippy::forget_non_drop,
    clippy::drop_non_drop,
    reason = "that tensors have no destructor makes it harmless to leak them, which is tested here"
)]

#[path = "support/launches.rs"]
mod launches;
#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::cell::RefCell;
use std::mem::forget;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use flashinfer_rs::kernels::gdn::GdnPrefillContext;
use flashinfer_rs::kernels::norm::{NormOptions, Rmsnorm, rmsnorm};
use flashinfer_rs::{DType, FlashInferRuntime, Prepared, Result, Stream, TensorMut, TensorRef, gemma_rmsnorm_cudarc};
use half::bf16;
use launches::{LENGTH, Norms, Prefill, SHAPE, capture, graph, streams};
use ordering::{with_driver, zeros};

#[test]
fn calls_are_ordered_with_every_other_use() {
    with_driver("calls_are_ordered_with_every_other_use", |driver| {
        type Call = fn(&mut Norms, &CudaStream) -> Result<()>;
        for pools in [true, false] {
            driver.pools(pools);
            let [a, b, c] = streams();
            let null = a.context().default_stream();
            for (place, stream) in [("the same stream", &a), ("another stream", &b), ("the null stream", &null)] {
                let calls: [(&str, Call); 2] = [("norms", Norms::call_every), ("flat", Norms::call_flat)];
                for (name, call) in calls {
                    for made in [Norms::new, |stream: &Arc<CudaStream>| Norms::apart(stream)] {
                        driver.ordered(&format!("{name} on {place}"), || {
                            let mut norms = made(&a);
                            norms.fill_and_read(&c);
                            call(&mut norms, stream).unwrap();
                            norms.fill_and_read(&a);
                            call(&mut norms, stream).unwrap();
                            call(&mut norms, stream).unwrap();
                            norms.fill_and_read(&b);
                            call(&mut norms, &c).unwrap();
                            norms.fill_and_read(&c);
                            call(&mut norms, stream).unwrap();
                        });
                    }
                }
            }
        }
        assert!(driver.queued()[0] > 0);
        assert_eq!(driver.live(), [0; 5], "and nothing is left");
        assert_eq!(driver.retains(0), 0);
    });
}

#[test]
fn prefills_are_ordered_with_every_other_use() {
    with_driver("prefills_are_ordered_with_every_other_use", |driver| {
        let [a, b, c] = streams();
        for (name, lengths) in [("no empty sequence", &[3, 5][..]), ("an empty one", &[3, 0, 5])] {
            driver.ordered(name, || {
                let mut context = GdnPrefillContext::new(&b).unwrap();
                let mut prefill = Prefill::apart(&a, lengths);
                prefill.fill_and_read(&a);
                prefill.call(&mut context, &b).unwrap();
                prefill.fill_and_read(&c);
                prefill.call(&mut context, &b).unwrap();
                prefill.call(&mut context, &b).unwrap();
                prefill.fill_and_read(&a);
                prefill.call(&mut context, &b).unwrap();
            });
        }
        driver.ordered("flat", || {
            let (mut prefill, mut workspace) = (Prefill::apart(&a, &[3, 5]), zeros(&a, 128 * 1024));
            for stream in [&b, &c, &a] {
                prefill.call_flat(&mut workspace, stream).unwrap();
                prefill.fill_and_read(&c);
            }
        });
    });
}

#[test]
fn scopes_are_ordered_with_every_other_use() {
    with_driver("scopes_are_ordered_with_every_other_use", |driver| {
        let [a, b, c] = streams();
        let runtime = FlashInferRuntime::global().unwrap();
        driver.ordered("in a scope", || {
            let mut norms = Norms::apart(&a);
            runtime.on(&b, |s| norms.call_on(&b, s)).unwrap().unwrap();
            norms.fill_and_read(&a);
            runtime.on(&b, |_| norms.call(&c)).unwrap().unwrap();
        });
        driver.ordered("a scope that panics", || {
            let mut norms = Norms::apart(&a);
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                runtime.on(&b, |s| {
                    norms.call_on(&b, s).unwrap();
                    panic!("on purpose");
                })
            }));
            assert!(panicked.is_err());
            norms.fill_and_read(&a);
            norms.call(&c).unwrap();
        });
        driver.ordered("a scope that panics while its tensors are there", || {
            let mut norms = Norms::apart(&a);
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                let mut out = TensorMut::from_cudarc(&b, &mut norms.out, &SHAPE).unwrap();
                let input = TensorRef::from_cudarc(&b, &norms.input, &SHAPE).unwrap();
                let weight = TensorRef::from_cudarc(&b, &norms.weight, &LENGTH).unwrap();
                runtime.on(&b, |s| {
                    rmsnorm(&mut out, &input, &weight, &NormOptions::default(), s).unwrap();
                    panic!("on purpose");
                })
            }));
            assert!(panicked.is_err());
            norms.fill_and_read(&a);
        });
    });
}

#[test]
fn tensors_that_are_used_again_are_ordered() {
    with_driver("tensors_that_are_used_again_are_ordered", |driver| {
        let [a, b, c] = streams();
        let options = NormOptions::default();
        driver.ordered("many calls with the same tensors", || {
            let mut norms = Norms::apart(&a);
            {
                let mut out = TensorMut::from_cudarc(&b, &mut norms.out, &SHAPE).unwrap();
                let input = TensorRef::from_cudarc(&b, &norms.input, &SHAPE).unwrap();
                let weight = TensorRef::from_cudarc(&b, &norms.weight, &LENGTH).unwrap();
                for _ in 0..3 {
                    rmsnorm(&mut out.reborrow(), &input.reborrow(), &weight, &options, Stream::cudarc(&b)).unwrap();
                }
            }
            norms.fill_and_read(&a);
        });
        driver.ordered("another stream reads between two calls with one tensor", || {
            let mut norms = Norms::apart(&a);
            let weight = TensorRef::from_cudarc(&b, &norms.weight, &LENGTH).unwrap();
            let call = |out: &mut CudaSlice<bf16>| {
                let mut out = TensorMut::from_cudarc(&b, out, &SHAPE).unwrap();
                let input = TensorRef::from_cudarc(&b, &norms.input, &SHAPE).unwrap();
                rmsnorm(&mut out, &input, &weight, &options, Stream::cudarc(&b)).unwrap();
            };
            call(&mut norms.out);
            c.clone_dtoh(&norms.out).unwrap();
            a.memset_zeros(&mut norms.out).unwrap();
            call(&mut norms.out);
            call(&mut norms.residual);
        });
        driver.ordered("views of parts", || {
            let (mut all, weight, another) = (zeros::<bf16>(&a, 512), zeros(&b, 64), zeros(&c, 64));
            let (mut out, input) = all.split_at_mut(128);
            let input = input.into_view();
            gemma_rmsnorm_cudarc(&b, &input.slice(64..), &weight, &mut out, 2, 64, DType::BF16, 1e-6).unwrap();
            gemma_rmsnorm_cudarc(&c, &input, &another, &mut out.slice_mut(0..64), 1, 64, DType::BF16, 1e-6).unwrap();
            a.memset_zeros(&mut all.slice_mut(64..)).unwrap();
        });
    });
}

#[test]
fn streams_may_go_before_buffers() {
    with_driver("streams_may_go_before_buffers", |driver| {
        // Not the last stream, with which cudarc's tracking goes.
        let [a, _last] = streams();
        let another = || a.context().new_stream().unwrap();
        driver.ordered("that of the calls", || {
            let (mut norms, b, c) = (Norms::apart(&a), another(), another());
            norms.call_every(&b).unwrap();
            drop(b);
            norms.fill_and_read(&c);
            norms.call_flat(&c).unwrap();
            drop(c);
        });
        driver.ordered("that of a prefill and its context", || {
            let (mut prefill, b) = (Prefill::apart(&a, &[3, 0, 5]), another());
            let mut context = GdnPrefillContext::new(&b).unwrap();
            drop(b);
            let b = Arc::clone(context.stream().unwrap());
            prefill.call(&mut context, &b).unwrap();
            drop((b, context));
        });
        driver.ordered("that of a graph", || {
            let (weight, b) = (Arc::new(zeros(&a, 64)), another());
            let mut graph = graph(&b, &weight);
            drop(b);
            graph.launch().unwrap();
            capture(&mut graph).unwrap();
            graph.launch().unwrap();
            let (out, ..) = graph.into_buffers().unwrap();
            drop((weight, out));
        });
    });
}

#[test]
fn two_halves_of_a_buffer_may_be_written_on_two_streams() {
    with_driver("two_halves_of_a_buffer_may_be_written_on_two_streams", |driver| {
        let [a, b, c] = streams();
        let options = NormOptions::default();
        // One event for both: a record for one must not hide that of the other.
        driver.ordered("two halves that are written on two streams", || {
            let mut halves = zeros::<bf16>(&a, 256);
            let (mut left, mut right) = halves.split_at_mut(128);
            let inputs = [&b, &c].map(|stream| (zeros::<bf16>(stream, 128), zeros::<bf16>(stream, 64)));
            let mut left = TensorMut::from_cudarc(&b, &mut left, &SHAPE).unwrap();
            let mut right = TensorMut::from_cudarc(&c, &mut right, &SHAPE).unwrap();
            for (out, stream, (input, weight)) in [(&mut left, &b, &inputs[0]), (&mut right, &c, &inputs[1])] {
                let input = TensorRef::from_cudarc(stream, input, &SHAPE).unwrap();
                let weight = TensorRef::from_cudarc(stream, weight, &LENGTH).unwrap();
                rmsnorm(out, &input, &weight, &options, Stream::cudarc(stream)).unwrap();
            }
        });
    });
}

#[test]
fn buffers_that_move_between_threads_are_ordered() {
    with_driver("buffers_that_move_between_threads_are_ordered", |driver| {
        let [a, b, c] = streams();
        driver.ordered("made here, used and dropped there", || {
            let mut norms = Norms::apart(&a);
            norms.call(&b).unwrap();
            norms.fill_and_read(&a);
            let there = std::thread::spawn({
                let c = Arc::clone(&c);
                move || {
                    norms.call_every(&c).unwrap();
                    norms
                }
            });
            let mut norms = there.join().unwrap();
            norms.fill_and_read(&a);
            let b = Arc::clone(&b);
            std::thread::spawn(move || norms.call(&b).unwrap()).join().unwrap();
        });
        driver.ordered("a graph and a prefill", || {
            let weight = Arc::new(zeros(&a, 64));
            let mut moved = graph(&b, &weight);
            let (mut context, mut prefill) = (GdnPrefillContext::new(&c).unwrap(), Prefill::apart(&a, &[3, 5]));
            moved.launch().unwrap();
            let c = Arc::clone(&c);
            let there = std::thread::spawn(move || {
                moved.launch().unwrap();
                capture(&mut moved).unwrap();
                moved.launch().unwrap();
                prefill.call(&mut context, &c).unwrap();
            });
            there.join().unwrap();
            drop(weight);
        });
    });
}

#[test]
fn a_tensor_that_is_leaked_orders_as_one_that_is_dropped() {
    with_driver("a_tensor_that_is_leaked_orders_as_one_that_is_dropped", |driver| {
        let [a, b] = streams();
        let options = NormOptions::default();
        /// What holds itself is never dropped.
        struct Cycle<'a> {
            _tensors: (TensorMut<'a>, TensorRef<'a>, TensorRef<'a>),
            itself: RefCell<Option<Rc<Cycle<'a>>>>,
        }
        for leak in ["not", "forgotten", "a cycle"] {
            let call = |norms: &mut Norms| {
                let mut out = TensorMut::from_cudarc(&b, &mut norms.out, &SHAPE).unwrap();
                let input = TensorRef::from_cudarc(&b, &norms.input, &SHAPE).unwrap();
                let weight = TensorRef::from_cudarc(&b, &norms.weight, &LENGTH).unwrap();
                rmsnorm(&mut out, &input, &weight, &options, Stream::cudarc(&b)).unwrap();
                let tensors = (out, input, weight);
                match leak {
                    "forgotten" => forget(tensors),
                    "a cycle" => {
                        let cycle = Rc::new(Cycle { _tensors: tensors, itself: RefCell::default() });
                        cycle.itself.replace(Some(Rc::clone(&cycle)));
                    }
                    _ => drop(tensors),
                }
            };
            driver.ordered(&format!("leaked: {leak}; then the buffers are dropped"), || call(&mut Norms::apart(&a)));
            driver.ordered(&format!("leaked: {leak}; then they are used"), || {
                let mut norms = Norms::apart(&a);
                call(&mut norms);
                norms.fill_and_read(&a);
                a.synchronize().unwrap();
                b.synchronize().unwrap();
            });
        }
        driver.ordered("what was reborrowed is used and leaked", || {
            let mut norms = Norms::apart(&a);
            let mut out = TensorMut::from_cudarc(&b, &mut norms.out, &SHAPE).unwrap();
            let input = TensorRef::from_cudarc(&b, &norms.input, &SHAPE).unwrap();
            let weight = TensorRef::from_cudarc(&b, &norms.weight, &LENGTH).unwrap();
            let (mut again, input_again) = (out.reborrow(), input.reborrow());
            rmsnorm(&mut again, &input_again, &weight, &options, Stream::cudarc(&b)).unwrap();
            forget((again, input_again));
        });
    });
}

/// The one test that knows how a prepared call has its tensors.
#[test]
fn prepared_calls_are_ordered() {
    with_driver("prepared_calls_are_ordered", |driver| {
        let [a, b] = streams();
        for leaked in [false, true] {
            driver.ordered(if leaked { "a prepared call whose tensors are leaked" } else { "a prepared call" }, || {
                let mut norms = Norms::apart(&a);
                norms.fill_and_read(&a);
                let mut out = TensorMut::from_cudarc(&b, &mut norms.out, &SHAPE).unwrap();
                let input = TensorRef::from_cudarc(&b, &norms.input, &SHAPE).unwrap();
                let weight = TensorRef::from_cudarc(&b, &norms.weight, &LENGTH).unwrap();
                let prepared = Prepared::<Rmsnorm>::new(&out, &input, &weight, &NormOptions::default()).unwrap();
                prepared.launch(&mut out, &input, &weight, Stream::cudarc(&b)).unwrap();
                prepared.launch(&mut out, &input, &weight, Stream::cudarc(&b)).unwrap();
                if leaked { forget((prepared, out, input, weight)) } else { drop((prepared, out, input, weight)) }
            });
        }
    });
}

/// What cudarc itself leaves open, done with cudarc alone and done with this crate: it may become better, never worse.
#[test]
fn what_cudarc_leaves_open_is_no_worse_here() {
    with_driver("what_cudarc_leaves_open_is_no_worse_here", |driver| {
        let null_and_another = || {
            let context = CudaContext::new(0).unwrap();
            (context.default_stream(), context.new_stream().unwrap())
        };
        // With the last stream but the null stream cudarc's tracking goes, and so does the order of the free.
        driver.no_worse_than_cudarc(
            "the stream of the call is dropped before the buffers",
            || {
                let (a, b) = null_and_another();
                let mut norms = Norms::new(&a);
                norms.call(&b).unwrap();
                drop(b);
            },
            || {
                let (a, b) = null_and_another();
                let mut norms = Norms::new(&a);
                b.memset_zeros(&mut norms.out).unwrap();
                b.clone_dtoh(&norms.input).unwrap();
                drop(b);
            },
        );
        // A buffer has one event for all its reads: what is recorded last hides the reads on other streams.
        driver.no_worse_than_cudarc(
            "two streams read one buffer",
            || {
                let [a, b, c] = streams();
                let (mut first, mut second) = (Norms::new(&a), Norms::new(&a));
                first.call(&b).unwrap();
                std::mem::swap(&mut first.weight, &mut second.weight);
                second.call(&c).unwrap();
            },
            || {
                let [a, b, c] = streams();
                let norms = Norms::new(&a);
                b.clone_dtoh(&norms.weight).unwrap();
                c.clone_dtoh(&norms.weight).unwrap();
            },
        );
        driver.no_worse_than_cudarc(
            "a call and a graph read one buffer",
            || {
                let [a, b, c] = streams();
                let weight = Arc::new(zeros::<bf16>(&a, 64));
                let mut graph = graph(&b, &weight);
                let (mut out, input) = (zeros::<bf16>(&a, 128), zeros::<bf16>(&a, 128));
                gemma_rmsnorm_cudarc(&c, &input, &*weight, &mut out, 2, 64, DType::BF16, 1e-6).unwrap();
                graph.launch().unwrap();
            },
            || {
                let [a, b, c] = streams();
                let weight = zeros::<bf16>(&a, 64);
                c.clone_dtoh(&weight).unwrap();
                b.clone_dtoh(&weight).unwrap();
            },
        );
    });
}
