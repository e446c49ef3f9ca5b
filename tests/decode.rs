//! Kernels of a decode step without a GPU: numbers on the host against plain loops, what is refused, and what is launched over
//! a CUDA runtime that launches nothing.

#[path = "support/failing.rs"]
mod failing;
#[path = "support/native.rs"]
mod native;

use flashinfer_rs::kernels::decode::{
    Among, Appended, DecodeOptions, HeadNorm, Step, add, advance, argmax, copy, embedding, is_supported, mul,
    qk_norm_rope_append, rope_append, sample, sigmoid_gate, silu, softmax_rows,
};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, Result, RuntimeConfig, Stream, TensorMut, TensorRef,
};
use half::{bf16, f16};

const HOST: Stream<'static> = Stream::NULL;

fn options() -> DecodeOptions {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    DecodeOptions::default()
}

fn near(found: &[f32], expected: &[f64]) -> bool {
    let near =
        |(found, expected): (&f32, &f64)| (f64::from(*found) - expected).abs() <= 1e-6 * expected.abs().max(1e-3);
    found.len() == expected.len() && found.iter().zip(expected).all(near)
}

/// What a call was refused for: the argument, and what was expected of it.
fn refused(result: Result<()>) -> (&'static str, String) {
    match result {
        Err(FlashInferError::InvalidArgument { argument, expected, .. }) => (argument, expected),
        other => panic!("{other:?}"),
    }
}

/// What a reference raised.
fn raised(result: Result<()>) -> String {
    match result {
        Err(FlashInferError::TvmFfiCall { kind, message, .. }) => format!("{kind}: {message}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn rows_are_gathered_by_their_ids_and_scaled() {
    let options = options();
    let table: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let table = TensorRef::from_slice(&table, &[4, 3]).unwrap();
    let gather = |ids: [i32; 2]| {
        let mut out = [f32::NAN; 6];
        let result = embedding(
            &mut TensorMut::from_slice(&mut out, &[2, 3]).unwrap(),
            &TensorRef::from_slice(&ids, &[2]).unwrap(),
            &table,
            0.5,
            &options,
            HOST,
        );
        (result, out)
    };
    let (result, out) = gather([3, 1]);
    result.unwrap();
    assert_eq!(out, [4.5, 5.0, 5.5, 1.5, 2.0, 2.5]);
    for wrong in [4, -1, i32::MIN, i32::MAX] {
        let (result, out) = gather([0, wrong]);
        let message = raised(result);
        assert!(message.contains("IndexError") && message.contains(&format!("{wrong} at [1]")), "{message}");
        assert!(out.iter().all(|x| x.is_nan()), "written before all ids were looked at");
    }
}

#[test]
fn elements_are_added_multiplied_gated_and_activated() {
    let options = options();
    let (a, b) = ([1.0f32, -2.0, 0.25, 3.0], [0.5f32, 4.0, -1.0, 0.0]);
    let with = |f: fn(&mut TensorMut<'_>, &TensorRef<'_>, &DecodeOptions, Stream<'_>) -> Result<()>| {
        let mut out = a;
        f(
            &mut TensorMut::from_slice(&mut out, &[2, 2]).unwrap(),
            &TensorRef::from_slice(&b, &[2, 2]).unwrap(),
            &options,
            HOST,
        )
        .unwrap();
        out
    };
    assert_eq!(with(add), [1.5, 2.0, -0.75, 3.0]);
    assert_eq!(with(mul), [0.5, -8.0, -0.25, 0.0]);
    let gated = |(a, b): (&f32, &f32)| f64::from(*a) / (1.0 + (-f64::from(*b)).exp());
    assert!(near(&with(sigmoid_gate), &a.iter().zip(&b).map(gated).collect::<Vec<_>>()));
    let mut out = a;
    silu(&mut TensorMut::from_slice(&mut out, &[2, 2]).unwrap(), &options, HOST).unwrap();
    assert!(near(&out, &a.iter().zip(&a).map(gated).collect::<Vec<_>>()));
}

#[test]
fn columns_of_a_larger_tensor_are_changed_and_nothing_beside_them() {
    let options = options();
    let mut all = [1.0f32; 15];
    let b = [10.0f32, 20.0, 30.0];
    // SAFETY: rows of five numbers, of which the middle three are seen; `b` is repeated.
    unsafe {
        let at = all.as_mut_ptr().add(1).cast();
        let mut a = TensorMut::from_raw(at, Device::Cpu, DType::F32, &[3, 3], Some(&[5, 1])).unwrap();
        let b = TensorRef::from_raw(b.as_ptr().cast(), Device::Cpu, DType::F32, &[3, 3], Some(&[0, 1])).unwrap();
        add(&mut a, &b, &options, HOST).unwrap();
    }
    assert_eq!(all, [[1.0, 11.0, 21.0, 31.0, 1.0]; 3].concat()[..]);
}

#[test]
fn copies_are_rounded_once_and_those_of_the_same_type_not_at_all() {
    let options = options();
    let input = [1.0f32, 1.003_906_3, 1.011_718_8, 1e-8, 70_000.0, f32::INFINITY];
    let from = TensorRef::from_slice(&input, &[2, 3]).unwrap();
    let mut halves = [bf16::ZERO; 6];
    copy(&mut TensorMut::from_slice(&mut halves, &[2, 3]).unwrap(), &from, &options, HOST).unwrap();
    assert_eq!(halves, input.map(bf16::from_f32));
    let mut halves = [f16::ZERO; 6];
    copy(&mut TensorMut::from_slice(&mut halves, &[2, 3]).unwrap(), &from, &options, HOST).unwrap();
    assert_eq!(halves, input.map(f16::from_f32));
    let odd = [f16::from_bits(0x7E01), f16::from_bits(0x8000), f16::from_bits(1)];
    let mut same = [f16::ZERO; 3];
    let mut out = TensorMut::from_slice(&mut same, &[1, 3]).unwrap();
    copy(&mut out, &TensorRef::from_slice(&odd, &[1, 3]).unwrap(), &options, HOST).unwrap();
    assert_eq!(same.map(f16::to_bits), odd.map(f16::to_bits));
}

#[test]
fn rows_become_distributions_and_a_temperature_flattens_them() {
    let options = options();
    let x = [1000.0f32, 1001.0, 999.0, f32::NEG_INFINITY];
    let of = |temperature: f64| {
        let mut row = x;
        softmax_rows(&mut TensorMut::from_slice(&mut row, &[1, 4]).unwrap(), temperature, &options, HOST).unwrap();
        row
    };
    for temperature in [1.0, 2.0, 0.25] {
        let weights: Vec<f64> = x.iter().map(|x| ((f64::from(*x) - 1001.0) / temperature).exp()).collect();
        let sum: f64 = weights.iter().sum();
        assert!(near(&of(temperature), &weights.iter().map(|w| w / sum).collect::<Vec<_>>()));
    }
    let mut none = [f32::NEG_INFINITY; 2];
    softmax_rows(&mut TensorMut::from_slice(&mut none, &[1, 2]).unwrap(), 1.0, &options, HOST).unwrap();
    assert!(none.iter().all(|x| x.is_nan()));
}

fn largest(logits: &[f32]) -> i32 {
    let mut token = [-1i32];
    argmax(
        &mut TensorMut::from_slice(&mut token, &[1]).unwrap(),
        &TensorRef::from_slice(logits, &[1, logits.len() as i64]).unwrap(),
        &options(),
        HOST,
    )
    .unwrap();
    token[0]
}

#[test]
fn the_first_of_the_largest_is_found_and_nan_counts_as_less_than_all() {
    let (nan, less) = (f32::NAN, f32::NEG_INFINITY);
    assert_eq!(largest(&[1.0, 3.0, 3.0, 2.0]), 1);
    assert_eq!(largest(&[-3.0, -1.0, -2.0]), 1);
    assert_eq!(largest(&[nan, -5.0, nan]), 1);
    assert_eq!(largest(&[less, less]), 0);
    assert_eq!(largest(&[nan, less]), 0);
    assert_eq!(largest(&[-0.0, 0.0]), 0, "both are 0");
    assert_eq!(largest(&[7.0]), 0);
}

#[test]
fn the_next_step_follows_and_ends_where_the_pages_do() {
    let options = options();
    let token = [7i32, 8, 9, 10, 11];
    let (mut ids, mut positions, mut lengths) =
        ([-1i32; 5], [0i32, 10, 11, -5, i32::MAX], [1i32, 11, 12, -5, i32::MAX]);
    let mut step = Step {
        ids: TensorMut::from_slice(&mut ids, &[5]).unwrap(),
        positions: TensorMut::from_slice(&mut positions, &[5]).unwrap(),
        lengths: TensorMut::from_slice(&mut lengths, &[5]).unwrap(),
    };
    let token = TensorRef::from_slice(&token, &[5]).unwrap();
    advance(&token, &mut step, 12, &options, HOST).unwrap();
    assert_eq!(refused(advance(&token, &mut step, 0, &options, HOST)).0, "capacity");
    assert_eq!(ids, [7, 8, 9, 10, 11]);
    assert_eq!(positions, [1, 11, 11, 0, 11]);
    assert_eq!(lengths, [2, 12, 12, 1, 12]);
}

fn drawn(probs: &[f32], numbers: &[f32], among: Among) -> Vec<i32> {
    let rows = numbers.len() as i64;
    let mut token = vec![-1i32; numbers.len()];
    // SAFETY: one row that is repeated.
    let probs = unsafe {
        let shape = [rows, probs.len() as i64];
        TensorRef::from_raw(probs.as_ptr().cast(), Device::Cpu, DType::F32, &shape, Some(&[0, 1])).unwrap()
    };
    let (mut out, number) =
        (TensorMut::from_slice(&mut token, &[rows]).unwrap(), TensorRef::from_slice(numbers, &[rows]).unwrap());
    sample(&mut out, &probs, &number, among, &options(), HOST).unwrap();
    token
}

#[test]
fn numbers_that_are_spread_evenly_draw_as_often_as_the_probabilities_say() {
    let probs = [0.125f32, 0.0, 0.5, 0.25, 0.125];
    let numbers: Vec<f32> = (0..4096).map(|i| i as f32 / 4096.0).collect();
    let counts = |among| {
        let drawn = drawn(&probs, &numbers, among);
        assert!(drawn.is_sorted(), "a larger number is a later token");
        [0, 1, 2, 3, 4].map(|token| drawn.iter().filter(|drawn| **drawn == token).count())
    };
    assert_eq!(counts(Among::default()), [512, 0, 2048, 1024, 512]);
    assert_eq!(counts(Among::new(1, 0.0)), [0, 0, 4096, 0, 0]);
    // Of the two that are alike the first is among the three likeliest: sevenths of what is left.
    assert_eq!(counts(Among::new(3, 0.0)), [586, 0, 2340, 1170, 0]);
    // What is ahead of a token sums to less: 0.5 is not less than 0.5.
    assert_eq!(counts(Among::new(0, 0.5)), [0, 0, 4096, 0, 0]);
    assert_eq!(counts(Among::new(0, 0.5001)).map(|n| n > 0), [false, false, true, true, false]);
    assert_eq!(counts(Among::new(0, 1.0)), [512, 0, 2048, 1024, 512]);
    assert_eq!(counts(Among::new(2, 0.5)), [0, 0, 4096, 0, 0]);
}

#[test]
fn numbers_and_probabilities_that_are_none_draw_all_the_same() {
    let all = Among::default();
    assert_eq!(drawn(&[0.25, 0.75, 0.0], &[1.0, 2.0, -1.0, f32::NAN], all), [1, 1, 0, 0]);
    assert_eq!(drawn(&[0.0, 0.0], &[0.5], all), [0]);
    assert_eq!(drawn(&[f32::NAN, -1.0, 0.5], &[0.0], all), [2]);
    assert_eq!(drawn(&[f32::INFINITY, 1.0], &[0.0, 0.75], all), [0, 1]);
    assert_eq!(drawn(&[0.25, 0.75], &[0.5], Among::new(9, 0.0)), [1], "more than there are");
}

/// A step of a paged cache: two rows, three heads of queries and one of keys and of values, packed in one tensor.
struct Case {
    qkv: Vec<f32>,
    angles: Vec<f32>,
    weights: [Vec<f32>; 2],
    positions: [i32; 2],
    table: [i32; 6],
    caches: [Vec<f32>; 2],
}

const ROWS: usize = 2;
const HEADS: usize = 3;
const SIZE: usize = 6;
const PACKED: usize = (HEADS + 2) * SIZE;
const PAGES: usize = 5;
const PAGE: usize = 4;
/// Positions with angles: as many as three pages have places.
const ANGLES: usize = 12;

impl Case {
    fn new() -> Self {
        let number = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 31.0;
        Self {
            qkv: (0..ROWS * PACKED).map(number).collect(),
            angles: (0..ANGLES * SIZE).map(|i| number(i + 7)).collect(),
            weights: [0, 1].map(|i| (0..SIZE).map(|j| number(i * SIZE + j + 3)).collect()),
            positions: [9, 2],
            table: [0, 1, 3, 2, 4, 0],
            caches: [0, 1].map(|i| (0..PAGES * PAGE * SIZE).map(|j| i as f32 + j as f32 / 8.0).collect()),
        }
    }

    /// With angles for so many elements of each head.
    fn call(&mut self, rotary: usize, interleave: bool, eps: Option<f64>) -> Result<()> {
        let (options, qkv) = (options(), self.qkv.as_mut_ptr());
        let part = |heads: usize, first: usize| {
            let at = qkv.wrapping_add(first * SIZE).cast();
            let (shape, strides) = ([ROWS as i64, heads as i64, SIZE as i64], [PACKED as i64, SIZE as i64, 1]);
            (at, shape, strides)
        };
        let read = |(at, shape, strides): (*mut std::ffi::c_void, [i64; 3], [i64; 3])| {
            // SAFETY: heads of this tensor, which no other is.
            unsafe { TensorRef::from_raw(at, Device::Cpu, DType::F32, &shape, Some(&strides)) }.unwrap()
        };
        let (at, shape, strides) = part(HEADS, 0);
        // SAFETY: as above.
        let mut q = unsafe { TensorMut::from_raw(at, Device::Cpu, DType::F32, &shape, Some(&strides)) }.unwrap();
        let (k, v) = (read(part(1, HEADS)), read(part(1, HEADS + 1)));
        // SAFETY: rows of `SIZE` angles, of which the first are seen.
        let cos_sin = unsafe {
            let (shape, strides) = ([(self.angles.len() / SIZE) as i64, rotary as i64], [SIZE as i64, 1]);
            TensorRef::from_raw(self.angles.as_ptr().cast(), Device::Cpu, DType::F32, &shape, Some(&strides)).unwrap()
        };
        let [k_cache, v_cache] = &mut self.caches;
        let cache = [PAGES as i64, PAGE as i64, 1, SIZE as i64];
        let mut appended = Appended {
            k,
            v,
            cos_sin,
            positions: TensorRef::from_slice(&self.positions, &[2]).unwrap(),
            page_table: TensorRef::from_slice(&self.table, &[2, 3]).unwrap(),
            k_cache: TensorMut::from_slice(k_cache, &cache).unwrap(),
            v_cache: TensorMut::from_slice(v_cache, &cache).unwrap(),
            interleave,
        };
        let Some(eps) = eps else { return rope_append(&mut q, &mut appended, &options, HOST) };
        let [q_weight, k_weight] = &self.weights;
        let q_weight = TensorRef::from_slice(q_weight, &[SIZE as i64]).unwrap();
        let k_weight = TensorRef::from_slice(k_weight, &[SIZE as i64]).unwrap();
        let norm = HeadNorm { q_weight: &q_weight, k_weight: &k_weight, eps };
        qk_norm_rope_append(&mut q, norm, &mut appended, &options, HOST)
    }

    /// What the call makes of it, by plain loops.
    fn expected(&self, rotary: usize, interleave: bool, eps: Option<f64>) -> [Vec<f64>; 3] {
        let wide = |numbers: &[f32]| numbers.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let mut all = [wide(&self.qkv), wide(&self.caches[0]), wide(&self.caches[1])];
        for row in 0..ROWS {
            let position = self.positions[row] as usize;
            let page = self.table[row * 3 + position / PAGE] as usize;
            let entry = (page * PAGE + position % PAGE) * SIZE;
            for head in 0..=HEADS {
                let at = row * PACKED + head * SIZE;
                let mut x = wide(&self.qkv[at..at + SIZE]);
                if let Some(eps) = eps {
                    let mean = x.iter().map(|x| x.powi(2)).sum::<f64>() / SIZE as f64;
                    let weight = &self.weights[usize::from(head == HEADS)];
                    x.iter_mut().zip(weight).for_each(|(x, w)| *x *= f64::from(*w) / (mean + eps).sqrt());
                }
                let before = x.clone();
                for pair in 0..rotary / 2 {
                    let [a, b] = if interleave { [2 * pair, 2 * pair + 1] } else { [pair, pair + rotary / 2] };
                    let angles = &self.angles[position * SIZE..];
                    let (cos, sin) = (f64::from(angles[pair]), f64::from(angles[rotary / 2 + pair]));
                    x[a] = before[a] * cos - before[b] * sin;
                    x[b] = before[b] * cos + before[a] * sin;
                }
                if head < HEADS {
                    all[0][at..at + SIZE].copy_from_slice(&x);
                } else {
                    all[1][entry..entry + SIZE].copy_from_slice(&x);
                }
            }
            let at = row * PACKED + (HEADS + 1) * SIZE;
            all[2][entry..entry + SIZE].copy_from_slice(&wide(&self.qkv[at..at + SIZE]));
        }
        all
    }
}

#[test]
fn queries_are_turned_in_place_and_keys_and_values_go_to_their_pages_and_nowhere_else() {
    for (rotary, interleave) in [(6, false), (6, true), (4, false), (4, true), (2, false)] {
        for eps in [None, Some(1e-5)] {
            let mut case = Case::new();
            let [qkv, k_cache, v_cache] = case.expected(rotary, interleave, eps);
            case.call(rotary, interleave, eps).unwrap();
            assert!(near(&case.qkv, &qkv), "{rotary} {interleave} {eps:?}");
            assert!(
                near(&case.caches[0], &k_cache) && near(&case.caches[1], &v_cache),
                "{rotary} {interleave} {eps:?}"
            );
        }
    }
}

#[test]
fn a_place_that_there_is_not_is_an_error_before_anything_is_written() {
    type Change = fn(&mut Case);
    let wrong: [(Change, &str); 5] = [
        (|case| case.positions[1] = 12, "12 at [1], expected an index below 12"),
        (|case| case.positions[1] = -1, "-1 at [1]"),
        (|case| case.positions[1] = i32::MIN, "at [1]"),
        (|case| case.table[3] = 5, "5 at [1, 0], expected an index below 5"),
        (|case| case.table[3] = -3, "-3 at [1, 0]"),
    ];
    for (break_it, expected) in wrong {
        for eps in [None, Some(1e-5)] {
            let (mut case, before) = (Case::new(), Case::new());
            break_it(&mut case);
            let message = raised(case.call(6, false, eps));
            assert!(message.contains("IndexError") && message.contains(expected), "{message}");
            assert!(case.qkv == before.qkv && case.caches == before.caches, "{message}: written all the same");
        }
    }
    // More angles than places.
    let mut case = Case::new();
    case.angles.resize(20 * SIZE, 0.0);
    case.positions[0] = 12;
    assert!(raised(case.call(6, false, None)).contains("row 0 is at 12 and has 3 pages of 4"));
}

#[test]
fn what_breaks_a_contract_is_refused_by_its_name() {
    let options = options();
    assert!(is_supported(Device::Cpu).unwrap());
    let (mut a, b, ids) = ([0f32; 4], [0f32; 6], [0i32; 2]);
    let mut token = [0i32; 2];
    let b = |shape: &[i64]| TensorRef::from_slice(&b[..shape.iter().product::<i64>() as usize], shape).unwrap();
    let mut a = TensorMut::from_slice(&mut a, &[2, 2]).unwrap();
    assert_eq!(refused(add(&mut a, &b(&[2, 3]), &options, HOST)).0, "b");
    assert_eq!(refused(add(&mut a, &b(&[4]), &options, HOST)).0, "b");
    assert_eq!(refused(softmax_rows(&mut a, 0.0, &options, HOST)).0, "temperature");
    let ids = TensorRef::from_slice(&ids, &[2]).unwrap();
    assert_eq!(refused(embedding(&mut a, &ids, &b(&[3, 1]), 1.0, &options, HOST)).0, "table");
    assert_eq!(refused(embedding(&mut a, &ids, &b(&[3, 2]), -1.0, &options, HOST)).0, "scale");
    assert_eq!(refused(embedding(&mut a, &ids, &b(&[0, 2]), 1.0, &options, HOST)).0, "tokens");
    let mut token = TensorMut::from_slice(&mut token, &[2]).unwrap();
    assert_eq!(refused(argmax(&mut token, &b(&[2, 0]), &options, HOST)).0, "tokens");
    assert_eq!(refused(argmax(&mut token, &b(&[3, 2]), &options, HOST)).0, "token");
    let probs = b(&[2, 3]);
    let number = b(&[2]);
    for top_p in [-0.5, 1.5, f64::NAN] {
        let among = Among::new(0, top_p);
        assert_eq!(refused(sample(&mut token, &probs, &number, among, &options, HOST)).0, "top_p");
    }
    let among = Among::new(u32::MAX, 0.0);
    assert_eq!(refused(sample(&mut token, &probs, &number, among, &options, HOST)).0, "top_k");
    // Angles for more than a head has, and for an odd number.
    let (argument, expected) = refused(Case::new().call(8, false, None));
    assert!(argument == "rotary_dim" && expected.contains("even number"), "{expected}");
    assert_eq!(refused(Case::new().call(3, false, None)).0, "rotary_dim");
}

#[test]
fn nothing_is_done_for_no_rows() {
    let options = options();
    let (mut none, mut tokens): ([f32; 0], [i32; 0]) = ([], []);
    let mut a = TensorMut::from_slice(&mut none, &[0, 7]).unwrap();
    let mut token = TensorMut::from_slice(&mut tokens, &[0]).unwrap();
    silu(&mut a, &options, HOST).unwrap();
    softmax_rows(&mut a, 1.0, &options, HOST).unwrap();
    argmax(&mut token, &TensorRef::from_slice(&[0f32; 0], &[0, 7]).unwrap(), &options, HOST).unwrap();
}

/// Every kernel by its row's name, over tensors that are claimed to be on a GPU.
#[cfg(feature = "compute")]
fn every_kernel(options: DecodeOptions, mut with: impl FnMut(&str, &mut dyn FnMut() -> Result<()>)) {
    let read = |address, dtype, shape: &[i64]| failing::read(0, address, dtype, shape);
    let write = |address, dtype, shape: &[i64]| failing::write(0, address, dtype, shape);
    let (half, float, whole, s) = (DType::BF16, DType::F32, DType::I32, Stream::NULL);
    let (mut a, b) = (write(0x1000, half, &[3, 1024]), read(0x2000, half, &[3, 1024]));
    let (ids, table) = (read(0x3000, whole, &[3]), read(0x4000, half, &[50, 1024]));
    let mut token = write(0x5000, whole, &[3]);
    with("embedding", &mut || embedding(&mut a, &ids, &table, 2.0, &options, s));
    with("add", &mut || add(&mut a, &b, &options, s));
    with("mul", &mut || mul(&mut a, &b, &options, s));
    with("sigmoid_gate", &mut || sigmoid_gate(&mut a, &b, &options, s));
    with("silu", &mut || silu(&mut a, &options, s));
    let mut wide = write(0x6000, float, &[3, 1024]);
    with("copy", &mut || copy(&mut wide, &b, &options, s));
    with("softmax_rows", &mut || softmax_rows(&mut a, 0.5, &options, s));
    with("argmax", &mut || argmax(&mut token, &b, &options, s));
    let (probs, number) = (read(0x7000, float, &[3, 77]), read(0x8000, float, &[3]));
    with("sample", &mut || sample(&mut token, &probs, &number, Among::new(5, 0.5), &options, s));
    let mut step = Step {
        ids: write(0x9000, whole, &[3]),
        positions: write(0xA000, whole, &[3]),
        lengths: write(0xB000, whole, &[3]),
    };
    with("advance", &mut || advance(&ids, &mut step, 12, &options, s));
    let mut q = write(0xC000, half, &[3, 16, 128]);
    let mut appended = Appended {
        k: read(0xD000, half, &[3, 8, 128]),
        v: read(0xE000, half, &[3, 8, 128]),
        cos_sin: read(0xF000, float, &[100, 128]),
        positions: read(0x10000, whole, &[3]),
        page_table: read(0x11000, whole, &[3, 4]),
        k_cache: write(0x12000, half, &[20, 16, 8, 128]),
        v_cache: write(0x13000, half, &[20, 16, 8, 128]),
        interleave: false,
    };
    let weight = read(0x14000, half, &[128]);
    let norm = HeadNorm { q_weight: &weight, k_weight: &weight, eps: 1e-6 };
    with("rope_append", &mut || rope_append(&mut q, &mut appended, &options, s));
    with("qk_norm_rope_append", &mut || qk_norm_rope_append(&mut q, norm, &mut appended, &options, s));
}

#[cfg(feature = "compute")]
#[test]
fn every_kernel_tells_of_a_launch_that_fails() {
    native::isolated("every_kernel_tells_of_a_launch_that_fails", || {
        let cuda = failing::Cuda::stand_in(&[]);
        for pdl in [false, true] {
            every_kernel(DecodeOptions::default().with_pdl(pdl), |name, call| {
                cuda.tells(name, call);
                assert_eq!(cuda.get("last_pdl") == 1, pdl, "{name}");
            });
        }
        cuda.assert_all_told(&["decode.ptx"]);
    });
}

#[cfg(feature = "compute")]
#[test]
fn kernels_are_launched_for_their_types_with_blocks_for_every_row_and_made_ready_once() {
    native::isolated("kernels_are_launched_for_their_types_with_blocks_for_every_row_and_made_ready_once", || {
        let cuda = failing::Cuda::stand_in(&[]);
        cuda.set("launch_fails_with", 0);
        let blocks = || ["last_grid", "last_grid_y", "last_block"].map(|name| cuda.get(name));
        let mut seen = Vec::new();
        every_kernel(DecodeOptions::default(), |name, call| {
            call().unwrap();
            seen.push((name.to_owned(), cuda.text("last_own"), blocks()));
        });
        let expected = [
            ("embedding", "embedding_bf16", [3, 1, 128]),
            ("add", "add_bf16", [3, 1, 128]),
            ("mul", "mul_bf16", [3, 1, 128]),
            ("sigmoid_gate", "sigmoid_gate_bf16", [3, 1, 128]),
            ("silu", "silu_bf16", [3, 1, 128]),
            ("copy", "copy_bf16_f32", [3, 1, 128]),
            ("softmax_rows", "softmax_rows_bf16", [24, 1, 1024]),
            ("argmax", "argmax_bf16", [24, 1, 1024]),
            ("sample", "sample", [24, 1, 1024]),
            ("advance", "advance", [1, 1, 128]),
            // Heads of queries, keys and values, four to a block.
            ("rope_append", "rope_append_bf16", [3, 8, 128]),
            ("qk_norm_rope_append", "qk_norm_rope_append_bf16", [3, 8, 128]),
        ];
        assert_eq!(seen, expected.map(|(row, kernel, blocks)| (row.to_owned(), kernel.to_owned(), blocks)));
        let ready = cuda.get("prepared");
        assert_eq!(ready, 12, "each is made ready ahead of its first launch");
        every_kernel(DecodeOptions::default(), |_, call| call().unwrap());
        assert_eq!(cuda.get("prepared"), ready);
        // Of another type, of rows that are no eights, and of large heads.
        let s = Stream::NULL;
        let options = DecodeOptions::default();
        silu(&mut failing::write(0, 0x1000, DType::F32, &[2, 1025]), &options, s).unwrap();
        assert_eq!((cuda.text("last_own"), blocks()), ("silu_f32".to_owned(), [2, 9, 128]));
        argmax(
            &mut failing::write(0, 0x1000, DType::I32, &[1]),
            &failing::read(0, 0x2000, DType::F16, &[1, 151_936]),
            &options,
            s,
        )
        .unwrap();
        assert_eq!((cuda.text("last_own"), blocks()), ("argmax_f16".to_owned(), [8, 1, 1024]));
    });
}

/// What a kernel is given, as the source of the kernel has it.
#[cfg(feature = "compute")]
#[test]
fn arguments_are_those_of_the_kernels_source() {
    native::isolated("arguments_are_those_of_the_kernels_source", || {
        let cuda = failing::Cuda::stand_in(&[]);
        cuda.set("launch_fails_with", 0);
        cuda.set("kept_args", 9);
        let mut seen = Vec::new();
        every_kernel(DecodeOptions::default().with_pdl(true), |name, call| {
            // One more would be read past the last.
            let count = match name {
                "embedding" => 9,
                "add" | "mul" | "sigmoid_gate" | "copy" | "advance" => 6,
                "softmax_rows" | "argmax" => 5,
                "silu" => 4,
                "sample" => 7,
                _ => 1,
            };
            cuda.set("kept_args", count);
            call().unwrap();
            let args = cuda.words("last_args");
            seen.push((name.to_owned(), args[..count as usize].to_vec()));
        });
        let low = |word: u64| word & 0xFFFF_FFFF;
        let args = |name: &str| &seen.iter().find(|(seen, _)| seen == name).unwrap().1;
        let of = args("embedding");
        assert_eq!(of[..5], [0x1000, 1024, 0x3000, 0x4000, 1024]);
        assert_eq!([low(of[5]), low(of[6]), low(of[7]), low(of[8])], [50, 1024, u64::from(2f32.to_bits()), 1]);
        let of = args("copy");
        assert_eq!((&of[..4], low(of[4]), low(of[5])), (&[0x6000, 1024, 0x2000, 1024][..], 1024, 1));
        let of = args("softmax_rows");
        let factor = u64::from(((1f64.exp().log2() / 0.5) as f32).to_bits());
        assert_eq!((&of[..2], low(of[2]), low(of[3]), low(of[4])), (&[0x1000, 1024][..], 1024, factor, 1));
        let of = args("argmax");
        assert_eq!((&of[..3], low(of[3]), low(of[4])), (&[0x5000, 0x2000, 1024][..], 1024, 1));
        let of = args("sample");
        assert_eq!((&of[..4], low(of[4]), low(of[5])), (&[0x5000, 0x7000, 77, 0x8000][..], 77, 5));
        assert_eq!(of[6], 1 << 43, "half of what 1 is");
        let of = args("advance");
        assert_eq!((&of[..4], low(of[4]), low(of[5])), (&[0x3000, 0x9000, 0xA000, 0xB000][..], 3, 12));
        assert_eq!(args("rope_append")[..], [0xC000]);
    });
}
