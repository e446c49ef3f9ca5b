//! Every way of launching, over cudarc's buffers, for tests of what orders them.
#![allow(dead_code, reason = "each test uses its own part")]

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors};
use flashinfer_rs::kernels::norm::{
    NormOptions, fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm, layernorm,
    rmsnorm, rmsnorm_quant,
};
use flashinfer_rs::{
    CuSeqlens, DType, DeviceCuSeqlens, LaunchGraph, Result, Stream, TensorMut, TensorRef,
    gdn_prefill_sm90_cudarc_with_options, gemma_rmsnorm_cudarc,
};
use half::bf16;

use crate::ordering::zeros;

pub const SHAPE: [i64; 2] = [2, 64];
pub const LENGTH: [i64; 1] = [64];
pub const TOKENS: i64 = 8;

/// Buffers of every norm.
pub struct Norms {
    pub out: CudaSlice<bf16>,
    pub input: CudaSlice<bf16>,
    pub residual: CudaSlice<bf16>,
    pub weight: CudaSlice<bf16>,
    pub eight: CudaSlice<u8>,
    pub gamma: CudaSlice<f32>,
    pub beta: CudaSlice<f32>,
}

impl Norms {
    pub fn new(stream: &Arc<CudaStream>) -> Self {
        Self::made(|| Arc::clone(stream))
    }

    /// Each buffer on a stream of its own, which is where it is freed: what orders one of them orders no other.
    pub fn apart(stream: &CudaStream) -> Self {
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
    pub fn call(&mut self, stream: &CudaStream) -> Result<()> {
        self.call_on(stream, Stream::cudarc(stream))
    }

    /// Tensors for one stream, a call on what should be the same.
    pub fn call_on(&mut self, stream: &CudaStream, on: Stream<'_>) -> Result<()> {
        let mut out = TensorMut::from_cudarc(stream, &mut self.out, &SHAPE)?;
        let input = TensorRef::from_cudarc(stream, &self.input, &SHAPE)?;
        let weight = TensorRef::from_cudarc(stream, &self.weight, &LENGTH)?;
        rmsnorm(&mut out, &input, &weight, &NormOptions::default(), on)
    }

    /// One call of each.
    pub fn call_every(&mut self, stream: &CudaStream) -> Result<()> {
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

    pub fn call_flat(&mut self, stream: &CudaStream) -> Result<()> {
        gemma_rmsnorm_cudarc(stream, &self.input, &self.weight, &mut self.out, 2, 64, DType::BF16, 1e-6)
    }

    /// Uses by a stream before and after: what the library does must fit in between. All that calls only read is written
    /// here, since cudarc itself does not order reads on two streams with what comes behind them.
    pub fn fill_and_read(&mut self, stream: &Arc<CudaStream>) {
        stream.memset_zeros(&mut self.input).unwrap();
        stream.memset_zeros(&mut self.weight).unwrap();
        stream.memset_zeros(&mut self.gamma).unwrap();
        stream.memset_zeros(&mut self.beta).unwrap();
        stream.clone_dtoh(&self.out).unwrap();
    }
}

/// Buffers of a prefill of two sequences that have tokens, or of three of which one has none.
pub struct Prefill {
    pub offsets: DeviceCuSeqlens,
    pub sequences: i64,
    pub output: CudaSlice<bf16>,
    pub output_state: CudaSlice<f32>,
    pub input_state: CudaSlice<f32>,
    pub qkv: [CudaSlice<bf16>; 3],
    pub alpha: CudaSlice<f32>,
    pub beta: CudaSlice<f32>,
}

impl Prefill {
    pub fn new(stream: &Arc<CudaStream>, lengths: &[i64]) -> Self {
        Self::made(|| Arc::clone(stream), lengths)
    }

    /// As [`Norms::apart`].
    pub fn apart(stream: &CudaStream, lengths: &[i64]) -> Self {
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

    pub fn call(&mut self, context: &mut GdnPrefillContext, stream: &CudaStream) -> Result<()> {
        let (per_token, states) = ([TOKENS, 1, 128], [self.sequences, 1, 128, 128]);
        let [q, k, v] = &self.qkv;
        let mut tensors = GdnTensors {
            output: TensorMut::from_cudarc(stream, &mut self.output, &per_token)?,
            output_state: TensorMut::from_cudarc(stream, &mut self.output_state, &states)?,
            q: TensorRef::from_cudarc(stream, q, &per_token)?,
            k: TensorRef::from_cudarc(stream, k, &per_token)?,
            v: TensorRef::from_cudarc(stream, v, &per_token)?,
        };
        let options = GdnOptions::default()
            .with_input_state(TensorRef::from_cudarc(stream, &self.input_state, &states)?)
            .with_alpha(TensorRef::from_cudarc(stream, &self.alpha, &[TOKENS, 1])?)
            .with_beta(TensorRef::from_cudarc(stream, &self.beta, &[TOKENS, 1])?);
        context.prefill(&mut tensors, &self.offsets, &options)
    }

    /// As [`Norms::fill_and_read`].
    pub fn fill_and_read(&mut self, stream: &Arc<CudaStream>) {
        self.qkv.iter_mut().for_each(|buffer| stream.memset_zeros(buffer).unwrap());
        for buffer in [&mut self.input_state, &mut self.alpha, &mut self.beta] {
            stream.memset_zeros(buffer).unwrap();
        }
        stream.clone_dtoh(&self.output_state).unwrap();
    }

    pub fn call_flat(&mut self, workspace: &mut CudaSlice<u8>, stream: &Arc<CudaStream>) -> Result<()> {
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

pub type Shared = (CudaSlice<bf16>, CudaSlice<bf16>, Arc<CudaSlice<bf16>>);

/// A graph of one norm, with buffers of its own as [`Norms::apart`] has them.
pub fn graph(stream: &Arc<CudaStream>, weight: &Arc<CudaSlice<bf16>>) -> LaunchGraph<Shared> {
    graph_over(|| stream.context().new_stream().unwrap(), stream, weight)
}

pub fn graph_over(
    mut home: impl FnMut() -> Arc<CudaStream>,
    stream: &Arc<CudaStream>,
    weight: &Arc<CudaSlice<bf16>>,
) -> LaunchGraph<Shared> {
    let (out, input) = (zeros(&home(), 128), zeros(&home(), 128));
    let mut graph = LaunchGraph::new(stream, (out, input, Arc::clone(weight))).unwrap();
    capture(&mut graph).unwrap();
    graph
}

pub fn capture(graph: &mut LaunchGraph<Shared>) -> Result<()> {
    let captured = graph.capture(|s, (mut out, input, weight)| {
        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
        rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &NormOptions::default(), s)
    });
    captured.map(drop)
}

pub fn streams<const N: usize>() -> [Arc<CudaStream>; N] {
    let context = CudaContext::new(0).unwrap();
    [(); N].map(|()| context.new_stream().unwrap())
}
