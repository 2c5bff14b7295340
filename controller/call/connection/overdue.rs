//! What is looked at while a reply, or the end of a link, is outstanding: whether there still is a server,
//! and whether it still sees the ring.
//!
//! The end of a process ends its stream, and most that can go wrong shows there. These two do not:
//! - The main thread exits, and another thread of the process goes on. The stream stays open, for that
//!   other thread has the same table of descriptors; and a pidfd tells of the end of the whole process.
//! - The ring's memory was mapped over in the process, or overwritten. The server does not see what is
//!   handed over, or not that it is to ring.
//!
//! No timer wakes a pair that has nothing to do: whoever waits for a reply tells the link's task after a
//! while that it is overdue, and whoever ends a link tells it at once; and that looks, less and less often,
//! until it is there.
//!
//! A server that is not in a call hears its bell. So of one that has heard it twice, and has executed
//! nothing in between though there is something to be executed, it is known that it does not see that.

use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::runtime::Handle as Runtime;
use tokio::time::{Instant, Sleep, sleep};

use super::ring::RingLink;
use super::state::{Link, Lost, State};
use super::{Connection, Shared};
use crate::call::{Error, Outcome, Replies};

/// After how long a reply is overdue. A runtime of several threads may wake one of them as long after the
/// last reply, too: it has been told when to wake, and is not told that it need not.
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

/// What the owner of a connection looks at, and does.
pub(crate) struct Watch {
    /// The pid of the process if its main thread, in which the server runs, has exited and another one
    /// goes on.
    pub(crate) leader_has_exited: Box<dyn Fn() -> Option<i32> + Send + Sync>,
    /// The server does not see the ring of that [`Connection::epoch`].
    pub(crate) ring_is_lost: Box<dyn Fn(u64) + Send + Sync>,
}

/// What the link's task knows of an outstanding reply.
pub(super) struct Overdue {
    /// When to look.
    at: Instant,
    pause: Duration,
    /// How many calls had been answered when it was looked last.
    answered: u64,
    /// How often the bell was rung since then.
    rung: u32,
    /// Since when the main thread is known to have exited.
    seen: Option<Instant>,
}

impl Overdue {
    /// When it is to be looked whether something is wrong: some time after the last reply.
    pub(super) fn next(this: &mut Option<Self>, state: &State) -> Option<Instant> {
        if state.is_settled() {
            *this = None;
            return None;
        }
        let answered = state.answered();
        let same = this.as_ref().filter(|overdue| overdue.answered == answered).is_some();
        if !same {
            let at = Instant::now() + FIRST;
            *this = Some(Self { at, pause: FIRST, answered, rung: 0, seen: None });
        }
        this.as_ref().map(|overdue| overdue.at)
    }

    /// Looks.
    pub(super) fn look(&mut self, shared: &Shared, epoch: u64) {
        // Its bell may have been rung in vain.
        shared.collect();
        let state = shared.lock();
        if state.epoch != epoch || state.is_settled() {
            return;
        }
        self.pause = (2 * self.pause).min(LAST);
        self.at = Instant::now() + self.pause;
        let ring = state.ring.as_ref().filter(|ring| !ring.is_idle());
        match ring.map(RingLink::ring_again) {
            Some(true) if self.rung >= HEARD => {
                self.rung = 0;
                let watch = state.watch.clone();
                drop(state);
                if let Some(watch) = watch {
                    (watch.ring_is_lost)(epoch);
                }
                return;
            }
            Some(true) => {
                self.rung += 1;
                self.at = Instant::now() + SOON;
            }
            Some(false) | None => self.rung = 0,
        }
        let watch = state.watch.clone();
        drop(state);
        let Some(pid) = watch.and_then(|watch| (watch.leader_has_exited)()) else {
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
        let is_answered =
            self.stream.is_answered() && self.ring.as_ref().is_none_or(RingLink::is_idle);
        is_answered && !self.leaving && !self.closing
    }

    /// How many calls have been answered on this link.
    fn answered(&self) -> u64 {
        self.stream.answered() + self.in_rings + self.ring.as_ref().map_or(0, RingLink::answered)
    }

    /// What a call is told that was not executed because the process is gone, or as good as that.
    pub(super) fn gone(&self) -> Error {
        match self.leaderless {
            Some(pid) => Error::LeaderExited { pid, outcome: Outcome::NotExecuted },
            None => Error::Gone,
        }
    }
}

impl Shared {
    /// There is no server any more: what waits fails.
    fn leader_exited(&self, pid: i32) {
        let mut state = self.lock();
        state.leaderless = Some(pid);
        state.dead = true;
        let failed = if state.link.stream().is_none() { state.bury() } else { Lost::default() };
        drop(state);
        self.changed.send_replace(());
        self.work.notify_one();
        self.fail(failed);
    }
}

impl Connection {
    /// Has somebody look while replies are outstanding.
    pub(crate) fn watch_over(&self, watch: Watch) {
        self.shared().lock().watch = Some(Arc::new(watch));
    }

    /// The memory of the ring stays mapped on both sides, whatever becomes of the link: in the process
    /// something else may be in its place.
    pub(crate) fn keep_ring_mapped(&self) {
        if let Some(ring) = &self.shared().lock().ring {
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
        if state.epoch != epoch || !matches!(state.link, Link::Up(_)) {
            return;
        }
        let complete: Vec<(_, Replies)> = state.drain_ring();
        let Some(ring) = state.ring.take() else { return };
        state.in_rings += ring.answered();
        state.uncounted = true;
        let (unanswered, memory) = ring.disconnect();
        let lost = Lost::possibly_executed(unanswered.map(|(_, batch)| batch).collect());
        // A new one is made before the next batch that finds nothing under way.
        state.busy_at = 0;
        drop(state);
        self.shared().complete(complete);
        self.shared().changed.send_replace(());
        self.shared().work.notify_one();
        self.shared().fail(lost);
        drop(memory);
    }
}

/// Tells the link's task when a reply is overdue that it has not been told of.
pub(super) struct Patience {
    shared: Arc<Shared>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Patience {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, timer: None }
    }

    /// Whether the task has been told.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let timer = match &mut self.timer {
            Some(timer) => timer,
            // A thread that waits, or another executor: there is nothing here to wait with.
            None if Runtime::try_current().is_err() => {
                self.shared.work.notify_one();
                return Poll::Ready(());
            }
            None => self.timer.insert(Box::pin(sleep(FIRST))),
        };
        timer.as_mut().poll(context).map(|()| self.shared.work.notify_one())
    }
}
