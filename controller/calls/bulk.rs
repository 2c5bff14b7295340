//! Large transfers on the same machine: through a pipe that holds pages instead of bytes, so that the
//! kernel copies them once, from one process's memory into the other's.
//!
//! ```text
//!   in    vmsplice(2) here: the pages are in the pipe      read(2) there: copied to their place
//!   out   vmsplice(2) there                                read(2) here
//! ```
//! A pipe holds a piece at a time: all of it is in the pipe before the other side reads, so neither
//! side waits for the other. Whoever transfers has the pipe for itself until its piece is through,
//! also if nobody waits for that any more. A pipe in which something may be left is not used again.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, vmsplice};
use nix::libc;
use nix::unistd::pipe2;
use syscalls::Sysno;
use tokio::sync::OwnedMutexGuard;

use super::{Task, last};
use crate::calls::handle::Fd;
use crate::descriptor::off_standard_streams;
use crate::error::{Error, Result, is_forbidden};
use crate::proto::batch::{Batch, Part, Places};
use crate::proto::{Call, Reply};

/// From how many bytes on a pipe is worth its two calls a piece.
const MUCH: usize = 256 * 1024;
/// What a pipe is asked to hold: as much as anybody may ask for.
const CAPACITY: usize = 1 << 20;
const PAGE: usize = 4096;

/// The pipes of a task, one for each direction.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    into: Arc<tokio::sync::Mutex<Option<Pipe>>>,
    out: Arc<tokio::sync::Mutex<Option<Pipe>>>,
    /// vmsplice(2) is forbidden here or there: the stream does it.
    refused: AtomicBool,
}

impl Pipes {
    /// Those that are used now are given up by who uses them.
    pub(super) fn forget(&self) {
        for place in [&self.into, &self.out] {
            if let Ok(mut pipe) = place.try_lock() {
                *pipe = None;
            }
        }
    }
}

#[derive(Debug)]
struct Pipe {
    here: OwnedFd,
    there: Fd,
    /// The most bytes of a piece.
    piece: usize,
}

/// A pipe that nobody else uses. What is dropped while a piece is in it takes the pipe with it.
struct Held {
    pipe: OwnedMutexGuard<Option<Pipe>>,
    empty: bool,
}

impl Drop for Held {
    fn drop(&mut self) {
        let is_stale = self.pipe.as_ref().is_some_and(|pipe| pipe.there.is_stale());
        if !self.empty || is_stale {
            *self.pipe = None;
        }
    }
}

/// Which end is here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Here {
    Writes,
    Reads,
}

impl Task {
    /// Whether a transfer to or from that address is worth a pipe: it is large, on the same machine,
    /// and not in memory that this process shares anyway.
    pub(super) fn is_bulk(&self, address: u64, len: usize) -> bool {
        len >= MUCH
            && self.connection.has_ring()
            && !self.shares(address)
            && !self.pipes.refused.load(Ordering::Relaxed)
    }

    /// Puts bytes into the target's memory. They come back if there can be no pipe.
    pub(super) async fn bulk_in(
        &self,
        address: u64,
        bytes: Vec<u8>,
    ) -> Result<std::result::Result<(), Vec<u8>>> {
        let Some(mut held) = self.pipe(Here::Writes).await? else { return Ok(Err(bytes)) };
        let len = bytes.len();
        let bytes = Arc::new(bytes);
        let mut done = 0;
        while done < len {
            held.empty = false;
            let Some(pipe) = &*held.pipe else { return Err(Error::Fault { address, len }) };
            let piece = pipe.piece.min(len - done);
            match fill(pipe, &bytes[done..done + piece]) {
                Ok(()) => {}
                Err(errno) if done == 0 && is_forbidden(errno) => {
                    self.pipes.refused.store(true, Ordering::Relaxed);
                    held.empty = true;
                    return Ok(Err(Arc::unwrap_or_clone(bytes)));
                }
                Err(errno) => return Err(Error::local("vmsplice")(errno)),
            }
            let to = address + done as u64;
            let there = pipe.there.number() as u64;
            let read = Call::syscall(Sysno::read, [there, to, piece as u64, 0, 0, 0]);
            let used = bytes.clone();
            let complete = move |replies: Vec<Reply>| {
                // The pages are in the pipe until here.
                let _used = used;
                let read = last(&replies)
                    .and_then(|reply| reply.value().map_err(|_| Error::Fault { address, len }));
                if read? != piece as u64 {
                    return Err(Error::Fault { address, len });
                }
                held.empty = true;
                Ok(held)
            };
            let in_part = |error: Error| if done > 0 { error.in_part() } else { error };
            held = self.connection.submit(vec![read], complete).await.map_err(in_part)?;
            done += piece;
        }
        Ok(Ok(()))
    }

    /// The bytes of the target's memory, or `None` if they can't come through a pipe: where there can be
    /// none, and from memory whose pages the kernel puts into none, such as memfd_secret(2)'s or what may
    /// only be written. What can be read there the stream finds out.
    pub(super) async fn bulk_out(&self, address: u64, len: usize) -> Result<Option<Vec<u8>>> {
        let Some(mut held) = self.pipe(Here::Reads).await? else { return Ok(None) };
        let mut bytes = Vec::new();
        if bytes.try_reserve_exact(len).is_err() {
            return Ok(None);
        }
        let iovec = self.buffer(2 * size_of::<u64>()).await?;
        let iovec = Arc::new(iovec);
        while bytes.len() < len {
            held.empty = false;
            let Some(pipe) = &*held.pipe else { return Err(Error::Fault { address, len }) };
            let piece = pipe.piece.min(len - bytes.len());
            let from = address + bytes.len() as u64;
            let flags = u64::from(SpliceFFlags::SPLICE_F_NONBLOCK.bits());
            let there = pipe.there.number().into();
            let mut batch = Batch::default();
            let at = batch.input(&[from, piece as u64].map(u64::to_le_bytes).concat());
            batch.syscall(Sysno::vmsplice, [there, at, 1.into(), flags.into()]);
            let Part { calls, .. } = batch.whole(Places { memory: iovec.address(), slot: 0 });
            let used = iovec.clone();
            let complete = move |replies: Vec<Reply>| {
                let _used = used;
                let spliced = last(&replies)?.value();
                held.empty = match (&*held.pipe, spliced) {
                    (Some(pipe), Ok(n)) if n == piece as u64 => drain(pipe, &mut bytes, piece),
                    // Nothing has come into it.
                    (_, Err(_)) => true,
                    _ => false,
                };
                match spliced {
                    Ok(_) if held.empty => Ok(Ok((held, bytes))),
                    other => Ok(Err(other.err())),
                }
            };
            match self.connection.submit(calls, complete).await? {
                Ok(next) => (held, bytes) = next,
                Err(why) => {
                    if why.is_some_and(is_forbidden) {
                        self.pipes.refused.store(true, Ordering::Relaxed);
                    }
                    return Ok(None);
                }
            }
        }
        Ok(Some(bytes))
    }

    /// The pipe in that direction, which is made if there is none. `None`: there can't be one.
    async fn pipe(&self, here: Here) -> Result<Option<Held>> {
        let place = match here {
            Here::Writes => self.pipes.into.clone(),
            Here::Reads => self.pipes.out.clone(),
        };
        let mut pipe = place.lock_owned().await;
        // One that was made for another table is not this task's any more.
        pipe.take_if(|pipe| self.number(&pipe.there).is_err());
        if pipe.is_none() {
            *pipe = self.make(here).await?;
        }
        Ok(pipe.is_some().then_some(Held { pipe, empty: true }))
    }

    async fn make(&self, here: Here) -> Result<Option<Pipe>> {
        let Ok((reads, writes)) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK) else {
            return Ok(None);
        };
        let (Ok(reads), Ok(writes)) = (off_standard_streams(reads), off_standard_streams(writes))
        else {
            return Ok(None);
        };
        // Who may not have as much has what there is.
        let _ = fcntl(&writes, FcntlArg::F_SETPIPE_SZ(CAPACITY as i32));
        let Ok(capacity) = fcntl(&writes, FcntlArg::F_GETPIPE_SZ) else { return Ok(None) };
        // Bytes that do not begin with a page reach into one more than they fill.
        let piece = (capacity as usize).saturating_sub(PAGE);
        if piece == 0 {
            return Ok(None);
        }
        let (ours, theirs) = match here {
            Here::Writes => (writes, reads),
            Here::Reads => (reads, writes),
        };
        let there = match self.send_fds(&[theirs.as_fd()]).await {
            Ok(mut fds) => fds.pop(),
            // No room in its table, or in this one for what passes it.
            Err(Error::Call { .. } | Error::Io { .. }) => None,
            Err(error) => return Err(error),
        };
        Ok(there.map(|there| Pipe { here: ours, there, piece }))
    }
}

/// Puts the pages of these bytes into the pipe, which is empty.
fn fill(pipe: &Pipe, mut bytes: &[u8]) -> nix::Result<()> {
    while !bytes.is_empty() {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        // SAFETY: the pages may be read until they are out of the pipe. Nobody changes the bytes until
        // then; where they are given up before, the pipe is given up too, and who reads what is still
        // in it reads something else, of memory that the kernel keeps as long.
        let n = unsafe { vmsplice(&pipe.here, &[IoSlice::new(bytes)], flags) }?;
        bytes = &bytes[n..];
    }
    Ok(())
}

/// Takes `piece` bytes out of the pipe, which has as many. False: it has not.
fn drain(pipe: &Pipe, bytes: &mut Vec<u8>, piece: usize) -> bool {
    let before = bytes.len();
    let mut got = 0;
    while got < piece {
        let room = &mut bytes.spare_capacity_mut()[..piece - got];
        // SAFETY: read(2) writes at most as many bytes there, and reads none: they need not be
        // initialized, and no reference to them is made.
        let n = unsafe { libc::read(pipe.here.as_raw_fd(), room.as_mut_ptr().cast(), room.len()) };
        if n <= 0 {
            return false;
        }
        got += n as usize;
        // SAFETY: the kernel has just filled as many behind those that there were.
        unsafe { bytes.set_len(before + got) };
    }
    true
}

#[cfg(test)]
mod tests {
    use nix::unistd::read;

    use super::*;

    #[test]
    fn a_pipe_holds_a_piece_wherever_it_begins() {
        let (reads, writes) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        let capacity = fcntl(&writes, FcntlArg::F_GETPIPE_SZ).unwrap() as usize;
        let bytes: Vec<u8> = (0..capacity + PAGE).map(|i| i as u8).collect();
        for start in [0, 1, 8, 100, PAGE - 1] {
            let piece = &bytes[start..start + capacity - PAGE];
            let mut sent = 0;
            while sent < piece.len() {
                let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
                // SAFETY: the bytes stay as they are until they have been read.
                sent +=
                    unsafe { vmsplice(&writes, &[IoSlice::new(&piece[sent..])], flags) }.unwrap();
            }
            let mut got = vec![0; piece.len()];
            let mut at = 0;
            while at < got.len() {
                at += read(&reads, &mut got[at..]).unwrap();
            }
            assert!(got == piece);
        }
    }
}
