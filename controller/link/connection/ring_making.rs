//! When a busy connection gets a ring: after many batches on one link its owner is asked to make one.

use std::sync::{Arc, MutexGuard};

use super::state::State;
use super::{Connection, Shared};

/// After so many batches a ring is worth what it costs to make.
const BUSY_AFTER: u32 = 128;

/// The time at which `when_busy` is called again on the same link.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum WhenBusy {
    /// Never.
    Done,
    /// Before the next batch.
    CallAgain,
    /// After as many batches more as there have been.
    CallLater,
}

/// The batches of a link, and who is asked for a ring when they are many.
pub(super) struct RingMaking {
    /// Called when there have been many batches, and nothing is under way.
    when_busy: Option<Arc<dyn Fn() -> WhenBusy + Send + Sync>>,
    /// The number of batches that were submitted on this link.
    batches: u32,
    /// The number of batches after which `when_busy` is called.
    due_at: u32,
}

impl Default for RingMaking {
    fn default() -> Self {
        Self { when_busy: None, batches: 0, due_at: BUSY_AFTER }
    }
}

impl RingMaking {
    /// Begins anew, on a new link.
    pub(super) fn restart(&mut self) {
        (self.batches, self.due_at) = (0, BUSY_AFTER);
    }

    /// The next batch that finds nothing under way asks for a ring.
    pub(super) fn hasten(&mut self) {
        self.due_at = 0;
    }

    /// Counts one more batch, and returns whom to call if it is time.
    fn count(&mut self) -> Option<&Arc<dyn Fn() -> WhenBusy + Send + Sync>> {
        self.batches = self.batches.saturating_add(1);
        self.when_busy.as_ref().filter(|_| self.batches >= self.due_at)
    }

    /// Says when `when_busy` is called again.
    fn call_when_busy(&mut self, next: WhenBusy) {
        match next {
            WhenBusy::Done => {}
            WhenBusy::CallAgain => self.due_at = BUSY_AFTER,
            WhenBusy::CallLater => self.due_at = self.batches.saturating_mul(2),
        }
    }
}

impl Shared {
    /// The state, for one more batch.
    pub(super) fn lock_and_count(&self) -> MutexGuard<'_, State> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some(when_busy) = state.ring_making.count()
            && state.stream.is_answered()
        {
            let when_busy = when_busy.clone();
            let epoch = state.epoch;
            // What is begun there may fail before this goes on.
            state.ring_making.due_at = u32::MAX;
            drop(guard);
            let next = when_busy();
            guard = self.lock();
            if guard.epoch == epoch {
                guard.ring_making.call_when_busy(next);
            }
        }
        guard
    }
}

impl Connection {
    /// Calls `busy` before a batch that finds nothing under way, once there have been many on a link,
    /// and then when it says.
    pub(crate) fn when_busy(&self, busy: impl Fn() -> WhenBusy + Send + Sync + 'static) {
        self.shared().lock().ring_making.when_busy = Some(Arc::new(busy));
    }

    /// What `when_busy` has begun on that link is over: says when it is called again.
    pub(crate) fn call_when_busy(&self, epoch: u64, next: WhenBusy) {
        let mut state = self.shared().lock();
        if state.epoch == epoch {
            state.ring_making.call_when_busy(next);
        }
    }
}
