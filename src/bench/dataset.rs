//! A folder of definitions, solutions, workloads and traces, as FlashInfer-Bench lays it out.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use super::definition::{Axes, Definition};
use super::error::{Finding, io, refused, unfit};
use super::inputs::within;
use super::solution::Solution;
use super::trace::Trace;
use crate::error::Result;

const MAX_FOLDERS: usize = 32;

/// Where traces are put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum TraceLayout {
    /// `traces/OP_TYPE/DEFINITION.jsonl`: FlashInfer-Bench up to 0.1.2.
    #[default]
    ByDefinition,
    /// `traces/AUTHOR/OP_TYPE/DEFINITION.jsonl`, by the solution's author: FlashInfer-Bench after 0.1.2.
    ByAuthor,
}

/// A dataset that was read. Files may lie at any depth of their folder:
///
/// ```text
/// definitions/OP_TYPE/DEFINITION.json
/// solutions/AUTHOR/OP_TYPE/DEFINITION/SOLUTION.json
/// workloads/OP_TYPE/DEFINITION.jsonl
/// traces/…/DEFINITION.jsonl
/// blob/workloads/OP_TYPE/DEFINITION/DEFINITION_UUID.safetensors
/// ```
#[derive(Debug)]
pub struct Dataset {
    root: PathBuf,
    definitions: BTreeMap<String, Definition>,
    solutions: Vec<Solution>,
    by_name: HashMap<String, usize>,
    workloads: BTreeMap<String, Vec<Trace>>,
    traces: BTreeMap<String, Vec<Trace>>,
}

impl Dataset {
    /// Reads a dataset. A folder of it that is not there is empty.
    ///
    /// # Errors
    /// [`Io`](crate::FlashInferError::Io), also where there is no `root`; [`Data`](crate::FlashInferError::Data) for a file that
    /// cannot be read, a name that two definitions or two solutions have, a workload among the traces, and a trace among the
    /// workloads.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref().to_path_buf();
        fs::read_dir(&root).map_err(io("opening the dataset", &root))?;
        let mut dataset = Self {
            root,
            definitions: BTreeMap::new(),
            solutions: Vec::new(),
            by_name: HashMap::new(),
            workloads: BTreeMap::new(),
            traces: BTreeMap::new(),
        };
        let twice = |path: &Path, what: &str, name: &str| {
            let (place, found) = ("name".to_owned(), format!("the {what} {name:?} a second time"));
            let expected = format!("a name that no other {what} has");
            let remedy = "rename or remove one of them";
            Err(refused(&path.display().to_string(), Finding { place, found, expected, remedy }))
        };
        for path in dataset.files("definitions", "json")? {
            let definition = Definition::read(&path)?;
            if dataset.definitions.contains_key(&definition.name) {
                return twice(&path, "definition", &definition.name);
            }
            dataset.definitions.insert(definition.name.clone(), definition);
        }
        for path in dataset.files("solutions", "json")? {
            let solution = Solution::read(&path)?;
            if dataset.by_name.insert(solution.name.clone(), dataset.solutions.len()).is_some() {
                return twice(&path, "solution", &solution.name);
            }
            dataset.solutions.push(solution);
        }
        for (folder, alone) in [("workloads", true), ("traces", false)] {
            for path in dataset.files(folder, "jsonl")? {
                let traces = Trace::read_lines(&path)?;
                if let Some(i) = traces.iter().position(|trace| trace.is_workload() != alone) {
                    let kinds = ["a trace of a solution", "a workload alone"];
                    let [found, expected] = if alone { kinds } else { [kinds[1], kinds[0]] };
                    let (place, found) = (format!("trace {}", i + 1), found.to_owned());
                    let (expected, remedy) = (expected.to_owned(), "move it to the folder that it belongs to");
                    return Err(refused(&path.display().to_string(), Finding { place, found, expected, remedy }));
                }
                let into = if alone { &mut dataset.workloads } else { &mut dataset.traces };
                for trace in traces {
                    into.entry(trace.definition.clone()).or_default().push(trace);
                }
            }
        }
        Ok(dataset)
    }

    /// The files of one ending in a folder, in order.
    fn files(&self, folder: &str, ending: &str) -> Result<Vec<PathBuf>> {
        let folder = self.root.join(folder);
        let mut files = Vec::new();
        if folder.is_dir() {
            walk(&folder, ending, 0, &mut files)?;
        }
        files.sort();
        Ok(files)
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The definition of a name.
    pub fn definition(&self, name: &str) -> Option<&Definition> {
        self.definitions.get(name)
    }

    /// All definitions, by name.
    pub fn definitions(&self) -> impl Iterator<Item = &Definition> {
        self.definitions.values()
    }

    /// The solution of a name.
    pub fn solution(&self, name: &str) -> Option<&Solution> {
        self.by_name.get(name).and_then(|&at| self.solutions.get(at))
    }

    /// A definition's solutions.
    pub fn solutions<'a>(&'a self, definition: &'a str) -> impl Iterator<Item = &'a Solution> {
        self.solutions.iter().filter(move |solution| solution.definition == definition)
    }

    /// A definition's workloads.
    pub fn workloads(&self, definition: &str) -> &[Trace] {
        self.workloads.get(definition).map_or(&[], Vec::as_slice)
    }

    /// What came of a definition's solutions.
    pub fn traces(&self, definition: &str) -> &[Trace] {
        self.traces.get(definition).map_or(&[], Vec::as_slice)
    }

    /// Of the traces that passed with these sizes of axes, and with errors of at most these, the one of the highest speedup; of
    /// several, the first. `axes` may name some only; those that are not named may have any size.
    pub fn best_trace(
        &self,
        definition: &str,
        axes: &Axes,
        max_absolute_error: f64,
        max_relative_error: f64,
    ) -> Option<&Trace> {
        let fits = |trace: &&Trace| axes.iter().all(|(name, size)| trace.workload.axes.get(name) == Some(size));
        let accurate = |trace: &&Trace| super::apply::is_accurate(trace, max_absolute_error, max_relative_error);
        let candidates = self.traces(definition).iter().filter(fits).filter(accurate);
        candidates.fold(None, |best: Option<&Trace>, trace| match best {
            Some(best) if super::apply::speedup(trace) <= super::apply::speedup(best) => Some(best),
            _ => Some(trace),
        })
    }

    /// The path of a safetensors file that a workload names.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a path that leads out of the dataset.
    pub fn blob(&self, path: &str) -> Result<PathBuf> {
        Ok(self.root.join(within(path)?))
    }

    /// Where a workload's stored inputs belong, relative to the dataset.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for names that cannot be a file's.
    pub fn blob_path(definition: &Definition, uuid: &str) -> Result<String> {
        let (op_type, name) = (file_name(&definition.op_type)?, file_name(&definition.name)?);
        Ok(format!("blob/workloads/{op_type}/{name}/{name}_{}.safetensors", file_name(uuid)?))
    }

    /// Adds a definition, and writes it where it belongs.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a name that another one has, or that cannot be a file's;
    /// [`Io`](crate::FlashInferError::Io).
    pub fn add_definition(&mut self, definition: Definition) -> Result<PathBuf> {
        let (op_type, name) = (file_name(&definition.op_type)?, file_name(&definition.name)?);
        if self.definitions.contains_key(name) {
            return Err(unfit("the dataset", "definitions", format!("{name:?}"), "a new name", "rename it"));
        }
        let path = self.root.join(format!("definitions/{op_type}/{name}.json"));
        definition.write(&path)?;
        self.definitions.insert(definition.name.clone(), definition);
        Ok(path)
    }

    /// Adds a solution, and writes it where it belongs.
    ///
    /// # Errors
    /// As for [`add_definition`](Self::add_definition), and for a solution of a definition that is not here.
    pub fn add_solution(&mut self, solution: Solution) -> Result<PathBuf> {
        let definition = self.known(&solution.definition)?;
        let (author, name) = (file_name(&solution.author)?, file_name(&solution.name)?);
        let folder = format!("{author}/{}/{}", file_name(&definition.op_type)?, file_name(&definition.name)?);
        if self.by_name.contains_key(name) {
            return Err(unfit("the dataset", "solutions", format!("{name:?}"), "a new name", "rename it"));
        }
        let path = self.root.join(format!("solutions/{folder}/{name}.json"));
        solution.write(&path)?;
        self.by_name.insert(solution.name.clone(), self.solutions.len());
        self.solutions.push(solution);
        Ok(path)
    }

    /// Adds workloads alone, or traces of solutions, behind those that their files have.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a trace of a definition that is not here, or whose solution is not where its
    /// author must be known; for an evaluation that is not valid; [`Io`](crate::FlashInferError::Io).
    pub fn add_traces(&mut self, traces: &[Trace], layout: TraceLayout) -> Result<()> {
        let mut files: Vec<(PathBuf, Vec<Trace>)> = Vec::new();
        for trace in traces {
            let path = self.root.join(self.place_of(trace, layout)?);
            match files.iter_mut().find(|(known, _)| *known == path) {
                Some((_, group)) => group.push(trace.clone()),
                None => files.push((path, vec![trace.clone()])),
            }
        }
        for (path, group) in files {
            Trace::append(path, &group)?;
            for trace in group {
                let into = if trace.is_workload() { &mut self.workloads } else { &mut self.traces };
                into.entry(trace.definition.clone()).or_default().push(trace);
            }
        }
        Ok(())
    }

    fn place_of(&self, trace: &Trace, layout: TraceLayout) -> Result<String> {
        let definition = self.known(&trace.definition)?;
        let file = format!("{}/{}.jsonl", file_name(&definition.op_type)?, file_name(&definition.name)?);
        if trace.is_workload() {
            return Ok(format!("workloads/{file}"));
        }
        match layout {
            TraceLayout::ByDefinition => Ok(format!("traces/{file}")),
            TraceLayout::ByAuthor => {
                let solution = trace.solution.as_deref().and_then(|name| self.solution(name)).ok_or_else(|| {
                    let found = format!("the solution {:?}", trace.solution.as_deref().unwrap_or_default());
                    unfit("the dataset", "solutions", found, "a solution of the dataset", "add the solution first")
                })?;
                Ok(format!("traces/{}/{file}", file_name(&solution.author)?))
            }
        }
    }

    fn known(&self, name: &str) -> Result<&Definition> {
        self.definition(name).ok_or_else(|| {
            let found = format!("the definition {name:?}");
            unfit("the dataset", "definitions", found, "a definition of the dataset", "add the definition first")
        })
    }
}

/// A name that is one part of a path.
fn file_name(name: &str) -> Result<&str> {
    match within(name) {
        Ok(path) if path.as_os_str() == name && path.components().count() == 1 => Ok(name),
        _ => Err(unfit("the dataset", "a name", format!("{name:?}"), "one that a file can have", "rename it")),
    }
}

fn walk(folder: &Path, ending: &str, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    if depth > MAX_FOLDERS {
        let (place, found) = ("its depth".to_owned(), "a deeper folder".to_owned());
        let (expected, remedy) =
            (format!("at most {MAX_FOLDERS} levels"), "check that it is the folder that was meant");
        return Err(refused(&folder.display().to_string(), Finding { place, found, expected, remedy }));
    }
    for entry in fs::read_dir(folder).map_err(io("reading the folder", folder))? {
        let entry = entry.map_err(io("reading the folder", folder))?;
        let path = entry.path();
        // Links to files are followed, as downloads of a dataset have them; links to folders are not, which may be circles.
        if entry.file_type().map_err(io("reading", &path))?.is_dir() {
            walk(&path, ending, depth + 1, files)?;
        } else if path.extension().is_some_and(|found| found == ending) && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}
