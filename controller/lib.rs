//! farcall runs Linux system calls in other processes, and in processes that outlive their
//! controller.
//!
//! A *server*, three pages of position-independent code without libc, sits in a process and executes the
//! requests that arrive on a stream or, on the same machine, in shared memory. This library is the
//! *controller*: it starts servers, makes calls in them, and can leave them behind as *persistent
//! processes* for the next controller.
//!
//! ```
//! use farcall::Local;
//! use nix::fcntl::OFlag;
//! use nix::sys::stat::Mode;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> farcall::Result<()> {
//! // A root server, from which all other processes are made, and a child of it.
//! let root = Local::new().start().await?;
//! let child = root.child().spawn().await?;
//!
//! // Calls are methods. Handles know whose they are, and close what they own.
//! let file = child.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await?;
//! assert_eq!(child.read(&file, 16).await?.len(), 16);
//! assert_eq!(child.getppid().await?, root.getpid().await?);
//! # Ok(())
//! # }
//! ```
//!
//! Calls can be awaited, sent together as a [`chain`](calls::chain), made on threads that wait for them
//! ([`blocking`]), interrupted, and have deadlines ([`Task::syscall_within`](calls::Task::syscall_within)).
//! A process that is called often comes to share memory with the controller, through which calls are
//! several times faster than over a stream: see [`Process::enter_ring`].
//!
//! Everything runs on the tokio runtime on which it was started, which has I/O and timers
//! (`enable_all`, or `enable_io` and `enable_time`: what is missing is [`Error::Misuse`]), and dies with
//! the controller unless it is persistent. A future that is dropped takes nothing back: its call is made all the
//! same, and what the call opens or maps is given back. ([`ChildBuilder::spawn`] is an exception.)
//!
//! The end of a process ends all that waits for it. One that is stopped, or blocked in a call, is waited for
//! as long as that is so; who wants to wait no longer puts `tokio::time::timeout` around any of it, and goes
//! on with the same process and connection. [`attach`](persist::attach) and [`Process::reconnect`] have an
//! end of their own.
//!
//! # Where things are
//!
//! From what programs use down to what lies below it:
//!
//! | module | what it has |
//! |---|---|
//! | [`host`] | where servers are started: [`Local`], this machine |
//! | [`persist`] | persistent processes: [`attach`](persist::attach), [`Home`](persist::Home), reconnecting |
//! | [`process`] | [`Process`], [`Child`], [`ChildBuilder`]: clone, exec, wait; beside it [`blocking`], for programs without a runtime |
//! | [`calls`] | the typed calls, as methods of [`Task`](calls::Task), to which a [`Process`] dereferences; [`chain`](calls::chain): calls that are sent together, later ones with the results of earlier ones; [`handle`](calls::handle): [`Fd`], [`FdTable`] and [`Mapping`], resources of another process |
//! | [`link`] | [`Connection`](link::Connection): batches of calls on their way, [`Interrupter`](link::Interrupter), [`Polling`](link::Polling) |
//! | [`proto`] | the protocols of the stream and of the ring, without I/O: [`Call`](proto::Call), [`Reply`](proto::Reply) |
//! | [`image`] | the server image that this build carries |
//! | [`error`] | [`Error`] and [`Outcome`] |
//! | [`abi`] | types and numbers that both sides agree on |
//!
//! Each uses those below it, and no other; `tests/layers.rs` sees to that.

// A future that is not Send can neither be spawned nor given to `blocking::wait`.
#![deny(clippy::future_not_send)]

pub mod abi;
pub mod blocking;
pub mod calls;
mod descriptor;
pub mod error;
#[doc(hidden)]
pub mod fault;
pub mod host;
pub mod image;
pub mod link;
pub mod persist;
pub mod process;
pub mod proto;
mod runtime;

pub use calls::handle::{Fd, FdTable, Mapping};
pub use error::{Error, Outcome, Result};
pub use host::local::Local;
pub use process::{Child, ChildBuilder, Process};

/// The examples in documents are tests as well.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/calls.md")]
    struct Calls;
    #[doc = include_str!("../docs/persistent.md")]
    struct Persistent;
    #[doc = include_str!("../docs/systemd.md")]
    struct Systemd;
}
