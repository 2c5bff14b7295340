//! A client of a listening socket: handshakes of both versions, and what is no handshake.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::IoSlice;

use crate::server::sockets;
use crate::stream::{Stream, read_up_to};
use crate::vectors;

pub const TOKEN: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
pub const OTHER: [u8; 16] = [0xee; 16];

/// A connection to a listening socket.
pub struct Client(pub UnixStream);

impl Client {
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        Self(UnixStream::connect(path).unwrap())
    }

    /// Sends bytes, with descriptors if there are any. False: the server has hung up.
    pub fn send(&self, bytes: &[u8], fds: &[RawFd]) -> bool {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let iov = [IoSlice::new(bytes)];
        match sendmsg::<()>(self.0.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(n) => {
                assert_eq!(n, bytes.len());
                true
            }
            Err(Errno::EPIPE | Errno::ECONNRESET) => false,
            Err(error) => panic!("sendmsg: {error}"),
        }
    }

    /// The server hangs up without an answer.
    #[track_caller]
    pub fn is_refused(&self) {
        let bytes = read_up_to(&self.0, 1);
        assert!(bytes.is_empty(), "{bytes:02x?} was answered");
    }

    /// The answer of version 1, and nothing behind it.
    #[track_caller]
    pub fn answer(&self) -> Answer {
        let bytes = read_up_to(&self.0, 73);
        assert_eq!(bytes.len(), 72, "bytes of the answer");
        Answer(bytes.try_into().unwrap())
    }
}

/// An answer of version 1. Its fields lie where `docs/protocol.md` says.
pub struct Answer(pub [u8; 72]);

impl Answer {
    fn word(&self, at: usize) -> i32 {
        i32::from_le_bytes(*self.0[at..].first_chunk().unwrap())
    }

    fn long(&self, at: usize) -> i64 {
        i64::from_le_bytes(*self.0[at..].first_chunk().unwrap())
    }

    pub fn status(&self) -> i32 {
        self.word(8)
    }

    pub fn pid(&self) -> i32 {
        self.word(20)
    }

    pub fn generation(&self) -> i64 {
        self.long(24)
    }

    pub fn fds(&self) -> [i32; 3] {
        [self.word(32), self.word(36), self.word(40)]
    }

    pub fn listen(&self) -> i32 {
        self.word(44)
    }

    pub fn spares(&self) -> Vec<i32> {
        spares(self.long(48))
    }

    pub fn holder(&self) -> i32 {
        self.word(56)
    }

    pub fn since(&self) -> i64 {
        self.long(64)
    }
}

/// The descriptors that a packed result names, lowest bits first.
pub fn spares(packed: i64) -> Vec<i32> {
    (0..3).map(|i| (packed >> (21 * i) & 0x1f_ffff) as i32 - 1).filter(|fd| *fd >= 0).collect()
}

/// The document's handshake of version 1 with another token.
pub fn hello(token: &[u8; 16]) -> Vec<u8> {
    let mut bytes = vectors::bytes("handshake-version-1");
    bytes[16..32].copy_from_slice(token);
    bytes
}

/// The document's handshake of version 0 with another count.
pub fn count(count: u8) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        vectors::pattern("handshake-version-0").iter().map(|b| b.unwrap_or(0x7a)).collect();
    bytes[0] = count;
    bytes
}

/// What a client sends: a socket for both directions and a data socket. Ours and theirs.
pub struct Ends {
    pub stream: Stream,
    pub data: OwnedFd,
    pub theirs: [OwnedFd; 2],
}

impl Ends {
    pub fn new() -> Self {
        let (stream, their_stream) = sockets();
        let (data, their_data) = sockets();
        let stream = Stream { results: stream.try_clone().unwrap(), requests: stream };
        Self { stream, data, theirs: [their_stream, their_data] }
    }

    pub fn raw(&self) -> [RawFd; 2] {
        [self.theirs[0].as_raw_fd(), self.theirs[1].as_raw_fd()]
    }
}

/// A connection that a handshake has made.
pub struct Attached {
    pub stream: Stream,
    pub data: OwnedFd,
    pub answer: Answer,
}

/// Attaches with a handshake of version 1, and sees that it works.
#[track_caller]
pub fn attach(path: &Path, token: &[u8; 16]) -> Attached {
    let client = Client::connect(path);
    let ends = Ends::new();
    assert!(client.send(&hello(token), &ends.raw()));
    let answer = client.answer();
    assert_eq!(answer.status(), 0);
    let Ends { stream, data, .. } = ends;
    stream.is_in_step();
    Attached { stream, data, answer }
}
