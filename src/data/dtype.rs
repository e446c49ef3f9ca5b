//! The element types of the dataset, by their names there.

use std::fmt;

use crate::ffi::dlpack::DLDataType;
use crate::tensor::DType;

/// An element type as definitions and safetensors files name it: more than kernels of this crate compute with.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DataType {
    /// `float64`. FlashInfer's dialect alone has it.
    Float64,
    /// `float32`.
    Float32,
    /// `float16`.
    Float16,
    /// `bfloat16`.
    Bfloat16,
    /// `float8_e4m3fn`: no infinities.
    Float8E4m3fn,
    /// `float8_e5m2`.
    Float8E5m2,
    /// `float4_e2m1`: two elements in a byte; shapes count the bytes.
    Float4E2m1,
    /// `int64`.
    Int64,
    /// `int32`.
    Int32,
    /// `int16`.
    Int16,
    /// `int8`.
    Int8,
    /// `uint64`. FlashInfer's dialect alone has it.
    Uint64,
    /// `uint32`. FlashInfer's dialect alone has it.
    Uint32,
    /// `uint16`. FlashInfer's dialect alone has it.
    Uint16,
    /// `uint8`. FlashInfer's dialect alone has it.
    Uint8,
    /// `bool`: a byte that is 0 or 1.
    Bool,
    /// Any other word, such as FlashInfer's `unknown`: no tensor can be made of it.
    Other(String),
}

/// What is known of an element type.
struct Facts {
    dtype: DataType,
    /// The definitions' name.
    name: &'static str,
    /// The safetensors format's name.
    safetensors: &'static str,
    /// DLPack's code, bits and lanes.
    dlpack: (u8, u8, u16),
    /// This crate's type.
    own: Option<DType>,
    /// Whether FlashInfer-Bench knows it.
    benchmarked: bool,
}

const fn row(
    dtype: DataType,
    name: &'static str,
    safetensors: &'static str,
    dlpack: (u8, u8, u16),
    own: Option<DType>,
    benchmarked: bool,
) -> Facts {
    Facts { dtype, name, safetensors, dlpack, own, benchmarked }
}

static TABLE: [Facts; 16] = [
    row(DataType::Float64, "float64", "F64", (2, 64, 1), Some(DType::F64), false),
    row(DataType::Float32, "float32", "F32", (2, 32, 1), Some(DType::F32), true),
    row(DataType::Float16, "float16", "F16", (2, 16, 1), Some(DType::F16), true),
    row(DataType::Bfloat16, "bfloat16", "BF16", (4, 16, 1), Some(DType::BF16), true),
    row(DataType::Float8E4m3fn, "float8_e4m3fn", "F8_E4M3", (10, 8, 1), Some(DType::F8E4M3), true),
    row(DataType::Float8E5m2, "float8_e5m2", "F8_E5M2", (12, 8, 1), Some(DType::F8E5M2), true),
    row(DataType::Float4E2m1, "float4_e2m1", "F4", (17, 4, 2), None, true),
    row(DataType::Int64, "int64", "I64", (0, 64, 1), Some(DType::I64), true),
    row(DataType::Int32, "int32", "I32", (0, 32, 1), Some(DType::I32), true),
    row(DataType::Int16, "int16", "I16", (0, 16, 1), None, true),
    row(DataType::Int8, "int8", "I8", (0, 8, 1), None, true),
    row(DataType::Uint64, "uint64", "U64", (1, 64, 1), None, false),
    row(DataType::Uint32, "uint32", "U32", (1, 32, 1), None, false),
    row(DataType::Uint16, "uint16", "U16", (1, 16, 1), None, false),
    row(DataType::Uint8, "uint8", "U8", (1, 8, 1), Some(DType::U8), false),
    row(DataType::Bool, "bool", "BOOL", (6, 8, 1), None, true),
];

impl DataType {
    fn facts(&self) -> Option<&'static Facts> {
        TABLE.iter().find(|row| row.dtype == *self)
    }

    /// The type of this name; [`Other`](Self::Other) for a name that is not known.
    pub fn from_name(name: &str) -> Self {
        match TABLE.iter().find(|row| row.name == name) {
            Some(row) => row.dtype.clone(),
            None => Self::Other(name.to_owned()),
        }
    }

    pub(crate) fn from_safetensors(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.safetensors == name).map(|row| row.dtype.clone())
    }

    pub(crate) fn safetensors(&self) -> Option<&'static str> {
        self.facts().map(|row| row.safetensors)
    }

    /// The definitions' name for it.
    pub fn name(&self) -> &str {
        match self {
            Self::Other(name) => name,
            _ => self.facts().map_or("unknown", |row| row.name),
        }
    }

    /// DLPack's code, bits and lanes for what a shape counts one of; `None` for a type that is not known.
    pub fn dlpack(&self) -> Option<(u8, u8, u16)> {
        self.facts().map(|row| row.dlpack)
    }

    /// The type of DLPack's code, bits and lanes.
    pub(crate) fn from_dlpack(found: DLDataType) -> Option<Self> {
        let found = (found.code, found.bits, found.lanes);
        TABLE.iter().find(|row| row.dlpack == found).map(|row| row.dtype.clone())
    }

    /// As [`dlpack`](Self::dlpack), as it crosses the boundary.
    pub(crate) fn to_dl(&self) -> Option<DLDataType> {
        self.dlpack().map(|(code, bits, lanes)| DLDataType { code, bits, lanes })
    }

    /// The bytes of what a shape counts one of; `None` for a type that is not known.
    pub fn size(&self) -> Option<usize> {
        self.dlpack().map(|(_, bits, lanes)| usize::from(bits) * usize::from(lanes) / 8)
    }

    /// This crate's type of the same elements, where it has one.
    pub fn to_dtype(&self) -> Option<DType> {
        self.facts().and_then(|row| row.own)
    }

    /// Whether FlashInfer-Bench's models know it.
    pub fn is_benchmarked(&self) -> bool {
        self.facts().is_some_and(|row| row.benchmarked)
    }

    /// Whether its elements are floating-point numbers.
    pub fn is_float(&self) -> bool {
        matches!(self.dlpack(), Some((2 | 4 | 10 | 12 | 17, ..)))
    }
}

impl From<DType> for DataType {
    fn from(dtype: DType) -> Self {
        match TABLE.iter().find(|row| row.own == Some(dtype)) {
            Some(row) => row.dtype.clone(),
            None => Self::Other(dtype.to_string()),
        }
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
