//! The ring: calls in memory that a controller and a server share. This controller knows of it what
//! `docs/protocol.md` says, and nothing else.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::fs::File;
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Instant;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd;

use crate::client::{Attached, Client, Ends, TOKEN, attach};
use crate::server::{Persistent, Server};
use crate::stream::{
    COPY_IN, COPY_OUT, HELLO, IMAGE, LIMIT, OP, RING, SERVE, Stream, ready, until,
};
use crate::vectors;

pub const SIZE: usize = 12_288 + 65_536;
pub const RECORDS: u64 = 128;
const MOST_UNDER_WAY: u64 = 64;

// Where the words of the header lie.
pub const WAITING: usize = 64;
pub const SIGNALS: usize = 68;
pub const PATIENCE: usize = 72;
pub const CANCEL: usize = 80;
pub const ASLEEP: usize = 128;
pub const DELIVERED: usize = 192;
pub const RUNNING: usize = 200;

pub const LINK: u64 = 1 << 33;
pub const FLUSH: u64 = 1 << 34;
const REF0: u64 = 1 << 35;
const REF1: u64 = 1 << 36;
const COPY: u64 = OP | 3;
pub const LOAD: u64 = OP | 4;
pub const STORE: u64 = OP | 5;
const CANCELED: i64 = -(libc::ECANCELED as i64);
const EINVAL: i64 = -(libc::EINVAL as i64);
const EFAULT: i64 = -(libc::EFAULT as i64);
const EBADF: i64 = -(libc::EBADF as i64);

/// A descriptor of another process, here.
pub fn fetch(pid: i32, fd: i32) -> OwnedFd {
    // SAFETY: two system calls on numbers; what they return are new descriptors, owned by nobody.
    unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(process >= 0, "pidfd_open: {}", Errno::last());
        let process = OwnedFd::from_raw_fd(process as i32);
        let fd = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0);
        assert!(fd >= 0, "pidfd_getfd: {}", Errno::last());
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// Memory that this process has mapped, and a server may.
pub struct Memory {
    file: File,
    here: NonNull<c_void>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by this value with this size, and references to it borrow from it.
        unsafe { munmap(self.here, SIZE) }.unwrap();
    }
}

impl Memory {
    pub fn new() -> Self {
        let file = File::from(memfd_create(c"ring", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(SIZE as u64).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let size = NonZero::new(SIZE).unwrap();
        // SAFETY: new pages at an address that is free.
        let here = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0) };
        let memory = Self { file, here: here.unwrap() };
        memory.u64(0).store(u64::from_le_bytes(*b"fcring\0\x01"), Ordering::Relaxed);
        for (at, value) in [(8, RECORDS), (16, 12_288), (24, SIZE as u64)] {
            memory.u64(at).store(value, Ordering::Relaxed);
        }
        memory
    }

    pub fn u32(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at < SIZE);
        // SAFETY: inside of the pages, aligned, and shared memory is only accessed by atomics.
        unsafe { self.here.byte_add(at).cast().as_ref() }
    }

    pub fn u64(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at < SIZE);
        // SAFETY: as above.
        unsafe { self.here.byte_add(at).cast().as_ref() }
    }

    /// Has the server map it, `len` bytes of it with this protection; where it is there.
    pub fn map(&self, stream: &Stream, len: usize, protection: i32) -> u64 {
        let path = format!("/proc/{}/fd/{}\0", std::process::id(), self.file.as_raw_fd());
        let memory = stream.memory(4096);
        assert_eq!(stream.copy_in(memory, path.as_bytes()), path.len() as i64);
        let here = libc::AT_FDCWD as u64;
        let fd = stream.done(libc::SYS_openat, &[here, memory, libc::O_RDWR as u64]);
        let shared = libc::MAP_SHARED as u64;
        let args = [0, len as u64, protection as u64, shared, fd, 0];
        let address = stream.done(libc::SYS_mmap, &args);
        stream.done(libc::SYS_close, &[fd]);
        stream.done(libc::SYS_munmap, &[memory, 4096]);
        address
    }
}

/// The controller's side of a ring.
pub struct Ring {
    pub memory: Memory,
    /// Where the server has it.
    pub address: u64,
    /// What RING has answered.
    pub before: u64,
    /// The server's bell and the controller's, here and by their numbers in the server.
    pub bells: [OwnedFd; 2],
    pub numbers: [i32; 2],
    /// From where calls are interrupted, and the server's end by its number there; without one a signal
    /// is sent to the process.
    pub source: Option<(OwnedFd, i32)>,
    next: u64,
    /// How often the server's bell was rung.
    rung: u32,
}

impl Ring {
    pub fn new(pid: i32, stream: &Stream) -> Self {
        // What the server needs memory for.
        stream.speaks_version_1();
        Self::beside(pid, stream)
    }

    /// The same where the server has that memory.
    pub fn beside(pid: i32, stream: &Stream) -> Self {
        Self::interrupted_by(None, pid, stream)
    }

    /// One whose calls are interrupted from a source.
    pub fn with_a_source(pid: i32, stream: &Stream) -> Self {
        stream.speaks_version_1();
        Self::beside_with_a_source(pid, stream)
    }

    /// The same where the server has memory.
    pub fn beside_with_a_source(pid: i32, stream: &Stream) -> Self {
        Self::interrupted_by(Some(source(pid, stream)), pid, stream)
    }

    fn interrupted_by(source: Option<(OwnedFd, i32)>, pid: i32, stream: &Stream) -> Self {
        let memory = Memory::new();
        let address = memory.map(stream, SIZE, libc::PROT_READ | libc::PROT_WRITE);
        let flags = (libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) as u64;
        let numbers = [(); 2].map(|()| stream.done(libc::SYS_eventfd2, &[0, flags]) as i32);
        let bells = numbers.map(|fd| fetch(pid, fd));
        let there = source.as_ref().map_or([0, 0], |(_, number)| [*number as u64, 1]);
        let before = stream.ask(RING, &[address, pack(numbers), there[0], there[1]]);
        assert!(before >= 0, "{before}");
        Self { memory, address, before: before as u64, bells, numbers, source, next: 0, rung: 0 }
    }

    /// Where a call's record lies.
    pub fn record(&self, index: u64) -> usize {
        4096 + (index % RECORDS) as usize * 64
    }

    /// Writes a call's record and tells nobody.
    pub fn write(&mut self, word: u64, args: &[u64]) -> u64 {
        let index = self.next;
        self.next += 1;
        let record = self.record(index);
        for argument in 0..6 {
            let value = args.get(argument).copied().unwrap_or(0);
            self.memory.u64(record + 8 + argument * 8).store(value, Ordering::Relaxed);
        }
        let mark = (2 * (index / RECORDS) + 1) & 0xffff;
        self.memory.u64(record).store(word | mark << 48, Ordering::Release);
        index
    }

    /// Rings if the server sleeps.
    pub fn wake(&mut self) {
        fence(Ordering::SeqCst);
        if self.memory.u32(ASLEEP).load(Ordering::Relaxed) != 0 {
            self.rung += 1;
            self.ring();
        }
    }

    pub fn ring(&self) {
        assert_eq!(unistd::write(&self.bells[0], &1u64.to_ne_bytes()), Ok(8));
    }

    /// Hands a call over.
    pub fn submit(&mut self, word: u64, args: &[u64]) -> u64 {
        let index = self.write(word, args);
        self.wake();
        index
    }

    /// The result of a call, if it is there.
    pub fn result(&self, index: u64) -> Option<i64> {
        let record = self.record(index);
        let mark = self.memory.u64(record).load(Ordering::Acquire) >> 48;
        let there = mark == (2 * (index / RECORDS) + 2) & 0xffff;
        there.then(|| self.memory.u64(record + 56).load(Ordering::Relaxed) as i64)
    }

    /// Sleeps until the controller's bell says that the result is there.
    #[track_caller]
    pub fn wait(&self, index: u64) -> i64 {
        loop {
            self.memory.u32(WAITING).store(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if let Some(result) = self.result(index) {
                self.memory.u32(WAITING).store(0, Ordering::Relaxed);
                return result;
            }
            ready(&self.bells[1], PollFlags::POLLIN, "the controller's bell rings");
            self.hear();
        }
    }

    /// What the controller's bell has counted.
    pub fn hear(&self) -> u64 {
        let mut count = [0; 8];
        match unistd::read(&self.bells[1], &mut count) {
            Err(Errno::EAGAIN) => 0,
            n => {
                assert_eq!(n, Ok(8));
                u64::from_ne_bytes(count)
            }
        }
    }

    /// A call and its result.
    #[track_caller]
    pub fn ask(&mut self, word: u64, args: &[u64]) -> i64 {
        let index = self.submit(word, args);
        self.wait(index)
    }

    /// The next call is that of the next record.
    #[track_caller]
    pub fn is_in_step(&mut self, pid: i32) {
        assert_eq!(self.ask(libc::SYS_getpid as u64, &[]), i64::from(pid));
    }

    /// Waits until the server sleeps, in ppoll, and says so.
    #[track_caller]
    pub fn server_sleeps(&self, pid: i32) {
        until("the server sleeps", || {
            let says = self.memory.u32(ASLEEP).load(Ordering::Relaxed) == 1;
            (says && blocked_in(pid) == Some(libc::SYS_ppoll)).then_some(())
        });
    }
}

/// A source: the controller's end of a pair of sockets, and the server's end there.
pub fn source(pid: i32, stream: &Stream) -> (OwnedFd, i32) {
    let memory = stream.memory(4096);
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    stream.done(libc::SYS_socketpair, &[libc::AF_UNIX as u64, kind as u64, 0, memory]);
    let bytes = stream.copy_out(memory, 8).0;
    stream.done(libc::SYS_munmap, &[memory, 4096]);
    let [here, there] = [0, 4].map(|at| i32::from_le_bytes(*bytes[at..].first_chunk().unwrap()));
    let source = fetch(pid, here);
    stream.done(libc::SYS_close, &[here as u64]);
    (source, there)
}

pub fn pack(numbers: [i32; 2]) -> u64 {
    numbers[0] as u64 | (numbers[1] as u64) << 32
}

/// The call in which a process is blocked.
pub fn blocked_in(pid: i32) -> Option<libc::c_long> {
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let sleeps = state.rsplit_once(')').unwrap().1.starts_with(" S");
    let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
    if sleeps { call.split(' ').next().unwrap().parse().ok() } else { None }
}

pub fn with_a_ring() -> (Server, Stream, Ring) {
    let (server, stream) = Server::on_a_socket();
    let ring = Ring::new(server.pid(), &stream);
    (server, stream, ring)
}

/// A pipe in the server: where to read and where to write.
pub fn pipe(stream: &Stream) -> [u64; 2] {
    let memory = stream.memory(4096);
    stream.done(libc::SYS_pipe2, &[memory, 0]);
    let bytes = stream.copy_out(memory, 8).0;
    stream.done(libc::SYS_munmap, &[memory, 4096]);
    [0, 4].map(|at| u64::from(u32::from_le_bytes(*bytes[at..].first_chunk().unwrap())))
}

#[test]
fn calls_in_records_are_executed_in_order_over_many_laps() {
    let (server, stream, mut ring) = with_a_ring();
    let memory = stream.memory(4096);
    // Each second call loads what the one before it has stored.
    let calls = 5 * RECORDS + 10;
    let mut collected = 0;
    let check = |ring: &Ring, index: u64| {
        let expected = if index.is_multiple_of(2) { 0 } else { 1000 + index - 1 };
        assert_eq!(ring.wait(index), expected as i64, "call {index}");
    };
    for index in 0..calls {
        if index - collected == MOST_UNDER_WAY {
            check(&ring, collected);
            collected += 1;
        }
        let submitted = if index.is_multiple_of(2) {
            ring.submit(STORE, &[memory, 8, 1000 + index])
        } else {
            ring.submit(LOAD, &[memory, 8])
        };
        assert_eq!(submitted, index);
    }
    (collected..calls).for_each(|index| check(&ring, index));
    ring.is_in_step(server.pid());
    stream.is_in_step();
}

#[test]
fn marks_go_around_after_65536_uses_of_a_record_and_nobody_notices() {
    let (server, _stream, mut ring) = with_a_ring();
    ring.memory.u32(PATIENCE).store(65_536, Ordering::Relaxed);
    // A mark is 16 bits and grows by two in a lap.
    let calls = (32_768 + 2) * RECORDS;
    let mut collected = 0;
    while collected < calls {
        let last = (0..MOST_UNDER_WAY).map(|_| ring.write(libc::SYS_close as u64, &[u64::MAX]));
        let last = last.max().unwrap();
        ring.wake();
        assert_eq!(ring.wait(last), EBADF);
        collected += MOST_UNDER_WAY;
    }
    ring.is_in_step(server.pid());
}

#[test]
fn link_and_ref_find_results_whichever_way_their_calls_came() {
    let (server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let mut ring = Ring::new(server.pid(), &stream);
    let before = server.fds();
    let close = libc::SYS_close as u64 | LINK | REF0;
    let dup = libc::SYS_dup as u64;
    // Ring and ring, stream and ring, ring and stream.
    assert!(ring.ask(dup, &[0]) > 0);
    assert_eq!(ring.ask(close, &[1]), 0);
    assert!(stream.ask(dup, &[0]) > 0);
    assert_eq!(ring.ask(close, &[1]), 0);
    assert!(ring.ask(dup, &[0]) > 0);
    assert_eq!(stream.ask(close, &[1]), 0);
    assert_eq!(server.fds(), before);
    // A failure is passed on, and what was skipped is one.
    assert_eq!(ring.ask(dup, &[77]), EBADF);
    assert_eq!(stream.ask(close, &[1]), CANCELED);
    assert_eq!(ring.ask(close, &[1]), CANCELED);
    assert_eq!(ring.ask(libc::SYS_exit_group as u64 | LINK, &[7]), CANCELED);
    // The furthest that a reference reaches.
    let memory = stream.memory(4096);
    assert_eq!(ring.ask(STORE, &[memory, 8, 4242]), 0);
    assert_eq!(ring.ask(LOAD, &[memory, 8]), 4242);
    for _ in 0..63 {
        ring.is_in_step(server.pid());
    }
    assert_eq!(ring.ask(STORE | 1 << 37, &[memory, 8, 64]), 0);
    assert_eq!(ring.ask(LOAD, &[memory, 8]), 4242);
    for distance in [0, 65, u64::MAX] {
        assert_eq!(ring.ask(LOAD | REF1, &[memory, distance]), CANCELED, "{distance}");
    }
}

#[test]
fn what_can_not_be_handed_over_is_einval_and_nothing_is_done() {
    let (server, stream, mut ring) = with_a_ring();
    let memory = stream.memory(8192);
    for word in [HELLO, COPY_IN, COPY_OUT, SERVE, RING] {
        assert_eq!(ring.ask(word, &[memory, 8]), EINVAL, "{word:#x}");
    }
    for number in [11, 1000, 0xffff_ffff] {
        assert_eq!(ring.ask(OP | number, &[memory, 8]), EINVAL, "{number}");
    }
    for bit in 41..48 {
        let exit = libc::SYS_exit_group as u64 | 1 << bit;
        assert_eq!(ring.ask(exit, &[7]), EINVAL, "bit {bit}");
    }
    // And what can.
    assert_eq!(ring.ask(STORE, &[memory, 2, 0xabcd]), 0);
    assert_eq!(ring.ask(COPY, &[memory + 8, memory, 2]), 2);
    assert_eq!(ring.ask(LOAD, &[memory + 8, 8]), 0xabcd);
    assert_eq!(ring.ask(LOAD, &[8, 8]), EFAULT);
    assert_eq!(ring.ask(IMAGE, &[]), stream.ask(IMAGE, &[]));
    ring.is_in_step(server.pid());
}

#[test]
fn a_server_without_patience_sleeps_after_each_call_and_the_bell_wakes_it() {
    let (server, _stream, mut ring) = with_a_ring();
    for round in 1..=100 {
        ring.server_sleeps(server.pid());
        ring.is_in_step(server.pid());
        assert_eq!(ring.rung, round);
    }
    ring.server_sleeps(server.pid());
}

#[test]
fn a_server_that_looks_needs_no_bell() {
    let (server, _stream, mut ring) = with_a_ring();
    ring.memory.u32(PATIENCE).store(u32::MAX, Ordering::Relaxed);
    const CALLS: u32 = 5000;
    for _ in 0..CALLS {
        ring.is_in_step(server.pid());
    }
    assert!(ring.rung < CALLS, "it was asleep before each call");
    // However much patience it is told to have.
    ring.server_sleeps(server.pid());
}

#[test]
fn the_controllers_bell_rings_only_while_it_waits() {
    let (server, stream, mut ring) = with_a_ring();
    for _ in 0..100 {
        let index = ring.submit(libc::SYS_getpid as u64, &[]);
        until("the result is there", || ring.result(index));
    }
    // Whatever the server does after a call of the ring it does before the next of the stream.
    stream.is_in_step();
    assert_eq!(ring.hear(), 0);
    ring.memory.u32(WAITING).store(1, Ordering::Relaxed);
    ring.submit(libc::SYS_getpid as u64, &[]);
    ready(&ring.bells[1], PollFlags::POLLIN, "the controller's bell rings");
    ring.is_in_step(server.pid());
}

#[test]
fn results_before_a_call_that_may_take_long_do_not_wait_for_it() {
    let (server, stream, mut ring) = with_a_ring();
    let [reading, _writing] = pipe(&stream);
    let memory = stream.memory(4096);
    ring.memory.u32(WAITING).store(1, Ordering::Relaxed);
    let first = ring.write(libc::SYS_getpid as u64, &[]);
    let read = ring.write(libc::SYS_read as u64 | FLUSH, &[reading, memory, 1]);
    ring.wake();
    ready(&ring.bells[1], PollFlags::POLLIN, "the controller's bell rings");
    assert_eq!(ring.result(first), Some(i64::from(server.pid())));
    until("it reads", || (blocked_in(server.pid()) == Some(libc::SYS_read)).then_some(()));
    assert_eq!(ring.memory.u64(RUNNING).load(Ordering::Relaxed), read + 1);
    assert_eq!(ring.result(read), None);
}

#[test]
fn a_server_that_is_kept_busy_still_hears_the_stream() {
    let (server, stream, mut ring) = with_a_ring();
    // Calls that take so long that others are always handed over meanwhile.
    const LEN: u64 = 1 << 20;
    let args = [stream.memory(LEN), LEN, 0];
    let submit = |ring: &mut Ring| ring.submit(libc::SYS_getrandom as u64, &args);
    let mut under_way: VecDeque<_> = (0..MOST_UNDER_WAY).map(|_| submit(&mut ring)).collect();
    stream.send(&vectors::bytes("request-getpid"));
    let heard = || {
        let mut fds = [PollFd::new(stream.results.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(1)
    };
    let end = Instant::now() + LIMIT;
    while !heard() {
        assert!(Instant::now() < end, "the stream is not heard");
        while let Some(result) = under_way.front().and_then(|oldest| ring.result(*oldest)) {
            assert_eq!(result, LEN as i64);
            under_way.pop_front();
            under_way.push_back(submit(&mut ring));
        }
    }
    assert_eq!(stream.result(), i64::from(server.pid()));
}

#[test]
fn calls_of_stream_and_ring_take_turns() {
    let (server, stream, mut ring) = with_a_ring();
    let memory = stream.memory(4096);
    for round in 0..200u64 {
        assert_eq!(ring.ask(STORE, &[memory, 8, round]), 0);
        assert_eq!(stream.copy_out(memory, 8).0, round.to_le_bytes());
        assert_eq!(stream.copy_in(memory, &(round + 7).to_le_bytes()), 8);
        assert_eq!(ring.ask(LOAD, &[memory, 8]), round as i64 + 7);
    }
    ring.is_in_step(server.pid());
    stream.is_in_step();
}

#[test]
fn the_end_of_the_stream_is_the_end_of_the_ring() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    let Attached { stream, data, .. } = attach(&process.path, &TOKEN);
    let mut ring = Ring::new(process.server.pid(), &stream);
    assert_eq!(ring.before, 0);
    ring.is_in_step(process.server.pid());
    ring.server_sleeps(process.server.pid());
    drop((stream, data));
    process.is_detached_again(&before, "a connection with a ring");

    // What is handed over now is not executed, by a server without or with a controller.
    let late = ring.write(libc::SYS_exit_group as u64, &[9]);
    ring.ring();
    let attached = attach(&process.path, &TOKEN);
    attached.stream.is_in_step();
    assert_eq!(ring.result(late), None);

    // The memory is still mapped, and RING says where.
    let mut second = Ring::new(process.server.pid(), &attached.stream);
    assert_eq!(second.before, ring.address);
    second.is_in_step(process.server.pid());
    attached.stream.done(libc::SYS_munmap, &[second.before, SIZE as u64]);
    second.is_in_step(process.server.pid());
    drop(attached);
    process.is_detached_again(&before, "another connection with a ring");
}

#[test]
fn a_second_ring_takes_the_place_of_the_first() {
    let (server, stream, mut first) = with_a_ring();
    first.is_in_step(server.pid());
    let mut second = Ring::new(server.pid(), &stream);
    assert_eq!(second.before, first.address);
    second.is_in_step(server.pid());
    let late = first.write(libc::SYS_exit_group as u64, &[9]);
    first.ring();
    second.is_in_step(server.pid());
    assert_eq!(first.result(late), None);
    // Its bells were the server's, and are closed.
    let open = server.fds();
    assert!(first.numbers.iter().all(|fd| !open.contains_key(fd)), "{open:?}");
    assert!(second.numbers.iter().all(|fd| open.contains_key(fd)), "{open:?}");
}

#[test]
fn memory_that_is_not_there_whole_is_no_ring() {
    let (server, stream, mut ring) = with_a_ring();
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    let memory = Memory::new();
    let there = memory.map(&stream, SIZE, read_write);
    let short = memory.map(&stream, SIZE, read_write);
    stream.done(libc::SYS_munmap, &[short + 8192, 4096]);
    let read_only = memory.map(&stream, SIZE, libc::PROT_READ);
    let hidden = memory.map(&stream, SIZE, libc::PROT_NONE);
    let numbers = [(); 2].map(|()| stream.done(libc::SYS_eventfd2, &[0, 0]) as i32);
    let open = server.fds();
    let bad = [0, 64, 1 << 46, u64::MAX - 63, there + 1, there + 8, there + 32, short, hidden];
    for address in bad.into_iter().chain([read_only]) {
        assert_eq!(stream.ask(RING, &[address, pack(numbers)]), EFAULT, "{address:#x}");
        ring.is_in_step(server.pid());
    }
    assert_eq!(server.fds(), open, "the bells are not the server's");
    assert_eq!(stream.ask(RING, &[there, pack(numbers)]), ring.address as i64);
}

#[test]
fn a_process_with_a_ring_ends_with_its_stream() {
    let (mut server, stream, mut ring) = with_a_ring();
    ring.is_in_step(server.pid());
    drop(stream);
    server.exits_with(0);
}

#[test]
fn a_ring_works_beside_a_stream_of_version_0_and_beside_one_that_begins_in_version_1() {
    let process = Persistent::new();
    let first = attach(&process.path, &TOKEN);
    first.stream.speaks_version_1();
    drop(first);
    for version in [0, 1] {
        let mut hello = vectors::bytes("handshake-version-1");
        hello[12] = version;
        let (client, ends) = (Client::connect(&process.path), Ends::new());
        assert!(client.send(&hello, &ends.raw()));
        assert_eq!(client.answer().0[16], version);
        let mut ring = Ring::beside(process.server.pid(), &ends.stream);
        ring.is_in_step(process.server.pid());
        ends.stream.is_in_step();
    }
}

#[test]
fn a_server_without_memory_for_its_log_has_no_ring() {
    let (_server, stream) = Server::on_a_socket();
    let memory = stream.memory(SIZE as u64);
    let numbers = [(); 2].map(|()| stream.done(libc::SYS_eventfd2, &[0, 0]) as i32);
    assert_eq!(stream.ask(RING, &[memory, pack(numbers)]), EINVAL);
    stream.is_in_step();
}

#[test]
fn a_ring_lies_at_any_multiple_of_64() {
    let (server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let memory = stream.memory(65_536);
    for offset in [64, 192, 4032, 8192] {
        let address = memory + offset;
        let numbers = [(); 2].map(|()| stream.done(libc::SYS_eventfd2, &[0, 0]) as i32);
        assert!(stream.ask(RING, &[address, pack(numbers)]) >= 0);
        // It need not be shared: the record is written through the stream, the word last.
        let record = address + 4096;
        let word = (libc::SYS_getpid as u64 | FLUSH | 1 << 48).to_le_bytes();
        assert_eq!(stream.copy_in(record, &word), 8);
        until("the call is complete", || {
            let bytes = stream.copy_out(record, 64).0;
            let at = |at: usize| i64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
            (at(0) >> 48 == 2).then(|| assert_eq!(at(56), i64::from(server.pid())))
        });
        assert_eq!(stream.copy_in(memory, &[0; 65_536]), 65_536);
    }
}
