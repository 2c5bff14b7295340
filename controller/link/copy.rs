//! Copies out of and into memory that others may change meanwhile: the process with which it is
//! shared, and other threads of this one.
//!
//! Rust gives no meaning to a plain access that races with a write, whatever the bytes are. So these
//! copies are defined as what [`AtomicU8`] does, byte by byte and relaxed. On x86-64 the processor moves many
//! bytes at a time for that: for whoever looks byte by byte, that is one of the orders in which relaxed
//! accesses can happen. Elsewhere, and where this code is interpreted, the loop does all of it.

use std::sync::atomic::{AtomicU8, Ordering};

/// Below so many bytes a loop is faster than what the instruction needs to begin.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const SHORT: usize = 32;

/// Copies `len` bytes out of memory that others may change.
///
/// # Safety
///
/// 1. `len` bytes can be read at `from`, and all others access them only through atomics or these
///    copies, or are other processes.
/// 2. `len` bytes can be written at `to`, which are the caller's alone and do not overlap those.
pub unsafe fn copy_out(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if len >= SHORT {
        // SAFETY: the caller's promise.
        return unsafe { move_bytes(from, to, len) };
    }
    for at in 0..len {
        // SAFETY: within what the caller has promised; any byte is a valid AtomicU8, and a shared
        // reference to one allows writes by others.
        unsafe {
            let byte = &*from.add(at).cast::<AtomicU8>();
            to.add(at).write(byte.load(Ordering::Relaxed));
        }
    }
}

/// Copies `bytes` into memory that others may read and change.
///
/// # Safety
///
/// As many bytes can be written at `to`, and all others access them only through atomics or these
/// copies, or are other processes.
pub unsafe fn copy_in(bytes: &[u8], to: *mut u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if bytes.len() >= SHORT {
        // SAFETY: the caller's promise; nobody changes `bytes`.
        return unsafe { move_bytes(bytes.as_ptr(), to, bytes.len()) };
    }
    for (at, byte) in bytes.iter().enumerate() {
        // SAFETY: as in `copy_out`.
        let place = unsafe { &*to.add(at).cast::<AtomicU8>() };
        place.store(*byte, Ordering::Relaxed);
    }
}

/// One instruction, which the compiler sees as any code that accesses these bytes.
///
/// # Safety
///
/// `len` bytes can be read at `from` and written at `to`, and they do not overlap.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn move_bytes(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: it reads and writes just these bytes, and the direction flag is clear, as the ABI has it.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn just_the_bytes_that_were_asked_for_are_copied(
            before in 0usize..9, len in 0usize..300, offset in 0usize..9
        ) {
            let source: Vec<u8> = (0..before + len + 8).map(|at| at as u8 ^ 0x5a).collect();
            for inwards in [false, true] {
                let mut target = vec![0xee; offset + len + 8];
                let piece = &source[before..before + len];
                let to = target[offset..].as_mut_ptr();
                // SAFETY: both have as many bytes there, and nobody else has them.
                unsafe {
                    if inwards { copy_in(piece, to) } else { copy_out(piece.as_ptr(), to, len) }
                }
                prop_assert_eq!(&target[offset..offset + len], piece);
                prop_assert!(target[..offset].iter().chain(&target[offset + len..]).all(|b| *b == 0xee));
            }
        }
    }
}
