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
use crate::abi::registry::{ENTRY_SIZE, Entry};
use crate::abi::wire::Operation;
use crate::calls::handle::{Slots, Tag, kind};
use crate::calls::registry::{STAT_DEV, STAT_MODE, STAT_SIZE, check_name, entry};
use crate::error::Result;
use crate::proto::batch::{Arg, Batch};

/// Two entries of the registry that are set aside for a child, until the replies are here.
pub(super) struct Naming {
    name: String,
    slots: Slots,
}

impl Naming {
    /// How much of a batch's memory it takes, at most: an entry, a struct stat, and the pid.
    pub(super) const SIZE: usize = ENTRY_SIZE + STAT_SIZE.next_multiple_of(8) + size_of::<u64>();

    pub(super) async fn new(parent: &Process, name: &str) -> Result<Self> {
        check_name(name)?;
        let slots = parent.slots(2, &[name.to_owned()]).await?;
        Ok(Self { name: name.into(), slots })
    }

    /// The first of the entries.
    pub(super) fn slot(&self) -> u64 {
        self.slots.first
    }

    /// Adds what goes directly before the call that makes the child, which is to be linked to it. Returns
    /// where the entry lies.
    pub(super) fn prepare(&self, batch: &mut Batch) -> Arg {
        let entry = entry(&self.name, kind::CHILD, [0; 3], Tag::new()).to_bytes();
        let at = batch.input(&entry);
        let result = Arg::from(0);
        keep(batch, [Arg::Slot(0), at, result, 0.into()]);
        at
    }

    /// Adds what enters which child it is, whose pid and pidfd are the results of these steps. Where that
    /// fails it has its name all the same.
    pub(super) fn enter(batch: &mut Batch, entry: Arg, pid: usize, pidfd: usize) {
        let (stat, at) = (batch.output(STAT_SIZE), batch.output(size_of::<u64>()));
        let details = entry.offset(offset_of!(Entry, details));
        // Also if the pidfd could not be sent to a controller that is gone.
        let looked = batch.syscall(Sysno::fstat, [Arg::Result(pidfd), stat]);
        batch.unlink(looked);
        batch.operation(Operation::Store, [at, 8.into(), Arg::Result(pid)]);
        batch.operation(Operation::Copy, [details, stat.offset(STAT_DEV), 16.into()]);
        batch.operation(Operation::Copy, [details.offset(16), stat.offset(STAT_MODE), 4.into()]);
        // The second entry. The first one, counted from 1, is freed.
        keep(batch, [Arg::Slot(1), entry, at, Arg::Slot(1)]);
        batch.syscall(Sysno::getpid, []);
    }
}

/// KEEP of one entry: where it is entered, what, where the value is, and which entry is freed.
fn keep(batch: &mut Batch, [slot, entry, from, clear]: [Arg; 4]) {
    let len = Arg::from(ENTRY_SIZE as u64);
    let keep = batch.operation(Operation::Keep, [slot, entry, len, from, 1.into(), clear]);
    batch.step_mut(keep).keeps = true;
}
