//! Compute graphs on a GPU: a small decoder node by node, captured and captured with programmatic dependent launch, in every
//! bucket, against the run on the host. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --release --features
//! compute,cudarc,decoder,attention-xqa --test compute_gpu` runs it, within 60 seconds.

#[path = "support/gpu.rs"]
mod gpu;
#[path = "compute/model.rs"]
mod model;

use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use flashinfer_rs::attention::{AttentionSpec, XqaDecode};
use flashinfer_rs::compute::{
    Buckets, DeviceRun, Dim, Graph, GraphBuilder, GraphError, HostRun, Pad, PageAllocator, Plan, Rule, Target, fuse,
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
];

fn main() -> ExitCode {
    let asked = std::env::var_os(gpu::RUN).is_some_and(|value| value == "1");
    gpu::main_where(&[(TESTS, asked && has_kernels())])
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
    let mut selections = SELECTIONS.lock().unwrap_or_else(PoisonError::into_inner);
    let selections = selections.get_or_insert_with(Selections::new);
    let buckets = Buckets::new(buckets).unwrap();
    DeviceRun::with_selections(graph, &buckets, &gpu.stream, selections).expect("a run")
}

fn unfused() -> Graph {
    SMALL.graph(LARGEST).unwrap()
}

fn fused() -> Graph {
    let (graph, applied) = fuse(&unfused(), &Rule::ALL).unwrap();
    assert!(applied.iter().any(|applied| applied.rule == Rule::QkNormRopeAppend));
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
    for (name, graph) in [("unfused", unfused()), ("fused", fused())] {
        let mut run = decoder(gpu, &graph, &[1, 2, 4, 8]);
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
    let mut run = decoder(gpu, graph, &[bucket]);
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
    for step in 0..6 {
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
        assert_eq!(run.read("positions").unwrap(), vec![f64::from(step + 1); rows]);
        assert_eq!(run.read("lengths").unwrap(), vec![f64::from(step + 2); rows]);
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
        Rule::ALL.to_vec(),
    ];
    for rules in sets {
        let (graph, _) = fuse(&graph, &rules).unwrap();
        let error = against_the_host(gpu, &graph, 2, 2);
        println!("{rules:?}: relative error {error:.2e}");
        assert!(error < 2e-2, "{rules:?}: {error}");
    }
}

fn padded(gpu: &Gpu) {
    for graph in [unfused(), fused()] {
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
