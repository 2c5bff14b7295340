//! The calls that start a child: its descriptors into the parent, its stack, clone(2), and its pidfd
//! out of the parent.
//!
//! To a server of version 1 they go as one batch, in which later calls use what earlier ones have
//! left in memory. To one of version 0 they go step by step.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;
use nix::libc;
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use syscalls::Sysno;

use super::{Process, Sockets};
use crate::abi::entry::TrampolineFrame;
use crate::abi::wire::Operation;
use crate::call::{Call, Error, Outcome, Reply, Result};
use crate::handle::{Fd, FdTable, Mapping};
use crate::memory::ARENA_SIZE;
use crate::sys::{Buffer, Message, receive};

/// A child that runs.
pub(super) struct Started {
    pub(super) pid: i32,
    /// In the parent's table.
    pub(super) pidfd: Fd,
    /// In this process; the child runs also if it could not be had.
    pub(super) here: Result<OwnedFd>,
    /// The numbers of the child's stream and data socket.
    pub(super) input: i32,
    pub(super) data: i32,
    /// The stack and what lies behind it, of a child that shares its parent's memory.
    pub(super) memory: Option<Mapping>,
    /// The address behind the stack's last byte.
    pub(super) top: u64,
}

/// What is needed for a child before it is started.
pub(super) struct Start<'p> {
    parent: &'p Process,
    flags: CloneFlags,
    memory: Option<Mapping>,
    top: u64,
    /// Two messages, and the place where clone(2) puts the pidfd.
    buffer: Buffer,
}

/// What the calls have brought.
struct Made {
    pid: i32,
    pidfd: Fd,
    here: Result<OwnedFd>,
    input: i32,
    data: i32,
}

impl<'p> Start<'p> {
    /// Provides the memory.
    pub(super) async fn new(parent: &'p Process, flags: CloneFlags) -> Result<Self> {
        let (memory, top) = if flags.contains(CloneFlags::CLONE_VM) {
            let (memory, top) = parent.mmap_stack(ARENA_SIZE).await?;
            (Some(memory), top)
        } else {
            (None, parent.nursery().await?)
        };
        let buffer = parent.buffer(2 * SLOT + 8).await?;
        Ok(Self { parent, flags, memory, top, buffer })
    }

    /// Starts the child. Its descriptors stay in the parent's table only if it shares that.
    pub(super) async fn child(self, sockets: &Sockets) -> Result<Started> {
        let Self { parent, flags, memory, top, buffer } = self;
        let made = if parent.connection.version() > 0 {
            at_once(parent, flags, top, buffer, sockets).await
        } else {
            step_by_step(parent, flags, top, buffer, sockets).await
        };
        match made {
            Ok(Made { pid, pidfd, here, input, data }) => {
                Ok(Started { pid, pidfd, here, input, data, memory, top })
            }
            Err(error) => {
                if let (Error::Lost(Outcome::PossiblyExecuted), Some(memory)) = (&error, memory) {
                    // There may be a child that runs on it.
                    let _ = memory.into_raw();
                }
                Err(error)
            }
        }
    }
}

/// Room for a message, and where the second one and the pidfd lie in the buffer.
const SLOT: usize = Message::size(1).next_multiple_of(8);

/// The stack pointer with which a child starts.
fn stack_pointer(top: u64) -> u64 {
    top - TrampolineFrame::STACK_BYTES as u64
}

/// On x86-64: flags, stack, parent_tid (which takes the pidfd), child_tid, tls.
fn clone(flags: CloneFlags, top: u64, pidfd: u64) -> Call {
    let flags = (flags.bits() | libc::CLONE_PIDFD) as u32 as u64 | Signal::SIGCHLD as u64;
    Call::syscall(Sysno::clone, [flags, stack_pointer(top), pidfd, 0, 0, 0])
}

/// A batch for a server of version 1, in which calls are named by their places.
struct Steps(Vec<Call>);

impl Steps {
    /// Adds a call that is executed only if the one before succeeded.
    fn linked(&mut self, call: Call) -> usize {
        self.0.push(call.linked());
        self.0.len() - 1
    }

    /// How far back a call lies from the one that is added next.
    fn back(&self, to: usize) -> usize {
        self.0.len() - to
    }

    /// LOAD of the 4 bytes at `address`.
    fn load(&mut self, address: u64) -> usize {
        self.linked(Call::operation(Operation::Load, [address, 4, 0, 0, 0, 0]))
    }

    /// STORE of an earlier result to the 8 bytes at `address`.
    fn store(&mut self, address: u64, result: usize) -> usize {
        let back = self.back(result);
        let store = Call::operation(Operation::Store, [address, 8, 0, 0, 0, 0]);
        self.linked(store.referring(2, back))
    }

    /// close(2) of an earlier result, whatever else has failed.
    fn close(&mut self, fd: usize) {
        let back = self.back(fd);
        self.0.push(Call::syscall(Sysno::close, [0; 6]).referring(0, back));
    }
}

async fn at_once(
    parent: &Process,
    flags: CloneFlags,
    top: u64,
    buffer: Buffer,
    sockets: &Sockets,
) -> Result<Made> {
    let address = buffer.address();
    let (outgoing, slot) = (address + SLOT as u64, address + 2 * SLOT as u64);
    let sp = stack_pointer(top);
    let shares_files = flags.contains(CloneFlags::CLONE_FILES);
    let table = parent.table();
    let receipt = {
        // The order of messages is the order of the calls that take them.
        let socket = parent.data.lock().unwrap_or_else(PoisonError::into_inner);
        socket.pass(&[sockets.stream_there.as_fd(), sockets.data_there.as_fd()])?;
        let mut steps = Steps(vec![Call::copy_in(address, Message::receiving(address, 2))]);
        let received = steps.linked(socket.recvmsg(address));
        let fds = address + Message::FDS as u64;
        let input = steps.load(fds);
        let data = steps.load(fds + 4);
        // In a full table fewer than two have come, and -1 is left in the place of the last.
        let there = Call::syscall(Sysno::fcntl, [0, libc::F_GETFD as u64, 0, 0, 0, 0]);
        let there = steps.linked(there.referring(0, steps.back(data)));
        steps.linked(Call::copy_in(sp, parent.image().stack_that_serves(0, 0).to_vec()));
        // The first two arguments of the function, behind the trampoline's address.
        steps.store(sp + 8, input);
        steps.store(sp + 16, input);
        let cloned = steps.linked(clone(flags, top, slot));
        let pidfd = steps.load(slot);
        steps.linked(Call::copy_in(outgoing, Message::sending(outgoing, &[0], &[0])));
        let place = outgoing + Message::FDS as u64;
        steps.linked(Call::operation(Operation::Copy, [place, slot, 4, 0, 0, 0]));
        let sent = steps.linked(socket.sendmsg(outgoing));
        if !shares_files {
            steps.close(input);
            steps.close(data);
        }
        let here = socket.here.clone();
        let places = Places { received, input, data, there, cloned, pidfd, sent };
        parent.connection.submit_on_link(steps.0, move |replies| {
            let _buffer = buffer;
            places.made(&replies, &table, &here, shares_files)
        })
    };
    receipt.await
}

/// The places of calls in the batch.
struct Places {
    received: usize,
    input: usize,
    data: usize,
    there: usize,
    cloned: usize,
    pidfd: usize,
    sent: usize,
}

impl Places {
    fn made(
        &self,
        replies: &[Reply],
        table: &Arc<FdTable>,
        here: &OwnedFd,
        shares_files: bool,
    ) -> Result<Made> {
        let value = |place: usize, name| {
            let reply = replies.get(place).ok_or(Error::Protocol("too few replies"))?;
            reply.value().map_err(Error::call(name))
        };
        value(self.received, "recvmsg")?;
        let fds = [self.input, self.data].map(|place| value(place, "LOAD").map(|fd| fd as i32));
        let cloned = match value(self.there, "recvmsg") {
            Ok(_) => value(self.cloned, "clone"),
            Err(_) => Err(Error::Call { call: "recvmsg", errno: Errno::EMFILE }),
        };
        let pid = match cloned {
            Ok(pid) => pid as i32,
            Err(error) => {
                if shares_files {
                    for fd in fds.into_iter().flatten().filter(|fd| *fd >= 0) {
                        table.close_later(fd);
                    }
                }
                return Err(error);
            }
        };
        let [input, data] = fds;
        let pidfd = table.made(value(self.pidfd, "LOAD")? as i32);
        // The message is there now, and messages arrive in the order of the replies.
        let here = value(self.sent, "sendmsg").and_then(|_| receive(here));
        Ok(Made { pid, pidfd, here, input: input?, data: data? })
    }
}

async fn step_by_step(
    parent: &Process,
    flags: CloneFlags,
    top: u64,
    buffer: Buffer,
    sockets: &Sockets,
) -> Result<Made> {
    let table = parent.table();
    let fds = [sockets.stream_there.as_fd(), sockets.data_there.as_fd()];
    let numbers = parent.send_server_fds(&fds).await?;
    let (input, data) = (numbers[0], numbers[1]);
    let at = buffer.address();
    let stack = parent.image().stack_that_serves(input, input);
    let calls = vec![
        Call::copy_in(stack_pointer(top), stack.to_vec()),
        clone(flags, top, at),
        Call::copy_out(at, 4),
    ];
    let made = table.clone();
    let cloned = parent
        .connection
        .submit(calls, move |replies| {
            let _buffer = buffer;
            let (pid, pidfd) = cloned(&replies)?;
            Ok((pid, made.made(pidfd)))
        })
        .await;
    if cloned.is_err() || !flags.contains(CloneFlags::CLONE_FILES) {
        table.close_later(input);
        table.close_later(data);
    }
    let (pid, pidfd) = cloned?;
    let here = parent.fetch_fd(&pidfd).await;
    Ok(Made { pid, pidfd, here, input, data })
}

fn cloned(replies: &[Reply]) -> Result<(i32, i32)> {
    let [written, cloned, pidfd] = replies else {
        return Err(Error::Protocol("not three replies"));
    };
    written.value().map_err(Error::call("clone"))?;
    let pid = cloned.value().map_err(Error::call("clone"))?;
    let pidfd = pidfd.data.first_chunk().ok_or(Error::Protocol("no pidfd"))?;
    Ok((pid as i32, i32::from_le_bytes(*pidfd)))
}
