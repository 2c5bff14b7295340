//! Chains: calls that are sent together, in which later ones use the results of earlier ones.
//!
//! A chain is built without I/O; its calls return placeholders ([`Later`]) that later calls take as
//! arguments. [`Chain::run`] sends all of it in one round trip, and the server resolves what refers
//! to what. Each call is linked to the one before: after a failure the rest is not executed, except
//! what was added after [`Chain::unlinked`].

mod calls;
mod keep;
mod run;

use std::marker::PhantomData;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::abi::wire::{Operation, Word};
use crate::calls::handle::Fd;
use crate::calls::{SocketAddress, Task};
use crate::error::{Error, Result};
use crate::proto::batch::{Batch, Step};
use crate::proto::{Reply, batch};

/// Calls to be sent together to one process.
#[must_use = "a chain is executed by `run`"]
pub struct Chain<'t> {
    task: &'t Task,
    id: ChainId,
    batch: Batch,
    linked: bool,
    one_by_one: bool,
    /// Names for what the next call opens.
    keeping: Vec<String>,
    /// Names of all that the chain keeps, and how many entries of the registry it needs.
    names: Vec<String>,
    slots: u64,
    /// What was wrong with an argument: told by `run`.
    error: Option<Error>,
}

/// Which chain something belongs to: no two chains of a program have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ChainId(NonZeroU64);

impl ChainId {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NonZeroU64::new(NEXT.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MAX))
    }
}

/// An argument of a call in a chain: a value, an earlier call's result, or a place in the chain's
/// memory. Only values are arguments of calls in other chains as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arg {
    arg: batch::Arg,
    /// The chain that the result or place belongs to.
    chain: Option<ChainId>,
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self { arg: batch::Arg::Value(value), chain: None }
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        // As C passes an int: with its sign.
        i64::from(value).cast_unsigned().into()
    }
}

impl<T> From<Later<T>> for Arg {
    fn from(later: Later<T>) -> Self {
        Self { arg: batch::Arg::Result(later.step), chain: Some(later.chain) }
    }
}

impl Arg {
    /// The place `bytes` further on in the chain's memory. A value or result is returned as it is.
    #[must_use]
    pub fn offset(self, bytes: usize) -> Self {
        Self { arg: self.arg.offset(bytes), ..self }
    }
}

/// What a call of a chain will have returned, once the chain has run: an argument for later calls,
/// and the key to the result. It means nothing to other chains: they refuse it with
/// [`Error::Misuse`].
pub struct Later<T> {
    chain: ChainId,
    step: usize,
    what: PhantomData<fn() -> T>,
}

impl<T> Clone for Later<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Later<T> {}

impl<T> std::fmt::Debug for Later<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Later({})", self.step)
    }
}

/// A descriptor: one that is open already, or one that an earlier call of the chain opens.
#[derive(Clone, Copy, Debug)]
pub enum AnyFd<'f> {
    /// Open already.
    Open(&'f Fd),
    /// To be opened by the chain.
    Later(Later<Fd>),
}

impl<'f> From<&'f Fd> for AnyFd<'f> {
    fn from(fd: &'f Fd) -> Self {
        Self::Open(fd)
    }
}

impl From<Later<Fd>> for AnyFd<'_> {
    fn from(later: Later<Fd>) -> Self {
        Self::Later(later)
    }
}

/// What a chain has left: the results of its calls.
#[derive(Debug)]
pub struct Done {
    chain: ChainId,
    replies: Vec<Reply>,
    /// Which bytes were taken.
    taken: Vec<usize>,
    fds: Vec<(usize, Fd)>,
    round_trips: usize,
}

impl Done {
    /// The result of a call, as a number.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] for a placeholder of another chain.
    pub fn value<T>(&self, later: Later<T>) -> Result<u64> {
        // It is a success: otherwise the chain has failed.
        Ok(self.replies[self.step(later)?].result.cast_unsigned())
    }

    /// Which step a placeholder of this chain stands for. Every step has a reply.
    fn step<T>(&self, later: Later<T>) -> Result<usize> {
        if later.chain == self.chain { Ok(later.step) } else { Err(foreign()) }
    }

    /// The descriptor that a call has opened.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] if it was taken before, if the chain has closed it, and for a placeholder of
    /// another chain.
    pub fn fd(&mut self, later: Later<Fd>) -> Result<Fd> {
        let step = self.step(later)?;
        let at = self.fds.iter().position(|(opened, _)| *opened == step);
        let at = at.ok_or(Error::misuse(
            "a descriptor of a chain that is taken twice, or that the chain has closed",
            "take it once, and keep the handle",
        ))?;
        Ok(self.fds.swap_remove(at).1)
    }

    /// The bytes that a call has left.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] if they were taken before, and for a placeholder of another chain.
    pub fn bytes(&mut self, later: Later<Vec<u8>>) -> Result<Vec<u8>> {
        let step = self.step(later)?;
        if self.taken.contains(&step) {
            return Err(Error::misuse(
                "bytes of a chain that are taken twice",
                "take them once, and keep them",
            ));
        }
        self.taken.push(step);
        Ok(std::mem::take(&mut self.replies[step].data))
    }

    /// The address that a call has left.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] for a placeholder of another chain.
    pub fn address(&mut self, later: Later<SocketAddress>) -> Result<SocketAddress> {
        let step = self.step(later)?;
        // The call before is the LOAD of its length.
        let length = self.replies[step - 1].result;
        Ok(SocketAddress::returned(&self.replies[step].data, length.cast_unsigned()))
    }

    /// How many round trips the chain took: one, unless it was too long for that, or the server
    /// speaks version 0 of the stream.
    #[must_use]
    pub fn round_trips(&self) -> usize {
        self.round_trips
    }
}

impl Task {
    /// An empty chain of calls in this process.
    pub fn chain(&self) -> Chain<'_> {
        Chain {
            task: self,
            id: ChainId::new(),
            batch: Batch::default(),
            linked: true,
            one_by_one: false,
            keeping: Vec::new(),
            names: Vec::new(),
            slots: 0,
            error: None,
        }
    }
}

impl Chain<'_> {
    /// Calls that are added from here on are executed whether or not the one before has failed;
    /// only what refers to a failed call is not. For closing what was opened.
    pub fn unlinked(&mut self) -> &mut Self {
        self.linked = false;
        self
    }

    /// Calls that are added from here on are executed only if the one before was, and succeeded.
    pub fn linked(&mut self) -> &mut Self {
        self.linked = true;
        self
    }

    /// Sends every call by itself and waits for its result, as it is done for servers of version 0:
    /// for finding out which call hangs.
    pub fn one_by_one(&mut self) -> &mut Self {
        self.one_by_one = true;
        self
    }

    /// Bytes that lie in the process's memory, at a multiple of 8, before the chain's first call.
    pub fn input(&mut self, bytes: impl AsRef<[u8]>) -> Arg {
        let place = self.batch.input(bytes.as_ref());
        self.own(place)
    }

    /// An argument that only this chain understands.
    fn own(&self, arg: batch::Arg) -> Arg {
        Arg { arg, chain: Some(self.id) }
    }

    /// `len` bytes of the process's memory, at a multiple of 8, for what calls leave.
    pub fn output(&mut self, len: usize) -> Arg {
        let place = self.batch.output(len);
        self.own(place)
    }

    /// Adds a system call.
    pub fn syscall(&mut self, number: syscalls::Sysno, args: [Arg; 6]) -> Later<u64> {
        // Numbers are small and positive.
        self.push(number.name(), number.id() as u64, args)
    }

    fn operation(&mut self, name: &'static str, operation: Operation, args: [Arg; 6]) -> usize {
        self.push::<u64>(name, Word::OP | operation as u64, args).step
    }

    fn push<T>(&mut self, name: &'static str, word: u64, args: [Arg; 6]) -> Later<T> {
        if !self.keeping.is_empty() {
            // Those that open something have taken them.
            self.refuse(Error::misuse(
                "Chain::keep before a call that opens nothing",
                "call it directly before the call whose descriptor is to have the name",
            ));
        }
        if args.iter().any(|arg| arg.chain.is_some_and(|chain| chain != self.id)) {
            self.refuse(foreign());
        }
        let mut step = Step::new(name, word, args.map(|arg| arg.arg));
        step.linked = self.linked;
        let step = self.batch.push(step);
        self.later(step)
    }

    fn later<T>(&self, step: usize) -> Later<T> {
        Later { chain: self.id, step, what: PhantomData }
    }

    /// A descriptor as an argument.
    fn fd<'f>(&mut self, fd: impl Into<AnyFd<'f>>) -> Arg {
        match fd.into() {
            AnyFd::Later(later) => later.into(),
            AnyFd::Open(fd) => match self.task.number(fd) {
                Ok(number) => number.into(),
                Err(error) => self.refuse(error),
            },
        }
    }

    /// A path or name as an argument.
    fn string(&mut self, call: &'static str, text: impl AsRef<[u8]>) -> Arg {
        match crate::calls::c_string(call, text) {
            Ok(bytes) => self.input(bytes),
            Err(error) => self.refuse(error),
        }
    }

    fn refuse(&mut self, error: Error) -> Arg {
        self.error.get_or_insert(error);
        0.into()
    }
}

/// What a placeholder of another chain is answered with.
fn foreign() -> Error {
    Error::misuse(
        "a placeholder of another chain",
        "what one chain makes is an argument of another's calls once it has run: take it from Done",
    )
}
