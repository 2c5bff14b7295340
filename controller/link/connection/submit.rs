//! Submitting batches: into the ring if that is usable, and else to the stream's queue.
//!
//! A batch that finds nothing under way is written at once, or is corked: it waits until somebody waits for
//! it, or for company. Behind others it is left to the link's task, which writes all that has been queued
//! together.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, MutexGuard};

use nix::sys::socket::{Shutdown, shutdown};
use smallvec::smallvec;

use super::batch::{Batch, Completion, Scope};
use super::budget::{self, Permit};
use super::passing::{DataSocket, Inbox, Passing};
use super::receipt::{OnPoll, Receipt, channel, receipt};
use super::ring::Offered;
use super::state::{Link, State, Successor, Writing};
use super::{Connection, Shared};
use crate::error::{Error, Outcome, Result};
use crate::proto::{Call, Calls, Replies, Reply};

/// The number of queued batches that are company enough: as many as one write takes.
pub(super) const CORK_MAX: usize = 64;

/// The link and the tenure that a batch is submitted for: on others it is refused.
#[derive(Clone, Copy)]
struct ValidFor {
    /// The link of that [`Connection::epoch`].
    link: Option<u64>,
    /// See [`State::tenure`].
    tenure: Option<u64>,
}

/// The time at which a batch is written, if nothing is under way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flush {
    Now,
    /// When somebody waits for it, or else as the next.
    WhenAwaited,
    /// With the next batch, or when all tasks that can have had their turn.
    WithNext,
}

/// What becomes of a batch before it is handed over.
enum Admission {
    Admitted,
    /// The link is over, though its end has not been read: the batch waits for the next one.
    Queued,
    /// The batch is complete without being handed over.
    Complete(Result<Replies>),
}

impl Connection {
    /// Returns when the connection is ready for more calls: at once, unless 16 MiB of data or 16,384 calls
    /// are under way or wait for a connection; then, when half of that is done.
    ///
    /// The methods of [`Task`](crate::calls::Task) and chains wait for it by themselves. Nothing is
    /// reserved: who has waited submits at once.
    pub async fn ready(&self) {
        self.shared().budget.ready().await;
    }

    /// A permit that counts `bytes` besides those of calls until it is dropped: what a batch owns in the
    /// target.
    pub(crate) fn acquire(&self, bytes: usize) -> Permit {
        self.shared().budget.acquire(bytes)
    }

    /// Sends `calls` together, in order, with nothing in between, and completes with what
    /// `complete` makes of their replies. While the connection is down the batch waits.
    ///
    /// This does not wait until the connection is ready: the queue has no bound of its own. A program that submits more
    /// than it awaits calls [`Connection::ready`] in between.
    ///
    /// `complete` runs on the connection's task and must not block. What must live until the
    /// server is done with the batch (buffers) it owns.
    ///
    /// Calls one of which announces other bytes than it brings complete with [`Error::Misuse`], and
    /// none of them is sent.
    pub fn submit<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        if let Some(error) = calls.iter().find_map(|call| call.check().err()) {
            return Receipt::failed(error);
        }
        self.submit_as(calls, complete, Flush::Now)
    }

    /// Like [`Connection::submit`], for what nobody waits for: it goes out together with what is submitted next, if
    /// that is soon.
    pub(crate) fn submit_soon<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        self.submit_as(calls, complete, Flush::WithNext)
    }

    /// Like [`Connection::submit`], for what passes descriptors over the data socket of the link that there
    /// is: its calls receive `fds`, or send a descriptor, which is in the inbox when the replies are here. A
    /// link that is lost takes none of that away: what was not executed goes on over the next one's data
    /// socket.
    ///
    /// The socket is exchanged together with the link, and not before this returns.
    pub(crate) fn submit_passing<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        socket: &DataSocket,
        fds: &[BorrowedFd<'_>],
        complete: impl FnOnce(Vec<Reply>, &Inbox) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        let keep = self.shared().lock().persistent;
        let (passing, inbox) = match Passing::over(socket, fds, &calls, keep) {
            Ok(both) => both,
            Err(error) => return Receipt::failed(error),
        };
        let complete = move |replies| complete(replies, &inbox);
        let (complete, mut receipt) = receipt(self.acquire(budget::size(&calls)), complete);
        let batch = Batch { complete, scope: Scope::DataSocket(Box::new(passing)) };
        let pass = || if fds.is_empty() { Ok(()) } else { socket.pass(fds) };
        let valid_for = ValidFor { link: None, tenure: self.tenure };
        receipt.on_poll = self.shared().submit(calls.into(), batch, valid_for, Flush::Now, pass);
        receipt
    }

    /// Like [`Connection::submit`], for what was found out on the link of that [`Connection::epoch`] and holds as long as
    /// that: on another one, before which another controller may have held the process, it is not
    /// executed.
    pub(crate) fn submit_on_this_link<R: Send + 'static>(
        &self,
        epoch: u64,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        let (complete, mut receipt) = receipt(self.acquire(budget::size(&calls)), complete);
        let batch = Batch { complete, scope: Scope::ThisLink };
        let valid_for = ValidFor { link: Some(epoch), tenure: self.tenure };
        receipt.on_poll =
            self.shared().submit(calls.into(), batch, valid_for, Flush::Now, || Ok(()));
        receipt
    }

    fn submit_as<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
        flush: Flush,
    ) -> Receipt<R> {
        let (complete, mut receipt) = receipt(self.acquire(budget::size(&calls)), complete);
        let batch = Batch { complete, scope: Scope::AnyLink };
        let valid_for = ValidFor { link: None, tenure: self.tenure };
        receipt.on_poll = self.shared().submit(calls.into(), batch, valid_for, flush, || Ok(()));
        receipt
    }

    /// The completion of a call that is a batch of its own, and the receipt that waits for its value. The share of the budget that it
    /// takes is given back by [`Completion::with`] alone: it is to be submitted.
    pub(super) fn receipt_of(&self, name: &'static str, call: &Call) -> (Completion, Receipt<u64>) {
        let size = budget::size(std::slice::from_ref(call));
        self.shared().budget.charge(size);
        let (result, receipt) = channel();
        (Completion::Value { name, result, size }, receipt)
    }

    /// [`Connection::submit`] of one system call or operation, completed with its value.
    ///
    /// On a stream on which nothing is under way it goes out when somebody waits for it, or else when all
    /// tasks that can have had their turn: together with what has been submitted by then.
    pub fn call(&self, name: &'static str, call: Call) -> Receipt<u64> {
        if let Err(error) = call.check() {
            return Receipt::failed(error);
        }
        self.call_as(name, call, Flush::WhenAwaited)
    }

    /// Like [`Connection::call`], for what nothing is going to follow before it is awaited.
    pub(crate) fn call_at_once(&self, name: &'static str, call: Call) -> Receipt<u64> {
        self.call_as(name, call, Flush::Now)
    }

    fn call_as(&self, name: &'static str, call: Call, flush: Flush) -> Receipt<u64> {
        let (complete, mut receipt) = self.receipt_of(name, &call);
        let batch = Batch { complete, scope: Scope::AnyLink };
        let calls = smallvec![call];
        let valid_for = ValidFor { link: None, tenure: self.tenure };
        receipt.on_poll = self.shared().submit(calls, batch, valid_for, flush, || Ok(()));
        receipt
    }
}

impl State {
    /// Whether a batch may be handed over or queued. If there is a link it has `before` done first, which
    /// returns [`Error::Lost`] where the link is over.
    #[inline]
    fn admit(
        &self,
        calls: &Calls,
        batch: &Batch,
        valid_for: ValidFor,
        before: impl FnOnce() -> Result<()>,
    ) -> Admission {
        let not_executed = || Error::Lost(Outcome::NotExecuted);
        let refusal = match &self.link {
            Link::Gone => self.ending.error(),
            _ if self.ending.is_dead() => self.ending.error(),
            Link::Superseded(successor) => successor.error(Outcome::NotExecuted),
            _ if !self.is_in(valid_for.tenure) => Successor::GONE.error(Outcome::NotExecuted),
            Link::Down { .. } if batch.is_of_this_link() => not_executed(),
            _ if valid_for.link.is_some_and(|epoch| epoch != self.epoch) => not_executed(),
            // It is complete as it is.
            _ if calls.is_empty() => return Admission::Complete(Ok(Replies::new())),
            Link::Down { .. } => return Admission::Admitted,
            Link::Up(up) => match before() {
                Ok(()) => return Admission::Admitted,
                Err(Error::Lost(_)) if self.persistent => {
                    // So is the stream, or else it ends here. The batch waits for the next link.
                    let _ = shutdown(up.stream.as_raw_fd(), Shutdown::Both);
                    return Admission::Queued;
                }
                Err(error) => error,
            },
        };
        Admission::Complete(Err(refusal))
    }
}

impl Writing {
    /// What it is with one more batch, behind `queued` others. `is_idle`: nothing is unanswered, and what is
    /// queued waits for company alone.
    fn with(self, flush: Flush, is_idle: bool, queued: usize) -> Self {
        match (flush, self) {
            (_, Self::Quiesced(_)) => self,
            _ if !is_idle || queued >= CORK_MAX => Self::Open,
            (Flush::Now, _) | (Flush::WhenAwaited, Self::Corked { awaited: false }) => Self::Open,
            (Flush::WhenAwaited, _) | (_, Self::Corked { awaited: true }) => {
                Self::Corked { awaited: true }
            }
            (Flush::WithNext, _) => Self::Corked { awaited: false },
        }
    }
}

impl Shared {
    /// Submits a batch for what it is valid for, right after `before` if there is a link; that returns
    /// [`Error::Lost`] where the link is over. Returns what the batch needs of who waits for it.
    fn submit(
        self: &Arc<Self>,
        mut calls: Calls,
        mut batch: Batch,
        valid_for: ValidFor,
        flush: Flush,
        before: impl FnOnce() -> Result<()>,
    ) -> OnPoll {
        let mut state = self.lock_and_count();
        let may_enter_ring = match state.admit(&calls, &batch, valid_for, before) {
            Admission::Admitted => true,
            Admission::Queued => false,
            Admission::Complete(result) => {
                drop(state);
                self.budget.release(batch.complete.with(result));
                return OnPoll::Nothing;
            }
        };
        if let Some(ring) = state.usable_ring().filter(|_| may_enter_ring) {
            let executes = calls.last().is_some_and(Call::executes);
            match ring.offer(calls, batch) {
                Offered::HandedOver(index) => {
                    let mut waited = ring.waited(self, index);
                    waited.executes = executes;
                    return OnPoll::LookInRing(waited);
                }
                Offered::Complete(batch, replies) => {
                    state.completing.count += 1;
                    drop(state);
                    self.complete(vec![(batch, replies)]);
                    return OnPoll::Nothing;
                }
                Offered::Back(back, tag) => (calls, batch) = (back, tag),
            }
        }
        self.queue(state, calls, batch, flush)
    }

    /// Adds a batch to the stream's queue, and writes that if it is time.
    fn queue(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, State>,
        calls: Calls,
        batch: Batch,
        flush: Flush,
    ) -> OnPoll {
        // What can wait for company has it with this batch.
        let was = state.writing;
        let queued = state.stream.queued();
        let is_idle = state.stream.is_answered() && (queued == 0 || was.is_corked());
        state.writing = was.with(flush, is_idle, queued);
        let at_once = is_idle && !state.writing.is_corked();
        let ends = || calls.last().is_some_and(Call::ends);
        if at_once && was == (Writing::Corked { awaited: false }) && ends() {
            // Nobody waits for their results, and to send them first costs as much as some calls.
            state.stream.push_together(calls, batch);
        } else {
            state.stream.push(calls, batch);
        }
        if state.ring_is_busy() {
            // It follows when the ring is empty.
            let complete = state.attend_ring();
            drop(state);
            if complete {
                self.collect();
            }
            return OnPoll::ExpectReply(self.clone());
        }
        let awaited = Writing::Corked { awaited: true };
        let is_corked = state.writing == awaited;
        // The task has been told of what is corked already.
        let is_told = is_corked && was == awaited;
        let left = if at_once { state.flush() } else { !is_told };
        // Somebody has to wait for the reply.
        let left = state.read_by_task() || left;
        drop(state);
        if left {
            self.work.notify_one();
        }
        match () {
            () if is_corked && !is_told => OnPoll::Uncork(self.clone()),
            () if at_once && !left => OnPoll::ExpectReply(self.clone()),
            () => OnPoll::Nothing,
        }
    }

    /// Writes what waits for company: there will be none.
    pub(super) fn uncork(&self) {
        let left = self.lock().uncork();
        if left {
            self.work.notify_one();
        }
    }
}
