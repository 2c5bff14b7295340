//! The two sides: this process, and one that farcall drives. Both have a directory and memory with
//! a page behind it that can't be reached.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use farcall::abi::wire::Request;
use farcall::calls::Sysno;
use farcall::host::local::Stdio;
use farcall::proto::Call;
use farcall::{Local, Mapping, Process};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};
use tempfile::TempDir;

use super::plan::Plan;

/// Bytes of memory for a call's buffers; behind them lies a page that can't be reached.
pub const MEMORY: usize = 32 * 1024;
const GUARD: usize = 4096;

const OPEN_DIRECTORY: i32 = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;

fn c_path(path: &Path) -> Vec<u8> {
    [path.as_os_str().as_bytes(), b"\0"].concat()
}

/// Whether a descriptor of this process is a directory's.
pub fn is_directory(fd: i32) -> bool {
    let path = format!("/proc/self/fd/{fd}");
    std::fs::metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// This process.
pub struct Here {
    directory: TempDir,
    memory: *mut u8,
    umask: i64,
}

impl Here {
    pub fn new() -> Self {
        let (none, private) = (libc::PROT_NONE as usize, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a mapping at an address of the kernel's choice.
        let memory = unsafe {
            sc::syscall6(sc::nr::MMAP, 0, MEMORY + GUARD, none, private as usize, usize::MAX, 0)
        };
        let usable = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        // SAFETY: these pages were just mapped, and nobody else knows them.
        let protected = unsafe { sc::syscall3(sc::nr::MPROTECT, memory, MEMORY, usable) };
        assert_eq!(protected, 0);
        // SAFETY: the call has no pointers.
        let umask = unsafe { sc::syscall1(sc::nr::UMASK, 0o022) } as i64;
        Self { directory: tempfile::tempdir().unwrap(), memory: memory as *mut u8, umask }
    }

    pub fn memory(&self) -> u64 {
        self.memory as u64
    }

    pub fn put(&self, bytes: &[u8]) {
        // SAFETY: that many bytes are mapped there, and nothing refers to them.
        unsafe { std::slice::from_raw_parts_mut(self.memory, MEMORY) }.copy_from_slice(bytes);
    }

    pub fn get(&self) -> Vec<u8> {
        // SAFETY: that many bytes are mapped there, and no call is under way that changes them.
        unsafe { std::slice::from_raw_parts(self.memory, MEMORY) }.to_vec()
    }

    pub fn open_directory(&self) -> i32 {
        let path = c_path(self.directory.path());
        let (cwd, flags) = (libc::AT_FDCWD as usize, OPEN_DIRECTORY as usize);
        // SAFETY: the path ends with a zero and lives until after the call.
        let fd = unsafe { sc::syscall4(sc::nr::OPENAT, cwd, path.as_ptr() as usize, flags, 0) };
        assert!((fd as isize) >= 0);
        fd as i32
    }

    pub fn call(&self, plan: &Plan, args: [u64; 6]) -> i64 {
        let [a, b, c, d, e, f] = args.map(|arg| arg as usize);
        // SAFETY: plans are calls on descriptors of the test's own and on the memory above, or on
        // addresses where no process has any.
        (unsafe { sc::syscall6(plan.number as usize, a, b, c, d, e, f) }) as i64
    }

    pub fn close(&self, fd: i32) {
        // SAFETY: the descriptor is one that the test has opened, and has not closed.
        assert_eq!(unsafe { sc::syscall1(sc::nr::CLOSE, fd as usize) }, 0);
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        // SAFETY: the pages are this value's own; umask(2) has no pointers.
        unsafe {
            sc::syscall2(sc::nr::MUNMAP, self.memory as usize, MEMORY + GUARD);
            sc::syscall1(sc::nr::UMASK, self.umask as usize);
        }
    }
}

/// A process that farcall drives.
pub struct There {
    directory: TempDir,
    process: Process,
    memory: Mapping,
}

impl There {
    pub async fn new() -> Self {
        let process = Local::new().stdio(Stdio::Null).start().await.unwrap();
        let size = MEMORY + GUARD;
        let memory = process.mmap(size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE, None);
        let memory = memory.await.unwrap();
        let usable = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let pages = [memory.address(), MEMORY as u64, usable, 0, 0, 0];
        process.syscall(Sysno::mprotect, pages).await.unwrap();
        process.syscall(Sysno::umask, [0o022, 0, 0, 0, 0, 0]).await.unwrap();
        Self { directory: tempfile::tempdir().unwrap(), process, memory }
    }

    pub fn memory(&self) -> u64 {
        self.memory.address()
    }

    pub async fn put(&self, bytes: &[u8]) {
        self.process.write_memory(self.memory(), bytes).await.unwrap();
    }

    pub async fn get(&self) -> Vec<u8> {
        self.process.read_memory(self.memory(), MEMORY).await.unwrap()
    }

    pub async fn open_directory(&self) -> i32 {
        self.process.write_memory(self.memory(), c_path(self.directory.path())).await.unwrap();
        let args = [libc::AT_FDCWD as u64, self.memory(), OPEN_DIRECTORY as u64, 0, 0, 0];
        self.process.syscall(Sysno::openat, args).await.unwrap() as i32
    }

    pub async fn call(&self, plan: &Plan, args: [u64; 6]) -> i64 {
        let result = match Sysno::new(plan.number as usize) {
            Some(number) => self.process.syscall(number, args).await,
            // A number that has no name goes as it is.
            None => {
                let request = Request::syscall(plan.number, args);
                let call = Call::from(request);
                self.process.connection().call("a call without a name", call).await
            }
        };
        match result {
            Ok(value) => value as i64,
            Err(error) => {
                -i64::from(error.errno().unwrap_or_else(|| panic!("{plan:?}: {error}")) as i32)
            }
        }
    }
}
