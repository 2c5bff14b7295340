//! The state that all clones of a connection share, under its lock: calls under way, and the link.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::sys::socket::{Shutdown, shutdown};

use super::Batch;
use super::ring::RingLink;
use super::socket::Socket;
use crate::call::{Call, Outcome, Reply};
use crate::transport;
use crate::transport::stream::Stream;

pub(super) struct State {
    pub(super) stream: Stream<Batch>,
    pub(super) link: Link,
    /// How often a link was attached: a driver of an older one has nothing to say any more.
    pub(super) epoch: u64,
    /// The process outlives the link: what is queued waits for the next one.
    pub(super) persistent: bool,
    /// The process is dead: what has arrived is read, and then the link is gone.
    pub(super) dead: bool,
    /// No handle is left: end when the queue is written.
    pub(super) closing: bool,
    /// How many want nothing new to be written.
    pub(super) pauses: usize,
    /// Batches that have their replies, and whose closures have not returned yet.
    pub(super) completing: usize,
    /// All that is queued can wait for what comes next.
    pub(super) soon: bool,
    /// Threads wait for their own replies, and have done so that often: the driver does not.
    pub(super) alone: Option<u64>,
    /// How many batches were submitted on this link.
    pub(super) batches: u32,
    /// Told when there have been many, and nothing is under way.
    pub(super) when_busy: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
    /// It need not be told again on this link.
    pub(super) has_told: bool,
    /// The faster way, while there is one.
    pub(super) ring: Option<RingLink>,
}

/// What is lost with a link, or given up.
#[derive(Default)]
pub(super) struct Lost {
    pub(super) batches: Vec<(Batch, Outcome)>,
    /// Dropping it can make a call: not under the lock.
    _memory: Option<Arc<transport::Shared>>,
}

impl Lost {
    pub(super) fn extend(&mut self, other: Self) {
        self.batches.extend(other.batches);
    }
}

pub(super) enum Link {
    Up(Arc<Socket>),
    Down,
    Gone,
}

impl Link {
    pub(super) fn stream(&self) -> Option<&Arc<Socket>> {
        match self {
            Self::Up(stream) => Some(stream),
            Self::Down | Self::Gone => None,
        }
    }
}

/// What has become of bytes that arrived.
pub(super) struct Arrived {
    pub(super) complete: Vec<(Batch, Vec<Reply>)>,
    /// They are out of step: the stream is over.
    pub(super) over: bool,
}

impl State {
    /// Nothing is unanswered, and what has been answered is owned.
    pub(super) fn is_idle(&self) -> bool {
        self.stream.is_answered() && !self.ring_is_busy() && self.completing == 0
    }

    /// Writes what waits for company: there will be none.
    pub(super) fn hurry(&mut self) {
        if self.soon {
            self.flush();
        }
    }

    /// Writes what can be written. Says whether something is left that could be.
    pub(super) fn flush(&mut self) -> bool {
        if self.ring_is_busy() {
            // The stream follows when it is empty.
            return false;
        }
        self.soon = false;
        let Some(stream) = self.link.stream().cloned() else { return false };
        self.write(&stream, self.pauses > 0)
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

    /// Writes a batch ahead of everything that is queued, of which nothing has been written in part,
    /// whatever pauses there are.
    pub(super) fn write_first(&mut self, calls: Vec<Call>, batch: Batch, stream: &Socket) {
        // Somebody has to wait for it.
        self.alone = None;
        let queued = self.stream.take_queue();
        self.stream.push(calls, batch);
        // Nothing is under way: a batch of a few requests fits into the socket's buffer.
        self.write(stream, false);
        self.stream.append_queue(queued);
    }

    /// Takes bytes that have arrived. What is complete with them counts as completing.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> Arrived {
        let mut complete = Vec::new();
        let over = self.stream.receive(bytes, &mut complete).is_err();
        self.completing += complete.len();
        Arrived { complete, over }
    }

    /// Takes what the server has answered before the link's end, whether or not the runtime has
    /// heard of it.
    pub(super) fn drain(&mut self) -> Vec<(Batch, Vec<Reply>)> {
        let mut complete = Vec::new();
        if let Some(ring) = &mut self.ring {
            ring.take_complete(&mut complete);
            self.completing += complete.len();
        }
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

    /// Forgets the link. Returns what fails with it.
    pub(super) fn detach(&mut self) -> Lost {
        if let Some(stream) = self.link.stream() {
            // Wakes the driver, if the other end has not.
            let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
        }
        self.link = Link::Down;
        let mut lost = self.stream.disconnect();
        let mut memory = None;
        if let Some(ring) = self.ring.take() {
            let (batches, pages) = ring.disconnect();
            lost.extend(batches);
            memory = Some(pages);
        }
        let lost = lost.into_iter().map(|batch| (batch, Outcome::PossiblyExecuted));
        let mut batches: Vec<_> = lost.collect();
        let of_link = self.stream.withdraw(|batch| batch.of_link).into_iter();
        batches.extend(of_link.map(|batch| (batch, Outcome::NotExecuted)));
        Lost { batches, _memory: memory }
    }

    /// Gives up what was never written.
    pub(super) fn abandon(&mut self) -> Lost {
        let queued = self.stream.abandon().into_iter();
        let batches = queued.map(|batch| (batch, Outcome::NotExecuted)).collect();
        Lost { batches, _memory: None }
    }

    pub(super) fn bury(&mut self) -> Lost {
        self.link = Link::Gone;
        self.abandon()
    }
}
