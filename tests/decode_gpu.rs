//! Kernels of a decode step on a GPU, against the reference, with indices that lead nowhere too.
//! `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --features cudarc,compute --test decode_gpu` runs them, within 60 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, result};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::kernels::decode::{
    Among, Appended, DecodeOptions, HeadNorm, Step, add, advance, argmax, copy, embedding, is_supported,
    qk_norm_rope_append, rope_append, sample, silu, softmax_rows,
};
use flashinfer_rs::{Device, FlashInferError, LaunchGraph, Result, Stream, TensorMut, TensorRef};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        ("queries_are_turned_and_keys_and_values_appended_as_the_reference_does_in_bf16", turned::<bf16>),
        ("queries_are_turned_and_keys_and_values_appended_as_the_reference_does_in_f16", turned::<f16>),
        ("a_row_whose_place_there_is_not_leaves_everything_as_it_was", nowhere),
        ("rows_are_gathered_and_an_id_that_is_none_gives_nan", gathered),
        ("the_first_of_the_largest_is_found_among_a_vocabulary", largest),
        ("rows_as_long_as_a_vocabulary_become_distributions", distributions),
        ("tokens_are_drawn_as_the_reference_draws_them", drawn),
        ("the_next_step_follows_and_ends_where_the_pages_do", advanced),
        ("copies_are_rounded_as_the_reference_rounds_them", copied),
        ("a_step_is_captured_with_programmatic_edges_and_without", captured),
        ("a_row_has_the_same_bits_whatever_is_beside_it", alone),
        ("a_call_does_not_wait", asynchronous),
        ("the_threads_context_is_what_it_was_on_every_gpu", every_gpu),
        ("the_gpu_is_said_to_be_supported", supported),
    ])
}

const HOST: Stream<'static> = Stream::NULL;

fn options(pdl: bool) -> DecodeOptions {
    DecodeOptions::default().with_pdl(pdl)
}

fn read<'a, T: flashinfer_rs::Element>(
    stream: &'a CudaStream,
    buffer: &'a CudaSlice<T>,
    shape: &[i64],
) -> TensorRef<'a> {
    TensorRef::from_cudarc(stream, buffer, shape).unwrap()
}

fn write<'a, T: flashinfer_rs::Element>(
    stream: &'a CudaStream,
    buffer: &'a mut CudaSlice<T>,
    shape: &[i64],
) -> TensorMut<'a> {
    TensorMut::from_cudarc(stream, buffer, shape).unwrap()
}

/// A step of a paged cache, in numbers that the type of a call holds.
#[derive(Clone)]
struct Case {
    rows: usize,
    q_heads: usize,
    kv_heads: usize,
    size: usize,
    rotary: usize,
    pages: usize,
    page_size: usize,
    width: usize,
    /// What lies between the rows of the packed queries, keys and values.
    gap: usize,
    interleave: bool,
    qkv: Vec<f32>,
    weights: [Vec<f32>; 2],
    angles: Vec<f32>,
    positions: Vec<i32>,
    table: Vec<i32>,
    caches: [Vec<f32>; 2],
}

/// What a call leaves: the packed queries, keys and values, and the caches.
type Left<T> = [Vec<T>; 3];

impl Case {
    fn new<T: Number>(
        seed: u64,
        [rows, q_heads, kv_heads, size, rotary]: [usize; 5],
        [page_size, width, gap]: [usize; 3],
    ) -> Self {
        let mut random = Random(seed);
        let pages = rows * width + 1;
        let numbers = |random: &mut Random, count: usize| widened(&random.normal::<T>(count));
        let qkv = numbers(&mut random, rows * ((q_heads + 2 * kv_heads) * size + gap));
        let weights = [(); 2].map(|()| numbers(&mut random, size));
        let cache = pages * page_size * kv_heads * size;
        let caches = [(); 2].map(|()| numbers(&mut random, cache));
        let angles = random.normal_f32(1.0, page_size * width * rotary);
        let positions = (0..rows).map(|_| (random.uniform() * (page_size * width) as f64) as i32).collect();
        // Each page once, in no order; page 0 is nobody's.
        let mut table: Vec<i32> = (1..=(rows * width) as i32).collect();
        for i in (1..table.len()).rev() {
            table.swap(i, (random.uniform() * (i + 1) as f64) as usize);
        }
        let interleave = seed % 2 == 1;
        Self {
            rows,
            q_heads,
            kv_heads,
            size,
            rotary,
            pages,
            page_size,
            width,
            gap,
            interleave,
            qkv,
            weights,
            angles,
            positions,
            table,
            caches,
        }
    }

    fn packed(&self) -> ([i64; 3], [i64; 3]) {
        let heads = self.q_heads + 2 * self.kv_heads;
        let row = heads * self.size + self.gap;
        ([self.rows, heads, self.size].map(|n| n as i64), [row as i64, self.size as i64, 1])
    }

    /// The call over tensors, wherever they are.
    #[expect(clippy::too_many_arguments, reason = "the kernel's own")]
    fn call(
        &self,
        all: &mut TensorMut<'_>,
        [q_weight, k_weight]: [TensorRef<'_>; 2],
        [cos_sin, positions, page_table]: [TensorRef<'_>; 3],
        [k_cache, v_cache]: [TensorMut<'_>; 2],
        normed: bool,
        pdl: bool,
        stream: Stream<'_>,
    ) -> Result<()> {
        let (mut q, mut rest) = all.split_at(1, self.q_heads as i64)?;
        let (k, v) = rest.split_at(1, self.kv_heads as i64)?;
        let (k, v, interleave) = (k.as_ref(), v.as_ref(), self.interleave);
        let mut appended = Appended { k, v, cos_sin, positions, page_table, k_cache, v_cache, interleave };
        if normed {
            let norm = HeadNorm { q_weight: &q_weight, k_weight: &k_weight, eps: 1e-6 };
            qk_norm_rope_append(&mut q, norm, &mut appended, &options(pdl), stream)
        } else {
            rope_append(&mut q, &mut appended, &options(pdl), stream)
        }
    }

    fn shapes(&self) -> ([i64; 2], [i64; 1], [i64; 2], [i64; 4]) {
        let [rows, kv_heads, size, rotary, pages, page_size, width] =
            [self.rows, self.kv_heads, self.size, self.rotary, self.pages, self.page_size, self.width]
                .map(|n| n as i64);
        ([self.angles.len() as i64 / rotary, rotary], [rows], [rows, width], [pages, page_size, kv_heads, size])
    }

    fn on_host(&self, normed: bool) -> Result<Left<f32>> {
        let mut left = [self.qkv.clone(), self.caches[0].clone(), self.caches[1].clone()];
        let ((shape, strides), (angles, rows, table, cache)) = (self.packed(), self.shapes());
        let size = [self.size as i64];
        let [qkv, k, v] = &mut left;
        self.call(
            &mut TensorMut::from_slice_strided(qkv, &shape, &strides)?,
            [TensorRef::from_slice(&self.weights[0], &size)?, TensorRef::from_slice(&self.weights[1], &size)?],
            [
                TensorRef::from_slice(&self.angles, &angles)?,
                TensorRef::from_slice(&self.positions, &rows)?,
                TensorRef::from_slice(&self.table, &table)?,
            ],
            [TensorMut::from_slice(k, &cache)?, TensorMut::from_slice(v, &cache)?],
            normed,
            false,
            HOST,
        )?;
        Ok(left)
    }

    fn on_gpu<T: Number>(&self, stream: &Arc<CudaStream>, normed: bool, pdl: bool) -> Left<T> {
        let narrow = |numbers: &[f32]| {
            let numbers: Vec<T> = numbers.iter().map(|x| T::from_f64(f64::from(*x))).collect();
            stream.clone_htod(&numbers).unwrap()
        };
        let ((shape, strides), (angles, rows, table, cache)) = (self.packed(), self.shapes());
        let size = [self.size as i64];
        let mut left = [narrow(&self.qkv), narrow(&self.caches[0]), narrow(&self.caches[1])];
        let weights = [narrow(&self.weights[0]), narrow(&self.weights[1])];
        let cos_sin = stream.clone_htod(&self.angles).unwrap();
        let (positions, pages) = (stream.clone_htod(&self.positions).unwrap(), stream.clone_htod(&self.table).unwrap());
        {
            let [qkv, k, v] = &mut left;
            self.call(
                &mut TensorMut::from_cudarc_strided(stream, qkv, &shape, &strides).unwrap(),
                [read(stream, &weights[0], &size), read(stream, &weights[1], &size)],
                [read(stream, &cos_sin, &angles), read(stream, &positions, &rows), read(stream, &pages, &table)],
                [write(stream, k, &cache), write(stream, v, &cache)],
                normed,
                pdl,
                Stream::cudarc(stream),
            )
            .unwrap();
        }
        left.map(|buffer| stream.clone_dtoh(&buffer).unwrap())
    }
}

/// The heads of Qwen3-0.6B and Llama-3.2-1B, larger and smaller ones, and some that are turned in part.
const HEADS: [[usize; 5]; 9] = [
    [1, 16, 8, 128, 128],
    [32, 16, 8, 128, 128],
    [1, 32, 8, 64, 64],
    [7, 32, 8, 64, 64],
    [3, 16, 2, 256, 64],
    [5, 4, 1, 256, 256],
    [2, 5, 3, 96, 32],
    [3, 1, 1, 6, 2],
    [2, 3, 1, 130, 130],
];

fn turned<T: Number>(gpu: &Gpu) {
    for (seed, heads) in HEADS.into_iter().enumerate() {
        let paged = [[64, 3, 0], [16, 5, 8], [1, 7, 3]][seed % 3];
        let case = Case::new::<T>(seed as u64, heads, paged);
        for normed in [false, true] {
            let expected = case.on_host(normed).unwrap();
            let plain = case.on_gpu::<T>(&gpu.stream, normed, false);
            let early = case.on_gpu::<T>(&gpu.stream, normed, true);
            let bits =
                |left: &Left<T>| left.each_ref().map(|numbers| widened(numbers).iter().map(|x| x.to_bits()).collect());
            let same: [Vec<u32>; 3] = bits(&plain);
            assert_eq!(same, bits(&early), "{heads:?}: launched early");
            for ((name, found), expected) in ["qkv", "k_cache", "v_cache"].iter().zip(&plain).zip(&expected) {
                // Rounded once: half of a last bit, of 8 or of 11.
                let (found, tolerance) =
                    (widened(found), if T::from_f64(1.0 / 256.0 + 1.0).into() == 1.0 { 3e-3 } else { 5e-4 });
                assert_close(&format!("{name} of {heads:?}, normed: {normed}"), &found, expected, tolerance);
                // No number is far from its own: places are not mixed up.
                let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-2 * largest;
                assert!(found.iter().zip(expected).all(near), "{name} of {heads:?}, normed: {normed}");
            }
        }
    }
}

/// What is wrong with a row, on the device, where nobody could look at it.
fn nowhere(gpu: &Gpu) {
    let whole = Case::new::<bf16>(20, [4, 6, 2, 128, 128], [16, 3, 8]);
    let (row, last) = (2, (whole.angles.len() / whole.rotary) as i32);
    let position = whole.positions[row] as usize / whole.page_size;
    let positions = [-1, i32::MIN, i32::MAX, last, last + 1];
    let pages = [-1, i32::MIN, i32::MAX, whole.pages as i32];
    let mut cases = Vec::new();
    for wrong in positions {
        let mut case = whole.clone();
        case.positions[row] = wrong;
        cases.push(case);
    }
    for wrong in pages {
        let mut case = whole.clone();
        case.table[row * whole.width + position] = wrong;
        cases.push(case);
    }
    // Angles for more than there are pages for.
    let mut far = whole.clone();
    far.angles.extend(vec![0.5; 40 * far.rotary]);
    far.positions[row] = last + 3;
    cases.push(far);
    for case in cases {
        for normed in [false, true] {
            assert!(case.on_host(normed).is_err(), "the host refuses it");
            let left = case.on_gpu::<bf16>(&gpu.stream, normed, true);
            // As if the row were not there: of a step that has it right, the row's own queries and place as before.
            let [mut qkv, mut k, mut v] = whole.on_gpu::<bf16>(&gpu.stream, normed, false);
            let (_, [stride, ..]) = case.packed();
            let of_row = row * stride as usize..(row + 1) * stride as usize;
            for i in of_row {
                qkv[i] = bf16::from_f32(whole.qkv[i]);
            }
            let page = whole.table[row * whole.width + position] as usize;
            let token = whole.kv_heads * whole.size;
            let entry = (page * whole.page_size + whole.positions[row] as usize % whole.page_size) * token;
            for i in entry..entry + token {
                k[i] = bf16::from_f32(whole.caches[0][i]);
                v[i] = bf16::from_f32(whole.caches[1][i]);
            }
            let bits = |numbers: &[bf16]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            for (found, expected) in left.iter().zip([&qkv, &k, &v]) {
                assert!(bits(found) == bits(expected), "{} at {:?}", case.positions[row], &case.table);
            }
        }
    }
}

fn gathered(gpu: &Gpu) {
    let stream = &gpu.stream;
    let mut random = Random(30);
    for (tokens, columns, rows) in [(100, 1024, 1), (50, 2048, 32), (9, 7, 5), (33, 4104, 3), (1000, 9000, 2)] {
        let table = random.normal::<bf16>(tokens * columns);
        let mut ids: Vec<i32> = (0..rows).map(|_| (random.uniform() * tokens as f64) as i32).collect();
        ids[0] = tokens as i32 - 1;
        let mut expected: Vec<f32> =
            ids.iter().flat_map(|id| widened(&table[*id as usize * columns..][..columns])).map(|x| x * 4.5).collect();
        if rows > 2 {
            for (row, wrong) in [(1, -1), (2, tokens as i32)] {
                ids[row] = wrong;
                expected[row * columns..][..columns].fill(f32::NAN);
            }
        }
        let (on_gpu, ids) = (stream.clone_htod(&table).unwrap(), stream.clone_htod(&ids).unwrap());
        let mut out = stream.clone_htod(&vec![bf16::ONE; rows * columns + 1]).unwrap();
        let (shape, of_table) = ([rows as i64, columns as i64], [tokens as i64, columns as i64]);
        for pdl in [false, true] {
            let mut to = write(stream, &mut out, &shape);
            let (ids, table) = (read(stream, &ids, &[rows as i64]), read(stream, &on_gpu, &of_table));
            embedding(&mut to, &ids, &table, 4.5, &options(pdl), Stream::cudarc(stream)).unwrap();
            let found = widened(&stream.clone_dtoh(&out).unwrap());
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let rounded = bf16::from_f32(*expected).to_f32();
                assert!(*found == rounded || found.is_nan() && expected.is_nan(), "{found} at {i}, expected {rounded}");
            }
            assert_eq!(found[rows * columns], 1.0, "behind the last");
        }
    }
}

/// The places of the largest of rows, by the reference.
fn first_of(logits: &[f32], columns: usize) -> Vec<i32> {
    let rows = (logits.len() / columns) as i64;
    let mut token = vec![-1i32; rows as usize];
    let mut out = TensorMut::from_slice(&mut token, &[rows]).unwrap();
    let logits = TensorRef::from_slice(logits, &[rows, columns as i64]).unwrap();
    argmax(&mut out, &logits, &options(false), HOST).unwrap();
    token
}

fn found_largest<T: flashinfer_rs::Element + cudarc::driver::DeviceRepr>(
    stream: &Arc<CudaStream>,
    logits: &[T],
    columns: usize,
    pdl: bool,
) -> Vec<i32> {
    let rows = (logits.len() / columns) as i64;
    let on_gpu = stream.clone_htod(logits).unwrap();
    let mut token = stream.clone_htod(&vec![-7i32; rows as usize + 1]).unwrap();
    let logits = read(stream, &on_gpu, &[rows, columns as i64]);
    argmax(&mut write(stream, &mut token, &[rows]), &logits, &options(pdl), Stream::cudarc(stream)).unwrap();
    let mut found = stream.clone_dtoh(&token).unwrap();
    assert_eq!(found.pop(), Some(-7), "behind the last");
    found
}

fn largest(gpu: &Gpu) {
    let stream = &gpu.stream;
    let mut random = Random(40);
    for (rows, columns) in [(1, 151_936), (32, 151_936), (3, 128_256), (5, 50_257), (2, 1), (4, 7), (3, 8191)] {
        let wide = random.normal_f32(1.0, rows * columns);
        let bf16s: Vec<bf16> = wide.iter().map(|x| bf16::from_f32(*x)).collect();
        // Steps of an eighth: the largest is there many times.
        let coarse: Vec<f16> = wide.iter().map(|x| f16::from_f32((x * 8.0).round() / 8.0)).collect();
        let mut odd = wide.clone();
        for (i, x) in odd.iter_mut().enumerate() {
            match i % 5 {
                0 => *x = f32::NAN,
                1 => *x = f32::NEG_INFINITY,
                2 => *x = -x.abs(),
                _ => {}
            }
        }
        odd[..columns].fill(f32::NEG_INFINITY);
        for pdl in [false, true] {
            assert_eq!(found_largest(stream, &wide, columns, pdl), first_of(&wide, columns), "{rows}, {columns}");
            assert_eq!(found_largest(stream, &bf16s, columns, pdl), first_of(&widened(&bf16s), columns), "{columns}");
            assert_eq!(found_largest(stream, &coarse, columns, pdl), first_of(&widened(&coarse), columns), "{columns}");
            assert_eq!(found_largest(stream, &odd, columns, pdl), first_of(&odd, columns), "{rows}, {columns}");
        }
    }
}

fn distributions(gpu: &Gpu) {
    let stream = &gpu.stream;
    let mut random = Random(50);
    for (rows, columns, temperature) in
        [(1i64, 151_936i64, 1.0), (32, 32_000, 0.7), (3, 50_257, 2.0), (2, 1, 1.0), (4, 7, 0.25)]
    {
        let logits = random.normal_f32(4.0, (rows * columns) as usize);
        let mut expected = logits.clone();
        let mut row = TensorMut::from_slice(&mut expected, &[rows, columns]).unwrap();
        softmax_rows(&mut row, temperature, &options(false), HOST).unwrap();
        let mut first: Option<Vec<u32>> = None;
        for pdl in [false, true] {
            let mut on_gpu = stream.clone_htod(&logits).unwrap();
            let mut tensor = write(stream, &mut on_gpu, &[rows, columns]);
            softmax_rows(&mut tensor, temperature, &options(pdl), Stream::cudarc(stream)).unwrap();
            let found = stream.clone_dtoh(&on_gpu).unwrap();
            assert_close(&format!("{rows}, {columns}"), &found, &expected, 1e-5);
            for row in found.chunks(columns as usize) {
                let sum: f64 = row.iter().map(|x| f64::from(*x)).sum();
                assert!((sum - 1.0).abs() < 1e-4, "a sum of {sum}");
            }
            let bits: Vec<u32> = found.iter().map(|x| x.to_bits()).collect();
            assert!(first.get_or_insert_with(|| bits.clone()) == &bits, "other bits");
        }
    }
}

fn draw_on_host(probs: &[f32], columns: usize, numbers: &[f32], among: Among) -> Vec<i32> {
    let rows = numbers.len() as i64;
    let mut token = vec![-1i32; numbers.len()];
    let mut out = TensorMut::from_slice(&mut token, &[rows]).unwrap();
    let probs = TensorRef::from_slice(probs, &[rows, columns as i64]).unwrap();
    sample(&mut out, &probs, &TensorRef::from_slice(numbers, &[rows]).unwrap(), among, &options(false), HOST).unwrap();
    token
}

fn draw(stream: &Arc<CudaStream>, probs: &[f32], columns: usize, numbers: &[f32], among: Among, pdl: bool) -> Vec<i32> {
    let rows = numbers.len() as i64;
    let (on_gpu, by) = (stream.clone_htod(probs).unwrap(), stream.clone_htod(numbers).unwrap());
    let mut token = stream.clone_htod(&vec![-7i32; numbers.len() + 1]).unwrap();
    let mut out = write(stream, &mut token, &[rows]);
    let (probs, number) = (read(stream, &on_gpu, &[rows, columns as i64]), read(stream, &by, &[rows]));
    sample(&mut out, &probs, &number, among, &options(pdl), Stream::cudarc(stream)).unwrap();
    let mut found = stream.clone_dtoh(&token).unwrap();
    assert_eq!(found.pop(), Some(-7), "behind the last");
    found
}

fn drawn(gpu: &Gpu) {
    let mut random = Random(60);
    let among = [(0, 0.0), (1, 0.0), (50, 0.0), (0, 0.9), (0, 0.05), (40, 0.8), (0, 1.0), (1_000_000, 1.0)];
    for (rows, columns) in [(1, 151_936), (32, 32_000), (7, 1000), (5, 3), (2, 1)] {
        // As a softmax has them, and such that many are alike.
        for alike in [false, true] {
            let mut probs = Vec::with_capacity(rows * columns);
            for _ in 0..rows {
                let weight = |random: &mut Random| {
                    let x = 3.0 * random.gauss();
                    (if alike { x.round() } else { x }).exp()
                };
                let row: Vec<f64> = (0..columns).map(|_| weight(&mut random)).collect();
                let sum: f64 = row.iter().sum();
                probs.extend(row.iter().map(|x| (x / sum) as f32));
            }
            let numbers = random.between(0.0, 0.999, rows);
            for (top_k, top_p) in among {
                let among = Among::new(top_k, top_p);
                let expected = draw_on_host(&probs, columns, &numbers, among);
                for pdl in [false, true] {
                    let found = draw(&gpu.stream, &probs, columns, &numbers, among, pdl);
                    assert_eq!(found, expected, "{rows}, {columns}, {among:?}, alike: {alike}");
                }
            }
        }
    }
    // What is no probability, and numbers that are out of range.
    let probs = [0.0, 0.0, 0.0, 0.0, f32::NAN, -1.0, 0.5, 0.0, f32::INFINITY, 0.25, 0.0, 0.0, 0.25, 0.75, 0.0, 0.0];
    let numbers = [0.5, 0.1, 0.0, 1.5];
    let expected = draw_on_host(&probs, 4, &numbers, Among::default());
    assert_eq!(draw(&gpu.stream, &probs, 4, &numbers, Among::default(), false), expected);
    assert_eq!(expected, [0, 2, 0, 1]);
}

fn advanced(gpu: &Gpu) {
    let stream = &gpu.stream;
    for (rows, capacity) in [(1, 12), (5, 12), (300, 4096), (5, 1)] {
        let edge = [0, capacity - 2, capacity - 1, capacity, -1, i32::MIN, i32::MAX];
        let values: Vec<i32> = (0..rows).map(|i| edge[i as usize % edge.len()]).collect();
        let token: Vec<i32> = (0..rows).map(|i| 1000 + i).collect();
        let [mut ids, mut positions, mut lengths] = [(); 3].map(|()| values.clone());
        let shape = [i64::from(rows)];
        let mut step = Step {
            ids: TensorMut::from_slice(&mut ids, &shape).unwrap(),
            positions: TensorMut::from_slice(&mut positions, &shape).unwrap(),
            lengths: TensorMut::from_slice(&mut lengths, &shape).unwrap(),
        };
        let tokens = TensorRef::from_slice(&token, &shape).unwrap();
        advance(&tokens, &mut step, i64::from(capacity), &options(false), HOST).unwrap();
        assert!(
            positions.iter().all(|x| (0..capacity).contains(x)) && lengths.iter().all(|x| (1..=capacity).contains(x))
        );
        for pdl in [false, true] {
            let on_gpu = stream.clone_htod(&token).unwrap();
            let mut state = [(); 3].map(|()| stream.clone_htod(&values).unwrap());
            let [a, b, c] = &mut state;
            let mut step = Step {
                ids: write(stream, a, &shape),
                positions: write(stream, b, &shape),
                lengths: write(stream, c, &shape),
            };
            let tokens = read(stream, &on_gpu, &shape);
            advance(&tokens, &mut step, i64::from(capacity), &options(pdl), Stream::cudarc(stream)).unwrap();
            let found = state.map(|buffer| stream.clone_dtoh(&buffer).unwrap());
            assert_eq!(found, [ids.clone(), positions.clone(), lengths.clone()], "{rows} of {capacity}");
        }
    }
}

/// A copy on both sides, bit for bit, from a type to another.
fn copies<T, U>(stream: &Arc<CudaStream>, input: &[T], [rows, columns]: [i64; 2])
where
    T: flashinfer_rs::Element + cudarc::driver::DeviceRepr,
    U: flashinfer_rs::Element + cudarc::driver::DeviceRepr + Default + Into<f64>,
{
    let mut expected = vec![U::default(); input.len()];
    let mut out = TensorMut::from_slice(&mut expected, &[rows, columns]).unwrap();
    copy(&mut out, &TensorRef::from_slice(input, &[rows, columns]).unwrap(), &options(false), HOST).unwrap();
    let on_gpu = stream.clone_htod(input).unwrap();
    let mut found = stream.clone_htod(&vec![U::default(); input.len()]).unwrap();
    let mut out = write(stream, &mut found, &[rows, columns]);
    copy(&mut out, &read(stream, &on_gpu, &[rows, columns]), &options(true), Stream::cudarc(stream)).unwrap();
    let wide = |numbers: Vec<U>| numbers.into_iter().map(|x| Into::<f64>::into(x).to_bits()).collect::<Vec<_>>();
    assert!(wide(stream.clone_dtoh(&found).unwrap()) == wide(expected), "{rows}, {columns}");
}

fn copied(gpu: &Gpu) {
    let (stream, mut random) = (&gpu.stream, Random(70));
    for shape in [[1, 1024], [3, 7], [33, 4104], [2, 1]] {
        let mut wide = random.normal_f32(10.0, (shape[0] * shape[1]) as usize);
        wide[0] = f32::INFINITY;
        let bf16s: Vec<bf16> = wide.iter().map(|x| bf16::from_f32(*x)).collect();
        let f16s: Vec<f16> = wide.iter().map(|x| f16::from_f32(*x)).collect();
        copies::<f32, bf16>(stream, &wide, shape);
        copies::<f32, f16>(stream, &wide, shape);
        copies::<f32, f32>(stream, &wide, shape);
        copies::<bf16, f32>(stream, &bf16s, shape);
        copies::<bf16, f16>(stream, &bf16s, shape);
        copies::<bf16, bf16>(stream, &bf16s, shape);
        copies::<f16, f32>(stream, &f16s, shape);
        copies::<f16, bf16>(stream, &f16s, shape);
        copies::<f16, f16>(stream, &f16s, shape);
    }
}

const VOCAB: i64 = 3000;
const COLUMNS: i64 = 512;
const BATCH: i64 = 3;

/// A step in small, each of whose calls reads what the one before wrote: a gather, a sum with the rows of the table by which
/// each of another step is weighed, the largest of it, and the next step's inputs.
fn captured(gpu: &Gpu) {
    let stream = &gpu.stream;
    let table = Random(80).normal::<bf16>((VOCAB * COLUMNS) as usize);
    let first = [5i32, 2999, 17];
    // On the host: `x ← 2 · row`, its place of the largest times 5 is no token of its own, so that ids go about.
    let expected = |steps: usize| {
        let (mut ids, mut seen) = (first, Vec::new());
        for _ in 0..steps {
            for id in &mut ids {
                let row = &table[*id as usize * COLUMNS as usize..][..COLUMNS as usize];
                let doubled: Vec<f32> = row.iter().map(|x| bf16::from_f32(x.to_f32() * 0.5).to_f32()).collect();
                let doubled: Vec<f32> = doubled.iter().map(|x| bf16::from_f32(x + x).to_f32()).collect();
                *id = first_of(&doubled, COLUMNS as usize)[0];
            }
            seen.push(ids);
        }
        seen
    };
    let expected = expected(6);
    for pdl in [true, false] {
        let buffers = (
            stream.clone_htod(&table).unwrap(),
            stream.clone_htod(&first).unwrap(),
            stream.clone_htod(&[0i32; 3]).unwrap(),
            stream.clone_htod(&[1i32; 3]).unwrap(),
            stream.alloc_zeros::<bf16>((BATCH * COLUMNS) as usize).unwrap(),
            stream.alloc_zeros::<bf16>((BATCH * COLUMNS) as usize).unwrap(),
            stream.alloc_zeros::<i32>(BATCH as usize).unwrap(),
        );
        let mut graph = LaunchGraph::new(stream, buffers).unwrap().with_pdl(pdl);
        let calls = graph.capture(|s, (table, mut ids, mut positions, mut lengths, mut x, mut y, mut token)| {
            let (options, rows) = (DecodeOptions::default(), [BATCH, COLUMNS]);
            let all = table.read(&[VOCAB, COLUMNS])?;
            embedding(&mut x.write(&rows)?, &ids.read(&[BATCH])?, &all, 0.5, &options, s)?;
            copy(&mut y.write(&rows)?, &x.read(&rows)?, &options, s)?;
            add(&mut x.write(&rows)?, &y.read(&rows)?, &options, s)?;
            argmax(&mut token.write(&[BATCH])?, &x.read(&rows)?, &options, s)?;
            let mut step = Step {
                ids: ids.write(&[BATCH])?,
                positions: positions.write(&[BATCH])?,
                lengths: lengths.write(&[BATCH])?,
            };
            advance(&token.read(&[BATCH])?, &mut step, 5, &options, s)
        });
        calls.unwrap();
        for (step, expected) in expected.iter().enumerate() {
            graph.launch().unwrap();
            let buffers = graph.buffers().unwrap();
            assert_eq!(stream.clone_dtoh(&buffers.1).unwrap(), expected, "step {step}, early: {pdl}");
            let at = (step as i32 + 1).min(4);
            assert_eq!(stream.clone_dtoh(&buffers.2).unwrap(), [at; 3]);
            assert_eq!(stream.clone_dtoh(&buffers.3).unwrap(), [at + 1; 3]);
        }
    }
}

fn alone(gpu: &Gpu) {
    let stream = &gpu.stream;
    let case = Case::new::<bf16>(90, [5, 16, 8, 128, 128], [16, 3, 0]);
    let mut others = case.clone();
    let (_, [stride, ..]) = case.packed();
    let own = 2 * stride as usize..3 * stride as usize;
    for (i, x) in others.qkv.iter_mut().enumerate() {
        if !own.contains(&i) {
            *x = 3.0 - *x;
        }
    }
    let [a, ..] = case.on_gpu::<bf16>(stream, true, true);
    let [b, ..] = others.on_gpu::<bf16>(stream, true, true);
    assert!(a[own.clone()] == b[own.clone()] && a[..own.start] != b[..own.start]);
    let columns = 32_000;
    let logits = Random(91).normal_f32(3.0, 5 * columns);
    let softmax = |logits: &[f32]| {
        let mut on_gpu = stream.clone_htod(logits).unwrap();
        let shape = [(logits.len() / columns) as i64, columns as i64];
        let mut rows = write(stream, &mut on_gpu, &shape);
        softmax_rows(&mut rows, 0.8, &options(false), Stream::cudarc(stream)).unwrap();
        stream.clone_dtoh(&on_gpu).unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    assert!(softmax(&logits)[3 * columns..4 * columns] == softmax(&logits[3 * columns..4 * columns])[..]);
}

fn asynchronous(gpu: &Gpu) {
    let stream = &gpu.stream;
    let mut a = stream.alloc_zeros::<bf16>(1024).unwrap();
    let mut call = || silu(&mut write(stream, &mut a, &[1, 1024]), &options(true), Stream::cudarc(stream)).unwrap();
    // The first one loads the kernel.
    call();
    gpu.assert_asynchronous(stream, call);
}

fn every_gpu(_: &Gpu) {
    let count = CudaContext::device_count().unwrap() as usize;
    println!("{count} GPUs");
    let streams: Vec<_> = (0..count).map(|id| CudaContext::new(id).unwrap().new_stream().unwrap()).collect();
    for (id, stream) in streams.iter().enumerate() {
        let mut a = stream.clone_htod(&[bf16::ONE; 64]).unwrap();
        let b = stream.clone_htod(&[bf16::ONE; 64]).unwrap();
        for (turn, current) in streams.iter().enumerate() {
            let (mut a_rows, b) = (write(stream, &mut a, &[4, 16]), read(stream, &b, &[4, 16]));
            current.context().bind_to_thread().unwrap();
            add(&mut a_rows, &b, &options(false), Stream::cudarc(stream)).unwrap();
            let after = result::ctx::get_current().unwrap();
            assert_eq!(after, Some(current.context().cu_ctx()), "after a call on cuda:{id}");
            assert_eq!(stream.clone_dtoh(&a).unwrap(), [bf16::from_f32(turn as f32 + 2.0); 64], "cuda:{id}");
        }
    }
    // A number that is none of a device's is an error, and nothing is launched.
    // SAFETY: no memory is touched: there is no such device.
    let nowhere = unsafe {
        let at = std::ptr::without_provenance_mut(256);
        TensorMut::from_raw(at, Device::Cuda(count as u32), flashinfer_rs::DType::BF16, &[1, 8], None)
    };
    let refused = silu(&mut nowhere.unwrap(), &options(false), Stream::NULL);
    assert!(matches!(refused, Err(FlashInferError::DeviceOutOfRange { .. })), "{refused:?}");
}

fn supported(_: &Gpu) {
    assert!(is_supported(Device::Cuda(0)).unwrap());
}
