//! Running another program in a child: execve(2).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use nix::libc;
use nix::sched::CloneFlags;
use syscalls::Sysno;

use super::{Child, ChildBuilder};
use crate::abi::wire::Word;
use crate::call::{Call, Connection, Error, Outcome, Receipt, Reply, Result, to_the_end};
use crate::sys::{Buffer, c_string, finish};

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
    /// all are that typed calls open: [`dup2`](crate::sys::Task::dup2) makes one that is not.
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

    fn lay_out(&self, base: u64) -> Layout {
        lay_out(base, &self.path, &self.argv, &self.envp)
    }

    /// How large a buffer it takes.
    pub(super) fn size(&self) -> usize {
        let strings = [&self.argv, &self.envp].map(|list| list.iter().map(Vec::len).sum::<usize>());
        let text = self.path.len() + strings.iter().sum::<usize>();
        let pointers = self.argv.len() + self.envp.len() + 2;
        text.next_multiple_of(8) + (pointers + 1) * size_of::<u64>()
    }

    /// Has a server run it, with a buffer in that one's memory. One that has only just tied its life to
    /// its parent's does so if that is alive: if it still is the process's `parent`.
    pub(super) fn begin(
        &self,
        connection: &Connection,
        buffer: Arc<Buffer>,
        parent: Option<u32>,
    ) -> Receipt<u64> {
        let base = buffer.address();
        let Layout { mut bytes, argv, envp } = self.lay_out(base);
        let expected = base + bytes.len() as u64;
        bytes.extend(u64::from(parent.unwrap_or(0)).to_le_bytes());
        debug_assert_eq!(bytes.len(), self.size());
        let mut calls = Vec::with_capacity(4);
        // Memory that this process has too can be written to right here.
        if !buffer.shared().is_some_and(|memory| memory.write(base, &bytes)) {
            calls.push(Call::copy_in(base, bytes));
        }
        if parent.is_some() {
            calls.push(Call::syscall(Sysno::getppid, [0; 6]));
            calls.push(equals(expected));
        }
        calls.push(Call::syscall(Sysno::execve, [base, argv, envp, 0, 0, 0]));
        if parent.is_some() {
            // Only with what was copied, and only if it is.
            calls.iter_mut().skip(1).for_each(|call| call.request.word |= Word::LINK);
        }
        connection.submit(calls, move |replies| {
            let _buffer = buffer;
            if let [.., Reply { result: OTHER, .. }, _] = replies[..] {
                return Err(Error::ParentDied);
            }
            finish("execve", &replies)
        })
    }
}

/// What [`equals`] returns if it is another number.
const OTHER: i64 = -(libc::EAGAIN as i64);

/// A call that fails if the result of the call before is not the number of 4 bytes at `address`: futex(2),
/// which wakes nobody and moves nobody, but compares.
fn equals(address: u64) -> Call {
    let operation = (libc::FUTEX_CMP_REQUEUE | libc::FUTEX_PRIVATE_FLAG) as u64;
    let futex = Call::syscall(Sysno::futex, [address, operation, 0, 0, address, 1]);
    Call { quick: true, ..futex.referring(5, 1) }
}

fn strings<S: AsRef<OsStr>>(items: impl IntoIterator<Item = S>) -> Result<Vec<Vec<u8>>> {
    items.into_iter().map(|item| c_string("execve", item.as_ref().as_bytes())).collect()
}

/// The path, the strings and the two arrays of pointers, as they lie in the child's memory.
struct Layout {
    bytes: Vec<u8>,
    argv: u64,
    envp: u64,
}

fn lay_out(base: u64, path: &[u8], argv: &[Vec<u8>], envp: &[Vec<u8>]) -> Layout {
    let mut bytes = path.to_vec();
    let mut place = |strings: &[Vec<u8>]| -> Vec<u64> {
        let mut addresses = Vec::with_capacity(strings.len() + 1);
        for string in strings {
            addresses.push(base + bytes.len() as u64);
            bytes.extend_from_slice(string);
        }
        addresses.push(0);
        addresses
    };
    let arrays = [place(argv), place(envp)];
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let [argv, envp] = arrays.map(|addresses| {
        let at = base + bytes.len() as u64;
        bytes.extend(addresses.into_iter().flat_map(u64::to_le_bytes));
        at
    });
    Layout { bytes, argv, envp }
}
