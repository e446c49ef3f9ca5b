//! A step's inputs: what the host gave, what it knows of what the device made of them since, and whether kernels may find
//! their way by them.
//!
//! Ids, positions, lengths and pages are what kernels read memory by, and nothing on the device looks at them. So they are
//! checked here when they are given, and what the device changes by itself is bounded: positions and lengths grow by one for each
//! [`advance`](super::super::GraphBuilder::advance), which is counted, and a token is one of the columns that it was chosen
//! from.

use super::super::error::GraphError;
use super::super::graph::{Graph, Node, Origin};
use super::super::operation::OpKind;
use super::super::step::StepBlock;
use crate::error::Result;
use crate::tensor::DType;

/// What an operand is read as an index into.
struct Index {
    operand: usize,
    /// The least and the first number that is too large.
    from: i64,
    end: i64,
}

/// Which operands of a node kernels find their way by.
fn indices(graph: &Graph, node: &Node) -> Vec<Index> {
    let specs = graph.given(node);
    let size = |operand: usize, at: usize| -> i64 {
        let dim = specs[operand].shape.get(at).and_then(|dim| dim.constant());
        dim.and_then(|size| i64::try_from(size).ok()).unwrap_or(0)
    };
    let index = |operand, end| Index { operand, from: 0, end };
    // What a row's pages hold, by the page table and the cache.
    let capacity = |table: usize, cache: usize| size(table, 1).saturating_mul(size(cache, 1));
    let appended = |positions: usize, angles: Option<usize>| {
        let (table, cache) = (positions + 1, positions + 2);
        let end = angles.map_or(i64::MAX, |angles| size(angles, 0)).min(capacity(table, cache));
        vec![index(positions, end), index(table, size(cache, 0))]
    };
    // Positions, and behind them lengths, the page table and the caches.
    let attended = |positions: usize, angles: usize| {
        let (lengths, table, cache) = (positions + 1, positions + 2, positions + 3);
        let lengths = Index { operand: lengths, from: 1, end: capacity(table, cache).saturating_add(1) };
        let end = size(angles, 0).min(capacity(table, cache));
        vec![index(positions, end), lengths, index(table, size(cache, 0))]
    };
    // Without a wildcard, so that whoever adds an operation says what it goes by.
    match node.operation.kind {
        OpKind::Embedding => vec![index(0, size(1, 0))],
        OpKind::Rope => vec![index(3, size(2, 0))],
        OpKind::Append => appended(2, None),
        OpKind::RopeAppend => appended(4, Some(3)),
        OpKind::QkNormRopeAppend => appended(6, Some(5)),
        OpKind::DecodeAttention => {
            let lengths = Index { operand: 4, from: 1, end: capacity(3, 1).saturating_add(1) };
            vec![index(3, size(1, 0)), lengths]
        }
        OpKind::RopeAppendAttention => attended(4, 3),
        OpKind::QkNormRopeAppendAttention => attended(6, 5),
        OpKind::RmsNorm
        | OpKind::FusedAddRmsNorm
        | OpKind::HeadRmsNorm
        | OpKind::MatMul
        | OpKind::MatMulBias
        | OpKind::MatMulAdd
        | OpKind::NormMatMul
        | OpKind::MatMulSiluAndMul
        | OpKind::NormMatMulSiluAndMul
        | OpKind::SiluAndMul
        | OpKind::GeluAndMul
        | OpKind::GeluTanhAndMul
        | OpKind::Add
        | OpKind::Mul
        | OpKind::SigmoidGate
        | OpKind::Silu
        | OpKind::Softmax
        | OpKind::Copy
        | OpKind::Argmax
        | OpKind::Sample
        | OpKind::Advance
        | OpKind::GatedDeltaRule => Vec::new(),
    }
}

/// One input.
#[derive(Debug)]
struct Input {
    tensor: usize,
    /// Its bytes in the block.
    first: usize,
    bytes: usize,
    /// The least number that it may hold, and the first that is too large, where it is an index.
    bounds: Option<(i64, i64)>,
    /// How often a step adds one to it.
    steps: i64,
    /// The largest number that was given, with its row, and how often one was added since.
    largest: (u64, i64),
    added: i64,
    /// For how many rows it was given, and how often.
    rows: u64,
    version: u64,
    /// The most that a step makes of it by adding one.
    most: i64,
    /// To how many rows at least one was added as often as to the first.
    grown: u64,
    /// Whether the device has not what was given yet.
    changed: bool,
}

impl Input {
    fn add(&mut self, count: i64, bucket: u64) {
        self.added = self.added.saturating_add(count);
        self.grown = self.grown.min(bucket);
    }
}

/// The inputs of a graph's steps.
#[derive(Debug)]
pub(super) struct Inputs {
    block: StepBlock,
    host: Vec<u8>,
    all: Vec<Input>,
    used: Vec<Used>,
}

/// What a node does with inputs.
#[derive(Debug, Default)]
struct Used {
    /// Those that it is steered by, each with the least number that it may hold when the step begins, and the first that is too
    /// large.
    steered: Vec<(usize, i64, i64)>,
    /// Those that it adds to.
    added: Vec<usize>,
}

/// A refusal of a graph whose kernels would be steered by what nobody checks.
fn unsteered(graph: &Graph, node: usize, reason: String) -> crate::FlashInferError {
    let remedy = "declare what it goes by as a step input, and let `advance` alone change it";
    GraphError::UnsupportedKernel { op: graph.node_name(node), reason, remedy }.into()
}

impl Inputs {
    /// Of a graph, for batches of up to so many rows.
    pub(super) fn new(graph: &Graph, largest: u64) -> Result<Self> {
        let block = StepBlock::new(graph, largest);
        let mut all: Vec<Input> = Vec::new();
        for (i, tensor) in graph.tensors.iter().enumerate() {
            if matches!(tensor.origin, Origin::Input(_)) {
                let (first, bytes) = block.place(graph, &tensor.name)?;
                all.push(Input {
                    tensor: i,
                    first: first as usize,
                    bytes: bytes as usize,
                    bounds: None,
                    steps: 0,
                    largest: (0, 0),
                    added: 0,
                    rows: 0,
                    version: 0,
                    most: i64::MAX,
                    grown: u64::MAX,
                    changed: false,
                });
            }
        }
        // Tokens: whole numbers that were computed, of which each is below the columns that it was chosen from.
        let mut below: Vec<Option<i64>> = vec![None; graph.tensors.len()];
        let (mut used, mut tokens, mut bounded) = (Vec::new(), Vec::new(), Vec::new());
        for (i, node) in graph.nodes.iter().enumerate() {
            let input = |operand: usize| all.iter().position(|input| input.tensor == node.accesses[operand].tensor);
            let kind = node.operation.kind;
            let (mut steered, mut added) = (Vec::new(), Vec::new());
            for Index { operand, from, end } in indices(graph, node) {
                let argument = node.operation.facts().operands[operand].name;
                match (input(operand), below[node.accesses[operand].tensor]) {
                    (Some(at), _) => steered.push((at, from, end)),
                    // An id that was computed in this step.
                    (None, Some(columns)) if kind == OpKind::Embedding && columns <= end => {}
                    (None, found) => {
                        let found = found.map_or_else(String::new, |columns| format!(" of up to {columns}, of {end}"));
                        return Err(unsteered(graph, i, format!("{argument} is no step input{found}")));
                    }
                }
            }
            if kind == OpKind::Advance {
                let [Some(ids), Some(positions), Some(lengths)] = [1, 2, 3].map(input) else {
                    return Err(unsteered(graph, i, "it would change what is no step input".to_owned()));
                };
                let Some(columns) = below[node.accesses[0].tensor] else {
                    return Err(unsteered(graph, i, "its token is none that `argmax` or `sample` chose".to_owned()));
                };
                tokens.push((i, ids, columns));
                added.extend([positions, lengths]);
                let capacity = node.operation.parameter("capacity") as i64;
                bounded.extend([(positions, capacity - 1), (lengths, capacity)]);
            }
            if matches!(kind, OpKind::Argmax | OpKind::Sample) {
                let specs = graph.given(node);
                let columns = specs[0].shape.get(1).and_then(|dim| dim.constant()).unwrap_or(u64::MAX);
                if let Some(token) = node.accesses.last() {
                    below[token.tensor] = Some(i64::try_from(columns).unwrap_or(i64::MAX));
                }
            }
            used.push(Used { steered, added });
        }
        for (input, most) in bounded {
            all[input].most = all[input].most.min(most);
        }
        let mut inputs = Self { block, host: Vec::new(), all, used };
        inputs.bound(graph, &tokens)?;
        Ok(inputs)
    }

    /// Allocates the block on the host, once it is known to be one that a GPU has memory for.
    pub(super) fn allocate(&mut self) {
        self.host = vec![0; self.block.bytes() as usize];
    }

    /// What each input may hold when a step begins, by all of its uses.
    fn bound(&mut self, graph: &Graph, tokens: &[(usize, usize, i64)]) -> Result<()> {
        let mut added = vec![0i64; self.all.len()];
        for Used { steered, added: adds } in &mut self.used {
            for (at, from, end) in steered {
                // From here on, what it may hold when the step begins.
                *end = end.saturating_sub(added[*at]);
                let (least, most) = self.all[*at].bounds.unwrap_or((i64::from(i32::MIN), i64::from(i32::MAX)));
                self.all[*at].bounds = Some((least.max(*from), most.min(*end)));
            }
            adds.iter().for_each(|at| added[*at] += 1);
        }
        for (input, steps) in self.all.iter_mut().zip(added) {
            input.steps = steps;
        }
        for &(node, ids, columns) in tokens {
            let input = &self.all[ids];
            let Some((from, end)) = input.bounds else { continue };
            if from > 0 || columns > end || input.steps > 0 {
                let name = &graph.tensors[input.tensor].name;
                return Err(unsteered(
                    graph,
                    node,
                    format!("it writes tokens of up to {columns} to {name}, by which kernels find {end} places"),
                ));
            }
        }
        for input in &self.all {
            let tensor = &graph.tensors[input.tensor];
            let Some((from, end)) = input.bounds else { continue };
            if tensor.spec.dtype != DType::I32 {
                let found = tensor.spec.to_string();
                return Err(mismatch(&tensor.name, found, "I32, since kernels find their way by it".to_owned()));
            }
            let pad = match tensor.origin {
                Origin::Input(super::super::step::Pad::Value(value)) => value,
                Origin::Input(super::super::step::Pad::Reserved(page)) => page.into(),
                _ => continue,
            };
            if pad < from || pad >= end {
                let found = format!("rows that nobody asked for padded with {pad}");
                return Err(mismatch(&tensor.name, found, format!("{from} to {}", end - 1)));
            }
        }
        Ok(())
    }

    /// The bytes of the block.
    pub(super) fn bytes(&self) -> u64 {
        self.block.bytes()
    }

    /// Where an input lies in the block.
    pub(super) fn place(&self, tensor: usize) -> Option<u64> {
        self.all.iter().find(|input| input.tensor == tensor).map(|input| input.first as u64)
    }

    /// Takes an input of a batch of so many rows, of this element type.
    pub(super) fn give(&mut self, graph: &Graph, name: &str, rows: u64, dtype: DType, bytes: &[u8]) -> Result<()> {
        let tensor = graph.find("step input", name)?;
        let Some(input) = self.all.iter_mut().find(|input| input.tensor == tensor) else {
            unreachable!("every input of the graph is one of these")
        };
        let spec = &graph.tensors[tensor].spec;
        let expected = spec.bytes(rows);
        if spec.dtype != dtype || bytes.len() as u64 != expected {
            let found = format!("{} bytes of {dtype}", bytes.len());
            return Err(mismatch(name, found, format!("{expected} of {spec} for {rows} rows")));
        }
        let row = (spec.bytes(1) as usize / dtype.size()).max(1);
        if let Some((from, end)) = input.bounds {
            let mut largest = (0, i64::MIN);
            for (i, number) in bytes.chunks_exact(4).enumerate() {
                let number = i64::from(i32::from_ne_bytes([number[0], number[1], number[2], number[3]]));
                let at = (i / row) as u64;
                if number >= end && input.steps > 0 {
                    return Err(too_long(at, number, from, end));
                }
                if number < from || number >= end {
                    let found = format!("{number} in row {at}");
                    return Err(mismatch(name, found, format!("{from} to {}", end - 1)));
                }
                if number > largest.1 {
                    largest = (at, number);
                }
            }
            let pad = match graph.tensors[tensor].origin {
                Origin::Input(super::super::step::Pad::Value(value)) => value,
                // The device adds to it as to any other, where that is what it does with the input.
                Origin::Input(super::super::step::Pad::Reserved(page)) => page.into(),
                _ => i64::MIN,
            };
            input.largest = if pad > largest.1 { (rows, pad) } else { largest };
        }
        self.block.fill(graph, name, &mut self.host, bytes)?;
        (input.added, input.rows, input.changed, input.grown) = (0, rows, true, u64::MAX);
        input.version += 1;
        Ok(())
    }

    /// Looks at whether all is there for so many steps of a batch, and whether no index grows too large on the way.
    pub(super) fn check(&self, graph: &Graph, rows: u64, steps: u64) -> Result<()> {
        for input in &self.all {
            let tensor = &graph.tensors[input.tensor];
            let grows = tensor.spec.shape.first().is_some_and(|dim| dim.constant().is_none());
            if input.rows == 0 || (grows && input.rows < rows) {
                let expected = format!("{} for {rows} rows", tensor.spec);
                let (kind, name) = (tensor.origin.name(), tensor.name.clone());
                return Err(GraphError::Missing { kind, name, expected }.into());
            }
            self.fits(input, input.steps.saturating_mul(i64::try_from(steps).unwrap_or(i64::MAX) - 1))?;
        }
        Ok(())
    }

    /// That an input is no larger than it may be when a step begins, after so much more was added to it.
    fn fits(&self, input: &Input, more: i64) -> Result<()> {
        let Some((from, end)) = input.bounds else { return Ok(()) };
        let (row, largest) = input.largest;
        let then = largest.saturating_add(input.added).saturating_add(more);
        if then < end { Ok(()) } else { Err(too_long(row, then, from, end)) }
    }

    /// That a node may be launched by itself: its part of what [`check`](Self::check) looks at for a whole step.
    pub(super) fn check_node(&self, node: usize, added: &[i64]) -> Result<()> {
        for &(at, from, end) in &self.used[node].steered {
            let input = &self.all[at];
            // What was added within this step was taken off the end already.
            let then = input.largest.1.saturating_add(input.added).saturating_sub(added[at]);
            if then >= end {
                return Err(too_long(input.largest.0, then, from, end));
            }
        }
        Ok(())
    }

    /// Counts what a node adds, once it was launched for a bucket; and what was added within its step.
    pub(super) fn launched(&mut self, node: usize, added: &mut [i64], bucket: u64) {
        for &at in &self.used[node].added {
            self.all[at].add(1, bucket);
            added[at] += 1;
        }
    }

    /// Counts what a whole step adds, of a bucket.
    pub(super) fn stepped(&mut self, bucket: u64) {
        self.all.iter_mut().filter(|input| input.steps > 0).for_each(|input| input.add(input.steps, bucket));
    }

    /// To how many rows of an input at least steps added as often as to the first: rows that a smaller bucket left out stayed as they
    /// were.
    pub(super) fn grown_rows(&self, tensor: usize) -> u64 {
        self.input(tensor).grown
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    fn input(&self, tensor: usize) -> &Input {
        match self.all.iter().find(|input| input.tensor == tensor) {
            Some(input) => input,
            None => unreachable!("what kernels find their way by is an input"),
        }
    }

    /// How often an input was given, and how often one was added to it since.
    pub(super) fn version(&self, tensor: usize) -> (u64, i64) {
        let input = self.input(tensor);
        (input.version, input.added)
    }

    /// The first numbers of an input, as they were given; behind the rows that were, what pads them.
    pub(super) fn words(&self, tensor: usize, count: usize) -> Vec<i32> {
        let Input { first, bytes, .. } = *self.input(tensor);
        let words = self.host[first..first + bytes].chunks_exact(4).take(count);
        words.map(|word| i32::from_ne_bytes([word[0], word[1], word[2], word[3]])).collect()
    }

    /// What the device has made of a number of an input that was given, which one step adds one to at most.
    pub(super) fn grown(&self, tensor: usize, given: i32) -> i64 {
        let Input { added, most, .. } = *self.input(tensor);
        if added == 0 { given.into() } else { i64::from(given).saturating_add(added).min(most) }
    }

    /// How often a step adds one to an input.
    pub(super) fn steps(&self, tensor: usize) -> i64 {
        self.input(tensor).steps
    }

    /// The nodes that add to an input.
    pub(super) fn changes(&self, tensor: usize) -> impl Iterator<Item = usize> {
        let at = self.all.iter().position(|input| input.tensor == tensor);
        let adds = move |used: &Used| at.is_some_and(|at| used.added.contains(&at));
        self.used.iter().enumerate().filter(move |(_, used)| adds(used)).map(|(node, _)| node)
    }

    /// The block, and the parts of it that the device has not yet: neighbours as one.
    pub(super) fn changed(&self) -> (&[u8], impl Iterator<Item = (usize, usize)>) {
        let mut at = 0;
        let next = move || {
            while self.all.get(at).is_some_and(|input| !input.changed) {
                at += 1;
            }
            let first = self.all.get(at)?.first;
            let mut end = first;
            while let Some(input) = self.all.get(at).filter(|input| input.changed) {
                end = input.first + input.bytes;
                at += 1;
            }
            Some((first, end - first))
        };
        (&self.host, std::iter::from_fn(next))
    }

    pub(super) fn is_changed(&self) -> bool {
        self.all.iter().any(|input| input.changed)
    }

    /// The device has all that was given.
    pub(super) fn copied(&mut self) {
        self.all.iter_mut().for_each(|input| input.changed = false);
    }
}

fn mismatch(name: &str, found: String, expected: String) -> crate::FlashInferError {
    GraphError::Mismatch { kind: "step input", name: name.to_owned(), found, expected }.into()
}

/// An index that grows with the sequence, at a place past the last: lengths begin at 1, positions at 0.
fn too_long(row: u64, number: i64, from: i64, end: i64) -> crate::FlashInferError {
    let tokens = |end: i64| end.saturating_sub(from).max(0) as u64;
    GraphError::ContextTooLong { row, length: tokens(number.saturating_add(1)), capacity: tokens(end) }.into()
}

#[cfg(test)]
mod tests {
    use super::super::super::builder::{GraphBuilder, StepInput};
    use super::super::super::shape::{Columns, Dim};
    use super::super::super::step::Pad;
    use super::*;
    use crate::FlashInferError;

    const PAGE_SIZE: u64 = 16;
    const PER_ROW: u64 = 2;
    const PAGES: u64 = 9;
    const VOCABULARY: u64 = 40;

    fn refused<T>(result: Result<T>) -> GraphError {
        match result {
            Err(FlashInferError::ComputeGraph(error)) => *error,
            Err(other) => panic!("another error: {other}"),
            Ok(_) => panic!("it was taken"),
        }
    }

    /// A decoder's way of indices: embedding, append and attention, a token and the next step's inputs. `angles` is how many
    /// positions the table of angles has, where the keys are turned; `tokens` how many columns the logits have.
    fn decoder(angles: Option<u64>, tokens: u64, pad: i64, swapped: bool) -> Graph {
        padded(angles, tokens, Pad::Value(pad), swapped)
    }

    fn padded(angles: Option<u64>, tokens: u64, pad: Pad, swapped: bool) -> Graph {
        let fixed = Dim::fixed;
        let mut g = GraphBuilder::new("steered", 4);
        let column = |g: &mut GraphBuilder, name, pad| g.input(name, DType::I32, [Dim::BATCH], pad).unwrap();
        let mut ids = column(&mut g, "ids", Pad::Value(0));
        let mut positions = column(&mut g, "positions", pad);
        let mut lengths = column(&mut g, "lengths", Pad::Value(1));
        let table = g.input("page_table", DType::I32, [Dim::BATCH, fixed(PER_ROW)], Pad::Reserved(0)).unwrap();
        let weight = |g: &mut GraphBuilder, name, rows, columns| {
            g.weight(name, DType::BF16, [fixed(rows), fixed(columns)]).unwrap()
        };
        let embedding = weight(&mut g, "embedding", VOCABULARY, 128);
        let head = weight(&mut g, "head", tokens, 128);
        let cache = [fixed(PAGES), fixed(PAGE_SIZE), fixed(1), fixed(128)];
        let [mut k, mut v] = ["k", "v"].map(|name| g.state(name, DType::BF16, cache).unwrap());
        let mut hidden = g.embedding(&ids, &embedding, 1.0).unwrap();
        let one = Columns::new(0..128).heads(1);
        if let Some(angles) = angles {
            let cos_sin = g.weight("cos_sin", DType::F32, [fixed(angles), fixed(128)]).unwrap();
            let other = g.copy(&hidden, DType::BF16).unwrap();
            let turned = g.rope_apart((hidden, one), (other, one), &cos_sin, &positions, false).unwrap();
            hidden = turned.0;
        }
        let part = hidden.columns(one);
        g.append((part, part), &positions, &table, (&mut k, &mut v)).unwrap();
        let attended = g.decode_attention(part, (&k, &v), &table, &lengths, 0.1).unwrap();
        let logits = g.matmul_f32(&attended, &head).unwrap();
        let token = g.argmax(&logits).unwrap();
        let mut next = |g: &mut GraphBuilder, ids: &mut StepInput, positions: &mut StepInput| {
            g.advance(&token, ids, positions, &mut lengths, (PAGE_SIZE * PER_ROW) as u32).unwrap();
        };
        match swapped {
            false => next(&mut g, &mut ids, &mut positions),
            true => next(&mut g, &mut positions, &mut ids),
        }
        g.output("token", token).unwrap();
        g.finish().unwrap()
    }

    fn words(values: &[i32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_ne_bytes()).collect()
    }

    fn give(inputs: &mut Inputs, graph: &Graph, name: &str, values: &[i32]) -> Result<()> {
        let rows = if name == "page_table" { values.len() as u64 / PER_ROW } else { values.len() as u64 };
        inputs.give(graph, name, rows, DType::I32, &words(values))
    }

    fn given(graph: &Graph, positions: &[i32]) -> Inputs {
        let mut inputs = Inputs::new(graph, 4).unwrap();
        inputs.allocate();
        let lengths: Vec<i32> = positions.iter().map(|position| position + 1).collect();
        let table: Vec<i32> = (1..=positions.len() as i32 * PER_ROW as i32).collect();
        give(&mut inputs, graph, "ids", &vec![7; positions.len()]).unwrap();
        give(&mut inputs, graph, "positions", positions).unwrap();
        give(&mut inputs, graph, "lengths", &lengths).unwrap();
        give(&mut inputs, graph, "page_table", &table).unwrap();
        inputs
    }

    #[test]
    fn an_index_that_no_kernel_may_be_given_is_refused_with_its_row() {
        let graph = decoder(None, VOCABULARY, 0, false);
        let mut inputs = given(&graph, &[0, 3]);
        for (name, values, wrong) in [
            ("ids", [0, VOCABULARY as i32], "40 in row 1"),
            ("ids", [-1, 0], "-1 in row 0"),
            ("positions", [0, -2], "-2 in row 1"),
            ("lengths", [0, 1], "0 in row 0"),
        ] {
            match refused(give(&mut inputs, &graph, name, &values)) {
                GraphError::Mismatch { name: found, found: value, .. } => {
                    assert_eq!((&found[..], &value[..]), (name, wrong));
                }
                other => panic!("{other}"),
            }
        }
        match refused(give(&mut inputs, &graph, "page_table", &[1, 2, 3, PAGES as i32])) {
            GraphError::Mismatch { found, expected, .. } => {
                assert_eq!((&found[..], &expected[..]), ("9 in row 1", "0 to 8"));
            }
            other => panic!("{other}"),
        }
        for (name, values) in [("positions", [31, 32]), ("lengths", [32, 33])] {
            match refused(give(&mut inputs, &graph, name, &values)) {
                GraphError::ContextTooLong { row: 1, length: 33, capacity: 32 } => {}
                other => panic!("{other}"),
            }
        }
        // What was refused changed nothing.
        inputs.check(&graph, 2, 1).unwrap();
    }

    #[test]
    fn steps_are_queued_up_to_the_last_token_that_there_is_room_for() {
        for (angles, room) in [(None, 32), (Some(40), 32), (Some(20), 20)] {
            let graph = decoder(angles, VOCABULARY, 0, false);
            let mut inputs = given(&graph, &[0, 5, 2]);
            let steps = room - 5;
            inputs.check(&graph, 3, steps).unwrap();
            for (more, expected) in [(steps + 1, room + 1), (u64::MAX, i64::MAX as u64)] {
                match refused(inputs.check(&graph, 3, more)) {
                    GraphError::ContextTooLong { row: 1, length, capacity } => {
                        assert_eq!((length, capacity), (expected, room));
                    }
                    other => panic!("{other}"),
                }
            }
            // One by one, as whole steps and node by node, and the same again once positions are given anew.
            for _ in 0..2 {
                for _ in 0..steps - 1 {
                    inputs.check(&graph, 3, 1).unwrap();
                    inputs.stepped(4);
                }
                let mut added = vec![0; inputs.count()];
                for node in 0..graph.nodes.len() {
                    inputs.check_node(node, &added).unwrap();
                    inputs.launched(node, &mut added, 4);
                }
                assert!(matches!(refused(inputs.check(&graph, 3, 1)), GraphError::ContextTooLong { .. }));
                let added = vec![0; inputs.count()];
                let too_long = (0..graph.nodes.len()).find(|&node| inputs.check_node(node, &added).is_err());
                assert!(too_long.is_some());
                give(&mut inputs, &graph, "positions", &[5, 5, 5]).unwrap();
                give(&mut inputs, &graph, "lengths", &[6, 6, 6]).unwrap();
            }
        }
    }

    #[test]
    fn what_pads_a_batch_grows_as_its_rows_do() {
        for pad in [Pad::Value(30), Pad::Reserved(30)] {
            let graph = padded(None, VOCABULARY, pad, false);
            let inputs = given(&graph, &[0]);
            inputs.check(&graph, 1, 2).unwrap();
            assert!(matches!(refused(inputs.check(&graph, 1, 3)), GraphError::ContextTooLong { .. }), "{pad:?}");
        }
    }

    #[test]
    fn a_graph_whose_kernels_would_go_by_what_nobody_checks_is_refused() {
        let refusal = |graph: &Graph| match refused(Inputs::new(graph, 4)) {
            GraphError::UnsupportedKernel { reason, .. } => reason,
            other => panic!("{other}"),
        };
        // More tokens than the table has rows; a token where positions are; and a pad that is no position.
        assert!(refusal(&decoder(None, VOCABULARY + 1, 0, false)).contains("tokens of up to 41 to ids"));
        assert!(refusal(&decoder(None, VOCABULARY, 0, true)).contains("to positions"));
        let padded = refused(Inputs::new(&decoder(None, VOCABULARY, 32, false), 4));
        assert!(matches!(padded, GraphError::Mismatch { .. }), "{padded}");
        // A position that is no input, which no builder makes.
        let mut graph = decoder(None, VOCABULARY, 0, false);
        let token = graph.outputs[0];
        let append = graph.nodes.iter().position(|node| node.operation.kind == OpKind::Append).unwrap();
        graph.nodes[append].accesses[2].tensor = token;
        assert!(refusal(&graph).contains("positions is no step input"));
    }

    #[test]
    fn what_was_given_is_copied_and_nothing_that_the_device_changed() {
        let graph = decoder(None, VOCABULARY, 0, false);
        let mut inputs = given(&graph, &[0, 3]);
        let parts = |inputs: &Inputs| inputs.changed().1.collect::<Vec<_>>();
        // All of them with one copy.
        assert_eq!(parts(&inputs), [(0, 768 + 32)]);
        inputs.copied();
        assert!(!inputs.is_changed() && parts(&inputs).is_empty());
        give(&mut inputs, &graph, "page_table", &[1, 2, 3, 4]).unwrap();
        assert_eq!(parts(&inputs), [(768, 32)]);
        give(&mut inputs, &graph, "ids", &[1, 2]).unwrap();
        assert_eq!(parts(&inputs), [(0, 16), (768, 32)]);
        // Rows behind the batch are padded up to the largest bucket.
        let (block, _) = inputs.changed();
        assert_eq!(block[..16], words(&[1, 2, 0, 0])[..]);
        assert_eq!(block[512..528], words(&[1, 4, 1, 1])[..]);
    }
}
