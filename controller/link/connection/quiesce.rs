//! Quiescing a connection: for what must not come in between of others' calls, or behind one that takes
//! long.
//!
//! Any number of them may be under way at once, of one and of several links: a connection goes on
//! when the last one is over, so nobody ends somebody else's.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::sys::socket::{Shutdown, shutdown};

use super::state::{Link, State};
use super::{Batch, Connection, Corked, Receipt, Scope, Shared, Successor, budget, receipt};
use crate::error::{Error, Outcome, Result};
use crate::proto::{Call, Reply};

/// Keeps a connection from writing anything new until it is dropped.
#[must_use = "it is over when it is dropped"]
pub(crate) struct Quiesce(Arc<Shared>);

impl Drop for Quiesce {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.quiesces -= 1;
        state.flush();
        drop(state);
        self.0.work.notify_one();
        self.0.changed.send_replace(());
    }
}

impl State {
    pub(super) fn could_begin(&self, own: Option<&Quiesce>, tenure: Option<u64>) -> Result<bool> {
        match self.link {
            Link::Gone => Err(self.gone()),
            Link::Superseded(successor) => Err(successor.error(Outcome::NotExecuted)),
            _ if !self.is_in(tenure) => Err(Successor::GONE.error(Outcome::NotExecuted)),
            _ if self.dead => Err(self.gone()),
            Link::Down => Err(Error::Lost(Outcome::NotExecuted)),
            Link::Up(_) => {
                let paused = self.quiesces > usize::from(own.is_some());
                // What waits only for company came before.
                let behind = self.corked == Corked::Awaited || self.ring_is_busy();
                Ok(!paused && self.stream.is_answered() && !behind)
            }
        }
    }
}

impl Connection {
    /// Writes nothing new during the pause, on this link or another one: what comes waits in the queue.
    pub(crate) fn quiesce(&self) -> Quiesce {
        let mut state = self.shared().lock();
        state.uncork();
        state.quiesces += 1;
        Quiesce(self.shared().clone())
    }

    /// A pause in which nothing is unanswered, or the link is down.
    pub(crate) async fn quiesce_idle(&self) -> Quiesce {
        let mut changed = self.subscribe();
        let pause = self.quiesce();
        loop {
            let complete = {
                let state = self.shared().lock();
                if state.link.stream().is_none() || state.is_idle() {
                    return pause;
                }
                state.ring.as_ref().is_some_and(|ring| ring.attend())
            };
            if complete {
                self.shared().collect();
                continue;
            }
            // Nobody else may wait for what is under way.
            self.shared().work.notify_one();
            // The sender lives in what `self` holds.
            let _ = changed.changed().await;
        }
    }

    /// Returns when what has been answered so far is owned by its handles.
    pub(crate) async fn is_owned(&self) {
        let mut changed = self.subscribe();
        while self.shared().lock().completing > 0 {
            // The sender lives in what `self` holds.
            let _ = changed.changed().await;
        }
    }

    /// A pause, if nothing is unanswered.
    pub(crate) fn try_quiesce_idle(&self) -> Option<Quiesce> {
        let mut state = self.shared().lock();
        state.uncork();
        state.is_idle().then(|| {
            state.quiesces += 1;
            Quiesce(self.shared().clone())
        })
    }

    /// Sends a batch ahead of everything that is queued, in a pause of the caller's: over a link that
    /// is fresh or idle.
    pub(crate) fn submit_first<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        let (complete, receipt) = receipt(self.acquire(budget::size(&calls)), complete);
        let mut state = self.shared().lock();
        match &state.link {
            Link::Up(stream) if !state.dead && state.is_in(self.tenure) => {
                let stream = stream.clone();
                state.write_first(
                    [(calls.into(), Batch { complete, scope: Scope::ThisLink })],
                    &stream,
                );
                drop(state);
                self.shared().work.notify_one();
            }
            _ => {
                drop(state);
                let done = complete.with(Err(Error::Lost(Outcome::NotExecuted)));
                self.shared().budget.release(done);
            }
        }
        receipt
    }

    /// Sends a batch over the stream, right after `before`, if nothing is unanswered there and there is
    /// no pause but `own`: so it waits behind nothing. Else it does nothing, and returns `None`. So it does
    /// if something is queued that belongs to this link: its descriptors are on their way already, and
    /// those of `before` must not be taken for them.
    ///
    /// # Errors
    ///
    /// Without a link; and those of `before`.
    pub(crate) fn submit_if_idle<R: Send + 'static>(
        &self,
        own: Option<&Quiesce>,
        before: impl FnOnce() -> Result<()>,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Result<Option<Receipt<R>>> {
        let (complete, receipt) = receipt(self.acquire(budget::size(&calls)), complete);
        let mut state = self.shared().lock();
        if !state.could_begin(own, self.tenure)? || state.stream.has_queued(Batch::is_of_a_link) {
            return Ok(None);
        }
        before()?;
        if let Some(stream) = state.link.stream().cloned() {
            state
                .write_first([(calls.into(), Batch { complete, scope: Scope::ThisLink })], &stream);
        }
        drop(state);
        self.shared().work.notify_one();
        Ok(Some(receipt))
    }

    /// Whether [`Connection::submit_if_idle`] would send something now.
    ///
    /// # Errors
    ///
    /// As there.
    pub(crate) fn is_idle(&self, own: Option<&Quiesce>) -> Result<bool> {
        self.shared().lock().could_begin(own, self.tenure)
    }

    /// Ends the stream's writing side, and returns when the server has ended its own.
    ///
    /// If this is dropped while calls are under way, the connection goes on. Later, the link ends when the
    /// server sees that it is to.
    ///
    /// # Errors
    ///
    /// [`Error::LeaderExited`] if there is no server any more that could.
    pub(crate) async fn shut_down(&self) -> Result<()> {
        let _pause = self.quiesce_idle().await;
        let mut changed = self.subscribe();
        let epoch = {
            let mut state = self.shared().lock();
            state.leaving = true;
            state.epoch
        };
        // From here on its end is overdue.
        self.shared().work.notify_one();
        loop {
            {
                let state = self.shared().lock();
                // Another one may be there already.
                let link = state.link.stream().filter(|_| state.epoch == epoch);
                let Some(stream) = link else {
                    return if state.leaderless.is_some() { Err(state.gone()) } else { Ok(()) };
                };
                // A stream that is over already is what is wanted.
                let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
            }
            let _ = changed.changed().await;
        }
    }
}
