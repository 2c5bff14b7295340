//! A controller under torture with many deadlines and many that interrupt, all at once: each call ends,
//! and the process answers the next one.

use std::time::Duration;

use farcall::Error;
use farcall::calls::Sysno;
use farcall::link::Polling;
use farcall::proto::Call;
use nix::errno::Errno;
use tokio::task::JoinSet;

use super::words::{Word, say};
use super::workload::{Link, Workload};

/// How many calls that block are made at once.
const CALLS: u64 = 8;
/// How long each of them blocks, in milliseconds: the next controller may have to wait for one.
const BLOCKS: u64 = 100;
/// The longest deadline, and the longest that somebody waits before interrupting, in microseconds.
const MOST: u64 = 3000;
/// One that has not ended by then never does.
const NEVER: Duration = Duration::from_secs(60);

/// A call that blocks: poll(2) of nothing.
const POLL: [u64; 6] = [0, 0, BLOCKS, 0, 0, 0];

/// Whether a call that blocks ended as it has to.
fn ended(result: Result<u64, Error>) -> Result<(), Error> {
    match result {
        // It was faster.
        Ok(0) => Ok(()),
        Ok(value) => {
            say(&Word::Wrong(format!("poll returned {value}")));
            Ok(())
        }
        // At its deadline, or by somebody who interrupts; or the ring is gone with its link.
        Err(Error::TimedOut { .. } | Error::NotInterruptible) => Ok(()),
        Err(error) if error.errno() == Some(Errno::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}

impl Workload {
    /// Makes calls that block, each with a deadline or with somebody who interrupts it.
    pub(super) async fn deadlines(&mut self) -> Result<(), Error> {
        self.process.enter_ring(Polling::Adaptive).await?;
        let mut calls = JoinSet::new();
        for _ in 0..CALLS {
            let process = self.process.clone();
            let limit = Duration::from_micros(self.random.below(MOST));
            if self.random.one_in(2) {
                calls.spawn(async move { process.syscall_within(limit, Sysno::poll, POLL).await });
                continue;
            }
            let call = Call::syscall(Sysno::poll, POLL);
            let poll = process.connection().call_in_ring("poll", call).await?;
            let interrupter = poll.interrupter().ok_or(Error::NotInterruptible)?;
            calls.spawn(async move {
                tokio::time::sleep(limit).await;
                interrupter.interrupt().await?;
                poll.await
            });
        }
        while let Ok(Some(call)) = tokio::time::timeout(NEVER, calls.join_next()).await {
            match call {
                Ok(result) => ended(result)?,
                Err(error) => say(&Word::Wrong(format!("a call with a deadline: {error}"))),
            }
        }
        if !calls.is_empty() {
            say(&Word::Wrong(format!("{} calls outlived their deadlines", calls.len())));
        }
        self.append(1, Link::Same).await
    }
}
