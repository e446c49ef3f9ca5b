//! Writes the stored inputs of `examples/dataset` into its `blob` folder: those of the gated delta rule, which cannot be any
//! random numbers. The same numbers each time. `cargo run --features bench --example dataset_inputs [DATASET]`

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use flashinfer_rs::bench::{Axes, Dataset, Definition, HostTensor, InputSpec, write_safetensors};

const DEFINITION: &str = "gdn_prefill_qk2_v4_d128";

fn main() -> Result<(), Box<dyn Error>> {
    let default = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/dataset"));
    let dataset = Dataset::open(std::env::args_os().nth(1).map_or(default, PathBuf::from))?;
    for path in write(&dataset)? {
        println!("{}", path.display());
    }
    Ok(())
}

/// Writes the stored inputs, and answers their files.
pub fn write(dataset: &Dataset) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut files = Vec::new();
    let definition = dataset.definition(DEFINITION).ok_or("the dataset lacks the definition")?;
    for trace in dataset.workloads(DEFINITION) {
        let workload = &trace.workload;
        let stored = workload.inputs.iter().filter_map(|(name, input)| match input {
            InputSpec::Safetensors { path, tensor_key } => Some((name, path, tensor_key)),
            _ => None,
        });
        let stored: Vec<_> = stored.collect();
        let Some((_, file, _)) = stored.first() else { continue };
        let path = dataset.blob(file)?;
        if path.exists() {
            fs::remove_file(&path)?;
        }
        let made = stored.iter().map(|(name, _, key)| Ok((key.as_str(), input(definition, name, &workload.axes)?)));
        let made = made.collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        let tensors: Vec<_> = made.iter().map(|(key, tensor)| (*key, tensor)).collect();
        write_safetensors(&path, &tensors)?;
        files.push(path);
    }
    Ok(files)
}

/// An input by its name.
fn input(definition: &Definition, name: &str, axes: &Axes) -> Result<HostTensor, Box<dyn Error>> {
    let spec = definition.inputs.get(name).ok_or("the definition lacks the input")?;
    let shape = definition.shape_of(name, spec, axes)?.ok_or("a scalar is not stored")?;
    let mut tensor = HostTensor::zeros(spec.dtype.clone(), &shape)?;
    let (tokens, sequences) = (axes["total_seq_len"], axes["num_seqs"]);
    // Numbers from -1 to 1 that look random enough, others for each input.
    let seed: f64 = name.bytes().map(f64::from).sum();
    let number = |i: usize| {
        let large = (i as f64 * 12.9898 + seed).sin() * 43758.5453;
        2.0 * (large - large.floor()) - 1.0
    };
    match name {
        // Sequences of about the same length.
        "cu_seqlens" => (0..=sequences).for_each(|i| tensor.set(i as usize, (tokens * i / sequences) as f64)),
        "alpha" => (0..tensor.slots()).for_each(|i| tensor.set(i, 0.9 + 0.1 * number(i).abs())),
        "beta" => (0..tensor.slots()).for_each(|i| tensor.set(i, 0.5 + 0.5 * number(i))),
        // Of length 1, as models give them: longer keys make the state grow without end.
        "q" | "k" => {
            for row in 0..tensor.slots() / 128 {
                let values: Vec<f64> = (0..128).map(|i| number(row * 128 + i)).collect();
                let length = values.iter().map(|value| value * value).sum::<f64>().sqrt();
                values.iter().enumerate().for_each(|(i, value)| tensor.set(row * 128 + i, value / length));
            }
        }
        _ => (0..tensor.slots()).for_each(|i| tensor.set(i, number(i))),
    }
    Ok(tensor)
}
