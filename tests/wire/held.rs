//! What rsyscall's own client expects besides the bytes: who waits for whom, and which calls a server makes.

use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{Shutdown, shutdown};

use crate::client::{Attached, Client, Ends, TOKEN, attach, count};
use crate::ring::blocked_in;
use crate::ring_random::filter;
use crate::server::{Persistent, Server};
use crate::stream::{Stream, read_up_to, request, until};

/// Connects as a client of version 0, and sends its handshake.
fn knock(process: &Persistent) -> (Client, Ends) {
    let (client, ends) = (Client::connect(&process.path), Ends::new());
    assert!(client.send(&count(2), &ends.raw()));
    (client, ends)
}

/// It has been answered, and the socket is closed.
#[track_caller]
fn is_let_in(client: &Client) {
    assert_eq!(read_up_to(&client.0, 9).len(), 8);
}

/// The server has looked at all that has come, and waits.
fn waits(process: &Persistent) {
    let pid = process.server.pid();
    until("the process waits", || (blocked_in(pid) == Some(libc::SYS_ppoll)).then_some(()));
}

#[test]
fn a_client_of_version_0_is_held_until_the_requests_of_the_one_before_are_done() {
    let process = Persistent::new();
    let (first, ends) = knock(&process);
    is_let_in(&first);
    // Its requests and its end are there before the next client is seen.
    process.server.stop();
    let memory = ends.stream.requests.try_clone().unwrap();
    for mask in [0o1, 0o2, 0o3] {
        ends.stream.send(&request(libc::SYS_umask as u64, &[mask]));
    }
    shutdown(memory.as_raw_fd(), Shutdown::Write).unwrap();
    let (second, later) = knock(&process);
    process.server.go_on();
    is_let_in(&second);
    assert_eq!(later.stream.call(libc::SYS_umask, &[0o22]), 0o3);
    let results = ends.stream.receive(24);
    assert_eq!(results[8..], [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    later.stream.is_in_step();
}

#[test]
fn a_client_of_version_0_is_held_while_the_one_before_goes_on_making_calls() {
    let mut process = Persistent::new();
    let (first, ends) = knock(&process);
    is_let_in(&first);
    let open = process.server.fds();
    let (second, later) = knock(&process);
    for _ in 0..3 {
        ends.stream.is_in_step();
        waits(&process);
    }
    ends.stream.hang_up();
    is_let_in(&second);
    later.stream.is_in_step();
    // One that has given up is forgotten.
    let (third, _) = knock(&process);
    waits(&process);
    drop(third);
    let before = open.len() + 2;
    until("it is closed", || (process.server.fds().len() == before).then_some(()));
    later.stream.is_in_step();
    process.server.is_alive();
}

#[test]
fn who_holds_the_process_by_version_1_is_waited_for_by_nobody() {
    let process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let (client, _) = knock(&process);
    client.is_refused();
    attached.stream.is_in_step();
}

#[test]
fn a_client_of_version_1_is_answered_while_one_of_version_0_is_held() {
    let process = Persistent::new();
    let (first, ends) = knock(&process);
    is_let_in(&first);
    let (held, _) = knock(&process);
    waits(&process);
    let client = Client::connect(&process.path);
    assert!(client.send(&crate::client::hello(&TOKEN), &Ends::new().raw()));
    assert_eq!(client.answer().status(), -libc::EBUSY);
    // Only one waits at a time.
    held.is_refused();
    ends.stream.is_in_step();
}

/// Whether a server's handler for SIGPIPE is in its image.
fn handles_broken_pipes(stream: &Stream) -> bool {
    let image = stream.ask(crate::stream::IMAGE, &[]) as u64;
    let memory = stream.memory(4096);
    stream.done(libc::SYS_rt_sigaction, &[libc::SIGPIPE as u64, 0, memory, 8]);
    let handler = u64::from_le_bytes(*stream.copy_out(memory, 8).0.first_chunk().unwrap());
    (image..image + 12_288).contains(&handler)
}

#[test]
fn who_becomes_persistent_does_not_die_of_a_connection_that_is_gone() {
    use std::os::unix::net::UnixListener;

    use crate::stream::SERVE;

    let home = crate::server::Home::new();
    let path = home.path("listener");
    let listener = UnixListener::bind(&path).unwrap();
    let (ours, theirs) = crate::server::sockets();
    use std::os::fd::AsFd;
    let mut command = home.command(Some(listener.as_fd()));
    command.stdin(theirs.try_clone().unwrap()).stdout(theirs);
    let mut server = Server::start(home, &mut command);
    drop(command);
    let stream = Stream { results: ours.try_clone().unwrap(), requests: ours };
    // As in a program that was not made for this.
    let memory = stream.memory(4096);
    stream.done(libc::SYS_rt_sigaction, &[libc::SIGPIPE as u64, memory, 0, 8]);
    assert!(!handles_broken_pipes(&stream));
    let keep = u64::MAX;
    let sockets = u64::from(u32::MAX) | 3 << 32;
    stream.ask(SERVE, &[keep, sockets, 1, 0, 0]);
    assert!(handles_broken_pipes(&stream));
    // The end of the stream comes while its results are still to be written.
    let stopped = stream.requests.try_clone().unwrap();
    server.stop();
    for _ in 0..3 {
        stream.send(&request(libc::SYS_getppid as u64, &[]));
    }
    drop((stream, stopped));
    server.go_on();
    let Attached { stream, .. } = attach(&path, &TOKEN);
    stream.is_in_step();
    server.is_alive();
}

#[test]
fn a_server_without_a_listener_makes_no_call_but_read_and_write_for_a_request() {
    for on_pipes in [false, true] {
        let (mut server, stream) =
            if on_pipes { Server::on_pipes() } else { Server::on_a_socket() };
        // What else it would do kills it.
        let allowed = [libc::SYS_read, libc::SYS_write, libc::SYS_exit_group, libc::SYS_getuid];
        filter(&stream, &allowed, false, libc::SECCOMP_RET_KILL_PROCESS);
        let one = request(libc::SYS_getuid as u64, &[]);
        for _ in 0..10 {
            stream.send(&one);
            stream.result();
        }
        stream.send(&one.repeat(64));
        stream.receive(64 * 8);
        drop(stream);
        server.exits_with(0);
    }
}

#[test]
fn where_its_descriptors_do_not_block_it_waits() {
    let (mut server, stream) = Server::on_a_socket();
    let flags = libc::O_NONBLOCK as u64;
    stream.done(libc::SYS_fcntl, &[0, libc::F_SETFL as u64, flags]);
    stream.is_in_step();
    let pid = server.pid();
    until("the process waits", || (blocked_in(pid) == Some(libc::SYS_ppoll)).then_some(()));
    stream.is_in_step();
    drop(stream);
    server.exits_with(0);
}
