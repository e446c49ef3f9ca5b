//! Dense decoders as graphs, and the same in plain loops.
#![allow(dead_code, reason = "each test uses its own part")]

use flashinfer_rs::compute::{Columns, Dim, Graph, GraphBuilder, HostRun, Pad, PageAllocator, Target};
use flashinfer_rs::{DType, Result};

/// A model of the Llama or Qwen3 family, and its cache.
#[derive(Clone, Copy)]
pub struct Config {
    pub layers: u32,
    pub hidden: u64,
    pub q_heads: u64,
    pub kv_heads: u64,
    pub head: u64,
    pub inner: u64,
    pub vocab: u64,
    pub qk_norm: bool,
    pub page_size: u64,
    /// Pages of the cache, and of a row.
    pub pages: u64,
    pub per_row: u64,
    pub dtype: DType,
    pub target: Target,
}

pub const QWEN3_06B: Config = Config {
    layers: 28,
    hidden: 1024,
    q_heads: 16,
    kv_heads: 8,
    head: 128,
    inner: 3072,
    vocab: 151_936,
    qk_norm: true,
    page_size: 64,
    pages: 1 + 32 * 18,
    per_row: 18,
    dtype: DType::BF16,
    target: Target::Gpu,
};

pub const LLAMA_32_1B: Config = Config {
    layers: 16,
    hidden: 2048,
    q_heads: 32,
    kv_heads: 8,
    head: 64,
    inner: 8192,
    vocab: 128_256,
    qk_norm: false,
    ..QWEN3_06B
};

pub const TINY: Config = Config {
    layers: 3,
    hidden: 32,
    q_heads: 4,
    kv_heads: 2,
    head: 8,
    inner: 48,
    vocab: 40,
    qk_norm: true,
    page_size: 4,
    pages: 1 + 4 * 3,
    per_row: 3,
    dtype: DType::F32,
    target: Target::Host,
};

pub const EPS: f64 = 1e-6;

impl Config {
    fn positions(&self) -> u64 {
        self.page_size * self.per_row
    }

    fn scale(&self) -> f64 {
        1.0 / (self.head as f64).sqrt()
    }

    /// The model with an operation for each thing that it does.
    pub fn graph(&self, largest: u64) -> Result<Graph> {
        let (fixed, dtype) = (Dim::fixed, self.dtype);
        let (q_width, kv_width) = (self.q_heads * self.head, self.kv_heads * self.head);
        let (q_columns, kv_columns) =
            (Columns::new(0..q_width).heads(self.q_heads), Columns::new(0..kv_width).heads(self.kv_heads));
        let mut g = GraphBuilder::for_target("decoder", largest, self.target);
        let mut ids = g.input("ids", DType::I32, [Dim::BATCH], Pad::Value(0))?;
        let mut positions = g.input("positions", DType::I32, [Dim::BATCH], Pad::Value(0))?;
        let mut lengths = g.input("lengths", DType::I32, [Dim::BATCH], Pad::Value(1))?;
        let table = g.input("page_table", DType::I32, [Dim::BATCH, fixed(self.per_row)], Pad::Reserved(0))?;
        let embedding = g.weight("embedding", dtype, [fixed(self.vocab), fixed(self.hidden)])?;
        let cos_sin = g.weight("cos_sin", DType::F32, [fixed(self.positions()), fixed(self.head)])?;
        let mut hidden = g.embedding(&ids, &embedding, 1.0)?;
        for layer in 0..self.layers {
            g.layer(Some(layer));
            let name = |part: &str| format!("layer{layer}.{part}");
            let square = |rows, columns| [fixed(rows), fixed(columns)];
            let attention_norm = g.weight(&name("attention_norm"), dtype, [fixed(self.hidden)])?;
            let wq = g.weight(&name("q"), dtype, square(q_width, self.hidden))?;
            let wk = g.weight(&name("k"), dtype, square(kv_width, self.hidden))?;
            let wv = g.weight(&name("v"), dtype, square(kv_width, self.hidden))?;
            let wo = g.weight(&name("o"), dtype, square(self.hidden, q_width))?;
            let mlp_norm = g.weight(&name("mlp_norm"), dtype, [fixed(self.hidden)])?;
            let wg = g.weight(&name("gate"), dtype, square(self.inner, self.hidden))?;
            let wu = g.weight(&name("up"), dtype, square(self.inner, self.hidden))?;
            let wd = g.weight(&name("down"), dtype, square(self.hidden, self.inner))?;
            let cache = [fixed(self.pages), fixed(self.page_size), fixed(self.kv_heads), fixed(self.head)];
            let mut k_cache = g.state(&name("k_cache"), dtype, cache)?;
            let mut v_cache = g.state(&name("v_cache"), dtype, cache)?;

            let normed = g.rmsnorm(&hidden, &attention_norm, EPS)?;
            let mut q = g.matmul(&normed, &wq)?;
            let mut k = g.matmul(&normed, &wk)?;
            let v = g.matmul(&normed, &wv)?;
            if self.qk_norm {
                let q_norm = g.weight(&name("q_norm"), dtype, [fixed(self.head)])?;
                let k_norm = g.weight(&name("k_norm"), dtype, [fixed(self.head)])?;
                q = g.head_rmsnorm(q, q_columns, &q_norm, EPS)?;
                k = g.head_rmsnorm(k, kv_columns, &k_norm, EPS)?;
            }
            let (q, k) = g.rope_apart((q, q_columns), (k, kv_columns), &cos_sin, &positions, false)?;
            let written = (k.columns(kv_columns), v.columns(kv_columns));
            g.append(written, &positions, &table, (&mut k_cache, &mut v_cache))?;
            let attended =
                g.decode_attention(q.columns(q_columns), (&k_cache, &v_cache), &table, &lengths, self.scale())?;
            let projected = g.matmul(&attended, &wo)?;
            hidden = g.add(hidden, &projected)?;
            let normed = g.rmsnorm(&hidden, &mlp_norm, EPS)?;
            let gate = g.matmul(&normed, &wg)?;
            let up = g.matmul(&normed, &wu)?;
            let gate = g.silu(gate)?;
            let gated = g.mul(gate, &up)?;
            let down = g.matmul(&gated, &wd)?;
            hidden = g.add(hidden, &down)?;
        }
        g.layer(None);
        let norm = g.weight("norm", dtype, [fixed(self.hidden)])?;
        let normed = g.rmsnorm(&hidden, &norm, EPS)?;
        let logits = g.matmul_f32(&normed, &embedding)?;
        let token = g.argmax(&logits)?;
        g.advance(&token, &mut ids, &mut positions, &mut lengths, self.positions() as u32)?;
        g.output("token", token)?;
        g.output("logits", logits)?;
        g.finish()
    }

    /// Weights by their names.
    pub fn weights(&self, seed: u64) -> Vec<(String, Vec<f64>)> {
        let mut random = Random(seed);
        let (q_width, kv_width) = (self.q_heads * self.head, self.kv_heads * self.head);
        let mut weights = Vec::new();
        let mut add = |name: String, count: u64, mean: f64, spread: f64| {
            weights.push((name, random.numbers(count as usize, mean, spread)));
        };
        add("embedding".to_owned(), self.vocab * self.hidden, 0.0, 1.0);
        add("norm".to_owned(), self.hidden, 1.0, 0.2);
        let spread = 1.0 / (self.hidden as f64).sqrt();
        for layer in 0..self.layers {
            let mut add = |part: &str, count, mean, spread| add(format!("layer{layer}.{part}"), count, mean, spread);
            add("attention_norm", self.hidden, 1.0, 0.2);
            add("q", q_width * self.hidden, 0.0, 2.0 * spread);
            add("k", kv_width * self.hidden, 0.0, 2.0 * spread);
            add("v", kv_width * self.hidden, 0.0, 2.0 * spread);
            add("o", q_width * self.hidden, 0.0, 2.0 * spread);
            add("mlp_norm", self.hidden, 1.0, 0.2);
            add("gate", self.inner * self.hidden, 0.0, 2.0 * spread);
            add("up", self.inner * self.hidden, 0.0, 2.0 * spread);
            add("down", self.inner * self.hidden, 0.0, 2.0 * spread);
            if self.qk_norm {
                add("q_norm", self.head, 1.0, 0.2);
                add("k_norm", self.head, 1.0, 0.2);
            }
        }
        weights
    }

    /// Cosines and sines, as the kernels take them.
    pub fn cos_sin(&self) -> Vec<f64> {
        let half = self.head / 2;
        let angle = |position: u64, i: u64| position as f64 * 10_000f64.powf(-2.0 * i as f64 / self.head as f64);
        (0..self.positions())
            .flat_map(|position| {
                let cos = (0..half).map(move |i| angle(position, i).cos());
                cos.chain((0..half).map(move |i| angle(position, i).sin())).collect::<Vec<_>>()
            })
            .collect()
    }

    /// Gives a run all that it wants but the step's inputs.
    pub fn give(&self, run: &mut HostRun<'_>, seed: u64) -> Result<()> {
        for (name, values) in self.weights(seed) {
            run.weight(&name, &values)?;
        }
        run.weight("cos_sin", &self.cos_sin())
    }

    /// Gives a run the first step's inputs: these ids, and rows behind them that nobody asked for.
    pub fn begin(&self, run: &mut HostRun<'_>, ids: &[f64], bucket: u64) -> Result<()> {
        let mut pages = PageAllocator::new(self.pages as u32, self.page_size, bucket as usize, self.per_row);
        for row in 0..ids.len() {
            pages.grow(row, self.positions())?;
        }
        let mut ids = ids.to_vec();
        ids.resize(bucket as usize, 0.0);
        let table: Vec<f64> = pages.table(bucket as usize).into_iter().map(f64::from).collect();
        run.input("ids", &ids)?;
        run.input("positions", &vec![0.0; bucket as usize])?;
        run.input("lengths", &vec![1.0; bucket as usize])?;
        run.input("page_table", &table)
    }

    /// The logits of a sequence's last token, in plain loops and f64: no graph, no pages.
    pub fn logits(&self, seed: u64, tokens: &[usize]) -> Vec<f64> {
        let weights: std::collections::HashMap<_, _> = self.weights(seed).into_iter().collect();
        let of = |layer: u32, part: &str| &weights[&format!("layer{layer}.{part}")][..];
        let (hidden, head) = (self.hidden as usize, self.head as usize);
        let norm = |x: &[f64], w: &[f64]| -> Vec<f64> {
            let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            x.iter().zip(w).map(|(x, w)| x / (square + EPS).sqrt() * w).collect()
        };
        let product = |x: &[f64], w: &[f64]| -> Vec<f64> {
            w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
        };
        let plus = |x: &mut [f64], y: &[f64]| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        let turn = |x: &mut [f64], position: usize| {
            for head in x.chunks_exact_mut(head) {
                let half = head.len() / 2;
                for i in 0..half {
                    let angle = position as f64 * 10_000f64.powf(-(i as f64) / half as f64);
                    let (a, b) = (head[i], head[i + half]);
                    (head[i], head[i + half]) = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
                }
            }
        };
        let heads = |x: Vec<f64>, w: &[f64]| -> Vec<f64> { x.chunks_exact(head).flat_map(|x| norm(x, w)).collect() };
        let mut states: Vec<Vec<f64>> =
            tokens.iter().map(|t| weights["embedding"][t * hidden..(t + 1) * hidden].to_vec()).collect();
        for layer in 0..self.layers {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (position, state) in states.iter_mut().enumerate() {
                let x = norm(state, of(layer, "attention_norm"));
                let (mut q, mut k) = (product(&x, of(layer, "q")), product(&x, of(layer, "k")));
                if self.qk_norm {
                    (q, k) = (heads(q, of(layer, "q_norm")), heads(k, of(layer, "k_norm")));
                }
                turn(&mut q, position);
                turn(&mut k, position);
                keys.push(k);
                values.push(product(&x, of(layer, "v")));
                let group = (self.q_heads / self.kv_heads) as usize;
                let mut attended = Vec::new();
                for (i, q) in q.chunks_exact(head).enumerate() {
                    let own = i / group * head..(i / group + 1) * head;
                    let scores = keys.iter().map(|k| {
                        let dot: f64 = k[own.clone()].iter().zip(q).map(|(k, q)| k * q).sum();
                        (dot * self.scale()).exp()
                    });
                    let scores: Vec<f64> = scores.collect();
                    let total: f64 = scores.iter().sum();
                    let mut out = vec![0.0; head];
                    for (score, v) in scores.iter().zip(&values) {
                        out.iter_mut()
                            .zip(&v[own.clone()])
                            .for_each(|(o, v): (&mut f64, &f64)| *o += score / total * v);
                    }
                    attended.extend(out);
                }
                plus(state, &product(&attended, of(layer, "o")));
                let x = norm(state, of(layer, "mlp_norm"));
                let gate = product(&x, of(layer, "gate")).into_iter().map(|g| g / (1.0 + (-g).exp()));
                let gated: Vec<f64> = gate.zip(product(&x, of(layer, "up"))).map(|(g, u)| g * u).collect();
                plus(state, &product(&gated, of(layer, "down")));
            }
        }
        product(&norm(&states[tokens.len() - 1], &weights["norm"]), &weights["embedding"])
    }
}

/// Numbers without a pattern.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    pub fn numbers(&mut self, count: usize, mean: f64, spread: f64) -> Vec<f64> {
        let number = |x: u64| mean + spread * ((x >> 11) as f64 / (1u64 << 52) as f64 - 1.0);
        (0..count).map(|_| number(self.next())).collect()
    }
}
