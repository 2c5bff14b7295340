//! Persistent processes: how a process becomes one, where it is found, and how the next connection
//! to it is made.
//!
//! A persistent process has a table of descriptors and a session of its own, no parent-death
//! signal, and a listening socket. While nobody is attached it executes nothing but the wait for
//! the next controller. See `docs/design.md` for what it survives.

mod agent;
mod attach;
mod cgroup;
mod condition;
mod directory;
mod files;
mod home;
mod incarnation;
mod knock;
mod listener;
mod log;
mod make;
mod meet;
mod mounts;
mod names;
mod place;
mod reconnect;
mod record;
mod removed;
mod reserved;
mod rights;
mod successor;
mod target;
mod upgrade;
mod warning;

pub use crate::proto::handshake::{Hold, answer, hello};
pub use attach::{Attach, attach};
pub use condition::Condition;
pub use files::Files;
pub use home::{Home, Name};
pub use incarnation::Incarnation;
pub use log::{Flight, flight};
pub use make::SharedMemory;
pub use names::{
    Kind, MAX_BYTES, NameSeen, Named, NamesSeen, Resource, Sameness, Unclaimed, names_of,
};
pub use place::Place;
pub use record::State;
pub use reserved::Reserved;
pub use target::Target;
pub use warning::Warning;
