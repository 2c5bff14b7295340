//! Processes that are driven from here: what they are made of, and their children.

mod adopted;
mod child;
mod children;
mod clone;
mod exec;
mod guard;
mod naming;
mod numbers;
mod overdue;
mod ring;
mod start;
mod tenure;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::libc;
use nix::sched::CloneFlags;
use nix::sys::socket::{setsockopt, sockopt};
use syscalls::{Sysno, syscall};
use tokio::sync::watch;

pub use adopted::AdoptedChild;
pub use child::Child;
pub(crate) use child::watch_attached;
pub use children::{ChildState, Children, ListedChild};
pub use clone::ChildBuilder;
pub(crate) use clone::{Extent, Legacy};
pub(crate) use overdue::{is_leaderless, threads};
pub(crate) use start::madvise;

use crate::abi::handshake::Token;
use crate::calls::arena::Arena;
use crate::calls::handle::{AddressSpace, FdTable};
use crate::calls::{Ends, Guardian, ServerFds, Task};
use crate::descriptor::{off_standard_streams, socketpair};
use crate::error::{Error, Outcome, Result, is_forbidden};
use crate::image::Loaded;
use crate::link::{Connection, DataSocket, Polling, Socket, to_the_end};
use crate::proto::batch::{Arg, Batch};
use crate::runtime;
use tenure::Tenures;

/// A process that a server runs in. Clones are the same process.
///
/// Its calls are the methods of [`Task`]. When the last clone is dropped the connection ends: an
/// ordinary process exits then, a persistent one waits for its next controller.
#[derive(Clone)]
pub struct Process {
    inner: Arc<Inner>,
    /// The tenure whose task it is about: see [`Process::in_this_tenure`].
    tenure: Option<usize>,
}

pub(crate) struct Inner {
    tenures: Tenures,
    image: Mutex<Loaded>,
    /// It may be another one than that by now.
    image_may_differ: AtomicBool,
    pidfd: Arc<OwnedFd>,
    /// See there; none in there if pids are not the same for the process and here.
    number: OnceLock<Option<u32>>,
    /// Tells the end of a process that no parent here made, once somebody depends on it.
    end: OnceLock<watch::Receiver<bool>>,
    /// What a child still has in its parent; none for a process that no parent here made.
    remains: Option<Arc<child::Remains>>,
    /// Ends the process with the last handle: a root server's.
    _life: Option<Box<dyn Send + Sync>>,
    persistent: AtomicBool,
    /// The controller that holds the process: one token for all of its handshakes.
    pub(crate) token: Token,
    /// Held while one reconnects: answers must be taken in the order in which they were given.
    pub(crate) reconnecting: Arc<tokio::sync::Mutex<()>>,
    /// What went wrong beside something that was done, and was not asked for yet.
    pub(crate) warnings: Mutex<Vec<crate::persist::Warning>>,
    /// Where a persistent process can be reached.
    pub(crate) place: Mutex<Option<Arc<crate::persist::Place>>>,
    untold: Arc<children::Untold>,
    /// Held while one waits to make a ring.
    entering: tokio::sync::Mutex<()>,
    /// Where this controller's rings are.
    rings: Mutex<BTreeSet<u64>>,
    /// How many controllers there had been when this one came to hold it, itself included.
    pub(crate) controllers: Arc<AtomicU64>,
    /// What the process had executed when this controller attached to it.
    pub(crate) before: OnceLock<crate::proto::log::Log>,
    pub(crate) polling: Option<Polling>,
    /// The memory that the program was started with: most children get no copy of it.
    pub(crate) initial_stack: OnceLock<Range<u64>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let place = self.place.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = place.take()
            && self.tenures.present().0.connection.is_connected()
        {
            // What can't be written down now is told by this process's own end.
            let _ = place.erase_holder();
        }
    }
}

/// What a [`Process`] is put together from.
pub(crate) struct Parts {
    pub(crate) connection: Connection,
    pub(crate) table: Arc<FdTable>,
    pub(crate) space: Arc<AddressSpace>,
    pub(crate) arena: Arena,
    /// None yet: it is made when it is first needed.
    pub(crate) data: Option<DataSocket>,
    pub(crate) guardian: Guardian,
    pub(crate) image: Loaded,
    pub(crate) fds: ServerFds,
    pub(crate) pidfd: Arc<OwnedFd>,
    /// The server runs in the main thread.
    pub(crate) leads: bool,
    pub(crate) remains: Option<Arc<child::Remains>>,
    pub(crate) life: Option<Box<dyn Send + Sync>>,
    pub(crate) token: Token,
    /// How many controllers there have been, this one included, if it was told.
    pub(crate) controllers: u64,
    /// How a ring is polled that the process gets when it is called often; none: it gets none.
    pub(crate) polling: Option<Polling>,
}

impl Deref for Process {
    type Target = Task;

    fn deref(&self) -> &Task {
        match self.tenure {
            None => self.inner.tenures.present().0,
            Some(number) => self.inner.tenures.at(number),
        }
    }
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process").field("pid", &self.pid()).finish_non_exhaustive()
    }
}

impl Process {
    pub(crate) fn new(parts: Parts) -> Self {
        let polling = parts.polling.filter(|_| parts.connection.version() > 0);
        let connection = parts.connection.clone();
        let (watched, leads) = (parts.pidfd.clone(), parts.leads);
        let lent = parts.remains.as_ref().map(|remains| remains.lent.clone());
        let ends = Ends::new(parts.table, parts.fds, parts.data, lent);
        let process = Self {
            inner: Arc::new(Inner {
                tenures: Tenures::new(Task::new(
                    &parts.connection,
                    parts.space,
                    parts.arena,
                    ends,
                    parts.guardian,
                )),
                image: Mutex::new(parts.image),
                image_may_differ: AtomicBool::new(false),
                number: OnceLock::new(),
                end: OnceLock::new(),
                pidfd: parts.pidfd,
                remains: parts.remains,
                _life: parts.life,
                persistent: AtomicBool::new(false),
                token: parts.token,
                reconnecting: Arc::default(),
                warnings: Mutex::default(),
                place: Mutex::new(None),
                untold: Arc::default(),
                entering: tokio::sync::Mutex::default(),
                rings: Mutex::default(),
                controllers: Arc::new(AtomicU64::new(parts.controllers)),
                before: OnceLock::new(),
                polling: parts.polling,
                initial_stack: OnceLock::new(),
            }),
            tenure: None,
        };
        let weak = || Arc::downgrade(&process.inner);
        connection.set_health_checks(overdue::watch(weak(), watched, leads));
        if let Some(polling) = polling {
            connection.when_busy(ring::when_busy(weak(), polling));
        }
        process
    }

    /// How often other controllers have held the process between two links of this one's, as far as
    /// [`Process::reconnect`] has found out: numbers of descriptors, addresses and pids from before it has
    /// grown may be something else's.
    #[must_use]
    pub fn tenure(&self) -> usize {
        self.tenure.unwrap_or_else(|| self.inner.tenures.present().1)
    }

    /// The same process, for what takes several calls: once another controller has held the process, the
    /// later ones of them are refused.
    pub(crate) fn in_this_tenure(&self) -> Self {
        Self { inner: self.inner.clone(), tenure: Some(self.tenure()) }
    }

    /// The same process, whoever has held it.
    fn in_any_tenure(&self) -> Self {
        Self { inner: self.inner.clone(), tenure: None }
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// The pid of the process as this process sees it, or `None` if it has been reaped or /proc is
    /// not mounted here.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        pid_of(&self.inner.pidfd)
    }

    /// The process as a pidfd of this process: see pidfd_open(2).
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.inner.pidfd)
    }

    /// Whether the process outlives its connections.
    #[must_use]
    pub fn is_persistent(&self) -> bool {
        self.inner.persistent.load(Ordering::Acquire)
    }

    /// Whether the process shares its memory with another one that is driven from here.
    #[must_use]
    pub fn shares_memory(&self) -> bool {
        self.inner.remains.as_ref().is_some_and(|remains| remains.shares_memory)
            || self.space.sharers() > 1
    }

    /// A child of this process, made by clone(2) when it is told to `spawn`.
    pub fn child(&self) -> ChildBuilder {
        ChildBuilder::new(self.clone())
    }

    /// Ends the process with a status: exit_group(2).
    ///
    /// # Errors
    ///
    /// [`Error::Gone`] if it has ended already.
    pub async fn exit(&self, status: i32) -> Result<()> {
        let call = self.connection.call_at_once("exit_group", crate::calls::exit_group(status));
        match call.await {
            // The result never comes: that is the success.
            Ok(_) | Err(Error::Lost(Outcome::PossiblyExecuted)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Gives the process what it shared until now: unshare(2) with CLONE_FILES, CLONE_FS or
    /// namespaces. CLONE_FILES alone is close_range(2) with CLOSE_RANGE_UNSHARE, which container
    /// runtimes allow where they forbid unshare(2); where there is no such call it is unshare(2).
    ///
    /// After CLONE_FILES the process has a copy of its table of descriptors: handles to the old
    /// one stay handles to the old one, and `inherited_fd` makes handles to the copies.
    ///
    /// # Errors
    ///
    /// The errno of unshare(2); a process that shares its memory can't have CLONE_NEWUSER.
    pub async fn unshare(&self, flags: CloneFlags) -> Result<()> {
        let process = self.in_this_tenure();
        // Where nobody here shares it, what the kernel copies, if anything, is all the same to us.
        if !flags.contains(CloneFlags::CLONE_FILES) || !process.table().is_shared() {
            return process.unshare_there(flags).await;
        }
        to_the_end(async move { process.leave_table(flags).await }).await
    }

    async fn unshare_there(&self, flags: CloneFlags) -> Result<()> {
        if flags == CloneFlags::CLONE_FILES {
            // No descriptor has that number: none is closed.
            let nothing = Arg::from(u64::from(u32::MAX));
            let mut batch = Batch::default();
            let unshare = u64::from(libc::CLOSE_RANGE_UNSHARE).into();
            batch.syscall(Sysno::close_range, [nothing, nothing, unshare]);
            match self.change(batch).await {
                Err(Error::Call { errno, .. }) if is_forbidden(errno) => {}
                done => return done,
            }
        }
        // The bits of the flags, as they are.
        let mut batch = Batch::default();
        batch.syscall(Sysno::unshare, [u64::from(flags.bits() as u32).into()]);
        self.change(batch).await
    }

    /// Gets a copy of a table that it shares.
    async fn leave_table(&self, flags: CloneFlags) -> Result<()> {
        let _settled = self.ends.settled().await;
        // No child may come into the old table between the copy and the look at it.
        let (old, quiet) = self.quiet_table().await;
        self.unshare_there(flags).await?;
        let mine = self.server_fds().all();
        let table = FdTable::new(&self.connection);
        table.reserve(mine.iter().copied());
        self.set_table(table.clone());
        // In the copy, other servers' descriptors would keep their connections open.
        table.close_later(old.reserved().difference(&mine).copied());
        // And in the old table, if somebody is left in it, this server's.
        old.leave(&self.connection);
        if !old.members().is_empty() {
            old.close_later(mine);
        }
        drop(quiet);
        if let Some(remains) = &self.inner.remains {
            remains.lent.left_table();
        }
        Ok(())
    }

    /// The descriptors that the server itself runs on: closing one of them by a raw call would end
    /// the connection, or make a persistent process unreachable. And those that are kept for children
    /// to come. [`Process::server_descriptors_taken_by`] says whether a call does.
    #[must_use]
    pub fn server_descriptors(&self) -> BTreeSet<i32> {
        let mut all = self.server_fds().all();
        all.extend(self.table().spares());
        all
    }

    pub(crate) fn image(&self) -> Loaded {
        *self.inner.image.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process may run another image, until that is said.
    pub(crate) fn lose_sight_of_image(&self) {
        self.inner.image_may_differ.store(true, Ordering::Relaxed);
    }

    pub(crate) fn image_may_differ(&self) -> bool {
        self.inner.image_may_differ.load(Ordering::Relaxed)
    }

    /// The process runs that image.
    pub(crate) fn set_image(&self, image: Loaded) {
        self.inner.image_may_differ.store(false, Ordering::Relaxed);
        *self.inner.image.lock().unwrap_or_else(PoisonError::into_inner) = image;
    }

    pub(crate) fn server_fds(&self) -> MutexGuard<'_, ServerFds> {
        self.inner.tenures.present().0.ends.fds()
    }

    /// Calls that begin from here on are made in `task`, with this `table`: see [`Tenures`].
    pub(crate) fn begin(&self, task: Task, table: Arc<FdTable>) {
        self.set_table(table);
        self.end_tenure();
        self.inner.tenures.begin(task);
    }

    pub(crate) fn set_persistent(&self) {
        self.connection.set_persistent();
        self.inner.persistent.store(true, Ordering::Release);
    }

    pub(crate) fn remains(&self) -> Option<&Arc<child::Remains>> {
        self.inner.remains.as_ref()
    }

    pub(crate) fn shared_pidfd(&self) -> &Arc<OwnedFd> {
        &self.inner.pidfd
    }
}

/// A new controller's token.
pub(crate) fn random_token() -> Result<Token> {
    let word = || getrandom::u64().map_err(|error| Error::io("random numbers")(error.into()));
    Ok(Token([word()?, word()?]))
}

/// A process as a pidfd of this process's.
pub(crate) fn pidfd_open(pid: u32) -> Result<OwnedFd> {
    // SAFETY: the call has no pointers.
    let fd = unsafe { syscall!(Sysno::pidfd_open, pid, 0) };
    let fd = fd.map_err(|errno| {
        Error::io(
            "pidfd_open (farcall needs Linux 5.9 or newer, and no seccomp filter that forbids it)",
        )(io::Error::from_raw_os_error(errno.into_raw()))
    })?;
    // SAFETY: the kernel just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    off_standard_streams(fd).map_err(Error::io("dup"))
}

/// The pid behind a pidfd, as /proc tells it.
pub(crate) fn pid_of(pidfd: &OwnedFd) -> Option<i32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    pid.trim().parse().ok().filter(|pid| *pid > 0)
}

/// A connected pair for a connection: the stream's ends, then the data socket's, ours first.
pub(crate) struct Sockets {
    pub(crate) stream: Socket,
    pub(crate) stream_there: OwnedFd,
    pub(crate) data: OwnedFd,
    pub(crate) data_there: OwnedFd,
}

/// Bytes that may be on their way in one direction: with the usual 208 KiB both sides wait for each
/// other five times a mebibyte, and much data comes a third slower.
const SEND_BUFFER: usize = 512 << 10;

/// A connected pair for a stream, our end first.
fn stream() -> Result<(Socket, OwnedFd)> {
    let (here, there) = small_stream()?;
    for end in [here.as_fd(), there.as_fd()] {
        // Only root may have more than net.core.wmem_max, and less does too.
        let _ = setsockopt(&end, sockopt::SndBufForce, &SEND_BUFFER)
            .or_else(|_| setsockopt(&end, sockopt::SndBuf, &SEND_BUFFER));
    }
    Ok((here, there))
}

/// The same for a few requests.
fn small_stream() -> Result<(Socket, OwnedFd)> {
    let make = || {
        let (here, there) = socketpair()?;
        Ok((Socket::new(here.into())?, there))
    };
    make().map_err(Error::io("socketpair"))
}

impl Sockets {
    pub(crate) fn new() -> Result<Self> {
        runtime::check()?;
        let (stream, stream_there) = stream()?;
        let (data, data_there) = socketpair().map_err(Error::io("socketpair"))?;
        Ok(Self { stream, stream_there, data, data_there })
    }
}
