//! What stands in front of sampling, and behind it (rows.cu).

use std::ffi::{CStr, c_void};

use super::Loading;
use crate::cuda::{Blocks, CurrentDevice, Kernel};
use crate::error::Result;
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;

/// The PTX of rows.cu, with the zero byte that the driver looks for at its end.
const ROWS: &CStr = match CStr::from_bytes_with_nul(concat!(include_str!("rows.ptx"), "\0").as_bytes()) {
    Ok(text) => text,
    Err(_) => panic!("PTX has no zero bytes"),
};

/// Threads of a block.
const THREADS: u32 = 256;
/// The most blocks of one row, which its word counts in 12 bits.
const MOST_CHUNKS: u64 = 4095;
/// As many blocks of a call as keep a large GPU's memory busy and are all there at once.
const BLOCKS: u64 = 528;
/// The most units of 16 bytes that a block of many rows looks at.
const LONGEST_CHUNK: u64 = 4096;

/// The kernels, loaded. A handle serves every device and thread.
#[derive(Debug)]
pub(crate) struct Glue {
    runtime: &'static FlashInferRuntime,
    guard_rows: Kernel,
    chain_begin: Kernel,
    chain_end: Kernel,
}

/// Where a kernel is to run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// A device that exists.
    pub(crate) device: i32,
    /// A stream of its.
    pub(crate) stream: Stream<'a>,
}

/// Sequences of speculative sampling: how many, of how many drafts each, and the size of the vocabulary.
#[derive(Clone, Copy)]
pub(crate) struct Chain {
    pub(crate) batch: u32,
    pub(crate) count: u32,
    pub(crate) vocab: u32,
}

impl Glue {
    /// The kernels, which are loaded the first time. Best outside of a capture, though loading breaks none.
    pub(crate) fn get() -> Result<&'static Self> {
        static LOADING: Loading<Glue> = Loading::new();
        LOADING.get(|| {
            let runtime = FlashInferRuntime::global()?;
            let names = [c"guard_rows", c"chain_begin", c"chain_end"];
            let [guard_rows, chain_begin, chain_end] = runtime.cudart()?.load_kernels(ROWS, names)?;
            Ok(Self { runtime, guard_rows, chain_begin, chain_end })
        })
    }

    /// Makes the kernels ready on a device, so that no launch has to, in a capture perhaps.
    pub(crate) fn prepare(&self, device: i32) -> Result<()> {
        let cudart = self.runtime.cudart()?;
        let _current = cudart.set_current(device)?;
        [self.guard_rows, self.chain_begin, self.chain_end].into_iter().try_for_each(|kernel| cudart.prepare(kernel))
    }

    /// Queues a look at `count` rows of `length` numbers: what is wrong with each stands in `status` then, and those that are no
    /// distribution are made such that have the first token alone.
    ///
    /// # Safety
    /// All must be memory of the device, valid until the kernel has run: the rows contiguous F32, `status` an i32 for each row,
    /// `seen` a u64 for each row, 0 now and after each call, which no other stream uses meanwhile.
    pub(crate) unsafe fn guard_rows(
        &self,
        at: Place<'_>,
        (rows, count, length): (*mut c_void, u32, u32),
        seen: *mut c_void,
        status: *mut c_void,
    ) -> Result<()> {
        let (chunk, chunks) = chunks(count, length);
        let (mut rows, mut length, mut chunk, mut chunks) = (rows, length, chunk, chunks);
        let (mut seen, mut status) = (seen, status);
        let blocks = count * chunks;
        let mut arguments = [
            (&raw mut rows).cast(),
            (&raw mut length).cast(),
            (&raw mut chunk).cast(),
            (&raw mut chunks).cast(),
            (&raw mut seen).cast(),
            (&raw mut status).cast(),
        ];
        // SAFETY: the arguments are of the types of rows.cu; the chunks cover a row wherever it starts; the rest is the
        // caller's promise.
        unsafe { self.launch(self.guard_rows, at, blocks, &mut arguments) }
    }

    /// Queues what speculative sampling needs ahead of it: the draft tokens, 0 for those that are no token, and counters of 0.
    ///
    /// # Safety
    /// All must be i32 in memory of the device, valid until the kernel has run: `drafts` and `checked` of all drafts of all
    /// sequences, the others one for each sequence, and none of those that are written in use on another stream.
    pub(crate) unsafe fn chain_begin(
        &self,
        at: Place<'_>,
        drafts: *const c_void,
        [checked, accepted, emitted, status]: [*mut c_void; 4],
        Chain { batch, count, vocab }: Chain,
    ) -> Result<()> {
        let mut pointers = [drafts.cast_mut(), checked, accepted, emitted, status];
        let mut sizes = [batch, count, vocab];
        let [a, b, c, d, e] = pointers.each_mut().map(|pointer| (&raw mut *pointer).cast());
        let [f, g, h] = sizes.each_mut().map(|size| (&raw mut *size).cast());
        let mut arguments = [a, b, c, d, e, f, g, h];
        // SAFETY: the arguments are of the types of rows.cu; the rest is the caller's promise.
        unsafe { self.launch(self.chain_begin, at, batch.div_ceil(THREADS), &mut arguments) }
    }

    /// Queues what speculative sampling needs behind it: a token where none was left to draw, the counters added to the caller's,
    /// and in each sequence's status what is wrong with its rows.
    ///
    /// # Safety
    /// All must be memory of the device, valid until the kernel has run, in the order of `chain_end` in rows.cu: what
    /// [`chain_begin`](Self::chain_begin) and FlashInfer's kernel were given, and a status for each row of drafts and of targets.
    pub(crate) unsafe fn chain_end(
        &self,
        at: Place<'_>,
        mut pointers: [*mut c_void; 10],
        Chain { batch, count, vocab }: Chain,
    ) -> Result<()> {
        let mut sizes = [count, vocab];
        let [a, b, c, d, e, f, g, h, i, j] = pointers.each_mut().map(|pointer| (&raw mut *pointer).cast());
        let [k, l] = sizes.each_mut().map(|size| (&raw mut *size).cast());
        let mut arguments = [a, b, c, d, e, f, g, h, i, j, k, l];
        // SAFETY: the arguments are of the types of rows.cu; the rest is the caller's promise.
        unsafe { self.launch(self.chain_end, at, batch, &mut arguments) }
    }

    /// # Safety
    /// `arguments` must point to what the kernel takes, each of its type, and hold for it.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        Place { device, stream }: Place<'_>,
        blocks: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let cudart = self.runtime.cudart()?;
        // Where there is one device alone, it is that.
        let _current: Option<CurrentDevice> =
            if self.runtime.has_one_device() { None } else { Some(cudart.set_current(device)?) };
        let blocks = Blocks::new([blocks, 1], THREADS);
        // SAFETY: the caller's promise.
        let code = unsafe { cudart.launch(kernel, blocks, arguments, stream.as_raw(), false) }?;
        if code == 0 {
            return Ok(());
        }
        let error = cudart.error("cudaLaunchKernel", code);
        cudart.forget_stale_error();
        Err(self.runtime.diagnosed(error, device, code, stream))
    }
}

/// How the units of 16 bytes of each of so many rows are divided into blocks: how many each block has, and how many blocks.
fn chunks(rows: u32, length: u32) -> (u32, u32) {
    // Wherever a row starts: up to three numbers of its first unit lie ahead of it.
    let units = (u64::from(length) + 6) / 4;
    let wanted = (units * u64::from(rows)).div_ceil(BLOCKS).min(LONGEST_CHUNK);
    let chunk = wanted.max(units.div_ceil(MOST_CHUNKS)).next_multiple_of(u64::from(THREADS));
    (chunk as u32, units.div_ceil(chunk) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_covered_by_blocks_that_its_word_can_count_and_a_launch_can_have() {
        let lengths = [1, 2, 3, 4, 5, 1000, 32_000, 57_592, 128_256, 151_936, 262_144, 1 << 24, (1 << 24) - 1];
        for length in lengths {
            for rows in [1u32, 2, 7, 32, 128, 1000, 65_536, u32::MAX / length] {
                if u64::from(rows) * u64::from(length) > 1 << 32 || rows > i32::MAX as u32 {
                    continue;
                }
                let (chunk, chunks) = chunks(rows, length);
                // Of a row that starts at the end of its first unit.
                let units = (u64::from(length) + 3).div_ceil(4);
                assert!(u64::from(chunk) * u64::from(chunks) >= units, "{rows} of {length}");
                assert!(
                    u64::from(chunk) * u64::from(chunks - 1) < (u64::from(length) + 6) / 4,
                    "{rows} of {length}: an empty one"
                );
                assert!((1..=MOST_CHUNKS).contains(&chunks.into()), "{rows} of {length}: {chunks} blocks");
                assert!(u64::from(rows) * u64::from(chunks) <= i32::MAX as u64, "{rows} of {length}: a launch");
                assert_eq!(chunk % THREADS, 0);
            }
        }
        assert_eq!(chunks(32, 128_256), (2048, 16), "the batch that is measured");
    }

    #[test]
    fn ptx_has_the_kernels_and_the_limits_that_are_counted_on() {
        let (ptx, source) = (ROWS.to_str().unwrap(), include_str!("rows.cu"));
        for kernel in ["guard_rows", "chain_begin", "chain_end"] {
            assert!(ptx.contains(&format!(".visible .entry {kernel}(")), "{kernel}");
        }
        assert_eq!(ptx.matches(&format!(".maxntid {THREADS}, 1, 1")).count(), 3);
        assert!(source.contains(&format!("THREADS = {THREADS};")) && source.contains(&format!("& 0x{MOST_CHUNKS:x})")));
    }
}
