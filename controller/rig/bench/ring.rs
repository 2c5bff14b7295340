//! Calls through shared memory.

use std::hint::{black_box, spin_loop};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farcall::Process;
use farcall::calls::Sysno;
use farcall::link::Polling;
use farcall::proto::Call;
use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, getppid};

use super::measure::{Figure, Pinned, beside, take_turns};
use super::progress::Progress;
use super::root;
use crate::command::Failure;

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
        lines(progress, "ring.line", pid, || ())?,
        lines(progress, "ring.bare", pid, || {
            black_box(getppid());
        })?,
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

/// A number in a cache line that has none beside it.
#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU64);

impl Line {
    /// Waits until the number is that.
    fn wait_for(&self, number: u64) {
        let mut looks = 0u32;
        while self.0.load(Ordering::Acquire) != number {
            looks = looks.saturating_add(1);
            if looks < LOOKS {
                spin_loop();
            } else {
                // There may be one processor for both.
                std::thread::yield_now();
            }
        }
    }
}

/// A wait of so many looks is over where each side has a processor of its own.
const LOOKS: u32 = 10_000;

/// What is left of a call in shared memory if there is nothing around it: a cache line to where the server
/// is, `work` there, and a cache line back. No ring can be faster on this machine: with the call as the
/// work, and without any it is the way alone.
fn lines(
    progress: &Progress,
    name: &'static str,
    server: i32,
    work: impl Fn() + Copy + Send + 'static,
) -> Result<Figure, Failure> {
    let there = sched_getaffinity(Pid::from_raw(server))?;
    let [figure, baseline] = take_turns!(
        progress,
        name,
        CALLS,
        {
            let lines = Arc::new([Line::default(), Line::default()]);
            let [request, reply] = &*lines;
            let answering = std::thread::spawn({
                let lines = lines.clone();
                move || {
                    let [request, reply] = &*lines;
                    let moved = sched_setaffinity(Pid::from_raw(0), &there);
                    for number in 1..=CALLS as u64 + 1 {
                        request.wait_for(number);
                        work();
                        reply.0.store(number, Ordering::Release);
                    }
                    moved
                }
            });
            // It runs when it has answered the first.
            request.0.store(1, Ordering::Release);
            reply.wait_for(1);
            let begun = Instant::now();
            for number in 2..=CALLS as u64 + 1 {
                request.0.store(number, Ordering::Release);
                reply.wait_for(number);
            }
            let elapsed = begun.elapsed();
            let moved = answering.join().map_err(|_| Failure::new("the other thread panicked"))?;
            moved?;
            elapsed
        },
        local(CALLS, server)?,
    );
    Ok(Figure::times(name, figure, LOCAL, baseline))
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
    let (done, row) = oneshot::async_channel();
    std::thread::spawn(move || {
        let _ = done.send(measure());
    });
    row.await.map_err(|_| Failure::new("the measurement ended without a figure"))?
}
