//! Memory that this process and a server both map: the ring, and behind it an arena.
//!
//! The other side is not trusted: what lies in here is read once, through atomics or by a copy of
//! [`super::copy`], and is never a reference of Rust's to anything but atomics.

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::copy::{copy_in, copy_out};
use crate::abi::ring::{ARENA_OFFSET, Ring};
use crate::descriptor::off_standard_streams;
use crate::error::{Error, Result};
use crate::fault;
use crate::proto::ring::Memory;

/// Bytes of a ring with its arena: room for a few buffers of a mebibyte. Pages that are never used
/// are never there.
pub const SHARED_SIZE: usize = 8 << 20;

/// The memory on this side, before the server has it.
pub(crate) struct Prepared {
    here: Here,
    memfd: OwnedFd,
}

/// Pages of this process, unmapped when it is dropped.
struct Here(NonNull<Ring>);

// SAFETY: the memory is shared with another process anyway: it is accessed through atomics, and by
// copies to and from pieces of the arena, each of which one owner has.
unsafe impl Send for Here {}
// SAFETY: as for Send.
unsafe impl Sync for Here {}

impl Drop for Here {
    fn drop(&mut self) {
        // SAFETY: mapped with that size, and references to it borrow from `self`.
        let _ = unsafe { munmap(self.0.cast(), SHARED_SIZE) };
    }
}

/// A ring and its arena, which a server has mapped.
pub struct Shared {
    here: Here,
    /// Where the server has it.
    there: u64,
    /// The first and last addresses of pieces of the arena that calls of any batch may name.
    lent: Mutex<BTreeMap<u64, u64>>,
    /// Keeps it mapped there.
    _mapping: Box<dyn Send + Sync>,
}

impl Prepared {
    pub(crate) fn new() -> Result<Self> {
        Self::in_file(match fault::mutant("same-memory") {
            Some(path) => Self::earlier(path)?,
            None => Self::memory()?,
        })
    }

    /// What no other controller has.
    fn memory() -> Result<File> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let memfd = memfd_create(c"farcall-ring", flags).map_err(Error::local("memfd_create"))?;
        let file = File::from(memfd);
        file.set_len(SHARED_SIZE as u64).map_err(Error::io("ftruncate"))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::local("fcntl"))?;
        let memfd = off_standard_streams(file.into()).map_err(Error::io("dup"))?;
        Ok(memfd.into())
    }

    /// What every controller has: the fault that `farcall torture` is to notice.
    fn earlier(path: &str) -> Result<File> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.map_err(Error::io("open"))?;
        file.set_len(SHARED_SIZE as u64).map_err(Error::io("ftruncate"))?;
        Ok(file)
    }

    fn in_file(file: File) -> Result<Self> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        const SIZE: NonZeroUsize = NonZeroUsize::new(SHARED_SIZE).unwrap();
        // SAFETY: new pages, at an address of the kernel's choice.
        let pages = unsafe { mmap(None, SIZE, protection, MapFlags::MAP_SHARED, &file, 0) };
        let pages = pages.map_err(|errno| Error::local("mmap")(errno))?;
        let here = Here(pages.cast());
        here.ring().describe(SHARED_SIZE as u64);
        Ok(Self { here, memfd: file.into() })
    }

    /// What the server maps.
    pub(crate) fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// The server has mapped it at `there`, where it is as long as `mapping` lives.
    pub(crate) fn mapped(self, there: u64, mapping: impl Send + Sync + 'static) -> Shared {
        Shared { here: self.here, there, lent: Mutex::default(), _mapping: Box::new(mapping) }
    }
}

impl Here {
    fn ring(&self) -> &Ring {
        // SAFETY: mapped, page-aligned, and as large; any bytes are valid atomics, and sealed memory
        // stays there.
        unsafe { self.0.as_ref() }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({:#x})", self.there)
    }
}

impl Shared {
    /// The arena's address in the server, and its size.
    pub(crate) fn arena(&self) -> (u64, usize) {
        (self.there + ARENA_OFFSET as u64, SHARED_SIZE - ARENA_OFFSET)
    }

    /// Whether that part of the server's memory is in the arena.
    pub fn has(&self, address: u64, len: u64) -> bool {
        self.place(address, len).is_some()
    }

    fn lent(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls of any batch may name that piece of the arena from here on.
    pub(crate) fn lend(&self, address: u64, len: u64) {
        self.lent().insert(address, address + len.saturating_sub(1));
    }

    /// Only those of one batch may, as with any other piece.
    pub(crate) fn take_back(&self, address: u64) {
        self.lent().remove(&address);
    }

    fn place(&self, address: u64, len: u64) -> Option<NonNull<u8>> {
        let at = address.checked_sub(self.there)?;
        let fits = at >= ARENA_OFFSET as u64 && at.checked_add(len)? <= SHARED_SIZE as u64;
        // SAFETY: inside of the pages: it was just compared.
        fits.then(|| unsafe { self.here.0.cast::<u8>().add(at as usize) })
    }

    /// The number at a place in the arena, a multiple of 8, which the server may change meanwhile, or
    /// `None` if it is not there. What the server did before it stored the number has been done.
    pub(crate) fn load(&self, address: u64) -> Option<u64> {
        let place = self.place(address, 8)?.cast::<AtomicU64>();
        // SAFETY: it is there and aligned, and only copies and atomics access it.
        place.is_aligned().then(|| unsafe { place.as_ref() }.load(Ordering::Acquire))
    }
}

impl Memory for Shared {
    fn ring(&self) -> &Ring {
        self.here.ring()
    }

    fn is_of_one_batch(&self, address: u64, len: u64) -> bool {
        let end = address.saturating_add(len.saturating_sub(1));
        let lent = self.lent().range(..=end).next_back().is_some_and(|(_, last)| *last >= address);
        self.has(address, len) && !lent
    }

    fn write(&self, address: u64, bytes: &[u8]) -> bool {
        let Some(place) = self.place(address, bytes.len() as u64) else { return false };
        // SAFETY: as many bytes are there, and all that this process does with them is in this file.
        unsafe { copy_in(bytes, place.as_ptr()) };
        true
    }

    fn read(&self, address: u64, len: u64) -> Option<Vec<u8>> {
        let place = self.place(address, len)?;
        let mut bytes: Vec<u8> = Vec::with_capacity(len as usize);
        // SAFETY: as many bytes are there, and all that this process does with them is in this file;
        // there is room for them, and all of them are written.
        unsafe {
            copy_out(place.as_ptr(), bytes.as_mut_ptr(), len as usize);
            bytes.set_len(len as usize);
        }
        Some(bytes)
    }
}
