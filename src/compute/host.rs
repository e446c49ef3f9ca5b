//! Runs a plan on the host, inside the planned arena, in f64 between memory of the graph's own types. What is free
//! holds NaN, so that a value which was given memory too early or taken from it shows.

pub(super) mod fused;

use super::backend::Backend;
use super::builder::operands;
use super::error::GraphError;
use super::graph::{Access, Graph, Node, Origin};
use super::operation::{Given, Role, RowArgument, RowCall};
use super::plan::{Plan, Span};
use crate::data::tensor::numbers;
use crate::error::Result;
use crate::module::Module;
use crate::narrow;
use crate::object::Arg;
use crate::owner::Owner;
use crate::reference;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

/// Every byte of memory that is free: NaN of each floating-point type, and -1 of whole numbers, which is no index.
const POISON: u8 = 0xFF;

/// A plan with memory on the host.
///
/// Operations that a kernel's row serves are computed by this crate's [references](mod@crate::reference), which raise
/// errors through libtvm_ffi.so: [`FlashInferRuntime::initialize`](crate::FlashInferRuntime::initialize) comes first.
#[derive(Debug)]
pub struct HostRun<'g> {
    graph: &'g Graph,
    plan: &'g Plan,
    memory: Memory,
    /// For each tensor that is a value and no output, the place in the order of the node that uses it last.
    last: Vec<Option<usize>>,
    given: Vec<bool>,
    checks: bool,
}

/// Where each tensor is.
#[derive(Debug)]
pub(super) struct Memory {
    arena: Vec<u8>,
    spans: Vec<Option<Span>>,
    own: Vec<Vec<u8>>,
}

impl Memory {
    fn bytes(&self, tensor: usize) -> &[u8] {
        match self.spans[tensor] {
            Some(span) => &self.arena[span.offset as usize..span.end() as usize],
            None => &self.own[tensor],
        }
    }

    fn bytes_mut(&mut self, tensor: usize) -> &mut [u8] {
        match self.spans[tensor] {
            Some(span) => &mut self.arena[span.offset as usize..span.end() as usize],
            None => &mut self.own[tensor],
        }
    }
}

impl<'g> HostRun<'g> {
    /// Allocates the arena and what is to be given, all of it filled with NaN, but for states, which begin with zeros.
    ///
    /// # Errors
    /// [`WrongPlan`](GraphError::WrongPlan) for a plan of another graph, or one whose places lie outside of its arena;
    /// [`ArenaTooLarge`](GraphError::ArenaTooLarge) where the host has no memory for it.
    pub fn new(graph: &'g Graph, plan: &'g Plan) -> Result<Self> {
        let wrong = |problem: &str| GraphError::WrongPlan { graph: graph.name.clone(), problem: problem.to_owned() };
        if plan.spans.len() != graph.tensors.len() || plan.order.len() != graph.nodes.len() {
            return Err(wrong("it is of another graph: other numbers of nodes or tensors").into());
        }
        if plan.batch > graph.largest {
            return Err(wrong("it is for a larger batch than the graph").into());
        }
        let sizes = plan.sizes;
        let mut last = vec![None; graph.tensors.len()];
        for (at, &node) in plan.order.iter().enumerate() {
            let node = graph.nodes.get(node).ok_or_else(|| wrong("its order has a node that there is not"))?;
            for access in &node.accesses {
                let tensor = access.tensor;
                if graph.tensors[tensor].origin == Origin::Value && !graph.outputs.contains(&tensor) {
                    last[tensor] = Some(at);
                }
            }
        }
        let allocate = |bytes: u64, fill: u8| -> Result<Vec<u8>> {
            let mut memory = Vec::new();
            let count = usize::try_from(bytes).unwrap_or(usize::MAX);
            let refused = || GraphError::ArenaTooLarge { planned: sizes.total(), free: 0 };
            memory.try_reserve_exact(count).map_err(|_| refused())?;
            memory.resize(count, fill);
            Ok(memory)
        };
        let mut own = Vec::with_capacity(graph.tensors.len());
        for (i, tensor) in graph.tensors.iter().enumerate() {
            let needed = tensor.spec.bytes(plan.batch);
            match plan.spans[i] {
                Some(span) if span.end() > sizes.planned || span.bytes < needed => {
                    return Err(wrong("a place lies outside of the arena, or is too small").into());
                }
                Some(_) => own.push(Vec::new()),
                None => own.push(allocate(needed, if tensor.origin == Origin::State { 0 } else { POISON })?),
            }
        }
        let given = graph.tensors.iter().map(|tensor| matches!(tensor.origin, Origin::Value | Origin::State)).collect();
        let memory = Memory { arena: allocate(sizes.planned, POISON)?, spans: plan.spans.clone(), own };
        Ok(Self { graph, plan, memory, last, given, checks: true })
    }

    /// Whether each node's results are looked at for what is no finite number. On by default; a model that has −∞ somewhere
    /// wants it off.
    pub fn check_finite(&mut self, checks: bool) {
        self.checks = checks;
    }

    /// Gives a weight. One that others are packed into is filled part by part, by their names.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName), [`Mismatch`](GraphError::Mismatch).
    pub fn weight(&mut self, name: &str, values: &[f64]) -> Result<()> {
        let packing = self.graph.tensors.iter().enumerate().find_map(|(i, tensor)| {
            let place = tensor.packed.iter().position(|(part, _)| part == name)?;
            Some((i, place))
        });
        let Some((tensor, place)) = packing else {
            let tensor = self.graph.find("weight", name)?;
            return self.fill(tensor, name, 0, self.graph.tensors[tensor].spec.elements(1), values);
        };
        let parts = &self.graph.tensors[tensor].packed;
        let row = self.graph.tensors[tensor].spec.elements(1) / parts.iter().map(|part| part.1).sum::<u64>().max(1);
        let first = parts[..place].iter().map(|part| part.1).sum::<u64>() * row;
        let count = parts[place].1 * row;
        self.fill(tensor, name, first, count, values)
    }

    /// Gives a state what it begins with.
    ///
    /// # Errors
    /// As for [`weight`](Self::weight).
    pub fn state(&mut self, name: &str, values: &[f64]) -> Result<()> {
        let tensor = self.graph.find("state", name)?;
        self.fill(tensor, name, 0, self.graph.tensors[tensor].spec.elements(self.plan.batch), values)
    }

    /// Gives an input of the step, all of its rows.
    ///
    /// # Errors
    /// As for [`weight`](Self::weight).
    pub fn input(&mut self, name: &str, values: &[f64]) -> Result<()> {
        let tensor = self.graph.find("step input", name)?;
        self.fill(tensor, name, 0, self.graph.tensors[tensor].spec.elements(self.plan.batch), values)
    }

    fn fill(&mut self, tensor: usize, name: &str, first: u64, count: u64, values: &[f64]) -> Result<()> {
        let (kind, dtype) = (self.graph.tensors[tensor].origin.name(), self.graph.tensors[tensor].spec.dtype);
        if values.len() as u64 != count {
            let (found, expected) = (format!("{} numbers", values.len()), format!("{count}"));
            return Err(GraphError::Mismatch { kind, name: name.to_owned(), found, expected }.into());
        }
        let size = dtype.size();
        let bytes = &mut self.memory.bytes_mut(tensor)[first as usize * size..];
        for (element, value) in bytes.chunks_exact_mut(size).zip(values) {
            store(element, dtype, *value);
        }
        self.given[tensor] = true;
        Ok(())
    }

    /// What an output, a state or a step input holds.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName).
    pub fn read(&self, name: &str) -> Result<Vec<f64>> {
        let kinds = ["output", "state", "step input"];
        let found = kinds.into_iter().find_map(|kind| self.graph.find(kind, name).ok());
        let tensor = found.map_or_else(|| self.graph.find("output", name), Ok)?;
        let spec = &self.graph.tensors[tensor].spec;
        let bytes = &self.memory.bytes(tensor)[..spec.bytes(self.plan.batch) as usize];
        Ok(numbers(bytes, spec.dtype).collect())
    }

    /// Runs a step.
    ///
    /// # Errors
    /// [`Missing`](GraphError::Missing) for what was not given, [`Run`](GraphError::Run) with what a reference raised, and
    /// [`NotFinite`](GraphError::NotFinite) with the node that wrote it.
    pub fn run(&mut self) -> Result<()> {
        Backend::step(self)
    }

    fn compute(&mut self, at: usize, index: usize) -> Result<()> {
        let node = &self.graph.nodes[index];
        let facts = node.operation.facts();
        let made = |operand: usize| facts.operands[operand].role == Role::Write;
        for (access, _) in node.accesses.iter().enumerate().filter(|(i, _)| made(*i)).map(|(i, access)| (access, i)) {
            self.memory.bytes_mut(access.tensor).fill(POISON);
        }
        // What a kernel leaves in its workspace is nobody's business.
        if let Some(span) = self.plan.workspace(index) {
            match self.memory.arena.get_mut(span.offset as usize..span.end() as usize) {
                Some(workspace) => workspace.fill(POISON),
                None => {
                    let problem = "a workspace lies outside of the arena".to_owned();
                    return Err(GraphError::WrongPlan { graph: self.graph.name.clone(), problem }.into());
                }
            }
        }
        let failed = |error: crate::FlashInferError| -> crate::FlashInferError {
            GraphError::Run { node: self.graph.node_name(index), reason: error.to_string() }.into()
        };
        let (graph, batch) = (self.graph, self.plan.batch);
        let specs = graph.given(node);
        match (Given { operation: &node.operation, specs: &specs, batch }.call(), facts.host) {
            (Some(call), _) => run_row(&mut self.memory, graph, node, &call, batch).map_err(failed)?,
            (None, Some(host)) => {
                host(&mut HostCall { memory: &mut self.memory, graph, node, batch }).map_err(failed)?;
            }
            (None, None) => unreachable!("every operation has a reference"),
        }
        if self.checks {
            self.finite(index, node)?;
        }
        for access in &node.accesses {
            if self.last[access.tensor] == Some(at) {
                self.memory.bytes_mut(access.tensor).fill(POISON);
            }
        }
        Ok(())
    }

    /// That what a node wrote is finite. Caches are not looked at as a whole: they are read where they were written.
    fn finite(&self, index: usize, node: &Node) -> Result<()> {
        for (access, operand) in node.accesses.iter().zip(node.operation.facts().operands) {
            let tensor = &self.graph.tensors[access.tensor];
            let whole = matches!(tensor.spec.dtype, DType::I32 | DType::I64 | DType::U8);
            if !operand.role.writes() || whole || tensor.origin == Origin::State {
                continue;
            }
            let values = gather(&self.memory, self.graph, access, self.plan.batch);
            if let Some(first) = values.iter().position(|value| !value.is_finite()) {
                return Err(GraphError::NotFinite {
                    node: self.graph.node_name(index),
                    tensor: tensor.name.clone(),
                    first: first as u64,
                    value: values[first],
                }
                .into());
            }
        }
        Ok(())
    }
}

impl Backend for HostRun<'_> {
    fn graph(&self) -> &Graph {
        self.graph
    }

    fn plan(&self) -> &Plan {
        self.plan
    }

    fn begin(&mut self) -> Result<()> {
        if let Some(missing) = self.given.iter().position(|given| !given) {
            let tensor = &self.graph.tensors[missing];
            let (kind, name, expected) = (tensor.origin.name(), tensor.name.clone(), tensor.spec.to_string());
            return Err(GraphError::Missing { kind, name, expected }.into());
        }
        self.memory.arena.fill(POISON);
        Ok(())
    }

    fn node(&mut self, at: usize) -> Result<()> {
        let node = self.plan.order.get(at).copied().ok_or_else(|| GraphError::Run {
            node: format!("place {at} of the plan"),
            reason: format!("the plan has {} nodes", self.plan.order.len()),
        })?;
        self.compute(at, node)
    }
}

/// Writes a number as an element of a type, rounded once.
pub(super) fn store(element: &mut [u8], dtype: DType, value: f64) {
    match dtype {
        DType::F16 => element.copy_from_slice(&narrow::to_f16(value).to_ne_bytes()),
        DType::BF16 => element.copy_from_slice(&narrow::to_bf16(value).to_ne_bytes()),
        DType::F32 => element.copy_from_slice(&(value as f32).to_ne_bytes()),
        DType::F64 => element.copy_from_slice(&value.to_ne_bytes()),
        DType::U8 => element[0] = value as u8,
        DType::I32 => element.copy_from_slice(&(value as i32).to_ne_bytes()),
        DType::I64 => element.copy_from_slice(&(value as i64).to_ne_bytes()),
        DType::F8E4M3 | DType::F8E5M2 => element[0] = reference::eight_bit(value, dtype),
    }
}

/// The places of a part's elements in its tensor, in row-major order.
fn places(graph: &Graph, access: &Access, batch: u64) -> impl Iterator<Item = usize> + use<> {
    let (first, shape, strides) = graph.laid_out(access, batch);
    let count: i64 = shape.iter().product();
    (0..count).map(move |mut i| {
        let mut at = first as i64;
        for (size, stride) in shape.iter().zip(&strides).rev() {
            at += i % size * stride;
            i /= size;
        }
        at as usize
    })
}

fn gather(memory: &Memory, graph: &Graph, access: &Access, batch: u64) -> Vec<f64> {
    part(graph, access, batch, memory.bytes(access.tensor))
}

/// The numbers of a part of a tensor, in row-major order, of the tensor's bytes.
pub(super) fn part(graph: &Graph, access: &Access, batch: u64, bytes: &[u8]) -> Vec<f64> {
    let dtype = graph.tensors[access.tensor].spec.dtype;
    let size = dtype.size();
    let place = |at: usize| numbers(&bytes[at * size..(at + 1) * size], dtype).next().unwrap_or(f64::NAN);
    if access.columns.is_none() {
        let count = graph.tensors[access.tensor].spec.bytes(batch) as usize;
        return numbers(&bytes[..count], dtype).collect();
    }
    places(graph, access, batch).map(place).collect()
}

/// Calls a kernel's reference by its row, as the kernel itself is called.
fn run_row(memory: &mut Memory, graph: &Graph, node: &Node, call: &RowCall, batch: u64) -> Result<()> {
    let specs = graph.given(node);
    let mut ramps: Vec<Vec<u8>> = Vec::new();
    for argument in &call.arguments {
        match *argument {
            RowArgument::Ramp { dtype, count, step } => ramps.push(ramp(dtype, count, step)),
            RowArgument::Scratch(bytes) => ramps.push(vec![POISON; bytes as usize]),
            _ => {}
        }
    }
    let mut next = ramps.iter_mut();
    let mut layouts: Vec<Option<Layout>> = Vec::with_capacity(call.arguments.len());
    let vector =
        |data: *mut u8, dtype, count: u64| Layout::build(data.cast(), Device::Cpu, dtype, &[count as i64], None, None);
    // One pointer to the arena, from which those of all values come, so that none ends what another may do.
    let arena = memory.arena.as_mut_ptr();
    for argument in &call.arguments {
        let mut data = |access: &Access| match memory.spans[access.tensor] {
            Some(span) => arena.wrapping_add(span.offset as usize),
            None => memory.own[access.tensor].as_mut_ptr(),
        };
        layouts.push(match *argument {
            RowArgument::Operand(_) | RowArgument::Heads(..) => {
                let access = argument.access(&node.accesses, &specs);
                access.map(|access| graph.layout(&access, batch, data(&access), Device::Cpu))
            }
            RowArgument::Flat(i) => Some(vector(data(&node.accesses[i]), specs[i].dtype, specs[i].elements(batch))),
            RowArgument::Ramp { dtype, count, .. } => next.next().map(|ramp| vector(ramp.as_mut_ptr(), dtype, count)),
            RowArgument::Scratch(bytes) => next.next().map(|memory| vector(memory.as_mut_ptr(), DType::U8, bytes)),
            _ => None,
        });
    }
    let owner = Owner::NONE;
    let operands = operands(&call.arguments, &layouts, &owner, false);
    // SAFETY: every layout lies in memory that this function borrows exclusively or made: a tensor's place has as many
    // bytes as its type and sizes take, which `HostRun::new` saw to, and columns lie within it, which the builder saw
    // to. The references check every index that they read.
    unsafe { call.entry.call(&operands, Stream::NULL) }
}

/// So many whole numbers: 0, then each larger by a step.
pub(super) fn ramp(dtype: DType, count: u64, step: u64) -> Vec<u8> {
    let mut bytes = vec![0; count as usize * dtype.size()];
    for (i, element) in bytes.chunks_exact_mut(dtype.size()).enumerate() {
        store(element, dtype, (i as u64 * step) as f64);
    }
    bytes
}

/// A node that is being computed.
pub(super) struct HostCall<'a> {
    memory: &'a mut Memory,
    graph: &'a Graph,
    node: &'a Node,
    batch: u64,
}

impl HostCall<'_> {
    fn numbers(&self, operand: usize) -> Vec<f64> {
        gather(self.memory, self.graph, &self.node.accesses[operand], self.batch)
    }

    fn put(&mut self, operand: usize, values: &[f64]) {
        let access = self.node.accesses[operand];
        let dtype = self.graph.tensors[access.tensor].spec.dtype;
        let size = dtype.size();
        let places = places(self.graph, &access, self.batch);
        let bytes = self.memory.bytes_mut(access.tensor);
        for (at, value) in places.zip(values) {
            store(&mut bytes[at * size..(at + 1) * size], dtype, *value);
        }
    }

    /// Elements of a state, which is not read and written as a whole.
    fn put_at(&mut self, operand: usize, first: usize, values: &[f64]) {
        let tensor = self.node.accesses[operand].tensor;
        let dtype = self.graph.tensors[tensor].spec.dtype;
        let size = dtype.size();
        let bytes = &mut self.memory.bytes_mut(tensor)[first * size..];
        for (element, value) in bytes.chunks_exact_mut(size).zip(values) {
            store(element, dtype, *value);
        }
    }

    fn size(&self, operand: usize, at: usize) -> usize {
        self.graph.seen(&self.node.accesses[operand]).shape.get(at).map_or(1, |dim| dim.at(self.batch) as usize)
    }

    /// Whole numbers that are places among so many.
    fn indices(&self, operand: usize, below: usize) -> Result<Vec<usize>> {
        let values = self.numbers(operand);
        match values.iter().position(|value| !(*value >= 0.0 && *value < below as f64)) {
            None => Ok(values.into_iter().map(|value| value as usize).collect()),
            Some(i) => {
                let argument = self.node.operation.facts().operands[operand].name;
                let (found, expected) = (format!("{} at {i}", values[i]), format!("an index below {below}"));
                Err(crate::FlashInferError::InvalidArgument {
                    function: self.node.operation.name(),
                    argument,
                    found,
                    expected,
                })
            }
        }
    }

    fn parameter(&self, name: &str) -> f64 {
        self.node.operation.parameter(name)
    }
}

fn product(call: &HostCall<'_>) -> Vec<f64> {
    let (x, weight, inner) = (call.numbers(0), call.numbers(1), call.size(0, 1));
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    x.chunks_exact(inner).flat_map(|x| weight.chunks_exact(inner).map(move |w| dot(x, w))).collect()
}

pub(super) fn matmul(call: &mut HostCall<'_>) -> Result<()> {
    let out = product(call);
    call.put(2, &out);
    Ok(())
}

pub(super) fn matmul_bias(call: &mut HostCall<'_>) -> Result<()> {
    let (mut out, bias) = (product(call), call.numbers(2));
    out.chunks_exact_mut(bias.len()).for_each(|row| row.iter_mut().zip(&bias).for_each(|(x, b)| *x += b));
    call.put(3, &out);
    Ok(())
}

pub(super) fn matmul_add(call: &mut HostCall<'_>) -> Result<()> {
    let (mut out, residual) = (product(call), call.numbers(2));
    out.iter_mut().zip(&residual).for_each(|(x, r)| *x += r);
    call.put(2, &out);
    Ok(())
}

/// Through the reference of paged attention: the dense page table as the lists that it takes.
pub(super) fn decode_attention(call: &mut HostCall<'_>) -> Result<()> {
    let (rows, heads, size) = (call.size(0, 0), call.size(0, 1), call.size(0, 2));
    let (pages, page_size, width) = (call.size(1, 0), call.size(1, 1), call.size(3, 1));
    let lengths = call.indices(4, width * page_size + 1)?;
    let table = call.indices(3, pages)?;
    let (mut indices, mut starts, mut last) = (Vec::new(), vec![0i32], Vec::new());
    for (row, length) in table.chunks_exact(width).zip(&lengths) {
        let count = length.div_ceil(page_size);
        indices.extend(row[..count].iter().map(|page| *page as i32));
        starts.push(indices.len() as i32);
        last.push(if count == 0 { 0 } else { (length - (count - 1) * page_size) as i32 });
    }
    let queries: Vec<i32> = (0..=rows as i32).collect();
    let whole = |values: &mut Vec<i32>| {
        let count = [values.len() as i64];
        // An address that is not null for an empty list too.
        Layout::build(values.as_mut_ptr().cast(), Device::Cpu, DType::I32, &count, None, None)
    };
    let (mut queries, mut starts, mut indices, mut last) = (queries, starts, indices, last);
    let lists = [whole(&mut queries), whole(&mut starts), whole(&mut indices), whole(&mut last)];
    let arena = call.memory.arena.as_mut_ptr();
    let tensors: Vec<Layout> = [0, 1, 2, 5]
        .into_iter()
        .map(|operand| {
            let access = &call.node.accesses[operand];
            let data = match call.memory.spans[access.tensor] {
                Some(span) => arena.wrapping_add(span.offset as usize),
                None => call.memory.own[access.tensor].as_mut_ptr(),
            };
            match operand {
                // The result as heads.
                5 => {
                    let dtype = call.graph.tensors[access.tensor].spec.dtype;
                    let shape = [rows, heads, size].map(|size| size as i64);
                    Layout::build(data.cast(), Device::Cpu, dtype, &shape, None, None)
                }
                _ => call.graph.layout(access, call.batch, data, Device::Cpu),
            }
        })
        .collect();
    let packed: Vec<_> = tensors.iter().chain(&lists).map(Layout::pack).collect();
    let [q, k, v, o, queries, starts, indices, last] = &packed[..] else { unreachable!("eight were packed") };
    let tensor = Arg::dl_tensor;
    let args = [
        tensor(q),
        tensor(k),
        tensor(v),
        tensor(o),
        Arg::NONE,
        Arg::NONE,
        tensor(queries),
        tensor(starts),
        tensor(indices),
        tensor(last),
        Arg::int(0),
        Arg::bool(false),
        Arg::int(-1),
        Arg::float(0.0),
        Arg::float(call.parameter("scale")),
        Arg::float(1.0),
    ];
    let module: &Module = reference::module()?;
    // SAFETY: as for `run_row`; the lists outlive the call.
    unsafe { module.function("attention_paged")?.launch_unseen(&args) }
}

/// The place of each row's token in a cache, in elements: by its position and the page table, at these operands, of the cache
/// behind the table.
fn entries(call: &HostCall<'_>, positions: usize, table: usize, most: usize) -> Result<(Vec<usize>, Vec<usize>)> {
    let cache = table + 1;
    let (pages, page_size, width) = (call.size(cache, 0), call.size(cache, 1), call.size(table, 1));
    let token = call.size(cache, 2) * call.size(cache, 3);
    let positions = call.indices(positions, most)?;
    if let Some(row) = positions.iter().position(|position| position / page_size >= width) {
        let length = positions[row] as u64 + 1;
        return Err(GraphError::ContextTooLong { row: row as u64, length, capacity: (width * page_size) as u64 }.into());
    }
    let table = call.indices(table, pages)?;
    let entry = |(row, position): (usize, &usize)| {
        (table[row * width + position / page_size] * page_size + position % page_size) * token
    };
    let entries = positions.iter().enumerate().map(entry).collect();
    Ok((positions, entries))
}

/// Writes each row's keys and values to its place in the caches, at this operand and behind it.
fn put_tokens(call: &mut HostCall<'_>, entries: &[usize], cache: usize, [keys, values]: [&[f64]; 2]) {
    let token = call.size(cache, 2) * call.size(cache, 3);
    for ((entry, key), value) in entries.iter().zip(keys.chunks_exact(token)).zip(values.chunks_exact(token)) {
        call.put_at(cache, *entry, key);
        call.put_at(cache + 1, *entry, value);
    }
}

pub(super) fn append(call: &mut HostCall<'_>) -> Result<()> {
    let (_, entries) = entries(call, 2, 3, i32::MAX as usize)?;
    let (keys, values) = (call.numbers(0), call.numbers(1));
    put_tokens(call, &entries, 4, [&keys, &values]);
    Ok(())
}
