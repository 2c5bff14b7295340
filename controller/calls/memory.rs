//! Memory: mmap(2), and bytes into and out of the target process.

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags};
use syscalls::Sysno;

use super::{Buffer, Task, last};
use crate::calls::handle::{Fd, GUARD, Mapping, Stack};
use crate::error::{Error, Result};
use crate::link::Permit;
use crate::proto::Call;
use crate::proto::stream::MAX_DATA;

impl Task {
    /// Maps pages into the target process: mmap(2). `size` and `offset` are bytes; without a
    /// descriptor the pages are anonymous. The address is the kernel's choice.
    ///
    /// # Errors
    ///
    /// The errno of mmap(2).
    pub async fn mmap(
        &self,
        size: usize,
        protection: ProtFlags,
        flags: MapFlags,
        file: Option<(&Fd, u64)>,
    ) -> Result<Mapping> {
        self.connection.ready().await;
        self.map(size, protection, flags, file, None).await
    }

    /// The same without waiting for room, with `permit` in use until the pages are there.
    async fn map(
        &self,
        size: usize,
        protection: ProtFlags,
        flags: MapFlags,
        file: Option<(&Fd, u64)>,
        permit: Option<Permit>,
    ) -> Result<Mapping> {
        let (fd, offset, flags) = match file {
            Some((fd, offset)) => (self.number(fd)?, offset, flags),
            None => (u64::MAX, 0, flags | MapFlags::MAP_ANONYMOUS),
        };
        // Flags are small and positive.
        let args = [0, size as u64, protection.bits() as u64, flags.bits() as u64, fd, offset];
        let space = self.space.clone();
        self.connection
            .submit(vec![Call::syscall(Sysno::mmap, args)], move |replies| {
                let _permit = permit;
                let address = last(&replies)?.value().map_err(Error::call("mmap"))?;
                Ok(Mapping::new(&space, address, size))
            })
            .await
    }

    /// Private pages, readable and writable, filled with zeros. Does not wait for room; `permit` is
    /// in use until they are there.
    pub(crate) async fn mmap_anonymous(
        &self,
        size: usize,
        permit: Option<Permit>,
    ) -> Result<Mapping> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        self.map(size.max(1), protection, MapFlags::MAP_PRIVATE, None, permit).await
    }

    /// A stack for a child: one that an earlier child has left, or a new one.
    pub(crate) async fn stack(&self) -> Result<Stack> {
        if let Some(stack) = self.space.take_stack() {
            return Ok(stack);
        }
        let mapping = self.mmap_anonymous(Stack::MAPPED, None).await;
        let mapping = mapping.map_err(Error::of_preparation)?;
        let none = ProtFlags::PROT_NONE.bits() as u64;
        let guard = [mapping.address(), GUARD as u64, none, 0, 0, 0];
        self.syscall(Sysno::mprotect, guard).await.map_err(Error::of_preparation)?;
        Ok(Stack::new(mapping))
    }

    /// Copies `bytes` to `address` in the target process. Nothing faults there: what can't be
    /// written is an error here.
    ///
    /// # Errors
    ///
    /// [`Error::Fault`]; some of the bytes may have been written then.
    pub async fn write_memory(&self, address: u64, bytes: impl Into<Vec<u8>>) -> Result<()> {
        // Before the bytes are copied: it is they that take room.
        self.connection.ready().await;
        let mut bytes = bytes.into();
        let len = bytes.len();
        if self.is_bulk(address, len) {
            match self.bulk_in(address, bytes).await? {
                Ok(()) => return Ok(()),
                Err(back) => bytes = back,
            }
        }
        self.connection
            .submit(vec![Call::copy_in(address, bytes)], move |replies| {
                last(&replies)?.value().map_err(|_| Error::Fault { address, len })?;
                Ok(())
            })
            .await
    }

    /// Copies `len` bytes from `address` in the target process.
    ///
    /// # Errors
    ///
    /// [`Error::Fault`] if not all of them can be read; EINVAL for more than 2 GiB.
    pub async fn read_memory(&self, address: u64, len: usize) -> Result<Vec<u8>> {
        self.connection.ready().await;
        self.copy_out_then(address, len, ()).await
    }

    /// Copies out, and gives `buffer` up only when that is done.
    pub(super) async fn copy_out_then<B: Send + 'static>(
        &self,
        address: u64,
        len: usize,
        buffer: B,
    ) -> Result<Vec<u8>> {
        if len as u64 > MAX_DATA {
            // The stream takes a server that sends as much for one that is out of step.
            return Err(Error::Call { call: "COPY_OUT", errno: Errno::EINVAL });
        }
        if self.is_bulk(address, len)
            && let Some(bytes) = self.bulk_out(address, len).await?
        {
            return Ok(bytes);
        }
        self.connection
            .submit(vec![Call::copy_out(address, len)], move |mut replies| {
                let _buffer = buffer;
                let reply = replies.pop().ok_or(Error::Protocol("no reply"))?;
                reply.value().map_err(Error::call("COPY_OUT"))?;
                if reply.data.len() < len {
                    return Err(Error::Fault { address, len });
                }
                Ok(reply.data)
            })
            .await
    }

    /// Makes a call that fills a buffer of `len` bytes, and returns what `then` makes of it, or
    /// the call's error: one round trip.
    pub(crate) async fn call_fills<R: Send + 'static>(
        &self,
        name: &'static str,
        len: usize,
        call: impl FnOnce(u64) -> Call,
        then: impl FnOnce(Vec<u8>) -> R + Send + 'static,
    ) -> Result<R> {
        let buffer: Buffer = self.buffer(len).await?;
        let address = buffer.address();
        self.connection
            .submit(vec![call(address), Call::copy_out(address, len)], move |mut replies| {
                let _buffer = buffer;
                let data = replies.pop().ok_or(Error::Protocol("no reply"))?.data;
                last(&replies)?.value().map_err(Error::call(name))?;
                if data.len() < len {
                    return Err(Error::Fault { address, len });
                }
                Ok(then(data))
            })
            .await
    }
}
