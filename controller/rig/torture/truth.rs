//! What must be in a process, by the word of its controllers alone; and how what is there differs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::{fs, io};

use super::words::{State, Word};
use super::workload::{COUNT, LOG, RECORD, kind};

/// How often something was not as it has to be.
#[derive(Default)]
pub struct Tally {
    pub calls: u64,
    pub lost: u64,
    pub duplicated: u64,
    pub leaked_fds: u64,
    pub unaccounted_children: u64,
    pub mismatched: u64,
    /// What it was, a line each, that nobody has been told yet.
    pub told: Vec<String>,
}

impl Tally {
    pub fn failures(&self) -> u64 {
        let Self { lost, duplicated, leaked_fds, unaccounted_children, mismatched, .. } = self;
        lost + duplicated + leaked_fds + unaccounted_children + mismatched
    }

    pub fn mismatch(&mut self, what: impl Into<String>) {
        self.mismatched += 1;
        self.told.push(what.into());
    }

    fn lose(&mut self, count: u64, what: String) {
        self.lost += count;
        self.told.push(what);
    }
}

/// What has become of a name.
struct Mark {
    stage: Stage,
    /// Between these its version must be.
    least: u64,
    most: u64,
    /// The child may have been reaped.
    reaping: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It may be there.
    Keeping,
    /// It is there.
    Kept,
    /// It may be there no more.
    Giving,
}

/// What a controller has found.
#[derive(Clone, Default)]
pub struct Found {
    /// The names, and what there is of them.
    names: BTreeMap<String, (State, u64)>,
    /// The number of the next record.
    next: u64,
}

/// What is known of one process.
#[derive(Default)]
pub struct Truth {
    marks: BTreeMap<String, Mark>,
    /// Records up to that number may be there, and up to that one must.
    appending: u64,
    appended: u64,
    calls: u64,
    finding: Found,
    /// What the last one has found that has recovered.
    pub found: Rc<Found>,
    pub pid: Option<i32>,
}

impl Truth {
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// The controller that holds the process says something.
    pub fn hear(&mut self, word: Word, tally: &mut Tally) {
        match word {
            Word::Process(pid) => {
                self.finding = Found::default();
                if *self.pid.get_or_insert(pid) != pid {
                    tally.mismatch(format!("the process is {pid}, and was {:?}", self.pid));
                }
            }
            Word::Appending(number) => self.appending = self.appending.max(number),
            Word::Appended(number) => self.appended = self.appended.max(number),
            Word::Keeping(name, version) => {
                let new =
                    Mark { stage: Stage::Keeping, least: version, most: version, reaping: false };
                let mark = self.marks.entry(name).or_insert(new);
                mark.most = mark.most.max(version);
            }
            Word::Kept(name, version) => {
                if let Some(mark) = self.marks.get_mut(&name) {
                    (mark.stage, mark.least) = (Stage::Kept, version);
                }
            }
            Word::Giving(name) => {
                if let Some(mark) = self.marks.get_mut(&name) {
                    mark.stage = Stage::Giving;
                }
            }
            Word::Reaping(name) => {
                if let Some(mark) = self.marks.get_mut(&name) {
                    (mark.stage, mark.reaping) = (Stage::Giving, true);
                }
            }
            Word::Given(name) => drop(self.marks.remove(&name)),
            Word::Found(name, state, value) => {
                self.finding.names.insert(name, (state, value));
            }
            Word::Recovered(next) => self.recovered(next, tally),
            Word::Orphan(what) => {
                tally.leaked_fds += 1;
                tally
                    .told
                    .push(format!("a descriptor was opened with a name and has none: {what}"));
            }
            Word::Calls(calls) => self.calls = self.calls.max(calls),
            Word::Lost(what) => tally.lose(1, what),
            Word::Wrong(what) => tally.mismatch(what),
            Word::Doing(_) | Word::Own(_) | Word::Ready | Word::Begun | Word::Over(_) => {}
        }
    }

    /// A controller says something that has lost the process to one that has `found` this: what it
    /// holds for done must have been found.
    pub fn hear_late(&mut self, word: Word, found: &Found, tally: &mut Tally) {
        match word {
            Word::Kept(name, _) if !found.names.contains_key(&name) => {
                tally.mismatch(format!("{name} was kept, and its next controller did not find it"));
            }
            Word::Given(name) if found.names.contains_key(&name) => {
                tally.mismatch(format!("{name} was given up, and its next controller found it"));
            }
            Word::Appended(number) if number >= found.next => {
                let lost = number + 1 - found.next;
                tally.lose(
                    lost,
                    format!(
                        "record {number} was appended, and its next controller did not find it"
                    ),
                );
            }
            Word::Lost(what) => tally.lose(1, what),
            Word::Wrong(what) => tally.mismatch(what),
            _ => {}
        }
    }

    /// All that was found is compared, and is the truth from here on.
    fn recovered(&mut self, next: u64, tally: &mut Tally) {
        let found = Found { next, ..std::mem::take(&mut self.finding) };
        for (name, mark) in &mut self.marks {
            match found.names.get(name) {
                None if mark.stage == Stage::Kept => {
                    tally.mismatch(format!("{name} was kept, and is gone"));
                }
                None => {}
                Some((State::Changed, _)) if mark.reaping => {}
                Some((State::Changed, _)) => tally.mismatch(format!("{name} is something else")),
                Some((State::Same, version)) => {
                    if ["bytes", "big"].contains(&kind(name)) {
                        if !(mark.least..=mark.most).contains(version) {
                            tally.mismatch(format!(
                                "{name} has version {version}, and was given {} to {}",
                                mark.least, mark.most
                            ));
                        }
                        (mark.least, mark.most) = (*version, *version);
                    }
                    (mark.stage, mark.reaping) = (Stage::Kept, false);
                }
            }
        }
        for name in found.names.keys() {
            if !self.marks.contains_key(name) {
                tally.mismatch(format!("{name} is there, and nobody has kept it"));
            }
        }
        let same = |name: &String| matches!(found.names.get(name), Some((State::Same, _)));
        self.marks.retain(|name, _| same(name));
        if next <= self.appended {
            let (lost, appended) = (self.appended + 1 - next, self.appended);
            tally.lose(
                lost,
                format!("record {appended} was appended, and {next} is to be the next"),
            );
        }
        if next > self.appending + 1 {
            tally.mismatch(format!("record {next} is to be the next after {}", self.appending));
        }
        // Those that were not appended are appended anew.
        (self.appending, self.appended) = (next - 1, next - 1);
        self.found = Rc::new(found);
    }

    /// Compares with what the kernel says. The process is held by one that has found all, uses these
    /// descriptors, and makes no calls.
    pub fn compare(&self, own: &[i32], directory: &Path, tally: &mut Tally) -> io::Result<()> {
        self.compare_records(&fs::read(directory.join("appended")).unwrap_or_default(), tally);
        let Some(pid) = self.pid else { return Ok(()) };
        let open = open_in(pid)?;
        let with_names = |(name, (_, value)): (&String, &(State, u64))| {
            let is_fd = [LOG, "file", "sock", "late", "pipe"].contains(&kind(name));
            is_fd.then(|| (*value as i32, name.clone()))
        };
        let named: BTreeMap<i32, String> = self.found.names.iter().filter_map(with_names).collect();
        for (number, what) in &open {
            let own = *number <= 2 || own.contains(number);
            if !own && !named.contains_key(number) {
                tally.leaked_fds += 1;
                tally.told.push(format!("descriptor {number} is open: {}", what.display()));
            }
        }
        for (number, name) in &named {
            let what = open.get(number).map(|what| what.to_string_lossy().into_owned());
            let what = what.unwrap_or_else(|| "not open".into());
            let right = match kind(name) {
                "file" => what.ends_with(&format!("/kept-{name}")),
                "late" => what.ends_with(&format!("/{name}")),
                "sock" => what.starts_with("socket:"),
                "pipe" => {
                    let other = match name.strip_suffix("-r") {
                        Some(pipe) => format!("{pipe}-w"),
                        None => format!("{}-r", name.trim_end_matches("-w")),
                    };
                    let other = self.found.names.get(&other).map(|(_, value)| *value as i32);
                    let other = other.and_then(|other| open.get(&other));
                    what.starts_with("pipe:")
                        && other.is_none_or(|other| other.as_os_str() == what.as_str())
                }
                _ => what.ends_with("/appended"),
            };
            if !right {
                tally.mismatch(format!("{name}, descriptor {number}, is {what}"));
            }
        }
        let with_names: BTreeSet<u64> = self
            .found
            .names
            .iter()
            .filter(|(name, _)| kind(name) == "child")
            .map(|(_, (_, pid))| *pid)
            .collect();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            if !with_names.contains(&child) {
                tally.unaccounted_children += 1;
                tally.told.push(format!("child {child} has no name, and nobody has reaped it"));
            }
        }
        Ok(())
    }

    fn compare_records(&self, bytes: &[u8], tally: &mut Tally) {
        let (records, torn) = bytes.as_chunks::<RECORD>();
        if !torn.is_empty() {
            tally.mismatch("a record is torn");
        }
        let records: Vec<u64> = records.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
        for record in &records {
            *counts.entry(*record).or_default() += 1;
        }
        let more: Vec<&u64> =
            counts.iter().filter(|(_, n)| **n > 1).map(|(record, _)| record).collect();
        if let Some(first) = more.first() {
            tally.duplicated += records.len() as u64 - counts.len() as u64;
            tally
                .told
                .push(format!("{} records are there more than once, {first} first", more.len()));
        }
        let missing: Vec<u64> =
            (1..=self.appended).filter(|record| !counts.contains_key(record)).collect();
        if let Some(first) = missing.first() {
            tally.lose(
                missing.len() as u64,
                format!("{} records are missing, {first} first", missing.len()),
            );
        }
        if let Some(record) = counts.keys().find(|record| !(1..=self.appended).contains(*record)) {
            tally.mismatch(format!("record {record} is there, and {} is the last", self.appended));
        }
        if more.is_empty() && !records.is_sorted() {
            tally.mismatch("records are not in order");
        }
    }

    /// Those of the names that every process has.
    pub fn is_set_up(&self) -> bool {
        [LOG, COUNT].iter().all(|name| self.marks.contains_key(*name))
    }
}

/// The descriptors of a process, and what they are.
fn open_in(pid: i32) -> io::Result<BTreeMap<i32, PathBuf>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?;
    Ok(entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, fs::read_link(entry.path()).ok()?))
        })
        .collect())
}
