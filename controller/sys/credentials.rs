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
use crate::call::{Call, Error, Result};

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
        self.change("setresuid", Call::syscall(Sysno::setresuid, [r, e, s, 0, 0, 0]), vec![], ())
            .await
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
        self.change("setresgid", Call::syscall(Sysno::setresgid, [r, e, s, 0, 0, 0]), vec![], ())
            .await
    }

    /// Sets the supplementary groups of the target process: setgroups(2).
    ///
    /// # Errors
    ///
    /// EPERM, EINVAL as in setgroups(2); [`Error::ParentDied`].
    pub async fn setgroups(&self, groups: &[Gid]) -> Result<()> {
        let bytes: Vec<u8> = groups.iter().flat_map(|gid| gid.as_raw().to_le_bytes()).collect();
        let buffer = self.buffer(bytes.len()).await?;
        let args = [groups.len() as u64, buffer.address(), 0, 0, 0, 0];
        let before = vec![Call::copy_in(buffer.address(), bytes)];
        self.change("setgroups", Call::syscall(Sysno::setgroups, args), before, buffer).await
    }

    /// Makes a call that changes credentials, after `before` and with `buffer` in use, and ties the
    /// life to the parent's again.
    pub(crate) async fn change<B: Send + 'static>(
        &self,
        name: &'static str,
        call: Call,
        before: Vec<Call>,
        buffer: B,
    ) -> Result<()> {
        self.connection.room().await;
        let mut calls = before;
        let at = calls.len();
        calls.push(call);
        if !matches!(self.guardian(), Guardian::None) {
            calls.push(super::set_pdeathsig(nix::libc::SIGKILL));
        }
        if let Some(source) = self.ends.fds().source {
            // Who may be signalled by what arrives there is judged by the ids of who has said so.
            let own = [source as u64, nix::libc::F_SETOWN as u64, 0, 0, 0, 0];
            calls.push(Call::syscall(Sysno::gettid, [0; 6]));
            calls.push(Call::syscall(Sysno::fcntl, own).referring(2, 1));
        }
        self.connection
            .submit(calls, move |replies| {
                let _buffer = buffer;
                for before in replies.iter().take(at) {
                    before.value().map_err(Error::call("COPY_IN"))?;
                }
                replies.get(at).map_or(Err(Error::Protocol("no reply")), |reply| {
                    reply.value().map_err(Error::call(name)).map(|_| ())
                })
            })
            .await?;
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
