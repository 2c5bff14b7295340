//! `farcall bench`: what calls and processes cost, against baselines measured in the same run.

mod baseline;
mod calls;
mod measure;
mod plot;
mod processes;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use farcall::host::local::Stdio;
use farcall::{Local, Process};
use serde::Serialize;

use crate::output::{print, print_json};
use crate::{Done, Failure};

pub use baseline::BenchServer;

/// Measures what calls and processes cost, as ratios against baselines of the same run.
///
/// Medians over several rounds, in which a figure and its baseline take turns. Machines differ and
/// are noisy: compare ratios, not times.
#[derive(Args)]
pub struct Bench {
    /// Print one array of {"name", "value", "unit", "baseline", "baseline_value", "ratio"}
    #[arg(long)]
    json: bool,
    /// Also draw the ratios as a picture
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
}

impl Row {
    /// A figure that stands for itself.
    fn alone(name: &'static str, value: f64, unit: &'static str) -> Self {
        Self { name, value, unit, baseline: None, baseline_value: None, ratio: None, spread: None }
    }
}

impl Bench {
    pub async fn run(self) -> Done {
        let mut rows = Vec::new();
        if self.begins(Group::Calls) {
            rows.extend(calls::calls().await?);
        }
        if self.begins(Group::Memory) {
            rows.extend(calls::memory().await?);
        }
        if self.begins(Group::Spawn) {
            rows.extend(processes::spawn().await?);
        }
        if self.begins(Group::Footprint) {
            rows.extend(processes::footprint().await?);
        }
        if self.begins(Group::Scale) {
            rows.extend(processes::scale().await?);
        }
        if let Some(path) = &self.svg {
            fs::write(path, plot::ratios(&rows)?)
                .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        }
        if self.json {
            print_json(&rows)?;
        } else {
            print(&table(&rows))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Whether a group is to be measured; then says on standard error that it is.
    fn begins(&self, group: Group) -> bool {
        let wanted = self.only.is_empty() || self.only.contains(&group);
        if wanted && let Some(value) = group.to_possible_value() {
            eprintln!("measuring {} ...", value.get_name());
        }
        wanted
    }
}

/// A root server to measure.
async fn root() -> Result<Process, Failure> {
    Ok(Local::new().stdio(Stdio::Null).start().await?)
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<24} {:>12} {:<8} {:>12}  {:>7}  {:>6}  {}\n",
        "NAME", "VALUE", "UNIT", "BASELINE", "RATIO", "SPREAD", "AGAINST"
    );
    for row in rows {
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
        let spread = row.spread.map_or("-".into(), |spread| format!("{spread:.0}%"));
        text.push_str(&format!(
            "{:<24} {:>12.2} {:<8} {:>12}  {:>7}  {:>6}  {}\n",
            row.name,
            row.value,
            row.unit,
            number(row.baseline_value),
            number(row.ratio),
            spread,
            row.baseline.unwrap_or("-"),
        ));
    }
    text
}
