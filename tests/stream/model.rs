//! The two ends: the real [`Stream`], and a server that does what its requests say it is to do.
//!
//! A call's argument 4 tells the server what to return, and argument 5 is the call's own number.
//! Where a COPY_OUT's length is another call's result, argument 2 tells what that is.

use std::collections::VecDeque;
use std::ops::Range;

use farcall::abi::log::LOG_CAPACITY;
use farcall::abi::wire::{Operation, REQUEST_SIZE, Request, Word};
use farcall::calls::Sysno;
use farcall::proto::stream::Stream;
use farcall::proto::{Call, Replies, Reply};
use proptest::prelude::*;

const LEN: usize = 2;
const OUTCOME: usize = 4;
const ID: usize = 5;

const COPY_IN: u64 = Word::OP | Operation::CopyIn as u64;
const COPY_OUT: u64 = Word::OP | Operation::CopyOut as u64;

/// A system call that returns that.
pub fn returns(result: i64) -> Call {
    Call::syscall(Sysno::getpid, [0, 0, 0, 0, result as u64, 0])
}

/// The same of a call that may take long.
fn returns_late(result: i64) -> Call {
    Call::syscall(Sysno::nanosleep, [0, 0, 0, 0, result as u64, 0])
}

/// A COPY_OUT of `len` bytes of which `real` are real; negative: it fails with that.
pub fn copy_out(len: u64, real: i64) -> Call {
    Call::operation(Operation::CopyOut, [0, len, 0, 0, real as u64, 0])
}

/// The same where the length is what an earlier call returned.
fn copy_out_of_a_result(len: u64, real: i64) -> Call {
    let mut call = copy_out(1, real);
    call.request.word |= Word::reference(1);
    call.request.args[LEN] = len;
    call
}

/// How many bytes a COPY_OUT has.
fn length(request: &Request) -> u64 {
    let place = if request.word & Word::reference(1) == 0 { 1 } else { LEN };
    request.args[place]
}

/// What a request asks for, whatever else its word says.
fn what(request: &Request) -> u64 {
    request.word & (Word::OP | Word::NUMBER)
}

/// A COPY_IN of these bytes; with a negative result it fails.
fn copy_in(payload: Vec<u8>, result: i64) -> Call {
    let args = [0, payload.len() as u64, 0, 0, result as u64, 0];
    Call { payload, ..Request::operation(Operation::CopyIn, args).into() }
}

fn call() -> impl Strategy<Value = Call> {
    let errno = -4095..=-1_i64;
    let result = prop_oneof![Just(0), 1..100_i64, errno.clone(), any::<i64>()];
    let payload = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..200),
        1 => prop::collection::vec(any::<u8>(), 3000..5000),
    ];
    let lengths = prop_oneof![3 => 0..150_u64, 1 => Just(0), 1 => 3000..5000_u64];
    let out = (lengths.clone(), any::<prop::sample::Index>(), prop::option::weighted(0.2, errno));
    let out_of_a_result = (lengths.clone(), any::<prop::sample::Index>());
    prop_oneof![
        4 => result.clone().prop_map(returns),
        1 => result.prop_map(returns_late),
        1 => out_of_a_result.prop_map(|(len, real)| {
            copy_out_of_a_result(len, real.index(len as usize + 1) as i64)
        }),
        2 => (payload, prop::option::weighted(0.2, Just(-14)))
            .prop_map(|(payload, fault)| copy_in(payload, fault.unwrap_or(0))),
        2 => out.prop_map(|(len, real, errno)| {
            copy_out(len, errno.unwrap_or(real.index(len as usize + 1) as i64))
        }),
    ]
}

/// A few calls, or more of them than one write takes.
pub fn batch() -> impl Strategy<Value = Vec<Call>> {
    prop_oneof![
        12 => prop::collection::vec(call(), 1..6),
        1 => prop::collection::vec(call(), 60..140),
    ]
}

/// What a server that keeps to the protocol answers, as the caller is to see it.
pub fn reply_to(call: &Call) -> Reply {
    let outcome = call.request.args[OUTCOME].cast_signed();
    let len = length(&call.request);
    match what(&call.request) {
        COPY_IN => {
            let result = if outcome < 0 { outcome } else { call.payload.len() as i64 };
            Reply { result, data: Vec::new() }
        }
        COPY_OUT if outcome < 0 => Reply { result: outcome, data: Vec::new() },
        COPY_OUT => {
            let id = call.request.args[ID];
            let data = (0..outcome as usize).map(|at| byte(id, at)).collect();
            Reply { result: len as i64, data }
        }
        _ => Reply { result: outcome, data: Vec::new() },
    }
}

/// What lies in the server's memory for that call.
fn byte(id: u64, at: usize) -> u8 {
    (id as usize).wrapping_mul(31).wrapping_add(at) as u8
}

/// A server. How late its answers come back is for the test to say, so that it can be one of version
/// 0, which answers each request by itself, or of version 1, which sends many results at once.
#[derive(Default)]
struct Server {
    /// What has arrived of a request and its payload.
    input: Vec<u8>,
    /// Answers on their way back.
    output: VecDeque<u8>,
}

impl Server {
    /// Takes bytes; returns the calls that it executed, with the payload that came with each.
    fn serve(&mut self, bytes: &[u8]) -> Vec<Call> {
        self.input.extend(bytes);
        let mut executed = Vec::new();
        while let Some((head, rest)) = self.input.split_first_chunk::<REQUEST_SIZE>() {
            let request = Request::from_bytes(head);
            let len = if what(&request) == COPY_IN { request.args[1] as usize } else { 0 };
            if rest.len() < len {
                break;
            }
            let payload = rest[..len].to_vec();
            self.input.drain(..REQUEST_SIZE + len);
            let call = Call { payload, ..request.into() };
            self.answer(&call);
            executed.push(call);
        }
        executed
    }

    fn answer(&mut self, call: &Call) {
        let reply = reply_to(call);
        self.output.extend(reply.result.to_le_bytes());
        if what(&call.request) == COPY_OUT && reply.result >= 0 {
            let real = reply.data.len();
            self.output.extend(reply.data);
            self.output.extend(std::iter::repeat_n(0, reply.result as usize - real));
            self.output.extend((real as i64).to_le_bytes());
        }
    }
}

/// A batch as the test knows it.
struct Batch {
    calls: Vec<Call>,
    /// What travels of it.
    bytes: Vec<u8>,
    /// How many of its calls were executed.
    executed: usize,
}

/// Both ends, the bytes between them, and what must be true of all that.
///
/// Batches have consecutive tags, and go through the states in that order: `sent` are those that
/// are written and wait for their replies, `queue` those that are not.
#[derive(Default)]
pub struct Pair {
    stream: Stream<usize>,
    server: Server,
    wire: VecDeque<u8>,
    batches: Vec<Batch>,
    sent: VecDeque<usize>,
    queue: VecDeque<usize>,
    /// Bytes of the queue's first batch that are gone.
    written: usize,
    calls: u64,
    /// That of the stream.
    version: u32,
    /// Tags of the batches that are complete, in the order in which they became so.
    pub answered: Vec<usize>,
    /// Tags of the batches that disconnects returned, in their order.
    pub lost: Vec<usize>,
    /// The server does not keep to the protocol: replies are not compared.
    broken: bool,
}

/// What is true of a reply even if the server says what it likes.
fn check_broken(call: &Call, reply: &Reply) {
    let request = &call.request;
    if what(request) != COPY_OUT || reply.value().is_err() {
        assert!(reply.data.is_empty());
    } else {
        // As much as was asked for; where only the server knows that, as much as it announced.
        let announced = reply.result.cast_unsigned();
        assert!(request.word & Word::reference(1) != 0 || announced == request.args[1]);
        assert!(reply.data.len() as u64 <= announced);
    }
}

impl Pair {
    /// The server speaks that version from here on.
    pub fn set_version(&mut self, version: u32) {
        self.version = version;
        self.stream.set_version(version);
        assert_eq!(self.stream.version(), version);
    }

    pub fn push(&mut self, mut calls: Vec<Call>) {
        for call in &mut calls {
            call.request.args[ID] = self.calls;
            self.calls += 1;
        }
        let pushed = calls.clone();
        // Results of earlier batches do not wait for a call that may take long.
        let late = |call: &Call| what(&call.request) == Sysno::nanosleep as u64;
        if self.version > 0 && calls.iter().any(late) {
            calls[0].request.word |= Word::FLUSH;
        }
        let bytes = calls
            .iter()
            .flat_map(|call| [call.request.to_bytes().to_vec(), call.payload.clone()].concat())
            .collect();
        let tag = self.batches.len();
        self.stream.push(pushed, tag);
        self.batches.push(Batch { calls, bytes, executed: 0 });
        self.queue.push_back(tag);
    }

    /// Writes up to that many bytes of what the stream offers, which must be what is next.
    pub fn write(&mut self, at_most: usize, held: bool) {
        let offered: Vec<u8> =
            self.stream.output(held).iter().flat_map(|piece| piece.to_vec()).collect();
        let held_range = usize::from(self.written > 0);
        let batches = if held { held_range } else { self.queue.len() };
        let next = self.queue.iter().take(batches).flat_map(|tag| &self.batches[*tag].bytes);
        let next: Vec<u8> = next.skip(self.written).copied().collect();
        if offered.is_empty() && !next.is_empty() {
            assert!(self.version > 0, "it offers something while there is some");
            // The first of the queue may be begun.
            let tags = self.sent.iter().chain(self.queue.front());
            let under_way: usize = tags.map(|tag| self.batches[*tag].calls.len()).sum();
            assert!(under_way >= LOG_CAPACITY as usize, "{under_way} calls are under way");
        }
        assert_eq!(offered, next[..offered.len()]);
        let n = offered.len().min(at_most);
        self.stream.wrote(n);
        self.wire.extend(&offered[..n]);
        self.written += n;
        while let Some(tag) = self.queue.front()
            && self.batches[*tag].bytes.len() <= self.written
        {
            self.written -= self.batches[*tag].bytes.len();
            self.sent.extend(self.queue.pop_front());
        }
    }

    pub fn write_all_held(&mut self) {
        while !self.stream.output(true).is_empty() {
            self.write(usize::MAX, true);
            self.check();
        }
    }

    /// Lets bytes reach the server.
    pub fn serve(&mut self, at_most: usize) {
        let bytes: Vec<u8> = self.wire.drain(..at_most.min(self.wire.len())).collect();
        for executed in self.server.serve(&bytes) {
            let id = executed.request.args[ID];
            let tag = self.batches.partition_point(|b| b.calls[0].request.args[ID] <= id) - 1;
            let batch = &mut self.batches[tag];
            // In order, as it was pushed, and never twice.
            assert_eq!(Some(&executed), batch.calls.get(batch.executed), "batch {tag}");
            batch.executed += 1;
        }
    }

    /// Lets bytes come back. Batches are complete with their last byte, neither before nor later.
    pub fn receive(&mut self, at_most: usize) {
        let n = at_most.min(self.server.output.len());
        let bytes: Vec<u8> = self.server.output.drain(..n).collect();
        let mut complete = Vec::new();
        let received = self.stream.receive(&bytes, &mut complete);
        received.expect("the server keeps to the protocol");
        self.complete(complete);
        if self.server.output.is_empty() {
            // Everything that was executed is answered now.
            let open = self.sent.front().map(|tag| &self.batches[*tag]);
            assert!(open.is_none_or(|batch| batch.executed < batch.calls.len()));
        }
    }

    fn complete(&mut self, complete: Vec<(usize, Replies)>) {
        for (tag, replies) in complete {
            assert_eq!(Some(tag), self.sent.pop_front(), "in the order in which they were sent");
            let calls = &self.batches[tag].calls;
            assert_eq!(replies.len(), calls.len());
            for (call, reply) in calls.iter().zip(&replies) {
                if self.broken {
                    check_broken(call, reply);
                } else {
                    assert_eq!(*reply, reply_to(call));
                }
            }
            self.answered.push(tag);
        }
    }

    /// Bytes from a server that does not keep to the protocol. Says whether the stream goes on.
    pub fn receive_garbage(&mut self, bytes: &[u8]) -> bool {
        self.broken = true;
        let mut complete = Vec::new();
        let received = self.stream.receive(bytes, &mut complete);
        // What was complete before the error is not lost with it.
        self.complete(complete);
        received.is_ok()
    }

    /// What the server has to say, with one byte changed.
    pub fn receive_garbled(&mut self, at: usize, with: u8) -> bool {
        let mut bytes: Vec<u8> = self.server.output.drain(..).collect();
        let len = bytes.len().max(1);
        if let Some(byte) = bytes.get_mut(at % len) {
            *byte = with;
        }
        self.receive_garbage(&bytes)
    }

    /// Ends the stream: what is between the ends is gone, and a fresh server waits for the next.
    pub fn disconnect(&mut self) {
        let mut expected: Vec<usize> = self.sent.drain(..).collect();
        if self.written >= REQUEST_SIZE {
            expected.extend(self.queue.pop_front());
        }
        self.written = 0;
        self.stream.disconnect();
        let lost = self.stream.give_up(|_, _| true);
        assert_eq!(lost, expected);
        self.lost.extend(lost);
        self.server = Server::default();
        self.wire.clear();
        self.broken = false;
    }

    pub fn abandon(&mut self) -> Vec<usize> {
        self.queue.clear();
        self.stream.abandon().not_executed
    }

    /// What must be true at any time.
    pub fn check(&self) {
        assert_eq!(self.stream.is_torn(), self.written > 0);
        assert_eq!(self.stream.is_written(), self.queue.is_empty());
        assert_eq!(self.stream.is_answered(), self.sent.is_empty() && self.written == 0);
        // What stays queued if the stream ends now has not been executed, not even in part.
        let stays = usize::from(self.written >= REQUEST_SIZE);
        for tag in self.queue.iter().skip(stays) {
            assert_eq!(self.batches[*tag].executed, 0, "batch {tag} waits and was executed");
        }
    }

    /// Everything that can happen without another disconnect.
    pub fn finish(&mut self) {
        while !self.stream.is_written() || !self.stream.is_answered() {
            let so_far = |pair: &Self| {
                (pair.queue.len(), pair.written, pair.sent.len(), pair.stream.answered())
            };
            let before = so_far(self);
            self.write(usize::MAX, false);
            self.serve(usize::MAX);
            self.receive(usize::MAX);
            self.check();
            assert_ne!(before, so_far(self), "it hangs");
        }
        assert!(self.server.input.is_empty() && self.wire.is_empty());
    }

    pub fn is_torn(&self) -> bool {
        self.written > 0
    }

    /// The tags of what is not written as a whole.
    pub fn queued(&self) -> Vec<usize> {
        self.queue.iter().copied().collect()
    }

    /// How many batches there were: their tags are all below.
    pub fn pushed(&self) -> usize {
        self.tags().end
    }

    fn tags(&self) -> Range<usize> {
        0..self.batches.len()
    }

    pub fn calls_of(&self, tag: usize) -> usize {
        self.batches[tag].calls.len()
    }

    /// How many calls of a batch the server has executed.
    pub fn executed_of(&self, tag: usize) -> usize {
        self.batches[tag].executed
    }
}
