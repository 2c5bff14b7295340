//! Handshakes of both versions: who gets the process, and what is said and closed.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::pipe2;

use crate::client::{Answer, Attached, Client, Ends, OTHER, TOKEN, attach, count, hello};
use crate::server::{Persistent, close_everywhere};
use crate::stream::{Stream, read_up_to, request};
use crate::vectors;

/// Sends the handshake with a good pair of descriptors, and gives the answer.
#[track_caller]
fn answer_to(process: &Persistent, bytes: &[u8]) -> Answer {
    let client = Client::connect(&process.path);
    assert!(client.send(bytes, &Ends::new().raw()));
    client.answer()
}

fn number(bytes: &[u8]) -> u64 {
    u64::from(u32::from_le_bytes(bytes.try_into().unwrap()))
}

/// Whether the server's descriptor is the other end of `ours`: what is written there arrives here.
#[track_caller]
fn is_connected(stream: &Stream, theirs: u64, ours: &impl std::os::fd::AsFd) {
    let memory = stream.memory(4096);
    assert_eq!(stream.copy_in(memory, b"hello"), 5);
    assert_eq!(stream.call(libc::SYS_write, &[theirs, memory, 5]), 5);
    assert_eq!(read_up_to(ours, 5), b"hello");
}

#[test]
fn version_0_with_two_descriptors() {
    let process = Persistent::new();
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    // As rsyscall does it: the count by itself, then the byte with the descriptors.
    let bytes = count(2);
    assert!(client.send(&bytes[..4], &[]));
    assert!(client.send(&bytes[4..], &ends.raw()));
    let numbers = read_up_to(&client.0, 9);
    vectors::assert_matches(&numbers, "answer-version-0");
    let Ends { stream, data, .. } = ends;
    assert_eq!(stream.getpid(), i64::from(process.server.pid()));
    is_connected(&stream, number(&numbers[4..]), &data);
    stream.is_in_step();
}

#[test]
fn version_0_with_three_descriptors() {
    let process = Persistent::new();
    let client = Client::connect(&process.path);
    let (their_input, requests) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (results, their_output) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (data, their_data) = UnixStream::pair().unwrap();
    let fds = [their_input.as_raw_fd(), their_output.as_raw_fd(), their_data.as_raw_fd()];
    assert!(client.send(&count(3), &fds));
    let numbers = read_up_to(&client.0, 13);
    assert_eq!(numbers.len(), 12);
    let stream = Stream { results, requests };
    assert_eq!(stream.getpid(), i64::from(process.server.pid()));
    is_connected(&stream, number(&numbers[8..]), &data);
    stream.is_in_step();
}

#[test]
fn version_0_leaves_its_descriptors_to_its_client() {
    let process = Persistent::new();
    let before = process.fds_when_detached();
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&count(2), &ends.raw()));
    let numbers = read_up_to(&client.0, 9);
    let [stream, data] = [number(&numbers[..4]), number(&numbers[4..])];
    ends.stream.hang_up();

    // They are still there, with all that there was before.
    let attached = attach(&process.path, &TOKEN);
    for fd in [stream, data] {
        assert_eq!(attached.stream.call(libc::SYS_close, &[fd]), 0);
    }
    drop(attached);
    let mut process = process;
    process.is_detached_again(&before, "closing what version 0 has left");
}

#[test]
fn a_version_0_client_has_no_spare_descriptors_around_it() {
    let process = Persistent::new();
    process.fds_when_detached();
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&count(2), &ends.raw()));
    assert_eq!(read_up_to(&client.0, 9).len(), 8);
    ends.stream.is_in_step();
    let open = process.server.fds();
    assert!(open.len() == 6, "{open:?}");
    assert!(open.values().filter(|link| **link == open[&3]).count() == 1, "{open:?}");
}

#[test]
fn version_1_is_answered_as_documented() {
    let process = Persistent::new();
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&vectors::bytes("handshake-version-1"), &ends.raw()));
    let answer = client.answer();
    vectors::assert_matches(&answer.0, "answer-version-1");
    assert_eq!(answer.pid(), process.server.pid());
    assert_eq!(answer.listen(), 3);
    assert!(answer.since() > 0);
    // What it names is what it has open.
    let mut named = vec![0, 1, 2, answer.listen()];
    named.extend(&answer.fds()[..2]);
    named.extend(answer.spares());
    named.sort_unstable();
    let Ends { stream, data, .. } = ends;
    stream.is_in_step();
    assert!(process.server.fds().keys().eq(&named), "{named:?}");
    is_connected(&stream, answer.fds()[1] as u64, &data);

    let busy = answer_to(&process, &hello(&OTHER));
    vectors::assert_matches(&busy.0, "answer-version-1-busy");
    assert_eq!(busy.since(), answer.since());
    stream.is_in_step();
}

#[test]
fn version_1_with_three_descriptors() {
    let process = Persistent::new();
    let client = Client::connect(&process.path);
    let (their_input, requests) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (results, their_output) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (data, their_data) = UnixStream::pair().unwrap();
    let fds = [their_input.as_raw_fd(), their_output.as_raw_fd(), their_data.as_raw_fd()];
    assert!(client.send(&hello(&TOKEN), &fds));
    let answer = client.answer();
    assert!(answer.fds().iter().all(|fd| *fd > 3), "{:?}", answer.fds());
    let stream = Stream { results, requests };
    is_connected(&stream, answer.fds()[2] as u64, &data);
    stream.is_in_step();
}

#[test]
fn descriptors_that_arrive_are_closed_on_exec() {
    let process = Persistent::new();
    let Attached { stream, answer, .. } = attach(&process.path, &TOKEN);
    for fd in answer.fds()[..2].iter().chain(&answer.spares()) {
        let flags = stream.call(libc::SYS_fcntl, &[*fd as u64, libc::F_GETFD as u64]);
        assert_eq!(flags, i64::from(libc::FD_CLOEXEC), "descriptor {fd}");
    }
}

#[test]
fn a_handshake_may_come_in_pieces_and_its_descriptors_with_any_of_them() {
    let process = Persistent::new();
    for with in [0, 3, 4, 20, 47] {
        let client = Client::connect(&process.path);
        let ends = Ends::new();
        for (i, byte) in hello(&TOKEN).iter().enumerate() {
            let fds = ends.raw();
            assert!(client.send(&[*byte], if i == with { &fds } else { &[] }));
        }
        assert_eq!(client.answer().status(), 0);
        ends.stream.is_in_step();
    }
}

#[test]
fn descriptors_may_come_in_several_messages() {
    let process = Persistent::new();
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    let [stream, data] = ends.raw();
    let bytes = hello(&TOKEN);
    assert!(client.send(&bytes[..10], &[stream]));
    assert!(client.send(&bytes[10..], &[data]));
    let answer = client.answer();
    assert_eq!(answer.status(), 0);
    is_connected(&ends.stream, answer.fds()[1] as u64, &ends.data);
}

#[test]
fn bytes_behind_a_handshake_are_dropped() {
    let process = Persistent::new();
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    let pid = vectors::bytes("request-getpid");
    assert!(client.send(&[hello(&TOKEN), pid].concat(), &ends.raw()));
    assert_eq!(client.answer().status(), 0);
    ends.stream.is_in_step();
}

#[test]
fn the_same_token_may_attach_again_while_it_is_attached() {
    let mut process = Persistent::new();
    let first = attach(&process.path, &TOKEN);
    let open = process.server.fds().len();
    let second = attach(&process.path, &TOKEN);
    assert_eq!(second.answer.generation(), first.answer.generation() + 1);
    first.stream.ends();
    assert_eq!(read_up_to(&first.data, 1), b"", "the data socket is closed as well");
    second.stream.is_in_step();
    assert_eq!(process.server.fds().len(), open);
    process.server.is_alive();
}

#[test]
fn the_same_token_may_attach_again_when_its_answer_was_lost() {
    let process = Persistent::new();
    let lost = Ends::new();
    let client = Client::connect(&process.path);
    assert!(client.send(&hello(&TOKEN), &lost.raw()));
    drop(client);
    // The stream is there all the same, and its owner still holds it.
    lost.stream.is_in_step();
    let attached = attach(&process.path, &TOKEN);
    assert_eq!(attached.answer.generation(), 2);
    let Ends { stream, theirs, .. } = lost;
    drop(theirs);
    stream.ends();
}

#[test]
fn another_token_is_told_who_holds_the_process() {
    let process = Persistent::new();
    let holder = attach(&process.path, &TOKEN);
    for _ in 0..3 {
        let answer = answer_to(&process, &hello(&OTHER));
        assert_eq!(answer.status(), -libc::EBUSY);
        assert_eq!((answer.holder(), answer.since()), (4711, holder.answer.since()));
        assert_eq!(answer.fds(), [-1; 3]);
        holder.stream.is_in_step();
    }
}

#[test]
fn another_token_takes_the_process_over_if_it_asks_for_that() {
    let process = Persistent::new();
    let holder = attach(&process.path, &TOKEN);
    let flag = |flag| {
        let mut bytes = hello(&OTHER);
        bytes[36] = flag;
        answer_to(&process, &bytes)
    };
    // Other bits are nothing yet.
    assert_eq!(flag(5).status(), -libc::EINVAL);
    holder.stream.is_in_step();
    let answer = flag(1);
    assert_eq!((answer.status(), answer.generation()), (0, 2));
    holder.stream.ends();
}

#[test]
fn another_token_may_attach_when_nobody_is_attached() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    for (i, token) in [TOKEN, OTHER, TOKEN].iter().enumerate() {
        let attached = attach(&process.path, token);
        assert_eq!(attached.answer.generation(), i as i64 + 1);
        drop(attached);
        process.is_detached_again(&before, "a connection");
    }
}

#[test]
fn controllers_may_follow_each_other_at_once() {
    let process = Persistent::new();
    for i in 0..200 {
        // Nothing is awaited between them.
        let attached = attach(&process.path, if i % 2 == 0 { &TOKEN } else { &OTHER });
        assert_eq!(attached.answer.generation(), i + 1);
    }
}

#[test]
fn a_controller_that_is_gone_keeps_nobody_out() {
    let process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&hello(&OTHER)[..1], &[]));
    // From here on the client is pending.
    attached.stream.is_in_step();
    // What happens while the process is stopped it sees all at once.
    process.server.stop();
    drop(attached);
    assert!(client.send(&hello(&OTHER)[1..], &ends.raw()));
    process.server.go_on();
    assert_eq!(client.answer().status(), 0);
    ends.stream.is_in_step();
}

#[test]
fn a_half_closed_stream_is_the_end_of_the_connection_behind_its_requests() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    let attached = attach(&process.path, &TOKEN);
    attached.stream.send(&vectors::bytes("request-getpid").repeat(3));
    let requests = attached.stream.requests.as_raw_fd();
    shutdown(requests, Shutdown::Write).unwrap();
    for _ in 0..3 {
        assert_eq!(attached.stream.result(), i64::from(process.server.pid()));
    }
    attached.stream.ends();
    process.is_detached_again(&before, "a connection");
}

#[test]
fn an_operation_that_is_unknown_detaches_and_does_not_end_a_persistent_process() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    let attached = attach(&process.path, &TOKEN);
    attached.stream.send(&request(crate::stream::UNKNOWN, &[]));
    attached.stream.ends();
    process.is_detached_again(&before, "an unknown operation");
    attach(&process.path, &OTHER);
}

#[test]
fn half_a_request_of_an_old_connection_is_not_part_of_the_next_one() {
    let process = Persistent::new();
    let first = attach(&process.path, &TOKEN);
    first.stream.send(&request(libc::SYS_exit_group as u64, &[1])[..50]);
    let second = attach(&process.path, &TOKEN);
    second.stream.is_in_step();
}

#[test]
fn a_closed_output_pipe_does_not_kill_a_persistent_process() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    let client = Client::connect(&process.path);
    let (their_input, requests) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (results, their_output) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (_data, their_data) = UnixStream::pair().unwrap();
    let fds = [their_input.as_raw_fd(), their_output.as_raw_fd(), their_data.as_raw_fd()];
    assert!(client.send(&hello(&TOKEN), &fds));
    assert_eq!(client.answer().status(), 0);
    drop(their_output);
    close_everywhere(results);
    assert_eq!(nix::unistd::write(&requests, &vectors::bytes("request-getpid")), Ok(56));
    process.is_detached_again(&before, "writing to a closed pipe");
    attach(&process.path, &OTHER);
}

#[test]
fn what_a_version_1_handshake_gets_wrong_is_its_status() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    let changed = |at: usize| {
        let mut bytes = hello(&TOKEN);
        bytes[at] ^= 0x40;
        bytes
    };
    let check = |process: &Persistent| {
        for at in [4, 7, 36, 39, 40, 47] {
            assert_eq!(answer_to(process, &changed(at)).status(), -libc::EINVAL, "byte {at}");
        }
        for at in [8, 11] {
            assert_eq!(answer_to(process, &changed(at)).status(), -libc::EPROTONOSUPPORT);
        }
        let socket = UnixStream::pair().unwrap().0;
        for n in [0, 1, 4, 5, 12, 13, 20, 253] {
            let client = Client::connect(&process.path);
            let fds: Vec<RawFd> = vec![socket.as_raw_fd(); n];
            assert!(client.send(&hello(&TOKEN), &fds));
            let answer = client.answer();
            assert_eq!(answer.status(), -libc::EBADF, "{n} descriptors");
            assert_eq!(answer.fds(), [-1; 3]);
        }
    };
    check(&process);
    process.is_detached_again(&before, "handshakes that are wrong");
    let attached = attach(&process.path, &TOKEN);
    assert_eq!(attached.answer.generation(), 1);
    let before = process.server.fds();
    check(&process);
    attached.stream.is_in_step();
    process.has_again(&before, "handshakes that are wrong");
}

#[test]
fn the_versions_do_not_attach_over_each_other() {
    let mut process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    let open = process.server.fds();
    let client = Client::connect(&process.path);
    client.send(&count(2), &Ends::new().raw());
    client.is_refused();
    attached.stream.is_in_step();
    process.has_again(&open, "a client of version 0");

    let mut process = Persistent::new();
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&count(2), &ends.raw()));
    assert_eq!(read_up_to(&client.0, 9).len(), 8);
    let open = process.server.fds();
    let answer = answer_to(&process, &hello(&TOKEN));
    assert_eq!((answer.status(), answer.holder()), (-libc::EBUSY, 0));
    ends.stream.is_in_step();
    process.has_again(&open, "a client of version 1");
}
