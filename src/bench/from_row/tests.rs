//! That the facts fit their rows, and that the Python computes what the kernels' references on the host do.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::super::{Axes, Axis, Constraint, DataType, Dialect, KernelCall, Named, Verdict};
use super::{AxisKind, FAMILIES, Facts};
use crate::contract::{Dimensions, From, Kind, Operand, Role, Row, Size};
use crate::engine::Entry;
use crate::kernels;
use crate::owner::Owner;
use crate::runtime::{FlashInferRuntime, RuntimeConfig};
use crate::self_test::{Memory, encode, type_of};
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

fn facts() -> impl Iterator<Item = &'static Facts> {
    FAMILIES.iter().copied().flatten()
}

#[test]
fn every_kernel_has_facts_and_all_facts_are_a_kernels() {
    let rows: BTreeSet<_> = kernels::rows().iter().map(|row| row.kernel).collect();
    let known: BTreeSet<_> = facts().map(|facts| facts.kernel).collect();
    assert_eq!(rows, known);
    assert_eq!(facts().count(), known.len(), "a kernel has facts twice");
    let names: BTreeSet<_> = facts().map(|facts| facts.name).collect();
    assert_eq!(names.len(), known.len(), "two kernels' definitions have one name");
}

#[test]
fn every_dimension_of_a_shape_is_an_axis_and_every_axis_is_a_dimension() {
    for row in kernels::rows() {
        let facts = KernelCall::example(row).facts().unwrap();
        let is_axis = |dimension: &str| facts.axes.iter().any(|of| of.dimension == dimension);
        for (_, name, tensor) in row.tensors().filter(|(_, _, tensor)| tensor.role != Role::Workspace) {
            for size in tensor.shape {
                let (Size::Of(i) | Size::OneMore(i) | Size::Twice(i) | Size::Eighth(i)) = *size;
                let dimension = row.dimensions[i].name;
                assert!(is_axis(dimension), "{}: {name} has {dimension}", row.kernel);
            }
        }
        for of in facts.axes {
            let known = row.dimensions.iter().any(|dimension| dimension.name == of.dimension);
            // Keys that all heads share have no number.
            let of_another_form = row.kernel == "rope_quantize of shared keys" && of.dimension == "kv_heads";
            assert!(known || of_another_form, "{}: {}", row.kernel, of.dimension);
        }
    }
}

#[test]
fn every_definition_is_valid_and_its_reference_names_what_is_there() {
    for row in kernels::rows() {
        let definition = KernelCall::example(row).definition().unwrap();
        definition.validate(Dialect::FlashInferBench).unwrap();
        let code = definition.reference.unwrap();
        for (at, _) in ["DTYPE_", "AXIS_", "WORD_"].iter().flat_map(|prefix| code.match_indices(prefix)) {
            let name: String = code[at..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            assert!(code.contains(&format!("\n{name} = ")), "{}: {name} has no value", row.kernel);
        }
        let parameters = definition.inputs.names().collect::<Vec<_>>();
        let found = code.rsplit_once("\ndef run(").unwrap().1.split_once("):").unwrap().0;
        let found: Vec<_> = found.split(',').map(|word| word.split('=').next().unwrap_or("").trim()).collect();
        let found: Vec<_> = found.into_iter().filter(|word| !word.is_empty()).collect();
        assert_eq!(found, parameters, "{}", row.kernel);
    }
}

/// splitmix64
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[test]
fn constraints_hold_where_the_rows_relations_do_and_only_there() {
    let mut state = 1;
    let (mut kept, mut broken) = (0, 0);
    for row in kernels::rows() {
        for _ in 0..300 {
            let mut call = KernelCall::example(row);
            let given: Vec<i64> = row
                .dimensions
                .iter()
                .map(|dimension| {
                    let of_few = [0, 1, 2, 3, 4, 6, 8, 64, 128, 1 << 17, 1 << 20];
                    let size = of_few[next(&mut state) as usize % of_few.len()];
                    // Half of the time what tests take, which mostly fits.
                    let examples = dimension.examples;
                    match next(&mut state) % 2 {
                        0 if !examples.is_empty() => examples[next(&mut state) as usize % examples.len()],
                        // A lead without elements is a call that does nothing.
                        _ if matches!(dimension.from, From::Shape(argument, _) if argument == row.lead) => {
                            size.clamp(dimension.least.max(1), dimension.most)
                        }
                        _ => size.clamp(dimension.least, dimension.most),
                    }
                })
                .collect();
            call.dimensions = row.dimensions_from(|i| given[i]);
            let sizes = &call.dimensions;
            let within = |(d, size): (&crate::contract::Dimension, &i64)| (d.least..=d.most).contains(size);
            if !row.dimensions.iter().zip(sizes).all(within) {
                continue;
            }
            let relations = row.relations.iter().filter(|relation| !relation.only_on_gpu);
            let holds = relations.into_iter().all(|relation| (relation.holds)(sizes));
            let verdicts = verdicts(&call);
            let known = |(text, verdict): &(String, Verdict)| {
                text.contains(".item()") || !matches!(verdict, Verdict::Unknown(_))
            };
            assert!(verdicts.iter().all(known), "{}: {verdicts:?}", row.kernel);
            let fine = verdicts.iter().all(|(_, verdict)| !matches!(verdict, Verdict::Broken(_)));
            assert_eq!(fine, holds, "{}: {:?} {verdicts:?}", row.kernel, &sizes[..row.dimensions.len()]);
            if holds { kept += 1 } else { broken += 1 }
        }
    }
    assert!(kept > 1000 && broken > 1000, "{kept} {broken}");
}

/// Of the constraints, with what numbers the row has; contents are not known.
fn verdicts(call: &KernelCall) -> Vec<(String, Verdict)> {
    let (definition, row) = (call.definition().unwrap(), call.row);
    let mut axes = definition.const_axes();
    for (name, spec) in definition.inputs.iter().chain(definition.outputs.iter()) {
        let name = name.strip_prefix("new_").unwrap_or(name);
        let tensor = row.tensors().find(|(_, argument, _)| *argument == name);
        if let (Some((.., tensor)), Some(shape)) = (tensor, &spec.shape) {
            let sizes = row.shape(tensor, &call.dimensions);
            axes.extend(shape.iter().zip(sizes).map(|(axis, size)| (axis.clone(), size as u64)));
        }
    }
    for (i, dimension) in row.dimensions.iter().enumerate() {
        if let From::Number(argument) = dimension.from {
            axes.insert(row.arguments[argument].name.to_owned(), call.dimensions[i] as u64);
        }
    }
    let verdict = |text: &String| (text.clone(), Constraint::parse(text).unwrap().check(&axes, &Named::new()));
    definition.constraints.iter().map(verdict).collect()
}

#[test]
fn a_definitions_axes_are_the_calls_sizes_and_its_name_says_the_constant_ones() {
    let row = |kernel: &str| kernels::rows().into_iter().find(|row| row.kernel == kernel).unwrap();
    let name = |call: KernelCall| call.definition().unwrap().name;
    let norm = || KernelCall::example(row("rmsnorm"));
    assert_eq!(name(norm()), "rmsnorm_h1024");
    assert_eq!(name(norm().with_size("columns", 7168).unwrap()), "rmsnorm_h7168");
    assert_eq!(name(norm().with_size("rows", 99).unwrap()), "rmsnorm_h1024");
    assert_eq!(name(norm().with_dtype("input", DType::F16).unwrap()), "rmsnorm_fp16_h1024");
    let quant = KernelCall::example(row("fused_add_rmsnorm_quant"));
    assert_eq!(name(quant.with_dtype("out", DType::F8E5M2).unwrap()), "fused_add_rmsnorm_quant_fp8_e5m2_h1024");
    let gdn = KernelCall::example(row("gdn_prefill")).with_size("v_heads", 4).unwrap();
    assert_eq!(name(gdn.clone()), "gdn_prefill_q1_k1_v4_d128");
    let axes = gdn.definition().unwrap().const_axes();
    let expected = [("num_q_heads", 1), ("num_k_heads", 1), ("num_v_heads", 4), ("num_heads", 4), ("head_size", 128)];
    assert_eq!(axes, Axes::from(expected.map(|(name, size)| (name.to_owned(), size))));
    let bits = KernelCall::example(row("packbits")).with_word("bitorder", "little").unwrap();
    assert_eq!(name(bits), "packbits_little");
    assert_eq!(
        name(KernelCall::example(row("append_paged_kv_cache of heads"))),
        "append_paged_kv_cache_hnd_kv8_d128_ps16"
    );

    let refused = |result: crate::error::Result<KernelCall>| result.unwrap_err().to_string();
    assert_eq!(
        refused(norm().with_size("heads", 1)),
        "the call of rmsnorm, dimension: found \"heads\", expected one of rows, columns; see the kernel's row in \
         docs/kernels.md"
    );
    assert!(refused(norm().with_size("columns", -1)).contains("expected 0 to 2147483647"));
    assert!(refused(norm().with_dtype("weight", DType::F16)).contains("expected none: it is as input"));
    assert!(refused(norm().with_dtype("eps", DType::F16)).contains("expected one of out, input, weight"));
    assert!(refused(norm().with_word("eps", "x")).contains("expected one that is a word"));
}

#[test]
fn calls_of_one_key_have_one_definition_and_others_have_another_name() {
    let row = |kernel: &str| kernels::rows().into_iter().find(|row| row.kernel == kernel).unwrap();
    let norm = || KernelCall::example(row("rmsnorm"));
    let more = norm().with_size("rows", 77).unwrap();
    assert_eq!(norm().key(), more.key());
    assert_eq!(norm().definition().unwrap(), more.definition().unwrap());
    let others = [
        norm().with_size("columns", 8).unwrap(),
        norm().with_dtype("input", DType::F16).unwrap(),
        KernelCall::example(row("gemma_rmsnorm")),
    ];
    for other in others {
        assert_ne!(norm().key(), other.key());
        assert_ne!(norm().definition().unwrap().name, other.definition().unwrap().name);
    }
}

// The references in Python.

/// Names the folder that PyTorch was installed into.
const TORCH: &str = "FLASHINFER_RS_TORCH";

/// As many equal rows as the frequencies of tokens need.
const DRAWS: i64 = 20_000;

/// One call: with its optional tensors or without, in halves or interleaved.
#[derive(Clone, Copy)]
struct Form {
    optional: bool,
    interleave: i64,
}

fn draws(row: &Row) -> bool {
    row.arguments.iter().any(|argument| argument.name == "philox_seed")
}

fn sizes(row: &Row, form: Form) -> Dimensions {
    row.dimensions_from(|i| match (row.dimensions[i].name, row.dimensions[i].examples) {
        ("interleave", _) => form.interleave,
        ("rows" | "batch", _) if draws(row) => DRAWS,
        ("vocab", _) if draws(row) => 8,
        (_, examples) => examples.first().copied().unwrap_or(1),
    })
}

/// A number that means something to the kernel.
fn number(row: &Row, i: usize, sizes: &Dimensions) -> Operand<'static, 'static> {
    let argument = &row.arguments[i];
    match (argument.name, &argument.kind) {
        ("eps", _) => Operand::Number(1e-5),
        ("temperature", _) => Operand::Number(0.7),
        ("rope_theta", _) => Operand::Number(1e4),
        ("rope_scale", _) => Operand::Number(8.0),
        ("low_freq_factor", _) => Operand::Number(1.0),
        ("high_freq_factor", _) => Operand::Number(4.0),
        ("old_context_length", _) => Operand::Number(40.0),
        ("top_p", _) => Operand::Number(0.6),
        ("min_p", _) => Operand::Number(0.3),
        (_, Kind::Positive) => Operand::Number(0.75),
        (_, Kind::NotNegative) => Operand::Number(0.0),
        (_, Kind::Between(least, most)) => Operand::Number((least + most) / 2.0),
        ("top_k", _) if !row.dimensions.iter().any(|d| matches!(d.from, From::Number(n) if n == i)) => {
            Operand::Whole(3)
        }
        (_, Kind::Whole(..)) => Operand::Whole(row.whole(i, sizes).unwrap_or(0)),
        (_, Kind::Word(words)) => Operand::Word(words[0]),
        (_, Kind::Switch) => Operand::Bool(row.whole(i, sizes) == Some(1)),
        (_, Kind::EnablePdl) => Operand::Bool(false),
        _ => Operand::Absent,
    }
}

/// What a tensor is filled with: rows of probabilities are distributions; for a kernel that draws all are equal.
fn contents(row: &Row, i: usize, sizes: &Dimensions, memory: &mut Memory) {
    let name = row.arguments[i].name;
    let distributes = row.kernel == "top_p_renorm_probs" && name == "probs";
    if !distributes && (!draws(row) || !matches!(name, "probs" | "logits" | "draft_probs" | "target_probs")) {
        return;
    }
    let vocab = memory.shape.last().map_or(1, |&vocab| vocab as usize);
    let each = memory.values.len() / sizes[0] as usize;
    let mut first = memory.values[..each].to_vec();
    for row in first.chunks_mut(vocab) {
        if name == "logits" {
            row.iter_mut().for_each(|x| *x /= 1e9);
        } else {
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|x| *x /= sum);
        }
    }
    memory.values.chunks_mut(each).for_each(|row| row.copy_from_slice(&first));
}

/// A tensor's type, shape and bytes.
type Bytes = (DType, Vec<i64>, Vec<u8>);

fn case(entry: Entry, form: Form) -> Value {
    let (row, sizes) = (entry.row, sizes(entry.row, form));
    let mut call = KernelCall::example(row);
    call.dimensions = sizes;
    let mut memory: Vec<Option<Bytes>> = Vec::new();
    for (i, argument) in row.arguments.iter().enumerate() {
        memory.push(match &argument.kind {
            Kind::Tensor(tensor) if !tensor.optional || form.optional => {
                let dtype = type_of(row, tensor, DType::F32, DType::F32);
                let mut memory = Memory::new(tensor, i, &sizes, dtype, DType::F32);
                contents(row, i, &sizes, &mut memory);
                call.dtypes[i] = Some(dtype);
                Some((memory.dtype, memory.shape.clone(), encode(&memory.values, memory.dtype)))
            }
            _ => None,
        });
    }
    let definition = call.definition().unwrap();
    let tensor = |(dtype, shape, bytes): &Bytes, role: Role| {
        let dtype = match (dtype, role) {
            (DType::U8, Role::In) => "bool".to_owned(),
            (DType::U8, _) => "int8".to_owned(),
            (dtype, _) => DataType::from(*dtype).name().to_owned(),
        };
        json!({ "dtype": dtype, "shape": shape, "bytes": hex(bytes) })
    };
    let inputs: Vec<Value> = definition
        .inputs
        .names()
        .map(|name| {
            let i = row.arguments.iter().position(|argument| argument.name == name).unwrap();
            match (&memory[i], number(row, i, &sizes)) {
                (Some(memory), _) => tensor(memory, Role::In),
                (None, Operand::Number(value)) => json!(value),
                (None, Operand::Whole(value)) => json!(value),
                (None, Operand::Bool(value)) => json!(value),
                _ => Value::Null,
            }
        })
        .collect();
    let layouts: Vec<_> = memory
        .iter_mut()
        .map(|memory| {
            let (dtype, shape, bytes) = memory.as_mut()?;
            Some(Layout::build(bytes.as_mut_ptr().cast(), Device::Cpu, *dtype, shape, None, None))
        })
        .collect();
    const NOBODY: &Owner<'static> = &Owner::NONE;
    let operands: Vec<_> = layouts
        .iter()
        .enumerate()
        .map(|(i, layout)| match layout {
            Some(layout) => Operand::Tensor(layout, NOBODY),
            None => number(row, i, &sizes),
        })
        .collect();
    // SAFETY: the memory is this function's own, of as many elements as the row's shapes say; the reference checks what it reads
    // to find its way.
    unsafe { entry.call(&operands, Stream::NULL) }.unwrap_or_else(|error| panic!("{}: {error}", row.kernel));
    let outputs: Vec<Value> = definition
        .outputs
        .names()
        .map(|name| {
            let name = name.strip_prefix("new_").unwrap_or(name);
            let i = row.arguments.iter().position(|argument| argument.name == name).unwrap();
            let Kind::Tensor(spec) = &row.arguments[i].kind else { panic!("{name} is no tensor") };
            let mut output = tensor(memory[i].as_ref().unwrap(), spec.role);
            output["unordered"] = json!(spec.role == Role::Unordered);
            output
        })
        .collect();
    json!({ "reference": definition.reference, "inputs": inputs, "outputs": outputs, "draws": draws(row) })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs each reference and answers the error of each output: the relative one (L2), of whole numbers the part that differs, and
/// of tokens that are drawn the distance of the frequencies.
const COMPARE: &str = r#"
import json, sys
sys.path.insert(0, sys.argv[1])
import torch

torch.manual_seed(1)

def tensor(it):
    data = torch.frombuffer(bytearray.fromhex(it["bytes"]) or bytearray(8), dtype=torch.uint8)
    data = data[: len(it["bytes"]) // 2]
    return data.view(getattr(torch, it["dtype"])).reshape(it["shape"])

def error(found, expected, unordered, draws):
    assert found.shape == expected.shape and found.dtype == expected.dtype, (found, expected)
    a, b = found.double(), expected.double()
    if draws:
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        values = torch.cat([a, b]).unique()
        count = lambda x: (x[..., None] == values).double().mean(dim=0)
        return ((count(a) - count(b)).abs().sum(dim=-1) / 2).max().item()
    if unordered:
        a, b = a.sort(dim=-1).values, b.sort(dim=-1).values
    if not found.dtype.is_floating_point:
        return (a != b).double().mean().item()
    assert ((a == b) | (a.isfinite() & b.isfinite())).all()
    difference = torch.where(a == b, 0, a - b)
    size = torch.where(b.isfinite(), b, 0).norm()
    return (difference.norm() / size).item() if difference.any() else 0.0

answers = []
for case in json.load(sys.stdin):
    space = {}
    exec(case["reference"], space)
    inputs = [tensor(it) if isinstance(it, dict) else it for it in case["inputs"]]
    before = [it.clone() if isinstance(it, torch.Tensor) else it for it in inputs]
    outputs = space["run"](*inputs)
    same = lambda a, b: torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if isinstance(a, torch.Tensor) else a == b
    assert all(map(same, inputs, before)), "an input was written"
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == len(case["outputs"])
    pairs = zip(outputs, case["outputs"])
    answers.append([error(found, tensor(it), it["unordered"], case["draws"]) for found, it in pairs])
json.dump(answers, sys.stdout)
"#;

#[test]
#[ignore = "needs PyTorch: FLASHINFER_RS_TORCH names the folder that it was installed into (pip install --target)"]
fn the_python_of_every_definition_computes_what_the_reference_on_the_host_does() {
    let folder = std::env::var_os(TORCH).expect(TORCH);
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let (mut names, mut cases, mut limits) = (Vec::new(), Vec::new(), Vec::new());
    for entry in kernels::all() {
        let row = entry.row;
        let has_optional = row.tensors().any(|(_, _, tensor)| tensor.optional);
        let interleaves = row.dimensions.iter().any(|dimension| dimension.name == "interleave");
        for optional in [true, false].into_iter().take(if has_optional { 2 } else { 1 }) {
            for interleave in 0..if interleaves { 2 } else { 1 } {
                cases.push(case(entry, Form { optional, interleave }));
                names.push(format!("{} (optional tensors: {optional}, interleave: {interleave})", row.kernel));
                let eight_bit =
                    row.tensors().any(|(_, _, tensor)| matches!(tensor.dtype, crate::contract::Dtype::Eight));
                limits.push(if draws(row) {
                    0.03
                } else if eight_bit {
                    5e-3
                } else {
                    1e-5
                });
            }
        }
    }
    let mut python = Command::new("python3")
        .args(["-c", COMPARE])
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 starts");
    python.stdin.take().expect("a pipe").write_all(&serde_json::to_vec(&cases).unwrap()).expect("the cases");
    let output = python.wait_with_output().expect("python3 ends");
    assert!(output.status.success(), "python3 failed, see above");
    let answers: Vec<Vec<f64>> = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answers.len(), cases.len());
    for ((name, errors), limit) in names.iter().zip(answers).zip(limits) {
        println!("{name}: {errors:?}");
        for error in errors {
            assert!(error <= limit, "{name}: an output is off by {error}, more than {limit}");
        }
    }
}

#[test]
fn axes_of_one_kind_are_written_as_that_kind() {
    let row = kernels::rows().into_iter().find(|row| row.kernel == "silu_and_mul").unwrap();
    let definition = KernelCall::example(row).definition().unwrap();
    assert_eq!(definition.axes.get("num_tokens"), Some(&Axis::variable()));
    assert_eq!(definition.axes.get("hidden_size_times_2"), Some(&Axis::constant(2048)));
    assert_eq!(definition.constraints, ["hidden_size_times_2 == 2 * hidden_size"]);
    assert!(
        facts().all(|facts| facts.axes.iter().any(|of| of.kind == AxisKind::Var)),
        "a kernel without a variable axis"
    );
}
