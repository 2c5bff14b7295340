//! Running another program in a child: execve(2).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sched::CloneFlags;
use syscalls::Sysno;

use super::Child;
use crate::call::{Call, Error, Outcome, Result};
use crate::sys::{c_string, finish};

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
        let path = c_string("execve", path.as_ref().as_os_str().as_bytes())?;
        let argv = strings(argv)?;
        let envp = strings(envp)?;
        if self.table().is_shared() {
            self.unshare(CloneFlags::CLONE_FILES).await?;
        }
        let layout = |base| lay_out(base, &path, &argv, &envp);
        let size = layout(0).bytes.len();
        let buffer = self.buffer(size).await?;
        let base = buffer.address();
        let Layout { bytes, argv, envp } = layout(base);
        let calls = vec![
            Call::copy_in(base, bytes),
            Call::syscall(Sysno::execve, [base, argv, envp, 0, 0, 0]),
        ];
        let result = self
            .connection
            .submit(calls, move |replies| {
                let _buffer = buffer;
                finish("execve", &replies)
            })
            .await;
        match result {
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
