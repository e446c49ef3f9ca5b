//! The stream of a scope is set within it alone.
use flashinfer_rs::{Device, FlashInferRuntime, Stream};

fn escape(runtime: &'static FlashInferRuntime) -> Stream<'static> {
    runtime.on((Device::Cuda(0), Stream::NULL), |stream| stream).unwrap()
}

fn main() {}
