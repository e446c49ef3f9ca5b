//! That no row reads a page which another appends to in the same step, where what a row appends is seen by that row alone.

use std::collections::HashMap;

use super::super::error::GraphError;
use super::super::graph::Graph;
use super::super::operation::OpKind;
use super::inputs::Inputs;
use crate::error::Result;

/// The inputs by which a graph's nodes append and attend in one kernel, each once.
#[derive(Debug, Default)]
pub(super) struct Pages {
    all: Vec<Lists>,
}

/// A page table with its positions and lengths, and what is known of them.
#[derive(Debug)]
struct Lists {
    positions: usize,
    lengths: usize,
    table: usize,
    page_size: i64,
    width: usize,
    known: Option<Known>,
}

/// What was looked at already.
#[derive(Debug)]
struct Known {
    /// How often each of the inputs had been given, and the rows.
    of: ([u64; 3], u64),
    positions: Vec<i32>,
    lengths: Vec<i32>,
    table: Vec<i32>,
    /// For each row, the first page that was not looked at.
    next: Vec<usize>,
    /// The first row that reads a page, and another that does.
    read: HashMap<i32, (usize, Option<usize>)>,
    /// The row that appends to a page.
    appended: HashMap<i32, usize>,
}

impl Pages {
    pub(super) fn new(graph: &Graph) -> Self {
        let mut all: Vec<Lists> = Vec::new();
        for node in &graph.nodes {
            let first = match node.operation.kind {
                OpKind::RopeAppendAttention => 3,
                OpKind::QkNormRopeAppendAttention => 5,
                _ => continue,
            };
            let specs = graph.given(node);
            let size =
                |operand: usize, at: usize| specs[operand].shape.get(at).and_then(|dim| dim.constant()).unwrap_or(1);
            let [positions, lengths, table] = [1, 2, 3].map(|behind| node.accesses[first + behind].tensor);
            let (page_size, width) = (size(first + 4, 1) as i64, size(first + 3, 1) as usize);
            let same = |known: &Lists| {
                (known.positions, known.lengths, known.table, known.page_size) == (positions, lengths, table, page_size)
            };
            if !all.iter().any(same) {
                all.push(Lists { positions, lengths, table, page_size, width, known: None });
            }
        }
        Self { all }
    }

    /// Looks at the pages that so many steps of a batch append to and read. What was given must be within the bounds that
    /// [`Inputs::check`] looks at.
    pub(super) fn check(&mut self, inputs: &Inputs, rows: u64, steps: u64) -> Result<()> {
        self.all.iter_mut().try_for_each(|lists| lists.check(inputs, rows, steps))
    }
}

impl Lists {
    fn check(&mut self, inputs: &Inputs, rows: u64, steps: u64) -> Result<()> {
        let of = ([self.positions, self.lengths, self.table].map(|tensor| inputs.version(tensor).0), rows);
        let mut known = match self.known.take() {
            Some(known) if known.of == of => known,
            _ => {
                let count = rows as usize;
                Known {
                    of,
                    positions: inputs.words(self.positions, count),
                    lengths: inputs.words(self.lengths, count),
                    table: inputs.words(self.table, count.saturating_mul(self.width)),
                    next: vec![0; count],
                    read: HashMap::new(),
                    appended: HashMap::new(),
                }
            }
        };
        for row in 0..known.next.len() {
            // The last place of the last step.
            let last = |tensor: usize, given: i32| {
                let more =
                    inputs.steps(tensor).saturating_mul(i64::try_from(steps).unwrap_or(i64::MAX).saturating_sub(1));
                inputs.grown(tensor, given).saturating_add(more)
            };
            let now = inputs.grown(self.positions, known.positions[row]).max(0);
            let appends = last(self.positions, known.positions[row]).max(0);
            let reads = (last(self.lengths, known.lengths[row]) - 1).max(appends);
            let page = |token: i64| usize::try_from(token / self.page_size).unwrap_or(usize::MAX);
            let end = page(reads).saturating_add(1).min(self.width);
            for at in known.next[row]..end {
                let page_of = known.table[row * self.width + at];
                let shared = |row: usize, other: usize| {
                    let (row, other, page) = (row as u64, other as u64, page_of.into());
                    Err(GraphError::SharedPage { row, other, page, steps }.into())
                };
                match known.appended.get(&page_of) {
                    Some(&owner) if owner != row => return shared(owner, row),
                    _ => {}
                }
                let (first, second) = known.read.entry(page_of).or_insert((row, None));
                if *first != row {
                    *second = Some(row);
                }
                if (page(now)..=page(appends)).contains(&at) {
                    match [Some(*first), *second].into_iter().flatten().find(|reader| *reader != row) {
                        Some(other) => return shared(row, other),
                        None => known.appended.insert(page_of, row),
                    };
                }
            }
            known.next[row] = known.next[row].max(end);
        }
        self.known = Some(known);
        Ok(())
    }
}
