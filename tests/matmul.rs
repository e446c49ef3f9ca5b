//! Products with a weight without a GPU: numbers on the host, what is refused, and files of selections.

use flashinfer_rs::matmul::{MatMul, MatMulSpec};
use flashinfer_rs::{
    DType, Element, FlashInferError, FlashInferRuntime, Result, RuntimeConfig, Stream, TensorMut, TensorRef,
};
use half::{bf16, f16};

fn initialize() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
}

/// The product of these on the host.
fn product<T: Element, O: Element>(spec: MatMulSpec, x: &[T], weight: &[T], bias: Option<&[T]>, out: &mut [O]) {
    initialize();
    let (rows, columns, inner) = (spec.rows(), spec.columns(), spec.inner());
    let bias = bias.map(|bias| TensorRef::from_slice(bias, &[columns]).unwrap());
    MatMul::on_host(spec)
        .unwrap()
        .run(
            &mut TensorMut::from_slice(out, &[rows, columns]).unwrap(),
            &TensorRef::from_slice_strided(x, &[rows, inner], &[spec.row_stride(), 1]).unwrap(),
            &TensorRef::from_slice(weight, &[columns, inner]).unwrap(),
            bias.as_ref(),
            None,
            Stream::NULL,
        )
        .unwrap();
}

const X: [f32; 6] = [1.0, 2.0, 3.0, -1.0, 0.5, 0.0];
const WEIGHT: [f32; 6] = [1.0, 0.0, 2.0, 0.5, -1.0, 4.0];

#[test]
fn a_product_is_of_rows_with_the_weights_rows() {
    let mut out = [f32::NAN; 4];
    product(MatMulSpec::new(DType::F32, 2, 2, 3).unwrap(), &X, &WEIGHT, None, &mut out);
    assert_eq!(out, [7.0, 10.5, -1.0, -1.0]);
}

#[test]
fn a_bias_and_a_residual_are_added_before_the_result_is_rounded() {
    let spec = MatMulSpec::new(DType::F32, 2, 2, 3).unwrap();
    let mut out = [f32::NAN; 4];
    product(spec.with_bias().unwrap(), &X, &WEIGHT, Some(&[10.0, 20.0]), &mut out);
    assert_eq!(out, [17.0, 30.5, 9.0, 19.0]);
    product(spec.with_residual().unwrap(), &X, &WEIGHT, None, &mut out);
    assert_eq!(out, [24.0, 41.0, 8.0, 18.0]);
    product(spec.with_bias().unwrap().with_residual().unwrap(), &X, &WEIGHT, Some(&[1.0, 2.0]), &mut out);
    assert_eq!(out, [32.0, 53.5, 8.0, 19.0]);

    // 256 + 1 is 256 in bf16, and so is 256 + 0.5; their sum before is 257.5, which is 258.
    let (x, weight) = ([bf16::ONE], [bf16::ONE]);
    let mut out = [bf16::from_f32(256.0)];
    let spec = MatMulSpec::new(DType::BF16, 1, 1, 1).unwrap().with_residual().unwrap();
    product(spec.with_bias().unwrap(), &x, &weight, Some(&[bf16::from_f32(0.5)]), &mut out);
    assert_eq!(out[0].to_f32(), 258.0);
}

#[test]
fn rows_may_lie_apart_and_results_be_f32() {
    let x = [1.0, 2.0, 9.0, 3.0, 4.0, 9.0].map(f16::from_f32);
    let weight = [1.0, 1.0, 1000.0, 1000.0].map(f16::from_f32);
    let spec = MatMulSpec::new(DType::F16, 2, 2, 2).unwrap().with_row_stride(3);
    // A row of two has no need of 16 bytes.
    assert!(spec.is_err(), "an odd stride, though rows of two are aligned to 4 bytes");
    let spec = MatMulSpec::new(DType::F16, 2, 4, 1).unwrap().with_row_stride(3).unwrap().with_f32_out().unwrap();
    let mut out = [f32::NAN; 8];
    product(spec, &x, &weight, None, &mut out);
    assert_eq!(out, [1.0, 1.0, 1000.0, 1000.0, 3.0, 3.0, 3000.0, 3000.0]);
}

fn argument_of(result: Result<MatMulSpec>) -> &'static str {
    match result.unwrap_err() {
        FlashInferError::InvalidArgument { function: "MatMulSpec", argument, .. } => argument,
        other => panic!("{other}"),
    }
}

#[test]
fn a_specification_has_sizes_from_1_to_31_bits_and_types_that_are_multiplied() {
    let of = |rows, columns, inner| MatMulSpec::new(DType::BF16, rows, columns, inner);
    for (wrong, argument) in [
        (of(0, 1, 1), "rows"),
        (of(-1, 1, 1), "rows"),
        (of(1, 1 << 31, 1), "columns"),
        (of(1, 1, i64::MIN), "inner"),
        (MatMulSpec::new(DType::F8E4M3, 1, 1, 1), "dtype"),
        (MatMulSpec::new(DType::F64, 1, 1, 1), "dtype"),
        (of(2, 1, 64).unwrap().with_row_stride(63), "row_stride"),
        (of(2, 1, 64).unwrap().with_row_stride(68), "row_stride"),
        (of(2, 1, 64).unwrap().with_row_stride(1 << 31), "row_stride"),
        (of(2, 1, 64).unwrap().with_f32_out().unwrap().with_bias(), "out"),
        (of(2, 1, 64).unwrap().with_residual().unwrap().with_f32_out(), "out"),
    ] {
        assert_eq!(argument_of(wrong), argument);
    }
    let most = of(i32::MAX.into(), i32::MAX.into(), i32::MAX.into()).unwrap();
    assert_eq!((most.rows(), most.columns(), most.inner()), (2147483647, 2147483647, 2147483647));
    assert!(MatMulSpec::new(DType::F32, 2, 1, 64).unwrap().with_f32_out().unwrap().with_bias().is_ok());
    // Of one row nothing lies apart, so that it is the same product.
    assert_eq!(of(1, 1, 64).unwrap().with_row_stride(128).unwrap(), of(1, 1, 64).unwrap());
}

#[test]
fn tensors_that_are_not_the_specifications_are_refused_by_name() {
    initialize();
    let spec = MatMulSpec::new(DType::BF16, 2, 3, 4).unwrap();
    let (x, weight, mut out) = ([bf16::ONE; 16], [bf16::ONE; 16], [bf16::ONE; 16]);
    let (halves, mut wide) = ([f16::ONE; 16], [0.0f32; 16]);
    fn of<'a, T: Element>(values: &'a [T], shape: &[i64]) -> TensorRef<'a> {
        TensorRef::from_slice(&values[..shape.iter().product::<i64>() as usize], shape).unwrap()
    }
    let (slice, weights) = (|shape: &[i64]| of(&x, shape), |shape: &[i64]| of(&weight, shape));
    let mut refused = |spec: MatMulSpec, x: TensorRef<'_>, weight, bias: Option<TensorRef<'_>>, shape: &[i64]| {
        let size = shape.iter().product::<i64>() as usize;
        let mut out = TensorMut::from_slice(&mut out[..size], shape).unwrap();
        let product = MatMul::on_host(spec).unwrap();
        match product.run(&mut out, &x, &weight, bias.as_ref(), None, Stream::NULL).unwrap_err() {
            FlashInferError::InvalidArgument { argument, .. } => argument,
            other => panic!("{other}"),
        }
    };
    let (xs, ws, outs) = ([2, 4], [3, 4], [2, 3]);
    assert_eq!(refused(spec, slice(&[1, 4]), weights(&ws), None, &[1, 3]), "rows");
    assert_eq!(refused(spec, slice(&xs), weights(&[4, 4]), None, &[2, 4]), "columns");
    assert_eq!(refused(spec, slice(&[2, 3]), weights(&[3, 3]), None, &outs), "inner");
    assert_eq!(refused(spec, slice(&xs), weights(&ws), None, &[3, 2]), "out");
    assert_eq!(refused(spec, slice(&xs), weights(&[4, 3]), None, &outs), "weight");
    assert_eq!(refused(spec, slice(&[8]), weights(&ws), None, &outs), "x");
    assert_eq!(refused(spec, slice(&xs), weights(&ws), Some(slice(&[3])), &outs), "bias");
    let biased = spec.with_bias().unwrap();
    assert_eq!(refused(biased, slice(&xs), weights(&ws), None, &outs), "bias");
    assert_eq!(refused(biased, slice(&xs), weights(&ws), Some(slice(&[2])), &outs), "bias");
    let of_f16 = |shape: &[i64]| of(&halves, shape);
    assert_eq!(refused(spec, of_f16(&xs), of_f16(&ws), None, &outs), "x");
    assert_eq!(refused(spec, slice(&xs), of_f16(&ws), None, &outs), "weight");
    let apart = TensorRef::from_slice_strided(&x, &xs, &[8, 1]).unwrap();
    assert_eq!(refused(spec, apart, weights(&ws), None, &outs), "x");
    let turned = TensorRef::from_slice_strided(&weight, &ws, &[1, 3]).unwrap();
    assert_eq!(refused(spec, slice(&xs), turned, None, &outs), "weight");

    let mut wide = TensorMut::from_slice(&mut wide[..6], &outs).unwrap();
    let run = MatMul::on_host(spec).unwrap().run(&mut wide, &slice(&xs), &weights(&ws), None, None, Stream::NULL);
    assert!(matches!(run, Err(FlashInferError::InvalidArgument { argument: "out", .. })));
}

#[cfg(feature = "cudarc")]
mod selections {
    use flashinfer_rs::matmul::Selections;

    use super::*;

    /// As [`Selections::to_json`] writes it.
    fn stored() -> String {
        let of = |fields: &str| {
            format!(
                "{{\"rows\": 4, \"columns\": 4096, \"inner\": 1024, \"row_stride\": 1024, \"dtype\": \"BF16\", \"f32_out\": \
                 false, \"bias\": false, \"residual\": true, \"microseconds\": 4.5, {fields}}}"
            )
        };
        let algorithm = "0123456789abcdef".repeat(8);
        let lt = of(&format!("\"cublaslt\": 130002, \"algorithm\": \"{algorithm}\", \"workspace\": 4096"));
        let own = of("\"kernel\": \"few_rows_bf16_8_1\"").replace("\"rows\": 4", "\"rows\": 1");
        format!(
            "{{\"version\": 1, \"gpu\": {{\"name\": \"a GPU\", \"major\": 9, \"minor\": 0, \"multiprocessors\": 132}}, \
             \"products\": [{lt}, {own}]}}"
        )
    }

    #[test]
    fn are_read_as_they_were_written() {
        let selections = Selections::parse(&stored()).unwrap();
        assert_eq!((selections.len(), selections.is_empty()), (2, false));
        let spec = MatMulSpec::new(DType::BF16, 4, 4096, 1024).unwrap();
        assert_eq!(selections.microseconds(&spec.with_residual().unwrap()), Some(4.5));
        assert_eq!(selections.microseconds(&spec), None);
        let again = Selections::parse(&selections.to_json()).unwrap();
        assert_eq!((&again, again.to_json()), (&selections, selections.to_json()));
        assert!(Selections::parse(&Selections::new().to_json()).unwrap().is_empty());
    }

    /// As whoever reads while another process writes may find them.
    #[test]
    fn cut_off_anywhere_are_refused() {
        for stored in [stored(), Selections::parse(&stored()).unwrap().to_json()] {
            for length in 0..stored.len() {
                let cut = Selections::parse(&stored[..length]);
                assert!(matches!(cut, Err(FlashInferError::Data(_))), "{length} of {} bytes: {cut:?}", stored.len());
            }
        }
    }

    /// Those that are taken can be stored again.
    #[test]
    fn with_any_byte_changed_are_refused_or_others() {
        let stored = stored();
        for (at, byte) in (0..stored.len()).flat_map(|at| b"09afAF \"\\{}[],:-.".iter().map(move |byte| (at, *byte))) {
            let mut changed = stored.clone().into_bytes();
            changed[at] = byte;
            match Selections::parse(std::str::from_utf8(&changed).unwrap()) {
                Ok(read) => assert_eq!(Selections::parse(&read.to_json()).unwrap(), read, "{byte:#x} at {at}"),
                Err(FlashInferError::Data(_)) => {}
                Err(other) => panic!("{byte:#x} at {at}: {other}"),
            }
        }
    }

    #[test]
    fn as_many_as_there_may_be_are_read() {
        let head =
            "{\"version\": 1, \"gpu\": {\"name\": \"a GPU\", \"major\": 9, \"minor\": 0, \"multiprocessors\": 132}";
        let product = |rows: usize| {
            format!(
                "{{\"rows\": {rows}, \"columns\": 8, \"inner\": 8, \"row_stride\": 8, \"dtype\": \"BF16\", \"f32_out\": \
                 false, \"bias\": false, \"residual\": false, \"microseconds\": 1.0, \"cublaslt\": 1, \"algorithm\": \
                 \"{}\", \"workspace\": 0}}",
                "0".repeat(128)
            )
        };
        let of = |count: usize| {
            format!("{head}, \"products\": [{}]}}", (1..=count).map(product).collect::<Vec<_>>().join(","))
        };
        assert_eq!(Selections::parse(&of(1 << 16)).unwrap().len(), 1 << 16);
        let more = format!("{head}, \"products\": [0{}]}}", ", 0".repeat(1 << 16));
        assert!(Selections::parse(&more).unwrap_err().to_string().contains("at most 65536"));
    }

    #[test]
    fn of_another_make_are_refused_with_the_place() {
        let stored = stored();
        let refused = |from: &str, to: &str, parts: &[&str]| {
            assert!(stored.contains(from), "{from}");
            let error = Selections::parse(&stored.replacen(from, to, 1)).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, FlashInferError::Data(_)) && text.contains("line 1"), "{text}");
            assert!(parts.iter().all(|part| text.contains(part)), "{text}, expected {parts:?}");
        };
        refused("\"version\": 1", "\"version\": 2", &["version 1", "select again"]);
        refused("\"version\": 1, ", "", &["\"version\""]);
        refused("{\"version\"", "{\"colour\": 1, \"version\"", &["colour"]);
        refused("\"major\": 9", "\"major\": -9", &["major"]);
        refused("\"major\": 9", "\"major\": 99999999999", &["major", "at most 1000"]);
        refused("\"name\": \"a GPU\"", "\"name\": \"\"", &["name"]);
        refused("\"rows\": 4", "\"rows\": 0", &["products[0]", "rows"]);
        refused("\"rows\": 4", "\"rows\": 4294967296", &["rows", "at most 2147483647"]);
        refused("\"rows\": 4", "\"rows\": \"4\"", &["rows"]);
        refused("\"row_stride\": 1024", "\"row_stride\": 1023", &["row_stride"]);
        refused("\"BF16\"", "\"F8E4M3\"", &["dtype", "BF16, F16 or F32"]);
        refused("\"f32_out\": false", "\"f32_out\": true", &["a residual"]);
        refused("\"bias\": false, ", "", &["bias"]);
        refused("4.5", "-4.5", &["microseconds"]);
        refused("4.5", "\"NaN\"", &["microseconds"]);
        refused("4.5", "1e999", &["microseconds"]);
        refused("0123456789abcdef", "0123456789abcde", &["algorithm", "128 hexadecimal digits"]);
        refused("0123456789abcdef", "0123456789abcdeF", &["algorithm"]);
        refused("0123456789abcdef", "0123456789abcd\u{e9}", &["algorithm"]);
        refused("\"workspace\": 4096", "\"workspace\": 33554433", &["workspace", "at most 33554432"]);
        refused("\"workspace\": 4096", "\"workspace\": 4096, \"kernel\": \"few_rows_bf16_8_1\"", &["beside a kernel"]);
        refused("few_rows_bf16_8_1", "few_rows_bf16_9_1", &["kernel", "select again"]);
        refused("\"rows\": 1,", "\"rows\": 4,", &["products[1]", "a second time"]);
        refused("\"products\": [", "\"products\": [null, ", &["products[0]"]);
        refused("]}", "]", &["line 1"]);
        let without =
            stored.replace("{\"name\": \"a GPU\", \"major\": 9, \"minor\": 0, \"multiprocessors\": 132}", "null");
        assert!(Selections::parse(&without).unwrap_err().to_string().contains("none without a GPU"));
    }
}
