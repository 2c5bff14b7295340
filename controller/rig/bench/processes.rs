//! Processes: making them, having them, having many.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use farcall::image::IMAGE;
use farcall::link::Polling;
use farcall::persist::{Home, Name, SharedMemory};
use farcall::{Child, Process};

use super::baseline::{NoOp, posix_spawn, std_command, tokio_command, vfork};
use super::idle::Pair;
use super::measure::{Figure, Pinned, ROUNDS, Samples, take_turns};
use super::progress::Progress;
use super::{Row, root};
use crate::command::Failure;
use crate::command::process::Memory;

/// Processes of one round.
const SPAWNS: usize = 20;
/// What a controller has resident in the large case.
const GIBIBYTE: usize = 1 << 30;

/// Children come and go where the kernel puts them, as they do for everybody. Programs run on one
/// processor: nearly all of the time is theirs, and where they run makes more of a difference than how they
/// were started.
pub async fn spawn(progress: &Progress) -> Result<Vec<Figure>, Failure> {
    let root = root(Some(Polling::default())).await?;
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
    let pinned = Pinned::with(&root)?;
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
    drop(pinned);
    let exec_against =
        |name, against, baseline| Figure::times(name, exec.clone(), against, baseline);
    Ok(vec![
        Figure::times("spawn.isolated", isolated, "posix_spawn of a static no-op", spawned),
        Figure::times("spawn.shared", shared, "vfork and _exit", forked),
        exec_against("spawn.exec", "posix_spawn of /bin/true", posix),
        exec_against("spawn.exec.std", "std::process of /bin/true", std),
        exec_against("spawn.exec.tokio", "tokio::process of /bin/true", tokio),
        large(progress, &root, program).await?,
    ])
}

/// The same with much memory resident here and without: nothing of it is copied for a child. To get so
/// much takes a while, so turns are longer. On one processor, where both differ in nothing else.
async fn large(progress: &Progress, root: &Process, program: &Path) -> Result<Figure, Failure> {
    const TURNS: usize = 3;
    let name = "spawn.exec.1gib";
    let _pinned = Pinned::with(root)?;
    let [mut large, mut small] = [Samples::default(), Samples::default()];
    for turn in 0..2 * TURNS {
        let has_memory = turn % 2 == 1;
        let memory = vec![1u8; if has_memory { GIBIBYTE } else { 0 }];
        std::hint::black_box(&memory);
        let samples = if has_memory { &mut large } else { &mut small };
        for round in progress.rounds(name, ROUNDS / TURNS) {
            let begun = Instant::now();
            for _ in 0..SPAWNS {
                run(root, program).await?;
            }
            // The first round warms up.
            if round > 0 {
                samples.add(begun.elapsed(), SPAWNS);
            }
        }
    }
    Ok(Figure::times(name, large, "spawn.exec", small))
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
    let mut child = root.child().share_memory().exec(program, [program], [""; 0]).await?;
    child.wait().await?;
    Ok(())
}

/// A home of the bench's own, removed with what is in it. It is in memory, as /run is, where there is such
/// a place: what a disk does is not measured.
struct BenchHome(Home);

impl BenchHome {
    fn new() -> Self {
        let memory = PathBuf::from("/dev/shm");
        let place = if memory.is_dir() { memory } else { std::env::temp_dir() };
        Self(Home::at(place.join(format!("farcall-bench-home-{}", std::process::id()))))
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
    const MANY: usize = 2000;
    // As for other figures: both take turns.
    const PASSES: usize = 3;
    // So few are soon made: one time alone would say little.
    const TURNS: usize = 5;
    let mut few = Group::default();
    let mut many = Group::default();
    for _ in 0..PASSES {
        for _ in progress.rounds("scale.processes", TURNS) {
            few.measure(FEW).await?;
        }
        many.measure(MANY).await?;
    }
    let [few, many] = [few.medians(), many.medians()];
    let ratio = few.iter().zip(&many).map(|(few, many)| many / few).fold(0.0, f64::max);
    Ok(vec![Row {
        baseline: Some("20 processes, start of each"),
        baseline_value: Some(few[0]),
        ratio: Some(ratio),
        ..Row::alone("scale.processes", many[0], "us")
    }])
}

/// As many are measured together.
const FEW: usize = 20;

/// What each of some persistent processes costs, [`FEW`] at a time: those of the larger half, when there
/// are that many beside them.
#[derive(Default)]
struct Group {
    start: Samples,
    call: Samples,
    private: Vec<u64>,
}

impl Group {
    async fn measure(&mut self, count: usize) -> Result<(), Failure> {
        let root = root(Some(Polling::default())).await?;
        let home = BenchHome::new();
        let mut children = Vec::with_capacity(count);
        while children.len() < count {
            let begun = Instant::now();
            for _ in 0..FEW {
                children.push(Ended(home.start(&root, children.len()).await?));
            }
            if children.len() > count / 2 {
                self.start.add(begun.elapsed(), FEW);
            }
        }
        for children in children.chunks(FEW) {
            let begun = Instant::now();
            for child in children {
                child.0.getppid().await?;
            }
            self.call.add(begun.elapsed(), FEW);
        }
        self.private.extend(children.iter().filter_map(|child| private_bytes(child.0.pid()?)));
        Ok(())
    }

    /// Microseconds to start one, microseconds for a call, private bytes on average.
    fn medians(&self) -> [f64; 3] {
        let bytes = self.private.iter().sum::<u64>() as f64 / self.private.len() as f64;
        [self.start.median(), self.call.median(), bytes]
    }
}
