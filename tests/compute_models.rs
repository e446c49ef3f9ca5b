//! The example's decoders beside transformers, whose logits lie in tests/fixtures/decoder (`benches/python/decoder.py weights` and
//! `reference` wrote them); and what is said of configurations and weights that do not fit.

#[path = "../examples/decoder/config.rs"]
mod config;
#[path = "../examples/decoder/fault.rs"]
mod fault;
#[path = "../examples/decoder/gate.rs"]
#[allow(dead_code, reason = "the example makes room by it")]
mod gate;
#[path = "../examples/decoder/graph.rs"]
mod graph;
#[path = "../examples/decoder/host.rs"]
mod host;
#[path = "../examples/decoder/session.rs"]
#[allow(dead_code, reason = "the host runs a step in one way alone")]
mod session;
#[path = "../examples/decoder/weights.rs"]
mod weights;

use std::path::{Path, PathBuf};

use flashinfer_rs::compute::{HostTensor, Plan, Rule, Target, fuse, write_safetensors};
use flashinfer_rs::{DType, FlashInferRuntime, RopeScaling, RuntimeConfig};

use config::{Config, Family};
use fault::Fault;
use gate::{CONTROLS, Reference};
use graph::{Options, Sampling};
use host::Host;
use session::{Engine, Session, Slip};
use weights::{Source, Wrong};

const MODELS: [&str; 2] = ["tiny-qwen3", "tiny-llama"];

fn folder(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/decoder").join(model)
}

fn options(dtype: DType, rules: &[Rule]) -> Options {
    Options {
        target: Target::Host,
        dtype,
        rows: 8,
        page_size: 16,
        pages_per_row: 4,
        sequences: 3,
        rules: rules.to_vec(),
        sampling: None,
        residuals: false,
    }
}

fn on_host<T>(config: &Config, source: &Source, options: &Options, then: impl FnOnce(&mut Host<'_>) -> T) -> T {
    FlashInferRuntime::initialize(RuntimeConfig::default()).expect("the runtime starts");
    let graph = fuse(&graph::build(config, options).unwrap(), &options.rules).unwrap().0;
    let plan = Plan::new(&graph, options.rows).unwrap();
    plan.verify(&graph).unwrap();
    let mut host = Host::new(&graph, &plan).unwrap();
    source.give(&graph, config, None, &mut |name, tensor| host.weight(name, tensor)).unwrap();
    then(&mut host)
}

fn model(name: &str) -> (Config, Source, Vec<Reference>) {
    let folder = folder(name);
    let references = Reference::all(&folder.join("reference.safetensors")).unwrap();
    (Config::of(folder.to_str().unwrap()).unwrap(), Source::open(&folder).unwrap(), references)
}

/// How far each reference's logits are from ours, over all positions, and from transformers' own in bf16.
fn distances(name: &str, options: &Options, slip: Slip) -> Vec<(f64, f64)> {
    let (config, source, references) = model(name);
    on_host(&config, &source, options, |host| {
        let of = |reference: &Reference| {
            let mut session = Session::new(host, options, reference.sequences, 1);
            reference.together(&reference.errors(&mut session, slip).unwrap())
        };
        references.iter().map(of).collect()
    })
}

#[test]
fn both_families_compute_what_transformers_computes_fused_or_not() {
    for name in MODELS {
        for rules in [&Rule::ALL[..], &[]] {
            for (ours, _) in distances(name, &options(DType::F32, rules), Slip::None) {
                assert!(ours < 2e-6, "{name}: {ours}");
            }
        }
    }
}

#[test]
fn in_bf16_both_are_no_further_from_f32_than_transformers_is() {
    for name in MODELS {
        for (ours, theirs) in distances(name, &options(DType::BF16, &Rule::ALL), Slip::None) {
            assert!(ours <= gate::TIMES * theirs, "{name}: {ours} beside {theirs}");
        }
    }
}

/// What each reference says of each layer's residual stream: ours, and transformers' own.
fn residuals(name: &str, dtype: DType, rules: &[Rule], wrong: Option<Wrong>) -> Vec<Vec<(f64, f64)>> {
    let (config, source, references) = model(name);
    let options = Options { residuals: true, ..options(dtype, rules) };
    let graph = fuse(&graph::build(&config, &options).unwrap(), rules).unwrap().0;
    on_host(&config, &source, &options, |host| {
        if wrong.is_some() {
            source.give(&graph, &config, Some(wrong), &mut |name, tensor| host.weight(name, tensor)).unwrap();
        }
        let of = |reference: &Reference| {
            assert_eq!(reference.layers(), config.layers as usize);
            let mut session = Session::new(host, &options, reference.sequences, 1);
            reference.residuals(&mut session).unwrap()
        };
        references.iter().map(of).collect()
    })
}

#[test]
fn each_layer_leaves_what_it_leaves_in_transformers() {
    for name in MODELS {
        for rules in [&Rule::ALL[..], &[]] {
            for (ours, _) in residuals(name, DType::F32, rules, None).into_iter().flatten() {
                assert!(ours < 2e-6, "{name}: {ours}");
            }
        }
        let (_, _, references) = model(name);
        let near = |wrong| {
            let found = residuals(name, DType::BF16, &Rule::ALL, wrong);
            references.iter().zip(found).all(|(reference, found)| reference.judge_residuals(&found))
        };
        assert!(near(None) && !near(Some(Wrong::AnotherLayersNorm)), "{name}");
    }
}

#[test]
fn outputs_of_the_residual_stream_leave_every_rule_its_places() {
    let (config, ..) = model(MODELS[0]);
    for rules in [Rule::ALL.to_vec(), vec![Rule::AddNorm], vec![Rule::ResidualProduct]] {
        let applied = |residuals| {
            let options = Options { residuals, ..options(DType::BF16, &rules) };
            let (graph, applied) = fuse(&graph::build(&config, &options).unwrap(), &rules).unwrap();
            let copies = graph.nodes().iter().filter(|node| node.operation.name() == "copy").count();
            (copies, applied.iter().map(|one| one.rule).collect::<Vec<_>>())
        };
        let ((none, without), (copies, with)) = (applied(false), applied(true));
        assert_eq!((none, copies), (0, config.layers as usize));
        assert_eq!(with, without);
    }
}

#[test]
fn every_control_is_seen() {
    let options = options(DType::BF16, &Rule::ALL);
    for name in MODELS {
        let (config, source, references) = model(name);
        let graph = fuse(&graph::build(&config, &options).unwrap(), &options.rules).unwrap().0;
        let reference = references.iter().find(|reference| reference.sequences > 1).unwrap();
        on_host(&config, &source, &options, |host| {
            for (what, wrong, slip) in CONTROLS {
                let near = |host: &mut Host<'_>, wrong: Option<Wrong>, slip| {
                    source.give(&graph, &config, Some(wrong), &mut |name, tensor| host.weight(name, tensor)).unwrap();
                    let mut session = Session::new(host, &options, reference.sequences, 1);
                    reference.judge(&reference.errors(&mut session, slip).unwrap(), false)
                };
                assert!(!near(host, wrong, slip), "{name}: {what}");
                assert!(near(host, None, Slip::None), "{name}, behind {what}");
            }
        });
    }
}

#[test]
fn a_prompt_is_the_same_by_one_token_a_step_and_by_chunks() {
    let (config, source, _) = model(MODELS[0]);
    let prompt: Vec<i32> = (0..21).map(|i| i * 7 % 160).collect();
    let decoded = |rows| {
        let options = Options { rows, sequences: 1, ..options(DType::BF16, &Rule::ALL) };
        on_host(&config, &source, &options, |host| {
            let mut session = Session::new(host, &options, 1, 1);
            let first = session.prefill(0, &prompt).unwrap();
            let made = session.decode(9).unwrap();
            (first, made, session.output("logits").unwrap().iter().map(|logit| logit.to_bits()).collect::<Vec<_>>())
        })
    };
    assert_eq!(decoded(1), decoded(8));
}

#[test]
fn tokens_are_drawn_by_the_seed_alone() {
    let (config, source, _) = model(MODELS[1]);
    let sampling = Sampling { temperature: 1.0, top_k: 20, top_p: 0.95 };
    let options = Options { sampling: Some(sampling), ..options(DType::F32, &Rule::ALL) };
    let drawn = |seed| {
        on_host(&config, &source, &options, |host| {
            let mut session = Session::new(host, &options, 2, seed);
            let first = [session.prefill(0, &[1, 2, 3]).unwrap(), session.prefill(1, &[4, 5]).unwrap()];
            (first, session.decode(8).unwrap())
        })
    };
    assert_eq!(drawn(5), drawn(5));
    assert_ne!(drawn(5), drawn(6));
}

#[test]
fn a_context_that_is_too_long_is_refused_before_a_step_runs() {
    let (config, source, _) = model(MODELS[0]);
    let options = options(DType::F32, &Rule::ALL);
    on_host(&config, &source, &options, |host| {
        let mut session = Session::new(host, &options, 1, 1);
        let error = session.prefill(0, &[1; 65]).unwrap_err().to_string();
        assert!(error.contains("65") && error.contains("64"), "{error}");
        session.prefill(0, &[1; 60]).unwrap();
        let error = session.decode(5).unwrap_err().to_string();
        assert!(error.contains("65") && error.contains("64"), "{error}");
        assert_eq!(session.decode(4).unwrap().len(), 4);
    });
}

// Configurations.

fn text(model: &str) -> String {
    std::fs::read_to_string(folder(model).join("config.json")).unwrap()
}

fn refused<T>(result: Result<T, Fault>) -> String {
    result.err().expect("it was taken").to_string()
}

#[test]
fn a_configuration_is_read_as_transformers_4_and_5_write_it() {
    let config = Config::parse(&text("tiny-llama")).unwrap();
    let scaling =
        RopeScaling::Llama31 { factor: 4.0, low_freq_factor: 1.0, high_freq_factor: 4.0, old_context_length: 32.0 };
    assert_eq!((config.family, config.tied, config.rope_theta), (Family::Llama, false, 10_000.0));
    assert_eq!(config.rope_scaling, scaling);
    let four = r#"{"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "tie_word_embeddings": true,
        "max_position_embeddings": 131072, "hidden_act": "silu", "torch_dtype": "bfloat16"}"#;
    let read = Config::parse(four).unwrap();
    let built_in = Config::llama_32_1b();
    assert_eq!(Config { name: built_in.name.clone(), ..read }, built_in);
    assert_eq!(built_in.parameters(), 1_235_814_400);
    assert_eq!(2 * built_in.kv_numbers(), 32_768);
    assert_eq!(Config::qwen3_06b().parameters(), 596_049_920);
}

#[test]
fn a_configuration_that_this_graph_is_not_says_what_is_wrong() {
    let text = text("tiny-qwen3");
    for (from, to, expected) in [
        ("\"qwen3\"", "\"gemma3\"", "model_type is gemma3, expected llama or qwen3"),
        ("\"attention_bias\": false", "\"attention_bias\": true", "attention_bias is true, expected false"),
        ("\"silu\"", "\"gelu\"", "hidden_act is \"gelu\""),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "num_key_value_heads is 3, expected a divisor"),
        ("\"hidden_size\": 32", "\"hidden_size\": 0", "hidden_size is 0, expected a whole number"),
        ("\"vocab_size\"", "\"vocabulary\"", "vocab_size is nothing"),
        ("\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": \"small\"", "rms_norm_eps is \"small\""),
        ("\"default\"", "\"yarn\"", "rope_type is yarn"),
        ("{", "{{", "it is no JSON"),
    ] {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        let error = refused(Config::parse(&changed));
        assert!(error.contains(expected) && error.contains(';'), "{error}");
    }
    assert!(refused(Config::of("/there/is/none")).contains("name a config.json"));
}

// Weights.

fn given(source: &Source, config: &Config) -> Result<(), Fault> {
    let graph = graph::build(config, &options(DType::BF16, &[])).unwrap();
    source.give(&graph, config, None, &mut |_, _| Ok(()))
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name_with_what_to_do() {
    let (config, source, _) = model("tiny-qwen3");
    given(&source, &config).unwrap();
    let error = refused(given(&source, &Config { tied: false, ..config.clone() }));
    assert!(error.contains("no lm_head.weight") && error.contains("tie_word_embeddings"), "{error}");
    let error = refused(given(&source, &Config { inner: 56, ..config.clone() }));
    assert!(error.contains("gate_proj") && error.contains("[48, 32]") && error.contains("[56, 32]"), "{error}");
    let error = refused(given(&source, &Config { layers: 3, ..config.clone() }));
    assert!(error.contains("model.layers.2."), "{error}");
    assert!(refused(Source::open(Path::new("/there/is/none"))).contains("leave --weights away"));

    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("model.safetensors");
    let whole = HostTensor::zeros(DType::I32.into(), &[160, 32]).unwrap();
    write_safetensors(&path, &[("model.embed_tokens.weight", &whole)]).unwrap();
    let error = refused(given(&Source::open(temporary.path()).unwrap(), &config));
    assert!(error.contains("int32") && error.contains("not quantized"), "{error}");
}

#[test]
fn weights_of_several_files_are_found_by_their_index() {
    let (config, _, _) = model("tiny-qwen3");
    let temporary = tempfile::tempdir().unwrap();
    let whole = flashinfer_rs::compute::Safetensors::open(folder("tiny-qwen3").join("model.safetensors")).unwrap();
    let names: Vec<String> = whole.names().map(str::to_owned).collect();
    let mut map = Vec::new();
    for (i, half) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("model-{i}.safetensors");
        let tensors: Vec<_> = half.iter().map(|name| (name.as_str(), whole.read(name).unwrap())).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        write_safetensors(temporary.path().join(&file), &tensors).unwrap();
        map.extend(half.iter().map(|name| format!("{name:?}: {file:?}")));
    }
    let index = temporary.path().join("model.safetensors.index.json");
    std::fs::write(&index, format!("{{\"weight_map\": {{{}}}}}", map.join(", "))).unwrap();
    given(&Source::open(temporary.path()).unwrap(), &config).unwrap();
    std::fs::write(&index, r#"{"weight_map": {"a": "../b.safetensors"}}"#).unwrap();
    assert!(refused(Source::open(temporary.path())).contains("is no file's name"));
}

#[test]
fn random_weights_are_those_of_their_seed_and_name() {
    let config = Config::tiny();
    let numbers = |seed| {
        let mut all = Vec::new();
        let graph = graph::build(&config, &options(DType::F32, &[])).unwrap();
        let source = Source::random(seed);
        source
            .give(&graph, &config, None, &mut |name, tensor| {
                all.push((name.to_owned(), (0..tensor.numel()).map(|i| tensor.float(i)).collect::<Vec<_>>()));
                Ok(())
            })
            .unwrap();
        all
    };
    let (one, two) = (numbers(1), numbers(2));
    assert_eq!(one, numbers(1));
    for ((name, one), (_, two)) in one.iter().zip(&two) {
        assert_eq!(one == two, name.ends_with("norm.weight") || name == graph::COS_SIN, "{name}");
        if name.ends_with("proj.weight") {
            let spread = (one.iter().map(|x| f64::from(x * x)).sum::<f64>() / one.len() as f64).sqrt();
            assert!((spread - 0.02).abs() < 0.002, "{name}: {spread}");
        }
    }
}

#[test]
fn rules_are_chosen_by_their_names() {
    assert_eq!(graph::rules("all"), Some(Rule::ALL.to_vec()));
    assert_eq!(graph::rules("none"), Some(Vec::new()));
    assert_eq!(graph::rules("add,pack"), Some(vec![Rule::PackProducts, Rule::AddNorm]));
    assert_eq!(graph::rules("-qk").map(|rules| rules.len()), Some(6));
    assert_eq!((graph::rules("packs"), graph::rules("-qk,add")), (None, None));
    assert_eq!(
        (graph::rules("step"), graph::rules("step,all")),
        (Some(Rule::STEP.to_vec()), Some(Rule::STEP.to_vec()))
    );
    assert_eq!(graph::rules("step,-attention"), Some(Rule::ALL.to_vec()));
    assert_eq!(
        (graph::rules("attention"), graph::rules("step,attention")),
        (Some(Vec::new()), Some(vec![Rule::AppendAttention]))
    );
    assert_eq!((graph::rules("step,"), graph::rules("steps")), (None, None));
}
