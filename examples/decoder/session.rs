//! Sequences on an engine: prefill in chunks, decode, pages.

use flashinfer_rs::compute::{HostTensor, PageAllocator, Rule};

use crate::fault::{Fault, fault};
use crate::graph::Options;
use crate::weights::Random;

/// What a step is given, of rows that somebody asked for: the engine pads them to its bucket.
#[derive(Debug, Default, Clone)]
pub struct Inputs {
    pub ids: Vec<i32>,
    pub positions: Vec<i32>,
    pub lengths: Vec<i32>,
    /// As many pages of each row as a row may have.
    pub page_table: Vec<i32>,
    /// Where tokens are drawn: a number from 0.0 to below 1.0 for each row.
    pub numbers: Vec<f32>,
}

/// What runs a graph's steps: the host, or a GPU.
pub trait Engine {
    /// What it is, for the reader.
    fn describe(&self) -> String;

    /// The most rows that a step may have.
    fn rows(&self) -> usize;

    /// Gives a weight, or a part of one that others are packed into.
    fn weight(&mut self, name: &str, tensor: &HostTensor) -> Result<(), Fault>;

    /// What is left to do before the first step, once it has its weights.
    fn make_ready(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// A step of these inputs; answers each row's token.
    fn step(&mut self, inputs: &Inputs) -> Result<Vec<i32>, Fault>;

    /// So many steps more of the rows of the last one, each with what that one made; answers each step's tokens. The numbers
    /// are those of all steps, where tokens are drawn.
    fn run(&mut self, steps: usize, numbers: &[f32]) -> Result<Vec<Vec<i32>>, Fault>;

    /// An output of the last step, of its first rows.
    fn output(&mut self, name: &str, rows: usize) -> Result<Vec<f32>, Fault>;
}

/// How a GPU runs a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "there is no GPU then"))]
pub enum Launch {
    Eager,
    Graph,
    Pdl,
}

/// Sequences that grow together, a token a step.
pub struct Session<'e> {
    engine: &'e mut dyn Engine,
    options: Options,
    pages: PageAllocator,
    random: Random,
    /// Of each sequence, what the cache holds, and the token that follows.
    held: Vec<u64>,
    next: Vec<i32>,
    /// What goes wrong on purpose.
    pub slip: Slip,
}

/// What is given wrong to decode steps, to see that a gate turns red.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Slip {
    #[default]
    None,
    /// Every token comes one position too late.
    Position,
    /// The first sequence reads a page that is not its own.
    Page,
}

impl<'e> Session<'e> {
    /// Of so many sequences, which the options have room for.
    pub fn new(engine: &'e mut dyn Engine, options: &Options, sequences: usize, seed: u64) -> Self {
        let (pages, held, next) = (options.allocator(), vec![0; sequences], vec![0; sequences]);
        Self { engine, options: options.clone(), pages, random: Random(seed), held, next, slip: Slip::None }
    }

    fn numbers(&mut self, count: usize) -> Vec<f32> {
        if self.options.sampling.is_none() {
            return Vec::new();
        }
        // 24 bits: all that single precision holds below 1.0.
        (0..count).map(|_| (self.random.next() >> 40) as f32 / (1u32 << 24) as f32).collect()
    }

    /// The pages of each sequence.
    fn table(&self) -> Vec<i32> {
        let mut table = self.pages.table(self.held.len());
        if self.slip == Slip::Page {
            // Another sequence's first page, or nobody's.
            let other = self.options.pages_per_row as usize;
            table[0] = table.get(other).copied().unwrap_or(PageAllocator::RESERVED as i32);
        }
        table
    }

    /// Puts tokens behind what a sequence's cache holds: as many at once as the engine has rows, each a row of its own with the
    /// same pages. A step writes the keys and values of all of its rows before any of them attends, and each attends to as
    /// many tokens as stand up to itself; so that is what a prefill computes.
    pub fn prefill(&mut self, sequence: usize, tokens: &[i32]) -> Result<i32, Fault> {
        if tokens.is_empty() {
            return Err(fault("a prompt of no tokens; give one or more"));
        }
        self.pages.grow(sequence, tokens.len() as u64)?;
        let width = self.options.pages_per_row as usize;
        let table = self.table();
        let own = &table[sequence * width..(sequence + 1) * width];
        let mut last = 0;
        // Where a row does not see what others append in the same step, a token is a step.
        let alone = self.options.rules.contains(&Rule::AppendAttention);
        for chunk in tokens.chunks(if alone { 1 } else { self.engine.rows() }) {
            let first = self.held[sequence] as i32;
            let positions: Vec<i32> = (first..).take(chunk.len()).collect();
            let inputs = Inputs {
                ids: chunk.to_vec(),
                lengths: positions.iter().map(|position| position + 1).collect(),
                positions,
                page_table: own.repeat(chunk.len()),
                numbers: self.numbers(chunk.len()),
            };
            let made = self.engine.step(&inputs)?;
            last = made.last().copied().ok_or_else(|| fault("a step answered no token"))?;
            self.held[sequence] += chunk.len() as u64;
        }
        self.next[sequence] = last;
        Ok(last)
    }

    /// Decodes so many tokens of every sequence; the host waits after the first step and at the end. Answers each step's tokens.
    pub fn decode(&mut self, steps: usize) -> Result<Vec<Vec<i32>>, Fault> {
        if steps == 0 {
            return Ok(Vec::new());
        }
        let mut all = vec![self.forced(&self.next.clone(), steps)?];
        let numbers = self.numbers((steps - 1) * self.held.len());
        all.extend(self.engine.run(steps - 1, &numbers)?);
        self.held.iter_mut().for_each(|held| *held += steps as u64 - 1);
        self.next = all.last().cloned().unwrap_or_default();
        Ok(all)
    }

    /// A step of these tokens, with room for so many.
    pub fn forced(&mut self, tokens: &[i32], room: usize) -> Result<Vec<i32>, Fault> {
        for (sequence, held) in self.held.iter().enumerate() {
            let wanted = (held + room as u64).saturating_sub(self.pages.length(sequence));
            self.pages.grow(sequence, wanted)?;
        }
        let shift = i32::from(self.slip == Slip::Position);
        let positions: Vec<i32> = self.held.iter().map(|held| *held as i32 + shift).collect();
        let inputs = Inputs {
            ids: tokens.to_vec(),
            lengths: positions.iter().map(|position| position + 1).collect(),
            positions,
            page_table: self.table(),
            numbers: self.numbers(self.held.len()),
        };
        let made = self.engine.step(&inputs)?;
        self.held.iter_mut().for_each(|held| *held += 1);
        Ok(made)
    }

    /// An output of each sequence's last step.
    pub fn output(&mut self, name: &str) -> Result<Vec<f32>, Fault> {
        self.engine.output(name, self.held.len())
    }
}
