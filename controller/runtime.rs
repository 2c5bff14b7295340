//! What the library needs of the tokio runtime around it: tasks, I/O and timers.
//!
//! tokio panics where one of them is missing, in the middle of whatever needs it first. So it is looked at
//! where a process is started or attached to. It can't be asked: what panics is tried, and the panic is
//! caught. (A program that aborts on panics ends there, with tokio's message.)

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::panic::catch_unwind;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Builder, Handle, Id, Runtime};

use crate::error::{Error, Result};

const ADVICE: &str = "farcall needs a tokio runtime with I/O and timers around it (Builder::enable_all, or \
     enable_io and enable_time); without one there is farcall::blocking";

thread_local! {
    /// The runtime that was looked at last, and has all of it.
    static GOOD: Cell<Option<Id>> = const { Cell::new(None) };
}

/// A runtime for a thread of the library's own.
pub(crate) fn build() -> io::Result<Runtime> {
    // Where the last of the descriptors that it takes is not free, tokio panics.
    const NEEDED: usize = 10;
    let null = File::open("/dev/null")?;
    drop((1..NEEDED).map(|_| null.try_clone()).collect::<io::Result<Vec<File>>>()?);
    drop(null);
    Builder::new_current_thread().enable_all().build()
}

/// The runtime around this.
///
/// # Errors
///
/// [`Error::Misuse`] if there is none, or a part of it is missing.
pub(crate) fn check() -> Result<Handle> {
    let missing = |what| Err(Error::misuse(what, ADVICE));
    let Ok(runtime) = Handle::try_current() else {
        return missing("a call outside of a tokio runtime");
    };
    if GOOD.get() == Some(runtime.id()) {
        return Ok(runtime);
    }
    if catch_unwind(|| drop(tokio::time::sleep(Duration::ZERO))).is_err() {
        return missing("a tokio runtime without timers");
    }
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    // Where no descriptor is free, whatever comes next says so.
    let Ok(probe) = EventFd::from_value_and_flags(0, flags) else { return Ok(runtime) };
    let register = move || {
        // SAFETY: the descriptor is owned by what is registered.
        drop(unsafe { AsyncFd::register_with_interest(probe, Interest::READABLE) });
    };
    if catch_unwind(register).is_err() {
        return missing("a tokio runtime without I/O");
    }
    GOOD.set(Some(runtime.id()));
    Ok(runtime)
}

/// Waits on this thread. Panics where blocking would stop a runtime: on a thread that executes its tasks.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    // tokio knows whether this thread may block, and panics if not.
    drop(tokio::sync::Mutex::const_new(()).blocking_lock());
    pollster::block_on(future)
}
