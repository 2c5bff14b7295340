//! Persistent processes: how a process becomes one, where it is found, and how the next connection
//! to it is made.
//!
//! A persistent process has a table of descriptors and a session of its own, no parent-death
//! signal, and a listening socket. While nobody is attached it executes nothing but the wait for
//! the next controller. See `docs/design.md` for what it survives.

mod attach;
mod cgroup;
mod condition;
mod directory;
mod handshake;
mod home;
mod incarnation;
mod listener;
mod log;
mod make;
mod meet;
mod names;
mod reconnect;
mod removed;
mod rights;
mod successor;
mod target;
mod upgrade;
mod warning;

pub use attach::{Attach, attach};
pub use condition::Condition;
pub use handshake::{Hold, answer, hello};
pub use home::{Files, Home, Name, Place, Reserved, State};
pub use incarnation::Incarnation;
pub use log::{Flight, flight};
pub use make::SharedMemory;
pub use names::{
    Kind, MAX_BYTES, NameSeen, Named, NamesSeen, Resource, Sameness, Unclaimed, names_of,
};
pub use target::Target;
pub use warning::Warning;
