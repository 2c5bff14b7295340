//! Quiescing a connection: for what must not come in between of others' calls, or behind one that takes
//! long.
//!
//! Any number of them may be under way at once, of one and of several links: a connection goes on
//! when the last one is over, so nobody ends somebody else's.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::sys::socket::{Shutdown, shutdown};

use super::batch::{Batch, Scope};
use super::receipt::{Receipt, receipt};
use super::state::{Link, State, Successor, Writing};
use super::{Connection, Shared, budget};
use crate::error::{Error, Outcome, Result};
use crate::proto::{Call, Reply};

/// Keeps a connection from writing anything new until it is dropped.
#[must_use = "it is over when it is dropped"]
pub(crate) struct Quiesce(Arc<Shared>);

impl Drop for Quiesce {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.writing.resume();
        state.flush();
        drop(state);
        self.0.work.notify_one();
        self.0.changed.send_replace(());
    }
}

impl State {
    pub(super) fn could_begin(&self, own: Option<&Quiesce>, tenure: Option<u64>) -> Result<bool> {
        match self.link {
            Link::Gone => Err(self.ending.error()),
            Link::Superseded(successor) => Err(successor.error(Outcome::NotExecuted)),
            _ if !self.is_in(tenure) => Err(Successor::GONE.error(Outcome::NotExecuted)),
            _ if self.ending.is_dead() => Err(self.ending.error()),
            Link::Down { .. } => Err(Error::Lost(Outcome::NotExecuted)),
            Link::Up(_) => {
                let is_quiesced = self.writing.quiesces() > usize::from(own.is_some());
                // What waits only for company came before.
                let behind =
                    self.writing == (Writing::Corked { awaited: true }) || self.ring_is_busy();
                Ok(!is_quiesced && self.stream.is_answered() && !behind)
            }
        }
    }
}

impl Connection {
    /// Writes nothing new while the returned value lives, on this link or another one: what comes waits in
    /// the queue.
    pub(crate) fn quiesce(&self) -> Quiesce {
        let mut state = self.shared().lock();
        state.uncork();
        state.writing.quiesce();
        Quiesce(self.shared().clone())
    }

    /// A [`Quiesce`] in which nothing is unanswered, or the link is down.
    pub(crate) async fn quiesce_idle(&self) -> Quiesce {
        let mut changed = self.subscribe();
        let quiesce = self.quiesce();
        loop {
            let complete = {
                let state = self.shared().lock();
                if !state.link.is_up() || state.is_idle() {
                    return quiesce;
                }
                state.attend_ring()
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
        while self.shared().lock().completing.count > 0 {
            // The sender lives in what `self` holds.
            let _ = changed.changed().await;
        }
    }

    /// A [`Quiesce`], if nothing is unanswered.
    pub(crate) fn try_quiesce_idle(&self) -> Option<Quiesce> {
        let mut state = self.shared().lock();
        state.uncork();
        state.is_idle().then(|| {
            state.writing.quiesce();
            Quiesce(self.shared().clone())
        })
    }

    /// Sends a batch ahead of everything that is queued, while the caller has quiesced the connection:
    /// over a link that is fresh or idle.
    pub(crate) fn submit_first<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        let (complete, receipt) = receipt(self.acquire(budget::size(&calls)), complete);
        let mut state = self.shared().lock();
        match &state.link {
            Link::Up(up) if !state.ending.is_dead() && state.is_in(self.tenure) => {
                let stream = up.stream.clone();
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
    /// no [`Quiesce`] but `own`: so it waits behind nothing. Else it does nothing, and returns `None`. So it does
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
        let _quiesce = self.quiesce_idle().await;
        let mut changed = self.subscribe();
        let epoch = {
            let mut state = self.shared().lock();
            state.ending.leave();
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
                    return match state.ending.leaderless() {
                        Some(_) => Err(state.ending.error()),
                        None => Ok(()),
                    };
                };
                // A stream that is over already is what is wanted.
                let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
            }
            let _ = changed.changed().await;
        }
    }
}
