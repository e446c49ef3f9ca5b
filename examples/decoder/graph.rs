//! A model as a compute graph: one operation for each thing that it does, with Hugging Face's names of its weights. Rules fuse it.

use flashinfer_rs::compute::{Columns, Dim, Graph, GraphBuilder, Pad, PageAllocator, Rule, Target};
use flashinfer_rs::{DType, Result};

use crate::config::{Config, Family};

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const LM_HEAD: &str = "lm_head.weight";
/// The only weight that no file has: it is computed of the configuration.
pub const COS_SIN: &str = "cos_sin";

/// The output that holds what a layer left in the residual stream, where the options ask for it.
pub fn residual(layer: u32) -> String {
    format!("residual.{layer}")
}

/// What is decided beside the model.
#[derive(Debug, Clone)]
pub struct Options {
    pub target: Target,
    pub dtype: DType,
    /// The largest batch.
    pub rows: u64,
    /// Tokens of a page.
    pub page_size: u64,
    /// Pages that one row may have.
    pub pages_per_row: u64,
    /// Rows that have pages of their own; the others of a batch share theirs, or are padding.
    pub sequences: u64,
    pub rules: Vec<Rule>,
    /// Without, the likeliest token.
    pub sampling: Option<Sampling>,
    /// Whether what each layer leaves in the residual stream is an output too.
    pub residuals: bool,
}

/// How tokens are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    pub temperature: f64,
    /// Of so many likeliest; 0 is all.
    pub top_k: u32,
    /// Of the likeliest that sum to so much; 0 is all.
    pub top_p: f64,
}

impl Options {
    pub fn pages(&self) -> u64 {
        // One is nobody's.
        1 + self.sequences * self.pages_per_row
    }

    pub fn positions(&self) -> u64 {
        self.page_size * self.pages_per_row
    }

    pub fn allocator(&self) -> PageAllocator {
        let pages = u32::try_from(self.pages()).unwrap_or(u32::MAX);
        PageAllocator::new(pages, self.page_size, self.sequences as usize, self.pages_per_row)
    }
}

/// The model's step: ids, positions, lengths and page table in; a token and its logits out; the next step's inputs made.
pub fn build(config: &Config, options: &Options) -> Result<Graph> {
    let (fixed, dtype, hidden) = (Dim::fixed, options.dtype, config.hidden);
    let (q_width, kv_width) = (config.q_width(), config.kv_width());
    let q_heads = Columns::new(0..q_width).heads(config.q_heads);
    let kv_heads = Columns::new(0..kv_width).heads(config.kv_heads);
    let mut g = GraphBuilder::for_target(&config.name, options.rows, options.target);
    let mut ids = g.input("ids", DType::I32, [Dim::BATCH], Pad::Value(0))?;
    let mut positions = g.input("positions", DType::I32, [Dim::BATCH], Pad::Value(0))?;
    let mut lengths = g.input("lengths", DType::I32, [Dim::BATCH], Pad::Value(1))?;
    let pages = Pad::Reserved(PageAllocator::RESERVED);
    let table = g.input("page_table", DType::I32, [Dim::BATCH, fixed(options.pages_per_row)], pages)?;
    let embedding = g.weight(EMBEDDING, dtype, [fixed(config.vocab), fixed(hidden)])?;
    let cos_sin = g.weight(COS_SIN, DType::F32, [fixed(options.positions()), fixed(config.head)])?;

    let mut residual = g.embedding(&ids, &embedding, 1.0)?;
    for layer in 0..config.layers {
        g.layer(Some(layer));
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let matrix = |g: &mut GraphBuilder, part: &str, rows, columns| {
            g.weight(&name(&format!("{part}.weight")), dtype, [fixed(rows), fixed(columns)])
        };
        let vector =
            |g: &mut GraphBuilder, part: &str, size| g.weight(&name(&format!("{part}.weight")), dtype, [fixed(size)]);
        let cache = [fixed(options.pages()), fixed(options.page_size), fixed(config.kv_heads), fixed(config.head)];
        let mut keys = g.state(&name("keys"), dtype, cache)?;
        let mut values = g.state(&name("values"), dtype, cache)?;

        let norm = vector(&mut g, "input_layernorm", hidden)?;
        let w_q = matrix(&mut g, "self_attn.q_proj", q_width, hidden)?;
        let w_k = matrix(&mut g, "self_attn.k_proj", kv_width, hidden)?;
        let w_v = matrix(&mut g, "self_attn.v_proj", kv_width, hidden)?;
        let x = g.rmsnorm(&residual, &norm, config.eps)?;
        let (mut q, mut k, v) = (g.matmul(&x, &w_q)?, g.matmul(&x, &w_k)?, g.matmul(&x, &w_v)?);
        if config.family == Family::Qwen3 {
            let q_norm = vector(&mut g, "self_attn.q_norm", config.head)?;
            let k_norm = vector(&mut g, "self_attn.k_norm", config.head)?;
            q = g.head_rmsnorm(q, q_heads, &q_norm, config.eps)?;
            k = g.head_rmsnorm(k, kv_heads, &k_norm, config.eps)?;
        }
        let (q, k) = g.rope_apart((q, q_heads), (k, kv_heads), &cos_sin, &positions, false)?;
        g.append((k.columns(kv_heads), v.columns(kv_heads)), &positions, &table, (&mut keys, &mut values))?;
        let scale = 1.0 / (config.head as f64).sqrt();
        let attended = g.decode_attention(q.columns(q_heads), (&keys, &values), &table, &lengths, scale)?;
        let w_o = matrix(&mut g, "self_attn.o_proj", hidden, q_width)?;
        let projected = g.matmul(&attended, &w_o)?;
        residual = g.add(residual, &projected)?;

        let norm = vector(&mut g, "post_attention_layernorm", hidden)?;
        let w_gate = matrix(&mut g, "mlp.gate_proj", config.inner, hidden)?;
        let w_up = matrix(&mut g, "mlp.up_proj", config.inner, hidden)?;
        let w_down = matrix(&mut g, "mlp.down_proj", hidden, config.inner)?;
        let x = g.rmsnorm(&residual, &norm, config.eps)?;
        let (gate, up) = (g.matmul(&x, &w_gate)?, g.matmul(&x, &w_up)?);
        let gate = g.silu(gate)?;
        let gated = g.mul(gate, &up)?;
        let down = g.matmul(&gated, &w_down)?;
        residual = g.add(residual, &down)?;
        if options.residuals {
            // The stream itself is overwritten by the next layer.
            let copy = g.copy(&residual, dtype)?;
            g.output(&self::residual(layer), copy)?;
        }
    }
    g.layer(None);
    let norm = g.weight("model.norm.weight", dtype, [fixed(hidden)])?;
    let x = g.rmsnorm(&residual, &norm, config.eps)?;
    let head = if config.tied { None } else { Some(g.weight(LM_HEAD, dtype, [fixed(config.vocab), fixed(hidden)])?) };
    let logits = g.matmul_f32(&x, head.as_ref().unwrap_or(&embedding))?;
    let token = match options.sampling {
        None => g.argmax(&logits)?,
        Some(Sampling { temperature, top_k, top_p }) => {
            let number = g.input("number", DType::F32, [Dim::BATCH], Pad::Value(0))?;
            let scores = g.copy(&logits, DType::F32)?;
            let probabilities = g.softmax(scores, temperature)?;
            g.sample(&probabilities, &number, top_k, top_p)?
        }
    };
    let capacity = u32::try_from(options.positions()).unwrap_or(u32::MAX);
    g.advance(&token, &mut ids, &mut positions, &mut lengths, capacity)?;
    g.output("token", token)?;
    g.output("logits", logits)?;
    g.finish()
}

/// A list of rules, by words: `all`, `none`, or some of `pack`, `gated`, `residual`, `gate`, `norm`, `add` and `qk`; with a minus ahead of
/// each, all but those. With `step`, or `step` and a comma ahead of these, `attention` is one more of all.
pub fn rules(words: &str) -> Option<Vec<Rule>> {
    const NAMES: [(&str, Rule); 8] = [
        ("pack", Rule::PackProducts),
        ("gated", Rule::GatedActivation),
        ("residual", Rule::ResidualProduct),
        ("gate", Rule::GatedProduct),
        ("norm", Rule::NormProduct),
        ("add", Rule::AddNorm),
        ("qk", Rule::QkNormRopeAppend),
        ("attention", Rule::AppendAttention),
    ];
    let of = |word: &str| NAMES.iter().find(|(name, _)| *name == word).map(|(_, rule)| *rule);
    if words == "step" {
        return Some(Rule::STEP.to_vec());
    }
    let (every, words) = match words.strip_prefix("step,") {
        Some(words) => (&Rule::STEP[..], words),
        None => (&Rule::ALL[..], words),
    };
    let (wanted, words) = match words {
        "all" => return Some(every.to_vec()),
        "none" => return Some(Vec::new()),
        _ if words.starts_with('-') => {
            (false, words.split(',').map(|word| word.strip_prefix('-').and_then(of)).collect::<Option<Vec<_>>>()?)
        }
        _ => (true, words.split(',').map(of).collect::<Option<Vec<_>>>()?),
    };
    Some(every.iter().copied().filter(|rule| words.contains(rule) == wanted).collect())
}
