//! The little of the CUDA runtime that guards need: devices, their attributes, the current one.

use std::ffi::{CStr, c_char, c_int};

use crate::error::{FlashInferError, Result};
use crate::loader::Library;

/// The CUDA release that the pinned kernels were built for; drivers are compatible backwards.
const NEEDED_DRIVER: c_int = 13000;

/// `cudaDevAttrMultiProcessorCount`.
const MULTIPROCESSORS: c_int = 16;
/// `cudaErrorNoDevice`.
const NO_DEVICE: c_int = 100;

pub(crate) struct Cudart {
    driver_get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_device_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_device: unsafe extern "C" fn(*mut c_int) -> c_int,
    set_device: unsafe extern "C" fn(c_int) -> c_int,
    device_get_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Cudart {
    /// # Safety
    /// `library` must be libcudart.so.13.
    pub(crate) unsafe fn resolve(library: &Library) -> Result<Self> {
        // SAFETY: the caller says that the library is CUDA's runtime; the types are those of cuda_runtime_api.h.
        unsafe {
            Ok(Self {
                driver_get_version: library.symbol(c"cudaDriverGetVersion")?,
                get_device_count: library.symbol(c"cudaGetDeviceCount")?,
                get_device: library.symbol(c"cudaGetDevice")?,
                set_device: library.symbol(c"cudaSetDevice")?,
                device_get_attribute: library.symbol(c"cudaDeviceGetAttribute")?,
                get_error_string: library.symbol(c"cudaGetErrorString")?,
            })
        }
    }

    /// How many GPUs this process sees; an error where there is no driver, or one too old.
    pub(crate) fn device_count(&self) -> Result<c_int> {
        // SAFETY: both functions write one int through a pointer that is valid for the call.
        let driver = self.out("cudaDriverGetVersion", |out| unsafe { (self.driver_get_version)(out) })?;
        if driver == 0 {
            return Err(FlashInferError::DriverMissing { reason: "CUDA's runtime finds none".to_owned() });
        }
        if driver < NEEDED_DRIVER {
            return Err(FlashInferError::DriverTooOld { found: release(driver), needed: release(NEEDED_DRIVER) });
        }
        // SAFETY: as above.
        match self.out("cudaGetDeviceCount", |out| unsafe { (self.get_device_count)(out) }) {
            Err(FlashInferError::Cuda { code: NO_DEVICE, .. }) => Ok(0),
            other => other,
        }
    }

    /// The number of multiprocessors of a GPU.
    pub(crate) fn multiprocessors(&self, device: c_int) -> Result<c_int> {
        // SAFETY: one int is written through a pointer that is valid for the call.
        self.out("cudaDeviceGetAttribute", |out| unsafe { (self.device_get_attribute)(out, MULTIPROCESSORS, device) })
    }

    /// Makes a device this thread's current one until the guard is dropped.
    pub(crate) fn set_current(&'static self, device: c_int) -> Result<CurrentDevice> {
        // SAFETY: one int is written through a pointer that is valid for the call.
        let before = self.out("cudaGetDevice", |out| unsafe { (self.get_device)(out) })?;
        if before == device {
            return Ok(CurrentDevice { cudart: self, restore: None });
        }
        // SAFETY: any number may be given; one out of range is answered by an error.
        self.check("cudaSetDevice", unsafe { (self.set_device)(device) })?;
        Ok(CurrentDevice { cudart: self, restore: Some(before) })
    }

    fn out(&self, call: &'static str, get: impl FnOnce(*mut c_int) -> c_int) -> Result<c_int> {
        let mut value = 0;
        self.check(call, get(&mut value))?;
        Ok(value)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the function answers a static C string for every number.
        let message = unsafe { CStr::from_ptr((self.get_error_string)(code)) }.to_string_lossy().into_owned();
        Err(FlashInferError::Cuda { call, code, message })
    }
}

/// Gives a thread its current device back.
pub(crate) struct CurrentDevice {
    cudart: &'static Cudart,
    restore: Option<c_int>,
}

impl Drop for CurrentDevice {
    fn drop(&mut self) {
        if let Some(device) = self.restore {
            // SAFETY: the device was current before, so it is in range.
            unsafe { (self.cudart.set_device)(device) };
        }
    }
}

/// CUDA writes 13.0 as 13000.
fn release(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
