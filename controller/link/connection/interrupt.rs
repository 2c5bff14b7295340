//! Interrupting a call: exactly that one returns EINTR, or it has completed.
//!
//! ```text
//!               withdrawn
//!   waiting ───────────────▶ over: never begun, and its receipt says so at once
//!      │ its turn comes
//!      ▼          `cancel`, signal
//!   running ──────────────────▶ over: EINTR, or complete
//! ```
//! Nobody who wants to interrupt a call waits for another one that does not end. What the server has
//! not begun is withdrawn. What can't be (a batch of several calls, a call that was not marked for it,
//! a server that does not know of it) is named in `cancel` until its turn comes, and gives way there to
//! an earlier call. Once a signal was sent for a call, the server begins no other one that a signal
//! could interrupt until that one is over, which takes some microseconds.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::batch::{Batch, Completion, Scope};
use super::receipt::{OnPoll, Receipt};
use super::ring::{RingContext, RingLink};
use super::state::Successor;
use super::{Connection, Shared};
use crate::abi::ring::Sent;
use crate::error::{Error, Outcome, Result};
use crate::proto::ring::Memory as _;
use crate::proto::{Call, Replies};

/// How often to look before the next look is left to a timer: an interrupted call is there in some
/// microseconds.
const LOOKS: u32 = 2000;
const PAUSE: Duration = Duration::from_millis(1);
/// So long a signal may take until it is heard. One that has not been heard by then is blocked there.
const PATIENCE: Duration = Duration::from_secs(1);

/// How calls of a ring are interrupted.
pub(crate) struct Interrupts {
    /// Sends a signal to the process, in this way. It is pending there when this returns.
    pub(crate) signal: Box<dyn Fn() -> Result<()> + Send + Sync>,
    pub(crate) sent: Sent,
    /// Calls that the server has not begun can be withdrawn.
    pub(crate) withdraws: bool,
}

/// The call that `cancel` names.
#[derive(Clone, Copy)]
pub(super) struct Interruption {
    index: u64,
    /// It was being executed, and a signal was sent, or is about to be.
    signalled: bool,
    /// Its turn had not come when it was named: the server sees that, and does not execute it.
    before_its_turn: bool,
}

/// What is to be done to interrupt a call.
enum Step {
    /// Nothing: it is complete. If it returned EINTR, whether that was because it was named before its
    /// turn.
    Over { before_its_turn: bool },
    /// Nothing more: it was withdrawn, and this completes it.
    Withdrawn(Batch, Replies),
    /// To send the signal.
    Signal,
    /// To wait for something to change.
    Wait,
}

/// Can interrupt the call that a [`Receipt`](super::Receipt) waits for. Clones interrupt the same one.
#[derive(Clone)]
pub struct Interrupter {
    shared: Arc<Shared>,
    common: Arc<RingContext>,
    /// Of its record.
    index: u64,
}

impl Interrupter {
    pub(super) fn new(shared: &Arc<Shared>, common: &Arc<RingContext>, index: u64) -> Self {
        Self { shared: shared.clone(), common: common.clone(), index }
    }

    /// Interrupts the call: it returns EINTR, without having begun if it is not its turn yet, unless it
    /// is complete already. Returns when it is complete. No other call notices anything.
    ///
    /// A call that stands alone and may wait is complete at once if it is not its turn yet. Others, such
    /// as a batch of several, are when their turn has come.
    ///
    /// # Errors
    ///
    /// [`Error::Signal`] after a second, while the call goes on, if the process has not heard: it blocks
    /// the signal or handles it in another way, or is in uninterruptible sleep.
    pub async fn interrupt(&self) -> Result<()> {
        self.end().await.map(|_| ())
    }

    /// The same; says of a call that was interrupted whether it had not begun, and so never will.
    pub(super) async fn end(&self) -> Result<bool> {
        let this = self.clone();
        // A signal that was announced is sent, whoever waits for it.
        let done = tokio::spawn(async move { this.interrupt_to_the_end().await });
        done.await.unwrap_or(Err(Error::Gone))
    }

    async fn interrupt_to_the_end(self) -> Result<bool> {
        let mut changed = self.shared.changed.subscribe();
        let _end = End(&self);
        loop {
            changed.mark_unchanged();
            match self.shared.step(&self.common, self.index) {
                Step::Over { before_its_turn } => return Ok(before_its_turn),
                Step::Withdrawn(batch, replies) => {
                    self.shared.complete(vec![(batch, replies)]);
                    return Ok(true);
                }
                Step::Signal => {
                    (self.common.interrupts.signal)()?;
                    return self.heard().await.map(|()| false);
                }
                Step::Wait => self.wait(&mut changed).await,
            }
        }
    }

    /// Waits until the call that the signal was sent for is complete, and the server has counted the
    /// signal, if it does.
    async fn heard(&self) -> Result<()> {
        let ring = self.common.memory.ring();
        let counts = self.common.interrupts.sent == Sent::ToBeCounted;
        let is_under_way = || self.shared.is_under_way(&self.common, self.index);
        let end = Instant::now() + PATIENCE;
        loop {
            for _ in 0..LOOKS {
                if (!counts || ring.is_heard()) && !is_under_way() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if Instant::now() > end {
                return Err(Error::Signal);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Waits until calls have been completed, or another interruption is over.
    async fn wait(&self, changed: &mut watch::Receiver<()>) {
        // Somebody has to hear of what is completed.
        if self.shared.attend_ring() {
            self.shared.collect();
        }
        // The sender lives in what `self` holds.
        let _ = changed.changed().await;
    }
}

/// Ends an interruption, also when its runtime is shut down meanwhile: the server waits for that.
struct End<'a>(&'a Interrupter);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.shared.end_interruption(&self.0.common, self.0.index);
    }
}

impl Shared {
    /// Does the next step of interrupting call `index`.
    fn step(&self, common: &RingContext, index: u64) -> Step {
        let mut state = self.lock();
        let Some(ring) = state.link.ring_mut().filter(|ring| ring.is_of(common)) else {
            return Step::Over { before_its_turn: false };
        };
        if !ring.calls.is_under_way(index) {
            let named = ring.interruption.filter(|named| named.index == index);
            let before_its_turn = named.is_some_and(|named| named.before_its_turn);
            return Step::Over { before_its_turn };
        }
        if common.interrupts.withdraws
            && let Some((batch, replies)) = ring.withdraw(index)
        {
            state.completing.count += 1;
            return Step::Withdrawn(batch, replies);
        }
        match ring.interruption {
            // Others wait for it until it is over, as do those who want the same.
            Some(Interruption { signalled: true, .. }) => return Step::Wait,
            Some(earlier) if earlier.index <= index => return Step::Wait,
            _ => {}
        }
        let shared = common.memory.ring();
        let signalled = shared.interrupt(index, common.interrupts.sent);
        // One that can be withdrawn, and was not, has begun.
        let before_its_turn =
            !common.interrupts.withdraws && !signalled && shared.result(index).is_none();
        ring.interruption = Some(Interruption { index, signalled, before_its_turn });
        if signalled { Step::Signal } else { Step::Wait }
    }

    /// Call `index` is not to be interrupted any more.
    fn end_interruption(&self, common: &RingContext, index: u64) {
        let mut state = self.lock();
        if let Some(ring) = state.link.ring_mut().filter(|ring| ring.is_of(common))
            && ring.interruption.take_if(|named| named.index == index).is_some()
        {
            common.memory.ring().interrupted(common.interrupts.sent);
            // It may have waited for this.
            ring.wake_server();
            drop(state);
            self.collect();
            self.changed.send_replace(());
        }
    }

    /// Whether call `index` is under way.
    fn is_under_way(&self, common: &RingContext, index: u64) -> bool {
        let state = self.lock();
        let ring = state.link.ring().filter(|ring| ring.is_of(common));
        ring.is_some_and(|ring| ring.calls.is_under_way(index))
    }

    /// Leaves what is under way in the ring to the task that hears the bell. True: something is complete.
    fn attend_ring(&self) -> bool {
        self.lock().attend_ring()
    }
}

impl RingLink {
    /// Withdraws a call that the server has not begun, and that stands alone.
    fn withdraw(&mut self, index: u64) -> Option<(Batch, Replies)> {
        // What was sent for a call that receives descriptors would be the next one's.
        let may = |batch: &Batch| !matches!(batch.scope, Scope::DataSocket(_));
        let place = Batch { complete: Completion::Withdrawn, scope: Scope::ThisLink };
        self.calls.withdraw(index, may, place)
    }
}

impl Connection {
    /// [`Connection::call`] of a call that is interrupted if it is not complete within `limit`, or is
    /// never executed if its turn has not come by then.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] says which of the two; [`Error::NotInterruptible`], and nothing is
    /// executed, if the process has no ring, or for execve(2); and as of [`Interrupter::interrupt`],
    /// while the call goes on.
    pub async fn call_within(
        &self,
        limit: Duration,
        name: &'static str,
        call: Call,
    ) -> Result<u64> {
        if call.executes() {
            return Err(Error::NotInterruptible);
        }
        self.needs_read_ahead("a deadline")?;
        let end = Instant::now().checked_add(limit);
        let timed_out = |begun| Error::TimedOut { call: name, begun };
        let handed_over = by(end, self.call_in_ring(name, call)).await;
        let mut receipt = handed_over.ok_or_else(|| timed_out(false))??;
        let interrupter = receipt.interrupter().ok_or(Error::NotInterruptible)?;
        if let Some(result) = by(end, &mut receipt).await {
            return result;
        }
        let withdrawn = interrupter.end().await?;
        match receipt.await {
            Err(Error::Call { errno: Errno::EINTR, .. }) => Err(timed_out(!withdrawn)),
            // It was faster.
            result => result,
        }
    }

    /// Hands a call over in the ring, once the stream is idle and there is room: its receipt has an
    /// [`Receipt::interrupter`], until it is polled.
    ///
    /// # Errors
    ///
    /// [`Error::NotInterruptible`], and nothing is executed, if the process has no ring.
    pub async fn call_in_ring(&self, name: &'static str, call: Call) -> Result<Receipt<u64>> {
        let mut changed = self.subscribe();
        loop {
            {
                let mut state = self.shared().lock();
                if state.ending.is_dead() {
                    return Err(state.ending.error());
                }
                if !state.is_in(self.tenure) {
                    return Err(Successor::GONE.error(Outcome::NotExecuted));
                }
                if state.link.ring().is_none() {
                    return Err(Error::NotInterruptible);
                }
                if let Some(ring) = state.usable_ring().filter(|ring| ring.has_room()) {
                    let (complete, mut receipt) = self.receipt_of(name, &call);
                    let index = ring.hand_over(&call, Batch { complete, scope: Scope::ThisLink });
                    receipt.on_poll = OnPoll::LookInRing(ring.waited(self.shared(), index));
                    return Ok(receipt);
                }
                let complete = state.attend_ring();
                drop(state);
                if complete {
                    self.shared().collect();
                    continue;
                }
            }
            // Nobody else may wait for what is under way.
            self.shared().work.notify_one();
            // The sender lives in what `self` holds.
            let _ = changed.changed().await;
        }
    }
}

/// What the future comes to, if that is by then; the end of time is no limit.
async fn by<F: Future>(end: Option<Instant>, future: F) -> Option<F::Output> {
    match end {
        Some(end) => timeout_at(end, future).await.ok(),
        None => Some(future.await),
    }
}
