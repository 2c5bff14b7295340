//! How a persistent process gets its next controller.
//!
//! The handshake is non-blocking, with its partial state here: one pending client at a time,
//! replaced by a newer one. So a client that stalls holds nobody up, and no timer is needed.
//! Whatever arrives, the process is changed only by a whole and valid handshake.
//!
//! What a client sends is looked at before it is taken, and what is refused is never taken: to close a
//! descriptor can wait as long as its sender likes (SO_LINGER, a file of a FUSE), also where it is only
//! dropped, with the socket in whose queue it lies. A thread that exits does not wait for a socket, so the
//! socket of a refused client is closed last by one that has a table of its own and does nothing else.

use core::mem::{MaybeUninit, offset_of};
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::{Relaxed, Release};

use farcall_abi::handshake::{
    ANSWER_SIZE, HANDSHAKE_MAGIC, HANDSHAKE_V0_SIZE, HANDSHAKE_VERSION, HELLO_SIZE, Hello, MAX_FDS,
    MIN_FDS, Token,
};
use farcall_abi::log::{LOG_HEAD_SIZE, LOG_SIZE, LogHead, PAST, Tenure};
use farcall_abi::registry::ENTRY_SIZE;
use farcall_abi::wire::{LOG_OFFSET, Spares};

use crate::arch;
use crate::serve::{HangUp, Server};
use crate::start::handle_broken_pipes;
use crate::stream::is_later;
use crate::sys::{
    self, CmsgHdr, EAGAIN, EBADF, EBUSY, EINTR, EINVAL, ENFILE, ENOBUFS, ENOMEM, ENOTSOCK,
    EOPNOTSUPP, EPROTONOSUPPORT, IoVec, MSG_CTRUNC, MSG_PEEK, MsgHdr, POLLERR, POLLHUP, POLLIN,
    POLLNVAL, POLLRDHUP, PollFd, SCM_PIDFD, SCM_RIGHTS,
};

/// A few descriptors of the server's own.
type Fds<const N: usize> = heapless::Vec<i32, N, u32>;

fn close_all(fds: &mut heapless::VecView<i32, u32>) {
    while let Some(fd) = fds.pop() {
        sys::close(fd);
    }
}

/// Takes as many spare descriptors (duplicates of the listening socket) as there is room for: they
/// make room for a client in a full table.
///
/// They are closed only where there is no room otherwise, and only around the call that needs it:
/// what the controller calls meanwhile finds the table as full as it was, and the spare descriptors
/// keep their numbers, which are the only free ones then.
///
/// They exist only while nobody or a version-1 controller, which knows their numbers, is attached:
/// a client of version 0 may close what it does not know and use the number anew, and then closing
/// it here would hit a descriptor of its own.
#[inline(never)]
fn fill(spares: &mut Spares, listen: i32) {
    while !spares.is_full() {
        let fd = sys::dup(listen) as i32;
        if !(0..=Spares::MAX_FD).contains(&fd) {
            sys::close(fd);
            break;
        }
        *spares = spares.with(fd);
    }
}

#[inline(never)]
fn give_up(spares: &mut Spares) {
    while spares.0 != 0 {
        sys::close(spares.pop());
    }
}

/// A thread that closes for the last time what it has copies of.
#[derive(Default)]
#[repr(C)]
pub struct Closer {
    /// Its number as long as it uses memory.
    tid: AtomicU32,
    /// 0 until it may exit.
    go: AtomicU32,
    /// The number of the last one.
    number: u32,
}

impl Closer {
    /// Makes one that has copies of all descriptors that there are now.
    fn start(&self) -> bool {
        self.go.store(0, Relaxed);
        let Some(before) = sys::block_signals(u64::MAX) else { return false };
        // SAFETY: they stay there: `finish` waits.
        let made = unsafe { arch::exiting_thread(&self.go, &self.tid) };
        sys::block_signals(before);
        made > 0
    }

    /// Lets it exit, when these have been closed here. What comes next may be a call that is refused to a
    /// process of more than one thread.
    fn finish(&mut self) {
        /// How often to let others go first, and how often to sleep for a millisecond, before a thread is
        /// left alone that has no more than descriptors: other files of this process may keep it.
        const YIELDS: u32 = 100;
        const SLEEPS: u32 = 20;
        self.number = self.tid.load(Relaxed);
        self.go.store(1, Release);
        while self.tid.load(Relaxed) != 0 {
            sys::sched_yield();
        }
        let mut tries = 0;
        while tries < YIELDS + SLEEPS && sys::has_thread(self.number) {
            if tries < YIELDS {
                sys::sched_yield()
            } else {
                sys::pause(1_000_000)
            }
            tries += 1;
        }
    }
}

/// What the client has sent whose handshake is under way.
#[repr(C)]
pub struct Pending {
    /// Bytes of `hello` that have arrived.
    got: usize,
    /// The handshake is whole, of version 0, and waits until the connection of version 0 is done that
    /// there is.
    pub held: bool,
    fds: Fds<MAX_FDS>,
    /// MSG_CTRUNC if descriptors came that do not count: too many, or lost in a full table.
    surplus: i32,
    hello: Hello,
}

impl Pending {
    /// There is none any more. Descriptors that have come are not closed.
    pub fn forget(&mut self) {
        self.got = 0;
        self.held = false;
        self.surplus = 0;
        self.fds.clear();
    }

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

    /// Looks at what has arrived at `client`, but for descriptors. How many bytes there are is returned,
    /// and counted as `got`.
    fn look(&mut self, client: i32) -> i64 {
        let n = self.receive(client, HELLO_SIZE - self.got, None, MSG_PEEK);
        self.got += n.max(0) as usize;
        n
    }

    /// Takes what was looked at, of which there are `n` bytes, and the descriptors that came with it;
    /// unless these are too many or find no room: then all of it stays where it is.
    fn take(&mut self, client: i32, n: usize) {
        let mut control = Control([MaybeUninit::uninit(); 64]);
        self.got -= n;
        self.receive(client, n, Some(&mut control), MSG_PEEK);
        if self.surplus == 0 {
            self.receive(client, n, None, 0);
        }
        self.got += n;
    }

    /// Receives up to `len` bytes behind those that there are, and with `control` descriptors.
    #[inline(never)]
    fn receive(
        &mut self,
        client: i32,
        len: usize,
        control: Option<&mut Control>,
        flags: usize,
    ) -> i64 {
        let to = (&raw mut self.hello).cast::<u8>().wrapping_add(self.got);
        let iov = IoVec { base: to, len };
        let room = if control.is_some() { size_of::<Control>() } else { 0 };
        let control = control.map_or(core::ptr::null_mut(), |control| (&raw mut *control).cast());
        let mut message = MsgHdr {
            name: 0,
            name_len: 0,
            iov: &iov,
            iov_len: 1,
            control,
            control_len: room,
            flags: 0,
        };
        // SAFETY: `to` has room for `len` bytes of a handshake, which `size` and `HELLO_SIZE` bound, and the
        // control buffer is as large as the message says. Both are made of numbers.
        let n = unsafe { sys::receive(client, &mut message, flags) };
        if n > 0 && room != 0 {
            self.surplus |= message.flags & MSG_CTRUNC;
            // SAFETY: the kernel has just filled as much of the buffer.
            unsafe { self.take_fds(control, message.control_len) };
        }
        n
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
                let fd =
                    sys::off_standard_streams(unsafe { at.cast::<i32>().read() }.into()) as i32;
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
        let listen = &mut self.state.watched.listen;
        if listen.revents & (POLLNVAL | POLLHUP | POLLRDHUP | POLLERR) != 0 {
            listen.fd = -1;
            return;
        }
        self.make_room();
        match sys::accept(self.state.watched.listen.fd) {
            client @ 0.. if self.admits(client as i32) => {
                self.dismiss();
                let client = client as i32;
                self.state.watched.client = PollFd { fd: client, events: POLLIN, revents: 0 };
            }
            client @ 0.. => self.discard(client as i32, false),
            // The client has gone again.
            EAGAIN | EINTR => {}
            // It was shut down, or is something else now.
            EBADF | EINVAL | ENOTSOCK | EOPNOTSUPP => self.state.watched.listen.fd = -1,
            // Not this process's fault, and nothing tells when it is over.
            ENOMEM | ENFILE | ENOBUFS => sys::pause(100_000_000),
            // No number is free, or it is forbidden: that only changes with what happens elsewhere.
            _ => self.state.watched.listen.events = POLLRDHUP,
        }
        self.refill();
    }

    /// Room for the descriptors of a handshake: free numbers, or those up to the hard limit, or else those
    /// of the spare descriptors.
    fn make_room(&mut self) {
        let listen = self.state.watched.listen.fd;
        let mut room = Spares::default();
        fill(&mut room, listen);
        if !room.is_full() {
            let [soft, hard] = sys::limit_of_fds(None);
            if soft < hard {
                self.limit = [soft, hard];
                sys::limit_of_fds(Some(&[hard, hard]));
                fill(&mut room, listen);
            }
            if !room.is_full() {
                give_up(&mut self.state.spares);
            }
        }
        give_up(&mut room);
    }

    /// Whether the client may attach: the user that called listen, or root.
    ///
    /// The overflow uid is not a user: it stands for all who have no uid in this user namespace.
    /// It is refused wherever the listener's owner does have one. Where the owner has none either,
    /// uids say nothing, and the permissions of the socket file, which let the client connect,
    /// have decided.
    fn admits(&self, client: i32) -> bool {
        let peer = sys::peer_uid(client);
        peer == 0 || peer > 0 && peer == sys::peer_uid(self.state.watched.listen.fd)
    }

    /// Closes the client's socket, and what it has sent and nobody has taken over.
    #[inline(never)]
    pub fn dismiss(&mut self) {
        self.discard(self.state.watched.client.fd, true);
        self.state.watched.client.fd = -1;
        self.pending.forget();
        self.refill();
    }

    /// Closes the socket of a client that is refused, and if it is the pending one what was received from
    /// it, all for the last time in a thread that exits. Where there can be none, because the system
    /// refuses it or the one before is still at it, they are closed here.
    #[inline(never)]
    fn discard(&mut self, client: i32, pending: bool) {
        if client < 0 {
            return;
        }
        let closer = &self.closer;
        let made = !sys::has_thread(closer.number) && closer.start();
        if pending {
            close_all(&mut self.pending.fds);
        }
        sys::close(client);
        if made {
            self.closer.finish();
        }
    }

    /// Makes the spare descriptors complete, where there may be any, below the limit that there was.
    #[inline(never)]
    pub fn refill(&mut self) {
        if self.limit != [0; 2] {
            sys::limit_of_fds(Some(&self.limit));
            self.limit = [0; 2];
        }
        if self.state.owned != 0 || self.state.watched.input.fd < 0 {
            fill(&mut self.state.spares, self.state.watched.listen.fd);
        }
    }

    /// Goes on with the pending handshake.
    #[inline(never)]
    pub fn progress(&mut self) {
        let client = self.state.watched.client.fd;
        let n = self.pending.look(client);
        if is_later(n) {
            return;
        }
        if n > 0 {
            let pending = &self.pending;
            let size = pending.size();
            let whole = pending.got >= size;
            let status = if whole && size == HELLO_SIZE { self.judge() } else { 0 };
            // What is refused now is not received.
            if status == 0 && size != 0 {
                self.make_room();
                self.pending.take(client, n as usize);
                if !whole && self.pending.surplus == 0 {
                    return self.refill();
                }
            }
            match size {
                _ if !whole => {}
                HANDSHAKE_V0_SIZE => {
                    self.attach_version_0();
                    if self.pending.held {
                        return self.refill();
                    }
                }
                HELLO_SIZE => self.attach_version_1(status),
                _ => {}
            }
        }
        self.dismiss();
    }

    /// rsyscall's form: the answer is the numbers alone. Where somebody is attached by version 0 it is held
    /// until that connection is done.
    #[inline(never)]
    pub fn attach_version_0(&mut self) {
        let count = self.pending.fds.len();
        // The first byte of the handshake is the lowest of the count.
        let valid = self.pending.counts() && count as u8 == self.pending.hello.magic as u8;
        self.pending.held = valid && self.attached() && self.state.owned == 0;
        if !valid || self.attached() {
            // Of a client that is held the kernel only tells that it is gone.
            self.state.watched.client.events = 0;
            return;
        }
        // Nobody's, in version 0 of the stream.
        self.pending.hello = Hello::default();
        self.adopt(false);
        self.reply(self.answer.fds.as_ptr().cast(), count * size_of::<i32>());
        self.part();
    }

    /// Why a handshake of version 1 is refused, whatever descriptors come with it; or 0.
    fn judge(&self) -> i64 {
        let hello = &self.pending.hello;
        // Zeros are no token: they stand for the controllers that have none.
        let takes_over = hello.flags & Hello::TAKE_OVER != 0;
        let known = Hello::TAKE_OVER | Hello::LOG;
        let (known, from) = match hello.asks_for_names() {
            true => (known | Hello::NAMES, 0),
            false => (known, hello.from),
        };
        let reserved = u64::from(hello.flags & !known) | from;
        if hello.magic != HANDSHAKE_MAGIC || reserved != 0 || hello.token == Token([0; 2]) {
            EINVAL
        } else if hello.version != HANDSHAKE_VERSION {
            EPROTONOSUPPORT
        } else if self.attached() && hello.token != self.state.token && !takes_over {
            EBUSY
        } else {
            0
        }
    }

    #[inline(never)]
    fn attach_version_1(&mut self, mut status: i64) {
        self.answer.pid = sys::getpid();
        self.answer.listen = self.state.watched.listen.fd;
        self.answer.fds = [-1; MAX_FDS];
        self.answer.spares = 0;
        let asks = self.pending.hello.flags & Hello::LOG != 0;
        let names = self.pending.hello.asks_for_names();
        let from = self.pending.hello.from;
        if status == 0 && !self.pending.counts() {
            status = EBADF;
        }
        self.answer.status = status as i32;
        if status == 0 {
            self.adopt(true);
        }
        self.answer.magic = HANDSHAKE_MAGIC;
        self.answer.version = HANDSHAKE_VERSION;
        self.answer.stream_version = self.state.stream.version;
        self.answer.generation = self.state.generation;
        self.answer.holder_pid = self.state.holder_pid;
        self.answer.socket_file = self.state.socket_file;
        self.answer.holder_since = self.state.holder_since;
        self.reply((&raw const self.answer).cast(), ANSWER_SIZE);
        if asks {
            self.reply((&raw const self.state.log).cast(), LOG_HEAD_SIZE);
            if self.state.log.memory != 0 {
                self.reply((self.state.log.memory as *const u8).wrapping_add(LOG_OFFSET), LOG_SIZE);
            }
            if names {
                // Only the kernel looks there: a controller may have named any place.
                let LogHead { registry, used, .. } = self.state.log;
                let size = used.wrapping_mul(ENTRY_SIZE as u64).saturating_sub(from);
                self.reply(registry.wrapping_add(from) as *const u8, size as usize);
            }
        }
        if status == 0 {
            self.part();
        }
    }

    /// Closes the socket of a client that has attached. It may make the process wait anyway.
    fn part(&mut self) {
        sys::close(self.state.watched.client.fd);
        self.state.watched.client.fd = -1;
    }

    fn attached(&self) -> bool {
        self.state.watched.input.fd >= 0
    }

    #[inline(never)]
    fn reply(&self, from: *const u8, len: usize) {
        sys::send(self.state.watched.client.fd, from, len);
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
            self.state.watched.input.fd = *input;
            self.state.output.fd = *between.first().unwrap_or(input);
            self.state.data = *data;
        }
        self.pending.fds.clear();
        let Hello { stream_version, token, pid, .. } = self.pending.hello;
        // What both speak; version 1 needs the memory that an earlier controller gave.
        self.begin(u32::from(self.state.log.memory != 0 && stream_version != 0));
        self.hold(token, pid, owned);
    }

    /// A new connection begins.
    fn hold(&mut self, token: Token, holder: i32, owned: bool) {
        self.state.owned = u32::from(owned);
        if token != self.state.token {
            self.state.log.controllers += 1;
            let at = self.state.log.controllers as usize % PAST;
            if let Some(past) = self.state.log.past.get_mut(at) {
                *past = Tenure { token: self.state.token, end: self.state.log.calls };
            }
            self.state.token = token;
        }
        self.state.generation += 1;
        self.state.holder_pid = holder;
        self.state.holder_since = sys::now();
        if !owned {
            give_up(&mut self.state.spares);
        }
        self.refill();
        let mut numbers = self.state.spares;
        let client = self.state.watched.client.fd;
        if !numbers.is_full() && client >= 0 {
            // The table is full: the client's number will be one as soon as it is free.
            numbers = numbers.with(client);
        }
        self.answer.spares = numbers.0;
    }

    /// Makes SO_PEERCRED of the listener's clients name this process and not its maker, which may be gone.
    /// Where that would name another user, who may attach would be somebody else.
    #[inline(never)]
    pub fn listen(&self) {
        let listen = self.state.watched.listen.fd;
        if sys::peer_uid(listen) == sys::geteuid() {
            sys::listen_again(listen);
        }
    }

    /// The same for a process that is persistent from here on. Its next controller may come when the one
    /// before has not read all that was written: that is no reason to die.
    pub fn begin_to_listen(&self) {
        self.listen();
        handle_broken_pipes();
    }

    /// The operation SERVE: goes on with other descriptors, and with a listener becomes persistent.
    /// The answer goes where the request came from, with all before it.
    pub fn persist(&mut self) -> Result<(), HangUp> {
        let [stream, sockets, low, high, holder, file] = self.state.request.args;
        let change = |fd: &mut i32, to: u64| {
            let to = to as i32;
            if to >= 0 {
                *fd = to;
            }
        };
        change(&mut self.state.watched.input.fd, stream);
        change(&mut self.state.data, sockets);
        let listen = sockets >> 32;
        self.answer.spares = self.state.spares.0;
        if listen as i32 >= 0 {
            change(&mut self.state.watched.listen.fd, listen);
            self.state.socket_file = file as u32;
            self.begin_to_listen();
            self.hold(Token([low, high]), holder as i32, true);
        }
        let sent = self.finish_now(self.answer.spares);
        change(&mut self.state.output.fd, stream >> 32);
        sent
    }
}

const _: () = {
    assert!(offset_of!(Hello, magic) == 0);
    assert!(HANDSHAKE_V0_SIZE <= HELLO_SIZE);
};
