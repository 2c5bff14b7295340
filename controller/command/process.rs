//! What commands learn about processes from /proc.

use std::fs;
use std::time::{Duration, Instant};

use farcall::persist::{Condition, Incarnation};

use super::Failure;

/// What memory a process has, as smaps_rollup tells it.
pub struct Memory {
    pub rss_bytes: u64,
    pub private_bytes: u64,
}

impl Memory {
    pub fn of(pid: i32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let sum = |fields: &[&str]| kilobytes(&text, fields) * 1024;
        Some(Self {
            rss_bytes: sum(&["Rss"]),
            private_bytes: sum(&["Private_Clean", "Private_Dirty"]),
        })
    }
}

/// The sum of some fields of smaps_rollup, in kB.
fn kilobytes(text: &str, fields: &[&str]) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(field, _)| fields.contains(field))
        .filter_map(|(_, value)| value.split_whitespace().next()?.parse::<u64>().ok())
        .sum()
}

/// Waits until a process has ended.
pub async fn until_gone(process: &Incarnation, limit: Duration) -> Result<(), Failure> {
    let end = Instant::now() + limit;
    while process.is_alive() {
        if Instant::now() > end {
            let pid = process.pid;
            let condition = Condition::of(pid).unwrap_or(Condition::Unknown);
            let advice = condition.advice(pid).map_or(String::new(), |what| format!(": {what}"));
            return Err(Failure::new(format!("pid {pid} does not end: it is {condition}{advice}")));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
