//! That no row reads a page which another appends to in the same step, where what a row appends is seen by that row alone, and that none
//! has a page that it appends to at two places.

use std::collections::HashMap;

use super::super::error::GraphError;
use super::super::graph::Graph;
use super::super::operation::OpKind;
use super::super::shape::Dim;
use super::inputs::Inputs;
use super::own::angles_of;
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
    /// Of all three.
    rows: Dim,
    page_size: i64,
    width: usize,
    /// By how much positions and lengths have grown at the most within a step when they are looked at.
    ahead: i64,
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
    /// For each row, the first of its pages that was not looked at: as one that it reads, and as one that it appends to.
    next: Vec<[usize; 2]>,
    /// Where a page was first found, as the row and the place in it, and the row of another place.
    read: HashMap<i32, ((usize, usize), Option<usize>)>,
    /// The row that appends to a page.
    appended: HashMap<i32, usize>,
}

impl Pages {
    pub(super) fn new(graph: &Graph) -> Self {
        let mut all: Vec<Lists> = Vec::new();
        let mut added = vec![0i64; graph.tensors.len()];
        for node in &graph.nodes {
            if node.operation.kind == OpKind::Advance {
                node.accesses[2..4].iter().for_each(|access| added[access.tensor] += 1);
            }
            let Some(first) = angles_of(node.operation.kind) else { continue };
            let specs = graph.given(node);
            let size =
                |operand: usize, at: usize| specs[operand].shape.get(at).and_then(|dim| dim.constant()).unwrap_or(1);
            let [positions, lengths, table] = [1, 2, 3].map(|behind| node.accesses[first + behind].tensor);
            let (page_size, width) = (size(first + 4, 1) as i64, size(first + 3, 1) as usize);
            let rows = specs[first + 1].shape.first().copied().unwrap_or(Dim::BATCH);
            let same = |known: &Lists| {
                (known.positions, known.lengths, known.table, known.page_size) == (positions, lengths, table, page_size)
            };
            let ahead = added[positions].max(added[lengths]);
            match all.iter_mut().find(|known| same(known)) {
                Some(known) => known.ahead = known.ahead.max(ahead),
                None => all.push(Lists { positions, lengths, table, rows, page_size, width, ahead, known: None }),
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
                let count = self.rows.at(rows) as usize;
                Known {
                    of,
                    positions: inputs.words(self.positions, count),
                    lengths: inputs.words(self.lengths, count),
                    table: inputs.words(self.table, count.saturating_mul(self.width)),
                    next: vec![[0; 2]; count],
                    read: HashMap::new(),
                    appended: HashMap::new(),
                }
            }
        };
        let shared = |row: usize, other: usize, page: i32| {
            let (row, other, page) = (row as u64, other as u64, page.into());
            Err(GraphError::SharedPage { row, other, page, steps }.into())
        };
        for row in 0..known.next.len() {
            // The last place of the last step.
            let last = |tensor: usize, given: i32| {
                let more =
                    inputs.steps(tensor).saturating_mul(i64::try_from(steps).unwrap_or(i64::MAX).saturating_sub(1));
                inputs.grown(tensor, given).saturating_add(more).saturating_add(self.ahead)
            };
            let given = known.positions[row];
            // Steps of a smaller bucket left rows where they were.
            let all_grew = (row as u64) < inputs.grown_rows(self.positions);
            let now = if all_grew { inputs.grown(self.positions, given) } else { given.into() }.max(0);
            let appends = last(self.positions, given).max(0);
            let reads = (last(self.lengths, known.lengths[row]) - 1).max(appends);
            let page = |token: i64| usize::try_from(token / self.page_size).unwrap_or(usize::MAX);
            let end = |token: i64| page(token).saturating_add(1).min(self.width);
            let pages = &known.table[row * self.width..][..self.width];
            let [next_read, next_appended] = known.next[row];
            for (at, &page) in pages.iter().enumerate().take(end(reads)).skip(next_read) {
                if let Some(&owner) = known.appended.get(&page) {
                    return shared(owner, row, page);
                }
                let (first, other) = known.read.entry(page).or_insert(((row, at), None));
                if *first != (row, at) && other.is_none_or(|other| other == first.0) {
                    *other = Some(row);
                }
            }
            for (at, &page) in pages.iter().enumerate().take(end(appends)).skip(next_appended.max(page(now))) {
                let other = match known.read.get(&page) {
                    Some(&(first, _)) if first != (row, at) => Some(first.0),
                    Some(&(_, other)) => other,
                    None => None,
                };
                if let Some(other) = other {
                    return shared(row, other, page);
                }
                known.appended.insert(page, row);
            }
            known.next[row] = [next_read.max(end(reads)), next_appended.max(end(appends))];
        }
        self.known = Some(known);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::builder::GraphBuilder;
    use super::super::super::fuse::{Rule, fuse};
    use super::super::super::shape::Columns;
    use super::super::super::step::Pad;
    use super::*;
    use crate::FlashInferError;
    use crate::tensor::DType;

    const PAGE_SIZE: u64 = 4;
    const PER_ROW: u64 = 3;
    const PAGES: u64 = 40;
    const CAPACITY: i64 = (PAGE_SIZE * PER_ROW) as i64;

    /// A step that appends and attends in one, for batches of up to eight.
    fn step(rows: Dim, rules: &[Rule]) -> Graph {
        let fixed = Dim::fixed;
        let mut g = GraphBuilder::new("step", 8);
        let [mut ids, mut positions, mut lengths] = [("ids", 0), ("positions", 0), ("lengths", 1)]
            .map(|(name, pad)| g.input(name, DType::I32, [rows], Pad::Value(pad)).unwrap());
        let table = g.input("page_table", DType::I32, [rows, fixed(PER_ROW)], Pad::Reserved(0)).unwrap();
        let embedding = g.weight("embedding", DType::BF16, [fixed(128), fixed(256)]).unwrap();
        let cos_sin = g.weight("cos_sin", DType::F32, [fixed(64), fixed(64)]).unwrap();
        let cache = [fixed(PAGES), fixed(PAGE_SIZE), fixed(1), fixed(64)];
        let [mut k, mut v] = ["k", "v"].map(|name| g.state(name, DType::BF16, cache).unwrap());
        let parts = [Columns::new(0..128).heads(2), Columns::new(128..192).heads(1), Columns::new(192..256).heads(1)];
        let x = g.embedding(&ids, &embedding, 1.0).unwrap();
        let (lists, caches) = ((&positions, &table), (&mut k, &mut v));
        let x = g.rope_append(x, parts, &cos_sin, lists, caches, false).unwrap();
        let attended = g.decode_attention(x.columns(parts[0]), (&k, &v), &table, &lengths, 0.1).unwrap();
        let token = g.argmax(&attended).unwrap();
        g.advance(&token, &mut ids, &mut positions, &mut lengths, CAPACITY as u32).unwrap();
        g.output("token", token).unwrap();
        fuse(&g.finish().unwrap(), rules).unwrap().0
    }

    fn inputs(graph: &Graph, rows: u64, positions: &[i32], lengths: &[i32], table: &[i32]) -> Inputs {
        let mut inputs = Inputs::new(graph, 8).unwrap();
        inputs.allocate();
        for (name, values) in [
            ("ids", &vec![7; positions.len()][..]),
            ("positions", positions),
            ("lengths", lengths),
            ("page_table", table),
        ] {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
            inputs.give(graph, name, rows, DType::I32, &bytes).unwrap();
        }
        inputs
    }

    /// The row that appends, the other one and the page, where it is refused.
    fn refusal(result: Result<()>) -> Option<(u64, u64, i64)> {
        match result {
            Ok(()) => None,
            Err(FlashInferError::ComputeGraph(error)) => match *error {
                GraphError::SharedPage { row, other, page, .. } => Some((row, other, page)),
                other => panic!("{other}"),
            },
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_page_to_which_a_row_appends_is_at_no_other_place() {
        let graph = step(Dim::BATCH, &[Rule::AppendAttention]);
        for (positions, table, expected) in [
            // Pages that all have read alone are shared, as are those that no row comes to.
            ([4, 5], [1, 2, 9, 1, 3, 9], None),
            ([4, 5], [1, 2, 9, 2, 3, 9], Some((0, 1, 2))),
            ([4, 5], [1, 2, 9, 3, 1, 9], Some((1, 0, 1))),
            ([4, 5], [1, 2, 9, 3, 2, 9], Some((0, 1, 2))),
            // A row's own page, twice.
            ([4, 5], [2, 2, 9, 3, 4, 9], Some((0, 0, 2))),
            ([4, 8], [1, 2, 9, 5, 5, 6], None),
        ] {
            let lengths = positions.map(|position| position + 1);
            let inputs = inputs(&graph, 2, &positions, &lengths, &table);
            assert_eq!(refusal(Pages::new(&graph).check(&inputs, 2, 1)), expected, "{positions:?} {table:?}");
        }
        let apart = step(Dim::BATCH, &[]);
        let inputs = inputs(&apart, 2, &[4, 5], &[5, 6], &[1; 6]);
        assert_eq!(refusal(Pages::new(&apart).check(&inputs, 2, 1)), None, "attention by itself sees what all append");
    }

    #[test]
    fn steps_that_come_to_a_shared_page_are_refused_whether_they_are_asked_for_at_once_or_one_by_one() {
        let graph = step(Dim::BATCH, &[Rule::AppendAttention]);
        let inputs = || inputs(&graph, 2, &[2, 1], &[3, 2], &[1, 3, 4, 2, 3, 5]);
        let check = |steps| refusal(Pages::new(&graph).check(&inputs(), 2, steps));
        assert_eq!((check(2), check(3), check(4)), (None, None, Some((0, 1, 3))));
        let (mut inputs, mut pages) = (inputs(), Pages::new(&graph));
        for _ in 0..3 {
            assert_eq!(refusal(pages.check(&inputs, 2, 1)), None);
            inputs.stepped(2);
        }
        assert_eq!(refusal(pages.check(&inputs, 2, 1)), Some((0, 1, 3)));
        assert_eq!(refusal(pages.check(&inputs, 2, 1)), Some((0, 1, 3)), "and again");
        // Of the first row alone nobody has it.
        assert_eq!(refusal(pages.check(&inputs, 1, 1)), None);
    }

    /// A position may be anywhere in what a row has.
    #[test]
    fn a_page_that_a_row_reads_now_and_appends_to_later_is_looked_at_again() {
        let graph = step(Dim::BATCH, &[Rule::AppendAttention]);
        let mut inputs = inputs(&graph, 2, &[3, 0], &[8, 6], &[1, 3, 4, 2, 3, 5]);
        let mut pages = Pages::new(&graph);
        assert_eq!(refusal(pages.check(&inputs, 2, 1)), None);
        inputs.stepped(2);
        assert_eq!(refusal(pages.check(&inputs, 2, 1)), Some((0, 1, 3)));
    }

    #[test]
    fn rows_that_steps_of_a_smaller_bucket_left_out_append_where_they_were() {
        let graph = step(Dim::BATCH, &[Rule::AppendAttention]);
        let mut inputs = inputs(&graph, 2, &[0, 3], &[5, 8], &[3, 4, 5, 4, 2, 6]);
        let mut pages = Pages::new(&graph);
        inputs.stepped(1);
        assert_eq!(refusal(pages.check(&inputs, 2, 1)), Some((1, 0, 4)), "to page 4, and not to page 2");
    }

    #[test]
    fn a_batch_of_several_rows_of_each_is_looked_at_as_a_whole() {
        let graph = step(Dim::per_row(2), &[Rule::AppendAttention]);
        let (positions, lengths) = ([0, 1, 0, 1], [1, 2, 1, 2]);
        let inputs = inputs(&graph, 2, &positions, &lengths, &[1, 9, 9, 2, 9, 9, 3, 9, 9, 3, 9, 9]);
        assert_eq!(refusal(Pages::new(&graph).check(&inputs, 2, 1)), Some((2, 3, 3)));
    }

    #[test]
    fn attention_behind_the_end_of_a_step_is_looked_at_a_token_further_on() {
        for (nodes, expected) in [(1, None), (2, Some((0, 1, 3)))] {
            let mut graph = step(Dim::BATCH, &[Rule::AppendAttention]);
            let own = graph.nodes.iter().position(|node| node.operation.kind == OpKind::RopeAppendAttention).unwrap();
            let again = graph.nodes[own].clone();
            graph.nodes.extend(vec![again; nodes - 1]);
            let inputs = inputs(&graph, 2, &[3, 0], &[4, 8], &[1, 3, 4, 2, 3, 5]);
            assert_eq!(refusal(Pages::new(&graph).check(&inputs, 2, 1)), expected, "{nodes} of them");
        }
    }

    /// As what is said of it, by looking at each step and each pair of places.
    #[test]
    fn whatever_is_given_is_refused_just_where_places_share_what_one_appends_to() {
        let graph = step(Dim::BATCH, &[Rule::AppendAttention]);
        let mut state = 1u64;
        let mut below = |end: u64| {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            (state >> 33) % end
        };
        let mut refused = 0;
        for turn in 0..2000 {
            let rows = 1 + below(4);
            let positions: Vec<i32> = (0..rows).map(|_| below(6) as i32).collect();
            let lengths: Vec<i32> = positions
                .iter()
                .map(|position| if below(3) == 0 { 1 + below(6) as i32 } else { position + 1 })
                .collect();
            let most = 4 + below(30);
            let table: Vec<i32> = (0..rows * PER_ROW).map(|_| 1 + below(most) as i32).collect();
            let (mut inputs, mut pages) = (inputs(&graph, rows, &positions, &lengths, &table), Pages::new(&graph));
            let (mut done, mut read) = (0, vec![0; rows as usize]);
            while done < 6 {
                let steps = 1 + below(3);
                // Every page that was read once counts on, as what it was given for has not changed.
                let mut appended = Vec::new();
                for row in 0..rows as usize {
                    let appends = |at: u64| (i64::from(positions[row]) + at as i64).min(CAPACITY - 1);
                    let reads =
                        (i64::from(lengths[row]) + (done + steps - 1) as i64 - 1).max(appends(done + steps - 1));
                    read[row] = (reads / PAGE_SIZE as i64 + 1).min(PER_ROW as i64) as usize;
                    appended.extend((0..done + steps).map(|at| (row, (appends(at) / PAGE_SIZE as i64) as usize)));
                }
                let page = |row: usize, at: usize| table[row * PER_ROW as usize + at];
                let places = || (0..rows as usize).flat_map(|row| (0..read[row]).map(move |at| (row, at)));
                let shared = appended
                    .iter()
                    .any(|&own| places().any(|other| other != own && page(other.0, other.1) == page(own.0, own.1)));
                let found = refusal(pages.check(&inputs, rows, steps));
                assert_eq!(found.is_some(), shared, "turn {turn}: {positions:?} {lengths:?} {table:?} {found:?}");
                if shared {
                    refused += 1;
                    break;
                }
                (0..steps).for_each(|_| inputs.stepped(rows));
                done += steps;
            }
        }
        assert!((300..1800).contains(&refused), "{refused}");
    }
}
