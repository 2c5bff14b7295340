//! The command line as a person or a script sees it: what it prints, and with what it exits.

mod call;
mod command;
mod condition;
mod directory;
mod examples;
mod files;
mod life;
mod limits;
mod log;
mod names;
mod others;
mod served;
mod transfer;
mod upgrade;
mod waiting;
