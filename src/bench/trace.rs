//! What a definition is called with, and what came of it.

use std::path::Path;

use super::definition::{Axes, field, optional_text, text};
use super::error::unfit;
use super::json::{Cursor, Document, Json, MAX_BYTES, shortened};
use super::named::Named;
use super::solution::words;
pub use crate::data::time::timestamp;
use crate::error::Result;

const STATUS: &str = "correct the status, or what stands beside it";

/// A scalar of a workload. Its kind is what the kernel is called with: `1` is a whole number, `1.0` is not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scalar {
    /// A whole number.
    Int(i64),
    /// A number with a point.
    Float(f64),
    /// `true` or `false`.
    Bool(bool),
}

/// Where an input comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum InputSpec {
    /// Random numbers.
    Random,
    /// A number that stands in the workload.
    Scalar {
        /// The number.
        value: Scalar,
    },
    /// A tensor of a safetensors file.
    Safetensors {
        /// The file, relative to the dataset's folder.
        path: String,
        /// The tensor's name in it.
        tensor_key: String,
    },
}

impl InputSpec {
    fn read(cursor: &Cursor<'_>) -> Result<Self> {
        let kind = cursor.get("type").map(|kind| kind.text()).transpose()?;
        let stored = |cursor: &Cursor<'_>| -> Result<Self> {
            let path = cursor.need("path")?;
            // Refused here already, so that a dataset is refused before anything of it runs.
            let word = path.word()?;
            if super::inputs::within(&word).is_err() {
                let found = format!("{:?}", shortened(&word));
                return Err(path.refuse(found, "a relative path without `..`", "keep files in the dataset's folder"));
            }
            Ok(Self::Safetensors { path: word, tensor_key: cursor.need("tensor_key")?.word()? })
        };
        match kind.as_deref() {
            Some("random") => Ok(Self::Random),
            Some("scalar") => Ok(Self::Scalar { value: scalar(&cursor.need("value")?)? }),
            Some("safetensors") => stored(cursor),
            // Upstream takes the first form that fits where the type is left out.
            None if cursor.get("value").is_some() => Ok(Self::Scalar { value: scalar(&cursor.need("value")?)? }),
            None if cursor.get("tensor_key").is_some() => stored(cursor),
            None => cursor.fields().map(|_| Self::Random),
            Some(other) => {
                let found = format!("the type {:?}", shortened(other));
                Err(cursor.refuse(found, "\"random\", \"scalar\" or \"safetensors\"", "correct it"))
            }
        }
    }

    fn json(&self) -> Json {
        Json::Object(match self {
            Self::Random => vec![field("type", text("random"))],
            Self::Scalar { value } => {
                let value = match value {
                    Scalar::Int(number) => Json::Int(i128::from(*number)),
                    Scalar::Float(number) => Json::Float(*number),
                    Scalar::Bool(flag) => Json::Bool(*flag),
                };
                vec![field("type", text("scalar")), field("value", value)]
            }
            Self::Safetensors { path, tensor_key } => {
                vec![
                    field("type", text("safetensors")),
                    field("path", text(path)),
                    field("tensor_key", text(tensor_key)),
                ]
            }
        })
    }
}

fn scalar(cursor: &Cursor<'_>) -> Result<Scalar> {
    const EXPECTED: &str = "a number, true or false";
    match cursor.json() {
        Json::Bool(flag) => Ok(Scalar::Bool(flag)),
        Json::Float(number) => Ok(Scalar::Float(number)),
        Json::Int(number) => match i64::try_from(number) {
            Ok(number) => Ok(Scalar::Int(number)),
            Err(_) => Err(cursor.refuse(number.to_string(), "a whole number of 64 bits", "correct the number")),
        },
        // As upstream reads numbers in quotation marks; `"NaN"` is how one is written that JSON has no number for.
        Json::Text(words) => match (words.trim().parse(), words.trim().parse()) {
            (Ok(number), _) => Ok(Scalar::Int(number)),
            (_, Ok(number)) => Ok(Scalar::Float(number)),
            _ => Err(cursor.refuse(format!("the text {:?}", shortened(&words)), EXPECTED, "correct the value")),
        },
        _ => Err(cursor.refuse("something else", EXPECTED, "correct the value")),
    }
}

/// What a definition is called with.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// The variable axes' sizes.
    pub axes: Axes,
    /// Where the inputs come from, by name. An input that is not here is random.
    pub inputs: Named<InputSpec>,
    /// What it is known by.
    pub uuid: String,
}

impl Workload {
    fn read(cursor: &Cursor<'_>) -> Result<Self> {
        let axes = cursor.need("axes")?.named()?;
        let inputs = cursor.need("inputs")?.named()?;
        let inputs = inputs.iter().map(|(name, input)| Ok(((*name).to_owned(), InputSpec::read(input)?)));
        Ok(Self {
            axes: axes.iter().map(|(name, size)| Ok(((*name).to_owned(), size.size()?))).collect::<Result<_>>()?,
            inputs: Named::distinct(inputs.collect::<Result<_>>()?),
            uuid: cursor.need("uuid")?.word()?,
        })
    }

    fn json(&self) -> Json {
        let axes = self.axes.iter().map(|(name, size)| field(name, Json::Int(i128::from(*size))));
        let inputs = self.inputs.iter().map(|(name, input)| field(name, input.json()));
        Json::Object(vec![
            field("axes", Json::Object(axes.collect())),
            field("inputs", Json::Object(inputs.collect())),
            field("uuid", text(&self.uuid)),
        ])
    }
}

words! {
    /// What came of running a solution.
    Status {
        /// The outputs are right.
        Passed = "PASSED",
        /// An output has another shape than the reference's.
        IncorrectShape = "INCORRECT_SHAPE",
        /// An output has other numbers than the reference's.
        IncorrectNumerical = "INCORRECT_NUMERICAL",
        /// An output has another element type than the reference's.
        IncorrectDtype = "INCORRECT_DTYPE",
        /// The call failed.
        RuntimeError = "RUNTIME_ERROR",
        /// It could not be built.
        CompileError = "COMPILE_ERROR",
        /// It took too long.
        Timeout = "TIMEOUT",
    }
}

/// How far outputs are from the reference's.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Correctness {
    /// The largest |x - y| / (|y| + 1e-8) of all elements.
    pub max_relative_error: f64,
    /// The largest |x - y| of all elements.
    pub max_absolute_error: f64,
    /// What a particular check found, `matched_ratio` for example.
    pub extra: Option<Named<Json>>,
}

/// How long a call took.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Performance {
    /// The solution's time, in milliseconds.
    pub latency_ms: f64,
    /// The reference's time, in milliseconds.
    pub reference_latency_ms: f64,
    /// The second by the first.
    pub speedup_factor: f64,
}

/// Where it ran.
#[derive(Debug, Clone, PartialEq)]
pub struct Environment {
    /// The GPU's name as CUDA gives it, or the processor's.
    pub hardware: String,
    /// Libraries with their versions.
    pub libs: Named<String>,
}

/// What came of a solution with a workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// The outcome.
    pub status: Status,
    /// Where it ran.
    pub environment: Environment,
    /// When, in local time: `2026-02-13T09:30:00.123456`. See [`timestamp`].
    pub timestamp: String,
    /// What was printed, or what went wrong.
    pub log: String,
    /// How far off it is: there for [`Passed`](Status::Passed) and [`IncorrectNumerical`](Status::IncorrectNumerical) alone.
    pub correctness: Option<Correctness>,
    /// How long it took: there for [`Passed`](Status::Passed) alone.
    pub performance: Option<Performance>,
}

impl Evaluation {
    /// That the status fits what stands beside it, and that no figure is negative: upstream's models refuse anything else.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data).
    pub fn validate(&self) -> Result<()> {
        match self.fault() {
            Some((place, found, expected)) => Err(unfit("the evaluation", place, found, expected, STATUS)),
            None => Ok(()),
        }
    }

    fn fault(&self) -> Option<(&'static str, String, &'static str)> {
        let there = |is: bool| if is { "one".to_owned() } else { "none".to_owned() };
        let compared = matches!(self.status, Status::Passed | Status::IncorrectNumerical);
        let timed = self.status == Status::Passed;
        if self.correctness.is_some() != compared {
            let expected = "one for PASSED and INCORRECT_NUMERICAL alone";
            return Some(("correctness", format!("{} with {}", there(!compared), self.status), expected));
        }
        if self.performance.is_some() != timed {
            return Some(("performance", format!("{} with {}", there(!timed), self.status), "one for PASSED alone"));
        }
        let errors = self.correctness.iter().flat_map(|c| [c.max_relative_error, c.max_absolute_error]);
        if let Some(error) = errors.into_iter().find(|error| *error < 0.0) {
            return Some(("correctness", error.to_string(), "errors that are not negative"));
        }
        let times = self.performance.iter().flat_map(|p| [p.latency_ms, p.reference_latency_ms, p.speedup_factor]);
        let bad = times.into_iter().find(|time| time.is_nan() || *time < 0.0);
        bad.map(|time| ("performance", time.to_string(), "times that are numbers and not negative"))
    }

    fn read(cursor: &Cursor<'_>) -> Result<Self> {
        let figure = |at: &Cursor<'_>, name| at.get(name).map_or(Ok(0.0), |figure| figure.figure());
        let correctness = cursor.given("correctness").map(|at| -> Result<Correctness> {
            let extra = at.given("extra").map(|extra| -> Result<Named<Json>> {
                let fields = extra.fields()?.into_iter().map(|(name, value)| (name.to_owned(), value.json()));
                Ok(Named::distinct(fields.collect()))
            });
            at.fields()?;
            Ok(Correctness {
                max_relative_error: figure(&at, "max_relative_error")?,
                max_absolute_error: figure(&at, "max_absolute_error")?,
                extra: extra.transpose()?,
            })
        });
        let performance = cursor.given("performance").map(|at| -> Result<Performance> {
            at.fields()?;
            Ok(Performance {
                latency_ms: figure(&at, "latency_ms")?,
                reference_latency_ms: figure(&at, "reference_latency_ms")?,
                speedup_factor: figure(&at, "speedup_factor")?,
            })
        });
        let environment = cursor.need("environment")?;
        let libs = environment.get("libs").map_or(Ok(Vec::new()), |libs| libs.fields())?;
        let libs = libs.iter().map(|(name, version)| Ok(((*name).to_owned(), version.text()?)));
        let evaluation = Self {
            status: Status::read(&cursor.need("status")?)?,
            environment: Environment {
                hardware: environment.need("hardware")?.word()?,
                libs: Named::distinct(libs.collect::<Result<_>>()?),
            },
            timestamp: cursor.need("timestamp")?.word()?,
            log: cursor.get("log").map_or(Ok(String::new()), |log| log.text())?,
            correctness: correctness.transpose()?,
            performance: performance.transpose()?,
        };
        match evaluation.fault() {
            Some((place, found, expected)) => Err(cursor.refuse(format!("{place}: {found}"), expected, STATUS)),
            None => Ok(evaluation),
        }
    }

    fn json(&self) -> Json {
        let libs = self.environment.libs.iter().map(|(name, version)| field(name, text(version)));
        let environment = Json::Object(vec![
            field("hardware", text(&self.environment.hardware)),
            field("libs", Json::Object(libs.collect())),
        ]);
        let correctness = self.correctness.as_ref().map_or(Json::Null, |correctness| {
            let extra = correctness.extra.as_ref().map_or(Json::Null, |extra| {
                Json::Object(extra.iter().map(|(name, value)| field(name, value.clone())).collect())
            });
            Json::Object(vec![
                field("max_relative_error", Json::Float(correctness.max_relative_error)),
                field("max_absolute_error", Json::Float(correctness.max_absolute_error)),
                field("extra", extra),
            ])
        });
        let performance = self.performance.as_ref().map_or(Json::Null, |performance| {
            Json::Object(vec![
                field("latency_ms", Json::Float(performance.latency_ms)),
                field("reference_latency_ms", Json::Float(performance.reference_latency_ms)),
                field("speedup_factor", Json::Float(performance.speedup_factor)),
            ])
        });
        Json::Object(vec![
            field("status", text(self.status.name())),
            field("environment", environment),
            field("timestamp", text(&self.timestamp)),
            field("log", text(&self.log)),
            field("correctness", correctness),
            field("performance", performance),
        ])
    }
}

/// A workload of a definition, and what came of a solution with it. Without a solution and an evaluation it is a workload
/// alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// The definition's name.
    pub definition: String,
    /// What it was called with.
    pub workload: Workload,
    /// The solution's name.
    pub solution: Option<String>,
    /// What came of it.
    pub evaluation: Option<Evaluation>,
}

impl Trace {
    /// A workload alone.
    pub fn workload(definition: &str, workload: Workload) -> Self {
        Self { definition: definition.to_owned(), workload, solution: None, evaluation: None }
    }

    /// Whether it is a workload alone.
    pub fn is_workload(&self) -> bool {
        self.solution.is_none() && self.evaluation.is_none()
    }

    /// Whether the solution passed.
    pub fn passed(&self) -> bool {
        self.evaluation.as_ref().is_some_and(|evaluation| evaluation.status == Status::Passed)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for what is no JSON, lacks a field or has one of another type; for figures that
    /// do not fit the status; for a path that leads out of the dataset.
    pub fn from_json(json: &str) -> Result<Self> {
        Self::parse("the trace", json.as_bytes(), 1)
    }

    fn parse(file: &str, bytes: &[u8], line: usize) -> Result<Self> {
        let document = Document::parse(file, bytes, line)?;
        let root = document.root();
        Ok(Self {
            definition: root.need("definition")?.word()?,
            workload: Workload::read(&root.need("workload")?)?,
            solution: optional_text(&root, "solution")?,
            evaluation: root.given("evaluation").map(|at| Evaluation::read(&at)).transpose()?,
        })
    }

    /// As upstream writes one: on one line, with everything.
    pub fn to_json(&self) -> String {
        let fields = vec![
            field("definition", text(&self.definition)),
            field("workload", self.workload.json()),
            field("solution", self.solution.as_deref().map_or(Json::Null, text)),
            field("evaluation", self.evaluation.as_ref().map_or(Json::Null, Evaluation::json)),
        ];
        Json::Object(fields).compact()
    }

    /// Reads a file with one on each line; empty lines are skipped.
    ///
    /// # Errors
    /// As for [`from_json`](Self::from_json), also for a line of more than [`MAX_BYTES`](super::MAX_BYTES) and a pointer of
    /// Git LFS in the file's place; [`Io`](crate::FlashInferError::Io).
    pub fn read_lines(path: impl AsRef<Path>) -> Result<Vec<Self>> {
        use std::io::{BufRead, BufReader, Read};

        let path = path.as_ref();
        let file = std::fs::File::open(path).map_err(super::error::io("opening", path))?;
        let name = path.display().to_string();
        let (mut reader, mut line, mut traces) = (BufReader::new(file), Vec::new(), Vec::new());
        for number in 1.. {
            line.clear();
            let most = MAX_BYTES as u64 + 2;
            let read = (&mut reader).take(most).read_until(b'\n', &mut line);
            if read.map_err(super::error::io("reading", path))? == 0 {
                break;
            }
            if number == 1 {
                super::error::not_a_pointer(path, &line)?;
            }
            let bytes = line.trim_ascii();
            if !bytes.is_empty() {
                traces.push(Self::parse(&name, bytes, number)?);
            }
        }
        Ok(traces)
    }

    /// Puts traces behind those of a file, one on each line. The file and its folder are made where they are not there, and
    /// a last line that was not ended is.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) where an evaluation is [not valid](Evaluation::validate): nothing is written then;
    /// [`Io`](crate::FlashInferError::Io).
    pub fn append(path: impl AsRef<Path>, traces: &[Self]) -> Result<()> {
        use std::io::{Read, Seek, SeekFrom, Write};

        let path = path.as_ref();
        traces.iter().flat_map(|trace| &trace.evaluation).try_for_each(Evaluation::validate)?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(super::error::io("making the folder", folder))?;
        }
        let mut options = std::fs::OpenOptions::new();
        let mut file =
            options.read(true).append(true).create(true).open(path).map_err(super::error::io("opening", path))?;
        let mut last = [b'\n'];
        let not_empty = file.seek(SeekFrom::End(0)).map_err(super::error::io("reading", path))? > 0;
        if not_empty {
            file.seek(SeekFrom::End(-1)).map_err(super::error::io("reading", path))?;
            file.read_exact(&mut last).map_err(super::error::io("reading", path))?;
        }
        let mut lines = if last == *b"\n" { String::new() } else { "\n".to_owned() };
        for trace in traces {
            lines.push_str(&trace.to_json());
            lines.push('\n');
        }
        // In one write, so that what several processes append does not mix.
        file.write_all(lines.as_bytes()).map_err(super::error::io("writing", path))
    }
}
