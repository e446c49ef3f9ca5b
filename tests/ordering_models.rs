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
use flashinfer_rs::compute::{Buckets, Rule, Target, fuse};

use config::{Config, Family};
use device::Gpu;
use graph::{Options, Sampling};
use ordering::with_driver;
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
