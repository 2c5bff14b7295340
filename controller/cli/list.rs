//! `farcall ls`: what NAME.json and /proc tell; nobody is connected to.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use farcall::persist::{Home, Incarnation, Name};
use serde::Serialize;

use crate::Done;
use crate::output::{columns, print, print_json};

/// Lists persistent processes, without connecting to any.
///
/// Empty cgroups that were made for processes that are gone are removed.
#[derive(Args)]
pub struct List {
    /// Print one array of objects: name, pid, state, uptime_s, fds, children, rss_bytes,
    /// private_bytes, cgroups. What can't be known is null.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Attached,
    Detached,
    Gone,
}

#[derive(Serialize)]
struct Row {
    name: String,
    pid: Option<i32>,
    state: State,
    uptime_s: Option<u64>,
    fds: Option<usize>,
    children: Option<usize>,
    rss_bytes: Option<u64>,
    private_bytes: Option<u64>,
    /// Those that were made for it.
    cgroups: Vec<PathBuf>,
}

impl List {
    pub fn run(self) -> Done {
        let home = Home::find()?;
        // What is only reserved is no process yet.
        let started = |name: &&Name| !home.place(name).state().is_some_and(|s| s.is_reserved());
        let names = home.names()?;
        let rows: Vec<Row> = names.iter().filter(started).map(|name| row(&home, name)).collect();
        if self.json {
            print_json(&rows)?;
        } else if rows.is_empty() {
            eprintln!("no persistent processes in {}", home.path().display());
        } else {
            print(&table(&rows))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn row(home: &Home, name: &Name) -> Row {
    let place = home.place(name);
    let state = place.state();
    let alive = state.as_ref().map(|state| &state.process).filter(|process| process.is_alive());
    let Some(process) = alive else {
        // Where processes are left in there, it stays, and `stop` says why.
        let _ = place.remove_cgroups();
        return Row {
            name: name.to_string(),
            pid: state.as_ref().map(|state| state.process.pid),
            // One that was started by hand has no NAME.json before somebody attaches.
            state: if state.is_none() && place.is_listening() {
                State::Detached
            } else {
                State::Gone
            },
            uptime_s: None,
            fds: None,
            children: None,
            rss_bytes: None,
            private_bytes: None,
            cgroups: Vec::new(),
        };
    };
    let held = state.as_ref().and_then(|state| state.holder.as_ref());
    let memory = Memory::of(process.pid);
    Row {
        name: name.to_string(),
        pid: Some(process.pid),
        state: if held.is_some_and(Incarnation::is_alive) {
            State::Attached
        } else {
            State::Detached
        },
        uptime_s: uptime(process),
        fds: fs::read_dir(format!("/proc/{}/fd", process.pid)).ok().map(Iterator::count),
        children: children(process.pid),
        rss_bytes: memory.as_ref().map(|memory| memory.rss_bytes),
        private_bytes: memory.map(|memory| memory.private_bytes),
        cgroups: state.as_ref().map(|state| state.cgroups.clone()).unwrap_or_default(),
    }
}

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

fn uptime(process: &Incarnation) -> Option<u64> {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let text = fs::read_to_string("/proc/uptime").ok()?;
    let now: f64 = text.split_whitespace().next()?.parse().ok()?;
    let started = process.start_time as f64 / ticks as f64;
    Some((now - started).max(0.0) as u64)
}

fn children(pid: i32) -> Option<usize> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    Some(list.split_whitespace().count())
}

fn table(rows: &[Row]) -> String {
    let header =
        ["NAME", "PID", "STATE", "UPTIME", "FDS", "CHILDREN", "RSS", "PRIVATE"].map(String::from);
    let mut lines = vec![header];
    lines.extend(rows.iter().map(|row| {
        let number = |n: Option<usize>| n.map_or("-".into(), |n| n.to_string());
        let size = |n: Option<u64>| n.map_or("-".into(), |n| format!("{} KiB", n / 1024));
        [
            row.name.clone(),
            row.pid.map_or("-".into(), |pid| pid.to_string()),
            match row.state {
                State::Attached => "attached",
                State::Detached => "detached",
                State::Gone => "gone",
            }
            .into(),
            row.uptime_s.map_or("-".into(), duration),
            number(row.fds),
            number(row.children),
            size(row.rss_bytes),
            size(row.private_bytes),
        ]
    }));
    // Names and states to the left, numbers to the right.
    columns(&lines, [true, false, true, false, false, false, false, false])
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}
