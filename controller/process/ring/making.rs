//! The calls that give a server a ring, as one batch, and what their replies mean.
//!
//! The memory and the bells come as a message; later calls of the batch use what it has left in the
//! server's memory. Its reply says all that is to be known, so that there is no moment at which the
//! server has a ring and this side could still fail to use it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::{MapFlags, ProtFlags};
use syscalls::Sysno;
use tokio::sync::OwnedMutexGuard;

use super::signal::{interrupt, signal, source};
use crate::abi::ring::Sent;
use crate::abi::wire::{AHEAD_SIZE, HelloResult, Operation, STREAM_VERSION};
use crate::calls::handle::{AddressSpace, FdTable, Mapping};
use crate::calls::{Buffer, Message, unreceived};
use crate::error::{Error, Result};
use crate::link::{Bell, DataSocket, Interrupts, Polling, Prepared, Quiesce, Receipt, SHARED_SIZE};
use crate::process::Process;
use crate::proto::Reply;
use crate::proto::batch::{Arg, Batch, Part, PartSteps, Places};
use crate::{descriptor, fault};

/// A ring that is being made.
pub(super) struct Making {
    process: Process,
    polling: Polling,
    epoch: u64,
    table: Arc<FdTable>,
    memory: Prepared,
    wakes_server: OwnedFd,
    wakes_controller: Bell,
    source: OwnedFd,
    told: Receipt<Told>,
    /// Until it is in use, neither the link nor the table is exchanged.
    _locks: [OwnedMutexGuard<()>; 2],
}

/// What the server knows of its ring.
struct Told {
    mapping: Mapping,
    /// Which it waits for, and which it rings.
    bells: [i32; 2],
    /// What interrupts its calls, if it can have that.
    source: Option<i32>,
    /// Where its ring was before, or 0.
    before: u64,
    /// What it offers: see [`HelloResult`].
    features: u32,
}

impl Making {
    /// Sends the batch, if nothing is under way. Must be called within a tokio runtime.
    pub(super) fn begin(
        process: &Process,
        polling: Polling,
        own: Option<&Quiesce>,
        buffer: Arc<Buffer>,
        table: Arc<FdTable>,
        locks: [OwnedMutexGuard<()>; 2],
    ) -> Result<Option<Self>> {
        let epoch = process.connection.epoch();
        let memory = Prepared::new()?;
        fault::point("ring.prepared");
        let (wakes_server, wakes_controller) = (eventfd()?, Bell::new(eventfd()?)?);
        let (source, source_there) = source()?;
        let told = {
            let bells = [wakes_server.as_fd(), wakes_controller.as_fd()];
            let sent = [memory.memfd(), bells[0], bells[1], source_there.as_fd()];
            // The order of messages is the order of the calls that take them.
            // Who makes a ring by the way, in the middle of submitting any other batch, may be passing
            // descriptors with that: then this thread has the socket.
            let Some(data) = process.ends.try_data() else { return Ok(None) };
            let data = data.as_ref().ok_or(Error::Gone)?;
            let (batch, steps) = batch(data);
            debug_assert!(batch.size() <= Message::SIZE);
            let Part { calls, steps: part } =
                batch.whole(Places { memory: buffer.address(), slot: 0 });
            let (table, space) = (table.clone(), process.space.clone());
            let complete = move |replies: Vec<Reply>| {
                let _buffer = buffer;
                told(&part.in_order(replies)?, &part, steps, &table, &space)
            };
            process.connection.submit_if_idle(own, || data.pass(&sent), calls, complete)?
        };
        if told.is_some() {
            fault::point("ring.sent");
        }
        Ok(told.map(|told| Self {
            process: process.clone(),
            polling,
            epoch,
            table,
            memory,
            wakes_server,
            wakes_controller,
            source,
            told,
            _locks: locks,
        }))
    }

    /// Uses the ring once the server has it.
    ///
    /// If the reply is lost with the link, the next sweep closes what has come, and the next RING
    /// names the memory.
    pub(super) async fn finish(self) -> Result<()> {
        let Told { mapping, bells, source, before, features } = self.told.await?;
        fault::point("ring.made");
        let (process, address) = (self.process, mapping.address());
        process.rings().insert(address);
        let memory = Arc::new(self.memory.mapped(address, mapping));
        let numbers = Vec::from_iter(bells.into_iter().chain(source));
        let mut fds = process.server_fds();
        let before_these = std::mem::replace(&mut fds.ring, bells.to_vec());
        let source_before = std::mem::replace(&mut fds.source, source);
        drop(fds);
        // Those of a ring on the same link, which the server has closed.
        let closed = before_these.into_iter().chain(source_before);
        let closed = closed.filter(|number| !numbers.contains(number));
        process.ends.take_back(&self.table, closed.collect());
        process.ends.lend(&self.table, &numbers);
        process.forget_ring(before);
        process.set_shared(&memory);
        let pidfd = process.shared_pidfd().clone();
        let (signal, sent): (Box<dyn Fn() -> Result<()> + Send + Sync>, _) = match source {
            Some(_) => (Box::new(move || interrupt(&self.source)), Sent::BySource),
            None => (Box::new(move || signal(&pidfd, address)), Sent::ToBeCounted),
        };
        let interrupts =
            Interrupts { signal, sent, withdraws: features & HelloResult::WITHDRAW != 0 };
        let (polling, bell, ours) = (self.polling, self.wakes_server, self.wakes_controller);
        process.connection.enter_ring(self.epoch, memory, polling, interrupts, bell, ours);
        fault::point("ring.entered");
        Ok(())
    }
}

/// The indices of the batch's steps whose replies say something.
#[derive(Clone, Copy)]
struct Steps {
    received: usize,
    memfd: usize,
    bells: usize,
    source: usize,
    complete: usize,
    mapped: usize,
    entered: usize,
    offered: usize,
}

/// The batch that gives the server its ring.
fn batch(data: &DataSocket) -> (Batch, Steps) {
    let mut batch = Batch::default();
    let message = Message::receiving(&mut batch, 4);
    let received = data.recvmsg(&mut batch, message);
    let mut load = |at: usize, width: u64| {
        let from = message.offset(Message::FDS + at);
        batch.operation(Operation::Load, [from, width.into()])
    };
    // Two bells together, as RING takes them.
    let (memfd, bells, source) = (load(0, 4), load(4, 8), load(12, 4));
    // In a full table fewer have come, and -1 is left in the place of the last.
    let complete = batch.syscall(Sysno::fcntl, [Arg::Result(source), libc::F_GETFD.into()]);
    let (zero, size) = (Arg::from(0), Arg::from(SHARED_SIZE as u64));
    let protection = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).bits().into();
    let flags = MapFlags::MAP_SHARED.bits().into();
    let mmap = [zero, size, protection, flags, Arg::Result(memfd)];
    let mapped = batch.syscall(Sysno::mmap, mmap);
    // Children that get a copy of the process's memory have no use for their parent's ring. Where that
    // can't be had they have it mapped, and their servers do not look at it.
    let madvise = [Arg::Result(mapped), size, libc::MADV_DONTFORK.into()];
    let advised = batch.syscall(Sysno::madvise, madvise);
    // A server that knows of no source does not look at it.
    let ring = [Arg::Result(mapped), Arg::Result(bells), Arg::Result(source), 1.into()];
    let entered = batch.operation(Operation::Ring, ring);
    // Whatever has failed.
    let closed = batch.syscall(Sysno::close, [Arg::Result(memfd)]);
    // The server stays in the version that it speaks, and says what it offers.
    let hello = [u64::from(STREAM_VERSION).into(), zero, (AHEAD_SIZE as u64).into()];
    let offered = batch.operation(Operation::Hello, hello);
    for step in [advised, entered, closed, offered] {
        batch.unlink(step);
    }
    (batch, Steps { received, memfd, bells, source, complete, mapped, entered, offered })
}

/// What the replies say. Where something has failed, what came before is given back.
fn told(
    replies: &[Reply],
    part: &PartSteps,
    steps: Steps,
    table: &Arc<FdTable>,
    space: &Arc<AddressSpace>,
) -> Result<Told> {
    let value = |step| part.value(replies, step);
    let bells = value(steps.bells).map(|bells| [bells as i32, (bells >> 32) as i32]);
    let source = value(steps.source).map(|source| source as i32);
    let mapping = value(steps.mapped).map(|address| Mapping::new(space, address, SHARED_SIZE));
    let entered = || {
        value(steps.received)?;
        // The number of 8 bytes can't be judged: two descriptors that have not come look like an error.
        value(steps.memfd)?;
        value(steps.complete).map_err(unreceived)?;
        let mapping = mapping?;
        let before = value(steps.entered)?;
        let offered = HelloResult(value(steps.offered)?.cast_signed());
        Ok((mapping, before, offered.features()))
    };
    match (entered(), bells) {
        (Ok((mapping, before, features)), Ok(bells)) => {
            let (used, unused) = match features & HelloResult::SOURCE {
                0 => (None, source.ok()),
                _ => (source.ok(), None),
            };
            table.reserve(bells.into_iter().chain(used));
            table.close_later(unused);
            Ok(Told { mapping, bells, source: used, before, features })
        }
        (Err(error), bells) => {
            let numbers = bells.into_iter().flatten().chain(source);
            table.close_later(numbers.filter(|fd| *fd >= 0));
            Err(error)
        }
        (Ok(_), Err(error)) => Err(error),
    }
}

fn eventfd() -> Result<OwnedFd> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let fd = EventFd::from_value_and_flags(0, flags).map_err(Error::local("eventfd"))?;
    descriptor::off_standard_streams(fd.into()).map_err(Error::io("dup"))
}
