//! The ring, as seen from the controller: batches that are handed over in shared memory, in order,
//! and completed in order. See [`crate::abi::ring`] for what lies in that memory.
//!
//! Of a batch, only what is neither the first bytes in nor the last bytes out becomes a record: a
//! COPY_IN in front and a COPY_OUT at the end whose memory is in the arena are done right here,
//! without a copy of their own. The buffers in there belong to one batch each, so nobody else's call
//! sees that it was earlier, or later, than its place in the queue. Those that do not are not copied
//! that way.

use std::collections::VecDeque;
use std::sync::Arc;

use nix::libc;
use smallvec::smallvec;

use crate::abi;
use crate::abi::ring::CAPACITY;
use crate::abi::wire::{MAX_REF, Operation, Request, Word};
use crate::proto::resume::Unanswered;
use crate::proto::{Call, Calls, Replies, Reply};

/// The most records that are under way: behind them lie as many as a REF reaches back.
pub const IN_FLIGHT: usize = CAPACITY - MAX_REF as usize;

/// Memory that the server has too: a ring, and behind it an arena.
pub trait Memory {
    /// What lies at its start.
    fn ring(&self) -> &abi::ring::Ring;
    /// Copies to a place in the arena. False: it is not there.
    fn write(&self, address: u64, bytes: &[u8]) -> bool;
    /// A copy of a part of the arena, or `None` if it is not there.
    fn read(&self, address: u64, len: u64) -> Option<Vec<u8>>;
    /// Whether that part of the server's memory is in the arena and belongs to one batch.
    fn is_of_one_batch(&self, address: u64, len: u64) -> bool;
}

/// Calls under way in one ring. `T` is what the caller wants back with a batch's replies.
pub struct Ring<T, M> {
    memory: Arc<M>,
    /// The number of the next call.
    next: u64,
    pending: VecDeque<Pending<T>>,
    /// Records that are under way.
    in_flight: usize,
}

struct Pending<T> {
    /// The number of its first record, and how many it has.
    first: u64,
    records: usize,
    shape: Shape,
    /// All of its calls, for the case that the link is lost.
    calls: Calls,
    /// Its only record is never executed, and stands in the ring until the server comes to it.
    withdrawn: bool,
    tag: T,
}

/// Which calls of a batch are done here.
#[derive(Default)]
struct Shape {
    /// The lengths of the copies in front.
    before: Vec<u64>,
    /// The copies at the end.
    behind: Vec<Behind>,
}

/// A COPY_OUT that is done when the calls before it are complete.
struct Behind {
    address: u64,
    len: Len,
    linked: bool,
    /// It is done only if the call so far back has succeeded.
    depends: Option<u64>,
}

#[derive(Clone, Copy)]
enum Len {
    Bytes(u64),
    /// The result of the call so far back.
    Back(u64),
}

/// What has become of a batch.
pub enum Handed<T> {
    /// It is with the server; the number of its last record.
    Over(u64),
    /// There was nothing in it for the server.
    Complete(T, Replies),
    /// It can't go this way.
    Back(Calls, T),
}

impl<T, M: Memory> Ring<T, M> {
    /// The ring in `memory`, in which nothing has been handed over yet.
    pub fn new(memory: Arc<M>) -> Self {
        Self { memory, next: 0, pending: VecDeque::new(), in_flight: 0 }
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<M> {
        &self.memory
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// The number of the last record that is under way.
    pub fn last(&self) -> Option<u64> {
        self.pending.back().map(Pending::last)
    }

    /// Gets the next record ready, which is free: fewer are under way than there are.
    pub fn prepare(&self) {
        self.memory.ring().prepare(self.next);
    }

    /// How many records are under way.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether one more call can be handed over.
    pub fn has_room(&self) -> bool {
        self.in_flight < IN_FLIGHT
    }

    /// Whether call `index` has been handed over and has no result yet.
    pub fn is_under_way(&self, index: u64) -> bool {
        // Of a batch that is complete and not taken yet the records are still there.
        let has = |batch: &Pending<T>| (batch.first..=batch.last()).contains(&index);
        let waits = self.pending.iter().any(|batch| has(batch) && !batch.withdrawn);
        waits && self.memory.ring().result(index).is_none()
    }

    /// Withdraws the batch whose only record is that of call `index`, if it may be and the server has
    /// not begun it, and returns its tag and its replies, as of a call that was interrupted. `place` is
    /// returned instead of the tag when the server has come to the record.
    pub fn withdraw(
        &mut self,
        index: u64,
        may: impl FnOnce(&T) -> bool,
        place: T,
    ) -> Option<(T, Replies)> {
        let at = self.pending.iter().position(|batch| batch.first == index)?;
        let batch = self.pending.get_mut(at)?;
        let alone = batch.records == 1 && !batch.withdrawn && may(&batch.tag);
        if !alone || !self.memory.ring().withdraw(index) {
            return None;
        }
        batch.withdrawn = true;
        let tag = std::mem::replace(&mut batch.tag, place);
        let shape = std::mem::take(&mut batch.shape);
        let interrupted = smallvec![reply(-i64::from(libc::EINTR))];
        Some((tag, self.replies(&shape, interrupted)))
    }

    /// Hands one call over for a caller that waits for its result without giving others a chance to
    /// hand over something, or that says later who waits for it.
    pub fn push_one(&mut self, call: &Call) -> u64 {
        self.push_request(&request(call))
    }

    /// The same for one that can be withdrawn, however quick it is.
    pub fn push_one_to_withdraw(&mut self, call: &Call) -> u64 {
        let mut request = request(call);
        request.word |= Word::FLUSH;
        self.push_request(&request)
    }

    fn push_request(&mut self, request: &Request) -> u64 {
        let index = self.next;
        self.memory.ring().submit(index, request);
        self.next += 1;
        index
    }

    /// That one call is waited for like a batch from here on.
    pub fn wait_for_one(&mut self, index: u64, call: &Call, tag: T) {
        self.in_flight += 1;
        let shape = Shape::default();
        let calls = smallvec![call.clone()];
        let (first, records, withdrawn) = (index, 1, false);
        self.pending.push_back(Pending { first, records, shape, calls, withdrawn, tag });
    }

    /// How many calls the server has answered in here.
    pub fn answered(&self) -> u64 {
        self.pending.front().map_or(self.next, |batch| batch.first)
    }

    /// Hands a batch over, if it can go this way: there is room, and all that it moves in and out
    /// lies in the arena.
    pub fn push(&mut self, mut calls: Calls, tag: T) -> Handed<T> {
        let Some(shape) = self.shape(&calls) else { return Handed::Back(calls, tag) };
        let (before, behind) = (shape.before.len(), shape.behind.len());
        let records = calls.len() - before - behind;
        for call in &calls[..before] {
            self.memory.write(call.request.args[0], &call.payload);
        }
        if records == 0 {
            let replies = self.replies(&shape, Replies::new());
            return Handed::Complete(tag, replies);
        }
        let first = self.next;
        let handed = &mut calls[before..before + records];
        if before > 0 {
            // What it is linked to has succeeded.
            handed[0].request.word &= !Word::LINK;
        }
        for call in handed {
            if self.next > first {
                crate::fault::point("ring.torn");
            }
            self.memory.ring().submit(self.next, &request(call));
            self.next += 1;
        }
        self.in_flight += records;
        self.pending.push_back(Pending { first, records, shape, calls, withdrawn: false, tag });
        Handed::Over(self.next - 1)
    }

    /// Which calls of a batch are done here, or `None` if the others can't all be records.
    fn shape(&self, calls: &[Call]) -> Option<Shape> {
        let mut shape = Shape::default();
        let mut middle = calls;
        while let [first, rest @ ..] = middle
            && self.is_direct_in(first)
        {
            shape.before.push(first.payload.len() as u64);
            middle = rest;
        }
        while let [rest @ .., last] = middle
            && let Some(behind) = self.direct_out(last, middle.len() - 1)
        {
            shape.behind.push(behind);
            middle = rest;
        }
        shape.behind.reverse();
        if middle.is_empty() {
            // What is linked, or has another's result for its length, needs that other one.
            let alone = |copy: &Behind| {
                !copy.linked && copy.depends.is_none() && matches!(copy.len, Len::Bytes(_))
            };
            return shape.behind.iter().all(alone).then_some(shape);
        }
        let fits = self.in_flight + middle.len() <= IN_FLIGHT
            && middle.iter().enumerate().all(|(place, call)| is_record(call, place));
        fits.then_some(shape)
    }

    /// A COPY_IN that can be done before the others.
    fn is_direct_in(&self, call: &Call) -> bool {
        let Request { word, args: [address, len, ..] } = call.request;
        word & !Word::LINK == Word::OP | Operation::CopyIn as u64
            && self.memory.is_of_one_batch(address, len)
    }

    /// A COPY_OUT that can be done after the `before` calls before it, not counting those in front. A
    /// reference in the place of a third argument, which COPY_OUT does not have, is a call that it
    /// depends on.
    fn direct_out(&self, call: &Call, before: usize) -> Option<Behind> {
        let Request { word, args: [address, len, depends, ..] } = call.request;
        let has = |bit| word & bit != 0;
        let (of_len, of_third) = (Word::reference(1), Word::reference(2));
        if word & !(Word::LINK | of_len | of_third) != Word::OP | Operation::CopyOut as u64 {
            return None;
        }
        let len = if has(of_len) { Len::Back(len) } else { Len::Bytes(len) };
        let depends = Some(depends).filter(|_| has(of_third));
        let reaches = |back: u64| (1..=before as u64).contains(&back);
        let there = match len {
            Len::Bytes(len) => self.memory.is_of_one_batch(address, len),
            Len::Back(back) => reaches(back) && self.memory.is_of_one_batch(address, 0),
        };
        let linked = has(Word::LINK);
        (there && depends.is_none_or(reaches)).then_some(Behind { address, len, linked, depends })
    }

    /// Takes the batches that are complete, in order.
    pub fn take_complete(&mut self, complete: &mut Vec<(T, Replies)>) {
        while let Some(batch) = self.pending.front() {
            let ring = self.memory.ring();
            if ring.result(batch.last()).is_none() {
                return;
            }
            // All of them: what is in the memory is only what the server claims.
            let mut results = Replies::with_capacity(batch.records);
            for index in batch.first..=batch.last() {
                let Some(result) = ring.result(index) else { return };
                results.push(reply(result));
            }
            let Some(batch) = self.pending.pop_front() else { return };
            self.in_flight -= batch.records;
            complete.push((batch.tag, self.replies(&batch.shape, results)));
        }
    }

    /// The replies of a whole batch from the results of its records.
    fn replies(&self, shape: &Shape, results: Replies) -> Replies {
        if shape.before.is_empty() && shape.behind.is_empty() {
            return results;
        }
        let before = shape.before.iter().map(|len| reply(*len as i64));
        let mut replies: Replies = before.chain(results).collect();
        for copy in &shape.behind {
            let value = |back: u64| {
                let at = replies.len().checked_sub(back as usize);
                at.and_then(|at| replies.get(at)?.value().ok())
            };
            let is_canceled = (copy.linked && value(1).is_none())
                || copy.depends.is_some_and(|back| value(back).is_none());
            let len = match copy.len {
                Len::Bytes(len) => Some(len),
                Len::Back(back) => value(back),
            };
            let copied = match len {
                Some(len) if !is_canceled => {
                    // A result that is longer than the memory is not one that the kernel gave.
                    match self.memory.read(copy.address, len) {
                        Some(data) => Reply { result: len as i64, data },
                        None => reply(-i64::from(libc::EFAULT)),
                    }
                }
                _ => reply(-i64::from(libc::ECANCELED)),
            };
            replies.push(copied);
        }
        replies
    }

    /// The connection is over. Returns what is still under way, in order.
    pub fn disconnect(self) -> impl Iterator<Item = (Unanswered, T)> {
        self.pending.into_iter().map(|batch| {
            let Pending { records, shape, mut calls, tag, .. } = batch;
            let before = shape.before.iter().map(|len| Some(reply(*len as i64)));
            let mut replies: Vec<_> = before.collect();
            calls.drain(..replies.len());
            replies.resize(replies.len() + calls.len(), None);
            // The copies at the end have not been done, and need no ring.
            (
                Unanswered {
                    calls: calls.into_vec(),
                    kept: false,
                    sent: records,
                    begun: false,
                    replies,
                },
                tag,
            )
        })
    }
}

impl<T> Pending<T> {
    fn last(&self) -> u64 {
        self.first + self.records as u64 - 1
    }
}

fn reply(result: i64) -> Reply {
    Reply { result, data: Vec::new() }
}

/// Whether a call can be handed over at this place of a batch: it moves no bytes of a stream, and
/// refers to nothing that has no record.
fn is_record(call: &Call, place: usize) -> bool {
    let word = call.request.word;
    let operation = Operation::from_number(word as u32);
    let moves_nothing = word & Word::OP == 0
        || matches!(operation, Some(Operation::Load | Operation::Store | Operation::Copy));
    let reaches = |(argument, back): (u32, &u64)| {
        word & Word::reference(argument) == 0 || *back <= place as u64
    };
    moves_nothing && (0..).zip(&call.request.args).all(reaches)
}

/// The request of a call: one that may block is marked, so that who waits for those before it is
/// told first.
fn request(call: &Call) -> Request {
    let mut request = call.request;
    if call.may_block() {
        request.word |= Word::FLUSH;
    }
    request
}
