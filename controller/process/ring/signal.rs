//! What interrupts a call of a ring: a byte that is written to a source, whose other end the server has and
//! closes with the connection; or, for images that know of no source, a signal, which may come at any time
//! later.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use syscalls::{Sysno, syscall};

use crate::abi::ring::INTERRUPT_SIGNAL;
use crate::descriptor::off_standard_streams;
use crate::error::{Error, Result};

/// Both ends of a source: ours, and the one that a server is to have.
///
/// Of a socket of datagrams the server hears nothing when the other end is closed: a controller that
/// dies interrupts nothing.
pub(super) fn source() -> Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (one, other) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags)
        .map_err(Error::local("socketpair"))?;
    let off = |fd| off_standard_streams(fd).map_err(Error::io("dup"));
    Ok((off(one)?, off(other)?))
}

/// Interrupts the server at the other end, if that has not closed it.
pub(super) fn interrupt(source: &OwnedFd) -> Result<()> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    match send(source.as_raw_fd(), &[0], flags) {
        Ok(_) => Ok(()),
        // The connection is over there, and the call with it.
        Err(Errno::ECONNREFUSED | Errno::ENOTCONN | Errno::EPIPE | Errno::ECONNRESET) => Ok(()),
        // Many have been sent, and none was heard.
        Err(Errno::EAGAIN) => Err(Error::Signal),
        Err(errno) => Err(Error::local("send")(errno)),
    }
}

/// Sends a process the signal that interrupts a call of the ring at `address` in it.
pub(super) fn signal(pidfd: &OwnedFd, address: u64) -> Result<()> {
    /// siginfo_t, as far as it is used, and as large.
    #[repr(C)]
    struct Info {
        signal: i32,
        errno: i32,
        code: i32,
        pad: i32,
        pid: i32,
        uid: u32,
        value: u64,
        rest: [u64; 12],
    }
    const { assert!(size_of::<Info>() == 128) };
    let info = Info {
        signal: INTERRUPT_SIGNAL as i32,
        errno: 0,
        code: nix::libc::SI_QUEUE,
        pad: 0,
        pid: 0,
        uid: 0,
        value: address,
        rest: [0; 12],
    };
    // SAFETY: the kernel reads the structure, which is as large as it takes it to be.
    let sent = unsafe {
        syscall!(Sysno::pidfd_send_signal, pidfd.as_raw_fd(), INTERRUPT_SIGNAL, &raw const info, 0)
    };
    sent.map(|_| ())
        .map_err(|errno| Error::local("pidfd_send_signal")(Errno::from_raw(errno.into_raw())))
}
