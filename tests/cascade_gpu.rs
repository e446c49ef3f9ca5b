//! Merging attention states on a GPU, against the reference and against what is refused. `FLASHINFER_RS_RUN_GPU_TESTS=1
//! cargo test --features cudarc,cascade --test cascade_gpu` runs them.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;

use data::{Number, Random, assert_close, widened};
use flashinfer_rs::kernels::cascade::{is_supported, merge_state, merge_state_in_place, merge_states};
use flashinfer_rs::{Device, FlashInferError, Stream, TensorMut, TensorRef};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        ("two_states_merge_in_bf16", |gpu| two::<bf16>(gpu, 4e-3)),
        ("two_states_merge_in_f16", |gpu| two::<f16>(gpu, 6e-4)),
        ("a_state_merges_into_another_where_the_mask_says_so", in_place),
        ("any_number_of_states_merges", many),
        ("what_breaks_the_contract_is_refused", refused),
        ("the_gpu_is_said_to_be_supported", supported),
    ])
}

const SHAPES: [[i64; 3]; 6] = [[1, 1, 64], [7, 8, 128], [33, 32, 64], [5, 64, 128], [3, 32, 256], [2, 32, 512]];

/// Outputs and logarithms of a number of states.
fn states<T: Number>(seed: u64, count: i64, size: i64) -> (Vec<T>, Vec<f32>) {
    let mut random = Random(seed);
    (random.normal((count * size) as usize), random.normal_f32(3.0, count as usize))
}

fn two<T: Number>(gpu: &Gpu, tolerance: f64) {
    let stream = &gpu.stream;
    for shape @ [tokens, heads, size] in SHAPES {
        let rows = [tokens, heads];
        let ((v_a, s_a), (v_b, s_b)) = (states::<T>(1, tokens * heads, size), states::<T>(2, tokens * heads, size));
        let (v_a_gpu, v_b_gpu) = (stream.clone_htod(&v_a).unwrap(), stream.clone_htod(&v_b).unwrap());
        let (s_a_gpu, s_b_gpu) = (stream.clone_htod(&s_a).unwrap(), stream.clone_htod(&s_b).unwrap());
        let mut v = stream.clone_htod(&vec![T::POISON; v_a.len()]).unwrap();
        let mut s = stream.clone_htod(&vec![f32::NAN; s_a.len()]).unwrap();
        merge_state(
            &mut TensorMut::from_cudarc(stream, &mut v, &shape).unwrap(),
            &mut TensorMut::from_cudarc(stream, &mut s, &rows).unwrap(),
            (
                &TensorRef::from_cudarc(stream, &v_a_gpu, &shape).unwrap(),
                &TensorRef::from_cudarc(stream, &s_a_gpu, &rows).unwrap(),
            ),
            (
                &TensorRef::from_cudarc(stream, &v_b_gpu, &shape).unwrap(),
                &TensorRef::from_cudarc(stream, &s_b_gpu, &rows).unwrap(),
            ),
            Stream::cudarc(stream),
        )
        .unwrap();
        let (v_a, v_b) = (widened(&v_a), widened(&v_b));
        let (mut expected_v, mut expected_s) = (vec![0f32; v_a.len()], vec![0f32; s_a.len()]);
        merge_state(
            &mut TensorMut::from_slice(&mut expected_v, &shape).unwrap(),
            &mut TensorMut::from_slice(&mut expected_s, &rows).unwrap(),
            (&TensorRef::from_slice(&v_a, &shape).unwrap(), &TensorRef::from_slice(&s_a, &rows).unwrap()),
            (&TensorRef::from_slice(&v_b, &shape).unwrap(), &TensorRef::from_slice(&s_b, &rows).unwrap()),
            Stream::NULL,
        )
        .unwrap();
        let what = format!("{shape:?}");
        assert_close(&what, &widened(&stream.clone_dtoh(&v).unwrap()), &expected_v, tolerance);
        assert_close(&what, &stream.clone_dtoh(&s).unwrap(), &expected_s, 1e-5);
    }
}

fn in_place(gpu: &Gpu) {
    let (stream, shape, rows) = (&gpu.stream, [9, 4, 128], [9, 4]);
    let ((v, s), (v_other, s_other)) = (states::<bf16>(3, 36, 128), states::<bf16>(4, 36, 128));
    let mask: Vec<u8> = (0..9).map(|token| (token % 3) as u8).collect();
    for mask in [None, Some(mask)] {
        let (mut v_gpu, mut s_gpu) = (stream.clone_htod(&v).unwrap(), stream.clone_htod(&s).unwrap());
        let (other_gpu, s_other_gpu) = (stream.clone_htod(&v_other).unwrap(), stream.clone_htod(&s_other).unwrap());
        let mask_gpu = mask.as_ref().map(|mask| stream.clone_htod(mask).unwrap());
        merge_state_in_place(
            &mut TensorMut::from_cudarc(stream, &mut v_gpu, &shape).unwrap(),
            &mut TensorMut::from_cudarc(stream, &mut s_gpu, &rows).unwrap(),
            (
                &TensorRef::from_cudarc(stream, &other_gpu, &shape).unwrap(),
                &TensorRef::from_cudarc(stream, &s_other_gpu, &rows).unwrap(),
            ),
            mask_gpu.as_ref().map(|mask| TensorRef::from_cudarc(stream, mask, &[9]).unwrap()).as_ref(),
            Stream::cudarc(stream),
        )
        .unwrap();
        let (mut expected_v, mut expected_s, other) = (widened(&v), s.clone(), widened(&v_other));
        merge_state_in_place(
            &mut TensorMut::from_slice(&mut expected_v, &shape).unwrap(),
            &mut TensorMut::from_slice(&mut expected_s, &rows).unwrap(),
            (&TensorRef::from_slice(&other, &shape).unwrap(), &TensorRef::from_slice(&s_other, &rows).unwrap()),
            mask.as_ref().map(|mask| TensorRef::from_slice(mask, &[9]).unwrap()).as_ref(),
            Stream::NULL,
        )
        .unwrap();
        let found = stream.clone_dtoh(&v_gpu).unwrap();
        assert_close("v", &widened(&found), &expected_v, 4e-3);
        assert_close("s", &stream.clone_dtoh(&s_gpu).unwrap(), &expected_s, 1e-5);
        if mask.is_some() {
            assert_eq!(found[..4 * 128], v[..4 * 128], "the first token's mask is 0");
        }
    }
}

fn many(gpu: &Gpu) {
    let stream = &gpu.stream;
    // Fewer states than tokens and more: upstream has a kernel for each.
    for [tokens, count, heads, size] in [[7, 3, 8, 128], [2, 90, 4, 64], [64, 1, 2, 256], [3, 3, 5, 512]] {
        let (shape, rows) = ([tokens, count, heads, size], [tokens, count, heads]);
        let (v, s) = states::<bf16>(5, tokens * count * heads, size);
        let (v_gpu, s_gpu) = (stream.clone_htod(&v).unwrap(), stream.clone_htod(&s).unwrap());
        let out = (tokens * heads * size) as usize;
        let mut v_merged = stream.clone_htod(&vec![bf16::POISON; out]).unwrap();
        let mut s_merged = stream.clone_htod(&vec![f32::NAN; (tokens * heads) as usize]).unwrap();
        merge_states(
            &mut TensorMut::from_cudarc(stream, &mut v_merged, &[tokens, heads, size]).unwrap(),
            &mut TensorMut::from_cudarc(stream, &mut s_merged, &[tokens, heads]).unwrap(),
            (
                &TensorRef::from_cudarc(stream, &v_gpu, &shape).unwrap(),
                &TensorRef::from_cudarc(stream, &s_gpu, &rows).unwrap(),
            ),
            Stream::cudarc(stream),
        )
        .unwrap();
        let v = widened(&v);
        let (mut expected_v, mut expected_s) = (vec![0f32; out], vec![0f32; (tokens * heads) as usize]);
        merge_states(
            &mut TensorMut::from_slice(&mut expected_v, &[tokens, heads, size]).unwrap(),
            &mut TensorMut::from_slice(&mut expected_s, &[tokens, heads]).unwrap(),
            (&TensorRef::from_slice(&v, &shape).unwrap(), &TensorRef::from_slice(&s, &rows).unwrap()),
            Stream::NULL,
        )
        .unwrap();
        let what = format!("{shape:?}");
        assert_close(&what, &widened(&stream.clone_dtoh(&v_merged).unwrap()), &expected_v, 4e-3);
        assert_close(&what, &stream.clone_dtoh(&s_merged).unwrap(), &expected_s, 1e-5);
    }
}

fn refused(gpu: &Gpu) {
    let stream = &gpu.stream;
    // Each with the name of what is wrong: a head size that is not compiled, heads that do not fit a block, memory in between.
    for (shape, skip, argument) in [([1, 1, 96], 0, "head_dim"), ([1, 129, 64], 0, "heads"), ([1, 1, 64], 4, "v_a")] {
        let [tokens, heads, size]: [i64; 3] = shape;
        let (v, s) = states::<bf16>(6, tokens * heads, size + skip as i64);
        let (v_gpu, s_gpu) = (stream.clone_htod(&v).unwrap(), stream.clone_htod(&s).unwrap());
        let (mut v_merged, mut s_merged) = (v_gpu.clone(), s_gpu.clone());
        let (part, rows) = (v_gpu.slice(skip..), [tokens, heads]);
        let s_gpu = TensorRef::from_cudarc(stream, &s_gpu, &rows).unwrap();
        let whole = TensorRef::from_cudarc(stream, &v_gpu, &shape).unwrap();
        let result = merge_state(
            &mut TensorMut::from_cudarc(stream, &mut v_merged, &shape).unwrap(),
            &mut TensorMut::from_cudarc(stream, &mut s_merged, &rows).unwrap(),
            (&TensorRef::from_cudarc(stream, &part, &shape).unwrap(), &s_gpu),
            (&whole, &s_gpu),
            Stream::cudarc(stream),
        );
        let wrong = match result {
            Err(FlashInferError::InvalidArgument { argument, .. }) => argument,
            other => panic!("{shape:?}: {other:?}"),
        };
        assert_eq!(wrong, argument);
    }
}

fn supported(_: &Gpu) {
    assert!(is_supported(Device::Cuda(0)).unwrap());
}
