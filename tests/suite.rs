//! All tests that can share a process, as one program: a module for each file in this directory.
//!
//! Many threads run them at once. A test that changes or counts what belongs to the whole process
//! (limits, umask, signals, memory) runs its body in a process of its own: `common::alone`.

mod common;
// The code that build.rs runs.
#[path = "../build/compile.rs"]
mod compile;
#[path = "../build/judge.rs"]
mod judge;

mod blocking;
mod bulk;
mod chain;
mod children;
#[cfg(feature = "cli")]
mod cli;
mod data_sockets;
mod descriptors;
mod differential;
mod exactly_once;
mod forbidden;
mod image;
mod interrupt;
mod layers;
mod long;
mod mappings;
mod misuse;
mod names;
mod overdue;
mod persistent;
mod place;
#[cfg(feature = "cli")]
mod places;
mod processes;
mod race;
mod regressions;
mod resume;
mod ring;
mod ring_ends;
mod ring_made;
mod room;
mod skew;
mod spare_streams;
mod stopped;
mod stream;
mod superseded;
mod table;
mod takeover;
mod tenures;
#[cfg(feature = "cli")]
mod torture;
mod upgrade;
