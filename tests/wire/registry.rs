//! The registry: what a call has made is in it when the call counts as executed, or it is not there.

use std::sync::atomic::Ordering;

use nix::libc;

use crate::client::{Attached, Client, OTHER, TOKEN, attach};
use crate::random::Random;
use crate::ring::{FLUSH, LINK, Ring, SIZE};
use crate::ring_random::confine;
use crate::server::{Persistent, Server};
use crate::stream::{KEEP, OP, REGISTRY, SERVE, Stream, UNKNOWN, read_up_to, request};
use crate::vectors;

const REF0: u64 = 1 << 35;
const CANCELED: i64 = -(libc::ECANCELED as i64);
const EINVAL: i64 = -(libc::EINVAL as i64);
const EFAULT: i64 = -(libc::EFAULT as i64);
const EBADF: i64 = -(libc::EBADF as i64);
const GETPID: u64 = libc::SYS_getpid as u64;
const DUP: u64 = libc::SYS_dup as u64;
const CLOSE: u64 = libc::SYS_close as u64;

const ENTRY: u64 = 128;
const CAPACITY: u64 = 8;
/// What lies around it, and must stay.
const AROUND: u8 = 0x5a;

/// A registry in a server: a page of [`AROUND`], in the middle of which it lies, and a page for what
/// is entered.
struct Registry {
    page: u64,
    address: u64,
    source: u64,
}

/// An entry as it is prepared: of this kind and name.
fn entry(kind: u64, name: &str) -> Vec<u8> {
    let mut bytes = vec![0; ENTRY as usize];
    bytes[16..24].copy_from_slice(&kind.to_le_bytes());
    bytes[24..48].copy_from_slice(&[1; 24]);
    bytes[48..48 + name.len()].copy_from_slice(name.as_bytes());
    bytes[96..].copy_from_slice(&[2; 32]);
    bytes
}

/// The same when it is taken.
fn taken(mut entry: Vec<u8>, value: i64) -> Vec<u8> {
    entry[..8].copy_from_slice(&value.to_le_bytes());
    entry[8] = 1;
    entry
}

impl Registry {
    #[track_caller]
    fn new(stream: &Stream) -> Self {
        let (page, source) = (stream.memory(4096), stream.memory(4096));
        let bytes = vec![AROUND; 4096];
        assert_eq!(stream.copy_in(page, &bytes), 4096);
        let address = page + 1024;
        assert_eq!(stream.copy_in(address, &[0; (CAPACITY * ENTRY) as usize]), 1024);
        assert_eq!(stream.ask(REGISTRY, &[address, CAPACITY]), 0, "there was none");
        Self { page, address, source }
    }

    /// Puts `entries` where KEEP takes them from. The request's arguments.
    #[track_caller]
    fn keep(&self, stream: &Stream, slot: u64, entries: &[u8], clear: u64) -> [u64; 6] {
        assert_eq!(stream.copy_in(self.source, entries), entries.len() as i64);
        let count = (entries.len() as u64).div_ceil(ENTRY).min(1);
        [slot, self.source, entries.len() as u64, 0, count, clear]
    }

    /// All entries. Around them nothing has changed.
    #[track_caller]
    fn entries(&self, stream: &Stream) -> Vec<Vec<u8>> {
        let bytes = stream.copy_out(self.page, 4096).0;
        let (before, rest) = bytes.split_at((self.address - self.page) as usize);
        let (entries, behind) = rest.split_at((CAPACITY * ENTRY) as usize);
        assert!(before.iter().chain(behind).all(|byte| *byte == AROUND), "it wrote beside it");
        entries.chunks(ENTRY as usize).map(<[u8]>::to_vec).collect()
    }

    #[track_caller]
    fn entry(&self, stream: &Stream, slot: u64) -> Vec<u8> {
        self.entries(stream).swap_remove(slot as usize)
    }
}

/// A persistent process with a registry.
fn with_a_registry() -> (Persistent, Attached, Registry) {
    let process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    attached.stream.speaks_version_1();
    let registry = Registry::new(&attached.stream);
    (process, attached, registry)
}

#[test]
fn what_a_call_makes_is_entered_when_it_succeeds() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    for slot in [0, 5, CAPACITY - 1] {
        let entry = entry(1, "a file");
        let args = registry.keep(&stream, slot, &entry, 0);
        assert_eq!(stream.ask(KEEP, &args), 0);
        let fd = stream.ask(DUP, &[0]);
        assert!(fd > 0);
        assert_eq!(registry.entry(&stream, slot), taken(entry, fd));
    }
    // It is about one call.
    stream.done(libc::SYS_dup, &[0]);
    let taken = registry.entries(&stream).iter().filter(|entry| entry[8] == 1).count();
    assert_eq!(taken, 3);
}

#[test]
fn a_stream_of_version_0_and_a_process_without_memory_keep_as_well() {
    let (_server, stream) = Server::on_pipes();
    let registry = Registry::new(&stream);
    let entry = entry(2, "");
    assert_eq!(stream.ask(KEEP, &registry.keep(&stream, 1, &entry, 0)), 0);
    let pid = stream.getpid();
    assert_eq!(registry.entry(&stream, 1), taken(entry, pid));
}

#[test]
fn the_call_may_be_an_operation_too() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    let keep = |slot| {
        let args = registry.keep(&stream, slot, &entry(4, "number"), 0);
        assert_eq!(stream.ask(KEEP, &args), 0);
    };
    keep(0);
    assert_eq!(stream.ask(OP | 4, &[registry.address + 48, 4]), 0x626d_756e, "LOAD");
    keep(1);
    assert_eq!(stream.copy_out(registry.source, 100).1, 100);
    keep(2);
    assert_eq!(stream.copy_in(registry.source, &[0; 3]), 3);
    keep(3);
    assert_eq!(stream.copy_in(8, &[0; 3]), EFAULT);
    keep(4);
    assert!(stream.ask(SERVE, &[u64::MAX, u64::MAX]) > 0);
    let entries = registry.entries(&stream);
    let value = |slot: usize| u64::from_le_bytes(*entries[slot].first_chunk().unwrap());
    assert_eq!([value(0), value(1), value(2), value(3)], [0x626d_756e, 100, 3, 0]);
    assert_eq!([0, 1, 2, 3, 4].map(|slot| entries[slot][8]), [1, 1, 1, 0, 1]);
}

#[test]
fn what_fails_or_is_not_executed_enters_nothing() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    let entry = entry(1, "nothing");
    let args = registry.keep(&stream, 0, &entry, 2);
    let keep = || assert_eq!(stream.ask(KEEP, &args), 0);
    let is_free = |registry: &Registry| assert_eq!(registry.entry(&stream, 0), entry);
    keep();
    assert_eq!(stream.ask(CLOSE, &[77]), EBADF);
    is_free(&registry);
    // What comes then is not the next call any more.
    stream.done(libc::SYS_getpid, &[]);
    is_free(&registry);
    keep();
    assert_eq!(stream.ask(GETPID | 1 << 50, &[]), EINVAL);
    stream.done(libc::SYS_getpid, &[]);
    is_free(&registry);
    assert_eq!(stream.ask(CLOSE, &[77]), EBADF);
    // A KEEP that is not executed, and a call that is linked to it.
    stream.send(&[request(KEEP | LINK, &args), request(GETPID | LINK, &[])].concat());
    assert_eq!([stream.result(), stream.result()], [CANCELED; 2]);
    stream.done(libc::SYS_getpid, &[]);
    is_free(&registry);
    keep();
    assert_eq!(stream.ask(GETPID | REF0, &[70]), CANCELED);
    stream.done(libc::SYS_getpid, &[]);
    is_free(&registry);
}

#[test]
fn an_address_is_no_failure() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    // Neither one that reads as a negative number.
    assert_eq!(stream.ask(OP | 5, &[registry.source + 2048, 8, (-4096i64) as u64]), 0);
    let entry = entry(3, "memory");
    assert_eq!(stream.ask(KEEP, &registry.keep(&stream, 0, &entry, 0)), 0);
    assert_eq!(stream.ask(OP | 4, &[registry.source + 2048, 8]), -4096);
    assert_eq!(registry.entry(&stream, 0), taken(entry, -4096));
}

#[test]
fn a_later_keep_takes_the_place_of_an_earlier_one() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    let [first, second] = ["first", "second"].map(|name| entry(1, name));
    let args = registry.keep(&stream, 0, &[first.clone(), second.clone()].concat(), 0);
    let keep = |slot, source| stream.ask(KEEP, &[slot, source, ENTRY, 0, 1, 0]);
    assert_eq!([keep(0, args[1]), keep(1, args[1] + ENTRY)], [0, 0]);
    let pid = stream.getpid();
    assert_eq!(registry.entries(&stream)[..2], [first.clone(), taken(second, pid)]);
    // One that fails takes it as well: it is a call itself.
    assert_eq!([keep(2, args[1]), keep(CAPACITY, args[1])], [0, EINVAL]);
    stream.done(libc::SYS_getpid, &[]);
    assert_eq!(registry.entry(&stream, 2), first);
}

#[test]
fn the_end_of_the_connection_undoes_it() {
    let (mut process, attached, registry) = with_a_registry();
    let entry = entry(1, "lost");
    let args = registry.keep(&attached.stream, 0, &entry, 0);
    let mut last = attached;
    for round in 0..6 {
        assert_eq!(last.stream.ask(KEEP, &args), 0);
        last = match round % 3 {
            0 => {
                drop(last);
                attach(&process.path, &OTHER)
            }
            1 => {
                last.stream.send(&request(UNKNOWN, &[]));
                last.stream.ends();
                attach(&process.path, &TOKEN)
            }
            // The same controller comes again before its connection has ended.
            _ => attach(&process.path, &TOKEN),
        };
        assert_eq!(registry.entry(&last.stream, 0), entry, "round {round}");
    }
    process.server.is_alive();
}

#[test]
fn pipe2_enters_both_of_its_descriptors() {
    let (process, Attached { stream, .. }, registry) = with_a_registry();
    let entries = [entry(1, "reading"), entry(1, "writing")];
    let mut args = registry.keep(&stream, 3, &entries.concat(), 0);
    let pair = registry.source + 2048;
    (args[3], args[4]) = (pair, 2);
    // What lies there before the call does not matter.
    assert_eq!(stream.copy_in(pair, &[0xff; 8]), 8);
    assert_eq!(stream.ask(KEEP, &args), 0);
    assert_eq!(stream.ask(libc::SYS_pipe2 as u64 | LINK, &[pair, 0]), 0);
    let fds = stream.copy_out(pair, 8).0;
    let fds = [0, 4].map(|at| i32::from_le_bytes(*fds[at..].first_chunk().unwrap()));
    assert!(fds.iter().all(|fd| process.server.fds().contains_key(fd)));
    let expected: Vec<_> =
        entries.into_iter().zip(fds).map(|(entry, fd)| taken(entry, i64::from(fd))).collect();
    assert_eq!(registry.entries(&stream)[3..5], expected);
    // A number is that of four bytes, without a sign, and -EFAULT where there are none.
    assert_eq!(stream.copy_in(pair, &[0xff; 8]), 8);
    for (from, value) in [(pair, 0xffff_ffff), (8, EFAULT)] {
        (args[3], args[4]) = (from, 1);
        assert_eq!(stream.ask(KEEP, &args), 0);
        stream.done(libc::SYS_getpid, &[]);
        assert_eq!(registry.entry(&stream, 3)[..8], value.to_le_bytes());
    }
}

#[test]
fn an_entry_is_cleared_by_the_call_that_closes_it() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    let entry = entry(1, "a file");
    assert_eq!(stream.ask(KEEP, &registry.keep(&stream, CAPACITY - 1, &entry, 0)), 0);
    let fd = stream.done(libc::SYS_dup, &[0]);
    // Not by one that fails.
    let clear = [0, 0, 0, 0, 0, CAPACITY];
    assert_eq!(stream.ask(KEEP, &clear), 0);
    assert_eq!(stream.ask(CLOSE, &[77]), EBADF);
    assert_eq!(registry.entry(&stream, CAPACITY - 1), taken(entry.clone(), fd as i64));
    stream.send(&[request(KEEP, &clear), request(CLOSE | LINK, &[fd])].concat());
    assert_eq!([stream.result(), stream.result()], [0, 0]);
    assert_eq!(registry.entry(&stream, CAPACITY - 1), entry, "value and state are zero");
    let others = registry.entries(&stream);
    assert!(others[..7].iter().flatten().all(|byte| *byte == 0));
}

#[test]
fn one_entry_takes_the_place_of_another_in_one_call() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    let [old, new] = ["old", "new"].map(|name| entry(1, name));
    assert_eq!(stream.ask(KEEP, &registry.keep(&stream, 2, &old, 0)), 0);
    let fd = stream.done(libc::SYS_dup, &[0]) as i64;
    for (result, call) in [(EBADF, 77), (fd, 0)] {
        assert_eq!(stream.ask(KEEP, &registry.keep(&stream, 4, &new, 3)), 0);
        let dup = stream.ask(libc::SYS_dup2 as u64, &[call, fd as u64]);
        assert_eq!(dup, result);
        let entries = registry.entries(&stream);
        let expected = if result == fd {
            [old.clone(), taken(new.clone(), fd)]
        } else {
            [taken(old.clone(), fd), new.clone()]
        };
        assert_eq!([&entries[2], &entries[4]], [&expected[0], &expected[1]]);
    }
}

#[test]
fn bytes_of_any_length_lie_behind_their_entry() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    for (len, rest) in [(129, 1), (128 + 127, 127), (256, 128), (8 * 128, 7 * 128)] {
        let mut bytes = entry(4, "bytes");
        bytes.extend((0..rest).map(|at| at as u8 ^ 0x55));
        assert_eq!(bytes.len(), len);
        assert_eq!(stream.copy_in(registry.address, &[0; 1024]), 1024);
        assert_eq!(stream.ask(KEEP, &registry.keep(&stream, 0, &bytes, 0)), 0);
        let pid = stream.getpid();
        let mut expected = taken(bytes, pid);
        expected.resize(1024, 0);
        assert_eq!(registry.entries(&stream).concat(), expected);
    }
    // Of several entries all get the result.
    let entries = [entry(4, "one"), entry(4, "two")];
    let mut args = registry.keep(&stream, 6, &entries.concat(), 0);
    args[4] = 2;
    assert_eq!(stream.ask(KEEP, &args), 0);
    let pid = stream.getpid();
    assert_eq!(registry.entries(&stream)[6..], entries.map(|entry| taken(entry, pid)));
}

#[test]
fn a_ring_keeps_like_a_stream_and_beside_it() {
    let (process, attached, registry) = with_a_registry();
    let (pid, stream) = (process.server.pid(), &attached.stream);
    let mut ring = Ring::beside(pid, stream);
    let entry = entry(1, "a file");
    for slot in 0..CAPACITY {
        let args = registry.keep(stream, slot, &entry, 0);
        let word = if slot % 2 == 0 { DUP | LINK } else { DUP | LINK | FLUSH };
        // Both at once, as a controller would; then one of them over the stream.
        let fd = match slot % 4 {
            0 | 1 => {
                let keep = ring.write(KEEP, &args);
                let call = ring.submit(word, &[0]);
                assert_eq!(ring.wait(keep), 0);
                ring.wait(call)
            }
            2 => {
                assert_eq!(ring.ask(KEEP, &args), 0);
                stream.ask(word, &[0])
            }
            _ => {
                assert_eq!(stream.ask(KEEP, &args), 0);
                ring.ask(word, &[0])
            }
        };
        assert!(fd > 0, "{fd}");
        assert_eq!(registry.entry(stream, slot), taken(entry.clone(), fd));
        assert_eq!(ring.ask(KEEP, &[0, 0, 0, 0, 0, slot + 1]), 0);
        assert_eq!(ring.ask(CLOSE, &[fd as u64]), 0);
        assert_eq!(registry.entry(stream, slot), entry);
    }
    let bad = [CAPACITY, registry.source, ENTRY, 0, 1, 0];
    assert_eq!(ring.ask(KEEP, &bad), EINVAL);
    assert_eq!(ring.ask(REGISTRY, &[0, 0]), registry.address as i64);
    assert_eq!(ring.ask(KEEP, &[0, registry.source, ENTRY, 0, 1, 0]), EINVAL, "there is none");

    // What the ring has prepared goes with its connection.
    assert_eq!(ring.ask(REGISTRY, &[registry.address, CAPACITY]), 0);
    let args = registry.keep(stream, 0, &entry, 0);
    assert_eq!(ring.ask(KEEP, &args), 0);
    drop((attached, ring));
    let next = attach(&process.path, &TOKEN);
    assert_eq!(registry.entry(&next.stream, 0), entry);
}

#[test]
fn what_has_no_room_is_einval_and_what_is_not_there_efault() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    let source = registry.source;
    assert_eq!(stream.copy_in(source, &[0xee; 4096]), 4096);
    let (most, wraps) = (u64::MAX, 1 << 57);
    for args in [
        // The slot is out of room, by one and by so much that its address comes out inside again.
        [CAPACITY, source, 1, 0, 1, 0],
        [CAPACITY - 1, source, ENTRY + 1, 0, 1, 0],
        [0, source, CAPACITY * ENTRY + 1, 0, 1, 0],
        [CAPACITY + 1, source, 0, 0, 0, 0],
        [wraps, source, ENTRY, 0, 1, 0],
        [most, source, ENTRY, 0, 1, 0],
        [most - 1, source, 3 * ENTRY, 0, 1, 0],
        [most, source, 0, 0, 0, 0],
        [1, source, most, 0, 1, 0],
        [0, source, most, 0, 1, 0],
        [most, most, most, most, most, most],
        // More values than entries.
        [0, source, ENTRY, 0, 2, 0],
        [0, source, 0, 0, 1, 0],
        [0, source, 3 * ENTRY, source, 4, 0],
        [0, source, ENTRY, source, most, 0],
        // No such entry to be cleared.
        [0, source, ENTRY, 0, 1, CAPACITY + 1],
        [0, 0, 0, 0, 0, CAPACITY + 1],
        [0, 0, 0, 0, 0, wraps + 1],
        [0, 0, 0, 0, 0, most],
    ] {
        assert_eq!(stream.ask(KEEP, &args), EINVAL, "{args:x?}");
        stream.done(libc::SYS_getpid, &[]);
        let entries = registry.entries(&stream).concat();
        assert!(entries.iter().all(|byte| *byte == 0), "{args:x?}");
    }
    for from in [0, 8, most, most - 63, 1 << 47] {
        assert_eq!(stream.ask(KEEP, &[0, from, ENTRY, 0, 1, 0]), EFAULT, "{from:#x}");
        stream.done(libc::SYS_getpid, &[]);
        let entries = registry.entries(&stream).concat();
        assert!(entries.iter().all(|byte| *byte == 0), "{from:#x}");
    }
    // Memory that ends half way: what there was has been copied, and nothing is entered.
    stream.done(libc::SYS_munmap, &[source, 4096]);
    let end = stream.memory(8192);
    stream.done(libc::SYS_munmap, &[end + 4096, 4096]);
    assert_eq!(stream.ask(KEEP, &[0, end + 4096 - 64, ENTRY, 0, 1, 1]), EFAULT);
    stream.done(libc::SYS_getpid, &[]);
    assert_eq!(registry.entry(&stream, 0)[..16], [0; 16]);
    stream.is_in_step();
}

#[test]
fn a_registry_that_is_gone_loses_names_and_harms_nobody() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    let args = registry.keep(&stream, 0, &entry(1, "lost"), 0);
    assert_eq!(stream.ask(KEEP, &args), 0);
    assert_eq!(stream.call(libc::SYS_munmap, &[registry.page, 4096]), 0);
    assert_eq!(stream.ask(KEEP, &args), EFAULT);
    stream.is_in_step();
    for address in [0, 8, u64::MAX, u64::MAX - 4095, 1 << 47] {
        stream.ask(REGISTRY, &[address, u64::MAX]);
        assert_eq!(stream.ask(KEEP, &args), EFAULT, "{address:#x}");
        assert_eq!(stream.ask(KEEP, &[0, 0, 0, 0, 0, 1]), 0);
        stream.is_in_step();
    }
}

#[test]
fn another_place_for_it_is_where_the_next_keep_enters() {
    let (_process, Attached { stream, .. }, registry) = with_a_registry();
    let entry = entry(1, "a file");
    let other = stream.memory(4096);
    // What was prepared in the one before, with room that this one does not have, is undone.
    let args = registry.keep(&stream, CAPACITY - 1, &entry, CAPACITY - 1);
    assert_eq!(stream.ask(KEEP, &args), 0);
    assert_eq!(stream.ask(REGISTRY, &[other + 2048, 1]), registry.address as i64);
    stream.is_in_step();
    assert_eq!(registry.entry(&stream, CAPACITY - 1), entry);
    assert!(stream.copy_out(other, 4096).0.iter().all(|byte| *byte == 0));
    assert_eq!(stream.ask(KEEP, &args), EINVAL);
    assert_eq!(stream.ask(KEEP, &registry.keep(&stream, 0, &entry, 0)), 0);
    let pid = stream.getpid();
    assert_eq!(stream.copy_out(other + 2048, 128).0, taken(entry, pid));
    assert_eq!(stream.ask(REGISTRY, &[registry.address, CAPACITY]), (other + 2048) as i64);
}

#[test]
fn the_documents_requests_do_what_it_says() {
    let (_server, stream) = Server::on_a_socket();
    // The addresses of the document.
    let fixed = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    let access = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    for (address, len) in [(0x7f00_0000_1000, 4096), (0x7f00_0002_0000, 8192)] {
        assert_eq!(
            stream.call(libc::SYS_mmap, &[address, len, access, fixed, u64::MAX, 0]),
            address as i64
        );
    }
    stream.send(&vectors::bytes("request-registry"));
    assert_eq!(stream.result(), 0);
    let name = entry(1, "a file");
    assert_eq!(stream.copy_in(0x7f00_0000_1000, &name), 128);
    stream.send(&vectors::bytes("request-keep"));
    assert_eq!(stream.result(), 0);
    let fd = stream.call(libc::SYS_dup, &[0]);
    assert_eq!(stream.copy_out(0x7f00_0002_0000 + 3 * ENTRY, 128).0, taken(name, fd));
}

/// Arguments for a KEEP: mostly fair ones, and some that are anything.
fn arguments(random: &mut Random, registry: &Registry, capacity: u64) -> [u64; 6] {
    let mut args = [
        random.number(capacity + 1),
        registry.source + random.number(4096 - 2 * ENTRY),
        random.number(2 * ENTRY),
        [0, registry.source + random.number(4096)][random.number(2) as usize],
        random.number(2),
        random.number(capacity + 1),
    ];
    while random.number(3) == 0 {
        // Among them what lies inside again when it is multiplied by an entry's size.
        let edges = [0, capacity, 1 << 57, u64::MAX / ENTRY, u64::MAX, registry.page + 4096];
        let edge = edges[random.number(6) as usize];
        let near = edge.wrapping_add(random.number(7)).wrapping_sub(3);
        args[random.number(6) as usize] = [near, random.next()][random.number(2) as usize];
    }
    args
}

/// Hands `ask` what can be anything, and sees that nothing but the registry is written.
fn any_arguments(stream: &Stream, registry: &Registry, mut ask: impl FnMut(u64, &[u64]) -> i64) {
    let mut random = Random::new(0x5eed_0123_4567_89ab);
    let mut results = [0; 3];
    let mut capacity = CAPACITY;
    for round in 0..20_000u64 {
        let args = arguments(&mut random, registry, capacity);
        let result = ask(KEEP, &args);
        let which = [0, EINVAL, EFAULT].iter().position(|known| *known == result);
        results[which.unwrap_or_else(|| panic!("{args:x?}: {result}"))] += 1;
        if random.number(8) == 0 {
            // The room that there is, or less: also between a KEEP and its call.
            capacity = random.number(CAPACITY + 1);
            assert_eq!(ask(REGISTRY, &[registry.address, capacity]), registry.address as i64);
        }
        if random.number(2) == 0 {
            assert!(ask(GETPID, &[]) > 0);
        }
        if round % 500 == 0 {
            registry.entries(stream);
        }
    }
    registry.entries(stream);
    assert!(results.iter().all(|count| *count > 100), "{results:?}");
}

#[test]
fn whatever_keep_is_handed_nothing_beside_the_registry_is_written() {
    let (process, attached, registry) = with_a_registry();
    let pid = process.server.pid();
    any_arguments(&attached.stream, &registry, |word, args| attached.stream.ask(word, args));
    let mut ring = Ring::beside(pid, &attached.stream);
    any_arguments(&attached.stream, &registry, |word, args| ring.ask(word, args));
    ring.is_in_step(pid);
    attached.stream.is_in_step();
}

#[test]
fn random_bytes_all_over_a_ring_leave_the_registry_as_it_is() {
    let (process, attached, registry) = with_a_registry();
    let stream = &attached.stream;
    for slot in 0..CAPACITY {
        assert_eq!(stream.ask(KEEP, &registry.keep(stream, slot, &entry(1, "mine"), 0)), 0);
        stream.done(libc::SYS_dup, &[0]);
    }
    let before = registry.entries(stream);
    let ring = Ring::beside(process.server.pid(), stream);
    confine(stream);
    let mut random = Random::new(0xabad_cafe_0000_0001);
    for round in 0..200 {
        for at in (0..SIZE).step_by(8) {
            ring.memory.u64(at).store(random.next(), Ordering::Relaxed);
        }
        ring.ring();
        ring.hear();
        if round % 16 == 0 {
            stream.is_in_step();
        }
    }
    assert!(registry.entries(stream) == before, "the registry has changed");
    // Also for the one who comes next.
    drop((attached, ring));
    let Attached { stream, .. } = attach(&process.path, &OTHER);
    assert!(registry.entries(&stream) == before, "the registry has changed");
}

#[test]
fn whoever_asks_is_told_the_registry_from_the_byte_on_that_it_names() {
    let (process, attached, registry) = with_a_registry();
    let stream = &attached.stream;
    for slot in 0..3 {
        let args = registry.keep(stream, slot, &entry(1, "a file"), 0);
        assert_eq!(stream.ask(KEEP, &args), 0);
        assert!(stream.ask(DUP, &[0]) > 0);
    }
    let entries = registry.entries(stream);
    let ask = |flags: u8, from: u64| {
        let mut hello = crate::client::hello(&OTHER);
        hello[36] = flags;
        hello[40..].copy_from_slice(&from.to_le_bytes());
        let client = Client::connect(&process.path);
        assert!(client.send(&hello, &[]));
        read_up_to(&client.0, 1 << 20)
    };
    let log = ask(2, 0).len();
    for from in [0, ENTRY, ENTRY + 5, 3 * ENTRY, 3 * ENTRY + 1, u64::MAX] {
        let told = ask(6, from);
        let expected: Vec<u8> = entries[..3].concat().into_iter().skip(from as usize).collect();
        assert_eq!(told[log..], expected, "from {from}");
    }
    // Without the log, and without the bit, that is no handshake.
    for (flags, from) in [(4, 0), (2, 1), (0, 1), (5, 0)] {
        let told = ask(flags, from);
        assert_eq!(told[8..12], (-libc::EINVAL).to_le_bytes(), "{flags} {from}");
    }
    // Where it can't be read nothing is told of it, and the process serves on.
    stream.ask(REGISTRY, &[0x1000, CAPACITY]);
    assert_eq!(ask(6, 0).len(), log);
    stream.is_in_step();
}
