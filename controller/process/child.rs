//! Children: waiting for them, ending them, and cleaning up what they leave in their parent.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use syscalls::{Sysno, syscall};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::Process;
use crate::calls::WaitStatus;
use crate::calls::handle::{Fd, Lent, Stack};
use crate::error::{Error, Result};
use crate::link::{Connection, Socket};
use crate::proto::Call;

/// A child of a process, made through [`Process::child`].
///
/// Dropping it ends an ordinary child that still serves: its connection ends, and with it its server.
/// It is reaped in the background. A child that has executed a program runs on, until it ends by itself
/// or its parent ends, which takes it along by the parent-death signal: [`Child::kill`] it to end it
/// before. A persistent child goes on, whatever becomes of handles and parents.
pub struct Child {
    process: Process,
    parent: Process,
    /// In its parent's pid namespace. The parent has no pidfd of it: see [`reap`].
    pid: i32,
    /// Kept when the reply to waitid is here, also if nobody waits for it any more.
    status: Arc<OnceLock<WaitStatus>>,
}

/// What a child has in its parent as long as it lives.
pub(crate) struct Remains {
    pub(super) shares_memory: bool,
    /// The child has become persistent.
    outlives_its_parent: AtomicBool,
    stack: Mutex<Option<Stack>>,
    pub(super) lent: Arc<Lent>,
    ended: watch::Sender<bool>,
}

impl Remains {
    pub(super) fn new(shares_memory: bool, stack: Option<Stack>, lent: Arc<Lent>) -> Self {
        Self {
            shares_memory,
            outlives_its_parent: AtomicBool::new(false),
            stack: Mutex::new(stack),
            lent,
            ended: watch::Sender::new(false),
        }
    }

    /// The child uses its parent's memory no more: it has ended, or runs another program.
    pub(super) fn left_memory(&self) {
        let stack = self.stack.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Outside of the lock: dropping may unmap.
        drop(stack);
    }

    /// The child is persistent: its life does not depend on its parent's any more, and nobody here
    /// unmaps its memory.
    pub(crate) fn set_free(&self) {
        self.outlives_its_parent.store(true, Ordering::Release);
        self.leave_memory_mapped();
    }

    fn leave_memory_mapped(&self) {
        if let Some(stack) = self.stack.lock().unwrap_or_else(PoisonError::into_inner).take() {
            stack.leave();
        }
    }

    /// The child has ended: what it had in its parent is given back, and what it has left of its
    /// stream, with the number of the other end, is for the next one.
    pub(super) fn ended(&self, left: Option<(Socket, i32)>) {
        self.left_memory();
        self.lent.ended(left);
        self.ended.send_replace(true);
    }
}

/// A child that is not watched any more may still run on that memory.
impl Drop for Remains {
    fn drop(&mut self) {
        self.leave_memory_mapped();
    }
}

/// Watches over a child until it ends: then its calls fail, and what it had in its parent is given
/// back. The parent is kept until then. If the child shares its parent's table, `stream` is its end of
/// its stream.
pub(super) fn watch(
    pidfd: &Arc<OwnedFd>,
    connection: &Connection,
    parent: &Process,
    remains: &Arc<Remains>,
    stream: Option<i32>,
) -> Result<()> {
    let ends = readable(pidfd.clone())?;
    let mut parents_end = parent.end()?;
    let (connection, parent, remains) = (connection.downgrade(), parent.clone(), remains.clone());
    tokio::spawn(async move {
        tokio::select! {
            biased;
            _ = ends.readable() => {}
            Ok(_) = parents_end.wait_for(|ended| *ended) => {
                // The kernel sends the parent-death signal with the parent's rights, and they may
                // not have reached the child. This process's may.
                if !remains.outlives_its_parent.load(Ordering::Acquire) {
                    let _ = send_signal(ends.get_ref().as_raw_fd(), Signal::SIGKILL);
                }
            }
        }
        if ends.readable().await.is_err() {
            // The runtime is shutting down, and the child may live.
            return;
        }
        let leaves = stream.filter(|_| {
            !parent.is_persistent() && !remains.outlives_its_parent.load(Ordering::Acquire)
        });
        let left = connection.upgrade().and_then(|connection| match leaves {
            Some(number) => connection.retire().map(|left| (left, number)),
            None => {
                connection.process_died();
                None
            }
        });
        remains.ended(left);
        drop(parent);
    });
    Ok(())
}

/// Watches over a process that somebody else made: its calls fail when it ends.
pub(crate) fn watch_attached(pidfd: &Arc<OwnedFd>, connection: &Connection) -> Result<()> {
    let readable = readable(pidfd.clone())?;
    let mut changes = connection.subscribe();
    let connection = connection.downgrade();
    tokio::spawn(async move {
        // As long as there is a connection.
        let dropped = async { while changes.changed().await.is_ok() {} };
        tokio::select! {
            ended = readable.readable() => {
                if ended.is_ok() && let Some(connection) = connection.upgrade() {
                    connection.process_died();
                }
            }
            () = dropped => {}
        }
    });
    Ok(())
}

/// Reaps a child that has ended: waitid(2) in its parent, by its pid.
///
/// The pid is the child's until it is reaped, and its pidfd here says whether it has been, by
/// somebody's raw call or because the parent ignores SIGCHLD: then there is nothing to wait for,
/// and the pid may be another child's by now.
async fn reap(
    parent: &Process,
    pidfd: &OwnedFd,
    pid: i32,
    keep: Arc<OnceLock<WaitStatus>>,
) -> Result<Option<WaitStatus>> {
    // If another controller comes in between, the pid may be another child's by then.
    let parent = parent.in_this_tenure();
    if is_reaped(pidfd) {
        // What has reaped it may be a wait that was given up, whose reply is not here yet.
        parent.getpid().await?;
        return Err(Error::Call { call: "waitid", errno: Errno::ECHILD });
    }
    parent.reap(pid, keep).await
}

impl Process {
    /// Becomes true when the process has ended.
    fn end(&self) -> Result<watch::Receiver<bool>> {
        let inner = self.inner();
        if let Some(remains) = &inner.remains {
            return Ok(remains.ended.subscribe());
        }
        if let Some(end) = inner.end.get() {
            return Ok(end.clone());
        }
        // A duplicate: one descriptor can be waited for once.
        let pidfd = inner.pidfd.try_clone().map_err(Error::io("dup"))?;
        let ends = readable(Arc::new(pidfd))?;
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(async move {
            tokio::select! {
                ended = ends.readable() => {
                    sender.send_replace(ended.is_ok());
                }
                // Nobody depends on it any more.
                () = sender.closed() => {}
            }
        });
        // If another task was faster, its watch is as good.
        Ok(inner.end.get_or_init(|| receiver).clone())
    }
}

/// Something to wait on until the process behind a pidfd has ended.
pub(super) fn readable(pidfd: Arc<OwnedFd>) -> Result<AsyncFd<Shared>> {
    // SAFETY: the descriptor is owned by the `Arc` that is registered with it.
    let readable = unsafe { AsyncFd::register_with_interest(Shared(pidfd), Interest::READABLE) };
    readable.map_err(|error| Error::io("watching a pidfd")(error.into()))
}

fn send_signal(pidfd: i32, signal: Signal) -> Result<()> {
    // SAFETY: the call has no pointers: the siginfo is null.
    let sent = unsafe { syscall!(Sysno::pidfd_send_signal, pidfd, signal as i32, 0, 0) };
    sent.map(|_| ())
        .map_err(|errno| Error::local("pidfd_send_signal")(Errno::from_raw(errno.into_raw())))
}

/// Whether a process that has ended is no zombie any more either.
fn is_reaped(pidfd: &OwnedFd) -> bool {
    // SAFETY: the call has no pointers: the siginfo is null. And without a signal it only checks.
    let sent = unsafe { syscall!(Sysno::pidfd_send_signal, pidfd.as_raw_fd(), 0, 0, 0) };
    sent == Err(syscalls::Errno::ESRCH)
}

/// A pidfd that others hold too.
pub(super) struct Shared(Arc<OwnedFd>);

impl AsRawFd for Shared {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

impl std::ops::Deref for Child {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl std::fmt::Debug for Child {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Child").field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl Child {
    pub(super) fn new(process: Process, parent: Process, pid: i32) -> Self {
        Self { process, parent, pid, status: Arc::default() }
    }

    /// The process: a handle that can be cloned, and that does not wait.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The parent.
    #[must_use]
    pub fn parent(&self) -> &Process {
        &self.parent
    }

    /// Its pid in its parent's pid namespace, as clone(2) returned it.
    #[must_use]
    pub fn pid_in_parent(&self) -> i32 {
        self.pid
    }

    /// Waits until the child has ended, and reaps it: waitid(2) in the parent, once the pidfd says
    /// that there is something to reap, so that the parent is never blocked by it.
    ///
    /// # Errors
    ///
    /// ECHILD if somebody else has reaped it; [`Error::Gone`] if the parent has ended.
    pub async fn wait(&mut self) -> Result<WaitStatus> {
        if let Some(status) = self.status.get() {
            return Ok(*status);
        }
        self.ended().await;
        let pidfd = self.process.shared_pidfd();
        let reaped = reap(&self.parent, pidfd, self.pid, self.status.clone()).await;
        // An earlier wait that was given up may have reaped it: its reply came first.
        match self.status.get() {
            Some(status) => Ok(*status),
            None => reaped?.ok_or(Error::Protocol("a child that ended can't be reaped")),
        }
    }

    /// Waits until the child has ended, and leaves it to be reaped.
    pub async fn ended(&self) {
        if let Some(remains) = &self.process.inner().remains {
            // The sender lives in what `self` holds.
            let _ = remains.ended.subscribe().wait_for(|ended| *ended).await;
        }
    }

    /// Sends a signal to the child: pidfd_send_signal(2), from this process.
    ///
    /// # Errors
    ///
    /// ESRCH if it has been reaped; EPERM.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        send_signal(self.process.shared_pidfd().as_raw_fd(), signal)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // A persistent process's zombies are the next controller's to reap.
        if self.status.get().is_some()
            || self.parent.is_persistent()
            || self.process.is_persistent()
        {
            return;
        }
        let (Ok(runtime), Some(remains)) =
            (tokio::runtime::Handle::try_current(), self.process.inner().remains.clone())
        else {
            return;
        };
        let (parent, pid) = (self.parent.clone(), self.pid);
        let pidfd = self.process.shared_pidfd().clone();
        runtime.spawn(async move {
            let _ = remains.ended.subscribe().wait_for(|ended| *ended).await;
            // It may have been reaped by a raw call: then there is nothing to do.
            let _ = reap(&parent, &pidfd, pid, Arc::default()).await;
        });
    }
}

impl Process {
    /// Waits until the child with this pid (in the process's own pid namespace) has ended, and
    /// reaps it: for a child that an earlier controller made, or that the process got as a
    /// [subreaper](crate::calls::Task::set_child_subreaper). The process is never blocked by it. If this is
    /// dropped while it is under way, the next that waits in this controller is told the status.
    ///
    /// # Errors
    ///
    /// ECHILD if the process has no such child.
    pub async fn wait_for_child(&self, pid: i32) -> Result<WaitStatus> {
        match self.untold(pid) {
            Some(status) => Ok(status),
            None => self.adopt_child(pid).await?.wait().await,
        }
    }

    /// A pidfd, in the process, of its child.
    pub(crate) async fn open_child(&self, pid: i32) -> Result<Fd> {
        let call = Call::syscall(Sysno::pidfd_open, [pid as u64, 0, 0, 0, 0, 0]);
        self.opens("pidfd_open", call).await
    }
}
