//! Version 1 of the stream: what is read ahead, sent together, linked and referred to.

use nix::libc;

use crate::client::{Attached, Client, Ends, TOKEN, attach};
use crate::server::{Persistent, Server};
use crate::stream::{COPY_IN, COPY_OUT, OP, SERVE, Stream, UNKNOWN, request};
use crate::vectors;

const CANCELED: i64 = -(libc::ECANCELED as i64);
const LINK: u64 = 1 << 33;
const FLUSH: u64 = 1 << 34;
const REF0: u64 = 1 << 35;

fn version_1() -> (Server, Stream) {
    let (server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    (server, stream)
}

#[test]
fn requests_in_pieces_of_any_size_are_answered_in_order() {
    let (server, stream) = version_1();
    let bytes: Vec<u8> = (0..200).flat_map(|_| vectors::bytes("request-getpid")).collect();
    for piece in [1, 7, 55, 56, 57, 3583, 3584, 3585, 11_200] {
        for part in bytes.chunks(piece) {
            stream.send(part);
        }
        for _ in 0..200 {
            assert_eq!(stream.result(), i64::from(server.pid()), "pieces of {piece}");
        }
    }
    stream.is_in_step();
}

#[test]
fn without_memory_for_it_the_version_stays_0() {
    let (_server, stream) = Server::on_pipes();
    let address = stream.memory(16_384);
    let size = 16_384;
    for (version, address, size) in [
        (1, 0, size),
        (1, 64, size),
        (1, address + 8, size),
        (1, address, size - 1),
        (1, address, 0),
        (0, address, size),
    ] {
        let answer = stream.ask(OP, &[version, address, size]);
        assert_eq!(answer & 0xffff, 0, "{version} {address:#x} {size}");
    }
    assert_eq!(stream.ask(OP, &[7, address, size]) & 0xffff, 1, "1 is the highest that it speaks");
    // And stays what it is.
    assert_eq!(stream.ask(OP, &[0, 0]) & 0xffff, 1);
    stream.is_in_step();
}

#[test]
fn the_documents_close_closes_what_was_opened_and_nothing_if_that_failed() {
    let (server, stream) = version_1();
    let before = server.fds();
    let dup = |fd: u64| request(libc::SYS_dup as u64, &[fd]);
    let close = vectors::bytes("request-close-linked");
    stream.send(&[dup(0), close.clone(), dup(77), close].concat());
    assert!(stream.result() > 0);
    assert_eq!(stream.result(), 0);
    assert_eq!(stream.result(), -i64::from(libc::EBADF));
    assert_eq!(stream.result(), CANCELED);
    assert_eq!(server.fds(), before);
}

#[test]
fn a_copy_in_that_is_skipped_has_its_payload_consumed() {
    let (_server, stream) = version_1();
    let memory = stream.memory(1 << 20);
    for len in [1, 100, 4000, 100_000] {
        let failing = request(libc::SYS_close as u64, &[u64::MAX]);
        let copy = request(COPY_IN | LINK, &[memory, len as u64]);
        stream.send(&[failing, copy, vec![7; len]].concat());
        assert_eq!(stream.result(), -i64::from(libc::EBADF));
        assert_eq!(stream.result(), CANCELED);
        stream.is_in_step();
        assert_eq!(stream.copy_out(memory, 1).0, [0], "nothing was stored");
    }
}

#[test]
fn results_before_a_flush_do_not_wait_for_what_blocks() {
    let (server, stream) = version_1();
    let mut pipe = [0; 8];
    let memory = stream.memory(4096);
    stream.done(libc::SYS_pipe2, &[memory, 0]);
    pipe.copy_from_slice(&stream.copy_out(memory, 8).0);
    let reading = u64::from(u32::from_le_bytes(*pipe.first_chunk().unwrap()));
    // The read blocks for good; the result before it comes nevertheless.
    let read = request(libc::SYS_read as u64 | FLUSH, &[reading, memory, 1]);
    stream.send(&[vectors::bytes("request-getpid"), read].concat());
    assert_eq!(stream.result(), i64::from(server.pid()));
}

#[test]
fn a_length_that_depends_on_a_result_ends_the_connection() {
    let (mut server, stream) = version_1();
    let memory = stream.memory(4096);
    let length_is_a_result = 1 << 36;
    stream.send(&request(COPY_IN | length_is_a_result, &[memory, 1]));
    stream.ends();
    server.exits_with(0);
}

#[test]
fn bits_that_are_nothing_in_version_1_either_are_refused() {
    for bit in [41, 50, 62, 63] {
        let (mut server, stream) = version_1();
        let exit = libc::SYS_exit_group as u64 | 1 << bit;
        assert_eq!(stream.ask(exit, &[7]), -i64::from(libc::EINVAL));
        stream.is_in_step();
        stream.send(&request(COPY_IN | 1 << bit, &[0, 0]));
        stream.ends();
        server.exits_with(0);
    }
}

#[test]
fn a_reference_reaches_64_calls_back_and_not_one_further() {
    let (server, stream) = version_1();
    let pid = i64::from(server.pid());
    let others = request(libc::SYS_getuid as u64, &[]).repeat(63);
    let first = [vectors::bytes("request-getpid"), others];
    let back = |distance| request(libc::SYS_pidfd_open as u64 | REF0, &[distance]);
    for before in [0, 1, 63, 64, 65, 1000] {
        // Wherever in the ring of results the call lies.
        stream.send(&request(libc::SYS_getppid as u64, &[]).repeat(before));
        for _ in 0..before {
            stream.result();
        }
        stream.send(&[first.concat(), back(64)].concat());
        assert_eq!(stream.result(), pid);
        for _ in 0..63 {
            stream.result();
        }
        assert!(stream.result() > 0, "{before}");
        for distance in [0, 65, u64::MAX] {
            stream.send(&back(distance));
            assert_eq!(stream.result(), CANCELED, "{before} {distance}");
        }
    }
}

#[test]
fn the_first_request_has_none_before_it() {
    let (mut server, stream) = Server::on_a_socket();
    let memory = stream.memory(16_384);
    // The calls of version 0, HELLO among them, are none of version 1's.
    assert_eq!(stream.ask(OP, &[1, memory, 16_384]) & 0xffff, 1);
    assert_eq!(stream.ask(libc::SYS_getpid as u64 | LINK, &[]), CANCELED);
    assert_eq!(stream.ask(libc::SYS_pidfd_open as u64 | REF0, &[2]), CANCELED);
    stream.is_in_step();
    stream.hang_up();
    server.exits_with(0);
}

#[test]
fn a_copy_out_of_any_length_comes_whole_between_other_results() {
    let (server, stream) = version_1();
    let memory = stream.memory(16_384);
    let data: Vec<u8> = (0..16_384u32).map(|at| (at % 251) as u8).collect();
    assert_eq!(stream.copy_in(memory, &data), 16_384);
    let getpid = vectors::bytes("request-getpid");
    // Results and data that fill the output buffer exactly, nearly, and not at all.
    for before in [0, 1, 2] {
        let lengths = [0, 1, 4096, 4576, 4584, 4591, 4592, 4593, 4599, 4600, 4607, 4608, 4609];
        for len in lengths.into_iter().chain([16_384]) {
            let copy = request(COPY_OUT, &[memory, len as u64]);
            stream.send(&[getpid.repeat(before), copy, getpid.clone()].concat());
            for _ in 0..before {
                assert_eq!(stream.result(), i64::from(server.pid()));
            }
            assert_eq!(stream.result(), len as i64);
            assert_eq!(stream.receive(len), data[..len], "{before} {len}");
            assert_eq!(stream.result(), len as i64);
            assert_eq!(stream.result(), i64::from(server.pid()));
        }
    }
    stream.is_in_step();
}

#[test]
fn payload_that_was_read_ahead_and_has_no_place_is_consumed() {
    let (_server, stream) = version_1();
    let memory = stream.memory(16_384);
    stream.done(libc::SYS_munmap, &[memory + 4096, 4096]);
    let getpid = vectors::bytes("request-getpid");
    for room in [0, 1, 100, 4096] {
        for len in [101, 3000, 4097, 20_000] {
            let address = memory + 4096 - room;
            let copy = request(COPY_IN, &[address, len]);
            stream.send(&[copy, vec![9; len as usize], getpid.clone()].concat());
            let fits = len <= room;
            assert_eq!(stream.result(), if fits { len as i64 } else { -14 }, "{room} {len}");
            assert!(stream.result() > 0);
            stream.is_in_step();
        }
    }
    // What fits does so, whatever of it was read ahead.
    assert_eq!(stream.copy_in(memory, &[1; 4096]), 4096);
    assert_eq!(stream.copy_out(memory, 4096).0, [1; 4096]);
}

#[test]
fn results_do_not_wait_for_a_payload_that_has_not_come() {
    let (server, stream) = version_1();
    let memory = stream.memory(4096);
    let copy = request(COPY_IN, &[memory, 4]);
    stream.send(&[vectors::bytes("request-getpid"), copy, vec![1, 2]].concat());
    // Only who has this result sends the rest.
    assert_eq!(stream.result(), i64::from(server.pid()));
    stream.send(&[3, 4]);
    assert_eq!(stream.result(), 4);
    assert_eq!(stream.copy_out(memory, 4).0, [1, 2, 3, 4]);
}

#[test]
fn memory_that_ends_or_cannot_be_written_is_none() {
    let (_server, stream) = Server::on_a_socket();
    let memory = stream.memory(3 * 4096);
    stream.done(libc::SYS_munmap, &[memory + 4096, 4096]);
    assert_eq!(stream.ask(OP, &[1, memory, 16_384]) & 0xffff, 0, "its end is missing");
    let memory = stream.memory(16_384);
    stream.done(libc::SYS_mprotect, &[memory + 4096, 4096, libc::PROT_READ as u64]);
    assert_eq!(stream.ask(OP, &[1, memory, 16_384]) & 0xffff, 0, "its end is read-only");
    stream.is_in_step();
}

#[test]
fn a_hello_among_others_changes_nothing() {
    let (server, stream) = version_1();
    let memory = stream.memory(16_384);
    let getpid = vectors::bytes("request-getpid");
    let hello = request(OP, &[1, memory, 16_384]);
    let refers = request(libc::SYS_pidfd_open as u64 | REF0, &[2]);
    stream.send(&[getpid, hello, refers].concat());
    assert_eq!(stream.result(), i64::from(server.pid()));
    assert_eq!(stream.result() & 0xffff, 1);
    assert!(stream.result() > 0, "the results before it are still known");
    assert_eq!(stream.copy_out(memory, 16_384).0, [0; 16_384], "and the memory is not taken");
}

#[test]
fn requests_behind_serve_go_on_with_the_new_output() {
    let (server, stream) = version_1();
    let memory = stream.memory(4096);
    stream.done(libc::SYS_pipe2, &[memory, 0]);
    let pipe = stream.copy_out(memory, 8).0;
    let [read, write] = [0, 4].map(|at| u32::from_le_bytes(*pipe[at..].first_chunk().unwrap()));
    let none = u64::from(u32::MAX);
    let getpid = vectors::bytes("request-getpid");
    let serve = request(SERVE, &[none | u64::from(write) << 32, none | none << 32]);
    let back = request(SERVE, &[none | 1 << 32, none | none << 32]);
    stream.send(&[getpid.clone(), serve, getpid.clone(), back, getpid].concat());
    assert_eq!(stream.result(), i64::from(server.pid()), "before it");
    assert_eq!(stream.result(), 0, "its own: there are no spare descriptors");
    assert_eq!(stream.result(), i64::from(server.pid()), "behind the way back");
    // What was in between went into the pipe: a result, and that of the way back.
    assert_eq!(stream.call(libc::SYS_read, &[u64::from(read), memory, 64]), 16);
    let bytes = stream.copy_out(memory, 8).0;
    assert_eq!(bytes, i64::from(server.pid()).to_le_bytes());
}

/// A connection that is in version 1, of a process that is persistent.
fn attached_in_version_1(process: &Persistent) -> Attached {
    let attached = attach(&process.path, &TOKEN);
    attached.stream.speaks_version_1();
    attached
}

#[test]
fn what_was_read_ahead_of_an_ended_connection_is_not_executed() {
    let process = Persistent::new();
    let first = attached_in_version_1(&process);
    let (getpid, exit) =
        (vectors::bytes("request-getpid"), request(libc::SYS_exit_group as u64, &[1]));
    // In one piece, which is read at once: the unknown operation ends it, and half a request is
    // left as well.
    let bytes = [getpid, request(UNKNOWN, &[]), exit.clone(), exit[..50].to_vec()].concat();
    assert_eq!(nix::unistd::write(&first.stream.requests, &bytes), Ok(bytes.len()));
    first.stream.ends();
    let mut second = vectors::bytes("handshake-version-1");
    second[12] = 1;
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&second, &ends.raw()));
    let answer = client.answer();
    assert_eq!((answer.status(), answer.0[16]), (0, 1), "the memory is still there");
    assert_eq!(ends.stream.ask(libc::SYS_getpid as u64 | LINK, &[]), CANCELED);
    ends.stream.is_in_step();
}

#[test]
fn a_connection_after_one_of_version_1_is_in_the_version_it_asked_for() {
    let process = Persistent::new();
    drop(attached_in_version_1(&process));
    // A later one begins in version 0, and may give other memory.
    let next = attach(&process.path, &TOKEN);
    assert_eq!(next.stream.ask(libc::SYS_getpid as u64 | LINK, &[]), -i64::from(libc::EINVAL));
    next.stream.speaks_version_1();
    next.stream.is_in_step();
}
