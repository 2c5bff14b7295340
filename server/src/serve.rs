//! The serve loop: one request at a time, and between requests a look at the listening socket.
//!
//! In version 0 exactly 56 bytes are read for each request and its result is written before
//! anything else is read, because clients put payloads of their own calls into the same stream.

use farcall_abi::handshake::Token;
use farcall_abi::wire::{HelloResult, Operation, REQUEST_SIZE, Request, STREAM_VERSION, Word};
use syscalls::Sysno;

use crate::arch;
use crate::attach::{Pending, SpareFds};
use crate::sys::{self, EAGAIN, EINTR, EINVAL, POLLHUP, POLLIN, POLLNVAL, POLLOUT, PollFd};

/// The connection is over: its other end is gone, or what it said can't be followed any more.
pub struct HangUp;

/// Everything a server knows. A negative descriptor is one that it does not have.
pub struct Server {
    /// Requests arrive here; negative while detached.
    pub input: i32,
    /// Results leave here.
    pub output: i32,
    /// The connection's other socket: not used here, but closed with the connection.
    pub data: i32,
    /// Where the next controller arrives; negative if the process is not persistent.
    pub listen: i32,
    /// The connection was made by a version-1 controller: its descriptors are the server's to
    /// close. Version 0 leaves them to its client, which closes them by number.
    pub owned: bool,
    /// Who holds the process, by its own word.
    pub holder: i32,
    pub holder_since: i64,
    pub token: Token,
    /// Counts the connections.
    pub generation: u64,
    pub spares: SpareFds,
    pub pending: Pending,
    request: Request,
    /// Bytes of `request` that have arrived.
    got: usize,
}

/// Entry: serves version 0 on two descriptors, until the end of input.
pub extern "C" fn serve(input: i32, output: i32) {
    run(input, output, -1);
}

/// Entry: the same, and after the end of input the next connection is awaited on `listen`.
pub extern "C" fn serve_persistent(input: i32, output: i32, listen: i32) {
    run(input, output, listen);
}

/// Serves until there is neither a connection nor a listener.
///
/// One copy of it for all entries: inlined into each, it would not fit the page.
#[inline(never)]
pub extern "C" fn run(input: i32, output: i32, listen: i32) {
    let mut server = Server {
        input,
        output,
        data: -1,
        listen,
        owned: false,
        holder: 0,
        holder_since: 0,
        token: Token([0; 2]),
        generation: 0,
        spares: SpareFds::new(),
        pending: Pending::new(),
        request: Request { word: 0, args: [0; 6] },
        got: 0,
    };
    if input < 0 {
        server.spares.fill(listen);
    }
    loop {
        if server.listen >= 0 && !server.wait() {
            return;
        }
        if server.receive().is_ok() {
            continue;
        }
        if server.listen < 0 {
            return;
        }
        server.hang_up();
    }
}

impl Server {
    /// Takes what has arrived of a request, and executes it once it is whole.
    fn receive(&mut self) -> Result<(), HangUp> {
        let to = (&raw mut self.request).cast::<u8>().wrapping_add(self.got);
        let n = sys::read(self.input, to as u64, REQUEST_SIZE - self.got);
        match n {
            EINTR => Ok(()),
            EAGAIN => {
                sys::poll(&mut [PollFd::new(self.input, POLLIN)]);
                Ok(())
            }
            n if n <= 0 => Err(HangUp),
            n => {
                self.got += n as usize;
                if self.got < REQUEST_SIZE {
                    return Ok(());
                }
                self.got = 0;
                self.execute()
            }
        }
    }

    /// Waits until there is something to read on the connection, and meanwhile listens. False:
    /// neither a connection nor a listener is left.
    fn wait(&mut self) -> bool {
        loop {
            if self.input < 0 && self.listen < 0 {
                return false;
            }
            let mut fds = [
                PollFd::new(self.input, POLLIN),
                PollFd::new(self.listen, POLLIN),
                PollFd::new(self.pending.fd, POLLIN),
            ];
            if sys::poll(&mut fds) < 0 {
                continue;
            }
            let [input, listen, pending] = fds;
            // A version-1 controller that is gone keeps nobody out, and leaves nothing to be
            // executed, even if requests of its have not been read yet.
            if self.owned && input.revents & POLLHUP != 0 {
                self.hang_up();
                continue;
            }
            if pending.revents != 0 {
                self.progress();
                // The descriptors may be other ones now.
                continue;
            }
            if listen.revents & POLLNVAL != 0 {
                self.listen = -1;
            } else if listen.revents != 0 {
                self.accept();
            }
            if input.revents != 0 {
                return true;
            }
        }
    }

    /// Ends the connection; what was read of a request is forgotten.
    pub fn hang_up(&mut self) {
        sys::shutdown(self.input);
        sys::shutdown(self.output);
        if self.owned {
            sys::close(self.input);
            if self.output != self.input {
                sys::close(self.output);
            }
            sys::close(self.data);
        }
        self.input = -1;
        self.output = -1;
        self.data = -1;
        self.got = 0;
        self.spares.fill(self.listen);
    }

    /// Executes the request that has arrived and writes its result.
    fn execute(&mut self) -> Result<(), HangUp> {
        let Request { word, args } = self.request;
        let number = (word & Word::NUMBER) as u32;
        let result = if word & Word::OP != 0 {
            if word & !(Word::NUMBER | Word::OP) != 0 {
                return Err(HangUp);
            }
            match Operation::from_number(number) {
                Some(Operation::Hello) => HelloResult::new(STREAM_VERSION, HelloResult::OFFERED).0,
                Some(Operation::CopyIn) => self.copy_in(args)?,
                Some(Operation::CopyOut) => return self.copy_out(args),
                Some(Operation::Serve) => {
                    let output = self.output;
                    let result = self.persist(args);
                    // The answer goes where the request came from.
                    return Self::send(output, &result);
                }
                Some(Operation::Image) => arch::image_address() as i64,
                None => return Err(HangUp),
            }
        } else if word & !Word::NUMBER != 0 {
            EINVAL
        } else {
            call(word, args)
        };
        Self::send(self.output, &result)
    }

    /// Writes a result.
    pub fn send(output: i32, result: &i64) -> Result<(), HangUp> {
        let mut done = 0;
        while done < size_of::<i64>() {
            let from = (result as *const i64 as u64).wrapping_add(done as u64);
            done += Self::wrote(output, sys::write(output, from, size_of::<i64>() - done))?;
        }
        Ok(())
    }

    /// What a write that returned `n` means: how many bytes are gone; zero where it is to be tried
    /// again.
    pub fn wrote(output: i32, n: i64) -> Result<usize, HangUp> {
        match n {
            EINTR => Ok(0),
            EAGAIN => {
                sys::poll(&mut [PollFd::new(output, POLLOUT)]);
                Ok(0)
            }
            n if n < 0 => Err(HangUp),
            n => Ok(n as usize),
        }
    }
}

/// Makes a system call for the controller.
fn call(word: u64, args: [u64; 6]) -> i64 {
    let [a0, a1, a2, a3, a4, a5] = args;
    // SAFETY: this is what the controller asks for, in its own process; the server's state is only
    // reached by a call that names an address inside the server's stack, and then it is the
    // controller that breaks its own server.
    let result = unsafe { arch::raw_syscall(a0, a1, a2, a3, a4, a5, word) };
    // A child that was given no stack of its own comes out here too. It must not answer, and after
    // vfork its stack is the waiting parent's.
    if result == 0
        && (word == Sysno::clone as u64
            || word == Sysno::clone3 as u64
            || word == Sysno::fork as u64
            || word == Sysno::vfork as u64)
    {
        arch::leave();
    }
    result
}
