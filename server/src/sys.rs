//! The server's own system calls, results as the kernel returns them. They are inlined, except where
//! one is made of more than the call itself.

use core::mem::MaybeUninit;

pub use farcall_abi::upgrade::PollFd;
use syscalls::{Sysno, raw_syscall};

/// A negated errno, as results carry it.
macro_rules! errnos {
    ($($name:ident = $number:literal),* $(,)?) => { $(pub const $name: i64 = -$number;)* };
}
errnos! {
    EINTR = 4, EBADF = 9, EAGAIN = 11, ENOMEM = 12, EFAULT = 14, EBUSY = 16, EINVAL = 22, ENFILE = 23,
    EPIPE = 32, ENOTSOCK = 88, EPROTONOSUPPORT = 93, EOPNOTSUPP = 95, ENOBUFS = 105, ECANCELED = 125,
}

pub const F_GETFD: usize = 1;
pub const F_SETFD: usize = 2;
pub const F_SETFL: usize = 4;
pub const F_SETOWN_EX: usize = 15;
const F_OWNER_TID: i32 = 0;
const O_ASYNC: usize = 0o20000;
pub const F_DUPFD_CLOEXEC: usize = 1030;
pub const FD_CLOEXEC: usize = 1;
pub const POLLIN: i16 = 1;
pub const POLLOUT: i16 = 4;
pub const POLLERR: i16 = 0x8;
pub const POLLHUP: i16 = 0x10;
pub const POLLNVAL: i16 = 0x20;
pub const POLLRDHUP: i16 = 0x2000;
pub const AF_UNIX: u16 = 1;
pub const SOCK_STREAM: usize = 1;
pub const SOCK_NONBLOCK: usize = 0o4000;
pub const SOCK_CLOEXEC: usize = 0o2000000;
pub const SOL_SOCKET: usize = 1;
pub const SO_PEERCRED: usize = 17;
pub const SO_ACCEPTCONN: usize = 30;
pub const SCM_RIGHTS: i32 = 1;
pub const SCM_PIDFD: i32 = 4;
pub const MSG_PEEK: usize = 0x2;
pub const MSG_CTRUNC: i32 = 0x8;
pub const MSG_DONTWAIT: usize = 0x40;
pub const MSG_NOSIGNAL: usize = 0x4000;
pub const MSG_CMSG_CLOEXEC: usize = 0x4000_0000;

/// unix(7)'s credentials of a peer.
#[repr(C)]
pub struct Ucred {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

/// recvmsg(2)'s header.
#[repr(C)]
pub struct MsgHdr {
    pub name: usize,
    pub name_len: usize,
    pub iov: *const IoVec,
    pub iov_len: usize,
    pub control: *mut u8,
    pub control_len: usize,
    pub flags: i32,
}

/// cmsg(3)'s header, as the kernel writes it.
#[repr(C)]
pub struct CmsgHdr {
    /// Bytes of the header and the data, without what is padded to 8 bytes.
    pub len: usize,
    pub level: i32,
    pub kind: i32,
}

/// A buffer for the kernel to fill.
#[repr(C)]
pub struct IoVec {
    pub base: *mut u8,
    pub len: usize,
}

/// An address of unix(7): the path ends with a zero, and nobody looks behind it.
#[repr(C)]
pub struct SockAddr {
    pub family: u16,
    pub path: [MaybeUninit<u8>; 108],
}

/// rt_sigaction(2)'s argument, as the kernel lays it out.
#[repr(C)]
pub struct SigAction {
    pub handler: usize,
    pub flags: u64,
    pub restorer: usize,
    pub mask: u64,
}

/// The start of sigaction(2)'s siginfo_t, for a signal that was sent with a value.
#[repr(C)]
pub struct SigInfo {
    pub signal: i32,
    pub errno: i32,
    pub code: i32,
    pub pad: i32,
    pub pid: i32,
    pub uid: u32,
    pub value: usize,
}

/// The code of a signal that was sent by sigqueue(3).
pub const SI_QUEUE: i32 = -1;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Copies inside this process, and faults are errors. Returns how many bytes were copied, or why none:
/// EFAULT, or what keeps the kernel from copying at all.
///
/// It is process_vm_writev(2) on this process, where there is such a call and it is allowed.
///
/// # Safety
///
/// What is written at `to` is memory that the controller has named, which may break its own server, or a
/// buffer of the caller's. No reference covers it that is used while or after it changes, but for the
/// caller's own to that buffer.
pub unsafe fn copy(to: u64, from: u64, len: u64) -> i64 {
    let size = len as usize;
    let source = IoVec { base: from as *mut u8, len: size };
    let target = IoVec { base: to as *mut u8, len: size };
    let pid = getpid();
    // SAFETY: the kernel checks both ranges; what is written there is the caller's promise.
    let copied = unsafe {
        raw_syscall!(Sysno::process_vm_writev, pid, &raw const source, 1, &raw const target, 1, 0)
            as i64
    };
    // SAFETY: the caller's promise.
    if copied == len as i64 { copied } else { unsafe { copy_through_pipe(to, from, len, copied) } }
}

/// Goes on with a copy of which so much is done, or that has failed so, through a pipe of its own: where
/// the call is missing or forbidden, and into memory that only a process itself reaches, such as
/// memfd_secret(2)'s.
///
/// # Safety
///
/// As for [`copy`].
#[cold]
#[inline(never)]
unsafe fn copy_through_pipe(to: u64, from: u64, len: u64, copied: i64) -> i64 {
    let mut done = copied.max(0) as u64;
    let mut ends = [0i32; 2];
    // SAFETY: the kernel fills in the two numbers.
    let made = unsafe {
        raw_syscall!(Sysno::pipe2, ends.as_mut_ptr(), SOCK_CLOEXEC | SOCK_NONBLOCK) as i64
    };
    if made == 0 {
        let [reading, writing] = ends;
        while done < len {
            let (to, from) = (to.wrapping_add(done), from.wrapping_add(done));
            // Neither side reaches into another page: all of it is there, or nothing. As much always
            // fits into a pipe.
            let step = (len - done).min(PAGE - to % PAGE).min(PAGE - from % PAGE);
            // SAFETY: the kernel only reads, and checks the address.
            let written = unsafe { raw_syscall!(Sysno::write, writing, from, step) as i64 };
            // SAFETY: the caller's promise.
            if written != step as i64 || unsafe { read(reading, to, step as usize) } != written {
                break;
            }
            done += step;
        }
        close(reading);
        close(writing);
    }
    if done != 0 || len == 0 {
        done as i64
    } else if copied == EFAULT || made == 0 {
        EFAULT
    } else {
        made
    }
}

/// read(2) into memory that may be anybody's: the kernel checks it.
///
/// # Safety
///
/// As for [`copy`].
pub unsafe fn read(fd: i32, to: u64, len: usize) -> i64 {
    // SAFETY: the kernel checks the range; what is written there is the caller's promise.
    unsafe { raw_syscall!(Sysno::read, fd, to, len) as i64 }
}

/// How many bytes [`transfer`] has not moved, and the result that stopped it then: a negated errno,
/// or 0 at the end of input.
pub struct Transferred {
    pub left: u64,
    pub stop: i64,
}

/// What a descriptor is waited for.
///
/// It is said anew wherever it matters, and never read from an entry that a kernel has had: gVisor
/// writes there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Read,
    Write,
}

/// read(2) or write(2) until all of the bytes are moved, waiting for a descriptor that is non-blocking.
/// An interruption stops it only if one of `others` is ready. The memory may be anybody's: the kernel
/// checks it.
///
/// # Safety
///
/// Where it reads, as for [`copy`].
pub unsafe fn transfer(
    end: &mut PollFd,
    direction: Direction,
    others: &mut [PollFd],
    mut address: u64,
    mut left: u64,
) -> Transferred {
    let number = if direction == Direction::Read { Sysno::read } else { Sysno::write };
    let mut stop = 0;
    while left > 0 {
        // SAFETY: the caller's promise; a write only reads memory.
        let mut n = unsafe { raw_syscall!(number, end.fd, address, left) as i64 };
        if n > 0 {
            address = address.wrapping_add(n as u64);
            left -= n as u64;
            continue;
        }
        if n == EAGAIN {
            n = poll(core::slice::from_mut(end), direction, Patience::Endless);
            if n != EINTR {
                if n < 0 {
                    make_blocking(end.fd);
                }
                continue;
            }
        }
        if n != EINTR || poll(others, Direction::Read, Patience::None) > 0 {
            stop = n;
            break;
        }
    }
    Transferred { left, stop }
}

/// close(2). A number below zero is nobody's descriptor and does no harm.
pub fn close(fd: i32) {
    // SAFETY: the descriptors closed here are the server's own.
    unsafe { raw_syscall!(Sysno::close, fd) };
}

/// shutdown(2) in both directions.
pub fn shutdown(fd: i32) {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::shutdown, fd, 2) };
}

/// How long to wait.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Only look.
    None,
    Endless,
}

/// ppoll(2) without a signal mask; or where that is refused, pselect6(2). Negative, and not EINTR: neither
/// may be used.
pub fn poll(fds: &mut [PollFd], direction: Direction, patience: Patience) -> i64 {
    let at_once = [0u64; 2];
    let timeout = if patience == Patience::None { at_once.as_ptr() } else { core::ptr::null() };
    // SAFETY: the kernel writes only `revents` of the entries in this slice, and `events` where it is
    // gVisor's.
    let ready = unsafe { raw_syscall!(Sysno::ppoll, fds.as_mut_ptr(), fds.len(), timeout, 0, 0) };
    if ready as i64 >= 0 || ready as i64 == EINTR {
        return ready as i64;
    }
    select(fds, direction, timeout)
}

/// The descriptors that [`select`] can wait for are those below: as many bits are a quarter of the stack
/// that there is.
const SELECTABLE: usize = 8192;

/// The same by pselect6(2). ppoll(2) fails where RLIMIT_NOFILE is less than the number of entries, which
/// this call does not look at.
///
/// That the other end is gone is the same to it as that there is something to read. A socket is asked by
/// sending nothing.
#[cold]
#[inline(never)]
fn select(fds: &mut [PollFd], direction: Direction, timeout: *const u64) -> i64 {
    const WORD: usize = u64::BITS as usize;
    let mut set = [0u64; SELECTABLE / WORD];
    for PollFd { fd, events, revents } in fds.iter_mut() {
        *revents = 0;
        // An entry of which nobody wants to know more than that its other end is gone is passed over.
        if *fd >= 0 && *events & (POLLIN | POLLOUT) != 0 {
            let Some(word) = set.get_mut(*fd as usize / WORD) else { return EINVAL };
            *word |= 1 << (*fd as usize % WORD);
            if fcntl(*fd, F_GETFD, 0) == EBADF {
                *revents = POLLNVAL;
                return 1;
            }
        }
    }
    let bits = set.as_mut_ptr() as usize;
    let (reading, writing) = if direction == Direction::Read { (bits, 0) } else { (0, bits) };
    // SAFETY: the kernel writes only to the set, which has as many bits.
    let ready = unsafe {
        raw_syscall!(Sysno::pselect6, SELECTABLE, reading, writing, 0, timeout, 0) as i64
    };
    for PollFd { fd, revents, .. } in fds {
        let word = if ready > 0 { set.get(*fd as usize / WORD) } else { None };
        if *fd >= 0 && word.is_some_and(|word| word >> (*fd as usize % WORD) & 1 != 0) {
            *revents =
                if send(*fd, core::ptr::null(), 0) == EPIPE { POLLIN | POLLHUP } else { POLLIN };
        }
    }
    ready
}

/// Makes a descriptor wait by itself, where nothing else can wait for it. If that can't be had either,
/// waits for a tenth of a second.
#[cold]
#[inline(never)]
pub fn make_blocking(fd: i32) {
    if fcntl(fd, F_SETFL, 0) < 0 {
        pause(100_000_000);
    }
}

/// From here on this thread gets SIGIO whenever something arrives at the socket. 0, or why not.
pub fn arm(source: i32) -> i64 {
    let owner = [F_OWNER_TID, gettid()];
    match fcntl(source, F_SETOWN_EX, owner.as_ptr() as usize) {
        0 => fcntl(source, F_SETFL, O_ASYNC | SOCK_NONBLOCK),
        error => error,
    }
}

/// Neither it nor any duplicate of it that somebody has is the source of signals any more, and those that
/// were sent have been delivered: on the way out of the call.
pub fn disarm(source: i32) {
    fcntl(source, F_SETFL, 0);
}

/// Takes all that has arrived at the socket, and with it signals that are pending, on the way out of the
/// last call.
pub fn drain(source: i32) {
    let mut bytes = 0u64;
    // SAFETY: into a number of this function's.
    while unsafe { read(source, &raw mut bytes as u64, size_of::<u64>()) } > 0 {}
}

/// Takes what an eventfd(2) that is ready has counted.
pub fn hear(bell: i32) {
    let mut count = 0u64;
    // SAFETY: into a number of this function's.
    unsafe { read(bell, &raw mut count as u64, size_of::<u64>()) };
}

/// Adds to what an eventfd(2) has counted.
pub fn ring(bell: i32) {
    let count = 1u64;
    // SAFETY: the kernel only reads the number.
    unsafe { raw_syscall!(Sysno::write, bell, &raw const count, size_of::<u64>()) };
}

/// Sleeps for so many nanoseconds, less than a second: where there is nothing to wait for.
pub fn pause(nanoseconds: u64) {
    let duration = [0, nanoseconds];
    // SAFETY: the kernel only reads the duration.
    unsafe { raw_syscall!(Sysno::nanosleep, duration.as_ptr(), 0) };
}

/// accept4(2): the new descriptor is non-blocking and closed on exec.
pub fn accept(listen: i32) -> i64 {
    // SAFETY: touches no memory.
    let fd =
        unsafe { raw_syscall!(Sysno::accept4, listen, 0, 0, SOCK_NONBLOCK | SOCK_CLOEXEC) as i64 };
    off_standard_streams(fd)
}

/// fcntl(2) with a number as its argument, or the address of something to read.
pub fn fcntl(fd: i32, command: usize, argument: usize) -> i64 {
    // SAFETY: changes no memory with the commands that are used here.
    unsafe { raw_syscall!(Sysno::fcntl, fd, command, argument) as i64 }
}

/// The first number that is no standard stream's. Where those are closed, the server's descriptors do not
/// take their place: what a program writes to its output must not get there.
const FIRST: usize = 3;

/// The lowest free descriptor that is no standard stream, closed on exec.
pub fn dup(fd: i32) -> i64 {
    fcntl(fd, F_DUPFD_CLOEXEC, FIRST)
}

/// A new descriptor, or a negated errno, as it is; or in the place of a standard stream a duplicate, if
/// there is room for one.
#[inline(never)]
pub fn off_standard_streams(fd: i64) -> i64 {
    if fd as usize >= FIRST {
        return fd;
    }
    let other = dup(fd as i32);
    if other < 0 {
        return fd;
    }
    close(fd as i32);
    other
}

/// getsockopt(2) of a SOL_SOCKET option into a plain value.
///
/// # Safety
///
/// Any bytes are a valid `T`.
unsafe fn getsockopt<T>(fd: i32, option: usize, value: &mut T) -> i64 {
    let mut len = size_of::<T>() as u32;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which stays valid: the caller's promise.
    unsafe {
        raw_syscall!(Sysno::getsockopt, fd, SOL_SOCKET, option, value as *mut T, &raw mut len)
            as i64
    }
}

/// Whether a socket is known to listen. gVisor says of none that it does.
pub fn listens(fd: i32) -> bool {
    let mut listens = 0i32;
    // SAFETY: a number.
    unsafe { getsockopt(fd, SO_ACCEPTCONN, &mut listens) };
    listens != 0
}

/// Whether a descriptor may be a listening socket: it is a socket, and not one that has a peer. One that has
/// not, and does not listen, polls as one whose other end is gone.
pub fn may_listen(fd: i32) -> bool {
    let mut address = SockAddr { family: 0, path: [MaybeUninit::uninit(); 108] };
    let mut len = size_of::<SockAddr>() as u32;
    // SAFETY: the kernel writes no more than `len` bytes to the address.
    let result =
        unsafe { raw_syscall!(Sysno::getpeername, fd, &raw mut address, &raw mut len) as i64 };
    !matches!(result, 0 | EBADF | ENOTSOCK)
}

/// The uid of who is at the other end of a socket of unix(7), or of who has called listen on it; a
/// negated errno if it can't be told.
pub fn peer_uid(fd: i32) -> i64 {
    let mut peer = Ucred { pid: 0, uid: 0, gid: 0 };
    // SAFETY: made of numbers.
    match unsafe { getsockopt(fd, SO_PEERCRED, &mut peer) } {
        0 => i64::from(peer.uid),
        error => error,
    }
}

/// recvmsg(2); descriptors that come are closed on exec. With MSG_PEEK all stays where it is, and they are
/// more copies of it: closing these is never the last time.
///
/// # Safety
///
/// What `message` points to can be written, as far as it says, and any bytes are valid there.
pub unsafe fn receive(fd: i32, message: &mut MsgHdr, flags: usize) -> i64 {
    // SAFETY: the kernel writes there and to the header, which is made of numbers: the caller's promise.
    unsafe {
        raw_syscall!(Sysno::recvmsg, fd, message as *mut MsgHdr, flags | MSG_CMSG_CLOEXEC) as i64
    }
}

/// sendto(2) on a connected socket: non-blocking, and no SIGPIPE.
pub fn send(fd: i32, from: *const u8, len: usize) -> i64 {
    // SAFETY: the kernel only reads the buffer.
    unsafe { raw_syscall!(Sysno::sendto, fd, from, len, MSG_DONTWAIT | MSG_NOSIGNAL, 0) as i64 }
}

/// Seconds of CLOCK_REALTIME.
pub fn now() -> i64 {
    let mut time = [0i64; 2];
    // SAFETY: a timespec is two 64-bit numbers.
    unsafe { raw_syscall!(Sysno::clock_gettime, 0, time.as_mut_ptr()) };
    let [seconds, _] = time;
    seconds
}

/// geteuid(2).
pub fn geteuid() -> i64 {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::geteuid) as i64 }
}

/// Whether there is such a thread of this process, not 0: tgkill(2) of nothing.
pub fn has_thread(tid: u32) -> bool {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::tgkill, getpid(), tid, 0) as i64 == 0 }
}

/// rt_sigprocmask(2): blocks exactly these signals, and returns those that were blocked before.
pub fn block_signals(signals: u64) -> Option<u64> {
    const SIG_SETMASK: usize = 2;
    let mut before = 0u64;
    // SAFETY: the kernel reads one mask and fills the other.
    let result = unsafe {
        raw_syscall!(Sysno::rt_sigprocmask, SIG_SETMASK, &raw const signals, &raw mut before, 8)
    };
    (result == 0).then_some(before)
}

/// sched_yield(2).
pub fn sched_yield() {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::sched_yield) };
}

/// prlimit(2) of RLIMIT_NOFILE of this process: sets the soft and the hard one unless `new` is null, and
/// returns those before.
pub fn limit_of_fds(new: Option<&[u64; 2]>) -> [u64; 2] {
    const RLIMIT_NOFILE: usize = 7;
    let mut before = [0; 2];
    let new = new.map_or(core::ptr::null(), |new| new.as_ptr());
    // SAFETY: the kernel only reads `new`, and fills `before`.
    unsafe { raw_syscall!(Sysno::prlimit64, 0, RLIMIT_NOFILE, new, before.as_mut_ptr()) };
    before
}

/// getpid(2).
pub fn getpid() -> i32 {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::getpid) as i32 }
}

/// gettid(2).
fn gettid() -> i32 {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::gettid) as i32 }
}

/// mprotect(2): makes memory readable and executable.
///
/// # Safety
///
/// What is there the controller has named, and no reference of the server's covers it.
pub unsafe fn make_executable(address: u64, len: u32) -> i64 {
    const READ_AND_EXECUTE: usize = 5;
    // SAFETY: the caller's promise.
    unsafe { raw_syscall!(Sysno::mprotect, address, len, READ_AND_EXECUTE) as i64 }
}

/// rt_sigaction(2): sets the action, unless it is null, and tells the one before, unless that is null.
///
/// # Safety
///
/// They are null or valid, and the handler in `action` is one.
pub unsafe fn sigaction(signal: usize, action: *const SigAction, before: *mut SigAction) {
    // SAFETY: the kernel only reads `action`, and fills `before`: the caller's promise.
    unsafe { raw_syscall!(Sysno::rt_sigaction, signal, action, before, 8) };
}

/// listen(2), on a socket that listens already: SO_PEERCRED of its clients names this process from here on.
/// The queue is as long as the longest that Linux allows unless it is told otherwise.
pub fn listen_again(fd: i32) {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::listen, fd, 4096) };
}

/// A listening socket of unix(7) at the first `len` bytes of `address`, for the owner alone.
pub fn listen(address: &SockAddr, len: usize) -> Result<i32, i64> {
    // SAFETY: none of these changes memory, and the kernel only reads the address: the caller has
    // written as many bytes of it.
    unsafe {
        let kind = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
        let fd =
            off_standard_streams(raw_syscall!(Sysno::socket, AF_UNIX as usize, kind, 0) as i64);
        let mask = raw_syscall!(Sysno::umask, 0o177);
        let bound = raw_syscall!(Sysno::bind, fd, address as *const SockAddr, len) as i64;
        raw_syscall!(Sysno::umask, mask);
        if bound < 0 {
            return Err(bound);
        }
        raw_syscall!(Sysno::listen, fd, 16);
        Ok(fd as i32)
    }
}

/// A descriptor (O_PATH) of the file at `path`, or a negated errno.
///
/// # Safety
///
/// `path` is a string that ends with a zero.
pub unsafe fn open_path(path: *const u8) -> i64 {
    const AT_FDCWD: isize = -100;
    const FLAGS: usize = 0o10000000 | 0o400000 | 0o2000000;
    // SAFETY: the caller's promise. The flags are O_PATH, O_NOFOLLOW and O_CLOEXEC.
    off_standard_streams(unsafe { raw_syscall!(Sysno::openat, AT_FDCWD, path, FLAGS, 0) as i64 })
}

/// exit_group(2).
pub fn exit_group(status: i32) -> ! {
    loop {
        // SAFETY: does not return.
        unsafe { raw_syscall!(Sysno::exit_group, status) };
    }
}
