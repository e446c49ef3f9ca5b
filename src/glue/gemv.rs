//! The kernels for products of few rows (gemv.cu), which read the weight once and wait for nothing else.

use std::ffi::{CStr, c_int, c_void};

use super::Loading;
use crate::cublaslt::{Addresses, Product};
use crate::cuda::{Blocks, Kernel};
use crate::error::Result;
use crate::runtime::FlashInferRuntime;
use crate::tensor::DType;

/// The PTX of gemv.cu, with the zero byte that the driver looks for at its end.
const PTX: &CStr = match CStr::from_bytes_with_nul(concat!(include_str!("gemv.ptx"), "\0").as_bytes()) {
    Ok(text) => text,
    Err(_) => panic!("PTX has no zero bytes"),
};

/// The GPUs that the PTX is for begin with Hopper.
const OLDEST: (c_int, c_int) = (9, 0);
/// The most warps of a block, and the threads of each.
const WARPS: u32 = 16;
const LANES: u32 = 32;
/// Rows of the weight that a block has.
const COLUMNS: u32 = 8;
/// Columns that a warp reads at once.
const STEP: u32 = 32;
/// What a row's length must be a multiple of: elements that a thread reads at once.
const VECTOR: u64 = 8;

/// What the kernels' last argument is made of.
const ADD: u32 = 1;
const F32_OUT: u32 = 2;

/// The kernels of each type: for how many rows at most, and how many times 16 bytes of the weight a thread asks for at once.
const ALL: [FewRows; 5] = [
    FewRows { rows: 8, loads: 4 },
    FewRows { rows: 8, loads: 8 },
    FewRows { rows: 8, loads: 16 },
    FewRows { rows: 16, loads: 8 },
    FewRows { rows: 32, loads: 8 },
];
/// Their names, in [`ALL`]'s order: those of BF16, and then those of F16.
const NAMES: [&CStr; 2 * ALL.len()] = [
    c"few_rows_bf16_8_4",
    c"few_rows_bf16_8_8",
    c"few_rows_bf16_8_16",
    c"few_rows_bf16_16_8",
    c"few_rows_bf16_32_8",
    c"few_rows_f16_8_4",
    c"few_rows_f16_8_8",
    c"few_rows_f16_8_16",
    c"few_rows_f16_16_8",
    c"few_rows_f16_32_8",
];

/// One of the kernels, of either type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FewRows {
    rows: u32,
    loads: u32,
}

/// The kernels, loaded. A handle serves every device and thread.
struct Loaded([Kernel; NAMES.len()]);

impl Loaded {
    fn get(runtime: &'static FlashInferRuntime) -> Result<&'static Self> {
        static LOADING: Loading<Loaded> = Loading::new();
        LOADING.get(|| runtime.cudart()?.load_kernels(PTX, NAMES).map(Self))
    }
}

impl FewRows {
    /// Those that compute a product on a GPU of this compute capability.
    pub(crate) fn of(product: &Product, capability: (c_int, c_int)) -> impl Iterator<Item = Self> {
        let fits = capability >= OLDEST
            && matches!(product.dtype, DType::BF16 | DType::F16)
            && product.inner.is_multiple_of(VECTOR)
            && product.alignment[0] >= 16;
        // Those for more rows than there are do the same work and more.
        let rows = ALL.into_iter().map(|kernel| kernel.rows).find(|rows| u64::from(*rows) >= product.rows);
        ALL.into_iter().filter(move |kernel| fits && Some(kernel.rows) == rows)
    }

    /// The one of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        ALL.into_iter().find(|kernel| kernel.name() == name)
    }

    /// Its name, by which selections call it.
    pub(crate) fn name(self) -> String {
        let Self { rows, loads } = self;
        format!("few_rows_{rows}_{loads}")
    }

    fn place(self, dtype: DType) -> usize {
        let place = ALL.iter().position(|kernel| *kernel == self).unwrap_or(0);
        if dtype == DType::F16 { place + ALL.len() } else { place }
    }

    /// Makes it ready on the current device, so that no launch has to, in a capture perhaps.
    pub(crate) fn prepare(self, runtime: &'static FlashInferRuntime, dtype: DType) -> Result<()> {
        runtime.cudart()?.prepare(Loaded::get(runtime)?.0[self.place(dtype)])
    }

    /// A block for each 8 rows of the weight, of as many warps as share one row's columns so that each reads its part at once.
    fn blocks(self, product: &Product) -> Blocks {
        let warps = product.inner.div_ceil(u64::from(self.loads * STEP)).min(WARPS.into()) as u32;
        Blocks { blocks: [product.columns.div_ceil(COLUMNS.into()) as u32, 1], threads: warps * LANES }
    }

    /// Queues it on the current device; CUDA's answer. With programmatic dependent launch it reads the weight and the bias while the
    /// kernel ahead runs.
    ///
    /// # Safety
    /// It must be one of [`of`](Self::of) for this product and the device. The addresses must be memory of the device, valid until the
    /// stream has come so far, as large and as aligned as the product says, of which `out` overlaps nothing else; `stream` a live
    /// stream of the device. With programmatic dependent launch no kernel that has not ended when the one ahead begins may
    /// write the weight or the bias, nor that one itself.
    pub(crate) unsafe fn launch(
        self,
        runtime: &'static FlashInferRuntime,
        product: &Product,
        at: &Addresses,
        stream: *mut c_void,
        pdl: bool,
    ) -> Result<c_int> {
        let kernel = Loaded::get(runtime)?.0[self.place(product.dtype)];
        let (mut x, mut stride, mut weight) = (at.x, product.row_stride, at.weight);
        let (mut bias, mut out) = (if product.bias { at.bias } else { std::ptr::null() }, at.out);
        // Each is at most an i32's most.
        let (mut rows, mut columns, mut inner) = (product.rows as u32, product.columns as u32, product.inner as u32);
        let f32_out = product.out == DType::F32;
        let mut flags = if product.residual { ADD } else { 0 } | if f32_out { F32_OUT } else { 0 };
        let mut arguments: [*mut c_void; 9] = [
            (&raw mut x).cast(),
            (&raw mut stride).cast(),
            (&raw mut weight).cast(),
            (&raw mut bias).cast(),
            (&raw mut out).cast(),
            (&raw mut rows).cast(),
            (&raw mut columns).cast(),
            (&raw mut inner).cast(),
            (&raw mut flags).cast(),
        ];
        // SAFETY: the arguments are of the types of gemv.cu, whose conditions `of` looks at; the kernel waits before it reads what the
        // kernel ahead may write; the rest is the caller's promise.
        unsafe { runtime.cudart()?.launch(kernel, self.blocks(product), &mut arguments, stream, pdl) }
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

    #[test]
    fn kernels_are_for_few_rows_of_16_bits_of_multiples_of_8_on_hopper_and_later() {
        let of = |product: Product, capability| FewRows::of(&product, capability).collect::<Vec<_>>();
        for (rows, expected) in [(1, &ALL[..3]), (8, &ALL[..3]), (9, &ALL[3..4]), (16, &ALL[3..4]), (17, &ALL[4..])] {
            assert_eq!(of(product(rows, 100, 64), (9, 0)), expected, "{rows}");
            assert_eq!(of(product(rows, 100, 64), (12, 0)), expected, "{rows}");
        }
        assert!(of(product(33, 100, 64), (9, 0)).is_empty());
        assert!(of(product(1, 100, 64), (8, 9)).is_empty());
        assert!(of(product(1, 100, 68), (9, 0)).is_empty());
        assert!(of(Product { dtype: DType::F32, ..product(1, 100, 64) }, (9, 0)).is_empty());
        assert!(of(Product { alignment: [8, 16], ..product(1, 100, 64) }, (9, 0)).is_empty());
    }

    #[test]
    fn every_row_of_the_weight_has_a_block_and_every_column_a_warp_or_a_turn_of_one() {
        for columns in [1, 7, 8, 9, 1024, 151_936] {
            for inner in [8, 256, 1024, 3072, 8192, 100_000] {
                for kernel in ALL {
                    let Blocks { blocks: [x, y], threads } = kernel.blocks(&product(1, columns, inner));
                    assert!(u64::from(x) * 8 >= columns && u64::from(x - 1) * 8 < columns && y == 1);
                    assert!(threads.is_multiple_of(LANES) && (LANES..=LANES * WARPS).contains(&threads));
                    let at_once = u64::from(threads / LANES * kernel.loads * STEP);
                    assert!(at_once >= inner || threads == LANES * WARPS);
                    // No warp without columns.
                    assert!(at_once - u64::from(kernel.loads * STEP) < inner);
                }
            }
        }
    }

    #[test]
    fn the_ptx_has_the_kernels_and_the_sizes_that_are_counted_on() {
        let (ptx, source) = (PTX.to_str().unwrap(), include_str!("gemv.cu"));
        for (i, name) in NAMES.iter().enumerate() {
            let (name, kernel) = (name.to_str().unwrap(), ALL[i % ALL.len()]);
            assert!(ptx.contains(&format!(".visible .entry {name}(")), "{name}");
            let dtype = if i < ALL.len() { DType::BF16 } else { DType::F16 };
            assert_eq!(
                name,
                kernel.name().replacen("rows_", &format!("rows_{}_", dtype.to_string().to_lowercase()), 1)
            );
            assert_eq!((kernel.place(dtype), FewRows::named(&kernel.name())), (i, Some(kernel)));
        }
        assert_eq!(ptx.matches(".visible .entry ").count(), NAMES.len());
        for constant in [
            format!("LANES = {LANES};"),
            format!("WARPS = {WARPS};"),
            format!("COLUMNS = {COLUMNS};"),
            format!("STEP = {STEP};"),
            format!(" ADD = {ADD};"),
            format!("F32_OUT = {F32_OUT};"),
        ] {
            assert!(source.contains(&constant), "{constant}");
        }
        assert_eq!(FewRows::named("few_rows_8_5"), None);
    }
}
