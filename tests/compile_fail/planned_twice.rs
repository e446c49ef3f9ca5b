//! A plan borrows its workspace: a second one would write over the lists that the first one runs by.
use flashinfer_rs::attention::{Batch, Workspace};

fn both(workspace: &mut Workspace, batch: &Batch) {
    let first = workspace.plan(batch).unwrap();
    let second = workspace.plan(batch).unwrap();
    assert_eq!(first.rows(), second.rows());
}

fn main() {}
