//! The end of a connection whose process is dead, and whose stream goes on without it.

use super::state::Ending;
use super::{Connection, Socket};
use crate::error::Error;

impl Connection {
    /// A connection over a stream that another one has left. Must be called within a tokio runtime,
    /// whose tasks carry it.
    ///
    /// # Errors
    ///
    /// Where the runtime can't wait for the stream.
    pub(crate) fn over_idle_stream(stream: Socket) -> crate::error::Result<Self> {
        Ok(Self::over(stream.here().map_err(Error::io("waiting for a stream"))?))
    }

    /// [`Connection::process_died`], and the stream, if that can be another's.
    ///
    /// It can if nobody has begun to end it, no request was written in part, and the process had read
    /// all of them when it died. What it answered is read before: nothing is left in either direction.
    pub(crate) fn retire(&self) -> Option<Socket> {
        let mut state = self.shared().lock();
        let is_open = state.ending != Ending::Closing && !state.writing.is_quiesced();
        let usable = is_open && state.stream.is_written();
        let stream = state.link.stream().filter(|stream| usable && stream.is_read()).cloned();
        let Some(stream) = stream else {
            drop(state);
            self.process_died();
            return None;
        };
        state.ending.die(None);
        let answered = state.drain();
        let left = stream.renew();
        // The task of the link has nothing to say any more, and nobody ends the stream.
        state.epoch += 1;
        let mut lost = state.forget_link();
        lost.extend(state.bury());
        drop(state);
        self.shared().complete(answered);
        self.shared().changed.send_replace(());
        self.shared().work.notify_one();
        self.shared().fail(lost);
        Some(left)
    }
}
