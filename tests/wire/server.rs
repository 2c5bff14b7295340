//! Processes that run the image, and that die with the test whatever happens.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::stream::{LIMIT, Stream, until};

/// Held while a process is made. A file that is open for writing anywhere can't be executed, and a
/// child that another test is just making would have the image's file open.
pub fn making() -> MutexGuard<'static, ()> {
    static MAKING: Mutex<()> = Mutex::new(());
    MAKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Closes a descriptor when no child that is just being made has it too.
pub fn close_everywhere(fd: OwnedFd) {
    let _making = making();
    drop(fd);
}

/// The image as an executable file in a directory of its own.
pub struct Home {
    directory: TempDir,
}

impl Home {
    pub fn new() -> Self {
        let _making = making();
        let directory = tempfile::Builder::new().prefix("farcall-wire-").tempdir().unwrap();
        let image = directory.path().join("image");
        fs::write(&image, farcall::image::IMAGE).unwrap();
        fs::set_permissions(&image, fs::Permissions::from_mode(0o755)).unwrap();
        Self { directory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The image, to be executed without anything but its standard descriptors and, if given,
    /// descriptor 3.
    pub fn command(&self, third: Option<BorrowedFd<'_>>) -> Command {
        let mut command = Command::new(self.path("image"));
        isolate(&mut command, third);
        command
    }
}

/// What every process of these tests gets: an empty environment, nothing open but what it is
/// given, and death with the thread of its test.
///
/// `third` is used when the process is made: it must be open then.
pub fn isolate(command: &mut Command, third: Option<BorrowedFd<'_>>) {
    let third = third.map(|fd| fd.as_raw_fd());
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: between fork and execve only system calls are made, on plain numbers.
    unsafe {
        command.pre_exec(move || {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            if libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) != 0 {
                // Before Linux 5.11. What is not open can't be closed.
                for fd in 3..4096 {
                    libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
                }
            }
            match third {
                Some(3) => check(libc::fcntl(3, libc::F_SETFD, 0)),
                Some(fd) => check(libc::dup2(fd, 3)),
                None => Ok(()),
            }
        })
    };
}

/// The error of a system call that failed.
pub fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A pair of connected stream sockets.
pub fn sockets() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// A process, killed and reaped when this is dropped.
pub struct Running(pub Child);

impl Running {
    #[track_caller]
    pub fn start(command: &mut Command, what: &str) -> Self {
        let _making = making();
        Self(command.spawn().expect(what))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that runs the image.
pub struct Server {
    child: Running,
    pub home: Home,
}

impl Server {
    #[track_caller]
    pub fn start(home: Home, command: &mut Command) -> Self {
        Self { child: Running::start(command, "the image is executed"), home }
    }

    /// Serves on its standard input and output, which are pipes.
    pub fn on_pipes() -> (Self, Stream) {
        Self::on_pipes_with(None)
    }

    /// The same, with something as descriptor 3.
    pub fn on_pipes_with(third: Option<BorrowedFd<'_>>) -> (Self, Stream) {
        let home = Home::new();
        let mut command = home.command(third);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Self::with_its_pipes(home, &mut command)
    }

    pub fn with_its_pipes(home: Home, command: &mut Command) -> (Self, Stream) {
        let mut server = Self::start(home, command);
        let requests = server.child.0.stdin.take().unwrap().into();
        let results = server.child.0.stdout.take().unwrap().into();
        (server, Stream { results, requests })
    }

    /// Serves on a socket that is its standard input and output.
    pub fn on_a_socket() -> (Self, Stream) {
        let home = Home::new();
        let (ours, theirs) = sockets();
        let mut command = home.command(None);
        command.stdin(theirs.try_clone().unwrap()).stdout(theirs);
        let server = Self::start(home, &mut command);
        // The ends that the command has kept would keep the stream open.
        drop(command);
        (server, Stream { results: ours.try_clone().unwrap(), requests: ours })
    }

    pub fn pid(&self) -> i32 {
        self.child.0.id() as i32
    }

    /// Waits until the process has ended by itself.
    #[track_caller]
    pub fn status(&mut self) -> ExitStatus {
        until("the process ends", || self.child.0.try_wait().unwrap())
    }

    #[track_caller]
    pub fn exits_with(&mut self, code: i32) {
        let status = self.status();
        assert_eq!(status.code(), Some(code), "signal {:?}", status.signal());
    }

    /// Stops the process. It is stopped when this returns.
    #[track_caller]
    pub fn stop(&self) {
        let pid = Pid::from_raw(self.pid());
        kill(pid, Signal::SIGSTOP).unwrap();
        let status = waitpid(pid, Some(WaitPidFlag::WUNTRACED));
        assert_eq!(status, Ok(WaitStatus::Stopped(pid, Signal::SIGSTOP)));
    }

    /// Continues the process that was stopped.
    #[track_caller]
    pub fn go_on(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGCONT).unwrap();
    }

    #[track_caller]
    pub fn is_alive(&mut self) {
        assert_eq!(self.child.0.try_wait().unwrap(), None, "the process has ended");
    }

    /// What the process has open.
    pub fn fds(&self) -> Open {
        fds(self.pid())
    }
}

/// The descriptors of a process, and what they are open on.
pub type Open = BTreeMap<i32, PathBuf>;

/// What a process has open. What it closes meanwhile is left out.
pub fn fds(pid: i32) -> Open {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Open::new() };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let fd = entry.file_name().to_str()?.parse().ok()?;
            Some((fd, fs::read_link(entry.path()).ok()?))
        })
        .collect()
}

/// A persistent process, on a listening socket that the test has made.
pub struct Persistent {
    pub server: Server,
    pub path: PathBuf,
}

impl Persistent {
    pub fn new() -> Self {
        Self::changed(|_| {})
    }

    /// With something done to the command before.
    pub fn changed(change: impl FnOnce(&mut Command)) -> Self {
        let home = Home::new();
        let path = home.path("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut command = home.command(Some(listener.as_fd()));
        command.env("LISTEN_FDS", "1");
        change(&mut command);
        let server = Server::start(home, &mut command);
        Self { server, path }
    }

    /// Lets every user connect.
    pub fn open_to_all(&self) {
        let set = |path: &Path, mode: u32| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        set(self.server.home.directory(), 0o755);
        set(&self.path, 0o666);
    }

    /// Waits until the process has exactly these descriptors open, which are those it had before.
    #[track_caller]
    pub fn has_again(&mut self, before: &Open, what: &str) {
        self.settles(before, what, Open::clone);
    }

    /// The same for a detached process, the numbers of whose spare descriptors may be others.
    #[track_caller]
    pub fn is_detached_again(&mut self, before: &Open, what: &str) {
        self.settles(before, what, |open| {
            let listener = open.get(&3);
            let spare = |(fd, link): &(&i32, &PathBuf)| **fd != 3 && Some(*link) == listener;
            let spares = open.iter().filter(spare).count();
            let others = open.iter().filter(|entry| !spare(entry));
            let others = others.map(|(fd, link)| (*fd, link.clone()));
            others.chain([(-1, PathBuf::from(format!("{spares} spare")))]).collect()
        });
    }

    #[track_caller]
    fn settles(&mut self, before: &Open, what: &str, view: impl Fn(&Open) -> Open) {
        let end = Instant::now() + LIMIT;
        loop {
            let now = self.server.fds();
            if view(&now) == view(before) {
                break;
            }
            self.server.is_alive();
            assert!(Instant::now() < end, "after {what}: {now:?} are open, before {before:?}");
            std::thread::yield_now();
        }
        self.server.is_alive();
    }

    /// What it has open once it is detached: its standard descriptors, the listening socket and
    /// three spare ones.
    #[track_caller]
    pub fn fds_when_detached(&self) -> Open {
        until("the process waits", || Some(self.server.fds()).filter(|fds| fds.len() == 7))
    }
}
