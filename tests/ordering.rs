//! No GPU, and yet: whether every use of a cudarc buffer that safe code can reach is ordered with every other and with the
//! buffer's free. A stand-in for CUDA's driver knows (`ordering_model` shows that it does); it reports what nothing orders,
//! whether or not a GPU would have lost that race. Each test runs in a process of its own.

#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::any::Any;
use std::cell::RefCell;
use std::mem::forget;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, result};
use flashinfer_rs::kernels::gdn_context::{CuSeqlens, DeviceCuSeqlens, GdnOptions, GdnPrefillContext, GdnTensors};
use flashinfer_rs::kernels::norm::{
    NormOptions, fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm, layernorm,
    rmsnorm, rmsnorm_quant,
};
use flashinfer_rs::{
    DType, FlashInferError, FlashInferRuntime, LaunchGraph, Prepared, Result, Stream, TensorMut, TensorRef,
    gdn_prefill_sm90_cudarc_with_options, gemma_rmsnorm_cudarc,
};
use half::bf16;
use ordering::{with_driver, zeros};

const SHAPE: [i64; 2] = [2, 64];
const LENGTH: [i64; 1] = [64];
const TOKENS: i64 = 8;

/// Buffers of every norm.
struct Norms {
    out: CudaSlice<bf16>,
    input: CudaSlice<bf16>,
    residual: CudaSlice<bf16>,
    weight: CudaSlice<bf16>,
    eight: CudaSlice<u8>,
    gamma: CudaSlice<f32>,
    beta: CudaSlice<f32>,
}

impl Norms {
    fn new(stream: &Arc<CudaStream>) -> Self {
        Self::made(|| Arc::clone(stream))
    }

    /// Each buffer on a stream of its own, which is where it is freed: what orders one of them orders no other.
    fn apart(stream: &CudaStream) -> Self {
        Self::made(|| stream.context().new_stream().unwrap())
    }

    fn made(stream: impl Fn() -> Arc<CudaStream>) -> Self {
        Self {
            out: zeros(&stream(), 128),
            input: zeros(&stream(), 128),
            residual: zeros(&stream(), 128),
            weight: zeros(&stream(), 64),
            eight: zeros(&stream(), 128),
            gamma: zeros(&stream(), 64),
            beta: zeros(&stream(), 64),
        }
    }

    /// One call of one norm.
    fn call(&mut self, stream: &CudaStream) -> Result<()> {
        self.call_on(stream, Stream::cudarc(stream))
    }

    /// Tensors for one stream, a call on what should be the same.
    fn call_on(&mut self, stream: &CudaStream, on: Stream<'_>) -> Result<()> {
        let mut out = TensorMut::from_cudarc(stream, &mut self.out, &SHAPE)?;
        let input = TensorRef::from_cudarc(stream, &self.input, &SHAPE)?;
        let weight = TensorRef::from_cudarc(stream, &self.weight, &LENGTH)?;
        rmsnorm(&mut out, &input, &weight, &NormOptions::default(), on)
    }

    /// One call of each.
    fn call_every(&mut self, stream: &CudaStream) -> Result<()> {
        let (s, options) = (Stream::cudarc(stream), NormOptions::default());
        let mut out = TensorMut::from_cudarc(stream, &mut self.out, &SHAPE)?;
        let mut input = TensorMut::from_cudarc(stream, &mut self.input, &SHAPE)?;
        let mut residual = TensorMut::from_cudarc(stream, &mut self.residual, &SHAPE)?;
        let mut eight = TensorMut::from_cudarc_bytes(stream, &mut self.eight, DType::F8E4M3, &SHAPE)?;
        let weight = TensorRef::from_cudarc(stream, &self.weight, &LENGTH)?;
        let gamma = TensorRef::from_cudarc(stream, &self.gamma, &LENGTH)?;
        let beta = TensorRef::from_cudarc(stream, &self.beta, &LENGTH)?;
        rmsnorm(&mut out, &input.as_ref(), &weight, &options, s)?;
        gemma_rmsnorm(&mut out, &input.as_ref(), &weight, &options, s)?;
        layernorm(&mut out, &input.as_ref(), &gamma, &beta, 1e-6, s)?;
        fused_add_rmsnorm(&mut input, &mut residual, &weight, &options, s)?;
        gemma_fused_add_rmsnorm(&mut input, &mut residual, &weight, &options, s)?;
        rmsnorm_quant(&mut eight, &input.as_ref(), &weight, 0.5, &options, s)?;
        fused_add_rmsnorm_quant(&mut eight, &out.as_ref(), &mut residual, &weight, 0.5, &options, s)
    }

    fn call_flat(&mut self, stream: &CudaStream) -> Result<()> {
        gemma_rmsnorm_cudarc(stream, &self.input, &self.weight, &mut self.out, 2, 64, DType::BF16, 1e-6)
    }

    /// Uses by a stream before and after: what the library does must fit in between. All that calls only read is written
    /// here, since cudarc itself does not order reads on two streams with what comes behind them.
    fn fill_and_read(&mut self, stream: &Arc<CudaStream>) {
        stream.memset_zeros(&mut self.input).unwrap();
        stream.memset_zeros(&mut self.weight).unwrap();
        stream.memset_zeros(&mut self.gamma).unwrap();
        stream.memset_zeros(&mut self.beta).unwrap();
        stream.clone_dtoh(&self.out).unwrap();
    }
}

/// Buffers of a prefill of two sequences that have tokens, or of three of which one has none.
struct Prefill {
    offsets: DeviceCuSeqlens,
    sequences: i64,
    output: CudaSlice<bf16>,
    output_state: CudaSlice<f32>,
    input_state: CudaSlice<f32>,
    qkv: [CudaSlice<bf16>; 3],
    alpha: CudaSlice<f32>,
    beta: CudaSlice<f32>,
}

impl Prefill {
    fn new(stream: &Arc<CudaStream>, lengths: &[i64]) -> Self {
        Self::made(|| Arc::clone(stream), lengths)
    }

    /// As [`Norms::apart`].
    fn apart(stream: &CudaStream, lengths: &[i64]) -> Self {
        Self::made(|| stream.context().new_stream().unwrap(), lengths)
    }

    fn made(stream: impl Fn() -> Arc<CudaStream>, lengths: &[i64]) -> Self {
        let (tokens, sequences) = (TOKENS as usize, lengths.len());
        Self {
            offsets: CuSeqlens::from_lengths(lengths).unwrap().to_device(&stream()).unwrap(),
            sequences: sequences as i64,
            output: zeros(&stream(), tokens * 128),
            output_state: zeros(&stream(), sequences * 128 * 128),
            input_state: zeros(&stream(), sequences * 128 * 128),
            qkv: [(); 3].map(|()| zeros(&stream(), tokens * 128)),
            alpha: zeros(&stream(), tokens),
            beta: zeros(&stream(), tokens),
        }
    }

    fn call(&mut self, context: &mut GdnPrefillContext, stream: &CudaStream) -> Result<()> {
        let (per_token, states) = ([TOKENS, 1, 128], [self.sequences, 1, 128, 128]);
        let [q, k, v] = &self.qkv;
        let tensors = GdnTensors {
            output: TensorMut::from_cudarc(stream, &mut self.output, &per_token)?,
            output_state: TensorMut::from_cudarc(stream, &mut self.output_state, &states)?,
            q: TensorRef::from_cudarc(stream, q, &per_token)?,
            k: TensorRef::from_cudarc(stream, k, &per_token)?,
            v: TensorRef::from_cudarc(stream, v, &per_token)?,
        };
        let options = GdnOptions {
            input_state: Some(TensorRef::from_cudarc(stream, &self.input_state, &states)?),
            alpha: Some(TensorRef::from_cudarc(stream, &self.alpha, &[TOKENS, 1])?),
            beta: Some(TensorRef::from_cudarc(stream, &self.beta, &[TOKENS, 1])?),
            scale: 0.0,
        };
        context.prefill(tensors, &self.offsets, options)
    }

    /// As [`Norms::fill_and_read`].
    fn fill_and_read(&mut self, stream: &Arc<CudaStream>) {
        self.qkv.iter_mut().for_each(|buffer| stream.memset_zeros(buffer).unwrap());
        for buffer in [&mut self.input_state, &mut self.alpha, &mut self.beta] {
            stream.memset_zeros(buffer).unwrap();
        }
        stream.clone_dtoh(&self.output_state).unwrap();
    }

    fn call_flat(&mut self, workspace: &mut CudaSlice<u8>, stream: &Arc<CudaStream>) -> Result<()> {
        let offsets = stream.clone_htod(&[0i64, 3, TOKENS]).unwrap();
        let [q, k, v] = &self.qkv;
        let (output, output_state) = (&mut self.output, &mut self.output_state);
        let (state, alpha, beta) = (Some(&self.input_state), Some(&self.alpha), Some(&self.beta));
        // SAFETY: the offsets are right; the workspace's uses are cudarc's to order, which this test is about.
        unsafe {
            gdn_prefill_sm90_cudarc_with_options::<bf16>(
                stream,
                output,
                output_state,
                q,
                k,
                v,
                &offsets,
                workspace,
                8,
                1,
                1,
                1,
                128,
                DType::BF16,
                state,
                alpha,
                beta,
                0.0,
            )
        }
    }
}

type Shared = (CudaSlice<bf16>, CudaSlice<bf16>, Arc<CudaSlice<bf16>>);

/// A graph of one norm, with buffers of its own as [`Norms::apart`] has them.
fn graph(stream: &Arc<CudaStream>, weight: &Arc<CudaSlice<bf16>>) -> LaunchGraph<Shared> {
    graph_over(|| stream.context().new_stream().unwrap(), stream, weight)
}

fn graph_over(
    home: impl Fn() -> Arc<CudaStream>,
    stream: &Arc<CudaStream>,
    weight: &Arc<CudaSlice<bf16>>,
) -> LaunchGraph<Shared> {
    let (out, input) = (zeros(&home(), 128), zeros(&home(), 128));
    let mut graph = LaunchGraph::new(stream, (out, input, Arc::clone(weight))).unwrap();
    capture(&mut graph).unwrap();
    graph
}

fn capture(graph: &mut LaunchGraph<Shared>) -> Result<()> {
    let captured = graph.capture(|s, (mut out, input, weight)| {
        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
        rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &NormOptions::default(), s)
    });
    captured.map(drop)
}

fn streams<const N: usize>() -> [Arc<CudaStream>; N] {
    let context = CudaContext::new(0).unwrap();
    [(); N].map(|()| context.new_stream().unwrap())
}

/// All orders of three.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

fn drop_in(order: [usize; 3], mut all: [Option<Box<dyn Any>>; 3]) {
    order.iter().for_each(|&i| drop(all[i].take()));
}

#[test]
fn calls_are_ordered_with_every_other_use() {
    with_driver("calls_are_ordered_with_every_other_use", |driver| {
        for pools in [true, false] {
            driver.pools(pools);
            let [a, b, c] = streams();
            let null = a.context().default_stream();
            for (place, stream) in [("the same stream", &a), ("another stream", &b), ("the null stream", &null)] {
                let calls: [(&str, fn(&mut Norms, &CudaStream) -> Result<()>); 2] =
                    [("norms", Norms::call_every), ("flat", Norms::call_flat)];
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
            driver.ordered(if leaked { "a prepared call that is leaked" } else { "a prepared call" }, || {
                let mut norms = Norms::apart(&a);
                norms.fill_and_read(&a);
                let out = TensorMut::from_cudarc(&b, &mut norms.out, &SHAPE).unwrap();
                let input = TensorRef::from_cudarc(&b, &norms.input, &SHAPE).unwrap();
                let weight = TensorRef::from_cudarc(&b, &norms.weight, &LENGTH).unwrap();
                let prepared = Prepared::rmsnorm(out, input, weight, &NormOptions::default()).unwrap();
                prepared.launch(Stream::cudarc(&b)).unwrap();
                prepared.launch(Stream::cudarc(&b)).unwrap();
                if leaked {
                    forget(prepared)
                } else {
                    drop(prepared)
                }
                norms.fill_and_read(&a);
            });
        }
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
                let (first, second) = (first.into_buffers(), second.into_buffers());
                drop_in(order, [Some(Box::new(first)), Some(Box::new(second)), Some(Box::new(weight))]);
            });
        }
        driver.ordered("taken out, then written", || {
            let ([first, second], weight) = both();
            drop((first.into_buffers(), second));
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

#[test]
fn graphs_are_ordered_with_every_other_use() {
    with_driver("graphs_are_ordered_with_every_other_use", |driver| {
        let [a, b, c] = streams();
        driver.ordered("buffers that are filled and read between launches", || {
            let weight = Arc::new(zeros::<bf16>(&a, 64));
            let mut graph = graph(&b, &weight);
            for stream in [&a, &b, &c] {
                let (out, mut input, _) = graph.buffers();
                stream.clone_dtoh(&out).unwrap();
                stream.memset_zeros(&mut input).unwrap();
                graph.launch().unwrap();
                // Also in the other order: captured anew after what was launched.
                capture(&mut graph).unwrap();
                graph.launch().unwrap();
            }
            let (mut out, ..) = graph.into_buffers();
            a.memset_zeros(&mut out).unwrap();
        });
        driver.ordered("calls with the graph's buffers between launches", || {
            let weight = Arc::new(zeros::<bf16>(&a, 64));
            let mut graph = graph(&b, &weight);
            for _ in 0..2 {
                graph.launch().unwrap();
                let (mut out, mut input, _) = graph.buffers();
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
                let tensors = GdnTensors {
                    output: output.write(&per_token)?,
                    output_state: output_state.write(&states)?,
                    q: q.read(&per_token)?,
                    k: k.read(&per_token)?,
                    v: v.read(&per_token)?,
                };
                context.prefill(tensors, &offsets, GdnOptions::default(), s)
            });
            captured.unwrap();
            graph.launch().unwrap();
            let (.., qkv) = graph.buffers();
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
            let (mut out, ..) = graph.into_buffers();
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
        // The primary one's memory is used in it, whatever is current.
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
                driver.ordered(&case, || norms.call(&stream).unwrap_or_else(|error| driver.fail(&case, error)));
            }
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
        let begin = || stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        driver.ordered("captured by cudarc", || {
            begin();
            norms.call_every(&stream).unwrap();
            let captured = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
            captured.launch().unwrap();
        });
        assert_eq!(driver.queued(), [0, 1], "the kernels ran with the graph");
        // Of the context, not of the capture: to ask whether it is lost must not end the capture.
        begin();
        driver.fail_next();
        assert!(matches!(norms.call(&stream), Err(FlashInferError::TvmFfiCall { .. })));
        if let Err(error) = stream.end_capture(CUgraphInstantiate_flags(0)) {
            driver.fail("a call that fails in a capture", format_args!("the capture: {error}"));
        }
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
