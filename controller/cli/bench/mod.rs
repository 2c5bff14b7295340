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
        let wanted = |group| self.only.is_empty() || self.only.contains(&group);
        let mut rows = Vec::new();
        if wanted(Group::Calls) {
            self.progress("calls");
            rows.extend(calls::calls().await?);
        }
        if wanted(Group::Memory) {
            self.progress("memory");
            rows.extend(calls::memory().await?);
        }
        if wanted(Group::Spawn) {
            self.progress("spawn");
            rows.extend(processes::spawn().await?);
        }
        if wanted(Group::Footprint) {
            self.progress("footprint");
            rows.extend(processes::footprint().await?);
        }
        if wanted(Group::Scale) {
            self.progress("scale");
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

    /// Says on standard error what is being measured.
    fn progress(&self, group: &str) {
        eprintln!("measuring {group} ...");
    }
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
