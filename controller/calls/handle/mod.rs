//! Handles: they own a resource in another process, and know whose it is.

mod fd;
mod lent;
mod mapping;
mod registry;
mod spare;
mod stack;

pub(crate) use crate::proto::tag::Tag;
pub(crate) use fd::close_others;
pub use fd::{Fd, FdTable};
pub(crate) use lent::Lent;
pub use mapping::{AddressSpace, Mapping};
pub(crate) use registry::{Kept, Registry, Slots, Unready, kind, taken_in};
pub(crate) use spare::Spare;
pub(crate) use stack::{GUARD, Stack};
