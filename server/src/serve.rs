//! The serve loop: one request at a time, and between requests a look at the listening socket.
//!
//! In version 0 exactly 56 bytes are read for each request and its result is written before
//! anything else is read, because clients put payloads of their own calls into the same stream.

use core::mem::MaybeUninit;

use farcall_abi::handshake::{Answer, HANDSHAKE_MAGIC, HANDSHAKE_VERSION, Token};
use farcall_abi::log::{LOG_SIZE, LogHead};
use farcall_abi::wire::{
    AHEAD_SIZE, HelloResult, LOG_OFFSET, Operation, Request, STREAM_VERSION, Word,
};

use crate::arch;
use crate::attach::{Pending, SpareFds};
use crate::copy::{load, store};
use crate::registry::Prepared;
use crate::ring::Queue;
use crate::stream::{Buffers, Progress, earlier, is_error, is_later};
use crate::sys::{
    self, ECANCELED, EFAULT, EINTR, EINVAL, POLLHUP, POLLIN, POLLNVAL, POLLOUT, Patience, PollFd,
};

/// The connection is over: its other end is gone, or what it said can't be followed any more.
pub struct HangUp;

/// What a server waits for, in the form in which ppoll(2) takes it. A negative descriptor is one
/// that it does not have.
#[repr(C)]
pub struct Watched {
    /// Requests arrive here; negative while detached.
    pub input: PollFd,
    /// Where the next controller arrives; negative if the process is not persistent.
    pub listen: PollFd,
    /// The client whose handshake is under way.
    pub client: PollFd,
    /// The controller rings it after it has handed over calls in the ring.
    pub bell: PollFd,
}

impl Watched {
    fn poll(&mut self, patience: Patience) -> i64 {
        const COUNT: usize = size_of::<Watched>() / size_of::<PollFd>();
        let entries = (self as *mut Self).cast();
        // SAFETY: laid out as C does, this is that many entries in a row, and borrowed mutably.
        sys::poll(unsafe { core::slice::from_raw_parts_mut(entries, COUNT) }, patience)
    }
}

/// Everything a server knows.
///
/// The order is for the size of the code: what lies within 128 bytes of the start is reached by
/// shorter instructions.
#[repr(C)]
pub struct Server {
    pub watched: Watched,
    /// Results leave here.
    pub output: PollFd,
    /// The connection's other socket: not used here, but closed with the connection.
    pub data: i32,
    /// The connection was made by a version-1 controller: its descriptors are the server's to
    /// close. Version 0 leaves them to its client, which closes them by number.
    pub owned: bool,
    pub spares: SpareFds,
    pub stream: Progress,
    /// The request that is being executed.
    pub request: Request,
    /// How far the log is, and where it and the registry lie. A handshake may ask for it.
    pub log: LogHead,
    /// Calls in shared memory, if there are any.
    pub ring: Queue,
    /// What will be entered in the registry.
    pub prepared: Prepared,
    /// Who holds the process.
    pub token: Token,
    /// What a version-1 controller hears when it attaches. The generation, and who holds the
    /// process since when, are kept here; the other parts are filled in for each answer.
    pub answer: Answer,
    pub pending: Pending,
    pub buffers: Buffers,
}

/// Entry: serves version 0 on two descriptors, until the end of input.
pub extern "C" fn serve(input: i32, output: i32) {
    serve_persistent(input, output, -1);
}

/// Entry: the same, and after the end of input the next connection is awaited on `listen`. Returns
/// when there is neither a connection nor a listener.
pub extern "C" fn serve_persistent(input: i32, output: i32, listen: i32) {
    // SAFETY: made of numbers, arrays of them and vectors that zeros say are empty, which all may be
    // zeros.
    let mut server: Server = unsafe { MaybeUninit::zeroed().assume_init() };
    server.watched = Watched {
        input: PollFd::new(input, POLLIN),
        listen: PollFd::new(listen, POLLIN),
        client: PollFd::new(-1, POLLIN),
        bell: PollFd::new(-1, POLLIN),
    };
    server.output = PollFd::new(output, POLLOUT);
    server.data = -1;
    server.answer.magic = HANDSHAKE_MAGIC;
    server.answer.version = HANDSHAKE_VERSION;
    server.refill();
    while server.wait() && server.advance() {}
}

impl Server {
    /// Takes what has arrived and executes what is whole. False: that was the end of the connection,
    /// and without a listener there won't be another one.
    #[inline(never)]
    fn advance(&mut self) -> bool {
        let input = self.watched.input.fd;
        let n = self.read();
        if is_later(n) {
            return self.wait();
        }
        // In the midst of bytes another connection may have taken the place of this one.
        if n > 0 && (self.execute_all().is_ok() || input != self.watched.input.fd) {
            return true;
        }
        if self.watched.listen.fd < 0 {
            return false;
        }
        self.hang_up();
        true
    }

    /// Executes what is whole of what has arrived, and sends the results.
    fn execute_all(&mut self) -> Result<(), HangUp> {
        while self.next() {
            self.execute()?;
        }
        self.flush()
    }

    /// Waits until there is something to read on the connection, and meanwhile listens. False:
    /// neither a connection nor a listener is left.
    ///
    /// A read that blocks waits too, but is woken up in vain whenever the controller takes a result
    /// out of the socket: there is room again then.
    #[inline(never)]
    fn wait(&mut self) -> bool {
        loop {
            if self.watched.input.fd < 0 && self.watched.listen.fd < 0 {
                return false;
            }
            let patience = self.serve_ring();
            let ready = self.watched.poll(patience);
            let Watched { input, listen, client, bell } = &mut self.watched;
            if bell.revents != 0 {
                sys::hear(bell.fd);
            }
            if ready < 0 {
                if ready != EINTR {
                    if listen.fd < 0 {
                        // With a limit of no descriptors nothing can be polled, but still be read.
                        return true;
                    }
                    sys::pause();
                }
            } else if self.owned && input.revents & POLLHUP != 0 {
                // A version-1 controller that is gone leaves nothing to be executed, even if
                // requests of its have not been read yet. And it keeps nobody out.
                self.hang_up();
            } else {
                // The descriptors may be other ones after a handshake.
                let readable = input.revents != 0 && client.revents == 0;
                if listen.revents & POLLNVAL != 0 {
                    listen.fd = -1;
                }
                self.admit();
                if readable {
                    return true;
                }
            }
        }
    }

    /// Looks once for who wants to attach, without waiting. True: the connection is another one now.
    #[inline(never)]
    pub fn attends(&mut self) -> bool {
        // Which is open until another one is here.
        let input = self.watched.input.fd;
        self.watched.poll(Patience::None);
        self.admit();
        input != self.watched.input.fd
    }

    /// Goes on with who wants to attach, or lets somebody else try.
    #[inline(never)]
    fn admit(&mut self) {
        if self.watched.client.revents != 0 {
            self.progress();
        } else if self.watched.listen.revents & POLLIN != 0 {
            self.accept();
        }
    }

    /// Ends the connection; what was read of a request is forgotten.
    pub fn hang_up(&mut self) {
        let input = self.watched.input.fd;
        sys::shutdown(input);
        sys::shutdown(self.output.fd);
        if self.owned {
            sys::close(input);
            if self.output.fd != input {
                sys::close(self.output.fd);
            }
            sys::close(self.data);
        }
        self.watched.input.fd = -1;
        self.output.fd = -1;
        self.data = -1;
        self.answer.holder_pid = 0;
        self.prepared.forget();
        self.leave_ring();
        self.refill();
    }

    /// Executes the request that has arrived, and answers it.
    fn execute(&mut self) -> Result<(), HangUp> {
        let word = self.request.word;
        if word & Word::FLUSH != 0 {
            self.flush()?;
        }
        if word & Word::OP == 0 {
            let result = self.evaluate(self.stream.version);
            return self.finish(result);
        }
        // How many bytes follow depends on the operation.
        let operation = Operation::from_number(word as u32).ok_or(HangUp)?;
        if word >> Word::bits(self.stream.version) != 0 {
            return Err(HangUp);
        }
        match operation {
            Operation::CopyIn => self.copy_in(),
            Operation::Hello | Operation::CopyOut | Operation::Serve | Operation::Ring
                if self.resolve() =>
            {
                self.finish(ECANCELED)
            }
            Operation::Hello => self.greet(),
            Operation::CopyOut => self.copy_out(),
            Operation::Serve => self.persist(),
            Operation::Ring => {
                let result = self.enter_ring();
                self.finish(result)
            }
            _ => {
                let result = self.evaluate(self.stream.version);
                self.finish(result)
            }
        }
    }

    /// The result of the request, which is a system call or an operation that moves no bytes of
    /// the stream.
    #[inline(never)]
    pub fn evaluate(&mut self, version: u32) -> i64 {
        let word = self.request.word;
        if word >> Word::bits(version) != 0 {
            return EINVAL;
        }
        if word > Word::NUMBER && self.resolve() {
            return ECANCELED;
        }
        if word & Word::OP == 0 {
            self.request.word = word & Word::NUMBER;
            // SAFETY: this is what the controller asks for, in its own process; the server's state
            // is only reached by a call that names an address inside the server's memory, and then
            // it is the controller that breaks its own server.
            return unsafe { arch::call(&self.request, self.ring.cancel, self.ring.number()) };
        }
        let [first, second, third, ..] = self.request.args;
        match Operation::from_number(word as u32) {
            Some(Operation::Copy) => match sys::copy(first, second, third) {
                error if error < 0 => EFAULT,
                copied => copied,
            },
            Some(Operation::Load) => load(first, second),
            Some(Operation::Store) => store(first, second, third),
            Some(Operation::Image) => arch::image_address() as i64,
            Some(Operation::Keep) => self.prepared.keep(&mut self.log, &self.request),
            Some(Operation::Registry) => self.prepared.enter_registry(&mut self.log, &self.request),
            _ => EINVAL,
        }
    }

    /// Replaces the arguments that refer to earlier results. True if the request is not to be
    /// executed; then nobody looks at those that there were no results for.
    pub fn resolve(&mut self) -> bool {
        let word = self.request.word;
        let mut skipped = word & Word::LINK != 0 && is_error(earlier(&self.log, 1));
        let mut bit = Word::reference(0);
        for argument in &mut self.request.args {
            if word & bit != 0 {
                let result = earlier(&self.log, *argument);
                *argument = result as u64;
                skipped |= is_error(result);
            }
            bit <<= 1;
        }
        skipped
    }

    /// The operation HELLO: answers in the version that was spoken, and goes on in the other.
    fn greet(&mut self) -> Result<(), HangUp> {
        let [version, memory, size, ..] = self.request.args;
        // It can be read and written. Where the kernel forbids this copy, version 1 could not move
        // what it reads ahead either.
        if self.stream.version == 0
            && version != 0
            && memory.is_multiple_of(64)
            && size >= AHEAD_SIZE as u64
            && sys::copy(memory, memory, AHEAD_SIZE as u64) == AHEAD_SIZE as i64
        {
            if self.log.memory != 0 {
                // The log of the earlier memory goes on here.
                let (from, at) = (self.log.memory, LOG_OFFSET as u64);
                sys::copy(memory.wrapping_add(at), from.wrapping_add(at), LOG_SIZE as u64);
            }
            self.log.memory = memory;
            self.finish_now(HelloResult::new(STREAM_VERSION, HelloResult::OFFERED).0)?;
            self.begin(STREAM_VERSION);
            return Ok(());
        }
        self.finish(HelloResult::new(self.stream.version, HelloResult::OFFERED).0)
    }
}
