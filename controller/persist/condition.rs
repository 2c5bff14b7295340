//! What keeps a process from answering, as /proc of this process tells it, and what helps.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use syscalls::Sysno;

use super::attach::IMAGE_PLACE;
use super::cgroup;
use super::place::Place;
use super::record::Record;
use crate::abi::entry::{ENTRY_TABLE_OFFSET, ENTRY_TABLE_SIZE, EntryTable};
use crate::process::is_leaderless;

/// What a persistent process is doing, as far as that can be seen from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Condition {
    /// It waits for requests, or for its next controller.
    Idle,
    /// It executes: a call that computes, or the server's own code.
    Running,
    /// It sleeps in a call that it was asked to make.
    InCall {
        /// The call as its man page is called, such as `nanosleep(2)`; where this user may not see that,
        /// the function of the kernel in which it sleeps.
        call: String,
        /// Nothing interrupts it there, SIGKILL included.
        uninterruptible: bool,
    },
    /// It is stopped by a signal, such as SIGSTOP.
    Stopped,
    /// A tracer (a debugger, strace) has stopped it.
    Traced {
        /// The tracer's pid, where it is known.
        by: Option<i32>,
    },
    /// It is frozen with all in a cgroup.
    Frozen {
        /// The directory of the cgroup that is to be thawed.
        cgroup: PathBuf,
    },
    /// /proc does not tell this user.
    Unknown,
}

/// A server's own waits look at memory within so many bytes above its stack pointer; what
/// controllers' calls look at lies elsewhere. All of a server's stack is less.
const STACK: u64 = 4096;

impl Condition {
    /// What the process with that pid does; `None` if there is no such process.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?;
            value.split_whitespace().next()
        };
        let state = field("State:")?.chars().next()?;
        Some(match state {
            'Z' | 'X' | 'x' => return None,
            'T' => Self::Stopped,
            't' => {
                let by = field("TracerPid:").and_then(|pid| pid.parse().ok());
                Self::Traced { by: by.filter(|pid| *pid > 0) }
            }
            _ => match cgroup::frozen(pid) {
                Some(cgroup) => Self::Frozen { cgroup },
                None if state == 'R' => Self::Running,
                None => asleep(pid, state == 'D'),
            },
        })
    }

    /// What a person can do so that it goes on, if there is anything.
    #[must_use]
    pub fn advice(&self, pid: i32) -> Option<String> {
        match self {
            Self::Stopped => Some(format!("`kill -CONT {pid}` lets it go on")),
            Self::Traced { by: Some(tracer) } => {
                Some(format!("let it go on there, or detach or end pid {tracer}"))
            }
            Self::Traced { by: None } => Some("let it go on there, or detach it".into()),
            Self::Frozen { cgroup } => {
                let (word, file) = if cgroup.join("freezer.state").exists() {
                    ("THAWED", "freezer.state")
                } else {
                    ("0", "cgroup.freeze")
                };
                let file = cgroup.join(file);
                Some(format!("thaw it (`echo {word} > {}`)", file.display()))
            }
            Self::Idle | Self::Running | Self::InCall { .. } | Self::Unknown => None,
        }
    }
}

/// Says what the process "is".
impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => f.write_str("waiting for requests"),
            Self::Running => f.write_str("busy with a call: it is running"),
            Self::InCall { call, uninterruptible: false } => write!(f, "blocked in {call}"),
            Self::InCall { call, uninterruptible: true } => {
                write!(f, "blocked in {call}, in uninterruptible sleep")
            }
            Self::Stopped => f.write_str("stopped by a signal"),
            Self::Traced { by: None } => f.write_str("stopped by its tracer"),
            Self::Traced { by: Some(pid) } => write!(f, "stopped by its tracer, {}", named(*pid)),
            Self::Frozen { cgroup } => write!(f, "frozen with its cgroup {}", cgroup.display()),
            Self::Unknown => f.write_str("blocked: in what, /proc does not tell this user"),
        }
    }
}

/// Where a process sleeps.
fn asleep(pid: i32, uninterruptible: bool) -> Condition {
    // The right of a tracer is needed for this one.
    if let Some(SystemCall { number, args, stack, place }) = system_call(pid) {
        let own = || args.iter().any(|arg| (stack..stack + STACK).contains(arg));
        return match number {
            Some(number) if polls(number) && own() => Condition::Idle,
            Some(number) if waits_for_one(number) && is_servers_own(pid, place) => Condition::Idle,
            Some(number) => {
                let call = format!("{}(2)", number.name());
                Condition::InCall { call, uninterruptible }
            }
            None => Condition::InCall { call: "the kernel".into(), uninterruptible },
        };
    }
    // The right of a reader is for this: the same user may.
    match fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default().as_str() {
        "" | "0" => Condition::Unknown,
        function if function.contains("poll") || function.contains("select") => Condition::Idle,
        function => {
            let call = format!("the kernel's {function}");
            Condition::InCall { call, uninterruptible }
        }
    }
}

/// Whether a server itself makes that call to wait.
fn polls(number: Sysno) -> bool {
    matches!(number, Sysno::ppoll | Sysno::pselect6 | Sysno::epoll_wait | Sysno::epoll_pwait)
}

/// Whether it does where it may make none of those: for requests, for a client, or for a handshake. Two of
/// these have nothing on its stack.
fn waits_for_one(number: Sysno) -> bool {
    matches!(number, Sysno::read | Sysno::accept4 | Sysno::recvmsg)
}

/// Whether it is the server's own code that makes the call from which a process returns to `place`, and not
/// what makes controllers' calls. That code is out of line in all images, and in the image it is nowhere else.
fn is_servers_own(pid: i32, place: u64) -> bool {
    /// mov r10, rcx; syscall; ret.
    const OUT_OF_LINE: [u8; 6] = [0x49, 0x89, 0xca, 0x0f, 0x05, 0xc3];
    const PAGE: u64 = 4096;
    let Ok(memory) = File::open(format!("/proc/{pid}/mem")) else { return false };
    let is_image = |base: &u64| {
        let mut table = [0; ENTRY_TABLE_SIZE];
        let read = memory.read_exact_at(&mut table, base + ENTRY_TABLE_OFFSET as u64);
        let table = read.ok().and_then(|()| EntryTable::from_bytes(&table));
        table.is_some_and(|table| (*base..*base + u64::from(table.size)).contains(&place))
    };
    let page = place & !(PAGE - 1);
    let mut bases =
        (0..IMAGE_PLACE as u64).step_by(PAGE as usize).map(|to| page.saturating_sub(to));
    let mut code = [0; OUT_OF_LINE.len()];
    let before = place.saturating_sub(code.len() as u64 - 1);
    bases.any(|base| is_image(&base))
        && memory.read_exact_at(&mut code, before).is_ok_and(|()| code != OUT_OF_LINE)
}

/// A call in which a process sleeps.
struct SystemCall {
    /// None: it is not one of this architecture.
    number: Option<Sysno>,
    args: [u64; 6],
    /// The stack pointer.
    stack: u64,
    /// Where the call returns to.
    place: u64,
}

/// What /proc/PID/syscall tells.
fn system_call(pid: i32) -> Option<SystemCall> {
    let text = fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
    let mut fields = text.split_whitespace();
    let number: i64 = fields.next()?.parse().ok()?;
    let mut next = || u64::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok();
    let mut args = [0; 6];
    // Without a call only the last two are there.
    if number >= 0 {
        for arg in &mut args {
            *arg = next()?;
        }
    }
    let number = usize::try_from(number).ok().and_then(Sysno::new);
    Some(SystemCall { number, args, stack: next()?, place: next()? })
}

/// A process with its name, as a person finds it.
pub(super) fn named(pid: i32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("pid {pid} ({})", name.trim_end().escape_debug()),
        Err(_) => format!("pid {pid}"),
    }
}

/// Why the process at `place` does not answer, and what helps, for the end of a sentence.
pub(super) fn why_silent(place: &Place) -> String {
    let Some(state) = place.state() else {
        return "the process is blocked in a call or stopped, and no NAME.json says which it is"
            .into();
    };
    let pid = state.process.pid;
    let condition = match state.process.judge() {
        None => {
            return "the process is blocked in a call or stopped; which, this process can't see: it is \
                    in another pid namespace, or there is no /proc of this one"
                .into();
        }
        Some(false) if is_leaderless(pid) => {
            return format!(
                "the main thread of the process (pid {pid}), in which its server ran, has exited, and \
                 another thread of it goes on: `kill -KILL {pid}` ends it"
            );
        }
        Some(false) => {
            return format!(
                "pid {pid}, which NAME.json names, has ended, and who listens there is blocked"
            );
        }
        Some(true) => Condition::of(pid).unwrap_or(Condition::Unknown),
    };
    let text = match &condition {
        // Other controllers may have been quicker, or it waits for bytes of its controller.
        Condition::Idle => match limit_reached(pid) {
            Some(limit) => format!(
                "no number below the process's hard RLIMIT_NOFILE, {limit}, is free for a client: raise \
                 it (`prlimit --pid {pid} --nofile=1024:1024`), and tell it so (`kill -PIPE {pid}`)"
            ),
            None => "the process is waiting, and does not answer".to_owned(),
        },
        Condition::InCall { call, uninterruptible } => {
            let by = match &state.holder {
                Some(holder) if holder.is_gone() => {
                    format!("of its last controller, pid {}, which is gone", holder.pid)
                }
                Some(holder) => format!("of its controller, pid {}", holder.pid),
                None => "of its last controller".into(),
            };
            let sleep = if *uninterruptible { ", in uninterruptible sleep" } else { "" };
            format!("the process (pid {pid}) is blocked in a call {by}: {call}{sleep}")
        }
        other => format!("the process (pid {pid}) is {other}"),
    };
    match condition.advice(pid) {
        Some(advice) => format!("{text}: {advice}"),
        None => text,
    }
}

/// The hard RLIMIT_NOFILE of a process that has all numbers below it in use, as far as this user sees.
fn limit_reached(pid: i32) -> Option<u64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let hard = line.split_whitespace().nth(1)?.parse().ok()?;
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let numbers = fds.filter_map(|fd| fd.file_name().to_str()?.parse::<u64>().ok());
    (numbers.filter(|number| *number < hard).count() as u64 >= hard).then_some(hard)
}

impl Place {
    /// The processes that have the connection of the controller that NAME.json names open, that one
    /// itself included, as far as this user sees. Who is among them when that one has ended has inherited
    /// it, and holds the process by it.
    #[must_use]
    pub fn heirs(&self) -> Vec<i32> {
        let record = self.directory().ok().and_then(|directory| self.record(&directory));
        let Some(Record { state, author, .. }) = record else { return Vec::new() };
        let mut heirs = state.connection.map(holders_of_socket).unwrap_or_default();
        heirs.retain(|pid| author.may_speak_for(*pid));
        heirs
    }
}

/// The processes that have a socket with that inode open, as far as this user sees.
fn holders_of_socket(inode: u64) -> Vec<i32> {
    let link = PathBuf::from(format!("socket:[{inode}]"));
    let has = |pid: &i32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        fds.into_iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == link))
    };
    let processes = fs::read_dir(Path::new("/proc")).into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(has).collect()
}
