//! The farcall server: executes the requests that arrive on a file descriptor or in
//! shared memory.
//!
//! What is particular about this program:
//! - It runs in anybody's address space, without libc, TLS, heap or writable data. All state is
//!   one [`serve::Server`] on the stack, and the whole of it lives on under 4 KiB.
//! - It must not contain a relocation, a GOT entry or a panic path: index nothing, unwrap nothing,
//!   and let the build's check prove it. A bug ends in `exit_group(101)`.
//! - It is to be small, a page or little more. Most methods of the state are kept out of line:
//!   inlined into one that has the state itself, they reach it through the stack pointer, by
//!   instructions twice as long. A method that ends in one of several others is better inlined: on
//!   its own, it restores the registers again before each.
//! - Memory that a controller names is only ever touched by the kernel, on its behalf.
//!
//! It is entered through the table that `arch` lays out, or by `execve` at `farcall_start`.

#![no_std]
#![no_main]

#[cfg_attr(target_arch = "x86_64", path = "arch/x86_64.rs")]
mod arch;
mod attach;
mod copy;
mod registry;
mod ring;
mod serve;
mod start;
mod stream;
mod sys;
mod upgrade;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    sys::exit_group(101)
}
