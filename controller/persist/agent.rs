//! The files of a directory that belongs to another user, as root handles them: a child with that user's
//! ids opens, writes and removes them, and hands back descriptors. So root can do there what that user
//! may do, and the kernel judges it.
//!
//! One child does this for all directories of a user, until it has had nothing to do for a while: a
//! command that looks at a hundred processes makes one child. It is asked by datagrams: an operation,
//! with the descriptors that it is about. The operations are the same ones that are done without a child
//! in a directory of one's own: see [`Operation::perform`].

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat, renameat};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{
    AccessFlags, Gid, Uid, UnlinkatFlags, User, faccessat, fchown, getgrouplist, unlinkat, write,
};

use super::rights::{LIMIT, NO_GROUP, be, fork};
use crate::process::pidfd_open;

/// How long the child waits for the next operation before it ends.
const IDLE: Duration = Duration::from_secs(1);

/// Bytes of an operation: a file is written by one.
const OPERATION_MAX: usize = 128 * 1024;

/// How often an operation is begun whose child has ended before it answered: of idleness, or since its
/// user, who may, has killed it. Done twice, an operation does no more than once.
const TRIES: usize = 3;

/// What is done in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation<'a> {
    /// openat(2), without O_CREAT.
    Open { name: &'a CStr, flags: OFlag },
    /// Opens a file that is open with O_PATH. Where there is no /proc, what has its name.
    Reopen { name: &'a CStr, flags: OFlag },
    /// Whether a file that is open with O_PATH may be written to, as connect(2) wants it of a socket.
    MayWrite,
    /// Writes a file as a whole or not at all, with mode 0600. EEXIST: the temporary name is taken.
    Write { temporary: &'a CStr, name: &'a CStr, owner: Option<(Uid, Gid)>, text: &'a [u8] },
    /// unlinkat(2).
    Unlink { name: &'a CStr },
}

impl<'a> Operation<'a> {
    /// Does it, by system calls alone. `file` is the one that is open with O_PATH.
    pub(super) fn perform(
        self,
        directory: BorrowedFd<'_>,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Option<OwnedFd>, Errno> {
        let path_of_file = || path_of(file.ok_or(Errno::EINVAL)?);
        match self {
            Self::Open { name, flags } => openat(directory, name, flags, Mode::empty()).map(Some),
            Self::Reopen { name, flags } => {
                let opened = match open(path_of_file()?.name(), flags, Mode::empty()) {
                    Err(Errno::ENOENT) => {
                        openat(directory, name, flags | OFlag::O_NOFOLLOW, Mode::empty())
                    }
                    opened => opened,
                };
                opened.map(Some)
            }
            Self::MayWrite => {
                let path = path_of_file()?;
                match faccessat(AT_FDCWD, path.name(), AccessFlags::W_OK, AtFlags::empty()) {
                    // Without /proc: since Linux 5.8.
                    Err(Errno::ENOENT) => {
                        let (file, flags) = (file.ok_or(Errno::EINVAL)?, AtFlags::AT_EMPTY_PATH);
                        faccessat(file, c"", AccessFlags::W_OK, flags)
                    }
                    looked => looked,
                }
                .map(|()| None)
            }
            Self::Write { temporary, name, owner, text } => {
                write_file(directory, temporary, name, owner, text).map(|()| None)
            }
            Self::Unlink { name } => {
                unlinkat(directory, name, UnlinkatFlags::NoRemoveDir).map(|()| None)
            }
        }
    }

    /// A number, flags, ids, names with their zeros, the text.
    fn encode(self) -> Vec<u8> {
        let none = (u32::MAX, u32::MAX);
        let (kind, flags, (uid, gid), names, text) = match self {
            Self::Open { name, flags } => (0, flags, none, [name, c""], &b""[..]),
            Self::Reopen { name, flags } => (1, flags, none, [name, c""], &b""[..]),
            Self::MayWrite => (2, OFlag::empty(), none, [c"", c""], &b""[..]),
            Self::Write { temporary, name, owner, text } => {
                let owner = owner.map_or(none, |(uid, gid)| (uid.as_raw(), gid.as_raw()));
                (3, OFlag::empty(), owner, [temporary, name], text)
            }
            Self::Unlink { name } => (4, OFlag::empty(), none, [name, c""], &b""[..]),
        };
        let mut bytes = Vec::new();
        for number in [kind, flags.bits().cast_unsigned(), uid, gid] {
            bytes.extend(number.to_ne_bytes());
        }
        names.into_iter().for_each(|name| bytes.extend(name.to_bytes_with_nul()));
        bytes.extend(text);
        bytes
    }

    fn decode(bytes: &'a [u8]) -> Option<Self> {
        let number = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let temporary = CStr::from_bytes_until_nul(bytes.get(16..)?).ok()?;
        let rest = bytes.get(16 + temporary.to_bytes_with_nul().len()..)?;
        let name = CStr::from_bytes_until_nul(rest).ok()?;
        let text = rest.get(name.to_bytes_with_nul().len()..)?;
        let flags = OFlag::from_bits_retain(number(4)?.cast_signed());
        let (uid, gid) = (number(8)?, number(12)?);
        let owner = (uid != u32::MAX).then_some((Uid::from_raw(uid), Gid::from_raw(gid)));
        Some(match number(0)? {
            0 => Self::Open { name: temporary, flags },
            1 => Self::Reopen { name: temporary, flags },
            2 => Self::MayWrite,
            3 => Self::Write { temporary, name, owner, text },
            4 => Self::Unlink { name: temporary },
            _ => return None,
        })
    }
}

fn write_file(
    directory: BorrowedFd<'_>,
    temporary: &CStr,
    name: &CStr,
    owner: Option<(Uid, Gid)>,
    mut text: &[u8],
) -> Result<(), Errno> {
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let file = openat(directory, temporary, flags, mode)?;
    let mut complete = || {
        fchmod(&file, mode)?;
        while !text.is_empty() {
            match write(&file, text) {
                Err(Errno::EINTR) => {}
                written => text = text.get(written?..).unwrap_or_default(),
            }
        }
        if let Some((uid, gid)) = owner {
            fchown(&file, Some(uid), Some(gid))?;
        }
        renameat(directory, temporary, directory, name)
    };
    complete().inspect_err(|_| {
        let _ = unlinkat(directory, temporary, UnlinkatFlags::NoRemoveDir);
    })
}

/// The path of what a descriptor is open on, without an allocation.
struct FdPath([u8; 32]);

fn path_of(fd: BorrowedFd<'_>) -> Result<FdPath, Errno> {
    let mut bytes = [0; 32];
    // A zero stays behind it.
    write!(&mut bytes[..31], "/proc/self/fd/{}", fd.as_raw_fd()).map_err(|_| Errno::EINVAL)?;
    Ok(FdPath(bytes))
}

impl FdPath {
    fn name(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

/// Does file operations with the rights of a user, whatever those of this process are.
#[derive(Debug)]
pub(super) struct Agent {
    uid: Uid,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    NoChild,
    Child(Child),
    /// This process can't become that user.
    Unable,
}

#[derive(Debug)]
struct Child {
    socket: OwnedFd,
    pidfd: OwnedFd,
    /// Who has made it: a copy of this process (fork) makes one of its own.
    parent: u32,
}

/// Why a child has not done it.
enum Failure {
    Errno(Errno),
    /// It can't become the user.
    Unable,
    Ended,
}

impl Agent {
    /// The one for a user.
    pub(super) fn of(uid: Uid) -> Arc<Self> {
        static AGENTS: LazyLock<Mutex<HashMap<u32, Arc<Agent>>>> = LazyLock::new(Mutex::default);
        let mut agents = AGENTS.lock().unwrap_or_else(PoisonError::into_inner);
        let agent = || Arc::new(Self { uid, state: Mutex::new(State::NoChild) });
        agents.entry(uid.as_raw()).or_insert_with(agent).clone()
    }

    /// Does it with the user's rights; ETIMEDOUT if that takes too long. Where this process can't become
    /// that user (it lacks CAP_SETUID or CAP_SETGID, or the user has no id in its user namespace), it is
    /// done with the rights that it has.
    pub(super) fn perform(
        &self,
        operation: Operation<'_>,
        directory: BorrowedFd<'_>,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Option<OwnedFd>, Errno> {
        let bytes = operation.encode();
        if bytes.len() > OPERATION_MAX {
            return Err(Errno::EFBIG);
        }
        for _ in 0..TRIES {
            match self.ask(&bytes, directory, file) {
                Ok(fd) => return Ok(fd),
                Err(Failure::Errno(errno)) => return Err(errno),
                Err(Failure::Unable) => return operation.perform(directory, file),
                Err(Failure::Ended) => {}
            }
        }
        Err(Errno::EIO)
    }

    fn ask(
        &self,
        bytes: &[u8],
        directory: BorrowedFd<'_>,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Option<OwnedFd>, Failure> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let child = match &*state {
            State::Unable => return Err(Failure::Unable),
            State::Child(child) if child.parent == std::process::id() => child,
            _ => {
                *state = State::Child(Child::start(self.uid).map_err(Failure::Errno)?);
                let State::Child(child) = &*state else { return Err(Failure::Ended) };
                child
            }
        };
        let answer = child.ask(bytes, directory, file);
        match answer {
            Ok(answer) if !answer.able => {
                *state = State::Unable;
                Err(Failure::Unable)
            }
            Ok(Answer { errno: 0, fd, .. }) => Ok(fd),
            Ok(answer) => Err(Failure::Errno(Errno::from_raw(answer.errno))),
            Err(failure) => {
                // Whatever it does is done or over, as far as it can be ended.
                child.kill();
                *state = State::NoChild;
                Err(failure)
            }
        }
    }
}

struct Answer {
    able: bool,
    errno: i32,
    fd: Option<OwnedFd>,
}

impl Child {
    fn start(uid: Uid) -> Result<Self, Errno> {
        // Asked before: the child may only make system calls.
        let user = User::from_uid(uid).ok().flatten();
        let gid = user.as_ref().map_or(NO_GROUP, |user| user.gid.as_raw());
        let groups: Vec<libc::gid_t> = user
            .and_then(|user| getgrouplist(&CString::new(user.name).ok()?, user.gid).ok())
            .map(|groups| groups.into_iter().map(Gid::as_raw).collect())
            .unwrap_or_default();
        let mut buffer = vec![0; OPERATION_MAX];
        let kind = (AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let (own, there) = socketpair(kind.0, kind.1, None, kind.2)?;
        let own_number = own.as_raw_fd();
        // SAFETY: only system calls are made.
        let pid = unsafe {
            fork(Some(there.as_fd()), || {
                // Where it could not be closed with all others, this one would hide the end of who asks.
                libc::close(own_number);
                let able = be(uid, gid, &groups);
                serve(there.as_raw_fd(), &mut buffer, able.is_ok());
                0
            })
        }?;
        let pidfd = pidfd_open(pid.cast_unsigned());
        let reap = move || {
            // SAFETY: the status may be null. No other child has the pid before.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
        };
        // Where there is no thread for it, it is reaped with this process.
        let _ = std::thread::Builder::new().spawn(reap);
        // Without the descriptors the child ends.
        let pidfd = pidfd.map_err(|_| Errno::EMFILE)?;
        Ok(Self { socket: own, pidfd, parent: std::process::id() })
    }

    fn ask(
        &self,
        bytes: &[u8],
        directory: BorrowedFd<'_>,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Answer, Failure> {
        let fds = [directory.as_raw_fd(), file.map_or(-1, |file| file.as_raw_fd())];
        let socket = self.socket.as_raw_fd();
        match send(socket, bytes, &fds[..1 + usize::from(file.is_some())]) {
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(Failure::Ended),
            sent => sent.map_err(Failure::Errno)?,
        }
        let limit = PollTimeout::try_from(LIMIT).unwrap_or(PollTimeout::MAX);
        let mut ready = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut ready, limit) {
                Ok(0) => return Err(Failure::Errno(Errno::ETIMEDOUT)),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Failure::Errno(errno)),
                Ok(_) => break,
            }
        }
        let mut answer = [0; 8];
        let received = match receive(socket, &mut answer) {
            Err(Errno::ECONNRESET) => return Err(Failure::Ended),
            received => received.map_err(Failure::Errno)?,
        };
        let (len, [fd, _]) = received;
        if len != answer.len() {
            return Err(Failure::Ended);
        }
        let number = |at: usize| i32::from_ne_bytes([0, 1, 2, 3].map(|n| answer[at + n]));
        Ok(Answer { able: number(0) != 0, errno: number(4), fd })
    }

    fn kill(&self) {
        let (pidfd, nothing) = (self.pidfd.as_raw_fd(), 0usize);
        // SAFETY: a null pointer stands for what kill(2) would send.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, pidfd, libc::SIGKILL, nothing, 0);
        }
    }
}

/// What the child does: system calls alone.
fn serve(socket: RawFd, buffer: &mut [u8], able: bool) {
    loop {
        let mut ready = libc::pollfd { fd: socket, events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure is there.
        if unsafe { libc::poll(&raw mut ready, 1, IDLE.as_millis() as i32) } <= 0 {
            return;
        }
        let Ok((len @ 1.., fds)) = receive(socket, buffer) else { return };
        let operation = Operation::decode(buffer.get(..len).unwrap_or_default());
        let done = match (operation, &fds) {
            (Some(operation), [Some(directory), file]) if able => {
                operation.perform(directory.as_fd(), file.as_ref().map(AsFd::as_fd))
            }
            _ => Err(Errno::EPERM),
        };
        let (errno, fd) = match done {
            Ok(fd) => (0, fd),
            Err(errno) => (errno as i32, None),
        };
        let mut answer = [0; 8];
        answer[..4].copy_from_slice(&i32::from(able).to_ne_bytes());
        answer[4..].copy_from_slice(&errno.to_ne_bytes());
        let number = fd.as_ref().map(AsRawFd::as_raw_fd);
        if let Err(errno) = send(socket, &answer, number.as_slice()) {
            // It could not be handed back.
            answer[4..].copy_from_slice(&(errno as i32).to_ne_bytes());
            if send(socket, &answer, &[]).is_err() {
                return;
            }
        }
    }
}

/// Room for a control message with two descriptors.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Sends a datagram, with up to two descriptors, by system calls alone.
fn send(socket: RawFd, bytes: &[u8], fds: &[RawFd]) -> Result<(), Errno> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
    // SAFETY: all pointers lead to what is here; the control message has room for two numbers.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        if !fds.is_empty() {
            let size = size_of_val(fds) as u32;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size) as _;
            let to: *mut RawFd = libc::CMSG_DATA(header).cast();
            to.copy_from_nonoverlapping(fds.as_ptr(), fds.len().min(2));
        }
        let flags = libc::MSG_NOSIGNAL;
        Errno::result(libc::sendmsg(socket, &raw const message, flags)).map(drop)
    }
}

/// Receives a datagram and up to two descriptors, by system calls alone. EMFILE: there was no number free
/// for one.
fn receive(socket: RawFd, bytes: &mut [u8]) -> Result<(usize, [Option<OwnedFd>; 2]), Errno> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut fds = [None, None];
    // SAFETY: all pointers lead to what is here; descriptors that have arrived are nobody else's.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(8) as _;
        let flags = libc::MSG_CMSG_CLOEXEC;
        let len = Errno::result(libc::recvmsg(socket, &raw mut message, flags))?;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if !header.is_null() && (*header).cmsg_type == libc::SCM_RIGHTS {
            let count =
                ((*header).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize) / 4;
            let from: *const RawFd = libc::CMSG_DATA(header).cast();
            for (at, fd) in fds.iter_mut().enumerate().take(count) {
                *fd = Some(OwnedFd::from_raw_fd(from.add(at).read_unaligned()));
            }
        }
        if message.msg_flags & libc::MSG_CTRUNC != 0 {
            return Err(Errno::EMFILE);
        }
        Ok((len.cast_unsigned(), fds))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::{Pid, geteuid};

    use super::*;
    use crate::persist::directory::Directory;

    /// A user that nobody is, and no other test acts as.
    const USER: u32 = 65_531;

    /// The child that works for that user.
    fn child_of(agent: &Agent) -> Pid {
        let State::Child(child) = &*agent.state.lock().unwrap() else {
            panic!("there is no child")
        };
        let info = format!("/proc/self/fdinfo/{}", child.pidfd.as_raw_fd());
        let info = fs::read_to_string(info).unwrap();
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).unwrap();
        Pid::from_raw(pid.trim().parse().unwrap())
    }

    #[test]
    fn one_child_handles_a_users_files_with_that_users_rights() {
        assert!(geteuid().is_root(), "this test acts as two users: run it as root");
        let above = tempfile::tempdir().unwrap();
        fs::set_permissions(above.path(), Permissions::from_mode(0o755)).unwrap();
        let [path, aside, others] =
            ["theirs", "aside", "others"].map(|name| above.path().join(name));
        for path in [&path, &others] {
            fs::create_dir(path).unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o700)).unwrap();
            fs::write(path.join("one.json"), "precious").unwrap();
            fs::write(path.join(".one.json.1.1"), "precious").unwrap();
        }
        chown(&path, Some(USER), Some(USER)).unwrap();
        fs::set_permissions(path.join("one.json"), Permissions::from_mode(0o600)).unwrap();
        let directory = Directory::open(&path).unwrap();
        let name = OsStr::new("one.json");
        let denied = |error: std::io::Error| error.raw_os_error() == Some(libc::EACCES);

        // A file of root's is not that user's to read, but to replace.
        assert!(directory.read(name, 100).is_err_and(denied));
        directory.write(name, b"text", Some((Uid::from_raw(0), Gid::from_raw(0)))).unwrap();
        let written = fs::metadata(path.join(name)).unwrap();
        assert_eq!((written.uid(), written.mode() & 0o7777), (USER, 0o600));
        assert_eq!(directory.read(name, 100).unwrap().0, b"text");
        drop(directory.lock(Duration::ZERO).unwrap());

        // Another directory in its place is not meant.
        fs::rename(&path, &aside).unwrap();
        std::os::unix::fs::symlink(&others, &path).unwrap();
        let agent = Agent::of(Uid::from_raw(USER));
        let first = child_of(&agent);
        for _ in 0..100 {
            directory.write(name, b"again", None).unwrap();
            directory.pin(name).unwrap();
        }
        directory.remove(name).unwrap();
        assert_eq!(directory.names().unwrap(), Vec::<std::ffi::OsString>::new());
        assert_eq!(fs::read(others.join("one.json")).unwrap(), b"precious");
        assert_eq!(fs::read_dir(&others).unwrap().count(), 2);
        assert_eq!(child_of(&agent), first, "a child for all of it");

        // What that user may not write, root does not write there.
        fs::set_permissions(&aside, Permissions::from_mode(0o500)).unwrap();
        assert!(directory.write(name, b"text", None).is_err_and(denied));
        fs::set_permissions(&aside, Permissions::from_mode(0o300)).unwrap();
        assert!(directory.names().is_err_and(denied));
        assert!(directory.lock(Duration::ZERO).is_err_and(denied));
        directory.write(name, b"text", None).unwrap();

        // A child that was killed has a successor; one that was stopped keeps nobody waiting.
        kill(child_of(&agent), Signal::SIGKILL).unwrap();
        directory.pin(name).unwrap();
        let second = child_of(&agent);
        assert_ne!(second, first);
        kill(second, Signal::SIGSTOP).unwrap();
        let late = directory.pin(name).unwrap_err();
        assert_eq!(late.raw_os_error(), Some(libc::ETIMEDOUT));
        directory.pin(name).unwrap();
        assert_ne!(child_of(&agent), second);

        // With nothing to do it ends.
        let State::Child(child) = &*agent.state.lock().unwrap() else {
            panic!("there is no child")
        };
        let mut ended = [PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ended, PollTimeout::from(60_000u16)), Ok(1));
    }

    #[test]
    fn an_operation_arrives_as_it_was_sent() {
        let owner = Some((Uid::from_raw(1), Gid::from_raw(2)));
        let operations = [
            Operation::Open { name: c"a", flags: OFlag::O_PATH | OFlag::O_NOFOLLOW },
            Operation::Reopen { name: c"b", flags: OFlag::O_NONBLOCK },
            Operation::MayWrite,
            Operation::Write { temporary: c".c.1", name: c"c", owner, text: b"d\0e" },
            Operation::Write { temporary: c".c.1", name: c"c", owner: None, text: b"" },
            Operation::Unlink { name: c"f" },
        ];
        for operation in operations {
            let bytes = operation.encode();
            let decoded = Operation::decode(&bytes).unwrap();
            assert_eq!(format!("{decoded:?}"), format!("{operation:?}"));
            for len in 0..17 {
                assert!(Operation::decode(&bytes[..len]).is_none());
            }
        }
    }
}
