//! The name that a child has in its parent's registry from the instant on at which it is made.
//!
//! ```text
//!   KEEP entry 0   clone   ...   fstat of its pidfd into entry 1   KEEP entry 1, free 0   getpid
//!                    │                                                                       │
//!                    └ named from here on                       which one it is, is known ──┘
//! ```
//! The inode of a pidfd is that of the process, and of no other before the machine is booted again
//! (Linux 6.9).

use std::mem::offset_of;

use syscalls::Sysno;

use super::Process;
use super::start::Steps;
use crate::abi::registry::{ENTRY_SIZE, Entry};
use crate::abi::wire::Operation;
use crate::call::{Call, Result};
use crate::handle::{Slots, Tag, kind};
use crate::sys::Buffer;
use crate::sys::registry::{STAT_DEV, STAT_MODE, STAT_SIZE, check_name, entry};

/// Two entries of the registry that are set aside for a child, and memory for what is written there. Both
/// are kept until the replies are here.
pub(super) struct Naming {
    name: String,
    slots: Slots,
    /// An entry, a struct stat, and the pid.
    buffer: Buffer,
}

const STAT: u64 = ENTRY_SIZE as u64;
const PID: u64 = STAT + STAT_SIZE as u64;
const SIZE: usize = PID as usize + size_of::<u64>();

impl Naming {
    pub(super) async fn new(parent: &Process, name: &str) -> Result<Self> {
        check_name(name)?;
        let slots = parent.slots(2, &[name.to_owned()]).await?;
        let buffer = parent.buffer(SIZE).await?;
        Ok(Self { name: name.into(), slots, buffer })
    }

    /// Adds what goes directly before the call that makes the child, which is to be linked to it.
    pub(super) fn prepare(&self, steps: &mut Steps) {
        let from = self.buffer.address();
        let entry = entry(&self.name, kind::CHILD, [0; 3], Tag::new()).to_bytes();
        let args = [self.slots.first, from, entry.len() as u64, 0, 1, 0];
        steps.linked(Call::copy_in(from, entry.to_vec()));
        steps.linked(Call::operation(Operation::Keep, args));
    }

    /// Adds what enters which child it is, whose pid and pidfd are the results at these places. Where
    /// that fails it has its name all the same.
    pub(super) fn enter(&self, steps: &mut Steps, pid: usize, pidfd: usize) {
        let from = self.buffer.address();
        let (stat, at) = (from + STAT, from + PID);
        let details = from + offset_of!(Entry, details) as u64;
        let copy = |to: u64, offset: usize, len: u64| {
            Call::operation(Operation::Copy, [to, stat + offset as u64, len, 0, 0, 0])
        };
        // Also if the pidfd could not be sent to a controller that is gone.
        steps.with(pidfd, Call::syscall(Sysno::fstat, [0, stat, 0, 0, 0, 0]));
        steps.store(at, pid);
        steps.linked(copy(details, STAT_DEV, 16));
        steps.linked(copy(details + 16, STAT_MODE, 4));
        let (slot, clear) = (self.slots.first + 1, self.slots.first + 1);
        // Slots to be freed are counted from 1.
        let args = [slot, from, ENTRY_SIZE as u64, at, 1, clear];
        steps.linked(Call::operation(Operation::Keep, args));
        steps.linked(Call::syscall(Sysno::getpid, [0; 6]));
    }
}
