//! What the target process's own /proc tells: proc(5).

use std::collections::BTreeSet;

use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::stat::Mode;
use syscalls::Sysno;

use super::Task;
use crate::calls::handle::Fd;
use crate::error::Result;

/// Bytes that are read at once from a directory or a file.
const AT_ONCE: usize = 32 * 1024;
/// Where d_name lies in a struct linux_dirent64, and d_reclen.
const NAME: usize = 19;
const LEN: usize = 16;

impl Task {
    /// What a descriptor is, as /proc/self/fd of the target process shows it: a path, or such as
    /// `socket:[4711]`. Nothing where there is no /proc, or no such descriptor.
    pub async fn fd_link(&self, number: i32) -> Option<String> {
        const PATH_MAX: u64 = libc::PATH_MAX as u64;
        let mut chain = self.chain();
        let path = chain.input(format!("/proc/self/fd/{number}\0"));
        let buffer = chain.output(PATH_MAX as usize);
        let at = libc::AT_FDCWD.into();
        let zero = 0.into();
        let n = chain.syscall(Sysno::readlinkat, [at, path, buffer, PATH_MAX.into(), zero, zero]);
        let bytes = chain.copy_out(buffer, n);
        let bytes = chain.run().await.ok()?.bytes(bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The descriptors that are open, as /proc/self/fd of the target process lists them.
    pub(crate) async fn open_numbers(&self) -> Result<BTreeSet<i32>> {
        let directory = self.open_directory("/proc/self/fd").await?;
        let mut numbers = self.numbers_at(&directory).await?;
        numbers.remove(&directory.number());
        Ok(numbers)
    }

    /// The entries of a directory whose names are numbers.
    pub(crate) async fn numbers_in(&self, directory: &str) -> Result<BTreeSet<i32>> {
        self.numbers_at(&self.open_directory(directory).await?).await
    }

    async fn open_directory(&self, path: &str) -> Result<Fd> {
        self.openat(None, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty()).await
    }

    async fn numbers_at(&self, directory: &Fd) -> Result<BTreeSet<i32>> {
        let mut numbers = BTreeSet::new();
        loop {
            let mut chain = self.chain();
            let buffer = chain.output(AT_ONCE);
            let zero = 0.into();
            let args =
                [directory.number().into(), buffer, (AT_ONCE as u64).into(), zero, zero, zero];
            let n = chain.syscall(Sysno::getdents64, args);
            let bytes = chain.copy_out(buffer, n);
            let bytes = chain.run().await?.bytes(bytes)?;
            if bytes.is_empty() {
                break;
            }
            numbers.extend(names(&bytes).filter_map(|name| name.parse::<i32>().ok()));
        }
        Ok(numbers)
    }

    /// The text of a file.
    pub(crate) async fn text_of(&self, path: &str) -> Result<String> {
        let file = self.openat(None, path, OFlag::O_RDONLY, Mode::empty()).await?;
        let mut text = Vec::new();
        loop {
            let piece = self.read(&file, AT_ONCE).await?;
            if piece.is_empty() {
                return Ok(String::from_utf8_lossy(&text).into_owned());
            }
            text.extend(piece);
        }
    }
}

/// The names in what getdents64(2) has left.
fn names(mut bytes: &[u8]) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_le_bytes(*bytes.get(LEN..)?.first_chunk()?));
        let name = bytes.get(NAME..len)?;
        bytes = bytes.get(len..)?;
        let name = name.split(|byte| *byte == 0).next()?;
        Some(std::str::from_utf8(name).unwrap_or_default())
    })
}
