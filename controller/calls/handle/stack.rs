//! Stacks on which children begin, with the memory that such a child needs besides.
//!
//! A child that shares its parent's memory runs on one until it ends or runs another program; an
//! isolated child begins on its copy of one. Then the next child can have it: an address space
//! keeps a few, because to map one costs as much as to make a child.

use super::Mapping;
use crate::abi::wire::AHEAD_SIZE;
use crate::calls::arena::{ARENA_SIZE, Arena};

/// Bytes below the stack that nobody can touch.
pub(crate) const GUARD: usize = 4096;
const SIZE: usize = 16 * 1024;

/// How many stacks an address space keeps for children to come.
pub(super) const KEPT: usize = 4;

/// A guard page, a stack, the memory that version 1 of the stream needs, and an arena. Dropping it
/// leaves it to the next child: nobody may run on it any more.
#[derive(Debug)]
pub(crate) struct Stack(Option<Mapping>);

impl Stack {
    /// Bytes of the whole.
    pub(crate) const MAPPED: usize = GUARD + SIZE + AHEAD_SIZE + ARENA_SIZE;

    /// The stack in a mapping of that many bytes, of which the first page is guarded already.
    pub(crate) fn new(mapping: Mapping) -> Self {
        Self(Some(mapping))
    }

    /// The address behind the stack's last byte, where the memory for the stream begins.
    pub(crate) fn top(&self) -> u64 {
        let base = self.0.as_ref().map_or(0, Mapping::address);
        base + (GUARD + SIZE) as u64
    }

    /// The arena, all of it free: for a child that has just begun.
    pub(crate) fn arena(&self) -> Arena {
        Arena::new(self.top() + AHEAD_SIZE as u64, ARENA_SIZE)
    }

    /// Gives it up as it is: somebody may run on it for as long as the memory exists.
    pub(crate) fn leave(mut self) {
        if let Some(mapping) = self.0.take() {
            let _ = mapping.into_raw();
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if let Some(mapping) = self.0.take() {
            mapping.keep_as_stack();
        }
    }
}
