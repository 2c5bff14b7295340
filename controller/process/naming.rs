//! The name that a child has in its parent's registry from the instant on at which it is made.

use super::Process;
use crate::abi::registry::ENTRY_SIZE;
use crate::abi::wire::Operation;
use crate::call::{Call, Result};
use crate::handle::{Slots, kind};
use crate::sys::Buffer;
use crate::sys::registry::{check_name, entry};

/// An entry of the registry that is set aside for a child, and memory for what is written there. Both
/// are kept until the replies are here.
pub(super) struct Naming {
    name: String,
    slots: Slots,
    buffer: Buffer,
}

impl Naming {
    pub(super) async fn new(parent: &Process, name: &str) -> Result<Self> {
        check_name(name)?;
        let slots = parent.slots(1, &[name.to_owned()]).await?;
        let buffer = parent.buffer(ENTRY_SIZE).await?;
        Ok(Self { name: name.into(), slots, buffer })
    }

    /// The calls directly before the one that makes the child: the last is KEEP, and that one is to be
    /// linked to it.
    pub(super) fn calls(&self) -> [Call; 2] {
        let from = self.buffer.address();
        let entry = entry(&self.name, kind::CHILD, [0; 3]).to_bytes();
        let args = [self.slots.first, from, entry.len() as u64, 0, 1, 0];
        [Call::copy_in(from, entry.to_vec()), Call::operation(Operation::Keep, args)]
    }
}
