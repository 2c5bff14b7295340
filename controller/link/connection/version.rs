//! The version of the stream that a connection's server speaks.

use super::Connection;
use crate::abi::wire::{HelloResult, Operation};
use crate::error::{Error, Result};
use crate::proto::{Call, hello};

impl Connection {
    /// Sets the version of the stream that the server speaks, for what is submitted from here on.
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
            self.shared().lock().no_read_ahead = errno;
        }
        Ok(hello)
    }

    /// The server speaks the same version as that of another process of the same kind.
    pub(crate) fn set_version_of(&self, other: &Self) {
        let errno = other.shared().lock().no_read_ahead;
        self.shared().lock().no_read_ahead = errno;
        self.set_version(other.version());
    }

    /// Fails with [`Error::NoReadAhead`] where `what` needs a server that reads ahead.
    pub(crate) fn needs_read_ahead(&self, what: &'static str) -> Result<()> {
        let state = self.shared().lock();
        match state.stream.version() {
            0 => Err(Error::NoReadAhead { what, errno: state.no_read_ahead }),
            _ => Ok(()),
        }
    }

    /// The version of the stream that both sides speak.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.shared().lock().stream.version()
    }
}
