//! The wire: what `docs/protocol.md` says, claim by claim.
//!
//! Everything here drives the image with nothing but sockets, pipes and the bytes of that document.
//! The library is used for the image's bytes, and in `vectors` to hold the document to `abi`.

mod children;
mod client;
mod copies;
mod detached;
mod executable;
mod handshake;
mod held;
mod limits;
mod listener;
mod log;
mod mapped;
mod operations;
mod refused;
mod registry;
mod requests;
mod ring;
mod ring_interrupt;
mod ring_random;
mod server;
mod stream;
mod unwanted;
mod upgrade;
mod users;
mod vectors;
mod version_1;

#[allow(dead_code, reason = "the other program of tests uses all of it")]
#[path = "../common/random.rs"]
mod random;
