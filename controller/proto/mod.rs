//! What travels between a controller and a server, as plain values: no I/O, no runtime.

pub(crate) mod batch;
