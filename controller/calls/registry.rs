//! The registry of a persistent process: reading it, making it larger, and naming what there is.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::libc;
use nix::sys::stat::fstat;
use syscalls::Sysno;

use super::{Task, last};
use crate::abi::registry::{ENTRY_SIZE, Entry, NAME_SIZE};
use crate::abi::wire::Operation;
use crate::calls::handle::{FdTable, Kept, Registry, Slots, Tag, Unready, kind};
use crate::error::{Error, Result};
use crate::fault;
use crate::link::Connection;
use crate::proto::batch::{Arg, Batch};
use crate::proto::{Call, Reply};

/// Where registries lie: each process has one address for it, by its pid, so that one that was made
/// larger by a controller that died meanwhile is not in anybody's way.
const REGISTRIES: u64 = 0x3000_0000_0000;
/// Bytes of a registry at most.
const MOST: u64 = 4 << 20;
/// Entries of one that is new.
const FIRST: u64 = 64;

/// Bytes of struct stat, and where in it lie st_dev with st_ino behind it, and st_mode.
pub(crate) const STAT_SIZE: usize = size_of::<libc::stat>();
pub(crate) const STAT_DEV: usize = offset_of!(libc::stat, st_dev);
pub(crate) const STAT_MODE: usize = offset_of!(libc::stat, st_mode);

const _: () = assert!(offset_of!(libc::stat, st_ino) == STAT_DEV + 8);

/// The descriptors that have names, with the tags of their entries.
pub(crate) fn tags_of(kept: &BTreeMap<u64, Kept>) -> BTreeMap<i32, Tag> {
    let fds = kept.values().filter(|kept| kept.entry.kind == kind::FD);
    fds.map(|kept| (kept.entry.value as i32, Tag::of(&kept.entry))).collect()
}

/// Whether a resource can have that name.
pub(crate) fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > NAME_SIZE || name.contains('\0') {
        let reason = "a name has 1 to 48 bytes, none of them zero";
        return Err(Error::Name { name: name.into(), reason });
    }
    Ok(())
}

/// An entry that is prepared.
pub(crate) fn entry(name: &str, kind: u64, details: [u64; 3], tag: Tag) -> Entry {
    let mut bytes = [0; NAME_SIZE];
    // The name was checked, or its chain is not run.
    let len = name.len().min(NAME_SIZE);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    let state = Entry::FREE;
    Entry { value: 0, state, kind, details, name: bytes, user: tag.to_user() }
}

/// What a descriptor of this process is open on, for an entry: device, inode and mode. The inode of a
/// pidfd is the process's, in every process.
pub(crate) fn details_of(fd: impl AsFd) -> Result<[u64; 3]> {
    let stat = fstat(fd).map_err(Error::local("fstat"))?;
    Ok([stat.st_dev, stat.st_ino, u64::from(stat.st_mode)])
}

/// Entries that are set aside for descriptors that the next call makes, until the replies are here.
pub(super) struct Keeping {
    pub(super) slots: Slots,
    entries: Vec<u8>,
    pub(super) tags: Vec<Tag>,
    count: u64,
}

impl Keeping {
    /// For duplicates of descriptors of this process: what they are is known beforehand.
    pub(super) async fn new(task: &Task, fds: &[BorrowedFd<'_>], names: &[String]) -> Result<Self> {
        if fds.len() != names.len() {
            return Err(Error::misuse(
                "another number of names than of descriptors",
                "each descriptor that is sent gets one name",
            ));
        }
        let mut entries = Vec::new();
        let tags: Vec<Tag> = names.iter().map(|_| Tag::new()).collect();
        for ((fd, name), tag) in fds.iter().zip(names).zip(&tags) {
            check_name(name)?;
            entries.extend(entry(name, kind::FD, details_of(fd)?, *tag).to_bytes());
        }
        let count = names.len() as u64;
        let slots = task.slots(count, names).await?;
        Ok(Self { slots, entries, tags, count })
    }

    /// Adds what goes directly before the call that leaves the descriptors' numbers at `from`.
    pub(super) fn prepare(&self, batch: &mut Batch, from: Arg) {
        let source = batch.input(&self.entries);
        let len = Arg::from(self.entries.len() as u64);
        let args = [Arg::Slot(0), source, len, from, self.count.into()];
        let keep = batch.operation(Operation::Keep, args);
        batch.step_mut(keep).keeps = true;
    }

    /// Frees the entries: fewer descriptors have come. Nobody waits for that.
    pub(super) fn give_up(self, connection: &Connection) {
        let slots = self.slots.first..self.slots.first + self.count;
        let calls = slots.flat_map(|slot| {
            let clear = Call::operation(Operation::Keep, [0, 0, 0, 0, 0, slot + 1]);
            [clear, Call::syscall(Sysno::getpid, [0; 6])]
        });
        drop(connection.submit_soon(calls.collect(), move |_| {
            drop(self);
            Ok(())
        }));
    }
}

impl Task {
    pub(crate) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Sets entries aside for resources of these names, once what is in the registry is known.
    pub(crate) async fn slots(&self, count: u64, names: &[String]) -> Result<Slots> {
        self.connection.needs_read_ahead("a name")?;
        let _turn = self.registry.turn.lock().await;
        loop {
            match self.registry.prepare(count, names) {
                Ok(slots) => return Ok(slots),
                Err(unready) => {
                    self.ready(unready, count).await.map_err(Error::of_preparation)?;
                }
            }
        }
    }

    /// What is in the registry.
    pub(crate) async fn kept(&self) -> Result<BTreeMap<u64, Kept>> {
        let _turn = self.registry.turn.lock().await;
        loop {
            match self.registry.kept() {
                Ok(kept) => return Ok(kept),
                Err(unready) => self.ready(unready, 0).await.map_err(Error::of_preparation)?,
            }
        }
    }

    async fn ready(&self, unready: Unready, count: u64) -> Result<()> {
        match unready {
            Unready::Disabled => Err(Error::misuse(
                "a name in a process that is not persistent",
                "make it persistent first (Process::make_persistent): names are for the next controller",
            )),
            Unready::Taken(name) => {
                Err(Error::Name { name, reason: "the process has something of that name" })
            }
            Unready::Unread { address, len } => {
                let (calls, read) = self.reading(address, len, Some(self.table()));
                self.connection.submit(calls, read).await
            }
            Unready::Full { address, capacity } => self.enlarge(address, capacity, count).await,
        }
    }

    /// The call that reads the registry, and what takes it in: descriptors with names are closed by
    /// nobody else then, if they are of `table`.
    pub(crate) fn reading(
        &self,
        address: u64,
        len: usize,
        table: Option<Arc<FdTable>>,
    ) -> (Vec<Call>, impl FnOnce(Vec<Reply>) -> Result<()> + Send + 'static) {
        let registry = self.registry.clone();
        let read = move |mut replies: Vec<Reply>| {
            let reply = replies.pop().ok_or(Error::Protocol("no reply"))?;
            reply.value().map_err(Error::call("COPY_OUT"))?;
            if reply.data.len() < len {
                return Err(Error::Fault { address, len });
            }
            registry.read(&reply.data);
            if let (Some(table), Ok(kept)) = (table, registry.kept()) {
                table.set_named(tags_of(&kept));
            }
            Ok(())
        };
        (vec![Call::copy_out(address, len)], read)
    }

    /// Makes the registry larger, in place, or a new one.
    async fn enlarge(&self, address: u64, capacity: u64, count: u64) -> Result<()> {
        let pid = self.getpid().await?;
        let (address, capacity) = match address {
            0 => (REGISTRIES + u64::from(pid.unsigned_abs()) * MOST, 0),
            address => (address, capacity),
        };
        let entries = (2 * capacity).max(FIRST).max((capacity + count).next_power_of_two());
        if entries * ENTRY_SIZE as u64 > MOST {
            let reason = "the registry is full: give some of the names up";
            return Err(Error::Name { name: String::new(), reason });
        }
        let end = capacity * ENTRY_SIZE as u64;
        let size = entries * ENTRY_SIZE as u64 - end;
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        // What is there is of a controller that died before it could say so.
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
        let map = [address + end, size, protection, flags, u64::MAX, 0];
        if fault::is_next("registry.mapped") {
            // Half of the batch is all that the process hears.
            self.connection.call("mmap", Call::syscall(Sysno::mmap, map)).await?;
        }
        fault::point("registry.mapped");
        let calls = vec![
            Call::syscall(Sysno::mmap, map),
            Call::operation(Operation::Registry, [address, entries, 0, 0, 0, 0]).linked(),
        ];
        let registry = self.registry.clone();
        let entered = self.connection.submit(calls, move |replies| {
            if let [mapped, ..] = replies.as_slice() {
                mapped.value().map_err(Error::call("mmap"))?;
            }
            last(&replies)?.value().map_err(Error::call("REGISTRY"))?;
            registry.entered(address, entries);
            Ok(())
        });
        fault::point("registry.sent");
        entered.await?;
        fault::point("registry.entered");
        Ok(())
    }
}
