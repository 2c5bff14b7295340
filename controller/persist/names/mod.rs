//! What a persistent process keeps under names, for this controller and for the next one.
//!
//! A name stands in the process's own registry, and is entered there by its server together with the
//! call that makes the resource: so there is no instant at which a controller could die and leave a
//! resource without its name, or a name without its resource.

mod check;
mod seen;
mod unclaimed;

pub use seen::{NameSeen, NamesSeen, names_of};
pub use unclaimed::Unclaimed;

use std::os::fd::{AsFd, BorrowedFd};

use syscalls::Sysno;

use crate::abi::registry::{ENTRY_SIZE, Entry};
use crate::abi::wire::Operation;
use crate::calls::handle::{Fd, Kept, Mapping, Tag, kind};
use crate::calls::last;
use crate::calls::registry::{check_name, details_of, entry};
use crate::error::{Error, Result};
use crate::fault;
use crate::process::{Child, Process};
use crate::proto::Call;
use crate::proto::batch::{Arg, Batch};

/// The most bytes that [`Process::keep_bytes`] keeps under one name.
pub const MAX_BYTES: usize = 64 * 1024;

/// A resource that has a name.
#[derive(Debug)]
pub struct Named {
    /// Its name.
    pub name: String,
    /// Of what kind it is, also where there is nothing of it any more.
    pub kind: Kind,
    /// What it is.
    pub what: Resource,
    /// Whether it is still what it was when it got its name.
    pub state: Sameness,
}

/// What can have a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A descriptor.
    Fd,
    /// A child.
    Child,
    /// Memory.
    Mapping,
    /// Bytes.
    Bytes,
    /// Something that another farcall has kept and this one does not know.
    Unknown(u64),
}

impl Kind {
    /// As an entry of the registry says it.
    fn of(kind: u64) -> Self {
        match kind {
            kind::FD => Self::Fd,
            kind::CHILD => Self::Child,
            kind::MAPPING => Self::Mapping,
            kind::BYTES => Self::Bytes,
            other => Self::Unknown(other),
        }
    }
}

/// What a name stands for. Dropping a handle in here does not give up the resource:
/// [`Process::release`] does.
#[derive(Debug)]
#[non_exhaustive]
pub enum Resource {
    /// A descriptor.
    Fd(Fd),
    /// A child, by its pid in the process's own pid namespace:
    /// [`Process::wait_for_child`] waits for it.
    Child(i32),
    /// Memory.
    Mapping(Mapping),
    /// Bytes.
    Bytes(Vec<u8>),
    /// What there is under that name is not what got it, or this farcall does not know its kind.
    Nothing {
        /// The number that stands there: of a descriptor, a pid, or an address.
        value: u64,
    },
}

/// Whether a resource is still what it was when it got its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sameness {
    /// It is.
    Same,
    /// There is no way to tell.
    Unverified(&'static str),
    /// It is not: what is there instead.
    Changed(String),
}

/// What becomes of a name whose resource is given up.
struct Given {
    slot: u64,
    kept: Kept,
}

impl Process {
    /// Everything that has a name, in the order of the names, each checked whether it is still what
    /// got the name: a descriptor by its device, inode and type (fstat(2)), a child by being a child and by
    /// the inode of its pidfd, memory by being mapped.
    ///
    /// # Errors
    ///
    /// Those of the calls; [`Error::Protocol`] if the process is not persistent.
    pub async fn names(&self) -> Result<Vec<Named>> {
        let process = self.in_this_tenure();
        let mut names = Vec::new();
        for kept in process.kept().await?.into_values() {
            names.push(process.named(kept).await?);
        }
        names.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(names)
    }

    /// What has that name.
    ///
    /// # Errors
    ///
    /// [`Error::Name`] if nothing has; and as of [`Process::names`].
    pub async fn name(&self, name: &str) -> Result<Named> {
        let process = self.in_this_tenure();
        process.named(process.find(name).await?.kept).await
    }

    async fn find(&self, name: &str) -> Result<Given> {
        let mut all = self.kept().await?.into_iter();
        let found = all.find(|(_, kept)| kept.name() == name);
        let (slot, kept) = found.ok_or_else(|| no_such(name))?;
        Ok(Given { slot, kept })
    }

    /// Gives an open descriptor a name: it stays open when its handle is dropped.
    /// [`Chain::keep`](crate::calls::chain::Chain::keep) names one at the instant at which it is opened.
    ///
    /// # Errors
    ///
    /// [`Error::Name`] if the name is taken, or can't be one.
    pub async fn keep_fd(&self, name: &str, fd: &Fd) -> Result<()> {
        let mut chain = self.chain();
        chain.keep(name);
        chain.again(fd);
        chain.run().await.map(drop)
    }

    /// Passes descriptors of this process to the process, where each has its name from the instant on
    /// at which it arrives: see [`Task::send_fds`](crate::calls::Task::send_fds).
    ///
    /// # Errors
    ///
    /// As of [`Process::keep_fd`] and `send_fds`.
    pub async fn keep_sent(&self, fds: &[(&str, BorrowedFd<'_>)]) -> Result<Vec<Fd>> {
        let names: Vec<String> = fds.iter().map(|(name, _)| (*name).into()).collect();
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|(_, fd)| *fd).collect();
        self.send_named_fds(&fds, &names).await
    }

    /// Hands a duplicate of another process's descriptor over to the process, where it has a name from
    /// the instant on at which it arrives, whatever becomes of the other one: a file, a listening
    /// socket, or a [pidfd](crate::calls::Task::exit_status) of the other one's child.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignFd`] if it is not the other one's; and as of [`Process::keep_sent`].
    pub async fn keep_fd_of(&self, name: &str, other: &Process, fd: &Fd) -> Result<Fd> {
        let here = other.fetch_fd(fd).await?;
        let mut fds = self.keep_sent(&[(name, here.as_fd())]).await?;
        fds.pop().ok_or(Error::Protocol("no descriptor has come"))
    }

    /// Gives mapped memory a name: it stays mapped.
    ///
    /// # Errors
    ///
    /// As of [`Process::keep_fd`].
    pub async fn keep_mapping(&self, name: &str, mapping: Mapping) -> Result<()> {
        let details = [mapping.size() as u64, 0, 0];
        let process = self.in_this_tenure();
        mapping.check()?;
        // Where this fails it is unmapped.
        process.keep(name, kind::MAPPING, mapping.address(), details, &[], None).await?;
        // It is the name's now.
        let _ = mapping.into_raw();
        Ok(())
    }

    /// Gives a child a name. Its exit status waits for whoever reaps it: see
    /// [`Process::wait_for_child`].
    ///
    /// # Errors
    ///
    /// As of [`Process::keep_fd`].
    pub async fn keep_child(&self, name: &str, child: &Child) -> Result<()> {
        // Pids are positive.
        let pid = child.pid_in_parent() as u64;
        let details = details_of(child.pidfd())?;
        self.keep(name, kind::CHILD, pid, details, &[], None).await
    }

    /// Keeps bytes under a name, in the place of those that it had: at any instant there are the old
    /// ones or the new ones.
    ///
    /// # Errors
    ///
    /// [`Error::Name`] for more than [`MAX_BYTES`], or if something else has the name.
    pub async fn keep_bytes(&self, name: &str, bytes: &[u8]) -> Result<()> {
        if bytes.len() > MAX_BYTES {
            let reason = "no more than 64 KiB have room under a name";
            return Err(Error::Name { name: name.into(), reason });
        }
        let process = self.in_this_tenure();
        let before = match process.find(name).await {
            Ok(Given { slot, kept }) if kept.entry.kind == kind::BYTES => Some(slot),
            _ => None,
        };
        let len = bytes.len() as u64;
        process.keep(name, kind::BYTES, len, [len, 0, 0], bytes, before).await
    }

    /// Enters something that is there already, and frees entry `clear`, in one tenure.
    async fn keep(
        &self,
        name: &str,
        kind: u64,
        value: u64,
        details: [u64; 3],
        behind: &[u8],
        clear: Option<u64>,
    ) -> Result<()> {
        check_name(name)?;
        let process = self.in_this_tenure();
        let mut bytes = entry(name, kind, details, Tag::new()).to_bytes().to_vec();
        bytes.extend(Kept::parts(behind));
        let mut batch = Batch::default();
        let (source, len) = (batch.input(&bytes), bytes.len() as u64);
        let value = batch.input(&value.to_le_bytes());
        let buffer = process.buffer(batch.size()).await?;
        // What is replaced has the name, and loses it at the same instant.
        let names = if clear.is_some() { Vec::new() } else { vec![name.to_owned()] };
        let slots = process.slots(len / ENTRY_SIZE as u64, &names).await?;
        let clear = Arg::from(clear.map_or(0, |slot| slot + 1));
        fault::point("keep.prepared");
        let keep = [Arg::Slot(0), source, len.into(), 0.into(), 1.into(), clear];
        let keep = batch.operation(Operation::Keep, keep);
        batch.step_mut(keep).keeps = true;
        // Its result is the value.
        let loaded = batch.operation(Operation::Load, [value, 8.into()]);
        let first = slots.first;
        let kept = process.send_with(batch, buffer, first, move |replies, steps| {
            let _used = slots;
            steps.failed(&replies, keep..loaded + 1).map_or(Ok(()), Err)
        });
        fault::point("keep.sent");
        kept.await?;
        fault::point("keep.done");
        Ok(())
    }

    /// Gives up what has that name, together with the name: close(2) of a descriptor, munmap(2) of
    /// memory. A child and bytes just lose their name.
    ///
    /// # Errors
    ///
    /// [`Error::Name`] if nothing has that name, if a handle to the descriptor is still in use, or if it
    /// is not the one that got the name; those of the call.
    pub async fn release(&self, name: &str) -> Result<()> {
        let process = self.in_this_tenure();
        let given = process.find(name).await?;
        let value = given.kept.entry.value;
        let (call_name, call) = match given.kept.entry.kind {
            kind::FD if process.table().has_handle(value as i32) => {
                let reason = "a handle to the descriptor is in use: drop it first";
                return Err(Error::Name { name: name.into(), reason });
            }
            kind::FD if process.has_changed(&given.kept).await? => {
                let reason = "it is not what got the name any more: forget the name";
                return Err(Error::Name { name: name.into(), reason });
            }
            kind::FD => ("close", Call::syscall(Sysno::close, [value, 0, 0, 0, 0, 0])),
            kind::MAPPING => {
                let size = given.kept.entry.details[0];
                ("munmap", Call::syscall(Sysno::munmap, [value, size, 0, 0, 0, 0]))
            }
            _ => ("getpid", Call::syscall(Sysno::getpid, [0; 6])),
        };
        process.give_up(given, call_name, call).await
    }

    /// Whether what has a name is not what got it, before it is given up.
    async fn has_changed(&self, kept: &Kept) -> Result<bool> {
        let state = self.check(kept).await.map_err(Error::of_preparation)?;
        Ok(matches!(state, Sameness::Changed(_)))
    }

    /// Takes the name away and leaves what had it as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Name`] if nothing has that name.
    pub async fn forget(&self, name: &str) -> Result<()> {
        let process = self.in_this_tenure();
        let given = process.find(name).await?;
        process.give_up(given, "getpid", Call::syscall(Sysno::getpid, [0; 6])).await
    }

    async fn give_up(&self, given: Given, name: &'static str, call: Call) -> Result<()> {
        let clear = Call::operation(Operation::Keep, [0, 0, 0, 0, 0, given.slot + 1]);
        let (registry, table) = (self.registry().clone(), self.table());
        let Entry { kind, value, .. } = given.kept.entry;
        registry.changes();
        fault::point("release.found");
        let given_up = self.connection.submit(vec![clear, call.linked()], move |replies| {
            registry.changes();
            if let [cleared, ..] = replies.as_slice() {
                cleared.value().map_err(Error::call("KEEP"))?;
            }
            last(&replies)?.value().map_err(Error::call(name))?;
            if kind == kind::FD {
                table.unname(value as i32);
            }
            Ok(())
        });
        fault::point("release.sent");
        given_up.await?;
        fault::point("release.done");
        Ok(())
    }
}

fn no_such(name: &str) -> Error {
    Error::Name { name: name.into(), reason: "the process has nothing of that name" }
}
