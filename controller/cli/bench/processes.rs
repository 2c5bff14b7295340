//! Processes: making them, having them, having many.

use std::fs;
use std::path::Path;
use std::time::Instant;

use farcall::call::Polling;
use farcall::image::IMAGE;
use farcall::persist::{Home, Name, SharedMemory};
use farcall::{Child, Process};

use super::baseline::{NoOp, posix_spawn, std_command, tokio_command, vfork};
use super::idle::Pair;
use super::measure::{Pinned, Samples, row, since, take_turns};
use super::progress::Progress;
use super::{Row, root};
use crate::Failure;
use crate::list::Memory;

/// Processes of one round.
const SPAWNS: usize = 20;
/// What a controller has resident in the large case.
const GIBIBYTE: usize = 1 << 30;

pub async fn spawn(progress: &Progress) -> Result<Vec<Row>, Failure> {
    let root = root(Some(Polling::default())).await?;
    let _pinned = Pinned::with(&root)?;
    let no_op = NoOp::new()?;
    let mut stack = vec![0; 64 * 1024];
    let program = Path::new("/bin/true");
    let [isolated, spawned] = take_turns!(
        progress,
        "spawn.isolated",
        SPAWNS,
        for _ in 0..SPAWNS {
            come_and_go(root.child().spawn().await?).await?;
        },
        for _ in 0..SPAWNS {
            posix_spawn(no_op.path())?;
        },
    );
    let [shared, forked] = take_turns!(
        progress,
        "spawn.shared",
        SPAWNS,
        for _ in 0..SPAWNS {
            come_and_go(root.child().share_memory().share_files().spawn().await?).await?;
        },
        for _ in 0..SPAWNS {
            vfork(&mut stack)?;
        },
    );
    // One figure against three ways of doing the same.
    let [exec, posix, std, tokio] = take_turns!(
        progress,
        "spawn.exec",
        SPAWNS,
        for _ in 0..SPAWNS {
            run(&root, program).await?;
        },
        for _ in 0..SPAWNS {
            posix_spawn(program)?;
        },
        for _ in 0..SPAWNS {
            std_command(program)?;
        },
        for _ in 0..SPAWNS {
            tokio_command(program).await?;
        },
    );
    Ok(vec![
        row("spawn.isolated", &isolated, "posix_spawn of a static no-op", &spawned),
        row("spawn.shared", &shared, "vfork and _exit", &forked),
        row("spawn.exec", &exec, "posix_spawn of /bin/true", &posix),
        row("spawn.exec.std", &exec, "std::process of /bin/true", &std),
        row("spawn.exec.tokio", &exec, "tokio::process of /bin/true", &tokio),
        large(progress, &root, program, &exec).await?,
    ])
}

/// The same with much memory resident here: nothing of it is copied for a child.
async fn large(
    progress: &Progress,
    root: &Process,
    program: &Path,
    small: &Samples,
) -> Result<Row, Failure> {
    let memory = vec![1u8; GIBIBYTE];
    std::hint::black_box(&memory);
    let [figure] = take_turns!(
        progress,
        "spawn.exec.1gib",
        SPAWNS,
        for _ in 0..SPAWNS {
            run(root, program).await?;
        },
    );
    drop(memory);
    Ok(row("spawn.exec.1gib", &figure, "spawn.exec", small))
}

/// A child that is ready for calls, ends, and is reaped.
async fn come_and_go(mut child: Child) -> Result<(), Failure> {
    child.exit(0).await?;
    child.wait().await?;
    Ok(())
}

/// A program that runs, ends, and is reaped. Its child shares no table of descriptors, which it
/// would have to leave first.
async fn run(root: &Process, program: &Path) -> Result<(), Failure> {
    let mut child = root.child().share_memory().spawn().await?;
    child.execve(program, [program], [""; 0]).await?;
    child.wait().await?;
    Ok(())
}

/// A home of the bench's own, removed with what is in it.
struct BenchHome(Home);

impl BenchHome {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("farcall-bench-home-{}", std::process::id()));
        Self(Home::at(path))
    }

    async fn start(&self, root: &Process, number: usize) -> Result<Child, Failure> {
        let name: Name = format!("bench-{number}").parse().map_err(Failure::new)?;
        let reserved = self.0.reserve(&name)?;
        Ok(root.child().spawn_persistent(reserved, SharedMemory::Refuse).await?)
    }
}

impl Drop for BenchHome {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0.path());
    }
}

/// Ends a persistent child with its handle, whatever happens.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill(nix::sys::signal::Signal::SIGKILL);
    }
}

pub async fn footprint(progress: &Progress) -> Result<Vec<Row>, Failure> {
    progress.show("footprint");
    let root = root(Some(Polling::default())).await?;
    let home = BenchHome::new();
    let child = Ended(home.start(&root, 0).await?);
    let pid = child.0.pid().ok_or_else(|| Failure::new("the process has no pid"))?;
    let private =
        private_bytes(pid).ok_or_else(|| Failure::new("/proc tells no private memory"))?;
    Ok(vec![
        Row::alone("idle.switches", Pair::start()?.switches()?, "1/s"),
        Row::alone("footprint.image", IMAGE.len() as f64, "bytes"),
        Row::alone("footprint.private", private as f64, "bytes"),
    ])
}

fn private_bytes(pid: i32) -> Option<u64> {
    Memory::of(pid).map(|memory| memory.private_bytes)
}

pub async fn scale(progress: &Progress) -> Result<Vec<Row>, Failure> {
    const FEW: usize = 20;
    const MANY: usize = 2000;
    progress.show("scale.processes");
    // So few are soon made: one time alone would say little.
    const TURNS: usize = 9;
    let mut turns = Vec::with_capacity(TURNS);
    for _ in 0..TURNS {
        turns.push(many(FEW).await?);
    }
    let few = [0, 1, 2].map(|figure| median(turns.iter().map(|turn| turn[figure]).collect()));
    let many = many(MANY).await?;
    let ratio = few.iter().zip(&many).map(|(few, many)| many / few).fold(0.0, f64::max);
    Ok(vec![Row {
        baseline: Some("20 processes, start of each"),
        baseline_value: Some(few[0]),
        ratio: Some(ratio),
        ..Row::alone("scale.processes", many[0], "us")
    }])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// For each of so many persistent processes: microseconds to start it, microseconds for a call,
/// private bytes.
async fn many(count: usize) -> Result<[f64; 3], Failure> {
    let root = root(Some(Polling::default())).await?;
    let home = BenchHome::new();
    let mut children = Vec::with_capacity(count);
    let begun = Instant::now();
    for number in 0..count {
        children.push(Ended(home.start(&root, number).await?));
    }
    let start = since(begun);
    let begun = Instant::now();
    for child in &children {
        child.0.getppid().await?;
    }
    let call = since(begun);
    let memory: u64 = children.iter().filter_map(|child| private_bytes(child.0.pid()?)).sum();
    Ok([start, call, memory as f64].map(|total| total / count as f64))
}
