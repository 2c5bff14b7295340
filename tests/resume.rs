//! What becomes of calls whose stream is lost: [`Stream::resume`] and a model of a server that keeps a
//! log, with bytes split anywhere and streams lost at any byte, several times in a row.

mod batches;
mod server;

use farcall::abi::handshake::Token;
use farcall::abi::log::LOG_CAPACITY;
use farcall::abi::wire::{Operation, Word};
use farcall::proto::log::Log;
use farcall::proto::stream::{Fates, Stream};
use farcall::proto::{Call, Replies};
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
    /// Other controllers hold the process, one after the other, each for so many calls. The stream is lost
    /// by then, or by that.
    Others(Vec<u64>),
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

/// The same with other controllers in between: some make more calls than the log remembers, and
/// sometimes there are more of them than it remembers.
fn steps_with_others() -> impl Strategy<Value = Vec<Step>> {
    let calls = prop_oneof![3 => 0..20_u64, 1 => 100..300_u64];
    let others = prop_oneof![
        5 => prop::collection::vec(calls.clone(), 1..3),
        1 => prop::collection::vec(calls, 3..8),
    ];
    let step = prop_oneof![12 => step(), 1 => others.prop_map(Step::Others)];
    prop::collection::vec(step, 1..100)
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
    /// The number of this controller's tenure, and how many others there have been.
    tenure: u64,
    others: u64,
    maker: Maker,
    batches: Vec<Vec<Call>>,
    fates: Vec<Option<Fate>>,
    /// The batches that were under way or waited when others had held the process, each with how many of
    /// its calls had been executed by then.
    closed: Vec<(usize, usize)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Complete(Replies),
    NotExecuted,
    Executed,
    PossiblyExecuted,
    /// It was of a link.
    GivenUp,
}

impl Pair {
    fn new() -> Self {
        let mut stream = Stream::default();
        stream.set_version(1);
        let mut server = Server::new();
        let tenure = server.attach(OURS).head.controllers;
        Self {
            stream,
            server,
            wire: Vec::new(),
            connected: true,
            first: 0,
            base: 0,
            tenure,
            others: 0,
            maker: Maker::default(),
            batches: Vec::new(),
            fates: Vec::new(),
            closed: Vec::new(),
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
        let held = log.head.controllers != self.tenure;
        let pending: Vec<usize> = if held { self.pending() } else { Vec::new() };
        self.resume(&log, !held);
        if held {
            let fates = self.stream.abandon();
            self.tell(fates);
            let executed = pending.iter().map(|batch| (*batch, self.executed(*batch)));
            let executed: Vec<_> = executed.collect();
            self.closed.extend(executed);
        }
        self.tenure = log.head.controllers;
        self.first = log.head.calls;
        self.connected = true;
    }

    /// The batches that have no fate yet.
    fn pending(&self) -> Vec<usize> {
        (0..self.batches.len()).filter(|batch| self.fates[*batch].is_none()).collect()
    }

    /// How many calls of a batch have been executed.
    fn executed(&self, batch: usize) -> usize {
        let calls = self.batches[batch].iter();
        calls.filter(|call| self.server.last.contains_key(&call.request.args[ID])).count()
    }

    fn resume(&mut self, log: &Log, again: bool) {
        let Some(end) = log.end_of(OURS, self.tenure) else {
            assert!(!again, "it is the last one");
            for tag in self.stream.give_up(|_, _| true) {
                self.fate(tag, Fate::PossiblyExecuted);
            }
            return;
        };
        let fates = self.stream.resume(log, self.base, end, again);
        self.tell(fates);
    }

    /// Other controllers come and go.
    fn others(&mut self, calls: &[u64]) {
        self.lose();
        for calls in calls {
            self.others += 1;
            self.server.attach(Token([3, self.others]));
            for _ in 0..*calls {
                let call = Call::syscall(MIX_AT_ONCE, [0; 6]);
                self.server.serve(&call.request.to_bytes());
            }
            self.server.answer(usize::MAX);
        }
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
            Step::Others(calls) => self.others(&calls),
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
    fn nothing_is_sent_after_others_have_held_the_process_and_what_is_told_is_true(
        steps in steps_with_others(),
        comes_again in any::<bool>(),
    ) {
        let mut pair = Pair::new();
        for step in steps {
            pair.take(step);
        }
        if comes_again {
            pair.finish();
        } else {
            // Nobody has the process any more who would send anything.
            pair.others(&[0]);
            let log = pair.server.attach(Token([5, 6]));
            pair.resume(&log, false);
            let fates = pair.stream.abandon();
            pair.tell(fates);
        }
        for (batch, executed) in &pair.closed {
            prop_assert_eq!(pair.executed(*batch), *executed, "batch {} went on", batch);
        }
        for (batch, fate) in pair.fates.iter().enumerate() {
            let fate = fate.as_ref().expect("each has its fate");
            pair.is_true(batch, fate)?;
        }
    }
}

impl Pair {
    /// Whether that is what has become of a batch.
    fn is_true(&self, batch: usize, fate: &Fate) -> Result<(), TestCaseError> {
        let calls = &self.batches[batch];
        let executed: Vec<&Executed> =
            calls.iter().filter_map(|call| self.server.last.get(&call.request.args[ID])).collect();
        match fate {
            Fate::Complete(replies) if calls[0].request.args[ID] != NONE => {
                prop_assert!(executed.iter().map(|call| &call.reply).eq(replies), "batch {batch}");
            }
            Fate::NotExecuted => {
                let begun = calls
                    .iter()
                    .filter(|call| has_effect(call))
                    .any(|call| self.server.last.contains_key(&call.request.args[ID]));
                prop_assert!(!begun, "batch {batch} has begun");
            }
            Fate::Executed => {
                prop_assert!(!executed.is_empty(), "batch {batch} has not begun");
                // While its record is there a result is not lost, but what a COPY_OUT brings is.
                let outs = calls.iter().any(|call| is(call, Operation::CopyOut));
                let whole = executed.len() == calls.len();
                prop_assert!(self.others > 0 || !whole || outs, "batch {batch}");
            }
            Fate::Complete(_) | Fate::PossiblyExecuted | Fate::GivenUp => {}
        }
        Ok(())
    }
}

fn is(call: &Call, operation: Operation) -> bool {
    call.request.word & (Word::OP | Word::NUMBER) == Word::OP | operation as u64
}

/// What only prepares a call behind it is not what a program waits for.
fn has_effect(call: &Call) -> bool {
    !is(call, Operation::CopyIn) && !is(call, Operation::Keep)
}
