//! Typed calls and chains, whose bytes are in memory that is shared with the process.

use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use farcall::Process;
use farcall::link::Polling;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::pipe2;

use super::measure::{Figure, Pinned, beside, take_turns};
use super::progress::Progress;
use super::root;
use crate::command::Failure;

/// Repetitions of one round.
const CALLS: usize = 500;

/// Bytes of the file that is opened, and of the larger transfers.
const SIZE: usize = 4096;

const LOCAL: &str = "the same call made locally";

pub async fn typed(progress: &Progress) -> Result<Vec<Figure>, Failure> {
    let process = root(None).await?;
    process.enter_ring(Polling::default()).await?;
    let pid = process.pid().ok_or_else(|| Failure::new("the process has no pid"))?;
    let _pinned = Pinned::apart(&[pid])?;
    let typed = Typed { progress, process, pid, file: Temporary::new()? };
    Ok(vec![
        typed.chain("chain.open_read_close").await?,
        typed.open_close("typed.open_close").await?,
        typed.pipe2("typed.pipe2").await?,
        typed.read("typed.read100", 100).await?,
        typed.read("typed.read4k", SIZE).await?,
        typed.write("typed.write4k", SIZE).await?,
    ])
}

/// A file of [`SIZE`] bytes that is gone when this is dropped.
struct Temporary(PathBuf);

impl Temporary {
    fn new() -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("farcall-bench-{}", std::process::id()));
        std::fs::write(&path, vec![7; SIZE]).map_err(|error| Failure::temporary(&path, &error))?;
        Ok(Self(path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

struct Typed<'p> {
    progress: &'p Progress,
    process: Process,
    pid: i32,
    file: Temporary,
}

impl Typed<'_> {
    fn path(&self) -> &Path {
        &self.file.0
    }

    /// The same calls made by this process, where the server of the other ones is.
    fn local(&self, mut calls: impl FnMut() -> std::io::Result<()>) -> Result<Duration, Failure> {
        let mut failed = Ok(());
        let repeat = || failed = (0..CALLS).try_for_each(|_| calls());
        let took = beside(self.pid, repeat)?;
        failed?;
        Ok(took)
    }

    /// A file of 4 KiB opened, read and closed: one round trip, or it is no figure.
    async fn chain(&self, name: &'static str) -> Result<Figure, Failure> {
        let [figure, baseline] = take_turns!(
            self.progress,
            name,
            CALLS,
            for _ in 0..CALLS {
                let mut chain = self.process.chain();
                let fd = chain.openat(None, self.path(), OFlag::O_RDONLY, Mode::empty());
                let bytes = chain.read(fd, SIZE);
                chain.close(fd);
                let mut done = chain.run().await?;
                if done.round_trips() != 1 || done.bytes(bytes)?.len() != SIZE {
                    let message = "the chain took more than one round trip, or read less";
                    return Err(Failure::new(message));
                }
            },
            self.local(|| {
                let mut bytes = vec![0; SIZE];
                File::open(self.path())?.read_exact(&mut bytes)?;
                black_box(bytes);
                Ok(())
            })?,
        );
        Ok(Figure::times(name, figure, "three local calls", baseline))
    }

    async fn open_close(&self, name: &'static str) -> Result<Figure, Failure> {
        let [figure, baseline] = take_turns!(
            self.progress,
            name,
            CALLS,
            for _ in 0..CALLS {
                let fd = self.process.openat(None, self.path(), OFlag::O_RDONLY, Mode::empty());
                fd.await?.close().await?;
            },
            self.local(|| File::open(self.path()).map(drop))?,
        );
        Ok(Figure::times(name, figure, "two local calls", baseline))
    }

    async fn pipe2(&self, name: &'static str) -> Result<Figure, Failure> {
        let [figure, baseline] = take_turns!(
            self.progress,
            name,
            CALLS,
            for _ in 0..CALLS {
                let (reader, writer) = self.process.pipe2(OFlag::empty()).await?;
                reader.close().await?;
                writer.close().await?;
            },
            self.local(|| pipe2(OFlag::O_CLOEXEC).map(drop).map_err(Into::into))?,
        );
        Ok(Figure::times(name, figure, "three local calls", baseline))
    }

    async fn read(&self, name: &'static str, len: usize) -> Result<Figure, Failure> {
        const PATH: &str = "/dev/zero";
        let fd = self.process.openat(None, PATH, OFlag::O_RDONLY, Mode::empty()).await?;
        let mut local = File::open(PATH)?;
        let [figure, baseline] = take_turns!(
            self.progress,
            name,
            CALLS,
            for _ in 0..CALLS {
                if self.process.read(&fd, len).await?.len() != len {
                    return Err(Failure::new("less was read than is there"));
                }
            },
            self.local(|| {
                let mut bytes = vec![0; len];
                local.read_exact(&mut bytes)?;
                black_box(bytes);
                Ok(())
            })?,
        );
        Ok(Figure::times(name, figure, LOCAL, baseline))
    }

    async fn write(&self, name: &'static str, len: usize) -> Result<Figure, Failure> {
        const PATH: &str = "/dev/null";
        let fd = self.process.openat(None, PATH, OFlag::O_WRONLY, Mode::empty()).await?;
        let mut local = File::options().write(true).open(PATH)?;
        let bytes = vec![7; len];
        let [figure, baseline] = take_turns!(
            self.progress,
            name,
            CALLS,
            for _ in 0..CALLS {
                if self.process.write(&fd, bytes.as_slice()).await? != len {
                    return Err(Failure::new("less was written than was given"));
                }
            },
            self.local(|| local.write_all(&bytes))?,
        );
        Ok(Figure::times(name, figure, LOCAL, baseline))
    }
}
