//! Products with a weight on a GPU, against sums in f64. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --release --features cudarc
//! --test matmul_gpu` runs them, within 60 seconds. They need a Hopper GPU or a later one, and cuBLASLt: vendored by
//! FLASHINFER_RS_MODULES=cublasLt, or the system's, found by CUDA_HOME or LD_LIBRARY_PATH.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;

use cudarc::driver::{CudaSlice, DeviceRepr};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::matmul::{MatMul, MatMulSpec, Selections};
use flashinfer_rs::{DType, Element, LaunchGraph, Stream, TensorMut, TensorRef};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        ("every_kernel_for_few_rows_is_right_in_bf16", every_kernel::<bf16>),
        ("every_kernel_for_few_rows_is_right_in_f16", every_kernel::<f16>),
        ("products_of_a_decoders_sizes_are_right", decoder),
        ("what_only_cublaslt_computes_is_right", only_cublaslt),
        ("a_rows_bits_do_not_depend_on_what_other_rows_hold", independent),
        ("a_rows_bits_do_not_depend_on_how_many_few_rows_there_are", row_by_row),
        ("every_launch_computes_the_same_bits", repeated),
        ("a_captured_product_computes_the_bits_of_an_eager_one", captured),
        ("a_selection_that_is_read_back_computes_the_same_bits", read_back),
        ("launches_do_not_wait", asynchronous),
    ])
}

/// What stands behind a result, which nobody may write.
const GUARD: usize = 64;

fn numbers<T: Number>(seed: u64, count: usize) -> Vec<T> {
    let mut random = Random(seed);
    (0..count).map(|_| T::from_f64(2.0 * random.uniform() - 1.0)).collect()
}

/// A product's operands, on the host and on the GPU.
struct Operands<T> {
    x: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    on_gpu: [CudaSlice<T>; 3],
}

impl<T: Number> Operands<T> {
    fn new(gpu: &Gpu, seed: u64, x: usize, weight: usize, bias: usize) -> Self {
        let (x, weight, bias) = (numbers(seed, x), numbers(seed + 1, weight), numbers(seed + 2, bias));
        let on_gpu = [&x, &weight, &bias].map(|values| gpu.stream.clone_htod(values).unwrap());
        Self { x, weight, bias, on_gpu }
    }

    fn of(gpu: &Gpu, seed: u64, spec: &MatMulSpec) -> Self {
        let (rows, columns, inner) = (spec.rows(), spec.columns(), spec.inner());
        Self::new(gpu, seed, (rows * spec.row_stride()) as usize, (columns * inner) as usize, columns as usize)
    }

    /// The product, in a buffer that held this before.
    fn launch<O: Element + DeviceRepr + Copy>(&self, gpu: &Gpu, product: &MatMul, before: &[O], guard: O) -> Vec<O> {
        let (spec, stream) = (product.spec(), &gpu.stream);
        let (rows, columns, inner) = (spec.rows(), spec.columns(), spec.inner());
        let mut filled = before.to_vec();
        filled.extend([guard; GUARD]);
        let mut out = stream.clone_htod(&filled).unwrap();
        let mut scratch = stream.alloc_zeros::<u8>(product.workspace_bytes().max(1)).unwrap();
        let bytes = product.workspace_bytes() as i64;
        {
            let [x, weight, bias] = &self.on_gpu;
            let x = TensorRef::from_cudarc_strided(stream, x, &[rows, inner], &[spec.row_stride(), 1]).unwrap();
            let weight = TensorRef::from_cudarc(stream, weight, &[columns, inner]).unwrap();
            let bias = TensorRef::from_cudarc(stream, bias, &[columns]).unwrap();
            let mut out = TensorMut::from_cudarc(stream, &mut out, &[rows, columns]).unwrap();
            let mut workspace = TensorMut::from_cudarc(stream, &mut scratch, &[bytes]).unwrap();
            let workspace = (bytes > 0).then_some(&mut workspace);
            let bias = spec.has_bias().then_some(&bias);
            product.run(&mut out, &x, &weight, bias, workspace, Stream::cudarc(stream)).unwrap();
        }
        stream.clone_dtoh(&out).unwrap()
    }

    /// Results in f64, of these columns.
    fn expected<O: Copy + Into<f64>>(&self, spec: &MatMulSpec, before: &[O], columns: &[usize]) -> Vec<f32> {
        let (inner, count) = (spec.inner() as usize, spec.columns() as usize);
        let rows = self.x.chunks(spec.row_stride() as usize).take(spec.rows() as usize).enumerate();
        let mut all = Vec::with_capacity(spec.rows() as usize * columns.len());
        for (i, row) in rows {
            let row: Vec<f64> = row[..inner].iter().map(|x| (*x).into()).collect();
            for &column in columns {
                let weight = &self.weight[column * inner..][..inner];
                let mut sum: f64 = row.iter().zip(weight).map(|(x, w)| x * (*w).into()).sum();
                sum += if spec.has_bias() { self.bias[column].into() } else { 0.0 };
                sum += if spec.has_residual() { before[i * count + column].into() } else { 0.0 };
                all.push(sum as f32);
            }
        }
        all
    }
}

fn of_columns<O: Copy>(values: &[O], count: usize, columns: &[usize]) -> Vec<O> {
    values.chunks_exact(count).flat_map(|row| columns.iter().map(|&column| row[column])).collect()
}

/// Some columns of so many: the first and the last ones, and others between.
fn sampled(count: usize) -> Vec<usize> {
    let step = (count / 96).max(1);
    let mut all: Vec<usize> = (0..count).step_by(step).chain(count.saturating_sub(16)..count).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// How far results may be from the sums in f64, relative to all of them: half of what the last bit of a number counts, since some
/// products have one result.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 4e-3,
        DType::F16 => 5e-4,
        _ => 5e-5,
    }
}

/// That a product is right in the sampled columns, in whatever form the specification has, and writes nothing else.
fn check<T: Number>(gpu: &Gpu, product: &MatMul, operands: &Operands<T>) {
    let spec = product.spec();
    let (what, count) = (spec.to_string(), spec.columns() as usize);
    let (size, columns) = (spec.rows() as usize * count, sampled(count));
    if spec.out() == DType::F32 {
        let before = vec![f32::NAN; size];
        let mut found = operands.launch(gpu, product, &before, 77.0f32);
        assert!(found.split_off(size) == [77.0; GUARD], "{what}: written behind its end");
        let expected = operands.expected(spec, &before, &columns);
        assert!(found.iter().all(|x| x.is_finite()), "{what}: not all is written");
        return assert_close(&what, &of_columns(&found, count, &columns), &expected, tolerance(DType::F32));
    }
    let before = if spec.has_residual() { numbers(99, size) } else { vec![T::POISON; size] };
    let mut found = operands.launch(gpu, product, &before, T::from_f64(77.0));
    assert!(widened(&found.split_off(size)) == [77.0; GUARD], "{what}: written behind its end");
    assert!(widened(&found).iter().all(|x| x.is_finite()), "{what}: not all is written");
    let expected = operands.expected(spec, &before, &columns);
    let found = widened(&of_columns(&found, count, &columns));
    assert_close(&what, &found, &expected, tolerance(T::DTYPE));
}

/// A specification in every form that there is.
fn forms(spec: MatMulSpec) -> Vec<MatMulSpec> {
    let (biased, added) = (spec.with_bias().unwrap(), spec.with_residual().unwrap());
    let apart = spec.with_row_stride(spec.inner() + 128).unwrap();
    vec![spec, biased, added, biased.with_residual().unwrap(), spec.with_f32_out().unwrap(), apart]
}

/// Every kernel: for few rows, twice and four times as many, and weights of which a block has one tile or two; with parts of a block, of
/// a warp and of a cluster missing, one step, all steps at once, and turns.
fn every_kernel<T: Number>(gpu: &Gpu) {
    let mut selections = Selections::new();
    for (columns, inner) in
        [(1, 8), (13, 264), (40, 1024), (8, 2056), (24, 8200), (1024, 3072), (1030, 2504), (4120, 1032), (6144, 264)]
    {
        let operands =
            Operands::<T>::new(gpu, 1, (32 * (inner + 128)) as usize, (columns * inner) as usize, columns as usize);
        for rows in [1, 5, 8, 9, 13, 16, 17, 29, 32] {
            for spec in forms(MatMulSpec::new(T::DTYPE, rows, columns, inner).unwrap()) {
                let product = MatMul::new(spec, &gpu.stream, &mut selections).unwrap();
                assert_eq!(product.workspace_bytes(), 0);
                check(gpu, &product, &operands);
            }
        }
    }
    let stored = selections.to_json();
    let of_type = if T::DTYPE == DType::F16 { "f16" } else { "bf16" };
    for (rows, tiles) in [(8, 1), (8, 2), (16, 1), (32, 1), (32, 2)] {
        assert!(stored.contains(&format!("few_rows_{of_type}_{rows}_{tiles}")), "{rows} rows, {tiles} tiles: {stored}");
    }
}

/// Qwen3-0.6B's, and a head that is larger than any cache.
fn decoder(gpu: &Gpu) {
    let mut selections = Selections::new();
    for (columns, inner) in [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (1024, 1024), (1024, 6144)] {
        let operands = Operands::<bf16>::new(gpu, 3, 64 * inner as usize, (columns * inner) as usize, columns as usize);
        for rows in [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 64] {
            let spec = MatMulSpec::new(DType::BF16, rows, columns, inner).unwrap();
            for spec in [spec, spec.with_residual().unwrap()] {
                check(gpu, &MatMul::new(spec, &gpu.stream, &mut selections).unwrap(), &operands);
            }
        }
    }
    let (columns, inner) = (151_936, 1024);
    let operands = Operands::<bf16>::new(gpu, 4, 32 * inner as usize, (columns * inner) as usize, columns as usize);
    for rows in [1, 8, 32] {
        let spec = MatMulSpec::new(DType::BF16, rows, columns, inner).unwrap();
        for spec in [spec, spec.with_f32_out().unwrap()] {
            check(gpu, &MatMul::new(spec, &gpu.stream, &mut selections).unwrap(), &operands);
        }
    }
    println!("{}", selections.to_json());
}

fn only_cublaslt(gpu: &Gpu) {
    let mut selections = Selections::new();
    for (rows, columns, inner) in [(1, 1000, 1028), (3, 24, 36), (33, 1024, 1024), (100, 4096, 1024)] {
        for spec in forms(MatMulSpec::new(DType::BF16, rows, columns, inner).unwrap()) {
            check(gpu, &MatMul::new(spec, &gpu.stream, &mut selections).unwrap(), &Operands::<bf16>::of(gpu, 5, &spec));
        }
        for spec in forms(MatMulSpec::new(DType::F16, rows, columns, inner).unwrap()) {
            check(gpu, &MatMul::new(spec, &gpu.stream, &mut selections).unwrap(), &Operands::<f16>::of(gpu, 6, &spec));
        }
    }
    // F32 is not made TF32, whose sums are off by 3e-4.
    for rows in [1, 7, 40] {
        let (columns, inner) = (96, 2048);
        let spec = MatMulSpec::new(DType::F32, rows, columns, inner).unwrap().with_bias().unwrap();
        let product = MatMul::new(spec, &gpu.stream, &mut selections).unwrap();
        let mut random = Random(7);
        let mut of = |count: i64| random.normal_f32(1.0, count as usize);
        let (x, weight, bias) = (of(rows * inner), of(columns * inner), of(columns));
        let stream = &gpu.stream;
        let on_gpu = [&x, &weight, &bias].map(|values| stream.clone_htod(values).unwrap());
        let mut out = stream.clone_htod(&vec![f32::NAN; (rows * columns) as usize]).unwrap();
        let mut scratch = stream.alloc_zeros::<u8>(product.workspace_bytes().max(1)).unwrap();
        {
            let bytes = product.workspace_bytes() as i64;
            let [x, weight, bias] = &on_gpu;
            let x = TensorRef::from_cudarc(stream, x, &[rows, inner]).unwrap();
            let weight = TensorRef::from_cudarc(stream, weight, &[columns, inner]).unwrap();
            let bias = TensorRef::from_cudarc(stream, bias, &[columns]).unwrap();
            let mut out = TensorMut::from_cudarc(stream, &mut out, &[rows, columns]).unwrap();
            let mut workspace = TensorMut::from_cudarc(stream, &mut scratch, &[bytes]).unwrap();
            let workspace = (bytes > 0).then_some(&mut workspace);
            product.run(&mut out, &x, &weight, Some(&bias), workspace, Stream::cudarc(stream)).unwrap();
        }
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        let rows = x.chunks_exact(inner as usize);
        let expected = rows.flat_map(|x| {
            let weights = weight.chunks_exact(inner as usize).zip(&bias);
            weights.map(move |(w, bias)| (dot(x, w) + f64::from(*bias)) as f32)
        });
        let expected: Vec<f32> = expected.collect();
        assert_close(&spec.to_string(), &stream.clone_dtoh(&out).unwrap(), &expected, 5e-6);
    }
}

fn bits<T: Number>(values: &[T]) -> Vec<u32> {
    widened(values).into_iter().map(f32::to_bits).collect()
}

/// Of the sizes that this crate's kernels and cuBLASLt compute.
const VARIOUS: [(i64, i64, i64); 5] =
    [(2, 1024, 2048), (8, 4096, 1024), (16, 1024, 3072), (32, 6144, 1024), (64, 1024, 1024)];

fn independent(gpu: &Gpu) {
    let mut selections = Selections::new();
    for (rows, columns, inner) in VARIOUS {
        let spec = MatMulSpec::new(DType::BF16, rows, columns, inner).unwrap();
        let product = MatMul::new(spec, &gpu.stream, &mut selections).unwrap();
        let mut operands = Operands::<bf16>::of(gpu, 8, &spec);
        let (before, kept) = (vec![bf16::ZERO; (rows * columns) as usize], (rows / 2) as usize);
        let first = operands.launch(gpu, &product, &before, bf16::ZERO);
        for other in [0.0, -3.5, f32::INFINITY, f32::NAN] {
            let mut x = vec![bf16::from_f32(other); operands.x.len()];
            let own = kept * inner as usize..(kept + 1) * inner as usize;
            x[own.clone()].copy_from_slice(&operands.x[own]);
            operands.on_gpu[0] = gpu.stream.clone_htod(&x).unwrap();
            let found = operands.launch(gpu, &product, &before, bf16::ZERO);
            let own = kept * columns as usize..(kept + 1) * columns as usize;
            assert_eq!(bits(&found[own.clone()]), bits(&first[own]), "{spec}, beside {other}");
        }
    }
}

fn row_by_row(gpu: &Gpu) {
    let mut selections = Selections::new();
    for (columns, inner) in [(256, 1024), (1024, 2048), (1024, 3072), (4096, 1024), (40, 8200)] {
        let all = MatMulSpec::new(DType::BF16, 32, columns, inner).unwrap();
        let operands = Operands::<bf16>::of(gpu, 9, &all);
        let mut launch = |rows: i64| {
            let spec = MatMulSpec::new(DType::BF16, rows, columns, inner).unwrap();
            let product = MatMul::new(spec, &gpu.stream, &mut selections).unwrap();
            bits(&operands.launch(gpu, &product, &vec![bf16::ZERO; (rows * columns) as usize], bf16::ZERO))
        };
        let expected = launch(32);
        for rows in [1, 2, 3, 4, 7, 8, 9, 16, 17, 31] {
            let own = (rows * columns) as usize;
            assert_eq!(launch(rows)[..own], expected[..own], "{columns} x {inner}, {rows} rows");
        }
    }
}

fn repeated(gpu: &Gpu) {
    let mut selections = Selections::new();
    for (rows, columns, inner) in VARIOUS.into_iter().chain([(17, 1000, 4104), (100, 1024, 6144)]) {
        let spec = MatMulSpec::new(DType::BF16, rows, columns, inner).unwrap();
        let product = MatMul::new(spec, &gpu.stream, &mut selections).unwrap();
        let operands = Operands::<bf16>::of(gpu, 10, &spec);
        let before = vec![bf16::ZERO; (rows * columns) as usize];
        let first = bits(&operands.launch(gpu, &product, &before, bf16::ZERO));
        for _ in 0..20 {
            assert_eq!(bits(&operands.launch(gpu, &product, &before, bf16::ZERO)), first, "{spec}");
        }
    }
}

fn captured(gpu: &Gpu) {
    let (stream, mut selections) = (&gpu.stream, Selections::new());
    for (rows, columns, inner) in VARIOUS {
        let spec = MatMulSpec::new(DType::BF16, rows, columns, inner).unwrap().with_residual().unwrap();
        let product = MatMul::new(spec, stream, &mut selections).unwrap();
        let operands = Operands::<bf16>::of(gpu, 11, &spec);
        let before: Vec<bf16> = numbers(12, (rows * columns) as usize);
        // Twice, as a graph of two launches.
        let once = operands.launch(gpu, &product, &before, bf16::ZERO);
        let twice = operands.launch(gpu, &product, &once[..before.len()], bf16::ZERO);
        let bytes = product.workspace_bytes() as i64;
        let [x, weight, _] = operands.on_gpu;
        let out = stream.clone_htod(&before).unwrap();
        let workspace = stream.alloc_zeros::<u8>(bytes.max(1) as usize).unwrap();
        let mut graph = LaunchGraph::new(stream, (x, weight, out, workspace)).unwrap();
        graph
            .capture(|s, (x, weight, mut out, mut workspace)| {
                let (x, weight) = (x.read(&[rows, inner])?, weight.read(&[columns, inner])?);
                let mut out = out.write(&[rows, columns])?;
                for _ in 0..2 {
                    let mut workspace = workspace.write(&[bytes.max(1)])?;
                    let workspace = (bytes > 0).then_some(&mut workspace);
                    product.run(&mut out, &x, &weight, None, workspace, s)?;
                }
                Ok(())
            })
            .unwrap();
        graph.launch().unwrap();
        let (_, _, out, _) = graph.buffers().unwrap();
        assert_eq!(bits(&stream.clone_dtoh(&out).unwrap()), bits(&twice[..before.len()]), "{spec}");
    }
}

fn read_back(gpu: &Gpu) {
    let mut selections = Selections::new();
    let specs = VARIOUS.map(|(rows, columns, inner)| MatMulSpec::new(DType::BF16, rows, columns, inner).unwrap());
    let chosen = specs.map(|spec| MatMul::new(spec, &gpu.stream, &mut selections).unwrap());
    let stored = selections.to_json();
    let mut read = Selections::parse(&stored).unwrap();
    for product in chosen {
        let again = MatMul::new(*product.spec(), &gpu.stream, &mut read).unwrap();
        assert_eq!(again.workspace_bytes(), product.workspace_bytes());
        let operands = Operands::<bf16>::of(gpu, 13, product.spec());
        let before = vec![bf16::ZERO; (product.spec().rows() * product.spec().columns()) as usize];
        let [a, b] = [&product, &again].map(|product| bits(&operands.launch(gpu, product, &before, bf16::ZERO)));
        assert_eq!(a, b, "{}", product.spec());
    }
    assert_eq!(read.to_json(), stored);
}

fn asynchronous(gpu: &Gpu) {
    let (stream, mut selections) = (&gpu.stream, Selections::new());
    for rows in [1, 64] {
        let spec = MatMulSpec::new(DType::BF16, rows, 1024, 1024).unwrap();
        let product = MatMul::new(spec, stream, &mut selections).unwrap();
        let operands = Operands::<bf16>::of(gpu, 14, &spec);
        let mut out = stream.alloc_zeros::<bf16>((rows * 1024) as usize).unwrap();
        let mut scratch = stream.alloc_zeros::<u8>(product.workspace_bytes().max(1)).unwrap();
        let bytes = product.workspace_bytes() as i64;
        gpu.assert_asynchronous(stream, || {
            let [x, weight, _] = &operands.on_gpu;
            let x = TensorRef::from_cudarc(stream, x, &[rows, 1024]).unwrap();
            let weight = TensorRef::from_cudarc(stream, weight, &[1024, 1024]).unwrap();
            let mut out = TensorMut::from_cudarc(stream, &mut out, &[rows, 1024]).unwrap();
            let mut workspace = TensorMut::from_cudarc(stream, &mut scratch, &[bytes]).unwrap();
            let workspace = (bytes > 0).then_some(&mut workspace);
            product.run(&mut out, &x, &weight, None, workspace, Stream::cudarc(stream)).unwrap();
        });
    }
}
