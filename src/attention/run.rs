//! One call: its tensors checked against the plan, and the launcher or the reference called.

use std::cell::RefCell;

use crate::contract::{Checked, Operand, Row, stream_fits};
use crate::error::Result;
use crate::indices::refuse;
use crate::kernels::page::{KvLayout, PagedKvCache, PagedMlaCache};
use crate::object::Arg;
use crate::reference;
use crate::stream::Stream;
use crate::tensor::{Device, Form, TensorMut, TensorRef};

use super::batch::Batch;
use super::rows::{self, Expected, RUN};
use super::spec::{AttentionSpec, Kind, MLA_DIMS, SCALES, SCALES_EXPECTED};

/// What a call may add to its tensors.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct AttentionOptions<'a> {
    /// What the keys were divided by when they were written in 8 bits: it multiplies the logits. 1 without.
    pub k_scale: Option<f64>,
    /// What the queries were divided by, likewise.
    pub q_scale: Option<f64>,
    /// What the values were divided by: it multiplies the results. Only with 8-bit queries, whose kernels have it; else it is the
    /// caller's to multiply. 1 without.
    pub v_scale: Option<f64>,
    /// `[q_heads]` F32: each head's sink, for a specification with [sinks](super::AttentionBuilder::sinks).
    pub sink: Option<TensorRef<'a>>,
}

impl<'a> AttentionOptions<'a> {
    /// With a scale of the keys.
    #[must_use]
    pub fn with_k_scale(mut self, k_scale: f64) -> Self {
        self.k_scale = Some(k_scale);
        self
    }

    /// With a scale of the queries.
    #[must_use]
    pub fn with_q_scale(mut self, q_scale: f64) -> Self {
        self.q_scale = Some(q_scale);
        self
    }

    /// With a scale of the values.
    #[must_use]
    pub fn with_v_scale(mut self, v_scale: f64) -> Self {
        self.v_scale = Some(v_scale);
        self
    }

    /// With sinks.
    #[must_use]
    pub fn with_sink(mut self, sink: TensorRef<'a>) -> Self {
        self.sink = Some(sink);
        self
    }
}

/// The queries of latent attention: the part that meets the compressed keys and the part that meets the rotary ones.
#[derive(Debug)]
pub struct LatentQueries<'a, 'o> {
    /// `[rows, heads, 512]`.
    pub q_nope: &'a TensorRef<'o>,
    /// `[rows, heads, 64]`.
    pub q_pe: &'a TensorRef<'o>,
}

/// What a call is checked against and launched by: a plan, wherever it is.
pub(super) struct Planned<'a> {
    pub(super) spec: &'a AttentionSpec,
    /// The queries of the call.
    pub(super) rows: i64,
    /// The pages of the cache, or the keys.
    pub(super) pages: i64,
    pub(super) stream: Stream<'a>,
    pub(super) place: Place<'a>,
    /// What a call of this plan was found good for; nothing where each call is one of a kind.
    pub(super) known: Option<&'a Known>,
}

/// The forms of the tensors that the last call of a plan was checked with. Layers have the same, so that of a call whose tensors have
/// these forms no more is looked at than where the tensors are.
#[derive(Default)]
pub(super) struct Known(RefCell<Option<[Option<Form>; 6]>>);

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Known")
    }
}

impl Known {
    /// Whether a call with these tensors was checked before, but for where they are and for which stream.
    #[inline(always)]
    fn has(&self, operands: &[Operand<'_, '_>; 6], stream: Stream<'_>) -> bool {
        let forms = self.0.borrow();
        let Some(forms) = &*forms else { return false };
        let mut same = true;
        for (operand, form) in operands.iter().zip(forms) {
            same &= match (operand.layout(), form) {
                // Aligned as the strictest of the rows' tensors are; what is less so is checked again.
                (Some(layout), Some(form)) => {
                    layout.form().is(form, RANK) & stream_fits(layout, stream) & (layout.data().addr() & 15 == 0)
                }
                (None, None) => true,
                _ => false,
            };
        }
        same
    }

    #[cold]
    fn learn(&self, operands: &[Operand<'_, '_>; 6]) {
        let forms = operands.each_ref().map(|operand| operand.layout().map(|layout| *layout.form()));
        *self.0.borrow_mut() = Some(forms);
    }
}

/// The most dimensions that a tensor of a call has.
const RANK: usize = 4;

/// Where a plan is.
pub(super) enum Place<'a> {
    Host(&'a Batch),
    #[cfg(feature = "cudarc")]
    Gpu(super::gpu::Launch<'a>),
    /// XQA's, which has its own call.
    #[cfg(feature = "cudarc")]
    Xqa(Device),
}

/// The numbers that a launcher is called with, beside what is the plan's.
pub(super) struct Numbers {
    pub(super) mask_mode: i64,
    pub(super) layout: i64,
    pub(super) window_left: i64,
    pub(super) soft_cap: f64,
    pub(super) sm_scale: f64,
    pub(super) v_scale: f64,
}

impl Planned<'_> {
    pub(super) fn device(&self) -> Device {
        match &self.place {
            Place::Host(_) => Device::Cpu,
            #[cfg(feature = "cudarc")]
            Place::Gpu(launch) => launch.device(),
            #[cfg(feature = "cudarc")]
            Place::Xqa(device) => *device,
        }
    }

    pub(super) fn expected(&self) -> Expected {
        let spec = self.spec;
        let ((q_heads, kv_heads), (q_dim, v_dim)) = (spec.heads(), spec.head_dims());
        // The rows of latent attention have the compressed size for both.
        let (q_dim, v_dim) = if spec.kind() == Kind::Mla { (MLA_DIMS.0, MLA_DIMS.0) } else { (q_dim, v_dim) };
        let (rows, pages, page_size) = (self.rows, self.pages, spec.page_size());
        let (q, kv, o) = (spec.dtype(), spec.kv_dtype(), spec.out_dtype());
        Expected { rows, q_heads, kv_heads, q_dim, v_dim, page_size, pages, q, kv, o }
    }

    pub(super) fn numbers(&self, options: &AttentionOptions<'_>) -> Result<Numbers> {
        let spec = self.spec;
        let AttentionOptions { k_scale, q_scale, v_scale, .. } = *options;
        let mut sm_scale = spec.sm_scale();
        if k_scale.is_some() | q_scale.is_some() {
            let scale = q_scale.unwrap_or(1.0) * k_scale.unwrap_or(1.0);
            sm_scale *= scale;
            if !SCALES.contains(&sm_scale) {
                let name = if k_scale.is_some() { "k_scale" } else { "q_scale" };
                let found = format!("{scale} (q_scale times k_scale), {sm_scale} with the specification's scale");
                return refuse(RUN, name, found, SCALES_EXPECTED);
            }
        }
        if let Some(scale) = v_scale {
            if !spec.has_8_bit_queries() {
                let expected =
                    "none: these kernels have no scale of the values, which multiplies the results afterwards";
                return refuse(RUN, "v_scale", scale.to_string(), expected);
            }
            if !(1e-6..=1e6).contains(&scale) {
                return refuse(RUN, "v_scale", scale.to_string(), "a number from 0.000001 to 1000000");
            }
        }
        Ok(Numbers {
            mask_mode: spec.mask_mode(),
            layout: i64::from(spec.layout() == KvLayout::Hnd),
            window_left: spec.window_left(),
            soft_cap: spec.soft_cap().unwrap_or(0.0),
            sm_scale,
            v_scale: v_scale.unwrap_or(1.0),
        })
    }

    fn check_sinks(&self, sink: bool) -> Result<()> {
        match (self.spec.has_sinks(), sink) {
            (true, false) => {
                refuse(RUN, "sink", "none".to_owned(), "a tensor of the heads' sinks, as the specification has them")
            }
            (false, true) => refuse(RUN, "sink", "a tensor".to_owned(), "none: the specification has no sinks"),
            _ => Ok(()),
        }
    }

    fn check_kind(&self, kinds: &[Kind], method: &'static str) -> Result<()> {
        if kinds.contains(&self.spec.kind()) {
            return Ok(());
        }
        let expected = match self.spec.kind() {
            Kind::Paged | Kind::Decode => "run, for keys in a paged cache",
            Kind::Ragged => "run_ragged, for keys one after the other",
            Kind::Mla => "run_mla, for a latent cache",
        };
        refuse(RUN, "method", method.to_owned(), expected)
    }

    /// Checks the tensors, and that they are where the plan is; whether there is anything to compute.
    #[inline(always)]
    fn checked(&self, row: &'static Row, operands: &[Operand<'_, '_>; 6]) -> Result<bool> {
        if let Some(known) = self.known {
            if known.has(operands, self.stream) {
                return Ok(true);
            }
            let something = !self.checked_anew(row, operands)?.empty;
            if something {
                known.learn(operands);
            }
            return Ok(something);
        }
        Ok(!self.checked_anew(row, operands)?.empty)
    }

    #[inline(never)]
    fn checked_anew(&self, row: &'static Row, operands: &[Operand<'_, '_>; 6]) -> Result<Checked> {
        let checked = rows::checked(row, operands, self.stream, &self.expected(), self.spec.kind() != Kind::Ragged)?;
        if checked.device != self.device() {
            let expected = format!("memory of {}, where the workspace is", self.device());
            return refuse(RUN, row.arguments[rows::Q].name, format!("on {}", checked.device), expected);
        }
        let (pages, mla) = (self.spec.kind() != Kind::Ragged, self.spec.kind() == Kind::Mla);
        if mla && checked.dimensions[rows::ROTARY] != MLA_DIMS.1 {
            return refuse(RUN, "kpe_dim", checked.dimensions[rows::ROTARY].to_string(), "64");
        }
        if checked.device != Device::Cpu {
            // Latent attention finds pages by 32 bits too.
            rows::check_reach(row, operands, pages, if mla { u32::MAX.into() } else { i64::MAX })?;
        }
        Ok(checked)
    }

    pub(super) fn paged(
        &self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        q: &TensorRef<'_>,
        cache: &PagedKvCache<'_>,
        options: &AttentionOptions<'_>,
    ) -> Result<()> {
        self.check_kind(&[Kind::Paged, Kind::Decode], "run")?;
        self.check_sinks(options.sink.is_some())?;
        if cache.layout() != self.spec.layout() {
            let (found, expected) = (format!("{:?}", cache.layout()), format!("{:?}", self.spec.layout()));
            return refuse(RUN, "layout", found, format!("{expected}, as the specification says"));
        }
        let (k, v) = cache.operands();
        let lse = lse.as_deref().map_or(Operand::Absent, TensorMut::operand);
        let sink = options.sink.as_ref().map_or(Operand::Absent, TensorRef::operand);
        let operands = [q.operand(), k, v, o.operand(), lse, sink];
        let row = match cache.layout() {
            KvLayout::Nhd => rows::PAGED,
            KvLayout::Hnd => rows::PAGED_HND,
        };
        if !self.checked(row, &operands)? {
            return Ok(());
        }
        let numbers = self.numbers(options)?;
        match &self.place {
            Place::Host(batch) => on_host("attention_paged", &operands, batch, |args| {
                args.push(Arg::int(numbers.layout));
                push(args, self.spec, &numbers);
            }),
            #[cfg(feature = "cudarc")]
            Place::Gpu(launch) => launch.paged(row, &operands, &numbers, self.stream),
            #[cfg(feature = "cudarc")]
            Place::Xqa(_) => unreachable!("XQA's launcher is called where its table is"),
        }
    }

    pub(super) fn ragged(
        &self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        q: &TensorRef<'_>,
        (k, v): (&TensorRef<'_>, &TensorRef<'_>),
        options: &AttentionOptions<'_>,
    ) -> Result<()> {
        self.check_kind(&[Kind::Ragged], "run_ragged")?;
        self.check_sinks(options.sink.is_some())?;
        let lse = lse.as_deref().map_or(Operand::Absent, TensorMut::operand);
        let sink = options.sink.as_ref().map_or(Operand::Absent, TensorRef::operand);
        let operands = [q.operand(), k.operand(), v.operand(), o.operand(), lse, sink];
        if !self.checked(rows::RAGGED, &operands)? {
            return Ok(());
        }
        let numbers = self.numbers(options)?;
        match &self.place {
            Place::Host(batch) => on_host("attention_ragged", &operands, batch, |args| push(args, self.spec, &numbers)),
            #[cfg(feature = "cudarc")]
            Place::Gpu(launch) => launch.ragged(rows::RAGGED, &operands, &numbers, self.stream),
            #[cfg(feature = "cudarc")]
            Place::Xqa(_) => unreachable!("XQA's launcher is called where its table is"),
        }
    }

    pub(super) fn mla(
        &self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        queries: &LatentQueries<'_, '_>,
        cache: &PagedMlaCache<'_>,
    ) -> Result<()> {
        self.check_kind(&[Kind::Mla], "run_mla")?;
        let (ckv, kpe) = cache.operands();
        let lse = lse.as_deref().map_or(Operand::Absent, TensorMut::operand);
        let operands = [queries.q_nope.operand(), ckv, kpe, o.operand(), lse, queries.q_pe.operand()];
        if !self.checked(rows::MLA, &operands)? {
            return Ok(());
        }
        let numbers = self.numbers(&AttentionOptions::default())?;
        match &self.place {
            Place::Host(batch) => mla_on_host(&operands, batch, self.spec, &numbers),
            #[cfg(feature = "cudarc")]
            Place::Gpu(launch) => launch.mla(rows::MLA, &operands, &numbers, self.stream),
            #[cfg(feature = "cudarc")]
            Place::Xqa(_) => unreachable!("XQA's launcher is called where its table is"),
        }
    }
}

/// The numbers that the reference takes behind everything else.
fn push(args: &mut Vec<Arg<'_>>, spec: &AttentionSpec, numbers: &Numbers) {
    args.extend([Arg::bool(spec.is_causal()), Arg::int(numbers.window_left)]);
    args.extend([numbers.soft_cap, numbers.sm_scale, numbers.v_scale].map(Arg::float));
}

/// The arrays of a batch as tensors on the host: those of queries and of keys, and those of pages.
fn arrays(batch: &Batch) -> Result<[TensorRef<'_>; 4]> {
    Ok([
        tensor(&batch.qo_indptr)?,
        tensor(&batch.kv_indptr)?,
        tensor(&batch.kv_indices)?,
        tensor(&batch.last_page_len)?,
    ])
}

fn tensor(array: &[i32]) -> Result<TensorRef<'_>> {
    TensorRef::from_slice(array, &[array.len() as i64])
}

#[cold]
fn on_host<'a>(
    function: &'static str,
    operands: &'a [Operand<'_, '_>; 6],
    batch: &'a Batch,
    more: impl FnOnce(&mut Vec<Arg<'a>>),
) -> Result<()> {
    let function = reference::module()?.function(function)?;
    let arrays = arrays(batch)?;
    let packed: Vec<_> = operands.iter().map(|operand| operand.layout().map(|layout| layout.pack())).collect();
    let tables: Vec<_> = arrays.iter().map(|array| array.layout().pack()).collect();
    let mut args: Vec<Arg<'_>> =
        packed.iter().map(|packed| packed.as_ref().map_or(Arg::NONE, Arg::dl_tensor)).collect();
    let used = if batch.cache().is_some() { 4 } else { 2 };
    args.extend(tables.iter().take(used).map(Arg::dl_tensor));
    let mut numbers = Vec::new();
    more(&mut numbers);
    args.extend(numbers);
    // SAFETY: the reference checks what it is given; the tensors were checked, and are on the host.
    unsafe { function.launch(&args) }
}

#[cold]
fn mla_on_host(operands: &[Operand<'_, '_>; 6], batch: &Batch, spec: &AttentionSpec, numbers: &Numbers) -> Result<()> {
    let function = reference::module()?.function("attention_mla")?;
    let arrays = arrays(batch)?;
    let packed: Vec<_> = operands.iter().map(|operand| operand.layout().map(|layout| layout.pack())).collect();
    let arg = |at: usize| packed[at].as_ref().map_or(Arg::NONE, Arg::dl_tensor);
    let tables: Vec<_> = arrays.iter().map(|array| array.layout().pack()).collect();
    let mut args = vec![arg(rows::Q), arg(5), arg(rows::K), arg(rows::V), arg(rows::RESULT), arg(4)];
    args.extend(tables.iter().map(Arg::dl_tensor));
    args.extend([Arg::bool(spec.is_causal()), Arg::float(numbers.sm_scale), Arg::bool(false)]);
    // SAFETY: as for the others.
    unsafe { function.launch(&args) }
}
