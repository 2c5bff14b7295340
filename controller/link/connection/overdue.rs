//! What is looked at while a reply, or the end of a link, is outstanding: whether there still is a server,
//! and whether it still sees the ring.
//!
//! The end of a process ends its stream, and most that can go wrong shows there. These two do not:
//! - The main thread exits, and another thread of the process goes on. The stream stays open, for that
//!   other thread has the same table of descriptors; and a pidfd tells of the end of the whole process.
//! - The ring's memory was mapped over in the process, or overwritten. The server does not see what is
//!   handed over, or not that it is to ring.
//!
//! No timer wakes a pair that has nothing to do, but for once after its last call. The first who waits for a
//! reply tells the link's task, as does who ends a link, and that looks after a while, less and less often,
//! until nothing is outstanding: one timer for all calls, which is set anew when it has run down and not
//! with each call.
//!
//! A server that is not in a call hears its bell. So of one that has heard it twice, and has executed
//! nothing in between though there is something to be executed, it is known that it does not see that.

use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::time::{Instant, Sleep, sleep};

use super::resume::LostBatches;
use super::ring::RingLink;
use super::state::{Ending, State, Up};
use super::{Connection, Shared};
use crate::proto::Replies;

/// After how long a reply is overdue.
const FIRST: Duration = Duration::from_millis(50);
/// How often it is looked then: half as often each time, and at least that often.
const LAST: Duration = Duration::from_secs(30);
/// When to look again after the server's bell was rung.
const SOON: Duration = Duration::from_millis(50);
/// How often the bell must have been heard in vain.
const HEARD: u32 = 2;
/// For how long it must have been seen that the main thread has exited: of a process that is ending the
/// others follow.
const SEEN: Duration = Duration::from_secs(1);

/// The checks of a connection's owner, and what it does about what they find.
pub(crate) struct HealthChecks {
    /// The pid of the process if its main thread, in which the server runs, has exited and another one
    /// goes on.
    pub(crate) leader_has_exited: Box<dyn Fn() -> Option<i32> + Send + Sync>,
    /// The server does not see the ring of that [`Connection::epoch`].
    pub(crate) ring_is_lost: Box<dyn Fn(u64) + Send + Sync>,
}

/// What the link's task knows of an outstanding reply.
pub(super) struct Overdue {
    /// When to look. It stays where it is while replies come: to move it costs as much as a part of a call.
    timer: Pin<Box<Sleep>>,
    /// Whether that is to be waited for.
    is_set: bool,
    pause: Duration,
    /// How many calls had been answered when it was looked last.
    answered: u64,
    /// How often the bell was rung since then.
    rung: u32,
    /// Since when the main thread is known to have exited.
    seen: Option<Instant>,
}

impl Overdue {
    pub(super) fn new() -> Self {
        let timer = Box::pin(sleep(FIRST));
        Self { timer, is_set: false, pause: FIRST, answered: 0, rung: 0, seen: None }
    }

    /// If something is outstanding it will be looked at.
    pub(super) fn expect(&mut self, shared: &Shared, state: &State) {
        if !self.is_set && !state.is_settled() {
            self.begin(state);
        }
        shared.is_watched.store(self.is_set, Ordering::Relaxed);
    }

    fn begin(&mut self, state: &State) {
        (self.is_set, self.pause, self.answered) = (true, FIRST, state.answered());
        (self.rung, self.seen) = (0, None);
        self.timer.as_mut().reset(Instant::now() + FIRST);
    }

    /// Returns when it is to be looked.
    pub(super) async fn is_due(&mut self) {
        if !self.is_set {
            return std::future::pending().await;
        }
        self.timer.as_mut().await;
    }

    /// Looks.
    pub(super) fn look(&mut self, shared: &Shared, epoch: u64) {
        // Its bell may have been rung in vain.
        shared.collect();
        self.is_set = false;
        let state = shared.lock();
        if state.epoch != epoch || state.is_settled() {
            return;
        }
        if self.answered != state.answered() {
            self.begin(&state);
            return;
        }
        self.is_set = true;
        self.pause = (2 * self.pause).min(LAST);
        let mut pause = self.pause;
        let ring = state.link.ring().filter(|ring| !ring.is_idle());
        match ring.map(RingLink::ring_again) {
            Some(true) if self.rung >= HEARD => {
                self.rung = 0;
                self.timer.as_mut().reset(Instant::now() + pause);
                let checks = state.callbacks.health_checks.clone();
                drop(state);
                if let Some(checks) = checks {
                    (checks.ring_is_lost)(epoch);
                }
                return;
            }
            Some(true) => {
                self.rung += 1;
                pause = SOON;
            }
            Some(false) | None => self.rung = 0,
        }
        self.timer.as_mut().reset(Instant::now() + pause);
        let checks = state.callbacks.health_checks.clone();
        drop(state);
        let Some(pid) = checks.and_then(|checks| (checks.leader_has_exited)()) else {
            self.seen = None;
            return;
        };
        if self.seen.get_or_insert_with(Instant::now).elapsed() >= SEEN {
            shared.leader_exited(pid);
        }
    }
}

impl RingLink {
    /// Rings the server's bell, unless it has not been heard since it was rung last: the server is in a
    /// call, or waits for an interruption. Says whether it has.
    fn ring_again(&self) -> bool {
        let mut bell = [PollFd::new(self.bell.as_fd(), PollFlags::POLLIN)];
        let is_heard = poll(&mut bell, PollTimeout::ZERO) == Ok(0) && !self.is_interrupting();
        if is_heard {
            let _ = nix::unistd::write(&self.bell, &1u64.to_ne_bytes());
        }
        is_heard
    }
}

impl State {
    /// Nothing waits for a reply, nor for the server to end the link.
    fn is_settled(&self) -> bool {
        let ring_is_idle = self.link.ring().is_none_or(RingLink::is_idle);
        let is_ending = matches!(self.ending, Ending::Leaving | Ending::Closing);
        self.stream.is_answered() && ring_is_idle && !is_ending
    }

    /// How many calls have been answered on this link.
    fn answered(&self) -> u64 {
        self.stream.answered() + self.link.up().map_or(0, Up::answered_in_rings)
    }
}

impl Shared {
    /// Somebody waits for a reply: the link's task looks, if it does not already.
    pub(super) fn expect_reply(&self) {
        // Whoever has submitted what is waited for had the lock, as the task has it when it looks whether
        // there is something.
        if !self.is_watched.load(Ordering::Relaxed)
            && !self.is_watched.swap(true, Ordering::Relaxed)
        {
            self.work.notify_one();
        }
    }

    /// There is no server any more: what waits fails.
    fn leader_exited(&self, pid: i32) {
        let mut state = self.lock();
        let failed = state.die(Some(pid));
        drop(state);
        self.changed.send_replace(());
        self.work.notify_one();
        self.fail(failed);
    }
}

impl Connection {
    /// Has somebody look while replies are outstanding.
    pub(crate) fn set_health_checks(&self, checks: HealthChecks) {
        self.shared().lock().callbacks.health_checks = Some(Arc::new(checks));
    }

    /// The memory of the ring stays mapped on both sides, whatever becomes of the link: in the process
    /// something else may be in its place.
    pub(crate) fn keep_ring_mapped(&self) {
        if let Some(ring) = self.shared().lock().link.ring() {
            std::mem::forget(ring.memory());
        }
    }

    /// Ends link `epoch`: its calls go on over another one, by what the server has in its log.
    pub(crate) fn end_link(&self, epoch: u64) {
        let state = self.shared().lock();
        if let Some(stream) = state.link.stream().filter(|_| state.epoch == epoch) {
            let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
        }
    }

    /// Nothing is handed over in the ring of link `epoch` any more, which the server does not see. What is
    /// under way in it may have been executed.
    pub(crate) fn leave_ring(&self, epoch: u64) {
        let mut state = self.shared().lock();
        if state.epoch != epoch {
            return;
        }
        let complete: Vec<(_, Replies)> = state.drain_ring();
        let Some(up) = state.link.up_mut() else { return };
        let Some(ring) = up.ring.take() else { return };
        up.answered_in_rings += ring.answered();
        up.first_call = None;
        let (unanswered, memory) = ring.disconnect();
        let lost = LostBatches::possibly_executed(unanswered.map(|(_, batch)| batch).collect());
        // A new one is made before the next batch that finds nothing under way.
        state.ring_making.hasten();
        drop(state);
        self.shared().complete(complete);
        self.shared().changed.send_replace(());
        self.shared().work.notify_one();
        self.shared().fail(lost);
        drop(memory);
    }
}
