//! The stream, version 0, as plain state.
//!
//! Batches of calls wait in a queue, are written in order, and are answered in order. A batch is
//! written as a whole and completes when the last of its replies is here. What the bytes travel on
//! is the caller's business: it takes [`Stream::output`], says how much of it is gone
//! ([`Stream::wrote`]), and feeds what comes back ([`Stream::receive`]), in pieces of any size.

use std::collections::VecDeque;
use std::io::IoSlice;

use crate::abi::wire::{REQUEST_SIZE, RESULT_SIZE};
use crate::call::{Call, Reply};

/// How many pieces are offered to one write.
const PIECES: usize = 64;

/// A bound on what one COPY_OUT may bring, so that a size is checked before memory is taken.
pub const MAX_DATA: u64 = 1 << 31;

/// Calls under way on one stream. `T` is what the caller wants back with a batch's replies.
#[derive(Debug)]
pub struct Stream<T> {
    queue: VecDeque<Batch<T>>,
    /// Bytes of the queue's first batch that are gone.
    written: usize,
    sent: VecDeque<Batch<T>>,
    incoming: Incoming,
    /// What was wrong with the bytes that followed those that have been understood.
    broken: Option<&'static str>,
}

/// Batches that wait, set aside.
pub(crate) struct Queue<T>(VecDeque<Batch<T>>);

#[derive(Debug)]
struct Batch<T> {
    /// Each call's request in bytes, beside the call.
    calls: Vec<(Call, [u8; REQUEST_SIZE])>,
    replies: Vec<Reply>,
    tag: T,
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
    /// Takes from the front of `input`; the number once it is whole.
    fn take(&mut self, input: &mut &[u8]) -> Option<i64> {
        let n = input.len().min(RESULT_SIZE - self.got);
        let (front, rest) = input.split_at(n);
        self.bytes[self.got..self.got + n].copy_from_slice(front);
        self.got += n;
        *input = rest;
        (self.got == RESULT_SIZE).then(|| i64::from_le_bytes(self.bytes))
    }
}

impl<T> Default for Stream<T> {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            written: 0,
            sent: VecDeque::new(),
            incoming: Incoming::Result(Partial::default()),
            broken: None,
        }
    }
}

impl<T> Stream<T> {
    /// Adds a batch at the end of the queue. An empty one would never complete.
    pub fn push(&mut self, calls: Vec<Call>, tag: T) {
        debug_assert!(!calls.is_empty());
        let calls: Vec<_> = calls
            .into_iter()
            .map(|call| {
                let bytes = call.request.to_bytes();
                (call, bytes)
            })
            .collect();
        let replies = Vec::with_capacity(calls.len());
        self.queue.push_back(Batch { calls, replies, tag });
    }

    /// Whether a batch is written in part: its rest must follow before anything else can.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.written > 0
    }

    /// Whether nothing waits to be written.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether nothing that was written, or begun to be, waits for its reply.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.sent.is_empty() && !self.is_torn()
    }

    /// What is to be written next. With `torn_only`, just the rest of a batch that has been begun.
    #[must_use]
    pub fn output(&self, torn_only: bool) -> Vec<IoSlice<'_>> {
        let batches = match (torn_only, self.is_torn()) {
            (false, _) => usize::MAX,
            (true, true) => 1,
            (true, false) => 0,
        };
        let mut skip = self.written;
        let mut slices = Vec::new();
        let pieces = self.queue.iter().take(batches).flat_map(|batch| &batch.calls);
        for piece in pieces.flat_map(|(call, bytes)| [bytes.as_slice(), &call.payload]) {
            let gone = skip.min(piece.len());
            skip -= gone;
            if gone < piece.len() {
                slices.push(IoSlice::new(&piece[gone..]));
            }
            if slices.len() == PIECES {
                break;
            }
        }
        slices
    }

    /// The first `n` bytes of the output are gone.
    pub fn wrote(&mut self, n: usize) {
        self.written += n;
        while let Some(batch) = self.queue.front() {
            let size: usize =
                batch.calls.iter().map(|(call, bytes)| bytes.len() + call.payload.len()).sum();
            if self.written < size {
                break;
            }
            self.written -= size;
            self.sent.extend(self.queue.pop_front());
        }
    }

    /// Takes bytes that have arrived, and returns the batches that are complete with them.
    ///
    /// # Errors
    ///
    /// What is wrong with the bytes. The stream is out of step then and must be ended. Batches that
    /// were complete before that are returned first, and the error ([`Stream::is_broken`]) by the
    /// next call.
    pub fn receive(&mut self, input: &[u8]) -> Result<Vec<(T, Vec<Reply>)>, &'static str> {
        let mut complete = Vec::new();
        if self.broken.is_none() {
            self.broken = self.take(input, &mut complete).err();
        }
        match self.broken {
            Some(wrong) if complete.is_empty() => Err(wrong),
            _ => Ok(complete),
        }
    }

    /// Whether what has arrived is out of step.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    fn take(
        &mut self,
        mut input: &[u8],
        complete: &mut Vec<(T, Vec<Reply>)>,
    ) -> Result<(), &'static str> {
        while !input.is_empty() {
            let reply = match &mut self.incoming {
                Incoming::Result(partial) => {
                    let Some(result) = partial.take(&mut input) else { break };
                    let reply = Reply { result, data: Vec::new() };
                    match self.expected()? {
                        Some(len) if reply.value().is_ok() => {
                            let len = usize::try_from(len).ok().filter(|_| len <= MAX_DATA);
                            let left = len.ok_or("more data than was asked for")?;
                            if result.cast_unsigned() != left as u64 {
                                return Err("COPY_OUT announces another length than was asked for");
                            }
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
                    reply
                }
            };
            self.incoming = Incoming::Result(Partial::default());
            complete.extend(self.reply(reply));
        }
        Ok(())
    }

    /// Data that is all here is followed by its trailer.
    fn skip_empty_data(&mut self) {
        if let Incoming::Data { reply, left: 0 } = &mut self.incoming {
            let reply = std::mem::take(reply);
            self.incoming = Incoming::Trailer { reply, real: Partial::default() };
        }
    }

    /// How much data follows the next result, if any.
    fn expected(&self) -> Result<Option<u64>, &'static str> {
        let batch = self.answering().ok_or("a result that no call asked for")?;
        let call = batch.calls.get(batch.replies.len()).ok_or("too many results")?;
        Ok(call.0.data_len())
    }

    /// The batch that the next reply belongs to: one that is written in part can have replies too.
    fn answering(&self) -> Option<&Batch<T>> {
        self.sent.front().or_else(|| self.queue.front().filter(|_| self.is_torn()))
    }

    fn reply(&mut self, reply: Reply) -> Option<(T, Vec<Reply>)> {
        let torn = self.is_torn();
        match self.sent.front_mut() {
            Some(batch) => {
                batch.replies.push(reply);
                if batch.replies.len() < batch.calls.len() {
                    return None;
                }
                let batch = self.sent.pop_front()?;
                Some((batch.tag, batch.replies))
            }
            None => {
                self.queue.front_mut().filter(|_| torn)?.replies.push(reply);
                None
            }
        }
    }

    /// The stream is over. Returns what was written and not answered, in order: those calls may
    /// have been executed. What was not written, or not as far as its first whole request, stays
    /// in the queue for the next stream.
    pub fn disconnect(&mut self) -> Vec<T> {
        self.incoming = Incoming::Result(Partial::default());
        self.broken = None;
        let mut lost: Vec<T> = self.sent.drain(..).map(|batch| batch.tag).collect();
        if self.written >= REQUEST_SIZE {
            lost.extend(self.queue.pop_front().map(|batch| batch.tag));
        }
        self.written = 0;
        lost
    }

    /// Gives up those batches that were never written and that `which` names.
    pub(crate) fn withdraw(&mut self, which: impl Fn(&T) -> bool) -> Vec<T> {
        debug_assert_eq!(self.written, 0);
        let queue = std::mem::take(&mut self.queue);
        let (withdrawn, kept): (VecDeque<_>, _) =
            queue.into_iter().partition(|batch| which(&batch.tag));
        self.queue = kept;
        withdrawn.into_iter().map(|batch| batch.tag).collect()
    }

    /// Takes away what waits to be written, while nothing of it has been.
    pub(crate) fn take_queue(&mut self) -> Queue<T> {
        debug_assert!(!self.is_torn());
        Queue(std::mem::take(&mut self.queue))
    }

    /// Puts back what was taken away, behind what has been pushed since.
    pub(crate) fn append_queue(&mut self, queue: Queue<T>) {
        self.queue.extend(queue.0);
    }

    /// Gives up what was never written.
    pub fn abandon(&mut self) -> Vec<T> {
        debug_assert_eq!(self.written, 0);
        self.queue.drain(..).map(|batch| batch.tag).collect()
    }
}
