//! Our end of a link's stream, as the runtime waits for it.
//!
//! It waits for something to read, and for room to write only while there is none: whenever the
//! server takes a request out of the socket there is room again, and being woken up for that costs
//! as much as being woken up for the reply.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, recv, sendmsg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Bytes that one read takes.
const READ_SIZE: usize = 64 * 1024;

thread_local! {
    /// Where bytes arrive: they are taken from there before anything else is read.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_SIZE].into());
}

/// A connected stream socket. It may be a blocking one: no call here waits for it.
pub(crate) struct Socket(AsyncFd<UnixStream>);

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

impl Socket {
    /// Must be called within a tokio runtime.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        Ok(Self(waiting(stream, Interest::READABLE)?))
    }

    /// Waits until there may be something to read.
    pub(super) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }

    /// Waits until there is room to write.
    pub(super) async fn writable(&self) -> io::Result<()> {
        // A duplicate: one descriptor can be waited for once.
        let again = self.0.get_ref().try_clone()?;
        waiting(again, Interest::WRITABLE)?.writable().await.map(drop)
    }

    /// Writes what there is room for.
    pub(super) fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(sendmsg::<()>(self.as_raw_fd(), slices, &[], flags, None)?)
    }

    /// Reads once, and gives what came to `take`.
    ///
    /// Where that did not fill the buffer the runtime waits for more without another try: there
    /// was no more. What arrives meanwhile it knows of.
    pub(super) fn read<R>(&self, take: impl FnOnce(&[u8]) -> R) -> io::Result<R> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut read = None;
            let again = self.0.try_io(Interest::READABLE, |stream| {
                let n = recv(stream.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?;
                read = Some(n);
                let part = (1..buffer.len()).contains(&n);
                if part { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(n) }
            });
            read.map_or(again, Ok).map(|n| take(&buffer[..n]))
        })
    }

    /// The same, whether or not the runtime has heard of something to read.
    pub(super) fn read_now<R>(&self, take: impl FnOnce(&[u8]) -> R) -> io::Result<R> {
        BUFFER.with_borrow_mut(|buffer| {
            let n = recv(self.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?;
            Ok(take(&buffer[..n]))
        })
    }

    /// Reads once, up to `most` bytes, to the end of `place`. Returns how many came, 0 at the end
    /// of the stream.
    pub(super) fn read_into(&self, place: &mut Vec<u8>, most: usize) -> io::Result<usize> {
        place.reserve(most);
        self.0.try_io(Interest::READABLE, |stream| {
            let to = place.spare_capacity_mut();
            let (fd, flags) = (stream.as_raw_fd(), libc::MSG_DONTWAIT);
            // SAFETY: `most` bytes from `to` on belong to the vector: they were just reserved.
            let n = unsafe { libc::recv(fd, to.as_mut_ptr().cast(), most, flags) };
            let n = Errno::result(n)? as usize;
            // SAFETY: the kernel has written so many bytes behind those that were there.
            unsafe { place.set_len(place.len() + n) };
            Ok(n)
        })
    }
}

/// A stream that can be read or, with another interest, written.
fn waiting(stream: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    // SAFETY: a stream owns its descriptor, and keeps it open for as long as it is registered.
    Ok(unsafe { AsyncFd::register_with_interest(stream, interest) }?)
}
