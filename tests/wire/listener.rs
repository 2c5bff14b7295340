//! The listening socket: who is named by it, and what becomes of a process that loses it.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use nix::libc;
use nix::sys::socket::{getsockopt, sockopt};

use crate::client::{TOKEN, attach};
use crate::server::{Home, Persistent, Server, sockets};
use crate::stream::{SERVE, Stream};

/// Whom the kernel names as the one who listens there.
fn listens(client: &UnixStream) -> i32 {
    getsockopt(client, sockopt::PeerCredentials).unwrap().pid()
}

#[test]
fn a_listener_that_was_passed_names_the_server_and_not_its_maker() {
    let process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let client = UnixStream::connect(&process.path).unwrap();
    assert_eq!(listens(&client), process.server.pid());
    attached.stream.is_in_step();
}

/// A process that has not become persistent, with a listener of this process's as descriptor 3.
fn with_a_listener() -> (Server, Stream, PathBuf) {
    let home = Home::new();
    let path = home.path("listener");
    let listener = UnixListener::bind(&path).unwrap();
    let (ours, theirs) = sockets();
    let mut command = home.command(Some(listener.as_fd()));
    command.stdin(theirs.try_clone().unwrap()).stdout(theirs);
    let server = Server::start(home, &mut command);
    drop(command);
    (server, Stream { results: ours.try_clone().unwrap(), requests: ours }, path)
}

/// It becomes persistent there.
fn serve(stream: &Stream) {
    stream.ask(SERVE, &[u64::MAX, u64::from(u32::MAX) | 3 << 32, 1, 0, 0]);
}

#[test]
fn so_does_one_that_a_process_gets_with_serve() {
    let (server, stream, path) = with_a_listener();
    let client = UnixStream::connect(&path).unwrap();
    assert_eq!(listens(&client), std::process::id() as i32);
    serve(&stream);
    let client = UnixStream::connect(&path).unwrap();
    assert_eq!(listens(&client), server.pid());
}

#[test]
fn one_of_another_user_stays_that_users() {
    let (_server, stream, path) = with_a_listener();
    stream.done(libc::SYS_setresuid, &[1000, 1000, 1000]);
    serve(&stream);
    let client = UnixStream::connect(&path).unwrap();
    assert_eq!(listens(&client), std::process::id() as i32);
    // Whoever might attach may.
    drop(stream);
    attach(&path, &TOKEN);
}

#[test]
fn a_process_whose_listener_is_shut_down_ends_with_its_connection() {
    for how in [libc::SHUT_RD, libc::SHUT_WR, libc::SHUT_RDWR] {
        let mut process = Persistent::new();
        let attached = attach(&process.path, &TOKEN);
        let listen = attached.answer.listen() as u64;
        attached.stream.done(libc::SYS_shutdown, &[listen, how as u64]);
        attached.stream.is_in_step();
        if how == libc::SHUT_WR {
            // That forbids nothing that a listener does.
            drop(attached);
            attach(&process.path, &TOKEN);
            continue;
        }
        // Somebody who comes then is refused by the kernel.
        assert!(UnixStream::connect(&process.path).is_err());
        attached.stream.is_in_step();
        drop(attached);
        process.server.exits_with(0);
    }
}

#[test]
fn so_does_one_whose_listener_is_shut_down_while_it_is_detached() {
    let mut process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let listener = crate::ring::fetch(process.server.pid(), attached.answer.listen());
    drop(attached);
    crate::stream::until("the process waits", || {
        (crate::ring::blocked_in(process.server.pid()) == Some(libc::SYS_ppoll)).then_some(())
    });
    nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
    process.server.exits_with(0);
}

#[test]
fn a_process_whose_listener_is_replaced_ends_with_its_connection() {
    type Made = fn(&Stream) -> u64;
    let makers: [(&str, Made); 4] = [
        ("a file that is always ready", |stream| stream.done(libc::SYS_dup, &[0])),
        ("a counter that is not", |stream| stream.done(libc::SYS_eventfd2, &[0, 0])),
        ("a socket", |stream| {
            let stream_socket = libc::SOCK_STREAM as u64;
            stream.done(libc::SYS_socket, &[libc::AF_UNIX as u64, stream_socket, 0])
        }),
        ("one end of a pair", |stream| {
            let memory = stream.memory(4096);
            let stream_socket = libc::SOCK_STREAM as u64;
            stream.done(libc::SYS_socketpair, &[libc::AF_UNIX as u64, stream_socket, 0, memory]);
            stream.ask(crate::stream::OP | 4, &[memory, 4]) as u64
        }),
    ];
    for (what, make) in makers {
        let mut process = Persistent::new();
        let attached = attach(&process.path, &TOKEN);
        let made = make(&attached.stream);
        let listen = attached.answer.listen() as u64;
        attached.stream.done(libc::SYS_dup2, &[made, listen]);
        attached.stream.is_in_step();
        drop(attached);
        println!("{what}");
        process.server.exits_with(0);
    }
}

#[test]
fn a_listener_that_is_replaced_by_another_one_is_listened_on() {
    let process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let other = process.server.home.path("other");
    let (listen, stream) = (attached.answer.listen() as u64, &attached.stream);
    let made = stream.done(
        libc::SYS_socket,
        &[libc::AF_UNIX as u64, (libc::SOCK_STREAM | libc::SOCK_NONBLOCK) as u64, 0],
    );
    let memory = stream.memory(4096);
    let mut address = (libc::AF_UNIX as u16).to_le_bytes().to_vec();
    address.extend(other.to_str().unwrap().as_bytes());
    address.push(0);
    stream.copy_in(memory, &address);
    stream.done(libc::SYS_bind, &[made, memory, address.len() as u64]);
    stream.done(libc::SYS_listen, &[made, 16]);
    stream.done(libc::SYS_dup2, &[made, listen]);
    drop(attached);
    attach(&other, &TOKEN);
}
