//! The link to a process: the connection that carries calls, over a stream and through shared memory.

mod connection;
mod copy;
mod polling;
mod shared;
mod steps;

pub(crate) use connection::{
    Bell, DataSocket, FdTransfer, HealthChecks, Inbox, Interrupts, LinkHistory, Permit, Quiesce,
    Socket, Successor, WeakConnection, WhenBusy, take,
};
pub use connection::{Connection, Interrupter, Receipt};
pub use polling::Polling;
pub use shared::Shared;
pub(crate) use shared::{Prepared, SHARED_SIZE};
pub(crate) use steps::to_the_end;
