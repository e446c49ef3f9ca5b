//! Compute graphs on a GPU, over the stand-in for CUDA's driver of `ordering`: that every use of a run's memory is ordered, that
//! what was captured is compared with the plan, and that what cannot be leaves all as it was.

#[path = "support/counting.rs"]
mod counting;
#[path = "compute/model.rs"]
mod model;
#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use flashinfer_rs::compute::{
    Backend, Buckets, Columns, DeviceRun, Dim, Graph, GraphBuilder, GraphError, HostRun, Link, Pad, PageAllocator,
    Plan, Rule, Target, fuse,
};
use flashinfer_rs::matmul::Selections;
use flashinfer_rs::{DType, FlashInferError};
use half::bf16;
use model::Config;
use ordering::with_driver;

const COLUMNS: u64 = 64;

const fn fixed(size: u64) -> Dim {
    Dim::fixed(size)
}

/// Norms of norms, for batches of up to four rows: two values live at once.
fn norms() -> Graph {
    let mut g = GraphBuilder::new("norms", 4);
    let x = g.input("x", DType::BF16, [Dim::BATCH, fixed(COLUMNS)], Pad::Value(1)).unwrap();
    let [first, second] = ["first", "second"].map(|name| g.weight(name, DType::BF16, [fixed(COLUMNS)]).unwrap());
    let a = g.rmsnorm(&x, &first, 1e-6).unwrap();
    let b = g.rmsnorm(&a, &second, 1e-6).unwrap();
    let c = g.rmsnorm(&b, &first, 1e-6).unwrap();
    let (normed, sum) = g.fused_add_rmsnorm(c, a, &second, 1e-6).unwrap();
    g.output("normed", normed).unwrap();
    g.output("sum", sum).unwrap();
    g.finish().unwrap()
}

/// All of a decoder but its products: ids to tokens, over a paged cache of two pages of 16 tokens for each row.
fn decoder() -> Graph {
    let mut g = GraphBuilder::new("decoder", 4);
    let [mut ids, mut positions, mut lengths] = [("ids", 0), ("positions", 0), ("lengths", 1)]
        .map(|(name, pad)| g.input(name, DType::I32, [Dim::BATCH], Pad::Value(pad)).unwrap());
    let table = g.input("page_table", DType::I32, [Dim::BATCH, fixed(2)], Pad::Reserved(0)).unwrap();
    let embedding = g.weight("embedding", DType::BF16, [fixed(128), fixed(512)]).unwrap();
    let cos_sin = g.weight("cos_sin", DType::F32, [fixed(40), fixed(128)]).unwrap();
    let [q_norm, k_norm] = ["q_norm", "k_norm"].map(|name| g.weight(name, DType::BF16, [fixed(128)]).unwrap());
    let norm = g.weight("norm", DType::BF16, [fixed(256)]).unwrap();
    let cache = [fixed(9), fixed(16), fixed(1), fixed(128)];
    let [mut k_cache, mut v_cache] = ["k_cache", "v_cache"].map(|name| g.state(name, DType::BF16, cache).unwrap());
    let (q, k) = (Columns::new(0..256).heads(2), Columns::new(256..384).heads(1));
    let v = Columns::new(384..512).heads(1);
    let x = g.embedding(&ids, &embedding, 1.0).unwrap();
    let x = g.head_rmsnorm(x, q, &q_norm, 1e-6).unwrap();
    let x = g.head_rmsnorm(x, k, &k_norm, 1e-6).unwrap();
    let x = g.rope(x, [q, k], &cos_sin, &positions, false).unwrap();
    g.append((x.columns(k), x.columns(v)), &positions, &table, (&mut k_cache, &mut v_cache)).unwrap();
    let attended = g.decode_attention(x.columns(q), (&k_cache, &v_cache), &table, &lengths, 0.1).unwrap();
    let normed = g.rmsnorm(&attended, &norm, 1e-6).unwrap();
    let logits = g.silu_and_mul(&normed).unwrap();
    let token = g.argmax(&logits).unwrap();
    g.advance(&token, &mut ids, &mut positions, &mut lengths, 32).unwrap();
    g.output("token", token).unwrap();
    g.finish().unwrap()
}

/// Attention of so many rows, whose queries are columns of something larger.
fn attention(rows: Dim, largest: u64) -> Graph {
    let mut g = GraphBuilder::new("attention", largest);
    let input = |g: &mut GraphBuilder, name, dtype, shape: &[Dim]| g.input(name, dtype, shape, Pad::Value(1)).unwrap();
    let x = input(&mut g, "x", DType::BF16, &[rows, fixed(512)]);
    let table = input(&mut g, "page_table", DType::I32, &[rows, fixed(2)]);
    let lengths = input(&mut g, "lengths", DType::I32, &[rows]);
    let cache = [fixed(9), fixed(16), fixed(1), fixed(128)];
    let [k, v] = ["k_cache", "v_cache"].map(|name| g.state(name, DType::BF16, cache).unwrap());
    let x = g.copy(&x, DType::BF16).unwrap();
    let q = x.columns(Columns::new(0..256).heads(2));
    let attended = g.decode_attention(q, (&k, &v), &table, &lengths, 0.1).unwrap();
    g.output("attended", attended).unwrap();
    g.finish().unwrap()
}

fn buckets(sizes: &[u64]) -> Buckets {
    Buckets::new(sizes).unwrap()
}

fn refused<T>(result: flashinfer_rs::Result<T>) -> GraphError {
    match result {
        Err(FlashInferError::ComputeGraph(error)) => *error,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("it was taken"),
    }
}

/// A run that was given all that it wants but the inputs.
fn run(stream: &Arc<CudaStream>) -> DeviceRun {
    let mut run = DeviceRun::new(&norms(), &buckets(&[1, 2, 4]), stream).unwrap();
    for name in ["first", "second"] {
        run.weight(name, &[bf16::ONE; COLUMNS as usize]).unwrap();
    }
    run
}

fn give(run: &mut DeviceRun, rows: u64) {
    run.set_rows(rows).unwrap();
    run.input("x", &vec![bf16::ONE; (rows * COLUMNS) as usize]).unwrap();
}

/// Numbers that are the same each time.
fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

fn streams() -> [Arc<CudaStream>; 2] {
    let context = CudaContext::new(0).unwrap();
    [(); 2].map(|()| context.new_stream().unwrap())
}

#[test]
fn steps_are_ordered_with_every_other_use() {
    with_driver("steps_are_ordered_with_every_other_use", |driver| {
        let [a, b] = streams();
        driver.ordered("node by node, captured, and views in between", || {
            let mut run = run(&b);
            for rows in [3, 1, 2] {
                give(&mut run, rows);
                run.step().unwrap();
                a.clone_dtoh(&run.view::<bf16>("sum").unwrap()).unwrap();
                run.step().unwrap();
                run.capture().unwrap();
                give(&mut run, rows);
                run.run(3).unwrap();
                a.clone_dtoh(&run.view::<bf16>("normed").unwrap()).unwrap();
                run.weight("first", &[bf16::ONE; COLUMNS as usize]).unwrap();
                run.run(1).unwrap();
                assert_eq!(run.read("sum").unwrap().len() as u64, rows * COLUMNS);
            }
        });
        driver.ordered("dropped with steps on their way", || {
            let mut run = run(&b);
            run.follow("sum").unwrap();
            give(&mut run, 4);
            run.capture().unwrap();
            run.run(5).unwrap();
        });
        driver.ordered("on the null stream", || {
            let mut run = run(&b.context().default_stream());
            give(&mut run, 2);
            run.step().unwrap();
            run.capture().unwrap();
            run.run(2).unwrap();
        });
        drop([a, b]);
        assert_eq!(driver.live(), [0; 5], "nothing is left");
    });
}

#[test]
fn steps_on_a_thread_that_has_no_context_or_another_one_are_those_of_the_run_s() {
    let name = "steps_on_a_thread_that_has_no_context_or_another_one_are_those_of_the_run_s";
    with_driver(name, |driver| {
        let context = CudaContext::new(0).unwrap();
        for stream in [context.default_stream(), context.new_stream().unwrap()] {
            let mut run = run(&stream);
            run.follow("sum").unwrap();
            run.capture().unwrap();
            let mut steps = || {
                let before = cudarc::driver::result::ctx::get_current().unwrap();
                give(&mut run, 3);
                run.run(2).unwrap();
                run.step().unwrap();
                assert_eq!(run.profile().unwrap().len(), 4);
                run.synchronize().unwrap();
                for _ in 0..4 {
                    assert!(run.next_result::<bf16>().unwrap().is_some());
                }
                assert_eq!(cudarc::driver::result::ctx::get_current().unwrap(), before, "what was current stays so");
            };
            driver.ordered("on a thread without a context", || {
                std::thread::scope(|threads| threads.spawn(&mut steps).join().unwrap());
            });
            driver.ordered("where another context is current", || {
                let _other = driver.another_context();
                steps();
                context.bind_to_thread().unwrap();
            });
        }
    });
}

#[test]
fn every_bucket_is_captured_as_it_was_planned() {
    with_driver("every_bucket_is_captured_as_it_was_planned", |driver| {
        let [a, _b] = streams();
        let mut run = run(&a);
        let graph = norms();
        for pdl in [true, false] {
            run.set_pdl(pdl);
            run.capture().unwrap();
            for bucket in [1, 2, 4] {
                let (step, plan) = (run.captured(bucket).unwrap(), run.plan(bucket).unwrap());
                assert_eq!((step.nodes, step.kernels), (4, 4));
                assert_eq!(step.kernels, plan.kernels(&graph) as usize);
                let early = plan.edges().iter().filter(|edge| edge.link == Link::Programmatic).count();
                assert_eq!(step.programmatic, if pdl { early } else { 0 });
                assert_eq!(early, 3);
            }
        }
        assert_eq!(run.captured(3), None);
        // One arena, that of the largest bucket.
        assert_eq!(run.sizes().planned, run.plan(4).unwrap().sizes().planned);
        // A batch runs at the smallest bucket that holds it, with one launch.
        for (rows, bucket) in [(1, 1), (2, 2), (3, 4), (4, 4)] {
            assert_eq!(run.set_rows(rows).unwrap(), bucket);
            give(&mut run, rows);
            let [kernels, launches] = driver.queued();
            run.run(2).unwrap();
            assert_eq!(driver.queued(), [kernels, launches + 2]);
            run.step().unwrap();
            assert_eq!(driver.queued(), [kernels + 4, launches + 2]);
        }
        assert!(matches!(refused(run.set_rows(5)), GraphError::BucketTooSmall { rows: 5, largest: 4 }));
        assert!(matches!(refused(run.set_rows(0)), GraphError::BucketTooSmall { rows: 0, .. }));
    });
}

#[test]
fn what_was_captured_and_not_planned_is_refused_and_leaves_all_as_it_was() {
    let name = "what_was_captured_and_not_planned_is_refused_and_leaves_all_as_it_was";
    with_driver(name, |driver| {
        let [a, _b] = streams();
        let mut run = run(&a);
        run.set_pdl(false);
        // Nothing was captured yet: an error, and nothing is queued.
        give(&mut run, 2);
        let before = driver.queued();
        assert!(matches!(run.run(1), Err(FlashInferError::Graph { .. })));
        assert_eq!(driver.queued(), before);
        run.capture().unwrap();
        let (captured, live) = ([1, 2, 4].map(|bucket| run.captured(bucket)), driver.live());
        let unchanged = |run: &mut DeviceRun, case: &str| {
            assert_eq!([1, 2, 4].map(|bucket| run.captured(bucket)), captured, "{case}");
            assert_eq!(driver.live(), live, "{case}: no stream, graph or executable is left of it");
            run.run(1).unwrap();
        };
        for (more, found) in [(1, "kernels: 2,"), (-1, "kernels: 0,")] {
            driver.launch_more(more);
            match refused(run.capture()) {
                GraphError::CapturedDiffers { graph, batch, node, planned, captured } => {
                    assert_eq!((&graph[..], batch, &node[..]), ("norms", 4, "node 0, rmsnorm"));
                    assert_eq!(planned, "kernels: 1");
                    assert!(captured.starts_with(found), "{captured}");
                }
                other => panic!("{other}"),
            }
            unchanged(&mut run, "another number of kernels");
        }
        driver.always_early(true);
        match refused(run.capture()) {
            GraphError::CapturedDiffers { node, .. } => assert_eq!(node, "node 1, rmsnorm"),
            other => panic!("{other}"),
        }
        driver.always_early(false);
        unchanged(&mut run, "a kernel that starts early");
        driver.fail_next();
        match refused(run.capture()) {
            GraphError::Run { node, reason } => {
                assert_eq!(node, "node 0, rmsnorm");
                assert!(reason.contains("as the test asked"), "{reason}");
            }
            other => panic!("{other}"),
        }
        unchanged(&mut run, "a call that fails");
        // Node by node too: what is behind the node that failed is not run, and the next step is whole.
        let [kernels, _] = driver.queued();
        driver.fail_next();
        assert!(matches!(refused(run.step()), GraphError::Run { .. }));
        assert_eq!(driver.queued()[0], kernels);
        run.step().unwrap();
        assert_eq!(driver.queued()[0], kernels + 4);
        for violation in driver.violations() {
            driver.fail("all of it", violation);
        }
    });
}

#[test]
fn results_come_back_in_the_order_of_the_steps() {
    with_driver("results_come_back_in_the_order_of_the_steps", |_| {
        let [a, _b] = streams();
        let mut run = run(&a);
        run.capture().unwrap();
        give(&mut run, 3);
        // No output is a token, so that nothing is followed.
        run.run(2).unwrap();
        assert!(run.next_result::<bf16>().unwrap().is_none());
        run.follow("sum").unwrap();
        assert!(!run.has_result().unwrap());
        run.run(2).unwrap();
        run.step().unwrap();
        match refused(run.next_result::<i32>()) {
            GraphError::Mismatch { kind: "output", name, .. } => assert_eq!(name, "sum"),
            other => panic!("{other}"),
        }
        for step in 2..5 {
            let result = run.next_result::<bf16>().unwrap().unwrap();
            assert_eq!((result.step, result.values.len()), (step, 3 * COLUMNS as usize));
        }
        assert!(run.next_result::<bf16>().unwrap().is_none());
        // As many as the ring holds: the oldest are given up.
        run.run(1500).unwrap();
        assert_eq!(run.next_result::<bf16>().unwrap().unwrap().step, 5 + 1500 - 1024);
        assert!(matches!(refused(run.follow("c")), GraphError::UnknownName { kind: "output", .. }));
    });
}

#[test]
fn a_step_whose_result_was_not_copied_has_none_and_the_others_keep_their_numbers() {
    with_driver("a_step_whose_result_was_not_copied_has_none_and_the_others_keep_their_numbers", |driver| {
        let [a, _b] = streams();
        let mut run = run(&a);
        run.capture().unwrap();
        give(&mut run, 3);
        run.follow("sum").unwrap();
        run.run(2).unwrap();
        driver.fail_copies(1);
        run.run(1).unwrap_err();
        run.run(1).unwrap();
        driver.fail_records(1);
        run.step().unwrap_err();
        run.step().unwrap();
        for step in [0, 1, 3, 5] {
            assert_eq!(run.next_result::<bf16>().unwrap().unwrap().step, step);
        }
        assert!(!run.has_result().unwrap() && run.next_result::<bf16>().unwrap().is_none());
        // Of a ring that is full the oldest is given up also where nothing takes its place, since it was overwritten.
        run.run(1024).unwrap();
        driver.fail_records(1);
        run.run(1).unwrap_err();
        assert_eq!(run.next_result::<bf16>().unwrap().unwrap().step, 7);
    });
}

/// Where neither an event is recorded behind a copy nor the copy waited for, nobody knows when it is made.
#[test]
fn page_locked_memory_is_neither_written_nor_freed_while_a_copy_of_it_may_be_on_its_way() {
    let name = "page_locked_memory_is_neither_written_nor_freed_while_a_copy_of_it_may_be_on_its_way";
    with_driver(name, |driver| {
        let [a, _b] = streams();
        let unknown = |followed: bool| {
            let mut run = run(&a);
            if followed {
                run.follow("sum").unwrap();
            }
            give(&mut run, 2);
            driver.fail_records(1);
            driver.fail_waits(1);
            if followed {
                // The inputs' copy has its event, and the result's not.
                let mut eager = run.eager();
                driver.fail_records(0);
                eager.begin().unwrap();
                driver.fail_records(1);
                let last = (0..4).map(|at| eager.node(at)).last().unwrap();
                last.unwrap_err();
            } else {
                run.step().unwrap_err();
            }
            run
        };
        let numbers = |run: &mut DeviceRun, i: u8| {
            run.input("x", &[bf16::from_f32(i.into()); 2 * COLUMNS as usize]).unwrap();
        };
        driver.ordered("the next inputs", || {
            let mut run = unknown(false);
            for i in 0..10 {
                numbers(&mut run, i);
                run.step().unwrap();
            }
        });
        driver.ordered("the inputs' end", || drop(unknown(false)));
        driver.ordered("the results' end", || drop(unknown(true)));
        // For good, rather than too early.
        driver.ordered("the end, when nothing is waited for", || {
            let run = unknown(false);
            driver.fail_waits(1);
            drop(run);
        });
        driver.ordered("as ever", || {
            let mut run = run(&a);
            run.follow("sum").unwrap();
            give(&mut run, 2);
            for i in 0..10 {
                numbers(&mut run, i);
                run.step().unwrap();
            }
        });
    });
}

#[test]
fn a_weight_that_others_are_packed_into_is_given_as_a_whole_or_by_its_parts() {
    let name = "a_weight_that_others_are_packed_into_is_given_as_a_whole_or_by_its_parts";
    with_driver(name, |_| {
        let mut g = GraphBuilder::new("packed", 4);
        let x = g.input("x", DType::BF16, [Dim::BATCH, fixed(64)], Pad::Value(1)).unwrap();
        let parts = [("q", 16), ("k", 8)];
        let qk = g.packed_weight("qk", DType::BF16, [fixed(24), fixed(64)], &parts).unwrap();
        let y = g.matmul(&x, &qk).unwrap();
        g.output("y", y).unwrap();
        let [a, _b] = streams();
        let mut run = DeviceRun::new(&g.finish().unwrap(), &buckets(&[1]), &a).unwrap();
        let ones = [bf16::ONE; 24 * 64];
        run.input("x", &ones[..64]).unwrap();
        for wrong in [refused(run.weight("qk", &ones[1..])), refused(run.weight("qk", &[1f32; 24 * 64]))] {
            assert!(matches!(wrong, GraphError::Mismatch { .. }), "{wrong}");
        }
        run.weight("k", &ones[..8 * 64]).unwrap();
        assert!(matches!(refused(run.step()), GraphError::Missing { kind: "weight", name, .. } if name == "q"));
        run.weight("qk", &ones).unwrap();
        run.step().unwrap();
    });
}

#[test]
fn nothing_of_a_run_gets_into_a_capture_of_its_stream() {
    with_driver("nothing_of_a_run_gets_into_a_capture_of_its_stream", |driver| {
        type Call = fn(&mut DeviceRun) -> flashinfer_rs::Result<()>;
        let calls: [(&str, Call); 6] = [
            ("a view", |run| run.view::<bf16>("sum").map(drop)),
            ("a weight", |run| run.weight("first", &[bf16::ONE; COLUMNS as usize])),
            ("reading", |run| run.read("sum").map(drop)),
            ("a step", DeviceRun::step),
            ("captured steps", |run| run.run(1)),
            ("waiting", |run| run.synchronize()),
        ];
        let [a, _b] = streams();
        let mut run = run(&a);
        run.capture().unwrap();
        give(&mut run, 2);
        run.run(1).unwrap();
        for again in [false, true] {
            for (case, call) in calls {
                if !again {
                    // So that nothing is left to be handed back.
                    run.view::<bf16>("sum").unwrap();
                }
                let mode = cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
                a.begin_capture(mode).unwrap();
                driver.refused(case, || call(&mut run));
                let flags = cudarc::driver::sys::CUgraphInstantiate_flags(0);
                let captured = a.end_capture(flags).expect("the capture goes on");
                let mut nodes = 0;
                if let Some(captured) = captured {
                    // SAFETY: the graph is live; without a place for the nodes only their number is answered.
                    unsafe {
                        cudarc::driver::sys::cuGraphGetNodes(captured.cu_graph(), std::ptr::null_mut(), &mut nodes)
                    };
                }
                assert_eq!(nodes, 0, "{case}");
                run.run(1).unwrap();
            }
        }
    });
}

#[test]
fn steps_that_are_queued_allocate_nothing() {
    with_driver("steps_that_are_queued_allocate_nothing", |_| {
        let [a, _b] = streams();
        let mut run = run(&a);
        run.follow("sum").unwrap();
        run.capture().unwrap();
        give(&mut run, 3);
        run.run(2).unwrap();
        let x = vec![bf16::ONE; 3 * COLUMNS as usize];
        let count = counting::allocations(10, &mut || {
            run.input("x", &x).unwrap();
            run.run(3).unwrap();
            run.next_result::<bf16>().unwrap().unwrap();
        });
        assert_eq!(count, 0);
    });
}

#[test]
fn what_is_missing_or_does_not_fit_is_said_before_anything_is_queued() {
    with_driver("what_is_missing_or_does_not_fit_is_said_before_anything_is_queued", |driver| {
        let [a, _b] = streams();
        let mut run = DeviceRun::new(&norms(), &buckets(&[2]), &a).unwrap();
        let (ones, queued) = ([bf16::ONE; 2 * COLUMNS as usize], driver.queued());
        run.set_rows(2).unwrap();
        run.input("x", &ones).unwrap();
        run.weight("first", &ones[..64]).unwrap();
        match refused(run.step()) {
            GraphError::Missing { kind: "weight", name, .. } => assert_eq!(name, "second"),
            other => panic!("{other}"),
        }
        run.weight("second", &ones[..64]).unwrap();
        for error in [
            refused(run.weight("second", &ones[..63])),
            refused(run.weight("second", &[1f32; 64])),
            refused(run.weight_bytes("second", DType::F16, &[0; 128])),
            refused(run.input("x", &ones[..64])),
            refused(run.input("x", &[1f32; 128])),
        ] {
            assert!(matches!(error, GraphError::Mismatch { .. }), "{error}");
        }
        for error in [
            refused(run.weight("third", &ones)),
            refused(run.state("cache", &ones)),
            refused(run.input("y", &ones)),
            refused(run.read("first")),
        ] {
            assert!(matches!(error, GraphError::UnknownName { .. }), "{error}");
        }
        // One row was given, and two are asked for.
        run.set_rows(1).unwrap();
        run.input("x", &ones[..64]).unwrap();
        run.set_rows(2).unwrap();
        assert!(matches!(refused(run.step()), GraphError::Missing { kind: "step input", .. }));
        assert_eq!(driver.queued(), queued);
        run.input("x", &ones).unwrap();
        run.step().unwrap();

        // Nodes run in their order, each once, behind the beginning.
        let mut eager = run.eager();
        let order = |result| match refused(result) {
            GraphError::Run { reason, .. } => reason,
            other => panic!("{other}"),
        };
        assert!(order(eager.node(0)).contains("was not begun"));
        eager.begin().unwrap();
        assert!(order(eager.node(1)).contains("place 0"));
        (0..4).for_each(|at| eager.node(at).unwrap());
        assert!(order(eager.node(0)).contains("has ended"));
        assert_eq!(eager.plan().batch(), 2);
    });
}

#[test]
fn what_cannot_run_here_is_refused_before_anything_is_allocated() {
    with_driver("what_cannot_run_here_is_refused_before_anything_is_allocated", |driver| {
        let [a, _b] = streams();
        let live = driver.live();
        let refuse = |graph: &Graph| refused(DeviceRun::new(graph, &buckets(&[1]), &a));
        let with = |target, add: &dyn Fn(&mut GraphBuilder)| {
            let mut g = GraphBuilder::for_target("g", 1, target);
            add(&mut g);
            g.finish().unwrap()
        };
        let huge = with(Target::Gpu, &|g| {
            g.state("cache", DType::BF16, [fixed(1 << 40)]).unwrap();
        });
        match refuse(&huge) {
            GraphError::ArenaTooLarge { planned, free } => assert!(planned > 1 << 41 && free < planned),
            other => panic!("{other}"),
        }
        let host = with(Target::Host, &|g| {
            g.state("cache", DType::F32, [fixed(8)]).unwrap();
        });
        assert!(matches!(refuse(&host), GraphError::UnsupportedKernel { .. }));
        for rows in [8, 1 << 40, u64::MAX] {
            match refused(DeviceRun::new(&norms(), &buckets(&[1, rows]), &a)) {
                GraphError::BucketTooSmall { rows: found, largest: 4 } => assert_eq!(found, rows),
                other => panic!("{other}"),
            }
        }
        // Inputs that are larger than the host's memory too.
        let inputs = with(Target::Gpu, &|g| {
            g.input("x", DType::BF16, [fixed(1 << 46)], Pad::Value(0)).unwrap();
        });
        assert!(matches!(refuse(&inputs), GraphError::ArenaTooLarge { .. }));
        // A launch of XQA has 65,535 requests at the most.
        DeviceRun::new(&attention(Dim::BATCH, 70_000), &buckets(&[65_535]), &a).unwrap();
        match refused(DeviceRun::new(&attention(Dim::BATCH, 70_000), &buckets(&[65_536]), &a)) {
            GraphError::UnsupportedKernel { reason, .. } => assert!(reason.contains("65536"), "{reason}"),
            other => panic!("{other}"),
        }
        assert_eq!(driver.live(), live);
    });
}

#[test]
fn a_decoders_steps_are_ordered_and_stay_within_its_pages() {
    with_driver("a_decoders_steps_are_ordered_and_stay_within_its_pages", |driver| {
        let [a, b] = streams();
        let turned = [Rule::QkNormRopeAppend, Rule::AppendAttention];
        let [appended, attended] = [1, 2].map(|rules| fuse(&decoder(), &turned[..rules]).unwrap());
        assert_eq!((appended.1.len(), attended.1.len()), (1, 2));
        // Embedding, two norms, rope, append, attention, norm, activation, token, advance; the four in the middle as one, and those with
        // attention.
        for (graph, kernels, own) in [(decoder(), 10, false), (appended.0, 7, false), (attended.0, 6, true)] {
            let mut run = DeviceRun::new(&graph, &buckets(&[1, 2, 4]), &a).unwrap();
            for (name, elements) in [("embedding", 128 * 512), ("q_norm", 128), ("k_norm", 128), ("norm", 256)] {
                run.weight(name, &vec![bf16::ONE; elements]).unwrap();
            }
            run.weight("cos_sin", &[0f32; 40 * 128]).unwrap();
            run.capture().unwrap();
            for bucket in [1, 2, 4] {
                // Queries that are columns of something larger lie apart where there are several rows, and are copied for XQA.
                let expected = kernels + u32::from(bucket > 1 && !own);
                assert_eq!(run.kernels(bucket).unwrap(), expected);
                let step = run.captured(bucket).unwrap();
                assert_eq!((step.nodes, step.kernels), (expected as usize, expected as usize));
                assert!(step.programmatic > 0);
            }
            driver.ordered("steps, and the cache's views", || {
                for rows in [1, 3] {
                    run.set_rows(rows as u64).unwrap();
                    run.input("ids", &vec![5; rows]).unwrap();
                    run.input("positions", &vec![2; rows]).unwrap();
                    run.input("lengths", &vec![3; rows]).unwrap();
                    run.input("page_table", &vec![8; 2 * rows]).unwrap();
                    match refused(run.run(31)) {
                        GraphError::ContextTooLong { row: 0, length: 33, capacity: 32 } => {}
                        other => panic!("{other}"),
                    }
                    if own {
                        let queued = driver.queued();
                        match refused(run.run(20)) {
                            GraphError::SharedPage { row: 0, page: 8, steps: 20, .. } => {}
                            other => panic!("{other}"),
                        }
                        assert_eq!(driver.queued(), queued);
                    }
                    run.input("page_table", &(1..=2 * rows as i32).collect::<Vec<_>>()).unwrap();
                    run.run(20).unwrap();
                    b.clone_dtoh(&run.view::<bf16>("k_cache").unwrap()).unwrap();
                    (0..9).for_each(|_| run.step().unwrap());
                    run.run(1).unwrap();
                    assert!(matches!(refused(run.run(1)), GraphError::ContextTooLong { .. }));
                    assert!(matches!(refused(run.step()), GraphError::ContextTooLong { .. }));
                    for _ in 0..30 {
                        assert_eq!(run.next_result::<i32>().unwrap().unwrap().values.len(), rows);
                    }
                    assert!(run.next_result::<i32>().unwrap().is_none());
                }
            });
        }
    });
}

/// Also where a batch is one and has several rows, as several tokens of each sequence are.
#[test]
fn queries_that_are_columns_of_something_larger_are_copied_wherever_there_are_several_rows() {
    let name = "queries_that_are_columns_of_something_larger_are_copied_wherever_there_are_several_rows";
    with_driver(name, |driver| {
        let [a, _b] = streams();
        for (rows, kernels) in [(Dim::BATCH, [2, 3]), (Dim::per_row(2), [3, 3]), (fixed(3), [3, 3]), (fixed(1), [2, 2])]
        {
            let mut run = DeviceRun::new(&attention(rows, 2), &buckets(&[1, 2]), &a).unwrap();
            assert_eq!([1, 2].map(|bucket| run.kernels(bucket).unwrap()), kernels, "{rows}");
            driver.ordered("captured", || run.capture().unwrap());
            for (bucket, expected) in [1, 2].into_iter().zip(kernels) {
                assert_eq!(run.captured(bucket).unwrap().kernels, expected as usize, "{rows}");
            }
        }
    });
}

#[test]
fn no_kernel_of_a_node_but_the_first_starts_early() {
    with_driver("no_kernel_of_a_node_but_the_first_starts_early", |driver| {
        let [a, _b] = streams();
        // Of several rows queries are copied first, by a kernel that may start early; XQA reads what it writes.
        for bucket in [4, 1] {
            let mut run = DeviceRun::new(&decoder(), &buckets(&[bucket]), &a).unwrap();
            run.capture().unwrap();
            let captured = run.captured(bucket);
            driver.early_attention(true);
            match refused(run.capture()) {
                GraphError::CapturedDiffers { node, planned, .. } => {
                    assert_eq!((&node[..], planned.contains("kernels")), ("node 5, decode_attention", bucket > 1));
                }
                other => panic!("{other}"),
            }
            assert_eq!(run.captured(bucket), captured);
            driver.early_attention(false);
            run.capture().unwrap();
        }
    });
}

/// A model with its products, of which those of few rows are this crate's own and the others cuBLASLt's.
#[test]
fn a_models_steps_are_ordered_with_products_of_either_kind() {
    with_driver("a_models_steps_are_ordered_with_products_of_either_kind", |driver| {
        let [a, _b] = streams();
        let config = Config {
            layers: 2,
            hidden: 64,
            q_heads: 2,
            kv_heads: 1,
            head: 128,
            inner: 64,
            vocab: 128,
            qk_norm: true,
            page_size: 16,
            pages: 1 + 16 * 2,
            per_row: 2,
            dtype: DType::BF16,
            target: Target::Gpu,
        };
        let unfused = config.graph(16).unwrap();
        let sets: [(&str, &[Rule]); 7] = [
            ("as it is", &[]),
            ("packed", &[Rule::PackProducts]),
            ("packed and gated", &[Rule::PackProducts, Rule::GatedActivation]),
            ("packed and turned", &[Rule::PackProducts, Rule::QkNormRopeAppend]),
            ("with sums in products", &[Rule::ResidualProduct]),
            ("fused", &Rule::ALL),
            ("fused for steps", &Rule::STEP),
        ];
        let mut selections = Selections::new();
        for (name, rules) in sets {
            let (graph, applied) = fuse(&unfused, rules).unwrap();
            assert!(applied.len() >= 2 * rules.len(), "{name}: {applied:?}");
            let run = DeviceRun::with_selections(&graph, &buckets(&[1, 4, 16]), &a, &mut selections);
            let mut run = run.unwrap();
            for (name, values) in config.weights(1) {
                run.weight(&name, &values.into_iter().map(bf16::from_f64).collect::<Vec<_>>()).unwrap();
            }
            let angles: Vec<f32> = config.cos_sin().into_iter().map(|x| x as f32).collect();
            run.weight("cos_sin", &angles).unwrap();
            let mut programmatic = Vec::new();
            for pdl in [false, true] {
                run.set_pdl(pdl);
                driver.ordered(&format!("{name}, captured"), || run.capture().unwrap());
                for bucket in [1, 4, 16] {
                    let (step, kernels) = (run.captured(bucket).unwrap(), run.kernels(bucket).unwrap() as usize);
                    assert!(step.kernels >= kernels, "{name} at {bucket}: {step:?}, planned {kernels}");
                    programmatic.push(step.programmatic);
                }
            }
            assert_eq!(programmatic[..3], [0; 3], "{name}");
            assert!(programmatic[3..].iter().all(|edges| *edges > 0), "{name}: {programmatic:?}");
            for rows in [1usize, 3, 11] {
                run.set_rows(rows as u64).unwrap();
                let mut pages = PageAllocator::new(33, 16, 16, 2);
                (0..rows).for_each(|row| pages.grow(row, 32).unwrap());
                run.input("ids", &vec![5; rows]).unwrap();
                run.input("positions", &vec![0; rows]).unwrap();
                run.input("lengths", &vec![1; rows]).unwrap();
                run.input("page_table", &pages.table(rows)).unwrap();
                driver.ordered(&format!("{name}, {rows} rows"), || {
                    run.run(3).unwrap();
                    run.step().unwrap();
                    assert_eq!(run.read("logits").unwrap().len(), rows * 128);
                });
            }
        }
        assert!(!selections.is_empty());
        // Those of another GPU are refused as what they are.
        let others = selections.to_json().replace("\"a stand-in\"", "\"another\"");
        let mut others = Selections::parse(&others).unwrap();
        match DeviceRun::with_selections(&unfused, &buckets(&[1]), &a, &mut others) {
            Err(FlashInferError::InvalidArgument { argument: "selections", found, .. }) => {
                assert!(found.contains("made on another"), "{found}");
            }
            other => panic!("{other:?}"),
        }
    });
}

/// `silu_and_mul(rmsnorm(columns of x) · weightᵀ)` of so many rows, with the norm or without, by these rules.
fn gated(rows: Dim, columns: std::ops::Range<u64>, normed: bool, rules: &[Rule]) -> Graph {
    let mut g = GraphBuilder::new("gated", 1024);
    let x = g.input("x", DType::BF16, [rows, fixed(136)], Pad::Value(1)).unwrap();
    let norm = g.weight("norm", DType::BF16, [fixed(columns.end - columns.start)]).unwrap();
    let both = g.weight("both", DType::BF16, [fixed(256), fixed(columns.end - columns.start)]).unwrap();
    let x = g.copy(&x, DType::BF16).unwrap();
    let part = x.columns(Columns::new(columns));
    let product = if normed {
        let normed = g.rmsnorm(part, &norm, 1e-6).unwrap();
        g.matmul(&normed, &both).unwrap()
    } else {
        g.matmul(part, &both).unwrap()
    };
    let gated = g.silu_and_mul(&product).unwrap();
    g.output("gated", gated).unwrap();
    let (graph, applied) = fuse(&g.finish().unwrap(), rules).unwrap();
    assert!(applied.len() >= rules.len().min(1 + usize::from(normed)), "{applied:?}");
    graph
}

fn gated_run(graph: &Graph, bucket: u64, stream: &Arc<CudaStream>) -> DeviceRun {
    let mut run = DeviceRun::new(graph, &buckets(&[bucket]), stream).unwrap();
    for tensor in graph.tensors() {
        run.weight_bytes(&tensor.name, tensor.spec.dtype, &vec![0; tensor.spec.bytes(1) as usize]).ok();
    }
    run.set_rows(bucket).unwrap();
    let x = graph.tensors().iter().find(|tensor| tensor.name == "x").unwrap();
    run.input("x", &vec![bf16::ONE; x.spec.elements(bucket) as usize]).unwrap();
    run
}

/// Where there are too many rows for one kernel, three compute it, over scratch memory.
#[test]
fn norms_and_gates_around_products_stay_within_their_memory_for_any_number_of_rows() {
    let name = "norms_and_gates_around_products_stay_within_their_memory_for_any_number_of_rows";
    with_driver(name, |driver| {
        let [a, _b] = streams();
        let rules = [Rule::GatedProduct, Rule::NormProduct];
        for (rows, bucket, kernels) in [
            (Dim::BATCH, 8, 2),
            (Dim::BATCH, 64, 4),
            (Dim::per_row(2), 8, 2),
            (Dim::per_row(2), 40, 4),
            (fixed(40), 1, 4),
            (fixed(40), 1024, 4),
            (fixed(3), 1024, 2),
        ] {
            let graph = gated(rows, 8..72, true, &rules);
            let case = format!("{rows} rows at {bucket}");
            driver.ordered(&case, || {
                let mut run = gated_run(&graph, bucket, &a);
                assert_eq!(run.kernels(bucket).unwrap(), kernels, "{case}");
                run.step().unwrap();
                run.capture().unwrap();
                run.run(2).unwrap();
            });
        }
    });
}

/// Kernels of this crate's own read 16 bytes at once.
#[test]
fn rows_of_products_that_begin_off_16_bytes_are_refused_by_name() {
    with_driver("rows_of_products_that_begin_off_16_bytes_are_refused_by_name", |driver| {
        let [a, _b] = streams();
        let mut g = GraphBuilder::new("twice", 4);
        let x = g.input("x", DType::BF16, [Dim::BATCH, fixed(136)], Pad::Value(1)).unwrap();
        let both = g.weight("both", DType::BF16, [fixed(256), fixed(64)]).unwrap();
        let x = g.copy(&x, DType::BF16).unwrap();
        // Of the same sizes.
        for (name, columns) in [("aligned", 8..72), ("off", 4..68)] {
            let product = g.matmul(x.columns(Columns::new(columns)), &both).unwrap();
            let gated = g.silu_and_mul(&product).unwrap();
            g.output(name, gated).unwrap();
        }
        let plain = g.finish().unwrap();
        for (rules, node) in [(&[][..], "node 3, matmul"), (&[Rule::GatedProduct], "node 2, matmul_silu_and_mul")] {
            let mut run = gated_run(&fuse(&plain, rules).unwrap().0, 2, &a);
            match refused(run.step()) {
                GraphError::Run { node: found, reason } => {
                    assert!(found == node && reason.contains("16 bytes"), "{found}: {reason}");
                }
                other => panic!("{other}"),
            }
        }
        driver.ordered("where all begin as they should", || {
            gated_run(&gated(Dim::BATCH, 8..72, false, &[Rule::GatedProduct]), 2, &a).step().unwrap();
        });
    });
}

/// Copies, events and waits that fail, at any time and also together: nothing is used or given back too early, and what goes well
/// again is whole.
#[test]
fn whatever_fails_in_a_run_nothing_is_used_too_early() {
    with_driver("whatever_fails_in_a_run_nothing_is_used_too_early", |driver| {
        let [a, b] = streams();
        let mut random = random(2);
        for turn in 0..120 {
            driver.ordered(&format!("turn {turn}"), || {
                let mut run = run(&a);
                run.follow("sum").unwrap();
                run.capture().unwrap();
                let mut last = None;
                for _ in 0..15 {
                    let rows = 1 + random() % 4;
                    let [copies, records, waits] = match random() % 6 {
                        0 => [0, 1, 1],
                        1 => [1, 0, 0],
                        2 => [0; 3].map(|_| (random() % 3) as i32),
                        _ => [0; 3],
                    };
                    driver.fail_copies(copies);
                    driver.fail_records(records);
                    driver.fail_waits(waits);
                    // Mostly what waits for nothing.
                    let result = match random() % 20 {
                        0 => run.set_rows(rows).map(drop),
                        1..=11 => {
                            run.set_rows(rows).unwrap();
                            let number = bf16::from_f32((random() % 100) as f32);
                            run.input("x", &vec![number; (rows * COLUMNS) as usize]).unwrap();
                            if rows.is_multiple_of(2) { run.step() } else { run.run(2) }
                        }
                        12 => run.step(),
                        13 => run.run(3),
                        14 => run.weight("first", &[bf16::ONE; COLUMNS as usize]),
                        15 => run.read("sum").map(drop),
                        16 | 17 => run.view::<bf16>("normed").map(|view| {
                            // From here on it is cudarc's.
                            driver.fail_nothing();
                            b.clone_dtoh(&view).unwrap();
                        }),
                        _ => run.next_result::<bf16>().map(|result| {
                            let step = result.map(|result| result.step);
                            assert!(step.is_none() || last < step, "{step:?} behind {last:?}");
                            last = step.or(last);
                        }),
                    };
                    let failed = copies + records + waits > 0;
                    match result {
                        Ok(()) => {}
                        Err(FlashInferError::Cuda { code: 800, .. }) if failed => {}
                        Err(error) if error.to_string().contains("800") && failed => {}
                        Err(FlashInferError::ComputeGraph(error)) if matches!(*error, GraphError::Missing { .. }) => {}
                        Err(other) => driver.fail(&format!("turn {turn}"), other),
                    }
                }
                drop(run);
                driver.fail_nothing();
            });
        }
    });
}

/// What a file says is refused, or a graph whose run stays within its memory and in order.
#[test]
fn a_graph_of_other_numbers_is_refused_or_stays_within_its_memory() {
    with_driver("a_graph_of_other_numbers_is_refused_or_stays_within_its_memory", |driver| {
        let [a, b] = streams();
        let mut random = random(1);
        let graphs = [decoder(), fuse(&decoder(), &Rule::ALL).unwrap().0, fuse(&decoder(), &Rule::STEP).unwrap().0];
        let (mut ran, mut ran_of_steps) = (0, 0);
        for turn in 0..600 {
            let json = graphs[turn % 3].json();
            let digits: Vec<usize> = json.char_indices().filter(|(_, c)| c.is_ascii_digit()).map(|(i, _)| i).collect();
            let place = digits[random() as usize % digits.len()];
            let number = if turn % 5 == 0 { random() >> (random() % 64) } else { random() % 40 };
            let changed = format!("{}{number}{}", &json[..place], &json[place + 1..]);
            let Ok(graph) = Graph::from_json(&changed) else { continue };
            let sizes = [1, graph.largest_batch().min(3)];
            let case = format!(
                "{number} at {place} of {}",
                ["the plain graph", "the fused one", "the one of steps"][turn % 3]
            );
            driver.ordered(&case, || {
                let Ok(mut run) = DeviceRun::new(&graph, &buckets(&sizes), &a) else { return };
                if graph.tensors().iter().any(|tensor| tensor.spec.bytes(4) > 1 << 22) {
                    return;
                }
                for tensor in graph.tensors() {
                    let zeros = vec![0; tensor.spec.bytes(1) as usize];
                    run.weight_bytes(&tensor.name, tensor.spec.dtype, &zeros).ok();
                }
                let captured = run.capture().is_ok();
                for rows in sizes {
                    run.set_rows(rows).unwrap();
                    for tensor in graph.tensors() {
                        let count = tensor.spec.elements(rows) as usize;
                        (0..2).for_each(|number| _ = run.input(&tensor.name, &vec![number; count]));
                    }
                    let stepped = run.step().is_ok();
                    if captured && stepped {
                        ran += 1;
                        ran_of_steps += i32::from(turn % 3 == 2);
                        run.run(2).ok();
                    }
                    for tensor in graph.tensors() {
                        run.read(&tensor.name).ok();
                        run.view::<i32>(&tensor.name).map(|view| b.clone_dtoh(&view).unwrap()).ok();
                    }
                    while run.next_result::<i32>().ok().flatten().is_some() {}
                }
            });
        }
        assert!(ran > 60 && ran_of_steps > 20, "{ran} ran, {ran_of_steps} of those of steps");
    });
}

/// The stand-in computes nothing, but that a run on the host and one on a GPU are made of one graph and one plan is seen.
#[test]
fn one_plan_serves_the_host_and_a_gpu() {
    with_driver("one_plan_serves_the_host_and_a_gpu", |_| {
        let [a, _b] = streams();
        let (graph, mut run) = (norms(), run(&a));
        let plan = Plan::new(&graph, 4).unwrap();
        assert_eq!(run.plan(4).unwrap(), &plan);
        assert_eq!(run.graph(), &graph);
        let host = HostRun::new(&graph, &plan).unwrap();
        give(&mut run, 4);
        let backends: [&dyn Backend; 2] = [&host, &run.eager()];
        assert!(backends.iter().all(|backend| backend.plan() == &plan));
    });
}
