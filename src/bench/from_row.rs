//! Definitions of this crate's own kernels, made of their rows and of what a call gives them.
//!
//! A row says the shapes, the element types and which tensors are written. What it does not say stands in the family's file of
//! this folder: the axes' names and which of them are constant, as FlashInfer's own traces have it, conditions as expressions, and
//! the computation in PyTorch.

use std::borrow::Cow;
use std::ffi::CStr;

use super::definition::{Axis, Definition, TensorSpec};
use super::dtype::DataType;
use super::error::unfit;
use super::json::Json;
use super::named::Named;
use crate::contract::{
    Contents, Dimensions, Dtype, From, Kind, MAX_ARGUMENTS, MAX_DIMENSIONS, Operand, Role, Row, Size, Tensor,
};
use crate::error::Result;
use crate::tensor::DType;

mod activation;
mod cascade;
mod decode;
mod gdn;
mod norm;
mod page;
mod quantization;
mod rope;
mod sampling;
#[cfg(test)]
mod tests;
mod topk;

/// The families.
const FAMILIES: &[&[Facts]] = &[
    activation::FACTS,
    cascade::FACTS,
    decode::FACTS,
    gdn::FACTS,
    norm::FACTS,
    page::FACTS,
    quantization::FACTS,
    rope::FACTS,
    sampling::FACTS,
    topk::FACTS,
];

/// What a kernel's definition has beside its row.
struct Facts {
    /// The row's kernel.
    kernel: &'static str,
    /// What the definitions' names begin with.
    name: &'static str,
    op_type: &'static str,
    /// FlashInfer's function in Python; empty for a kernel that FlashInfer has not.
    api: &'static str,
    /// The row's dimensions that are axes.
    axes: &'static [AxisOf],
    /// What must hold besides what the row's shapes say: its relations, but for those that are a GPU's. Where these do not say
    /// where offsets end, it is at the end of what they divide.
    constraints: &'static [&'static str],
    /// Python, in parts: the last has the function `run`.
    reference: &'static [&'static str],
}

/// A dimension of a row as an axis.
#[derive(Clone, Copy)]
struct AxisOf {
    dimension: &'static str,
    axis: &'static str,
    kind: AxisKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum AxisKind {
    Var,
    /// Constant, and a part of the definition's name behind this abbreviation; no part of it where there is none, since it
    /// follows from the others.
    Const(&'static str),
}

const fn var(dimension: &'static str, axis: &'static str) -> AxisOf {
    AxisOf { dimension, axis, kind: AxisKind::Var }
}

const fn constant(dimension: &'static str, axis: &'static str, abbreviation: &'static str) -> AxisOf {
    AxisOf { dimension, axis, kind: AxisKind::Const(abbreviation) }
}

/// Arguments that are no part of what is computed: how sums are made, and the state of random numbers, which a definition takes
/// for random.
const LEFT_OUT: [&str; 3] = ["deterministic", "philox_seed", "philox_offset"];

/// A call of a kernel, as far as its definition depends on it: the sizes, the element types and the words.
///
/// ```
/// use flashinfer_rs::bench::{Dialect, KernelCall};
/// use flashinfer_rs::kernels;
///
/// let row = kernels::rows().into_iter().find(|row| row.kernel == "rmsnorm").expect("a kernel");
/// let definition = KernelCall::example(row).with_size("columns", 4096)?.definition()?;
/// assert_eq!(definition.name, "rmsnorm_h4096");
/// assert_eq!(definition.var_axes(), ["batch_size"]);
/// definition.validate(Dialect::FlashInferBench)?;
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone)]
pub struct KernelCall {
    row: &'static Row,
    dimensions: Dimensions,
    /// Of the tensors, in the arguments' places.
    dtypes: [Option<DType>; MAX_ARGUMENTS],
    words: [Option<&'static CStr>; MAX_ARGUMENTS],
}

impl KernelCall {
    /// A call of the sizes that the row's first examples are, of the first element types and words that it allows.
    pub fn example(row: &'static Row) -> Self {
        let sizes = |i: usize| row.dimensions[i].examples.first().copied().unwrap_or(1);
        let mut call = Self {
            row,
            dimensions: row.dimensions_from(sizes),
            dtypes: [None; MAX_ARGUMENTS],
            words: [None; MAX_ARGUMENTS],
        };
        for (i, argument) in row.arguments.iter().enumerate() {
            match &argument.kind {
                Kind::Tensor(tensor) => call.dtypes[i] = default_of(tensor),
                Kind::Word(words) => call.words[i] = words.first().copied(),
                _ => {}
            }
        }
        call.follow();
        call
    }

    /// A call that keeps its row.
    pub(crate) fn of(row: &'static Row, operands: &[Operand<'_, '_>], dimensions: &Dimensions) -> Self {
        // The kernel's own row where a call has it in another form, with limits that are the call's.
        let own = crate::kernels::rows().into_iter().find(|own| own.kernel == row.kernel);
        let row = own.unwrap_or(row);
        let mut call =
            Self { row, dimensions: *dimensions, dtypes: [None; MAX_ARGUMENTS], words: [None; MAX_ARGUMENTS] };
        for (i, (operand, argument)) in operands.iter().zip(row.arguments).enumerate().take(MAX_ARGUMENTS) {
            match (operand, &argument.kind) {
                (Operand::Word(word), _) => call.words[i] = Some(word),
                (Operand::Tensor(layout, _), _) => call.dtypes[i] = Some(layout.dtype()),
                // One that is not there is still an input, an optional one.
                (_, Kind::Tensor(tensor)) => call.dtypes[i] = default_of(tensor),
                _ => {}
            }
        }
        call.follow();
        call
    }

    /// Gives the types that follow others to those that have none.
    fn follow(&mut self) {
        for (i, _, tensor) in self.row.tensors() {
            if let (Dtype::As(other), None) = (tensor.dtype, self.dtypes[i]) {
                self.dtypes[i] = self.dtypes[other];
            }
        }
    }

    /// With another size of a dimension, by the row's name for it.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a name that is none of the row's dimensions, one that follows from others, and
    /// a size that the row does not allow.
    pub fn with_size(mut self, dimension: &str, size: i64) -> Result<Self> {
        let chosen = |from: From| !matches!(from, From::Larger(..) | From::Sum(..));
        let at = self.row.dimensions.iter().position(|d| d.name == dimension && chosen(d.from));
        let Some(at) = at else {
            let names: Vec<_> = self.row.dimensions.iter().filter(|d| chosen(d.from)).map(|d| d.name).collect();
            return Err(self.unfit("dimension", format!("{dimension:?}"), format!("one of {}", names.join(", "))));
        };
        let (least, most) = (self.row.dimensions[at].least, self.row.dimensions[at].most);
        if !(least..=most).contains(&size) {
            return Err(self.unfit(dimension, size.to_string(), format!("{least} to {most}")));
        }
        self.dimensions[at] = size;
        let given = self.dimensions;
        self.dimensions = self.row.dimensions_from(|i| given[i]);
        Ok(self)
    }

    /// With another element type of a tensor, and of those that follow it.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a name that is no tensor's, and for a type that the row does not allow.
    pub fn with_dtype(mut self, argument: &str, dtype: DType) -> Result<Self> {
        let Some((at, _, tensor)) = self.row.tensors().find(|(_, name, _)| *name == argument) else {
            let names: Vec<_> = self.row.tensors().map(|(_, name, _)| name).collect();
            return Err(self.unfit("argument", format!("{argument:?}"), format!("one of {}", names.join(", "))));
        };
        let allowed = tensor.dtype.allowed(true);
        if !allowed.contains(&dtype) {
            let expected = match tensor.dtype {
                Dtype::As(other) => format!("none: it is as {}", self.row.arguments[other].name),
                _ => allowed.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "),
            };
            return Err(self.unfit(argument, dtype.to_string(), expected));
        }
        self.dtypes[at] = Some(dtype);
        for (i, _, tensor) in self.row.tensors() {
            if let Dtype::As(other) = tensor.dtype {
                self.dtypes[i] = self.dtypes[other];
            }
        }
        Ok(self)
    }

    /// With another word, as `bitorder` is one.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a name that is no word's, and for a word that the row does not allow.
    pub fn with_word(mut self, argument: &str, word: &str) -> Result<Self> {
        let at = self.row.arguments.iter().position(|a| a.name == argument && matches!(a.kind, Kind::Word(_)));
        let Some((at, Kind::Word(words))) = at.map(|at| (at, &self.row.arguments[at].kind)) else {
            return Err(self.unfit("argument", format!("{argument:?}"), "one that is a word".to_owned()));
        };
        match words.iter().find(|known| known.to_bytes() == word.as_bytes()) {
            Some(known) => self.words[at] = Some(known),
            None => return Err(self.unfit(argument, format!("{word:?}"), format!("one of {words:?}"))),
        }
        Ok(self)
    }

    fn unfit(&self, place: &str, found: String, expected: String) -> crate::error::FlashInferError {
        unfit(
            &format!("the call of {}", self.row.kernel),
            place,
            found,
            expected,
            "see the kernel's row in docs/kernels.md",
        )
    }

    fn facts(&self) -> Result<&'static Facts> {
        let facts = FAMILIES.iter().copied().flatten().find(|facts| facts.kernel == self.row.kernel);
        let expected = || "one that has facts in src/bench/from_row".to_owned();
        facts.ok_or_else(|| self.unfit("kernel", "a kernel without a definition".to_owned(), expected()))
    }

    /// What tells this call's definition from those of other calls: calls of one key have the same.
    pub(crate) fn key(&self) -> Key {
        let mut dimensions: Dimensions = [0; MAX_DIMENSIONS];
        if let Ok(facts) = self.facts() {
            for (i, size) in self.dimensions.iter().enumerate().take(self.row.dimensions.len()) {
                let constant = |of: &AxisOf| of.dimension == self.row.dimensions[i].name && of.kind != AxisKind::Var;
                if facts.axes.iter().any(constant) {
                    dimensions[i] = *size;
                }
            }
        }
        Key { kernel: self.row.kernel, dimensions, dtypes: self.dtypes, words: self.words }
    }

    /// The definition of what the call computes, of both dialects. Its name is the operation, the element types that are not the
    /// usual ones, and the constant axes; see `docs/definitions`.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a kernel that has no definition.
    pub fn definition(&self) -> Result<Definition> {
        let facts = self.facts()?;
        let row = self.row;
        let mut writer = Writer { call: self, facts, axes: Named::new(), bindings: Vec::new() };
        let mut name = facts.name.to_owned();
        for property in self.properties() {
            name = format!("{name}_{property}");
        }
        // In the facts' order, which is the names'.
        for of in facts.axes {
            let Some(at) = row.dimensions.iter().position(|dimension| dimension.name == of.dimension) else { continue };
            let size = self.dimensions[at].max(0);
            if let AxisKind::Const(abbreviation) = of.kind
                && !abbreviation.is_empty()
            {
                name = format!("{name}_{abbreviation}{size}");
            }
            writer.axes.insert(of.axis, axis(of.kind, size));
        }
        let mut definition = Definition::new(&name, facts.op_type);
        for (i, argument) in row.arguments.iter().enumerate() {
            if LEFT_OUT.contains(&argument.name) {
                continue;
            }
            match &argument.kind {
                Kind::Tensor(tensor) => writer.tensor(&mut definition, i, argument.name, tensor),
                Kind::Positive | Kind::NotNegative | Kind::Between(..) => {
                    definition.inputs.insert(argument.name, TensorSpec::scalar(DataType::Float32));
                }
                // One that is an axis, or that this form of the function always has, says nothing.
                Kind::Whole(least, most) if least == most || writer.is_axis(i) => {}
                Kind::Whole(..) => {
                    definition.inputs.insert(argument.name, TensorSpec::scalar(DataType::Int32));
                }
                Kind::Switch => {
                    definition.inputs.insert(argument.name, TensorSpec::scalar(DataType::Bool));
                }
                Kind::Word(_) | Kind::Missing(_) | Kind::Nothing | Kind::EnablePdl => {}
            }
        }
        definition.constraints = writer.constraints();
        definition.reference = Some(writer.reference());
        // Only axes that a shape has, or that are a part of the name.
        let used = |axis: &str| {
            let shapes = definition.inputs.values().chain(definition.outputs.values());
            shapes.flat_map(|spec| spec.shape.iter().flatten()).any(|name| name == axis)
        };
        let kept = writer.axes.iter().filter(|(name, axis)| matches!(axis, Axis::Const { .. }) || used(name));
        definition.axes = kept.map(|(name, axis)| (name, axis.clone())).collect();
        let api = Some(facts.api).filter(|api| !api.is_empty()).map(|api| format!("fi_api:{api}"));
        definition.tags = api.into_iter().chain([format!("rs_kernel:{}", row.kernel)]).collect();
        definition.description = Some(row.summary.replace('`', ""));
        Ok(definition)
    }

    /// The words, and the element types that are not the first that the row allows.
    fn properties(&self) -> Vec<Cow<'static, str>> {
        let mut properties: Vec<_> = self.words.iter().flatten().map(|word| word.to_string_lossy()).collect();
        for (i, _, tensor) in self.row.tensors() {
            if let (Some(usual), Some(dtype)) = (tensor.dtype.allowed(true).first(), self.dtypes[i])
                && *usual != dtype
            {
                let short = match dtype {
                    DType::F16 => "fp16",
                    DType::BF16 => "bf16",
                    DType::F32 => "fp32",
                    DType::F64 => "fp64",
                    DType::F8E4M3 => "fp8_e4m3",
                    DType::F8E5M2 => "fp8_e5m2",
                    DType::U8 => "uint8",
                    DType::I32 => "int32",
                    DType::I64 => "int64",
                };
                properties.push(Cow::Borrowed(short));
            }
        }
        properties
    }
}

/// What a definition depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    kernel: &'static str,
    dimensions: Dimensions,
    dtypes: [Option<DType>; MAX_ARGUMENTS],
    words: [Option<&'static CStr>; MAX_ARGUMENTS],
}

/// The first type that a row allows for a tensor; none where it follows another's.
fn default_of(tensor: &Tensor) -> Option<DType> {
    tensor.dtype.allowed(true).first().copied()
}

fn axis(kind: AxisKind, size: i64) -> Axis {
    match kind {
        AxisKind::Var => Axis::variable(),
        AxisKind::Const(_) => Axis::constant(size.unsigned_abs()),
    }
}

/// Makes a definition's parts.
struct Writer<'a> {
    call: &'a KernelCall,
    facts: &'static Facts,
    axes: Named<Axis>,
    /// Axes that follow from dimensions, each with the dimension and the expression.
    bindings: Vec<(usize, String)>,
}

impl Writer<'_> {
    /// The axis that a dimension is.
    fn of(&self, dimension: usize) -> Option<&'static AxisOf> {
        let name = self.call.row.dimensions[dimension].name;
        self.facts.axes.iter().find(|of| of.dimension == name)
    }

    /// Whether a number is an axis.
    fn is_axis(&self, argument: usize) -> bool {
        let mut dimensions = self.call.row.dimensions.iter().enumerate();
        dimensions.any(|(i, d)| matches!(d.from, From::Number(from) if from == argument) && self.of(i).is_some())
    }

    fn tensor(&mut self, definition: &mut Definition, i: usize, name: &'static str, tensor: &'static Tensor) {
        if tensor.role == Role::Workspace {
            return;
        }
        let shape = tensor.shape.iter().map(|size| self.size(*size)).collect();
        let dtype = self.call.dtypes[i].map_or(DataType::Other("unknown".to_owned()), DataType::from);
        let mut spec =
            TensorSpec { shape: Some(shape), dtype, description: None, optional: tensor.optional, extra: Named::new() };
        if spec.dtype == DataType::Uint8 {
            // Which FlashInfer-Bench does not have.
            let (dtype, description) = match tensor.role {
                Role::In => (DataType::Bool, "Bytes that are 0 or 1."),
                _ => (DataType::Int8, "Bytes; the kernel's uint8, which FlashInfer-Bench does not have."),
            };
            (spec.dtype, spec.description) = (dtype, Some(description.to_owned()));
        }
        match tensor.role {
            Role::In => {
                definition.inputs.insert(name, spec);
            }
            Role::InPlace => {
                let mut after = TensorSpec { optional: false, ..spec.clone() };
                after.extra.insert("param", Json::Text(name.to_owned()));
                after.description = Some(format!("What is in {name} afterwards."));
                definition.inputs.insert(name, spec);
                definition.outputs.insert(format!("new_{name}"), after);
            }
            Role::Unordered => {
                spec.description = Some("Each row in any order; the reference's is the largest first.".to_owned());
                definition.outputs.insert(name, spec);
            }
            Role::Out | Role::Workspace => {
                definition.outputs.insert(name, spec);
            }
        }
    }

    /// The axis of a size; one that follows from another is made.
    fn size(&mut self, size: Size) -> String {
        let (dimension, suffix) = match size {
            Size::Of(i) => (i, ""),
            Size::OneMore(i) => (i, "_plus_1"),
            Size::Twice(i) => (i, "_times_2"),
            Size::Eighth(i) => (i, "_in_bytes"),
        };
        let Some(of) = self.of(dimension) else {
            return self.call.row.dimensions[dimension].name.to_owned();
        };
        let (base, name) = (of.axis, format!("{}{suffix}", of.axis));
        if self.axes.get(&name).is_none() {
            self.axes.insert(name.clone(), axis(of.kind, size.of(&self.call.dimensions)));
            let expression = match size {
                Size::OneMore(_) => format!("{name} == {base} + 1"),
                Size::Twice(_) => format!("{name} == 2 * {base}"),
                _ => format!("{name} == ({base} + 7) // 8"),
            };
            self.bindings.push((dimension, expression));
        }
        name
    }

    fn constraints(&self) -> Vec<String> {
        let row = self.call.row;
        let mut all = Vec::new();
        // Of a dimension that no shape has nothing can be said.
        let shapes = || row.tensors().filter(|(_, _, tensor)| tensor.role != Role::Workspace);
        let in_shape = |dimension: usize| {
            let has = |size: &Size| matches!(size, Size::Of(i) if *i == dimension);
            shapes().any(|(_, _, tensor)| tensor.shape.iter().any(has))
        };
        let known = self.bindings.iter().filter(|(dimension, _)| in_shape(*dimension));
        all.extend(known.map(|(_, expression)| expression.clone()));
        for (i, dimension) in row.dimensions.iter().enumerate() {
            let Some(of) = self.of(i) else { continue };
            let name = |i: usize| self.of(i).map(|of| of.axis);
            match dimension.from {
                From::Sum(a, b) if in_shape(i) => {
                    if let (Some(a), Some(b)) = (name(a), name(b)) {
                        all.push(format!("{} == {a} + {b}", of.axis));
                    }
                }
                From::Larger(a, b) if in_shape(i) => {
                    if let (Some(a), Some(b)) = (name(a), name(b)) {
                        let one = format!("{0} == {a} or {0} == {b}", of.axis);
                        all.extend([one, format!("{} >= {a}", of.axis), format!("{} >= {b}", of.axis)]);
                    }
                }
                _ if of.kind == AxisKind::Var && dimension.least > 0 && in_shape(i) => {
                    all.push(format!("{} >= {}", of.axis, dimension.least));
                }
                _ => {}
            }
        }
        for (_, argument, tensor) in shapes() {
            let end = format!("{argument}[-1].item()");
            if let Contents::Offsets(_, whole) = tensor.contents
                && let Some(of) = self.of(whole)
                && !self.facts.constraints.iter().any(|text| text.contains(&end))
            {
                all.push(format!("{} == {end}", of.axis));
            }
        }
        all.extend(self.facts.constraints.iter().map(|&text| text.to_owned()));
        all
    }

    /// The facts' Python, and ahead of it the constants that it names: `DTYPE_out` is the element type of the output `out`,
    /// `AXIS_top_k` the axis `top_k`, `WORD_bitorder` the word `bitorder`.
    fn reference(&self) -> String {
        let body = self.facts.reference.join("\n\n");
        let mut constants = String::new();
        for (i, argument) in self.call.row.arguments.iter().enumerate() {
            let name = argument.name;
            if let (Some(dtype), true) = (self.call.dtypes[i], body.contains(&format!("DTYPE_{name}"))) {
                constants += &format!("DTYPE_{name} = torch.{}\n", DataType::from(dtype).name());
            }
            if let (Some(word), true) = (self.call.words[i], body.contains(&format!("WORD_{name}"))) {
                constants += &format!("WORD_{name} = {:?}\n", word.to_string_lossy());
            }
        }
        for (name, axis) in self.axes.iter() {
            if let (Axis::Const { value, .. }, true) = (axis, body.contains(&format!("AXIS_{name}"))) {
                constants += &format!("AXIS_{name} = {value}\n");
            }
        }
        let math = if body.contains("math.") { "import math\n\n" } else { "" };
        let gap = if constants.is_empty() { "" } else { "\n" };
        format!("{math}import torch\n{gap}{constants}\n\n{body}")
    }
}
