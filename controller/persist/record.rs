//! NAME.json: which process is at a place, and who holds it.
//!
//! A server that is blocked in a call can't say who holds it, so every controller that attaches writes it
//! down there. It is advice: whoever can't write it goes on.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::unistd::{Gid, Uid, geteuid};
use serde::{Deserialize, Serialize};

use super::cgroup;
use super::directory::{Author, Directory};
use super::incarnation::Incarnation;
use super::listener::has_listener;
use super::place::Place;
use crate::error::{Error, Result};

/// The process of a place that is reserved: none yet. No process has that pid.
pub(super) const NONE_YET: Incarnation = Incarnation { pid: 0, start_time: 0, pid_ns: None };

/// How long others may keep the directory locked while NAME.json is to be written, which is advice.
const ADVICE_LIMIT: Duration = Duration::from_millis(500);

/// Bytes of a NAME.json that are read.
const STATE_SIZE: u64 = 64 * 1024;

/// What lies beside a socket, in NAME.json.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The process; its pid is 0 while the place is only reserved, by the holder.
    #[serde(flatten)]
    pub process: Incarnation,
    /// The controller that attached last, unless it detached in good order.
    pub holder: Option<Incarnation>,
    /// Since when that is so, in seconds since 1970.
    pub since: i64,
    /// The cgroups that were made for the process, as paths of directories.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cgroups: Vec<PathBuf>,
    /// The inode of the holder's end of the connection: by that a process is found that has inherited
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<u64>,
}

/// For so many seconds one who is in another pid namespace is believed to be starting a process.
const STARTING: i64 = 60;

impl State {
    /// Whether a controller that lives is about to start a process here.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        self.process == NONE_YET && self.is_being_made()
    }

    /// Whether its holder may still let the process listen.
    pub(super) fn is_being_made(&self) -> bool {
        // The clock may have been set back.
        let recent = (0..STARTING).contains(&(now() - self.since));
        self.holder.as_ref().is_some_and(|holder| holder.judge().unwrap_or(recent))
    }
}

/// A NAME.json.
pub(super) struct Record {
    pub(super) state: State,
    pub(super) author: Author,
    /// The user whose file it is.
    owner: u32,
}

impl Record {
    pub(super) fn remove_cgroups(&self) -> Result<()> {
        cgroup::remove(&self.state.cgroups, self.author, self.owner)
    }
}

impl Place {
    /// What NAME.json says, if it is there, can be read, and its author's word counts.
    #[must_use]
    pub fn state(&self) -> Option<State> {
        Some(self.record(&self.directory().ok()?)?.state)
    }

    pub(super) fn record(&self, directory: &Directory) -> Option<Record> {
        let (text, stat) = directory.read(&self.file_names().1, STATE_SIZE).ok()?;
        let author = directory.author(&stat)?;
        let state: State = serde_json::from_slice(&text).ok()?;
        // Nobody says anything about others' processes.
        let pid = state.process.pid;
        if !author.may_speak_for(pid) && state.process.is_alive() {
            let socket = self.socket_file(directory).ok()?;
            let has_it = has_listener(pid, socket.stat(), &self.file_names().0);
            return (directory.is_closed() && has_it).then_some(Record {
                state,
                author: Author::Trusted,
                owner: stat.st_uid,
            });
        }
        Some(Record { state, author, owner: stat.st_uid })
    }

    /// Writes NAME.json, as a whole or not at all.
    pub(super) fn write_state(&self, directory: &Directory, state: &State) -> Result<()> {
        let mut text = serde_json::to_vec(state).map_err(|error| self.refuse(error.to_string()))?;
        text.push(b'\n');
        let (socket, name) = self.file_names();
        // Root that attaches to a user's process leaves the user something to read.
        let owner = geteuid()
            .is_root()
            .then(|| directory.pin(&socket).ok())
            .flatten()
            .map(|socket| (socket.stat().st_uid, socket.stat().st_gid))
            .map(|(uid, gid)| (Uid::from_raw(uid), Gid::from_raw(gid)));
        directory
            .write(&name, &text, owner)
            .map_err(|error| Error::Home { path: self.state_path(), reason: error.to_string() })
    }

    /// Replaces NAME.json, if `change` makes another one of it; nobody does so at the same time.
    fn update_state(&self, change: impl FnOnce(Option<State>) -> Option<State>) -> Result<()> {
        let locked = || {
            let directory = self.directory()?;
            let lock = directory.lock(ADVICE_LIMIT)?;
            Ok((directory, lock))
        };
        let (directory, _lock) = match locked() {
            // It was removed, which is told otherwise.
            Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => return Ok(()),
            locked => locked.map_err(|error| Error::Home {
                path: self.state_path(),
                reason: error.to_string(),
            })?,
        };
        let before = self.record(&directory).map(|record| record.state);
        match change(before) {
            Some(state) => self.write_state(&directory, &state),
            None => Ok(()),
        }
    }

    /// Writes down that this process holds the one at this place, whose pid is given where it is
    /// known, with the socket of that inode. Where neither the pid nor an earlier NAME.json tells which
    /// process it is, nothing is written.
    pub(crate) fn write_holder(&self, pid: Option<i32>, connection: Option<u64>) -> Result<()> {
        let found = pid.map_or(Ok(None), Incarnation::found);
        let found = found.map_err(Error::io("reading /proc/PID/stat of the process"))?;
        self.update_state(|before| {
            let cgroups = before.as_ref().map(|state| state.cgroups.clone()).unwrap_or_default();
            let process = found.or_else(|| Some(before?.process))?;
            let holder = Incarnation::of(std::process::id() as i32);
            Some(State { process, holder, since: now(), cgroups, connection })
        })
    }

    /// Writes down which cgroups are about to be made for the process.
    pub(super) fn write_cgroups(&self, process: Incarnation, cgroups: Vec<PathBuf>) -> Result<()> {
        let holder = Incarnation::of(std::process::id() as i32);
        self.update_state(|_| {
            Some(State { process, holder, since: now(), cgroups, connection: None })
        })
    }

    /// Writes down that nobody holds it, unless somebody else does by now.
    pub(crate) fn erase_holder(&self) -> Result<()> {
        self.update_state(|before| {
            let state = before?;
            let own = state.holder == Incarnation::of(std::process::id() as i32);
            own.then(|| State { holder: None, connection: None, since: now(), ..state })
        })
    }

    /// Removes the cgroups that were made for the process: it is gone. Where there are none, nothing
    /// is done.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] if one of them can't be removed: processes are in it.
    pub fn remove_cgroups(&self) -> Result<()> {
        let record = self.directory().ok().and_then(|directory| self.record(&directory));
        record.map_or(Ok(()), |record| record.remove_cgroups())
    }
}

/// Seconds since 1970.
pub(super) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64)
}
