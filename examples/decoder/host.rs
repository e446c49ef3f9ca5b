//! The host as an engine: in f64 between memory of the graph's types, without a GPU.

use flashinfer_rs::compute::{Graph, HostRun, HostTensor, Plan};

use crate::fault::Fault;
use crate::session::{Engine, Inputs};

pub struct Host<'g> {
    run: HostRun<'g>,
    plan: &'g Plan,
    width: usize,
    /// Whether tokens are drawn.
    draws: bool,
    /// Rows that the last step had.
    rows: usize,
}

impl<'g> Host<'g> {
    pub fn new(graph: &'g Graph, plan: &'g Plan) -> Result<Self, Fault> {
        let run = HostRun::new(graph, plan)?;
        let table = &graph.tensors()[graph.find("step input", "page_table")?].spec;
        let width = table.shape[1].at(1) as usize;
        let draws = graph.find("step input", "number").is_ok();
        Ok(Self { run, plan, width, draws, rows: 0 })
    }

    /// An input of the whole bucket: what is given, and the padding behind it.
    fn input<T: Into<f64> + Copy>(&mut self, name: &str, given: &[T], of_row: usize, pad: f64) -> Result<(), Fault> {
        let mut numbers: Vec<f64> = given.iter().map(|number| (*number).into()).collect();
        numbers.resize(self.plan.batch() as usize * of_row, pad);
        Ok(self.run.input(name, &numbers)?)
    }

    fn tokens(&self) -> Result<Vec<i32>, Fault> {
        let tokens = self.run.read("token")?;
        Ok(tokens.into_iter().take(self.rows).map(|token| token as i32).collect())
    }
}

impl Engine for Host<'_> {
    fn describe(&self) -> String {
        "the host, in f64 between memory of the graph's types".to_owned()
    }

    fn rows(&self) -> usize {
        self.plan.batch() as usize
    }

    fn weight(&mut self, name: &str, tensor: &HostTensor) -> Result<(), Fault> {
        let numbers: Vec<f64> = (0..tensor.slots()).map(|i| f64::from(tensor.float(i))).collect();
        Ok(self.run.weight(name, &numbers)?)
    }

    fn step(&mut self, inputs: &Inputs) -> Result<Vec<i32>, Fault> {
        self.rows = inputs.ids.len();
        self.input("ids", &inputs.ids, 1, 0.0)?;
        self.input("positions", &inputs.positions, 1, 0.0)?;
        self.input("lengths", &inputs.lengths, 1, 1.0)?;
        self.input("page_table", &inputs.page_table, self.width, 0.0)?;
        if self.draws {
            self.input("number", &inputs.numbers, 1, 0.0)?;
        }
        self.run.run()?;
        self.tokens()
    }

    fn run(&mut self, steps: usize, numbers: &[f32]) -> Result<Vec<Vec<i32>>, Fault> {
        let mut all = Vec::with_capacity(steps);
        for step in 0..steps {
            if self.draws {
                let own = numbers.iter().skip(step * self.rows).take(self.rows).copied().collect::<Vec<_>>();
                self.input("number", &own, 1, 0.0)?;
            }
            self.run.run()?;
            all.push(self.tokens()?);
        }
        Ok(all)
    }

    fn output(&mut self, name: &str, rows: usize) -> Result<Vec<f32>, Fault> {
        let values = self.run.read(name)?;
        let width = values.len() / self.plan.batch() as usize;
        Ok(values.into_iter().take(rows * width).map(|value| value as f32).collect())
    }
}
