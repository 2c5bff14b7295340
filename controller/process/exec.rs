//! Running another program in a child: execve(2).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use nix::libc;
use nix::sched::CloneFlags;
use syscalls::Sysno;

use super::{Child, ChildBuilder};
use crate::abi::wire::MAX_REF;
use crate::calls::{Buffer, c_string};
use crate::error::{Error, Outcome, Result};
use crate::link::{Connection, Receipt, to_the_end};
use crate::proto::batch::{Arg, Batch, Part, Places};
use crate::proto::ring::Memory as _;

impl ChildBuilder {
    /// Makes the child and runs the program at `path` in it: [`spawn`](ChildBuilder::spawn) and
    /// [`Child::execve`], for which the child, if it shares its parent's memory and not its table of
    /// descriptors, finds the second of them waiting when it begins, and nobody has to be told in
    /// between. So this is the way to run a program for which the child needs no preparation.
    ///
    /// # Errors
    ///
    /// Those of `spawn` and of `execve`. There is no child then, and no program runs, unless the error says
    /// that it may have been executed.
    pub async fn exec<A: AsRef<OsStr>, E: AsRef<OsStr>>(
        self,
        path: impl AsRef<Path>,
        argv: impl IntoIterator<Item = A>,
        envp: impl IntoIterator<Item = E>,
    ) -> Result<Child> {
        let program = Program::new(path.as_ref(), argv, envp)?;
        if !self.can_begin_with_a_program() {
            let child = self.spawn().await?;
            child.run(program).await?;
            return Ok(child);
        }
        self.check_all()?;
        to_the_end(self.make(Some(program))).await
    }
}

impl Child {
    /// Runs the program at `path` in the child, in place of its server: execve(2). Nothing is added
    /// to `argv` (its first item is the program's own name) or to `envp` (`NAME=value`).
    ///
    /// Returns when the program runs. No call can be made in the child from then on; [`Child::wait`]
    /// and [`Child::kill`] work. Descriptors are inherited unless they are closed on exec, which
    /// all are that typed calls open: [`dup2`](crate::calls::Task::dup2) makes one that is not.
    ///
    /// A child that shares its parent's table of descriptors gets a copy of it first, as execve
    /// would give it: a round trip more than for one that shares memory only.
    ///
    /// A set-user-ID program, or one with file capabilities, loses the parent-death signal: it
    /// outlives its parent.
    ///
    /// # Errors
    ///
    /// The errno of execve(2); the child still serves then.
    pub async fn execve<A: AsRef<OsStr>, E: AsRef<OsStr>>(
        &self,
        path: impl AsRef<Path>,
        argv: impl IntoIterator<Item = A>,
        envp: impl IntoIterator<Item = E>,
    ) -> Result<()> {
        self.run(Program::new(path.as_ref(), argv, envp)?).await
    }

    async fn run(&self, program: Program) -> Result<()> {
        let process = self.in_this_tenure();
        if process.table().is_shared() {
            process.unshare(CloneFlags::CLONE_FILES).await?;
        }
        let buffer = process.buffer(program.size()).await?;
        self.runs(program.begin(&process.connection, Arc::new(buffer), None)).await
    }

    /// Returns when the program runs that it was told to run.
    pub(super) async fn runs(&self, execve: Receipt<u64>) -> Result<()> {
        match execve.await {
            // execve does not return where it succeeds: the connection's end, closed on exec, says
            // that the new program runs and that the old memory is left.
            Err(Error::Lost(Outcome::PossiblyExecuted)) => {
                self.connection.process_died();
                if let Some(remains) = &self.inner().remains {
                    remains.left_memory();
                }
                Ok(())
            }
            Err(error) => Err(error),
            Ok(_) => Err(Error::Protocol("execve returned a success")),
        }
    }
}

/// A program to be run: what execve(2) takes.
pub(super) struct Program {
    path: Vec<u8>,
    argv: Vec<Vec<u8>>,
    envp: Vec<Vec<u8>>,
}

impl Program {
    fn new<A: AsRef<OsStr>, E: AsRef<OsStr>>(
        path: &Path,
        argv: impl IntoIterator<Item = A>,
        envp: impl IntoIterator<Item = E>,
    ) -> Result<Self> {
        let path = c_string("execve", path.as_os_str().as_bytes())?;
        Ok(Self { path, argv: strings(argv)?, envp: strings(envp)? })
    }

    /// How large a buffer it takes.
    pub(super) fn size(&self) -> usize {
        self.batch(None).0.size()
    }

    /// The batch that runs it, and the index of the step that fails if another process is the parent.
    fn batch(&self, parent: Option<u32>) -> (Batch, Option<usize>) {
        let mut batch = Batch::default();
        // At the beginning, whether or not it is needed: the size does not depend on that.
        let expected = batch.input(&u64::from(parent.unwrap_or(0)).to_le_bytes());
        let path = batch.input(&self.path);
        let [argv, envp] = [&self.argv, &self.envp].map(|list| pointers(&mut batch, list));
        let compared = parent.map(|_| {
            let parent = batch.syscall(Sysno::getppid, []);
            equals(&mut batch, expected, parent)
        });
        let executed = batch.syscall(Sysno::execve, [path, argv, envp]);
        if compared.is_none() {
            // Servers of version 0 know no links.
            batch.unlink(executed);
        }
        (batch, compared)
    }

    /// Has a server run it, with a buffer in that one's memory. One that has only just tied its life to
    /// its parent's does so if that is alive: if it still is the process's `parent`.
    pub(super) fn begin(
        &self,
        connection: &Connection,
        buffer: Arc<Buffer>,
        parent: Option<u32>,
    ) -> Receipt<u64> {
        let (batch, compared) = self.batch(parent);
        let memory = buffer.address();
        let run = batch.run(Places { memory, slot: 0 }, MAX_REF as usize);
        // Memory that this process has too can be written to right here.
        let write =
            |bytes: &[u8]| buffer.shared().is_some_and(|shared| shared.write(memory, bytes));
        let Part { calls, steps } = run.whole_with_input(write);
        connection.submit(calls, move |replies| {
            let _buffer = buffer;
            let replies = steps.in_order(replies)?;
            if compared.is_some_and(|step| replies.get(step).is_some_and(|it| it.result == OTHER)) {
                return Err(Error::ParentDied);
            }
            steps.failed(&replies, 0..replies.len()).map_or(Ok(0), Err)
        })
    }
}

/// What [`equals`] returns if it is another number.
const OTHER: i64 = -(libc::EAGAIN as i64);

/// Adds a call that fails if a step's result is not the number of 4 bytes at `place`: futex(2), which wakes
/// nobody and moves nobody, but compares.
fn equals(batch: &mut Batch, place: Arg, step: usize) -> usize {
    let operation = Arg::from(libc::FUTEX_CMP_REQUEUE | libc::FUTEX_PRIVATE_FLAG);
    let zero = Arg::from(0);
    let args = [place, operation, zero, zero, place, Arg::Result(step)];
    let compared = batch.syscall(Sysno::futex, args);
    batch.step_mut(compared).quick = true;
    compared
}

/// Adds an array of pointers to strings, and a null pointer behind them.
fn pointers(batch: &mut Batch, strings: &[Vec<u8>]) -> Arg {
    let text = batch.input(&strings.concat());
    let array = batch.input(&vec![0; (strings.len() + 1) * size_of::<u64>()]);
    let mut at = 0;
    for (index, string) in strings.iter().enumerate() {
        batch.point(array.offset(index * size_of::<u64>()), text.offset(at));
        at += string.len();
    }
    array
}

fn strings<S: AsRef<OsStr>>(items: impl IntoIterator<Item = S>) -> Result<Vec<Vec<u8>>> {
    items.into_iter().map(|item| c_string("execve", item.as_ref().as_bytes())).collect()
}
