//! cuBLASLt, found and loaded at run time as CUDA's runtime is: the few of its functions that matrix products need.
//!
//! The types are those of cublasLt.h of CUDA 13, whose descriptors are opaque words of fixed numbers that live wherever the caller
//! puts them. They are made anew on the stack for each call, which costs tens of nanoseconds, so that no two calls share one.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use crate::error::{FlashInferError, Result};
use crate::loader::Library;
use crate::tensor::DType;

/// `CUBLAS_STATUS_NOT_SUPPORTED`: there is no algorithm for it.
const NOT_SUPPORTED: c_int = 15;
/// `CUBLAS_COMPUTE_32F`: products of 16 bits and of F32 are summed in F32, the latter without TF32.
const COMPUTE_F32: c_int = 68;
/// `CUDA_R_32F`.
const R_32F: c_int = 0;

/// Of `cublasLtMatmulDescAttributes_t`.
mod desc {
    pub(super) const TRANSA: i32 = 3;
    pub(super) const EPILOGUE: i32 = 7;
    pub(super) const BIAS_POINTER: i32 = 8;
}

/// Of `cublasLtMatmulPreferenceAttributes_t`.
mod pref {
    pub(super) const MAX_WORKSPACE_BYTES: i32 = 1;
    pub(super) const REDUCTION_SCHEME_MASK: i32 = 3;
    /// Of the matrices A, B, C and D.
    pub(super) const MIN_ALIGNMENT: [i32; 4] = [5, 6, 7, 8];
}

/// `CUBLAS_OP_T`.
const OP_T: c_int = 1;
/// `CUBLASLT_EPILOGUE_BIAS`.
const EPILOGUE_BIAS: u32 = 4;
/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: parts of a sum that is divided are kept in F32 and added in a step of their own, in
/// one order. The others add in the result's type.
const REDUCTION_IN_F32: u32 = 2;

/// How many algorithms the heuristics are asked for: always as many, so that one that was chosen is found again.
const CANDIDATES: usize = 16;

/// A `cublasLtMatmulAlgo_t`, which cublasLt.h allows to be stored and given to the same release again.
pub(crate) type Algorithm = [u64; 8];

/// `cublasLtMatmulDescOpaque_t`, `cublasLtMatrixLayoutOpaque_t` and `cublasLtMatmulPreferenceOpaque_t`.
#[repr(C)]
struct Opaque<const WORDS: usize>([u64; WORDS]);
type Desc = Opaque<32>;
type MatrixLayout = Opaque<8>;
type Preference = Opaque<8>;

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct HeuristicResult {
    algorithm: Algorithm,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<HeuristicResult>() == 96 && size_of::<Desc>() == 256);

/// A `cublasLtHandle_t` of one device, which stays for as long as the process does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Handle(*mut c_void);

// SAFETY: cuBLAS's documentation lets any number of threads call it with one handle at once, as long as none changes the
// handle's configuration, and a cublasLtHandle_t has none.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// The functions.
pub(crate) struct CublasLt {
    create: unsafe extern "C" fn(*mut *mut c_void) -> c_int,
    status_string: unsafe extern "C" fn(c_int) -> *const c_char,
    desc_init: unsafe extern "C" fn(*mut Desc, usize, c_int, c_int) -> c_int,
    desc_set: unsafe extern "C" fn(*mut Desc, c_int, *const c_void, usize) -> c_int,
    layout_init: unsafe extern "C" fn(*mut MatrixLayout, usize, c_int, u64, u64, i64) -> c_int,
    pref_init: unsafe extern "C" fn(*mut Preference, usize) -> c_int,
    pref_set: unsafe extern "C" fn(*mut Preference, c_int, *const c_void, usize) -> c_int,
    heuristic: unsafe extern "C" fn(
        *mut c_void,
        *mut Desc,
        *mut MatrixLayout,
        *mut MatrixLayout,
        *mut MatrixLayout,
        *mut MatrixLayout,
        *mut Preference,
        c_int,
        *mut HeuristicResult,
        *mut c_int,
    ) -> c_int,
    /// Handle; description; alpha; A and its layout; B and its; beta; C and its; D and its; algorithm; workspace and its size; stream.
    matmul: unsafe extern "C" fn(
        *mut c_void,
        *mut Desc,
        *const f32,
        *const c_void,
        *mut MatrixLayout,
        *const c_void,
        *mut MatrixLayout,
        *const f32,
        *const c_void,
        *mut MatrixLayout,
        *mut c_void,
        *mut MatrixLayout,
        *const Algorithm,
        *mut c_void,
        usize,
        *mut c_void,
    ) -> c_int,
    version: usize,
}

/// `out[rows, columns] = x[rows, inner] · weight[columns, inner]ᵀ`, and what comes on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Product {
    pub(crate) rows: u64,
    pub(crate) columns: u64,
    pub(crate) inner: u64,
    /// From a row of `x` to the next, in elements.
    pub(crate) row_stride: i64,
    pub(crate) dtype: DType,
    pub(crate) out: DType,
    /// Whether a bias is added.
    pub(crate) bias: bool,
    /// Whether what `out` holds is added.
    pub(crate) residual: bool,
    /// What the addresses of `x` and `weight`, and of `out` and the bias, are multiples of, in bytes.
    pub(crate) alignment: [u32; 2],
}

/// Addresses on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    pub(crate) x: *const c_void,
    pub(crate) weight: *const c_void,
    /// Null without one.
    pub(crate) bias: *const c_void,
    pub(crate) out: *mut c_void,
    /// Null where none is needed.
    pub(crate) workspace: *mut c_void,
}

/// An algorithm for a product, and the bytes of workspace that it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) algorithm: Algorithm,
    pub(crate) workspace: usize,
}

/// A product's descriptors. In cuBLASLt's words, which knows columns: the weight, transposed, times `x`.
struct Described {
    desc: Desc,
    weight: MatrixLayout,
    x: MatrixLayout,
    out: MatrixLayout,
}

impl CublasLt {
    /// # Safety
    /// `library` must be libcublasLt.so.13.
    pub(crate) unsafe fn resolve(library: &Library) -> Result<Self> {
        // SAFETY: the caller says that the library is cuBLASLt; the types are those of cublasLt.h.
        unsafe {
            let version: unsafe extern "C" fn() -> usize = library.symbol(c"cublasLtGetVersion")?;
            Ok(Self {
                create: library.symbol(c"cublasLtCreate")?,
                status_string: library.symbol(c"cublasLtGetStatusString")?,
                desc_init: library.symbol(c"cublasLtMatmulDescInit_internal")?,
                desc_set: library.symbol(c"cublasLtMatmulDescSetAttribute")?,
                layout_init: library.symbol(c"cublasLtMatrixLayoutInit_internal")?,
                pref_init: library.symbol(c"cublasLtMatmulPreferenceInit_internal")?,
                pref_set: library.symbol(c"cublasLtMatmulPreferenceSetAttribute")?,
                heuristic: library.symbol(c"cublasLtMatmulAlgoGetHeuristic")?,
                matmul: library.symbol(c"cublasLtMatmul")?,
                version: version(),
            })
        }
    }

    /// The release: 130002 is 13.0.2.
    pub(crate) fn version(&self) -> usize {
        self.version
    }

    /// A handle for the current device.
    pub(crate) fn handle(&self) -> Result<Handle> {
        let mut handle = ptr::null_mut();
        // SAFETY: a handle is written through a pointer that is valid for the call.
        self.check("cublasLtCreate", unsafe { (self.create)(&mut handle) })?;
        Ok(Handle(handle))
    }

    /// Algorithms for a product on the current device, in the order of the time that cuBLASLt thinks that they take; none where it
    /// has none. The same ones in the same order at every call.
    pub(crate) fn candidates(&self, handle: Handle, product: &Product, workspace: u64) -> Result<Vec<Candidate>> {
        // Only its alignment is looked at.
        let bias = ptr::without_provenance(product.alignment[1] as usize);
        let mut described = self.described(product, bias)?;
        let mut preference: Preference = Opaque([0; 8]);
        // SAFETY: as many bytes as are said are there.
        let code = unsafe { (self.pref_init)(&mut preference, size_of::<Preference>()) };
        self.check("cublasLtMatmulPreferenceInit", code)?;
        self.prefer(&mut preference, pref::MAX_WORKSPACE_BYTES, &workspace)?;
        self.prefer(&mut preference, pref::REDUCTION_SCHEME_MASK, &REDUCTION_IN_F32)?;
        let [read, written] = product.alignment;
        for (attribute, alignment) in pref::MIN_ALIGNMENT.into_iter().zip([read, read, written, written]) {
            self.prefer(&mut preference, attribute, &alignment)?;
        }
        let nothing =
            HeuristicResult { algorithm: [0; 8], workspace: 0, state: NOT_SUPPORTED, waves: 0.0, reserved: [0; 4] };
        let (mut results, mut count) = ([nothing; CANDIDATES], 0);
        let Described { desc, weight, x, out } = &mut described;
        // cuBLASLt's B, C and D may be one descriptor, as its C and D are here.
        let out = &raw mut *out;
        // SAFETY: the handle is of this device, the descriptors are initialized, and as many results as are asked for have room.
        let code = unsafe {
            (self.heuristic)(
                handle.0,
                desc,
                weight,
                x,
                out,
                out,
                &mut preference,
                CANDIDATES as c_int,
                results.as_mut_ptr(),
                &mut count,
            )
        };
        if code == NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        self.check("cublasLtMatmulAlgoGetHeuristic", code)?;
        let found = results.iter().take(usize::try_from(count).unwrap_or(0)).filter(|result| result.state == 0);
        let found = found.filter(|result| result.workspace as u64 <= workspace);
        Ok(found.map(|result| Candidate { algorithm: result.algorithm, workspace: result.workspace }).collect())
    }

    /// Queues a product; cuBLASLt's answer is 0 where it was queued.
    ///
    /// # Safety
    /// The candidate must be one of [`candidates`](Self::candidates) for this product on this device, which must be the current one,
    /// with a handle of it. The addresses must be memory of the device, valid until the stream has come so far, as large and as
    /// aligned as the product says, and nothing that is written may overlap anything else; the workspace must be as large as the
    /// candidate says, aligned to 256 bytes, and used by nothing else meanwhile; `stream` a live stream of the device.
    pub(crate) unsafe fn multiply(
        &self,
        handle: Handle,
        product: &Product,
        candidate: &Candidate,
        at: &Addresses,
        stream: *mut c_void,
    ) -> Result<c_int> {
        let mut described = self.described(product, at.bias)?;
        let (alpha, beta) = (1.0f32, if product.residual { 1.0f32 } else { 0.0 });
        let Described { desc, weight, x, out } = &mut described;
        let out = &raw mut *out;
        // SAFETY: the caller's promise; the descriptors are initialized, and both factors are read before the call returns.
        Ok(unsafe {
            (self.matmul)(
                handle.0,
                desc,
                &alpha,
                at.weight,
                weight,
                at.x,
                x,
                &beta,
                at.out,
                out,
                at.out,
                out,
                &candidate.algorithm,
                at.workspace,
                candidate.workspace,
                stream,
            )
        })
    }

    fn described(&self, product: &Product, bias: *const c_void) -> Result<Described> {
        let (read, written) = (of(product.dtype)?, of(product.out)?);
        let Product { rows, columns, inner, row_stride, .. } = *product;
        let described = Described {
            desc: self.desc(product.bias.then_some(bias))?,
            weight: self.layout(read, inner, columns, inner as i64)?,
            x: self.layout(read, inner, rows, row_stride)?,
            out: self.layout(written, columns, rows, columns as i64)?,
        };
        Ok(described)
    }

    fn desc(&self, bias: Option<*const c_void>) -> Result<Desc> {
        let mut desc: Desc = Opaque([0; 32]);
        // SAFETY: as many bytes as are said are there.
        let code = unsafe { (self.desc_init)(&mut desc, size_of::<Desc>(), COMPUTE_F32, R_32F) };
        self.check("cublasLtMatmulDescInit", code)?;
        self.describe(&mut desc, desc::TRANSA, &OP_T)?;
        if let Some(bias) = bias {
            self.describe(&mut desc, desc::EPILOGUE, &EPILOGUE_BIAS)?;
            self.describe(&mut desc, desc::BIAS_POINTER, &bias)?;
        }
        Ok(desc)
    }

    fn describe<T: Copy>(&self, desc: &mut Desc, attribute: c_int, value: &T) -> Result<()> {
        // SAFETY: the value is of as many bytes as are said; the description is initialized.
        let code = unsafe { (self.desc_set)(desc, attribute, ptr::from_ref(value).cast(), size_of::<T>()) };
        self.check("cublasLtMatmulDescSetAttribute", code)
    }

    fn prefer<T: Copy>(&self, preference: &mut Preference, attribute: c_int, value: &T) -> Result<()> {
        // SAFETY: as in `describe`.
        let code = unsafe { (self.pref_set)(preference, attribute, ptr::from_ref(value).cast(), size_of::<T>()) };
        self.check("cublasLtMatmulPreferenceSetAttribute", code)
    }

    /// A matrix of columns that lie `stride` elements apart.
    fn layout(&self, dtype: c_int, rows: u64, columns: u64, stride: i64) -> Result<MatrixLayout> {
        let mut layout: MatrixLayout = Opaque([0; 8]);
        // SAFETY: as many bytes as are said are there.
        let code = unsafe { (self.layout_init)(&mut layout, size_of::<MatrixLayout>(), dtype, rows, columns, stride) };
        self.check("cublasLtMatrixLayoutInit", code)?;
        Ok(layout)
    }

    fn check(&self, call: &'static str, status: c_int) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(self.error(call, status)) }
    }

    /// An error by its number.
    #[cold]
    pub(crate) fn error(&self, call: &'static str, status: c_int) -> FlashInferError {
        // SAFETY: the function answers a static C string for every number.
        let message = unsafe { (self.status_string)(status) };
        let message = if message.is_null() {
            "a status without words".to_owned()
        } else {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
        };
        FlashInferError::CublasLt { call, status, message }
    }
}

/// A type as CUDA numbers it: `cudaDataType_t`.
fn of(dtype: DType) -> Result<c_int> {
    match dtype {
        DType::F32 => Ok(R_32F),
        DType::F16 => Ok(2),
        DType::BF16 => Ok(14),
        other => Err(FlashInferError::InvalidArgument {
            function: "MatMulSpec::new",
            argument: "dtype",
            found: other.to_string(),
            expected: "F16, BF16 or F32".to_owned(),
        }),
    }
}
