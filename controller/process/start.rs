//! The calls that start a child: its descriptors into the parent, its stack, clone(2), and its pidfd
//! out of the parent.
//!
//! To a server of version 1 they go as one batch, in which later calls use what earlier ones have
//! left in memory. To one of version 0 they go step by step.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::libc;
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use nix::sys::socket::MsgFlags;
use syscalls::Sysno;

use super::clone::Extent;
use super::naming::Naming;
use super::{Process, numbers};
use crate::abi::entry::{SAME, TrampolineFrame};
use crate::abi::wire::Operation;
use crate::calls::handle::{Fd, FdTable, Stack};
use crate::calls::{Buffer, Message, unreceived};
use crate::error::{Error, Result};
use crate::link::{DataSocket, Inbox, Shared};
use crate::proto::batch::{Arg, Batch, Part, PartSteps, Places};
use crate::proto::{Call, Reply};

/// A child that runs.
pub(super) struct Started {
    /// In its parent's pid namespace.
    pub(super) pid: i32,
    /// Its pidfd in this process; the child runs also if it could not be had.
    pub(super) here: Result<OwnedFd>,
    /// The number of the child's stream.
    pub(super) input: i32,
}

/// The child's end of its stream.
pub(super) enum There {
    /// In this process: it is passed to the parent, and stays in the parent's table only if the child
    /// shares that.
    Passed(OwnedFd),
    /// In the table that the child shares.
    Already(i32),
}

/// Starts a child on `stack`. A name, which only servers of version 1 keep, it has as soon as there is
/// the child.
///
/// The parent has a data socket: see [`Task::need_data`](crate::calls::Task::need_data).
pub(super) async fn start(
    parent: &Process,
    flags: CloneFlags,
    extent: Extent,
    stack: &Stack,
    there: &There,
    naming: Option<Naming>,
    desk: Option<&Desk>,
) -> Result<Started> {
    match desk {
        Some(desk) => at_once(parent, flags, extent, stack.top(), there, naming, desk).await,
        None => step_by_step(parent, flags, stack.top(), there).await,
    }
}

/// Memory of the parent's for the batch that starts a child. A child says in its first word that it has
/// begun.
pub(super) struct Desk {
    buffer: Arc<Buffer>,
    begun: Option<Begun>,
}

/// Where a child says, in memory that this process has too, that its life is tied to its parent's.
#[derive(Clone)]
pub(super) struct Begun {
    address: u64,
    memory: Arc<Shared>,
}

impl Begun {
    pub(super) fn is_said(&self) -> bool {
        self.memory.load(self.address).is_some_and(|word| word != 0)
    }
}

impl Desk {
    const SIZE: usize =
        size_of::<u64>() + 2 * Message::SIZE + TrampolineFrame::STACK_BYTES + Naming::SIZE;

    /// A child that shares its parent's memory can say there that it has begun, where that is shared
    /// with this process. It does not have to be asked then, in most cases.
    pub(super) async fn new(parent: &Process, flags: CloneFlags) -> Result<Self> {
        let buffer = parent.buffer(Self::SIZE).await?;
        let address = buffer.address();
        let says = flags.contains(CloneFlags::CLONE_VM) && parent.image().begins_ahead();
        let memory = buffer.shared().filter(|_| says).cloned();
        let begun = memory.map(|memory| Begun { address, memory });
        Ok(Self { buffer: Arc::new(buffer), begun })
    }

    pub(super) fn begun(&self) -> Option<Begun> {
        self.begun.clone()
    }

    /// A child may use it that nobody knows of: it stays.
    pub(super) fn leave(&self) {
        std::mem::forget(self.buffer.clone());
    }
}

/// On x86-64 the arguments of clone(2) are flags, stack, parent_tid (which takes the pidfd, if there is a
/// place for it), child_tid and tls. These are the flags.
fn clone_flags(flags: CloneFlags, has_pidfd: bool) -> u64 {
    let with_pidfd = if has_pidfd { libc::CLONE_PIDFD } else { 0 };
    (flags.bits() | with_pidfd) as u32 as u64 | Signal::SIGCHLD as u64
}

/// Adds clone(2), which leaves the child's pidfd at `pidfd`.
fn clone(batch: &mut Batch, flags: CloneFlags, sp: u64, pidfd: Option<Arg>) -> usize {
    let flags = Arg::from(clone_flags(flags, pidfd.is_some()));
    batch.syscall(Sysno::clone, [flags, sp.into(), pidfd.unwrap_or(0.into())])
}

/// The advice of [`madvise`], whatever else has failed.
fn advise(batch: &mut Batch, memory: &Range<u64>, advice: i32) {
    let len = Arg::from(memory.end - memory.start);
    let advised = batch.syscall(Sysno::madvise, [memory.start.into(), len, advice.into()]);
    batch.unlink(advised);
}

/// Whether a child gets a copy of that memory.
pub(crate) fn madvise(memory: &Range<u64>, advice: i32) -> Call {
    let len = memory.end - memory.start;
    Call::syscall(Sysno::madvise, [memory.start, len, advice as u64, 0, 0, 0])
}

/// Takes the child's end of its stream from a message, into the frame at `sp`.
fn receive(batch: &mut Batch, socket: &DataSocket, message: Arg, sp: u64) -> Input {
    let received = socket.recvmsg(batch, message);
    batch.step_mut(received).quick = true;
    let fd = message.offset(Message::FDS);
    let number = batch.operation(Operation::Load, [fd, 4.into()]);
    // In a full table none has come, and -1 is left in its place.
    batch.syscall(Sysno::fcntl, [Arg::Result(number), libc::F_GETFD.into()]);
    // The first argument of the function, behind the trampoline's address.
    batch.operation(Operation::Store, [(sp + 8).into(), 8.into(), Arg::Result(number)]);
    Input::Received { number }
}

/// close(2) of a step's result: a pidfd, or a socket of which this process has the other end, neither of
/// which waits for anything.
fn close(batch: &mut Batch, fd: usize) -> usize {
    let closed = batch.syscall(Sysno::close, [Arg::Result(fd)]);
    batch.step_mut(closed).quick = true;
    closed
}

/// What the child pops lies at the top of its stack. It comes there from a buffer of the parent's, in
/// which are also a message that takes the child's descriptor and one that sends its pidfd. In memory that
/// is shared with this process these need no way into the parent, and writing there copies no page that a
/// child has too.
#[expect(clippy::too_many_lines, reason = "one batch, written in the order of its steps")]
async fn at_once(
    parent: &Process,
    flags: CloneFlags,
    extent: Extent,
    top: u64,
    there: &There,
    naming: Option<Naming>,
    desk: &Desk,
) -> Result<Started> {
    let known = match there {
        There::Passed(_) => None,
        There::Already(number) => Some(*number),
    };
    // Above its stack is what it reads ahead into.
    let begins = desk.begun.as_ref().map(|begun| (top, begun.address));
    let frame = parent.image().stack_that_serves(known.unwrap_or(0), SAME, begins);
    let sp = top - frame.len() as u64;
    let shares_files = flags.contains(CloneFlags::CLONE_FILES);
    let table = parent.table();
    // A name says which child it is by what its pidfd is, there.
    let number_here = parent.number_here().filter(|_| naming.is_none());
    let receipt = {
        // The order of messages is the order of the calls that take them.
        let socket = parent.ends.data();
        let socket = socket.as_ref().ok_or(Error::Gone)?;
        let initial_stack = parent.inner().initial_stack.get();
        let copied = initial_stack
            .filter(|_| extent == Extent::All && !flags.contains(CloneFlags::CLONE_VM));
        let mut batch = Batch::default();
        let begun = batch.input(&[0; 8]);
        let template = batch.input(&frame);
        let copy = [Arg::from(sp), template, (frame.len() as u64).into()];
        let framed = match copied {
            None => batch.operation(Operation::Copy, copy),
            Some(stack) => {
                // Where that advice can't be had the child does without. What must have succeeded is the
                // step before it, which is an argument that COPY does not have.
                let first = batch.operation(Operation::Load, [begun, 8.into()]);
                advise(&mut batch, stack, libc::MADV_DOFORK);
                let [to, from, len] = copy;
                let framed = batch.operation(Operation::Copy, [to, from, len, Arg::Result(first)]);
                batch.unlink(framed);
                framed
            }
        };
        let (input, sent) = match there {
            There::Already(number) => (Input::Known(*number), None),
            There::Passed(there) => {
                let message = Message::receiving(&mut batch, 1);
                (receive(&mut batch, socket, message, sp), Some(there.as_fd()))
            }
        };
        // Directly before clone, which it is about.
        let entry = naming.as_ref().map(|naming| naming.prepare(&mut batch));
        let (cloned, passed) = if number_here.is_some() {
            (clone(&mut batch, flags, sp, None), None)
        } else {
            // The kernel puts the pidfd right into the message.
            let message = Message::sending(&mut batch, &[-1]);
            let slot = message.offset(Message::FDS);
            let cloned = clone(&mut batch, flags, sp, Some(slot));
            let pidfd = batch.operation(Operation::Load, [slot, 4.into()]);
            if let Some(entry) = entry {
                Naming::enter(&mut batch, entry, cloned, pidfd);
            }
            // Whatever has become of that. Without a child there is nothing to send, which is an error.
            let sent = socket.sendmsg(&mut batch, message, MsgFlags::MSG_DONTWAIT);
            batch.unlink(sent);
            // Here is where it is needed. There it would be one more in the table of every child to
            // come.
            close(&mut batch, pidfd);
            (cloned, Some(Passed { pidfd, sent }))
        };
        if let Some(stack) = copied {
            advise(&mut batch, stack, libc::MADV_DONTFORK);
        }
        if let Input::Received { number } = input
            && !shares_files
        {
            // Whatever else has failed.
            let closed = close(&mut batch, number);
            batch.unlink(closed);
        }
        debug_assert!(batch.size() <= Desk::SIZE);
        let buffer = desk.buffer.clone();
        let slot = naming.as_ref().map_or(0, Naming::slot);
        let Part { calls, steps } = batch.whole(Places { memory: buffer.address(), slot });
        let places = Indices { input, needed: framed..cloned + 1, cloned, passed };
        parent.connection.submit_passing(calls, socket, sent.as_slice(), move |replies, inbox| {
            let _used = (buffer, naming);
            let replies = steps.in_order(replies)?;
            places.started(&replies, &steps, &table, inbox, shares_files)
        })
    };
    let (pid, input, pidfd) = receipt.await?;
    let here = match pidfd {
        Pidfd::Here(here) => here,
        Pidfd::There(pidfd) => parent.fetch_fd(&pidfd).await,
        Pidfd::ByPid => match number_here.and_then(|parent| numbers::child(pid, parent)) {
            Some(here) => Ok(here),
            // It may have been reaped by somebody else.
            None => match parent.open_child(pid).await {
                Ok(pidfd) => parent.fetch_fd(&pidfd).await,
                Err(error) => Err(error),
            },
        },
    };
    Ok(Started { pid, here, input })
}

/// Where the number of the child's stream comes from.
#[derive(Clone, Copy)]
enum Input {
    Known(i32),
    /// The index of the step that has loaded the number of the descriptor that came.
    Received {
        number: usize,
    },
}

/// The indices of steps of the batch.
struct Indices {
    input: Input,
    /// What is linked up to the clone, which is the last of it.
    needed: Range<usize>,
    cloned: usize,
    passed: Option<Passed>,
}

/// The indices of the steps that have loaded the number of the pidfd and sent that.
struct Passed {
    pidfd: usize,
    sent: usize,
}

/// A child's pidfd.
enum Pidfd {
    Here(Result<OwnedFd>),
    /// In the parent: the data socket had no room for it.
    There(Fd),
    /// To be opened.
    ByPid,
}

impl Indices {
    /// The pid and the number of the stream of what has been started, and its pidfd.
    fn started(
        &self,
        replies: &[Reply],
        steps: &PartSteps,
        table: &Arc<FdTable>,
        inbox: &Inbox,
        shares_files: bool,
    ) -> Result<(i32, i32, Pidfd)> {
        let value = |step: usize| steps.value(replies, step);
        let failed = steps.failed(replies, self.needed.clone());
        let input = match self.input {
            Input::Known(number) => Some(number),
            // What has not come has no number.
            Input::Received { number } => {
                value(number).ok().map(|number| number as i32).filter(|number| *number >= 0)
            }
        };
        let (pid, input) = match (failed, input) {
            (None, Some(input)) => (value(self.cloned)? as i32, input),
            (None, None) => return Err(Error::Protocol("a child, and no stream for it")),
            (Some(error), input) => {
                if shares_files && matches!(self.input, Input::Received { .. }) {
                    table.close_later(input);
                }
                return Err(unreceived(error));
            }
        };
        let pidfd = self.passed.as_ref().map_or(Pidfd::ByPid, |passed| {
            match (value(passed.sent), value(passed.pidfd)) {
                (Err(_), Ok(number)) => Pidfd::There(table.made(number as i32)),
                // The message is there now, and messages arrive in the order of the replies.
                (sent, _) => Pidfd::Here(sent.and_then(|_| inbox.take())),
            }
        });
        Ok((pid, input, pidfd))
    }
}

async fn step_by_step(
    parent: &Process,
    flags: CloneFlags,
    top: u64,
    there: &There,
) -> Result<Started> {
    let table = parent.table();
    let buffer = parent.buffer(size_of::<u64>()).await?;
    let input = match there {
        There::Already(number) => *number,
        There::Passed(there) => parent.send_server_fds(&[there.as_fd()]).await?[0],
    };
    let at = buffer.address();
    let stack = parent.image().stack_that_serves(input, input, None);
    let sp = top - stack.len() as u64;
    let clone = Call::syscall(Sysno::clone, [clone_flags(flags, true), sp, at, 0, 0, 0]);
    let calls =
        vec![Call::copy_in(sp, stack.to_vec()), clone, Call::copy_out(at, size_of::<i32>())];
    let made = table.clone();
    let cloned = parent
        .connection
        .submit(calls, move |replies| {
            let _buffer = buffer;
            let (pid, pidfd) = cloned(&replies)?;
            Ok((pid, made.made(pidfd)))
        })
        .await;
    let passed = matches!(there, There::Passed(_));
    if passed && (cloned.is_err() || !flags.contains(CloneFlags::CLONE_FILES)) {
        table.close_later([input]);
    }
    let (pid, pidfd) = cloned?;
    let here = parent.fetch_fd(&pidfd).await;
    Ok(Started { pid, here, input })
}

fn cloned(replies: &[Reply]) -> Result<(i32, i32)> {
    let [written, cloned, pidfd] = replies else {
        return Err(Error::Protocol("not three replies"));
    };
    written.value().map_err(Error::call("COPY_IN"))?;
    let pid = cloned.value().map_err(Error::call("clone"))?;
    let pidfd = pidfd.data.first_chunk().ok_or(Error::Protocol("no pidfd"))?;
    Ok((pid as i32, i32::from_le_bytes(*pidfd)))
}
