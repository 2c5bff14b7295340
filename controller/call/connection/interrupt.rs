//! Interrupting a call: exactly that one returns EINTR, or it has completed.
//!
//! One at a time on a connection: until a signal has been heard that was sent for one call, the
//! server begins no other call that a signal could interrupt, and nobody else may be meant.

use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use super::ring::Common;
use super::{Batch, Connection, Of, Receipt, Shared, Successor, Until};
use crate::call::{Call, Error, Outcome, Result};

/// How often to look before the next look is left to a timer: an interrupted call is there in some
/// microseconds.
const LOOKS: u32 = 2000;
const PAUSE: Duration = Duration::from_millis(1);
/// So many pauses a signal may take until it is heard. One that has not been heard by then is blocked
/// there.
const PATIENCE: u32 = 1000;

/// Sends the signal to the process of the ring.
pub(super) type Signal = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// Whoever wants to interrupt a call of a ring, one after the other.
pub(super) struct Interrupts {
    signal: Signal,
    turn: tokio::sync::Mutex<()>,
}

impl Interrupts {
    pub(super) fn new(signal: Signal) -> Self {
        Self { signal, turn: tokio::sync::Mutex::default() }
    }
}

/// Can interrupt the call that a [`Receipt`](super::Receipt) waits for. Clones interrupt the same one.
#[derive(Clone)]
pub struct Interrupter {
    shared: Arc<Shared>,
    common: Arc<Common>,
    /// Of its record.
    index: u64,
}

impl Interrupter {
    pub(super) fn new(shared: &Arc<Shared>, common: &Arc<Common>, index: u64) -> Self {
        Self { shared: shared.clone(), common: common.clone(), index }
    }

    /// Interrupts the call: it returns EINTR, without having begun if it is not its turn yet, unless it
    /// is complete already. Returns when it is complete. No other call notices anything.
    ///
    /// A call that can't be interrupted, in uninterruptible sleep, keeps this waiting as long as it
    /// lasts.
    ///
    /// # Errors
    ///
    /// Where the signal can't be sent: the process has another user's rights now (EPERM), or it blocks
    /// the signal, 64, or handles it in another way.
    pub async fn interrupt(&self) -> Result<()> {
        let this = self.clone();
        // A signal that was announced is sent, whoever waits for it.
        let done = tokio::spawn(async move { this.interrupt_to_the_end().await });
        done.await.unwrap_or(Err(Error::Gone))
    }

    async fn interrupt_to_the_end(self) -> Result<()> {
        let Common { memory, interrupts, .. } = &*self.common;
        let _turn = interrupts.turn.lock().await;
        let Some(signal) = self.shared.begin_interrupt(memory, self.index) else {
            return Ok(());
        };
        let _end = End(&self);
        if signal {
            (interrupts.signal)()?;
        }
        self.complete().await
    }

    /// Waits until the call is complete and its signal, if there was one, has been heard.
    async fn complete(&self) -> Result<()> {
        let ring = self.common.memory.ring();
        let mut pauses = 0;
        loop {
            for _ in 0..LOOKS {
                if ring.is_heard() && !self.is_under_way() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if !ring.is_heard() {
                pauses += 1;
                if pauses > PATIENCE {
                    return Err(Error::Signal);
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The call has been handed over, on this link, and has no result yet.
    fn is_under_way(&self) -> bool {
        self.shared.is_under_way(&self.common.memory, self.index)
    }
}

/// Ends an interruption, also when its runtime is shut down meanwhile: the server waits for that.
struct End<'a>(&'a Interrupter);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.shared.end_interrupt(&self.0.common.memory);
    }
}

impl Connection {
    /// [`Connection::call`] of a call that is interrupted if it is not complete within `limit`, which
    /// counts from when it is handed over.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] if it was interrupted; [`Error::NotInterruptible`], and nothing is
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
        let mut receipt = self.call_in_ring(name, call).await?;
        let interrupter = receipt.interrupter().ok_or(Error::NotInterruptible)?;
        if let Ok(result) = tokio::time::timeout(limit, &mut receipt).await {
            return result;
        }
        interrupter.interrupt().await?;
        match receipt.await {
            Err(Error::Call { errno: Errno::EINTR, .. }) => Err(Error::TimedOut { call: name }),
            // It was faster.
            result => result,
        }
    }

    /// Hands a call over in the ring, once the stream is idle and there is room.
    async fn call_in_ring(&self, name: &'static str, call: Call) -> Result<Receipt<u64>> {
        let mut changed = self.watch();
        loop {
            {
                let mut state = self.shared().lock();
                if state.dead {
                    return Err(Error::Gone);
                }
                if !state.is_in(self.tenure) {
                    return Err(Successor::GONE.error(Outcome::NotExecuted));
                }
                if state.ring.is_none() {
                    return Err(Error::NotInterruptible);
                }
                if let Some(ring) = state.usable_ring().filter(|ring| ring.has_room()) {
                    let (complete, mut receipt) = self.receipt_of(name, &call);
                    let index = ring.hand_over(&call, Batch { complete, of: Of::ThisLink });
                    receipt.until = Until::Looked(ring.waited(self.shared(), index));
                    return Ok(receipt);
                }
                let complete = state.ring.as_ref().is_some_and(|ring| ring.attend());
                drop(state);
                if complete {
                    self.shared().collect();
                    continue;
                }
            }
            // The sender lives in what `self` holds.
            let _ = changed.changed().await;
        }
    }
}
