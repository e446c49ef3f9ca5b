//! Packing bits without a GPU: numbers on the host, what is refused, and what the real launchers do over a CUDA runtime that
//! launches nothing.

#[path = "support/failing.rs"]
mod failing;
#[path = "support/native.rs"]
mod native;

use flashinfer_rs::kernels::quantization::{
    BitOrder, PackedSegments, PackedSegmentsFacts, is_supported, packbits, segment_packbits,
};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, Placed, Result, RuntimeConfig, Steering, Stream, TensorMut,
    TensorRef,
};

fn initialize() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
}

fn packed(x: &[u8], bitorder: BitOrder) -> Vec<u8> {
    initialize();
    let mut y = vec![0xA5; x.len().div_ceil(8)];
    packbits(
        &mut TensorMut::from_slice(&mut y, &[x.len().div_ceil(8) as i64]).unwrap(),
        &TensorRef::from_slice(x, &[x.len() as i64]).unwrap(),
        bitorder,
        Stream::NULL,
    )
    .unwrap();
    y
}

fn packed_segments(x: &[u8], lengths: &[i64], bitorder: BitOrder) -> Vec<u8> {
    initialize();
    let segments = PackedSegments::from_lengths(lengths).unwrap();
    let mut y = vec![0xA5; segments.bytes() as usize];
    segment_packbits(
        &mut TensorMut::from_slice(&mut y, &[segments.bytes()]).unwrap(),
        &TensorRef::from_slice(x, &[segments.elements()]).unwrap(),
        &Placed::on_host(&segments).unwrap(),
        bitorder,
        Stream::NULL,
    )
    .unwrap();
    y
}

#[test]
fn bits_are_packed_from_the_side_that_was_asked_for() {
    let x = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1];
    assert_eq!(packed(&x, BitOrder::Big), [0b1011_0010, 0b1100_0000]);
    assert_eq!(packed(&x, BitOrder::Little), [0b0100_1101, 0b0000_0011]);
    assert_eq!(packed(&[1], BitOrder::Big), [0x80]);
    assert_eq!(packed(&[1], BitOrder::Little), [1]);
    assert_eq!(packed(&[0, 0, 0, 0, 0, 0, 0, 7], BitOrder::Big), [1], "whatever is not 0 is 1 on the host");
    assert_eq!(BitOrder::default(), BitOrder::Big, "as upstream's");
}

#[test]
fn each_segment_starts_with_a_byte_of_its_own() {
    let x = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1];
    // Of 1, 0, 11 and 2 elements.
    assert_eq!(packed_segments(&x, &[1, 0, 11, 2], BitOrder::Big), [0x80, 0b1100_0000, 0b0010_0000, 0b0100_0000]);
    assert_eq!(packed_segments(&x, &[1, 0, 11, 2], BitOrder::Little), [1, 0b11, 0b100, 0b10]);
    // One segment is the whole.
    assert_eq!(packed_segments(&x, &[14], BitOrder::Big), packed(&x, BitOrder::Big));
}

#[test]
fn nothing_is_done_for_nothing() {
    assert_eq!(packed(&[], BitOrder::Big), [0u8; 0]);
    assert_eq!(packed_segments(&[], &[], BitOrder::Big), [0u8; 0]);
    assert_eq!(packed_segments(&[], &[0, 0], BitOrder::Little), [0u8; 0]);
}

#[test]
fn segments_know_where_they_start() {
    let segments = PackedSegments::from_lengths(&[9, 0, 8, 1]).unwrap();
    assert_eq!(segments.input_indptr(), [0, 9, 9, 17, 18]);
    assert_eq!(segments.output_indptr(), [0, 2, 2, 3, 4]);
    assert_eq!(segments.facts(), PackedSegmentsFacts { segments: 4, elements: 18, bytes: 4 });
}

#[track_caller]
fn assert_refused<T>(result: Result<T>, name: &str, says: &str) {
    match result.map(|_| ()).unwrap_err() {
        FlashInferError::InvalidArgument { argument, expected, found, .. } => {
            assert!(argument == name && expected.contains(says), "{argument}: {found}, expected {expected}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn lengths_that_cannot_be_are_refused() {
    assert_refused(PackedSegments::from_lengths(&[3, -1]), "lengths", "0 to 2147483644");
    assert_refused(PackedSegments::from_lengths(&[i64::from(i32::MAX), 1]), "lengths", "0 to 0");
    assert_refused(PackedSegments::from_lengths(&[1 << 31]), "lengths", "at most 2147483647 elements");
    assert_refused(PackedSegments::from_lengths(&[i64::MAX, i64::MAX]), "lengths", "0 to");
    let most = PackedSegments::from_lengths(&[i64::from(i32::MAX) - 1, 1]).unwrap();
    assert_eq!((most.elements(), most.bytes()), (i64::from(i32::MAX), (1 << 28) + 1));
}

#[test]
fn what_stands_in_a_graphs_place_keeps_its_sizes() {
    let captured = PackedSegments::from_lengths(&[9, 8, 3]).unwrap();
    let other = PackedSegments::from_lengths(&[1, 16]).unwrap().in_place_of(&captured).unwrap();
    assert_eq!((other.input_indptr(), other.output_indptr()), (&[0, 1, 17, 17][..], &[0, 1, 3, 3][..]));
    assert_eq!(other.facts(), captured.facts());
    // More segments, more elements, and more bytes of as many elements.
    for lengths in [&[1, 1, 1, 1][..], &[21], &[1, 1, 18]] {
        let more = PackedSegments::from_lengths(lengths).unwrap();
        assert_refused(more.in_place_of(&captured), "segments", "as captured, 3 segments of 20 elements in 4 bytes");
    }
}

fn on_gpu(address: usize, dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    failing::read(0, address, dtype, shape)
}

fn y_on_gpu(address: usize, dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    failing::write(0, address, dtype, shape)
}

#[test]
fn what_upstream_would_not_notice_is_refused_by_name() {
    initialize();
    let (byte, single) = (DType::U8, DType::F32);
    // SAFETY: no kernel runs, so nothing is read.
    let apart = unsafe { TensorRef::from_raw(0x2000 as *const _, Device::Cuda(0), byte, &[9], Some(&[2])) }.unwrap();
    let host = [0u8; 9];
    let host = TensorRef::from_slice(&host, &[9]).unwrap();
    let rows: Vec<(TensorMut<'_>, TensorRef<'_>, &str, &str)> = vec![
        (y_on_gpu(0x1000, byte, &[1]), on_gpu(0x2000, byte, &[9]), "y", "⌈elements / 8⌉"),
        (y_on_gpu(0x1000, byte, &[3]), on_gpu(0x2000, byte, &[9]), "y", "⌈elements / 8⌉"),
        (y_on_gpu(0x1000, byte, &[2]), on_gpu(0x2000, byte, &[3, 3]), "x", "1 dimension"),
        (y_on_gpu(0x1000, byte, &[2]), on_gpu(0x2000, single, &[9]), "x", "U8"),
        (y_on_gpu(0x1000, DType::I32, &[2]), on_gpu(0x2000, byte, &[9]), "y", "U8"),
        (y_on_gpu(0x1000, byte, &[2]), apart, "x", "contiguous"),
        (y_on_gpu(0x1000, byte, &[2]), host, "y", "memory of cpu"),
    ];
    for (mut y, x, name, says) in rows {
        assert_refused(packbits(&mut y, &x, BitOrder::Big, Stream::NULL), name, says);
    }
}

#[test]
fn segments_of_other_tensors_are_refused_by_name() {
    initialize();
    let segments = PackedSegments::from_lengths(&[9, 8]).unwrap();
    let placed = Placed::on_host(&segments).unwrap();
    let (x, mut y) = ([0u8; 32], [0u8; 8]);
    let mut call = |elements: i64, bytes: i64| {
        let x = TensorRef::from_slice(&x[..elements as usize], &[elements]).unwrap();
        let mut y = TensorMut::from_slice(&mut y[..bytes as usize], &[bytes]).unwrap();
        segment_packbits(&mut y, &x, &placed, BitOrder::Big, Stream::NULL)
    };
    call(17, 3).unwrap();
    assert_refused(call(16, 3), "x", "17, the segments' elements");
    assert_refused(call(18, 3), "x", "17, the segments' elements");
    assert_refused(call(17, 2), "y", "3, their bytes");
    assert_refused(call(17, 4), "y", "3, their bytes");
    // Offsets on the host for tensors on a GPU.
    let (mut y, x) = (y_on_gpu(0x1000, DType::U8, &[3]), on_gpu(0x2000, DType::U8, &[17]));
    let result = segment_packbits(&mut y, &x, &placed, BitOrder::Big, Stream::NULL);
    assert_refused(result, "input_indptr", "memory of cuda:0");
    // No segments, and elements all the same.
    let facts = PackedSegmentsFacts { segments: 0, elements: 17, bytes: 3 };
    let indptr = || on_gpu(0x3000, DType::I32, &[1]);
    // SAFETY: no kernel runs: the call is refused.
    let none = unsafe { Placed::from_indptrs(indptr(), indptr(), facts) };
    assert_refused(segment_packbits(&mut y, &x, &none, BitOrder::Big, Stream::NULL), "segments", "1 or more");
}

#[test]
fn offsets_on_a_device_are_vectors_of_i32_of_the_segments_number() {
    initialize();
    let facts = PackedSegmentsFacts { segments: 2, elements: 17, bytes: 3 };
    let with = |input: TensorRef<'static>, output: TensorRef<'static>| {
        // SAFETY: no kernel runs: the call is refused.
        let placed = unsafe { Placed::<PackedSegments>::from_indptrs(input, output, facts) };
        let (mut y, x) = (y_on_gpu(0x1000, DType::U8, &[3]), on_gpu(0x2000, DType::U8, &[17]));
        segment_packbits(&mut y, &x, &placed, BitOrder::Big, Stream::NULL)
    };
    let good = || on_gpu(0x1000, DType::I32, &[3]);
    assert_refused(with(on_gpu(0x1000, DType::I64, &[3]), good()), "input_indptr", "I32");
    assert_refused(with(good(), on_gpu(0x1000, DType::I32, &[3, 1])), "output_indptr", "1 dimension");
    assert_refused(with(good(), on_gpu(0x1000, DType::I32, &[2])), "output_indptr", "shape [3]");
}

#[test]
fn offsets_past_the_tensors_raise_on_the_host() {
    initialize();
    let (x, mut y) = ([1u8; 8], [0u8; 1]);
    let facts = PackedSegmentsFacts { segments: 1, elements: 8, bytes: 1 };
    for (input, output) in [([0, 9], [0, 1]), ([-1, 8], [0, 1]), ([0, 8], [1, 1]), ([0, 8], [-1, 1])] {
        let (input, output): ([i32; 2], [i32; 2]) = (input, output);
        let (input, output) =
            (TensorRef::from_slice(&input, &[2]).unwrap(), TensorRef::from_slice(&output, &[2]).unwrap());
        // SAFETY: on the host the contents are checked.
        let placed = unsafe { Placed::from_indptrs(input, output, facts) };
        let x = TensorRef::from_slice(&x, &[8]).unwrap();
        let mut y = TensorMut::from_slice(&mut y, &[1]).unwrap();
        let error = segment_packbits(&mut y, &x, &placed, BitOrder::Big, Stream::NULL).unwrap_err();
        assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
    }
}

#[test]
fn the_host_is_supported() {
    initialize();
    assert!(is_supported(Device::Cpu).unwrap());
}

#[cfg(feature = "quantization")]
mod real {
    use super::*;
    use failing::Cuda;

    const LIBRARIES: [&str; 1] = ["quantization.so"];

    fn segments() -> Placed<'static, PackedSegments> {
        let facts = PackedSegmentsFacts { segments: 3, elements: 100, bytes: 15 };
        let indptr = || on_gpu(0x3000, DType::I32, &[4]);
        // SAFETY: no kernel runs.
        unsafe { Placed::from_indptrs(indptr(), indptr(), facts) }
    }

    #[test]
    fn every_packing_tells_of_a_launch_that_fails() {
        native::isolated("real::every_packing_tells_of_a_launch_that_fails", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            let x = on_gpu(0x1000, DType::U8, &[100]);
            let (mut y, mut of_segments) = (y_on_gpu(0x2000, DType::U8, &[13]), y_on_gpu(0x2000, DType::U8, &[15]));
            let (segments, s) = (segments(), Stream::NULL);
            cuda.tells("packbits", &mut || packbits(&mut y, &x, BitOrder::Big, s));
            let mut call = || segment_packbits(&mut of_segments, &x, &segments, BitOrder::Little, s);
            cuda.tells("segment_packbits", &mut call);
            cuda.assert_all_told(&LIBRARIES);
        });
    }

    /// Upstream launches on whatever device is current.
    #[test]
    fn the_tensors_device_is_current_meanwhile_and_the_threads_own_afterwards() {
        native::isolated("real::the_tensors_device_is_current_meanwhile_and_the_threads_own_afterwards", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            cuda.set("devices", 3);
            cuda.set("launch_fails_with", 0);
            for current in [0, 2] {
                for device in [1, 2, 0] {
                    let x = failing::read(device, 0x1000, DType::U8, &[100]);
                    let mut y = failing::write(device, 0x2000, DType::U8, &[13]);
                    cuda.set("current_device", current);
                    packbits(&mut y, &x, BitOrder::Big, Stream::NULL).unwrap();
                    assert_eq!((cuda.get("last_device"), cuda.get("current_device")), (device as i32, current));
                    let facts = PackedSegmentsFacts { segments: 3, elements: 100, bytes: 15 };
                    let indptr = || failing::read(device, 0x3000, DType::I32, &[4]);
                    // SAFETY: no kernel runs.
                    let segments = unsafe { Placed::from_indptrs(indptr(), indptr(), facts) };
                    let mut y = failing::write(device, 0x2000, DType::U8, &[15]);
                    segment_packbits(&mut y, &x, &segments, BitOrder::Big, Stream::NULL).unwrap();
                    assert_eq!((cuda.get("last_device"), cuda.get("current_device")), (device as i32, current));
                }
            }
        });
    }

    #[test]
    fn a_block_packs_2048_elements_or_a_segment() {
        native::isolated("real::a_block_packs_2048_elements_or_a_segment", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            cuda.set("launch_fails_with", 0);
            for (elements, blocks) in [(1, 1), (2048, 1), (2049, 2), ((1 << 33) + 1, (1 << 22) + 1)] {
                let x = on_gpu(0x1000, DType::U8, &[elements]);
                let mut y = y_on_gpu(0x2000, DType::U8, &[(elements + 7) / 8]);
                packbits(&mut y, &x, BitOrder::Big, Stream::NULL).unwrap();
                assert_eq!(cuda.get("last_grid"), blocks);
            }
            let (x, mut y) = (on_gpu(0x1000, DType::U8, &[100]), y_on_gpu(0x2000, DType::U8, &[15]));
            segment_packbits(&mut y, &x, &segments(), BitOrder::Big, Stream::NULL).unwrap();
            assert_eq!(cuda.get("last_grid"), 3);
        });
    }
}
