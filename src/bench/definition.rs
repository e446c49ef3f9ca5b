//! What a kernel computes: its axes, inputs and outputs.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::Dialect;
use super::constraint::{Constraint, Verdict};
use super::dtype::DataType;
use super::error::{io, read, unfit};
use super::inputs::Input;
use super::json::{Cursor, Document, Json, MAX_BYTES};
pub(super) use super::json::{field, text};
use super::named::Named;
use crate::error::Result;

/// The sizes of variable axes, by name.
pub type Axes = BTreeMap<String, u64>;

/// The most dimensions that a tensor of a definition may have.
const MAX_RANK: usize = 32;
const SHAPES: &str = "give the tensor the shape that the definition says, or use the definition that fits";

/// A dimension's name and whether all calls have it alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Axis {
    /// The same size in every call.
    Const {
        /// The size.
        value: u64,
        /// What it counts.
        description: Option<String>,
    },
    /// A size that the inputs of a call say.
    Var {
        /// What it counts.
        description: Option<String>,
    },
}

impl Axis {
    /// An axis of this size.
    pub fn constant(value: u64) -> Self {
        Self::Const { value, description: None }
    }

    /// An axis whose size the inputs say.
    pub fn variable() -> Self {
        Self::Var { description: None }
    }

    fn read(cursor: &Cursor<'_>) -> Result<Self> {
        let description = optional_text(cursor, "description")?;
        let kind = cursor.get("type").map(|kind| kind.text()).transpose()?;
        // Upstream leaves `type` out where nothing set it, and tells the two apart by `value`.
        match kind.as_deref() {
            Some("const") => Ok(Self::Const { value: cursor.need("value")?.size()?, description }),
            Some("var") => Ok(Self::Var { description }),
            None => match cursor.get("value") {
                Some(value) => Ok(Self::Const { value: value.size()?, description }),
                None => cursor.fields().map(|_| Self::Var { description }),
            },
            Some(other) => Err(cursor.refuse(format!("the type {other:?}"), "\"const\" or \"var\"", "correct it")),
        }
    }

    fn json(&self) -> Json {
        let (mut fields, description) = match self {
            Self::Const { value, description } => {
                (vec![field("type", text("const")), field("value", Json::Int(i128::from(*value)))], description)
            }
            Self::Var { description } => (vec![field("type", text("var"))], description),
        };
        fields.extend(description.as_deref().map(|words| field("description", text(words))));
        Json::Object(fields)
    }
}

/// A tensor or a scalar that a kernel takes or gives.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// The axes' names, outermost first. None of them is a tensor of one element; no shape at all is a scalar.
    pub shape: Option<Vec<String>>,
    /// The element type.
    pub dtype: DataType,
    /// What it is for.
    pub description: Option<String>,
    /// Whether a call may leave it out. FlashInfer's dialect alone says so.
    pub optional: bool,
    /// What else stands there, such as FlashInfer's `param`, `init` and `check`: kept and written again.
    pub extra: Named<Json>,
}

impl TensorSpec {
    /// A tensor over these axes.
    pub fn tensor(shape: &[&str], dtype: DataType) -> Self {
        let shape = Some(shape.iter().map(|&axis| axis.to_owned()).collect());
        Self { shape, dtype, description: None, optional: false, extra: Named::new() }
    }

    /// A scalar.
    pub fn scalar(dtype: DataType) -> Self {
        Self { shape: None, dtype, description: None, optional: false, extra: Named::new() }
    }

    fn read(cursor: &Cursor<'_>) -> Result<Self> {
        let shape = cursor.need("shape")?;
        let shape = if shape.is_null() {
            None
        } else {
            let names = shape.words()?;
            if names.len() > MAX_RANK {
                return Err(shape.refuse(format!("{} axes", names.len()), "at most 32", "correct the shape"));
            }
            Some(names)
        };
        Ok(Self {
            shape,
            dtype: DataType::from_name(&cursor.need("dtype")?.word()?),
            description: optional_text(cursor, "description")?,
            optional: cursor.get("optional").map_or(Ok(false), |flag| flag.flag())?,
            extra: others(cursor, &["shape", "dtype", "description", "optional"])?,
        })
    }

    fn json(&self) -> Json {
        let shape = match &self.shape {
            Some(names) => Json::List(names.iter().map(|name| text(name)).collect()),
            None => Json::Null,
        };
        let mut fields = vec![field("shape", shape), field("dtype", text(self.dtype.name()))];
        fields.extend(self.optional.then(|| field("optional", Json::Bool(true))));
        fields.extend(self.description.as_deref().map(|words| field("description", text(words))));
        fields.extend(self.extra.iter().map(|(name, value)| field(name, value.clone())));
        Json::Object(fields)
    }
}

/// What came of keeping a definition's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    Written,
    /// It was there.
    Same,
    /// Another one was there, and still is.
    Other,
}

/// What a kernel computes. The order of the inputs and outputs is the order of its arguments.
#[derive(Debug, Clone, PartialEq)]
pub struct Definition {
    /// Its name: by convention the operation, its properties and its constant axes, `rmsnorm_h4096` for example.
    pub name: String,
    /// The kind of operation: `gemm`, `rmsnorm`, `gdn`, `sampling` and others.
    pub op_type: String,
    /// The axes of the shapes below.
    pub axes: Named<Axis>,
    /// What the kernel takes, in order.
    pub inputs: Named<TensorSpec>,
    /// What it gives, in order.
    pub outputs: Named<TensorSpec>,
    /// Python that computes the same, with a function `run`. FlashInfer's dialect may lack it.
    pub reference: Option<String>,
    /// Words to find it by.
    pub tags: Vec<String>,
    /// What it is.
    pub description: Option<String>,
    /// What holds between axes and inputs, as Python expressions; see [`Constraint`].
    pub constraints: Vec<String>,
    /// What else stands there: kept and written again.
    pub extra: Named<Json>,
}

impl Definition {
    /// A definition of this name that has nothing yet.
    pub fn new(name: &str, op_type: &str) -> Self {
        Self {
            name: name.to_owned(),
            op_type: op_type.to_owned(),
            axes: Named::new(),
            inputs: Named::new(),
            outputs: Named::new(),
            reference: None,
            tags: Vec::new(),
            description: None,
            constraints: Vec::new(),
            extra: Named::new(),
        }
    }

    /// Reads one of either dialect. That it obeys a dialect's rules is [`validate`](Self::validate)'s to say.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for what is no JSON, lacks a field, or has one of another type.
    pub fn from_json(json: &str) -> Result<Self> {
        Self::parse("the definition", json.as_bytes())
    }

    /// As [`from_json`](Self::from_json), of a file.
    ///
    /// # Errors
    /// Also [`Io`](crate::FlashInferError::Io).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(&path.display().to_string(), &read(path, MAX_BYTES)?)
    }

    fn parse(file: &str, bytes: &[u8]) -> Result<Self> {
        let document = Document::parse(file, bytes, 1)?;
        let root = document.root();
        let tensors = |name| -> Result<Named<TensorSpec>> {
            let fields = root.need(name)?.named()?;
            let specs = fields.iter().map(|(name, spec)| Ok(((*name).to_owned(), TensorSpec::read(spec)?)));
            Ok(Named::distinct(specs.collect::<Result<_>>()?))
        };
        let axes = root.need("axes")?.named()?;
        let axes = axes.iter().map(|(name, axis)| Ok(((*name).to_owned(), Axis::read(axis)?)));
        let words = |name| root.get(name).map_or(Ok(Vec::new()), |list| list.words());
        const KNOWN: [&str; 9] =
            ["name", "op_type", "axes", "inputs", "outputs", "reference", "tags", "description", "constraints"];
        Ok(Self {
            name: root.need("name")?.word()?,
            op_type: root.need("op_type")?.word()?,
            axes: Named::distinct(axes.collect::<Result<_>>()?),
            inputs: tensors("inputs")?,
            outputs: tensors("outputs")?,
            reference: optional_text(&root, "reference")?,
            tags: words("tags")?,
            description: optional_text(&root, "description")?,
            constraints: words("constraints")?,
            extra: others(&root, &KNOWN)?,
        })
    }

    /// As upstream writes one: on many lines, with what is set.
    pub fn to_json(&self) -> String {
        self.json().pretty()
    }

    fn json(&self) -> Json {
        let specs = |specs: &Named<TensorSpec>| {
            Json::Object(specs.iter().map(|(name, spec)| field(name, spec.json())).collect())
        };
        let words = |words: &[String]| Json::List(words.iter().map(|word| text(word)).collect());
        let mut fields = vec![
            field("name", text(&self.name)),
            field("op_type", text(&self.op_type)),
            field("axes", Json::Object(self.axes.iter().map(|(name, axis)| field(name, axis.json())).collect())),
            field("inputs", specs(&self.inputs)),
            field("outputs", specs(&self.outputs)),
        ];
        fields.extend(self.reference.as_deref().map(|code| field("reference", text(code))));
        fields.extend((!self.tags.is_empty()).then(|| field("tags", words(&self.tags))));
        fields.extend(self.description.as_deref().map(|words| field("description", text(words))));
        fields.extend((!self.constraints.is_empty()).then(|| field("constraints", words(&self.constraints))));
        fields.extend(self.extra.iter().map(|(name, value)| field(name, value.clone())));
        Json::Object(fields)
    }

    /// Writes it into a file, whose folder is made.
    ///
    /// # Errors
    /// [`Io`](crate::FlashInferError::Io).
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        write(path.as_ref(), &self.to_json())
    }

    /// Writes it into a file that is not there yet; one that is stays as it is.
    pub(crate) fn keep(&self, path: &Path) -> Result<Kept> {
        let text = self.to_json();
        match fs::read(path) {
            Ok(found) if found == text.as_bytes() => Ok(Kept::Same),
            Ok(_) => Ok(Kept::Other),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                write(path, &text).map(|()| Kept::Written)
            }
            Err(error) => Err(io("reading", path)(error)),
        }
    }

    /// That it obeys a dialect's rules. FlashInfer-Bench's: 11 element types, a reference with a function `run`, axes
    /// that are there, outputs that are no inputs, and constraints that are expressions. FlashInfer's: names alone.
    ///
    /// The Python of the reference is not parsed here: that a line of it begins with `def run(` is what is looked for.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) with the first rule that it breaks.
    pub fn validate(&self, dialect: Dialect) -> Result<()> {
        let refuse = |place: String, found: String, expected: &str, remedy| {
            Err(unfit(&self.what(), place, found, expected, remedy))
        };
        for (place, name) in [("name", &self.name), ("op_type", &self.op_type)] {
            if name.is_empty() {
                return refuse(place.to_owned(), "an empty text".to_owned(), "a name", "name it");
            }
        }
        if dialect == Dialect::FlashInfer {
            return Ok(());
        }
        for (kind, specs) in [("inputs", &self.inputs), ("outputs", &self.outputs)] {
            for (name, spec) in specs.iter() {
                let place = format!("{kind}.{name}");
                if !spec.dtype.is_benchmarked() {
                    let found = format!("the element type {:?}", spec.dtype.name());
                    return refuse(place, found, "one that FlashInfer-Bench has", "read it as FlashInfer's dialect");
                }
                let unknown = spec.shape.iter().flatten().find(|axis| self.axes.get(axis).is_none());
                if let Some(axis) = unknown {
                    return refuse(place, format!("the axis {axis:?}"), "an axis of the definition", "add the axis");
                }
                if kind == "outputs" && self.inputs.get(name).is_some() {
                    return refuse(place, "an input's name".to_owned(), "a name of its own", "rename the output");
                }
            }
        }
        let is_run = |line: &str| {
            let rest = line.strip_prefix("def").and_then(|rest| rest.trim_start().strip_prefix("run"));
            line.starts_with("def ") && rest.is_some_and(|rest| rest.trim_start().starts_with('('))
        };
        match &self.reference {
            Some(code) if code.lines().any(is_run) => {}
            code => {
                let found = code.as_ref().map_or("none", |_| "Python without a line that begins with `def run(`");
                return refuse("reference".to_owned(), found.to_owned(), "a function `run`", "add the function");
            }
        }
        self.constraints.iter().try_for_each(|constraint| Constraint::parse(constraint).map(drop))
    }

    /// The stricter of the dialects whose rules it obeys.
    pub fn dialect(&self) -> Dialect {
        match self.validate(Dialect::FlashInferBench) {
            Ok(()) => Dialect::FlashInferBench,
            Err(_) => Dialect::FlashInfer,
        }
    }

    fn what(&self) -> String {
        format!("the definition {:?}", super::json::shortened(&self.name))
    }

    /// The axes of one size, with it.
    pub fn const_axes(&self) -> Axes {
        let constant = |(name, axis): (&str, &Axis)| match axis {
            Axis::Const { value, .. } => Some((name.to_owned(), *value)),
            Axis::Var { .. } => None,
        };
        self.axes.iter().filter_map(constant).collect()
    }

    /// The names of the axes whose sizes inputs say, in order.
    pub fn var_axes(&self) -> Vec<&str> {
        self.axes.iter().filter(|(_, axis)| matches!(axis, Axis::Var { .. })).map(|(name, _)| name).collect()
    }

    /// The variable axes' sizes by the inputs' shapes, in the definition's order: `None` for a scalar, or for an input
    /// that is left out. Constant axes are compared too, which upstream leaves out.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a missing or surplus input, another rank, a size that is not the
    /// axis's or not that of another input, and a variable axis that no input has.
    pub fn axes_of(&self, shapes: &[Option<&[u64]>]) -> Result<Axes> {
        let refuse = |place: &str, found: String, expected: String| {
            Err(unfit(&self.what(), format!("input {place:?}"), found, expected, SHAPES))
        };
        if shapes.len() != self.inputs.len() {
            let (found, expected) = (format!("{} inputs", shapes.len()), format!("{}", self.inputs.len()));
            return Err(unfit(&self.what(), "the inputs", found, expected, SHAPES));
        }
        let mut axes = Axes::new();
        for ((name, spec), shape) in self.inputs.iter().zip(shapes) {
            let (names, shape) = match (&spec.shape, shape) {
                (Some(names), Some(shape)) => (names, *shape),
                (Some(_), None) if spec.optional => continue,
                (None, None) => continue,
                (Some(names), None) => return refuse(name, "no tensor".to_owned(), format!("one of {names:?}")),
                (None, Some(shape)) => return refuse(name, format!("a tensor {shape:?}"), "a scalar".to_owned()),
            };
            if names.len() != shape.len() {
                return refuse(name, format!("{shape:?}"), format!("{} dimensions, {names:?}", names.len()));
            }
            for (axis, &size) in names.iter().zip(shape) {
                let expected = match self.axes.get(axis) {
                    Some(Axis::Const { value, .. }) => *value,
                    Some(Axis::Var { .. }) => *axes.entry(axis.clone()).or_insert(size),
                    None => return Err(self.no_axis(name, axis)),
                };
                if size != expected {
                    return refuse(name, format!("{size} in the axis {axis:?}"), expected.to_string());
                }
            }
        }
        match self.var_axes().into_iter().find(|&axis| !axes.contains_key(axis)) {
            Some(axis) => {
                let found = format!("no input with the axis {axis:?}");
                Err(unfit(&self.what(), "axes", found, "one that says its size", "add the axis to an input's shape"))
            }
            None => Ok(axes),
        }
    }

    /// As [`axes_of`](Self::axes_of), of inputs. One that is [absent](Input::Absent) must be optional.
    ///
    /// # Errors
    /// As for [`axes_of`](Self::axes_of), and for inputs of other names or in another order than the definition's.
    pub fn axes_of_inputs(&self, inputs: &Named<Input>) -> Result<Axes> {
        if !inputs.names().eq(self.inputs.names()) {
            let found = format!("{:?}", inputs.names().take(20).collect::<Vec<_>>());
            let expected = format!("{:?}", self.inputs.names().take(20).collect::<Vec<_>>());
            return Err(unfit(&self.what(), "the inputs", found, expected, SHAPES));
        }
        let shapes: Vec<_> = inputs.values().map(Input::shape).collect();
        self.axes_of(&shapes)
    }

    fn no_axis(&self, tensor: &str, axis: &str) -> crate::FlashInferError {
        let found = format!("the axis {axis:?}");
        unfit(&self.what(), tensor, found, "an axis of the definition", "add the axis to the definition")
    }

    /// A shape with these sizes for variable axes; `None` for a scalar.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for an axis without a size.
    pub fn shape_of(&self, name: &str, spec: &TensorSpec, axes: &Axes) -> Result<Option<Vec<u64>>> {
        let Some(names) = &spec.shape else { return Ok(None) };
        let size = |axis: &String| match (self.axes.get(axis), axes.get(axis)) {
            (Some(Axis::Const { value, .. }), _) => Ok(*value),
            (Some(Axis::Var { .. }), Some(&size)) => Ok(size),
            (Some(Axis::Var { .. }), None) => {
                let found = format!("no size for the axis {axis:?}");
                Err(unfit(&self.what(), name, found, "one for each variable axis", "add the axis to the workload"))
            }
            (None, _) => Err(self.no_axis(name, axis)),
        };
        names.iter().map(size).collect::<Result<_>>().map(Some)
    }

    /// The inputs' shapes, in order.
    ///
    /// # Errors
    /// As for [`shape_of`](Self::shape_of).
    pub fn input_shapes(&self, axes: &Axes) -> Result<Vec<Option<Vec<u64>>>> {
        self.inputs.iter().map(|(name, spec)| self.shape_of(name, spec, axes)).collect()
    }

    /// The outputs' shapes, in order.
    ///
    /// # Errors
    /// As for [`shape_of`](Self::shape_of).
    pub fn output_shapes(&self, axes: &Axes) -> Result<Vec<Option<Vec<u64>>>> {
        self.outputs.iter().map(|(name, spec)| self.shape_of(name, spec, axes)).collect()
    }

    /// Each constraint with what comes of it for these axes and inputs. An input that is not given leaves what needs it
    /// [unknown](Verdict::Unknown).
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a constraint that is not one of [`Constraint`]'s expressions.
    pub fn check_constraints(&self, axes: &Axes, inputs: &Named<Input>) -> Result<Vec<(&str, Verdict)>> {
        let mut all = self.const_axes();
        all.extend(axes.iter().map(|(name, size)| (name.clone(), *size)));
        let verdict = |text: &String| Constraint::parse(text).map(|constraint| constraint.check(&all, inputs));
        self.constraints.iter().map(|text| Ok((text.as_str(), verdict(text)?))).collect()
    }
}

pub(super) fn optional_text(cursor: &Cursor<'_>, name: &str) -> Result<Option<String>> {
    cursor.given(name).map(|text| text.text()).transpose()
}

/// The fields of an object but these.
fn others(cursor: &Cursor<'_>, known: &[&str]) -> Result<Named<Json>> {
    let others = cursor.fields()?.into_iter().filter(|(name, _)| !known.contains(name));
    Ok(Named::distinct(others.map(|(name, value)| (name.to_owned(), value.json())).collect()))
}

/// Writes a file whole: under another name first, so that nobody reads half of it.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(io("making the folder", folder))?;
    }
    let mut part = path.as_os_str().to_owned();
    part.push(format!(".part{}", std::process::id()));
    let part = Path::new(&part);
    let written = fs::write(part, text).map_err(io("writing", part));
    let written = written.and_then(|()| fs::rename(part, path).map_err(io("renaming to", path)));
    if written.is_err() {
        // Half a file helps nobody; where it cannot be removed either, the error that there is says enough.
        _ = fs::remove_file(part);
    }
    written
}
