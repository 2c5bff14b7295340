//! For programs without a runtime: one thread of the library's own carries the connections, and
//! the program's threads wait.
//!
//! ```
//! use farcall::calls::Sysno;
//! use farcall::{Local, blocking};
//!
//! # fn main() -> farcall::Result<()> {
//! let root = blocking::wait(Local::new().start())?;
//! // Steps that belong together wait once.
//! let worker = root.clone();
//! let child = blocking::wait(async move { worker.child().spawn().await })?;
//! // Single calls wait here, without the detour through the other thread.
//! let pid = child.syscall_blocking(Sysno::getpid, [0; 6])?;
//! assert_eq!(child.pid(), Some(pid as i32));
//! # Ok(())
//! # }
//! ```

use std::future::Future;
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use tokio::runtime::Handle;

use crate::error::{Error, Result};
use crate::runtime;

/// Waits on this thread for what `steps` come to, which run on the library's own. What they start
/// there (processes, connections) goes on there.
///
/// # Errors
///
/// Those of the steps; and where no thread can be started.
///
/// # Panics
///
/// When the steps do; and on a thread that executes a runtime's tasks, which must not be blocked.
pub fn wait<T: Send + 'static>(
    steps: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let (done, result) = oneshot::async_channel();
    own_runtime()?.spawn(async move {
        let _ = done.send(steps.await);
    });
    // The sender is dropped without a word when the steps panic.
    runtime::block_on(result).expect("the steps came to an end")
}

/// The runtime of the library's own thread, which lives as long as the process.
fn own_runtime() -> Result<&'static Handle> {
    static RUNTIME: OnceLock<Handle> = OnceLock::new();
    static STARTING: Mutex<()> = Mutex::new(());
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    // One that fails, because no descriptor or thread is to be had, is tried again by the next.
    let _turn = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let start = || -> io::Result<Handle> {
        let runtime = runtime::build()?;
        let handle = runtime.handle().clone();
        let carry = move || runtime.block_on(std::future::pending::<()>());
        thread::Builder::new().name("farcall".into()).spawn(carry)?;
        Ok(handle)
    };
    let handle = start().map_err(Error::io("starting a runtime and its thread"))?;
    Ok(RUNTIME.get_or_init(|| handle))
}
