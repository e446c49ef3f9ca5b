//! What only the inside can be tested for.

use super::*;
use crate::tensor::DType;

/// A chain of three values, of which each is overwritten once.
fn chain() -> Graph {
    let mut g = GraphBuilder::for_target("chain", 4, Target::Host);
    let x = g.input("x", DType::F32, [Dim::BATCH, Dim::fixed(64)], Pad::Value(0)).unwrap();
    let a = g.copy(&x, DType::F32).unwrap();
    let b = g.copy(&a, DType::F32).unwrap();
    let c = g.add(b, &a).unwrap();
    let d = g.copy(&c, DType::F32).unwrap();
    g.output("d", d).unwrap();
    g.finish().unwrap()
}

fn fault(plan: &Plan, graph: &Graph) -> String {
    match plan.verify(graph) {
        Err(crate::FlashInferError::ComputeGraph(error)) => match *error {
            GraphError::WrongPlan { problem, .. } => problem,
            other => panic!("{other}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_verifier_finds_every_planted_fault() {
    let graph = chain();
    let plan = Plan::new(&graph, 4).unwrap();
    plan.verify(&graph).unwrap();
    let values: Vec<usize> = (0..graph.tensors().len()).filter(|&i| plan.span(i).is_some()).collect();
    let with = |change: &dyn Fn(&mut Plan)| {
        let mut plan = plan.clone();
        change(&mut plan);
        fault(&plan, &graph)
    };
    let place = |plan: &mut Plan, value: usize, offset: u64| plan.spans[value].as_mut().unwrap().offset = offset;

    // Two values that live at once.
    let other = plan.span(values[1]).unwrap().offset;
    assert!(with(&|plan| place(plan, values[0], other)).contains("share memory"));
    assert!(with(&|plan| place(plan, values[0], 1)).contains("no multiple of 256"));
    assert!(with(&|plan| place(plan, values[0], plan.sizes.planned)).contains("behind the arena"));
    assert!(with(&|plan| plan.sizes.planned -= 1).contains("behind the arena"));
    assert!(with(&|plan| plan.spans[values[0]].as_mut().unwrap().bytes = 4).contains("needs"));
    assert!(with(&|plan| plan.spans[values[0]] = None).contains("no place"));
    assert!(with(&|plan| plan.spans[0] = Some(Span { offset: 0, bytes: 256 })).contains("needs none"));
    assert!(with(&|plan| plan.workspaces[0] = Some(Span { offset: 0, bytes: 256 })).contains("does not need"));
    assert!(with(&|plan| _ = plan.edges.remove(1)).contains("does not wait for"));
    assert!(with(&|plan| plan.order.swap(0, 1)).contains("against the order"));
    assert!(with(&|plan| plan.order[0] = 1).contains("twice"));
    assert!(with(&|plan| _ = plan.order.pop()).contains("another graph"));
    // The output must stay.
    let mut ended = graph.clone();
    ended.outputs.push(values[0]);
    assert!(fault(&plan, &ended).contains("share memory"));
}

/// The host's run of a plan, or what stopped it.
fn run(graph: &Graph, plan: &Plan) -> crate::Result<Vec<f64>> {
    crate::FlashInferRuntime::initialize(crate::RuntimeConfig::default())?;
    let mut run = HostRun::new(graph, plan)?;
    let values: Vec<f64> = (0..256).map(|i| f64::from(i) * 0.25).collect();
    run.input("x", &values)?;
    run.run()?;
    run.read("d")
}

#[test]
fn a_run_on_the_host_finds_memory_that_is_shared_too_early() {
    let graph = chain();
    let plan = Plan::new(&graph, 4).unwrap();
    let expected = run(&graph, &plan).unwrap();
    assert_eq!(expected[..3], [0.0, 0.5, 1.0]);
    let values: Vec<usize> = (0..graph.tensors().len()).filter(|&i| plan.span(i).is_some()).collect();
    let mut found = 0;
    for &moved in &values {
        for &onto in &values {
            let mut plan = plan.clone();
            plan.spans[moved] = plan.spans[onto];
            let proven = plan.verify(&graph).is_ok();
            match run(&graph, &plan) {
                Ok(values) if values == expected => assert!(proven, "{moved} onto {onto} did no harm, and was refused"),
                _ => {
                    assert!(!proven, "{moved} onto {onto} did harm, and was proven");
                    found += 1;
                }
            }
        }
    }
    // Two pairs of the three values live at once, each told twice.
    assert_eq!(found, 4);
}

#[test]
fn a_run_names_the_node_that_reads_memory_which_was_taken_away() {
    let graph = chain();
    let mut plan = Plan::new(&graph, 4).unwrap();
    let values: Vec<usize> = (0..graph.tensors().len()).filter(|&i| plan.span(i).is_some()).collect();
    // The second copy is made in the first one's place, which the sum still needs.
    plan.spans[values[1]] = plan.spans[values[0]];
    match run(&graph, &plan) {
        Err(crate::FlashInferError::ComputeGraph(error)) => match *error {
            GraphError::NotFinite { node, value, .. } => {
                assert_eq!(node, "node 1, copy");
                assert!(value.is_nan());
            }
            other => panic!("{other}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_kernel_that_does_not_wait_never_starts_early() {
    let mut g = GraphBuilder::new("early", 4);
    let x = g.input("x", DType::BF16, [Dim::BATCH, Dim::fixed(256)], Pad::Value(0)).unwrap();
    let positions = g.input("positions", DType::I32, [Dim::BATCH], Pad::Value(0)).unwrap();
    let norm = g.weight("norm", DType::BF16, [Dim::fixed(256)]).unwrap();
    let cos_sin = g.weight("cos_sin", DType::F32, [Dim::fixed(40), Dim::fixed(128)]).unwrap();
    let a = g.rmsnorm(&x, &norm, 1e-6).unwrap();
    let b = g.rmsnorm(&a, &norm, 1e-6).unwrap();
    let (queries, keys) = (Columns::new(0..128).heads(1), Columns::new(128..256).heads(1));
    let c = g.rope(b, [queries, keys], &cos_sin, &positions, false).unwrap();
    g.output("c", c).unwrap();
    let graph = g.finish().unwrap();
    let mut plan = Plan::new(&graph, 1).unwrap();
    assert_eq!(plan.edges().iter().map(|edge| edge.link).collect::<Vec<_>>(), [Link::Programmatic, Link::Full]);
    plan.verify(&graph).unwrap();
    plan.edges[1].link = Link::Programmatic;
    assert!(fault(&plan, &graph).contains("may start before"));
}
