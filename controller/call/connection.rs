//! A connection: the I/O around [`Stream`], shared by all tasks that call into one process.
//!
//! Whoever submits a batch tries to write it at once; a task of tokio's per link reads, completes,
//! and writes what did not fit. A batch is completed by a closure that runs there, before the
//! connection counts as idle: so what a call has made is owned by a handle, or given back, at every
//! instant at which others may look, also when nobody waits for it any more.
//!
//! ```text
//!           attach               hold                    end of stream
//!   Down ──────────▶ Up ◀──────────────▶ Held ────────────────▶ Down (persistent) or Gone
//! ```
//! Only `Up` writes from the queue. `Held` finishes a batch that is written in part. `Gone` refuses
//! what comes.

use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};

use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use tokio::net::UnixStream;
use tokio::sync::{Notify, oneshot, watch};

use super::{Call, Error, Outcome, Reply, Result};
use crate::transport::stream::Stream;

/// Bytes that one read takes.
const READ_SIZE: usize = 64 * 1024;

/// Runs when a batch is complete or lost.
type Complete = Box<dyn FnOnce(Result<Vec<Reply>>) + Send>;

/// One controller's hold on one server. Clones are the same connection; when the last one is
/// dropped, what is queued still goes out, then the stream ends.
#[derive(Clone)]
pub struct Connection {
    handle: Arc<Handle>,
}

/// A connection that others keep up, or not.
#[derive(Clone)]
pub(crate) struct WeakConnection(Weak<Handle>);

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
        self.0.upgrade().map(|handle| Connection { handle })
    }
}

/// Ends the connection when it is dropped.
struct Handle(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// There is more to write, or the connection is to end.
    work: Notify,
    /// Changes whenever the link or the number of unanswered calls may have.
    changed: watch::Sender<()>,
}

struct State {
    stream: Stream<Complete>,
    link: Link,
    /// How often a link was attached: a driver of an older one has nothing to say any more.
    epoch: u64,
    /// The process outlives the link: what is queued waits for the next one.
    persistent: bool,
    /// No handle is left: end when the queue is written.
    closing: bool,
    /// Batches that have their replies, and whose closures have not returned yet.
    completing: usize,
}

enum Link {
    Up(Arc<UnixStream>),
    Held(Arc<UnixStream>),
    Down,
    Gone,
}

impl Link {
    fn stream(&self) -> Option<&Arc<UnixStream>> {
        match self {
            Self::Up(stream) | Self::Held(stream) => Some(stream),
            Self::Down | Self::Gone => None,
        }
    }
}

/// The result of a batch, once it is here. Dropping it loses nothing: the batch still completes,
/// and what it made is given back.
#[must_use]
pub struct Receipt<R>(oneshot::Receiver<Result<R>>);

impl<R> Future for Receipt<R> {
    type Output = Result<R>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0)
            .poll(context)
            // A sender that is dropped unused means that the runtime is being shut down.
            .map(|result| result.unwrap_or(Err(Error::Lost(Outcome::PossiblyExecuted))))
    }
}

impl Connection {
    /// A connection on `stream`. Must be called within a tokio runtime, whose tasks carry it.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                stream: Stream::default(),
                link: Link::Down,
                epoch: 0,
                persistent: false,
                closing: false,
                completing: 0,
            }),
            work: Notify::new(),
            changed: watch::Sender::new(()),
        });
        let connection = Self { handle: Arc::new(Handle(shared)) };
        connection.attach(stream);
        connection
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.0
    }

    /// Goes on over another stream, held: nothing is written before [`Connection::release`].
    pub(crate) fn attach(&self, stream: UnixStream) {
        let stream = Arc::new(stream);
        // Results that have arrived and that nobody has read yet are no lost ones.
        let old = self.shared().lock().link_and_epoch();
        if let Some((old, epoch)) = old {
            let mut buffer = vec![0; READ_SIZE];
            // Not by way of the runtime, which may not know yet that there is something to read.
            let receive = |buffer: &mut [u8]| {
                recv(old.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
            };
            while let Ok(true) = read(self.shared(), epoch, &mut buffer, receive) {}
        }
        let mut state = self.shared().lock();
        let lost = state.detach();
        state.epoch += 1;
        let held = state.epoch > 1;
        state.link = if held { Link::Held(stream.clone()) } else { Link::Up(stream.clone()) };
        tokio::spawn(drive(self.shared().clone(), stream, state.epoch));
        drop(state);
        fail(lost, Outcome::PossiblyExecuted);
    }

    /// What is submitted from here on is for a server that speaks `version` of the stream.
    pub(crate) fn set_version(&self, version: u32) {
        self.shared().lock().stream.set_version(version);
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

    /// Sends `calls` together, in order, with nothing in between, and completes with what
    /// `complete` makes of their replies. While the connection is down the batch waits.
    ///
    /// `complete` runs on the connection's task and must not block. What must live until the
    /// server is done with the batch (buffers) it owns.
    pub fn submit<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        let (complete, receipt) = receipt(complete);
        self.shared().submit(calls, complete);
        receipt
    }

    /// [`Connection::submit`] of one system call or operation, completed with its value.
    pub fn call(&self, name: &'static str, call: Call) -> Receipt<u64> {
        self.submit(vec![call], move |replies| {
            replies.first().map_or(Err(Error::Protocol("no reply")), |reply| {
                reply.value().map_err(Error::call(name))
            })
        })
    }

    /// Writes nothing new until [`Connection::release`], and returns when nothing is unanswered
    /// (or the link is down).
    pub(crate) async fn hold(&self) {
        let mut changed = self.shared().changed.subscribe();
        loop {
            {
                let mut state = self.shared().lock();
                state.hold();
                if state.link.stream().is_none() || state.is_idle() {
                    return;
                }
            }
            // The sender lives in what `self` holds.
            let _ = changed.changed().await;
        }
    }

    /// Holds the connection if nothing is unanswered on it. Says whether it is held now.
    pub(crate) fn try_hold(&self) -> bool {
        let mut state = self.shared().lock();
        let idle = state.is_idle();
        if idle {
            state.hold();
        }
        idle
    }

    /// Writes again, beginning with what has been queued.
    pub(crate) fn release(&self) {
        let mut state = self.shared().lock();
        if let Link::Held(stream) = &state.link {
            state.link = Link::Up(stream.clone());
        }
        state.flush();
        drop(state);
        self.shared().work.notify_one();
    }

    /// Sends a batch over a held link, ahead of everything that is queued.
    pub(crate) fn submit_held<R: Send + 'static>(
        &self,
        calls: Vec<Call>,
        complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
    ) -> Receipt<R> {
        let (complete, receipt) = receipt(complete);
        let mut state = self.shared().lock();
        let queued = state.stream.take_queue();
        state.stream.push(calls, complete);
        if let Some(stream) = state.link.stream().cloned() {
            // The link is fresh or idle: a batch of a few requests fits into its buffer.
            state.write(&stream, false);
        }
        state.stream.append_queue(queued);
        drop(state);
        self.shared().work.notify_one();
        receipt
    }

    /// Ends the stream's writing side, and returns when the server has ended its own.
    pub(crate) async fn shut_down(&self) {
        self.hold().await;
        let mut changed = self.shared().changed.subscribe();
        loop {
            {
                let state = self.shared().lock();
                let Some(stream) = state.link.stream() else { return };
                // A stream that is over already is what is wanted.
                let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
            }
            let _ = changed.changed().await;
        }
    }

    /// The process is dead: fails what waits, and refuses what comes.
    pub(crate) fn process_died(&self) {
        let mut state = self.shared().lock();
        state.persistent = false;
        let lost = state.detach();
        let queued = state.bury();
        drop(state);
        self.shared().changed.send_replace(());
        self.shared().work.notify_one();
        fail(lost, Outcome::PossiblyExecuted);
        fail(queued, Outcome::NotExecuted);
    }

    /// Whether it is the same connection.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.handle, &other.handle)
    }

    /// Whether there is a link.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.shared().lock().link.stream().is_some()
    }

    /// A reference that does not keep the connection up.
    pub(crate) fn downgrade(&self) -> WeakConnection {
        WeakConnection(Arc::downgrade(&self.handle))
    }

    /// Something that changes whenever calls have been answered or the link has changed.
    pub(crate) fn watch(&self) -> watch::Receiver<()> {
        self.shared().changed.subscribe()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closing = true;
        // What is queued while the process is detached has nobody left to send it.
        let queued =
            if state.link.stream().is_none() { state.stream.abandon() } else { Vec::new() };
        if let Link::Held(stream) = &state.link {
            state.link = Link::Up(stream.clone());
        }
        drop(state);
        self.0.work.notify_one();
        fail(queued, Outcome::NotExecuted);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the state is inconsistent: what could is outside of the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, calls: Vec<Call>, complete: Complete) {
        let mut state = self.lock();
        if matches!(state.link, Link::Gone) {
            drop(state);
            complete(Err(Error::Gone));
            return;
        }
        // A call that finds nothing under way goes out at once. Behind others it is left to the
        // driver, which writes all that has gathered together.
        let idle = state.stream.is_answered() && state.stream.is_written();
        state.stream.push(calls, complete);
        let left = !idle || state.flush();
        drop(state);
        if left {
            self.work.notify_one();
        }
    }
}

impl State {
    /// Nothing is unanswered, and what has been answered is owned.
    fn is_idle(&self) -> bool {
        self.stream.is_answered() && self.completing == 0
    }

    fn link_and_epoch(&self) -> Option<(Arc<UnixStream>, u64)> {
        Some((self.link.stream()?.clone(), self.epoch))
    }

    fn hold(&mut self) {
        if let Link::Up(stream) = &self.link {
            self.link = Link::Held(stream.clone());
        }
    }

    /// Writes what can be written. Says whether something is left that could be.
    fn flush(&mut self) -> bool {
        match &self.link {
            Link::Up(stream) => {
                let stream = stream.clone();
                self.write(&stream, false)
            }
            Link::Held(stream) => {
                let stream = stream.clone();
                self.write(&stream, true)
            }
            Link::Down | Link::Gone => false,
        }
    }

    fn write(&mut self, stream: &UnixStream, torn_only: bool) -> bool {
        loop {
            let output = self.stream.output(torn_only);
            if output.is_empty() {
                return false;
            }
            match stream.try_write_vectored(&output) {
                Ok(n) => self.stream.wrote(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                // The reading side sees the end too, and it is the one that acts on it.
                Err(_) => return false,
            }
        }
    }

    /// Forgets the link. Returns what may have been executed.
    fn detach(&mut self) -> Vec<Complete> {
        if let Some(stream) = self.link.stream() {
            // Wakes the driver, if the other end has not.
            let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
        }
        self.link = Link::Down;
        self.stream.disconnect()
    }

    fn bury(&mut self) -> Vec<Complete> {
        self.link = Link::Gone;
        self.stream.abandon()
    }
}

/// What completes a batch, and what waits for that.
fn receipt<R: Send + 'static>(
    complete: impl FnOnce(Vec<Reply>) -> Result<R> + Send + 'static,
) -> (Complete, Receipt<R>) {
    let (sender, receiver) = oneshot::channel();
    let complete = Box::new(move |replies: Result<Vec<Reply>>| {
        // A receiver that is gone hands the result back, and dropping it gives it back.
        let _ = sender.send(replies.and_then(complete));
    });
    (complete, Receipt(receiver))
}

fn fail(batches: Vec<Complete>, outcome: Outcome) {
    for complete in batches {
        complete(Err(Error::Lost(outcome)));
    }
}

/// Reads and completes, and writes what did not fit at once, until the stream is over.
async fn drive(shared: Arc<Shared>, stream: Arc<UnixStream>, epoch: u64) {
    let mut buffer = vec![0; READ_SIZE];
    let mut blocked = false;
    loop {
        tokio::select! {
            ready = stream.readable() => {
                let receive = |buffer: &mut [u8]| stream.try_read(buffer);
                if ready.is_err() || read(&shared, epoch, &mut buffer, receive).is_err() {
                    break;
                }
            }
            ready = stream.writable(), if blocked => {
                blocked = ready.is_ok() && flush(&shared, epoch);
            }
            () = shared.work.notified() => blocked = flush(&shared, epoch),
        }
    }
    let mut state = shared.lock();
    if state.epoch != epoch {
        // Another link took over, and has seen to what was under way on this one.
        return;
    }
    if matches!(state.link, Link::Gone) {
        return;
    }
    let lost = state.detach();
    let dead = if state.persistent && !state.closing { Vec::new() } else { state.bury() };
    drop(state);
    shared.changed.send_replace(());
    fail(lost, Outcome::PossiblyExecuted);
    fail(dead, Outcome::NotExecuted);
}

/// The stream is over.
struct Over;

/// Reads once and completes what it can. False: there was nothing to read.
fn read(
    shared: &Shared,
    epoch: u64,
    buffer: &mut [u8],
    receive: impl FnOnce(&mut [u8]) -> io::Result<usize>,
) -> Result<bool, Over> {
    let mut state = shared.lock();
    if state.epoch != epoch {
        return Err(Over);
    }
    // Under the lock: what is read first is taken first, whoever reads.
    let n = match receive(buffer) {
        Ok(0) => return Err(Over),
        Ok(n) => n,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        Err(_) => return Err(Over),
    };
    let mut complete = Vec::new();
    let received = state.stream.receive(&buffer[..n], &mut complete);
    let count = complete.len();
    state.completing += count;
    // Outside of the lock: completing may submit.
    drop(state);
    for (complete, replies) in complete {
        complete(Ok(replies));
    }
    if count > 0 {
        shared.lock().completing -= count;
        shared.changed.send_replace(());
    }
    received.map(|()| true).map_err(|_| Over)
}

/// Writes what is queued, and ends the stream when that was the last. Says whether something is
/// left that could be written.
fn flush(shared: &Shared, epoch: u64) -> bool {
    let mut state = shared.lock();
    if state.epoch != epoch {
        return false;
    }
    let left = state.flush();
    if state.closing
        && state.stream.is_written()
        && let Some(stream) = state.link.stream()
    {
        let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
    }
    left
}
