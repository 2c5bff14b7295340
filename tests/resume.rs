//! What becomes of calls whose stream is lost: [`Stream::resume`] and a model of a server that keeps a
//! log, with bytes split anywhere and streams lost at any byte, several times in a row.

mod batches;
mod server;

use std::collections::BTreeSet;

use farcall::abi::handshake::Token;
use farcall::abi::log::LOG_CAPACITY;
use farcall::abi::wire::{Operation, Word};
use farcall::call::{Call, Replies};
use farcall::transport::log::Log;
use farcall::transport::stream::{Fates, Stream};
use proptest::prelude::*;

use batches::{Maker, Piece, pieces};
use server::{Executed, ID, MIX_AT_ONCE, NONE, PURE, Server, undisturbed};

const OURS: Token = Token([1, 2]);

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    Push(Vec<Piece>),
    /// A batch that must not go on over another stream. It has no effect.
    PushOfLink(usize),
    Write(usize),
    Serve(usize),
    Receive(usize),
    /// The stream is lost, with what is under way in both directions.
    Lose,
    /// Another stream, if there is none.
    Reconnect,
    /// The same while the last one is there and hangs.
    Replace,
}

/// How many bytes move at once.
fn amount() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 0..20_usize, 4 => 50..400_usize, 3 => 1000..4000_usize, 2 => Just(usize::MAX)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => pieces().prop_map(Step::Push),
        1 => (1..4_usize).prop_map(Step::PushOfLink),
        12 => amount().prop_map(Step::Write),
        12 => amount().prop_map(Step::Serve),
        10 => amount().prop_map(Step::Receive),
        3 => Just(Step::Lose),
        4 => Just(Step::Reconnect),
        1 => Just(Step::Replace),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..100)
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Tag {
    batch: usize,
    of_link: bool,
}

/// Both ends, and what has become of each batch.
struct Pair {
    stream: Stream<Tag>,
    server: Server,
    wire: Vec<u8>,
    connected: bool,
    /// The number of the first call of this stream, or of the first that the last one left
    /// unanswered.
    first: u64,
    base: u64,
    maker: Maker,
    batches: Vec<Vec<Call>>,
    fates: Vec<Option<Fate>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Complete(Replies),
    NotExecuted,
    Executed,
    /// It was of a link.
    GivenUp,
}

impl Pair {
    fn new() -> Self {
        let mut stream = Stream::default();
        stream.set_version(1);
        let mut server = Server::new();
        server.attach(OURS);
        Self {
            stream,
            server,
            wire: Vec::new(),
            connected: true,
            first: 0,
            base: 0,
            maker: Maker::default(),
            batches: Vec::new(),
            fates: Vec::new(),
        }
    }

    fn push(&mut self, calls: Vec<Call>, of_link: bool) {
        let tag = Tag { batch: self.batches.len(), of_link };
        self.stream.push(calls.clone(), tag);
        self.batches.push(calls);
        self.fates.push(None);
    }

    fn write(&mut self, at_most: usize) {
        if !self.connected {
            return;
        }
        let output = self.stream.output(false);
        let offered: Vec<u8> = output.iter().flat_map(|piece| piece.to_vec()).collect();
        let n = offered.len().min(at_most);
        self.wire.extend(&offered[..n]);
        self.stream.wrote(n);
    }

    fn serve(&mut self, at_most: usize) {
        let n = at_most.min(self.wire.len());
        let bytes: Vec<u8> = self.wire.drain(..n).collect();
        self.server.serve(&bytes);
        // What the server has executed and this side does not know of has its record.
        let known = self.first + self.stream.answered();
        let executed = self.server.calls();
        assert!(!self.connected || executed - known <= LOG_CAPACITY, "{known} of {executed}");
    }

    fn receive(&mut self, at_most: usize) {
        let bytes = self.server.answer(at_most);
        let mut complete = Vec::new();
        self.stream.receive(&bytes, &mut complete).expect("the server keeps to the protocol");
        self.complete(complete);
    }

    fn complete(&mut self, complete: Vec<(Tag, Replies)>) {
        for (tag, replies) in complete {
            self.fate(tag, Fate::Complete(replies));
        }
    }

    fn fate(&mut self, tag: Tag, fate: Fate) {
        let before = self.fates[tag.batch].replace(fate);
        assert_eq!(before, None, "batch {} again", tag.batch);
    }

    fn lose(&mut self) {
        if !self.connected {
            return;
        }
        self.connected = false;
        self.base = self.first + self.stream.answered();
        self.wire.clear();
        self.server.hang_up();
        self.stream.disconnect();
        let mut given_up = self.stream.give_up(|_, tag| tag.of_link);
        given_up.extend(self.stream.withdraw(|tag| tag.of_link));
        for tag in given_up {
            self.fate(tag, Fate::GivenUp);
        }
    }

    fn reconnect(&mut self) {
        self.lose();
        let log = self.server.attach(OURS);
        let end = log.end_of(OURS, true).expect("it is the last one");
        self.resume(&log, end, true);
        self.first = log.head.calls;
        self.connected = true;
    }

    fn resume(&mut self, log: &Log, end: u64, again: bool) {
        let fates = self.stream.resume(log, self.base, end, again);
        self.tell(fates);
    }

    fn tell(&mut self, fates: Fates<Tag>) {
        self.complete(fates.complete);
        for tag in fates.lost {
            self.fate(tag, Fate::Executed);
        }
        for tag in fates.not_executed {
            self.fate(tag, Fate::NotExecuted);
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Push(pieces) => {
                let calls = self.maker.batch(&pieces);
                self.push(calls, false);
            }
            Step::PushOfLink(_) if !self.connected => {}
            Step::PushOfLink(n) => {
                self.push(vec![Call::syscall(PURE, [0; 6]); n], true);
            }
            Step::Write(n) => self.write(n),
            Step::Serve(n) => self.serve(n),
            Step::Receive(n) => self.receive(n),
            Step::Lose => self.lose(),
            Step::Reconnect if self.connected => {}
            Step::Reconnect | Step::Replace => self.reconnect(),
        }
    }

    /// Everything that can happen without another loss.
    fn finish(&mut self) {
        if !self.connected {
            self.reconnect();
        }
        while !self.stream.is_written() || !self.stream.is_answered() {
            let before = (self.server.calls(), self.stream.answered());
            self.write(usize::MAX);
            self.serve(usize::MAX);
            self.receive(usize::MAX);
            let after = (self.server.calls(), self.stream.answered());
            assert!(before != after || self.stream.is_answered(), "it hangs");
        }
        assert!(self.server.is_quiet() && self.wire.is_empty());
    }

    /// The batches that go on over other streams.
    fn lasting(&self) -> Vec<(Vec<Call>, Option<Fate>)> {
        let all = self.batches.iter().cloned().zip(self.fates.iter().cloned());
        all.filter(|(calls, _)| calls[0].request.args[ID] != NONE).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_time: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn calls_get_the_replies_of_an_undisturbed_run_and_are_executed_once_and_in_order(
        steps in steps()
    ) {
        let mut pair = Pair::new();
        for step in steps {
            pair.take(step);
        }
        pair.finish();
        let (batches, fates): (Vec<_>, Vec<_>) = pair.lasting().into_iter().unzip();
        let (server, expected) = undisturbed(&batches);
        for (number, (fate, replies)) in fates.iter().zip(expected).enumerate() {
            prop_assert_eq!(fate, &Some(Fate::Complete(replies.into())), "batch {}", number);
        }
        prop_assert!(pair.fates.iter().all(Option::is_some));
        prop_assert_eq!(&pair.server.effects, &server.effects);
        prop_assert_eq!(&pair.server.registry, &server.registry);
    }

    #[test]
    fn what_a_superseded_controller_is_told_is_true(
        steps in steps(),
        others in prop_oneof![Just(0), 0..300_u64],
        comes_again in any::<bool>(),
    ) {
        let mut pair = Pair::new();
        for step in steps {
            pair.take(step);
        }
        if !pair.connected {
            pair.reconnect();
        }
        pair.lose();
        let waiting: BTreeSet<usize> =
            (0..pair.batches.len()).filter(|batch| pair.fates[*batch].is_none()).collect();
        // Another controller comes, and makes calls.
        pair.server.attach(Token([3, 4]));
        for _ in 0..others {
            let call = Call::syscall(MIX_AT_ONCE, [0; 6]);
            pair.server.serve(&call.request.to_bytes());
        }
        pair.server.answer(usize::MAX);
        let log = if comes_again { pair.server.attach(OURS) } else { pair.server.attach(Token([5, 6])) };
        let end = log.end_of(OURS, false).expect("few have come since");
        pair.resume(&log, end, comes_again);
        if comes_again {
            pair.first = log.head.calls;
            pair.connected = true;
            pair.finish();
        } else {
            let fates = pair.stream.abandon();
            pair.tell(fates);
        }
        for batch in waiting {
            let calls = &pair.batches[batch];
            let executed: Vec<&Executed> =
                calls.iter().filter_map(|call| pair.server.last.get(&call.request.args[ID])).collect();
            match pair.fates[batch].as_ref().expect("each has its fate") {
                Fate::Complete(replies) => {
                    prop_assert!(executed.iter().map(|call| &call.reply).eq(replies));
                }
                Fate::NotExecuted => prop_assert!(
                    calls.iter().filter(|call| has_effect(call)).all(|call| {
                        !pair.server.last.contains_key(&call.request.args[ID])
                    }),
                    "batch {} has begun", batch
                ),
                Fate::Executed => {
                    prop_assert!(!executed.is_empty(), "batch {} has not begun", batch);
                    // While its record is there a result is not lost, but what a COPY_OUT brings is.
                    let outs = calls.iter().any(|call| is(call, Operation::CopyOut));
                    let whole = executed.len() == calls.len();
                    prop_assert!(others > 0 || !whole || outs, "batch {}", batch);
                }
                Fate::GivenUp => panic!("it goes on over other streams"),
            }
        }
    }
}

fn is(call: &Call, operation: Operation) -> bool {
    call.request.word & (Word::OP | Word::NUMBER) == Word::OP | operation as u64
}

/// What only prepares a call behind it is not what a program waits for.
fn has_effect(call: &Call) -> bool {
    !is(call, Operation::CopyIn) && !is(call, Operation::Keep)
}
