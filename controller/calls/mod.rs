//! Typed calls, grouped the way man pages group them.
//!
//! A [`Task`] is what calls are made in: one server with its table of descriptors, its address
//! space and its buffers. Every method is a system call of that name; the documentation says what
//! it does in the target process.

pub(crate) mod address;
pub mod arena;
mod bulk;
pub mod chain;
mod credentials;
mod ends;
mod file;
pub mod handle;
mod memory;
mod pidfd;
mod proc;
mod process;
pub(crate) mod registry;
mod rights;
mod shared;
mod socket;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;

pub use address::SocketAddress;
pub(crate) use credentials::exit_group;
pub(crate) use ends::{Ends, ServerFds};
pub use process::WaitStatus;
pub(crate) use process::{SIGINFO_SIZE, pid_of_siginfo, set_pdeathsig, waitid};
pub(crate) use rights::{Message, duplicate, unreceived};
pub use shared::SharedBuffer;
pub use syscalls::Sysno;

pub use crate::proto::table;

use crate::calls::arena::{Arena, Piece};
use crate::calls::handle::{AddressSpace, Fd, FdTable, Mapping, Registry};
use crate::error::{Error, Result};
use crate::link::{Connection, Receipt, Shared};
use crate::proto::batch::{Batch, Part, PartSteps, Places};
use crate::proto::{Call, Reply};

/// What calls are made in.
pub struct Task {
    /// For calls of this task's tenure: see [`Task::renewed`].
    pub(crate) connection: Connection,
    /// For others' calls.
    any_tenure: Connection,
    pub(crate) space: Arc<AddressSpace>,
    pub(crate) arena: Arena,
    /// Memory that the task shares with this process, and what is free of it.
    shared: RwLock<Option<(Arc<Shared>, Arena)>>,
    pub(crate) ends: Arc<Ends>,
    guardian: RwLock<Guardian>,
    registry: Arc<Registry>,
    pipes: bulk::Pipes,
}

/// What a task's life depends on.
#[derive(Clone, Debug)]
pub(crate) enum Guardian {
    /// Nobody's: persistent, or attached to as such.
    None,
    /// The parent behind this pidfd, by way of the parent-death signal.
    Parent(Arc<std::os::fd::OwnedFd>),
    /// This process itself.
    Controller,
}

/// Memory of the target process for the buffers of a call.
#[derive(Debug)]
pub(crate) enum Buffer {
    Arena(Piece),
    /// In memory that this process shares, as long as that is used.
    Shared(Piece, Arc<Shared>),
    Mapped(Mapping),
}

impl Buffer {
    pub(crate) fn address(&self) -> u64 {
        match self {
            Self::Arena(piece) | Self::Shared(piece, _) => piece.address(),
            Self::Mapped(mapping) => mapping.address(),
        }
    }

    /// The memory that this process has too, if it is in such.
    pub(crate) fn shared(&self) -> Option<&Arc<Shared>> {
        match self {
            Self::Shared(_, memory) => Some(memory),
            Self::Arena(_) | Self::Mapped(_) => None,
        }
    }
}

impl Task {
    pub(crate) fn new(
        connection: &Connection,
        space: Arc<AddressSpace>,
        arena: Arena,
        ends: Arc<Ends>,
        guardian: Guardian,
    ) -> Self {
        Self {
            connection: connection.of_this_tenure(),
            any_tenure: connection.clone(),
            space,
            arena,
            shared: RwLock::new(None),
            ends,
            guardian: RwLock::new(guardian),
            registry: Arc::default(),
            pipes: bulk::Pipes::default(),
        }
    }

    /// What calls are made in from here on, where another controller has held the process: with nothing
    /// that was known before, and `arena` for buffers.
    pub(crate) fn renewed(&self, arena: Arena) -> Self {
        let (space, ends) = (self.space.clone(), self.ends.clone());
        Self::new(&self.any_tenure, space, arena, ends, self.guardian())
    }

    /// The tenure of this task is over: what it held for later calls is given up.
    pub(crate) fn end_tenure(&self) {
        self.forget_shared();
        self.pipes.forget();
    }

    /// The table of descriptors that the task uses now.
    #[must_use]
    pub fn table(&self) -> Arc<FdTable> {
        self.ends.table()
    }

    /// The table that the task uses, in which nothing comes or goes unaccounted for until the guard
    /// is dropped.
    pub(crate) async fn quiet_table(&self) -> (Arc<FdTable>, OwnedMutexGuard<()>) {
        self.ends.quiet_table().await
    }

    /// The task has another table from here on.
    pub(crate) fn set_table(&self, table: Arc<FdTable>) {
        self.ends.set_table(table);
    }

    /// Buffers are taken from there from here on, where there is room. What was taken from other
    /// memory stays valid.
    pub(crate) fn set_shared(&self, memory: &Arc<Shared>) {
        let (base, size) = memory.arena();
        let shared = Some((memory.clone(), Arena::new(base, size)));
        let mut place = self.shared.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *place, shared);
        drop(place);
        // Outside of the lock: it may make a call.
        drop(before);
    }

    /// Whether this process shares the memory at that address.
    pub(crate) fn shares(&self, address: u64) -> bool {
        let shared = self.shared.read().unwrap_or_else(PoisonError::into_inner);
        shared.as_ref().is_some_and(|(memory, _)| {
            let (base, size) = memory.arena();
            (base..base + size as u64).contains(&address)
        })
    }

    /// No buffers are taken from memory that this process shares from here on.
    pub(crate) fn forget_shared(&self) {
        let before = self.shared.write().unwrap_or_else(PoisonError::into_inner).take();
        // Outside of the lock: it may make a call.
        drop(before);
    }

    /// What the task's life depends on now.
    pub(crate) fn guardian(&self) -> Guardian {
        self.guardian.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The task's life depends on nobody's from here on.
    pub(crate) fn set_free(&self) {
        *self.guardian.write().unwrap_or_else(PoisonError::into_inner) = Guardian::None;
    }

    /// The connection, for calls of one's own. What these name is for their maker to know, also after
    /// another controller has held the process: only what waits or is under way then is not executed.
    #[must_use]
    #[expect(clippy::misnamed_getters, reason = "the field of that name is for typed calls")]
    pub fn connection(&self) -> &Connection {
        &self.any_tenure
    }

    /// Makes a system call with these arguments in the target process and returns its result.
    ///
    /// Nothing is checked: a call that unmaps the server or its buffers breaks the process. The
    /// typed methods keep descriptors, memory and credentials in order; this one does not. See
    /// syscalls(2).
    ///
    /// # Errors
    ///
    /// The errno of the call, or what became of the connection.
    pub async fn syscall(&self, number: Sysno, args: [u64; 6]) -> Result<u64> {
        self.connection.ready().await;
        self.connection.call_alone(number.name(), Call::syscall(number, args)).await
    }

    /// [`Task::syscall`] of a call that is interrupted if it is not complete within `limit`: it has
    /// returned EINTR then, as if a signal had come that has a handler, or had not begun.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`], else as of [`Task::syscall`]; [`Error::NotInterruptible`] if the process
    /// has no memory in common with this one, see [`Process::enter_ring`](crate::Process::enter_ring).
    pub async fn syscall_within(
        &self,
        limit: Duration,
        number: Sysno,
        args: [u64; 6],
    ) -> Result<u64> {
        let call = Call::syscall(number, args);
        self.connection.call_within(limit, number.name(), call).await
    }

    /// [`Task::syscall`], awaited on this thread: the fastest way to make a call. See
    /// [`Connection::call_blocking`].
    ///
    /// # Errors
    ///
    /// As of [`Task::syscall`].
    pub fn syscall_blocking(&self, number: Sysno, args: [u64; 6]) -> Result<u64> {
        self.connection.call_blocking(number.name(), &Call::syscall(number, args))
    }

    /// A handle to descriptor `number` of the target process, which is open there: one whose
    /// number came from a raw call, or from an earlier controller.
    ///
    /// # Errors
    ///
    /// For a descriptor that the server itself runs on.
    pub fn adopt_fd(&self, number: i32) -> Result<Fd> {
        self.table().adopt(number)
    }

    /// A handle, in this task's table, to the same number as `fd` has in its own: for a table that
    /// was copied from the other, by a clone or by unshare(2).
    ///
    /// # Errors
    ///
    /// For a descriptor that the server itself runs on.
    pub fn inherited_fd(&self, fd: &Fd) -> Result<Fd> {
        self.table().adopt(fd.number())
    }

    /// The number of a descriptor, if it belongs to this task and is not stale.
    pub(crate) fn number(&self, fd: &Fd) -> Result<u64> {
        fd.number_in(&self.table())
    }

    /// A call whose result is a new descriptor.
    pub(crate) async fn opens(&self, name: &'static str, call: Call) -> Result<Fd> {
        self.connection.ready().await;
        let table = self.table();
        let complete = move |replies: Vec<Reply>| {
            let number = last(&replies)?.value().map_err(Error::call(name))?;
            Ok(table.made(number as i32))
        };
        self.connection.submit(vec![call], complete).await
    }

    /// Sends a batch that is one part, and completes with what `complete` makes of the replies to its
    /// steps: one round trip.
    pub(crate) async fn send<R: Send + 'static>(
        &self,
        batch: Batch,
        complete: impl FnOnce(Vec<Reply>, &PartSteps) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let buffer = match batch.size() {
            0 => {
                self.connection.ready().await;
                None
            }
            size => Some(self.buffer(size).await?),
        };
        self.send_with(batch, buffer, 0, complete).await
    }

    /// The same, with its memory, and the first entry of the registry that is set aside for it.
    pub(crate) fn send_with<R: Send + 'static>(
        &self,
        batch: Batch,
        buffer: impl Into<Option<Buffer>>,
        slot: u64,
        complete: impl FnOnce(Vec<Reply>, &PartSteps) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        let buffer = buffer.into();
        let memory = buffer.as_ref().map_or(0, Buffer::address);
        let Part { calls, steps } = batch.whole(Places { memory, slot });
        self.connection.submit(calls, move |replies| {
            let _buffer = buffer;
            complete(steps.in_order(replies)?, &steps)
        })
    }

    /// Memory for a call: from the arena if there is any left, else from a mapping of its own.
    ///
    /// Before that it waits for room, and so does every call that needs memory; what it submits
    /// with it goes out without waiting again, or many would have memory and wait.
    pub(crate) async fn buffer(&self, size: usize) -> Result<Buffer> {
        self.connection.ready().await;
        let shared = self.shared.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((memory, arena)) = shared
            && let Some(piece) = arena.take(size)
        {
            return Ok(Buffer::Shared(piece, memory));
        }
        match self.arena.take(size) {
            Some(piece) => Ok(Buffer::Arena(piece)),
            None => {
                let permit = self.connection.acquire(size);
                let mapped = self.mmap_anonymous(size, Some(permit)).await;
                Ok(Buffer::Mapped(mapped.map_err(Error::of_preparation)?))
            }
        }
    }

    /// Makes call `name`, one of whose arguments is the address of a copy of `bytes`, and completes
    /// with its value: one round trip.
    pub(crate) async fn call_with(
        &self,
        name: &'static str,
        bytes: Vec<u8>,
        call: impl FnOnce(u64) -> Call,
    ) -> Result<u64> {
        let buffer = self.buffer(bytes.len()).await?;
        let address = buffer.address();
        let mut calls = Vec::with_capacity(2);
        if self.is_bulk(address, bytes.len()) {
            if let Err(bytes) = self.bulk_in(address, bytes).await? {
                calls.push(Call::copy_in(address, bytes));
            }
        } else {
            calls.push(Call::copy_in(address, bytes));
        }
        calls.push(call(address));
        self.connection
            .submit(calls, move |replies| {
                let _buffer = buffer;
                finish(name, &replies)
            })
            .await
    }
}

/// The last reply of a batch.
pub(crate) fn last(replies: &[Reply]) -> Result<&Reply> {
    replies.last().ok_or(Error::Protocol("no reply"))
}

/// The value of call `name`, which is alone in its batch or ends one that began with a COPY_IN.
pub(crate) fn finish(name: &'static str, replies: &[Reply]) -> Result<u64> {
    if let [first, _, ..] = replies {
        first.value().map_err(Error::call("COPY_IN"))?;
    }
    last(replies)?.value().map_err(Error::call(name))
}

/// A path or name as the kernel takes it.
pub(crate) fn c_string(name: &'static str, text: impl AsRef<[u8]>) -> Result<Vec<u8>> {
    let text = text.as_ref();
    let mut bytes = Vec::with_capacity(text.len() + 1);
    bytes.extend_from_slice(text);
    if bytes.contains(&0) {
        return Err(Error::Call { call: name, errno: nix::errno::Errno::EINVAL });
    }
    bytes.push(0);
    Ok(bytes)
}
