//! The task of a link: reads and completes, and writes what did not fit at once.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::Interest;

use super::Shared;
use super::overdue::Overdue;
use super::socket::Socket;
use super::state::{Ending, Reading, State};

/// How long threads that wait for their own replies may make no call before the task waits again.
const THREADS_IDLE_AFTER: Duration = Duration::from_millis(50);

/// Reads and completes, and writes what did not fit at once, until the stream is over.
pub(super) async fn drive(shared: Arc<Shared>, stream: Arc<Socket>, epoch: u64) {
    let mut blocked = false;
    // There is nothing more to be read.
    let mut at_the_end = false;
    // Calls on threads that have waited for their own replies, when this was looked at last.
    let mut seen = 0;
    let mut overdue = Overdue::new();
    loop {
        let by_task = {
            let state = shared.lock();
            if state.epoch != epoch {
                break;
            }
            overdue.expect(&shared, &state);
            state.reading() == Reading::ByTask
        };
        let interest = match (by_task, blocked) {
            (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
            (true, false) => Some(Interest::READABLE),
            (false, true) => Some(Interest::WRITABLE),
            (false, false) => None,
        };
        if stream.set_waiting(interest).is_err() {
            break;
        }
        tokio::select! {
            // The time is not looked at where nobody waits for it.
            () = async { tokio::time::sleep(THREADS_IDLE_AFTER).await }, if !by_task => {
                seen = shared.lock().look_at_threads(seen);
            }
            () = overdue.is_due() => {
                overdue.look(&shared, epoch);
                blocked = flush(&shared, epoch);
            }
            ready = stream.readable() => {
                let read = if ready.is_err() { Read::Over } else { read(&shared, &stream, epoch) };
                if !matches!(read, Read::More) {
                    at_the_end = matches!(read, Read::End);
                    break;
                }
                // More may be under way now.
                blocked = flush(&shared, epoch);
            }
            left = stream.when_writable(|| flush(&shared, epoch)), if blocked => {
                // The runtime is being shut down.
                let Ok(left) = left else { break };
                blocked = left;
            }
            () = shared.work.notified() => {
                let (is_dead, is_corked) = {
                    let state = shared.lock();
                    (state.ending.is_dead(), state.writing.is_corked())
                };
                if is_dead {
                    break;
                }
                if is_corked {
                    tokio::task::yield_now().await;
                }
                blocked = flush(&shared, epoch);
            }
        }
    }
    end(&shared, epoch, at_the_end);
}

/// Ends the link, whose stream is over or can't be gone on with.
fn end(shared: &Shared, epoch: u64, at_the_end: bool) {
    let mut state = shared.lock();
    if state.epoch != epoch {
        // Another link took over, and has seen to what was under way on this one. Its task is the
        // one that is to be woken, if this one was in its place.
        drop(state);
        shared.work.notify_one();
        return;
    }
    let (answered, mut failed) = if at_the_end {
        (state.drain_ring(), state.forget_link())
    } else {
        (state.drain(), state.detach())
    };
    let is_final = matches!(state.ending, Ending::Closing | Ending::Dead { .. });
    if !state.persistent || is_final {
        failed.extend(state.bury());
    }
    failed.leaderless = state.ending.leaderless();
    let is_lost = state.link.is_down() && state.ending == Ending::Open;
    let down = state.callbacks.when_down.clone().filter(|_| is_lost);
    drop(state);
    shared.complete(answered);
    shared.changed.send_replace(());
    shared.fail(failed);
    if let Some(down) = down {
        down();
    }
}

/// What has become of a stream that was read.
enum Read {
    More,
    /// The other end has ended it.
    End,
    /// It can't be gone on with.
    Over,
}

/// Reads once and completes what it can.
fn read(shared: &Shared, stream: &Socket, epoch: u64) -> Read {
    let mut state = shared.lock();
    if state.epoch != epoch {
        return Read::Over;
    }
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock => Read::More,
        _ => Read::Over,
    };
    // Under the lock: whoever else reads what is left of an old link must not come in between.
    if let Some(mut place) = state.stream.data() {
        let most = place.limit();
        return match stream.read_into(place.get_mut(), most) {
            Ok(0) => Read::End,
            Ok(n) => {
                state.stream.took(n);
                Read::More
            }
            Err(error) => failed(error),
        };
    }
    let arrived = match stream.read(|bytes| (!bytes.is_empty()).then(|| state.receive(bytes))) {
        Ok(Some(arrived)) => arrived,
        Ok(None) => return Read::End,
        Err(error) => return failed(error),
    };
    drop(state);
    shared.complete(arrived.complete);
    if arrived.over { Read::Over } else { Read::More }
}

/// Writes what is queued, and ends the stream when that was the last. Says whether something is
/// left that could be written.
fn flush(shared: &Shared, epoch: u64) -> bool {
    let mut state = shared.lock();
    if state.epoch != epoch {
        return false;
    }
    let left = state.flush();
    if state.ending == Ending::Closing
        && state.stream.is_written()
        && !state.ring_is_busy()
        && let Some(stream) = state.link.stream()
    {
        let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
    }
    left
}

impl State {
    fn reading(&self) -> Reading {
        self.link.up().map_or(Reading::ByTask, |up| up.reading)
    }

    /// Has the task read again if threads have read no reply since there were `seen`. Returns how many they
    /// have by now.
    fn look_at_threads(&mut self, seen: u64) -> u64 {
        match self.reading() {
            Reading::ByThreads { calls } if calls != seen => calls,
            Reading::ByThreads { .. } => {
                // No more of them: the end of the stream is to be seen.
                self.read_by_task();
                0
            }
            Reading::ByTask => 0,
        }
    }
}
