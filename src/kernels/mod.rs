//! The kernels. A family is one file: its rows, and the functions that call them.
//!
//! The build finds the files of this folder, so a family needs to be named nowhere else.

use crate::contract::Row;
use crate::engine::Entry;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Every kernel's contract.
pub fn rows() -> Vec<&'static Row> {
    all().into_iter().map(|entry| entry.row).collect()
}

/// Every kernel.
pub(crate) fn all() -> Vec<Entry> {
    FAMILIES.iter().flat_map(|entries| entries()).collect()
}
