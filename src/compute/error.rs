//! What can be wrong with a graph, its plan, or a run of it.

use crate::error::errors;

errors! {
/// What is wrong with a compute graph: each says what was found, what was expected and what to do.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum GraphError {
    /// An operand has another shape than its operation takes.
    #[error("{op}: {argument} is of shape {found}, expected {expected}; correct the model's sizes")]
    ShapeMismatch {
        /// The node, with its operation.
        op: String,
        /// The operand's name.
        argument: &'static str,
        /// Its shape.
        found: String,
        /// The shape that it must have.
        expected: String,
    },

    /// An operand has another element type than its operation takes.
    #[error("{op}: {argument} holds {found}, expected {expected}; cast it by `copy`, or give the weight another type")]
    DTypeMismatch {
        /// The node, with its operation.
        op: String,
        /// The operand's name.
        argument: &'static str,
        /// Its element type.
        found: String,
        /// The element types that it may have.
        expected: String,
    },

    /// A kernel's own contract refuses the call that a node is.
    #[error("{op}, for a batch of {batch}: {reason}")]
    Contract {
        /// The node, with its operation.
        op: String,
        /// The rows of the batch.
        batch: u64,
        /// The kernel's words: what was found and what was expected.
        reason: String,
    },

    /// A value, weight, state or input belongs to another graph.
    #[error("{op}: {argument} is of another graph; use what this graph's builder gave")]
    ForeignValue {
        /// The operation.
        op: String,
        /// The operand's name.
        argument: &'static str,
    },

    /// A parameter of an operation means nothing.
    #[error("{op}: {parameter} is {found}, expected {expected}")]
    Parameter {
        /// The operation.
        op: String,
        /// The parameter's name.
        parameter: &'static str,
        /// Its value.
        found: String,
        /// The values that it may have.
        expected: &'static str,
    },

    /// Two tensors of a graph have one name.
    #[error("there are two tensors named {name:?}; names are how weights and outputs are found: give each its own")]
    DuplicateName {
        /// The name.
        name: String,
    },

    /// There is no tensor of this name and kind.
    #[error("there is no {kind} named {name:?}; there are {known}")]
    UnknownName {
        /// Weight, state, step input or output.
        kind: &'static str,
        /// The name that was asked for.
        name: String,
        /// The names that there are.
        known: String,
    },

    /// A weight, state or step input was not given before a run.
    #[error("{kind} {name:?} is missing; give it, {expected}, before the run")]
    Missing {
        /// Weight, state or step input.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Its type and shape.
        expected: String,
    },

    /// What was given for a weight, state or step input is of another size.
    #[error("{kind} {name:?} has {found}, expected {expected}; give the model's own")]
    Mismatch {
        /// Weight, state or step input.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What was given.
        found: String,
        /// What must be given.
        expected: String,
    },

    /// No kernel of FlashInfer 0.6.3 serves a node.
    #[error("{op} has no kernel: {reason}; {remedy}")]
    UnsupportedKernel {
        /// The node, with its operation.
        op: String,
        /// Why.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },

    /// A batch has more rows than the largest bucket, or than the graph was built for.
    #[error("a batch of {rows} rows is more than the largest, {largest}; divide it, or build for a larger one")]
    BucketTooSmall {
        /// The rows of the batch.
        rows: u64,
        /// The largest bucket.
        largest: u64,
    },

    /// A sequence is longer than its pages, or than the table of angles.
    #[error("row {row} would be {length} tokens long, and there is room for {capacity}; end it, or plan more pages")]
    ContextTooLong {
        /// The row.
        row: u64,
        /// Its length after the step.
        length: u64,
        /// The tokens that there is room for.
        capacity: u64,
    },

    /// There is no free page.
    #[error("the cache's {pages} pages are all in use; end a sequence, or make a larger cache")]
    PageTableFull {
        /// How many pages there are.
        pages: u64,
    },

    /// The memory that a plan takes is more than there is.
    #[error(
        "the plan takes {planned} bytes and {free} are free; nothing was allocated: plan smaller buckets or fewer pages"
    )]
    ArenaTooLarge {
        /// The bytes that are planned.
        planned: u64,
        /// The bytes that are free.
        free: u64,
    },

    /// A plan was found to be wrong by the verifier. This is a slip of the planner, or the plan was changed.
    #[error("the plan of {graph} is wrong: {problem}; plan anew, and report this")]
    WrongPlan {
        /// The graph.
        graph: String,
        /// What is wrong.
        problem: String,
    },

    /// A node computed what is no finite number.
    #[error("{node} wrote {value} at element {first} of {tensor}; look at its operands, or for memory that was reused")]
    NotFinite {
        /// The node that wrote it.
        node: String,
        /// The tensor.
        tensor: String,
        /// The first such element.
        first: u64,
        /// What it is.
        value: f64,
    },

    /// The place that a plan has for a node's scratch memory is smaller than its kernel needs on this GPU.
    #[error(
        "{node} has a workspace of {planned} bytes, and its kernel needs {needed} on this GPU; plan smaller buckets, and report \
         this"
    )]
    WorkspaceTooSmall {
        /// The node.
        node: String,
        /// The bytes that are planned.
        planned: u64,
        /// The bytes that the kernel needs.
        needed: u64,
    },

    /// CUDA does not capture a step.
    #[error(
        "a step of {graph} for a batch of {batch} was not captured: {reason}; what was captured before is as it was: run \
         steps without a capture, and report this"
    )]
    CaptureRefused {
        /// The graph.
        graph: String,
        /// The rows of the batch.
        batch: u64,
        /// CUDA's words.
        reason: String,
    },

    /// What was captured is not what was planned.
    #[error(
        "the captured step of {graph} for a batch of {batch} differs from its plan at {node}: planned {planned}, captured \
         {captured}; it was not taken, and what was captured before is as it was: report this"
    )]
    CapturedDiffers {
        /// The graph.
        graph: String,
        /// The rows of the batch.
        batch: u64,
        /// The node.
        node: String,
        /// What the plan has.
        planned: String,
        /// What CUDA tells of what was captured.
        captured: String,
    },

    /// A kernel allocated memory while its step was captured: each launch would have other memory than was planned.
    #[error(
        "the captured step of {graph} for a batch of {batch} allocates memory at {node}; it was not taken, and what was captured \
         before is as it was: run steps without a capture, and report this"
    )]
    AllocationInCapture {
        /// The graph.
        graph: String,
        /// The rows of the batch.
        batch: u64,
        /// The node.
        node: String,
    },

    /// The plan of an attention for other lengths would be launched in another way than what was captured.
    #[error(
        "{node} was captured for a batch of {batch} with the plan {captured:?}, and these lengths are planned as {wanted:?}, which \
         what was captured does not launch; nothing was changed: run the batch at another bucket, or make the run anew, which plans \
         and captures again"
    )]
    PlanChanged {
        /// The node.
        node: String,
        /// The rows of the bucket.
        batch: u64,
        /// What upstream's planner answered to what was captured: sizes of launches, offsets into scratch memory, flags.
        captured: Vec<i64>,
        /// What it answers now.
        wanted: Vec<i64>,
    },

    /// Two rows share a page that one of them appends to, or a row has it twice, in a graph in which a row does not see what others append in
    /// the same step.
    #[error(
        "row {row} appends to page {page} within {steps} steps, and row {other} has that page at another place; give each row a page of \
         its own to append to, or leave the rule `append and attention` out: Rule::ALL in the place of Rule::STEP"
    )]
    SharedPage {
        /// The row that appends to it.
        row: u64,
        /// The row that has it too: another one, or the same where it has it twice.
        other: u64,
        /// The page.
        page: i64,
        /// The steps that were looked at.
        steps: u64,
    },

    /// The plan of an attention is not for what a step is given.
    #[error(
        "{node} is planned for {planned}, and the step has {now}; call DeviceRun::replan ahead of each step, or let steps plan by \
         themselves: DeviceRun::replan_by_hand(false)"
    )]
    Stale {
        /// The node.
        node: String,
        /// What it is planned for.
        planned: String,
        /// What the step is given.
        now: String,
    },

    /// A graph's file is of another version, or is none.
    #[error("a graph's JSON: {at} is {found}, expected {expected}; export it anew by this release")]
    Json {
        /// The place.
        at: String,
        /// What is there.
        found: String,
        /// What should be there.
        expected: String,
    },

    /// A node failed when it was run.
    #[error("{node} failed: {reason}")]
    Run {
        /// The node.
        node: String,
        /// The kernel's or the reference's words.
        reason: String,
    },
}
}

errors! {
/// What is odd about a graph, though it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum GraphWarning {
    /// A value is computed, and neither read nor an output.
    #[error("{node} computes {value}, which nothing reads and which is no output")]
    UnusedValue {
        /// The node that computes it.
        node: String,
        /// The value.
        value: String,
    },
    /// A weight, state or step input is declared, and no node uses it.
    #[error("{kind} {name:?} is declared, and no node uses it")]
    Unused {
        /// Weight, state or step input.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A state is read, and no node writes it.
    #[error("state {name:?} is read, and no node writes it")]
    UnwrittenState {
        /// Its name.
        name: String,
    },
}
}

impl std::error::Error for GraphError {}

impl std::error::Error for GraphWarning {}
