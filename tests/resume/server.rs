//! A server of version 1 in memory: it keeps a log, a registry, and a state that depends on every
//! call that it has executed, so that one that is executed twice, or not in order, changes what comes
//! after it.
//!
//! Argument 5 of a call is the call's own number for the test. What a COPY_OUT is sent again as has
//! none.

use std::collections::{BTreeMap, HashMap};

use farcall::abi::handshake::Token;
use farcall::abi::log::{LOG_CAPACITY, LOG_HEAD_SIZE, LogHead, PAST, Record, Tenure};
use farcall::abi::wire::{MAX_REF, Operation, REQUEST_SIZE, Request, Word};
use farcall::calls::Sysno;
use farcall::proto::log::Log;
use farcall::proto::{Call, Reply};
use nix::errno::Errno;

pub const ID: usize = 5;
/// What is not a call of the test's.
pub const NONE: u64 = 0;

/// The end of the memory that can be reached.
pub const LIMIT: u64 = 1 << 40;

const CANCELED: i64 = -(Errno::ECANCELED as i64);

/// Returns a mix of the state and argument 2, or the errno in argument 4. It may block.
pub const MIX: Sysno = Sysno::futex;
/// The same of a call that does not block.
pub const MIX_AT_ONCE: Sysno = Sysno::getpid;
/// Changes nothing.
pub const PURE: Sysno = Sysno::getppid;
/// Puts up to argument 1 bytes at argument 0. The result is how many.
pub const FILL: Sysno = Sysno::read;

/// What was executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    pub id: u64,
    pub reply: Reply,
}

#[derive(Default)]
pub struct Server {
    input: Vec<u8>,
    output: Vec<u8>,
    head: LogHead,
    records: Vec<Record>,
    /// The call that is about the next one, and that one's number.
    prepared: Option<(u64, u64)>,
    state: u64,
    memory: BTreeMap<u64, u8>,
    token: Token,
    /// What each call has done last, and all that have had an effect, in order.
    pub last: HashMap<u64, Executed>,
    pub effects: Vec<Executed>,
    /// Which KEEP has entered what.
    pub registry: Vec<(u64, Executed)>,
}

impl Server {
    pub fn new() -> Self {
        // It has memory for its log.
        let head = LogHead { memory: 4096, ..LogHead::default() };
        Self { head, records: vec![Record::default(); LOG_CAPACITY as usize], ..Self::default() }
    }

    /// Takes bytes of the stream.
    pub fn serve(&mut self, bytes: &[u8]) {
        self.input.extend(bytes);
        let mut input = std::mem::take(&mut self.input);
        let mut at = 0;
        while let Some(head) = input[at..].first_chunk::<REQUEST_SIZE>() {
            let request = Request::from_bytes(head);
            let is_in = what(&request) == op(Operation::CopyIn);
            let len = if is_in { request.args[1] as usize } else { 0 };
            let rest = &input[at + REQUEST_SIZE..];
            if rest.len() < len {
                break;
            }
            self.execute(request, &rest[..len]);
            at += REQUEST_SIZE + len;
        }
        input.drain(..at);
        self.input = input;
    }

    /// Takes up to that many bytes of its answers.
    pub fn answer(&mut self, at_most: usize) -> Vec<u8> {
        self.output.drain(..at_most.min(self.output.len())).collect()
    }

    pub fn is_quiet(&self) -> bool {
        self.input.is_empty() && self.output.is_empty()
    }

    /// The stream is over.
    pub fn hang_up(&mut self) {
        self.input.clear();
        self.output.clear();
        self.prepared = None;
    }

    /// A controller attaches, and is told the log.
    pub fn attach(&mut self, token: Token) -> Log {
        self.hang_up();
        self.head.first = self.head.calls;
        if token != self.token {
            self.head.controllers += 1;
            let past = Tenure { token: self.token, end: self.head.calls };
            self.head.past[self.head.controllers as usize % PAST] = past;
            self.token = token;
        }
        let log = Log::from_bytes(&self.log()).expect("it is complete");
        assert_eq!(log.head, self.head);
        log
    }

    /// How many calls were executed.
    pub fn calls(&self) -> u64 {
        self.head.calls
    }

    fn log(&self) -> Vec<u8> {
        let LogHead { calls, first, memory, registry, capacity, used, controllers, past } =
            self.head;
        let mut numbers = vec![calls, first, memory, registry, capacity, used, controllers];
        for Tenure { token, end } in past {
            numbers.extend([token.0[0], token.0[1], end]);
        }
        assert_eq!(numbers.len() * 8, LOG_HEAD_SIZE);
        for Record { request, result } in &self.records {
            numbers
                .extend([&[request.word][..], &request.args, &[result.cast_unsigned()]].concat());
        }
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    fn earlier(&self, distance: u64) -> i64 {
        let LogHead { calls, first, .. } = self.head;
        if distance.wrapping_sub(1) >= MAX_REF.min(calls - first) {
            return CANCELED;
        }
        self.records[((calls - distance) % LOG_CAPACITY) as usize].result
    }

    fn execute(&mut self, mut request: Request, payload: &[u8]) {
        let word = request.word;
        assert_eq!(word >> Word::bits(1), 0, "bits that must be zero");
        let mut skipped = word & Word::LINK != 0 && is_error(self.earlier(1));
        for index in 0..6 {
            if word & Word::reference(index) != 0 {
                let result = self.earlier(request.args[index as usize]);
                request.args[index as usize] = result.cast_unsigned();
                skipped |= is_error(result);
            }
        }
        request.word = what(&request);
        let id = request.args[ID];
        let mut data = None;
        let result = if skipped {
            CANCELED
        } else {
            let (result, bytes) = self.perform(&request, payload);
            data = bytes;
            result
        };
        self.output.extend(result.to_le_bytes());
        let mut reply = Reply { result, data: Vec::new() };
        if let Some(bytes) = data {
            let mut padded = bytes.clone();
            padded.resize(result as usize, 0);
            self.output.extend(padded);
            self.output.extend((bytes.len() as i64).to_le_bytes());
            reply.data = bytes;
        }
        let executed = Executed { id, reply };
        self.note(&request, executed.clone());
        if let Some((keep, number)) = self.prepared
            && number == self.head.calls
            && !is_error(result)
        {
            self.registry.push((keep, executed));
        }
        self.records[(self.head.calls % LOG_CAPACITY) as usize] = Record { request, result };
        self.head.calls += 1;
    }

    /// Each call is executed once, but for those that may be repeated.
    fn note(&mut self, request: &Request, executed: Executed) {
        let id = executed.id;
        if id == NONE {
            return;
        }
        let before = self.last.insert(id, executed.clone());
        if what(request) == op(Operation::Keep) {
            assert!(
                !self.last.contains_key(&(id + 1)),
                "KEEP {id} after the call that it is about"
            );
        } else {
            assert_eq!(before, None, "call {id} for the second time");
        }
        if let Some(last) = self.effects.last() {
            assert!(last.id < id, "call {id} after call {}", last.id);
        }
        if ![Operation::Keep, Operation::CopyOut].map(op).contains(&what(request)) {
            self.effects.push(executed);
        }
    }

    fn perform(&mut self, request: &Request, payload: &[u8]) -> (i64, Option<Vec<u8>>) {
        const EFAULT: i64 = -(Errno::EFAULT as i64);
        let [first, second, third, _, outcome, id] = request.args;
        let outcome = outcome.cast_signed();
        if request.word == PURE as u64 {
            return (1, None);
        }
        if request.word & Word::OP == 0 {
            self.state = self.state.wrapping_mul(31).wrapping_add(third).wrapping_add(id);
            let number = Sysno::new(request.word as usize).expect("one of the test's");
            let result = match number {
                _ if outcome < 0 => outcome,
                MIX | MIX_AT_ONCE => (self.state & 0xffff_ffff) as i64,
                FILL => {
                    let bytes = (0..outcome as u64).map(|at| (first + at, (self.state + at) as u8));
                    self.memory.extend(bytes);
                    outcome
                }
                other => panic!("{other}"),
            };
            return (result, None);
        }
        match Operation::from_number(request.word as u32).expect("one of the protocol's") {
            Operation::CopyIn if first >= LIMIT => (EFAULT, None),
            Operation::CopyIn => {
                self.memory.extend((first..).zip(payload.iter().copied()));
                (payload.len() as i64, None)
            }
            Operation::CopyOut => {
                let end = (first + second).min(LIMIT);
                let byte = |at| self.memory.get(&at).copied().unwrap_or(0);
                (second as i64, Some((first..end).map(byte).collect()))
            }
            Operation::Store => {
                self.memory.extend((first..first + second).zip(third.to_le_bytes()));
                (0, None)
            }
            Operation::Keep if outcome < 0 => (outcome, None),
            Operation::Keep => {
                self.prepared = Some((id, self.head.calls + 1));
                (0, None)
            }
            other => panic!("{other:?}"),
        }
    }
}

/// What a request asks for, whatever else its word says.
fn what(request: &Request) -> u64 {
    request.word & (Word::OP | Word::NUMBER)
}

fn op(operation: Operation) -> u64 {
    Word::OP | operation as u64
}

fn is_error(result: i64) -> bool {
    (-4095..0).contains(&result)
}

/// What a controller that nobody disturbs is told: the replies to all calls of each batch.
pub fn undisturbed(batches: &[Vec<Call>]) -> (Server, Vec<Vec<Reply>>) {
    let mut server = Server::new();
    server.attach(Token([7, 7]));
    let mut replies = Vec::new();
    for batch in batches {
        let mut of_batch = Vec::new();
        for call in batch {
            server.serve(&[call.request.to_bytes().as_slice(), &call.payload].concat());
            of_batch.push(server.last[&call.request.args[ID]].reply.clone());
        }
        replies.push(of_batch);
    }
    (server, replies)
}
