//! Handles: they own a resource in another process, and know whose it is.

mod fd;
mod mapping;

pub use fd::{Fd, FdTable};
pub use mapping::{AddressSpace, Mapping};
