//! One connection from the client's side: requests out, results in, on bare descriptors.
//!
//! Nothing here waits forever: what does not come within [`LIMIT`] is a failure that says so.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd;

/// How long anything may take before the test gives up. No claim is about time.
pub const LIMIT: Duration = Duration::from_secs(60);

pub const OP: u64 = 1 << 32;
pub const HELLO: u64 = OP;
pub const COPY_IN: u64 = OP | 1;
pub const COPY_OUT: u64 = OP | 2;
pub const KEEP: u64 = OP | 6;
pub const REGISTRY: u64 = OP | 7;
pub const SERVE: u64 = OP | 8;
pub const IMAGE: u64 = OP | 9;
pub const RING: u64 = OP | 10;
pub const UPGRADE: u64 = OP | 11;
/// The first number that no operation has.
pub const UNKNOWN: u64 = OP | 12;

/// The bytes of a request; arguments that are not given are zero.
pub fn request(word: u64, args: &[u64]) -> Vec<u8> {
    let mut words = [0; 7];
    words[0] = word;
    words[1..=args.len()].copy_from_slice(args);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Waits until `ready` gives something.
#[track_caller]
pub fn until<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: did not happen within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for one of `events`, an error or a hang-up.
#[track_caller]
pub fn ready(fd: impl AsFd, events: PollFlags, what: &str) {
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    let limit = PollTimeout::try_from(LIMIT).unwrap();
    let n = loop {
        match poll(&mut fds, limit) {
            Err(Errno::EINTR) => {}
            other => break other.unwrap(),
        }
    };
    assert!(n > 0, "{what}: did not happen within {LIMIT:?}");
}

/// Reads until `len` bytes are there or the input ends.
#[track_caller]
pub fn read_up_to(fd: impl AsFd, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut got = 0;
    while got < len {
        ready(&fd, PollFlags::POLLIN, "the server sends something");
        match unistd::read(&fd, &mut bytes[got..]) {
            // What a socket says whose other end was closed with bytes unread.
            Ok(0) | Err(Errno::ECONNRESET) => break,
            n => got += n.unwrap(),
        }
    }
    bytes.truncate(got);
    bytes
}

/// The client's ends of a stream.
pub struct Stream {
    /// Results arrive here.
    pub results: OwnedFd,
    /// Requests leave here.
    pub requests: OwnedFd,
}

impl Drop for Stream {
    /// The child that another test is just making has all descriptors of this process until it
    /// executes: a socket that is only closed would stay open until then.
    fn drop(&mut self) {
        for fd in [&self.requests, &self.results] {
            // Pipes can't be shut down.
            let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
        }
    }
}

impl Stream {
    /// Sends all of `bytes`.
    #[track_caller]
    pub fn send(&self, bytes: &[u8]) {
        self.try_send(bytes).unwrap();
    }

    /// The same, if the other end is still there.
    #[track_caller]
    pub fn try_send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            ready(&self.requests, PollFlags::POLLOUT, "the server takes something");
            // A pipe or socket that is ready takes this many without blocking.
            let n = unistd::write(&self.requests, &rest[..rest.len().min(4096)])?;
            rest = &rest[n..];
        }
        Ok(())
    }

    #[track_caller]
    pub fn receive(&self, len: usize) -> Vec<u8> {
        let bytes = read_up_to(&self.results, len);
        assert_eq!(bytes.len(), len, "the stream ended early, after {bytes:02x?}");
        bytes
    }

    #[track_caller]
    pub fn result(&self) -> i64 {
        i64::from_le_bytes(self.receive(8).try_into().unwrap())
    }

    /// A request, and its result.
    #[track_caller]
    pub fn ask(&self, word: u64, args: &[u64]) -> i64 {
        self.send(&request(word, args));
        self.result()
    }

    /// A system call, and its result.
    #[track_caller]
    pub fn call(&self, number: libc::c_long, args: &[u64]) -> i64 {
        self.ask(number as u64, args)
    }

    /// A system call that succeeds.
    #[track_caller]
    pub fn done(&self, number: libc::c_long, args: &[u64]) -> u64 {
        let result = self.call(number, args);
        assert!(!(-4095..0).contains(&result), "{}", Errno::from_raw(-result as i32));
        result as u64
    }

    #[track_caller]
    pub fn getpid(&self) -> i64 {
        self.call(libc::SYS_getpid, &[])
    }

    /// New memory in the server, readable and writable.
    #[track_caller]
    pub fn memory(&self, len: u64) -> u64 {
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        self.done(libc::SYS_mmap, &[0, len, protection, flags, u64::MAX, 0])
    }

    /// Goes on in version 1.
    #[track_caller]
    pub fn speaks_version_1(&self) {
        let mut hello = crate::vectors::bytes("request-hello-1");
        hello[16..24].copy_from_slice(&self.memory(16_384).to_le_bytes());
        self.send(&hello);
        assert_eq!(self.result().to_le_bytes(), *crate::vectors::bytes("result-hello-1"));
    }

    #[track_caller]
    pub fn copy_in(&self, address: u64, bytes: &[u8]) -> i64 {
        self.send(&request(COPY_IN, &[address, bytes.len() as u64]));
        self.send(bytes);
        self.result()
    }

    /// The bytes at `address`, and how many of them are real.
    #[track_caller]
    pub fn copy_out(&self, address: u64, len: usize) -> (Vec<u8>, i64) {
        assert_eq!(self.ask(COPY_OUT, &[address, len as u64]), len as i64);
        let bytes = self.receive(len);
        (bytes, self.result())
    }

    /// The server hangs up without another byte.
    #[track_caller]
    pub fn ends(&self) {
        let bytes = read_up_to(&self.results, 1);
        assert!(bytes.is_empty(), "{bytes:02x?} came where the end was expected");
    }

    /// Closes a stream that is a socket, and waits until the server has heard it.
    #[track_caller]
    pub fn hang_up(self) {
        shutdown(self.requests.as_raw_fd(), Shutdown::Write).unwrap();
        self.ends();
    }

    /// Nothing is left in the stream that was not asked for: the next result is that of the next
    /// request.
    #[track_caller]
    pub fn is_in_step(&self) {
        assert_eq!(self.call(libc::SYS_close, &[u64::MAX]), -i64::from(libc::EBADF));
        assert!(self.getpid() > 0);
        let mut fds = [PollFd::new(self.results.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::ZERO), Ok(0), "bytes that nobody asked for");
    }
}
