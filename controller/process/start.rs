//! The calls that start a child: its descriptors into the parent, its stack, clone(2), and its pidfd
//! out of the parent.
//!
//! To a server of version 1 they go as one batch, in which later calls use what earlier ones have
//! left in memory. To one of version 0 they go step by step.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;
use nix::libc;
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use syscalls::Sysno;

use super::Process;
use super::naming::Naming;
use crate::abi::entry::TrampolineFrame;
use crate::abi::wire::Operation;
use crate::call::{Call, Error, Inbox, Reply, Result};
use crate::handle::{FdTable, Stack};
use crate::sys::Message;

/// A child that runs.
pub(super) struct Started {
    /// In its parent's pid namespace.
    pub(super) pid: i32,
    /// Its pidfd in this process; the child runs also if it could not be had.
    pub(super) here: Result<OwnedFd>,
    /// The numbers of the child's stream and data socket.
    pub(super) input: i32,
    pub(super) data: i32,
}

/// Starts a child on `stack`, with the other ends of its stream and its data socket, in this
/// process, as `there`. Its descriptors stay in the parent's table only if it shares that. A name, which
/// only servers of version 1 keep, it has as soon as there is the child.
pub(super) async fn start(
    parent: &Process,
    flags: CloneFlags,
    stack: &Stack,
    there: &[BorrowedFd<'_>; 2],
    naming: Option<Naming>,
) -> Result<Started> {
    if parent.connection.version() > 0 {
        at_once(parent, flags, stack.top(), there, naming).await
    } else {
        step_by_step(parent, flags, stack.top(), there).await
    }
}

/// Bytes of a message.
const SLOT: usize = Message::size(1).next_multiple_of(16);

/// On x86-64: flags, stack, parent_tid (which takes the pidfd), child_tid, tls.
fn clone(flags: CloneFlags, sp: u64, pidfd: u64) -> Call {
    let flags = (flags.bits() | libc::CLONE_PIDFD) as u32 as u64 | Signal::SIGCHLD as u64;
    Call::syscall(Sysno::clone, [flags, sp, pidfd, 0, 0, 0])
}

/// A batch for a server of version 1, in which calls are named by their places.
pub(super) struct Steps(Vec<Call>);

impl Steps {
    /// Adds a call that is executed only if the one before succeeded.
    pub(super) fn linked(&mut self, call: Call) -> usize {
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
    pub(super) fn store(&mut self, address: u64, result: usize) -> usize {
        let back = self.back(result);
        let store = Call::operation(Operation::Store, [address, 8, 0, 0, 0, 0]);
        self.linked(store.referring(2, back))
    }

    /// Adds a call with an earlier result as its first argument, whatever else has failed.
    pub(super) fn with(&mut self, result: usize, call: Call) {
        let back = self.back(result);
        self.0.push(call.referring(0, back));
    }

    /// close(2) of an earlier result, whatever else has failed.
    fn close(&mut self, fd: usize) {
        self.with(fd, Call::syscall(Sysno::close, [0; 6]));
    }
}

/// The child's first stack pointer, and what the parent needs meanwhile, lie at the top of the
/// stack, where the child never comes: first what the child pops, then a message that takes its
/// descriptors, then one that sends its pidfd.
async fn at_once(
    parent: &Process,
    flags: CloneFlags,
    top: u64,
    there: &[BorrowedFd<'_>; 2],
    naming: Option<Naming>,
) -> Result<Started> {
    let outgoing = top - SLOT as u64;
    let incoming = outgoing - SLOT as u64;
    let sp = incoming - TrampolineFrame::STACK_BYTES as u64;
    let mut bytes = parent.image().stack_that_serves(0, 0).to_vec();
    for message in [Message::receiving(incoming, 2), Message::sending(outgoing, &[0], &[-1])] {
        bytes.extend(message);
        bytes.resize(bytes.len().next_multiple_of(16), 0);
    }
    let shares_files = flags.contains(CloneFlags::CLONE_FILES);
    let table = parent.table();
    let receipt = {
        // The order of messages is the order of the calls that take them.
        let socket = parent.data.lock().unwrap_or_else(PoisonError::into_inner);
        let mut steps = Steps(Vec::with_capacity(24));
        steps.0.push(Call::copy_in(sp, bytes));
        let received = steps.linked(socket.recvmsg(incoming));
        let fds = incoming + Message::FDS as u64;
        let input = steps.load(fds);
        let data = steps.load(fds + 4);
        // In a full table fewer than two have come, and -1 is left in the place of the last.
        let getfd = Call::syscall(Sysno::fcntl, [0, libc::F_GETFD as u64, 0, 0, 0, 0]);
        let both = steps.linked(getfd.referring(0, steps.back(data)));
        // The first two arguments of the function, behind the trampoline's address.
        steps.store(sp + 8, input);
        steps.store(sp + 16, input);
        // The kernel puts the pidfd right into the message.
        let slot = outgoing + Message::FDS as u64;
        // Directly before clone, which it is about.
        let kept = naming.as_ref().map(|naming| naming.prepare(&mut steps));
        let cloned = steps.linked(clone(flags, sp, slot));
        let pidfd = steps.load(slot);
        let sent = steps.linked(socket.sendmsg(outgoing));
        if let Some(naming) = &naming {
            naming.enter(&mut steps, cloned, pidfd);
        }
        // Here is where it is needed. There it would be one more in the table of every child to come.
        steps.close(pidfd);
        if !shares_files {
            steps.close(input);
            steps.close(data);
        }
        let places = Places { received, input, data, both, kept, cloned, sent };
        parent.connection.submit_passing(steps.0, &socket, there, move |replies, inbox| {
            let _naming = naming;
            places.started(&replies, &table, inbox, shares_files)
        })
    };
    receipt.await
}

/// The places of calls in the batch.
struct Places {
    received: usize,
    input: usize,
    data: usize,
    both: usize,
    /// If it gets a name.
    kept: Option<usize>,
    cloned: usize,
    sent: usize,
}

impl Places {
    fn started(
        &self,
        replies: &[Reply],
        table: &Arc<FdTable>,
        inbox: &Inbox,
        shares_files: bool,
    ) -> Result<Started> {
        let value = |place: usize, name| {
            let reply = replies.get(place).ok_or(Error::Protocol("too few replies"))?;
            reply.value().map_err(Error::call(name))
        };
        value(self.received, "recvmsg")?;
        let fds = [self.input, self.data].map(|place| value(place, "LOAD").map(|fd| fd as i32));
        let cloned = match value(self.both, "recvmsg") {
            Ok(_) => match self.kept.map(|kept| value(kept, "KEEP")) {
                Some(Err(error)) => Err(error),
                _ => value(self.cloned, "clone"),
            },
            Err(_) => Err(Error::Call { call: "recvmsg", errno: Errno::EMFILE }),
        };
        let pid = match cloned {
            Ok(pid) => pid as i32,
            Err(error) => {
                if shares_files {
                    table.close_later(fds.into_iter().flatten().filter(|fd| *fd >= 0));
                }
                return Err(error);
            }
        };
        let [input, data] = fds;
        // The message is there now, and messages arrive in the order of the replies.
        let here = value(self.sent, "sendmsg").and_then(|_| inbox.take());
        Ok(Started { pid, here, input: input?, data: data? })
    }
}

async fn step_by_step(
    parent: &Process,
    flags: CloneFlags,
    top: u64,
    there: &[BorrowedFd<'_>; 2],
) -> Result<Started> {
    let table = parent.table();
    let buffer = parent.buffer(size_of::<u64>()).await?;
    let numbers = parent.send_server_fds(there).await?;
    let (input, data) = (numbers[0], numbers[1]);
    let at = buffer.address();
    let stack = parent.image().stack_that_serves(input, input);
    let sp = top - stack.len() as u64;
    let calls = vec![
        Call::copy_in(sp, stack.to_vec()),
        clone(flags, sp, at),
        Call::copy_out(at, size_of::<i32>()),
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
        table.close_later([input, data]);
    }
    let (pid, pidfd) = cloned?;
    let here = parent.fetch_fd(&pidfd).await;
    Ok(Started { pid, here, input, data })
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
