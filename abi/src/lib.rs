//! Every type and number that controller and server must agree on, defined once.
//!
//! The server is built from this crate; the controller includes the same files as modules, so
//! that a packaged farcall is one crate. For that reason modules here name each other with
//! `super::`, never with `crate::`. `docs/protocol.md` is the normative text of what the bytes
//! mean; this is the only place in code where they are laid out.
//!
//! All numbers travel little-endian.

#![no_std]

mod bytes;
pub mod entry;
pub mod handshake;
pub mod log;
pub mod registry;
pub mod ring;
pub mod upgrade;
pub mod wire;

#[cfg(not(target_endian = "little"))]
compile_error!("farcall's wire is little-endian; this target would need byte swaps everywhere");
