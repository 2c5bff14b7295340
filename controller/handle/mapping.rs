//! Memory mappings: an address space that one or more processes share, and handles to ranges of it.

use std::sync::{Arc, Mutex, PoisonError};

use syscalls::Sysno;

use super::stack::{KEPT, Stack};
use crate::call::{Call, Connection, WeakConnection};

/// An address space, as `CLONE_VM` shares it: which processes can be asked to act on it.
#[derive(Default)]
pub struct AddressSpace {
    members: Mutex<Vec<WeakConnection>>,
    /// Addresses of stacks that no child uses now.
    stacks: Mutex<Vec<u64>>,
}

impl std::fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AddressSpace")
    }
}

impl AddressSpace {
    /// An address space that `member` can act on.
    pub(crate) fn new(member: &Connection) -> Arc<Self> {
        let space = Arc::new(Self::default());
        space.join(member);
        space
    }

    /// One more process acts on it.
    pub(crate) fn join(&self, member: &Connection) {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.retain(WeakConnection::is_alive);
        members.push(member.downgrade());
    }

    /// How many processes that are driven from here share it.
    pub(crate) fn sharers(&self) -> usize {
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.iter().filter(|member| member.is_alive()).count()
    }

    /// A stack that an earlier child has left.
    pub(crate) fn take_stack(self: &Arc<Self>) -> Option<Stack> {
        let address = self.stacks.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(Stack::new(Mapping::new(self, address, Stack::MAPPED)))
    }

    fn unmap_later(&self, address: u64, size: usize) {
        // The lock is not held while a connection is used, or dropped as the last of its kind.
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let members: Vec<_> = members.iter().filter_map(WeakConnection::upgrade).collect();
        let member = members.iter().find(|m| m.is_connected()).or_else(|| members.first());
        if let Some(member) = member {
            let args = [address, size as u64, 0, 0, 0, 0];
            drop(member.call("munmap", Call::syscall(Sysno::munmap, args)));
        }
    }
}

/// Pages that mmap(2) mapped in a target process. Dropping it unmaps them there, in the background.
#[derive(Debug)]
pub struct Mapping {
    space: Arc<AddressSpace>,
    address: u64,
    size: usize,
    owned: bool,
}

impl Mapping {
    /// A handle to the `size` bytes mapped at `address`.
    pub(crate) fn new(space: &Arc<AddressSpace>, address: u64, size: usize) -> Self {
        Self { space: space.clone(), address, size, owned: true }
    }

    /// A handle to pages that stay mapped when it is dropped.
    pub(crate) fn kept(space: &Arc<AddressSpace>, address: u64, size: usize) -> Self {
        Self { space: space.clone(), address, size, owned: false }
    }

    /// The first address, in the target process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How many bytes are mapped.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Leaves a stack to the next child, or unmaps it if there are enough.
    pub(super) fn keep_as_stack(self) {
        let space = self.space.clone();
        let mut stacks = space.stacks.lock().unwrap_or_else(PoisonError::into_inner);
        if stacks.len() < KEPT {
            stacks.push(self.into_raw());
        } else {
            // Unmapping takes other locks.
            drop(stacks);
            drop(self);
        }
    }

    /// Gives the pages up without unmapping them, and returns their address.
    #[must_use = "nothing else knows the address"]
    pub fn into_raw(mut self) -> u64 {
        self.owned = false;
        self.address
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.owned {
            self.space.unmap_later(self.address, self.size);
        }
    }
}
