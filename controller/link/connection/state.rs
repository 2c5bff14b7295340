//! The state that all clones of a connection share, under its lock.
//!
//! Four parts of it change by themselves, and each is an enum:
//!
//! ```text
//! Link      Down ──attach──▶ Up ──end──▶ Down          the process is persistent: there may be a next link
//!                             └──end──▶ Gone          it is not, or Ending is Closing or Dead
//!           Down ──supersede──▶ Superseded ──attach──▶ Up
//!
//! Ending    Open ──▶ Leaving ──attach──▶ Open          `Connection::shut_down` ends this link, and no more
//!             └────────┴──▶ Closing                    the last handle was dropped: ends when all is written
//!             └────────┴───────┴──▶ Dead               the process is dead, or as good as dead
//!
//! Writing   Open ◀──▶ Corked                           what is queued waits for company
//!             └──────────┴──▶ Quiesced(n)              only the rest of a batch that was begun is written
//!                             the last of n is dropped ──▶ Open
//!
//! Reading   ByTask ◀──▶ ByThreads                      who reads replies, while the link is up
//! ```
//! What belongs to one link (its stream, its ring, the numbers of its calls, who reads) is in [`Up`], and
//! ends with it.

use std::num::NonZeroUsize;
use std::sync::Arc;

use nix::errno::Errno;

use super::batch::Batch;
use super::overdue::HealthChecks;
use super::ring::RingLink;
use super::ring_making::RingMaking;
use super::socket::Socket;
use crate::error::{Error, Outcome};
use crate::proto::Replies;
use crate::proto::stream::Stream;

pub(super) struct State {
    pub(super) stream: Stream<Batch>,
    pub(super) link: Link,
    /// The number of links that were attached: the task of an older one has nothing to say any more.
    pub(super) epoch: u64,
    /// The number of times that another controller has held the process between two links of this one's.
    /// What was found out or made in an earlier tenure may be something else by now.
    pub(super) tenure: u64,
    /// The process outlives the link: what is queued waits for the next one.
    pub(super) persistent: bool,
    pub(super) ending: Ending,
    pub(super) writing: Writing,
    pub(super) completing: Completing,
    pub(super) ring_making: RingMaking,
    /// The error that keeps the server from reading ahead, if it does not.
    pub(super) no_read_ahead: Option<Errno>,
    pub(super) callbacks: Callbacks,
}

/// The link to the server.
pub(super) enum Link {
    Up(Up),
    Down {
        /// The number, in the server's log, of the first call that was under way when the link was lost.
        /// None: nobody knows it, and nothing is under way.
        resume_from: Option<u64>,
    },
    /// Another controller has taken the process over.
    Superseded(Successor),
    /// There will be no link any more: what comes is refused. [`Ending`] has the reason.
    Gone,
}

/// What belongs to one link.
pub(super) struct Up {
    pub(super) stream: Arc<Socket>,
    /// The faster way, while there is one.
    pub(super) ring: Option<RingLink>,
    pub(super) reading: Reading,
    /// The number of this link's first call in the server's log. None: a ring was left in which calls may
    /// have been executed or not, and nobody knows the numbers of those behind them.
    pub(super) first_call: Option<u64>,
    /// The number of calls that were answered in rings before the one that there is.
    pub(super) answered_in_rings: u64,
}

/// Who reads replies from the stream.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// The link's task.
    ByTask,
    /// Threads that wait for their own replies: that many calls by now.
    ByThreads { calls: u64 },
}

/// When queued batches are written, while the link is up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Writing {
    /// As soon as they can be.
    Open,
    /// The queue waits for company, as under TCP_CORK (tcp(7)), while nothing is unanswered. `awaited`:
    /// somebody will wait for a batch in it.
    Corked { awaited: bool },
    /// So many [`Quiesce`](super::Quiesce) are alive.
    Quiesced(NonZeroUsize),
}

/// How far the connection is from its end. A later one in this list replaces an earlier one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    Open,
    /// The end of the link that there is has been asked for by this side.
    Leaving,
    /// No handle is left: the stream ends when the queue is written.
    Closing,
    /// The process is dead: what has arrived is read, and then the link is gone.
    Dead {
        /// The pid of the process if its server's thread has exited and another one goes on.
        leaderless: Option<i32>,
    },
}

/// Batches that have their replies.
#[derive(Default)]
pub(super) struct Completing {
    /// The number of those whose closures have not returned yet.
    pub(super) count: usize,
    /// An empty list for those that complete together: its memory is used again.
    pub(super) list: Vec<(Batch, Replies)>,
}

/// What the connection calls, outside of its lock.
#[derive(Default)]
pub(super) struct Callbacks {
    /// Called while replies are outstanding.
    pub(super) health_checks: Option<Arc<HealthChecks>>,
    /// Called when a link has been lost that the process outlives.
    pub(super) when_down: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// The controller that took the process over: its pid and since when, where they are known.
#[derive(Clone, Copy)]
pub(crate) struct Successor {
    pub(crate) pid: Option<i32>,
    pub(crate) since: Option<i64>,
}

impl Successor {
    /// A controller that has held the process and is gone again.
    pub(super) const GONE: Self = Self { pid: None, since: None };

    /// The error of a call with that outcome.
    pub(super) fn error(self, outcome: Outcome) -> Error {
        let Self { pid, since } = self;
        Error::Superseded { pid, since, outcome }
    }
}

impl Up {
    pub(super) fn new(stream: Arc<Socket>, first_call: u64) -> Self {
        Self {
            stream,
            ring: None,
            reading: Reading::ByTask,
            first_call: Some(first_call),
            answered_in_rings: 0,
        }
    }

    /// The number of calls that were answered in rings on this link.
    pub(super) fn answered_in_rings(&self) -> u64 {
        self.answered_in_rings + self.ring.as_ref().map_or(0, RingLink::answered)
    }
}

impl Link {
    pub(super) fn up(&self) -> Option<&Up> {
        match self {
            Self::Up(up) => Some(up),
            Self::Down { .. } | Self::Gone | Self::Superseded(_) => None,
        }
    }

    pub(super) fn up_mut(&mut self) -> Option<&mut Up> {
        match self {
            Self::Up(up) => Some(up),
            Self::Down { .. } | Self::Gone | Self::Superseded(_) => None,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self, Self::Up(_))
    }

    pub(super) fn is_down(&self) -> bool {
        matches!(self, Self::Down { .. })
    }

    pub(super) fn stream(&self) -> Option<&Arc<Socket>> {
        self.up().map(|up| &up.stream)
    }

    pub(super) fn ring(&self) -> Option<&RingLink> {
        self.up()?.ring.as_ref()
    }

    pub(super) fn ring_mut(&mut self) -> Option<&mut RingLink> {
        self.up_mut()?.ring.as_mut()
    }
}

impl Writing {
    /// One more wants nothing new to be written.
    pub(super) fn quiesce(&mut self) {
        *self = Self::Quiesced(match *self {
            Self::Quiesced(count) => count.saturating_add(1),
            Self::Open | Self::Corked { .. } => NonZeroUsize::MIN,
        });
    }

    /// One of them does not any more.
    pub(super) fn resume(&mut self) {
        if let Self::Quiesced(count) = *self {
            *self = NonZeroUsize::new(count.get() - 1).map_or(Self::Open, Self::Quiesced);
        }
    }

    pub(super) fn is_quiesced(self) -> bool {
        self.quiesces() > 0
    }

    /// How many want nothing new to be written.
    pub(super) fn quiesces(self) -> usize {
        match self {
            Self::Quiesced(count) => count.get(),
            Self::Open | Self::Corked { .. } => 0,
        }
    }

    pub(super) fn is_corked(self) -> bool {
        matches!(self, Self::Corked { .. })
    }

    /// What is queued does not wait for company.
    pub(super) fn uncork(&mut self) {
        if self.is_corked() {
            *self = Self::Open;
        }
    }
}

impl Ending {
    /// This side ends the link.
    pub(super) fn leave(&mut self) {
        if *self == Self::Open {
            *self = Self::Leaving;
        }
    }

    /// There is another link than the one that this side has ended.
    pub(super) fn attached(&mut self) {
        if *self == Self::Leaving {
            *self = Self::Open;
        }
    }

    /// The last handle is dropped.
    pub(super) fn close(&mut self) {
        if !self.is_dead() {
            *self = Self::Closing;
        }
    }

    /// The process is dead, or, without its leader, as good as dead.
    pub(super) fn die(&mut self, leaderless: Option<i32>) {
        *self = Self::Dead { leaderless: leaderless.or(self.leaderless()) };
    }

    pub(super) fn is_dead(self) -> bool {
        matches!(self, Self::Dead { .. })
    }

    /// The pid of the process if its server's thread has exited and another one goes on.
    pub(super) fn leaderless(self) -> Option<i32> {
        match self {
            Self::Dead { leaderless } => leaderless,
            Self::Open | Self::Leaving | Self::Closing => None,
        }
    }

    /// The error of a call that was not executed because the process is gone, or as good as that.
    pub(super) fn error(self) -> Error {
        match self.leaderless() {
            Some(pid) => Error::LeaderExited { pid, outcome: Outcome::NotExecuted },
            None => Error::Gone,
        }
    }
}

impl State {
    /// The state of a connection that has had no link yet.
    pub(super) fn new() -> Self {
        Self {
            stream: Stream::default(),
            link: Link::Down { resume_from: None },
            epoch: 0,
            tenure: 0,
            persistent: false,
            ending: Ending::Open,
            writing: Writing::Open,
            completing: Completing::default(),
            ring_making: RingMaking::default(),
            no_read_ahead: None,
            callbacks: Callbacks::default(),
        }
    }

    /// Nothing is unanswered, and what has been answered is owned.
    pub(super) fn is_idle(&self) -> bool {
        self.stream.is_answered() && !self.ring_is_busy() && self.completing.count == 0
    }

    /// Nothing is unanswered on the stream, or waits to be written there.
    pub(super) fn stream_is_idle(&self) -> bool {
        self.stream.is_answered() && self.stream.is_written()
    }

    /// Whether what is meant for that tenure alone may be submitted.
    pub(super) fn is_in(&self, tenure: Option<u64>) -> bool {
        tenure.is_none_or(|tenure| tenure == self.tenure)
    }

    /// The ring, if the next batch may go into it.
    #[inline]
    pub(super) fn usable_ring(&mut self) -> Option<&mut RingLink> {
        let is_open = self.ending == Ending::Open && !self.writing.is_quiesced();
        let is_usable = is_open && self.stream_is_idle();
        self.link.ring_mut().filter(|_| is_usable)
    }

    pub(super) fn ring_is_busy(&self) -> bool {
        // A call of the stream would get a signal that comes late.
        self.link.ring().is_some_and(|ring| ring.interruption.is_some() || !ring.is_idle())
    }

    /// Leaves what is under way in the ring to the task that hears the bell. True: something is complete.
    pub(super) fn attend_ring(&self) -> bool {
        self.link.ring().is_some_and(RingLink::attend)
    }
}
