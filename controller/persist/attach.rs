//! Attaching: a new controller that knows nothing but the path.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use syscalls::Sysno;
use tokio::time::timeout_at;

use super::meet::{Heard, Manner, deadline, holder_is_dead, meet, no_answer};
use super::place::Place;
use super::target::{Standing, Target};
use crate::abi::entry::{ENTRY_TABLE_OFFSET, ENTRY_TABLE_SIZE};
use crate::abi::wire::{AHEAD_SIZE, Operation, STREAM_VERSION};
use crate::calls::arena::{ARENA_SIZE, Arena};
use crate::calls::handle::{AddressSpace, FdTable};
use crate::calls::{Buffer, Guardian, ServerFds, last};
use crate::error::{Error, Result};
use crate::fault;
use crate::image::Loaded;
use crate::link::{Connection, DataSocket, Polling, Receipt};
use crate::process::{Parts, Process, Sockets, random_token, threads};
use crate::proto::handshake::Hold;
use crate::proto::{Call, Reply};

/// Where the arenas of attached processes lie: see [`arena_address`].
const ARENAS: u64 = 0x1000_0000_0000;

/// How long at least a server that has answered is given for what an attach asks of it then.
pub(super) const ONCE_ANSWERED: Duration = Duration::from_secs(1);

/// How to attach to a persistent process.
#[derive(Clone, Debug)]
#[must_use = "nothing happens before `to`"]
pub struct Attach {
    timeout: Duration,
    take_over: bool,
}

impl Default for Attach {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(10), take_over: false }
    }
}

/// Attaches to the persistent process at `place`, as a new controller: see [`Attach::to`].
///
/// # Errors
///
/// Those of [`Attach::to`].
pub async fn attach(place: Place) -> Result<Process> {
    Attach::default().to(place).await
}

impl Attach {
    /// Waits for at most that long until a server that is busy with its last controller's call
    /// answers, and as long again, and a second at least, for what is asked of it then. The default is ten
    /// seconds.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Takes the process over if another controller holds it, whether that one works, hangs, is
    /// stopped or can't be reached any more. A call that the process is blocked in is interrupted:
    /// it returns EINTR, of which only uninterruptible sleep keeps it.
    ///
    /// From then on nothing that the other controller does reaches the process: its stream is closed,
    /// and nobody looks into the memory that it shared. Its calls that were executed get their
    /// results; all others, those that waited in its queue included, fail with
    /// [`Error::Superseded`], which names this controller and says whether they were executed. So do
    /// calls that it makes later, until it has reconnected, which it can when this one is gone.
    pub fn take_over(mut self) -> Self {
        self.take_over = true;
        self
    }

    /// Attaches to the persistent process at `place`, as a new controller. The process's state is
    /// as the last controller left it; the descriptors of that controller's connection are closed.
    /// [`Process::log_before`] tells what was called last.
    ///
    /// # Errors
    ///
    /// [`Error::Held`] within a second if another controller holds it; [`Error::Attach`] if nobody
    /// listens there, it is another user's, or it does not answer in time.
    pub async fn to(self, place: Place) -> Result<Process> {
        let sockets = Sockets::new()?;
        let token = random_token()?;
        let how = Manner { take_over: self.take_over, ..Manner::again(token) };
        let Heard { hold, log, standing } = meet(&place, how, &sockets, self.timeout).await?;
        let Sockets { stream, data, stream_there, data_there } = sockets;
        // A copy here would hide the process's end from the connection.
        drop((stream_there, data_there));
        let connection = Connection::over(stream);
        let taken = taken(&place, hold)?;
        connection.begin(log.head.calls);
        let limit = self.timeout.max(ONCE_ANSWERED);
        // It has just answered. Who gives up here ends the connection, at once: whoever comes next finds the
        // process held by nobody.
        let looked =
            timeout_at(deadline(limit), look_around(&place, &connection, data, taken, standing))
                .await;
        let Found { table, image, arena, data, pidfd, here, leads, fds } =
            looked.unwrap_or_else(|_| Err(no_answer(&place))).inspect_err(|_| {
                connection.end_link(connection.epoch());
            })?;
        crate::process::watch_attached(&pidfd, &connection)?;
        let process = Process::new(Parts {
            space: AddressSpace::new(&connection),
            connection,
            table,
            arena,
            data: Some(data),
            guardian: Guardian::None,
            image,
            fds,
            pidfd,
            leads,
            remains: None,
            life: None,
            token,
            controllers: log.head.controllers,
            polling: Some(Polling::default()),
        });
        // Until here an end of the link was the end of the attempt.
        process.registry().told(&log.head);
        let _ = process.inner().before.set(log);
        process.set_persistent();
        process.warn_if_unlinked(&place);
        process.recorded(place.write_holder(here, process.connection().stream_inode()));
        process.set_place(place);
        fault::point("attach.attached");
        Ok(process)
    }
}

/// What a controller that attaches finds out and makes first.
struct Found {
    table: Arc<FdTable>,
    image: Loaded,
    arena: Arena,
    data: DataSocket,
    pidfd: Arc<OwnedFd>,
    here: Option<i32>,
    leads: bool,
    fds: ServerFds,
}

async fn look_around(
    place: &Place,
    connection: &Connection,
    data: OwnedFd,
    Taken { fds, pid, version }: Taken,
    standing: Option<Standing>,
) -> Result<Found> {
    connection.set_version(version);
    let table = FdTable::new(connection);
    table.reserve(fds.all());
    let image = find_image(connection).await?;
    let arena = map_arena(connection, pid).await?;
    fault::point("attach.mapped");
    if version < STREAM_VERSION {
        greet(connection, pid).await?;
    }
    let data = DataSocket::new(data, fds.data);
    let pidfd = match pidfd_of(connection, &data, &arena, pid).await {
        // No room in its table, which is no reason not to reach it: who made it wrote its pid down.
        Err(Error::Call { errno: Errno::EMFILE, .. }) => recorded(place)?,
        pidfd => pidfd?,
    };
    let pidfd = Arc::new(pidfd);
    let here = crate::process::pid_of(&pidfd);
    if let Some(standing) = standing {
        standing.admits(place, here)?;
    }
    let leads = leads(connection, here, pid).await?;
    Ok(Found { table, image, arena, data, pidfd, here, leads, fds })
}

/// Whether the server runs in the main thread of its process: it does in one that has no other, which
/// nobody has to ask it.
async fn leads(connection: &Connection, here: Option<i32>, pid: i32) -> Result<bool> {
    match here.and_then(threads) {
        Some(1) => Ok(true),
        None => Ok(false),
        Some(_) => {
            let gettid = Call::syscall(Sysno::gettid, [0; 6]);
            Ok(connection.call("gettid", gettid).await? == pid as u64)
        }
    }
}

/// What an answer tells that says that the process is ours.
pub(super) struct Taken {
    pub(super) fds: ServerFds,
    /// Its pid, in its own pid namespace.
    pub(super) pid: i32,
    /// The version in which the stream begins.
    pub(super) version: u32,
}

pub(super) fn taken(place: &Place, hold: Hold) -> Result<Taken> {
    match hold {
        Hold::Ours { fds: [stream, data], own, listener: [listen, file], pid, version, .. } => {
            let fds = ServerFds::new(stream, data);
            let fds = ServerFds { persistent: own, listen, file, ..fds };
            Ok(Taken { fds, pid, version })
        }
        Hold::Theirs { pid, since } => Err(held(place, pid, since)),
        Hold::Nobody { .. } => Err(refused(
            place,
            "the descriptors did not fit into the process's table: close some in it",
        )),
        Hold::Closed => Err(refused(
            place,
            "the server closed the handshake: you may not attach, it is none of farcall's, or \
             others come all the time",
        )),
        Hold::Refused(reason) => Err(refused(place, reason)),
    }
}

/// Who holds the process: the controller with that pid, or who has inherited its connection.
fn held(place: &Place, pid: Option<i32>, since: i64) -> Error {
    let heirs = if holder_is_dead(place, pid) { place.heirs() } else { Vec::new() };
    if heirs.is_empty() {
        Error::Held { pid, since: Some(since) }
    } else {
        Error::Inherited { pid, heirs }
    }
}

pub(super) fn refused(place: &Place, reason: impl Into<String>) -> Error {
    Error::Attach { path: place.socket().to_owned(), reason: reason.into() }
}

/// Where the image lies in the process, and its entries.
pub(super) async fn find_image(connection: &Connection) -> Result<Loaded> {
    let base = connection.submit(vec![image()], |replies| address(&replies)).await?;
    connection.submit(vec![table(base)], move |replies| loaded(base, &replies)).await
}

/// The same ahead of everything that is queued, in a pause of the caller's.
pub(super) async fn find_image_first(connection: &Connection) -> Result<Loaded> {
    let base = connection.submit_first(vec![image()], |replies| address(&replies)).await?;
    connection.submit_first(vec![table(base)], move |replies| loaded(base, &replies)).await
}

fn image() -> Call {
    Call::operation(Operation::Image, [0; 6])
}

fn address(replies: &[Reply]) -> Result<u64> {
    let reply = replies.first().ok_or(Error::Protocol("no reply"))?;
    reply.value().map_err(Error::call("IMAGE"))
}

fn table(base: u64) -> Call {
    Call::copy_out(base.wrapping_add(ENTRY_TABLE_OFFSET as u64), ENTRY_TABLE_SIZE)
}

fn loaded(base: u64, replies: &[Reply]) -> Result<Loaded> {
    let bytes = replies.first().and_then(|reply| reply.data.first_chunk());
    Loaded::foreign(base, bytes.ok_or(Error::ForeignImage { version: None })?)
}

/// A fresh arena, in place of an earlier controller's.
///
/// Each process has one address for it, by its pid: so that controllers that come and go do not
/// pile up arenas, and processes that share memory do not share one.
///
/// A process whose limits (RLIMIT_AS, RLIMIT_DATA) leave it no memory has that of the controller before, or
/// what was [reserved](reserve_arena): it is used as it is where it can't be replaced.
async fn map_arena(connection: &Connection, pid: i32) -> Result<Arena> {
    map_arena_by(pid, |name, call| connection.call(name, call)).await
}

/// The same ahead of everything that is queued, in a pause of the caller's.
pub(super) async fn map_arena_first(connection: &Connection, pid: i32) -> Result<Arena> {
    let first = |name, call| {
        let value = move |replies: Vec<Reply>| last(&replies)?.value().map_err(Error::call(name));
        connection.submit_first(vec![call], value)
    };
    map_arena_by(pid, first).await
}

async fn map_arena_by(
    pid: i32,
    make: impl Fn(&'static str, Call) -> Receipt<u64>,
) -> Result<Arena> {
    let address = arena_address(pid);
    match make("mmap", mmap(address, ARENA_SIZE)).await {
        Err(Error::Call { errno: Errno::ENOMEM, .. })
            if make("COPY", copy(address, ARENA_SIZE))
                .await
                .is_ok_and(|copied| copied == ARENA_SIZE as u64) => {}
        mapped => drop(mapped?),
    }
    Ok(Arena::new(address, ARENA_SIZE))
}

/// Maps now what the first attach will map its arena over. Until then it is addresses, and no memory.
pub(super) async fn reserve_arena(connection: &Connection, pid: i32) -> Result<()> {
    map(connection, arena_address(pid), ARENA_SIZE).await
}

/// Whether there is memory that can be read and written: it is copied onto itself.
fn copy(address: u64, size: usize) -> Call {
    Call::operation(Operation::Copy, [address, address, size as u64, 0, 0, 0])
}

/// Asks for the newest version of the stream, with memory behind the arena for it. The server
/// keeps that for all later connections.
async fn greet(connection: &Connection, pid: i32) -> Result<()> {
    let address = arena_address(pid) + ARENA_SIZE as u64;
    map(connection, address, AHEAD_SIZE).await?;
    connection.greet(STREAM_VERSION, address).await.map(drop)
}

async fn map(connection: &Connection, address: u64, size: usize) -> Result<()> {
    connection.call("mmap", mmap(address, size)).await.map(|_| ())
}

fn mmap(address: u64, size: usize) -> Call {
    let protection = (nix::libc::PROT_READ | nix::libc::PROT_WRITE) as u64;
    let flags = nix::libc::MAP_PRIVATE | nix::libc::MAP_ANONYMOUS | nix::libc::MAP_FIXED;
    let args = [address, size as u64, protection, flags as u64, u64::MAX, 0];
    Call::syscall(Sysno::mmap, args)
}

/// A range far below where the kernel maps things by itself and above where programs are linked.
fn arena_address(pid: i32) -> u64 {
    ARENAS + u64::from(pid.unsigned_abs()) * (2 * ARENA_SIZE as u64)
}

/// Where the images of upgrades lie, in turn: behind the arena and what is behind that. So what a
/// controller has left that died in the middle is in the next one's place.
pub(super) fn image_places(pid: i32) -> [u64; 2] {
    const { assert!(ARENA_SIZE + AHEAD_SIZE <= IMAGES && IMAGES + 2 * IMAGE_PLACE <= 2 * ARENA_SIZE) };
    let first = arena_address(pid) + IMAGES as u64;
    [first, first + IMAGE_PLACE as u64]
}

/// How far behind the arena's start they lie.
const IMAGES: usize = 96 * 1024;

/// The most bytes of an image: twice as many as this build's may have, for those to come.
pub(super) const IMAGE_PLACE: usize = 16 * 1024;

/// The process, as a pidfd here: it opens one on itself and passes it.
async fn pidfd_of(
    connection: &Connection,
    data: &DataSocket,
    arena: &Arena,
    pid: i32,
) -> Result<OwnedFd> {
    let args = [pid as u64, 0, 0, 0, 0, 0];
    let number =
        connection.call("pidfd_open", Call::syscall(Sysno::pidfd_open, args)).await? as i32;
    let buffer = arena.take(DataSocket::FETCH_SIZE).map(Buffer::Arena).ok_or(Error::Gone)?;
    let fetched = data.fetch(connection, buffer, number).await;
    let close = Call::syscall(Sysno::close, [number as u64, 0, 0, 0, 0, 0]);
    connection.call("close", close).await?;
    fetched
}

/// The process that NAME.json names, as a pidfd here.
fn recorded(place: &Place) -> Result<OwnedFd> {
    place.target().map(Target::into_pidfd).map_err(|error| match error {
        Error::Attach { reason, .. } => {
            refused(place, format!("its table of descriptors is full, and {reason}"))
        }
        error => error,
    })
}

/// For the compiler: the future of an attach can move between threads.
const _: fn() = || {
    fn is_send<F: Future + Send>(_: F) {}
    is_send(attach(Place::at("")));
};
