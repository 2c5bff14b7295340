//! A client that is refused makes nobody wait, whatever it has sent.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use crate::client::{Attached, Client, Ends, OTHER, TOKEN, attach, count, hello};
use crate::server::{Persistent, close_everywhere, making};

/// A TCP socket that nobody reads, full, whose last close waits for ten minutes for that; and its other
/// end.
struct Lingering {
    socket: OwnedFd,
    _other: TcpStream,
}

impl Lingering {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 65_536]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
        let linger = libc::linger { l_onoff: 1, l_linger: 600 };
        setsockopt(&socket, sockopt::Linger, &linger).unwrap();
        Self { socket: socket.into(), _other: other }
    }

    /// The other end, while this one belongs to somebody else, or to nobody.
    fn given_away(self) -> TcpStream {
        close_everywhere(self.socket);
        self._other
    }
}

/// The server is not in the middle of anything, and no thread of it and no child is left.
#[track_caller]
fn is_alone(process: &Persistent, attached: &Attached) {
    attached.stream.is_in_step();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.server.pid())).unwrap();
    assert_eq!(tasks.count(), 1, "threads");
    // Not even one that is not told of unless it is asked for (__WALL).
    let wait = [u64::MAX, 0, (libc::__WALL | libc::WNOHANG) as u64, 0];
    assert_eq!(attached.stream.call(libc::SYS_wait4, &wait), -i64::from(libc::ECHILD));
}

/// What a client sends with so many sockets that linger, given to it one after the other.
fn refused(process: &mut Persistent, fds: usize, send: impl Fn(&Client, &[RawFd])) {
    let attached = attach(&process.path, &TOKEN);
    let before = process.server.fds();
    let lingering: Vec<_> = (0..fds).map(|_| Lingering::new()).collect();
    let raw: Vec<_> = lingering.iter().map(|end| end.socket.as_raw_fd()).collect();
    // Nobody else has them when the server sees them.
    process.server.stop();
    let client = {
        let _making = making();
        let client = Client::connect(&process.path);
        send(&client, &raw);
        client
    };
    let others: Vec<_> = lingering.into_iter().map(Lingering::given_away).collect();
    process.server.go_on();
    client.is_refused_or_answered();
    is_alone(process, &attached);
    process.has_again(&before, "a client that was refused");
    drop(others);
}

impl Client {
    /// The server has hung up, whatever it has said before.
    #[track_caller]
    fn is_refused_or_answered(&self) {
        assert!(crate::stream::read_up_to(&self.0, 100_000).len() < 100_000);
    }
}

#[test]
fn sockets_that_linger_in_a_handshake_that_is_none() {
    refused(&mut Persistent::new(), 3, |client, fds| {
        client.send(b"x", fds);
        client.send(b"yyyyyyyyyyy", &[]);
    });
}

#[test]
fn sockets_that_linger_in_a_handshake_that_comes_too_late() {
    refused(&mut Persistent::new(), 2, |client, fds| {
        client.send(&hello(&OTHER), fds);
    });
}

#[test]
fn sockets_that_linger_and_are_too_many() {
    refused(&mut Persistent::new(), 20, |client, fds| {
        client.send(&hello(&TOKEN), fds);
    });
    refused(&mut Persistent::new(), 20, |client, fds| {
        client.send(&hello(&TOKEN)[..40], fds);
    });
}

#[test]
fn sockets_that_linger_behind_a_handshake() {
    refused(&mut Persistent::new(), 2, |client, fds| {
        client.send(&[&hello(&OTHER)[..], &[7; 100]].concat(), &[]);
        client.send(b"more", fds);
    });
}

#[test]
fn sockets_that_linger_in_a_handshake_in_pieces() {
    refused(&mut Persistent::new(), 2, |client, fds| {
        client.send(&count(2)[..2], fds);
        client.send(&count(2)[2..], &[]);
    });
}

#[test]
fn sockets_that_linger_in_the_queue_of_one_that_is_sent() {
    refused(&mut Persistent::new(), 1, |client, fds| {
        let (one, other) = UnixStream::pair().unwrap();
        Client(one).send(b"x", fds);
        client.send(&hello(&OTHER), &[other.as_raw_fd()]);
    });
}

#[test]
fn a_client_that_is_replaced_while_its_sockets_linger() {
    let mut process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let before = process.server.fds();
    let lingering = Lingering::new();
    let client = Client::connect(&process.path);
    client.send(&hello(&OTHER)[..20], &[lingering.socket.as_raw_fd()]);
    crate::stream::until("it is received", || {
        (process.server.fds().len() == before.len() + 2).then_some(())
    });
    let other = lingering.given_away();
    let second = Client::connect(&process.path);
    client.is_refused();
    drop((client, second));
    is_alone(&process, &attached);
    process.has_again(&before, "clients that have gone");
    drop(other);
}

#[test]
fn a_refused_client_is_unseen_by_the_calls_that_come_next() {
    let process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    for _ in 0..50 {
        let client = Client::connect(&process.path);
        client.send(&hello(&OTHER), &Ends::new().raw());
        assert_eq!(client.answer().status(), -libc::EBUSY);
        // A process of more than one thread, or whose memory somebody else has, can't do that.
        let alone = (libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64;
        assert_eq!(attached.stream.call(libc::SYS_unshare, &[alone]), 0);
    }
}

#[test]
fn a_refused_client_takes_no_place_in_a_pid_namespace_that_is_prepared() {
    let mut process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let before = process.server.fds();
    attached.stream.done(libc::SYS_unshare, &[libc::CLONE_NEWPID as u64]);
    let client = Client::connect(&process.path);
    client.send(&hello(&OTHER), &Ends::new().raw());
    assert_eq!(client.answer().status(), -libc::EBUSY);
    process.has_again(&before, "a client that was refused");
    // The first child is its first process. Were that gone, there could be no other.
    assert!(attached.stream.call(libc::SYS_fork, &[]) > 0);
}
