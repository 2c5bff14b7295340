//! What tries farcall out: its figures, its promises under torture, and a demonstration.

pub mod bench;
pub mod demo;
pub mod torture;
