//! Where one persistent process is: the path of its socket, and what is there.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::geteuid;

use super::directory::{Author, Directory, Pinned};
use super::listener::listens_at;
use super::target::Standing;
use crate::error::{Error, Result};

/// Where one persistent process can be reached: the path of its socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    socket: PathBuf,
}

impl Place {
    /// The process whose socket is at `path`.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { socket: path.into() }
    }

    /// The socket's path.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn state_path(&self) -> PathBuf {
        self.socket.with_extension("json")
    }

    /// The socket's name in its directory, and that of NAME.json.
    pub(super) fn file_names(&self) -> (OsString, OsString) {
        let name = |path: &Path| path.file_name().unwrap_or(OsStr::new("state")).to_owned();
        (name(&self.socket), name(&self.state_path()))
    }

    /// What the cgroup of the process with that pid is called.
    pub(super) fn cgroup_name(&self, pid: i32) -> String {
        let name = self.socket.file_stem().unwrap_or_default().to_string_lossy();
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
        let name: String = name.chars().map(plain).take(64).collect();
        format!("farcall-{name}-{pid}")
    }

    pub(super) fn directory(&self) -> io::Result<Directory> {
        Directory::open(self.parent())
    }

    pub(super) fn parent(&self) -> &Path {
        match self.socket.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    /// Whether a process of this network namespace listens at exactly this path, as the kernel
    /// tells it: nobody is connected to.
    #[must_use]
    pub fn is_listening(&self) -> bool {
        listens_at(&self.socket)
    }

    /// Whether somebody listens there, as a connection to it shows, which is closed at once: for places of
    /// which [`Place::is_listening`] says nothing, in another network namespace. `None` if it does not
    /// show it: the socket is another user's.
    #[must_use]
    pub fn accepts(&self) -> Option<bool> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None).ok()?;
        let connected = self.connect(&probe);
        match connected.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0))) {
            // Full, or connected.
            Ok(_) | Err(Errno::EAGAIN) => Some(true),
            Err(Errno::ECONNREFUSED | Errno::ENOENT | Errno::ENOTDIR) => Some(false),
            Err(_) => None,
        }
    }

    /// The socket.
    pub(super) fn socket_file(&self, directory: &Directory) -> io::Result<Pinned> {
        let file = directory.pin(&self.file_names().0)?;
        if file.is_socket() { Ok(file) } else { Err(io::Error::other("it is no socket")) }
    }

    /// The socket that is at this place, or if that was removed the one that a process has still.
    pub(super) fn look(&self) -> io::Result<Standing> {
        let standing = || {
            let directory = self.directory()?;
            let file = self.socket_file(&directory)?;
            let author = directory.author(file.stat());
            Ok(Standing { file, author, closed: directory.is_closed() })
        };
        match standing() {
            Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => {
                Ok(self.unlinked().ok_or(error)?.1)
            }
            standing => standing,
        }
    }

    /// Connects a socket to this place: to the socket that is looked at, whatever its name comes to mean.
    pub(super) fn connect(&self, client: &OwnedFd) -> io::Result<Standing> {
        let standing = self.look()?;
        // Others are told by the server whether it is theirs. Root may attach anywhere.
        if standing.author.is_none() && geteuid().is_root() {
            return Err(io::Error::other(
                "the socket belongs to another user than its directory, or has several names",
            ));
        }
        let trusted = standing.author == Some(Author::Trusted);
        connect_to(client, &standing.file, trusted.then_some(&self.socket))?;
        Ok(standing)
    }

    /// Whether somebody listens at a socket here: by connecting, which is as if nobody had come.
    pub(super) fn probe(&self, file: &Pinned) -> Result<(), Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect_to(&probe, file, Some(&self.socket))
    }

    pub(super) fn error(&self, error: &io::Error) -> Error {
        self.refuse(error.to_string())
    }

    pub(super) fn refuse(&self, reason: String) -> Error {
        Error::Home { path: self.socket.clone(), reason }
    }
}

/// Connects to a socket's file; where there is no /proc, to what lies at its path.
fn connect_to(client: &OwnedFd, file: &Pinned, path: Option<&PathBuf>) -> Result<(), Errno> {
    file.may_be_connected_to()?;
    let connect = |path: &Path| connect(client.as_raw_fd(), &UnixAddr::new(path)?);
    match (connect(&file.path()), path) {
        (Err(Errno::ENOENT), Some(path)) => connect(path),
        (connected, _) => connected,
    }
}
