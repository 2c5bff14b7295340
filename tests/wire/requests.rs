//! Requests and results: what is read when, and what ends a stream.

use std::process::Stdio;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{self, Pid, pipe2};

use crate::server::{Home, Server, close_everywhere};
use crate::stream::{COPY_OUT, OP, Stream, request};
use crate::vectors;

#[test]
fn a_call_over_pipes_has_the_kernels_result() {
    let (server, stream) = Server::on_pipes();
    stream.send(&vectors::bytes("request-getpid"));
    assert_eq!(stream.result(), i64::from(server.pid()));
    assert_eq!(stream.call(libc::SYS_close, &[99]), -i64::from(libc::EBADF));
    assert_eq!(stream.call(0xffff_ffff, &[]), -i64::from(libc::ENOSYS));
}

#[test]
fn a_request_in_pieces_is_answered_once() {
    for (server, stream) in [Server::on_pipes(), Server::on_a_socket()] {
        for _ in 0..3 {
            for byte in vectors::bytes("request-getpid") {
                stream.send(&[byte]);
            }
            assert_eq!(stream.result(), i64::from(server.pid()));
        }
        stream.is_in_step();
    }
}

#[test]
fn requests_in_one_write_are_answered_in_order() {
    for (_server, stream) in [Server::on_pipes(), Server::on_a_socket()] {
        let umasks = |masks: &[u64]| -> Vec<u8> {
            masks.iter().flat_map(|mask| request(libc::SYS_umask as u64, &[*mask])).collect()
        };
        stream.send(&umasks(&[0o1, 0o2, 0o3, 0o4, 0o5, 0o6, 0o7]));
        stream.result();
        for expected in 1..7 {
            assert_eq!(stream.result(), expected);
        }
        stream.is_in_step();
    }
}

/// Whatever a call reads from the server's own input follows the request, in the same write, and
/// the next request follows that.
fn a_call_takes_its_payload(stream: &Stream, number: libc::c_long) {
    let memory = stream.memory(4096);
    let payload: Vec<u8> = (0..200).collect();
    let call = request(number as u64, &[0, memory, 200]);
    let next = request(libc::SYS_umask as u64, &[0o22]);
    stream.send(&[&call[..], &payload, &next, &next].concat());
    assert_eq!(stream.result(), 200);
    stream.result();
    assert_eq!(stream.result(), 0o22);
    assert_eq!(stream.copy_out(memory, 200), (payload, 200));
    stream.is_in_step();
}

#[test]
fn a_read_of_the_input_gets_the_bytes_behind_its_request() {
    for (_server, stream) in [Server::on_pipes(), Server::on_a_socket()] {
        a_call_takes_its_payload(&stream, libc::SYS_read);
    }
}

#[test]
fn a_recvfrom_of_the_input_gets_the_bytes_behind_its_request() {
    let (_server, stream) = Server::on_a_socket();
    a_call_takes_its_payload(&stream, libc::SYS_recvfrom);
}

/// Whatever a call writes to the server's own output comes before its result.
fn a_call_sends_its_payload(stream: &Stream, number: libc::c_long) {
    let memory = stream.memory(4096);
    let payload: Vec<u8> = (0..100).rev().collect();
    assert_eq!(stream.copy_in(memory, &payload), 100);
    stream.send(&request(number as u64, &[1, memory, 100]));
    assert_eq!(stream.receive(100), payload);
    assert_eq!(stream.result(), 100);
    stream.is_in_step();
}

#[test]
fn what_a_write_to_the_output_sends_comes_before_its_result() {
    for (_server, stream) in [Server::on_pipes(), Server::on_a_socket()] {
        a_call_sends_its_payload(&stream, libc::SYS_write);
    }
}

#[test]
fn what_a_sendto_the_output_sends_comes_before_its_result() {
    let (_server, stream) = Server::on_a_socket();
    a_call_sends_its_payload(&stream, libc::SYS_sendto);
}

#[test]
fn the_end_of_input_is_exit_0() {
    for (mut server, stream) in [Server::on_pipes(), Server::on_a_socket()] {
        stream.is_in_step();
        drop(stream);
        server.exits_with(0);
    }
}

#[test]
fn the_end_of_input_inside_a_request_executes_nothing_and_is_exit_0() {
    for len in [1, 8, 55] {
        let (mut server, stream) = Server::on_pipes();
        // exit_group(9), all but its last bytes.
        stream.send(&request(libc::SYS_exit_group as u64, &[9])[..len]);
        drop(stream);
        server.exits_with(0);
    }
}

#[test]
fn a_closed_output_is_exit_0_and_no_death_by_sigpipe() {
    let home = Home::new();
    let (their_input, requests) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (results, their_output) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let mut command = home.command(None);
    command.stdin(Stdio::from(their_input)).stdout(Stdio::from(their_output));
    let mut server = Server::start(home, &mut command);
    close_everywhere(results);
    assert_eq!(unistd::write(&requests, &vectors::bytes("request-getpid")), Ok(56));
    server.exits_with(0);
}

#[test]
fn a_call_with_bits_that_must_be_zero_is_not_executed() {
    let (server, stream) = Server::on_pipes();
    for bit in 33..64 {
        let word = libc::SYS_exit_group as u64 | 1 << bit;
        assert_eq!(stream.ask(word, &[7]), -i64::from(libc::EINVAL), "bit {bit}");
    }
    let word = libc::SYS_exit_group as u64 | !(OP | 0xffff_ffff);
    assert_eq!(stream.ask(word, &[7]), -i64::from(libc::EINVAL));
    assert_eq!(stream.getpid(), i64::from(server.pid()));
}

#[test]
fn an_unknown_operation_ends_the_connection() {
    for number in [12, 13, 0x0001_0000, 0xffff_ffff] {
        let (mut server, stream) = Server::on_pipes();
        let word = OP | number;
        stream.send(&[request(word, &[]), vectors::bytes("request-getpid")].concat());
        stream.ends();
        server.exits_with(0);
    }
}

#[test]
fn an_operation_with_bits_that_must_be_zero_ends_the_connection() {
    for bit in [33, 34, 35, 40, 41, 62, 63] {
        let (mut server, stream) = Server::on_pipes();
        let word = COPY_OUT | 1 << bit;
        stream.send(&[request(word, &[0, 0]), vectors::bytes("request-getpid")].concat());
        stream.ends();
        server.exits_with(0);
    }
}

#[test]
fn a_signal_handler_between_the_pieces_of_a_request_does_not_disturb_it() {
    // The image's own handler for SIGPIPE, without SA_RESTART: each signal is an EINTR wherever
    // the server waits.
    let (server, stream) = Server::on_pipes();
    stream.is_in_step();
    for _ in 0..200 {
        for piece in vectors::bytes("request-getpid").chunks(20) {
            kill(Pid::from_raw(server.pid()), Signal::SIGPIPE).unwrap();
            stream.send(piece);
        }
        assert_eq!(stream.result(), i64::from(server.pid()));
    }
    stream.is_in_step();
}

#[test]
fn a_server_that_is_stopped_and_continued_goes_on() {
    let (server, stream) = Server::on_pipes();
    for _ in 0..100 {
        let (head, tail) = (&vectors::bytes("request-getpid")[..30], &[0; 26]);
        stream.send(head);
        server.stop();
        stream.send(tail);
        server.go_on();
        assert_eq!(stream.result(), i64::from(server.pid()));
    }
    stream.is_in_step();
}

#[test]
fn input_and_output_may_be_non_blocking() {
    let home = Home::new();
    let mut command = home.command(None);
    let (their_input, requests) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (results, their_output) = pipe2(OFlag::O_CLOEXEC).unwrap();
    for fd in [&their_input, &their_output] {
        fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    }
    command.stdin(Stdio::from(their_input)).stdout(Stdio::from(their_output));
    let mut server = Server::start(home, &mut command);
    drop(command);
    let stream = Stream { results, requests };
    stream.is_in_step();
    // More than a pipe holds, in both directions.
    let bytes: Vec<u8> = (0..400_000u32).map(|i| (i % 251) as u8).collect();
    let memory = stream.memory(bytes.len() as u64);
    assert_eq!(stream.copy_in(memory, &bytes), 400_000);
    assert_eq!(stream.copy_out(memory, bytes.len()), (bytes, 400_000));
    for byte in vectors::bytes("request-getpid") {
        stream.send(&[byte]);
    }
    assert_eq!(stream.result(), i64::from(server.pid()));
    drop(stream);
    server.exits_with(0);
}
