//! Sockets: socket(2), bind(2), listen(2), accept(2), connect(2), getsockname(2).

use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use syscalls::Sysno;

use super::address::{ADDRESS_SIZE, SocketAddress};
use super::{Task, last};
use crate::calls::handle::Fd;
use crate::error::{Error, Result};
use crate::proto::Call;

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
    pub fn bind(
        &self,
        fd: &Fd,
        address: impl Into<SocketAddress>,
    ) -> impl Future<Output = Result<()>> + Send {
        self.with_address("bind", Sysno::bind, fd, address.into())
    }

    /// Connects a socket: connect(2). A blocking socket blocks the process until it is connected.
    ///
    /// # Errors
    ///
    /// The errno of connect(2).
    pub fn connect(
        &self,
        fd: &Fd,
        address: impl Into<SocketAddress>,
    ) -> impl Future<Output = Result<()>> + Send {
        self.with_address("connect", Sysno::connect, fd, address.into())
    }

    async fn with_address(
        &self,
        name: &'static str,
        number: Sysno,
        fd: &Fd,
        address: SocketAddress,
    ) -> Result<()> {
        let fd = self.number(fd)?;
        let bytes = address.as_bytes().to_vec();
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
    pub async fn getsockname(&self, fd: &Fd) -> Result<SocketAddress> {
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
        Ok(SocketAddress::returned(bytes, u64::from(length)))
    }
}
