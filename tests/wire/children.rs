//! Children that calls of the fork family make: those without a stack of their own must not be
//! heard, those with one return into the trampoline.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use nix::libc;
use nix::poll::PollFlags;

use crate::server::{Server, sockets};
use crate::stream::{COPY_OUT, IMAGE, Stream, ready, request};

/// The exit status that wait4 stores, of a child that is waited for through the stream.
fn reap(stream: &Stream, pid: u64) -> i32 {
    let status = stream.memory(4096);
    assert_eq!(stream.done(libc::SYS_wait4, &[pid, status, 0, 0]), pid);
    let (bytes, _) = stream.copy_out(status, 4);
    i32::from_le_bytes(bytes.try_into().unwrap())
}

/// The call makes a child, the stream carries one result for it, and the child leaves silently.
fn the_child_is_not_heard(number: libc::c_long, args: &[u64]) {
    let (server, stream) = Server::on_pipes();
    for _ in 0..3 {
        let child = stream.call(number, args);
        assert!(child > 0, "{child}");
        assert_eq!(reap(&stream, child as u64), 0, "the child's status");
        assert_eq!(stream.getpid(), i64::from(server.pid()));
        stream.is_in_step();
    }
}

#[test]
fn the_child_of_a_fork_leaves_silently() {
    the_child_is_not_heard(libc::SYS_fork, &[]);
}

#[test]
fn the_child_of_a_vfork_leaves_silently() {
    the_child_is_not_heard(libc::SYS_vfork, &[]);
}

#[test]
fn the_child_of_a_clone_without_a_stack_leaves_silently() {
    the_child_is_not_heard(libc::SYS_clone, &[libc::SIGCHLD as u64]);
    let vfork = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    the_child_is_not_heard(libc::SYS_clone, &[vfork as u64]);
}

#[test]
fn the_child_of_a_clone3_without_a_stack_leaves_silently() {
    let (server, stream) = Server::on_pipes();
    // struct clone_args of 64 bytes: the fifth word is the exit signal.
    let memory = stream.memory(4096);
    assert_eq!(stream.copy_in(memory + 32, &(libc::SIGCHLD as u64).to_le_bytes()), 8);
    let child = stream.done(libc::SYS_clone3, &[memory, 64]);
    assert_eq!(reap(&stream, child), 0);
    assert_eq!(stream.getpid(), i64::from(server.pid()));
    stream.is_in_step();
}

/// Where the image's entries lie in the server, as a client without our library finds out.
struct Entries {
    serve: u64,
    trampoline: u64,
}

impl Entries {
    fn of(stream: &Stream) -> Self {
        let image = stream.ask(IMAGE, &[]) as u64;
        assert_eq!(stream.ask(COPY_OUT, &[image + 176, 40]), 40);
        let table = stream.receive(40);
        assert_eq!(stream.result(), 40);
        crate::vectors::assert_matches(&table, "entry-table");
        let offset = |at: usize| u64::from(u32::from_le_bytes(*table[at..].first_chunk().unwrap()));
        Self { serve: image + offset(16), trampoline: image + offset(24) }
    }
}

/// Has the server clone a child with a stack of its own, which serves on descriptor 3.
fn clone_a_server(stream: &Stream, flags: i32) -> u64 {
    let entries = Entries::of(stream);
    let top = stream.memory(16384) + 16384;
    let words = [entries.trampoline, 3, 3, 0, 0, 0, 0, entries.serve];
    let frame: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(stream.copy_in(top - 64, &frame), 64);
    stream.done(libc::SYS_clone, &[flags as u64, top - 64, 0, 0, 0])
}

fn both_ends_of(socket: OwnedFd) -> Stream {
    Stream { results: socket.try_clone().unwrap(), requests: socket }
}

#[test]
fn the_trampoline_calls_serve_and_leaves_with_exit_0_at_the_end() {
    for flags in [libc::SIGCHLD, libc::SIGCHLD | libc::CLONE_VM] {
        let (ours, theirs) = sockets();
        let (server, stream) = Server::on_pipes_with(Some(theirs.as_fd()));
        drop(theirs);
        let child = clone_a_server(&stream, flags);
        let second = both_ends_of(ours);
        assert_eq!(second.getpid(), child as i64);
        assert_eq!(second.call(libc::SYS_getppid, &[]), i64::from(server.pid()));
        second.is_in_step();
        stream.is_in_step();
        drop(second);
        assert_eq!(reap(&stream, child), 0, "the child's status");
        stream.is_in_step();
    }
}

#[test]
fn a_child_of_the_trampoline_dies_by_sigkill_with_its_parent() {
    for flags in [libc::SIGCHLD, libc::SIGCHLD | libc::CLONE_VM] {
        let (ours, theirs) = sockets();
        let (server, stream) = Server::on_pipes_with(Some(theirs.as_fd()));
        drop(theirs);
        let child = clone_a_server(&stream, flags);
        let second = both_ends_of(ours);
        let memory = second.memory(4096);
        second.done(libc::SYS_prctl, &[libc::PR_GET_PDEATHSIG as u64, memory]);
        assert_eq!(second.copy_out(memory, 4), (vec![9, 0, 0, 0], 4));
        // SAFETY: makes a descriptor, which nobody else owns.
        let life = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, child, 0);
            assert!(fd >= 0);
            OwnedFd::from_raw_fd(fd as i32)
        };
        // It is in the middle of a call, and would never see the end of its input.
        second.send(&request(libc::SYS_pause as u64, &[]));
        drop(server);
        ready(&life, PollFlags::POLLIN, "the child dies");
        second.ends();
    }
}
