//! A GPU as an engine: eager, or captured into CUDA graphs.

use flashinfer_rs::FlashInferError;
use flashinfer_rs::compute::{AttentionKernels, Buckets, DeviceRun, Graph, HostTensor};
use flashinfer_rs::cudarc::driver::{CudaContext, DriverError};
use flashinfer_rs::matmul::Selections;

use crate::fault::{Fault, fault};
use crate::session::{Engine, Inputs, Launch};

pub struct Gpu {
    pub run: DeviceRun,
    launch: Launch,
    /// Whether tokens are drawn.
    draws: bool,
    /// Rows that the last step had, and their bucket.
    rows: usize,
    bucket: u64,
}

impl Gpu {
    /// A graph for these buckets, on a stream of its own of the first GPU, with XQA for attention.
    #[allow(dead_code, reason = "the benchmark's and the tests'")]
    pub fn new(graph: &Graph, buckets: &Buckets, launch: Launch) -> Result<Self, Fault> {
        let kernels = AttentionKernels::default();
        Ok(Self::with_attention(graph, buckets, launch, kernels, &mut Selections::new())?)
    }

    /// As [`new`](Self::new), with these kernels.
    pub fn with_attention(
        graph: &Graph,
        buckets: &Buckets,
        launch: Launch,
        kernels: AttentionKernels,
        selections: &mut Selections,
    ) -> Result<Self, FlashInferError> {
        let driver = |call, error: DriverError| {
            let message = format!("{error}; see with nvidia-smi whether the GPU is free");
            FlashInferError::Cuda { call, code: error.0 as i32, message }
        };
        let context = CudaContext::new(0).map_err(|error| driver("opening cuda:0", error))?;
        let stream = context.new_stream().map_err(|error| driver("making a stream", error))?;
        let mut run = DeviceRun::with_attention(graph, buckets, &stream, selections, kernels)?;
        run.set_pdl(launch == Launch::Pdl);
        let draws = graph.find("step input", "number").is_ok();
        Ok(Self { run, launch, draws, rows: 0, bucket: 0 })
    }

    /// Gives the inputs of a step.
    pub fn give(&mut self, inputs: &Inputs) -> Result<(), Fault> {
        self.rows = inputs.ids.len();
        self.bucket = self.run.set_rows(self.rows as u64)?;
        self.run.input("ids", &inputs.ids)?;
        self.run.input("positions", &inputs.positions)?;
        self.run.input("lengths", &inputs.lengths)?;
        self.run.input("page_table", &inputs.page_table)?;
        self.numbers(&inputs.numbers)
    }

    fn numbers(&mut self, numbers: &[f32]) -> Result<(), Fault> {
        if self.draws {
            self.run.input("number", numbers)?;
        }
        Ok(())
    }

    /// Queues so many steps.
    pub fn queue(&mut self, steps: u64) -> Result<(), Fault> {
        // The prefill kernels' bucket is not captured.
        match self.launch {
            Launch::Graph | Launch::Pdl if self.run.attention().of(self.bucket).is_captured() => self.run.run(steps)?,
            _ => (0..steps).try_for_each(|_| self.run.step())?,
        }
        Ok(())
    }

    /// So many steps without numbers in between; answers each step's tokens.
    fn steps(&mut self, steps: usize) -> Result<Vec<Vec<i32>>, Fault> {
        let rows = self.rows;
        self.queue(steps as u64)?;
        let mut all = Vec::with_capacity(steps);
        while all.len() < steps {
            let arrived = self.run.next_result::<i32>()?;
            let arrived = arrived.ok_or_else(|| fault(format!("{} of {steps} steps answered tokens", all.len())))?;
            all.push(arrived.values.iter().take(rows).copied().collect());
        }
        Ok(all)
    }
}

impl Engine for Gpu {
    fn describe(&self) -> String {
        let how = match self.launch {
            Launch::Eager => "each kernel launched by itself",
            Launch::Graph => "a CUDA graph for each bucket",
            Launch::Pdl => "a CUDA graph for each bucket, whose kernels start early where they may",
        };
        let buckets = self.run.buckets().sizes();
        let captured = buckets.iter().map(|&bucket| {
            let kernel = self.run.attention().of(bucket);
            match self.run.captured(bucket) {
                Some(step) => format!(
                    "; {bucket} rows: {kernel:?}, {} nodes, {} of them kernels, {} early",
                    step.nodes, step.kernels, step.programmatic
                ),
                None => format!("; {bucket} rows: {kernel:?}, kernel by kernel"),
            }
        });
        format!("cuda:0, {how}{}", captured.collect::<String>())
    }

    fn rows(&self) -> usize {
        self.run.buckets().largest() as usize
    }

    fn weight(&mut self, name: &str, tensor: &HostTensor) -> Result<(), Fault> {
        let dtype = tensor.dtype().to_dtype().ok_or_else(|| fault(format!("{name} is {}", tensor.dtype())))?;
        Ok(self.run.weight_bytes(name, dtype, tensor.bytes())?)
    }

    fn make_ready(&mut self) -> Result<(), Fault> {
        if self.launch != Launch::Eager {
            self.run.capture()?;
        }
        Ok(())
    }

    fn step(&mut self, inputs: &Inputs) -> Result<Vec<i32>, Fault> {
        self.give(inputs)?;
        Ok(self.steps(1)?.pop().unwrap_or_default())
    }

    fn run(&mut self, steps: usize, numbers: &[f32]) -> Result<Vec<Vec<i32>>, Fault> {
        if !self.draws {
            return self.steps(steps);
        }
        // Each step draws by numbers of its own, which the host brings.
        let mut all = Vec::with_capacity(steps);
        for step in 0..steps {
            let own: Vec<f32> = numbers.iter().skip(step * self.rows).take(self.rows).copied().collect();
            self.numbers(&own)?;
            all.extend(self.steps(1)?);
        }
        Ok(all)
    }

    fn output(&mut self, name: &str, rows: usize) -> Result<Vec<f32>, Fault> {
        let values = self.run.read(name)?;
        let width = values.len() / self.rows.max(1);
        Ok(values.into_iter().take(rows * width).map(|value| value as f32).collect())
    }
}
