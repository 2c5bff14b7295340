//! Descriptors of this process: made where no standard stream belongs.
//!
//! A program may have closed its standard input, output or error output. The next descriptor that is
//! made gets that number, and whoever writes to standard output then writes into it. So the library
//! moves each of its descriptors to 3 or above.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, fcntl};

/// The first descriptor that is no standard stream.
pub(crate) const FIRST: i32 = 3;

/// The descriptor itself, or in the place of one below 3 a duplicate of it, closed on exec.
pub(crate) fn off_standard_streams(fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() >= FIRST {
        return Ok(fd);
    }
    let duplicate = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(FIRST))?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(duplicate) })
}

/// A connected pair of stream sockets: socketpair(2).
pub(crate) fn socketpair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (one, other) = UnixStream::pair()?;
    Ok((off_standard_streams(one.into())?, off_standard_streams(other.into())?))
}
