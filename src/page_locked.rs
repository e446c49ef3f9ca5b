//! Page-locked memory of the host, which the GPU copies from and to while the host goes on.

use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::driver::result as cuda;

use crate::error::{FlashInferError, Result, driver_in};
use crate::owner::CurrentContext;
use crate::tensor::{DType, Device, Layout};

/// Page-locked memory of the host, zeroed when it is made.
#[derive(Debug)]
pub(crate) struct Pinned {
    data: NonNull<u8>,
    bytes: usize,
    context: Arc<CudaContext>,
    leaked: bool,
}

// SAFETY: memory of the host that this alone refers to.
unsafe impl Send for Pinned {}
// SAFETY: it is written through `&mut` alone.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// With the context current.
    pub(crate) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(64);
        // SAFETY: no flags; the memory is written before anything reads it.
        let data =
            unsafe { cuda::malloc_host(bytes, 0) }.map_err(driver_in(context, "allocating page-locked memory"))?;
        let Some(data) = NonNull::new(data.cast::<u8>()) else {
            return Err(FlashInferError::Cuda { call: "cuMemHostAlloc", code: 2, message: "no memory".to_owned() });
        };
        // SAFETY: so many bytes were allocated. Zeros, since upstream may read behind what it wrote in an earlier plan.
        unsafe { data.write_bytes(0, bytes) };
        Ok(Self { data, bytes, context: Arc::clone(context), leaked: false })
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// As numbers; only while no copy of them is on its way.
    pub(crate) fn words(&mut self) -> &mut [i32] {
        // SAFETY: so many bytes, aligned to a page, all of them written, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.data.as_ptr().cast(), self.bytes / 4) }
    }

    /// So many bytes from a place on, which lie within it; only while no copy of them is on its way.
    pub(crate) fn part(&self, first: usize, count: usize) -> &[u8] {
        assert!(first <= self.bytes && count <= self.bytes - first, "a part within page-locked memory");
        // SAFETY: within the memory, all of which was written, and borrowed.
        unsafe { slice::from_raw_parts(self.data.as_ptr().add(first), count) }
    }

    /// As [`part`](Self::part), to be written.
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "steps of compute graphs are copied so"))]
    pub(crate) fn part_mut(&mut self, first: usize, count: usize) -> &mut [u8] {
        assert!(first <= self.bytes && count <= self.bytes - first, "a part within page-locked memory");
        // SAFETY: as above, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.data.as_ptr().add(first), count) }
    }

    /// Never gives the memory back: a copy of it may be on its way for good.
    pub(crate) fn leak(&mut self) {
        self.leaked = true;
    }

    /// As a tensor of bytes.
    pub(crate) fn layout(&self) -> Layout {
        Layout::build(self.data.as_ptr().cast(), Device::Cpu, DType::U8, &[self.bytes as i64], None, None)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.leaked {
            return;
        }
        let _current = CurrentContext::bind(&self.context);
        // SAFETY: allocated by `new`, and given up here, once; whoever drops it waited for its copies.
        self.context.record_err(unsafe { cuda::free_host(self.data.as_ptr().cast()) });
    }
}
