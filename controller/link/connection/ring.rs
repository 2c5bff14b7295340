//! The ring of a connection: handing batches over, waiting for them, and the bells.
//!
//! The ring is a faster way beside the stream, and the order of calls is one: a batch goes into the
//! ring only while the stream is idle, and into the stream only while the ring is.
//!
//! ```text
//!                        result there
//!   handed over ──▶ looking ─────────────▶ complete ◀──────────────┐
//!                      │                                           │
//!                      └──────▶ `waiting`, then the server's bell ─┘
//!                 not within the time            (or the end of the link)
//! ```
//! Who waits for a batch looks for a while and then leaves it to the task that hears the bell. A
//! batch that nobody waits for is left to it at once.

use std::hint::spin_loop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::batch::{Batch, Scope, value};
use super::exchange::replied;
use super::interrupt::{Interrupter, Interruption, Interrupts};
use super::receipt::{OnPoll, Receipt};
use super::state::Ending;
use super::{Connection, Shared};
use crate::abi::ring::SHARP;
use crate::error::{Error, Result};
use crate::link;
use crate::link::polling::{Looks, Polling};
use crate::proto::resume::Unanswered;
use crate::proto::ring::Memory as _;
use crate::proto::ring::{Handed, Ring};
use crate::proto::{Call, Calls, Replies, Reply};

/// How often to look while others wait for the connection's lock: for some microseconds.
const LOOKS_UNDER_LOCK: u32 = SHARP + 50;

/// A ring, as long as the link lives on which the server was told of it.
pub(super) struct RingLink {
    pub(super) calls: Ring<Batch, link::Shared>,
    /// Wakes the server.
    pub(super) bell: OwnedFd,
    common: Arc<RingContext>,
    /// The call that the server is told to interrupt.
    pub(super) interruption: Option<Interruption>,
    /// Dropping it ends the task that hears the controller's bell.
    _attended: oneshot::Sender<()>,
}

/// The parts of a ring that all who wait for a call of it need.
pub(super) struct RingContext {
    pub(super) memory: Arc<link::Shared>,
    looks: Looks,
    pub(super) interrupts: Interrupts,
}

/// A batch in the ring, for the receipt that waits for it.
pub(super) struct RingReceipt {
    shared: Arc<Shared>,
    common: Arc<RingContext>,
    /// The number of its last record.
    index: u64,
    /// How many are under way, this one included.
    ahead: usize,
    /// The last call runs another program.
    pub(super) executes: bool,
}

/// What the server rings for a controller that sleeps, as the runtime waits for it.
pub(crate) struct Bell(AsyncFd<OwnedFd>);

impl Bell {
    /// Must be called within a tokio runtime.
    pub(crate) fn new(eventfd: OwnedFd) -> Result<Self> {
        // SAFETY: the descriptor is owned by what is registered.
        let bell = unsafe { AsyncFd::register_with_interest(eventfd, Interest::READABLE) };
        bell.map(Self).map_err(|error| Error::io("watching an eventfd")(error.into()))
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// What has become of a batch that was offered to a ring.
pub(super) enum Offered {
    HandedOver(u64),
    Complete(Batch, Replies),
    Back(Calls, Batch),
}

impl RingLink {
    /// Whether it is the ring in that memory.
    pub(super) fn is_of(&self, common: &RingContext) -> bool {
        Arc::ptr_eq(self.calls.memory(), &common.memory)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.calls.is_idle()
    }

    pub(super) fn offer(&mut self, calls: Calls, batch: Batch) -> Offered {
        match self.calls.push(calls, batch) {
            Handed::Back(calls, batch) => Offered::Back(calls, batch),
            Handed::Complete(batch, replies) => Offered::Complete(batch, replies),
            Handed::Over(index) => {
                self.wake_server();
                Offered::HandedOver(index)
            }
        }
    }

    /// Whether one more call can be handed over.
    pub(super) fn has_room(&self) -> bool {
        self.calls.has_room()
    }

    /// Hands over one call, for which there is room and which moves no bytes, so that it can be
    /// withdrawn.
    pub(super) fn hand_over(&mut self, call: &Call, batch: Batch) -> u64 {
        let index = self.calls.push_one_to_withdraw(call);
        self.calls.wait_for_one(index, call, batch);
        self.wake_server();
        index
    }

    /// Makes one call while nothing else is under way, and waits for its result as long as it is worth
    /// to look for it. Without one, it is handed over: see [`RingLink::leave`].
    pub(super) fn call_alone(&mut self, call: &Call) -> std::result::Result<Reply, u64> {
        self.call_for(call, u32::MAX)
    }

    /// The same for who can go on looking without keeping others out.
    fn call_briefly(&mut self, call: &Call) -> std::result::Result<Reply, u64> {
        self.call_for(call, LOOKS_UNDER_LOCK)
    }

    fn call_for(&mut self, call: &Call, most: u32) -> std::result::Result<Reply, u64> {
        let index = self.calls.push_one(call);
        self.wake_server();
        let ring = self.calls.memory().ring();
        let there =
            look(ring, index, 1, &self.common.looks, most).then(|| ring.result(index)).flatten();
        there.map(|result| Reply { result, data: Vec::new() }).ok_or(index)
    }

    /// Leaves call `index` to the task that hears the bell. True: it is complete.
    pub(super) fn leave(&mut self, index: u64, call: &Call, batch: Batch) -> bool {
        self.calls.wait_for_one(index, call, batch);
        self.attend()
    }

    /// What waits for call `index`.
    pub(super) fn waited(&self, shared: &Arc<Shared>, index: u64) -> RingReceipt {
        RingReceipt {
            shared: shared.clone(),
            common: self.common.clone(),
            index,
            ahead: self.calls.in_flight(),
            executes: false,
        }
    }

    /// After something was handed over, or the server need not wait any more.
    pub(super) fn wake_server(&self) {
        let ring = self.calls.memory().ring();
        let sleeps = ring.server_sleeps();
        ring.set_patience(self.common.looks.for_call(sleeps));
        if sleeps {
            // It does not fill up: the server empties it whenever it is woken.
            let _ = nix::unistd::write(&self.bell, &1u64.to_ne_bytes());
        }
        self.calls.prepare();
    }

    /// Leaves what is under way to the task that hears the bell. True: something is complete, and
    /// the server may not have seen that somebody waits for it.
    pub(super) fn attend(&self) -> bool {
        let ring = self.calls.memory().ring();
        self.calls.last().is_some_and(|last| !ring.wait_for(last))
    }

    /// Takes what is complete.
    pub(super) fn take_complete(&mut self, complete: &mut Vec<(Batch, Replies)>) {
        let before = complete.len();
        self.calls.take_complete(complete);
        replied(&complete[before..]);
        if self.calls.is_idle() {
            self.calls.memory().ring().awake();
        }
    }

    /// The link is over. Returns what is still under way, and the memory, which must not be dropped
    /// under the lock.
    pub(super) fn disconnect(
        self,
    ) -> (impl Iterator<Item = (Unanswered, Batch)>, Arc<link::Shared>) {
        let memory = self.calls.memory().clone();
        (self.calls.disconnect(), memory)
    }

    pub(super) fn memory(&self) -> Arc<link::Shared> {
        self.calls.memory().clone()
    }

    /// Some call of it is to be interrupted: the server may wait for that.
    pub(super) fn is_interrupting(&self) -> bool {
        self.interruption.is_some()
    }

    /// How many calls the server has answered in it.
    pub(super) fn answered(&self) -> u64 {
        self.calls.answered()
    }
}

impl RingReceipt {
    /// What interrupts the batch's last call.
    pub(super) fn interrupter(&self) -> Option<Interrupter> {
        let new = || Interrupter::new(&self.shared, &self.common, self.index);
        (!self.executes).then(new)
    }

    /// Looks for a while whether it is complete, and completes it. False: it is left to the task
    /// that hears the bell.
    pub(super) fn look(&self) -> bool {
        let RingContext { memory, looks, .. } = &*self.common;
        let ring = memory.ring();
        let there =
            look(ring, self.index, self.ahead, looks, u32::MAX) || !ring.wait_for(self.index);
        if there {
            self.shared.collect();
        }
        there
    }

    /// The link's task looks whether it takes long.
    pub(super) fn expect(&self) {
        self.shared.expect_reply();
    }

    /// Nobody waits for it any more.
    pub(super) fn leave(&self) {
        if !self.common.memory.ring().wait_for(self.index) {
            self.shared.collect();
        }
    }
}

/// Looks for a result for a while, which is longer the more calls come before it: `calls` with it. If
/// that is more than `most` times, those are not all, and to find nothing says nothing yet.
fn look(ring: &crate::abi::ring::Ring, index: u64, calls: usize, looks: &Looks, most: u32) -> bool {
    let times = looks.for_result(calls);
    for time in 0..times.min(most) {
        if ring.result(index).is_some() {
            looks.result(true);
            return true;
        }
        if time > SHARP {
            spin_loop();
        }
    }
    let there = ring.result(index).is_some();
    if there || times <= most {
        looks.result(there);
    }
    there
}

/// A call that was made where the ring was free.
enum Made {
    Complete(Result<u64>),
    UnderWay(Receipt<u64>),
}

impl Connection {
    /// [`Connection::call`], awaited. Where the ring is free and the result is there soon, nothing is
    /// allocated for it, and no other call of this connection's comes in between.
    pub(crate) async fn call_alone(&self, name: &'static str, call: Call) -> Result<u64> {
        // Else a task that does nothing but call would keep others from having their turn.
        tokio::task::coop::consume_budget().await;
        match self.make(name, call) {
            Made::Complete(result) => result,
            Made::UnderWay(receipt) => receipt.await,
        }
    }

    fn make(&self, name: &'static str, call: Call) -> Made {
        let mut state = self.shared().lock();
        let usable = call.is_plain() && state.is_in(self.tenure);
        let ring = state.usable_ring().filter(|ring| usable && ring.is_idle());
        let Some(ring) = ring else {
            drop(state);
            return Made::UnderWay(self.call_at_once(name, call));
        };
        let index = match ring.call_briefly(&call) {
            Ok(reply) => return Made::Complete(value(name, &[reply])),
            Err(index) => index,
        };
        let (complete, mut receipt) = self.receipt_of(name, &call);
        ring.calls.wait_for_one(index, &call, Batch { complete, scope: Scope::AnyLink });
        let waited = ring.waited(self.shared(), index);
        receipt.on_poll = OnPoll::LookInRing(RingReceipt { executes: call.executes(), ..waited });
        Made::UnderWay(receipt)
    }
}

impl Shared {
    /// Completes what is complete in the ring.
    pub(super) fn collect(&self) {
        let mut state = self.lock();
        let mut complete = std::mem::take(&mut state.completing.list);
        let Some(ring) = state.link.ring_mut() else { return };
        ring.take_complete(&mut complete);
        state.completing.count += complete.len();
        // The stream, or its end, has waited for the ring.
        let is_closing = state.ending == Ending::Closing;
        let turn = (is_closing || !state.stream.is_written()) && !state.ring_is_busy();
        drop(state);
        if turn {
            self.work.notify_one();
        }
        self.complete(complete);
    }
}

impl Connection {
    /// Calls go into the ring in `memory` from here on, where they can. The server was told of it on
    /// link `epoch`, and if that one is over nothing happens. Must be called within a tokio runtime.
    pub(crate) fn enter_ring(
        &self,
        epoch: u64,
        memory: Arc<link::Shared>,
        polling: Polling,
        interrupts: Interrupts,
        bell: OwnedFd,
        ours: Bell,
    ) {
        let mut state = self.shared().lock();
        if state.epoch != epoch {
            return;
        }
        let Some(up) = state.link.up_mut() else { return };
        let (attended, over) = oneshot::async_channel();
        let looks = Looks::new(polling);
        memory.ring().set_patience(looks.for_call(false));
        let calls = Ring::new(memory.clone());
        let common = Arc::new(RingContext { memory, looks, interrupts });
        let ring = RingLink { calls, bell, common, interruption: None, _attended: attended };
        let before = up.ring.replace(ring);
        up.answered_in_rings += before.map_or(0, |ring| ring.answered());
        tokio::spawn(attend(Arc::downgrade(self.shared()), ours.0, over));
    }
}

/// Completes what is complete whenever the bell rings, until the link is over.
async fn attend(
    shared: std::sync::Weak<Shared>,
    bell: AsyncFd<OwnedFd>,
    mut over: oneshot::AsyncReceiver<()>,
) {
    loop {
        tokio::select! {
            _ = &mut over => return,
            ready = bell.readable() => {
                let Ok(mut ready) = ready else { return };
                // The count stays: the runtime hears of every time that it grows, and it never fills up.
                ready.clear_ready();
                let Some(shared) = shared.upgrade() else { return };
                shared.collect();
            }
        }
    }
}
