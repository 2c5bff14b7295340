//! The types and numbers that controller and server must agree on.
//!
//! The files are those of the crate `abi/`, from which the server is built.

#[path = "../embedded/abi/bytes.rs"]
mod bytes;
#[path = "../embedded/abi/entry.rs"]
pub mod entry;
#[path = "../embedded/abi/handshake.rs"]
pub mod handshake;
#[path = "../embedded/abi/log.rs"]
pub mod log;
#[path = "../embedded/abi/registry.rs"]
pub mod registry;
#[path = "../embedded/abi/ring.rs"]
pub mod ring;
#[path = "../embedded/abi/upgrade.rs"]
pub mod upgrade;
#[path = "../embedded/abi/wire.rs"]
pub mod wire;
