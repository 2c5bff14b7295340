//! Calls on threads that wait for their own replies.
//!
//! In a ring the thread looks for the result itself. On a stream it reads the reply itself, and the
//! task that reads otherwise is told to stay away: being woken up for every reply, only to find that
//! it is gone, would cost as much as the call.

use std::os::fd::AsRawFd;

use nix::poll::PollTimeout;
use nix::sys::socket::{Shutdown, shutdown};
use smallvec::smallvec;

use super::Connection;
use super::batch::{Batch, Scope, value};
use super::state::{Reading, State};
use crate::error::Result;
use crate::proto::{Call, Replies};

/// How long a thread waits for its reply before it leaves that to the task, in milliseconds: others
/// who want the connection wait as long.
const LIMIT: u8 = 1;

impl Connection {
    /// Makes one call and waits for its value on this thread: the fastest way to make a call, for code
    /// that has nothing else to do meanwhile. It needs no runtime around it: the one on which the
    /// connection was made runs on other threads.
    ///
    /// Any number of threads and tasks may use the connection at the same time.
    ///
    /// # Errors
    ///
    /// As of [`Connection::call`].
    ///
    /// # Panics
    ///
    /// Where blocking would stop a runtime: on a thread that executes its tasks, if the result is not
    /// there at once.
    pub fn call_blocking(&self, name: &'static str, call: &Call) -> Result<u64> {
        let mut state = self.shared().lock_and_count();
        if !call.is_plain() || !state.is_in(self.tenure) {
            drop(state);
            return self.call(name, call.clone()).wait();
        }
        if let Some(ring) = state.usable_ring().filter(|ring| ring.is_idle()) {
            // Nobody else gets in between: the lock is held as long as it is worth to look.
            let index = match ring.call_alone(call) {
                Ok(reply) => return value(name, &[reply]),
                Err(index) => index,
            };
            let (complete, receipt) = self.receipt_of(name, call);
            let complete = ring.leave(index, call, Batch { complete, scope: Scope::AnyLink });
            drop(state);
            if complete {
                self.shared().collect();
            }
            return receipt.wait();
        }
        let Some(before) = state.begin_reading_here() else {
            drop(state);
            return self.call(name, call.clone()).wait();
        };
        let (complete, receipt) = self.receipt_of(name, call);
        state.stream.push(smallvec![call.clone()], Batch { complete, scope: Scope::AnyLink });
        if before == Reading::ByTask {
            self.shared().work.notify_one();
        }
        let complete = state.answer_here();
        if !state.stream_is_idle() {
            // It takes longer, or the stream is over: that is the task's.
            state.read_by_task();
            self.shared().work.notify_one();
        }
        drop(state);
        self.shared().complete(complete);
        receipt.wait()
    }
}

impl State {
    /// One more thread reads the reply to its own call, which is about to be queued, where nothing else is
    /// under way. Returns who has read before; none if the thread can't.
    fn begin_reading_here(&mut self) -> Option<Reading> {
        let is_idle =
            !self.ending.is_dead() && !self.writing.is_quiesced() && self.stream_is_idle();
        let up = self.link.up_mut().filter(|up| is_idle && up.ring.is_none())?;
        let calls = match up.reading {
            Reading::ByTask => 1,
            Reading::ByThreads { calls } => calls + 1,
        };
        Some(std::mem::replace(&mut up.reading, Reading::ByThreads { calls }))
    }

    /// Writes what is queued, and reads until that is answered, for a while.
    fn answer_here(&mut self) -> Vec<(Batch, Replies)> {
        let mut complete = Vec::new();
        let Some(stream) = self.link.stream().cloned() else { return complete };
        if self.flush() {
            return complete;
        }
        while !self.stream.is_answered() && stream.wait_here(PollTimeout::from(LIMIT)) {
            let read = stream.read_now(|bytes| (!bytes.is_empty()).then(|| self.receive(bytes)));
            match read {
                Ok(Some(arrived)) => {
                    complete.extend(arrived.complete);
                    if arrived.over {
                        let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
                        break;
                    }
                }
                _ => break,
            }
        }
        complete
    }
}
