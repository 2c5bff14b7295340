//! How requests reach a server.
//!
//! [`stream`] is the protocol as plain state: bytes in, bytes out, no I/O. [`ring`] hands calls over
//! in shared memory. What was under way when a link is lost goes on by the server's [`log`], see
//! [`resume`]. The I/O around all of it is in [`crate::call::Connection`].

mod copy;
pub mod log;
pub mod resume;
pub mod ring;
mod shared;
pub mod stream;

pub use shared::Shared;
pub(crate) use shared::{Prepared, SHARED_SIZE};
