//! The process at a place, as one that signals may be sent to.
//!
//! In another user's directory NAME.json may name any process, and that user may have bound the socket
//! and let anybody listen. So root signals there with that user's rights, and only a process that is that
//! user's and has the socket. It is held by a pidfd from before it is looked at.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket, sockopt};
use nix::unistd::{Uid, geteuid, getuid};

use super::directory::{Author, Directory, Pinned};
use super::listener::has_listener;
use super::place::Place;
use super::record::Record;
use super::rights::as_user;
use crate::error::{Error, Result};
use crate::process::pidfd_open;

/// The process at a place, held by a pidfd, and on whose word it is the one that is meant: see
/// [`Place::target`].
#[derive(Debug)]
pub struct Target {
    place: Place,
    pid: i32,
    pidfd: OwnedFd,
    author: Author,
}

impl Target {
    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(1)
    }

    /// Sends it a signal. In another user's directory root does so with that user's rights. One that has
    /// ended gets none, which is no error.
    ///
    /// # Errors
    ///
    /// [`Error::Attach`] if it may not be sent one.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pidfd = self.pidfd.as_raw_fd();
        let send = move || {
            let number = signal as i32;
            // SAFETY: a null pointer stands for what kill(2) would send.
            let sent =
                unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, number, 0usize, 0) };
            if sent < 0 { Err(Errno::last()) } else { Ok(()) }
        };
        let (sent, rights) = match self.author {
            Author::Trusted => (send(), String::new()),
            Author::User(uid) => {
                // SAFETY: it makes one system call.
                (
                    unsafe { as_user(uid, Some(self.pidfd.as_fd()), send) },
                    format!(" with the rights of uid {uid}"),
                )
            }
        };
        match sent {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => {
                let reason = format!("{signal} to pid {}{rights}: {}", self.pid, errno.desc());
                Err(Error::Attach { path: self.place.socket().to_owned(), reason })
            }
        }
    }

    /// From here on the kernel signals the process for what arrives at a file, in the name of who may
    /// signal it: see fcntl(2), F_SETOWN. False: it does not.
    pub(super) fn becomes_owner_of(&self, file: &impl AsFd) -> nix::Result<bool> {
        let (number, pid) = (file.as_fd().as_raw_fd(), self.pid);
        let own = move || {
            // SAFETY: the command takes a number.
            Errno::result(unsafe { libc::fcntl(number, libc::F_SETOWN, pid) }).map(|_| ())
        };
        let ids = ids_of(self.pid);
        let has = |uid: Uid| uid.as_raw() != OVERFLOW && ids.contains(&uid.as_raw());
        let allowed = match self.author {
            Author::Trusted => {
                own()?;
                is_root_of_all() || has(geteuid()) || has(getuid())
            }
            Author::User(uid) => {
                // SAFETY: it makes one system call.
                unsafe { as_user(uid, Some(file.as_fd()), own) }?;
                has(uid)
            }
        };
        // Looked at afterwards: the pid was nobody else's.
        Ok(allowed && !self.has_ended())
    }

    pub(super) fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }
}

impl Place {
    /// The process at this place, for signals: the one that NAME.json names, or that listens there. In
    /// another user's directory it is only one that is that user's and has the socket.
    ///
    /// # Errors
    ///
    /// [`Error::Attach`] if it is not known which process that is.
    pub fn target(&self) -> Result<Target> {
        let connected = || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            self.connect(&client)?;
            Ok::<_, io::Error>(client)
        };
        self.target_or(|| self.target_behind(&connected().map_err(|error| error.to_string())?))
    }

    /// The same for who is connected already: another connection could take its turn.
    pub(super) fn target_of(&self, client: &impl AsFd) -> Result<Target> {
        self.target_or(|| self.target_behind(client))
    }

    fn target_or(&self, other: impl FnOnce() -> Result<Target, String>) -> Result<Target> {
        let target = || {
            let recorded = match self.directory() {
                Ok(directory) => self.recorded_target(&directory)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error.to_string()),
            };
            recorded.map_or_else(other, Ok)
        };
        target().map_err(|reason| Error::Attach { path: self.socket().to_owned(), reason })
    }

    /// The process that NAME.json names, if it does, and its pid means something here.
    fn recorded_target(&self, directory: &Directory) -> Result<Option<Target>, String> {
        let Some(Record { state, author, .. }) = self.record(directory) else { return Ok(None) };
        let (process, pid) = (state.process.clone(), state.process.pid);
        if !process.is_alive() {
            return Ok(None);
        }
        let Ok(pidfd) = pidfd_open(pid.unsigned_abs()) else { return Ok(None) };
        // Looked at while it is held: the pid is nobody else's then.
        if !process.is_alive() {
            return Ok(None);
        }
        let author = self.check(directory, pid, author)?;
        Ok(Some(Target { place: self.clone(), pid, pidfd, author }))
    }

    /// The process that listens, as the kernel tells who connects. Where another process called listen(2)
    /// for it that is not the one that has the socket.
    fn target_behind(&self, client: &impl AsFd) -> Result<Target, String> {
        let Standing { file, author, closed } = self.look().map_err(|error| error.to_string())?;
        let peer = getsockopt(client, sockopt::PeerCredentials).map_err(|e| e.to_string())?;
        let (pid, unknown) = (
            peer.pid(),
            "its pid is not known here: NAME.json is missing, or of another pid namespace",
        );
        if pid <= 0 {
            return Err(unknown.into());
        }
        let pidfd = pidfd_open(pid.unsigned_abs()).map_err(|_| unknown.to_owned())?;
        let author = author.ok_or(unknown)?;
        if !has_listener(pid, file.stat(), &self.file_names().0) {
            return Err(unknown.into());
        }
        if !closed && !author.may_speak_for(pid) {
            return Err(format!(
                "pid {pid} is said to be the process there, and is another user's"
            ));
        }
        let author = if closed { Author::Trusted } else { author };
        Ok(Target { place: self.clone(), pid, pidfd, author })
    }

    /// On whose word a process is the one at this place, if it can be: where others may have written what
    /// says so, it is theirs, or has the socket.
    fn check(&self, directory: &Directory, pid: i32, author: Author) -> Result<Author, String> {
        if author == Author::Trusted && directory.is_closed() {
            return Ok(author);
        }
        let socket = self.socket_file(directory).map_err(|error| error.to_string())?;
        let has_it = || has_listener(pid, socket.stat(), &self.file_names().0);
        if directory.is_closed() && has_it() {
            return Ok(Author::Trusted);
        }
        if !author.may_speak_for(pid) {
            return Err(format!(
                "pid {pid} is said to be the process there, and is another user's"
            ));
        }
        if !has_it() {
            return Err(format!(
                "pid {pid} is said to be the process there, and does not have that socket"
            ));
        }
        Ok(author)
    }
}

/// What is connected to.
pub(super) struct Standing {
    pub(super) file: Pinned,
    pub(super) author: Option<Author>,
    /// Nobody but this user and root may write in its directory.
    pub(super) closed: bool,
}

impl Standing {
    /// Whether its server can be the process that it says it is, by a pidfd: another user's may pass one of
    /// anybody's process, and root would signal that.
    pub(super) fn admits(&self, place: &Place, pid: Option<i32>) -> Result<()> {
        let may_be = |pid: i32| {
            let speaks = self.author.is_some_and(|author| author.may_speak_for(pid));
            speaks || self.closed && has_listener(pid, self.file.stat(), &place.file_names().0)
        };
        let any = !geteuid().is_root() || self.author == Some(Author::Trusted);
        if any || pid.is_some_and(may_be) {
            return Ok(());
        }
        Err(Error::Attach {
            path: place.socket().to_owned(),
            reason: "its server says that it is another process than one of its owner's".into(),
        })
    }
}

impl Author {
    /// Whether it can be true that a process is the one that this author says it is.
    pub(super) fn may_speak_for(self, pid: i32) -> bool {
        match self {
            Self::Trusted => true,
            Self::User(uid) => user_of(pid) == Some(uid.as_raw()),
        }
    }
}

/// The real user of a process.
pub(super) fn user_of(pid: i32) -> Option<u32> {
    ids_of(pid).first().copied()
}

/// Its real and its saved user, by which the kernel judges who may signal it.
fn ids_of(pid: i32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    uids.split_whitespace().step_by(2).take(2).filter_map(|uid| uid.parse().ok()).collect()
}

/// Stands for each user that has no id in this user namespace.
const OVERFLOW: u32 = 65_534;

/// Whether this process has the rights of root of the initial user namespace.
fn is_root_of_all() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    geteuid().is_root() && map.split_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown};
    use std::os::unix::net::UnixListener;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    #[test]
    fn a_users_server_is_no_process_of_anybody_elses() {
        assert!(geteuid().is_root(), "this test acts as two users: run it as root");
        const USER: u32 = 65_530;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("one.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let place = Place::at(&path);
        let mut process = Command::new("sleep").arg("1000").uid(USER).spawn().unwrap();
        let theirs = process.id() as i32;
        let stranger = std::process::id() as i32;
        let look = || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
            let standing = place.connect(&client).unwrap();
            [Some(stranger), Some(theirs), None].map(|pid| standing.admits(&place, pid).is_ok())
        };
        let before = look();
        let mode = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(directory.path(), mode).unwrap();
        chown(&path, Some(USER), None).unwrap();
        let after = look();
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(before, [true; 3], "root's own may be anything");
        assert_eq!(after, [false, true, false]);
    }
}
