//! Controllers that race for one process: it is never two controllers' at once.

use crate::common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{LIMIT, Role, TestHome, role, tell};
use farcall::host::local::Stdio;
use farcall::persist::{Attach, Home, Place, SharedMemory};
use farcall::{Error, Local, Outcome, Process};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use tokio::time::timeout;

/// How many records each writes while it is attached.
const RECORDS: u64 = 6;

/// What a controller that has attached writes: a number of its own, and a count.
fn record(id: u64, count: u64) -> [u8; 16] {
    (u128::from(id) << 64 | u128::from(count)).to_ne_bytes()
}

/// Attaches again and again. In each round it creates a file that must not be there, writes its
/// records, and removes the file. Returns how many records of each round it was told to be written.
async fn compete(home: &Path, id: u64, take_over: bool, rounds: u64) -> BTreeMap<u64, u64> {
    let place = Home::at(home).place(&"one".parse().unwrap());
    let mut written = BTreeMap::new();
    let mut tries = 0;
    while (written.len() as u64) < rounds {
        tries += 1;
        let attach = Attach::default().timeout(LIMIT);
        // At times it waits until the other one is gone.
        let takes_over = take_over && tries % 2 == 0;
        let attach = if takes_over { attach.take_over() } else { attach };
        let process = match attach.to(place.clone()).await {
            Ok(process) => process,
            Err(Error::Held { .. }) => {
                tokio::task::yield_now().await;
                continue;
            }
            // It was taken over before it was ready, or others have come before.
            Err(Error::Lost(_) | Error::Gone | Error::Attach { .. }) if take_over => continue,
            Err(other) => panic!("{other:?}"),
        };
        let round = id + written.len() as u64;
        written.insert(round, hold(&process, home, round, take_over).await);
        if round.is_multiple_of(2) {
            // The end of the connection without a word is as good.
            let _ = process.prepare_for_reconnect().await;
        }
    }
    written
}

async fn hold(process: &Process, home: &Path, round: u64, take_over: bool) -> u64 {
    let lock = home.join("lock");
    let new = OFlag::O_CREAT | OFlag::O_EXCL;
    if !take_over {
        process.openat(None, &lock, new, Mode::S_IRUSR).await.expect("nobody else is attached");
    }
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_APPEND;
    let Ok(file) = process.openat(None, home.join("records"), flags, Mode::S_IRUSR).await else {
        assert!(take_over);
        return 0;
    };
    for count in 0..RECORDS {
        match process.write(&file, &record(round, count)).await {
            Ok(n) => assert_eq!(n, 16),
            Err(Error::Superseded { outcome, .. }) if take_over => {
                return count + u64::from(outcome == Outcome::Executed);
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    if !take_over {
        fs::remove_file(&lock).unwrap();
    }
    RECORDS
}

/// Lets two controllers attach `rounds` times each, while the other one does.
pub fn race(test: &str, take_over: bool, rounds: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    if let Some(argument) = role() {
        let (id, home) = argument.split_once(' ').unwrap();
        let (id, home) = (id.parse::<u64>().unwrap(), PathBuf::from(home));
        let limit = LIMIT * (rounds / 100) as u32;
        let race = async { timeout(limit, compete(&home, id, take_over, rounds)).await };
        let written = runtime.block_on(race).expect("each comes to its turn");
        let lines: Vec<String> = written.iter().map(|(id, n)| format!("{id} {n}")).collect();
        fs::write(home.join(format!("told-{id}")), lines.join("\n")).unwrap();
        // What it has dropped last is given up with it.
        drop(runtime);
        tell("done");
        std::process::exit(0);
    }
    let home = TestHome::new();
    runtime.block_on(async {
        let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
        let reserved = home.home.reserve(&"one".parse().unwrap()).unwrap();
        let process = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
        process.prepare_for_reconnect().await.unwrap();
    });
    let ids = [1_000_000_u64, 2_000_000];
    let start = |id| Role::start(test, format!("{id} {}", home.path().display()));
    for mut role in ids.map(start) {
        assert_eq!(role.told(), "done");
        assert!(role.ended().success());
    }
    let mut told: BTreeMap<u64, u64> = BTreeMap::new();
    for id in ids {
        let text = fs::read_to_string(home.path().join(format!("told-{id}"))).unwrap();
        told.extend(text.lines().map(|line| {
            let (id, count) = line.split_once(' ').unwrap();
            (id.parse::<u64>().unwrap(), count.parse::<u64>().unwrap())
        }));
    }
    assert_eq!(told.len() as u64, 2 * rounds);

    // Nobody's records lie among another's, and as many are there as each was told.
    let bytes = fs::read(home.path().join("records")).unwrap();
    let (records, []) = bytes.as_chunks::<16>() else { panic!("half a record") };
    let mut found: BTreeMap<u64, u64> = BTreeMap::new();
    let mut last = 0;
    for bytes in records {
        let number = u128::from_ne_bytes(*bytes);
        let (id, count) = ((number >> 64) as u64, number as u64);
        assert_eq!(count, if id == last { found[&id] } else { 0 }, "{id} after {last}");
        let before = found.insert(id, count + 1);
        assert_eq!(before.is_some(), id == last, "{id} again, after {last}");
        last = id;
    }
    told.retain(|_, count| *count > 0);
    assert_eq!(found, told);
    if !take_over {
        assert!(told.values().all(|count| *count == RECORDS));
    }
    runtime.block_on(async {
        let place: Place = home.home.place(&"one".parse().unwrap());
        let process = Attach::default().take_over().to(place).await.unwrap();
        process.exit(0).await.unwrap();
    });
}

#[test]
fn two_that_attach_a_thousand_times_are_never_attached_both() {
    race("two_that_attach_a_thousand_times_are_never_attached_both", false, 500);
}

#[test]
fn two_that_take_over_a_thousand_times_are_never_attached_both() {
    race("two_that_take_over_a_thousand_times_are_never_attached_both", true, 500);
}
