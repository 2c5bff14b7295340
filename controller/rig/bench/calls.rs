//! Calls over a stream: one at a time, and many in flight.

use farcall::Process;
use farcall::calls::Sysno;
use farcall::proto::Call;

use super::baseline::Server;
use super::measure::{Figure, Pinned, take_turns};
use super::progress::Progress;
use super::ring::on_a_thread;
use super::root;
use crate::command::Failure;

/// Calls of one round, one at a time.
const CALLS: usize = 500;
/// Calls in flight together, and how often in one round.
const IN_FLIGHT: usize = 64;
const BATCHES: usize = 50;

pub async fn calls(progress: &Progress) -> Result<Vec<Figure>, Failure> {
    let process = root(None).await?;
    let _pinned = Pinned::with(&process)?;
    let mut server = Server::start(None)?;
    Ok(vec![
        blocking(progress, "stream.call.sync", &process).await?,
        one_at_a_time(progress, "stream.call.async", &process, &mut server).await?,
        in_flight(progress, "stream.pipelined", &process, &mut server).await?,
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
