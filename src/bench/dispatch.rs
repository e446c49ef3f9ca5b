//! Calling the best kernel for the sizes at hand, by a dataset's traces.

use std::collections::HashMap;
use std::fmt;

use super::apply::{ApplyConfig, ApplyTable};
use super::argument::{Argument, Destination};
use super::dataset::Dataset;
use super::definition::{Axes, Definition};
use super::error::unfit;
use super::json::shortened;
use super::kernel::{BoundKernel, Kernel};
use super::solution::Solution;
use crate::error::Result;
use crate::object::{Tensor, TensorAllocator};
use crate::stream::Stream;

/// One definition's kernels, of which each call takes the one that was the best for its sizes: what upstream's `apply` does. All
/// are loaded when it is made, so that no call loads any.
pub struct Dispatcher<'d> {
    definition: &'d Definition,
    kernels: Vec<Kernel>,
    /// The kernel for each sizes of the variable axes, in the definition's order.
    by_sizes: HashMap<Box<[i64]>, usize>,
    otherwise: Option<usize>,
}

impl fmt::Debug for Dispatcher<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dispatcher({}: {} kernels, {} sizes)", self.definition.name, self.kernels.len(), self.by_sizes.len())
    }
}

impl<'d> Dispatcher<'d> {
    /// Ranks a definition's traces as [`ApplyTable`] does, and makes a kernel of each solution that is the best for some
    /// sizes: `load` is asked once for each.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a definition that the dataset lacks, a solution that won and that it
    /// lacks, and a kernel that does not [fit](Kernel::bind) the definition; what `load` answers.
    pub fn new(
        dataset: &'d Dataset,
        definition: &str,
        config: &ApplyConfig,
        mut load: impl FnMut(&Solution) -> Result<Kernel>,
    ) -> Result<Self> {
        let missing = |what: &str, name: &str| {
            let found = format!("no {what} {:?}", shortened(name));
            unfit("the dataset", what, found, "one", "add it, or use the dataset that has it")
        };
        let table = ApplyTable::new(dataset, definition, config);
        let definition = dataset.definition(definition).ok_or_else(|| missing("definition", definition))?;
        let mut dispatcher = Self { definition, kernels: Vec::new(), by_sizes: HashMap::new(), otherwise: None };
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut place_of = |kernels: &mut Vec<Kernel>, name| -> Result<usize> {
            match places.get(name) {
                Some(&place) => Ok(place),
                None => {
                    let kernel = load(dataset.solution(name).ok_or_else(|| missing("solution", name))?)?;
                    kernel.bind(definition)?;
                    kernels.push(kernel);
                    places.insert(name, kernels.len() - 1);
                    Ok(kernels.len() - 1)
                }
            }
        };
        for (axes, name) in table.iter() {
            let place = place_of(&mut dispatcher.kernels, name)?;
            // A trace of other axes than the definition's is for no call.
            if let Some(sizes) = dispatcher.sizes(axes) {
                dispatcher.by_sizes.insert(sizes, place);
            }
        }
        if let Some(best) = table.best().filter(|_| config.use_best_on_miss) {
            dispatcher.otherwise = Some(place_of(&mut dispatcher.kernels, best)?);
        }
        Ok(dispatcher)
    }

    /// With a kernel for sizes that no trace has, in the place of any other.
    ///
    /// # Errors
    /// As for [`Kernel::bind`].
    pub fn otherwise(mut self, kernel: Kernel) -> Result<Self> {
        kernel.bind(self.definition)?;
        self.kernels.push(kernel);
        self.otherwise = Some(self.kernels.len() - 1);
        Ok(self)
    }

    fn sizes(&self, axes: &Axes) -> Option<Box<[i64]>> {
        let size = |axis: &str| axes.get(axis).and_then(|&size| i64::try_from(size).ok());
        self.definition.var_axes().into_iter().map(size).collect()
    }

    /// The kernel for these sizes of all variable axes.
    pub fn kernel(&self, axes: &Axes) -> Option<&Kernel> {
        self.sizes(axes).and_then(|sizes| self.find(&sizes))
    }

    fn find(&self, sizes: &[i64]) -> Option<&Kernel> {
        self.by_sizes.get(sizes).copied().or(self.otherwise).map(|place| &self.kernels[place])
    }

    /// The kernel for a call with these inputs.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for inputs that do not fit the definition, and where no trace has their sizes.
    pub fn bind(&self, inputs: &[Argument<'_>], stream: Stream<'_>) -> Result<BoundKernel<'_>> {
        let Some(any) = self.kernels.first() else { return Err(self.miss(&[])) };
        let sizes = any.bind(self.definition)?.variable_sizes(inputs, stream)?;
        self.find(&sizes).ok_or_else(|| self.miss(&sizes))?.bind(self.definition)
    }

    #[cold]
    fn miss(&self, sizes: &[i64]) -> crate::FlashInferError {
        let sizes = self.definition.var_axes().into_iter().zip(sizes).map(|(axis, size)| format!("{axis} = {size}"));
        unfit(
            &format!("the kernels of {:?}", shortened(&self.definition.name)),
            "their sizes",
            format!("none for [{}]", sizes.collect::<Vec<_>>().join(", ")),
            format!("one of {} sizes that traces have, within the errors that were allowed", self.by_sizes.len()),
            "run a workload of these sizes, or say what is called otherwise",
        )
    }

    /// Calls the kernel for these sizes, whose outputs are arguments.
    ///
    /// # Errors
    /// As for [`bind`](Self::bind) and [`BoundKernel::call`].
    ///
    /// # Safety
    /// As for [`BoundKernel::call`], of every kernel.
    pub unsafe fn call(&self, inputs: &[Argument<'_>], outputs: &[Destination<'_>], stream: Stream<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.bind(inputs, stream)?.call(inputs, outputs, stream) }
    }

    /// Calls the kernel for these sizes, whatever its style, and answers its outputs.
    ///
    /// # Errors
    /// As for [`bind`](Self::bind) and [`BoundKernel::call_returning`].
    ///
    /// # Safety
    /// As for [`BoundKernel::call`], of every kernel.
    pub unsafe fn call_returning(
        &self,
        inputs: &[Argument<'_>],
        allocator: &dyn TensorAllocator,
        stream: Stream<'_>,
    ) -> Result<Vec<Tensor>> {
        // SAFETY: the caller's promise.
        unsafe { self.bind(inputs, stream)?.call_returning(inputs, allocator, stream) }
    }
}
