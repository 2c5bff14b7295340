//! Calls and replies: what can be asked of a server, and what comes back.

use nix::errno::Errno;
use smallvec::SmallVec;
use syscalls::Sysno;

use crate::abi::wire::{AHEAD_SIZE, MAX_ERRNO, Operation, Request, Word};
use crate::error::{Error, Result};
use crate::proto::table;

/// One call on its way to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What travels first.
    pub request: Request,
    /// The bytes that follow it: COPY_IN's.
    pub payload: Vec<u8>,
    /// It never waits, as who makes it knows, though others of its kind may: nobody is told of
    /// earlier results before it begins.
    pub quick: bool,
}

/// The calls of a batch. Most are alone, and take no memory of their own.
pub type Calls = SmallVec<[Call; 1]>;

/// The replies to them.
pub type Replies = SmallVec<[Reply; 1]>;

impl From<Request> for Call {
    fn from(request: Request) -> Self {
        Self { request, payload: Vec::new(), quick: false }
    }
}

impl Call {
    /// A system call.
    #[must_use]
    pub fn syscall(number: Sysno, args: [u64; 6]) -> Self {
        // Numbers of system calls are small and positive.
        Request::syscall(number.id() as u32, args).into()
    }

    /// An operation of the server.
    #[must_use]
    pub fn operation(operation: Operation, args: [u64; 6]) -> Self {
        Request::operation(operation, args).into()
    }

    /// Bytes into the memory of the target process.
    #[must_use]
    pub fn copy_in(address: u64, bytes: Vec<u8>) -> Self {
        let args = [address, bytes.len() as u64, 0, 0, 0, 0];
        Self { payload: bytes, ..Self::operation(Operation::CopyIn, args) }
    }

    /// Bytes out of the memory of the target process.
    #[must_use]
    pub fn copy_out(address: u64, len: usize) -> Self {
        Self::operation(Operation::CopyOut, [address, len as u64, 0, 0, 0, 0])
    }

    /// The same, executed only if the call before succeeded. For servers of version 1.
    pub(crate) fn linked(mut self) -> Self {
        self.request.word |= Word::LINK;
        self
    }

    /// A call that announces other bytes than it brings would leave the stream out of step: the server
    /// would take the next request for them, or them for requests.
    pub(crate) fn check(&self) -> Result<()> {
        let copy_in = Word::OP | Operation::CopyIn as u64;
        let announced = match self.request.word & (Word::OP | Word::NUMBER) == copy_in {
            false => Some(0),
            true if self.request.word & Word::reference(1) == 0 => Some(self.request.args[1]),
            true => None,
        };
        if announced == Some(self.payload.len() as u64) {
            return Ok(());
        }
        Err(Error::misuse(
            "a call that announces other bytes than it brings",
            "make one that brings bytes by Call::copy_in, and leave its length as it is",
        ))
    }

    /// How many bytes follow the result, if it is a success.
    pub(crate) fn data_len(&self) -> Option<DataLen> {
        let copy_out = Request::operation(Operation::CopyOut, [0; 6]).word;
        let word = self.request.word;
        if word & (Word::OP | Word::NUMBER) != copy_out {
            return None;
        }
        Some(match word & Word::reference(1) {
            0 => DataLen::Exactly(self.request.args[1]),
            _ => DataLen::AsAnnounced,
        })
    }

    /// Whether it is a system call that stands for itself.
    pub(crate) fn is_plain(&self) -> bool {
        self.request.word >> 32 == 0 && self.payload.is_empty()
    }

    /// Whether the call runs another program, which would die of a signal that comes late.
    pub(crate) fn executes(&self) -> bool {
        let word = self.request.word & (Word::OP | Word::NUMBER);
        [Sysno::execve, Sysno::execveat].iter().any(|number| word == number.id() as u64)
    }

    /// Whether the server is gone when the call succeeds.
    pub(crate) fn ends(&self) -> bool {
        let word = self.request.word & (Word::OP | Word::NUMBER);
        self.executes() || word == Sysno::exit_group.id() as u64
    }

    /// Whether the call may take long: whatever is not known to be quick.
    #[must_use]
    pub fn may_block(&self) -> bool {
        let word = self.request.word;
        let number = (word & Word::NUMBER) as usize;
        // An argument, if it is not another call's result.
        let how = |argument: u32| {
            let literal = word & Word::reference(argument) == 0;
            literal.then(|| self.request.args[argument as usize])
        };
        let quick = table::row(number).is_some_and(|row| !row.may_wait(|place| how(place as u32)));
        word & Word::OP == 0 && !quick && !self.quick
    }
}

/// How much data a COPY_OUT brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataLen {
    Exactly(u64),
    /// Its length is another call's result.
    AsAnnounced,
}

impl DataLen {
    pub(crate) fn allows(self, len: u64) -> bool {
        match self {
            Self::Exactly(expected) => len == expected,
            Self::AsAnnounced => true,
        }
    }
}

/// HELLO: asks for a version of the stream, for which the server may keep the
/// [`AHEAD_SIZE`](crate::abi::wire::AHEAD_SIZE) bytes at `memory`. If it is known that it can, the
/// server does not look.
pub(crate) fn hello(version: u32, memory: u64, known: bool) -> Call {
    let size = AHEAD_SIZE as u64;
    let args = [u64::from(version), memory, size, u64::from(known), 0, 0];
    Call::operation(Operation::Hello, args)
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
