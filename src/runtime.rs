//! The runtime: one per process, holding the loaded libraries.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_int};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::artifact::{self, Artifact, CUDART, Location, Stored};
#[cfg(feature = "cudarc")]
use crate::cublaslt::CublasLt;
use crate::cuda::{Cudart, Limits};
use crate::digest::Digest;
use crate::error::{FlashInferError, Result};
use crate::ffi::api::{self, Api, StreamGuard};
use crate::ffi::dlpack::DLTensor;
use crate::loader::{self, Library};
use crate::log::{self, Settings};
use crate::module::Module;
use crate::object::Object;
use crate::stream::{DeviceStream, SCOPE, Scope, Setting, Stream};
use crate::tensor::Device;
use crate::turn::{Turn, Turns};
use crate::uri::Uri;

const TVM_FFI: &str = "libtvm_ffi.so";
/// What is no module, though it may have been vendored.
const NO_MODULES: [&str; 3] = [TVM_FFI, CUDART, CUBLASLT];
/// As `cublaslt.rs` describes it.
const CUBLASLT: &str = "libcublasLt.so.13";

/// Where CUDA's installer puts it.
const USUAL_CUDA: &str = "/usr/local/cuda";

/// The ABI of libtvm_ffi.so that `ffi/abi.rs` describes, major and minor.
const TVM_FFI_VERSION: (u32, u32) = (0, 1);

static RUNTIME: OnceLock<FlashInferRuntime> = OnceLock::new();
/// Held while the runtime is made, so that libraries are loaded once.
static INITIALIZING: Mutex<()> = Mutex::new(());

/// How the runtime is set up. The wheel variables of the build have no effect here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuntimeConfig {
    lib_dir: Option<PathBuf>,
    unverified: bool,
    pub(crate) warm_up: bool,
    adopt_tvm_ffi: bool,
}

impl RuntimeConfig {
    /// The same as [`default`](Default::default): libraries are looked for in `FLASHINFER_RS_LIB_DIR`, then in
    /// the program itself (feature `embed`), then in `lib/flashinfer-rs` beside the executable, then where the build put them, seen from the executable first, so that a
    /// project may be moved; each is checked against its vendored digest; kernels are loaded on first use.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks for libraries in this folder first.
    #[must_use]
    pub fn lib_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.lib_dir = Some(folder.into());
        self
    }

    /// Loads the module of every kernel of this crate that was vendored at once, as [`FlashInferRuntime::warm_up`] does: with every call of
    /// [`initialize`](FlashInferRuntime::initialize) that asks for it, whether or not the runtime was there before.
    #[must_use]
    pub fn warm_up(mut self) -> Self {
        self.warm_up = true;
        self
    }

    /// Uses a libtvm_ffi.so that is already visible to every library of this process, a Python host's for example, if its
    /// version fits. Without this, one that is there is an error; where none is there, ours is loaded.
    ///
    /// Beside Python's package `tvm_ffi` the order matters: Python imports it first, then this process initializes this
    /// crate with `adopt_tvm_ffi`. The other way round the process ends while Python imports the package, since the
    /// initializers of a second libtvm_ffi.so bind to the first one and throw, and nobody can catch that. A program that links
    /// to libtvm_ffi.so, as the official crate `tvm-ffi` makes it do, has it from the start and is initialized likewise.
    ///
    /// # Safety
    /// What is there must really be TVM-FFI: it is recognized by its symbols and its version alone.
    #[must_use]
    pub unsafe fn adopt_tvm_ffi(mut self) -> Self {
        self.adopt_tvm_ffi = true;
        self
    }

    /// Loads libraries as they are found, without checking them against what was vendored.
    ///
    /// # Safety
    /// The folders that are searched must hold libraries that fit this crate: whatever is there is run.
    #[must_use]
    pub unsafe fn without_verification(mut self) -> Self {
        self.unverified = true;
        self
    }

    /// What calls of [`initialize`](FlashInferRuntime::initialize) must agree on. Warming up is done to a runtime that is
    /// there, so it may differ.
    fn to_agree_on(&self) -> (Option<&PathBuf>, bool, bool) {
        let Self { lib_dir, unverified, warm_up: _, adopt_tvm_ffi } = self;
        (lib_dir.as_ref(), *unverified, *adopt_tvm_ffi)
    }
}

/// What is remembered of a GPU.
#[derive(Default)]
struct GpuState {
    /// The error that its context was lost to.
    lost: OnceLock<(i32, String)>,
    /// Held by a call that sets something about its kernel and then launches it.
    turn: Turns,
    /// What it has, once it was asked.
    limits: OnceLock<Limits>,
}

/// The process's one runtime: TVM-FFI, CUDA's runtime and the kernel modules, loaded and checked.
pub struct FlashInferRuntime {
    config: RuntimeConfig,
    api: Api,
    /// Where it could not be found: what was looked at.
    cudart: std::result::Result<Cudart, Vec<String>>,
    devices: OnceLock<Box<[GpuState]>>,
    modules: Mutex<HashMap<String, &'static Module>>,
    /// Modules that are loaded for each device.
    modules_on: Mutex<HashMap<(String, i32), &'static Module>>,
    /// Libraries other than modules, and where they were loaded from.
    loaded: Vec<(String, PathBuf)>,
    /// cuBLASLt, and where it was loaded from, once it was.
    #[cfg(feature = "cudarc")]
    cublaslt: Mutex<Option<(&'static CublasLt, PathBuf)>>,
}

impl std::fmt::Debug for FlashInferRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlashInferRuntime").field("config", &self.config).finish_non_exhaustive()
    }
}

impl FlashInferRuntime {
    /// The process's runtime, made where there is none; not warmed up.
    pub(crate) fn make(config: RuntimeConfig) -> Result<&'static Self> {
        let _one_at_a_time = INITIALIZING.lock().unwrap_or_else(PoisonError::into_inner);
        match RUNTIME.get() {
            Some(runtime) if runtime.config.to_agree_on() == config.to_agree_on() => Ok(runtime),
            Some(runtime) => Err(FlashInferError::AlreadyInitialized {
                current: format!("{:?}", runtime.config),
                requested: format!("{config:?}"),
            }),
            None => {
                // Before anything is loaded: what a variable says wrong is said at once.
                let settings = Settings::read()?;
                let runtime = Self::load(config)?;
                log::start(settings);
                Ok(RUNTIME.get_or_init(|| runtime))
            }
        }
    }

    /// The runtime that was initialized before.
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized).
    #[inline]
    pub fn global() -> Result<&'static Self> {
        match RUNTIME.get() {
            Some(runtime) => Ok(runtime),
            None => Err(FlashInferError::NotInitialized),
        }
    }

    fn load(config: RuntimeConfig) -> Result<Self> {
        // Before ours is loaded: the initializers of a second one bind to the first and throw, which nothing here can
        // catch.
        let foreign = loader::global_address(api::LANDMARK);
        if let Some(address) = foreign.filter(|_| !config.adopt_tvm_ffi) {
            return Err(FlashInferError::ForeignTvmFfi { other: loader::mapped_file(address) });
        }
        let mut loaded = Vec::new();
        let cudart = match load_of_cuda(CUDART, &config)? {
            Ok(library) => {
                loaded.push((CUDART.to_owned(), library.path().to_owned()));
                // SAFETY: it is CUDA 13's runtime, by its digest or by its soname.
                Ok(unsafe { Cudart::resolve(&library) }?)
            }
            Err(searched) => Err(searched),
        };
        let tvm_ffi = match foreign {
            Some(address) => Library::global(TVM_FFI, loader::mapped_file(address))?,
            None => open(TVM_FFI, &config)?,
        };
        // SAFETY: the library was checked against the vendored TVM-FFI, or the caller vouched for it.
        let api = unsafe { Api::resolve(&tvm_ffi) }?;
        let version = api.version();
        if (version.major, version.minor) != TVM_FFI_VERSION {
            return Err(FlashInferError::VersionMismatch {
                library: TVM_FFI.to_owned(),
                found: format!("{}.{}.{}", version.major, version.minor, version.patch),
                expected: format!("{}.{}.x", TVM_FFI_VERSION.0, TVM_FFI_VERSION.1),
                remedy: "build with the pinned apache_tvm_ffi wheel",
            });
        }
        // Only now: of a library that was refused nothing is left that another call of `initialize` would trip over.
        tvm_ffi.make_global()?;
        // After it too: kernels will bind to what is seen now.
        if let Some(address) = loader::global_address(api::LANDMARK).filter(|&address| address != api.landmark()) {
            return Err(FlashInferError::ForeignTvmFfi { other: loader::mapped_file(address) });
        }
        loaded.push((TVM_FFI.to_owned(), tvm_ffi.path().to_owned()));
        api.keep();
        Ok(Self {
            config,
            api,
            cudart,
            devices: OnceLock::new(),
            modules: Mutex::default(),
            modules_on: Mutex::default(),
            loaded,
            #[cfg(feature = "cudarc")]
            cublaslt: Mutex::default(),
        })
    }

    /// How many GPUs this process sees.
    ///
    /// # Errors
    /// [`CudartMissing`](FlashInferError::CudartMissing), [`DriverMissing`](FlashInferError::DriverMissing),
    /// [`DriverTooOld`](FlashInferError::DriverTooOld), or [`Cuda`](FlashInferError::Cuda).
    pub fn device_count(&self) -> Result<i32> {
        Ok(self.devices()?.len() as i32)
    }

    fn devices(&self) -> Result<&[GpuState]> {
        if let Some(devices) = self.devices.get() {
            return Ok(devices);
        }
        let count = self.cudart()?.device_count()?;
        Ok(self.devices.get_or_init(|| (0..count).map(|_| GpuState::default()).collect()))
    }

    /// Whether this process sees a GPU, and a driver that is new enough for it.
    pub fn gpu_available(&self) -> bool {
        self.device_count().is_ok_and(|count| count > 0)
    }

    /// The libraries: where each comes from, and where it was loaded from. Kernels that a project pins are
    /// [`PinnedKernel::all`](crate::PinnedKernel::all).
    pub fn artifacts(&self) -> Vec<Artifact> {
        let modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let on = self.modules_on.lock().unwrap_or_else(PoisonError::into_inner);
        let modules = modules.iter().chain(on.iter().map(|((name, _), module)| (name, module)));
        let modules = modules.filter_map(|(name, module)| Some((name.clone(), module.path()?.to_owned())));
        // Once each, whatever number of devices it was loaded for.
        let modules: BTreeMap<_, _> = modules.collect();
        let loaded = self.loaded.iter().cloned().chain(modules);
        #[cfg(feature = "cudarc")]
        let cublaslt = self.cublaslt.lock().unwrap_or_else(PoisonError::into_inner);
        #[cfg(feature = "cudarc")]
        let loaded = loaded.chain(cublaslt.iter().map(|(_, path)| (CUBLASLT.to_owned(), path.clone())));
        let loaded: Vec<_> = loaded.collect();
        artifact::list(&loaded)
    }

    /// A vendored module by its soname, `norm.so` for example, to call functions that this crate has no wrapper for. It is
    /// loaded when it is first asked for. The name has no folder in it; [`load_module`](Self::load_module) takes paths. XQA's
    /// modules are [`module_on`](Self::module_on)'s.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for what is no module's name,
    /// [`ArtifactMissing`](FlashInferError::ArtifactMissing), [`DigestMismatch`](FlashInferError::DigestMismatch),
    /// [`DriverMissing`](FlashInferError::DriverMissing), or [`LoadFailed`](FlashInferError::LoadFailed).
    pub fn module(&'static self, soname: &str) -> Result<&'static Module> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(soname) {
            return Ok(module);
        }
        artifact::refuse_what_is_no_module(soname, &NO_MODULES)?;
        if soname.strip_suffix(".so").is_some_and(|name| matches!(name.parse(), Ok(Uri::Xqa(_)))) {
            return Err(FlashInferError::InvalidArgument {
                function: "FlashInferRuntime::module",
                argument: "soname",
                found: format!("{soname:?}"),
                expected: "a module that serves every GPU; XQA's are set up for one GPU when they are loaded, and \
                           FlashInferRuntime::module_on loads them for each"
                    .to_owned(),
            });
        }
        let library = open(soname, &self.config)?;
        let module: &'static Module = Box::leak(Box::new(Module::loaded(soname, library, &self.api)));
        modules.insert(soname.to_owned(), module);
        Ok(module)
    }

    /// As [`module`](Self::module), of a module whose initializers set its kernels up, for the device that is current while they
    /// run and for no other. XQA's are such. Each GPU has a copy of its own, which is loaded while that GPU is the current one.
    ///
    /// # Errors
    /// As there; [`InvalidArgument`](FlashInferError::InvalidArgument) for the host,
    /// [`DeviceOutOfRange`](FlashInferError::DeviceOutOfRange), [`ContextLost`](FlashInferError::ContextLost),
    /// [`Cuda`](FlashInferError::Cuda) or why there is no GPU; [`Io`](FlashInferError::Io) or
    /// [`EmbeddingRefused`](FlashInferError::EmbeddingRefused).
    pub fn module_on(&'static self, soname: &str, device: Device) -> Result<&'static Module> {
        artifact::refuse_what_is_no_module(soname, &NO_MODULES)?;
        if device == Device::Cpu {
            return Err(FlashInferError::InvalidArgument {
                function: "FlashInferRuntime::module_on",
                argument: "device",
                found: "the host".to_owned(),
                expected: "a GPU, which the module's initializers are to set it up for".to_owned(),
            });
        }
        let id = self.checked_device(device)?;
        let key = (soname.to_owned(), id);
        let mut modules = self.modules_on.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&key) {
            return Ok(module);
        }
        let cudart = self.cudart()?;
        let _current = cudart.set_current(id)?;
        // A copy always: whether somebody loaded the file itself, on whichever device, is not known. Its initializers ignore
        // errors, so that one that a capture elsewhere forbids would leave kernels that never launch.
        let library = cudart.without_breaking_captures(|| open_copy(soname, &self.config))?;
        let module: &'static Module = Box::leak(Box::new(Module::loaded(soname, library, &self.api)));
        modules.insert(key, module);
        Ok(module)
    }

    /// Loads any TVM-FFI module from a file: the same as [`Module::open`].
    ///
    /// # Safety
    /// As there.
    ///
    /// # Errors
    /// As there.
    pub unsafe fn load_module(&'static self, path: impl Into<PathBuf>) -> Result<Module> {
        // SAFETY: the caller's promise.
        unsafe { Module::open(path.into()) }
    }

    /// Runs `f` with a stream set once for all the calls on it, which is otherwise done and undone for each. A call on another
    /// stream, or another device, still sets its own.
    ///
    /// The stream is this thread's for TVM-FFI meanwhile, for [`Function::call`](crate::Function::call) too, and what was
    /// set before comes back after it, also when `f` panics. On the host there is no stream and `f` is just run.
    ///
    /// ```no_run
    /// # #[cfg(feature = "cudarc")]
    /// # fn layer(
    /// #     runtime: &'static flashinfer_rs::FlashInferRuntime,
    /// #     stream: std::sync::Arc<flashinfer_rs::cudarc::driver::CudaStream>,
    /// #     out: &mut flashinfer_rs::TensorMut<'_>,
    /// #     input: &flashinfer_rs::TensorRef<'_>,
    /// #     weight: &flashinfer_rs::TensorRef<'_>,
    /// # ) -> flashinfer_rs::Result<()> {
    /// use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm};
    ///
    /// let options = NormOptions::default();
    /// runtime.on(&stream, |s| {
    ///     for _ in 0..32 {
    ///         rmsnorm(out, input, weight, &options, s)?;
    ///     }
    ///     Ok(())
    /// })?
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`DeviceOutOfRange`](FlashInferError::DeviceOutOfRange), [`ContextLost`](FlashInferError::ContextLost), or why there
    /// is no GPU.
    pub fn on<'a, T>(
        &'static self,
        stream: impl Into<DeviceStream<'a>>,
        f: impl for<'s> FnOnce(Stream<'s>) -> T,
    ) -> Result<T> {
        let DeviceStream { device, stream } = stream.into();
        let Device::Cuda(_) = device else { return Ok(f(stream)) };
        let id = self.checked_device(device)?;
        let _stream = self.set_stream(id, stream).map_err(|code| self.api.stream_error(code))?;
        let _scope = Scope { outer: SCOPE.replace(Setting { device: id, stream: stream.raw }) };
        Ok(f(stream))
    }

    /// Makes `stream` this thread's stream for kernels on a device until the guard is dropped, unless a scope did so already;
    /// else the code for [`Api::stream_error`]. `device` comes from [`usable`](Self::usable).
    #[inline(always)]
    pub(crate) fn set_stream(
        &'static self,
        device: i32,
        stream: Stream<'_>,
    ) -> std::result::Result<StreamGuard, c_int> {
        if SCOPE.get() == (Setting { device, stream: stream.raw }) {
            return Ok(StreamGuard::nothing(&self.api, device));
        }
        // SAFETY: the device was found to be one of those that exist.
        unsafe { self.api.set_stream(device, stream.raw) }
    }

    /// The runtime, if it was initialized before.
    #[inline(always)]
    pub(crate) fn get() -> Option<&'static Self> {
        RUNTIME.get()
    }

    /// Whether it is known that this process sees one GPU and no more.
    #[inline]
    pub(crate) fn has_one_device(&self) -> bool {
        self.devices.get().is_some_and(|devices| devices.len() == 1)
    }

    /// A CUDA device's number, if it is known to exist and to work.
    #[inline(always)]
    pub(crate) fn usable(&self, device: Device) -> Option<i32> {
        let Device::Cuda(id) = device else { return None };
        self.devices.get()?.get(id as usize)?.lost.get().is_none().then_some(id as i32)
    }

    /// A CUDA device's number, once it is known to exist and to work; 0 for the host.
    #[inline]
    pub(crate) fn checked_device(&self, device: Device) -> Result<i32> {
        match (self.usable(device), device) {
            (Some(id), _) => Ok(id),
            (None, Device::Cpu) => Ok(0),
            (None, Device::Cuda(id)) => self.look(id),
        }
    }

    /// As [`checked_device`](Self::checked_device), of a device that is not known yet, or that nothing runs on.
    #[cold]
    fn look(&self, id: u32) -> Result<i32> {
        let devices = self.devices()?;
        match devices.get(id as usize).map(|state| state.lost.get()) {
            Some(None) => Ok(id as i32),
            Some(Some((code, message))) => {
                Err(FlashInferError::ContextLost { device: id as i32, code: *code, message: message.clone() })
            }
            None => Err(FlashInferError::DeviceOutOfRange { device: id.into(), count: devices.len() as i32 }),
        }
    }

    /// This thread's turn on a device that exists, among calls that set something about their kernel before they launch it:
    /// another that came between would launch with what this one set.
    #[inline(always)]
    pub(crate) fn turn(&self, device: i32) -> Option<Turn<'_>> {
        Some(self.devices.get()?.get(device as usize)?.turn.take())
    }

    /// CUDA's runtime, where there is one.
    #[inline(always)]
    pub(crate) fn loaded_cudart(&self) -> Option<&Cudart> {
        self.cudart.as_ref().ok()
    }

    /// What an error of a call on a device really is, with the last error's number that it left: the device's context may be
    /// lost.
    #[cold]
    pub(crate) fn diagnosed(
        &'static self,
        error: FlashInferError,
        device: i32,
        code: c_int,
        stream: Stream<'_>,
    ) -> FlashInferError {
        let (Ok(cudart), Ok(devices)) = (self.cudart(), self.devices()) else { return error };
        let Some(state) = devices.get(device as usize) else { return error };
        let lost = cudart.as_sticky(code).or_else(|| {
            // A lost context may refuse even to become the current one.
            let _current = cudart.set_current(device);
            cudart.sticky_error(stream.as_raw())
        });
        match lost {
            Some(lost) => {
                let (code, message) = state.lost.get_or_init(|| lost);
                FlashInferError::ContextLost { device, code: *code, message: message.clone() }
            }
            None => error,
        }
    }

    /// What CUDA answered to a launch of a kernel of this crate's own on a device, as a result.
    #[cfg(feature = "cudarc")]
    #[inline]
    pub(crate) fn launched(&'static self, code: c_int, device: i32, stream: Stream<'_>) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let cudart = self.cudart()?;
        let error = cudart.error("cudaLaunchKernel", code);
        cudart.forget_stale_error();
        Err(self.diagnosed(error, device, code, stream))
    }

    /// What a device has that some kernels are launched by; none where there is no such device.
    #[inline]
    pub(crate) fn limits(&self, device: u32) -> Option<&Limits> {
        let state = self.devices().ok()?.get(device as usize)?;
        match state.limits.get() {
            Some(limits) => Some(limits),
            None => {
                let limits = self.cudart().ok()?.limits(device as i32).ok()?;
                Some(state.limits.get_or_init(|| limits))
            }
        }
    }

    /// The compute capability of a device that exists.
    pub(crate) fn compute_capability(&self, device: i32) -> Result<(i32, i32)> {
        self.cudart()?.compute_capability(device)
    }

    pub(crate) fn cudart(&self) -> Result<&Cudart> {
        self.cudart.as_ref().map_err(|searched| FlashInferError::CudartMissing { searched: searched.clone() })
    }

    /// cuBLASLt, which is loaded when it is first asked for.
    #[cfg(feature = "cudarc")]
    pub(crate) fn cublaslt(&self) -> Result<&'static CublasLt> {
        let mut loaded = self.cublaslt.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((library, _)) = *loaded {
            return Ok(library);
        }
        let library =
            load_of_cuda(CUBLASLT, &self.config)?.map_err(|searched| FlashInferError::CublasLtMissing { searched })?;
        // SAFETY: it is cuBLASLt of CUDA 13, by its digest or by its soname.
        let cublaslt: &'static CublasLt = Box::leak(Box::new(unsafe { CublasLt::resolve(&library) }?));
        *loaded = Some((cublaslt, library.path().to_owned()));
        Ok(cublaslt)
    }

    /// A tensor as an object of TVM-FFI's.
    ///
    /// # Safety
    /// As for [`Object::tensor`].
    pub(crate) unsafe fn tensor_object(&'static self, tensor: DLTensor) -> Result<Object> {
        // SAFETY: the caller's promise.
        unsafe { Object::tensor(tensor, &self.api) }
    }

    /// A vendored library's file, compared with its digest, with the path that it is known by, and whether it is the copy in
    /// this program.
    pub(crate) fn file(&self, stored: &'static Stored) -> Result<(PathBuf, File, bool)> {
        match artifact::locate(stored.name, Some(stored), self.config.lib_dir.as_deref())? {
            Location::File(path) => {
                let expected = (!self.config.unverified).then_some(&stored.sha256);
                let file = Library::checked(stored.name, &path, expected)?;
                Ok((path, file, false))
            }
            Location::Embedded(bytes, sha256) => {
                let (path, file) = Library::embedded_file(stored.name, bytes, sha256)?;
                Ok((path, file, true))
            }
        }
    }

    pub(crate) fn api(&'static self) -> &'static Api {
        &self.api
    }

    /// Raises a TVM-FFI error on this thread, for functions implemented here.
    pub(crate) fn raise(&self, kind: &CStr, message: &CStr) {
        self.api.raise(kind, message);
    }
}

/// Loads a library.
fn open(soname: &str, config: &RuntimeConfig) -> Result<Library> {
    open_by(Library::open, soname, config)
}

/// Loads a copy of a library, which nothing else has.
fn open_copy(soname: &str, config: &RuntimeConfig) -> Result<Library> {
    open_by(Library::copy, soname, config)
}

/// Loads a library by one of [`Library`]'s ways.
fn open_by(
    way: unsafe fn(&str, &Path, Option<&Digest>) -> Result<Library>,
    soname: &str,
    config: &RuntimeConfig,
) -> Result<Library> {
    let row = artifact::vendored(soname).map(|row| &row.stored);
    let path = match artifact::locate(soname, row, config.lib_dir.as_deref())? {
        Location::File(path) => path,
        Location::Embedded(bytes, sha256) => {
            // SAFETY: the digest is that of the vendored library, whose initializers are known to do no harm.
            return unsafe { Library::embedded(soname, bytes, sha256) };
        }
    };
    if config.unverified {
        // SAFETY: whoever made the configuration vouched for the folders.
        return unsafe { way(soname, &path, None) };
    }
    let Some(row) = row else {
        return Err(FlashInferError::ArtifactMissing {
            library: soname.to_owned(),
            searched: vec![path.display().to_string()],
            remedy: format!(
                "the file is there, but none was vendored to check it against: {}; or use \
                 RuntimeConfig::without_verification",
                artifact::how_to_vendor(soname)
            ),
        });
    };
    // SAFETY: the digest is that of the vendored library, whose initializers are known to do no harm.
    unsafe { way(soname, &path, Some(&row.sha256)) }
}

/// A library of CUDA's: one that is in the process already, else ours, else that of `CUDA_HOME`, else the one in CUDA's usual folder,
/// else the dynamic linker's; else what was looked at.
fn load_of_cuda(soname: &str, config: &RuntimeConfig) -> Result<std::result::Result<Library, Vec<String>>> {
    // SAFETY: nothing new is loaded.
    if let Ok(library) = unsafe { Library::by_name(soname, true) } {
        return Ok(Ok(library));
    }
    let mut searched = match open(soname, config) {
        Ok(library) => return Ok(Ok(library)),
        Err(FlashInferError::ArtifactMissing { searched, .. }) => searched,
        Err(error) => return Err(error),
    };
    let toolkit = std::env::var_os("CUDA_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let usual = [toolkit, Some(PathBuf::from(USUAL_CUDA))].into_iter().flatten();
    for path in usual.flat_map(|home| ["lib64", "lib"].map(|folder| home.join(folder).join(soname))) {
        if path.is_file() {
            // SAFETY: a library of CUDA's where CUDA's installer puts it, as any CUDA program would load it.
            return unsafe { Library::open(soname, &path, None) }.map(Ok);
        }
        searched.push(path.display().to_string());
    }
    // SAFETY: the system's own library of CUDA's, as any CUDA program would load it.
    match unsafe { Library::by_name(soname, false) } {
        Ok(library) => Ok(Ok(library)),
        Err(reason) => {
            searched.push(format!("the dynamic linker's own places ({reason})"));
            Ok(Err(searched))
        }
    }
}
