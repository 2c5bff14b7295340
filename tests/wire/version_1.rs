//! Version 1 of the stream: what is read ahead, sent together, linked and referred to.

use nix::libc;

use crate::server::Server;
use crate::stream::{COPY_IN, OP, Stream, request};
use crate::vectors;

const CANCELED: i64 = -(libc::ECANCELED as i64);
const LINK: u64 = 1 << 33;
const FLUSH: u64 = 1 << 34;

fn version_1() -> (Server, Stream) {
    let (server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    (server, stream)
}

#[test]
fn requests_in_pieces_of_any_size_are_answered_in_order() {
    let (server, stream) = version_1();
    let bytes: Vec<u8> = (0..200).flat_map(|_| vectors::bytes("request-getpid")).collect();
    for piece in [1, 7, 55, 56, 57, 4095, 4096, 4097, 11_200] {
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
    let address = stream.memory(8192);
    for (version, address) in [(1, 0), (1, 8), (1, address + 1), (0, address)] {
        assert_eq!(stream.ask(OP, &[version, address]) & 0xffff, 0, "{version} {address:#x}");
    }
    assert_eq!(stream.ask(OP, &[7, address]) & 0xffff, 1, "1 is the highest that it speaks");
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
