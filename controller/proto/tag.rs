//! What tells an entry of the registry from every other one.

use crate::abi::registry::{Entry, USER_SIZE};

/// What tells an entry from every other one, of the same name too: random bytes in it. Who has a handle
/// sees by that whether the name was given up meanwhile, and to what it was given then. An earlier
/// farcall has left zeros there, which tell nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag([u8; 16]);

impl Tag {
    pub(crate) fn new() -> Self {
        let mut bytes = [0; 16];
        // Without random numbers it tells nothing.
        let _ = getrandom::fill(&mut bytes);
        Self(bytes)
    }

    pub(crate) fn of(entry: &Entry) -> Self {
        entry.user.first_chunk().map_or(Self([0; 16]), |bytes| Self(*bytes))
    }

    /// As it stands in an entry.
    pub(crate) fn to_user(self) -> [u8; USER_SIZE] {
        let mut user = [0; USER_SIZE];
        user[..self.0.len()].copy_from_slice(&self.0);
        user
    }

    /// Whether the entry is that one, and no other.
    pub(crate) fn is_of(self, entry: &Entry) -> bool {
        self.0 != [0; 16] && Self::of(entry) == self
    }
}
