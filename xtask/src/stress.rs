//! `cargo xtask stress`: the long forms of the cache's tests, with 16 cold builds at once and 200 kills.

use crate::shell;
use crate::vendoring::error::Result;

/// tests/cache.rs reads it.
const STRESS: &str = "FLASHINFER_RS_STRESS";

pub fn command() -> Result<()> {
    shell::run(shell::cargo().args(["test", "--test", "cache", "--", "--nocapture"]).env(STRESS, "1"))
}
