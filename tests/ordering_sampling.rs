//! As `ordering`, of sampling: whether what a context's own kernels and FlashInfer's use is ordered with every other use, of the
//! scratch memory too.

#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use flashinfer_rs::kernels::sampling::{ChainTensors, FilterOrder, SamplingContext, SamplingOptions};
use flashinfer_rs::{
    FlashInferError, LaunchGraph, OnDevice, PerRow, Philox, Result, Stream, TensorMut, TensorRef, TopK, TopP,
};
use ordering::{with_driver, zeros};

const ROWS: usize = 5;
const VOCAB: usize = 24;
const SHAPE: [i64; 2] = [ROWS as i64, VOCAB as i64];

fn streams<const N: usize>() -> [Arc<CudaStream>; N] {
    let context = CudaContext::new(0).unwrap();
    [(); N].map(|()| context.new_stream().unwrap())
}

/// Buffers, each on a stream of its own, which is where it is freed: what orders one of them orders no other.
struct Buffers {
    probs: CudaSlice<f32>,
    renorm: CudaSlice<f32>,
    tokens: CudaSlice<i32>,
    top_k: OnDevice<PerRow<TopK>>,
    top_p: OnDevice<PerRow<TopP>>,
    drafts: CudaSlice<f32>,
    ids: CudaSlice<i32>,
    targets: CudaSlice<f32>,
    output: CudaSlice<i32>,
    counters: [CudaSlice<i32>; 2],
}

impl Buffers {
    fn apart(stream: &CudaStream) -> Self {
        let home = || stream.context().new_stream().unwrap();
        Self {
            probs: zeros(&home(), ROWS * VOCAB),
            renorm: zeros(&home(), ROWS * VOCAB),
            tokens: zeros(&home(), ROWS),
            top_k: OnDevice::new(PerRow::new(&[3; ROWS]).unwrap(), &home()).unwrap(),
            top_p: OnDevice::new(PerRow::new(&[0.5; ROWS]).unwrap(), &home()).unwrap(),
            drafts: zeros(&home(), 2 * 3 * VOCAB),
            ids: zeros(&home(), 2 * 3),
            targets: zeros(&home(), 2 * 4 * VOCAB),
            output: zeros(&home(), 2 * 4),
            counters: [zeros(&home(), 2), zeros(&home(), 2)],
        }
    }

    /// One call of each, on the context's stream, for which the tensors are made.
    fn call_every(&mut self, context: &mut SamplingContext, stream: &CudaStream) -> Result<()> {
        let (o, philox) = (SamplingOptions::default(), &mut Philox::new(1));
        let (top_k, top_p) = (self.top_k.placed(stream)?, self.top_p.placed(stream)?);
        let mut probs = TensorMut::from_cudarc(stream, &mut self.probs, &SHAPE)?;
        let mut renorm = TensorMut::from_cudarc(stream, &mut self.renorm, &SHAPE)?;
        let mut tokens = TensorMut::from_cudarc(stream, &mut self.tokens, &[ROWS as i64])?;
        let mut sampler = context.sampler()?;
        sampler.softmax(&mut renorm, &probs.as_ref(), 0.5, &o)?;
        sampler.softmax_in_place(&mut probs, 0.5, &o)?;
        sampler.sampling_from_probs(&mut tokens, &mut probs, philox, &o)?;
        sampler.sampling_from_logits(&mut tokens, &mut probs, philox, &o)?;
        sampler.top_k_sampling_from_probs(&mut tokens, &mut probs, &top_k, philox, &o)?;
        sampler.top_p_sampling_from_probs(&mut tokens, &mut probs, &top_p, philox, &o)?;
        sampler.min_p_sampling_from_probs(&mut tokens, &mut probs, 0.1, philox, &o)?;
        for order in [FilterOrder::Joint, FilterOrder::TopKFirst] {
            let o = o.with_filter_order(order);
            sampler.top_k_top_p_sampling_from_probs(&mut tokens, &mut probs, &top_k, &top_p, philox, &o)?;
            sampler.top_k_top_p_sampling_from_logits(&mut tokens, &mut probs, &top_k, &top_p, philox, &o)?;
        }
        sampler.top_p_renorm_probs(&mut renorm, &mut probs, &top_p)?;
        sampler.top_p_renorm_probs_in_place(&mut probs, 0.5)
    }

    fn chain(&mut self, context: &mut SamplingContext, stream: &CudaStream) -> Result<()> {
        let vocab = VOCAB as i64;
        let [accepted, emitted] = &mut self.counters;
        let mut tensors = ChainTensors {
            draft_probs: TensorMut::from_cudarc(stream, &mut self.drafts, &[2, 3, vocab])?,
            draft_token_ids: TensorRef::from_cudarc(stream, &self.ids, &[2, 3])?,
            target_probs: TensorMut::from_cudarc(stream, &mut self.targets, &[2, 4, vocab])?,
            output_token_ids: TensorMut::from_cudarc(stream, &mut self.output, &[2, 4])?,
            output_accepted_token_num: TensorMut::from_cudarc(stream, accepted, &[2])?,
            output_emitted_draft_token_num: TensorMut::from_cudarc(stream, emitted, &[2])?,
        };
        let mut philox = Philox::new(1);
        context.sampler()?.chain_speculative_sampling(&mut tensors, &mut philox, &SamplingOptions::default())
    }

    /// Uses by a stream before and after: what the calls do must fit in between.
    fn fill_and_read(&mut self, stream: &Arc<CudaStream>) {
        stream.memset_zeros(&mut self.probs).unwrap();
        stream.memset_zeros(&mut self.drafts).unwrap();
        stream.memset_zeros(&mut self.ids).unwrap();
        stream.memset_zeros(&mut self.targets).unwrap();
        stream.clone_dtoh(&self.tokens).unwrap();
        stream.clone_dtoh(&self.renorm).unwrap();
        stream.clone_dtoh(&self.output).unwrap();
        self.counters.iter().for_each(|counter| drop(stream.clone_dtoh(counter).unwrap()));
    }
}

#[test]
fn sampling_is_ordered_with_every_other_use() {
    with_driver("sampling_is_ordered_with_every_other_use", |driver| {
        for pools in [true, false] {
            driver.pools(pools);
            let [a, b, c] = streams();
            let null = a.context().default_stream();
            for (place, stream) in [("a stream", &b), ("the null stream", &null)] {
                driver.ordered(&format!("calls on {place}, with pools {pools}"), || {
                    let mut context = SamplingContext::new(stream, 16).unwrap();
                    let mut buffers = Buffers::apart(&a);
                    for other in [&a, &c, stream] {
                        buffers.fill_and_read(other);
                        buffers.call_every(&mut context, stream).unwrap();
                        buffers.chain(&mut context, stream).unwrap();
                        buffers.top_k.replace(PerRow::new(&[2; ROWS]).unwrap(), other).unwrap();
                        // What is wrong with the rows, read elsewhere.
                        other.clone_dtoh(context.status().unwrap()).unwrap();
                    }
                });
            }
        }
        assert!(driver.queued()[0] > 0);
        assert_eq!(driver.live(), [0; 5], "and nothing is left");
    });
}

#[test]
fn captured_sampling_is_ordered_with_every_other_use() {
    with_driver("captured_sampling_is_ordered_with_every_other_use", |driver| {
        let [a, b, c] = streams();
        driver.ordered("a graph of draws", || {
            let Buffers { probs, tokens, top_p, .. } = Buffers::apart(&a);
            let context = SamplingContext::new(&b, ROWS).unwrap();
            let mut graph = LaunchGraph::new(&b, (context, probs, tokens, top_p)).unwrap();
            let mut philox = Philox::new(1).frozen();
            graph
                .capture(|s, (mut context, mut probs, mut tokens, top_p)| {
                    let (mut output, mut probs) = (tokens.write(&[ROWS as i64])?, probs.write(&SHAPE)?);
                    let (mut sampler, o) = (context.sampler(s)?, SamplingOptions::default());
                    sampler.sampling_from_logits(&mut output, &mut probs, &mut philox, &o)?;
                    sampler.top_p_sampling_from_probs(&mut output, &mut probs, &top_p.placed()?, &mut philox, &o)
                })
                .unwrap();
            assert_eq!(graph.nodes(), 5, "a softmax, two guards and two draws");
            for stream in [&a, &b, &c] {
                let (context, mut probs, tokens, mut top_p) = graph.buffers().unwrap();
                stream.clone_dtoh(context.status().unwrap()).unwrap();
                stream.clone_dtoh(&tokens).unwrap();
                stream.memset_zeros(&mut probs).unwrap();
                top_p.replace(&PerRow::new(&[0.25; 3]).unwrap(), stream).unwrap();
                graph.launch().unwrap();
            }
            let (mut context, mut probs, mut tokens, _) = graph.into_buffers().unwrap();
            let mut output = TensorMut::from_cudarc(&b, &mut tokens, &[ROWS as i64]).unwrap();
            let mut rows = TensorMut::from_cudarc(&b, &mut probs, &SHAPE).unwrap();
            let o = SamplingOptions::default();
            context.sampler().unwrap().sampling_from_probs(&mut output, &mut rows, &mut Philox::new(1), &o).unwrap();
        });
    });
}

#[test]
fn a_draw_in_a_capture_says_that_it_would_be_frozen() {
    with_driver("a_draw_in_a_capture_says_that_it_would_be_frozen", |_| {
        let [stream] = streams();
        let buffers = (
            SamplingContext::new(&stream, ROWS).unwrap(),
            zeros::<f32>(&stream, ROWS * VOCAB),
            zeros::<i32>(&stream, ROWS),
        );
        let mut graph = LaunchGraph::new(&stream, buffers).unwrap();
        let mut philox = Philox::new(1);
        let error = graph
            .capture(|s: Stream<'_>, (mut context, mut probs, mut tokens)| {
                let (mut output, mut probs) = (tokens.write(&[ROWS as i64])?, probs.write(&SHAPE)?);
                let o = SamplingOptions::default();
                context.sampler(s)?.min_p_sampling_from_probs(&mut output, &mut probs, 0.1, &mut philox, &o)
            })
            .unwrap_err();
        assert!(matches!(error, FlashInferError::FrozenRandomness { .. }), "{error}");
        assert_eq!(philox.offset(), 0);
    });
}

/// Its memory is the graph's: on another stream nothing would order what is written there with the graph's launches.
#[test]
fn a_captured_context_serves_the_stream_of_the_capture_alone() {
    with_driver("a_captured_context_serves_the_stream_of_the_capture_alone", |driver| {
        let [stream, other] = streams();
        let (mut rows, mut drawn) = (zeros::<f32>(&other, ROWS * VOCAB), zeros::<i32>(&other, ROWS));
        let mut graph = LaunchGraph::new(&stream, SamplingContext::new(&stream, ROWS).unwrap()).unwrap();
        driver.refused("another stream than the capture's", || {
            graph.capture(|_, mut context| {
                let mut probs = TensorMut::from_cudarc(&other, &mut rows, &SHAPE)?;
                let mut output = TensorMut::from_cudarc(&other, &mut drawn, &[ROWS as i64])?;
                let (o, philox) = (SamplingOptions::default(), &mut Philox::new(1));
                context.sampler(Stream::cudarc(&other))?.sampling_from_probs(&mut output, &mut probs, philox, &o)
            })
        });
    });
}

#[test]
fn what_a_context_cannot_order_is_refused() {
    with_driver("what_a_context_cannot_order_is_refused", |driver| {
        let [here, there] =
            [CudaContext::new(0).unwrap(), CudaContext::new(0).unwrap()].map(|context| context.new_stream().unwrap());
        let mut context = SamplingContext::new(&here, 16).unwrap();
        driver.refused("tensors of another context object", || Buffers::apart(&there).call_every(&mut context, &here));
        driver.refused("a graph's context", || LaunchGraph::new(&there, SamplingContext::new(&here, 16).unwrap()));
        let mut buffers = Buffers::apart(&here);
        let other = here.context().new_stream().unwrap();
        driver.refused("tensors of another stream", || buffers.chain(&mut context, &other));
        driver.refused("more rows than there is memory for", || {
            let mut context = SamplingContext::new(&here, ROWS - 1)?;
            let mut probs = TensorMut::from_cudarc(&here, &mut buffers.probs, &SHAPE)?;
            let mut tokens = TensorMut::from_cudarc(&here, &mut buffers.tokens, &[ROWS as i64])?;
            let (o, philox) = (SamplingOptions::default(), &mut Philox::new(1));
            context.sampler()?.sampling_from_logits(&mut tokens, &mut probs, philox, &o)
        });
        driver.refused("more rows of a chain", || buffers.chain(&mut SamplingContext::new(&here, 13)?, &here));
        driver.refused("the stream of each thread", || SamplingContext::new(&here.context().per_thread_stream(), 16));
    });
}
