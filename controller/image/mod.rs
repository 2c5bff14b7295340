//! The server image: its bytes, its entry table, and where it lies in a process.

mod load;

pub(crate) use load::neither;
pub use load::{Carrier, executable, mappable};

use crate::abi::entry::{
    AHEAD, ENTRY_TABLE_OFFSET, ENTRY_TABLE_SIZE, EntryTable, IMAGE_VERSION, TrampolineFrame,
};
use crate::error::Error;

/// The image that this build of farcall carries: at once an ELF executable, and what is mapped
/// into processes.
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/server.image"));

/// The entry table of [`IMAGE`].
#[must_use]
pub fn entries() -> EntryTable {
    let bytes = IMAGE[ENTRY_TABLE_OFFSET..].first_chunk::<ENTRY_TABLE_SIZE>();
    bytes.and_then(EntryTable::from_bytes).expect("build.rs has checked the entry table")
}

/// The entry table of an image that a process can be upgraded to.
///
/// # Errors
///
/// [`Error::ForeignImage`] if it has none or one of another layout; [`Error::Upgrade`] if it is not as
/// long as the table says, or its entries lie elsewhere.
pub fn table_of(image: &[u8]) -> Result<EntryTable, Error> {
    let table = image.get(ENTRY_TABLE_OFFSET..).and_then(<[u8]>::first_chunk);
    let Loaded { entries, .. } =
        Loaded::foreign(0, table.ok_or(Error::ForeignImage { version: None })?)?;
    if entries.size as usize != image.len() {
        return Err(Error::Upgrade {
            reason: format!("the image has {} bytes, and says {}", image.len(), entries.size),
        });
    }
    let EntryTable { serve, serve_persistent, trampoline, raw_syscall, resume, .. } = entries;
    let code = (ENTRY_TABLE_OFFSET + ENTRY_TABLE_SIZE) as u32..entries.size;
    if ![serve, serve_persistent, trampoline, raw_syscall, resume].iter().all(|e| code.contains(e))
    {
        return Err(Error::Upgrade { reason: "an entry lies outside of the image".into() });
    }
    Ok(entries)
}

/// An image that lies in a process: its address there and its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    base: u64,
    entries: EntryTable,
}

impl Loaded {
    /// This build's image at `base`.
    #[must_use]
    pub fn ours(base: u64) -> Self {
        Self { base, entries: entries() }
    }

    /// The image at `base`, whose entry table has the bytes `table`.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignImage`] if that is no entry table, or one of another layout.
    pub fn foreign(base: u64, table: &[u8; ENTRY_TABLE_SIZE]) -> Result<Self, Error> {
        match EntryTable::from_bytes(table) {
            Some(entries) if entries.version == IMAGE_VERSION => Ok(Self { base, entries }),
            Some(entries) => Err(Error::ForeignImage { version: Some(entries.version) }),
            None => Err(Error::ForeignImage { version: None }),
        }
    }

    /// The image with that table at `base`.
    pub(crate) fn of_table(base: u64, entries: EntryTable) -> Self {
        Self { base, entries }
    }

    /// Its first address.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Its entry table.
    #[must_use]
    pub fn entries(&self) -> EntryTable {
        self.entries
    }

    /// Whether a child of it can begin in version 1: [`HelloResult::BEGIN`](crate::abi::wire::HelloResult::BEGIN). Of another build's nobody
    /// here knows.
    pub(crate) fn begins_ahead(&self) -> bool {
        self.entries == entries()
    }

    /// The first bytes of a child's stack: the child enters the trampoline, which calls
    /// `serve(input, output)`. If it `begins` in version 1, then with the memory for that and the address
    /// at which it says that it does.
    #[must_use]
    pub fn stack_that_serves(
        &self,
        input: i32,
        output: i32,
        begins: Option<(u64, u64)>,
    ) -> [u8; TrampolineFrame::STACK_BYTES] {
        let (output, memory, begun) = match begins {
            Some((memory, begun)) => (AHEAD, memory, begun),
            None => (output, 0, 0),
        };
        // Descriptors are small and positive, and nobody looks at more than 32 bits of them.
        let args = [input as u64, output as u64, memory, begun, 0, 0];
        let frame = TrampolineFrame { args, function: self.base + u64::from(self.entries.serve) };
        frame.to_stack(self.base + u64::from(self.entries.trampoline))
    }

    /// The address of the entry `raw_syscall`.
    #[must_use]
    pub fn raw_syscall(&self) -> u64 {
        self.base + u64::from(self.entries.raw_syscall)
    }
}
