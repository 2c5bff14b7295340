//! A batch under way: the links on which it may be executed, and what follows when it is complete or lost.

use super::Shared;
use super::passing::Passing;
use super::resume::LostBatches;
use crate::abi::log::LOG_CAPACITY;
use crate::error::{Error, Result};
use crate::proto::{Replies, Reply};

/// A batch under way.
pub(super) struct Batch {
    pub(super) complete: Completion,
    pub(super) scope: Scope,
}

/// The action that follows when a batch is complete or lost.
pub(super) enum Completion {
    /// It is one call, and all that is asked for is its value: most are, and nothing is allocated for
    /// that.
    Value {
        name: &'static str,
        result: oneshot::Sender<Result<u64>>,
        /// What it takes of the budget.
        size: usize,
    },
    Any(Box<dyn FnOnce(Result<Replies>) + Send>),
    /// Nothing: it has happened.
    Withdrawn,
}

/// The links on which a batch may be executed.
pub(super) enum Scope {
    AnyLink,
    /// The link that there is: the batch names what exists with that one only.
    ThisLink,
    /// Any link, over its data socket.
    DataSocket(Box<Passing>),
}

impl Completion {
    /// Returns how much of the budget is to be given back.
    #[must_use]
    pub(super) fn with(self, replies: Result<Replies>) -> usize {
        match self {
            Self::Value { name, result, size } => {
                // Nobody may wait for it any more.
                let _ = result.send(replies.and_then(|replies| value(name, &replies)));
                size
            }
            Self::Any(complete) => {
                complete(replies);
                0
            }
            Self::Withdrawn => 0,
        }
    }
}

impl Batch {
    pub(super) fn is_of_this_link(&self) -> bool {
        matches!(self.scope, Scope::ThisLink)
    }

    /// The batch names what this link has, or is moved to another one.
    pub(super) fn is_of_a_link(&self) -> bool {
        !matches!(self.scope, Scope::AnyLink)
    }

    /// Takes what the batch has sent, now that it has these replies. To be called in the order of the
    /// replies.
    pub(super) fn replied(&self, replies: &[Reply]) {
        if let Scope::DataSocket(passing) = &self.scope {
            passing.replied(replies);
        }
    }

    /// Nobody will know any more with what result the batch was executed.
    pub(super) fn give_up(&self) {
        if let Scope::DataSocket(passing) = &self.scope {
            passing.give_up();
        }
    }
}

/// The value of a call that was a batch of its own.
pub(super) fn value(name: &'static str, replies: &[Reply]) -> Result<u64> {
    let reply = replies.first().ok_or(Error::Protocol("no reply"))?;
    reply.value().map_err(Error::call(name))
}

impl Shared {
    /// Completes batches that were counted as completing, outside of the lock: a completion may submit.
    pub(super) fn complete(&self, mut batches: Vec<(Batch, Replies)>) {
        let count = batches.len();
        if count == 0 {
            return;
        }
        let mut done = 0;
        for (batch, replies) in batches.drain(..) {
            // What it has passed may be a child's end of something, and is not held here any more then.
            drop(batch.scope);
            done += batch.complete.with(Ok(replies));
        }
        self.budget.release(done);
        let mut state = self.lock();
        state.completing.count -= count;
        if batches.capacity() <= 2 * LOG_CAPACITY as usize {
            state.completing.list = batches;
        }
        drop(state);
        // Who comes to watch later looks at the state first, which says it by now.
        if self.changed.receiver_count() > 0 {
            self.changed.send_replace(());
        }
    }

    /// Completes batches that are lost with their errors, outside of the lock.
    pub(super) fn fail(&self, lost: LostBatches) {
        for (batch, outcome) in lost.batches {
            let error = match (lost.successor, lost.leaderless) {
                (Some(successor), _) => successor.error(outcome),
                (None, Some(pid)) => Error::LeaderExited { pid, outcome },
                (None, None) => Error::Lost(outcome),
            };
            drop(batch.scope);
            let done = batch.complete.with(Err(error));
            self.budget.release(done);
        }
    }
}
