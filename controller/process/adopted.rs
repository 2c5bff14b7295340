//! Children that this controller has not made: an earlier one's, or orphans that the process got.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use syscalls::Sysno;
use tokio::io::unix::AsyncFd;

use super::child::{Shared, readable};
use super::{ChildState, Process};
use crate::calls::WaitStatus;
use crate::calls::handle::Fd;
use crate::error::{Error, Result};
use crate::persist::{Resource, Sameness};
use crate::proto::Call;

/// A child of a process that this controller has not made, held by a pidfd: it stays the same child
/// whatever is reaped meanwhile. From [`Process::adopt_child`] and [`Process::adopt_named_child`].
///
/// Dropping it does nothing to the child.
pub struct AdoptedChild {
    parent: Process,
    pid: i32,
    /// In the parent's table.
    pidfd: Fd,
    /// The same here, to wait for its end.
    ends: AsyncFd<Shared>,
}

impl Process {
    /// A handle to the child with that pid, in the process's own pid namespace, whoever made it.
    /// pidfd_open(2) in the process.
    ///
    /// # Errors
    ///
    /// ECHILD if the process has no such child; those of the calls.
    pub async fn adopt_child(&self, pid: i32) -> Result<AdoptedChild> {
        // The pidfd is gone with the tenure of this controller.
        let parent = self.in_this_tenure();
        let pidfd = match parent.open_child(pid).await {
            Err(Error::Call { errno: Errno::ESRCH | Errno::EINVAL, .. }) => {
                return Err(Error::Call { call: "waitid", errno: Errno::ECHILD });
            }
            pidfd => pidfd?,
        };
        // The pidfd may be another process's, whose pid it is.
        parent.child_state(pid).await?;
        let here: OwnedFd = parent.fetch_fd(&pidfd).await?;
        Ok(AdoptedChild {
            pid,
            pidfd,
            ends: readable(Arc::new(here))?,
            parent: self.in_any_tenure(),
        })
    }

    /// A handle to the child that has a name, if it is still the one that got it.
    ///
    /// # Errors
    ///
    /// [`Error::Name`] if nothing has that name, if it is not a child's, and if its child has been reaped;
    /// those of the calls.
    pub async fn adopt_named_child(&self, name: &str) -> Result<AdoptedChild> {
        let refused = |reason| Err(Error::Name { name: name.to_owned(), reason });
        let found = self.name(name).await?;
        let pid = match (found.what, found.state) {
            (_, Sameness::Changed(_)) => {
                return refused("its child has been reaped: forget the name");
            }
            (Resource::Child(pid), _) => pid,
            _ => return refused("it is not a child's"),
        };
        let child = self.adopt_child(pid).await?;
        // The child may have been reaped before there was a pidfd, and its pid be another one's.
        match self.name(name).await?.state {
            Sameness::Changed(_) => refused("its child has been reaped: forget the name"),
            _ => Ok(child),
        }
    }
}

impl AdoptedChild {
    /// Its pid, in its parent's pid namespace.
    #[must_use]
    pub fn pid_in_parent(&self) -> i32 {
        self.pid
    }

    /// The parent.
    #[must_use]
    pub fn parent(&self) -> &Process {
        &self.parent
    }

    /// What has become of it, without reaping it.
    ///
    /// # Errors
    ///
    /// ECHILD if it has been reaped.
    pub async fn state(&self) -> Result<ChildState> {
        let parent = self.parent.in_this_tenure();
        let state = parent.child_state(self.pid).await?;
        // Its pid may be another child's by now.
        self.signal(&parent, 0).await.map_err(reaped)?;
        Ok(state)
    }

    /// Sends it a signal: pidfd_send_signal(2), by its parent.
    ///
    /// # Errors
    ///
    /// ESRCH if it has been reaped; EPERM.
    pub async fn kill(&self, signal: Signal) -> Result<()> {
        self.signal(&self.parent.in_this_tenure(), signal as u64).await
    }

    async fn signal(&self, parent: &Process, signal: u64) -> Result<()> {
        let pidfd = parent.number(&self.pidfd)?;
        let call = Call::syscall(Sysno::pidfd_send_signal, [pidfd, signal, 0, 0, 0, 0]);
        parent.connection.call("pidfd_send_signal", call).await.map(|_| ())
    }

    /// Waits until it has ended, and leaves it to be reaped. The parent is not blocked.
    pub async fn ended(&self) {
        // It fails only where the runtime is being shut down.
        let _ = self.ends.readable().await;
    }

    /// Waits until it has ended, and reaps it: waitid(2) in the parent, which is not blocked. If this is
    /// dropped while it is under way, the next that waits in this controller is told the status.
    ///
    /// # Errors
    ///
    /// ECHILD if it has been reaped.
    pub async fn wait(&self) -> Result<WaitStatus> {
        if let Some(status) = self.parent.untold(self.pid) {
            return Ok(status);
        }
        self.ended().await;
        self.parent.in_this_tenure().reap_pidfd(&self.pidfd).await
    }
}

impl std::fmt::Debug for AdoptedChild {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdoptedChild").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// What waitid(2) says of a child that has been reaped.
fn reaped(error: Error) -> Error {
    match error {
        Error::Call { errno: Errno::ESRCH, .. } => {
            Error::Call { call: "waitid", errno: Errno::ECHILD }
        }
        error => error,
    }
}
