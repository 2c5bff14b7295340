//! Calls: one at a time, many in flight, and in chains.

use std::fs;
use std::io::Read;

use farcall::Process;
use farcall::call::Call;
use farcall::sys::Sysno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::baseline::Server;
use super::measure::{Figure, Pinned, take_turns};
use super::progress::Progress;
use super::ring::on_a_thread;
use super::root;
use crate::Failure;

/// Calls of one round, one at a time.
const CALLS: usize = 500;
/// Calls in flight together, and how often in one round.
const IN_FLIGHT: usize = 64;
const BATCHES: usize = 50;
/// Chains of one round.
const CHAINS: usize = 100;

pub async fn calls(progress: &Progress) -> Result<Vec<Figure>, Failure> {
    let process = root(None).await?;
    let _pinned = Pinned::with(&process)?;
    let mut server = Server::start(None)?;
    Ok(vec![
        blocking(progress, "stream.call.sync", &process).await?,
        one_at_a_time(progress, "stream.call.async", &process, &mut server).await?,
        in_flight(progress, "stream.pipelined", &process, &mut server).await?,
        chain(progress, "chain.open_read_close", &process).await?,
    ])
}

/// getppid, each awaited on the thread that makes the call.
async fn blocking(
    progress: &Progress,
    name: &'static str,
    process: &Process,
) -> Result<Figure, Failure> {
    let (process, progress) = (process.clone(), progress.clone());
    on_a_thread(move || {
        let mut server = Server::start(None)?;
        let [figure, baseline] = take_turns!(
            progress,
            name,
            CALLS,
            for _ in 0..CALLS {
                process.syscall_blocking(Sysno::getppid, [0; 6])?;
            },
            server.ping_pong(CALLS)?,
        );
        Ok(Figure::times(name, figure, "ping-pong with a one-at-a-time server", baseline))
    })
    .await
}

/// getppid, each awaited before the next.
async fn one_at_a_time(
    progress: &Progress,
    name: &'static str,
    process: &Process,
    server: &mut Server,
) -> Result<Figure, Failure> {
    let [figure, baseline] = take_turns!(
        progress,
        name,
        CALLS,
        for _ in 0..CALLS {
            process.getppid().await?;
        },
        server.ping_pong(CALLS)?,
    );
    Ok(Figure::times(name, figure, "ping-pong with a one-at-a-time server", baseline))
}

/// getppid, many in flight, each awaited by itself.
async fn in_flight(
    progress: &Progress,
    name: &'static str,
    process: &Process,
    server: &mut Server,
) -> Result<Figure, Failure> {
    let call = || Call::syscall(Sysno::getppid, [0; 6]);
    let mut receipts = Vec::with_capacity(IN_FLIGHT);
    let [figure, baseline] = take_turns!(
        progress,
        name,
        IN_FLIGHT * BATCHES,
        for _ in 0..BATCHES {
            receipts.extend((0..IN_FLIGHT).map(|_| process.connection().call("getppid", call())));
            for receipt in receipts.drain(..) {
                receipt.await?;
            }
        },
        for _ in 0..BATCHES {
            server.pipelined(IN_FLIGHT)?;
        },
    );
    Ok(Figure::times(name, figure, "64 in flight at a one-at-a-time server", baseline))
}

/// A file of 4 KiB opened, read and closed: one round trip, or it is no figure.
async fn chain(
    progress: &Progress,
    name: &'static str,
    process: &Process,
) -> Result<Figure, Failure> {
    let path = std::env::temp_dir().join(format!("farcall-bench-{}", std::process::id()));
    fs::write(&path, vec![7; 4096]).map_err(|error| Failure::temporary(&path, &error))?;
    let [figure, baseline] = take_turns!(
        progress,
        name,
        CHAINS,
        for _ in 0..CHAINS {
            let mut chain = process.chain();
            let fd = chain.openat(None, &path, OFlag::O_RDONLY, Mode::empty());
            let bytes = chain.read(fd, 4096);
            chain.close(fd);
            let mut done = chain.run().await?;
            if done.round_trips() != 1 || done.bytes(bytes)?.len() != 4096 {
                let message = "the chain took more than one round trip, or read less";
                return Err(Failure::new(message));
            }
        },
        for _ in 0..CHAINS {
            std::hint::black_box(fs::File::open(&path)?.read(&mut [0; 4096])?);
        },
    );
    fs::remove_file(&path)?;
    Ok(Figure::times(name, figure, "three local calls", baseline))
}
