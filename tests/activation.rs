//! Gated activations without a GPU: numbers on the host, what is refused, and what the real launchers do over a CUDA runtime
//! that launches nothing.

#[path = "support/failing.rs"]
mod failing;
#[path = "support/native.rs"]
mod native;

use flashinfer_rs::kernels::activation::{
    ActivationOptions, GeluAndMul, GeluTanhAndMul, SiluAndMul, gelu_and_mul, gelu_tanh_and_mul, is_supported,
    silu_and_mul,
};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, Prepared, Result, RuntimeConfig, Stream, TensorMut, TensorRef,
};
use half::{bf16, f16};

type Function = fn(&mut TensorMut<'_>, &TensorRef<'_>, &ActivationOptions, Stream<'_>) -> Result<()>;

const ALL: [Function; 3] = [silu_and_mul, gelu_and_mul, gelu_tanh_and_mul];

fn initialize() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
}

/// One token of these numbers, each gated by 1.
fn activated(function: Function, x: &[f32]) -> Vec<f32> {
    initialize();
    let input = [x, &vec![1.0; x.len()]].concat();
    let mut out = vec![f32::NAN; x.len()];
    function(
        &mut TensorMut::from_slice(&mut out, &[1, x.len() as i64]).unwrap(),
        &TensorRef::from_slice(&input, &[1, 2 * x.len() as i64]).unwrap(),
        &ActivationOptions::default(),
        Stream::NULL,
    )
    .unwrap();
    out
}

fn assert_near(found: &[f32], expected: &[f64]) {
    for (found, expected) in found.iter().zip(expected) {
        assert!((f64::from(*found) - expected).abs() <= 1e-7 * expected.abs(), "{found}, expected {expected}");
    }
}

#[test]
fn silu_is_what_is_known_of_it() {
    let x = [-20.0, -2.5, -1.0, 0.0, 0.5, 1.0, 3.0];
    let expected = [
        -4.122_307_236_380_407e-8,
        -0.189_645_450_053_108_87,
        -0.268_941_421_369_995_1,
        0.0,
        0.311_229_665_600_927_3,
        0.731_058_578_630_004_9,
        2.857_722_380_467_299_8,
    ];
    assert_near(&activated(silu_and_mul, &x), &expected);
}

#[test]
fn gelu_is_what_is_known_of_it() {
    let x = [-4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 8.0];
    let expected = [
        -0.000_126_684_967_332_479_86,
        -0.045_500_263_896_358_44,
        -0.158_655_253_931_457_07,
        0.0,
        0.345_731_230_637_006_56,
        0.841_344_746_068_542_9,
        1.954_499_736_103_641_6,
        7.999_999_999_999_995,
    ];
    assert_near(&activated(gelu_and_mul, &x), &expected);
}

#[test]
fn gelu_tanh_is_what_is_known_of_it() {
    let x = [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0];
    let expected = [
        -0.045_402_305_912_224_94,
        -0.158_808_009_391_723_24,
        0.0,
        0.345_714_009_825_143_94,
        0.841_191_990_608_276_6,
        1.954_597_694_087_775,
    ];
    assert_near(&activated(gelu_tanh_and_mul, &x), &expected);
}

#[test]
fn the_second_half_of_a_token_gates_the_first() {
    initialize();
    // Two tokens of three numbers each: an odd number, which on the host is one like any other.
    let input = [1f32, 1.0, 1.0, 2.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0];
    let mut out = [f32::NAN; 6];
    silu_and_mul(
        &mut TensorMut::from_slice(&mut out, &[2, 3]).unwrap(),
        &TensorRef::from_slice(&input, &[2, 6]).unwrap(),
        &ActivationOptions::default(),
        Stream::NULL,
    )
    .unwrap();
    let one = 1.0 / (1.0 + (-1f32).exp());
    assert_eq!(out, [2.0 * one, 0.0, -one, 0.0, 0.0, 0.0]);
}

#[test]
fn halves_are_rounded_once() {
    initialize();
    let (mut b, mut h) = ([bf16::ZERO], [f16::ZERO]);
    for function in ALL {
        let exact = activated(function, &[1.5])[0] * 3.0;
        let options = ActivationOptions::default();
        let input = [bf16::from_f32(1.5), bf16::from_f32(3.0)];
        let mut out = TensorMut::from_slice(&mut b, &[1, 1]).unwrap();
        function(&mut out, &TensorRef::from_slice(&input, &[1, 2]).unwrap(), &options, Stream::NULL).unwrap();
        let input = [f16::from_f32(1.5), f16::from_f32(3.0)];
        let mut out = TensorMut::from_slice(&mut h, &[1, 1]).unwrap();
        function(&mut out, &TensorRef::from_slice(&input, &[1, 2]).unwrap(), &options, Stream::NULL).unwrap();
        assert_eq!((b[0], h[0]), (bf16::from_f32(exact), f16::from_f32(exact)));
    }
}

#[test]
fn nothing_is_done_for_no_tokens_or_no_numbers() {
    initialize();
    for shape in [[0, 8], [4, 0], [0, 0]] {
        for function in ALL {
            let (input, mut out): ([f32; 0], [f32; 0]) = ([], []);
            function(
                &mut TensorMut::from_slice(&mut out, &shape).unwrap(),
                &TensorRef::from_slice(&input, &[shape[0], 2 * shape[1]]).unwrap(),
                &ActivationOptions::default(),
                Stream::NULL,
            )
            .unwrap();
        }
    }
}

#[test]
fn a_prepared_call_does_the_same_and_takes_tensors_of_its_form_alone() {
    initialize();
    let (input, options) = ([1f32, -2.0, 3.0, 0.5], ActivationOptions::default().with_pdl(true));
    let (mut first, mut second, mut wide) = ([0f32; 2], [0f32; 2], [0f32; 4]);
    let input = TensorRef::from_slice(&input, &[1, 4]).unwrap();
    let mut first_out = TensorMut::from_slice(&mut first, &[1, 2]).unwrap();
    let mut second_out = TensorMut::from_slice(&mut second, &[1, 2]).unwrap();
    let mut wide = TensorMut::from_slice(&mut wide, &[2, 2]).unwrap();
    let s = Stream::NULL;

    let silu = Prepared::<SiluAndMul>::new(&first_out, &input, &options).unwrap();
    silu.launch(&mut second_out, &input, s).unwrap();
    silu_and_mul(&mut first_out, &input, &options, s).unwrap();
    let error = silu.launch(&mut wide, &input, s).unwrap_err().to_string();
    assert!(error.contains("input") || error.contains("out"), "{error}");
    let gelu = Prepared::<GeluAndMul>::new(&first_out, &input, &options).unwrap();
    let tanh = Prepared::<GeluTanhAndMul>::new(&first_out, &input, &options).unwrap();
    assert_eq!(first, second);

    let (mut first, mut second) = ([0f32; 2], [0f32; 2]);
    let mut first_out = TensorMut::from_slice(&mut first, &[1, 2]).unwrap();
    let mut second_out = TensorMut::from_slice(&mut second, &[1, 2]).unwrap();
    gelu.launch(&mut first_out, &input, s).unwrap();
    tanh.launch(&mut second_out, &input, s).unwrap();
    assert_ne!(first, second, "two kernels");
    assert!(first.iter().zip(&second).all(|(a, b)| (a - b).abs() < 1e-3), "{first:?}, {second:?}");
}

/// A tensor that claims to be on a GPU.
fn on_gpu(address: usize, dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    failing::read(0, address, dtype, shape)
}

fn out_on_gpu(address: usize, dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    failing::write(0, address, dtype, shape)
}

#[test]
fn what_upstream_would_not_notice_is_refused_by_name() {
    initialize();
    let host = [bf16::ZERO; 32];
    let host = TensorRef::from_slice(&host, &[2, 16]).unwrap();
    let (b, h, f) = (DType::BF16, DType::F16, DType::F32);
    let wide = |strides: &[i64]| {
        // SAFETY: no kernel runs, so nothing is read.
        unsafe { TensorRef::from_raw(0x2000 as *const _, Device::Cuda(0), b, &[2, 16], Some(strides)) }.unwrap()
    };
    let out = || out_on_gpu(0x1000, b, &[2, 8]);
    let input = || on_gpu(0x2000, b, &[2, 16]);
    let rows: Vec<(TensorMut<'_>, TensorRef<'_>, &str, &str)> = vec![
        (out_on_gpu(0x1000, b, &[2, 12]), on_gpu(0x2000, b, &[2, 24]), "d", "a multiple of 8"),
        (out_on_gpu(0x1000, b, &[2, 4]), on_gpu(0x2000, b, &[2, 8]), "d", "a multiple of 8"),
        (out(), on_gpu(0x2000, b, &[2, 17]), "input", "[tokens, 2 d]"),
        (out(), on_gpu(0x2000, b, &[3, 16]), "input", "[tokens, 2 d]"),
        (out(), on_gpu(0x2000, b, &[2, 8, 2]), "input", "2 dimensions"),
        (out_on_gpu(0x1000, b, &[16]), input(), "out", "2 dimensions"),
        (out(), on_gpu(0x2002, b, &[2, 16]), "input", "aligned to 16 bytes"),
        (out_on_gpu(0x1008, b, &[2, 8]), input(), "out", "aligned to 16 bytes"),
        (out(), on_gpu(0x2000, h, &[2, 16]), "input", "BF16, as out"),
        (out_on_gpu(0x1000, f, &[2, 8]), on_gpu(0x2000, f, &[2, 16]), "out", "BF16 or F16"),
        (out(), wide(&[32, 1]), "input", "contiguous"),
        (out(), wide(&[1, 2]), "input", "contiguous"),
        (out(), host, "input", "memory of cuda:0"),
        (out(), failing::read(1, 0x2000, b, &[2, 16]), "input", "memory of cuda:0"),
    ];
    for (mut out, input, name, says) in rows {
        for function in ALL {
            let error = function(&mut out, &input, &ActivationOptions::default(), Stream::NULL).unwrap_err();
            let FlashInferError::InvalidArgument { argument, expected, .. } = &error else { panic!("{error}") };
            assert!(*argument == name && expected.contains(says), "{error}, expected {says:?} of {name}");
        }
    }
}

#[test]
fn the_host_is_supported() {
    initialize();
    assert!(is_supported(Device::Cpu).unwrap());
}

#[cfg(feature = "activation")]
mod real {
    use super::*;
    use failing::Cuda;

    const LIBRARIES: [&str; 3] = ["silu_and_mul.so", "gelu_and_mul.so", "gelu_tanh_and_mul.so"];

    #[test]
    fn every_activation_tells_of_a_launch_that_fails() {
        native::isolated("real::every_activation_tells_of_a_launch_that_fails", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            let (mut out, input) = (out_on_gpu(0x1000, DType::BF16, &[4, 64]), on_gpu(0x4000, DType::BF16, &[4, 128]));
            let (options, s) = (ActivationOptions::default(), Stream::NULL);
            cuda.tells("silu_and_mul", &mut || silu_and_mul(&mut out, &input, &options, s));
            cuda.tells("gelu_and_mul", &mut || gelu_and_mul(&mut out, &input, &options, s));
            cuda.tells("gelu_tanh_and_mul", &mut || gelu_tanh_and_mul(&mut out, &input, &options, s));
            cuda.assert_all_told(&LIBRARIES);
        });
    }

    /// Upstream asks for the thread's last error, whoever made it.
    #[test]
    fn another_librarys_error_is_not_the_kernels() {
        native::isolated("real::another_librarys_error_is_not_the_kernels", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            let (mut out, input) = (out_on_gpu(0x1000, DType::BF16, &[4, 64]), on_gpu(0x4000, DType::BF16, &[4, 128]));
            let launched = silu_and_mul(&mut out, &input, &ActivationOptions::default(), Stream::NULL);
            assert!(launched.is_err(), "the stand-in's launches fail");
            cuda.set("launch_fails_with", 0);
            cuda.leave_an_error(1);
            silu_and_mul(&mut out, &input, &ActivationOptions::default(), Stream::NULL).unwrap();
        });
    }

    #[test]
    fn the_threads_device_is_what_it_was_and_the_tensors_is_current_meanwhile() {
        native::isolated("real::the_threads_device_is_what_it_was_and_the_tensors_is_current_meanwhile", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            cuda.set("devices", 3);
            cuda.set("launch_fails_with", 0);
            let options = ActivationOptions::default();
            for current in [0, 2] {
                for device in [1, 2, 0] {
                    let mut out = failing::write(device, 0x1000, DType::BF16, &[4, 64]);
                    let input = failing::read(device, 0x4000, DType::BF16, &[4, 128]);
                    for function in ALL {
                        cuda.set("current_device", current);
                        function(&mut out, &input, &options, Stream::NULL).unwrap();
                        assert_eq!((cuda.get("last_device"), cuda.get("current_device")), (device as i32, current));
                    }
                }
            }
            // Of a launch that fails too.
            cuda.set("launch_fails_with", 209);
            cuda.set("current_device", 2);
            let mut out = failing::write(1, 0x1000, DType::BF16, &[4, 64]);
            let input = failing::read(1, 0x4000, DType::BF16, &[4, 128]);
            assert!(silu_and_mul(&mut out, &input, &options, Stream::NULL).is_err());
            assert_eq!((cuda.get("last_device"), cuda.get("current_device")), (1, 2));
        });
    }

    #[test]
    fn a_launch_has_a_block_for_each_token_and_the_option_that_was_given() {
        native::isolated("real::a_launch_has_a_block_for_each_token_and_the_option_that_was_given", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            cuda.set("launch_fails_with", 0);
            for (tokens, pdl) in [(1, true), (7, false), (1 << 20, true)] {
                let mut out = out_on_gpu(0x1000, DType::F16, &[tokens, 64]);
                let input = on_gpu(0x4000_0000, DType::F16, &[tokens, 128]);
                for function in ALL {
                    let options = ActivationOptions::default().with_pdl(pdl);
                    function(&mut out, &input, &options, Stream::NULL).unwrap();
                    let launched = (i64::from(cuda.get("last_grid")), cuda.get("last_pdl") != 0);
                    assert_eq!(launched, (tokens, pdl));
                }
            }
            // What would be 2^32 elements of all tokens is one launch: offsets are 64 bits wide.
            let before = cuda.get("launches");
            let mut out = out_on_gpu(0x1000, DType::F16, &[1 << 20, 8192]);
            let input = on_gpu(0x4000_0000, DType::F16, &[1 << 20, 16384]);
            silu_and_mul(&mut out, &input, &ActivationOptions::default(), Stream::NULL).unwrap();
            assert_eq!(cuda.get("launches"), before + 1);
        });
    }
}
