//! Weights: of safetensors files by Hugging Face's names, or random ones by a seed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flashinfer_rs::compute::{DataType, Graph, HostTensor, Origin, Safetensors, Tensor};
use flashinfer_rs::{CosSinCache, DType};

use crate::config::Config;
use crate::fault::{Fault, fault};
use crate::graph::{COS_SIN, EMBEDDING, LM_HEAD};

/// The standard deviation that transformers begins with (`initializer_range`).
const SPREAD: f64 = 0.02;

/// Where weights come from.
pub enum Source {
    /// Files, and which of them has a name.
    Files { files: Vec<Safetensors>, of: BTreeMap<String, usize> },
    /// Normal numbers of a seed, and ones for norms.
    Random { seed: u64, numbers: Vec<f32> },
}

/// What is wrong on purpose, to see that a gate turns red.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// Cosines stand where sines belong.
    RopeHalves,
    /// The last product of the first layer's attention has its weight transposed.
    Transposed,
    /// The first layer has the second's first norm.
    AnotherLayersNorm,
}

const FIRST_NORM: &str = "model.layers.0.input_layernorm.weight";
const FIRST_O: &str = "model.layers.0.self_attn.o_proj.weight";
const SPOILED: [&str; 3] = [COS_SIN, FIRST_NORM, FIRST_O];

impl Source {
    /// Random weights by a seed.
    pub fn random(seed: u64) -> Self {
        let mut random = Random(0x6E6F_726D_616C);
        // Two normal numbers of two uniform ones (Box and Muller). Every weight is one of these: 65,536 differ enough.
        let pair = |_| {
            let (radius, angle) = ((-2.0 * random.uniform().ln()).sqrt(), std::f64::consts::TAU * random.uniform());
            [(SPREAD * radius * angle.cos()) as f32, (SPREAD * radius * angle.sin()) as f32]
        };
        Self::Random { seed, numbers: (0..1 << 15).flat_map(pair).collect() }
    }

    /// A safetensors file, or a folder with `model.safetensors` or with an index of several files.
    pub fn open(path: &Path) -> Result<Self, Fault> {
        let single = if path.is_dir() { path.join("model.safetensors") } else { path.to_owned() };
        let index = path.join("model.safetensors.index.json");
        let paths: Vec<PathBuf> = if path.is_dir() && !single.exists() && index.exists() {
            indexed(path, &index)?
        } else if single.exists() {
            vec![single]
        } else {
            return Err(fault(format!(
                "there is no {}; name a file of weights, or a folder with model.safetensors or its index, or leave --weights \
                 away for random ones",
                single.display()
            )));
        };
        let files = paths.iter().map(Safetensors::open).collect::<Result<Vec<_>, _>>()?;
        let names = files.iter().enumerate().flat_map(|(i, file)| file.names().map(move |name| (name.to_owned(), i)));
        let of = names.collect();
        Ok(Self::Files { files, of })
    }

    fn read(&self, name: &str, shape: &[u64], config: &Config) -> Result<HostTensor, Fault> {
        match self {
            Self::Random { seed, numbers } => Ok(random(name, shape, *seed, numbers)?),
            Self::Files { files, of } => {
                let Some(&file) = of.get(name) else {
                    let remedy = match name {
                        LM_HEAD => "or does its config.json want `tie_word_embeddings: true`?",
                        EMBEDDING => "are these weights without the head, whose names begin with `model.`?",
                        _ => "is this the model of that config.json, in Hugging Face's names?",
                    };
                    let (count, first) = (of.len(), of.keys().next().map_or("none", String::as_str));
                    return Err(fault(format!(
                        "the weights have no {name}, of shape {shape:?}, which {} has; they have {count} tensors, the first is \
                         {first}; {remedy}",
                        config.name
                    )));
                };
                let file = &files[file];
                let (dtype, found) = file.form(name).ok_or_else(|| fault(format!("{name} is gone from its file")))?;
                if found != shape {
                    return Err(fault(format!(
                        "{name} in {} has the shape {found:?}, expected {shape:?}; take the config.json of the same model",
                        file.path().display()
                    )));
                }
                if !matches!(dtype, DataType::Bfloat16 | DataType::Float16 | DataType::Float32) {
                    return Err(fault(format!(
                        "{name} in {} is {dtype}, expected bfloat16, float16 or float32; take weights that are not quantized",
                        file.path().display()
                    )));
                }
                Ok(file.read(name)?)
            }
        }
    }

    /// Hands every weight that a graph wants to `sink`, by the name that it is known by there, in the graph's own type; with
    /// `wrong` only those that may be wrong on purpose.
    pub fn give(
        &self,
        graph: &Graph,
        config: &Config,
        wrong: Option<Option<Wrong>>,
        sink: &mut dyn FnMut(&str, &HostTensor) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        for tensor in graph.tensors().iter().filter(|tensor| tensor.origin == Origin::Weight) {
            for (name, shape) in wanted(tensor) {
                // What may be wrong comes again, wrong or right.
                if wrong.is_none() || SPOILED.contains(&name.as_str()) {
                    sink(&name, &self.one(&name, &shape, tensor.spec.dtype, config, wrong.flatten())?)?;
                }
            }
        }
        Ok(())
    }

    fn one(
        &self,
        name: &str,
        shape: &[u64],
        dtype: DType,
        config: &Config,
        wrong: Option<Wrong>,
    ) -> Result<HostTensor, Fault> {
        if name == COS_SIN {
            return cos_sin(config, shape[0], wrong == Some(Wrong::RopeHalves));
        }
        let read = match wrong {
            Some(Wrong::AnotherLayersNorm) if name == FIRST_NORM => "model.layers.1.input_layernorm.weight",
            _ => name,
        };
        let tensor = converted(self.read(read, shape, config)?, dtype)?;
        match wrong {
            Some(Wrong::Transposed) if name == FIRST_O => transposed(&tensor),
            _ => Ok(tensor),
        }
    }
}

/// What a weight is filled with: its parts, or itself.
fn wanted(tensor: &Tensor) -> Vec<(String, Vec<u64>)> {
    let shape: Vec<u64> = tensor.spec.shape.iter().map(|dim| dim.at(1)).collect();
    if tensor.packed.is_empty() {
        return vec![(tensor.name.clone(), shape)];
    }
    let part = |(name, rows): &(String, u64)| (name.clone(), [&[*rows], &shape[1..]].concat());
    tensor.packed.iter().map(part).collect()
}

/// The files that an index names.
fn indexed(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, Fault> {
    let wrong = |found: String| {
        fault(format!("{}: {found}, expected `weight_map` with a file for each weight; fetch it anew", index.display()))
    };
    let text = std::fs::read_to_string(index).map_err(|error| wrong(error.to_string()))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let map = json["weight_map"].as_object().ok_or_else(|| wrong("it has no such list".to_owned()))?;
    let mut names: Vec<&str> = map.values().filter_map(serde_json::Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    match names.iter().find(|name| name.contains(['/', '\\']) || **name == "..") {
        Some(name) => Err(wrong(format!("{name:?} is no file's name"))),
        None if names.is_empty() => Err(wrong("it names no file".to_owned())),
        None => Ok(names.into_iter().map(|name| folder.join(name)).collect()),
    }
}

fn random(name: &str, shape: &[u64], seed: u64, numbers: &[f32]) -> Result<HostTensor, Fault> {
    let count: usize = shape.iter().product::<u64>() as usize;
    let mut tensor = HostTensor::zeros(DataType::Bfloat16, shape)?;
    // Each weight has numbers of its own, whatever is made before it.
    let own = name
        .bytes()
        .fold(seed ^ 0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3));
    let mut random = Random(own);
    let bytes = tensor.bytes_mut();
    let element = |x: f32| half::bf16::from_f32(x).to_ne_bytes();
    if name.ends_with("norm.weight") {
        bytes.chunks_exact_mut(2).for_each(|place| place.copy_from_slice(&element(1.0)));
        return Ok(tensor);
    }
    let mut left = bytes.chunks_exact_mut(2);
    for _ in 0..count.div_ceil(4) {
        let bits = random.next();
        for (shift, place) in (0..4).zip(&mut left) {
            place.copy_from_slice(&element(numbers[(bits >> (16 * shift) & 0xFFFF) as usize]));
        }
    }
    Ok(tensor)
}

fn converted(tensor: HostTensor, dtype: DType) -> Result<HostTensor, Fault> {
    let wanted = DataType::from(dtype);
    if *tensor.dtype() == wanted {
        return Ok(tensor);
    }
    let numbers: Vec<f64> = (0..tensor.slots()).map(|i| f64::from(tensor.float(i))).collect();
    Ok(HostTensor::from_f64(wanted, tensor.shape(), &numbers)?)
}

/// The transposed matrix's elements in the shape of the matrix.
fn transposed(tensor: &HostTensor) -> Result<HostTensor, Fault> {
    let &[rows, columns] = tensor.shape() else { return Err(fault("only a matrix is transposed")) };
    let (rows, columns) = (rows as usize, columns as usize);
    let numbers: Vec<f64> =
        (0..rows * columns).map(|i| f64::from(tensor.float(i % rows * columns + i / rows))).collect();
    Ok(HostTensor::from_f64(tensor.dtype().clone(), tensor.shape(), &numbers)?)
}

/// A row of cosines and sines for each position.
fn cos_sin(config: &Config, positions: u64, swapped: bool) -> Result<HostTensor, Fault> {
    let table = CosSinCache::new(config.head as i64, positions as i64, config.rope_theta, config.rope_scaling)?;
    let half = config.head as usize / 2;
    let mut numbers = Vec::with_capacity(positions as usize * config.head as usize);
    for position in 0..positions as usize {
        let cos = (0..half).map(|i| f64::from(table.cos(position, i)));
        let sin = (0..half).map(|i| f64::from(table.sin(position, i)));
        if swapped { numbers.extend(sin.chain(cos)) } else { numbers.extend(cos.chain(sin)) }
    }
    Ok(HostTensor::from_f64(DataType::Float32, &[positions, config.head], &numbers)?)
}

/// Numbers without a pattern (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Above 0.0 and below 1.0.
    pub fn uniform(&mut self) -> f64 {
        ((self.next() >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }
}
