//! Kernels of a decode step on the host.
