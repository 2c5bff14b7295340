//! Memory that the target process and this one both have.

use std::sync::{Arc, PoisonError};

use super::Task;
use crate::calls::arena::Piece;
use crate::calls::handle::Mapping;
use crate::error::{Error, Result};
use crate::link::Shared;
use crate::proto::ring::Memory as _;

/// A buffer in memory that the target process and this one both have: what is written to it here is
/// there, without a call, and the other way round. Calls take its address. Free again when it is
/// dropped; calls that use it must be complete by then.
///
/// It stays valid after the end of the connection, unless another controller has held the process
/// before this one comes back: then it is stale. It is gone with this process.
#[derive(Debug)]
pub struct SharedBuffer {
    piece: Piece,
    memory: Arc<Shared>,
    /// In the target process. It stays mapped when this is dropped.
    there: Mapping,
    size: usize,
}

impl SharedBuffer {
    /// The first address, in the target process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.piece.address()
    }

    /// Whether another controller has held the process since: what is at its address there may be
    /// something else.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.there.is_stale()
    }

    /// How many bytes it has.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    fn place(&self, at: usize, len: usize) -> Result<u64> {
        self.there.check()?;
        let address = self.address().saturating_add(at as u64);
        let fits = at.checked_add(len).is_some_and(|end| end <= self.size);
        fits.then_some(address).ok_or(Error::Fault { address, len })
    }

    /// Copies `bytes` into it, `at` bytes behind its start: one copy.
    ///
    /// # Errors
    ///
    /// [`Error::Fault`], and nothing is written, if they don't fit; [`Error::Stale`].
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        let address = self.place(at, bytes.len())?;
        self.memory.write(address, bytes);
        Ok(())
    }

    /// A copy of `len` bytes, `at` bytes behind its start.
    ///
    /// # Errors
    ///
    /// [`Error::Fault`] if it has fewer; [`Error::Stale`].
    pub fn read(&self, at: usize, len: usize) -> Result<Vec<u8>> {
        let address = self.place(at, len)?;
        self.memory.read(address, len as u64).ok_or(Error::Fault { address, len })
    }
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        self.memory.take_back(self.address());
    }
}

impl Task {
    /// A buffer of `size` bytes in memory that the process shares with this one, filled with what was
    /// there before.
    ///
    /// # Errors
    ///
    /// [`Error::NotShared`] if the process shares none, see
    /// [`Process::enter_ring`](crate::Process::enter_ring), or not as much is free.
    pub fn shared_buffer(&self, size: usize) -> Result<SharedBuffer> {
        let shared = self.shared.read().unwrap_or_else(PoisonError::into_inner).clone();
        let (memory, arena) = shared.ok_or(Error::NotShared { size })?;
        let piece = arena.take(size).ok_or(Error::NotShared { size })?;
        memory.lend(piece.address(), size as u64);
        let there = Mapping::kept(&self.space, piece.address(), size);
        Ok(SharedBuffer { piece, memory, there, size })
    }
}
