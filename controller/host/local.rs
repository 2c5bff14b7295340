//! This machine: the root server, from which all other processes are made.
//!
//! The root server is a child of this process, started from a memfd, and dies with it: by the
//! parent-death signal, and by the end of its stream. That signal fires when the *thread* that made
//! the child exits, and the threads of a runtime come and go. So each root server is made by a thread
//! of its own, which stays as long as the server's handle does.
//!
//! A new thread has the namespaces, credentials, capabilities, seccomp filters and processors of the
//! thread that starts it. So a root server has those of the thread that asked for it, as with
//! `std::process::Command`, and not those of some other thread that had more.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{self, Command};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use syscalls::Sysno;

use crate::abi::wire::{AHEAD_SIZE, HelloResult, Operation, STREAM_VERSION};
use crate::calls::arena::{ARENA_SIZE, Arena};
use crate::calls::handle::{AddressSpace, FdTable, close_others};
use crate::calls::{Guardian, ServerFds, set_pdeathsig};
use crate::error::{Error, Result};
use crate::image;
use crate::image::{Carrier, Loaded};
use crate::link::{Connection, DataSocket, Polling};
use crate::process::{Parts, Process, Sockets, madvise, pidfd_open, random_token};
use crate::proto::Call;

/// What the descriptors 0, 1 and 2 of a root server are, and so of its children.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stdio {
    /// This process's own.
    #[default]
    Inherit,
    /// /dev/null.
    Null,
}

/// How a root server is started.
#[derive(Clone, Debug)]
#[must_use = "a root server is started by `start`"]
pub struct Local {
    stdio: Stdio,
    carrier: Carrier,
    stream_version: u32,
    polling: Option<Polling>,
}

impl Default for Local {
    fn default() -> Self {
        let (stdio, carrier) = (Stdio::default(), Carrier::default());
        let polling = Some(Polling::default());
        Self { stdio, carrier, stream_version: STREAM_VERSION, polling }
    }
}

/// The features that a server must have to be driven from here.
const NEEDED: u32 = HelloResult::COPY | HelloResult::SERVE | HelloResult::IMAGE;

impl Local {
    /// A root server with this process's standard streams.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses the standard streams.
    pub fn stdio(mut self, stdio: Stdio) -> Self {
        self.stdio = stdio;
        self
    }

    /// Chooses the highest version of the stream to speak, for this server and its children: with
    /// 0 each call is a round trip, as where the kernel does not let a server read ahead.
    pub fn stream_version(mut self, version: u32) -> Self {
        self.stream_version = version;
        self
    }

    /// Chooses how the controller and this server, and its children, wait for each other once they
    /// share memory, which they do after a number of calls. With `None` they never do: all calls take
    /// the stream.
    pub fn polling(mut self, polling: Option<Polling>) -> Self {
        self.polling = polling;
        self
    }

    /// Chooses what carries the image.
    pub fn carrier(mut self, carrier: Carrier) -> Self {
        self.carrier = carrier;
        self
    }

    /// Starts the root server. It dies with this process, and when the last handle to it or to one
    /// of its descendants is dropped.
    ///
    /// It has the namespaces, credentials, capabilities, no_new_privs and seccomp filters of the thread
    /// on which this future is first polled.
    ///
    /// # Errors
    ///
    /// Where the image can't be executed: no memfd may be, and no file in the directory for
    /// temporary files either.
    pub async fn start(self) -> Result<Process> {
        let sockets = Sockets::new()?;
        let child = execute(self.carrier, &sockets).await?;
        drop((sockets.stream_there, sockets.data_there));
        let pidfd = Arc::new(pidfd_open(child.pid)?);
        let connection = Connection::over(sockets.stream);
        let server = set_up(&connection, self.stream_version).await?;
        let table = FdTable::new(&connection);
        table.reserve(server.fds.all());
        let process = Process::new(Parts {
            space: AddressSpace::new(&connection),
            connection,
            table,
            arena: Arena::new(server.arena, ARENA_SIZE),
            data: Some(DataSocket::new(sockets.data, server.fds.data)),
            guardian: Guardian::Controller,
            image: server.image,
            fds: server.fds,
            pidfd,
            leads: true,
            remains: None,
            life: Some(Box::new(child)),
            token: random_token()?,
            controllers: 0,
            polling: self.polling,
        });
        streams(&process, self.stdio).await?;
        if process.connection().version() > 0
            && let Some(stack) = process.pid().and_then(initial_stack)
        {
            // Where that can't be had it is copied.
            drop(process.connection().call("madvise", madvise(&stack, nix::libc::MADV_DONTFORK)));
            let _ = process.inner().initial_stack.set(stack);
        }
        // Instead of that of the descriptor that it was executed from. Nothing depends on it.
        let name = c"farcall".to_bytes_with_nul().to_vec();
        let option = nix::libc::PR_SET_NAME as u64;
        let prctl = |name| Call::syscall(Sysno::prctl, [option, name, 0, 0, 0, 0]);
        let _ = process.call_with("prctl", name, prctl).await;
        Ok(process)
    }
}

/// The root server as this process's child: killed and reaped with the last handle.
struct RootChild {
    pid: u32,
    /// The thread that made the child ends it, and then itself, when the sender is dropped.
    maker: Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>,
}

impl RootChild {
    /// Starts the command on a thread that stays as long as the child may live.
    async fn spawn(mut command: Command) -> io::Result<Self> {
        let (done, started) = oneshot::async_channel();
        let (stays, gone) = mpsc::channel();
        let maker = thread::Builder::new().name("farcall-root".into()).spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => return drop(done.send(Err(error))),
            };
            // If nobody waits for it any more, `gone` says so at once.
            let _ = done.send(Ok(child.id()));
            let _ = gone.recv();
            // Both fail only if it has been reaped already.
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let pid = started.await.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))?;
        Ok(Self { pid, maker: Some((stays, maker)) })
    }
}

impl Drop for RootChild {
    fn drop(&mut self) {
        if let Some((stays, maker)) = self.maker.take() {
            drop(stays);
            // The child is gone when this returns. The thread does not panic.
            let _ = maker.join();
        }
    }
}

/// Starts the image from whatever carries it. A memfd can be made and then not be executed, where a
/// security module says so, and so can a file.
async fn execute(carrier: Carrier, sockets: &Sockets) -> Result<RootChild> {
    if carrier != Carrier::Automatic {
        return execute_from(carrier, sockets).await;
    }
    let memfd = match execute_from(Carrier::Memfd, sockets).await {
        Err(Error::Io { source, .. }) => source,
        result => return result,
    };
    match execute_from(Carrier::UnlinkedFile, sockets).await {
        Err(Error::Io { source: file, context }) => {
            Err(Error::Io { context, source: image::neither(&memfd, &file) })
        }
        result => result,
    }
}

/// Starts the image as a child of the thread that stays.
async fn execute_from(carrier: Carrier, sockets: &Sockets) -> Result<RootChild> {
    let image = image::executable(carrier).map_err(Error::io("making the server executable"))?;
    let clone = |fd: &OwnedFd| fd.try_clone().map_err(Error::io("dup"));
    let mut command = Command::new(format!("/proc/self/fd/{}", image.as_raw_fd()));
    command
        .arg0("farcall")
        .env_clear()
        .stdin(clone(&sockets.stream_there)?)
        .stdout(clone(&sockets.stream_there)?)
        .stderr(clone(&sockets.data_there)?);
    let child = RootChild::spawn(command).await;
    drop(image);
    child.map_err(Error::io("executing the server image through /proc/self/fd (is /proc mounted?)"))
}

/// Where the stack of process `pid` is on which its program was started, as /proc tells.
fn initial_stack(pid: i32) -> Option<Range<u64>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let line = maps.lines().find(|line| line.ends_with("[stack]"))?;
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let address = |digits| u64::from_str_radix(digits, 16).ok();
    Some(address(start)?..address(end)?)
}

struct SetUp {
    image: Loaded,
    arena: u64,
    fds: ServerFds,
}

/// Makes a server that was executed with its stream on 0 and 1 and its data socket on 2 a root
/// server: tied to this process, its own descriptors out of the way, nothing else open.
async fn set_up(connection: &Connection, version: u32) -> Result<SetUp> {
    let make = |name, number, args| connection.call(name, Call::syscall(number, args));
    let tied = connection.call("prctl", set_pdeathsig(nix::libc::SIGKILL));
    let parent = make("getppid", Sysno::getppid, [0; 6]);
    let image = connection.call("IMAGE", Call::operation(Operation::Image, [0; 6]));
    let protection = (nix::libc::PROT_READ | nix::libc::PROT_WRITE) as u64;
    let private = (nix::libc::MAP_PRIVATE | nix::libc::MAP_ANONYMOUS) as u64;
    let size = (AHEAD_SIZE + ARENA_SIZE) as u64;
    let arena = [0, size, protection, private, u64::MAX, 0];
    let arena = make("mmap", Sysno::mmap, arena);
    let command = nix::libc::F_DUPFD_CLOEXEC as u64;
    let stream = make("fcntl", Sysno::fcntl, [0, command, 3, 0, 0, 0]);
    let data = make("fcntl", Sysno::fcntl, [2, command, 3, 0, 0, 0]);
    tied.await?;
    let parent = parent.await?;
    if parent != u64::from(process::id()) && parent != 0 {
        return Err(Error::ParentDied);
    }
    let ahead = arena.await?;
    let arena = ahead + AHEAD_SIZE as u64;
    // What the server writes with every call is not copied for every child. Where that can't be had
    // it is.
    const { assert!(AHEAD_SIZE.is_multiple_of(4096)) };
    let dontfork = nix::libc::MADV_DONTFORK as u64;
    drop(make("madvise", Sysno::madvise, [ahead, AHEAD_SIZE as u64, dontfork, 0, 0, 0]));
    let hello = connection.greet(version, ahead).await?;
    if hello.features() & NEEDED != NEEDED {
        return Err(Error::Protocol("the image lacks operations of this build's"));
    }
    let image = Loaded::ours(image.await?);
    let (stream, data) = (stream.await?, data.await?);
    // All descriptors that this process lets its children inherit are closed; then the standard
    // streams are free for what they are for.
    let serve = Call::operation(
        Operation::Serve,
        [stream | stream << 32, data | u64::from(u32::MAX) << 32, 0, 0, 0, 0],
    );
    let served = connection.call("SERVE", serve);
    let (stream, data) = (stream as i32, data as i32);
    let others = close_others([stream, data].into());
    let closed: Vec<_> =
        others.into_iter().map(|call| connection.call("close_range", call)).collect();
    served.await?;
    for closed in closed {
        closed.await?;
    }
    Ok(SetUp { image, arena, fds: ServerFds::new(stream, data) })
}

/// Gives the root server its standard streams.
async fn streams(process: &Process, stdio: Stdio) -> Result<()> {
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(Error::io("opening /dev/null"))?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let ours = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    let fds: [BorrowedFd<'_>; 3] = match stdio {
        Stdio::Null => [null.as_fd(); 3],
        // One that is closed here can't be passed on.
        Stdio::Inherit => ours.map(|fd| {
            if nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).is_ok() {
                fd
            } else {
                null.as_fd()
            }
        }),
    };
    // 0, 1 and 2 are free: what is passed lands there, in order.
    for (number, fd) in (0..).zip(process.send_fds(&fds).await?) {
        if fd.number() == number {
            let _ = fd.into_raw();
            // Inherited across execve, as standard streams are.
            process.syscall(Sysno::fcntl, [number as u64, 2, 0, 0, 0, 0]).await?;
        } else {
            process.dup2(&fd, number).await?;
        }
    }
    Ok(())
}
