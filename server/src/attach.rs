//! How a persistent process gets its next controller.
//!
//! The handshake is non-blocking, with its partial state here: one pending client at a time,
//! replaced by a newer one. So a client that stalls holds nobody up, and no timer is needed.
//! Whatever arrives, the process is changed only by a whole and valid handshake.

use core::mem::{MaybeUninit, offset_of};

use farcall_abi::handshake::{
    ANSWER_SIZE, HANDSHAKE_MAGIC, HANDSHAKE_V0_SIZE, HANDSHAKE_VERSION, HELLO_SIZE, Hello, MAX_FDS,
    MIN_FDS, Token,
};
use farcall_abi::log::{LOG_HEAD_SIZE, LOG_SIZE, PAST, Tenure};
use farcall_abi::wire::{LOG_OFFSET, SPARES, Spares};

use crate::serve::{HangUp, Server};
use crate::sys::{
    self, CmsgHdr, EAGAIN, EBADF, EBUSY, EINTR, EINVAL, EPROTONOSUPPORT, IoVec, MSG_CTRUNC, MsgHdr,
    SCM_PIDFD, SCM_RIGHTS,
};

/// A few descriptors of the server's own.
type Fds<const N: usize> = heapless::Vec<i32, N, u32>;

fn close_all(fds: &mut heapless::VecView<i32, u32>) {
    while let Some(fd) = fds.pop() {
        sys::close(fd);
    }
}

/// Descriptors (duplicates of the listening socket) that make room for a client in a full table.
///
/// They are closed only where there is no room otherwise, and only around the call that needs it:
/// what the controller calls meanwhile finds the table as full as it was, and the spare descriptors
/// keep their numbers, which are the only free ones then.
///
/// They exist only while nobody or a version-1 controller, which knows their numbers, is attached:
/// a client of version 0 may close what it does not know and use the number anew, and then closing
/// it here would hit a descriptor of its own.
pub struct SpareFds(Fds<SPARES>);

impl SpareFds {
    pub const fn new() -> Self {
        Self(Fds::new())
    }

    /// Takes as many as there is room for.
    fn fill(&mut self, listen: i32) {
        while !self.0.is_full() {
            let fd = sys::dup(listen) as i32;
            if !(0..=Spares::MAX_FD).contains(&fd) {
                sys::close(fd);
                break;
            }
            let _ = self.0.push(fd);
        }
    }

    fn numbers(&self) -> Spares {
        self.0.iter().fold(Spares(0), |spares, fd| spares.with(*fd))
    }
}

/// What the client has sent whose handshake is under way.
#[repr(C)]
pub struct Pending {
    /// Bytes of `hello` that have arrived.
    got: usize,
    fds: Fds<MAX_FDS>,
    /// MSG_CTRUNC if descriptors came that do not count: too many, or lost in a full table.
    surplus: i32,
    hello: Hello,
}

impl Pending {
    /// How many bytes the handshake has, as far as can be told from those that are here; 0 if it
    /// is none.
    fn size(&self) -> usize {
        const V0: core::ops::RangeInclusive<u32> = MIN_FDS as u32..=MAX_FDS as u32;
        let first = self.hello.magic as u32;
        if self.got < size_of::<u32>() {
            size_of::<u32>()
        } else if V0.contains(&first) {
            HANDSHAKE_V0_SIZE
        } else if first == HANDSHAKE_MAGIC as u32 {
            HELLO_SIZE
        } else {
            0
        }
    }

    /// Takes what has arrived at `client`. Returns how many bytes the handshake has once it is
    /// whole, and 0 if it won't become one.
    fn receive(&mut self, client: i32) -> Option<usize> {
        let mut control = Control([MaybeUninit::uninit(); 64]);
        let iov = IoVec {
            base: (&raw mut self.hello).cast::<u8>().wrapping_add(self.got),
            len: self.size() - self.got,
        };
        let mut message = MsgHdr {
            name: 0,
            name_len: 0,
            iov: &iov,
            iov_len: 1,
            control: (&raw mut control).cast(),
            control_len: size_of::<Control>(),
            flags: 0,
        };
        let n = sys::receive(client, &mut message);
        if n == EAGAIN || n == EINTR {
            return None;
        }
        if n <= 0 {
            return Some(0);
        }
        self.got += n as usize;
        self.surplus |= message.flags & MSG_CTRUNC;
        // SAFETY: the kernel has just filled as much of the buffer.
        unsafe { self.take_fds(message.control, message.control_len) };
        let size = self.size();
        (self.got >= size).then_some(size)
    }

    /// The descriptors make a connection.
    fn counts(&self) -> bool {
        self.surplus == 0 && self.fds.len() >= MIN_FDS
    }

    /// Collects the descriptors from a control buffer.
    ///
    /// # Safety
    ///
    /// `control` points to a [`Control`] of which the kernel filled `len` bytes.
    unsafe fn take_fds(&mut self, mut control: *const u8, len: usize) {
        let end = control.wrapping_add(len);
        while control < end {
            let mut at = control.wrapping_add(size_of::<CmsgHdr>());
            // SAFETY: the kernel writes whole messages: a header, which lies at a multiple of 8
            // bytes, and its data.
            let header = unsafe { control.cast::<CmsgHdr>().read() };
            let data_end = control.wrapping_add(header.len);
            while at < data_end && (header.kind == SCM_RIGHTS || header.kind == SCM_PIDFD) {
                // SAFETY: inside the data, which for these kinds is an array of descriptors.
                let fd = unsafe { at.cast::<i32>().read() };
                if self.fds.push(fd).is_err() {
                    self.surplus = MSG_CTRUNC;
                    sys::close(fd);
                }
                at = at.wrapping_add(size_of::<i32>());
            }
            control = control.wrapping_add(header.len.next_multiple_of(size_of::<usize>()));
        }
    }
}

/// Room for the longest control messages that are understood: credentials, where the listener has
/// SO_PASSCRED, before descriptors.
#[repr(C, align(8))]
struct Control([MaybeUninit<u8>; 64]);

impl Server {
    /// Takes a client from the listening socket, in place of the one that was pending, if it may
    /// attach.
    #[inline(never)]
    pub fn accept(&mut self) {
        self.make_room();
        let client = sys::accept(self.watched.listen.fd) as i32;
        if client < 0 {
            sys::pause();
        } else if self.admits(client) {
            self.dismiss();
            self.watched.client.fd = client;
        } else {
            sys::close(client);
        }
        self.refill();
    }

    /// Room for the descriptors of a handshake.
    fn make_room(&mut self) {
        let mut room = SpareFds::new();
        room.fill(self.watched.listen.fd);
        if !room.0.is_full() {
            close_all(&mut self.spares.0);
        }
        close_all(&mut room.0);
    }

    /// Whether the client may attach: the user that called listen, or root.
    ///
    /// The overflow uid is not a user: it stands for all who have no uid in this user namespace.
    /// It is refused wherever the listener's owner does have one. Where the owner has none either,
    /// uids say nothing, and the permissions of the socket file, which let the client connect,
    /// have decided.
    fn admits(&self, client: i32) -> bool {
        let peer = sys::peer_uid(client);
        peer == 0 || peer > 0 && peer == sys::peer_uid(self.watched.listen.fd)
    }

    /// Closes the client's socket, and what it has sent and nobody has taken over.
    fn dismiss(&mut self) {
        close_all(&mut self.pending.fds);
        sys::close(self.watched.client.fd);
        self.watched.client.fd = -1;
        self.pending.got = 0;
        self.pending.surplus = 0;
        self.refill();
    }

    /// Makes the spare descriptors complete, where there may be any.
    pub fn refill(&mut self) {
        if self.owned || self.watched.input.fd < 0 {
            self.spares.fill(self.watched.listen.fd);
        }
    }

    /// Goes on with the pending handshake.
    #[inline(never)]
    pub fn progress(&mut self) {
        self.make_room();
        match self.pending.receive(self.watched.client.fd) {
            None => return self.refill(),
            Some(HANDSHAKE_V0_SIZE) => self.attach_version_0(),
            Some(HELLO_SIZE) => self.attach_version_1(),
            Some(_) => {}
        }
        self.dismiss();
    }

    /// rsyscall's form: nobody may be attached, and the answer is the numbers alone.
    fn attach_version_0(&mut self) {
        let count = self.pending.fds.len();
        // The first byte of the handshake is the lowest of the count.
        if self.attached()
            || !self.pending.counts()
            || count as u8 != self.pending.hello.magic as u8
        {
            return;
        }
        // Nobody's, in version 0 of the stream.
        self.pending.hello = Hello::default();
        self.adopt(false);
        self.reply(self.answer.fds.as_ptr().cast(), count * size_of::<i32>());
    }

    #[inline(never)]
    fn attach_version_1(&mut self) {
        self.answer.pid = sys::getpid();
        self.answer.listen = self.watched.listen.fd;
        self.answer.fds = [-1; MAX_FDS];
        self.answer.spares = 0;
        let hello = &self.pending.hello;
        // Zeros are no token: they stand for the controllers that have none.
        let reserved = u64::from(hello.flags & !(Hello::TAKE_OVER | Hello::LOG)) | hello.reserved;
        let takes_over = hello.flags & Hello::TAKE_OVER != 0;
        let asks = hello.flags & Hello::LOG != 0;
        let status =
            if hello.magic != HANDSHAKE_MAGIC || reserved != 0 || hello.token == Token([0; 2]) {
                EINVAL
            } else if hello.version != HANDSHAKE_VERSION {
                EPROTONOSUPPORT
            } else if self.attached() && hello.token != self.token && !takes_over {
                EBUSY
            } else if !self.pending.counts() {
                EBADF
            } else {
                0
            };
        self.answer.status = status as i32;
        if status == 0 {
            self.adopt(true);
        }
        self.answer.stream_version = self.stream.version;
        self.reply((&raw const self.answer).cast(), ANSWER_SIZE);
        if asks {
            self.reply((&raw const self.log).cast(), LOG_HEAD_SIZE);
            if self.log.memory != 0 {
                self.reply((self.log.memory as *const u8).wrapping_add(LOG_OFFSET), LOG_SIZE);
            }
        }
    }

    fn attached(&self) -> bool {
        self.watched.input.fd >= 0
    }

    #[inline(never)]
    fn reply(&self, from: *const u8, len: usize) {
        sys::send(self.watched.client.fd, from, len);
    }

    /// Makes the descriptors that came with the handshake the connection.
    fn adopt(&mut self, owned: bool) {
        let fds = self.pending.fds.as_slice();
        for (to, from) in self.answer.fds.iter_mut().zip(fds) {
            *to = *from;
        }
        if self.attached() {
            self.hang_up();
        }
        if let [input, between @ .., data] = self.pending.fds.as_slice() {
            self.watched.input.fd = *input;
            self.output.fd = *between.first().unwrap_or(input);
            self.data = *data;
        }
        self.pending.fds.clear();
        let Hello { stream_version, token, pid, .. } = self.pending.hello;
        // What both speak; version 1 needs the memory that an earlier controller gave.
        self.begin(u32::from(self.log.memory != 0 && stream_version != 0));
        self.hold(token, pid, owned);
    }

    /// A new connection begins.
    fn hold(&mut self, token: Token, holder: i32, owned: bool) {
        self.owned = owned;
        if token != self.token {
            self.log.controllers += 1;
            let at = self.log.controllers as usize % PAST;
            if let Some(past) = self.log.past.get_mut(at) {
                *past = Tenure { token: self.token, end: self.log.calls };
            }
            self.token = token;
        }
        self.answer.generation += 1;
        self.answer.holder_pid = holder;
        self.answer.holder_since = sys::now();
        if !owned {
            close_all(&mut self.spares.0);
        }
        self.refill();
        let mut numbers = self.spares.numbers();
        let client = self.watched.client.fd;
        if !self.spares.0.is_full() && client >= 0 {
            // The table is full: the client's number will be one as soon as it is free.
            numbers = numbers.with(client);
        }
        self.answer.spares = numbers.0;
    }

    /// The operation SERVE: goes on with other descriptors, and with a listener becomes persistent.
    /// The answer goes where the request came from, with all before it.
    pub fn persist(&mut self) -> Result<(), HangUp> {
        let [stream, sockets, low, high, holder, _] = self.request.args;
        let change = |fd: &mut i32, to: u64| {
            let to = to as i32;
            if to >= 0 {
                *fd = to;
            }
        };
        change(&mut self.watched.input.fd, stream);
        change(&mut self.data, sockets);
        let listen = sockets >> 32;
        self.answer.spares = self.spares.numbers().0;
        if listen as i32 >= 0 {
            change(&mut self.watched.listen.fd, listen);
            self.hold(Token([low, high]), holder as i32, true);
        }
        let input = self.watched.input.fd;
        let sent = self.finish_now(self.answer.spares);
        if input == self.watched.input.fd {
            change(&mut self.output.fd, stream >> 32);
        }
        sent
    }
}

const _: () = {
    assert!(offset_of!(Hello, magic) == 0);
    assert!(HANDSHAKE_V0_SIZE <= HELLO_SIZE);
};
