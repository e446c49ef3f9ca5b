//! What can go wrong at run time.

use std::error::Error;
use std::ffi::c_int;
use std::path::PathBuf;

use crate::artifact::{CUDART, how_to_vendor};
use crate::names::MODULES;

/// This crate's results.
pub type Result<T, E = FlashInferError> = std::result::Result<T, E>;

/// An enum of errors, each with its message in front of it: `#[error(…)]` holds what `write!` takes, which sees the variant's
/// fields as references. By hand, since a crate of macros for it, with what parses Rust below it, is a tenth of all that a
/// user of this crate compiles.
macro_rules! errors {
    (
        $(#[$attribute:meta])*
        pub enum $name:ident {$(
            $(#[doc = $doc:literal])*
            $(#[cfg($($cfg:tt)*)])?
            #[error($($message:tt)*)]
            $variant:ident
            $({ $($(#[doc = $field_doc:literal])* $field:ident: $type:ty),* $(,)? })?
            $(($wrapped:ident: $wrapped_type:ty))?
        ),* $(,)?}
    ) => {
        $(#[$attribute])*
        pub enum $name {$(
            $(#[doc = $doc])*
            $(#[cfg($($cfg)*)])?
            $variant $({ $($(#[doc = $field_doc])* $field: $type),* })? $(($wrapped_type))?
        ),*}

        impl std::fmt::Display for $name {
            #[allow(unused_variables, reason = "not every message has all fields")]
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {$(
                    $(#[cfg($($cfg)*)])?
                    Self::$variant $({ $($field),* })? $(($wrapped))? => write!(f, $($message)*),
                )*}
            }
        }
    };
}

#[cfg(feature = "compute")]
pub(crate) use errors;

errors! {
/// An error of this crate: each says what was asked, what was found, what was expected and what to do.
#[derive(Debug)]
#[non_exhaustive]
pub enum FlashInferError {
    /// A library is not there: not vendored, or not where it was put.
    #[error("{library} was not found; looked at: {}; {remedy}", searched.join(", "))]
    ArtifactMissing {
        /// The library's soname.
        library: String,
        /// The places that were searched, in order.
        searched: Vec<String>,
        /// What to do.
        remedy: String,
    },

    /// A library is not the one that was vendored.
    #[error(
        "{} is not the {library} that this program was built with: sha256 {found}, expected {expected}; restore it, or \
         build again",
        path.display()
    )]
    DigestMismatch {
        /// The library's soname.
        library: String,
        /// The file.
        path: PathBuf,
        /// Its digest, in hexadecimal.
        found: String,
        /// The vendored digest, in hexadecimal.
        expected: String,
    },

    /// A file could not be read.
    #[error("{doing} {} failed; check that the file is there and readable", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },

    /// The dynamic linker refused a library.
    #[error("loading {library} from {} failed: {reason}; {remedy}", path.display())]
    LoadFailed {
        /// The library's soname.
        library: String,
        /// The file.
        path: PathBuf,
        /// The dynamic linker's own words.
        reason: String,
        /// What to do.
        remedy: String,
    },

    /// The system does not let a library be loaded out of memory.
    #[error(
        "{library} could not be loaded from memory: {reason}; {remedy}, or put the libraries into a folder and name it by \
         FLASHINFER_RS_LIB_DIR"
    )]
    EmbeddingRefused {
        /// The library's soname.
        library: String,
        /// The system's reason.
        reason: String,
        /// What to do, but for giving the library as a file.
        remedy: &'static str,
    },

    /// A library lacks a function.
    #[error("{library} has no symbol {symbol} ({reason}); use the release that this crate pins")]
    SymbolMissing {
        /// The library's soname.
        library: String,
        /// The symbol.
        symbol: String,
        /// The dynamic linker's own words.
        reason: String,
    },

    /// A module lacks a function.
    #[error(
        "{module} has no function {function}; {}it exports {}",
        nearest.as_ref().map(|name| format!("did you mean {name}? ")).unwrap_or_default(),
        match &exported[..] {
            [] => "none that it tells of".to_owned(),
            names => names.join(", "),
        }
    )]
    FunctionMissing {
        /// The module's name.
        module: String,
        /// The function that was asked for.
        function: String,
        /// The name that is most like it, if any is.
        nearest: Option<String>,
        /// What the module exports, in alphabetical order.
        exported: Vec<String>,
    },

    /// A file cannot be a module here, which was seen before anything of it was loaded.
    #[error("{} cannot be loaded as a module: {problem}; {remedy}", path.display())]
    Unloadable {
        /// The file.
        path: PathBuf,
        /// What was found, and what was expected.
        problem: String,
        /// What to do.
        remedy: String,
    },

    /// A library is of another release than this crate was written for.
    #[error("{library} is version {found}, expected {expected}; {remedy}")]
    VersionMismatch {
        /// The library's soname.
        library: String,
        /// Its version.
        found: String,
        /// The version this crate works with.
        expected: String,
        /// What to do.
        remedy: &'static str,
    },

    /// Another libtvm_ffi.so is visible to every library of this process: kernels would use its streams, not ours.
    #[error(
        "another libtvm_ffi.so is already loaded globally, from {other}; kernels would bind to it instead of to the one \
         that this crate vendored; use it by RuntimeConfig::adopt_tvm_ffi, which wants it to be loaded before this crate is \
         initialized, or load it without RTLD_GLOBAL"
    )]
    ForeignTvmFfi {
        /// The file it was loaded from.
        other: String,
    },

    /// There is no NVIDIA driver.
    #[error("there is no NVIDIA driver: {reason}; looked for libcuda.so.1; install a driver for CUDA 13 or newer")]
    DriverMissing {
        /// The dynamic linker's or CUDA's own words.
        reason: String,
    },

    /// The NVIDIA driver is too old for CUDA 13.
    #[error("the NVIDIA driver supports CUDA {found}, needed is CUDA {needed} or newer; update the driver")]
    DriverTooOld {
        /// The CUDA version that the driver supports.
        found: String,
        /// The CUDA version that is needed.
        needed: String,
    },

    /// There is no CUDA runtime library.
    #[error(
        "libcudart.so.13 was not found; looked at: {}; {}; or install CUDA 13's runtime",
        searched.join(", "), how_to_vendor(CUDART)
    )]
    CudartMissing {
        /// The places that were searched, with the dynamic linker's reason.
        searched: Vec<String>,
    },

    /// A call of CUDA's runtime or driver failed.
    #[error("{call} failed with CUDA error {code}: {message}")]
    Cuda {
        /// The function, or what was being done.
        call: &'static str,
        /// `cudaError_t` or `CUresult`, which number alike.
        code: c_int,
        /// CUDA's own words.
        message: String,
    },

    /// A kernel, ours or another of this process, broke the device's context: nothing runs there any more.
    #[error(
        "the context of cuda:{device} is lost, CUDA error {code}: {message}; nothing runs on it until this process is \
             started again; compute-sanitizer finds the kernel that did it"
    )]
    ContextLost {
        /// CUDA's number for the GPU.
        device: i32,
        /// `cudaError_t`.
        code: c_int,
        /// CUDA's own words.
        message: String,
    },

    /// There is no such GPU.
    #[error("there is no CUDA device {device}: this process sees {count}; use a device from 0 to one below that")]
    DeviceOutOfRange {
        /// The device that was asked for.
        device: i64,
        /// How many devices there are.
        count: i32,
    },

    /// An argument breaks the contract of a kernel, or of a function of this crate. Nothing was launched.
    #[error("{function}: {argument} is {found}, expected {expected}")]
    InvalidArgument {
        /// The kernel, or the function of this crate.
        function: &'static str,
        /// The argument's name, or that of the dimension that is wrong: one word, to be matched on.
        argument: &'static str,
        /// What it is.
        found: String,
        /// What it must be.
        expected: String,
    },

    /// A call that draws random numbers was to be captured into a graph, which would draw the same ones in every launch.
    #[error(
        "{function} takes its random numbers by value, so that a graph would draw the same ones in every launch; call it \
         between the graph's launches, or ask for that by Philox::frozen"
    )]
    FrozenRandomness {
        /// The function that was called.
        function: &'static str,
    },

    /// A kernel raised an error through TVM-FFI.
    #[error("{function} raised {kind}: {message}")]
    TvmFfiCall {
        /// The function that was called.
        function: String,
        /// The error's kind, `TypeError` for example.
        kind: String,
        /// The error's message.
        message: String,
        /// Where it was raised, as TVM-FFI recorded it, the innermost call first; may be empty.
        backtrace: String,
        /// The error that it was raised from. Only errors of TVM-FFI 0.1.8 or newer have one.
        cause: Option<Box<FlashInferError>>,
    },

    /// A value is of another type than was asked for.
    #[error("{what} is {found}, expected {expected}; ask for the type that it has, or for object::Any and look at it")]
    WrongType {
        /// What was looked at.
        what: String,
        /// The type that it has.
        found: String,
        /// The type that was asked for.
        expected: &'static str,
    },

    /// A series of calls cannot be captured into a CUDA graph, or not be launched as one.
    #[error("CUDA graph: {problem}; {remedy}")]
    Graph {
        /// What was found, with CUDA's own words.
        problem: String,
        /// What to do.
        remedy: &'static str,
    },

    /// The runtime was initialized before, with another configuration.
    #[error(
        "the runtime is already initialized with {current}, and was now asked for {requested}; initialize it once, or with \
         the same configuration, in which only warm_up may differ"
    )]
    AlreadyInitialized {
        /// The configuration in force.
        current: String,
        /// The configuration asked for.
        requested: String,
    },

    /// A file of a dataset or of a dump, or a value that was to become one, is not what it should be.
    #[error("{error}")]
    Data(error: Box<crate::data::DataError>),

    /// A compute graph, its plan or a run of it is not what it should be.
    #[cfg(feature = "compute")]
    #[error("{error}")]
    ComputeGraph(error: Box<crate::compute::GraphError>),

    /// A variable of the environment has a value that means nothing.
    #[error("{variable} is {found:?}, expected {expected}; correct it or unset it, and start the program again")]
    Setting {
        /// The variable.
        variable: &'static str,
        /// Its value.
        found: String,
        /// The values that it may have.
        expected: &'static str,
    },

    /// No kernel of this name was pinned when the program was built.
    #[error(
        "no kernel {kernel} was vendored; {}{}; {remedy}",
        nearest.as_ref().map(|name| format!("did you mean {name}? ")).unwrap_or_default(),
        match &vendored[..] {
            [] => "none was".to_owned(),
            names => format!("these were: {}", names.join(", ")),
        }
    )]
    KernelMissing {
        /// The kernel that was asked for.
        kernel: String,
        /// The name that is most like it, if any is.
        nearest: Option<String>,
        /// The kernels that were vendored.
        vendored: Vec<String>,
        /// What to do.
        remedy: String,
    },

    /// There is no cuBLASLt, which multiplies matrices of more rows than this crate's own kernels do.
    #[error(
        "libcublasLt.so.13 was not found; looked at: {}; build with {MODULES}=cublasLt, which vendors it (370 MB), or \
         install CUDA 13's cuBLAS and name its folder by CUDA_HOME or LD_LIBRARY_PATH",
        searched.join(", ")
    )]
    CublasLtMissing {
        /// The places that were searched, with the dynamic linker's reason.
        searched: Vec<String>,
    },

    /// A call of cuBLASLt failed.
    #[error("{call} failed with cuBLAS status {status}: {message}")]
    CublasLt {
        /// The function.
        call: &'static str,
        /// `cublasStatus_t`.
        status: c_int,
        /// cuBLAS's own words.
        message: String,
    },

    /// The runtime was not initialized.
    #[error("the runtime is not initialized; call FlashInferRuntime::initialize first")]
    NotInitialized,
}
}

impl Error for FlashInferError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::TvmFfiCall { cause, .. } => cause.as_deref().map(|cause| cause as _),
            Self::Data(error) => error.source(),
            #[cfg(feature = "compute")]
            Self::ComputeGraph(error) => error.source(),
            _ => None,
        }
    }
}

#[cfg(feature = "compute")]
impl From<crate::compute::GraphError> for FlashInferError {
    fn from(error: crate::compute::GraphError) -> Self {
        Self::ComputeGraph(Box::new(error))
    }
}

/// Errors after which CUDA answers nothing else in this process: uncorrectable ECC error, illegal address, launch timeout, assertion, hardware
/// stack, illegal instruction, misaligned address, invalid address space, invalid program counter, launch failure, an
/// error that only a restart mends, and unknown.
const STICKY: [c_int; 12] = [214, 700, 702, 710, 714, 715, 716, 717, 718, 719, 226, 999];
/// Whether nothing runs on a device any more after this error.
pub(crate) fn is_sticky(code: c_int) -> bool {
    STICKY.contains(&code)
}

/// What is wrong with a call, as TVM-FFI's C++ says it in the message of a `TypeError`: [`FlashInferError::mismatch`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// The function as the module has it: its name, where it knows it, and its signature, where it tells it.
    pub signature: String,
    /// The position of the argument that has another type, from 0 on; `None` where the number of arguments is another one.
    pub argument: Option<usize>,
    /// The type, or the number of arguments, that is expected.
    pub expected: String,
    /// The type, or the number of arguments, that was given.
    pub found: String,
}

impl Mismatch {
    fn parse(message: &str) -> Option<Self> {
        let (argument, rest) = match message.strip_prefix("Mismatched number of arguments when calling: `") {
            Some(rest) => (None, rest),
            None => {
                let rest = message.strip_prefix("Mismatched type on argument #")?;
                let (position, rest) = rest.split_once(" when calling: `")?;
                (Some(position.parse().ok()?), rest)
            }
        };
        let (signature, rest) = rest.split_once("`. Expected ")?;
        let (expected, found) = rest.split_once(" but got ")?;
        let found = found.strip_suffix(" arguments").unwrap_or(found);
        let [expected, found] = [expected, found].map(|text| text.trim_matches('`').to_owned());
        Some(Self { signature: signature.to_owned(), argument, expected, found })
    }
}

impl FlashInferError {
    /// What is wrong with a call, where a function raised an error for the number or the types of its arguments. By the words
    /// of TVM-FFI 0.1.3 to 0.1.15; other words are not understood, and the message has them all the same.
    pub fn mismatch(&self) -> Option<Mismatch> {
        match self {
            Self::TvmFfiCall { kind, message, .. } if kind == "TypeError" => Mismatch::parse(message),
            _ => None,
        }
    }

    /// Whether nothing runs on the GPU any more until the process is started again. Any other error leaves the GPU, and what
    /// was queued before, as it was.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::ContextLost { .. } => true,
            Self::Cuda { code, .. } => is_sticky(*code),
            _ => false,
        }
    }
}

/// As [`driver`], of what depends on a context: that it is lost, where the error says so.
#[cfg(feature = "cudarc")]
pub(crate) fn driver_in(
    context: &cudarc::driver::CudaContext,
    doing: &'static str,
) -> impl Fn(cudarc::driver::DriverError) -> FlashInferError {
    let device = context.ordinal() as i32;
    move |error| match driver(doing)(error) {
        FlashInferError::Cuda { code, message, .. } if is_sticky(code) => {
            FlashInferError::ContextLost { device, code, message }
        }
        other => other,
    }
}

/// What went wrong when cudarc was doing this.
#[cfg(feature = "cudarc")]
pub(crate) fn driver(doing: &'static str) -> impl Fn(cudarc::driver::DriverError) -> FlashInferError {
    move |error| FlashInferError::Cuda { call: doing, code: error.0 as i32, message: error.to_string() }
}
