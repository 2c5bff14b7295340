//! The image as an executable: what it finds on its stack decides what it serves.
//!
//! - Without anything: requests on descriptor 0, results on descriptor 1; exit(0) at the end.
//! - With a path as its argument: persistent on a socket that it binds there.
//! - With LISTEN_FDS in the environment (systemd's convention): persistent on descriptor 3.

use core::mem::MaybeUninit;
use core::ptr;

use farcall_abi::ring::{INTERRUPT_SIGNAL, SOURCE_SIGNAL};

use crate::arch;
use crate::ring;
use crate::serve;
use crate::sys::{
    self, AF_UNIX, Direction, EINVAL, F_SETFD, F_SETFL, FD_CLOEXEC, POLLOUT, PollFd, SOCK_NONBLOCK,
    SigAction, SockAddr,
};

const SIGPIPE: usize = 13;
const SIGCHLD: usize = 17;
const SIG_DFL: usize = 0;
/// From 0 on: SIG_DFL and SIG_IGN, which are no handlers.
pub const NO_HANDLERS: usize = 2;
/// The first descriptor that LISTEN_FDS counts.
const LISTEN_FDS_START: i32 = 3;

/// Called by the architecture's entry with the stack as `execve` left it.
///
/// # Safety
///
/// `stack` points to argc, followed by the arguments, a null, the environment, a null.
pub unsafe extern "C" fn start(stack: *const usize) -> ! {
    handle_signals(0, NO_HANDLERS);
    // Inherited as ignored, it would lose the children's exit statuses.
    handle_signal(0, NO_HANDLERS, SIGCHLD, SIG_DFL, arch::SA_RESTORER);

    // SAFETY: the caller's promise: `argc` pointers and a null, then the environment.
    let (argc, path, environment) =
        unsafe { (*stack, *stack.add(2), stack.add(1 + *stack + 1).cast::<*const u8>()) };
    let listen = if argc > 1 {
        // SAFETY: argv[1] exists and is a string.
        unsafe { bind(path as *const u8) }
    } else {
        // SAFETY: the environment ends with a null.
        unsafe { passed(environment) }
    };
    match listen {
        None => serve::serve_on(0, 1, (-1, 0), 0, ptr::null()),
        Some(Ok(listen)) => serve::serve_on(-1, -1, listen, 0, ptr::null()),
        Some(Err(error)) => {
            const TEXT: &[u8] =
                b"farcall: cannot listen: path in use or too long, or fd 3 no listener\n";
            let mut error_output = PollFd { fd: 2, events: POLLOUT, revents: 0 };
            let (text, len) = (TEXT.as_ptr() as u64, TEXT.len() as u64);
            // SAFETY: a write only reads memory.
            unsafe { sys::transfer(&mut error_output, Direction::Write, &mut [], text, len) };
            sys::exit_group(if error == EINVAL { 2 } else { 1 });
        }
    }
    sys::exit_group(0)
}

/// Installs the handlers of this image, in the place of those among the `len` bytes from `left` on, where
/// another image lies, and of no others. Handlers, unlike ignored signals, do not survive the execve of a
/// program that is run later.
pub fn handle_signals(left: usize, len: usize) {
    let ignore = arch::ignore_signal as *const () as usize;
    handle_signal(left, len, SIGPIPE, ignore, arch::SA_RESTORER);
    handle_interrupt(left, len, INTERRUPT_SIGNAL);
    handle_interrupt(left, len, SOURCE_SIGNAL);
}

/// The same of a signal that interrupts calls.
pub fn handle_interrupt(left: usize, len: usize, signal: u32) {
    let interrupt = ring::interrupt as *const () as usize;
    handle_signal(left, len, signal as usize, interrupt, arch::SA_INTERRUPT);
}

/// Installs the handler of SIGPIPE where there is none, also where it is ignored: a child would inherit
/// that.
pub fn handle_broken_pipes() {
    let ignore = arch::ignore_signal as *const () as usize;
    handle_signal(0, NO_HANDLERS, SIGPIPE, ignore, arch::SA_RESTORER);
}

/// Installs a handler, unless the one so far is not among the `len` bytes from `left` on.
#[inline(never)]
fn handle_signal(left: usize, len: usize, signal: usize, handler: usize, flags: u64) {
    let mut action = SigAction { handler: SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: the handlers are functions of this image that the kernel can call with such flags.
    unsafe {
        sys::sigaction(signal, ptr::null(), &mut action);
        if action.handler.wrapping_sub(left) < len {
            action.handler = handler;
            action.flags = flags;
            action.restorer = arch::restore_signal as *const () as usize;
            action.mask = 0;
            sys::sigaction(signal, &action, ptr::null_mut());
        }
    }
}

/// A listening socket at `path`, and a descriptor of its file.
///
/// # Safety
///
/// `path` is a string that ends with a zero.
unsafe fn bind(path: *const u8) -> Option<Result<(i32, u32), i64>> {
    let mut address = SockAddr { family: AF_UNIX, path: [MaybeUninit::uninit(); 108] };
    for (at, to) in address.path.iter_mut().enumerate() {
        // SAFETY: every byte before this one was not the final zero.
        let byte = unsafe { path.add(at).read() };
        to.write(byte);
        if byte == 0 {
            if at == 0 {
                // It would be an abstract address, which has no permissions.
                break;
            }
            let listen = sys::listen(&address, size_of::<u16>() + at + 1);
            // SAFETY: it is a string that ends with a zero.
            let file = unsafe { sys::open_path(path) };
            // Without it, as in a full table, all is as well.
            return Some(listen.map(|listen| (listen, (file + 1).max(0) as u32)));
        }
    }
    Some(Err(EINVAL))
}

/// The listening socket that was passed on descriptor 3, if LISTEN_FDS says that there is one and
/// LISTEN_PID does not name somebody else.
///
/// # Safety
///
/// `environment` is an array of strings that ends with a null.
unsafe fn passed(environment: *const *const u8) -> Option<Result<(i32, u32), i64>> {
    // SAFETY: the caller's promise.
    let (count, pid) =
        unsafe { (variable(environment, b"LISTEN_FDS="), variable(environment, b"LISTEN_PID=")) };
    if count.unwrap_or(0) == 0 || pid.is_some_and(|pid| pid != sys::getpid() as u32) {
        return None;
    }
    // Neither inherited by a program that is run, nor waited on for a client that has gone again.
    sys::fcntl(LISTEN_FDS_START, F_SETFD, FD_CLOEXEC);
    sys::fcntl(LISTEN_FDS_START, F_SETFL, SOCK_NONBLOCK);
    Some(if sys::listens(LISTEN_FDS_START) { Ok((LISTEN_FDS_START, 0)) } else { Err(EINVAL) })
}

/// The number in the variable whose entry starts with `name`, if there is one.
///
/// # Safety
///
/// `environment` is an array of strings that ends with a null.
unsafe fn variable(mut environment: *const *const u8, name: &[u8; 11]) -> Option<u32> {
    'entries: loop {
        // SAFETY: the array's end has not been passed: its null ends the loop.
        let mut at = unsafe { environment.read() };
        if at.is_null() {
            return None;
        }
        environment = environment.wrapping_add(1);
        for byte in name {
            // SAFETY: all bytes before this one were equal to those of `name`, so none was the
            // final zero.
            if unsafe { at.read() } != *byte {
                continue 'entries;
            }
            at = at.wrapping_add(1);
        }
        let mut number = 0u32;
        loop {
            // SAFETY: all bytes before this one were digits or of `name`.
            let digit = unsafe { at.read() }.wrapping_sub(b'0');
            if digit > 9 {
                return Some(number);
            }
            number = number.wrapping_mul(10).wrapping_add(u32::from(digit));
            at = at.wrapping_add(1);
        }
    }
}
