//! The serve loop: one request at a time, and between requests a look at the listening socket.
//!
//! In version 0 exactly 56 bytes are read for each request and its result is written before
//! anything else is read, because clients put payloads of their own calls into the same stream.

use farcall_abi::handshake::{Answer, HANDSHAKE_MAGIC, HANDSHAKE_VERSION, MAX_FDS, Token};
use farcall_abi::wire::{HelloResult, Operation, REQUEST_SIZE, Request, STREAM_VERSION, Word};

use crate::ahead::{Ahead, is_later};
use crate::arch;
use crate::attach::{Pending, SpareFds};
use crate::sys::{self, ECANCELED, EFAULT, EINTR, EINVAL, POLLHUP, POLLIN, POLLNVAL, PollFd, Way};

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
}

impl Watched {
    fn poll(&mut self) -> i64 {
        const COUNT: usize = size_of::<Watched>() / size_of::<PollFd>();
        let entries = (self as *mut Self).cast();
        // SAFETY: laid out as C does, this is that many entries in a row, and borrowed mutably.
        sys::poll(unsafe { core::slice::from_raw_parts_mut(entries, COUNT) })
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
    pub output: i32,
    /// The connection's other socket: not used here, but closed with the connection.
    pub data: i32,
    /// Bytes of `request` that have arrived.
    got: usize,
    /// The connection was made by a version-1 controller: its descriptors are the server's to
    /// close. Version 0 leaves them to its client, which closes them by number.
    pub owned: bool,
    pub spares: SpareFds,
    pub pending: Pending,
    /// Who holds the process.
    pub token: Token,
    /// What a version-1 controller hears when it attaches. The generation, and who holds the
    /// process since when, are kept here; the other parts are filled in for each answer.
    pub answer: Answer,
    pub request: Request,
    /// Version 1's memory, once a controller has given it.
    pub memory: *mut Ahead,
}

/// Entry: serves version 0 on two descriptors, until the end of input.
pub extern "C" fn serve(input: i32, output: i32) {
    serve_persistent(input, output, -1);
}

/// Entry: the same, and after the end of input the next connection is awaited on `listen`. Returns
/// when there is neither a connection nor a listener.
pub extern "C" fn serve_persistent(input: i32, output: i32, listen: i32) {
    let mut server = Server {
        watched: Watched {
            input: PollFd::new(input, POLLIN),
            listen: PollFd::new(listen, POLLIN),
            client: PollFd::new(-1, POLLIN),
        },
        output,
        data: -1,
        got: 0,
        owned: false,
        spares: SpareFds::new(),
        pending: Pending::new(),
        token: Token([0; 2]),
        answer: Answer {
            magic: HANDSHAKE_MAGIC,
            status: 0,
            version: HANDSHAKE_VERSION,
            stream_version: 0,
            pid: 0,
            generation: 0,
            fds: [0; MAX_FDS],
            listen: 0,
            spares: 0,
            holder_pid: 0,
            reserved: 0,
            holder_since: 0,
        },
        request: Request { word: 0, args: [0; 6] },
        memory: core::ptr::null_mut(),
    };
    server.refill();
    while (server.watched.listen.fd < 0 || server.wait()) && server.advance() {}
}

impl Server {
    /// Takes what has arrived and executes what is whole. False: that was the end of the connection,
    /// and without a listener there won't be another one.
    #[inline(never)]
    fn advance(&mut self) -> bool {
        let n = match self.ahead() {
            Some(ahead) => ahead.read(self.watched.input.fd),
            None => {
                let to = (&raw mut self.request).cast::<u8>().wrapping_add(self.got);
                sys::read(self.watched.input.fd, to as u64, REQUEST_SIZE - self.got)
            }
        };
        if is_later(n) {
            return self.wait();
        }
        if n > 0 && self.execute_all(n as usize).is_ok() {
            return true;
        }
        if self.watched.listen.fd < 0 {
            return false;
        }
        self.hang_up();
        true
    }

    /// Executes what is whole after `n` more bytes have arrived.
    fn execute_all(&mut self, n: usize) -> Result<(), HangUp> {
        if self.answer.stream_version == 0 {
            self.got += n;
            if self.got < REQUEST_SIZE {
                return Ok(());
            }
            self.got = 0;
            return self.execute();
        }
        while let Some(request) = self.ahead().and_then(Ahead::next) {
            self.request = request;
            self.execute()?;
        }
        self.flush()
    }

    /// The memory of version 1, if the connection speaks it.
    pub fn ahead(&mut self) -> Option<&'static mut Ahead> {
        if self.answer.stream_version == 0 {
            return None;
        }
        // SAFETY: HELLO gave this memory to the server for good, and it was seen to be writable
        // then. The references made here live only as long as one step of the loop needs them.
        Some(unsafe { &mut *self.memory })
    }

    /// Sends what waits to be sent.
    pub fn flush(&mut self) -> Result<(), HangUp> {
        let output = self.output;
        self.ahead().map_or(Ok(()), |ahead| ahead.flush(output))
    }

    /// Waits until there is something to read on the connection, and meanwhile listens. False:
    /// neither a connection nor a listener is left.
    #[inline(never)]
    fn wait(&mut self) -> bool {
        loop {
            if self.watched.input.fd < 0 && self.watched.listen.fd < 0 {
                return false;
            }
            let ready = self.watched.poll();
            let Watched { input, listen, client } = &mut self.watched;
            if ready < 0 {
                if ready != EINTR {
                    sys::pause();
                }
            } else if self.owned && input.revents & POLLHUP != 0 {
                // A version-1 controller that is gone leaves nothing to be executed, even if
                // requests of its have not been read yet. And it keeps nobody out.
                self.hang_up();
            } else if client.revents != 0 {
                // The descriptors may be other ones after this.
                self.progress();
            } else {
                let input = input.revents;
                if listen.revents & POLLNVAL != 0 {
                    listen.fd = -1;
                } else if listen.revents != 0 {
                    self.accept();
                }
                if input != 0 {
                    return true;
                }
            }
        }
    }

    /// Ends the connection; what was read of a request is forgotten.
    pub fn hang_up(&mut self) {
        let input = self.watched.input.fd;
        sys::shutdown(input);
        sys::shutdown(self.output);
        if self.owned {
            sys::close(input);
            if self.output != input {
                sys::close(self.output);
            }
            sys::close(self.data);
        }
        self.watched.input.fd = -1;
        self.output = -1;
        self.data = -1;
        self.got = 0;
        self.answer.holder_pid = 0;
        self.refill();
    }

    /// Executes the request that has arrived and writes its result.
    #[inline(never)]
    fn execute(&mut self) -> Result<(), HangUp> {
        let word = self.request.word;
        let stray = word & !(Word::NUMBER | Word::OP);
        let (skipped, stray) = match self.ahead() {
            None => (false, stray != 0),
            Some(ahead) => {
                if word & Word::FLUSH != 0 {
                    ahead.flush(self.output)?;
                }
                (self.resolve(ahead), stray & !Word::VERSION_1 != 0)
            }
        };
        self.request.word &= Word::NUMBER;
        let result = if word & Word::OP != 0 {
            let number = self.request.word as u32;
            let operation = Operation::from_number(number).filter(|_| !stray).ok_or(HangUp)?;
            if operation == Operation::CopyIn && word & Word::reference(1) != 0 {
                // How much follows must not depend on a result.
                return Err(HangUp);
            }
            return self.operate(operation, skipped);
        } else if stray {
            EINVAL
        } else if skipped {
            ECANCELED
        } else {
            // SAFETY: this is what the controller asks for, in its own process; the server's state
            // is only reached by a call that names an address inside the server's memory, and then
            // it is the controller that breaks its own server.
            unsafe { arch::call(&self.request) }
        };
        self.finish(result)
    }

    /// Replaces the arguments that refer to earlier results. True if the request is not to be
    /// executed.
    fn resolve(&mut self, ahead: &Ahead) -> bool {
        let word = self.request.word;
        let mut skipped = word & Word::LINK != 0 && ahead.earlier(1).is_none();
        let mut bit = Word::reference(0);
        for argument in &mut self.request.args {
            if word & bit != 0 {
                match ahead.earlier(*argument) {
                    Some(result) => *argument = result as u64,
                    None => skipped = true,
                }
            }
            bit <<= 1;
        }
        skipped
    }

    /// A call has this result: it is remembered, and sent or put behind those that wait.
    pub fn finish(&mut self, result: i64) -> Result<(), HangUp> {
        let output = self.output;
        match self.ahead() {
            None => send(output, result),
            Some(ahead) => {
                ahead.record(result);
                ahead.push(output, result)
            }
        }
    }

    /// Does what only a server can do.
    fn operate(&mut self, operation: Operation, skipped: bool) -> Result<(), HangUp> {
        let [first, second, third, ..] = self.request.args;
        let result = match operation {
            Operation::CopyIn => self.copy_in(first, second, skipped)?,
            _ if skipped => ECANCELED,
            Operation::Hello => return self.greet(first, second),
            Operation::CopyOut => return self.copy_out(first, second),
            Operation::Copy => match sys::copy(first, second, third) {
                error if error < 0 => EFAULT,
                copied => copied,
            },
            Operation::Load => load(first, second),
            Operation::Store => store(first, second, third),
            Operation::Serve => {
                // The answer goes where the request came from, with all before it.
                let output = self.output;
                let result = self.persist();
                let later = core::mem::replace(&mut self.output, output);
                let sent = self.finish(result).and_then(|()| self.flush());
                self.output = later;
                return sent;
            }
            Operation::Image => arch::image_address() as i64,
        };
        self.finish(result)
    }

    /// The operation HELLO: answers in the version that was spoken, and goes on in the other.
    fn greet(&mut self, version: u64, memory: u64) -> Result<(), HangUp> {
        let mut speak = self.answer.stream_version;
        let probe = 0u64;
        // Where the kernel forbids this copy, version 1 could not move what it reads ahead.
        if speak == 0
            && version != 0
            && memory.is_multiple_of(align_of::<Ahead>() as u64)
            && sys::copy(memory, &raw const probe as u64, 8) == 8
        {
            speak = STREAM_VERSION;
        }
        self.finish(HelloResult::new(speak, HelloResult::OFFERED).0)?;
        if speak != self.answer.stream_version {
            self.memory = memory as *mut Ahead;
            self.answer.stream_version = speak;
            self.begin();
        }
        Ok(())
    }

    /// A connection begins: nothing has been read ahead.
    pub fn begin(&mut self) {
        if let Some(ahead) = self.ahead() {
            ahead.clear();
        }
    }
}

/// The operation LOAD.
fn load(address: u64, width: u64) -> i64 {
    let mut value = 0i64;
    if !is_width(width) {
        EINVAL
    } else if sys::copy(&raw mut value as u64, address, width) == width as i64 {
        // The kernel has changed it.
        core::hint::black_box(value)
    } else {
        EFAULT
    }
}

/// The operation STORE.
fn store(address: u64, width: u64, value: u64) -> i64 {
    if !is_width(width) {
        EINVAL
    } else if sys::copy(address, &raw const value as u64, width) == width as i64 {
        0
    } else {
        EFAULT
    }
}

fn is_width(width: u64) -> bool {
    width.is_power_of_two() && width <= 8
}

/// Moves all of the bytes, or the connection is over.
#[inline(always)]
pub fn transfer(way: Way, fd: i32, address: u64, len: u64) -> Result<(), HangUp> {
    let sys::Transferred(done, _) = sys::transfer(way, fd, address, len);
    if done == len { Ok(()) } else { Err(HangUp) }
}

/// Writes a result.
pub fn send(output: i32, result: i64) -> Result<(), HangUp> {
    transfer(Way::Out, output, &raw const result as u64, size_of::<i64>() as u64)
}
