//! Kernels of a decode step on a GPU.

fn main() {}
