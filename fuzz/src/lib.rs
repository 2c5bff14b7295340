//! What the fuzz targets do with an input: one function a target.
//!
//! `tests/fuzz_corpus.rs` runs the same functions on the committed corpus, with stable Rust.

mod server;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use farcall::abi::handshake::{
    ANSWER_SIZE, Answer, HANDSHAKE_MAGIC, HANDSHAKE_VERSION, Hello, Token,
};
use farcall::abi::log::{LOG_CAPACITY, LOG_HEAD_SIZE, LOG_SIZE, LogHead, PAST, Record, Tenure};
use farcall::abi::wire::{Operation, RESULT_SIZE, SPARES, STREAM_VERSION, Word};
use farcall::calls::Sysno;
use farcall::persist::{Hold, answer as read_answer};
use farcall::proto::log::Log;
use farcall::proto::stream::Stream;
use farcall::proto::{Call, Reply};
use server::{Server, send};

/// A target: what it is called, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 4] =
    [("stream", stream), ("answer", answer), ("log", log), ("handshake", handshake)];

/// Takes an input apart from its front; behind its end there are zeros.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let (byte, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *byte
    }

    fn take(&mut self, n: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        front
    }
}

/// The input is what a server sends while batches wait for it.
///
/// It begins with the batches: their number and the stream's version, then for each its number of
/// calls, then a byte or two a call. Then come steps, until the end: a byte that says how many bytes to write (in eights) or to
/// receive, and those to receive.
pub fn stream(input: &[u8]) {
    let mut input = Input(input);
    let mut stream = Stream::default();
    let mut batches = Vec::new();
    let first = input.byte();
    stream.set_version(u32::from(first / 5 % 2));
    for tag in 0..usize::from(first % 5) {
        let calls: Vec<Call> = (0..=input.byte() % 8).map(|_| call(&mut input)).collect();
        stream.push(calls.clone(), tag);
        batches.push(calls);
    }
    let mut complete = Vec::new();
    let mut broken = false;
    while !broken && !input.0.is_empty() {
        let step = input.byte();
        let amount = usize::from(step >> 2);
        if step & 3 == 0 {
            let offered: usize = stream.output(step & 4 != 0).iter().map(|piece| piece.len()).sum();
            stream.wrote(offered.min(amount * RESULT_SIZE));
        } else {
            broken = stream.receive(input.take(amount), &mut complete).is_err();
        }
    }
    stream.disconnect();
    let lost = stream.give_up(|_, _| true);
    // What was not begun goes over the next stream as if there had been no other one.
    let waiting = &batches[complete.len() + lost.len()..];
    let mut resent = Vec::new();
    while !stream.is_written() {
        let size = stream.output(false).iter().map(|piece| piece.len()).sum();
        stream.wrote(size);
    }
    for _ in waiting.iter().flatten() {
        let fault = (-14_i64).to_le_bytes();
        stream.receive(&fault, &mut resent).expect("these are the results it waits for");
    }
    assert!(stream.is_answered());

    // In order: what is complete, what is lost, what was sent again; each batch once.
    let tags = complete.iter().map(|(tag, _)| *tag).chain(lost);
    assert!(tags.chain(resent.iter().map(|(tag, _)| *tag)).eq(0..batches.len()));
    assert!(resent.iter().flat_map(|(_, replies)| replies).all(|reply| reply.result == -14));
    complete.extend(resent);
    for (tag, replies) in &complete {
        assert_eq!(replies.len(), batches[*tag].len());
        for (call, reply) in batches[*tag].iter().zip(replies) {
            check_reply(call, reply);
        }
    }
}

fn call(input: &mut Input<'_>) -> Call {
    let kind = input.byte();
    let len = usize::from(kind >> 2);
    match kind & 3 {
        0 => Call::copy_in(0x1000, vec![0xa5; len]),
        1 => Call::copy_out(0x1000, len),
        // A length of any size, which nobody would take memory for.
        2 if len < 60 => Call::copy_out(0x1000, usize::from(input.byte()) << len),
        // A length that only the server knows.
        2 => {
            let mut call = Call::copy_out(0x1000, 1);
            call.request.word |= Word::reference(1);
            call
        }
        // One that is quick, or one that may block.
        _ => Call::syscall(if len == 0 { Sysno::getpid } else { Sysno::read }, [0; 6]),
    }
}

/// Data comes back for a COPY_OUT that succeeds, and no more than was asked for or announced.
fn check_reply(call: &Call, reply: &Reply) {
    let word = call.request.word;
    let copy_out = word & (Word::OP | Word::NUMBER) == Word::OP | Operation::CopyOut as u64;
    if !copy_out || reply.value().is_err() {
        assert!(reply.data.is_empty());
        return;
    }
    let announced = reply.result.cast_unsigned();
    assert!(word & Word::reference(1) != 0 || announced == call.request.args[1]);
    assert!(reply.data.len() as u64 <= announced);
}

/// The input is what answers a handshake; what is missing at its end is zeros.
pub fn answer(input: &[u8]) {
    let mut bytes = [0; ANSWER_SIZE];
    for (to, from) in bytes.iter_mut().zip(input) {
        *to = *from;
    }
    let said = Answer::from_bytes(&bytes);
    assert_eq!(said.to_bytes(), bytes);
    match read_answer(&bytes) {
        Hold::Ours { fds: [stream, data], own, listener, generation, pid, version } => {
            assert_eq!((said.magic, said.status), (HANDSHAKE_MAGIC, 0));
            assert!(version <= STREAM_VERSION);
            assert!(stream >= 0 && data >= 0 && stream != data);
            assert!(own.iter().all(|fd| *fd >= 0) && own.len() <= SPARES);
            assert!(listener.iter().all(|fd| *fd >= -1));
            assert_eq!([stream, data, -1], said.fds);
            assert_eq!(
                (generation, pid, version),
                (said.generation, said.pid, said.stream_version)
            );
        }
        Hold::Theirs { pid, since } => {
            assert!(said.magic == HANDSHAKE_MAGIC && said.status < 0);
            assert!(pid.is_none_or(|pid| pid > 0));
            assert_eq!(since, said.holder_since);
        }
        Hold::Nobody { generation } => {
            assert!(said.magic == HANDSHAKE_MAGIC && said.status < 0);
            assert_eq!(generation, said.generation);
        }
        Hold::Closed => panic!("an answer came"),
        Hold::Refused(reason) => assert!(!reason.is_empty()),
    }
}

/// The input is what follows an answer to whoever asks for the log, as far as it has arrived; what has not
/// is zeros.
pub fn log(input: &[u8]) {
    let mut bytes = input.to_vec();
    bytes.resize(bytes.len().max(LOG_HEAD_SIZE + LOG_SIZE), 0);
    let (front, records) = bytes.split_first_chunk().expect("a head");
    let (records, _) = records[..LOG_SIZE].as_chunks::<{ size_of::<Record>() }>();
    let head = LogHead::from_bytes(front);
    let LogHead { calls, first, memory, registry, capacity, used, controllers, past } = head;
    let numbers = [calls, first, memory, registry, capacity, used, controllers];
    let past_numbers = past.iter().flat_map(|Tenure { token, end }| [token.0[0], token.0[1], *end]);
    assert!(numbers.into_iter().chain(past_numbers).flat_map(u64::to_le_bytes).eq(*front));

    // It is read as soon as all of it is here, and what comes behind does not count.
    let size = if memory == 0 { LOG_HEAD_SIZE } else { LOG_HEAD_SIZE + LOG_SIZE };
    let log = Log::from_bytes(&bytes).expect("all of it");
    assert_eq!(log.head, head);
    assert_eq!(Log::from_bytes(&bytes[..size]).as_ref(), Some(&log));
    assert_eq!(Log::from_bytes(&bytes[..size - 1]), None);
    assert_eq!(Log::from_bytes(&input[..input.len().min(LOG_HEAD_SIZE - 1)]), None);

    // Each call that is remembered is where its number says, and no other is.
    let remembered = if memory == 0 { 0 } else { calls.min(LOG_CAPACITY) };
    let mut expected = calls - remembered..calls;
    for (number, record) in log.calls() {
        assert_eq!(Some(number), expected.next());
        assert_eq!(log.record(number), Some(record));
        let request = record.request.to_bytes();
        let at = (number % LOG_CAPACITY) as usize;
        assert!(request.into_iter().chain(record.result.to_le_bytes()).eq(records[at]));
    }
    assert_eq!(expected.next(), None);
    let others = [Some(calls), calls.checked_sub(LOG_CAPACITY + 1), Some(u64::MAX)];
    let others = others
        .into_iter()
        .flatten()
        .filter(|number| *number >= calls || calls - number > LOG_CAPACITY);
    others.for_each(|number| assert_eq!(log.record(number), None));

    // Whose they were: nobody's who came later than the last one.
    for number in [0, calls, u64::MAX].into_iter().chain(past.map(|tenure| tenure.end)) {
        assert!(log.controller_of(number).is_none_or(|controller| controller <= controllers));
    }
    // Of the controllers that are remembered it is known where their calls end.
    let none = Token([0; 2]);
    assert_eq!(log.end_of(none, controllers), Some(calls));
    for back in 1..=(PAST as u64 + 1) {
        let Some(number) = controllers.checked_sub(back) else { break };
        let tenure = past[((number + 1) % PAST as u64) as usize];
        let expected = (back <= PAST as u64).then_some(tenure.end);
        assert_eq!(log.end_of(tenure.token, number), expected);
        let [low, high] = tenure.token.0;
        assert_eq!(log.end_of(Token([!low, high]), number), None);
    }
    if let Some(later) = controllers.checked_add(1) {
        assert_eq!(log.end_of(none, later), None);
    }
}

/// The input is what a client of a persistent process's socket sends, in steps: a byte that says with
/// how many descriptors (two bits) and how many bytes, and those. Whatever it was, the process is
/// there for the next one, and nobody can have attached but once.
pub fn handshake(input: &[u8]) {
    let mut server = Server::start();
    let (_stream, theirs) = UnixStream::pair().unwrap();
    let client = server.connect();
    let mut input = Input(input);
    while !input.0.is_empty() {
        let step = input.byte();
        let bytes = input.take(usize::from(step >> 2));
        let fds = vec![theirs.as_raw_fd(); usize::from(step & 3)];
        if bytes.is_empty() || !send(&client, bytes, &fds) {
            break;
        }
    }
    // Who asks without descriptors changes nothing either: asked twice, it is the same.
    let token = Token([u64::MAX; 2]);
    let hello = Hello {
        magic: HANDSHAKE_MAGIC,
        version: HANDSHAKE_VERSION,
        token,
        flags: Hello::LOG,
        ..Hello::default()
    };
    let told = [(); 2].map(|()| server.answer(&hello.to_bytes()));
    assert_eq!(told[0], told[1]);
    let (answer, head) = told[0].split_first_chunk().expect("an answer");
    let answer = Answer::from_bytes(answer);
    let head = LogHead::from_bytes(head.try_into().expect("a log without records"));
    assert_eq!((answer.magic, answer.version), (HANDSHAKE_MAGIC, HANDSHAKE_VERSION));
    // Somebody may be attached: by version 1 with a token, or by version 0.
    assert!(answer.status < 0 && answer.generation <= 1);
    assert!(head.controllers <= answer.generation);
    assert_eq!((head.calls, head.memory, head.registry), (0, 0, 0));
}
