//! Calls on threads that wait for their own replies.
//!
//! In a ring the thread looks for the result itself. On a stream it reads the reply itself, and the
//! task that reads otherwise is told to stay away: being woken up for every reply, only to find that
//! it is gone, would cost as much as the call.

use std::os::fd::AsRawFd;

use nix::poll::PollTimeout;
use nix::sys::socket::{Shutdown, shutdown};
use smallvec::smallvec;

use super::state::{Link, State};
use super::{Batch, Connection, Scope, value};
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
        let alone = state.ring.is_none()
            && matches!(state.link, Link::Up(_))
            && !state.dead
            && state.quiesces == 0
            && state.stream.is_answered()
            && state.stream.is_written();
        if !alone {
            drop(state);
            return self.call(name, call.clone()).wait();
        }
        let (complete, receipt) = self.receipt_of(name, call);
        state.stream.push(smallvec![call.clone()], Batch { complete, scope: Scope::AnyLink });
        let before = state.alone;
        state.alone = Some(before.unwrap_or(0) + 1);
        if before.is_none() {
            self.shared().work.notify_one();
        }
        let complete = state.answer_here();
        if !state.stream.is_answered() || !state.stream.is_written() {
            // It takes longer, or the stream is over: that is the task's.
            state.alone = None;
            self.shared().work.notify_one();
        }
        drop(state);
        self.shared().complete(complete);
        receipt.wait()
    }
}

impl State {
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
