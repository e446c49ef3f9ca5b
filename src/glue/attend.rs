//! The kernel for attention of one query of each row over a paged cache, with the norms of queries and keys, rotary embeddings and
//! the append (attend.cu).

use std::ffi::{CStr, c_int, c_void};

use super::{Loading, ptx};
use crate::cuda::{Blocks, Kernel};
use crate::error::Result;
use crate::runtime::FlashInferRuntime;
use crate::tensor::DType;

/// The PTX of attend.cu, with the zero byte that the driver looks for at its end.
const PTX: &str = concat!(include_str!("attend.ptx"), "\0");

/// The GPUs that the PTX is for begin with Hopper.
const OLDEST: (c_int, c_int) = (9, 0);
/// The warps of a block, and the threads of each.
const WARPS: u32 = 8;
const LANES: u32 = 32;
/// What a row's tokens are divided into, and the most blocks of a cluster.
const RANGES: u32 = 8;
/// The most heads of queries that share one of keys.
const HEADS: u32 = 8;
/// The tokens that a warp has at once.
const TILE: u32 = 16;
/// The sizes of heads that there are kernels for.
const SIZES: [u32; 2] = [64, 128];
/// Their names: those of BF16, and then those of F16.
const NAMES: [&CStr; 2 * SIZES.len()] = [c"attend_bf16_64", c"attend_bf16_128", c"attend_f16_64", c"attend_f16_128"];
/// The most rows: what a grid's second dimension takes.
pub(crate) const MOST_ROWS: u64 = 65_535;
/// The most shared memory that a block may ask for, of the 227 KiB that Hopper has, beside what the kernels declare.
const MOST_SHARED: u32 = 200 << 10;
/// What they declare: of the warps' heads the largest scores and the sums, in all and for each range.
const DECLARED: u32 = 2 * 4 * WARPS * HEADS * (1 + RANGES);
/// Clusters are as large as leaves so many blocks, of which one at least is on each half of a Hopper GPU's multiprocessors.
const BLOCKS: u64 = 64;

/// The sizes of an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) dtype: DType,
    pub(crate) rows: u64,
    pub(crate) q_heads: u64,
    pub(crate) kv_heads: u64,
    pub(crate) size: u64,
}

/// What the kernel takes: `Attend` in attend.cu. What is not given here follows from the sizes.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Call {
    pub(crate) q: *const c_void,
    pub(crate) k: *const c_void,
    pub(crate) v: *const c_void,
    /// Null: without norms.
    pub(crate) q_weight: *const c_void,
    pub(crate) k_weight: *const c_void,
    pub(crate) cos_sin: *const c_void,
    pub(crate) positions: *const c_void,
    pub(crate) lengths: *const c_void,
    pub(crate) page_table: *const c_void,
    pub(crate) k_cache: *mut c_void,
    pub(crate) v_cache: *mut c_void,
    pub(crate) out: *mut c_void,
    /// Of the rows and of the heads of queries, keys and values.
    pub(crate) strides: [i64; 6],
    pub(crate) cos_sin_row: i64,
    pub(crate) table_row: i64,
    pub(crate) q_heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) rotary: u32,
    pub(crate) angles: u32,
    pub(crate) pages: u32,
    pub(crate) page_size: u32,
    pub(crate) width: u32,
    pub(crate) eps: f32,
    /// log₂(e) times the scale of scores.
    pub(crate) factor: f32,
    pub(crate) interleave: u32,
    pub(crate) early: u32,
    pub(crate) of_sizes: OfSizes,
}

/// What follows from the sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(crate) struct OfSizes {
    /// The ranges that a block has.
    ranges: u32,
    /// log₂ of the tokens of a page, where that is a whole number, else 32.
    page_log2: u32,
    /// The heads of queries that share one of keys; the results of these heads that a block has; 2²² divided by that, rounded up.
    heads: u32,
    share: u32,
    by_share: u32,
}

/// As attend.cu asserts.
const _: () = assert!(size_of::<Call>() == 224);

/// The kernel for some sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attend {
    /// Where it is in [`NAMES`].
    place: usize,
    blocks: Blocks,
    of_sizes: OfSizes,
    /// The most shared memory that a block asks for there.
    most_shared: u32,
}

impl Attend {
    /// The one for these sizes on a GPU of this compute capability, whose blocks may have so many bytes of shared memory, where there is
    /// one. In which order a row is summed up is the same for any number of rows.
    pub(crate) fn of(sizes: Sizes, capability: (c_int, c_int), shared_memory: i64) -> Option<Self> {
        let Sizes { dtype, rows, q_heads, kv_heads, size } = sizes;
        let at = SIZES.iter().position(|known| u64::from(*known) == size)?;
        let of_type = match dtype {
            DType::BF16 => 0,
            DType::F16 => SIZES.len(),
            _ => return None,
        };
        let heads = u32::try_from(q_heads.checked_div(kv_heads)?).ok()?;
        let fits = capability >= OLDEST
            && q_heads == u64::from(heads) * kv_heads
            && (1..=HEADS).contains(&heads)
            && (1..=MOST_ROWS).contains(&rows)
            && kv_heads <= 1 << 16;
        if !fits {
            return None;
        }
        let elements = heads * SIZES[at];
        // Two bytes of each element, and of results four.
        let shared = |cluster: u32| {
            let (tiles, made) = (WARPS * 2 * TILE * SIZES[at] * 2, (heads + 2) * SIZES[at] * 2);
            tiles + made + if cluster == 1 { 1 } else { RANGES } * WARPS * elements / cluster * 4
        };
        // Blocks of newer GPUs may have less than Hopper's.
        let most_shared = u32::try_from(shared_memory).ok()?.saturating_sub(DECLARED).min(MOST_SHARED);
        let small = |cluster: &u32| rows * kv_heads * u64::from(*cluster) <= BLOCKS && shared(*cluster) <= most_shared;
        let cluster = [8, 4, 2].into_iter().find(small).unwrap_or(1);
        if shared(cluster) > most_shared {
            return None;
        }
        let share = elements / cluster;
        let of_sizes =
            OfSizes { ranges: RANGES / cluster, page_log2: 32, heads, share, by_share: (1u32 << 22).div_ceil(share) };
        let blocks = Blocks::new([cluster * kv_heads as u32, rows as u32], WARPS * LANES);
        let blocks = Blocks { cluster, shared: shared(cluster), ..blocks };
        Some(Self { place: of_type + at, blocks, of_sizes, most_shared })
    }

    fn kernel(self, runtime: &'static FlashInferRuntime) -> Result<Kernel> {
        static LOADING: Loading<[Kernel; NAMES.len()]> = Loading::new();
        Ok(LOADING.get(|| runtime.cudart()?.load_kernels(ptx(PTX), NAMES))?[self.place])
    }

    /// Makes it ready on the current device, so that no launch has to, in a capture perhaps.
    pub(crate) fn prepare(self, runtime: &'static FlashInferRuntime) -> Result<()> {
        let (cudart, kernel) = (runtime.cudart()?, self.kernel(runtime)?);
        // The same for all sizes that the kernel is for.
        cudart.allow_shared(kernel, self.most_shared)?;
        cudart.prepare(kernel)
    }

    /// Queues it on the current device; CUDA's answer. With `early` it reads all but queries, keys and values while the kernel ahead
    /// runs, where it is launched so that it may start then.
    ///
    /// # Safety
    /// It must be [`of`](Self::of) the call's sizes and the device, and [prepared](Self::prepare) there. The addresses must be memory of the device,
    /// valid until the stream has come so far, as large as the sizes, strides and counts say; caches aligned to 16 bytes, `out` rows of
    /// all heads one after the other; what is written overlaps nothing else. `stream` must be a live stream of the device. With
    /// programmatic dependent launch no kernel that has not ended when the one ahead begins, nor that one itself, may with `early` write
    /// anything that the call has but queries, keys and values.
    pub(crate) unsafe fn launch(
        self,
        runtime: &'static FlashInferRuntime,
        mut call: Call,
        stream: *mut c_void,
        pdl: bool,
    ) -> Result<c_int> {
        let kernel = self.kernel(runtime)?;
        let page_log2 = if call.page_size.is_power_of_two() { call.page_size.trailing_zeros() } else { 32 };
        call.of_sizes = OfSizes { page_log2, ..self.of_sizes };
        let mut arguments = [(&raw mut call).cast::<c_void>()];
        // SAFETY: the argument is of the type of attend.cu; the kernel waits before it reads what the kernel ahead may write, and looks at
        // every position, length and page itself; the rest is the caller's promise.
        unsafe { runtime.cudart()?.launch(kernel, self.blocks, &mut arguments, stream, pdl) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hopper's.
    const SHARED_MEMORY: i64 = 227 << 10;

    fn of(sizes: Sizes, capability: (c_int, c_int)) -> Option<Attend> {
        Attend::of(sizes, capability, SHARED_MEMORY)
    }

    fn sizes(rows: u64, q_heads: u64, kv_heads: u64, size: u64) -> Sizes {
        Sizes { dtype: DType::BF16, rows, q_heads, kv_heads, size }
    }

    #[test]
    fn kernels_are_for_groups_of_up_to_8_heads_of_64_or_128_on_hopper_and_later() {
        let is = |sizes| of(sizes, (9, 0)).is_some();
        for (q_heads, kv_heads) in [(1, 1), (16, 8), (24, 8), (64, 8), (28, 4), (8, 8)] {
            for size in [64, 128] {
                assert!(is(sizes(1, q_heads, kv_heads, size)) && is(sizes(MOST_ROWS, q_heads, kv_heads, size)));
            }
        }
        for other in [
            sizes(1, 72, 8, 128),
            sizes(1, 20, 8, 128),
            sizes(1, 8, 16, 128),
            sizes(1, 8, 0, 128),
            sizes(1, 16, 8, 96),
            sizes(1, 16, 8, 256),
            sizes(0, 16, 8, 128),
            sizes(MOST_ROWS + 1, 16, 8, 128),
            Sizes { dtype: DType::F32, ..sizes(1, 16, 8, 128) },
        ] {
            assert!(!is(other), "{other:?}");
        }
        assert!(of(sizes(1, 16, 8, 128), (8, 9)).is_none());
    }

    #[test]
    fn each_range_and_each_result_has_a_block_and_there_is_room_for_all() {
        for (rows, q_heads, kv_heads) in
            [(1, 16, 8), (2, 16, 8), (4, 16, 8), (8, 16, 8), (1, 64, 8), (1, 3, 1), (2, 40, 8), (5, 7, 1), (1, 8, 1)]
        {
            for (at, size) in [64, 128].into_iter().enumerate() {
                let attend = of(sizes(rows, q_heads, kv_heads, size), (9, 0)).unwrap();
                let OfSizes { ranges, heads, share, by_share, .. } = attend.of_sizes;
                let Blocks { blocks, threads, cluster, shared } = attend.blocks;
                assert_eq!((blocks, threads), ([cluster * kv_heads as u32, rows as u32], 256));
                assert_eq!((ranges * cluster, share * cluster), (RANGES, heads * size as u32));
                assert!(shared <= MOST_SHARED && (cluster == 1 || rows * kv_heads * u64::from(cluster) <= BLOCKS));
                // As the kernel divides.
                for item in 0..heads * size as u32 {
                    assert_eq!((item * by_share) >> 22, item / share);
                }
                assert_eq!(NAMES[attend.place].to_str().unwrap(), format!("attend_bf16_{}", SIZES[at]));
            }
        }
        let halves = of(Sizes { dtype: DType::F16, ..sizes(1, 16, 8, 128) }, (9, 0)).unwrap();
        assert_eq!(NAMES[halves.place], c"attend_f16_128");
    }

    #[test]
    fn blocks_ask_for_no_more_shared_memory_than_they_may_have() {
        // Of GPUs that are newer than Hopper and have 99 KiB.
        let of = |q_heads, shared_memory| Attend::of(sizes(1, q_heads, 8, 128), (12, 0), shared_memory);
        let few = of(32, 99 << 10).unwrap();
        assert!(few.blocks.shared <= few.most_shared && few.most_shared + DECLARED == 99 << 10);
        assert_eq!(of(32, SHARED_MEMORY).unwrap().most_shared, MOST_SHARED);
        for (q_heads, shared_memory) in [(64, 99 << 10), (8, 48 << 10), (8, 0), (8, -1)] {
            assert_eq!(of(q_heads, shared_memory), None);
        }
        assert!(i64::from(MOST_SHARED + DECLARED) <= SHARED_MEMORY);
        let declared = |line: &&str| line.trim_start().starts_with(".shared .align") && !line.contains("pool");
        let bytes = |line: &str| line.rsplit_once('[')?.1.strip_suffix("];")?.parse::<u32>().ok();
        let all: u32 = PTX.lines().filter(declared).map(|line| bytes(line).unwrap()).sum();
        assert_eq!(all, DECLARED * NAMES.len() as u32);
    }

    #[test]
    fn the_ptx_has_the_kernels_and_the_sizes_that_are_counted_on() {
        let source = concat!(include_str!("hopper.cuh"), include_str!("attend.cu"));
        for name in NAMES {
            assert!(PTX.contains(&format!(".visible .entry {}(", name.to_str().unwrap())), "{name:?}");
        }
        assert_eq!(PTX.matches(".visible .entry ").count(), NAMES.len());
        for (name, value) in [("LANES", LANES), ("WARPS", WARPS), ("RANGES", RANGES), ("HEADS", HEADS), ("TILE", TILE)]
        {
            assert!(source.contains(&format!("constexpr u32 {name} = {value};")), "{name}");
        }
    }

    /// The kernel ahead may write still what a cache that is not coherent has read already.
    #[test]
    fn the_kernels_read_nothing_past_the_coherent_caches_and_wait_once() {
        assert!(!PTX.contains("ld.global.nc") && !PTX.contains("ld.volatile"));
        for body in PTX.split(".visible .entry ").skip(1) {
            // In either place, one of which is taken.
            assert_eq!(body.matches("griddepcontrol.wait;").count(), 2);
            assert_eq!(body.matches("griddepcontrol.launch_dependents;").count(), 2);
        }
    }
}
