//! Bytes into a process and out of it.

use std::io::{Read, Write};

use nix::sys::mman::{MapFlags, ProtFlags};

use super::baseline::Server;
use super::measure::{Pinned, bandwidth, take_turns};
use super::progress::Progress;
use super::{Row, root};
use crate::Failure;

/// Bytes of a transfer in one direction, and transfers in both of one round.
const SIZE: usize = 1 << 20;
const TRANSFERS: usize = 20;

pub async fn memory(progress: &Progress) -> Result<Vec<Row>, Failure> {
    let process = root().await?;
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
    Ok(vec![bandwidth("memory.stream", &stream, "raw socketpair stream", &raw, 2 * SIZE)])
}
