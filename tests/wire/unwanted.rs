//! What arrives at the listening socket and is no handshake: it ends, blocks and changes nothing.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;

use nix::libc;

use crate::client::{Attached, Client, Ends, OTHER, TOKEN, attach, count, hello};
use crate::random::Random;
use crate::server::{Persistent, check};
use crate::stream::request;

/// A handshake that asks for the log.
fn asking(token: &[u8; 16]) -> Vec<u8> {
    let mut bytes = hello(token);
    bytes[36] = 2;
    bytes
}

/// What a client that nobody wants sends, and with how many descriptors.
fn unwanted() -> Vec<(&'static str, Vec<u8>, usize)> {
    let hello = hello(&OTHER);
    let mut cases = vec![
        ("nothing", vec![], 0),
        ("a byte", vec![2], 0),
        ("a request for a page", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(), 0),
        ("zeros", vec![0; 4096], 0),
        ("ones", vec![0xff; 200], 2),
        ("three bytes and descriptors", hello[..3].to_vec(), 2),
        ("half a handshake", hello[..24].to_vec(), 0),
        ("half a handshake and descriptors", hello[..24].to_vec(), 2),
        ("a handshake without its last byte", hello[..47].to_vec(), 3),
        ("a handshake without descriptors", hello.clone(), 0),
        ("a question for the log", asking(&OTHER), 0),
        ("a question for the log with a descriptor", asking(&OTHER), 1),
        ("a count and nothing more", count(2)[..4].to_vec(), 0),
        ("a count and descriptors, without the last byte", count(2)[..4].to_vec(), 2),
        ("a count without descriptors", count(2), 0),
        ("a handshake of version 0 with a count for 3", count(3), 2),
        ("a handshake of version 0 with a count for 2", count(2), 3),
        ("a count of 0", count(0), 0),
        ("a count of 1", count(1), 1),
        ("a count of 4", count(4), 4),
        ("a negative count", vec![0xff, 0xff, 0xff, 0xff, 0], 2),
    ];
    for surplus in [1, 4, 5, 12, 13, 20, 253] {
        cases.push(("a handshake with too many or few descriptors", hello.clone(), surplus));
        cases.push(("a count with too many or few descriptors", count(2), surplus));
        cases.push(("half a handshake with too many descriptors", hello[..30].to_vec(), surplus));
        cases.push(("garbage with descriptors", vec![0x55; 64], surplus));
    }
    cases
}

/// Sends that, and says no more.
fn send(path: &Path, bytes: &[u8], fds: usize) -> Client {
    let client = Client::connect(path);
    let socket = UnixStream::pair().unwrap().0;
    let fds: Vec<RawFd> = vec![socket.as_raw_fd(); fds];
    if !bytes.is_empty() {
        client.send(bytes, &fds);
    }
    client
}

#[test]
fn nothing_unwanted_changes_a_detached_process() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    for (what, bytes, fds) in unwanted() {
        drop(send(&process.path, &bytes, fds));
        process.is_detached_again(&before, what);
    }
    let attached = attach(&process.path, &TOKEN);
    assert_eq!(attached.answer.generation(), 1);
}

#[test]
fn nothing_unwanted_changes_an_attached_process() {
    let mut process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let before = process.server.fds();
    for (what, bytes, fds) in unwanted() {
        let client = send(&process.path, &bytes, fds);
        attached.stream.is_in_step();
        drop(client);
        process.has_again(&before, what);
    }
    attached.stream.is_in_step();
    assert_eq!(attach(&process.path, &TOKEN).answer.generation(), 2);
}

#[test]
fn a_client_that_stalls_holds_nobody_up() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    for (what, bytes, fds) in unwanted() {
        let stalled = send(&process.path, &bytes, fds);
        drop(attach(&process.path, &TOKEN));
        drop(stalled);
        process.is_detached_again(&before, what);
    }
}

#[test]
fn a_client_that_stalls_does_not_disturb_whoever_is_attached() {
    let mut process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let before = process.server.fds();
    let stalled: Vec<Client> = unwanted()
        .iter()
        .map(|(_, bytes, fds)| {
            let client = send(&process.path, bytes, *fds);
            attached.stream.is_in_step();
            client
        })
        .collect();
    // While one of them is pending, the numbers that the controller was told are still the
    // server's: nothing that it opens now gets one of them.
    let number = attached.stream.done(libc::SYS_dup, &[0]) as i32;
    assert!(!attached.answer.spares().contains(&number), "{number} is a spare one");
    attached.stream.done(libc::SYS_close, &[number as u64]);
    drop(stalled);
    process.has_again(&before, "many clients that stall");
}

#[test]
fn a_newer_client_replaces_the_one_that_is_pending() {
    let process = Persistent::new();
    let older = send(&process.path, &hello(&OTHER)[..20], 2);
    let newer = send(&process.path, &hello(&OTHER)[..20], 2);
    older.is_refused();
    attach(&process.path, &TOKEN);
    newer.is_refused();
}

/// A process that can have no more than 16 descriptors.
fn with_few_descriptors() -> Persistent {
    Persistent::changed(|command| {
        // SAFETY: between fork and execve only a system call is made, which reads a local.
        unsafe {
            command.pre_exec(|| {
                let limit = libc::rlimit { rlim_cur: 16, rlim_max: 16 };
                check(libc::setrlimit(libc::RLIMIT_NOFILE, &limit))
            })
        };
    })
}

/// Makes descriptors until there is room for no other.
#[track_caller]
fn fill_the_table(attached: &Attached) {
    while attached.stream.call(libc::SYS_dup, &[0]) >= 0 {}
    assert_eq!(attached.stream.call(libc::SYS_dup, &[0]), -i64::from(libc::EMFILE));
}

#[test]
fn a_full_table_does_not_make_a_process_unreachable() {
    let mut process = with_few_descriptors();
    let attached = attach(&process.path, &TOKEN);
    fill_the_table(&attached);
    let full = process.server.fds();
    assert_eq!(full.len(), 16);

    // While attached: another controller is told, and the same one may come again.
    let client = Client::connect(&process.path);
    assert!(client.send(&hello(&OTHER), &Ends::new().raw()));
    assert_eq!(client.answer().status(), -libc::EBUSY);
    process.has_again(&full, "another controller");
    let again = attach(&process.path, &TOKEN);
    attached.stream.ends();
    fill_the_table(&again);

    // And when it is gone, again and again.
    drop(again);
    for token in [OTHER, TOKEN, OTHER] {
        let attached = attach(&process.path, &token);
        fill_the_table(&attached);
    }
    process.server.is_alive();
}

#[test]
fn nothing_unwanted_takes_room_in_a_full_table() {
    let mut process = with_few_descriptors();
    let attached = attach(&process.path, &TOKEN);
    fill_the_table(&attached);
    let full = process.server.fds();
    for (what, bytes, fds) in unwanted() {
        let stalled = send(&process.path, &bytes, fds);
        attached.stream.is_in_step();
        assert_eq!(attached.stream.call(libc::SYS_dup, &[0]), -i64::from(libc::EMFILE), "{what}");
        drop(stalled);
        process.has_again(&full, what);
    }
    drop(attached);
    attach(&process.path, &OTHER);
}

/// Random numbers that can be had again: the seed is printed, and FARCALL_SEED sets it.
fn random() -> Random {
    let seed = std::env::var("FARCALL_SEED").ok().map(|seed| seed.parse().unwrap());
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = seed.unwrap_or(now);
    println!("FARCALL_SEED={seed}");
    Random::new(seed)
}

impl Random {
    /// A handshake of either version with some bytes changed and its end cut off, or neither, and
    /// a number of descriptors: never one that attaches somebody by version 0, which would leave
    /// descriptors behind, never with TOKEN, and never one that takes the process over.
    fn handshake(&mut self) -> (Vec<u8>, usize) {
        let mut fds = [0, 0, 1, 2, 2, 2, 3, 4, 5, 20][self.below(10)];
        let mut bytes = match self.below(4) {
            0 => (0..self.below(100)).map(|_| self.below(256) as u8).collect(),
            1 => [count(self.below(5) as u8), vec![0; self.below(3)]].concat(),
            _ => hello(&OTHER),
        };
        for _ in 0..self.below(4) {
            if !bytes.is_empty() {
                let at = self.below(bytes.len());
                bytes[at] = self.below(256) as u8;
            }
        }
        if let Some(flags) = bytes.get_mut(36) {
            *flags &= !1;
        }
        bytes.truncate(self.below(2 * bytes.len() + 1));
        let announced = bytes.first_chunk().map(|count| u32::from_le_bytes(*count));
        if announced == Some(fds as u32) && bytes.len() > 4 {
            fds = 0;
        }
        (bytes, fds)
    }
}

#[test]
fn ten_thousand_random_handshakes_change_nothing() {
    let mut random = random();
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    for _ in 0..8_000 {
        let (bytes, fds) = random.handshake();
        send(&process.path, &bytes, fds);
    }
    process.is_detached_again(&before, "random handshakes");
    let attached = attach(&process.path, &TOKEN);
    let before = process.server.fds();
    for i in 0..2_000 {
        let (bytes, fds) = random.handshake();
        send(&process.path, &bytes, fds);
        if i % 16 == 0 {
            attached.stream.send(&request(libc::SYS_getpid as u64, &[]));
            assert_eq!(attached.stream.result(), i64::from(process.server.pid()));
        }
    }
    process.has_again(&before, "random handshakes");
    attached.stream.is_in_step();
    attach(&process.path, &TOKEN);
}
