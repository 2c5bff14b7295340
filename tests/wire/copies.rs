//! COPY_IN and COPY_OUT: whatever the addresses are, the stream stays in step and says the truth.

use nix::libc;

use crate::server::Server;
use crate::stream::{COPY_IN, COPY_OUT, IMAGE, Stream, request};
use crate::vectors;

const PAGE: u64 = 4096;
const EFAULT: i64 = -(libc::EFAULT as i64);

/// On pipes and on a socket, in version 0 and in version 1.
fn everywhere() -> [(Server, Stream); 4] {
    let version_1 = |(server, stream): (Server, Stream)| {
        stream.speaks_version_1();
        (server, stream)
    };
    [
        Server::on_pipes(),
        Server::on_a_socket(),
        version_1(Server::on_pipes()),
        version_1(Server::on_a_socket()),
    ]
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 253) as u8 + 1).collect()
}

/// `pages` of memory with nothing mapped behind them.
fn memory_that_ends(stream: &Stream, pages: u64) -> u64 {
    let memory = stream.memory((pages + 1) * PAGE);
    stream.done(libc::SYS_munmap, &[memory + pages * PAGE, PAGE]);
    memory
}

/// Addresses at which nothing can be read or written.
const NOWHERE: [u64; 5] = [0, 8, 0x1234_5678_9abc_def0, 0xffff_8880_0000_0000, u64::MAX - 3];

#[test]
fn what_is_copied_in_comes_out() {
    for (_server, stream) in everywhere() {
        let memory = stream.memory(1 << 21);
        for len in [1, 511, 512, 513, 4096, 4097, (1 << 20) + 3] {
            let bytes = pattern(len);
            assert_eq!(stream.copy_in(memory + 7, &bytes), len as i64);
            assert_eq!(stream.copy_out(memory + 7, len), (bytes, len as i64));
        }
        stream.is_in_step();
    }
}

#[test]
fn the_payload_of_a_copy_in_may_come_in_pieces() {
    for (_server, stream) in everywhere() {
        let memory = stream.memory(PAGE);
        stream.send(&request(COPY_IN, &[memory, 10]));
        for byte in pattern(10) {
            stream.send(&[byte]);
        }
        assert_eq!(stream.result(), 10);
        assert_eq!(stream.copy_out(memory, 10), (pattern(10), 10));
    }
}

#[test]
fn a_copy_in_to_nowhere_is_efault_and_consumes_its_payload() {
    for (_server, stream) in everywhere() {
        for address in NOWHERE {
            for len in [1, 512, 513, 100_000] {
                assert_eq!(stream.copy_in(address, &pattern(len)), EFAULT, "{address:#x}, {len}");
            }
            stream.is_in_step();
        }
    }
}

#[test]
fn a_copy_in_to_read_only_memory_is_efault() {
    for (_server, stream) in everywhere() {
        let image = stream.ask(IMAGE, &[]) as u64;
        assert_eq!(stream.copy_in(image, &pattern(600)), EFAULT);
        let (bytes, real) = stream.copy_out(image, 4);
        assert_eq!((&bytes[..], real), (&b"\x7fELF"[..], 4));
        stream.is_in_step();
    }
}

#[test]
fn a_copy_in_across_the_end_of_memory_is_efault_and_stays_in_step() {
    for (_server, stream) in everywhere() {
        for (pages, before, len) in [(1, 100, 200), (1, 4096, 4097), (3, 3 * 4096 - 10, 200_000)] {
            let end = memory_that_ends(&stream, pages) + pages * PAGE;
            assert_eq!(stream.copy_in(end - before, &pattern(len)), EFAULT);
            stream.is_in_step();
        }
    }
}

#[test]
fn a_copy_out_says_how_many_bytes_are_real_and_the_rest_is_zeros() {
    for (_server, stream) in everywhere() {
        for (pages, before, len) in
            [(1, 96, 200), (1, 96, 97), (1, 4096, 4097), (3, 3 * 4096 - 10, 40_000)]
        {
            let end = memory_that_ends(&stream, pages) + pages * PAGE;
            let real = pattern(before as usize);
            assert_eq!(stream.copy_in(end - before, &real), before as i64);
            let (bytes, count) = stream.copy_out(end - before, len);
            assert_eq!(count, before as i64, "{len} bytes across the end of memory");
            assert!(bytes[..before as usize] == real, "the bytes that are there");
            assert!(bytes[before as usize..].iter().all(|byte| *byte == 0), "zeros behind them");
            stream.is_in_step();
        }
    }
}

#[test]
fn a_copy_out_does_not_skip_a_hole() {
    let (_server, stream) = Server::on_pipes();
    let memory = stream.memory(3 * PAGE);
    stream.done(libc::SYS_munmap, &[memory + PAGE, PAGE]);
    assert_eq!(stream.copy_in(memory, &pattern(4096)), 4096);
    assert_eq!(stream.copy_in(memory + 2 * PAGE, &pattern(4096)), 4096);
    let (bytes, real) = stream.copy_out(memory, 3 * 4096);
    assert_eq!(real, 4096);
    assert!(bytes[..4096] == pattern(4096));
    assert!(bytes[4096..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_copy_out_from_nowhere_is_all_zeros_and_none_real() {
    for (_server, stream) in everywhere() {
        for address in NOWHERE {
            for len in [1, 513, 100_000] {
                assert_eq!(stream.copy_out(address, len), (vec![0; len], 0), "{address:#x}, {len}");
            }
            stream.is_in_step();
        }
    }
}

#[test]
fn a_copy_of_nothing_looks_at_no_address() {
    for (_server, stream) in everywhere() {
        for address in NOWHERE {
            assert_eq!(stream.copy_in(address, &[]), 0);
            assert_eq!(stream.copy_out(address, 0), (vec![], 0));
        }
        stream.is_in_step();
    }
}

#[test]
fn a_copy_out_of_an_impossible_length_is_einval_and_nothing_follows() {
    let (_server, stream) = Server::on_pipes();
    let memory = stream.memory(PAGE);
    for len in [1 << 63, (1 << 63) + 1, u64::MAX] {
        assert_eq!(stream.ask(COPY_OUT, &[memory, len]), -i64::from(libc::EINVAL));
    }
    stream.is_in_step();
}

#[test]
fn a_copy_in_of_an_impossible_length_ends_the_connection() {
    for len in [1 << 63, u64::MAX] {
        let (mut server, stream) = Server::on_pipes();
        stream.send(&[request(COPY_IN, &[0, len]), vectors::bytes("request-getpid")].concat());
        stream.ends();
        server.exits_with(0);
    }
}

#[test]
fn a_copy_out_of_the_largest_length_begins_with_what_is_there() {
    let (mut server, stream) = Server::on_pipes();
    let memory = memory_that_ends(&stream, 2);
    assert_eq!(stream.copy_in(memory, &pattern(8192)), 8192);
    let len = i64::MAX;
    assert_eq!(stream.ask(COPY_OUT, &[memory, len as u64]), len);
    assert!(stream.receive(8192) == pattern(8192));
    assert_eq!(stream.receive(1000), vec![0; 1000]);
    drop(stream);
    server.exits_with(0);
}

#[test]
fn the_end_of_input_inside_the_payload_of_a_copy_in_is_exit_0() {
    for address in [0, u64::MAX] {
        let (mut server, stream) = Server::on_pipes();
        stream.send(&request(COPY_IN, &[address, 5000]));
        stream.send(&pattern(4000));
        drop(stream);
        server.exits_with(0);
    }
}
