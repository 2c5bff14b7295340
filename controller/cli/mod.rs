//! The daily commands: persistent processes are started, listed, called, looked into and stopped.

pub mod call;
mod constants;
pub mod image;
pub mod list;
pub mod log;
pub mod names;
mod progress;
mod reach;
pub mod restore;
pub mod start;
pub mod stop;
mod suggest;
pub mod upgrade;
