//! How long candidates take: each is captured many times over into a graph, as a model's layers follow one another there, with
//! weights that come from memory and not from the GPU's cache.

use std::sync::Arc;

use cudarc::driver::sys::{CUdeviceptr, CUevent, CUevent_flags};
use cudarc::driver::{CudaContext, result};

use super::gpu::PlannedMatMul;
use crate::cublaslt::{Addresses, Product};
use crate::error::{Result, driver_in};
use crate::graph::{Executable, PrivateStream};
use crate::owner::CurrentContext;
use crate::stream::Stream;
use crate::tensor::DType;

/// As many bytes of weights in turn as no GPU's cache holds.
const UNCACHED: u64 = 128 << 20;
/// The most and the fewest launches of a graph.
const MOST_LAUNCHES: u64 = 64;
const FEWEST_LAUNCHES: u64 = 4;
/// How often those candidates are measured that one measurement did not rule out: the median counts.
const REPETITIONS: usize = 5;
/// What is measured again: what took at most so much longer than the fastest, and so many of them.
const WORTH_A_LOOK: f64 = 1.3;
const MOST_LOOKED_AT: usize = 6;
/// Bytes of random numbers, which are repeated.
const PATTERN: usize = 1 << 20;

/// What a bench is for.
pub(super) enum Extent {
    /// One launch.
    Once,
    /// Measurements.
    Many,
}

/// A stream of its own, and memory for a product's tensors.
pub(super) struct Bench {
    stream: PrivateStream,
    at: Addresses,
    /// From one weight to the next, in bytes, and how many there are.
    weights: (u64, u64),
    context: Arc<CudaContext>,
    _memory: Memory,
}

/// Memory of a GPU.
struct Memory {
    address: CUdeviceptr,
    context: Arc<CudaContext>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _current = CurrentContext::bind(&self.context);
        // SAFETY: allocated by `Bench::new`, and given up here, once; the call waits for what uses it.
        unsafe { result::free_sync(self.address) }.ok();
    }
}

/// An event that keeps the time.
struct Event(CUevent);

impl Event {
    fn new() -> std::result::Result<Self, cudarc::driver::DriverError> {
        result::event::create(CUevent_flags::CU_EVENT_DEFAULT).map(Self)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and given up here, once.
        unsafe { result::event::destroy(self.0) }.ok();
    }
}

impl Bench {
    /// In the context that is current, which must be this one.
    pub(super) fn new(product: &Product, context: &Arc<CudaContext>, extent: Extent, workspace: usize) -> Result<Self> {
        let failed = driver_in(context, "allocating scratch memory to measure a product in");
        let (size, out_size) = (product.dtype.size() as u64, product.out.size() as u64);
        let weight = aligned(product.columns.saturating_mul(product.inner).saturating_mul(size));
        let count = match extent {
            Extent::Once => 1,
            Extent::Many => UNCACHED.div_ceil(weight).clamp(1, MOST_LAUNCHES),
        };
        let last_row = (product.rows - 1).saturating_mul(product.row_stride as u64);
        let sizes = [
            weight.saturating_mul(count),
            last_row.saturating_add(product.inner).saturating_mul(size),
            product.columns.saturating_mul(size),
            product.rows.saturating_mul(product.columns).saturating_mul(out_size),
            workspace as u64,
        ];
        let total = sizes.iter().fold(PATTERN as u64, |total, bytes| total.saturating_add(aligned(*bytes)));
        let stream = PrivateStream::new(context)?;
        // SAFETY: any size may be asked for; what cannot be had is an error.
        let address = unsafe { result::malloc_sync(usize::try_from(total).unwrap_or(usize::MAX)) }.map_err(&failed)?;
        let memory = Memory { address, context: Arc::clone(context) };
        let mut next = address;
        let [weight_at, x, bias, out, workspace_at] = sizes.map(|bytes| {
            let here = next;
            next += aligned(bytes);
            here
        });
        let bench = Self {
            stream,
            at: Addresses {
                x: x as *const _,
                weight: weight_at as *const _,
                bias: if product.bias { bias as *const _ } else { super::gpu::NOTHING },
                out: out as *mut _,
                workspace: workspace_at as *mut _,
            },
            weights: (weight, count),
            context: Arc::clone(context),
            _memory: memory,
        };
        bench.fill(address, total, product.dtype)?;
        Ok(bench)
    }

    /// Small random numbers everywhere: zeros are multiplied faster.
    fn fill(&self, address: CUdeviceptr, total: u64, dtype: DType) -> Result<()> {
        let failed = driver_in(&self.context, "filling scratch memory");
        let pattern = pattern(dtype);
        let stream = self.stream.stream();
        // SAFETY: the memory is longer than the pattern, which stays until the stream was waited for below.
        unsafe { result::memcpy_htod_async(address, &pattern, stream) }.map_err(&failed)?;
        let mut filled = PATTERN as u64;
        while filled < total {
            let bytes = filled.min(total - filled);
            // SAFETY: both lie in the memory, and do not overlap.
            unsafe { result::memcpy_dtod_async(address + filled, address, bytes as usize, stream) }.map_err(&failed)?;
            filled += bytes;
        }
        self.wait()
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the stream is live.
        let waited = unsafe { result::stream::synchronize(self.stream.stream()) };
        waited.map_err(driver_in(&self.context, "measuring a product"))
    }

    /// Launches it once, and waits.
    pub(super) fn run(&self, planned: &PlannedMatMul) -> Result<()> {
        self.launch(planned, 0)?;
        self.wait()
    }

    fn launch(&self, planned: &PlannedMatMul, turn: u64) -> Result<()> {
        let (bytes, count) = self.weights;
        let weight = self.at.weight.wrapping_byte_add((turn % count * bytes) as usize);
        let at = Addresses { weight, ..self.at };
        // SAFETY: the stream is live for as long as this is.
        let stream = unsafe { Stream::from_raw(self.stream.stream().cast()) };
        // SAFETY: the memory is the bench's, as large as the product's tensors, each at a multiple of 256 bytes, with as large a
        // workspace as any candidate's; one stream uses it, and it is freed behind what was launched.
        unsafe { planned.launch(&at, stream, false) }
    }

    /// The fastest, by its place, and its time in microseconds; none where none can be launched.
    pub(super) fn fastest(&self, candidates: &[PlannedMatMul]) -> Result<Option<(usize, f64)>> {
        let launches = self.weights.1.max(FEWEST_LAUNCHES);
        let mut graphs = Vec::with_capacity(candidates.len());
        for (place, planned) in candidates.iter().enumerate() {
            // One that fails is none. Outside of the graph first, where its kernels are loaded.
            match self.run(planned).and_then(|()| self.captured(planned, launches)) {
                Ok(graph) => graphs.push((place, graph, Vec::with_capacity(REPETITIONS))),
                Err(error) if error.is_fatal() => return Err(error),
                Err(_) => {}
            }
        }
        for (_, graph, times) in &mut graphs {
            // The first launch of a graph takes longer.
            self.time(graph)?;
            times.push(self.time(graph)?);
        }
        let first = |times: &[f64]| times.first().copied().unwrap_or(f64::INFINITY);
        graphs.sort_by(|(_, _, a), (_, _, b)| first(a).total_cmp(&first(b)));
        let best = graphs.first().map_or(f64::INFINITY, |(_, _, times)| first(times));
        graphs.truncate(MOST_LOOKED_AT);
        graphs.retain(|(_, _, times)| first(times) <= best * WORTH_A_LOOK);
        // In turn, so that what else the GPU does befalls all of them.
        for _ in 1..REPETITIONS {
            for (_, graph, times) in &mut graphs {
                times.push(self.time(graph)?);
            }
        }
        let timed = graphs.into_iter().map(|(place, _, times)| (place, median(times) * 1e3 / launches as f64));
        Ok(timed.min_by(|(_, a), (_, b)| a.total_cmp(b)))
    }

    fn captured(&self, planned: &PlannedMatMul, launches: u64) -> Result<Executable> {
        let capturing = self.stream.begin()?;
        for turn in 0..launches {
            self.launch(planned, turn)?;
        }
        let graph = capturing.end().map_err(driver_in(&self.context, "capturing a product"))?;
        Executable::new(graph, Vec::new(), &self.context)
    }

    /// How long a graph takes, in milliseconds.
    fn time(&self, graph: &Executable) -> Result<f64> {
        let failed = driver_in(&self.context, "measuring a product");
        let (start, end) = (Event::new().map_err(&failed)?, Event::new().map_err(&failed)?);
        let stream = self.stream.stream();
        // SAFETY: the stream, the events and the graph are live until the end was waited for.
        let milliseconds = unsafe {
            result::event::record(start.0, stream)
                .and_then(|()| result::graph::launch(graph.handle, stream))
                .and_then(|()| result::event::record(end.0, stream))
                .and_then(|()| result::event::synchronize(end.0))
                .and_then(|()| result::event::elapsed(start.0, end.0))
        };
        milliseconds.map(f64::from).map_err(failed)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // What was launched last uses the memory; an error of it was said, or is said by whoever comes next.
        let _current = CurrentContext::bind(&self.context);
        self.wait().ok();
    }
}

fn aligned(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(256).unwrap_or(u64::MAX)
}

/// Numbers from 1/32 to 1/16 with random signs and digits, bit by bit.
fn pattern(dtype: DType) -> Vec<u32> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as u32
    };
    let (free, exponent) = match dtype {
        DType::F16 => (0x83FF_83FF, 0x2800_2800),
        DType::BF16 => (0x807F_807F, 0x3D00_3D00),
        _ => (0x807F_FFFF, 0x3D00_0000),
    };
    (0..PATTERN / 4).map(|_| random() & free | exponent).collect()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn scratch_memory_holds_small_numbers_of_both_signs_that_differ() {
        let halves = |dtype| pattern(dtype).into_iter().flat_map(|word| [word as u16, (word >> 16) as u16]);
        let of_bf16: Vec<f64> = halves(DType::BF16).map(|bits| bf16::from_bits(bits).to_f64()).collect();
        let of_f16: Vec<f64> = halves(DType::F16).map(|bits| f16::from_bits(bits).to_f64()).collect();
        let of_f32: Vec<f64> = pattern(DType::F32).into_iter().map(|bits| f32::from_bits(bits).into()).collect();
        for numbers in [of_bf16, of_f16, of_f32] {
            assert!(numbers.iter().all(|x| (1.0 / 32.0..1.0 / 16.0).contains(&x.abs())));
            let sum: f64 = numbers.iter().sum();
            assert!(sum.abs() < 1e-3 * numbers.len() as f64, "{sum}");
        }
    }

    #[test]
    fn the_middle_of_the_times_counts() {
        assert_eq!(median(vec![5.0, 1.0, 100.0, 2.0, 3.0]), 3.0);
    }
}
