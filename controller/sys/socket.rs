//! Sockets: socket(2), bind(2), listen(2), accept(2), connect(2), getsockname(2).

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage};
use syscalls::Sysno;

use super::{Task, last};
use crate::call::{Call, Error, Result};
use crate::handle::Fd;

/// Room for any address: `struct sockaddr_storage`.
pub(crate) const ADDRESS_SIZE: usize = 128;

impl Task {
    /// A socket in the target process's network namespace, closed on exec: socket(2).
    ///
    /// # Errors
    ///
    /// The errno of socket(2).
    pub async fn socket(
        &self,
        family: AddressFamily,
        kind: SockType,
        flags: SockFlag,
        protocol: i32,
    ) -> Result<Fd> {
        let kind = kind as i32 | (flags | SockFlag::SOCK_CLOEXEC).bits();
        let args = [family as u64, kind as u64, protocol as u64, 0, 0, 0];
        self.opens("socket", Call::syscall(Sysno::socket, args)).await
    }

    /// Two connected sockets, closed on exec: socketpair(2).
    ///
    /// # Errors
    ///
    /// The errno of socketpair(2).
    pub async fn socketpair(
        &self,
        family: AddressFamily,
        kind: SockType,
        flags: SockFlag,
    ) -> Result<(Fd, Fd)> {
        let kind = kind as i32 | (flags | SockFlag::SOCK_CLOEXEC).bits();
        self.opens_pair("socketpair", |at| {
            Call::syscall(Sysno::socketpair, [family as u64, kind as u64, 0, at, 0, 0])
        })
        .await
    }

    /// Gives a socket an address: bind(2).
    ///
    /// # Errors
    ///
    /// The errno of bind(2).
    pub async fn bind(&self, fd: &Fd, address: &dyn SockaddrLike) -> Result<()> {
        self.with_address("bind", Sysno::bind, fd, address).await
    }

    /// Connects a socket: connect(2). A blocking socket blocks the process until it is connected.
    ///
    /// # Errors
    ///
    /// The errno of connect(2).
    pub async fn connect(&self, fd: &Fd, address: &dyn SockaddrLike) -> Result<()> {
        self.with_address("connect", Sysno::connect, fd, address).await
    }

    async fn with_address(
        &self,
        name: &'static str,
        number: Sysno,
        fd: &Fd,
        address: &dyn SockaddrLike,
    ) -> Result<()> {
        let fd = self.number(fd)?;
        let bytes = address_bytes(address);
        let len = bytes.len() as u64;
        let call = |at| Call::syscall(number, [fd, at, len, 0, 0, 0]);
        self.call_with(name, bytes, call).await.map(|_| ())
    }

    /// Lets a socket take connections, `backlog` of them waiting: listen(2).
    ///
    /// # Errors
    ///
    /// The errno of listen(2).
    pub async fn listen(&self, fd: &Fd, backlog: i32) -> Result<()> {
        let args = [self.number(fd)?, backlog as u64, 0, 0, 0, 0];
        self.syscall(Sysno::listen, args).await.map(|_| ())
    }

    /// Takes a connection, closed on exec: accept4(2). Blocks the process until there is one,
    /// unless the socket is non-blocking.
    ///
    /// # Errors
    ///
    /// The errno of accept4(2).
    pub async fn accept4(&self, fd: &Fd, flags: SockFlag) -> Result<Fd> {
        let flags = (flags | SockFlag::SOCK_CLOEXEC).bits() as u64;
        let args = [self.number(fd)?, 0, 0, flags, 0, 0];
        self.opens("accept4", Call::syscall(Sysno::accept4, args)).await
    }

    /// The address of a socket: getsockname(2).
    ///
    /// # Errors
    ///
    /// The errno of getsockname(2).
    pub async fn getsockname(&self, fd: &Fd) -> Result<SockaddrStorage> {
        let fd = self.number(fd)?;
        let buffer = self.buffer(ADDRESS_SIZE + 4).await?;
        let address = buffer.address();
        let length = address + ADDRESS_SIZE as u64;
        let calls = vec![
            Call::copy_in(length, (ADDRESS_SIZE as u32).to_le_bytes().to_vec()),
            Call::syscall(Sysno::getsockname, [fd, address, length, 0, 0, 0]),
            Call::copy_out(address, ADDRESS_SIZE + 4),
        ];
        let data = self
            .connection
            .submit(calls, move |mut replies| {
                let _buffer = buffer;
                let data = replies.pop().ok_or(Error::Protocol("no reply"))?.data;
                last(&replies)?.value().map_err(Error::call("getsockname"))?;
                Ok(data)
            })
            .await?;
        let fault = || Error::Fault { address, len: ADDRESS_SIZE };
        let (bytes, length) = data.split_first_chunk::<ADDRESS_SIZE>().ok_or_else(fault)?;
        let length = u32::from_le_bytes(*length.first_chunk().ok_or_else(fault)?);
        socket_address(bytes, u64::from(length))
    }
}

/// The bytes of an address.
pub(crate) fn address_bytes(address: &dyn SockaddrLike) -> Vec<u8> {
    // SAFETY: a SockaddrLike's pointer and length describe its own initialised bytes.
    let bytes = unsafe {
        std::slice::from_raw_parts(address.as_ptr().cast::<u8>(), address.len() as usize)
    };
    bytes.to_vec()
}

/// The address in the first `length` bytes.
pub(crate) fn socket_address(bytes: &[u8], length: u64) -> Result<SockaddrStorage> {
    let mut storage = Aligned([0; ADDRESS_SIZE]);
    let length = bytes.len().min(ADDRESS_SIZE).min(length as usize);
    storage.0[..length].copy_from_slice(&bytes[..length]);
    // SAFETY: `storage` is as large as any address, aligned, initialised, and `length` is clamped
    // to it.
    unsafe { SockaddrStorage::from_raw((&raw const storage).cast(), Some(length as u32)) }
        .ok_or(Error::Protocol("an address of an unknown family"))
}

/// Bytes with the alignment of every address.
#[repr(C, align(8))]
struct Aligned([u8; ADDRESS_SIZE]);
