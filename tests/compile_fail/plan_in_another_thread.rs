//! A plan stays on the thread that made it, as the tensors that it runs with do.
use flashinfer_rs::attention::{Batch, Workspace};

fn elsewhere(workspace: &mut Workspace, batch: &Batch) {
    let plan = workspace.plan(batch).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| plan.rows());
    });
}

fn main() {}
