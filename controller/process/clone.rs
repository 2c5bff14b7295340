//! Making a child: clone(2), by a server, of a server.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use syscalls::Sysno;

use super::child::{self, Child, Remains};
use super::exec::Program;
use super::naming::Naming;
use super::start::{Desk, Started, There, start};
use super::{Parts, Process, small_stream, stream};
use crate::abi::wire::Operation;
use crate::calls::arena::Arena;
use crate::calls::handle::{AddressSpace, Fd, FdTable, Lent, Spare};
use crate::calls::{Buffer, Guardian, ServerFds, duplicate};
use crate::descriptor::FIRST;
use crate::error::{Error, Outcome, Result};
use crate::fault;
use crate::link::{Connection, Receipt, to_the_end};
use crate::proto::{Call, hello};

/// What a child shares with its parent and what it has for itself. By default it is isolated: it
/// has a copy of its parent's memory and descriptors, as after fork(2).
#[derive(Clone, Debug)]
#[must_use = "a child is made by `spawn`"]
pub struct ChildBuilder {
    parent: Process,
    flags: CloneFlags,
    name: Option<String>,
    /// What a child that is made persistent has from the start.
    pub(crate) legacy: Vec<Legacy>,
    /// See [`Extent`].
    pub(crate) extent: Extent,
}

/// What of its parent's memory a child has a copy of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// What it may need: not the stack that the parent's program was started with, which only the
    /// parent runs on. To copy that is a fifteenth of what a child costs.
    Needed,
    /// That too, with the arguments that are its name in /proc.
    All,
}

/// A descriptor that is handed over.
#[derive(Clone, Debug)]
pub(crate) struct Legacy {
    pub(crate) name: String,
    /// Whose it is.
    pub(crate) owner: Process,
    /// Kept open until then.
    pub(crate) fd: Arc<Fd>,
}

/// The flags that a server's child may be made with.
const ALLOWED: CloneFlags = CloneFlags::CLONE_VM
    .union(CloneFlags::CLONE_FILES)
    .union(CloneFlags::CLONE_FS)
    .union(CloneFlags::CLONE_SIGHAND)
    .union(CloneFlags::CLONE_IO)
    .union(CloneFlags::CLONE_SYSVSEM)
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUSER)
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWCGROUP);

impl ChildBuilder {
    pub(super) fn new(parent: Process) -> Self {
        Self {
            parent,
            flags: CloneFlags::empty(),
            name: None,
            legacy: Vec::new(),
            extent: Extent::Needed,
        }
    }

    /// Adds flags of clone(2): CLONE_VM, CLONE_FILES, CLONE_FS, CLONE_SIGHAND and namespaces.
    pub fn flags(mut self, flags: CloneFlags) -> Self {
        self.flags |= flags;
        self
    }

    /// The child uses its parent's memory: CLONE_VM. It gets a stack of its own with a guard page
    /// below it, and buffers of its own.
    pub fn share_memory(self) -> Self {
        self.flags(CloneFlags::CLONE_VM)
    }

    /// The child uses its parent's table of descriptors: CLONE_FILES.
    pub fn share_files(self) -> Self {
        self.flags(CloneFlags::CLONE_FILES)
    }

    /// The child uses its parent's root, working directory and umask: CLONE_FS.
    pub fn share_fs(self) -> Self {
        self.flags(CloneFlags::CLONE_FS)
    }

    /// The child has that name in its parent's registry from the instant on at which it is made:
    /// whatever becomes of this controller, the next one finds it by its name, with its exit status. The
    /// parent is persistent; the child need not be.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The child, which is made persistent, inherits that descriptor of `owner`, its parent or any other
    /// process, and has it under that name when it comes to be persistent: what was set up step by step
    /// in short-lived processes, and the pidfds of their children, go to one that stays. The descriptor
    /// is kept open until then. See [`spawn_persistent`](ChildBuilder::spawn_persistent).
    ///
    /// # Errors
    ///
    /// [`Error::ForeignFd`] if it is not the owner's.
    pub fn inherit(mut self, name: impl Into<String>, owner: &Process, fd: &Fd) -> Result<Self> {
        owner.number(fd)?;
        // One more handle: it stays open, also if the other one is dropped.
        let fd = Arc::new(owner.adopt_fd(fd.number())?);
        self.legacy.push(Legacy { name: name.into(), owner: owner.clone(), fd });
        Ok(self)
    }

    /// Makes the child. It dies with its parent.
    ///
    /// # Errors
    ///
    /// [`Error::CloneFlags`] for flags that can't go together, [`Error::Name`] for a name that can't
    /// be, and the errno of clone(2).
    pub async fn spawn(self) -> Result<Child> {
        self.check_all()?;
        // A child that nobody waits for any more is dropped there, which ends and reaps it: until
        // then it runs on memory that must not be given back.
        to_the_end(self.make(None)).await
    }

    /// Whether a child of the kind can have a program to run in its stream when it begins: what that
    /// takes is in memory that it has too, its table is its own, and it knows its parent by its pid.
    pub(super) fn can_begin_with_a_program(&self) -> bool {
        self.flags.contains(CloneFlags::CLONE_VM)
            && !self.flags.intersects(CloneFlags::CLONE_FILES | CloneFlags::CLONE_NEWPID)
            && self.parent.connection.version() > 0
            && self.parent.number_here().is_some()
    }

    /// Makes the child, which runs the `program` if it can begin with one.
    #[expect(clippy::too_many_lines, reason = "not split yet: each step undoes those before it")]
    pub(super) async fn make(self, program: Option<Program>) -> Result<Child> {
        let Self { parent, flags, name, extent, .. } = self;
        let parent = parent.in_this_tenure();
        let shares_memory = flags.contains(CloneFlags::CLONE_VM);
        let shares_files = flags.contains(CloneFlags::CLONE_FILES);
        parent.need_data().await?;
        // While the child's descriptors are in the table and nothing accounts for them yet, no
        // other child may be made that would inherit them, nor the table be copied.
        let (table, quiet) = parent.quiet_table().await;
        let naming = match &name {
            Some(name) => Some(Naming::new(&parent, name).await?),
            None => None,
        };
        // The one that it will run, whatever becomes of its parent meanwhile.
        let image = parent.image();
        let stack = parent.stack().await?;
        // It is the same image under the same kernel: what its parent can, it can.
        let version = parent.connection.version();
        let desk = if version > 0 { Some(Desk::new(&parent, flags).await?) } else { None };
        let begun = desk.as_ref().and_then(Desk::begun);
        // Where it does not begin in that version, its first request waits in its stream when it
        // begins.
        let greet = |connection: &Connection| {
            let hello = || connection.call_at_once("HELLO", hello(version, stack.top(), true));
            let ready = begun.is_none().then(hello);
            connection.set_version_of(&parent.connection);
            ready
        };
        // No room is waited for: it would be with the parent's table held.
        let buffer = match &program {
            Some(program) => Some((program, Arc::new(parent.buffer(program.size()).await?))),
            None => None,
        };
        let left = if shares_files { left(&table, greet) } else { None };
        let (connection, ready, there) = match left {
            Some(left) => left,
            None => {
                let (stream, there) = if program.is_some() { small_stream()? } else { stream()? };
                let connection = Connection::over(stream);
                let ready = greet(&connection);
                (connection, ready, There::Passed(there))
            }
        };
        let begin = |(program, buffer): &(&Program, Arc<Buffer>)| {
            program.begin(&connection, buffer.clone(), parent.number_here())
        };
        let execve = buffer.as_ref().map(begin);
        let desk = desk.as_ref();
        let started = match start(&parent, flags, extent, &stack, &there, naming, desk).await {
            Ok(started) => started,
            Err(error) => {
                // There may be a child that uses them.
                let may_run =
                    error.outcome().is_some_and(|outcome| outcome != Outcome::NotExecuted);
                if shares_memory && may_run {
                    stack.leave();
                    desk.into_iter().for_each(Desk::leave);
                    std::mem::forget(buffer);
                }
                if let There::Already(number) = there {
                    table.close_later([number]);
                }
                return Err(error);
            }
        };
        fault::point("child.made");
        let Started { pid, here, input } = started;
        // A copy here would hide the child's end from its connection.
        drop(there);
        let input = match &execve {
            // It is closed on exec.
            Some(_) => input,
            None => off_standard_streams(&connection, input).await,
        };
        let (child_table, in_parent) = if shares_files {
            table.reserve([input]);
            table.join(&connection);
            (table.clone(), vec![input])
        } else {
            let child_table = FdTable::new(&connection);
            // The child's copies of other servers' descriptors would keep their connections open.
            // The parent's copy of the child's is closed already, and may be another by now.
            // They are closed on exec too, which is about to be.
            if execve.is_none() {
                let others = table.reserved();
                child_table.close_later(others.into_iter().filter(|fd| *fd != input));
            }
            child_table.reserve([input]);
            (child_table, Vec::new())
        };
        drop(quiet);
        let (space, arena, stack) = if shares_memory {
            parent.space.join(&connection);
            (parent.space.clone(), stack.arena(), Some(stack))
        } else {
            // The child has copies of the parent's.
            let arena = Arena::new(parent.arena.base(), parent.arena.size());
            (AddressSpace::new(&connection), arena, None)
        };
        let remains =
            Arc::new(Remains::new(shares_memory, stack, Arc::new(Lent::new(table, in_parent))));
        let stream = shares_files.then_some(input);
        let here = match watched(here, &connection, &parent, &remains, stream) {
            Ok(here) => here,
            Err(error) => {
                end(&parent, pid, &remains).await;
                if let Some(name) = &name {
                    // It may be reaped, and the name is nobody's then.
                    let _ = parent.forget(name).await;
                }
                return Err(error);
            }
        };
        // One that has ended meanwhile has a status to wait for. Whatever it answers, from then on
        // its life is tied to its parent's.
        let _ = match (ready, begun) {
            (Some(ready), _) => ready.await,
            // What it does then comes after that.
            (None, Some(_)) if execve.is_some() => Ok(0),
            (None, Some(begun)) if !begun.is_said() => {
                // It is in the version that it speaks.
                connection.call_at_once("HELLO", hello(version, 0, true)).await
            }
            (None, _) => Ok(0),
        };
        let guardian = Guardian::Parent(parent.shared_pidfd().clone());
        let process = Process::new(Parts {
            connection,
            table: child_table,
            space,
            arena,
            data: None,
            guardian: guardian.clone(),
            image,
            fds: ServerFds::new(input, -1),
            pidfd: here,
            leads: true,
            remains: Some(remains),
            life: None,
            token: parent.inner().token,
            controllers: 0,
            // A program is not called often.
            polling: parent.inner().polling.filter(|_| execve.is_none()),
        });
        let child = Child::new(process, parent.in_any_tenure(), pid);
        match execve {
            // It has looked itself whether its parent is alive.
            Some(execve) => child.runs(execve).await?,
            // It may have died before that: then nothing but the end of its stream ends the child.
            None if !guardian.lives() => return Err(Error::ParentDied),
            None => {}
        }
        Ok(child)
    }

    pub(super) fn check_all(&self) -> Result<()> {
        self.check()?;
        if !self.legacy.is_empty() {
            return Err(Error::misuse(
                "ChildBuilder::inherit for an ordinary child",
                "only a child that is persistent from the start inherits: ChildBuilder::spawn_persistent",
            ));
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let flags = self.flags;
        let refuse = |reason| Err(Error::CloneFlags(reason));
        if flags.contains(CloneFlags::CLONE_THREAD) {
            return refuse("CLONE_THREAD would share its exit status and its parent's life");
        }
        if !ALLOWED.contains(flags) {
            return refuse("a flag that a server's child can't have");
        }
        if flags.contains(CloneFlags::CLONE_SIGHAND) && !flags.contains(CloneFlags::CLONE_VM) {
            return refuse("CLONE_SIGHAND needs CLONE_VM: handlers are addresses");
        }
        if flags.contains(CloneFlags::CLONE_FS)
            && flags.intersects(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUSER)
        {
            return refuse("CLONE_FS can't go with CLONE_NEWNS or CLONE_NEWUSER");
        }
        Ok(())
    }
}

/// Where a child has its end of its stream: in the place of the number of a standard stream, which was closed,
/// it gets another one.
async fn off_standard_streams(connection: &Connection, input: i32) -> i32 {
    if input >= FIRST {
        return input;
    }
    // Where there is no room, it stays where it is.
    let Ok(other) = connection.call_at_once("fcntl", duplicate(input)).await else { return input };
    let serve = [other | other << 32, u64::MAX, 0, 0, 0, 0];
    let serve = Call::operation(Operation::Serve, serve);
    if connection.call_at_once("SERVE", serve).await.is_err() {
        return input;
    }
    let close = Call::syscall(Sysno::close, [input as u64, 0, 0, 0, 0, 0]);
    let _ = connection.call_at_once("close", close).await;
    other as i32
}

/// A stream that an earlier child has left in the table, with the first request in it, if one is to be.
fn left(
    table: &Arc<FdTable>,
    greet: impl Fn(&Connection) -> Option<Receipt<u64>>,
) -> Option<(Connection, Option<Receipt<u64>>, There)> {
    while let Some(Spare { stream, number }) = table.take_spare() {
        if !stream.is_open() {
            // Somebody has closed the other end, and the number may be something else's by now.
            table.unreserve([number]);
            continue;
        }
        if let Ok(connection) = Connection::over_idle_stream(stream) {
            let ready = greet(&connection);
            return Some((connection, ready, There::Already(number)));
        }
        table.close_later([number]);
    }
    None
}

/// The child's pidfd, in this process, with somebody who waits for the child's end.
fn watched(
    here: Result<OwnedFd>,
    connection: &Connection,
    parent: &Process,
    remains: &Arc<Remains>,
    stream: Option<i32>,
) -> Result<Arc<OwnedFd>> {
    let here = Arc::new(here?);
    child::watch(&here, connection, parent, remains, stream)?;
    Ok(here)
}

/// Ends and reaps a child that can't be watched over. Where that fails too, its memory stays.
async fn end(parent: &Process, pid: i32, remains: &Remains) {
    let pid = pid as u64;
    let kind = u64::from(nix::libc::P_PID);
    // It is dying: this does not block the parent.
    let reap = [kind, pid, 0, nix::libc::WEXITED as u64, 0, 0];
    let _ = parent.syscall(Sysno::kill, [pid, Signal::SIGKILL as u64, 0, 0, 0, 0]).await;
    if parent.syscall(Sysno::waitid, reap).await.is_ok() {
        remains.ended(None);
    }
}
