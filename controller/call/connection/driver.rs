//! The task of a link: reads and completes, and writes what did not fit at once.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::{READ_SIZE, Shared, fail};

/// Reads and completes, and writes what did not fit at once, until the stream is over.
pub(super) async fn drive(shared: Arc<Shared>, stream: Arc<UnixStream>, epoch: u64) {
    let mut buffer = vec![0; READ_SIZE];
    let mut blocked = false;
    loop {
        tokio::select! {
            ready = stream.readable() => {
                if ready.is_err() || !read(&shared, &stream, epoch, &mut buffer) {
                    break;
                }
            }
            ready = stream.writable(), if blocked => {
                blocked = ready.is_ok() && flush(&shared, epoch);
            }
            () = shared.work.notified() => {
                if shared.lock().dead {
                    break;
                }
                blocked = flush(&shared, epoch);
            }
        }
    }
    let mut state = shared.lock();
    if state.epoch != epoch {
        // Another link took over, and has seen to what was under way on this one. Its task is the
        // one that is to be woken, if this one was in its place.
        drop(state);
        shared.work.notify_one();
        return;
    }
    let answered = state.drain();
    let mut failed = state.detach();
    if !state.persistent || state.closing || state.dead {
        failed.extend(state.bury());
    }
    drop(state);
    shared.complete(answered);
    shared.changed.send_replace(());
    fail(failed);
}

/// Reads once and completes what it can. False: the stream is over.
fn read(shared: &Shared, stream: &UnixStream, epoch: u64, buffer: &mut [u8]) -> bool {
    let mut state = shared.lock();
    if state.epoch != epoch {
        return false;
    }
    // Under the lock: whoever else reads what is left of an old link must not come in between.
    let (read, in_place) = match state.stream.data() {
        Some(mut place) => (stream.try_read_buf(&mut place), true),
        None => (read_all(stream, buffer), false),
    };
    let n = match read {
        Ok(0) => return false,
        Ok(n) => n,
        Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
    };
    if in_place {
        state.stream.took(n);
        return true;
    }
    let arrived = state.receive(&buffer[..n]);
    drop(state);
    shared.complete(arrived.complete);
    !arrived.over
}

/// Reads, and where that did not fill the buffer lets the runtime wait for more without another
/// try: there was no more. What arrives meanwhile it knows of.
fn read_all(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut read = None;
    let again = stream.try_io(Interest::READABLE, || {
        let n = recv(stream.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?;
        read = Some(n);
        if (1..buffer.len()).contains(&n) { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(n) }
    });
    read.map_or(again, Ok)
}

/// Writes what is queued, and ends the stream when that was the last. Says whether something is
/// left that could be written.
fn flush(shared: &Shared, epoch: u64) -> bool {
    let mut state = shared.lock();
    if state.epoch != epoch {
        return false;
    }
    let left = state.flush();
    if state.closing
        && state.stream.is_written()
        && let Some(stream) = state.link.stream()
    {
        let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
    }
    left
}
