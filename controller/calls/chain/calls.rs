//! The typed calls of a chain, by their names in man pages.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use nix::sys::stat::Mode;
use syscalls::Sysno;

use super::{AnyFd, Arg, Chain, Later};
use crate::abi::wire::Operation;
use crate::calls::address::ADDRESS_SIZE;
use crate::calls::handle::Fd;
use crate::calls::{Guardian, SocketAddress};
use crate::error::Error;
use crate::proto::batch::Makes;

/// Arguments, filled up with zeros.
fn args<const N: usize>(some: [Arg; N]) -> [Arg; 6] {
    let mut all = [Arg::from(0); 6];
    all[..N].copy_from_slice(&some);
    all
}

impl Chain<'_> {
    fn call<const N: usize>(&mut self, number: Sysno, some: [Arg; N]) -> Later<u64> {
        self.syscall(number, args(some))
    }

    /// A call whose result is a new descriptor.
    fn opening<const N: usize>(&mut self, number: Sysno, some: [Arg; N]) -> Later<Fd> {
        let names = self.prepare_to_keep(1, 0.into());
        let step = self.kept_call(number, some, !names.is_empty()).step;
        let fd = self.opens(step);
        self.keep_opened(names, &[fd]);
        fd
    }

    /// A call; if it is `kept`, one that KEEP before it is about.
    fn kept_call<const N: usize>(
        &mut self,
        number: Sysno,
        some: [Arg; N],
        kept: bool,
    ) -> Later<u64> {
        let later = self.call(number, some);
        self.batch.step_mut(later.step).linked |= kept;
        later
    }

    fn opens(&mut self, step: usize) -> Later<Fd> {
        self.batch.step_mut(step).makes = Makes::Fd;
        self.later(step)
    }

    /// LOAD: the `width` bytes (1, 2, 4 or 8) at `address`, as a result.
    pub fn load(&mut self, address: impl Into<Arg>, width: u64) -> Later<u64> {
        let step = self.operation("LOAD", Operation::Load, args([address.into(), width.into()]));
        self.later(step)
    }

    /// STORE: the low `width` bytes (1, 2, 4 or 8) of `value` to `address`.
    pub fn store(
        &mut self,
        address: impl Into<Arg>,
        width: u64,
        value: impl Into<Arg>,
    ) -> Later<u64> {
        let all = args([address.into(), width.into(), value.into()]);
        let step = self.operation("STORE", Operation::Store, all);
        self.later(step)
    }

    /// COPY: `len` bytes inside the process.
    pub fn copy(
        &mut self,
        to: impl Into<Arg>,
        from: impl Into<Arg>,
        len: impl Into<Arg>,
    ) -> Later<u64> {
        let all = args([to.into(), from.into(), len.into()]);
        let step = self.operation("COPY", Operation::Copy, all);
        self.later(step)
    }

    /// COPY_OUT: `len` bytes from `address`, to be had when the chain has run. The length may be an
    /// earlier call's result: just what `read` has read.
    pub fn copy_out(&mut self, address: impl Into<Arg>, len: impl Into<Arg>) -> Later<Vec<u8>> {
        let all = args([address.into(), len.into()]);
        let step = self.operation("COPY_OUT", Operation::CopyOut, all);
        self.later(step)
    }

    /// openat(2). A relative path starts at `directory`, or at the working directory. O_CLOEXEC is
    /// added.
    pub fn openat(
        &mut self,
        directory: Option<AnyFd<'_>>,
        path: impl AsRef<Path>,
        flags: OFlag,
        mode: Mode,
    ) -> Later<Fd> {
        let directory = self.directory(directory);
        let path = self.string("openat", path.as_ref().as_os_str().as_bytes());
        let flags = (flags | OFlag::O_CLOEXEC).bits();
        let mode = u64::from(mode.bits());
        self.opening(Sysno::openat, [directory, path, flags.into(), mode.into()])
    }

    fn directory(&mut self, directory: Option<AnyFd<'_>>) -> Arg {
        match directory {
            Some(fd) => self.fd(fd),
            None => nix::libc::AT_FDCWD.into(),
        }
    }

    /// read(2) of up to `len` bytes: what was read, to be had when the chain has run.
    pub fn read<'f>(&mut self, fd: impl Into<AnyFd<'f>>, len: usize) -> Later<Vec<u8>> {
        let fd = self.fd(fd);
        let buffer = self.output(len);
        let n = self.call(Sysno::read, [fd, buffer, (len as u64).into()]);
        self.copy_out(buffer, n)
    }

    /// write(2), once: how many bytes were taken.
    pub fn write<'f>(&mut self, fd: impl Into<AnyFd<'f>>, bytes: impl AsRef<[u8]>) -> Later<u64> {
        let fd = self.fd(fd);
        let len = bytes.as_ref().len() as u64;
        let buffer = self.input(bytes);
        self.call(Sysno::write, [fd, buffer, len.into()])
    }

    /// close(2) of a descriptor that the chain has opened: no handle to it is left.
    pub fn close(&mut self, fd: Later<Fd>) -> Later<u64> {
        let closed = self.call(Sysno::close, [fd.into()]);
        self.batch.step_mut(closed.step).closes = Some(fd.step);
        closed
    }

    /// pipe2(2): its reading and its writing end. O_CLOEXEC is added.
    pub fn pipe2(&mut self, flags: OFlag) -> (Later<Fd>, Later<Fd>) {
        let pair = self.output(8);
        let flags = (flags | OFlag::O_CLOEXEC).bits();
        let names = self.prepare_to_keep(2, pair);
        self.kept_call(Sysno::pipe2, [pair, flags.into()], !names.is_empty());
        let first = self.load(pair, 4).step;
        let second = self.load(pair.offset(4), 4).step;
        let (first, second) = (self.opens(first), self.opens(second));
        self.keep_opened(names, &[first, second]);
        (first, second)
    }

    /// dup2(2) to itself of a descriptor that is open already: one more handle to it.
    pub(crate) fn again(&mut self, fd: &Fd) -> Later<Fd> {
        let fd = self.fd(fd);
        self.opening(Sysno::dup2, [fd, fd])
    }

    /// socket(2). SOCK_CLOEXEC is added.
    pub fn socket(&mut self, family: AddressFamily, kind: SockType, flags: SockFlag) -> Later<Fd> {
        let kind = kind as i32 | (flags | SockFlag::SOCK_CLOEXEC).bits();
        self.opening(Sysno::socket, [(family as i32).into(), kind.into()])
    }

    /// setsockopt(2) with an `int`.
    pub fn setsockopt<'f>(
        &mut self,
        fd: impl Into<AnyFd<'f>>,
        level: i32,
        option: i32,
        value: i32,
    ) -> Later<u64> {
        let fd = self.fd(fd);
        let value = self.input(value.to_le_bytes());
        self.call(Sysno::setsockopt, [fd, level.into(), option.into(), value, 4.into()])
    }

    /// bind(2).
    pub fn bind<'f>(
        &mut self,
        fd: impl Into<AnyFd<'f>>,
        address: impl Into<SocketAddress>,
    ) -> Later<u64> {
        self.with_address(Sysno::bind, fd.into(), address.into())
    }

    /// connect(2).
    pub fn connect<'f>(
        &mut self,
        fd: impl Into<AnyFd<'f>>,
        address: impl Into<SocketAddress>,
    ) -> Later<u64> {
        self.with_address(Sysno::connect, fd.into(), address.into())
    }

    fn with_address(&mut self, number: Sysno, fd: AnyFd<'_>, address: SocketAddress) -> Later<u64> {
        let fd = self.fd(fd);
        let len = address.as_bytes().len() as u64;
        let address = self.input(address.as_bytes());
        self.call(number, [fd, address, len.into()])
    }

    /// listen(2).
    pub fn listen<'f>(&mut self, fd: impl Into<AnyFd<'f>>, backlog: i32) -> Later<u64> {
        let fd = self.fd(fd);
        self.call(Sysno::listen, [fd, backlog.into()])
    }

    /// accept4(2). SOCK_CLOEXEC is added.
    pub fn accept4<'f>(&mut self, fd: impl Into<AnyFd<'f>>, flags: SockFlag) -> Later<Fd> {
        let fd = self.fd(fd);
        let flags = (flags | SockFlag::SOCK_CLOEXEC).bits();
        self.opening(Sysno::accept4, [fd, 0.into(), 0.into(), flags.into()])
    }

    /// getsockname(2).
    pub fn getsockname<'f>(&mut self, fd: impl Into<AnyFd<'f>>) -> Later<SocketAddress> {
        let fd = self.fd(fd);
        let length = self.input((ADDRESS_SIZE as u32).to_le_bytes());
        let address = self.output(ADDRESS_SIZE);
        self.call(Sysno::getsockname, [fd, address, length]);
        self.load(length, 4);
        let step = self.copy_out(address, ADDRESS_SIZE as u64).step;
        self.later(step)
    }

    /// unshare(2) of namespaces and CLONE_FS; CLONE_FILES would change what descriptors mean in the
    /// middle of the chain and is for [`Process::unshare`](crate::Process::unshare).
    pub fn unshare(&mut self, flags: CloneFlags) -> Later<u64> {
        if flags.contains(CloneFlags::CLONE_FILES) {
            self.refuse(Error::misuse(
                "CLONE_FILES, unshared in a chain",
                "it changes what descriptors mean in the middle of the chain: call Process::unshare",
            ));
        }
        // The bits of the flags, as they are.
        let result = self.call(Sysno::unshare, [u64::from(flags.bits() as u32).into()]);
        if flags.contains(CloneFlags::CLONE_NEWUSER)
            && !matches!(self.task.guardian(), Guardian::None)
        {
            // New credentials may have cleared it.
            let (option, signal) = (nix::libc::PR_SET_PDEATHSIG, nix::libc::SIGKILL);
            self.call(Sysno::prctl, [option.into(), signal.into()]);
        }
        result
    }

    /// mount(2); what is `None` is a null pointer.
    pub fn mount(
        &mut self,
        source: Option<&Path>,
        target: impl AsRef<Path>,
        kind: Option<&str>,
        flags: MsFlags,
        data: Option<&str>,
    ) -> Later<u64> {
        let mut text = |text: Option<&[u8]>| match text {
            Some(text) => self.string("mount", text),
            None => 0.into(),
        };
        let source = text(source.map(|path| path.as_os_str().as_bytes()));
        let target = text(Some(target.as_ref().as_os_str().as_bytes()));
        let kind = text(kind.map(str::as_bytes));
        let data = text(data.map(str::as_bytes));
        self.call(Sysno::mount, [source, target, kind, flags.bits().into(), data])
    }

    /// umount2(2).
    pub fn umount2(&mut self, target: impl AsRef<Path>, flags: MntFlags) -> Later<u64> {
        let target = self.string("umount2", target.as_ref().as_os_str().as_bytes());
        self.call(Sysno::umount2, [target, flags.bits().into()])
    }

    /// mkdirat(2).
    pub fn mkdirat(
        &mut self,
        directory: Option<AnyFd<'_>>,
        path: impl AsRef<Path>,
        mode: Mode,
    ) -> Later<u64> {
        let directory = self.directory(directory);
        let path = self.string("mkdirat", path.as_ref().as_os_str().as_bytes());
        self.call(Sysno::mkdirat, [directory, path, u64::from(mode.bits()).into()])
    }

    /// chdir(2).
    pub fn chdir(&mut self, path: impl AsRef<Path>) -> Later<u64> {
        let path = self.string("chdir", path.as_ref().as_os_str().as_bytes());
        self.call(Sysno::chdir, [path])
    }

    /// pivot_root(2).
    pub fn pivot_root(&mut self, new: impl AsRef<Path>, old: impl AsRef<Path>) -> Later<u64> {
        let new = self.string("pivot_root", new.as_ref().as_os_str().as_bytes());
        let old = self.string("pivot_root", old.as_ref().as_os_str().as_bytes());
        self.call(Sysno::pivot_root, [new, old])
    }
}
