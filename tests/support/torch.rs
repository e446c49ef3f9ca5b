//! Results beside torch's scaled_dot_product_attention: written as safetensors, compared by sdpa.py.

use std::path::Path;
use std::process::{Command, Stdio};

use flashinfer_rs::bench::{DataType, HostTensor, write_safetensors};
use flashinfer_rs::{DType, Element};

/// Attention that was computed, of requests one after the other.
pub struct Computed<'a, T> {
    /// Query heads, key heads, and the size of a head.
    pub heads: (i64, i64),
    pub size: i64,
    pub causal: bool,
    pub scale: f64,
    /// The queries and the keys of each request.
    pub requests: &'a [(i64, i64)],
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub o: &'a [T],
    pub lse: &'a [f32],
}

fn bytes<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: elements are plain numbers, without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn tensor<T: Element>(values: &[T], shape: &[i64]) -> HostTensor {
    let dtype = match T::DTYPE {
        DType::BF16 => DataType::Bfloat16,
        DType::F16 => DataType::Float16,
        DType::F32 => DataType::Float32,
        DType::F64 => DataType::Float64,
        DType::I64 => DataType::Int64,
        other => panic!("no tensor of {other} is written"),
    };
    let shape: Vec<u64> = shape.iter().map(|size| *size as u64).collect();
    HostTensor::from_bytes(dtype, &shape, bytes(values)).unwrap()
}

impl<T: Element> Computed<'_, T> {
    pub fn write(&self, to: &Path) {
        let Self { heads: (q_heads, kv_heads), size, requests, .. } = *self;
        let (queries, keys): (Vec<i64>, Vec<i64>) = requests.iter().copied().unzip();
        let (rows, tokens) = (queries.iter().sum::<i64>(), keys.iter().sum::<i64>());
        let facts = [f64::from(u8::from(self.causal)), self.scale];
        let count = [requests.len() as i64];
        let tensors = [
            ("q", tensor(self.q, &[rows, q_heads, size])),
            ("k", tensor(self.k, &[tokens, kv_heads, size])),
            ("v", tensor(self.v, &[tokens, kv_heads, size])),
            ("o", tensor(self.o, &[rows, q_heads, size])),
            ("lse", tensor(self.lse, &[rows, q_heads])),
            ("queries", tensor(&queries, &count)),
            ("keys", tensor(&keys, &count)),
            ("facts", tensor(&facts, &[2])),
        ];
        let named: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        write_safetensors(to, &named).unwrap();
    }
}

/// Whether `python3` has torch.
pub fn is_there() -> bool {
    let python =
        Command::new("python3").args(["-c", "import torch"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    python.is_ok_and(|status| status.success())
}

/// Fails where torch computes something else.
pub fn compare(files: &[&Path]) {
    let script = include_str!("sdpa.py");
    let output = Command::new("python3").args(["-c", script]).args(files).output().expect("python3 starts");
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{said}");
    print!("{said}");
}
