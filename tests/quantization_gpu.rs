//! Packing bits on a GPU, against the reference and against what is refused. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test
//! --features cudarc,quantization --test quantization_gpu` runs them, within 60 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result};
use data::Random;
use flashinfer_rs::kernels::quantization::{BitOrder, PackedSegments, is_supported, packbits, segment_packbits};
use flashinfer_rs::{Device, FlashInferError, LaunchGraph, OnDevice, Placed, Stream, TensorMut, TensorRef};
use gpu::Gpu;

fn main() -> ExitCode {
    gpu::main(&[
        ("bits_of_any_number_are_packed", any_number),
        ("x_may_start_at_any_address", any_address),
        ("more_than_2_31_elements_are_packed", many),
        ("another_number_than_0_and_1_spoils_its_own_byte_alone", spoiled),
        ("segments_are_packed_by_themselves", segments),
        ("segments_are_replaced_in_a_graph", replaced),
        ("a_call_does_not_wait", asynchronous),
        ("the_threads_context_is_what_it_was_on_every_gpu", every_gpu),
        ("what_breaks_the_contract_is_refused", refused),
        ("nothing_is_launched_for_nothing", nothing),
        ("the_gpu_is_said_to_be_supported", supported),
    ])
}

const ORDERS: [BitOrder; 2] = [BitOrder::Big, BitOrder::Little];

fn bits(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..count).map(|_| u8::from(random.uniform() < 0.4)).collect()
}

fn expected(x: &[u8], bitorder: BitOrder) -> Vec<u8> {
    let mut y = vec![0; x.len().div_ceil(8)];
    packbits(
        &mut TensorMut::from_slice(&mut y, &[x.len().div_ceil(8) as i64]).unwrap(),
        &TensorRef::from_slice(x, &[x.len() as i64]).unwrap(),
        bitorder,
        Stream::NULL,
    )
    .unwrap();
    y
}

fn expected_of_segments(x: &[u8], segments: &PackedSegments, bitorder: BitOrder) -> Vec<u8> {
    let mut y = vec![0; segments.bytes() as usize];
    segment_packbits(
        &mut TensorMut::from_slice(&mut y, &[segments.bytes()]).unwrap(),
        &TensorRef::from_slice(x, &[segments.elements()]).unwrap(),
        &Placed::on_host(segments).unwrap(),
        bitorder,
        Stream::NULL,
    )
    .unwrap();
    y
}

/// What is behind the bytes that are written.
const GUARD: [u8; 16] = [0x5A; 16];

/// Packs what starts at `skip` in a buffer, with numbers that are no part of it around it.
fn found(stream: &Arc<CudaStream>, x: &[u8], skip: usize, bitorder: BitOrder) -> Vec<u8> {
    let (count, bytes) = (x.len() as i64, x.len().div_ceil(8));
    let buffer = stream.clone_htod(&[&vec![1; skip][..], x, &[1; 16]].concat()).unwrap();
    let mut y = stream.clone_htod(&[&vec![0xFF; bytes][..], &GUARD].concat()).unwrap();
    packbits(
        &mut TensorMut::from_cudarc(stream, &mut y, &[bytes as i64]).unwrap(),
        &TensorRef::from_cudarc(stream, &buffer.slice(skip..), &[count]).unwrap(),
        bitorder,
        Stream::cudarc(stream),
    )
    .unwrap();
    let mut y = stream.clone_dtoh(&y).unwrap();
    assert_eq!(y.split_off(bytes), GUARD, "written behind the last byte");
    y
}

fn any_number(gpu: &Gpu) {
    for count in [1, 7, 8, 9, 255, 2047, 2048, 2049, 2056, 100_000, 1 << 20] {
        let x = bits(count as u64, count);
        for order in ORDERS {
            assert_eq!(found(&gpu.stream, &x, 0, order), expected(&x, order), "{count} elements, {order:?}");
        }
    }
}

fn any_address(gpu: &Gpu) {
    let x = bits(3, 5000);
    for skip in 0..17 {
        assert_eq!(found(&gpu.stream, &x, skip, BitOrder::Little), expected(&x, BitOrder::Little), "at {skip}");
    }
}

fn many(gpu: &Gpu) {
    let (stream, count) = (&gpu.stream, (1usize << 31) + 4097);
    let mut x = stream.alloc_zeros::<u8>(count).unwrap();
    let mut y = stream.alloc_zeros::<u8>(count.div_ceil(8)).unwrap();
    // The first ones, those around 2^31, and the last ones.
    let x_of = bits(4, 4097);
    let places = [0, (1 << 31) - 2048, count - 1000];
    for &place in &places {
        let length = x_of.len().min(count - place);
        stream.memcpy_htod(&x_of[..length], &mut x.slice_mut(place..place + length)).unwrap();
    }
    packbits(
        &mut TensorMut::from_cudarc(stream, &mut y, &[count.div_ceil(8) as i64]).unwrap(),
        &TensorRef::from_cudarc(stream, &x, &[count as i64]).unwrap(),
        BitOrder::Big,
        Stream::cudarc(stream),
    )
    .unwrap();
    for &place in &places {
        let start = place / 8 * 8;
        let end = (start + 8192).min(count);
        let x = stream.clone_dtoh(&x.slice(start..end)).unwrap();
        let y = stream.clone_dtoh(&y.slice(start / 8..end.div_ceil(8))).unwrap();
        assert_eq!(y, expected(&x, BitOrder::Big), "from {start} on");
    }
}

fn spoiled(gpu: &Gpu) {
    let mut x = bits(5, 4000);
    let right = expected(&x, BitOrder::Big);
    x[1234] = 0xFE;
    let mut found = found(&gpu.stream, &x, 0, BitOrder::Big);
    found[1234 / 8] = right[1234 / 8];
    assert_eq!(found, right);
}

fn segments(gpu: &Gpu) {
    let stream = &gpu.stream;
    let many: Vec<i64> = (0..1000).map(|i| (i * 37) % 91).collect();
    let cases: [&[i64]; 5] = [&[1], &[0, 5000, 0, 8, 2048, 2049, 1, 0], &[100_000], &many, &[0, 0, 3]];
    for lengths in cases {
        let segments = PackedSegments::from_lengths(lengths).unwrap();
        let x = bits(6, segments.elements() as usize);
        let x_gpu = stream.clone_htod(&x).unwrap();
        let on_gpu = OnDevice::new(segments.clone(), stream).unwrap();
        for order in ORDERS {
            let bytes = segments.bytes() as usize;
            let mut y = stream.clone_htod(&[&vec![0xFF; bytes][..], &GUARD].concat()).unwrap();
            segment_packbits(
                &mut TensorMut::from_cudarc(stream, &mut y, &[segments.bytes()]).unwrap(),
                &TensorRef::from_cudarc(stream, &x_gpu, &[segments.elements()]).unwrap(),
                &on_gpu.placed(stream).unwrap(),
                order,
                Stream::cudarc(stream),
            )
            .unwrap();
            let mut y = stream.clone_dtoh(&y).unwrap();
            assert_eq!(y.split_off(bytes), GUARD, "written behind the last byte");
            assert_eq!(y, expected_of_segments(&x, &segments, order), "{} segments, {order:?}", lengths.len());
        }
    }
}

fn replaced(gpu: &Gpu) {
    let stream = &gpu.stream;
    let captured = PackedSegments::from_lengths(&[100, 2100, 7]).unwrap();
    let (elements, bytes) = (captured.elements(), captured.bytes());
    let x = bits(7, elements as usize);
    let buffers = (
        stream.clone_htod(&x).unwrap(),
        OnDevice::new(captured.clone(), stream).unwrap(),
        stream.alloc_zeros::<u8>(bytes as usize).unwrap(),
    );
    let mut graph = LaunchGraph::new(stream, buffers).unwrap();
    let calls = graph.capture(|s, (x, segments, mut y)| {
        segment_packbits(&mut y.write(&[bytes])?, &x.read(&[elements])?, &segments.placed()?, BitOrder::Big, s)
    });
    calls.unwrap();
    for lengths in [&[100, 2100, 7][..], &[5, 0, 2000], &[2207], &[0, 9]] {
        let segments = PackedSegments::from_lengths(lengths).unwrap();
        {
            let (_, mut on_gpu, mut y) = graph.buffers().unwrap();
            on_gpu.replace(&segments, stream).unwrap();
            stream.memset_zeros(&mut y).unwrap();
        }
        graph.launch().unwrap();
        let found = stream.clone_dtoh(&graph.buffers().unwrap().2).unwrap();
        let mut expected = expected_of_segments(&x[..segments.elements() as usize], &segments, BitOrder::Big);
        expected.resize(bytes as usize, 0);
        assert_eq!(found, expected, "{lengths:?}");
    }
    let more = PackedSegments::from_lengths(&[2208]).unwrap();
    let (_, mut on_gpu, _) = graph.buffers().unwrap();
    let error = on_gpu.replace(&more, stream).unwrap_err();
    assert!(error.to_string().contains("as captured"), "{error}");
}

fn asynchronous(gpu: &Gpu) {
    let stream = &gpu.stream;
    let segments = PackedSegments::from_lengths(&[64]).unwrap();
    let (x, on_gpu) = (stream.alloc_zeros::<u8>(64).unwrap(), OnDevice::new(segments, stream).unwrap());
    let mut y = stream.alloc_zeros::<u8>(8).unwrap();
    let mut call = || {
        let mut y = TensorMut::from_cudarc(stream, &mut y, &[8]).unwrap();
        let x = TensorRef::from_cudarc(stream, &x, &[64]).unwrap();
        packbits(&mut y, &x, BitOrder::Big, Stream::cudarc(stream)).unwrap();
        let segments = on_gpu.placed(stream).unwrap();
        segment_packbits(&mut y, &x, &segments, BitOrder::Big, Stream::cudarc(stream)).unwrap();
    };
    // The first one loads the library.
    call();
    gpu.assert_asynchronous(stream, call);
}

/// Upstream launches on whatever device is current.
fn every_gpu(_: &Gpu) {
    let count = CudaContext::device_count().unwrap() as usize;
    println!("{count} GPUs");
    let streams: Vec<_> = (0..count).map(|id| CudaContext::new(id).unwrap().new_stream().unwrap()).collect();
    let segments = PackedSegments::from_lengths(&[1000, 24]).unwrap();
    let x = bits(8, 1024);
    for (id, stream) in streams.iter().enumerate() {
        let x_gpu = stream.clone_htod(&x).unwrap();
        let on_gpu = OnDevice::new(segments.clone(), stream).unwrap();
        let mut packed = stream.alloc_zeros::<u8>(128).unwrap();
        let mut of_segments = stream.alloc_zeros::<u8>(128).unwrap();
        for current in &streams {
            let x = TensorRef::from_cudarc(stream, &x_gpu, &[1024]).unwrap();
            let mut y = TensorMut::from_cudarc(stream, &mut packed, &[128]).unwrap();
            let mut of_segments = TensorMut::from_cudarc(stream, &mut of_segments, &[128]).unwrap();
            let placed = on_gpu.placed(stream).unwrap();
            current.context().bind_to_thread().unwrap();
            packbits(&mut y, &x, BitOrder::Big, Stream::cudarc(stream)).unwrap();
            segment_packbits(&mut of_segments, &x, &placed, BitOrder::Big, Stream::cudarc(stream)).unwrap();
            let after = result::ctx::get_current().unwrap();
            assert_eq!(after, Some(current.context().cu_ctx()), "after a call on cuda:{id}");
        }
        assert_eq!(stream.clone_dtoh(&packed).unwrap(), expected(&x, BitOrder::Big), "cuda:{id}");
        let expected = expected_of_segments(&x, &segments, BitOrder::Big);
        assert_eq!(stream.clone_dtoh(&of_segments).unwrap(), expected, "cuda:{id}");
    }
}

fn refused(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (x, mut y) = (stream.alloc_zeros::<u8>(64).unwrap(), stream.clone_htod(&[0xFFu8; 8]).unwrap());
    let segments = OnDevice::new(PackedSegments::from_lengths(&[60]).unwrap(), stream).unwrap();
    {
        let x = TensorRef::from_cudarc(stream, &x, &[64]).unwrap();
        let mut short = TensorMut::from_cudarc(stream, &mut y, &[7]).unwrap();
        let name = |result| match result {
            Err(FlashInferError::InvalidArgument { argument, .. }) => argument,
            other => panic!("{other:?}"),
        };
        assert_eq!(name(packbits(&mut short, &x, BitOrder::Big, Stream::cudarc(stream))), "y");
        let placed = segments.placed(stream).unwrap();
        assert_eq!(name(segment_packbits(&mut short, &x, &placed, BitOrder::Big, Stream::cudarc(stream))), "x");
    }
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [0xFF; 8], "refused, and launched all the same");
}

fn nothing(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (x, mut y) = (stream.alloc_zeros::<u8>(1).unwrap(), stream.clone_htod(&[0xFFu8]).unwrap());
    for lengths in [&[][..], &[0, 0]] {
        let segments = OnDevice::new(PackedSegments::from_lengths(lengths).unwrap(), stream).unwrap();
        let x = TensorRef::from_cudarc(stream, &x, &[0]).unwrap();
        let mut y = TensorMut::from_cudarc(stream, &mut y, &[0]).unwrap();
        packbits(&mut y, &x, BitOrder::Big, Stream::cudarc(stream)).unwrap();
        let placed = segments.placed(stream).unwrap();
        segment_packbits(&mut y, &x, &placed, BitOrder::Big, Stream::cudarc(stream)).unwrap();
    }
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [0xFF]);
}

fn supported(_: &Gpu) {
    assert!(is_supported(Device::Cuda(0)).unwrap());
}
