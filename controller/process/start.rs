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
use syscalls::Sysno;

use super::clone::Extent;
use super::naming::Naming;
use super::{Process, numbers};
use crate::abi::entry::{SAME, TrampolineFrame};
use crate::abi::wire::Operation;
use crate::call::{Call, DataSocket, Error, Inbox, Reply, Result};
use crate::handle::{Fd, FdTable, Stack};
use crate::sys::{Buffer, Message, unreceived};
use crate::transport::Shared;

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
/// The parent has a data socket: see [`Task::need_data`](crate::sys::Task::need_data).
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

/// Memory of the parent's for the calls that start a child: a message that sends the child's pidfd, one
/// that takes its descriptor, what the child pops from its stack, and where it says that it has begun.
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
    const SIZE: usize = 2 * SLOT + TrampolineFrame::STACK_BYTES + size_of::<u64>();

    /// A child that shares its parent's memory can say there that it has begun, where that is shared
    /// with this process. It does not have to be asked then, in most cases.
    pub(super) async fn new(parent: &Process, flags: CloneFlags) -> Result<Self> {
        let buffer = parent.buffer(Self::SIZE).await?;
        let [.., address] = Self::places(buffer.address());
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

    fn places(start: u64) -> [u64; 4] {
        let frame = start + 2 * SLOT as u64;
        [start, start + SLOT as u64, frame, frame + TrampolineFrame::STACK_BYTES as u64]
    }
}

/// Bytes of a message.
const SLOT: usize = Message::size(1).next_multiple_of(16);

/// On x86-64: flags, stack, parent_tid (which takes the pidfd, if there is a place for it), child_tid,
/// tls.
fn clone(flags: CloneFlags, sp: u64, pidfd: Option<u64>) -> Call {
    let with_pidfd = if pidfd.is_some() { libc::CLONE_PIDFD } else { 0 };
    let flags = (flags.bits() | with_pidfd) as u32 as u64 | Signal::SIGCHLD as u64;
    Call::syscall(Sysno::clone, [flags, sp, pidfd.unwrap_or(0), 0, 0, 0])
}

/// Whether a child gets a copy of that memory.
pub(crate) fn madvise(memory: &Range<u64>, advice: i32) -> Call {
    let len = memory.end - memory.start;
    Call::syscall(Sysno::madvise, [memory.start, len, advice as u64, 0, 0, 0])
}

/// A batch for a server of version 1, in which calls are named by their places.
pub(super) struct Steps(Vec<Call>);

/// The names of calls, from the first of these places on.
struct Names {
    first: usize,
    names: Vec<&'static str>,
}

impl Steps {
    /// Adds a call that is executed only if the one before succeeded.
    pub(super) fn linked(&mut self, call: Call) -> usize {
        self.0.push(call.linked());
        self.0.len() - 1
    }

    /// Adds a call, whatever else has failed.
    fn add(&mut self, call: Call) -> usize {
        self.0.push(call);
        self.0.len() - 1
    }

    /// The names of the calls from one to another.
    fn names(&self, first: usize, last: usize) -> Names {
        Names { first, names: self.0[first..=last].iter().map(Call::name).collect() }
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

    /// Takes the child's end of its stream from a message that is there, into the frame at `sp`.
    fn receive(&mut self, socket: &DataSocket, incoming: u64, sp: u64) -> Input {
        self.linked(Call { quick: true, ..socket.recvmsg(incoming) });
        let number = self.load(incoming + Message::FDS as u64);
        // In a full table none has come, and -1 is left in its place.
        let getfd = Call::syscall(Sysno::fcntl, [0, libc::F_GETFD as u64, 0, 0, 0, 0]);
        self.linked(getfd.referring(0, self.back(number)));
        // The first argument of the function, behind the trampoline's address.
        self.store(sp + 8, number);
        Input::Received { number }
    }

    /// Adds a call with an earlier result as its first argument, whatever else has failed.
    pub(super) fn with(&mut self, result: usize, call: Call) {
        self.add(call.referring(0, self.back(result)));
    }

    /// close(2) of an earlier result: a pidfd, or a socket of which this process has the other end,
    /// neither of which waits for anything.
    fn close(&self, fd: usize) -> Call {
        let close = Call { quick: true, ..Call::syscall(Sysno::close, [0; 6]) };
        close.referring(0, self.back(fd))
    }
}

/// What the child pops lies at the top of its stack. It comes there from a buffer of the parent's, in
/// which are also a message that takes the child's descriptor and one that sends its pidfd. In memory that
/// is shared with this process these need no way into the parent, and writing there copies no page that a
/// child has too.
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
    let buffer = desk.buffer.clone();
    let sp = top - frame.len() as u64;
    let [outgoing, incoming, template, begun] = Desk::places(buffer.address());
    let mut bytes = Message::sending(outgoing, &[0], &[-1]);
    bytes.resize(SLOT, 0);
    bytes.extend(Message::receiving(incoming, 1));
    bytes.resize(2 * SLOT, 0);
    bytes.extend(&frame);
    debug_assert_eq!(bytes.len() as u64, begun - outgoing);
    bytes.extend(0u64.to_le_bytes());
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
        let mut steps = Steps(Vec::with_capacity(12));
        if let Some(stack) = copied {
            // Where that can't be had the child does without.
            steps.add(madvise(stack, libc::MADV_DOFORK));
        }
        let first = steps.add(Call::copy_in(buffer.address(), bytes));
        let copy = [sp, template, frame.len() as u64, 0, 0, 0];
        steps.linked(Call::operation(Operation::Copy, copy));
        let (input, sent) = match there {
            There::Already(number) => (Input::Known(*number), None),
            There::Passed(there) => (steps.receive(socket, incoming, sp), Some(there.as_fd())),
        };
        // Directly before clone, which it is about.
        if let Some(naming) = &naming {
            naming.prepare(&mut steps);
        }
        let (cloned, passed) = if number_here.is_some() {
            (steps.linked(clone(flags, sp, None)), None)
        } else {
            // The kernel puts the pidfd right into the message.
            let slot = outgoing + Message::FDS as u64;
            let cloned = steps.linked(clone(flags, sp, Some(slot)));
            let pidfd = steps.load(slot);
            if let Some(naming) = &naming {
                naming.enter(&mut steps, cloned, pidfd);
            }
            // Whatever has become of that. Without a child there is nothing to send, which is an error.
            let sent = steps.add(socket.try_sendmsg(outgoing));
            // Here is where it is needed. There it would be one more in the table of every child to
            // come.
            steps.linked(steps.close(pidfd));
            (cloned, Some(Passed { pidfd, sent }))
        };
        if let Some(stack) = copied {
            steps.add(madvise(stack, libc::MADV_DONTFORK));
        }
        if let Input::Received { number } = input
            && !shares_files
        {
            // Whatever else has failed.
            steps.add(steps.close(number));
        }
        let needed = steps.names(first, cloned);
        let places = Places { input, needed, cloned, passed };
        parent.connection.submit_passing(steps.0, socket, sent.as_slice(), move |replies, inbox| {
            let _used = (buffer, naming);
            places.started(&replies, &table, inbox, shares_files)
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
    /// The place of the call that has loaded the number of the descriptor that came.
    Received {
        number: usize,
    },
}

/// The places of calls in the batch.
struct Places {
    input: Input,
    /// What is linked up to the clone, which is the last of it.
    needed: Names,
    cloned: usize,
    passed: Option<Passed>,
}

/// The places of the calls that have loaded the number of the pidfd and sent that.
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

impl Names {
    /// The first of the calls that has failed. Those behind it are linked to it, and were not executed.
    fn failed(&self, replies: &[Reply]) -> Option<Error> {
        let mut called = self.names.iter().zip(replies.get(self.first..)?);
        called.find_map(|(name, reply)| reply.value().err().map(Error::call(name)))
    }
}

impl Places {
    /// The pid and the number of the stream of what has been started, and its pidfd.
    fn started(
        &self,
        replies: &[Reply],
        table: &Arc<FdTable>,
        inbox: &Inbox,
        shares_files: bool,
    ) -> Result<(i32, i32, Pidfd)> {
        let value = |place: usize, name| {
            let reply = replies.get(place).ok_or(Error::Protocol("too few replies"))?;
            reply.value().map_err(Error::call(name))
        };
        let failed = self.needed.failed(replies);
        let input = match self.input {
            Input::Known(number) => Some(number),
            // What has not come has no number.
            Input::Received { number } => {
                value(number, "LOAD").ok().map(|number| number as i32).filter(|number| *number >= 0)
            }
        };
        let (pid, input) = match (failed, input) {
            (None, Some(input)) => (value(self.cloned, "clone")? as i32, input),
            (None, None) => return Err(Error::Protocol("a child, and no stream for it")),
            (Some(error), input) => {
                if shares_files && matches!(self.input, Input::Received { .. }) {
                    table.close_later(input);
                }
                return Err(unreceived(error));
            }
        };
        let pidfd = self.passed.as_ref().map_or(Pidfd::ByPid, |passed| {
            match (value(passed.sent, "sendmsg"), value(passed.pidfd, "LOAD")) {
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
    let calls = vec![
        Call::copy_in(sp, stack.to_vec()),
        clone(flags, sp, Some(at)),
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
