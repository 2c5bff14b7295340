//! The stream: requests, results and what the bits of a request's first word mean.

/// Bytes of a request on the wire.
pub const REQUEST_SIZE: usize = 56;
/// Bytes of a result on the wire: an `i64` as the kernel returns it.
pub const RESULT_SIZE: usize = 8;
/// The lowest negated errno a kernel returns: results in `-MAX_ERRNO..=-1` are errors, every other
/// value (a high address that reads as a negative number among them) is a success.
pub const MAX_ERRNO: i64 = 4095;

/// The newest version of the stream that this build speaks.
pub const STREAM_VERSION: u32 = 1;

/// How far back a REF can reach: the results of that many calls are remembered.
pub const MAX_REF: u64 = 64;

/// Bytes of memory that a version-1 server needs for what it has read ahead and what it has not
/// sent yet, and, behind those 8,192, for its call log. A controller gives it that with HELLO, in
/// the memory of the process.
pub const AHEAD_SIZE: usize = LOG_OFFSET + super::log::LOG_SIZE;

/// Where in that memory the call log lies.
pub const LOG_OFFSET: usize = 8192;

/// One call, as it travels: a word that says what to do, and six arguments.
///
/// With the high half of the word zero this is a plain system call, and exactly the request of
/// rsyscall's protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Request {
    /// The number of a system call, or an operation; see [`Word`].
    pub word: u64,
    /// The arguments, in the order of the kernel's registers.
    pub args: [u64; 6],
}

const _: () = {
    assert!(size_of::<Request>() == REQUEST_SIZE);
    assert!(align_of::<Request>() == 8);
    assert!(core::mem::offset_of!(Request, args) == 8);
};

impl Request {
    /// A request for system call `number`.
    #[must_use]
    pub const fn syscall(number: u32, args: [u64; 6]) -> Self {
        Self { word: number as u64, args }
    }

    /// A request for an operation of the server itself.
    #[must_use]
    pub const fn operation(operation: Operation, args: [u64; 6]) -> Self {
        Self { word: Word::OP | operation as u64, args }
    }

    /// The 56 bytes that travel.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; REQUEST_SIZE] {
        let mut bytes = [0; REQUEST_SIZE];
        let words = core::iter::once(self.word).chain(self.args);
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// A request from the 56 bytes that travelled.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; REQUEST_SIZE]) -> Self {
        let mut words = bytes.chunks_exact(8).map(|chunk| {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            u64::from_le_bytes(word)
        });
        let mut next = || words.next().unwrap_or_default();
        Self { word: next(), args: core::array::from_fn(|_| next()) }
    }
}

/// What the bits of [`Request::word`] mean.
///
/// | bits | meaning |
/// |---|---|
/// | 0-31 | the system call's number, or an [`Operation`] if [`Word::OP`] is set |
/// | 32 | [`Word::OP`] |
/// | 33 | [`Word::LINK`] (version 1) |
/// | 34 | [`Word::FLUSH`] (version 1) |
/// | 35-40 | [`Word::reference`] 0 to 5 (version 1) |
/// | others | must be zero |
///
/// A system call with a bit set that must be zero is answered `-EINVAL` and not executed. An
/// operation with such a bit, or an unknown operation, ends the connection: how many bytes follow
/// it could not be known. In version 0 the bits of version 1 are such bits.
pub struct Word;

impl Word {
    /// The low half is an [`Operation`], not a system call.
    pub const OP: u64 = 1 << 32;
    /// Not executed, and answered `-ECANCELED`, if the call before failed or was itself not
    /// executed.
    pub const LINK: u64 = 1 << 33;
    /// The results so far are sent before this is executed: for what may block.
    pub const FLUSH: u64 = 1 << 34;
    /// How many of its bits, from the lowest up, mean something in that version of the stream. The
    /// others must be zero.
    #[must_use]
    pub const fn bits(stream_version: u32) -> u32 {
        if stream_version == 0 { 33 } else { 41 }
    }

    /// The bits that hold the number of the system call or operation.
    pub const NUMBER: u64 = 0xffff_ffff;

    /// Argument `index` is not a value but a distance `k`: the result of the call `k` back,
    /// `1..=`[`MAX_REF`]. If that call failed, was not executed or does not exist, this one is not
    /// executed either, and answered `-ECANCELED`.
    #[must_use]
    pub const fn reference(index: u32) -> u64 {
        1 << (35 + index)
    }
}

/// What a server can do besides system calls. A number, once given, is never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Operation {
    /// `HELLO(version, addr, size, known)`: the highest version of the stream that the controller speaks,
    /// and the address of `size` zero bytes, a multiple of 64, that are the server's from here on.
    /// The result, a [`HelloResult`], is the last one in the old version. With less than
    /// [`AHEAD_SIZE`] bytes the version stays what it is, and with bytes that are not there, for which
    /// the server does not look if `known` is not 0.
    Hello = 0,
    /// `COPY_IN(addr, len)`: `len` bytes follow the request and land at `addr`. The result is
    /// `len`, or `-EFAULT` if any of them could not be stored; all of them are consumed in every
    /// case. A `len` above `isize::MAX` ends the connection.
    CopyIn = 1,
    /// `COPY_OUT(addr, len)`: the result is `len`; then follow `len` bytes, then an `i64` that
    /// says how many of them, counted from the first, are real. The rest is zeros. A `len` above
    /// `isize::MAX` is `-EINVAL`, and nothing follows.
    CopyOut = 2,
    /// `COPY(dst, src, len)`: copies inside the process. The result is how many bytes were copied,
    /// or `-EFAULT` if not even the first could be. Ranges that overlap are copied somehow.
    Copy = 3,
    /// `LOAD(addr, width)`: the result is the `width` bytes (1, 2, 4 or 8) at `addr`, as a number
    /// without a sign.
    Load = 4,
    /// `STORE(addr, width, value)`: stores the low `width` bytes of `value`. The result is 0.
    Store = 5,
    /// `KEEP(slot, src, len, from, count, clear)`: what the next call makes is entered
    /// in the registry, see [`super::registry`]. The result is 0, `-EINVAL` if there is no such room
    /// in it, or `-EFAULT` if not all of `src` is there.
    Keep = 6,
    /// `REGISTRY(addr, entries)`: the registry is at `addr` from here on, a multiple of 8, where all
    /// that is in it so far has been copied. The result is where it was, or 0.
    Registry = 7,
    /// `SERVE(in | out << 32, data | listen << 32, token low, token high, holder, file)`: the server
    /// goes on with these descriptors; -1 keeps the one it has. With a listening socket the
    /// process is persistent from here on, held by the controller with that token and pid, and `file` is
    /// one more than the number of a descriptor of the socket's file, or 0. The result is a [`Spares`].
    Serve = 8,
    /// `IMAGE()`: the address at which the image lies in the process.
    Image = 9,
    /// `RING(addr, server's bell | controller's bell << 32, source, has source)`: from here on also calls
    /// are executed that are handed over in shared memory at `addr`, see [`super::ring`]. The bells, of
    /// eventfd(2), are the server's from here on, and closed when the connection ends. If `has source` is
    /// not 0, so is `source`, a datagram socket of unix(7): what arrives there is SIGIO for the server's
    /// thread, until the connection ends. The result is where the ring of the connection before was, or
    /// 0.
    Ring = 10,
    /// `UPGRADE(image)`: the server goes on as the image at that address, see [`super::upgrade`]. The
    /// result, which that one sends, is where the image before lies; or `-EFAULT` or `-EINVAL` if
    /// there is none that can take over, or what mprotect(2) says. Only in version 1.
    Upgrade = 11,
}

impl Operation {
    /// The operation of that number, if there is one.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Hello,
            1 => Self::CopyIn,
            2 => Self::CopyOut,
            3 => Self::Copy,
            4 => Self::Load,
            5 => Self::Store,
            6 => Self::Keep,
            7 => Self::Registry,
            8 => Self::Serve,
            9 => Self::Image,
            10 => Self::Ring,
            11 => Self::Upgrade,
            _ => return None,
        })
    }

    /// Its name in the protocol's text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hello => "HELLO",
            Self::CopyIn => "COPY_IN",
            Self::CopyOut => "COPY_OUT",
            Self::Copy => "COPY",
            Self::Load => "LOAD",
            Self::Store => "STORE",
            Self::Keep => "KEEP",
            Self::Registry => "REGISTRY",
            Self::Serve => "SERVE",
            Self::Image => "IMAGE",
            Self::Ring => "RING",
            Self::Upgrade => "UPGRADE",
        }
    }
}

/// What a server answers to HELLO: the version it speaks from here on, and what it offers.
///
/// Bits 0-15 are the version, the lower of both sides' highest; bits 16-47 are feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelloResult(pub i64);

impl HelloResult {
    /// COPY_IN, COPY_OUT, COPY, LOAD and STORE are there.
    pub const COPY: u32 = 1 << 0;
    /// SERVE is there: the process can become persistent.
    pub const SERVE: u32 = 1 << 1;
    /// IMAGE is there: the controller can find the entry table.
    pub const IMAGE: u32 = 1 << 2;
    /// RING is there: calls can be handed over in shared memory.
    pub const RING: u32 = 1 << 3;
    /// There is a call log: [`Hello::LOG`](super::handshake::Hello::LOG).
    pub const LOG: u32 = 1 << 4;
    /// KEEP and REGISTRY are there.
    pub const KEEP: u32 = 1 << 5;
    /// UPGRADE is there.
    pub const UPGRADE: u32 = 1 << 6;
    /// Its entries know [`AHEAD`](super::entry::AHEAD): children can begin in version 1.
    pub const BEGIN: u32 = 1 << 7;
    /// Calls of a ring can be withdrawn.
    pub const WITHDRAW: u32 = 1 << 8;
    /// RING takes a source of interruptions.
    pub const SOURCE: u32 = 1 << 9;
    /// What a server built from this source offers.
    pub const OFFERED: u32 = Self::COPY
        | Self::SERVE
        | Self::IMAGE
        | Self::RING
        | Self::LOG
        | Self::KEEP
        | Self::UPGRADE
        | Self::BEGIN
        | Self::WITHDRAW
        | Self::SOURCE;

    /// The answer of a server that speaks `version` and offers `features`.
    #[must_use]
    pub const fn new(version: u32, features: u32) -> Self {
        Self((version & 0xffff) as i64 | (features as i64) << 16)
    }

    /// The version that both sides speak from here on.
    #[must_use]
    pub const fn version(self) -> u32 {
        (self.0 & 0xffff) as u32
    }

    /// The feature bits.
    #[must_use]
    pub const fn features(self) -> u32 {
        (self.0 >> 16) as u32
    }
}

/// How many descriptors a persistent server keeps in reserve, so that a full table of descriptors
/// does not make it unreachable: one for the accepted socket, two for a stream and a data socket.
pub const SPARES: usize = 3;

/// The numbers of a server's spare descriptors, packed into one result: each takes 21 bits and is
/// stored plus one, so that zero means "none".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Spares(pub i64);

impl Spares {
    const BITS: u32 = 21;
    const MASK: i64 = (1 << Self::BITS) - 1;
    /// The highest descriptor number that fits.
    pub const MAX_FD: i32 = Self::MASK as i32 - 1;

    /// One more spare, in front of those that are there. The caller keeps to [`SPARES`] of them
    /// and to numbers up to [`Spares::MAX_FD`].
    #[must_use]
    pub const fn with(self, fd: i32) -> Self {
        Self((self.0 << Self::BITS) | (fd as i64 + 1))
    }

    /// Whether there is room for no more.
    #[must_use]
    pub const fn is_full(self) -> bool {
        self.0 >> (Self::BITS * (SPARES as u32 - 1)) != 0
    }

    /// Takes out the last one added, of those that are there.
    pub const fn pop(&mut self) -> i32 {
        let fd = (self.0 & Self::MASK) as i32 - 1;
        self.0 >>= Self::BITS;
        fd
    }

    /// The numbers, the last one added first.
    pub fn fds(self) -> impl Iterator<Item = i32> {
        (0..SPARES as u32)
            .map(move |i| ((self.0 >> (i * Self::BITS)) & Self::MASK) as i32 - 1)
            .filter(|fd| *fd >= 0)
    }
}
