//! The live upgrade: what one image hands over to the next one in the same process.
//!
//! ```text
//!   image A                                    image B, mapped by the controller
//!   UPGRADE ── checks B's entry table
//!      │       └─ can't be used: an errno, and A goes on
//!      │  sends the results so far, drops the client whose handshake is under way
//!      └─ writes the Handover ──────────────▶  resume: on the stack where A's began
//!                                                │ signal handlers in A become B's
//!                                                └ the result of UPGRADE: A's address
//! ```
//!
//! Nothing else of an image is kept: what it has on its stack is gone, and with it what a KEEP had
//! prepared.
//!
//! Images are built at different times. So this layout is only ever extended, at its end:
//! - An image takes over from one with a smaller [`Handover`]: what is missing is zero, which must
//!   mean that there is no such thing.
//! - To one that understands less ([`EntryTable::handover`](super::entry::EntryTable::handover)) none
//!   hands over: something would be forgotten.

use super::handshake::Token;
use super::log::LogHead;
use super::wire::{Request, Spares};

/// poll(2)'s entry. A negative descriptor is one that there is not: the kernel passes it over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PollFd {
    /// The descriptor.
    pub fd: i32,
    /// What it is waited for.
    pub events: i16,
    /// What the kernel said last.
    pub revents: i16,
}

/// What a server waits for, in the form in which ppoll(2) takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Watched {
    /// Requests arrive here; negative while detached.
    pub input: PollFd,
    /// Where the next controller arrives; negative if the process is not persistent.
    pub listen: PollFd,
    /// The client whose handshake is under way. There is none when this is handed over.
    pub client: PollFd,
    /// The controller rings it after it has handed over calls in the ring; negative if there is no
    /// ring.
    pub bell: PollFd,
}

/// How far a stream is. All zeros: it is of version 0, and nothing has been read or is to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Progress {
    /// The version that is spoken. Only version 1 can be handed over.
    pub version: u32,
    /// Always zero.
    pub reserved: u32,
    /// The part of the input buffer that has arrived and is not used yet: in version 1 it lies at the
    /// start of the memory from HELLO.
    pub start: usize,
    /// Where that part ends.
    pub end: usize,
    /// Bytes of the output buffer that wait to be sent: none when this is handed over.
    pub filled: usize,
}

/// Calls in shared memory. All zeros: there never were any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Queue {
    /// Where the ring is, or was for an earlier connection.
    pub address: u64,
    /// The number of the next call.
    pub next: u64,
    /// Rings for a controller that sleeps.
    pub bell: i32,
    /// Always zero.
    pub reserved: u32,
}

/// All that a server knows and that its next image must know.
///
/// The order is also for the size of the code: what lies within 128 bytes of the start is reached by
/// shorter instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Handover {
    /// Bytes of this structure.
    pub size: u64,
    /// The descriptors that are waited for.
    pub watched: Watched,
    /// Results leave here.
    pub output: PollFd,
    /// The connection's other socket: only closed with the connection.
    pub data: i32,
    /// Not 0: the connection was made by a version-1 controller, and its descriptors are the
    /// server's to close. Version 0 leaves them to its client, which closes them by number.
    pub owned: u32,
    /// The descriptors that are kept in reserve.
    pub spares: Spares,
    /// How far the stream is.
    pub stream: Progress,
    /// The request that is being executed: UPGRADE itself, for its record.
    pub request: Request,
    /// How far the log is, and where it and the registry lie. A handshake may ask for it.
    pub log: LogHead,
    /// The ring, which goes on.
    pub ring: Queue,
    /// Who holds the process.
    pub token: Token,
    /// How many connections began with a handshake or SERVE.
    pub generation: u64,
    /// Since when the process is held: seconds of CLOCK_REALTIME.
    pub holder_since: i64,
    /// The holder's pid by its own word, or 0.
    pub holder_pid: i32,
    /// One more than the number of the descriptor of the listening socket's file, or 0.
    pub socket_file: u32,
    /// The stack pointer with which an image begins that takes over.
    pub stack: u64,
    /// Where the image lies that hands over.
    pub image: u64,
    /// One more than the descriptor from which the ring's calls are interrupted; 0: there is none.
    pub source: u32,
    /// Always zero.
    pub reserved_2: u32,
}

/// Bytes of a [`Handover`].
pub const HANDOVER_SIZE: usize = size_of::<Handover>();

/// Where in a [`Handover`] the stack pointer is: an image takes it before anything else.
pub const STACK_OFFSET: usize = core::mem::offset_of!(Handover, stack);

const _: () = {
    use core::mem::offset_of;
    assert!(HANDOVER_SIZE == 392);
    assert!(offset_of!(Handover, watched) == 8);
    assert!(offset_of!(Handover, output) == 40);
    assert!(offset_of!(Handover, data) == 48);
    assert!(offset_of!(Handover, spares) == 56);
    assert!(offset_of!(Handover, stream) == 64);
    assert!(offset_of!(Handover, request) == 96);
    assert!(offset_of!(Handover, log) == 152);
    assert!(offset_of!(Handover, ring) == 304);
    assert!(offset_of!(Handover, token) == 328);
    assert!(offset_of!(Handover, generation) == 344);
    assert!(offset_of!(Handover, holder_pid) == 360);
    assert!(offset_of!(Handover, stack) == 368);
    assert!(offset_of!(Handover, image) == 376);
    assert!(offset_of!(Handover, source) == 384);
};
