//! A graph as data: tensors, and nodes in an order in which they can run.

use std::collections::HashMap;

use super::builder::{checked, keeps_row, sampled};
use super::error::{GraphError, GraphWarning};
use super::operation::{Given, Operation, Role};
use super::shape::{Columns, Dim, Spec, sizes};
use super::step::Pad;
use crate::error::Result;
use crate::tensor::{Device, Layout};

/// Where a tensor's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// A weight: memory of the caller's that is read alone.
    Weight,
    /// What outlives a step, a cache for example: memory of the caller's.
    State,
    /// What a step is given, with what stands in rows that nobody asked for.
    Input(Pad),
    /// Memory of the arena, for as long as the value is needed.
    Value,
}

impl Origin {
    /// What errors and exports call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::State => "state",
            Self::Input(_) => "step input",
            Self::Value => "value",
        }
    }
}

/// One tensor of a graph. Operations that overwrite a value leave the tensor and change what it holds.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Tensor {
    /// Its name, which no other tensor of the graph has.
    pub name: String,
    /// Its element type and shape.
    pub spec: Spec,
    /// Where its memory is.
    pub origin: Origin,
    /// Of a weight that is others one after the other along the first dimension: their names, and how many of its first
    /// dimension each has. Else empty.
    pub packed: Vec<(String, u64)>,
}

impl Tensor {
    /// Its names: its own, and those of weights that are packed into it.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.name).chain(self.packed.iter().map(|(name, _)| name)).map(String::as_str)
    }

    /// That a graph may have it, for batches of up to so many rows.
    pub(super) fn check(&self, largest: u64) -> Result<()> {
        let Self { name, spec, origin, packed } = self;
        let wrong = |argument, expected: String| -> Result<()> {
            let (op, found) = (format!("{} {name:?}", origin.name()), sizes(&spec.shape));
            Err(GraphError::ShapeMismatch { op, argument, found, expected }.into())
        };
        if spec.shape.is_empty() || spec.shape.len() > 4 {
            return wrong("shape", "one to four sizes".to_owned());
        }
        if spec.shape.iter().any(|dim| dim.parts().0 == 0) {
            return wrong("shape", "sizes above 0".to_owned());
        }
        if spec.bytes(largest) > MOST_BYTES {
            return wrong("shape", "at most 2^48 bytes".to_owned());
        }
        if *origin == Origin::Weight && spec.shape.iter().any(|dim| dim.constant().is_none()) {
            return wrong("shape", "constant sizes, since a weight is the same for every batch".to_owned());
        }
        let together = packed.iter().try_fold(0u64, |sum, part| sum.checked_add(part.1));
        if !packed.is_empty() && (*origin != Origin::Weight || spec.shape[0].constant() != together) {
            let expected = "a weight with as many of the first dimension as the parts have together";
            return wrong("parts", format!("{expected}, {together:?}"));
        }
        Ok(())
    }
}

/// A node's use of a tensor, for one operand of its operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The tensor, by its place in the graph.
    pub tensor: usize,
    /// The columns of it that are used; all of them, as they are, without.
    pub columns: Option<Columns>,
}

/// One operation on tensors.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Node {
    /// What is computed.
    pub operation: Operation,
    /// The tensors, one for each operand of the operation, in its order.
    pub accesses: Vec<Access>,
    /// The layer of the model that it belongs to, where it was said.
    pub layer: Option<u32>,
}

/// The most bytes that one tensor may have: more than any machine, and few enough that no sum or product of sizes
/// overflows.
const MOST_BYTES: u64 = 1 << 48;

/// Where graphs are to run, which decides what they are checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Target {
    /// A GPU: what the kernels take.
    #[default]
    Gpu,
    /// The host, in tests: what the references take, F32 and any sizes among it.
    Host,
}

/// A checked graph. It is made by a [`GraphBuilder`](super::GraphBuilder), by [fusing](super::fuse()) another or by
/// [reading](Graph::from_json) one, and never changes.
#[derive(Debug, Clone, PartialEq)]
pub struct Graph {
    pub(super) name: String,
    pub(super) target: Target,
    pub(super) largest: u64,
    pub(super) tensors: Vec<Tensor>,
    pub(super) nodes: Vec<Node>,
    pub(super) outputs: Vec<usize>,
}

impl Graph {
    /// The graph's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it was checked against.
    pub fn target(&self) -> Target {
        self.target
    }

    /// The most rows that a batch may have.
    pub fn largest_batch(&self) -> u64 {
        self.largest
    }

    /// The tensors. Their places in this list are how nodes name them.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The nodes, in an order in which they can run.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The tensors that are results, by their places.
    pub fn outputs(&self) -> &[usize] {
        &self.outputs
    }

    /// The place of a tensor.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName) for a name that no tensor of this kind has.
    pub fn find(&self, kind: &'static str, name: &str) -> Result<usize> {
        let of_kind = |i: &usize| match kind {
            "output" => self.outputs.contains(i),
            kind => self.tensors[*i].origin.name() == kind,
        };
        let found = (0..self.tensors.len()).filter(of_kind).find(|&i| self.tensors[i].name == name);
        found.ok_or_else(|| {
            let known: Vec<_> = (0..self.tensors.len()).filter(of_kind).map(|i| self.tensors[i].name.clone()).collect();
            GraphError::UnknownName { kind, name: name.to_owned(), known: known.join(", ") }.into()
        })
    }

    /// A node's name: its place, its layer and its operation.
    pub fn node_name(&self, node: usize) -> String {
        let Node { operation, layer, .. } = &self.nodes[node];
        match layer {
            Some(layer) => format!("node {node}, layer {layer}, {}", operation.name()),
            None => format!("node {node}, {}", operation.name()),
        }
    }

    /// What a node's operand is: the type and shape of the part that is used.
    pub(super) fn seen(&self, access: &Access) -> Spec {
        let spec = &self.tensors[access.tensor].spec;
        let Some(columns) = access.columns else { return spec.clone() };
        let rows = spec.shape.first().copied().unwrap_or(Dim::fixed(1));
        let shape = match columns.heads {
            0 => vec![rows, Dim::fixed(columns.width)],
            heads => vec![rows, Dim::fixed(heads), Dim::fixed(columns.width / heads)],
        };
        Spec::new(spec.dtype, shape)
    }

    /// The first element of a part, its sizes and its strides, for a batch.
    pub(super) fn laid_out(&self, access: &Access, batch: u64) -> (u64, Vec<i64>, Vec<i64>) {
        let size = |dim: &Dim| i64::try_from(dim.at(batch)).unwrap_or(i64::MAX);
        let shape: Vec<i64> = self.seen(access).shape.iter().map(size).collect();
        let whole = &self.tensors[access.tensor].spec.shape;
        let mut strides = vec![1i64; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i].saturating_mul(shape[i].max(1));
        }
        let Some(columns) = access.columns else { return (0, shape, strides) };
        strides[0] = whole[1..].iter().fold(1, |product: i64, dim| product.saturating_mul(size(dim)));
        (columns.start, shape, strides)
    }

    /// A part as a kernel's check sees it, at this address.
    pub(super) fn layout(&self, access: &Access, batch: u64, data: *mut u8, device: Device) -> Layout {
        let dtype = self.tensors[access.tensor].spec.dtype;
        let (first, shape, strides) = self.laid_out(access, batch);
        let data = data.wrapping_add((first as usize).wrapping_mul(dtype.size()));
        Layout::build(data.cast(), device, dtype, &shape, Some(&strides), None)
    }

    /// What a node's operation is told.
    pub(super) fn given(&self, node: &Node) -> Vec<Spec> {
        node.accesses.iter().map(|access| self.seen(access)).collect()
    }

    /// The bytes that a node moves at least, and the operations that it makes, for a batch.
    pub fn cost(&self, node: usize, batch: u64) -> Cost {
        let node = &self.nodes[node];
        let specs = self.given(node);
        let given = Given { operation: &node.operation, specs: &specs, batch };
        Cost { bytes: given.bytes(), flops: given.flops(), kernels: node.operation.facts().kernels }
    }

    /// Checks a graph that was not built operation by operation: rewritten, or read from a file.
    pub(super) fn check(&self) -> Result<()> {
        let mut written = vec![false; self.tensors.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            let (op, operands) = (self.node_name(i), node.operation.facts().operands);
            let wrong = |found: String, expected: &str| -> Result<()> {
                Err(GraphError::Json { at: op.clone(), found, expected: expected.to_owned() }.into())
            };
            if node.accesses.len() != operands.len() {
                return wrong(format!("{} operands", node.accesses.len()), &operands.len().to_string());
            }
            if let Some(access) = node.accesses.iter().find(|access| access.tensor >= self.tensors.len()) {
                return wrong(format!("tensor {}", access.tensor), "a tensor of the graph");
            }
            let made = checked(self, node, &op)?;
            let mut made = made.iter();
            for (access, operand) in node.accesses.iter().zip(operands) {
                let tensor = &self.tensors[access.tensor];
                match operand.role {
                    Role::Write => {
                        let fits = made.next() == Some(&tensor.spec) && access.columns.is_none();
                        if tensor.origin != Origin::Value || written[access.tensor] || !fits {
                            return wrong(
                                format!("{} {}", tensor.name, tensor.spec),
                                "a value of the result's own type and shape",
                            );
                        }
                    }
                    Role::Overwrite if tensor.origin == Origin::Weight => {
                        return wrong(
                            format!("weight {} overwritten", tensor.name),
                            "a value, a state or a step input",
                        );
                    }
                    Role::Overwrite | Role::Read => {
                        if tensor.origin == Origin::Value && !written[access.tensor] {
                            return wrong(
                                format!("{} before anything wrote it", tensor.name),
                                "a value that was computed",
                            );
                        }
                    }
                }
                written[access.tensor] |= operand.role.writes();
            }
            for batch in sampled(self) {
                keeps_row(self, node, &op, batch)?;
            }
        }
        // What nothing writes has no place in the arena, and none outside of it.
        if let Some(&output) = self.outputs.iter().find(|&&output| !written[output]) {
            let (at, found) =
                (format!("output {:?}", self.tensors[output].name), "a value that nothing writes".to_owned());
            return Err(GraphError::Json { at, found, expected: "one that a node writes".to_owned() }.into());
        }
        Ok(())
    }

    /// What is odd about the graph.
    pub fn warnings(&self) -> Vec<GraphWarning> {
        let mut warnings = Vec::new();
        let (mut read, mut written) = (vec![false; self.tensors.len()], vec![false; self.tensors.len()]);
        // For each value, the node that wrote it last, as long as nothing has read that.
        let mut unread: HashMap<usize, usize> = HashMap::new();
        let unused = |node: usize, tensor: usize| GraphWarning::UnusedValue {
            node: self.node_name(node),
            value: self.tensors[tensor].name.clone(),
        };
        for (i, node) in self.nodes.iter().enumerate() {
            for (access, operand) in node.accesses.iter().zip(node.operation.facts().operands) {
                if operand.role.reads() {
                    read[access.tensor] = true;
                    unread.remove(&access.tensor);
                }
            }
            for (access, operand) in node.accesses.iter().zip(node.operation.facts().operands) {
                if operand.role.writes() {
                    written[access.tensor] = true;
                    // An operation with two results has a reason of its own for the second.
                    let results = node.operation.facts().operands.iter().filter(|other| other.role.writes()).count();
                    if self.tensors[access.tensor].origin == Origin::Value && results == 1 {
                        unread.insert(access.tensor, i);
                    }
                }
            }
        }
        let mut left: Vec<_> = unread.into_iter().filter(|(tensor, _)| !self.outputs.contains(tensor)).collect();
        left.sort_unstable();
        warnings.extend(left.into_iter().map(|(tensor, node)| unused(node, tensor)));
        for (i, tensor) in self.tensors.iter().enumerate() {
            if tensor.origin == Origin::Value {
                continue;
            }
            if !read[i] && !written[i] {
                warnings.push(GraphWarning::Unused { kind: tensor.origin.name(), name: tensor.name.clone() });
            } else if tensor.origin == Origin::State && !written[i] {
                warnings.push(GraphWarning::UnwrittenState { name: tensor.name.clone() });
            }
        }
        warnings
    }

    /// Which earlier nodes each node must wait for: those that wrote what it reads, and those that used what it writes.
    pub(super) fn dependencies(&self) -> Vec<Vec<usize>> {
        let mut last_write: Vec<Option<usize>> = vec![None; self.tensors.len()];
        let mut readers: Vec<Vec<usize>> = vec![Vec::new(); self.tensors.len()];
        let mut all = Vec::with_capacity(self.nodes.len());
        for (i, node) in self.nodes.iter().enumerate() {
            let mut needs = Vec::new();
            for (access, operand) in node.accesses.iter().zip(node.operation.facts().operands) {
                needs.extend(last_write[access.tensor]);
                if operand.role.writes() {
                    needs.extend(readers[access.tensor].iter().copied());
                }
            }
            for (access, operand) in node.accesses.iter().zip(node.operation.facts().operands) {
                if operand.role.writes() {
                    last_write[access.tensor] = Some(i);
                    readers[access.tensor].clear();
                }
            }
            for (access, operand) in node.accesses.iter().zip(node.operation.facts().operands) {
                if operand.role == Role::Read && last_write[access.tensor] != Some(i) {
                    readers[access.tensor].push(i);
                }
            }
            needs.retain(|&other| other != i);
            needs.sort_unstable();
            needs.dedup();
            all.push(needs);
        }
        all
    }
}

/// What a node costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Cost {
    /// The bytes that it reads and writes at least.
    pub bytes: u64,
    /// Its floating-point operations, a multiplication and an addition counted as two.
    pub flops: u64,
    /// The kernels that it launches.
    pub kernels: u32,
}
