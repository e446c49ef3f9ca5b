//! The reference on the host, against plain formulas in f64 that are written another way, and the errors it raises.

#[path = "support/prefill.rs"]
mod prefill;

use std::ffi::c_void;
use std::fmt::Debug;
use std::ptr;

use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors, HEAD_SIZE};
use flashinfer_rs::kernels::norm::{NormOptions, gemma_rmsnorm};
use flashinfer_rs::{
    Arg, CuSeqlens, DType, Device, Element, FlashInferError, FlashInferRuntime, Function, Result, RuntimeConfig,
    Stream, TensorMut, TensorRef, Value, reference,
};
use half::{bf16, f16};
use prefill::Prefill;

/// A function of the reference module.
fn function(name: &str) -> Function {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    reference::module().unwrap().function(name).unwrap()
}

/// The element types that the reference computes with.
trait Number: Element + Into<f64> + PartialEq + Debug {
    fn rounded(value: f64) -> Self;

    /// A number that grows by one from each value to the next.
    fn order(self) -> i64;
}

macro_rules! number {
    ($rust:ty, $bits:ty, $rounded:expr) => {
        impl Number for $rust {
            fn rounded(value: f64) -> Self {
                $rounded(value)
            }

            fn order(self) -> i64 {
                let bits = i64::from(self.to_bits());
                let sign = 1 << (<$bits>::BITS - 1);
                if bits < sign { bits } else { sign - bits }
            }
        }
    };
}

number!(f16, u16, f16::from_f64);
number!(bf16, u16, bf16::from_f64);
number!(f32, u32, |value| value as f32);

/// That each value is what was expected, rounded, or the neighbour of that.
#[track_caller]
fn assert_rounded<T: Number>(found: &[T], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let rounded = T::rounded(expected);
        let apart = (found.order() - rounded.order()).abs();
        assert!(apart <= 1, "element {i} is {found:?}, expected {rounded:?} ({expected})");
    }
}

/// That values in f32 are within 1e-6.
#[track_caller]
fn assert_near(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let apart = (f64::from(found) - expected).abs();
        assert!(apart <= 1e-6 * expected.abs().max(1.0), "element {i} is {found}, expected {expected}");
    }
}

/// splitmix64
struct Random(u64);

impl Random {
    fn between(&mut self, low: f64, high: f64) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        low + (high - low) * ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn numbers<T: Number>(&mut self, low: f64, high: f64, count: usize) -> Vec<T> {
        (0..count).map(|_| T::rounded(self.between(low, high))).collect()
    }
}

fn widened<T: Number>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

// gemma_rmsnorm.

/// x / √(mean(x²) + eps) · (1 + w), row by row.
fn norm_formula(input: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let normed = input.chunks_exact(weight.len()).flat_map(|row| {
        let mean = row.iter().map(|x| x.powi(2)).sum::<f64>() / row.len() as f64;
        row.iter().zip(weight).map(move |(x, w)| x / (mean + eps).sqrt() * (1.0 + w))
    });
    normed.collect()
}

fn norm<T: Number>(input: &[T], weight: &[T], eps: f64) -> Vec<T> {
    function("gemma_rmsnorm");
    let columns = weight.len() as i64;
    let shape = [input.len() as i64 / columns, columns];
    let mut out = vec![T::rounded(f64::NAN); input.len()];
    gemma_rmsnorm(
        &mut TensorMut::from_slice(&mut out, &shape).unwrap(),
        &TensorRef::from_slice(input, &shape).unwrap(),
        &TensorRef::from_slice(weight, &[columns]).unwrap(),
        &NormOptions::default().with_eps(eps),
        Stream::NULL,
    )
    .unwrap();
    out
}

fn the_norm_is_its_formula<T: Number>() {
    let mut random = Random(1);
    for (rows, columns) in [(1, 1), (5, 1), (1, 7), (3, 12), (4, 64), (2, 257)] {
        for eps in [1e-6, 0.5] {
            let input: Vec<T> = random.numbers(-3.0, 3.0, rows * columns);
            let weight: Vec<T> = random.numbers(-1.5, 1.5, columns);
            let expected = norm_formula(&widened(&input), &widened(&weight), eps);
            assert_rounded(&norm(&input, &weight, eps), &expected);
        }
    }
}

#[test]
fn the_norm_in_f32_is_its_formula_rounded() {
    the_norm_is_its_formula::<f32>();
}

#[test]
fn the_norm_in_f16_is_its_formula_rounded() {
    the_norm_is_its_formula::<f16>();
}

#[test]
fn the_norm_in_bf16_is_its_formula_rounded() {
    the_norm_is_its_formula::<bf16>();
}

#[test]
fn the_norm_of_numbers_known_by_heart_is_exact() {
    // The mean of 9 and 16 is 12.5; with an eps of 12.5 the root is 5.
    assert_eq!(norm(&[3f32, 4.0], &[0.0, 1.0], 12.5), [0.6, 1.6]);
    // The squares of the largest half-precision numbers do not overflow.
    assert_eq!(norm(&[f16::MAX; 4], &[f16::ZERO; 4], 1e-6), [f16::ONE; 4]);
    assert_eq!(norm(&[bf16::ZERO; 4], &[bf16::ONE; 4], 1e-6), [bf16::ZERO; 4]);
}

#[test]
fn the_norm_follows_row_strides_and_leaves_what_lies_between_rows() {
    function("gemma_rmsnorm");
    let mut random = Random(2);
    let (rows, columns, between_inputs, between_outputs) = (3, 12, 16, 20);
    let input: Vec<f16> = random.numbers(-3.0, 3.0, rows * between_inputs);
    let weight: Vec<f16> = random.numbers(-1.0, 1.0, columns);
    let mark = f16::from_f32(-7.0);
    let mut out = vec![mark; rows * between_outputs];
    let shape = [rows as i64, columns as i64];
    // SAFETY: three rows of twelve elements lie inside each buffer, so many elements apart.
    let (read, mut write) = unsafe {
        let strides = [between_inputs as i64, 1];
        let read = TensorRef::from_raw(input.as_ptr().cast(), Device::Cpu, DType::F16, &shape, Some(&strides));
        let strides = [between_outputs as i64, 1];
        let write = TensorMut::from_raw(out.as_mut_ptr().cast(), Device::Cpu, DType::F16, &shape, Some(&strides));
        (read.unwrap(), write.unwrap())
    };
    let read_weight = TensorRef::from_slice(&weight, &shape[1..]).unwrap();
    gemma_rmsnorm(&mut write, &read, &read_weight, &NormOptions::default(), Stream::NULL).unwrap();
    for (input, out) in input.chunks_exact(between_inputs).zip(out.chunks_exact(between_outputs)) {
        assert_rounded(&out[..columns], &norm_formula(&widened(&input[..columns]), &widened(&weight), 1e-6));
        assert!(out[columns..].iter().all(|value| *value == mark), "{out:?}");
    }
}

#[test]
fn the_norm_works_in_place() {
    let mut random = Random(3);
    let mut values: Vec<bf16> = random.numbers(-3.0, 3.0, 4 * 32);
    let weight: Vec<bf16> = random.numbers(-1.0, 1.0, 32);
    let elsewhere = norm(&values, &weight, 1e-6);
    let data: *mut c_void = values.as_mut_ptr().cast();
    // SAFETY: the memory is both read and written, one element after the other and by this thread alone.
    let (input, mut out) = unsafe {
        (
            TensorRef::from_raw(data, Device::Cpu, DType::BF16, &[4, 32], None).unwrap(),
            TensorMut::from_raw(data, Device::Cpu, DType::BF16, &[4, 32], None).unwrap(),
        )
    };
    let read_weight = TensorRef::from_slice(&weight, &[32]).unwrap();
    gemma_rmsnorm(&mut out, &input, &read_weight, &NormOptions::default(), Stream::NULL).unwrap();
    assert_eq!(values, elsewhere);
}

// gdn_prefill.

/// The arguments of a prefill. Sequences lie one after the other.
#[derive(Clone)]
struct Problem<T> {
    lengths: Vec<usize>,
    /// Query, key and value heads.
    heads: [usize; 3],
    size: usize,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    alpha: Option<Vec<f32>>,
    beta: Option<Vec<f32>>,
    input_state: Option<Vec<f32>>,
    scale: f64,
}

impl<T: Number> Problem<T> {
    /// With everything that is optional.
    fn random(seed: u64, lengths: &[usize], heads: [usize; 3], size: usize) -> Self {
        let mut random = Random(seed);
        let tokens: usize = lengths.iter().sum();
        let [q, k, v] = heads.map(|heads| tokens * heads * size);
        let per_token = tokens * heads[0].max(heads[2]);
        let states = lengths.len() * heads[0].max(heads[2]) * size * size;
        let unit = (3.0 / size as f64).sqrt();
        Self {
            lengths: lengths.to_vec(),
            heads,
            size,
            q: random.numbers(-2.0, 2.0, q),
            k: random.numbers(-unit, unit, k),
            v: random.numbers(-2.0, 2.0, v),
            alpha: Some(random.numbers(0.7, 1.0, per_token)),
            beta: Some(random.numbers(0.0, 1.0, per_token)),
            input_state: Some(random.numbers(-1.0, 1.0, states)),
            scale: 0.3,
        }
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// The heads of output, states, alpha and beta.
    fn out_heads(&self) -> usize {
        self.heads[0].max(self.heads[2])
    }

    /// The numbers of one sequence, of all that has so many for each token.
    fn part<'a, U>(&self, values: &'a [U], sequence: usize) -> &'a [U] {
        let per_token = values.len() / self.tokens();
        let start: usize = self.lengths[..sequence].iter().sum();
        &values[start * per_token..][..self.lengths[sequence] * per_token]
    }

    /// The numbers of one sequence's state.
    fn state_of<'a>(&self, states: &'a [f32], sequence: usize) -> &'a [f32] {
        let count = self.out_heads() * self.size * self.size;
        &states[sequence * count..][..count]
    }

    /// One of the sequences on its own.
    fn only(&self, sequence: usize) -> Self {
        Self {
            lengths: vec![self.lengths[sequence]],
            q: self.part(&self.q, sequence).to_vec(),
            k: self.part(&self.k, sequence).to_vec(),
            v: self.part(&self.v, sequence).to_vec(),
            alpha: self.alpha.as_ref().map(|alpha| self.part(alpha, sequence).to_vec()),
            beta: self.beta.as_ref().map(|beta| self.part(beta, sequence).to_vec()),
            input_state: self.input_state.as_ref().map(|states| self.state_of(states, sequence).to_vec()),
            ..*self
        }
    }

    /// Problems one after the other, each with its sequences.
    fn joined(problems: &[Self]) -> Self {
        fn all<P, U: Clone>(problems: &[P], part: impl Fn(&P) -> &[U]) -> Vec<U> {
            problems.iter().flat_map(|problem| part(problem).to_vec()).collect()
        }
        Self {
            lengths: all(problems, |p| &p.lengths),
            q: all(problems, |p| &p.q),
            k: all(problems, |p| &p.k),
            v: all(problems, |p| &p.v),
            alpha: Some(all(problems, |p| p.alpha.as_ref().unwrap())),
            beta: Some(all(problems, |p| p.beta.as_ref().unwrap())),
            input_state: Some(all(problems, |p| p.input_state.as_ref().unwrap())),
            ..problems[0]
        }
    }

    /// Output and states, of the reference itself or, at the kernel's head size, through the kernel's wrapper.
    fn run(&self) -> (Vec<T>, Vec<f32>) {
        let tokens = self.tokens() as i64;
        let sequences = self.lengths.len() as i64;
        let [q_heads, k_heads, v_heads] = self.heads.map(|heads| heads as i64);
        let (heads, size) = (self.out_heads() as i64, self.size as i64);
        let mut offsets = vec![0i64];
        for length in &self.lengths {
            offsets.push(offsets[offsets.len() - 1] + *length as i64);
        }
        // Nothing of these may be left.
        let mut output = vec![T::rounded(f64::NAN); (tokens * heads * size) as usize];
        let mut output_state = vec![f32::NAN; (sequences * heads * size * size) as usize];
        let states = [sequences, heads, size, size];
        let optional = |values: &'_ Option<Vec<f32>>, shape: &[i64]| {
            // SAFETY: the same memory as the vector's, which outlives the call below.
            values.as_ref().map(|values| unsafe {
                assert_eq!(values.len() as i64, shape.iter().product::<i64>());
                TensorRef::from_raw(values.as_ptr().cast(), Device::Cpu, DType::F32, shape, None).unwrap()
            })
        };
        let args = Prefill {
            output: TensorMut::from_slice(&mut output, &[tokens, heads, size]).unwrap(),
            output_state: TensorMut::from_slice(&mut output_state, &states).unwrap(),
            q: TensorRef::from_slice(&self.q, &[tokens, q_heads, size]).unwrap(),
            k: TensorRef::from_slice(&self.k, &[tokens, k_heads, size]).unwrap(),
            v: TensorRef::from_slice(&self.v, &[tokens, v_heads, size]).unwrap(),
            cu_seqlens: TensorRef::from_slice(&offsets, &[sequences + 1]).unwrap(),
            input_state: optional(&self.input_state, &states),
            alpha: optional(&self.alpha, &[tokens, heads]),
            beta: optional(&self.beta, &[tokens, heads]),
            scale: self.scale,
            workspace: TensorMut::from_slice::<u8>(&mut [], &[0]).unwrap(),
        };
        if size == HEAD_SIZE {
            function("gdn_prefill");
            // SAFETY: on the host the contents of cu_seqlens are checked.
            unsafe { args.call(Stream::NULL) }.unwrap();
        } else {
            call_gdn(args).unwrap();
        }
        (output, output_state)
    }

    /// The same by matrices: `S ← α S (I − β k kᵀ) + β v kᵀ`, `o = scale · S q`.
    fn formula(&self) -> (Vec<f64>, Vec<f64>) {
        let (size, heads) = (self.size, self.out_heads());
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|values| widened(values));
        // Each key head serves so many heads of the output; likewise for queries and values.
        let row = |values: &[f64], own: usize, token: usize, head: usize| {
            let at = token * own + head / (heads / own);
            values[at * size..][..size].to_vec()
        };
        let per_token = |values: &Option<Vec<f32>>, token: usize, head: usize| {
            values.as_ref().map_or(1.0, |values| f64::from(values[token * heads + head]))
        };
        let scale = if self.scale == 0.0 { (size as f64).powf(-0.5) } else { self.scale };
        let mut output = vec![0.0; self.tokens() * heads * size];
        let mut states = Vec::new();
        let mut start = 0;
        for (sequence, length) in self.lengths.iter().enumerate() {
            for head in 0..heads {
                let mut state = match &self.input_state {
                    Some(states) => {
                        let state = &self.state_of(states, sequence)[head * size * size..][..size * size];
                        Matrix { size, values: state.iter().map(|&value| value.into()).collect() }
                    }
                    None => Matrix { size, values: vec![0.0; size * size] },
                };
                for token in start..start + length {
                    let key = row(&k, self.heads[1], token, head);
                    let (alpha, beta) = (per_token(&self.alpha, token, head), per_token(&self.beta, token, head));
                    let erase = Matrix::from(size, |i, j| f64::from(i == j) - beta * key[i] * key[j]);
                    let value = row(&v, self.heads[2], token, head);
                    let write = Matrix::from(size, |i, j| beta * value[i] * key[j]);
                    let kept = state.times(&erase);
                    state = Matrix::from(size, |i, j| alpha * kept.at(i, j) + write.at(i, j));
                    let query = row(&q, self.heads[0], token, head);
                    for i in 0..size {
                        let sum: f64 = (0..size).map(|j| state.at(i, j) * query[j]).sum();
                        output[(token * heads + head) * size + i] = scale * sum;
                    }
                }
                states.extend(state.values);
            }
            start += length;
        }
        (output, states)
    }
}

struct Matrix {
    size: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn from(size: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let values = (0..size * size).map(|at| value(at / size, at % size)).collect();
        Self { size, values }
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.size + j]
    }

    fn times(&self, other: &Self) -> Self {
        let mut values = vec![0.0; self.size * self.size];
        for (row, result) in self.values.chunks_exact(self.size).zip(values.chunks_exact_mut(self.size)) {
            for (a, row) in row.iter().zip(other.values.chunks_exact(self.size)) {
                result.iter_mut().zip(row).for_each(|(sum, b)| *sum += a * b);
            }
        }
        Self { size: self.size, values }
    }
}

/// The reference with these arguments, past the checks of the kernel's wrapper.
fn call_gdn(mut args: Prefill<'_>) -> Result<Value> {
    let (output, output_state, workspace) = (args.output.pack(), args.output_state.pack(), args.workspace.pack());
    let (q, k, v, cu_seqlens) = (args.q.pack(), args.k.pack(), args.v.pack(), args.cu_seqlens.pack());
    let [input_state, alpha, beta] =
        [&args.input_state, &args.alpha, &args.beta].map(|tensor| tensor.as_ref().map(TensorRef::pack));
    let optional = |tensor| Option::map_or(tensor, Arg::NONE, Arg::tensor);
    let packed = [
        Arg::tensor(&output),
        Arg::tensor(&output_state),
        Arg::tensor(&q),
        Arg::tensor(&k),
        Arg::tensor(&v),
        Arg::tensor(&cu_seqlens),
        optional(input_state.as_ref()),
        optional(alpha.as_ref()),
        optional(beta.as_ref()),
        Arg::float(args.scale),
        Arg::tensor(&workspace),
    ];
    // SAFETY: the reference checks what it is given, and the tensors are live.
    unsafe { function("gdn_prefill").call(&packed) }
}

const SHARED_HEADS: [[usize; 3]; 7] = [[1, 1, 1], [2, 2, 2], [4, 2, 2], [6, 2, 2], [3, 1, 1], [2, 2, 4], [1, 1, 3]];

#[test]
fn the_prefill_in_f32_is_the_recurrence_with_any_of_its_options() {
    for heads in SHARED_HEADS {
        for options in 0..16 {
            let mut problem = Problem::<f32>::random(options, &[3, 1, 5], heads, 6);
            for (bit, option) in
                [&mut problem.alpha, &mut problem.beta, &mut problem.input_state].into_iter().enumerate()
            {
                if options & (1 << bit) == 0 {
                    *option = None;
                }
            }
            if options & 8 == 0 {
                problem.scale = 0.0;
            }
            let (output, state) = problem.run();
            let (expected, expected_state) = problem.formula();
            assert_near(&output, &expected);
            assert_near(&state, &expected_state);
        }
    }
}

fn the_prefill_is_the_recurrence_rounded<T: Number>() {
    for heads in SHARED_HEADS {
        let problem = Problem::<T>::random(7, &[1, 6, 2], heads, 8);
        let (output, state) = problem.run();
        let (expected, expected_state) = problem.formula();
        assert_rounded(&output, &expected);
        assert_near(&state, &expected_state);
    }
}

#[test]
fn the_prefill_in_f16_is_the_recurrence_rounded() {
    the_prefill_is_the_recurrence_rounded::<f16>();
}

#[test]
fn the_prefill_in_bf16_is_the_recurrence_rounded() {
    the_prefill_is_the_recurrence_rounded::<bf16>();
}

#[test]
fn the_prefill_through_its_wrapper_is_the_recurrence() {
    let problem = Problem::<f32>::random(8, &[1, 3], [2, 1, 1], HEAD_SIZE as usize);
    let (output, state) = problem.run();
    let (expected, expected_state) = problem.formula();
    assert_near(&output, &expected);
    assert_near(&state, &expected_state);
    let mut problem = Problem::<bf16>::random(9, &[2, 1], [1, 1, 2], HEAD_SIZE as usize);
    (problem.scale, problem.input_state) = (0.0, None);
    let (output, state) = problem.run();
    let (expected, expected_state) = problem.formula();
    assert_rounded(&output, &expected);
    assert_near(&state, &expected_state);
}

#[test]
fn sequences_do_not_see_each_other() {
    let problem = Problem::<f32>::random(10, &[3, 1, 4, 2], [4, 2, 2], 5);
    let (output, state) = problem.run();
    let order = [2, 0, 3, 1];
    let permuted = Problem::joined(&order.map(|sequence| problem.only(sequence)));
    let (permuted_output, permuted_state) = permuted.run();
    for (position, sequence) in order.into_iter().enumerate() {
        assert_eq!(permuted.part(&permuted_output, position), problem.part(&output, sequence));
        assert_eq!(permuted.state_of(&permuted_state, position), problem.state_of(&state, sequence));
        // Nor do they see that there are others.
        let (alone, alone_state) = problem.only(sequence).run();
        assert_eq!(alone, problem.part(&output, sequence));
        assert_eq!(alone_state, problem.state_of(&state, sequence));
    }
}

#[test]
fn a_sequence_continues_from_the_state_of_its_first_part() {
    let whole = Problem::<f32>::random(11, &[7], [2, 2, 4], 5);
    let (output, state) = whole.run();
    for first in 1..7 {
        let parts = Problem { lengths: vec![first, 7 - first], input_state: None, ..whole.clone() };
        let head = Problem { input_state: whole.input_state.clone(), ..parts.only(0) };
        let (head_output, head_state) = head.run();
        let tail = Problem { input_state: Some(head_state), ..parts.only(1) };
        let (tail_output, tail_state) = tail.run();
        assert_near(&[head_output, tail_output].concat(), &widened(&output));
        assert_near(&tail_state, &widened(&state));
    }
}

#[test]
fn a_sequence_without_tokens_keeps_its_state() {
    // On the host only: on a GPU it hangs release 0.6.3, which is why the wrapper wants a token for each.
    let mut problem = Problem::<f32>::random(12, &[0, 3, 0, 0], [2, 1, 1], 4);
    let (output, state) = problem.run();
    let input_state = problem.input_state.clone().unwrap();
    for sequence in [0, 2, 3] {
        assert_eq!(problem.state_of(&state, sequence), problem.state_of(&input_state, sequence));
    }
    assert_eq!(problem.only(1).run().0, output);
    problem.input_state = None;
    let (_, state) = problem.run();
    for sequence in [0, 2, 3] {
        assert!(problem.state_of(&state, sequence).iter().all(|value| *value == 0.0));
    }
    assert!(problem.state_of(&state, 1).iter().any(|value| *value != 0.0));
}

/// Through the safe entry, where nothing at all is to be computed and the states are to be kept all the same.
#[test]
fn a_batch_without_tokens_keeps_its_states() {
    function("gdn_prefill");
    let states: Vec<f32> = (0..2 * 128 * 128).map(|i| i as f32).collect();
    let (mut kept, mut output, none) = (vec![f32::NAN; states.len()], [0f32; 0], [0f32; 0]);
    let mut tensors = GdnTensors {
        output: TensorMut::from_slice(&mut output, &[0, 1, 128]).unwrap(),
        output_state: TensorMut::from_slice(&mut kept, &[2, 1, 128, 128]).unwrap(),
        q: TensorRef::from_slice(&none, &[0, 1, 128]).unwrap(),
        k: TensorRef::from_slice(&none, &[0, 1, 128]).unwrap(),
        v: TensorRef::from_slice(&none, &[0, 1, 128]).unwrap(),
    };
    let options = GdnOptions::default().with_input_state(TensorRef::from_slice(&states, &[2, 1, 128, 128]).unwrap());
    let sequences = CuSeqlens::from_lengths(&[0, 0]).unwrap();
    GdnPrefillContext::on_host().prefill(&mut tensors, &sequences, &options).unwrap();
    assert_eq!(kept, states);
}

#[test]
fn the_prefill_of_a_token_known_by_heart_is_exact() {
    // [[1, 2], [3, 4]] is halved; half of (10 − 0.5, 20 − 1.5) is added to its first column; twice that times (1, 2).
    let problem = Problem::<f32> {
        lengths: vec![1],
        heads: [1, 1, 1],
        size: 2,
        q: vec![1.0, 2.0],
        k: vec![1.0, 0.0],
        v: vec![10.0, 20.0],
        alpha: Some(vec![0.5]),
        beta: Some(vec![0.5]),
        input_state: Some(vec![1.0, 2.0, 3.0, 4.0]),
        scale: 2.0,
    };
    let state = vec![5.25, 1.0, 10.75, 2.0];
    assert_eq!(problem.run(), (vec![14.5, 29.5], state));
}

// What it raises.

#[track_caller]
fn assert_raised(result: Result<Value>, name: &str, kind: &str, says: &str) {
    match result.unwrap_err() {
        FlashInferError::TvmFfiCall { function, kind: found, message, .. } => {
            assert_eq!((function.as_str(), found.as_str()), (name, kind), "{message}");
            assert!(message.contains(says), "the message does not say `{says}`: {message}");
        }
        other => panic!("{other}"),
    }
}

/// Zeros that live as long as the process.
fn zeros(dtype: DType, shape: &[i64]) -> *mut c_void {
    let bytes = shape.iter().product::<i64>() as usize * dtype.size();
    Box::leak(vec![0u128; bytes / 16 + 1].into_boxed_slice()).as_mut_ptr().cast()
}

fn host(dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    // SAFETY: enough zeros that nothing else refers to; zeros are elements of every type.
    unsafe { TensorRef::from_raw(zeros(dtype, shape), Device::Cpu, dtype, shape, None) }.unwrap()
}

fn host_mut(dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    // SAFETY: as for `host`.
    unsafe { TensorMut::from_raw(zeros(dtype, shape), Device::Cpu, dtype, shape, None) }.unwrap()
}

/// A tensor on a GPU that nothing reads: the reference refuses it.
fn on_gpu(dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    let data = ptr::without_provenance(0x1000);
    // SAFETY: as above.
    unsafe { TensorRef::from_raw(data, Device::Cuda(0), dtype, shape, None) }.unwrap()
}

const NORM: &str = "gemma_rmsnorm";
const GDN: &str = "gdn_prefill";

#[test]
fn an_unknown_function_is_not_there() {
    function(NORM);
    let error = reference::module().unwrap().function("nothing").unwrap_err();
    let text = error.to_string();
    let FlashInferError::FunctionMissing { module, function, exported, .. } = error else { panic!("{text}") };
    assert_eq!((module.as_str(), function.as_str()), ("reference", "nothing"), "{text}");
    assert!(exported.contains(&NORM.to_owned()), "{exported:?}");
    assert!(reference::module().unwrap().path().is_none());
}

#[test]
fn another_number_of_arguments_is_refused() {
    let nothings = [Arg::NONE; 12];
    for (name, arity) in [(NORM, 5), (GDN, 11)] {
        for count in [0, 1, arity - 1, arity + 1] {
            // SAFETY: refused for its number of arguments.
            let result = unsafe { function(name).call(&nothings[..count]) };
            assert_raised(result, name, "TypeError", &format!("calling {name}: expected {arity}, found {count}"));
        }
    }
}

#[test]
fn another_kind_of_argument_is_refused_by_its_position() {
    let (matrix, weight) = (host(DType::F32, &[2, 4]), host(DType::F32, &[4]));
    let mut out = host_mut(DType::F32, &[2, 4]);
    let (out, input, weight) = (out.pack(), matrix.pack(), weight.pack());
    let good = [Arg::tensor(&out), Arg::tensor(&input), Arg::tensor(&weight), Arg::float(1e-6), Arg::bool(false)];
    let with = |position: usize, arg| {
        let mut args = good;
        args[position] = arg;
        // SAFETY: the reference checks what it is given, and the tensors are live.
        unsafe { function(NORM).call(&args) }
    };
    for (position, arg, expected) in [
        (0, Arg::NONE, "argument #0 when calling gemma_rmsnorm: expected DLTensor*"),
        (1, Arg::str(c"input"), "argument #1 when calling gemma_rmsnorm: expected DLTensor*"),
        (2, Arg::float(1.0), "argument #2 when calling gemma_rmsnorm: expected DLTensor*"),
        (3, Arg::tensor(&weight), "argument #3 when calling gemma_rmsnorm: expected float"),
        (3, Arg::NONE, "argument #3 when calling gemma_rmsnorm: expected float"),
    ] {
        assert_raised(with(position, arg), NORM, "TypeError", expected);
    }
    // A number is a float to TVM-FFI, whichever way it is written.
    for eps in [Arg::float(1.0), Arg::int(1), Arg::bool(true)] {
        assert!(matches!(with(3, eps), Ok(Value::None)));
    }
}

struct Norm {
    out: TensorMut<'static>,
    input: TensorRef<'static>,
    weight: TensorRef<'static>,
}

fn norm_with(change: fn(&mut Norm)) -> Result<Value> {
    let dtype = DType::F32;
    let mut norm = Norm { out: host_mut(dtype, &[2, 4]), input: host(dtype, &[2, 4]), weight: host(dtype, &[4]) };
    change(&mut norm);
    let (out, input, weight) = (norm.out.pack(), norm.input.pack(), norm.weight.pack());
    let args = [Arg::tensor(&out), Arg::tensor(&input), Arg::tensor(&weight), Arg::float(1e-6), Arg::bool(false)];
    // SAFETY: the reference checks what it is given, and the tensors are live.
    unsafe { function(NORM).call(&args) }
}

#[test]
fn a_norm_of_tensors_that_do_not_fit_is_refused_by_position() {
    norm_with(|_| {}).unwrap();
    type Row = (fn(&mut Norm), &'static str, &'static str);
    let rows: [Row; 13] = [
        (|n| n.input = on_gpu(DType::F32, &[2, 4]), "ValueError", "argument #1 must be on the host"),
        (|n| n.weight = on_gpu(DType::F32, &[4]), "ValueError", "argument #2 must be on the host"),
        (|n| n.input = host(DType::I64, &[2, 4]), "TypeError", "argument #1 holds I64, expected F16, BF16 or F32"),
        (|n| n.input = host(DType::F64, &[2, 4]), "TypeError", "argument #1 holds F64"),
        (|n| n.weight = host(DType::U8, &[4]), "TypeError", "argument #2 holds U8"),
        (|n| n.out = host_mut(DType::I32, &[2, 4]), "TypeError", "argument #0 holds I32"),
        (|n| n.input = host(DType::F32, &[8]), "ValueError", "argument #1 has shape [8]"),
        (|n| n.input = host(DType::F32, &[2, 4, 1]), "ValueError", "argument #1 has shape [2, 4, 1]"),
        (|n| n.out = host_mut(DType::F32, &[2, 3]), "ValueError", "argument #0 has shape [2, 3], expected [2, 4]"),
        (|n| n.out = host_mut(DType::F32, &[3, 4]), "ValueError", "argument #0 has shape [3, 4], expected [2, 4]"),
        (|n| n.out = host_mut(DType::F32, &[8]), "ValueError", "argument #0 has shape [8], expected [2, 4]"),
        (|n| n.weight = host(DType::F32, &[5]), "ValueError", "argument #2 has shape [5], expected [4]"),
        (|n| n.weight = host(DType::F32, &[1, 4]), "ValueError", "argument #2 has shape [1, 4], expected [4]"),
    ];
    for (change, kind, says) in rows {
        assert_raised(norm_with(change), NORM, kind, says);
    }
}

/// Two sequences of one and two tokens, heads of size 4.
fn gdn_with(change: impl FnOnce(&mut Prefill<'static>)) -> Result<Value> {
    let mut args = Prefill {
        output: host_mut(DType::F32, &[3, 2, 4]),
        output_state: host_mut(DType::F32, &[2, 2, 4, 4]),
        q: host(DType::F32, &[3, 2, 4]),
        k: host(DType::F32, &[3, 1, 4]),
        v: host(DType::F32, &[3, 1, 4]),
        cu_seqlens: TensorRef::from_slice(&[0i64, 1, 3], &[3]).unwrap(),
        input_state: Some(host(DType::F32, &[2, 2, 4, 4])),
        alpha: Some(host(DType::F32, &[3, 2])),
        beta: Some(host(DType::F32, &[3, 2])),
        scale: 0.0,
        workspace: host_mut(DType::U8, &[0]),
    };
    change(&mut args);
    call_gdn(args)
}

type GdnRow = (fn(&mut Prefill<'static>), &'static str, &'static str);

fn assert_gdn_raises(rows: &[GdnRow]) {
    gdn_with(|_| {}).unwrap();
    for &(change, kind, says) in rows {
        assert_raised(gdn_with(change), GDN, kind, says);
    }
}

#[test]
fn a_prefill_of_other_shapes_is_refused_by_position() {
    assert_gdn_raises(&[
        (|a| a.output = host_mut(DType::F32, &[3, 1, 4]), "ValueError", "argument #0 has shape [3, 1, 4]"),
        (|a| a.output_state = host_mut(DType::F32, &[1, 2, 4, 4]), "ValueError", "argument #1 has shape [1, 2, 4, 4]"),
        (|a| a.q = host(DType::F32, &[3, 8]), "ValueError", "argument #2 has shape [3, 8]"),
        (|a| a.k = host(DType::F32, &[3, 4]), "ValueError", "argument #3 has shape [3, 4]"),
        (|a| a.k = host(DType::F32, &[3, 1, 5]), "ValueError", "argument #3 has shape [3, 1, 5], expected [3, 1, 4]"),
        (|a| a.v = host(DType::F32, &[2, 1, 4]), "ValueError", "argument #4 has shape [2, 1, 4], expected [3, 1, 4]"),
        (|a| a.input_state = Some(host(DType::F32, &[2, 2, 16])), "ValueError", "argument #6 has shape [2, 2, 16]"),
        (|a| a.alpha = Some(host(DType::F32, &[3, 1])), "ValueError", "argument #7 has shape [3, 1], expected [3, 2]"),
        (|a| a.beta = Some(host(DType::F32, &[2, 2])), "ValueError", "argument #8 has shape [2, 2], expected [3, 2]"),
        (|a| a.k = host(DType::F32, &[3, 0, 4]), "ValueError", "2 query, 0 key and 1 value heads do not group"),
    ]);
}

#[test]
fn a_query_of_four_dimensions_is_refused() {
    let result = gdn_with(|a| a.q = host(DType::F32, &[3, 2, 4, 2]));
    assert_raised(result, GDN, "ValueError", "argument #2 has shape [3, 2, 4, 2]");
}

fn gdn_of_heads([q, k, v]: [i64; 3]) -> Result<Value> {
    let heads = q.max(v);
    gdn_with(|a| {
        (a.q, a.k, a.v) = (host(DType::F32, &[3, q, 4]), host(DType::F32, &[3, k, 4]), host(DType::F32, &[3, v, 4]));
        (a.output, a.output_state) = (host_mut(DType::F32, &[3, heads, 4]), host_mut(DType::F32, &[2, heads, 4, 4]));
        (a.input_state, a.alpha, a.beta) = (None, None, None);
    })
}

#[test]
fn heads_that_share_no_key_head_evenly_are_refused() {
    for heads in [[3, 2, 2], [2, 2, 3], [1, 2, 1], [2, 0, 2], [2, 2, 0], [0, 0, 0]] {
        let says = format!("{} query, {} key and {} value heads do not group", heads[0], heads[1], heads[2]);
        assert_raised(gdn_of_heads(heads), GDN, "ValueError", &says);
    }
}

#[test]
fn query_heads_that_value_heads_share_unevenly_are_refused() {
    // Four queries for six heads of the output: neither number is a multiple of the other.
    assert_raised(gdn_of_heads([4, 2, 6]), GDN, "ValueError", "4 query, 2 key and 6 value heads do not group");
}

#[test]
fn a_prefill_of_other_types_or_on_a_gpu_is_refused_by_position() {
    assert_gdn_raises(&[
        (|a| a.q = on_gpu(DType::F32, &[3, 2, 4]), "ValueError", "argument #2 must be on the host"),
        (|a| a.cu_seqlens = on_gpu(DType::I64, &[3]), "ValueError", "argument #5 must be on the host"),
        (|a| a.beta = Some(on_gpu(DType::F32, &[3, 2])), "ValueError", "argument #8 must be on the host"),
        (|a| a.q = host(DType::I64, &[3, 2, 4]), "TypeError", "argument #2 holds I64"),
        (|a| a.k = host(DType::F64, &[3, 1, 4]), "TypeError", "argument #3 holds F64"),
        (|a| a.v = host(DType::I32, &[3, 1, 4]), "TypeError", "argument #4 holds I32"),
        (|a| a.output = host_mut(DType::I32, &[3, 2, 4]), "TypeError", "argument #0 holds I32"),
        (|a| a.output_state = host_mut(DType::F64, &[2, 2, 4, 4]), "TypeError", "argument #1 holds F64"),
        (|a| a.input_state = Some(host(DType::I64, &[2, 2, 4, 4])), "TypeError", "argument #6 holds I64"),
        (|a| a.alpha = Some(host(DType::U8, &[3, 2])), "TypeError", "argument #7 holds U8"),
    ]);
}

#[test]
fn sequence_offsets_that_cannot_be_are_refused() {
    fn offsets(values: &'static [i64]) -> TensorRef<'static> {
        TensorRef::from_slice(values, &[values.len() as i64]).unwrap()
    }
    let expected = "expected offsets from 0 to 3 that do not decrease";
    for values in [&[1i64, 2, 3][..], &[0, 1, 2], &[0, 4, 3], &[0, 1, 4], &[0, 3, 2]] {
        assert_raised(gdn_with(|a| a.cu_seqlens = offsets(values)), GDN, "ValueError", expected);
    }
    assert_gdn_raises(&[
        (|a| a.cu_seqlens = offsets(&[-1, 1, 3]), "ValueError", "cu_seqlens[0] is -1"),
        (|a| a.cu_seqlens = offsets(&[0, i64::MIN, 3]), "ValueError", "cu_seqlens[1] is -9223372036854775808"),
        (|a| a.cu_seqlens = host(DType::F32, &[3]), "TypeError", "argument #5 holds F32, expected I64"),
        (|a| a.cu_seqlens = host(DType::I32, &[3]), "TypeError", "argument #5 holds I32, expected I64"),
        (|a| a.cu_seqlens = offsets(&[0, 1, 2, 3]), "ValueError", "argument #1 has shape [2, 2, 4, 4]"),
        (|a| a.cu_seqlens = host(DType::I64, &[3, 1]), "IndexError", "argument #5 has shape [3, 1]"),
    ]);
}

#[test]
fn offsets_past_the_tokens_are_raised_through_the_wrapper_too() {
    function(GDN);
    let (q, out) = (host(DType::BF16, &[3, 1, HEAD_SIZE]), host_mut(DType::BF16, &[3, 1, HEAD_SIZE]));
    let args = Prefill {
        output: out,
        output_state: host_mut(DType::F32, &[1, 1, HEAD_SIZE, HEAD_SIZE]),
        q: q.reborrow(),
        k: q.reborrow(),
        v: q.reborrow(),
        cu_seqlens: TensorRef::from_slice(&[0i64, 4], &[2]).unwrap(),
        input_state: None,
        alpha: None,
        beta: None,
        scale: 0.0,
        workspace: host_mut(DType::U8, &[0]),
    };
    // SAFETY: on the host the contents of cu_seqlens are checked.
    let result = unsafe { args.call(Stream::NULL) };
    assert_raised(
        result.map(|()| Value::None),
        GDN,
        "ValueError",
        "cu_seqlens is [0, 4], expected offsets from 0 to 3",
    );
}

#[test]
fn an_error_leaves_the_thread_fit_for_the_next_call() {
    gdn_with(|a| a.cu_seqlens = host(DType::F32, &[3])).unwrap_err();
    assert!(matches!(gdn_with(|_| {}), Ok(Value::None)));
    assert!(matches!(norm_with(|_| {}), Ok(Value::None)));
}
