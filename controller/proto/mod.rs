//! What travels between a controller and a server, as plain state: no I/O, no runtime.
//!
//! A [`Call`] is one request, and a batch is calls that are sent together. [`stream`] is the protocol of the
//! stream: bytes in, bytes out. [`ring`] hands calls over in shared memory. What was under way when a link is
//! lost goes on by the server's [`log`], see [`resume`]. The I/O around all of it is in [`crate::link`].

pub(crate) mod batch;
mod call;
pub mod handshake;
pub mod log;
pub mod resume;
pub mod ring;
pub mod stream;
pub mod table;
pub(crate) mod tag;

pub use call::{Call, Calls, Replies, Reply};
pub(crate) use call::{DataLen, hello};
