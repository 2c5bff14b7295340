//! Names for what a chain opens, in the registry of a persistent process.
//!
//! ```text
//!   KEEP entry 0   openat   fstat   COPY what it is into entry 1   KEEP entry 1, free 0   dup2
//!                    │                                                                    │
//!                    └ named from here on                          what it is, is known ──┘
//! ```
//! dup2(2) of a descriptor to itself changes nothing and returns it: the call that the second KEEP
//! is about.

use std::mem::offset_of;

use syscalls::Sysno;

use super::{Arg, Chain, Later};
use crate::abi::registry::{ENTRY_SIZE, Entry};
use crate::abi::wire::Operation;
use crate::calls::handle::{Fd, Tag, kind};
use crate::calls::registry::{STAT_DEV, STAT_MODE, STAT_SIZE, check_name, entry};
use crate::error::Error;
use crate::proto::batch;
use crate::proto::batch::Makes;

impl Chain<'_> {
    /// What the next call opens has that name in the process's registry from the instant on at which
    /// it is open: whatever becomes of this controller, the next one finds it by its name. It stays
    /// open when its handle is dropped, also if a later call of the chain fails.
    ///
    /// A pipe needs two names: call this twice.
    pub fn keep(&mut self, name: impl Into<String>) -> &mut Self {
        let name = name.into();
        if let Err(error) = check_name(&name) {
            self.refuse(error);
        }
        self.keeping.push(name);
        self
    }

    /// Prepares the registry for a call that opens `count` descriptors, which it leaves in memory at
    /// `from` or returns. Returns the names that they will have.
    pub(super) fn prepare_to_keep(&mut self, count: usize, from: Arg) -> Vec<(String, Tag)> {
        let names = std::mem::take(&mut self.keeping);
        let names: Vec<_> = names.into_iter().map(|name| (name, Tag::new())).collect();
        if names.is_empty() {
            return names;
        }
        if names.len() != count {
            self.refuse(Error::misuse(
                "another number of names than of descriptors that the next call opens",
                "call Chain::keep once for each of them",
            ));
        }
        let entry = |(name, tag): &(String, Tag)| entry(name, kind::FD, [0; 3], *tag).to_bytes();
        let entries: Vec<u8> = names.iter().flat_map(entry).collect();
        let source = self.input(entries);
        let slot = self.own(batch::Arg::Slot(self.slots));
        self.push_keep(slot, source, count * ENTRY_SIZE, from, count, 0.into());
        names
    }

    /// The call that was prepared for has been added: `fds` are what it opens.
    pub(super) fn keep_opened(&mut self, names: Vec<(String, Tag)>, fds: &[Later<Fd>]) {
        if names.is_empty() {
            return;
        }
        let linked = std::mem::replace(&mut self.linked, true);
        let count = fds.len() as u64;
        for ((i, fd), (name, tag)) in (0..).zip(fds).zip(&names) {
            self.batch.step_mut(fd.step).makes = Makes::NamedFd(*tag);
            let stat = self.output(STAT_SIZE);
            let fd = Arg::from(*fd);
            let zero = Arg::from(0);
            self.syscall(Sysno::fstat, [fd, stat, zero, zero, zero, zero]);
            let bytes = self.input(entry(name, kind::FD, [0; 3], *tag).to_bytes());
            let details = bytes.offset(offset_of!(Entry, details));
            self.copy(details, stat.offset(STAT_DEV), 16);
            self.copy(details.offset(16), stat.offset(STAT_MODE), 4);
            let [before, slot] = [0, count].map(|offset| self.slots + offset + i);
            // Counted from 1.
            let clear = self.own(batch::Arg::Slot(before + 1));
            self.push_keep(self.own(batch::Arg::Slot(slot)), bytes, ENTRY_SIZE, 0.into(), 1, clear);
            self.syscall(Sysno::dup2, [fd, fd, zero, zero, zero, zero]);
        }
        self.slots += 2 * count;
        self.names.extend(names.into_iter().map(|(name, _)| name));
        self.linked = linked;
    }

    /// KEEP. What is added next is what it is about.
    fn push_keep(
        &mut self,
        slot: Arg,
        source: Arg,
        len: usize,
        from: Arg,
        count: usize,
        clear: Arg,
    ) {
        let args = [slot, source, (len as u64).into(), from, (count as u64).into(), clear];
        let step = self.operation("KEEP", Operation::Keep, args);
        self.batch.step_mut(step).keeps = true;
    }
}
