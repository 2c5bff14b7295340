//! Places where servers can be started.

pub mod local;
