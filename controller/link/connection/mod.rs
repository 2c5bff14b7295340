//! A connection: the I/O around [`Stream`](crate::proto::stream::Stream), shared by all tasks that call into
//! one process.
//!
//! Whoever submits a batch while nothing is under way writes it at once; a task of tokio's per link
//! ([`driver`]) reads, completes, and writes what has been queued meanwhile or did not fit. A batch is
//! completed by a closure that runs there, before the connection counts as idle: so what a call has made is
//! owned by a handle, or given back, at every instant at which others may look, also when nobody waits for
//! it any more.
//!
//! [`state`] has the states of a connection, drawn. In short: a link is up or down, or there will be none
//! any more. Only one that is up writes from the queue, and while the connection is quiesced ([`Quiesce`])
//! no more than the rest of a batch that is written in part. Where there is a [`ring`], batches go into that
//! while the stream is idle.

mod attach;
mod batch;
mod blocking;
mod budget;
mod driver;
mod exchange;
mod fd_transfer;
mod interrupt;
mod overdue;
mod passing;
mod quiesce;
mod receipt;
mod resume;
mod retire;
mod ring;
mod ring_making;
mod socket;
mod state;
mod submit;
#[cfg(test)]
mod tests;
mod version;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::{Notify, watch};

use budget::Budget;
pub(crate) use budget::Permit;
pub(crate) use fd_transfer::FdTransfer;
pub use interrupt::Interrupter;
pub(crate) use interrupt::Interrupts;
pub(crate) use overdue::HealthChecks;
pub(crate) use passing::{DataSocket, Inbox, take};
pub(crate) use quiesce::Quiesce;
pub use receipt::Receipt;
pub(crate) use resume::LinkHistory;
pub(crate) use ring::Bell;
pub(crate) use ring_making::WhenBusy;
pub(crate) use socket::Socket;
use state::State;
pub(crate) use state::Successor;

/// One controller's hold on one server. Clones are the same connection; when the last one is
/// dropped, what is queued still goes out, then the stream ends.
#[derive(Clone)]
pub struct Connection {
    handle: Arc<Handle>,
    /// The tenure whose calls this handle makes, and no others: see [`State::tenure`]. None: any.
    tenure: Option<u64>,
}

/// A reference to a connection that does not keep it up.
#[derive(Clone)]
pub(crate) struct WeakConnection(Weak<Handle>, Option<u64>);

impl WeakConnection {
    /// Whether it is that connection.
    pub(crate) fn is(&self, connection: &Connection) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&connection.handle))
    }

    /// Whether somebody still keeps it up.
    pub(crate) fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }

    pub(crate) fn upgrade(&self) -> Option<Connection> {
        self.0.upgrade().map(|handle| Connection { handle, tenure: self.1 })
    }
}

/// Ends the connection when it is dropped.
struct Handle(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// There is more to write, or the connection is to end.
    work: Notify,
    /// Whether the link's task already looks whether something is outstanding: then it need not be told of
    /// it. Changed to false under the state's lock alone.
    is_watched: AtomicBool,
    /// Sends a change whenever the link, or what may be handed over on it, or the number of unanswered calls
    /// may have changed.
    changed: watch::Sender<()>,
    budget: Arc<Budget>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the state is inconsistent: what could is outside of the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    fn shared(&self) -> &Arc<Shared> {
        &self.handle.0
    }

    /// The inode of this side's end of the stream: /proc shows by it who has that open.
    pub(crate) fn stream_inode(&self) -> Option<u64> {
        let state = self.shared().lock();
        Some(nix::sys::stat::fstat(state.link.stream()?).ok()?.st_ino)
    }

    /// This connection, for calls that are made in this tenure: once another controller has held
    /// the process, they are refused.
    pub(crate) fn of_this_tenure(&self) -> Self {
        let tenure = self.shared().lock().tenure;
        Self { handle: self.handle.clone(), tenure: Some(tenure) }
    }

    /// Whether another controller has held the process since the tenure that this handle is for.
    pub(crate) fn is_outdated(&self) -> bool {
        !self.shared().lock().is_in(self.tenure)
    }

    /// From here on the process outlives its links.
    pub(crate) fn set_persistent(&self) {
        self.shared().lock().persistent = true;
    }

    /// Whether the process outlives its links.
    pub(crate) fn is_persistent(&self) -> bool {
        self.shared().lock().persistent
    }

    /// Whether what is submitted waits for the link after `epoch`.
    pub(crate) fn is_down_after(&self, epoch: u64) -> bool {
        let state = self.shared().lock();
        state.epoch == epoch && state.link.is_down() && !state.ending.is_dead()
    }

    /// Whether `other` is the same connection.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.handle, &other.handle)
    }

    /// Whether there is a link.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        let state = self.shared().lock();
        state.link.is_up() && !state.ending.is_dead()
    }

    /// A reference that does not keep the connection up.
    pub(crate) fn downgrade(&self) -> WeakConnection {
        WeakConnection(Arc::downgrade(&self.handle), self.tenure)
    }

    /// A receiver that sees a change whenever calls have been answered or the link has changed.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.shared().changed.subscribe()
    }

    /// The number of the link that there is, or was last.
    pub(crate) fn epoch(&self) -> u64 {
        self.shared().lock().epoch
    }

    /// Whether calls go into a ring where they can.
    #[must_use]
    pub fn has_ring(&self) -> bool {
        self.shared().lock().link.ring().is_some()
    }
}
