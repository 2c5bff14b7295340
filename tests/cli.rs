//! The command line as a person or a script sees it: what it prints, and with what it exits.

#[path = "cli/call.rs"]
mod call;
#[path = "cli/command.rs"]
mod command;
mod common;
#[path = "cli/life.rs"]
mod life;
#[path = "cli/log.rs"]
mod log;
#[path = "cli/names.rs"]
mod names;
#[path = "cli/others.rs"]
mod others;
#[path = "cli/transfer.rs"]
mod transfer;
