//! The image as code in somebody else's process: mapped readable and executable, entered through
//! its entry table, on a stack of 4 KiB between guard pages.

use std::ffi::c_void;
use std::fs::File;
use std::io::Write;
use std::num::NonZero;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::client::{Client, Ends, TOKEN, attach, count};
use crate::server::{fds, making, sockets};
use crate::stream::{Stream, read_up_to, request, until};

const PAGE: usize = 4096;

/// Memory of this process, unmapped when this is dropped.
struct Mapped {
    at: NonNull<c_void>,
    len: usize,
}

impl Mapped {
    /// The image, from a file that nobody can write any more.
    fn image() -> Self {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create(c"image", flags).unwrap());
        file.write_all(farcall::image::IMAGE).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all())).unwrap();
        let len = farcall::image::IMAGE.len();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_EXEC;
        // SAFETY: at an address that is free; the file is sealed.
        let at = unsafe {
            mmap(None, NonZero::new(len).unwrap(), protection, MapFlags::MAP_PRIVATE, &file, 0)
        };
        Self { at: at.unwrap(), len }
    }

    /// A page between two that can't be touched.
    fn stack() -> Self {
        let len = NonZero::new(3 * PAGE).unwrap();
        // SAFETY: at an address that is free; and of the new pages only the middle one is made
        // usable.
        let at = unsafe {
            let at = mmap_anonymous(None, len, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE);
            let at = at.unwrap();
            mprotect(at.byte_add(PAGE), PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
                .unwrap();
            at
        };
        Self { at, len: len.get() }
    }

    fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by this value, and no reference leads there.
        unsafe { munmap(self.at, self.len) }.unwrap();
    }
}

/// The entry table's offset at `at`.
fn entry(at: usize) -> u64 {
    let table = &farcall::image::IMAGE[176..216];
    crate::vectors::assert_matches(table, "entry-table");
    u64::from(u32::from_le_bytes(*table[at..].first_chunk().unwrap()))
}

/// A copy of this process that runs the image and nothing else; killed and reaped when dropped.
struct Copy {
    pid: i32,
    reaped: bool,
}

impl Copy {
    /// Clones this process through the image's `raw_syscall`: the child returns into the
    /// trampoline, which calls `serve_persistent` with these descriptors, with memory that it may
    /// use, and with where to say that it has begun. `stream` is the other end.
    fn new([input, output, listen]: [i32; 3], memory: u64, begun: u64, stream: &Stream) -> Self {
        let (image, stack) = (Mapped::image(), Mapped::stack());
        let at = |offset| image.address() + entry(offset);
        let (serve_persistent, trampoline, raw_syscall) = (at(20), at(24), at(28));
        let words: [u64; 8] = [
            trampoline,
            input as u64,
            output as u64,
            listen as u64,
            memory,
            begun,
            0,
            serve_persistent,
        ];
        let top = 2 * PAGE - size_of_val(&words);
        let _making = making();
        // SAFETY: the words fit at the upper end of the stack's page, which is writable and
        // aligned. The entry is a function of this type. The child that `clone` makes has copies
        // of all memory, runs only code of the image, on that stack, and leaves with exit.
        let pid = unsafe {
            stack.at.byte_add(top).cast::<[u64; 8]>().write(words);
            let raw_syscall: extern "C" fn(u64, u64, u64, u64, u64, u64, u64) -> i64 =
                std::mem::transmute(raw_syscall as *const ());
            raw_syscall(
                libc::SIGCHLD as u64,
                stack.address() + top as u64,
                0,
                0,
                0,
                0,
                libc::SYS_clone as u64,
            )
        };
        assert!(pid > 0, "clone: {pid}");
        let copy = Self { pid: pid as i32, reaped: false };
        let ends = [input, output, listen].into_iter().filter(|fd| *fd >= 0);
        copy.keeps_only(stream, &ends.collect::<Vec<_>>());
        copy
    }

    /// Closes what it has inherited from this process besides `keep`: other tests wait for the ends
    /// of these.
    fn keeps_only(&self, stream: &Stream, keep: &[i32]) {
        let mut keep = keep.to_vec();
        keep.extend([0, 1, 2]);
        keep.sort_unstable();
        keep.dedup();
        let ends = keep.iter().skip(1).map(|fd| fd - 1).chain([i32::MAX]);
        for (fd, end) in keep.iter().zip(ends) {
            if *fd < end {
                stream.done(libc::SYS_close_range, &[*fd as u64 + 1, end as u64, 0]);
            }
        }
        assert!(fds(self.pid).keys().eq(&keep), "{keep:?}");
    }

    #[track_caller]
    fn exits_with_0(&mut self) {
        let pid = Pid::from_raw(self.pid);
        let status = until("the process ends", || {
            let status = waitpid(pid, Some(WaitPidFlag::WNOHANG)).unwrap();
            (status != WaitStatus::StillAlive).then_some(status)
        });
        self.reaped = true;
        assert_eq!(status, WaitStatus::Exited(pid, 0));
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
            let _ = waitpid(Pid::from_raw(self.pid), None);
        }
    }
}

fn stream_of(socket: OwnedFd) -> Stream {
    Stream { results: socket.try_clone().unwrap(), requests: socket }
}

/// Everything that needs stack: calls, copies with their buffers, the handshakes.
fn everything_works(stream: &Stream, pid: i32) {
    assert_eq!(stream.getpid(), i64::from(pid));
    let memory = stream.memory(3 * 4096);
    stream.done(libc::SYS_munmap, &[memory + 2 * 4096, 4096]);
    assert_eq!(stream.copy_in(memory, &[7; 8192]), 8192);
    assert_eq!(stream.copy_in(memory + 8000, &[8; 1000]), -i64::from(libc::EFAULT));
    let (bytes, real) = stream.copy_out(memory, 10_000);
    assert_eq!((bytes.len(), real), (10_000, 8192));
    assert_eq!(stream.ask(crate::stream::HELLO, &[1]), crate::vectors::offered());
    stream.is_in_step();
}

#[test]
fn serve_persistent_lives_on_4_kib_of_stack_between_guard_pages() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (ours, theirs) = sockets();
    let stream = stream_of(ours);
    let fd = theirs.as_raw_fd();
    let mut copy = Copy::new([fd, fd, listener.as_raw_fd()], 0, 0, &stream);
    let listen = listener.as_raw_fd();
    drop((theirs, listener));
    everything_works(&stream, copy.pid);

    // A client of version 0, then a controller of version 1.
    stream.hang_up();
    let client = Client::connect(&path);
    let ends = Ends::new();
    assert!(client.send(&count(2), &ends.raw()));
    assert_eq!(read_up_to(&client.0, 9).len(), 8);
    everything_works(&ends.stream, copy.pid);
    ends.stream.hang_up();
    let attached = attach(&path, &TOKEN);
    everything_works(&attached.stream, copy.pid);

    // And as another image, again and again.
    attached.stream.speaks_version_1();
    for _ in 0..20 {
        crate::upgrade::upgrade(&attached.stream);
        assert_eq!(attached.stream.getpid(), i64::from(copy.pid));
    }

    // Where it may have fewer descriptors than it waits for, which takes a set of all that there could be.
    let memory = attached.stream.memory(4096);
    let nofile = u64::from(libc::RLIMIT_NOFILE);
    attached.stream.done(libc::SYS_prlimit64, &[0, nofile, 0, memory]);
    assert_eq!(attached.stream.copy_in(memory, &[0; 8]), 8);
    attached.stream.done(libc::SYS_prlimit64, &[0, nofile, memory]);
    drop(attached);
    let attached = attach(&path, &TOKEN);
    assert_eq!(attached.stream.getpid(), i64::from(copy.pid));

    // Without its listener it returns from the entry, into the trampoline.
    assert_eq!(attached.answer.listen(), listen);
    attached.stream.done(libc::SYS_close, &[listen as u64]);
    drop(attached);
    copy.exits_with_0();
}

#[test]
fn an_entry_begins_in_version_1_where_out_says_so() {
    // As many bytes as version 1 needs; what is in them does not count.
    let memory = vec![7u64; (16_384 + 64) / 8];
    let memory = (memory.as_ptr() as u64).next_multiple_of(64);
    let (ours, theirs) = sockets();
    let stream = stream_of(ours);
    let begun = AtomicU64::new(0);
    let at = (&raw const begun) as u64;
    let mut copy = Copy::new([theirs.as_raw_fd(), -2, -1], memory, at, &stream);
    drop(theirs);
    // A word that version 0 does not know, read ahead together with what it depends on.
    let linked = crate::ring::LINK | libc::SYS_getpid as u64;
    stream.send(&[request(libc::SYS_getpid as u64, &[]), request(linked, &[])].concat());
    assert_eq!([stream.result(), stream.result()], [i64::from(copy.pid); 2]);
    assert_eq!(stream.ask(crate::stream::HELLO, &[1]), crate::vectors::offered() | 1);
    // It has a copy of this memory.
    assert_eq!(stream.copy_out(at, 8).0, 1u64.to_le_bytes());
    // The log is behind what is read ahead.
    let (records, _) = stream.copy_out(memory + 8192, 16 * 64);
    let result = i64::from(copy.pid).to_le_bytes();
    let getpid = [request(libc::SYS_getpid as u64, &[]), result.into()].concat();
    assert_eq!(records.chunks(64).filter(|record| *record == getpid).count(), 2);
    drop(stream);
    copy.exits_with_0();
}

#[test]
fn any_other_negative_out_means_version_0() {
    let (ours, theirs) = sockets();
    let stream = stream_of(ours);
    let mut copy = Copy::new([theirs.as_raw_fd(), -3, -1], 64, 64, &stream);
    drop(theirs);
    everything_works(&stream, copy.pid);
    drop(stream);
    copy.exits_with_0();
}
