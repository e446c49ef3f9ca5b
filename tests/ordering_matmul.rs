//! Products with a weight over a driver without a GPU and a stand-in for cuBLASLt: what that is told, what is selected, stored and
//! read back, and whether launches are ordered with every other use of their memory.

#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use flashinfer_rs::matmul::{MatMul, MatMulSpec, Selections};
use flashinfer_rs::{DType, Element, FlashInferError, LaunchGraph, Result, Stream, TensorMut, TensorRef};
use half::bf16;
use libloading::os::unix::Library;
use ordering::{with_driver, zeros};

const LIBRARY: &str = "libcublasLt.so.13";

/// The stand-in for cuBLASLt.
struct Lt(Library);

/// As the stand-in has it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Told {
    m: u64,
    n: u64,
    k: u64,
    weight_stride: u64,
    x_stride: u64,
    out_stride: u64,
    read_type: u64,
    written_type: u64,
    compute: u64,
    transposed: u64,
    epilogue: u64,
    bias: u64,
    adds: u64,
    algorithm: u64,
    workspace: u64,
}

fn folder() -> PathBuf {
    PathBuf::from(std::env::var_os("LD_LIBRARY_PATH").unwrap())
}

impl Lt {
    fn open() -> Self {
        // SAFETY: the test's own library, which has no initializers.
        Self(unsafe { Library::new(folder().join(LIBRARY)) }.unwrap())
    }

    fn read<T: Copy>(&self, symbol: &str) -> T {
        // SAFETY: the fixture's variables, of these types, that nothing writes meanwhile.
        unsafe { **self.0.get::<*const T>(symbol.as_bytes()).unwrap() }
    }

    fn set(&self, symbol: &str, value: i32) {
        // SAFETY: as above.
        unsafe { **self.0.get::<*mut i32>(symbol.as_bytes()).unwrap() = value };
    }
}

fn streams<const N: usize>() -> [Arc<CudaStream>; N] {
    let context = CudaContext::new(0).unwrap();
    [(); N].map(|()| context.new_stream().unwrap())
}

/// A product's buffers, each on a stream of its own, which is where it is freed.
struct Buffers<T> {
    x: CudaSlice<bf16>,
    weight: CudaSlice<bf16>,
    bias: CudaSlice<bf16>,
    out: CudaSlice<T>,
    workspace: CudaSlice<u8>,
}

impl<T: Element + cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits> Buffers<T> {
    fn apart(spec: &MatMulSpec, workspace: usize, stream: &CudaStream) -> Self {
        let home = || stream.context().new_stream().unwrap();
        let count = |rows: i64, columns: i64| (rows * columns) as usize;
        Self {
            x: zeros(&home(), count(spec.rows(), spec.row_stride())),
            weight: zeros(&home(), count(spec.columns(), spec.inner())),
            bias: zeros(&home(), spec.columns() as usize),
            out: zeros(&home(), count(spec.rows(), spec.columns())),
            workspace: zeros(&home(), workspace.max(1)),
        }
    }

    fn run(&mut self, product: &MatMul, stream: &CudaStream) -> Result<()> {
        let spec = product.spec();
        let (rows, columns, inner) = (spec.rows(), spec.columns(), spec.inner());
        let x = TensorRef::from_cudarc_strided(stream, &self.x, &[rows, inner], &[spec.row_stride(), 1])?;
        let weight = TensorRef::from_cudarc(stream, &self.weight, &[columns, inner])?;
        let bias = TensorRef::from_cudarc(stream, &self.bias, &[columns])?;
        let mut out = TensorMut::from_cudarc(stream, &mut self.out, &[rows, columns])?;
        let bytes = product.workspace_bytes() as i64;
        let mut workspace = TensorMut::from_cudarc(stream, &mut self.workspace, &[bytes])?;
        let workspace = (bytes > 0).then_some(&mut workspace);
        let bias = spec.has_bias().then_some(&bias);
        product.run(&mut out, &x, &weight, bias, workspace, Stream::cudarc(stream))
    }
}

fn spec(rows: i64) -> MatMulSpec {
    MatMulSpec::new(DType::BF16, rows, 40, 64).unwrap()
}

#[test]
fn cublaslt_is_told_the_product_as_its_columns_have_it() {
    with_driver("cublaslt_is_told_the_product_as_its_columns_have_it", |_| {
        let ([stream], lt) = (streams(), Lt::open());
        let mut selections = Selections::new();
        // CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F, CUBLAS_OP_T and the default epilogue.
        let plain = Told {
            m: 40,
            n: 33,
            k: 64,
            weight_stride: 64,
            x_stride: 64,
            out_stride: 40,
            read_type: 14,
            written_type: 14,
            compute: 68,
            transposed: 1,
            epilogue: 1,
            algorithm: 1,
            workspace: 4096,
            ..Told::default()
        };
        let mut told = |spec: MatMulSpec| {
            let product = MatMul::new(spec, &stream, &mut selections).unwrap();
            let bias = if spec.out() == DType::F32 {
                let mut buffers = Buffers::<f32>::apart(&spec, 4096, &stream);
                buffers.run(&product, &stream).unwrap();
                0
            } else {
                let mut buffers = Buffers::<bf16>::apart(&spec, 4096, &stream);
                buffers.run(&product, &stream).unwrap();
                TensorRef::from_cudarc(&stream, &buffers.bias, &[40]).unwrap().as_ptr().addr() as u64
            };
            (lt.read::<Told>("lt_last"), bias)
        };
        assert_eq!(told(spec(33)).0, plain);
        assert_eq!(told(spec(33).with_row_stride(96).unwrap()).0, Told { x_stride: 96, ..plain });
        assert_eq!(told(spec(33).with_f32_out().unwrap()).0, Told { written_type: 0, ..plain });
        assert_eq!(told(spec(33).with_residual().unwrap()).0, Told { adds: 1, ..plain });
        let (found, bias) = told(spec(33).with_bias().unwrap());
        assert_eq!(found, Told { epilogue: 4, bias, ..plain });
        // Of 32 MiB, by sums in F32 alone, of memory aligned to 16 bytes.
        let preferences: [u64; 16] = lt.read("lt_preferences");
        assert_eq!((preferences[1], preferences[3], &preferences[5..9]), (32 << 20, 2, &[16; 4][..]));
        // Rows of 20 numbers are aligned to 8 bytes.
        MatMul::new(MatMulSpec::new(DType::BF16, 33, 20, 36).unwrap(), &stream, &mut selections).unwrap();
        assert_eq!(lt.read::<[u64; 16]>("lt_preferences")[5..9], [8; 4]);
    });
}

#[test]
fn products_are_ordered_with_every_other_use() {
    with_driver("products_are_ordered_with_every_other_use", |driver| {
        for pools in [true, false] {
            driver.pools(pools);
            let [a, b, c] = streams();
            let null = a.context().default_stream();
            for (place, stream) in [("a stream", &b), ("the null stream", &null)] {
                driver.ordered(&format!("products on {place}, with pools {pools}"), || {
                    let mut selections = Selections::new();
                    for spec in [spec(1), spec(1).with_bias().unwrap(), spec(33), spec(40).with_residual().unwrap()] {
                        let product = MatMul::new(spec, stream, &mut selections).unwrap();
                        let mut buffers = Buffers::<bf16>::apart(&spec, product.workspace_bytes(), &a);
                        for other in [&a, &c, stream] {
                            other.memset_zeros(&mut buffers.x).unwrap();
                            other.memset_zeros(&mut buffers.weight).unwrap();
                            other.memset_zeros(&mut buffers.workspace).unwrap();
                            buffers.run(&product, stream).unwrap();
                            other.clone_dtoh(&buffers.out).unwrap();
                        }
                    }
                    assert_eq!(selections.len(), 4);
                });
            }
        }
        assert!(driver.queued()[0] > 0);
        assert_eq!(driver.live(), [0; 5], "and nothing is left");
    });
}

#[test]
fn few_rows_are_multiplied_by_kernels_of_this_crate_and_more_by_cublaslt() {
    with_driver("few_rows_are_multiplied_by_kernels_of_this_crate_and_more_by_cublaslt", |driver| {
        let ([stream], lt, mut selections) = (streams(), Lt::open(), Selections::new());
        for (rows, own) in [(1, true), (8, true), (9, true), (32, true), (33, false)] {
            let product = MatMul::new(spec(rows), &stream, &mut selections).unwrap();
            let before = (driver.queued()[0], lt.read::<i32>("lt_products"));
            Buffers::<bf16>::apart(&spec(rows), product.workspace_bytes(), &stream).run(&product, &stream).unwrap();
            let after = (driver.queued()[0], lt.read::<i32>("lt_products"));
            assert_eq!((after.0 - before.0, after.1 - before.1), (1, i32::from(!own)), "{rows}");
            assert_eq!(product.workspace_bytes(), if own { 0 } else { 4096 });
        }
        // A millisecond for a graph of so many as 128 MiB have weights, at most 64.
        assert_eq!(selections.microseconds(&spec(1)), Some(1e3 / 64.0));
        assert_eq!(selections.microseconds(&spec(2)), None);
    });
}

#[test]
fn a_selection_that_is_read_back_is_used_without_measuring() {
    with_driver("a_selection_that_is_read_back_is_used_without_measuring", |driver| {
        let ([stream], mut selections) = (streams(), Selections::new());
        let specs = [spec(1), spec(33), spec(33).with_f32_out().unwrap(), spec(64).with_row_stride(128).unwrap()];
        for spec in specs {
            MatMul::new(spec, &stream, &mut selections).unwrap();
        }
        let stored = selections.to_json();
        let mut read = Selections::parse(&stored).unwrap();
        assert_eq!(read, selections);
        for spec in specs {
            let (kernels, graphs) = (driver.queued()[0], driver.queued()[1]);
            MatMul::new(spec, &stream, &mut read).unwrap();
            // Once, so that its kernels are loaded.
            assert_eq!(driver.queued(), [kernels + 1, graphs], "{spec}");
        }
        assert_eq!(read.to_json(), stored, "nothing was added");

        // Another algorithm than cuBLASLt offers, another release, another GPU, and a kernel for fewer rows.
        let refused = |text: String, spec: MatMulSpec, what: &str| {
            let mut selections = Selections::parse(&text).unwrap();
            let before = driver.queued();
            let error = MatMul::new(spec, &stream, &mut selections).unwrap_err();
            assert!(matches!(error, FlashInferError::InvalidArgument { argument: "selections", .. }), "{error}");
            assert!(error.to_string().contains(what) && error.to_string().contains("Selections::new"), "{error}");
            assert_eq!(driver.queued(), before);
        };
        assert!(stored.contains("000000000000a151"), "{stored}");
        refused(stored.replace("000000000000a151", "000000000000a159"), spec(33), "does not offer");
        refused(stored.replace("130002", "130003"), spec(33), "release 130003");
        refused(stored.replace("\"a stand-in\"", "\"another\""), spec(33), "made on another");
        refused(stored.replace("few_rows_bf16_8_1", "few_rows_bf16_16_1"), spec(1), "few_rows_bf16_16_1");
        // As a file from before there was a kernel for so few.
        refused(stored.replacen("\"rows\": 33,", "\"rows\": 32,", 1), spec(32), "an algorithm of cuBLASLt");
    });
}

#[test]
fn a_captured_product_chooses_and_allocates_nothing() {
    with_driver("a_captured_product_chooses_and_allocates_nothing", |driver| {
        let ([stream, other], lt, mut selections) = (streams(), Lt::open(), Selections::new());
        driver.ordered("a graph of two products", || {
            let few = MatMul::new(spec(4), &stream, &mut selections).unwrap();
            let many = MatMul::new(spec(64), &stream, &mut selections).unwrap();
            let bytes = few.workspace_bytes().max(many.workspace_bytes());
            let Buffers { x, weight, out, workspace, .. } = Buffers::<bf16>::apart(&spec(64), bytes, &other);
            let asked: i32 = lt.read("lt_heuristics");
            let mut graph = LaunchGraph::new(&stream, (x, weight, out, workspace)).unwrap();
            let live = driver.live();
            graph
                .capture(|s, (x, weight, mut out, mut workspace)| {
                    for product in [&few, &many] {
                        let rows = product.spec().rows();
                        let (x, weight) = (x.read(&[rows, 64])?, weight.read(&[40, 64])?);
                        let mut workspace = workspace.write(&[bytes as i64])?;
                        product.run(&mut out.write(&[rows, 40])?, &x, &weight, None, Some(&mut workspace), s)?;
                    }
                    Ok(())
                })
                .unwrap();
            assert_eq!((graph.nodes(), lt.read::<i32>("lt_heuristics")), (2, asked));
            // What can be launched, and its event perhaps, but no memory.
            assert_eq!(driver.live()[2], live[2]);
            graph.launch().unwrap();
            graph.launch().unwrap();
        });
    });
}

#[test]
fn what_does_not_fit_is_refused_and_what_fails_is_said() {
    with_driver("what_does_not_fit_is_refused_and_what_fails_is_said", |driver| {
        let ([stream], lt, mut selections) = (streams(), Lt::open(), Selections::new());
        let product = MatMul::new(spec(33), &stream, &mut selections).unwrap();
        let mut buffers = Buffers::<bf16>::apart(&spec(33), 4096, &stream);
        let other = CudaContext::new(1).unwrap().new_stream().unwrap();
        {
            let (s, x) = (Stream::cudarc(&stream), &buffers.x);
            let x = TensorRef::from_cudarc(&stream, x, &[33, 64]).unwrap();
            let weight = TensorRef::from_cudarc(&stream, &buffers.weight, &[40, 64]).unwrap();
            let bias = TensorRef::from_cudarc(&stream, &buffers.bias, &[40]).unwrap();
            let mut out = TensorMut::from_cudarc(&stream, &mut buffers.out, &[33, 40]).unwrap();
            let mut workspace = TensorMut::from_cudarc(&stream, &mut buffers.workspace, &[4095]).unwrap();
            driver.refused("no workspace", || product.run(&mut out, &x, &weight, None, None, s));
            driver.refused("a small one", || product.run(&mut out, &x, &weight, None, Some(&mut workspace), s));
            driver.refused("a bias", || product.run(&mut out, &x, &weight, Some(&bias), None, s));
            driver
                .refused("fewer rows", || product.run(&mut out, &x.narrow(0, 0, 32).unwrap(), &weight, None, None, s));
        }
        driver.refused("another stream", || {
            let made = TensorRef::from_cudarc(&stream, &buffers.x, &[33, 64])?;
            let weight = TensorRef::from_cudarc(&stream, &buffers.weight, &[40, 64])?;
            let mut out = TensorMut::from_cudarc(&stream, &mut buffers.out, &[33, 40])?;
            product.run(&mut out, &made, &weight, None, None, Stream::cudarc(&other))
        });
        driver.refused("another GPU", || {
            let (mut a, b, mut c): (CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<u8>) =
                (zeros(&other, 33 * 40), zeros(&other, 40 * 64), zeros(&other, 4096));
            let x = zeros(&other, 33 * 64);
            let x = TensorRef::from_cudarc::<bf16>(&other, &x, &[33, 64])?;
            let weight = TensorRef::from_cudarc(&other, &b, &[40, 64])?;
            let mut out = TensorMut::from_cudarc(&other, &mut a, &[33, 40])?;
            let mut workspace = TensorMut::from_cudarc(&other, &mut c, &[4096])?;
            product.run(&mut out, &x, &weight, None, Some(&mut workspace), Stream::cudarc(&other))
        });
        let odd = MatMulSpec::new(DType::F32, 33, 40, 13).unwrap();
        driver.refused("no algorithm", || MatMul::new(odd, &stream, &mut selections));
        lt.set("lt_fail", 1);
        let error = buffers.run(&product, &stream).unwrap_err();
        let said = "cublasLtMatmul failed with cuBLAS status 13: as the test asked";
        assert!(matches!(error, FlashInferError::CublasLt { status: 13, .. }) && error.to_string() == said, "{error}");
        buffers.run(&product, &stream).unwrap();
        driver.violations();
    });
}

#[test]
fn without_cublaslt_few_rows_are_multiplied_and_for_more_it_is_said_what_to_do() {
    with_driver("without_cublaslt_few_rows_are_multiplied_and_for_more_it_is_said_what_to_do", |_| {
        fs::remove_file(folder().join(LIBRARY)).unwrap();
        let ([stream], mut selections) = (streams(), Selections::new());
        let usual = ["lib64", "lib"].map(|lib| PathBuf::from("/usr/local/cuda").join(lib).join(LIBRARY));
        let installed = usual.iter().any(|path| path.exists()) || std::env::var_os("CUDA_HOME").is_some();
        // SAFETY: cuBLASLt, if any, whose initializers are those of any CUDA program.
        if installed || unsafe { Library::new(LIBRARY) }.is_ok() {
            // Then that one is found, which does not go with this driver.
            assert!(!matches!(
                MatMul::new(spec(33), &stream, &mut selections),
                Err(FlashInferError::CublasLtMissing { .. })
            ));
            return;
        }
        let product = MatMul::new(spec(8), &stream, &mut selections).unwrap();
        Buffers::<bf16>::apart(&spec(8), 0, &stream).run(&product, &stream).unwrap();
        let error = MatMul::new(spec(33), &stream, &mut selections).unwrap_err();
        assert!(matches!(&error, FlashInferError::CublasLtMissing { searched } if !searched.is_empty()), "{error}");
        for part in [LIBRARY, "FLASHINFER_RS_MODULES=cublasLt", "CUDA_HOME", "/usr/local/cuda"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert_eq!(selections.len(), 1);
    });
}

/// Kernels of this crate's own wait for the kernel ahead by themselves, cuBLASLt's are not known to.
#[cfg(feature = "compute")]
#[test]
fn a_captured_steps_products_start_early_where_their_kernel_waits() {
    use flashinfer_rs::compute::{Buckets, DeviceRun, Dim, GraphBuilder, Pad};

    with_driver("a_captured_steps_products_start_early_where_their_kernel_waits", |driver| {
        let [stream, other] = streams();
        let lt = Lt::open();
        let mut g = GraphBuilder::new("products", 64);
        let x = g.input("x", DType::BF16, [Dim::BATCH, Dim::fixed(64)], Pad::Value(0)).unwrap();
        let norm = g.weight("norm", DType::BF16, [Dim::fixed(64)]).unwrap();
        let w = g.weight("w", DType::BF16, [Dim::fixed(64), Dim::fixed(64)]).unwrap();
        let normed = g.rmsnorm(&x, &norm, 1e-6).unwrap();
        let product = g.matmul(&normed, &w).unwrap();
        let again = g.rmsnorm(&product, &norm, 1e-6).unwrap();
        let sum = g.matmul_add(&again, &w, product).unwrap();
        g.output("sum", sum).unwrap();
        let graph = g.finish().unwrap();
        driver.ordered("steps with products", || {
            let mut run = DeviceRun::new(&graph, &Buckets::new(&[4, 64]).unwrap(), &stream).unwrap();
            run.weight("norm", &[bf16::ONE; 64]).unwrap();
            run.weight("w", &[bf16::ONE; 64 * 64]).unwrap();
            for (pdl, early) in [(true, [3, 0]), (false, [0, 0])] {
                run.set_pdl(pdl);
                run.capture().unwrap();
                for (bucket, early) in [4, 64].into_iter().zip(early) {
                    let step = run.captured(bucket).unwrap();
                    assert_eq!((step.kernels, step.programmatic), (4, early), "{bucket}, {pdl}");
                }
                for (rows, own) in [(3, true), (40, false)] {
                    run.set_rows(rows).unwrap();
                    run.input("x", &vec![bf16::ONE; rows as usize * 64]).unwrap();
                    let (kernels, products) = (driver.queued()[0], lt.read::<i32>("lt_products"));
                    run.step().unwrap();
                    run.run(2).unwrap();
                    let (kernels, products) = (driver.queued()[0] - kernels, lt.read::<i32>("lt_products") - products);
                    assert_eq!((kernels, products), (4, if own { 0 } else { 2 }));
                }
            }
        });
        drop([stream, other]);
        assert_eq!(driver.live(), [0; 5], "nothing is left");
    });
}
