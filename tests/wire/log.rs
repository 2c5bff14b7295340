//! The call log: what a process has executed last, and what a handshake is told of it.

use std::os::fd::RawFd;
use std::path::Path;

use nix::libc;
use nix::unistd;

use crate::client::{Answer, Attached, Client, Ends, OTHER, TOKEN, attach, count, hello};
use crate::ring::{Ring, blocked_in, fetch, pack, pipe};
use crate::server::{Persistent, Server};
use crate::stream::{
    COPY_IN, COPY_OUT, HELLO, IMAGE, KEEP, OP, REGISTRY, RING, SERVE, Stream, UNKNOWN, read_up_to,
    request, until,
};
use crate::vectors;

const LINK: u64 = 1 << 33;
const FLUSH: u64 = 1 << 34;
const REF0: u64 = 1 << 35;
const REF1: u64 = 1 << 36;
const COPY: u64 = OP | 3;
const LOAD: u64 = OP | 4;
const STORE: u64 = OP | 5;
const CANCELED: i64 = -(libc::ECANCELED as i64);
const EINVAL: i64 = -(libc::EINVAL as i64);
const EBADF: i64 = -(libc::EBADF as i64);
const GETPID: u64 = libc::SYS_getpid as u64;
const DUP: u64 = libc::SYS_dup as u64;
const CLOSE: u64 = libc::SYS_close as u64;

const HEAD: usize = 152;
const RECORD: usize = 64;
const RECORDS: u64 = 128;

/// Nobody's token, and another third one.
const NOBODY: [u8; 16] = [0; 16];
const THIRD: [u8; 16] = [0x33; 16];

/// What a handshake was told. Its fields lie where `docs/protocol.md` says.
pub struct Log {
    head: Vec<u8>,
    records: Vec<u8>,
}

impl Log {
    fn number(&self, at: usize) -> u64 {
        u64::from_le_bytes(*self.head[at..].first_chunk().unwrap())
    }

    pub fn calls(&self) -> u64 {
        self.number(0)
    }

    pub fn first(&self) -> u64 {
        self.number(8)
    }

    pub fn memory(&self) -> u64 {
        self.number(16)
    }

    pub fn controllers(&self) -> u64 {
        self.number(48)
    }

    /// The token and the end of the controller that controller `n` came after.
    fn before(&self, n: u64) -> ([u8; 16], u64) {
        let at = 56 + 24 * (n % 4) as usize;
        (*self.head[at..].first_chunk().unwrap(), self.number(at + 16))
    }

    fn record(&self, number: u64) -> &[u8] {
        &self.records[(number % RECORDS) as usize * RECORD..][..RECORD]
    }

    /// The calls from number `from` on are these, and there are no others.
    #[track_caller]
    pub fn goes_on(&self, from: u64, records: &[Vec<u8>]) {
        for (number, expected) in (from..).zip(records) {
            assert_eq!(words(self.record(number)), words(expected), "call {number}");
        }
        assert_eq!(self.calls(), from + records.len() as u64);
    }
}

/// A record as numbers, which a person can compare.
fn words(bytes: &[u8]) -> Vec<i64> {
    bytes.as_chunks().0.iter().map(|word| i64::from_le_bytes(*word)).collect()
}

/// The record of a call.
pub fn record(word: u64, args: &[u64], result: i64) -> Vec<u8> {
    [request(word, args), result.to_le_bytes().to_vec()].concat()
}

/// A handshake that asks for the log.
fn asking(token: &[u8; 16], flags: u8, version: u8) -> Vec<u8> {
    let mut bytes = hello(token);
    bytes[12] = version;
    bytes[36] = flags | 2;
    bytes
}

/// Sends a handshake that asks for the log. Its answer and the log, and nothing behind them.
#[track_caller]
fn told(path: &Path, hello: &[u8], fds: &[RawFd]) -> (Answer, Log) {
    let client = Client::connect(path);
    assert!(client.send(hello, fds));
    let records = RECORDS as usize * RECORD;
    let mut bytes = read_up_to(&client.0, 72 + HEAD + records + 1);
    let answer = Answer(*bytes.first_chunk().expect("an answer"));
    let mut head = bytes.split_off(72);
    let rest = head.split_off(HEAD);
    let log = Log { head, records: rest };
    assert_eq!(log.records.len(), if log.memory() == 0 { 0 } else { records });
    (answer, log)
}

/// The log, asked for by somebody who does not attach.
#[track_caller]
pub fn look(process: &Persistent) -> Log {
    told(&process.path, &asking(&THIRD, 0, 0), &[]).1
}

/// Attaches, in that version of the stream, and is told the log.
#[track_caller]
pub fn attach_and_ask(process: &Persistent, token: &[u8; 16], version: u8) -> (Attached, Log) {
    let ends = Ends::new();
    let (answer, log) = told(&process.path, &asking(token, 0, version), &ends.raw());
    assert_eq!((answer.status(), answer.0[16]), (0, version));
    let Ends { stream, data, .. } = ends;
    (Attached { stream, data, answer }, log)
}

/// A persistent process that keeps a log: calls 0 to 2 were made without, and call 3 is the HELLO.
fn with_a_log() -> (Persistent, Attached) {
    let process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    attached.stream.speaks_version_1();
    (process, attached)
}

/// Makes calls on a stream, and writes their records down.
struct Made<'a> {
    stream: &'a Stream,
    records: Vec<Vec<u8>>,
}

impl<'a> Made<'a> {
    fn on(stream: &'a Stream) -> Self {
        Self { stream, records: Vec::new() }
    }

    /// A call that is in the log as it was sent, but for flags of a system call that was made.
    #[track_caller]
    fn ask(&mut self, word: u64, args: &[u64]) -> i64 {
        let result = self.stream.ask(word, args);
        let word = if word & OP == 0 && result != CANCELED { word & 0xffff_ffff } else { word };
        self.records.push(record(word, args, result));
        result
    }

    /// A call whose arguments are other ones in the log.
    #[track_caller]
    fn ask_with(&mut self, word: u64, args: &[u64], resolved: &[u64]) -> i64 {
        let result = self.ask(word, args);
        let last = self.records.last_mut().unwrap();
        last[8..8 + 8 * resolved.len()].copy_from_slice(&resolved.map_bytes());
        result
    }
}

/// Numbers as bytes.
trait MapBytes {
    fn map_bytes(&self) -> Vec<u8>;
}

impl MapBytes for [u64] {
    fn map_bytes(&self) -> Vec<u8> {
        self.iter().flat_map(|number| number.to_le_bytes()).collect()
    }
}

#[test]
fn calls_of_a_stream_of_version_1_have_their_records_in_order() {
    let (process, attached) = with_a_log();
    let stream = &attached.stream;
    let pid = i64::from(process.server.pid());
    let memory = stream.memory(4096);
    let from = look(&process).calls();
    let mut made = Made::on(stream);

    assert_eq!(made.ask(GETPID, &[1, 2, 3, 4, 5, 6]), pid);
    let fd = made.ask(DUP | FLUSH, &[0]);
    assert_eq!(made.ask_with(CLOSE | LINK | REF0, &[1], &[fd as u64]), 0);
    // What fails, what is not executed, and what is none.
    assert_eq!(made.ask(CLOSE, &[77]), EBADF);
    assert_eq!(made.ask_with(CLOSE | LINK | REF0, &[1], &[EBADF as u64]), CANCELED);
    assert_eq!(made.ask_with(DUP | REF0, &[65], &[CANCELED as u64]), CANCELED);
    assert_eq!(stream.ask(GETPID | 1 << 63, &[]), EINVAL);
    made.records.push(record(GETPID | 1 << 63, &[], EINVAL));
    // Operations, with all that belongs to them in the stream.
    assert_eq!(made.ask(STORE, &[memory, 8, 16]), 0);
    assert_eq!(made.ask(LOAD, &[memory, 8]), 16);
    assert_eq!(made.ask(COPY, &[memory + 8, memory, 8]), 8);
    assert_eq!(stream.copy_in(memory, &[7; 3000]), 3000);
    made.records.push(record(COPY_IN, &[memory, 3000], 3000));
    assert_eq!(stream.copy_in(8, &[7; 3000]), -14);
    made.records.push(record(COPY_IN, &[8, 3000], -14));
    assert_eq!(stream.copy_out(memory, 10).0, [7; 10]);
    made.records.push(record(COPY_OUT, &[memory, 10], 10));
    assert_eq!(stream.copy_out(8, 5000).1, 0);
    made.records.push(record(COPY_OUT, &[8, 5000], 5000));
    assert_eq!(made.ask(COPY_OUT, &[memory, 1 << 63]), EINVAL);
    assert_eq!(made.ask_with(COPY_OUT | REF1, &[memory, 1], &[memory, EINVAL as u64]), CANCELED);
    assert!(made.ask(IMAGE, &[]) > 0);
    assert_eq!(made.ask(HELLO, &[1, memory, 1 << 20]) & 0xffff, 1);
    assert_eq!(made.ask(RING, &[memory + 1, 0]), -14);
    assert_eq!(made.ask(REGISTRY, &[memory, 8]), 0);
    assert_eq!(made.ask(KEEP, &[0, memory + 2048, 128, 0, 1, 0]), 0);
    assert_eq!(made.ask(GETPID, &[]), pid);
    assert!(made.ask(SERVE, &[u64::MAX, u64::MAX]) > 0);
    assert_eq!(made.ask(GETPID, &[]), pid);
    look(&process).goes_on(from, &made.records);
}

#[test]
fn a_copy_in_whose_address_is_a_result_lands_there_and_says_so() {
    let (process, attached) = with_a_log();
    let memory = attached.stream.memory(4096);
    assert_eq!(attached.stream.ask(STORE, &[memory, 8, memory + 100]), 0);
    assert_eq!(attached.stream.ask(LOAD, &[memory, 8]), (memory + 100) as i64);
    let from = look(&process).calls();
    attached.stream.send(&[request(COPY_IN | REF0, &[1, 5]), b"hello".to_vec()].concat());
    assert_eq!(attached.stream.result(), 5);
    look(&process).goes_on(from, &[record(COPY_IN | REF0, &[memory + 100, 5], 5)]);
    assert_eq!(attached.stream.copy_out(memory + 100, 5).0, b"hello");
}

#[test]
fn calls_of_a_stream_of_version_0_have_their_records_too() {
    let (process, attached) = with_a_log();
    drop(attached);
    let (attached, log) = attach_and_ask(&process, &TOKEN, 0);
    let (stream, from) = (&attached.stream, log.calls());
    let mut made = Made::on(stream);
    assert_eq!(made.ask(GETPID, &[9]), i64::from(process.server.pid()));
    assert_eq!(made.ask(CLOSE, &[77]), EBADF);
    assert_eq!(stream.ask(CLOSE | LINK, &[77]), EINVAL);
    made.records.push(record(CLOSE | LINK, &[77], EINVAL));
    let memory = made.ask(libc::SYS_brk as u64, &[]) as u64;
    assert_eq!(stream.copy_in(8, &[1; 100]), -14);
    made.records.push(record(COPY_IN, &[8, 100], -14));
    assert_eq!(stream.copy_out(8, 100).1, 0);
    made.records.push(record(COPY_OUT, &[8, 100], 100));
    assert_eq!(made.ask(LOAD, &[memory | 1, 3]), EINVAL);
    look(&process).goes_on(from, &made.records);
}

#[test]
fn calls_of_a_ring_have_their_records_between_those_of_the_stream() {
    let (process, attached) = with_a_log();
    let pid = i64::from(process.server.pid());
    let mut ring = Ring::beside(process.server.pid(), &attached.stream);
    let memory = attached.stream.memory(4096);
    let log = look(&process);
    assert_eq!(
        words(log.record(log.calls() - 2)),
        words(&record(RING, &[ring.address, pack(ring.numbers)], 0)),
        "the call that has made it"
    );
    let from = log.calls();
    let mut records = Vec::new();
    let fd = ring.ask(DUP, &[0]);
    records.push(record(DUP, &[0], fd));
    assert_eq!(attached.stream.ask(CLOSE | REF0, &[1]), 0);
    records.push(record(CLOSE, &[fd as u64], 0));
    assert_eq!(ring.ask(CLOSE | FLUSH, &[77]), EBADF);
    records.push(record(CLOSE, &[77], EBADF));
    assert_eq!(ring.ask(CLOSE | LINK | FLUSH, &[77]), CANCELED);
    records.push(record(CLOSE | LINK | FLUSH, &[77], CANCELED));
    assert_eq!(ring.ask(STORE, &[memory, 4, 5]), 0);
    records.push(record(STORE, &[memory, 4, 5], 0));
    for word in [COPY_IN, HELLO, UNKNOWN, GETPID | 1 << 47] {
        assert_eq!(ring.ask(word, &[memory, 1]), EINVAL);
        records.push(record(word, &[memory, 1], EINVAL));
    }
    for _ in 0..40 {
        ring.is_in_step(process.server.pid());
        records.push(record(GETPID, &[], pid));
        assert_eq!(attached.stream.getpid(), pid);
        records.push(record(GETPID, &[], pid));
    }
    look(&process).goes_on(from, &records);
}

#[test]
fn numbers_go_on_over_connections_and_128_records_over_laps() {
    let (process, attached) = with_a_log();
    let mut calls = 4;
    assert_eq!(look(&process).calls(), calls);
    drop(attached);
    let mut records: Vec<Vec<u8>> = Vec::new();
    for round in 0..30u64 {
        let token = [TOKEN, OTHER][round as usize % 2];
        let (attached, log) = attach_and_ask(&process, &token, (round % 3 != 0) as u8);
        assert_eq!((log.calls(), log.first()), (calls, calls), "it begins here");
        let last = &records[records.len().saturating_sub(RECORDS as usize)..];
        log.goes_on(calls - last.len() as u64, last);
        let mut made = Made::on(&attached.stream);
        (0..round).for_each(|n| assert_eq!(made.ask(CLOSE, &[1000, round, n]), EBADF));
        records.extend(made.records);
        calls += round;
        let seen = look(&process);
        assert_eq!((seen.calls(), seen.first()), (calls, calls - round));
    }
}

#[test]
fn calls_before_the_hello_have_records_of_zeros_and_the_hello_has_its_own() {
    let (process, attached) = with_a_log();
    let log = look(&process);
    assert_eq!((log.calls(), log.first()), (4, 4), "version 1 begins behind it");
    for number in 0..3 {
        assert_eq!(words(log.record(number)), [0; 8], "call {number}");
    }
    let args = [1, log.memory(), 16_384];
    assert_eq!(words(log.record(3)), words(&record(HELLO, &args, crate::vectors::offered() | 1)));
    // They lie in the memory that HELLO gave, where this question finds itself as well.
    let own = attached.stream.copy_out(log.memory() + 8192, 5 * RECORD).0;
    assert_eq!(words(&own[..4 * RECORD]), words(&log.records[..4 * RECORD]));
    let question = record(COPY_OUT, &[log.memory() + 8192, 5 * RECORD as u64], 5 * RECORD as i64);
    assert_eq!(words(&own[4 * RECORD..]), words(&question));
}

#[test]
fn a_process_without_memory_has_no_records_and_counts_nevertheless() {
    let process = Persistent::new();
    let log = look(&process);
    assert_eq!(log.head, [0; HEAD]);
    let (attached, _) = attach_and_ask(&process, &TOKEN, 0);
    attached.stream.is_in_step();
    let log = look(&process);
    assert_eq!((log.calls(), log.first(), log.memory()), (2, 0, 0));
}

#[test]
fn other_memory_has_the_log_of_that_before() {
    let (process, attached) = with_a_log();
    (0..200).for_each(|n| assert_eq!(attached.stream.ask(CLOSE, &[1000, n]), EBADF));
    drop(attached);
    let (attached, before) = attach_and_ask(&process, &OTHER, 0);
    attached.stream.speaks_version_1();
    let after = look(&process);
    assert_ne!(after.memory(), before.memory());
    assert_eq!(after.calls(), before.calls() + 2);
    for number in after.calls() - RECORDS..before.calls() {
        assert_eq!(words(after.record(number)), words(before.record(number)), "call {number}");
    }
    assert_eq!(after.record(after.calls() - 1)[..8], HELLO.to_le_bytes());
    // Nothing is written where it was.
    attached.stream.is_in_step();
    let old = attached.stream.copy_out(before.memory() + 8192, 8192).0;
    let written = old.as_chunks::<64>().0.iter().zip(before.records.as_chunks::<64>().0);
    assert_eq!(written.filter(|(now, then)| now != then).count(), 1, "the mmap before HELLO");
}

#[test]
fn memory_that_has_no_room_for_the_log_is_none() {
    let (_server, stream) = Server::on_a_socket();
    let write = libc::PROT_WRITE as u64;
    for page in 0..4 {
        for change in [libc::SYS_munmap, libc::SYS_mprotect] {
            let memory = stream.memory(16_384);
            assert_eq!(stream.call(change, &[memory + 4096 * page, 4096, 0]), 0);
            assert_eq!(stream.ask(HELLO, &[1, memory, 16_384]) & 0xffff, 0, "page {page}");
        }
        let memory = stream.memory(16_384);
        stream.done(libc::SYS_mprotect, &[memory + 4096 * page, 4096, libc::PROT_READ as u64]);
        assert_eq!(stream.ask(HELLO, &[1, memory, 16_384]) & 0xffff, 0, "page {page}");
        stream.done(libc::SYS_mprotect, &[memory, 16_384, libc::PROT_READ as u64 | write]);
        assert!(stream.copy_out(memory, 16_384).0.iter().all(|byte| *byte == 0), "page {page}");
    }
    stream.is_in_step();
}

#[test]
fn of_a_batch_that_an_unknown_operation_ends_the_calls_before_it_are_in_the_log() {
    let (process, attached) = with_a_log();
    let from = look(&process).calls();
    let mut batch = Vec::new();
    let mut records = Vec::new();
    for n in 0..20 {
        batch.extend(request(CLOSE, &[1000, n]));
        records.push(record(CLOSE, &[1000, n], EBADF));
    }
    batch.extend(request(UNKNOWN, &[]));
    batch.extend(request(libc::SYS_exit_group as u64, &[1]).repeat(5));
    attached.stream.send(&batch);
    // Their results were still waiting to be sent.
    attached.stream.ends();
    let log = look(&process);
    log.goes_on(from, &records);
    assert_eq!(log.first(), 4, "of the connection that was last");
}

#[test]
fn a_call_whose_connection_ends_meanwhile_has_its_result_in_the_log_and_those_behind_it_none() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    let attached = attach(&process.path, &TOKEN);
    attached.stream.speaks_version_1();
    let [reading, writing] = pipe(&attached.stream);
    let memory = attached.stream.memory(4096);
    let ours = fetch(process.server.pid(), writing as i32);
    let from = look(&process).calls();
    let read = request(libc::SYS_read as u64 | FLUSH, &[reading, memory, 100]);
    let exit = request(libc::SYS_exit_group as u64 | FLUSH, &[1]).repeat(10);
    attached.stream.send(&[read, exit].concat());
    let pid = process.server.pid();
    until("it reads", || (blocked_in(pid) == Some(libc::SYS_read)).then_some(()));
    drop(attached);
    // The result can't be sent to anybody. What was read ahead is not executed.
    assert_eq!(unistd::write(&ours, b"hello"), Ok(5));
    let log = look(&process);
    log.goes_on(from, &[record(libc::SYS_read as u64, &[reading, memory, 100], 5)]);
    let (attached, log) = attach_and_ask(&process, &TOKEN, 1);
    assert_eq!(log.first(), from + 1, "all calls of the earlier one are below");
    assert_eq!(attached.stream.copy_out(memory, 5).0, b"hello");
    for fd in [reading, writing] {
        attached.stream.done(libc::SYS_close, &[fd]);
    }
    drop(attached);
    process.is_detached_again(&before, "a connection");
}

#[test]
fn a_copy_in_whose_bytes_do_not_all_come_is_not_executed() {
    let (process, attached) = with_a_log();
    let memory = attached.stream.memory(4096);
    let from = look(&process).calls();
    attached.stream.send(&[request(COPY_IN, &[memory, 2]), vec![1]].concat());
    drop(attached);
    let (_attached, log) = attach_and_ask(&process, &TOKEN, 1);
    log.goes_on(from, &[]);
}

#[test]
fn neither_ref_nor_link_reaches_before_the_connection_though_the_log_does() {
    let (process, attached) = with_a_log();
    attached.stream.is_in_step();
    drop(attached);
    let (attached, log) = attach_and_ask(&process, &TOKEN, 1);
    let pid = i64::from(process.server.pid());
    assert_eq!(words(log.record(log.first() - 1))[7], pid, "the last call's result");
    let mut made = Made::on(&attached.stream);
    assert_eq!(made.ask(GETPID | LINK, &[]), CANCELED);
    let open = libc::SYS_pidfd_open as u64;
    for distance in [2, 3, 64] {
        let canceled = [CANCELED as u64];
        assert_eq!(made.ask_with(open | REF0, &[distance], &canceled), CANCELED, "{distance}");
    }
    assert_eq!(made.ask(GETPID, &[]), pid);
    assert!(made.ask_with(open | REF0, &[1], &[pid as u64]) > 0);
    look(&process).goes_on(log.calls(), &made.records);
}

#[test]
fn whoever_asks_is_told_and_who_brings_no_descriptors_changes_nothing() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    let ask = |token: &[u8; 16], fds: &[RawFd]| told(&process.path, &asking(token, 0, 1), fds);

    // Detached, and before anybody was attached.
    for _ in 0..3 {
        let (answer, log) = ask(&TOKEN, &[]);
        assert_eq!((answer.status(), answer.generation()), (-libc::EBADF, 0));
        assert_eq!((log.controllers(), answer.holder(), answer.since()), (0, 0, 0));
    }

    // Attached: who holds it, another one with and without descriptors, and one that asks wrongly.
    let attached = attach(&process.path, &TOKEN);
    attached.stream.speaks_version_1();
    let open = process.server.fds();
    let ends = Ends::new();
    let mut wrong = asking(&OTHER, 0, 1);
    wrong[36] |= 8;
    let cases = [
        (ask(&TOKEN, &[]), libc::EBADF),
        (ask(&OTHER, &[]), libc::EBUSY),
        (ask(&OTHER, &ends.raw()), libc::EBUSY),
        (told(&process.path, &asking(&OTHER, 1, 1), &[]), libc::EBADF),
        (told(&process.path, &wrong, &ends.raw()), libc::EINVAL),
    ];
    for ((answer, log), errno) in cases {
        assert_eq!((answer.status(), answer.generation()), (-errno, 1));
        assert_eq!((answer.holder(), answer.since()), (4711, attached.answer.since()));
        assert_eq!((log.calls(), log.first(), log.controllers()), (4, 4, 1));
    }
    attached.stream.is_in_step();
    assert_eq!(process.server.fds(), open);

    // And who is attached by it.
    let again = Ends::new();
    let (answer, log) = ask(&TOKEN, &again.raw());
    assert_eq!((answer.status(), answer.generation()), (0, 2));
    assert_eq!((log.calls(), log.first(), log.controllers()), (6, 6, 1));
    attached.stream.ends();
    assert_eq!(again.stream.getpid(), i64::from(process.server.pid()));
    drop((again, attached));
    process.is_detached_again(&before, "questions");
    assert_eq!(look(&process).calls(), 7);
}

#[test]
fn the_last_four_controllers_and_their_ends_are_told() {
    let process = Persistent::new();
    let number = |n: u8| [n; 16];
    let mut calls = 0;
    for n in 1..=7u8 {
        let (attached, log) = attach_and_ask(&process, &number(n), 0);
        assert_eq!(log.controllers(), u64::from(n));
        // The token before, nobody's at first, and the number of its first call that was not its
        // own any more.
        let mut end = calls;
        for back in 0..n.min(4) {
            assert_eq!(log.before(u64::from(n - back)), (number(n - back - 1), end));
            end -= u64::from(n - back - 1);
        }
        for again in 0..3 {
            // A reconnect by the same controller is none, however it is made.
            let ends = Ends::new();
            let (answer, log) = told(&process.path, &asking(&number(n), again % 2, 0), &ends.raw());
            assert_eq!((answer.status(), log.controllers()), (0, u64::from(n)));
            assert_eq!(log.before(u64::from(n)), (number(n - 1), calls));
            drop(ends);
        }
        attached.stream.ends();
        let (attached, _) = attach_and_ask(&process, &number(n), 0);
        (0..n).for_each(|_| assert!(attached.stream.getpid() > 0));
        calls += u64::from(n);
        assert_eq!(look(&process).controllers(), u64::from(n), "who is refused is none either");
    }
}

#[test]
fn a_takeover_is_the_end_of_the_one_before() {
    let (process, attached) = with_a_log();
    let ends = Ends::new();
    let (answer, log) = told(&process.path, &asking(&OTHER, 1, 1), &ends.raw());
    assert_eq!((answer.status(), log.controllers()), (0, 2));
    assert_eq!(log.before(2), (TOKEN, 4));
    attached.stream.ends();
    assert!(ends.stream.getpid() > 0);
    drop(ends);
    // It comes back, and what the other one has called is not its own.
    let (_attached, log) = attach_and_ask(&process, &TOKEN, 1);
    assert_eq!((log.controllers(), log.calls()), (3, 5));
    assert_eq!((log.before(2), log.before(3)), ((TOKEN, 4), (OTHER, 5)));
}

#[test]
fn version_0_and_serve_are_tenures_like_others() {
    let (process, attached) = with_a_log();
    drop(attached);
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&count(2), &ends.raw()));
    assert_eq!(read_up_to(&client.0, 9).len(), 8);
    assert!(ends.stream.getpid() > 0);
    let log = look(&process);
    assert_eq!((log.controllers(), log.before(2)), (2, (TOKEN, 4)));
    // SERVE names the controller, from that call on.
    let half = |at: usize| u64::from_le_bytes(*OTHER[at..].first_chunk().unwrap());
    let keep = u64::MAX;
    let listen = 3 << 32 | 0xffff_ffff;
    assert!(ends.stream.ask(SERVE, &[keep, listen, half(0), half(8), 1]) > 0);
    let log = look(&process);
    assert_eq!((log.controllers(), log.before(3)), (3, (NOBODY, 5)));
    assert_eq!((log.calls(), log.first()), (6, 4), "it is the same connection");
}

#[test]
fn the_documents_log_is_what_a_server_tells() {
    let process = Persistent::new();
    let attached = attach(&process.path, &OTHER);
    drop(attached);
    let (attached, _) = attach_and_ask(&process, &TOKEN, 0);
    attached.stream.speaks_version_1();
    assert_eq!(attached.stream.ask(REGISTRY, &[0x7f00_0002_0000, 64]), 0);
    assert_eq!(attached.stream.ask(CLOSE, &[77]), EBADF);
    let log = look(&process);
    vectors::assert_matches(&log.head, "log-head");
    vectors::assert_matches(log.record(5), "log-record");
    let asks = vectors::bytes("handshake-log");
    let (answer, _) = told(&process.path, &asks, &[]);
    assert_eq!(answer.status(), -libc::EBADF);
}
