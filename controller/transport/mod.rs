//! How requests reach a server.
//!
//! [`stream`] is the protocol as plain state: bytes in, bytes out, no I/O. [`ring`] hands calls over
//! in shared memory. The I/O around both is in [`crate::call::Connection`].

pub mod ring;
mod shared;
pub mod stream;

pub use shared::Shared;
pub(crate) use shared::{Prepared, SHARED_SIZE};
