//! The ABI layer through the real libtvm_ffi.so, a small module in C, and the real norm.so.

#[path = "support/native.rs"]
mod native;

use std::ffi::c_void;
use std::sync::OnceLock;

use flashinfer_rs::{
    Arg, DType, Device, FlashInferError, FlashInferRuntime, Module, Object, RuntimeConfig, Stream, TensorMut,
    TensorRef, Value,
};

/// The fixture, in a process that has a stand-in for libcudart.so.13 with two GPUs.
fn module() -> &'static Module {
    static MODULE: OnceLock<Module> = OnceLock::new();
    MODULE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        native::load(&native::compile("cudart.c", "libcudart.so.13", &[], folder.path()), false);
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        let path = native::compile("module.c", "fixture.so", &[], folder.path());
        // SAFETY: the test's own module, without initializers.
        unsafe { runtime.load_module(path) }.unwrap()
    })
}

fn call(name: &str, args: &[Arg<'_>]) -> flashinfer_rs::Result<Value> {
    let function = module().function(name)?;
    // SAFETY: the fixture's functions check what they take.
    unsafe { function.call(args) }
}

fn int(name: &str, args: &[Arg<'_>]) -> i64 {
    match call(name, args).unwrap() {
        Value::Int(value) => value,
        other => panic!("{other:?}"),
    }
}

#[test]
fn plain_results_are_decoded() {
    assert!(matches!(call("none", &[]).unwrap(), Value::None));
    assert!(matches!(call("answer", &[]).unwrap(), Value::Int(42)));
    assert!(matches!(call("yes", &[]).unwrap(), Value::Bool(true)));
    assert!(matches!(call("half", &[]).unwrap(), Value::Float(x) if x == 0.5));
}

#[test]
fn strings_and_bytes_are_decoded_inline_or_as_objects() {
    let text = |name| match call(name, &[]).unwrap() {
        Value::Str(text) => text,
        other => panic!("{other:?}"),
    };
    assert_eq!(text("short_text"), "short");
    assert_eq!(text("long_text"), "a text that does not fit into eight bytes");
    let bytes = |name| match call(name, &[]).unwrap() {
        Value::Bytes(bytes) => bytes,
        other => panic!("{other:?}"),
    };
    assert_eq!(bytes("short_bytes"), [0, 1, 2]);
    assert_eq!(bytes("long_bytes"), b"\0more bytes than fit inline\xff");
}

#[test]
fn arguments_arrive_as_what_they_are() {
    assert_eq!(int("echo", &[Arg::int(i64::MIN)]), i64::MIN);
    assert!(matches!(call("echo", &[Arg::bool(false)]).unwrap(), Value::Bool(false)));
    assert!(
        matches!(call("echo", &[Arg::float(-0.0)]).unwrap(), Value::Float(x) if x.to_bits() == (-0.0f64).to_bits())
    );
    assert!(matches!(call("echo", &[Arg::str(c"text")]).unwrap(), Value::Str(text) if text == "text"));
    let pointer = 0x1234 as *mut c_void;
    assert!(matches!(call("echo", &[Arg::opaque(pointer)]).unwrap(), Value::OpaquePtr(p) if p == pointer));
    assert_eq!(int("length", &[Arg::str(c"seven!!")]), 7);
    assert_eq!(int("count_none", &[Arg::NONE, Arg::int(0), Arg::NONE]), 2);
}

#[test]
fn tensors_arrive_with_their_shape_and_strides() {
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let whole = TensorRef::from_slice(&values, &[3, 4]).unwrap();
    assert!(matches!(call("sum", &[Arg::tensor(&whole.pack())]).unwrap(), Value::Float(sum) if sum == 66.0));
    // SAFETY: the first two columns of the same three rows.
    let part = unsafe {
        TensorRef::from_raw(values.as_ptr().cast(), Device::Cpu, DType::F32, &[3, 2], Some(&[4, 1])).unwrap()
    };
    assert!(matches!(call("sum", &[Arg::tensor(&part.pack())]).unwrap(), Value::Float(sum) if sum == 27.0));
    let mut more = [1f32; 4];
    let mut tensor = TensorMut::from_slice(&mut more, &[2, 2]).unwrap();
    assert!(matches!(call("sum", &[Arg::tensor(&tensor.pack())]).unwrap(), Value::Float(sum) if sum == 4.0));
}

#[test]
fn every_way_to_fail_is_an_error() {
    let fields = |name: &str| match call(name, &[]).unwrap_err() {
        FlashInferError::TvmFfiCall { function, kind, message, .. } => (function, kind, message),
        other => panic!("{other}"),
    };
    let (function, kind, message) = fields("fail");
    assert_eq!((function.as_str(), kind.as_str(), message.as_str()), ("fail", "ValueError", "this is what went wrong"));
    let (_, kind, message) = fields("fail_silently");
    assert_eq!((kind.as_str(), message.contains("-1")), ("MissingError", true));
    let (_, kind, message) = fields("fail_in_front");
    assert_eq!((kind.as_str(), message.contains("-2")), ("FrontendError", true));
    let (_, kind, message) = fields("fail_oddly");
    assert_eq!((kind.as_str(), message.contains('7')), ("MissingError", true));
}

#[test]
fn a_function_that_is_not_there_names_the_library_what_there_is_and_the_nearest() {
    let error = module().function("short_test").unwrap_err();
    let text = error.to_string();
    let FlashInferError::FunctionMissing { module: name, function, nearest, exported } = &error else {
        panic!("{error}")
    };
    assert_eq!(
        (name.as_str(), function.as_str(), nearest.as_deref()),
        ("fixture.so", "short_test", Some("short_text"))
    );
    assert!(exported.is_sorted() && exported.contains(&"long_bytes".to_owned()), "{exported:?}");
    assert!(
        ["fixture.so", "short_test", "did you mean short_text?", "long_bytes"].iter().all(|part| text.contains(part))
    );
    for name in ["no\0thing", "", "an entirely different and much longer name"] {
        let error = module().function(name).unwrap_err();
        assert!(matches!(error, FlashInferError::FunctionMissing { nearest: None, .. }), "{error}");
    }
}

/// The objects that the fixture made and that are not released yet. In a process of its own: other tests make some.
fn live() -> i64 {
    int("live_objects", &[])
}

fn object() -> Object {
    match call("object", &[]).unwrap() {
        Value::Object(object) => object,
        other => panic!("{other:?}"),
    }
}

#[test]
fn objects_are_released_once_whoever_holds_them() {
    native::isolated("objects_are_released_once_whoever_holds_them", || {
        let first = object();
        assert_eq!((first.type_index(), live()), (74, 1));
        let second = first.clone();
        drop(first);
        assert_eq!(live(), 1);
        let Value::Object(echoed) = call("echo", &[Arg::object(&second)]).unwrap() else { panic!() };
        drop(second);
        assert_eq!(live(), 1);
        drop(Value::Object(echoed).clone());
        assert_eq!(live(), 0);
    });
}

/// Resident memory, in bytes.
fn resident() -> i64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<i64>().unwrap() * 4096
}

#[test]
fn a_hundred_thousand_calls_and_ten_thousand_errors_leak_nothing() {
    native::isolated("a_hundred_thousand_calls_and_ten_thousand_errors_leak_nothing", || {
        let round = |calls: usize| {
            for i in 0..calls {
                drop(call("long_text", &[]).unwrap());
                drop(object());
                drop(call("echo", &[Arg::float(i as f64)]).unwrap());
                if i % 10 == 0 {
                    call("fail", &[]).unwrap_err();
                }
            }
        };
        round(10_000);
        let before = resident();
        round(100_000);
        let grown = resident() - before;
        assert_eq!(live(), 0);
        // 210,000 objects and errors of 32 bytes or more would be 6 MB.
        assert!(grown < 2 << 20, "memory grew by {grown} bytes");
    });
}

fn stream_of(device: i64) -> *mut c_void {
    match call("stream", &[Arg::int(device)]).unwrap() {
        Value::OpaquePtr(stream) => stream,
        other => panic!("{other:?}"),
    }
}

fn stream(address: usize) -> Stream<'static> {
    // SAFETY: no kernel is launched on it.
    unsafe { Stream::from_raw(address as *mut c_void) }
}

#[test]
fn a_stream_is_set_for_its_device_and_restored() {
    module();
    let runtime = FlashInferRuntime::global().unwrap();
    let before = stream_of(1);
    let inside = runtime.on((Device::Cuda(1), stream(0x10)), |_| {
        let nested = runtime.on((Device::Cuda(1), stream(0x20)), |_| stream_of(1) as usize).unwrap();
        (stream_of(1) as usize, nested, stream_of(0) as usize)
    });
    assert_eq!(inside.unwrap(), (0x10, 0x20, 0));
    assert_eq!(stream_of(1), before);
}

#[test]
fn a_stream_is_restored_after_errors_and_panics() {
    module();
    let runtime = FlashInferRuntime::global().unwrap();
    let failed = runtime.on((Device::Cuda(0), stream(0x10)), |_| call("fail", &[]).is_err());
    assert!(failed.unwrap());
    assert!(stream_of(0).is_null());
    let panicked = std::panic::catch_unwind(|| {
        runtime.on((Device::Cuda(0), stream(0x10)), |_| panic!("on purpose")).unwrap();
    });
    assert!(panicked.is_err());
    assert!(stream_of(0).is_null());
}

#[test]
fn a_device_that_does_not_exist_never_reaches_tvm_ffi() {
    module();
    let runtime = FlashInferRuntime::global().unwrap();
    for id in [2, 1000, u32::MAX] {
        let error = runtime.on((Device::Cuda(id), Stream::NULL), |_| ()).unwrap_err();
        let FlashInferError::DeviceOutOfRange { device, count } = error else { panic!("{error}") };
        assert_eq!((device, count), (i64::from(id), 2));
    }
    runtime.on((Device::Cpu, Stream::NULL), |_| ()).unwrap();
}
