//! A server that the system refuses something: few descriptors, or a call.

use nix::errno::Errno;
use nix::libc;

use crate::client::{Client, Ends, OTHER, TOKEN, attach, hello};
use crate::ring::Ring;
use crate::ring_random::filter;
use crate::server::{Persistent, Server};
use crate::stream::{Stream, until};

const EMFILE: i64 = -(libc::EMFILE as i64);

/// The call that a process is blocked in, and its arguments.
fn blocked_with(pid: i32) -> Option<Vec<u64>> {
    let line = std::fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
    line.split_whitespace()
        .map(|word| match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => word.parse().ok(),
        })
        .collect()
}

/// Waits until a process waits without a time limit.
#[track_caller]
fn sleeps(pid: i32) {
    until("the process waits, and not for a while only", || {
        let call = blocked_with(pid)?;
        let timeout = match i64::try_from(*call.first()?).ok()? {
            libc::SYS_ppoll => call.get(3)?,
            libc::SYS_pselect6 => call.get(5)?,
            libc::SYS_read | libc::SYS_recvmsg | libc::SYS_accept4 => &0,
            _ => return None,
        };
        (*timeout == 0).then_some(())
    });
}

/// The soft and the hard RLIMIT_NOFILE of a process.
fn limits(pid: i32) -> (u64, u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills `limit`.
    let asked =
        unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
    assert_eq!(asked, 0, "{}", Errno::last());
    (limit.rlim_cur, limit.rlim_max)
}

/// Sets them, as a call of the process.
#[track_caller]
fn limit(stream: &Stream, soft: u64, hard: u64) {
    let memory = stream.memory(4096);
    let new = [soft, hard].map(u64::to_le_bytes).concat();
    assert_eq!(stream.copy_in(memory, &new), 16);
    let nofile = u64::from(libc::RLIMIT_NOFILE);
    stream.done(libc::SYS_prlimit64, &[0, nofile, memory]);
}

/// Makes calls with these numbers fail with EPERM.
fn deny(stream: &Stream, numbers: &[libc::c_long]) {
    filter(stream, numbers, true, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32);
}

#[test]
fn below_the_number_of_polled_descriptors_a_server_serves_sleeps_and_is_attached_to() {
    for soft in 0..6 {
        let process = Persistent::new();
        let pid = process.server.pid();
        let first = attach(&process.path, &TOKEN);
        let (_, hard) = limits(pid);
        limit(&first.stream, soft, hard);
        first.stream.is_in_step();
        sleeps(pid);
        first.stream.is_in_step();
        // While somebody is attached, who is told so, and then while nobody is.
        let busy = Client::connect(&process.path);
        assert!(busy.send(&hello(&OTHER), &Ends::new().raw()));
        assert_eq!(busy.answer().status(), -libc::EBUSY, "soft limit {soft}");
        first.stream.is_in_step();
        drop(first);
        sleeps(pid);
        let second = attach(&process.path, &OTHER);
        assert_eq!(second.answer.generation(), 2);
        assert_eq!(limits(pid), (soft, hard), "what was raised for the attach");
        sleeps(pid);
        second.stream.is_in_step();
    }
}

#[test]
fn requests_of_a_controller_that_is_gone_are_not_executed_below_that_number_either() {
    for soft in 0..2 {
        let process = Persistent::new();
        let pid = process.server.pid();
        let first = attach(&process.path, &TOKEN);
        let (_, hard) = limits(pid);
        limit(&first.stream, soft, hard);
        // What it has sent before it closed its end is there when the server looks again.
        process.server.stop();
        let umask = crate::stream::request(libc::SYS_umask as u64, &[0o123]);
        first.stream.send(&umask);
        drop(first);
        process.server.go_on();
        let second = attach(&process.path, &OTHER);
        assert_ne!(second.stream.call(libc::SYS_umask, &[0o22]), 0o123, "soft limit {soft}");
    }
}

#[test]
fn a_server_without_a_listener_serves_below_that_number_too() {
    let (mut server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let (_, hard) = limits(server.pid());
    limit(&stream, 0, hard);
    sleeps(server.pid());
    stream.is_in_step();
    // The handover of something that does not fit into the socket waits for room.
    let memory = stream.memory(1 << 20);
    assert_eq!(stream.copy_out(memory, 1 << 20).1, 1 << 20);
    stream.is_in_step();
    drop(stream);
    server.exits_with(0);
}

#[test]
fn where_no_number_is_free_a_client_waits_and_the_server_sleeps() {
    let process = Persistent::new();
    let pid = process.server.pid();
    let first = attach(&process.path, &TOKEN);
    limit(&first.stream, 3, 3);
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    let mut take_over = hello(&OTHER);
    take_over[36] = 1;
    assert!(client.send(&take_over, &ends.raw()));
    first.stream.is_in_step();
    sleeps(pid);
    assert_eq!(first.stream.call(libc::SYS_dup, &[0]), EMFILE);
    sleeps(pid);
    // Its calls make room: the client is heard without anything else happening.
    first.stream.send(&crate::stream::request(libc::SYS_close_range as u64, &[0, 2]));
    assert_eq!(client.answer().status(), 0);
    ends.stream.is_in_step();
}

#[test]
fn without_ppoll_all_goes_on() {
    let process = Persistent::new();
    let pid = process.server.pid();
    let first = attach(&process.path, &TOKEN);
    first.stream.speaks_version_1();
    deny(&first.stream, &[libc::SYS_ppoll]);
    first.stream.is_in_step();
    let mut ring = Ring::new(pid, &first.stream);
    ring.is_in_step(pid);
    sleeps(pid);
    ring.is_in_step(pid);
    first.stream.is_in_step();
    drop((first, ring));
    sleeps(pid);
    attach(&process.path, &OTHER);
}

#[test]
fn without_ppoll_and_pselect6_calls_are_served_and_the_next_controller_comes_after_the_last() {
    let process = Persistent::new();
    let pid = process.server.pid();
    let first = attach(&process.path, &TOKEN);
    first.stream.speaks_version_1();
    let ring = Ring::new(pid, &first.stream);
    deny(&first.stream, &[libc::SYS_ppoll, libc::SYS_pselect6]);
    // Nothing could be heard of the ring any more: its connection ends.
    first.stream.ends();
    drop((first, ring));
    for token in [&TOKEN, &OTHER] {
        sleeps(pid);
        let next = attach(&process.path, token);
        sleeps(pid);
        next.stream.is_in_step();
    }
}

#[test]
fn each_of_these_denied_costs_no_more_than_what_it_does() {
    for number in [
        libc::SYS_prlimit64,
        libc::SYS_clone,
        libc::SYS_tgkill,
        libc::SYS_sched_yield,
        libc::SYS_rt_sigprocmask,
        libc::SYS_nanosleep,
        libc::SYS_listen,
        libc::SYS_geteuid,
        libc::SYS_clock_gettime,
        libc::SYS_shutdown,
    ] {
        let process = Persistent::new();
        let pid = process.server.pid();
        let first = attach(&process.path, &TOKEN);
        deny(&first.stream, &[number]);
        first.stream.is_in_step();
        let nobody = Client::connect(&process.path);
        nobody.send(&[0xff; 8], &[]);
        nobody.is_refused();
        first.stream.is_in_step();
        drop(first);
        sleeps(pid);
        attach(&process.path, &OTHER);
    }
}
