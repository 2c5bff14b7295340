//! The server's own system calls: inlined, results as the kernel returns them.

use syscalls::{Sysno, raw_syscall};

/// A negated errno, as results carry it.
macro_rules! errnos {
    ($($name:ident = $number:literal),* $(,)?) => { $(pub const $name: i64 = -$number;)* };
}
errnos! {
    EINTR = 4, EBADF = 9, EAGAIN = 11, EFAULT = 14, EBUSY = 16, EINVAL = 22, EPROTONOSUPPORT = 93,
    ECONNABORTED = 103,
}

pub const POLLIN: i16 = 1;
pub const POLLOUT: i16 = 4;
pub const POLLHUP: i16 = 0x10;
pub const POLLNVAL: i16 = 0x20;
pub const AF_UNIX: u16 = 1;
pub const SOCK_STREAM: usize = 1;
pub const SOCK_NONBLOCK: usize = 0o4000;
pub const SOCK_CLOEXEC: usize = 0o2000000;
pub const SOL_SOCKET: usize = 1;
pub const SO_PEERCRED: usize = 17;
pub const SO_ACCEPTCONN: usize = 30;
pub const SCM_RIGHTS: i32 = 1;
pub const SCM_PIDFD: i32 = 4;
pub const MSG_CTRUNC: i32 = 0x8;
pub const MSG_DONTWAIT: usize = 0x40;
pub const MSG_NOSIGNAL: usize = 0x4000;
pub const MSG_CMSG_CLOEXEC: usize = 0x4000_0000;

/// poll(2)'s entry. A negative descriptor is passed over by the kernel.
#[repr(C)]
pub struct PollFd {
    pub fd: i32,
    pub events: i16,
    pub revents: i16,
}

impl PollFd {
    pub const fn new(fd: i32, events: i16) -> Self {
        Self { fd, events, revents: 0 }
    }
}

/// unix(7)'s credentials of a peer.
#[derive(Default)]
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
    pub control: *mut u64,
    pub control_len: usize,
    pub flags: i32,
}

/// A buffer for the kernel to fill.
#[repr(C)]
pub struct IoVec {
    pub base: *mut u8,
    pub len: usize,
}

/// rt_sigaction(2)'s argument, as the kernel lays it out.
#[repr(C)]
pub struct SigAction {
    pub handler: usize,
    pub flags: u64,
    pub restorer: usize,
    pub mask: u64,
}

/// read(2) into memory that may be anybody's: the kernel checks it.
pub fn read(fd: i32, to: u64, len: usize) -> i64 {
    // SAFETY: callers pass a buffer of their own, or an address that the controller named, which
    // no reference of ours covers.
    unsafe { raw_syscall!(Sysno::read, fd, to, len) as i64 }
}

/// write(2) from memory that may be anybody's: the kernel checks it.
pub fn write(fd: i32, from: u64, len: usize) -> i64 {
    // SAFETY: only reads memory, and a bad address is an error.
    unsafe { raw_syscall!(Sysno::write, fd, from, len) as i64 }
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

/// ppoll(2) without a timeout and without a signal mask.
pub fn poll(fds: &mut [PollFd]) -> i64 {
    // SAFETY: the kernel writes only `revents` of the entries in this slice.
    unsafe { raw_syscall!(Sysno::ppoll, fds.as_mut_ptr(), fds.len(), 0, 0, 0) as i64 }
}

/// Sleeps for a tenth of a second: for the one case in which a wait would return at once forever.
pub fn pause() {
    let duration = [0u64, 100_000_000];
    // SAFETY: the kernel only reads the duration.
    unsafe { raw_syscall!(Sysno::nanosleep, duration.as_ptr(), 0) };
}

/// accept4(2): the new descriptor is non-blocking and closed on exec.
pub fn accept(listen: i32) -> i64 {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::accept4, listen, 0, 0, SOCK_NONBLOCK | SOCK_CLOEXEC) as i64 }
}

/// fcntl(2) F_DUPFD_CLOEXEC: the lowest free descriptor that is not below `least`.
pub fn dup(fd: i32, least: i32) -> i64 {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::fcntl, fd, 1030, least) as i64 }
}

/// getsockopt(2) of a SOL_SOCKET option into a plain value.
pub fn getsockopt<T>(fd: i32, option: usize, value: &mut T) -> i64 {
    let mut len = size_of::<T>() as u32;
    // SAFETY: the kernel writes at most `len` bytes to `value`, and every bit pattern is valid for
    // the integers and structs of integers that this module uses as `T`.
    unsafe {
        raw_syscall!(Sysno::getsockopt, fd, SOL_SOCKET, option, value as *mut T, &raw mut len)
            as i64
    }
}

/// recvmsg(2), non-blocking; descriptors that come are closed on exec.
pub fn receive(fd: i32, message: &mut MsgHdr) -> i64 {
    // SAFETY: `message` names a buffer and a control buffer of the caller's.
    unsafe {
        raw_syscall!(Sysno::recvmsg, fd, message as *mut MsgHdr, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
            as i64
    }
}

/// sendto(2) on a connected socket: non-blocking, and no SIGPIPE.
pub fn send(fd: i32, from: *const u8, len: usize) -> i64 {
    // SAFETY: the kernel only reads the buffer.
    unsafe { raw_syscall!(Sysno::sendto, fd, from, len, MSG_DONTWAIT | MSG_NOSIGNAL, 0, 0) as i64 }
}

/// Seconds of CLOCK_REALTIME.
pub fn now() -> i64 {
    let mut time = [0i64; 2];
    // SAFETY: a timespec is two 64-bit numbers.
    unsafe { raw_syscall!(Sysno::clock_gettime, 0, time.as_mut_ptr()) };
    let [seconds, _] = time;
    seconds
}

/// getpid(2).
pub fn getpid() -> i32 {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::getpid) as i32 }
}

/// rt_sigaction(2).
pub fn sigaction(signal: usize, action: &SigAction) {
    // SAFETY: the kernel only reads `action`; handlers named there are in this image.
    unsafe { raw_syscall!(Sysno::rt_sigaction, signal, action as *const SigAction, 0, 8) };
}

/// A listening socket of unix(7) at the address in `address`, for the owner alone.
pub fn listen(address: &[u8; 110], len: usize) -> Result<i32, i64> {
    // SAFETY: none of these changes memory; the kernel reads `len` bytes of the address, and a
    // longer one than `address` is refused before it comes here.
    unsafe {
        let fd = raw_syscall!(Sysno::socket, AF_UNIX as usize, SOCK_STREAM | SOCK_CLOEXEC, 0);
        let mask = raw_syscall!(Sysno::umask, 0o177);
        let bound = raw_syscall!(Sysno::bind, fd, address.as_ptr(), len) as i64;
        raw_syscall!(Sysno::umask, mask);
        if bound < 0 {
            return Err(bound);
        }
        raw_syscall!(Sysno::listen, fd, 16);
        Ok(fd as i32)
    }
}

/// exit_group(2).
pub fn exit_group(status: i32) -> ! {
    loop {
        // SAFETY: does not return.
        unsafe { raw_syscall!(Sysno::exit_group, status) };
    }
}
