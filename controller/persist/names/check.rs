//! Whether what has a name is still what got it.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;
use nix::libc;
use syscalls::Sysno;

use super::{Kind, Named, Resource, Sameness};
use crate::abi::registry::Entry;
use crate::calls::Task;
use crate::calls::handle::{Kept, Mapping, Tag, kind};
use crate::error::{Error, Result};
use crate::process::Process;
use crate::proto::Call;

/// PID_FS_MAGIC of linux/magic.h, which libc does not have.
pub(super) const PIDFS_MAGIC: i64 = 0x5049_4446;

/// What a descriptor is open on: device, inode and type.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    kind: u32,
}

impl Identity {
    pub(super) fn of(device: u64, inode: u64, mode: u64) -> Self {
        Self { device, inode, kind: mode as u32 & libc::S_IFMT }
    }

    /// From a struct stat.
    fn of_stat(bytes: &[u8]) -> Self {
        let field = |at: usize| {
            let bytes = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
            bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        Self::of(
            field(std::mem::offset_of!(libc::stat, st_dev)),
            field(std::mem::offset_of!(libc::stat, st_ino)),
            field(std::mem::offset_of!(libc::stat, st_mode)) & u64::from(u32::MAX),
        )
    }

    /// From what stands in an entry, if anything does.
    fn of_details([device, inode, mode]: [u64; 3]) -> Option<Self> {
        ([device, inode, mode] != [0; 3]).then(|| Self::of(device, inode, mode))
    }

    /// Whether it is an anonymous inode, or one of pidfs.
    pub(super) fn has_no_type(&self) -> bool {
        self.kind == 0
    }

    /// Whether it is what an entry says; of anonymous inodes that means nothing.
    pub(super) fn compared(&self, details: [u64; 3]) -> Sameness {
        match Self::of_details(details) {
            None => Sameness::Unverified("nobody wrote down what it was"),
            Some(before) if before != *self => {
                Sameness::Changed(format!("it was {before}, and is {self}"))
            }
            Some(_) => Sameness::Same,
        }
    }
}

/// Bytes of a struct stat and a struct statfs.
const STAT_SIZE: usize = size_of::<libc::stat>();
const STATFS_SIZE: usize = size_of::<libc::statfs>();
/// So many descriptors are looked at together.
const AT_ONCE: usize = 16;

/// Whether a struct statfs is of the file system that has an inode for each process (Linux 6.9).
fn is_pidfs(statfs: &[u8]) -> bool {
    // f_type is the first of its fields.
    statfs.first_chunk().is_some_and(|bytes| i64::from_le_bytes(*bytes) == PIDFS_MAGIC)
}

/// What is said of them.
pub(super) const ANONYMOUS: Sameness = Sameness::Unverified("all anonymous inodes are one");
/// What is said of a child where pidfds are anonymous inodes.
pub(super) const CHILDREN_ALIKE: Sameness =
    Sameness::Unverified("before Linux 6.9 nobody can tell children of one pid apart");
/// What is said of mapped memory.
pub(super) const MAPPED: Sameness =
    Sameness::Unverified("memory is mapped there; by whom, nobody can tell");

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { device, inode, kind } = *self;
        let kind = match kind {
            libc::S_IFREG => "file",
            libc::S_IFDIR => "directory",
            libc::S_IFSOCK => "socket",
            libc::S_IFIFO => "pipe",
            libc::S_IFCHR => "character device",
            libc::S_IFBLK => "block device",
            libc::S_IFLNK => "symbolic link",
            _ => "anonymous inode",
        };
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        write!(f, "{kind} {inode} of device {major}:{minor}")
    }
}

impl Process {
    /// A taken entry as a handle, and whether it is what it was.
    pub(super) async fn named(&self, kept: Kept) -> Result<Named> {
        let name = kept.name();
        let Entry { value, kind, details, .. } = kept.entry;
        let state = self.check(&kept).await?;
        let nothing = Resource::Nothing { value };
        let what = match (kind, &state) {
            (_, Sameness::Changed(_)) => nothing,
            (kind::FD, _) => {
                let number = value as i32;
                self.table().name(number, Tag::of(&kept.entry));
                Resource::Fd(self.adopt_fd(number)?)
            }
            (kind::CHILD, _) => Resource::Child(value as i32),
            (kind::MAPPING, _) => {
                let size = usize::try_from(details[0]).unwrap_or(usize::MAX);
                Resource::Mapping(Mapping::kept(&self.space, value, size))
            }
            (kind::BYTES, _) => Resource::Bytes(kept.bytes),
            _ => nothing,
        };
        Ok(Named { name, kind: Kind::of(kind), what, state })
    }

    /// Whether what is there is what got the name.
    pub(super) async fn check(&self, kept: &Kept) -> Result<Sameness> {
        let Entry { value, kind, details, .. } = kept.entry;
        match kind {
            // Where the one that got the name was closed, the server may have taken its number.
            kind::FD if self.server_descriptors().contains(&(value as i32)) => {
                Ok(Sameness::Changed(format!("descriptor {value} is the server's own")))
            }
            kind::FD => self.check_fd(value, details).await,
            kind::CHILD => self.check_child(value, details).await,
            kind::MAPPING => self.check_mapping(value, details[0]).await,
            kind::BYTES => Ok(Sameness::Same),
            other => {
                let what = format!("of kind {other}, which this farcall does not know");
                Ok(Sameness::Changed(what))
            }
        }
    }

    async fn check_fd(&self, number: u64, details: [u64; 3]) -> Result<Sameness> {
        let mut chain = self.chain();
        let stat = chain.output(STAT_SIZE);
        chain.syscall(Sysno::fstat, [number.into(), stat, 0.into(), 0.into(), 0.into(), 0.into()]);
        let bytes = chain.copy_out(stat, STAT_SIZE as u64);
        let bytes = match chain.run().await {
            Ok(mut done) => done.bytes(bytes)?,
            Err(Error::Chain(error)) if error.errno == Errno::EBADF => {
                return Ok(Sameness::Changed(format!("descriptor {number} is not open")));
            }
            Err(error) => return Err(error),
        };
        let now = Identity::of_stat(&bytes);
        let state = now.compared(details);
        if state == Sameness::Same && now.kind == 0 && !self.is_on_pidfs(number).await? {
            return Ok(ANONYMOUS);
        }
        Ok(state)
    }

    /// Whether a descriptor is a pidfd of a kernel that has an inode for each process (Linux 6.9).
    async fn is_on_pidfs(&self, number: u64) -> Result<bool> {
        let call = |at| Call::syscall(Sysno::fstatfs, [number, at, 0, 0, 0, 0]);
        self.call_fills("fstatfs", STATFS_SIZE, call, |bytes| is_pidfs(&bytes)).await
    }

    /// Which of the descriptors that have handles here still have the names that they had, and are what
    /// got these, after another controller has held the process: what can't be told apart is not among
    /// them, nor is what its server uses (`own`). `kept` is what is in the registry now. In a pause of the
    /// caller's, by the `task` of the tenure that is about to begin.
    pub(in crate::persist) async fn still_named(
        &self,
        task: &Task,
        kept: &BTreeMap<u64, Kept>,
        own: &BTreeSet<i32>,
    ) -> Result<BTreeSet<i32>> {
        let entry_of = |(number, tag): (i32, Tag)| {
            let entries = kept.values().map(|kept| &kept.entry);
            let mut of_it = entries.filter(|entry| entry.kind == kind::FD && tag.is_of(entry));
            let same = of_it.find(|entry| entry.value == number as u64)?;
            Some((number, Identity::of_details(same.details)?))
        };
        let named = self.table().named_handles().into_iter().filter_map(entry_of);
        let named: Vec<(i32, Identity)> =
            named.filter(|(number, _)| !own.contains(number)).collect();
        let mut same = BTreeSet::new();
        for some in named.chunks(AT_ONCE) {
            let buffer = task.arena.take(STAT_SIZE + STATFS_SIZE).ok_or(Error::Gone)?;
            let at = buffer.address();
            let calls = some.iter().flat_map(|(number, _)| {
                let [stat, statfs] =
                    [(Sysno::fstat, 0), (Sysno::fstatfs, STAT_SIZE)].map(|(call, offset)| {
                        Call::syscall(call, [*number as u64, at + offset as u64, 0, 0, 0, 0])
                    });
                [stat, statfs, Call::copy_out(at, STAT_SIZE + STATFS_SIZE)]
            });
            let looked = task.connection.submit_first(calls.collect(), move |replies| {
                let _buffer = buffer;
                Ok(replies)
            });
            for ((number, before), replies) in some.iter().zip(looked.await?.chunks_exact(3)) {
                let (stat, statfs) =
                    replies[2].data.split_at_checked(STAT_SIZE).unwrap_or_default();
                let is_open = replies[..2].iter().all(|reply| reply.value().is_ok());
                let can_be_told = before.kind != 0 || is_pidfs(statfs);
                if is_open && can_be_told && Identity::of_stat(stat) == *before {
                    same.insert(*number);
                }
            }
        }
        Ok(same)
    }

    /// A pid is not used anew before the process reaps its child; then it can become another child's.
    async fn check_child(&self, pid: u64, details: [u64; 3]) -> Result<Sameness> {
        let gone = || Ok(Sameness::Changed(format!("{pid} is no child: it has been reaped")));
        match self.child_state(pid as i32).await {
            Err(Error::Call { errno: Errno::ECHILD, .. }) => return gone(),
            state => drop(state?),
        }
        if details == [0; 3] {
            return Ok(Sameness::Unverified("nobody wrote down which child it was"));
        }
        let pidfd = match self.open_child(pid as i32).await {
            Err(Error::Call { errno: Errno::ESRCH, .. }) => return gone(),
            Err(Error::Call { .. }) => {
                return Ok(Sameness::Unverified("there can be no pidfd of it, to see which it is"));
            }
            pidfd => pidfd?,
        };
        let state = self.check_fd(self.number(&pidfd)?, details).await?;
        Ok(match state {
            Sameness::Changed(_) => {
                Sameness::Changed(format!("{pid} is another child: the one that was is reaped"))
            }
            Sameness::Unverified(_) => CHILDREN_ALIKE,
            Sameness::Same => Sameness::Same,
        })
    }

    async fn check_mapping(&self, address: u64, size: u64) -> Result<Sameness> {
        let args = [address, size, libc::MS_ASYNC as u64, 0, 0, 0];
        match self.syscall(Sysno::msync, args).await {
            Ok(_) => Ok(MAPPED),
            Err(Error::Call { errno: Errno::ENOMEM, .. }) => {
                Ok(Sameness::Changed("not all of it is mapped".into()))
            }
            Err(error) => Err(error),
        }
    }
}
