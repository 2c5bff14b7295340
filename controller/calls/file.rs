//! Files: open(2), read(2), write(2), lseek(2), pipe(2), dup(2).

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::Whence;
use syscalls::Sysno;

use super::{Buffer, Task, c_string, finish, last};
use crate::abi::wire::Operation;
use crate::calls::handle::Fd;
use crate::error::{Error, Result};
use crate::proto::batch::{Arg, Batch};
use crate::proto::{Call, Reply};

/// Up to how many bytes a server of version 0 sends for a read, whatever was read.
const SMALL: usize = 16 * 1024;

/// What a relative path starts from.
const AT_FDCWD: u64 = nix::libc::AT_FDCWD as u64;

impl Task {
    /// Opens a file, as the target process sees the file system: openat(2). A relative path starts
    /// at `directory`, or at the process's working directory.
    ///
    /// The descriptor is closed on exec unless `fcntl` says otherwise: O_CLOEXEC is added.
    ///
    /// # Errors
    ///
    /// The errno of openat(2).
    pub async fn openat(
        &self,
        directory: Option<&Fd>,
        path: impl AsRef<Path>,
        flags: OFlag,
        mode: Mode,
    ) -> Result<Fd> {
        let directory = directory.map_or(Ok(AT_FDCWD), |fd| self.number(fd))?;
        let path = c_string("openat", path.as_ref().as_os_str().as_bytes())?;
        let flags = (flags | OFlag::O_CLOEXEC).bits() as u64;
        let buffer = self.buffer(path.len()).await?;
        let args = [directory, buffer.address(), flags, u64::from(mode.bits()), 0, 0];
        let calls = vec![Call::copy_in(buffer.address(), path), Call::syscall(Sysno::openat, args)];
        let table = self.table();
        self.connection
            .submit(calls, move |replies| {
                let _buffer = buffer;
                Ok(table.made(finish("openat", &replies)? as i32))
            })
            .await
    }

    /// Reads up to `len` bytes from a descriptor: read(2). An empty result is the end of the file.
    ///
    /// # Errors
    ///
    /// The errno of read(2).
    pub async fn read(&self, fd: &Fd, len: usize) -> Result<Vec<u8>> {
        let fd = self.number(fd)?;
        let buffer = self.buffer(len).await?;
        let address = buffer.address();
        let call = Call::syscall(Sysno::read, [fd, address, len as u64, 0, 0, 0]);
        // A server of version 0 knows no references: it sends all of the buffer, which is then small.
        let knows_references = self.connection.version() > 0;
        if self.is_bulk(address, len) || (!knows_references && len > SMALL) {
            return self.read_then_copy(call, address, len, buffer).await;
        }
        let permit = self.connection.acquire(len);
        let mut batch = Batch::default();
        let place = batch.output(len);
        let size = Arg::from(len as u64);
        let read = batch.syscall(Sysno::read, [fd.into(), place, size]);
        let copied = if knows_references { Arg::Result(read) } else { size };
        let copied = batch.operation(Operation::CopyOut, [place, copied]);
        if !knows_references {
            batch.unlink(copied);
        }
        let read = self.send_with(batch, buffer, 0, move |mut replies, steps| {
            let _permit = permit;
            let mut data = replies.pop().ok_or(Error::Protocol("no reply"))?.data;
            let read = steps.value(&replies, read)?;
            if (data.len() as u64) < read {
                return Err(Error::Fault { address, len });
            }
            // At most what came, which is a usize.
            data.truncate(read as usize);
            Ok(data)
        });
        read.await
    }

    /// Makes the call `read`, and then fetches what it has read: for many bytes.
    async fn read_then_copy(
        &self,
        read: Call,
        address: u64,
        len: usize,
        buffer: Buffer,
    ) -> Result<Vec<u8>> {
        let permit = self.connection.acquire(len);
        let complete = move |replies: Vec<Reply>| {
            let _permit = permit;
            Ok((buffer, last(&replies)?.value().map_err(Error::call("read"))?))
        };
        let (buffer, read) = self.connection.submit(vec![read], complete).await?;
        if read == 0 {
            return Ok(Vec::new());
        }
        // At most `len`, which is a usize. What was read is lost if it does not come.
        self.copy_out_then(address, read as usize, buffer).await.map_err(Error::in_part)
    }

    /// Writes to a descriptor, once, and returns how many bytes were taken: write(2).
    ///
    /// # Errors
    ///
    /// The errno of write(2).
    pub async fn write(&self, fd: &Fd, bytes: impl Into<Vec<u8>>) -> Result<usize> {
        let fd = self.number(fd)?;
        // Before the bytes are copied: it is they that take room.
        self.connection.ready().await;
        let bytes = bytes.into();
        let len = bytes.len() as u64;
        let call = |address| Call::syscall(Sysno::write, [fd, address, len, 0, 0, 0]);
        // At most what was given.
        self.call_with("write", bytes, call).await.map(|n| n as usize)
    }

    /// Moves a file's offset and returns the new one, in bytes: lseek(2).
    ///
    /// # Errors
    ///
    /// The errno of lseek(2).
    pub async fn lseek(&self, fd: &Fd, offset: i64, whence: Whence) -> Result<u64> {
        let args = [self.number(fd)?, offset.cast_unsigned(), whence as u64, 0, 0, 0];
        self.syscall(Sysno::lseek, args).await
    }

    /// A pipe: its reading and its writing end: pipe2(2). Both are closed on exec.
    ///
    /// # Errors
    ///
    /// The errno of pipe2(2).
    pub async fn pipe2(&self, flags: OFlag) -> Result<(Fd, Fd)> {
        let flags = (flags | OFlag::O_CLOEXEC).bits() as u64;
        self.opens_pair("pipe2", |at| Call::syscall(Sysno::pipe2, [at, flags, 0, 0, 0, 0])).await
    }

    /// A call that leaves two new descriptors in memory.
    pub(super) async fn opens_pair(
        &self,
        name: &'static str,
        call: impl FnOnce(u64) -> Call,
    ) -> Result<(Fd, Fd)> {
        let buffer = self.buffer(8).await?;
        let address = buffer.address();
        let table = self.table();
        self.connection
            .submit(vec![call(address), Call::copy_out(address, 8)], move |replies| {
                let _buffer = buffer;
                let [made, pair] = replies.as_slice() else {
                    return Err(Error::Protocol("not two replies"));
                };
                made.value().map_err(Error::call(name))?;
                let Some((first, second)) = pair.data.split_first_chunk::<4>() else {
                    return Err(Error::Fault { address, len: 8 });
                };
                let second = second.first_chunk().ok_or(Error::Fault { address, len: 8 })?;
                Ok((
                    table.made(i32::from_le_bytes(*first)),
                    table.made(i32::from_le_bytes(*second)),
                ))
            })
            .await
    }

    /// A duplicate of a descriptor at the lowest free number, closed on exec: fcntl(2)
    /// F_DUPFD_CLOEXEC.
    ///
    /// # Errors
    ///
    /// The errno of fcntl(2).
    pub async fn dup(&self, fd: &Fd) -> Result<Fd> {
        let command = nix::libc::F_DUPFD_CLOEXEC as u64;
        let args = [self.number(fd)?, command, 0, 0, 0, 0];
        self.opens("fcntl", Call::syscall(Sysno::fcntl, args)).await
    }

    /// Makes `number` a duplicate of a descriptor, closing what was there: dup2(2). It is *not*
    /// closed on exec, so this is how standard streams are set up; no handle is made for it.
    ///
    /// # Errors
    ///
    /// The errno of dup2(2); a number that a server runs on is refused.
    pub async fn dup2(&self, fd: &Fd, number: i32) -> Result<()> {
        if self.table().reserved().contains(&number) {
            return Err(Error::SERVERS_FD);
        }
        let old = self.number(fd)?;
        if old == number as u64 {
            // dup2 would leave the descriptor as it is, to be closed on exec.
            return self.syscall(Sysno::fcntl, [old, 2, 0, 0, 0, 0]).await.map(|_| ());
        }
        self.syscall(Sysno::dup3, [old, number as u64, 0, 0, 0, 0]).await.map(|_| ())
    }
}
