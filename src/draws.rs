//! The kernels of a captured graph that draw random numbers: found by what stands in their place, and set before each launch.
//!
//! Seed and offset are arguments by value, which CUDA copies into the graph. It can be asked for a kernel's arguments, and for
//! where each lies, and an executable graph can be given others for the launches to come.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;

use cudarc::driver::DriverError;
use cudarc::driver::sys::{
    self, CUDA_KERNEL_NODE_PARAMS, CUgraph, CUgraphExec, CUgraphNode, CUgraphNodeType, CUresult,
};

use crate::error::{FlashInferError, Result, driver};
use crate::philox::{Drawn, MARKED};

/// A kernel whose seed and offset are set.
pub(crate) struct Draw {
    /// Which of the graph's sources it draws from, and how far it moves that one on.
    pub(crate) source: usize,
    pub(crate) count: u64,
    node: CUgraphNode,
    /// All that CUDA knows of the kernel's launch. Its arguments point into `values`.
    params: CUDA_KERNEL_NODE_PARAMS,
    /// Each argument, in memory of its own that is aligned for any.
    values: Vec<Box<[u128]>>,
    _pointers: Box<[*mut c_void]>,
    /// Which argument is the seed; the offset is the next.
    seed: usize,
}

/// The kernels that draw, in the order of their draws, of a graph whose sources' draws these were.
///
/// # Errors
/// [`Graph`](FlashInferError::Graph) where a draw's kernel is not in the graph: its call was refused and the capture went on.
pub(crate) fn find(graph: CUgraph, drawn: Vec<Vec<Drawn>>) -> Result<Vec<Draw>> {
    let mut draws = Vec::new();
    if drawn.iter().all(Vec::is_empty) {
        return Ok(draws);
    }
    let failed = driver("looking for a graph's sampling kernels");
    let mut kernels = kernels(graph).map_err(failed)?;
    for (source, drawn) in drawn.into_iter().enumerate() {
        for Drawn { mark, count } in drawn {
            let Some(at) = kernels.iter().position(|kernel| kernel.mark == mark) else {
                return Err(FlashInferError::Graph {
                    problem: "a sampling call was refused in the capture, which went on without it".to_owned(),
                    remedy: "answer the call's error in the closure",
                });
            };
            let Kernel { node, params, values, pointers, seed, .. } = kernels.swap_remove(at);
            draws.push(Draw { source, count, node, params, values, _pointers: pointers, seed });
        }
    }
    Ok(draws)
}

impl Draw {
    /// Gives the kernel other numbers, for the launches to come of the graph that was made of the one that it was found in.
    ///
    /// # Safety
    /// The executable must be live, and of that graph, which is live too.
    pub(crate) unsafe fn set(&mut self, executable: CUgraphExec, seed: u64, offset: u64) -> Result<()> {
        // Whose first bytes, on the machines that this is for, are the number.
        self.values[self.seed][0] = seed.into();
        self.values[self.seed + 1][0] = offset.into();
        // SAFETY: the caller's promise; the parameters are those of the node, with arguments of the same sizes.
        let code = unsafe { sys::cuGraphExecKernelNodeSetParams_v2(executable, self.node, &self.params) };
        code.result().map_err(driver("cuGraphExecKernelNodeSetParams"))
    }
}

/// A kernel of a graph with a mark among its arguments.
struct Kernel {
    node: CUgraphNode,
    params: CUDA_KERNEL_NODE_PARAMS,
    values: Vec<Box<[u128]>>,
    pointers: Box<[*mut c_void]>,
    seed: usize,
    mark: u64,
}

/// All kernels with a mark among their arguments.
fn kernels(graph: CUgraph) -> std::result::Result<Vec<Kernel>, DriverError> {
    let mut count = 0;
    // SAFETY: the graph is live; without a place for the nodes only their number is answered.
    unsafe { sys::cuGraphGetNodes(graph, ptr::null_mut(), &mut count) }.result()?;
    let mut nodes: Vec<CUgraphNode> = vec![ptr::null_mut(); count];
    // SAFETY: there is a place for each.
    unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }.result()?;
    let mut found = Vec::new();
    for node in nodes {
        let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: a node of a live graph; one number is written.
        unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.result()?;
        if kind == CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL {
            found.extend(marked(node)?);
        }
    }
    Ok(found)
}

fn marked(node: CUgraphNode) -> std::result::Result<Option<Kernel>, DriverError> {
    let mut params = MaybeUninit::<CUDA_KERNEL_NODE_PARAMS>::zeroed();
    // SAFETY: a kernel's node of a live graph; the parameters are written.
    unsafe { sys::cuGraphKernelNodeGetParams_v2(node, params.as_mut_ptr()) }.result()?;
    // SAFETY: they were written, and zeros are parameters too.
    let mut params = unsafe { params.assume_init() };
    if params.kernelParams.is_null() {
        return Ok(None);
    }
    let (mut values, mut sizes, mut mark) = (Vec::<Box<[u128]>>::new(), Vec::new(), None);
    while let Some(size) = size_of_argument(&params, values.len())? {
        let mut value = vec![0u128; size.div_ceil(size_of::<u128>()).max(1)].into_boxed_slice();
        // SAFETY: CUDA answers a pointer to each argument, of the size that it says, valid as long as the node is.
        unsafe {
            let from = *params.kernelParams.add(values.len());
            ptr::copy_nonoverlapping(from.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), size);
        }
        let number = |value: &[u128]| value[0] as u64;
        let behind_seed = sizes.last() == Some(&size) && values.last().is_some_and(|last| number(last) == MARKED);
        if size == size_of::<u64>() && behind_seed {
            mark = Some((values.len() - 1, number(&value)));
        }
        sizes.push(size);
        values.push(value);
    }
    let Some((seed, mark)) = mark else { return Ok(None) };
    let mut pointers: Box<[*mut c_void]> = values.iter_mut().map(|value| value.as_mut_ptr().cast()).collect();
    params.kernelParams = pointers.as_mut_ptr();
    Ok(Some(Kernel { node, params, values, pointers, seed, mark }))
}

/// The size of a kernel's argument in bytes; `None` behind the last.
fn size_of_argument(params: &CUDA_KERNEL_NODE_PARAMS, i: usize) -> std::result::Result<Option<usize>, DriverError> {
    let (mut offset, mut size) = (0, 0);
    // SAFETY: a kernel's node names its kernel by one of both; two numbers are written.
    let code = unsafe {
        match params.func.is_null() {
            true => sys::cuKernelGetParamInfo(params.kern, i, &mut offset, &mut size),
            false => sys::cuFuncGetParamInfo(params.func, i, &mut offset, &mut size),
        }
    };
    match code {
        CUresult::CUDA_ERROR_INVALID_VALUE => Ok(None),
        code => code.result().map(|()| Some(size)),
    }
}
