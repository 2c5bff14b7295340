//! Processes: getpid(2), setsid(2), prctl(2), nanosleep(2), waitid(2).

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use syscalls::Sysno;

use super::Task;
use crate::calls::handle::Fd;
use crate::error::Result;
use crate::proto::Call;

/// How a child ended, as its parent learned it from waitid(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WaitStatus {
    /// It exited with this status (0..=255).
    Exited(i32),
    /// A signal ended it.
    Signaled {
        /// The signal's number.
        signal: i32,
        /// Whether it left a core dump.
        core_dumped: bool,
    },
}

impl std::fmt::Display for WaitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Signaled { signal, core_dumped } => {
                match nix::sys::signal::Signal::try_from(*signal) {
                    Ok(name) => write!(f, "ended by {name}")?,
                    Err(_) => write!(f, "ended by signal {signal}")?,
                }
                f.write_str(if *core_dumped { ", with a core dump" } else { "" })
            }
        }
    }
}

/// The call that sets the parent-death signal.
pub(crate) fn set_pdeathsig(signal: i32) -> Call {
    let args = [nix::libc::PR_SET_PDEATHSIG as u64, signal as u64, 0, 0, 0, 0];
    Call::syscall(Sysno::prctl, args)
}

impl Task {
    /// The pid of the target process, in its own pid namespace: getpid(2).
    ///
    /// # Errors
    ///
    /// What became of the connection.
    pub async fn getpid(&self) -> Result<i32> {
        self.syscall(Sysno::getpid, [0; 6]).await.map(|pid| pid as i32)
    }

    /// The pid of its parent, 0 if that is in another pid namespace: getppid(2).
    ///
    /// # Errors
    ///
    /// What became of the connection.
    pub async fn getppid(&self) -> Result<i32> {
        self.syscall(Sysno::getppid, [0; 6]).await.map(|pid| pid as i32)
    }

    /// Makes the target process the leader of a new session: setsid(2).
    ///
    /// # Errors
    ///
    /// EPERM if it leads a process group already.
    pub async fn setsid(&self) -> Result<i32> {
        self.syscall(Sysno::setsid, [0; 6]).await.map(|pid| pid as i32)
    }

    /// Sets the signal that the target process gets when its parent dies, 0 for none: prctl(2)
    /// PR_SET_PDEATHSIG.
    ///
    /// # Errors
    ///
    /// EINVAL for what is no signal.
    pub async fn set_pdeathsig(&self, signal: i32) -> Result<()> {
        self.connection.ready().await;
        self.connection.call_at_once("prctl", set_pdeathsig(signal)).await.map(|_| ())
    }

    /// Makes the target process the parent that its orphaned descendants get, in the place of process 1
    /// of their pid namespace, or ends that: prctl(2) PR_SET_CHILD_SUBREAPER. Their exit statuses wait
    /// for it from then on. execve(2) keeps the attribute, children do not inherit it.
    ///
    /// # Errors
    ///
    /// What became of the connection.
    pub async fn set_child_subreaper(&self, on: bool) -> Result<()> {
        let args = [nix::libc::PR_SET_CHILD_SUBREAPER as u64, u64::from(on), 0, 0, 0, 0];
        self.syscall(Sysno::prctl, args).await.map(|_| ())
    }

    /// Blocks the target process for a time: nanosleep(2). Calls sent meanwhile wait.
    ///
    /// # Errors
    ///
    /// EINTR if a signal ended the sleep.
    pub async fn nanosleep(&self, duration: Duration) -> Result<()> {
        let mut timespec = duration.as_secs().to_le_bytes().to_vec();
        timespec.extend(u64::from(duration.subsec_nanos()).to_le_bytes());
        let call = |at| Call::syscall(Sysno::nanosleep, [at, 0, 0, 0, 0, 0]);
        self.call_with("nanosleep", timespec, call).await.map(|_| ())
    }

    /// Reaps the child behind a pidfd, which must be a child of the target process, or finds that
    /// it has not ended yet: waitid(2) with WEXITED and WNOHANG. A child that the target process traces,
    /// see ptrace(2), and that has stopped has not ended: the stop stays for whoever waits for it.
    ///
    /// # Errors
    ///
    /// ECHILD if it is no child of the target process, or has been reaped.
    pub async fn waitid_pidfd(&self, pidfd: &Fd) -> Result<Option<WaitStatus>> {
        self.waitid_ended(nix::libc::P_PIDFD, self.number(pidfd)?).await
    }

    /// The same for a child's pid.
    ///
    /// # Errors
    ///
    /// ECHILD if it is no child of the target process, or has been reaped.
    pub async fn waitid_pid(&self, pid: i32) -> Result<Option<WaitStatus>> {
        self.waitid_ended(nix::libc::P_PID, pid as u64).await
    }

    /// Looks first, without taking anything: the kernel tells of stops of traced children, whether or
    /// not they are asked for.
    async fn waitid_ended(&self, kind: nix::libc::idtype_t, id: u64) -> Result<Option<WaitStatus>> {
        let look = |at| waitid(kind, id, at, nix::libc::WNOWAIT);
        let told =
            self.call_fills("waitid", SIGINFO_SIZE, look, |info| WaitStatus::from_siginfo(&info));
        match told.await? {
            None => Ok(None),
            Some(_) => self.waitid(kind, id, Arc::default()).await,
        }
    }

    /// Reaps a child that has ended. Its status is stored in `keep` when the reply is here, so that a
    /// dropped future does not lose it.
    pub(crate) async fn reap(
        &self,
        pid: i32,
        keep: Arc<OnceLock<WaitStatus>>,
    ) -> Result<Option<WaitStatus>> {
        self.waitid(nix::libc::P_PID, pid as u64, keep).await
    }

    async fn waitid(
        &self,
        kind: nix::libc::idtype_t,
        id: u64,
        keep: Arc<OnceLock<WaitStatus>>,
    ) -> Result<Option<WaitStatus>> {
        let call = |at| waitid(kind, id, at, 0);
        self.call_fills("waitid", SIGINFO_SIZE, call, move |info| {
            let status = WaitStatus::from_siginfo(&info);
            if let Some(status) = status {
                // It is set already only if the child has been reaped, and then this is none.
                let _ = keep.set(status);
            }
            status
        })
        .await
    }
}

/// Bytes of a siginfo_t.
pub(crate) const SIGINFO_SIZE: usize = size_of::<nix::libc::siginfo_t>();

/// waitid(2) that does not wait, for children that have ended, whatever signal their end sends. Its
/// siginfo_t goes to `at`. With WNOWAIT nothing is reaped.
pub(crate) fn waitid(kind: nix::libc::idtype_t, id: u64, at: u64, options: i32) -> Call {
    let options = nix::libc::WEXITED | nix::libc::WNOHANG | nix::libc::__WALL | options;
    Call::syscall(Sysno::waitid, [u64::from(kind), id, at, options as u64, 0, 0])
}

/// The number at `at` of a siginfo_t: signal, errno, code, padding, pid, uid, status.
fn field(info: &[u8], at: usize) -> i32 {
    let bytes = info.get(at..).and_then(|bytes| bytes.first_chunk());
    bytes.map_or(0, |bytes| i32::from_le_bytes(*bytes))
}

/// Whose end a siginfo_t tells of.
pub(crate) fn pid_of_siginfo(info: &[u8]) -> i32 {
    field(info, 16)
}

impl WaitStatus {
    /// From the status that wait(2) gives, and PIDFD_GET_INFO.
    pub(crate) fn from_wait(status: i32) -> Self {
        match status & 0x7f {
            0 => Self::Exited(status >> 8 & 0xff),
            signal => Self::Signaled { signal, core_dumped: status & 0x80 != 0 },
        }
    }

    /// None if the child has not ended.
    pub(crate) fn from_siginfo(info: &[u8]) -> Option<Self> {
        let field = |at| field(info, at);
        let (code, status) = (field(8), field(24));
        match (field(0), code) {
            (nix::libc::SIGCHLD, nix::libc::CLD_EXITED) => Some(WaitStatus::Exited(status)),
            (nix::libc::SIGCHLD, nix::libc::CLD_KILLED) => {
                Some(WaitStatus::Signaled { signal: status, core_dumped: false })
            }
            (nix::libc::SIGCHLD, nix::libc::CLD_DUMPED) => {
                Some(WaitStatus::Signaled { signal: status, core_dumped: true })
            }
            _ => None,
        }
    }
}
