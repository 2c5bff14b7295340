//! Memory mappings: an address space that one or more processes share, and handles to ranges of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use syscalls::Sysno;

use super::stack::{KEPT, Stack};
use crate::error::{Error, Result};
use crate::link::{Connection, WeakConnection};
use crate::proto::Call;

/// An address space, as `CLONE_VM` shares it: which processes can be asked to act on it.
#[derive(Default)]
pub struct AddressSpace {
    members: Mutex<Vec<WeakConnection>>,
    /// Addresses of stacks that no child uses now.
    stacks: Mutex<Vec<u64>>,
    /// How often another controller has held a process of it: what was mapped before may be unmapped,
    /// and its addresses something else's.
    tenure: AtomicU64,
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

    /// One more process acts on it, in its present tenure.
    pub(crate) fn join(&self, member: &Connection) {
        let member = member.of_this_tenure();
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.retain(WeakConnection::is_alive);
        members.push(member.downgrade());
    }

    /// Another controller has held the process behind `member`: nothing that was mapped before is used
    /// or unmapped any more.
    pub(crate) fn supersede(&self, member: &Connection) {
        self.tenure.fetch_add(1, Ordering::AcqRel);
        self.stacks.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.retain(|other| other.is_alive() && !other.is(member));
        members.push(member.downgrade());
    }

    fn tenure(&self) -> u64 {
        self.tenure.load(Ordering::Acquire)
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
        // The memory of a persistent one may be another controller's to use while it has no link.
        let persistent = members.iter().find(|member| member.is_persistent());
        let member = persistent.or_else(|| members.iter().find(|member| member.is_connected()));
        let member = member.or(members.first());
        if let Some(member) = member {
            let args = [address, size as u64, 0, 0, 0, 0];
            drop(member.call("munmap", Call::syscall(Sysno::munmap, args)));
        }
    }
}

/// Pages that mmap(2) mapped in a target process. Dropping it unmaps them there, in the background.
///
/// Once another controller has held the process, it is *stale*: the pages may be unmapped, and others in
/// their place. Dropping it unmaps nothing then.
#[derive(Debug)]
pub struct Mapping {
    space: Arc<AddressSpace>,
    /// That of the address space when they were mapped.
    tenure: u64,
    address: u64,
    size: usize,
    owned: bool,
}

impl Mapping {
    /// A handle to the `size` bytes mapped at `address`.
    pub(crate) fn new(space: &Arc<AddressSpace>, address: u64, size: usize) -> Self {
        Self { space: space.clone(), tenure: space.tenure(), address, size, owned: true }
    }

    /// A handle to pages that stay mapped when it is dropped.
    pub(crate) fn kept(space: &Arc<AddressSpace>, address: u64, size: usize) -> Self {
        let tenure = space.tenure();
        Self { space: space.clone(), tenure, address, size, owned: false }
    }

    /// The first address, in the target process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Whether another controller has held the process since: nobody knows any more what is mapped there.
    /// Memory that has a name can be asked for anew, by that.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.space.tenure() != self.tenure
    }

    pub(crate) fn check(&self) -> Result<()> {
        let what = || format!("the memory at {:#x}", self.address);
        if self.is_stale() { Err(Error::Stale { what: what() }) } else { Ok(()) }
    }

    /// How many bytes are mapped.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Leaves a stack to the next child, or unmaps it if there are enough.
    pub(super) fn keep_as_stack(self) {
        if self.is_stale() {
            return;
        }
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
        if self.owned && !self.is_stale() {
            self.space.unmap_later(self.address, self.size);
        }
    }
}
