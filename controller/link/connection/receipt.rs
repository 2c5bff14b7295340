//! What a caller holds of a batch: the receipt that its result comes to.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use oneshot::AsyncReceiver;
use tokio::task::coop::{Coop, cooperative};

use super::Shared;
use super::batch::Completion;
use super::budget::Permit;
use super::interrupt::Interrupter;
use super::ring::RingReceipt;
use crate::error::{Error, Outcome, Result};
use crate::proto::{Replies, Reply};
use crate::runtime;

/// The result of a batch, once it is here. Dropping it loses nothing: the batch still completes,
/// and what it made is given back.
#[must_use]
pub struct Receipt<R> {
    /// The result, which lets other tasks have their turn even if it is always here already.
    result: Coop<AsyncReceiver<Result<R>>>,
    pub(super) on_poll: OnPoll,
}

/// The action of a receipt, for its batch, when it is first polled.
pub(super) enum OnPoll {
    Nothing,
    /// The batch is in a ring, and nobody has looked for it yet.
    LookInRing(RingReceipt),
    /// The batch waits for company.
    Uncork(Arc<Shared>),
    /// Nothing, but the link's task may not have been told of it.
    ExpectReply(Arc<Shared>),
}

impl OnPoll {
    /// Somebody waits.
    fn wait(&mut self) {
        match std::mem::replace(self, Self::Nothing) {
            Self::Nothing => {}
            Self::LookInRing(waited) => {
                if !waited.look() {
                    waited.expect();
                }
            }
            Self::Uncork(shared) => shared.uncork(),
            Self::ExpectReply(shared) => shared.expect_reply(),
        }
    }

    /// Nobody does any more.
    fn leave(&mut self) {
        match std::mem::replace(self, Self::Nothing) {
            Self::Nothing | Self::ExpectReply(_) => {}
            Self::LookInRing(waited) => waited.leave(),
            Self::Uncork(shared) => shared.uncork(),
        }
    }
}

impl<R> Future for Receipt<R> {
    type Output = Result<R>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.on_poll.wait();
        let result = Pin::new(&mut self.result).poll(context);
        // A sender that is dropped unused means that the runtime is being shut down.
        result.map(|result| result.unwrap_or(Err(Error::Lost(Outcome::PossiblyExecuted))))
    }
}

impl<R> Receipt<R> {
    /// A receipt that is already complete with `error`.
    pub(super) fn failed(error: Error) -> Self {
        let (sender, receipt) = channel();
        let _ = sender.send(Err(error));
        receipt
    }

    /// The interrupter of the last call of the batch; none where the batch takes the stream, on which
    /// nobody here knows what the server is executing, and none for execve(2). To be asked for before the receipt is first
    /// polled.
    #[must_use]
    pub fn interrupter(&self) -> Option<Interrupter> {
        match &self.on_poll {
            OnPoll::LookInRing(waited) => waited.interrupter(),
            OnPoll::Nothing | OnPoll::Uncork(_) | OnPoll::ExpectReply(_) => None,
        }
    }

    /// Waits on this thread.
    ///
    /// # Errors
    ///
    /// As when it is awaited.
    ///
    /// # Panics
    ///
    /// Where blocking would stop a runtime: on a thread that executes its tasks.
    pub fn wait(self) -> Result<R> {
        runtime::block_on(self)
    }
}

impl<R> Drop for Receipt<R> {
    fn drop(&mut self) {
        self.on_poll.leave();
    }
}

/// The completion of a batch, which gives its permit back, and the receipt that waits for it.
pub(super) fn receipt<R: Send + 'static>(
    permit: Permit,
    complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
) -> (Completion, Receipt<R>) {
    let (sender, receipt) = channel();
    let complete = Box::new(move |replies: Result<Replies>| {
        // A receiver that is gone hands the result back, and dropping it gives it back.
        let _ = sender.send(replies.map(Replies::into_vec).and_then(complete));
        drop(permit);
    });
    (Completion::Any(complete), receipt)
}

/// The sender of a batch's result, and the receipt that waits for it.
pub(super) fn channel<R>() -> (oneshot::Sender<Result<R>>, Receipt<R>) {
    let (sender, receiver) = oneshot::async_channel();
    (sender, Receipt { result: cooperative(receiver), on_poll: OnPoll::Nothing })
}
