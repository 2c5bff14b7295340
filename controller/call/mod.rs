//! Calls: what can be asked of a server, what comes back, and the connection that carries both.

mod connection;
mod error;

pub(crate) use connection::WeakConnection;
pub use connection::{Connection, Receipt};
pub use error::{Error, Outcome, Result, errno_name};

use crate::abi::wire::{MAX_ERRNO, Operation, Request};
use nix::errno::Errno;

/// One call on its way to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What travels first.
    pub request: Request,
    /// The bytes that follow it: COPY_IN's.
    pub payload: Vec<u8>,
}

impl Call {
    /// A system call.
    #[must_use]
    pub fn syscall(number: syscalls::Sysno, args: [u64; 6]) -> Self {
        // Numbers of system calls are small and positive.
        Self { request: Request::syscall(number.id() as u32, args), payload: Vec::new() }
    }

    /// An operation of the server.
    #[must_use]
    pub fn operation(operation: Operation, args: [u64; 6]) -> Self {
        Self { request: Request::operation(operation, args), payload: Vec::new() }
    }

    /// Bytes into the memory of the target process.
    #[must_use]
    pub fn copy_in(address: u64, bytes: Vec<u8>) -> Self {
        let args = [address, bytes.len() as u64, 0, 0, 0, 0];
        Self { request: Request::operation(Operation::CopyIn, args), payload: bytes }
    }

    /// Bytes out of the memory of the target process.
    #[must_use]
    pub fn copy_out(address: u64, len: usize) -> Self {
        Self::operation(Operation::CopyOut, [address, len as u64, 0, 0, 0, 0])
    }

    /// How many bytes follow the result, if it is a success.
    pub(crate) fn data_len(&self) -> Option<u64> {
        let copy_out = Request::operation(Operation::CopyOut, [0; 6]).word;
        (self.request.word == copy_out).then_some(self.request.args[1])
    }
}

/// What a server answered to one call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// As the kernel returns it: `-4095..=-1` is a negated errno.
    pub result: i64,
    /// COPY_OUT's bytes, as far as they are real.
    pub data: Vec<u8>,
}

impl Reply {
    /// The result, or the errno.
    ///
    /// # Errors
    ///
    /// The errno with which the kernel refused the call.
    pub fn value(&self) -> std::result::Result<u64, Errno> {
        if (-MAX_ERRNO..0).contains(&self.result) {
            // In range: it was just compared.
            return Err(Errno::from_raw(-self.result as i32));
        }
        Ok(self.result.cast_unsigned())
    }
}
