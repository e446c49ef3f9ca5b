//! What a kernel is called with: a workload's inputs, made in host memory.

use std::path::Path;

use super::definition::{Definition, TensorSpec};
use super::dtype::DataType;
use super::error::unfit;
use super::named::Named;
use super::random::Random;
use super::safetensors::Safetensors;
use super::tensor::{HostTensor, extent};
use super::trace::{InputSpec, Scalar, Workload};
use crate::error::Result;

/// An argument of a kernel.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Input {
    /// A tensor.
    Tensor(HostTensor),
    /// A scalar that the workload, or the definition's type, has as a whole number.
    Int(i64),
    /// A scalar with a point.
    Float(f64),
    /// `true` or `false`.
    Bool(bool),
    /// An optional input that is left out: FlashInfer's dialect passes TVM-FFI's None.
    Absent,
}

impl Input {
    /// The shape, of a tensor.
    pub fn shape(&self) -> Option<&[u64]> {
        match self {
            Self::Tensor(tensor) => Some(tensor.shape()),
            _ => None,
        }
    }
}

/// How inputs are made.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct InputOptions {
    /// What random inputs follow from: the same seed gives the same inputs. Upstream does not seed; 0 by default.
    pub seed: u64,
    /// Whether an optional input that the workload does not name is left out, as FlashInfer does it, or random, as
    /// FlashInfer-Bench does it, which is the default.
    pub leave_out_optional: bool,
    /// The most memory that all inputs together may take, in bytes; 64 GiB by default.
    pub max_bytes: u64,
}

impl Default for InputOptions {
    fn default() -> Self {
        Self { seed: 0, leave_out_optional: false, max_bytes: 64 << 30 }
    }
}

impl InputOptions {
    /// For a trial, which has random inputs of its own.
    pub(super) fn of_trial(&self, trial: u32) -> Self {
        Self { seed: self.seed.wrapping_add(trial.into()), ..self.clone() }
    }
}

impl Workload {
    /// Makes the inputs, in the definition's order, by upstream's distributions: normal for 16 and 32-bit floating-point
    /// numbers; normal, clamped to ±2 and rounded for smaller ones; whole numbers from -1024 to 1023, of eight bits from -128 to
    /// 127; booleans. The `probs` of a `sampling` definition are the softmax of normal numbers over the last axis. An
    /// input that the workload does not name is random.
    ///
    /// `root` is the dataset's folder, which the paths of safetensors files are relative to.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for an input that the definition does not have, an axis without a size, a scalar
    /// for a tensor, a tensor of another type or shape than the definition's, and more than
    /// [`max_bytes`](InputOptions::max_bytes); [`Io`](crate::FlashInferError::Io).
    pub fn make_inputs(
        &self,
        definition: &Definition,
        root: impl AsRef<Path>,
        options: &InputOptions,
    ) -> Result<Named<Input>> {
        self.make(definition, root.as_ref(), options)
    }

    fn make(&self, definition: &Definition, root: &Path, options: &InputOptions) -> Result<Named<Input>> {
        if let Some(name) = self.inputs.names().find(|name| definition.inputs.get(name).is_none()) {
            let (found, remedy) = (format!("the input {name:?}"), "use the definition that the workload is of");
            return Err(unfit(&self.what(), "inputs", found, format!("inputs of {:?}", definition.name), remedy));
        }
        let mut random = Random::new(options.seed);
        let mut left = options.max_bytes;
        let mut inputs = Vec::with_capacity(definition.inputs.len());
        for (name, spec) in definition.inputs.iter() {
            let shape = match (self.inputs.get(name), spec.optional && options.leave_out_optional) {
                // What is left out may have axes that nothing says.
                (None, true) => None,
                _ => definition.shape_of(name, spec, &self.axes)?,
            };
            if let Some(shape) = &shape {
                let bytes = extent(&spec.dtype, shape).map(|(_, bytes)| bytes as u64);
                left = bytes.and_then(|bytes| left.checked_sub(bytes)).ok_or_else(|| {
                    let (found, expected) = (format!("{}{shape:?}", spec.dtype), format!("at most {left} bytes more"));
                    unfit(
                        &self.what(),
                        format!("the input {name:?}"),
                        found,
                        expected,
                        "use smaller axes, or allow more",
                    )
                })?;
            }
            let input = match self.inputs.get(name) {
                Some(InputSpec::Scalar { value }) => self.scalar(name, spec, *value)?,
                Some(InputSpec::Safetensors { path, tensor_key }) => {
                    self.stored(name, spec, shape, &root.join(within(path)?), tensor_key)?
                }
                None if spec.optional && options.leave_out_optional => Input::Absent,
                Some(InputSpec::Random) | None => {
                    let probabilities = definition.op_type == "sampling" && name == "probs";
                    random_input(spec, shape.as_deref(), probabilities, &mut random)?
                }
            };
            inputs.push((name.to_owned(), input));
        }
        Ok(Named::distinct(inputs))
    }

    fn what(&self) -> String {
        format!("the workload {:?}", super::json::shortened(&self.uuid))
    }

    fn scalar(&self, name: &str, spec: &TensorSpec, value: Scalar) -> Result<Input> {
        if spec.shape.is_some() {
            let place = format!("the input {name:?}");
            return Err(unfit(&self.what(), place, "a scalar", "a tensor", "make it random, or store it"));
        }
        Ok(match value {
            Scalar::Int(number) => Input::Int(number),
            Scalar::Float(number) => Input::Float(number),
            Scalar::Bool(flag) => Input::Bool(flag),
        })
    }

    fn stored(
        &self,
        name: &str,
        spec: &TensorSpec,
        shape: Option<Vec<u64>>,
        path: &Path,
        tensor_key: &str,
    ) -> Result<Input> {
        let file = Safetensors::open(path)?;
        let found = file.form(tensor_key);
        // Not compared where it is not there: reading says so.
        if let Some((dtype, sizes)) = found
            && (*dtype != spec.dtype || Some(sizes) != shape.as_deref())
        {
            let expected = match &shape {
                Some(shape) => format!("{}{shape:?}", spec.dtype),
                None => "a scalar".to_owned(),
            };
            let place = format!("the tensor {tensor_key:?} for the input {name:?}");
            let remedy = "store the tensor anew, or correct the workload's axes";
            return Err(unfit(&path.display().to_string(), place, format!("{dtype}{sizes:?}"), expected, remedy));
        }
        file.read(tensor_key).map(Input::Tensor)
    }
}

/// A path of the dataset, that cannot lead out of it.
pub(super) fn within(path: &str) -> Result<&Path> {
    let inside = Path::new(path);
    let plain =
        inside.components().all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir));
    if plain && !path.contains('\0') && inside.file_name().is_some() {
        return Ok(inside);
    }
    let found = format!("{:?}", super::json::shortened(path));
    Err(unfit("the dataset", "a path", found, "a relative path without `..`", "keep files in the dataset's folder"))
}

fn random_input(spec: &TensorSpec, shape: Option<&[u64]>, probabilities: bool, random: &mut Random) -> Result<Input> {
    let Some(shape) = shape else {
        let value = random.value(&spec.dtype);
        // Rounded as the type rounds it: upstream takes the scalar out of a tensor of that type.
        let mut tensor = HostTensor::zeros(spec.dtype.clone(), &[])?;
        tensor.set(0, value);
        return Ok(match (&spec.dtype, tensor.int(0)) {
            (DataType::Bool, _) => Input::Bool(value != 0.0),
            (_, Some(number)) => Input::Int(i64::try_from(number).unwrap_or(i64::MAX)),
            (DataType::Float64, None) => Input::Float(value),
            (_, None) => Input::Float(tensor.float(0).into()),
        });
    };
    let mut tensor = HostTensor::zeros(spec.dtype.clone(), shape)?;
    for i in 0..tensor.slots() {
        tensor.set(i, random.value(&spec.dtype));
    }
    if probabilities && spec.dtype.is_float() {
        softmax(&mut tensor);
    }
    Ok(Input::Tensor(tensor))
}

/// Over the last axis.
fn softmax(tensor: &mut HostTensor) {
    let row = tensor.shape().last().copied().unwrap_or(1) as usize;
    if row == 0 {
        return;
    }
    for begin in (0..tensor.slots()).step_by(row) {
        let values: Vec<f64> = (begin..begin + row).map(|i| f64::from(tensor.float(i))).collect();
        let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exponentials: Vec<f64> = values.iter().map(|value| (value - largest).exp()).collect();
        let sum: f64 = exponentials.iter().sum();
        exponentials.iter().enumerate().for_each(|(i, value)| tensor.set(begin + i, value / sum));
    }
}
