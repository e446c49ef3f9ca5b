//! Upstream's planners and launchers, from the real libraries, over stand-ins for CUDA's driver and runtime: what the planners answer
//! is what their rules say, batch after batch, also the largest that a workspace was made for; and every launcher takes what it
//! is given. A module that was not vendored is reported as ignored, by its name. `FLASHINFER_RS_LIB_DIR` names another folder of
//! modules.

#[path = "support/native.rs"]
mod native;
#[path = "support/planner.rs"]
mod planner;

use std::ffi::c_void;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtrMut};
use flashinfer_rs::attention::{
    AttentionBuilder, AttentionOptions, AttentionSpec, Backend, Batch, DecodeTable, GraphPlan, GraphRoom, GraphXqa,
    Kind, Largest, LatentQueries, Plan, Workspace, XqaDecode,
};
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache, PagedMlaCache};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, LaunchGraph, OnDevice, Placed, RuntimeConfig, Stream, TensorMut,
    TensorRef,
};
use half::bf16;
use libloading::os::unix::Library;
use libtest_mimic::{Arguments, Trial};
use planner::{Heads, Lengths, Planned};

/// Where the modules are.
const MODULES: &str = "ATTENTION_TEST_MODULES";

fn modules() -> PathBuf {
    let named = std::env::var_os(MODULES).or_else(|| std::env::var_os("FLASHINFER_RS_LIB_DIR"));
    named.map_or_else(native::vendored_libraries, PathBuf::from)
}

type Test = fn(&Machine, AttentionSpec);
type Case = (&'static str, fn() -> (AttentionBuilder, Backend), Test);

const PAGED: AttentionBuilder = AttentionSpec::paged(DType::BF16, (8, 2), 128, 16).causal(true);
const RAGGED: AttentionBuilder = AttentionSpec::ragged(DType::BF16, (8, 2), (128, 128)).causal(true);
const DECODE: AttentionBuilder = AttentionSpec::decode(DType::BF16, (8, 2), 128, 16);

const HEADS: Heads = Heads { q: 8, kv: 2, size: 128 };

fn main() -> ExitCode {
    let cases: [Case; 21] = [
        ("fa2_is_captured_and_planned_in_order", || (PAGED, Backend::Fa2), captured),
        ("fa3_is_captured_and_planned_in_order", || (PAGED, Backend::Fa3), captured),
        ("decode_is_captured_and_planned_in_order", || (DECODE, Backend::CudaCores), captured),
        (
            "fa2_is_planned_for_a_graph",
            || (AttentionSpec::paged(DType::BF16, (8, 2), 128, 16).causal(true), Backend::Fa2),
            graph,
        ),
        (
            "fa3_is_planned_for_a_graph",
            || (AttentionSpec::paged(DType::BF16, (8, 2), 128, 16).causal(true), Backend::Fa3),
            graph,
        ),
        (
            "decode_is_planned_for_a_graph",
            || (AttentionSpec::decode(DType::BF16, (8, 2), 128, 16), Backend::CudaCores),
            graph,
        ),
        (
            "latent_attention_is_planned_for_a_graph",
            || (AttentionSpec::mla(DType::BF16, 128, 16).sm_scale(0.07), Backend::Fa2),
            graph,
        ),
        ("fa2_is_planned_for_a_graph_without_pages", || (RAGGED, Backend::Fa2), ragged_graph),
        ("fa3_is_planned_for_a_graph_without_pages", || (RAGGED, Backend::Fa3), ragged_graph),
        (
            "queries_of_8_bits_run_paged",
            || (AttentionSpec::paged(DType::F8E4M3, (8, 2), 128, 16).causal(true), Backend::Fa3),
            run_8_bits,
        ),
        (
            "queries_of_8_bits_run_ragged",
            || (AttentionSpec::ragged(DType::F8E4M3, (8, 2), (128, 128)).causal(true), Backend::Fa3),
            run_8_bits,
        ),
        ("one_sequence_runs", || (RAGGED, Backend::Fa2), run_single),
        (
            "fa2_plans_by_its_rules",
            || (AttentionSpec::paged(DType::BF16, (8, 2), 128, 16).causal(true), Backend::Fa2),
            fa2,
        ),
        (
            "fa2_runs_paged",
            || (AttentionSpec::paged(DType::BF16, (8, 2), 128, 16).causal(true), Backend::Fa2),
            run_paged,
        ),
        (
            "fa2_runs_ragged",
            || (AttentionSpec::ragged(DType::BF16, (8, 2), (128, 128)).causal(true), Backend::Fa2),
            run_ragged,
        ),
        (
            "fa2_decodes_groups_of_any_size",
            || (AttentionSpec::decode(DType::BF16, (14, 2), 128, 16), Backend::Fa2),
            run_decode,
        ),
        (
            "fa3_plans_by_its_rules",
            || (AttentionSpec::paged(DType::BF16, (8, 2), 128, 16).causal(true), Backend::Fa3),
            fa3,
        ),
        (
            "decode_plans_by_its_rules",
            || (AttentionSpec::decode(DType::BF16, (8, 2), 128, 16), Backend::CudaCores),
            decode,
        ),
        (
            "latent_attention_plans_by_its_rules",
            || (AttentionSpec::mla(DType::BF16, 16, 16).sm_scale(0.07), Backend::Fa2),
            mla,
        ),
        (
            "latent_attention_of_hopper_plans_by_its_rules",
            || (AttentionSpec::mla(DType::BF16, 16, 16).sm_scale(0.07), Backend::Fa3),
            mla,
        ),
        (
            "sinks_are_passed_as_objects",
            || (AttentionSpec::paged(DType::BF16, (8, 2), 64, 16).causal(true).window(40).sinks(), Backend::Fa2),
            run_sinks,
        ),
    ];
    let arguments = Arguments::from_args();
    let planned = cases.map(|(name, facts, test)| {
        let (facts, backend) = facts();
        let spec = facts.backend(backend).build().unwrap();
        (name, spec, spec.module(backend), test)
    });
    let spec = DECODE.build().unwrap();
    let xqa = [
        ("xqa_runs", spec, XqaDecode::module_of(&spec).unwrap(), run_xqa as Test),
        ("xqa_is_captured_and_given_other_tables", spec, XqaDecode::module_of(&spec).unwrap(), captured_xqa as Test),
    ];
    #[cfg(feature = "compute")]
    let steps = [
        ("decode_is_planned_ahead_of_a_compute_graphs_steps", DECODE, Backend::CudaCores),
        ("fa2_is_planned_ahead_of_a_compute_graphs_steps", PAGED, Backend::Fa2),
        ("fa3_is_planned_ahead_of_a_compute_graphs_steps", PAGED, Backend::Fa3),
    ]
    .map(|(name, facts, backend)| {
        let spec = facts.backend(backend).build().unwrap();
        (name, spec, spec.module(backend), compute_graph::steps as Test)
    });
    #[cfg(not(feature = "compute"))]
    let steps = [];
    let trials = planned.into_iter().chain(xqa).chain(steps).map(|(name, spec, module, test)| {
        let soname = format!("{module}.so");
        let beside = if name.ends_with("compute_graphs_steps") { "norm.so" } else { "libtvm_ffi.so" };
        let there = modules().join(&soname).is_file() && native::vendored_libraries().join(beside).is_file();
        let trial = Trial::test(name, move || {
            with_machine(name, &soname, |machine| test(&machine, spec));
            Ok(())
        });
        trial.with_ignored_flag(!there)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

struct Machine {
    stream: Arc<CudaStream>,
    cudart: Library,
    driver: Library,
}

/// Runs a test in a process of its own, over the stand-ins.
fn with_machine(name: &str, module: &str, body: impl FnOnce(Machine)) {
    const FOLDER: &str = "LD_LIBRARY_PATH";
    let folder = tempfile::tempdir().unwrap();
    let (stand_ins, modules) = (folder.path(), modules());
    if !native::in_its_process(name) {
        native::compile("cuda.c", "libcuda.so.1", &[], stand_ins);
        native::compile("failing_cudart.c", "libcudart.so.13", &[], stand_ins);
        std::os::unix::fs::symlink("libcuda.so.1", stand_ins.join("libcuda.so")).unwrap();
        fs::copy(native::vendored_libraries().join("libtvm_ffi.so"), stand_ins.join("libtvm_ffi.so")).unwrap();
        fs::copy(modules.join(module), stand_ins.join(module)).unwrap();
        // What compute graphs need beside attention.
        fs::copy(native::vendored_libraries().join("norm.so"), stand_ins.join("norm.so")).ok();
    }
    native::isolated_with(name, &[(FOLDER, stand_ins), (MODULES, &modules)], || {
        let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
        body(Machine::new(&folder));
    });
}

impl Machine {
    fn new(folder: &Path) -> Self {
        native::load(&folder.join("libcudart.so.13"), true);
        native::load(&folder.join("libcuda.so.1"), false);
        // SAFETY: the test's own libraries, and the vendored ones.
        let config = unsafe { RuntimeConfig::default().lib_dir(folder).without_verification() };
        FlashInferRuntime::initialize(config).unwrap();
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        // SAFETY: loaded already.
        let open = |name| unsafe { Library::new(folder.join(name)) }.unwrap();
        let machine = Self { stream, cudart: open("libcudart.so.13"), driver: open("libcuda.so.1") };
        machine.set("launch_fails_with", 0);
        machine.set("copies_are_late", 1);
        machine
    }

    /// The stand-in that has a variable: the driver's, else the runtime's.
    fn library(&self, name: &str) -> &Library {
        const OF_THE_DRIVER: [&str; 8] = [
            "pinned",
            "synchronized",
            "waits",
            "records",
            "streams_synchronized",
            "record_fails_with",
            "copy_fails_after",
            "copies_to_gpu",
        ];
        if OF_THE_DRIVER.contains(&name) { &self.driver } else { &self.cudart }
    }

    fn get(&self, name: &str) -> i32 {
        // SAFETY: the fixtures' variables are of this type.
        unsafe { **self.library(name).get::<*const i32>(name.as_bytes()).unwrap() }
    }

    fn set(&self, name: &str, value: i32) {
        // SAFETY: as above.
        unsafe { **self.library(name).get::<*mut i32>(name.as_bytes()).unwrap() = value };
    }

    /// The lists that were copied last.
    fn copied(&self) -> Vec<u8> {
        let bytes = self.get("last_copied_bytes") as usize;
        // SAFETY: the fixture's variable: memory of so many bytes.
        unsafe {
            let data = **self.cudart.get::<*const *const c_void>(b"last_copied").unwrap();
            std::slice::from_raw_parts(data.cast::<u8>(), bytes).to_vec()
        }
    }

    /// That the planner answered what its rules say, and copied those lists.
    fn expect(&self, plan: &Plan<'_>, expected: &Planned, bytes: (usize, usize), what: &str) {
        assert_eq!(plan.integers(), expected.integers, "{what}");
        assert!(expected.float <= bytes.0 as i64 && expected.int <= bytes.1 as i64, "{what}: {bytes:?}");
        let copied = self.copied();
        assert_eq!(copied.len() as i64, expected.int, "{what}");
        for (at, list) in &expected.lists {
            let words = copied[*at as usize..].chunks_exact(4).take(list.len());
            let found: Vec<i32> = words.map(|word| i32::from_ne_bytes(word.try_into().unwrap())).collect();
            assert_eq!(&found, list, "{what}, the list at {at}");
        }
    }
}

impl Drop for Machine {
    /// Whatever a test does: the stand-ins copy as late as they may, and what is copied then is what was to be.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.get("torn"), 0, "page-locked memory was written, or given back, while it was copied from");
        }
    }
}

fn random(seed: u64) -> impl FnMut(i64) -> i64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 17) % below as u64) as i64
    }
}

/// Random batches of all sizes, and at the end the largest.
fn batches(largest: Largest, one_query: bool, page_size: i64) -> Vec<(Batch, Lengths)> {
    let all = (0..120).map(|seed| {
        let mut random = random(seed + 1);
        let full = seed >= 110;
        let requests = if full { largest.requests } else { 1 + random(largest.requests.min(1 << (seed % 9))) };
        let mut left = largest.rows;
        let (mut batch, mut lengths) =
            (Batch::paged(page_size, 1 << 16).unwrap(), Lengths { queries: vec![], pages: vec![] });
        for request in 0..requests {
            let most = left - (requests - request - 1);
            let (short, long) = (1 << random(12), 1 << random(14));
            let queries = match () {
                () if one_query => 1,
                () if full && request + 1 == requests => most,
                () => 1 + random(most.min(short)),
            };
            left -= queries;
            let keys = queries + random(long);
            let pages = (keys + page_size - 1) / page_size;
            batch.push(queries, &vec![(request % 100) as i32; pages as usize], keys).unwrap();
            lengths.queries.push(queries);
            lengths.pages.push(pages);
        }
        (batch, lengths)
    });
    all.collect()
}

fn fa2(machine: &Machine, spec: AttentionSpec) {
    let mut waits = 0;
    for largest in [Largest::new(300, 4096), Largest::new(7, 5000), Largest::new(1, 1)] {
        let mut workspace = Workspace::new(spec, largest, &machine.stream).unwrap();
        let (bytes, before) = (workspace.bytes(), machine.get("synchronized"));
        for (i, (batch, lengths)) in batches(largest, false, 16).iter().enumerate() {
            let plan = workspace.plan(batch).unwrap();
            let expected = planner::fa2(lengths, &HEADS, 16, 132, None);
            machine.expect(&plan, &expected, bytes, &format!("batch {i} of {largest:?}"));
        }
        waits += machine.get("synchronized") - before;
    }
    // What is queued is waited for before its memory is written again, once for four plans in turn, and is given back at the end.
    assert!((3 * 110 / 4..3 * 120 / 4).contains(&waits), "{waits}");
    assert_eq!(machine.get("pinned"), 0);
}

fn fa3(machine: &Machine, spec: AttentionSpec) {
    for largest in [Largest::new(300, 4096), Largest::new(7, 5000), Largest::new(3, 1 << 20)] {
        let mut workspace = Workspace::new(spec, largest, &machine.stream).unwrap();
        let bytes = workspace.bytes();
        for (i, (batch, lengths)) in batches(largest, false, 16).iter().enumerate() {
            let plan = workspace.plan(batch).unwrap();
            let expected = planner::fa3(&lengths.queries, &HEADS, 132, None);
            machine.expect(&plan, &expected, bytes, &format!("batch {i} of {largest:?}"));
        }
    }
    run_paged(machine, spec);
}

fn decode(machine: &Machine, spec: AttentionSpec) {
    for occupancy in [1, 5, 16] {
        machine.set("occupancy", occupancy);
        for requests in [1, 64, 300, 5000] {
            let largest = Largest::decode(requests);
            let mut workspace = Workspace::new(spec, largest, &machine.stream).unwrap();
            let bytes = workspace.bytes();
            for (i, (batch, lengths)) in batches(largest, true, 16).iter().enumerate() {
                let plan = workspace.plan(batch).unwrap();
                let expected = planner::decode(&lengths.pages, &HEADS, 16, 132 * i64::from(occupancy), false);
                machine.expect(&plan, &expected, bytes, &format!("batch {i} of {largest:?} with {occupancy} blocks"));
            }
        }
    }
    run_decode(machine, spec);
}

fn mla(machine: &Machine, spec: AttentionSpec) {
    let largest = Largest::new(300, 4096);
    let mut workspace = Workspace::new(spec, largest, &machine.stream).unwrap();
    let bytes = workspace.bytes();
    for (i, (batch, lengths)) in batches(largest, false, 16).iter().enumerate() {
        let plan = workspace.plan(batch).unwrap();
        machine.expect(&plan, &planner::mla(&lengths.queries, 16, 132), bytes, &format!("batch {i}"));
    }
    // As many tiles as the lists hold, and one more.
    let mut batch = Batch::paged(16, 4).unwrap();
    (0..16_384 - 132).for_each(|_| batch.push(1, &[0], 1).unwrap());
    let largest = Largest::new(16_384, 16_384);
    let mut workspace = Workspace::new(spec, largest, &machine.stream).unwrap();
    workspace.plan(&batch).unwrap();
    batch.push(1, &[0], 1).unwrap();
    let error = workspace.plan(&batch).unwrap_err().to_string();
    assert!(error.contains("16252 tiles, which the planner's lists hold"), "{error}");

    let mut batch = Batch::paged(16, 4).unwrap();
    batch.push(1, &[3, 1], 20).unwrap();
    batch.push(2, &[0], 2).unwrap();
    let plan = workspace.plan(&batch).unwrap();
    let stream = &machine.stream;
    let zeros = |count| stream.alloc_zeros::<bf16>(count).unwrap();
    let (nope, pe) = (zeros(3 * 16 * 512), zeros(3 * 16 * 64));
    let (mut o, mut ckv, mut kpe) = (zeros(3 * 16 * 512), zeros(4 * 16 * 512), zeros(4 * 16 * 64));
    let mut lse = stream.alloc_zeros::<f32>(3 * 16).unwrap();
    let cache = PagedMlaCache::new(
        TensorMut::from_cudarc(stream, &mut ckv, &[4, 16, 512]).unwrap(),
        TensorMut::from_cudarc(stream, &mut kpe, &[4, 16, 64]).unwrap(),
    )
    .unwrap();
    let (q_nope, q_pe) = (
        TensorRef::from_cudarc(stream, &nope, &[3, 16, 512]).unwrap(),
        TensorRef::from_cudarc(stream, &pe, &[3, 16, 64]).unwrap(),
    );
    let before = machine.get("launches");
    plan.run_mla(
        &mut TensorMut::from_cudarc(stream, &mut o, &[3, 16, 512]).unwrap(),
        Some(&mut TensorMut::from_cudarc(stream, &mut lse, &[3, 16]).unwrap()),
        &LatentQueries { q_nope: &q_nope, q_pe: &q_pe },
        &cache,
    )
    .unwrap();
    assert_eq!(machine.get("launches"), before + 1);
}

/// Batches up to what a graph has room for are all planned alike; one that upstream plans otherwise is refused, and the lists of
/// the one before are copied again.
fn graph(machine: &Machine, spec: AttentionSpec) {
    let stream = &machine.stream;
    let one = spec.kind() != Kind::Paged;
    for (requests, rows) in [(1, 1), (7, 7), (40, if one { 40 } else { 700 }), (300, 300)] {
        let room = GraphRoom { requests, rows, pages: 60_000, reserved_page: 65_535 };
        let largest = Largest::new(requests, rows);
        let all = batches(largest, one, 16);
        let fitting: Vec<_> = all.iter().filter(|(batch, _)| batch.page_count() <= room.pages).collect();
        assert!(fitting.len() > 60, "{} of {}", fitting.len(), all.len());
        let plan = GraphPlan::new(spec, room, &fitting[0].0, stream).unwrap();
        let integers = plan.integers().to_vec();
        let mut graph = LaunchGraph::new(stream, plan).unwrap();
        for (batch, lengths) in fitting {
            graph.buffers().unwrap().replan(batch).unwrap_or_else(|error| panic!("{requests} requests: {error}"));
            let missing = requests as usize - lengths.queries.len();
            // As it is filled up: requests of one page, without queries where there may be any number.
            let queries = [&lengths.queries[..], &vec![i64::from(one); missing]].concat();
            let pages = [&lengths.pages[..], &vec![1; missing]].concat();
            let filled = Lengths { queries, pages };
            let expected = match (spec.kind(), spec.backend((9, 0))) {
                (Kind::Mla, _) => planner::mla(&filled.queries, 128, 132),
                (_, Backend::CudaCores) => planner::decode(&filled.pages, &HEADS, 16, 132, true),
                (_, Backend::Fa3) => planner::fa3(&filled.queries, &HEADS, 132, Some(rows)),
                (_, Backend::Fa2) => planner::fa2(&filled, &HEADS, 16, 132, Some(rows)),
            };
            assert_eq!(integers, expected.integers);
            let copied = machine.copied();
            assert_eq!(copied.len() as i64, expected.int);
            for (at, list) in &expected.lists {
                let words = copied[*at as usize..].chunks_exact(4).take(list.len());
                let found: Vec<i32> = words.map(|word| i32::from_ne_bytes(word.try_into().unwrap())).collect();
                assert_eq!(&found, list, "the list at {at}");
            }
        }
        // A GPU of another size plans few requests otherwise: what was captured does not do for that.
        let mut batch = Batch::paged(16, 1 << 16).unwrap();
        batch.push(1, &[3], 5).unwrap();
        if requests < 10 {
            machine.set("multiprocessors", 66);
            let error = graph.buffers().unwrap().replan(&batch).unwrap_err().to_string();
            assert!(error.contains("as was captured"), "{error}");
            // The lists before it cannot be copied again: nothing is launched until they are.
            graph.capture(|_, _| Ok(())).unwrap();
            machine.set("copy_fails_after", 1);
            let error = graph.buffers().unwrap().replan(&batch).unwrap_err();
            assert!(matches!(error, FlashInferError::Cuda { .. }), "{error}");
            let launches = machine.get("launches");
            assert!(graph.launch().is_err());
            machine.set("copy_fails_after", -1);
            let copies = machine.get("copies_to_gpu");
            assert_eq!(machine.get("launches"), launches);
            graph.launch().unwrap();
            assert_eq!(machine.get("copies_to_gpu"), copies + 2, "the tables and the lists");
            graph.launch().unwrap();
            assert_eq!(machine.get("copies_to_gpu"), copies + 2);
            machine.set("multiprocessors", 132);
        }
        graph.buffers().unwrap().replan(&batch).unwrap();
        machine.set("copy_fails_with", 1);
        let error = graph.buffers().unwrap().replan(&batch).unwrap_err();
        assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
        machine.set("copy_fails_with", 0);
        for (batch, says) in [(Batch::paged(16, 9).unwrap(), "pages of the cache"), (Batch::ragged(), "Batch::paged")] {
            let error = graph.buffers().unwrap().replan(&batch).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}

/// As [`graph`], of keys that lie one after the other: requests that are missing have neither queries nor keys. And its calls are
/// captured with tensors that have the rows that there is room for.
fn ragged_graph(machine: &Machine, spec: AttentionSpec) {
    let stream = &machine.stream;
    for (requests, rows) in [(1, 1), (7, 7), (40, 700)] {
        let room = GraphRoom::ragged(requests, rows, 60_000);
        let all = batches(Largest::new(requests, rows), false, 1);
        let fitting =
            all.into_iter().map(|(_, lengths)| lengths).filter(|lengths| lengths.pages.iter().sum::<i64>() <= 60_000);
        let fitting: Vec<_> = fitting.take(40).collect();
        assert_eq!(fitting.len(), 40);
        let batch = |lengths: &Lengths| {
            let mut batch = Batch::ragged();
            let each = lengths.queries.iter().zip(&lengths.pages);
            each.for_each(|(queries, keys)| batch.push_ragged(*queries, *keys).unwrap());
            batch
        };
        let plan = GraphPlan::new(spec, room, &batch(&fitting[0]), stream).unwrap();
        let integers = plan.integers().to_vec();
        let zeros = |count: i64| stream.alloc_zeros::<bf16>(count as usize).unwrap();
        let buffers = (plan, zeros(rows * 1024), zeros(rows * 1024), zeros(60_000 * 256), zeros(60_000 * 256));
        let mut graph = LaunchGraph::new(stream, buffers).unwrap();
        let before = machine.get("launches");
        graph
            .capture(|s, (plan, q, mut o, k, v)| {
                let (q, mut o) = (q.read(&[rows, 8, 128])?, o.write(&[rows, 8, 128])?);
                let kv_shape = [60_000, 2, 128];
                let (k, v, options) = (k.read(&kv_shape)?, v.read(&kv_shape)?, AttentionOptions::default());
                plan.run_ragged(&mut o, None, &q, (&k, &v), &options, s)?;
                let fewer = k.narrow(0, 0, 59_999)?;
                let error = plan.run_ragged(&mut o, None, &q, (&fewer, &fewer), &options, s).unwrap_err().to_string();
                assert!(error.contains("60000, for which the batch was made"), "{error}");
                Ok(())
            })
            .unwrap();
        assert_eq!(machine.get("launches"), before + if spec.backend((9, 0)) == Backend::Fa3 { 1 } else { 2 });
        for lengths in &fitting {
            graph.buffers().unwrap().0.replan(&batch(lengths)).unwrap();
            graph.launch().unwrap();
            let none = vec![0; requests as usize - lengths.queries.len()];
            let queries = [&lengths.queries[..], &none].concat();
            let filled = Lengths { queries, pages: [&lengths.pages[..], &none].concat() };
            let expected = match spec.backend((9, 0)) {
                Backend::Fa3 => planner::fa3(&filled.queries, &HEADS, 132, Some(rows)),
                _ => planner::fa2(&filled, &HEADS, 1, 132, Some(rows)),
            };
            assert_eq!(integers, expected.integers);
            let copied = machine.copied();
            assert_eq!(copied.len() as i64, expected.int);
            for (at, list) in &expected.lists {
                let words = copied[*at as usize..].chunks_exact(4).take(list.len());
                let found: Vec<i32> = words.map(|word| i32::from_ne_bytes(word.try_into().unwrap())).collect();
                assert_eq!(&found, list, "the list at {at}");
            }
        }
        let mut large = Batch::ragged();
        large.push_ragged(1, 60_001).unwrap();
        let error = graph.buffers().unwrap().0.replan(&large).unwrap_err().to_string();
        assert!(error.contains("60001 of all requests together"), "{error}");
        let error = graph.buffers().unwrap().0.replan(&Batch::paged(1, 9).unwrap()).unwrap_err().to_string();
        assert!(error.contains("Batch::ragged"), "{error}");
        graph.launch().unwrap();
    }
    let pages = Batch::paged(16, 9).unwrap();
    let error = GraphPlan::new(spec, GraphRoom::ragged(1, 1, 9), &pages, stream).unwrap_err().to_string();
    assert!(error.contains("ragged without pages"), "{error}");
    for keys in [0, 1 << 31] {
        let error =
            GraphPlan::new(spec, GraphRoom::ragged(1, 1, keys), &Batch::ragged(), stream).unwrap_err().to_string();
        assert!(error.contains("1 to 2147483647"), "{error}");
    }
}

/// A plan comes behind the launch before it and ahead of the one behind it, whichever stream the graph is launched on; and captured
/// kernels may start early only where the graph says so and they wait by themselves.
fn captured(machine: &Machine, spec: AttentionSpec) {
    let (own, other) = (&machine.stream, machine.stream.context().new_stream().unwrap());
    let rows = if spec.kind() == Kind::Decode { 4 } else { 60 };
    let room = GraphRoom { requests: 4, rows, pages: 90, reserved_page: 99 };
    let mut batch = Batch::paged(16, 100).unwrap();
    batch.push(1, &[7, 3], 20).unwrap();
    for pdl in [true, false] {
        let plan = GraphPlan::new(spec, room, &batch, own).unwrap();
        let zeros = |count: i64| own.alloc_zeros::<bf16>(count as usize).unwrap();
        let buffers = (plan, zeros(rows * 1024), zeros(rows * 1024), zeros(100 * 16 * 256), zeros(100 * 16 * 256));
        let (queries, mut results) = (zeros(rows * 1024), zeros(rows * 1024));
        let (mut keys, mut values) = (zeros(100 * 4096), zeros(100 * 4096));
        let mut graph = LaunchGraph::new(&other, buffers).unwrap().with_pdl(pdl);
        let before = machine.get("launches");
        graph
            .capture(|s, (plan, q, mut o, mut k, mut v)| {
                let shape = [100, 16, 2, 128];
                let cache = PagedKvCache::new(k.write(&shape)?, v.write(&shape)?, KvLayout::Nhd)?;
                let (q, mut o) = (q.read(&[rows, 8, 128])?, o.write(&[rows, 8, 128])?);
                plan.run(&mut o, None, &q, &cache, &AttentionOptions::default(), s)?;
                // The plan's own stream is none that is captured.
                let fewer = TensorRef::from_cudarc(own, &own.alloc_zeros::<bf16>(16).unwrap(), &[1, 1, 16])
                    .map(|tensor| plan.run(&mut o, None, &tensor, &cache, &AttentionOptions::default(), s));
                assert!(fewer.is_err() || fewer.is_ok_and(|result| result.is_err()));
                // Nor is it with tensors of that stream: the graph's scratch memory is for its launches alone.
                let tensor = |buffer| TensorMut::from_cudarc(own, buffer, &shape);
                let cache = PagedKvCache::new(tensor(&mut keys)?, tensor(&mut values)?, KvLayout::Nhd)?;
                let q = TensorRef::from_cudarc(own, &queries, &[rows, 8, 128])?;
                let mut o = TensorMut::from_cudarc(own, &mut results, &[rows, 8, 128])?;
                match plan.run(&mut o, None, &q, &cache, &AttentionOptions::default(), Stream::cudarc(own)) {
                    Err(FlashInferError::InvalidArgument { argument: "stream", .. }) => Ok(()),
                    other => panic!("{other:?}"),
                }
            })
            .unwrap();
        let hopper_alone = spec.backend((9, 0)) == Backend::Fa3;
        // A kernel that merges the parts of contexts, which a graph divides always; FA3 divides none.
        assert_eq!(machine.get("launches"), before + if hopper_alone { 1 } else { 2 });
        assert_eq!(machine.get("last_pdl"), i32::from(pdl && !hopper_alone));
        graph.launch().unwrap();
        let counted = || (machine.get("waits"), machine.get("records"));
        let all = counted().1;
        for pages in [[7, 3], [8, 2], [7, 3], [8, 2]] {
            batch.clear();
            batch.push(1, &pages, 21).unwrap();
            let mut views = graph.buffers().unwrap();
            let (waits, records) = counted();
            views.0.replan(&batch).unwrap();
            // For the launch; behind the copies, for the next launch and, of four plans, for the slots.
            assert_eq!(counted().0, waits + 1);
            assert!([1, 2].contains(&(counted().1 - records)));
            let (waits, _) = counted();
            graph.launch().unwrap();
            assert!(counted().0 > waits, "a launch waits for the plan");
        }
        assert!(counted().1 > all + 4);
    }
}

/// Runs a batch of two requests, in both layouts, with and without logarithms.
fn run(machine: &Machine, spec: AttentionSpec, queries: i64, sinks: bool) {
    let stream = &machine.stream;
    let ((q_heads, kv_heads), size) = (spec.heads(), spec.head_dims().0);
    let mut batch = Batch::paged(16, 400).unwrap();
    batch.push(queries, &(0..300).collect::<Vec<_>>(), 300 * 16).unwrap();
    batch.push(1, &[5], 7).unwrap();
    let rows = batch.rows();
    for layout in [KvLayout::Nhd, KvLayout::Hnd] {
        let facts = match spec.kind() {
            Kind::Decode => AttentionSpec::decode(DType::BF16, (q_heads, kv_heads), size, 16),
            _ => AttentionSpec::paged(DType::BF16, (q_heads, kv_heads), size, 16).causal(true),
        };
        let facts = spec.window().map_or(facts, |window| facts.window(window));
        let facts = if sinks { facts.sinks() } else { facts };
        let backend = spec.backend((9, 0));
        let spec = facts.layout(layout).backend(backend).build().unwrap();
        let mut workspace = Workspace::new(spec, Largest::new(2, rows), stream).unwrap();
        assert_eq!(workspace.backend(), Some(backend));
        let plan = workspace.plan(&batch).unwrap();
        let zeros = |count: i64| stream.alloc_zeros::<bf16>(count as usize).unwrap();
        let (q, mut o) = (zeros(rows * q_heads * size), zeros(rows * q_heads * size));
        let count = 400 * 16 * kv_heads * size;
        let (mut k, mut v) = (zeros(count), zeros(count));
        let mut lse = stream.alloc_zeros::<f32>((rows * q_heads) as usize).unwrap();
        let numbers = stream.alloc_zeros::<f32>(q_heads as usize).unwrap();
        let shape = match layout {
            KvLayout::Nhd => [400, 16, kv_heads, size],
            KvLayout::Hnd => [400, kv_heads, 16, size],
        };
        let cache = PagedKvCache::new(
            TensorMut::from_cudarc(stream, &mut k, &shape).unwrap(),
            TensorMut::from_cudarc(stream, &mut v, &shape).unwrap(),
            layout,
        )
        .unwrap();
        let q = TensorRef::from_cudarc(stream, &q, &[rows, q_heads, size]).unwrap();
        let good = q.clone();
        let mut o = TensorMut::from_cudarc(stream, &mut o, &[rows, q_heads, size]).unwrap();
        let mut lse = TensorMut::from_cudarc(stream, &mut lse, &[rows, q_heads]).unwrap();
        let options = match sinks {
            true => {
                AttentionOptions::default().with_sink(TensorRef::from_cudarc(stream, &numbers, &[q_heads]).unwrap())
            }
            false => AttentionOptions::default(),
        };
        let before = machine.get("launches");
        plan.run(&mut o, None, &q, &cache, &options).unwrap();
        // FA3 divides no context; the others launch a kernel that merges the parts.
        let each = if backend == Backend::Fa3 { 1 } else { 2 };
        assert_eq!(machine.get("launches"), before + each);
        plan.run(&mut o, Some(&mut lse), &q, &cache, &options).unwrap();
        assert_eq!(machine.get("last_pdl"), i32::from(backend != Backend::Fa3));

        machine.set("launch_fails_with", 209);
        let error = plan.run(&mut o, None, &q, &cache, &options).unwrap_err();
        assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
        machine.set("launch_fails_with", 0);
        plan.run(&mut o, None, &q, &cache, &options).unwrap();

        // Tensors of another stream are none of the workspace's.
        let other = stream.context().new_stream().unwrap();
        let elsewhere = other.alloc_zeros::<bf16>((rows * q_heads * size) as usize).unwrap();
        let q = TensorRef::from_cudarc(&other, &elsewhere, &[rows, q_heads, size]).unwrap();
        let error = plan.run(&mut o, None, &q, &cache, &options).unwrap_err().to_string();
        assert!(error.contains("the call's stream"), "{error}");
        let host = vec![bf16::ZERO; (rows * q_heads * size) as usize];
        let on_host = TensorRef::from_slice(&host, &[rows, q_heads, size]).unwrap();
        let error = plan.run(&mut o, None, &on_host, &cache, &options).unwrap_err().to_string();
        assert!(error.contains("memory of cpu"), "{error}");
        // Nor does a good call let others through that differ from it: in type, in size, in strides and in where they are.
        let count = (rows * q_heads * size) as usize;
        let (wide, halves) = (zeros(2 * count as i64 + 8), stream.alloc_zeros::<half::f16>(count).unwrap());
        let whole = [rows, q_heads, size];
        let odd = wide.slice(1..=count);
        let strided = TensorRef::from_cudarc_strided(stream, &wide, &whole, &[q_heads * size, size, 2]);
        let wrong = [
            (TensorRef::from_cudarc(stream, &halves, &whole), "q"),
            (TensorRef::from_cudarc(stream, &wide, &[rows + 1, q_heads, size]), "rows"),
            (TensorRef::from_cudarc(stream, &wide, &[rows, q_heads, size / 2]), "head_dim"),
            (TensorRef::from_cudarc(stream, &odd, &whole), "q"),
            (strided, "q"),
        ];
        for (wrong, name) in wrong {
            plan.run(&mut o, None, &good, &cache, &options).unwrap();
            match plan.run(&mut o, None, &wrong.unwrap(), &cache, &options) {
                Err(FlashInferError::InvalidArgument { argument, .. }) if argument == name || argument == "o" => {}
                other => panic!("{name}: {other:?}"),
            }
        }
        plan.run(&mut o, None, &good, &cache, &options).unwrap();
    }
    // Where nothing tells when copies are made, the host waits for the stream, and it is an error.
    let mut workspace = Workspace::new(spec, Largest::new(2, rows), stream).unwrap();
    let waited = machine.get("streams_synchronized");
    machine.set("record_fails_with", 1);
    // Of four plans one records an event.
    let errors: Vec<_> = (0..4).filter_map(|_| workspace.plan(&batch).map(drop).err()).collect();
    assert!(matches!(errors[..], [FlashInferError::Cuda { .. }]), "{errors:?}");
    assert_eq!(machine.get("streams_synchronized"), waited + 1);
    machine.set("record_fails_with", 0);
    let mut workspace = Workspace::new(spec, Largest::new(2, rows), stream).unwrap();
    // A copy that fails is an error, and the next plan is as good as any.
    machine.set("copy_fails_with", 1);
    let error = workspace.plan(&batch).map(drop).unwrap_err();
    assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
    machine.set("copy_fails_with", 0);
    workspace.plan(&batch).unwrap();
}

fn run_paged(machine: &Machine, spec: AttentionSpec) {
    run(machine, spec, 40, false);
}

fn run_decode(machine: &Machine, spec: AttentionSpec) {
    run(machine, spec, 1, false);
}

fn run_sinks(machine: &Machine, spec: AttentionSpec) {
    // The window leaves too little to be divided, so each call is one launch: that the objects are taken is what counts.
    let stream = &machine.stream;
    let mut batch = Batch::paged(16, 4).unwrap();
    batch.push(3, &[1, 2], 20).unwrap();
    let mut workspace = Workspace::new(spec, Largest::new(1, 3), stream).unwrap();
    let plan = workspace.plan(&batch).unwrap();
    let zeros = |count| stream.alloc_zeros::<bf16>(count).unwrap();
    let (q, mut o, mut k, mut v) = (zeros(3 * 8 * 64), zeros(3 * 8 * 64), zeros(4 * 16 * 128), zeros(4 * 16 * 128));
    let numbers = stream.alloc_zeros::<f32>(8).unwrap();
    let cache = PagedKvCache::new(
        TensorMut::from_cudarc(stream, &mut k, &[4, 16, 2, 64]).unwrap(),
        TensorMut::from_cudarc(stream, &mut v, &[4, 16, 2, 64]).unwrap(),
        KvLayout::Nhd,
    )
    .unwrap();
    let q = TensorRef::from_cudarc(stream, &q, &[3, 8, 64]).unwrap();
    let mut o = TensorMut::from_cudarc(stream, &mut o, &[3, 8, 64]).unwrap();
    let sink = TensorRef::from_cudarc(stream, &numbers, &[8]).unwrap();
    let before = machine.get("launches");
    plan.run(&mut o, None, &q, &cache, &AttentionOptions::default().with_sink(sink)).unwrap();
    assert_eq!(machine.get("launches"), before + 1);
}

fn run_ragged(machine: &Machine, spec: AttentionSpec) {
    let stream = &machine.stream;
    let mut batch = Batch::ragged();
    batch.push_ragged(40, 900).unwrap();
    batch.push_ragged(1, 7).unwrap();
    let mut workspace = Workspace::new(spec, Largest::new(2, 41), stream).unwrap();
    let plan = workspace.plan(&batch).unwrap();
    let zeros = |count| stream.alloc_zeros::<bf16>(count).unwrap();
    let (q, mut o) = (zeros(41 * 8 * 128), zeros(41 * 8 * 128));
    let (k, v) = (zeros(907 * 2 * 128), zeros(907 * 2 * 128));
    let q = TensorRef::from_cudarc(stream, &q, &[41, 8, 128]).unwrap();
    let mut o = TensorMut::from_cudarc(stream, &mut o, &[41, 8, 128]).unwrap();
    let keys = |buffer| TensorRef::from_cudarc(stream, buffer, &[907, 2, 128]).unwrap();
    let before = machine.get("launches");
    plan.run_ragged(&mut o, None, &q, (&keys(&k), &keys(&v)), &AttentionOptions::default()).unwrap();
    assert!(machine.get("launches") > before);
    let short = TensorRef::from_cudarc(stream, &k, &[906, 2, 128]).unwrap();
    let error = plan.run_ragged(&mut o, None, &q, (&short, &short), &AttentionOptions::default()).unwrap_err();
    assert!(error.to_string().contains("907, for which the batch was made"), "{error}");
}

/// 8-bit queries, keys and values: the launcher takes what it is given, and the current GPU is what it was, also where the launcher
/// changes it.
fn run_8_bits(machine: &Machine, spec: AttentionSpec) {
    let stream = &machine.stream;
    let ragged = spec.kind() == Kind::Ragged;
    let bytes = |count: usize| stream.alloc_zeros::<u8>(count).unwrap();
    let (q, mut k, mut v) = (bytes(41 * 1024), bytes(907 * 256 + 4096), bytes(907 * 256 + 4096));
    let mut o = stream.alloc_zeros::<bf16>(41 * 1024).unwrap();
    let mut lse = stream.alloc_zeros::<f32>(41 * 8).unwrap();
    let mut address = |buffer: &mut CudaSlice<u8>| buffer.device_ptr_mut(stream).0 as *mut c_void;
    let device = Device::Cuda(0);
    // SAFETY: the buffers hold as many bytes, and outlive the tensors.
    let raw = |at: *mut c_void, shape: &[i64]| unsafe {
        TensorMut::from_raw(at, device, DType::F8E4M3, shape, None).unwrap()
    };
    let (mut q, at) = (q, [&mut k, &mut v].map(&mut address));
    let q = raw(address(&mut q), &[41, 8, 128]);
    let q = q.as_ref();
    let mut o = TensorMut::from_cudarc(stream, &mut o, &[41, 8, 128]).unwrap();
    let mut lse = TensorMut::from_cudarc(stream, &mut lse, &[41, 8]).unwrap();
    let options = AttentionOptions::default().with_q_scale(2.0).with_k_scale(0.5).with_v_scale(3.0);
    machine.set("devices", 2);
    for on in [0, 1] {
        machine.set("current_device", on);
        let mut workspace = Workspace::new(spec, Largest::new(2, 41), stream).unwrap();
        assert_eq!(workspace.backend(), Some(Backend::Fa3));
        let before = machine.get("launches");
        if ragged {
            let mut batch = Batch::ragged();
            batch.push_ragged(40, 900).unwrap();
            batch.push_ragged(1, 7).unwrap();
            let plan = workspace.plan(&batch).unwrap();
            let [k, v] = at.map(|at| raw(at, &[907, 2, 128]));
            plan.run_ragged(&mut o, Some(&mut lse), &q, (&k.as_ref(), &v.as_ref()), &options).unwrap();
        } else {
            let mut batch = Batch::paged(16, 57).unwrap();
            batch.push(40, &(0..56).collect::<Vec<_>>(), 56 * 16).unwrap();
            batch.push(1, &[5], 7).unwrap();
            let plan = workspace.plan(&batch).unwrap();
            let [k, v] = at.map(|at| raw(at, &[57, 16, 2, 128]));
            let cache = PagedKvCache::new(k, v, KvLayout::Nhd).unwrap();
            plan.run(&mut o, Some(&mut lse), &q, &cache, &options).unwrap();
        }
        assert_eq!(machine.get("launches"), before + 1);
        assert_eq!(machine.get("last_pdl"), 0);
        assert_eq!(machine.get("current_device"), on);
    }
}

fn run_single(machine: &Machine, spec: AttentionSpec) {
    let stream = &machine.stream;
    let zeros = |count| stream.alloc_zeros::<bf16>(count).unwrap();
    let (q, mut o, k) = (zeros(3 * 1024), zeros(3 * 1024), zeros(5000 * 256));
    let q = TensorRef::from_cudarc(stream, &q, &[3, 8, 128]).unwrap();
    let k = TensorRef::from_cudarc(stream, &k, &[5000, 2, 128]).unwrap();
    let mut o = TensorMut::from_cudarc(stream, &mut o, &[3, 8, 128]).unwrap();
    let mut workspace = Workspace::new(spec, Largest::new(1, 3), stream).unwrap();
    let before = machine.get("launches");
    workspace.run_single(&mut o, None, &q, (&k, &k), &AttentionOptions::default()).unwrap();
    // A kernel that merges the parts of the context is the second.
    assert_eq!(machine.get("launches"), before + 2);
}

/// What XQA's kernel was given: the first eight bytes of each of its 15 arguments.
fn kernel_arguments(machine: &Machine) -> [u64; 15] {
    // SAFETY: the fixture's variable, an array of 16.
    unsafe { **machine.cudart.get::<*const [u64; 15]>(b"last_args").unwrap() }
}

fn run_xqa(machine: &Machine, spec: AttentionSpec) {
    let stream = &machine.stream;
    machine.set("kept_args", 15);
    let mut batch = Batch::paged(16, 400).unwrap();
    batch.push(1, &[3, 9], 20).unwrap();
    batch.push(1, &[5], 1).unwrap();
    // As many parts as there is room for in the table's rows, and no more than there are multiprocessors for.
    for (per_request, parts) in [(2usize, 1), (17, 2), (320, 20), (1000, 33)] {
        for layout in [KvLayout::Nhd, KvLayout::Hnd] {
            let facts = AttentionSpec::decode(spec.dtype(), spec.heads(), 128, 16).sm_scale(0.25).layout(layout);
            let decode = XqaDecode::new(facts.build().unwrap(), stream).unwrap();
            let table = OnDevice::new(DecodeTable::new(&batch, per_request).unwrap(), stream).unwrap();
            let zeros = |count: usize| stream.alloc_zeros::<bf16>(count).unwrap();
            let (q, mut o, mut k, mut v) =
                (zeros(2 * 8 * 128), zeros(2 * 8 * 128), zeros(400 * 4096), zeros(400 * 4096));
            let shape = if layout == KvLayout::Nhd { [400, 16, 2, 128] } else { [400, 2, 16, 128] };
            let cache = PagedKvCache::new(
                TensorMut::from_cudarc(stream, &mut k, &shape).unwrap(),
                TensorMut::from_cudarc(stream, &mut v, &shape).unwrap(),
                layout,
            )
            .unwrap();
            let q = TensorRef::from_cudarc(stream, &q, &[2, 8, 128]).unwrap();
            let mut o = TensorMut::from_cudarc(stream, &mut o, &[2, 8, 128]).unwrap();
            let before = machine.get("launches");
            let options = AttentionOptions::default().with_k_scale(2.0);
            let mut run = |q: &TensorRef<'_>| decode.run(&mut o, q, &cache, &table.placed(stream).unwrap(), &options);
            run(&q).unwrap();
            assert_eq!((machine.get("launches"), machine.get("last_pdl")), (before + 1, 0));
            assert_eq!(machine.get("last_grid"), parts, "rows of {per_request} pages");
            let given = kernel_arguments(machine);
            let word = |at: usize| given[at] as u32;
            assert_eq!((word(0), word(7), f32::from_bits(word(8))), (2, 2, 1.0));
            // 0.25 times 2, and what the kernel divides by, the root of 128.
            let scale = f32::from_bits(word(1));
            assert!((scale - 0.5 * 128f32.sqrt()).abs() < 1e-5, "{scale}");
            assert_eq!([given[2], given[5], given[9]], [0; 3], "no scales and no sinks in memory");
            assert!([3, 4, 6, 13, 14].iter().all(|at| given[*at] != 0), "{given:?}");
            // Pages, tokens and heads, in heads.
            let strides = if layout == KvLayout::Nhd { [32, 2, 1] } else { [32, 1, 16] };
            assert_eq!([word(10), word(11), word(12)], strides);

            machine.set("launch_fails_with", 209);
            let error = run(&q).unwrap_err();
            assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
            machine.set("launch_fails_with", 0);
            run(&q).unwrap();

            let other = stream.context().new_stream().unwrap();
            let elsewhere = other.alloc_zeros::<bf16>(2 * 8 * 128).unwrap();
            let error = run(&TensorRef::from_cudarc(&other, &elsewhere, &[2, 8, 128]).unwrap()).unwrap_err();
            assert!(error.to_string().contains("the call's stream"), "{error}");
            let host = vec![bf16::ZERO; 2 * 8 * 128];
            run(&TensorRef::from_slice(&host, &[2, 8, 128]).unwrap()).unwrap_err();
            // Tables for calls on another stream, and on the host.
            let there = OnDevice::new(table.host().clone(), &other).unwrap();
            for wrong in [there.placed(&other).unwrap(), Placed::on_host(table.host()).unwrap()] {
                match decode.run(&mut o, &q, &cache, &wrong, &options) {
                    Err(FlashInferError::InvalidArgument { argument: "page_table", .. }) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    // A table of no requests calls nobody: upstream would divide by their number.
    let decode = XqaDecode::new(spec, stream).unwrap();
    let none = DecodeTable::new(&Batch::paged(16, 400).unwrap(), 2).unwrap();
    let table = OnDevice::new(none, stream).unwrap();
    let (q, mut o) = (stream.alloc_zeros::<bf16>(16).unwrap(), stream.alloc_zeros::<bf16>(16).unwrap());
    let (mut k, mut v) =
        (stream.alloc_zeros::<bf16>(400 * 4096).unwrap(), stream.alloc_zeros::<bf16>(400 * 4096).unwrap());
    let cache = PagedKvCache::new(
        TensorMut::from_cudarc(stream, &mut k, &[400, 16, 2, 128]).unwrap(),
        TensorMut::from_cudarc(stream, &mut v, &[400, 16, 2, 128]).unwrap(),
        KvLayout::Nhd,
    )
    .unwrap();
    let before = machine.get("launches");
    let q = TensorRef::from_cudarc(stream, &q, &[0, 8, 128]).unwrap();
    let mut o = TensorMut::from_cudarc(stream, &mut o, &[0, 8, 128]).unwrap();
    decode.run(&mut o, &q, &cache, &table.placed(stream).unwrap(), &AttentionOptions::default()).unwrap();
    assert_eq!(machine.get("launches"), before);
}

fn captured_xqa(machine: &Machine, spec: AttentionSpec) {
    let (own, other) = (&machine.stream, machine.stream.context().new_stream().unwrap());
    let mut batch = Batch::paged(16, 100).unwrap();
    batch.push(1, &[7, 3], 20).unwrap();
    let table = DecodeTable::new(&batch, 40).unwrap().with_room_for(4).unwrap();
    let zeros = |count: usize| own.alloc_zeros::<bf16>(count).unwrap();
    let xqa = GraphXqa::new(spec, own).unwrap();
    assert_eq!(xqa.spec(), &spec);
    let caches = (zeros(100 * 4096), zeros(100 * 4096));
    let (queries, mut results) = (zeros(4096), zeros(4096));
    let (mut keys, mut values) = (zeros(100 * 4096), zeros(100 * 4096));
    let elsewhere = OnDevice::new(table.clone(), own).unwrap();
    let buffers = (xqa, OnDevice::new(table, own).unwrap(), (zeros(4096), zeros(4096)), caches);
    let mut graph = LaunchGraph::new(&other, buffers).unwrap();
    let before = machine.get("launches");
    graph
        .capture(|s, (xqa, table, (q, mut o), (mut k, mut v))| {
            let shape = [100, 16, 2, 128];
            let cache = PagedKvCache::new(k.write(&shape)?, v.write(&shape)?, KvLayout::Nhd)?;
            let (q, mut o) = (q.read(&[4, 8, 128])?, o.write(&[4, 8, 128])?);
            xqa.run(&mut o, &q, &cache, &table.placed()?, &AttentionOptions::default(), s)?;
            // No other stream may use the graph's counters.
            let tensor = |buffer| TensorMut::from_cudarc(own, buffer, &shape);
            let cache = PagedKvCache::new(tensor(&mut keys)?, tensor(&mut values)?, KvLayout::Nhd)?;
            let q = TensorRef::from_cudarc(own, &queries, &[4, 8, 128])?;
            let mut o = TensorMut::from_cudarc(own, &mut results, &[4, 8, 128])?;
            let (there, options) = (elsewhere.placed(own)?, AttentionOptions::default());
            match xqa.run(&mut o, &q, &cache, &there, &options, Stream::cudarc(own)) {
                Err(FlashInferError::InvalidArgument { argument: "stream", .. }) => Ok(()),
                other => panic!("{other:?}"),
            }
        })
        .unwrap();
    assert_eq!((machine.get("launches"), machine.get("last_pdl")), (before + 1, 0));
    graph.launch().unwrap();
    for keys in [21, 32, 33] {
        batch.clear();
        batch.push(1, &[7, 3, 8][..(keys as usize).div_ceil(16)], keys).unwrap();
        graph.buffers().unwrap().1.replace(&DecodeTable::new(&batch, 40).unwrap(), &other).unwrap();
        graph.launch().unwrap();
    }
    // Neither rows of another length nor more requests than were captured.
    for wrong in
        [DecodeTable::new(&batch, 41).unwrap(), DecodeTable::new(&batch, 40).unwrap().with_room_for(5).unwrap()]
    {
        let error = graph.buffers().unwrap().1.replace(&wrong, &other).unwrap_err().to_string();
        assert!(error.contains("4 requests of up to 40 pages"), "{error}");
    }
    // The stand-in counts a graph's launch as one: four of them, and nothing was captured anew.
    assert_eq!(machine.get("launches"), before + 1 + 4);
}

/// Attention in a compute graph, by the real planners and launchers, step by step.
#[cfg(feature = "compute")]
mod compute_graph {
    use flashinfer_rs::compute::{
        AttentionKernel, AttentionKernels, Buckets, Columns, DeviceRun, Dim, Graph, GraphBuilder, Pad,
    };
    use flashinfer_rs::matmul::Selections;

    use super::*;

    const PER_ROW: usize = 40;
    const PAGES: u64 = 700;
    const BUCKET: usize = 16;

    fn graph() -> Graph {
        let fixed = Dim::fixed;
        let mut g = GraphBuilder::new("attention", BUCKET as u64);
        let lengths = g.input("lengths", DType::I32, [Dim::BATCH], Pad::Value(1)).unwrap();
        let table = g.input("page_table", DType::I32, [Dim::BATCH, fixed(PER_ROW as u64)], Pad::Reserved(0)).unwrap();
        let x = g.input("x", DType::BF16, [Dim::BATCH, fixed(8 * 128 + 64)], Pad::Value(0)).unwrap();
        let norm = g.weight("norm", DType::BF16, [fixed(8 * 128 + 64)]).unwrap();
        let cache = [fixed(PAGES), fixed(16), fixed(2), fixed(128)];
        let [k, v] = ["k", "v"].map(|name| g.state(name, DType::BF16, cache).unwrap());
        let x = g.rmsnorm(&x, &norm, 1e-6).unwrap();
        // Queries that are columns of something larger.
        let heads = Columns::new(64..64 + 8 * 128).heads(8);
        let out = g.decode_attention(x.columns(heads), (&k, &v), &table, &lengths, 0.088).unwrap();
        g.output("out", out).unwrap();
        g.finish().unwrap()
    }

    pub fn steps(machine: &Machine, spec: AttentionSpec) {
        let kernel = match spec.backend((9, 0)) {
            Backend::CudaCores => AttentionKernel::BatchDecode,
            Backend::Fa2 => AttentionKernel::Fa2,
            Backend::Fa3 => AttentionKernel::Fa3,
        };
        let buckets = Buckets::new(&[BUCKET as u64]).unwrap();
        let kernels = AttentionKernels::new(kernel);
        let mut run =
            DeviceRun::with_attention(&graph(), &buckets, &machine.stream, &mut Selections::new(), kernels).unwrap();
        run.weight("norm", &[bf16::ONE; 8 * 128 + 64]).unwrap();
        let mut random = random(5);
        for step in 0..60i64 {
            let rows = 1 + random(BUCKET as i64) as usize;
            run.set_rows(rows as u64).unwrap();
            // Each row one of four sequences, whose pages lie one after the other; some follow one another in a sequence.
            let mut sequences: Vec<(i64, i64)> =
                (0..rows).map(|_| (random(4), 1 + random(16 * PER_ROW as i64))).collect();
            for row in 1..rows {
                if random(3) > 0 && sequences[row - 1].1 < 16 * PER_ROW as i64 {
                    sequences[row] = (sequences[row - 1].0, sequences[row - 1].1 + 1);
                }
            }
            let lengths: Vec<i32> = sequences.iter().map(|row| row.1 as i32).collect();
            let pages =
                |sequence: i64| (0..PER_ROW as i64).map(move |page| (1 + sequence * PER_ROW as i64 + page) as i32);
            let table: Vec<i32> = sequences.iter().flat_map(|row| pages(row.0)).collect();
            run.input("x", &vec![bf16::ONE; rows * (8 * 128 + 64)]).unwrap();
            run.input("lengths", &lengths).unwrap();
            run.input("page_table", &table).unwrap();
            let (launches, copies) = (machine.get("launches"), machine.get("copies"));
            run.step().unwrap();
            assert_eq!(machine.get("copies"), copies + 1, "one plan");
            // What it is planned as, by the planners' rules.
            let (mut queries, mut keys) = (Vec::new(), Vec::<i64>::new());
            for (row, &(sequence, length)) in sequences.iter().enumerate() {
                let follows = row > 0 && sequences[row - 1] == (sequence, length - 1);
                match kernel {
                    AttentionKernel::BatchDecode => queries.push(1),
                    _ if follows => *queries.last_mut().unwrap() += 1,
                    _ => queries.push(1),
                }
                match queries.len() > keys.len() {
                    true => keys.push(length),
                    false => *keys.last_mut().unwrap() = length,
                }
            }
            let missing = (BUCKET - rows) as i64;
            if kernel == AttentionKernel::BatchDecode {
                queries.extend(vec![1; missing as usize]);
                keys.extend(vec![1; missing as usize]);
            } else if missing > 0 {
                queries.push(missing);
                keys.push(missing);
            }
            let filled = Lengths { queries, pages: keys.iter().map(|keys| (keys + 15) / 16).collect() };
            let expected = match kernel {
                AttentionKernel::BatchDecode => planner::decode(&filled.pages, &HEADS, 16, 132, true),
                AttentionKernel::Fa2 => planner::fa2(&filled, &HEADS, 16, 132, None),
                _ => planner::fa3(&filled.queries, &HEADS, 132, None),
            };
            let copied = machine.copied();
            assert_eq!(copied.len() as i64, expected.int, "step {step}");
            for (at, list) in &expected.lists {
                let words = copied[*at as usize..].chunks_exact(4).take(list.len());
                let found: Vec<i32> = words.map(|word| i32::from_ne_bytes(word.try_into().unwrap())).collect();
                assert_eq!(&found, list, "step {step}, the list at {at}");
            }
            // The norm, attention, and what merges its parts where contexts are divided.
            let kernels = i64::from(kernel != AttentionKernel::Fa3) * expected.integers.last().unwrap();
            assert_eq!(i64::from(machine.get("launches") - launches), 2 + kernels, "step {step}");
            assert_eq!(i64::from(run.kernels(BUCKET as u64).unwrap()), 2 + kernels, "step {step}");
        }
        if kernel == AttentionKernel::BatchDecode {
            // A GPU that holds other numbers of blocks: what was captured would not do.
            machine.set("occupancy", 2);
            let launches = machine.get("launches");
            run.set_rows(1).unwrap();
            run.input("lengths", &[3]).unwrap();
            let error = run.step().unwrap_err().to_string();
            assert!(
                error.contains("captured for a batch of 16") && error.contains("[66, ") && error.contains("[132, "),
                "{error}"
            );
            assert_eq!(machine.get("launches"), launches);
            machine.set("occupancy", 1);
            run.step().unwrap();
        }
        drop(run);
        assert_eq!(machine.get("pinned"), 0);
    }
}
