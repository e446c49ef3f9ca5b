//! The example's decoder on a GPU, over the stand-in for CUDA's driver of `ordering`, which computes nothing: that a prefill in chunks,
//! decoding, drawing and reading logits are calls that a run takes, in each way that it launches, and are ordered.

#[path = "../examples/decoder/config.rs"]
#[allow(dead_code, reason = "nothing is read from a file here")]
mod config;
#[path = "../examples/decoder/device.rs"]
mod device;
#[path = "../examples/decoder/fault.rs"]
mod fault;
#[path = "../examples/decoder/graph.rs"]
#[allow(dead_code, reason = "nobody names rules here")]
mod graph;
#[path = "../examples/decoder/kernels.rs"]
mod kernels;
#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;
#[path = "../examples/decoder/session.rs"]
#[allow(dead_code, reason = "nothing is given wrong here")]
mod session;
#[path = "../examples/decoder/weights.rs"]
#[allow(dead_code, reason = "weights are random here")]
mod weights;

use flashinfer_rs::DType;
use flashinfer_rs::attention::Backend;
use flashinfer_rs::compute::{AttentionKernel, Buckets, Rule, Target, fuse};

use config::{Config, Family};
use device::Gpu;
use graph::{Options, Sampling};
use kernels::{Decode, Kernels, Prefill};
use ordering::{Module, planned, with_driver};
use session::{Engine, Launch, Session};
use weights::Source;

/// Sizes that there are kernels for, and as little else as may be.
fn config() -> Config {
    let tiny = Config::tiny();
    Config { family: Family::Qwen3, hidden: 64, layers: 2, q_heads: 2, kv_heads: 1, head: 128, vocab: 128, ..tiny }
}

fn options(rules: &[Rule], sampling: Option<Sampling>) -> Options {
    Options {
        target: Target::Gpu,
        dtype: DType::BF16,
        rows: 8,
        page_size: 16,
        pages_per_row: 3,
        sequences: 3,
        rules: rules.to_vec(),
        sampling,
        residuals: false,
    }
}

#[test]
fn sequences_are_decoded_in_each_way_that_a_step_is_launched() {
    with_driver("sequences_are_decoded_in_each_way_that_a_step_is_launched", |driver| {
        let config = config();
        let drawn = Sampling { temperature: 1.0, top_k: 5, top_p: 0.9 };
        let all = &Rule::ALL[..];
        let ways = [(Launch::Eager, all, None), (Launch::Graph, all, None), (Launch::Pdl, all, None)];
        for (launch, rules, sampling) in ways.into_iter().chain([(Launch::Pdl, &[][..], Some(drawn))]) {
            driver.ordered(&format!("{launch:?}, {} rules", rules.len()), || {
                let options = Options { residuals: launch == Launch::Graph, ..options(rules, sampling) };
                let graph = fuse(&graph::build(&config, &options).unwrap(), rules).unwrap().0;
                let mut gpu = Gpu::new(&graph, &Buckets::new(&[4, 8]).unwrap(), launch).unwrap();
                Source::random(1).give(&graph, &config, None, &mut |name, tensor| gpu.weight(name, tensor)).unwrap();
                gpu.make_ready().unwrap();
                assert_eq!(gpu.rows(), 8);
                assert!(gpu.describe().contains("cuda:0"));
                let mut session = Session::new(&mut gpu, &options, 3, 1);
                for (sequence, length) in [20, 3, 8].into_iter().enumerate() {
                    session.prefill(sequence, &vec![1; length]).unwrap();
                }
                let made = session.decode(10).unwrap();
                assert!(made.len() == 10 && made.iter().all(|step| step.len() == 3));
                assert_eq!(session.output("logits").unwrap().len(), 3 * config.vocab as usize);
                let stream = session.output(&graph::residual(1));
                assert_eq!(
                    stream.ok().map(|stream| stream.len()),
                    options.residuals.then_some(3 * config.hidden as usize)
                );
                // The longest has room for 18 more.
                assert!(session.decode(19).unwrap_err().to_string().contains("48"));
                assert_eq!(session.decode(18).unwrap().len(), 18);
            });
        }
    });
}

#[test]
fn prompts_go_by_the_prefill_kernel_that_is_there_beside_either_kernel_that_decodes() {
    let name = "prompts_go_by_the_prefill_kernel_that_is_there_beside_either_kernel_that_decodes";
    with_driver(name, |driver| {
        let config = config();
        let options = options(&Rule::ALL, None);
        let graph = fuse(&graph::build(&config, &options).unwrap(), &Rule::ALL).unwrap().0;
        let buckets = Buckets::new(&[4, 8]).unwrap();
        let gpu =
            |launch, decode, prefill| kernels::gpu(&graph, &buckets, launch, Kernels { decode, prefill }).unwrap();
        let decoded = |mut gpu: Gpu| {
            Source::random(1).give(&graph, &config, None, &mut |name, tensor| gpu.weight(name, tensor)).unwrap();
            gpu.make_ready().unwrap();
            let mut session = Session::new(&mut gpu, &options, 3, 1);
            for (sequence, length) in [20, 3, 8].into_iter().enumerate() {
                session.prefill(sequence, &vec![1; length]).unwrap();
            }
            let made = session.decode(10).unwrap();
            assert!(made.len() == 10 && made.iter().all(|step| step.len() == 3));
            gpu.describe()
        };
        for launch in [Launch::Eager, Launch::Graph, Launch::Pdl] {
            for (decode, kernel) in [(Decode::Xqa, "Xqa"), (Decode::BatchDecode, "BatchDecode")] {
                driver.ordered(&format!("{launch:?} by {kernel}"), || {
                    let described = decoded(gpu(launch, decode, Prefill::Fa2));
                    assert!(described.contains(&format!("4 rows: {kernel}")), "{described}");
                    assert!(described.contains("8 rows: Fa2, kernel by kernel"), "{described}");
                });
            }
        }
        // One prompt of 20 in chunks of 8 has two of them in the bucket of prompts, one of 8 the third; each run once.
        let fa2 = Module::open(&planned(Backend::Fa2));
        assert_eq!(fa2.get("plans"), 6 * 3);
        // The first that is there.
        let auto = || gpu(Launch::Pdl, Decode::Xqa, Prefill::Auto).run.attention().of(8);
        assert_eq!(auto(), AttentionKernel::Fa3);
        assert_eq!(gpu(Launch::Pdl, Decode::Xqa, Prefill::Rows).run.attention().of(8), AttentionKernel::Xqa);
    });
}

#[test]
fn prompts_go_row_by_row_where_no_prefill_kernel_is_there() {
    with_driver("prompts_go_row_by_row_where_no_prefill_kernel_is_there", |_| {
        let config = config();
        let options = options(&[], None);
        let graph = graph::build(&config, &options).unwrap();
        let folder = std::path::PathBuf::from(std::env::var_os("LD_LIBRARY_PATH").unwrap());
        let gpu = |prefill, buckets: &[u64]| {
            let kernels = Kernels { decode: Decode::Xqa, prefill };
            kernels::gpu(&graph, &Buckets::new(buckets).unwrap(), Launch::Pdl, kernels)
        };
        // With one bucket for both there is no choice.
        assert_eq!(gpu(Prefill::Fa3, &[8]).unwrap().run.attention().of(8), AttentionKernel::Xqa);
        std::fs::remove_file(folder.join(planned(Backend::Fa3))).unwrap();
        let (fa2, away) = (folder.join(planned(Backend::Fa2)), folder.join("away"));
        std::fs::rename(&fa2, &away).unwrap();
        assert_eq!(gpu(Prefill::Auto, &[4, 8]).unwrap().run.attention().of(8), AttentionKernel::Xqa);
        // What was asked for by name is missed by its name.
        let missing = gpu(Prefill::Fa2, &[4, 8]).err().unwrap().to_string();
        assert!(missing.contains("batch_prefill"), "{missing}");
        std::fs::rename(&away, &fa2).unwrap();
        assert_eq!(gpu(Prefill::Auto, &[4, 8]).unwrap().run.attention().of(8), AttentionKernel::Fa2);
    });
}
