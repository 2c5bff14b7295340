//! What a client says to the listening socket of a persistent process, and what it hears back.
//!
//! The first word tells the two forms apart: a small count is version 0 (rsyscall's), the low half
//! of [`HANDSHAKE_MAGIC`] is version 1.

use super::bytes::{Put, Take};

/// The first word of a version-1 handshake and of its answer: "farcall1". Its low half, read as
/// the `i32` with which a version-0 handshake starts, is no number of descriptors.
pub const HANDSHAKE_MAGIC: u64 = u64::from_le_bytes(*b"farcall1");

/// The version of the handshake itself.
pub const HANDSHAKE_VERSION: u32 = 1;

/// A version-0 handshake: the `i32` count and the byte that carries the descriptors.
pub const HANDSHAKE_V0_SIZE: usize = 5;

/// The fewest descriptors of a handshake: a stream for both directions, and the data socket.
pub const MIN_FDS: usize = 2;
/// The most: in, out, and the data socket.
pub const MAX_FDS: usize = 3;

/// Who a controller is: 128 random bits that it makes once and shows at every handshake. The same
/// token may always reconnect; another one is told who holds the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Token(pub [u64; 2]);

/// A version-1 handshake. Its descriptors (SCM_RIGHTS, two or three) may come with any of its
/// bytes, but have come when the last one has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Hello {
    /// [`HANDSHAKE_MAGIC`].
    pub magic: u64,
    /// [`HANDSHAKE_VERSION`].
    pub version: u32,
    /// The highest version of the stream that the controller speaks.
    pub stream_version: u32,
    /// Who asks.
    pub token: Token,
    /// The controller's pid as it sees it itself: told to others while it holds the process.
    pub pid: i32,
    /// [`Hello::TAKE_OVER`], [`Hello::LOG`] and [`Hello::NAMES`], or nothing. Other bits must be zero.
    pub flags: u32,
    /// With [`Hello::NAMES`] the first byte of the registry that is asked for, else zero.
    pub from: u64,
}

/// Bytes of a [`Hello`].
pub const HELLO_SIZE: usize = size_of::<Hello>();

/// What a server answers to a [`Hello`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Answer {
    /// [`HANDSHAKE_MAGIC`].
    pub magic: u64,
    /// 0, or a negated errno: `-EBUSY` (another token holds the process: see `holder_pid`),
    /// `-EPROTONOSUPPORT` (the handshake's version), `-EBADF` (too few or too many descriptors,
    /// or they did not fit into the table), `-EINVAL` (bits that must be zero).
    pub status: i32,
    /// The version of the handshake that the server speaks.
    pub version: u32,
    /// The version of the stream from its first byte on.
    pub stream_version: u32,
    /// The server's pid, in its own pid namespace.
    pub pid: i32,
    /// How many connections this process has had, this one included.
    pub generation: u64,
    /// The numbers that the descriptors got, in the order they were sent; -1 where there is none.
    pub fds: [i32; MAX_FDS],
    /// The listening socket.
    pub listen: i32,
    /// The spare descriptors, packed as [`super::wire::Spares`].
    pub spares: i64,
    /// Who holds the process (with `-EBUSY`, the other one), or 0.
    pub holder_pid: i32,
    /// One more than the number of the descriptor (O_PATH) of the socket's file that the process keeps, or 0.
    pub socket_file: u32,
    /// Since when it is held: seconds of CLOCK_REALTIME.
    pub holder_since: i64,
}

/// Bytes of an [`Answer`].
pub const ANSWER_SIZE: usize = size_of::<Answer>();

const _: () = {
    assert!(HELLO_SIZE == 48);
    assert!(core::mem::offset_of!(Hello, token) == 16);
    assert!(core::mem::offset_of!(Hello, pid) == 32);
    assert!(core::mem::offset_of!(Hello, from) == 40);
    assert!(ANSWER_SIZE == 72);
    assert!(core::mem::offset_of!(Answer, generation) == 24);
    assert!(core::mem::offset_of!(Answer, fds) == 32);
    assert!(core::mem::offset_of!(Answer, spares) == 48);
    assert!(core::mem::offset_of!(Answer, holder_pid) == 56);
    assert!(core::mem::offset_of!(Answer, holder_since) == 64);
    let low = HANDSHAKE_MAGIC as u32;
    assert!(low > MAX_FDS as u32 && low as i32 > 0);
};

impl Hello {
    /// The controller with another token that holds the process loses it to this one.
    pub const TAKE_OVER: u32 = 1 << 0;
    /// Behind the answer, whatever it is, follow a [`LogHead`](super::log::LogHead) and the records
    /// of the call log. One without descriptors asks for nothing else, and is answered `-EBADF`, or
    /// `-EBUSY` where another token holds the process.
    pub const LOG: u32 = 1 << 1;
    /// Only with [`Hello::LOG`]: behind the log follow the registry's entries, from byte
    /// [`Hello::from`] on, as far as they are in use and the socket takes them.
    pub const NAMES: u32 = 1 << 2;

    /// Whether it asks for the names, behind the log.
    #[must_use]
    pub fn asks_for_names(&self) -> bool {
        const BOTH: u32 = Hello::LOG | Hello::NAMES;
        self.flags & BOTH == BOTH
    }

    /// The bytes that travel.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HELLO_SIZE] {
        let mut bytes = [0; HELLO_SIZE];
        let mut put = Put(&mut bytes);
        put.bytes(&self.magic.to_le_bytes());
        put.bytes(&self.version.to_le_bytes());
        put.bytes(&self.stream_version.to_le_bytes());
        put.bytes(&self.token.0[0].to_le_bytes());
        put.bytes(&self.token.0[1].to_le_bytes());
        put.bytes(&self.pid.to_le_bytes());
        put.bytes(&self.flags.to_le_bytes());
        put.bytes(&self.from.to_le_bytes());
        bytes
    }

    /// A handshake from its bytes, whatever they say.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HELLO_SIZE]) -> Self {
        let mut take = Take(bytes);
        Self {
            magic: u64::from_le_bytes(take.bytes()),
            version: u32::from_le_bytes(take.bytes()),
            stream_version: u32::from_le_bytes(take.bytes()),
            token: Token([u64::from_le_bytes(take.bytes()), u64::from_le_bytes(take.bytes())]),
            pid: i32::from_le_bytes(take.bytes()),
            flags: u32::from_le_bytes(take.bytes()),
            from: u64::from_le_bytes(take.bytes()),
        }
    }
}

impl Answer {
    /// The bytes that travel.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; ANSWER_SIZE] {
        let mut bytes = [0; ANSWER_SIZE];
        let mut put = Put(&mut bytes);
        put.bytes(&self.magic.to_le_bytes());
        put.bytes(&self.status.to_le_bytes());
        put.bytes(&self.version.to_le_bytes());
        put.bytes(&self.stream_version.to_le_bytes());
        put.bytes(&self.pid.to_le_bytes());
        put.bytes(&self.generation.to_le_bytes());
        for fd in self.fds {
            put.bytes(&fd.to_le_bytes());
        }
        put.bytes(&self.listen.to_le_bytes());
        put.bytes(&self.spares.to_le_bytes());
        put.bytes(&self.holder_pid.to_le_bytes());
        put.bytes(&self.socket_file.to_le_bytes());
        put.bytes(&self.holder_since.to_le_bytes());
        bytes
    }

    /// An answer from its bytes, whatever they say.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; ANSWER_SIZE]) -> Self {
        let mut take = Take(bytes);
        Self {
            magic: u64::from_le_bytes(take.bytes()),
            status: i32::from_le_bytes(take.bytes()),
            version: u32::from_le_bytes(take.bytes()),
            stream_version: u32::from_le_bytes(take.bytes()),
            pid: i32::from_le_bytes(take.bytes()),
            generation: u64::from_le_bytes(take.bytes()),
            fds: core::array::from_fn(|_| i32::from_le_bytes(take.bytes())),
            listen: i32::from_le_bytes(take.bytes()),
            spares: i64::from_le_bytes(take.bytes()),
            holder_pid: i32::from_le_bytes(take.bytes()),
            socket_file: u32::from_le_bytes(take.bytes()),
            holder_since: i64::from_le_bytes(take.bytes()),
        }
    }
}
