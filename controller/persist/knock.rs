//! Interrupting a process for who waits at its listening socket, in a way that ends with the waiting.
//!
//! A signal that is sent late, by a controller that was stopped just before, meets a call of whoever holds
//! the process by then. So it is not sent from here. The kernel makes it of what arrives at a socket (O_ASYNC), and
//! that socket lies among what the client has sent and the server does not read. When the server closes
//! the client's socket, because it has answered or because another client has come, nothing keeps the
//! other one: what is sent to it later is refused. That is before the server hears of anybody else.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, send, sendmsg, socketpair,
};

use super::target::Target;
use crate::error::Result;

/// F_SETSIG of fcntl(2).
const F_SETSIG: libc::c_int = 10;

/// Interrupts a process as long as it has not answered a client.
pub(super) enum Knock {
    /// What arrives at the other end is a signal there.
    Socket(OwnedFd),
    /// This process may signal it and the kernel would not do so in its name: one with a capability that
    /// has another user's ids.
    Signal(Target),
}

impl Knock {
    /// For the client with that socket, on which all has been sent that belongs to the handshake.
    pub(super) fn new(target: Target, client: &impl AsFd) -> Self {
        match over(&target, client) {
            Ok(Some(here)) => Self::Socket(here),
            _ => Self::Signal(target),
        }
    }

    /// Interrupts the call that the process is blocked in. Where that is not allowed, the call may end by
    /// itself.
    pub(super) fn knock(&self) -> Result<()> {
        match self {
            Self::Socket(here) => {
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                // If many wait there already, the process is deaf.
                let _ = send(here.as_raw_fd(), &[0], flags);
                Ok(())
            }
            Self::Signal(target) => target.signal(Signal::SIGPIPE),
        }
    }
}

/// Our end, if the kernel signals the process for what arrives at the other one.
fn over(target: &Target, client: &impl AsFd) -> nix::Result<Option<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (here, there) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags)?;
    let set = |command, argument: libc::c_int| {
        // SAFETY: these commands take a number.
        Errno::result(unsafe { libc::fcntl(there.as_raw_fd(), command, argument) })
    };
    set(F_SETSIG, Signal::SIGPIPE as libc::c_int)?;
    if !target.becomes_owner_of(&there)? {
        return Ok(None);
    }
    set(libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK)?;
    sendmsg::<()>(
        client.as_fd().as_raw_fd(),
        &[IoSlice::new(&[0])],
        &[ControlMessage::ScmRights(&[there.as_raw_fd()])],
        MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        None,
    )?;
    Ok(Some(here))
}
