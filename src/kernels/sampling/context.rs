//! Sampling that is safe for any contents: scratch memory for one stream, and the kernels with a guard ahead of them.

use std::ptr;

#[cfg(feature = "cudarc")]
use super::gpu::{OnGpu, OnStream};
use super::guard::guard_on_host;
use super::{
    BATCH, COUNT, ChainOperands, ChainSpeculativeSampling, ChainTensors, Draw, FilterOrder, MinPSamplingFromProbs,
    RowStatus, SamplingFromProbs, SamplingOptions, TopKSamplingFromProbs, TopKTopPSamplingFromProbs, TopPRenormProbs,
    TopPSamplingFromProbs, VOCAB, given, joint_operands, min_p_operands, outputs, renorm_behind, softmax_of,
    top_k_operands, top_p_operands, top_p_renorm_operands, tries,
};
use crate::contract::{Operand, check};
use crate::engine::{Entry, Kernel, refused};
use crate::error::{FlashInferError, Result};
use crate::indices::{MinP, Setting, Temperature, TopK, TopP};
use crate::owner::Owner;
use crate::philox::Philox;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout, TensorMut, TensorRef};

/// Scratch memory for sampling that is safe for any contents, for one stream, so that no two streams ever share one; or for tensors
/// on the host, where the [reference](crate::reference) computes. [`sampler`](Self::sampler) has the calls.
///
/// ```
/// # use flashinfer_rs::kernels::sampling::{SamplingContext, SamplingOptions};
/// # use flashinfer_rs::{FlashInferRuntime, Philox, RuntimeConfig, TensorMut};
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// // Two rows of four tokens; the second is none that a token can be drawn from.
/// let mut probs = [0.1f32, 0.2, 0.3, 0.4, f32::NAN, 0.5, 0.25, 0.25];
/// let mut tokens = [0i32; 2];
/// let (mut context, mut philox) = (SamplingContext::on_host(), Philox::new(42));
/// context.sampler()?.top_k_sampling_from_probs(
///     &mut TensorMut::from_slice(&mut tokens, &[2])?,
///     &mut TensorMut::from_slice(&mut probs, &[2, 4])?,
///     1,
///     &mut philox,
///     &SamplingOptions::default(),
/// )?;
/// assert_eq!(tokens, [3, 0]);
/// let statuses = context.statuses(2)?;
/// assert!(statuses[0].is_valid() && statuses[1].has_nan());
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug)]
pub struct SamplingContext {
    /// Of the last call on the host.
    pub(super) host: Vec<RowStatus>,
    #[cfg(feature = "cudarc")]
    pub(super) gpu: Option<OnStream>,
}

impl SamplingContext {
    /// A context for tensors on the host.
    pub const fn on_host() -> Self {
        Self {
            host: Vec::new(),
            #[cfg(feature = "cudarc")]
            gpu: None,
        }
    }
}

#[cfg(not(feature = "cudarc"))]
impl SamplingContext {
    /// The calls, of tensors on the host.
    ///
    /// # Errors
    /// None: on a GPU there may be some.
    pub fn sampler(&mut self) -> Result<Sampler<'_>> {
        Ok(Sampler { place: Place::Host(&mut self.host) })
    }

    /// What was wrong with each of the first rows of the last call that drew or renormalized.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for more rows than that call had.
    pub fn statuses(&self, rows: usize) -> Result<Vec<RowStatus>> {
        statuses_on_host(&self.host, rows)
    }
}

pub(super) fn statuses_on_host(statuses: &[RowStatus], rows: usize) -> Result<Vec<RowStatus>> {
    match statuses.get(..rows) {
        Some(statuses) => Ok(statuses.to_vec()),
        None => Err(FlashInferError::InvalidArgument {
            function: "SamplingContext",
            argument: "rows",
            found: rows.to_string(),
            expected: format!("at most {}, which the last call had", statuses.len()),
        }),
    }
}

/// The calls of a [`SamplingContext`], on its stream. Safe for any contents: whatever rows hold, a call ends, stays within its
/// memory, and answers tokens that are at least 0 and below `vocab`.
///
/// Probabilities are taken as `&mut`, since a row that is no distribution is replaced by one that has the first token alone; each
/// such row is told of in the context's [statuses](SamplingContext::statuses), which stand for the last call that drew or
/// renormalized. All other rows stay as they are, unless a function says otherwise.
#[derive(Debug)]
pub struct Sampler<'a> {
    pub(super) place: Place<'a>,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one, on the stack of its user")]
pub(super) enum Place<'a> {
    Host(&'a mut Vec<RowStatus>),
    #[cfg(feature = "cudarc")]
    Gpu(OnGpu<'a>),
}

const NOBODY: &Owner<'static> = &Owner::NONE;

/// What looks at the rows of a call, to be done at the right place of what comes ahead of its kernel.
type Guard<'g> = &'g mut dyn FnMut() -> Result<()>;

impl<'a> Sampler<'a> {
    /// [`softmax`](super::softmax), with the context's scratch memory.
    ///
    /// # Errors
    /// As there.
    pub fn softmax<'s>(
        &mut self,
        output: &mut TensorMut<'_>,
        logits: &TensorRef<'_>,
        temperature: impl Into<Setting<'s, Temperature>>,
        options: &SamplingOptions,
    ) -> Result<()> {
        let (workspace, owner) = self.workspace();
        let tensors = [Operand::Tensor(&workspace, owner), logits.operand(), output.operand()];
        softmax_of(tensors, temperature.into(), options, self.stream())
    }

    /// [`softmax`](super::softmax) of a tensor onto itself.
    ///
    /// # Errors
    /// As there.
    pub fn softmax_in_place<'s>(
        &mut self,
        logits: &mut TensorMut<'_>,
        temperature: impl Into<Setting<'s, Temperature>>,
        options: &SamplingOptions,
    ) -> Result<()> {
        let (workspace, owner) = self.workspace();
        let tensors = [Operand::Tensor(&workspace, owner), logits.operand(), logits.operand()];
        softmax_of(tensors, temperature.into(), options, self.stream())
    }

    /// Draws a token for each row, in proportion to the row's probabilities.
    ///
    /// # Errors
    /// As for [the kernel itself](super::sampling_from_probs); and [`InvalidArgument`](FlashInferError::InvalidArgument) for
    /// tensors that are not where the context is, or more rows than it has memory for.
    pub fn sampling_from_probs(
        &mut self,
        output: &mut TensorMut<'_>,
        probs: &mut TensorMut<'_>,
        philox: &mut Philox,
        options: &SamplingOptions,
    ) -> Result<()> {
        let Draw([deterministic, seed, offset]) = Draw::new("sampling_from_probs", philox, options, self.stream())?;
        let operands = [probs.operand(), output.operand(), Operand::Absent, deterministic, seed, offset];
        self.behind_guard::<SamplingFromProbs>(probs, &operands, |_, guard| guard())?;
        philox.used(outputs(output));
        Ok(())
    }

    /// Draws a token for each row, in proportion to the exponentials of the row's logits, which are replaced by the
    /// probabilities: [`softmax`](super::softmax), and [`sampling_from_probs`](Self::sampling_from_probs) of what comes out.
    ///
    /// Not FlashInfer's kernel of this name, which adds noise to each logit: in release 0.6.3 it lacks a barrier, so that a
    /// token may come out that is not the right one. The tokens are distributed alike, but are others for a seed.
    ///
    /// # Errors
    /// As for [`sampling_from_probs`](Self::sampling_from_probs).
    pub fn sampling_from_logits(
        &mut self,
        output: &mut TensorMut<'_>,
        logits: &mut TensorMut<'_>,
        philox: &mut Philox,
        options: &SamplingOptions,
    ) -> Result<()> {
        let Draw([deterministic, seed, offset]) = Draw::new("sampling_from_logits", philox, options, self.stream())?;
        let operands = [logits.operand(), output.operand(), Operand::Absent, deterministic, seed, offset];
        self.behind_guard::<SamplingFromProbs>(logits, &operands, |sampler, guard| {
            sampler.probabilities(logits, options)?;
            guard()
        })?;
        philox.used(outputs(output));
        Ok(())
    }

    /// Draws a token for each row, out of its `top_k` likeliest and those that are as likely as the last of them.
    ///
    /// # Errors
    /// As for [`sampling_from_probs`](Self::sampling_from_probs), and for a `top_k` below 1.
    pub fn top_k_sampling_from_probs<'s>(
        &mut self,
        output: &mut TensorMut<'_>,
        probs: &mut TensorMut<'_>,
        top_k: impl Into<Setting<'s, TopK>>,
        philox: &mut Philox,
        options: &SamplingOptions,
    ) -> Result<()> {
        let draw = Draw::new("top_k_sampling_from_probs", philox, options, self.stream())?;
        let top_k = top_k.into();
        let rows = top_k.rows();
        let operands = top_k_operands([probs.operand(), output.operand(), given(&rows)], top_k, draw)?;
        self.behind_guard::<TopKSamplingFromProbs>(probs, &operands, |_, guard| guard())?;
        philox.used(tries(output));
        Ok(())
    }

    /// Draws a token for each row, out of its likeliest whose probabilities sum to `top_p`.
    ///
    /// # Errors
    /// As for [`sampling_from_probs`](Self::sampling_from_probs), and for a `top_p` that is not within 1e-30 and 1.
    pub fn top_p_sampling_from_probs<'s>(
        &mut self,
        output: &mut TensorMut<'_>,
        probs: &mut TensorMut<'_>,
        top_p: impl Into<Setting<'s, TopP>>,
        philox: &mut Philox,
        options: &SamplingOptions,
    ) -> Result<()> {
        let draw = Draw::new("top_p_sampling_from_probs", philox, options, self.stream())?;
        self.top_p_behind((output, probs), top_p.into(), draw, |_, guard| guard())?;
        philox.used(tries(output));
        Ok(())
    }

    /// Draws a token for each row, out of those that are at least `min_p` times as likely as its likeliest.
    ///
    /// # Errors
    /// As for [`sampling_from_probs`](Self::sampling_from_probs), and for a `min_p` that is not within 0 and 1.
    pub fn min_p_sampling_from_probs<'s>(
        &mut self,
        output: &mut TensorMut<'_>,
        probs: &mut TensorMut<'_>,
        min_p: impl Into<Setting<'s, MinP>>,
        philox: &mut Philox,
        options: &SamplingOptions,
    ) -> Result<()> {
        let draw = Draw::new("min_p_sampling_from_probs", philox, options, self.stream())?;
        let min_p = min_p.into();
        let rows = min_p.rows();
        let operands = min_p_operands([probs.operand(), output.operand(), given(&rows)], min_p, draw)?;
        self.behind_guard::<MinPSamplingFromProbs>(probs, &operands, |_, guard| guard())?;
        philox.used(outputs(output));
        Ok(())
    }

    /// Draws a token for each row, out of those that `top_k` and `top_p` keep, in the order that the
    /// [options](SamplingOptions::filter_order) say: [`TopKFirst`](FilterOrder::TopKFirst) renormalizes the rows in place, as
    /// [`top_k_renorm_probs`](super::top_k_renorm_probs) does, which says how long they may be.
    ///
    /// # Errors
    /// As for [`sampling_from_probs`](Self::sampling_from_probs), for a `top_k` below 1, a `top_p` that is not within 1e-30 and 1,
    /// and for rows that are too long for the order.
    pub fn top_k_top_p_sampling_from_probs<'s>(
        &mut self,
        output: &mut TensorMut<'_>,
        probs: &mut TensorMut<'_>,
        top_k: impl Into<Setting<'s, TopK>>,
        top_p: impl Into<Setting<'s, TopP>>,
        philox: &mut Philox,
        options: &SamplingOptions,
    ) -> Result<()> {
        let draw = Draw::new("top_k_top_p_sampling_from_probs", philox, options, self.stream())?;
        let (top_k, top_p) = (top_k.into(), top_p.into());
        match options.filter_order {
            FilterOrder::Joint => self.joint_behind((output, probs), top_k, top_p, draw, |_, guard| guard()),
            FilterOrder::TopKFirst => self.top_p_behind((output, probs), top_p, draw, |sampler, guard| {
                renorm_behind(probs.operand(), top_k, sampler.stream(), guard)
            }),
        }?;
        philox.used(tries(output));
        Ok(())
    }

    /// As [`top_k_top_p_sampling_from_probs`](Self::top_k_top_p_sampling_from_probs), of what [`softmax`](super::softmax) makes of
    /// logits, in their place. FlashInfer's Python masks the logits first where `top_k` comes first, which comes to the same, but for
    /// NaN, which the mask would hide.
    ///
    /// # Errors
    /// As there.
    pub fn top_k_top_p_sampling_from_logits<'s>(
        &mut self,
        output: &mut TensorMut<'_>,
        logits: &mut TensorMut<'_>,
        top_k: impl Into<Setting<'s, TopK>>,
        top_p: impl Into<Setting<'s, TopP>>,
        philox: &mut Philox,
        options: &SamplingOptions,
    ) -> Result<()> {
        let draw = Draw::new("top_k_top_p_sampling_from_logits", philox, options, self.stream())?;
        let (top_k, top_p) = (top_k.into(), top_p.into());
        match options.filter_order {
            FilterOrder::Joint => self.joint_behind((output, logits), top_k, top_p, draw, |sampler, guard| {
                sampler.probabilities(logits, options)?;
                guard()
            }),
            FilterOrder::TopKFirst => self.top_p_behind((output, logits), top_p, draw, |sampler, guard| {
                renorm_behind(logits.operand(), top_k, sampler.stream(), || {
                    sampler.probabilities(logits, options)?;
                    guard()
                })
            }),
        }?;
        philox.used(tries(output));
        Ok(())
    }

    /// Keeps each row's likeliest tokens whose probabilities sum to `top_p`, and divides them by their sum.
    ///
    /// # Errors
    /// As for [`sampling_from_probs`](Self::sampling_from_probs), and for a `top_p` that is not within 1e-30 and 1.
    pub fn top_p_renorm_probs<'s>(
        &mut self,
        renorm_probs: &mut TensorMut<'_>,
        probs: &mut TensorMut<'_>,
        top_p: impl Into<Setting<'s, TopP>>,
    ) -> Result<()> {
        let top_p = top_p.into();
        let rows = top_p.rows();
        let operands = top_p_renorm_operands([probs.operand(), renorm_probs.operand(), given(&rows)], top_p)?;
        self.behind_guard::<TopPRenormProbs>(probs, &operands, |_, guard| guard())
    }

    /// [`top_p_renorm_probs`](Self::top_p_renorm_probs) of a tensor onto itself.
    ///
    /// # Errors
    /// As there.
    pub fn top_p_renorm_probs_in_place<'s>(
        &mut self,
        probs: &mut TensorMut<'_>,
        top_p: impl Into<Setting<'s, TopP>>,
    ) -> Result<()> {
        let top_p = top_p.into();
        let rows = top_p.rows();
        let operands = top_p_renorm_operands([probs.operand(), probs.operand(), given(&rows)], top_p)?;
        self.behind_guard::<TopPRenormProbs>(probs, &operands, |_, guard| guard())
    }

    /// Speculative sampling of a chain of drafts: see [the kernel itself](super::chain_speculative_sampling).
    ///
    /// A draft that is no token is taken for token 0. Where a draft is rejected and its row is nowhere below the target's, which
    /// is so by rounding alone, the target's likeliest token stands behind the accepted ones. The statuses are one for each
    /// sequence, of all its rows and drafts. Of a context's rows a call takes `batch * (2 * count + 1)`.
    ///
    /// # Errors
    /// As for [`sampling_from_probs`](Self::sampling_from_probs).
    pub fn chain_speculative_sampling(
        &mut self,
        tensors: &mut ChainTensors<'_>,
        philox: &mut Philox,
        options: &SamplingOptions,
    ) -> Result<()> {
        let draw = Draw::new("chain_speculative_sampling", philox, options, self.stream())?;
        match &mut self.place {
            Place::Host(statuses) => **statuses = chain_on_host(tensors, draw)?,
            #[cfg(feature = "cudarc")]
            Place::Gpu(gpu) => gpu.chain(tensors, draw)?,
        }
        philox.used(tensors.tries());
        Ok(())
    }

    fn stream(&self) -> Stream<'a> {
        match &self.place {
            Place::Host(_) => Stream::NULL,
            #[cfg(feature = "cudarc")]
            Place::Gpu(gpu) => gpu.at.stream,
        }
    }

    /// The scratch memory of a softmax.
    fn workspace(&self) -> (Layout, &Owner<'a>) {
        match &self.place {
            Place::Host(_) => {
                let nothing = ptr::without_provenance_mut(16);
                (Layout::build(nothing, Device::Cpu, DType::U8, &[0], None, None), NOBODY)
            }
            #[cfg(feature = "cudarc")]
            Place::Gpu(gpu) => gpu.workspace(),
        }
    }

    /// Softmax of logits onto themselves, at a temperature of 1.
    fn probabilities(&self, logits: &TensorMut<'_>, options: &SamplingOptions) -> Result<()> {
        let (workspace, owner) = self.workspace();
        let tensors = [Operand::Tensor(&workspace, owner), logits.operand(), logits.operand()];
        softmax_of(tensors, Setting::All(1.0), options, self.stream())
    }

    fn top_p_behind(
        &mut self,
        (output, rows): (&TensorMut<'_>, &TensorMut<'_>),
        top_p: Setting<'_, TopP>,
        draw: Draw,
        prepare: impl FnOnce(&Self, Guard<'_>) -> Result<()>,
    ) -> Result<()> {
        let own = top_p.rows();
        let operands = top_p_operands([rows.operand(), output.operand(), given(&own)], top_p, draw)?;
        self.behind_guard::<TopPSamplingFromProbs>(rows, &operands, prepare)
    }

    fn joint_behind(
        &mut self,
        (output, rows): (&TensorMut<'_>, &TensorMut<'_>),
        top_k: Setting<'_, TopK>,
        top_p: Setting<'_, TopP>,
        draw: Draw,
        prepare: impl FnOnce(&Self, Guard<'_>) -> Result<()>,
    ) -> Result<()> {
        let (own_k, own_p) = (top_k.rows(), top_p.rows());
        let tensors = [rows.operand(), output.operand(), given(&own_k), given(&own_p)];
        let operands = joint_operands(tensors, top_k, top_p, draw)?;
        self.behind_guard::<TopKTopPSamplingFromProbs>(rows, &operands, prepare)
    }

    /// Calls a kernel behind what `prepare` queues, which does the guard that it is given once the rows are what they shall be
    /// looked at as. All is checked before anything is queued.
    fn behind_guard<K: Kernel>(
        &mut self,
        rows: &TensorMut<'_>,
        operands: &[Operand<'_, '_>],
        prepare: impl FnOnce(&Self, Guard<'_>) -> Result<()>,
    ) -> Result<()> {
        let (sampler, function, mut found) = (&*self, K::ROW.function, Vec::new());
        // Where it is comes first: that it is also for another stream than the context's helps nobody.
        sampler.check(function, K::ROW.arguments[0].name, rows.layout(), 0)?;
        let ahead = || {
            sampler.check(function, K::ROW.arguments[0].name, rows.layout(), rows.layout().size(0))?;
            prepare(sampler, &mut || {
                found = sampler.guard(function, rows)?;
                Ok(())
            })
        };
        // SAFETY: by the guard each row is what the kernel takes it for, on the same stream, behind all that wrote it; nothing else
        // writes it, since it is borrowed mutably. Numbers of rows are what their type promises.
        unsafe { Entry::of::<K>().call_behind(operands, sampler.stream(), ahead) }?;
        match &mut self.place {
            Place::Host(statuses) => **statuses = found,
            #[cfg(feature = "cudarc")]
            Place::Gpu(_) => {}
        }
        Ok(())
    }

    /// That a tensor is where the context is, and that there is memory for so many rows.
    fn check(&self, function: &'static str, argument: &'static str, tensor: &Layout, rows: i64) -> Result<()> {
        let (device, most) = match &self.place {
            Place::Host(_) => (Device::Cpu, i64::MAX),
            #[cfg(feature = "cudarc")]
            Place::Gpu(gpu) => (Device::Cuda(gpu.at.device as u32), gpu.rows),
        };
        let (argument, found, expected) = if tensor.device() != device {
            (argument, format!("on {}", tensor.device()), format!("memory of {device}, where the context is"))
        } else if rows > most {
            ("rows", rows.to_string(), format!("at most {most}, for which SamplingContext::new was asked for memory"))
        } else {
            return Ok(());
        };
        Err(FlashInferError::InvalidArgument { function, argument, found, expected })
    }

    /// Looks at the rows of a tensor that was checked. On the host it answers what is wrong with each; on a GPU that stands in the
    /// context's memory, when the stream has come so far.
    #[cfg_attr(not(feature = "cudarc"), allow(unused_variables, reason = "a GPU's error names the function"))]
    fn guard(&self, function: &'static str, rows: &TensorMut<'_>) -> Result<Vec<RowStatus>> {
        match &self.place {
            // SAFETY: the call that was checked is of contiguous F32 on the host, which is borrowed mutably.
            Place::Host(_) => Ok(unsafe { guard_on_host(rows.layout()) }),
            #[cfg(feature = "cudarc")]
            Place::Gpu(gpu) => gpu.guard(function, rows).map(|()| Vec::new()),
        }
    }
}

/// That a call of speculative sampling keeps its row and is of tensors where the context is; nothing where there is nothing to do.
pub(super) fn checked_chain(
    operands: &ChainOperands<'_, '_>,
    stream: Stream<'_>,
    device: Device,
) -> Result<Option<[i64; 3]>> {
    let row = ChainSpeculativeSampling::ROW;
    let checked = check(row, operands, stream).map_err(|fault| refused(row, operands, stream, fault))?;
    if checked.empty {
        return Ok(None);
    }
    if checked.device != device {
        return Err(FlashInferError::InvalidArgument {
            function: row.function,
            argument: row.arguments[row.lead].name,
            found: format!("on {}", checked.device),
            expected: format!("memory of {device}, where the context is"),
        });
    }
    Ok(Some([BATCH, COUNT, VOCAB].map(|dimension| checked.dimensions[dimension])))
}

/// Speculative sampling on the host: what is wrong with each sequence.
fn chain_on_host(tensors: &mut ChainTensors<'_>, draw: Draw) -> Result<Vec<RowStatus>> {
    let mut operands = tensors.operands(draw);
    let Some([batch, count, vocab]) = checked_chain(&operands, Stream::NULL, Device::Cpu)? else {
        return Ok(Vec::new());
    };
    let (sequences, count) = (batch as usize, count as usize);
    let given = tensors.draft_token_ids.layout().data().cast::<i32>();
    let mut statuses = vec![RowStatus::default(); sequences];
    let mut drafts = Vec::with_capacity(sequences * count);
    for i in 0..sequences * count {
        // SAFETY: inside of the tensor, which is contiguous I32 on the host, as was checked; it may lie at any address.
        let token = unsafe { given.wrapping_add(i).read_unaligned() };
        let is_token = (0..vocab).contains(&token.into());
        drafts.push(if is_token { token } else { 0 });
        if !is_token {
            statuses[i / count] = RowStatus::NO_TOKEN;
        }
    }
    for (rows, of_sequence) in [(&tensors.draft_probs, count), (&tensors.target_probs, count + 1)] {
        // SAFETY: contiguous F32 on the host, as was checked, borrowed mutably.
        let found = unsafe { guard_on_host(rows.layout()) };
        for (i, status) in found.into_iter().enumerate() {
            statuses[i / of_sequence] = statuses[i / of_sequence] | status;
        }
    }
    let drafts = TensorRef::from_slice(&drafts, &[batch, count as i64])?;
    operands[1] = drafts.operand();
    // SAFETY: the rows were made valid, and the drafts are tokens.
    unsafe { Entry::of::<ChainSpeculativeSampling>().call(&operands, Stream::NULL) }?;
    Ok(statuses)
}
