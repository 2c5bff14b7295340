//! Calls through shared memory.

use std::hint::black_box;
use std::time::Duration;

use farcall::Process;
use farcall::call::{Call, Polling};
use farcall::sys::Sysno;
use nix::unistd::getppid;
use tokio::sync::oneshot;

use super::measure::{Figure, Pinned, beside, take_turns};
use super::progress::Progress;
use super::root;
use crate::Failure;

/// Calls of one round.
const CALLS: usize = 20_000;
/// Calls in flight together, and how often in one round.
const IN_FLIGHT: usize = 64;
const BATCHES: usize = CALLS / IN_FLIGHT;

/// On the server's processor.
const LOCAL: &str = "local getppid";

pub async fn ring(progress: &Progress) -> Result<Vec<Figure>, Failure> {
    let process = root(None).await?;
    process.enter_ring(Polling::default()).await?;
    let pid = process.pid().ok_or_else(|| Failure::new("the process has no pid"))?;
    let _pinned = Pinned::apart(&[pid])?;
    Ok(vec![
        blocking(progress, "ring.call.sync", &process, pid).await?,
        one_at_a_time(progress, "ring.call.async", &process, pid).await?,
        in_flight(progress, "ring.pipelined", &process, pid).await?,
    ])
}

/// As many calls of this process, where the server of the others is.
fn local(calls: usize, server: i32) -> Result<Duration, Failure> {
    beside(server, || {
        for _ in 0..calls {
            black_box(getppid());
        }
    })
}

/// Each awaited on the thread that makes the call.
async fn blocking(
    progress: &Progress,
    name: &'static str,
    process: &Process,
    server: i32,
) -> Result<Figure, Failure> {
    let (process, progress) = (process.clone(), progress.clone());
    on_a_thread(move || {
        let [figure, baseline] = take_turns!(
            progress,
            name,
            CALLS,
            for _ in 0..CALLS {
                process.syscall_blocking(Sysno::getppid, [0; 6])?;
            },
            local(CALLS, server)?,
        );
        Ok(Figure::times(name, figure, LOCAL, baseline))
    })
    .await
}

/// Each awaited before the next.
async fn one_at_a_time(
    progress: &Progress,
    name: &'static str,
    process: &Process,
    server: i32,
) -> Result<Figure, Failure> {
    let [figure, baseline] = take_turns!(
        progress,
        name,
        CALLS,
        for _ in 0..CALLS {
            process.getppid().await?;
        },
        local(CALLS, server)?,
    );
    Ok(Figure::times(name, figure, LOCAL, baseline))
}

/// In two halves, each of which is submitted again as soon as it is complete: so the server always has
/// something to do.
async fn in_flight(
    progress: &Progress,
    name: &'static str,
    process: &Process,
    server: i32,
) -> Result<Figure, Failure> {
    let call = Call::syscall(Sysno::getppid, [0; 6]);
    let [figure, baseline] = take_turns!(
        progress,
        name,
        IN_FLIGHT * BATCHES,
        {
            let half = || process.connection().submit(vec![call.clone(); IN_FLIGHT / 2], Ok);
            let mut halves = [half(), half()];
            for _ in 1..BATCHES {
                for one in &mut halves {
                    black_box((&mut *one).await?);
                    *one = half();
                }
            }
            for one in halves {
                black_box(one.await?);
            }
        },
        local(IN_FLIGHT * BATCHES, server)?,
    );
    Ok(Figure::times(name, figure, LOCAL, baseline))
}

/// Measures on a thread of its own, which may block: the runtime goes on here.
pub async fn on_a_thread(
    measure: impl FnOnce() -> Result<Figure, Failure> + Send + 'static,
) -> Result<Figure, Failure> {
    let (done, row) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = done.send(measure());
    });
    row.await.map_err(|_| Failure::new("the measurement ended without a figure"))?
}
