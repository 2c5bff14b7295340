//! The stream, versions 0 and 1, as plain state.
//!
//! Batches of calls wait in a queue, are written in order, and are answered in order. A batch is
//! written as a whole and completes when the last of its replies is here. What the bytes travel on
//! is the caller's business: it takes [`Stream::output`], says how much of it is gone
//! ([`Stream::wrote`]), and feeds what comes back ([`Stream::receive`]), in pieces of any size.
//!
//! In version 1 no more calls are under way than the server's log remembers. When a stream is lost,
//! what was under way is set aside, until a log says how far it came ([`Stream::resume`]) or there
//! will be none ([`Stream::give_up`]):
//!
//! ```text
//!            written          answered
//!   queue ───────────▶ sent ───────────▶ complete
//!     ▲                  │ lost
//!     │   not executed   ▼     executed
//!     └────────────── aside ───────────▶ complete, or its result is lost
//! ```

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::BufMut;
use bytes::buf::Limit;

use super::log::Log;
use super::resume::{Resumed, Unanswered, is_keep, prepares};
use crate::abi::log::LOG_CAPACITY;
use crate::abi::wire::{REQUEST_SIZE, RESULT_SIZE, Request, Word};
use crate::proto::{Call, Calls, DataLen, Replies, Reply};

/// How many pieces are offered to one write: a list that an allocator has at hand.
const PIECES: usize = 64;

/// From how many bytes on it is worth while to read data right to their place.
const MUCH: usize = 16 * 1024;

/// A bound on what one COPY_OUT may bring, so that a size is checked before memory is taken.
pub const MAX_DATA: u64 = 1 << 31;

/// Calls under way on one stream. `T` is what the caller wants back with a batch's replies.
#[derive(Debug)]
pub struct Stream<T> {
    /// In order: those that are written as a whole, and then the queue.
    batches: VecDeque<Batch<T>>,
    /// How many of them are written as a whole.
    sent: usize,
    /// Bytes of the queue's first batch that are gone.
    written: usize,
    /// What was under way on a stream that was lost; without a tag if it has been given up.
    aside: VecDeque<(Unanswered, Option<T>)>,
    incoming: Incoming,
    version: u32,
    /// How many calls have been answered on this stream.
    answered: u64,
}

/// What has become of what was set aside.
#[derive(Debug)]
pub struct Fates<T> {
    /// Executed, with their replies.
    pub complete: Vec<(T, Replies)>,
    /// Executed in part or whole, and a result is not known.
    pub lost: Vec<T>,
    /// Not executed, not even in part; only where nothing is sent again.
    pub not_executed: Vec<T>,
}

impl<T> Default for Fates<T> {
    fn default() -> Self {
        Self { complete: Vec::new(), lost: Vec::new(), not_executed: Vec::new() }
    }
}

/// Batches that wait, set aside.
pub(crate) struct Queue<T>(VecDeque<Batch<T>>);

#[derive(Debug)]
struct Batch<T> {
    calls: Calls,
    replies: Replies,
    /// If it goes on after a loss: the replies to all of its calls, with a free place for each of
    /// `calls`.
    known: Option<Vec<Option<Reply>>>,
    /// Of the calls with replies from before a loss, some did more than to prepare the others.
    begun: bool,
    tag: T,
}

/// All replies of a batch.
fn fill(known: Option<Vec<Option<Reply>>>, replies: Replies) -> Replies {
    let Some(known) = known else { return replies };
    let mut replies = replies.into_iter();
    known.into_iter().filter_map(|reply| reply.or_else(|| replies.next())).collect()
}

impl<T> Batch<T> {
    /// Bytes of the first `calls` calls.
    fn size(&self, calls: usize) -> usize {
        let pieces = self.calls.iter().take(calls);
        pieces.map(|call| REQUEST_SIZE + call.payload.len()).sum()
    }
}

fn batch<T>(calls: Calls, known: Option<Vec<Option<Reply>>>, begun: bool, tag: T) -> Batch<T> {
    debug_assert!(!calls.is_empty());
    let replies = Replies::with_capacity(calls.len());
    Batch { calls, replies, known, begun, tag }
}

/// A request as it travels.
fn as_bytes(request: &Request) -> &[u8; REQUEST_SIZE] {
    // SAFETY: laid out as C does, it is seven numbers of 8 bytes and, having 56 bytes in all, nothing
    // between or behind them. They are little-endian, or the crate that defines it does not compile.
    unsafe { &*(&raw const *request).cast() }
}

/// What the next bytes are.
#[derive(Debug)]
enum Incoming {
    Result(Partial),
    Data { reply: Reply, left: usize },
    Trailer { reply: Reply, real: Partial },
}

/// Eight bytes that arrive in pieces.
#[derive(Debug, Default)]
struct Partial {
    bytes: [u8; RESULT_SIZE],
    got: usize,
}

impl Partial {
    /// Takes from the front of `input`; the number once it is whole, after which the next one may come.
    fn take(&mut self, input: &mut &[u8]) -> Option<i64> {
        // Nearly all come in one piece.
        if self.got == 0
            && let Some((whole, rest)) = input.split_first_chunk()
        {
            *input = rest;
            return Some(i64::from_le_bytes(*whole));
        }
        let n = input.len().min(RESULT_SIZE - self.got);
        let (front, rest) = input.split_at(n);
        self.bytes[self.got..self.got + n].copy_from_slice(front);
        self.got += n;
        *input = rest;
        if self.got < RESULT_SIZE {
            return None;
        }
        self.got = 0;
        Some(i64::from_le_bytes(self.bytes))
    }
}

impl<T> Default for Stream<T> {
    fn default() -> Self {
        Self {
            batches: VecDeque::new(),
            written: 0,
            sent: 0,
            aside: VecDeque::new(),
            incoming: Incoming::Result(Partial::default()),
            version: 0,
            answered: 0,
        }
    }
}

impl<T> Stream<T> {
    /// The version that both sides speak.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What is pushed from here on is for a server that speaks `version`.
    pub fn set_version(&mut self, version: u32) {
        self.version = version;
    }

    /// Whether such a batch is queued.
    pub fn has_queued(&self, which: impl Fn(&T) -> bool) -> bool {
        self.queue().any(|batch| which(&batch.tag))
    }

    /// Adds a batch at the end of the queue. An empty one would never complete.
    ///
    /// In version 1 the results of earlier batches must not wait for one that blocks: if any of its
    /// calls may, they are sent before it begins.
    pub fn push(&mut self, calls: impl Into<Calls>, tag: T) {
        let mut calls = calls.into();
        self.flush_before(&mut calls);
        self.push_together(calls, tag);
    }

    /// The same for one for which the results of those before it may wait: nobody waits for them.
    pub fn push_together(&mut self, calls: impl Into<Calls>, tag: T) {
        self.batches.push_back(batch(calls.into(), None, false, tag));
    }

    fn flush_before(&self, calls: &mut [Call]) {
        if self.version > 0
            && calls.iter().any(Call::may_block)
            && let Some(first) = calls.first_mut()
        {
            first.request.word |= Word::FLUSH;
        }
    }

    /// Whether a batch is written in part: its rest must follow before anything else can.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.written > 0
    }

    fn queue(&self) -> impl Iterator<Item = &Batch<T>> {
        self.batches.iter().skip(self.sent)
    }

    /// Whether nothing waits to be written.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.queued() == 0
    }

    /// How many batches wait to be written.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.batches.len() - self.sent
    }

    /// Whether nothing that was written, or begun to be, waits for its reply.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        let nothing_aside = || self.aside.iter().all(|(_, tag)| tag.is_none());
        // What goes on after a loss has been begun already.
        let goes_on = self.batches.get(self.sent).is_some_and(|batch| batch.known.is_some());
        self.sent == 0 && !self.is_torn() && !goes_on && nothing_aside()
    }

    /// How many calls have been answered since the stream began.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// How many more calls may be under way than those of batches that are written as a whole.
    fn window(&self) -> usize {
        if self.version == 0 {
            // There is no log that they would have to fit into.
            return usize::MAX;
        }
        let sent = self.batches.iter().take(self.sent);
        let unanswered = sent.map(|batch| batch.calls.len() - batch.replies.len());
        (LOG_CAPACITY as usize).saturating_sub(unanswered.sum())
    }

    /// What is to be written next, as far as there may be more under way. With `torn_only`, just the
    /// rest of a batch that has been begun.
    #[must_use]
    pub fn output(&self, torn_only: bool) -> Vec<IoSlice<'_>> {
        let batches = match (torn_only, self.is_torn()) {
            (false, _) => usize::MAX,
            (true, true) => 1,
            (true, false) => 0,
        };
        let mut skip = self.written;
        let mut slices = Vec::with_capacity(PIECES.min(2 * self.queued()));
        let calls = self.queue().take(batches).flat_map(|batch| {
            // Those that have their replies are not under way any more.
            let answered = batch.replies.len();
            batch.calls.iter().enumerate().map(move |(i, call)| (i >= answered, call))
        });
        let mut window = self.window();
        let calls = calls.map_while(|(is_under_way, call)| {
            window = window.checked_sub(usize::from(is_under_way))?;
            Some(call)
        });
        for call in calls {
            // A server that has a request waits for what belongs to it.
            if slices.len() + 1 + usize::from(!call.payload.is_empty()) > PIECES {
                break;
            }
            for piece in [as_bytes(&call.request), call.payload.as_slice()] {
                let gone = skip.min(piece.len());
                skip -= gone;
                if gone < piece.len() {
                    slices.push(IoSlice::new(&piece[gone..]));
                }
            }
        }
        slices
    }

    /// The first `n` bytes of the output are gone.
    pub fn wrote(&mut self, n: usize) {
        self.written += n;
        while let Some(batch) = self.batches.get(self.sent) {
            let size = batch.size(batch.calls.len());
            if self.written < size {
                break;
            }
            self.written -= size;
            self.sent += 1;
        }
    }

    /// Takes bytes that have arrived, and adds the batches that are complete with them to
    /// `complete`.
    ///
    /// # Errors
    ///
    /// What is wrong with the bytes. The stream is out of step then and must be ended; batches that
    /// were complete before are in `complete` all the same.
    pub fn receive(
        &mut self,
        mut input: &[u8],
        complete: &mut Vec<(T, Replies)>,
    ) -> Result<(), &'static str> {
        while !input.is_empty() {
            let reply = match &mut self.incoming {
                Incoming::Result(partial) => {
                    let Some(result) = partial.take(&mut input) else { break };
                    let reply = Reply { result, data: Vec::new() };
                    match self.expected()? {
                        Some(expected) if reply.value().is_ok() => {
                            let len = result.cast_unsigned();
                            if !expected.allows(len) {
                                return Err("COPY_OUT announces another length than was asked for");
                            }
                            let left = usize::try_from(len).ok().filter(|_| len <= MAX_DATA);
                            let left = left.ok_or("more data than fits")?;
                            self.incoming = Incoming::Data { reply, left };
                            self.skip_empty_data();
                            continue;
                        }
                        _ => reply,
                    }
                }
                Incoming::Data { reply, left } => {
                    let (front, rest) = input.split_at(input.len().min(*left));
                    reply.data.extend_from_slice(front);
                    *left -= front.len();
                    input = rest;
                    self.skip_empty_data();
                    continue;
                }
                Incoming::Trailer { reply, real } => {
                    let Some(real) = real.take(&mut input) else { break };
                    let real = usize::try_from(real).ok().filter(|n| *n <= reply.data.len());
                    let mut reply = std::mem::take(reply);
                    reply.data.truncate(real.ok_or("COPY_OUT counts more bytes than it sent")?);
                    self.incoming = Incoming::Result(Partial::default());
                    reply
                }
            };
            self.reply(reply, complete);
        }
        Ok(())
    }

    /// Where the next bytes belong, if they are much data of one reply: they can be read right
    /// there. How many came is told to [`Stream::took`]; what is received otherwise is as good.
    pub fn data(&mut self) -> Option<Limit<&mut Vec<u8>>> {
        match &mut self.incoming {
            Incoming::Data { reply, left } if *left >= MUCH => {
                reply.data.reserve_exact(*left);
                Some((&mut reply.data).limit(*left))
            }
            _ => None,
        }
    }

    /// So many bytes were put where [`Stream::data`] said.
    pub fn took(&mut self, n: usize) {
        if let Incoming::Data { left, .. } = &mut self.incoming {
            *left -= n.min(*left);
        }
        self.skip_empty_data();
    }

    /// Data that is all here is followed by its trailer.
    fn skip_empty_data(&mut self) {
        if let Incoming::Data { reply, left: 0 } = &mut self.incoming {
            let reply = std::mem::take(reply);
            self.incoming = Incoming::Trailer { reply, real: Partial::default() };
        }
    }

    /// How much data follows the next result, if any.
    fn expected(&self) -> Result<Option<DataLen>, &'static str> {
        let batch = self.answering().ok_or("a result that no call asked for")?;
        let answered = batch.replies.len();
        let call = batch.calls.get(answered).ok_or("too many results")?;
        // Only a batch that is written in part has calls that the server can't have answered.
        if self.sent == 0 && self.written < batch.size(answered + 1) {
            return Err("a result of a call that is not written yet");
        }
        Ok(call.data_len())
    }

    /// The batch that the next reply belongs to: one that is written in part can have replies too.
    fn answering(&self) -> Option<&Batch<T>> {
        self.batches.front().filter(|_| self.sent > 0 || self.is_torn())
    }

    fn reply(&mut self, reply: Reply, complete: &mut Vec<(T, Replies)>) {
        let torn = self.is_torn();
        self.answered += 1;
        let Some(batch) = self.batches.front_mut().filter(|_| self.sent > 0 || torn) else {
            return;
        };
        // One that is written in part has calls that have no replies.
        if self.sent == 0 || batch.replies.len() + 1 < batch.calls.len() {
            batch.replies.push(reply);
            return;
        }
        self.sent -= 1;
        if let Some(Batch { mut replies, known, tag, .. }) = self.batches.pop_front() {
            replies.push(reply);
            complete.push((tag, fill(known, replies)));
        }
    }

    /// The stream is over. What was written and not answered is set aside, in order. What was not
    /// written, or not as far as its first whole request, stays in the queue for the next stream.
    pub fn disconnect(&mut self) {
        self.incoming = Incoming::Result(Partial::default());
        self.answered = 0;
        if self.written >= REQUEST_SIZE {
            self.sent += 1;
        }
        self.written = 0;
        for batch in self.batches.drain(..std::mem::take(&mut self.sent)) {
            let Batch { calls, mut replies, known, mut begun, tag } = batch;
            let mut calls = calls.into_vec();
            let mut known = known.unwrap_or_else(|| vec![None; calls.len()]);
            let sent = calls.len() - replies.len();
            // What it has prepared is forgotten.
            let last = replies.len().checked_sub(1);
            let undone = |last: &usize| is_keep(&calls[*last]) && replies[*last].value().is_ok();
            let kept = last.filter(undone).is_some();
            if kept {
                replies.pop();
            }
            let rest = calls.split_off(replies.len());
            begun |= !calls.iter().all(prepares);
            let free = known.iter_mut().filter(|reply| reply.is_none());
            for (place, reply) in free.zip(replies) {
                *place = Some(reply);
            }
            let unanswered = Unanswered { calls: rest, kept, sent, begun, replies: known };
            self.aside.push_back((unanswered, Some(tag)));
        }
    }

    /// Sets aside what was under way in another way beside the stream.
    pub fn set_aside(&mut self, unanswered: Unanswered, tag: T) {
        self.aside.push_back((unanswered, Some(tag)));
    }

    /// Gives up what was set aside, where `which` says so of the last call and the tag: nobody will
    /// wait for what has become of it.
    pub fn give_up(&mut self, which: impl Fn(Option<&Call>, &T) -> bool) -> Vec<T> {
        let given_up = self
            .aside
            .iter_mut()
            .filter_map(|(unanswered, tag)| tag.take_if(|tag| which(unanswered.calls.last(), tag)));
        let given_up = given_up.collect();
        if self.aside.iter().all(|(_, tag)| tag.is_none()) {
            // Nor does it stand in front of anything that somebody waits for.
            self.aside.clear();
        }
        given_up
    }

    /// What was set aside goes on by what the server's log says, if `again`; else it only learns
    /// what has become of it. `base` is the number of the first call of it, `end` that of the first
    /// one that was not executed.
    pub fn resume(&mut self, log: &Log, base: u64, end: u64, again: bool) -> Fates<T> {
        let mut fates = Fates::default();
        let mut first = base;
        let mut queue = VecDeque::new();
        for (unanswered, tag) in std::mem::take(&mut self.aside) {
            let sent = unanswered.sent as u64;
            let executed = unanswered.executed(end.saturating_sub(first));
            let Some(tag) = tag else {
                first += sent;
                continue;
            };
            let begun = unanswered.has_begun(executed);
            if !begun && !again {
                fates.not_executed.push(tag);
            } else {
                match unanswered.resume(executed, |i| log.record(first + i as u64)) {
                    Resumed::Complete(replies) => fates.complete.push((tag, replies.into())),
                    Resumed::Again { mut calls, replies } if again => {
                        self.flush_before(&mut calls);
                        queue.push_back(batch(calls.into(), Some(replies), begun, tag));
                    }
                    Resumed::Again { .. } | Resumed::ResultLost => fates.lost.push(tag),
                }
            }
            first += sent;
        }
        debug_assert_eq!(self.sent, 0);
        queue.append(&mut self.batches);
        self.batches = queue;
        fates
    }

    /// Gives up those batches that were never written and that `which` names.
    pub fn withdraw(&mut self, which: impl Fn(&T) -> bool) -> Vec<T> {
        debug_assert_eq!(self.written, 0);
        let queue = self.take_queue().0;
        let (withdrawn, kept): (VecDeque<_>, _) =
            queue.into_iter().partition(|batch| which(&batch.tag));
        self.batches.extend(kept);
        withdrawn.into_iter().map(|batch| batch.tag).collect()
    }

    /// Changes the calls of what waits to be written, of which nothing has been, where `change` finds
    /// that it can go out. What can't is given up.
    pub fn revise(&mut self, mut change: impl FnMut(&mut [Call], &mut T) -> bool) -> Fates<T> {
        debug_assert!(!self.is_torn());
        let mut fates = Fates::default();
        for mut batch in self.take_queue().0 {
            if !change(&mut batch.calls, &mut batch.tag) {
                // What goes on after a loss has been begun before it.
                let fate = if batch.begun { &mut fates.lost } else { &mut fates.not_executed };
                fate.push(batch.tag);
                continue;
            }
            self.batches.push_back(batch);
        }
        fates
    }

    /// Takes away what waits to be written, while nothing of it has been.
    pub(crate) fn take_queue(&mut self) -> Queue<T> {
        debug_assert!(!self.is_torn());
        Queue(self.batches.split_off(self.sent))
    }

    /// Puts back what was taken away, behind what has been pushed since.
    pub(crate) fn append_queue(&mut self, queue: Queue<T>) {
        self.batches.extend(queue.0);
    }

    /// Gives up what waits to be written.
    pub fn abandon(&mut self) -> Fates<T> {
        debug_assert_eq!(self.written, 0);
        let mut fates = Fates::default();
        for batch in self.batches.drain(self.sent..) {
            // What goes on after a loss has been begun before it.
            let fate = if batch.begun { &mut fates.lost } else { &mut fates.not_executed };
            fate.push(batch.tag);
        }
        fates
    }
}
