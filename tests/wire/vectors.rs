//! The vectors of `docs/protocol.md`: parsed for everybody here, and all of them are what `abi`
//! encodes and decodes, so that the document cannot drift away from the code.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use farcall::abi::entry::{ENTRY_TABLE_OFFSET, EntryTable, TrampolineFrame};
use farcall::abi::handshake::{Answer, Hello, Token};
use farcall::abi::log::{LogHead, Record, Tenure};
use farcall::abi::upgrade::{Handover, PollFd, Progress, Watched};
use farcall::abi::wire::{HelloResult, Operation, Request, Spares, Word};
use nix::libc;

use crate::stream;

const DOCUMENT: &str = include_str!("../../docs/protocol.md");

/// Bytes of a vector; `None` is one that varies.
pub type Vector = Vec<Option<u8>>;

/// All vectors of the document by name.
static VECTORS: LazyLock<BTreeMap<&'static str, Vector>> = LazyLock::new(|| {
    let mut vectors = BTreeMap::new();
    let mut lines = DOCUMENT.lines();
    while let Some(line) = lines.next() {
        let Some(name) = line.strip_prefix("```vector ") else { continue };
        let bytes = lines
            .by_ref()
            .take_while(|line| !line.starts_with("```"))
            .flat_map(|line| line.split('#').next().unwrap_or_default().split_whitespace())
            .map(|byte| match byte {
                ".." => None,
                hex => Some(u8::from_str_radix(hex, 16).expect(name)),
            })
            .collect();
        assert!(vectors.insert(name, bytes).is_none(), "two vectors are called {name}");
    }
    vectors
});

/// The vector of that name, bytes that vary among them.
pub fn pattern(name: &str) -> &'static Vector {
    VECTORS.get(name).unwrap_or_else(|| panic!("docs/protocol.md has no vector {name}"))
}

/// The vector of that name, in which no byte varies.
pub fn bytes(name: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = pattern(name).iter().copied().collect();
    bytes.unwrap_or_else(|| panic!("bytes of {name} vary"))
}

/// Whether `bytes` are what the vector of that name says.
#[track_caller]
pub fn assert_matches(bytes: &[u8], name: &str) {
    let pattern = pattern(name);
    let same = bytes.len() == pattern.len()
        && bytes.iter().zip(pattern).all(|(byte, expected)| expected.is_none_or(|e| e == *byte));
    assert!(same, "{bytes:02x?} is not {name}: {pattern:02x?}");
}

/// What a server of the document answers to HELLO in version 0: all that it offers.
pub fn offered() -> i64 {
    i64::from_le_bytes(bytes("result-hello").try_into().unwrap())
}

/// Zeros where a vector's bytes vary.
fn zeroed<const N: usize>(name: &str) -> [u8; N] {
    let bytes: Vec<u8> = pattern(name).iter().map(|byte| byte.unwrap_or_default()).collect();
    bytes.try_into().unwrap_or_else(|_| panic!("{name} has not {N} bytes"))
}

const TOKEN: Token = Token([0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908]);

fn hello() -> Hello {
    Hello {
        magic: u64::from_le_bytes(*b"farcall1"),
        version: 1,
        stream_version: 0,
        token: TOKEN,
        pid: 4711,
        flags: 0,
        from: 0,
    }
}

/// What `abi` makes of the values that the document's comments give.
fn encoded() -> Vec<(&'static str, Vec<u8>)> {
    let operation = |operation, args| Request::operation(operation, args).to_bytes().to_vec();
    let number = |number: i64| number.to_le_bytes().to_vec();
    let frame = TrampolineFrame { args: [5, 6, 0, 0, 0, 0], function: 0x7f00_0000_0177 };
    let answer = Answer {
        magic: u64::from_le_bytes(*b"farcall1"),
        version: 1,
        generation: 1,
        fds: [0, 0, -1],
        holder_pid: 4711,
        ..Answer::default()
    };
    let keep = u64::MAX;
    let [low, high] = TOKEN.0;
    vec![
        ("result-enoent", number(-i64::from(libc::ENOENT))),
        ("request-getpid", Request::syscall(39, [0; 6]).to_bytes().to_vec()),
        ("result-getpid", number(4242)),
        ("request-hello", operation(Operation::Hello, [0; 6])),
        ("result-hello", number(HelloResult::new(0, HelloResult::OFFERED).0)),
        ("request-hello-1", operation(Operation::Hello, [1, 0x7f00_0000_1000, 16_384, 0, 0, 0])),
        ("result-hello-1", number(HelloResult::new(1, HelloResult::OFFERED).0)),
        ("request-close-linked", {
            let word = 3 | Word::LINK | Word::reference(0);
            Request { word, args: [1, 0, 0, 0, 0, 0] }.to_bytes().to_vec()
        }),
        (
            "request-copy",
            operation(Operation::Copy, [0x7f00_0000_1000, 0x7f00_0000_2000, 16, 0, 0, 0]),
        ),
        ("request-load", operation(Operation::Load, [0x7f00_0000_1000, 4, 0, 0, 0, 0])),
        ("request-store", {
            let mut store =
                Request::operation(Operation::Store, [0x7f00_0000_1000, 8, 42, 0, 0, 0]);
            store.word |= Word::LINK;
            store.to_bytes().to_vec()
        }),
        ("request-copy-in", operation(Operation::CopyIn, [0x7f00_0000_1000, 5, 0, 0, 0, 0])),
        ("request-copy-out", operation(Operation::CopyOut, [0x7f00_0000_1ffe, 4, 0, 0, 0, 0])),
        ("answer-copy-out", [number(4), b"hi\0\0".to_vec(), number(2)].concat()),
        ("request-keep", operation(Operation::Keep, [3, 0x7f00_0000_1000, 128, 0, 1, 0])),
        ("request-registry", operation(Operation::Registry, [0x7f00_0002_0000, 64, 0, 0, 0, 0])),
        (
            "request-serve",
            operation(Operation::Serve, [keep, 3 << 32 | 0xffff_ffff, low, high, 4711, 0]),
        ),
        ("result-serve", number(Spares(0).with(4).with(5).with(6).0)),
        ("request-image", operation(Operation::Image, [0; 6])),
        ("request-upgrade", operation(Operation::Upgrade, [0x1000_0008_0000, 0, 0, 0, 0, 0])),
        ("handover", handover()),
        ("trampoline-stack", frame.to_stack(0x7f00_0000_00e1).to_vec()),
        ("entry-table", entry_table().to_vec()),
        ("handshake-version-0", vec![2, 0, 0, 0, 0]),
        ("answer-version-0", vec![0; 8]),
        ("handshake-version-1", hello().to_bytes().to_vec()),
        ("handshake-log", asking().to_bytes().to_vec()),
        ("handshake-names", asking_for_names().to_bytes().to_vec()),
        (
            "log-head",
            numbers(&[6, 4, 0, 0x7f00_0002_0000, 64, 0, 2], &[[0; 3], [0; 3], OTHER, [0; 3]]),
        ),
        ("log-record", {
            let request = Request::syscall(3, [77, 0, 0, 0, 0, 0]).to_bytes().to_vec();
            [request, number(-i64::from(libc::EBADF))].concat()
        }),
        ("answer-version-1", answer.to_bytes().to_vec()),
        ("answer-version-1-busy", {
            let status = -libc::EBUSY;
            Answer { status, fds: [-1; 3], ..answer }.to_bytes().to_vec()
        }),
    ]
}

/// The handshake that asks for the log.
fn asking() -> Hello {
    Hello { stream_version: 1, flags: Hello::LOG, ..hello() }
}

/// The handshake that asks for the names as well.
fn asking_for_names() -> Hello {
    Hello { flags: Hello::LOG | Hello::NAMES, from: 128, ..asking() }
}

/// The past controller of the document: its token, and its end.
const OTHER: [u64; 3] = [0xeeee_eeee_eeee_eeee, 0xeeee_eeee_eeee_eeee, 2];

fn numbers(first: &[u64], rest: &[[u64; 3]]) -> Vec<u8> {
    first.iter().chain(rest.iter().flatten()).flat_map(|number| number.to_le_bytes()).collect()
}

/// The document's handover, with zeros for what varies.
fn handover() -> Vec<u8> {
    let poll = |fd, events| PollFd { fd, events, revents: 0 };
    let handover = Handover {
        size: 392,
        watched: Watched {
            input: poll(0, libc::POLLIN),
            listen: poll(3, libc::POLLIN),
            client: poll(-1, libc::POLLIN),
            bell: poll(-1, libc::POLLIN),
        },
        output: poll(0, libc::POLLOUT),
        owned: 1,
        stream: Progress { version: 1, start: 56, end: 112, ..Progress::default() },
        request: Request::operation(Operation::Upgrade, [0; 6]),
        log: LogHead { controllers: 1, ..LogHead::default() },
        token: TOKEN,
        generation: 1,
        holder_pid: 4711,
        ..Handover::default()
    };
    // SAFETY: made of numbers alone, without bytes between them that are not written: `abi` asserts
    // where each of them lies.
    unsafe { std::mem::transmute::<Handover, [u8; 392]>(handover) }.to_vec()
}

fn entry_table() -> [u8; 40] {
    *farcall::image::IMAGE[ENTRY_TABLE_OFFSET..].first_chunk().unwrap()
}

#[test]
fn every_vector_is_what_abi_encodes() {
    let encoded = encoded();
    for (name, bytes) in &encoded {
        assert_matches(bytes, name);
    }
    let names: Vec<_> = VECTORS.keys().copied().collect();
    let mut checked: Vec<_> = encoded.iter().map(|(name, _)| *name).collect();
    checked.sort_unstable();
    assert_eq!(names, checked, "vectors of the document, and those that are checked here");
}

#[test]
fn every_vector_is_what_abi_decodes() {
    for (name, _) in encoded().iter().filter(|(name, _)| name.starts_with("request-")) {
        let bytes: [u8; 56] = bytes(name).try_into().unwrap();
        assert_eq!(Request::from_bytes(&bytes).to_bytes(), bytes, "{name}");
    }
    assert_eq!(Hello::from_bytes(&zeroed("handshake-version-1")), hello());
    let answer = Answer::from_bytes(&zeroed("answer-version-1"));
    assert_eq!((answer.status, answer.generation, answer.fds[2]), (0, 1, -1));
    let busy = Answer::from_bytes(&zeroed("answer-version-1-busy"));
    assert_eq!((busy.status, busy.holder_pid, busy.fds), (-libc::EBUSY, 4711, [-1; 3]));
    let spares = i64::from_le_bytes(zeroed("result-serve"));
    assert_eq!(Spares(spares).fds().collect::<Vec<_>>(), [6, 5, 4]);
    let hello = HelloResult(i64::from_le_bytes(zeroed("result-hello")));
    assert_eq!((hello.version(), hello.features()), (0, HelloResult::OFFERED));
    assert_eq!(Hello::from_bytes(&zeroed("handshake-log")), asking());
    assert_eq!(Hello::from_bytes(&zeroed("handshake-names")), asking_for_names());
    let other = Tenure { token: Token([OTHER[0], OTHER[1]]), end: OTHER[2] };
    let nobody = Tenure::default();
    let head = LogHead {
        calls: 6,
        first: 4,
        memory: 0,
        registry: 0x7f00_0002_0000,
        capacity: 64,
        used: 0,
        controllers: 2,
        past: [nobody, nobody, other, nobody],
    };
    assert_eq!(LogHead::from_bytes(&zeroed("log-head")), head);
    let request = Request::syscall(3, [77, 0, 0, 0, 0, 0]);
    let record = Record { request, result: -i64::from(libc::EBADF) };
    assert_eq!(Record::from_bytes(&zeroed("log-record")), record);
    assert!(EntryTable::from_bytes(&entry_table()).is_some());
}

#[test]
fn the_requests_of_these_tests_are_the_documents() {
    assert_eq!(stream::request(libc::SYS_getpid as u64, &[]), bytes("request-getpid"));
    assert_eq!(stream::request(stream::COPY_IN, &[0x7f00_0000_1000, 5]), bytes("request-copy-in"));
    assert_eq!(
        stream::request(stream::COPY_OUT, &[0x7f00_0000_1ffe, 4]),
        bytes("request-copy-out")
    );
    assert_eq!(stream::OP, Word::OP);
}

#[test]
fn the_numbers_of_operations_are_the_documents() {
    let operations = DOCUMENT.split("\n## Operations").nth(1).unwrap();
    let table = operations.split("\n### ").next().unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let documented: BTreeSet<u32> = rows.filter_map(|cell| cell.parse().ok()).collect();
    assert!(!documented.is_empty());
    for number in 0..=0x1_0000 {
        let is_one = Operation::from_number(number).is_some();
        assert_eq!(is_one, documented.contains(&number), "operation {number}");
    }
}
