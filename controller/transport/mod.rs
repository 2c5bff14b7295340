//! How requests reach a server.
//!
//! [`stream`] is the protocol as plain state: bytes in, bytes out, no I/O. The I/O around it is in
//! [`crate::call::Connection`].

pub mod stream;
