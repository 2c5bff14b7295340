//! The same calls, made in another process by farcall and in this one by the crate `sc`, have the
//! same results.
//!
//! Each side has a temporary directory of its own, and both go through the same random calls. What
//! is compared: the result or errno, and every byte of the buffers that a call may fill. Descriptors
//! are compared by what they were made by, addresses not at all.
//!
//! `FARCALL_TEST_SEED=N cargo test --test suite differential` repeats the calls of one seed.

mod plan;
mod sides;

use std::collections::{BTreeMap, BTreeSet};

use crate::common::{Random, alone};
use nix::errno::Errno;
use plan::{Arg, Kind, Out, Plan, next};
use sides::{Here, MEMORY, There};

/// Calls a seed.
const CALLS: usize = 800;

/// A descriptor that both sides have made by the same call.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    kind: Kind,
    here: i32,
    there: i32,
}

/// What went on, to see that it was something.
#[derive(Default)]
struct Tally {
    calls: usize,
    successes: BTreeMap<&'static str, usize>,
    errnos: BTreeSet<i64>,
}

/// What has to be among the calls that succeed on both sides, over the fixed seeds.
const FAMILIES: [&str; 36] = [
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "getresuid",
    "sched_get_priority_max",
    "getpriority",
    "umask",
    "uname",
    "openat",
    "read",
    "pread64",
    "write",
    "pwrite64",
    "lseek",
    "ftruncate",
    "fallocate",
    "sendfile",
    "fstat",
    "newfstatat",
    "fsync",
    "dup",
    "fcntl",
    "close",
    "mkdirat",
    "unlinkat",
    "renameat2",
    "linkat",
    "symlinkat",
    "readlinkat",
    "faccessat",
    "getdents64",
    "fchmod",
    "pipe2",
    "eventfd2",
    "timerfd_create",
];

/// Seeds that are always used, beside a fresh one.
const SEEDS: [u64; 3] = [1, 2, 3];

#[tokio::test]
async fn calls_have_the_same_results_in_another_process_as_in_this_one() {
    // Some of them change this process.
    if !alone("calls_have_the_same_results_in_another_process_as_in_this_one") {
        return;
    }
    if let Ok(seed) = std::env::var("FARCALL_TEST_SEED") {
        return run(seed.parse().expect("a seed is a number"), &mut Tally::default()).await;
    }
    let mut tally = Tally::default();
    for seed in SEEDS {
        run(seed, &mut tally).await;
    }
    // A plan that only ever fails, or never does, would show little.
    for family in FAMILIES {
        assert!(tally.successes.contains_key(family), "{family}: {:?}", tally.successes);
    }
    assert!(tally.successes.values().sum::<usize>() > tally.calls / 3, "{:?}", tally.successes);
    for errno in [Errno::EBADF, Errno::EFAULT, Errno::ENOSYS, Errno::EINVAL, Errno::ENOENT] {
        assert!(tally.errnos.contains(&-(errno as i64)), "{errno}: {:?}", tally.errnos);
    }
    run(getrandom::u64().unwrap(), &mut Tally::default()).await;
}

async fn run(seed: u64, tally: &mut Tally) {
    println!("FARCALL_TEST_SEED={seed}");
    let mut random = Random::new(seed);
    let (here, there) = (Here::new(), There::new().await);
    let directory = (here.open_directory(), there.open_directory().await);
    let mut slots = vec![Slot { kind: Kind::Directory, here: directory.0, there: directory.1 }];
    for count in 0..CALLS {
        let plan = next(&mut random, &slots);
        // What is there before: what a call leaves alone is the same on both sides, too.
        let mut memory = vec![0xee; MEMORY];
        for (at, bytes) in &plan.input {
            memory[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        here.put(&memory);
        there.put(&memory).await;
        let args_here = plan.args.map(|arg| value(arg, here.memory(), &slots, |slot| slot.here));
        let args_there = plan.args.map(|arg| value(arg, there.memory(), &slots, |slot| slot.there));
        let result = here.call(&plan, args_here);
        let results = [result, there.call(&plan, args_there).await];
        let memories = [here.get(), there.get().await];
        let difference = difference(&plan, results, &memories);
        assert!(
            difference.is_none(),
            "seed {seed}, call {count}: {plan:?}\nwith {slots:?}\n{}",
            difference.unwrap_or_default()
        );
        follow(&mut slots, &plan, results, &memories);
        tally.calls += 1;
        if result < 0 {
            tally.errnos.insert(result);
        } else {
            *tally.successes.entry(plan.name).or_default() += 1;
        }
    }
    for slot in &slots {
        here.close(slot.here);
    }
}

/// What differs between here and there, if anything does.
fn difference(plan: &Plan, results: [i64; 2], memories: &[Vec<u8>; 2]) -> Option<String> {
    let [here, there] = results;
    if !(plan.makes.is_some() && here >= 0 && there >= 0) && here != there {
        return Some(format!("{here} here, {there} there"));
    }
    let [here, there] = match &plan.out {
        Some(out) => memories.each_ref().map(|memory| out.seen(memory, here)),
        None => memories.each_ref().map(|memory| vec![memory.clone()]),
    };
    let parts = here.iter().zip(&there).enumerate();
    let first = |(part, (a, b)): (usize, (&Vec<u8>, &Vec<u8>))| {
        let at = a.iter().zip(b).position(|(a, b)| a != b)?;
        let end = (at + 32).min(a.len()).min(b.len());
        let (a, b) = (&a[at..end], &b[at..end]);
        Some(format!("part {part} of memory, byte {at}: {a:x?} here, {b:x?} there"))
    };
    let found = parts.into_iter().find_map(first);
    found.or_else(|| (here != there).then(|| format!("{here:x?} here, {there:x?} there")))
}

/// What a call that went the same on both sides has made and closed.
fn follow(slots: &mut Vec<Slot>, plan: &Plan, results: [i64; 2], memories: &[Vec<u8>; 2]) {
    let [result, result_there] = results;
    if result < 0 {
        return;
    }
    if let Some(kind) = plan.makes {
        let (here, there) = (result as i32, result_there as i32);
        let directory = kind == Kind::Opened && sides::is_directory(here);
        slots.push(Slot { kind: if directory { Kind::Directory } else { kind }, here, there });
    }
    if let Some(Out::Descriptors(at)) = plan.out {
        for place in [at, at + 4] {
            let [here, there] = memories.each_ref().map(|memory| number(memory, place));
            slots.push(Slot { kind: Kind::Pipe, here, there });
        }
    }
    if let Some(slot) = plan.closes {
        slots.remove(slot);
    }
}

/// An argument as one side takes it.
fn value(arg: Arg, memory: u64, slots: &[Slot], number: impl Fn(&Slot) -> i32) -> u64 {
    match arg {
        Arg::Value(value) => value,
        Arg::Slot(slot) => number(&slots[slot]) as u64,
        Arg::Memory(at) => memory + at as u64,
    }
}

/// A descriptor's number in memory.
fn number(memory: &[u8], at: usize) -> i32 {
    i32::from_le_bytes(memory[at..at + 4].try_into().unwrap())
}
