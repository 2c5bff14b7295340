//! A sockets' directory, held by a descriptor: whatever becomes of its path meanwhile, what is read,
//! written and removed lies in the same directory.
//!
//! The directory may belong to another user: root may use it all the same. What it does there it does with
//! that user's rights: see [`agent`](super::agent). Nothing in it is followed or waited for (symbolic links, FIFOs, leases, [file systems that others serve](super::mounts)), what is read is a regular file of bounded size, and
//! what a file says is the word of the user whose file it is: see [`Directory::author`].

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg, OFlag, open, openat, readlinkat};
use nix::libc;
use nix::sys::socket::UnixAddr;
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, fchmodat, fstat, fstatat, mkdirat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{Gid, Uid, geteuid};

use super::agent::{Agent, Operation};
use super::mounts;

/// Symbolic links that are followed on the way to a directory, as the kernel has it.
const MAX_LINKS: usize = 40;

/// Whose word something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Author {
    /// This user's, or root's.
    Trusted,
    /// Another user's, for root alone: what that user may do is done on it, and no more.
    User(Uid),
}

/// A directory, by a descriptor.
#[derive(Debug)]
pub(super) struct Directory {
    fd: OwnedFd,
    stat: FileStat,
    /// The mount that it is in, where that is known.
    mount: Option<u64>,
    /// Nobody else can put another directory in its place on the way to it.
    sheltered: bool,
    /// For root in a directory of another user's.
    agent: Option<Arc<Agent>>,
}

/// A file of a directory, by a descriptor, mostly with O_PATH: while it is held no other file has its inode.
#[derive(Debug)]
pub(super) struct Pinned {
    fd: OwnedFd,
    stat: FileStat,
    /// With whose rights it is used, if not with this process's.
    agent: Option<Arc<Agent>>,
}

impl Pinned {
    /// What a descriptor is open on.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let stat = fstat(&fd)?;
        Ok(Self { fd, stat, agent: None })
    }

    /// The same, to be used with the rights of who says that it is what is meant.
    pub(super) fn on_word_of(mut self, author: Author) -> Self {
        if let Author::User(uid) = author {
            self.agent = Some(Agent::of(uid));
        }
        self
    }

    /// Whether who it is used for may connect to it. This process does so itself: a server asks the
    /// kernel who has connected.
    pub(super) fn may_be_connected_to(&self) -> Result<(), Errno> {
        let Some(agent) = &self.agent else { return Ok(()) };
        agent.perform(Operation::MayWrite, self.as_fd(), Some(self.as_fd())).map(drop)
    }

    pub(super) fn is_socket(&self) -> bool {
        self.stat.st_mode & libc::S_IFMT == libc::S_IFSOCK
    }

    fn is_regular(&self) -> io::Result<()> {
        let regular = self.stat.st_mode & libc::S_IFMT == libc::S_IFREG;
        if regular { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.stat.st_dev, self.stat.st_ino) == (other.stat.st_dev, other.stat.st_ino)
    }

    pub(super) fn stat(&self) -> &FileStat {
        &self.stat
    }

    /// The path of exactly this file, for as long as it is held.
    pub(super) fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.fd.as_raw_fd().to_string())
    }
}

impl AsFd for Pinned {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// This user, root, and whoever has the root directory: where root has no uid in this user namespace
/// that is the overflow uid.
fn is_trusted(uid: u32) -> bool {
    uid == geteuid().as_raw()
        || uid == 0
        || fstatat(AT_FDCWD, "/", AtFlags::empty()).is_ok_and(|root| root.st_uid == uid)
}

/// A part of the way to a directory: a directory or a symbolic link. `mount` is the one that the way is
/// in: nothing is looked up in what another user's program serves.
fn part_of(at: &OwnedFd, part: &OsStr, mount: &mut Option<u64>) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    // With O_DIRECTORY what is mounted on demand is mounted.
    let next = match openat(at, part, flags | OFlag::O_DIRECTORY, Mode::empty()) {
        Err(Errno::ENOTDIR | Errno::ELOOP) => openat(at, part, flags, Mode::empty()),
        opened => opened,
    }?;
    mounts::enter(&next, mount, is_trusted)?;
    Ok(next)
}

impl Directory {
    /// Opens it. A symbolic link on the way that belongs to somebody else leads to a directory of
    /// theirs, or nowhere.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Self::walk(path, |_, _| Err(Errno::ENOENT.into()))
    }

    /// Opens it; `make` makes a part of the way that is missing.
    fn walk(path: &Path, make: impl Fn(&OwnedFd, &OsStr) -> io::Result<()>) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let parts = |path: &Path| -> Vec<OsString> {
            path.components().rev().map(|part| part.as_os_str().to_owned()).collect()
        };
        let start = if path.is_absolute() { "/" } else { "." };
        let mut at = open(start, flags | OFlag::O_DIRECTORY, Mode::empty())?;
        let mut mount = None;
        mounts::enter(&at, &mut mount, is_trusted)?;
        let mut rest = parts(path);
        let (mut links, mut strangers, mut sheltered) = (0, Vec::new(), true);
        while let Some(part) = rest.pop() {
            let next = match part_of(&at, &part, &mut mount) {
                // Nobody else's link says where something is made.
                Err(error) if error.kind() == io::ErrorKind::NotFound && strangers.is_empty() => {
                    make(&at, &part)?;
                    part_of(&at, &part, &mut mount)?
                }
                next => next?,
            };
            let stat = fstat(&next)?;
            // In a directory with this bit only the owner of a file renames it.
            let above = fstat(&at)?;
            let shared = above.st_mode & 0o022 != 0 && above.st_mode & libc::S_ISVTX == 0;
            sheltered &= is_trusted(above.st_uid) && is_trusted(stat.st_uid) && !shared;
            if stat.st_mode & libc::S_IFMT != libc::S_IFLNK {
                at = next;
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::ELOOP.into());
            }
            if fstatfs(&next)?.filesystem_type() == PROC_SUPER_MAGIC {
                // What such a link says is not where it leads, and whose it is says nothing.
                at = openat(&at, part.as_os_str(), flags, Mode::empty())?;
                mounts::enter(&at, &mut mount, is_trusted)?;
                continue;
            }
            if !is_trusted(stat.st_uid) {
                strangers.push(stat.st_uid);
            }
            rest.extend(parts(Path::new(&readlinkat(&next, "")?)));
        }
        let stat = fstat(&at)?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFDIR {
            return Err(Errno::ENOTDIR.into());
        }
        if let Some(stranger) = strangers.into_iter().find(|uid| *uid != stat.st_uid) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "a symbolic link of uid {stranger} leads to this directory of uid {}",
                    stat.st_uid
                ),
            ));
        }
        let of_another = geteuid().is_root() && !is_trusted(stat.st_uid);
        let agent = of_another.then(|| Agent::of(Uid::from_raw(stat.st_uid)));
        Ok(Self { fd: at, stat, mount, sheltered, agent })
    }

    /// Opens it, and makes what is missing of it, with mode 0700 whatever the umask is.
    pub(super) fn open_or_make(path: &Path) -> io::Result<Self> {
        let directory = Self::walk(path, |at, part| {
            match mkdirat(at, part, Mode::S_IRWXU) {
                Ok(()) => Self::was_made(at, part),
                // By somebody else just now.
                Err(Errno::EEXIST) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        })?;
        // Made under a umask that keeps its owner out.
        if directory.owner() == geteuid() && directory.mode() & 0o700 != 0o700 {
            directory.set_own_mode(directory.mode() | 0o700)?;
            return Self::open(path);
        }
        Ok(directory)
    }

    /// Gives a directory that was just made its mode, if it is that still which lies there.
    fn was_made(at: &OwnedFd, part: &OsStr) -> io::Result<()> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(at, part, flags, Mode::empty())?;
        let mut mount = None;
        mounts::enter(&fd, &mut mount, is_trusted)?;
        let stat = fstat(&fd)?;
        let made = Self { fd, stat, mount, sheltered: false, agent: None };
        if made.owner() == geteuid() { made.set_own_mode(0o700) } else { Ok(()) }
    }

    fn set_own_mode(&self, mode: u32) -> io::Result<()> {
        let mode = Mode::from_bits_truncate(mode);
        match fchmodat(AT_FDCWD, &self.itself(), mode, FchmodatFlags::FollowSymlink) {
            // Without /proc, and only where it may be entered.
            Err(Errno::ENOENT) => Ok(fchmodat(&self.fd, ".", mode, FchmodatFlags::FollowSymlink)?),
            set => Ok(set?),
        }
    }

    fn itself(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.fd.as_raw_fd().to_string())
    }

    /// Its path without symbolic links, where there is a /proc.
    pub(super) fn whole_path(&self) -> Option<PathBuf> {
        fs::read_link(self.itself()).ok()
    }

    pub(super) fn owner(&self) -> Uid {
        Uid::from_raw(self.stat.st_uid)
    }

    pub(super) fn mode(&self) -> u32 {
        self.stat.st_mode & 0o7777
    }

    /// Whether nobody but this user and root may write here.
    pub(super) fn is_closed(&self) -> bool {
        is_trusted(self.stat.st_uid) && self.mode() & 0o022 == 0
    }

    /// Whose word a file of this directory is; nobody's that counts, if that can't be told: a user who
    /// may write here may have linked a file of somebody else's.
    pub(super) fn author(&self, file: &FileStat) -> Option<Author> {
        let own = is_trusted(self.stat.st_uid);
        if is_trusted(file.st_uid) {
            (self.is_closed() || file.st_nlink == 1).then_some(Author::Trusted)
        } else if geteuid().is_root() && (own || file.st_uid == self.stat.st_uid) {
            Some(Author::User(Uid::from_raw(file.st_uid)))
        } else {
            None
        }
    }

    /// Gives a file of that name its mode: this one, or where there is no /proc what has the name.
    pub(super) fn set_mode(&self, name: &OsStr, file: &Pinned, mode: u32) -> io::Result<()> {
        let mode = Mode::from_bits_truncate(mode);
        // fchmod(2) refuses O_PATH, and fchmodat(2) has no empty path.
        match fchmodat(AT_FDCWD, &file.path(), mode, FchmodatFlags::FollowSymlink) {
            Err(Errno::ENOENT) => Ok(fchmodat(&self.fd, name, mode, FchmodatFlags::FollowSymlink)?),
            set => Ok(set?),
        }
    }

    /// Does it with the rights that count here.
    fn perform(
        &self,
        operation: Operation<'_>,
        file: Option<&Pinned>,
    ) -> Result<Option<OwnedFd>, Errno> {
        let (directory, file) = (self.fd.as_fd(), file.map(AsFd::as_fd));
        match &self.agent {
            Some(agent) => agent.perform(operation, directory, file),
            None => operation.perform(directory, file),
        }
    }

    /// Opens a file with the rights that count here.
    fn open_fd(&self, operation: Operation<'_>, file: Option<&Pinned>) -> Result<OwnedFd, Errno> {
        self.perform(operation, file)?.ok_or(Errno::EBADF)
    }

    /// The file of that name, whatever it is.
    pub(super) fn pin(&self, name: &OsStr) -> io::Result<Pinned> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = self.open_fd(Operation::Open { name: &with_zero(name)?, flags }, None)?;
        // A file may be a mount as well.
        mounts::enter(&fd, &mut { self.mount }, is_trusted)?;
        Ok(Pinned { agent: self.agent.clone(), ..Pinned::new(fd)? })
    }

    /// The first `most` bytes of a regular file, and whose it is.
    pub(super) fn read(&self, name: &OsStr, most: u64) -> io::Result<(Vec<u8>, FileStat)> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let pinned = self.pin(name)?;
        pinned.is_regular()?;
        // Of exactly this file, whatever its name comes to mean.
        let reopen = Operation::Reopen { name: &with_zero(name)?, flags };
        let file = Pinned::new(self.open_fd(reopen, Some(&pinned))?)?;
        file.is_regular()?;
        if !file.is_same(&pinned) {
            return Err(Errno::ESTALE.into());
        }
        let mut text = Vec::new();
        File::from(file.fd).take(most).read_to_end(&mut text)?;
        Ok((text, file.stat))
    }

    /// Writes a file as a whole or not at all, with mode 0600 whatever the umask is, and gives it to
    /// `owner`; in another user's directory it is that user's.
    pub(super) fn write(
        &self,
        name: &OsStr,
        text: &[u8],
        owner: Option<(Uid, Gid)>,
    ) -> io::Result<()> {
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let owner = owner.filter(|_| self.agent.is_none());
        let (start, name) = (temporaries(name), with_zero(name)?);
        loop {
            let count = WRITES.fetch_add(1, Ordering::Relaxed);
            let mut temporary = start.clone();
            temporary.push(format!("{}.{count}", std::process::id()));
            let temporary = with_zero(&temporary)?;
            let write = Operation::Write { temporary: &temporary, name: &name, owner, text };
            match self.perform(write, None) {
                // Of a process of the same pid that has died, or in another pid namespace.
                Err(Errno::EEXIST) => {}
                written => return Ok(written.map(drop)?),
            }
        }
    }

    /// Removes a file, and what processes that died left of it while they wrote. Nothing there is no
    /// error.
    pub(super) fn remove(&self, name: &OsStr) -> io::Result<()> {
        let unlink = |name: &OsStr| -> io::Result<()> {
            match self.perform(Operation::Unlink { name: &with_zero(name)? }, None) {
                Err(Errno::ENOENT) | Ok(_) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        };
        unlink(name)?;
        let left = temporaries(name);
        for name in self.names().unwrap_or_default() {
            if name.as_encoded_bytes().starts_with(left.as_encoded_bytes()) {
                let _ = unlink(&name);
            }
        }
        Ok(())
    }

    /// The names of all that is in it.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::from_fd(self.readable()?)?.iter() {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    }

    /// Those who make and remove files of processes take turns: until the lock is dropped, or its
    /// descriptor closed with this process. Who may read the directory may keep the lock for ever, so
    /// nobody waits for longer than `limit`.
    pub(super) fn lock(&self, limit: Duration) -> io::Result<Flock<OwnedFd>> {
        let end = Instant::now() + limit;
        let mut fd = self.readable()?;
        loop {
            match Flock::lock(fd, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < end => fd = back,
                Err((_, Errno::EWOULDBLOCK)) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "another process keeps the directory locked (flock(2))",
                    ));
                }
                Err((_, errno)) => return Err(errno.into()),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn readable(&self) -> io::Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(self.open_fd(Operation::Open { name: c".", flags }, None)?)
    }

    /// The address of a file in this directory that is called so and lies at `path`, for as long as this
    /// is held: where others can put another directory at that path, or it is too long, by the descriptor.
    pub(super) fn address(&self, path: &Path, name: &OsStr) -> Result<UnixAddr, Errno> {
        let by_fd = || UnixAddr::new(&self.itself().join(name));
        if self.sheltered { UnixAddr::new(path).or_else(|_| by_fd()) } else { by_fd() }
    }
}

fn with_zero(name: &OsStr) -> io::Result<CString> {
    Ok(CString::new(name.as_bytes())?)
}

/// How the names of files begin that are renamed to `name` when they are complete.
fn temporaries(name: &OsStr) -> OsString {
    let mut start = OsString::from(".");
    start.push(name);
    start.push(".");
    start
}
