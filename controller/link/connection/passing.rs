//! Batches that pass descriptors (SCM_RIGHTS, unix(7)) over the data socket of their link.
//!
//! A link that is lost takes its data socket with it. What was executed before has left its message in
//! the end here, which lives as long as anybody waits for it. What was not is moved to the next link: its
//! calls name that one's socket, and what they are to receive is sent into it, in their order.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use syscalls::Sysno;

use crate::abi::wire::Word;
use crate::descriptor::off_standard_streams;
use crate::error::{Error, Outcome, Result};
use crate::proto::batch::{Arg, Batch};
use crate::proto::{Call, Reply};

/// Both ends of a link's data socket: ours, and the number of the other in the target.
pub(crate) struct DataSocket {
    here: Arc<LocalEnd>,
    pub(crate) there: i32,
}

struct LocalEnd {
    socket: OwnedFd,
    /// Somebody's message may still be in it, and nobody will take that.
    out_of_step: AtomicBool,
}

/// What has arrived of what a batch sends.
#[derive(Clone, Default)]
pub(crate) struct Inbox(Arc<Mutex<Option<Result<OwnedFd>>>>);

/// What a batch has to do with a data socket.
pub(super) struct Passing {
    /// What it is to receive, for the next link; none where there can't be one.
    fds: Option<Vec<OwnedFd>>,
    /// The number that its calls name.
    there: i32,
    /// Where its message arrives, and the place of the call that sends it, if one does.
    here: Arc<LocalEnd>,
    sends: Option<usize>,
    inbox: Inbox,
}

impl DataSocket {
    pub(crate) fn new(here: OwnedFd, there: i32) -> Self {
        let here = LocalEnd { socket: here, out_of_step: AtomicBool::new(false) };
        Self { here: Arc::new(here), there }
    }

    /// Sends descriptors of this process into the socket, for the next recvmsg to take.
    pub(crate) fn pass(&self, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send(&fds.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>())
    }

    fn send(&self, fds: &[i32]) -> Result<()> {
        let sent = sendmsg::<()>(
            self.here.socket.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(fds)],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        );
        match sent {
            Ok(_) => Ok(()),
            // It ends with the stream, of which that may not be known yet.
            Err(Errno::EPIPE | Errno::ECONNRESET) => Err(Error::Lost(Outcome::NotExecuted)),
            Err(errno) => Err(Error::local("sendmsg")(errno)),
        }
    }

    /// Adds the call that takes a message from the socket.
    pub(crate) fn recvmsg(&self, batch: &mut Batch, message: Arg) -> usize {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC.bits();
        batch.syscall(Sysno::recvmsg, [self.there.into(), message, flags.into()])
    }

    /// Adds the call that sends a message.
    pub(crate) fn sendmsg(&self, batch: &mut Batch, message: Arg, flags: MsgFlags) -> usize {
        let flags = (flags | MsgFlags::MSG_NOSIGNAL).bits();
        batch.syscall(Sysno::sendmsg, [self.there.into(), message, flags.into()])
    }
}

/// The call that takes a message, laid out at `address`, from socket `fd` of the target.
pub(crate) fn take(fd: i32, address: u64) -> Call {
    let flags = MsgFlags::MSG_CMSG_CLOEXEC.bits() as u64;
    Call::syscall(Sysno::recvmsg, [fd as u64, address, flags, 0, 0, 0])
}

impl LocalEnd {
    /// The descriptor in the next message.
    fn receive(&self) -> Result<OwnedFd> {
        if self.out_of_step.load(Ordering::Relaxed) {
            return Err(Error::Lost(Outcome::Executed));
        }
        let mut byte = [0];
        let mut space = nix::cmsg_space!([i32; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let mut iov = [IoSliceMut::new(&mut byte)];
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, Some(&mut space), flags)
            .map_err(Error::local("recvmsg"))?;
        if message.flags.contains(MsgFlags::MSG_CTRUNC) {
            // There is room for one in the message: there was none in this process's table.
            return Err(Error::local("recvmsg")(Errno::EMFILE));
        }
        let mut fd = None;
        for control in message.cmsgs().map_err(Error::local("recvmsg"))? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                for raw in fds {
                    // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
                    fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
                }
            }
        }
        let fd = fd.ok_or_else(|| Error::local("recvmsg")(Errno::EMFILE))?;
        off_standard_streams(fd).map_err(Error::io("dup"))
    }
}

impl Inbox {
    /// The descriptor that the target process has sent, once the replies are here.
    ///
    /// # Errors
    ///
    /// EMFILE if there was no room for it here.
    pub(crate) fn take(&self) -> Result<OwnedFd> {
        let arrived = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        arrived.unwrap_or(Err(Error::Protocol("no descriptor was sent")))
    }
}

impl Passing {
    /// Of a batch that passes `fds` over `socket`. With `keep` it can be moved.
    pub(super) fn over(
        socket: &DataSocket,
        fds: &[BorrowedFd<'_>],
        calls: &[Call],
        keep: bool,
    ) -> Result<(Self, Inbox)> {
        let fds = keep.then(|| fds.iter().map(BorrowedFd::try_clone_to_owned).collect());
        let fds = fds.transpose().map_err(Error::io("dup"))?;
        let sends = calls.iter().position(|call| names(call, Sysno::sendmsg, socket.there));
        let (there, here, inbox) = (socket.there, socket.here.clone(), Inbox::default());
        Ok((Self { fds, there, here, sends, inbox: inbox.clone() }, inbox))
    }

    /// Moves the batch, of which `calls` are still to be executed, to another link's socket.
    ///
    /// # Errors
    ///
    /// Where that can't be: nothing has been passed then.
    pub(super) fn move_to(&mut self, socket: &DataSocket, calls: &mut [Call]) -> Result<()> {
        if calls.iter().any(|call| names(call, Sysno::recvmsg, self.there)) {
            let fds = self.fds.as_ref().ok_or(Error::Lost(Outcome::NotExecuted))?;
            socket.send(&fds.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>())?;
        }
        for call in calls {
            let sends = names(call, Sysno::sendmsg, self.there);
            if sends {
                self.here = socket.here.clone();
            }
            if sends || names(call, Sysno::recvmsg, self.there) {
                call.request.args[0] = socket.there as u64;
            }
        }
        self.there = socket.there;
        Ok(())
    }

    /// The batch has these replies: takes what it has sent. Messages arrive in the order of the replies,
    /// and so they are taken.
    pub(super) fn replied(&self, replies: &[Reply]) {
        let sent = self.sends.and_then(|place| replies.get(place));
        if sent.is_some_and(|reply| reply.value().is_ok()) {
            let arrived = Some(self.here.receive());
            *self.inbox.0.lock().unwrap_or_else(PoisonError::into_inner) = arrived;
        }
    }

    /// Nobody knows any more whether the batch has sent something.
    pub(super) fn give_up(&self) {
        if self.sends.is_some() {
            self.here.out_of_step.store(true, Ordering::Relaxed);
        }
    }
}

/// Whether a call is this one, on descriptor `fd`.
fn names(call: &Call, number: Sysno, fd: i32) -> bool {
    let word = call.request.word;
    word & (Word::OP | Word::NUMBER) == number.id() as u64
        && word & Word::reference(0) == 0
        && call.request.args[0] == fd as u64
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    use crate::proto::batch::Places;

    use super::*;

    /// A data socket, of which the other end is `there` in the target.
    fn socket(there: i32) -> (DataSocket, DataSocket) {
        let (here, other) = UnixStream::pair().unwrap();
        (DataSocket::new(here.into(), there), DataSocket::new(other.into(), there))
    }

    fn file() -> (File, u64) {
        let file = tempfile::tempfile().unwrap();
        let inode = file.metadata().unwrap().ino();
        (file, inode)
    }

    fn inode(fd: Result<OwnedFd>) -> u64 {
        File::from(fd.unwrap()).metadata().unwrap().ino()
    }

    fn ok() -> Reply {
        Reply { result: 1, data: Vec::new() }
    }

    /// The calls that receive a message over that socket, and send one.
    fn messages(socket: &DataSocket) -> [Call; 2] {
        let mut batch = Batch::default();
        socket.recvmsg(&mut batch, 1.into());
        socket.sendmsg(&mut batch, 2.into(), MsgFlags::empty());
        batch.whole(Places::default()).calls.try_into().unwrap()
    }

    /// As of a child that is made: a message comes, and one goes.
    fn both(socket: &DataSocket) -> Vec<Call> {
        let [received, sent] = messages(socket);
        let other = Call::syscall(Sysno::recvmsg, [77, 0, 0, 0, 0, 0]);
        vec![received, sent, other, Call::syscall(Sysno::close, [5; 6])]
    }

    #[test]
    fn what_was_not_executed_is_passed_over_the_other_socket() {
        let (old, _) = socket(5);
        let (file, expected) = file();
        let calls = both(&old);
        let (mut passing, inbox) = Passing::over(&old, &[file.as_fd()], &calls, true).unwrap();
        let (next, target) = socket(9);
        let mut moved = calls.clone();
        passing.move_to(&next, &mut moved).unwrap();
        assert_eq!(moved[..2], messages(&next));
        assert_eq!(moved[2..], calls[2..]);
        assert_eq!(inode(target.here.receive()), expected);
        // What the batch sends comes there, too.
        target.pass(&[file.as_fd()]).unwrap();
        passing.replied(&[ok(), ok(), ok(), ok()]);
        assert_eq!(inode(inbox.take()), expected);
    }

    #[test]
    fn what_was_executed_is_not_passed_again() {
        let (old, target) = socket(5);
        let (file, expected) = file();
        let calls = both(&old);
        let (mut passing, inbox) = Passing::over(&old, &[file.as_fd()], &calls, true).unwrap();
        target.pass(&[file.as_fd()]).unwrap();
        let (next, other) = socket(9);
        // All that is left is to close something.
        let mut rest = calls[3..].to_vec();
        passing.move_to(&next, &mut rest).unwrap();
        assert_eq!(rest, calls[3..]);
        assert!(other.here.receive().is_err());
        // Its message is where it was sent to.
        passing.replied(&[ok(), ok(), ok(), ok()]);
        assert_eq!(inode(inbox.take()), expected);
    }

    #[test]
    fn what_is_executed_in_part_goes_on_over_the_other_socket() {
        let (old, _) = socket(5);
        let (file, _) = file();
        let calls = both(&old);
        let (mut passing, _inbox) = Passing::over(&old, &[file.as_fd()], &calls, true).unwrap();
        let (next, other) = socket(9);
        let mut rest = calls[1..].to_vec();
        passing.move_to(&next, &mut rest).unwrap();
        assert_eq!(rest[0], messages(&next)[1]);
        assert!(other.here.receive().is_err());
    }

    #[test]
    fn no_batch_gets_the_message_of_one_whose_result_is_lost() {
        let (socket, target) = socket(5);
        let (file, _) = file();
        let [_, sent] = messages(&socket);
        let calls = [sent];
        let (lost, _) = Passing::over(&socket, &[], &calls, true).unwrap();
        let (passing, inbox) = Passing::over(&socket, &[], &calls, true).unwrap();
        target.pass(&[file.as_fd()]).unwrap();
        lost.give_up();
        passing.replied(&[ok()]);
        assert!(matches!(inbox.take(), Err(Error::Lost(Outcome::Executed))));
    }
}
