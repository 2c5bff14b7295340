//! Writing what is queued, and taking what has arrived, under the lock of the state.

use std::io;

use super::batch::Batch;
use super::socket::Socket;
use super::state::{Reading, State};
use crate::proto::{Calls, Replies};

/// Gives descriptors to batches that have just got their replies, in the order of these.
pub(super) fn replied(batches: &[(Batch, Replies)]) {
    batches.iter().for_each(|(batch, replies)| batch.replied(replies));
}

/// Batches that bytes which arrived have completed.
pub(super) struct Arrived {
    pub(super) complete: Vec<(Batch, Replies)>,
    /// The bytes are out of step: the stream is over.
    pub(super) over: bool,
}

impl State {
    /// Writes what waits for company: there will be none. Says whether something is left that could be
    /// written.
    pub(super) fn uncork(&mut self) -> bool {
        self.writing.is_corked() && self.flush()
    }

    /// Writes what can be written. Says whether something is left that could be.
    pub(super) fn flush(&mut self) -> bool {
        if self.ring_is_busy() {
            // The stream follows when it is empty.
            return false;
        }
        self.writing.uncork();
        let Some(stream) = self.link.stream().cloned() else { return false };
        self.write(&stream, self.writing.is_quiesced())
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
    /// quiesced or not: all of them at once.
    pub(super) fn write_first<const N: usize>(
        &mut self,
        batches: [(Calls, Batch); N],
        stream: &Socket,
    ) {
        // Somebody has to wait for it.
        self.read_by_task();
        let queued = self.stream.take_queue();
        for (calls, batch) in batches {
            self.stream.push(calls, batch);
        }
        // Nothing is under way: a few requests fit into the socket's buffer.
        self.write(stream, false);
        self.stream.append_queue(queued);
    }

    /// Leaves replies to the link's task. Says whether it has to be told.
    pub(super) fn read_by_task(&mut self) -> bool {
        let Some(up) = self.link.up_mut() else { return false };
        std::mem::replace(&mut up.reading, Reading::ByTask) != Reading::ByTask
    }

    /// Takes bytes that have arrived. What is complete with them counts as completing.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> Arrived {
        let mut complete = std::mem::take(&mut self.completing.list);
        let over = self.stream.receive(bytes, &mut complete).is_err();
        replied(&complete);
        self.completing.count += complete.len();
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

    /// Like [`State::drain`], for a link whose stream has been read to its end.
    pub(super) fn drain_ring(&mut self) -> Vec<(Batch, Replies)> {
        let mut complete = Vec::new();
        if let Some(ring) = self.link.ring_mut() {
            ring.take_complete(&mut complete);
            self.completing.count += complete.len();
        }
        complete
    }
}
