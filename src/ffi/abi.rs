//! The layouts of `tvm/ffi/c_api.h`, 64-bit, each pinned by assertions.

use std::ffi::{c_char, c_int, c_void};
use std::mem::{offset_of, size_of};

use super::dlpack::{DLDataType, DLDevice, DLTensor};

/// `TVMFFITypeIndex`: what an [`Any`] holds.
pub(crate) mod type_index {
    pub(crate) const NONE: i32 = 0;
    pub(crate) const INT: i32 = 1;
    pub(crate) const BOOL: i32 = 2;
    pub(crate) const FLOAT: i32 = 3;
    pub(crate) const OPAQUE_PTR: i32 = 4;
    pub(crate) const DATA_TYPE: i32 = 5;
    pub(crate) const DEVICE: i32 = 6;
    pub(crate) const DL_TENSOR_PTR: i32 = 7;
    pub(crate) const RAW_STR: i32 = 8;
    pub(crate) const BYTE_ARRAY_PTR: i32 = 9;
    pub(crate) const RVALUE_REF: i32 = 10;
    pub(crate) const SMALL_STR: i32 = 11;
    pub(crate) const SMALL_BYTES: i32 = 12;
    /// From here on the payload is a reference-counted object.
    pub(crate) const STATIC_OBJECT_BEGIN: i32 = 64;
    pub(crate) const STR: i32 = 65;
    pub(crate) const BYTES: i32 = 66;
    pub(crate) const ERROR: i32 = 67;
    pub(crate) const FUNCTION: i32 = 68;
    pub(crate) const SHAPE: i32 = 69;
    pub(crate) const TENSOR: i32 = 70;
    pub(crate) const ARRAY: i32 = 71;
    pub(crate) const MAP: i32 = 72;
    pub(crate) const MODULE: i32 = 73;
    pub(crate) const OPAQUE_PY_OBJECT: i32 = 74;
    /// From 0.1.9 on.
    pub(crate) const LIST: i32 = 75;
    pub(crate) const DICT: i32 = 76;
}

/// The name of a type whose index is the same in every process and from 0.1.3 on; those of other types are registered.
pub(crate) const fn type_key(index: i32) -> Option<&'static str> {
    Some(match index {
        type_index::NONE => "None",
        type_index::INT => "int",
        type_index::BOOL => "bool",
        type_index::FLOAT => "float",
        type_index::OPAQUE_PTR => "void*",
        type_index::DATA_TYPE => "DataType",
        type_index::DEVICE => "Device",
        type_index::DL_TENSOR_PTR => "DLTensor*",
        type_index::RAW_STR => "const char*",
        type_index::BYTE_ARRAY_PTR => "TVMFFIByteArray*",
        type_index::RVALUE_REF => "ObjectRValueRef",
        type_index::SMALL_STR => "ffi.SmallStr",
        type_index::SMALL_BYTES => "ffi.SmallBytes",
        type_index::STATIC_OBJECT_BEGIN => "ffi.Object",
        type_index::STR => "ffi.String",
        type_index::BYTES => "ffi.Bytes",
        type_index::ERROR => "ffi.Error",
        type_index::FUNCTION => "ffi.Function",
        type_index::SHAPE => "ffi.Shape",
        type_index::TENSOR => "ffi.Tensor",
        type_index::ARRAY => "ffi.Array",
        type_index::MAP => "ffi.Map",
        type_index::MODULE => "ffi.Module",
        type_index::OPAQUE_PY_OBJECT => "ffi.OpaquePyObject",
        type_index::LIST => "ffi.List",
        type_index::DICT => "ffi.Dict",
        _ => return None,
    })
}

/// `TVMFFIAny`: one argument or result.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Any {
    pub(crate) type_index: i32,
    /// Zero, except that a small string keeps its length here.
    pub(crate) extra: u32,
    pub(crate) payload: Payload,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union Payload {
    pub(crate) int: i64,
    pub(crate) float: f64,
    pub(crate) pointer: *mut c_void,
    pub(crate) c_str: *const c_char,
    pub(crate) byte_array: *const ByteArray,
    pub(crate) tensor: *const DLTensor,
    pub(crate) object: *mut Object,
    pub(crate) data_type: DLDataType,
    pub(crate) device: DLDevice,
    pub(crate) bytes: [u8; 8],
}

impl Any {
    /// Kind and payload of nothing. All eight payload bytes are zero.
    pub(crate) const NONE: Self = Self::new(type_index::NONE, Payload { int: 0 });

    /// Whether this is nothing.
    #[inline(always)]
    pub(crate) fn is_none(&self) -> bool {
        self.type_index == type_index::NONE
    }

    pub(crate) const fn new(type_index: i32, payload: Payload) -> Self {
        Self { type_index, extra: 0, payload }
    }
}

/// `TVMFFIObject`: the header of every reference-counted object.
#[repr(C)]
pub(crate) struct Object {
    pub(crate) combined_ref_count: u64,
    pub(crate) type_index: i32,
    pub(crate) padding: u32,
    pub(crate) deleter: Option<unsafe extern "C" fn(*mut c_void, c_int)>,
}

/// `TVMFFIByteArray`: bytes that somebody else owns.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ByteArray {
    pub(crate) data: *const u8,
    pub(crate) size: usize,
}

impl ByteArray {
    pub(crate) const fn new(bytes: &[u8]) -> Self {
        Self { data: bytes.as_ptr(), size: bytes.len() }
    }
}

/// `TVMFFIShapeCell`, which follows a shape object's header.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ShapeCell {
    pub(crate) data: *const i64,
    pub(crate) size: usize,
}

/// What follows an array object's header. Newer releases call it `TVMFFISeqCell`, and lists have it too.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ArrayCell {
    pub(crate) data: *const Any,
    pub(crate) size: i64,
}

/// The start of `TVMFFIFunctionCell`, which follows a function object's header.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct FunctionCell {
    pub(crate) safe_call: Option<SafeCall>,
}

/// `TVMFFIErrorCell`, which follows an error object's header. Newer releases append fields: never rely on its size.
#[repr(C)]
pub(crate) struct ErrorCell {
    pub(crate) kind: ByteArray,
    pub(crate) message: ByteArray,
    pub(crate) backtrace: ByteArray,
    pub(crate) update_backtrace: *mut c_void,
}

/// `TVMFFIVersion`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) patch: u32,
}

/// `TVMFFISafeCallType`: how every function is called. 0 is success, -1 an error that was raised, -2 an error of the
/// frontend's own.
pub(crate) type SafeCall =
    unsafe extern "C" fn(handle: *mut c_void, args: *const Any, num_args: i32, result: *mut Any) -> c_int;

const _: () = {
    assert!(size_of::<*const ()>() == 8, "the layouts are those of 64-bit targets");
    assert!(size_of::<Any>() == 16);
    assert!(offset_of!(Any, type_index) == 0);
    assert!(offset_of!(Any, extra) == 4);
    assert!(offset_of!(Any, payload) == 8);
    assert!(size_of::<Payload>() == 8);
    assert!(size_of::<Object>() == 24);
    assert!(offset_of!(Object, combined_ref_count) == 0);
    assert!(offset_of!(Object, type_index) == 8);
    assert!(offset_of!(Object, deleter) == 16);
    assert!(size_of::<ByteArray>() == 16);
    assert!(offset_of!(ByteArray, data) == 0);
    assert!(offset_of!(ByteArray, size) == 8);
    assert!(offset_of!(ErrorCell, kind) == 0);
    assert!(offset_of!(ErrorCell, message) == 16);
    assert!(offset_of!(ErrorCell, backtrace) == 32);
    assert!(offset_of!(ErrorCell, update_backtrace) == 48);
    assert!(offset_of!(ShapeCell, data) == 0);
    assert!(offset_of!(ShapeCell, size) == 8);
    assert!(offset_of!(ArrayCell, data) == 0);
    assert!(offset_of!(ArrayCell, size) == 8);
    assert!(size_of::<FunctionCell>() == 8);
    assert!(size_of::<Version>() == 12);
    assert!(offset_of!(Version, major) == 0);
    assert!(offset_of!(Version, minor) == 4);
    assert!(offset_of!(Version, patch) == 8);
};
