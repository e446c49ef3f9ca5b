//! Compute graphs on a GPU: a small decoder node by node, captured and captured with programmatic dependent launch, in every
//! bucket, against the run on the host. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --release --features
//! compute,cudarc,decoder,attention,attention-xqa --test compute_gpu` runs it, within 60 seconds; without `attention` what is planned is
//! left out.

#[path = "support/gpu.rs"]
mod gpu;
#[path = "compute/model.rs"]
mod model;

use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use flashinfer_rs::attention::{AttentionSpec, Backend, XqaDecode};
use flashinfer_rs::compute::{
    AttentionKernel, AttentionKernels, Buckets, DeviceRun, Dim, Graph, GraphBuilder, GraphError, HostRun, Pad,
    PageAllocator, Plan, Rule, Target, fuse,
};
use flashinfer_rs::matmul::Selections;
use flashinfer_rs::{DType, Device, FlashInferError, FlashInferRuntime, RuntimeConfig};
use gpu::{Gpu, Test};
use half::bf16;
use model::{Config, Random};

/// Two layers of a decoder, of sizes that there is an XQA kernel for.
const SMALL: Config = Config {
    layers: 2,
    hidden: 256,
    q_heads: 4,
    kv_heads: 2,
    head: 128,
    inner: 512,
    vocab: 1000,
    qk_norm: true,
    page_size: 16,
    pages: 1 + 8 * 4,
    per_row: 4,
    dtype: DType::BF16,
    target: Target::Gpu,
};
const LARGEST: u64 = 8;
const SEED: u64 = 11;
/// Past the end of the first page.
const STEPS: usize = 20;

const TESTS: &[Test] = &[
    ("one_step_is_the_same_however_it_is_launched_in_every_bucket", one_step_however_launched),
    ("a_decoder_computes_what_the_host_does", as_the_host),
    ("each_fused_decoder_computes_what_the_host_does", fused_as_the_host),
    ("rows_that_nobody_asked_for_change_no_bit_of_the_others_nor_of_their_pages", padded),
    ("many_steps_are_as_many_single_ones", many_steps),
    ("steps_are_queued_without_waiting", queued),
    ("pages_in_another_order_answer_the_same_bits", other_pages),
    ("what_is_no_number_is_found_at_the_node_that_wrote_it", not_finite),
    ("what_does_not_fit_is_refused_and_the_run_goes_on", refused_and_goes_on),
    ("other_operations_compute_what_the_host_does", other_operations),
    ("every_node_has_a_time", profiled),
    ("a_row_has_the_same_bits_in_every_bucket", every_bucket),
    ("of_more_rows_than_own_kernels_take_norm_product_and_gate_are_several", many_rows),
    ("pages_that_a_row_appends_to_and_another_reads_are_refused", shared_pages),
];

/// Of attention that the host plans ahead of each step.
const PLANNED: &[Test] = &[
    ("one_step_by_batch_decode_is_the_same_however_it_is_launched", batch_decode_however_launched),
    ("batch_decode_computes_what_the_host_does_over_64_steps", batch_decode_as_the_host),
    ("contexts_that_batch_decode_divides_are_what_xqa_and_the_host_compute", divided),
    ("many_steps_by_batch_decode_are_as_many_single_ones", many_planned_steps),
    ("steps_that_were_not_planned_are_refused_and_the_run_goes_on", not_planned),
    ("a_prompt_by_the_prefill_kernels_is_what_its_rows_are_by_xqa", prompts),
];

fn main() -> ExitCode {
    let asked = std::env::var_os(gpu::RUN).is_some_and(|value| value == "1");
    let kernels = asked && has_kernels();
    gpu::main_where(&[(TESTS, kernels), (PLANNED, kernels && has_planned())])
}

/// Whether the libraries of attention that is planned were vendored.
fn has_planned() -> bool {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).expect("the runtime");
    let (heads, size) = ((SMALL.q_heads as i64, SMALL.kv_heads as i64), SMALL.head as i64);
    let there = [Backend::CudaCores, Backend::Fa2, Backend::Fa3].map(|backend| {
        let facts = match backend {
            Backend::CudaCores => AttentionSpec::decode(SMALL.dtype, heads, size, 16),
            _ => AttentionSpec::paged(SMALL.dtype, heads, size, 16),
        };
        let module = facts.build().expect("a specification").module(backend);
        !matches!(runtime.module(&format!("{module}.so")), Err(FlashInferError::ArtifactMissing { .. }))
    });
    there == [true; 3]
}

/// Whether the libraries that the decoder is made of were vendored.
fn has_kernels() -> bool {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).expect("the runtime");
    let heads = (SMALL.q_heads as i64, SMALL.kv_heads as i64);
    let spec = AttentionSpec::decode(SMALL.dtype, heads, SMALL.head as i64, SMALL.page_size as i64);
    let module = XqaDecode::module_of(&spec.build().expect("a specification")).expect("one that XQA has");
    let xqa = runtime.module_on(&format!("{module}.so"), Device::Cuda(0)).map(drop);
    let others = ["norm.so", "rope.so", "page.so", "silu_and_mul.so", "gelu_tanh_and_mul.so"];
    let mut all = others.iter().map(|library| runtime.module(library).map(drop)).chain([xqa]);
    !all.any(|loaded| matches!(loaded, Err(FlashInferError::ArtifactMissing { .. })))
}

/// The same algorithms of products for all runs, so that their bits can be compared.
static SELECTIONS: Mutex<Option<Selections>> = Mutex::new(None);

fn new_run(gpu: &Gpu, graph: &Graph, buckets: &[u64]) -> DeviceRun {
    new_run_by(gpu, graph, buckets, AttentionKernels::default())
}

fn new_run_by(gpu: &Gpu, graph: &Graph, buckets: &[u64], kernels: AttentionKernels) -> DeviceRun {
    let mut selections = SELECTIONS.lock().unwrap_or_else(PoisonError::into_inner);
    let selections = selections.get_or_insert_with(Selections::new);
    let buckets = Buckets::new(buckets).unwrap();
    DeviceRun::with_attention(graph, &buckets, &gpu.stream, selections, kernels).expect("a run")
}

fn unfused() -> Graph {
    SMALL.graph(LARGEST).unwrap()
}

fn fused() -> Graph {
    let (graph, applied) = fuse(&unfused(), &Rule::ALL).unwrap();
    assert!(applied.iter().any(|applied| applied.rule == Rule::QkNormRopeAppend));
    graph
}

/// For rows that are sequences of their own: attention appends, too.
fn of_steps() -> Graph {
    let (graph, applied) = fuse(&unfused(), &Rule::STEP).unwrap();
    assert_eq!(applied.iter().filter(|applied| applied.rule == Rule::AppendAttention).count(), SMALL.layers as usize);
    graph
}

fn halves(values: &[f64]) -> Vec<bf16> {
    values.iter().map(|value| bf16::from_f64(*value)).collect()
}

fn give(run: &mut DeviceRun) {
    for (name, values) in SMALL.weights(SEED) {
        run.weight(&name, &halves(&values)).unwrap();
    }
    let angles: Vec<f32> = SMALL.cos_sin().iter().map(|value| *value as f32).collect();
    run.weight("cos_sin", &angles).unwrap();
}

/// A run with the decoder's weights.
fn decoder(gpu: &Gpu, graph: &Graph, buckets: &[u64]) -> DeviceRun {
    let mut run = new_run(gpu, graph, buckets);
    give(&mut run);
    run
}

fn pages(rows: usize) -> PageAllocator {
    let mut pages = PageAllocator::new(SMALL.pages as u32, SMALL.page_size, LARGEST as usize, SMALL.per_row);
    (0..rows).for_each(|row| pages.grow(row, SMALL.page_size * SMALL.per_row).unwrap());
    pages
}

fn first_ids(rows: usize) -> Vec<i32> {
    (0..rows as i32).map(|row| 17 + 31 * row).collect()
}

/// The first step's inputs, with an empty cache.
fn begin(run: &mut DeviceRun, ids: &[i32], table: &[i32]) {
    run.set_rows(ids.len() as u64).unwrap();
    run.input("ids", ids).unwrap();
    run.input("positions", &vec![0i32; ids.len()]).unwrap();
    run.input("lengths", &vec![1i32; ids.len()]).unwrap();
    run.input("page_table", table).unwrap();
}

fn begin_with(run: &mut DeviceRun, rows: usize) {
    begin(run, &first_ids(rows), &pages(rows).table(rows));
}

fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The relative error (L2).
fn distance(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

fn refused<T>(result: flashinfer_rs::Result<T>) -> GraphError {
    match result {
        Err(FlashInferError::ComputeGraph(error)) => *error,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("it was taken"),
    }
}

/// The logits and the token of each step, and what the first layer's caches hold behind the last.
#[derive(PartialEq)]
struct Outcome {
    logits: Vec<Vec<u64>>,
    tokens: Vec<i32>,
    caches: [Vec<u64>; 2],
}

/// Steps from an empty cache, by this way of launching one.
fn outcome(run: &mut DeviceRun, rows: usize, mut step: impl FnMut(&mut DeviceRun)) -> Outcome {
    for name in ["layer0.k_cache", "layer0.v_cache", "layer1.k_cache", "layer1.v_cache"] {
        let elements = SMALL.pages * SMALL.page_size * SMALL.kv_heads * SMALL.head;
        run.state(name, &vec![bf16::ZERO; elements as usize]).unwrap();
    }
    while run.next_result::<i32>().unwrap().is_some() {}
    begin_with(run, rows);
    let logits = (0..STEPS).map(|_| {
        step(run);
        bits(&run.read("logits").unwrap())
    });
    let logits = logits.collect();
    let mut tokens = Vec::new();
    while let Some(result) = run.next_result::<i32>().unwrap() {
        assert_eq!(result.values.len(), rows);
        tokens.extend_from_slice(result.values);
    }
    assert_eq!(tokens.len(), rows * STEPS);
    let caches = ["layer0.k_cache", "layer0.v_cache"].map(|name| bits(&run.read(name).unwrap()));
    Outcome { logits, tokens, caches }
}

fn one_step_however_launched(gpu: &Gpu) {
    however_launched(gpu, AttentionKernel::Xqa);
}

fn batch_decode_however_launched(gpu: &Gpu) {
    however_launched(gpu, AttentionKernel::BatchDecode);
}

fn however_launched(gpu: &Gpu, kernel: AttentionKernel) {
    // Its attention is none that is planned.
    let of_steps = (kernel == AttentionKernel::Xqa).then(|| ("of steps", of_steps()));
    for (name, graph) in [("unfused", unfused()), ("fused", fused())].into_iter().chain(of_steps) {
        let mut run = new_run_by(gpu, &graph, &[1, 2, 4, 8], AttentionKernels::new(kernel));
        give(&mut run);
        for rows in [1, 2, 3, 8] {
            let bucket = run.set_rows(rows as u64).unwrap();
            let case = format!("{name}, {rows} rows at {bucket}");
            let eager = outcome(&mut run, rows, |run| run.step().unwrap());
            let numbers = eager.logits.iter().flatten().map(|bits| f64::from_bits(*bits));
            assert!(numbers.clone().all(f64::is_finite) && numbers.clone().any(|x| x != 0.0), "{case}");
            let mut programmatic = Vec::new();
            for pdl in [false, true] {
                run.set_pdl(pdl);
                run.capture().unwrap();
                let captured = run.captured(bucket).unwrap();
                programmatic.push(captured.programmatic);
                // A library's own choice aside: it may divide a product.
                let planned = run.kernels(bucket).unwrap() as usize;
                assert!((planned..2 * planned).contains(&captured.kernels), "{case}: {captured:?}, planned {planned}");
                let launched = outcome(&mut run, rows, |run| run.run(1).unwrap());
                assert!(launched == eager, "{case}, captured {}", if pdl { "with PDL" } else { "without PDL" });
            }
            assert!(programmatic[1] > programmatic[0], "{case}: {programmatic:?} edges are programmatic");
            println!("{case}: {:?}", run.captured(bucket).unwrap());
        }
    }
}

/// Runs a graph on a GPU and on the host, with the GPU's tokens, and answers the largest relative error of the logits.
fn against_the_host(gpu: &Gpu, graph: &Graph, rows: usize, bucket: u64) -> f64 {
    steps_against_the_host(decoder(gpu, graph, &[bucket]), graph, rows, 6)
}

fn steps_against_the_host(mut run: DeviceRun, graph: &Graph, rows: usize, steps: usize) -> f64 {
    run.capture().unwrap();
    begin_with(&mut run, rows);
    let plan = Plan::new(graph, rows as u64).unwrap();
    let mut host = HostRun::new(graph, &plan).unwrap();
    SMALL.give(&mut host, SEED).unwrap();
    let wide = |values: &[i32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<_>>();
    host.input("page_table", &wide(&pages(rows).table(rows))).unwrap();
    host.input("positions", &vec![0.0; rows]).unwrap();
    host.input("lengths", &vec![1.0; rows]).unwrap();
    let mut ids = wide(&first_ids(rows));
    let mut worst = 0f64;
    for step in 0..steps {
        host.input("ids", &ids).unwrap();
        host.run().unwrap();
        if step % 2 == 0 {
            run.step().unwrap()
        } else {
            run.run(1).unwrap()
        }
        let (found, expected) = (run.read("logits").unwrap(), host.read("logits").unwrap());
        let vocab = SMALL.vocab as usize;
        for (found, expected) in found.chunks_exact(vocab).zip(expected.chunks_exact(vocab)) {
            worst = worst.max(distance(found, expected));
        }
        // The token is the first of the largest logits, and the next step's id.
        let token = run.next_result::<i32>().unwrap().unwrap();
        for (token, row) in token.values.iter().zip(found.chunks_exact(vocab)) {
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(*token as usize, row.iter().position(|x| *x == largest).unwrap());
        }
        ids = wide(token.values);
        assert_eq!(run.read("ids").unwrap(), ids);
        // At the last place that there is they stay.
        let (room, behind) = ((SMALL.page_size * SMALL.per_row) as usize, step + 1);
        assert_eq!(run.read("positions").unwrap(), vec![behind.min(room - 1) as f64; rows]);
        assert_eq!(run.read("lengths").unwrap(), vec![(behind + 1).min(room) as f64; rows]);
    }
    worst
}

fn as_the_host(gpu: &Gpu) {
    for (rows, bucket) in [(1, 1), (3, 4)] {
        let error = against_the_host(gpu, &unfused(), rows, bucket);
        println!("{rows} rows at {bucket}: relative error {error:.2e}");
        assert!(error < 2e-2, "{rows} rows at {bucket}: {error}");
    }
}

fn fused_as_the_host(gpu: &Gpu) {
    let graph = unfused();
    let sets: Vec<Vec<Rule>> = vec![
        vec![Rule::PackProducts],
        vec![Rule::PackProducts, Rule::GatedActivation],
        vec![Rule::AddNorm],
        vec![Rule::PackProducts, Rule::QkNormRopeAppend],
        vec![Rule::ResidualProduct],
        vec![Rule::PackProducts, Rule::GatedActivation, Rule::GatedProduct],
        vec![Rule::PackProducts, Rule::NormProduct],
        vec![Rule::PackProducts, Rule::QkNormRopeAppend, Rule::AppendAttention],
        Rule::ALL.to_vec(),
        Rule::STEP.to_vec(),
    ];
    for rules in sets {
        let (graph, _) = fuse(&graph, &rules).unwrap();
        let error = against_the_host(gpu, &graph, 2, 2);
        println!("{rules:?}: relative error {error:.2e}");
        assert!(error < 2e-2, "{rules:?}: {error}");
    }
}

/// Every sum is made in one order by this crate's own kernels, whatever the bucket; XQA's is another for other batches.
fn every_bucket(gpu: &Gpu) {
    let graph = of_steps();
    let mut run = decoder(gpu, &graph, &[1, 2, 4, 8]);
    run.set_pdl(true);
    let vocab = SMALL.vocab as usize;
    let mut alone: Option<Vec<Vec<u64>>> = None;
    for rows in [1, 2, 3, 8] {
        run.set_rows(rows as u64).unwrap();
        run.capture().unwrap();
        let found = outcome(&mut run, rows, |run| run.run(1).unwrap());
        let first: Vec<Vec<u64>> = found.logits.iter().map(|logits| logits[..vocab].to_vec()).collect();
        match &alone {
            None => alone = Some(first),
            Some(alone) => assert!(*alone == first, "{rows} rows"),
        }
    }
}

fn many_rows(gpu: &Gpu) {
    const ROWS: usize = 40;
    let config = Config { pages: 1 + 64 * SMALL.per_row, ..SMALL };
    let graph = fuse(&config.graph(64).unwrap(), &Rule::ALL).unwrap().0;
    let mut run = new_run(gpu, &graph, &[64]);
    give(&mut run);
    let mut pages = PageAllocator::new(config.pages as u32, config.page_size, 64, config.per_row);
    (0..ROWS).for_each(|row| pages.grow(row, 1).unwrap());
    let (ids, table) =
        (first_ids(ROWS).iter().map(|id| id % SMALL.vocab as i32).collect::<Vec<_>>(), pages.table(ROWS));
    let plan = Plan::new(&graph, ROWS as u64).unwrap();
    let mut host = HostRun::new(&graph, &plan).unwrap();
    config.give(&mut host, SEED).unwrap();
    let wide = |values: &[i32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<_>>();
    host.input("page_table", &wide(&table)).unwrap();
    host.input("positions", &[0.0; ROWS]).unwrap();
    host.input("lengths", &[1.0; ROWS]).unwrap();
    host.input("ids", &wide(&ids)).unwrap();
    host.run().unwrap();
    begin(&mut run, &ids, &table);
    // Two norms, a gate, and a copy of XQA's queries of each layer more than nodes, and the norm ahead of the head.
    assert_eq!(run.kernels(64).unwrap() as usize, graph.nodes().len() + 4 * SMALL.layers as usize + 1);
    run.step().unwrap();
    let eager = run.read("logits").unwrap();
    let error = distance(&eager, &host.read("logits").unwrap());
    println!("{ROWS} rows: relative error {error:.2e}");
    assert!(error < 2e-2, "{error}");
    run.capture().unwrap();
    begin(&mut run, &ids, &table);
    run.run(1).unwrap();
    assert_eq!(bits(&run.read("logits").unwrap()), bits(&eager));
}

fn shared_pages(gpu: &Gpu) {
    let graph = of_steps();
    let mut run = decoder(gpu, &graph, &[4]);
    run.capture().unwrap();
    let table = pages(3).table(3);
    let width = SMALL.per_row as usize;
    let with = |row: usize, at: usize, page: i32| {
        let mut table = table.clone();
        table[row * width + at] = page;
        table
    };
    let ids = first_ids(3);
    begin(&mut run, &ids, &table);
    run.run(1).unwrap();
    let expected = bits(&run.read("logits").unwrap());
    // The second row's first page, to which the third would append.
    begin(&mut run, &ids, &with(2, 0, table[width]));
    for refusal in [refused(run.run(1)), refused(run.step())] {
        let GraphError::SharedPage { row, other, page, .. } = refusal else { panic!("{refusal}") };
        assert_eq!(([row, other], page), ([1, 2], table[width].into()));
    }
    // One that is only reached in later steps is refused then.
    begin(&mut run, &ids, &with(2, 1, table[width]));
    let page_size = SMALL.page_size;
    assert!(matches!(refused(run.run(page_size + 1)), GraphError::SharedPage { row: 1, other: 2, .. }));
    run.run(1).unwrap();
    assert_eq!(bits(&run.read("logits").unwrap()), expected);
    // A prefix of full pages may be shared.
    begin(&mut run, &ids, &with(2, 0, table[width]));
    run.input("positions", &[page_size as i32; 3]).unwrap();
    run.input("lengths", &[page_size as i32 + 1; 3]).unwrap();
    run.run(1).unwrap();
    run.read("logits").unwrap();
}

fn padded(gpu: &Gpu) {
    for graph in [unfused(), fused(), of_steps()] {
        let mut run = decoder(gpu, &graph, &[4]);
        run.capture().unwrap();
        let mut results = Vec::new();
        // Three rows and one that nobody asked for; and the same three with another sequence behind them.
        for rows in [3, 4] {
            let outcome = outcome(&mut run, rows, |run| run.run(1).unwrap());
            let row = outcome.logits[0].len() / rows;
            let logits: Vec<Vec<u64>> = outcome.logits.iter().map(|step| step[..3 * row].to_vec()).collect();
            let page = (SMALL.page_size * SMALL.kv_heads * SMALL.head) as usize;
            // The pages of the first three rows, behind the reserved one.
            let pages = page..page * (1 + 3 * SMALL.per_row as usize);
            results.push((logits, outcome.caches.map(|cache| cache[pages.clone()].to_vec())));
        }
        assert!(results[0] == results[1]);
    }
}

fn many_steps(gpu: &Gpu) {
    let mut run = decoder(gpu, &fused(), &[1, 4]);
    run.capture().unwrap();
    let mut collected = Vec::new();
    for at_once in [1, 7, 40] {
        begin_with(&mut run, 3);
        let mut left = 40;
        while left > 0 {
            let steps = at_once.min(left);
            run.run(steps).unwrap();
            left -= steps;
        }
        let (mut tokens, mut last) = (Vec::new(), None);
        while let Some(result) = run.next_result::<i32>().unwrap() {
            assert!(last.is_none_or(|last| result.step == last + 1));
            last = Some(result.step);
            tokens.extend_from_slice(result.values);
        }
        assert_eq!(tokens.len(), 3 * 40);
        assert_eq!(run.read("positions").unwrap(), [40.0; 3]);
        collected.push((tokens, bits(&run.read("logits").unwrap())));
    }
    assert!(collected[0] == collected[1] && collected[1] == collected[2]);
}

fn queued(gpu: &Gpu) {
    let mut run = decoder(gpu, &fused(), &[1, 4]);
    run.capture().unwrap();
    begin_with(&mut run, 4);
    run.run(2).unwrap();
    run.synchronize().unwrap();
    // Behind a stream that is busy, nothing that a step does waits.
    gpu.assert_asynchronous(&gpu.stream, || {
        run.input("page_table", &pages(4).table(4)).unwrap();
        run.run(8).unwrap();
        assert!(!run.has_result().unwrap() || run.next_result::<i32>().unwrap().is_some());
    });
    let busy = gpu.occupy(&gpu.stream);
    let begun = Instant::now();
    run.run(30).unwrap();
    let each = begun.elapsed() / 30;
    println!("{each:?} of the host for each step of {:?}", run.captured(4).unwrap());
    run.synchronize().unwrap();
    drop(busy);
}

fn other_pages(gpu: &Gpu) {
    let mut run = decoder(gpu, &fused(), &[2]);
    run.capture().unwrap();
    let table = pages(2).table(2);
    let turned: Vec<i32> = table.iter().map(|page| SMALL.pages as i32 - page).collect();
    let mut results = Vec::new();
    for table in [&table, &turned] {
        begin(&mut run, &first_ids(2), table);
        run.run(STEPS as u64).unwrap();
        results.push(bits(&run.read("logits").unwrap()));
        // What one left in its pages is nothing to the other.
        run.step().unwrap();
        results.push(bits(&run.read("logits").unwrap()));
    }
    assert!(results[0] == results[2] && results[1] == results[3] && results[0] != results[1]);
}

fn not_finite(gpu: &Gpu) {
    let graph = unfused();
    let mut run = decoder(gpu, &graph, &[2]);
    run.check_finite(true);
    begin_with(&mut run, 2);
    run.step().unwrap();
    let mut norm = vec![bf16::ONE; SMALL.hidden as usize];
    norm[5] = bf16::NAN;
    run.weight("layer1.mlp_norm", &norm).unwrap();
    match refused(run.step()) {
        GraphError::NotFinite { node, first, value, .. } => {
            assert!(node.ends_with("layer 1, rmsnorm"), "{node}");
            assert!(first == 5 && value.is_nan(), "{first}: {value}");
        }
        other => panic!("{other}"),
    }
    // The step ended there; the next one is whole.
    run.weight("layer1.mlp_norm", &vec![bf16::ONE; SMALL.hidden as usize]).unwrap();
    begin_with(&mut run, 2);
    run.step().unwrap();
    assert!(run.read("logits").unwrap().iter().all(|x| x.is_finite()));
}

fn refused_and_goes_on(gpu: &Gpu) {
    let mut run = new_run(gpu, &fused(), &[1, 2]);
    assert!(matches!(refused(run.step()), GraphError::Missing { kind: "weight", .. }));
    give(&mut run);
    assert!(matches!(refused(run.step()), GraphError::Missing { kind: "step input", .. }));
    assert!(matches!(refused(run.weight("norm", &[bf16::ONE; 3])), GraphError::Mismatch { .. }));
    assert!(matches!(refused(run.weight("norm", &[1f32; 256])), GraphError::Mismatch { .. }));
    assert!(matches!(refused(run.set_rows(3)), GraphError::BucketTooSmall { rows: 3, largest: 2 }));
    run.capture().unwrap();
    begin_with(&mut run, 2);
    let room = SMALL.page_size * SMALL.per_row;
    match refused(run.run(room + 1)) {
        GraphError::ContextTooLong { row: 0, length, capacity } => assert_eq!((length, capacity), (room + 1, room)),
        other => panic!("{other}"),
    }
    assert!(matches!(refused(run.input("ids", &[0, SMALL.vocab as i32])), GraphError::Mismatch { .. }));
    let mut table = pages(2).table(2);
    table[7] = SMALL.pages as i32;
    assert!(matches!(refused(run.input("page_table", &table)), GraphError::Mismatch { .. }));
    // To the last place that there is, and no further.
    run.run(room).unwrap();
    assert!(run.read("logits").unwrap().iter().all(|x| x.is_finite()));
    assert!(matches!(refused(run.run(1)), GraphError::ContextTooLong { .. }));
    assert!(matches!(refused(run.step()), GraphError::ContextTooLong { .. }));
    begin_with(&mut run, 1);
    run.run(1).unwrap();
    run.synchronize().unwrap();
}

fn other_operations(gpu: &Gpu) {
    const COLUMNS: u64 = 64;
    let fixed = Dim::fixed;
    let mut g = GraphBuilder::new("others", 3);
    let x = g.input("x", DType::BF16, [Dim::BATCH, fixed(COLUMNS)], Pad::Value(0)).unwrap();
    let number = g.input("number", DType::F32, [Dim::BATCH], Pad::Value(0)).unwrap();
    let w = g.weight("w", DType::BF16, [fixed(2 * COLUMNS), fixed(COLUMNS)]).unwrap();
    let bias = g.weight("bias", DType::BF16, [fixed(2 * COLUMNS)]).unwrap();
    let norm = g.weight("norm", DType::BF16, [fixed(COLUMNS)]).unwrap();
    let biased = g.matmul_bias(&x, &w, &bias).unwrap();
    let gelu = g.gelu_tanh_and_mul(&biased).unwrap();
    let gemma = g.gemma_rmsnorm(&gelu, &norm, 1e-6).unwrap();
    let gate = g.copy(&x, DType::BF16).unwrap();
    let gated = g.sigmoid_gate(gate, &gelu).unwrap();
    let silu = g.silu(gated).unwrap();
    let product = g.mul(silu, &gemma).unwrap();
    let sum = g.add(product, &gemma).unwrap();
    let logits = g.copy(&sum, DType::F32).unwrap();
    let probs = g.softmax(logits, 0.7).unwrap();
    let drawn = g.sample(&probs, &number, 8, 0.9).unwrap();
    for (name, value) in [("biased", biased), ("gemma", gemma), ("sum", sum), ("probs", probs), ("drawn", drawn)] {
        g.output(name, value).unwrap();
    }
    let graph = g.finish().unwrap();
    let mut random = Random(5);
    let x = random.numbers((3 * COLUMNS) as usize, 0.0, 1.0);
    let weights = [
        ("w", random.numbers((2 * COLUMNS * COLUMNS) as usize, 0.0, 0.25)),
        ("bias", random.numbers((2 * COLUMNS) as usize, 0.0, 0.5)),
        ("norm", random.numbers(COLUMNS as usize, 0.0, 0.2)),
    ];
    let plan = Plan::new(&graph, 3).unwrap();
    let mut host = HostRun::new(&graph, &plan).unwrap();
    let mut run = new_run(gpu, &graph, &[3]);
    for (name, values) in &weights {
        host.weight(name, values).unwrap();
        run.weight(name, &halves(values)).unwrap();
    }
    run.set_rows(3).unwrap();
    host.input("x", &x).unwrap();
    run.input("x", &halves(&x)).unwrap();
    host.input("number", &[0.0, 0.5, 0.999]).unwrap();
    run.input("number", &[0.0f32, 0.5, 0.999]).unwrap();
    host.run().unwrap();
    run.check_finite(true);
    run.step().unwrap();
    let eager: Vec<_> = ["biased", "gemma", "sum", "probs", "drawn"].map(|name| bits(&run.read(name).unwrap())).into();
    for (name, tolerance) in [("biased", 1e-2), ("gemma", 2e-2), ("sum", 2e-2), ("probs", 3e-2)] {
        let error = distance(&run.read(name).unwrap(), &host.read(name).unwrap());
        assert!(error < tolerance, "{name}: {error}");
    }
    let likely = |probs: &[f64], token: f64| probs[token as usize] > 0.0 && (0.0..COLUMNS as f64).contains(&token);
    let (probs, drawn) = (run.read("probs").unwrap(), run.read("drawn").unwrap());
    assert!(probs.chunks_exact(COLUMNS as usize).zip(&drawn).all(|(probs, token)| likely(probs, *token)));
    run.capture().unwrap();
    run.run(1).unwrap();
    let captured: Vec<_> =
        ["biased", "gemma", "sum", "probs", "drawn"].map(|name| bits(&run.read(name).unwrap())).into();
    assert!(eager == captured);
}

fn profiled(gpu: &Gpu) {
    let graph = fused();
    let mut run = decoder(gpu, &graph, &[1]);
    begin_with(&mut run, 1);
    run.step().unwrap();
    let times = run.profile().unwrap();
    assert_eq!(times.iter().map(|time| time.node).collect::<Vec<_>>(), (0..graph.nodes().len()).collect::<Vec<_>>());
    assert!(times.iter().all(|time| (0.0..1e5).contains(&time.microseconds)), "{times:?}");
    let total: f32 = times.iter().map(|time| time.microseconds).sum();
    assert!(total > 0.0);
    println!("{total:.0} µs for {} nodes, each launched by itself", times.len());
}

fn batch_decode_as_the_host(gpu: &Gpu) {
    // From the first token to the last that there is room for, over the ends of three pages.
    for (graph, rows, bucket) in [(unfused(), 3, 4), (fused(), 1, 1)] {
        let mut run = new_run_by(gpu, &graph, &[bucket], AttentionKernels::new(AttentionKernel::BatchDecode));
        give(&mut run);
        let error = steps_against_the_host(run, &graph, rows, 64);
        println!("{rows} rows at {bucket}, 64 steps: relative error {error:.2e}");
        assert!(error < 2e-2, "{rows} rows at {bucket}: {error}");
    }
}

/// Longer contexts, of up to 640 tokens.
const LONG: Config = Config { per_row: 40, pages: 1 + 4 * 40, ..SMALL };

fn long_table(rows: usize) -> Vec<i32> {
    let mut pages = PageAllocator::new(LONG.pages as u32, LONG.page_size, rows, LONG.per_row);
    (0..rows).for_each(|row| pages.grow(row, LONG.page_size * LONG.per_row).unwrap());
    pages.table(rows)
}

fn long_caches() -> Vec<(String, Vec<f64>)> {
    let mut random = Random(23);
    let elements = (LONG.pages * LONG.page_size * LONG.kv_heads * LONG.head) as usize;
    let names = (0..LONG.layers).flat_map(|layer| ["k_cache", "v_cache"].map(|name| format!("layer{layer}.{name}")));
    names.map(|name| (name, random.numbers(elements, 0.0, 1.0))).collect()
}

/// A run over caches that hold what a prefill might have left.
fn long_run(gpu: &Gpu, graph: &Graph, buckets: &[u64], kernels: AttentionKernels) -> DeviceRun {
    let mut run = new_run_by(gpu, graph, buckets, kernels);
    for (name, values) in LONG.weights(SEED) {
        run.weight(&name, &halves(&values)).unwrap();
    }
    let angles: Vec<f32> = LONG.cos_sin().iter().map(|value| *value as f32).collect();
    run.weight("cos_sin", &angles).unwrap();
    for (name, values) in long_caches() {
        run.state(&name, &halves(&values)).unwrap();
    }
    run
}

fn divided(gpu: &Gpu) {
    let graph = LONG.graph(4).unwrap();
    let (rows, lengths) = (3, [600, 129, 37]);
    let table = long_table(rows);
    let positions = lengths.map(|length| length - 1);
    let ids = first_ids(rows);
    let plan = Plan::new(&graph, rows as u64).unwrap();
    let mut host = HostRun::new(&graph, &plan).unwrap();
    LONG.give(&mut host, SEED).unwrap();
    for (name, values) in long_caches() {
        let rounded: Vec<f64> = values.iter().map(|value| bf16::from_f64(*value).to_f64()).collect();
        host.state(&name, &rounded).unwrap();
    }
    let wide = |values: &[i32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<_>>();
    for (name, values) in [("ids", &ids[..]), ("positions", &positions), ("lengths", &lengths), ("page_table", &table)]
    {
        host.input(name, &wide(values)).unwrap();
    }
    host.run().unwrap();
    let expected = host.read("logits").unwrap();
    let mut found = Vec::new();
    for kernel in [AttentionKernel::Xqa, AttentionKernel::BatchDecode] {
        let mut run = long_run(gpu, &graph, &[4], AttentionKernels::new(kernel));
        run.capture().unwrap();
        run.set_rows(rows as u64).unwrap();
        run.input("ids", &ids).unwrap();
        run.input("positions", &positions).unwrap();
        run.input("lengths", &lengths).unwrap();
        run.input("page_table", &table).unwrap();
        run.run(1).unwrap();
        let logits = run.read("logits").unwrap();
        let error = distance(&logits, &expected);
        println!("{kernel:?}: relative error {error:.2e}");
        assert!(error < 2e-2, "{kernel:?}: {error}");
        found.push(logits);
        // Many steps behind it, with other divisions.
        run.run(39).unwrap();
        assert!(run.read("logits").unwrap().iter().all(|x| x.is_finite()));
        assert_eq!(run.read("lengths").unwrap(), lengths.map(|length| f64::from(length + 40)));
    }
    let apart = distance(&found[1], &found[0]);
    assert!(apart < 2e-2, "{apart}");
}

fn many_planned_steps(gpu: &Gpu) {
    let mut run = new_run_by(gpu, &fused(), &[1, 4], AttentionKernels::new(AttentionKernel::BatchDecode));
    give(&mut run);
    run.capture().unwrap();
    let mut collected = Vec::new();
    for at_once in [1, 7, 64] {
        begin_with(&mut run, 3);
        let mut left = 64;
        while left > 0 {
            let steps = at_once.min(left);
            run.run(steps).unwrap();
            left -= steps;
        }
        let mut tokens = Vec::new();
        while let Some(result) = run.next_result::<i32>().unwrap() {
            tokens.extend_from_slice(result.values);
        }
        assert_eq!(tokens.len(), 3 * 64);
        collected.push((tokens, bits(&run.read("logits").unwrap())));
    }
    assert!(collected[0] == collected[1] && collected[1] == collected[2]);
    // The host's time, with a plan for each step.
    begin_with(&mut run, 3);
    run.run(4).unwrap();
    run.synchronize().unwrap();
    let begun = Instant::now();
    run.run(40).unwrap();
    run.synchronize().unwrap();
    println!("{:?} for each step that is planned, of {:?}", begun.elapsed() / 40, run.captured(4).unwrap());
}

fn not_planned(gpu: &Gpu) {
    let kernels = AttentionKernels::new(AttentionKernel::BatchDecode);
    let mut run = new_run_by(gpu, &fused(), &[1, 2], kernels);
    give(&mut run);
    run.capture().unwrap();
    // What each step does by itself, done by hand.
    let mut by_itself = Vec::new();
    begin_with(&mut run, 2);
    for _ in 0..20 {
        run.run(1).unwrap();
        by_itself.push(bits(&run.read("logits").unwrap()));
    }
    run.replan_by_hand(true);
    begin_with(&mut run, 2);
    assert!(matches!(refused(run.run(1)), GraphError::Stale { .. }));
    for (step, expected) in by_itself.iter().enumerate() {
        run.replan().unwrap();
        assert!(matches!(refused(run.run(2)), GraphError::Stale { .. }));
        if step % 2 == 0 {
            run.run(1).unwrap()
        } else {
            run.step().unwrap()
        }
        assert!(&bits(&run.read("logits").unwrap()) == expected, "step {step}");
        match refused(run.run(1)) {
            GraphError::Stale { node, .. } => assert!(node.ends_with("decode_attention"), "{node}"),
            other => panic!("{other}"),
        }
        assert!(matches!(refused(run.step()), GraphError::Stale { .. }));
    }
    // More rows than the largest bucket, and more tokens than pages, are refused as ever, and plans stay what they were.
    assert!(matches!(refused(run.set_rows(3)), GraphError::BucketTooSmall { rows: 3, largest: 2 }));
    run.replan_by_hand(false);
    begin_with(&mut run, 2);
    let room = SMALL.page_size * SMALL.per_row;
    assert!(matches!(refused(run.run(room + 1)), GraphError::ContextTooLong { row: 0, .. }));
    run.run(20).unwrap();
    assert!(&bits(&run.read("logits").unwrap()) == by_itself.last().unwrap());
    run.run(room - 20).unwrap();
    assert!(matches!(refused(run.replan()), GraphError::ContextTooLong { .. }));
    begin_with(&mut run, 1);
    run.run(1).unwrap();
    run.synchronize().unwrap();
}

fn prompts(gpu: &Gpu) {
    const ROWS: usize = 32;
    let graph = LONG.graph(ROWS as u64).unwrap();
    let (graph, _) = fuse(&graph, &Rule::ALL).unwrap();
    // A chunk of a prompt behind 100 tokens, one from its first token on, and rows of two sequences that decode.
    let table = long_table(4);
    let of = |sequence: usize| &table[sequence * LONG.per_row as usize..(sequence + 1) * LONG.per_row as usize];
    let mut rows: Vec<(usize, i32)> = (101..=117).map(|length| (0, length)).collect();
    rows.extend((1..=10).map(|length| (1, length)));
    rows.extend([(2, 300), (3, 16)]);
    let lengths: Vec<i32> = rows.iter().map(|row| row.1).collect();
    let positions: Vec<i32> = lengths.iter().map(|length| length - 1).collect();
    let pages: Vec<i32> = rows.iter().flat_map(|row| of(row.0)).copied().collect();
    let ids: Vec<i32> = (0..rows.len() as i32).map(|row| (17 + 31 * row) % LONG.vocab as i32).collect();
    let mut outcomes: Vec<(Vec<f64>, Vec<f64>)> = Vec::new();
    let by = |kernel| AttentionKernels::new(AttentionKernel::Xqa).from_rows(ROWS as u64, kernel);
    for kernel in [AttentionKernel::Xqa, AttentionKernel::Fa2, AttentionKernel::Fa3] {
        let mut run = long_run(gpu, &graph, &[4, ROWS as u64], by(kernel));
        run.capture().unwrap();
        assert_eq!(run.captured(ROWS as u64).is_some(), kernel.is_captured());
        run.check_finite(true);
        assert_eq!(run.set_rows(rows.len() as u64).unwrap(), ROWS as u64);
        run.input("ids", &ids).unwrap();
        run.input("positions", &positions).unwrap();
        run.input("lengths", &lengths).unwrap();
        run.input("page_table", &pages).unwrap();
        run.step().unwrap();
        let prefilled = run.read("logits").unwrap();
        // Decoding goes on behind what was prefilled, by XQA in a step that was captured: four sequences, one token more each.
        run.set_rows(4).unwrap();
        run.input("ids", &[1, 2, 3, 4]).unwrap();
        run.input("positions", &[117, 10, 300, 16]).unwrap();
        run.input("lengths", &[118, 11, 301, 17]).unwrap();
        run.input("page_table", &table).unwrap();
        run.run(1).unwrap();
        outcomes.push((prefilled, run.read("logits").unwrap()));
        let (first, last) = (&outcomes[0], &outcomes[outcomes.len() - 1]);
        let row = LONG.vocab as usize;
        let apart = |a: &[f64], b: &[f64]| {
            a.chunks_exact(row).zip(b.chunks_exact(row)).map(|(a, b)| distance(a, b)).fold(0.0, f64::max)
        };
        let (prefill, decode) = (apart(&last.0, &first.0), apart(&last.1, &first.1));
        println!("{kernel:?}: {prefill:.2e} from XQA's rows, {decode:.2e} behind them");
        assert!(prefill < 2e-2 && decode < 2e-2, "{kernel:?}: {prefill}, {decode}");
        if kernel != AttentionKernel::Xqa {
            assert!(matches!(run.set_rows(ROWS as u64), Ok(bucket) if bucket == ROWS as u64));
            assert!(matches!(run.run(1), Err(FlashInferError::Graph { .. })));
        }
    }
}
