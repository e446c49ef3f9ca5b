//! `FLASHINFER_RS_TRACE_DUMP`: the definitions of what is called are written, once each, and no call fails for it.

#[path = "support/native.rs"]
mod native;

use std::fs;
use std::path::Path;

use flashinfer_rs::kernels::activation::{ActivationOptions, silu_and_mul};
use flashinfer_rs::kernels::cascade::merge_state;
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors};
use flashinfer_rs::kernels::norm::{GemmaRmsnorm, NormOptions, rmsnorm};
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache, append_paged_kv_cache};
use flashinfer_rs::kernels::quantization::{BitOrder, packbits};
use flashinfer_rs::kernels::rope::{RopeOptions, apply_rope_pos_ids_inplace};
use flashinfer_rs::kernels::sampling::{SamplingContext, SamplingOptions};
use flashinfer_rs::kernels::topk::radix_topk;
use flashinfer_rs::{
    CuSeqlens, FlashInferRuntime, PageTable, Philox, Placed, Positions, Prepared, Result, RuntimeConfig, Stream,
    TensorMut, TensorRef,
};
use half::{bf16, f16};

const VARIABLE: &str = "FLASHINFER_RS_TRACE_DUMP";

fn norm<T: flashinfer_rs::Element>(one: T, rows: i64, columns: i64) -> Result<()> {
    let count = (rows * columns) as usize;
    let (input, weight, mut out) = (vec![one; count], vec![one; columns as usize], vec![one; count]);
    rmsnorm(
        &mut TensorMut::from_slice(&mut out, &[rows, columns])?,
        &TensorRef::from_slice(&input, &[rows, columns])?,
        &TensorRef::from_slice(&weight, &[columns])?,
        &NormOptions::default(),
        Stream::NULL,
    )
}

/// A call of every family on the host, some of them twice.
fn calls() -> Result<()> {
    FlashInferRuntime::initialize(RuntimeConfig::default())?;
    norm(bf16::ONE, 3, 64)?;
    norm(bf16::ONE, 5, 64)?;
    norm(f16::ONE, 1, 64)?;
    norm(1f32, 2, 32)?;
    // What does nothing calls nothing.
    norm(bf16::ONE, 0, 128)?;

    let (input, weight, mut out) = ([bf16::ONE; 8], [bf16::ONE; 8], [bf16::ONE; 8]);
    let mut out = TensorMut::from_slice(&mut out, &[1, 8])?;
    let (input, weight) = (TensorRef::from_slice(&input, &[1, 8])?, TensorRef::from_slice(&weight, &[8])?);
    let prepared = Prepared::<GemmaRmsnorm>::new(&out, &input, &weight, &NormOptions::default())?;
    prepared.launch(&mut out, &input, &weight, Stream::NULL)?;
    silu_and_mul(
        &mut TensorMut::from_slice(&mut [bf16::ONE; 4], &[1, 4])?,
        &input,
        &ActivationOptions::default(),
        Stream::NULL,
    )?;

    let (v, s, mut merged, mut merged_s) = ([bf16::ONE; 8], [0f32; 2], [bf16::ONE; 8], [0f32; 2]);
    let (v, s) = (TensorRef::from_slice(&v, &[1, 2, 4])?, TensorRef::from_slice(&s, &[1, 2])?);
    merge_state(
        &mut TensorMut::from_slice(&mut merged, &[1, 2, 4])?,
        &mut TensorMut::from_slice(&mut merged_s, &[1, 2])?,
        (&v, &s),
        (&v, &s),
        Stream::NULL,
    )?;

    let bits = [1u8, 0, 1];
    for order in [BitOrder::Big, BitOrder::Little] {
        packbits(
            &mut TensorMut::from_slice(&mut [0u8], &[1])?,
            &TensorRef::from_slice(&bits, &[3])?,
            order,
            Stream::NULL,
        )?;
    }

    let scores = [0.5f32, 3.0, -1.0, 2.0];
    radix_topk(
        &mut TensorMut::from_slice(&mut [0i32; 2], &[1, 2])?,
        &mut TensorMut::from_slice(&mut [0f32; 2], &[1, 2])?,
        &TensorRef::from_slice(&scores, &[1, 4])?,
        2,
        Stream::NULL,
    )?;
    SamplingContext::on_host().sampler()?.top_k_sampling_from_probs(
        &mut TensorMut::from_slice(&mut [0i32], &[1])?,
        &mut TensorMut::from_slice(&mut [0.5f32, 0.25, 0.125, 0.125], &[1, 4])?,
        2,
        &mut Philox::new(1),
        &SamplingOptions::default(),
    )?;

    let (mut q, mut k) = ([bf16::ONE; 32], [bf16::ONE; 16]);
    apply_rope_pos_ids_inplace(
        &mut TensorMut::from_slice(&mut q, &[2, 2, 8])?,
        &mut TensorMut::from_slice(&mut k, &[2, 1, 8])?,
        &Placed::on_host(&Positions::new(&[3, 4], 10)?)?,
        &RopeOptions::default(),
        Stream::NULL,
    )?;

    let mut table = PageTable::new(4, 3, 8)?;
    table.push(&[2], 0)?;
    let tokens = table.append(&[1])?;
    let (key, mut k, mut v) = ([bf16::ONE; 8], [bf16::ZERO; 96], [bf16::ZERO; 96]);
    let mut cache = PagedKvCache::new(
        TensorMut::from_slice(&mut k, &[3, 1, 4, 8])?,
        TensorMut::from_slice(&mut v, &[3, 1, 4, 8])?,
        KvLayout::Hnd,
    )?;
    let key = TensorRef::from_slice(&key, &[1, 1, 8])?;
    append_paged_kv_cache(&mut cache, &key, &key, &Placed::on_host(&tokens)?, Stream::NULL)?;

    let (q, mut output, mut states) = ([bf16::ONE; 256], [bf16::ZERO; 512], vec![0f32; 4 * 128 * 128]);
    let v = [bf16::ONE; 512];
    let mut tensors = GdnTensors {
        output: TensorMut::from_slice(&mut output, &[1, 4, 128])?,
        output_state: TensorMut::from_slice(&mut states, &[1, 4, 128, 128])?,
        q: TensorRef::from_slice(&q, &[1, 2, 128])?,
        k: TensorRef::from_slice(&q, &[1, 2, 128])?,
        v: TensorRef::from_slice(&v, &[1, 4, 128])?,
    };
    GdnPrefillContext::on_host().prefill(&mut tensors, &CuSeqlens::from_lengths(&[1])?, &GdnOptions::default())
}

/// Makes the calls in a process of its own, and answers what it said on stderr about definitions.
fn said(test: &str, folder: &Path) -> Vec<String> {
    let output = native::again(&std::env::current_exe().unwrap(), test, &[(VARIABLE, folder)]);
    let text = native::text(&output);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    text.lines().filter(|line| line.contains(VARIABLE)).map(str::to_owned).collect()
}

fn files(folder: &Path) -> Vec<String> {
    let mut files: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    files
}

#[cfg(not(feature = "bench"))]
#[test]
fn without_the_feature_that_has_them_it_is_said_once_and_nothing_is_written() {
    let name = "without_the_feature_that_has_them_it_is_said_once_and_nothing_is_written";
    if native::in_its_process(name) {
        return calls().unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(
        said(name, folder.path()),
        ["flashinfer-rs: FLASHINFER_RS_TRACE_DUMP: this program was built without the Cargo feature `bench` of \
          flashinfer-rs, which has the definitions; no more definitions are written"]
    );
    assert!(files(folder.path()).is_empty());
}

#[cfg(feature = "bench")]
mod written {
    use flashinfer_rs::bench::{Definition, Dialect, KernelCall};
    use flashinfer_rs::{DType, kernels};

    use super::*;

    /// The call of a kernel by its name.
    fn call(kernel: &str, sizes: &[(&str, i64)]) -> KernelCall {
        let row = kernels::rows().into_iter().find(|row| row.kernel == kernel).unwrap();
        sizes.iter().fold(KernelCall::example(row), |call, (name, size)| call.with_size(name, *size).unwrap())
    }

    /// What the calls are to leave.
    fn expected() -> Vec<Definition> {
        let norm = |columns| call("rmsnorm", &[("columns", columns)]);
        let append = [("heads", 1), ("head_dim", 8), ("page_size", 4)];
        let gdn = [("q_heads", 2), ("k_heads", 2), ("v_heads", 4)];
        let calls = [
            norm(64),
            norm(64).with_dtype("input", DType::F16).unwrap(),
            norm(32).with_dtype("input", DType::F32).unwrap(),
            call("gemma_rmsnorm", &[("columns", 8)]),
            call("silu_and_mul", &[("d", 4)]),
            call("merge_state", &[("heads", 2), ("head_dim", 4)]),
            call("packbits", &[]),
            call("packbits", &[]).with_word("bitorder", "little").unwrap(),
            call("radix_topk", &[("d", 4), ("top_k", 2)]),
            call("top_k_sampling_from_probs", &[("vocab", 4)]),
            call("apply_rope_pos_ids", &[("q_heads", 2), ("kv_heads", 1), ("head_dim", 8)]),
            call("append_paged_kv_cache of heads", &append),
            call("gdn_prefill", &gdn),
        ];
        calls.iter().map(|call| call.definition().unwrap()).collect()
    }

    #[test]
    fn every_kernel_that_is_called_leaves_its_definition() {
        let name = "written::every_kernel_that_is_called_leaves_its_definition";
        if native::in_its_process(name) {
            return calls().unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("made").join("as needed");
        assert!(said(name, &folder).is_empty());
        let mut names: Vec<_> = expected().iter().map(|definition| format!("{}.json", definition.name)).collect();
        names.sort();
        assert_eq!(files(&folder), names);
        for definition in expected() {
            let path = folder.join(format!("{}.json", definition.name));
            assert_eq!(fs::read_to_string(&path).unwrap(), definition.to_json());
            let read = Definition::read(&path).unwrap();
            assert_eq!(read, definition);
            read.validate(Dialect::FlashInfer).unwrap();
            read.validate(Dialect::FlashInferBench).unwrap();
        }
        // Again, where all of them lie already.
        assert!(said(name, &folder).is_empty());
        assert_eq!(files(&folder), names);
    }

    #[test]
    fn a_file_that_says_something_else_is_left_and_named() {
        let name = "written::a_file_that_says_something_else_is_left_and_named";
        if native::in_its_process(name) {
            return calls().unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rmsnorm_h64.json");
        fs::write(&path, "somebody's").unwrap();
        let said = said(name, folder.path());
        assert_eq!(
            said,
            [format!(
                "flashinfer-rs: FLASHINFER_RS_TRACE_DUMP: {} is there and says something else; it was left as it is. Name a \
                 folder that is empty, or move the file",
                path.display()
            )]
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "somebody's");
        assert_eq!(files(folder.path()).len(), expected().len());
    }

    #[test]
    fn where_nothing_can_be_written_it_is_said_once_and_all_calls_are_made() {
        let name = "written::where_nothing_can_be_written_it_is_said_once_and_all_calls_are_made";
        if native::in_its_process(name) {
            return calls().unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        // Not by its permissions, which root has not to keep.
        let file = folder.path().join("file");
        fs::write(&file, "no folder").unwrap();
        let said = said(name, &file);
        assert_eq!(said.len(), 1, "{said:?}");
        let begin = format!("flashinfer-rs: {VARIABLE}: making the folder {} failed (", file.display());
        assert!(said[0].starts_with(&begin), "{said:?}");
        assert!(said[0].ends_with("); name a folder that can be written; no more definitions are written"), "{said:?}");
        assert_eq!(files(folder.path()), ["file"]);
    }

    #[test]
    fn without_the_variable_or_with_an_empty_one_nothing_is_written() {
        let name = "written::without_the_variable_or_with_an_empty_one_nothing_is_written";
        if native::in_its_process(name) {
            return calls().unwrap();
        }
        assert!(said(name, Path::new("")).is_empty());
    }

    #[test]
    fn threads_that_call_at_once_write_each_definition_whole() {
        let name = "written::threads_that_call_at_once_write_each_definition_whole";
        if native::in_its_process(name) {
            FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
            return std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| (1..=32).for_each(|columns| norm(bf16::ONE, 1, columns).unwrap()));
                }
            });
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(said(name, folder.path()).is_empty());
        assert_eq!(files(folder.path()).len(), 32);
        for columns in 1..=32 {
            let expected = call("rmsnorm", &[("columns", columns)]).definition().unwrap();
            let path = folder.path().join(format!("rmsnorm_h{columns}.json"));
            assert_eq!(Definition::read(path).unwrap(), expected);
        }
    }
}
