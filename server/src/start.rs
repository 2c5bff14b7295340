//! The image as an executable: what it finds on its stack decides what it serves.
//!
//! - Without anything: requests on descriptor 0, results on descriptor 1; exit(0) at the end.
//! - With a path as its argument: persistent on a socket that it binds there.
//! - With LISTEN_FDS in the environment (systemd's convention): persistent on descriptor 3.

use crate::arch;
use crate::serve;
use crate::sys::{self, AF_UNIX, EINVAL, SO_ACCEPTCONN, SigAction};

const SIGPIPE: usize = 13;
const SIGCHLD: usize = 17;
/// The first descriptor that LISTEN_FDS counts.
const LISTEN_FDS_START: i32 = 3;
/// Room for a path in an address of unix(7), its final zero included.
const PATH_MAX: usize = 108;

/// Called by the architecture's entry with the stack as `execve` left it.
///
/// # Safety
///
/// `stack` points to argc, followed by the arguments, a null, the environment, a null.
pub unsafe extern "C" fn start(stack: *const usize) -> ! {
    // Handlers, unlike ignored signals, do not survive the execve of a program that is run later.
    let handler = SigAction {
        handler: arch::ignore_signal as *const () as usize,
        flags: arch::SA_RESTORER,
        restorer: arch::restore_signal as *const () as usize,
        mask: 0,
    };
    sys::sigaction(SIGPIPE, &handler);
    // Inherited as ignored, it would lose the children's exit statuses.
    sys::sigaction(SIGCHLD, &SigAction { handler: 0, flags: 0, restorer: 0, mask: 0 });

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
        None => serve::run(0, 1, -1),
        Some(Ok(listen)) => serve::run(-1, -1, listen),
        Some(Err(error)) => {
            const TEXT: &[u8] =
                b"farcall: cannot listen: path in use or too long, or fd 3 no listener\n";
            sys::write(2, TEXT.as_ptr() as u64, TEXT.len());
            sys::exit_group(if error == EINVAL { 2 } else { 1 });
        }
    }
    sys::exit_group(0)
}

/// A listening socket at `path`.
///
/// # Safety
///
/// `path` is a string that ends with a zero.
unsafe fn bind(path: *const u8) -> Option<Result<i32, i64>> {
    let mut address = [0u8; 2 + PATH_MAX];
    let [low, high, room @ ..] = &mut address;
    [*low, *high] = AF_UNIX.to_le_bytes();
    let mut len = 2;
    for to in room {
        // SAFETY: every byte before this one was not the final zero.
        *to = unsafe { path.add(len - 2).read() };
        len += 1;
        if *to == 0 {
            return Some(sys::listen(&address, len));
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
unsafe fn passed(mut environment: *const *const u8) -> Option<Result<i32, i64>> {
    let mut here = false;
    let mut ours = true;
    loop {
        // SAFETY: the array's end has not been passed: its null ends the loop.
        let entry = unsafe { environment.read() };
        if entry.is_null() {
            break;
        }
        environment = environment.wrapping_add(1);
        // SAFETY: `entry` is a string.
        unsafe {
            if let Some(count) = number_after(entry, b"LISTEN_FDS=") {
                here = count > 0;
            }
            if let Some(pid) = number_after(entry, b"LISTEN_PID=") {
                ours = pid == sys::getpid() as u32;
            }
        }
    }
    if !here || !ours {
        return None;
    }
    let mut listens = 0i32;
    sys::getsockopt(LISTEN_FDS_START, SO_ACCEPTCONN, &mut listens);
    Some(if listens != 0 { Ok(LISTEN_FDS_START) } else { Err(EINVAL) })
}

/// The number that follows `name` in `entry`, if it starts with that.
///
/// # Safety
///
/// `entry` is a string that ends with a zero.
unsafe fn number_after(entry: *const u8, name: &[u8]) -> Option<u32> {
    let mut at = entry;
    for byte in name {
        // SAFETY: all bytes before this one were equal to those of `name`, so none was the zero.
        if unsafe { at.read() } != *byte {
            return None;
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
