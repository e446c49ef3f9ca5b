//! The figures, as SVG text that is a function of the values alone.

use plotters::coord::combinators::BindKeyPoints as _;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::plan::{self, ARMS, COMPARISONS, Limit, Program};
use super::record::Samples;
use super::stats::{self, Estimate, Summary};
use crate::vendoring::error::{Error, Result};

const WIDTH: u32 = 960;
const FONT: &str = "sans-serif";
const TEXT: RGBColor = RGBColor(0x24, 0x29, 0x2f);
const RULE: RGBColor = RGBColor(0xd0, 0xd7, 0xde);
pub const BOUND: RGBColor = RGBColor(0xc6, 0x28, 0x28);
pub const RUST: RGBColor = RGBColor(0xc4, 0x5a, 0x1c);
pub const C: RGBColor = RGBColor(0x6e, 0x77, 0x81);
pub const PYTHON: RGBColor = RGBColor(0x2f, 0x6f, 0xb0);

/// Names and contents.
pub type Files = Vec<(&'static str, String)>;

pub fn all(samples: &Samples) -> Result<Files> {
    Ok(vec![
        ("host.svg", host(samples)?),
        ("ratios.svg", ratios(samples)?),
        ("series.svg", series(samples)?),
        ("gemma.svg", gemma(samples)?),
        ("gdn.svg", gdn(samples)?),
    ])
}

/// One row of a figure.
pub struct Row {
    pub name: String,
    pub color: RGBColor,
    pub value: f64,
    /// Drawn around the value.
    pub range: Option<(f64, f64)>,
    /// A line at a bound.
    pub bound: Option<f64>,
    pub label: String,
}

/// A figure of one line per row.
pub struct Rows<'a> {
    pub title: &'a str,
    pub note: &'a str,
    pub axis: &'a str,
    pub rows: Vec<Row>,
    /// Bars from 0, else points.
    pub bars: bool,
    pub legend: &'a [(&'a str, RGBColor)],
}

const PROGRAMS: &[(&str, RGBColor)] = &[("Rust, this crate", RUST), ("C", C), ("Python", PYTHON)];

fn host(samples: &Samples) -> Result<String> {
    let empty = stats::summary(&samples.values("limits", plan::HOST_EMPTY));
    let mut rows: Vec<_> = empty.map(|empty| row("empty kernel", empty, C)).into_iter().collect();
    rows.extend(arms(samples, plan::HOST_GEMMA));
    lines(&Rows {
        title: "Host time of a call of gemma_rmsnorm, 1 × 4096, bf16",
        note: "median over blocks, with quartiles; less is better",
        axis: "ns per call",
        rows,
        bars: true,
        legend: PROGRAMS,
    })
}

fn series(samples: &Samples) -> Result<String> {
    lines(&Rows {
        title: "430 launches of gemma_rmsnorm, 1 × 4096, until the GPU is done",
        note: "median over blocks, with quartiles; less is better",
        axis: "µs for the whole series",
        rows: arms(samples, plan::GEMMA_SERIES),
        bars: true,
        legend: PROGRAMS,
    })
}

fn arms(samples: &Samples, case: &str) -> Vec<Row> {
    let rows = ARMS.iter().filter_map(|arm| {
        let color = match arm.program {
            Program::Rust => RUST,
            Program::C => C,
            Program::Python => PYTHON,
        };
        Some(row(arm.name, stats::summary(&samples.values(arm.name, case))?, color))
    });
    rows.collect()
}

fn row(name: &str, Summary { median, lower_quartile, upper_quartile }: Summary, color: RGBColor) -> Row {
    let (range, label) = (Some((lower_quartile, upper_quartile)), format!("{median:.0}"));
    Row { name: name.to_owned(), color, value: median, range, bound: None, label }
}

fn ratios(samples: &Samples) -> Result<String> {
    let above = |ratio: f64| (ratio - 1.0) * 100.0;
    let rows = COMPARISONS.iter().filter_map(|comparison| {
        let Limit::AtMost(bound) = comparison.limit else { return None };
        let Estimate { median, interval } = comparison.found(samples)?;
        let kernel = comparison.case().split(' ').nth(1).unwrap_or_default();
        Some(Row {
            name: format!("{kernel}: {}", comparison.what),
            color: RUST,
            value: above(median),
            range: interval.map(|(low, high)| (above(low), above(high))),
            bound: Some(above(bound)),
            label: format!("{median:.3} (bound: {bound})"),
        })
    });
    lines(&Rows {
        title: "Host time of a call beside one from C",
        note: "median of the ratios of host time within each block, with its 95 % interval",
        axis: "% more than C",
        rows: rows.collect(),
        bars: false,
        legend: &[("ratio", RUST), ("bound", BOUND)],
    })
}

fn gemma(samples: &Samples) -> Result<String> {
    let copy = plan::copy_rate(samples);
    let rows = plan::GEMMA_SHAPES.iter().filter_map(|&shape| {
        let value = plan::gemma_rate(samples, "graph", shape)? / copy?;
        let (name, label) = (format!("{} × {}", shape.0, shape.1), format!("{value:.2}"));
        Some(Row { name, color: RUST, value, range: None, bound: Some(1.0), label })
    });
    lines(&Rows {
        title: "GPU time of gemma_rmsnorm, bf16: share of a copy's bandwidth",
        note: "bytes that must be moved per second, over those of a copy on the device; more is better",
        axis: "share",
        rows: rows.collect(),
        bars: true,
        legend: &[("gemma_rmsnorm", RUST), ("a copy", BOUND)],
    })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// White, so that it reads the same on a dark page, with title, note and legend; answers what is left below them.
fn page<'a>(root: &Area<'a>, title: &str, note: &str, legend: &[(&str, RGBColor)]) -> Result<Area<'a>> {
    root.fill(&WHITE).map_err(undrawn)?;
    root.draw(&Text::new(title.to_owned(), (16, 14), style(20))).map_err(undrawn)?;
    root.draw(&Text::new(note.to_owned(), (16, 42), style(14))).map_err(undrawn)?;
    let mut x = 16;
    for (name, color) in legend {
        root.draw(&Rectangle::new([(x, 68), (x + 12, 80)], color.filled())).map_err(undrawn)?;
        root.draw(&Text::new((*name).to_owned(), (x + 18, 66), style(14))).map_err(undrawn)?;
        x += 44 + 7 * name.chars().count() as i32;
    }
    Ok(root.margin(92, 8, 8, 24))
}

pub fn lines(figure: &Rows<'_>) -> Result<String> {
    let count = figure.rows.len();
    let numbers = figure.rows.iter().flat_map(|row| {
        let (low, high) = row.range.unwrap_or((row.value, row.value));
        [row.value, low, high, row.bound.unwrap_or(row.value)]
    });
    let (low, high) = numbers.fold((0.0_f64, 0.0_f64), |(low, high), number| (low.min(number), high.max(number)));
    let high = if high > low { high } else { low + 1.0 };
    // Room for the labels, at about 8 pixels a letter of some 700.
    let longest = figure.rows.iter().map(|row| row.label.chars().count()).max().unwrap_or(0);
    let room = 0.02 + longest as f64 * 8.0 / 700.0;
    let (low, high) = (if low < 0.0 { low - 0.05 * (high - low) } else { 0.0 }, high + room * (high - low));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, 150 + 26 * count.max(1) as u32)).into_drawing_area();
        let area = page(&root, figure.title, figure.note, figure.legend)?;
        let mut builder = ChartBuilder::on(&area);
        builder.x_label_area_size(44).y_label_area_size(244);
        let mut chart = builder.build_cartesian_2d(low..high, 0.0..count.max(1) as f64).map_err(undrawn)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_y_mesh().y_labels(0).x_labels(8).light_line_style(WHITE).bold_line_style(RULE).axis_style(RULE);
        mesh.x_label_formatter(&|x| format!("{}", (x * 1e6).round() / 1e6));
        mesh.x_desc(figure.axis).label_style(style(13)).axis_desc_style(style(14)).draw().map_err(undrawn)?;
        for (i, row) in figure.rows.iter().enumerate() {
            let y = (count - i) as f64 - 0.5;
            let across = |x: f64, half: f64, color: RGBColor, width: u32| {
                PathElement::new(vec![(x, y - half), (x, y + half)], color.stroke_width(width))
            };
            if figure.bars {
                let bar = Rectangle::new([(0.0, y - 0.32), (row.value, y + 0.32)], row.color.mix(0.8).filled());
                chart.draw_series([bar]).map_err(undrawn)?;
            }
            if let Some((low, high)) = row.range {
                let whisker = PathElement::new(vec![(low, y), (high, y)], TEXT.stroke_width(1));
                chart
                    .draw_series([whisker, across(low, 0.16, TEXT, 1), across(high, 0.16, TEXT, 1)])
                    .map_err(undrawn)?;
            }
            if !figure.bars {
                chart.draw_series([Circle::new((row.value, y), 5, row.color.filled())]).map_err(undrawn)?;
            }
            if let Some(bound) = row.bound {
                chart.draw_series([across(bound, 0.42, BOUND, 2)]).map_err(undrawn)?;
            }
            let end = row.range.map_or(row.value, |(_, high)| high.max(row.value));
            // A bound beyond a bar is far from its label.
            let end = row.bound.filter(|_| !figure.bars).map_or(end, |bound| end.max(bound));
            let name = chart.backend_coord(&(low, y));
            let label = chart.backend_coord(&(end, y));
            let middle = |horizontal| style(14).pos(Pos::new(horizontal, VPos::Center));
            let name = Text::new(row.name.clone(), (name.0 - 10, name.1), middle(HPos::Right));
            root.draw(&name).map_err(undrawn)?;
            let label = Text::new(row.label.clone(), (label.0 + 8, label.1), middle(HPos::Left));
            root.draw(&label).map_err(undrawn)?;
        }
        root.present().map_err(undrawn)?;
    }
    Ok(svg)
}

/// One line per number of sequences.
const SEQUENCES: [RGBColor; 3] = [RUST, PYTHON, RGBColor(0x2e, 0x7d, 0x32)];

fn gdn(samples: &Samples) -> Result<String> {
    let names: Vec<_> = plan::GDN_SEQUENCES
        .map(|sequences| if sequences == 1 { "1 sequence".to_owned() } else { format!("{sequences} sequences") })
        .into();
    let legend: Vec<_> = names.iter().map(String::as_str).zip(SEQUENCES).collect();
    let lines: Vec<(Vec<(f64, f64)>, RGBColor)> = plan::GDN_SEQUENCES
        .iter()
        .zip(SEQUENCES)
        .map(|(&sequences, color)| {
            let point = |&tokens: &u64| {
                let ns = plan::median(samples, "graph", &plan::gdn_case(tokens, sequences))?;
                Some((tokens as f64, ns / 1e6))
            };
            (plan::GDN_TOKENS.iter().filter_map(point).collect(), color)
        })
        .collect();
    let times = lines.iter().flat_map(|(points, _)| points).map(|&(_, ms)| ms).filter(|ms| *ms > 0.0);
    let (low, high) = times.fold((f64::INFINITY, 0.0_f64), |(low, high), ms| (low.min(ms), high.max(ms)));
    let (low, high) = if high > 0.0 { (low / 1.5, high * 1.5) } else { (0.01, 1.0) };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, 560)).into_drawing_area();
        let title = "GPU time of gdn_prefill, 16/16/32 heads × 128, bf16";
        let note = "median over blocks; both axes are logarithmic; less is better";
        let area = page(&root, title, note, &legend)?;
        let tokens = plan::GDN_TOKENS.map(|tokens| tokens as f64);
        let across: LogCoord<f64> = (tokens[0] / 1.3..tokens[tokens.len() - 1] * 1.3).log_scale().into();
        let up: LogCoord<f64> = (low..high).log_scale().into();
        let mut builder = ChartBuilder::on(&area);
        builder.x_label_area_size(44).y_label_area_size(72);
        let mut chart = builder
            .build_cartesian_2d(across.with_key_points(tokens.to_vec()), up.with_key_points(marks(low, high)))
            .map_err(undrawn)?;
        let mut mesh = chart.configure_mesh();
        mesh.light_line_style(WHITE).bold_line_style(RULE).axis_style(RULE).x_desc("tokens, all sequences together");
        mesh.y_desc("ms").label_style(style(13)).axis_desc_style(style(14));
        mesh.x_label_formatter(&|tokens| format!("{tokens:.0}")).y_label_formatter(&|ms| format!("{ms}"));
        mesh.draw().map_err(undrawn)?;
        for (points, color) in lines {
            chart.draw_series(LineSeries::new(points.clone(), color.stroke_width(2))).map_err(undrawn)?;
            chart.draw_series(points.iter().map(|&at| Circle::new(at, 4, color.filled()))).map_err(undrawn)?;
        }
        root.present().map_err(undrawn)?;
    }
    Ok(svg)
}

/// 1, 2 and 5 times each power of ten within a range.
fn marks(low: f64, high: f64) -> Vec<f64> {
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let marks = powers.flat_map(|power| {
        // Divided, not multiplied: 5 / 100 is written as 0.05, 5 × 0.01 need not be.
        let (by, over) = (10_f64.powi(power.max(0)), 10_f64.powi((-power).max(0)));
        [1.0, 2.0, 5.0].map(|digit| digit * by / over)
    });
    marks.filter(|mark| (low..=high).contains(mark)).collect()
}

fn style(size: u32) -> TextStyle<'static> {
    (FONT, size).into_font().color(&TEXT)
}

fn undrawn(error: impl std::fmt::Display) -> Error {
    Error::Refused(format!("a figure cannot be drawn: {error}; check the values that it is of"))
}
