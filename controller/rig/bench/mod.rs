//! `farcall bench`: what calls and processes cost, against baselines measured in the same run.

mod baseline;
mod calls;
mod idle;
mod measure;
mod memory;
mod plot;
mod processes;
mod progress;
mod ring;
mod typed;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use farcall::host::local::Stdio;
use farcall::link::Polling;
use farcall::{Local, Process};
use serde::Serialize;

use crate::command::output::{columns, print, print_json};
use crate::command::{Done, Failure};

pub use baseline::BenchServer;
pub use idle::BenchIdle;
use measure::{Figure, PASSES};
use progress::Progress;

/// Measures what calls and processes cost, as ratios against baselines of the same run.
///
/// A figure and its baseline take turns in many rounds, in several passes over all figures. Told is the
/// round whose ratio is the median; +- is half the distance between the quartiles. Machines differ and
/// are noisy: compare ratios, not times. What takes turns with its server by way of the kernel is pinned
/// to one processor, what moves bytes or shares memory to two; children that run no program are where
/// the kernel puts them.
///
/// A ratio is VALUE to BASELINE: of times, so that less is better, and for memory of bandwidths, so
/// that more is.
#[derive(Args)]
pub struct Bench {
    /// Print one array of {"name", "value", "unit", "baseline", "baseline_value", "ratio"}
    #[arg(long)]
    json: bool,
    /// Also draw the ratios as a picture; with '-' on standard output, and the table on standard error
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Measure only these groups
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Group>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Calls one at a time, pipelined, and in chains
    Calls,
    /// Bytes into and out of a process
    Memory,
    /// Processes made and gone
    Spawn,
    /// What an idle process costs
    Footprint,
    /// Many processes under one controller
    Scale,
}

/// One figure.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    value: f64,
    unit: &'static str,
    baseline: Option<&'static str>,
    baseline_value: Option<f64>,
    ratio: Option<f64>,
    /// Half the distance between the quartiles, in percent of the median.
    #[serde(skip)]
    spread: Option<f64>,
    /// The same of the baseline.
    #[serde(skip)]
    baseline_spread: Option<f64>,
}

impl Row {
    /// A figure that stands for itself.
    fn alone(name: &'static str, value: f64, unit: &'static str) -> Self {
        Self {
            name,
            value,
            unit,
            baseline: None,
            baseline_value: None,
            ratio: None,
            spread: None,
            baseline_spread: None,
        }
    }
}

impl Bench {
    pub async fn run(self) -> Done {
        if self.json && self.svg.as_deref() == Some(Path::new("-")) {
            return Err(Failure::usage("--json and --svg -: both are standard output"));
        }
        // As a task: whoever makes calls in a program is one.
        let rows = tokio::spawn(measured(self.only)).await??;
        if let Some(path) = &self.svg {
            let picture = plot::ratios(&rows)?;
            if path == Path::new("-") {
                print(&picture)?;
            } else {
                fs::write(path, picture)
                    .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
            }
        }
        if self.json {
            print_json(&rows)?;
        } else if self.svg.as_deref() == Some(Path::new("-")) {
            eprint!("{}", table(&rows));
        } else {
            print(&table(&rows))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn measured(only: Vec<Group>) -> Result<Vec<Row>, Failure> {
    let progress = Progress::new()?;
    let is_wanted = |group: &&Group| only.is_empty() || only.contains(group);
    let groups = || Group::value_variants().iter().filter(is_wanted);
    let mut figures = Vec::new();
    for _ in 0..PASSES {
        for group in groups() {
            for figure in group.figures(&progress).await? {
                figure.add_to(&mut figures);
            }
        }
    }
    let mut rows: Vec<Row> = figures.iter().map(Figure::row).collect();
    for group in groups() {
        rows.extend(group.rows(&progress).await?);
    }
    Ok(rows)
}

impl Group {
    /// One pass over what is measured in turns.
    async fn figures(self, progress: &Progress) -> Result<Vec<Figure>, Failure> {
        match self {
            Self::Calls => {
                let mut figures = ring::ring(progress).await?;
                figures.extend(calls::calls(progress).await?);
                figures.extend(typed::typed(progress).await?);
                Ok(figures)
            }
            Self::Memory => memory::memory(progress).await,
            Self::Spawn => processes::spawn(progress).await,
            Self::Footprint | Self::Scale => Ok(Vec::new()),
        }
    }

    /// What is measured once.
    async fn rows(self, progress: &Progress) -> Result<Vec<Row>, Failure> {
        match self {
            Self::Footprint => processes::footprint(progress).await,
            Self::Scale => processes::scale(progress).await,
            Self::Calls | Self::Memory | Self::Spawn => Ok(Vec::new()),
        }
    }
}

/// A root server to measure, which comes to share memory with this process as said.
async fn root(polling: Option<Polling>) -> Result<Process, Failure> {
    Ok(Local::new().stdio(Stdio::Null).polling(polling).start().await?)
}

/// The number behind `field` in a file of /proc.
fn number(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn table(rows: &[Row]) -> String {
    let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
    let spread = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.0}%"));
    let header = ["NAME", "VALUE", "+-", "UNIT", "BASELINE", "+-", "RATIO", "AGAINST"];
    let mut lines = vec![header.map(String::from)];
    lines.extend(rows.iter().map(|row| {
        [
            row.name.into(),
            number(Some(row.value)),
            spread(row.spread),
            row.unit.into(),
            number(row.baseline_value),
            spread(row.baseline_spread),
            number(row.ratio),
            row.baseline.unwrap_or("-").into(),
        ]
    }));
    // Words to the left, numbers to the right.
    columns(&lines, [true, false, false, true, false, false, false, true])
}
