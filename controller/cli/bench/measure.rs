//! Medians of figures that take turns with their baselines.

use std::time::{Duration, Instant};

use farcall::Process;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::Row;
use crate::Failure;

/// How often a figure and its baseline take turns.
const ROUNDS: usize = 15;

/// Durations of the rounds of one thing, in microseconds a repetition.
#[derive(Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn add(&mut self, elapsed: Duration, repetitions: usize) {
        self.0.push(elapsed.as_secs_f64() * 1e6 / repetitions as f64);
    }

    fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * part).round() as usize]
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Half the distance between the quartiles, in percent of the median.
    fn spread(&self) -> f64 {
        50.0 * (self.quantile(0.75) - self.quantile(0.25)) / self.median()
    }
}

/// Lets a figure and its baseline take turns, each measuring `repetitions` at once.
///
/// It is a macro because both are blocks that await.
macro_rules! take_turns {
    ($repetitions:expr, $figure:expr, $baseline:expr) => {{
        let repetitions: usize = $repetitions;
        let mut figure = $crate::bench::measure::Samples::default();
        let mut baseline = $crate::bench::measure::Samples::default();
        for round in 0..=$crate::bench::measure::rounds() {
            let begun = std::time::Instant::now();
            $figure;
            let middle = std::time::Instant::now();
            $baseline;
            // The first round warms up.
            if round > 0 {
                figure.add(middle - begun, repetitions);
                baseline.add(middle.elapsed(), repetitions);
            }
        }
        (figure, baseline)
    }};
}
pub(super) use take_turns;

pub const fn rounds() -> usize {
    ROUNDS
}

/// A row of times.
pub fn row(
    name: &'static str,
    against: &'static str,
    (figure, baseline): (Samples, Samples),
) -> Row {
    Row {
        name,
        value: figure.median(),
        unit: "us",
        baseline: Some(against),
        baseline_value: Some(baseline.median()),
        ratio: Some(figure.median() / baseline.median()),
        spread: Some(figure.spread()),
    }
}

/// A row of bandwidths, for `bytes` a repetition.
pub fn bandwidth(
    name: &'static str,
    against: &'static str,
    bytes: usize,
    samples: (Samples, Samples),
) -> Row {
    let gigabytes = |microseconds: f64| bytes as f64 / microseconds / 1e3;
    let row = row(name, against, samples);
    let (value, baseline) = (gigabytes(row.value), row.baseline_value.map(gigabytes));
    Row {
        value,
        unit: "GB/s",
        baseline_value: baseline,
        ratio: baseline.map(|baseline| value / baseline),
        ..row
    }
}

/// This thread and a process, and what they start, on one processor: what takes turns needs no second one, and
/// waking one up costs more than a call.
pub struct Pinned(CpuSet);

impl Pinned {
    pub fn with(process: &Process) -> Result<Self, Failure> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let first = processors(&before)?.0;
        sched_setaffinity(Pid::from_raw(0), &first)?;
        if let Some(pid) = process.pid() {
            sched_setaffinity(Pid::from_raw(pid), &first)?;
        }
        Ok(Self(before))
    }

    /// This thread on one processor and the processes on another, if there is one.
    pub fn apart(pids: &[i32]) -> Result<Self, Failure> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let (first, last) = processors(&before)?;
        sched_setaffinity(Pid::from_raw(0), &first)?;
        for pid in pids {
            sched_setaffinity(Pid::from_raw(*pid), &last)?;
        }
        Ok(Self(before))
    }
}

/// The first and the last processor of a set, each by itself.
fn processors(set: &CpuSet) -> Result<(CpuSet, CpuSet), Failure> {
    let mut allowed = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false));
    let first = allowed.next().unwrap_or(0);
    let last = allowed.next_back().unwrap_or(first);
    let one = |cpu| {
        let mut one = CpuSet::new();
        one.set(cpu).map(|()| one)
    };
    Ok((one(first)?, one(last)?))
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // It was allowed before.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}

/// Microseconds since then.
pub fn since(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e6
}
