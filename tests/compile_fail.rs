//! What must not compile, each with the compiler's own words. After a change of the compiler, `TRYBUILD=overwrite cargo
//! test --features cudarc --test compile_fail` writes them anew.
#![cfg(feature = "cudarc")]

use flashinfer_rs::attention::{GraphPlan, Workspace};
use flashinfer_rs::kernels::gdn::GdnPrefillContext;
use flashinfer_rs::object::{Func, Shape, Tensor};
use flashinfer_rs::{DeviceCuSeqlens, FlashInferError, FlashInferRuntime, Function, Module, Preflight, RuntimeConfig};

#[test]
fn misuse_does_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}

#[cfg(feature = "compute")]
#[test]
fn misuse_of_a_graph_does_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail_compute/*.rs");
}

#[test]
fn what_is_shared_between_threads_can_be() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<FlashInferRuntime>();
    shared::<RuntimeConfig>();
    shared::<Module>();
    shared::<Function>();
    shared::<FlashInferError>();
    shared::<Func>();
    shared::<Tensor>();
    shared::<Shape>();
    shared::<Preflight>();
    sent::<GdnPrefillContext>();
    sent::<Workspace>();
    sent::<GraphPlan>();
    sent::<DeviceCuSeqlens>();
}
