//! Proves plans. It shares no code with the planner: it looks at ranges, uses and edges alone, and works all of it out
//! anew.

use super::error::GraphError;
use super::graph::{Graph, Origin};
use super::operation::{Given, PdlAfter, PdlBefore};
use super::plan::{Link, Plan, Span};
use crate::error::Result;

/// A range of the arena and the nodes that use it.
struct Used {
    name: String,
    span: Span,
    nodes: Vec<usize>,
    kept: bool,
}

impl Plan {
    /// Proves that the plan is right for a graph: that every node runs once, behind all that it needs; that each value
    /// has a place of its size; that of any two whose places overlap every use of one has ended before the first use of
    /// the other starts; and that kernels start early only where they wait by themselves.
    ///
    /// # Errors
    /// [`WrongPlan`](GraphError::WrongPlan) with the first thing that is wrong.
    pub fn verify(&self, graph: &Graph) -> Result<()> {
        let wrong = |problem: String| -> Result<()> {
            Err(GraphError::WrongPlan { graph: graph.name().to_owned(), problem }.into())
        };
        let count = graph.nodes().len();
        let mut position = vec![usize::MAX; count];
        for (at, &node) in self.order.iter().enumerate() {
            match position.get_mut(node) {
                Some(place) if *place == usize::MAX => *place = at,
                _ => return wrong(format!("its order has node {node}, which there is not, or twice")),
            }
        }
        if self.order.len() != count || self.spans.len() != graph.tensors().len() || self.workspaces.len() != count {
            return wrong("it is of another graph: other numbers of nodes or tensors".to_owned());
        }
        let mut follows = vec![Vec::new(); count];
        for edge in &self.edges {
            if edge.from >= count || edge.to >= count || position[edge.from] >= position[edge.to] {
                return wrong(format!("an edge goes from node {} to node {}, against the order", edge.from, edge.to));
            }
            let (from, to) = (&graph.nodes()[edge.from], &graph.nodes()[edge.to]);
            let waits = to.operation.facts().before == PdlBefore::Waits;
            if edge.link == Link::Programmatic && (!waits || from.operation.facts().after == PdlAfter::AtEnd) {
                let (from, to) = (graph.node_name(edge.from), graph.node_name(edge.to));
                return wrong(format!(
                    "{to} may start before {from} has ended, and one of the two does not allow that"
                ));
            }
            follows[edge.from].push(edge.to);
        }
        let ends_first = reached(&follows);
        let before = |a: usize, b: usize| ends_first[a * count + b];

        // What the graph itself asks: of two uses of a tensor of which one writes, the earlier one ends first.
        let mut uses: Vec<Vec<(usize, bool)>> = vec![Vec::new(); graph.tensors().len()];
        for (i, node) in graph.nodes().iter().enumerate() {
            for (access, operand) in node.accesses.iter().zip(node.operation.facts().operands) {
                uses[access.tensor].push((i, operand.role.writes()));
            }
        }
        for (tensor, uses) in uses.iter().enumerate() {
            if uses.iter().all(|(_, writes)| !writes) {
                if graph.tensors()[tensor].origin == Origin::Value && !uses.is_empty() {
                    return wrong(format!("{} is read, and nothing writes it", graph.tensors()[tensor].name));
                }
                continue;
            }
            for (i, &(earlier, writes)) in uses.iter().enumerate() {
                for &(later, writes_later) in &uses[i + 1..] {
                    if (writes || writes_later) && earlier != later && !before(earlier, later) {
                        let (name, later) = (&graph.tensors()[tensor].name, graph.node_name(later));
                        return wrong(format!(
                            "{later} uses {name} and does not wait for {}",
                            graph.node_name(earlier)
                        ));
                    }
                }
            }
        }

        let mut used = Vec::new();
        for (i, tensor) in graph.tensors().iter().enumerate() {
            let nodes: Vec<usize> = uses[i].iter().map(|(node, _)| *node).collect();
            match (tensor.origin == Origin::Value && !nodes.is_empty(), self.spans[i]) {
                (true, Some(span)) => {
                    if let Some(problem) = self.misplaced(span, tensor.spec.bytes(self.batch)) {
                        return wrong(format!("{}: {problem}", tensor.name));
                    }
                    used.push(Used { name: tensor.name.clone(), span, nodes, kept: graph.outputs().contains(&i) });
                }
                (false, None) => {}
                (true, None) => return wrong(format!("{} has no place", tensor.name)),
                (false, Some(_)) => return wrong(format!("{} has a place, and needs none", tensor.name)),
            }
        }
        for (i, node) in graph.nodes().iter().enumerate() {
            let specs = graph.given(node);
            let needed = Given { operation: &node.operation, specs: &specs, batch: self.batch }.workspace();
            match (needed, self.workspaces[i]) {
                (0, None) => {}
                (needed, Some(span)) if needed > 0 => {
                    if let Some(problem) = self.misplaced(span, needed) {
                        return wrong(format!("the workspace of {}: {problem}", graph.node_name(i)));
                    }
                    let name = format!("the workspace of {}", graph.node_name(i));
                    used.push(Used { name, span, nodes: vec![i], kept: false });
                }
                _ => return wrong(format!("{} has no workspace, or one that it does not need", graph.node_name(i))),
            }
        }

        // By where they begin, so that what overlaps one stands behind it until something begins past its end.
        used.sort_by_key(|used| used.span.offset);
        for (i, a) in used.iter().enumerate() {
            for b in used[i + 1..].iter().take_while(|b| b.span.offset < a.span.end()) {
                let ends = |x: &Used, y: &Used| {
                    !x.kept && x.nodes.iter().all(|&first| y.nodes.iter().all(|&then| before(first, then)))
                };
                if !ends(a, b) && !ends(b, a) {
                    return wrong(format!("{} and {} share memory, and may be in use at once", a.name, b.name));
                }
            }
        }
        Ok(())
    }

    /// What is wrong with a place for so many bytes.
    fn misplaced(&self, span: Span, needed: u64) -> Option<String> {
        let Span { offset, bytes } = span;
        if !offset.is_multiple_of(256) {
            return Some(format!("it begins at byte {offset}, which is no multiple of 256"));
        }
        if bytes < needed {
            return Some(format!("it has {bytes} bytes and needs {needed}"));
        }
        let end = offset.checked_add(bytes);
        end.is_none_or(|end| end > self.sizes.planned)
            .then(|| format!("it ends behind the arena's {} bytes", self.sizes.planned))
    }
}

/// Which nodes are behind which: a row for each node, of those that start after it has ended.
fn reached(follows: &[Vec<usize>]) -> Vec<bool> {
    let count = follows.len();
    let mut all = vec![false; count * count];
    let mut open = Vec::new();
    for from in 0..count {
        let row = &mut all[from * count..(from + 1) * count];
        open.push(from);
        while let Some(node) = open.pop() {
            for &next in &follows[node] {
                if !row[next] {
                    row[next] = true;
                    open.push(next);
                }
            }
        }
    }
    all
}
