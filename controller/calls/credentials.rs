//! Credentials: setresuid(2), setresgid(2), setgroups(2).
//!
//! The kernel clears the parent-death signal when credentials change, and with it what ties a
//! child's life to its parent's. So these set it again in the same batch, and then see whether the
//! parent still lives: if it died in between, the child is ended as well.
//!
//! The signal is sent with the credentials of the parent that dies, and is lost where these may not
//! signal the child: a process that gives up privileges which children of its keep does not take
//! them with it. Where that matters, change the parent's credentials before it has children.

use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Gid, Uid};
use syscalls::Sysno;

use super::{Guardian, Task};
use crate::error::{Error, Result};
use crate::proto::Call;
use crate::proto::batch::{Arg, Batch};

/// "Leave it as it is", for the calls that set several ids.
const KEEP: u32 = u32::MAX;

impl Task {
    /// Sets the real, effective and saved user id of the target process; `None` keeps one:
    /// setresuid(2).
    ///
    /// # Errors
    ///
    /// EPERM, EAGAIN, EINVAL as in setresuid(2); [`Error::ParentDied`].
    pub async fn setresuid(
        &self,
        real: Option<Uid>,
        effective: Option<Uid>,
        saved: Option<Uid>,
    ) -> Result<()> {
        let ids = [real, effective, saved].map(|id| u64::from(id.map_or(KEEP, Uid::as_raw)));
        let [r, e, s] = ids;
        let mut batch = Batch::default();
        batch.syscall(Sysno::setresuid, [r, e, s].map(Arg::from));
        self.change(batch).await
    }

    /// Sets the real, effective and saved group id of the target process; `None` keeps one:
    /// setresgid(2).
    ///
    /// # Errors
    ///
    /// EPERM, EINVAL as in setresgid(2); [`Error::ParentDied`].
    pub async fn setresgid(
        &self,
        real: Option<Gid>,
        effective: Option<Gid>,
        saved: Option<Gid>,
    ) -> Result<()> {
        let ids = [real, effective, saved].map(|id| u64::from(id.map_or(KEEP, Gid::as_raw)));
        let [r, e, s] = ids;
        let mut batch = Batch::default();
        batch.syscall(Sysno::setresgid, [r, e, s].map(Arg::from));
        self.change(batch).await
    }

    /// Sets the supplementary groups of the target process: setgroups(2).
    ///
    /// # Errors
    ///
    /// EPERM, EINVAL as in setgroups(2); [`Error::ParentDied`].
    pub async fn setgroups(&self, groups: &[Gid]) -> Result<()> {
        let bytes: Vec<u8> = groups.iter().flat_map(|gid| gid.as_raw().to_le_bytes()).collect();
        let mut batch = Batch::default();
        let list = batch.input(&bytes);
        let set = batch.syscall(Sysno::setgroups, [(groups.len() as u64).into(), list]);
        // Servers of version 0 know no links.
        batch.unlink(set);
        self.change(batch).await
    }

    /// Sends a batch whose only step is a call that changes credentials, and ties the life to the parent's
    /// again.
    pub(crate) async fn change(&self, mut batch: Batch) -> Result<()> {
        let mut also = |number, args: [Arg; 3]| {
            let step = batch.syscall(number, args);
            batch.unlink(step);
            step
        };
        if !matches!(self.guardian(), Guardian::None) {
            let (option, signal) = (nix::libc::PR_SET_PDEATHSIG, nix::libc::SIGKILL);
            also(Sysno::prctl, [option.into(), signal.into(), 0.into()]);
        }
        if let Some(source) = self.ends.fds().source {
            // Who may be signalled by what arrives there is judged by the ids of who has said so.
            let thread = also(Sysno::gettid, [0.into(); 3]);
            let own = nix::libc::F_SETOWN.into();
            also(Sysno::fcntl, [source.into(), own, Arg::Result(thread)]);
        }
        self.send(batch, |replies, steps| steps.value(&replies, 0).map(|_| ())).await?;
        if self.guardian().lives() {
            return Ok(());
        }
        // Its result never comes.
        drop(self.connection.call_at_once("exit_group", exit_group(1)));
        Err(Error::ParentDied)
    }
}

/// Ends the process.
pub(crate) fn exit_group(status: i32) -> Call {
    Call::syscall(Sysno::exit_group, [status as u64, 0, 0, 0, 0, 0])
}

impl Guardian {
    /// Whether what the task's life depends on is still there.
    pub(crate) fn lives(&self) -> bool {
        match self {
            Self::None | Self::Controller => true,
            Self::Parent(pidfd) => !has_ended(pidfd),
        }
    }
}

/// Whether the process behind a pidfd has ended.
pub(crate) fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}
