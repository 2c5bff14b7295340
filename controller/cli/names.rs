//! `farcall names`: what a persistent process keeps under names, and what it has open without one.

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::Args;
use farcall::persist::{
    Home, Kind, Name, NameSeen, Named, NamesSeen, Resource, Sameness, Unclaimed, names_of,
};
use farcall::{Error, Process};
use serde::Serialize;
use serde_json::json;

use crate::cli::reach::Reach;
use crate::command::output::{columns, plain, print, warn};
use crate::command::{Done, Failure};

/// Shows what a persistent process keeps under names, and whether it is still what got the name.
///
/// A state is "same", "unverified" or "changed", the last two with the reason. What has changed can be
/// forgotten; what is the same or unverified can be released: a descriptor is closed then, memory is
/// unmapped, and a child or bytes lose their name.
///
/// With --release, --forget or --close-unclaimed it is told what was done, and nothing is listed.
///
/// While another controller holds the process, it is asked and goes on; whether descriptors and children
/// are still the same is looked up in /proc then, and nothing can be given up.
#[derive(Args)]
pub struct Names {
    /// The process
    name: Name,
    /// List the descriptors as well that have no name and that nobody accounts for
    #[arg(long, conflicts_with_all = ["release", "forget", "close_unclaimed"])]
    unclaimed: bool,
    /// Close the descriptors that have no name and that nobody accounts for
    #[arg(long)]
    close_unclaimed: bool,
    /// Give what has that name up, together with its name; may be repeated
    #[arg(long, value_name = "RESOURCE")]
    release: Vec<String>,
    /// Take the name away and leave what has it as it is; may be repeated
    #[arg(long, value_name = "RESOURCE")]
    forget: Vec<String>,
    #[command(flatten)]
    reach: Reach,
    /// Print {"names", "unclaimed", "holder"} instead of text: two arrays of objects, with name, kind,
    /// number, pid, address, size, now, state, reason, and with number, now; and {pid, since} of another
    /// controller that holds the process. Of what was done it is {"released", "forgotten", "closed"}.
    /// What is not known, was not asked for or has no meaning is null
    #[arg(long)]
    json: bool,
}

#[derive(Default, Serialize)]
struct Row {
    name: String,
    kind: &'static str,
    number: Option<i32>,
    pid: Option<i32>,
    address: Option<u64>,
    size: Option<usize>,
    /// What it is now.
    now: Option<String>,
    state: &'static str,
    reason: Option<String>,
}

/// A descriptor without a name.
#[derive(Serialize)]
struct Nameless {
    number: i32,
    now: Option<String>,
}

impl From<Unclaimed> for Nameless {
    fn from(Unclaimed { number, what }: Unclaimed) -> Self {
        Self { number, now: what }
    }
}

impl Names {
    pub async fn run(self) -> Done {
        let place = Home::find()?.place(&self.name);
        let changes = self.close_unclaimed || !(self.release.is_empty() && self.forget.is_empty());
        let process = match self.reach.attach(&place).await {
            Ok(process) => process,
            Err(Error::Held { .. } | Error::Inherited { .. })
                if !changes && !self.unclaimed && !self.reach.wait =>
            {
                let seen = names_of(&place, self.reach.timeout()).await;
                let seen = seen.map_err(|error| self.reach.explain(&self.name, &place, error))?;
                print(&self.seen(seen)?)?;
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) => return Err(self.reach.explain(&self.name, &place, error)),
        };
        let told = if changes { self.change(&process).await? } else { self.list(&process).await? };
        process.prepare_for_reconnect().await?;
        warn(&process);
        print(&told)?;
        Ok(ExitCode::SUCCESS)
    }

    async fn list(&self, process: &Process) -> Result<String, Failure> {
        let mut rows = Vec::new();
        for named in process.names().await? {
            rows.push(row(process, named).await?);
        }
        let unclaimed: Option<Vec<Nameless>> = if self.unclaimed {
            Some(process.unclaimed().await?.into_iter().map(Nameless::from).collect())
        } else {
            None
        };
        if self.json {
            return line(&json!({ "names": rows, "unclaimed": unclaimed, "holder": null }));
        }
        let unclaimed = unclaimed.unwrap_or_default();
        if rows.is_empty() && unclaimed.is_empty() {
            let what = if self.unclaimed { ", and nothing lacks one" } else { "" };
            eprintln!("{}: nothing has a name{what}", self.name);
            return Ok(String::new());
        }
        Ok(table(&rows, &unclaimed))
    }

    /// What a process tells that another controller holds.
    fn seen(&self, seen: NamesSeen) -> Result<String, Failure> {
        let rows: Vec<Row> = seen.names.into_iter().map(Row::from).collect();
        if self.json {
            let holder = seen.holder.map(|(pid, since)| json!({ "pid": pid, "since": since }));
            return line(&json!({ "names": rows, "unclaimed": null, "holder": holder }));
        }
        let pid = seen.holder.and_then(|(pid, _)| pid);
        let by = pid.map_or("another controller".into(), |pid| format!("pid {pid}"));
        eprintln!("{}: held by {by}, which goes on", self.name);
        if rows.is_empty() {
            eprintln!("{}: nothing has a name", self.name);
            return Ok(String::new());
        }
        Ok(table(&rows, &[]))
    }

    /// Gives up what is to be given up, in the order of the options in the help text.
    async fn change(&self, process: &Process) -> Result<String, Failure> {
        // All of it or, as far as can be known beforehand, nothing.
        let known: BTreeSet<String> =
            process.names().await?.into_iter().map(|named| named.name).collect();
        for name in self.release.iter().chain(&self.forget) {
            if !known.contains(name) {
                let reason = "the process has nothing of that name";
                return Err(Error::Name { name: name.clone(), reason }.into());
            }
        }
        let mut closed = Vec::new();
        if self.close_unclaimed {
            let before = process.unclaimed().await?;
            process.close_unclaimed().await?;
            let left = process.unclaimed().await?;
            closed.extend(before.into_iter().filter(|fd| !left.contains(fd)).map(Nameless::from));
        }
        for name in &self.release {
            process.release(name).await?;
        }
        for name in &self.forget {
            process.forget(name).await?;
        }
        if self.json {
            let (released, forgotten) = (&self.release, &self.forget);
            return line(
                &json!({ "released": released, "forgotten": forgotten, "closed": closed }),
            );
        }
        let mut text = String::new();
        for Nameless { number, now } in &closed {
            text.push_str(&format!("descriptor {number}: closed{}\n", told(now.as_deref())));
        }
        if self.close_unclaimed && closed.is_empty() {
            text.push_str("no descriptor lacks a name: nothing was closed\n");
        }
        for (names, done) in [(&self.release, "released"), (&self.forget, "forgotten")] {
            for name in names {
                text.push_str(&format!("{}: {done}\n", plain(name)));
            }
        }
        Ok(text)
    }
}

fn line(value: &impl Serialize) -> Result<String, Failure> {
    Ok(format!("{}\n", serde_json::to_string(value)?))
}

fn told(now: Option<&str>) -> String {
    now.map_or(String::new(), |now| format!(" ({})", plain(now)))
}

/// A state in a word, and why it is that.
fn judged(state: Sameness) -> (&'static str, Option<String>) {
    match state {
        Sameness::Same => ("same", None),
        Sameness::Unverified(why) => ("unverified", Some(why.to_owned())),
        Sameness::Changed(why) => ("changed", Some(why)),
    }
}

impl From<NameSeen> for Row {
    fn from(seen: NameSeen) -> Self {
        let NameSeen { name, kind, value, size, now, state } = seen;
        let (state, reason) = judged(state);
        let size = size.and_then(|size| usize::try_from(size).ok());
        let mut row = Self { name, now, size, state, reason, ..Self::default() };
        match kind {
            Kind::Fd => (row.kind, row.number) = ("fd", Some(value as i32)),
            Kind::Child => (row.kind, row.pid) = ("child", Some(value as i32)),
            Kind::Mapping => (row.kind, row.address) = ("memory", Some(value)),
            Kind::Bytes => row.kind = "bytes",
            _ => row.kind = "unknown",
        }
        row
    }
}

async fn row(process: &Process, named: Named) -> Result<Row, Failure> {
    let Named { name, kind, what, state } = named;
    let (state, reason) = judged(state);
    let mut row = Row { name, state, reason, ..Row::default() };
    // The number that is left where the resource is not there any more.
    let left = match what {
        Resource::Nothing { value } => Some(value),
        _ => None,
    };
    match kind {
        Kind::Fd => {
            row.kind = "fd";
            row.number = match &what {
                Resource::Fd(fd) => Some(fd.number()),
                _ => left.map(|value| value as i32),
            };
            if let Some(number) = row.number {
                row.now = process.fd_link(number).await;
            }
        }
        Kind::Child => {
            row.kind = "child";
            row.pid = match what {
                Resource::Child(pid) => Some(pid),
                _ => left.map(|value| value as i32),
            };
            if let Resource::Child(pid) = what {
                row.now = Some(process.child_state(pid).await?.to_string());
            }
        }
        Kind::Mapping => {
            row.kind = "memory";
            row.address = left;
            if let Resource::Mapping(memory) = &what {
                (row.address, row.size) = (Some(memory.address()), Some(memory.size()));
            }
        }
        Kind::Bytes => {
            row.kind = "bytes";
            if let Resource::Bytes(bytes) = &what {
                row.size = Some(bytes.len());
            }
        }
        _ => row.kind = "unknown",
    }
    Ok(row)
}

fn table(rows: &[Row], unclaimed: &[Nameless]) -> String {
    let dash = || "-".to_owned();
    let now = |now: &Option<String>| now.as_deref().map_or_else(dash, plain);
    let mut lines = vec![["NAME", "KIND", "VALUE", "NOW", "STATE"].map(String::from)];
    lines.extend(rows.iter().map(|row| {
        let number = row.number.or(row.pid).map(|number| number.to_string());
        let value = number.or_else(|| row.address.map(|address| format!("{address:#x}")));
        let size = row.size.map(|size| format!("{size} bytes"));
        let state = row.reason.as_ref().map_or_else(
            || row.state.to_owned(),
            |reason| format!("{}: {}", row.state, plain(reason)),
        );
        [
            plain(&row.name),
            row.kind.into(),
            value.unwrap_or_else(dash),
            size.unwrap_or_else(|| now(&row.now)),
            state,
        ]
    }));
    lines.extend(
        unclaimed.iter().map(|fd| {
            [dash(), "fd".into(), fd.number.to_string(), now(&fd.now), "unclaimed".into()]
        }),
    );
    // Numbers to the right.
    columns(&lines, [true, true, false, true, true])
}
