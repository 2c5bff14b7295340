//! Interrupting a call that was handed over in a ring.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::MsgFlags;

use crate::client::{Attached, Client, Ends, hello};
use crate::random::Random;
use crate::ring::{
    ASLEEP, CANCEL, DELIVERED, FLUSH, LOAD, Memory, PATIENCE, RECORDS, RUNNING, Ring, SIGNALS,
    SIZE, STORE, blocked_in, fetch, pack, pipe, with_a_ring,
};
use crate::server::{Persistent, Server};
use crate::stream::{RING, Stream, request, until};
use crate::upgrade::upgrade;

const EINTR: i64 = -(libc::EINTR as i64);
const INTERRUPT_SIGNAL: i32 = 64;

impl Ring {
    /// Asks for a call to be interrupted. True: a signal is to be sent.
    fn cancel(&self, index: u64) -> bool {
        self.memory.u64(CANCEL).store(index + 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let runs = self.memory.u64(RUNNING).load(Ordering::Relaxed) == index + 1
            && self.result(index).is_none();
        if runs {
            let before = match self.source {
                Some(_) => self.memory.u32(SIGNALS).load(Ordering::Relaxed),
                None => self.delivered(),
            };
            self.memory.u32(SIGNALS).store(before + 1, Ordering::Relaxed);
        }
        runs
    }

    fn delivered(&self) -> u32 {
        self.memory.u32(DELIVERED).load(Ordering::Relaxed)
    }

    /// Sends the signal.
    fn signal(&self, pid: i32) {
        match &self.source {
            Some((source, _)) => assert_eq!(send(source), Ok(1)),
            None => send_signal(pid, self.address),
        }
    }

    /// The call has been answered: others may begin.
    fn interrupted(&mut self) {
        let signals = self.memory.u32(SIGNALS).load(Ordering::Relaxed);
        if self.source.is_none() {
            until("the signal is delivered", || (self.delivered() == signals).then_some(()));
        }
        self.go_on();
    }

    fn go_on(&mut self) {
        self.memory.u64(CANCEL).store(0, Ordering::Release);
        self.wake();
    }

    /// Interrupts a call that is being executed or is not; its result.
    fn interrupt(&mut self, pid: i32, index: u64) -> i64 {
        if self.cancel(index) {
            self.signal(pid);
        }
        let result = self.wait(index);
        self.interrupted();
        result
    }
}

/// Lets some time pass, at most some hundred microseconds, and mostly less.
fn some_time(random: &mut Random) {
    for _ in 0..1 << random.below(16) {
        std::hint::spin_loop();
    }
}

/// Sends a byte to the server's end of a source.
fn send(source: &OwnedFd) -> nix::Result<usize> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    nix::sys::socket::send(source.as_raw_fd(), b"x", flags)
}

/// A ring whose calls are interrupted by what comes from a source.
fn with_a_source() -> (Server, Stream, Ring) {
    let (server, stream) = Server::on_a_socket();
    let ring = Ring::with_a_source(server.pid(), &stream);
    (server, stream, ring)
}

fn send_signal(pid: i32, value: u64) {
    let value = libc::sigval { sival_ptr: value as *mut libc::c_void };
    // SAFETY: touches no memory here; the value is a number, and means something only there.
    assert_eq!(unsafe { libc::sigqueue(pid, INTERRUPT_SIGNAL, value) }, 0);
}

#[track_caller]
fn blocks_in(server: &Server, call: libc::c_long) {
    until(&format!("call {call} blocks"), || {
        (blocked_in(server.pid()) == Some(call)).then_some(())
    });
}

/// A pipe of the server's and memory to read it into: the reading end there, the writing end here.
fn to_be_read(server: &Server, stream: &Stream) -> (u64, OwnedFd, u64) {
    let [reading, writing] = pipe(stream);
    (reading, fetch(server.pid(), writing as i32), stream.memory(4096))
}

/// Calls that block, and whether the kernel would go on with them after a signal handler.
fn blocking(stream: &Stream) -> [(libc::c_long, Vec<u64>); 4] {
    let [reading, _] = pipe(stream);
    let memory = stream.memory(4096);
    let hour = [3600u64, 0].map(u64::to_le_bytes).concat();
    assert_eq!(stream.copy_in(memory, &hour), 16);
    [
        (libc::SYS_read, vec![reading, memory + 64, 1]),
        (libc::SYS_nanosleep, vec![memory, 0]),
        (libc::SYS_pause, vec![]),
        (libc::SYS_futex, vec![memory + 128, libc::FUTEX_WAIT as u64, 0, 0]),
    ]
}

#[test]
fn a_call_that_blocks_returns_eintr_and_the_next_one_is_executed() {
    for with in [with_a_ring, with_a_source] {
        let (server, stream, mut ring) = with();
        for round in 0..50 {
            for (number, args) in blocking(&stream) {
                let blocked = ring.write(number as u64 | FLUSH, &args);
                let next = ring.submit(libc::SYS_getpid as u64 | FLUSH, &[]);
                // Sometimes when it is certainly blocked, sometimes wherever it is.
                if round < 3 {
                    blocks_in(&server, number);
                }
                assert_eq!(ring.interrupt(server.pid(), blocked), EINTR, "{number}");
                assert_eq!(ring.wait(next), i64::from(server.pid()), "{number}");
            }
            stream.is_in_step();
        }
    }
}

#[test]
fn after_an_upgrade_the_new_image_is_interrupted() {
    for with in [with_a_ring, with_a_source] {
        let (server, stream, mut ring) = with();
        for round in 0..20 {
            upgrade(&stream);
            for (number, args) in blocking(&stream) {
                let blocked = ring.submit(number as u64 | FLUSH, &args);
                if round < 3 {
                    blocks_in(&server, number);
                }
                assert_eq!(ring.interrupt(server.pid(), blocked), EINTR, "{number}");
            }
            stream.is_in_step();
        }
    }
}

#[test]
fn a_call_that_has_not_begun_is_never_executed() {
    for with in [with_a_ring, with_a_source] {
        let (mut server, stream, mut ring) = with();
        let (reading, end, memory) = to_be_read(&server, &stream);
        let read = ring.write(libc::SYS_read as u64 | FLUSH, &[reading, memory, 1]);
        let exit = ring.write(libc::SYS_exit_group as u64 | FLUSH, &[9]);
        ring.wake();
        blocks_in(&server, libc::SYS_read);
        assert!(!ring.cancel(exit), "another call is being executed");
        // The read goes on, and ends as it would.
        assert_eq!(nix::unistd::write(&end, b"x"), Ok(1));
        assert_eq!(ring.wait(read), 1);
        assert_eq!(ring.wait(exit), EINTR);
        ring.interrupted();
        ring.is_in_step(server.pid());
        server.is_alive();
    }
}

impl Ring {
    /// Withdraws a call. False: it has begun.
    fn withdraw(&self, index: u64, word: u64) -> bool {
        let mark = (2 * (index / RECORDS) + 1) & 0xffff;
        let word = word | mark << 48;
        self.memory
            .u64(self.record(index))
            .compare_exchange(word, word | WITHDRAWN, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }
}

/// Set by the controller, if the server has not set the other one.
const WITHDRAWN: u64 = 1 << 47;
const BEGUN: u64 = 1 << 46;

#[test]
fn a_call_that_is_withdrawn_is_never_executed_and_one_that_has_begun_can_not_be() {
    let (mut server, stream, mut ring) = with_a_ring();
    stream.speaks_version_1();
    let memory = stream.memory(4096);
    for lap in 0..3 * RECORDS {
        let pause = libc::SYS_pause as u64 | FLUSH;
        let blocked = ring.write(pause, &[]);
        // Of what was handed over behind it, each second one is withdrawn.
        let behind = [0, 1, 2, 3].map(|place| {
            let word = if place == 3 { libc::SYS_exit_group as u64 } else { STORE } | FLUSH;
            (ring.write(word, &[memory + 8 * place, 8, lap + 1]), word)
        });
        ring.wake();
        if lap < 10 {
            blocks_in(&server, libc::SYS_pause);
        } else {
            until("it has begun", || {
                let word = ring.memory.u64(ring.record(blocked)).load(Ordering::Relaxed);
                (word & BEGUN != 0).then_some(())
            });
        }
        assert!(!ring.withdraw(blocked, pause), "it has begun");
        for (index, word) in [behind[1], behind[3]] {
            assert!(ring.withdraw(index, word));
            assert!(!ring.withdraw(index, word), "it was withdrawn");
        }
        assert_eq!(ring.interrupt(server.pid(), blocked), EINTR);
        let results = behind.map(|(index, _)| ring.wait(index));
        assert_eq!(results, [0, EINTR, 0, EINTR]);
        let stored = stream.copy_out(memory, 24).0;
        let stored = [0, 8, 16].map(|at| u64::from_le_bytes(*stored[at..].first_chunk().unwrap()));
        assert_eq!(stored, [lap + 1, 0, lap + 1]);
    }
    ring.is_in_step(server.pid());
    server.is_alive();
}

/// Against a server that begins the call at the same time.
#[test]
fn a_call_is_withdrawn_or_begins_and_not_both() {
    const TIMES: u64 = 3_000;
    let (server, stream, mut ring) = with_a_ring();
    ring.memory.u32(PATIENCE).store(65_536, Ordering::Relaxed);
    let memory = stream.memory(4096);
    let mut random = Random::new(1);
    let mut times = [0, 0];
    for time in 1.. {
        if time > TIMES && times.iter().all(|times| *times > 0) {
            break;
        }
        assert!(time < 10 * TIMES, "one of the two never comes: {times:?}");
        let store = ring.submit(STORE | FLUSH, &[memory, 8, time]);
        if time > TIMES && times[0] == 0 {
            // On a busy machine the server may not have had its turn in time before.
            let begun = || ring.memory.u64(ring.record(store)).load(Ordering::Relaxed) & BEGUN != 0;
            let complete = || ring.result(store).is_some();
            until("it has begun", || (begun() || complete()).then_some(()));
        }
        some_time(&mut random);
        let withdrawn = ring.withdraw(store, STORE | FLUSH);
        assert_eq!(ring.wait(store), if withdrawn { EINTR } else { 0 });
        let stored = ring.ask(LOAD, &[memory, 8]);
        assert_eq!(stored == time as i64, !withdrawn, "{time}");
        times[usize::from(withdrawn)] += 1;
    }
    ring.is_in_step(server.pid());
}

#[test]
fn a_call_that_is_complete_keeps_its_result() {
    for with in [with_a_ring, with_a_source] {
        let (server, _stream, mut ring) = with();
        for _ in 0..1000 {
            let index = ring.submit(libc::SYS_getpid as u64 | FLUSH, &[]);
            let result = ring.interrupt(server.pid(), index);
            assert!([i64::from(server.pid()), EINTR].contains(&result), "{result}");
            ring.is_in_step(server.pid());
        }
        let index = ring.submit(libc::SYS_getpid as u64 | FLUSH, &[]);
        assert_eq!(ring.wait(index), i64::from(server.pid()));
        assert!(!ring.cancel(index), "it is over");
        ring.interrupted();
        ring.is_in_step(server.pid());
    }
}

#[test]
fn no_other_call_that_may_block_begins_while_a_signal_may_come() {
    let (server, stream, mut ring) = with_a_ring();
    let first = ring.write(libc::SYS_pause as u64 | FLUSH, &[]);
    let quick = ring.write(libc::SYS_getpid as u64, &[]);
    let second = ring.write(libc::SYS_pause as u64 | FLUSH, &[]);
    ring.wake();
    blocks_in(&server, libc::SYS_pause);
    assert!(ring.cancel(first));
    ring.signal(server.pid());
    assert_eq!(ring.wait(first), EINTR);
    assert_eq!(ring.wait(quick), i64::from(server.pid()));

    // It waits, asleep, and signals that come late end nothing.
    for late in 2..10 {
        ring.server_sleeps(server.pid());
        assert_eq!(ring.result(second), None);
        ring.signal(server.pid());
        until("the signal is delivered", || (ring.delivered() == late).then_some(()));
    }
    ring.server_sleeps(server.pid());
    assert_eq!(ring.result(second), None);
    // The stream is heard meanwhile: nothing of it can be meant.
    stream.is_in_step();

    ring.go_on();
    blocks_in(&server, libc::SYS_pause);
    assert_eq!(ring.memory.u64(RUNNING).load(Ordering::Relaxed), second + 1);
    assert_eq!(ring.memory.u32(ASLEEP).load(Ordering::Relaxed), 0);
    assert_eq!(ring.interrupt(server.pid(), second), EINTR);
}

#[test]
fn a_signal_that_means_nobody_ends_no_read() {
    let (server, stream, mut ring) = with_a_ring();
    let (reading, end, memory) = to_be_read(&server, &stream);
    let mut delivered = 0;
    for _ in 0..20 {
        let read = ring.submit(libc::SYS_read as u64 | FLUSH, &[reading, memory, 1]);
        blocks_in(&server, libc::SYS_read);
        delivered += 1;
        ring.signal(server.pid());
        until("the signal is delivered", || (ring.delivered() == delivered).then_some(()));
        blocks_in(&server, libc::SYS_read);
        assert_eq!(ring.result(read), None);
        assert_eq!(nix::unistd::write(&end, b"x"), Ok(1));
        assert_eq!(ring.wait(read), 1);
    }
    // Neither do they make the server wait for anything, nor are they taken for one that is meant.
    let pause = ring.submit(libc::SYS_pause as u64 | FLUSH, &[]);
    blocks_in(&server, libc::SYS_pause);
    assert_eq!(ring.interrupt(server.pid(), pause), EINTR);
    assert_eq!(ring.delivered(), delivered + 1);
}

#[test]
fn a_process_that_blocks_the_signal_goes_on_when_it_is_given_up() {
    let (server, stream, mut ring) = with_a_ring();
    let (reading, end, memory) = to_be_read(&server, &stream);
    let mask = 1u64 << (INTERRUPT_SIGNAL - 1);
    assert_eq!(stream.copy_in(memory, &mask.to_le_bytes()), 8);
    let (block, unblock) = (libc::SIG_BLOCK as u64, libc::SIG_UNBLOCK as u64);
    stream.done(libc::SYS_rt_sigprocmask, &[block, memory, 0, 8]);

    let read = ring.submit(libc::SYS_read as u64 | FLUSH, &[reading, memory + 64, 1]);
    let next = ring.write(libc::SYS_getpid as u64 | FLUSH, &[]);
    blocks_in(&server, libc::SYS_read);
    assert!(ring.cancel(read));
    ring.signal(server.pid());
    assert_eq!(nix::unistd::write(&end, b"x"), Ok(1));
    assert_eq!(ring.wait(read), 1);
    ring.server_sleeps(server.pid());
    assert_eq!((ring.result(next), ring.delivered()), (None, 0));
    ring.go_on();
    assert_eq!(ring.wait(next), i64::from(server.pid()));

    // It comes after all, and holds nothing up.
    let unblocked = ring.ask(libc::SYS_rt_sigprocmask as u64, &[unblock, memory, 0, 8]);
    assert_eq!((unblocked, ring.delivered()), (0, 1));
    assert_eq!(ring.ask(libc::SYS_getpid as u64 | FLUSH, &[]), i64::from(server.pid()));
    let pause = ring.submit(libc::SYS_pause as u64 | FLUSH, &[]);
    blocks_in(&server, libc::SYS_pause);
    assert_eq!(ring.interrupt(server.pid(), pause), EINTR);
}

#[test]
fn no_signal_means_a_call_of_the_stream() {
    let (server, stream, mut ring) = with_a_ring();
    let (reading, end, memory) = to_be_read(&server, &stream);
    let first = ring.write(libc::SYS_pause as u64 | FLUSH, &[]);
    let second = ring.write(libc::SYS_pause as u64 | FLUSH, &[]);
    ring.wake();
    blocks_in(&server, libc::SYS_pause);
    assert!(ring.cancel(first));
    ring.signal(server.pid());
    assert_eq!(ring.wait(first), EINTR);
    ring.server_sleeps(server.pid());

    // While the second waits for the first to be over, a call of the stream is executed.
    stream.send(&request(libc::SYS_read as u64, &[reading, memory, 1]));
    blocks_in(&server, libc::SYS_read);
    ring.memory.u64(CANCEL).store(0, Ordering::Release);
    if ring.cancel(second) {
        ring.signal(server.pid());
        until("the signal is delivered", || (ring.delivered() == 2).then_some(()));
    }
    assert_eq!(nix::unistd::write(&end, b"x"), Ok(1));
    assert_eq!(stream.result(), 1);
    assert_eq!(ring.wait(second), EINTR);
    ring.go_on();
    ring.is_in_step(server.pid());
}

#[test]
fn a_signal_of_a_controller_whose_ring_is_gone_does_no_harm() {
    let (mut server, stream, first) = with_a_ring();
    let mut ring = Ring::new(server.pid(), &stream);
    stream.done(libc::SYS_munmap, &[first.address, SIZE as u64]);
    let other = stream.memory(8192);
    for value in [first.address, 0, 1, 64, 1 << 46, u64::MAX, u64::MAX - 63, other, other + 1] {
        send_signal(server.pid(), value);
        ring.is_in_step(server.pid());
    }
    assert_eq!(stream.copy_out(other, 8192).0, [0; 8192]);
    assert_eq!(ring.delivered(), 0);
    server.is_alive();
}

/// Calls that return by themselves after a while, and that a signal would end with EINTR.
fn timed(stream: &Stream) -> [(libc::c_long, Vec<u64>); 4] {
    let memory = stream.memory(4096);
    // ppoll writes into its own how much of it is left.
    let second = [1u64, 0, 1, 0].map(u64::to_le_bytes).concat();
    assert_eq!(stream.copy_in(memory, &second), 32);
    let epoll = stream.done(libc::SYS_epoll_create1, &[0]);
    let (futex, wait) = (memory + 128, libc::FUTEX_WAIT as u64);
    [
        (libc::SYS_nanosleep, vec![memory, 0]),
        (libc::SYS_ppoll, vec![0, 0, memory + 16, 0, 0]),
        (libc::SYS_epoll_wait, vec![epoll, memory + 64, 1, 1000]),
        (libc::SYS_futex, vec![futex, wait, 0, memory]),
    ]
}

/// As it is after it has taken its time.
fn in_time(result: i64) -> bool {
    result == 0 || result == -(libc::ETIMEDOUT as i64)
}

/// Attaches, also where another controller holds the process.
fn take_over(process: &Persistent, token: u8) -> Attached {
    let mut hello = hello(&[token; 16]);
    hello[36] = 1;
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&hello, &ends.raw()));
    let answer = client.answer();
    assert_eq!(answer.status(), 0);
    let Ends { stream, data, .. } = ends;
    Attached { stream, data, answer }
}

#[test]
fn what_is_sent_after_the_connection_is_over_reaches_no_later_call() {
    let process = Persistent::new();
    let pid = process.server.pid();
    let mut earlier = Vec::new();
    for token in 1..4 {
        let attached = take_over(&process, token);
        let stream = &attached.stream;
        if token == 1 {
            stream.speaks_version_1();
        }
        if let Some((_, source, _)) = earlier.last() {
            for (number, args) in timed(stream) {
                stream.send(&request(number as u64, &args));
                blocks_in(&process.server, number);
                // The controller before this one is late.
                let late = send(source).unwrap_err();
                assert!([Errno::ECONNREFUSED, Errno::ENOTCONN].contains(&late), "{late}");
                let result = stream.result();
                assert!(in_time(result), "{number}: {result}");
            }
        }
        let mut ring = Ring::beside_with_a_source(pid, stream);
        let blocked = ring.submit(libc::SYS_pause as u64 | FLUSH, &[]);
        blocks_in(&process.server, libc::SYS_pause);
        assert_eq!(ring.interrupt(pid, blocked), EINTR);
        let (source, number) = ring.source.take().unwrap();
        // It is not gone with the controller, which lives on.
        earlier.push((attached, source, number));
    }
}

#[test]
fn nor_does_it_where_a_duplicate_of_the_servers_end_is_left_in_another_process() {
    let process = Persistent::new();
    let pid = process.server.pid();
    let first = take_over(&process, 1);
    let ring = Ring::with_a_source(pid, &first.stream);
    let (source, number) = ring.source.as_ref().unwrap();
    // In this one.
    let duplicate = fetch(pid, *number);
    let second = take_over(&process, 2);
    assert!(!process.server.fds().contains_key(number));
    for (number, args) in timed(&second.stream) {
        second.stream.send(&request(number as u64, &args));
        blocks_in(&process.server, number);
        assert_eq!(send(source), Ok(1), "it arrives, and nobody hears of it");
        let result = second.stream.result();
        assert!(in_time(result), "{number}: {result}");
    }
    drop(duplicate);
    send(source).unwrap_err();
}

#[test]
fn a_controller_that_closes_its_end_of_the_source_interrupts_nothing() {
    let (server, stream, mut ring) = with_a_source();
    for (number, args) in timed(&stream) {
        let call = ring.submit(number as u64 | FLUSH, &args);
        blocks_in(&server, number);
        drop(ring.source.take());
        let result = ring.wait(call);
        assert!(in_time(result), "{number}: {result}");
    }
}

#[test]
fn from_a_source_calls_are_interrupted_where_no_signal_can_be_queued_nor_is_handled_yet() {
    let (server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let memory = stream.memory(4096);
    // No signal more: as where the user has used up all that may be pending.
    let none = [libc::RLIMIT_SIGPENDING as u64, memory];
    stream.done(libc::SYS_prlimit64, &[0, none[0], none[1], 0]);
    let value = libc::sigval { sival_ptr: std::ptr::null_mut() };
    // SAFETY: touches no memory here.
    assert_eq!(unsafe { libc::sigqueue(server.pid(), INTERRUPT_SIGNAL, value) }, -1);
    assert_eq!(Errno::last(), Errno::EAGAIN);
    // The default action, as after execve.
    stream.done(libc::SYS_rt_sigaction, &[libc::SIGIO as u64, memory, 0, 8]);
    let mut ring = Ring::with_a_source(server.pid(), &stream);
    for _ in 0..20 {
        for (number, args) in blocking(&stream) {
            let blocked = ring.submit(number as u64 | FLUSH, &args);
            assert_eq!(ring.interrupt(server.pid(), blocked), EINTR, "{number}");
        }
    }
    ring.is_in_step(server.pid());
}

#[test]
fn a_source_that_is_none_is_refused_and_the_ring_before_goes_on() {
    let (server, stream, mut ring) = with_a_source();
    let other = Memory::new();
    let address = other.map(&stream, SIZE, libc::PROT_READ | libc::PROT_WRITE);
    let before = server.fds();
    let refused = stream.ask(RING, &[address, pack(ring.numbers), 1000, 1]);
    assert_eq!(refused, -i64::from(libc::EBADF));
    let blocked = ring.submit(libc::SYS_pause as u64 | FLUSH, &[]);
    blocks_in(&server, libc::SYS_pause);
    assert_eq!(ring.interrupt(server.pid(), blocked), EINTR);
    assert_eq!(server.fds(), before);
    // A ring without one leaves this one behind.
    let (_, number) = ring.source.as_ref().unwrap();
    let mut second = Ring::new(server.pid(), &stream);
    second.is_in_step(server.pid());
    assert!(!server.fds().contains_key(number));
}

/// Of 10,000 interruptions at any instant, each followed by calls that a signal which comes late would
/// end.
#[test]
fn no_signal_from_a_source_meets_the_next_call() {
    let (server, stream, mut ring) = with_a_source();
    ring.memory.u32(PATIENCE).store(65_536, Ordering::Relaxed);
    let memory = stream.memory(4096);
    let short = [0u64, 1].map(u64::to_le_bytes).concat();
    assert_eq!(stream.copy_in(memory, &short), 16);
    stream.done(libc::SYS_prctl, &[libc::PR_SET_TIMERSLACK as u64, 1]);
    let mut random = Random::new(1);
    for time in 0..10_000 {
        let victim = ring.write(libc::SYS_nanosleep as u64 | FLUSH, &[memory, 0]);
        let next = ring.write(libc::SYS_nanosleep as u64 | FLUSH, &[memory, 0]);
        ring.wake();
        some_time(&mut random);
        let result = ring.interrupt(server.pid(), victim);
        assert!([0, EINTR].contains(&result), "{time}: {result}");
        assert_eq!(ring.wait(next), 0, "{time}");
    }
}
