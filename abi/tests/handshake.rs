//! The bytes of a handshake: what is written is what is read, in the documented places.

use farcall_abi::handshake::{
    ANSWER_SIZE, Answer, HANDSHAKE_MAGIC, HELLO_SIZE, Hello, MAX_FDS, MIN_FDS, Token,
};
use proptest::prelude::*;

prop_compose! {
    fn hello()(
        magic: u64,
        version: u32,
        stream_version: u32,
        token: [u64; 2],
        pid: i32,
        flags: u32,
        from: u64,
    ) -> Hello {
        Hello { magic, version, stream_version, token: Token(token), pid, flags, from }
    }
}

prop_compose! {
    fn answer()(
        (magic, status, version, stream_version) in any::<(u64, i32, u32, u32)>(),
        (pid, generation, fds, listen) in any::<(i32, u64, [i32; MAX_FDS], i32)>(),
        (spares, holder_pid, socket_file, holder_since) in any::<(i64, i32, u32, i64)>(),
    ) -> Answer {
        Answer {
            magic, status, version, stream_version, pid, generation, fds, listen, spares,
            holder_pid, socket_file, holder_since,
        }
    }
}

/// The field of `N` bytes at an offset.
fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes[offset..offset + N].try_into().unwrap()
}

proptest! {
    #[test]
    fn a_hello_is_read_as_it_was_written(hello in hello()) {
        prop_assert_eq!(Hello::from_bytes(&hello.to_bytes()), hello);
    }

    #[test]
    fn any_48_bytes_are_a_hello_and_stay_as_they_are(bytes in prop::array::uniform(any::<u8>())) {
        let bytes: [u8; HELLO_SIZE] = bytes;
        prop_assert_eq!(Hello::from_bytes(&bytes).to_bytes(), bytes);
    }

    #[test]
    fn a_hello_has_its_fields_in_their_places(hello in hello()) {
        let bytes = hello.to_bytes();
        prop_assert_eq!(u64::from_le_bytes(at(&bytes, 0)), hello.magic);
        prop_assert_eq!(u32::from_le_bytes(at(&bytes, 8)), hello.version);
        prop_assert_eq!(u32::from_le_bytes(at(&bytes, 12)), hello.stream_version);
        prop_assert_eq!(u64::from_le_bytes(at(&bytes, 16)), hello.token.0[0]);
        prop_assert_eq!(u64::from_le_bytes(at(&bytes, 24)), hello.token.0[1]);
        prop_assert_eq!(i32::from_le_bytes(at(&bytes, 32)), hello.pid);
        prop_assert_eq!(u32::from_le_bytes(at(&bytes, 36)), hello.flags);
        prop_assert_eq!(u64::from_le_bytes(at(&bytes, 40)), hello.from);
    }

    #[test]
    fn an_answer_is_read_as_it_was_written(answer in answer()) {
        prop_assert_eq!(Answer::from_bytes(&answer.to_bytes()), answer);
    }

    #[test]
    fn any_72_bytes_are_an_answer_and_stay_as_they_are(bytes in prop::array::uniform(any::<u8>())) {
        let bytes: [u8; ANSWER_SIZE] = bytes;
        prop_assert_eq!(Answer::from_bytes(&bytes).to_bytes(), bytes);
    }

    #[test]
    fn an_answer_has_its_fields_in_their_places(answer in answer()) {
        let bytes = answer.to_bytes();
        prop_assert_eq!(u64::from_le_bytes(at(&bytes, 0)), answer.magic);
        prop_assert_eq!(i32::from_le_bytes(at(&bytes, 8)), answer.status);
        prop_assert_eq!(u32::from_le_bytes(at(&bytes, 12)), answer.version);
        prop_assert_eq!(u32::from_le_bytes(at(&bytes, 16)), answer.stream_version);
        prop_assert_eq!(i32::from_le_bytes(at(&bytes, 20)), answer.pid);
        prop_assert_eq!(u64::from_le_bytes(at(&bytes, 24)), answer.generation);
        for (place, fd) in answer.fds.into_iter().enumerate() {
            prop_assert_eq!(i32::from_le_bytes(at(&bytes, 32 + 4 * place)), fd);
        }
        prop_assert_eq!(i32::from_le_bytes(at(&bytes, 44)), answer.listen);
        prop_assert_eq!(i64::from_le_bytes(at(&bytes, 48)), answer.spares);
        prop_assert_eq!(i32::from_le_bytes(at(&bytes, 56)), answer.holder_pid);
        prop_assert_eq!(u32::from_le_bytes(at(&bytes, 60)), answer.socket_file);
        prop_assert_eq!(i64::from_le_bytes(at(&bytes, 64)), answer.holder_since);
    }
}

#[test]
fn the_first_word_of_a_handshake_is_no_count_of_descriptors() {
    let bytes = Hello { magic: HANDSHAKE_MAGIC, ..Hello::default() }.to_bytes();
    assert_eq!(bytes[..8], *b"farcall1");
    let count = i32::from_le_bytes(at(&bytes, 0));
    assert!(!(MIN_FDS as i32..=MAX_FDS as i32).contains(&count));
    assert!(count > MAX_FDS as i32, "{count}");
}
