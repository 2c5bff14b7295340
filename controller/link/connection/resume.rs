//! What becomes of batches when their link is over: they are complete, go on over the next link, or are
//! lost.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::sys::socket::{Shutdown, shutdown};

use super::batch::{Batch, Scope};
use super::exchange::replied;
use super::passing::DataSocket;
use super::state::{Link, State, Successor};
use crate::error::Outcome;
use crate::proto::log::Log;
use crate::proto::{Call, Replies};
use crate::{fault, link};

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
    /// The controller that has the process now, if it is lost to one.
    pub(super) successor: Option<Successor>,
    /// The ring's memory. Dropping it can make a call: not under the lock.
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

/// The fault that `farcall torture` is to notice: calls are sent again after another controller.
fn is_sent_again() -> bool {
    fault::mutant("send-again").is_some()
}

impl State {
    /// Forgets the link. What was under way waits for what the server's log says at the next one, if
    /// there can be one. Returns what fails at once.
    pub(super) fn detach(&mut self) -> LostBatches {
        if let Some(stream) = self.link.stream() {
            // Wakes the link's task, if the other end has not.
            let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
        }
        self.forget_link()
    }

    /// Like [`State::detach`], and leaves the stream as it is.
    pub(super) fn forget_link(&mut self) -> LostBatches {
        let (resume_from, ring) = match std::mem::replace(&mut self.link, Link::Gone) {
            Link::Up(up) => {
                let answered = self.stream.answered() + up.answered_in_rings();
                (up.first_call.map(|first| first + answered), up.ring)
            }
            Link::Down { resume_from } => (resume_from, None),
            // Nothing is under way.
            Link::Superseded(_) | Link::Gone => (None, None),
        };
        self.link = Link::Down { resume_from };
        self.stream.disconnect();
        let mut lost = LostBatches::default();
        if let Some(ring) = ring {
            let (unanswered, pages) = ring.disconnect();
            for (unanswered, batch) in unanswered {
                self.stream.set_aside(unanswered, batch);
            }
            lost.memory = Some(pages);
        }
        let logged = self.persistent && self.stream.version() > 0 && resume_from.is_some();
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
        history: Option<&LinkHistory>,
    ) -> (Vec<(Batch, Replies)>, LostBatches) {
        self.learn(history, history.is_none_or(|history| !history.held || is_sent_again()))
    }

    /// Another controller has held the process: what waits is not sent any more. Nor is what comes from
    /// those who were at it before.
    pub(super) fn end_tenure(&mut self) -> LostBatches {
        self.tenure += 1;
        if is_sent_again() { LostBatches::default() } else { self.abandon() }
    }

    /// What was under way learns what has become of it, and goes on if `again`.
    fn learn(
        &mut self,
        history: Option<&LinkHistory>,
        again: bool,
    ) -> (Vec<(Batch, Replies)>, LostBatches) {
        let Some(LinkHistory { log, end: Some(end), .. }) = history else {
            let lost = self.stream.give_up(|_, _| true);
            return (Vec::new(), LostBatches::new(lost, Outcome::PossiblyExecuted));
        };
        let first = match self.link {
            Link::Down { resume_from } => resume_from.unwrap_or(0),
            Link::Up(_) | Link::Superseded(_) | Link::Gone => 0,
        };
        let fates = self.stream.resume(log, first, *end, again);
        fates.lost.iter().for_each(Batch::give_up);
        let mut lost = LostBatches::new(fates.lost, Outcome::Executed);
        lost.extend(LostBatches::new(fates.not_executed, Outcome::NotExecuted));
        replied(&fates.complete);
        self.completing.count += fates.complete.len();
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

    /// Another controller has taken the process over, as `history` tells. Returns what was executed, and
    /// what is lost: all the rest.
    pub(super) fn supersede(
        &mut self,
        successor: Successor,
        history: &LinkHistory,
    ) -> (Vec<(Batch, Replies)>, LostBatches) {
        let (complete, mut lost) = self.learn(Some(history), false);
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

    /// There will be no link any more.
    pub(super) fn bury(&mut self) -> LostBatches {
        self.link = Link::Gone;
        self.abandon()
    }

    /// The process is dead, or its server's thread has exited: what waits fails, unless the link's task
    /// still has to read what has arrived.
    pub(super) fn die(&mut self, leaderless: Option<i32>) -> LostBatches {
        self.ending.die(leaderless);
        if self.link.is_up() { LostBatches::default() } else { self.bury() }
    }
}
