//! What a model is, read from the `config.json` that Hugging Face keeps beside its weights.

use std::fmt;
use std::path::Path;

use flashinfer_rs::RopeScaling;
use serde_json::Value;

use crate::fault::{Fault, fault};

/// The two families of dense decoders: they differ by the norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    Qwen3,
}

/// A model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub name: String,
    pub family: Family,
    pub hidden: u64,
    pub layers: u32,
    pub q_heads: u64,
    pub kv_heads: u64,
    pub head: u64,
    /// Columns between the two halves of the MLP.
    pub inner: u64,
    pub vocab: u64,
    pub eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// Whether the embedding is the last layer's weight too.
    pub tied: bool,
    /// The longest sequence that the model was made for.
    pub positions: u64,
}

impl Config {
    /// Small enough that the host is done in a second: the shape of Qwen3, with three layers.
    pub fn tiny() -> Self {
        Self {
            name: "tiny".to_owned(),
            family: Family::Qwen3,
            hidden: 64,
            layers: 3,
            q_heads: 4,
            kv_heads: 2,
            head: 16,
            inner: 96,
            vocab: 320,
            eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            tied: true,
            positions: 256,
        }
    }

    /// The shape of Qwen3-0.6B.
    pub fn qwen3_06b() -> Self {
        Self {
            name: "Qwen3-0.6B".to_owned(),
            family: Family::Qwen3,
            hidden: 1024,
            layers: 28,
            q_heads: 16,
            kv_heads: 8,
            head: 128,
            inner: 3072,
            vocab: 151_936,
            eps: 1e-6,
            rope_theta: 1_000_000.0,
            rope_scaling: RopeScaling::None,
            tied: true,
            positions: 40_960,
        }
    }

    /// The shape of Llama-3.2-1B.
    pub fn llama_32_1b() -> Self {
        Self {
            name: "Llama-3.2-1B".to_owned(),
            family: Family::Llama,
            hidden: 2048,
            layers: 16,
            q_heads: 32,
            kv_heads: 8,
            head: 64,
            inner: 8192,
            vocab: 128_256,
            eps: 1e-5,
            rope_theta: 500_000.0,
            rope_scaling: RopeScaling::Llama31 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                old_context_length: 8192.0,
            },
            tied: true,
            positions: 131_072,
        }
    }

    /// A model by the name of a shape that is built in, or by the path of its `config.json` or of the folder with it.
    pub fn of(name: &str) -> Result<Self, Fault> {
        match name {
            "tiny" => Ok(Self::tiny()),
            "qwen3-0.6b" => Ok(Self::qwen3_06b()),
            "llama-3.2-1b" => Ok(Self::llama_32_1b()),
            path => Self::read(Path::new(path)),
        }
    }

    fn read(path: &Path) -> Result<Self, Fault> {
        let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let text = std::fs::read_to_string(&path).map_err(|error| {
            fault(format!(
                "reading {} failed: {error}; name a config.json, the folder of a model, or one of the shapes tiny, qwen3-0.6b \
                 and llama-3.2-1b",
                path.display()
            ))
        })?;
        Self::parse(&text).map_err(|error| fault(format!("{}: {error}", path.display())))
    }

    /// Reads the text of a `config.json`, of transformers 4 or 5.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let json: Value = serde_json::from_str(text)
            .map_err(|error| fault(format!("it is no JSON: {error}; fetch the model's config.json anew")))?;
        let fields = Fields(&json);
        let family = match fields.text("model_type")? {
            "llama" => Family::Llama,
            "qwen3" => Family::Qwen3,
            other => {
                return Err(refuse("model_type", other, "llama or qwen3", "other families need a graph of their own"));
            }
        };
        for (name, without) in [("attention_bias", "false"), ("mlp_bias", "false"), ("use_sliding_window", "false")] {
            if fields.get(name).is_some_and(|value| value != &Value::Bool(false)) {
                let found = &fields.0[name];
                return Err(refuse(name, found, without, "this example's graph has no such thing; add it in graph.rs"));
            }
        }
        if let Some(found) = fields.get("quantization_config") {
            return Err(refuse("quantization_config", found, "none", "take the model's weights in bf16"));
        }
        if fields.get("hidden_act").is_some_and(|found| found != "silu") {
            return Err(refuse(
                "hidden_act",
                &fields.0["hidden_act"],
                "\"silu\"",
                "other activations need another graph",
            ));
        }
        let (hidden, q_heads) = (fields.size("hidden_size")?, fields.size("num_attention_heads")?);
        let head = match fields.get("head_dim") {
            Some(_) => fields.size("head_dim")?,
            None if hidden.is_multiple_of(q_heads) => hidden / q_heads,
            None => {
                return Err(refuse(
                    "head_dim",
                    "none",
                    "a size, since the heads do not divide the hidden size",
                    "add it",
                ));
            }
        };
        let kv_heads =
            if fields.get("num_key_value_heads").is_some() { fields.size("num_key_value_heads")? } else { q_heads };
        if !q_heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads, {q_heads}");
            return Err(refuse("num_key_value_heads", kv_heads, &expected, "fetch the model's config.json anew"));
        }
        let (rope_theta, rope_scaling) = rope(&fields)?;
        let config = Self {
            name: format!("{} of {hidden} columns", fields.text("model_type")?),
            family,
            hidden,
            layers: u32::try_from(fields.size("num_hidden_layers")?).unwrap_or(u32::MAX),
            q_heads,
            kv_heads,
            head,
            inner: fields.size("intermediate_size")?,
            vocab: fields.size("vocab_size")?,
            eps: fields.number("rms_norm_eps")?,
            rope_theta,
            rope_scaling,
            tied: fields.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
            positions: fields.size("max_position_embeddings")?,
        };
        if config.layers > 1000 {
            return Err(refuse(
                "num_hidden_layers",
                config.layers,
                "at most 1000",
                "fetch the model's config.json anew",
            ));
        }
        Ok(config)
    }

    pub fn q_width(&self) -> u64 {
        self.q_heads * self.head
    }

    pub fn kv_width(&self) -> u64 {
        self.kv_heads * self.head
    }

    /// Keys and values of one token.
    pub fn kv_numbers(&self) -> u64 {
        2 * u64::from(self.layers) * self.kv_width()
    }

    /// How many numbers a step reads of the weights: all of them, but the embedding's where that is a weight of its own.
    pub fn parameters(&self) -> u64 {
        let (q, kv) = (self.q_width(), self.kv_width());
        let norms = 2 * self.hidden + if self.family == Family::Qwen3 { 2 * self.head } else { 0 };
        let layer = self.hidden * (2 * q + 2 * kv + 3 * self.inner) + norms;
        u64::from(self.layers) * layer + self.vocab * self.hidden + self.hidden
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, layers, hidden, q_heads, kv_heads, head, inner, vocab, .. } = self;
        write!(
            f,
            "{name}: {layers} layers of {hidden} columns, {q_heads} heads of queries and {kv_heads} of keys of {head}, {inner} in the \
             MLP, {vocab} tokens"
        )
    }
}

/// The base of the angles, and how they are scaled: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of
/// transformers 4.
fn rope(fields: &Fields<'_>) -> Result<(f64, RopeScaling), Fault> {
    let parameters = fields.get("rope_parameters").or_else(|| fields.get("rope_scaling"));
    let of = parameters.map(Fields);
    let theta = match (&of, fields.get("rope_theta")) {
        (_, Some(_)) => fields.number("rope_theta")?,
        (Some(of), None) if of.get("rope_theta").is_some() => of.number("rope_theta")?,
        // What transformers takes for both families.
        _ => 10_000.0,
    };
    let Some(of) = of else { return Ok((theta, RopeScaling::None)) };
    let kind = of.get("rope_type").or_else(|| of.get("type")).and_then(Value::as_str).unwrap_or("default");
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: of.number("factor")? },
        "llama3" => RopeScaling::Llama31 {
            factor: of.number("factor")?,
            low_freq_factor: of.number("low_freq_factor")?,
            high_freq_factor: of.number("high_freq_factor")?,
            old_context_length: of.number("original_max_position_embeddings")?,
        },
        other => return Err(refuse("rope_type", other, "default, linear or llama3", "add its angles in config.rs")),
    };
    Ok((theta, scaling))
}

struct Fields<'a>(&'a Value);

impl<'a> Fields<'a> {
    /// A field that is there and not null.
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn need(&self, name: &str, expected: &str) -> Result<&'a Value, Fault> {
        self.get(name).ok_or_else(|| refuse(name, "nothing", expected, "fetch the model's config.json anew"))
    }

    fn text(&self, name: &str) -> Result<&'a str, Fault> {
        let found = self.need(name, "a text")?;
        found.as_str().ok_or_else(|| refuse(name, found, "a text", "fetch the model's config.json anew"))
    }

    fn number(&self, name: &str) -> Result<f64, Fault> {
        let found = self.need(name, "a number")?;
        let number = found.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        number.ok_or_else(|| refuse(name, found, "a number above 0", "fetch the model's config.json anew"))
    }

    /// Small enough that products of three of them fit 64 bits.
    fn size(&self, name: &str) -> Result<u64, Fault> {
        let expected = "a whole number from 1 to 1048576";
        let found = self.need(name, expected)?;
        let size = found.as_u64().filter(|size| (1..=1 << 20).contains(size));
        size.ok_or_else(|| refuse(name, found, expected, "fetch the model's config.json anew"))
    }
}

fn refuse(name: &str, found: impl fmt::Display, expected: &str, remedy: &str) -> Fault {
    fault(format!("{name} is {found}, expected {expected}; {remedy}"))
}
