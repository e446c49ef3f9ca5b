//! Which algorithm was chosen for which product, as JSON that reads back.

use super::{MatMulSpec, TYPES};
use crate::cublaslt::{Algorithm, Candidate};
use crate::data::json::{Cursor, Document, Json, field, text};
use crate::error::Result;
use crate::glue::gemv::FewRows;
use crate::indices::refuse;
use crate::tensor::DType;

/// The version of the JSON that is written and read.
const VERSION: u64 = 1;
/// The most products that a file may have: with 13 values each, as many as JSON may have.
const MOST: usize = 1 << 16;
const AGAIN: &str = "select again, with Selections::new, and store what it becomes";

/// Which algorithm computes which product, on one kind of GPU: what [`MatMul::new`](super::MatMul::new) measured.
///
/// As JSON they are stored and read back, so that another run on such a GPU launches the same kernels and computes the same bits, and
/// measures nothing. An algorithm that was read is used only where cuBLASLt itself offers it for the product, so that a file can
/// choose badly, but do no harm. One that was cut off in the middle is refused; where several processes share one, each writes a
/// file of its own beside it and renames that.
///
/// ```
/// use flashinfer_rs::matmul::Selections;
///
/// let selections = Selections::new();
/// let stored = selections.to_json();
/// assert_eq!(Selections::parse(&stored)?, selections);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Selections {
    /// The GPU that was measured, once one was.
    gpu: Option<Gpu>,
    chosen: Vec<(MatMulSpec, Chosen)>,
}

/// A kind of GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gpu {
    pub(crate) name: String,
    pub(crate) capability: (i32, i32),
    pub(crate) multiprocessors: i64,
}

impl std::fmt::Display for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, capability: (major, minor), multiprocessors } = self;
        write!(f, "{name}, compute capability {major}.{minor}, {multiprocessors} multiprocessors")
    }
}

/// What was chosen, and how long it took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Chosen {
    pub(crate) by: By,
    pub(crate) microseconds: f64,
}

/// What computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// An algorithm of this release of cuBLASLt.
    CublasLt { version: usize, candidate: Candidate },
    /// The kernel of this crate's own that has this name.
    FewRows(&'static str),
}

impl Selections {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.chosen.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.chosen.is_empty()
    }

    /// How long the product took where it was measured, in microseconds: one of many that follow one another in a graph, with
    /// weights that are not in the GPU's cache. `None` for a product that none was selected for.
    pub fn microseconds(&self, spec: &MatMulSpec) -> Option<f64> {
        Some(self.chosen(spec)?.microseconds)
    }

    pub(crate) fn chosen(&self, spec: &MatMulSpec) -> Option<Chosen> {
        self.chosen.iter().find(|(known, _)| known == spec).map(|(_, chosen)| *chosen)
    }

    /// That they were made on such a GPU, or anywhere where there are none.
    pub(crate) fn agree(&self, gpu: &Gpu) -> Result<()> {
        match &self.gpu {
            Some(made) if made != gpu => {
                let expected = format!("those of {gpu}: {AGAIN}");
                refuse("MatMul::new", "selections", format!("made on {made}"), expected)
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn add(&mut self, gpu: Gpu, spec: MatMulSpec, chosen: Chosen) {
        self.gpu = Some(gpu);
        self.chosen.push((spec, chosen));
    }

    /// As JSON.
    pub fn to_json(&self) -> String {
        let number = |number: i64| Json::Int(number.into());
        let gpu = self.gpu.as_ref().map_or(Json::Null, |gpu| {
            Json::Object(vec![
                field("name", text(&gpu.name)),
                field("major", number(gpu.capability.0.into())),
                field("minor", number(gpu.capability.1.into())),
                field("multiprocessors", number(gpu.multiprocessors)),
            ])
        });
        let products = self.chosen.iter().map(|(spec, chosen)| {
            let mut fields = vec![
                field("rows", number(spec.rows)),
                field("columns", number(spec.columns)),
                field("inner", number(spec.inner)),
                field("row_stride", number(spec.row_stride)),
                field("dtype", text(&spec.dtype.to_string())),
                field("f32_out", Json::Bool(spec.f32_out)),
                field("bias", Json::Bool(spec.bias)),
                field("residual", Json::Bool(spec.residual)),
                field("microseconds", Json::Float(chosen.microseconds)),
            ];
            match chosen.by {
                By::CublasLt { version, candidate } => fields.extend([
                    field("cublaslt", number(version as i64)),
                    field("algorithm", text(&hexadecimal(&candidate.algorithm))),
                    field("workspace", number(candidate.workspace as i64)),
                ]),
                By::FewRows(kernel) => fields.push(field("kernel", text(kernel))),
            }
            Json::Object(fields)
        });
        let document = [
            field("version", number(VERSION as i64)),
            field("gpu", gpu),
            field("products", Json::List(products.collect())),
        ];
        Json::Object(document.into()).pretty()
    }

    /// Reads what [`to_json`](Self::to_json) wrote.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for what is no JSON or has another version, for a field that is missing, unknown or
    /// out of bounds, and for a product that occurs twice. It names the line.
    pub fn parse(json: &str) -> Result<Self> {
        let document = Document::parse("the selections", json.as_bytes(), 1)?;
        let root = document.root();
        let version = root.need("version")?;
        if version.size()? != VERSION {
            return Err(version.refuse(version.size()?.to_string(), format!("version {VERSION}"), AGAIN));
        }
        known(&root, &["version", "gpu", "products"])?;
        let gpu = root.need("gpu")?;
        let gpu = if gpu.is_null() { None } else { Some(Gpu::read(&gpu)?) };
        let products = root.need("products")?;
        let items = products.items()?;
        if items.len() > MOST || (gpu.is_none() && !items.is_empty()) {
            let expected = format!("at most {MOST} products, and none without a GPU that they were measured on");
            return Err(products.refuse(format!("{} products", items.len()), expected, AGAIN));
        }
        let mut seen = std::collections::HashSet::with_capacity(items.len());
        let mut chosen = Vec::with_capacity(items.len());
        for item in &items {
            let (spec, by) = product(item)?;
            if !seen.insert(spec) {
                return Err(item.refuse(format!("{spec} a second time"), "each product once", "remove one of them"));
            }
            chosen.push((spec, by));
        }
        Ok(Self { gpu, chosen })
    }
}

impl Gpu {
    fn read(gpu: &Cursor<'_>) -> Result<Self> {
        known(gpu, &["name", "major", "minor", "multiprocessors"])?;
        let version = |name| Ok::<_, crate::FlashInferError>(size(gpu, name, 1000)? as i32);
        let name = gpu.need("name")?.word()?;
        let (capability, multiprocessors) =
            ((version("major")?, version("minor")?), size(gpu, "multiprocessors", 1 << 20)?);
        Ok(Self { name, capability, multiprocessors })
    }
}

/// A field that is a whole number of at most so much.
fn size(of: &Cursor<'_>, name: &str, most: u64) -> Result<i64> {
    let cursor = of.need(name)?;
    let size = cursor.size()?;
    if size > most {
        return Err(cursor.refuse(size.to_string(), format!("at most {most}"), "correct the value"));
    }
    Ok(size as i64)
}

/// That an object has no fields but these.
fn known(of: &Cursor<'_>, names: &[&str]) -> Result<()> {
    match of.fields()?.iter().find(|(name, _)| !names.contains(name)) {
        None => Ok(()),
        Some((name, cursor)) => {
            let found = format!("a field {:?}", crate::data::json::shortened(name));
            Err(cursor.refuse(found, format!("no other fields than {}", names.join(", ")), "remove the field"))
        }
    }
}

fn product(item: &Cursor<'_>) -> Result<(MatMulSpec, Chosen)> {
    const FIELDS: [&str; 13] = [
        "rows",
        "columns",
        "inner",
        "row_stride",
        "dtype",
        "f32_out",
        "bias",
        "residual",
        "microseconds",
        "cublaslt",
        "algorithm",
        "workspace",
        "kernel",
    ];
    known(item, &FIELDS)?;
    let dtype = item.need("dtype")?;
    let named = dtype.word()?;
    let known: Option<DType> = TYPES.iter().copied().find(|known| known.to_string() == named);
    let Some(known) = known else {
        return Err(dtype.refuse(format!("{named:?}"), "BF16, F16 or F32", "correct the value"));
    };
    let [rows, columns, inner, row_stride] =
        ["rows", "columns", "inner", "row_stride"].map(|name| size(item, name, i32::MAX as u64));
    let [f32_out, bias, residual] = ["f32_out", "bias", "residual"].map(|name| item.need(name)?.flag());
    // What a specification cannot be, said with the place.
    let said = |error: crate::FlashInferError| item.refuse(error.to_string(), "a product", "correct the value");
    let mut spec = MatMulSpec::new(known, rows?, columns?, inner?).and_then(|spec| spec.with_row_stride(row_stride?));
    if f32_out? {
        spec = spec.and_then(MatMulSpec::with_f32_out);
    }
    if bias? {
        spec = spec.and_then(MatMulSpec::with_bias);
    }
    if residual? {
        spec = spec.and_then(MatMulSpec::with_residual);
    }
    let spec = spec.map_err(said)?;
    let time = item.need("microseconds")?;
    let microseconds = time.figure()?;
    if !(microseconds.is_finite() && microseconds >= 0.0) {
        return Err(time.refuse(microseconds.to_string(), "a number from 0 on", "correct the value"));
    }
    let by = match item.get("kernel") {
        Some(kernel) => own(item, &kernel)?,
        None => of_cublaslt(item)?,
    };
    Ok((spec, Chosen { by, microseconds }))
}

/// A kernel of this crate's own.
fn own(item: &Cursor<'_>, kernel: &Cursor<'_>) -> Result<By> {
    if let Some(other) = ["cublaslt", "algorithm", "workspace"].into_iter().find_map(|name| item.get(name)) {
        return Err(other.refuse("a field of cuBLASLt's beside a kernel", "one of the two", "remove the other"));
    }
    match FewRows::known(&kernel.word()?) {
        Some(kernel) => Ok(By::FewRows(kernel)),
        None => Err(kernel.refuse("another kernel", "one that this crate has", AGAIN)),
    }
}

fn of_cublaslt(item: &Cursor<'_>) -> Result<By> {
    let words = item.need("algorithm")?;
    let Some(algorithm) = algorithm(&words.text()?) else {
        return Err(words.refuse("another text", "128 hexadecimal digits", AGAIN));
    };
    let candidate = Candidate { algorithm, workspace: size(item, "workspace", super::gpu::MOST_WORKSPACE)? as usize };
    Ok(By::CublasLt { version: size(item, "cublaslt", u32::MAX.into())? as usize, candidate })
}

fn hexadecimal(algorithm: &Algorithm) -> String {
    algorithm.iter().map(|word| format!("{word:016x}")).collect()
}

fn algorithm(text: &str) -> Option<Algorithm> {
    if text.len() != 128 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut words = [0; 8];
    for (word, digits) in words.iter_mut().zip(text.as_bytes().chunks_exact(16)) {
        *word = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(words)
}
