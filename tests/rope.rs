//! Rotary embeddings on the host: angles, tables, and what is refused.

use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache, PagedMlaCache};
use flashinfer_rs::kernels::rope::{
    Llama31RopeOptions, RopeAppendTensors, RopeOptions, RopeQuantizeOptions, RopeQuantizeTensors,
    apply_llama31_rope_inplace, apply_llama31_rope_pos_ids_inplace, apply_rope_inplace, apply_rope_pos_ids,
    apply_rope_pos_ids_inplace, apply_rope_with_cos_sin_cache, apply_rope_with_cos_sin_cache_inplace, rope_quantize,
    rope_quantize_append_paged_kv_cache, rope_quantize_append_paged_mla_kv_cache,
};
use flashinfer_rs::{
    CosSinCache, DType, Device, FlashInferError, FlashInferRuntime, PageTable, Placed, Positions, RaggedPositions,
    Result, RopeScaling, RuntimeConfig, Stream, TensorMut, TensorRef,
};

fn start() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
}

fn names<T: std::fmt::Debug>(result: Result<T>, named: &str, says: &str) {
    match result.unwrap_err() {
        FlashInferError::InvalidArgument { argument, found, expected, .. } => {
            assert_eq!(argument, named, "found {found}, expected {expected}");
            let text = format!("{found}; expected {expected}");
            assert!(text.contains(says), "{text:?} does not say {says:?}");
        }
        other => panic!("{other}"),
    }
}

fn close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(*a) - b).abs() < 1e-5, "{i}: {a} and not {b}");
    }
}

/// Some numbers that are all different.
fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect()
}

/// Turns the pairs of one head of four elements, the frequencies being 1 and 1/100.
fn turned(head: &[f32], position: f64, interleave: bool) -> Vec<f64> {
    let x: Vec<f64> = head.iter().map(|&x| x.into()).collect();
    let (a, b) = (position, position / 100.0);
    let pair = |x: f64, y: f64, angle: f64| (x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin());
    if interleave {
        let ((x0, x1), (x2, x3)) = (pair(x[0], x[1], a), pair(x[2], x[3], b));
        vec![x0, x1, x2, x3]
    } else {
        let ((x0, x2), (x1, x3)) = (pair(x[0], x[2], a), pair(x[1], x[3], b));
        vec![x0, x1, x2, x3]
    }
}

#[test]
fn pairs_are_turned_by_position_and_frequency() {
    start();
    let positions = Positions::new(&[3, 0], 10).unwrap();
    let table = CosSinCache::new(4, 10, 1e4, RopeScaling::None).unwrap();
    let (positions, table) = (Placed::on_host(&positions).unwrap(), Placed::on_host(&table).unwrap());
    for interleave in [false, true] {
        // Two tokens with a head of queries and one of keys, of eight elements of which four are turned.
        let (q, k) = (numbers(16), numbers(32)[16..].to_vec());
        let expected = |heads: &[f32]| {
            let mut all: Vec<f64> = heads.iter().map(|&x| x.into()).collect();
            all[..4].copy_from_slice(&turned(&heads[..4], 3.0, interleave));
            all[8..12].copy_from_slice(&turned(&heads[8..12], 0.0, interleave));
            all
        };
        let (mut q_rope, mut k_rope) = (vec![f32::NAN; 16], vec![f32::NAN; 16]);
        let mut options = RopeOptions::default();
        (options.rotary_dim, options.interleave) = (Some(4), interleave);
        let shape = [2, 1, 8];
        let inputs = (TensorRef::from_slice(&q, &shape).unwrap(), TensorRef::from_slice(&k, &shape).unwrap());
        apply_rope_pos_ids(
            (
                &mut TensorMut::from_slice(&mut q_rope, &shape).unwrap(),
                &mut TensorMut::from_slice(&mut k_rope, &shape).unwrap(),
            ),
            (&inputs.0, &inputs.1),
            &positions,
            &options,
            Stream::NULL,
        )
        .unwrap();
        close(&q_rope, &expected(&q));
        close(&k_rope, &expected(&k));
        q_rope.fill(f32::NAN);
        k_rope.fill(f32::NAN);
        apply_rope_with_cos_sin_cache(
            (
                &mut TensorMut::from_slice(&mut q_rope, &shape).unwrap(),
                &mut TensorMut::from_slice(&mut k_rope, &shape).unwrap(),
            ),
            (&inputs.0, &inputs.1),
            &table,
            &positions,
            interleave,
            Stream::NULL,
        )
        .unwrap();
        close(&q_rope, &expected(&q));
        close(&k_rope, &expected(&k));
        // Onto the inputs, both ways.
        let (mut q_own, mut k_own) = (q.clone(), k.clone());
        let mut own = TensorMut::from_slice(&mut q_own, &shape).unwrap();
        let mut k_tensor = TensorMut::from_slice(&mut k_own, &shape).unwrap();
        apply_rope_pos_ids_inplace(&mut own, &mut k_tensor, &positions, &options, Stream::NULL).unwrap();
        close(&q_own, &expected(&q));
        close(&k_own, &expected(&k));
        let (mut q_own, mut k_own) = (q.clone(), k.clone());
        let mut own = TensorMut::from_slice(&mut q_own, &shape).unwrap();
        let mut k_tensor = TensorMut::from_slice(&mut k_own, &shape).unwrap();
        apply_rope_with_cos_sin_cache_inplace(&mut own, &mut k_tensor, &table, &positions, interleave, Stream::NULL)
            .unwrap();
        close(&q_own, &expected(&q));
        close(&k_own, &expected(&k));
    }
}

#[test]
fn ragged_sequences_go_on_from_their_offsets() {
    start();
    // Two tokens from position 5 on, none, and one from position 2 on.
    let sequences = RaggedPositions::new(&[0, 2, 2, 3], &[5, 9, 2]).unwrap();
    let positions = Positions::new(&[5, 6, 2], 10).unwrap();
    let (sequences, positions) = (Placed::on_host(&sequences).unwrap(), Placed::on_host(&positions).unwrap());
    let shape = [3, 2, 8];
    let apply = |call: &dyn Fn(&mut TensorMut<'_>, &mut TensorMut<'_>)| {
        let (mut q, mut k) = (numbers(48), numbers(48));
        call(&mut TensorMut::from_slice(&mut q, &shape).unwrap(), &mut TensorMut::from_slice(&mut k, &shape).unwrap());
        (q, k)
    };
    let (plain, llama) = (RopeOptions::default(), Llama31RopeOptions::default());
    let by_sequences = apply(&|q, k| apply_rope_inplace(q, k, &sequences, &plain, Stream::NULL).unwrap());
    let by_positions = apply(&|q, k| apply_rope_pos_ids_inplace(q, k, &positions, &plain, Stream::NULL).unwrap());
    assert_eq!(by_sequences, by_positions);
    assert_ne!(by_sequences.0, numbers(48));
    let by_sequences = apply(&|q, k| apply_llama31_rope_inplace(q, k, &sequences, &llama, Stream::NULL).unwrap());
    let by_positions =
        apply(&|q, k| apply_llama31_rope_pos_ids_inplace(q, k, &positions, &llama, Stream::NULL).unwrap());
    assert_eq!(by_sequences, by_positions);
}

#[test]
fn tables_have_the_angles_that_kernels_compute() {
    start();
    let positions = Positions::new(&[0, 1, 77, 2000], 4096).unwrap();
    let positions = Placed::on_host(&positions).unwrap();
    let shape = [4, 1, 64];
    let own = |call: &dyn Fn(&mut TensorMut<'_>, &mut TensorMut<'_>)| {
        let (mut q, mut k) = (numbers(256), numbers(256));
        call(&mut TensorMut::from_slice(&mut q, &shape).unwrap(), &mut TensorMut::from_slice(&mut k, &shape).unwrap());
        q.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()
    };
    let by_table = |theta: f64, scaling: RopeScaling| {
        let table = CosSinCache::new(64, 4096, theta, scaling).unwrap();
        let placed = Placed::on_host(&table).unwrap();
        let (mut q, mut k) = (numbers(256), numbers(256));
        let (mut q_tensor, mut k_tensor) =
            (TensorMut::from_slice(&mut q, &shape).unwrap(), TensorMut::from_slice(&mut k, &shape).unwrap());
        apply_rope_with_cos_sin_cache_inplace(&mut q_tensor, &mut k_tensor, &placed, &positions, false, Stream::NULL)
            .unwrap();
        q
    };
    let mut options = RopeOptions::default();
    (options.rope_scale, options.rope_theta) = (4.0, 5e5);
    let computed = own(&|q, k| apply_rope_pos_ids_inplace(q, k, &positions, &options, Stream::NULL).unwrap());
    close(&by_table(5e5, RopeScaling::Linear { factor: 4.0 }), &computed);
    let llama = Llama31RopeOptions::default();
    let computed = own(&|q, k| apply_llama31_rope_pos_ids_inplace(q, k, &positions, &llama, Stream::NULL).unwrap());
    let scaling =
        RopeScaling::Llama31 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, old_context_length: 8192.0 };
    close(&by_table(5e5, scaling), &computed);
}

fn yarn(factor: f64, attention_factor: Option<f64>) -> RopeScaling {
    RopeScaling::Yarn { factor, old_context_length: 4096.0, beta_fast: 32.0, beta_slow: 1.0, attention_factor }
}

#[test]
fn yarn_keeps_fast_frequencies_divides_slow_ones_and_lengthens_all() {
    let plain = CosSinCache::new(128, 64, 1e4, RopeScaling::None).unwrap();
    let longer = CosSinCache::new(128, 64, 1e4, yarn(16.0, Some(1.0))).unwrap();
    assert_eq!((longer.cos(9, 0), longer.sin(9, 0)), (plain.cos(9, 0), plain.sin(9, 0)));
    // The slowest turns 16 times slower.
    let slowest = 1e4f64.powf(-126.0 / 128.0) * 63.0;
    assert!((f64::from(longer.sin(63, 63)) - (slowest / 16.0).sin()).abs() < 1e-7);
    // Between both there is a blend. These numbers are those of the paper's formulas for this frequency: its number is 32, the
    // blend goes from 20 (of 32 turns) to 45 (of one).
    let frequency = 1e4f64.powf(-64.0 / 128.0);
    let low = (32.0 - 20.0) / (46.0 - 20.0);
    let expected = ((low * frequency / 16.0 + (1.0 - low) * frequency) * 63.0).sin();
    assert!((f64::from(longer.sin(63, 32)) - expected).abs() < 1e-6, "{} and not {expected}", longer.sin(63, 32));
    let scaled = CosSinCache::new(128, 64, 1e4, yarn(16.0, None)).unwrap();
    assert!((f64::from(scaled.cos(0, 0)) - (0.1 * 16f64.ln() + 1.0)).abs() < 1e-6);
    assert_eq!(CosSinCache::new(128, 64, 1e4, yarn(1.0, None)).unwrap(), plain);
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let plain = |rotary_dim, positions, theta| CosSinCache::new(rotary_dim, positions, theta, RopeScaling::None);
    names(plain(63, 10, 1e4), "rotary_dim", "even");
    names(plain(0, 10, 1e4), "rotary_dim", "2 to");
    names(plain(64, 0, 1e4), "positions", "0; expected 1 to");
    names(plain(64, i64::MAX, 1e4), "positions", "32 bits");
    names(plain(64, 10, 1.0), "rope_theta", "above 1");
    names(plain(64, 10, f64::NAN), "rope_theta", "above 1");
    let scaled = |scaling| CosSinCache::new(64, 10, 1e4, scaling);
    names(scaled(RopeScaling::Linear { factor: 0.0 }), "factor", "positive");
    names(scaled(yarn(0.5, None)), "factor", "1 or more");
    let llama = |low_freq_factor, high_freq_factor| RopeScaling::Llama31 {
        factor: 8.0,
        low_freq_factor,
        high_freq_factor,
        old_context_length: 8192.0,
    };
    names(scaled(llama(4.0, 4.0)), "high_freq_factor", "more than low_freq_factor");
    names(scaled(llama(-1.0, 4.0)), "low_freq_factor", "positive");
    names(CosSinCache::from_values(&[0.0; 63], 64), "values", "a multiple of 64");
    names(CosSinCache::from_values(&[], 64), "values", "one row or more");
    let own = CosSinCache::from_values(&numbers(128), 64).unwrap();
    assert_eq!((own.cos(1, 0), own.sin(1, 31)), (numbers(128)[64], numbers(128)[127]));
    assert!(own.cos(2, 0).is_nan() && own.cos(0, 32).is_nan(), "what the table has not is no number");
    assert!(own.cos(usize::MAX, 0).is_nan() && own.sin(0, usize::MAX).is_nan());
}

#[test]
fn positions_past_the_table_are_refused() {
    start();
    let (positions, table) =
        (Positions::new(&[1], 11).unwrap(), CosSinCache::new(4, 10, 1e4, RopeScaling::None).unwrap());
    let (mut q, mut k) = (numbers(8), numbers(8));
    let (mut q, mut k) =
        (TensorMut::from_slice(&mut q, &[1, 1, 8]).unwrap(), TensorMut::from_slice(&mut k, &[1, 1, 8]).unwrap());
    let (positions, table) = (Placed::on_host(&positions).unwrap(), Placed::on_host(&table).unwrap());
    let result = apply_rope_with_cos_sin_cache_inplace(&mut q, &mut k, &table, &positions, false, Stream::NULL);
    names(result, "pos_ids", "below 11; expected positions below 10");
}

#[test]
fn sequences_that_are_not_in_order_are_refused() {
    start();
    names(RaggedPositions::new(&[0, 3, 2], &[0, 0]), "indptr", "do not decrease");
    names(RaggedPositions::new(&[1, 3], &[0]), "indptr", "0 there");
    names(RaggedPositions::new(&[0, 3], &[0, 0]), "first_positions", "one for each of the 1 sequences");
    names(RaggedPositions::new(&[0, 3], &[-1]), "first_positions", "-1");
    names(RaggedPositions::new(&[0, 3], &[i64::from(i32::MAX) - 2]), "first_positions", "2147483647");
    let sequences = RaggedPositions::new(&[0, 2], &[0]).unwrap();
    let (mut q, mut k) = (numbers(24), numbers(24));
    let (mut q, mut k) =
        (TensorMut::from_slice(&mut q, &[3, 1, 8]).unwrap(), TensorMut::from_slice(&mut k, &[3, 1, 8]).unwrap());
    let placed = Placed::on_host(&sequences).unwrap();
    let result = apply_rope_inplace(&mut q, &mut k, &placed, &RopeOptions::default(), Stream::NULL);
    names(result, "indptr", "2 tokens; expected 3, as q has");
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    start();
    let positions = Positions::new(&[1], 8).unwrap();
    let positions = Placed::on_host(&positions).unwrap();
    let (mut q, mut k) = (numbers(8), numbers(8));
    let (mut q, mut k) =
        (TensorMut::from_slice(&mut q, &[1, 1, 8]).unwrap(), TensorMut::from_slice(&mut k, &[1, 1, 8]).unwrap());
    let mut with = |rotary_dim, rope_scale, rope_theta| {
        let mut options = RopeOptions::default();
        (options.rotary_dim, options.rope_scale, options.rope_theta) = (rotary_dim, rope_scale, rope_theta);
        apply_rope_pos_ids_inplace(&mut q, &mut k, &positions, &options, Stream::NULL)
    };
    names(with(Some(10), 1.0, 1e4), "rotary_dim", "head_dim at the most");
    names(with(Some(3), 1.0, 1e4), "rotary_dim", "an even number");
    names(with(Some(0), 1.0, 1e4), "rotary_dim", "0; expected 2");
    names(with(None, 0.0, 1e4), "rope_scale", "positive");
    names(with(None, 1.0, f64::INFINITY), "rope_theta", "positive");
    let mut llama = Llama31RopeOptions::default();
    (llama.low_freq_factor, llama.high_freq_factor) = (1.0, 1.0 + 1e-12);
    let result = apply_llama31_rope_pos_ids_inplace(&mut q, &mut k, &positions, &llama, Stream::NULL);
    names(result, "high_freq_factor", "more than low_freq_factor");
    let mut llama = Llama31RopeOptions::default();
    llama.low_freq_factor = 4.0;
    let result = apply_llama31_rope_pos_ids_inplace(&mut q, &mut k, &positions, &llama, Stream::NULL);
    names(result, "high_freq_factor", "more than low_freq_factor");
}

#[test]
fn large_numbers_are_rounded_to_the_type_that_they_are_for() {
    start();
    let positions = Positions::new(&[0], 8).unwrap();
    let table = CosSinCache::new(16, 8, 1e4, RopeScaling::None).unwrap();
    let (positions, table) = (Placed::on_host(&positions).unwrap(), Placed::on_host(&table).unwrap());
    let large = [1000f32; 16];
    // 448, the largest of the one, and 1024, next to it in the other.
    for (dtype, expected) in [(DType::F8E4M3, 0x7E), (DType::F8E5M2, 0x64)] {
        let (mut q, mut k) = ([0u8; 16], [0u8; 16]);
        let read = || TensorRef::from_slice(&large, &[1, 1, 16]).unwrap();
        let write = |bytes: &mut [u8; 16]| {
            // SAFETY: as many bytes as there are elements, which outlive the tensors.
            unsafe { TensorMut::from_raw(bytes.as_mut_ptr().cast(), Device::Cpu, dtype, &[1, 1, 16], None) }.unwrap()
        };
        let mut tensors = RopeQuantizeTensors {
            q_rope_in: read(),
            k_rope_in: read(),
            q_nope_in: None,
            k_nope_in: None,
            q_rope_out: write(&mut q),
            k_rope_out: write(&mut k),
            q_nope_out: None,
            k_nope_out: None,
        };
        rope_quantize(&mut tensors, &table, &positions, &RopeQuantizeOptions::default(), Stream::NULL).unwrap();
        assert!(q.iter().chain(&k).all(|&b| b == expected), "{dtype}: {q:x?}");
    }
}

/// A tensor of 8-bit numbers over bytes.
fn eight<'a>(bytes: &'a mut [u8], shape: &[i64]) -> TensorMut<'a> {
    assert_eq!(bytes.len() as i64, shape.iter().product::<i64>());
    // SAFETY: as many bytes as there are elements, borrowed as long as the tensor.
    unsafe { TensorMut::from_raw(bytes.as_mut_ptr().cast(), Device::Cpu, DType::F8E4M3, shape, None) }.unwrap()
}

#[test]
fn quantized_parts_are_turned_scaled_and_rounded() {
    start();
    // Ones that are not turned, at position 0, are the scale.
    let positions = Positions::new(&[0, 0], 8).unwrap();
    let table = CosSinCache::new(16, 8, 1e4, RopeScaling::None).unwrap();
    let (positions, table) = (Placed::on_host(&positions).unwrap(), Placed::on_host(&table).unwrap());
    let ones = vec![1f32; 2 * 3 * 16];
    let mut outs = [vec![0u8; 96], vec![0u8; 32], vec![0u8; 96], vec![0u8; 32]];
    let mut options = RopeQuantizeOptions::default();
    (options.quant_scale_q, options.quant_scale_kv) = (2.0, 0.5);
    for with_nope in [true, false] {
        for shared in [true, false] {
            outs.iter_mut().for_each(|out| out.fill(0));
            let [q_rope, k_rope, q_nope, k_nope] = &mut outs;
            let k_shape: &[i64] = if shared { &[2, 16] } else { &[2, 1, 16] };
            let read =
                |shape: &[i64]| TensorRef::from_slice(&ones[..shape.iter().product::<i64>() as usize], shape).unwrap();
            let mut tensors = RopeQuantizeTensors {
                q_rope_in: read(&[2, 3, 16]),
                k_rope_in: read(k_shape),
                q_nope_in: with_nope.then(|| read(&[2, 3, 16])),
                k_nope_in: with_nope.then(|| read(k_shape)),
                q_rope_out: eight(q_rope, &[2, 3, 16]),
                k_rope_out: eight(k_rope, k_shape),
                q_nope_out: with_nope.then(|| eight(q_nope, &[2, 3, 16])),
                k_nope_out: with_nope.then(|| eight(k_nope, k_shape)),
            };
            rope_quantize(&mut tensors, &table, &positions, &options, Stream::NULL).unwrap();
            // 2 and a half, in F8E4M3.
            assert!(outs[0].iter().all(|&b| b == 0x40) && outs[1].iter().all(|&b| b == 0x30), "{outs:?}");
            let (q, k) = if with_nope { (0x40, 0x30) } else { (0, 0) };
            assert!(outs[2].iter().all(|&b| b == q) && outs[3].iter().all(|&b| b == k), "{outs:?}");
        }
    }
}

#[test]
fn a_part_without_its_output_is_refused() {
    start();
    let positions = Positions::new(&[0], 8).unwrap();
    let table = CosSinCache::new(16, 8, 1e4, RopeScaling::None).unwrap();
    let (positions, table) = (Placed::on_host(&positions).unwrap(), Placed::on_host(&table).unwrap());
    let ones = vec![1f32; 16];
    let (mut q, mut k, mut q_nope) = (vec![0u8; 16], vec![0u8; 16], vec![0u8; 16]);
    let read = || TensorRef::from_slice(&ones, &[1, 1, 16]).unwrap();
    let mut tensors = RopeQuantizeTensors {
        q_rope_in: read(),
        k_rope_in: read(),
        q_nope_in: Some(read()),
        k_nope_in: Some(read()),
        q_rope_out: eight(&mut q, &[1, 1, 16]),
        k_rope_out: eight(&mut k, &[1, 1, 16]),
        q_nope_out: Some(eight(&mut q_nope, &[1, 1, 16])),
        k_nope_out: None,
    };
    let result = rope_quantize(&mut tensors, &table, &positions, &RopeQuantizeOptions::default(), Stream::NULL);
    names(result, "k_nope_out", "shape [1, 1, 16]");
}

#[test]
fn turned_keys_and_values_go_to_their_pages() {
    start();
    let mut pages = PageTable::new(2, 3, 8).unwrap();
    pages.push(&[2, 0], 1).unwrap();
    let tokens = pages.append(&[2]).unwrap();
    let table = CosSinCache::new(16, 8, 1e4, RopeScaling::None).unwrap();
    let (tokens, table) = (Placed::on_host(&tokens).unwrap(), Placed::on_host(&table).unwrap());
    let (ones, options) = (vec![1f32; 64], RopeQuantizeOptions::default());
    let (mut q, mut q_nope) = (vec![0u8; 32], vec![0u8; 32]);
    let read = |shape: &[i64]| TensorRef::from_slice(&ones[..shape.iter().product::<i64>() as usize], shape).unwrap();
    let mut tensors = RopeAppendTensors {
        q_rope_in: read(&[2, 1, 16]),
        k_rope_in: read(&[2, 1, 16]),
        q_nope_in: Some(read(&[2, 1, 16])),
        k_nope_in: Some(read(&[2, 1, 16])),
        q_rope_out: eight(&mut q, &[2, 1, 16]),
        q_nope_out: Some(eight(&mut q_nope, &[2, 1, 16])),
    };
    let positions = tokens.positions();
    for layout in [KvLayout::Nhd, KvLayout::Hnd] {
        let (mut k, mut v) = (vec![0u8; 3 * 2 * 32], vec![0u8; 3 * 2 * 32]);
        let shape = if layout == KvLayout::Nhd { [3, 2, 1, 32] } else { [3, 1, 2, 32] };
        let mut cache = PagedKvCache::new(eight(&mut k, &shape), eight(&mut v, &shape), layout).unwrap();
        let v_in = read(&[2, 1, 32]);
        rope_quantize_append_paged_kv_cache(
            &mut cache,
            &mut tensors,
            &v_in,
            &tokens,
            (&table, &positions),
            &options,
            Stream::NULL,
        )
        .unwrap();
        // The second entry of page 2 and the first of page 0.
        for entry in 0..6 {
            let (key, value) = (&k[entry * 32..][..32], &v[entry * 32..][..32]);
            let written = entry == 5 || entry == 0;
            assert!(value.iter().all(|&b| b == if written { 0x38 } else { 0 }), "{layout:?} {entry}: {value:?}");
            assert!(key[16..].iter().all(|&b| b == if written { 0x38 } else { 0 }), "{layout:?} {entry}: {key:?}");
            assert_eq!(key[..16].iter().any(|&b| b != 0 && b != 0x38), written, "{layout:?} {entry}: {key:?}");
        }
    }
    let (mut ckv, mut kpe) = (vec![0u8; 6 * 16], vec![0u8; 6 * 16]);
    let mut cache = PagedMlaCache::new(eight(&mut ckv, &[3, 2, 16]), eight(&mut kpe, &[3, 2, 16])).unwrap();
    let shared = &mut tensors;
    rope_quantize_append_paged_mla_kv_cache(&mut cache, shared, &tokens, (&table, &positions), &options, Stream::NULL)
        .unwrap();
    for entry in 0..6 {
        let written = entry == 5 || entry == 0;
        assert!(ckv[entry * 16..][..16].iter().all(|&b| b == if written { 0x38 } else { 0 }), "{entry}");
        assert_eq!(kpe[entry * 16..][..16].iter().any(|&b| b != 0), written, "{entry}");
    }
}
