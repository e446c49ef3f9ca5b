//! What is run for long: `cargo xtask stress`, the long forms of the cache's tests, with 16 cold builds at once and 200
//! kills; and `stress` of the GPU bundle, the prefill in a graph under a watchdog.

#[cfg(feature = "bench")]
use crate::bundle::{Program, program};
use crate::shell;
use crate::vendoring::error::Result;

/// What looks for the hang that upstream reports; `run` leaves it out.
#[cfg(feature = "bench")]
pub const PREFILL: Program = program("test", "prefill_stress", "cudarc", "prefill_stress", 0);

/// Runs it. It watches over itself: no time limit here.
#[cfg(feature = "bench")]
pub const SCRIPT: &str = "#!/bin/sh
# Replays a prefill from a CUDA graph, in processes of their own under a watchdog: PROCESSES (20) of REPLAYS (300) replays
# each, in LIMIT (120) seconds. Fails for a process that hangs or computes something wrong.
here=$(cd \"$(dirname \"$0\")\" && pwd) || exit 1
export FLASHINFER_RS_LIB_DIR=\"$here/lib\" FLASHINFER_RS_RUN_GPU_TESTS=1 FLASHINFER_RS_STRESS=1
exec \"$here/bin/prefill_stress\"
";

/// tests/cache.rs and tests/prefill_stress.rs read it.
const STRESS: &str = "FLASHINFER_RS_STRESS";

pub fn command() -> Result<()> {
    shell::run(shell::cargo().args(["test", "--test", "cache", "--", "--nocapture"]).env(STRESS, "1"))
}
