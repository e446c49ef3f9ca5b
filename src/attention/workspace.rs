//! Scratch memory, and what is made of it for a batch.

use std::marker::PhantomData;

use crate::error::Result;
use crate::kernels::page::{PagedKvCache, PagedMlaCache};
use crate::stream::Stream;
use crate::tensor::{TensorMut, TensorRef};

use super::batch::Batch;
use super::run::{AttentionOptions, Known, LatentQueries, Place, Planned};
use super::sizes::{Largest, check_batch};
use super::spec::{AttentionSpec, Backend};

/// The scratch memory of attention, for one specification and one stream: what upstream's planner writes, on the host and on the
/// GPU, and what kernels write between them. Its size follows from the specification and the largest batch.
#[derive(Debug)]
pub struct Workspace {
    spec: AttentionSpec,
    largest: Largest,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    /// The batch that is planned.
    Host(Batch),
    #[cfg(feature = "cudarc")]
    Gpu(Box<super::gpu::OnStream>),
}

impl Workspace {
    /// For tensors on the host, which the [reference](mod@crate::reference) computes with, in f64; for batches of any size.
    pub fn on_host(spec: AttentionSpec) -> Self {
        let batch = Batch::ragged();
        Self { spec, largest: Largest::new(i64::MAX, i64::MAX), memory: Memory::Host(batch) }
    }

    /// For kernels on `stream`, and batches up to the largest.
    ///
    /// # Errors
    /// [`ArtifactMissing`](crate::FlashInferError::ArtifactMissing) with the name of the module that computes it, where it was not
    /// vendored; [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a specification for the host alone (F32), for a
    /// backend that the GPU has not, for a batch that 32 bits do not count, for the per-thread stream, and for a stream that
    /// captures; [`Cuda`](crate::FlashInferError::Cuda) where there is no memory; or why there is no GPU.
    #[cfg(feature = "cudarc")]
    pub fn new(
        spec: AttentionSpec,
        largest: Largest,
        stream: &std::sync::Arc<cudarc::driver::CudaStream>,
    ) -> Result<Self> {
        let memory = super::gpu::OnStream::new(&spec, largest, stream, None)?;
        Ok(Self { spec, largest, memory: Memory::Gpu(Box::new(memory)) })
    }

    /// The specification that it is for.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// What computes; `None` on the host.
    pub fn backend(&self) -> Option<Backend> {
        match &self.memory {
            Memory::Host(_) => None,
            #[cfg(feature = "cudarc")]
            Memory::Gpu(memory) => Some(memory.backend()),
        }
    }

    /// The name of the module that computes; `None` on the host.
    pub fn module(&self) -> Option<String> {
        self.backend().map(|backend| self.spec.module(backend))
    }

    /// The bytes of scratch memory on the GPU: of partial results, and of lists of work.
    pub fn bytes(&self) -> (usize, usize) {
        match &self.memory {
            Memory::Host(_) => (0, 0),
            #[cfg(feature = "cudarc")]
            Memory::Gpu(memory) => memory.bytes(),
        }
    }

    /// Plans a batch: divides its work among the GPU's multiprocessors and copies the lists of it, and the batch's tables, to the
    /// GPU, asynchronously on the workspace's stream. The host waits only where copies of the third plan before it, or of earlier
    /// ones, have not been made yet.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a batch that is not of the specification's kind or page size,
    /// that is larger than the workspace is for, or that upstream would count wrong: fewer keys than queries with a causal mask, more
    /// pieces of work than its lists hold; and on a stream that captures. [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what
    /// the planner raised; [`Cuda`](crate::FlashInferError::Cuda).
    pub fn plan(&mut self, batch: &Batch) -> Result<Plan<'_>> {
        let planned = match &mut self.memory {
            Memory::Host(kept) => {
                check_batch(&self.spec, self.largest, batch, 0)?;
                kept.copy_from(batch);
                What::Host
            }
            #[cfg(feature = "cudarc")]
            Memory::Gpu(memory) => {
                check_batch(&self.spec, self.largest, batch, memory.multiprocessors())?;
                match batch.rows() {
                    // Upstream divides by the number of requests.
                    0 => What::Nothing,
                    _ => What::Gpu(memory.plan(&self.spec, batch)?),
                }
            }
        };
        let pages = batch.cache().map_or_else(|| batch.keys(), |(_, pages)| pages);
        let (rows, known) = (batch.rows(), Known::default());
        Ok(Plan { workspace: self, rows, pages, planned, known, of_thread: PhantomData })
    }

    /// Attention of one sequence: all queries over all keys, planned and run at once, for [`Kind::Ragged`](super::Kind::Ragged). It is
    /// what upstream's `single_prefill_with_kv_cache` and `single_decode_with_kv_cache` compute; for several layers of the same
    /// lengths a [`plan`](Self::plan) of a [`Batch`] of one request is made once.
    ///
    /// The tensors are those of [`Plan::run_ragged`]. For one query over many keys on a Hopper GPU a specification with
    /// [`Backend::Fa2`] is the faster one, since it divides contexts.
    ///
    /// ```
    /// use flashinfer_rs::attention::{AttentionOptions, AttentionSpec, Workspace};
    /// use flashinfer_rs::{DType, FlashInferRuntime, RuntimeConfig, TensorMut, TensorRef};
    ///
    /// FlashInferRuntime::initialize(RuntimeConfig::default())?;
    /// let spec = AttentionSpec::ragged(DType::F32, (4, 2), (64, 64)).causal(true).build()?;
    /// let mut workspace = Workspace::on_host(spec);
    /// let (q, kv, mut o) = (vec![1f32; 3 * 4 * 64], vec![1f32; 10 * 2 * 64], vec![0f32; 3 * 4 * 64]);
    /// let (q, kv) = (TensorRef::from_slice(&q, &[3, 4, 64])?, TensorRef::from_slice(&kv, &[10, 2, 64])?);
    /// let mut results = TensorMut::from_slice(&mut o, &[3, 4, 64])?;
    /// workspace.run_single(&mut results, None, &q, (&kv, &kv), &AttentionOptions::default())?;
    /// assert!(o.iter().all(|x| (x - 1.0).abs() < 1e-6));
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    ///
    /// # Errors
    /// As for [`plan`](Self::plan) and [`Plan::run_ragged`].
    pub fn run_single(
        &mut self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        q: &TensorRef<'_>,
        (k, v): (&TensorRef<'_>, &TensorRef<'_>),
        options: &AttentionOptions<'_>,
    ) -> Result<()> {
        let mut batch = Batch::ragged();
        // Of other numbers of dimensions than there are in tensors of tokens the run itself says what is wrong.
        let first = |shape: &[i64]| shape.first().copied().unwrap_or(1);
        let (queries, keys) = (first(q.shape()), first(k.shape()));
        if queries == 0 {
            // Nothing to compute, of whatever keys.
            return self.plan(&batch).map(drop);
        }
        batch.push_ragged(queries, keys)?;
        self.plan(&batch)?.run_ragged(o, lse, q, (k, v), options)
    }
}

/// A batch that was planned, to be run for any number of layers. It borrows its workspace, so that none other is planned in the
/// meantime. Runs follow one another on the workspace's stream.
#[derive(Debug)]
pub struct Plan<'w> {
    workspace: &'w Workspace,
    rows: i64,
    pages: i64,
    planned: What,
    known: Known,
    /// Streams are a thread's.
    of_thread: PhantomData<*const ()>,
}

#[derive(Debug)]
enum What {
    /// A batch of no queries, on a GPU.
    #[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
    Nothing,
    Host,
    /// What upstream answered to the workspace's last plan.
    #[cfg(feature = "cudarc")]
    Gpu(crate::object::Object),
}

impl Plan<'_> {
    /// What computes; `None` on the host.
    pub fn backend(&self) -> Option<Backend> {
        self.workspace.backend()
    }

    /// The number of queries: the rows of a call's tensors.
    pub fn rows(&self) -> i64 {
        self.rows
    }

    /// What upstream's planner answered: offsets into the workspace, sizes of launches and flags, whose meaning is each module's own.
    /// Empty on the host.
    pub fn integers(&self) -> Vec<i64> {
        match &self.planned {
            What::Nothing | What::Host => Vec::new(),
            #[cfg(feature = "cudarc")]
            What::Gpu(info) => super::gpu::integers_of(info),
        }
    }

    fn planned(&self) -> Option<Planned<'_>> {
        let (spec, rows, pages) = (&self.workspace.spec, self.rows, self.pages);
        let (stream, place) = match (&self.planned, &self.workspace.memory) {
            (What::Host, Memory::Host(batch)) => (Stream::NULL, Place::Host(batch)),
            #[cfg(feature = "cudarc")]
            (What::Gpu(info), Memory::Gpu(memory)) => (memory.stream(), Place::Gpu(memory.launch(info))),
            _ => return None,
        };
        Some(Planned { spec, rows, pages, stream, place, known: Some(&self.known) })
    }

    /// Attention over a paged cache, for [`Kind::Paged`](super::Kind::Paged) and [`Kind::Decode`](super::Kind::Decode): asynchronous on
    /// the workspace's stream, on the host at once.
    ///
    /// | tensor | shape | dtype | |
    /// |---|---|---|---|
    /// | `o` | `[rows, q_heads, head_dim]` | the specification's `out_dtype` | written; contiguous |
    /// | `lse` | `[rows, q_heads]` | F32 | written, optional; contiguous |
    /// | `q` | `[rows, q_heads, head_dim]` | the specification's | read; rows anywhere |
    /// | `cache` | the batch's number of pages or more | the specification's `kv_dtype` | read |
    /// | `options.sink` | `[q_heads]` | F32 | read, with sinks alone |
    ///
    /// All but F32 tensors are aligned to 16 bytes.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for tensors that are not the plan's: of another shape, type,
    /// layout, device or stream; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the launcher raised;
    /// [`ContextLost`](crate::FlashInferError::ContextLost).
    pub fn run(
        &self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        q: &TensorRef<'_>,
        cache: &PagedKvCache<'_>,
        options: &AttentionOptions<'_>,
    ) -> Result<()> {
        self.planned().map_or(Ok(()), |planned| planned.paged(o, lse, q, cache, options))
    }

    /// Attention over keys and values that lie one after the other, for [`Kind::Ragged`](super::Kind::Ragged).
    ///
    /// | tensor | shape | dtype | |
    /// |---|---|---|---|
    /// | `o` | `[rows, q_heads, head_dim of v]` | the specification's `out_dtype` | written; contiguous |
    /// | `lse` | `[rows, q_heads]` | F32 | written, optional; contiguous |
    /// | `q` | `[rows, q_heads, head_dim]` | the specification's | read; rows anywhere |
    /// | `k` | `[keys, kv_heads, head_dim]` | the specification's `kv_dtype` | read; rows anywhere |
    /// | `v` | `[keys, kv_heads, head_dim of v]` | as `k` | read; rows anywhere |
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub fn run_ragged(
        &self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        q: &TensorRef<'_>,
        (k, v): (&TensorRef<'_>, &TensorRef<'_>),
        options: &AttentionOptions<'_>,
    ) -> Result<()> {
        self.planned().map_or(Ok(()), |planned| planned.ragged(o, lse, q, (k, v), options))
    }

    /// Latent attention, for [`Kind::Mla`](super::Kind::Mla).
    ///
    /// | tensor | shape | dtype | |
    /// |---|---|---|---|
    /// | `o` | `[rows, heads, 512]` | the specification's | written; contiguous |
    /// | `lse` | `[rows, heads]` | F32 | written, optional; contiguous |
    /// | `q_nope`, `q_pe` | `[rows, heads, 512]`, `[rows, heads, 64]` | the specification's | read; rows anywhere |
    /// | `cache` | the batch's number of pages or more | the specification's | read |
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub fn run_mla(
        &self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        queries: &LatentQueries<'_, '_>,
        cache: &PagedMlaCache<'_>,
    ) -> Result<()> {
        self.planned().map_or(Ok(()), |planned| planned.mla(o, lse, queries, cache))
    }
}
