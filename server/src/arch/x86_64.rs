//! x86-64: the entries, the call that is made for the controller, and what the compiler expects
//! of a C library. Another architecture is another file of this shape beside this one.

use core::arch::{asm, global_asm, naked_asm};

use farcall_abi::entry::{ENTRY_TABLE_OFFSET, IMAGE_MAGIC, IMAGE_VERSION};

global_asm!(
    ".pushsection .farcall.entry, \"a\", @progbits",
    "farcall_entry_table:",
    ".quad {magic}",
    ".long {version}",
    ".long farcall_image_end - farcall_entry_table + {offset}",
    ".long {serve} - farcall_entry_table + {offset}",
    ".long {serve_persistent} - farcall_entry_table + {offset}",
    ".long {trampoline} - farcall_entry_table + {offset}",
    ".long {raw_syscall} - farcall_entry_table + {offset}",
    ".popsection",
    magic = const IMAGE_MAGIC,
    version = const IMAGE_VERSION,
    offset = const ENTRY_TABLE_OFFSET,
    serve = sym crate::serve::serve,
    serve_persistent = sym crate::serve::serve_persistent,
    trampoline = sym trampoline,
    raw_syscall = sym raw_syscall,
);

/// Where the image lies in this process.
pub fn image_address() -> u64 {
    let address;
    // SAFETY: only computes an address relative to the instruction pointer.
    unsafe {
        asm!(
            "lea {}, [rip + __ehdr_start]",
            out(reg) address,
            options(nomem, nostack, preserves_flags, pure)
        );
    }
    address
}

/// What `execve` enters: the stack pointer points to argc.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn farcall_start() -> ! {
    naked_asm!(
        "mov rdi, rsp",
        "xor ebp, ebp",
        "and rsp, -16",
        "call {start}",
        "ud2",
        start = sym crate::start::start,
    )
}

/// Makes the system call `number` and returns what the kernel does.
///
/// Out of line, and `syscall` directly followed by `ret`: the child of a `clone` with a new stack
/// has its own stack pointer when it comes out of `syscall`, and `ret` takes its next address from
/// there.
///
/// # Safety
///
/// 1. The call is made as it is: whatever it does to this process, it does.
/// 2. No reference of Rust's may cover memory that the call changes.
#[unsafe(naked)]
pub unsafe extern "C" fn raw_syscall(
    a0: u64,
    a1: u64,
    a2: u64,
    a3: u64,
    a4: u64,
    a5: u64,
    number: u64,
) -> i64 {
    naked_asm!("mov rax, [rsp + 8]", "mov r10, rcx", "syscall", "ret")
}

/// exit(0) of the calling thread, without touching the stack: in the child of a vfork that is the
/// stack from which the parent is going to return.
///
/// Inlined, and the constants are loaded here: for size the compiler would push and pop them.
#[inline(always)]
pub fn leave() -> ! {
    // SAFETY: does not return, and only the calling thread is gone.
    unsafe {
        asm!(
            "xor edi, edi",
            "mov eax, {exit}",
            "syscall",
            "ud2",
            exit = const syscalls::Sysno::exit as u32,
            options(noreturn, nostack)
        )
    }
}

/// What the child of a `clone` returns into, its stack laid out as `abi::entry::TrampolineFrame`:
/// ties its life to its parent's, calls the function with the six arguments, leaves with exit(0).
#[unsafe(naked)]
unsafe extern "C" fn trampoline() -> ! {
    naked_asm!(
        "mov eax, {prctl}",
        "mov edi, {set_pdeathsig}",
        "mov esi, {sigkill}",
        "syscall",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop rcx",
        "pop r8",
        "pop r9",
        "pop rax",
        "xor ebp, ebp",
        "and rsp, -16",
        "call rax",
        "xor edi, edi",
        "mov eax, {exit}",
        "syscall",
        "ud2",
        prctl = const syscalls::Sysno::prctl as u32,
        set_pdeathsig = const 1,
        sigkill = const 9,
        exit = const syscalls::Sysno::exit as u32,
    )
}

/// A signal handler that does nothing: unlike SIG_IGN it does not survive `execve`.
#[unsafe(naked)]
pub unsafe extern "C" fn ignore_signal() {
    naked_asm!("ret")
}

/// What a signal handler returns to.
#[unsafe(naked)]
pub unsafe extern "C" fn restore_signal() {
    naked_asm!("mov eax, {rt_sigreturn}", "syscall", rt_sigreturn = const syscalls::Sysno::rt_sigreturn as u32)
}

/// What the kernel's sigaction needs besides the handler: SA_RESTORER.
pub const SA_RESTORER: u64 = 0x0400_0000;

// The compiler calls these for copies and fills of its own, and `core` brings none for this target.

/// memcpy(3).
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

/// memset(3).
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    naked_asm!("mov r8, rdi", "mov eax, esi", "mov rcx, rdx", "rep stosb", "mov rax, r8", "ret")
}

/// memmove(3).
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "mov rdx, rdi",
        "sub rdx, rsi",
        "cmp rdx, rcx",
        "jb 2f",
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rcx - 1]",
        "lea rsi, [rsi + rcx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
    )
}
