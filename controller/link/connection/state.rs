//! The state that all clones of a connection share, under its lock: calls under way, and the link.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};

use super::overdue::HealthChecks;
use super::passing::DataSocket;
use super::ring::RingLink;
use super::socket::Socket;
use super::{BUSY_AFTER, Batch, Corked, Scope, WhenBusy};
use crate::error::Outcome;
use crate::proto::log::Log;
use crate::proto::stream::Stream;
use crate::proto::{Call, Calls, Replies};
use crate::{fault, link};

pub(super) struct State {
    pub(super) stream: Stream<Batch>,
    pub(super) link: Link,
    /// How often a link was attached: a driver of an older one has nothing to say any more.
    pub(super) epoch: u64,
    /// How often another controller has held the process between two links of this one's. What was
    /// found out or made in an earlier tenure may be something else by now.
    pub(super) tenure: u64,
    /// The process outlives the link: what is queued waits for the next one.
    pub(super) persistent: bool,
    /// The process is dead: what has arrived is read, and then the link is gone.
    pub(super) dead: bool,
    /// No handle is left: end when the queue is written.
    pub(super) closing: bool,
    /// How many want nothing new to be written.
    pub(super) quiesces: usize,
    /// Batches that have their replies, and whose closures have not returned yet.
    pub(super) completing: usize,
    /// Space for batches that complete together: one such list was emptied, and is filled again.
    pub(super) emptied: Vec<(Batch, Replies)>,
    /// What is queued, if it waits for what comes next.
    pub(super) corked: Corked,
    /// Threads wait for their own replies, and have done so that often: the driver does not.
    pub(super) alone: Option<u64>,
    /// How many batches were submitted on this link.
    pub(super) batches: u32,
    /// Called when there have been many, and nothing is under way.
    pub(super) when_busy: Option<Arc<dyn Fn() -> WhenBusy + Send + Sync>>,
    /// After how many batches it is called.
    pub(super) busy_at: u32,
    /// What keeps the server from reading ahead, if it does not.
    pub(super) unable: Option<Errno>,
    /// The faster way, while there is one.
    pub(super) ring: Option<RingLink>,
    /// The number of the first call of this link in the server's log.
    pub(super) first: u64,
    /// How many calls have been answered on this link in rings before the one that there is.
    pub(super) in_rings: u64,
    /// The number of the first call that was under way when the last link was lost.
    pub(super) base: u64,
    /// A ring was left in which calls may have been executed or not: nobody knows their numbers any more.
    pub(super) uncounted: bool,
    /// The pid of the process if its server's thread has exited and another one goes on.
    pub(super) leaderless: Option<i32>,
    /// What is looked at while replies are outstanding.
    pub(super) watch: Option<Arc<HealthChecks>>,
    /// The link's end is this side's wish.
    pub(super) leaving: bool,
    /// Told when a link has been lost that the process outlives.
    pub(super) when_down: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// The controller that took the process over: its pid and since when, where they are known.
#[derive(Clone, Copy)]
pub(crate) struct Successor {
    pub(crate) pid: Option<i32>,
    pub(crate) since: Option<i64>,
}

/// The server's log of the calls that were under way on the link before.
pub(crate) struct LinkHistory {
    pub(crate) log: Log,
    /// The number of the first call that was not executed for this controller, if anybody knows.
    pub(crate) end: Option<u64>,
    /// Another controller has held the process since.
    pub(crate) held: bool,
}

/// Batches that are lost with a link, or given up.
#[derive(Default)]
pub(super) struct LostBatches {
    pub(super) batches: Vec<(Batch, Outcome)>,
    /// The pid of the process if its server's thread has exited and another one goes on.
    pub(super) leaderless: Option<i32>,
    /// Who has the process now, if it is lost to somebody.
    pub(super) successor: Option<Successor>,
    /// Dropping it can make a call: not under the lock.
    memory: Option<Arc<link::Shared>>,
}

impl LostBatches {
    fn new(batches: Vec<Batch>, outcome: Outcome) -> Self {
        let batches = batches.into_iter().map(|batch| (batch, outcome)).collect();
        Self { batches, ..Self::default() }
    }

    pub(super) fn possibly_executed(batches: Vec<Batch>) -> Self {
        batches.iter().for_each(Batch::give_up);
        Self::new(batches, Outcome::PossiblyExecuted)
    }

    pub(super) fn extend(&mut self, other: Self) {
        self.batches.extend(other.batches);
    }
}

pub(super) enum Link {
    Up(Arc<Socket>),
    Down,
    Gone,
    /// Another controller has taken the process over.
    Superseded(Successor),
}

impl Link {
    pub(super) fn stream(&self) -> Option<&Arc<Socket>> {
        match self {
            Self::Up(stream) => Some(stream),
            Self::Down | Self::Gone | Self::Superseded(_) => None,
        }
    }
}

/// The fault that `farcall torture` is to notice: calls are sent again after another controller.
fn is_sent_again() -> bool {
    fault::mutant("send-again").is_some()
}

/// Batches that have just got their replies, in the order of these.
pub(super) fn replied(batches: &[(Batch, Replies)]) {
    batches.iter().for_each(|(batch, replies)| batch.replied(replies));
}

/// What has become of bytes that arrived.
pub(super) struct Arrived {
    pub(super) complete: Vec<(Batch, Replies)>,
    /// They are out of step: the stream is over.
    pub(super) over: bool,
}

impl State {
    /// Nothing is unanswered, and what has been answered is owned.
    pub(super) fn is_idle(&self) -> bool {
        self.stream.is_answered() && !self.ring_is_busy() && self.completing == 0
    }

    /// Says when `when_busy` is called again.
    pub(super) fn call_when_busy(&mut self, next: WhenBusy) {
        match next {
            WhenBusy::Done => {}
            WhenBusy::CallAgain => self.busy_at = BUSY_AFTER,
            WhenBusy::CallLater => self.busy_at = self.batches.saturating_mul(2),
        }
    }

    /// Writes what waits for company: there will be none.
    pub(super) fn uncork(&mut self) {
        if self.corked != Corked::Nothing {
            self.flush();
        }
    }

    /// Writes what can be written. Says whether something is left that could be.
    pub(super) fn flush(&mut self) -> bool {
        if self.ring_is_busy() {
            // The stream follows when it is empty.
            return false;
        }
        self.corked = Corked::Nothing;
        let Some(stream) = self.link.stream().cloned() else { return false };
        self.write(&stream, self.quiesces > 0)
    }

    fn write(&mut self, stream: &Socket, torn_only: bool) -> bool {
        loop {
            let output = self.stream.output(torn_only);
            if output.is_empty() {
                return false;
            }
            match stream.write(&output) {
                Ok(n) => self.stream.wrote(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                // The reading side sees the end too, and it is the one that acts on it.
                Err(_) => return false,
            }
        }
    }

    /// Writes batches ahead of everything that is queued, of which nothing has been written in part,
    /// whatever pauses there are: all of them at once.
    pub(super) fn write_first<const N: usize>(
        &mut self,
        batches: [(Calls, Batch); N],
        stream: &Socket,
    ) {
        // Somebody has to wait for it.
        self.alone = None;
        let queued = self.stream.take_queue();
        for (calls, batch) in batches {
            self.stream.push(calls, batch);
        }
        // Nothing is under way: a few requests fit into the socket's buffer.
        self.write(stream, false);
        self.stream.append_queue(queued);
    }

    /// Takes bytes that have arrived. What is complete with them counts as completing.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> Arrived {
        let mut complete = std::mem::take(&mut self.emptied);
        let over = self.stream.receive(bytes, &mut complete).is_err();
        replied(&complete);
        self.completing += complete.len();
        Arrived { complete, over }
    }

    /// Takes what the server has answered before the link's end, whether or not the runtime has
    /// heard of it.
    pub(super) fn drain(&mut self) -> Vec<(Batch, Replies)> {
        let mut complete = self.drain_ring();
        let Some(stream) = self.link.stream().cloned() else { return complete };
        let mut read = || stream.read_now(|bytes| (!bytes.is_empty()).then(|| self.receive(bytes)));
        while let Ok(Some(arrived)) = read() {
            complete.extend(arrived.complete);
            if arrived.over {
                break;
            }
        }
        complete
    }

    /// The same of a link whose stream has been read to its end.
    pub(super) fn drain_ring(&mut self) -> Vec<(Batch, Replies)> {
        let mut complete = Vec::new();
        if let Some(ring) = &mut self.ring {
            ring.take_complete(&mut complete);
            self.completing += complete.len();
        }
        complete
    }

    /// Forgets the link. What was under way waits for what the server's log says at the next one, if
    /// there can be one. Returns what fails at once.
    pub(super) fn detach(&mut self) -> LostBatches {
        if let Some(stream) = self.link.stream() {
            // Wakes the driver, if the other end has not.
            let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
        }
        self.detach_from_the_end()
    }

    /// The same where the other end has ended the stream.
    pub(super) fn detach_from_the_end(&mut self) -> LostBatches {
        if self.link.stream().is_some() {
            let in_ring = self.ring.as_ref().map_or(0, RingLink::answered);
            self.base = self.first + self.stream.answered() + self.in_rings + in_ring;
        }
        self.link = Link::Down;
        self.stream.disconnect();
        let mut lost = LostBatches::default();
        if let Some(ring) = self.ring.take() {
            let (unanswered, pages) = ring.disconnect();
            for (unanswered, batch) in unanswered {
                self.stream.set_aside(unanswered, batch);
            }
            lost.memory = Some(pages);
        }
        let logged = self.persistent && self.stream.version() > 0 && !self.uncounted;
        // What is of the link can't go on, and others may wait for it to be over. And a program that
        // was executed instead of the server does not keep its log.
        let given_up = self.stream.give_up(|last, batch| {
            !logged || batch.is_of_this_link() || last.is_some_and(Call::executes)
        });
        lost.extend(LostBatches::new(given_up, Outcome::PossiblyExecuted));
        let of_link = self.stream.withdraw(Batch::is_of_this_link);
        lost.extend(LostBatches::new(of_link, Outcome::NotExecuted));
        lost
    }

    /// What was under way when the link was lost goes on in front of what is queued, by what the
    /// server says, or without that is given up. Returns what is complete, which counts as completing,
    /// and what is lost.
    ///
    /// Where another controller has held the process, nothing goes on.
    pub(super) fn resume(
        &mut self,
        past: Option<&LinkHistory>,
    ) -> (Vec<(Batch, Replies)>, LostBatches) {
        self.learn(past, past.is_none_or(|past| !past.held || is_sent_again()))
    }

    /// Another controller has held the process: what waits is not sent any more. Nor is what comes from
    /// those who were at it before.
    pub(super) fn end_tenure(&mut self) -> LostBatches {
        self.tenure += 1;
        if is_sent_again() { LostBatches::default() } else { self.abandon() }
    }

    /// Whether what is meant for that tenure alone may be submitted.
    pub(super) fn is_in(&self, tenure: Option<u64>) -> bool {
        tenure.is_none_or(|tenure| tenure == self.tenure)
    }

    /// What was under way learns what has become of it, and goes on if `again`.
    fn learn(
        &mut self,
        past: Option<&LinkHistory>,
        again: bool,
    ) -> (Vec<(Batch, Replies)>, LostBatches) {
        let Some(LinkHistory { log, end: Some(end), .. }) = past else {
            let lost = self.stream.give_up(|_, _| true);
            return (Vec::new(), LostBatches::new(lost, Outcome::PossiblyExecuted));
        };
        let fates = self.stream.resume(log, self.base, *end, again);
        fates.lost.iter().for_each(Batch::give_up);
        let mut lost = LostBatches::new(fates.lost, Outcome::Executed);
        lost.extend(LostBatches::new(fates.not_executed, Outcome::NotExecuted));
        replied(&fates.complete);
        self.completing += fates.complete.len();
        (fates.complete, lost)
    }

    /// What is queued and passes descriptors does so over that socket, or is not executed any more.
    pub(super) fn move_to(&mut self, data: Option<&DataSocket>) -> LostBatches {
        let fates = self.stream.revise(|calls, batch| match (&mut batch.scope, data) {
            (Scope::DataSocket(passing), Some(data)) => passing.move_to(data, calls).is_ok(),
            (Scope::DataSocket(_), None) => false,
            _ => true,
        });
        fates.lost.iter().for_each(Batch::give_up);
        let mut lost = LostBatches::new(fates.lost, Outcome::Executed);
        lost.extend(LostBatches::new(fates.not_executed, Outcome::NotExecuted));
        lost
    }

    /// Another controller has taken the process over, as `past` tells. Returns what was executed, and
    /// what is lost: all the rest.
    pub(super) fn supersede(
        &mut self,
        successor: Successor,
        past: &LinkHistory,
    ) -> (Vec<(Batch, Replies)>, LostBatches) {
        let (complete, mut lost) = self.learn(Some(past), false);
        lost.extend(self.abandon());
        lost.successor = Some(successor);
        self.link = Link::Superseded(successor);
        (complete, lost)
    }

    /// Gives up what was never written, and what nobody will say any more what has become of.
    pub(super) fn abandon(&mut self) -> LostBatches {
        let mut lost =
            LostBatches::new(self.stream.give_up(|_, _| true), Outcome::PossiblyExecuted);
        let fates = self.stream.abandon();
        lost.extend(LostBatches::new(fates.lost, Outcome::Executed));
        lost.extend(LostBatches::new(fates.not_executed, Outcome::NotExecuted));
        lost
    }

    pub(super) fn bury(&mut self) -> LostBatches {
        self.link = Link::Gone;
        self.abandon()
    }
}
