//! The registry: the named resources of a persistent process, in its own memory.
//!
//! Only the server writes it, and a controller reads it with COPY_OUT. What is in it is decided by
//! the server alone at one instant: KEEP puts what is known beforehand into its place and names the
//! next call; when that has succeeded, and before it counts as executed, the server adds what the
//! call has made and marks the entry as taken. If the call fails, or the connection ends before it,
//! the entry is still free. So there is no instant at which a resource has no name that was to have
//! one, or a name no resource, whatever becomes of the controller.
//!
//! ```text
//!         KEEP                 the next call succeeds
//!  free ────────▶ prepared ───────────────────────────▶ taken ───┐
//!   ▲                │ it fails, or the connection ends          │
//!   ├────────────────┘                                           │
//!   └────────────────────────────────────────────────────────────┘
//!      KEEP with this entry as `clear`, and its next call succeeds
//! ```
//!
//! `KEEP(slot, src, len, from, count, clear)`:
//! - The `len` bytes at `src` land at entry `slot`. They are one entry or more, whose states are
//!   [`Entry::FREE`]. So must be the states of entries behind that hold more of what belongs to one (a
//!   blob's bytes): when that is free, or never comes to be taken, nobody takes them for entries.
//! - When the next call succeeds, the `count` entries from `slot` on get their value and are taken.
//!   If `from` is 0 that is the call's result; else entry `i` gets the 4 bytes at `from + 4 * i`,
//!   where the call has left them, as the low half of its value.
//! - Entry `clear`, counted from 1, is free then. With 0 there is none.
//! - A second KEEP before the call takes the place of the first.

use super::bytes::{Put, Take};

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Entry {
    /// The descriptor, the pid, or the address of the mapping.
    pub value: u64,
    /// [`Entry::TAKEN`] or [`Entry::FREE`].
    pub state: u64,
    /// What it is: the controllers' to say.
    pub kind: u64,
    /// What else a controller wants to know of it.
    pub details: [u64; 3],
    /// Its name, up to the first zero.
    pub name: [u8; NAME_SIZE],
    /// The user's.
    pub user: [u8; USER_SIZE],
}

/// The most bytes of a name.
pub const NAME_SIZE: usize = 48;
/// The bytes of an entry that are the user's.
pub const USER_SIZE: usize = 32;
/// Bytes of an entry.
pub const ENTRY_SIZE: usize = size_of::<Entry>();

const _: () = {
    assert!(ENTRY_SIZE == 128);
    assert!(core::mem::offset_of!(Entry, state) == 8);
    assert!(core::mem::offset_of!(Entry, kind) == 16);
    assert!(core::mem::offset_of!(Entry, details) == 24);
    assert!(core::mem::offset_of!(Entry, name) == 48);
    assert!(core::mem::offset_of!(Entry, user) == 96);
};

impl Entry {
    /// The state of an entry that is free, or prepared.
    pub const FREE: u64 = 0;
    /// The state of one that is taken.
    pub const TAKEN: u64 = 1;

    /// The bytes that lie in memory.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; ENTRY_SIZE] {
        let Self { value, state, kind, details, name, user } = self;
        let mut bytes = [0; ENTRY_SIZE];
        let mut put = Put(&mut bytes);
        for number in [value, state, kind].into_iter().chain(details) {
            put.bytes(&number.to_le_bytes());
        }
        put.bytes(name);
        put.bytes(user);
        bytes
    }

    /// From the bytes in memory, whatever they say.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; ENTRY_SIZE]) -> Self {
        let mut take = Take(bytes);
        Self {
            value: take.number(),
            state: take.number(),
            kind: take.number(),
            details: core::array::from_fn(|_| take.number()),
            name: take.bytes(),
            user: take.bytes(),
        }
    }
}
