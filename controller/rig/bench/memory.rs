//! Bytes into a process and out of it.

use std::hint::black_box;
use std::io::{Read, Write};

use farcall::link::Polling;
use nix::sys::mman::{MapFlags, ProtFlags};

use super::baseline::Server;
use super::measure::{Figure, Pinned, take_turns};
use super::progress::Progress;
use super::root;
use crate::command::Failure;

/// Bytes of a transfer in one direction, and transfers in both of one round.
const SIZE: usize = 1 << 20;
const TRANSFERS: usize = 20;

pub async fn memory(progress: &Progress) -> Result<Vec<Figure>, Failure> {
    let process = root(None).await?;
    let mut echo = Server::start(Some(SIZE))?;
    let pid = process.pid().ok_or_else(|| Failure::new("the process has no pid"))?;
    let _pinned = Pinned::apart(&[pid, echo.pid()])?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = process.mmap(SIZE, protection, MapFlags::MAP_PRIVATE, None).await?;
    let mut bytes = vec![7; SIZE];
    let [stream, raw] = take_turns!(
        progress,
        "memory.stream",
        TRANSFERS,
        for _ in 0..TRANSFERS {
            process.write_memory(memory.address(), bytes).await?;
            bytes = process.read_memory(memory.address(), SIZE).await?;
        },
        for _ in 0..TRANSFERS {
            echo.stream.write_all(&bytes)?;
            echo.stream.read_exact(&mut bytes)?;
        },
    );
    let stream = Figure::bandwidth("memory.stream", stream, "raw socketpair stream", raw, 2 * SIZE);
    Ok(vec![arena(progress).await?, bulk(progress).await?, stream])
}

/// Into memory that the process shares with this one: it is where a call finds it.
async fn arena(progress: &Progress) -> Result<Figure, Failure> {
    let process = root(None).await?;
    process.enter_ring(Polling::default()).await?;
    let mut buffer = process.shared_buffer(SIZE)?;
    let bytes = vec![7; SIZE];
    let mut copy = vec![0; SIZE];
    let [figure, baseline] = take_turns!(
        progress,
        "memory.arena",
        TRANSFERS,
        for _ in 0..TRANSFERS {
            buffer.write(0, black_box(&bytes))?;
        },
        for _ in 0..TRANSFERS {
            copy.copy_from_slice(black_box(&bytes));
            black_box(&mut copy);
        },
    );
    if process.read_memory(buffer.address(), SIZE).await? != bytes {
        return Err(Failure::new("the bytes are not in the process"));
    }
    Ok(Figure::bandwidth("memory.arena", figure, "memcpy", baseline, SIZE))
}

/// Into and out of memory of a process that shares other memory with this one.
async fn bulk(progress: &Progress) -> Result<Figure, Failure> {
    let process = root(None).await?;
    process.enter_ring(Polling::default()).await?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = process.mmap(SIZE, protection, MapFlags::MAP_PRIVATE, None).await?;
    let mut bytes = vec![7; SIZE];
    let [mut one, mut other] = [vec![7; SIZE], vec![0; SIZE]];
    let [figure, baseline] = take_turns!(
        progress,
        "memory.bulk",
        TRANSFERS,
        for _ in 0..TRANSFERS {
            process.write_memory(memory.address(), bytes).await?;
            bytes = process.read_memory(memory.address(), SIZE).await?;
        },
        for _ in 0..TRANSFERS {
            other.copy_from_slice(black_box(&one));
            one.copy_from_slice(black_box(&other));
        },
    );
    Ok(Figure::bandwidth("memory.bulk", figure, "memcpy", baseline, 2 * SIZE))
}
