//! The call log: what a server has executed last, in its own memory.
//!
//! Calls are numbered from the process's start, over all connections and whichever way they came.
//! The record of call `n` is at `n` modulo [`LOG_CAPACITY`]. A record is written when its call has
//! returned and before its number counts as executed: so a controller that has lost its link learns
//! from the count which of its calls were executed, and from the records what they returned. It has
//! no more than [`LOG_CAPACITY`] calls under way, for which there are records then.
//!
//! ```text
//!          executed, with their results          sent, not executed
//!   ──┬──────────────────────────────────────┬──────────────────────▶
//!     calls − LOG_CAPACITY                   calls
//! ```

use super::bytes::Take;
use super::handshake::Token;
use super::wire::Request;

/// How many calls are remembered. A power of two.
pub const LOG_CAPACITY: u64 = 128;

/// Bytes of all records.
pub const LOG_SIZE: usize = LOG_CAPACITY as usize * size_of::<Record>();

/// How many controllers before the present one are remembered.
pub const PAST: usize = 4;

/// A call that was executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    /// The request, with results in the place of what referred to them. Of the word of a system call
    /// that was made only the number is left. All zeros for a call from before there was memory.
    pub request: Request,
    /// Its result.
    pub result: i64,
}

/// A controller that held the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tenure {
    /// Who it was. All zeros: nobody, or one of version 0.
    pub token: Token,
    /// The number of the first call that was not its own any more.
    pub end: u64,
}

/// What a server sends behind its answer to a handshake with [`Hello::LOG`], before the records.
///
/// [`Hello::LOG`]: super::handshake::Hello::LOG
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LogHead {
    /// How many calls have been executed: the number of the next one.
    pub calls: u64,
    /// The number of the first call of the connection that there is, or was last.
    pub first: u64,
    /// Where the server keeps what a controller gave it with HELLO, or 0: then it keeps no records,
    /// and none follow.
    pub memory: u64,
    /// Where the registry lies, or 0 if there is none.
    pub registry: u64,
    /// How many entries it has room for.
    pub capacity: u64,
    /// All entries from this one on are free.
    pub used: u64,
    /// How many controllers there have been before the present or last one, nobody included.
    pub controllers: u64,
    /// The latest of them; the one that was followed by controller `n` is at `n` modulo [`PAST`].
    pub past: [Tenure; PAST],
}

/// Bytes of a [`LogHead`].
pub const LOG_HEAD_SIZE: usize = size_of::<LogHead>();

const _: () = {
    assert!(LOG_CAPACITY.is_power_of_two());
    assert!(size_of::<Record>() == 64);
    assert!(core::mem::offset_of!(Record, result) == 56);
    assert!(LOG_HEAD_SIZE == 152);
    assert!(core::mem::offset_of!(LogHead, past) == 56);
    assert!(size_of::<Tenure>() == 24);
};

impl LogHead {
    /// From its bytes, whatever they say.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; LOG_HEAD_SIZE]) -> Self {
        let mut take = Take(bytes);
        Self {
            calls: take.number(),
            first: take.number(),
            memory: take.number(),
            registry: take.number(),
            capacity: take.number(),
            used: take.number(),
            controllers: take.number(),
            past: core::array::from_fn(|_| Tenure {
                token: Token([take.number(), take.number()]),
                end: take.number(),
            }),
        }
    }
}

impl Record {
    /// From its bytes, whatever they say.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        let mut take = Take(bytes);
        let request =
            Request { word: take.number(), args: core::array::from_fn(|_| take.number()) };
        Self { request, result: take.number() as i64 }
    }
}
