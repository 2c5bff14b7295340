//! How a persistent process gets its next controller.
//!
//! The handshake is non-blocking, with its partial state here: one pending client at a time,
//! replaced by a newer one. So a client that stalls holds nobody up, and no timer is needed.
//! Whatever arrives, the process is changed only by a whole and valid handshake.

use core::mem::offset_of;

use farcall_abi::handshake::{
    ANSWER_SIZE, Answer, HANDSHAKE_MAGIC, HANDSHAKE_V0_SIZE, HANDSHAKE_VERSION, HELLO_SIZE, Hello,
    MAX_FDS, MIN_FDS, Token,
};
use farcall_abi::wire::{SPARES, STREAM_VERSION, Spares};

use crate::serve::Server;
use crate::sys::{
    self, EAGAIN, EBADF, EBUSY, ECONNABORTED, EINTR, EINVAL, EPROTONOSUPPORT, IoVec, MSG_CTRUNC,
    MsgHdr, SCM_PIDFD, SCM_RIGHTS, SO_PEERCRED, Ucred,
};

/// Descriptors (duplicates of the listening socket) that are closed while a client is heard, so
/// that it finds room in a full table. Each is its number, or the inverse of that while closed.
///
/// They exist only while nobody or a version-1 controller is attached. That one knows their
/// numbers, so they stay the same as long as it is attached. A client of version 0 may close what
/// it does not know and use the number anew, and then closing it here would hit a descriptor of
/// its own.
pub struct SpareFds([i32; SPARES]);

impl SpareFds {
    pub const fn new() -> Self {
        Self([i32::MIN; SPARES])
    }

    fn release(&mut self) {
        for spare in self.0.iter_mut().filter(|spare| **spare >= 0) {
            sys::close(*spare);
            *spare = !*spare;
        }
    }

    /// Takes those that are closed again, if there is room: at any number, or at the same one.
    fn take(&mut self, listen: i32, anywhere: bool) {
        for spare in self.0.iter_mut().filter(|spare| **spare < 0) {
            let least = if anywhere { 0 } else { !*spare };
            let fd = sys::dup(listen, least) as i32;
            if anywhere {
                *spare = i32::MIN;
            }
            if fd == least || (anywhere && (0..=Spares::MAX_FD).contains(&fd)) {
                *spare = fd;
            } else {
                sys::close(fd);
            }
        }
    }

    /// Takes as many as there is room for.
    pub fn fill(&mut self, listen: i32) {
        self.take(listen, true);
    }

    /// The same; and if there is not enough, the client's socket will be one when it is closed.
    fn fill_behind(&mut self, listen: i32, client: i32) {
        self.fill(listen);
        if let Some(spare) = self.0.iter_mut().find(|spare| **spare < 0) {
            *spare = !client;
        }
    }

    fn numbers(&self) -> Spares {
        let numbers = self.0.iter().map(|fd| if *fd < 0 { !*fd } else { *fd });
        numbers.filter(|fd| *fd <= Spares::MAX_FD).fold(Spares(0), Spares::with)
    }
}

/// The client whose handshake is under way.
pub struct Pending {
    /// Negative if there is none.
    pub fd: i32,
    hello: Hello,
    got: usize,
    fds: heapless::Vec<i32, { MAX_FDS + 1 }>,
    /// Descriptors came that do not count: too many, or lost in a full table.
    surplus: bool,
}

/// How far the pending handshake is.
enum Progress {
    More,
    Refused,
    Version0,
    Version1,
}

impl Pending {
    pub fn new() -> Self {
        Self {
            fd: -1,
            hello: Hello {
                magic: 0,
                version: 0,
                stream_version: 0,
                token: Token([0; 2]),
                pid: 0,
                flags: 0,
                reserved: 0,
            },
            got: 0,
            fds: heapless::Vec::new(),
            surplus: false,
        }
    }

    /// Closes the client's socket, and what it has sent and nobody has taken over.
    fn close(&mut self) {
        while let Some(fd) = self.fds.pop() {
            sys::close(fd);
        }
        sys::close(self.fd);
        self.fd = -1;
        self.got = 0;
        self.surplus = false;
    }

    /// How many bytes the handshake has, as far as can be told from those that are here; 0 if it
    /// is none.
    fn size(&self) -> usize {
        let first = self.hello.magic as u32;
        if self.got < size_of::<u32>() {
            size_of::<u32>()
        } else if (MIN_FDS as u32..=MAX_FDS as u32).contains(&first) {
            HANDSHAKE_V0_SIZE
        } else if first == HANDSHAKE_MAGIC as u32 {
            HELLO_SIZE
        } else {
            0
        }
    }

    /// Takes what has arrived.
    fn receive(&mut self) -> Progress {
        // The longest control message that is understood: credentials, where the listener has
        // SO_PASSCRED, before descriptors.
        let mut control = [0u64; 8];
        let iov = IoVec {
            base: (&raw mut self.hello).cast::<u8>().wrapping_add(self.got),
            len: self.size() - self.got,
        };
        let mut message = MsgHdr {
            name: 0,
            name_len: 0,
            iov: &iov,
            iov_len: 1,
            control: control.as_mut_ptr(),
            control_len: size_of_val(&control),
            flags: 0,
        };
        let n = sys::receive(self.fd, &mut message);
        if n == EAGAIN || n == EINTR {
            return Progress::More;
        }
        if n <= 0 {
            return Progress::Refused;
        }
        self.got += n as usize;
        self.surplus |= message.flags & MSG_CTRUNC != 0;
        self.take_fds(control.as_ptr().cast(), message.control_len);
        let size = self.size();
        if self.got < size {
            Progress::More
        } else if size == HELLO_SIZE {
            Progress::Version1
        } else if size == HANDSHAKE_V0_SIZE {
            Progress::Version0
        } else {
            Progress::Refused
        }
    }

    /// Collects the descriptors from a control buffer that the kernel has filled.
    fn take_fds(&mut self, control: *const u8, len: usize) {
        const HEADER: usize = 16;
        let mut at = 0;
        while at + HEADER <= len {
            // SAFETY: the kernel filled `len` bytes of an aligned buffer with control messages,
            // each a header (length, level, type) and its data, padded to 8 bytes; `at` is a
            // multiple of 8, and the header lies inside.
            let (size, kind) = unsafe {
                (control.add(at).cast::<usize>().read(), control.add(at + 12).cast::<i32>().read())
            };
            let mut item = at + HEADER;
            let carries = kind == SCM_RIGHTS || kind == SCM_PIDFD;
            while carries && item + 4 <= len.min(at + size) {
                // SAFETY: inside the filled part, as just checked, and 4-aligned.
                let fd = unsafe { control.add(item).cast::<i32>().read() };
                if self.fds.push(fd).is_err() {
                    self.surplus = true;
                    sys::close(fd);
                }
                item += 4;
            }
            at += (size.max(HEADER) + 7) & !7;
        }
    }

    fn counts(&self) -> bool {
        !self.surplus && (MIN_FDS..=MAX_FDS).contains(&self.fds.len())
    }
}

impl Server {
    /// Takes a client from the listening socket, in place of the one that was pending.
    pub fn accept(&mut self) {
        self.pending.close();
        self.spares.release();
        let fd = sys::accept(self.listen);
        if fd < 0 {
            if fd != EAGAIN && fd != EINTR && fd != ECONNABORTED {
                sys::pause();
            }
        } else {
            self.pending.fd = fd as i32;
            if !self.admits(fd as i32) {
                self.pending.close();
            }
        }
        self.refill();
    }

    /// Whether the client may attach: the user that called listen, or root.
    ///
    /// The overflow uid is not a user: it stands for all who have no uid in this user namespace.
    /// It is refused wherever the listener's owner does have one. Where the owner has none either,
    /// uids say nothing, and the permissions of the socket file, which let the client connect,
    /// have decided.
    fn admits(&self, client: i32) -> bool {
        let mut peer = Ucred::default();
        let mut owner = Ucred::default();
        sys::getsockopt(client, SO_PEERCRED, &mut peer) == 0
            && sys::getsockopt(self.listen, SO_PEERCRED, &mut owner) == 0
            && (peer.uid == owner.uid || peer.uid == 0)
    }

    /// Takes the spare descriptors again, whenever calls may be made.
    fn refill(&mut self) {
        if self.owned || self.input < 0 {
            self.spares.take(self.listen, self.input < 0);
        }
    }

    /// Goes on with the pending handshake.
    pub fn progress(&mut self) {
        self.spares.release();
        match self.pending.receive() {
            Progress::More => return self.refill(),
            Progress::Refused => {}
            Progress::Version0 => self.attach_version_0(),
            Progress::Version1 => self.attach_version_1(),
        }
        self.pending.close();
        self.refill();
    }

    /// rsyscall's form: nobody may be attached, and the answer is the numbers alone.
    fn attach_version_0(&mut self) {
        let fds = &self.pending.fds;
        if self.input >= 0
            || !self.pending.counts()
            || fds.len() as u64 != self.pending.hello.magic & 0xff
        {
            return;
        }
        sys::send(self.pending.fd, fds.as_ptr().cast(), size_of_val(fds.as_slice()));
        self.token = Token([0; 2]);
        self.holder = 0;
        self.adopt(false);
    }

    fn attach_version_1(&mut self) {
        let hello = self.pending.hello;
        let status = if hello.magic != HANDSHAKE_MAGIC || hello.flags != 0 || hello.reserved != 0 {
            EINVAL
        } else if hello.version != HANDSHAKE_VERSION {
            EPROTONOSUPPORT
        } else if self.input >= 0 && hello.token != self.token {
            EBUSY
        } else if !self.pending.counts() {
            EBADF
        } else {
            0
        };
        let mut answer = Answer {
            magic: HANDSHAKE_MAGIC,
            status: status as i32,
            version: HANDSHAKE_VERSION,
            stream_version: STREAM_VERSION,
            pid: sys::getpid(),
            generation: 0,
            fds: [-1; MAX_FDS],
            listen: self.listen,
            spares: 0,
            holder_pid: self.holder,
            reserved: 0,
            holder_since: self.holder_since,
        };
        if status == 0 {
            for (to, from) in answer.fds.iter_mut().zip(&self.pending.fds) {
                *to = *from;
            }
            if self.input >= 0 {
                self.hang_up();
            }
            self.token = hello.token;
            self.holder = hello.pid;
            self.adopt(true);
            answer.holder_pid = self.holder;
            answer.holder_since = self.holder_since;
            self.spares.fill_behind(self.listen, self.pending.fd);
            answer.spares = self.spares.numbers().0;
        }
        answer.generation = self.generation;
        sys::send(self.pending.fd, (&raw const answer).cast(), ANSWER_SIZE);
    }

    /// Makes the descriptors that came with the handshake the connection.
    fn adopt(&mut self, owned: bool) {
        let mut fds = self.pending.fds.iter().copied();
        let mut next = || fds.next().unwrap_or(-1);
        self.input = next();
        self.output = if self.pending.fds.len() > MIN_FDS { next() } else { self.input };
        self.data = next();
        self.pending.fds.clear();
        self.hold(owned);
    }

    /// A new connection begins.
    fn hold(&mut self, owned: bool) {
        self.owned = owned;
        self.generation += 1;
        self.holder_since = sys::now();
    }

    /// The operation SERVE: goes on with other descriptors, and with a listener becomes persistent.
    pub fn persist(&mut self, args: [u64; 6]) -> i64 {
        let [stream, sockets, low, high, holder, _] = args;
        let change = |fd: &mut i32, to: u64| {
            if to as i32 >= 0 {
                *fd = to as i32;
            }
        };
        change(&mut self.input, stream);
        change(&mut self.output, stream >> 32);
        change(&mut self.data, sockets);
        if (sockets >> 32) as i32 >= 0 {
            self.listen = (sockets >> 32) as i32;
            self.token = Token([low, high]);
            self.holder = holder as i32;
            self.hold(true);
            self.spares.fill(self.listen);
        }
        self.spares.numbers().0
    }
}

const _: () = {
    assert!(offset_of!(Hello, magic) == 0);
    assert!(HANDSHAKE_V0_SIZE <= HELLO_SIZE);
};
