//! What is computed: the facts of a model's attention, checked together, which choose the module.

use crate::error::Result;
use crate::indices::refuse;
use crate::kernels::page::KvLayout;
use crate::tensor::DType;
use crate::uri::{self, Element, Shape, Types, Uri};

/// The name that errors of a specification carry.
const SPEC: &str = "AttentionSpec";

/// The heads' sizes that the wheel has modules for, where queries and values have the same.
const HEAD_DIMS: [i64; 3] = [64, 128, 256];
/// The groups of query heads to a key head that the decode kernel on CUDA cores is compiled for.
const CUDA_CORE_GROUPS: [i64; 5] = [1, 2, 3, 4, 8];
/// From so many query heads to a key head on, tensor cores decode faster than CUDA cores: 1.1 to 1.6 times on an H200, for every
/// batch that was measured with groups of 4.
const TENSOR_CORE_GROUP: i64 = 4;
/// What products may be multiplied by. Masked logits are not infinite in upstream's kernels but -50,000 before they are scaled,
/// which these make -50.
pub(super) const SCALES: std::ops::RangeInclusive<f64> = 1e-3..=1e6;
pub(super) const SCALES_EXPECTED: &str = "a number from 0.001 to 1000000: with a smaller one release 0.6.3 sees keys that are masked; scale the queries instead";
/// The compressed size and the rotary size of multi-head latent attention.
pub(super) const MLA_DIMS: (i64, i64) = (512, 64);

/// The shape of a call: where its keys are, and how many queries a request has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Any number of queries for each request, whose keys and values are in a paged cache.
    Paged,
    /// Any number of queries for each request, whose keys and values lie one after the other.
    Ragged,
    /// One query for each request, whose keys and values are in a paged cache.
    Decode,
    /// Multi-head latent attention: any number of queries for each request, over a paged cache of compressed keys.
    Mla,
}

/// Which of upstream's kernels computes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backend {
    /// The kernels for tensor cores from Turing on. They divide long contexts among the GPU's multiprocessors.
    Fa2,
    /// The kernels for Hopper GPUs (compute capability 9.0), which are the fastest for many queries. They do not divide
    /// contexts.
    Fa3,
    /// The decode kernel that computes on CUDA cores.
    CudaCores,
}

impl Backend {
    /// Whether it is one that exists for Hopper GPUs alone.
    pub fn is_for_hopper_alone(self) -> bool {
        self == Self::Fa3
    }
}

/// A model's attention: element types, sizes, window, soft cap, where the keys are. It alone chooses the module that computes it
/// and every number that the module is called with, so that none of them can differ between planning and running.
///
/// ```
/// use flashinfer_rs::DType;
/// use flashinfer_rs::attention::{AttentionSpec, Backend};
///
/// // Llama 3's: 32 query heads and 8 key heads of 128 elements, pages of 16 tokens.
/// let spec = AttentionSpec::paged(DType::BF16, (32, 8), 128, 16).causal(true).build()?;
/// assert_eq!(spec.backend((9, 0)), Backend::Fa3);
/// assert_eq!(spec.backend((8, 0)), Backend::Fa2);
/// assert!(spec.module(Backend::Fa2).starts_with("batch_prefill_with_kv_cache_dtype_q_bf16"));
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    facts: AttentionBuilder,
}

/// The facts of an [`AttentionSpec`], not yet checked.
#[derive(Debug, Clone, Copy, PartialEq)]
#[must_use = "build checks it and makes an AttentionSpec"]
pub struct AttentionBuilder {
    kind: Kind,
    q: DType,
    kv: DType,
    /// Of results; the queries' where nothing was said.
    out: Option<DType>,
    heads: (i64, i64),
    head_dims: (i64, i64),
    page_size: i64,
    layout: KvLayout,
    causal: bool,
    window: Option<i64>,
    soft_cap: Option<f64>,
    sm_scale: Option<f64>,
    sinks: bool,
    backend: Option<Backend>,
    pdl: Option<bool>,
}

impl AttentionSpec {
    const fn of(
        kind: Kind,
        dtype: DType,
        heads: (i64, i64),
        head_dims: (i64, i64),
        page_size: i64,
    ) -> AttentionBuilder {
        AttentionBuilder {
            kind,
            q: dtype,
            kv: dtype,
            out: None,
            heads,
            head_dims,
            page_size,
            layout: KvLayout::Nhd,
            causal: false,
            window: None,
            soft_cap: None,
            sm_scale: None,
            sinks: false,
            backend: None,
            pdl: None,
        }
    }

    /// [`Kind::Paged`]: `heads` are those of queries and of keys, `head_dim` is the size of each, and a page holds `page_size`
    /// tokens.
    pub const fn paged(dtype: DType, heads: (i64, i64), head_dim: i64, page_size: i64) -> AttentionBuilder {
        Self::of(Kind::Paged, dtype, heads, (head_dim, head_dim), page_size)
    }

    /// [`Kind::Ragged`]: `heads` are those of queries and of keys, `head_dims` the size of queries and keys and that of values.
    /// They are the same, or 192 and 128, as the prefill of DeepSeek's models has them.
    pub const fn ragged(dtype: DType, heads: (i64, i64), head_dims: (i64, i64)) -> AttentionBuilder {
        Self::of(Kind::Ragged, dtype, heads, head_dims, 1)
    }

    /// [`Kind::Decode`]; the arguments are those of [`paged`](Self::paged).
    pub const fn decode(dtype: DType, heads: (i64, i64), head_dim: i64, page_size: i64) -> AttentionBuilder {
        Self::of(Kind::Decode, dtype, heads, (head_dim, head_dim), page_size)
    }

    /// [`Kind::Mla`], of so many query heads. The compressed part has 512 elements, the rotary one 64, as DeepSeek's models have
    /// them. The [scale](AttentionBuilder::sm_scale) must be given: it is that of the model's heads before they are absorbed,
    /// 1/√(128 + 64) times what the model's rotary scaling adds.
    pub const fn mla(dtype: DType, heads: i64, page_size: i64) -> AttentionBuilder {
        Self::of(Kind::Mla, dtype, (heads, 1), MLA_DIMS, page_size)
    }

    /// The shape of its calls.
    pub fn kind(&self) -> Kind {
        self.facts.kind
    }

    /// The element type of queries.
    pub fn dtype(&self) -> DType {
        self.facts.q
    }

    /// The element type of results: that of queries, and of 8-bit queries what [`AttentionBuilder::out_dtype`] said, else BF16.
    pub fn out_dtype(&self) -> DType {
        self.facts.out_dtype_or_default()
    }

    /// Whether queries have 8 bits.
    pub(super) fn has_8_bit_queries(&self) -> bool {
        self.facts.q == DType::F8E4M3
    }

    /// The element type of keys and values.
    pub fn kv_dtype(&self) -> DType {
        self.facts.kv
    }

    /// The numbers of query heads and of key heads.
    pub fn heads(&self) -> (i64, i64) {
        self.facts.heads
    }

    /// How many query heads share a key head.
    pub fn group(&self) -> i64 {
        self.facts.heads.0 / self.facts.heads.1
    }

    /// The size of the heads of queries and keys, and that of values; of latent attention the compressed and the rotary size.
    pub fn head_dims(&self) -> (i64, i64) {
        self.facts.head_dims
    }

    /// The size of the heads of results.
    pub(super) fn out_dim(&self) -> i64 {
        if self.facts.kind == Kind::Mla { MLA_DIMS.0 } else { self.facts.head_dims.1 }
    }

    /// How many tokens a page holds; 1 without pages.
    pub fn page_size(&self) -> i64 {
        self.facts.page_size
    }

    /// How tokens and heads lie in a page.
    pub fn layout(&self) -> KvLayout {
        self.facts.layout
    }

    /// Whether a query sees only the keys up to its own position.
    pub fn is_causal(&self) -> bool {
        self.facts.causal
    }

    /// How many keys before its own position a query sees.
    pub fn window(&self) -> Option<i64> {
        self.facts.window
    }

    /// What bounds the logits.
    pub fn soft_cap(&self) -> Option<f64> {
        self.facts.soft_cap
    }

    /// What the products of queries and keys are multiplied by.
    pub fn sm_scale(&self) -> f64 {
        self.facts.sm_scale.unwrap_or_else(|| 1.0 / (self.facts.head_dims.0 as f64).sqrt())
    }

    /// Whether each head has a sink.
    pub fn has_sinks(&self) -> bool {
        self.facts.sinks
    }

    /// Whether kernels may start before the one ahead of them has ended; `None` for what is best.
    pub(super) fn pdl(&self) -> Option<bool> {
        self.facts.pdl
    }

    /// What was asked to compute it.
    pub(super) fn asked_backend(&self) -> Option<Backend> {
        self.facts.backend
    }

    /// Upstream's number for the window.
    pub(super) fn window_left(&self) -> i64 {
        self.facts.window.unwrap_or(-1)
    }

    /// Upstream's number for the mask: 1 for a causal one. A lone query is the last, which sees everything.
    pub(super) fn mask_mode(&self) -> i64 {
        i64::from(self.facts.causal && self.facts.kind != Kind::Decode)
    }

    /// What computes it on a GPU of this compute capability: what was [asked for](AttentionBuilder::backend), else
    /// - for [`Kind::Decode`] FA2 from 4 query heads to a key head on, where the GPU's tensor cores are of compute capability 8.0 or
    ///   above, as engines over FlashInfer choose too (its `use_tensor_cores`); the CUDA cores for smaller groups, and on older GPUs
    ///   for those that they have. FA3, which upstream chose in this release, leaves most of a GPU idle where there are few
    ///   requests;
    /// - else FA3 on compute capability 9.0, where queries and keys have the same type and FA3 has the heads' size, and FA2 on every
    ///   other GPU;
    /// - with 8-bit queries FA3, which alone has them.
    pub fn backend(&self, capability: (i32, i32)) -> Backend {
        let AttentionBuilder { kind, q, kv, sinks, .. } = self.facts;
        match (self.facts.backend, kind) {
            (Some(asked), _) => asked,
            (None, Kind::Decode) if sinks || self.is_for_tensor_cores(capability) => Backend::Fa2,
            (None, Kind::Decode) => Backend::CudaCores,
            (None, _) if q == DType::F8E4M3 => Backend::Fa3,
            (None, _) if capability == (9, 0) && q == kv => Backend::Fa3,
            (None, _) => Backend::Fa2,
        }
    }

    /// Whether decode is by tensor cores unless something else is asked for.
    fn is_for_tensor_cores(&self, capability: (i32, i32)) -> bool {
        let group = self.group();
        !CUDA_CORE_GROUPS.contains(&group) || (group >= TENSOR_CORE_GROUP && capability >= (8, 0))
    }

    /// The name of the module that computes it by that backend: the name of its library without the ending `.so`. Upstream makes
    /// names of this form for every combination, also for those that nobody has compiled. Of a specification for the host alone
    /// (F32) it is BF16's.
    pub fn module(&self, backend: Backend) -> String {
        let AttentionBuilder { kind, q, kv, head_dims: (qk, vo), window, soft_cap, sinks, .. } = self.facts;
        let types = Types { q: element(q), kv: element(kv), o: element(self.out_dtype()) };
        let (window, cap) = (window.is_some(), soft_cap.is_some());
        let shape = Shape { types, head_dim_qk: qk as u32, head_dim_vo: vo as u32, window, cap };
        let which = if backend.is_for_hopper_alone() { uri::Backend::Fa3 } else { uri::Backend::Fa2 };
        let name = match (kind, backend) {
            (Kind::Mla, _) => Uri::Mla { types, backend: which },
            (_, Backend::CudaCores) => Uri::BatchDecode(shape),
            _ if sinks => Uri::Sinks { types, window, backend: which },
            _ => Uri::BatchPrefill(shape, which),
        };
        name.to_string()
    }
}

/// An element type as names spell it.
pub(super) fn element(dtype: DType) -> Element {
    match dtype {
        DType::F16 => Element::F16,
        DType::F8E4M3 => Element::E4M3,
        _ => Element::BF16,
    }
}

impl AttentionBuilder {
    /// Keys and values of another element type than queries: F8E4M3. The scales that such a cache was written with are the caller's:
    /// the keys' goes into [`AttentionOptions::k_scale`](super::AttentionOptions::k_scale), the values' onto the result.
    pub const fn kv_dtype(mut self, dtype: DType) -> Self {
        self.kv = dtype;
        self
    }

    /// Results of another element type than queries, which 8-bit queries alone have: F16 or BF16, on the host also F32. BF16 unless
    /// this says otherwise.
    pub const fn out_dtype(mut self, dtype: DType) -> Self {
        self.out = Some(dtype);
        self
    }

    /// How tokens and heads lie in a page: NHD unless this says HND.
    pub const fn layout(mut self, layout: KvLayout) -> Self {
        self.layout = layout;
        self
    }

    /// Whether a query sees only the keys up to its own position, where the last query of a request stands at its last key. Off
    /// unless this turns it on; for [`Kind::Decode`] it makes no difference.
    pub const fn causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// A query sees its own position and so many keys before it. Only with a causal mask, or for [`Kind::Decode`].
    pub const fn window(mut self, keys: i64) -> Self {
        self.window = Some(keys);
        self
    }

    /// Logits become `cap · tanh(logit / cap)`.
    pub const fn soft_cap(mut self, cap: f64) -> Self {
        self.soft_cap = Some(cap);
        self
    }

    /// What products of queries and keys are multiplied by: 1/√(the head's size) unless this says otherwise.
    pub const fn sm_scale(mut self, scale: f64) -> Self {
        self.sm_scale = Some(scale);
        self
    }

    /// Each query head has a sink, a logit that takes part in the softmax and has no value, as in gpt-oss.
    pub const fn sinks(mut self) -> Self {
        self.sinks = true;
        self
    }

    /// What computes it, instead of what [`AttentionSpec::backend`] would choose.
    pub const fn backend(mut self, backend: Backend) -> Self {
        self.backend = Some(backend);
        self
    }

    /// Programmatic dependent launch on or off, for the backends that have it (FA2 and CUDA cores). Without, it is on from compute
    /// capability 9.0 on. The results are the same: what these kernels read before they wait for the kernel ahead of them was
    /// copied to the GPU by [`Workspace::plan`](super::Workspace::plan), never written by a kernel.
    pub const fn pdl(mut self, on: bool) -> Self {
        self.pdl = Some(on);
        self
    }

    /// Checks the facts together.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what no module computes, and for what release 0.6.3 computes
    /// wrong, with the reason.
    pub fn build(self) -> Result<AttentionSpec> {
        self.check_types()?;
        self.check_heads()?;
        self.check_mask()?;
        self.check_form()?;
        self.check_backend()?;
        Ok(AttentionSpec { facts: self })
    }

    const fn out_dtype_or_default(&self) -> DType {
        match (self.out, self.q) {
            (Some(dtype), _) => dtype,
            (None, DType::F8E4M3) => DType::BF16,
            (None, q) => q,
        }
    }

    /// 8-bit queries, which FA3 alone has, in few forms.
    fn check_8_bit_queries(&self) -> Result<()> {
        let Self { kind, kv, head_dims, .. } = *self;
        let found = |what: &str| format!("{} with {what}", self.q);
        let refused = |argument, what: &str, expected: &str| refuse(SPEC, argument, found(what), expected);
        match self.backend {
            _ if self.window.is_some() => refused(
                "window",
                "a window",
                "none, or 16-bit queries: in release 0.6.3 the kernels for 8-bit queries that have a window never end",
            ),
            _ if self.soft_cap.is_some() => refused(
                "soft_cap",
                "a soft cap",
                "none, or 16-bit queries: release 0.6.3's kernels for 8-bit queries ignore it",
            ),
            _ if self.sinks => refused("sinks", "sinks", "none, or 16-bit queries, as no module has both"),
            _ if matches!(kind, Kind::Decode | Kind::Mla) => {
                let what = if kind == Kind::Mla { "latent attention" } else { "decode" };
                refused(
                    "dtype",
                    what,
                    "16-bit queries: FA3, which alone has 8-bit ones, is compiled for any number of queries \
                     (paged, ragged); keys and values alone may be F8E4M3 (kv_dtype)",
                )
            }
            _ if kv != self.q => refused("kv_dtype", &format!("{kv} keys"), "F8E4M3 keys, as the queries"),
            _ if head_dims.0 != head_dims.1 || !matches!(head_dims.0, 128 | 256) => {
                let sizes = format!("heads of {} and {}", head_dims.0, head_dims.1);
                refused("head_dim", &sizes, "128 or 256, for which the kernels for 8-bit queries are compiled")
            }
            Some(Backend::Fa2 | Backend::CudaCores) => {
                refused("backend", &format!("{:?}", self.backend), "FA3, which alone has 8-bit queries")
            }
            _ if !matches!(self.out, None | Some(DType::F16 | DType::BF16 | DType::F32)) => refused(
                "out_dtype",
                &format!("results of {}", self.out_dtype_or_default()),
                "F16 or BF16 (on the host also F32)",
            ),
            _ => Ok(()),
        }
    }

    fn check_types(&self) -> Result<()> {
        let Self { kind, q, kv, .. } = *self;
        if q == DType::F8E4M3 {
            return self.check_8_bit_queries();
        }
        if !matches!(q, DType::F16 | DType::BF16 | DType::F32) {
            let expected = "F16 or BF16 (on the host also F32), or F8E4M3 on compute capability 9.0; of other 8-bit types nothing is \
                            compiled";
            return refuse(SPEC, "dtype", q.to_string(), expected);
        }
        if let Some(out) = self.out.filter(|out| *out != q) {
            return refuse(SPEC, "out_dtype", out.to_string(), format!("{q}, as the queries"));
        }
        if kv == q {
            return Ok(());
        }
        if kv != DType::F8E4M3 {
            return refuse(SPEC, "kv_dtype", kv.to_string(), format!("{q}, as the queries, or F8E4M3"));
        }
        if kind == Kind::Mla || self.sinks {
            let what = if kind == Kind::Mla { "latent attention" } else { "sinks" };
            return refuse(SPEC, "kv_dtype", format!("{kv} with {what}"), format!("{q}, as the queries"));
        }
        Ok(())
    }

    fn check_heads(&self) -> Result<()> {
        let (q, kv) = self.heads;
        // As far as a launch's grid reaches in its second and third dimension.
        const MOST: i64 = 65_535;
        for (name, heads) in [("q_heads", q), ("kv_heads", kv)] {
            if !(1..=MOST).contains(&heads) {
                return refuse(SPEC, name, heads.to_string(), format!("1 to {MOST}"));
            }
        }
        if q % kv != 0 {
            return refuse(SPEC, "q_heads", q.to_string(), format!("a multiple of the {kv} key heads"));
        }
        let (qk, vo) = self.head_dims;
        let known = match self.kind {
            Kind::Mla => true,
            Kind::Ragged if (qk, vo) == (192, 128) => true,
            _ => qk == vo && HEAD_DIMS.contains(&qk),
        };
        if !known {
            let expected = match self.kind {
                Kind::Ragged => "64, 128 or 256 for all, or 192 for queries and keys with 128 for values",
                _ => "64, 128 or 256; 192 with 128 is computed of keys that lie one after the other alone (ragged)",
            };
            return refuse(SPEC, "head_dim", format!("{qk} and {vo}"), expected);
        }
        if self.sinks && self.kind != Kind::Mla && qk != 64 {
            return refuse(
                SPEC,
                "head_dim",
                format!("{qk} with sinks"),
                "64, for which the kernels with sinks are compiled",
            );
        }
        Ok(())
    }

    fn check_mask(&self) -> Result<()> {
        if let Some(window) = self.window {
            if self.kind == Kind::Mla {
                return refuse(SPEC, "window", window.to_string(), "none for latent attention");
            }
            // Upstream adds it to positions in 32 bits.
            if !(0..=1 << 30).contains(&window) {
                return refuse(SPEC, "window", window.to_string(), "0 to 1073741824");
            }
            if !self.causal && self.kind != Kind::Decode {
                return refuse(
                    SPEC,
                    "window",
                    format!("{window} without a causal mask"),
                    "a causal mask (causal) with it: without one release 0.6.3 is wrong wherever it divides a context",
                );
            }
        }
        if let Some(cap) = self.soft_cap {
            if self.kind == Kind::Mla || self.sinks {
                let what = if self.sinks { "with sinks" } else { "of latent attention" };
                return refuse(SPEC, "soft_cap", format!("{cap} {what}"), "none, as no module has both");
            }
            if !(1e-3..=1e6).contains(&cap) {
                return refuse(SPEC, "soft_cap", cap.to_string(), "a number from 0.001 to 1000000");
            }
        }
        match self.sm_scale {
            Some(scale) if !SCALES.contains(&scale) => refuse(SPEC, "sm_scale", scale.to_string(), SCALES_EXPECTED),
            None if self.kind == Kind::Mla => refuse(
                SPEC,
                "sm_scale",
                "none".to_owned(),
                "that of the heads before they are absorbed, 1/sqrt(128 + 64) for DeepSeek's, since nothing here tells it",
            ),
            _ => Ok(()),
        }
    }

    fn check_form(&self) -> Result<()> {
        if !(1..=1 << 20).contains(&self.page_size) {
            return refuse(SPEC, "page_size", self.page_size.to_string(), "1 to 1048576 tokens");
        }
        if self.layout == KvLayout::Hnd && matches!(self.kind, Kind::Ragged | Kind::Mla) {
            let expected = match self.kind {
                Kind::Ragged => {
                    "NHD: of keys that lie one after the other, with their heads apart, FA3 takes the heads for tokens"
                }
                _ => "NHD, since the keys have no heads",
            };
            return refuse(SPEC, "layout", "HND".to_owned(), expected);
        }
        if self.sinks && self.kind == Kind::Mla {
            return refuse(SPEC, "sinks", "of latent attention".to_owned(), "none, as no module has both");
        }
        Ok(())
    }

    fn check_backend(&self) -> Result<()> {
        let Self { kind, q, kv, head_dims: (qk, vo), sinks, .. } = *self;
        let group = self.heads.0 / self.heads.1;
        let asked = |found: &str, expected: &str| refuse(SPEC, "backend", found.to_owned(), expected);
        match self.backend {
            Some(Backend::Fa2) | None if (qk, vo) == (192, 128) => match self.backend {
                Some(_) => asked("FA2 with heads of 192 and 128", "FA3, which alone is compiled for them"),
                None => Ok(()),
            },
            Some(Backend::CudaCores) if kind != Kind::Decode => asked(
                "CUDA cores for any number of queries",
                "FA2 or FA3; CUDA cores decode, one query for each request",
            ),
            Some(Backend::CudaCores) if !CUDA_CORE_GROUPS.contains(&group) => refuse(
                SPEC,
                "backend",
                format!("CUDA cores for {group} query heads to a key head"),
                "1, 2, 3, 4 or 8 of them, or FA2, which takes any",
            ),
            Some(Backend::CudaCores) if sinks => asked("CUDA cores with sinks", "FA2, which has them"),
            Some(Backend::Fa3) if kv != q => refuse(
                SPEC,
                "backend",
                format!("FA3 with {q} queries and {kv} keys"),
                "FA2: FA3 has no module of two types",
            ),
            Some(Backend::Fa3) if kind == Kind::Decode => asked(
                "FA3 for one query to a request",
                "FA2 or CUDA cores, which divide contexts; FA3 does not (paged has it)",
            ),
            _ => Ok(()),
        }
    }
}
