//! What figures are compared with: the plain ways of doing the same.

use std::ffi::CString;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use clap::Args;
use farcall::calls::Sysno;
use nix::libc;
use nix::sched::{CloneFlags, clone};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use syscalls::SyscallArgs;

use crate::command::Failure;

/// A server that executes one request at a time, as rsyscall's does, in the simplest way: the
/// other end of a blocking socketpair. Also echoes a stream of bytes.
#[derive(Args)]
pub struct BenchServer {
    /// Instead of requests, take and give back that many bytes at a time
    #[arg(long)]
    echo: Option<usize>,
}

impl BenchServer {
    pub fn run(self) -> ExitCode {
        let Ok(fd) = nix::unistd::dup(std::io::stdin()) else { return ExitCode::FAILURE };
        let mut stream = UnixStream::from(fd);
        if let Some(size) = self.echo {
            let mut bytes = vec![0; size];
            while stream.read_exact(&mut bytes).is_ok() && stream.write_all(&bytes).is_ok() {}
            return ExitCode::SUCCESS;
        }
        let mut request = [0; 56];
        while stream.read_exact(&mut request).is_ok() {
            let words: Vec<usize> =
                request.as_chunks::<8>().0.iter().map(|word| usize::from_le_bytes(*word)).collect();
            let args = SyscallArgs::new(words[1], words[2], words[3], words[4], words[5], words[6]);
            let Some(number) = Sysno::new(words[0]) else { return ExitCode::FAILURE };
            // SAFETY: the bench asks for getppid alone.
            let result = unsafe { syscalls::syscall(number, &args) };
            let result = result.map_or_else(|errno| -i64::from(errno.into_raw()), |v| v as i64);
            if stream.write_all(&result.to_le_bytes()).is_err() {
                break;
            }
        }
        ExitCode::SUCCESS
    }
}

/// A server as a process of its own, and our end of its socketpair.
pub struct Server {
    pub stream: UnixStream,
    child: Child,
}

impl Server {
    pub fn start(echo: Option<usize>) -> Result<Self, Failure> {
        let (stream, there) = UnixStream::pair()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("bench-server");
        if let Some(size) = echo {
            command.arg("--echo").arg(size.to_string());
        }
        let child = command.stdin(OwnedFd::from(there)).stdout(Stdio::null()).spawn()?;
        Ok(Self { stream, child })
    }

    pub fn pid(&self) -> i32 {
        // Pids are below 2^22.
        self.child.id() as i32
    }

    /// `count` getppid, each awaited before the next.
    pub fn ping_pong(&mut self, count: usize) -> Result<(), Failure> {
        for _ in 0..count {
            self.send(1)?;
            self.receive(1)?;
        }
        Ok(())
    }

    /// `count` getppid, all in flight together.
    pub fn pipelined(&mut self, count: usize) -> Result<(), Failure> {
        self.send(count)?;
        self.receive(count)
    }

    fn send(&mut self, count: usize) -> Result<(), Failure> {
        let mut request = [0; 56];
        request[..8].copy_from_slice(&(Sysno::getppid as u64).to_le_bytes());
        Ok(self.stream.write_all(&request.repeat(count))?)
    }

    fn receive(&mut self, count: usize) -> Result<(), Failure> {
        Ok(self.stream.read_exact(&mut vec![0; 8 * count])?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It ends with its stream; killing it makes sure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A static executable of 129 bytes that exits with 0 at once.
pub struct NoOp {
    path: PathBuf,
}

impl NoOp {
    pub fn new() -> Result<Self, Failure> {
        const CODE: &[u8] = &[0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
        const BASE: u64 = 0x40_0000;
        let entry = 64 + 56;
        let size = (entry + CODE.len()) as u64;
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        // e_type, e_machine, e_version.
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        // e_entry, e_phoff, e_shoff.
        for word in [BASE + entry as u64, 64, 0] {
            elf.extend(word.to_le_bytes());
        }
        // e_flags, e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx.
        elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        // PT_LOAD, readable and executable.
        elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
        for word in [0, BASE, BASE, size, size, 4096] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(CODE);
        let path = std::env::temp_dir().join(format!("farcall-no-op-{}", std::process::id()));
        fs::write(&path, elf).map_err(|error| Failure::temporary(&path, &error))?;
        fs::set_permissions(&path, Permissions::from_mode(0o700))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for NoOp {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// posix_spawn(3) of a program, and waitpid(2).
pub fn posix_spawn(path: &Path) -> Result<(), Failure> {
    use std::os::unix::ffi::OsStrExt;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let argv = [path.as_ptr().cast_mut(), std::ptr::null_mut()];
    let envp = [std::ptr::null_mut()];
    let mut pid = 0;
    // SAFETY: the path and the arrays are terminated as posix_spawn expects, and outlive the call.
    let error = unsafe {
        libc::posix_spawn(
            &raw mut pid,
            path.as_ptr(),
            std::ptr::null(),
            std::ptr::null(),
            argv.as_ptr(),
            envp.as_ptr(),
        )
    };
    if error != 0 {
        return Err(std::io::Error::from_raw_os_error(error).into());
    }
    waitpid(Pid::from_raw(pid), None)?;
    Ok(())
}

/// The same by [`std::process::Command`], which waits as well. Like the others, the program gets no
/// environment.
pub fn std_command(path: &Path) -> Result<(), Failure> {
    Command::new(path).env_clear().status()?;
    Ok(())
}

/// The same by [`tokio::process::Command`].
pub async fn tokio_command(path: &Path) -> Result<(), Failure> {
    tokio::process::Command::new(path).env_clear().status().await?;
    Ok(())
}

/// A child as of vfork(2) that exits at once, and waitpid(2).
pub fn vfork(stack: &mut [u8]) -> Result<(), Failure> {
    let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_VFORK;
    // SAFETY: the child runs on a stack of its own and returns at once, which is _exit; until then
    // this thread is stopped.
    let pid = unsafe { clone(Box::new(|| 0), stack, flags, Some(libc::SIGCHLD)) }?;
    waitpid(pid, None)?;
    Ok(())
}
