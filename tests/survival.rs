//! What a persistent process survives: each way in which its controller, or what is around it, ends.
//!
//! Every test shows that what it does is deadly: the controller, or a process that is made in another
//! way, ends of it.

mod common;
#[path = "survival/controller.rs"]
mod controller;
#[path = "survival/dump.rs"]
mod dump;
#[path = "survival/frozen.rs"]
mod frozen;
#[path = "survival/groups.rs"]
mod groups;
#[path = "survival/manager.rs"]
mod manager;
#[path = "survival/own_cgroup.rs"]
mod own_cgroup;
#[path = "survival/services.rs"]
mod services;
#[path = "survival/terminal.rs"]
mod terminal;
#[path = "survival/tree.rs"]
mod tree;
