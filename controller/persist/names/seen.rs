//! Names as a process tells them to somebody who does not hold it: while somebody else does.
//!
//! The server sends its registry behind the log. Whether what has a name is still what got it is looked up
//! in /proc here, as far as this user may.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use nix::libc;
use nix::sys::stat::fstat;
use nix::sys::statfs::{fstatfs, statfs};

use super::check::{ANONYMOUS, CHILDREN_ALIKE, Identity, MAPPED, PIDFS_MAGIC};
use super::{Kind, Sameness};
use crate::abi::handshake::{ANSWER_SIZE, Answer, HANDSHAKE_MAGIC};
use crate::abi::log::{LOG_HEAD_SIZE, LOG_SIZE, LogHead};
use crate::abi::registry::{ENTRY_SIZE, Entry};
use crate::calls::WaitStatus;
use crate::calls::handle::{Kept, kind, taken_in};
use crate::error::{Error, Result};
use crate::persist::attach::refused;
use crate::persist::log::flight;
use crate::persist::meet::{ask_for_names, deadline};
use crate::persist::place::Place;
use crate::process::{pidfd_open, random_token};
use crate::proto::handshake;
use crate::proto::handshake::Hold;

/// What a process keeps under names, as it tells who does not hold it.
#[derive(Clone, Debug)]
pub struct NamesSeen {
    /// In the order of the names.
    pub names: Vec<NameSeen>,
    /// Who is attached: its pid where it told it, and since when in seconds since 1970.
    pub holder: Option<(Option<i32>, i64)>,
}

/// A name, and what there is under it.
#[derive(Clone, Debug)]
pub struct NameSeen {
    /// The name.
    pub name: String,
    /// Of what kind it is.
    pub kind: Kind,
    /// The number of a descriptor, a pid, an address, or how many bytes.
    pub value: u64,
    /// Bytes of memory, or those that are kept.
    pub size: Option<u64>,
    /// What it is now, where that can be seen from here.
    pub now: Option<String>,
    /// Whether it is still what it was when it got its name, as far as that can be seen from here.
    pub state: Sameness,
}

/// How often a registry is read anew that changes while it is read.
const TRIES: u32 = 4;

/// The most bytes of a registry that are read.
const MOST: u64 = 8 << 20;

/// Asks the persistent process at `place` what it keeps under names. Nothing changes by that: who is
/// attached stays so, and goes on.
///
/// Whether a descriptor or a child is still what got the name is told by /proc here, for which this user
/// must be allowed to read the process's /proc/PID/fd (ptrace(2), PTRACE_MODE_READ_FSCREDS): the same user
/// and root mostly are, at any ptrace_scope of Yama's. Otherwise it is *unverified*.
///
/// # Errors
///
/// As of [`flight`]. Where the process's server is older, its memory is read by /proc/PID/mem, for which
/// the rights of a tracer are needed; without them [`Error::Attach`] says so.
pub async fn names_of(place: &Place, timeout: Duration) -> Result<NamesSeen> {
    let end = deadline(timeout);
    let mut tries = TRIES;
    let (registry, holder) = loop {
        let mut told = Told::default();
        let begin = told.go_on(place, end).await?;
        let Some(begin) = begin else { break by_memory(place, timeout).await? };
        let mut calls = begin;
        while !told.is_complete() {
            match told.go_on(place, end).await? {
                Some(now) => calls = now,
                None => break,
            }
        }
        tries -= 1;
        // Of a busy process parts of several instants are taken in the end: each entry is whole.
        if calls == begin || tries == 0 {
            break (told.registry, told.holder);
        }
    };
    let sight = Sight::of(place);
    let mut names: Vec<NameSeen> =
        taken_in(&registry).into_values().map(|kept| sight.seen(&kept)).collect();
    names.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(NamesSeen { names, holder })
}

type Holder = Option<(Option<i32>, i64)>;

/// What has been told of a registry.
#[derive(Default)]
struct Told {
    registry: Vec<u8>,
    size: u64,
    holder: Holder,
}

impl Told {
    fn is_complete(&self) -> bool {
        self.registry.len() as u64 >= self.size
    }

    /// Asks for more. How many calls the process has executed; none if it does not tell its registry.
    async fn go_on(&mut self, place: &Place, end: tokio::time::Instant) -> Result<Option<u64>> {
        let from = self.registry.len() as u64;
        let bytes = ask_for_names(place, random_token()?, from, end).await?;
        let Some((answer, rest)) = bytes.split_first_chunk::<ANSWER_SIZE>() else {
            return Err(refused(place, "the server closed the connection: you may not ask"));
        };
        let Answer { magic, status, .. } = Answer::from_bytes(answer);
        if magic == HANDSHAKE_MAGIC && status == -libc::EINVAL {
            return Ok(None);
        }
        self.holder = match handshake::answer(answer) {
            Hold::Nobody { .. } => None,
            Hold::Theirs { pid, since } => Some((pid, since)),
            Hold::Refused(reason) => return Err(refused(place, reason)),
            Hold::Ours { .. } | Hold::Closed => {
                return Err(refused(place, "the server attached what only asked"));
            }
        };
        let Some((head, rest)) = rest.split_first_chunk::<LOG_HEAD_SIZE>() else {
            return Err(refused(place, "the server's answer ends before its log"));
        };
        let head = LogHead::from_bytes(head);
        let log = if head.memory == 0 { 0 } else { LOG_SIZE };
        let entries = rest.get(log..).unwrap_or_default();
        self.size = size_of_registry(&head);
        let whole = entries.len() / ENTRY_SIZE * ENTRY_SIZE;
        if whole == 0 && !self.is_complete() {
            return Err(Error::Fault { address: head.registry + from, len: ENTRY_SIZE });
        }
        self.registry.extend_from_slice(&entries[..whole]);
        Ok(Some(head.calls))
    }
}

fn size_of_registry(head: &LogHead) -> u64 {
    head.used.min(head.capacity).saturating_mul(ENTRY_SIZE as u64).min(MOST)
}

/// The registry of a server that does not tell it, as it lies in memory.
async fn by_memory(place: &Place, timeout: Duration) -> Result<(Vec<u8>, Holder)> {
    let flight = flight(place, timeout).await?;
    let LogHead { registry, .. } = flight.log.head;
    let mut bytes = vec![0; size_of_registry(&flight.log.head) as usize];
    let unreadable = |why: String| {
        refused(
            place,
            format!(
                "its server is of an older farcall and tells its names to its holder alone, and its \
                 memory can't be read from here ({why}): take it over, or `farcall upgrade` it when it \
                 is free"
            ),
        )
    };
    if !bytes.is_empty() {
        let process = place.state().map(|state| state.process);
        let process = process.filter(|process| process.is_alive());
        let pid = process.ok_or_else(|| unreadable("its pid is not known here".into()))?.pid;
        let memory = File::open(format!("/proc/{pid}/mem"));
        let read = memory.and_then(|memory| memory.read_exact_at(&mut bytes, registry));
        read.map_err(|error| unreadable(told(&error)))?;
    }
    Ok((bytes, flight.holder))
}

fn told(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::PermissionDenied {
        return "/proc/PID/mem needs the rights of a tracer, see ptrace(2) and Yama's ptrace_scope"
            .into();
    }
    error.to_string()
}

/// What of the process this one sees.
struct Sight {
    pid: Option<i32>,
    /// Its pids are pids here.
    same_pids: bool,
}

impl Sight {
    fn of(place: &Place) -> Self {
        let process = place.state().map(|state| state.process);
        let pid = process.filter(|process| process.is_alive()).map(|process| process.pid);
        let ns = |path: String| fs::metadata(path).ok().map(|ns| ns.ino());
        let theirs = pid.and_then(|pid| ns(format!("/proc/{pid}/ns/pid")));
        let same_pids = theirs.is_some() && theirs == ns("/proc/self/ns/pid".into());
        Self { pid, same_pids }
    }

    fn seen(&self, kept: &Kept) -> NameSeen {
        let Entry { value, kind, details, .. } = kept.entry;
        let (now, state) = match kind {
            kind::FD => self.fd(value, details),
            kind::CHILD => self.child(value, details),
            kind::MAPPING => (None, MAPPED),
            kind::BYTES => (None, Sameness::Same),
            other => {
                let what = format!("of kind {other}, which this farcall does not know");
                (None, Sameness::Changed(what))
            }
        };
        let size = match kind {
            kind::MAPPING => Some(details[0]),
            kind::BYTES => Some(kept.bytes.len() as u64),
            _ => None,
        };
        NameSeen { name: kept.name(), kind: Kind::of(kind), value, size, now, state }
    }

    fn fd(&self, number: u64, details: [u64; 3]) -> (Option<String>, Sameness) {
        let Some(pid) = self.pid else { return (None, NOT_SEEN) };
        let path = format!("/proc/{pid}/fd/{}", number as i32);
        let now = match fs::read_link(&path) {
            Ok(now) => Some(now.to_string_lossy().into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return (None, Sameness::Changed(format!("descriptor {number} is not open")));
            }
            Err(_) => return (None, NOT_SEEN),
        };
        let Some(identity) = identity_of(&path) else { return (now, NOT_SEEN) };
        let anonymous = identity.has_no_type()
            && statfs(path.as_str()).map_or(true, |fs| fs.filesystem_type().0 != PIDFS_MAGIC);
        match identity.compared(details) {
            Sameness::Same if anonymous => (now, ANONYMOUS),
            state => (now, state),
        }
    }

    fn child(&self, child: u64, details: [u64; 3]) -> (Option<String>, Sameness) {
        let (Some(parent), true) = (self.pid, self.same_pids) else { return (None, NOT_SEEN) };
        let gone = || (None, Sameness::Changed(format!("{child} is no child: it has been reaped")));
        let pidfd = pidfd_open(child as u32);
        let Ok(stat) = fs::read_to_string(format!("/proc/{child}/stat")) else { return gone() };
        // Behind the name, which may contain anything: the state, the parent, and 48 fields later the
        // status.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let fields: Vec<&str> = fields.split_whitespace().collect();
        if fields.get(1).and_then(|pid| pid.parse().ok()) != Some(parent) {
            return gone();
        }
        let status = fields.get(49).and_then(|status| status.parse().ok());
        let now = match (fields.first(), status) {
            (Some(&"Z"), Some(status)) => WaitStatus::from_wait(status).to_string(),
            _ => "lives".into(),
        };
        let state = match pidfd.as_ref().map(fstat) {
            Ok(Ok(file)) => {
                let identity = Identity::of(file.st_dev, file.st_ino, file.st_mode.into());
                match identity.compared(details) {
                    Sameness::Changed(_) => Sameness::Changed(format!(
                        "{child} is another child: the one that was is reaped"
                    )),
                    Sameness::Same if !is_on_pidfs(&pidfd) => CHILDREN_ALIKE,
                    state => state,
                }
            }
            _ => NOT_SEEN,
        };
        (Some(now), state)
    }
}

/// What a link of /proc/PID/fd leads to: the file itself, also where its path leads to another one.
/// The process may have it from a file system whose server does not answer, which is not asked.
fn identity_of(link: &str) -> Option<Identity> {
    let path = CString::new(link).ok()?;
    // SAFETY: zeros are one.
    let mut file: libc::statx = unsafe { std::mem::zeroed() };
    let (flags, mask) = (libc::AT_STATX_DONT_SYNC, libc::STATX_TYPE | libc::STATX_INO);
    // SAFETY: the path ends with a zero, and there is room for the answer.
    let done = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, mask, &raw mut file) };
    let device = libc::makedev(file.stx_dev_major, file.stx_dev_minor);
    (done == 0).then(|| Identity::of(device, file.stx_ino, file.stx_mode.into()))
}

fn is_on_pidfs(pidfd: &Result<OwnedFd>) -> bool {
    let magic = pidfd.as_ref().ok().and_then(|pidfd| fstatfs(pidfd).ok());
    magic.is_some_and(|fs| fs.filesystem_type().0 == PIDFS_MAGIC)
}

/// What is said of what can't be looked at.
const NOT_SEEN: Sameness = Sameness::Unverified("this process can't see it while another holds it");
