//! The links of a connection: attaching one after the other, and what ends that.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};

use super::driver::drive;
use super::passing::DataSocket;
use super::resume::{LinkHistory, LostBatches};
use super::socket::Socket;
use super::state::{Link, State, Successor, Up};
use super::{Connection, Handle, Shared};
use crate::error::{Error, Result};
use crate::runtime;

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

    /// A connection on a socket that the runtime waits for already.
    pub(crate) fn over(stream: Socket) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new()),
            work: Notify::new(),
            is_watched: AtomicBool::new(false),
            changed: watch::Sender::new(()),
            budget: Arc::default(),
        });
        let connection = Self { handle: Arc::new(Handle(shared)), tenure: None };
        connection.attach(stream, None, None);
        connection
    }

    /// The server counts the calls of this link from that number on.
    pub(crate) fn begin(&self, number: u64) {
        if let Some(up) = self.shared().lock().link.up_mut() {
            up.first_call = Some(number);
        }
    }

    /// Goes on over another stream. `history` is what the server says about the calls that were under way
    /// on the one before, and whether somebody else has held the process since: then nothing of what
    /// was under way or waits is sent. What passes descriptors goes on over `data`; without that it does
    /// not.
    pub(crate) fn attach(
        &self,
        stream: Socket,
        history: Option<&LinkHistory>,
        data: Option<&DataSocket>,
    ) {
        let stream = Arc::new(stream);
        let mut state = self.shared().lock();
        let mut answered = state.drain();
        let mut lost = state.detach();
        let (complete, unknown) = state.resume(history);
        answered.extend(complete);
        lost.extend(unknown);
        if history.is_some_and(|history| history.held) {
            lost.extend(state.end_tenure());
            lost.successor = Some(Successor::GONE);
        }
        lost.extend(state.move_to(data));
        state.ending.attached();
        state.epoch += 1;
        state.ring_making.restart();
        state.writing.uncork();
        let first_call = history.map_or(0, |history| history.log.head.calls);
        state.link = Link::Up(Up::new(stream.clone(), first_call));
        // By the new link's task not yet.
        self.shared().is_watched.store(false, Ordering::Relaxed);
        tokio::spawn(drive(self.shared().clone(), stream, state.epoch));
        drop(state);
        self.shared().complete(answered);
        self.shared().changed.send_replace(());
        self.shared().fail(lost);
    }

    /// Another controller has taken the process over, after link `epoch`: what was under way learns
    /// what has become of it, and what waits and comes is refused, until this controller attaches
    /// again.
    pub(crate) fn supersede(&self, epoch: u64, successor: Successor, history: &LinkHistory) {
        let mut state = self.shared().lock();
        if state.epoch != epoch || !state.link.is_down() || state.ending.is_dead() {
            return;
        }
        let (complete, lost) = state.supersede(successor, history);
        drop(state);
        self.shared().complete(complete);
        self.shared().changed.send_replace(());
        self.shared().fail(lost);
    }

    /// The process is dead: reads the replies that it has left, fails what waits, and refuses what
    /// comes.
    pub(crate) fn process_died(&self) {
        let mut state = self.shared().lock();
        let failed = state.die(None);
        drop(state);
        self.shared().changed.send_replace(());
        self.shared().work.notify_one();
        self.shared().fail(failed);
    }

    /// Calls `down` when a link has been lost that the process may have outlived, and this side did
    /// not end.
    pub(crate) fn when_down(&self, down: impl Fn() + Send + Sync + 'static) {
        self.shared().lock().callbacks.when_down = Some(Arc::new(down));
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.ending.close();
        // What is queued while the process is detached has nobody left to send it.
        let queued = if state.link.is_up() { LostBatches::default() } else { state.abandon() };
        // The stream ends when what is in the ring is complete.
        let complete = state.attend_ring();
        drop(state);
        self.0.work.notify_one();
        if complete {
            self.0.collect();
        }
        self.0.fail(queued);
    }
}
