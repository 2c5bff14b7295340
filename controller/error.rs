//! What can go wrong, told so that a program can match on it and a person can act on it.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::libc;

/// A result with farcall's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is known of a call whose result did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was not executed, and will not be.
    NotExecuted,
    /// It was executed, in part at least if it was several that belong together, and nobody knows
    /// any more what it returned.
    Executed,
    /// It may have been executed. It was handed to a bare stream, without a log, which ended before
    /// the result came; or the server died while it was under way.
    PossiblyExecuted,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotExecuted => "not executed",
            Self::Executed => "executed, and its result is lost",
            Self::PossiblyExecuted => "possibly executed",
        })
    }
}

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused a call in the target process.
    #[error("{call}: {} ({}){}", errno.desc(), errno_name(*errno), lacking(call, *errno))]
    Call {
        /// The call's name in its man page.
        call: &'static str,
        /// The errno, as in its man page.
        errno: Errno,
    },
    /// A call of a chain failed.
    #[error(transparent)]
    Chain(ChainError),
    /// The connection ended before the result of a call arrived.
    #[error("the connection to the process ended: the call was {0}")]
    Lost(Outcome),
    /// The process is gone.
    #[error("the process is gone: the call was not executed")]
    Gone,
    /// The main thread of the process, in which its server ran, has exited, and another thread of it goes
    /// on: it makes no call any more, and does not end by itself.
    #[error(
        "the main thread of the process (pid {pid}), in which its server ran, has exited, and another thread of it goes on: the call was {outcome}, and no other can be made; `kill -KILL {pid}` ends it"
    )]
    LeaderExited {
        /// Its pid.
        pid: i32,
        /// What has become of the call.
        outcome: Outcome,
    },
    /// What a server sent does not follow the protocol.
    #[error("the server does not speak farcall's protocol: {0}")]
    Protocol(&'static str),
    /// What the caller asked for makes no sense, or not here. Nothing was sent to the process.
    #[error("{what}: {advice}")]
    Misuse {
        /// What was asked for.
        what: &'static str,
        /// Why that can't be, and what to do instead.
        advice: &'static str,
    },
    /// Memory of the target process could not be reached.
    #[error("{len} bytes at {address:#x} can't be reached in the process")]
    Fault {
        /// The first address that was asked for.
        address: u64,
        /// How many bytes were asked for.
        len: usize,
    },
    /// A handle was used with a process that it does not belong to.
    #[error("descriptor {fd} belongs to another table of descriptors than the process's")]
    ForeignFd {
        /// Its number in its own table.
        fd: i32,
    },
    /// A handle is from before another controller held the process: what it stood for may be gone, and
    /// something else in its place. Nothing was executed.
    #[error(
        "{what} is from before another controller held the process, and may be something else by now: make it anew, or look for it by its name"
    )]
    Stale {
        /// What the handle stood for.
        what: String,
    },
    /// A call was not complete at its deadline: it was interrupted, and returned EINTR, or it had not
    /// begun, and is not executed.
    #[error("{call}: {} at its deadline", if *begun { "interrupted" } else { "not begun" })]
    TimedOut {
        /// The call's name in its man page.
        call: &'static str,
        /// It had begun, and returned EINTR. A call that waits behind another one has not.
        begun: bool,
    },
    /// What was asked for needs a server that reads ahead, and this one does not.
    #[error(
        "{what} needs a server that reads ahead (version 1 of the stream), and this one does not: {}",
        errno.map_or("it was asked not to".to_owned(), |errno| format!(
            "the kernel lets it copy nothing within its process, neither by process_vm_writev(2), which seccomp filters forbid and some kernels lack, nor through a pipe ({})",
            errno_name(errno)
        ))
    )]
    NoReadAhead {
        /// What was asked for.
        what: &'static str,
        /// With what copying fails in the process, if it does.
        errno: Option<Errno>,
    },
    /// There is no such room in memory that the process shares with the controller.
    #[error(
        "no {size} bytes are free in memory that the process shares with the controller (Process::enter_ring makes it, on the same machine, for servers that read ahead)"
    )]
    NotShared {
        /// How many bytes were asked for.
        size: usize,
    },
    /// A call can't be interrupted: the process has no ring, in which it is known what it executes; or
    /// it runs another program.
    #[error(
        "the call can't be interrupted: it is execve, or the process has no memory in common with the controller (Process::enter_ring makes it, on the same machine, for servers that read ahead)"
    )]
    NotInterruptible,
    /// The signal that interrupts a call was sent and never heard.
    #[error(
        "the process did not hear the signal that interrupts calls (SIGIO; {} with an older image): it blocks it or handles it in another way, or is in a call that nothing interrupts",
        crate::abi::ring::INTERRUPT_SIGNAL
    )]
    Signal,
    /// An image, in a process or for one, is not one that this build can drive.
    #[error(
        "{}, and this farcall drives server images of version {}",
        version.map_or("no server image".to_owned(), |version| {
            format!("a server image of version {version}, which needs the farcall that it is from")
        }),
        crate::abi::entry::IMAGE_VERSION
    )]
    ForeignImage {
        /// The version that its entry table names, if it has one.
        version: Option<u32>,
    },
    /// A process can't go on as another image; it goes on as the one that it runs.
    #[error("the process can't be upgraded: {reason}")]
    Upgrade {
        /// What is in the way, and what can be done.
        reason: String,
    },
    /// Flags of clone(2) that can't go together, or that would break the child.
    #[error("a child with {0}")]
    CloneFlags(&'static str),
    /// The process shares its memory with others, and was to become persistent without the word
    /// for that.
    #[error(
        "the process shares its memory: as a persistent process it would keep all of that memory alive and die with it; ask for it with SharedMemory::Keep, or use an isolated child"
    )]
    SharesMemory,
    /// The parent died while its child was made or changed credentials: the child ends too.
    #[error(
        "the parent died while its child was made or changed its credentials: the child ends too"
    )]
    ParentDied,
    /// Another controller holds the process.
    #[error("held by {}{}: wait until it is gone, stop it, or take the process over",
        holder(*pid), since.map_or(String::new(), |since| format!(" since {}", utc(since))))]
    Held {
        /// The holder's pid, where it is known.
        pid: Option<i32>,
        /// Since when, in seconds since 1970, where it is known.
        since: Option<i64>,
    },
    /// The controller that held the process has ended, and others have inherited its connection, which
    /// is open as long as they have it: children that it made without close-on-exec, mostly.
    #[error("held by pid {0}, which has inherited the connection of {1}, which has ended: end pid {0}, or take the process over",
        pids(heirs), holder(*pid))]
    Inherited {
        /// The pid of the controller that has ended, where it is known.
        pid: Option<i32>,
        /// Those that have its end of the connection open, as far as this user sees.
        heirs: Vec<i32>,
    },
    /// Another controller has taken the process over, or has held it and left again.
    #[error("{}: the call was {outcome}", superseded(*pid, *since))]
    Superseded {
        /// The other one's pid, where it is known: while it holds the process.
        pid: Option<i32>,
        /// When that was, in seconds since 1970, where it is known: while it holds the process.
        since: Option<i64>,
        /// What has become of the call.
        outcome: Outcome,
    },
    /// A persistent process refused the handshake, or did not answer it.
    #[error("{}: {reason}", path.display())]
    Attach {
        /// The socket.
        path: PathBuf,
        /// What happened, and what can be done.
        reason: String,
    },
    /// A resource can't have that name, or there is none of it.
    #[error("the name {name:?}: {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it, and what can be done.
        reason: &'static str,
    },
    /// The exit status of a process that is another one's child can't be told by its pidfd.
    #[error(
        "this kernel does not tell the exit status of a process that is another one's child ({}): that needs Linux 6.15 or newer (PIDFD_GET_INFO with PIDFD_INFO_EXIT), asked in a pid namespace that has the process; what remains is to reap it in its parent (Process::wait_for_child), which tells the status once",
        errno.map_or("it answers without it".to_owned(), errno_name)
    )]
    ExitStatusUntold {
        /// How the kernel refused; none if it has answered, and left the status out.
        errno: Option<Errno>,
    },
    /// The sockets' directory, or a name in it, can't be used.
    #[error("{}: {reason}", path.display())]
    Home {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong with it, and what can be done.
        reason: String,
    },
    /// A process can't get a cgroup of its own, or its cgroup can't be removed.
    #[error("{}: {reason}", path.display())]
    Cgroup {
        /// The cgroup, or the directory above it.
        path: PathBuf,
        /// What is wrong with it, and what can be done.
        reason: String,
    },
    /// A call on this side failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done.
        context: &'static str,
        /// How it failed.
        source: io::Error,
    },
}

/// Which call of a chain failed, and what was not executed because of it. Descriptors that the
/// chain had opened are closed again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainError {
    /// Its place in the chain, counted from 0.
    pub step: usize,
    /// Its name in its man page.
    pub call: &'static str,
    /// With what it failed.
    pub errno: Errno,
    /// The places and names of the calls that were not executed.
    pub skipped: Vec<(usize, &'static str)>,
    /// How many round trips the chain took.
    pub round_trips: usize,
}

impl std::fmt::Display for ChainError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { step, call, errno, skipped, .. } = self;
        let name = errno_name(*errno);
        write!(f, "call {step} of the chain, {call}: {} ({name})", errno.desc())?;
        if !skipped.is_empty() {
            let names: Vec<&str> = skipped.iter().map(|(_, name)| *name).collect();
            write!(f, "; not executed: {}", names.join(", "))?;
        }
        Ok(())
    }
}

impl std::error::Error for ChainError {}

impl Error {
    /// An error of a call on this side.
    pub(crate) fn io(context: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { context, source }
    }

    /// An errno of a call on this side.
    pub(crate) fn local(context: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Io { context, source: errno.into() }
    }

    /// An errno of a call in the target process.
    pub(crate) fn call(call: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Call { call, errno }
    }

    /// The caller named a descriptor that a server runs on.
    pub(crate) const SERVERS_FD: Self = Self::Misuse {
        what: "a descriptor that the server itself uses",
        advice: "the process can't be called without it: use another number (Process::server_descriptors lists the server's)",
    };

    pub(crate) fn misuse(what: &'static str, advice: &'static str) -> Self {
        Self::Misuse { what, advice }
    }

    /// What is known of a call whose result did not arrive, if this is such an error.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::Lost(outcome)
            | Self::LeaderExited { outcome, .. }
            | Self::Superseded { outcome, .. } => Some(*outcome),
            Self::Gone | Self::TimedOut { begun: false, .. } => Some(Outcome::NotExecuted),
            _ => None,
        }
    }

    /// The same for several calls that belong together, of which some have been executed before this one
    /// was not.
    pub(crate) fn in_part(self) -> Self {
        match self {
            Self::Lost(Outcome::NotExecuted) => Self::Lost(Outcome::Executed),
            Self::Superseded { pid, since, outcome: Outcome::NotExecuted } => {
                Self::Superseded { pid, since, outcome: Outcome::Executed }
            }
            other => other,
        }
    }

    /// The same of a call that only prepares another one, which has not begun: of that nothing was executed.
    pub(crate) fn of_preparation(self) -> Self {
        match self {
            Self::Lost(_) => Self::Lost(Outcome::NotExecuted),
            Self::Superseded { pid, since, .. } => {
                Self::Superseded { pid, since, outcome: Outcome::NotExecuted }
            }
            other => other,
        }
    }

    /// The errno, if the kernel refused a call in the target process.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Call { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// The errno's name, as man pages have it.
#[must_use]
pub fn errno_name(errno: Errno) -> String {
    match errno {
        Errno::UnknownErrno => "unknown errno".into(),
        errno => format!("{errno:?}"),
    }
}

fn superseded(pid: Option<i32>, since: Option<i64>) -> String {
    if (pid, since) == (None, None) {
        return "another controller has held the process since the call was made".into();
    }
    let since = since.map_or(String::new(), |since| format!(", {}", utc(since)));
    format!("the process was taken over by {}{since}", holder(pid))
}

/// What is said besides of a call that farcall itself needs, where it is missing or forbidden.
pub(crate) fn lacking(call: &str, errno: Errno) -> &'static str {
    match (call, errno) {
        ("close_range", Errno::ENOSYS | Errno::EPERM | Errno::EACCES) => {
            ": farcall needs it: Linux 5.9 or newer, and no seccomp filter that forbids it"
        }
        ("pidfd_open", Errno::ENOSYS | Errno::EPERM | Errno::EACCES) => {
            ": farcall needs it: Linux 5.3 or newer, and no seccomp filter that forbids it"
        }
        _ => "",
    }
}

/// Whether an errno says that there is no such call: the kernel is older, or a seccomp filter or a
/// security module does not let it be made.
pub(crate) fn is_forbidden(errno: Errno) -> bool {
    matches!(errno, Errno::ENOSYS | Errno::EPERM | Errno::EACCES)
}

fn holder(pid: Option<i32>) -> String {
    pid.map_or_else(|| "a controller that did not say its pid".into(), |pid| format!("pid {pid}"))
}

fn pids(pids: &[i32]) -> String {
    pids.iter().map(i32::to_string).collect::<Vec<_>>().join(", ")
}

/// A time in seconds since 1970, as a person reads it.
fn utc(seconds: i64) -> String {
    // SAFETY: integers and a pointer that may be null.
    let mut time: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: gmtime_r(3) reads the one and fills the other, and keeps neither.
    if unsafe { libc::gmtime_r(&seconds, &mut time) }.is_null() {
        return format!("second {seconds}");
    }
    let (year, month) = (i64::from(time.tm_year) + 1900, time.tm_mon + 1);
    let (day, hour, minute, second) = (time.tm_mday, time.tm_hour, time.tm_min, time.tm_sec);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn a_time_is_told_in_utc_and_one_beyond_all_years_as_its_number() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(utc(-1), "1969-12-31T23:59:59Z");
        assert_eq!(utc(i64::MAX), format!("second {}", i64::MAX));
    }
}
