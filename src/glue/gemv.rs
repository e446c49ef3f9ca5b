//! The kernels for products of few rows (gemv.cu), which read the weight once and wait for nothing else.

use std::ffi::{CStr, c_int, c_void};

use super::{Loading, ptx};
use crate::cublaslt::{Addresses, Product};
use crate::cuda::{Blocks, Kernel};
use crate::error::Result;
use crate::runtime::FlashInferRuntime;
use crate::tensor::DType;

/// The PTX of gemv.cu, with the zero byte that the driver looks for at its end.
const PTX: &str = concat!(include_str!("gemv.ptx"), "\0");

/// The GPUs that the PTX is for begin with Hopper.
const OLDEST: (c_int, c_int) = (9, 0);
/// The most warps of a block, and the threads of each.
const WARPS: u32 = 8;
const LANES: u32 = 32;
/// Rows of the weight that tensor cores take at once.
const TILE: u32 = 16;
/// Columns that a warp has at once.
const SLICE: u32 = 128;
/// The most blocks of a cluster.
const CLUSTER: u32 = 8;
/// What a row's length must be a multiple of: elements that a thread reads at once.
const VECTOR: u64 = 8;
/// About as many blocks as keep a Hopper GPU's memory busy, of one tile, of two where `x` is small, and of two where it is not.
const BLOCKS: u64 = 256;
const BLOCKS_OF_TWO: u64 = 128;
const BLOCKS_OF_MANY_ROWS: u64 = 96;

/// What the kernels' last argument is made of.
const ADD: u32 = 1;
const F32_OUT: u32 = 2;
const GATED: u32 = 4;

/// The kernels of each type: for how many rows at most, and how many tiles of the weight a block has.
const ALL: [(u32, u32); 5] = [(8, 1), (8, 2), (16, 1), (32, 1), (32, 2)];
/// Their names: those of BF16, and then those of F16.
const NAMES: [&CStr; 2 * ALL.len()] = [
    c"few_rows_bf16_8_1",
    c"few_rows_bf16_8_2",
    c"few_rows_bf16_16_1",
    c"few_rows_bf16_32_1",
    c"few_rows_bf16_32_2",
    c"few_rows_f16_8_1",
    c"few_rows_f16_8_2",
    c"few_rows_f16_16_1",
    c"few_rows_f16_32_1",
    c"few_rows_f16_32_2",
];

/// What is computed with a product in one kernel.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Around {
    /// The rows' RMSNorm ahead of it, with this number beside the mean of the squares; of BF16 alone, since numbers are not made smaller
    /// before they are multiplied by the norm's weight.
    pub(crate) eps: Option<f32>,
    /// The weight has two halves of rows, and a result is the first half's, times its sigmoid, times the other's. Without bias,
    /// residual and a result in F32. The product's columns are the result's.
    pub(crate) gated: bool,
}

/// The kernel for a product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct FewRows {
    /// Where it is in [`NAMES`].
    place: usize,
    blocks: Blocks,
    around: Around,
}

impl FewRows {
    /// The one that computes a product on a GPU of this compute capability, where there is one. Which columns are summed up with which is
    /// the same for any number of rows.
    pub(crate) fn of(product: &Product, around: Around, capability: (c_int, c_int)) -> Option<Self> {
        let fits = capability >= OLDEST
            && matches!(product.dtype, DType::BF16 | DType::F16)
            && product.inner.is_multiple_of(VECTOR)
            && product.alignment[0] >= 16
            && (around.eps.is_none() || product.dtype == DType::BF16)
            && !(around.gated && (product.bias || product.residual || product.out != product.dtype));
        let (most, _) = ALL.into_iter().find(|(rows, _)| u64::from(*rows) >= product.rows).filter(|_| fits)?;
        let wide = u64::from(if around.gated { TILE / 2 } else { TILE });
        let tiles = product.columns.div_ceil(wide);
        let slices = product.inner.div_ceil(SLICE.into());
        // Of the weight's shape alone.
        let cluster = match around {
            Around { eps: None, gated: false } => {
                (BLOCKS / tiles).clamp(1, slices.div_ceil(WARPS.into()).min(CLUSTER.into()))
            }
            _ => 1,
        };
        let warps = slices.div_ceil(cluster).min(WARPS.into());
        let enough = if most == ALL[0].0 { BLOCKS_OF_TWO } else { BLOCKS_OF_MANY_ROWS };
        let of_block = if tiles / 2 * cluster >= enough && ALL.contains(&(most, 2)) { 2 } else { 1 };
        let place = ALL.iter().position(|kernel| *kernel == (most, of_block))?;
        let blocks = [u32::try_from(tiles.div_ceil(of_block.into()) * cluster).ok()?, 1];
        let blocks = Blocks { cluster: cluster as u32, ..Blocks::new(blocks, warps as u32 * LANES) };
        let of_type = if product.dtype == DType::F16 { NAMES.len() / 2 } else { 0 };
        Some(Self { place: of_type + place, blocks, around })
    }

    /// Its name, by which selections call it.
    pub(crate) fn name(self) -> &'static str {
        NAMES[self.place].to_str().unwrap_or_default()
    }

    /// The name as it is kept, where it is one of a kernel's.
    pub(crate) fn known(name: &str) -> Option<&'static str> {
        NAMES.iter().filter_map(|known| known.to_str().ok()).find(|known| *known == name)
    }

    fn kernel(self, runtime: &'static FlashInferRuntime) -> Result<Kernel> {
        static LOADING: Loading<[Kernel; NAMES.len()]> = Loading::new();
        Ok(LOADING.get(|| runtime.cudart()?.load_kernels(ptx(PTX), NAMES))?[self.place])
    }

    /// Makes it ready on the current device, so that no launch has to, in a capture perhaps.
    pub(crate) fn prepare(self, runtime: &'static FlashInferRuntime) -> Result<()> {
        runtime.cudart()?.prepare(self.kernel(runtime)?)
    }

    /// Queues it on the current device; CUDA's answer. With programmatic dependent launch it reads the weight and the norm's while the
    /// kernel ahead runs. The kernel behind it may start before it has waited.
    ///
    /// # Safety
    /// It must be [`of`](Self::of) this product and the device. The addresses must be memory of the device, valid until the
    /// stream has come so far, as large and as aligned as the product says, of which `out` overlaps nothing else; `norm` as many
    /// numbers of the product's type as a row has, at a multiple of 16 bytes, with a norm; `stream` a live
    /// stream of the device. With programmatic dependent launch no kernel that has not ended when the one ahead begins may
    /// write the weight or the norm's, nor that one itself.
    pub(crate) unsafe fn launch(
        self,
        runtime: &'static FlashInferRuntime,
        product: &Product,
        at: &Addresses,
        norm: *const c_void,
        stream: *mut c_void,
        pdl: bool,
    ) -> Result<c_int> {
        let kernel = self.kernel(runtime)?;
        let (mut x, mut stride, mut weight) = (at.x, product.row_stride, at.weight);
        let mut norm = if self.around.eps.is_some() { norm } else { std::ptr::null() };
        let (mut bias, mut out) = (if product.bias { at.bias } else { std::ptr::null() }, at.out);
        // Each is at most an i32's most.
        let (mut rows, mut columns, mut inner) = (product.rows as u32, product.columns as u32, product.inner as u32);
        let mut eps = self.around.eps.unwrap_or(0.0);
        let flag = |is: bool, flag: u32| if is { flag } else { 0 };
        let mut flags =
            flag(product.residual, ADD) | flag(product.out == DType::F32, F32_OUT) | flag(self.around.gated, GATED);
        let mut arguments: [*mut c_void; 11] = [
            (&raw mut x).cast(),
            (&raw mut stride).cast(),
            (&raw mut weight).cast(),
            (&raw mut norm).cast(),
            (&raw mut bias).cast(),
            (&raw mut out).cast(),
            (&raw mut rows).cast(),
            (&raw mut columns).cast(),
            (&raw mut inner).cast(),
            (&raw mut eps).cast(),
            (&raw mut flags).cast(),
        ];
        // SAFETY: the arguments are of the types of gemv.cu, whose conditions `of` looks at; the kernel waits before it reads what the
        // kernel ahead may write; the rest is the caller's promise.
        unsafe { runtime.cudart()?.launch(kernel, self.blocks, &mut arguments, stream, pdl) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(rows: u64, columns: u64, inner: u64) -> Product {
        let (row_stride, alignment) = (inner as i64, [16, 16]);
        let (dtype, out, bias, residual) = (DType::BF16, DType::BF16, false, false);
        Product { rows, columns, inner, row_stride, dtype, out, bias, residual, alignment }
    }

    const PLAIN: Around = Around { eps: None, gated: false };

    #[test]
    fn kernels_are_for_few_rows_of_16_bits_of_multiples_of_8_on_hopper_and_later() {
        let name = |product: Product, capability| {
            FewRows::of(&product, PLAIN, capability).map(|kernel| NAMES[kernel.place].to_str().unwrap())
        };
        for (rows, expected) in [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32)] {
            for capability in [(9, 0), (12, 0)] {
                let of = |dtype| name(Product { dtype, out: dtype, ..product(rows, 100, 64) }, capability).unwrap();
                assert_eq!(of(DType::BF16), format!("few_rows_bf16_{expected}_1"));
                assert_eq!(of(DType::F16), format!("few_rows_f16_{expected}_1"));
            }
        }
        assert_eq!(name(product(33, 100, 64), (9, 0)), None);
        assert_eq!(name(product(1, 100, 64), (8, 9)), None);
        assert_eq!(name(product(1, 100, 68), (9, 0)), None);
        assert_eq!(name(Product { dtype: DType::F32, ..product(1, 100, 64) }, (9, 0)), None);
        assert_eq!(name(Product { alignment: [8, 16], ..product(1, 100, 64) }, (9, 0)), None);
    }

    #[test]
    fn norms_are_of_bf16_and_gates_of_plain_results() {
        let of = |product: Product, around| FewRows::of(&product, around, (9, 0)).is_some();
        let (normed, gated) = (Around { eps: Some(1e-6), gated: false }, Around { eps: None, gated: true });
        let halves = Product { dtype: DType::F16, out: DType::F16, ..product(1, 64, 64) };
        assert!(of(product(1, 64, 64), normed) && of(product(1, 64, 64), gated) && of(halves, gated));
        assert!(!of(halves, normed));
        for other in [
            Product { bias: true, ..product(1, 64, 64) },
            Product { residual: true, ..product(1, 64, 64) },
            Product { out: DType::F32, ..product(1, 64, 64) },
        ] {
            assert!(!of(other, gated) && of(other, normed));
        }
    }

    #[test]
    fn every_row_of_the_weight_has_a_block_and_every_column_a_warp_or_a_turn_of_one() {
        for around in [PLAIN, Around { eps: Some(1e-6), gated: false }, Around { eps: None, gated: true }] {
            for columns in [1, 7, 8, 9, 1024, 3072, 4096, 151_936] {
                for inner in [8u64, 256, 1024, 3072, 8192, 100_000] {
                    let mut clusters = Vec::new();
                    for rows in [1, 8, 16, 32] {
                        let kernel = FewRows::of(&product(rows, columns, inner), around, (9, 0)).unwrap();
                        let Blocks { blocks: [x, y], threads, cluster, shared } = kernel.blocks;
                        let of_block = ALL[kernel.place].1;
                        let own = u64::from(of_block * if around.gated { 8 } else { 16 });
                        assert!(x.is_multiple_of(cluster) && (1..=CLUSTER).contains(&cluster) && (y, shared) == (1, 0));
                        let blocks = u64::from(x / cluster);
                        assert!(blocks * own >= columns && (blocks - 1) * own < columns);
                        assert!(threads.is_multiple_of(LANES) && (LANES..=LANES * WARPS).contains(&threads));
                        assert!(cluster == 1 || around == PLAIN);
                        let at_once = u64::from(cluster * threads / LANES * SLICE);
                        assert!(at_once >= inner || threads == LANES * WARPS);
                        clusters.push((cluster, threads));
                    }
                    // The sums are the same whatever the number of rows.
                    assert!(clusters.iter().all(|other| *other == clusters[0]), "{columns} x {inner}: {clusters:?}");
                }
            }
        }
    }

    #[test]
    fn the_ptx_has_the_kernels_and_the_sizes_that_are_counted_on() {
        let (ptx, source) = (PTX, concat!(include_str!("hopper.cuh"), include_str!("gemv.cu")));
        for (i, name) in NAMES.iter().enumerate() {
            let name = name.to_str().unwrap();
            assert!(ptx.contains(&format!(".visible .entry {name}(")), "{name}");
            let (of_type, rest) = (if i < NAMES.len() / 2 { "bf16" } else { "f16" }, i % (NAMES.len() / 2));
            assert_eq!(name, format!("few_rows_{of_type}_{}_{}", ALL[rest].0, ALL[rest].1));
        }
        assert_eq!(ptx.matches(".visible .entry ").count(), NAMES.len());
        for constant in [
            format!("LANES = {LANES};"),
            format!("WARPS = {WARPS};"),
            format!("TILE = {TILE};"),
            "SLICE = STEP * STEPS;".to_owned(),
            "STEP = 32;".to_owned(),
            format!("STEPS = {};", SLICE / 32),
            format!("CLUSTER = {CLUSTER};"),
            format!(" ADD = {ADD};"),
            format!("F32_OUT = {F32_OUT};"),
            format!("GATED = {GATED};"),
        ] {
            assert!(source.contains(&constant), "{constant}");
        }
    }
}
