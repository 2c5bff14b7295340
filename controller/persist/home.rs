//! Where the sockets of persistent processes live: one directory a user, one socket a process.
//!
//! Beside `NAME.sock` lies `NAME.json`: a server that is blocked in a call can't say who holds it,
//! so every controller that attaches writes it down there.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::Flock;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::unistd::{Gid, Uid, geteuid};
use serde::{Deserialize, Serialize};

use super::cgroup::{self, OwnCgroups, Plan};
use super::directory::{Author, Directory, Pinned};
use super::incarnation::Incarnation;
use super::listener::{has_listener, listens_at};
use super::target::Standing;
use crate::call::{Error, Result};
use crate::descriptor::off_standard_streams;

/// The name of a persistent process: 1 to 64 letters, digits, `-`, `_` or `.`, not beginning with
/// `.` or `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if text.is_empty() || text.len() > 64 {
            return Err("a name has 1 to 64 characters".into());
        }
        if text.starts_with(['.', '-']) || !text.chars().all(allowed) {
            return Err(
                "a name has letters, digits, '-', '_' and '.', and begins with none of '.' and '-'"
                    .into(),
            );
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The directory of the sockets: `$FARCALL_DIR`, or `$XDG_RUNTIME_DIR/farcall`, or for root
/// `/run/farcall`.
#[derive(Clone, Debug)]
pub struct Home {
    path: PathBuf,
}

impl Home {
    /// This user's directory, which is not made before something is put there.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] where no variable says where it is and the user is not root.
    pub fn find() -> Result<Self> {
        let variable = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
        let path = if let Some(path) = variable("FARCALL_DIR") {
            path.into()
        } else if geteuid().is_root() {
            PathBuf::from("/run/farcall")
        } else if let Some(runtime) = variable("XDG_RUNTIME_DIR") {
            PathBuf::from(runtime).join("farcall")
        } else {
            return Err(Error::Home {
                path: "$XDG_RUNTIME_DIR/farcall".into(),
                reason: "there is no place for sockets: set XDG_RUNTIME_DIR or FARCALL_DIR".into(),
            });
        };
        Ok(Self { path })
    }

    /// A directory of the caller's choice.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the process of that name is.
    #[must_use]
    pub fn place(&self, name: &Name) -> Place {
        Place { socket: self.path.join(format!("{name}.sock")) }
    }

    /// All names that have a socket or a record here, or a process whose socket's file was removed, in order.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if the directory is there and can't be read.
    pub fn names(&self) -> Result<Vec<Name>> {
        let directory = match Directory::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(self.unlinked(&[])),
            directory => directory.map_err(|error| self.error(&error))?,
        };
        let files = directory.names().map_err(|error| self.error(&error))?;
        let mut names: Vec<Name> = files
            .iter()
            .filter_map(|file| file.to_str())
            .filter_map(|file| file.strip_suffix(".sock").or_else(|| file.strip_suffix(".json")))
            .filter_map(|name| name.parse().ok())
            .collect();
        names.sort();
        names.dedup();
        names.extend(self.unlinked(&names));
        names.sort();
        Ok(names)
    }

    /// Reserves a name for a process that is about to become persistent: makes the directory and
    /// binds the socket, on which nobody listens yet. What a dead process left there is replaced.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if the name is in use, or the directory is somebody else's or open to
    /// others.
    pub fn reserve(&self, name: &Name) -> Result<Reserved> {
        let directory = Directory::open_or_make(&self.path).map_err(|error| self.error(&error))?;
        if directory.owner() != geteuid() {
            return Err(self.refuse(format!("belongs to uid {}, not to you", directory.owner())));
        }
        if directory.mode() & 0o077 != 0 {
            return Err(self.refuse(self.open_to_others(&directory)));
        }
        self.place(name).reserve()
    }

    /// What to do about a directory that others may enter. Nobody is told to close one that others
    /// may need.
    fn open_to_others(&self, directory: &Directory) -> String {
        let mode = directory.mode();
        let ours = |file: &OsString| {
            let name = file.to_str().unwrap_or_default();
            name.ends_with(".sock") || name.ends_with(".json")
        };
        let own_make = mode & libc::S_ISVTX == 0
            && directory.names().is_ok_and(|all| !all.is_empty() && all.iter().all(ours));
        if own_make || self.path.file_name().is_some_and(|name| name == "farcall") {
            format!("has mode {mode:o}, which lets others in: chmod 700 it")
        } else {
            format!(
                "has mode {mode:o}, which lets others in: choose a directory of your own (one that \
                 does not exist is made, with mode 700)"
            )
        }
    }

    fn error(&self, error: &io::Error) -> Error {
        self.refuse(error.to_string())
    }

    fn refuse(&self, reason: String) -> Error {
        Error::Home { path: self.path.clone(), reason }
    }
}

/// Where one persistent process can be reached: the path of its socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    socket: PathBuf,
}

/// The process of a place that is reserved: none yet. No process has that pid.
const NONE_YET: Incarnation = Incarnation { pid: 0, start_time: 0, pid_ns: None };

/// How long others may keep the directory locked while this process wants to make or remove files.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// The same for NAME.json alone, which is advice.
const ADVICE_LIMIT: Duration = Duration::from_millis(500);

/// Bytes of a NAME.json that are read.
const STATE_SIZE: u64 = 64 * 1024;

/// What lies beside a socket, in NAME.json.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The process; its pid is 0 while the place is only reserved, by the holder.
    #[serde(flatten)]
    pub process: Incarnation,
    /// The controller that attached last, unless it detached in good order.
    pub holder: Option<Incarnation>,
    /// Since when that is so, in seconds since 1970.
    pub since: i64,
    /// The cgroups that were made for the process, as paths of directories.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cgroups: Vec<PathBuf>,
    /// The inode of the holder's end of the connection: by that a process is found that has inherited
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<u64>,
}

/// For so many seconds one who is in another pid namespace is believed to be starting a process.
const STARTING: i64 = 60;

impl State {
    /// Whether a controller that lives is about to start a process here.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        self.process == NONE_YET && self.is_being_made()
    }

    /// Whether its holder may still let the process listen.
    fn is_being_made(&self) -> bool {
        // The clock may have been set back.
        let recent = (0..STARTING).contains(&(now() - self.since));
        self.holder.as_ref().is_some_and(|holder| holder.judge().unwrap_or(recent))
    }
}

/// A NAME.json.
pub(super) struct Record {
    pub(super) state: State,
    pub(super) author: Author,
    /// The user whose file it is.
    owner: u32,
}

impl Record {
    fn remove_cgroups(&self) -> Result<()> {
        cgroup::remove(&self.state.cgroups, self.author, self.owner)
    }
}

/// The files of a place as they were at one look: see [`Place::files`].
#[derive(Debug)]
pub struct Files {
    place: Place,
    socket: Option<Pinned>,
    state: Option<State>,
}

impl Files {
    /// Whether there were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.socket.is_none() && self.state.is_none()
    }

    /// Whether there was something in the socket's place.
    #[must_use]
    pub fn has_socket(&self) -> bool {
        self.socket.is_some()
    }

    /// What NAME.json said.
    #[must_use]
    pub fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// Whether there is a socket on which nobody listens.
    #[must_use]
    pub fn is_left_behind(&self) -> bool {
        let socket = self.socket.as_ref().filter(|socket| socket.is_socket());
        socket.is_some_and(|socket| probe(socket) == Err(Errno::ECONNREFUSED))
    }

    /// Removes the socket, what lies beside it, and the cgroups that were made for the process, which
    /// is gone. Where another process has taken the place meanwhile, all stays.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] if somebody is in its cgroup still, and then all stays;
    /// [`Error::Home`] if a file is there and can't be removed.
    pub fn remove(&self) -> Result<()> {
        let place = &self.place;
        let directory = match place.directory() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            directory => directory.map_err(|error| place.error(&error))?,
        };
        let lock = directory.lock(LOCK_LIMIT).map_err(|error| place.error(&error))?;
        self.remove_under(&directory, &lock)
    }

    fn remove_under(&self, directory: &Directory, _lock: &Flock<OwnedFd>) -> Result<()> {
        let now = self.place.files_in(directory)?;
        let same = match (&self.socket, &now.socket) {
            (Some(then), Some(now)) => then.is_same(now),
            (_, None) => now.state.is_none() || self.is_of(&now),
            (None, Some(_)) => false,
        };
        if !same {
            return Ok(());
        }
        if let Some(record) = self.place.record(directory) {
            record.remove_cgroups()?;
        }
        let (socket, state) = self.place.file_names();
        for (name, path) in [(socket, self.place.socket.clone()), (state, self.place.state_path())]
        {
            directory
                .remove(&name)
                .map_err(|error| Error::Home { path, reason: error.to_string() })?;
        }
        Ok(())
    }

    /// Whether both are about the same process.
    fn is_of(&self, other: &Self) -> bool {
        let process = |files: &Self| files.state.as_ref().map(|state| state.process.clone());
        process(self) == process(other)
    }
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

    fn state_path(&self) -> PathBuf {
        self.socket.with_extension("json")
    }

    /// The socket's name in its directory, and that of NAME.json.
    pub(super) fn file_names(&self) -> (OsString, OsString) {
        let name = |path: &Path| path.file_name().unwrap_or(OsStr::new("state")).to_owned();
        (name(&self.socket), name(&self.state_path()))
    }

    /// What the cgroup of the process with that pid is called.
    fn cgroup_name(&self, pid: i32) -> String {
        let name = self.socket.file_stem().unwrap_or_default().to_string_lossy();
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
        let name: String = name.chars().map(plain).take(64).collect();
        format!("farcall-{name}-{pid}")
    }

    pub(super) fn directory(&self) -> io::Result<Directory> {
        Directory::open(self.parent())
    }

    fn parent(&self) -> &Path {
        match self.socket.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    /// What NAME.json says, if it is there, can be read, and its author's word counts.
    #[must_use]
    pub fn state(&self) -> Option<State> {
        Some(self.record(&self.directory().ok()?)?.state)
    }

    /// Removes all at this place, if this is still its socket.
    fn remove_own(&self, socket: &Pinned, left: Left) -> Result<()> {
        let directory = self.directory().map_err(|error| self.error(&error))?;
        let lock = directory.lock(LOCK_LIMIT).map_err(|error| self.error(&error))?;
        let files = self.files_in(&directory)?;
        if !files.socket.as_ref().is_some_and(|now| now.is_same(socket)) {
            return Ok(());
        }
        match left {
            Left::Everything => files.remove_under(&directory, &lock),
            Left::SocketAlone => {
                directory.remove(&self.file_names().0).map_err(|error| self.error(&error))
            }
        }
    }

    pub(super) fn record(&self, directory: &Directory) -> Option<Record> {
        let (text, stat) = directory.read(&self.file_names().1, STATE_SIZE).ok()?;
        let author = directory.author(&stat)?;
        let state: State = serde_json::from_slice(&text).ok()?;
        // Nobody says anything about others' processes.
        let pid = state.process.pid;
        if !author.may_speak_for(pid) && state.process.is_alive() {
            let socket = self.socket_file(directory).ok()?;
            let has_it = has_listener(pid, socket.stat(), &self.file_names().0);
            return (directory.is_closed() && has_it).then_some(Record {
                state,
                author: Author::Trusted,
                owner: stat.st_uid,
            });
        }
        Some(Record { state, author, owner: stat.st_uid })
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

    /// Writes NAME.json, as a whole or not at all.
    fn write_state(&self, directory: &Directory, state: &State) -> Result<()> {
        let mut text = serde_json::to_vec(state).map_err(|error| self.refuse(error.to_string()))?;
        text.push(b'\n');
        let (socket, name) = self.file_names();
        // Root that attaches to a user's process leaves the user something to read.
        let owner = geteuid()
            .is_root()
            .then(|| directory.pin(&socket).ok())
            .flatten()
            .map(|socket| (socket.stat().st_uid, socket.stat().st_gid))
            .map(|(uid, gid)| (Uid::from_raw(uid), Gid::from_raw(gid)));
        directory
            .write(&name, &text, owner)
            .map_err(|error| Error::Home { path: self.state_path(), reason: error.to_string() })
    }

    /// Replaces NAME.json, if `change` makes another one of it; nobody does so at the same time.
    fn update_state(&self, change: impl FnOnce(Option<State>) -> Option<State>) -> Result<()> {
        let locked = || {
            let directory = self.directory()?;
            let lock = directory.lock(ADVICE_LIMIT)?;
            Ok((directory, lock))
        };
        let (directory, _lock) = match locked() {
            // It was removed, which is told otherwise.
            Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => return Ok(()),
            locked => locked.map_err(|error| Error::Home {
                path: self.state_path(),
                reason: error.to_string(),
            })?,
        };
        let before = self.record(&directory).map(|record| record.state);
        match change(before) {
            Some(state) => self.write_state(&directory, &state),
            None => Ok(()),
        }
    }

    /// Writes down that this process holds the one at this place, whose pid is given where it is
    /// known, with the socket of that inode. Where neither the pid nor an earlier NAME.json tells which
    /// process it is, nothing is written.
    pub(crate) fn write_holder(&self, pid: Option<i32>, connection: Option<u64>) -> Result<()> {
        self.update_state(|before| {
            let cgroups = before.as_ref().map(|state| state.cgroups.clone()).unwrap_or_default();
            let process = pid.and_then(Incarnation::of).or_else(|| Some(before?.process))?;
            let holder = Incarnation::of(std::process::id() as i32);
            Some(State { process, holder, since: now(), cgroups, connection })
        })
    }

    /// Writes down which cgroups are about to be made for the process.
    fn write_cgroups(&self, process: Incarnation, cgroups: Vec<PathBuf>) -> Result<()> {
        let holder = Incarnation::of(std::process::id() as i32);
        self.update_state(|_| {
            Some(State { process, holder, since: now(), cgroups, connection: None })
        })
    }

    /// Writes down that nobody holds it, unless somebody else does by now.
    pub(crate) fn erase_holder(&self) -> Result<()> {
        self.update_state(|before| {
            let state = before?;
            let own = state.holder == Incarnation::of(std::process::id() as i32);
            own.then(|| State { holder: None, connection: None, since: now(), ..state })
        })
    }

    /// Removes the cgroups that were made for the process: it is gone. Where there are none, nothing
    /// is done.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] if one of them can't be removed: processes are in it.
    pub fn remove_cgroups(&self) -> Result<()> {
        let record = self.directory().ok().and_then(|directory| self.record(&directory));
        record.map_or(Ok(()), |record| record.remove_cgroups())
    }

    /// The files that lie at this place now: what is removed of them later is none that others have
    /// put there meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if the directory can't be looked into.
    pub fn files(&self) -> Result<Files> {
        let found = match self.directory() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            directory => Some(directory.map_err(|error| self.error(&error))?),
        };
        let place = self.clone();
        let Some(directory) = found else { return Ok(Files { place, socket: None, state: None }) };
        self.files_in(&directory)
    }

    fn files_in(&self, directory: &Directory) -> Result<Files> {
        let socket = match directory.pin(&self.file_names().0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            socket => Some(socket.map_err(|error| self.error(&error))?),
        };
        let state = self.record(directory).map(|record| record.state);
        Ok(Files { place: self.clone(), socket, state })
    }

    /// Removes the socket, what lies beside it, and the cgroups that were made for the process: it
    /// is gone.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] if somebody is in its cgroup still, and then all stays;
    /// [`Error::Home`] if a file is there and can't be removed.
    pub fn remove(&self) -> Result<()> {
        self.files()?.remove()
    }

    /// The socket.
    pub(super) fn socket_file(&self, directory: &Directory) -> io::Result<Pinned> {
        let file = directory.pin(&self.file_names().0)?;
        if file.is_socket() { Ok(file) } else { Err(io::Error::other("it is no socket")) }
    }

    /// Connects a socket to this place: to a socket of the directory's, whatever its name comes to
    /// mean, or if that was removed to the one that a process has still.
    pub(super) fn connect(&self, client: &OwnedFd) -> io::Result<Standing> {
        let standing = || {
            let directory = self.directory()?;
            let file = self.socket_file(&directory)?;
            let author = directory.author(file.stat());
            Ok(Standing { file, author, closed: directory.is_closed() })
        };
        let Standing { file, author, closed } = match standing() {
            Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => {
                self.unlinked().ok_or(error)?.1
            }
            standing => standing?,
        };
        // Others are told by the server whether it is theirs. Root may attach anywhere.
        if author.is_none() && geteuid().is_root() {
            return Err(io::Error::other(
                "the socket belongs to another user than its directory, or has several names",
            ));
        }
        let connect = |path: &Path| -> Result<(), Errno> {
            connect(client.as_raw_fd(), &UnixAddr::new(path)?)
        };
        match connect(&file.path()) {
            // Without /proc there is the path alone.
            Err(Errno::ENOENT) if author == Some(Author::Trusted) => connect(&self.socket)?,
            connected => connected?,
        }
        Ok(Standing { file, author, closed })
    }

    /// Binds the socket; see [`Home::reserve`].
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if a live process listens there, or the directory can't be written.
    pub fn reserve(self) -> Result<Reserved> {
        let directory = self.directory().map_err(|error| self.error(&error))?;
        let lock = directory.lock(LOCK_LIMIT).map_err(|error| self.error(&error))?;
        self.replace_stale(&directory, &lock)?;
        let reserved = self.bind(&directory, Left::Everything)?;
        // As long as this process lives, nobody takes the place for one that was left behind.
        let holder = Incarnation::of(std::process::id() as i32);
        let (process, cgroups) = (NONE_YET, Vec::new());
        let state = State { process, holder, since: now(), cgroups, connection: None };
        let written = reserved.place.write_state(&directory, &state);
        // Giving the place up takes it as well.
        drop(lock);
        written.map(|()| reserved)
    }

    fn bind(self, directory: &Directory, left: Left) -> Result<Reserved> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Non-blocking: the server must not wait in accept for a client that has gone again.
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(Error::local("socket"))?;
        let fd = off_standard_streams(fd).map_err(Error::io("dup"))?;
        let name = self.file_names().0;
        let address = UnixAddr::new(&self.socket)
            .or_else(|_| UnixAddr::new(&directory.short_path(&name)))
            .map_err(|_| self.refuse("the file name is too long for a socket".into()))?;
        bind(fd.as_raw_fd(), &address).map_err(|errno| self.error(&errno.into()))?;
        let socket = directory.pin(&name).map_err(|error| self.error(&error))?;
        // Nobody can connect before listen(2): so nobody gets in before the mode is right.
        if let Err(error) = socket.set_mode(0o600) {
            let _ = directory.remove(&name);
            return Err(self.error(&error));
        }
        Ok(Reserved { place: self, listener: Some(fd), cgroup: None, socket, left })
    }

    /// Binds a socket in the place of one that was removed, with the directory if that is gone as well.
    pub(super) fn bind_anew(&self) -> Result<Reserved> {
        let directory =
            Directory::open_or_make(self.parent()).map_err(|error| self.error(&error))?;
        if directory.owner() != geteuid() {
            let owner = directory.owner();
            return Err(
                self.refuse(format!("the directory is uid {owner}'s: that user restores it"))
            );
        }
        let _lock = directory.lock(LOCK_LIMIT).map_err(|error| self.error(&error))?;
        let files = self.files_in(&directory)?;
        if files.is_left_behind() {
            // Of another process of that name, which is dead.
            directory.remove(&self.file_names().0).map_err(|error| self.error(&error))?;
        } else if files.has_socket() {
            return Err(self.refuse("there is a socket already".into()));
        }
        self.clone().bind(&directory, Left::SocketAlone)
    }

    /// Removes what a dead process left, or says that it is not dead.
    fn replace_stale(&self, directory: &Directory, lock: &Flock<OwnedFd>) -> Result<()> {
        let files = self.files_in(directory)?;
        let Some(socket) = &files.socket else {
            return match self.served_unlinked() {
                Some(pid) => Err(self.refuse(format!(
                    "a live process (pid {pid}) has that name, and its socket was removed: `farcall \
                     restore` makes it anew, `farcall stop` ends the process"
                ))),
                None => files.remove_under(directory, lock),
            };
        };
        let being_made = files
            .state
            .as_ref()
            .is_some_and(|state| !state.process.is_gone() && state.is_being_made());
        if !socket.is_socket() {
            return Err(self.refuse("in the way, and no socket".into()));
        }
        match probe(socket) {
            Err(Errno::ECONNREFUSED) if !being_made => files.remove_under(directory, lock),
            // Full, or connected: somebody listens.
            Ok(()) | Err(Errno::EAGAIN | Errno::ECONNREFUSED) => {
                if let Some(State { process: NONE_YET, holder: Some(holder), .. }) = &files.state {
                    let reason = format!("pid {} has reserved it: choose another name", holder.pid);
                    return Err(self.refuse(reason));
                }
                let pid = files.state.map(|state| format!(" (pid {})", state.process.pid));
                Err(self.refuse(format!(
                    "a live process{} listens there: choose another name, or `farcall stop` it",
                    pid.unwrap_or_default()
                )))
            }
            Err(errno) => {
                Err(self.refuse(format!("in the way, and can't be connected to: {errno}")))
            }
        }
    }

    fn error(&self, error: &io::Error) -> Error {
        self.refuse(error.to_string())
    }

    fn refuse(&self, reason: String) -> Error {
        Error::Home { path: self.socket.clone(), reason }
    }
}

/// Whether somebody listens at a socket: by connecting, which is as if nobody had come.
fn probe(socket_file: &Pinned) -> Result<(), Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(probe.as_raw_fd(), &UnixAddr::new(&socket_file.path())?)
}

/// Seconds since 1970.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64)
}

/// A place with a socket on which nobody listens yet. It is removed again unless a process becomes
/// persistent there.
#[derive(Debug)]
pub struct Reserved {
    place: Place,
    listener: Option<OwnedFd>,
    /// Whether the process is to get a cgroup of its own.
    cgroup: Option<CgroupName>,
    /// The file.
    socket: Pinned,
    /// What is removed if no process becomes persistent there.
    left: Left,
}

/// What a reservation that comes to nothing takes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Everything,
    /// The rest belongs to a process that lives.
    SocketAlone,
}

/// What a cgroup is to be called; otherwise its name tells whose it is.
#[derive(Clone, Debug)]
struct CgroupName(Option<Name>);

impl Reserved {
    /// The place.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The process gets a cgroup of its own when it becomes persistent, so that it outlives the
    /// clean-up of the cgroup that it was in, as service managers and batch systems do it. The limits
    /// of that one hold for it no more. Children that it has already stay where they are.
    ///
    /// Of cgroup version 2 it gets one in any case; of version 1 in each hierarchy in which it is
    /// below the top, except where that is about resources only and this user may not move it. They
    /// are made as far up as this user may, and called `farcall-NAME-PID` unless there is a name.
    ///
    /// They stand in NAME.json as [`State::cgroups`], and are removed by [`Place::remove`]: by
    /// `farcall stop`, and by the next process of the same name. Root may make one, unless all trees are read-only. Others may
    /// where a service manager has left them a tree (`systemd-run --user --scope`).
    #[must_use]
    pub fn in_own_cgroup(mut self, name: Option<Name>) -> Self {
        self.cgroup = Some(CgroupName(name));
        self
    }

    /// Moves the process into a cgroup of its own, if that was asked for.
    pub(crate) fn enter_cgroup(&self, pid: Option<i32>) -> Result<Option<OwnCgroups>> {
        let Some(CgroupName(name)) = &self.cgroup else { return Ok(None) };
        let process = pid.and_then(Incarnation::of).ok_or_else(|| {
            let reason = "its pid is not known here: it can't be moved to a cgroup".into();
            Error::Cgroup { path: self.place.socket.clone(), reason }
        })?;
        let name = match name {
            Some(name) => name.to_string(),
            None => self.place.cgroup_name(process.pid),
        };
        let plan = Plan::new(process.pid, &name)?;
        self.place.write_cgroups(process.clone(), plan.cgroups())?;
        let made = match plan.make() {
            Ok(made) => made,
            Err(error) => {
                // There may be others' of that name, which are not to be removed.
                self.place.write_cgroups(process, Vec::new())?;
                return Err(error);
            }
        };
        made.enter()?;
        Ok(Some(made))
    }

    /// Listens, so that the kernel knows who called listen(2): this user is the one who may attach.
    pub(crate) fn listen(&self) -> Result<&OwnedFd> {
        let fd = self.listener.as_ref().ok_or(Error::Gone)?;
        listen(fd, Backlog::new(16).map_err(Error::local("listen"))?)
            .map_err(Error::local("listen"))?;
        Ok(fd)
    }

    /// The socket's file, as it was made here.
    pub(crate) fn socket_file(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The process listens: the place stays.
    pub(crate) fn keep(mut self) -> Place {
        self.listener = None;
        self.place.clone()
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.listener.is_some() {
            // What can't be removed is recognised as stale by the next one.
            let _ = self.place.remove_own(&self.socket, self.left);
        }
    }
}
