//! The operations, as data: one row of [`TABLE`] for each, which says what it takes, what it overwrites, what it makes,
//! what it costs, which kernel serves it and how the host computes it.

use super::error::GraphError;
use super::graph::{Access, Target};
use super::host::{self, HostCall, fused};
use super::plan::aligned;
use super::shape::{Columns, Dim, Spec, sizes};
use crate::engine::Entry;
use crate::error::Result;
use crate::kernels::{activation, decode, gdn, norm, page, rope};
use crate::tensor::DType;

/// What an operation does with an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// It is read.
    Read,
    /// It is read and overwritten in place.
    Overwrite,
    /// It is a result in memory of its own, whatever was there.
    Write,
}

impl Role {
    /// Whether what was there is read.
    pub const fn reads(self) -> bool {
        !matches!(self, Self::Write)
    }

    /// Whether it is written.
    pub const fn writes(self) -> bool {
        !matches!(self, Self::Read)
    }
}

/// One operand of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct OperandFacts {
    /// Its name, by which errors call it.
    pub name: &'static str,
    /// What is done with it.
    pub role: Role,
    /// Whether it may be columns of a larger tensor.
    pub strided: bool,
}

const fn read(name: &'static str) -> OperandFacts {
    OperandFacts { name, role: Role::Read, strided: false }
}

/// Read, and may be columns of something larger.
const fn part(name: &'static str) -> OperandFacts {
    OperandFacts { name, role: Role::Read, strided: true }
}

const fn over(name: &'static str) -> OperandFacts {
    OperandFacts { name, role: Role::Overwrite, strided: true }
}

/// Overwritten, and never columns of something larger.
const fn over_whole(name: &'static str) -> OperandFacts {
    OperandFacts { name, role: Role::Overwrite, strided: false }
}

const fn made(name: &'static str) -> OperandFacts {
    OperandFacts { name, role: Role::Write, strided: false }
}

/// What a kernel does before it waits for the kernels ahead of it, where it is launched so that it may start before
/// they end (programmatic dependent launch).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PdlBefore {
    /// It waits before it touches anything that a graph may write: the edge to it may be programmatic.
    Waits,
    /// It never waits, or reads something before: the edge to it must be full.
    Full,
}

/// When a kernel lets those behind it start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PdlAfter {
    /// When it ends.
    AtEnd,
    /// Once it has waited itself, before it ends: what is behind it starts only then, and waits for its stores.
    Early,
    /// Before it waits itself: what is behind it may start while what is ahead of it still runs.
    BeforeItsOwnWait,
}

/// What is known of an operation.
#[non_exhaustive]
pub struct Facts {
    /// Which one it is.
    pub kind: OpKind,
    /// Its name, in exports too.
    pub name: &'static str,
    /// What it computes.
    pub summary: &'static str,
    /// Its operands; those that are results in memory of their own are the last.
    pub operands: &'static [OperandFacts],
    /// The names of its parameters, in order.
    pub parameters: &'static [&'static str],
    /// How many kernels it launches.
    pub kernels: u32,
    /// What the kernel does before it waits.
    pub before: PdlBefore,
    /// When it lets others start.
    pub after: PdlAfter,
    /// Checks the operands that are given, and answers those that are made.
    pub(super) rule: fn(&Check<'_>) -> Result<Vec<Spec>, GraphError>,
    /// The call of a kernel that has a row, where there is one.
    pub(super) call: Option<fn(&Given<'_>) -> RowCall>,
    /// Computes it on the host, where there is no row to do so, or the row has not the type.
    pub(super) host: Option<fn(&mut HostCall<'_>) -> Result<()>>,
    /// Bytes of memory that it needs beside its operands, for its own time alone.
    pub(super) workspace: fn(&Given<'_>) -> u64,
    /// Floating-point operations.
    pub(super) flops: fn(&Given<'_>) -> u64,
    /// Which operands are not touched in full: how many bytes of such a one are.
    pub(super) touched: fn(&Given<'_>, usize) -> Option<u64>,
}

impl std::fmt::Debug for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Facts").field("name", &self.name).field("operands", &self.operands).finish_non_exhaustive()
    }
}

/// An operation with its parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    pub(super) kind: OpKind,
    pub(super) parameters: Vec<f64>,
}

impl Operation {
    pub(super) fn new(kind: OpKind, parameters: &[f64]) -> Self {
        Self { kind, parameters: parameters.to_vec() }
    }

    /// Which one it is.
    pub fn kind(&self) -> OpKind {
        self.kind
    }

    /// What is known of it.
    pub fn facts(&self) -> &'static Facts {
        &TABLE[self.kind as usize]
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.facts().name
    }

    /// A parameter of this name; 0 for one that it does not have.
    pub fn parameter(&self, name: &str) -> f64 {
        let place = self.facts().parameters.iter().position(|known| *known == name);
        place.and_then(|i| self.parameters.get(i).copied()).unwrap_or(0.0)
    }

    pub(super) fn is_on(&self, name: &str) -> bool {
        self.parameter(name) != 0.0
    }
}

/// Every operation.
pub fn operations() -> &'static [Facts] {
    &TABLE
}

/// The operands that an operation is given, to be checked.
pub(super) struct Check<'a> {
    pub(super) op: &'a str,
    pub(super) operation: &'a Operation,
    pub(super) specs: &'a [Spec],
    pub(super) target: Target,
}

impl Check<'_> {
    fn argument(&self, i: usize) -> &'static str {
        self.operation.facts().operands[i].name
    }

    fn shape_error(&self, i: usize, expected: String) -> GraphError {
        let found = sizes(&self.specs[i].shape);
        GraphError::ShapeMismatch { op: self.op.to_owned(), argument: self.argument(i), found, expected }
    }

    /// The sizes of an operand that has `N` of them.
    fn rank<const N: usize>(&self, i: usize, form: &str) -> Result<[Dim; N], GraphError> {
        self.specs[i].shape.as_slice().try_into().map_err(|_| self.shape_error(i, form.to_owned()))
    }

    fn shape(&self, i: usize, expected: &[Dim]) -> Result<(), GraphError> {
        if self.specs[i].shape == expected { Ok(()) } else { Err(self.shape_error(i, sizes(expected))) }
    }

    /// A size that does not grow with the batch and is not 0.
    fn fixed(&self, i: usize, at: usize) -> Result<u64, GraphError> {
        match self.specs[i].shape.get(at).and_then(|dim| dim.constant()) {
            Some(size) if size > 0 => Ok(size),
            _ => Err(self.shape_error(i, format!("a constant size above 0 at place {at}"))),
        }
    }

    fn dtype(&self, i: usize, allowed: &[DType]) -> Result<DType, GraphError> {
        let found = self.specs[i].dtype;
        if allowed.contains(&found) {
            return Ok(found);
        }
        let expected: Vec<_> = allowed.iter().map(DType::to_string).collect();
        let (op, argument) = (self.op.to_owned(), self.argument(i));
        Err(GraphError::DTypeMismatch { op, argument, found: found.to_string(), expected: expected.join(" or ") })
    }

    /// What kernels compute with; on the host F32 too.
    fn half(&self, i: usize) -> Result<DType, GraphError> {
        match self.target {
            Target::Gpu => self.dtype(i, &[DType::BF16, DType::F16]),
            Target::Host => self.dtype(i, &[DType::BF16, DType::F16, DType::F32]),
        }
    }

    fn float(&self, i: usize) -> Result<DType, GraphError> {
        self.dtype(i, &[DType::BF16, DType::F16, DType::F32])
    }

    fn same_dtype(&self, i: usize, as_of: usize) -> Result<(), GraphError> {
        self.dtype(i, &[self.specs[as_of].dtype]).map(|_| ())
    }

    fn positive(&self, parameter: &'static str) -> Result<(), GraphError> {
        let value = self.operation.parameter(parameter);
        if (value as f32).is_normal() && value > 0.0 {
            return Ok(());
        }
        let expected = "a positive number that an f32 holds in full";
        Err(GraphError::Parameter { op: self.op.to_owned(), parameter, found: value.to_string(), expected })
    }

    /// The page table, the lengths or positions beside it, and the caches, for so many rows and heads of a size.
    fn paged(&self, table: usize, at: usize, caches: [usize; 2], rows: Dim, heads: [Dim; 2]) -> Result<(), GraphError> {
        let [of_table, _] = self.rank(table, "[rows, pages of a row]")?;
        if of_table != rows {
            return Err(self.shape_error(table, format!("[{rows}, pages of a row]")));
        }
        self.fixed(table, 1)?;
        self.dtype(table, &[DType::I32])?;
        self.shape(at, &[rows])?;
        self.dtype(at, &[DType::I32])?;
        for cache in caches {
            let [_, _, kv_heads, size] = self.rank(cache, "[pages, page size, heads, head size]")?;
            if [kv_heads, size] != heads {
                let [kv_heads, size] = heads;
                return Err(self.shape_error(cache, format!("[pages, page size, {kv_heads}, {size}]")));
            }
            self.fixed(cache, 0)?;
            self.fixed(cache, 1)?;
        }
        let first = &self.specs[caches[0]];
        self.shape(caches[1], &first.shape)?;
        self.same_dtype(caches[1], caches[0])
    }
}

/// An operation with all of its operands, for a batch.
pub(super) struct Given<'a> {
    pub(super) operation: &'a Operation,
    pub(super) specs: &'a [Spec],
    pub(super) batch: u64,
}

impl Given<'_> {
    fn size(&self, operand: usize, at: usize) -> u64 {
        self.specs[operand].shape.get(at).map_or(1, |dim| dim.at(self.batch))
    }

    fn elements(&self, operand: usize) -> u64 {
        self.specs[operand].elements(self.batch)
    }

    /// The call of the kernel that has a row, where there is one for these types: none appends F32, which only the host
    /// knows.
    pub(super) fn call(&self) -> Option<RowCall> {
        let facts = self.operation.facts();
        let without = facts.kind == OpKind::Append && self.specs[0].dtype == DType::F32;
        facts.call.filter(|_| !without).map(|call| call(self))
    }

    pub(super) fn workspace(&self) -> u64 {
        (self.operation.facts().workspace)(self)
    }

    /// Of the workspace of a product with something around it: what normed rows take, at its beginning.
    pub(super) fn normed_bytes(&self, normed: bool) -> u64 {
        if normed { aligned(self.specs[0].bytes(self.batch)) } else { 0 }
    }

    pub(super) fn flops(&self) -> u64 {
        (self.operation.facts().flops)(self)
    }

    /// What is moved at least: each operand once for reading and once for writing.
    pub(super) fn bytes(&self) -> u64 {
        let facts = self.operation.facts();
        let moved = facts.operands.iter().enumerate().map(|(i, operand)| {
            let times = u64::from(operand.role.reads()) + u64::from(operand.role.writes());
            match (facts.touched)(self, i) {
                Some(bytes) => bytes,
                None => self.specs[i].bytes(self.batch).saturating_mul(times),
            }
        });
        moved.fold(0, u64::saturating_add)
    }
}

impl RowArgument {
    /// The part of a tensor that an argument is, of a node's accesses.
    pub(super) fn access(self, accesses: &[Access], specs: &[Spec]) -> Option<Access> {
        match self {
            Self::Operand(i) => Some(accesses[i]),
            Self::Heads(i, heads) => {
                let width = specs[i].shape.last().and_then(|dim| dim.constant()).unwrap_or(0);
                let start = accesses[i].columns.map_or(0, |columns| columns.start);
                Some(Access { columns: Some(Columns { start, width, heads }), ..accesses[i] })
            }
            _ => None,
        }
    }
}

/// A call of a kernel that has a row.
pub(super) struct RowCall {
    pub(super) entry: Entry,
    pub(super) arguments: Vec<RowArgument>,
}

/// What a row's argument is, of an operation's operands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum RowArgument {
    /// An operand.
    Operand(usize),
    /// An operand that lies in a row, as one dimension.
    Flat(usize),
    /// An operand of rows, as so many heads.
    Heads(usize, u64),
    /// So many whole numbers: 0, then each larger than the one ahead of it by a step. They never change, so a device
    /// has them once.
    Ramp { dtype: DType, count: u64, step: u64 },
    /// Scratch memory of so many bytes.
    Scratch(u64),
    /// A number.
    Number(f64),
    /// A whole number.
    Whole(i64),
    /// On or off.
    Flag(bool),
    /// Programmatic dependent launch: on where the edge to the node is programmatic.
    Pdl,
}

use RowArgument::{Flag, Flat, Heads, Number, Operand, Pdl, Ramp, Scratch, Whole};

fn row<K: crate::engine::Kernel>(arguments: &[RowArgument]) -> RowCall {
    RowCall { entry: Entry::of::<K>(), arguments: arguments.to_vec() }
}

/// A row of which an operation chooses one.
fn either<A: crate::engine::Kernel, B: crate::engine::Kernel>(first: bool, arguments: &[RowArgument]) -> RowCall {
    if first { row::<A>(arguments) } else { row::<B>(arguments) }
}

/// The bytes that `gdn_prefill` keeps its descriptors in.
const GDN_WORKSPACE: u64 = 128 << 10;
/// The multiprocessors of the largest Hopper GPU: XQA divides rows so that its blocks fill them (`csrc/xqa/mha.cu`,
/// `nbSubSeqPerSeq`).
const MULTIPROCESSORS: u64 = 132;

/// What XQA keeps between the blocks that share a row: of each the maxima and the sums of its heads, in up to 32 single
/// precision numbers, and a result of up to 8 heads; rounded up, since upstream does not say how many bytes its scratch
/// must have.
fn attention_workspace(given: &Given<'_>) -> u64 {
    let (rows, heads, size, kv_heads) = (given.size(0, 0), given.size(0, 1), given.size(0, 2), given.size(1, 2));
    let pairs = (rows * kv_heads).max(1);
    let parts = (MULTIPROCESSORS / pairs).max(1);
    let of_part = 2 * 32 * 4 + (heads / kv_heads.max(1)).max(8) * size * 4;
    parts * pairs * of_part + 512
}

fn none(_: &Given<'_>) -> u64 {
    0
}

fn full(_: &Given<'_>, _: usize) -> Option<u64> {
    None
}

/// A table of which each row of the batch reads one row, at operand 1.
fn gathered(given: &Given<'_>, operand: usize) -> Option<u64> {
    (operand == 1).then(|| given.size(0, 0) * given.size(1, 1) * given.specs[1].dtype.size() as u64)
}

/// Rows of a cos and sin table, at operand 2.
fn angles(given: &Given<'_>, operand: usize) -> Option<u64> {
    (operand == 2).then(|| given.size(0, 0) * given.size(2, 1) * 4)
}

/// What is appended to the caches at operands 4 and 5.
fn appended(given: &Given<'_>, operand: usize) -> Option<u64> {
    matches!(operand, 4 | 5).then(|| given.elements(0) * given.specs[operand].dtype.size() as u64)
}

/// Half of what a row's pages hold, of the caches at operands 1 and 2: that many tokens are read on the way to a full one.
fn attended(given: &Given<'_>, operand: usize) -> Option<u64> {
    let token = given.size(1, 2) * given.size(1, 3) * given.specs[1].dtype.size() as u64;
    let tokens = given.elements(3).saturating_mul(given.size(1, 1)) / 2;
    matches!(operand, 1 | 2).then(|| token.saturating_mul(tokens))
}

fn rule_norm(c: &Check<'_>) -> Result<Vec<Spec>, GraphError> {
    let [rows, columns] = c.rank(0, "[rows, columns]")?;
    c.half(0)?;
    c.shape(1, &[columns])?;
    c.same_dtype(1, 0)?;
    c.positive("eps")?;
    Ok(vec![Spec::new(c.specs[0].dtype, [rows, columns])])
}

fn rule_matmul(c: &Check<'_>, bias: bool, residual: bool) -> Result<Vec<Spec>, GraphError> {
    let [rows, inner] = c.rank(0, "[rows, K]")?;
    c.half(0)?;
    let [columns, weight_inner] = c.rank(1, "[N, K]")?;
    c.fixed(1, 0)?;
    if weight_inner != inner {
        return Err(c.shape_error(1, format!("[N, {inner}]")));
    }
    c.same_dtype(1, 0)?;
    if bias {
        c.shape(2, &[columns])?;
        c.same_dtype(2, 0)?;
    }
    if residual {
        c.shape(2, &[rows, columns])?;
        c.same_dtype(2, 0)?;
        return Ok(Vec::new());
    }
    let dtype = if c.operation.is_on("f32_out") { DType::F32 } else { c.specs[0].dtype };
    Ok(vec![Spec::new(dtype, [rows, columns])])
}

fn matmul_flops(given: &Given<'_>) -> u64 {
    given.elements(0).saturating_mul(given.size(1, 0)).saturating_mul(2)
}

fn rule_gated(c: &Check<'_>) -> Result<Vec<Spec>, GraphError> {
    let [rows, _] = c.rank(0, "[rows, 2 d]")?;
    c.half(0)?;
    let width = c.fixed(0, 1)?;
    if !width.is_multiple_of(2) {
        return Err(c.shape_error(0, format!("[{rows}, 2 d], an even number of columns")));
    }
    Ok(vec![Spec::new(c.specs[0].dtype, [rows, Dim::fixed(width / 2)])])
}

/// x, [the norm's weight], the weight: what is computed with a product in one kernel.
fn rule_around(c: &Check<'_>, normed: bool, gated: bool) -> Result<Vec<Spec>, GraphError> {
    let [rows, inner] = c.rank(0, "[rows, K]")?;
    c.half(0)?;
    let weight = if normed {
        // Numbers are multiplied by the norm's weight before they are made small, and F16 ends at 65504.
        c.dtype(0, if c.target == Target::Gpu { &[DType::BF16] } else { &[DType::BF16, DType::F32] })?;
        c.shape(1, &[inner])?;
        c.same_dtype(1, 0)?;
        c.positive("eps")?;
        2
    } else {
        1
    };
    let [_, weight_inner] = c.rank(weight, "[N, K]")?;
    if weight_inner != inner {
        return Err(c.shape_error(weight, format!("[N, {inner}]")));
    }
    c.same_dtype(weight, 0)?;
    let columns = c.fixed(weight, 0)?;
    if gated && !columns.is_multiple_of(2) {
        return Err(c.shape_error(weight, format!("[2 d, {inner}], an even number of rows")));
    }
    let dtype = if c.operation.is_on("f32_out") { DType::F32 } else { c.specs[0].dtype };
    Ok(vec![Spec::new(dtype, [rows, Dim::fixed(if gated { columns / 2 } else { columns })])])
}

/// Of what is computed with a product in one kernel, where the weight is.
fn around_flops(given: &Given<'_>, weight: usize) -> u64 {
    given.elements(0).saturating_mul(given.size(weight, 0)).saturating_mul(2)
}

/// What a product needs where its norm and its gate are kernels of their own: normed rows, and behind them both halves.
fn around_workspace(given: &Given<'_>, normed: bool, gated: bool) -> u64 {
    let (bytes, columns) = (given.specs[0].dtype.size() as u64, given.size(if normed { 2 } else { 1 }, 0));
    let both = if gated { given.size(0, 0).saturating_mul(columns).saturating_mul(bytes) } else { 0 };
    given.normed_bytes(normed).saturating_add(aligned(both))
}

/// q, k, v, [q and k weights], cos and sin, positions, lengths, table, caches: turned, appended and attended to.
fn rule_turned_attention(c: &Check<'_>, normed: bool) -> Result<Vec<Spec>, GraphError> {
    let ([rows, heads, size], next) = rule_turned(c, normed)?;
    let caches = [next + 4, next + 5];
    c.paged(next + 3, next + 1, caches, rows, [heads, size])?;
    c.paged(next + 3, next + 2, caches, rows, [heads, size])?;
    c.same_dtype(next + 4, 0)?;
    c.positive("scale")?;
    let (q, kv, head) = (c.fixed(0, 1)?, c.fixed(1, 1)?, c.fixed(0, 2)?);
    if !q.is_multiple_of(kv) {
        return Err(c.shape_error(0, format!("[{rows}, a multiple of {kv} heads, {size}]")));
    }
    if c.target == Target::Gpu && (!matches!(head, 64 | 128) || q / kv > 8) {
        let reason = format!(
            "{} heads of queries for each of keys, of {head}, and the kernel is for up to 8, of 64 or 128",
            q / kv
        );
        let remedy = "leave the rule out that makes this operation, and attention is a kernel of its own";
        return Err(GraphError::UnsupportedKernel { op: c.op.to_owned(), reason, remedy });
    }
    Ok(vec![Spec::new(c.specs[0].dtype, [rows, Dim::fixed(q * head)])])
}

/// Of these: the angles' rows, and of the caches what is appended and half of what a row's pages hold.
fn turned_attention_touched(given: &Given<'_>, operand: usize, first: usize) -> Option<u64> {
    if operand == first {
        return Some(given.size(0, 0) * given.size(first, 1) * 4);
    }
    let (table, caches) = (first + 3, [first + 4, first + 5]);
    caches.contains(&operand).then(|| {
        let token = given.size(operand, 2) * given.size(operand, 3) * given.specs[operand].dtype.size() as u64;
        let tokens = given.elements(table).saturating_mul(given.size(operand, 1)) / 2;
        token.saturating_mul(tokens).saturating_add(token * given.size(0, 0))
    })
}

fn turned_attention_flops(given: &Given<'_>, first: usize) -> u64 {
    let tokens = given.size(first + 3, 1).saturating_mul(given.size(first + 4, 1)) / 2;
    given.elements(0).saturating_mul(4).saturating_mul(tokens)
}

fn rule_pair(c: &Check<'_>) -> Result<Vec<Spec>, GraphError> {
    c.rank::<2>(0, "[rows, columns]")?;
    c.float(0)?;
    c.shape(1, &c.specs[0].shape)?;
    c.same_dtype(1, 0)?;
    Ok(Vec::new())
}

fn rule_one(c: &Check<'_>) -> Result<Vec<Spec>, GraphError> {
    c.rank::<2>(0, "[rows, columns]")?;
    c.float(0)?;
    Ok(Vec::new())
}

fn rule_rope(c: &Check<'_>) -> Result<Vec<Spec>, GraphError> {
    let [rows, _, size] = c.rank(0, "[rows, heads, head size]")?;
    c.half(0)?;
    let [key_rows, key_heads, key_size] = c.rank(1, "[rows, heads, head size]")?;
    if (key_rows, key_size) != (rows, size) {
        return Err(c.shape_error(1, format!("[{rows}, {key_heads}, {size}]")));
    }
    c.same_dtype(1, 0)?;
    rule_angles(c, 2, 3, rows, size)?;
    Ok(Vec::new())
}

fn rule_angles(c: &Check<'_>, table: usize, positions: usize, rows: Dim, size: Dim) -> Result<(), GraphError> {
    c.rank::<2>(table, "[positions, rotary size]")?;
    let (rotary, size) = (c.fixed(table, 1)?, size.constant().unwrap_or(0));
    if !rotary.is_multiple_of(2) || rotary > size {
        return Err(c.shape_error(table, format!("[positions, an even number of at most {size}]")));
    }
    c.dtype(table, &[DType::F32])?;
    c.shape(positions, &[rows])?;
    c.dtype(positions, &[DType::I32])?;
    Ok(())
}

fn rule_append(c: &Check<'_>) -> Result<Vec<Spec>, GraphError> {
    let [rows, heads, size] = c.rank(0, "[rows, heads, head size]")?;
    c.half(0)?;
    c.shape(1, &c.specs[0].shape)?;
    c.same_dtype(1, 0)?;
    c.paged(3, 2, [4, 5], rows, [heads, size])?;
    c.same_dtype(4, 0)?;
    Ok(Vec::new())
}

/// q, k, v, [q and k weights], cos and sin, positions: the rows, the heads of keys and their size, and where the angles are.
fn rule_turned(c: &Check<'_>, normed: bool) -> Result<([Dim; 3], usize), GraphError> {
    let [rows, _, size] = c.rank(0, "[rows, heads, head size]")?;
    c.half(0)?;
    let [_, heads, _] = c.rank(1, "[rows, heads, head size]")?;
    c.shape(1, &[rows, heads, size])?;
    c.shape(2, &[rows, heads, size])?;
    c.same_dtype(1, 0)?;
    c.same_dtype(2, 0)?;
    let next = if normed {
        for weight in [3, 4] {
            c.shape(weight, &[size])?;
            c.same_dtype(weight, 0)?;
        }
        c.positive("eps")?;
        5
    } else {
        3
    };
    rule_angles(c, next, next + 1, rows, size)?;
    Ok(([rows, heads, size], next))
}

/// These, the table and the caches.
fn rule_turned_append(c: &Check<'_>, normed: bool) -> Result<Vec<Spec>, GraphError> {
    let ([rows, heads, size], next) = rule_turned(c, normed)?;
    c.paged(next + 2, next + 1, [next + 3, next + 4], rows, [heads, size])?;
    c.same_dtype(next + 3, 0)?;
    Ok(Vec::new())
}

/// Of the fused ones: what is appended to the caches, and the angles' rows.
fn turned_touched(given: &Given<'_>, operand: usize, first: usize) -> Option<u64> {
    if operand == first {
        return Some(given.size(0, 0) * given.size(first, 1) * 4);
    }
    let cache = operand == first + 3 || operand == first + 4;
    cache.then(|| given.elements(1) * given.specs[operand].dtype.size() as u64)
}

fn rule_attention(c: &Check<'_>) -> Result<Vec<Spec>, GraphError> {
    let [rows, _, size] = c.rank(0, "[rows, heads, head size]")?;
    c.half(0)?;
    let [_, _, kv_heads, _] = c.rank(1, "[pages, page size, heads, head size]")?;
    c.paged(3, 4, [1, 2], rows, [kv_heads, size])?;
    c.same_dtype(1, 0)?;
    c.positive("scale")?;
    let (q, kv, head) = (c.fixed(0, 1)?, c.fixed(1, 2)?, c.fixed(0, 2)?);
    if !q.is_multiple_of(kv) {
        return Err(c.shape_error(0, format!("[{rows}, a multiple of {kv} heads, {size}]")));
    }
    let unsupported = |reason: String, remedy| GraphError::UnsupportedKernel { op: c.op.to_owned(), reason, remedy };
    if c.target == Target::Gpu {
        if !matches!(head, 64 | 128 | 256) {
            return Err(unsupported(
                format!("heads of {head}, and decode is compiled for 64, 128 and 256"),
                "use the prefill kernels for this model",
            ));
        }
        if !matches!(q / kv, 1 | 2 | 3 | 4 | 8) {
            return Err(unsupported(
                format!("{} heads of queries for each of keys, and decode is compiled for 1, 2, 3, 4 and 8", q / kv),
                "use the prefill kernels for this model",
            ));
        }
    }
    Ok(vec![Spec::new(c.specs[0].dtype, [rows, Dim::fixed(q * head)])])
}

fn rule_delta(c: &Check<'_>) -> Result<Vec<Spec>, GraphError> {
    let [rows, _, size] = c.rank(0, "[rows, heads, head size]")?;
    c.half(0)?;
    let [_, k_heads, _] = c.rank(1, "[rows, heads, head size]")?;
    c.shape(1, &[rows, k_heads, size])?;
    let [_, v_heads, _] = c.rank(2, "[rows, heads, head size]")?;
    c.shape(2, &[rows, v_heads, size])?;
    let heads = c.fixed(0, 1)?.max(c.fixed(2, 1)?);
    for number in [3, 4] {
        c.shape(number, &[rows, Dim::fixed(heads)])?;
        c.dtype(number, &[DType::F32])?;
    }
    c.shape(5, &[rows, Dim::fixed(heads), size, size])?;
    c.dtype(5, &[DType::F32])?;
    let head = c.fixed(0, 2)?;
    Ok(vec![Spec::new(c.specs[0].dtype, [rows, Dim::fixed(heads * head)])])
}

macro_rules! table {
    ($($(#[$doc:meta])* $kind:ident { $($field:ident: $value:expr),+ $(,)? })+) => {
        /// Which operation it is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum OpKind {
            $($(#[$doc])* $kind),+
        }

        static TABLE: [Facts; [$(OpKind::$kind),+].len()] = [$(Facts { $($field: $value,)+ ..PLAIN(OpKind::$kind) }),+];
    };
}

/// What most operations have in common.
#[allow(non_snake_case, reason = "it stands where a constant would, but for its argument")]
const fn PLAIN(kind: OpKind) -> Facts {
    Facts {
        kind,
        name: "",
        summary: "",
        operands: &[],
        parameters: &[],
        kernels: 1,
        // The kernels that this crate writes wait first and let others start then, FlashInfer's after their stores.
        before: PdlBefore::Waits,
        after: PdlAfter::Early,
        rule: |_| Ok(Vec::new()),
        call: None,
        host: None,
        workspace: none,
        flops: none,
        touched: full,
    }
}

table! {
    /// Rows of a table.
    Embedding {
        name: "embedding",
        summary: "out[b] = scale · table[ids[b]]",
        operands: &[read("ids"), read("table"), made("out")],
        parameters: &["scale"],
        rule: |c| {
            let [rows] = c.rank(0, "[rows]")?;
            c.dtype(0, &[DType::I32])?;
            let [_, columns] = c.rank(1, "[tokens, columns]")?;
            c.half(1)?;
            c.positive("scale")?;
            Ok(vec![Spec::new(c.specs[1].dtype, [rows, columns])])
        },
        call: Some(|given| {
            let scale = Number(given.operation.parameter("scale"));
            row::<decode::Embedding>(&[Operand(2), Operand(0), Operand(1), scale, Pdl])
        }),
        touched: gathered,
    }
    /// RMSNorm.
    RmsNorm {
        name: "rmsnorm",
        summary: "out = input / √(mean(input²) + eps) · weight, or · (1 + weight) for Gemma",
        operands: &[part("input"), read("weight"), made("out")],
        parameters: &["eps", "gemma"],
        rule: rule_norm,
        call: Some(|given| {
            let arguments = [Operand(2), Operand(0), Operand(1), Number(given.operation.parameter("eps")), Pdl];
            either::<norm::GemmaRmsnorm, norm::Rmsnorm>(given.operation.is_on("gemma"), &arguments)
        }),
        flops: |given| 4 * given.elements(0),
    }
    /// A sum, and its RMSNorm.
    FusedAddRmsNorm {
        name: "fused_add_rmsnorm",
        summary: "residual ← input + residual, then input ← rmsnorm(residual)",
        operands: &[over("input"), over("residual"), read("weight")],
        parameters: &["eps", "gemma"],
        rule: |c| {
            let [_, columns] = c.rank(0, "[rows, columns]")?;
            c.half(0)?;
            c.shape(1, &c.specs[0].shape)?;
            c.same_dtype(1, 0)?;
            c.shape(2, &[columns])?;
            c.same_dtype(2, 0)?;
            c.positive("eps")?;
            Ok(Vec::new())
        },
        call: Some(|given| {
            let arguments = [Operand(0), Operand(1), Operand(2), Number(given.operation.parameter("eps")), Pdl];
            either::<norm::GemmaFusedAddRmsnorm, norm::FusedAddRmsnorm>(given.operation.is_on("gemma"), &arguments)
        }),
        flops: |given| 5 * given.elements(0),
    }
    /// RMSNorm of every head, in place.
    HeadRmsNorm {
        name: "head_rmsnorm",
        summary: "heads ← rmsnorm(heads), each by itself",
        operands: &[over("heads"), read("weight")],
        parameters: &["eps"],
        rule: |c| {
            let [_, _, size] = c.rank(0, "[rows, heads, head size]")?;
            c.half(0)?;
            c.shape(1, &[size])?;
            c.same_dtype(1, 0)?;
            c.positive("eps")?;
            Ok(Vec::new())
        },
        call: Some(|given| {
            let eps = Number(given.operation.parameter("eps"));
            row::<norm::RmsnormPerHead>(&[Operand(0), Operand(0), Operand(1), eps, Pdl])
        }),
        flops: |given| 4 * given.elements(0),
    }
    /// Rotary embeddings of queries and keys, in place.
    Rope {
        name: "rope",
        summary: "q, k ← turned by the angles of their positions",
        operands: &[over("q"), over("k"), read("cos_sin"), read("positions")],
        parameters: &["interleave"],
        before: PdlBefore::Full,
        after: PdlAfter::AtEnd,
        rule: rule_rope,
        call: Some(|given| {
            let interleave = Flag(given.operation.is_on("interleave"));
            let arguments = [Operand(0), Operand(1), Operand(0), Operand(1), Operand(2), Operand(3), interleave];
            row::<rope::ApplyRopeWithCosSinCacheInPlace>(&arguments)
        }),
        flops: |given| 3 * (given.elements(0) + given.elements(1)),
        touched: angles,
    }
    /// Keys and values into a paged cache.
    Append {
        name: "append",
        summary: "k_cache, v_cache at the positions' entries ← k, v",
        operands: &[
            part("k"), part("v"), read("positions"), read("page_table"), over_whole("k_cache"), over_whole("v_cache"),
        ],
        before: PdlBefore::Full,
        after: PdlAfter::AtEnd,
        rule: rule_append,
        call: Some(|given| {
            let (rows, pages) = (given.size(3, 0), given.size(3, 1));
            let ramp = |count, step| Ramp { dtype: DType::I32, count, step };
            row::<page::AppendPagedKvCache>(&[
                Operand(0), Operand(1), ramp(rows, 1), Operand(2), Operand(4), Operand(5), Flat(3),
                // Every row has as many pages as the table is wide.
                ramp(rows + 1, pages), ramp(rows, 0), Whole(0),
            ])
        }),
        host: Some(host::append),
        touched: appended,
    }
    /// Attention of one query for each row over a paged cache.
    DecodeAttention {
        name: "decode_attention",
        summary: "out = softmax(scale · q kᵀ) v over the row's length",
        operands: &[
            part("q"), read("k_cache"), read("v_cache"), read("page_table"), read("lengths"), made("out"),
        ],
        parameters: &["scale"],
        // XQA lets others start before it waits; it waits before it reads.
        after: PdlAfter::BeforeItsOwnWait,
        rule: rule_attention,
        host: Some(host::decode_attention),
        workspace: attention_workspace,
        flops: |given| {
            let tokens = given.size(3, 1).saturating_mul(given.size(1, 1)) / 2;
            given.elements(0).saturating_mul(4).saturating_mul(tokens)
        },
        touched: attended,
    }
    /// A product with a weight.
    MatMul {
        name: "matmul",
        summary: "out = x · weightᵀ",
        operands: &[part("x"), read("weight"), made("out")],
        parameters: &["f32_out"],
        // Kernels of this crate's own read the weight ahead of their wait, which nothing in a graph writes, and let others start before
        // it. cuBLASLt's are never launched so that they may start early, and what is behind one starts when it has ended.
        rule: |c| rule_matmul(c, false, false),
        host: Some(host::matmul),
        flops: matmul_flops,
    }
    /// A product with a weight, and a bias.
    MatMulBias {
        name: "matmul_bias",
        summary: "out = x · weightᵀ + bias",
        operands: &[part("x"), read("weight"), read("bias"), made("out")],
        parameters: &["f32_out"],
        rule: |c| rule_matmul(c, true, false),
        host: Some(host::matmul_bias),
        flops: matmul_flops,
    }
    /// A product with a weight, added to a residual.
    MatMulAdd {
        name: "matmul_add",
        summary: "residual ← residual + x · weightᵀ",
        operands: &[part("x"), read("weight"), over("residual")],
        rule: |c| rule_matmul(c, false, true),
        host: Some(host::matmul_add),
        flops: matmul_flops,
    }
    /// SiLU of one half, times the other.
    SiluAndMul {
        name: "silu_and_mul",
        summary: "out = silu(input[..d]) · input[d..]",
        operands: &[read("input"), made("out")],
        rule: rule_gated,
        call: Some(|_| row::<activation::SiluAndMul>(&[Operand(1), Operand(0), Pdl])),
        flops: |given| 3 * given.elements(0),
    }
    /// GELU of one half, times the other.
    GeluAndMul {
        name: "gelu_and_mul",
        summary: "out = gelu(input[..d]) · input[d..]",
        operands: &[read("input"), made("out")],
        rule: rule_gated,
        call: Some(|_| row::<activation::GeluAndMul>(&[Operand(1), Operand(0), Pdl])),
        flops: |given| 3 * given.elements(0),
    }
    /// GELU by tanh of one half, times the other.
    GeluTanhAndMul {
        name: "gelu_tanh_and_mul",
        summary: "out = gelu_tanh(input[..d]) · input[d..]",
        operands: &[read("input"), made("out")],
        rule: rule_gated,
        call: Some(|_| row::<activation::GeluTanhAndMul>(&[Operand(1), Operand(0), Pdl])),
        flops: |given| 3 * given.elements(0),
    }
    /// A sum.
    Add {
        name: "add",
        summary: "a ← a + b",
        operands: &[over("a"), part("b")],
        rule: rule_pair,
        call: Some(|_| row::<decode::Add>(&[Operand(0), Operand(1), Pdl])),
        flops: |given| given.elements(0),
    }
    /// A product, element by element.
    Mul {
        name: "mul",
        summary: "a ← a · b",
        operands: &[over("a"), part("b")],
        rule: rule_pair,
        call: Some(|_| row::<decode::Mul>(&[Operand(0), Operand(1), Pdl])),
        flops: |given| given.elements(0),
    }
    /// A product with the sigmoid of a gate.
    SigmoidGate {
        name: "sigmoid_gate",
        summary: "a ← a · σ(gate)",
        operands: &[over("a"), part("gate")],
        rule: rule_pair,
        call: Some(|_| row::<decode::SigmoidGate>(&[Operand(0), Operand(1), Pdl])),
        flops: |given| 3 * given.elements(0),
    }
    /// SiLU.
    Silu {
        name: "silu",
        summary: "a ← a · σ(a)",
        operands: &[over("a")],
        rule: rule_one,
        call: Some(|_| row::<decode::Silu>(&[Operand(0), Pdl])),
        flops: |given| 2 * given.elements(0),
    }
    /// Softmax of rows.
    Softmax {
        name: "softmax",
        summary: "a ← softmax(a / temperature), row by row",
        operands: &[over("a")],
        parameters: &["temperature"],
        rule: |c| {
            c.positive("temperature")?;
            rule_one(c)
        },
        call: Some(|given| {
            row::<decode::SoftmaxRows>(&[Operand(0), Number(given.operation.parameter("temperature")), Pdl])
        }),
        flops: |given| 4 * given.elements(0),
    }
    /// A copy, of another element type where that is asked.
    Copy {
        name: "copy",
        summary: "out = input, rounded to the type that is asked for",
        operands: &[part("input"), made("out")],
        // BF16 is 0, F16 is 1, F32 is 2.
        parameters: &["dtype"],
        rule: |c| {
            let shape = c.specs[0].shape.clone();
            c.rank::<2>(0, "[rows, columns]")?;
            c.float(0)?;
            let dtype = COPIES.get(c.operation.parameter("dtype") as usize).copied();
            dtype.map(|dtype| vec![Spec::new(dtype, shape)]).ok_or_else(|| GraphError::Parameter {
                op: c.op.to_owned(),
                parameter: "dtype",
                found: c.operation.parameter("dtype").to_string(),
                expected: "0 for BF16, 1 for F16, 2 for F32",
            })
        },
        call: Some(|_| row::<decode::CopyRows>(&[Operand(1), Operand(0), Pdl])),
    }
    /// The place of a row's largest element.
    Argmax {
        name: "argmax",
        summary: "token[b] = the first place of the largest of logits[b]",
        operands: &[part("logits"), made("token")],
        rule: |c| {
            let [rows, _] = c.rank(0, "[rows, tokens]")?;
            c.float(0)?;
            Ok(vec![Spec::new(DType::I32, [rows])])
        },
        call: Some(|_| row::<decode::Argmax>(&[Operand(1), Operand(0), Pdl])),
    }
    /// A token that is drawn.
    Sample {
        name: "sample",
        summary: "token[b] drawn by number[b] out of probs[b], of its top_k likeliest and those that sum to top_p; 0 is all",
        operands: &[part("probs"), read("number"), made("token")],
        parameters: &["top_k", "top_p"],
        rule: |c| {
            let [rows, _] = c.rank(0, "[rows, tokens]")?;
            c.dtype(0, &[DType::F32])?;
            c.shape(1, &[rows])?;
            c.dtype(1, &[DType::F32])?;
            let (top_k, top_p) = (c.operation.parameter("top_k"), c.operation.parameter("top_p"));
            let refuse = |parameter, found: f64, expected| {
                Err(GraphError::Parameter { op: c.op.to_owned(), parameter, found: found.to_string(), expected })
            };
            if !(top_k >= 0.0 && top_k.fract() == 0.0 && top_k < 2e9) {
                return refuse("top_k", top_k, "a whole number, 0 for all");
            }
            if !(0.0..=1.0).contains(&top_p) {
                return refuse("top_p", top_p, "a number from 0.0 to 1.0, 0 for all");
            }
            Ok(vec![Spec::new(DType::I32, [rows])])
        },
        call: Some(|given| {
            let (top_k, top_p) = (given.operation.parameter("top_k"), given.operation.parameter("top_p"));
            row::<decode::Sample>(&[Operand(2), Operand(0), Operand(1), Whole(top_k as i64), Number(top_p), Pdl])
        }),
    }
    /// The next step's inputs.
    Advance {
        name: "advance",
        summary: "ids ← token; positions ← positions + 1, below the capacity; lengths ← lengths + 1, up to it",
        operands: &[read("token"), over_whole("ids"), over_whole("positions"), over_whole("lengths")],
        parameters: &["capacity"],
        rule: |c| {
            let [rows] = c.rank(0, "[rows]")?;
            for i in 0..4 {
                c.shape(i, &[rows])?;
                c.dtype(i, &[DType::I32])?;
            }
            let capacity = c.operation.parameter("capacity");
            if !(capacity >= 1.0 && capacity.fract() == 0.0 && capacity <= f64::from(i32::MAX)) {
                let (op, parameter, found) = (c.op.to_owned(), "capacity", capacity.to_string());
                let expected = "a whole number from 1 to 2147483647, the tokens that a row's pages hold";
                return Err(GraphError::Parameter { op, parameter, found, expected });
            }
            Ok(Vec::new())
        },
        call: Some(|given| {
            let capacity = Whole(given.operation.parameter("capacity") as i64);
            row::<decode::Advance>(&[Operand(0), Operand(1), Operand(2), Operand(3), capacity, Pdl])
        }),
    }
    /// A token of the gated delta rule.
    GatedDeltaRule {
        name: "gated_delta_rule",
        summary: "state ← alpha · state, corrected by beta · (v − state k) kᵀ; out = scale · state q",
        operands: &[
            read("q"), read("k"), read("v"), read("alpha"), read("beta"), over_whole("state"), made("out"),
        ],
        parameters: &["scale"],
        before: PdlBefore::Full,
        after: PdlAfter::AtEnd,
        rule: rule_delta,
        call: Some(|given| {
            let heads = given.size(5, 1);
            row::<gdn::GdnPrefill>(&[
                Heads(6, heads), Operand(5), Operand(0), Operand(1), Operand(2),
                // A token for each sequence.
                Ramp { dtype: DType::I64, count: given.size(0, 0) + 1, step: 1 },
                Operand(5), Operand(3), Operand(4), Number(given.operation.parameter("scale")), Scratch(GDN_WORKSPACE),
            ])
        }),
        workspace: |_| GDN_WORKSPACE,
        flops: |given| 8 * given.elements(5),
    }
    /// Rotary embeddings and the append, in one.
    RopeAppend {
        name: "rope_append",
        summary: "q ← turned; k_cache, v_cache ← k turned, v",
        operands: &[
            over("q"), part("k"), part("v"), read("cos_sin"), read("positions"), read("page_table"),
            over_whole("k_cache"), over_whole("v_cache"),
        ],
        parameters: &["interleave"],
        rule: |c| rule_turned_append(c, false),
        call: Some(|given| {
            let interleave = Flag(given.operation.is_on("interleave"));
            row::<decode::RopeAppend>(&[
                Operand(0), Operand(1), Operand(2), Operand(3), Operand(4), Operand(5), Operand(6), Operand(7),
                interleave, Pdl,
            ])
        }),
        flops: |given| 3 * (given.elements(0) + given.elements(1)),
        touched: |given, operand| turned_touched(given, operand, 3),
    }
    /// The norms of queries and keys, rotary embeddings and the append, in one.
    QkNormRopeAppend {
        name: "qk_norm_rope_append",
        summary: "q ← rmsnorm(q) turned; k_cache, v_cache ← rmsnorm(k) turned, v",
        operands: &[
            over("q"), part("k"), part("v"), read("q_weight"), read("k_weight"), read("cos_sin"), read("positions"),
            read("page_table"), over_whole("k_cache"), over_whole("v_cache"),
        ],
        parameters: &["eps", "interleave"],
        rule: |c| rule_turned_append(c, true),
        call: Some(|given| {
            let (eps, interleave) = (Number(given.operation.parameter("eps")), given.operation.is_on("interleave"));
            row::<decode::QkNormRopeAppend>(&[
                Operand(0), Operand(1), Operand(2), Operand(3), Operand(4), Operand(5), Operand(6), Operand(7),
                Operand(8), Operand(9), eps, Flag(interleave), Pdl,
            ])
        }),
        flops: |given| 7 * (given.elements(0) + given.elements(1)),
        touched: |given, operand| turned_touched(given, operand, 5),
    }
    /// A product of normed rows, in one kernel where there are few.
    NormMatMul {
        name: "norm_matmul",
        summary: "out = rmsnorm(x) · weightᵀ",
        operands: &[part("x"), read("norm"), read("weight"), made("out")],
        parameters: &["eps", "f32_out"],
        after: PdlAfter::BeforeItsOwnWait,
        rule: |c| rule_around(c, true, false),
        host: Some(|call| fused::around(call, true, false)),
        workspace: |given| around_workspace(given, true, false),
        flops: |given| around_flops(given, 2),
    }
    /// A product with both halves of a weight and the gate, in one kernel where there are few rows.
    MatMulSiluAndMul {
        name: "matmul_silu_and_mul",
        summary: "out = silu(x · weight[..d]ᵀ) · (x · weight[d..]ᵀ)",
        operands: &[part("x"), read("weight"), made("out")],
        after: PdlAfter::BeforeItsOwnWait,
        rule: |c| rule_around(c, false, true),
        host: Some(|call| fused::around(call, false, true)),
        workspace: |given| around_workspace(given, false, true),
        flops: |given| around_flops(given, 1),
    }
    /// The same of normed rows.
    NormMatMulSiluAndMul {
        name: "norm_matmul_silu_and_mul",
        summary: "out = silu(rmsnorm(x) · weight[..d]ᵀ) · (rmsnorm(x) · weight[d..]ᵀ)",
        operands: &[part("x"), read("norm"), read("weight"), made("out")],
        parameters: &["eps"],
        after: PdlAfter::BeforeItsOwnWait,
        rule: |c| rule_around(c, true, true),
        host: Some(|call| fused::around(call, true, true)),
        workspace: |given| around_workspace(given, true, true),
        flops: |given| around_flops(given, 2),
    }
    /// Rotary embeddings, the append and attention, in one.
    RopeAppendAttention {
        name: "rope_append_attention",
        summary: "k_cache, v_cache ← k turned, v; out = softmax(scale · (q turned) kᵀ) v over the row's length",
        operands: &[
            part("q"), part("k"), part("v"), read("cos_sin"), read("positions"), read("lengths"), read("page_table"),
            over_whole("k_cache"), over_whole("v_cache"), made("out"),
        ],
        parameters: &["scale", "interleave"],
        // Ahead of its wait it reads caches, lengths and lists where no node ahead of it in the step writes them, and nothing elsewhere.
        rule: |c| rule_turned_attention(c, false),
        host: Some(|call| fused::turned_attention(call, false)),
        flops: |given| turned_attention_flops(given, 3),
        touched: |given, operand| turned_attention_touched(given, operand, 3),
    }
    /// The norms of queries and keys, rotary embeddings, the append and attention, in one.
    QkNormRopeAppendAttention {
        name: "qk_norm_rope_append_attention",
        summary: "k_cache, v_cache ← rmsnorm(k) turned, v; out = softmax(scale · (rmsnorm(q) turned) kᵀ) v over the row's length",
        operands: &[
            part("q"), part("k"), part("v"), read("q_weight"), read("k_weight"), read("cos_sin"), read("positions"),
            read("lengths"), read("page_table"), over_whole("k_cache"), over_whole("v_cache"), made("out"),
        ],
        parameters: &["scale", "interleave", "eps"],
        rule: |c| rule_turned_attention(c, true),
        host: Some(|call| fused::turned_attention(call, true)),
        flops: |given| turned_attention_flops(given, 5),
        touched: |given, operand| turned_attention_touched(given, operand, 5),
    }
}

/// The types that a copy may have.
pub(super) const COPIES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_own_row_and_one_way_to_be_computed() {
        let mut names = std::collections::HashSet::new();
        for (i, facts) in TABLE.iter().enumerate() {
            assert_eq!(facts.kind as usize, i, "{}", facts.name);
            assert!(names.insert(facts.name) && !facts.name.is_empty() && !facts.summary.is_empty());
            let one = facts.call.is_some() ^ facts.host.is_some() || facts.kind == OpKind::Append;
            assert!(one, "{} has one reference", facts.name);
            let made = facts.operands.iter().position(|operand| operand.role == Role::Write);
            let last = made.is_none_or(|first| facts.operands[first..].iter().all(|other| other.role == Role::Write));
            assert!(last, "{}: what is made stands last", facts.name);
        }
    }

    #[test]
    fn the_edges_that_rows_allow_are_the_ones_that_the_table_allows() {
        for facts in &TABLE {
            let Some(call) = facts.call else { continue };
            // Specs large enough for any closure to look at.
            let dims = vec![Dim::BATCH, Dim::fixed(2), Dim::fixed(4), Dim::fixed(4)];
            let specs = vec![Spec::new(DType::BF16, dims); facts.operands.len()];
            let operation = Operation::new(facts.kind, &vec![1.0; facts.parameters.len()]);
            let pdl = call(&Given { operation: &operation, specs: &specs, batch: 2 }).entry.row.pdl;
            assert_eq!(pdl == crate::contract::Pdl::Waits, facts.before == PdlBefore::Waits, "{}", facts.name);
        }
    }
}
