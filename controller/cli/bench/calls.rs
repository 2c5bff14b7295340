//! Calls and bytes.

use std::fs;
use std::io::{Read, Write};

use farcall::Process;
use farcall::call::Call;
use farcall::sys::Sysno;
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::Mode;

use super::baseline::Server;
use super::measure::{Pinned, bandwidth, row, take_turns};
use super::{Row, root};
use crate::Failure;

/// Calls of one round, one at a time.
const CALLS: usize = 500;
/// Calls in flight together, and how often in one round.
const IN_FLIGHT: usize = 64;
const BATCHES: usize = 50;
/// Bytes of a large transfer.
const MEGABYTE: usize = 1 << 20;

pub async fn calls() -> Result<Vec<Row>, Failure> {
    let process = root().await?;
    let _pinned = Pinned::with(&process)?;
    let mut server = Server::start(None)?;
    let one = take_turns!(
        CALLS,
        for _ in 0..CALLS {
            process.getppid().await?;
        },
        server.ping_pong(CALLS)?
    );
    let one = row("stream.call.async", "ping-pong with a one-at-a-time server", one);
    let many = take_turns!(
        IN_FLIGHT * BATCHES,
        for _ in 0..BATCHES {
            pipelined(&process).await?;
        },
        for _ in 0..BATCHES {
            server.pipelined(IN_FLIGHT)?;
        }
    );
    let many = row("stream.pipelined", "64 in flight at a one-at-a-time server", many);
    Ok(vec![one, many, chain(&process).await?])
}

/// getppid, many in flight, each awaited by itself.
async fn pipelined(process: &Process) -> Result<(), Failure> {
    let call = || Call::syscall(Sysno::getppid, [0; 6]);
    let receipts: Vec<_> =
        (0..IN_FLIGHT).map(|_| process.connection().call("getppid", call())).collect();
    for receipt in receipts {
        receipt.await?;
    }
    Ok(())
}

/// A file of 4 KiB opened, read and closed: one round trip, or it is no figure.
async fn chain(process: &Process) -> Result<Row, Failure> {
    let path = std::env::temp_dir().join(format!("farcall-bench-{}", std::process::id()));
    fs::write(&path, vec![7; 4096])?;
    let figures = take_turns!(
        100,
        for _ in 0..100 {
            let mut chain = process.chain();
            let fd = chain.openat(None, &path, OFlag::O_RDONLY, Mode::empty());
            let bytes = chain.read(fd, 4096);
            chain.close(fd);
            let mut done = chain.run().await?;
            if done.round_trips() != 1 || done.bytes(bytes).len() != 4096 {
                let message = "the chain took more than one round trip, or read less";
                return Err(Failure::new(message));
            }
        },
        for _ in 0..100 {
            std::hint::black_box(fs::File::open(&path)?.read(&mut [0; 4096])?);
        }
    );
    fs::remove_file(&path)?;
    Ok(row("chain.open_read_close", "three local calls", figures))
}

pub async fn memory() -> Result<Vec<Row>, Failure> {
    let process = root().await?;
    let mut echo = Server::start(Some(MEGABYTE))?;
    let pid = process.pid().ok_or_else(|| Failure::new("the process has no pid"))?;
    let _pinned = Pinned::apart(&[pid, echo.pid()])?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = process.mmap(MEGABYTE, protection, MapFlags::MAP_PRIVATE, None).await?;
    let mut bytes = vec![7; MEGABYTE];
    let figures = take_turns!(
        20,
        for _ in 0..20 {
            process.write_memory(memory.address(), bytes).await?;
            bytes = process.read_memory(memory.address(), MEGABYTE).await?;
        },
        for _ in 0..20 {
            echo.stream.write_all(&bytes)?;
            echo.stream.read_exact(&mut bytes)?;
        }
    );
    Ok(vec![bandwidth("memory.stream", "raw socketpair stream", 2 * MEGABYTE, figures)])
}
