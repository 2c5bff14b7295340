//! Descriptors between this process and a target process: SCM_RIGHTS over the connection's data
//! socket (unix(7), cmsg(3)).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use syscalls::Sysno;

use super::registry::Keeping;
use super::{Buffer, Task, last};
use crate::abi::wire::Operation;
use crate::calls::handle::{Fd, FdTable};
use crate::descriptor::FIRST;
use crate::error::{Error, Outcome, Result};
use crate::link::{Connection, DataSocket, Receipt};
use crate::proto::batch::{Arg, Batch, Part, Places};
use crate::proto::{Call, Reply};

/// The most descriptors that one message of farcall's carries.
const MAX_RIGHTS: usize = 16;

/// `struct msghdr`, one `struct iovec`, a control message with descriptors and one byte of data, as a piece
/// of a batch's input.
pub(crate) struct Message;

impl Message {
    /// Where the first descriptor of a message lies.
    pub(crate) const FDS: usize = Self::CONTROL + Self::HEADER;
    /// Bytes of a message.
    pub(crate) const SIZE: usize = (Self::DATA + 1).next_multiple_of(8);
    const IOV: usize = 56;
    const CONTROL: usize = Self::IOV + 16;
    /// The header of a control message.
    const HEADER: usize = 16;
    const DATA: usize = Self::CONTROL + Self::HEADER + 4 * MAX_RIGHTS;
    /// Where `msg_controllen` and `msg_flags` lie.
    const CONTROL_LEN: usize = 40;
    const FLAGS: usize = 48;

    /// A message with this control message, of `control_len` bytes.
    fn add(batch: &mut Batch, control_len: u64, header: [u64; 2], fds: &[u8]) -> Arg {
        let mut bytes = vec![0; Self::SIZE];
        let mut put = |at: usize, word: u64| bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        // msg_iovlen, and iov_len.
        put(24, 1);
        put(Self::IOV + 8, 1);
        put(Self::CONTROL_LEN, control_len);
        put(Self::CONTROL, header[0]);
        put(Self::CONTROL + 8, header[1]);
        bytes[Self::FDS..Self::FDS + fds.len()].copy_from_slice(fds);
        let message = batch.input(&bytes);
        // msg_iov, msg_control, and iov_base.
        let places = [(16, Self::IOV), (32, Self::CONTROL), (Self::IOV, Self::DATA)];
        for (at, to) in places {
            batch.point(message.offset(at), message.offset(to));
        }
        message
    }

    fn control_len(count: usize) -> u64 {
        (Self::HEADER + 4 * count).next_multiple_of(8) as u64
    }

    /// Adds a message that sends these descriptors.
    pub(crate) fn sending(batch: &mut Batch, fds: &[i32]) -> Arg {
        let kind = nix::libc::SOL_SOCKET as u64 | (nix::libc::SCM_RIGHTS as u64) << 32;
        let header = [(Self::HEADER + 4 * fds.len()) as u64, kind];
        let numbers: Vec<u8> = fds.iter().flat_map(|fd| fd.to_le_bytes()).collect();
        Self::add(batch, Self::control_len(fds.len()), header, &numbers)
    }

    /// Adds a message that receives up to `count` descriptors. Where none comes, -1 stays.
    pub(crate) fn receiving(batch: &mut Batch, count: usize) -> Arg {
        Self::add(batch, Self::control_len(count), [0; 2], &[0xff; 4 * MAX_RIGHTS])
    }

    /// The descriptors in a message that was received, and whether some were lost.
    fn received(bytes: &[u8]) -> (Vec<i32>, bool) {
        let word = |at: usize| {
            bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
        };
        let lost = word(Self::FLAGS) & nix::libc::MSG_CTRUNC as u64 != 0;
        let size =
            if word(Self::CONTROL_LEN) < Self::HEADER as u64 { 0 } else { word(Self::CONTROL) };
        let start = Self::FDS;
        let end = (Self::CONTROL + size.min(1 << 16) as usize).clamp(start, Self::DATA);
        let fds = bytes.get(start..end).unwrap_or_default().as_chunks::<4>().0;
        (fds.iter().map(|fd| i32::from_le_bytes(*fd)).collect(), lost)
    }
}

impl DataSocket {
    /// A duplicate, in this process, of descriptor `number` of the target.
    pub(crate) fn fetch(
        &self,
        connection: &Connection,
        buffer: Buffer,
        number: i32,
    ) -> Receipt<OwnedFd> {
        let mut batch = Batch::default();
        let message = Message::sending(&mut batch, &[number]);
        let sent = self.sendmsg(&mut batch, message, MsgFlags::empty());
        // Servers of version 0 know no links.
        batch.unlink(sent);
        let Part { calls, steps } = batch.whole(Places { memory: buffer.address(), slot: 0 });
        connection.submit_passing(calls, self, &[], move |replies, inbox| {
            let _buffer = buffer;
            let sent = steps.in_order(replies).and_then(|replies| steps.value(&replies, 0));
            match sent {
                // The socket was at its end already.
                Err(Error::Call { errno: Errno::EPIPE | Errno::ECONNRESET, .. }) => {
                    Err(Error::Lost(Outcome::NotExecuted))
                }
                sent => sent.and_then(|_| inbox.take()),
            }
        })
    }

    /// How large a buffer a fetch needs.
    pub(crate) const FETCH_SIZE: usize = Message::SIZE;
}

impl Task {
    /// Passes descriptors of this process to the target process, where they get numbers of their
    /// own, closed on exec.
    ///
    /// # Errors
    ///
    /// EMFILE if they do not all fit into its table: none is left there then.
    pub async fn send_fds(&self, fds: &[BorrowedFd<'_>]) -> Result<Vec<Fd>> {
        self.send_fds_as(fds, None, made).await
    }

    /// The same for descriptors that have these names from the instant on at which they arrive.
    pub(crate) async fn send_named_fds(
        &self,
        fds: &[BorrowedFd<'_>],
        names: &[String],
    ) -> Result<Vec<Fd>> {
        let keeping = Keeping::new(self, fds, names).await?;
        let sent = self.send_fds_as(fds, Some(keeping), made).await;
        if sent.is_err() {
            // Names that were given up are free when calls are made that come behind that.
            let _ = self.getpid().await;
        }
        sent
    }

    /// Passes descriptors to be a server's own.
    pub(crate) async fn send_server_fds(&self, fds: &[BorrowedFd<'_>]) -> Result<Vec<i32>> {
        let sent = self.send_fds_as(fds, None, |table, numbers| {
            table.reserve(numbers.iter().copied());
            Ok(numbers)
        });
        let mut numbers = sent.await?;
        for number in &mut numbers {
            *number = self.off_standard_streams(*number).await?;
        }
        Ok(numbers)
    }

    /// A descriptor of a server's that has just come, or in the place of a standard stream's number, which
    /// was closed, another number of the same.
    async fn off_standard_streams(&self, number: i32) -> Result<i32> {
        if number >= FIRST {
            return Ok(number);
        }
        let table = self.table();
        let dup = duplicate(number);
        let made = self.connection.submit(vec![dup], move |replies| {
            let other = last(&replies)?.value().map_err(Error::call("fcntl"));
            // Where there is no room, it stays where it is.
            let Ok(other) = other else { return Ok(number) };
            table.reserve([other as i32]);
            table.close_later([number]);
            Ok(other as i32)
        });
        made.await
    }

    async fn send_fds_as<R: Send + 'static>(
        &self,
        fds: &[BorrowedFd<'_>],
        keeping: Option<Keeping>,
        own: impl FnOnce(&Arc<FdTable>, Vec<i32>) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        if fds.is_empty() || fds.len() > MAX_RIGHTS {
            return Err(Error::Call { call: "sendmsg", errno: Errno::EINVAL });
        }
        self.need_data().await?;
        let count = fds.len();
        let mut batch = Batch::default();
        let message = Message::receiving(&mut batch, count);
        let slot = keeping.as_ref().map_or(0, |keeping| {
            keeping.prepare(&mut batch, message.offset(Message::FDS));
            keeping.slots.first
        });
        let buffer = self.buffer(batch.size()).await?;
        let table = self.table();
        let receipt = {
            // The order of messages is the order of the calls that take them.
            let data = self.ends.data();
            let data = data.as_ref().ok_or(Error::Gone)?;
            // Whether or not there are names for what it brings: else the next one would take that.
            let received = data.recvmsg(&mut batch, message);
            let len = Arg::from(Message::SIZE as u64);
            let copied = batch.operation(Operation::CopyOut, [message, len]);
            batch.unlink(received);
            batch.unlink(copied);
            let Part { calls, steps } = batch.whole(Places { memory: buffer.address(), slot });
            let connection = self.connection.clone();
            self.connection.submit_passing(calls, data, fds, move |replies, _| {
                let _buffer = buffer;
                let replies = steps.in_order(replies)?;
                let kept = steps.failed(&replies, 0..received).map_or(Ok(()), Err);
                let (numbers, lost) = taken(&replies[received..])?;
                if lost || numbers.len() != count || kept.is_err() {
                    table.close_later(numbers);
                    if let Some(keeping) = keeping {
                        keeping.give_up(&connection);
                    }
                    kept?;
                    return Err(Error::Call { call: "recvmsg", errno: Errno::EMFILE });
                }
                if let Some(keeping) = &keeping {
                    let named = numbers.iter().zip(&keeping.tags);
                    named.for_each(|(number, tag)| table.name(*number, *tag));
                }
                own(&table, numbers)
            })
        };
        receipt.await
    }

    /// A duplicate, in this process, of a descriptor of the target process.
    ///
    /// # Errors
    ///
    /// EMFILE here or EBADF there, as in sendmsg(2) and recvmsg(2).
    pub async fn fetch_fd(&self, fd: &Fd) -> Result<OwnedFd> {
        self.fetch_number(self.number(fd)? as i32).await
    }

    pub(crate) async fn fetch_number(&self, number: i32) -> Result<OwnedFd> {
        self.need_data().await?;
        let buffer = self.buffer(DataSocket::FETCH_SIZE).await?;
        let receipt = {
            let data = self.ends.data();
            let data = data.as_ref().ok_or(Error::Gone)?;
            data.fetch(&self.connection, buffer, number)
        };
        receipt.await
    }
}

/// The call that duplicates a descriptor to a number that is no standard stream's.
pub(crate) fn duplicate(number: i32) -> Call {
    let command = nix::libc::F_DUPFD_CLOEXEC as u64;
    Call::syscall(Sysno::fcntl, [number as u64, command, FIRST as u64, 0, 0, 0])
}

/// Handles to descriptors that have come.
#[expect(clippy::unnecessary_wraps, reason = "what else becomes of them may fail")]
fn made(table: &Arc<FdTable>, numbers: Vec<i32>) -> Result<Vec<Fd>> {
    Ok(numbers.into_iter().map(|number| table.made(number)).collect())
}

/// The error of a look at a descriptor that was to come, or of one that was not reached for that. In a
/// full table none has come, and a number that is none is in its place.
pub(crate) fn unreceived(error: Error) -> Error {
    match error {
        Error::Call { call: "fcntl", errno: Errno::EBADF | Errno::ECANCELED } => {
            Error::Call { call: "recvmsg", errno: Errno::EMFILE }
        }
        error => error,
    }
}

/// What a target process has received: the last of these replies is a message.
pub(super) fn taken(replies: &[Reply]) -> Result<(Vec<i32>, bool)> {
    let message = last(replies)?;
    let names = ["COPY_OUT", "recvmsg"];
    for (reply, name) in replies.iter().rev().zip(names).rev() {
        reply.value().map_err(Error::call(name))?;
    }
    Ok(Message::received(&message.data))
}
