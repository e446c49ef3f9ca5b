//! Rewrites graphs by rules, each with a name, a precondition and what it does to the numbers. It happens before memory is
//! planned, on a graph whose order and lives are known, so that a rule sees all that it must know.

use super::builder::checked;
use super::graph::{Access, Graph, Node, Origin, Tensor};
use super::operation::{OpKind, Operation, Role};
use super::shape::{Columns, Dim, Spec};
use crate::error::Result;

/// What a rewrite does to the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Numerics {
    /// Every bit stays.
    BitExact,
    /// Something that was rounded between two operations no longer is.
    FewerRoundings,
    /// The same sums, which another kernel may make in another order.
    Reordered,
}

/// A rewrite of graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// Products of the same rows with several weights become one, with the weights one after the other: `q|k|v`,
    /// `gate|up`. Where every use of a result can be one of columns, and each weight has no other use.
    PackProducts,
    /// `silu(gate)` and `· up`, of the two halves of one value, become `silu_and_mul`. Where nothing else uses the halves.
    GatedActivation,
    /// `add` and the `rmsnorm` of the sum become `fused_add_rmsnorm`. Where what was added has no other use behind it.
    AddNorm,
    /// The norms of queries and keys, rotary embeddings and the append to the cache become one kernel; without norms
    /// the other two do. Where keys are used by the cache alone.
    QkNormRopeAppend,
    /// A product and its sum with a residual become one product onto the residual. Where the product has no other use.
    ResidualProduct,
    /// A product with both halves of a weight and `silu_and_mul` of them become one. Where the product has no other use.
    GatedProduct,
    /// An `rmsnorm` and the product of its result become one. In BF16, where the norm has no other use.
    NormProduct,
    /// What [`QkNormRopeAppend`](Self::QkNormRopeAppend) makes and the attention behind it become one kernel. Where the heads of queries
    /// have no other use, for heads of 64 or 128 and up to 8 of queries for each of keys.
    ///
    /// A row then sees what it appends itself, and not what others append in the same step: for graphs whose rows are sequences of their
    /// own, a decoder's steps, and not for prompts of which each token is a row. It is in [`STEP`](Self::STEP) and not in
    /// [`ALL`](Self::ALL); a run on a GPU refuses page tables by which a row would read a page that another appends to
    /// ([`SharedPage`](super::GraphError::SharedPage)).
    AppendAttention,
}

impl Rule {
    /// Every rule that goes with any graph, in the order in which they are best applied. What a rule ahead took is not there for one
    /// behind: sums go into products, and norms into the products behind them, so that [`AddNorm`](Self::AddNorm) has what is left.
    pub const ALL: [Self; 7] = [
        Self::PackProducts,
        Self::GatedActivation,
        Self::ResidualProduct,
        Self::GatedProduct,
        Self::NormProduct,
        Self::AddNorm,
        Self::QkNormRopeAppend,
    ];

    /// Every rule, for graphs whose rows are sequences of their own: as a decoder's steps are, and prompts are not.
    pub const STEP: [Self; 8] = [
        Self::PackProducts,
        Self::GatedActivation,
        Self::ResidualProduct,
        Self::GatedProduct,
        Self::NormProduct,
        Self::AddNorm,
        Self::QkNormRopeAppend,
        Self::AppendAttention,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PackProducts => "pack products",
            Self::GatedActivation => "gated activation",
            Self::AddNorm => "add and norm",
            Self::QkNormRopeAppend => "q/k norm, rope and append",
            Self::ResidualProduct => "residual product",
            Self::GatedProduct => "gated product",
            Self::NormProduct => "norm and product",
            Self::AppendAttention => "append and attention",
        }
    }

    /// What it does to the numbers at the most; what an application did is [`Applied::numerics`].
    pub const fn numerics(self) -> Numerics {
        match self {
            Self::PackProducts | Self::NormProduct | Self::AppendAttention => Numerics::Reordered,
            Self::GatedActivation
            | Self::AddNorm
            | Self::QkNormRopeAppend
            | Self::ResidualProduct
            | Self::GatedProduct => Numerics::FewerRoundings,
        }
    }
}

/// That a rule was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Applied {
    /// The rule.
    pub rule: Rule,
    /// The nodes that it took, by their names in the graph that was to be fused.
    pub nodes: Vec<String>,
    /// What it did to the numbers.
    pub numerics: Numerics,
}

/// Rewrites a graph by these rules, one after the other, and says what was applied where. A graph that no rule fits
/// comes back as it was.
///
/// # Errors
/// None but for a slip of a rule, whose graph is checked anew.
pub fn fuse(graph: &Graph, rules: &[Rule]) -> Result<(Graph, Vec<Applied>)> {
    let mut work = Work { graph: graph.clone(), removed: vec![false; graph.nodes.len()] };
    let mut applied = Vec::new();
    for &rule in rules {
        for node in 0..work.graph.nodes.len() {
            if work.removed[node] {
                continue;
            }
            let taken = match rule {
                Rule::PackProducts => work.pack_products(node),
                Rule::GatedActivation => work.gated_activation(node),
                Rule::AddNorm => work.add_norm(node),
                Rule::QkNormRopeAppend => work.turned_append(node),
                Rule::ResidualProduct => work.residual_product(node),
                Rule::GatedProduct => work.gated_product(node),
                Rule::NormProduct => work.norm_product(node),
                Rule::AppendAttention => work.append_attention(node),
            };
            if let Some(taken) = taken {
                // Turned keys were rounded when they were appended, as they are now.
                let exact = taken.iter().any(|&node| work.is(node, OpKind::RopeAppend));
                let numerics = if exact { Numerics::BitExact } else { rule.numerics() };
                let nodes = taken.into_iter().map(|node| graph.node_name(node)).collect();
                applied.push(Applied { rule, nodes, numerics });
            }
        }
    }
    let graph = work.compact();
    graph.check()?;
    Ok((graph, applied))
}

/// A graph that is being rewritten: nodes keep their places, and those that are gone are only marked.
struct Work {
    graph: Graph,
    removed: Vec<bool>,
}

/// A use of a tensor: the node, the operand.
type Use = (usize, usize);

impl Work {
    fn node(&self, i: usize) -> &Node {
        &self.graph.nodes[i]
    }

    fn is(&self, i: usize, kind: OpKind) -> bool {
        !self.removed[i] && self.node(i).operation.kind == kind
    }

    fn role(&self, (node, operand): Use) -> Role {
        self.node(node).operation.facts().operands[operand].role
    }

    fn access(&self, (node, operand): Use) -> Access {
        self.node(node).accesses[operand]
    }

    /// The uses of a tensor, in order.
    fn uses(&self, tensor: usize) -> Vec<Use> {
        let nodes = self.graph.nodes.iter().enumerate().filter(|(i, _)| !self.removed[*i]);
        let of = |(i, node): (usize, &Node)| {
            let at: Vec<Use> =
                (0..node.accesses.len()).filter(|&o| node.accesses[o].tensor == tensor).map(|o| (i, o)).collect();
            at
        };
        nodes.flat_map(of).collect()
    }

    /// Whether all that a node reads is behind it, ahead of another, what it was: that other may read it in its place.
    fn reads_later(&self, node: usize, before: usize) -> bool {
        let operands = self.node(node).operation.facts().operands;
        let mut read = self.node(node).accesses.iter().zip(operands).filter(|(_, operand)| operand.role.reads());
        read.all(|(access, _)| self.untouched(access.tensor, node, before))
    }

    /// Whether nothing writes a tensor behind one node and ahead of another.
    fn untouched(&self, tensor: usize, after: usize, before: usize) -> bool {
        !self.uses(tensor).into_iter().any(|used| used.0 > after && used.0 < before && self.role(used).writes())
    }

    fn is_plain_value(&self, tensor: usize) -> bool {
        self.graph.tensors[tensor].origin == Origin::Value && !self.graph.outputs.contains(&tensor)
    }

    /// Whether a node would be one that the builder takes.
    fn takes(&self, node: &Node) -> bool {
        checked(&self.graph, node, "").is_ok()
    }

    /// Lets later uses of one tensor be of another.
    fn redirect(&mut self, behind: usize, from: usize, to: usize) {
        for (i, node) in self.graph.nodes.iter_mut().enumerate().skip(behind + 1) {
            if !self.removed[i] {
                node.accesses.iter_mut().filter(|access| access.tensor == from).for_each(|access| access.tensor = to);
            }
        }
    }

    fn pack_products(&mut self, first: usize) -> Option<Vec<usize>> {
        let kind = self.node(first).operation.kind;
        if !matches!(kind, OpKind::MatMul | OpKind::MatMulBias) {
            return None;
        }
        let (x, operation) = (self.node(first).accesses[0], self.node(first).operation.clone());
        let same = |&other: &usize| {
            let node = self.node(other);
            !self.removed[other]
                && node.operation == operation
                && node.accesses[0] == x
                && node.layer == self.node(first).layer
                && (other == first || self.untouched(x.tensor, first, other))
                && self.is_packable(other)
        };
        // Near by: the products of one layer.
        let group: Vec<usize> = (first..self.graph.nodes.len().min(first + 12)).filter(same).collect();
        if group.len() < 2 || group[0] != first {
            return None;
        }
        let out = self.node(first).accesses.len() - 1;
        let (mut start, mut moved) = (0, Vec::new());
        for &node in &group {
            let own = self.node(node).accesses[out].tensor;
            let width = self.graph.tensors[own].spec.shape[1].constant()?;
            moved.push((own, start, width));
            start += width;
        }
        let rows = self.graph.tensors[moved[0].0].spec.shape[0];
        let dtype = self.graph.tensors[moved[0].0].spec.dtype;
        let mut accesses = vec![x];
        for operand in 1..out {
            accesses.push(Access { tensor: self.pack_weights(&group, operand), columns: None });
        }
        let names: Vec<_> = moved.iter().map(|(own, ..)| self.graph.tensors[*own].name.clone()).collect();
        let packed = self.add_tensor(names.join("|"), Spec::new(dtype, [rows, Dim::fixed(start)]), Vec::new());
        accesses.push(Access { tensor: packed, columns: None });
        self.graph.nodes[first].accesses = accesses;
        group[1..].iter().for_each(|&node| self.removed[node] = true);
        for (i, node) in self.graph.nodes.iter_mut().enumerate() {
            for access in node.accesses.iter_mut().filter(|_| !self.removed[i]) {
                let Some((_, start, width)) = moved.iter().find(|(own, ..)| *own == access.tensor) else { continue };
                let own = access.columns.unwrap_or(Columns { start: 0, width: *width, heads: 0 });
                *access = Access { tensor: packed, columns: Some(Columns { start: own.start + start, ..own }) };
            }
        }
        Some(group)
    }

    /// Whether a product's result may be columns of another's, and its weights be part of others.
    fn is_packable(&self, node: usize) -> bool {
        let accesses = &self.node(node).accesses;
        let (weights, result) = (&accesses[1..accesses.len() - 1], accesses[accesses.len() - 1].tensor);
        let strided =
            |&(user, operand): &Use| user == node || self.node(user).operation.facts().operands[operand].strided;
        self.is_plain_value(result)
            && self.uses(result).iter().all(strided)
            && weights.iter().all(|weight| {
                let tensor = &self.graph.tensors[weight.tensor];
                tensor.origin == Origin::Weight && tensor.packed.is_empty() && self.uses(weight.tensor).len() == 1
            })
    }

    fn pack_weights(&mut self, group: &[usize], operand: usize) -> usize {
        let parts: Vec<usize> = group.iter().map(|&node| self.node(node).accesses[operand].tensor).collect();
        let rows = |tensor: usize| self.graph.tensors[tensor].spec.shape[0].constant().unwrap_or(0);
        let mut spec = self.graph.tensors[parts[0]].spec.clone();
        spec.shape[0] = Dim::fixed(parts.iter().map(|&part| rows(part)).sum());
        let packed: Vec<_> = parts.iter().map(|&part| (self.graph.tensors[part].name.clone(), rows(part))).collect();
        let name = packed.iter().map(|part| part.0.as_str()).collect::<Vec<_>>().join("|");
        let tensor = self.add_tensor(name, spec, packed);
        self.graph.tensors[tensor].origin = Origin::Weight;
        tensor
    }

    fn add_tensor(&mut self, name: String, spec: Spec, packed: Vec<(String, u64)>) -> usize {
        self.graph.tensors.push(Tensor { name, spec, origin: Origin::Value, packed });
        self.graph.tensors.len() - 1
    }

    fn gated_activation(&mut self, silu: usize) -> Option<Vec<usize>> {
        if !self.is(silu, OpKind::Silu) {
            return None;
        }
        let gate = self.access((silu, 0));
        let columns = gate.columns.filter(|columns| columns.start == 0 && columns.heads == 0)?;
        let whole = &self.graph.tensors[gate.tensor].spec;
        let up = Columns { start: columns.width, ..columns };
        if whole.shape.get(1)?.constant() != Some(2 * columns.width) || !self.is_plain_value(gate.tensor) {
            return None;
        }
        let (dtype, rows) = (whole.dtype, whole.shape[0]);
        let later: Vec<Use> = self.uses(gate.tensor).into_iter().filter(|used| used.0 > silu).collect();
        let (mul, _) = *later.first()?;
        let product = self.is(mul, OpKind::Mul)
            && self.access((mul, 0)) == gate
            && self.access((mul, 1)) == Access { columns: Some(up), ..gate };
        if !product || later.iter().any(|&used| used.0 > mul && self.access(used) != gate) {
            return None;
        }
        let name = format!("{} gated", self.graph.tensors[gate.tensor].name);
        let out = self.add_tensor(name, Spec::new(dtype, [rows, Dim::fixed(columns.width)]), Vec::new());
        let whole = |tensor| Access { tensor, columns: None };
        let operation = Operation::new(OpKind::SiluAndMul, &[]);
        let fused = Node { operation, accesses: vec![whole(gate.tensor), whole(out)], layer: self.node(mul).layer };
        if !self.takes(&fused) {
            self.graph.tensors.pop();
            return None;
        }
        self.graph.nodes[mul] = fused;
        self.removed[silu] = true;
        for (i, node) in self.graph.nodes.iter_mut().enumerate().skip(mul + 1) {
            node.accesses.iter_mut().filter(|access| !self.removed[i] && **access == gate).for_each(|access| {
                *access = whole(out);
            });
        }
        Some(vec![silu, mul])
    }

    fn add_norm(&mut self, add: usize) -> Option<Vec<usize>> {
        if !self.is(add, OpKind::Add) {
            return None;
        }
        let (sum, added) = (self.access((add, 0)), self.access((add, 1)));
        if sum.columns.is_some() || added.columns.is_some() || !self.is_plain_value(added.tensor) {
            return None;
        }
        if self.graph.tensors[sum.tensor].origin != Origin::Value || self.uses(added.tensor).last()?.0 > add {
            return None;
        }
        let later = self.uses(sum.tensor).into_iter().filter(|used| used.0 > add);
        let norm = later
            .take_while(|&used| !self.role(used).writes())
            .find(|&used| self.is(used.0, OpKind::RmsNorm) && self.access(used).columns.is_none())?;
        let norm = norm.0;
        let (weight, out) = (self.access((norm, 1)), self.access((norm, 2)).tensor);
        if !self.is_plain_value(out) {
            return None;
        }
        let parameters = self.node(norm).operation.parameters.clone();
        let operation = Operation { kind: OpKind::FusedAddRmsNorm, parameters };
        let fused = Node { operation, accesses: vec![added, sum, weight], layer: self.node(norm).layer };
        if !self.takes(&fused) {
            return None;
        }
        self.graph.nodes[add] = fused;
        self.removed[norm] = true;
        self.redirect(add, out, added.tensor);
        Some(vec![add, norm])
    }

    fn residual_product(&mut self, add: usize) -> Option<Vec<usize>> {
        if !self.is(add, OpKind::Add) {
            return None;
        }
        let (a, b) = (self.access((add, 0)), self.access((add, 1)));
        if a.columns.is_some() || b.columns.is_some() {
            return None;
        }
        // The product is what is added, or what is added to and then changes its place.
        for (product, residual) in [(b, a), (a, b)] {
            let uses = self.uses(product.tensor);
            let &[(made, _), (second, _), ..] = &uses[..] else { continue };
            let renamed = product == a;
            let gone = renamed || uses.len() == 2;
            let residual_ends = !renamed || self.uses(residual.tensor).last().is_some_and(|last| last.0 == add);
            let value = self.graph.tensors[residual.tensor].origin == Origin::Value;
            let free = self.is_plain_value(product.tensor) && (!renamed || self.is_plain_value(residual.tensor));
            if !(self.is(made, OpKind::MatMul) && second == add && gone && residual_ends && value && free) {
                continue;
            }
            let (x, weight) = (self.access((made, 0)), self.access((made, 1)));
            if self.node(made).operation.is_on("f32_out") || !self.reads_later(made, add) {
                continue;
            }
            let operation = Operation::new(OpKind::MatMulAdd, &[]);
            let fused = Node { operation, accesses: vec![x, weight, residual], layer: self.node(made).layer };
            if !self.takes(&fused) {
                continue;
            }
            self.graph.nodes[add] = fused;
            self.removed[made] = true;
            if renamed {
                self.redirect(add, product.tensor, residual.tensor);
            }
            return Some(vec![made, add]);
        }
        None
    }

    /// What was made by one node and is used by one other alone, as a whole and of its own.
    fn only_use(&self, tensor: usize, made: usize) -> Option<Use> {
        match self.uses(tensor)[..] {
            [(maker, _), used] if maker == made && self.is_plain_value(tensor) => {
                self.access(used).columns.is_none().then_some(used)
            }
            _ => None,
        }
    }

    /// Puts a node in the place of two, that of the later one, where the builder takes it.
    fn merge(&mut self, gone: usize, at: usize, fused: Node) -> Option<Vec<usize>> {
        if !self.takes(&fused) {
            return None;
        }
        self.graph.nodes[at] = fused;
        self.removed[gone] = true;
        Some(vec![gone, at])
    }

    fn gated_product(&mut self, gate: usize) -> Option<Vec<usize>> {
        if !self.is(gate, OpKind::SiluAndMul) {
            return None;
        }
        let both = self.access((gate, 0));
        let made = self.uses(both.tensor).first()?.0;
        if !self.is(made, OpKind::MatMul) || self.node(made).operation.is_on("f32_out") {
            return None;
        }
        let (x, weight, out) = (self.access((made, 0)), self.access((made, 1)), self.access((gate, 1)));
        if self.only_use(both.tensor, made)? != (gate, 0) || !self.reads_later(made, gate) {
            return None;
        }
        let operation = Operation::new(OpKind::MatMulSiluAndMul, &[]);
        let fused = Node { operation, accesses: vec![x, weight, out], layer: self.node(made).layer };
        self.merge(made, gate, fused)
    }

    fn norm_product(&mut self, norm: usize) -> Option<Vec<usize>> {
        if !self.is(norm, OpKind::RmsNorm) || self.node(norm).operation.is_on("gemma") {
            return None;
        }
        let (x, weight, normed) = (self.access((norm, 0)), self.access((norm, 1)), self.access((norm, 2)).tensor);
        let (product, operand) = self.only_use(normed, norm)?;
        let eps = self.node(norm).operation.parameter("eps");
        let (kind, parameters) = match self.node(product).operation.kind {
            OpKind::MatMul => (OpKind::NormMatMul, vec![eps, self.node(product).operation.parameter("f32_out")]),
            OpKind::MatMulSiluAndMul => (OpKind::NormMatMulSiluAndMul, vec![eps]),
            _ => return None,
        };
        if operand != 0 || !self.reads_later(norm, product) {
            return None;
        }
        let (of, out) = (self.access((product, 1)), self.access((product, 2)));
        let operation = Operation::new(kind, &parameters);
        let fused = Node { operation, accesses: vec![x, weight, of, out], layer: self.node(product).layer };
        self.merge(norm, product, fused)
    }

    fn append_attention(&mut self, append: usize) -> Option<Vec<usize>> {
        let normed = self.is(append, OpKind::QkNormRopeAppend);
        if !normed && !self.is(append, OpKind::RopeAppend) {
            return None;
        }
        let first = if normed { 5 } else { 3 };
        let of_append = |operand: usize| self.access((append, operand));
        let (q, table, k_cache, v_cache) =
            (of_append(0), of_append(first + 2), of_append(first + 3), of_append(first + 4));
        let later = self.uses(k_cache.tensor).into_iter().find(|used| used.0 > append)?;
        let attention = later.0;
        let attends = self.is(attention, OpKind::DecodeAttention)
            && [(0, q), (1, k_cache), (2, v_cache), (3, table)]
                .iter()
                .all(|&(operand, expected)| self.access((attention, operand)) == expected);
        if !attends || !self.is_plain_value(q.tensor) {
            return None;
        }
        // Turned queries are nowhere then.
        let heads = q.columns;
        let overlaps = |used: Use| match (heads, self.access(used).columns) {
            (Some(heads), Some(other)) => other.start < heads.end() && heads.start < other.end(),
            _ => true,
        };
        if self.uses(q.tensor).iter().any(|&used| used.0 > append && used.0 != attention && overlaps(used)) {
            return None;
        }
        let lengths = self.access((attention, 4));
        // What the append reads is what is read where the attention is, and nobody else looks at the caches between them.
        let read: Vec<usize> =
            self.node(append).accesses.iter().chain([&lengths]).map(|access| access.tensor).collect();
        let between = |cache: usize| self.uses(cache).iter().any(|used| used.0 > append && used.0 < attention);
        if !read.iter().all(|&tensor| self.untouched(tensor, append, attention))
            || [k_cache.tensor, v_cache.tensor].into_iter().any(between)
        {
            return None;
        }
        let operation = &self.node(append).operation;
        let mut parameters = vec![self.node(attention).operation.parameter("scale"), operation.parameter("interleave")];
        if normed {
            parameters.push(operation.parameter("eps"));
        }
        let kind = if normed { OpKind::QkNormRopeAppendAttention } else { OpKind::RopeAppendAttention };
        let mut accesses = self.node(append).accesses.clone();
        accesses.insert(first + 2, lengths);
        accesses.push(self.access((attention, 5)));
        let operation = Operation::new(kind, &parameters);
        let fused = Node { operation, accesses, layer: self.node(attention).layer };
        self.merge(append, attention, fused)
    }

    fn turned_append(&mut self, append: usize) -> Option<Vec<usize>> {
        if !self.is(append, OpKind::Append) {
            return None;
        }
        let (k, v) = (self.access((append, 0)), self.access((append, 1)));
        let (packed, keys) = (k.tensor, k.columns?);
        if v.tensor != packed || !self.is_plain_value(packed) {
            return None;
        }
        let uses = self.uses(packed);
        let rope = uses.iter().rev().find(|used| used.0 < append)?.0;
        let turns = self.is(rope, OpKind::Rope)
            && self.access((rope, 1)) == k
            && self.access((rope, 0)).tensor == packed
            && self.access((rope, 3)) == self.access((append, 2));
        if !turns {
            return None;
        }
        let q = self.access((rope, 0));
        let overlaps = |used: Use| {
            self.access(used).columns.is_none_or(|other| other.start < keys.end() && keys.start < other.end())
        };
        if uses.iter().any(|&used| used.0 > append && overlaps(used)) {
            return None;
        }
        // The two uses ahead of the rope, where they are the norms of just these heads.
        let ahead: Vec<usize> = uses.iter().rev().filter(|used| used.0 < rope).take(2).map(|used| used.0).collect();
        let norm_of = |part: Access| {
            ahead.iter().copied().find(|&node| self.is(node, OpKind::HeadRmsNorm) && self.access((node, 0)) == part)
        };
        let norms = norm_of(q)
            .zip(norm_of(k))
            .filter(|(a, b)| self.node(*a).operation.parameters == self.node(*b).operation.parameters);
        let first = norms.map_or(rope, |(a, b)| a.min(b));
        let [positions, table] = [2, 3].map(|operand| self.access((append, operand)));
        let [k_cache, v_cache] = [4, 5].map(|operand| self.access((append, operand)));
        let still = [positions, table].iter().all(|access| self.untouched(access.tensor, first, append));
        if !still {
            return None;
        }
        let interleave = self.node(rope).operation.parameter("interleave");
        let cos_sin = self.access((rope, 2));
        let mut accesses = vec![q, k, v];
        let (operation, mut taken) = match norms {
            Some((of_q, of_k)) => {
                accesses.extend([self.access((of_q, 1)), self.access((of_k, 1))]);
                let eps = self.node(of_q).operation.parameter("eps");
                (Operation::new(OpKind::QkNormRopeAppend, &[eps, interleave]), vec![of_q, of_k])
            }
            None => (Operation::new(OpKind::RopeAppend, &[interleave]), Vec::new()),
        };
        accesses.extend([cos_sin, positions, table, k_cache, v_cache]);
        let fused = Node { operation, accesses, layer: self.node(append).layer };
        if !self.takes(&fused) {
            return None;
        }
        self.graph.nodes[append] = fused;
        taken.push(rope);
        taken.iter().for_each(|&node| self.removed[node] = true);
        taken.push(append);
        Some(taken)
    }

    /// Without what is gone: nodes, and tensors that nothing uses any more but that something used before.
    fn compact(mut self) -> Graph {
        let mut used = vec![false; self.graph.tensors.len()];
        let mut still = vec![false; self.graph.tensors.len()];
        for (i, node) in self.graph.nodes.iter().enumerate() {
            for access in &node.accesses {
                used[access.tensor] = true;
                still[access.tensor] |= !self.removed[i];
            }
        }
        let packed: Vec<String> =
            self.graph.tensors.iter().flat_map(|tensor| tensor.packed.iter().map(|part| part.0.clone())).collect();
        let mut places = vec![usize::MAX; self.graph.tensors.len()];
        let mut tensors = Vec::new();
        for (i, tensor) in self.graph.tensors.drain(..).enumerate() {
            let gone = match tensor.origin {
                Origin::Value => !still[i] && !self.graph.outputs.contains(&i),
                Origin::Weight => !still[i] && (used[i] || packed.contains(&tensor.name)),
                Origin::State | Origin::Input(_) => false,
            };
            if !gone {
                places[i] = tensors.len();
                tensors.push(tensor);
            }
        }
        let removed = self.removed;
        let mut nodes: Vec<Node> = Vec::new();
        for (i, mut node) in self.graph.nodes.drain(..).enumerate() {
            if !removed[i] {
                node.accesses.iter_mut().for_each(|access| access.tensor = places[access.tensor]);
                nodes.push(node);
            }
        }
        let outputs = self.graph.outputs.iter().map(|&tensor| places[tensor]).collect();
        Graph { tensors, nodes, outputs, ..self.graph }
    }
}
