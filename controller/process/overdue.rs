//! What is done about a process from which replies are overdue: see the connection's
//! [`HealthChecks`](crate::link::HealthChecks).

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Inner, Process, pid_of};
use crate::link::HealthChecks;

/// How a process is watched over. `leads`: its server runs in its main thread.
pub(super) fn watch(process: Weak<Inner>, pidfd: Arc<OwnedFd>, leads: bool) -> HealthChecks {
    HealthChecks {
        leader_has_exited: Box::new(move || leader_has_exited(&pidfd).filter(|_| leads)),
        ring_is_lost: Box::new(move |epoch| {
            if let Some(inner) = process.upgrade() {
                Process { inner, tenure: None }.leave_lost_ring(epoch);
            }
        }),
    }
}

/// The pid of a process whose main thread has exited while another thread of it goes on: it is a zombie
/// then, and its pidfd does not tell.
fn leader_has_exited(pidfd: &OwnedFd) -> Option<i32> {
    let pid = pid_of(pidfd)?;
    if !is_zombie(pid)? {
        return None;
    }
    let mut end = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    (poll(&mut end, PollTimeout::ZERO) == Ok(0)).then_some(pid)
}

fn is_zombie(pid: i32) -> Option<bool> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything.
    Some(stat.rsplit_once(')')?.1.trim_start().starts_with('Z'))
}

/// Whether the process with that pid is one whose main thread has exited while another thread goes on.
pub(crate) fn is_leaderless(pid: i32) -> bool {
    is_zombie(pid) == Some(true) && threads(pid).is_some_and(|threads| threads > 1)
}

/// How many threads the process with that pid has, its main thread included, whether or not that has
/// exited; none where /proc does not tell.
pub(crate) fn threads(pid: i32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/task")).ok()?.count())
}

impl Process {
    /// The server does not see the ring of link `epoch`: its memory was overwritten, or something else was
    /// mapped in its place.
    fn leave_lost_ring(self, epoch: u64) {
        // It may be somebody's by now.
        self.connection.keep_ring_mapped();
        self.forget_shared();
        if !self.is_persistent() {
            self.connection.leave_ring(epoch);
            return;
        }
        // What became of the calls in it the server's log tells, as after a link that was lost.
        tokio::spawn(async move {
            if self.connection.epoch() == epoch && self.reconnect().await.is_err() {
                self.connection.end_link(epoch);
            }
        });
    }
}
