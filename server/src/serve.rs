//! The serve loop: one request at a time, and between requests a look at the listening socket.
//!
//! In version 0 exactly 56 bytes are read for each request and its result is written before
//! anything else is read, because clients put payloads of their own calls into the same stream.

use farcall_abi::handshake::{Answer, HANDSHAKE_MAGIC, HANDSHAKE_VERSION, MAX_FDS, Token};
use farcall_abi::wire::{HelloResult, Operation, REQUEST_SIZE, Request, STREAM_VERSION, Word};

use crate::arch;
use crate::attach::{Pending, SpareFds};
use crate::sys::{self, EAGAIN, EINTR, EINVAL, POLLHUP, POLLIN, POLLNVAL, PollFd, Way};

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
            stream_version: STREAM_VERSION,
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
    };
    server.refill();
    while (server.watched.listen.fd < 0 || server.wait()) && server.advance() {}
}

impl Server {
    /// Takes what has arrived of a request, and executes it once it is whole. False: that was the
    /// end of the connection, and without a listener there won't be another one.
    #[inline(never)]
    fn advance(&mut self) -> bool {
        let to = (&raw mut self.request).cast::<u8>().wrapping_add(self.got);
        let n = sys::read(self.watched.input.fd, to as u64, REQUEST_SIZE - self.got);
        if n == EINTR || n == EAGAIN {
            return self.wait();
        }
        if n > 0 {
            self.got += n as usize;
            if self.got < REQUEST_SIZE {
                return true;
            }
            self.got = 0;
            if self.execute().is_ok() {
                return true;
            }
        }
        if self.watched.listen.fd < 0 {
            return false;
        }
        self.hang_up();
        true
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
                // A version-1 controller that is gone leaves nothing to be executed, even if
                // requests of its have not been read yet.
                if self.owned && input & POLLHUP != 0 {
                    self.hang_up();
                } else if input != 0 {
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
    fn execute(&mut self) -> Result<(), HangUp> {
        let Request { word, args: [first, second, ..] } = self.request;
        // The answer goes where the request came from, wherever SERVE sends later ones.
        let output = self.output;
        let result = if word & !Word::NUMBER == 0 {
            // SAFETY: this is what the controller asks for, in its own process; the server's state
            // is only reached by a call that names an address inside the server's stack, and then
            // it is the controller that breaks its own server.
            unsafe { arch::call(&self.request) }
        } else if word & Word::OP == 0 {
            EINVAL
        } else {
            let number = u32::try_from(word ^ Word::OP).map_err(|_| HangUp)?;
            match Operation::from_number(number).ok_or(HangUp)? {
                Operation::Hello => HelloResult::new(STREAM_VERSION, HelloResult::OFFERED).0,
                Operation::CopyIn => self.copy_in(first, second)?,
                Operation::CopyOut => self.copy_out(first, second)?,
                Operation::Serve => self.persist(),
                Operation::Image => arch::image_address() as i64,
            }
        };
        send(output, result)
    }
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
