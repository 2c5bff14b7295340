//! A descriptor through the stream itself, which the server only reads.
//!
//! What a read(2) finds beside bytes is lost, and a server reads ahead: so the descriptor must not be
//! in the stream before the call is under way that is to take it. The server is idle, and two batches
//! are written at once, which it therefore reads at once. The second may block, so the results of the
//! first are sent before it begins: when they are here, nothing is read any more before the second
//! one's call, and its byte can go. Version 0 reads no more than a request, and has no links.
//!
//! ```text
//!   here   first, second ──┐             ┌─ results ──▶ a byte and the descriptor ──┐
//!   there                  └▶ read, first ┘ second: recvmsg(2), waits ──────────────┴▶ result
//! ```
//! Others write nothing meanwhile, whose bytes the server would take for the one that it waits for.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::socket::{Shutdown, shutdown};
use smallvec::smallvec;

use super::batch::{Batch, Scope, value};
use super::receipt::{Receipt, receipt};
use super::{Connection, Quiesce, Socket, budget};
use crate::error::{Error, Outcome, Result};
use crate::proto::Call;

/// The transfer of a descriptor that a server is about to take. To be carried out to the end.
pub(crate) struct FdTransfer {
    stream: Arc<Socket>,
    ending: Ending,
    linked: bool,
    prepared: Receipt<()>,
    received: Receipt<u64>,
    pause: Quiesce,
}

/// Ends the stream when it is dropped: where the server waits for a byte that does not come, or leaves
/// one that has come, what follows would not be understood.
struct Ending(Option<Arc<Socket>>);

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
        }
    }
}

impl Connection {
    /// Has the server execute `first`, and then `receive`, a recvmsg(2) of one byte on its end of the
    /// stream that is linked to it, if nothing is unanswered and there is no pause but this one, which
    /// lasts until the descriptor is passed. Else it is given back.
    ///
    /// # Errors
    ///
    /// Without a link.
    pub(crate) fn begin_transfer(
        &self,
        pause: Quiesce,
        first: Vec<Call>,
        receive: Call,
    ) -> Result<std::result::Result<FdTransfer, Quiesce>> {
        let permit = self.acquire(budget::size(&first));
        let (first_complete, prepared) = receipt(permit, |replies| {
            let value = |reply: &crate::proto::Reply| reply.value().map(drop);
            replies.iter().try_for_each(value).map_err(Error::call("COPY_IN"))
        });
        // What gives its room back also if nothing comes of it.
        let permit = self.acquire(budget::size(std::slice::from_ref(&receive)));
        let (complete, received) = receipt(permit, |replies| value("recvmsg", &replies));
        let mut state = self.shared().lock();
        if !state.could_begin(Some(&pause), self.tenure)? {
            return Ok(Err(pause));
        }
        let stream = state.link.stream().cloned();
        let stream = stream.ok_or(Error::Lost(Outcome::NotExecuted))?;
        let linked = state.stream.version() > 0;
        let receive = if linked { receive.linked() } else { receive };
        let batch = |complete| Batch { complete, scope: Scope::ThisLink };
        let batches =
            [(first.into(), batch(first_complete)), (smallvec![receive], batch(complete))];
        state.write_first(batches, &stream);
        drop(state);
        self.shared().work.notify_one();
        let ending = Ending(Some(stream.clone()));
        Ok(Ok(FdTransfer { stream, ending, linked, prepared, received, pause }))
    }
}

impl FdTransfer {
    /// Passes the descriptor, and gives the pause back. Where it can't be passed the server gets the byte
    /// without it.
    pub(crate) async fn finish(self, fd: BorrowedFd<'_>) -> Result<Quiesce> {
        let Self { stream, mut ending, linked, prepared, received, pause } = self;
        if let Err(error) = prepared.await {
            // What is linked to it is not executed.
            if linked {
                ending.0 = None;
            }
            return Err(error);
        }
        let passed = stream.pass(fd);
        if passed.is_err() {
            stream.write(&[IoSlice::new(&[0])]).map_err(Error::io("sendmsg"))?;
        }
        match received.await {
            Ok(1) => ending.0 = None,
            other => {
                return other.and(Err(Error::Protocol("the server did not take a descriptor")));
            }
        }
        passed.map(|()| pause).map_err(Error::io("sendmsg"))
    }
}
