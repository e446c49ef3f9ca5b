//! Products and attention by this crate's own kernels, with what is ahead of them and behind them: in one launch, or where a batch has
//! more rows in several.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::super::graph::{Access, Node, Origin};
use super::super::operation::{Given, OpKind, Operation, RowArgument, RowCall};
use super::super::shape::{Dim, Spec};
use super::model::{Model, unserved};
use crate::cublaslt::Addresses;
use crate::error::Result;
use crate::glue::attend::{Attend, Call, OfSizes, Sizes};
use crate::glue::gemv::Around;
use crate::matmul::{FusedMatMul, MatMul, MatMulSpec, Selections};
use crate::owner::{CurrentContext, Owner};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{Device, Layout, TensorMut, TensorRef};

/// How a product is computed.
#[derive(Debug)]
pub(super) enum Multiply {
    /// By itself.
    Plain(MatMul),
    /// With its norm, its gate or both in one kernel.
    Fused(FusedMatMul),
    /// The norm, the product and the gate by kernels of their own.
    Several(MatMul),
}

impl Multiply {
    /// Whether its kernel waits for the one ahead before it touches what a graph writes, so that it may start early, and lets others start.
    pub(super) fn waits(&self) -> bool {
        match self {
            Self::Plain(product) => product.waits(),
            Self::Fused(_) => true,
            Self::Several(_) => false,
        }
    }

    pub(super) fn workspace_bytes(&self) -> usize {
        match self {
            Self::Plain(product) | Self::Several(product) => product.workspace_bytes(),
            Self::Fused(_) => 0,
        }
    }
}

/// What is around an operation's product, as (the norm, the gate); nothing for one that is none or plain.
pub(super) fn around(operation: &Operation) -> Option<Around> {
    let eps = operation.parameter("eps") as f32;
    match operation.kind {
        OpKind::NormMatMul => Some(Around { eps: Some(eps), gated: false }),
        OpKind::MatMulSiluAndMul => Some(Around { eps: None, gated: true }),
        OpKind::NormMatMulSiluAndMul => Some(Around { eps: Some(eps), gated: true }),
        _ => None,
    }
}

/// Where the weight of such a product is among its operands.
pub(super) fn weight_of(around: Around) -> usize {
    1 + usize::from(around.eps.is_some())
}

pub(super) fn is_own_attention(kind: OpKind) -> bool {
    angles_of(kind).is_some()
}

/// Where the angles of such an attention are among its operands; behind them positions, lengths, the page table, caches and the result.
/// Nothing of another operation.
pub(super) fn angles_of(kind: OpKind) -> Option<usize> {
    match kind {
        OpKind::RopeAppendAttention => Some(3),
        OpKind::QkNormRopeAppendAttention => Some(5),
        _ => None,
    }
}

impl Model {
    /// How a product with something around it is computed for a plan, of which the specification is the whole product's.
    pub(super) fn choose_fused(
        &self,
        plan: usize,
        node: usize,
        (spec, around): (MatMulSpec, Around),
        stream: &Arc<CudaStream>,
        selections: &mut Selections,
    ) -> Result<Multiply> {
        let columns = if around.gated { spec.columns() / 2 } else { spec.columns() };
        let mut own =
            MatMulSpec::new(spec.dtype(), spec.rows(), columns, spec.inner())?.with_row_stride(spec.row_stride())?;
        if spec.out() != spec.dtype() {
            own = own.with_f32_out()?;
        }
        if self.begins_aligned(node)
            && let Some(fused) = FusedMatMul::new(&own, around, stream)?
        {
            return Ok(Multiply::Fused(fused));
        }
        for call in self.around_calls(plan, node, around).into_iter().flatten() {
            self.ready(node, call.entry)?;
        }
        // Normed rows lie one after the other.
        let spec = if around.eps.is_some() { spec.with_row_stride(spec.inner())? } else { spec };
        Ok(Multiply::Several(MatMul::new(spec, stream, selections)?))
    }

    /// Whether the rows of a product begin where the kernels of this crate's own can read them: what is columns of something larger may
    /// begin anywhere. A product by itself is asked when it is launched, and what is around one is not.
    pub(super) fn begins_aligned(&self, node: usize) -> bool {
        let Access { tensor, columns } = self.graph.nodes[node].accesses[0];
        let start = columns.map_or(0, |columns| columns.start);
        start.saturating_mul(self.graph.tensors[tensor].spec.dtype.size() as u64).is_multiple_of(16)
    }

    /// The calls of the norm ahead of a product and of the gate behind it.
    fn around_calls(&self, plan: usize, node: usize, around: Around) -> [Option<RowCall>; 2] {
        let (node, batch) = (&self.graph.nodes[node], self.plans[plan].batch);
        let specs = self.graph.given(node);
        let weight = weight_of(around);
        let call = |operation: Operation, specs: &[Spec]| Given { operation: &operation, specs, batch }.call();
        let norm = around.eps.and_then(|_| {
            let operation = Operation::new(OpKind::RmsNorm, &[node.operation.parameter("eps"), 0.0]);
            call(operation, &[specs[0].clone(), specs[1].clone(), specs[0].clone()])
        });
        let gate = around.gated.then(|| {
            let both = Spec::new(specs[0].dtype, [specs[0].shape[0], specs[weight].shape[0]]);
            call(Operation::new(OpKind::SiluAndMul, &[]), &[both, specs[weight + 1].clone()])
        });
        [norm, gate.flatten()]
    }

    /// # Safety
    /// As for [`launch`](Self::launch).
    pub(super) unsafe fn multiply_around(
        &self,
        plan: usize,
        node: usize,
        around: Around,
        stream: Stream<'_>,
        early: bool,
    ) -> Result<()> {
        let accesses = &self.graph.nodes[node].accesses;
        let weight = weight_of(around);
        let layouts: Vec<Layout> = accesses.iter().map(|access| self.layout(plan, access)).collect();
        let (x, out) = (&layouts[0], &layouts[weight + 1]);
        let product = match self.product(plan, node) {
            Multiply::Fused(fused) => {
                let at = Addresses {
                    x: x.data().cast_const(),
                    weight: layouts[weight].data().cast_const(),
                    bias: std::ptr::null(),
                    out: out.data(),
                    workspace: std::ptr::null_mut(),
                };
                // Of one row it is not looked at.
                let norm = layouts[1].data().cast_const();
                // SAFETY: the caller's promise, and the plan's proof: what is written is nothing else that is needed, and no node writes
                // the weights, where it starts early.
                return unsafe { fused.launch(&at, norm, stream, early) };
            }
            Multiply::Several(product) | Multiply::Plain(product) => product,
        };
        let spec = product.spec();
        let (rows, columns, inner, dtype) = (spec.rows(), spec.columns(), spec.inner(), spec.dtype());
        let [norm, gate] = self.around_calls(plan, node, around);
        let Some(workspace) = self.plans[plan].workspace(node) else { return self.enough(plan, node, u64::MAX) };
        let scratch = |offset: u64, columns: i64| {
            let start = self.scratch(workspace.offset + offset);
            Layout::build(start.cast(), self.device, dtype, &[rows, columns], None, None)
        };
        let normed = scratch(0, inner);
        let Node { operation, .. } = &self.graph.nodes[node];
        let (specs, batch) = (self.graph.given(&self.graph.nodes[node]), self.plans[plan].batch);
        let behind = Given { operation, specs: &specs, batch }.normed_bytes(around.eps.is_some());
        let x = match &norm {
            Some(call) => {
                let layout = |argument| match argument {
                    RowArgument::Operand(0) => Some(self.layout(plan, &accesses[0])),
                    RowArgument::Operand(1) => Some(self.layout(plan, &accesses[1])),
                    RowArgument::Operand(_) => Some(scratch(0, inner)),
                    _ => None,
                };
                // SAFETY: the caller's promise; the scratch memory is this node's, as large as the operation said.
                unsafe { self.call(call, layout, stream, false) }?;
                normed
            }
            None => {
                let strides = [spec.row_stride(), 1];
                Layout::build(x.data(), self.device, dtype, &[rows, inner], Some(&strides), None)
            }
        };
        let result = if gate.is_some() {
            scratch(behind, columns)
        } else {
            Layout::build(out.data(), self.device, spec.out(), &[rows, columns], None, None)
        };
        // SAFETY: the caller's promise, as above; the workspace is for products alone.
        unsafe { self.run_product(product, x, self.layout(plan, &accesses[weight]), None, result, stream, false) }?;
        if let Some(call) = &gate {
            let layout = |argument| match argument {
                RowArgument::Operand(0) => Some(scratch(behind, columns)),
                RowArgument::Operand(_) => Some(self.layout(plan, &accesses[weight + 1])),
                _ => None,
            };
            // SAFETY: as above.
            unsafe { self.call(call, layout, stream, false) }?;
        }
        Ok(())
    }

    /// Queues a product by itself.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch), of tensors that are as the product's specification says.
    #[expect(clippy::too_many_arguments, reason = "a product's tensors")]
    pub(super) unsafe fn run_product(
        &self,
        product: &MatMul,
        x: Layout,
        weight: Layout,
        bias: Option<Layout>,
        out: Layout,
        stream: Stream<'_>,
        early: bool,
    ) -> Result<()> {
        let workspace = self.product_workspace();
        // SAFETY: the caller's promise, and the plan's proof: what is written is nothing else that is needed, and no node writes a
        // weight. The workspace is for products alone; those that have one start behind the end of the node ahead.
        unsafe {
            let read = |layout| TensorRef::from_layout(layout, Owner::NONE);
            let (x, weight, bias) = (read(x), read(weight), bias.map(read));
            let mut out = TensorMut::from_layout(out, Owner::NONE);
            let mut workspace = TensorMut::from_layout(workspace, Owner::NONE);
            let workspace = (product.workspace_bytes() > 0).then_some(&mut workspace);
            product.run_early(&mut out, &x, &weight, bias.as_ref(), workspace, stream, early)
        }
    }

    /// The kernel that appends and attends in one, for a plan.
    pub(super) fn choose_attention(&self, plan: usize, node: usize, stream: &Arc<CudaStream>) -> Result<Attend> {
        let runtime = FlashInferRuntime::global()?;
        let specs = self.graph.given(&self.graph.nodes[node]);
        let size = |operand: usize, at: usize| {
            specs[operand].shape.get(at).map_or(0, |dim: &Dim| dim.at(self.plans[plan].batch))
        };
        let sizes = Sizes {
            dtype: specs[0].dtype,
            rows: size(0, 0),
            q_heads: size(0, 1),
            kv_heads: size(1, 1),
            size: size(0, 2),
        };
        let device = runtime.checked_device(self.device)?;
        let shared_memory = runtime.limits(device as u32).map_or(0, |limits| limits.shared_memory);
        let Some(attend) = Attend::of(sizes, runtime.compute_capability(device)?, shared_memory) else {
            let reason = format!(
                "{} rows of {} heads of {}, {} of keys, where a block may have {shared_memory} bytes of shared memory, and the kernel is \
                 for up to 65535 rows and 8 heads for each of keys, of 64 or 128, on Hopper or newer",
                sizes.rows, sizes.q_heads, sizes.size, sizes.kv_heads
            );
            let remedy = "leave the rule out that makes this operation, and attention is a kernel of its own";
            return Err(unserved(&self.graph, node, reason, remedy));
        };
        let _current = CurrentContext::bind(stream.context())?;
        attend.prepare(runtime)?;
        Ok(attend)
    }

    /// Whether nothing ahead of a node, in the same step, writes what an attention of this crate's own reads but for queries, keys and
    /// values.
    pub(super) fn reads_early(&self, plan: usize, node: usize) -> bool {
        let order = &self.plans[plan].order;
        let ahead = order.iter().take_while(|other| **other != node);
        let mut written = vec![false; self.graph.tensors.len()];
        for &other in ahead {
            let other = &self.graph.nodes[other];
            for (access, operand) in other.accesses.iter().zip(other.operation.facts().operands) {
                written[access.tensor] |= operand.role.writes();
            }
        }
        let accesses = &self.graph.nodes[node].accesses;
        accesses[3..accesses.len() - 1]
            .iter()
            .all(|access| self.graph.tensors[access.tensor].origin != Origin::Value && !written[access.tensor])
    }

    /// # Safety
    /// As for [`launch`](Self::launch).
    pub(super) unsafe fn append_and_attend(
        &self,
        plan: usize,
        node: usize,
        attend: Attend,
        stream: Stream<'_>,
        early: bool,
    ) -> Result<()> {
        let Node { operation, accesses, .. } = &self.graph.nodes[node];
        let runtime = FlashInferRuntime::global()?;
        let layout = |access: &Access| self.layout(plan, access);
        let [q, k, v] = [0, 1, 2].map(|operand| layout(&accesses[operand]));
        let Some(angles) = angles_of(operation.kind) else { unreachable!("it is such an attention") };
        let of = |behind: usize| layout(&accesses[angles + behind]);
        let (cos_sin, positions, lengths, table, k_cache, v_cache) = (of(0), of(1), of(2), of(3), of(4), of(5));
        let normed = operation.kind == OpKind::QkNormRopeAppendAttention;
        let weight = |operand: usize| {
            if normed { layout(&accesses[operand]).data().cast_const() } else { std::ptr::null() }
        };
        let size = |layout: &Layout, at: usize| layout.size(at) as u32;
        let call = Call {
            q: q.data().cast_const(),
            k: k.data().cast_const(),
            v: v.data().cast_const(),
            q_weight: weight(3),
            k_weight: weight(4),
            cos_sin: cos_sin.data().cast_const(),
            positions: positions.data().cast_const(),
            lengths: lengths.data().cast_const(),
            page_table: table.data().cast_const(),
            k_cache: k_cache.data(),
            v_cache: v_cache.data(),
            out: self.data(plan, accesses[angles + 6].tensor).cast(),
            strides: [q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)],
            cos_sin_row: cos_sin.stride(0),
            table_row: table.stride(0),
            q_heads: size(&q, 1),
            kv_heads: size(&k, 1),
            rotary: size(&cos_sin, 1),
            angles: size(&cos_sin, 0),
            pages: size(&k_cache, 0),
            page_size: size(&k_cache, 1),
            // So that no number of tokens passes what the kernel counts by: positions and lengths end far ahead of it.
            width: size(&table, 1).min((1 << 31) / size(&k_cache, 1).max(1) + 1),
            eps: operation.parameter("eps") as f32,
            factor: (operation.parameter("scale") * std::f64::consts::LOG2_E) as f32,
            interleave: u32::from(operation.is_on("interleave")),
            early: u32::from(early && self.reads_early[plan][node]),
            of_sizes: OfSizes::default(),
        };
        let Device::Cuda(id) = self.device else { unreachable!("a run is on a GPU") };
        // SAFETY: the caller's promise, and the plan's proof: the result overlaps nothing that is needed, and caches lie in states of
        // their own. The kernel is the one for these sizes on this device, and prepared; it reads early only what no node ahead of it writes.
        let code = unsafe { attend.launch(runtime, call, stream.as_raw(), early) }?;
        runtime.launched(code, id as i32, stream)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::builder::GraphBuilder;
    use super::super::super::fuse::{Rule, fuse};
    use super::super::super::shape::Columns;
    use super::super::super::step::{Buckets, Pad};
    use super::super::inputs::Inputs;
    use super::super::replan::AttentionKernels;
    use super::*;
    use crate::tensor::DType;

    /// What lies between two attentions that append.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Between {
        Nothing,
        TheSameCaches,
        Advance,
    }

    /// Whether each attention of such a graph reads ahead of its wait.
    fn early(between: Between) -> Vec<bool> {
        let fixed = Dim::fixed;
        let mut g = GraphBuilder::new("twice", 4);
        let [mut ids, mut positions, mut lengths] = [("ids", 0), ("positions", 0), ("lengths", 1)]
            .map(|(name, pad)| g.input(name, DType::I32, [Dim::BATCH], Pad::Value(pad)).unwrap());
        let table = g.input("page_table", DType::I32, [Dim::BATCH, fixed(2)], Pad::Reserved(0)).unwrap();
        let embedding = g.weight("embedding", DType::BF16, [fixed(256), fixed(256)]).unwrap();
        let cos_sin = g.weight("cos_sin", DType::F32, [fixed(64), fixed(64)]).unwrap();
        let cache = [fixed(9), fixed(16), fixed(1), fixed(64)];
        let [mut k, mut v, mut other_k, mut other_v] =
            ["k", "v", "other k", "other v"].map(|name| g.state(name, DType::BF16, cache).unwrap());
        let parts = [Columns::new(0..128).heads(2), Columns::new(128..192).heads(1), Columns::new(192..256).heads(1)];
        for layer in 0..2 {
            let x = g.embedding(&ids, &embedding, 1.0).unwrap();
            let (k, v) = match (layer, between) {
                (1, Between::Nothing | Between::Advance) => (&mut other_k, &mut other_v),
                _ => (&mut k, &mut v),
            };
            let x = g.rope_append(x, parts, &cos_sin, (&positions, &table), (&mut *k, &mut *v), false).unwrap();
            let attended = g.decode_attention(x.columns(parts[0]), (k, v), &table, &lengths, 0.1).unwrap();
            let token = g.argmax(&attended).unwrap();
            if layer == 0 && between == Between::Advance {
                g.advance(&token, &mut ids, &mut positions, &mut lengths, 32).unwrap();
            }
            g.output(&format!("token {layer}"), token).unwrap();
        }
        let (graph, applied) = fuse(&g.finish().unwrap(), &[Rule::AppendAttention]).unwrap();
        assert_eq!(applied.len(), 2);
        let (inputs, buckets) = (Inputs::new(&graph, 4).unwrap(), Buckets::new(&[1, 4]).unwrap());
        let model = Model::new(&graph, &buckets, &inputs, Device::Cuda(0), AttentionKernels::default()).unwrap();
        let attention = |node: &usize| is_own_attention(graph.nodes[*node].operation.kind);
        (0..graph.nodes.len()).filter(attention).map(|node| model.reads_early(1, node)).collect()
    }

    #[test]
    fn attention_reads_ahead_of_its_wait_only_what_no_node_ahead_of_it_writes() {
        assert_eq!(early(Between::Nothing), [true, true]);
        assert_eq!(early(Between::TheSameCaches), [true, false]);
        assert_eq!(early(Between::Advance), [true, false]);
    }
}
