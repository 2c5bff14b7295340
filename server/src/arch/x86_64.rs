//! x86-64: the entries, the call that is made for the controller, and what the compiler expects
//! of a C library. Another architecture is another file of this shape beside this one.

use core::arch::{global_asm, naked_asm};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use farcall_abi::entry::{ENTRY_TABLE_OFFSET, IMAGE_MAGIC, IMAGE_VERSION};
use farcall_abi::upgrade::{HANDOVER_SIZE, Handover, STACK_OFFSET};
use farcall_abi::wire::Request;
use syscalls::Sysno;

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
    ".long {resume} - farcall_entry_table + {offset}",
    ".long {handover}",
    ".popsection",
    magic = const IMAGE_MAGIC,
    version = const IMAGE_VERSION,
    offset = const ENTRY_TABLE_OFFSET,
    serve = sym crate::serve::serve,
    serve_persistent = sym crate::serve::serve_persistent,
    trampoline = sym trampoline,
    raw_syscall = sym raw_syscall,
    resume = sym resume,
    handover = const HANDOVER_SIZE,
);

/// Where the image lies in this process.
pub fn image_address() -> u64 {
    let address;
    // SAFETY: only computes an address relative to the instruction pointer.
    unsafe {
        core::arch::asm!(
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

/// [`raw_syscall`] for a call that can be interrupted: r12 is null or the address of a number, and if
/// that is the one in r13 the call is not made, and the result is -EINTR.
///
/// No signal can come too late: up to and including the instruction `syscall`, before which the kernel
/// also puts a thread that it has woken from a call to make it again, [`turn_back`] finds the thread in
/// here. Nothing is on the stack but the return address, wherever it is.
#[unsafe(naked)]
unsafe extern "C" fn interruptible_syscall() {
    naked_asm!(
        "test r12, r12",
        "jz 2f",
        "cmp [r12], r13",
        "je {interrupted}",
        "2:",
        "mov rax, [rsp + 8]",
        "mov r10, rcx",
        ".globl farcall_last_instruction",
        ".hidden farcall_last_instruction",
        "farcall_last_instruction:",
        "syscall",
        "ret",
        interrupted = sym interrupted,
    )
}

/// Where a call ends that is not made.
#[unsafe(naked)]
unsafe extern "C" fn interrupted() {
    naked_asm!("mov rax, {eintr}", "ret", eintr = const crate::sys::EINTR)
}

/// Makes a thread that is about to make a call, in [`interruptible_syscall`], not make it, if that is the
/// call to be interrupted. The kernel keeps the registers that say so while it makes a call.
///
/// # Safety
///
/// `context` is what the kernel has passed to the signal handler that calls this.
pub unsafe fn turn_back(context: *mut u8) {
    /// uc_mcontext.gregs, where these have the indices 4, 5 and 16.
    const GREGS: usize = 40;
    const R12: usize = GREGS + 4 * 8;
    const R13: usize = GREGS + 5 * 8;
    const RIP: usize = GREGS + 16 * 8;
    let (last, end): (usize, usize);
    // SAFETY: only computes addresses relative to the instruction pointer.
    unsafe {
        core::arch::asm!(
            "lea {}, [rip + farcall_last_instruction]",
            "lea {}, [rip + {interrupted}]",
            out(reg) last,
            out(reg) end,
            interrupted = sym interrupted,
            options(nomem, nostack, preserves_flags, pure)
        );
    }
    let first = interruptible_syscall as *const () as usize;
    // SAFETY: the caller's promise, and nobody else has a reference to it.
    let rip = unsafe { &mut *context.add(RIP).cast::<usize>() };
    if !(first..=last).contains(rip) {
        return;
    }
    // SAFETY: as above. In that function r12 is null or where `cancel` of the ring lies, which may be
    // changed meanwhile.
    let (cancel, number) = unsafe {
        ((*context.add(R12).cast::<*const AtomicU64>()).as_ref(), *context.add(R13).cast::<u64>())
    };
    if cancel.is_some_and(|cancel| cancel.load(Ordering::Relaxed) == number) {
        *rip = end;
    }
}

/// Makes the system call of a request. If `cancel` is not null and points to `number`, or comes to do
/// so and the thread gets a signal that tells it, the result is -EINTR.
///
/// A child that comes out of the call beside its parent, because it was given no stack of its own,
/// leaves with exit(0) and answers nothing. Written out because such a child may share its parent's
/// memory (vfork): between the `ret` in `interruptible_syscall` and the child's exit nothing may be
/// stored on the stack, where the parent is still to find its return address. No compiler promises
/// that.
///
/// # Safety
///
/// As for [`raw_syscall`].
#[unsafe(naked)]
pub unsafe extern "C" fn call(request: &Request, cancel: *const u64, number: u64) -> i64 {
    naked_asm!(
        "push rbx",
        "push r12",
        "push r13",
        "mov rbx, [rdi]",
        "push rbx",
        "mov r12, rsi",
        "mov r13, rdx",
        "mov rax, rdi",
        "mov rdi, [rax + 8]",
        "mov rsi, [rax + 16]",
        "mov rdx, [rax + 24]",
        "mov rcx, [rax + 32]",
        "mov r8, [rax + 40]",
        "mov r9, [rax + 48]",
        "call {interruptible_syscall}",
        "test rax, rax",
        "jnz 2f",
        // clone, fork and vfork are neighbours.
        "lea ecx, [rbx - {clone}]",
        "cmp ecx, {vfork} - {clone}",
        "jbe 3f",
        "cmp ebx, {clone3}",
        "je 3f",
        "2:",
        "pop rbx",
        "pop r13",
        "pop r12",
        "pop rbx",
        "ret",
        "3:",
        "xor edi, edi",
        "mov eax, {exit}",
        "syscall",
        "ud2",
        interruptible_syscall = sym interruptible_syscall,
        clone = const Sysno::clone as u32,
        vfork = const Sysno::vfork as u32,
        clone3 = const Sysno::clone3 as u32,
        exit = const Sysno::exit as u32,
    )
}

/// Makes a thread that has a copy of the table of descriptors, and exits as soon as `go` is not 0. Returns its
/// number, or a negated errno. The number is also at `tid`, until the thread uses no memory any more; its
/// descriptors it closes after that.
///
/// It is a thread and not a process because nobody can wait for it, and because a process would become the
/// first one of a pid namespace that this one has prepared for its children; a thread is refused then.
///
/// # Safety
///
/// 1. Both stay where they are until then.
/// 2. All signals are blocked: the thread's stack pointer is this thread's, and it writes nothing there.
#[unsafe(naked)]
pub unsafe extern "C" fn exiting_thread(go: *const AtomicU32, tid: *const AtomicU32) -> i64 {
    naked_asm!(
        "mov r9, rdi",
        "mov rdx, rsi",
        "mov r10, rsi",
        "mov edi, {flags}",
        "xor esi, esi",
        "mov eax, {clone}",
        "syscall",
        "test rax, rax",
        "jnz 3f",
        "2:",
        "mov eax, {sched_yield}",
        "syscall",
        "cmp dword ptr [r9], 0",
        "je 2b",
        "xor edi, edi",
        "mov eax, {exit}",
        "syscall",
        "3:",
        "ret",
        // CLONE_VM, CLONE_SIGHAND, CLONE_THREAD, CLONE_PARENT_SETTID, CLONE_CHILD_CLEARTID.
        flags = const 0x100 | 0x800 | 0x1_0000 | 0x10_0000 | 0x20_0000,
        clone = const Sysno::clone as u32,
        sched_yield = const Sysno::sched_yield as u32,
        exit = const Sysno::exit as u32,
    )
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
        ".globl farcall_call",
        ".hidden farcall_call",
        "farcall_call:",
        "xor ebp, ebp",
        "and rsp, -16",
        "call rax",
        "xor edi, edi",
        "mov eax, {exit}",
        "syscall",
        "ud2",
        prctl = const Sysno::prctl as u32,
        set_pdeathsig = const 1,
        sigkill = const 9,
        exit = const Sysno::exit as u32,
    )
}

/// Entry: takes over from another image, on the stack where that one's began. Leaves as the
/// trampoline does.
#[unsafe(naked)]
unsafe extern "C" fn resume(handover: *const Handover) -> ! {
    naked_asm!(
        "mov rsp, [rdi + {stack}]",
        "lea rax, [rip + {take_over}]",
        "jmp farcall_call",
        stack = const STACK_OFFSET,
        take_over = sym crate::upgrade::take_over,
    )
}

/// Another image's entry at that address, never to come back.
///
/// # Safety
///
/// It is the entry `resume` of an image that understands the handover.
pub unsafe fn enter(resume: u64, handover: *const Handover) -> ! {
    // SAFETY: the caller's promise.
    let resume: unsafe extern "C" fn(*const Handover) -> ! =
        unsafe { core::mem::transmute(resume as *const ()) };
    // SAFETY: as above.
    unsafe { resume(handover) }
}

/// A signal handler that does nothing: unlike SIG_IGN it does not survive `execve`.
#[unsafe(naked)]
pub unsafe extern "C" fn ignore_signal() {
    naked_asm!("ret")
}

/// What a signal handler returns to.
#[unsafe(naked)]
pub unsafe extern "C" fn restore_signal() {
    naked_asm!("mov eax, {rt_sigreturn}", "syscall", rt_sigreturn = const Sysno::rt_sigreturn as u32)
}

/// SA_SIGINFO and SA_RESTART.
pub const SA_INTERRUPT: u64 = SA_RESTORER | 0x1000_0004;

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
