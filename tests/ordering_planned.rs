//! Attention that the host plans ahead of each step of a compute graph, over the stand-in for CUDA's driver of `ordering`: that every
//! step has a plan for its lengths, that plans and steps are ordered, and that what goes wrong leaves all as it was.

#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use flashinfer_rs::attention::Backend;
use flashinfer_rs::compute::{
    AttentionKernel, AttentionKernels, Buckets, Columns, DeviceRun, Dim, Graph, GraphBuilder, GraphError, Origin, Pad,
    PageAllocator,
};
use flashinfer_rs::matmul::Selections;
use flashinfer_rs::{DType, FlashInferError};
use half::bf16;
use ordering::{Module, planned, with_driver};

const PAGE_SIZE: u64 = 16;
const PER_ROW: u64 = 6;
const ROWS: u64 = 16;
const PAGES: u64 = 1 + 4 * PER_ROW;

const fn fixed(size: u64) -> Dim {
    Dim::fixed(size)
}

/// Ids to tokens over a paged cache, without products; `times` is how often a step makes the next one's inputs, before attention
/// or behind it.
fn decoder(times: usize, before: bool) -> Graph {
    let mut g = GraphBuilder::new("decoder", ROWS);
    let [mut ids, mut positions, mut lengths] = [("ids", 0), ("positions", 0), ("lengths", 1)]
        .map(|(name, pad)| g.input(name, DType::I32, [Dim::BATCH], Pad::Value(pad)).unwrap());
    let table = g.input("page_table", DType::I32, [Dim::BATCH, fixed(PER_ROW)], Pad::Reserved(0)).unwrap();
    let embedding = g.weight("embedding", DType::BF16, [fixed(128), fixed(512)]).unwrap();
    let cos_sin = g.weight("cos_sin", DType::F32, [fixed(PAGE_SIZE * PER_ROW), fixed(128)]).unwrap();
    let norm = g.weight("norm", DType::BF16, [fixed(256)]).unwrap();
    let cache = [fixed(PAGES), fixed(PAGE_SIZE), fixed(1), fixed(128)];
    let (q, k) = (Columns::new(0..256).heads(2), Columns::new(256..384).heads(1));
    let v = Columns::new(384..512).heads(1);
    let mut x = g.embedding(&ids, &embedding, 1.0).unwrap();
    let capacity = (PAGE_SIZE * PER_ROW) as u32;
    if before {
        let first = g.argmax(x.columns(Columns::new(0..128))).unwrap();
        g.advance(&first, &mut ids, &mut positions, &mut lengths, capacity).unwrap();
    }
    let mut attended = None;
    // Two layers, which one plan serves.
    for layer in 0..2 {
        let [mut k_cache, mut v_cache] =
            ["k_cache", "v_cache"].map(|name| g.state(&format!("{name}{layer}"), DType::BF16, cache).unwrap());
        x = g.rope_append(x, [q, k, v], &cos_sin, (&positions, &table), (&mut k_cache, &mut v_cache), false).unwrap();
        attended = Some(g.decode_attention(x.columns(q), (&k_cache, &v_cache), &table, &lengths, 0.1).unwrap());
    }
    let normed = g.rmsnorm(attended.as_ref().unwrap(), &norm, 1e-6).unwrap();
    let logits = g.silu_and_mul(&normed).unwrap();
    let token = g.argmax(&logits).unwrap();
    for _ in 0..times {
        g.advance(&token, &mut ids, &mut positions, &mut lengths, capacity).unwrap();
    }
    g.output("token", token).unwrap();
    g.finish().unwrap()
}

fn streams() -> [Arc<CudaStream>; 2] {
    let context = CudaContext::new(0).unwrap();
    [(); 2].map(|()| context.new_stream().unwrap())
}

fn made(
    graph: &Graph,
    buckets: &[u64],
    stream: &Arc<CudaStream>,
    kernels: AttentionKernels,
) -> flashinfer_rs::Result<DeviceRun> {
    let buckets = Buckets::new(buckets).unwrap();
    let mut run = DeviceRun::with_attention(graph, &buckets, stream, &mut Selections::new(), kernels)?;
    run.weight("embedding", &vec![bf16::ONE; 128 * 512])?;
    run.weight("cos_sin", &vec![0f32; (PAGE_SIZE * PER_ROW * 128) as usize])?;
    run.weight("norm", &[bf16::ONE; 256])?;
    Ok(run)
}

fn by(kernel: AttentionKernel) -> AttentionKernels {
    AttentionKernels::new(kernel)
}

/// The next step has these lengths, each row its own pages.
fn give(run: &mut DeviceRun, lengths: &[i32]) {
    let rows = lengths.len();
    let mut pages = PageAllocator::new(PAGES as u32, PAGE_SIZE, rows, PER_ROW);
    (0..rows).for_each(|row| pages.grow(row, PAGE_SIZE * PER_ROW).unwrap());
    run.set_rows(rows as u64).unwrap();
    run.input("ids", &vec![5; rows]).unwrap();
    run.input("positions", &lengths.iter().map(|length| length - 1).collect::<Vec<_>>()).unwrap();
    run.input("lengths", lengths).unwrap();
    run.input("page_table", &pages.table(rows)).unwrap();
}

fn refused<T>(result: flashinfer_rs::Result<T>) -> GraphError {
    match result {
        Err(FlashInferError::ComputeGraph(error)) => *error,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("it was taken"),
    }
}

fn pages(lengths: &[i32], more: i32) -> i32 {
    lengths.iter().map(|length| (length + more + 15) / 16).sum()
}

#[test]
fn each_step_has_a_plan_for_its_lengths_however_it_is_launched() {
    with_driver("each_step_has_a_plan_for_its_lengths_however_it_is_launched", |driver| {
        let [a, b] = streams();
        let graph = decoder(1, false);
        let mut run = made(&graph, &[1, 2, 4], &a, by(AttentionKernel::BatchDecode)).unwrap();
        assert_eq!(run.attention().of(4), AttentionKernel::BatchDecode);
        let module = Module::open(&planned(Backend::CudaCores));
        // Each bucket's first plan, which is the one that is captured.
        assert_eq!(module.get("plans"), 3);
        for pdl in [false, true] {
            run.set_pdl(pdl);
            driver.ordered("captured", || run.capture().unwrap());
            for bucket in [1, 2, 4] {
                // Each attention has a kernel that merges the parts, and no copy of its queries.
                let kernels = graph.nodes().len() + 2;
                assert_eq!(run.kernels(bucket).unwrap() as usize, kernels);
                let step = run.captured(bucket).unwrap();
                assert_eq!((step.nodes, step.kernels), (kernels, kernels));
                // All but the first: those that wait themselves, behind those that let them.
                assert_eq!(step.programmatic, if pdl { kernels - 1 } else { 0 });
            }
        }
        assert_eq!(module.get("plans"), 3, "a capture plans nothing");
        driver.ordered("steps of either kind, and the cache's views between them", || {
            for lengths in [&[12, 3, 30][..], &[31], &[15, 16, 17, 1]] {
                give(&mut run, lengths);
                let bucket = run.set_rows(lengths.len() as u64).unwrap() as i32;
                let padded = bucket - lengths.len() as i32;
                let seen = |step: i32, plans: i32| {
                    assert_eq!(module.get("plans"), plans, "one for both layers of a step");
                    assert_eq!(module.get("planned_requests"), bucket);
                    assert_eq!(module.get("planned_pages"), pages(lengths, step) + padded, "{lengths:?}, step {step}");
                };
                let before = module.get("plans");
                run.run(1).unwrap();
                seen(0, before + 1);
                run.step().unwrap();
                seen(1, before + 2);
                b.clone_dtoh(&run.view::<bf16>("k_cache1").unwrap()).unwrap();
                // Over the end of a page.
                for step in 2..8 {
                    run.run(1).unwrap();
                    seen(step, before + 1 + step);
                }
                run.run(56).unwrap();
                seen(63, before + 64);
                run.profile().unwrap();
                seen(64, before + 65);
                // The same lengths again are others: they were given anew.
                give(&mut run, lengths);
                run.replan().unwrap();
                run.step().unwrap();
                seen(0, before + 66);
                for _ in 0..66 {
                    assert_eq!(run.next_result::<i32>().unwrap().unwrap().values.len(), lengths.len());
                }
                assert!(run.next_result::<i32>().unwrap().is_none());
            }
        });
        // As far as there is room, and no further; what is refused plans nothing.
        give(&mut run, &[90, 5]);
        run.run(7).unwrap();
        let before = module.get("plans");
        match refused(run.run(1)) {
            GraphError::ContextTooLong { row: 0, length: 97, capacity: 96 } => {}
            other => panic!("{other}"),
        }
        assert!(matches!(refused(run.step()), GraphError::ContextTooLong { .. }));
        assert!(matches!(refused(run.replan()), GraphError::ContextTooLong { .. }));
        assert_eq!(module.get("plans"), before);
        driver.ordered("dropped with plans and steps on their way", || {
            give(&mut run, &[4, 5]);
            run.run(20).unwrap();
            drop(run);
        });
        drop([a, b]);
        assert_eq!(driver.live(), [0; 5], "nothing is left");
    });
}

#[test]
fn a_plan_that_would_be_launched_otherwise_is_refused_and_leaves_all_as_it_was() {
    let name = "a_plan_that_would_be_launched_otherwise_is_refused_and_leaves_all_as_it_was";
    with_driver(name, |driver| {
        let [a, _b] = streams();
        let mut run = made(&decoder(1, false), &[2, 4], &a, by(AttentionKernel::BatchDecode)).unwrap();
        run.capture().unwrap();
        let module = Module::open(&planned(Backend::CudaCores));
        give(&mut run, &[20, 40]);
        run.run(3).unwrap();
        let (queued, captured) = (driver.queued(), run.captured(2));
        module.set("more_blocks", 7);
        let calls: [fn(&mut DeviceRun) -> flashinfer_rs::Result<()>; 3] =
            [|run| run.run(2), |run| run.step(), |run| run.replan()];
        for call in calls {
            match refused(call(&mut run)) {
                GraphError::PlanChanged { node, batch, captured, wanted } => {
                    assert_eq!((&node[..], batch), ("node 2, decode_attention", 2));
                    assert_eq!((captured[0], wanted[0]), (264, 271));
                }
                other => panic!("{other}"),
            }
            assert_eq!(driver.queued(), queued, "nothing is launched");
        }
        let text = refused(run.step()).to_string();
        for part in ["node 2, decode_attention", "[264, ", "[271, ", "nothing was changed", "another bucket"] {
            assert!(text.contains(part), "{text}");
        }
        // The same steps go on where they were.
        module.set("more_blocks", 0);
        assert_eq!(run.captured(2), captured);
        driver.ordered("behind refusals", || {
            run.run(2).unwrap();
            run.step().unwrap();
        });
        assert_eq!(module.get("planned_pages"), pages(&[20, 40], 5));
        // What the planner itself refuses, before it copies anything and behind that.
        for fails in [1, 2] {
            module.set("fail_plan", fails);
            let queued = driver.queued();
            match refused(run.run(2)) {
                GraphError::Run { node, reason } => {
                    assert_eq!(node, "node 2, decode_attention");
                    assert!(reason.contains("as the test asked"), "{reason}");
                }
                other => panic!("{other}"),
            }
            assert_eq!(driver.queued(), queued);
            driver.ordered("behind a planner that failed", || run.run(1).unwrap());
        }
        assert_eq!(module.get("planned_pages"), pages(&[20, 40], 7));
    });
}

/// Their lengths stay as they are on the device, where the host counts one for each step.
#[test]
fn rows_that_steps_left_out_are_given_anew_before_they_are_planned() {
    with_driver("rows_that_steps_left_out_are_given_anew_before_they_are_planned", |driver| {
        let [a, _b] = streams();
        let mut run = made(&decoder(1, false), &[1, 2, 4], &a, by(AttentionKernel::BatchDecode)).unwrap();
        run.capture().unwrap();
        type Step = fn(&mut DeviceRun) -> flashinfer_rs::Result<()>;
        let steps: [Step; 2] = [DeviceRun::step, |run| run.run(1)];
        for step in steps {
            give(&mut run, &[12, 3, 30]);
            step(&mut run).unwrap();
            run.set_rows(2).unwrap();
            step(&mut run).unwrap();
            run.set_rows(3).unwrap();
            let queued = driver.queued();
            match refused(step(&mut run)) {
                GraphError::Missing { kind: "step input", name, expected } => {
                    assert_eq!(name, "lengths");
                    assert!(expected.contains("3 rows") && expected.contains("had 2"), "{expected}");
                }
                other => panic!("{other}"),
            }
            assert!(matches!(refused(run.replan()), GraphError::Missing { .. }));
            assert_eq!(driver.queued(), queued);
            // Of those that all steps had, nothing is asked.
            run.set_rows(1).unwrap();
            step(&mut run).unwrap();
            give(&mut run, &[15, 5, 31]);
            step(&mut run).unwrap();
        }
        // XQA reads the lengths that there are.
        let mut run = made(&decoder(1, false), &[1, 2, 4], &a, by(AttentionKernel::Xqa)).unwrap();
        give(&mut run, &[12, 3, 30]);
        run.step().unwrap();
        run.set_rows(1).unwrap();
        run.step().unwrap();
        run.set_rows(3).unwrap();
        run.step().unwrap();
    });
}

#[test]
fn steps_that_the_caller_did_not_plan_are_stale() {
    with_driver("steps_that_the_caller_did_not_plan_are_stale", |driver| {
        let [a, _b] = streams();
        let mut run = made(&decoder(1, false), &[2, 4], &a, by(AttentionKernel::BatchDecode)).unwrap();
        run.capture().unwrap();
        let module = Module::open(&planned(Backend::CudaCores));
        run.replan_by_hand(true);
        give(&mut run, &[20, 40]);
        let stale = |run: &mut DeviceRun, planned: &str, now: &str| {
            let (queued, plans) = (driver.queued(), module.get("plans"));
            for error in [refused(run.run(1)), refused(run.step())] {
                match &error {
                    GraphError::Stale { node, planned: found, now: then } => {
                        assert_eq!(node, "node 2, decode_attention");
                        assert!(found.contains(planned) && then.contains(now), "{error}");
                    }
                    other => panic!("{other}"),
                }
                assert!(error.to_string().contains("DeviceRun::replan"), "{error}");
            }
            assert_eq!((driver.queued(), module.get("plans")), (queued, plans), "nothing is queued");
        };
        stale(&mut run, "nothing", "2 rows of up to 40 tokens, 0 steps");
        run.replan().unwrap();
        // Several steps are more than a plan is for.
        match refused(run.run(2)) {
            GraphError::Stale { now, .. } => assert_eq!(now, "2 steps, each of a token more"),
            other => panic!("{other}"),
        }
        run.run(1).unwrap();
        stale(&mut run, "up to 40 tokens, 0 steps", "up to 41 tokens, 1 steps");
        run.replan().unwrap();
        run.step().unwrap();
        // Another bucket has another plan, fewer rows another too, and so have pages that are given anew.
        run.replan().unwrap();
        run.set_rows(1).unwrap();
        stale(&mut run, "2 rows", "1 rows");
        run.replan().unwrap();
        run.input("page_table", &[1; PER_ROW as usize]).unwrap();
        stale(&mut run, "1 rows", "1 rows");
        give(&mut run, &[7, 8, 9]);
        stale(&mut run, "nothing", "3 rows");
        // By itself again.
        run.replan_by_hand(false);
        driver.ordered("planned by itself again", || run.run(3).unwrap());
        assert_eq!(module.get("planned_pages"), pages(&[7, 8, 9], 2) + 1);
    });
}

#[test]
fn a_prompts_rows_are_queries_of_one_request_for_the_prefill_kernels() {
    let name = "a_prompts_rows_are_queries_of_one_request_for_the_prefill_kernels";
    with_driver(name, |driver| {
        let [a, _b] = streams();
        for (kernel, backend) in [(AttentionKernel::Fa2, Backend::Fa2), (AttentionKernel::Fa3, Backend::Fa3)] {
            let kernels = by(AttentionKernel::Xqa).from_rows(8, kernel);
            let mut run = made(&decoder(1, false), &[2, 16], &a, kernels).unwrap();
            let module = Module::open(&planned(backend));
            run.capture().unwrap();
            assert!(run.captured(2).is_some() && run.captured(16).is_none(), "what is planned for a batch stays eager");
            // A chunk of a prompt, a row of another sequence, and two that follow each other in a third; a last one of other pages
            // whose length follows.
            run.set_rows(12).unwrap();
            let (first, second, third) = ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18]);
            let other = [19, 20, 21, 22, 23, 24];
            let lengths = [15, 16, 17, 18, 19, 20, 21, 22, 20, 8, 9, 10];
            let tables = [first; 8].into_iter().chain([second, third, third, other]).flatten();
            run.input("ids", &[5; 12]).unwrap();
            run.input("positions", &lengths.map(|length| length - 1)).unwrap();
            run.input("lengths", &lengths).unwrap();
            run.input("page_table", &tables.collect::<Vec<i32>>()).unwrap();
            driver.ordered("a prefill beside decoding", || {
                run.step().unwrap();
                assert_eq!(module.get("plans"), 1, "{kernel:?}");
                // Four sequences, and what pads them.
                assert_eq!(module.get("planned_requests"), 5);
                assert_eq!(module.get("planned_pages"), 2 + 2 + 1 + 1 + 1);
                run.step().unwrap();
                assert_eq!(module.get("plans"), 2);
            });
            match run.run(1) {
                Err(FlashInferError::Graph { problem, remedy }) => {
                    assert!(problem.contains("16") && remedy.contains("DeviceRun::step"), "{problem}; {remedy}");
                }
                other => panic!("{other:?}"),
            }
            module.set("fail_plan", 2);
            assert!(matches!(refused(run.step()), GraphError::Run { .. }));
            driver.ordered("a prefill behind one that failed, and decoding", || {
                run.step().unwrap();
                give(&mut run, &[30, 31]);
                run.run(3).unwrap();
            });
        }
    });
}

#[test]
fn attention_that_cannot_be_planned_is_refused_when_the_run_is_made() {
    with_driver("attention_that_cannot_be_planned_is_refused_when_the_run_is_made", |driver| {
        let [a, _b] = streams();
        for (graph, says) in [
            (decoder(2, false), "more than once"),
            (decoder(0, true), "a node ahead of it"),
            (decoder(1, true), "a node ahead of it"),
        ] {
            match refused(made(&graph, &[2], &a, by(AttentionKernel::BatchDecode))) {
                GraphError::UnsupportedKernel { op, reason, remedy } => {
                    assert_eq!(op.rsplit(", ").next(), Some("decode_attention"));
                    assert!(reason.contains(says) && remedy.contains("XQA"), "{reason}; {remedy}");
                }
                other => panic!("{other}"),
            }
            // XQA reads whatever the lengths have become.
            made(&graph, &[2], &a, by(AttentionKernel::Xqa)).unwrap();
        }
        // Nothing that changes lengths: each step has those that were given.
        let mut run = made(&decoder(0, false), &[2], &a, by(AttentionKernel::BatchDecode)).unwrap();
        run.capture().unwrap();
        give(&mut run, &[3, 4]);
        let module = Module::open(&planned(Backend::CudaCores));
        let before = module.get("plans");
        driver.ordered("lengths that stay", || run.run(5).unwrap());
        assert_eq!(module.get("plans"), before + 1);
        run.replan_by_hand(true);
        run.run(5).unwrap();
        assert_eq!(module.get("plans"), before + 1);
        // A module that was not vendored is named; where a program has all of them built in, it is the real one, which does not
        // load over the stand-in.
        let mut g = GraphBuilder::new("wide", 2);
        let lengths = g.input("lengths", DType::I32, [Dim::BATCH], Pad::Value(1)).unwrap();
        let table = g.input("page_table", DType::I32, [Dim::BATCH, fixed(2)], Pad::Reserved(0)).unwrap();
        let x = g.input("x", DType::BF16, [Dim::BATCH, fixed(256)], Pad::Value(0)).unwrap();
        let cache = [fixed(9), fixed(16), fixed(1), fixed(256)];
        let [k, v] = ["k", "v"].map(|name| g.state(name, DType::BF16, cache).unwrap());
        let q = g.copy(&x, DType::BF16).unwrap();
        let heads = Columns::new(0..256).heads(1);
        let out = g.decode_attention(q.columns(heads), (&k, &v), &table, &lengths, 0.1).unwrap();
        g.output("out", out).unwrap();
        let graph = g.finish().unwrap();
        let buckets = Buckets::new(&[2]).unwrap();
        for kernel in [AttentionKernel::BatchDecode, AttentionKernel::Fa2, AttentionKernel::Fa3] {
            let made = DeviceRun::with_attention(&graph, &buckets, &a, &mut Selections::new(), by(kernel));
            match made {
                Err(FlashInferError::ArtifactMissing { library, .. } | FlashInferError::LoadFailed { library, .. }) => {
                    assert!(library.starts_with("batch_") && library.contains("qk_256"), "{library}");
                }
                other => panic!("{kernel:?}: {other:?}"),
            }
        }
    });
}

/// Of each row of the batch two of attention's, as a draft of two tokens has, and of a batch of any size three.
#[test]
fn attention_has_as_many_rows_as_its_inputs_whatever_the_batch() {
    with_driver("attention_has_as_many_rows_as_its_inputs_whatever_the_batch", |driver| {
        let [a, _b] = streams();
        for (of_attention, rows, padded) in [(Dim::per_row(2), 6, 8), (fixed(3), 3, 3)] {
            let mut g = GraphBuilder::new("drafts", 4);
            let lengths = g.input("lengths", DType::I32, [of_attention], Pad::Value(1)).unwrap();
            let table = g.input("page_table", DType::I32, [of_attention, fixed(PER_ROW)], Pad::Reserved(0)).unwrap();
            let x = g.input("x", DType::BF16, [of_attention, fixed(256)], Pad::Value(0)).unwrap();
            let norm = g.weight("norm", DType::BF16, [fixed(256)]).unwrap();
            let cache = [fixed(PAGES), fixed(PAGE_SIZE), fixed(1), fixed(128)];
            let [k, v] = ["k", "v"].map(|name| g.state(name, DType::BF16, cache).unwrap());
            let x = g.rmsnorm(&x, &norm, 1e-6).unwrap();
            let heads = Columns::new(0..256).heads(2);
            let out = g.decode_attention(x.columns(heads), (&k, &v), &table, &lengths, 0.1).unwrap();
            g.output("out", out).unwrap();
            let graph = g.finish().unwrap();
            for (kernel, backend) in
                [(AttentionKernel::BatchDecode, Backend::CudaCores), (AttentionKernel::Fa2, Backend::Fa2)]
            {
                let buckets = Buckets::new(&[4]).unwrap();
                let mut run =
                    DeviceRun::with_attention(&graph, &buckets, &a, &mut Selections::new(), by(kernel)).unwrap();
                run.weight("norm", &[bf16::ONE; 256]).unwrap();
                run.capture().unwrap();
                run.set_rows(3).unwrap();
                run.input("x", &vec![bf16::ONE; 256 * rows]).unwrap();
                run.input("lengths", &vec![20; rows]).unwrap();
                run.input("page_table", &vec![7; rows * PER_ROW as usize]).unwrap();
                driver.ordered("a step", || run.step().unwrap());
                let module = Module::open(&planned(backend));
                // Without a row ahead that it follows each is a request of its own; what pads them is one for each, or one.
                let pads = padded - rows as i32;
                let (requests, pads) = if kernel == AttentionKernel::Fa2 {
                    (rows as i32 + pads.min(1), pads.min(1))
                } else {
                    (padded, pads)
                };
                assert_eq!(module.get("planned_requests"), requests, "{kernel:?}");
                assert_eq!(module.get("planned_pages"), 2 * rows as i32 + pads, "{kernel:?}");
                if kernel.is_captured() {
                    driver.ordered("a step that was captured", || run.run(2).unwrap());
                }
            }
        }
    });
}

#[test]
fn nothing_of_a_plan_gets_into_a_capture_of_the_streams() {
    with_driver("nothing_of_a_plan_gets_into_a_capture_of_the_streams", |driver| {
        let [a, _b] = streams();
        for kernel in [AttentionKernel::BatchDecode, AttentionKernel::Fa3] {
            let mut run = made(&decoder(1, false), &[2], &a, by(kernel)).unwrap();
            run.capture().unwrap();
            give(&mut run, &[3, 4]);
            run.step().unwrap();
            let mode = cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            a.begin_capture(mode).unwrap();
            driver.refused("a plan", || run.replan());
            driver.refused("a step that is planned", || run.step());
            let flags = cudarc::driver::sys::CUgraphInstantiate_flags(0);
            a.end_capture(flags).expect("the capture goes on");
            driver.ordered("a step behind the capture", || run.step().unwrap());
        }
    });
}

/// Numbers without a pattern.
fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 17
    }
}

#[test]
fn a_run_whose_plans_copies_events_and_waits_fail_at_any_time_launches_none_but_whole_plans() {
    let name = "a_run_whose_plans_copies_events_and_waits_fail_at_any_time_launches_none_but_whole_plans";
    with_driver(name, |driver| {
        let [a, _b] = streams();
        let fail = |[copies, records, waits]: [i32; 3]| {
            driver.fail_copies(copies);
            driver.fail_records(records);
            driver.fail_waits(waits);
        };
        for turn in 0..40 {
            driver.ordered(&format!("turn {turn}"), || {
                let mut random = random(turn + 1);
                let kernels = by(AttentionKernel::BatchDecode).from_rows(8, AttentionKernel::Fa2);
                let mut run = made(&decoder(1, false), &[2, 4, 8], &a, kernels).unwrap();
                run.capture().unwrap();
                for _ in 0..25 {
                    let rows = 1 + random() as usize % 8;
                    let lengths: Vec<i32> = (0..rows.min(4)).map(|_| 1 + (random() % 60) as i32).collect();
                    give(&mut run, &lengths);
                    let [copies, records, waits] = match random() % 5 {
                        0 => [0, 1, 1],
                        1 => [1, 0, 0],
                        2 => [0; 3].map(|_| (random() % 3) as i32),
                        _ => [0; 3],
                    };
                    let module = Module::open(&planned(Backend::CudaCores));
                    let plan_fails = if random().is_multiple_of(8) { 1 + (random() % 2) as i32 } else { 0 };
                    module.set("fail_plan", plan_fails);
                    fail([copies, records, waits]);
                    let result = match random() % 4 {
                        0 => run.step(),
                        1 => run.replan(),
                        2 => run.replan().and_then(|()| run.step()),
                        _ => run.run(1 + random() % 3),
                    };
                    let failed = copies + records + waits + plan_fails > 0;
                    if let (Err(error), false) = (&result, failed) {
                        driver.fail(&format!("turn {turn}"), error);
                    }
                    fail([0; 3]);
                    module.set("fail_plan", 0);
                    // Whatever failed, the next step has its own plan.
                    run.step().unwrap();
                    let bucket = run.set_rows(lengths.len() as u64).unwrap() as i32;
                    assert_eq!(module.get("planned_requests"), bucket);
                }
                drop(run);
            });
        }
    });
}

/// What a file says is refused, or a graph whose run stays within its memory and in order.
#[test]
fn a_graph_of_other_numbers_is_refused_or_its_plans_stay_within_their_memory() {
    with_driver("a_graph_of_other_numbers_is_refused_or_its_plans_stay_within_their_memory", |driver| {
        let [a, _b] = streams();
        let mut random = random(3);
        let json = decoder(1, false).json();
        let digits: Vec<usize> = json.char_indices().filter(|(_, c)| c.is_ascii_digit()).map(|(i, _)| i).collect();
        let mut ran = 0;
        for turn in 0..300 {
            let place = digits[random() as usize % digits.len()];
            let number = if turn % 5 == 0 { random() >> (random() % 64) } else { random() % 40 };
            let changed = format!("{}{number}{}", &json[..place], &json[place + 1..]);
            let Ok(graph) = Graph::from_json(&changed) else { continue };
            if graph.tensors().iter().any(|tensor| tensor.spec.bytes(16) > 1 << 22) {
                continue;
            }
            let kernel = [AttentionKernel::BatchDecode, AttentionKernel::Fa2][turn % 2];
            driver.ordered(&format!("{number} at {place} by {kernel:?}"), || {
                let buckets = Buckets::new(&[1, graph.largest_batch().min(3)]).unwrap();
                let made = DeviceRun::with_attention(&graph, &buckets, &a, &mut Selections::new(), by(kernel));
                let Ok(mut run) = made else { return };
                for tensor in graph.tensors() {
                    if tensor.origin == Origin::Weight {
                        let bytes = vec![0; tensor.spec.bytes(1) as usize];
                        run.weight_bytes(&tensor.name, tensor.spec.dtype, &bytes).unwrap();
                    }
                }
                let captured = run.capture();
                let rows = graph.largest_batch().min(3);
                run.set_rows(rows).unwrap();
                for tensor in graph.tensors() {
                    if let Origin::Input(_) = tensor.origin {
                        let values = vec![1i32; tensor.spec.elements(rows) as usize];
                        if run.input(&tensor.name, &values).is_err() {
                            return;
                        }
                    }
                }
                // What a kernel refuses it refuses with words, and what runs is in order and within the run's memory.
                for _ in 0..3 {
                    ran += usize::from(run.step().is_ok());
                    if captured.is_ok() {
                        run.run(2).ok();
                    }
                }
            });
        }
        assert!(ran > 50, "{ran}");
    });
}
