//! Values of TVM-FFI through the real libtvm_ffi.so and a small module in C.

#[path = "support/native.rs"]
mod native;

use std::collections::HashMap;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use flashinfer_rs::object::{
    Any, Array, Dict, DlpackTensor, DlpackTensorUnversioned, Error, Func, HostAllocator, IntoAny, List, Map, Memory,
    Object, Shape, Tensor, TensorAllocator, TensorRequest,
};
use flashinfer_rs::{
    Arg, DType, Device, FlashInferError, FlashInferRuntime, Module, PackedTensor, Result, RuntimeConfig, TensorRef,
    Value,
};

/// Tables of functions have no lock of TVM-FFI's, so that the tests that register are one.
fn module() -> &'static Module {
    static MODULE: OnceLock<Module> = OnceLock::new();
    MODULE.get_or_init(|| {
        FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = native::compile("objects.c", "objects.so", &[], folder.path());
        // SAFETY: the test's own module, without initializers.
        unsafe { Module::open(path) }.unwrap()
    })
}

fn runtime() -> &'static FlashInferRuntime {
    module();
    FlashInferRuntime::global().unwrap()
}

fn call(name: &str, args: &[Arg<'_>]) -> Result<Any> {
    // SAFETY: the fixture's functions check what they take.
    unsafe { module().function(name)?.call_any(args) }
}

fn apply(func: &Func, args: &[Arg<'_>]) -> Result<Any> {
    let mut all = vec![Arg::object(func.as_object())];
    all.extend_from_slice(args);
    call("apply", &all)
}

fn raised(error: FlashInferError) -> (String, String) {
    match error {
        FlashInferError::TvmFfiCall { kind, message, .. } => (kind, message),
        other => panic!("{other}"),
    }
}

// Values.

#[test]
fn numbers_and_texts_come_back_as_they_were() {
    module();
    assert_eq!(Any::from(i64::MIN).to::<i64>().unwrap(), i64::MIN);
    assert_eq!(Any::from(-7i32).to::<i32>().unwrap(), -7);
    assert_eq!(Any::from(0.1f64).to::<f64>().unwrap(), 0.1);
    assert!(Any::from(true).to::<bool>().unwrap());
    assert_eq!(Any::from(DType::F8E4M3).to::<DType>().unwrap(), DType::F8E4M3);
    assert_eq!(Any::from(Device::Cuda(3)).to::<Device>().unwrap(), Device::Cuda(3));
    assert_eq!(Any::opaque(0x10 as *mut c_void).to::<*mut c_void>().unwrap() as usize, 0x10);
    assert_eq!(Any::NONE.to::<Option<i64>>().unwrap(), None);
    assert_eq!(Any::from(5i64).to::<Option<i64>>().unwrap(), Some(5));
    for len in 0..=20 {
        let text = "aé☃z0123456789abcdefgh".chars().take(len).collect::<String>();
        let any = Any::str(&text).unwrap();
        assert_eq!(any.as_str(), Some(text.as_str()));
        // Up to seven bytes lie in the value itself.
        assert_eq!(any.type_index(), if text.len() <= 7 { 11 } else { 65 }, "{text:?}");
        assert_eq!(any.to::<String>().unwrap(), text);
        let bytes: Vec<u8> = (0..len as u8).map(|i| i.wrapping_mul(97)).collect();
        let any = Any::bytes(&bytes).unwrap();
        assert_eq!((any.as_bytes(), any.as_str()), (Some(bytes.as_slice()), None));
        assert_eq!(any.to::<Vec<u8>>().unwrap(), bytes);
    }
}

#[test]
fn integers_stand_for_booleans_and_numbers_as_in_tvm_ffi_and_nothing_else_does() {
    module();
    assert_eq!(Any::from(true).to::<i64>().unwrap(), 1);
    assert_eq!(Any::from(3i64).to::<f64>().unwrap(), 3.0);
    assert!(Any::from(2i64).to::<bool>().unwrap());
    for error in [
        Any::from(1.0f64).to::<i64>().unwrap_err(),
        Any::str("1").unwrap().to::<i64>().unwrap_err(),
        Any::from(i64::MAX).to::<i32>().unwrap_err(),
        Any::from(1i64).to::<String>().unwrap_err(),
        Any::NONE.to::<Tensor>().unwrap_err(),
        Any::from(Shape::new(&[1]).unwrap()).to::<Array>().unwrap_err(),
    ] {
        let FlashInferError::WrongType { found, expected, .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains(found.as_str()) && error.to_string().contains(expected), "{error}");
    }
    let error = Any::from(Shape::new(&[1]).unwrap()).to::<Array>().unwrap_err();
    assert_eq!(error.to_string().split(';').next(), Some("the value is Shape, expected Array"));
}

#[test]
fn a_value_goes_through_a_function_and_back() {
    module();
    for (any, expected) in [
        (Any::NONE, "None"),
        (Any::from(7i64), "Int(7)"),
        (Any::from(Device::Cpu), "Device(Cpu)"),
        (Any::from(DType::BF16), "DType(BF16)"),
        (Any::str("short").unwrap(), "Str(\"short\")"),
        (Any::str("longer than seven").unwrap(), "Str(\"longer than seven\")"),
        (Any::from(Shape::new(&[2, 3]).unwrap()), "Shape(Shape[2, 3])"),
        (Any::from(Array::from_items([1, 2]).unwrap()), "Array([Int(1), Int(2)])"),
    ] {
        let back = call("echo", &[any.as_arg()]).unwrap();
        assert_eq!(format!("{back:?}"), expected);
        assert_eq!(format!("{any:?}"), expected);
    }
}

#[test]
fn what_a_careless_function_only_lends_is_copied_or_just_an_address() {
    module();
    let text = call("lent_text", &[]).unwrap();
    assert_eq!((text.type_index(), text.as_str()), (65, Some("a text that nobody owns")));
    // Nothing here would keep it alive.
    assert!(matches!(call("lent_tensor", &[]).unwrap().into_value(), Value::OpaquePtr(_)));
}

#[test]
fn a_type_that_is_unknown_here_has_no_name_and_does_no_harm() {
    module();
    for index in [64, 75, 99, 127, 5000, i32::MAX] {
        let stranger = call("stranger", &[Arg::int(index.into())]).unwrap().clone();
        let known = match index {
            64 => Some("ffi.Object"),
            75 => Some("ffi.List"),
            _ => None,
        };
        let object = stranger.to::<Object>().unwrap();
        assert_eq!((object.type_index(), object.type_key().as_deref()), (index, known));
    }
    assert_eq!(Array::new(&[]).unwrap().as_object().type_key().as_deref(), Some("ffi.Array"));
    // A type that is registered, whose index is this process's own.
    let graph = Func::global("ffi.ToJSONGraph").unwrap().unwrap();
    assert_eq!(graph.as_object().type_key().as_deref(), Some("ffi.Function"));
}

#[test]
fn a_value_of_an_unknown_kind_is_no_other_and_does_no_harm() {
    module();
    for index in [-1, i32::MIN, 13, 14, 40, 63] {
        let strange = call("strange_value", &[Arg::int(index.into())]).unwrap().clone();
        assert_eq!((strange.type_index(), strange.as_str(), strange.as_bytes()), (index, None, None));
        assert!(format!("{strange:?}").contains(&index.to_string()), "{strange:?}");
        strange.clone().to::<Object>().unwrap_err();
        strange.clone().to::<i64>().unwrap_err();
        let error = strange.clone().to::<Tensor>().unwrap_err();
        assert!(error.to_string().contains(&index.to_string()), "{error}");
        assert!(matches!(strange.into_value(), Value::Other { type_index } if type_index == index));
    }
    // What is moved out of its owner is only an address here, which nobody follows.
    let moved = call("strange_value", &[Arg::int(10)]).unwrap();
    assert!(matches!(moved.into_value(), Value::OpaquePtr(_)));
    // In a container too.
    let array = Array::new(&[Arg::int(1)]).unwrap();
    assert_eq!(array.iter().map(|item| item.type_index()).collect::<Vec<_>>(), [1]);
    let stranger = call("stranger", &[Arg::int(5000)]).unwrap();
    let array = Array::new(&[stranger.as_arg(), stranger.as_arg()]).unwrap();
    assert_eq!(format!("{array:?}").matches("5000").count(), 2, "{array:?}");
    assert_eq!(stranger.clone().to::<Object>().unwrap().references(), 4);
}

#[test]
fn raw_values_cross_over_without_a_reference_more_or_less() {
    module();
    let shape = Shape::new(&[1, 2, 3]).unwrap();
    let raw = Any::from(shape.clone()).into_raw();
    assert_eq!(shape.as_object().references(), 2);
    // SAFETY: what was given away a moment ago.
    let back = unsafe { Any::from_raw(raw) };
    assert_eq!(back.to::<Shape>().unwrap().as_slice(), [1, 2, 3]);
    let handle = Object::from(shape.clone()).into_raw();
    // SAFETY: as above.
    drop(unsafe { Object::from_raw(handle) });
    assert_eq!(shape.as_object().references(), 1);
}

/// As many as the lower half of the count has room for would make it 0 again, and the object be released under its users.
#[test]
fn references_are_given_out_as_long_as_they_can_be_counted() {
    module();
    let shape = Shape::new(&[1, 2, 3]).unwrap();
    let any = Any::from(shape.clone());
    let handle = Object::from(shape.clone()).into_raw();
    // SAFETY: the count is what a live object begins with; this test alone has the object.
    let count = unsafe { &*handle.cast::<std::sync::atomic::AtomicU64>() };
    let before = count.fetch_add(1 << 31, Ordering::Relaxed);
    let refused = |make: &dyn Fn()| {
        let panic = catch_unwind(AssertUnwindSafe(make)).unwrap_err();
        let text = panic.downcast_ref::<&str>().expect("a message");
        assert!(text.contains("more references"), "{text}");
        assert_eq!(count.load(Ordering::Relaxed), before + (1 << 31));
    };
    refused(&|| drop(shape.clone()));
    refused(&|| drop(any.clone()));
    refused(&|| drop(any.as_arg().to_any()));
    refused(&|| drop(call("echo", &[any.as_arg()])));
    count.fetch_sub(1 << 31, Ordering::Relaxed);
    // SAFETY: what was given away.
    drop(unsafe { Object::from_raw(handle) });
    drop(any);
    assert_eq!(shape.as_object().references(), 1);
}

// Containers.

#[test]
fn arrays_hold_values_of_every_kind_in_order() {
    module();
    let empty = Array::new(&[]).unwrap();
    assert!(empty.is_empty() && empty.get(0).is_none() && empty.iter().next().is_none());
    let inner = Array::from_items(["a", "a longer text"]).unwrap();
    let array = Array::from_items([
        1i64.into_any().unwrap(),
        Any::NONE,
        "text".into_any().unwrap(),
        (&inner).into_any().unwrap(),
        0.5f64.into_any().unwrap(),
    ])
    .unwrap();
    assert_eq!((array.len(), array.iter().len(), inner.as_object().references()), (5, 5, 2));
    assert_eq!(array.get(2).unwrap().as_str(), Some("text"));
    assert_eq!(array.get(3).unwrap().to::<Array>().unwrap().get(1).unwrap().as_str(), Some("a longer text"));
    assert!(array.get(5).is_none() && array.get(usize::MAX).is_none());
    assert_eq!(array.as_args()[4].to::<f64>().unwrap(), 0.5);
    let element = array.get(3).unwrap();
    drop(array);
    assert_eq!(inner.as_object().references(), 2);
    drop(element);
    assert_eq!(inner.as_object().references(), 1);
}

#[test]
fn an_array_keeps_what_it_holds_so_a_tensor_that_is_lent_is_refused() {
    module();
    let values = [1f32, 2.];
    let packed = TensorRef::from_slice(&values, &[2]).unwrap();
    let packed = packed.pack();
    for error in [
        Array::new(&[Arg::int(1), Arg::tensor(&packed)]).unwrap_err(),
        Map::new(&[Arg::int(1), Arg::tensor(&packed)]).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(text.contains("position 1") && text.contains("Tensor object"), "{text}");
    }
    // C++ puts one in all the same; nobody knows whether it still is there.
    let [array_of, map_of] = ["ffi.Array", "ffi.Map"].map(|name| Func::global(name).unwrap().unwrap());
    // SAFETY: TVM-FFI's own functions, which take any values.
    let (array, map) = unsafe {
        let args = [Arg::int(7), Arg::tensor(&packed)];
        (array_of.call(&args).unwrap(), map_of.call(&args).unwrap())
    };
    let (Value::Array(array), Value::Map(map)) = (array, map) else { panic!("an array and a map") };
    let address = (&raw const packed).cast_mut().cast::<c_void>();
    for any in [array.get(1).unwrap(), map.get(7).unwrap().unwrap(), map.iter().next().unwrap().1] {
        assert!(matches!(any.clone().into_value(), Value::OpaquePtr(pointer) if pointer == address), "{any:?}");
    }
    let array = Array::from_items([Tensor::from_vec(vec![1f32, 2.], &[2]).unwrap()]).unwrap();
    assert_eq!(array.get(0).unwrap().to::<Tensor>().unwrap().as_slice::<f32>().unwrap(), [1., 2.]);
}

#[test]
fn maps_of_every_size_are_read_in_the_order_they_were_written() {
    module();
    for len in (0..=20).chain([100, 1000]) {
        let items: Vec<(String, i64)> = (0..len).map(|i| (format!("key {i}"), i * i)).collect();
        let map = Map::from_items(items.iter().map(|(key, value)| (key, *value))).unwrap();
        assert_eq!((map.len() as i64, map.is_empty()), (len, len == 0));
        let read: Vec<_> = map.iter().map(|(key, value)| (key.to().unwrap(), value.to().unwrap())).collect();
        assert_eq!(read, items);
        for (key, value) in &items {
            assert_eq!(map.get(key).unwrap().unwrap().to::<i64>().unwrap(), *value);
        }
        assert!(map.get("another key").unwrap().is_none());
    }
    let map = Map::from_items([(1i64, 1i64), (2, 2), (1, 3)]).unwrap();
    assert_eq!((map.len(), map.get(1i64).unwrap().unwrap().to::<i64>().unwrap()), (2, 3));
    let (kind, message) = raised(Map::new(&[Arg::int(1)]).unwrap_err());
    assert!(!kind.is_empty() && !message.is_empty());
}

#[test]
fn an_iterator_over_a_map_needs_the_map_no_longer() {
    module();
    let items = Map::from_items([("a", Shape::new(&[1]).unwrap()), ("b", Shape::new(&[2]).unwrap())]).unwrap().iter();
    let sizes: Vec<i64> = items.map(|(_, shape)| shape.to::<Shape>().unwrap().as_slice()[0]).collect();
    assert_eq!(sizes, [1, 2]);
}

#[test]
fn shapes_are_their_sizes() {
    module();
    for sizes in [&[][..], &[7], &[1, -1, i64::MAX, 0]] {
        assert_eq!(Shape::new(sizes).unwrap().as_slice(), sizes);
    }
}

#[test]
fn lists_and_dictionaries_say_which_release_they_need() {
    module();
    for error in [List::from_items([1i64]).unwrap_err(), Dict::from_items([(1i64, 1i64)]).unwrap_err()] {
        let FlashInferError::VersionMismatch { found, expected, .. } = &error else { panic!("{error}") };
        assert!(found.starts_with("0.1.3") && expected.starts_with("0.1.9"), "{error}");
    }
}

#[test]
fn errors_are_values_too() {
    module();
    let backtrace = "  File \"a.rs\", line 1, in f\n";
    let error = Error::with_backtrace("ValueError", "what \0 went wrong", backtrace).unwrap();
    assert_eq!((error.kind().as_str(), error.message().as_str()), ("ValueError", "what \0 went wrong"));
    assert_eq!(error.backtrace(), backtrace);
    // Not before TVM-FFI 0.1.8: what lies there is another object's.
    assert!(error.cause().is_none());
    assert_eq!(raised(error.clone().into()), ("ValueError".to_owned(), "what \0 went wrong".to_owned()));
    let echoed = call("echo", &[Arg::object(error.as_object())]).unwrap().into_value();
    assert!(matches!(&echoed, Value::Error(same) if same.message() == error.message()), "{echoed:?}");
}

// Functions.

#[test]
fn a_closure_is_called_back_with_what_it_was_given() {
    module();
    let sum = Func::new(|args| {
        let each = args.iter().map(|arg| arg.to::<f64>()).collect::<Result<Vec<_>>>()?;
        Ok(each.iter().sum::<f64>().into())
    })
    .unwrap();
    let args = [Arg::int(1), Arg::bool(true), Arg::float(0.5)];
    assert_eq!(apply(&sum, &args).unwrap().to::<f64>().unwrap(), 2.5);
    assert_eq!(apply(&sum, &[]).unwrap().to::<f64>().unwrap(), 0.0);
    let seen = Func::new(|args| {
        let kinds = args.iter().map(|arg| format!("{:?}", arg.value().unwrap()));
        kinds.collect::<Vec<_>>().join(" ").into_any()
    })
    .unwrap();
    let text = apply(&seen, &[Arg::NONE, Arg::str(c"a text that is lent"), Arg::device(Device::Cpu)]).unwrap();
    assert_eq!(text.as_str(), Some("None Str(\"a text that is lent\") Device(Cpu)"));
}

#[test]
fn a_closure_reads_and_writes_the_tensors_it_is_lent() {
    module();
    let double = Func::new(|args| {
        let tensor = args[0].as_tensor()?;
        assert_eq!((tensor.shape(), tensor.strides(), tensor.dtype()), (&[2, 2][..], &[2, 1][..], DType::F32));
        // SAFETY: the test lends the tensor to be written, and to nothing else.
        let mut written = unsafe { args[0].as_tensor_mut() }?;
        let data = written.as_mut_ptr().cast::<f32>();
        // SAFETY: four numbers of this type.
        (0..4).for_each(|i| unsafe { *data.add(i) *= 2.0 });
        Ok(Any::NONE)
    })
    .unwrap();
    let mut values = [1f32, 2., 3., 4.];
    let mut tensor = flashinfer_rs::TensorMut::from_slice(&mut values, &[2, 2]).unwrap();
    apply(&double, &[Arg::tensor(&tensor.pack())]).unwrap();
    assert_eq!(values, [2., 4., 6., 8.]);
    let object = Tensor::from_vec(vec![1f32, 2., 3., 4.], &[2, 2]).unwrap();
    apply(&double, &[Arg::object(object.as_object())]).unwrap();
    assert_eq!(object.as_slice::<f32>().unwrap(), [2., 4., 6., 8.]);
    let (kind, _) = raised(apply(&double, &[Arg::int(1)]).unwrap_err());
    assert_eq!(kind, "TypeError");
}

#[test]
fn what_a_closure_answers_is_raised_with_its_kind() {
    module();
    let fails = |error: fn() -> FlashInferError| {
        let func = Func::new(move |_| Err(error())).unwrap();
        raised(apply(&func, &[]).unwrap_err())
    };
    let (kind, message) = fails(|| Error::new("KeyError", "no such key").unwrap().into());
    assert_eq!((kind.as_str(), message.as_str()), ("KeyError", "no such key"));
    assert_eq!(fails(|| Any::NONE.to::<i64>().unwrap_err()).0, "TypeError");
    assert_eq!(fails(|| Tensor::zeros(DType::F32, &[-1]).unwrap_err()).0, "ValueError");
    let (kind, message) = fails(|| FlashInferError::NotInitialized);
    assert!(kind == "RuntimeError" && message.contains("not initialized"), "{kind}: {message}");
}

#[test]
fn a_panic_in_a_closure_is_an_error_in_its_caller() {
    // What would unwind out of it would end the process.
    native::isolated("a_panic_in_a_closure_is_an_error_in_its_caller", every_panic);
}

fn every_panic() {
    module();
    let panics = |payload: fn()| {
        let func = Func::new(move |_| {
            payload();
            Ok(Any::NONE)
        })
        .unwrap();
        raised(apply(&func, &[]).unwrap_err())
    };
    let (kind, message) = panics(|| panic!("on purpose"));
    assert!(kind == "InternalError" && message.contains("panicked: on purpose"), "{kind}: {message}");
    assert!(panics(|| panic!("number {}", 7)).1.contains("number 7"));
    assert!(panics(|| std::panic::panic_any(7)).1.contains("without a message"));
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("and again")
        }
    }
    assert_eq!(panics(|| std::panic::panic_any(Bomb)).0, "InternalError");
    // Nor does an error of the closure's that does so, or the payload of such a panic.
    struct Bombs(u32);
    impl Drop for Bombs {
        fn drop(&mut self) {
            if self.0 > 0 {
                std::panic::panic_any(Bombs(self.0 - 1))
            }
        }
    }
    assert_eq!(panics(|| std::panic::panic_any(Bombs(3))).0, "InternalError");
    #[derive(Debug)]
    struct Fails(#[allow(dead_code, reason = "it is dropped")] Bombs);
    impl std::fmt::Display for Fails {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a reason")
        }
    }
    impl std::error::Error for Fails {}
    impl std::fmt::Debug for Bombs {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Bombs")
        }
    }
    fn fails() -> FlashInferError {
        let source = std::io::Error::other(Fails(Bombs(3)));
        FlashInferError::Io { doing: "reading", path: "a file".into(), source }
    }
    let func = Func::new(|_| Err(fails())).unwrap();
    assert!(raised(apply(&func, &[]).unwrap_err()).1.contains("a file"));
    let allocator = Does(|_: &TensorRequest<'_>| Err(fails()));
    raised(runtime().with_allocator(&allocator, doubled).unwrap().unwrap_err());
    let allocator = Does(|_: &TensorRequest<'_>| std::panic::panic_any(Bombs(3)));
    raised(runtime().with_allocator(&allocator, doubled).unwrap().unwrap_err());
    let owner = Bombs(3);
    // SAFETY: the values are there for good.
    let tensor =
        unsafe { Tensor::from_owner(owner, VALUES.as_ptr().cast_mut().cast(), Device::Cpu, DType::F32, &[1], None) };
    drop(tensor.unwrap());
    // One that panics where it is dropped ends nothing either.
    let bomb = Bomb;
    let func = Func::new(move |_| {
        let _ = &bomb;
        Ok(Any::NONE)
    })
    .unwrap();
    drop(func);
}

#[test]
fn a_closure_of_rust_types_tells_what_does_not_fit() {
    module();
    let func = Func::from_fn("repeat", |text: String, times: i64| {
        let times =
            usize::try_from(times).map_err(|_| FlashInferError::from(Error::new("ValueError", "negative").unwrap()))?;
        Ok(text.repeat(times))
    })
    .unwrap();
    assert_eq!(apply(&func, &[Arg::str(c"ab"), Arg::int(3)]).unwrap().as_str(), Some("ababab"));
    let error = apply(&func, &[Arg::str(c"ab")]).unwrap_err();
    let mismatch = error.mismatch().unwrap();
    assert_eq!((mismatch.argument, mismatch.expected.as_str(), mismatch.found.as_str()), (None, "2", "1"));
    assert_eq!(mismatch.signature, "repeat");
    let error = apply(&func, &[Arg::str(c"ab"), Arg::float(1.5)]).unwrap_err();
    let mismatch = error.mismatch().unwrap();
    assert_eq!((mismatch.argument, mismatch.expected.as_str(), mismatch.found.as_str()), (Some(1), "int", "float"));
    assert_eq!(raised(apply(&func, &[Arg::str(c"ab"), Arg::int(-1)]).unwrap_err()).0, "ValueError");
    let nothing = Func::from_fn("nothing", || Ok(())).unwrap();
    assert!(apply(&nothing, &[]).unwrap().is_none());
}

#[test]
fn what_a_module_refuses_is_told_apart() {
    module();
    let values = [1f32];
    let tensor = TensorRef::from_slice(&values, &[1]).unwrap();
    let packed = tensor.pack();
    let error = call("twice", &[Arg::tensor(&packed), Arg::tensor(&packed)]).unwrap_err();
    let mismatch = error.mismatch().unwrap();
    assert_eq!((mismatch.argument, mismatch.expected.as_str()), (Some(0), "ffi.Tensor"));
    assert_eq!((mismatch.found.as_str(), mismatch.signature.starts_with("twice(0: ffi.Tensor")), ("DLTensor*", true));
    assert_eq!(call("twice", &[]).unwrap_err().mismatch().unwrap().expected, "2");
    assert!(call("apply", &[]).unwrap_err().mismatch().is_none());
}

#[test]
fn a_closure_is_dropped_once_whoever_is_last() {
    module();
    let counted = Arc::new(());
    let inside = Arc::clone(&counted);
    let func = Func::new(move |_| Ok((Arc::strong_count(&inside) as u32).into())).unwrap();
    call("keep", &[Arg::object(func.as_object())]).unwrap();
    assert_eq!((Arc::strong_count(&counted), func.as_object().references()), (2, 2));
    drop(func);
    assert_eq!(Arc::strong_count(&counted), 2);
    // Another thread is the last one.
    thread::scope(|scope| scope.spawn(|| drop(call("keep", &[]).unwrap())).join().unwrap());
    assert_eq!(Arc::strong_count(&counted), 1);
}

#[test]
fn a_closure_may_be_called_on_a_thread_that_is_not_this_side_s() {
    module();
    let here = thread::current().id();
    let elsewhere = |func: &Func, arg: Arg<'_>| call("apply_elsewhere", &[Arg::object(func.as_object()), arg]);
    let says = Func::from_fn("says", move |text: String| {
        assert_ne!(thread::current().id(), here);
        Ok(format!("{text}, there"))
    })
    .unwrap();
    let text = elsewhere(&says, Arg::str(c"a text that is lent")).unwrap();
    assert_eq!(text.as_str(), Some("a text that is lent, there"));
    // That thread has no allocator of the one that waits for it.
    let alone = Func::from_fn("alone", || doubled().map(drop)).unwrap();
    let run = || call("apply_elsewhere", &[Arg::object(alone.as_object())]);
    let (kind, message) = raised(runtime().with_allocator(&HostAllocator, run).unwrap().unwrap_err());
    assert!(kind == "RuntimeError" && message.contains("allocator"), "{kind}: {message}");
    let panics = Func::new(|_| panic!("on purpose")).unwrap();
    let (kind, message) = raised(elsewhere(&panics, Arg::NONE).unwrap_err());
    assert!(kind == "InternalError" && message.contains("panicked: on purpose"), "{kind}: {message}");
    // What that thread made outlives it.
    let makes = Func::from_fn("makes", |n: i64| Tensor::from_vec(vec![n as f32; 3], &[3])).unwrap();
    let made: Tensor = elsewhere(&makes, Arg::int(7)).unwrap().to().unwrap();
    assert_eq!(made.as_slice::<f32>().unwrap(), [7.0; 3]);
}

#[test]
fn a_function_is_an_object_where_one_is_wanted() {
    module();
    let function = module().function("echo").unwrap();
    let func = function.to_func().unwrap();
    assert_eq!(apply(&func, &[Arg::int(5)]).unwrap().to::<i64>().unwrap(), 5);
    // SAFETY: the fixture's functions check what they take.
    let value = unsafe { func.typed::<(&str,), String>().call(("some text",)) }.unwrap();
    assert_eq!(value, "some text");
    let again = func.clone().named("another name");
    assert!(again.to_func().unwrap().as_object().is_same(func.as_object()));
    // SAFETY: as above.
    let error = unsafe { again.call(&[]) }.unwrap_err();
    assert!(error.to_string().starts_with("another name raised TypeError"), "{error}");
}

#[test]
fn functions_are_registered_found_replaced_and_removed() {
    native::isolated("functions_are_registered_found_replaced_and_removed", || {
        module();
        let names = Func::global_names().unwrap();
        assert!(names.iter().any(|name| name == "ffi.Array") && names.len() >= 38, "{names:?}");
        const NAME: &str = "flashinfer_rs.test.answer";
        assert!(Func::global(NAME).unwrap().is_none());
        let answer = |value: i64| Func::from_fn("answer", move || Ok(value)).unwrap();
        let ask = || {
            let func = Func::global(NAME).unwrap().unwrap();
            // SAFETY: the test's own function.
            unsafe { func.typed::<(), i64>().call(()) }.unwrap()
        };
        // SAFETY: this process does nothing else meanwhile.
        unsafe {
            let first = answer(42);
            first.register_global(NAME, false).unwrap();
            assert_eq!((ask(), first.as_object().references()), (42, 2));
            let error = answer(43).register_global(NAME, false).unwrap_err();
            assert!(raised(error).1.contains("already"));
            answer(43).register_global(NAME, true).unwrap();
            assert_eq!((ask(), first.as_object().references()), (43, 1));
            // Whose closure looks something up where it is dropped.
            struct Asks;
            impl Drop for Asks {
                fn drop(&mut self) {
                    assert!(Func::global("ffi.Array").unwrap().is_some());
                }
            }
            let asks = Asks;
            let func = Func::from_fn("asks", move || Ok(size_of_val(&asks) as i64 + 1)).unwrap();
            func.register_global(NAME, true).unwrap();
            drop(func);
            assert_eq!(ask(), 1);
            assert!(Func::remove_global(NAME).unwrap());
            assert!(!Func::remove_global(NAME).unwrap());
        }
        assert!(Func::global(NAME).unwrap().is_none());
        assert!(Func::global("").unwrap().is_none() && Func::global("no\0name").unwrap().is_none());
    });
}

#[test]
fn an_error_is_taken_whatever_number_a_function_answers_with_it() {
    module();
    let (kind, message) = raised(call("answers", &[Arg::int(1)]).unwrap_err());
    assert_eq!((kind.as_str(), message.as_str()), ("ValueError", "raised"));
    // Nothing of it is left for the next one.
    let (kind, message) = raised(call("answers", &[Arg::int(-2)]).unwrap_err());
    assert_eq!((kind.as_str(), message.as_str()), ("ValueError", "raised"));
    let nothing = Func::new(|_| Ok(Any::NONE)).unwrap();
    assert!(apply(&nothing, &[]).unwrap().is_none());
    let (kind, message) = raised(call("answers_alone", &[Arg::int(-1)]).unwrap_err());
    assert!(kind == "MissingError" && message.contains("-1"), "{kind}: {message}");
    assert_eq!(raised(call("answers_alone", &[Arg::int(-2)]).unwrap_err()).0, "FrontendError");
}

#[test]
fn typed_functions_lend_for_as_long_as_a_call_takes() {
    module();
    let function = module().function("index_of").unwrap();
    let mut values = [1f32, 2.];
    // SAFETY: the fixture's functions check what they take.
    unsafe {
        let of_tensor = function.typed::<(&PackedTensor<'_>,), i64>();
        for _ in 0..2 {
            let mut tensor = flashinfer_rs::TensorMut::from_slice(&mut values, &[2]).unwrap();
            assert_eq!(of_tensor.call((&tensor.pack(),)).unwrap(), 7);
            values[0] += 1.0;
        }
        let tensor = TensorRef::from_slice(&values, &[2]).unwrap();
        assert_eq!(function.typed::<(&TensorRef<'_>,), i64>().call((&tensor,)).unwrap(), 7);
        let object = Tensor::zeros(DType::F16, &[1]).unwrap();
        assert_eq!(function.typed::<(&Tensor,), i64>().call((&object,)).unwrap(), 70);
        let optional = function.typed::<(Option<&Tensor>,), i64>();
        assert_eq!((optional.call((None,)).unwrap(), optional.call((Some(&object),)).unwrap()), (0, 70));
        assert_eq!(function.typed::<(&str,), i64>().call(("short",)).unwrap(), 11);
        assert_eq!(function.typed::<(&str,), i64>().call(("longer than that",)).unwrap(), 65);
        assert_eq!(function.typed::<(&[u8],), i64>().call((&[0; 20],)).unwrap(), 66);
        assert_eq!(function.typed::<(bool,), i64>().call((true,)).unwrap(), 2);
        assert_eq!(function.typed::<(DType,), i64>().call((DType::F16,)).unwrap(), 5);
        assert_eq!(function.typed::<(Arg<'_>,), i64>().call((Arg::float(0.0),)).unwrap(), 3);
        assert_eq!(function.typed::<(&Any,), i64>().call((&Any::NONE,)).unwrap(), 0);
        let five = module().function("five").unwrap();
        let five = five.typed::<(i64, f64, bool, Device, Option<i64>), ()>();
        five.call((1, 2.0, true, Device::Cpu, None)).unwrap();
        let error = function.typed::<(i64,), Tensor>().call((1,)).unwrap_err();
        assert!(error.to_string().starts_with("what index_of returned is int, expected Tensor"), "{error}");
    }
    assert_eq!(flashinfer_rs::object::Typed::<(i64, f64), ()>::ARITY, 2);
}

// Tensors.

/// What counts how often it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn counted(values: &'static [f32], shape: &[i64], strides: Option<&[i64]>) -> (Tensor, Arc<AtomicUsize>) {
    let drops = Arc::new(AtomicUsize::new(0));
    let (owner, data) = (Counted(Arc::clone(&drops)), values.as_ptr().cast_mut().cast());
    // SAFETY: the values are there for good, and the tests only read them.
    let tensor = unsafe { Tensor::from_owner(owner, data, Device::Cpu, DType::F32, shape, strides) };
    (tensor.unwrap(), drops)
}

const VALUES: &[f32] = &[1., 2., 3., 4., 5., 6.];

#[test]
fn a_tensor_owns_its_memory_until_the_last_reference_goes_anywhere() {
    module();
    let (tensor, drops) = counted(VALUES, &[2, 3], None);
    assert_eq!((tensor.shape(), tensor.strides()), (&[2, 3][..], &[3, 1][..]));
    assert_eq!(
        (tensor.dtype(), tensor.device(), tensor.dlpack_dtype()),
        (Some(DType::F32), Some(Device::Cpu), (2, 32, 1))
    );
    assert_eq!(tensor.as_slice::<f32>().unwrap(), VALUES);
    call("keep", &[Arg::object(tensor.as_object())]).unwrap();
    let clone = tensor.clone();
    drop(tensor);
    call("keep", &[]).unwrap();
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    thread::spawn(move || drop(clone)).join().unwrap();
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

#[test]
fn tensors_that_cannot_be_are_refused_and_their_owner_is_dropped() {
    module();
    let drops = Arc::new(AtomicUsize::new(0));
    for (data, shape) in [(0usize, &[1][..]), (0x1000, &[-1]), (0x1000, &[1; 7])] {
        let owner = Counted(Arc::clone(&drops));
        // SAFETY: it is refused.
        let tensor = unsafe { Tensor::from_owner(owner, data as *mut c_void, Device::Cpu, DType::F32, shape, None) };
        assert!(matches!(tensor.unwrap_err(), FlashInferError::InvalidArgument { .. }));
    }
    assert_eq!(drops.load(Ordering::SeqCst), 3);
    assert!(Tensor::from_vec(vec![1f32; 3], &[2]).is_err());
    assert!(Tensor::zeros(DType::F64, &[i64::MAX / 8, 2]).is_err());
    assert_eq!(Tensor::zeros(DType::F64, &[0, 5]).unwrap().as_slice::<f64>().unwrap(), [] as [f64; 0]);
    assert_eq!(Tensor::from_vec(vec![7i64], &[]).unwrap().as_slice::<i64>().unwrap(), [7]);
}

#[test]
fn a_slice_is_of_what_the_tensor_is() {
    module();
    let (tensor, _) = counted(VALUES, &[3], Some(&[2]));
    for error in [
        tensor.as_slice::<f32>().unwrap_err(),
        Tensor::zeros(DType::F32, &[2]).unwrap().as_slice::<i32>().unwrap_err(),
        {
            let data = VALUES.as_ptr().cast::<u8>().wrapping_add(1).cast_mut().cast();
            // SAFETY: memory that is there for good, and only read.
            unsafe { Tensor::from_owner((), data, Device::Cpu, DType::F32, &[2], None) }
                .unwrap()
                .as_slice::<f32>()
                .unwrap_err()
        },
    ] {
        assert!(matches!(error, FlashInferError::InvalidArgument { argument: "tensor", .. }), "{error}");
    }
    assert_eq!(tensor.as_ref().unwrap().strides(), [2]);
}

#[test]
fn a_function_that_takes_tensor_objects_is_given_them() {
    module();
    let (x, y) = (Tensor::from_vec(vec![1f32, 2., 3.], &[3]).unwrap(), Tensor::zeros(DType::F32, &[3]).unwrap());
    // SAFETY: the fixture checks what it takes, and nothing else uses the tensors.
    unsafe { module().function("twice").unwrap().typed::<(&Tensor, &Tensor), ()>().call((&x, &y)) }.unwrap();
    assert_eq!(y.as_slice::<f32>().unwrap(), [2., 4., 6.]);
}

#[test]
fn tensors_go_to_dlpack_and_come_back() {
    module();
    let (tensor, drops) = counted(VALUES, &[3, 2], Some(&[2, 1]));
    let managed = tensor.to_dlpack().unwrap();
    assert_eq!((managed.version().0, managed.is_read_only(), tensor.as_object().references()), (1, false, 2));
    let raw = managed.into_raw();
    // SAFETY: what was handed over a moment ago.
    let back = Tensor::from_dlpack(unsafe { DlpackTensor::from_raw(raw) }).unwrap();
    assert_eq!((back.shape(), back.as_ptr()), (&[3, 2][..], VALUES.as_ptr().cast()));
    let raw = back.to_dlpack_unversioned().unwrap().into_raw();
    // SAFETY: as above.
    let again = Tensor::from_dlpack_unversioned(unsafe { DlpackTensorUnversioned::from_raw(raw) }).unwrap();
    drop((tensor, back));
    assert_eq!((again.as_slice::<f32>().unwrap(), drops.load(Ordering::SeqCst)), (VALUES, 0));
    drop(again.to_dlpack().unwrap());
    drop(again.to_dlpack_unversioned().unwrap());
    drop(again);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

/// DLPack's managed tensor as somebody else has it, by the header.
#[repr(C)]
struct Foreign {
    version: [u32; 2],
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Foreign)>,
    flags: u64,
    data: *mut c_void,
    device: [i32; 2],
    ndim: i32,
    dtype: [u8; 4],
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

static GIVEN_BACK: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn give_back(foreign: *mut Foreign) {
    GIVEN_BACK.fetch_add(1, Ordering::SeqCst);
    // SAFETY: made by `foreign`, and given back once.
    drop(unsafe { Box::from_raw(foreign) });
}

fn foreign(version: u32, flags: u64, dtype: [u8; 4]) -> DlpackTensor {
    const SHAPE: &[i64] = &[2, 2];
    let foreign = Foreign {
        version: [version, 0],
        context: std::ptr::null_mut(),
        deleter: Some(give_back),
        flags,
        data: VALUES.as_ptr().cast_mut().cast(),
        device: [1, 0],
        ndim: 2,
        dtype,
        shape: SHAPE.as_ptr(),
        strides: std::ptr::null(),
        byte_offset: 4,
    };
    // SAFETY: a valid managed tensor, over values that are there for good.
    unsafe { DlpackTensor::from_raw(Box::into_raw(Box::new(foreign)).cast()) }
}

#[test]
fn what_somebody_else_hands_over_is_given_back_once() {
    module();
    const F32: [u8; 4] = [2, 32, 1, 0];
    let tensor = Tensor::from_dlpack(foreign(1, 0, F32)).unwrap();
    // Strides that were left out are filled in; an offset is in bytes.
    assert_eq!((tensor.strides(), tensor.as_slice::<f32>().unwrap()), (&[2, 1][..], &VALUES[1..5]));
    drop(tensor);
    assert_eq!(GIVEN_BACK.load(Ordering::SeqCst), 1);
    let managed = foreign(1, 1, F32);
    assert!(managed.is_read_only());
    drop(managed);
    assert_eq!(GIVEN_BACK.load(Ordering::SeqCst), 2);
    let error = Tensor::from_dlpack(foreign(2, 0, F32)).unwrap_err();
    assert!(error.to_string().contains("DLPack 2.0"), "{error}");
    assert_eq!(GIVEN_BACK.load(Ordering::SeqCst), 3);
    // Padded types of less than a byte, which TVM-FFI refuses, and which then are still this side's.
    let error = Tensor::from_dlpack(foreign(1, 4, [17, 4, 1, 0])).unwrap_err();
    assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
    assert_eq!(GIVEN_BACK.load(Ordering::SeqCst), 4);
    let strange = Tensor::from_dlpack(foreign(1, 0, [6, 8, 1, 0])).unwrap();
    assert_eq!((strange.dtype(), strange.dlpack_dtype()), (None, (6, 8, 1)));
    assert!(strange.as_ref().unwrap_err().to_string().contains("type code 6, 8 bits"));
}

// What functions allocate.

fn doubled() -> Result<Tensor> {
    let x = Tensor::from_vec(vec![1f32, 2., 3.], &[3])?;
    call("doubled", &[Arg::object(x.as_object())])?.to()
}

#[test]
fn functions_allocate_what_they_return_within_a_scope_and_not_outside_of_it() {
    module();
    let (kind, message) = raised(doubled().unwrap_err());
    assert!(kind == "RuntimeError" && message.contains("allocator"), "{kind}: {message}");
    let tensor = runtime().with_allocator(&HostAllocator, doubled).unwrap().unwrap();
    // It outlives the scope.
    assert_eq!((tensor.as_slice::<f32>().unwrap(), tensor.strides()), (&[2f32, 4., 6.][..], &[1][..]));
    assert_eq!(tensor.as_ptr() as usize % 256, 0);
    doubled().unwrap_err();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _ = runtime().with_allocator(&HostAllocator, || -> () { panic!("on purpose") });
    }));
    assert!(panicked.is_err());
    doubled().unwrap_err();
    // Other threads have none.
    let elsewhere =
        runtime().with_allocator(&HostAllocator, || thread::scope(|scope| scope.spawn(|| doubled().is_err()).join()));
    assert!(elsewhere.unwrap().unwrap());
}

/// An allocator that does as the test says.
struct Does<F>(F);

impl<F: Fn(&TensorRequest<'_>) -> Result<Memory>> TensorAllocator for Does<F> {
    fn allocate(&self, request: &TensorRequest<'_>) -> Result<Memory> {
        self.0(request)
    }
}

#[test]
fn an_allocator_is_asked_for_what_is_needed_and_the_innermost_is() {
    module();
    let asked = std::cell::RefCell::new(Vec::new());
    let outer = Does(|request: &TensorRequest<'_>| {
        asked.borrow_mut().push((request.device, request.bytes, request.dtype, request.shape.to_vec()));
        HostAllocator.allocate(request)
    });
    let inner = Does(|_: &TensorRequest<'_>| Err(FlashInferError::NotInitialized));
    runtime()
        .with_allocator(&outer, || {
            doubled().unwrap();
            let refused = runtime().with_allocator(&inner, doubled).unwrap();
            assert!(refused.is_err());
            doubled().unwrap();
        })
        .unwrap();
    let one = (Device::Cpu, 12, Some(DType::F32), vec![3]);
    assert_eq!(*asked.borrow(), [one.clone(), one]);
}

#[test]
fn an_allocator_that_fails_or_panics_is_an_error_in_the_function() {
    module();
    let with =
        |allocator: &dyn TensorAllocator| raised(runtime().with_allocator(allocator, doubled).unwrap().unwrap_err());
    let (kind, message) = with(&Does(|_: &TensorRequest<'_>| Err(FlashInferError::NotInitialized)));
    assert!(kind == "RuntimeError" && message.contains("not initialized"), "{kind}: {message}");
    let (kind, message) = with(&Does(|_: &TensorRequest<'_>| panic!("on purpose")));
    assert!(kind == "InternalError" && message.contains("panicked"), "{kind}: {message}");
    let refused = |device, ndim, size| {
        let args = [Arg::int(device), Arg::int(ndim), Arg::int(size)];
        raised(runtime().with_allocator(&HostAllocator, || call("allocate", &args)).unwrap().unwrap_err()).1
    };
    assert!(refused(2, 1, 4).contains("HostAllocator"));
    assert!(refused(10, 1, 4).contains("device type 10"));
    assert!(refused(1, 7, 1).contains("7 dimensions"));
    assert!(refused(1, 2, -1).contains("not negative"));
    assert!(refused(1, 3, i64::MAX).contains("fit memory"));
    assert!(refused(1, 1, 1 << 58).contains("as much as the host has"));
}

#[test]
fn memory_that_was_made_for_another_request_serves_where_it_is_large_enough_and_not_elsewhere() {
    module();
    let allocated = |allocator: &dyn TensorAllocator, device: i64, size: i64| {
        let args = [Arg::int(device), Arg::int(1), Arg::int(size)];
        runtime().with_allocator(allocator, || call("allocate", &args)).unwrap()
    };
    let changed = |change: fn(&mut TensorRequest<'_>)| {
        Does(move |request: &TensorRequest<'_>| {
            let mut other = *request;
            change(&mut other);
            HostAllocator.allocate(&other)
        })
    };
    let (kind, message) = raised(allocated(&changed(|request| request.bytes = 1), 1, 1000).unwrap_err());
    assert!(kind == "ValueError" && message.contains("1 bytes on cpu") && message.contains("4000 bytes"), "{message}");
    let (_, message) = raised(allocated(&changed(|request| request.device = Device::Cpu), 2, 1).unwrap_err());
    assert!(message.contains("on cpu") && message.contains("4 bytes on cuda:0"), "{message}");
    let kept = std::cell::RefCell::new(None);
    let later = Does(|request: &TensorRequest<'_>| match kept.take() {
        Some(memory) => Ok(memory),
        None => {
            kept.replace(Some(HostAllocator.allocate(request)?));
            HostAllocator.allocate(request)
        }
    });
    for size in [100, 101, 100, 99] {
        let tensor = allocated(&later, 1, size);
        assert_eq!(tensor.is_ok(), size != 101, "{size}");
    }
}

#[test]
fn a_tensor_of_an_allocator_keeps_its_memory_and_gives_it_back_once() {
    module();
    let drops = Arc::new(AtomicUsize::new(0));
    let allocator = Does(|request: &TensorRequest<'_>| {
        let memory: Box<[f32]> = vec![0f32; request.bytes / 4].into();
        let data = memory.as_ptr().cast_mut().cast();
        // SAFETY: fresh memory of that size.
        Ok(unsafe { Memory::new(request, data, (memory, Counted(Arc::clone(&drops)))) })
    });
    let tensor = runtime().with_allocator(&allocator, doubled).unwrap().unwrap();
    assert_eq!((tensor.as_slice::<f32>().unwrap(), drops.load(Ordering::SeqCst)), (&[2f32, 4., 6.][..], 0));
    drop(tensor);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

// Counts.

/// A million of each: built, read, passed through a function, cloned and dropped.
#[test]
fn a_million_of_each_kind_leave_nothing_behind() {
    native::isolated("a_million_of_each_kind_leave_nothing_behind", || {
        module();
        let echo = module().function("echo").unwrap();
        let [kept, shape] =
            [Any::str("a text that is an object").unwrap(), Shape::new(&[1]).unwrap().into_any().unwrap()];
        let args = [kept.as_arg(), shape.as_arg(), Arg::int(1), Arg::NONE];
        let host: Tensor = Tensor::zeros(DType::F32, &[4]).unwrap();
        type Make<'a> = Box<dyn Fn(usize) + 'a>;
        let through = |any: Any| {
            // SAFETY: the fixture's functions check what they take.
            let back = unsafe { echo.call_any(&[any.as_arg()]) }.unwrap();
            drop(back.clone());
            drop(any);
            back
        };
        let kinds: HashMap<&str, Make<'_>> = HashMap::from([
            (
                "string",
                Box::new(|_| drop(through(Any::str("a text that is an object").unwrap()).to::<String>())) as Make<'_>,
            ),
            ("bytes", Box::new(|_| drop(through(Any::bytes(&[7; 20]).unwrap()).to::<Vec<u8>>()))),
            (
                "array",
                Box::new(|_| {
                    assert_eq!(through(Array::new(&args).unwrap().into()).to::<Array>().unwrap().iter().len(), 4)
                }),
            ),
            ("map", Box::new(|_| drop(through(Map::new(&args).unwrap().into())))),
            ("shape", Box::new(|_| drop(through(Shape::new(&[1, 2]).unwrap().into()).into_value()))),
            ("error", Box::new(|_| drop(through(Error::new("ValueError", "a message").unwrap().into()).into_value()))),
            (
                "tensor",
                Box::new(|i| {
                    let tensor = Tensor::from_vec(vec![i as f32; 4], &[4]).unwrap();
                    assert_eq!(through(tensor.into()).to::<Tensor>().unwrap().as_slice::<f32>().unwrap()[0], i as f32);
                }),
            ),
            (
                "dlpack",
                Box::new(|_| {
                    let managed = host.to_dlpack().unwrap();
                    drop(Tensor::from_dlpack(managed).unwrap());
                    drop(Tensor::from_dlpack_unversioned(host.to_dlpack_unversioned().unwrap()).unwrap());
                }),
            ),
            (
                "function",
                Box::new(|i| {
                    let func = Func::new(move |_| Ok((i as i64).into())).unwrap();
                    let func = through(func.into()).to::<Func>().unwrap();
                    // SAFETY: the test's own function.
                    assert_eq!(unsafe { func.typed::<(), i64>().call(()) }.unwrap(), i as i64);
                }),
            ),
            (
                "raised",
                Box::new(|_| {
                    static FAILS: OnceLock<Func> = OnceLock::new();
                    let func = FAILS.get_or_init(|| Func::new(|_| Err(FlashInferError::NotInitialized)).unwrap());
                    // SAFETY: the test's own function.
                    unsafe { func.call(&[]) }.unwrap_err();
                }),
            ),
            ("global", Box::new(|_| drop(Func::global("ffi.Array").unwrap().unwrap()))),
            ("allocated", Box::new(|_| drop(runtime().with_allocator(&HostAllocator, doubled).unwrap().unwrap()))),
        ]);
        for (kind, make) in &kinds {
            (0..10_000).for_each(make);
            let before = native::resident();
            (0..1_000_000).for_each(make);
            let grown = native::resident() - before;
            // The least of them is 24 bytes.
            assert!(grown < 4 << 20, "a million of {kind}: memory grew by {grown} bytes");
        }
        let references = |any: &Any| any.clone().to::<Object>().unwrap().references() - 1;
        assert_eq!((references(&kept), references(&shape), host.as_object().references()), (1, 1, 1));
    });
}
