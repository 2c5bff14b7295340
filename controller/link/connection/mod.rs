//! A connection: the I/O around [`Stream`], shared by all tasks that call into one process.
//!
//! Whoever submits a batch while nothing is under way writes it at once; a task of tokio's per link
//! reads, completes, and writes what has gathered or did not fit. A batch is completed by a closure that runs there, before the
//! connection counts as idle: so what a call has made is owned by a handle, or given back, at every
//! instant at which others may look, also when nobody waits for it any more.
//!
//! ```text
//!           attach         end of stream
//!   Down ──────────▶ Up ────────────────────▶ Down (persistent) or Gone
//!    │  ▲
//!    ▼  │ attach
//!   Superseded by another controller
//! ```
//! Only `Up` writes from the queue, and while it is quiesced ([`Quiesce`]) no more than the rest of a batch
//! that is written in part. `Gone` refuses what comes.

mod blocking;
mod budget;
mod driver;
mod fd_transfer;
mod interrupt;
mod overdue;
mod passing;
mod quiesce;
mod retire;
mod ring;
mod socket;
mod state;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};

use nix::sys::socket::{Shutdown, shutdown};
use oneshot::AsyncReceiver;
use smallvec::smallvec;
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::coop::{Coop, cooperative};

use budget::Budget;
pub(crate) use budget::Permit;
use driver::drive;
pub(crate) use fd_transfer::FdTransfer;
pub use interrupt::Interrupter;
pub(crate) use interrupt::Interrupts;
pub(crate) use overdue::HealthChecks;
use passing::Passing;
pub(crate) use passing::{DataSocket, Inbox, take};
pub(crate) use quiesce::Quiesce;
pub(crate) use ring::Bell;
use ring::{Offered, RingReceipt};
pub(crate) use socket::Socket;
use state::{Link, LostBatches, State};
pub(crate) use state::{LinkHistory, Successor};

use crate::abi::log::LOG_CAPACITY;
use crate::abi::wire::{HelloResult, Operation};
use crate::error::{Error, Outcome, Result};
use crate::proto::stream::Stream;
use crate::proto::{Call, Calls, Replies, Reply, hello};
use crate::runtime;

/// After so many batches a ring is worth what it costs to make.
const BUSY_AFTER: u32 = 128;

/// When what is called on a busy link is to be called again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum WhenBusy {
    /// Not on this link.
    Done,
    /// Before the next batch.
    CallAgain,
    /// After as many batches more as there have been.
    CallLater,
}

/// The action that follows when a batch is complete or lost.
enum Completion {
    /// It is one call, and all that is asked for is its value: most are, and nothing is allocated for
    /// that.
    Value {
        name: &'static str,
        result: oneshot::Sender<Result<u64>>,
        /// What it takes of the budget.
        size: usize,
    },
    Any(Box<dyn FnOnce(Result<Replies>) + Send>),
    /// Nothing: it has happened.
    Withdrawn,
}

impl Completion {
    /// Returns how much of the budget is to be given back.
    #[must_use]
    fn with(self, replies: Result<Replies>) -> usize {
        match self {
            Self::Value { name, result, size } => {
                // Nobody may wait for it any more.
                let _ = result.send(replies.and_then(|replies| value(name, &replies)));
                size
            }
            Self::Any(complete) => {
                complete(replies);
                0
            }
            Self::Withdrawn => 0,
        }
    }
}

/// A batch under way.
struct Batch {
    complete: Completion,
    scope: Scope,
}

/// On which links a batch may be executed.
enum Scope {
    AnyLink,
    /// It names what exists with this one only.
    ThisLink,
    /// On any, over its data socket.
    DataSocket(Box<Passing>),
}

impl Batch {
    fn is_of_this_link(&self) -> bool {
        matches!(self.scope, Scope::ThisLink)
    }

    /// It names what this link has, or is moved to another one.
    fn is_of_a_link(&self) -> bool {
        !matches!(self.scope, Scope::AnyLink)
    }

    /// It has these replies. In the order of the replies.
    fn replied(&self, replies: &[Reply]) {
        if let Scope::DataSocket(passing) = &self.scope {
            passing.replied(replies);
        }
    }

    /// Nobody will know any more with what result it was executed.
    fn give_up(&self) {
        if let Scope::DataSocket(passing) = &self.scope {
            passing.give_up();
        }
    }
}

/// The link and the tenure that a batch is submitted for: on others it is refused.
#[derive(Clone, Copy)]
struct ValidFor {
    /// The link of that [`Connection::epoch`].
    link: Option<u64>,
    /// See [`State::tenure`].
    tenure: Option<u64>,
}

/// When a batch is written, if nothing is under way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flush {
    Now,
    /// When somebody waits for it, or else as the next.
    WhenAwaited,
    /// With the next batch, or when all tasks that can have had their turn.
    WithNext,
}

/// Whether what is queued waits for company before it is written, as under TCP_CORK (tcp(7)).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Corked {
    Nothing,
    /// Nobody waits for it.
    Unawaited,
    /// Somebody will.
    Awaited,
}

/// After so many there is company enough: as many as one write takes.
const CORK_MAX: usize = 64;

/// One controller's hold on one server. Clones are the same connection; when the last one is
/// dropped, what is queued still goes out, then the stream ends.
#[derive(Clone)]
pub struct Connection {
    handle: Arc<Handle>,
    /// The tenure whose calls this handle makes, and no others: see [`State::tenure`]. None: of any.
    tenure: Option<u64>,
}

/// A connection that others keep up, or not.
#[derive(Clone)]
pub(crate) struct WeakConnection(Weak<Handle>, Option<u64>);

impl WeakConnection {
    /// Whether it is that connection.
    pub(crate) fn is(&self, connection: &Connection) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&connection.handle))
    }

    /// Whether somebody still keeps it up.
    pub(crate) fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }

    pub(crate) fn upgrade(&self) -> Option<Connection> {
        self.0.upgrade().map(|handle| Connection { handle, tenure: self.1 })
    }
}

/// Ends the connection when it is dropped.
struct Handle(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// There is more to write, or the connection is to end.
    work: Notify,
    /// The link's task looks whether something is outstanding: it need not be told of it. Changed to false
    /// under the state's lock alone.
    is_watched: AtomicBool,
    /// Changes whenever the link, or what may be handed over on it, or the number of unanswered calls
    /// may have.
    changed: watch::Sender<()>,
    budget: Arc<Budget>,
}

/// The result of a batch, once it is here. Dropping it loses nothing: the batch still completes,
/// and what it made is given back.
#[must_use]
pub struct Receipt<R> {
    /// Which lets other tasks have their turn even if it is always here already.
    result: Coop<AsyncReceiver<Result<R>>>,
    on_poll: OnPoll,
}

/// What a receipt does for its batch when it is first polled.
enum OnPoll {
    Nothing,
    /// It is in a ring, and nobody has looked for it yet.
    LookInRing(RingReceipt),
    /// It waits for company.
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
    /// Of what was not submitted.
    fn failed(error: Error) -> Self {
        let (sender, receipt) = channel();
        let _ = sender.send(Err(error));
        receipt
    }

    /// What can interrupt the last call of the batch; none where the batch takes the stream, on which
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

impl Connection {
    /// A connection on `stream`. Must be called within a tokio runtime, whose tasks carry it.
    ///
    /// # Errors
    ///
    /// Where the runtime can't wait for the stream.
    pub fn new(stream: UnixStream) -> Result<Self> {
        runtime::check()?;
        let socket = stream.into_std().and_then(Socket::new);
        Ok(Self::over(socket.map_err(Error::io("waiting for a stream"))?))
    }

    /// The same on a socket that the runtime waits for already.
    pub(crate) fn over(stream: Socket) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                stream: Stream::default(),
                link: Link::Down,
                epoch: 0,
                tenure: 0,
                persistent: false,
                dead: false,
                closing: false,
                quiesces: 0,
                completing: 0,
                emptied: Vec::new(),
                batches: 0,
                when_busy: None,
                unable: None,
                busy_at: BUSY_AFTER,
                ring: None,
                corked: Corked::Nothing,
                alone: None,
                first: 0,
                in_rings: 0,
                base: 0,
                leaving: false,
                uncounted: false,
                leaderless: None,
                watch: None,
                when_down: None,
            }),
            work: Notify::new(),
            is_watched: AtomicBool::new(false),
            changed: watch::Sender::new(()),
            budget: Arc::default(),
        });
        let connection = Self { handle: Arc::new(Handle(shared)), tenure: None };
        connection.attach(stream, None, None);
        connection
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.0
    }

    /// The inode of this side's end of the stream: /proc shows by it who has that open.
    pub(crate) fn stream_inode(&self) -> Option<u64> {
        let state = self.shared().lock();
        Some(nix::sys::stat::fstat(state.link.stream()?).ok()?.st_ino)
    }

    /// The server counts the calls of this link from that number on.
    pub(crate) fn begin(&self, number: u64) {
        self.shared().lock().first = number;
    }

    /// The same connection, for calls that are made in this tenure: once another controller has held
    /// the process, they are refused.
    pub(crate) fn of_this_tenure(&self) -> Self {
        let tenure = self.shared().lock().tenure;
        Self { handle: self.handle.clone(), tenure: Some(tenure) }
    }

    /// Whether another controller has held the process since the tenure that this handle is for.
    pub(crate) fn is_outdated(&self) -> bool {
        !self.shared().lock().is_in(self.tenure)
    }

    /// Goes on over another stream. `past` is what the server says about the calls that were under way
    /// on the one before, and whether somebody else has held the process since: then nothing of what
    /// was under way or waits is sent. What passes descriptors goes on over `data`; without that it does
    /// not.
    pub(crate) fn attach(
        &self,
        stream: Socket,
        past: Option<&LinkHistory>,
        data: Option<&DataSocket>,
    ) {
        let stream = Arc::new(stream);
        let mut state = self.shared().lock();
        let mut answered = state.drain();
        let mut lost = state.detach();
        let (complete, unknown) = state.resume(past);
        answered.extend(complete);
        lost.extend(unknown);
        if past.is_some_and(|past| past.held) {
            lost.extend(state.end_tenure());
            lost.successor = Some(Successor::GONE);
        }
        lost.extend(state.move_to(data));
        state.first = past.map_or(0, |past| past.log.head.calls);
        state.in_rings = 0;
        state.uncounted = false;
        state.leaving = false;
        state.epoch += 1;
        state.batches = 0;
        state.busy_at = BUSY_AFTER;
        state.alone = None;
        state.corked = Corked::Nothing;
        state.link = Link::Up(stream.clone());
        // By the new link's task not yet.
        self.shared().is_watched.store(false, Ordering::Relaxed);
        tokio::spawn(drive(self.shared().clone(), stream, state.epoch));
        drop(state);
        self.shared().complete(answered);
        self.shared().changed.send_replace(());
        self.shared().fail(lost);
    }

    /// What is submitted from here on is for a server that speaks `version` of the stream.
    pub(crate) fn set_version(&self, version: u32) {
        self.shared().lock().stream.set_version(version);
    }

    /// Asks the server to go on in `version` of the stream, if it can, with memory of its own. Why one
    /// can't is found out.
    pub(crate) async fn greet(&self, version: u32, memory: u64) -> Result<HelloResult> {
        let hello = self.call("HELLO", hello(version, memory, false)).await?;
        let hello = HelloResult(hello.cast_signed());
        self.set_version(hello.version());
        if hello.version() == 0 && version > 0 {
            // It goes on if it can copy what lies there.
            let load = Call::operation(Operation::Load, [memory, 8, 0, 0, 0, 0]);
            let errno = self.call("LOAD", load).await.err().and_then(|error| error.errno());
            self.shared().lock().unable = errno;
        }
        Ok(hello)
    }

    /// The server speaks the same version as that of another process of the same kind.
    pub(crate) fn set_version_of(&self, other: &Self) {
        let unable = other.shared().lock().unable;
        self.shared().lock().unable = unable;
        self.set_version(other.version());
    }

    /// For what only a server can do that reads ahead.
    pub(crate) fn needs_read_ahead(&self, what: &'static str) -> Result<()> {
        let state = self.shared().lock();
        match state.stream.version() {
            0 => Err(Error::NoReadAhead { what, errno: state.unable }),
            _ => Ok(()),
        }
    }

    /// The version of the stream that both sides speak.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.shared().lock().stream.version()
    }

    /// From here on the process outlives its links.
    pub(crate) fn set_persistent(&self) {
        self.shared().lock().persistent = true;
    }

    /// Whether the process outlives its links.
    pub(crate) fn is_persistent(&self) -> bool {
        self.shared().lock().persistent
    }

    /// Returns when the connection is ready for more calls: at once, unless 16 MiB of data or 16,384 calls
    /// are under way or wait for a connection; then, when half of that is done.
    ///
    /// The methods of [`Task`](crate::calls::Task) and chains wait for it by themselves. Nothing is
    /// reserved: who has waited submits at once.
    pub async fn ready(&self) {
        self.shared().budget.ready().await;
    }

    /// Counts `bytes` besides those of calls until it is dropped: what a batch owns in the target.
    pub(crate) fn acquire(&self, bytes: usize) -> Permit {
        self.shared().budget.acquire(bytes)
    }

    /// Sends `calls` together, in order, with nothing in between, and completes with what
    /// `complete` makes of their replies. While the connection is down the batch waits.
    ///
    /// This does not wait until the connection is ready: the queue has no bound of its own. A program that submits more
    /// than it awaits calls [`Connection::ready`] in between.
    ///
    /// `complete` runs on the connection's task and must not block. What must live until the
    /// server is done with the batch (buffers) it owns.
    ///
    /// Calls one of which announces other bytes than it brings complete with [`Error::Misuse`], and
    /// none of them is sent.
    pub fn submit<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        if let Some(error) = calls.iter().find_map(|call| call.check().err()) {
            return Receipt::failed(error);
        }
        self.submit_as(calls, complete, Flush::Now)
    }

    /// The same for what nobody waits for: it goes out together with what is submitted next, if
    /// that is soon.
    pub(crate) fn submit_soon<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        self.submit_as(calls, complete, Flush::WithNext)
    }

    /// The same for what passes descriptors over the data socket of the link that there is: its calls
    /// receive `fds`, or send a descriptor, which is in the inbox when the replies are here. A link that is
    /// lost takes none of that away: what was not executed goes on over the next one's data socket.
    ///
    /// The socket is exchanged together with the link, and not before this returns.
    pub(crate) fn submit_passing<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        socket: &DataSocket,
        fds: &[BorrowedFd<'_>],
        complete: impl FnOnce(Vec<Reply>, &Inbox) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        let keep = self.shared().lock().persistent;
        let (passing, inbox) = match Passing::over(socket, fds, &calls, keep) {
            Ok(both) => both,
            Err(error) => return Receipt::failed(error),
        };
        let complete = move |replies| complete(replies, &inbox);
        let (complete, mut receipt) = receipt(self.acquire(budget::size(&calls)), complete);
        let batch = Batch { complete, scope: Scope::DataSocket(Box::new(passing)) };
        let pass = || if fds.is_empty() { Ok(()) } else { socket.pass(fds) };
        let valid_for = ValidFor { link: None, tenure: self.tenure };
        receipt.on_poll = self.shared().submit(calls.into(), batch, valid_for, Flush::Now, pass);
        receipt
    }

    /// The same for what was found out on the link of that [`Connection::epoch`] and holds as long as
    /// that: on another one, before which another controller may have held the process, it is not
    /// executed.
    pub(crate) fn submit_on_this_link<R: Send + 'static>(
        &self,
        epoch: u64,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        let (complete, mut receipt) = receipt(self.acquire(budget::size(&calls)), complete);
        let batch = Batch { complete, scope: Scope::ThisLink };
        let valid_for = ValidFor { link: Some(epoch), tenure: self.tenure };
        receipt.on_poll =
            self.shared().submit(calls.into(), batch, valid_for, Flush::Now, || Ok(()));
        receipt
    }

    fn submit_as<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
        flush: Flush,
    ) -> Receipt<R> {
        let (complete, mut receipt) = receipt(self.acquire(budget::size(&calls)), complete);
        let batch = Batch { complete, scope: Scope::AnyLink };
        let valid_for = ValidFor { link: None, tenure: self.tenure };
        receipt.on_poll = self.shared().submit(calls.into(), batch, valid_for, flush, || Ok(()));
        receipt
    }

    /// What completes a call that is a batch of its own, and what waits for its value. The share of the budget that it
    /// takes is given back by [`Completion::with`] alone: it is to be submitted.
    fn receipt_of(&self, name: &'static str, call: &Call) -> (Completion, Receipt<u64>) {
        let size = budget::size(std::slice::from_ref(call));
        self.shared().budget.charge(size);
        let (result, receipt) = channel();
        (Completion::Value { name, result, size }, receipt)
    }

    /// [`Connection::submit`] of one system call or operation, completed with its value.
    ///
    /// On a stream on which nothing is under way it goes out when somebody waits for it, or else when all
    /// tasks that can have had their turn: together with what has been submitted by then.
    pub fn call(&self, name: &'static str, call: Call) -> Receipt<u64> {
        if let Err(error) = call.check() {
            return Receipt::failed(error);
        }
        self.call_as(name, call, Flush::WhenAwaited)
    }

    /// The same for what nothing is going to follow before it is awaited.
    pub(crate) fn call_at_once(&self, name: &'static str, call: Call) -> Receipt<u64> {
        self.call_as(name, call, Flush::Now)
    }

    fn call_as(&self, name: &'static str, call: Call, flush: Flush) -> Receipt<u64> {
        let (complete, mut receipt) = self.receipt_of(name, &call);
        let batch = Batch { complete, scope: Scope::AnyLink };
        let calls = smallvec![call];
        let valid_for = ValidFor { link: None, tenure: self.tenure };
        receipt.on_poll = self.shared().submit(calls, batch, valid_for, flush, || Ok(()));
        receipt
    }

    /// The process is dead: reads the replies that it has left, fails what waits, and refuses what
    /// comes.
    pub(crate) fn process_died(&self) {
        let mut state = self.shared().lock();
        state.dead = true;
        // With a link, its task is the one that reads.
        let failed =
            if state.link.stream().is_none() { state.bury() } else { LostBatches::default() };
        drop(state);
        self.shared().changed.send_replace(());
        self.shared().work.notify_one();
        self.shared().fail(failed);
    }

    /// Calls `down` when a link has been lost that the process may have outlived, and this side did
    /// not end.
    pub(crate) fn when_down(&self, down: impl Fn() + Send + Sync + 'static) {
        self.shared().lock().when_down = Some(Arc::new(down));
    }

    /// Another controller has taken the process over, after link `epoch`: what was under way learns
    /// what has become of it, and what waits and comes is refused, until this controller attaches
    /// again.
    pub(crate) fn supersede(&self, epoch: u64, successor: Successor, past: &LinkHistory) {
        let mut state = self.shared().lock();
        if state.epoch != epoch || !matches!(state.link, Link::Down) || state.dead {
            return;
        }
        let (complete, lost) = state.supersede(successor, past);
        drop(state);
        self.shared().complete(complete);
        self.shared().changed.send_replace(());
        self.shared().fail(lost);
    }

    /// Whether what is submitted waits for the link after `epoch`.
    pub(crate) fn is_down_after(&self, epoch: u64) -> bool {
        let state = self.shared().lock();
        state.epoch == epoch && matches!(state.link, Link::Down) && !state.dead
    }

    /// Whether it is the same connection.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.handle, &other.handle)
    }

    /// Whether there is a link.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        let state = self.shared().lock();
        state.link.stream().is_some() && !state.dead
    }

    /// A reference that does not keep the connection up.
    pub(crate) fn downgrade(&self) -> WeakConnection {
        WeakConnection(Arc::downgrade(&self.handle), self.tenure)
    }

    /// Something that changes whenever calls have been answered or the link has changed.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.shared().changed.subscribe()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closing = true;
        // What is queued while the process is detached has nobody left to send it.
        let queued =
            if state.link.stream().is_none() { state.abandon() } else { LostBatches::default() };
        // The stream ends when what is in the ring is complete.
        let complete = state.ring.as_ref().is_some_and(|ring| ring.attend());
        drop(state);
        self.0.work.notify_one();
        if complete {
            self.0.collect();
        }
        self.0.fail(queued);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the state is inconsistent: what could is outside of the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, for one more batch.
    fn lock_and_count(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.batches = state.batches.saturating_add(1);
        if state.batches >= state.busy_at
            && let Some(when_busy) = &state.when_busy
            && state.stream.is_answered()
        {
            let when_busy = when_busy.clone();
            let epoch = state.epoch;
            // What is begun there may fail before this goes on.
            state.busy_at = u32::MAX;
            drop(state);
            let next = when_busy();
            state = self.lock();
            if state.epoch == epoch {
                state.call_when_busy(next);
            }
        }
        state
    }

    fn fail(&self, lost: LostBatches) {
        for (batch, outcome) in lost.batches {
            let error = match (lost.successor, lost.leaderless) {
                (Some(successor), _) => successor.error(outcome),
                (None, Some(pid)) => Error::LeaderExited { pid, outcome },
                (None, None) => Error::Lost(outcome),
            };
            drop(batch.scope);
            let done = batch.complete.with(Err(error));
            self.budget.release(done);
        }
    }

    /// Completes batches that were counted as completing, outside of the lock: it may submit.
    fn complete(&self, mut batches: Vec<(Batch, Replies)>) {
        let count = batches.len();
        if count == 0 {
            return;
        }
        let mut done = 0;
        for (batch, replies) in batches.drain(..) {
            // What it has passed may be a child's end of something, and is not held here any more then.
            drop(batch.scope);
            done += batch.complete.with(Ok(replies));
        }
        self.budget.release(done);
        let mut state = self.lock();
        state.completing -= count;
        if batches.capacity() <= 2 * LOG_CAPACITY as usize {
            state.emptied = batches;
        }
        drop(state);
        // Who comes to watch later looks at the state first, which says it by now.
        if self.changed.receiver_count() > 0 {
            self.changed.send_replace(());
        }
    }

    /// Submits a batch, `only` where it is meant for, right after `before` if there is a link; that says
    /// [`Error::Lost`] where the link is over. Returns what the batch needs of who waits for it.
    fn submit(
        self: &Arc<Self>,
        mut calls: Calls,
        mut batch: Batch,
        valid_for: ValidFor,
        flush: Flush,
        before: impl FnOnce() -> Result<()>,
    ) -> OnPoll {
        let mut state = self.lock_and_count();
        let mut is_over = false;
        let refused = match &state.link {
            Link::Gone => Some(Err(state.gone())),
            _ if state.dead => Some(Err(state.gone())),
            Link::Superseded(successor) => Some(Err(successor.error(Outcome::NotExecuted))),
            _ if !state.is_in(valid_for.tenure) => {
                Some(Err(Successor::GONE.error(Outcome::NotExecuted)))
            }
            Link::Down if batch.is_of_this_link() => Some(Err(Error::Lost(Outcome::NotExecuted))),
            _ if valid_for.link.is_some_and(|epoch| epoch != state.epoch) => {
                Some(Err(Error::Lost(Outcome::NotExecuted)))
            }
            // It is complete as it is.
            _ if calls.is_empty() => Some(Ok(Replies::new())),
            Link::Down => None,
            Link::Up(stream) => match before() {
                Err(Error::Lost(_)) if state.persistent => {
                    // So is the stream, or else it ends here. The batch waits for the next link.
                    let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
                    is_over = true;
                    None
                }
                before => before.err().map(Err),
            },
        };
        if let Some(result) = refused {
            drop(state);
            self.budget.release(batch.complete.with(result));
            return OnPoll::Nothing;
        }
        if let Some(ring) = state.usable_ring().filter(|_| !is_over) {
            let executes = calls.last().is_some_and(Call::executes);
            match ring.offer(calls, batch) {
                Offered::HandedOver(index) => {
                    let mut waited = ring.waited(self, index);
                    waited.executes = executes;
                    return OnPoll::LookInRing(waited);
                }
                Offered::Complete(batch, replies) => {
                    state.completing += 1;
                    drop(state);
                    self.complete(vec![(batch, replies)]);
                    return OnPoll::Nothing;
                }
                Offered::Back(back, tag) => (calls, batch) = (back, tag),
            }
        }
        // A call that finds nothing under way goes out at once. Behind others it is left to the
        // driver, which writes all that has gathered together.
        // What can wait for company has it then.
        let corked = state.corked;
        let before = state.stream.queued();
        let idle = state.stream.is_answered() && (before == 0 || corked != Corked::Nothing);
        state.corked = match (flush, corked) {
            _ if !idle || before >= CORK_MAX || state.quiesces > 0 => Corked::Nothing,
            (Flush::Now, _) | (Flush::WhenAwaited, Corked::Unawaited) => Corked::Nothing,
            (Flush::WhenAwaited, _) | (_, Corked::Awaited) => Corked::Awaited,
            (Flush::WithNext, _) => Corked::Unawaited,
        };
        let at_once = idle && state.corked == Corked::Nothing;
        let ends = || calls.last().is_some_and(Call::ends);
        if at_once && corked == Corked::Unawaited && ends() {
            // Nobody waits for their results, and to send them first costs as much as some calls.
            state.stream.push_together(calls, batch);
        } else {
            state.stream.push(calls, batch);
        }
        if state.ring_is_busy() {
            // It follows when the ring is empty.
            let complete = state.ring.as_ref().is_some_and(|ring| ring.attend());
            drop(state);
            if complete {
                self.collect();
            }
            return OnPoll::ExpectReply(self.clone());
        }
        let corks = state.corked == Corked::Awaited;
        // The task has been told of what is gathered already.
        let told = corks && corked == Corked::Awaited;
        let left = if at_once { state.flush() } else { !told };
        // Somebody has to wait for it.
        let left = state.alone.take().is_some() || left;
        drop(state);
        if left {
            self.work.notify_one();
        }
        match () {
            () if corks && !told => OnPoll::Uncork(self.clone()),
            () if at_once && !left => OnPoll::ExpectReply(self.clone()),
            () => OnPoll::Nothing,
        }
    }

    /// Writes what waits for company: there will be none.
    fn uncork(&self) {
        let mut state = self.lock();
        let left = state.corked != Corked::Nothing && state.flush();
        drop(state);
        if left {
            self.work.notify_one();
        }
    }
}

/// The value of a call that was a batch of its own.
fn value(name: &'static str, replies: &[Reply]) -> Result<u64> {
    let reply = replies.first().ok_or(Error::Protocol("no reply"))?;
    reply.value().map_err(Error::call(name))
}

/// The completion of a batch, which gives its permit back, and the receipt that waits for it.
fn receipt<R: Send + 'static>(
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

/// Where the result of a batch goes, and what waits for it.
fn channel<R>() -> (oneshot::Sender<Result<R>>, Receipt<R>) {
    let (sender, receiver) = oneshot::async_channel();
    (sender, Receipt { result: cooperative(receiver), on_poll: OnPoll::Nothing })
}

impl Successor {
    /// One that has held the process and is gone again.
    const GONE: Self = Self { pid: None, since: None };

    /// What a call is told with that outcome.
    fn error(self, outcome: Outcome) -> Error {
        let Self { pid, since } = self;
        Error::Superseded { pid, since, outcome }
    }
}
