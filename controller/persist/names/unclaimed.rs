//! What a persistent process has open and nobody accounts for.

use std::collections::BTreeSet;

use nix::errno::Errno;
use nix::libc;
use syscalls::Sysno;

use crate::error::{Error, Result};
use crate::persist::reconnect::sweep_when_idle;
use crate::process::Process;
use crate::proto::Call;

/// A descriptor that has no name, no handle, and is none of the server's own or of the standard
/// streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unclaimed {
    /// Its number.
    pub number: i32,
    /// What it is, as /proc shows it; nothing where there is no /proc.
    pub what: Option<String>,
}

impl Process {
    /// The descriptors that nobody accounts for: what a controller that died had opened and not
    /// named, and what it was passing.
    ///
    /// # Errors
    ///
    /// Those of the calls.
    pub async fn unclaimed(&self) -> Result<Vec<Unclaimed>> {
        let process = self.in_this_tenure();
        // Those that have names are known then.
        process.kept().await?;
        let (open, has_proc) = match process.open_numbers().await {
            Ok(open) => (open, true),
            Err(Error::Call { .. } | Error::Chain(_)) => (process.open_by_asking().await?, false),
            Err(error) => return Err(error),
        };
        let known = process.table().known();
        let mut unclaimed = Vec::new();
        for number in open.difference(&known) {
            let what = if has_proc { process.fd_link(*number).await } else { None };
            unclaimed.push(Unclaimed { number: *number, what });
        }
        Ok(unclaimed)
    }

    /// Closes all of them, as soon as nothing is in flight in any process that shares the table: what
    /// is in flight may be just about to claim one.
    ///
    /// # Errors
    ///
    /// Those of the calls.
    pub async fn close_unclaimed(&self) -> Result<()> {
        let process = self.in_this_tenure();
        process.kept().await?;
        let (table, connection) = (process.table(), &process.connection);
        sweep_when_idle(&table, connection, connection.clone()).await?;
        table.is_known();
        Ok(())
    }

    /// Without /proc: every number below the limit is asked for.
    async fn open_by_asking(&self) -> Result<BTreeSet<i32>> {
        const AT_ONCE: i32 = 64;
        let most = self.fd_limit().await?;
        let mut open = BTreeSet::new();
        for first in (0..most).step_by(AT_ONCE as usize) {
            let numbers = first..(first + AT_ONCE).min(most);
            let getfd = |fd: i32| {
                Call::syscall(Sysno::fcntl, [fd as u64, libc::F_GETFD as u64, 0, 0, 0, 0])
            };
            let calls = numbers.clone().map(getfd).collect();
            let there = self.connection.submit(calls, move |replies| {
                let answers = numbers.zip(replies);
                let there = answers.filter(|(_, reply)| reply.value() != Err(Errno::EBADF));
                Ok(there.map(|(number, _)| number).collect::<Vec<_>>())
            });
            open.extend(there.await?);
        }
        Ok(open)
    }

    /// Below that all descriptors are: RLIMIT_NOFILE, or 65,536 if there are more.
    async fn fd_limit(&self) -> Result<i32> {
        const MOST: u64 = 65_536;
        let mut chain = self.chain();
        let limit = chain.output(16);
        let zero = 0.into();
        let which = u64::from(libc::RLIMIT_NOFILE).into();
        chain.syscall(Sysno::prlimit64, [zero, which, zero, limit, zero, zero]);
        let soft = chain.load(limit, 8);
        Ok(chain.run().await?.value(soft)?.min(MOST) as i32)
    }
}
