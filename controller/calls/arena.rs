//! Memory of a target process that buffers of calls are carved from.
//!
//! The allocator is on this side; the memory is on the other. A piece must live until the server
//! is done with every call that names it: it is owned by the batch that uses it, not by the future
//! that waits for the batch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a new process's arena.
pub const ARENA_SIZE: usize = 64 * 1024;

/// Pieces start at multiples of a cache line, which suits every type of the kernel's.
const ALIGN: u64 = 64;

/// A range of a process's memory, and which parts of it are free.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    base: u64,
    size: u64,
    /// Start and size of each free range; no two of them touch.
    free: Mutex<BTreeMap<u64, u64>>,
}

/// A part of an arena, free again when it is dropped.
#[derive(Debug)]
pub struct Piece {
    arena: Arena,
    address: u64,
    size: u64,
}

impl Arena {
    /// The range of `size` bytes at `base`, all of it free.
    #[must_use]
    pub fn new(base: u64, size: usize) -> Self {
        let size = size as u64;
        Self(Arc::new(Inner { base, size, free: Mutex::new(BTreeMap::from([(base, size)])) }))
    }

    /// The first address.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.0.base
    }

    /// How many bytes it has, used or not.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.size as usize
    }

    /// A piece of at least `size` bytes, or `None` if no free range is that large.
    #[must_use]
    pub fn take(&self, size: usize) -> Option<Piece> {
        let size = (size as u64).max(1).checked_next_multiple_of(ALIGN)?;
        let mut free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (address, available) =
            free.iter().find(|(_, available)| **available >= size).map(|(a, s)| (*a, *s))?;
        free.remove(&address);
        if available > size {
            free.insert(address + size, available - size);
        }
        Some(Piece { arena: self.clone(), address, size })
    }
}

impl Piece {
    /// The first address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut free = self.arena.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut address, mut size) = (self.address, self.size);
        if let Some((before, length)) = free.range(..address).next_back().map(|(a, s)| (*a, *s))
            && before + length == address
        {
            free.remove(&before);
            (address, size) = (before, size + length);
        }
        if let Some(after) = free.remove(&(address + size)) {
            size += after;
        }
        free.insert(address, size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_never_overlap_and_all_memory_comes_back(
            steps in prop::collection::vec((1usize..5000, any::<prop::sample::Index>(), any::<bool>()), 1..200)
        ) {
            let arena = Arena::new(0x1000, ARENA_SIZE);
            let mut pieces: Vec<(Piece, u64)> = Vec::new();
            for (size, index, give_back) in steps {
                if give_back && !pieces.is_empty() {
                    pieces.swap_remove(index.index(pieces.len()));
                } else if let Some(piece) = arena.take(size) {
                    let end = piece.address() + size as u64;
                    prop_assert!(piece.address() >= 0x1000 && end <= 0x1000 + ARENA_SIZE as u64);
                    prop_assert_eq!(piece.address() % ALIGN, 0);
                    for (other, other_end) in &pieces {
                        prop_assert!(end <= other.address() || *other_end <= piece.address());
                    }
                    pieces.push((piece, end));
                }
            }
            pieces.clear();
            prop_assert!(arena.take(ARENA_SIZE).is_some());
        }
    }
}
