//! The signal that interrupts a call of a ring.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use syscalls::{Sysno, syscall};

use crate::abi::ring::INTERRUPT_SIGNAL;
use crate::call::{Error, Result};

/// Sends a process the signal that interrupts a call of the ring at `address` in it.
pub(super) fn interrupt(pidfd: &OwnedFd, address: u64) -> Result<()> {
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
