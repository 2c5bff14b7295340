//! `farcall ls`: what NAME.json and /proc tell. Only where their numbers say nothing here is the
//! process asked.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use farcall::persist::{Condition, Flight, Home, Incarnation, Name, Place, flight};
use serde::Serialize;

use crate::command::Done;
use crate::command::output::{columns, print, print_json};
use crate::command::process::Memory;

/// Lists persistent processes, without connecting to any.
///
/// A process is attached as long as somebody has the connection of a controller, the HOLDER; else it is
/// detached, or gone; unlinked is one whose socket's file was removed: `farcall restore` makes it anew.
/// BLOCKED is what keeps it from answering: the call that it is in, or that it is
/// stopped, traced or frozen. A process of another pid namespace is asked who holds it; its numbers there
/// mean nothing here and are not shown.
///
/// Empty cgroups that were made for processes that are gone are removed.
#[derive(Args)]
pub struct List {
    /// Print one array of objects: name, pid, state, holder ({pid, since} or null), blocked, uptime_s,
    /// fds, children, rss_bytes, private_bytes, cgroups. What can't be known is null.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Attached,
    Detached,
    /// It lives, and the file of its socket was removed.
    Unlinked,
    Gone,
}

/// Who holds a process.
#[derive(Serialize)]
struct Holder {
    pid: Option<i32>,
    since: i64,
}

#[derive(Serialize)]
struct Row {
    name: String,
    pid: Option<i32>,
    state: State,
    holder: Option<Holder>,
    /// What keeps it from answering, if anything does.
    blocked: Option<String>,
    uptime_s: Option<u64>,
    fds: Option<usize>,
    children: Option<usize>,
    rss_bytes: Option<u64>,
    private_bytes: Option<u64>,
    /// Those that were made for it.
    cgroups: Vec<PathBuf>,
}

/// How long a process is given to say who holds it, where nothing else tells that.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long all together are given that. Each of the rest has what a process takes that is not busy.
const PATIENCE_WITH_ALL: Duration = Duration::from_secs(5);
const LEAST_PATIENCE: Duration = Duration::from_millis(5);

/// How long processes are waited for from now on.
struct Patience {
    end: Instant,
}

impl Patience {
    fn with_one(&self) -> Duration {
        let left = self.end.saturating_duration_since(Instant::now());
        left.clamp(LEAST_PATIENCE, PATIENCE)
    }
}

impl List {
    pub async fn run(self) -> Done {
        let home = Home::find()?;
        let mut rows = Vec::new();
        let patience = Patience { end: Instant::now() + PATIENCE_WITH_ALL };
        for name in home.names()? {
            let place = home.place(&name);
            // What is only reserved is no process yet.
            if !place.state().is_some_and(|state| state.is_reserved()) {
                rows.push(row(&place, &name, &patience).await);
            }
        }
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

async fn row(place: &Place, name: &Name, patience: &Patience) -> Row {
    let record = place.state();
    let is_there = place.files().is_ok_and(|files| files.has_socket());
    let unlinked = if is_there { None } else { place.served_unlinked() };
    let unlinked = unlinked.and_then(Incarnation::of);
    let process = unlinked.as_ref().or(record.as_ref().map(|record| &record.process));
    let (state, holder) = match process.map(Incarnation::judge) {
        // One that was started by hand has no NAME.json before somebody attaches.
        None if place.is_listening() => (State::Detached, None),
        None | Some(Some(false)) => (State::Gone, None),
        Some(Some(true)) => held(place, patience).await,
        Some(None) => asked(place, patience).await,
    };
    let state = if unlinked.is_some() { State::Unlinked } else { state };
    let mut row = Row {
        name: name.to_string(),
        pid: None,
        state,
        holder,
        blocked: None,
        uptime_s: None,
        fds: None,
        children: None,
        rss_bytes: None,
        private_bytes: None,
        cgroups: Vec::new(),
    };
    if state == State::Gone {
        // Where processes are left in there, it stays, and `stop` says why.
        let _ = place.remove_cgroups();
    } else if let Some(record) = &record {
        row.cgroups.clone_from(&record.cgroups);
    }
    let Some(process) = process.filter(|process| process.judge().is_some()) else { return row };
    row.pid = Some(process.pid);
    if state != State::Gone {
        let memory = Memory::of(process.pid);
        row.blocked = Condition::of(process.pid).and_then(|condition| blocked(&condition));
        row.uptime_s = process.age().map(|age| age.as_secs());
        row.fds = fs::read_dir(format!("/proc/{}/fd", process.pid)).ok().map(Iterator::count);
        row.children = children(process.pid);
        row.rss_bytes = memory.as_ref().map(|memory| memory.rss_bytes);
        row.private_bytes = memory.map(|memory| memory.private_bytes);
    }
    row
}

/// Who holds a process that lives.
async fn held(place: &Place, patience: &Patience) -> (State, Option<Holder>) {
    let Some(record) = place.state() else { return (State::Detached, None) };
    let Some(holder) = record.holder else { return (State::Detached, None) };
    let since = record.since;
    match holder.judge() {
        Some(true) => (State::Attached, Some(Holder { pid: Some(holder.pid), since })),
        Some(false) => match place.heirs().first() {
            Some(heir) => (State::Attached, Some(Holder { pid: Some(*heir), since })),
            None => (State::Detached, None),
        },
        None => asked(place, patience).await,
    }
}

/// The same where NAME.json has numbers that mean nothing here: the process is asked.
async fn asked(place: &Place, patience: &Patience) -> (State, Option<Holder>) {
    match flight(place, patience.with_one()).await {
        Ok(Flight { holder: Some((_, since)), .. }) => {
            (State::Attached, Some(Holder { pid: None, since }))
        }
        Ok(Flight { holder: None, .. }) => (State::Detached, None),
        // It is busy, or it is not there.
        Err(_) => match place.accepts() {
            Some(false) => (State::Gone, None),
            _ => match place.state().filter(|state| state.holder.is_some()) {
                Some(state) => (State::Attached, Some(Holder { pid: None, since: state.since })),
                None => (State::Detached, None),
            },
        },
    }
}

/// In a word or two.
fn blocked(condition: &Condition) -> Option<String> {
    match condition {
        Condition::Idle => None,
        Condition::Running => Some("running".into()),
        Condition::InCall { call, .. } => Some(call.clone()),
        Condition::Stopped => Some("stopped".into()),
        Condition::Traced { .. } => Some("traced".into()),
        Condition::Frozen { .. } => Some("frozen".into()),
        _ => Some("?".into()),
    }
}

fn children(pid: i32) -> Option<usize> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    Some(list.split_whitespace().count())
}

fn table(rows: &[Row]) -> String {
    let header = [
        "NAME", "PID", "STATE", "HOLDER", "BLOCKED", "UPTIME", "FDS", "CHILDREN", "RSS", "PRIVATE",
    ]
    .map(String::from);
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
                State::Unlinked => "unlinked",
                State::Gone => "gone",
            }
            .into(),
            row.holder
                .as_ref()
                .map_or("-".into(), |holder| holder.pid.map_or("?".into(), |pid| pid.to_string())),
            row.blocked.clone().unwrap_or_else(|| "-".into()),
            row.uptime_s.map_or("-".into(), duration),
            number(row.fds),
            number(row.children),
            size(row.rss_bytes),
            size(row.private_bytes),
        ]
    }));
    // Names and states to the left, numbers to the right.
    columns(&lines, [true, false, true, false, true, false, false, false, false, false])
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}
