//! Attaching: a new controller that knows nothing but the path.

use std::future::Future;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, connect, getsockopt, sendmsg,
    socket, sockopt,
};
use nix::unistd::{Pid, geteuid};
use syscalls::Sysno;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::handshake::{self, Hold};
use super::home::{Incarnation, Place};
use crate::abi::entry::{ENTRY_TABLE_OFFSET, ENTRY_TABLE_SIZE};
use crate::abi::handshake::{ANSWER_SIZE, Token};
use crate::abi::wire::{AHEAD_SIZE, HelloResult, Operation, STREAM_VERSION};
use crate::call::{self, Call, Connection, Error, Polling, Result};
use crate::handle::{AddressSpace, FdTable};
use crate::image::Loaded;
use crate::memory::{ARENA_SIZE, Arena};
use crate::process::{Parts, Process, ServerFds, Sockets, pidfd_open, random_token};
use crate::sys::{Buffer, DataSocket, Guardian};

/// How long a server that does not answer is given before NAME.json is asked who holds it.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long to wait before the next try, where there is nothing to wait for.
pub(super) const PAUSE: Duration = Duration::from_millis(20);

/// Where the arenas of attached processes lie: see [`arena_address`].
const ARENAS: u64 = 0x1000_0000_0000;

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
    /// answers. The default is ten seconds.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Takes the process over if another controller holds it, whether that one works, hangs, is
    /// stopped or can't be reached any more. A call that the process is blocked in is interrupted:
    /// it returns EINTR, of which only uninterruptible sleep keeps it.
    ///
    /// From then on nothing that the other controller does reaches the process: its stream is closed,
    /// and nobody looks into the memory that it shared. Of a call that it had under way, it learns
    /// that it was possibly executed; when it reconnects, who holds the process now.
    pub fn take_over(mut self) -> Self {
        self.take_over = true;
        self
    }

    /// Attaches to the persistent process at `place`, as a new controller. The process's state is
    /// as the last controller left it; the descriptors of that controller's connection are closed.
    ///
    /// # Errors
    ///
    /// [`Error::Held`] within a second if another controller holds it; [`Error::Attach`] if nobody
    /// listens there, it is another user's, or it does not answer in time.
    pub async fn to(self, place: Place) -> Result<Process> {
        let sockets = Sockets::new()?;
        let token = random_token()?;
        let how = Manner { token, take_over: self.take_over };
        let hold = meet(&place, how, &sockets, self.timeout).await?;
        let Sockets { stream, data, stream_there, data_there } = sockets;
        // A copy here would hide the process's end from the connection.
        drop((stream_there, data_there));
        let connection = Connection::over(stream);
        let Taken { fds, pid, version, generation } = taken(&place, hold)?;
        connection.set_version(version);
        let table = FdTable::new(&connection);
        table.reserve(fds.all());
        let image = find_image(&connection).await?;
        let arena = map_arena(&connection, pid).await?;
        if version < STREAM_VERSION {
            greet(&connection, pid).await?;
        }
        let data = DataSocket::new(data, fds.data);
        let pidfd = match pidfd_of(&connection, &data, &arena, pid).await {
            // No room in its table, which is no reason not to reach it: who made it wrote its pid down.
            Err(Error::Call { errno: Errno::EMFILE, .. }) => recorded(&place)?,
            pidfd => pidfd?,
        };
        let pidfd = Arc::new(pidfd);
        crate::process::watch_attached(&pidfd, &connection)?;
        let here = crate::process::pid_of(&pidfd);
        let process = Process::new(Parts {
            space: AddressSpace::new(&connection),
            connection,
            table,
            arena,
            data,
            guardian: Guardian::None,
            image,
            fds,
            pidfd,
            remains: None,
            life: None,
            token,
            generation,
            polling: Some(Polling::default()),
        });
        // Until here an end of the link was the end of the attempt.
        process.set_persistent();
        place.write_holder(here)?;
        process.set_place(place);
        Ok(process)
    }
}

/// What an answer tells that says that the process is ours.
pub(super) struct Taken {
    pub(super) fds: ServerFds,
    /// Its pid, in its own pid namespace.
    pid: i32,
    /// The version in which the stream begins.
    pub(super) version: u32,
    /// How many connections it has had.
    pub(super) generation: u64,
}

pub(super) fn taken(place: &Place, hold: Hold) -> Result<Taken> {
    match hold {
        Hold::Ours { fds: [stream, data], own, pid, version, generation } => {
            let fds = ServerFds {
                input: stream,
                output: stream,
                data,
                persistent: own,
                ..ServerFds::default()
            };
            Ok(Taken { fds, pid, version, generation })
        }
        Hold::Theirs { pid, since } => Err(Error::Held { pid, since: Some(since) }),
        Hold::Refused(reason) => Err(refused(place, reason)),
    }
}

pub(super) fn refused(place: &Place, reason: impl Into<String>) -> Error {
    Error::Attach { path: place.socket().to_owned(), reason: reason.into() }
}

/// As whom to come, and how.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    pub(super) token: Token,
    /// Whoever else holds the process loses it.
    pub(super) take_over: bool,
}

impl Manner {
    /// As the controller that holds the process, or held it last.
    pub(super) fn again(token: Token) -> Self {
        Self { token, take_over: false }
    }
}

/// Connects, shakes hands, and waits for the answer. Somebody else's hold is returned as such only
/// if that somebody lives: a dead one's is about to end.
pub(super) async fn meet(
    place: &Place,
    how: Manner,
    sockets: &Sockets,
    timeout: Duration,
) -> Result<Hold> {
    let end = Instant::now() + timeout;
    loop {
        match meet_once(place, how, sockets, end).await? {
            Hold::Theirs { pid, .. } if holder_is_dead(place, pid) && Instant::now() < end => {
                sleep(PAUSE).await;
            }
            hold => return Ok(hold),
        }
    }
}

/// Whether the controller with that pid, by what NAME.json knows of it, has died.
fn holder_is_dead(place: &Place, pid: Option<i32>) -> bool {
    place
        .state()
        .and_then(|state| state.holder)
        .is_some_and(|holder| pid.is_none_or(|pid| pid == holder.pid) && !holder.is_alive())
}

async fn meet_once(place: &Place, how: Manner, sockets: &Sockets, end: Instant) -> Result<Hold> {
    let client = connect_to(place, end).await?;
    shake_hands(place, how, sockets, client, end).await
}

/// The handshake over a connected socket.
pub(super) async fn shake_hands(
    place: &Place,
    how: Manner,
    sockets: &Sockets,
    client: OwnedFd,
    end: Instant,
) -> Result<Hold> {
    let owner =
        getsockopt(&client, sockopt::PeerCredentials).map_err(Error::local("getsockopt"))?;
    if !geteuid().is_root() && owner.uid() != geteuid().as_raw() {
        return Err(refused(
            place,
            format!("it belongs to uid {}: only that user, or root, may attach", owner.uid()),
        ));
    }
    let fds = [sockets.stream_there.as_raw_fd(), sockets.data_there.as_raw_fd()];
    let hello = handshake::hello(how.token, how.take_over);
    // A fresh socket's buffer takes it as a whole.
    sendmsg::<()>(
        client.as_raw_fd(),
        &[IoSlice::new(&hello)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        None,
    )
    .map_err(Error::local("sendmsg"))?;
    let client = UnixStream::from_std(client.into()).map_err(Error::io("attaching"))?;
    let answer = read_answer(&client);
    tokio::pin!(answer);
    let patience = end.min(Instant::now() + PATIENCE);
    let answered = match timeout_at(patience, &mut answer).await {
        Ok(answered) => answered,
        Err(_) if how.take_over => {
            let answered = timeout_at(end, interrupting(place, &mut answer)).await;
            answered.map_err(|_| {
                refused(place, "no answer: the process is in a call that can't be interrupted")
            })?
        }
        Err(_) => {
            if let Some(state) = place.state()
                && let Some(holder) = state.holder
                && holder.is_alive()
                && holder.pid != std::process::id() as i32
            {
                return Ok(Hold::Theirs { pid: Some(holder.pid), since: state.since });
            }
            timeout_at(end, &mut answer).await.map_err(|_| {
                refused(place, "no answer: the process is blocked in a call of its last controller")
            })?
        }
    };
    match answered {
        Ok(bytes) => Ok(handshake::answer(&bytes)),
        Err(_) => Ok(Hold::Refused(
            "the server closed the handshake: you may not attach, it is none of farcall's, or \
             another client came at the same moment"
                .into(),
        )),
    }
}

/// Waits for the answer of a server that is blocked in a call of the controller before: interrupts
/// the call, until there is one.
///
/// The signal has a handler in a server, which does nothing: only the call returns. It may come just
/// before the call begins, so once is not enough.
async fn interrupting<T>(place: &Place, answer: &mut (impl Future<Output = T> + Unpin)) -> T {
    loop {
        let process = place.state().map(|state| state.process);
        if let Some(process) = process.filter(Incarnation::is_alive) {
            // Where that is not allowed, the call may end by itself.
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGPIPE);
        }
        if let Ok(answered) = timeout(PAUSE, &mut *answer).await {
            return answered;
        }
    }
}

async fn read_answer(stream: &UnixStream) -> io::Result<[u8; ANSWER_SIZE]> {
    let mut answer = [0; ANSWER_SIZE];
    let mut got = 0;
    while got < ANSWER_SIZE {
        stream.readable().await?;
        match stream.try_read(&mut answer[got..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(answer)
}

/// Connects to the listening socket. Its backlog may be full for a while.
async fn connect_to(place: &Place, end: Instant) -> Result<OwnedFd> {
    let (address, _directory) = place.address()?;
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(Error::local("socket"))?;
        let reason = match connect(client.as_raw_fd(), &address) {
            Ok(()) => return Ok(client),
            Err(Errno::EAGAIN) if Instant::now() < end => {
                sleep(PAUSE).await;
                continue;
            }
            Err(Errno::ENOENT) => "there is no such persistent process",
            Err(Errno::ECONNREFUSED) => "its process is gone",
            Err(Errno::EACCES) => "it is another user's",
            Err(Errno::EAGAIN) => "too many others wait to attach",
            Err(errno) => errno.desc(),
        };
        return Err(refused(place, reason));
    }
}

/// Where the image lies in the process, and its entries.
async fn find_image(connection: &Connection) -> Result<Loaded> {
    let base = connection.call("IMAGE", Call::operation(Operation::Image, [0; 6])).await?;
    let table = Call::copy_out(base + ENTRY_TABLE_OFFSET as u64, ENTRY_TABLE_SIZE);
    connection
        .submit(vec![table], move |replies| {
            let bytes = replies.first().and_then(|reply| reply.data.first_chunk());
            Loaded::foreign(base, bytes.ok_or(Error::ForeignImage { version: None })?)
        })
        .await
}

/// A fresh arena, in place of an earlier controller's.
///
/// Each process has one address for it, by its pid: so that controllers that come and go do not
/// pile up arenas, and processes that share memory do not share one.
async fn map_arena(connection: &Connection, pid: i32) -> Result<Arena> {
    let address = arena_address(pid);
    map(connection, address, ARENA_SIZE).await?;
    Ok(Arena::new(address, ARENA_SIZE))
}

/// Asks for the newest version of the stream, with memory behind the arena for it. The server
/// keeps that for all later connections.
async fn greet(connection: &Connection, pid: i32) -> Result<()> {
    let address = arena_address(pid) + ARENA_SIZE as u64;
    map(connection, address, AHEAD_SIZE).await?;
    let hello = connection.call("HELLO", call::hello(STREAM_VERSION, address)).await?;
    connection.set_version(HelloResult(hello.cast_signed()).version());
    Ok(())
}

async fn map(connection: &Connection, address: u64, size: usize) -> Result<()> {
    let protection = (nix::libc::PROT_READ | nix::libc::PROT_WRITE) as u64;
    let flags = nix::libc::MAP_PRIVATE | nix::libc::MAP_ANONYMOUS | nix::libc::MAP_FIXED;
    let args = [address, size as u64, protection, flags as u64, u64::MAX, 0];
    connection.call("mmap", Call::syscall(Sysno::mmap, args)).await.map(|_| ())
}

/// A range far below where the kernel maps things by itself and above where programs are linked.
fn arena_address(pid: i32) -> u64 {
    ARENAS + u64::from(pid.unsigned_abs()) * (2 * ARENA_SIZE as u64)
}

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
    let unknown = || {
        refused(
            place,
            "its table of descriptors is full, and no NAME.json says which process it is",
        )
    };
    let process = place.state().ok_or_else(unknown)?.process;
    let pidfd = pidfd_open(process.pid.unsigned_abs())?;
    // Looked at while it is held: its pid is nobody else's then.
    if process.is_alive() { Ok(pidfd) } else { Err(unknown()) }
}

/// For the compiler: the future of an attach can move between threads.
const _: fn() = || {
    fn is_send<F: Future + Send>(_: F) {}
    is_send(attach(Place::at("")));
};
