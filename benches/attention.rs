//! What planning and running attention costs the host beside the bare calls of the library's functions: `cargo bench --bench
//! attention --features cudarc,attention`. On a GPU; without one over stand-ins for CUDA's driver and runtime, whose launches take no time, so that the
//! difference is seen and the ratio says nothing. `FLASHINFER_RS_LIB_DIR` names a folder of modules. Each figure is the least of many rounds,
//! ours and the bare ones in turn.

#[path = "../tests/support/native.rs"]
mod native;

use std::error::Error;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Instant;
use std::{env, fs};

use cudarc::driver::{CudaContext, CudaStream};
use flashinfer_rs::attention::{AttentionOptions, AttentionSpec, Backend, Batch, Largest, Workspace};
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache};
use flashinfer_rs::{Arg, DType, FlashInferRuntime, PageTable, RuntimeConfig, TensorMut, TensorRef};
use half::bf16;

const ROUNDS: usize = 40;

/// How many times as much as the bare call ours may cost, on a GPU.
const TIMES_PLAN: f64 = 1.2;
const TIMES_RUN: f64 = 1.06;

/// Nanoseconds that the builder of a batch may take for a page.
const PAGE: f64 = 20.0;

/// The folder of the stand-ins, in the process that runs over them.
const STAND_INS: &str = "ATTENTION_BENCH_STAND_INS";

type Failed = Box<dyn Error>;

fn main() -> ExitCode {
    match measure() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("attention: a bound is broken");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("attention: {error}");
            ExitCode::FAILURE
        }
    }
}

fn modules() -> PathBuf {
    env::var_os("FLASHINFER_RS_LIB_DIR").map_or_else(native::vendored_libraries, PathBuf::from)
}

fn measure() -> Result<bool, Failed> {
    if let Some(folder) = env::var_os(STAND_INS) {
        let folder = Path::new(&folder);
        native::load(&folder.join("libcudart.so.13"), true);
        native::load(&folder.join("libcuda.so.1"), false);
        // SAFETY: loaded already; the stand-in's variable, of this type.
        unsafe {
            let cudart = libloading::os::unix::Library::new(folder.join("libcudart.so.13"))?;
            **cudart.get::<*mut i32>(b"launch_fails_with")? = 0;
        }
        // SAFETY: the bench's own libraries, and copies of the vendored ones.
        let config = unsafe { RuntimeConfig::default().lib_dir(folder).without_verification() };
        FlashInferRuntime::initialize(config)?;
        return all(false);
    }
    if FlashInferRuntime::initialize(RuntimeConfig::default())?.gpu_available() {
        return all(true);
    }
    // Another process, which finds the stand-ins first.
    let folder = tempfile::tempdir()?;
    native::compile("cuda.c", "libcuda.so.1", &[], folder.path());
    native::compile("failing_cudart.c", "libcudart.so.13", &[], folder.path());
    std::os::unix::fs::symlink("libcuda.so.1", folder.path().join("libcuda.so"))?;
    fs::copy(native::vendored_libraries().join("libtvm_ffi.so"), folder.path().join("libtvm_ffi.so"))?;
    for entry in fs::read_dir(modules())? {
        let path = entry?.path();
        if let Some(name) = path.file_name().filter(|name| name.to_string_lossy().starts_with("batch_")) {
            fs::copy(&path, folder.path().join(name))?;
        }
    }
    let status = Command::new(env::current_exe()?)
        .env(STAND_INS, folder.path())
        .env("LD_LIBRARY_PATH", folder.path())
        .env_remove("FLASHINFER_RS_LIB_DIR")
        .status()?;
    Ok(status.success())
}

/// Nanoseconds for one, the least of all rounds, of each.
fn least(calls: usize, mut ours: impl FnMut(), mut bare: impl FnMut(), mut after: impl FnMut()) -> (f64, f64) {
    let mut best = [f64::INFINITY; 2];
    for _ in 0..ROUNDS {
        let [first, second] = &mut best;
        for (time, f) in [(first, &mut ours as &mut dyn FnMut()), (second, &mut bare)] {
            let start = Instant::now();
            (0..calls).for_each(|_| f());
            *time = time.min(start.elapsed().as_nanos() as f64 / calls as f64);
            after();
        }
    }
    (best[0], best[1])
}

fn all(on_gpu: bool) -> Result<bool, Failed> {
    let context = CudaContext::new(0)?;
    // SAFETY: everything is used on one stream. Tracked, each call waits for its tensors' events and records them, which a bare call
    // does not.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream()?;
    if !on_gpu {
        println!("over stand-ins: launches and copies take no time");
    }
    let mut within = pages();
    for (backend, requests, keys) in [
        (Backend::CudaCores, 1, 8192),
        (Backend::CudaCores, 64, 8192),
        (Backend::Fa2, 1, 8192),
        (Backend::Fa2, 64, 8192),
    ] {
        within &= decode(&stream, backend, requests, keys, on_gpu)?;
    }
    Ok(within)
}

/// The builder of a batch, for 64 requests of 8,192 keys.
fn pages() -> bool {
    let all: Vec<i32> = (0..64 * 512).collect();
    let mut batch = Batch::paged(16, 64 * 512).expect("a batch");
    let mut table = PageTable::new(16, 64 * 512, 1 << 20).expect("a table");
    for pages in all.chunks(512) {
        table.push(pages, 8191).expect("pages");
    }
    let push = || {
        batch.clear();
        for pages in all.chunks(512) {
            batch.push(1, pages, 8192).expect("pages");
        }
        black_box(&batch);
    };
    let of_table = || {
        black_box(Batch::of_table(&table, &[1; 64]).expect("a batch"));
    };
    let (push, of_table) = least(20, push, of_table, || ());
    let each = [push, of_table].map(|time| time / (64.0 * 512.0));
    println!("a page of a batch: pushed {:.2} ns, of a table {:.2} ns, at most {PAGE}", each[0], each[1]);
    each.iter().all(|time| *time <= PAGE)
}

fn decode(stream: &Arc<CudaStream>, backend: Backend, requests: i64, keys: i64, on_gpu: bool) -> Result<bool, Failed> {
    let spec = AttentionSpec::decode(DType::BF16, (32, 8), 128, 16).backend(backend).build()?;
    let runtime = FlashInferRuntime::global()?;
    let Ok(module) = runtime.module(&format!("{}.so", spec.module(backend))) else {
        println!("{} was not vendored", spec.module(backend));
        return Ok(true);
    };
    let pages_each = (keys + 15) / 16;
    let pages = requests * pages_each;
    let indices: Vec<i32> = (0..pages as i32).collect();
    let mut batch = Batch::paged(16, pages)?;
    for own in indices.chunks(pages_each as usize) {
        batch.push(1, own, keys)?;
    }
    let zeros = |count: i64| stream.alloc_zeros::<bf16>(count as usize);
    let cache_shape = [pages, 16, 8, 128];
    let (mut k, mut v) = (zeros(pages * 16 * 1024)?, zeros(pages * 16 * 1024)?);
    let (q, mut o) = (zeros(requests * 4096)?, zeros(requests * 4096)?);
    let shape = [requests, 32, 128];
    let cache = PagedKvCache::new(
        TensorMut::from_cudarc(stream, &mut k, &cache_shape)?,
        TensorMut::from_cudarc(stream, &mut v, &cache_shape)?,
        KvLayout::Nhd,
    )?;
    let q = TensorRef::from_cudarc(stream, &q, &shape)?;
    let mut o = TensorMut::from_cudarc(stream, &mut o, &shape)?;

    // What the bare calls take, made once.
    let (float, int) = (stream.alloc_zeros::<u8>(256 << 20)?, stream.alloc_zeros::<u8>(8 << 20)?);
    let mut pinned = vec![0u8; 8 << 20];
    let indptr: Vec<i32> = (0..=requests as i32).map(|request| request * pages_each as i32).collect();
    let qo: Vec<i32> = (0..=requests as i32).collect();
    let (lengths, last) = (vec![keys as i32; requests as usize], vec![16i32; requests as usize]);
    let up = |values: &[i32]| stream.clone_htod(values);
    let (d_indptr, d_qo, d_last, d_indices) = (up(&indptr)?, up(&qo)?, up(&last)?, up(&indices)?);
    let float = TensorRef::from_cudarc(stream, &float, &[256 << 20])?;
    let int = TensorRef::from_cudarc(stream, &int, &[8 << 20])?;
    let mut pinned = TensorMut::from_slice(&mut pinned, &[8 << 20])?;
    let host = |values| TensorRef::from_slice::<i32>(values, &[values.len() as i64]);
    let (h_indptr, h_qo, h_len) = (host(&indptr)?, host(&qo)?, host(&lengths)?);
    let device = |values| TensorRef::from_cudarc(stream, values, &[requests + 1]);
    let (t_indptr, t_qo) = (device(&d_indptr)?, device(&d_qo)?);
    let t_last = TensorRef::from_cudarc(stream, &d_last, &[requests])?;
    let t_indices = TensorRef::from_cudarc(stream, &d_indices, &[pages])?;
    let (float, int, pinned) = (float.pack(), int.pack(), pinned.pack());
    let (h_indptr, h_qo, h_len) = (h_indptr.pack(), h_qo.pack(), h_len.pack());
    let (t_indptr, t_qo, t_last, t_indices) = (t_indptr.pack(), t_qo.pack(), t_last.pack(), t_indices.pack());
    let (p_q, p_k, p_v) = (q.clone(), cache.k(), cache.v());
    let (p_q, p_k, p_v) = (p_q.pack(), p_k.pack(), p_v.pack());
    let bare_o = zeros(requests * 4096)?;
    let bare_o = TensorRef::from_cudarc(stream, &bare_o, &shape)?;
    let p_o = bare_o.pack();
    let t = Arg::tensor;
    let numbers = |values: &[i64]| values.iter().map(|value| Arg::int(*value)).collect::<Vec<_>>();
    let cores = backend == Backend::CudaCores;
    let plan_args = if cores {
        let mut args = vec![t(&float), t(&int), t(&pinned), t(&h_indptr)];
        args.extend(numbers(&[requests, 32, 8, 16, 0, -1]));
        args.extend([Arg::float(0.0), Arg::int(128), Arg::int(128), t(&p_q), t(&p_k)]);
        args
    } else {
        let mut args = vec![t(&float), t(&int), t(&pinned), t(&h_qo), t(&h_indptr), t(&h_len)];
        args.extend(numbers(&[requests, requests, 32, 8, 16, 0, 128, 128, 0, -1, -1, 0, 0]));
        args
    };
    let pdl = Arg::bool(true);
    let rope = [0.0, spec.sm_scale(), 1.0, 1e-4].map(Arg::float);
    let plan_function = module.function("plan")?;
    // SAFETY: the arrays and workspaces are as long as the planner reads and writes; each measurement waits behind it.
    let bare_plan = || unsafe { plan_function.call_any(&plan_args) }.expect("a plan");
    let info = runtime.on(stream, |_| bare_plan())?;
    let args = {
        let (info, mut args) = (info.as_arg(), Vec::new());
        if cores {
            args.extend([t(&float), t(&int), info, t(&p_q), t(&p_k), t(&p_v), t(&t_indptr), t(&t_indices), t(&t_last)]);
            args.extend([t(&p_o), Arg::NONE, Arg::int(0), Arg::int(-1), pdl, Arg::NONE]);
            args.extend(rope);
        } else {
            args.extend([t(&float), t(&int), info, t(&p_q), t(&p_k), t(&p_v), t(&t_qo), t(&t_indptr), t(&t_indices)]);
            args.extend([t(&t_last), t(&p_o), Arg::NONE, Arg::int(0), Arg::int(0), Arg::int(-1), pdl]);
            args.extend([Arg::NONE; 6]);
            args.extend(rope);
            args.push(Arg::int(0));
        }
        args
    };
    let run_function = module.function(if cores { "run" } else { "paged_run" })?;

    let mut workspace = Workspace::new(spec, Largest::decode(requests), stream)?;
    let wait = || stream.synchronize().expect("the stream");
    runtime.on(stream, |_| -> Result<bool, Failed> {
        let (ours, bare) = least(
            20,
            || {
                black_box(workspace.plan(&batch).expect("a plan"));
            },
            || drop(black_box(bare_plan())),
            &wait,
        );
        let options = AttentionOptions::default();
        let plan = workspace.plan(&batch)?;
        let (our_run, bare_run) = least(
            if requests > 1 { 50 } else { 200 },
            || plan.run(&mut o, None, &q, &cache, &options).expect("a run"),
            // SAFETY: as the plan, which answers the same for the same batch.
            || unsafe { run_function.launch(&args) }.expect("a run"),
            &wait,
        );
        let what = format!("{backend:?}, {requests} x {keys}");
        println!("{what}: plan {ours:.0} ns, bare {bare:.0} ns, {:.3} times", ours / bare);
        println!("{what}: run {our_run:.0} ns, bare {bare_run:.0} ns, {:.3} times", our_run / bare_run);
        Ok(!on_gpu || (ours <= TIMES_PLAN * bare && our_run <= TIMES_RUN * bare_run))
    })?
}
