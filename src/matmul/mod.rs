//! Products with a weight: `out = x · weightᵀ`, with a bias, and added to what `out` holds.
//!
//! FlashInfer has none for Hopper in BF16 and F16. These are cuBLASLt's, and for up to 32 rows kernels of this crate's own. Which of
//! cuBLASLt's algorithms computes one is chosen once for each size by measuring; the [`Selections`] can be stored, so that
//! another run computes the same bits. Launching one chooses nothing and allocates nothing, so that a CUDA graph can capture it.
//!
//! On the host the [reference](mod@crate::reference) computes them in f64.

use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dtype, Extent, From, Kind, MAX_DIMENSIONS,
    Operand, Pdl, Reports, Role, Row, RunsOn, Size, Strides, Tensor, check,
};
use crate::engine::{Entry, State, refused};
#[cfg(doc)]
use crate::error::FlashInferError;
use crate::error::Result;
use crate::indices::refuse;
use crate::stream::Stream;
use crate::tensor::{DType, Device, TensorMut, TensorRef};

#[cfg(feature = "cudarc")]
mod gpu;
#[cfg(feature = "cudarc")]
mod selections;
#[cfg(feature = "cudarc")]
mod timing;

#[cfg(all(feature = "compute", feature = "cudarc"))]
pub(crate) use gpu::FusedMatMul;
#[cfg(feature = "cudarc")]
pub(crate) use gpu::PlannedMatMul;
#[cfg(feature = "cudarc")]
pub use selections::Selections;

/// The name that errors of a specification carry.
const SPEC: &str = "MatMulSpec";

/// The most that a size may be.
const MOST: i64 = i32::MAX as i64;

/// A product's sizes and types: `out[rows, columns] = x[rows, inner] · weight[columns, inner]ᵀ`.
///
/// ```
/// use flashinfer_rs::DType;
/// use flashinfer_rs::matmul::MatMulSpec;
///
/// // The projection of 4 tokens' 1024 features to 4096, where the tokens lie 2048 elements apart.
/// let spec = MatMulSpec::new(DType::BF16, 4, 4096, 1024)?.with_row_stride(2048)?;
/// // Logits in F32.
/// let logits = MatMulSpec::new(DType::BF16, 4, 151_936, 1024)?.with_f32_out()?;
/// assert_eq!((spec.out(), logits.out()), (DType::BF16, DType::F32));
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatMulSpec {
    rows: i64,
    columns: i64,
    inner: i64,
    row_stride: i64,
    f32_out: bool,
    bias: bool,
    residual: bool,
    dtype: DType,
}

impl MatMulSpec {
    /// A product of `x[rows, inner]` and `weight[columns, inner]`, both of this type, as is the result. Sums are F32's.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for another type than BF16, F16 and F32, and for a size that is not 1 to
    /// 2³¹ - 1.
    pub fn new(dtype: DType, rows: i64, columns: i64, inner: i64) -> Result<Self> {
        if !matches!(dtype, DType::BF16 | DType::F16 | DType::F32) {
            return refuse(SPEC, "dtype", dtype.to_string(), "BF16, F16 or F32");
        }
        for (name, size) in [("rows", rows), ("columns", columns), ("inner", inner)] {
            if !(1..=MOST).contains(&size) {
                return refuse(SPEC, name, size.to_string(), "1 to 2147483647");
            }
        }
        Ok(Self { rows, columns, inner, row_stride: inner, f32_out: false, bias: false, residual: false, dtype })
    }

    /// With rows of `x` that lie so many elements apart: `x` is a part of the columns of a wider tensor.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for less than a row's length, more than 2³¹ - 1, and where rows do not begin
    /// at multiples of 16 bytes though `inner` is a multiple of them.
    pub fn with_row_stride(mut self, elements: i64) -> Result<Self> {
        if !(self.inner..=MOST).contains(&elements) {
            let expected = format!("{}, the length of a row, to {MOST}", self.inner);
            return refuse(SPEC, "row_stride", elements.to_string(), expected);
        }
        let vector = alignment(self.dtype, self.inner) / self.dtype.size() as i64;
        if elements % vector != 0 {
            let expected = format!("a multiple of {vector} elements, so that each row is aligned as the first");
            return refuse(SPEC, "row_stride", elements.to_string(), expected);
        }
        // Of one row nothing lies apart.
        if self.rows > 1 {
            self.row_stride = elements;
        }
        Ok(self)
    }

    /// With a result in F32, which is rounded no more: logits.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) beside a bias or a residual, which are of the result's type.
    pub fn with_f32_out(self) -> Result<Self> {
        Self { f32_out: true, ..self }.checked()
    }

    /// With a bias of `columns` numbers, which is added to each row before the result is rounded.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) beside a result in F32 of other types.
    pub fn with_bias(self) -> Result<Self> {
        Self { bias: true, ..self }.checked()
    }

    /// Added to what `out` holds, before the result is rounded: the residual is updated in place.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) beside a result in F32 of other types.
    pub fn with_residual(self) -> Result<Self> {
        Self { residual: true, ..self }.checked()
    }

    fn checked(self) -> Result<Self> {
        if self.out() == self.dtype || !(self.bias || self.residual) {
            return Ok(self);
        }
        let found = format!("F32 of {}, with a bias or a residual", self.dtype);
        refuse(SPEC, "out", found, format!("{} beside a bias or a residual", self.dtype))
    }

    /// The rows of `x` and of the result: tokens.
    pub fn rows(&self) -> i64 {
        self.rows
    }

    /// The columns of the result: the weight's rows.
    pub fn columns(&self) -> i64 {
        self.columns
    }

    /// The length of the rows of `x` and of the weight, over which is summed.
    pub fn inner(&self) -> i64 {
        self.inner
    }

    /// How far apart the rows of `x` lie, in elements.
    pub fn row_stride(&self) -> i64 {
        self.row_stride
    }

    /// The type of `x` and of the weight.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The result's type.
    pub fn out(&self) -> DType {
        if self.f32_out { DType::F32 } else { self.dtype }
    }

    /// Whether a bias is added.
    pub fn has_bias(&self) -> bool {
        self.bias
    }

    /// Whether what `out` holds is added.
    pub fn has_residual(&self) -> bool {
        self.residual
    }
}

/// What rows of so many elements are aligned to, in bytes: 16, or the most that their length allows.
fn alignment(dtype: DType, length: i64) -> i64 {
    let (size, mut dimensions) = (dtype.size(), [1; MAX_DIMENSIONS]);
    dimensions[0] = length;
    along(0).elements(&dimensions, size) * size as i64
}

const fn along(dimension: usize) -> Alignment {
    Alignment::Access { dimension, bytes: 16 }
}

impl std::fmt::Display for MatMulSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { rows, columns, inner, row_stride, dtype, .. } = self;
        write!(f, "{dtype}[{rows}, {inner}] · {dtype}[{columns}, {inner}]ᵀ to {}", self.out())?;
        if row_stride != inner {
            write!(f, ", rows {row_stride} apart")?;
        }
        f.write_str(if self.bias { ", a bias" } else { "" })?;
        f.write_str(if self.residual { ", a residual" } else { "" })
    }
}

/// A product that can be launched: a specification, and what was chosen for it on a GPU.
///
/// ```
/// use flashinfer_rs::matmul::{MatMul, MatMulSpec};
/// use flashinfer_rs::{DType, FlashInferRuntime, RuntimeConfig, Stream, TensorMut, TensorRef};
///
/// FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// // On the host; MatMul::new is for a GPU.
/// let product = MatMul::on_host(MatMulSpec::new(DType::F32, 2, 3, 2)?)?;
/// let (x, weight) = ([1.0f32, 2.0, 3.0, 4.0], [1.0f32, 0.0, 0.0, 1.0, 1.0, 1.0]);
/// let mut out = [0.0f32; 6];
/// let mut results = TensorMut::from_slice(&mut out, &[2, 3])?;
/// let (x, weight) = (TensorRef::from_slice(&x, &[2, 2])?, TensorRef::from_slice(&weight, &[3, 2])?);
/// product.run(&mut results, &x, &weight, None, None, Stream::NULL)?;
/// assert_eq!(out, [1.0, 2.0, 3.0, 3.0, 4.0, 7.0]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone)]
pub struct MatMul {
    spec: MatMulSpec,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Host,
    #[cfg(feature = "cudarc")]
    Gpu(PlannedMatMul),
}

impl MatMul {
    /// For tensors on the host, which the [reference](mod@crate::reference) computes with, in f64.
    ///
    /// # Errors
    /// None so far.
    pub fn on_host(spec: MatMulSpec) -> Result<Self> {
        Ok(Self { spec, place: Place::Host })
    }

    /// For tensors on the stream's GPU. Where the selections have none for this specification, algorithms are measured on scratch
    /// memory of the weight's size or 128 MiB, and the fastest one is added to them; this takes some ten milliseconds and waits for
    /// them. One that they have is run once likewise, so that its kernels are loaded before a graph captures them.
    ///
    /// On Hopper and newer, products of up to 32 rows in BF16 and F16, where `inner` is a multiple of 8, are computed by kernels of this
    /// crate's own, whatever time cuBLASLt would take: a row's result then has the same bits for any number of rows up to 32. All others
    /// are cuBLASLt's, whose library is loaded with the first of them.
    ///
    /// # Errors
    /// [`CublasLtMissing`](FlashInferError::CublasLtMissing) where only cuBLASLt computes it; [`InvalidArgument`](FlashInferError::InvalidArgument) for selections that were
    /// made on another GPU or with another release of cuBLASLt, for what has no algorithm, and for a stream that captures;
    /// [`CublasLt`](FlashInferError::CublasLt); [`Cuda`](FlashInferError::Cuda) where there is no memory; or why there is no GPU.
    #[cfg(feature = "cudarc")]
    pub fn new(
        spec: MatMulSpec,
        stream: &std::sync::Arc<cudarc::driver::CudaStream>,
        selections: &mut Selections,
    ) -> Result<Self> {
        Ok(Self { spec, place: Place::Gpu(PlannedMatMul::new(spec, stream, selections)?) })
    }

    /// The specification that it is for.
    pub fn spec(&self) -> &MatMulSpec {
        &self.spec
    }

    /// How many bytes of scratch memory a launch uses; 0 for none.
    pub fn workspace_bytes(&self) -> usize {
        match &self.place {
            Place::Host => 0,
            #[cfg(feature = "cudarc")]
            Place::Gpu(planned) => planned.workspace_bytes(),
        }
    }

    /// The product. Asynchronous on `stream`.
    ///
    /// | tensor | shape | dtype | |
    /// |---|---|---|---|
    /// | `out` | `[rows, columns]` | the specification's | written, and read first where there is a residual; contiguous |
    /// | `x` | `[rows, inner]` | the specification's | read; rows as far apart as the specification says |
    /// | `weight` | `[columns, inner]` | as `x` | read; contiguous |
    /// | `bias` | `[columns]` | as `x` | read; where the specification has one |
    /// | `workspace` | `[bytes]` | U8 | scratch memory of [`workspace_bytes`](Self::workspace_bytes) or more, which no other launch may use at the same time |
    ///
    /// On a GPU addresses are aligned to 16 bytes, or to what the length of a row allows; the workspace to 256 bytes.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for tensors that are not of the specification: of another shape, type,
    /// layout, device or stream; [`CublasLt`](FlashInferError::CublasLt); [`Cuda`](FlashInferError::Cuda);
    /// [`ContextLost`](FlashInferError::ContextLost).
    pub fn run(
        &self,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &TensorRef<'_>,
        bias: Option<&TensorRef<'_>>,
        workspace: Option<&mut TensorMut<'_>>,
        stream: Stream<'_>,
    ) -> Result<()> {
        // SAFETY: not programmatically dependent, since the kernel ahead may have written the weight.
        unsafe { self.run_early(out, x, weight, bias, workspace, stream, false) }
    }

    /// Whether its kernel may be launched programmatically dependent, and lets the kernel behind it start before it has ended.
    #[cfg(feature = "cudarc")]
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs know what is ahead"))]
    pub(crate) fn waits(&self) -> bool {
        matches!(&self.place, Place::Gpu(planned) if planned.waits())
    }

    /// As [`run`](Self::run); with `early` programmatically dependent, where its kernel [waits](Self::waits).
    ///
    /// # Safety
    /// With `early` the kernel ahead, and those that it may itself run beside, must not write the weight or the bias.
    #[allow(clippy::too_many_arguments, reason = "a call's tensors, its stream, and how it is launched")]
    pub(crate) unsafe fn run_early(
        &self,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &TensorRef<'_>,
        bias: Option<&TensorRef<'_>>,
        workspace: Option<&mut TensorMut<'_>>,
        stream: Stream<'_>,
        early: bool,
    ) -> Result<()> {
        let workspace = workspace.as_deref().map_or(Operand::Absent, TensorMut::operand);
        let operands =
            [x.operand(), weight.operand(), bias.map_or(Operand::Absent, TensorRef::operand), out.operand(), workspace];
        let entry = self.spec.entry();
        let checked =
            check(entry.row, &operands, stream).map_err(|fault| refused(entry.row, &operands, stream, fault))?;
        self.spec.check_tensors(entry.row, &operands, &checked.dimensions)?;
        let device = match &self.place {
            Place::Host => Device::Cpu,
            #[cfg(feature = "cudarc")]
            Place::Gpu(planned) => planned.device(),
        };
        if checked.device != device {
            let expected = format!("memory of {device}, which this was made for");
            return refuse(entry.row.function, entry.row.arguments[X].name, format!("on {}", checked.device), expected);
        }
        match &self.place {
            Place::Host => {
                let _ = early;
                // SAFETY: the call keeps its row, and nothing in the tensors steers the reference.
                unsafe { entry.call_checked(&operands, &checked, stream) }
            }
            #[cfg(feature = "cudarc")]
            // SAFETY: the caller's promise.
            Place::Gpu(planned) => unsafe { planned.run(entry.row, &operands, stream, early) },
        }
    }
}

// The arguments of the rows.
const X: usize = 0;
const WEIGHT: usize = 1;
const BIAS: usize = 2;
const OUT: usize = 3;
const WORKSPACE: usize = 4;

// Their dimensions.
const ROWS: usize = 0;
const INNER: usize = 1;
const COLUMNS: usize = 2;

/// The types that there are; a specification says which.
const TYPES: &[DType] = &[DType::BF16, DType::F16, DType::F32];

const fn argument(name: &'static str, tensor: Tensor) -> Argument {
    Argument { name, kind: Kind::Tensor(tensor) }
}

const fn arguments(out: Role) -> [Argument; 5] {
    const READ: Tensor = Tensor {
        role: Role::In,
        optional: false,
        dtype: Dtype::As(X),
        shape: &[],
        strides: Strides::Contiguous,
        alignment: along(INNER),
        contents: Contents::Uniform(1.0),
    };
    [
        argument(
            "x",
            Tensor {
                dtype: Dtype::OneOf(TYPES),
                shape: &[Size::Of(ROWS), Size::Of(INNER)],
                strides: Strides::Rows,
                ..READ
            },
        ),
        argument("weight", Tensor { shape: &[Size::Of(COLUMNS), Size::Of(INNER)], ..READ }),
        argument("bias", Tensor { optional: true, shape: &[Size::Of(COLUMNS)], alignment: along(COLUMNS), ..READ }),
        argument(
            "out",
            Tensor {
                role: out,
                dtype: Dtype::OneOf(TYPES),
                shape: &[Size::Of(ROWS), Size::Of(COLUMNS)],
                alignment: along(COLUMNS),
                ..READ
            },
        ),
        argument(
            "workspace",
            Tensor {
                role: Role::Workspace,
                optional: true,
                dtype: Dtype::Only(DType::U8),
                shape: &[Size::Of(3)],
                alignment: Alignment::Bytes(256),
                ..READ
            },
        ),
    ]
}

const fn dimension(name: &'static str, from: From, least: i64, most: i64) -> Dimension {
    Dimension { name, from, least, most, examples: &[] }
}

const MATMUL: Row = Row {
    kernel: "matmul",
    function: "matmul",
    library: "",
    feature: "cudarc",
    summary: "out = x · weightᵀ, and a bias.",
    source: "cublasLt.h of CUDA 13",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &arguments(Role::Out),
    lead: X,
    dimensions: &[
        dimension("rows", From::Shape(X, 0), 1, MOST),
        dimension("inner", From::Shape(X, 1), 1, MOST),
        dimension("columns", From::Shape(WEIGHT, 0), 1, MOST),
        dimension("bytes of the workspace", From::Shape(WORKSPACE, 0), 0, i64::MAX / 8),
    ],
    relations: &[],
    extent: Extent { most: i64::MAX / 8, split: false, stride: MOST },
    pdl: Pdl::None,
    attributes: Attributes::None,
    reports: Reports::Status,
    uses_current_device: true,
    convention: Convention::Views,
    hazards: &[],
    tolerance: [0.0, 0.0],
    tests: "`tests/matmul.rs`, `tests/matmul_gpu.rs`",
};

const MATMUL_ADD: Row = Row {
    kernel: "matmul_add",
    function: "matmul_add",
    summary: "out = out + x · weightᵀ, and a bias.",
    arguments: &arguments(Role::InPlace),
    ..MATMUL
};

impl MatMulSpec {
    fn entry(&self) -> Entry {
        static STATES: [State; 2] = [State::new(), State::new()];
        const ROWS: [&Row; 2] = [&MATMUL, &MATMUL_ADD];
        let which = usize::from(self.residual);
        Entry { row: ROWS[which], state: &STATES[which] }
    }

    /// What the row leaves open: sizes, types, the bias and the stride are the specification's.
    fn check_tensors(
        &self,
        row: &'static Row,
        operands: &[Operand<'_, '_>; 5],
        dimensions: &crate::contract::Dimensions,
    ) -> Result<()> {
        let said = [(ROWS, self.rows), (INNER, self.inner), (COLUMNS, self.columns)];
        if let Some((which, size)) = said.into_iter().find(|&(which, size)| dimensions[which] != size) {
            let expected = format!("{size}, as the specification says");
            return refuse(row.function, row.dimensions[which].name, dimensions[which].to_string(), expected);
        }
        for (which, dtype) in [(X, self.dtype), (OUT, self.out())] {
            if let Some(layout) = operands[which].layout()
                && !layout.is_of(dtype)
            {
                let expected = format!("{dtype}, as the specification says");
                return refuse(row.function, row.arguments[which].name, layout.dtype().to_string(), expected);
            }
        }
        if let Some(x) = operands[X].layout()
            && self.rows > 1
            && x.stride(0) != self.row_stride
        {
            let found = format!("rows {} elements apart", x.stride(0));
            return refuse(
                row.function,
                row.arguments[X].name,
                found,
                format!("{}, as the specification says", self.row_stride),
            );
        }
        match (operands[BIAS].layout().is_some(), self.bias) {
            (true, false) => refuse(row.function, "bias", "a tensor".to_owned(), "none: the specification has no bias"),
            (false, true) => refuse(row.function, "bias", "absent".to_owned(), "the bias that the specification has"),
            _ => Ok(()),
        }
    }
}
