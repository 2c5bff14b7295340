//! The serve loop: one request at a time, and between requests a look at the listening socket.
//!
//! In version 0 exactly 56 bytes are read for each request and its result is written before
//! anything else is read, because clients put payloads of their own calls into the same stream.

use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU64, Ordering};

use farcall_abi::entry::AHEAD;
use farcall_abi::handshake::Answer;
use farcall_abi::log::LOG_SIZE;
use farcall_abi::upgrade::{Handover, Watched};
use farcall_abi::wire::{AHEAD_SIZE, HelloResult, LOG_OFFSET, Operation, STREAM_VERSION, Word};

use crate::arch;
use crate::attach::{Closer, Pending};
use crate::copy::{load, store};
use crate::registry::Prepared;
use crate::stream::{Buffers, earlier, is_error, is_later};
use crate::sys::{
    self, Direction, EAGAIN, ECANCELED, EINTR, EINVAL, POLLHUP, POLLIN, POLLNVAL, POLLOUT,
    POLLRDHUP, PollFd,
};

/// The connection is over: its other end is gone, or what it said can't be followed any more.
pub struct HangUp;

/// All of what is waited for: first the connection, then those from whom a next one may come, then the
/// bell.
pub fn entries(watched: &mut Watched) -> &mut [PollFd; 4] {
    const { assert!(size_of::<Watched>() == size_of::<[PollFd; 4]>()) };
    // SAFETY: laid out as C does, this is that many entries in a row, and borrowed mutably.
    unsafe { &mut *(watched as *mut Watched).cast() }
}

/// What a listener is waited for: a client, and that it was shut down for reading, which the kernel tells only
/// if it is asked.
pub const LISTENS: i16 = POLLIN | POLLRDHUP;

/// Everything a server knows.
#[repr(C)]
pub struct Server {
    /// What the next image must know too.
    pub state: Handover,
    /// Where the controller says which call is to be interrupted, while one of the ring's is being
    /// executed; else null.
    pub cancel: *const u64,
    /// What closes the sockets of clients that are refused.
    pub closer: Closer,
    /// The soft and the hard RLIMIT_NOFILE, if the soft one is raised for now; else zeros.
    pub limit: [u64; 2],
    /// What will be entered in the registry.
    pub prepared: Prepared,
    /// What a version-1 controller hears when it attaches, filled in for each of them.
    pub answer: Answer,
    pub pending: Pending,
    pub buffers: Buffers,
}

/// Entry: serves two descriptors until the end of input, from version 0 on. A negative output: both are
/// the input's; and [`AHEAD`]: it begins in version 1, with this memory, and says so at `begun`.
pub extern "C" fn serve(input: i32, output: i32, memory: u64, begun: *const AtomicU64) {
    serve_on(input, output, (-1, 0), memory, begun);
}

/// Entry: the same, and after the end of input the next connection is awaited on `listen`. Returns
/// when there is neither a connection nor a listener.
pub extern "C" fn serve_persistent(
    input: i32,
    output: i32,
    listen: i32,
    memory: u64,
    begun: *const AtomicU64,
) {
    serve_on(input, output, (listen, 0), memory, begun);
}

/// The same, with a descriptor of the listening socket's file: one more than its number, or 0.
#[inline(never)]
pub fn serve_on(
    input: i32,
    output: i32,
    (listen, socket_file): (i32, u32),
    memory: u64,
    begun: *const AtomicU64,
) {
    let mut server = Server::new();
    server.state.socket_file = socket_file;
    if output == AHEAD {
        server.state.stream.version = STREAM_VERSION;
        server.state.log.memory = memory;
        // SAFETY: who asks for this promises that it is null or an aligned number that can be written.
        if let Some(begun) = unsafe { begun.as_ref() } {
            begun.store(1, Ordering::Release);
        }
    }
    let entry = |fd, events| PollFd { fd, events, revents: 0 };
    server.state.watched = Watched {
        input: entry(input, POLLIN),
        listen: entry(listen, LISTENS),
        client: entry(-1, POLLIN),
        bell: entry(-1, POLLIN),
    };
    server.state.output = entry(if output < 0 { input } else { output }, POLLOUT);
    server.state.data = -1;
    // What lies above is the frame of this function, and of those that called it.
    server.state.stack = (&raw const server).wrapping_add(1) as u64;
    if listen >= 0 {
        server.begin_to_listen();
    }
    server.refill();
    let mut n = EAGAIN;
    if listen < 0 {
        // There is nothing to wait for but the first request.
        n = server.read();
        if n == 0 {
            return;
        }
    }
    server.serve(n);
}

impl Server {
    /// One that knows nothing.
    #[inline(always)]
    pub fn new() -> Self {
        // SAFETY: made of numbers, pointers, arrays of them and a vector that zeros say is empty, which
        // all may be zeros.
        unsafe { MaybeUninit::zeroed().assume_init() }
    }

    /// Serves until there is neither a connection nor a listener; `n` is what the last read has returned,
    /// or [`EAGAIN`] if there was none.
    #[inline(never)]
    pub fn serve(&mut self, mut n: i64) {
        loop {
            if n <= 0 && !is_later(n) || self.execute_all().is_err() {
                if self.state.watched.listen.fd < 0 {
                    // The descriptors are left as they are, and who called goes on.
                    self.disarm();
                    return;
                }
                self.hang_up();
            }
            if self.waits(n) && !self.wait() {
                return;
            }
            n = self.read();
        }
    }

    /// Whether there is more to wait for than the next read does by itself.
    ///
    /// A read that blocks is woken up in vain whenever the controller takes a result out of the socket:
    /// there is room again then. In version 0 a result is taken out while nothing else is to be done, and
    /// its clients expect no more than a read and a write for each request.
    fn waits(&self, n: i64) -> bool {
        self.state.stream.version != 0
            || self.state.watched.listen.fd >= 0
            || self.has_ring()
            || n == EAGAIN
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
    #[inline(never)]
    fn wait(&mut self) -> bool {
        loop {
            if self.state.watched.input.fd < 0 {
                if self.pending.held {
                    self.attach_version_0();
                    self.dismiss();
                    continue;
                }
                if self.state.watched.listen.fd < 0 {
                    return false;
                }
            }
            let patience = self.serve_ring();
            let ready = sys::poll(entries(&mut self.state.watched), Direction::Read, patience);
            // What has happened may have made room for a client that could not be accepted.
            self.state.watched.listen.events = LISTENS;
            if ready < 0 {
                if ready != EINTR && !self.wait_for_one() {
                    return true;
                }
                continue;
            }
            let Watched { input, listen, client, bell } = &mut self.state.watched;
            if bell.revents != 0 {
                sys::hear(bell.fd);
            }
            if self.state.owned != 0 && input.revents & POLLHUP != 0 {
                // A version-1 controller that is gone leaves nothing to be executed, even if
                // requests of its have not been read yet. And it keeps nobody out.
                self.hang_up();
            } else if client.revents & POLLNVAL != 0 {
                // The controller has closed what it does not know: that number will be another's.
                client.fd = -1;
                self.pending.forget();
            } else if client.revents != 0 {
                // The descriptors may be other ones after this.
                if self.pending.held { self.dismiss() } else { self.progress() }
            } else {
                let input = input.revents;
                if listen.revents != 0 {
                    self.accept();
                }
                if input != 0 {
                    return true;
                }
            }
        }
    }

    /// Where several descriptors can't be waited for, waits for one as long as it takes: for the client
    /// whose handshake is under way, else for requests, else for a client. False if it is for requests that
    /// the next read waits.
    #[cold]
    #[inline(never)]
    fn wait_for_one(&mut self) -> bool {
        self.state.watched.listen.revents = 0;
        let Watched { input, listen, client, .. } = &self.state.watched;
        if self.has_ring() {
            // Nothing can be heard of it any more. The next connection will get none.
            self.hang_up();
        } else if client.fd >= 0 && !self.pending.held {
            sys::make_blocking(client.fd);
            self.progress();
        } else if input.fd >= 0 {
            sys::make_blocking(input.fd);
            return false;
        } else {
            sys::make_blocking(listen.fd);
            self.accept();
        }
        true
    }

    /// Ends the connection; what was read of a request is forgotten.
    pub fn hang_up(&mut self) {
        let input = self.state.watched.input.fd;
        sys::shutdown(input);
        sys::shutdown(self.state.output.fd);
        if self.state.owned != 0 {
            sys::close(input);
            if self.state.output.fd != input {
                sys::close(self.state.output.fd);
            }
            sys::close(self.state.data);
        }
        self.state.watched.input.fd = -1;
        self.state.output.fd = -1;
        self.state.data = -1;
        self.state.holder_pid = 0;
        self.prepared.forget();
        self.leave_ring();
        if !sys::may_listen(self.state.watched.listen.fd) {
            // Its number is something else now, for which nobody would ever come.
            self.state.watched.listen.fd = -1;
        }
        self.refill();
    }

    /// Executes the request that has arrived, and answers it.
    fn execute(&mut self) -> Result<(), HangUp> {
        let word = self.state.request.word;
        if word & Word::FLUSH != 0 {
            self.flush()?;
        }
        if word & Word::OP == 0 {
            let result = self.evaluate(self.state.stream.version);
            return self.finish(result);
        }
        // How many bytes follow depends on the operation.
        let operation = Operation::from_number(word as u32).ok_or(HangUp)?;
        if word >> Word::bits(self.state.stream.version) != 0 {
            return Err(HangUp);
        }
        use Operation::{CopyIn, CopyOut, Hello, Ring, Serve, Upgrade};
        match operation {
            CopyIn => return self.copy_in(),
            Hello | CopyOut | Serve | Ring | Upgrade => {}
            _ => {
                let result = self.evaluate(self.state.stream.version);
                return self.finish(result);
            }
        }
        if self.resolve() {
            return self.finish(ECANCELED);
        }
        match operation {
            Hello => self.greet(),
            CopyOut => self.copy_out(),
            Serve => self.persist(),
            Upgrade => self.hand_over(),
            _ => {
                let result = self.enter_ring();
                self.finish(result)
            }
        }
    }

    /// The result of the request, which is a system call or an operation that moves no bytes of
    /// the stream.
    #[inline(never)]
    pub fn evaluate(&mut self, version: u32) -> i64 {
        let word = self.state.request.word;
        if word >> Word::bits(version) != 0 {
            return EINVAL;
        }
        if word > Word::NUMBER && self.resolve() {
            return ECANCELED;
        }
        if word & Word::OP == 0 {
            self.state.request.word = word & Word::NUMBER;
            // SAFETY: this is what the controller asks for, in its own process; the server's state
            // is only reached by a call that names an address inside the server's memory, and then
            // it is the controller that breaks its own server.
            return unsafe {
                arch::call(&self.state.request, self.cancel, self.state.ring.next + 1)
            };
        }
        let [first, second, third, ..] = self.state.request.args;
        match Operation::from_number(word as u32) {
            // SAFETY: into memory that the controller names.
            Some(Operation::Copy) => unsafe { sys::copy(first, second, third) },
            Some(Operation::Load) => load(first, second),
            Some(Operation::Store) => store(first, second, third),
            Some(Operation::Image) => arch::image_address() as i64,
            Some(Operation::Keep) => self.prepared.keep(&mut self.state.log, &self.state.request),
            Some(Operation::Registry) => {
                self.prepared.enter_registry(&mut self.state.log, &self.state.request)
            }
            _ => EINVAL,
        }
    }

    /// Replaces the arguments that refer to earlier results. True if the request is not to be
    /// executed; then nobody looks at those that there were no results for.
    pub fn resolve(&mut self) -> bool {
        let word = self.state.request.word;
        let mut skipped = word & Word::LINK != 0 && is_error(earlier(&self.state.log, 1));
        let mut bit = Word::reference(0);
        for argument in &mut self.state.request.args {
            if word & bit != 0 {
                let result = earlier(&self.state.log, *argument);
                *argument = result as u64;
                skipped |= is_error(result);
            }
            bit <<= 1;
        }
        skipped
    }

    /// The operation HELLO: answers in the version that was spoken, and goes on in the other.
    fn greet(&mut self) -> Result<(), HangUp> {
        let [version, memory, size, known, ..] = self.state.request.args;
        // It can be read and written, as who asks may know. Where the kernel allows no way to copy it,
        // version 1 could not move what it reads ahead either.
        if self.state.stream.version == 0
            && version != 0
            && memory.is_multiple_of(64)
            && size >= AHEAD_SIZE as u64
            && (known != 0 || is_there(memory))
        {
            if self.state.log.memory != 0 {
                // The log of the earlier memory goes on here.
                let (from, at) = (self.state.log.memory, LOG_OFFSET as u64);
                // SAFETY: the controller has named it, for the server alone.
                unsafe {
                    sys::copy(memory.wrapping_add(at), from.wrapping_add(at), LOG_SIZE as u64)
                };
            }
            self.state.log.memory = memory;
            self.finish_now(HelloResult::new(STREAM_VERSION, HelloResult::OFFERED).0)?;
            self.begin(STREAM_VERSION);
            return Ok(());
        }
        self.finish(HelloResult::new(self.state.stream.version, HelloResult::OFFERED).0)
    }
}

/// Whether all of the memory that a controller offers can be read and written, by a copy of it to itself.
fn is_there(memory: u64) -> bool {
    let size = AHEAD_SIZE as u64;
    // SAFETY: memory that the controller names is written as it is.
    unsafe { sys::copy(memory, memory, size) == size as i64 }
}
