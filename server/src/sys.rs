//! The server's own system calls, results as the kernel returns them. They are inlined, except where
//! one is made of more than the call itself.

use core::mem::MaybeUninit;

use syscalls::{Sysno, raw_syscall};

/// A negated errno, as results carry it.
macro_rules! errnos {
    ($($name:ident = $number:literal),* $(,)?) => { $(pub const $name: i64 = -$number;)* };
}
errnos! {
    EINTR = 4, EBADF = 9, EAGAIN = 11, EFAULT = 14, EBUSY = 16, EINVAL = 22, EPROTONOSUPPORT = 93, ECANCELED = 125,
}

pub const F_SETFD: usize = 2;
pub const F_SETFL: usize = 4;
pub const F_DUPFD_CLOEXEC: usize = 1030;
pub const FD_CLOEXEC: usize = 1;
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

/// process_vm_writev(2) on this process: copies inside it, and faults are errors. Returns how many
/// bytes were copied; a negative result says that it was none.
pub fn copy(to: u64, from: u64, len: u64) -> i64 {
    let len = len as usize;
    let source = IoVec { base: from as *mut u8, len };
    let target = IoVec { base: to as *mut u8, len };
    let pid = getpid();
    // SAFETY: the kernel checks both ranges. What is written is memory that the controller named,
    // or a buffer of the caller's.
    unsafe {
        raw_syscall!(Sysno::process_vm_writev, pid, &raw const source, 1, &raw const target, 1, 0)
            as i64
    }
}

/// read(2) into memory that may be anybody's: the kernel checks it.
pub fn read(fd: i32, to: u64, len: usize) -> i64 {
    // SAFETY: callers pass a buffer of their own, or an address that the controller named, which
    // no reference of ours covers.
    unsafe { raw_syscall!(Sysno::read, fd, to, len) as i64 }
}

/// read(2) or write(2), as `call` says, with memory that may be anybody's: the kernel checks it.
#[inline(always)]
pub fn transfer(call: Sysno, fd: i32, address: u64, len: u64) -> i64 {
    // SAFETY: as for `read`; a write only reads memory.
    unsafe { raw_syscall!(call, fd, address, len) as i64 }
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

/// ppoll(2) without a signal mask.
pub fn poll(fds: &mut [PollFd], patience: Patience) -> i64 {
    let at_once = [0u64; 2];
    let timeout = if patience == Patience::None { at_once.as_ptr() } else { core::ptr::null() };
    // SAFETY: the kernel writes only `revents` of the entries in this slice.
    unsafe { raw_syscall!(Sysno::ppoll, fds.as_mut_ptr(), fds.len(), timeout, 0, 0) as i64 }
}

/// Takes what an eventfd(2) that is ready has counted.
pub fn hear(bell: i32) {
    let mut count = 0u64;
    read(bell, &raw mut count as u64, size_of::<u64>());
}

/// Adds to what an eventfd(2) has counted.
pub fn ring(bell: i32) {
    let count = 1u64;
    // SAFETY: the kernel only reads the number.
    unsafe { raw_syscall!(Sysno::write, bell, &raw const count, size_of::<u64>()) };
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

/// fcntl(2) with a number as its argument.
pub fn fcntl(fd: i32, command: usize, argument: usize) -> i64 {
    // SAFETY: touches no memory.
    unsafe { raw_syscall!(Sysno::fcntl, fd, command, argument) as i64 }
}

/// The lowest free descriptor, closed on exec.
pub fn dup(fd: i32) -> i64 {
    fcntl(fd, F_DUPFD_CLOEXEC, 0)
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

/// The uid of who is at the other end of a socket of unix(7), or of who has called listen on it; a
/// negated errno if it can't be told.
pub fn peer_uid(fd: i32) -> i64 {
    let mut peer = Ucred { pid: 0, uid: 0, gid: 0 };
    match getsockopt(fd, SO_PEERCRED, &mut peer) {
        0 => i64::from(peer.uid),
        error => error,
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

/// A listening socket of unix(7) at the first `len` bytes of `address`, for the owner alone.
pub fn listen(address: &SockAddr, len: usize) -> Result<i32, i64> {
    // SAFETY: none of these changes memory, and the kernel only reads the address: the caller has
    // written as many bytes of it.
    unsafe {
        let kind = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
        let fd = raw_syscall!(Sysno::socket, AF_UNIX as usize, kind, 0);
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

/// exit_group(2).
pub fn exit_group(status: i32) -> ! {
    loop {
        // SAFETY: does not return.
        unsafe { raw_syscall!(Sysno::exit_group, status) };
    }
}
