//! Where the sockets of persistent processes live: one directory a user, one socket a process.
//!
//! Beside `NAME.sock` lies `NAME.json`: a server that is blocked in a call can't say who holds it,
//! so every controller that attaches writes it down there.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::unistd::{Uid, geteuid};
use serde::{Deserialize, Serialize};

use super::cgroup::{self, OwnCgroups, Plan};
use super::incarnation::Incarnation;
use crate::call::{Error, Result};

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

    /// All names that have a socket here, in order.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if the directory is there and can't be read.
    pub fn names(&self) -> Result<Vec<Name>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|error| self.error(&error))?,
        };
        let mut names: Vec<Name> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|file| file.strip_suffix(".sock")?.parse().ok())
            .collect();
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
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.path).map_err(|error| self.error(&error))?;
        let metadata = fs::metadata(&self.path).map_err(|error| self.error(&error))?;
        if Uid::from_raw(metadata.uid()) != geteuid() {
            return Err(self.refuse(format!("belongs to uid {}, not to you", metadata.uid())));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(self.refuse(format!(
                "has mode {:o}, which lets others in: chmod 700 it",
                metadata.mode() & 0o777
            )));
        }
        self.place(name).reserve()
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

    /// What the cgroup of the process with that pid is called.
    fn cgroup_name(&self, pid: i32) -> String {
        let name = self.socket.file_stem().unwrap_or_default().to_string_lossy();
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
        let name: String = name.chars().map(plain).take(64).collect();
        format!("farcall-{name}-{pid}")
    }

    fn directory(&self) -> &Path {
        match self.socket.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    /// What NAME.json says, if it is there and can be read.
    #[must_use]
    pub fn state(&self) -> Option<State> {
        Some(self.state_and_owner()?.0)
    }

    /// The same, and the user whose file it is.
    fn state_and_owner(&self) -> Option<(State, u32)> {
        // The directory may be another user's: what lies there need not be a file.
        let file = File::options()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOFOLLOW)
            .open(self.state_path())
            .ok()?;
        let metadata = file.metadata().ok()?;
        if !metadata.is_file() {
            return None;
        }
        let mut text = Vec::new();
        file.take(STATE_SIZE).read_to_end(&mut text).ok()?;
        Some((serde_json::from_slice(&text).ok()?, metadata.uid()))
    }

    /// Whether a process of this network namespace listens at exactly this path, as the kernel
    /// tells it: nobody is connected to.
    #[must_use]
    pub fn is_listening(&self) -> bool {
        // Number, references, protocol, flags (__SO_ACCEPTCON), type, state, inode, path.
        const LISTENING: &[u8] = b" 00010000 ";
        let sockets = fs::read("/proc/net/unix").unwrap_or_default();
        let path = [b" ", self.socket.as_os_str().as_encoded_bytes()].concat();
        sockets.split(|byte| *byte == b'\n').any(|line| {
            line.strip_suffix(path.as_slice())
                .is_some_and(|rest| rest.windows(LISTENING.len()).any(|part| part == LISTENING))
        })
    }

    /// Whether somebody listens there, as a connection to it shows, which is closed at once: for places of
    /// which [`Place::is_listening`] says nothing, in another network namespace. `None` if it does not
    /// show it: the socket is another user's.
    #[must_use]
    pub fn accepts(&self) -> Option<bool> {
        let (address, _directory) = self.address().ok()?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None).ok()?;
        match connect(probe.as_raw_fd(), &address) {
            // Full, or connected.
            Ok(()) | Err(Errno::EAGAIN) => Some(true),
            Err(Errno::ECONNREFUSED | Errno::ENOENT | Errno::ENOTDIR) => Some(false),
            Err(_) => None,
        }
    }

    /// Writes NAME.json, as a whole or not at all.
    fn write_state(&self, state: &State) -> Result<()> {
        let mut text = serde_json::to_vec(state).map_err(|error| self.refuse(error.to_string()))?;
        text.push(b'\n');
        let path = self.state_path();
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or(OsStr::new("state")));
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let count = WRITES.fetch_add(1, Ordering::Relaxed);
        name.push(format!(".{}.{count}", std::process::id()));
        let temporary = path.with_file_name(name);
        let write = || {
            // Left by a process of the same pid. What others put there is not written to.
            let _ = fs::remove_file(&temporary);
            let mut file =
                File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(&text)?;
            // Root that attaches to a user's process leaves the user something to read.
            if let (true, Ok(socket)) = (geteuid().is_root(), fs::symlink_metadata(&self.socket)) {
                std::os::unix::fs::fchown(&file, Some(socket.uid()), Some(socket.gid()))?;
            }
            fs::rename(&temporary, &path)
        };
        write().map_err(|error| {
            let _ = fs::remove_file(&temporary);
            self.error(&error)
        })
    }

    /// Writes down that this process holds the one at this place, whose pid is given where it is
    /// known, with the socket of that inode. Where neither the pid nor an earlier NAME.json tells which
    /// process it is, nothing is written.
    pub(crate) fn write_holder(&self, pid: Option<i32>, connection: Option<u64>) -> Result<()> {
        let before = self.state();
        let cgroups = before.as_ref().map(|state| state.cgroups.clone()).unwrap_or_default();
        let known = pid.and_then(Incarnation::of);
        let Some(process) = known.or_else(|| Some(before?.process)) else { return Ok(()) };
        let holder = Incarnation::of(std::process::id() as i32);
        self.write_state(&State { process, holder, since: now(), cgroups, connection })
    }

    /// Writes down which cgroups are about to be made for the process.
    fn write_cgroups(&self, process: Incarnation, cgroups: Vec<PathBuf>) -> Result<()> {
        let holder = Incarnation::of(std::process::id() as i32);
        self.write_state(&State { process, holder, since: now(), cgroups, connection: None })
    }

    /// Writes down that nobody holds it, unless somebody else does by now.
    pub(crate) fn erase_holder(&self) -> Result<()> {
        match self.state() {
            Some(state) if state.holder == Incarnation::of(std::process::id() as i32) => {
                self.write_state(&State { holder: None, connection: None, since: now(), ..state })
            }
            _ => Ok(()),
        }
    }

    /// Removes the cgroups that were made for the process: it is gone. Where there are none, nothing
    /// is done.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] if one of them can't be removed: processes are in it.
    pub fn remove_cgroups(&self) -> Result<()> {
        let Some((state, owner)) = self.state_and_owner() else { return Ok(()) };
        cgroup::remove(&state.cgroups, owner)
    }

    /// Removes the socket, what lies beside it, and the cgroups that were made for the process: it
    /// is gone.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] if somebody is in its cgroup still, and then all stays;
    /// [`Error::Home`] if a file is there and can't be removed.
    pub fn remove(&self) -> Result<()> {
        self.remove_cgroups()?;
        for path in [self.socket.clone(), self.state_path()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(self.error(&error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// An address for the socket: its path, or where that is too long for a `sockaddr_un`, the
    /// same through a descriptor of its directory, which is returned to be kept open.
    pub(crate) fn address(&self) -> Result<(UnixAddr, Option<OwnedFd>)> {
        if let Ok(address) = UnixAddr::new(&self.socket) {
            return Ok((address, None));
        }
        let directory = File::options()
            .read(true)
            .custom_flags(nix::libc::O_PATH | nix::libc::O_DIRECTORY)
            .open(self.directory())
            .map_err(|error| self.error(&error))?;
        let name = self.socket.file_name().unwrap_or_default();
        let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
        let address = UnixAddr::new(&short)
            .map_err(|_| self.refuse("the file name is too long for a socket".into()))?;
        Ok((address, Some(directory.into())))
    }

    /// Binds the socket; see [`Home::reserve`].
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if a live process listens there, or the directory can't be written.
    pub fn reserve(self) -> Result<Reserved> {
        let directory = File::open(self.directory()).map_err(|error| self.error(&error))?;
        // Two that want the same name take turns; the lock goes with the descriptor.
        let lock = Flock::lock(directory, FlockArg::LockExclusive)
            .map_err(|(_, errno)| self.refuse(format!("locking the directory: {errno}")))?;
        if fs::symlink_metadata(&self.socket).is_ok() {
            self.replace_stale()?;
        }
        let (address, _directory) = self.address()?;
        // Non-blocking: the server must not wait in accept for a client that has gone again.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(Error::local("socket"))?;
        bind(fd.as_raw_fd(), &address).map_err(|errno| self.error(&errno.into()))?;
        let reserved = Reserved { place: self, listener: Some(fd), cgroup: None };
        // Nobody can connect before listen(2): so nobody gets in before the mode is right.
        fs::set_permissions(&reserved.place.socket, fs::Permissions::from_mode(0o600))
            .map_err(|error| reserved.place.error(&error))?;
        // As long as this process lives, nobody takes the place for one that was left behind.
        let holder = Incarnation::of(std::process::id() as i32);
        let (process, cgroups) = (NONE_YET, Vec::new());
        let state = State { process, holder, since: now(), cgroups, connection: None };
        reserved.place.write_state(&state)?;
        drop(lock);
        Ok(reserved)
    }

    /// Removes what a dead process left, or says that it is not dead.
    fn replace_stale(&self) -> Result<()> {
        let (address, _directory) = self.address()?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(Error::local("socket"))?;
        let being_made =
            self.state().is_some_and(|state| !state.process.is_gone() && state.is_being_made());
        match connect(probe.as_raw_fd(), &address) {
            Err(Errno::ECONNREFUSED) if !being_made => self.remove(),
            // Full, or connected: somebody listens.
            Ok(()) | Err(Errno::EAGAIN | Errno::ECONNREFUSED) => {
                let state = self.state();
                if let Some(State { process: NONE_YET, holder: Some(holder), .. }) = state {
                    let reason = format!("pid {} has reserved it: choose another name", holder.pid);
                    return Err(self.refuse(reason));
                }
                let pid = state.map(|state| format!(" (pid {})", state.process.pid));
                Err(self.refuse(format!(
                    "a live process{} listens there: choose another name, or `farcall stop` it",
                    pid.unwrap_or_default()
                )))
            }
            Err(errno) => {
                Err(self.refuse(format!("in the way, and no socket to connect to: {errno}")))
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
            let _ = self.place.remove();
        }
    }
}
