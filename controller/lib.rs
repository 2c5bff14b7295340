//! farcall runs Linux system calls in other processes.

pub mod abi;
pub mod call;
pub mod chain;
pub mod handle;
pub mod host;
pub mod image;
pub mod memory;
pub mod persist;
pub mod process;
pub mod sys;
pub mod transport;

pub use call::{Error, Outcome, Result};
pub use handle::{Fd, FdTable, Mapping};
pub use host::local::Local;
pub use process::{Child, ChildBuilder, Process};
