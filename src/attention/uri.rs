//! The names of FlashInfer's attention modules. Attention is compiled once for each combination of element types, head sizes
//! and switches, and a module's name, upstream's URI, spells its combination.
//!
//! Contract: `flashinfer/jit/attention/modules.py` and `flashinfer/jit/xqa.py` of release 0.6.3. What all modules of the
//! released wheel have alike is no part of a [`Uri`]: no position encoding in the kernel, 32-bit indices, no 16-bit
//! products of queries and keys, no profiler, no speculative decoding.
//!
//! Names nothing of the crate: xtask and the tests compile this file too.

use std::fmt;
use std::str::FromStr;

/// An element type, as names spell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Element {
    F16,
    BF16,
    E4M3,
}

impl Element {
    pub const ALL: [Self; 3] = [Self::F16, Self::BF16, Self::E4M3];

    const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::E4M3 => "e4m3",
        }
    }

    const fn is_16_bit(self) -> bool {
        matches!(self, Self::F16 | Self::BF16)
    }
}

/// The element types of queries, of keys and values, and of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Types {
    pub q: Element,
    pub kv: Element,
    pub o: Element,
}

impl Types {
    /// One type for all of them.
    pub const fn all(element: Element) -> Self {
        Self { q: element, kv: element, o: element }
    }

    /// Queries and output of 16 bits and of one type.
    fn is_16_bit_outside(self) -> bool {
        self.q == self.o && self.q.is_16_bit()
    }

    /// As above, with keys and values of that type or of 8 bits.
    fn is_usual(self) -> bool {
        self.is_16_bit_outside() && (self.kv == self.q || self.kv == Element::E4M3)
    }

    /// One 16-bit type for all of them.
    fn is_one_16_bit(self) -> bool {
        self.is_16_bit_outside() && self.kv == self.q
    }
}

/// Which kernels are compiled: those for every GPU, or those for Hopper alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Backend {
    /// FlashAttention-2: for compute capability 7.5 and above, as far as the library has them; bf16 from 8.0 on.
    Fa2,
    /// FlashAttention-3: for compute capability 9.0 alone.
    Fa3,
}

impl Backend {
    pub const ALL: [Self; 2] = [Self::Fa2, Self::Fa3];

    const fn ending(self) -> &'static str {
        match self {
            Self::Fa2 => "",
            Self::Fa3 => "_sm90",
        }
    }
}

/// What most kinds are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shape {
    pub types: Types,
    /// Elements of a head of queries and keys.
    pub head_dim_qk: u32,
    /// Elements of a head of values and of the output.
    pub head_dim_vo: u32,
    /// Whether a sliding window can be given.
    pub window: bool,
    /// Whether logits are capped.
    pub cap: bool,
}

/// What an XQA module is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Xqa {
    pub types: Types,
    /// Tokens of a page.
    pub page_size: u32,
    pub head_dim: u32,
    /// Heads of queries for each head of keys.
    pub group: u32,
    pub window: bool,
}

/// The name of an attention module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Uri {
    SingleDecode(Shape),
    BatchDecode(Shape),
    SinglePrefill(Shape, Backend),
    BatchPrefill(Shape, Backend),
    /// Batch prefill with attention sinks; heads of 64.
    Sinks {
        types: Types,
        window: bool,
        backend: Backend,
    },
    /// Multi-head latent attention: 512 elements and 64 of a rotary embedding.
    Mla {
        types: Types,
        backend: Backend,
    },
    /// Upstream's `batch_attention`: one persistent kernel for prefill and decode.
    Persistent {
        types: Types,
        head_dim: u32,
        cap: bool,
    },
    Xqa(Xqa),
}

impl Uri {
    /// The file's name.
    pub fn soname(&self) -> String {
        format!("{self}.so")
    }

    /// Whether the released wheel has it, as far as `flashinfer/aot.py` tells.
    pub fn is_released(&self) -> bool {
        const HEAD_DIMS: [u32; 3] = [64, 128, 256];
        let one = |shape: &Shape| shape.head_dim_qk == shape.head_dim_vo && HEAD_DIMS.contains(&shape.head_dim_qk);
        match self {
            Self::SingleDecode(shape)
            | Self::BatchDecode(shape)
            | Self::SinglePrefill(shape, Backend::Fa2)
            | Self::BatchPrefill(shape, Backend::Fa2) => shape.types.is_usual() && one(shape),
            Self::SinglePrefill(_, Backend::Fa3) => false,
            Self::BatchPrefill(shape, Backend::Fa3) => {
                let Shape { types, head_dim_qk, head_dim_vo, .. } = *shape;
                if types.q == Element::E4M3 {
                    types.kv == types.q && types.o.is_16_bit() && one(shape) && head_dim_qk != 64
                } else {
                    types.is_one_16_bit() && (one(shape) || (head_dim_qk, head_dim_vo) == (192, 128))
                }
            }
            Self::Sinks { types, .. } | Self::Mla { types, .. } => types.is_one_16_bit(),
            Self::Persistent { types, head_dim, .. } => types.is_16_bit_outside() && HEAD_DIMS.contains(head_dim),
            Self::Xqa(Xqa { types, page_size, head_dim, group, .. }) => {
                let pages = [16, 32, 64, 128].contains(page_size);
                types.is_usual() && pages && HEAD_DIMS.contains(head_dim) && [1, 2, 4, 8].contains(group)
            }
        }
    }
}

/// As Python writes it.
fn switch(on: bool) -> &'static str {
    if on { "True" } else { "False" }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Types {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dtype_q_{}_dtype_kv_{}_dtype_o_{}", self.q, self.kv, self.o)
    }
}

impl Shape {
    /// The end of a name, from the head sizes on.
    fn end(&self) -> String {
        let Self { head_dim_qk, head_dim_vo, window, cap, .. } = self;
        let (window, cap) = (switch(*window), switch(*cap));
        format!("head_dim_qk_{head_dim_qk}_head_dim_vo_{head_dim_vo}_posenc_0_use_swa_{window}_use_logits_cap_{cap}")
    }
}

const SINGLE_DECODE: &str = "single_decode_with_kv_cache_";
const BATCH_DECODE: &str = "batch_decode_with_kv_cache_";
const SINGLE_PREFILL: &str = "single_prefill_with_kv_cache_";
const BATCH_PREFILL: &str = "batch_prefill_with_kv_cache_";
const SINKS: &str = "batch_prefill_with_attention_sink_kv_cache_";
const MLA: &str = "batch_mla_attention_";
const PERSISTENT: &str = "batch_attention_with_kv_cache_";
const XQA: &str = "xqa_input_";

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SingleDecode(shape) => write!(f, "{SINGLE_DECODE}{}_{}", shape.types, shape.end()),
            Self::BatchDecode(shape) => write!(f, "{BATCH_DECODE}{}_dtype_idx_i32_{}", shape.types, shape.end()),
            Self::SinglePrefill(shape, backend) => {
                write!(f, "{SINGLE_PREFILL}{}_{}_f16qk_False{}", shape.types, shape.end(), backend.ending())
            }
            Self::BatchPrefill(shape, backend) => {
                let (types, end) = (shape.types, shape.end());
                write!(f, "{BATCH_PREFILL}{types}_dtype_idx_i32_{end}_f16qk_False{}", backend.ending())
            }
            Self::Sinks { types, window, backend } => {
                // Upstream's name ends with `_`, and only then comes the backend.
                let (window, ending) = (switch(*window), backend.ending());
                write!(f, "{SINKS}{types}_dtype_idx_i32_head_dim_qk_64_head_dim_vo_64_use_swa_{window}_{ending}")
            }
            Self::Mla { types, backend } => {
                let ending = backend.ending();
                write!(f, "{MLA}{types}_dtype_idx_i32_head_dim_ckv_512_head_dim_kpe_64_profiler_False{ending}")
            }
            Self::Persistent { types, head_dim, cap } => write!(
                f,
                "{PERSISTENT}{types}_dtype_idx_i32_head_dim_qk_{head_dim}_head_dim_vo_{head_dim}_posenc_0_\
                 use_logits_soft_cap_{cap}_use_profiler_false"
            ),
            Self::Xqa(Xqa { types, page_size, head_dim, group, window }) => write!(
                f,
                "{XQA}{}_kv_cache_{}_output_{}_page_size_{page_size}_head_dim_{head_dim}_head_group_ratio_{group}_\
                 use_sliding_window_{}_use_spec_dec_False_spec_q_seq_len_1",
                types.q,
                types.kv,
                types.o,
                switch(*window)
            ),
        }
    }
}

/// A text that names no module that a [`Uri`] can.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotAttention(pub String);

impl fmt::Display for NotAttention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not the name of an attention module of FlashInfer 0.6.3", self.0)
    }
}

impl std::error::Error for NotAttention {}

impl FromStr for Uri {
    type Err = NotAttention;

    fn from_str(text: &str) -> Result<Self, NotAttention> {
        let read = Rest(text).uri();
        // The same name again, or numbers are written otherwise, or something follows.
        read.filter(|uri| uri.to_string() == text).ok_or_else(|| NotAttention(text.to_owned()))
    }
}

/// What is left of a name that is being read.
struct Rest<'a>(&'a str);

impl Rest<'_> {
    fn uri(&mut self) -> Option<Uri> {
        if self.skip(SINGLE_DECODE).is_some() {
            return Some(Uri::SingleDecode(self.shape("")?));
        }
        if self.skip(BATCH_DECODE).is_some() {
            return Some(Uri::BatchDecode(self.shape(INDEX)?));
        }
        if self.skip(SINGLE_PREFILL).is_some() {
            return Some(Uri::SinglePrefill(self.shape("")?, self.prefill_end()?));
        }
        if self.skip(BATCH_PREFILL).is_some() {
            return Some(Uri::BatchPrefill(self.shape(INDEX)?, self.prefill_end()?));
        }
        if self.skip(SINKS).is_some() {
            let types = self.types()?;
            self.skip(INDEX)?;
            self.skip("_head_dim_qk_64_head_dim_vo_64_use_swa_")?;
            let window = self.switch()?;
            self.skip("_")?;
            return Some(Uri::Sinks { types, window, backend: self.backend() });
        }
        if self.skip(MLA).is_some() {
            let types = self.types()?;
            self.skip(INDEX)?;
            self.skip("_head_dim_ckv_512_head_dim_kpe_64_profiler_False")?;
            return Some(Uri::Mla { types, backend: self.backend() });
        }
        if self.skip(PERSISTENT).is_some() {
            let types = self.types()?;
            self.skip(INDEX)?;
            let head_dim = self.number("_head_dim_qk_")?;
            self.number("_head_dim_vo_")?;
            self.skip("_posenc_0_use_logits_soft_cap_")?;
            let cap = self.one_of(&[("true", true), ("false", false)])?;
            return Some(Uri::Persistent { types, head_dim, cap });
        }
        self.skip(XQA)?;
        let q = self.element("")?;
        let types = Types { q, kv: self.element("_kv_cache_")?, o: self.element("_output_")? };
        let page_size = self.number("_page_size_")?;
        let head_dim = self.number("_head_dim_")?;
        let group = self.number("_head_group_ratio_")?;
        self.skip("_use_sliding_window_")?;
        Some(Uri::Xqa(Xqa { types, page_size, head_dim, group, window: self.switch()? }))
    }

    fn shape(&mut self, index: &str) -> Option<Shape> {
        let types = self.types()?;
        self.skip(index)?;
        let head_dim_qk = self.number("_head_dim_qk_")?;
        let head_dim_vo = self.number("_head_dim_vo_")?;
        self.skip("_posenc_0_use_swa_")?;
        let window = self.switch()?;
        self.skip("_use_logits_cap_")?;
        Some(Shape { types, head_dim_qk, head_dim_vo, window, cap: self.switch()? })
    }

    fn prefill_end(&mut self) -> Option<Backend> {
        self.skip("_f16qk_False")?;
        Some(self.backend())
    }

    fn backend(&self) -> Backend {
        if self.0.is_empty() { Backend::Fa2 } else { Backend::Fa3 }
    }

    fn types(&mut self) -> Option<Types> {
        let q = self.element("dtype_q_")?;
        Some(Types { q, kv: self.element("_dtype_kv_")?, o: self.element("_dtype_o_")? })
    }

    fn element(&mut self, before: &str) -> Option<Element> {
        self.skip(before)?;
        self.one_of(&Element::ALL.map(|element| (element.name(), element)))
    }

    fn switch(&mut self) -> Option<bool> {
        self.one_of(&[switch(true), switch(false)].map(|name| (name, name == switch(true))))
    }

    fn number(&mut self, before: &str) -> Option<u32> {
        self.skip(before)?;
        let digits = self.0.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.0.len());
        let (number, rest) = self.0.split_at(digits);
        self.0 = rest;
        number.parse().ok()
    }

    fn one_of<T: Copy>(&mut self, names: &[(&str, T)]) -> Option<T> {
        names.iter().find_map(|(name, value)| self.skip(name).map(|()| *value))
    }

    fn skip(&mut self, text: &str) -> Option<()> {
        self.0 = self.0.strip_prefix(text)?;
        Some(())
    }
}

const INDEX: &str = "_dtype_idx_i32";

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Far more than there are, and all of them.
    pub fn candidates() -> Vec<Uri> {
        const SWITCH: [bool; 2] = [false, true];
        let mut all = Vec::new();
        for q in Element::ALL {
            for (kv, o) in Element::ALL.into_iter().flat_map(|kv| Element::ALL.map(|o| (kv, o))) {
                let types = Types { q, kv, o };
                for backend in Backend::ALL {
                    all.push(Uri::Mla { types, backend });
                    all.extend(SWITCH.map(|window| Uri::Sinks { types, window, backend }));
                }
                for (window, cap) in SWITCH.into_iter().flat_map(|window| SWITCH.map(|cap| (window, cap))) {
                    for (head_dim_qk, head_dim_vo) in
                        [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512)]
                    {
                        let shape = Shape { types, head_dim_qk, head_dim_vo, window, cap };
                        all.extend([Uri::SingleDecode(shape), Uri::BatchDecode(shape)]);
                        all.extend(Backend::ALL.map(|backend| Uri::SinglePrefill(shape, backend)));
                        all.extend(Backend::ALL.map(|backend| Uri::BatchPrefill(shape, backend)));
                    }
                }
                for head_dim in [64, 128, 192, 256] {
                    all.extend(SWITCH.map(|cap| Uri::Persistent { types, head_dim, cap }));
                    for (page_size, group) in
                        [8, 16, 32, 64, 128].into_iter().flat_map(|page| [1, 2, 3, 4, 8, 16].map(|group| (page, group)))
                    {
                        let xqa = |window| Uri::Xqa(Xqa { types, page_size, head_dim, group, window });
                        all.extend(SWITCH.map(xqa));
                    }
                }
            }
        }
        all
    }

    #[test]
    fn names_are_spelled_as_upstream_spells_them() {
        let bf16 = Types::all(Element::BF16);
        let shape =
            |types, head_dim| Shape { types, head_dim_qk: head_dim, head_dim_vo: head_dim, window: false, cap: false };
        let fp8 = Types { kv: Element::E4M3, ..Types::all(Element::F16) };
        for (uri, name) in [
            (
                Uri::BatchPrefill(shape(bf16, 128), Backend::Fa3),
                "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_\
                 head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False_sm90",
            ),
            (
                Uri::BatchPrefill(Shape { window: true, ..shape(fp8, 256) }, Backend::Fa2),
                "batch_prefill_with_kv_cache_dtype_q_f16_dtype_kv_e4m3_dtype_o_f16_dtype_idx_i32_head_dim_qk_256_\
                 head_dim_vo_256_posenc_0_use_swa_True_use_logits_cap_False_f16qk_False",
            ),
            (
                Uri::SinglePrefill(Shape { cap: true, ..shape(bf16, 64) }, Backend::Fa2),
                "single_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_head_dim_qk_64_head_dim_vo_64_\
                 posenc_0_use_swa_False_use_logits_cap_True_f16qk_False",
            ),
            (
                Uri::SingleDecode(shape(bf16, 128)),
                "single_decode_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_head_dim_qk_128_head_dim_vo_128_\
                 posenc_0_use_swa_False_use_logits_cap_False",
            ),
            (
                Uri::BatchDecode(shape(bf16, 128)),
                "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_\
                 head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False",
            ),
            (
                Uri::Sinks { types: bf16, window: true, backend: Backend::Fa2 },
                "batch_prefill_with_attention_sink_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_\
                 head_dim_qk_64_head_dim_vo_64_use_swa_True_",
            ),
            (
                Uri::Sinks { types: bf16, window: false, backend: Backend::Fa3 },
                "batch_prefill_with_attention_sink_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_\
                 head_dim_qk_64_head_dim_vo_64_use_swa_False__sm90",
            ),
            (
                Uri::Mla { types: bf16, backend: Backend::Fa3 },
                "batch_mla_attention_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_ckv_512_\
                 head_dim_kpe_64_profiler_False_sm90",
            ),
            (
                Uri::Persistent { types: Types { kv: Element::F16, ..bf16 }, head_dim: 64, cap: true },
                "batch_attention_with_kv_cache_dtype_q_bf16_dtype_kv_f16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_64_\
                 head_dim_vo_64_posenc_0_use_logits_soft_cap_true_use_profiler_false",
            ),
            (
                Uri::Xqa(Xqa { types: fp8, page_size: 64, head_dim: 128, group: 2, window: false }),
                "xqa_input_f16_kv_cache_e4m3_output_f16_page_size_64_head_dim_128_head_group_ratio_2_\
                 use_sliding_window_False_use_spec_dec_False_spec_q_seq_len_1",
            ),
        ] {
            assert_eq!(uri.to_string(), name);
            assert_eq!(name.parse(), Ok(uri));
            assert!(uri.is_released(), "{name}");
            assert_eq!(uri.soname(), format!("{name}.so"));
        }
    }

    #[test]
    fn every_name_is_read_back_and_is_its_own() {
        let all = candidates();
        let mut names: Vec<String> = all.iter().map(Uri::to_string).collect();
        for (uri, name) in all.iter().zip(&names) {
            assert_eq!(name.parse().as_ref(), Ok(uri), "{name}");
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len(), "two modules have one name");
    }

    #[test]
    fn as_many_are_released_as_upstream_builds_ahead_of_time() {
        let released: Vec<Uri> = candidates().into_iter().filter(Uri::is_released).collect();
        let count = |is: fn(&Uri) -> bool| released.iter().filter(|uri| is(uri)).count();
        assert_eq!(count(|uri| matches!(uri, Uri::SingleDecode(_))), 48);
        assert_eq!(count(|uri| matches!(uri, Uri::BatchDecode(_))), 48);
        assert_eq!(count(|uri| matches!(uri, Uri::SinglePrefill(_, Backend::Fa2))), 48);
        assert_eq!(count(|uri| matches!(uri, Uri::SinglePrefill(_, Backend::Fa3))), 0);
        assert_eq!(count(|uri| matches!(uri, Uri::BatchPrefill(_, Backend::Fa2))), 48);
        assert_eq!(count(|uri| matches!(uri, Uri::BatchPrefill(_, Backend::Fa3))), 48);
        assert_eq!(count(|uri| matches!(uri, Uri::Sinks { backend: Backend::Fa2, .. })), 4);
        assert_eq!(count(|uri| matches!(uri, Uri::Sinks { backend: Backend::Fa3, .. })), 4);
        assert_eq!(count(|uri| matches!(uri, Uri::Mla { backend: Backend::Fa2, .. })), 2);
        assert_eq!(count(|uri| matches!(uri, Uri::Mla { backend: Backend::Fa3, .. })), 2);
        assert_eq!(count(|uri| matches!(uri, Uri::Persistent { .. })), 36);
        assert_eq!(count(|uri| matches!(uri, Uri::Xqa(_))), 384);
        assert_eq!(released.len(), 672);
    }

    #[test]
    fn what_is_nearly_a_name_is_none() {
        let name = candidates()[100].to_string();
        assert!(name.parse::<Uri>().is_ok());
        let decode = "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_\
                      head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False";
        let persistent = "batch_attention_with_kv_cache_dtype_q_bf16_dtype_kv_f16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_64_\
                          head_dim_vo_64_posenc_0_use_logits_soft_cap_true_use_profiler_false";
        assert!([decode, persistent].iter().all(|name| name.parse::<Uri>().is_ok()));
        for wrong in [
            "",
            "norm",
            "xqa_input_",
            &decode.replace("i32", "i64"),
            &decode.replace("_128_", "_0128_"),
            &decode.replace("_qk_128", "_qk_99999999999999999999"),
            &decode.replace("posenc_0", "posenc_2"),
            &decode.replace("swa_False", "swa_false"),
            &decode.replace("kv_bf16", "kv_e5m2"),
            &decode[..decode.len() - 1],
            &format!("{decode}_sm90"),
            &format!("{decode}.so"),
            &format!("{name} "),
            &persistent.replace("vo_64", "vo_128"),
            &persistent.replace("profiler_false", "profiler_true"),
        ] {
            assert_eq!(wrong.parse::<Uri>(), Err(NotAttention(wrong.to_owned())));
        }
    }
}
