//! The rows as Markdown: the table of a function's documentation, and the index of kernels.

use std::fmt::Write;

use super::explain::{joined, names, number};
use super::{Alignment, Attributes, Dtype, From, Kind, Pdl, Reports, Role, Row, RunsOn, Strides};

/// The table of a kernel's tensors, as it stands in its function's documentation.
pub fn arguments(row: &Row) -> String {
    let mut table = String::from("| tensor | shape | dtype | |\n|---|---|---|---|\n");
    for (_, name, tensor) in row.tensors() {
        let dtype = match tensor.dtype {
            Dtype::Half => "F16 or BF16".to_owned(),
            Dtype::Bf16 => "BF16".to_owned(),
            Dtype::Eight => "F8E4M3 or F8E5M2".to_owned(),
            Dtype::Only(dtype) => dtype.to_string(),
            Dtype::OneOf(types) => joined(types),
            Dtype::As(other) => format!("as `{}`", row.arguments[other].name),
        };
        let role = match tensor.role {
            Role::In if tensor.optional => "read, optional",
            Role::In => "read",
            Role::Out => "written",
            Role::Unordered => "written, each row in any order",
            Role::InPlace => "read and written",
            Role::Workspace => "scratch memory",
        };
        let strides = match tensor.strides {
            Strides::Contiguous => "contiguous".to_owned(),
            Strides::As(other) => format!("strides as `{}`", row.arguments[other].name),
            Strides::Rows if tensor.shape.len() == 1 => "stride 1".to_owned(),
            Strides::Rows if tensor.role.writes() => "rows anywhere".to_owned(),
            Strides::Rows => "rows anywhere, also repeated".to_owned(),
        };
        let alignment = match tensor.alignment {
            Alignment::Bytes(1) => "at any address".to_owned(),
            Alignment::Bytes(bytes) => format!("aligned to {bytes} bytes"),
            Alignment::Vector { most: 1, .. } => "aligned to an element".to_owned(),
            Alignment::Vector { dimension, most } => {
                format!("aligned to gcd({most}, {}) elements", row.dimensions[dimension].name)
            }
            Alignment::Access { dimension, bytes } => {
                let name = row.dimensions[dimension].name;
                format!("aligned to gcd({bytes} bytes' elements, {name}) elements")
            }
        };
        let _ = writeln!(table, "| `{name}` | `{}` | {dtype} | {role}; {strides}; {alignment} |", names(row, tensor));
    }
    table
}

/// The index of kernels: docs/kernels.md.
pub fn index(rows: &[&Row]) -> String {
    let mut text = String::from(
        "# Kernels\n\nGenerated from the rows in `src/kernels`; `FLASHINFER_RS_BLESS=1 cargo test --test rows` writes it \
         anew.\n\n| kernel | library | feature | runs on |\n|---|---|---|---|\n",
    );
    for row in rows {
        let Row { kernel, library, feature, .. } = row;
        let _ = writeln!(text, "| [{kernel}](#{}) | `{library}` | `{feature}` | {} |", anchor(kernel), gpus(row));
    }
    for row in rows {
        let _ = writeln!(text, "\n## {}\n\n{}\n", row.kernel, row.summary);
        let _ = writeln!(text, "`{}` of `{}`; contract: {}.\n", row.function, row.library, row.source);
        text += &arguments(row);
        let scalars = row.arguments.iter().filter_map(|argument| match argument.kind {
            Kind::Tensor(_) => None,
            Kind::Positive => Some(format!("`{}` positive", argument.name)),
            Kind::NotNegative => Some(format!("`{}` positive, or 0.0 for the default", argument.name)),
            Kind::Missing(_) => Some(format!("`{}` without memory", argument.name)),
            Kind::Nothing => Some(format!("without `{}`", argument.name)),
            ref kind => Some(format!("`{}` {}", argument.name, number(kind))),
        });
        let scalars: Vec<_> = scalars.collect();
        if !scalars.is_empty() {
            let _ = writeln!(text, "\nNumbers: {}.", scalars.join(", "));
        }
        // Those that are not of a shape are not the caller's to choose.
        let chosen = row.dimensions.iter().filter(|d| !matches!(d.from, From::ElementSize(_) | From::Gpu(_)));
        let limits = chosen.map(|d| match (d.least, d.most) {
            (least, most) if least == most => format!("{} = {least}", d.name),
            (least, most) => format!("{least} ≤ {} ≤ {most}", d.name),
        });
        let _ = writeln!(text, "\nDimensions: {}.", limits.collect::<Vec<_>>().join(", "));
        for relation in row.relations {
            let place = if relation.only_on_gpu { " (on a GPU)" } else { "" };
            let _ = writeln!(text, "- {}{place}: {}.", relation.name, relation.expected);
        }
        let split = if row.extent.split { "more are divided into several launches" } else { "more are refused" };
        let _ = writeln!(
            text,
            "- From a tensor's first element to its last, a launch covers at most {}; {split}.",
            row.extent.most
        );
        if row.extent.stride < row.extent.most {
            let _ = writeln!(text, "- Strides are at most {}.", row.extent.stride);
        }
        let pdl = match row.pdl {
            Pdl::None => "none".to_owned(),
            Pdl::Waits => "the kernel waits before it reads".to_owned(),
            Pdl::ReadsBefore(what) => format!("the kernel reads {what} before it waits, so graphs leave it off"),
        };
        let _ = writeln!(text, "- Programmatic dependent launch: {pdl}.");
        if row.reports == Reports::Nothing {
            text += "- Its launcher does not say whether it launched the kernel: this crate asks CUDA.\n";
        }
        match row.attributes {
            Attributes::None => {}
            Attributes::PerCall => {
                text += "- Each call sets its kernel's shared memory, so calls on one GPU take turns.\n";
            }
            Attributes::OncePerProcess { .. } => {
                text += "- The first call on each GPU sets its kernel's shared memory, alone.\n";
            }
        }
        for hazard in row.hazards {
            let _ = writeln!(text, "- {hazard}");
        }
        let _ = writeln!(text, "- Tests: {}.", row.tests);
    }
    text
}

fn gpus(row: &Row) -> String {
    match row.runs_on {
        RunsOn::AtLeast(major, minor) if row.is_own() => {
            format!("compute capability {major}.{minor} and above")
        }
        RunsOn::AtLeast(major, minor) => {
            format!("compute capability {major}.{minor} and above, as far as the wheel has them")
        }
        RunsOn::Exactly(major, minor) => format!("compute capability {major}.{minor}"),
    }
}

/// As Markdown makes it of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}
