//! That what people read of the rows is what stands in them: the tables in the functions' documentation, and the index of
//! kernels. `FLASHINFER_RS_BLESS=1 cargo test --test rows` writes both anew.

use std::fs;
use std::path::{Path, PathBuf};

use flashinfer_rs::contract::{
    self, Alignment, Contents, From, Kind, MAX_ARGUMENTS, MAX_DIMENSIONS, Row, Size, Strides,
};
use flashinfer_rs::kernels;

const COMMENT: &str = "///";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn blessed() -> bool {
    std::env::var_os("FLASHINFER_RS_BLESS").is_some()
}

/// The families' files.
fn sources() -> Vec<PathBuf> {
    let files = fs::read_dir(root().join("src/kernels")).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|ending| ending == "rs")).collect();
    files.sort();
    files
}

fn marker(row: &Row) -> String {
    format!("{COMMENT} <!-- {} -->", row.kernel)
}

/// A source with each row's table behind its marker, and the rows that it has a marker of.
fn with_tables(source: &str, rows: &[&'static Row]) -> (String, Vec<&'static str>) {
    let (mut written, mut found) = (String::new(), Vec::new());
    let mut lines = source.lines().peekable();
    while let Some(line) = lines.next() {
        written += line;
        written.push('\n');
        let Some(row) = rows.iter().find(|row| line == marker(row)) else { continue };
        found.push(row.kernel);
        // Markdown wants an empty line between a comment and a table.
        written += COMMENT;
        written.push('\n');
        for line in contract::arguments(row).lines() {
            written += &format!("{COMMENT} {line}\n");
        }
        while lines.next_if(|line| *line == COMMENT || line.starts_with("/// |")).is_some() {}
        written += COMMENT;
        written.push('\n');
    }
    (written, found)
}

#[test]
fn the_table_of_every_row_stands_in_its_functions_documentation() {
    let rows = kernels::rows();
    let mut found = Vec::new();
    for path in sources() {
        let source = fs::read_to_string(&path).unwrap();
        let (expected, of_file) = with_tables(&source, &rows);
        found.extend(of_file);
        if blessed() {
            fs::write(&path, expected).unwrap();
        } else {
            assert_eq!(source, expected, "{}: FLASHINFER_RS_BLESS=1 writes the tables anew", path.display());
        }
    }
    let mut expected: Vec<_> = rows.iter().map(|row| row.kernel).collect();
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(
        found, expected,
        "each row has one marker, `{COMMENT} <!-- kernel -->`, where its function is documented"
    );
}

#[test]
fn the_index_of_kernels_is_that_of_the_rows() {
    let (path, expected) = (root().join("docs/kernels.md"), contract::index(&kernels::rows()));
    if blessed() {
        fs::write(&path, expected).unwrap();
    } else {
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(found, expected, "FLASHINFER_RS_BLESS=1 writes it anew");
    }
}

/// What the engine takes for granted of a row.
#[test]
fn every_row_makes_sense() {
    let rows = kernels::rows();
    let mut names: Vec<_> = rows.iter().map(|row| row.kernel).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), rows.len(), "two rows have one name");
    for row in rows {
        let name = row.kernel;
        let known = |dimension: usize| assert!(dimension < row.dimensions.len(), "{name}: dimension {dimension}");
        let rank_of = |argument: usize| match &row.arguments[argument].kind {
            Kind::Tensor(tensor) => tensor.shape.len(),
            _ => panic!("{name}: argument {argument} is no tensor"),
        };
        assert!(row.arguments.len() <= MAX_ARGUMENTS && row.dimensions.len() <= MAX_DIMENSIONS, "{name}");
        let is_library = [".so", ".ptx"].iter().any(|ending| row.library.ends_with(ending));
        assert!(name.starts_with(row.function) && is_library, "{name}");
        assert!(row.tensors().any(|(i, _, tensor)| i == row.lead && !tensor.optional), "{name}: its lead");
        for (_, argument, tensor) in row.tensors() {
            tensor.shape.iter().for_each(|size| match size {
                Size::Of(dimension) | Size::OneMore(dimension) | Size::Twice(dimension) | Size::Eighth(dimension) => {
                    known(*dimension);
                }
            });
            match tensor.alignment {
                Alignment::Bytes(bytes) => assert!(bytes.is_power_of_two(), "{name}: {argument}"),
                Alignment::Vector { dimension, most } => {
                    known(dimension);
                    assert!((most as u64).is_power_of_two(), "{name}: {argument}");
                }
                Alignment::Access { dimension, bytes } => {
                    known(dimension);
                    assert!(bytes.is_power_of_two(), "{name}: {argument}");
                }
            }
            match tensor.contents {
                Contents::Offsets(parts, whole) => [parts, whole].into_iter().for_each(known),
                Contents::Turns(among) | Contents::Rounds(among) | Contents::Distinct(among) => known(among),
                Contents::Uniform(_) | Contents::Between(..) | Contents::Steps(..) | Contents::Zeros => {}
            }
            if let Strides::As(other) = tensor.strides {
                assert_eq!(rank_of(other), tensor.shape.len(), "{name}: {argument}");
            }
        }
        for (at, dimension) in row.dimensions.iter().enumerate() {
            assert!(!dimension.name.contains(' ') && dimension.least <= dimension.most, "{name}: {}", dimension.name);
            assert!(dimension.examples.iter().all(|size| (dimension.least..=dimension.most).contains(size)), "{name}");
            match dimension.from {
                From::Shape(argument, size) | From::OneLess(argument, size) => {
                    assert!(size < rank_of(argument) && !dimension.examples.is_empty(), "{name}: {}", dimension.name);
                }
                From::Number(argument) => {
                    assert!(
                        matches!(row.arguments[argument].kind, Kind::Whole(..) | Kind::Switch),
                        "{name}: {}",
                        dimension.name
                    );
                    assert!(!dimension.examples.is_empty(), "{name}: {}", dimension.name);
                }
                From::Larger(a, b) | From::Sum(a, b) => {
                    assert!(a < at && b < at && dimension.examples.is_empty(), "{name}")
                }
                // Tests draw the lead's type first.
                From::ElementSize(argument) => {
                    assert!(argument == row.lead && dimension.examples.is_empty(), "{name}: {}", dimension.name);
                }
                From::Gpu(_) => assert!(dimension.examples.is_empty(), "{name}: {}", dimension.name),
            }
        }
        for relation in row.relations {
            assert!(!relation.name.contains(' '), "{name}: {}", relation.name);
        }
        for file in row.tests.split(", ") {
            assert!(root().join(file.trim_matches('`')).is_file(), "{name}: there is no {file}");
        }
    }
}
