//! Our end of a link's stream, as the runtime waits for it.
//!
//! It waits for something to read, and for room to write only while there is none: whenever the
//! server takes a request out of the socket there is room again, and being woken up for that costs
//! as much as being woken up for the reply. It waits for both with the one descriptor that there is: no
//! other one may be free.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Handle, Id};

/// Bytes that one read takes.
const READ_SIZE: usize = 64 * 1024;

/// As many bytes are copied to be written as one piece.
const COPY_MAX: usize = 8 * 1024;

thread_local! {
    /// Where they are put together.
    static COPY_BUFFER: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(COPY_MAX));
    /// Where bytes arrive: they are taken from there before anything else is read.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_SIZE].into());
}

/// A connected stream socket. It may be a blocking one: of the calls here only
/// [`Socket::wait_here`] waits for it.
pub(crate) struct Socket {
    stream: Arc<UnixStream>,
    /// How the runtime waits for something to read. It does not while threads wait for their own
    /// replies: it would be woken up for each.
    waiting: Mutex<Option<(Arc<Waiting>, Interest)>>,
    /// The runtime that waits.
    runtime: Id,
}

type Waiting = AsyncFd<Arc<UnixStream>>;

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> i32 {
        self.stream.as_raw_fd()
    }
}

impl Socket {
    /// Must be called within a tokio runtime.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        let stream = Arc::new(stream);
        let waiting = waiting(stream.clone(), Interest::READABLE)?;
        let runtime = Handle::current().id();
        Ok(Self {
            stream,
            waiting: Mutex::new(Some((Arc::new(waiting), Interest::READABLE))),
            runtime,
        })
    }

    /// The same stream for another connection: whoever still has this one can't wait for it any more.
    pub(super) fn renew(&self) -> Self {
        let waiting = Mutex::new(self.waiting().take());
        Self { stream: self.stream.clone(), waiting, runtime: self.runtime }
    }

    /// The same for a connection that is carried by the runtime around it. Must be called within one.
    pub(super) fn here(mut self) -> io::Result<Self> {
        let runtime = Handle::current().id();
        if self.runtime != runtime {
            self.set_waiting(None)?;
            self.runtime = runtime;
        }
        self.set_waiting(Some(Interest::READABLE))?;
        Ok(self)
    }

    /// Whether the other end has read all that was written.
    pub(super) fn is_read(&self) -> bool {
        let mut unread = 0;
        // SAFETY: for a socket the kernel stores an int there, and nothing else.
        let asked = unsafe { libc::ioctl(self.as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
        asked == 0 && unread == 0
    }

    /// Whether there is another end, and nothing of it to be read.
    pub(crate) fn is_open(&self) -> bool {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        recv(self.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
    }

    fn waiting(&self) -> MutexGuard<'_, Option<(Arc<Waiting>, Interest)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the runtime waits, if it waits for that too.
    fn waiting_for(&self, interest: Interest) -> Option<Arc<Waiting>> {
        let now = self.waiting();
        let waits = |(_, waits): &&(_, Interest)| waits.remove(interest) != Some(*waits);
        now.as_ref().filter(waits).map(|(waiting, _)| waiting.clone())
    }

    /// What the runtime waits for from here on. To be called by the task of the link alone, while that
    /// waits for nothing.
    pub(super) fn set_waiting(&self, interest: Option<Interest>) -> io::Result<()> {
        let mut now = self.waiting();
        if now.as_ref().map(|(_, interest)| *interest) != interest {
            // One descriptor can be waited for once.
            *now = None;
            if let Some(interest) = interest {
                *now = Some((Arc::new(waiting(self.stream.clone(), interest)?), interest));
            }
        }
        Ok(())
    }

    /// Waits on this thread, for as long as that, for something to read. Says whether there is.
    pub(super) fn wait_here(&self, limit: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, limit).is_ok_and(|ready| ready > 0)
    }

    /// Waits until there may be something to read.
    pub(super) async fn readable(&self) -> io::Result<()> {
        match self.waiting_for(Interest::READABLE) {
            Some(waiting) => waiting.readable().await.map(drop),
            None => std::future::pending().await,
        }
    }

    /// Waits until there may be room, and writes with `write`, which says whether it wants more.
    pub(super) async fn when_writable(&self, write: impl FnOnce() -> bool) -> io::Result<bool> {
        let Some(waiting) = self.waiting_for(Interest::WRITABLE) else {
            return std::future::pending().await;
        };
        let mut ready = waiting.writable().await?;
        let blocked = write();
        if blocked {
            ready.clear_ready();
        }
        Ok(blocked)
    }

    /// Writes what there is room for. Little is put together here: to copy it costs less than to have
    /// the kernel take it from many places.
    pub(super) fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if slices.len() == 1 || slices.iter().map(|slice| slice.len()).sum::<usize>() > COPY_MAX {
            return self.send(slices);
        }
        COPY_BUFFER.with_borrow_mut(|together| {
            together.clear();
            slices.iter().for_each(|slice| together.extend_from_slice(slice));
            self.send(&[IoSlice::new(together)])
        })
    }

    fn send(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(sendmsg::<()>(self.as_raw_fd(), slices, &[], flags, None)?)
    }

    /// Passes a descriptor, with one byte.
    pub(super) fn pass(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let rights = [fd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(self.as_raw_fd(), &[IoSlice::new(&[0])], &control, flags, None)?;
        Ok(())
    }

    /// Reads once, and gives what came to `take`.
    ///
    /// Where that did not fill the buffer the runtime waits for more without another try: there
    /// was no more. What arrives meanwhile it knows of.
    pub(super) fn read<R>(&self, take: impl FnOnce(&[u8]) -> R) -> io::Result<R> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut read = None;
            let again = self.try_read(|stream| {
                let n = recv(stream.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?;
                read = Some(n);
                let part = (1..buffer.len()).contains(&n);
                if part { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(n) }
            });
            read.map_or(again, Ok).map(|n| take(&buffer[..n]))
        })
    }

    /// Reads if there may be something, and tells the runtime if there is not any more.
    fn try_read<R>(&self, read: impl FnOnce(&UnixStream) -> io::Result<R>) -> io::Result<R> {
        match self.waiting_for(Interest::READABLE) {
            Some(waiting) => waiting.try_io(Interest::READABLE, |stream| read(stream)),
            None => read(&self.stream),
        }
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
        self.try_read(|stream| {
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

/// A stream that can be read or written.
fn waiting(stream: Arc<UnixStream>, interest: Interest) -> io::Result<Waiting> {
    // SAFETY: a stream owns its descriptor, and what is registered shares in it: it is open for as
    // long as that.
    Ok(unsafe { AsyncFd::register_with_interest(stream, interest) }?)
}
