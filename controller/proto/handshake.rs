//! The controller's half of a handshake, without I/O: what to send, and what an answer means.

use std::mem::offset_of;

use nix::errno::Errno;

use crate::abi::handshake::{
    ANSWER_SIZE, Answer, HANDSHAKE_MAGIC, HANDSHAKE_VERSION, HELLO_SIZE, Hello, Token,
};
use crate::abi::wire::{STREAM_VERSION, Spares};
use crate::proto::log::Log;

/// The bytes of a version-1 handshake of this process, which travel with the descriptors. It asks for
/// the log. With `take_over` it is meant also where another controller holds the process.
#[must_use]
pub fn hello(token: Token, take_over: bool) -> [u8; HELLO_SIZE] {
    Hello { flags: Hello::LOG | if take_over { Hello::TAKE_OVER } else { 0 }, ..own(token) }
        .to_bytes()
}

/// The same, which asks as well for the names from that byte of the registry on.
pub(crate) fn asking_for_names(token: Token, from: u64) -> [u8; HELLO_SIZE] {
    Hello { flags: Hello::LOG | Hello::NAMES, from, ..own(token) }.to_bytes()
}

fn own(token: Token) -> Hello {
    Hello {
        magic: HANDSHAKE_MAGIC,
        version: HANDSHAKE_VERSION,
        stream_version: STREAM_VERSION,
        token,
        // Pids are below 2^22.
        pid: std::process::id() as i32,
        flags: 0,
        from: 0,
    }
}

/// What an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hold {
    /// The process is ours.
    Ours {
        /// The numbers that the stream and the data socket got.
        fds: [i32; 2],
        /// The spare descriptors, which are the server's own.
        own: Vec<i32>,
        /// The listening socket, and the descriptor of its file; -1 for none.
        listener: [i32; 2],
        /// How many connections the process has had.
        generation: u64,
        /// Its pid, in its own pid namespace.
        pid: i32,
        /// The version in which the stream begins.
        version: u32,
    },
    /// Another controller holds it.
    Theirs {
        /// Its pid, if it told it.
        pid: Option<i32>,
        /// Since when, in seconds since 1970.
        since: i64,
    },
    /// Nobody holds it, and no descriptors came to hold it with.
    Nobody {
        /// How many connections the process has had.
        generation: u64,
    },
    /// The server closed the handshake without an answer.
    Closed,
    /// The server refused, for this reason.
    Refused(String),
}

/// The answer of a server that speaks another version of the handshake, of which only the start means
/// the same in all versions; none if it is another one.
#[must_use]
pub fn other_version(bytes: &[u8]) -> Option<[u8; ANSWER_SIZE]> {
    const COMMON: usize = offset_of!(Answer, stream_version);
    let mut whole = [0; ANSWER_SIZE];
    whole[..COMMON].copy_from_slice(bytes.get(..COMMON)?);
    let Answer { magic, status, .. } = Answer::from_bytes(&whole);
    let refused = magic == HANDSHAKE_MAGIC && status == -(Errno::EPROTONOSUPPORT as i32);
    refused.then_some(whole)
}

/// Reads an answer. Nothing in it is trusted to be in range.
#[must_use]
pub fn answer(bytes: &[u8; ANSWER_SIZE]) -> Hold {
    let answer = Answer::from_bytes(bytes);
    if answer.magic != HANDSHAKE_MAGIC {
        return Hold::Refused("what answered is not a farcall server".into());
    }
    match answer.status {
        0 => {}
        status if status == -(Errno::EBUSY as i32) => {
            return Hold::Theirs {
                pid: (answer.holder_pid > 0).then_some(answer.holder_pid),
                since: answer.holder_since,
            };
        }
        status if status == -(Errno::EBADF as i32) => {
            return Hold::Nobody { generation: answer.generation };
        }
        status if status == -(Errno::EPROTONOSUPPORT as i32) => {
            return Hold::Refused(format!(
                "the server speaks version {} of the handshake, this farcall version \
                 {HANDSHAKE_VERSION}: use the farcall that started it",
                answer.version
            ));
        }
        // This side makes no mistakes that the server's own version would have to refuse.
        status if status == -(Errno::EINVAL as i32) => {
            return Hold::Refused(format!(
                "the server speaks version {} of the handshake and does not understand all that this \
                 farcall, with version {HANDSHAKE_VERSION}, asks for: use the farcall that started it",
                answer.version
            ));
        }
        status => {
            let errno = Errno::from_raw(status.saturating_neg());
            return Hold::Refused(format!("the server refused the handshake: {}", errno.desc()));
        }
    }
    if answer.stream_version > STREAM_VERSION {
        return Hold::Refused(format!(
            "the server goes on in version {} of the stream, this farcall speaks up to version \
             {STREAM_VERSION}: use the farcall that started it",
            answer.stream_version
        ));
    }
    let [stream, data, none] = answer.fds;
    if stream < 0 || data < 0 || stream == data || none != -1 {
        return Hold::Refused("the server's answer names no usable descriptors".into());
    }
    // Numbers are one more than they are, so that 0 is none.
    let file = answer.socket_file.wrapping_sub(1).cast_signed();
    let listener = [answer.listen.max(-1), file.max(-1)];
    let own = Spares(answer.spares).fds().filter(|fd| *fd >= 0).collect();
    Hold::Ours {
        fds: [stream, data],
        own,
        listener,
        generation: answer.generation,
        pid: answer.pid,
        version: answer.stream_version,
    }
}

/// What a server has answered.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) hold: Hold,
    /// What it has executed last.
    pub(crate) log: Log,
}

impl Answered {
    /// The server closed the handshake without an answer.
    pub(crate) fn closed() -> Self {
        Self { hold: Hold::Closed, log: Log::default() }
    }
}

/// An answer that arrives in pieces, and the log behind it.
#[derive(Debug, Default)]
pub(crate) struct Arriving(Vec<u8>);

impl Arriving {
    /// Where the next bytes belong.
    pub(crate) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }

    /// The answer, once all of it is here.
    pub(crate) fn whole(&self) -> Option<Answered> {
        let (bytes, behind) = self.0.split_first_chunk()?;
        Some(Answered { hold: answer(bytes), log: Log::from_bytes(behind)? })
    }

    /// What it says if no more comes, because the server has closed the connection, or, if `is_broken`,
    /// because that was reset. Not every server sends a log that refuses; servers of other versions say no
    /// more than which one they speak; and one that has not read what came behind the handshake resets the
    /// connection behind its answer.
    pub(crate) fn end(self, is_broken: bool) -> Answered {
        let answered = self.0.first_chunk().copied().filter(|_| !is_broken);
        let Some(bytes) = answered.or_else(|| other_version(&self.0)) else {
            return Answered::closed();
        };
        let hold = match answer(&bytes) {
            // Without it nobody knows how its calls are counted.
            Hold::Ours { .. } => Hold::Refused("the server's answer ends before its log".into()),
            hold => hold,
        };
        Answered { hold, log: Log::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::log::LOG_HEAD_SIZE;
    use proptest::prelude::*;

    /// The answer of a server that gives the process to who asks, with a log in which nothing is.
    fn given() -> Vec<u8> {
        let answer = Answer { magic: HANDSHAKE_MAGIC, fds: [5, 6, -1], ..Answer::default() };
        [answer.to_bytes().as_slice(), &[0; LOG_HEAD_SIZE]].concat()
    }

    #[test]
    fn an_answer_that_is_cut_at_any_byte_gives_the_process_to_nobody() {
        let whole = given();
        for len in 0..whole.len() {
            for is_broken in [false, true] {
                let arriving = Arriving(whole[..len].to_vec());
                assert!(arriving.whole().is_none(), "{len}");
                let hold = arriving.end(is_broken).hold;
                let expected = match len {
                    ANSWER_SIZE.. if !is_broken => matches!(hold, Hold::Refused(_)),
                    _ => hold == Hold::Closed,
                };
                assert!(expected, "{len}, {is_broken}: {hold:?}");
            }
        }
        let answered = Arriving(whole).whole().unwrap();
        assert!(matches!(answered.hold, Hold::Ours { fds: [5, 6], .. }));
    }

    proptest! {
        #[test]
        fn an_answer_of_any_bytes_is_read(bytes in prop::collection::vec(any::<u8>(), ANSWER_SIZE), real in any::<bool>()) {
            let mut bytes: [u8; ANSWER_SIZE] = bytes.try_into().unwrap();
            if real {
                bytes[..8].copy_from_slice(&HANDSHAKE_MAGIC.to_le_bytes());
                bytes[8..12].fill(0);
            }
            if let Hold::Ours { fds: [stream, data], own, .. } = answer(&bytes) {
                prop_assert!(real && stream >= 0 && data >= 0 && stream != data);
                prop_assert!(own.iter().all(|fd| *fd >= 0) && own.len() <= 3);
            }
        }
    }

    fn reason(answered: Answer) -> String {
        match answer(&answered.to_bytes()) {
            Hold::Refused(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn where_versions_differ_both_are_named() {
        let spoken = Answer { magic: HANDSHAKE_MAGIC, ..Answer::default() };
        let status = -(Errno::EPROTONOSUPPORT as i32);
        let handshake = reason(Answer { status, version: 7, ..spoken });
        assert!(handshake.contains("version 7") && handshake.contains("version 1"), "{handshake}");
        let stream = reason(Answer { stream_version: 9, ..spoken });
        assert!(stream.contains("version 9") && stream.contains("version 1"), "{stream}");
    }

    #[test]
    fn of_another_versions_answer_only_the_start_is_read() {
        let status = -(Errno::EPROTONOSUPPORT as i32);
        let refused = Answer { magic: HANDSHAKE_MAGIC, status, version: 7, ..Answer::default() };
        let mut bytes = refused.to_bytes().to_vec();
        bytes[16..].fill(0xff);
        for len in [16, 17, 40, 72, 100] {
            bytes.resize(len, 0xff);
            assert_eq!(other_version(&bytes), Some(refused.to_bytes()));
        }
        assert_eq!(other_version(&bytes[..15]), None);
        bytes[8..12].fill(0);
        assert_eq!(other_version(&bytes), None, "it says that all is well, and not what");
    }

    #[test]
    fn a_holder_is_named() {
        let bytes = Answer {
            magic: HANDSHAKE_MAGIC,
            status: -(Errno::EBUSY as i32),
            holder_pid: 7,
            holder_since: 9,
            ..Answer::default()
        };
        assert_eq!(answer(&bytes.to_bytes()), Hold::Theirs { pid: Some(7), since: 9 });
    }
}
