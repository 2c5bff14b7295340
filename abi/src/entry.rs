//! Where the image is entered.

/// Where in the image the [`EntryTable`] lies: right behind the ELF header and the two program
/// headers that the linker script asks for, so that a controller needs no symbol lookup.
pub const ENTRY_TABLE_OFFSET: usize = 64 + 2 * 56;

/// What [`EntryTable::magic`] holds: "farcall" and a zero byte.
pub const IMAGE_MAGIC: u64 = u64::from_le_bytes(*b"farcall\0");

/// The layout of this table. An image with another one can't be driven by this build, and no other
/// image hands over to it. Fields that are added at the table's end leave the version as it is.
pub const IMAGE_VERSION: u32 = 1;

/// No image is larger: three pages. The build refuses one that is.
pub const IMAGE_MAX_SIZE: usize = 12_288;

/// As `out` of [`EntryTable::serve`]: `in` is also where results go.
pub const SAME: i32 = -1;

/// The same, and the server is in version 1 of the stream from the start, with the memory that is its
/// fourth argument, or the third one of `serve`, and says so where the argument behind that points to: see
/// `docs/protocol.md`. An image without
/// [`HelloResult::BEGIN`](super::wire::HelloResult::BEGIN) takes it for [`SAME`].
pub const AHEAD: i32 = -2;

/// Bytes of stack under which the version-0 entries live.
pub const STACK_SIZE: usize = 4096;

/// The table at [`ENTRY_TABLE_OFFSET`]: offsets from the first byte of the image to its entries,
/// all of them `extern "C"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EntryTable {
    /// [`IMAGE_MAGIC`].
    pub magic: u64,
    /// [`IMAGE_VERSION`].
    pub version: u32,
    /// Bytes of the image.
    pub size: u32,
    /// `serve(in, out, memory, begun)`: version 0 on two descriptors, or with [`AHEAD`] version 1; returns at
    /// the end of input.
    pub serve: u32,
    /// `serve_persistent(in, out, listen, memory, begun)`: the same, and at the end of input the next
    /// connection is awaited on `listen`. Returns when there is neither a connection nor a listener.
    pub serve_persistent: u32,
    /// What the child of a `clone` with a new stack returns into: see `docs/protocol.md`.
    pub trampoline: u32,
    /// `raw_syscall(a0, a1, a2, a3, a4, a5, number)`: out of line, `syscall` directly followed by
    /// `ret`.
    pub raw_syscall: u32,
    /// Where the image takes a process over from another one: see [`super::upgrade`].
    pub resume: u32,
    /// How many bytes of a [`Handover`](super::upgrade::Handover) it understands.
    pub handover: u32,
}

/// Bytes of an [`EntryTable`].
pub const ENTRY_TABLE_SIZE: usize = size_of::<EntryTable>();

const _: () = {
    assert!(ENTRY_TABLE_SIZE == 40);
    assert!(ENTRY_TABLE_OFFSET == 176);
    assert!(ENTRY_TABLE_OFFSET.is_multiple_of(align_of::<EntryTable>()));
    assert!(core::mem::offset_of!(EntryTable, version) == 8);
    assert!(core::mem::offset_of!(EntryTable, size) == 12);
    assert!(core::mem::offset_of!(EntryTable, serve) == 16);
    assert!(core::mem::offset_of!(EntryTable, serve_persistent) == 20);
    assert!(core::mem::offset_of!(EntryTable, trampoline) == 24);
    assert!(core::mem::offset_of!(EntryTable, raw_syscall) == 28);
    assert!(core::mem::offset_of!(EntryTable, resume) == 32);
    assert!(core::mem::offset_of!(EntryTable, handover) == 36);
};

impl EntryTable {
    /// The table from its bytes, or `None` if they are not a farcall image's.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; ENTRY_TABLE_SIZE]) -> Option<Self> {
        let word = |at: usize| {
            let mut word = [0; 4];
            for (to, from) in word.iter_mut().zip(bytes.iter().skip(at)) {
                *to = *from;
            }
            u32::from_le_bytes(word)
        };
        let table = Self {
            magic: u64::from(word(0)) | u64::from(word(4)) << 32,
            version: word(8),
            size: word(12),
            serve: word(16),
            serve_persistent: word(20),
            trampoline: word(24),
            raw_syscall: word(28),
            resume: word(32),
            handover: word(36),
        };
        (table.magic == IMAGE_MAGIC).then_some(table)
    }
}

/// What [`EntryTable::trampoline`] finds on a fresh stack, lowest address first: first its own
/// address (which `ret` of `raw_syscall` takes), then this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct TrampolineFrame {
    /// The argument registers: rdi, rsi, rdx, rcx, r8, r9.
    pub args: [u64; 6],
    /// The function to call.
    pub function: u64,
}

const _: () = assert!(size_of::<TrampolineFrame>() == 56);

impl TrampolineFrame {
    /// Bytes of a fresh stack's content, the trampoline's own address included.
    pub const STACK_BYTES: usize = 64;

    /// The content of a fresh stack: what lies from the child's first stack pointer upwards.
    #[must_use]
    pub fn to_stack(&self, trampoline: u64) -> [u8; Self::STACK_BYTES] {
        let mut bytes = [0; Self::STACK_BYTES];
        let words = core::iter::once(trampoline).chain(self.args).chain([self.function]);
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}
